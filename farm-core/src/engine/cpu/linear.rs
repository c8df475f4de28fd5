//! `x · Wᵀ + b`.

use std::ops::Range;

use candle_core::Tensor;

use super::data::{dims, expect, from_vec, shape_error, slice};
use super::pool::Pool;
use super::product::{CHAIN, Finish, PANEL, Panels, Rows, Target, product};
use crate::engine::Result;
use crate::parallel::shard::Split;

/// Rows and columns of a task: with [`DEPTH`] values of each row, its share of x, the output and a panel stay in the
/// second-level cache.
const ROWS: usize = 120;
const COLUMNS: usize = 8 * PANEL;
/// Deeper sums are cut into runs of so many products, whose part of a panel stays in the first-level cache or near it.
const DEPTH: usize = 8 * CHAIN;

/// A weight `[out, in]`, arranged for [`linear`].
pub struct Matrix(Panels);

/// Arranges a weight `[out, in]`. Exact.
pub(super) fn matrix(weight: &Tensor) -> Result<Matrix> {
    const OP: &str = "matrix";
    let [n, k] = dims(OP, "weight [out, in]", weight)?;
    Ok(Matrix(Panels::of_transposed(&slice(OP, weight)?, [n, k], k)))
}

pub(super) fn linear(pool: &Pool, x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    let [weight_k, n] = weight.0.shape();
    let (&k, rows) = x.dims().split_last().ok_or_else(|| shape_error(OP, "x [rows, in] or [in]", x.dims()))?;
    if k != weight_k || rows.len() > 1 {
        return Err(shape_error(OP, format!("x [rows, {weight_k}] or [{weight_k}] for this weight"), x.dims()));
    }
    if let Some(bias) = bias {
        expect(OP, "bias", bias, &[n])?;
    }
    let bias = bias.map(|b| slice(OP, b)).transpose()?;
    let m = rows.first().copied().unwrap_or(1);
    let out = rows_times(pool, &slice(OP, x)?, m, &weight.0, bias.as_deref());
    let mut shape = rows.to_vec();
    shape.push(n);
    from_vec(OP, out, &shape)
}

/// `[m, k] × [k, n] → [m, n]`.
fn rows_times(pool: &Pool, x: &[f32], m: usize, weight: &Panels, bias: Option<&[f32]>) -> Vec<f32> {
    let [k, n] = weight.shape();
    let mut out = vec![0f32; m * n];
    if out.is_empty() {
        return out;
    }
    let start = Target { start: out.as_mut_ptr(), stride: n };
    let grid: Vec<(Range<usize>, Range<usize>)> = blocks(m, ROWS)
        .flat_map(|rows| blocks(n.div_ceil(PANEL), COLUMNS / PANEL).map(move |p| (rows.clone(), p)))
        .collect();
    pool.run(grid, m * n * k, |(rows, panels)| {
        // Of no depth, the output is the bias.
        for first in (0..k.max(1)).step_by(DEPTH) {
            let run = first..k.min(first + DEPTH);
            let run_of_x = (&x[rows.start * k + run.start..], run.len());
            let left = Rows { count: rows.len(), stride: k, runs: &[run_of_x] };
            let finish = Finish { add: run.start > 0, bias: bias.filter(|_| run.end == k) };
            // Safety: rows and columns lie in [m, n], and no other task has them.
            unsafe {
                let out = start.at(rows.start, panels.start * PANEL);
                product(left, weight.view().part(run.clone()), panels.clone(), out, finish);
            }
        }
    });
    out
}

/// `0..len` in even runs of at most `max`.
fn blocks(len: usize, max: usize) -> impl Iterator<Item = Range<usize>> {
    Split::new(len, len.div_ceil(max)).ranges()
}
