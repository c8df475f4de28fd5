//! Rotary position embedding with learned frequencies per head, and the split of packed projections that applies it.

use std::ops::Range;

use candle_core::Tensor;

use super::data::{dims, expect, from_vec, room, shape_error, slice};
use super::norm::inverse_rms;
use super::pool::Pool;
use super::wide::wide;
use crate::engine::{Qkv, Result, RopeTable};

/// eps of the norms of q and k.
const EPS: f64 = 1e-5;
/// Area of the grid, in tokens, at which rows and columns are one unit apart: 192².
const UNIT_AREA: f64 = 36_864.0;

pub(super) fn rope_table(
    pool: &Pool,
    frequencies: &Tensor,
    grid: [usize; 3],
    tokens: Range<usize>,
) -> Result<RopeTable<Tensor>> {
    const OP: &str = "rope_table";
    let [axes, heads, half] = dims(OP, "frequencies [3, heads, head_dim/2]", frequencies)?;
    if axes != 3 {
        return Err(shape_error(OP, "frequencies [3, heads, head_dim/2]", frequencies.dims()));
    }
    let frequencies = slice(OP, frequencies)?;
    let width = heads * half;
    let (time, rest) = frequencies.split_at(width);
    let (row, column) = rest.split_at(width);

    let [_, rows, columns] = grid;
    let all: usize = grid.iter().product();
    if tokens.start > tokens.end || tokens.end > all {
        return Err(shape_error(OP, format!("tokens {tokens:?} inside the grid"), &grid));
    }
    let count = tokens.len();
    let unit = (UNIT_AREA / (rows * columns) as f64).sqrt();
    let centred = |i: usize, n: usize| f64::from(((i as f64 - (n as f64 - 1.0) / 2.0) * unit) as f32);
    let (mut cos, mut sin) = (room(count * width), room(count * width));
    let tasks: Vec<_> = cos.chunks_mut(width.max(1)).zip(sin.chunks_mut(width.max(1))).enumerate().collect();
    pool.run(tasks, count * width * 32, |(i, (cos, sin))| {
        let token = tokens.start + i;
        let (t, i, j) = (token / (rows * columns), token / columns % rows, token % columns);
        let (t, i, j) = (t as f64, centred(i, rows), centred(j, columns));
        for (f, (cos, sin)) in cos.iter_mut().zip(sin).enumerate() {
            // The products are exact in f64, so the angle is rounded once to f32, whatever the order of the sum.
            let angle = t * f64::from(time[f]) + i * f64::from(row[f]) + j * f64::from(column[f]);
            let (s, c) = f64::from(angle as f32).sin_cos();
            (*cos, *sin) = (c as f32, s as f32);
        }
    });
    let shape = [count, heads, half];
    Ok(RopeTable { cos: from_vec(OP, cos, &shape)?, sin: from_vec(OP, sin, &shape)? })
}

pub(super) fn split_qkv(
    pool: &Pool,
    packed: &Tensor,
    [q_norm, k_norm]: [&Tensor; 2],
    heads: usize,
    rope: Option<&RopeTable<Tensor>>,
) -> Result<Qkv<Tensor>> {
    const OP: &str = "split_qkv";
    let [m, packed_width] = dims(OP, "packed [rows, 3·heads·head_dim]", packed)?;
    if heads == 0 || packed_width % (3 * heads) != 0 {
        return Err(shape_error(OP, format!("packed [rows, 3·{heads}·head_dim]"), packed.dims()));
    }
    let (width, d) = (packed_width / 3, packed_width / 3 / heads);
    expect(OP, "q_norm", q_norm, &[d])?;
    expect(OP, "k_norm", k_norm, &[d])?;
    if let Some(rope) = rope {
        if d % 2 != 0 {
            return Err(shape_error(OP, "an even head_dim to rotate", packed.dims()));
        }
        expect(OP, "rope table", &rope.cos, &[m, heads, d / 2])?;
        expect(OP, "rope table", &rope.sin, &[m, heads, d / 2])?;
    }
    let table = rope.map(|rope| Ok((slice(OP, &rope.cos)?, slice(OP, &rope.sin)?))).transpose()?;
    let table = table.as_ref().map(|(cos, sin)| (&cos[..], &sin[..]));
    let (packed, q_norm, k_norm) = (slice(OP, packed)?, slice(OP, q_norm)?, slice(OP, k_norm)?);
    let (packed, q_norm, k_norm): (&[f32], &[f32], &[f32]) = (&packed, &q_norm, &k_norm);

    let [mut q, mut k, mut v] = [(); 3].map(|()| room(m * width));
    // Runs of 16 rows: some 50,000 values at the published width.
    let run = 16 * width.max(1);
    let tasks: Vec<_> = q
        .chunks_mut(run)
        .zip(k.chunks_mut(run))
        .zip(v.chunks_mut(run))
        .map(|((q, k), v)| [q, k, v])
        .enumerate()
        .collect();
    pool.run(tasks, m * packed_width * 8, |(task, [q, k, v])| {
        wide(
            #[inline(always)]
            || {
                let rows = q.chunks_exact_mut(width).zip(k.chunks_exact_mut(width)).zip(v.chunks_exact_mut(width));
                for (row, ((q, k), v)) in (task * 16..).zip(rows) {
                    let packed = &packed[row * packed_width..][..packed_width];
                    let table = table.map(|(cos, sin)| {
                        let at = row * width / 2..(row + 1) * width / 2;
                        (&cos[at.clone()], &sin[at])
                    });
                    norm_and_rotate(q, &packed[..width], q_norm, table);
                    norm_and_rotate(k, &packed[width..2 * width], k_norm, table);
                    v.copy_from_slice(&packed[2 * width..]);
                }
            },
        );
    });
    let shape = [m, heads, d];
    Ok(Qkv { q: from_vec(OP, q, &shape)?, k: from_vec(OP, k, &shape)?, v: from_vec(OP, v, &shape)? })
}

/// One row of q or k: every head is normalised, weighted and, with (cos, sin) of the row, rotated in interleaved pairs.
#[inline(always)]
fn norm_and_rotate(out: &mut [f32], x: &[f32], weight: &[f32], table: Option<(&[f32], &[f32])>) {
    let d = weight.len();
    for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
        let inverse = inverse_rms(x, EPS);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inverse * weight;
        }
    }
    let Some((cos, sin)) = table else { return };
    for ((pair, cos), sin) in out.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        let [a, b] = *pair;
        *pair = [a * cos - b * sin, a * sin + b * cos];
    }
}
