//! The causal 3×3×3 convolution: implicit matrix products over padded rows, channels last.
//!
//! A block of output rows of one frame needs three input frames and one more row on each side. Those rows are copied,
//! padded by one pixel left and right, into a scratch buffer of this thread. In it, the values under the three taps
//! of a kernel row are `3·Cin` neighbours in memory, and one pixel further they start `Cin` later: that is a matrix
//! with overlapping rows, which a matrix product reads in place. So nine products (three frames, three kernel rows),
//! summed, give the block, and nothing 27 times the size of the input is ever built. A block's rows run on through the
//! padding, so two pixels per row are computed in vain; they are left out when the bias is added.
//!
//! The blocks depend on the frame's size only. Neither the number of threads nor the number of frames given at once
//! changes the shape of a product, and so they do not change a bit of the result.

use candle_core::Tensor;
use gemm::Parallelism;
use rayon::prelude::*;

use super::data::{dims, expect, from_vec, shape_error, slice, widen};
use super::pool::Pool;
use crate::engine::{RawTensor, Result};

const OP: &str = "causal_conv3d";

/// Pixels of a block of output rows: enough for a matrix product to be efficient, few enough for its scratch to stay in cache.
const BLOCK_PIXELS: usize = 512;
/// Small frames are still cut into this many blocks, for the threads.
const MIN_BLOCKS: usize = 4;

/// A 3×3×3 convolution weight, arranged for [`causal_conv3d`].
pub struct PackedConv {
    /// Input and output channels.
    input: usize,
    output: usize,
    /// `[3 (t), 3 (h), 3 (w), Cin, Cout]`.
    taps: Vec<f32>,
    /// `[Cout]`
    bias: Vec<f32>,
}

/// Rearranges a stored `[out, in, 3, 3, 3]` weight and its `[out]` bias.
pub fn pack_conv(weight: RawTensor<'_>, bias: RawTensor<'_>) -> Result<PackedConv> {
    let &[output @ 1..=usize::MAX, input @ 1..=usize::MAX, 3, 3, 3] = weight.shape else {
        return Err(shape_error("pack_conv", "[out, in, 3, 3, 3]", weight.shape));
    };
    if bias.shape != [output] {
        return Err(shape_error("pack_conv", format!("[{output}]"), bias.shape));
    }
    let mut stored = Vec::new();
    widen("pack_conv", &weight, &mut stored)?;
    let mut taps = vec![0f32; stored.len()];
    for (out, of_output) in stored.chunks_exact(input * 27).enumerate() {
        for (channel, of_input) in of_output.chunks_exact(27).enumerate() {
            for (tap, &value) in of_input.iter().enumerate() {
                taps[(tap * input + channel) * output + out] = value;
            }
        }
    }
    let mut packed = PackedConv { input, output, taps, bias: Vec::new() };
    widen("pack_conv", &bias, &mut packed.bias)?;
    Ok(packed)
}

/// Causal convolution of `x` `[T, H, W, Cin]` → `[T, H, W, Cout]`, and the cache for the next chunk: the last two
/// frames `[2, H, W, Cin]` of the input as it was seen, cache included. Without a cache the first frame stands in twice.
/// Space is padded by replication. Bias is added after the full sum.
pub fn causal_conv3d(pool: &Pool, x: &Tensor, weight: &PackedConv, cache: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let [frames, height, width, channels] = dims(OP, "[T, H, W, C]", x)?;
    if channels != weight.input || x.elem_count() == 0 {
        return Err(shape_error(OP, format!("[T, H, W, {}], none empty", weight.input), x.dims()));
    }
    if let Some(cache) = cache {
        expect(OP, "cache", cache, &[2, height, width, channels])?;
    }
    let x = slice(OP, x)?;
    let cache = cache.map(|cache| slice(OP, cache)).transpose()?;
    let (x, cache): (&[f32], Option<&[f32]>) = (&x, cache.as_deref());

    let frame_len = height * width * channels;
    // Frame `i` of the input with its two frames of past in front.
    let frame = |i: usize| match (i, cache) {
        (0 | 1, Some(cache)) => &cache[i * frame_len..][..frame_len],
        (0 | 1, None) => &x[..frame_len],
        _ => &x[(i - 2) * frame_len..][..frame_len],
    };

    let block_rows = (BLOCK_PIXELS / (width + 2)).clamp(1, height.div_ceil(MIN_BLOCKS));
    let mut out = vec![0f32; frames * height * width * weight.output];
    let by_frame = out.par_chunks_mut(height * width * weight.output).enumerate();
    let by_block = by_frame.flat_map(|(t, out)| {
        let blocks = out.par_chunks_mut(block_rows * width * weight.output).enumerate();
        blocks.map(move |(block, out)| (t, block * block_rows, out))
    });
    pool.install(|| {
        by_block.for_each_init(Scratch::default, |scratch, (t, first_row, out)| {
            let rows = out.len() / (width * weight.output);
            let window = [frame(t), frame(t + 1), frame(t + 2)];
            scratch.pad(window, first_row, rows, [height, width, channels]);
            scratch.multiply(weight, rows, width);
            scratch.store(weight, width, out);
        })
    });

    let next = [frame(frames), frame(frames + 1)].concat();
    Ok((
        from_vec(OP, out, &[frames, height, width, weight.output])?,
        from_vec(OP, next, &[2, height, width, channels])?,
    ))
}

/// Buffers of one thread, reused from block to block.
#[derive(Default)]
struct Scratch {
    /// `[3 (t), rows + 2, width + 2, Cin]`
    padded: Vec<f32>,
    /// `[rows, width + 2, Cout]`, less the last two pixels.
    sums: Vec<f32>,
}

impl Scratch {
    /// Copies rows `first_row − 1 ..= first_row + rows` of three frames, edges replicated.
    fn pad(&mut self, frames: [&[f32]; 3], first_row: usize, rows: usize, [height, width, channels]: [usize; 3]) {
        self.padded.clear();
        for frame in frames {
            for row in first_row..first_row + rows + 2 {
                let row = row.saturating_sub(1).min(height - 1);
                let row = &frame[row * width * channels..][..width * channels];
                self.padded.extend_from_slice(&row[..channels]);
                self.padded.extend_from_slice(row);
                self.padded.extend_from_slice(&row[(width - 1) * channels..]);
            }
        }
    }

    /// `sums` = the products of nine kernel rows with the padded rows, added up in order.
    fn multiply(&mut self, weight: &PackedConv, rows: usize, width: usize) {
        let (input, output) = (weight.input, weight.output);
        let pixels = rows * (width + 2) - 2;
        self.sums.resize(pixels * output, 0.0);
        for t in 0..3 {
            for h in 0..3 {
                let taps = &weight.taps[(t * 3 + h) * 3 * input * output..][..3 * input * output];
                let values = &self.padded[(t * (rows + 2) + h) * (width + 2) * input..][..(pixels + 2) * input];
                // As the product library sees it, everything is transposed: dst [Cout, pixels], lhs [Cout, 3·Cin],
                // rhs [3·Cin, pixels], so that dst and lhs have unit stride down their columns and rhs down its own.
                // SAFETY: dst spans pixels·output, lhs 3·input·output values, and column `i` of rhs ends at
                // (i + 3)·input ≤ (pixels + 2)·input: each is the length of its slice. dst overlaps neither.
                unsafe {
                    gemm::gemm(
                        output,
                        pixels,
                        3 * input,
                        self.sums.as_mut_ptr(),
                        output as isize,
                        1,
                        t + h > 0,
                        taps.as_ptr(),
                        output as isize,
                        1,
                        values.as_ptr(),
                        input as isize,
                        1,
                        1f32,
                        1f32,
                        false,
                        false,
                        false,
                        Parallelism::None,
                    );
                }
            }
        }
    }

    /// Writes the sums plus bias to `out`, without the two pixels between rows.
    fn store(&self, weight: &PackedConv, width: usize, out: &mut [f32]) {
        let output = weight.output;
        let rows = out.chunks_exact_mut(width * output);
        for (out, sums) in rows.zip(self.sums.chunks((width + 2) * output)) {
            for (out, sums) in out.chunks_exact_mut(output).zip(sums.chunks_exact(output)) {
                for ((out, sum), bias) in out.iter_mut().zip(sums).zip(&weight.bias) {
                    *out = sum + bias;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::RawDtype;
    use crate::engine::cpu::volume::tests::{noise, pool, values};

    fn random_conv(output: usize, input: usize) -> (Vec<f32>, Vec<f32>, PackedConv) {
        let (weight, bias) = (noise(output * input * 27, 1), noise(output, 2));
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let packed = pack_conv(
            RawTensor { dtype: RawDtype::F32, shape: &[output, input, 3, 3, 3], bytes: &bytes(&weight) },
            RawTensor { dtype: RawDtype::F32, shape: &[output], bytes: &bytes(&bias) },
        );
        (weight, bias, packed.unwrap())
    }

    /// Straight from the definition, in f64: time padded by the first frame, space by the nearest pixel.
    fn scalar_conv(x: &[f32], dims: [usize; 4], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let [frames, height, width, input] = dims;
        let near = |i: usize, d: usize, n: usize| (i + d).saturating_sub(1).min(n - 1);
        let mut out = Vec::new();
        for (t, i, j, (o, bias)) in outputs(frames, height, width, bias) {
            let mut sum = 0f64;
            for c in 0..input {
                for (dt, di, dj) in (0..27).map(|tap| (tap / 9, tap / 3 % 3, tap % 3)) {
                    let (t, i, j) = ((t + dt).saturating_sub(2), near(i, di, height), near(j, dj, width));
                    let x = x[((t * height + i) * width + j) * input + c];
                    sum += f64::from(x) * f64::from(weight[(o * input + c) * 27 + dt * 9 + di * 3 + dj]);
                }
            }
            out.push((sum + f64::from(bias)) as f32);
        }
        out
    }

    fn outputs(
        frames: usize,
        height: usize,
        width: usize,
        bias: &[f32],
    ) -> impl Iterator<Item = (usize, usize, usize, (usize, f32))> {
        (0..frames * height * width).flat_map(move |p| {
            let (t, i, j) = (p / (height * width), p / width % height, p % width);
            bias.iter().copied().enumerate().map(move |b| (t, i, j, b))
        })
    }

    #[test]
    fn fast_convolution_equals_the_definition() {
        // Sizes around every edge: one frame, one pixel, more rows than a block, odd widths, channels that are no multiple of a vector.
        for dims @ [frames, height, width, input] in
            [[1, 1, 1, 1], [3, 1, 5, 2], [2, 9, 1, 3], [4, 7, 9, 12], [2, 37, 33, 5], [1, 3, 600, 4]]
        {
            for output in [1, 3, 8, 33] {
                let (weight, bias, packed) = random_conv(output, input);
                let x = noise(dims.iter().product(), 3);
                let expected = scalar_conv(&x, dims, &weight, &bias);
                let (got, _) = causal_conv3d(&pool(1), &from_vec(OP, x, &dims).unwrap(), &packed, None).unwrap();
                assert_eq!(got.dims(), [frames, height, width, output]);
                let worst = values(&got).iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(worst < 2e-5, "{dims:?} → {output}: off by {worst}");
            }
        }
    }

    #[test]
    fn chunks_with_caches_give_the_bits_of_the_whole() {
        let dims = [7, 6, 5, 4];
        let (_, _, packed) = random_conv(6, 4);
        let x = from_vec(OP, noise(dims.iter().product(), 5), &dims).unwrap();
        let (whole, last) = causal_conv3d(&pool(1), &x, &packed, None).unwrap();
        for chunk in [1, 2, 3, 7] {
            let (mut parts, mut cache) = (Vec::new(), None);
            for start in (0..dims[0]).step_by(chunk) {
                let part = x.narrow(0, start, chunk.min(dims[0] - start)).unwrap();
                let (part, next) = causal_conv3d(&pool(1), &part, &packed, cache.as_ref()).unwrap();
                parts.extend(values(&part));
                cache = Some(next);
            }
            assert_eq!(parts, values(&whole), "chunks of {chunk}");
            assert_eq!(values(&cache.unwrap()), values(&last), "cache after chunks of {chunk}");
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let dims = [3, 21, 19, 16];
        let (_, _, packed) = random_conv(24, 16);
        let x = from_vec(OP, noise(dims.iter().product(), 7), &dims).unwrap();
        let run = |threads| values(&causal_conv3d(&pool(threads), &x, &packed, None).unwrap().0);
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(3));
    }

    #[test]
    fn wrong_shapes_are_errors_that_name_them() {
        let (_, _, packed) = random_conv(2, 3);
        let x = from_vec(OP, noise(2 * 4 * 4 * 2, 1), &[2, 4, 4, 2]).unwrap();
        let error = causal_conv3d(&pool(1), &x, &packed, None).err().unwrap().to_string();
        assert!(error.contains("[T, H, W, 3]") && error.contains("[2, 4, 4, 2]"), "{error}");
        let x = from_vec(OP, noise(2 * 4 * 4 * 3, 1), &[2, 4, 4, 3]).unwrap();
        let error = causal_conv3d(&pool(1), &x, &packed, Some(&x.narrow(0, 0, 1).unwrap())).err().unwrap().to_string();
        assert!(error.contains("cache [2, 4, 4, 3]"), "{error}");
        let empty = x.narrow(0, 0, 0).unwrap();
        assert!(causal_conv3d(&pool(1), &empty, &packed, None).is_err());
        let short = RawTensor { dtype: RawDtype::F32, shape: &[1, 1, 3, 3, 3], bytes: &[0; 4] };
        let bias = RawTensor { dtype: RawDtype::F32, shape: &[1], bytes: &[0; 4] };
        assert!(pack_conv(short, bias).is_err());
    }
}
