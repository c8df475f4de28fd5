mod varied;

use self::varied::{Hopper, varied};
use super::{attention, t5_attention};
use crate::engine::cuda::device::{Device, Dtype};
use crate::engine::cuda::gpu::Gpu;
use crate::engine::cuda::ops::testing::{self, at, cpu, gpu};
use crate::engine::cuda::tensor::Tensor;
use crate::engine::{Engine, EngineError, SequenceOps, Transfer};

/// Values in [-size, size] that bf16 has, different for every seed.
fn values(count: usize, size: f32, seed: u64) -> Vec<f32> {
    let values = testing::values(count, seed, Dtype::Bf16);
    values.iter().map(|x| testing::rounded(size * x, Dtype::Bf16)).collect()
}

#[track_caller]
fn assert_close(what: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let close = (got - expected).abs() <= tolerance * expected.abs().max(1.0);
        assert!(close || got == expected, "{what}, {i}: {got} is not {expected}");
    }
}

/// Output and log-sum-exp.
type Pair = [Vec<f32>; 2];

/// A Hopper, and any other.
fn gpus() -> [Gpu<varied::Varied>; 2] {
    [varied(Hopper::Right), varied(Hopper::Absent)]
}

/// Rows, keys, values.
type Segment = (usize, Vec<f32>, Vec<f32>);

/// One problem for both engines: sharp scores, and values to 1.
struct Problem {
    queries: usize,
    heads: usize,
    d: usize,
    q: Vec<f32>,
    segments: Vec<Segment>,
}

impl Problem {
    fn new([queries, heads, d]: [usize; 3], keys: &[usize]) -> Self {
        let segment = |(i, rows): (usize, &usize)| {
            let (count, seed) = (rows * heads * d, 2 * i as u64);
            (*rows, values(count, 2.0, 11 + seed), values(count, 1.0, 12 + seed))
        };
        let segments = keys.iter().enumerate().map(segment).collect();
        Self { queries, heads, d, q: values(queries * heads * d, 2.0, 1), segments }
    }

    fn on_cpu(&self) -> Pair {
        let e = cpu();
        let Self { queries, heads, d, .. } = *self;
        let tensors = |of: fn(&Segment) -> &Vec<f32>| -> Vec<_> {
            self.segments.iter().map(|s| e.upload(of(s), &[s.0, heads, d]).unwrap()).collect()
        };
        let (k, v) = (tensors(|s| &s.1), tensors(|s| &s.2));
        let q = e.upload(&self.q, &[queries, heads, d]).unwrap();
        let got = e.attention(&q, &k.iter().collect::<Vec<_>>(), &v.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!((got.out.sizes(), got.lse.sizes()), (vec![queries, heads * d], vec![queries, heads]));
        [e.download(&got.out).unwrap(), e.download(&got.lse).unwrap()]
    }

    /// With queries, keys and values of these types, all of them parts of tensors.
    fn on_gpu<D: Device>(&self, gpu: &Gpu<D>, dtypes: [Dtype; 3], skip: usize) -> Pair {
        self.attended(gpu, dtypes, skip, false)
    }

    fn attended<D: Device>(&self, gpu: &Gpu<D>, [q, k, v]: [Dtype; 3], skip: usize, part: bool) -> Pair {
        let Self { queries, heads, d, .. } = *self;
        let q = at(gpu, &self.q, &[queries, heads, d], q, skip);
        let tensors = |of: fn(&Segment) -> &Vec<f32>, dtype| -> Vec<_> {
            self.segments.iter().map(|s| at(gpu, of(s), &[s.0, heads, d], dtype, skip)).collect()
        };
        let (k, v) = (tensors(|s| &s.1, k), tensors(|s| &s.2, v));
        let got = attention(gpu, &q, &k.iter().collect::<Vec<_>>(), &v.iter().collect::<Vec<_>>(), part).unwrap();
        let out = if part { Dtype::F32 } else { q.dtype() };
        assert_eq!((got.out.dtype(), got.lse.dtype()), (out, Dtype::F32));
        assert_eq!((got.out.dims(), got.lse.dims()), (&[queries, heads * d][..], &[queries, heads][..]));
        [gpu.download(&got.out).unwrap(), gpu.download(&got.lse).unwrap()]
    }
}

const F32: [Dtype; 3] = [Dtype::F32; 3];
const BF16: [Dtype; 3] = [Dtype::Bf16; 3];
/// Two roundings to bf16 of values to 1: of the weights, and of the output.
const TWO_ROUNDINGS: f32 = 1.0 / 256.0;

#[test]
fn attention_in_f32_is_the_processors() {
    let gpu = gpu();
    // Heads of one step of channels and of many, of a part of one, and wider than a block of output; blocks of queries and
    // keys that are full, and not.
    let cases: [([usize; 3], &[usize]); 8] = [
        ([5, 2, 10], &[7]),
        ([65, 3, 32], &[64, 1]),
        ([70, 2, 40], &[130]),
        ([64, 2, 64], &[128, 64]),
        ([33, 1, 128], &[200, 19]),
        ([9, 2, 200], &[66]),
        ([1, 2, 512], &[70]),
        ([3, 4, 1], &[2, 3, 5, 70]),
    ];
    for (sizes, keys) in cases {
        let problem = Problem::new(sizes, keys);
        let [[out, lse], [expected_out, expected_lse]] = [problem.on_gpu(&gpu, F32, 3), problem.on_cpu()];
        assert_close(&format!("{sizes:?} over {keys:?}"), &out, &expected_out, 1e-5);
        assert_close(&format!("{sizes:?} over {keys:?}, lse"), &lse, &expected_lse, 1e-5);
    }
}

#[test]
fn attention_in_bf16_is_the_processors_but_for_two_roundings() {
    let cases: [([usize; 3], &[usize]); 8] = [
        // On tensor cores.
        ([130, 2, 32], &[64, 129]),
        ([128, 1, 64], &[128]),
        ([31, 3, 64], &[1, 63, 65, 2]),
        ([161, 2, 128], &[257, 9]),
        ([1, 1, 128], &[1]),
        // On all others.
        ([66, 2, 40], &[65, 3]),
        ([3, 2, 1], &[5]),
        ([2, 2, 512], &[9]),
    ];
    // Blocks of one tile of keys, and of several; whole ones, and one key more or less.
    let on_hopper: [([usize; 3], &[usize]); 5] = [
        ([161, 2, 128], &[257, 9]),
        ([1, 1, 128], &[1]),
        ([128, 1, 128], &[176]),
        ([64, 3, 128], &[352, 176, 175, 177]),
        ([130, 1, 128], &[1, 530, 3]),
    ];
    let [hopper, other] = gpus();
    for (gpu, (sizes, keys)) in
        cases.map(|case| (&other, case)).into_iter().chain(on_hopper.map(|case| (&hopper, case)))
    {
        for skip in [8, 1] {
            let problem = Problem::new(sizes, keys);
            let [[out, lse], [expected_out, expected_lse]] = [problem.on_gpu(gpu, BF16, skip), problem.on_cpu()];
            let case = format!("{sizes:?} over {keys:?} on a {}", gpu.device.name());
            assert_close(&case, &out, &expected_out, TWO_ROUNDINGS);
            assert_close(&format!("{case}, lse"), &lse, &expected_lse, 1e-5);
        }
    }
    assert_eq!([hopper, other].map(|gpu| gpu.hopper.get().copied()), [Some(true), None]);
}

#[test]
fn a_part_is_the_whole_before_it_is_rounded() {
    let [hopper, other] = gpus();
    let others = [(32, BF16), (64, BF16), (128, BF16), (40, BF16), (40, F32)].map(|case| (&other, case));
    for (gpu, (d, dtypes)) in others.into_iter().chain([(&hopper, (128, BF16))]) {
        let problem = Problem::new([161, 2, d], &[65, 9]);
        let [part, part_lse] = problem.attended(gpu, dtypes, 8, true);
        let [whole, lse] = problem.on_gpu(gpu, dtypes, 8);
        let rounded: Vec<f32> = part.iter().map(|x| testing::rounded(*x, dtypes[0])).collect();
        assert!(rounded == whole && part_lse == lse, "{d} in {dtypes:?}");
        assert!(dtypes == F32 || part != whole, "{d}: a part is rounded");
    }
}

#[test]
fn a_sum_over_many_blocks_follows_the_highest_score() {
    // Keys that grow or shrink from block to block: each block takes over, or none does after the first.
    let [hopper, other] = gpus();
    for (gpu, d, dtypes, block, tolerance) in
        [(&other, 32, F32, 64, 1e-5), (&other, 128, BF16, 64, TWO_ROUNDINGS), (&hopper, 128, BF16, 176, TWO_ROUNDINGS)]
    {
        for rising in [true, false] {
            let mut problem = Problem::new([40, 1, d], &[5 * block - 20]);
            for (i, row) in problem.segments[0].1.chunks_exact_mut(d).enumerate() {
                let power = if rising { i / block } else { 4 - i / block };
                row.iter_mut().for_each(|k| *k *= (power as f32 - 2.0).exp2());
            }
            let [[out, lse], [expected_out, expected_lse]] = [problem.on_gpu(gpu, dtypes, 8), problem.on_cpu()];
            assert_close(&format!("{d}, rising {rising}"), &out, &expected_out, tolerance);
            assert_close(&format!("{d}, rising {rising}, lse"), &lse, &expected_lse, 1e-5);
        }
    }
}

#[test]
fn a_query_gets_the_same_bits_among_any_others() {
    let [hopper, other] = gpus();
    for (gpu, d, dtypes) in
        [(&other, 40, F32), (&other, 32, BF16), (&other, 128, BF16), (&other, 24, BF16), (&hopper, 128, BF16)]
    {
        let problem = Problem::new([150, 2, d], &[200, 70]);
        let [out, lse] = problem.on_gpu(gpu, dtypes, 0);
        for (start, rows) in [(0, 1), (149, 1), (1, 2), (63, 66), (21, 128), (5, 0)] {
            let some = Problem {
                queries: rows,
                q: problem.q[start * 2 * d..][..rows * 2 * d].to_vec(),
                segments: problem.segments.clone(),
                ..problem
            };
            let [some_out, some_lse] = some.on_gpu(gpu, dtypes, 0);
            assert!(some_out == out[start * 2 * d..][..rows * 2 * d], "{d}: rows {start}.. of {rows}");
            assert!(some_lse == lse[start * 2..][..rows * 2], "{d}: log-sum-exps {start}.. of {rows}");
        }
    }
}

#[test]
fn segments_without_keys_change_nothing_and_any_number_of_others_is_taken() {
    let gpu = gpu();
    for (d, dtypes, tolerance) in [(40, F32, 1e-5), (64, BF16, TWO_ROUNDINGS), (128, BF16, TWO_ROUNDINGS)] {
        let few = Problem::new([20, 2, d], &[70, 5]).on_gpu(&gpu, dtypes, 8);
        let mut with_empty = Problem::new([20, 2, d], &[70, 5]);
        for at in [2, 1, 0, 0, 0] {
            with_empty.segments.insert(at, (0, Vec::new(), Vec::new()));
        }
        assert!(few == with_empty.on_gpu(&gpu, dtypes, 8), "{d}");
        let many = Problem::new([20, 2, d], &[3, 70, 1, 2, 66, 4]);
        let [[out, lse], [expected_out, expected_lse]] = [many.on_gpu(&gpu, dtypes, 8), many.on_cpu()];
        assert_close("many", &out, &expected_out, tolerance);
        assert_close("many, lse", &lse, &expected_lse, 1e-5);
    }
}

#[test]
fn attention_without_keys_is_neutral_and_without_queries_empty() {
    let gpu = gpu();
    for (d, dtypes) in [(40, F32), (64, BF16), (24, BF16), (128, BF16)] {
        for keys in [&[][..], &[0], &[0, 0]] {
            let [out, lse] = Problem::new([3, 2, d], keys).on_gpu(&gpu, dtypes, 0);
            assert_eq!((out, lse), (vec![0.0; 3 * 2 * d], vec![f32::NEG_INFINITY; 6]), "{keys:?}");
        }
        for sizes in [[0, 2, d], [5, 0, d]] {
            let [out, lse] = Problem::new(sizes, &[5]).on_gpu(&gpu, dtypes, 0);
            assert!(out.is_empty() && lse.is_empty(), "{sizes:?}");
        }
    }
    let without_channels = Problem::new([2, 1, 0], &[5]);
    assert_eq!(without_channels.on_gpu(&gpu, F32, 0), without_channels.on_cpu());
}

#[test]
fn attention_shows_what_is_no_number() {
    let gpu = gpu();
    for (d, dtypes) in [(40, F32), (64, BF16), (128, BF16)] {
        for of_keys in [true, false] {
            let mut problem = Problem::new([4, 1, d], &[70, 3]);
            let segment = &mut problem.segments[0];
            (if of_keys { &mut segment.1 } else { &mut segment.2 })[66 * d + 2] = f32::NAN;
            let [out, lse] = problem.on_gpu(&gpu, dtypes, 0);
            let expected = problem.on_cpu();
            for (got, expected) in out.chunks_exact(d).zip(expected[0].chunks_exact(d)) {
                assert!(expected[2].is_nan() && got[2].is_nan(), "{d}, in keys: {of_keys}");
            }
            assert_eq!(lse.iter().all(|x| x.is_nan()), of_keys);
        }
    }
}

#[test]
fn attention_over_both_types_reads_f32() {
    let gpu = gpu();
    let problem = Problem::new([40, 2, 64], &[70, 3]);
    let [expected, lse] = problem.on_cpu();
    for dtypes in [[Dtype::Bf16, Dtype::F32, Dtype::Bf16], [Dtype::F32, Dtype::Bf16, Dtype::Bf16]] {
        let got = problem.on_gpu(&gpu, dtypes, 8);
        // The output's one rounding, if it has one.
        let expected: Vec<f32> = match dtypes[0] {
            Dtype::F32 => expected.clone(),
            Dtype::Bf16 => expected.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect(),
        };
        let tolerance = if dtypes[0] == Dtype::F32 { 1e-5 } else { 1.0 / 512.0 };
        assert_close("out", &got[0], &expected, tolerance);
        assert_close("lse", &got[1], &lse, 1e-5);
    }
}

#[test]
fn t5_attention_adds_the_bias_and_does_not_scale() {
    let (gpu, cpu) = (gpu(), cpu());
    for [rows, heads, d] in [[1, 1, 8], [7, 3, 10], [64, 2, 64], [130, 2, 40], [0, 2, 8]] {
        let sizes = [rows, heads * d];
        let [q, k, v] = [1, 2, 3].map(|seed| values(rows * heads * d, 0.7, seed));
        let bias = values(heads * rows * rows, 3.0, 4);
        let on_cpu = |x: &[f32], shape: &[usize]| cpu.upload(x, shape).unwrap();
        let expected = cpu
            .t5_attention(
                &on_cpu(&q, &sizes),
                &on_cpu(&k, &sizes),
                &on_cpu(&v, &sizes),
                &on_cpu(&bias, &[heads, rows, rows]),
                heads,
            )
            .unwrap();
        let expected = cpu.download(&expected).unwrap();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let [q, k, v] = [&q, &k, &v].map(|x| at(&gpu, x, &sizes, dtype, 1));
            let bias = at(&gpu, &bias, &[heads, rows, rows], Dtype::F32, 5);
            let got = t5_attention(&gpu, &q, &k, &v, &bias, heads).unwrap();
            assert_eq!((got.dtype(), got.dims()), (Dtype::F32, &sizes[..]));
            assert_close(&format!("{rows} × {heads} × {d}"), &gpu.download(&got).unwrap(), &expected, 1e-5);
        }
    }
}

#[test]
fn a_hopper_uses_its_own_kernel_after_one_trial_of_it() {
    let problem = Problem::new([40, 2, 128], &[70, 3]);
    let [hopper, other] = gpus();
    let names = ["attention_hopper_128_bf16", "attention_mma_128_bf16"];
    for (gpu, expected) in [(&hopper, [3, 1]), (&other, [0, 2])] {
        let results = [(); 2].map(|()| problem.on_gpu(gpu, BF16, 8));
        assert!(results[0] == results[1]);
        assert_eq!(names.map(|name| gpu.device.launches(name)), expected);
    }
    // Heads of other sizes have no kernel for Hopper.
    Problem::new([40, 2, 64], &[70]).on_gpu(&hopper, BF16, 8);
    assert_eq!(names.map(|name| hopper.device.launches(name)), [3, 1]);
}

#[test]
fn a_kernel_that_is_wrong_on_this_hopper_is_tried_once_and_not_used() {
    let problem = Problem::new([40, 2, 128], &[70, 3]);
    let expected = problem.on_gpu(&varied(Hopper::Absent), BF16, 8);
    for flaw in [Hopper::Wrong, Hopper::Silent, Hopper::Refused] {
        let gpu = varied(flaw);
        for _ in 0..2 {
            assert!(problem.on_gpu(&gpu, BF16, 8) == expected, "{flaw:?}");
        }
        assert_eq!(gpu.device.launches("attention_hopper_128_bf16"), 1, "{flaw:?}");
    }
}

#[test]
fn without_memory_for_a_trial_nothing_is_decided() {
    let gpu = varied(Hopper::Right);
    gpu.device.limit(200 << 10);
    let q = at(&gpu, &[1.0; 128], &[1, 1, 128], Dtype::Bf16, 0);
    let tried = attention(&gpu, &q, &[&q], &[&q], false).map(drop);
    assert!(matches!(tried, Err(EngineError::OutOfMemory { .. })), "{tried:?}");
    assert_eq!(gpu.hopper.get(), None);
    gpu.device.limit(usize::MAX);
    attention(&gpu, &q, &[&q], &[&q], false).unwrap();
    assert_eq!(gpu.hopper.get(), Some(&true));
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let gpu = gpu();
    let t = |shape: &[usize]| gpu.empty("test", shape, Dtype::F32).unwrap();
    let (q, flat) = (t(&[4, 2, 8]), t(&[4, 16]));
    let of = |q: &Tensor<_>, k: &[&Tensor<_>], v: &[&Tensor<_>]| attention(&gpu, q, k, v, false).map(|got| got.out);
    let attention = [
        of(&flat, &[&q], &[&q]),
        of(&q, &[&q], &[]),
        of(&q, &[&flat], &[&q]),
        of(&q, &[&t(&[4, 2, 6])], &[&q]),
        of(&q, &[&t(&[4, 3, 8])], &[&q]),
        of(&q, &[&q], &[&t(&[3, 2, 8])]),
    ];
    let of = |q, k, v, bias, heads| t5_attention(&gpu, q, k, v, bias, heads);
    let (bias, short) = (t(&[2, 4, 4]), t(&[3, 16]));
    let t5 = [
        of(&q, &flat, &flat, &bias, 2),
        of(&flat, &flat, &flat, &bias, 0),
        of(&flat, &flat, &flat, &t(&[3, 4, 4]), 3),
        of(&flat, &short, &flat, &bias, 2),
        of(&flat, &flat, &short, &bias, 2),
        of(&flat, &flat, &flat, &t(&[2, 4, 5]), 2),
    ];
    for (name, results) in [("attention", attention), ("t5_attention", t5)] {
        for (i, got) in results.into_iter().enumerate() {
            assert!(matches!(got, Err(EngineError::Shape { op, .. }) if op == name), "{name}, {i}");
        }
    }
}
