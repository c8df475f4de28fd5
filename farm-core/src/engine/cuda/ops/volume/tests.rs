//! Operations on volumes in emulation against the CPU engine.

use super::*;
use crate::engine::Engine;
use crate::engine::cuda::emulation::Emulation;
use crate::engine::cuda::ops::testing::*;
use crate::precision::Precision;
use crate::tiles::statistics::merge;

fn changed(values: Vec<f32>, change: impl Fn(f32) -> f32) -> Vec<f32> {
    values.into_iter().map(change).collect()
}

/// Values that both types hold.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    values(len, seed, Dtype::Bf16)
}

#[test]
fn a_latent_becomes_a_volume_with_the_roundings_of_the_cpu() {
    let shape @ [channels, frames, height, width] = [12, 2, 5, 7];
    let latent: Vec<f32> = noise(shape.iter().product(), 1).iter().map(|z| z * 1.37).collect();
    let (mean, std) = (noise(channels, 2), changed(noise(channels, 3), |s| s * 1.1));
    let expected = cpu().denormalize_latent(&cpu().upload(&latent, &shape).unwrap(), &mean, &std).unwrap();
    let expected = cpu().download(&expected).unwrap();
    for precision in [Precision::F32, Precision::Bf16] {
        let gpu = Gpu { precision, ..gpu() };
        let x = at(&gpu, &latent, &shape, Dtype::F32, 1);
        let out = denormalize_latent(&gpu, &x, &mean, &std).unwrap();
        assert_eq!((out.dims(), out.dtype()), (&[frames, height, width, channels][..], gpu.dtype()));
        let expected: Vec<f32> = expected.iter().map(|x| rounded(*x, gpu.dtype())).collect();
        assert_same(&gpu, &out, &expected, &format!("{precision:?}"));
        assert!(denormalize_latent(&gpu, &x, &mean[1..], &std).is_err());
    }
}

/// Shapes with numbers of groups: several blocks of a frame; channels of whole vectors and not, one a group and
/// several, more vectors than a block has threads.
const NORMS: [([usize; 4], usize); 6] = [
    ([2, 19, 21, 96], 32),
    ([2, 40, 50, 6], 3),
    ([1, 1, 1, 8], 4),
    ([3, 5, 7, 32], 32),
    ([1, 2, 3, 2560], 32),
    ([1, 100, 17, 24], 8),
];

#[test]
fn sums_are_those_of_the_rectangle() {
    for (shape @ [frames, height, width, _], groups) in NORMS {
        let x = changed(noise(shape.iter().product(), 9), |x| x + 7.0);
        for dtype in BOTH {
            let gpu = gpu();
            for offset in [0, 1] {
                let x = at(&gpu, &x, &shape, dtype, offset);
                let on_cpu = cpu().upload(&gpu.download(&x).unwrap(), &shape).unwrap();
                let inner = (height / 3..height - height / 4, width / 4..width - width / 5);
                for (rows, cols) in [(0..height, 0..width), inner, (height - 1..height, width / 2..width / 2 + 1)] {
                    let expected = cpu().group_sums(&on_cpu, groups, rows.clone(), cols.clone()).unwrap();
                    let got = group_sums(&gpu, &x, groups, rows.clone(), cols.clone()).unwrap();
                    assert_eq!((got.count, got.moments.len()), (expected.count, frames * groups));
                    for ([mean, m2], [expected, expected_m2]) in got.moments.iter().zip(&expected.moments) {
                        assert!((mean - expected).abs() < 1e-13 * expected.abs(), "{mean} {expected}");
                        // Of numbers about 7, the squares' sum is so much larger.
                        let digits = 1e-13 * 50.0 * got.count as f64;
                        assert!((m2 - expected_m2).abs() < 1e-10 * expected_m2 + digits, "{m2} {expected_m2}");
                        assert!(*m2 >= 0.0);
                    }
                }
            }
        }
    }
}

#[test]
fn sums_have_the_same_bits_wherever_the_rectangle_lies() {
    let [frames, height, width, channels] = [2, 60, 50, 32];
    let x = noise(frames * height * width * channels, 3);
    let (rows, cols) = (7..58, 5..49);
    let crop: Vec<f32> = rows
        .clone()
        .flat_map(|row| x[((height + row) * width + cols.start) * channels..][..cols.len() * channels].to_vec())
        .collect();
    for dtype in BOTH {
        let gpu = gpu();
        let whole = at(&gpu, &x, &[frames, height, width, channels], dtype, 0);
        let part = at(&gpu, &crop, &[1, rows.len(), cols.len(), channels], dtype, 0);
        let of_whole = group_sums(&gpu, &whole, 8, rows.clone(), cols.clone()).unwrap();
        let of_part = group_sums(&gpu, &part, 8, 0..rows.len(), 0..cols.len()).unwrap();
        assert_eq!(of_whole.moments[8..], of_part.moments);
    }
}

#[test]
fn a_norm_equals_that_of_the_cpu_with_totals_and_without() {
    for (shape @ [frames, .., channels], groups) in NORMS {
        let x = changed(noise(shape.iter().product(), 1), |x| 2.0 * x + 3.0);
        let (weight, bias) = (noise(channels, 2), noise(channels, 3));
        let other = Totals(noise(2 * frames * groups, 4).as_chunks().0.iter().map(|[a, b]| [*a, b.abs()]).collect());
        for dtype in BOTH {
            let gpu = gpu();
            for offset in [0, 3] {
                let x = at(&gpu, &x, &shape, dtype, offset);
                let [weight_on_gpu, bias_on_gpu] =
                    [&weight, &bias].map(|values| at(&gpu, values, &[channels], Dtype::F32, offset));
                let on_cpu = cpu().upload(&gpu.download(&x).unwrap(), &shape).unwrap();
                let [weight, bias] = [&weight, &bias].map(|values| cpu().upload(values, &[channels]).unwrap());
                for totals in [None, Some(&other)] {
                    let expected = cpu().group_norm_silu(&on_cpu, &weight, &bias, groups, totals).unwrap();
                    let got = group_norm_silu(&gpu, &x, &weight_on_gpu, &bias_on_gpu, groups, totals).unwrap();
                    assert_eq!(got.dtype(), dtype);
                    assert_close(&gpu, &got, &expected, 3e-6, &format!("{shape:?} {dtype} from {offset}"));
                }
            }
        }
    }
}

#[test]
fn a_norm_by_itself_has_the_bits_of_one_with_the_totals_of_its_own_sums() {
    for (shape @ [_, height, width, channels], groups) in NORMS {
        for dtype in BOTH {
            let gpu = gpu();
            let x = at(&gpu, &noise(shape.iter().product(), 1), &shape, dtype, 0);
            let [weight, bias] = [2, 3].map(|seed| at(&gpu, &noise(channels, seed), &[channels], Dtype::F32, 0));
            let run = |totals: Option<&Totals>| {
                gpu.download(&group_norm_silu(&gpu, &x, &weight, &bias, groups, totals).unwrap()).unwrap()
            };
            let totals = merge([&group_sums(&gpu, &x, groups, 0..height, 0..width).unwrap()]).unwrap();
            assert!(run(None) == run(Some(&totals)), "{shape:?} {dtype}");
        }
    }
}

#[test]
fn depth_to_space_time_moves_every_value_as_on_the_cpu() {
    let cases = [
        ([2, 3, 4, 60], [3, 2, 2]),
        ([2, 3, 5, 40], [2, 2, 1]),
        ([1, 2, 3, 4], [1, 2, 0]),
        ([2, 4, 9, 18], [2, 3, 0]),
        ([1, 9, 17, 1], [1, 1, 0]),
        ([2, 1, 2, 6144], [3, 2, 2]),
        ([1, 7, 6, 1536], [3, 2, 1]),
        ([1, 1, 2, 4096], [1, 64, 0]),
    ];
    for (shape, [st, s, drop]) in cases {
        let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| i as f32).collect();
        for dtype in BOTH {
            let gpu = gpu();
            let x = at(&gpu, &values, &shape, dtype, 1);
            let on_cpu = cpu().upload(&gpu.download(&x).unwrap(), &shape).unwrap();
            let expected = cpu().depth_to_space_time(&on_cpu, st, s, drop).unwrap();
            let got = depth_to_space_time(&gpu, &x, st, s, drop).unwrap();
            assert_eq!((got.dims(), got.dtype()), (expected.dims(), dtype));
            assert_same(&gpu, &got, &cpu().download(&expected).unwrap(), &format!("{shape:?} {st} {s} {drop}"));
        }
    }
}

#[test]
fn pixels_are_those_of_the_cpu() {
    // Around every border between two bytes, beyond both ends, and what is no number.
    let border = (0..=255).map(|k| 2.0 * k as f32 / 255.0 - 1.0);
    let borders = border.flat_map(|x| (-8..=8).map(move |ulps| f32::from_bits((x.to_bits() as i32 + ulps) as u32)));
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, -1.0, 1.0, 7.0, -3.0];
    let mut x: Vec<f32> = odd.into_iter().chain(borders).chain(noise(3000, 8)).collect();
    x.truncate(x.len() / 3 * 3);
    let shape = [1, 1, x.len() / 3, 3];
    for dtype in BOTH {
        let gpu = gpu();
        let x = at(&gpu, &x, &shape, dtype, 1);
        let on_cpu = cpu().upload(&gpu.download(&x).unwrap(), &shape).unwrap();
        assert_eq!(to_rgb8(&gpu, &x).unwrap(), cpu().to_rgb8(&on_cpu).unwrap());
        assert_eq!(to_rgb16(&gpu, &x).unwrap(), cpu().to_rgb16(&on_cpu).unwrap());
    }
    let gpu = gpu();
    assert!(to_rgb8(&gpu, &gpu.upload("test", &[], &[0, 2, 2, 3]).unwrap()).unwrap().is_empty());
}

#[test]
fn wrong_shapes_are_errors() {
    let gpu = gpu();
    let t = |shape: &[usize]| gpu.upload("test", &vec![0.0; shape.iter().product()], shape).unwrap();
    let (x, six) = (t(&[2, 2, 2, 6]), t(&[6]));
    let norm = |bias: &Tensor<Emulation>, groups, totals: Option<usize>| {
        let totals = totals.map(|count| Totals(vec![[0.0, 1.0]; count]));
        group_norm_silu(&gpu, &x, &six, bias, groups, totals.as_ref())
    };
    assert!(norm(&six, 4, None).is_err() && norm(&six, 0, None).is_err() && norm(&t(&[5]), 3, None).is_err());
    for count in [0, 3, 5, 7] {
        let error = norm(&six, 3, Some(count)).err().unwrap().to_string();
        assert!(error.contains("2 frames of 3 groups"), "{error}");
    }
    assert!(norm(&six, 3, Some(6)).is_ok());
    let sums = |groups, rows, cols| group_sums(&gpu, &x, groups, rows, cols);
    assert!(sums(3, 0..2, 0..2).is_ok() && sums(4, 0..2, 0..2).is_err());
    assert!(sums(3, 1..1, 0..2).is_err() && sums(3, 0..3, 0..2).is_err() && sums(3, 0..2, 1..3).is_err());
    assert!(depth_to_space_time(&gpu, &x, 1, 2, 0).is_err() && depth_to_space_time(&gpu, &x, 3, 1, 6).is_err());
    assert!(depth_to_space_time(&gpu, &x, 0, 1, 0).is_err() && depth_to_space_time(&gpu, &six, 1, 1, 0).is_err());
    assert!(to_rgb8(&gpu, &x).is_err() && to_rgb16(&gpu, &x).is_err());
}
