//! Which devices of this machine a command uses.

use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::Context;
use farm_core::engine::cpu::CpuEngine;
use farm_core::parallel::cost::Site;
use farm_core::parallel::cost::devices::Devices as Rates;
use farm_core::precision::Precision;

use crate::cores;

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

/// The threads of a command's devices.
#[derive(clap::Args, Clone, Copy)]
// Flattened into other commands' arguments, of which this is a part, not a group.
#[group(skip)]
pub struct ThreadArgs {
    /// Compute threads of each device; what is computed has the same bits for any number [default: the cores that this
    /// process may use, divided among the devices]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Keep each thread on a core of its own, and the threads of a device on one NUMA node if one has room
    #[arg(long)]
    pin: bool,
    /// fp32; or bf16, which rounds the weights of layers over the visual tokens and so halves them, and on processors with
    /// matrix units (AMX) all that is multiplied there: much faster, and not quite the same clip
    #[arg(long, value_name = "fp32|bf16", default_value_t)]
    precision: Precision,
}

impl ThreadArgs {
    pub fn compute(self, devices: usize) -> anyhow::Result<Compute> {
        // Heeds the process's affinity and its control group's quota.
        let usable = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let threads = self.threads.map_or_else(|| (usable / devices).max(1), NonZeroUsize::get);
        let cores = match self.pin {
            true => Some(cores::assign(&cores::numa_nodes()?, &cores::allowed()?, devices, threads)?),
            false => None,
        };
        Ok(Compute { threads, precision: self.precision, cores: cores.map(Arc::new) })
    }
}

/// The compute threads of each device, and where they run.
#[derive(Clone)]
pub struct Compute {
    threads: usize,
    precision: Precision,
    /// Of each device, if its threads are pinned.
    cores: Option<Arc<Vec<Vec<usize>>>>,
}

impl Compute {
    /// `threads` for any device.
    #[cfg(test)]
    pub fn unpinned(threads: usize) -> Self {
        Self { threads, precision: Precision::default(), cores: None }
    }

    /// Threads of each device.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// An engine with the threads of device `device`.
    pub fn engine(&self, device: usize) -> anyhow::Result<CpuEngine> {
        let engine = CpuEngine::with_precision(self.threads, self.precision)?;
        if let Some(cores) = self.cores_of(device) {
            let pinned = engine.on_every_thread(|thread| cores::pin_thread(&cores[thread..=thread]));
            pinned.into_iter().collect::<io::Result<()>>().with_context(|| format!("cannot pin to cores {cores:?}"))?;
        }
        Ok(engine)
    }

    /// Keeps the calling thread, which is about to use that engine, on the device's cores: it computes too what is not
    /// worth waking another thread for.
    pub fn settle(&self, device: usize) -> anyhow::Result<()> {
        match self.cores_of(device) {
            Some(cores) => cores::pin_thread(cores).with_context(|| format!("cannot pin to cores {cores:?}")),
            None => Ok(()),
        }
    }

    fn cores_of(&self, device: usize) -> Option<&[usize]> {
        self.cores.as_ref().map(|cores| &cores[device][..])
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
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_thread_of_each_device_that_is_pinned_has_a_core_of_its_own() {
        // As many as there are here to tell one from the other.
        let some = cores::allowed().unwrap().len().min(2);
        for (devices, threads) in [(some, 1), (1, some)] {
            let args = ThreadArgs { threads: NonZeroUsize::new(threads), pin: true, precision: Precision::F32 };
            let compute = args.compute(devices).unwrap();
            let mut all = BTreeSet::new();
            for device in 0..devices {
                let own = |_| cores::allowed().unwrap();
                let seen = compute.engine(device).unwrap().on_every_thread(own);
                assert!(seen.iter().all(|cores| cores.len() == 1), "{seen:?}");
                let seen: BTreeSet<usize> = seen.into_iter().flatten().collect();
                let compute = compute.clone();
                let settled = std::thread::spawn(move || compute.settle(device).map(|()| cores::allowed().unwrap()));
                assert_eq!(settled.join().unwrap().unwrap(), seen, "the thread that uses the engine");
                all.extend(seen);
            }
            assert_eq!(all.len(), devices * threads);
            assert!(args.compute(MAX_DEVICES * 64).is_err());
        }
    }

    #[test]
    fn without_asking_nothing_is_pinned() {
        let compute = ThreadArgs { threads: None, pin: false, precision: Precision::F32 }.compute(1).unwrap();
        let all = cores::allowed().unwrap();
        assert!(compute.threads() <= all.len());
        compute.settle(0).unwrap();
        assert!(
            compute.engine(0).unwrap().on_every_thread(|_| cores::allowed().unwrap()).iter().all(|seen| *seen == all)
        );
    }

    #[test]
    fn devices_are_read_as_documented_and_nothing_else() {
        assert_eq!("cpu:2".parse(), Ok(Devices { cpus: 2 }));
        for bad in ["", "cpu", "cpu:", "cpu:0", "cpu:-1", "cpu:257", "gpu:1", "2"] {
            assert!(bad.parse::<Devices>().is_err(), "{bad}");
        }
    }
}
