//! Normalisations over the last dimension. Statistics are summed in f64 in a fixed order; the rest is f32, one rounding
//! per written operation.

use candle_core::Tensor;

use super::data::{dims, expect, from_vec, room, slice};
use super::pool::Pool;
use super::wide::{sum_f64, wide};
use crate::engine::Result;

/// eps of every norm without a learned weight.
const EPS: f64 = 1e-6;

/// `1 / sqrt(mean(x²) + eps)`, rounded once to f32.
#[inline(always)]
pub(super) fn inverse_rms(row: &[f32], eps: f64) -> f32 {
    let mean = sum_f64(row, |x| x * x) / row.len() as f64;
    (1.0 / (mean + eps).sqrt()) as f32
}

pub(super) fn rms_norm(pool: &Pool, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    const OP: &str = "rms_norm";
    let [m, d] = dims(OP, "x [rows, channels]", x)?;
    expect(OP, "weight", weight, &[d])?;
    let (x, weight) = (slice(OP, x)?, slice(OP, weight)?);
    scaled_rms(OP, pool, &x, &weight, [m, d], f64::from(eps))
}

pub(super) fn modulated_rms_norm(pool: &Pool, x: &Tensor, scale: &Tensor) -> Result<Tensor> {
    const OP: &str = "modulated_rms_norm";
    let [m, d] = dims(OP, "x [rows, channels]", x)?;
    expect(OP, "scale", scale, &[d])?;
    let weight: Vec<f32> = slice(OP, scale)?.iter().map(|scale| 1.0 + scale).collect();
    scaled_rms(OP, pool, &slice(OP, x)?, &weight, [m, d], EPS)
}

/// `x · inverse_rms(x) · weight`, the products from left to right.
fn scaled_rms(
    op: &'static str,
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    [m, d]: [usize; 2],
    eps: f64,
) -> Result<Tensor> {
    let mut out = room(m * d);
    pool.rows(&mut out, d, 4, |row0, run| {
        wide(
            #[inline(always)]
            || {
                for (out, x) in run.chunks_exact_mut(d).zip(x[row0 * d..].chunks_exact(d)) {
                    let inverse = inverse_rms(x, eps);
                    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                        *out = x * inverse * weight;
                    }
                }
            },
        );
    });
    from_vec(op, out, &[m, d])
}

pub(super) fn gated_residual(pool: &Pool, x: &Tensor, branch: &Tensor, gate: &Tensor) -> Result<Tensor> {
    const OP: &str = "gated_residual";
    let [m, d] = dims(OP, "x [rows, channels]", x)?;
    expect(OP, "branch", branch, &[m, d])?;
    expect(OP, "gate", gate, &[d])?;
    let gate: Vec<f32> = slice(OP, gate)?.iter().map(|&gate| f64::from(gate).tanh() as f32).collect();
    let (x, branch) = (slice(OP, x)?, slice(OP, branch)?);
    let (x, branch): (&[f32], &[f32]) = (&x, &branch);
    let mut out = room(m * d);
    pool.rows(&mut out, d, 6, |row0, run| {
        wide(
            #[inline(always)]
            || {
                let inputs = x[row0 * d..].chunks_exact(d).zip(branch[row0 * d..].chunks_exact(d));
                for (out, (x, branch)) in run.chunks_exact_mut(d).zip(inputs) {
                    let inverse = inverse_rms(branch, EPS);
                    for (((out, x), branch), gate) in out.iter_mut().zip(x).zip(branch).zip(&gate) {
                        *out = x + branch * inverse * gate;
                    }
                }
            },
        );
    });
    from_vec(OP, out, &[m, d])
}

pub(super) fn modulated_layer_norm(pool: &Pool, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    const OP: &str = "modulated_layer_norm";
    let [m, d] = dims(OP, "x [rows, channels]", x)?;
    expect(OP, "shift", shift, &[d])?;
    expect(OP, "scale", scale, &[d])?;
    let factor: Vec<f32> = slice(OP, scale)?.iter().map(|scale| 1.0 + scale).collect();
    let (x, shift) = (slice(OP, x)?, slice(OP, shift)?);
    let (x, shift): (&[f32], &[f32]) = (&x, &shift);
    let mut out = room(m * d);
    pool.rows(&mut out, d, 8, |row0, run| {
        wide(
            #[inline(always)]
            || {
                for (out, x) in run.chunks_exact_mut(d).zip(x[row0 * d..].chunks_exact(d)) {
                    let mean = sum_f64(x, |x| x) / d as f64;
                    let variance = sum_f64(x, |x| (x - mean) * (x - mean)) / d as f64;
                    let (mean, inverse) = (mean as f32, (1.0 / (variance + EPS).sqrt()) as f32);
                    for (((out, x), factor), shift) in out.iter_mut().zip(x).zip(&factor).zip(shift) {
                        *out = (x - mean) * inverse * factor + shift;
                    }
                }
            },
        );
    });
    from_vec(OP, out, &[m, d])
}
