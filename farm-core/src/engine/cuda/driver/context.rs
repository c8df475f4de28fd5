//! What belongs to a context of the driver, given back when it is dropped.

use std::ffi::{CString, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUcontext, CUdevice, CUevent, CUfunction, CUmodule, CUstream};

use super::api::{Driver, OUT_OF_MEMORY, call};
use crate::engine::cuda::device::{Arg, TensorMap, Value};
use crate::engine::{EngineError, Result};

/// `CU_STREAM_NON_BLOCKING`: it does not wait for what others do on the default stream.
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DEFAULT` and `CU_EVENT_DISABLE_TIMING`
const TIMED: c_uint = 0;
const UNTIMED: c_uint = 2;
/// `CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES`
const SHARED_SIZE: c_int = 1;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`
const MAX_DYNAMIC_SHARED_SIZE: c_int = 8;
/// `CU_TENSOR_MAP_DATA_TYPE_BFLOAT16`, `CU_TENSOR_MAP_SWIZZLE_128B` and `CU_TENSOR_MAP_L2_PROMOTION_L2_256B`: what a box wants
/// of the GPU's memory comes in pieces of 256 bytes, which is a row of 128 channels.
const BFLOAT16: c_int = 9;
const SWIZZLE_128B: c_int = 3;
const PROMOTION_256B: c_int = 3;
/// Bytes of shared memory that a block may have without asking.
const SHARED_UNASKED: u32 = 48 << 10;

/// The primary context of a GPU, the one that all libraries use.
pub(super) struct Context {
    pub(super) driver: &'static Driver,
    pub(super) device: CUdevice,
    pub(super) raw: CUcontext,
}

// SAFETY: any thread may use a context; `enter` makes it the thread's own.
unsafe impl Send for Context {}
// SAFETY: as above; the driver's functions may be called by several threads at a time.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn new(driver: &'static Driver, device: CUdevice) -> Result<Arc<Self>> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: it writes a context; `device` is one that the driver has given.
        unsafe { call!(driver, cuDevicePrimaryCtxRetain(&mut raw, device)) }?;
        let context = Arc::new(Self { driver, device, raw });
        context.enter()?;
        Ok(context)
    }

    /// Makes it the one that this thread's next calls are about. Every call wants that.
    pub(super) fn enter(&self) -> Result<&'static Driver> {
        // SAFETY: the context is alive as long as this.
        unsafe { call!(self.driver, cuCtxSetCurrent(self.raw)) }?;
        Ok(self.driver)
    }

    /// For drops, where nobody is left to tell of an error.
    fn leave(&self, end: impl FnOnce(&Driver) -> Result<()>) {
        if let Ok(driver) = self.enter() {
            let _ = end(driver);
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained once, and nothing of it is left. There is nobody to tell of an error.
        let _ = unsafe { call!(self.driver, cuDevicePrimaryCtxRelease(self.device)) };
    }
}

/// Work in order.
pub(super) struct Stream {
    pub(super) context: Arc<Context>,
    pub(super) raw: CUstream,
}

// SAFETY: any thread may use a stream, several at a time too.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Arc<Self>> {
        let driver = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: it writes a stream.
        unsafe { call!(driver, cuStreamCreate(&mut raw, NON_BLOCKING)) }?;
        Ok(Arc::new(Self { context: context.clone(), raw }))
    }

    /// Waits until all that is on it is done.
    pub(super) fn synchronize(&self) -> Result<()> {
        let driver = self.context.enter()?;
        // SAFETY: the stream is alive.
        unsafe { call!(driver, cuStreamSynchronize(self.raw)) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: nobody has the stream any more; what is still on it, the driver ends first.
        self.context.leave(|driver| unsafe { call!(driver, cuStreamDestroy(self.raw)) });
    }
}

/// A point in a stream.
pub(super) struct Event {
    stream: Arc<Stream>,
    raw: CUevent,
}

// SAFETY: any thread may use an event.
unsafe impl Send for Event {}
// SAFETY: as above, several at a time too.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(stream: &Arc<Stream>) -> Result<Self> {
        Self::with(stream, UNTIMED)
    }

    /// One that [`Event::since`] takes.
    pub(super) fn timed(stream: &Arc<Stream>) -> Result<Self> {
        Self::with(stream, TIMED)
    }

    fn with(stream: &Arc<Stream>, flags: c_uint) -> Result<Self> {
        let driver = stream.context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: it writes an event.
        unsafe { call!(driver, cuEventCreate(&mut raw, flags)) }?;
        Ok(Self { stream: stream.clone(), raw })
    }

    /// Puts it behind all that is on its stream now.
    pub(super) fn record(&self) -> Result<()> {
        let driver = self.stream.context.enter()?;
        // SAFETY: both are alive and of one context.
        unsafe { call!(driver, cuEventRecord(self.raw, self.stream.raw)) }
    }

    /// What is put on `stream` from now on begins after it.
    pub(super) fn precede(&self, stream: &Stream) -> Result<()> {
        let driver = stream.context.enter()?;
        // SAFETY: both are alive; the stream goes on waiting if the event is destroyed meanwhile.
        unsafe { call!(driver, cuStreamWaitEvent(stream.raw, self.raw, 0)) }
    }

    /// Waits until the stream has come to where it was recorded last; not at all if it never was.
    pub(super) fn wait(&self) -> Result<()> {
        let driver = self.stream.context.enter()?;
        // SAFETY: the event is alive.
        unsafe { call!(driver, cuEventSynchronize(self.raw)) }
    }

    /// Milliseconds from an earlier event to this one; both timed, recorded, and waited for.
    pub(super) fn since(&self, start: &Self) -> Result<f32> {
        let driver = self.stream.context.enter()?;
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive; it writes a number.
        unsafe { call!(driver, cuEventElapsedTime(&mut milliseconds, start.raw, self.raw)) }?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: nobody has the event any more.
        self.stream.context.leave(|driver| unsafe { call!(driver, cuEventDestroy(self.raw)) });
    }
}

/// Memory of the host that the GPU reads by itself.
pub(super) struct Pinned {
    context: Arc<Context>,
    raw: *mut u8,
    bytes: usize,
}

// SAFETY: it is memory that nobody else has.
unsafe impl Send for Pinned {}
// SAFETY: as above; shared, it is only read.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let driver = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: it writes an address.
        let asked = unsafe { (driver.functions.cuMemAllocHost)(&mut raw, bytes) };
        if asked == OUT_OF_MEMORY {
            return Err(EngineError::OutOfMemory { op: "alloc on the host", wanted: bytes });
        }
        driver.check("cuMemAllocHost", asked)?;
        // Memory that was never written is no value in Rust.
        // SAFETY: there are as many bytes, and nobody else has them.
        unsafe { std::ptr::write_bytes(raw.cast::<u8>(), 0, bytes) };
        Ok(Self { context: context.clone(), raw: raw.cast(), bytes })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: there are as many bytes, all of them written.
        unsafe { std::slice::from_raw_parts(self.raw, self.bytes) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(self.raw, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: whoever had it has waited for the GPU.
        self.context.leave(|driver| unsafe { call!(driver, cuMemFreeHost(self.raw.cast())) });
    }
}

/// Compiled kernels on the GPU.
pub(super) struct Module {
    context: Arc<Context>,
    raw: CUmodule,
}

// SAFETY: any thread may use a module.
unsafe impl Send for Module {}
// SAFETY: as above, several at a time too.
unsafe impl Sync for Module {}

impl Module {
    /// `image` is machine code or assembly language as NVRTC gives it, with a 0 at its end.
    pub(super) fn load(context: &Arc<Context>, image: &[u8]) -> Result<Self> {
        let driver = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: it reads machine code, which has its length in it, or a text up to its 0.
        unsafe { call!(driver, cuModuleLoadData(&mut raw, image.as_ptr().cast())) }?;
        Ok(Self { context: context.clone(), raw })
    }

    /// The kernel of this name. It lives as long as the module.
    pub(super) fn function(&self, name: &str) -> Result<Function> {
        let driver = self.context.enter()?;
        let name = CString::new(name).unwrap_or_default();
        let (mut raw, mut declared) = (std::ptr::null_mut(), 0);
        // SAFETY: the module is alive, the name ends with 0; they write a function and a number.
        unsafe {
            call!(driver, cuModuleGetFunction(&mut raw, self.raw, name.as_ptr()))?;
            call!(driver, cuFuncGetAttribute(&mut declared, SHARED_SIZE, raw))?;
        }
        let room = SHARED_UNASKED.saturating_sub(u32::try_from(declared).unwrap_or(0));
        Ok(Function { raw, room: Mutex::new(room) })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: whoever had it has waited for its kernels.
        self.context.leave(|driver| unsafe { call!(driver, cuModuleUnload(self.raw)) });
    }
}

/// Makes what the GPU reads of a tensor map.
fn encode(driver: &Driver, map: &TensorMap, to: &mut Value) -> Result<()> {
    let TensorMap { address, sizes, strides, region } = map;
    let (to, every) = (to.0.as_mut_ptr().cast(), [1; 3]);
    // SAFETY: it writes 128 bytes, which are aligned to 64, and reads as many numbers as there are dimensions, of the strides
    // one less. 0 is: values are not interleaved, and what is beyond the tensor is 0.
    unsafe {
        call!(
            driver,
            cuTensorMapEncodeTiled(
                to,
                BFLOAT16,
                3,
                *address,
                sizes.as_ptr(),
                strides.as_ptr(),
                region.as_ptr(),
                every.as_ptr(),
                0,
                SWIZZLE_128B,
                PROMOTION_256B,
                0,
            )
        )
    }
}

/// A kernel on the GPU.
pub(super) struct Function {
    raw: CUfunction,
    /// Bytes of dynamic shared memory that a launch may have.
    room: Mutex<u32>,
}

// SAFETY: any thread may use a function.
unsafe impl Send for Function {}
// SAFETY: as above, several at a time too.
unsafe impl Sync for Function {}

impl Function {
    /// Puts a launch on the stream.
    ///
    /// # Safety
    /// The arguments are of the kernel's types, in its order; its module is alive; pointers are to memory of this device
    /// that holds what the kernel reads and writes.
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        args: &[Arg],
    ) -> Result<()> {
        let driver = stream.context.enter()?;
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        if shared > *room {
            // SAFETY: the function is alive.
            unsafe { call!(driver, cuFuncSetAttribute(self.raw, MAX_DYNAMIC_SHARED_SIZE, shared as c_int)) }?;
            *room = shared;
        }
        drop(room);
        // The driver copies them before it returns.
        let encode = |map: &TensorMap, to: &mut Value| encode(driver, map, to);
        let mut values = args.iter().map(|arg| arg.value(encode)).collect::<Result<Vec<_>>>()?;
        let mut values: Vec<*mut c_void> = values.iter_mut().map(|value| value.0.as_mut_ptr().cast()).collect();
        let [x, y, z] = grid;
        let none = std::ptr::null_mut();
        // SAFETY: see above; there is a pointer for each parameter.
        unsafe {
            call!(driver, cuLaunchKernel(self.raw, x, y, z, block, 1, 1, shared, stream.raw, values.as_mut_ptr(), none))
        }
    }
}
