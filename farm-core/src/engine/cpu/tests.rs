//! The kernels against scalar references in f64, and the promises of the module docs.

use super::{CpuEngine, Units, amx};
use crate::engine::{Engine, EngineError, Over, RawDtype, RawTensor, RopeTable, SequenceOps};
use candle_core::Tensor;

/// Values in [-1, 1], different for every seed.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn tensor(shape: &[usize], seed: u64) -> Tensor {
    engine(1).upload(&values(shape.iter().product(), seed), shape).unwrap()
}

fn engine(threads: usize) -> CpuEngine {
    CpuEngine::new(threads).unwrap()
}

fn read(x: &Tensor) -> Vec<f32> {
    engine(1).download(x).unwrap()
}

#[track_caller]
fn assert_close(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(got) - expected).abs() <= tolerance * expected.abs().max(1.0), "{i}: {got} {expected}");
    }
}

/// Dense attention in f64: output [Q, heads·d] and log-sum-exp [Q, heads].
fn naive_attention(
    [q, k, v]: [&[f32]; 3],
    heads: usize,
    d: usize,
    scale: f64,
    bias: impl Fn(usize, usize, usize) -> f64,
) -> (Vec<f64>, Vec<f64>) {
    let (queries, keys, width) = (q.len() / (heads * d), k.len() / (heads * d), heads * d);
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; queries * heads]);
    for i in 0..queries {
        for h in 0..heads {
            let dot = |j: usize| -> f64 {
                (0..d).map(|c| f64::from(q[i * width + h * d + c]) * f64::from(k[j * width + h * d + c])).sum()
            };
            let scores: Vec<f64> = (0..keys).map(|j| dot(j) * scale + bias(h, i, j)).collect();
            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
            lse[i * heads + h] = sum.ln();
            for (j, s) in scores.iter().enumerate() {
                for c in 0..d {
                    out[i * width + h * d + c] += s.exp() / sum * f64::from(v[j * width + h * d + c]);
                }
            }
        }
    }
    (out, lse)
}

#[test]
fn a_row_of_linear_has_the_same_bits_for_any_number_of_rows() {
    // Narrow outputs, deep sums, and more rows and columns than a block.
    for [k, n] in [[7, 1], [48, 12], [600, 48], [1500, 9], [192, 256], [700, 600]] {
        let (x, w, b) = (tensor(&[1100, k], 1), tensor(&[n, k], 2), tensor(&[n], 3));
        let e = engine(2);
        let w = e.matrix(&w, Over::Few).unwrap();
        let whole = read(&e.linear(&x, &w, Some(&b)).unwrap());
        for (start, rows) in [(0, 1), (1099, 1), (5, 2), (17, 3), (400, 64), (3, 65), (100, 513), (76, 1024), (9, 0)] {
            let part = read(&e.linear(&e.narrow(&x, 0, start, rows).unwrap(), &w, Some(&b)).unwrap());
            assert!(part == whole[start * n..(start + rows) * n], "{k} to {n}, rows {start}..{}", start + rows);
        }
    }
}

#[test]
fn a_vector_is_projected_like_a_row_of_a_matrix() {
    let (x, w, b) = (tensor(&[3, 600], 1), tensor(&[700, 600], 2), tensor(&[700], 3));
    let e = engine(2);
    let w = e.matrix(&w, Over::Few).unwrap();
    let rows = read(&e.linear(&x, &w, Some(&b)).unwrap());
    let vector = e.reshape(&e.narrow(&x, 0, 1, 1).unwrap(), &[600]).unwrap();
    let vector = e.linear(&vector, &w, Some(&b)).unwrap();
    assert_eq!(vector.dims(), [700]);
    assert!(read(&vector) == rows[700..1400]);
}

#[test]
fn merged_attention_is_attention_over_all_keys() {
    let (heads, d, e) = (3, 8, engine(2));
    let q = tensor(&[70, heads, d], 1);
    let [k, v] = [2, 3].map(|seed| tensor(&[300, heads, d], seed));
    let whole = e.attention(&q, &[&k], &[&v]).unwrap();
    let part = |start, len| {
        let [k, v] = [&k, &v].map(|x| e.narrow(x, 0, start, len).unwrap());
        e.attention(&q, &[&k], &[&v]).unwrap()
    };
    // A part without keys changes nothing, on either side.
    let empty = part(0, 0);
    let parts = [empty, part(0, 1), part(1, 290), part(291, 0), part(291, 9)];
    let merged = parts.into_iter().reduce(|a, b| e.merge_attention(&a, &b).unwrap()).unwrap();
    let close = |got: &Tensor, expected: &Tensor| {
        assert_close(&read(got), &read(expected).into_iter().map(f64::from).collect::<Vec<_>>(), 1e-6);
    };
    close(&merged.out, &whole.out);
    close(&merged.lse, &whole.lse);
    let none = e.merge_attention(&part(0, 0), &part(0, 0)).unwrap();
    assert!(read(&none.lse).iter().all(|lse| *lse == f32::NEG_INFINITY) && read(&none.out).iter().all(|x| *x == 0.0));
}

#[test]
fn concat_joins_along_any_dimension_and_bytes_come_back() {
    let e = engine(1);
    let (a, b) = (tensor(&[2, 3, 2], 1), tensor(&[2, 1, 2], 2));
    let joined = e.concat(&[&a, &b], 1).unwrap();
    assert_eq!(joined.dims(), [2, 4, 2]);
    assert_eq!(read(&e.narrow(&joined, 1, 0, 3).unwrap()), read(&a));
    assert_eq!(read(&e.narrow(&joined, 1, 3, 1).unwrap()), read(&b));
    let none = e.narrow(&a, 0, 1, 0).unwrap();
    assert_eq!(e.concat(&[&none, &a, &none], 0).unwrap().dims(), [2, 3, 2]);

    let bytes = e.to_bytes(&e.narrow(&a, 0, 1, 1).unwrap()).unwrap();
    assert_eq!(read(&e.tensor_of_bytes(&bytes, &[3, 2]).unwrap()), read(&a)[6..]);
    assert_eq!(e.tensor_of_bytes(&e.to_bytes(&none).unwrap(), &[0, 3, 2]).unwrap().dims(), [0, 3, 2]);
    assert!(e.tensor_of_bytes(&bytes[1..], &[3, 2]).is_err() && e.tensor_of_bytes(&bytes, &[3, 3]).is_err());
}

#[test]
fn linear_is_the_product_with_the_transposed_weight() {
    // One row, few rows, several blocks of rows and columns, depths of several runs, no depth.
    for [m, k, n] in [[1, 7, 5], [1, 600, 700], [3, 1, 4], [80, 192, 576], [300, 40, 1100], [5, 1500, 9], [2, 0, 3]] {
        let (x, w, b) = (tensor(&[m, k], 1), tensor(&[n, k], 2), tensor(&[n], 3));
        let e = engine(2);
        let got = read(&e.linear(&x, &e.matrix(&w, Over::Few).unwrap(), Some(&b)).unwrap());
        let (x, w, b) = (read(&x), read(&w), read(&b));
        let expected: Vec<f64> = (0..m * n)
            .map(|at| {
                let (i, j) = (at / n, at % n);
                (0..k).map(|c| f64::from(x[i * k + c]) * f64::from(w[j * k + c])).sum::<f64>() + f64::from(b[j])
            })
            .collect();
        assert_close(&got, &expected, 2e-5);
    }
}

#[test]
fn attention_over_segments_is_dense_attention() {
    // More queries and keys than a tile, uneven segments, one of them empty.
    let (heads, d) = (3, 10);
    let (q, k, v) = (tensor(&[150, heads, d], 1), tensor(&[700, heads, d], 2), tensor(&[700, heads, d], 3));
    let q = engine(1).upload(&read(&q).iter().map(|x| x * 20.0).collect::<Vec<_>>(), &[150, heads, d]).unwrap();
    let cut = |x: &Tensor, start, len| engine(1).narrow(x, 0, start, len).unwrap();
    let segments = |x: &Tensor| [cut(x, 0, 3), cut(x, 3, 0), cut(x, 3, 600), cut(x, 603, 97)];
    let (keys, vals) = (segments(&k), segments(&v));
    let got = engine(2).attention(&q, &keys.each_ref(), &vals.each_ref()).unwrap();
    let (q, k, v) = (read(&q), read(&k), read(&v));
    let (out, lse) = naive_attention([&q, &k, &v], heads, d, 1.0 / 10f64.sqrt(), |_, _, _| 0.0);
    assert_close(&read(&got.out), &out, 1e-5);
    assert_close(&read(&got.lse), &lse, 1e-6);
    assert_eq!((got.out.dims(), got.lse.dims()), (&[150, 30][..], &[150, 3][..]));
}

#[test]
fn partial_attention_merges_by_log_sum_exp() {
    let (heads, d) = (2, 4);
    let [q, k, v] = [(9, 1), (40, 2), (40, 3)].map(|(rows, seed)| tensor(&[rows, heads, d], seed));
    let e = engine(1);
    let joint = e.attention(&q, &[&k], &[&v]).unwrap();
    let part = |start, len| {
        let [k, v] = [&k, &v].map(|x| e.narrow(x, 0, start, len).unwrap());
        let got = e.attention(&q, &[&k], &[&v]).unwrap();
        (read(&got.out), read(&got.lse))
    };
    let parts = [part(0, 13), part(13, 27)];
    let (out, lse) = (read(&joint.out), read(&joint.lse));
    for (row, lse) in lse.iter().enumerate() {
        let weights = [0, 1].map(|p| f64::from(parts[p].1[row] - lse).exp());
        assert!((weights[0] + weights[1] - 1.0).abs() < 1e-6);
        for c in 0..d {
            let at = row * d + c;
            let merged = weights[0] * f64::from(parts[0].0[at]) + weights[1] * f64::from(parts[1].0[at]);
            assert!((merged - f64::from(out[at])).abs() < 1e-6);
        }
    }
}

#[test]
fn attention_without_keys_is_neutral_and_without_queries_empty() {
    let (q, none) = (tensor(&[5, 2, 4], 1), tensor(&[0, 2, 4], 1));
    let got = engine(1).attention(&q, &[&none], &[&none]).unwrap();
    assert_eq!(read(&got.out), vec![0.0; 40]);
    assert_eq!(read(&got.lse), vec![f32::NEG_INFINITY; 10]);
    let got = engine(1).attention(&none, &[&q], &[&q]).unwrap();
    assert_eq!((got.out.dims(), got.lse.dims()), (&[0, 8][..], &[0, 2][..]));
}

#[test]
fn attention_shows_a_nan() {
    let q = engine(1).upload(&[f32::NAN, 1.0], &[1, 1, 2]).unwrap();
    let k = tensor(&[6, 1, 2], 2);
    let got = engine(1).attention(&q, &[&k], &[&k]).unwrap();
    assert!(read(&got.out)[0].is_nan());
}

#[test]
fn t5_attention_adds_the_bias_and_does_not_scale() {
    let (heads, d, rows) = (3, 6, 290);
    let [q, k, v] = [1, 2, 3].map(|seed| tensor(&[rows, heads * d], seed));
    let bias = tensor(&[heads, rows, rows], 4);
    let got = engine(2).t5_attention(&q, &k, &v, &bias, heads).unwrap();
    let (q, k, v, bias) = (read(&q), read(&k), read(&v), read(&bias));
    let bias = |h, i, j| f64::from(bias[(h * rows + i) * rows + j]);
    let (out, _) = naive_attention([&q, &k, &v], heads, d, 1.0, bias);
    assert_close(&read(&got), &out, 1e-5);
}

#[test]
fn norms_and_residuals_are_their_formulas() {
    let (m, d) = (5, 37);
    let [x, branch] = [1, 2].map(|seed| tensor(&[m, d], seed));
    let [scale, shift] = [3, 4].map(|seed| tensor(&[d], seed));
    let e = engine(1);
    let (xs, bs, scales, shifts) = (read(&x), read(&branch), read(&scale), read(&shift));
    let row = |values: &[f32], i: usize| values[i / d * d..][..d].iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / d as f64;
    let rms = |values: &[f32], i: usize, eps: f64| {
        f64::from(values[i]) / (mean(&row(values, i).iter().map(|v| v * v).collect::<Vec<_>>()) + eps).sqrt()
    };
    let all = |f: &dyn Fn(usize) -> f64| (0..m * d).map(f).collect::<Vec<_>>();

    let got = read(&e.rms_norm(&x, &scale, 0.5).unwrap());
    assert_close(&got, &all(&|i| rms(&xs, i, 0.5) * f64::from(scales[i % d])), 1e-6);
    let got = read(&e.modulated_rms_norm(&x, &scale).unwrap());
    assert_close(&got, &all(&|i| rms(&xs, i, 1e-6) * (1.0 + f64::from(scales[i % d]))), 1e-6);
    let got = read(&e.gated_residual(&x, &branch, &scale).unwrap());
    assert_close(&got, &all(&|i| f64::from(xs[i]) + rms(&bs, i, 1e-6) * f64::from(scales[i % d]).tanh()), 1e-6);
    let got = read(&e.modulated_layer_norm(&x, &shift, &scale).unwrap());
    let layer_norm = |i: usize| {
        let row = row(&xs, i);
        let centre = mean(&row);
        let variance = mean(&row.iter().map(|v| (v - centre) * (v - centre)).collect::<Vec<_>>());
        (f64::from(xs[i]) - centre) / (variance + 1e-6).sqrt() * (1.0 + f64::from(scales[i % d]))
            + f64::from(shifts[i % d])
    };
    assert_close(&got, &all(&layer_norm), 2e-6);
}

#[test]
fn split_qkv_norms_then_rotates_interleaved_pairs() {
    let (m, heads, d) = (19, 3, 8);
    let packed = tensor(&[m, 3 * heads * d], 1);
    let [qn, kn] = [2, 3].map(|seed| tensor(&[d], seed));
    let rope = RopeTable { cos: tensor(&[m, heads, d / 2], 4), sin: tensor(&[m, heads, d / 2], 5) };
    let e = engine(1);
    let plain = e.split_qkv(&packed, &qn, &kn, heads, None).unwrap();
    let turned = e.split_qkv(&packed, &qn, &kn, heads, Some(&rope)).unwrap();
    let (p, cos, sin) = (read(&packed), read(&rope.cos), read(&rope.sin));
    for (part, (norm, plain, turned)) in
        [(&qn, &plain.q, &turned.q), (&kn, &plain.k, &turned.k)].into_iter().enumerate()
    {
        let (norm, plain, turned) = (read(norm), read(plain), read(turned));
        for i in 0..m {
            for h in 0..heads {
                let x = &p[i * 3 * heads * d + part * heads * d + h * d..][..d];
                let square: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / d as f64;
                let n: Vec<f64> =
                    (0..d).map(|c| f64::from(x[c]) / (square + 1e-5).sqrt() * f64::from(norm[c])).collect();
                assert_close(&plain[(i * heads + h) * d..][..d], &n, 1e-6);
                let (cos, sin) = (&cos[(i * heads + h) * d / 2..], &sin[(i * heads + h) * d / 2..]);
                let rotated: Vec<f64> = (0..d)
                    .map(|c| {
                        let (f, a, b) = (c / 2, n[c / 2 * 2], n[c / 2 * 2 + 1]);
                        let (cos, sin) = (f64::from(cos[f]), f64::from(sin[f]));
                        if c % 2 == 0 { a * cos - b * sin } else { a * sin + b * cos }
                    })
                    .collect();
                assert_close(&turned[(i * heads + h) * d..][..d], &rotated, 1e-6);
            }
        }
    }
    let v: Vec<f32> = p.chunks(3 * heads * d).flat_map(|row| row[2 * heads * d..].to_vec()).collect();
    assert_eq!(read(&turned.v), v);
}

#[test]
fn rope_positions_are_centred_in_space_only() {
    // 2 × 3 × 4 tokens; one head, one frequency per axis at a time.
    let grid = [2, 3, 4];
    let unit = (36864f64 / 12.0).sqrt();
    for axis in 0..3 {
        let frequencies: Vec<f32> = (0..3).map(|a| if a == axis { 0.01 } else { 0.0 }).collect();
        let table = engine(1).rope_table(&engine(1).upload(&frequencies, &[3, 1, 1]).unwrap(), grid, 0..24).unwrap();
        let part = engine(1).rope_table(&engine(1).upload(&frequencies, &[3, 1, 1]).unwrap(), grid, 5..17).unwrap();
        assert_eq!(
            (read(&part.cos), read(&part.sin)),
            (read(&table.cos)[5..17].to_vec(), read(&table.sin)[5..17].to_vec())
        );
        assert_eq!(table.cos.dims(), [24, 1, 1]);
        let (cos, sin) = (read(&table.cos), read(&table.sin));
        for token in 0..24 {
            let position =
                [(token / 12) as f64, ((token / 4 % 3) as f64 - 1.0) * unit, ((token % 4) as f64 - 1.5) * unit][axis];
            let angle = position * f64::from(0.01f32);
            assert!((f64::from(cos[token]) - angle.cos()).abs() < 1e-6, "axis {axis} token {token}");
            assert!((f64::from(sin[token]) - angle.sin()).abs() < 1e-6, "axis {axis} token {token}");
        }
    }
}

#[test]
fn patches_have_channels_slowest_coming_in_and_fastest_going_out() {
    let (c, t, h, w) = (3, 2, 4, 6);
    let e = engine(1);
    let latent: Vec<f32> = (0..c * t * h * w).map(|i| i as f32).collect();
    let patches = e.patchify(&e.upload(&latent, &[c, t, h, w]).unwrap()).unwrap();
    assert_eq!(patches.dims(), [t * h * w / 4, c * 4]);
    let patches = read(&patches);
    let at = |c: usize, t_: usize, y: usize, x: usize| latent[((c * t + t_) * h + y) * w + x];
    // Token (t 1, i 1, j 2), inner (c 2, di 1, dj 0).
    let token = 6 + 3 + 2;
    assert_eq!(patches[token * 12 + 2 * 4 + 2], at(2, 1, 3, 4));
    // The way out: inner (p1, p2, c). Reordering each patch from (c, p1, p2) to (p1, p2, c) has to give the latent back.
    let reordered: Vec<f32> =
        patches.chunks(12).flat_map(|p| (0..12).map(|i| p[(i % 3) * 4 + i / 3]).collect::<Vec<_>>()).collect();
    let back = e.unpatchify(&e.upload(&reordered, &[12, 12]).unwrap(), [t, h / 2, w / 2]).unwrap();
    assert_eq!(back.dims(), [c, t, h, w]);
    assert_eq!(read(&back), latent);
}

#[test]
fn silu_is_x_times_its_sigmoid() {
    let e = engine(1);
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let x = [1.0, -2.0, 3.0, 50.0];
    let got = e.silu(&e.upload(&x, &[1, 4]).unwrap()).unwrap();
    assert_close(&read(&got), &x.map(|x| silu(f64::from(x))), 1e-6);
}

#[test]
fn a_gated_layer_is_the_gated_halves_of_its_product_on_all_units() {
    // Rows of several tasks; halves that end within a panel.
    for [m, k, half] in [[1, 7, 3], [130, 200, 45], [300, 600, 32]] {
        let (x, w) = (tensor(&[m, k], 1), tensor(&[2 * half, k], 2));
        for units in all_units() {
            let e = engine_on(units, 2);
            let w = e.matrix(&w, Over::Tokens).unwrap();
            let got = e.linear_swiglu(&x, &w).unwrap();
            assert_eq!(got.dims(), [m, half]);
            let product = e.linear(&x, &w, None).unwrap();
            let [a, g] = [0, half].map(|start| e.narrow(&product, 1, start, half).unwrap());
            let expected: Vec<f32> =
                read(&e.silu(&a).unwrap()).iter().zip(read(&g)).map(|(silu, g)| silu * g).collect();
            assert!(read(&got) == expected, "{units:?} {m} {k} {half}");
        }
    }
}

#[test]
fn euler_step_rounds_every_product_and_sum() {
    let e = engine(1);
    let [z, c, u] = [1, 2, 3].map(|seed| tensor(&[500], seed));
    let got = read(&e.euler_step(&z, &c, Some(&u), 4.5, 0.017).unwrap());
    let (z, c, u) = (read(&z), read(&c), read(&u));
    for i in 0..500 {
        // Exact products in f64, rounded to f32 one by one.
        let round = |x: f64| f64::from(x as f32);
        let v = round(f64::from(u[i]) + round(4.5 * round(f64::from(c[i]) - f64::from(u[i]))));
        let expected = round(f64::from(z[i]) + round(f64::from(0.017f32) * v));
        assert_eq!(f64::from(got[i]), expected);
    }
}

#[test]
fn results_have_the_same_bits_for_any_number_of_threads() {
    let run = |threads: usize| -> Vec<Vec<u32>> {
        let e = engine(threads);
        let bits = |x: &Tensor| read(x).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let (m, heads, d) = (533, 4, 48);
        let x = tensor(&[m, heads * d], 1);
        let w = tensor(&[3 * heads * d, heads * d], 2);
        let bias = tensor(&[3 * heads * d], 3);
        let gate = tensor(&[heads * d], 4);
        let norm = tensor(&[d], 5);
        let rope = e.rope_table(&tensor(&[3, heads, d / 2], 6), [1, 13, 41], 0..533).unwrap();
        let w = e.matrix(&w, Over::Few).unwrap();
        let packed = e.linear(&x, &w, Some(&bias)).unwrap();
        let qkv = e.split_qkv(&packed, &norm, &norm, heads, Some(&rope)).unwrap();
        let text = e.narrow(&qkv.k, 0, 100, 61).unwrap();
        let attended = e.attention(&qkv.q, &[&qkv.k, &text], &[&qkv.v, &text]).unwrap();
        let t5 = e.t5_attention(&x, &x, &x, &tensor(&[heads, m, m], 7), heads).unwrap();
        [
            &packed,
            &rope.cos,
            &qkv.q,
            &qkv.v,
            &attended.out,
            &attended.lse,
            &t5,
            &e.rms_norm(&x, &gate, 1e-6).unwrap(),
            &e.modulated_rms_norm(&x, &gate).unwrap(),
            &e.modulated_layer_norm(&x, &gate, &gate).unwrap(),
            &e.gated_residual(&x, &attended.out, &gate).unwrap(),
            &e.linear_swiglu(&x, &e.matrix(&tensor(&[250, heads * d], 8), Over::Tokens).unwrap()).unwrap(),
            &e.gelu_gated(&x, &attended.out).unwrap(),
            &e.euler_step(&x, &t5, Some(&attended.out), 4.5, 0.1).unwrap(),
            // One row.
            &e.linear(&e.narrow(&x, 0, 0, 1).unwrap(), &w, Some(&bias)).unwrap(),
        ]
        .map(bits)
        .into()
    };
    let one = run(1);
    for threads in [2, 3] {
        for (i, (one, more)) in one.iter().zip(run(threads)).enumerate() {
            assert!(*one == more, "result {i} differs with {threads} threads");
        }
    }
}

#[test]
fn weights_are_widened_exactly_and_pieces_follow_each_other() {
    let e = engine(1);
    let bf16: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    let f16: Vec<u8> = [0.25f32, 65504.0].iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    let f32s: Vec<u8> = [1e-40f32, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let piece = |dtype, bytes| RawTensor { dtype, shape: &[1, 2], bytes };
    let pieces = [piece(RawDtype::Bf16, &bf16[..]), piece(RawDtype::F16, &f16), piece(RawDtype::F32, &f32s)];
    let whole = e.weight(&pieces).unwrap();
    assert_eq!(whole.dims(), [3, 2]);
    assert_eq!(read(&whole), [1.5, -2.0, 0.25, 65504.0, 1e-40, 3.0]);
    // Fewer bytes than the shape says, a piece of another width, no piece.
    let short = RawTensor { dtype: RawDtype::F32, shape: &[1, 2], bytes: &f32s[..7] };
    let wide = RawTensor { dtype: RawDtype::F32, shape: &[2, 1], bytes: &f32s };
    for bad in [&[short][..], &[pieces[0], wide], &[]] {
        assert!(matches!(e.weight(bad), Err(EngineError::Shape { op: "weight", .. })));
    }
}

#[test]
fn wrong_shapes_are_errors_that_name_the_operation() {
    let e = engine(1);
    let t = |shape: &[usize]| tensor(shape, 1);
    let m = |shape: &[usize]| e.matrix(&t(shape), Over::Few).unwrap();
    let (x, v, q) = (t(&[4, 6]), t(&[6]), t(&[4, 2, 3]));
    let table = RopeTable { cos: t(&[3, 2, 1]), sin: t(&[3, 2, 1]) };
    let results: Vec<(&str, crate::engine::Result<Tensor>)> = vec![
        ("upload", e.upload(&[1.0], &[2])),
        ("reshape", e.reshape(&x, &[5, 5])),
        ("narrow", e.narrow(&x, 1, 4, 3)),
        ("narrow", e.narrow(&x, 2, 0, 1)),
        ("narrow", e.narrow(&x, 0, usize::MAX, 2)),
        ("concat", e.concat(&[&x, &t(&[4, 5])], 0)),
        ("concat", e.concat(&[&x], 2)),
        ("concat", e.concat(&[], 0)),
        ("linear", e.linear(&x, &m(&[3, 5]), None)),
        ("linear", e.linear(&x, &m(&[3, 6]), Some(&v))),
        ("linear", e.linear(&v, &m(&[3, 5]), None)),
        ("linear", e.linear(&t(&[1, 2, 6]), &m(&[4, 6]), None)),
        ("add", e.add(&x, &v)),
        ("rms_norm", e.rms_norm(&x, &t(&[4]), 1e-6)),
        ("t5_attention", e.t5_attention(&x, &x, &x, &t(&[2, 4, 5]), 2)),
        ("t5_attention", e.t5_attention(&x, &x, &x, &t(&[4, 4, 4]), 4)),
        ("gelu_gated", e.gelu_gated(&x, &v)),
        ("rope_table", e.rope_table(&t(&[2, 2, 3]), [1, 1, 1], 0..1).map(|t| t.cos)),
        ("rope_table", e.rope_table(&t(&[3, 2, 3]), [1, 2, 2], 1..5).map(|t| t.cos)),
        ("patchify", e.patchify(&t(&[2, 1, 3, 4]))),
        ("unpatchify", e.unpatchify(&x, [1, 2, 2])),
        ("unpatchify", e.unpatchify(&t(&[4, 8]), [1, 2, 3])),
        ("modulated_rms_norm", e.modulated_rms_norm(&x, &t(&[4]))),
        ("gated_residual", e.gated_residual(&x, &v, &v)),
        ("split_qkv", e.split_qkv(&x, &t(&[1]), &t(&[1]), 4, None).map(|t| t.q)),
        ("split_qkv", e.split_qkv(&x, &t(&[2]), &t(&[2]), 1, Some(&table)).map(|t| t.q)),
        ("attention", e.attention(&q, &[&q], &[]).map(|t| t.out)),
        ("attention", e.attention(&q, &[&t(&[4, 3, 2])], &[&q]).map(|t| t.out)),
        ("linear_swiglu", e.linear_swiglu(&x, &m(&[3, 6]))),
        ("linear_swiglu", e.linear_swiglu(&x, &m(&[4, 5]))),
        ("modulated_layer_norm", e.modulated_layer_norm(&x, &v, &t(&[4]))),
        ("euler_step", e.euler_step(&x, &v, None, 1.0, 0.1)),
    ];
    for (op, result) in results {
        match result {
            Err(EngineError::Shape { op: named, .. }) => assert_eq!(named, op),
            other => panic!("{op}: {:?}", other.map(|t| t.dims().to_vec())),
        }
    }
}

/// Every way that this machine has to compute over the visual tokens.
fn all_units() -> Vec<Units> {
    let on_tiles = [Units::Split, Units::Rounded].into_iter().filter(|_| amx::available());
    [Units::Vectors, Units::Halves].into_iter().chain(on_tiles).collect()
}

fn engine_on(units: Units, threads: usize) -> CpuEngine {
    CpuEngine { units, ..engine(threads) }
}

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect()
}

#[test]
fn a_layer_over_tokens_is_the_product_on_all_units() {
    // One row, tiles that are not full, several blocks of rows and panels, depths of several runs.
    for [m, k, n] in [[1, 7, 5], [33, 600, 40], [300, 1100, 70], [17, 33, 1030], [600, 32, 32], [2, 0, 3]] {
        let (x, w, b) = (tensor(&[m, k], 1), tensor(&[n, k], 2), tensor(&[n], 3));
        for units in all_units() {
            let e = engine_on(units, 2);
            let got = read(&e.linear(&x, &e.matrix(&w, Over::Tokens).unwrap(), Some(&b)).unwrap());
            let (mut x, mut w, b) = (read(&x), read(&w), read(&b));
            if units == Units::Rounded {
                x = rounded(&x);
            }
            if matches!(units, Units::Rounded | Units::Halves) {
                w = rounded(&w);
            }
            let mut size = 0f64;
            let expected: Vec<f64> = (0..m * n)
                .map(|at| {
                    let (i, j) = (at / n, at % n);
                    let products = || (0..k).map(|c| f64::from(x[i * k + c]) * f64::from(w[j * k + c]));
                    size = size.max(products().map(f64::abs).sum());
                    products().sum::<f64>() + f64::from(b[j])
                })
                .collect();
            let worst = got.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            assert!(worst <= 4e-7 * (size + 1.0), "{units:?} {m} {k} {n}: off by {worst} of {size}");
        }
    }
}

#[test]
fn a_token_has_the_same_bits_for_any_number_of_tokens_and_threads_on_all_units() {
    let (m, heads, d) = (700, 3, 40);
    let (x, w) = (tensor(&[m, heads * d], 1), tensor(&[3 * heads * d, heads * d], 2));
    for units in all_units() {
        let run = |first: usize, rows: usize, threads: usize| {
            let e = engine_on(units, threads);
            let x = e.narrow(&x, 0, first, rows).unwrap();
            let linear = e.linear(&x, &e.matrix(&w, Over::Tokens).unwrap(), None).unwrap();
            let [q, k] = [(first, rows), (0, m)].map(|(first, rows)| {
                e.reshape(&e.narrow(&tensor(&[m, heads * d], 3), 0, first, rows).unwrap(), &[rows, heads, d]).unwrap()
            });
            let attended = e.attention(&q, &[&k], &[&k]).unwrap();
            [read(&linear), read(&attended.out), read(&attended.lse)]
        };
        let whole = run(0, m, 1);
        for (first, rows, threads) in [(0, m, 3), (0, 1, 1), (5, 31, 1), (100, 257, 2), (m - 1, 1, 2)] {
            for (whole, part) in whole.iter().zip(run(first, rows, threads)) {
                let width = whole.len() / m;
                let of_whole = &whole[first * width..(first + rows) * width];
                assert!(part == of_whole, "{units:?}, rows {first}.., {rows} of them, {threads} threads");
            }
        }
    }
}

#[test]
fn attention_equals_the_definition_on_all_units() {
    let (heads, d) = (2, 40);
    let q = tensor(&[150, heads, d], 1);
    let [k, v] = [2, 3].map(|seed| tensor(&[300, heads, d], seed));
    let scale = 1.0 / (d as f64).sqrt();
    let (out, lse) = naive_attention([&read(&q), &read(&k), &read(&v)], heads, d, scale, |_, _, _| 0.0);
    for units in all_units() {
        let got = engine_on(units, 2).attention(&q, &[&k], &[&v]).unwrap();
        // Weights of 300 keys are rounded to 8 digits there, each by itself.
        let tolerance = if units == Units::Rounded { 2e-3 } else { 2e-6 };
        assert_close(&read(&got.out), &out, tolerance);
        assert_close(&read(&got.lse), &lse, tolerance);
    }
}

#[test]
fn a_matrix_of_stored_pieces_is_that_of_their_tensor() {
    let (rows, k) = ([40, 3, 30], 70);
    let n: usize = rows.iter().sum();
    let (x, w) = (tensor(&[9, k], 1), tensor(&[n, k], 2));
    let bytes = engine(1).to_bytes(&w).unwrap();
    let mut rest = &bytes[..];
    let shapes = rows.map(|rows| [rows, 7, 10]);
    let pieces = shapes.each_ref().map(|shape| {
        let (bytes, behind) = rest.split_at(shape[0] * k * 4);
        rest = behind;
        RawTensor { dtype: RawDtype::F32, shape, bytes }
    });
    for units in all_units() {
        let e = engine_on(units, 1);
        for over in [Over::Tokens, Over::Few, Over::Encoder] {
            let [of_tensor, of_pieces] = [e.matrix(&w, over).unwrap(), e.stored_matrix(&pieces, over).unwrap()];
            let run = |matrix| read(&e.linear(&x, matrix, None).unwrap());
            assert!(run(&of_tensor) == run(&of_pieces), "{units:?} {over:?}");
        }
        let short = [RawTensor { bytes: &bytes[..8], ..pieces[0] }];
        assert!(e.stored_matrix(&short, Over::Few).is_err() && e.stored_matrix(&[], Over::Few).is_err());
        let wide = [pieces[0], RawTensor { shape: &[3, 71], ..pieces[1] }];
        assert!(e.stored_matrix(&wide, Over::Few).is_err());
    }
}
