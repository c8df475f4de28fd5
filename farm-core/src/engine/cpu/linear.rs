//! `x · Wᵀ + b`.

use std::cell::Cell;
use std::ops::Range;

use candle_core::Tensor;

use super::Units;
use super::amx::{self, Tile};
use super::data::{dims, expect, from_vec, room, shape_error, slice, widen, zeros};
use super::pool::Pool;
use super::product::{CHAIN, Finish, PANEL, Panels, Rows, Target, product, transpose_panel};
use crate::engine::{RawTensor, Result};
use crate::parallel::shard::Split;

/// Rows and columns of a task: with [`DEPTH`] values of each row, its share of x, the output and a panel stay in the
/// second-level cache.
const ROWS: usize = 120;
const COLUMNS: usize = 8 * PANEL;
/// Deeper sums are cut into runs of so many products, whose part of a panel stays in the first-level cache or near it.
const DEPTH: usize = 8 * CHAIN;

/// Rows of a task on the matrix units, of which each splits the weights for itself, and its most panels.
const TOKEN_ROWS: usize = 256;
const TOKEN_PANELS: usize = 32;
/// Panels whose part of the output stays in the second-level cache from one run of depth to the next.
const TOKEN_GROUP: usize = 8;

/// A weight `[out, in]`, arranged for [`linear`].
pub struct Matrix {
    shape: [usize; 2],
    form: Form,
}

enum Form {
    /// For the vector units, and if `split` for the matrix units, where each value is split into three pieces as it is used.
    Panels { panels: Panels, split: bool },
    /// Rounded to bf16, for the matrix units: of each panel all steps.
    Rounded(Vec<Tile>),
}

/// Arranges a weight `[out, in]`.
pub(super) fn matrix(units: Units, weight: &Tensor) -> Result<Matrix> {
    const OP: &str = "matrix";
    let [n, k] = dims(OP, "weight [out, in]", weight)?;
    let values = slice(OP, weight)?;
    arrange(units, [k, n], |rows, to| {
        to.extend_from_slice(&values[rows.start * k..rows.end * k]);
        Ok(())
    })
}

/// Arranges a stored weight, pieces of `[out, in]` one above the other.
pub(super) fn stored_matrix(units: Units, pieces: &[RawTensor<'_>]) -> Result<Matrix> {
    const OP: &str = "stored_matrix";
    let width = |piece: &RawTensor<'_>| piece.shape.iter().skip(1).product::<usize>();
    let rows = |piece: &RawTensor<'_>| piece.shape.first().copied().unwrap_or(0);
    let k = pieces.first().map(width).ok_or_else(|| shape_error(OP, "at least one piece", &[0]))?;
    for piece in pieces {
        let bytes = (rows(piece) * k).checked_mul(piece.dtype.bytes());
        if width(piece) != k || bytes != Some(piece.bytes.len()) {
            return Err(shape_error(OP, format!("pieces of {k} columns, each with its bytes"), piece.shape));
        }
    }
    arrange(units, [k, pieces.iter().map(rows).sum()], |wanted, to| {
        let mut first = 0;
        for piece in pieces {
            let own = wanted.start.max(first)..wanted.end.min(first + rows(piece));
            if own.start < own.end {
                let row = k * piece.dtype.bytes();
                let bytes = &piece.bytes[(own.start - first) * row..(own.end - first) * row];
                widen(OP, &RawTensor { dtype: piece.dtype, shape: &[own.len(), k], bytes }, to)?;
            }
            first += rows(piece);
        }
        Ok(())
    })
}

/// A matrix `[k, n]` from the rows of its transposed one, of which `rows` appends some.
fn arrange(
    units: Units,
    [k, n]: [usize; 2],
    rows: impl Fn(Range<usize>, &mut Vec<f32>) -> Result<()>,
) -> Result<Matrix> {
    let mut some = Vec::new();
    let mut panel = |panel: usize, to: &mut [f32]| {
        let wanted = panel * PANEL..n.min((panel + 1) * PANEL);
        some.clear();
        rows(wanted.clone(), &mut some)?;
        transpose_panel(&some, wanted.len(), k, to);
        Ok(())
    };
    let form = match units {
        Units::Rounded => {
            let each = amx::right_tiles(k, 1, 1);
            let mut tiles: Vec<Tile> = zeros(each * n.div_ceil(PANEL));
            for (i, to) in tiles.chunks_exact_mut(each.max(1)).enumerate() {
                let mut values = vec![0f32; k * PANEL];
                panel(i, &mut values)?;
                amx::arrange_right::<1>(&values, to);
            }
            Form::Rounded(tiles)
        }
        Units::Vectors | Units::Split => {
            let mut panels = Panels::zeros(k, n);
            for (i, to) in panels.iter_mut().enumerate() {
                panel(i, to)?;
            }
            Form::Panels { panels, split: units == Units::Split }
        }
    };
    Ok(Matrix { shape: [k, n], form })
}

pub(super) fn linear(pool: &Pool, x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    let [weight_k, n] = weight.shape;
    let (&k, rows) = x.dims().split_last().ok_or_else(|| shape_error(OP, "x [rows, in] or [in]", x.dims()))?;
    if k != weight_k || rows.len() > 1 {
        return Err(shape_error(OP, format!("x [rows, {weight_k}] or [{weight_k}] for this weight"), x.dims()));
    }
    if let Some(bias) = bias {
        expect(OP, "bias", bias, &[n])?;
    }
    let bias = bias.map(|b| slice(OP, b)).transpose()?;
    let m = rows.first().copied().unwrap_or(1);
    let (x, bias) = (&slice(OP, x)?[..], bias.as_deref());
    let out = match &weight.form {
        Form::Panels { panels, split: false } => rows_times(pool, x, m, panels, bias),
        Form::Panels { panels, split: true } => tokens_times::<3>(pool, x, [m, k, n], bias, Right::Panels(panels)),
        Form::Rounded(tiles) => tokens_times::<1>(pool, x, [m, k, n], bias, Right::Tiles(tiles)),
    };
    let mut shape = rows.to_vec();
    shape.push(n);
    from_vec(OP, out, &shape)
}

/// `[m, k] × [k, n] → [m, n]`.
fn rows_times(pool: &Pool, x: &[f32], m: usize, weight: &Panels, bias: Option<&[f32]>) -> Vec<f32> {
    let [k, n] = weight.shape();
    let mut out = room(m * n);
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

/// Weights for the matrix units.
#[derive(Clone, Copy)]
enum Right<'a> {
    /// To be split.
    Panels(&'a Panels),
    /// `[panels][steps]` of one piece.
    Tiles(&'a [Tile]),
}

impl<'a> Right<'a> {
    /// Tiles of `P` pieces of some of a panel's depth, in `scratch` if they have to be made.
    fn tiles<'s, const P: usize>(
        self,
        panel: usize,
        k: usize,
        depth: Range<usize>,
        scratch: &'s mut [Tile],
    ) -> &'s [Tile]
    where
        'a: 's,
    {
        match self {
            Self::Panels(panels) => {
                let scratch = &mut scratch[..amx::right_tiles(depth.len(), 1, P)];
                amx::arrange_right::<P>(panels.view().part(depth).panel(panel), scratch);
                scratch
            }
            Self::Tiles(tiles) => {
                let (all, before) = (amx::right_tiles(k, 1, P), amx::right_tiles(depth.start, 1, P));
                &tiles[panel * all + before..][..amx::right_tiles(depth.len(), 1, P)]
            }
        }
    }
}

thread_local! {
    /// Rows of a thread's task, kept from task to task: fresh memory costs a fault a page.
    static LEFT: Cell<Vec<Vec<Tile>>> = const { Cell::new(Vec::new()) };
}

/// As [`rows_times`] on the matrix units, `P` pieces a value.
fn tokens_times<const P: usize>(
    pool: &Pool,
    x: &[f32],
    [m, k, n]: [usize; 3],
    bias: Option<&[f32]>,
    right: Right<'_>,
) -> Vec<f32> {
    let mut out = room(m * n);
    if out.is_empty() {
        return out;
    }
    let start = Target { start: out.as_mut_ptr(), stride: n };
    let grid: Vec<(Range<usize>, Range<usize>)> = blocks(m, TOKEN_ROWS)
        .flat_map(|rows| blocks(n.div_ceil(PANEL), TOKEN_PANELS).map(move |p| (rows.clone(), p)))
        .collect();
    pool.run(grid, m * n * k, |(rows, panels)| {
        let runs: Vec<Range<usize>> =
            (0..k.max(1)).step_by(amx::DEPTH).map(|first| first..k.min(first + amx::DEPTH)).collect();
        let mut left = LEFT.take();
        left.resize_with(runs.len().max(left.len()), Vec::new);
        for (depth, left) in runs.iter().zip(&mut left[..]) {
            let from = &x[rows.start * k + depth.start..];
            amx::arrange_left::<P>(from, k, [rows.len(), depth.len()], left);
        }
        let tiles = amx::Configured::new();
        let mut split = vec![Tile::default(); amx::right_tiles(amx::DEPTH.min(k), 1, P)];
        for group in panels.clone().step_by(TOKEN_GROUP) {
            for (depth, left) in runs.iter().zip(&left[..]) {
                for panel in group..panels.end.min(group + TOKEN_GROUP) {
                    let right = right.tiles::<P>(panel, k, depth.clone(), &mut split);
                    let (column, width) = (panel * PANEL, PANEL.min(n - panel * PANEL));
                    let bias = bias.filter(|_| depth.end == k).map(|bias| &bias[column..]);
                    let finish = Finish { add: depth.start > 0, bias };
                    // Safety: rows and columns lie in [m, n], and no other task has them.
                    unsafe {
                        let out = start.at(rows.start, column);
                        amx::product::<P>(&tiles, left, right, [rows.len(), width], out, finish);
                    }
                }
            }
        }
        LEFT.set(left);
    });
    out
}

/// `0..len` in even runs of at most `max`.
fn blocks(len: usize, max: usize) -> impl Iterator<Item = Range<usize>> {
    Split::new(len, len.div_ceil(max)).ranges()
}
