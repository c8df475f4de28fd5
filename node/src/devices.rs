//! Which devices of this machine a command uses.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::Context;
use farm_core::engine::cpu::CpuEngine;
#[cfg(feature = "cuda")]
use farm_core::engine::cuda::driver::{CudaDevice, PeerLink};
#[cfg(feature = "cuda")]
use farm_core::engine::cuda::{CudaEngine, emulation::Emulation};
use farm_core::parallel::cost::Site;
use farm_core::parallel::cost::devices::Devices as Rates;
use farm_core::precision::Precision;

use crate::cores;
use crate::engine::DeviceEngine;

/// More devices than this on one node is a typing error.
const MAX_DEVICES: usize = 256;

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A share of the processor's cores.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// A place on the first NVIDIA GPU, beside the others: to check what groups compute where there is one GPU.
    Shared,
    /// A GPU that is not there: its kernels run on the processor, to be checked.
    Emulated,
}

impl Kind {
    const ALL: [(Self, &str); 4] =
        [(Self::Cpu, "cpu"), (Self::Cuda, "cuda"), (Self::Shared, "shared"), (Self::Emulated, "emulated")];
}

/// `cpu:K`, `cuda:K`, `shared:K` or `emulated:K`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Devices {
    pub kind: Kind,
    pub count: usize,
}

impl Devices {
    /// One share of the processor.
    pub const CPU: Self = Self { kind: Kind::Cpu, count: 1 };
}

impl FromStr for Devices {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let forms = "write cpu:K or cuda:K, for example cpu:2";
        let (name, count) = text.split_once(':').ok_or(forms)?;
        let (kind, _) = Kind::ALL.into_iter().find(|(_, known)| *known == name).ok_or(forms)?;
        match count.parse() {
            Ok(count) if (1..=MAX_DEVICES).contains(&count) => Ok(Self { kind, count }),
            _ => Err(format!("{count:?} is not a number in 1..={MAX_DEVICES}")),
        }
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Kind::ALL.into_iter().find(|(kind, _)| *kind == self.kind).map_or("", |(_, name)| name);
        write!(f, "{name}:{}", self.count)
    }
}

/// The threads of a command's devices.
#[derive(clap::Args, Clone, Copy, Default)]
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
    pub fn compute(self, devices: Devices) -> anyhow::Result<Compute> {
        self.compute_within(devices, None)
    }

    /// GPUs that fill `memory` bytes at most.
    pub fn compute_within(self, devices: Devices, memory: Option<f64>) -> anyhow::Result<Compute> {
        let (precision, count) = (self.precision, devices.count);
        // Heeds the process's affinity and its control group's quota.
        let usable = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let threads = self.threads.map_or_else(|| (usable / count).max(1), NonZeroUsize::get);
        let cores = match self.pin {
            true => Some(cores::assign(&cores::numa_nodes()?, &cores::allowed()?, count, threads)?),
            false => None,
        };
        let hardware = match devices.kind {
            Kind::Cpu => Hardware::Cpu,
            #[cfg(feature = "cuda")]
            Kind::Cuda | Kind::Shared => {
                let gpus = if devices.kind == Kind::Shared { 1 } else { count };
                let gpus = CudaDevice::open_several(gpus);
                Hardware::Cuda(gpus.with_context(|| format!("cannot use {devices}; see farm-node doctor"))?)
            }
            #[cfg(feature = "cuda")]
            Kind::Emulated => {
                let limit = memory.map_or(usize::MAX, |bytes| bytes as usize);
                Hardware::Emulated((0..count).map(|_| Arc::new(Emulation::with_memory(limit))).collect())
            }
            #[cfg(not(feature = "cuda"))]
            Kind::Cuda | Kind::Shared | Kind::Emulated => {
                anyhow::bail!("this program was built without cuda, so there is no {devices}")
            }
        };
        Ok(Compute { threads, precision, cores: cores.map(Arc::new), memory, hardware })
    }
}

/// A number of bytes, perhaps with a unit.
pub fn parse_bytes(text: &str) -> Result<f64, String> {
    const UNITS: [(&str, u32); 4] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
    let unit = UNITS.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)));
    let (number, shift) = unit.unwrap_or((text, 0));
    match number.trim_end().parse::<f64>() {
        Ok(number) if (1.0..=1e15).contains(&(number * 2f64.powi(shift as i32))) => {
            Ok(number * 2f64.powi(shift as i32))
        }
        _ => Err("write bytes, or a number of KiB, MiB, GiB or TiB, for example 16GiB".into()),
    }
}

/// What each device computes with. Cloning shares it.
#[derive(Clone)]
pub struct Compute {
    threads: usize,
    precision: Precision,
    /// Of each device, if its threads are pinned.
    cores: Option<Arc<Vec<Vec<usize>>>>,
    /// Bytes that a GPU may fill.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    memory: Option<f64>,
    hardware: Hardware,
}

#[derive(Clone)]
enum Hardware {
    Cpu,
    #[cfg(feature = "cuda")]
    /// Devices beyond the last are places on it.
    Cuda(Vec<Arc<CudaDevice>>),
    #[cfg(feature = "cuda")]
    Emulated(Vec<Arc<Emulation>>),
}

impl Compute {
    /// Shares of the processor, with `threads` for each.
    #[cfg(test)]
    pub fn unpinned(threads: usize) -> Self {
        Self { threads, precision: Precision::default(), cores: None, memory: None, hardware: Hardware::Cpu }
    }

    /// Threads of each share of the processor.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Device `device`.
    pub fn engine(&self, device: usize) -> anyhow::Result<DeviceEngine> {
        Ok(match &self.hardware {
            Hardware::Cpu => {
                let engine = CpuEngine::with_precision(self.threads, self.precision)?;
                if let Some(cores) = self.cores_of(device) {
                    let pinned = engine.on_every_thread(|thread| cores::pin_thread(&cores[thread..=thread]));
                    let pinned = pinned.into_iter().collect::<io::Result<()>>();
                    pinned.with_context(|| format!("cannot pin to cores {cores:?}"))?;
                }
                DeviceEngine::Cpu(engine)
            }
            #[cfg(feature = "cuda")]
            Hardware::Cuda(gpus) => {
                let gpu = gpus[self.memory_of(device)].clone();
                DeviceEngine::Cuda(CudaEngine::new(gpu, self.precision))
            }
            #[cfg(feature = "cuda")]
            Hardware::Emulated(all) => DeviceEngine::Emulated(CudaEngine::new(all[device].clone(), self.precision)),
        })
    }

    /// Memories that weights lie in, each that of the device of its number; shares of the processor have one together.
    pub fn memories(&self) -> usize {
        match &self.hardware {
            Hardware::Cpu => 1,
            #[cfg(feature = "cuda")]
            Hardware::Cuda(gpus) => gpus.len(),
            #[cfg(feature = "cuda")]
            Hardware::Emulated(all) => all.len(),
        }
    }

    /// The memory of device `device`.
    pub fn memory_of(&self, device: usize) -> usize {
        device.min(self.memories() - 1)
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes that a GPU of these may fill; none if they are no GPUs or nothing limits them.
    #[cfg(feature = "cuda")]
    pub fn gpu_memory(&self) -> anyhow::Result<Option<f64>> {
        Ok(match &self.hardware {
            Hardware::Cpu => None,
            // All of them have the same plan.
            Hardware::Cuda(gpus) => {
                let mut least = self.memory.unwrap_or(f64::MAX);
                for gpu in gpus {
                    least = least.min(gpu.memory()?.free as f64);
                }
                Some(least)
            }
            Hardware::Emulated(_) => self.memory,
        })
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

impl Compute {
    /// Rates of `devices` of these: those of a file that `farm-node calibrate` has written here, or typical ones.
    pub fn site(&self, devices: usize, placing: Placing, calibrated: Option<&Path>) -> anyhow::Result<Site> {
        let (device, inside, between) = match (&self.hardware, calibrated) {
            #[cfg(feature = "cuda")]
            (Hardware::Cuda(gpus), _) => {
                let known = calibrated.map_or_else(Rates::embedded, Rates::with_file)?;
                let gpu = &gpus[0];
                let like = gpu_like(&gpu.properties().name);
                let mut device = known.device(like)?;
                device.memory = gpu.memory()?.total as f64;
                // As slow as the slowest of them.
                let mut worst = PeerLink::NvLink;
                for other in &gpus[1..] {
                    worst = worst.min(gpu.link_to(other)?);
                }
                let link = match worst {
                    PeerLink::NvLink if like == "a100" => "nvlink3",
                    PeerLink::NvLink => "nvlink4",
                    // Through the host's memory or not, over a bus of which all GPUs have at least the fourth generation.
                    PeerLink::Bus | PeerLink::Host => "pcie4",
                };
                (device, known.link(link)?, known.link("10gbe")?)
            }
            (_, Some(file)) => {
                let known = Rates::with_file(file)?;
                let mut device = known.device(CALIBRATED_CPU)?;
                device.memory = memory_bytes()? / devices as f64;
                (device, known.link(CALIBRATED_LOCAL)?, known.link(CALIBRATED_TCP)?)
            }
            (_, None) => {
                let known = Rates::embedded()?;
                let mut device = known.device("cpu")?;
                for rate in [&mut device.linear, &mut device.attention, &mut device.bandwidth] {
                    *rate *= self.threads as f64;
                }
                device.memory = memory_bytes()? / devices as f64;
                (device, known.link("local")?, known.link("10gbe")?)
            }
        };
        let site = Site::one_host(device, inside);
        Ok(match placing {
            Placing::Threads => site,
            Placing::Processes => Site { between, devices_per_host: 1, ..site },
        })
    }
}

/// The known device that a GPU of this name is most like. Rates decide how clips are spread, not what they look like, so one
/// that is not known counts as the slowest.
#[cfg(feature = "cuda")]
pub fn gpu_like(name: &str) -> &'static str {
    known_gpu(name).unwrap_or("l4")
}

/// The known device that a GPU of this name is.
#[cfg(feature = "cuda")]
pub fn known_gpu(name: &str) -> Option<&'static str> {
    let known = [("H200", "h200"), ("H100", "h100"), ("A100", "a100"), ("L40", "l40"), ("RTX 4090", "rtx4090")];
    let named = known.into_iter().find(|(part, _)| name.contains(part)).map(|(_, known)| known);
    named.or_else(|| name.split(' ').any(|word| word == "L4").then_some("l4"))
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

    fn cpus(count: usize) -> Devices {
        Devices { kind: Kind::Cpu, count }
    }

    fn cpu(compute: &Compute, device: usize) -> CpuEngine {
        match compute.engine(device).unwrap() {
            DeviceEngine::Cpu(engine) => engine,
            #[cfg(feature = "cuda")]
            _ => panic!("a share of the processor is another device"),
        }
    }

    #[test]
    fn each_thread_of_each_device_that_is_pinned_has_a_core_of_its_own() {
        // As many as there are here to tell one from the other.
        let some = cores::allowed().unwrap().len().min(2);
        for (devices, threads) in [(some, 1), (1, some)] {
            let args = ThreadArgs { threads: NonZeroUsize::new(threads), pin: true, precision: Precision::F32 };
            let compute = args.compute(cpus(devices)).unwrap();
            let mut all = BTreeSet::new();
            for device in 0..devices {
                let own = |_| cores::allowed().unwrap();
                let seen = cpu(&compute, device).on_every_thread(own);
                assert!(seen.iter().all(|cores| cores.len() == 1), "{seen:?}");
                let seen: BTreeSet<usize> = seen.into_iter().flatten().collect();
                let compute = compute.clone();
                let settled = std::thread::spawn(move || compute.settle(device).map(|()| cores::allowed().unwrap()));
                assert_eq!(settled.join().unwrap().unwrap(), seen, "the thread that uses the engine");
                all.extend(seen);
            }
            assert_eq!(all.len(), devices * threads);
            assert!(args.compute(cpus(MAX_DEVICES * 64)).is_err());
        }
    }

    #[test]
    fn without_asking_nothing_is_pinned() {
        let compute = ThreadArgs { threads: None, pin: false, precision: Precision::F32 }.compute(cpus(1)).unwrap();
        let all = cores::allowed().unwrap();
        assert!(compute.threads() <= all.len());
        compute.settle(0).unwrap();
        assert!(cpu(&compute, 0).on_every_thread(|_| cores::allowed().unwrap()).iter().all(|seen| *seen == all));
    }

    #[test]
    fn devices_are_read_as_documented_and_nothing_else() {
        for (kind, name) in Kind::ALL {
            let text = &format!("{name}:2");
            assert_eq!(text.parse(), Ok(Devices { kind, count: 2 }));
            assert_eq!(Devices { kind, count: 2 }.to_string(), *text);
        }
        for bad in ["", "cpu", "cpu:", "cpu:0", "cpu:-1", "cpu:257", "gpu:1", "2"] {
            assert!(bad.parse::<Devices>().is_err(), "{bad}");
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_has_the_rates_of_its_kind() {
        let known = Rates::embedded().unwrap();
        let names = ["NVIDIA H100 80GB HBM3", "NVIDIA L40S", "NVIDIA GeForce RTX 4090", "NVIDIA L4", "Tesla T4"];
        assert_eq!(names.map(gpu_like), ["h100", "l40", "rtx4090", "l4", "l4"]);
        assert!(names.iter().all(|name| known.device(gpu_like(name)).is_ok()));
        assert_eq!([known_gpu(names[3]), known_gpu(names[4])], [Some("l4"), None]);
    }
}
