//! Weights: from a checkpoint's bytes, or from a tensor, to the form in which the operations take them.

use half::{bf16, f16};

use crate::engine::cuda::device::{Device, Dtype};
use crate::engine::cuda::gpu::{Gpu, dims, shape_error};
use crate::engine::cuda::tensor::Tensor;
use crate::engine::{Over, RawDtype, RawTensor, Result};

/// Values that are converted at a time: of no weight, however large, is there a second copy on the host.
const RUN: usize = 1 << 22;
/// Of a convolution.
pub(super) const TAPS: usize = 27;

/// A weight `[out, in]` of a linear layer, row-major. What is computed with it has its type.
pub struct Matrix<D: Device>(pub(super) Tensor<D>);

impl<D: Device> Matrix<D> {
    /// Of a tensor `[out, in]`.
    pub fn of(tensor: Tensor<D>) -> Self {
        Self(tensor)
    }

    pub fn tensor(&self) -> &Tensor<D> {
        &self.0
    }
}

impl<D: Device> Clone for Matrix<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// A 3×3×3 convolution.
pub struct ConvWeight<D: Device> {
    /// `[out, 27 · in]`, a row in the order (t, h, w, in).
    pub(super) taps: Tensor<D>,
    /// `[out]`, f32.
    pub(super) bias: Tensor<D>,
    /// Input channels.
    pub(super) input: usize,
}

/// In f32, whatever the precision: a weight that is not a matrix is used in f32.
pub fn weight<D: Device>(gpu: &Gpu<D>, pieces: &[RawTensor<'_>]) -> Result<Tensor<D>> {
    const OP: &str = "weight";
    let mut shape = pieces.first().ok_or_else(|| shape_error(OP, "at least one piece", &[0]))?.shape.to_vec();
    for piece in &pieces[1..] {
        if shape.is_empty() || piece.shape.len() != shape.len() || piece.shape[1..] != shape[1..] {
            return Err(shape_error(OP, format!("a piece that follows {shape:?} along dimension 0"), piece.shape));
        }
        shape[0] += piece.shape[0];
    }
    of_pieces(OP, gpu, pieces, &shape, Dtype::F32)
}

pub fn matrix<D: Device>(gpu: &Gpu<D>, weight: &Tensor<D>, over: Over) -> Result<Matrix<D>> {
    let [_, _] = dims("matrix", "weight [out, in]", weight)?;
    Ok(Matrix(gpu.cast(weight, of_matrix(gpu, over))?))
}

/// Values that have the matrix's type already are copied as they are; others are rounded to the nearest on the way.
pub fn stored_matrix<D: Device>(gpu: &Gpu<D>, pieces: &[RawTensor<'_>], over: Over) -> Result<Matrix<D>> {
    const OP: &str = "stored_matrix";
    let width = |piece: &RawTensor<'_>| piece.shape.iter().skip(1).product::<usize>();
    let k = pieces.first().map(width).ok_or_else(|| shape_error(OP, "at least one piece", &[0]))?;
    if let Some(piece) = pieces.iter().find(|piece| width(piece) != k) {
        return Err(shape_error(OP, format!("pieces of {k} columns, each with its bytes"), piece.shape));
    }
    let n = pieces.iter().map(|piece| piece.shape.first().copied().unwrap_or(0)).sum();
    Ok(Matrix(of_pieces(OP, gpu, pieces, &[n, k], of_matrix(gpu, over))?))
}

pub fn conv_weight<D: Device>(gpu: &Gpu<D>, weight: RawTensor<'_>, bias: RawTensor<'_>) -> Result<ConvWeight<D>> {
    const OP: &str = "pack_conv";
    let &[output @ 1..=usize::MAX, input @ 1..=usize::MAX, 3, 3, 3] = weight.shape else {
        return Err(shape_error(OP, "[out, in, 3, 3, 3]", weight.shape));
    };
    if bias.shape != [output] {
        return Err(shape_error(OP, format!("[{output}]"), bias.shape));
    }
    check_bytes(OP, &weight)?;
    let dtype = gpu.dtype();
    let taps = gpu.empty(OP, &[output, TAPS * input], dtype)?;
    let (row, mut converted) = (TAPS * input, Vec::new());
    let rows = (RUN / row).max(1);
    for (i, stored) in weight.bytes.chunks(rows * row * weight.dtype.bytes()).enumerate() {
        let stored = convert(stored, weight.dtype, dtype, &mut converted);
        let ordered = match dtype {
            Dtype::F32 => taps_first::<4>(stored, input),
            Dtype::Bf16 => taps_first::<2>(stored, input),
        };
        gpu.device.copy_in(taps.address() + (i * rows * row * dtype.bytes()) as u64, &ordered)?;
    }
    Ok(ConvWeight { taps, bias: of_pieces(OP, gpu, &[bias], &[output], Dtype::F32)?, input })
}

fn of_matrix<D: Device>(gpu: &Gpu<D>, over: Over) -> Dtype {
    match over {
        Over::Tokens | Over::Few => gpu.dtype(),
        Over::Encoder => Dtype::F32,
    }
}

/// Pieces one behind the other, as many values as `shape` has.
fn of_pieces<D: Device>(
    op: &'static str,
    gpu: &Gpu<D>,
    pieces: &[RawTensor<'_>],
    shape: &[usize],
    dtype: Dtype,
) -> Result<Tensor<D>> {
    pieces.iter().try_for_each(|piece| check_bytes(op, piece))?;
    let out = gpu.empty(op, shape, dtype)?;
    let (mut to, mut converted) = (out.address(), Vec::new());
    for piece in pieces {
        for run in piece.bytes.chunks(RUN * piece.dtype.bytes()) {
            let run = convert(run, piece.dtype, dtype, &mut converted);
            gpu.device.copy_in(to, run)?;
            to += run.len() as u64;
        }
    }
    Ok(out)
}

fn check_bytes(op: &'static str, raw: &RawTensor<'_>) -> Result<()> {
    let bytes = raw.shape.iter().try_fold(raw.dtype.bytes(), |bytes, size| bytes.checked_mul(*size));
    if bytes != Some(raw.bytes.len()) {
        return Err(shape_error(op, format!("{raw:?} in {} bytes", bytes.unwrap_or(usize::MAX)), &[raw.bytes.len()]));
    }
    Ok(())
}

/// Stored values in another type, in `room` unless they have it already. To bf16 they are rounded to the nearest.
fn convert<'a>(stored: &'a [u8], from: RawDtype, to: Dtype, room: &'a mut Vec<u8>) -> &'a [u8] {
    fn each<const FROM: usize, const TO: usize>(
        stored: &[u8],
        room: &mut Vec<u8>,
        convert: impl Fn([u8; FROM]) -> [u8; TO],
    ) {
        room.resize(stored.len() / FROM * TO, 0);
        for (to, from) in room.as_chunks_mut().0.iter_mut().zip(stored.as_chunks().0) {
            *to = convert(*from);
        }
    }
    match (from, to) {
        (RawDtype::F32, Dtype::F32) | (RawDtype::Bf16, Dtype::Bf16) => return stored,
        (RawDtype::F32, Dtype::Bf16) => {
            each(stored, room, |value| bf16::from_f32(f32::from_le_bytes(value)).to_le_bytes());
        }
        (RawDtype::F16, Dtype::F32) => each(stored, room, |value| f16::from_le_bytes(value).to_f32().to_le_bytes()),
        (RawDtype::F16, Dtype::Bf16) => {
            each(stored, room, |value| bf16::from_f32(f16::from_le_bytes(value).to_f32()).to_le_bytes());
        }
        (RawDtype::Bf16, Dtype::F32) => each(stored, room, |value| bf16::from_le_bytes(value).to_f32().to_le_bytes()),
    }
    room
}

/// Rows `[input, 27]` of values of `SIZE` bytes → `[27, input]`.
fn taps_first<const SIZE: usize>(rows: &[u8], input: usize) -> Vec<u8> {
    let mut out = vec![0; rows.len()];
    let (to, from) = (out.as_chunks_mut::<SIZE>().0, rows.as_chunks::<SIZE>().0);
    for (to, from) in to.chunks_exact_mut(TAPS * input).zip(from.chunks_exact(TAPS * input)) {
        for (tap, to) in to.chunks_exact_mut(input).enumerate() {
            for (to, from) in to.iter_mut().zip(from[tap..].iter().step_by(TAPS)) {
                *to = *from;
            }
        }
    }
    out
}
