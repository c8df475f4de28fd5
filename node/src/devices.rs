//! Which devices of this machine a command uses.

use std::num::NonZeroUsize;
use std::path::Path;
use std::str::FromStr;

use anyhow::Context;
use farm_core::parallel::cost::Site;
use farm_core::parallel::cost::devices::Devices as Rates;

/// More devices than this on one node is a typing error.
const MAX_DEVICES: usize = 256;

/// `cpu:K`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Devices {
    pub cpus: usize,
}

impl FromStr for Devices {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let count = text.strip_prefix("cpu:").ok_or("write cpu:K, for example cpu:2")?;
        match count.parse() {
            Ok(cpus) if (1..=MAX_DEVICES).contains(&cpus) => Ok(Self { cpus }),
            _ => Err(format!("{count:?} is not a number in 1..={MAX_DEVICES}")),
        }
    }
}

impl Devices {
    /// Compute threads of each device: as asked, or the processor's cores divided among the devices.
    pub fn threads(self, asked: Option<NonZeroUsize>) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        asked.map_or_else(|| (cores / self.cpus).max(1), NonZeroUsize::get)
    }
}

/// Names that `farm-node calibrate` gives to what it measures.
pub const CALIBRATED_CPU: &str = "cpu-here";
pub const CALIBRATED_LOCAL: &str = "local-here";
pub const CALIBRATED_TCP: &str = "tcp-here";

/// Where ranks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placing {
    /// Threads of one process.
    Threads,
    /// One process each, on hosts of their own.
    Processes,
}

impl Devices {
    /// Rates of these devices with `threads` compute threads each: those of a file that `farm-node calibrate` has
    /// written here, or typical ones. The machine's memory is divided among them.
    pub fn site(self, threads: usize, placing: Placing, calibrated: Option<&Path>) -> anyhow::Result<Site> {
        let (mut device, inside, between) = match calibrated {
            Some(file) => {
                let known = Rates::with_file(file)?;
                (known.device(CALIBRATED_CPU)?, known.link(CALIBRATED_LOCAL)?, known.link(CALIBRATED_TCP)?)
            }
            None => {
                let known = Rates::embedded()?;
                let mut device = known.device("cpu")?;
                for rate in [&mut device.linear, &mut device.attention, &mut device.bandwidth] {
                    *rate *= threads as f64;
                }
                (device, known.link("local")?, known.link("10gbe")?)
            }
        };
        device.memory = memory_bytes()? / self.cpus as f64;
        let site = Site::one_host(device, inside);
        Ok(match placing {
            Placing::Threads => site,
            Placing::Processes => Site { between, devices_per_host: 1, ..site },
        })
    }
}

/// Of this machine.
fn memory_bytes() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("the size of the memory is read from /proc")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).context("/proc/meminfo has no MemTotal")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("MemTotal is {line:?}"))?;
    Ok(1024.0 * kib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_documented_and_nothing_else() {
        assert_eq!("cpu:2".parse(), Ok(Devices { cpus: 2 }));
        for bad in ["", "cpu", "cpu:", "cpu:0", "cpu:-1", "cpu:257", "gpu:1", "2"] {
            assert!(bad.parse::<Devices>().is_err(), "{bad}");
        }
    }
}
