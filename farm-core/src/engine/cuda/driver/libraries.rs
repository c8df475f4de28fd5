//! The libraries of CUDA on this machine, opened while the program runs: the same program starts where there are none.
//!
//! Opened here rather than by cudarc, which panics when it finds none, and looks only where the system does. Here the
//! folders of Python's wheels and of the toolkit count too, so whoever has PyTorch has what is needed.

use std::error::Error;
use std::ffi::{CStr, OsStr, OsString, c_int, c_uint, c_void};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Folders that come before all others, separated by colons.
pub const FOLDERS: &str = "MOCHI_FARM_CUDA_LIBRARIES";

/// A library that this program can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Comes with the system's driver for GPUs.
    Driver,
    /// The compiler of kernels.
    Nvrtc,
    /// Matrix products.
    CublasLt,
    /// Convolutions.
    Cudnn,
    /// Exchanges between GPUs.
    Nccl,
}

impl Kind {
    pub const ALL: [Self; 5] = [Self::Driver, Self::Nvrtc, Self::CublasLt, Self::Cudnn, Self::Nccl];

    /// Names of its file, the one that is meant first. The driver has no other: the `libcuda.so` of a toolkit is only for
    /// linking.
    fn files(self) -> &'static [&'static str] {
        match self {
            Self::Driver => &["libcuda.so.1"],
            Self::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
            Self::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
            Self::Cudnn => &["libcudnn.so.9", "libcudnn.so"],
            Self::Nccl => &["libnccl.so.2", "libnccl.so"],
        }
    }

    /// A function that every version has, and that tells the version.
    fn probe(self) -> &'static [u8] {
        match self {
            Self::Driver => b"cuDriverGetVersion\0",
            Self::Nvrtc => b"nvrtcVersion\0",
            Self::CublasLt => b"cublasLtGetVersion\0",
            Self::Cudnn => b"cudnnGetVersion\0",
            Self::Nccl => b"ncclGetVersion\0",
        }
    }

    /// How to get it.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Driver => "install NVIDIA's driver, 525 or newer; in a container, start it with access to the GPUs",
            Self::Nvrtc => "pip install nvidia-cuda-nvrtc",
            Self::CublasLt => "pip install nvidia-cublas",
            Self::Cudnn => "pip install nvidia-cudnn-cu13",
            Self::Nccl => "pip install nvidia-nccl-cu13",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Driver => "driver",
            Self::Nvrtc => "NVRTC",
            Self::CublasLt => "cuBLASLt",
            Self::Cudnn => "cuDNN",
            Self::Nccl => "NCCL",
        })
    }
}

/// A library that was found. It stays open until the program ends.
pub struct Opened {
    pub kind: Kind,
    pub path: PathBuf,
    /// For example `13.0`. None if it does not tell.
    pub version: Option<String>,
    pub(crate) library: libloading::Library,
}

/// A library that this machine does not have.
#[derive(Clone, Debug)]
pub struct Missing {
    kind: Kind,
    /// Why the first file with its name could not be opened, if there is one.
    pub broken: Option<String>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, broken } = self;
        let remedy = kind.remedy();
        match broken {
            Some(why) => write!(f, "{kind} is of no use: {why}")?,
            None => write!(f, "there is no {kind}: found no {}", kind.files().join(", no "))?,
        }
        write!(f, "; {remedy}, or name its folder in {FOLDERS}")
    }
}

/// The library, if this machine has it. Never panics. Looks once.
pub fn open(kind: Kind) -> Result<&'static Opened, &'static Missing> {
    static OPENED: [OnceLock<Result<Opened, Missing>>; Kind::ALL.len()] = [const { OnceLock::new() }; Kind::ALL.len()];
    OPENED[kind as usize].get_or_init(|| open_in(kind, &places(|name| std::env::var_os(name)))).as_ref()
}

/// Where a library may be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Place {
    Folder(PathBuf),
    /// Where the system looks: `LD_LIBRARY_PATH` and its own folders.
    System,
}

/// All places, in the order in which they are looked at: what a person names, the system's, those of the Python environment
/// that is active, those of a toolkit.
pub(crate) fn places(variable: impl Fn(&str) -> Option<OsString>) -> Vec<Place> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let named = set(FOLDERS).unwrap_or_default();
    let mut places: Vec<Place> =
        std::env::split_paths(&named).filter(|path| path != Path::new("")).map(Place::Folder).collect();
    places.push(Place::System);
    for environment in ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| set(name)) {
        places.extend(wheels(Path::new(&environment)).into_iter().map(Place::Folder));
        places.push(Place::Folder(Path::new(&environment).join("lib")));
    }
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| set(name)).chain(["/usr/local/cuda".into()]);
    places.extend(toolkits.map(|toolkit| Place::Folder(Path::new(&toolkit).join("lib64"))));
    places
}

/// Folders of the libraries in a Python environment: `lib/python3.*/site-packages/nvidia/*/lib`.
pub(crate) fn wheels(environment: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for python in folders(&environment.join("lib"), "python3") {
        found.extend(folders(&python.join("site-packages/nvidia"), "").into_iter().map(|wheel| wheel.join("lib")));
    }
    found.retain(|folder| folder.is_dir());
    found
}

fn folders(of: &Path, start: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(of).into_iter().flatten().flatten();
    let begins = |name: &OsStr| name.to_string_lossy().starts_with(start);
    let mut found: Vec<PathBuf> =
        entries.filter(|entry| begins(&entry.file_name())).map(|entry| entry.path()).collect();
    found.sort();
    found
}

pub(crate) fn open_in(kind: Kind, places: &[Place]) -> Result<Opened, Missing> {
    let mut broken = None;
    for place in places {
        for file in kind.files() {
            let path = match place {
                Place::Folder(folder) => folder.join(file),
                Place::System => PathBuf::from(file),
            };
            if *place != Place::System && !path.exists() {
                continue;
            }
            match load(kind, &path) {
                Ok(opened) => return Ok(opened),
                // Of those that the system looks for, one that is absent is no news.
                Err(error) if *place != Place::System => broken = broken.or(Some(error)),
                Err(_) => {}
            }
        }
    }
    Err(Missing { kind, broken })
}

fn load(kind: Kind, path: &Path) -> Result<Opened, String> {
    if kind == Kind::Nvrtc {
        open_builtins(path.parent());
    }
    // SAFETY: opening NVIDIA's libraries runs their constructors, which want nothing of their caller.
    let library = unsafe { libloading::Library::new(path) }.map_err(reason)?;
    // SAFETY: the symbol is looked at, not called.
    let probe = unsafe { library.get::<*const c_void>(kind.probe()) }.map_err(reason)?;
    // SAFETY: the address of a function of the library, which is a pointer.
    let path = whence(unsafe { probe.try_as_raw_ptr() }.unwrap_or_default()).unwrap_or_else(|| path.into());
    if kind == Kind::Nvrtc {
        open_builtins(path.parent());
    }
    let version = version(kind, &library);
    Ok(Opened { kind, path, version, library })
}

/// What the system says of a library or function that it does not open.
pub(crate) fn reason(error: libloading::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

/// NVRTC opens this part of itself by name when it compiles, which fails where the system does not look. One that is open
/// already it finds.
fn open_builtins(folder: Option<&Path>) {
    for path in folder.map(|folder| folders(folder, "libnvrtc-builtins.so")).unwrap_or_default() {
        // SAFETY: it has no constructors that want anything. If it cannot be opened, NVRTC will say so.
        if let Ok(library) = unsafe { libloading::Library::new(path) } {
            std::mem::forget(library);
        }
    }
}

/// The file that has the function.
fn whence(function: *mut c_void) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: it writes to `info`; any address may be asked for.
    if unsafe { libc::dladdr(function, &mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the name of a library that is open, and stays so.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    Some(PathBuf::from(OsStr::from_bytes(name.to_bytes())))
}

fn version(kind: Kind, library: &libloading::Library) -> Option<String> {
    // SAFETY: these are the declarations of the libraries' headers, the same in all their versions; they write and return
    // numbers.
    unsafe {
        match kind {
            Kind::Driver => {
                let init: libloading::Symbol<'_, unsafe extern "C" fn(c_uint) -> c_int> =
                    library.get(b"cuInit\0").ok()?;
                let ask: libloading::Symbol<'_, unsafe extern "C" fn(*mut c_int) -> c_int> =
                    library.get(kind.probe()).ok()?;
                // It tells its version also where it finds no GPU.
                let _ = init(0);
                let mut version = 0;
                (ask(&mut version) == 0).then(|| format!("{}.{}", version / 1000, version / 10 % 100))
            }
            Kind::Nvrtc => {
                let ask: libloading::Symbol<'_, unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int> =
                    library.get(kind.probe()).ok()?;
                let (mut major, mut minor) = (0, 0);
                (ask(&mut major, &mut minor) == 0).then(|| format!("{major}.{minor}"))
            }
            Kind::Nccl => {
                let ask: libloading::Symbol<'_, unsafe extern "C" fn(*mut c_int) -> c_int> =
                    library.get(kind.probe()).ok()?;
                let mut version = 0;
                (ask(&mut version) == 0).then(|| three(version as usize))
            }
            Kind::CublasLt | Kind::Cudnn => {
                let ask: libloading::Symbol<'_, unsafe extern "C" fn() -> usize> = library.get(kind.probe()).ok()?;
                Some(three(ask()))
            }
        }
    }
}

/// As `130002` means 13.0.2.
fn three(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// Declares the functions of a library and the way to find them.
macro_rules! functions {
    ($(#[$about:meta])* $table:ident { $($field:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)* }) => {
        $(#[$about])*
        #[allow(non_snake_case)]
        pub(super) struct $table {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $table {
            /// # Safety
            /// The library has to be the one that these functions are declared for.
            pub(super) unsafe fn find(
                library: &libloading::Library,
            ) -> ::std::result::Result<Self, libloading::Error> {
                // SAFETY: see above.
                Ok(Self { $($field: unsafe { *library.get($symbol)? },)* })
            }
        }
    };
}
pub(super) use functions;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_folders_come_before_the_system_and_wheels_behind_it() {
        let folder = tempfile::tempdir().unwrap();
        let venv = folder.path().join("venv");
        let wheel = venv.join("lib/python3.12/site-packages/nvidia/cu13/lib");
        fs::create_dir_all(&wheel).unwrap();
        let variable = |name: &str| match name {
            FOLDERS => Some(OsString::from("/one::/two")),
            "VIRTUAL_ENV" => Some(venv.clone().into()),
            "CONDA_PREFIX" => Some(OsString::new()),
            _ => None,
        };
        let folder = |path: &Path| Place::Folder(path.into());
        let expected = [
            folder(Path::new("/one")),
            folder(Path::new("/two")),
            Place::System,
            folder(&wheel),
            folder(&venv.join("lib")),
            folder(Path::new("/usr/local/cuda/lib64")),
        ];
        assert_eq!(places(variable), expected);
    }

    #[test]
    fn what_is_absent_or_broken_is_an_error_with_its_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let places = [Place::Folder(folder.path().into())];
        for kind in Kind::ALL {
            let error = open_in(kind, &places).err().unwrap().to_string();
            assert!(
                error.contains(kind.files()[0]) && error.contains(kind.remedy()) && error.contains(FOLDERS),
                "{error}"
            );
            fs::write(folder.path().join(kind.files()[0]), "no library").unwrap();
            let why = open_in(kind, &places).err().unwrap().broken.unwrap();
            assert!(why.contains("file too short") || why.contains("invalid ELF header"), "{why}");
        }
    }
}
