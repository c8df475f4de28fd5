//! `x · Wᵀ + b`, in blocks of the `gemm` crate.

use std::ops::Range;
use std::slice::from_raw_parts_mut;

use candle_core::Tensor;

use super::data::{dims, expect, from_vec, shape_error, slice};
use super::pool::Pool;
use super::wide::{dot, wide};
use crate::engine::Result;

/// Rows and columns of a task. A task repacks its share of the weight and of x, which `ROWS`, `COLUMNS` multiplications
/// per element outweigh.
const ROWS: usize = 512;
const COLUMNS: usize = 512;

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
    let [m, k] = dims(OP, "x [rows, in]", x)?;
    let [n, weight_k] = dims(OP, "weight [out, in]", weight)?;
    if k != weight_k {
        return Err(shape_error(OP, format!("weight [out, {k}] for x {:?}", x.dims()), weight.dims()));
    }
    if let Some(bias) = bias {
        expect(OP, "bias", bias, &[n])?;
    }
    let bias_slice = bias.map(|b| slice(OP, b)).transpose()?;
    let bias = bias_slice.as_deref();
    let (x, weight) = (slice(OP, x)?, slice(OP, weight)?);
    let (x, weight): (&[f32], &[f32]) = (&x, &weight);

    let mut out = vec![0f32; m * n];
    if m == 1 {
        // A matrix-vector product reads every weight once; gemm does it at a fraction of the memory's rate.
        pool.rows(&mut out, 1, k, |start, run| one_row(x, &weight[start * k..], bias.map(|bias| &bias[start..]), run));
        return from_vec(OP, out, &[m, n]);
    }
    let output = Output(out.as_mut_ptr());
    let grid: Vec<(Range<usize>, Range<usize>)> =
        blocks(m, ROWS).flat_map(|rows| blocks(n, COLUMNS).map(move |columns| (rows.clone(), columns))).collect();
    pool.run(grid, m * n * k, |(rows, columns)| {
        let a = Matrix {
            values: &x[rows.start * k..rows.end * k],
            rows: rows.len(),
            columns: k,
            row_stride: k,
            column_stride: 1,
        };
        let w = Matrix {
            values: &weight[columns.start * k..columns.end * k],
            rows: columns.len(),
            columns: k,
            row_stride: k,
            column_stride: 1,
        };
        // Safety: rows and columns lie in [m, n], and no other task has this block.
        unsafe { product_at(output.at(rows.start * n + columns.start), n, a, w.t(), 1.0, false) };
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
    from_vec(OP, out, &[m, n])
}

/// `out[j] = x · weight[j] + bias[j]`.
fn one_row(x: &[f32], weight: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
    wide(
        #[inline(always)]
        || {
            for (j, out) in out.iter_mut().enumerate() {
                let sum = dot(x, &weight[j * x.len()..][..x.len()]);
                *out = bias.map_or(sum, |bias| sum + bias[j]);
            }
        },
    );
}

/// `0..len` in equal runs of at most `max`.
fn blocks(len: usize, max: usize) -> impl Iterator<Item = Range<usize>> {
    let run = len.div_ceil(len.div_ceil(max).max(1)).max(1);
    (0..len).step_by(run).map(move |start| start..(start + run).min(len))
}
