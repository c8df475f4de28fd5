//! Which devices of this machine a command uses.

use std::num::NonZeroUsize;
use std::str::FromStr;

use farm_core::parallel::cost::devices::DevicesError;
use farm_core::parallel::cost::{self, DeviceRates, Site};

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

/// Rates of devices of `threads` compute threads each: of one process, or of one process each on hosts of their own.
pub fn cpu_site(threads: usize, processes: bool) -> Result<Site, DevicesError> {
    let known = cost::devices::Devices::embedded()?;
    let one = known.device("cpu")?;
    let times = threads as f64;
    let device = DeviceRates {
        linear: one.linear * times,
        attention: one.attention * times,
        bandwidth: one.bandwidth * times,
        ..one
    };
    let site = Site::one_host(device, known.link("local")?);
    Ok(if processes { Site { between: known.link("10gbe")?, devices_per_host: 1, ..site } } else { site })
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
