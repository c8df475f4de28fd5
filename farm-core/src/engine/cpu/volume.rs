//! Operations on volumes `[T, H, W, C]`: group norm with SiLU, depth to space and time, the ends of the decoder.

use candle_core::Tensor;
use rayon::prelude::*;

use super::data::{dims, from_vec, shape_error, slice};
use super::pool::Pool;
use super::wide::{silu, wide};
use crate::engine::Result;

/// Pixels whose statistics are summed by one task. Fixed, so that sums do not depend on the number of threads.
const NORM_BLOCK_PIXELS: usize = 1024;
const GROUP_NORM_EPS: f64 = 1e-5;

/// `silu(group_norm(x) · weight + bias)` of `[T, H, W, C]` with statistics per frame over (C/groups, H, W), biased
/// variance, eps 1e-5; weight and bias `[C]`. Sums are in f64; the result is `(x − mean) · a + bias` in f32 with
/// `a = weight / sqrt(variance + eps)` rounded once, then SiLU.
pub fn group_norm_silu(pool: &Pool, x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize) -> Result<Tensor> {
    const OP: &str = "group_norm_silu";
    let shape @ [_, height, width, channels] = dims(OP, "[T, H, W, C]", x)?;
    if groups == 0 || !channels.is_multiple_of(groups) || x.elem_count() == 0 {
        return Err(shape_error(OP, format!("channels that {groups} groups divide, none empty"), x.dims()));
    }
    for affine in [weight, bias] {
        if affine.dims() != [channels] {
            return Err(shape_error(OP, format!("[{channels}]"), affine.dims()));
        }
    }
    let (x, weight, bias) = (slice(OP, x)?, slice(OP, weight)?, slice(OP, bias)?);
    let (x, weight, bias): (&[f32], &[f32], &[f32]) = (&x, &weight, &bias);

    let frame_len = height * width * channels;
    let block_len = NORM_BLOCK_PIXELS * channels;
    let blocks_per_frame = frame_len.div_ceil(block_len);
    let blocks = x.par_chunks(frame_len).flat_map(|frame| frame.par_chunks(block_len));
    let sums: Vec<_> = pool.install(|| {
        blocks
            .map(|block| {
                wide(
                    #[inline(always)]
                    || channel_sums(block, channels),
                )
            })
            .collect()
    });
    let frames: Vec<Affine> =
        sums.chunks(blocks_per_frame).map(|blocks| Affine::of_frame(blocks, height * width, groups, weight)).collect();

    let mut out = vec![0f32; x.len()];
    let by_block =
        out.par_chunks_mut(frame_len).zip(x.par_chunks(frame_len)).zip(&frames).flat_map(|((out, x), affine)| {
            out.par_chunks_mut(block_len).zip(x.par_chunks(block_len)).map(move |(out, x)| (out, x, affine))
        });
    pool.install(|| {
        by_block.for_each(|(out, x, affine)| {
            wide(
                #[inline(always)]
                || affine.apply(x, bias, out),
            )
        })
    });
    from_vec(OP, out, &shape)
}

/// Sum and sum of squares of each channel. In f64, where the squares of f32 values are exact and the variance loses nothing to cancellation.
#[inline(always)]
fn channel_sums(block: &[f32], channels: usize) -> Vec<[f64; 2]> {
    let (mut sums, mut squares) = (vec![0f64; channels], vec![0f64; channels]);
    for pixel in block.chunks_exact(channels) {
        for ((sum, square), &x) in sums.iter_mut().zip(&mut squares).zip(pixel) {
            let x = f64::from(x);
            *sum += x;
            *square += x * x;
        }
    }
    sums.into_iter().zip(squares).map(|(sum, square)| [sum, square]).collect()
}

/// What a frame's statistics make of the norm, by channel.
struct Affine {
    mean: Vec<f32>,
    scale: Vec<f32>,
}

impl Affine {
    fn of_frame(blocks: &[Vec<[f64; 2]>], pixels: usize, groups: usize, weight: &[f32]) -> Self {
        let group_channels = weight.len() / groups;
        let count = (pixels * group_channels) as f64;
        let mut affine = Self { mean: Vec::with_capacity(weight.len()), scale: Vec::with_capacity(weight.len()) };
        for (group, weights) in weight.chunks_exact(group_channels).enumerate() {
            let channels = group * group_channels..(group + 1) * group_channels;
            let sums = blocks.iter().flat_map(|block| &block[channels.clone()]);
            let [sum, square] = sums.fold([0f64; 2], |[a, b], [sum, square]| [a + sum, b + square]);
            let mean = sum / count;
            let variance = (square / count - mean * mean).max(0.0);
            let inverse = 1.0 / (variance + GROUP_NORM_EPS).sqrt();
            affine.mean.extend(weights.iter().map(|_| mean as f32));
            affine.scale.extend(weights.iter().map(|&w| (f64::from(w) * inverse) as f32));
        }
        affine
    }

    /// Norm, bias and SiLU of some pixels.
    #[inline(always)]
    fn apply(&self, x: &[f32], bias: &[f32], out: &mut [f32]) {
        let channels = bias.len();
        for (out, x) in out.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
            let parameters = self.mean.iter().zip(&self.scale).zip(bias);
            for ((out, &x), ((mean, scale), bias)) in out.iter_mut().zip(x).zip(parameters) {
                *out = silu((x - mean) * scale + bias);
            }
        }
    }
}

/// `[T, H, W, C·st·s·s]`, channel order (c, st, s, s) with c slowest → `[st·T − drop, s·H, s·W, C]` without the first `drop` frames.
pub fn depth_to_space_time(pool: &Pool, x: &Tensor, st: usize, s: usize, drop: usize) -> Result<Tensor> {
    const OP: &str = "depth_to_space_time";
    let [frames, height, width, packed] = dims(OP, "[T, H, W, C]", x)?;
    let factor = st * s * s;
    if factor == 0 || !packed.is_multiple_of(factor) || drop >= st * frames || x.elem_count() == 0 {
        return Err(shape_error(
            OP,
            format!("channels that {st}·{s}·{s} divides and more than {drop} frames"),
            x.dims(),
        ));
    }
    let x = slice(OP, x)?;
    let x: &[f32] = &x;
    let channels = packed / factor;
    let shape = [st * frames - drop, s * height, s * width, channels];
    let mut out = vec![0f32; shape.iter().product()];
    let by_row = out.par_chunks_mut(s * width * channels).enumerate();
    let fill = |(row, out): (usize, &mut [f32])| {
        let (frame, row) = (row / shape[1] + drop, row % shape[1]);
        let input = &x[(frame / st * height + row / s) * width * packed..][..width * packed];
        let first = (frame % st * s + row % s) * s;
        for (input, out) in input.chunks_exact(packed).zip(out.chunks_exact_mut(s * channels)) {
            for (q, out) in out.chunks_exact_mut(channels).enumerate() {
                for (out, input) in out.iter_mut().zip(input[first + q..].iter().step_by(factor)) {
                    *out = *input;
                }
            }
        }
    };
    pool.install(|| by_row.for_each(fill));
    from_vec(OP, out, &shape)
}

/// Latent `[C, T, h, w]` → `z·std[c] + mean[c]` (two roundings) as a volume `[T, h, w, C]`.
pub fn denormalize_latent(latent: &Tensor, mean: &[f32], std: &[f32]) -> Result<Tensor> {
    const OP: &str = "denormalize_latent";
    let [channels, frames, height, width] = dims(OP, "[C, T, h, w]", latent)?;
    if channels != mean.len() || channels != std.len() {
        return Err(shape_error(OP, format!("[{}, T, h, w] with {} deviations", mean.len(), std.len()), latent.dims()));
    }
    let latent = slice(OP, latent)?;
    let mut out = vec![0f32; latent.len()];
    for (c, plane) in latent.chunks_exact((frames * height * width).max(1)).enumerate() {
        for (pixel, z) in out.chunks_exact_mut(channels).zip(plane) {
            pixel[c] = z * std[c] + mean[c];
        }
    }
    from_vec(OP, out, &[frames, height, width, channels])
}

/// Frames `[T, H, W, 3]` in [-1, 1] → RGB24 bytes: `trunc(255 · clamp((x + 1)/2, 0, 1))`; NaN becomes 0.
pub fn to_rgb8(pool: &Pool, x: &Tensor) -> Result<Vec<u8>> {
    const OP: &str = "to_rgb8";
    if x.dims().len() != 4 || x.dims()[3] != 3 {
        return Err(shape_error(OP, "[T, H, W, 3]", x.dims()));
    }
    let x = slice(OP, x)?;
    let x: &[f32] = &x;
    // A conversion to an integer type truncates, and turns NaN into 0.
    let byte = |x: &f32| (255.0 * ((x + 1.0) / 2.0).clamp(0.0, 1.0)) as u8;
    Ok(pool.install(|| x.par_iter().with_min_len(1 << 14).map(byte).collect()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Repeatable values in about [-2, 2].
    pub fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        };
        (0..len).map(|_| next()).collect()
    }

    pub fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    pub fn pool(threads: usize) -> Pool {
        Pool::new(threads).unwrap()
    }

    fn volume(dims: [usize; 4], values: Vec<f32>) -> Tensor {
        from_vec("test", values, &dims).unwrap()
    }

    fn vector(values: Vec<f32>) -> Tensor {
        let len = values.len();
        from_vec("test", values, &[len]).unwrap()
    }

    #[test]
    fn group_norm_equals_f64_for_every_frame_alone() {
        // A mean far from zero shows lost digits; two frames of different scale show shared statistics.
        let dims = [2, 35, 40, 6];
        let mut x = noise(dims.iter().product(), 1);
        let half = x.len() / 2;
        x[half..].iter_mut().for_each(|x| *x = *x * 0.01 + 30.0);
        let (weight, bias, groups) = (noise(6, 2), noise(6, 3), 3);
        let got =
            group_norm_silu(&pool(1), &volume(dims, x.clone()), &vector(weight.clone()), &vector(bias.clone()), groups);
        let got = values(&got.unwrap());

        for (index, got) in got.into_iter().enumerate() {
            let (frame, c) = (index / (35 * 40 * 6), index % 6);
            let group = x[frame * 35 * 40 * 6..][..35 * 40 * 6]
                .iter()
                .enumerate()
                .filter(|(i, _)| i % 6 / 2 == c / 2)
                .map(|(_, &x)| f64::from(x));
            // The reference sums are the same for a whole group: only a few elements are worth their cost.
            if index % 97 != 0 {
                continue;
            }
            let count = group.clone().count() as f64;
            let mean = group.clone().sum::<f64>() / count;
            let variance = group.map(|x| (x - mean).powi(2)).sum::<f64>() / count;
            let normed = (f64::from(x[index]) - mean) / (variance + 1e-5).sqrt();
            let y = normed * f64::from(weight[c]) + f64::from(bias[c]);
            let expected = y / (1.0 + (-y).exp());
            let tolerance = if frame == 0 { 2e-6 } else { 2e-4 }; // 30 ± 0.01 in f32 has 2e-6 / 0.01 left
            assert!((f64::from(got) - expected).abs() < tolerance, "at {index}: {got}, expected {expected}");
        }
    }

    #[test]
    fn norm_has_the_same_bits_for_any_number_of_threads() {
        let dims = [3, 50, 41, 8];
        let x = volume(dims, noise(dims.iter().product(), 4));
        let (weight, bias) = (vector(noise(8, 5)), vector(noise(8, 6)));
        let run = |threads| values(&group_norm_silu(&pool(threads), &x, &weight, &bias, 4).unwrap());
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(3));
    }

    #[test]
    fn depth_to_space_time_moves_every_value_to_its_place() {
        for (st, s, drop) in [(3, 2, 2), (2, 2, 1), (1, 2, 0), (2, 3, 0), (1, 1, 0)] {
            let [frames, height, width, channels] = [2, 3, 4, 5];
            let packed = channels * st * s * s;
            let x: Vec<f32> = (0..frames * height * width * packed).map(|i| i as f32).collect();
            let out = depth_to_space_time(&pool(1), &volume([frames, height, width, packed], x.clone()), st, s, drop)
                .unwrap();
            assert_eq!(out.dims(), [st * frames - drop, s * height, s * width, channels]);
            let out = values(&out);
            for (index, value) in x.into_iter().enumerate() {
                let (pixel, channel) = (index / packed, index % packed);
                let (t, i, j) = (pixel / (height * width), pixel / width % height, pixel % width);
                let (c, a, p, q) = (channel / (st * s * s), channel / (s * s) % st, channel / s % s, channel % s);
                let Some(frame) = (st * t + a).checked_sub(drop) else { continue };
                let target = ((frame * s * height + s * i + p) * s * width + s * j + q) * channels + c;
                assert_eq!(out[target], value, "(st {st}, s {s}) {index} → {target}");
            }
        }
    }

    #[test]
    fn a_latent_becomes_a_volume_with_its_channels_rescaled() {
        let latent = volume([2, 1, 2, 2], vec![1., 2., 3., 4., -1., -2., -3., -4.]);
        let out = denormalize_latent(&latent, &[10., 0.], &[1., 2.]).unwrap();
        assert_eq!(out.dims(), [1, 2, 2, 2]);
        assert_eq!(values(&out), [11., -2., 12., -4., 13., -6., 14., -8.]);
        assert!(denormalize_latent(&latent, &[0.], &[1., 1.]).is_err());
    }

    #[test]
    fn bytes_are_truncated_and_clamped() {
        let x = [-1.0, -3.0, 1.0, 7.0, 0.0, f32::NAN, 0.9999, 2.0 * 128.0 / 255.0 - 1.0 + 1e-6, f32::NEG_INFINITY];
        let bytes = to_rgb8(&pool(1), &volume([1, 1, 3, 3], x.to_vec())).unwrap();
        assert_eq!(bytes, [0, 0, 255, 255, 127, 0, 254, 128, 0]);
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let x = volume([1, 2, 2, 6], vec![0.0; 24]);
        let six = vector(vec![1.0; 6]);
        assert!(group_norm_silu(&pool(1), &x, &six, &six, 4).is_err());
        assert!(group_norm_silu(&pool(1), &x, &six, &six, 0).is_err());
        assert!(group_norm_silu(&pool(1), &x, &six, &vector(vec![1.0; 5]), 3).is_err());
        assert!(depth_to_space_time(&pool(1), &x, 1, 2, 0).is_err());
        assert!(depth_to_space_time(&pool(1), &x, 3, 1, 3).is_err());
        assert!(depth_to_space_time(&pool(1), &x, 0, 1, 0).is_err());
        assert!(to_rgb8(&pool(1), &x).is_err());
        assert!(depth_to_space_time(&pool(1), &six, 1, 1, 0).is_err());
    }
}
