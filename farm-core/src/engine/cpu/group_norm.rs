//! Group norm with SiLU of volumes `[T, H, W, C]`, in two halves: statistics, and what is made of them.

use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

use super::data::{dims, from_vec, room, shape_error, slice};
use super::pool::Pool;
use super::wide::{silu, wide};
use crate::engine::{EngineError, Result};
use crate::tiles::statistics::{Sums, Totals, merge};

/// Pixels, about, that one task sums or norms. Fixed, so that sums do not depend on the number of threads.
const BLOCK_PIXELS: usize = 1024;
const EPS: f64 = 1e-5;

/// Sums per frame and group over a rectangle of each frame of `x` `[T, H, W, C]`, in f64: the squares of f32 values are
/// exact in it, and the variance loses nothing to cancellation. Added up row by row in blocks of rows.
pub fn group_sums(pool: &Pool, x: &Tensor, groups: usize, rows: Range<usize>, cols: Range<usize>) -> Result<Sums> {
    const OP: &str = "group_sums";
    let [frames, height, width, channels] = checked(OP, x, groups)?;
    if rows.is_empty() || cols.is_empty() || rows.end > height || cols.end > width {
        return Err(shape_error(OP, format!("rows {rows:?} and columns {cols:?} of a frame"), x.dims()));
    }
    let x = slice(OP, x)?;
    let x: &[f32] = &x;
    let block_rows = (BLOCK_PIXELS / cols.len()).max(1);
    let blocks_per_frame = rows.len().div_ceil(block_rows);
    let (row_len, first) = (width * channels, cols.start * channels);
    let block_sums = |block: usize| {
        let (frame, start) = (block / blocks_per_frame, rows.start + block % blocks_per_frame * block_rows);
        let block = (start..rows.end.min(start + block_rows)).map(|row| (frame * height + row) * row_len + first);
        wide(
            #[inline(always)]
            || channel_sums(block.map(|start| &x[start..][..cols.len() * channels]), channels),
        )
    };
    let blocks: Vec<_> = pool.install(|| (0..frames * blocks_per_frame).into_par_iter().map(block_sums).collect());

    let group_channels = channels / groups;
    let count = rows.len() * cols.len() * group_channels;
    let of_group = |blocks: &[Vec<[f64; 2]>], group: usize| {
        let channels = group * group_channels..(group + 1) * group_channels;
        let sums = blocks.iter().flat_map(|block| &block[channels.clone()]);
        let [sum, square] = sums.fold([0f64; 2], |[a, b], [sum, square]| [a + sum, b + square]);
        let mean = sum / count as f64;
        [mean, (square - sum * mean).max(0.0)]
    };
    let frames = blocks.chunks(blocks_per_frame);
    let moments = frames.flat_map(|blocks| (0..groups).map(move |group| of_group(blocks, group))).collect();
    Ok(Sums { count: count as u64, moments })
}

/// `silu((x − mean) · a + bias)` of `[T, H, W, C]` in f32 with `a = weight / sqrt(variance + eps)`, computed in f64 and
/// rounded once; weight and bias `[C]`, mean and variance of each frame and group from `totals` or, without any, from
/// `x` itself.
pub fn group_norm_silu(
    pool: &Pool,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    totals: Option<&Totals>,
) -> Result<Tensor> {
    const OP: &str = "group_norm_silu";
    let shape @ [frames, height, width, channels] = checked(OP, x, groups)?;
    for affine in [weight, bias] {
        if affine.dims() != [channels] {
            return Err(shape_error(OP, format!("[{channels}]"), affine.dims()));
        }
    }
    let own = match totals {
        Some(_) => Totals::default(),
        None => merge([&group_sums(pool, x, groups, 0..height, 0..width)?])
            .map_err(|message| EngineError::Backend { op: OP, message })?,
    };
    let totals = totals.unwrap_or(&own);
    if totals.0.len() != frames * groups {
        return Err(shape_error(OP, format!("totals of {frames} frames of {groups} groups"), &[totals.0.len()]));
    }
    let (x, weight, bias) = (slice(OP, x)?, slice(OP, weight)?, slice(OP, bias)?);
    let (x, weight, bias): (&[f32], &[f32], &[f32]) = (&x, &weight, &bias);
    let frames: Vec<Affine> = totals.0.chunks(groups).map(|totals| Affine::of_frame(totals, weight)).collect();

    let (frame_len, block_len) = (height * width * channels, BLOCK_PIXELS * channels);
    let mut out = room(x.len());
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

/// The shape of a volume that is not empty and whose channels are so many groups.
fn checked(op: &'static str, x: &Tensor, groups: usize) -> Result<[usize; 4]> {
    let shape @ [_, _, _, channels] = dims(op, "[T, H, W, C]", x)?;
    if groups == 0 || !channels.is_multiple_of(groups) || x.elem_count() == 0 {
        return Err(shape_error(op, format!("channels that {groups} groups divide, none empty"), x.dims()));
    }
    Ok(shape)
}

/// Sum and sum of squares of each channel over runs of pixels.
#[inline(always)]
fn channel_sums<'a>(runs: impl Iterator<Item = &'a [f32]>, channels: usize) -> Vec<[f64; 2]> {
    let (mut sums, mut squares) = (vec![0f64; channels], vec![0f64; channels]);
    for run in runs {
        for pixel in run.chunks_exact(channels) {
            for ((sum, square), &x) in sums.iter_mut().zip(&mut squares).zip(pixel) {
                let x = f64::from(x);
                *sum += x;
                *square += x * x;
            }
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
    /// `totals` of each group.
    fn of_frame(totals: &[[f32; 2]], weight: &[f32]) -> Self {
        let mut affine = Self { mean: Vec::with_capacity(weight.len()), scale: Vec::with_capacity(weight.len()) };
        for (&[mean, variance], weights) in totals.iter().zip(weight.chunks_exact(weight.len() / totals.len())) {
            let inverse = 1.0 / (f64::from(variance) + EPS).sqrt();
            affine.mean.extend(weights.iter().map(|_| mean));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::volume::tests::{noise, pool, values};

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
        let got = group_norm_silu(
            &pool(1),
            &volume(dims, x.clone()),
            &vector(weight.clone()),
            &vector(bias.clone()),
            groups,
            None,
        );
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
    fn sums_of_a_rectangle_are_those_of_its_values_alone() {
        let dims @ [frames, height, width, channels] = [2, 40, 50, 6];
        let x: Vec<f32> = noise(dims.iter().product(), 9).iter().map(|x| x + 7.0).collect();
        let groups = 3;
        // The second has more than one block, the third less than a row of one.
        for (rows, cols) in [(0..40, 0..50), (3..37, 1..49), (39..40, 20..21)] {
            let sums = group_sums(&pool(1), &volume(dims, x.clone()), groups, rows.clone(), cols.clone()).unwrap();
            assert_eq!(sums.count as usize, rows.len() * cols.len() * 2);
            assert_eq!(sums.moments.len(), frames * groups);
            for (index, [mean, m2]) in sums.moments.into_iter().enumerate() {
                let (frame, group) = (index / groups, index % groups);
                let pixels =
                    rows.clone().flat_map(|row| cols.clone().map(move |col| (frame * height + row) * width + col));
                let values: Vec<f64> = pixels
                    .flat_map(|pixel| x[pixel * channels + 2 * group..][..2].iter().map(|&x| f64::from(x)))
                    .collect();
                let expected = values.iter().sum::<f64>() / values.len() as f64;
                let expected_m2: f64 = values.iter().map(|x| (x - expected).powi(2)).sum();
                assert!((mean - expected).abs() < 1e-12 * expected.abs(), "{mean} {expected}");
                assert!((m2 - expected_m2).abs() < 1e-9 * expected_m2 + 1e-12, "{m2} {expected_m2}");
            }
        }
    }

    #[test]
    fn a_norm_by_itself_has_the_bits_of_one_with_the_totals_of_its_own_sums() {
        for dims @ [_, height, width, _] in [[3, 50, 41, 8], [1, 1, 1, 8], [2, 3, 700, 8]] {
            let x = volume(dims, noise(dims.iter().product(), 4));
            let (weight, bias) = (vector(noise(8, 5)), vector(noise(8, 6)));
            let one = values(&group_norm_silu(&pool(1), &x, &weight, &bias, 4, None).unwrap());
            for threads in [1, 2, 3] {
                let pool = pool(threads);
                assert_eq!(one, values(&group_norm_silu(&pool, &x, &weight, &bias, 4, None).unwrap()), "{threads}");
                let totals = merge([&group_sums(&pool, &x, 4, 0..height, 0..width).unwrap()]).unwrap();
                let split = group_norm_silu(&pool, &x, &weight, &bias, 4, Some(&totals)).unwrap();
                assert_eq!(one, values(&split), "{dims:?}, {threads} threads");
            }
        }
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let x = volume([2, 2, 2, 6], vec![0.0; 48]);
        let six = vector(vec![1.0; 6]);
        let norm = |bias: &Tensor, groups, totals: Option<usize>| {
            let totals = totals.map(|count| Totals(vec![[0.0, 1.0]; count]));
            group_norm_silu(&pool(1), &x, &six, bias, groups, totals.as_ref())
        };
        assert!(norm(&six, 4, None).is_err());
        assert!(norm(&six, 0, None).is_err());
        assert!(norm(&vector(vec![1.0; 5]), 3, None).is_err());
        for count in [0, 3, 5, 7] {
            let error = norm(&six, 3, Some(count)).err().unwrap().to_string();
            assert!(error.contains("2 frames of 3 groups"), "{error}");
        }
        assert!(norm(&six, 3, Some(6)).is_ok());
        let sums = |groups, rows, cols| group_sums(&pool(1), &x, groups, rows, cols);
        assert!(sums(3, 0..2, 0..2).is_ok() && sums(4, 0..2, 0..2).is_err());
        assert!(sums(3, 1..1, 0..2).is_err() && sums(3, 0..3, 0..2).is_err() && sums(3, 0..2, 1..3).is_err());
    }
}
