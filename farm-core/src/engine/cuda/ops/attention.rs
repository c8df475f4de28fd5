//! Attention.

use crate::engine::cuda::device::{Arg, Device, Dtype, Work};
use crate::engine::cuda::gpu::{Gpu, dims, expect, int, moving, shape_error};
use crate::engine::cuda::kernels::{self, Kernel};
use crate::engine::cuda::tensor::Tensor;
use crate::engine::{AttentionOut, Result};

mod hopper;
#[cfg(test)]
mod tests;

/// Segments of keys that a kernel takes.
const SEGMENTS: usize = 4;

// Of `attention` in the kernels' source: a block's queries, channels and threads.
const PLAIN: [usize; 3] = [64, 128, 256];
// Of `attention_mma`: a block's queries and threads; keys of a tile, and tiles of them in shared memory.
const MMA: [usize; 2] = [128, 128];
const MMA_KEYS: usize = 64;
const MMA_RING: usize = 3;

/// bf16 with 32, 64 or 128 channels a head goes to the tensor cores, which round the softmax's weights to bf16 before they
/// meet the values; all else is computed in f32. If types differ, everything is read as f32. On Hopper 128 channels a head have
/// a kernel of their own, with the same roundings.
///
/// `out` is rounded once to q's type, or, if it is a `part` that is to be merged, left in f32.
pub fn attention<D: Device>(
    gpu: &Gpu<D>,
    q: &Tensor<D>,
    keys: &[&Tensor<D>],
    values: &[&Tensor<D>],
    part: bool,
) -> Result<AttentionOut<Tensor<D>>> {
    const OP: &str = "attention";
    let [queries, heads, d] = dims(OP, "q [rows, heads, head_dim]", q)?;
    if keys.len() != values.len() {
        return Err(shape_error(OP, format!("{} value segments", keys.len()), &[values.len()]));
    }
    let mut dtype = q.dtype();
    for (key, value) in keys.iter().zip(values) {
        let [rows, _, _] = dims(OP, "keys [rows, heads, head_dim]", key)?;
        expect(OP, "keys", key, &[rows, heads, d])?;
        expect(OP, "values", value, &[rows, heads, d])?;
        if [key, value].iter().any(|x| x.dtype() != dtype) {
            dtype = Dtype::F32;
        }
    }
    // Only the tensor cores' kernels give another type than they take.
    if part && on_tensor_cores(Dtype::F32, dtype, d).is_none() {
        dtype = Dtype::F32;
    }
    let to = if part { Dtype::F32 } else { dtype };
    let of_type = |parts: &[&Tensor<D>]| {
        let parts = parts.iter().filter(|x| x.dims()[0] > 0).map(|x| gpu.cast(x, dtype));
        few(gpu, OP, parts.collect::<Result<Vec<_>>>()?)
    };
    let softmax = Softmax {
        op: OP,
        q: &gpu.cast(q, dtype)?,
        keys: &of_type(keys)?,
        values: &of_type(values)?,
        bias: None,
        sizes: [queries, heads, d],
        scale: (1.0 / (d as f64).sqrt()) as f32,
        to,
    };
    let AttentionOut { out, lse } = softmax.run(gpu)?;
    Ok(AttentionOut { out: if part { out } else { gpu.cast(&out, q.dtype())? }, lse })
}

/// The kernel for `from` with `d` channels a head that gives `to`, if the tensor cores have one.
fn on_tensor_cores(to: Dtype, from: Dtype, d: usize) -> Option<Kernel> {
    let kernel = match (from, d) {
        (Dtype::Bf16, 32) => kernels::attention_mma_32,
        (Dtype::Bf16, 64) => kernels::attention_mma_64,
        (Dtype::Bf16, 128) => kernels::attention_mma_128,
        _ => return None,
    };
    Some(kernel.of(to))
}

/// Everything is read as f32 and computed in it, as `out` is.
pub fn t5_attention<D: Device>(
    gpu: &Gpu<D>,
    q: &Tensor<D>,
    k: &Tensor<D>,
    v: &Tensor<D>,
    bias: &Tensor<D>,
    heads: usize,
) -> Result<Tensor<D>> {
    const OP: &str = "t5_attention";
    let [rows, width] = dims(OP, "q [rows, heads·d]", q)?;
    if heads == 0 || width % heads != 0 {
        return Err(shape_error(OP, format!("q [rows, {heads}·d]"), q.dims()));
    }
    expect(OP, "k", k, &[rows, width])?;
    expect(OP, "v", v, &[rows, width])?;
    expect(OP, "bias", bias, &[heads, rows, rows])?;
    let softmax = Softmax {
        op: OP,
        q: &gpu.cast(q, Dtype::F32)?,
        keys: &[gpu.cast(k, Dtype::F32)?],
        values: &[gpu.cast(v, Dtype::F32)?],
        bias: Some(&gpu.cast(bias, Dtype::F32)?),
        sizes: [rows, heads, width / heads],
        scale: 1.0,
        to: Dtype::F32,
    };
    Ok(softmax.run(gpu)?.out)
}

/// softmax(scale·q·kᵀ + bias)·v with everything in one type, but for a bias in f32.
struct Softmax<'a, D: Device> {
    op: &'static str,
    q: &'a Tensor<D>,
    /// At most [`SEGMENTS`], none of them without rows.
    keys: &'a [Tensor<D>],
    values: &'a [Tensor<D>],
    /// `[heads, queries, keys]` of the one segment.
    bias: Option<&'a Tensor<D>>,
    /// Queries, heads and channels of a head.
    sizes: [usize; 3],
    scale: f32,
    /// The output's type: that of everything else, or what a kernel of the tensor cores gives.
    to: Dtype,
}

impl<D: Device> Softmax<'_, D> {
    fn run(self, gpu: &Gpu<D>) -> Result<AttentionOut<Tensor<D>>> {
        let [queries, heads, d] = self.sizes;
        let dtype = self.q.dtype();
        let out = gpu.empty(self.op, &[queries, heads * d], self.to)?;
        if out.is_empty() {
            // There may be log-sum-exps all the same.
            let lse = gpu.upload(self.op, &vec![f32::NEG_INFINITY; queries * heads], &[queries, heads])?;
            return Ok(AttentionOut { out, lse });
        }
        let lse = gpu.empty(self.op, &[queries, heads], Dtype::F32)?;
        let (results, work) = (self.results(&out, &lse)?, self.work(&out, &lse));
        match on_tensor_cores(self.to, dtype, d) {
            Some(_) if d == hopper::CHANNELS && hopper::usable(gpu)? => self.on_hopper(gpu, results, work)?,
            Some(kernel) => self.run_on_tensor_cores(gpu, kernel, results, work)?,
            None => {
                let [block, channels, threads] = PLAIN;
                let grid = [queries.div_ceil(block) as u32, heads as u32, d.div_ceil(channels) as u32];
                let bias = self.bias.map_or(Arg::Pointer(0), Tensor::pointer);
                let mut args = self.operands(self.q, self.keys, self.values)?;
                args.push(bias);
                args.extend(results);
                args.extend([int(self.op, d)?, Arg::Float(self.scale)]);
                gpu.launch(kernels::attention.of(dtype), grid, threads as u32, 0, &args, self.work(&out, &lse))?;
            }
        }
        Ok(AttentionOut { out, lse })
    }

    fn run_on_tensor_cores(&self, gpu: &Gpu<D>, kernel: Kernel, results: [Arg; 4], work: Work) -> Result<()> {
        let [queries, heads, d] = self.sizes;
        let [block, threads] = MMA;
        let (q, keys, values) = (
            aligned(gpu, self.op, self.q)?,
            all_aligned(gpu, self.op, self.keys)?,
            all_aligned(gpu, self.op, self.values)?,
        );
        let mut args = self.operands(&q, &keys, &values)?;
        args.extend(results);
        args.push(Arg::Float(self.scale));
        let shared = (block + MMA_RING * MMA_KEYS) * d * Dtype::Bf16.bytes();
        gpu.launch(
            kernel,
            [queries.div_ceil(block) as u32, heads as u32, 1],
            threads as u32,
            shared as u32,
            &args,
            work,
        )
    }

    /// Each query with each key, and what becomes of it with each value.
    fn work(&self, out: &Tensor<D>, lse: &Tensor<D>) -> Work {
        let [queries, heads, d] = self.sizes;
        let keys = self.keys.iter().map(|keys| keys.dims()[0]).sum();
        let parts = [self.q, out, lse].into_iter().chain(self.keys).chain(self.values).chain(self.bias);
        moving(&parts.collect::<Vec<_>>()).products(2, [queries, keys, heads * d])
    }

    /// The arguments that every kernel has behind the operands.
    fn results(&self, out: &Tensor<D>, lse: &Tensor<D>) -> Result<[Arg; 4]> {
        let [queries, heads, _] = self.sizes;
        Ok([out.pointer(), lse.pointer(), int(self.op, queries)?, int(self.op, heads)?])
    }

    /// The arguments with which a kernel begins.
    fn operands(&self, q: &Tensor<D>, keys: &[Tensor<D>], values: &[Tensor<D>]) -> Result<Vec<Arg>> {
        let mut args = vec![q.pointer()];
        for i in 0..SEGMENTS {
            match (keys.get(i), values.get(i)) {
                (Some(k), Some(v)) => args.extend([k.pointer(), v.pointer(), int(self.op, k.dims()[0])?]),
                _ => args.extend([Arg::Pointer(0), Arg::Pointer(0), Arg::Int(0)]),
            }
        }
        Ok(args)
    }
}

/// The segments, those that are too many for a kernel joined to one.
fn few<D: Device>(gpu: &Gpu<D>, op: &'static str, mut parts: Vec<Tensor<D>>) -> Result<Vec<Tensor<D>>> {
    if parts.len() > SEGMENTS {
        let last = parts.split_off(SEGMENTS - 1);
        let mut shape = last[0].dims().to_vec();
        shape[0] = last.iter().map(|part| part.dims()[0]).sum();
        let joined = gpu.empty(op, &shape, last[0].dtype())?;
        let mut to = joined.address();
        for part in last.iter().filter(|part| !part.is_empty()) {
            let bytes = part.len() * part.dtype().bytes();
            gpu.device.copy(to, part.address(), bytes)?;
            to += bytes as u64;
        }
        parts.push(joined);
    }
    Ok(parts)
}

/// The tensor, copied if it begins where 16 bytes cannot be read at once.
fn aligned<D: Device>(gpu: &Gpu<D>, op: &'static str, x: &Tensor<D>) -> Result<Tensor<D>> {
    if x.address().is_multiple_of(16) {
        return Ok(x.clone());
    }
    let copy = gpu.empty(op, x.dims(), x.dtype())?;
    gpu.device.copy(copy.address(), x.address(), x.len() * x.dtype().bytes())?;
    Ok(copy)
}

fn all_aligned<D: Device>(gpu: &Gpu<D>, op: &'static str, parts: &[Tensor<D>]) -> Result<Vec<Tensor<D>>> {
    parts.iter().map(|x| aligned(gpu, op, x)).collect()
}
