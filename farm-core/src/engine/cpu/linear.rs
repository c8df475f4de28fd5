//! `x · Wᵀ + b`.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use half::bf16;

use super::Units;
use super::amx::{self, Tile};
use super::data::{Kept, dims, expect, from_vec, room, shape_error, slice, widen};
use super::pool::Pool;
use super::product::{CHAIN, Finish, PANEL, Panels, PanelsView, Rows, Target, product, transpose_panel};
use super::wide::{silu, wide};
use crate::engine::{RawTensor, Result};
use crate::parallel::shard::Split;

/// Rows and columns of a task: with [`DEPTH`] values of each row, its share of x, the output and a panel stay in the
/// second-level cache.
const ROWS: usize = 120;
const COLUMNS: usize = 8 * PANEL;
/// Deeper sums are cut into runs of so many products, whose part of a panel, 16 KiB, stays in the first-level cache.
const DEPTH: usize = 2 * CHAIN;

/// Rows of a task that computes all columns of a gated layer: its share of both halves stays in the caches.
const GATED_ROWS: usize = 60;

/// Rows of a task on the matrix units, of which each splits the weights for itself, and its most panels.
const TOKEN_ROWS: usize = 256;
const TOKEN_PANELS: usize = 32;
/// Panels whose part of the output stays in the second-level cache from one run of depth to the next.
const TOKEN_GROUP: usize = 8;

/// A weight `[out, in]`, arranged for [`linear`].
#[derive(Clone)]
pub struct Matrix {
    shape: [usize; 2],
    form: Arc<Form>,
}

enum Form {
    /// For the vector units, and if `split` for the matrix units, where each value is split into three pieces as it is used.
    Panels { panels: Panels, split: bool },
    /// Panels as in [`Panels`], rounded to bf16. A task widens what it is about to use.
    Halves(Kept<bf16>),
    /// Rounded to bf16, for the matrix units: of each panel all steps.
    Rounded(Kept<Tile>),
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
            let mut tiles: Kept<Tile> = Kept::zeros(each * n.div_ceil(PANEL));
            for (i, to) in tiles.chunks_exact_mut(each.max(1)).enumerate() {
                let mut values = vec![0f32; k * PANEL];
                panel(i, &mut values)?;
                amx::arrange_right::<1>(&values, to);
            }
            Form::Rounded(tiles)
        }
        Units::Halves => {
            let mut halves = Kept::<bf16>::zeros(n.div_ceil(PANEL) * k * PANEL);
            let mut values = vec![0f32; k * PANEL];
            for (i, to) in halves.chunks_exact_mut((k * PANEL).max(1)).enumerate() {
                values.fill(0.0);
                panel(i, &mut values)?;
                to.iter_mut().zip(&values).for_each(|(to, value)| *to = bf16::from_f32(*value));
            }
            Form::Halves(halves)
        }
        Units::Vectors | Units::Split => {
            let mut panels = Panels::zeros(k, n);
            for (i, to) in panels.iter_mut().enumerate() {
                panel(i, to)?;
            }
            Form::Panels { panels, split: units == Units::Split }
        }
    };
    Ok(Matrix { shape: [k, n], form: Arc::new(form) })
}

pub(super) fn linear(pool: &Pool, x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    let (rows, [m, k, n]) = sizes(OP, x, weight)?;
    if let Some(bias) = bias {
        expect(OP, "bias", bias, &[n])?;
    }
    let bias = bias.map(|b| slice(OP, b)).transpose()?;
    let (x, bias) = (&slice(OP, x)?[..], bias.as_deref());
    let mut out = room(m * n);
    let start = Target { start: out.as_mut_ptr(), stride: n };
    let [most_rows, most_panels] = weight.form.task();
    let grid: Vec<(Range<usize>, Range<usize>)> = blocks(m, most_rows)
        .flat_map(|rows| blocks(n.div_ceil(PANEL), most_panels).map(move |panels| (rows.clone(), panels)))
        .collect();
    pool.run(grid, m * n * k, |(rows, panels)| {
        // Safety: rows and columns lie in [m, n], and no other task has them.
        unsafe {
            let out = start.at(rows.start, panels.start * PANEL);
            weight.times(&Task { x: &x[rows.start * k..], rows: rows.len(), panels, bias, out });
        }
    });
    let mut shape = rows.to_vec();
    shape.push(n);
    from_vec(OP, out, &shape)
}

/// Both halves of the product stay with the task that computes them: of all tokens they are the largest values of a network.
pub(super) fn linear_swiglu(pool: &Pool, x: &Tensor, weight: &Matrix) -> Result<Tensor> {
    const OP: &str = "linear_swiglu";
    let (rows, [m, k, n]) = sizes(OP, x, weight)?;
    if n % 2 != 0 {
        return Err(shape_error(OP, "a weight [2·out, in]", &[n, k]));
    }
    let half = n / 2;
    let x = &slice(OP, x)?[..];
    let mut out = room(m * half);
    let start = Target { start: out.as_mut_ptr(), stride: half };
    let most_rows = if weight.form.on_tiles() { TOKEN_ROWS } else { GATED_ROWS };
    pool.run(blocks(m, most_rows).collect(), m * n * k, |rows| {
        let mut both = BOTH.take();
        both.resize((rows.len() * n).max(both.len()), 0.0);
        let out = Target { start: both.as_mut_ptr(), stride: n };
        let (x, panels) = (&x[rows.start * k..], 0..n.div_ceil(PANEL));
        // Safety: `both` has so many rows of n values.
        unsafe { weight.times(&Task { x, rows: rows.len(), panels, bias: None, out }) };
        wide(
            #[inline(always)]
            || {
                for (row, both) in rows.clone().zip(both.chunks_exact(n.max(1))) {
                    let (a, g) = both.split_at(half);
                    // Safety: the row is this task's.
                    let out = unsafe { std::slice::from_raw_parts_mut(start.at(row, 0).start, half) };
                    for ((out, a), g) in out.iter_mut().zip(a).zip(g) {
                        *out = silu(*a) * g;
                    }
                }
            },
        );
        BOTH.set(both);
    });
    let mut shape = rows.to_vec();
    shape.push(half);
    from_vec(OP, out, &shape)
}

/// The dimensions of x but the last, and `[m, k, n]` of the product.
fn sizes<'a>(op: &'static str, x: &'a Tensor, weight: &Matrix) -> Result<(&'a [usize], [usize; 3])> {
    let [k, n] = weight.shape;
    match x.dims().split_last() {
        Some((&width, rows)) if width == k && rows.len() <= 1 => Ok((rows, [rows.iter().product(), k, n])),
        _ => Err(shape_error(op, format!("x [rows, {k}] or [{k}] for this weight"), x.dims())),
    }
}

thread_local! {
    /// Memory of a thread's task, kept from task to task: fresh memory costs a fault a page. Here the tiles of its rows;
    static LEFT: Cell<Vec<Vec<Tile>>> = const { Cell::new(Vec::new()) };
    /// and here both halves of a gated layer.
    static BOTH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

impl Form {
    /// The most rows and panels of a task.
    fn task(&self) -> [usize; 2] {
        if self.on_tiles() { [TOKEN_ROWS, TOKEN_PANELS] } else { [ROWS, COLUMNS / PANEL] }
    }

    fn on_tiles(&self) -> bool {
        matches!(self, Self::Panels { split: true, .. } | Self::Rounded(_))
    }
}

/// Some rows and columns of a product.
struct Task<'a> {
    /// From the first row on, `k` values each.
    x: &'a [f32],
    rows: usize,
    panels: Range<usize>,
    /// Of all columns.
    bias: Option<&'a [f32]>,
    /// Of the first row and column.
    out: Target,
}

impl Matrix {
    /// On the calling thread.
    ///
    /// # Safety
    /// As for [`product`].
    unsafe fn times(&self, task: &Task<'_>) {
        // Safety: the caller's promise.
        unsafe {
            match &*self.form {
                Form::Panels { panels, split: false } => task.in_runs(self.shape[0], |x, depth, finish| {
                    product(x, panels.view().part(depth), task.panels.clone(), task.out, finish);
                }),
                Form::Halves(halves) => task.times_halves(self.shape, halves),
                Form::Panels { panels, split: true } => task.times_tiles::<3>(self.shape, Right::Panels(panels)),
                Form::Rounded(tiles) => task.times_tiles::<1>(self.shape, Right::Tiles(tiles)),
            }
        }
    }
}

impl<'a> Task<'a> {
    /// Runs of [`DEPTH`]: its values of x, which they are, and what becomes of their products.
    fn in_runs(&self, k: usize, mut run: impl FnMut(Rows<'_>, Range<usize>, Finish<'a>)) {
        // Of no depth, the output is the bias.
        for first in (0..k.max(1)).step_by(DEPTH) {
            let depth = first..k.min(first + DEPTH);
            let run_of_x = (&self.x[first..], depth.len());
            let x = Rows { count: self.rows, stride: k, runs: &[run_of_x] };
            let finish = Finish { add: first > 0, bias: self.bias.filter(|_| depth.end == k) };
            run(x, depth, finish);
        }
    }

    /// # Safety
    /// As for [`product`].
    unsafe fn times_halves(&self, [k, n]: [usize; 2], halves: &[bf16]) {
        let mut widened = [0f32; DEPTH * PANEL];
        self.in_runs(k, |x, depth, finish| {
            for panel in self.panels.clone() {
                let from = &halves[(panel * k + depth.start) * PANEL..][..depth.len() * PANEL];
                let values = &mut widened[..from.len()];
                wide(
                    #[inline(always)]
                    || {
                        values
                            .iter_mut()
                            .zip(from)
                            .for_each(|(to, from)| *to = f32::from_bits(u32::from(from.to_bits()) << 16))
                    },
                );
                let (column, columns) = (panel * PANEL, PANEL.min(n - panel * PANEL));
                let right = PanelsView { values, whole: depth.len(), columns, depth: 0..depth.len() };
                let finish = Finish { bias: finish.bias.map(|bias| &bias[column..][..columns]), ..finish };
                // Safety: the caller's promise.
                unsafe { product(x, right, 0..1, self.out.at(0, column - self.panels.start * PANEL), finish) };
            }
        });
    }

    /// On the matrix units, `P` pieces a value.
    ///
    /// # Safety
    /// As for [`product`].
    unsafe fn times_tiles<const P: usize>(&self, [k, n]: [usize; 2], right: Right<'_>) {
        let runs: Vec<Range<usize>> =
            (0..k.max(1)).step_by(amx::DEPTH).map(|first| first..k.min(first + amx::DEPTH)).collect();
        let mut left = LEFT.take();
        left.resize_with(runs.len().max(left.len()), Vec::new);
        for (depth, left) in runs.iter().zip(&mut left[..]) {
            amx::arrange_left::<P>(&self.x[depth.start..], k, [self.rows, depth.len()], left);
        }
        let tiles = amx::Configured::new();
        let mut split = vec![Tile::default(); amx::right_tiles(amx::DEPTH.min(k), 1, P)];
        for group in self.panels.clone().step_by(TOKEN_GROUP) {
            for (depth, left) in runs.iter().zip(&left[..]) {
                for panel in group..self.panels.end.min(group + TOKEN_GROUP) {
                    let right = right.tiles::<P>(panel, k, depth.clone(), &mut split);
                    let (column, width) = (panel * PANEL, PANEL.min(n - panel * PANEL));
                    let bias = self.bias.filter(|_| depth.end == k).map(|bias| &bias[column..]);
                    let finish = Finish { add: depth.start > 0, bias };
                    // Safety: the caller's promise.
                    unsafe {
                        let out = self.out.at(0, column - self.panels.start * PANEL);
                        amx::product::<P>(&tiles, left, right, [self.rows, width], out, finish);
                    }
                }
            }
        }
        LEFT.set(left);
    }
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

/// `0..len` in even runs of at most `max`.
fn blocks(len: usize, max: usize) -> impl Iterator<Item = Range<usize>> {
    Split::new(len, len.div_ceil(max).max(1)).ranges().filter(|block| !block.is_empty())
}
