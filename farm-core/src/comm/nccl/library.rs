//! The NCCL library, opened while the program runs: the same program starts where there is none. The types are cudarc's.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use cudarc::driver;
use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclUniqueId};

use crate::comm::CommError;
use crate::engine::cuda::driver::libraries;

/// The first version with communicators that do not block.
const OLDEST: c_int = 21400;

/// Results that are no errors. Numbers, not an enum: a newer library may have more.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`
const BYTES: c_int = 1;
/// Of `ncclConfig_t`: that it is one, and that a field has its default.
const MAGIC: u32 = 0xcafe_beef;
const DEFAULT: c_int = c_int::MIN;

/// Declares the functions of the library and the way to find them.
macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        pub(super) struct Library {
            version: c_int,
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Library {
            /// # Safety
            /// The library has to be NCCL.
            unsafe fn find(library: &libloading::Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    version: 0,
                    // SAFETY: these are the declarations of nccl.h, unchanged since the oldest version taken here.
                    $($field: unsafe { *library.get($symbol)? },)*
                })
            }
        }
    };
}

functions! {
    get_version = b"ncclGetVersion\0": fn(*mut c_int) -> c_int;
    get_unique_id = b"ncclGetUniqueId\0": fn(*mut ncclUniqueId) -> c_int;
    init_rank = b"ncclCommInitRankConfig\0": fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> c_int;
    async_error = b"ncclCommGetAsyncError\0": fn(ncclComm_t, *mut c_int) -> c_int;
    finalize = b"ncclCommFinalize\0": fn(ncclComm_t) -> c_int;
    destroy = b"ncclCommDestroy\0": fn(ncclComm_t) -> c_int;
    abort = b"ncclCommAbort\0": fn(ncclComm_t) -> c_int;
    group_start = b"ncclGroupStart\0": fn() -> c_int;
    group_end = b"ncclGroupEnd\0": fn() -> c_int;
    send = b"ncclSend\0": fn(*const c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int;
    receive = b"ncclRecv\0": fn(*mut c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int;
    error_string = b"ncclGetErrorString\0": fn(c_int) -> *const c_char;
}

/// The library, if this machine has one and a driver for it. Says what is missing otherwise; never panics.
pub(super) fn library() -> Result<&'static Library, CommError> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY.get_or_init(open).as_ref().map_err(|why| CommError::Transport(why.clone()))
}

fn open() -> Result<Library, String> {
    let opened = libraries::open(libraries::Kind::Nccl).map_err(ToString::to_string)?;
    // SAFETY: it bears the name of NCCL and has a function of it. It stays open until the program ends.
    let library = unsafe { Library::find(&opened.library) };
    let mut library =
        library.map_err(|error| format!("{} is of no use: {}", opened.path.display(), libraries::reason(error)))?;
    // SAFETY: it writes one number.
    if unsafe { (library.get_version)(&mut library.version) } != SUCCESS || library.version < OLDEST {
        return Err(format!("NCCL {} is too old; 2.14 is the first that can be used", library.version()));
    }
    // SAFETY: it only tries to open the library of the driver.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(format!("there is NCCL {} but no driver (libcuda.so.1) for it", library.version()));
    }
    Ok(library)
}

/// Whether a call is through, or goes on behind it.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Progress {
    Done,
    Goes,
}

impl Library {
    /// For example `2.30.3`.
    pub(super) fn version(&self) -> String {
        format!("{}.{}.{}", self.version / 10_000, self.version / 100 % 100, self.version % 100)
    }

    pub(super) fn unique_id(&self) -> Result<ncclUniqueId, String> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: it writes an id.
        self.check("ncclGetUniqueId", unsafe { (self.get_unique_id)(&mut id) })?;
        Ok(id)
    }

    /// Starts to make a communicator whose calls do not block, on the context that is current.
    pub(super) fn init(&self, world: usize, id: ncclUniqueId, rank: usize) -> Result<ncclComm_t, String> {
        let mut config = ncclConfig_t {
            size: size_of::<ncclConfig_t>(),
            magic: MAGIC,
            version: self.version as u32,
            blocking: 0,
            cgaClusterSize: DEFAULT,
            minCTAs: DEFAULT,
            maxCTAs: DEFAULT,
            netName: std::ptr::null(),
            splitShare: DEFAULT,
            trafficClass: DEFAULT,
            commName: std::ptr::null(),
            collnetEnable: DEFAULT,
            CTAPolicy: DEFAULT,
            shrinkShare: DEFAULT,
            nvlsCTAs: DEFAULT,
            nChannelsPerNetPeer: DEFAULT,
            nvlinkCentricSched: DEFAULT,
            graphUsageMode: DEFAULT,
            numRmaCtx: DEFAULT,
            maxP2pPeers: DEFAULT,
        };
        let mut comm = std::ptr::null_mut();
        // SAFETY: the pointers are to a place for the communicator and to a whole configuration with its size.
        let result = unsafe { (self.init_rank)(&mut comm, world as c_int, id, rank as c_int, &mut config) };
        self.check("ncclCommInitRankConfig", result)?;
        Ok(comm)
    }

    /// How far the last call on the communicator is.
    ///
    /// # Safety
    /// This and the functions below: `comm` is a communicator that was not given up.
    pub(super) unsafe fn progress(&self, comm: ncclComm_t) -> Result<Progress, String> {
        let mut state = SUCCESS;
        // SAFETY: see above; it writes one number.
        self.check("ncclCommGetAsyncError", unsafe { (self.async_error)(comm, &mut state) })?;
        self.check("NCCL", state)
    }

    pub(super) unsafe fn finalize(&self, comm: ncclComm_t) -> Result<Progress, String> {
        // SAFETY: see `progress`.
        self.check("ncclCommFinalize", unsafe { (self.finalize)(comm) })
    }

    /// Gives up a communicator that has been finalized.
    pub(super) unsafe fn destroy(&self, comm: ncclComm_t) {
        // SAFETY: see `progress`. There is nobody left to tell of an error.
        let _ = unsafe { (self.destroy)(comm) };
    }

    /// Gives up a communicator at once, whatever its device does.
    pub(super) unsafe fn abort(&self, comm: ncclComm_t) {
        // SAFETY: see `progress`. There is nothing to be done about an error.
        let _ = unsafe { (self.abort)(comm) };
    }

    pub(super) fn group_start(&self) -> Result<Progress, String> {
        // SAFETY: it takes nothing.
        self.check("ncclGroupStart", unsafe { (self.group_start)() })
    }

    pub(super) fn group_end(&self) -> Result<Progress, String> {
        // SAFETY: it takes nothing.
        self.check("ncclGroupEnd", unsafe { (self.group_end)() })
    }

    /// # Safety
    /// Also, `from` is device memory of `len` bytes that lives until the stream is past this.
    pub(super) unsafe fn send(
        &self,
        from: u64,
        len: usize,
        to: usize,
        comm: ncclComm_t,
        stream: CUstream,
    ) -> Result<Progress, String> {
        // SAFETY: see above.
        self.check("ncclSend", unsafe { (self.send)(from as *const c_void, len, BYTES, to as c_int, comm, stream) })
    }

    /// # Safety
    /// Also, `to` is device memory of `len` bytes that lives until the stream is past this.
    pub(super) unsafe fn receive(
        &self,
        to: u64,
        len: usize,
        from: usize,
        comm: ncclComm_t,
        stream: CUstream,
    ) -> Result<Progress, String> {
        // SAFETY: see above.
        self.check("ncclRecv", unsafe { (self.receive)(to as *mut c_void, len, BYTES, from as c_int, comm, stream) })
    }

    fn check(&self, call: &str, result: c_int) -> Result<Progress, String> {
        match result {
            SUCCESS => Ok(Progress::Done),
            IN_PROGRESS => Ok(Progress::Goes),
            _ => {
                // SAFETY: it returns a constant text for every number.
                let text = unsafe { CStr::from_ptr((self.error_string)(result)) };
                Err(format!("{call}: {}", text.to_string_lossy()))
            }
        }
    }
}
