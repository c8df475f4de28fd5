//! The emulated GPU with other kernels for Hopper.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::engine::cuda::device::{Address, Arg, Device, Launch, Matmul};
use crate::engine::cuda::emulation::Emulation;
use crate::engine::cuda::gpu::Gpu;
use crate::engine::cuda::kernels::Source;
use crate::engine::{EngineError, Result};
use crate::precision::Precision;

/// What its kernels for Hopper do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Hopper {
    Right,
    /// It is another GPU.
    Absent,
    /// They compute something else.
    Wrong,
    /// They write nothing.
    Silent,
    /// They cannot be launched.
    Refused,
}

pub struct Varied {
    emulation: Emulation,
    hopper: Hopper,
    launched: Mutex<Vec<String>>,
    limit: AtomicUsize,
}

pub fn varied(hopper: Hopper) -> Gpu<Varied> {
    let (emulation, launched) = (Emulation::default(), Mutex::default());
    let device = Varied { emulation, hopper, launched, limit: AtomicUsize::new(usize::MAX) };
    Gpu::new(Arc::new(device), Precision::Bf16)
}

impl Varied {
    /// How often the kernel of this name was asked for.
    pub fn launches(&self, name: &str) -> usize {
        self.launched.lock().unwrap().iter().filter(|other| *other == name).count()
    }

    /// Of bytes in use.
    pub fn limit(&self, bytes: usize) {
        self.limit.store(bytes, Ordering::Relaxed);
    }
}

impl Device for Varied {
    type Host = Vec<u8>;
    type Mark = ();

    fn name(&self) -> String {
        format!("gpu with Hopper's kernels {:?}", self.hopper)
    }

    fn runs(&self, source: Source) -> bool {
        self.hopper != Hopper::Absent || !source.wants_hopper()
    }

    fn alloc(&self, bytes: usize) -> Result<Address> {
        if self.emulation.used().saturating_add(bytes) > self.limit.load(Ordering::Relaxed) {
            return Err(EngineError::OutOfMemory { op: "alloc", wanted: bytes });
        }
        self.emulation.alloc(bytes)
    }

    fn free(&self, address: Address, bytes: usize) {
        self.emulation.free(address, bytes);
    }

    fn copy_in(&self, to: Address, from: &[u8]) -> Result<()> {
        self.emulation.copy_in(to, from)
    }

    fn copy_out(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.emulation.copy_out(from, to)
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.emulation.copy(to, from, bytes)
    }

    fn host(&self, bytes: usize) -> Result<Vec<u8>> {
        self.emulation.host(bytes)
    }

    fn mark(&self) -> Result<()> {
        self.emulation.mark()
    }

    fn fetch(&self, to: Address, from: &Vec<u8>, after: &()) -> Result<()> {
        self.emulation.fetch(to, from, after)
    }

    fn wait(&self, mark: &()) -> Result<()> {
        self.emulation.wait(mark)
    }

    fn pull(&self, peer: &Self, from: Address, bytes: usize, after: &()) -> Result<(Address, ())> {
        self.emulation.pull(&peer.emulation, from, bytes, after)
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.launched.lock().unwrap().push(launch.kernel.name());
        let mut args = launch.args.to_vec();
        if launch.kernel.source.wants_hopper() {
            match self.hopper {
                Hopper::Right => {}
                Hopper::Absent => panic!("a kernel for Hopper on another GPU"),
                Hopper::Silent => return Ok(()),
                Hopper::Refused => {
                    return Err(EngineError::Backend { op: "launch", message: "not for this driver".into() });
                }
                Hopper::Wrong => {
                    let Some(Arg::Float(scale)) = args.last_mut() else { panic!("no scale: {args:?}") };
                    *scale *= 1.1;
                }
            }
        }
        self.emulation.launch(&Launch { args: &args, ..*launch })
    }

    fn matmul(&self, matmul: &Matmul) -> Result<bool> {
        self.emulation.matmul(matmul)
    }
}
