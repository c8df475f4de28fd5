//! The driver's functions, as far as they are used here, and its errors.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUmemAccessDesc, CUmemoryPool, CUmodule, CUstream,
};

use super::libraries::{self, Kind, Opened, functions, reason};
use crate::engine::{EngineError, Result};

/// Results, attributes and flags are numbers, not enums: a newer driver may have more of them.
pub(super) const SUCCESS: c_int = 0;
/// `CUDA_ERROR_OUT_OF_MEMORY`
pub(super) const OUT_OF_MEMORY: c_int = 2;
/// `CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED`
pub(super) const PEER_ACCESS_ALREADY_ENABLED: c_int = 704;
/// `CUDA_ERROR_NO_DEVICE`
const NO_DEVICE: c_int = 100;

functions! {
    /// Named as cuda.h has them; the symbols are those that its macros stand for. Every driver since CUDA 12 has them.
    Functions {
        cuInit = b"cuInit\0": fn(c_uint) -> c_int;
        cuGetErrorName = b"cuGetErrorName\0": fn(c_int, *mut *const c_char) -> c_int;
        cuGetErrorString = b"cuGetErrorString\0": fn(c_int, *mut *const c_char) -> c_int;
        cuDeviceGetCount = b"cuDeviceGetCount\0": fn(*mut c_int) -> c_int;
        cuDeviceGet = b"cuDeviceGet\0": fn(*mut CUdevice, c_int) -> c_int;
        cuDeviceGetName = b"cuDeviceGetName\0": fn(*mut c_char, c_int, CUdevice) -> c_int;
        cuDeviceGetAttribute = b"cuDeviceGetAttribute\0": fn(*mut c_int, c_int, CUdevice) -> c_int;
        cuDeviceGetPCIBusId = b"cuDeviceGetPCIBusId\0": fn(*mut c_char, c_int, CUdevice) -> c_int;
        cuDeviceGetDefaultMemPool = b"cuDeviceGetDefaultMemPool\0": fn(*mut CUmemoryPool, CUdevice) -> c_int;
        cuDevicePrimaryCtxRetain = b"cuDevicePrimaryCtxRetain\0": fn(*mut CUcontext, CUdevice) -> c_int;
        cuDevicePrimaryCtxRelease = b"cuDevicePrimaryCtxRelease_v2\0": fn(CUdevice) -> c_int;
        cuDeviceCanAccessPeer = b"cuDeviceCanAccessPeer\0": fn(*mut c_int, CUdevice, CUdevice) -> c_int;
        cuDeviceGetP2PAttribute = b"cuDeviceGetP2PAttribute\0": fn(*mut c_int, c_int, CUdevice, CUdevice) -> c_int;
        cuCtxEnablePeerAccess = b"cuCtxEnablePeerAccess\0": fn(CUcontext, c_uint) -> c_int;
        cuCtxSetCurrent = b"cuCtxSetCurrent\0": fn(CUcontext) -> c_int;
        cuStreamCreate = b"cuStreamCreate\0": fn(*mut CUstream, c_uint) -> c_int;
        cuStreamDestroy = b"cuStreamDestroy_v2\0": fn(CUstream) -> c_int;
        cuStreamSynchronize = b"cuStreamSynchronize\0": fn(CUstream) -> c_int;
        cuStreamWaitEvent = b"cuStreamWaitEvent\0": fn(CUstream, CUevent, c_uint) -> c_int;
        cuEventCreate = b"cuEventCreate\0": fn(*mut CUevent, c_uint) -> c_int;
        cuEventDestroy = b"cuEventDestroy_v2\0": fn(CUevent) -> c_int;
        cuEventRecord = b"cuEventRecord\0": fn(CUevent, CUstream) -> c_int;
        cuEventSynchronize = b"cuEventSynchronize\0": fn(CUevent) -> c_int;
        cuEventElapsedTime = b"cuEventElapsedTime\0": fn(*mut f32, CUevent, CUevent) -> c_int;
        cuMemGetInfo = b"cuMemGetInfo_v2\0": fn(*mut usize, *mut usize) -> c_int;
        cuMemPoolSetAttribute = b"cuMemPoolSetAttribute\0": fn(CUmemoryPool, c_int, *mut c_void) -> c_int;
        cuMemPoolGetAttribute = b"cuMemPoolGetAttribute\0": fn(CUmemoryPool, c_int, *mut c_void) -> c_int;
        cuMemPoolTrimTo = b"cuMemPoolTrimTo\0": fn(CUmemoryPool, usize) -> c_int;
        cuMemPoolSetAccess = b"cuMemPoolSetAccess\0": fn(CUmemoryPool, *const CUmemAccessDesc, usize) -> c_int;
        cuMemAllocAsync = b"cuMemAllocAsync\0": fn(*mut CUdeviceptr, usize, CUstream) -> c_int;
        cuMemFreeAsync = b"cuMemFreeAsync\0": fn(CUdeviceptr, CUstream) -> c_int;
        cuMemAllocHost = b"cuMemAllocHost_v2\0": fn(*mut *mut c_void, usize) -> c_int;
        cuMemFreeHost = b"cuMemFreeHost\0": fn(*mut c_void) -> c_int;
        cuMemcpyHtoDAsync = b"cuMemcpyHtoDAsync_v2\0": fn(CUdeviceptr, *const c_void, usize, CUstream) -> c_int;
        cuMemcpyDtoHAsync = b"cuMemcpyDtoHAsync_v2\0": fn(*mut c_void, CUdeviceptr, usize, CUstream) -> c_int;
        cuMemcpyDtoDAsync = b"cuMemcpyDtoDAsync_v2\0": fn(CUdeviceptr, CUdeviceptr, usize, CUstream) -> c_int;
        cuMemcpyPeerAsync = b"cuMemcpyPeerAsync\0": fn(
            CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, usize, CUstream
        ) -> c_int;
        cuModuleLoadData = b"cuModuleLoadData\0": fn(*mut CUmodule, *const c_void) -> c_int;
        cuModuleUnload = b"cuModuleUnload\0": fn(CUmodule) -> c_int;
        cuModuleGetFunction = b"cuModuleGetFunction\0": fn(*mut CUfunction, CUmodule, *const c_char) -> c_int;
        cuFuncGetAttribute = b"cuFuncGetAttribute\0": fn(*mut c_int, c_int, CUfunction) -> c_int;
        cuFuncSetAttribute = b"cuFuncSetAttribute\0": fn(CUfunction, c_int, c_int) -> c_int;
        cuTensorMapEncodeTiled = b"cuTensorMapEncodeTiled\0": fn(
            *mut c_void, c_int, c_uint, CUdeviceptr, *const u64, *const u64, *const c_uint, *const c_uint, c_int, c_int, c_int,
            c_int
        ) -> c_int;
        cuLaunchKernel = b"cuLaunchKernel\0": fn(
            CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void
        ) -> c_int;
    }
}

/// The driver, with its GPUs counted.
pub(super) struct Driver {
    pub(super) functions: Functions,
    /// Of CUDA, that it is made for, for example `13.0`.
    pub(super) version: String,
    pub(super) devices: usize,
}

/// A call of the driver. It stands in an unsafe block, with the reason why it is sound.
macro_rules! call {
    ($driver:expr, $function:ident($($argument:expr),* $(,)?)) => {
        $driver.check(stringify!($function), ($driver.functions.$function)($($argument),*))
    };
}
pub(super) use call;

/// The driver of this machine. Says what is missing otherwise; never panics.
pub(super) fn driver() -> std::result::Result<&'static Driver, String> {
    static DRIVER: OnceLock<std::result::Result<Driver, String>> = OnceLock::new();
    let open = || Driver::start(libraries::open(Kind::Driver).map_err(ToString::to_string)?);
    DRIVER.get_or_init(open).as_ref().map_err(Clone::clone)
}

impl Driver {
    /// A driver without any GPU is an error.
    pub(super) fn start(opened: &Opened) -> std::result::Result<Self, String> {
        // SAFETY: it bears the name of the driver and has a function of it; these are the declarations of cuda.h.
        let functions = unsafe { Functions::find(&opened.library) };
        let functions =
            functions.map_err(|error| format!("the driver {} is too old: {}", opened.path.display(), reason(error)))?;
        let version = opened.version.clone().unwrap_or_default();
        let mut driver = Self { functions, version, devices: 0 };
        // SAFETY: it takes flags, of which there are none.
        let begun = unsafe { (driver.functions.cuInit)(0) };
        if begun == NO_DEVICE {
            return Err(format!("the driver for CUDA {} finds no GPU", driver.version));
        }
        driver.check("cuInit", begun).map_err(|error| error.to_string())?;
        let mut count = 0;
        // SAFETY: it writes a number.
        unsafe { call!(driver, cuDeviceGetCount(&mut count)) }.map_err(|error| error.to_string())?;
        driver.devices = usize::try_from(count).unwrap_or(0);
        Ok(driver)
    }

    /// The error is named as CUDA names it: `cuCtxSetCurrent: CUDA_ERROR_INVALID_CONTEXT (invalid device context)`.
    pub(super) fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: `text` asks for a constant string of a result, or nothing for one that it does not know.
        let text = |ask: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| unsafe {
            let mut text = std::ptr::null();
            let known = ask(code, &mut text) == SUCCESS && !text.is_null();
            known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        };
        let name = text(self.functions.cuGetErrorName).unwrap_or_else(|| format!("error {code}"));
        let about = text(self.functions.cuGetErrorString).map_or_else(String::new, |about| format!(" ({about})"));
        Err(EngineError::Backend { op: call, message: format!("{name}{about}") })
    }
}
