//! Operations without a sum: activations, rows, patches, the Euler step.

use candle_core::Tensor;

use super::data::{dims, expect, from_vec, room, shape_error, slice};
use super::pool::Pool;
use super::wide::{gelu_tanh, silu as silu_f32, wide};
use crate::engine::Result;

/// `f(a)` for every value.
fn map1(
    op: &'static str,
    pool: &Pool,
    a: &Tensor,
    cost: usize,
    f: impl Fn(f32) -> f32 + Sync + Send,
) -> Result<Tensor> {
    let values = slice(op, a)?;
    let values: &[f32] = &values;
    let mut out = room(values.len());
    pool.rows(&mut out, 1, cost, |start, run| {
        wide(
            #[inline(always)]
            || run.iter_mut().zip(&values[start..]).for_each(|(out, &a)| *out = f(a)),
        );
    });
    from_vec(op, out, a.dims())
}

/// `f(a, b)` for every pair of values; equal shapes.
fn map2(
    op: &'static str,
    pool: &Pool,
    [a, b]: [&Tensor; 2],
    cost: usize,
    f: impl Fn(f32, f32) -> f32 + Sync + Send,
) -> Result<Tensor> {
    expect(op, "second operand", b, a.dims())?;
    let shape = a.dims();
    let (a, b) = (slice(op, a)?, slice(op, b)?);
    let (a, b): (&[f32], &[f32]) = (&a, &b);
    let mut out = room(a.len());
    pool.rows(&mut out, 1, cost, |start, run| {
        wide(
            #[inline(always)]
            || {
                let inputs = a[start..].iter().zip(&b[start..]);
                run.iter_mut().zip(inputs).for_each(|(out, (&a, &b))| *out = f(a, b));
            },
        );
    });
    from_vec(op, out, shape)
}

pub(super) fn add(pool: &Pool, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    map2(
        "add",
        pool,
        [a, b],
        1,
        #[inline(always)]
        |a, b| a + b,
    )
}

pub(super) fn silu(pool: &Pool, x: &Tensor) -> Result<Tensor> {
    map1("silu", pool, x, 16, silu_f32)
}

pub(super) fn gelu_gated(pool: &Pool, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    map2(
        "gelu_gated",
        pool,
        [a, b],
        20,
        #[inline(always)]
        |a, b| gelu_tanh(a) * b,
    )
}

pub(super) fn euler_step(
    pool: &Pool,
    z: &Tensor,
    cond: &Tensor,
    uncond: Option<&Tensor>,
    guidance: f32,
    dsigma: f32,
) -> Result<Tensor> {
    const OP: &str = "euler_step";
    let Some(uncond) = uncond else {
        return map2(
            OP,
            pool,
            [z, cond],
            2,
            #[inline(always)]
            |z, v| z + dsigma * v,
        );
    };
    let v = map2(
        OP,
        pool,
        [cond, uncond],
        3,
        #[inline(always)]
        |c, u| u + guidance * (c - u),
    )?;
    map2(
        OP,
        pool,
        [z, &v],
        2,
        #[inline(always)]
        |z, v| z + dsigma * v,
    )
}

pub(super) fn concat(parts: &[&Tensor], dim: usize) -> Result<Tensor> {
    const OP: &str = "concat";
    let Some((first, rest)) = parts.split_first() else {
        return Err(shape_error(OP, "at least one part", &[0]));
    };
    let mut shape = first.dims().to_vec();
    if dim >= shape.len() {
        return Err(shape_error(OP, format!("parts with a dimension {dim}"), first.dims()));
    }
    for part in rest {
        let (dims, expected) = (part.dims(), first.dims());
        let fits = dims.len() == expected.len()
            && dims.iter().zip(expected).enumerate().all(|(i, (got, want))| i == dim || got == want);
        if !fits {
            return Err(shape_error(OP, format!("{expected:?} but for dimension {dim}"), dims));
        }
        shape[dim] += dims[dim];
    }
    let outer: usize = shape[..dim].iter().product();
    // Of every part: its values, and how many of them lie together.
    let mut runs = Vec::with_capacity(parts.len());
    for part in parts {
        runs.push((slice(OP, part)?, part.dims()[dim..].iter().product::<usize>()));
    }
    let mut out = Vec::with_capacity(shape.iter().product());
    for i in 0..outer {
        for (values, run) in &runs {
            out.extend_from_slice(&values[i * run..(i + 1) * run]);
        }
    }
    from_vec(OP, out, &shape)
}

pub(super) fn patchify(latent: &Tensor) -> Result<Tensor> {
    const OP: &str = "patchify";
    let [c, t, h, w] = dims(OP, "latent [C, T, h, w]", latent)?;
    if h % 2 != 0 || w % 2 != 0 {
        return Err(shape_error(OP, "an even height and width", latent.dims()));
    }
    let latent = slice(OP, latent)?;
    let (rows, columns) = (h / 2, w / 2);
    let mut out = Vec::with_capacity(latent.len());
    for (frame, i, j) in cells([t, rows, columns]) {
        for channel in 0..c {
            for di in 0..2 {
                let start = ((channel * t + frame) * h + 2 * i + di) * w + 2 * j;
                out.extend_from_slice(&latent[start..start + 2]);
            }
        }
    }
    from_vec(OP, out, &[t * rows * columns, c * 4])
}

pub(super) fn unpatchify(patches: &Tensor, grid: [usize; 3]) -> Result<Tensor> {
    const OP: &str = "unpatchify";
    let [tokens, width] = dims(OP, "patches [tokens, 4·C]", patches)?;
    let [t, rows, columns] = grid;
    if tokens != t * rows * columns || width % 4 != 0 {
        return Err(shape_error(OP, format!("patches [{t}·{rows}·{columns}, 4·C]"), patches.dims()));
    }
    let patches = slice(OP, patches)?;
    let (c, h, w) = (width / 4, 2 * rows, 2 * columns);
    let mut out = vec![0f32; patches.len()];
    for ((frame, i, j), patch) in cells(grid).zip(patches.chunks_exact(width.max(1))) {
        for p1 in 0..2 {
            for p2 in 0..2 {
                for (channel, &value) in patch[(p1 * 2 + p2) * c..][..c].iter().enumerate() {
                    out[((channel * t + frame) * h + 2 * i + p1) * w + 2 * j + p2] = value;
                }
            }
        }
    }
    from_vec(OP, out, &[c, t, h, w])
}

/// The cells (t, i, j) of a grid in token order.
fn cells([t, rows, columns]: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..t).flat_map(move |t| (0..rows).flat_map(move |i| (0..columns).map(move |j| (t, i, j))))
}
