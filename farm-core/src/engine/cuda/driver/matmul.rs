//! Matrix products by cuBLASLt.
//!
//! The library counts in columns: what is `out = x · weightᵀ` in rows is `outᵀ = weight · xᵀ` in columns, over the same
//! memory, with the weight transposed: read in columns it is `[inner, columns]`.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::CUstream;

use super::context::Stream;
use super::libraries::{self, functions};
use super::plans::{Kind, Library, Plans};
use crate::engine::cuda::device::{Address, Dtype, Matmul};
use crate::engine::{EngineError, Result};

/// Scratch memory that the library may use.
pub(super) const WORKSPACE: usize = 32 << 20;
/// Ways that the library is asked for.
const MOST_WAYS: usize = 16;

/// `cublasStatus_t`, as a number: a newer library may have more of them.
const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 7;
const ARCH_MISMATCH: c_int = 8;
const NOT_SUPPORTED: c_int = 15;
/// `CUBLAS_COMPUTE_32F`: products and sums in f32; of bf16 values, products are exact. Never TF32.
const COMPUTE_F32: c_int = 68;
/// `CUDA_R_32F` and `CUDA_R_16BF`
const F32: c_int = 0;
const BF16: c_int = 14;
/// `CUBLAS_OP_T`
const TRANSPOSED: i32 = 1;
/// `CUBLASLT_MATMUL_DESC_TRANSA`, `_EPILOGUE` and `_BIAS_POINTER`
const DESC_TRANSA: c_int = 3;
const DESC_EPILOGUE: c_int = 7;
const DESC_BIAS_POINTER: c_int = 8;
/// `CUBLASLT_EPILOGUE_BIAS`
const EPILOGUE_BIAS: u32 = 4;
/// `CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES`, `_REDUCTION_SCHEME_MASK` and `_MIN_ALIGNMENT_A_BYTES` to `_D_BYTES`
const PREF_WORKSPACE: c_int = 1;
const PREF_REDUCTIONS: c_int = 3;
const PREF_ALIGNMENT: [c_int; 4] = [5, 6, 7, 8];
/// `CUBLASLT_REDUCTION_SCHEME_NONE`, as a mask: no sums over several blocks.
const NO_REDUCTIONS: u32 = 0;

/// `cublasLtMatmulAlgo_t`
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Heuristic {
    algorithm: Algorithm,
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const NO_HEURISTIC: Heuristic =
    Heuristic { algorithm: Algorithm([0; 8]), workspace: 0, state: NOT_SUPPORTED, waves: 0.0, reserved: [0; 4] };

/// `cublasLtHandle_t`, `cublasLtMatmulDesc_t`, `cublasLtMatrixLayout_t` and `cublasLtMatmulPreference_t`
type Handle = *mut c_void;
type Desc = *mut c_void;
type Layout = *mut c_void;
type Preference = *mut c_void;

functions! {
    Functions {
        cublasLtCreate = b"cublasLtCreate\0": fn(*mut Handle) -> c_int;
        cublasLtDestroy = b"cublasLtDestroy\0": fn(Handle) -> c_int;
        cublasLtGetStatusName = b"cublasLtGetStatusName\0": fn(c_int) -> *const c_char;
        cublasLtMatmulDescCreate = b"cublasLtMatmulDescCreate\0": fn(*mut Desc, c_int, c_int) -> c_int;
        cublasLtMatmulDescDestroy = b"cublasLtMatmulDescDestroy\0": fn(Desc) -> c_int;
        cublasLtMatmulDescSetAttribute = b"cublasLtMatmulDescSetAttribute\0": fn(
            Desc, c_int, *const c_void, usize
        ) -> c_int;
        cublasLtMatrixLayoutCreate = b"cublasLtMatrixLayoutCreate\0": fn(*mut Layout, c_int, u64, u64, i64) -> c_int;
        cublasLtMatrixLayoutDestroy = b"cublasLtMatrixLayoutDestroy\0": fn(Layout) -> c_int;
        cublasLtMatmulPreferenceCreate = b"cublasLtMatmulPreferenceCreate\0": fn(*mut Preference) -> c_int;
        cublasLtMatmulPreferenceDestroy = b"cublasLtMatmulPreferenceDestroy\0": fn(Preference) -> c_int;
        cublasLtMatmulPreferenceSetAttribute = b"cublasLtMatmulPreferenceSetAttribute\0": fn(
            Preference, c_int, *const c_void, usize
        ) -> c_int;
        cublasLtMatmulAlgoGetHeuristic = b"cublasLtMatmulAlgoGetHeuristic\0": fn(
            Handle, Desc, Layout, Layout, Layout, Layout, Preference, c_int, *mut Heuristic, *mut c_int
        ) -> c_int;
        cublasLtMatmulAlgoCheck = b"cublasLtMatmulAlgoCheck\0": fn(
            Handle, Desc, Layout, Layout, Layout, Layout, *const Algorithm, *mut Heuristic
        ) -> c_int;
        cublasLtMatmul = b"cublasLtMatmul\0": fn(
            Handle, Desc, *const c_void, *const c_void, Layout, *const c_void, Layout, *const c_void, *const c_void, Layout,
            *mut c_void, Layout, *const Algorithm, *mut c_void, usize, CUstream
        ) -> c_int;
    }
}

/// The library's functions, if this machine has it.
fn functions() -> Option<&'static Functions> {
    static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
    let find = || {
        let opened = libraries::open(libraries::Kind::CublasLt).ok()?;
        // SAFETY: it bears the name of cuBLASLt and has a function of it; these are the declarations of cublasLt.h.
        unsafe { Functions::find(&opened.library) }.ok()
    };
    FUNCTIONS.get_or_init(find).as_ref()
}

/// The library on a device.
pub(super) struct CublasLt {
    functions: &'static Functions,
    handle: Handle,
    stream: Arc<Stream>,
    plans: Plans<Algorithm>,
}

// SAFETY: the library's calls on a handle may come from several threads.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

impl CublasLt {
    /// None if this machine does not have the library.
    pub(super) fn new(stream: &Arc<Stream>) -> Result<Option<Self>> {
        let Some(functions) = functions() else { return Ok(None) };
        stream.context.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: it writes a handle for the context that is current.
        check(functions, "cublasLtCreate", unsafe { (functions.cublasLtCreate)(&mut handle) })?;
        Ok(Some(Self { functions, handle, stream: stream.clone(), plans: Plans::default() }))
    }

    /// Starts the product; false if the library cannot do it by [`Matmul`]'s rules, and nothing was done. `workspace` has
    /// [`WORKSPACE`] bytes.
    ///
    /// # Safety
    /// The operands and the workspace are memory of this device, as large as the product says.
    pub(super) unsafe fn matmul(&self, matmul: &Matmul, workspace: Address) -> Result<bool> {
        let kind = Kind::of(matmul);
        self.stream.context.enter()?;
        let Some(algorithm) = self.plans.way(self, matmul)? else { return Ok(false) };
        let operation = Operation::new(self.functions, &kind, matmul.rows, matmul.bias)?;
        let Operation { desc, weight, x, out, .. } = operation;
        let (alpha, beta) = (1.0f32, 0.0f32);
        let scale = |value: &f32| std::ptr::from_ref(value).cast::<c_void>();
        let memory = |address: Address| address as *mut c_void;
        // SAFETY: see above; alpha and beta are read before it returns; as beta is 0, what out holds is not read.
        let result = unsafe {
            (self.functions.cublasLtMatmul)(
                self.handle,
                desc,
                scale(&alpha),
                memory(matmul.weight),
                weight,
                memory(matmul.x),
                x,
                scale(&beta),
                memory(matmul.out),
                out,
                memory(matmul.out),
                out,
                &algorithm,
                memory(workspace),
                WORKSPACE,
                self.stream.raw,
            )
        };
        check(self.functions, "cublasLtMatmul", result)?;
        Ok(true)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        if self.stream.context.enter().is_ok() {
            // SAFETY: nobody has the handle any more. There is nobody to tell of an error.
            let _ = unsafe { (self.functions.cublasLtDestroy)(self.handle) };
        }
    }
}

impl Library for CublasLt {
    type Way = Algorithm;

    fn ways(&self, kind: &Kind, rows: usize) -> Result<Vec<Algorithm>> {
        // A bias has to have the type of the result, so the library documents, and this one is f32.
        if kind.bias && kind.dtype != Dtype::F32 || [kind.columns, kind.inner].contains(&0) {
            return Ok(Vec::new());
        }
        // Where the bias is says how it is aligned. It is not read.
        let operation = Operation::new(self.functions, kind, rows, kind.bias.then_some(256))?;
        let Operation { desc, weight, x, out, .. } = operation;
        let wish = Wish::new(self.functions, kind)?;
        let mut found = [NO_HEURISTIC; MOST_WAYS];
        let mut count = 0;
        // SAFETY: all is alive; it writes at most as many results as it is told.
        let result = unsafe {
            (self.functions.cublasLtMatmulAlgoGetHeuristic)(
                self.handle,
                desc,
                weight,
                x,
                out,
                out,
                wish.0,
                MOST_WAYS as c_int,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        if result == NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        check(self.functions, "cublasLtMatmulAlgoGetHeuristic", result)?;
        let found = found.iter().take(usize::try_from(count).unwrap_or(0));
        Ok(found.filter(|found| found.state == SUCCESS).map(|found| found.algorithm).collect())
    }

    fn takes(&self, way: &Algorithm, kind: &Kind, rows: usize) -> Result<bool> {
        if rows == 0 {
            return Ok(false);
        }
        let operation = Operation::new(self.functions, kind, rows, kind.bias.then_some(256))?;
        let Operation { desc, weight, x, out, .. } = operation;
        let mut found = NO_HEURISTIC;
        // SAFETY: all is alive; it writes one result.
        let result = unsafe {
            (self.functions.cublasLtMatmulAlgoCheck)(self.handle, desc, weight, x, out, out, way, &mut found)
        };
        if [INVALID_VALUE, ARCH_MISMATCH, NOT_SUPPORTED].contains(&result) {
            return Ok(false);
        }
        check(self.functions, "cublasLtMatmulAlgoCheck", result)?;
        Ok(found.workspace <= WORKSPACE)
    }
}

fn check(functions: &Functions, call: &str, result: c_int) -> Result<()> {
    if result == SUCCESS {
        return Ok(());
    }
    // SAFETY: it returns a constant text for every number.
    let text = unsafe { CStr::from_ptr((functions.cublasLtGetStatusName)(result)) };
    Err(EngineError::Backend { op: "matmul", message: format!("{call}: {}", text.to_string_lossy()) })
}

/// A product as the library describes it, in columns.
struct Operation {
    functions: &'static Functions,
    desc: Desc,
    /// `[inner, columns]`, to be transposed
    weight: Layout,
    /// `[inner, rows]`
    x: Layout,
    /// `[columns, rows]`
    out: Layout,
}

impl Operation {
    fn new(functions: &'static Functions, kind: &Kind, rows: usize, bias: Option<Address>) -> Result<Self> {
        let none = std::ptr::null_mut();
        let mut operation = Self { functions, desc: none, weight: none, x: none, out: none };
        let Kind { columns, inner, dtype, .. } = *kind;
        let dtype = match dtype {
            Dtype::F32 => F32,
            Dtype::Bf16 => BF16,
        };
        // SAFETY: it writes a description.
        let made = unsafe { (functions.cublasLtMatmulDescCreate)(&mut operation.desc, COMPUTE_F32, F32) };
        check(functions, "cublasLtMatmulDescCreate", made)?;
        operation.set(DESC_TRANSA, &TRANSPOSED)?;
        if let Some(bias) = bias {
            // The library takes it to be of the type of the result, which `ways` has seen to.
            operation.set(DESC_EPILOGUE, &EPILOGUE_BIAS)?;
            operation.set(DESC_BIAS_POINTER, &bias)?;
        }
        for (layout, rows, columns) in [
            (&mut operation.weight, inner, columns),
            (&mut operation.x, inner, rows),
            (&mut operation.out, columns, rows),
        ] {
            // SAFETY: it writes a layout. Columns lie one behind the other.
            let made = unsafe {
                (functions.cublasLtMatrixLayoutCreate)(layout, dtype, rows as u64, columns as u64, rows as i64)
            };
            check(functions, "cublasLtMatrixLayoutCreate", made)?;
        }
        Ok(operation)
    }

    fn set<T>(&self, attribute: c_int, value: &T) -> Result<()> {
        let (value, bytes) = (std::ptr::from_ref(value).cast(), size_of::<T>());
        // SAFETY: the description is alive; it reads as many bytes, and refuses another number than it wants.
        let set = unsafe { (self.functions.cublasLtMatmulDescSetAttribute)(self.desc, attribute, value, bytes) };
        check(self.functions, "cublasLtMatmulDescSetAttribute", set)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: nobody has them any more. There is nobody to tell of an error.
        unsafe {
            for layout in [self.weight, self.x, self.out].into_iter().filter(|layout| !layout.is_null()) {
                let _ = (self.functions.cublasLtMatrixLayoutDestroy)(layout);
            }
            if !self.desc.is_null() {
                let _ = (self.functions.cublasLtMatmulDescDestroy)(self.desc);
            }
        }
    }
}

/// Which ways may be chosen.
struct Wish(Preference, &'static Functions);

impl Wish {
    fn new(functions: &'static Functions, kind: &Kind) -> Result<Self> {
        let mut preference = std::ptr::null_mut();
        // SAFETY: it writes a preference.
        let made = unsafe { (functions.cublasLtMatmulPreferenceCreate)(&mut preference) };
        check(functions, "cublasLtMatmulPreferenceCreate", made)?;
        let wish = Self(preference, functions);
        wish.set(PREF_WORKSPACE, &(WORKSPACE as u64))?;
        wish.set(PREF_REDUCTIONS, &NO_REDUCTIONS)?;
        let (inner, columns) = kind.alignment();
        for (attribute, bytes) in PREF_ALIGNMENT.into_iter().zip([inner, inner, columns, columns]) {
            wish.set(attribute, &(bytes as u32))?;
        }
        Ok(wish)
    }

    fn set<T>(&self, attribute: c_int, value: &T) -> Result<()> {
        let (value, bytes) = (std::ptr::from_ref(value).cast(), size_of::<T>());
        // SAFETY: the preference is alive; it reads as many bytes, and refuses another number than it wants.
        let set = unsafe { (self.1.cublasLtMatmulPreferenceSetAttribute)(self.0, attribute, value, bytes) };
        check(self.1, "cublasLtMatmulPreferenceSetAttribute", set)
    }
}

impl Drop for Wish {
    fn drop(&mut self) {
        // SAFETY: nobody has it any more. There is nobody to tell of an error.
        let _ = unsafe { (self.1.cublasLtMatmulPreferenceDestroy)(self.0) };
    }
}
