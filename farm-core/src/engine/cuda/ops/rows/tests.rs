//! Against the CPU engine, in the emulation.

use candle_core::Tensor as CpuTensor;

use super::*;
use crate::engine::cuda::emulation::Emulation;
use crate::engine::cuda::ops::pointwise::narrow;
use crate::engine::cuda::ops::testing::*;
use crate::engine::{Engine, SequenceOps};

type Gpu = crate::engine::cuda::gpu::Gpu<Emulation>;

/// Widths that are less than a vector, that end within one, that fill one warp and several, and the longest in f32.
const WIDTHS: [usize; 9] = [1, 5, 8, 31, 192, 514, 1536, 3072, 8192];

fn types_and_widths() -> impl Iterator<Item = (Dtype, usize)> {
    BOTH.into_iter().flat_map(|dtype| WIDTHS.map(|width| (dtype, width)))
}

/// Vectors may be of either type.
fn other(dtype: Dtype) -> Dtype {
    if dtype == Dtype::F32 { Dtype::Bf16 } else { Dtype::F32 }
}

#[test]
fn norms_are_the_cpus_but_for_one_rounding() {
    let (gpu, cpu) = (gpu(), cpu());
    for (dtype, width) in types_and_widths() {
        let [x, branch] = [1, 2].map(|seed| twin(&gpu, &[3, width], seed, dtype));
        for of_vectors in [dtype, other(dtype)] {
            let [a, b] = [3, 4].map(|seed| twin(&gpu, &[width], seed, of_vectors));
            let case = |op| format!("{op} of {width} in {dtype} with {of_vectors}");
            // eps as large as what it is added to.
            let expected = cpu.rms_norm(&x.cpu, &a.cpu, 0.3).unwrap();
            assert_close(&gpu, &rms_norm(&gpu, &x.gpu, &a.gpu, 0.3).unwrap(), &expected, 1e-6, &case("rms"));
            let expected = cpu.modulated_rms_norm(&x.cpu, &a.cpu).unwrap();
            let got = modulated_rms_norm(&gpu, &x.gpu, &a.gpu).unwrap();
            assert_close(&gpu, &got, &expected, 1e-6, &case("modulated rms"));
            let expected = cpu.gated_residual(&x.cpu, &branch.cpu, &a.cpu).unwrap();
            let got = gated_residual(&gpu, &x.gpu, &branch.gpu, &a.gpu).unwrap();
            assert_close(&gpu, &got, &expected, 1e-6, &case("residual"));
            let expected = cpu.modulated_layer_norm(&x.cpu, &a.cpu, &b.cpu).unwrap();
            let got = modulated_layer_norm(&gpu, &x.gpu, &a.gpu, &b.gpu).unwrap();
            assert_close(&gpu, &got, &expected, 2e-6, &case("layer"));
            assert_eq!(got.dtype(), dtype);
        }
    }
}

#[test]
fn a_mean_that_outweighs_the_rest_does_not_blur_the_variance() {
    let (gpu, cpu) = (gpu(), cpu());
    // A last vector that is not full: what is behind the row must not count as values of 0.
    for width in [190, 3070] {
        let far: Vec<f32> = values(2 * width, 1, Dtype::F32).iter().map(|x| 300.0 + x).collect();
        let x = twin_of(&gpu, &far, &[2, width], Dtype::F32);
        let zero = twin_of(&gpu, &vec![0.0; width], &[width], Dtype::F32);
        let expected = cpu.modulated_layer_norm(&x.cpu, &zero.cpu, &zero.cpu).unwrap();
        let got = modulated_layer_norm(&gpu, &x.gpu, &zero.gpu, &zero.gpu).unwrap();
        assert_close(&gpu, &got, &expected, 3e-4, &format!("{width} values"));
    }
}

#[test]
fn rows_of_zeros_stay_zeros() {
    let gpu = gpu();
    for dtype in BOTH {
        let (x, one) = (at(&gpu, &[0.0; 16], &[2, 8], dtype, 0), at(&gpu, &[1.0; 8], &[8], dtype, 0));
        assert_same(&gpu, &modulated_rms_norm(&gpu, &x, &one).unwrap(), &[0.0; 16], "rms");
        assert_same(&gpu, &gated_residual(&gpu, &x, &x, &one).unwrap(), &[0.0; 16], "residual");
    }
}

/// What every operation makes of `rows` rows.
fn all_of(gpu: &Gpu, rows: &[Tensor<Emulation>; 4], vectors: &[Tensor<Emulation>; 3]) -> Vec<Vec<f32>> {
    let ([x, branch, packed, angles], [a, b, norm]) = (rows, vectors);
    let [count, _] = x.dims() else { panic!("rows") };
    let (heads, d) = (norm_heads(x, norm), norm.len());
    let table = |table: &Tensor<Emulation>| table.reshaped(&[*count, heads, d / 2]);
    let rope = RopeTable { cos: table(angles), sin: table(angles) };
    let qkv = split_qkv(gpu, packed, norm, norm, heads, Some(&rope)).unwrap();
    let lse = |x: &Tensor<Emulation>| narrow(gpu, x, 1, 0, heads).unwrap();
    let [first, second] = [x, branch].map(|x| AttentionOut { out: x.clone(), lse: lse(x) });
    let merged = merge_attention(gpu, &first, &second).unwrap();
    [
        rms_norm(gpu, x, a, 1e-6).unwrap(),
        modulated_rms_norm(gpu, x, a).unwrap(),
        gated_residual(gpu, x, branch, a).unwrap(),
        modulated_layer_norm(gpu, x, a, b).unwrap(),
        qkv.q,
        qkv.k,
        qkv.v,
        merged.out,
        merged.lse,
    ]
    .iter()
    .map(|out| gpu.download(out).unwrap())
    .collect()
}

fn norm_heads(x: &Tensor<Emulation>, norm: &Tensor<Emulation>) -> usize {
    x.dims()[1] / norm.len()
}

#[test]
fn a_row_has_the_same_bits_wherever_it_lies_and_whatever_is_beside_it() {
    let gpu = gpu();
    const ROWS: usize = 21;
    // Widths and heads that are whole vectors, and that are not.
    for (dtype, [heads, d]) in BOTH.into_iter().flat_map(|dtype| [[3, 64], [5, 6], [2, 40]].map(|form| (dtype, form))) {
        let width = heads * d;
        let place = |offset: usize| {
            let rows = [width, width, 3 * width];
            let [x, branch, packed] = std::array::from_fn(|i| {
                at(&gpu, &values(ROWS * rows[i], i as u64, dtype), &[ROWS, rows[i]], dtype, offset)
            });
            let angles = values(ROWS * width / 2, 9, Dtype::F32);
            let angles = at(&gpu, &angles, &[ROWS, width / 2], Dtype::F32, offset);
            let [a, b, norm] =
                [width, width, d].map(|len| at(&gpu, &values(len, len as u64, Dtype::F32), &[len], Dtype::F32, offset));
            ([x, branch, packed, angles], [a, b, norm])
        };
        let (rows, vectors) = place(0);
        let whole = all_of(&gpu, &rows, &vectors);
        for offset in [1, 2, 8] {
            let (rows, vectors) = place(offset);
            assert!(all_of(&gpu, &rows, &vectors) == whole, "{heads} heads of {d} in {dtype}, {offset} values on");
        }
        for (start, count) in [(0, 1), (20, 1), (3, 2), (5, 7), (1, 20)] {
            let part = rows.each_ref().map(|x| narrow(&gpu, x, 0, start, count).unwrap());
            for (i, (part, whole)) in all_of(&gpu, &part, &vectors).iter().zip(&whole).enumerate() {
                let row = whole.len() / ROWS;
                let expected = &whole[start * row..(start + count) * row];
                assert!(part == expected, "result {i}: rows {start}..+{count}, {heads} heads of {d} in {dtype}");
            }
        }
    }
}

#[test]
fn rows_that_no_block_holds_are_refused() {
    let gpu = gpu();
    for (dtype, most) in [(Dtype::F32, 8192), (Dtype::Bf16, 16384)] {
        let norm = |width: usize| {
            let (x, one) = (vec![1.0; width], at(&gpu, &vec![1.0; width], &[width], dtype, 0));
            rms_norm(&gpu, &at(&gpu, &x, &[1, width], dtype, 0), &one, 0.0)
        };
        assert_same(&gpu, &norm(most).unwrap(), &vec![1.0; most], "the longest");
        assert!(matches!(norm(most + 1), Err(EngineError::Shape { op: "rms_norm", .. })));
    }
}

#[test]
fn tables_have_the_cpus_bits() {
    let (gpu, cpu) = (gpu(), cpu());
    for (dtype, heads, half) in [(Dtype::F32, 3, 8), (Dtype::Bf16, 1, 1), (Dtype::F32, 24, 64)] {
        // Angles far beyond a turn.
        let frequencies: Vec<f32> =
            values(3 * heads * half, 1, dtype).iter().map(|x| rounded(x * 7.0, dtype)).collect();
        let frequencies = twin_of(&gpu, &frequencies, &[3, heads, half], dtype);
        for (grid, tokens) in
            [([3, 5, 7], 0..105), ([3, 5, 7], 33..41), ([28, 30, 53], 44_500..44_520), ([2, 1, 3], 4..4)]
        {
            let got = rope_table(&gpu, &frequencies.gpu, grid, tokens.clone()).unwrap();
            let expected = cpu.rope_table(&frequencies.cpu, grid, tokens.clone()).unwrap();
            for (got, expected) in [(&got.cos, &expected.cos), (&got.sin, &expected.sin)] {
                assert_eq!((got.dims(), got.dtype()), (expected.dims(), Dtype::F32));
                assert_same(&gpu, got, &cpu.download(expected).unwrap(), &format!("{tokens:?} of {grid:?}"));
            }
        }
    }
}

#[test]
fn heads_are_split_normalised_and_rotated_as_the_cpu_does() {
    let (gpu, cpu) = (gpu(), cpu());
    let forms =
        [(1, 3, 2), (5, 6, 32), (4, 2, 40), (3, 24, 128), (2, 1, 6), (70, 5, 16), (0, 2, 8), (2, 3, 5), (3, 1, 1)];
    for (dtype, (rows, heads, d)) in BOTH.into_iter().flat_map(|dtype| forms.map(|form| (dtype, form))) {
        let packed = twin(&gpu, &[rows, 3 * heads * d], 1, dtype);
        let [q_norm, k_norm] = [2, 3].map(|seed| twin(&gpu, &[d], seed, other(dtype)));
        let [cos, sin] = [4, 5].map(|seed| twin(&gpu, &[rows, heads, d / 2], seed, Dtype::F32));
        for rotated in [false, d % 2 == 0] {
            let on_gpu = RopeTable { cos: cos.gpu.clone(), sin: sin.gpu.clone() };
            let on_cpu = RopeTable { cos: cos.cpu.clone(), sin: sin.cpu.clone() };
            let got =
                split_qkv(&gpu, &packed.gpu, &q_norm.gpu, &k_norm.gpu, heads, rotated.then_some(&on_gpu)).unwrap();
            let expected =
                cpu.split_qkv(&packed.cpu, &q_norm.cpu, &k_norm.cpu, heads, rotated.then_some(&on_cpu)).unwrap();
            let case = |which| format!("{which} of {rows} rows, {heads} heads of {d} in {dtype}, rotated: {rotated}");
            assert_close(&gpu, &got.q, &expected.q, 1e-6, &case("q"));
            assert_close(&gpu, &got.k, &expected.k, 1e-6, &case("k"));
            assert_same(&gpu, &got.v, &cpu.download(&expected.v).unwrap(), &case("v"));
            assert_eq!([got.q, got.k, got.v].map(|x| x.dtype()), [dtype; 3]);
        }
    }
}

#[test]
fn attention_over_disjoint_keys_is_merged_as_the_cpu_does() {
    let (gpu, cpu) = (gpu(), cpu());
    const NONE: f32 = f32::NEG_INFINITY;
    // Equal weights, one that outweighs the other, weights of which f32 has no exponential, and no keys on either side.
    let lse = [[0.5, -3.0, 9.0, 200.0, -150.0, NONE, 1.5, NONE], [0.5, -2.0, -9.0, 199.0, -151.5, 3.0, NONE, NONE]];
    let forms = [[4, 2, 8], [8, 1, 5], [2, 4, 40], [1, 8, 128], [8, 1, 0]];
    let types = [[Dtype::F32; 2], [Dtype::Bf16; 2], [Dtype::F32, Dtype::Bf16]];
    for (dtypes, [rows, heads, d]) in types.into_iter().flat_map(|dtypes| forms.map(|form| (dtypes, form))) {
        let [a, b] = std::array::from_fn(|i| {
            let mut out = values(rows * heads * d, i as u64, dtypes[i]);
            for (head, _) in lse[i].iter().enumerate().filter(|(_, lse)| **lse == NONE) {
                out[head * d..(head + 1) * d].fill(0.0);
            }
            let out = twin_of(&gpu, &out, &[rows, heads * d], dtypes[i]);
            (out, twin_of(&gpu, &lse[i], &[rows, heads], Dtype::F32))
        });
        let on_gpu = [&a, &b].map(|(out, lse)| AttentionOut { out: out.gpu.clone(), lse: lse.gpu.clone() });
        let on_cpu =
            [&a, &b].map(|(out, lse)| AttentionOut::<CpuTensor> { out: out.cpu.clone(), lse: lse.cpu.clone() });
        let got = merge_attention(&gpu, &on_gpu[0], &on_gpu[1]).unwrap();
        let expected = cpu.merge_attention(&on_cpu[0], &on_cpu[1]).unwrap();
        let case = format!("{rows} rows, {heads} heads of {d} in {dtypes:?}");
        assert_eq!((got.out.dtype(), got.lse.dtype()), (Dtype::F32, Dtype::F32));
        assert_close(&gpu, &got.out, &expected.out, 1e-6, &case);
        assert_close(&gpu, &got.lse, &expected.lse, 1e-6, &case);
    }
}

#[test]
fn no_rows_give_no_rows() {
    let gpu = gpu();
    for (rows, width) in [(0, 8), (3, 0)] {
        let x = gpu.empty("test", &[rows, width], Dtype::Bf16).unwrap();
        let vector = at(&gpu, &vec![1.0; width], &[width], Dtype::Bf16, 0);
        let norms = [
            rms_norm(&gpu, &x, &vector, 1e-6),
            modulated_rms_norm(&gpu, &x, &vector),
            gated_residual(&gpu, &x, &x, &vector),
            modulated_layer_norm(&gpu, &x, &vector, &vector),
        ];
        assert!(norms.into_iter().all(|out| out.unwrap().dims() == [rows, width]));
    }
}

#[test]
fn shapes_are_refused_as_the_cpu_does() {
    let (gpu, cpu) = (gpu(), cpu());
    let of = |shape: &[usize]| twin(&gpu, shape, 1, Dtype::F32);
    let (x, other, vector, short, cube) = (of(&[3, 12]), of(&[4, 12]), of(&[12]), of(&[11]), of(&[3, 4, 3]));
    for (x, vector) in [(&cube, &vector), (&x, &short), (&x, &x)] {
        assert_refused(rms_norm(&gpu, &x.gpu, &vector.gpu, 1.0), cpu.rms_norm(&x.cpu, &vector.cpu, 1.0));
        assert_refused(modulated_rms_norm(&gpu, &x.gpu, &vector.gpu), cpu.modulated_rms_norm(&x.cpu, &vector.cpu));
    }
    for (x, branch, gate) in [(&cube, &x, &vector), (&x, &other, &vector), (&x, &x, &short)] {
        let on_gpu = gated_residual(&gpu, &x.gpu, &branch.gpu, &gate.gpu);
        assert_refused(on_gpu, cpu.gated_residual(&x.cpu, &branch.cpu, &gate.cpu));
    }
    for (x, shift, scale) in [(&cube, &vector, &vector), (&x, &short, &vector), (&x, &vector, &short)] {
        let on_gpu = modulated_layer_norm(&gpu, &x.gpu, &shift.gpu, &scale.gpu);
        assert_refused(on_gpu, cpu.modulated_layer_norm(&x.cpu, &shift.cpu, &scale.cpu));
    }
    let frequencies = of(&[3, 2, 4]);
    for (frequencies, tokens) in [(&x, 0..1), (&cube, 0..25), (&frequencies, 20..25), (&of(&[2, 1, 1]), 0..1)] {
        let on_gpu = rope_table(&gpu, &frequencies.gpu, [2, 3, 4], tokens.clone()).map(drop);
        assert_refused(on_gpu, cpu.rope_table(&frequencies.cpu, [2, 3, 4], tokens).map(drop));
    }
    let (two, one, table, wrong) = (of(&[2]), of(&[1]), of(&[3, 2, 1]), of(&[3, 1, 2]));
    let refusals = [
        (&cube, &two, &two, 2, None),
        (&x, &two, &two, 0, None),
        (&x, &two, &two, 5, None),
        (&x, &one, &two, 2, None),
        (&x, &two, &one, 2, None),
        (&x, &one, &one, 4, Some([&table, &table])),
        (&x, &two, &two, 2, Some([&wrong, &table])),
        (&x, &two, &two, 2, Some([&table, &wrong])),
    ];
    for (packed, q, k, heads, tables) in refusals {
        let on_gpu = tables.map(|[cos, sin]| RopeTable { cos: cos.gpu.clone(), sin: sin.gpu.clone() });
        let on_cpu = tables.map(|[cos, sin]| RopeTable { cos: cos.cpu.clone(), sin: sin.cpu.clone() });
        assert_refused(
            split_qkv(&gpu, &packed.gpu, &q.gpu, &k.gpu, heads, on_gpu.as_ref()),
            cpu.split_qkv(&packed.cpu, &q.cpu, &k.cpu, heads, on_cpu.as_ref()),
        );
    }
    let lse = of(&[3, 4]);
    for [a_out, a_lse, b_out, b_lse] in [
        [&x, &cube, &x, &lse],
        [&cube, &lse, &x, &lse],
        [&other, &lse, &x, &lse],
        [&x, &of(&[3, 5]), &x, &lse],
        [&x, &lse, &other, &lse],
        [&x, &lse, &x, &of(&[3, 3])],
    ] {
        assert_refused(
            merge_attention(
                &gpu,
                &AttentionOut { out: a_out.gpu.clone(), lse: a_lse.gpu.clone() },
                &AttentionOut { out: b_out.gpu.clone(), lse: b_lse.gpu.clone() },
            ),
            cpu.merge_attention(
                &AttentionOut { out: a_out.cpu.clone(), lse: a_lse.cpu.clone() },
                &AttentionOut { out: b_out.cpu.clone(), lse: b_lse.cpu.clone() },
            ),
        );
    }
}
