//! The causal 3×3×3 convolution: an implicit matrix product, channels last.
//!
//! Under the three taps of a kernel row lie `3·Cin` neighbours in memory, and one pixel further they begin `Cin` later. So
//! the pixels of an image row are the rows of a matrix that a product reads in place, as nine runs of `3·Cin` values: three
//! frames, three kernel rows. Where the kernel reaches over the edge the nearest row or frame is read instead; only the first
//! and the last pixel of a row, which need one pixel twice, are copied.
//!
//! The order of additions is that of [`super::product`] over those nine runs, for every pixel. Neither the number of threads
//! nor the number of frames given at once changes a bit of the result.

use std::ops::Range;

use candle_core::Tensor;

use super::data::{dims, expect, from_vec, room, shape_error, slice, widen};
use super::pool::Pool;
use super::product::{Finish, PANEL, Panels, Rows, Target, product};
use crate::engine::{RawTensor, Result};

const OP: &str = "causal_conv3d";

/// Pixels of a task: enough to outweigh its start.
const BLOCK_PIXELS: usize = 512;
/// Small frames are still cut into this many blocks, for the threads.
const MIN_BLOCKS: usize = 4;
/// Kernel rows of all frames.
const RUNS: usize = 9;

/// A 3×3×3 convolution weight, arranged for [`causal_conv3d`].
pub struct PackedConv {
    /// `[27·Cin, Cout]`, rows in the order (t, h, w, Cin).
    taps: Panels,
    /// Input channels.
    input: usize,
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
    let mut transposed = vec![0f32; stored.len()];
    for (to, from) in transposed.chunks_exact_mut(input * 27).zip(stored.chunks_exact(input * 27)) {
        for (channel, of_input) in from.chunks_exact(27).enumerate() {
            for (tap, &value) in of_input.iter().enumerate() {
                to[tap * input + channel] = value;
            }
        }
    }
    let taps = Panels::of_transposed(&transposed, [output, 27 * input], 27 * input);
    let mut packed = PackedConv { taps, input, bias: Vec::new() };
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

    let output = weight.bias.len();
    let block_rows = (BLOCK_PIXELS / width).clamp(1, height.div_ceil(MIN_BLOCKS));
    let mut out = room(frames * height * width * output);
    let mut tasks = Vec::with_capacity(frames * height.div_ceil(block_rows));
    for (t, out) in out.chunks_mut(height * width * output).enumerate() {
        for (block, out) in out.chunks_mut(block_rows * width * output).enumerate() {
            tasks.push((t, block * block_rows, out));
        }
    }
    pool.run(tasks, frames * height * width * output * 27 * channels, |(t, first, out)| {
        let window = Window { frames: [frame(t), frame(t + 1), frame(t + 2)], height, width, channels };
        window.convolve(weight, first..first + out.len() / (width * output), out);
    });

    let next = [frame(frames), frame(frames + 1)].concat();
    Ok((from_vec(OP, out, &[frames, height, width, output])?, from_vec(OP, next, &[2, height, width, channels])?))
}

/// What a frame of output depends on.
struct Window<'a> {
    /// `[height, width, channels]` each.
    frames: [&'a [f32]; 3],
    height: usize,
    width: usize,
    channels: usize,
}

impl<'a> Window<'a> {
    /// The input rows under the nine kernel rows of an output row.
    fn under(&self, row: usize) -> [&'a [f32]; RUNS] {
        std::array::from_fn(|run| {
            let row = (row + run % 3).saturating_sub(1).min(self.height - 1);
            &self.frames[run / 3][row * self.width * self.channels..][..self.width * self.channels]
        })
    }

    /// Some rows of output, `[rows, width, Cout]`.
    fn convolve(&self, weight: &PackedConv, rows: Range<usize>, out: &mut [f32]) {
        let (channels, output) = (self.channels, weight.bias.len());
        let panels = 0..output.div_ceil(PANEL);
        let finish = Finish { add: false, bias: Some(&weight.bias) };
        let row_len = self.width * output;
        if self.width > 2 {
            for (row, out) in rows.clone().zip(out.chunks_exact_mut(row_len)) {
                let runs = self.under(row).map(|values| (values, 3 * channels));
                let inner = Rows { count: self.width - 2, stride: channels, runs: &runs };
                let to = Target { start: out[output..].as_mut_ptr(), stride: output };
                // Safety: all pixels of the row but the first and the last.
                unsafe { product(inner, weight.taps.view(), panels.clone(), to, finish) };
            }
        }
        for (pixel, first_tap) in [(0, -1), (self.width - 1, self.width as isize - 2)] {
            let mut padded = vec![0f32; RUNS * rows.len() * 3 * channels];
            for (i, row) in rows.clone().enumerate() {
                for (run, values) in self.under(row).into_iter().enumerate() {
                    let to = &mut padded[(run * rows.len() + i) * 3 * channels..][..3 * channels];
                    for (tap, to) in to.chunks_exact_mut(channels).enumerate() {
                        let pixel = (first_tap + tap as isize).clamp(0, self.width as isize - 1) as usize;
                        to.copy_from_slice(&values[pixel * channels..][..channels]);
                    }
                }
            }
            let mut runs = [(&padded[..], 3 * channels); RUNS];
            for (run, (values, _)) in runs.iter_mut().enumerate() {
                *values = &padded[run * rows.len() * 3 * channels..];
            }
            let edge = Rows { count: rows.len(), stride: 3 * channels, runs: &runs };
            let to = Target { start: out[pixel * output..].as_mut_ptr(), stride: row_len };
            // Safety: one pixel of each row.
            unsafe { product(edge, weight.taps.view(), panels.clone(), to, finish) };
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

    /// Straight from the definition, in f64: time padded by the first frame, space by the nearest pixel. With the sum of the
    /// products' magnitudes, of which the rounding of a sum is a part.
    fn scalar_conv(x: &[f32], dims: [usize; 4], weight: &[f32], bias: &[f32]) -> Vec<[f64; 2]> {
        let [frames, height, width, input] = dims;
        let near = |i: usize, d: usize, n: usize| (i + d).saturating_sub(1).min(n - 1);
        let mut out = Vec::new();
        for (t, i, j, (o, bias)) in outputs(frames, height, width, bias) {
            let (mut sum, mut size) = (f64::from(bias), f64::from(bias).abs());
            for c in 0..input {
                for (dt, di, dj) in (0..27).map(|tap| (tap / 9, tap / 3 % 3, tap % 3)) {
                    let (t, i, j) = ((t + dt).saturating_sub(2), near(i, di, height), near(j, dj, width));
                    let x = x[((t * height + i) * width + j) * input + c];
                    let product = f64::from(x) * f64::from(weight[(o * input + c) * 27 + dt * 9 + di * 3 + dj]);
                    (sum, size) = (sum + product, size + product.abs());
                }
            }
            out.push([sum, size]);
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
                for (at, (got, [expected, size])) in values(&got).into_iter().zip(expected).enumerate() {
                    let off = (f64::from(got) - expected).abs();
                    assert!(off <= 2e-7 * size, "{dims:?} → {output}, value {at}: {got}, expected {expected}");
                }
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
