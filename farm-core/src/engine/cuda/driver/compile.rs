//! NVRTC, which makes machine code for a GPU out of the kernels' sources.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::fs;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::libraries::{self, Kind, Opened, functions, reason};
use crate::engine::cuda::cache;
use crate::engine::cuda::kernels::Source;

const SUCCESS: c_int = 0;

/// `nvrtcProgram`
type Program = *mut c_void;

functions! {
    Functions {
        nvrtcVersion = b"nvrtcVersion\0": fn(*mut c_int, *mut c_int) -> c_int;
        nvrtcGetNumSupportedArchs = b"nvrtcGetNumSupportedArchs\0": fn(*mut c_int) -> c_int;
        nvrtcGetSupportedArchs = b"nvrtcGetSupportedArchs\0": fn(*mut c_int) -> c_int;
        nvrtcCreateProgram = b"nvrtcCreateProgram\0": fn(
            *mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        ) -> c_int;
        nvrtcDestroyProgram = b"nvrtcDestroyProgram\0": fn(*mut Program) -> c_int;
        nvrtcCompileProgram = b"nvrtcCompileProgram\0": fn(Program, c_int, *const *const c_char) -> c_int;
        nvrtcGetProgramLogSize = b"nvrtcGetProgramLogSize\0": fn(Program, *mut usize) -> c_int;
        nvrtcGetProgramLog = b"nvrtcGetProgramLog\0": fn(Program, *mut c_char) -> c_int;
        nvrtcGetCUBINSize = b"nvrtcGetCUBINSize\0": fn(Program, *mut usize) -> c_int;
        nvrtcGetCUBIN = b"nvrtcGetCUBIN\0": fn(Program, *mut c_char) -> c_int;
        nvrtcGetPTXSize = b"nvrtcGetPTXSize\0": fn(Program, *mut usize) -> c_int;
        nvrtcGetPTX = b"nvrtcGetPTX\0": fn(Program, *mut c_char) -> c_int;
        nvrtcGetErrorString = b"nvrtcGetErrorString\0": fn(c_int) -> *const c_char;
    }
}

const HOPPER: &str = "sm_90a";

/// What kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Machine code for one kind of GPU, for example `sm_90a`. A driver takes it from any NVRTC of its own major version.
    Machine(&'static str),
    /// Machine code by number, for example 89.
    Plain(c_int),
    /// For a GPU that is newer than NVRTC: an assembly language that the driver compiles when it is loaded.
    Portable(c_int),
}

impl Target {
    /// Whether it has the instructions that only Hopper has.
    pub fn has_hopper(self) -> bool {
        self == Self::Machine(HOPPER)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine(name) => f.write_str(name),
            Self::Plain(arch) => write!(f, "sm_{arch}"),
            Self::Portable(arch) => write!(f, "compute_{arch}"),
        }
    }
}

/// What to compile for a GPU of this compute capability by an NVRTC that knows these; None if it knows no older one either.
///
/// On Hopper that is `sm_90a`, which has all its instructions.
fn target(capability: (c_int, c_int), known: &[c_int], nvrtc: (c_int, c_int)) -> Option<Target> {
    let arch = 10 * capability.0 + capability.1;
    if !known.contains(&arch) {
        return known.iter().copied().filter(|known| *known < arch).max().map(Target::Portable);
    }
    Some(if arch == 90 && nvrtc.0 >= 12 { Target::Machine(HOPPER) } else { Target::Plain(arch) })
}

/// The compiler.
pub struct Compiler {
    functions: Functions,
    version: (c_int, c_int),
    known: Vec<c_int>,
    /// Compiles one source at a time: not every NVRTC takes calls of several threads.
    busy: Mutex<()>,
}

/// The compiler of this machine, or what is missing. Never panics.
pub fn compiler() -> Result<&'static Compiler, String> {
    static COMPILER: OnceLock<Result<Compiler, String>> = OnceLock::new();
    let start = || Compiler::start(libraries::open(Kind::Nvrtc).map_err(ToString::to_string)?);
    COMPILER.get_or_init(start).as_ref().map_err(Clone::clone)
}

/// A source for a GPU, as the driver loads it.
pub struct Compiled {
    /// Ends with a 0, which assembly language needs and machine code does not mind.
    pub image: Vec<u8>,
    /// False if it was on disk.
    pub fresh: bool,
}

impl Compiler {
    pub(super) fn start(opened: &Opened) -> Result<Self, String> {
        // SAFETY: it bears the name of NVRTC and has a function of it; these are the declarations of nvrtc.h.
        let functions = unsafe { Functions::find(&opened.library) };
        let functions =
            functions.map_err(|error| format!("NVRTC {} is too old: {}", opened.path.display(), reason(error)))?;
        let mut compiler = Self { functions, version: (0, 0), known: Vec::new(), busy: Mutex::new(()) };
        let mut count = 0;
        // SAFETY: they write numbers, the last as many as `count` says.
        unsafe {
            let functions = &compiler.functions;
            let version = &mut compiler.version;
            let mut result = (functions.nvrtcVersion)(&mut version.0, &mut version.1);
            if result == SUCCESS {
                result = (functions.nvrtcGetNumSupportedArchs)(&mut count);
            }
            if result == SUCCESS {
                compiler.known = vec![0; usize::try_from(count).unwrap_or(0)];
                result = (functions.nvrtcGetSupportedArchs)(compiler.known.as_mut_ptr());
            }
            compiler.check("nvrtcGetSupportedArchs", result)?;
        }
        Ok(compiler)
    }

    /// What this compiles for a GPU of the compute capability, for example (8, 9).
    pub fn target(&self, capability: (c_int, c_int)) -> Result<Target, String> {
        target(capability, &self.known, self.version).ok_or_else(|| {
            let ((major, minor), (gpu_major, gpu_minor)) = (self.version, capability);
            format!("NVRTC {major}.{minor} compiles nothing for a GPU of compute capability {gpu_major}.{gpu_minor}")
        })
    }

    /// For example `13.0`.
    pub fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// The source for the target, from the disk if this NVRTC has compiled it before. `driver` is its version: what it has
    /// once refused or misread another may take.
    pub fn compiled(&self, source: Source, target: Target, driver: &str) -> Result<Compiled, String> {
        let text = source.text();
        let options = options(target).join(" ");
        let version = self.version();
        let inputs = [text.as_str(), &options, &version, driver].map(str::as_bytes);
        let mut fresh = false;
        let path = cache::file(&format!("{}-{target}", source.name()), &inputs, |out| {
            fresh = true;
            let image = self.compile(source.name(), &text, target).map_err(std::io::Error::other)?;
            fs::write(out, image)
        });
        let image = path.and_then(fs::read).map_err(|error| error.to_string())?;
        Ok(Compiled { image, fresh })
    }

    /// Errors have the compiler's words.
    pub fn compile(&self, name: &str, text: &str, target: Target) -> Result<Vec<u8>, String> {
        let (image, remarks) = self.build(name, text, target, &options(target))?;
        if !remarks.is_empty() {
            tracing::warn!(source = name, %target, remarks, "the compiler has remarks on a kernel");
        }
        Ok(image)
    }

    /// The code, and what the compiler remarks on it.
    fn build(&self, name: &str, text: &str, target: Target, options: &[String]) -> Result<(Vec<u8>, String), String> {
        let _alone = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let (text, file) = (c_string(text)?, c_string(&format!("{name}.cu"))?);
        let options = options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>, _>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let functions = &self.functions;
        let mut program = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: the texts end with 0 and outlive the program; there are no headers.
        let made = unsafe { (functions.nvrtcCreateProgram)(&mut program, text.as_ptr(), file.as_ptr(), 0, none, none) };
        self.check("nvrtcCreateProgram", made)?;
        let mut program = Destroyed { compiler: self, program };
        // SAFETY: the program was made above, and there are as many options as it is told.
        let result =
            unsafe { (functions.nvrtcCompileProgram)(program.program, options.len() as c_int, options.as_ptr()) };
        let program = &mut program;
        let log = program.bytes(functions.nvrtcGetProgramLogSize, functions.nvrtcGetProgramLog).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned();
        if result != SUCCESS {
            let why = self.check("nvrtcCompileProgram", result).err().unwrap_or_default();
            return Err(format!("{name} for {target}: {why}\n{log}"));
        }
        let mut image = match target {
            Target::Portable(_) => program.bytes(functions.nvrtcGetPTXSize, functions.nvrtcGetPTX)?,
            _ => program.bytes(functions.nvrtcGetCUBINSize, functions.nvrtcGetCUBIN)?,
        };
        image.push(0);
        Ok((image, log))
    }

    fn check(&self, call: &str, result: c_int) -> Result<(), String> {
        if result == SUCCESS {
            return Ok(());
        }
        // SAFETY: it returns a constant text for every number.
        let text = unsafe { CStr::from_ptr((self.functions.nvrtcGetErrorString)(result)) };
        Err(format!("{call}: {}", text.to_string_lossy()))
    }
}

/// No fast maths: divisions, square roots and denormal values are as IEEE has them. Functions without a mark are for the
/// device: sources have no other.
fn options(target: Target) -> [String; 3] {
    [format!("--gpu-architecture={target}"), "--std=c++17".into(), "-default-device".into()]
}

fn c_string(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(|_| "a text with a 0 in it".into())
}

/// A program that ends with its scope.
struct Destroyed<'a> {
    compiler: &'a Compiler,
    program: Program,
}

impl Destroyed<'_> {
    /// What two functions give, the first of which tells how much that is.
    fn bytes(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: the program is alive; it writes a number.
        self.compiler.check("nvrtc", unsafe { size(self.program, &mut len) })?;
        let mut bytes = vec![0u8; len];
        // SAFETY: it writes as much as it has told.
        self.compiler.check("nvrtc", unsafe { get(self.program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Destroyed<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was made, and nobody has it any more. There is nobody to tell of an error.
        let _ = unsafe { (self.compiler.functions.nvrtcDestroyProgram)(&mut self.program) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cuda::kernels;

    /// The compiler of this machine, which the tests need.
    fn nvrtc() -> &'static Compiler {
        compiler().unwrap_or_else(|error| panic!("{error}\nthe tests compile all kernels: run `make nvrtc`"))
    }

    #[test]
    fn every_kernel_compiles_for_every_gpu_that_is_meant() {
        for (capability, expected) in [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a")] {
            let target = nvrtc().target(capability).unwrap();
            assert_eq!(target.to_string(), expected);
            for source in Source::ALL.into_iter().filter(|source| !source.wants_hopper() || target.has_hopper()) {
                let image =
                    nvrtc().compile(source.name(), &source.text(), target).unwrap_or_else(|error| panic!("{error}"));
                for kernel in kernels::all().filter(|kernel| kernel.source == source) {
                    // Each kernel has a section of its own.
                    let section = format!(".text.{}\0", kernel.name());
                    let found = image.windows(section.len()).any(|bytes| bytes == section.as_bytes());
                    assert!(found, "{kernel:?} is not in {target}");
                }
            }
        }
    }

    #[test]
    fn hoppers_products_run_beside_other_work_and_all_is_in_registers() {
        let (source, target) = (Source::AttentionHopper, nvrtc().target((9, 0)).unwrap());
        let mut options = options(target).to_vec();
        options.extend(["spills", "local-memory-usage"].map(|what| format!("--ptxas-options=--warn-on-{what}")));
        let build = |text: &str| nvrtc().build(source.name(), text, target, &options).unwrap().1;
        // A remark without being asked: that products wait for each other, or for registers.
        assert_eq!(build(&source.text()), "");
        let few = source.text().replace("more_registers<240>", "more_registers<200>");
        let remarks = build(&few);
        assert!(remarks.contains("serialized") && remarks.contains("spilled"), "{remarks}");
    }

    #[test]
    fn an_error_of_the_compiler_names_the_line_and_what_is_wrong() {
        let target = nvrtc().target((8, 0)).unwrap();
        let error =
            nvrtc().compile("broken", "// a line\n__global__ void f(int* x) { y[0] = 1; }", target).unwrap_err();
        assert!(error.contains("broken.cu(2)") && error.contains("\"y\" is undefined"), "{error}");
        assert!(error.contains("sm_80") && error.contains("NVRTC_ERROR_COMPILATION"), "{error}");
    }

    #[test]
    fn a_gpu_that_nvrtc_does_not_know_gets_the_newest_code_that_runs_on_it() {
        let known = [75, 80, 86, 89, 90];
        let name = |capability, nvrtc| target(capability, &known, nvrtc).map(|target| target.to_string());
        assert_eq!(name((8, 9), (13, 0)).as_deref(), Some("sm_89"));
        assert_eq!(name((9, 0), (13, 0)).as_deref(), Some("sm_90a"));
        // The name came with CUDA 12.
        assert_eq!(name((9, 0), (11, 8)).as_deref(), Some("sm_90"));
        assert_eq!(name((12, 0), (13, 0)).as_deref(), Some("compute_90"));
        assert_eq!(name((8, 7), (13, 0)).as_deref(), Some("compute_86"));
        assert_eq!(name((7, 0), (13, 0)), None);
    }

    #[test]
    fn assembly_language_has_every_kernel_too() {
        let image = nvrtc().compile("pointwise", &Source::Pointwise.text(), Target::Portable(80)).unwrap();
        let text = CStr::from_bytes_until_nul(&image).unwrap().to_str().unwrap();
        for kernel in kernels::all().filter(|kernel| kernel.source == Source::Pointwise) {
            assert!(text.contains(&format!(".entry {}(", kernel.name())), "{kernel:?}");
        }
    }
}
