//! Matrix products and convolutions.

use super::pointwise::swiglu;
use super::weights::{ConvWeight, Matrix, TAPS};
use crate::engine::cuda::device::{Arg, Device, Dtype, Matmul, Work};
use crate::engine::cuda::gpu::{Gpu, dims, expect, int, moving, shape_error};
use crate::engine::cuda::kernels::{self, Typed};
use crate::engine::cuda::tensor::Tensor;
use crate::engine::{ConvCache, EngineError, Result};

/// As in `kernels/product.cu`.
const TILE: usize = 128;
const fn threads(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 256,
        Dtype::Bf16 => 128,
    }
}

/// Of both halves of a gated layer: of all tokens they would be the largest values of a network.
const GATED_BYTES: usize = 256 << 20;

/// In the matrix's type, to which x is converted; a bias is used in f32.
pub fn linear<D: Device>(
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    weight: &Matrix<D>,
    bias: Option<&Tensor<D>>,
) -> Result<Tensor<D>> {
    const OP: &str = "linear";
    let (rows, [m, k, n]) = sizes(OP, x, weight)?;
    if let Some(bias) = bias {
        expect(OP, "bias", bias, &[n])?;
    }
    let bias = bias.map(|bias| gpu.cast(bias, Dtype::F32)).transpose()?;
    let x = gpu.cast(x, weight.0.dtype())?;
    let out = gpu.empty(OP, &[rows, &[n]].concat(), x.dtype())?;
    product(OP, gpu, &x.reshaped(&[m, k]), weight, bias.as_ref(), &out)?;
    Ok(out)
}

/// As [`linear`], for some rows at a time. What becomes of the halves is rounded like them: once each, and once the
/// result.
pub fn linear_swiglu<D: Device>(gpu: &Gpu<D>, x: &Tensor<D>, weight: &Matrix<D>) -> Result<Tensor<D>> {
    gated(gpu, x, weight, GATED_BYTES)
}

/// With at most about `most` bytes between the two.
fn gated<D: Device>(gpu: &Gpu<D>, x: &Tensor<D>, weight: &Matrix<D>, most: usize) -> Result<Tensor<D>> {
    const OP: &str = "linear_swiglu";
    let (rows, [m, k, n]) = sizes(OP, x, weight)?;
    if n % 2 != 0 {
        return Err(shape_error(OP, "a weight [2·out, in]", &[n, k]));
    }
    let x = gpu.cast(x, weight.0.dtype())?.reshaped(&[m, k]);
    let out = gpu.empty(OP, &[rows, &[n / 2]].concat(), x.dtype())?;
    let chunk = (most / (n * x.dtype().bytes()).max(1)).clamp(1, m.max(1));
    let both = gpu.empty(OP, &[chunk, n], x.dtype())?;
    for first in (0..m).step_by(chunk) {
        let rows = chunk.min(m - first);
        let both = both.part(0, &[rows, n]);
        product(OP, gpu, &x.part(first * k, &[rows, k]), weight, None, &both)?;
        swiglu(gpu, &both, &out.part(first * (n / 2), &[rows, n / 2]))?;
    }
    Ok(out)
}

/// The dimensions of x but the last, and `[m, k, n]` of the product.
fn sizes<'a, D: Device>(op: &'static str, x: &'a Tensor<D>, weight: &Matrix<D>) -> Result<(&'a [usize], [usize; 3])> {
    let [n, k] = dims(op, "weight [out, in]", &weight.0)?;
    match x.dims().split_last() {
        Some((&width, rows)) if width == k && rows.len() <= 1 => Ok((rows, [rows.iter().product(), k, n])),
        _ => Err(shape_error(op, format!("x [rows, {k}] or [{k}] for this weight"), x.dims())),
    }
}

/// x `[m, k]` of the matrix's type → out `[m, n]`, or as many values.
fn product<D: Device>(
    op: &'static str,
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    weight: &Matrix<D>,
    bias: Option<&Tensor<D>>,
    out: &Tensor<D>,
) -> Result<()> {
    let matmul = matmul(op, x, weight, bias, out)?;
    if out.is_empty() || matmul.inner > 0 && gpu.device.matmul(&matmul)? {
        return Ok(());
    }
    own_product(op, gpu, x, weight, bias, out)
}

/// The product as a vendor's library gets it.
pub fn matmul<D: Device>(
    op: &'static str,
    x: &Tensor<D>,
    weight: &Matrix<D>,
    bias: Option<&Tensor<D>>,
    out: &Tensor<D>,
) -> Result<Matmul> {
    let (_, [rows, inner, columns]) = sizes(op, x, weight)?;
    Ok(Matmul {
        x: x.address(),
        weight: weight.0.address(),
        bias: bias.map(Tensor::address),
        out: out.address(),
        rows,
        columns,
        inner,
        dtype: x.dtype(),
    })
}

/// The product by this program's own kernel, of values that there are.
pub fn own_product<D: Device>(
    op: &'static str,
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    weight: &Matrix<D>,
    bias: Option<&Tensor<D>>,
    out: &Tensor<D>,
) -> Result<()> {
    let matmul @ Matmul { rows, columns, inner, .. } = matmul(op, x, weight, bias, out)?;
    let args = [
        x.pointer(),
        weight.0.pointer(),
        bias.map_or(Arg::Pointer(0), Tensor::pointer),
        out.pointer(),
        int(op, rows)?,
        int(op, columns)?,
        int(op, inner)?,
    ];
    let forms = [kernels::product, kernels::product_scalar];
    tiled(op, gpu, forms, [rows, columns, inner], &[x, &weight.0], &args, matmul.work())
}

/// Starts the form of a kernel that fits its inputs, of one type and in rows, or taps, of `width` values each.
fn tiled<D: Device>(
    op: &'static str,
    gpu: &Gpu<D>,
    [vectors, scalar]: [Typed; 2],
    [rows, columns, width]: [usize; 3],
    inputs: &[&Tensor<D>],
    args: &[Arg],
    work: Work,
) -> Result<()> {
    let tiles = rows.div_ceil(TILE) * columns.div_ceil(TILE);
    let Ok(blocks @ 0..0x8000_0000) = u32::try_from(tiles) else {
        let message = format!("{rows} times {columns} values are more than a kernel computes");
        return Err(EngineError::Backend { op, message });
    };
    let aligned = |x: &&Tensor<D>| x.address().is_multiple_of(16) && (width * x.dtype().bytes()).is_multiple_of(16);
    let form = if inputs.iter().all(aligned) { vectors } else { scalar };
    let dtype = inputs[0].dtype();
    gpu.launch(form.of(dtype), [blocks, 1, 1], threads(dtype), 0, args, work)
}

/// In the weight's type, to which x and the cache are converted. The next chunk's cache is a copy: it does not keep x
/// alive.
pub fn causal_conv3d<D: Device>(
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    weight: &ConvWeight<D>,
    cache: Option<&ConvCache<Tensor<D>>>,
) -> Result<(Tensor<D>, ConvCache<Tensor<D>>)> {
    const OP: &str = "causal_conv3d";
    let [frames, height, width, channels] = dims(OP, "[T, H, W, C]", x)?;
    if channels != weight.input || x.is_empty() {
        return Err(shape_error(OP, format!("[T, H, W, {}], none empty", weight.input), x.dims()));
    }
    let of_cache = [2, height, width, channels];
    if let Some(ConvCache(cache)) = cache {
        expect(OP, "cache", cache, &of_cache)?;
    }
    let dtype = weight.taps.dtype();
    let x = gpu.cast(x, dtype)?;
    let cache = cache.map(|cache| gpu.cast(&cache.0, dtype)).transpose()?;
    // Without a past the first frame stands in for both of its frames.
    let frame = height * width * channels;
    let (past, past_step) = cache.as_ref().map_or((&x, 0), |cache| (cache, frame));

    let (pixels, columns) = (frames * height * width, weight.bias.len());
    let out = gpu.empty(OP, &[frames, height, width, columns], dtype)?;
    int(OP, TAPS * channels)?;
    let args = [
        x.pointer(),
        past.pointer(),
        Arg::Long(past_step as i64),
        weight.taps.pointer(),
        weight.bias.pointer(),
        out.pointer(),
        int(OP, pixels)?,
        int(OP, columns)?,
        int(OP, channels)?,
        int(OP, height)?,
        int(OP, width)?,
    ];
    let forms = [kernels::convolution, kernels::convolution_scalar];
    let read = moving(&[&x, &weight.taps, &weight.bias, &out]);
    let cached = cache.as_ref().map_or(0, |cache| moving(&[cache]).bytes);
    let work = Work { bytes: read.bytes + cached, ..read.products(1, [pixels, columns, TAPS * channels]) };
    tiled(OP, gpu, forms, [pixels, columns, channels], &[&x, past, &weight.taps], &args, work)?;

    let next = gpu.empty(OP, &of_cache, dtype)?;
    for i in 0..2 {
        // Of the frames with the two of the past in front, the last but one and the last.
        let seen = frames + i;
        let from = if seen < 2 {
            past.address() + (seen * past_step * dtype.bytes()) as u64
        } else {
            x.part((seen - 2) * frame, &[frame]).address()
        };
        gpu.device.copy(next.part(i * frame, &[frame]).address(), from, frame * dtype.bytes())?;
    }
    Ok((out, ConvCache(next)))
}

#[cfg(test)]
mod tests;
