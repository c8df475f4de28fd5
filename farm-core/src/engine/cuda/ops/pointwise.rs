//! Operations on values one by one, and the moving of values.
//!
//! Where two tensors are of different types, both count as f32, and so does the result.

use crate::engine::cuda::device::{Arg, Device, Dtype, Work};
use crate::engine::cuda::gpu::{Gpu, dims, expect, int, moving, shape_error};
use crate::engine::cuda::kernels::{self, Typed};
use crate::engine::cuda::tensor::Tensor;
use crate::engine::{Draw, Result};

/// Values of a vector, which a thread moves at once.
pub(super) fn per_vector(dtype: Dtype) -> usize {
    16 / dtype.bytes()
}

/// Both in the wider of their types.
pub(super) fn alike<D: Device>(gpu: &Gpu<D>, a: &Tensor<D>, b: &Tensor<D>) -> Result<[Tensor<D>; 2]> {
    let dtype = wider([a, b].into_iter()).unwrap_or(a.dtype());
    Ok([gpu.cast(a, dtype)?, gpu.cast(b, dtype)?])
}

/// The type that holds the values of all; none of nothing.
fn wider<'a, D: Device>(tensors: impl Iterator<Item = &'a Tensor<D>>) -> Option<Dtype> {
    tensors.map(Tensor::dtype).reduce(|a, b| if a == b { a } else { Dtype::F32 })
}

// ---- values ----

pub fn add<D: Device>(gpu: &Gpu<D>, a: &Tensor<D>, b: &Tensor<D>) -> Result<Tensor<D>> {
    pairs("add", gpu, kernels::add, a, b)
}

pub fn gelu_gated<D: Device>(gpu: &Gpu<D>, a: &Tensor<D>, b: &Tensor<D>) -> Result<Tensor<D>> {
    pairs("gelu_gated", gpu, kernels::gelu_gated, a, b)
}

fn pairs<D: Device>(op: &'static str, gpu: &Gpu<D>, kernel: Typed, a: &Tensor<D>, b: &Tensor<D>) -> Result<Tensor<D>> {
    expect(op, "second operand", b, a.dims())?;
    let [a, b] = alike(gpu, a, b)?;
    let out = gpu.empty(op, a.dims(), a.dtype())?;
    let args = [a.pointer(), b.pointer(), out.pointer(), Arg::Long(a.len() as i64)];
    let work = moving(&[&a, &b, &out]);
    gpu.over_values(kernel.of(a.dtype()), a.len().div_ceil(per_vector(a.dtype())), &args, work)?;
    Ok(out)
}

pub fn silu<D: Device>(gpu: &Gpu<D>, x: &Tensor<D>) -> Result<Tensor<D>> {
    let out = gpu.empty("silu", x.dims(), x.dtype())?;
    let args = [x.pointer(), out.pointer(), Arg::Long(x.len() as i64)];
    let work = moving(&[x, &out]);
    gpu.over_values(kernels::silu.of(x.dtype()), x.len().div_ceil(per_vector(x.dtype())), &args, work)?;
    Ok(out)
}

/// `silu(a) ⊙ g` of `[a ‖ g]`: x `[M, 2F]` → out `[M, F]` of its type, the second half of `linear_swiglu`.
pub fn swiglu<D: Device>(gpu: &Gpu<D>, x: &Tensor<D>, out: &Tensor<D>) -> Result<()> {
    const OP: &str = "linear_swiglu";
    let [rows, both] = dims(OP, "gates and values [rows, 2·width]", x)?;
    if both % 2 != 0 {
        return Err(shape_error(OP, "gates and values [rows, 2·width]", x.dims()));
    }
    let width = both / 2;
    expect(OP, "gated values", out, &[rows, width])?;
    let steps = width.div_ceil(per_vector(x.dtype()));
    let args = [x.pointer(), out.pointer(), Arg::Long(rows as i64), int(OP, width)?, int(OP, steps)?];
    gpu.over_values(kernels::swiglu.of(x.dtype()), rows * steps, &args, moving(&[x, out]))
}

/// In f32 whatever the inputs are: those of bf16 are widened.
pub fn euler_step<D: Device>(
    gpu: &Gpu<D>,
    z: &Tensor<D>,
    cond: &Tensor<D>,
    uncond: Option<&Tensor<D>>,
    guidance: f32,
    dsigma: f32,
) -> Result<Tensor<D>> {
    const OP: &str = "euler_step";
    uncond.map(|uncond| expect(OP, "second operand", uncond, cond.dims())).transpose()?;
    expect(OP, "second operand", cond, z.dims())?;
    let (z, cond) = (gpu.cast(z, Dtype::F32)?, gpu.cast(cond, Dtype::F32)?);
    let uncond = uncond.map(|uncond| gpu.cast(uncond, Dtype::F32)).transpose()?;
    let out = gpu.empty(OP, z.dims(), Dtype::F32)?;
    let none = Arg::Pointer(0);
    let args = [
        z.pointer(),
        cond.pointer(),
        uncond.as_ref().map_or(none, Tensor::pointer),
        out.pointer(),
        Arg::Float(guidance),
        Arg::Float(dsigma),
        Arg::Long(z.len() as i64),
    ];
    let read: Vec<_> = [&z, &cond, &out].into_iter().chain(&uncond).collect();
    gpu.over_values(kernels::euler_step, z.len().div_ceil(per_vector(Dtype::F32)), &args, moving(&read))?;
    Ok(out)
}

/// In f32.
pub fn draw<D: Device>(gpu: &Gpu<D>, draw: Draw, shape: &[usize]) -> Result<Tensor<D>> {
    let out = gpu.empty("draw", shape, Dtype::F32)?;
    let Draw { key, first, mean, spread } = draw;
    let [count, key, first] = [out.len() as u64, key, first].map(|number| Arg::Long(number.cast_signed()));
    let args = [out.pointer(), count, key, first, Arg::Float(mean), Arg::Float(spread)];
    gpu.over_values(kernels::draw, out.len(), &args, moving(&[&out]))?;
    Ok(out)
}

// ---- moving ----

pub fn reshape<D: Device>(_gpu: &Gpu<D>, x: &Tensor<D>, shape: &[usize]) -> Result<Tensor<D>> {
    if elements(shape) != Some(x.len()) {
        return Err(shape_error("reshape", format!("as many elements as {shape:?}"), x.dims()));
    }
    Ok(x.reshaped(shape))
}

/// A view along dimension 0, and a copy along others.
pub fn narrow<D: Device>(gpu: &Gpu<D>, x: &Tensor<D>, dim: usize, start: usize, len: usize) -> Result<Tensor<D>> {
    const OP: &str = "narrow";
    if dim >= x.dims().len() || start.checked_add(len).is_none_or(|end| end > x.dims()[dim]) {
        return Err(shape_error(OP, format!("elements {start}..{start}+{len} of dimension {dim}"), x.dims()));
    }
    let mut shape = x.dims().to_vec();
    let size = std::mem::replace(&mut shape[dim], len);
    let inner: usize = shape[dim + 1..].iter().product();
    let runs: usize = shape[..dim].iter().product();
    // What comes before is of size 1, or there is nothing to leave out.
    if runs == 1 || len == size {
        return Ok(x.part(start * inner, &shape));
    }
    let out = gpu.empty(OP, &shape, x.dtype())?;
    copy_runs(gpu, [(x, start * inner, size * inner), (&out, 0, len * inner)], runs, len * inner)?;
    Ok(out)
}

pub fn concat<D: Device>(gpu: &Gpu<D>, parts: &[&Tensor<D>], dim: usize) -> Result<Tensor<D>> {
    const OP: &str = "concat";
    let Some((first, rest)) = parts.split_first() else {
        return Err(shape_error(OP, "at least one part", &[0]));
    };
    let mut shape = first.dims().to_vec();
    if dim >= shape.len() {
        return Err(shape_error(OP, format!("parts with a dimension {dim}"), first.dims()));
    }
    for part in rest {
        let (dims, expected) = (part.dims(), first.dims());
        let fits = dims.len() == expected.len()
            && dims.iter().zip(expected).enumerate().all(|(i, (got, want))| i == dim || got == want);
        if !fits {
            return Err(shape_error(OP, format!("{expected:?} but for dimension {dim}"), dims));
        }
        shape[dim] += dims[dim];
    }
    // A part without values has no say in the type.
    let parts: Vec<_> = parts.iter().filter(|part| !part.is_empty()).collect();
    let dtype = wider(parts.iter().map(|part| **part)).unwrap_or(first.dtype());
    if let [part] = parts[..] {
        return Ok(part.reshaped(&shape));
    }
    let out = gpu.empty(OP, &shape, dtype)?;
    let runs: usize = shape[..dim].iter().product();
    let stride: usize = shape[dim..].iter().product();
    let mut at = 0;
    for part in parts {
        let part = gpu.cast(part, dtype)?;
        let run: usize = part.dims()[dim..].iter().product();
        copy_runs(gpu, [(&part, 0, run), (&out, at, stride)], runs, run)?;
        at += run;
    }
    Ok(out)
}

/// Copies `runs` runs of `length` values from one tensor to another of the same type. Of both: the first value, and how far
/// apart runs begin.
fn copy_runs<D: Device>(
    gpu: &Gpu<D>,
    [(from, from_start, from_stride), (to, to_start, to_stride)]: [(&Tensor<D>, usize, usize); 2],
    runs: usize,
    length: usize,
) -> Result<()> {
    let size = from.dtype().bytes();
    let (source, target) = (from.address() + (from_start * size) as u64, to.address() + (to_start * size) as u64);
    if runs * length == 0 {
        return Ok(());
    }
    if runs == 1 {
        return gpu.device.copy(target, source, length * size);
    }
    let steps = length.div_ceil(per_vector(from.dtype()));
    let args = [
        Arg::Pointer(source),
        Arg::Long(from_stride as i64),
        Arg::Pointer(target),
        Arg::Long(to_stride as i64),
        Arg::Long(runs as i64),
        Arg::Long(length as i64),
        Arg::Long(steps as i64),
    ];
    let work = Work::moving(2 * runs * length * size);
    gpu.over_values(kernels::copy_runs.of(from.dtype()), runs * steps, &args, work)
}

/// In the tensor's own type.
pub fn to_bytes<D: Device>(gpu: &Gpu<D>, x: &Tensor<D>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; x.len() * x.dtype().bytes()];
    if !bytes.is_empty() {
        gpu.device.copy_out(x.address(), &mut bytes)?;
    }
    Ok(bytes)
}

/// The type follows from how many bytes there are of a value; without any values it is the engine's.
pub fn tensor_of_bytes<D: Device>(gpu: &Gpu<D>, bytes: &[u8], shape: &[usize]) -> Result<Tensor<D>> {
    const OP: &str = "tensor_of_bytes";
    let is = |dtype: &Dtype| elements(shape).and_then(|count| count.checked_mul(dtype.bytes())) == Some(bytes.len());
    let Some(dtype) = [gpu.dtype(), Dtype::F32, Dtype::Bf16].into_iter().find(is) else {
        return Err(shape_error(OP, format!("2 or 4 bytes for each of {shape:?}"), &[bytes.len()]));
    };
    let out = gpu.empty(OP, shape, dtype)?;
    if !bytes.is_empty() {
        gpu.device.copy_in(out.address(), bytes)?;
    }
    Ok(out)
}

/// None if it cannot be counted: a shape may come from a peer.
fn elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |count, size| count.checked_mul(*size))
}

// ---- patches ----

/// In f32, as latents are.
pub fn patchify<D: Device>(gpu: &Gpu<D>, latent: &Tensor<D>) -> Result<Tensor<D>> {
    const OP: &str = "patchify";
    let [c, t, h, w] = dims(OP, "latent [C, T, h, w]", latent)?;
    if h % 2 != 0 || w % 2 != 0 {
        return Err(shape_error(OP, "an even height and width", latent.dims()));
    }
    let latent = gpu.cast(latent, Dtype::F32)?;
    let (rows, columns) = (h / 2, w / 2);
    let out = gpu.empty(OP, &[t * rows * columns, c * 4], Dtype::F32)?;
    let args = [latent.pointer(), out.pointer(), channels(OP, c)?, int(OP, t)?, int(OP, rows)?, int(OP, columns)?];
    gpu.over_values(kernels::patchify, out.len(), &args, moving(&[&latent, &out]))?;
    Ok(out)
}

/// To f32, as latents are.
pub fn unpatchify<D: Device>(gpu: &Gpu<D>, patches: &Tensor<D>, grid: [usize; 3]) -> Result<Tensor<D>> {
    const OP: &str = "unpatchify";
    let [tokens, width] = dims(OP, "patches [tokens, 4·C]", patches)?;
    let [t, rows, columns] = grid;
    if elements(&grid) != Some(tokens) || width % 4 != 0 {
        return Err(shape_error(OP, format!("patches [{t}·{rows}·{columns}, 4·C]"), patches.dims()));
    }
    let c = width / 4;
    let out = gpu.empty(OP, &[c, t, 2 * rows, 2 * columns], Dtype::F32)?;
    let args = [patches.pointer(), out.pointer(), channels(OP, c)?, int(OP, t)?, int(OP, rows)?, int(OP, columns)?];
    gpu.over_values(kernels::unpatchify.of(patches.dtype()), out.len(), &args, moving(&[patches, &out]))?;
    Ok(out)
}

/// A patch has four values of each, and a kernel counts those.
fn channels(op: &'static str, count: usize) -> Result<Arg> {
    int(op, 4 * count)?;
    int(op, count)
}

#[cfg(test)]
mod tests;
