//! Values in and out of candle tensors. Every tensor of this engine is f32 and contiguous (it may start inside a larger
//! storage), so a kernel sees a plain slice.

use std::alloc::{Layout, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use candle_core::{CpuStorage, DType, Device, Storage, StorageRef, Tensor};
use half::bf16;
use memmap2::MmapMut;

use crate::engine::{EngineError, RawDtype, RawTensor, Result, Transfer};

/// The values of a tensor, row-major. Holds a read lock on the storage, which nothing here ever writes.
pub(super) struct Slice<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl Deref for Slice<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            // `slice` has checked it, and a storage never changes its type.
            _ => &[],
        }
    }
}

/// The values of `x`, without a copy. Errors if `x` is not a contiguous f32 CPU tensor.
pub(super) fn slice<'a>(op: &'static str, x: &'a Tensor) -> Result<Slice<'a>> {
    let backend = |message: String| EngineError::Backend { op, message };
    if x.dtype() != DType::F32 {
        return Err(backend(format!("expected an f32 tensor, got {:?}", x.dtype())));
    }
    let (storage, layout) = x.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(backend(format!("expected a contiguous tensor, got strides {:?}", layout.stride())));
    };
    if !matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))) {
        return Err(backend("expected a CPU tensor".into()));
    }
    Ok(Slice { storage, range: start..end })
}

/// Room for a result that is written in full before anybody reads it: what is in it is whatever the memory held. Zeros for
/// large results cost more than what is computed takes.
pub(super) fn room(len: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    advise(values.spare_capacity_mut());
    // Safety: the capacity is there, and any bits are an f32.
    unsafe { values.set_len(len) };
    values
}

/// Zeros.
pub(super) fn zeros<T: Copy + Default>(len: usize) -> Vec<T> {
    let values = vec![T::default(); len];
    advise(&values);
    values
}

/// Values of a weight, which stay for long, zeros at first. Their pages are the system's own: an allocator that is quick in
/// giving out large pieces again rounds them up, a matrix of 4 MiB by half.
pub(super) struct Kept<T> {
    pages: MmapMut,
    len: usize,
    of: PhantomData<T>,
}

/// What zero bytes are a value of, and any bytes at all.
///
/// # Safety
/// As said, and nothing is to be done when it is dropped.
pub(super) unsafe trait Bits {}

// Safety: numbers.
unsafe impl Bits for f32 {}
// Safety: a number.
unsafe impl Bits for bf16 {}

impl<T: Bits> Kept<T> {
    pub fn zeros(len: usize) -> Self {
        let layout = Layout::array::<T>(len).unwrap_or_else(|_| panic!("{len} values do not fit any memory"));
        // At least one byte, since there is no mapping of none. As with any other memory, there is no going on without.
        let pages = MmapMut::map_anon(layout.size().max(1)).unwrap_or_else(|_| handle_alloc_error(layout));
        let kept = Self { pages, len, of: PhantomData };
        advise(&kept[..]);
        kept
    }
}

impl<T: Bits> Deref for Kept<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // Safety: the mapping is as long, begins with a page, and any bytes are values.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().cast(), self.len) }
    }
}

impl<T: Bits> DerefMut for Kept<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // Safety: as above.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().cast(), self.len) }
    }
}

/// Large memory is asked for in huge pages: a fault for each small one takes longer than what is computed.
fn advise<T>(values: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 2 << 20;
        let (start, bytes) = (values.as_ptr() as usize, size_of_val(values));
        let (first, end) = (start.next_multiple_of(HUGE), (start + bytes) / HUGE * HUGE);
        if first < end {
            // Safety: whole pages inside the values. It is advice: what they hold stays, and a refusal changes nothing.
            unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = values;
}

/// A tensor that owns `values`, without a copy.
pub(super) fn from_vec(op: &'static str, values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
    if shape.iter().product::<usize>() != values.len() {
        return Err(shape_error(op, format!("{} values", shape.iter().product::<usize>()), &[values.len()]));
    }
    Tensor::from_vec(values, shape, &Device::Cpu).map_err(|error| candle(op, error))
}

impl Transfer for Tensor {
    fn sizes(&self) -> Vec<usize> {
        self.dims().to_vec()
    }

    fn byte_len(&self) -> usize {
        4 * self.elem_count()
    }
}

/// Row-major f32, little endian.
pub(super) fn to_bytes(x: &Tensor) -> Result<Vec<u8>> {
    let values = slice("to_bytes", x)?;
    let mut bytes = vec![0; 4 * values.len()];
    bytes.as_chunks_mut().0.iter_mut().zip(&values[..]).for_each(|(bytes, value)| *bytes = value.to_le_bytes());
    Ok(bytes)
}

/// The inverse of [`to_bytes`].
pub(super) fn tensor_of_bytes(bytes: &[u8], shape: &[usize]) -> Result<Tensor> {
    let (values, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(shape_error("tensor_of_bytes", format!("4 bytes for each of {shape:?}"), &[bytes.len()]));
    }
    from_vec("tensor_of_bytes", values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(), shape)
}

/// An error of candle itself, with the operation named.
pub(super) fn candle(op: &'static str, error: candle_core::Error) -> EngineError {
    EngineError::Backend { op, message: error.to_string() }
}

pub(super) fn shape_error(op: &'static str, expected: impl Into<String>, got: &[usize]) -> EngineError {
    EngineError::Shape { op, expected: expected.into(), got: format!("{got:?}") }
}

/// The sizes of an `N`-dimensional tensor; `expected` names them, for example `[rows, channels]`.
pub(super) fn dims<const N: usize>(op: &'static str, expected: &str, x: &Tensor) -> Result<[usize; N]> {
    x.dims().try_into().map_err(|_| shape_error(op, expected, x.dims()))
}

/// `x` has exactly this shape.
pub(super) fn expect(op: &'static str, what: &str, x: &Tensor, shape: &[usize]) -> Result<()> {
    if x.dims() != shape {
        return Err(shape_error(op, format!("{what} {shape:?}"), x.dims()));
    }
    Ok(())
}

/// Widens stored values to f32, appending them to `out`. Exact.
pub(super) fn widen(op: &'static str, raw: &RawTensor<'_>, out: &mut Vec<f32>) -> Result<()> {
    let (count, size) = (raw.shape.iter().product::<usize>(), if raw.dtype == RawDtype::F32 { 4 } else { 2 });
    if count.checked_mul(size) != Some(raw.bytes.len()) {
        return Err(shape_error(op, format!("{raw:?} in {} bytes", count.saturating_mul(size)), &[raw.bytes.len()]));
    }
    match raw.dtype {
        RawDtype::F32 => out.extend(raw.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))),
        RawDtype::F16 => {
            out.extend(raw.bytes.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()));
        }
        RawDtype::Bf16 => {
            out.extend(raw.bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()));
        }
    }
    Ok(())
}

/// Widens pieces and concatenates them along dimension 0: the values and the shape of the whole.
pub(super) fn widen_pieces(op: &'static str, pieces: &[RawTensor<'_>]) -> Result<(Vec<f32>, Vec<usize>)> {
    let Some(first) = pieces.first() else {
        return Err(shape_error(op, "at least one piece", &[0]));
    };
    let mut values = Vec::with_capacity(pieces.iter().map(|p| p.shape.iter().product::<usize>()).sum());
    let mut shape = first.shape.to_vec();
    for (i, piece) in pieces.iter().enumerate() {
        if i > 0 {
            if shape.is_empty() || piece.shape.len() != shape.len() || piece.shape[1..] != shape[1..] {
                return Err(shape_error(op, format!("a piece that follows {shape:?} along dimension 0"), piece.shape));
            }
            shape[0] += piece.shape[0];
        }
        widen(op, piece, &mut values)?;
    }
    Ok((values, shape))
}
