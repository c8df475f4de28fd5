//! Softmax attention over blocks of keys, with an online softmax: nothing of size queries × keys is stored.

use candle_core::Tensor;

use super::data::{dims, expect, from_vec, shape_error, slice};
use super::linear::{Matrix, product};
use super::pool::Pool;
use super::wide::{exp, exp_minus, max, wide};
use crate::engine::{AttentionOut, Result};

/// Queries and keys of a tile. Its scores (128 KiB) and the key block stay in the second-level cache.
const QUERIES: usize = 128;
const KEYS: usize = 256;

/// Values of one head inside `[rows, heads, d]`.
#[derive(Clone, Copy)]
struct Stream<'a> {
    values: &'a [f32],
    rows: usize,
    heads: usize,
    d: usize,
}

impl<'a> Stream<'a> {
    /// Rows `start..start + rows` of one head.
    fn head(&self, head: usize, start: usize, rows: usize) -> Matrix<'a> {
        let row_stride = self.heads * self.d;
        let values = &self.values[start * row_stride + head * self.d..];
        Matrix { values, rows, columns: self.d, row_stride, column_stride: 1 }
    }
}

pub(super) fn attention(pool: &Pool, q: &Tensor, keys: &[&Tensor], values: &[&Tensor]) -> Result<AttentionOut<Tensor>> {
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
    let segments: Vec<_> = slices.iter().map(|(k, v, rows)| (stream(k, *rows), stream(v, *rows))).collect();
    let q = slice(OP, q)?;
    let scale = 1.0 / (d as f64).sqrt();
    let (out, lse) = blockwise(pool, stream(&q, queries), &segments, scale as f32, None);
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
    let (out, _) = blockwise(pool, stream(&q), &[(stream(&k), stream(&v))], 1.0, Some(&bias));
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
    let mut out = vec![0f32; rows * width];
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

/// Output `[queries, heads·d]` and log-sum-exp `[queries, heads]`. A query without any key gives 0 and -∞, which is
/// neutral when results are merged. `bias` is `[heads, queries, keys]` over a single segment.
fn blockwise(
    pool: &Pool,
    q: Stream<'_>,
    segments: &[(Stream<'_>, Stream<'_>)],
    scale: f32,
    bias: Option<&[f32]>,
) -> (Vec<f32>, Vec<f32>) {
    let Stream { rows: queries, heads, d, .. } = q;
    if queries == 0 || heads == 0 || d == 0 {
        return (vec![0.0; queries * heads * d], vec![f32::NEG_INFINITY; queries * heads]);
    }
    let keys: usize = segments.iter().map(|(k, _)| k.rows).sum();
    // Head by head, so that a task's output is contiguous.
    let mut by_head = vec![0f32; heads * queries * d];
    let mut lse_by_head = vec![0f32; heads * queries];
    let mut tasks = Vec::with_capacity(heads * queries.div_ceil(QUERIES));
    for (head, (out, lse)) in by_head.chunks_mut(queries * d).zip(lse_by_head.chunks_mut(queries)).enumerate() {
        for (block, (out, lse)) in out.chunks_mut(QUERIES * d).zip(lse.chunks_mut(QUERIES)).enumerate() {
            tasks.push((head, block * QUERIES, out, lse));
        }
    }
    pool.run(tasks, 2 * heads * queries * keys * d, |(head, start, out, lse)| {
        let tile = q.head(head, start, lse.len());
        let bias = bias.map(|bias| &bias[(head * queries + start) * keys..]);
        query_block(tile, head, segments, scale, bias, out, lse);
    });

    let mut out = vec![0f32; queries * heads * d];
    pool.rows(&mut out, heads * d, 1, |row0, run| {
        for (row, out) in (row0..).zip(run.chunks_exact_mut(heads * d)) {
            for (head, out) in out.chunks_exact_mut(d).enumerate() {
                out.copy_from_slice(&by_head[(head * queries + row) * d..][..d]);
            }
        }
    });
    let lse = (0..queries * heads).map(|i| lse_by_head[i % heads * queries + i / heads]).collect();
    (out, lse)
}

/// One head's output for a block of queries. `out` is `[queries, d]`, zero at first; `bias` starts at the block's first
/// query, with rows as long as the (only) segment.
fn query_block(
    q: Matrix<'_>,
    head: usize,
    segments: &[(Stream<'_>, Stream<'_>)],
    scale: f32,
    bias: Option<&[f32]>,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (queries, d) = (q.rows, q.columns);
    let widest = segments.iter().map(|(k, _)| k.rows.min(KEYS)).max().unwrap_or(0);
    let mut scores = vec![0f32; queries * widest];
    // Running maximum and Σ e^(score − maximum) of every query.
    let mut maxima = vec![f32::NEG_INFINITY; queries];
    let mut sums = vec![0f64; queries];
    for (k, v) in segments {
        for start in (0..k.rows).step_by(KEYS) {
            let width = KEYS.min(k.rows - start);
            let scores = &mut scores[..queries * width];
            product(scores, q, k.head(head, start, width).t(), scale, false);
            wide(
                #[inline(always)]
                || {
                    for (i, row) in scores.chunks_exact_mut(width).enumerate() {
                        if let Some(bias) = bias {
                            for (score, bias) in row.iter_mut().zip(&bias[i * k.rows + start..]) {
                                *score += bias;
                            }
                        }
                        let maximum = max(row).max(maxima[i]);
                        let sum = exp_minus(row, maximum);
                        if maximum > maxima[i] {
                            let shrink = exp(maxima[i] - maximum);
                            sums[i] *= f64::from(shrink);
                            out[i * d..][..d].iter_mut().for_each(|out| *out *= shrink);
                            maxima[i] = maximum;
                        }
                        sums[i] += f64::from(sum);
                    }
                },
            );
            let probabilities =
                Matrix { values: scores, rows: queries, columns: width, row_stride: width, column_stride: 1 };
            product(out, probabilities, v.head(head, start, width), 1.0, true);
        }
    }
    for (i, out) in out.chunks_exact_mut(d).enumerate() {
        if segments.iter().all(|(k, _)| k.rows == 0) {
            lse[i] = f32::NEG_INFINITY;
            continue;
        }
        let inverse = (1.0 / sums[i]) as f32;
        out.iter_mut().for_each(|out| *out *= inverse);
        lse[i] = (f64::from(maxima[i]) + sums[i].ln()) as f32;
    }
}
