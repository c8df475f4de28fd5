//! `x · Wᵀ + b`, in blocks of the `gemm` crate.

use std::ops::Range;
use std::slice::from_raw_parts_mut;

use candle_core::Tensor;

use super::data::{dims, expect, from_vec, shape_error, slice};
use super::pool::Pool;
use super::wide::{dot, wide};
use crate::engine::Result;
use crate::parallel::shard::Split;

/// Rows and columns of a task. A task repacks its share of the weight and of x, which `ROWS`, `COLUMNS` multiplications
/// per element outweigh. Half of `ROWS` is more than [`MIN_OUTPUT`], so that no block of an output with few columns falls
/// below it.
const ROWS: usize = 528;
const COLUMNS: usize = 512;
/// gemm sums the products of a small output, and of a single row, in orders of their own; above this many values it
/// does not. Fewer rows are padded with zeros.
const MIN_OUTPUT: usize = 256;
/// gemm cuts deeper sums into runs whose length depends on the other sizes as well. Up to this depth it cuts nothing.
const DEPTH: usize = 512;

/// A matrix in memory that is someone else's: element (i, j) at `i·row + j·column`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub values: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// The transposed matrix, same memory.
    pub fn t(self) -> Matrix<'a> {
        Matrix {
            values: self.values,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    fn fits(&self) -> bool {
        self.rows == 0
            || self.columns == 0
            || (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride < self.values.len()
    }
}

/// `out = scale · a·b`, or `out += scale · a·b` with `add`; `out` is `[a.rows, b.columns]`, contiguous.
/// Runs on the calling thread; the order of additions depends on the three sizes only.
///
/// # Panics
/// If the sizes do not fit each other or their slices, which is a bug of the caller.
pub(super) fn product(out: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, scale: f32, add: bool) {
    assert!(out.len() == a.rows * b.columns);
    // Safety: by the assertion the output lies in `out`, which is borrowed for us alone.
    unsafe { product_at(out.as_mut_ptr(), b.columns, a, b, scale, add) }
}

/// [`product`] to rows `out_stride` values apart.
///
/// # Safety
/// `a.rows` rows of `b.columns` values at `out` have to be valid for writes and not in use by anyone else.
unsafe fn product_at(out: *mut f32, out_stride: usize, a: Matrix<'_>, b: Matrix<'_>, scale: f32, add: bool) {
    assert!(a.fits() && b.fits() && b.rows == a.columns);
    // Safety: the caller vouches for `out`, the assertion for `a` and `b`. Strides are below lengths of slices, so they
    // fit isize.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out,
            1,
            out_stride as isize,
            add,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Start of an output that tasks fill in disjoint blocks.
#[derive(Clone, Copy)]
struct Output(*mut f32);
// Safety: `linear` gives every block of the output to exactly one task and outlives them all.
unsafe impl Send for Output {}
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    /// `offset` has to lie in the output.
    unsafe fn at(self, offset: usize) -> *mut f32 {
        // Safety: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

pub(super) fn linear(pool: &Pool, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    let [n, weight_k] = dims(OP, "weight [out, in]", weight)?;
    let (&k, rows) = x.dims().split_last().ok_or_else(|| shape_error(OP, "x [rows, in] or [in]", x.dims()))?;
    if k != weight_k || rows.len() > 1 {
        return Err(shape_error(OP, format!("x [rows, {weight_k}] or [{weight_k}] for this weight"), x.dims()));
    }
    if let Some(bias) = bias {
        expect(OP, "bias", bias, &[n])?;
    }
    let bias_slice = bias.map(|b| slice(OP, b)).transpose()?;
    let bias = bias_slice.as_deref();
    let (values, weight) = (slice(OP, x)?, slice(OP, weight)?);
    let (values, weight): (&[f32], &[f32]) = (&values, &weight);
    match rows {
        [m] => from_vec(OP, matrix(pool, values, *m, weight, [n, k], bias), &[*m, n]),
        _ => from_vec(OP, vector(pool, values, weight, n, bias), &[n]),
    }
}

/// A matrix-vector product reads every weight once; gemm does it at a fraction of the memory's rate.
fn vector(pool: &Pool, x: &[f32], weight: &[f32], n: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let mut out = vec![0f32; n];
    let k = x.len();
    pool.rows(&mut out, 1, k, |start, run| {
        let bias = bias.map(|bias| &bias[start..]);
        wide(
            #[inline(always)]
            || {
                for (j, out) in run.iter_mut().enumerate() {
                    let sum = dot(x, &weight[(start + j) * k..][..k]);
                    *out = bias.map_or(sum, |bias| sum + bias[j]);
                }
            },
        );
    });
    out
}

/// `[m, k] × [n, k] → [m, n]`. A row has the same bits for any number of rows: see [`MIN_OUTPUT`] and [`DEPTH`].
fn matrix(pool: &Pool, x: &[f32], m: usize, weight: &[f32], [n, k]: [usize; 2], bias: Option<&[f32]>) -> Vec<f32> {
    if m == 0 || n == 0 {
        return Vec::new();
    }
    let padded_rows = m.max(2).max(MIN_OUTPUT / n + 1);
    if m < padded_rows {
        let mut padded = vec![0f32; padded_rows * k];
        padded[..m * k].copy_from_slice(x);
        let mut out = matrix(pool, &padded, padded_rows, weight, [n, k], bias);
        out.truncate(m * n);
        return out;
    }
    let mut out = vec![0f32; m * n];
    let output = Output(out.as_mut_ptr());
    let grid: Vec<(Range<usize>, Range<usize>)> =
        blocks(m, ROWS).flat_map(|rows| blocks(n, COLUMNS).map(move |columns| (rows.clone(), columns))).collect();
    pool.run(grid, m * n * k, |(rows, columns)| {
        for depth in blocks(k, DEPTH) {
            let (a, w) = (rows_of(x, k, &rows, &depth), rows_of(weight, k, &columns, &depth));
            // Safety: rows and columns lie in [m, n], and no other task has this block.
            let at = unsafe { output.at(rows.start * n + columns.start) };
            // Safety: as above.
            unsafe { product_at(at, n, a, w.t(), 1.0, depth.start > 0) };
        }
        let Some(bias) = bias else { return };
        let bias = &bias[columns.clone()];
        wide(
            #[inline(always)]
            || {
                for row in rows {
                    // Safety: as above.
                    let out = unsafe { from_raw_parts_mut(output.at(row * n + columns.start), bias.len()) };
                    for (out, bias) in out.iter_mut().zip(bias) {
                        *out += bias;
                    }
                }
            },
        );
    });
    out
}

/// The given rows and columns of a row-major matrix that is `k` wide.
fn rows_of<'a>(values: &'a [f32], k: usize, rows: &Range<usize>, columns: &Range<usize>) -> Matrix<'a> {
    let values = &values[rows.start * k + columns.start..(rows.end - 1) * k + columns.end];
    Matrix { values, rows: rows.len(), columns: columns.len(), row_stride: k, column_stride: 1 }
}

/// `0..len` in even runs of at most `max`.
fn blocks(len: usize, max: usize) -> impl Iterator<Item = Range<usize>> {
    Split::new(len, len.div_ceil(max)).ranges()
}
