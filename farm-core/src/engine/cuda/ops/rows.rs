//! Operations on rows.
//!
//! A norm's result has the type of its input. Vectors that go with every row (weights, scales, shifts, gates) are read in f32:
//! they are small, and converted if they are not.

use std::ops::Range;

use super::pointwise::{alike, per_vector};
use crate::engine::cuda::device::{Arg, Device, Dtype, Work};
use crate::engine::cuda::gpu::{BLOCK, Gpu, dims, expect, int, moving, shape_error};
use crate::engine::cuda::kernels::{self, Kernel};
use crate::engine::cuda::tensor::Tensor;
use crate::engine::{AttentionOut, EngineError, Qkv, Result, RopeTable};

/// eps of every norm without a learned weight.
const EPS: f32 = 1e-6;
/// eps of the norms of q and k.
const QK_EPS: f32 = 1e-5;
/// Vectors of a row that a thread holds, as in `rows.cu`.
const HELD: usize = 4;
/// Threads of a block that holds a row, at most: with the registers of a row each, a multiprocessor has no room for more.
const MOST_THREADS: usize = 512;

/// Starts a kernel that has a block for each row of `[rows, width]`; none if there are no values.
fn over_rows<D: Device>(
    op: &'static str,
    gpu: &Gpu<D>,
    kernel: Kernel,
    dtype: Dtype,
    [rows, width]: [usize; 2],
    args: &[Arg],
    work: Work,
) -> Result<()> {
    let threads = width.div_ceil(HELD * per_vector(dtype)).next_multiple_of(32);
    if threads > MOST_THREADS {
        let most = MOST_THREADS * HELD * per_vector(dtype);
        return Err(shape_error(op, format!("rows of at most {most} values in {dtype}"), &[rows, width]));
    }
    if rows * width == 0 {
        return Ok(());
    }
    gpu.launch(kernel, [blocks(op, rows)?, 1, 1], threads as u32, 0, args, work)
}

/// As many as a grid may have.
fn blocks(op: &'static str, count: usize) -> Result<u32> {
    let message = || format!("{count} is more than a grid has blocks");
    let fits = i32::try_from(count).ok().map(i32::unsigned_abs);
    fits.ok_or_else(|| EngineError::Backend { op, message: message() })
}

pub fn rms_norm<D: Device>(gpu: &Gpu<D>, x: &Tensor<D>, weight: &Tensor<D>, eps: f32) -> Result<Tensor<D>> {
    const OP: &str = "rms_norm";
    let [_, d] = dims(OP, "x [rows, channels]", x)?;
    expect(OP, "weight", weight, &[d])?;
    scaled_rms(OP, gpu, x, weight, 0.0, eps)
}

pub fn modulated_rms_norm<D: Device>(gpu: &Gpu<D>, x: &Tensor<D>, scale: &Tensor<D>) -> Result<Tensor<D>> {
    const OP: &str = "modulated_rms_norm";
    let [_, d] = dims(OP, "x [rows, channels]", x)?;
    expect(OP, "scale", scale, &[d])?;
    scaled_rms(OP, gpu, x, scale, 1.0, EPS)
}

/// `rms(x, eps) · (base + weight)`. Reads and writes each value once.
fn scaled_rms<D: Device>(
    op: &'static str,
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    weight: &Tensor<D>,
    base: f32,
    eps: f32,
) -> Result<Tensor<D>> {
    let [rows, width] = dims(op, "x [rows, channels]", x)?;
    let weight = gpu.cast(weight, Dtype::F32)?;
    let out = gpu.empty(op, x.dims(), x.dtype())?;
    let args = [x.pointer(), weight.pointer(), out.pointer(), int(op, width)?, Arg::Float(base), Arg::Float(eps)];
    let work = moving(&[x, &weight, &out]);
    over_rows(op, gpu, kernels::rms_norm.of(x.dtype()), x.dtype(), [rows, width], &args, work)?;
    Ok(out)
}

/// If x and branch differ in type, both count as f32.
pub fn gated_residual<D: Device>(
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    branch: &Tensor<D>,
    gate: &Tensor<D>,
) -> Result<Tensor<D>> {
    const OP: &str = "gated_residual";
    let [rows, width] = dims(OP, "x [rows, channels]", x)?;
    expect(OP, "branch", branch, &[rows, width])?;
    expect(OP, "gate", gate, &[width])?;
    let [x, branch] = alike(gpu, x, branch)?;
    let tanh = gpu.empty(OP, &[width], Dtype::F32)?;
    let args = [gate.pointer(), tanh.pointer(), Arg::Long(width as i64)];
    gpu.over_values(kernels::tanh.of(gate.dtype()), width, &args, moving(&[gate, &tanh]))?;
    let out = gpu.empty(OP, x.dims(), x.dtype())?;
    let args = [x.pointer(), branch.pointer(), tanh.pointer(), out.pointer(), int(OP, width)?, Arg::Float(EPS)];
    let work = moving(&[&x, &branch, &tanh, &out]);
    over_rows(OP, gpu, kernels::gated_residual.of(x.dtype()), x.dtype(), [rows, width], &args, work)?;
    Ok(out)
}

pub fn modulated_layer_norm<D: Device>(
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    shift: &Tensor<D>,
    scale: &Tensor<D>,
) -> Result<Tensor<D>> {
    const OP: &str = "modulated_layer_norm";
    let [rows, width] = dims(OP, "x [rows, channels]", x)?;
    expect(OP, "shift", shift, &[width])?;
    expect(OP, "scale", scale, &[width])?;
    let (shift, scale) = (gpu.cast(shift, Dtype::F32)?, gpu.cast(scale, Dtype::F32)?);
    let out = gpu.empty(OP, x.dims(), x.dtype())?;
    let args = [x.pointer(), shift.pointer(), scale.pointer(), out.pointer(), int(OP, width)?, Arg::Float(EPS)];
    let work = moving(&[x, &shift, &scale, &out]);
    over_rows(OP, gpu, kernels::layer_norm.of(x.dtype()), x.dtype(), [rows, width], &args, work)?;
    Ok(out)
}

/// Tables in f32 whatever the precision.
pub fn rope_table<D: Device>(
    gpu: &Gpu<D>,
    frequencies: &Tensor<D>,
    grid: [usize; 3],
    tokens: Range<usize>,
) -> Result<RopeTable<Tensor<D>>> {
    const OP: &str = "rope_table";
    let [axes, heads, half] = dims(OP, "frequencies [3, heads, head_dim/2]", frequencies)?;
    if axes != 3 {
        return Err(shape_error(OP, "frequencies [3, heads, head_dim/2]", frequencies.dims()));
    }
    let [_, rows, columns] = grid;
    let all = grid.iter().try_fold(1usize, |all, size| all.checked_mul(*size));
    if tokens.start > tokens.end || all.is_none_or(|all| tokens.end > all) {
        return Err(shape_error(OP, format!("tokens {tokens:?} inside the grid"), &grid));
    }
    let frequencies = gpu.cast(frequencies, Dtype::F32)?;
    let shape = [tokens.len(), heads, half];
    let (cos, sin) = (gpu.empty(OP, &shape, Dtype::F32)?, gpu.empty(OP, &shape, Dtype::F32)?);
    if !cos.is_empty() {
        let args = [
            frequencies.pointer(),
            cos.pointer(),
            sin.pointer(),
            Arg::Long(tokens.start as i64),
            int(OP, rows)?,
            int(OP, columns)?,
            int(OP, heads * half)?,
        ];
        let work = moving(&[&frequencies, &cos, &sin]);
        gpu.launch(kernels::rope_table, [blocks(OP, tokens.len())?, 1, 1], BLOCK, 0, &args, work)?;
    }
    Ok(RopeTable { cos, sin })
}

/// Of a head at most 32 vectors: 128 values in f32, 256 in bf16.
pub fn split_qkv<D: Device>(
    gpu: &Gpu<D>,
    packed: &Tensor<D>,
    q_norm: &Tensor<D>,
    k_norm: &Tensor<D>,
    heads: usize,
    rope: Option<&RopeTable<Tensor<D>>>,
) -> Result<Qkv<Tensor<D>>> {
    const OP: &str = "split_qkv";
    let [rows, packed_width] = dims(OP, "packed [rows, 3·heads·head_dim]", packed)?;
    if heads == 0 || packed_width % (3 * heads) != 0 {
        return Err(shape_error(OP, format!("packed [rows, 3·{heads}·head_dim]"), packed.dims()));
    }
    let d = packed_width / 3 / heads;
    expect(OP, "q_norm", q_norm, &[d])?;
    expect(OP, "k_norm", k_norm, &[d])?;
    if let Some(rope) = rope {
        if !d.is_multiple_of(2) {
            return Err(shape_error(OP, "an even head_dim to rotate", packed.dims()));
        }
        expect(OP, "rope table", &rope.cos, &[rows, heads, d / 2])?;
        expect(OP, "rope table", &rope.sin, &[rows, heads, d / 2])?;
    }
    let dtype = packed.dtype();
    let lanes = d.div_ceil(per_vector(dtype)).next_power_of_two();
    if lanes > 32 {
        return Err(shape_error(OP, format!("heads of at most {} values in {dtype}", 32 * per_vector(dtype)), &[d]));
    }
    let (q_norm, k_norm) = (gpu.cast(q_norm, Dtype::F32)?, gpu.cast(k_norm, Dtype::F32)?);
    let tables =
        rope.map(|rope| Ok([gpu.cast(&rope.cos, Dtype::F32)?, gpu.cast(&rope.sin, Dtype::F32)?])).transpose()?;
    let [cos, sin] = tables.as_ref().map_or([Arg::Pointer(0); 2], |tables| tables.each_ref().map(Tensor::pointer));
    let out = || gpu.empty(OP, &[rows, heads, d], dtype);
    let qkv = Qkv { q: out()?, k: out()?, v: out()? };
    if packed.is_empty() {
        return Ok(qkv);
    }
    let args = [
        packed.pointer(),
        q_norm.pointer(),
        k_norm.pointer(),
        cos,
        sin,
        qkv.q.pointer(),
        qkv.k.pointer(),
        qkv.v.pointer(),
        Arg::Long((rows * heads) as i64),
        int(OP, heads)?,
        int(OP, d)?,
        int(OP, lanes)?,
        Arg::Float(QK_EPS),
    ];
    let read: Vec<_> =
        [packed, &q_norm, &k_norm, &qkv.q, &qkv.k, &qkv.v].into_iter().chain(tables.iter().flatten()).collect();
    gpu.over_values(kernels::split_qkv.of(dtype), rows * heads * lanes, &args, moving(&read))?;
    Ok(qkv)
}

/// All of it in f32, which `a` and `b` are read as.
pub fn merge_attention<D: Device>(
    gpu: &Gpu<D>,
    a: &AttentionOut<Tensor<D>>,
    b: &AttentionOut<Tensor<D>>,
) -> Result<AttentionOut<Tensor<D>>> {
    const OP: &str = "merge_attention";
    let [rows, heads] = dims(OP, "lse [rows, heads]", &a.lse)?;
    let [_, width] = dims(OP, "out [rows, heads·head_dim]", &a.out)?;
    if heads == 0 || width % heads != 0 {
        return Err(shape_error(OP, format!("out [{rows}, {heads}·head_dim]"), a.out.dims()));
    }
    expect(OP, "out", &a.out, &[rows, width])?;
    expect(OP, "out", &b.out, &[rows, width])?;
    expect(OP, "lse", &b.lse, &[rows, heads])?;
    let f32 = |x| gpu.cast(x, Dtype::F32);
    let (a_out, b_out, a_lse, b_lse) = (f32(&a.out)?, f32(&b.out)?, f32(&a.lse)?, f32(&b.lse)?);
    let (out, lse) = (gpu.empty(OP, &[rows, width], Dtype::F32)?, gpu.empty(OP, &[rows, heads], Dtype::F32)?);
    // A head without values still has a log-sum-exp.
    let d = width / heads;
    let steps = d.div_ceil(per_vector(Dtype::F32)).max(1);
    let args = [
        a_out.pointer(),
        a_lse.pointer(),
        b_out.pointer(),
        b_lse.pointer(),
        out.pointer(),
        lse.pointer(),
        Arg::Long((rows * heads) as i64),
        int(OP, d)?,
        int(OP, steps)?,
    ];
    let work = moving(&[&a_out, &a_lse, &b_out, &b_lse, &out, &lse]);
    gpu.over_values(kernels::merge_attention, rows * heads * steps, &args, work)?;
    Ok(AttentionOut { out, lse })
}

#[cfg(test)]
mod tests;
