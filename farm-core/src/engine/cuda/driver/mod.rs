//! A GPU by the driver of this machine.
//!
//! **Not run on hardware yet.** Kernels are compiled by NVRTC in the tests; what the driver is asked for is checked against a
//! stand-in for it, and follows the documentation of CUDA.
//!
//! Nothing is linked: the driver, NVRTC and cuBLASLt are opened when they are used ([`libraries`]). Without cuBLASLt this
//! program's own kernels do its work.

mod api;
pub mod compile;
mod context;
pub mod libraries;
mod matmul;
mod plans;
mod staging;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{
    CUdevice, CUmemAccess_flags, CUmemAccessDesc, CUmemLocation, CUmemLocationType, CUmemoryPool,
};

use self::api::{Driver, OUT_OF_MEMORY, PEER_ACCESS_ALREADY_ENABLED, call};
use self::compile::Target;
use self::context::{Context, Event, Function, Module, Pinned, Stream};
use self::matmul::{CublasLt, WORKSPACE};
use self::staging::Staging;
use super::device::{Address, Device, Launch, Matmul};
use super::kernels::{Kernel, Source};
use super::profile::Timed;
use crate::engine::{EngineError, Result};

/// `CU_DEVICE_ATTRIBUTE_*`
const MULTIPROCESSORS: c_int = 16;
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
const SHARED_OPTIN: c_int = 97;
const POOLS_SUPPORTED: c_int = 115;
/// `CU_MEMPOOL_ATTR_*`
const RELEASE_THRESHOLD: c_int = 4;
const RESERVED_NOW: c_int = 5;
const USED_NOW: c_int = 7;
/// `CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED`
const NATIVE_ATOMICS: c_int = 3;

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// For example `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Of compute, major and minor: (9, 0) for an H100.
    pub capability: (i32, i32),
    pub multiprocessors: usize,
    /// Bytes that a block may have if it asks.
    pub shared_memory: usize,
    /// Its place in the machine, for example `0000:3B:00.0`.
    pub pci: String,
}

/// Bytes of a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Nobody's, or kept by this program for its next tensors.
    pub free: usize,
    pub total: usize,
}

/// Number of GPUs. Without any, or without a driver, says what is missing.
pub fn count() -> std::result::Result<usize, String> {
    Ok(api::driver()?.devices)
}

/// A GPU.
pub struct CudaDevice {
    properties: Properties,
    driver: &'static Driver,
    /// Owned by the driver.
    pool: Pool,
    /// None if this machine has no cuBLASLt.
    cublas: OnceLock<Option<(CublasLt, Address)>>,
    kernels: Mutex<Kernels>,
    staging: Mutex<Staging>,
    stream: Arc<Stream>,
    /// Beside the other.
    fetches: Arc<Stream>,
    /// Copies from other GPUs.
    pulls: Arc<Stream>,
    work_ticks: Arc<Ticks>,
    fetch_ticks: Arc<Ticks>,
}

/// What is between two GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PeerLink {
    /// Neither reaches the other's memory: copies go through the host's.
    Host,
    /// PCI Express.
    Bus,
    NvLink,
}

/// Memory of the host that fetches read.
pub struct Host {
    memory: Pinned,
    fetches: Arc<Stream>,
}

impl AsRef<[u8]> for Host {
    fn as_ref(&self) -> &[u8] {
        self.memory.bytes()
    }
}

impl AsMut<[u8]> for Host {
    fn as_mut(&mut self) -> &mut [u8] {
        self.memory.bytes_mut()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A fetch may still read it. There is nobody to tell of an error.
        let _ = self.fetches.synchronize();
    }
}

/// A point in the order of a stream's work.
pub struct Mark(Event);

struct Pool(CUmemoryPool);

// SAFETY: the driver's functions take a pool from any thread.
unsafe impl Send for Pool {}
// SAFETY: as above, several at a time too.
unsafe impl Sync for Pool {}

/// What was loaded so far.
#[derive(Default)]
struct Kernels {
    functions: HashMap<Kernel, Arc<Function>>,
    modules: HashMap<Source, Module>,
}

/// What became of the sources of the kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Compiled now.
    pub compiled: usize,
    /// Compiled by an earlier run.
    pub cached: usize,
}

impl CudaDevice {
    /// The GPU of a number below [`count`]. Its kernels are compiled when they are used first.
    pub fn open(index: usize) -> Result<Self> {
        Self::of(found()?, index)
    }

    /// The first `gpus` of this machine, which copy from each other's memory directly where they can.
    pub fn open_several(gpus: usize) -> Result<Vec<Arc<Self>>> {
        Self::several(found()?, gpus)
    }

    fn several(driver: &'static Driver, gpus: usize) -> Result<Vec<Arc<Self>>> {
        let all = (0..gpus).map(|index| Self::of(driver, index).map(Arc::new)).collect::<Result<Vec<_>>>()?;
        for reader in &all {
            for owner in all.iter().filter(|owner| !Arc::ptr_eq(owner, reader)) {
                reader.reach(owner)?;
            }
        }
        Ok(all)
    }

    /// Gives this one access to the memory of `owner`, if the machine lets it.
    fn reach(&self, owner: &Self) -> Result<()> {
        if self.link_to(owner)? == PeerLink::Host {
            return Ok(());
        }
        let driver = self.stream.context.enter()?;
        // SAFETY: both contexts are alive.
        let enabled = unsafe { (driver.functions.cuCtxEnablePeerAccess)(owner.stream.context.raw, 0) };
        if enabled != PEER_ACCESS_ALREADY_ENABLED {
            driver.check("cuCtxEnablePeerAccess", enabled)?;
        }
        let location =
            CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: self.stream.context.device };
        let access = CUmemAccessDesc { location, flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
        // SAFETY: it reads one description.
        unsafe { call!(driver, cuMemPoolSetAccess(owner.pool.0, &access, 1)) }
    }

    pub fn link_to(&self, other: &Self) -> Result<PeerLink> {
        let (driver, ours, theirs) = (self.driver, self.stream.context.device, other.stream.context.device);
        let (mut reaches, mut atomics) = (0, 0);
        // SAFETY: they write a number each.
        unsafe {
            call!(driver, cuDeviceCanAccessPeer(&mut reaches, ours, theirs))?;
            if reaches != 0 {
                // Over PCI Express no GPU has them.
                call!(driver, cuDeviceGetP2PAttribute(&mut atomics, NATIVE_ATOMICS, ours, theirs))?;
            }
        }
        Ok(match (reaches, atomics) {
            (0, _) => PeerLink::Host,
            (_, 0) => PeerLink::Bus,
            _ => PeerLink::NvLink,
        })
    }

    fn of(driver: &'static Driver, index: usize) -> Result<Self> {
        let fail = |message| Err(EngineError::Backend { op: "open", message });
        if index >= driver.devices {
            return fail(format!("there is no GPU {index}: this machine has {}", driver.devices));
        }
        let mut device = 0;
        // SAFETY: it writes a device.
        unsafe { call!(driver, cuDeviceGet(&mut device, index as c_int)) }?;
        let properties = properties(driver, device)?;
        if attribute(driver, device, POOLS_SUPPORTED)? == 0 {
            return fail(format!("the driver has no memory pools for {}", properties.name));
        }
        let context = Context::new(driver, device)?;
        let mut pool = std::ptr::null_mut();
        // Memory that is freed is kept for the next tensors: giving it back to the system costs more than a kernel.
        let mut keep = u64::MAX;
        // SAFETY: they write a pool, and read a number of 64 bits.
        unsafe {
            call!(driver, cuDeviceGetDefaultMemPool(&mut pool, device))?;
            call!(driver, cuMemPoolSetAttribute(pool, RELEASE_THRESHOLD, std::ptr::from_mut(&mut keep).cast()))?;
        }
        let stream = Stream::new(&context)?;
        let fetches = Stream::new(&context)?;
        let pulls = Stream::new(&context)?;
        Ok(Self {
            properties,
            driver,
            pool: Pool(pool),
            cublas: OnceLock::new(),
            kernels: Mutex::default(),
            staging: Mutex::new(Staging::new(&stream)?),
            work_ticks: Ticks::new(&stream),
            fetch_ticks: Ticks::new(&fetches),
            stream,
            fetches,
            pulls,
        })
    }

    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    pub fn memory(&self) -> Result<Memory> {
        let driver = self.stream.context.enter()?;
        let (mut free, mut total) = (0, 0);
        let (mut reserved, mut used) = (0u64, 0u64);
        // SAFETY: they write numbers, the pool's of 64 bits.
        unsafe {
            call!(driver, cuMemGetInfo(&mut free, &mut total))?;
            call!(driver, cuMemPoolGetAttribute(self.pool.0, RESERVED_NOW, std::ptr::from_mut(&mut reserved).cast()))?;
            call!(driver, cuMemPoolGetAttribute(self.pool.0, USED_NOW, std::ptr::from_mut(&mut used).cast()))?;
        }
        Ok(Memory { free: free + reserved.saturating_sub(used) as usize, total })
    }

    /// Waits for all work that was started, and tells of its errors.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()
    }

    /// Loads all kernels, which are compiled if no earlier run has done so.
    pub fn load(&self) -> Result<Loaded> {
        let mut kernels = lock(&self.kernels);
        let mut loaded = Loaded::default();
        for source in Source::ALL.into_iter().filter(|source| self.runs(*source)) {
            if let Entry::Vacant(place) = kernels.modules.entry(source) {
                let (module, fresh) = self.module(source)?;
                place.insert(module);
                *if fresh { &mut loaded.compiled } else { &mut loaded.cached } += 1;
            }
        }
        Ok(loaded)
    }

    /// What its kernels are compiled for.
    fn target(&self) -> std::result::Result<Target, String> {
        compile::compiler()?.target(self.properties.capability)
    }

    /// True with it if it was compiled now.
    fn module(&self, source: Source) -> Result<(Module, bool)> {
        let fail = |message| EngineError::Backend { op: "compile", message };
        let compiler = compile::compiler().map_err(fail)?;
        let target = self.target().map_err(fail)?;
        let compiled = compiler.compiled(source, target, &self.driver.version).map_err(fail)?;
        let module = Module::load(&self.stream.context, &compiled.image).map_err(|error| {
            let (name, nvrtc, cuda) = (source.name(), compiler.version(), &self.driver.version);
            fail(format!(
                "{name} for {target}, compiled by NVRTC {nvrtc}, the driver for CUDA {cuda} does not take: {error}"
            ))
        })?;
        Ok((module, compiled.fresh))
    }

    fn function(&self, kernel: Kernel) -> Result<Arc<Function>> {
        let mut kernels = lock(&self.kernels);
        if let Some(function) = kernels.functions.get(&kernel) {
            return Ok(function.clone());
        }
        let module = match kernels.modules.entry(kernel.source) {
            Entry::Occupied(module) => module.into_mut(),
            Entry::Vacant(place) => place.insert(self.module(kernel.source)?.0),
        };
        let function = module
            .function(&kernel.name())
            .map_err(|error| EngineError::Backend { op: "launch", message: format!("{kernel:?}: {error}") })?;
        let function = Arc::new(function);
        kernels.functions.insert(kernel, function.clone());
        Ok(function)
    }

    /// Memory for work on `stream`.
    fn alloc_on(&self, stream: &Stream, bytes: usize) -> Result<Address> {
        let driver = stream.context.enter()?;
        let mut address = 0;
        // SAFETY: it writes an address.
        let mut ask = || unsafe { (driver.functions.cuMemAllocAsync)(&mut address, bytes, stream.raw) };
        let mut asked = ask();
        if asked == OUT_OF_MEMORY {
            // What is kept for the next tensors may be in pieces that are too small, and what was freed not yet free.
            self.synchronize()?;
            // SAFETY: the pool is the driver's own.
            unsafe { call!(driver, cuMemPoolTrimTo(self.pool.0, 0)) }?;
            asked = ask();
        }
        if asked == OUT_OF_MEMORY {
            return Err(EngineError::OutOfMemory { op: "alloc", wanted: bytes });
        }
        driver.check("cuMemAllocAsync", asked)?;
        Ok(address)
    }

    /// Calls `begun` where the copy is next on the stream of fetches.
    fn fetch_behind(&self, to: Address, from: &Host, after: &Mark, begun: impl FnOnce() -> Result<()>) -> Result<Mark> {
        // Before the copy is asked for: none is under way then that no mark tells of.
        let arrived = Event::new(&self.fetches)?;
        after.0.precede(&self.fetches)?;
        begun()?;
        let driver = self.fetches.context.enter()?;
        let (bytes, stream) = (from.memory.bytes(), self.fetches.raw);
        // SAFETY: the slot has room, and nothing of earlier work that uses it is left by then; `from` waits for this stream
        // before it is given back.
        unsafe { call!(driver, cuMemcpyHtoDAsync(to, bytes.as_ptr().cast(), bytes.len(), stream)) }?;
        arrived.record()?;
        Ok(Mark(arrived))
    }

    /// None if this machine has no cuBLASLt.
    fn cublas(&self) -> Result<Option<&(CublasLt, Address)>> {
        if let Some(cublas) = self.cublas.get() {
            return Ok(cublas.as_ref());
        }
        let cublas = match CublasLt::new(&self.stream)? {
            Some(cublas) => Some((cublas, self.alloc(WORKSPACE)?)),
            None => None,
        };
        if let Err(Some((_, workspace))) = self.cublas.set(cublas) {
            // Another thread was faster.
            self.free(workspace, WORKSPACE);
        }
        Ok(self.cublas.get().and_then(Option::as_ref))
    }
}

impl Device for CudaDevice {
    type Host = Host;
    type Mark = Mark;

    fn name(&self) -> String {
        self.properties.name.clone()
    }

    fn runs(&self, source: Source) -> bool {
        !source.wants_hopper() || self.target().is_ok_and(Target::has_hopper)
    }

    fn alloc(&self, bytes: usize) -> Result<Address> {
        self.alloc_on(&self.stream, bytes)
    }

    fn free(&self, address: Address, _bytes: usize) {
        if let Ok(driver) = self.stream.context.enter() {
            // SAFETY: `alloc` has given it; work that was started before may still use it. An error is one of that work,
            // and will be told by the next call.
            let _ = unsafe { call!(driver, cuMemFreeAsync(address, self.stream.raw)) };
        }
    }

    fn copy_in(&self, to: Address, from: &[u8]) -> Result<()> {
        lock(&self.staging).copy(to, from)
    }

    fn copy_out(&self, from: Address, to: &mut [u8]) -> Result<()> {
        let driver = self.stream.context.enter()?;
        // SAFETY: the engine copies within what it has allocated; `to` is not let go before the copy is done.
        let started = unsafe {
            call!(driver, cuMemcpyDtoHAsync(to.as_mut_ptr().cast::<c_void>(), from, to.len(), self.stream.raw))
        };
        // Waits in any case: a copy that has begun writes to `to`.
        let done = self.stream.synchronize();
        started.and(done)
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        let driver = self.stream.context.enter()?;
        // SAFETY: the engine copies within what it has allocated.
        unsafe { call!(driver, cuMemcpyDtoDAsync(to, from, bytes, self.stream.raw)) }
    }

    fn host(&self, bytes: usize) -> Result<Host> {
        Ok(Host { memory: Pinned::new(&self.stream.context, bytes)?, fetches: self.fetches.clone() })
    }

    fn mark(&self) -> Result<Mark> {
        let event = Event::new(&self.stream)?;
        event.record()?;
        Ok(Mark(event))
    }

    fn fetch(&self, to: Address, from: &Host, after: &Mark) -> Result<Mark> {
        self.fetch_behind(to, from, after, || Ok(()))
    }

    fn wait(&self, mark: &Mark) -> Result<()> {
        mark.0.precede(&self.stream)
    }

    fn pull(&self, peer: &Self, from: Address, bytes: usize, after: &Mark) -> Result<(Address, Mark)> {
        let arrived = Event::new(&self.pulls)?;
        let to = self.alloc_on(&self.pulls, bytes)?;
        let (ours, theirs) = (&self.pulls.context, &peer.stream.context);
        let copied = || {
            after.0.precede(&self.pulls)?;
            let driver = ours.enter()?;
            // SAFETY: `to` has room; what is at `from` is there after the event, and is kept until the other has passed.
            unsafe { call!(driver, cuMemcpyPeerAsync(to, ours.raw, from, theirs.raw, bytes, self.pulls.raw)) }?;
            arrived.record()
        };
        match copied() {
            Ok(()) => Ok((to, Mark(arrived))),
            Err(error) => {
                self.free(to, bytes);
                Err(error)
            }
        }
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let Launch { kernel, grid, block, shared, args, .. } = *launch;
        let function = self.function(kernel)?;
        // SAFETY: the arguments are of the kernel's types, which the emulation checks for the same launches; modules are
        // unloaded only when this is dropped.
        unsafe { function.launch(&self.stream, grid, block, shared, args) }.map_err(|error| {
            let message = format!("{kernel:?}, {grid:?} blocks of {block} threads and {shared} bytes: {error}");
            EngineError::Backend { op: "launch", message }
        })
    }

    fn matmul(&self, matmul: &Matmul) -> Result<bool> {
        match self.cublas()? {
            // SAFETY: the operands are the engine's tensors.
            Some((cublas, workspace)) => unsafe { cublas.matmul(matmul, *workspace) },
            None => Ok(false),
        }
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // Kernels may still run. There is nobody to tell of an error.
        let _ = self.fetches.synchronize();
        let _ = self.pulls.synchronize();
        let _ = self.stream.synchronize();
        if let Some(Some((cublas, workspace))) = self.cublas.take() {
            drop(cublas);
            self.free(workspace, WORKSPACE);
        }
    }
}

impl Timed for CudaDevice {
    type Tick = Tick;

    fn tick(&self) -> Result<Tick> {
        self.work_ticks.record()
    }

    fn timed_fetch(&self, to: Address, from: &Host, after: &Mark) -> Result<(Mark, [Tick; 2])> {
        let mut start = None;
        let mark = self.fetch_behind(to, from, after, || {
            start = Some(self.fetch_ticks.record()?);
            Ok(())
        })?;
        let end = self.fetch_ticks.record()?;
        // It was recorded on the way.
        let start =
            start.ok_or_else(|| EngineError::Backend { op: "fetch", message: "its start was not timed".into() })?;
        Ok((mark, [start, end]))
    }

    fn between(&self, start: &Tick, end: &Tick) -> Result<Duration> {
        let (start, end) = (start.event()?, end.event()?);
        end.wait()?;
        Ok(Duration::from_secs_f32(end.since(start)?.max(0.0) / 1e3))
    }
}

/// A point in a stream with its time. Dropped, its event is used again.
pub struct Tick {
    event: Option<Event>,
    of: Arc<Ticks>,
}

/// The timed events of a stream that are free.
struct Ticks {
    stream: Arc<Stream>,
    free: Mutex<Vec<Event>>,
}

impl Ticks {
    fn new(stream: &Arc<Stream>) -> Arc<Self> {
        Arc::new(Self { stream: stream.clone(), free: Mutex::default() })
    }

    /// A tick behind all that is on the stream now.
    fn record(self: &Arc<Self>) -> Result<Tick> {
        let free = lock(&self.free).pop();
        let event = free.map_or_else(|| Event::timed(&self.stream), Ok)?;
        event.record()?;
        Ok(Tick { event: Some(event), of: self.clone() })
    }
}

impl Tick {
    fn event(&self) -> Result<&Event> {
        // Only a drop takes it.
        self.event.as_ref().ok_or_else(|| EngineError::Backend { op: "tick", message: "its event is gone".into() })
    }
}

impl Drop for Tick {
    fn drop(&mut self) {
        lock(&self.of.free).extend(self.event.take());
    }
}

fn found() -> Result<&'static Driver> {
    api::driver().map_err(|message| EngineError::Backend { op: "open", message })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn properties(driver: &Driver, device: CUdevice) -> Result<Properties> {
    let text = |write: &dyn Fn(*mut c_char, c_int) -> Result<()>| {
        let mut text: [c_char; 128] = [0; 128];
        // One less, so that there is a 0 at the end whatever is written.
        write(text.as_mut_ptr(), text.len() as c_int - 1)?;
        // SAFETY: there is a 0 in it.
        Ok(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned())
    };
    let number = |which| attribute(driver, device, which);
    Ok(Properties {
        // SAFETY: they write at most as many bytes as they are told.
        name: text(&|text, len| unsafe { call!(driver, cuDeviceGetName(text, len, device)) })?,
        // SAFETY: as above.
        pci: text(&|text, len| unsafe { call!(driver, cuDeviceGetPCIBusId(text, len, device)) })?,
        capability: (number(CAPABILITY_MAJOR)?, number(CAPABILITY_MINOR)?),
        multiprocessors: number(MULTIPROCESSORS)?.unsigned_abs() as usize,
        shared_memory: number(SHARED_OPTIN)?.unsigned_abs() as usize,
    })
}

fn attribute(driver: &Driver, device: CUdevice, which: c_int) -> Result<c_int> {
    let mut value = 0;
    // SAFETY: it writes a number; one that it does not know it refuses.
    unsafe { call!(driver, cuDeviceGetAttribute(&mut value, which, device)) }?;
    Ok(value)
}
