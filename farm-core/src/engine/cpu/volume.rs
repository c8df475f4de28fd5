//! Operations on volumes `[T, H, W, C]`: depth to space and time, the ends of the decoder.

use candle_core::Tensor;
use rayon::prelude::*;

use super::data::{dims, from_vec, room, shape_error, slice};
use super::pool::Pool;
use crate::engine::Result;

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
    let mut out = room(shape.iter().product());
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
    // A conversion to an integer type truncates, and turns NaN into 0.
    to_integers("to_rgb8", pool, x, |value| value as u8)
}

/// The same with 257 times as many levels, so that a 257th of each, truncated, is the byte of [`to_rgb8`]. (The product
/// never rounds up to the next multiple of 257: of a value below one it is at least 257 units of the value's last place
/// away, and half a unit of its own last place is at most 256 of them.)
pub fn to_rgb16(pool: &Pool, x: &Tensor) -> Result<Vec<u16>> {
    to_integers("to_rgb16", pool, x, |value| (257.0 * value) as u16)
}

/// `convert` of every value of frames, which are mapped to 0 … 255 and clamped to it before.
fn to_integers<T: Send>(
    op: &'static str,
    pool: &Pool,
    x: &Tensor,
    convert: impl Fn(f32) -> T + Sync + Send,
) -> Result<Vec<T>> {
    if x.dims().len() != 4 || x.dims()[3] != 3 {
        return Err(shape_error(op, "[T, H, W, 3]", x.dims()));
    }
    let x = slice(op, x)?;
    let x: &[f32] = &x;
    let level = |x: &f32| convert(255.0 * ((x + 1.0) / 2.0).clamp(0.0, 1.0));
    Ok(pool.install(|| x.par_iter().with_min_len(1 << 14).map(level).collect()))
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
    fn sixteen_bits_become_the_bytes_of_eight() {
        // Around every border between two bytes, and everywhere.
        let border = (0..=255).map(|k| 2.0 * k as f32 / 255.0 - 1.0);
        let borders = border.flat_map(|x| (-8..=8).map(move |ulps| f32::from_bits((x.to_bits() as i32 + ulps) as u32)));
        let mut x: Vec<f32> = borders.chain(noise(3 << 16, 8)).chain([f32::NAN, f32::INFINITY, -0.0]).collect();
        x.truncate(x.len() / 3 * 3);
        let x = volume([1, 1, x.len() / 3, 3], x);
        let fine = to_rgb16(&pool(1), &x).unwrap();
        assert!(fine.contains(&0) && fine.contains(&u16::MAX));
        let bytes: Vec<u8> = fine.iter().map(|&value| (value / 257) as u8).collect();
        assert_eq!(bytes, to_rgb8(&pool(1), &x).unwrap());
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let x = volume([1, 2, 2, 6], vec![0.0; 24]);
        let six = from_vec("test", vec![1.0; 6], &[6]).unwrap();
        assert!(depth_to_space_time(&pool(1), &x, 1, 2, 0).is_err());
        assert!(depth_to_space_time(&pool(1), &x, 3, 1, 3).is_err());
        assert!(depth_to_space_time(&pool(1), &x, 0, 1, 0).is_err());
        assert!(to_rgb8(&pool(1), &x).is_err() && to_rgb16(&pool(1), &x).is_err());
        assert!(depth_to_space_time(&pool(1), &six, 1, 1, 0).is_err());
    }
}
