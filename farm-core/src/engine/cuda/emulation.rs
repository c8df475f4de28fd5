//! The kernels on the processor, for machines without a GPU: the same sources, compiled by `c++`, run by the same launches.
//! Much too slow for clips; it shows that indices, barriers and numbers are right. See `kernels/emulation.h`.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_uint, c_void};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::{OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::cache;
use super::device::{Address, Arg, Device, Launch, Matmul, TensorMap, Value};
use super::kernels::{self, Source};
use super::profile::Timed;
use crate::engine::{EngineError, Result};

#[cfg(test)]
mod tests;

const PAGE: usize = 4096;

/// What stands before a source.
const HEADERS: &str = concat!(include_str!("kernels/emulation.h"), "\n", include_str!("kernels/emulation_hopper.h"));

/// A GPU that is not there.
#[derive(Default)]
pub struct Emulation {
    libraries: [OnceLock<libloading::Library>; Source::ALL.len()],
    /// Mappings by the address that was given out: where they begin, and their length.
    memory: Mutex<BTreeMap<Address, (usize, usize)>>,
    /// Bytes that may be in use at a time, if there is a limit.
    limit: Option<usize>,
}

type Launcher = unsafe extern "C" fn(*const c_uint, c_uint, c_uint, *mut *mut c_void);
type Signature = unsafe extern "C" fn() -> *const c_char;

impl Emulation {
    /// As a device with `limit` bytes of memory.
    pub fn with_memory(limit: usize) -> Self {
        Self { limit: Some(limit), ..Self::default() }
    }

    /// Bytes that are in use.
    pub fn used(&self) -> usize {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).values().map(|(_, len)| len - PAGE).sum()
    }

    /// Errs if `bytes` at `address` are not this device's. On a GPU another one's memory may be out of reach, or slow.
    fn check_own(&self, address: Address, bytes: usize) -> Result<()> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let owned = memory.range(..=address).next_back();
        match owned.is_some_and(|(_, (start, len))| address as usize + bytes <= start + len - PAGE) {
            true => Ok(()),
            false => Err(failed(format!("what is at {address:#x} is not in this device's memory"))),
        }
    }

    fn library(&self, source: Source) -> Result<&libloading::Library> {
        let slot = &self.libraries[Source::ALL.iter().position(|other| *other == source).unwrap_or_default()];
        if let Some(library) = slot.get() {
            return Ok(library);
        }
        let library = compiled(source).map_err(|error| failed(format!("{source:?}: {error}")))?;
        Ok(slot.get_or_init(|| library))
    }
}

fn failed(message: String) -> EngineError {
    EngineError::Backend { op: "emulate", message }
}

fn compiled(source: Source) -> std::io::Result<libloading::Library> {
    let mut text = format!("{HEADERS}\n{}", source.text());
    for kernel in kernels::all().filter(|kernel| kernel.source == source) {
        let name = kernel.name();
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "\nextern \"C\" void launch_{name}(const unsigned* grid, unsigned block, unsigned shared, void** args) {{ \
             emulated::launch({name}, grid, block, shared, args); }}\n\
             extern \"C\" const char* signature_{name}() {{ return emulated::signature({name}); }}\n"
        );
    }
    let path = built("emulated.so", &text, &["-fPIC", "-shared"])?;
    // SAFETY: it was compiled from the sources of this program; loading it runs nothing of its own.
    unsafe { libloading::Library::new(path) }.map_err(std::io::Error::other)
}

/// The file that a C++ compiler makes of the text, by an earlier run if there was one.
fn built(name: &str, text: &str, flags: &[&str]) -> std::io::Result<PathBuf> {
    // Contraction would round once where the source rounds twice.
    let common = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-pthread", "-x", "c++"];
    let flags = [&common[..], flags].concat();
    cache::file(name, &[text.as_bytes(), flags.join(" ").as_bytes()], |out| {
        let input = out.with_extension("cpp");
        fs::write(&input, text)?;
        let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
        let run = Command::new(&compiler).args(&flags).arg(&input).arg("-o").arg(out).output();
        let run = run.map_err(|error| {
            std::io::Error::new(
                error.kind(),
                format!("{}: {error}; install a C++ compiler", Path::new(&compiler).display()),
            )
        })?;
        // What it was made from is in the program.
        fs::remove_file(&input)?;
        if !run.status.success() {
            return Err(std::io::Error::other(String::from_utf8_lossy(&run.stderr).into_owned()));
        }
        Ok(())
    })
}

/// Whatever is asked for is done at once, so there is nothing to mark or to wait for.
impl Device for Emulation {
    type Host = Vec<u8>;
    type Mark = ();

    fn name(&self) -> String {
        "emulated gpu".into()
    }

    /// Whatever it is.
    fn runs(&self, _source: Source) -> bool {
        true
    }

    /// Filled with NaN; the bytes behind it are not mapped, so a kernel that goes beyond ends the process.
    fn alloc(&self, bytes: usize) -> Result<Address> {
        let oom = || EngineError::OutOfMemory { op: "alloc", wanted: bytes };
        if self.limit.is_some_and(|limit| self.used() + bytes > limit) {
            return Err(oom());
        }
        // Vector loads want 16 bytes aligned; what is left between the end and the next page is at most 15 bytes.
        let room = bytes.next_multiple_of(16);
        let len = room.next_multiple_of(PAGE) + PAGE;
        // SAFETY: new memory, which nobody else has.
        let start = unsafe {
            let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let start = libc::mmap(std::ptr::null_mut(), len, access, kind, -1, 0);
            if start == libc::MAP_FAILED {
                return Err(oom());
            }
            let guard = start.byte_add(len - PAGE);
            if libc::mprotect(guard, PAGE, libc::PROT_NONE) != 0 {
                libc::munmap(start, len);
                return Err(oom());
            }
            std::ptr::write_bytes(start.cast::<u8>(), 0xff, len - PAGE);
            start as usize
        };
        let address = (start + len - PAGE - room) as Address;
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).insert(address, (start, len));
        Ok(address)
    }

    fn free(&self, address: Address, _bytes: usize) {
        if let Some((start, len)) = self.memory.lock().unwrap_or_else(PoisonError::into_inner).remove(&address) {
            // SAFETY: it was mapped by `alloc`, and whoever had it has no more use for it.
            unsafe { libc::munmap(start as *mut c_void, len) };
        }
    }

    fn copy_in(&self, to: Address, from: &[u8]) -> Result<()> {
        self.check_own(to, from.len())?;
        // SAFETY: it is this device's memory.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    fn copy_out(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.check_own(from, to.len())?;
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.check_own(from, bytes)?;
        self.check_own(to, bytes)?;
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn host(&self, bytes: usize) -> Result<Vec<u8>> {
        Ok(vec![0xff; bytes])
    }

    fn mark(&self) -> Result<()> {
        Ok(())
    }

    fn fetch(&self, to: Address, from: &Vec<u8>, _after: &()) -> Result<()> {
        self.copy_in(to, from)
    }

    fn wait(&self, _mark: &()) -> Result<()> {
        Ok(())
    }

    fn pull(&self, peer: &Self, from: Address, bytes: usize, _after: &()) -> Result<(Address, ())> {
        peer.check_own(from, bytes)?;
        let to = self.alloc(bytes)?;
        // SAFETY: each is its device's memory, the second a new part of it.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok((to, ()))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let Launch { kernel, grid, block, shared, args, .. } = launch;
        check(launch)?;
        for arg in *args {
            match arg {
                Arg::Pointer(0) | Arg::Int(_) | Arg::Long(_) | Arg::Float(_) => {}
                Arg::Pointer(address) | Arg::Map(TensorMap { address, .. }) => self.check_own(*address, 0)?,
            }
        }
        let library = self.library(kernel.source)?;
        let missing = |error| failed(format!("{kernel:?}: {error}"));
        // SAFETY: these are the declarations of what `compiled` has written.
        let (run, signature) = unsafe {
            let run: libloading::Symbol<'_, Launcher> =
                library.get(format!("launch_{}", kernel.name())).map_err(missing)?;
            let signature: libloading::Symbol<'_, Signature> =
                library.get(format!("signature_{}", kernel.name())).map_err(missing)?;
            (run, CStr::from_ptr(signature()))
        };
        let letter = |arg: &Arg| match arg {
            Arg::Pointer(_) => 'p',
            Arg::Int(_) => 'i',
            Arg::Long(_) => 'l',
            Arg::Float(_) => 'f',
            Arg::Map(_) => 't',
        };
        let given: String = args.iter().map(letter).collect();
        if signature.to_bytes() != given.as_bytes() {
            return Err(failed(format!("{kernel:?} takes {}, not {given}", signature.to_string_lossy())));
        }
        let mut values = args.iter().map(|arg| arg.value(encode)).collect::<Result<Vec<_>>>()?;
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| value.0.as_mut_ptr().cast()).collect();
        // SAFETY: the arguments are of the types that the kernel takes, which was checked; pointers are the caller's.
        unsafe { run(grid.as_ptr(), *block, *shared, pointers.as_mut_ptr()) };
        Ok(())
    }

    fn matmul(&self, _matmul: &Matmul) -> Result<bool> {
        Ok(false)
    }
}

/// As `Map` in `kernels/emulation_hopper.h` has it. Refuses what a driver would.
fn encode(map: &TensorMap, to: &mut Value) -> Result<()> {
    let TensorMap { address, sizes, strides, region } = *map;
    let aligned = [address, strides[0], strides[1]].iter().all(|bytes| bytes.is_multiple_of(16));
    let sized = sizes.iter().all(|size| (1..=1 << 32).contains(size)) && strides.iter().all(|bytes| *bytes < 1 << 40);
    if !aligned || !sized || region[0] != 64 || region[1..].iter().any(|values| !(1..=256).contains(values)) {
        return Err(failed(format!("there is no such tensor map: {map:?}")));
    }
    let fields = [[u64::from_ne_bytes(*b"TensorMp"), address].as_slice(), &sizes, &strides].concat();
    let bytes = fields.iter().flat_map(|field| field.to_ne_bytes());
    let bytes = bytes.chain(region.iter().flat_map(|values| values.to_ne_bytes()));
    to.0.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
    Ok(())
}

/// By the clock, since everything is done when it is asked for.
impl Timed for Emulation {
    type Tick = Instant;

    fn tick(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn timed_fetch(&self, to: Address, from: &Vec<u8>, after: &()) -> Result<((), [Instant; 2])> {
        let start = Instant::now();
        self.fetch(to, from, after)?;
        Ok(((), [start, Instant::now()]))
    }

    fn between(&self, start: &Instant, end: &Instant) -> Result<Duration> {
        Ok(end.duration_since(*start))
    }
}

/// Refuses what a driver would, and what says nothing of its work.
fn check(launch: &Launch<'_>) -> Result<()> {
    let Launch { kernel, grid, block, work, .. } = *launch;
    let fits = grid[0] > 0 && grid[0] < 1 << 31 && grid[1..].iter().all(|blocks| (1..1 << 16).contains(blocks));
    if !fits || !block.is_multiple_of(32) || !(32..=1024).contains(&block) {
        return Err(failed(format!("{kernel:?}: a grid of {grid:?} blocks of {block} threads")));
    }
    if work.bytes == 0 || work.flops > 0 && work.sizes.is_none() {
        return Err(failed(format!("{kernel:?} does not say what it reads and writes: {work:?}")));
    }
    Ok(())
}
