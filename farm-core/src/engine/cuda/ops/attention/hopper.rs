//! Attention by the kernel of Hopper's own instructions.

use super::{SEGMENTS, Softmax, aligned, all_aligned};
use crate::engine::cuda::device::{Arg, Device, Dtype, TensorMap, Work};
use crate::engine::cuda::gpu::{Gpu, int};
use crate::engine::cuda::kernels::{self, Source};
use crate::engine::cuda::tensor::Tensor;
use crate::engine::{EngineError, Result};

// Of `attention_hopper`: channels of a head; queries of a block, and its threads; keys of a tile, and how many tiles of them
// and of values are in shared memory.
pub const CHANNELS: usize = 128;
const QUERIES: usize = 128;
const THREADS: u32 = 384;
const KEYS: usize = 176;
const STAGES: usize = 2;
/// Nine barriers, and what it takes to begin at a multiple of 1024.
const BESIDE_TILES: usize = 9 * 8 + 1024;
/// Channels of a box.
const COLUMNS: usize = 64;

/// Whether the kernel is to be used. Before the first use on a device it has to compute what the one of older GPUs does, as it
/// depends on more that only hardware shows: how tiles lie in memory, which barrier says what, and the compiler's waiting.
pub fn usable<D: Device>(gpu: &Gpu<D>) -> Result<bool> {
    if !gpu.device.runs(Source::AttentionHopper) {
        return Ok(false);
    }
    if let Some(usable) = gpu.hopper.get() {
        return Ok(*usable);
    }
    let fault = match fault(gpu) {
        Err(error @ EngineError::OutOfMemory { .. }) => return Err(error),
        Err(error) => Some(error.to_string()),
        Ok(fault) => fault,
    };
    Ok(*gpu.hopper.get_or_init(|| {
        if let Some(fault) = &fault {
            let device = gpu.device.name();
            tracing::warn!(device, fault, "attention for Hopper is wrong here: the slower one for older GPUs is used");
        }
        fault.is_none()
    }))
}

/// What is wrong with the kernel, by a problem that takes every part of it: two blocks of queries, the last with two of its
/// own, and four tiles of keys in two segments, neither of whole tiles.
fn fault<D: Device>(gpu: &Gpu<D>) -> Result<Option<String>> {
    const OP: &str = "trial of attention";
    const SIZES: [usize; 3] = [QUERIES + 2, 2, CHANNELS];
    let tensor = |rows: usize, size: f32, seed: u32| {
        let shape = [rows, SIZES[1], SIZES[2]];
        let mut state = seed;
        let mut value = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            size * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| value()).collect();
        gpu.cast(&gpu.upload(OP, &values, &shape)?, Dtype::Bf16)
    };
    let segments = |size, seed| Ok(vec![tensor(2 * KEYS + 40, size, seed)?, tensor(9, size, seed + 1)?]);
    let softmax = Softmax {
        op: OP,
        q: &tensor(SIZES[0], 2.0, 1)?,
        keys: &segments(2.0, 2)?,
        values: &segments(1.0, 4)?,
        bias: None,
        sizes: SIZES,
        scale: 1.0 / (CHANNELS as f32).sqrt(),
        to: Dtype::Bf16,
    };
    let [queries, heads, d] = SIZES;
    let run = |hopper: bool| {
        let out = gpu.empty(OP, &[queries, heads * d], Dtype::Bf16)?;
        let lse = gpu.empty(OP, &[queries, heads], Dtype::F32)?;
        let (results, work) = (softmax.results(&out, &lse)?, softmax.work(&out, &lse));
        match hopper {
            true => softmax.on_hopper(gpu, results, work)?,
            false => softmax.run_on_tensor_cores(gpu, kernels::attention_mma_128.of(Dtype::Bf16), results, work)?,
        }
        Ok([gpu.download(&out)?, gpu.download(&lse)?])
    };
    let ([out, lse], [expected_out, expected_lse]) = (run(true)?, run(false)?);
    // Values to 1, of which either kernel rounds the weights and the output to bf16. Not below it, if it is no number.
    let differs = |what: &str, got: &[f32], expected: &[f32], tolerance: f32| {
        let pairs = got.iter().zip(expected);
        let close = |got: &f32, expected: &f32| (got - expected).abs() <= tolerance;
        let wrong = |(got, expected): &(&f32, &f32)| !close(got, expected);
        pairs.clone().find(wrong).map(|(first, instead)| {
            let (count, all) = (pairs.filter(wrong).count(), got.len());
            format!("{count} of {all} {what} differ, the first is {first} instead of {instead}")
        })
    };
    let out = differs("values", &out, &expected_out, 1.0 / 128.0);
    Ok(out.or_else(|| differs("log-sum-exps", &lse, &expected_lse, 1e-4)))
}

impl<D: Device> Softmax<'_, D> {
    /// bf16 with heads of [`CHANNELS`], no bias.
    pub(super) fn on_hopper(&self, gpu: &Gpu<D>, results: [Arg; 4], work: Work) -> Result<()> {
        let [queries, heads, d] = self.sizes;
        let (q, keys, values) = (
            aligned(gpu, self.op, self.q)?,
            all_aligned(gpu, self.op, self.keys)?,
            all_aligned(gpu, self.op, self.values)?,
        );
        let map = |x: &Tensor<D>, rows: usize| {
            let row = (d * Dtype::Bf16.bytes()) as u64;
            Arg::Map(TensorMap {
                address: x.address(),
                sizes: [d, heads, x.dims()[0]].map(|size| size as u64),
                strides: [row, row * heads as u64],
                region: [COLUMNS as u32, 1, rows as u32],
            })
        };
        let query_map = map(&q, QUERIES);
        let mut args = vec![query_map];
        for i in 0..SEGMENTS {
            match (keys.get(i), values.get(i)) {
                (Some(k), Some(v)) => args.extend([map(k, KEYS), map(v, KEYS), int(self.op, k.dims()[0])?]),
                // Of no keys nothing is read, but a map it has to be.
                _ => args.extend([query_map, query_map, Arg::Int(0)]),
            }
        }
        args.extend(results);
        args.push(Arg::Float(self.scale));
        let tiles = (QUERIES + 2 * STAGES * KEYS) * d * Dtype::Bf16.bytes();
        let grid = [queries.div_ceil(QUERIES) as u32, heads as u32, 1];
        gpu.launch(kernels::attention_hopper_128.of(self.to), grid, THREADS, (tiles + BESIDE_TILES) as u32, &args, work)
    }
}
