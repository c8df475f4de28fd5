//! GPUs, and the libraries that they want.

use std::time::Instant;

use farm_core::engine::cuda::driver::libraries::{self, Kind};
use farm_core::engine::cuda::driver::{self, CudaDevice, Loaded, Memory, Properties};
use serde::Serialize;

use super::line;
use crate::command::plan::amount;

#[derive(Serialize)]
pub struct Cuda {
    libraries: Vec<Library>,
    devices: Vec<Gpu>,
    /// Why there is no GPU.
    error: Option<String>,
}

#[derive(Serialize)]
struct Library {
    name: String,
    found: Option<Found>,
    /// What is wrong with the file that bears its name.
    error: Option<String>,
    /// What cannot be done without it.
    without: &'static str,
    remedy: &'static str,
}

#[derive(Serialize)]
struct Found {
    path: String,
    version: Option<String>,
}

#[derive(Serialize)]
struct Gpu {
    index: usize,
    found: Option<Device>,
    error: Option<String>,
}

#[derive(Serialize)]
struct Device {
    name: String,
    /// Compute capability, for example `9.0`.
    capability: String,
    multiprocessors: usize,
    memory_free: usize,
    memory_total: usize,
    pci: String,
    /// None if they were not asked for.
    kernels: Option<Kernels>,
}

/// Files of kernels.
#[derive(Serialize)]
struct Kernels {
    /// Compiled now, and by an earlier run.
    compiled: usize,
    cached: usize,
    seconds: f64,
    error: Option<String>,
}

impl Cuda {
    pub fn new(quick: bool) -> Self {
        let libraries = Kind::ALL.map(Library::new).into();
        let (count, error) = match driver::count() {
            Ok(count) => (count, None),
            Err(error) => (0, Some(error)),
        };
        Self { libraries, devices: (0..count).map(|index| Gpu::new(index, quick)).collect(), error }
    }

    pub fn text(&self, text: &mut String) {
        for Library { name, found, error, without, remedy } in &self.libraries {
            let what = match (found, error) {
                (Some(Found { path, version }), _) => format!("{} {path}", version.as_deref().unwrap_or("?")),
                (None, None) => format!("not found: {without}; {remedy}"),
                (None, Some(error)) => format!("of no use: {without}; {error}; {remedy}"),
            };
            line(text, name, &what);
        }
        if let Some(error) = &self.error {
            line(text, "GPUs", &format!("none: {error}"));
        }
        for Gpu { index, found, error } in &self.devices {
            let what = match found {
                Some(device) => device.text(),
                None => error.clone().unwrap_or_default(),
            };
            line(text, &format!("GPU {index}"), &what);
        }
    }
}

impl Library {
    fn new(kind: Kind) -> Self {
        let (found, error) = match libraries::open(kind) {
            Ok(opened) => {
                (Some(Found { path: opened.path.display().to_string(), version: opened.version.clone() }), None)
            }
            Err(missing) => (None, missing.broken.clone()),
        };
        Self { name: kind.to_string(), found, error, without: without(kind), remedy: kind.remedy() }
    }
}

fn without(kind: Kind) -> &'static str {
    match kind {
        Kind::Driver => "no GPU can be used",
        Kind::Nvrtc => "no kernel can be compiled, so no GPU can be used",
        Kind::CublasLt => "matrix products are slower",
        Kind::Cudnn => "nothing is lost, it is not used yet",
        Kind::Nccl => "nothing is lost, it is not used yet",
    }
}

impl Gpu {
    fn new(index: usize, quick: bool) -> Self {
        match Device::new(index, quick) {
            Ok(device) => Self { index, found: Some(device), error: None },
            Err(error) => Self { index, found: None, error: Some(error.to_string()) },
        }
    }
}

impl Device {
    fn new(index: usize, quick: bool) -> farm_core::engine::Result<Self> {
        let device = CudaDevice::open(index)?;
        let Memory { free, total } = device.memory()?;
        let Properties { name, capability: (major, minor), multiprocessors, pci, .. } = device.properties().clone();
        Ok(Self {
            name,
            capability: format!("{major}.{minor}"),
            multiprocessors,
            memory_free: free,
            memory_total: total,
            pci,
            kernels: (!quick).then(|| Kernels::new(&device)),
        })
    }

    fn text(&self) -> String {
        let Self { name, capability, multiprocessors, memory_free, memory_total, pci, kernels } = self;
        let (free, total) = (amount(*memory_free as f64), amount(*memory_total as f64));
        let kernels = kernels.as_ref().map_or_else(String::new, |kernels| format!("; {}", kernels.text()));
        format!(
            "{name}, compute capability {capability}, {multiprocessors} multiprocessors, {free} of {total} free, at {pci}{kernels}"
        )
    }
}

impl Kernels {
    fn new(device: &CudaDevice) -> Self {
        let started = Instant::now();
        let loaded = device.load();
        let seconds = started.elapsed().as_secs_f64();
        let error = loaded.as_ref().err().map(ToString::to_string);
        let Loaded { compiled, cached } = loaded.unwrap_or_default();
        Self { compiled, cached, seconds, error }
    }

    fn text(&self) -> String {
        match self {
            Self { error: Some(error), .. } => format!("kernels of no use: {error}"),
            Self { compiled: 0, seconds, .. } => format!("kernels loaded in {seconds:.1} s"),
            Self { seconds, .. } => format!("kernels compiled in {seconds:.1} s"),
        }
    }
}
