//! Softmax attention over blocks of keys, with an online softmax: nothing of size queries × keys is stored.
//!
//! Keys and values are arranged for products once, some heads at a time, and then read by every block of queries.

use std::ops::Range;

use candle_core::Tensor;

use super::Units;
use super::amx::{self, Tile};
use super::data::{dims, expect, from_vec, room, shape_error, slice, zeros};
use super::pool::Pool;
use super::product::{Finish, PANEL, PanelsView, Rows, Target, product, transpose_panel};
use super::wide::{exp, exp_minus, max, wide};
use crate::engine::{AttentionOut, Result};

/// Queries of a task, and keys of a block. Their scores (128 KiB) and the block's keys and values stay in the second-level
/// cache.
const QUERIES: usize = 128;
const KEYS: usize = 8 * PANEL;
/// Heads are arranged together while their keys and values take at most so many bytes.
const ARRANGED: usize = 64 << 20;

/// `[rows, heads, d]`, or `[rows, heads·d]`.
#[derive(Clone, Copy)]
struct Stream<'a> {
    values: &'a [f32],
    rows: usize,
    heads: usize,
    d: usize,
}

pub(super) fn attention(
    pool: &Pool,
    units: Units,
    q: &Tensor,
    keys: &[&Tensor],
    values: &[&Tensor],
) -> Result<AttentionOut<Tensor>> {
    const OP: &str = "attention";
    let [queries, heads, d] = dims(OP, "q [rows, heads, head_dim]", q)?;
    if keys.len() != values.len() {
        return Err(shape_error(OP, format!("{} value segments", keys.len()), &[values.len()]));
    }
    let mut slices = Vec::with_capacity(keys.len());
    for (key, value) in keys.iter().zip(values) {
        let [rows, _, _] = dims(OP, "keys [rows, heads, head_dim]", key)?;
        expect(OP, "keys", key, &[rows, heads, d])?;
        expect(OP, "values", value, &[rows, heads, d])?;
        slices.push((slice(OP, key)?, slice(OP, value)?, rows));
    }
    let stream = |values, rows| Stream { values, rows, heads, d };
    let segments: Vec<_> = slices.iter().map(|(k, v, rows)| [stream(k, *rows), stream(v, *rows)]).collect();
    let q = slice(OP, q)?;
    let scale = 1.0 / (d as f64).sqrt();
    let (out, lse) = blockwise(pool, units, stream(&q, queries), &segments, scale as f32, None);
    Ok(AttentionOut { out: from_vec(OP, out, &[queries, heads * d])?, lse: from_vec(OP, lse, &[queries, heads])? })
}

pub(super) fn t5_attention(pool: &Pool, qkv: [&Tensor; 3], bias: &Tensor, heads: usize) -> Result<Tensor> {
    const OP: &str = "t5_attention";
    let [rows, width] = dims(OP, "q [rows, heads·d]", qkv[0])?;
    if heads == 0 || width % heads != 0 {
        return Err(shape_error(OP, format!("q [rows, {heads}·d]"), qkv[0].dims()));
    }
    expect(OP, "k", qkv[1], &[rows, width])?;
    expect(OP, "v", qkv[2], &[rows, width])?;
    expect(OP, "bias", bias, &[heads, rows, rows])?;
    let (q, k, v, bias) = (slice(OP, qkv[0])?, slice(OP, qkv[1])?, slice(OP, qkv[2])?, slice(OP, bias)?);
    let stream = |values| Stream { values, rows, heads, d: width / heads };
    let (out, _) = blockwise(pool, Units::Vectors, stream(&q), &[[stream(&k), stream(&v)]], 1.0, Some(&bias));
    from_vec(OP, out, &[rows, width])
}

/// In f64 per value, rounded once at the end.
pub(super) fn merge(pool: &Pool, a: &AttentionOut<Tensor>, b: &AttentionOut<Tensor>) -> Result<AttentionOut<Tensor>> {
    const OP: &str = "merge_attention";
    let [rows, heads] = dims(OP, "lse [rows, heads]", &a.lse)?;
    let [_, width] = dims(OP, "out [rows, heads·head_dim]", &a.out)?;
    if heads == 0 || width % heads != 0 {
        return Err(shape_error(OP, format!("out [{rows}, {heads}·head_dim]"), a.out.dims()));
    }
    expect(OP, "out", &a.out, &[rows, width])?;
    expect(OP, "out", &b.out, &[rows, width])?;
    expect(OP, "lse", &b.lse, &[rows, heads])?;
    let (a_out, a_lse, b_out, b_lse) = (slice(OP, &a.out)?, slice(OP, &a.lse)?, slice(OP, &b.out)?, slice(OP, &b.lse)?);
    let (a_out, a_lse, b_out, b_lse): (&[f32], &[f32], &[f32], &[f32]) = (&a_out, &a_lse, &b_out, &b_lse);
    // The share of `a` in the result, and the log-sum-exp of both.
    let weigh = |i: usize| {
        let (a, b) = (f64::from(a_lse[i]), f64::from(b_lse[i]));
        let max = a.max(b);
        if max == f64::NEG_INFINITY {
            // Neither has a key.
            return (1.0, max);
        }
        let (wa, wb) = ((a - max).exp(), (b - max).exp());
        (wa / (wa + wb), max + (wa + wb).ln())
    };
    let mut out = room(rows * width);
    let d = width / heads;
    pool.rows(&mut out, width, 4, |row0, run| {
        for (head, out) in (row0 * heads..).zip(run.chunks_exact_mut(d)) {
            let (share, _) = weigh(head);
            let at = head * d..(head + 1) * d;
            for ((out, a), b) in out.iter_mut().zip(&a_out[at.clone()]).zip(&b_out[at]) {
                *out = (share * f64::from(*a) + (1.0 - share) * f64::from(*b)) as f32;
            }
        }
    });
    let lse = (0..rows * heads).map(|i| weigh(i).1 as f32).collect();
    Ok(AttentionOut { out: from_vec(OP, out, &[rows, width])?, lse: from_vec(OP, lse, &[rows, heads])? })
}

/// Keys and values of some heads of one segment, as right-hand matrices of products: of each head `[d, rows]` in panels of
/// keys, and `[rows, d]` in panels of channels.
struct Arranged {
    rows: usize,
    d: usize,
    form: Form,
}

enum Form {
    Panels {
        keys: Vec<f32>,
        values: Vec<f32>,
    },
    /// For the matrix units.
    Tiles {
        keys: Vec<Tile>,
        values: Vec<Tile>,
        pieces: usize,
    },
}

/// Fills a panel, by its number.
type Fill<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

impl Arranged {
    fn new(pool: &Pool, units: Units, [k, v]: [Stream<'_>; 2], heads: Range<usize>) -> Self {
        let Stream { rows, d, .. } = k;
        let stride = k.heads * d;
        let (key_panels, value_panels) = (rows.div_ceil(PANEL), d.div_ceil(PANEL));
        let keys = |i: usize, to: &mut [f32]| {
            let (head, row) = (heads.start + i / key_panels, i % key_panels * PANEL);
            transpose_panel(&k.values[row * stride + head * d..], PANEL.min(rows - row), stride, to);
        };
        let values = |i: usize, to: &mut [f32]| {
            let (head, channel) = (heads.start + i / value_panels, i % value_panels * PANEL);
            let width = PANEL.min(d - channel);
            for (to, row) in to.chunks_exact_mut(PANEL).zip(v.values.chunks_exact(stride)) {
                to[..width].copy_from_slice(&row[head * d + channel..][..width]);
            }
        };
        let (key_panels, value_panels) = (heads.len() * key_panels, heads.len() * value_panels);
        fn tiles<const P: usize>(
            pool: &Pool,
            [keys, values]: [&Fill<'_>; 2],
            [key_panels, value_panels, rows, d]: [usize; 4],
        ) -> Form {
            let of = |panels, depth: usize, fill: &Fill<'_>| {
                arrange(pool, panels, amx::right_tiles(depth, 1, P), |i, to| {
                    let mut panel = vec![0f32; depth * PANEL];
                    fill(i, &mut panel);
                    amx::arrange_right::<P>(&panel, to);
                })
            };
            Form::Tiles { keys: of(key_panels, d, keys), values: of(value_panels, rows, values), pieces: P }
        }
        let sizes = [key_panels, value_panels, rows, d];
        let form = match units {
            Units::Vectors | Units::Halves => Form::Panels {
                keys: arrange(pool, key_panels, d * PANEL, keys),
                values: arrange(pool, value_panels, rows * PANEL, values),
            },
            Units::Split => tiles::<3>(pool, [&keys, &values], sizes),
            Units::Rounded => tiles::<1>(pool, [&keys, &values], sizes),
        };
        Self { rows, d, form }
    }

    /// Scores of queries with some keys of the `i`-th head, in rows of [`KEYS`]. `keys` begins at a multiple of that.
    fn score(&self, i: usize, queries: &Queries<'_>, keys: Range<usize>, scores: &mut [f32]) {
        let panels = keys.start / PANEL..keys.end.div_ceil(PANEL);
        assert!(scores.len() == queries.count * KEYS && keys.len() <= KEYS);
        let to = Target { start: scores.as_mut_ptr(), stride: KEYS };
        let of_head = self.rows.div_ceil(PANEL);
        match &self.form {
            Form::Panels { keys, .. } => {
                let len = of_head * PANEL * self.d;
                let values = &keys[i * len..][..len];
                let view = PanelsView { values, whole: self.d, columns: self.rows, depth: 0..self.d };
                let rows = Rows { count: queries.count, stride: queries.stride, runs: &[(queries.values, self.d)] };
                // Safety: the scores have `count` rows of KEYS values.
                unsafe { product(rows, view, panels, to, Finish::STORE) };
            }
            Form::Tiles { keys, pieces, .. } => {
                let units = amx::Configured::new();
                let each = amx::right_tiles(self.d, 1, *pieces);
                for (column, panel) in panels.enumerate() {
                    let right = &keys[(i * of_head + panel) * each..][..each];
                    let sizes = [queries.count, PANEL.min(self.rows - panel * PANEL)];
                    // Safety: as above.
                    unsafe {
                        amx::product_of(
                            *pieces,
                            &units,
                            &queries.tiles,
                            right,
                            sizes,
                            to.at(0, column * PANEL),
                            Finish::STORE,
                        )
                    };
                }
            }
        }
    }

    /// Adds the values of some keys of the `i`-th head, weighted by rows of [`KEYS`], to rows of `out`. `tiles` is scratch.
    ///
    /// # Safety
    /// As many rows of `d` values have to be valid at `out`, and in use by nobody else.
    unsafe fn mix(&self, i: usize, weights: &[f32], keys: Range<usize>, tiles: &mut Vec<Tile>, out: Target) {
        let (count, width) = (weights.len() / KEYS, keys.len());
        let of_head = self.d.div_ceil(PANEL);
        match &self.form {
            Form::Panels { values, .. } => {
                let len = of_head * PANEL * self.rows;
                let values = &values[i * len..][..len];
                let view = PanelsView { values, whole: self.rows, columns: self.d, depth: keys };
                let rows = Rows { count, stride: KEYS, runs: &[(weights, width)] };
                // Safety: the caller's promise.
                unsafe { product(rows, view, 0..of_head, out, Finish::ADD) };
            }
            Form::Tiles { values, pieces, .. } => {
                let units = amx::Configured::new();
                amx::arrange_left_of(*pieces, weights, KEYS, [count, width], tiles);
                let each = amx::right_tiles(self.rows, 1, *pieces);
                let (before, some) = (amx::right_tiles(keys.start, 1, *pieces), amx::right_tiles(width, 1, *pieces));
                for panel in 0..of_head {
                    let right = &values[(i * of_head + panel) * each + before..][..some];
                    let sizes = [count, PANEL.min(self.d - panel * PANEL)];
                    // Safety: the caller's promise.
                    unsafe {
                        amx::product_of(*pieces, &units, tiles, right, sizes, out.at(0, panel * PANEL), Finish::ADD)
                    };
                }
            }
        }
    }
}

/// `panels` panels of `each` values, filled in parallel.
fn arrange<T: Copy + Default + Send>(
    pool: &Pool,
    panels: usize,
    each: usize,
    fill: impl Fn(usize, &mut [T]) + Sync + Send,
) -> Vec<T> {
    let mut all = zeros(panels * each);
    if each > 0 {
        let work = all.len();
        pool.run(all.chunks_exact_mut(each).enumerate().collect(), work, |(i, to)| fill(i, to));
    }
    all
}

/// Some queries of one head: `count` rows, `stride` values apart.
struct Queries<'a> {
    values: &'a [f32],
    count: usize,
    stride: usize,
    /// The same for the matrix units, where they are used.
    tiles: Vec<Tile>,
}

/// Output `[queries, heads·d]` and log-sum-exp `[queries, heads]`. A query without any key gives 0 and -∞, which is
/// neutral when results are merged. `bias` is `[heads, queries, keys]` over a single segment.
fn blockwise(
    pool: &Pool,
    units: Units,
    q: Stream<'_>,
    segments: &[[Stream<'_>; 2]],
    scale: f32,
    bias: Option<&[f32]>,
) -> (Vec<f32>, Vec<f32>) {
    let Stream { rows: queries, heads, d, .. } = q;
    let mut out = zeros(queries * heads * d);
    let mut lse = vec![f32::NEG_INFINITY; queries * heads];
    let keys: usize = segments.iter().map(|[k, _]| k.rows).sum();
    if out.is_empty() || keys == 0 {
        return (out, lse);
    }
    let bytes = 2 * size_of::<f32>() * keys * d;
    let at_once = (ARRANGED / bytes).clamp(1, heads);
    let out_at = Target { start: out.as_mut_ptr(), stride: heads * d };
    let lse_at = Target { start: lse.as_mut_ptr(), stride: heads };
    for first in (0..heads).step_by(at_once) {
        let some = first..heads.min(first + at_once);
        let arranged: Vec<_> = segments.iter().map(|kv| Arranged::new(pool, units, *kv, some.clone())).collect();
        let blocks = some.clone().flat_map(|head| (0..queries).step_by(QUERIES).map(move |start| (head, start)));
        pool.run(blocks.collect(), 2 * some.len() * queries * keys * d, |(head, start)| {
            let block = Block {
                q,
                rows: start..queries.min(start + QUERIES),
                head,
                arranged: &arranged,
                index: head - first,
                scale,
                bias: bias.map(|bias| &bias[head * queries * keys..][..queries * keys]),
            };
            // Safety: no other task has these rows of this head, and both vectors outlive the tasks.
            unsafe { block.attend(out_at.at(start, head * d), lse_at.at(start, head)) }
        });
    }
    (out, lse)
}

/// Some queries of one head.
struct Block<'a> {
    q: Stream<'a>,
    rows: Range<usize>,
    head: usize,
    arranged: &'a [Arranged],
    /// Of the head among those that are arranged.
    index: usize,
    scale: f32,
    /// `[queries, keys]` of this head.
    bias: Option<&'a [f32]>,
}

impl Block<'_> {
    /// Output `[rows, d]`, zero at first, and log-sum-exp `[rows, 1]`.
    ///
    /// # Safety
    /// Both have to be valid for writes and in use by nobody else.
    unsafe fn attend(&self, out: Target, lse: Target) {
        let Stream { values, heads, d, .. } = self.q;
        let (count, stride) = (self.rows.len(), heads * d);
        let mut queries =
            Queries { values: &values[self.rows.start * stride + self.head * d..], count, stride, tiles: Vec::new() };
        if let Some(Form::Tiles { pieces, .. }) = self.arranged.first().map(|segment| &segment.form) {
            amx::arrange_left_of(*pieces, queries.values, stride, [count, d], &mut queries.tiles);
        }
        let mut scores = vec![0f32; count * KEYS];
        let mut weights = Vec::new();
        // Running maximum and Σ e^(score − maximum) of every query.
        let mut running = vec![(f32::NEG_INFINITY, 0f64); count];
        for segment in self.arranged {
            for start in (0..segment.rows).step_by(KEYS) {
                let keys = start..segment.rows.min(start + KEYS);
                segment.score(self.index, &queries, keys.clone(), &mut scores);
                // Safety: the caller's promise.
                unsafe {
                    self.soften(&mut scores, keys.clone(), &mut running, out);
                    segment.mix(self.index, &scores, keys, &mut weights, out);
                }
            }
        }
        for (i, (maximum, sum)) in running.into_iter().enumerate() {
            // Safety: the caller's promise.
            let (out, lse) = unsafe { (row_of(out, i, d), lse.at(i, 0).start) };
            let inverse = (1.0 / sum) as f32;
            out.iter_mut().for_each(|out| *out *= inverse);
            // Safety: the caller's promise.
            unsafe { *lse = (f64::from(maximum) + sum.ln()) as f32 };
        }
    }

    /// Scores of a block of keys → e^(scale·score + bias − maximum); the output so far is brought to the new maximum.
    ///
    /// # Safety
    /// As for [`Block::attend`].
    unsafe fn soften(&self, scores: &mut [f32], keys: Range<usize>, running: &mut [(f32, f64)], out: Target) {
        let (scale, width) = (self.scale, keys.len());
        wide(
            #[inline(always)]
            || {
                for (i, (scores, (maximum, sum))) in scores.chunks_exact_mut(KEYS).zip(running).enumerate() {
                    let scores = &mut scores[..width];
                    if let Some(bias) = self.bias {
                        let row = (self.rows.start + i) * self.arranged[0].rows;
                        for (score, bias) in scores.iter_mut().zip(&bias[row + keys.start..]) {
                            *score += bias;
                        }
                    }
                    let highest = (max(scores) * scale).max(*maximum);
                    let added = exp_minus(scores, scale, highest);
                    if highest > *maximum {
                        let shrink = exp(*maximum - highest);
                        *sum *= f64::from(shrink);
                        // Safety: the caller's promise.
                        unsafe { row_of(out, i, self.q.d) }.iter_mut().for_each(|out| *out *= shrink);
                        *maximum = highest;
                    }
                    *sum += f64::from(added);
                }
            },
        );
    }
}

/// # Safety
/// The row has to have `len` values that are valid for reads and writes and in use by nobody else.
#[inline(always)]
unsafe fn row_of<'a>(target: Target, row: usize, len: usize) -> &'a mut [f32] {
    // Safety: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(target.at(row, 0).start, len) }
}
