//! Products and convolutions in emulation against the CPU engine.

use std::sync::Arc;

use half::{bf16, f16};

use super::*;
use crate::engine::cpu::CpuEngine;
use crate::engine::cuda::emulation::Emulation;
use crate::engine::cuda::ops::testing::{assert_close, at, cpu, values};
use crate::engine::cuda::ops::weights::{conv_weight, matrix, stored_matrix, weight};
use crate::engine::{Engine, Over, RawDtype, RawTensor};
use crate::precision::Precision;

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

fn gpu(precision: Precision) -> Gpu<Emulation> {
    Gpu::new(Arc::new(Emulation::default()), precision)
}

/// Values that both types hold.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    values(len, seed, Dtype::Bf16)
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn linear_equals_that_of_the_cpu() {
    // One row, few, several tiles with odd rests; depths of a part of a chunk, of a step, of many; none.
    let sizes =
        [[1, 7, 5], [3, 1, 4], [130, 64, 129], [261, 40, 131], [5, 1500, 9], [2, 0, 3], [257, 96, 12], [0, 8, 8]];
    for (precision, [m, k, n]) in PRECISIONS.into_iter().flat_map(|precision| sizes.map(|sizes| (precision, sizes))) {
        let (gpu, cpu) = (gpu(precision), cpu());
        let (x, w, b) = (noise(m * k, 1), noise(n * k, 2), noise(n, 3));
        let on_cpu = cpu.matrix(&cpu.upload(&w, &[n, k]).unwrap(), Over::Few).unwrap();
        let expected =
            cpu.linear(&cpu.upload(&x, &[m, k]).unwrap(), &on_cpu, Some(&cpu.upload(&b, &[n]).unwrap())).unwrap();

        let weight = matrix(&gpu, &gpu.upload("test", &w, &[n, k]).unwrap(), Over::Tokens).unwrap();
        let bias = gpu.upload("test", &b, &[n]).unwrap();
        // Where 16 bytes can be read at a time, and where not; in the type of the product, and in the other.
        for (offset, dtype) in [(0, gpu.dtype()), (3, gpu.dtype()), (0, Dtype::F32), (8, Dtype::Bf16)] {
            let x = at(&gpu, &x, &[m, k], dtype, offset);
            let got = linear(&gpu, &x, &weight, Some(&bias)).unwrap();
            assert_eq!(got.dtype(), gpu.dtype());
            let what = format!("{precision:?} [{m}, {k}] to {n} from {offset}");
            assert_close(&gpu, &got, &expected, 1e-7 * (k as f32).max(1.0), &what);
        }
        if m == 1 {
            let got = linear(&gpu, &gpu.upload("test", &x, &[k]).unwrap(), &weight, None).unwrap();
            let expected = cpu.linear(&cpu.upload(&x, &[k]).unwrap(), &on_cpu, None).unwrap();
            assert_close(&gpu, &got, &expected, 1e-6, "a vector without a bias");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_whatever_rows_are_with_it_and_wherever_it_lies() {
    let (m, k, n) = (290, 144, 37);
    for precision in PRECISIONS {
        let gpu = gpu(precision);
        let weight = matrix(&gpu, &gpu.upload("test", &noise(n * k, 2), &[n, k]).unwrap(), Over::Tokens).unwrap();
        let bias = gpu.upload("test", &noise(n, 3), &[n]).unwrap();
        let run = |x: &Tensor<Emulation>| gpu.download(&linear(&gpu, x, &weight, Some(&bias)).unwrap()).unwrap();
        let x = at(&gpu, &noise(m * k, 1), &[m, k], gpu.dtype(), 0);
        let whole = run(&x);
        for (first, rows) in [(0, 1), (1, 1), (127, 130), (289, 1), (130, 128)] {
            assert!(run(&x.part(first * k, &[rows, k])) == whole[first * n..(first + rows) * n], "{first} {rows}");
        }
        assert!(run(&at(&gpu, &noise(m * k, 1), &[m, k], gpu.dtype(), 1)) == whole);
    }
}

#[test]
fn a_gated_product_equals_that_of_the_cpu_in_any_number_of_chunks() {
    let (m, k, n) = (131, 24, 30);
    for precision in PRECISIONS {
        let (gpu, cpu) = (gpu(precision), cpu());
        let (x, w) = (noise(m * k, 1), noise(n * k, 2));
        let weight = matrix(&gpu, &gpu.upload("test", &w, &[n, k]).unwrap(), Over::Tokens).unwrap();
        let on_gpu = at(&gpu, &x, &[m, k], gpu.dtype(), 0);
        let on_cpu = cpu.matrix(&cpu.upload(&w, &[n, k]).unwrap(), Over::Few).unwrap();
        let expected = cpu.linear_swiglu(&cpu.upload(&x, &[m, k]).unwrap(), &on_cpu).unwrap();
        // In bf16 both halves are rounded before.
        let noise = if precision == Precision::F32 { 1e-6 } else { 1e-2 };
        let whole = linear_swiglu(&gpu, &on_gpu, &weight).unwrap();
        assert_close(&gpu, &whole, &expected, noise, &format!("{precision:?}"));
        for rows in [1, 50, 130, 131] {
            let chunks = gated(&gpu, &on_gpu, &weight, rows * n * gpu.dtype().bytes()).unwrap();
            assert!(gpu.download(&chunks).unwrap() == gpu.download(&whole).unwrap(), "{precision:?} {rows}");
        }
        let vector = linear_swiglu(&gpu, &on_gpu.part(0, &[k]), &weight).unwrap();
        assert_eq!(vector.dims(), [n / 2]);
        assert_eq!(gpu.download(&vector).unwrap(), gpu.download(&whole).unwrap()[..n / 2]);
        assert!(linear_swiglu(&gpu, &on_gpu.part(0, &[0, k]), &weight).unwrap().is_empty());
        let odd = matrix(&gpu, &gpu.upload("test", &w, &[k, n]).unwrap().part(0, &[3, k]), Over::Few).unwrap();
        assert!(linear_swiglu(&gpu, &on_gpu, &odd).is_err());
    }
}

#[test]
fn a_matrix_of_the_text_encoder_is_f32_in_every_precision() {
    let w: Vec<f32> = noise(6, 1).iter().map(|w| w + 1e-5).collect();
    for precision in PRECISIONS {
        let gpu = gpu(precision);
        let raw = RawTensor { dtype: RawDtype::F32, shape: &[2, 3], bytes: &bytes(&w) };
        let of_tensor = matrix(&gpu, &gpu.upload("test", &w, &[2, 3]).unwrap(), Over::Encoder).unwrap();
        for matrix in [of_tensor, stored_matrix(&gpu, &[raw], Over::Encoder).unwrap()] {
            assert_eq!(gpu.download(&matrix.0).unwrap(), w);
            let x = at(&gpu, &[1.0, 0.0, 0.0], &[3], Dtype::F32, 0);
            assert_eq!(gpu.download(&linear(&gpu, &x, &matrix, None).unwrap()).unwrap(), [w[0], w[3]]);
        }
    }
}

#[test]
fn stored_weights_are_widened_exactly_and_matrices_rounded_once() {
    let values = [0.1f32, -2.5, 65504.0, 1e-7, f32::INFINITY, -0.0, 3.0, 1.003_906_3];
    let halves: Vec<u8> = values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
    let brains: Vec<u8> = values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
    let exact: [Vec<f32>; 3] = [
        values.to_vec(),
        values.map(|value| f16::from_f32(value).to_f32()).to_vec(),
        values.map(|value| bf16::from_f32(value).to_f32()).to_vec(),
    ];
    let stored = [(RawDtype::F32, bytes(&values)), (RawDtype::F16, halves), (RawDtype::Bf16, brains)];
    for precision in PRECISIONS {
        let gpu = gpu(precision);
        // Pieces of different types, one with more dimensions than two.
        let shapes: [&[usize]; 3] = [&[2, 4], &[2, 4], &[2, 4]];
        let piece = |i: usize| RawTensor { dtype: stored[i].0, shape: shapes[i], bytes: &stored[i].1 };
        let pieces = [piece(0), piece(1), piece(2)];
        let widened = weight(&gpu, &pieces).unwrap();
        assert_eq!((widened.dims(), widened.dtype()), (&[6, 4][..], Dtype::F32));
        assert_eq!(gpu.download(&widened).unwrap(), exact.concat());
        let deep = [piece(0), RawTensor { shape: &[2, 2, 2], ..piece(1) }, piece(2)];
        for over in [Over::Tokens, Over::Few] {
            let [of_pieces, of_tensor] =
                [stored_matrix(&gpu, &deep, over).unwrap(), matrix(&gpu, &widened, over).unwrap()];
            assert_eq!((of_pieces.0.dims(), of_pieces.0.dtype()), (&[6, 4][..], gpu.dtype()));
            let bits = |matrix: &Matrix<Emulation>| gpu.download(&matrix.0).unwrap();
            assert_eq!(bits(&of_pieces), bits(&of_tensor));
        }
        let short = [RawTensor { bytes: &stored[0].1[..8], ..pieces[0] }];
        assert!(stored_matrix(&gpu, &short, Over::Few).is_err() && stored_matrix(&gpu, &[], Over::Few).is_err());
        assert!(weight(&gpu, &short).is_err() && weight(&gpu, &[]).is_err() && weight(&gpu, &deep).is_err());
        let wide = [pieces[0], RawTensor { shape: &[1, 8], ..pieces[1] }];
        assert!(stored_matrix(&gpu, &wide, Over::Few).is_err());
    }
}

#[test]
fn other_shapes_than_a_matrix_has_are_errors_that_name_them() {
    let gpu = gpu(Precision::F32);
    let t = |shape: &[usize]| gpu.upload("test", &vec![0.0; shape.iter().product()], shape).unwrap();
    let weight = matrix(&gpu, &t(&[3, 4]), Over::Few).unwrap();
    let error = linear(&gpu, &t(&[2, 5]), &weight, None).err().unwrap().to_string();
    assert!(error.contains("x [rows, 4]") && error.contains("[2, 5]"), "{error}");
    assert!(linear(&gpu, &t(&[1, 2, 4]), &weight, None).is_err() && linear(&gpu, &t(&[]), &weight, None).is_err());
    let error = linear(&gpu, &t(&[2, 4]), &weight, Some(&t(&[4]))).err().unwrap().to_string();
    assert!(error.contains("bias [3]"), "{error}");
    assert!(matrix(&gpu, &t(&[3]), Over::Few).is_err());
}

/// A convolution for both engines.
struct Conv {
    cpu: <CpuEngine as Engine>::ConvWeight,
    gpu: ConvWeight<Emulation>,
}

fn random_conv(gpu: &Gpu<Emulation>, output: usize, input: usize) -> Conv {
    let (weight, bias) = (bytes(&noise(output * input * 27, 1)), bytes(&noise(output, 2)));
    let shape = [output, input, 3, 3, 3];
    let weight = RawTensor { dtype: RawDtype::F32, shape: &shape, bytes: &weight };
    let bias = RawTensor { dtype: RawDtype::F32, shape: &[output], bytes: &bias };
    Conv { cpu: cpu().conv_weight(weight, bias).unwrap(), gpu: conv_weight(gpu, weight, bias).unwrap() }
}

#[test]
fn a_convolution_equals_that_of_the_cpu() {
    // One frame, one pixel, odd widths, several tiles of pixels and of channels; channels of whole vectors and not.
    let sizes = [
        ([1, 1, 1, 1], 1),
        ([3, 1, 5, 2], 3),
        ([2, 9, 1, 3], 8),
        ([2, 7, 9, 12], 5),
        ([3, 6, 11, 8], 131),
        ([1, 3, 300, 16], 4),
        ([2, 5, 7, 32], 32),
        ([1, 3, 4, 96], 64),
        ([4, 3, 3, 24], 7),
    ];
    for (precision, (shape, output)) in
        PRECISIONS.into_iter().flat_map(|precision| sizes.map(|sizes| (precision, sizes)))
    {
        let [_, height, width, input] = shape;
        let (gpu, cpu) = (gpu(precision), cpu());
        let conv = random_conv(&gpu, output, input);
        let (x, past) = (noise(shape.iter().product(), 3), noise(2 * height * width * input, 4));
        let of_cache = [2, height, width, input];
        let cache = ConvCache(cpu.upload(&past, &of_cache).unwrap());
        for with_cache in [false, true] {
            let cache = Some(&cache).filter(|_| with_cache);
            let (expected, next) = cpu.causal_conv3d(&cpu.upload(&x, &shape).unwrap(), &conv.cpu, cache).unwrap();
            // Beginning at whole vectors, or not; in the other type too.
            let other = if gpu.dtype() == Dtype::F32 { Dtype::Bf16 } else { Dtype::F32 };
            for (offset, dtype) in [(0, gpu.dtype()), (5, gpu.dtype()), (0, other)] {
                let cache = with_cache.then(|| ConvCache(at(&gpu, &past, &of_cache, dtype, offset)));
                let x = at(&gpu, &x, &shape, dtype, offset);
                let (got, cache) = causal_conv3d(&gpu, &x, &conv.gpu, cache.as_ref()).unwrap();
                assert_eq!(got.dtype(), gpu.dtype());
                let what = format!("{precision:?} {shape:?} to {output} from {offset}, cache: {with_cache}");
                assert_close(&gpu, &got, &expected, 3e-6 * (input as f32).sqrt(), &what);
                assert_close(&gpu, &cache.0, &next.0, 0.0, &what);
            }
        }
    }
}

#[test]
fn chunks_with_caches_give_the_bits_of_the_whole() {
    let shape @ [frames, height, width, input] = [5, 6, 9, 32];
    for precision in PRECISIONS {
        let gpu = gpu(precision);
        let conv = random_conv(&gpu, 20, input);
        let x = at(&gpu, &noise(shape.iter().product(), 5), &shape, gpu.dtype(), 0);
        let (whole, last) = causal_conv3d(&gpu, &x, &conv.gpu, None).unwrap();
        let [whole, last] = [whole, last.0].map(|x| gpu.download(&x).unwrap());
        for chunk in [1, 2, 3] {
            let (mut parts, mut cache) = (Vec::new(), None);
            for start in (0..frames).step_by(chunk) {
                let count = chunk.min(frames - start);
                let part = x.part(start * height * width * input, &[count, height, width, input]);
                let (part, next) = causal_conv3d(&gpu, &part, &conv.gpu, cache.as_ref()).unwrap();
                parts.extend(gpu.download(&part).unwrap());
                cache = Some(next);
            }
            assert!(parts == whole, "{precision:?}, chunks of {chunk}");
            assert!(gpu.download(&cache.unwrap().0).unwrap() == last, "{precision:?}, cache after chunks of {chunk}");
        }
    }
}

#[test]
fn a_pixel_has_the_same_bits_in_a_frame_of_another_size() {
    let [frames, height, width, input] = [2, 9, 17, 16];
    let x = noise(frames * height * width * input, 6);
    let (rows, cols) = (2..8, 3..16);
    let pixels = |frame: usize| {
        (rows.clone()).flat_map({
            let cols = cols.clone();
            move |row| cols.clone().map(move |col| (frame * height + row) * width + col)
        })
    };
    let cropped: Vec<f32> =
        (0..frames).flat_map(pixels).flat_map(|pixel| x[pixel * input..][..input].to_vec()).collect();
    for precision in PRECISIONS {
        let gpu = gpu(precision);
        let conv = random_conv(&gpu, 3, input);
        let run = |values: &[f32], [height, width]: [usize; 2]| {
            let x = at(&gpu, values, &[frames, height, width, input], gpu.dtype(), 0);
            gpu.download(&causal_conv3d(&gpu, &x, &conv.gpu, None).unwrap().0).unwrap()
        };
        let (whole, part) = (run(&x, [height, width]), run(&cropped, [rows.len(), cols.len()]));
        // All but the pixels at an edge.
        for (frame, row, col) in
            (0..frames).flat_map(|frame| (1..5).flat_map(move |row| (1..12).map(move |col| (frame, row, col))))
        {
            let of_part = ((frame * rows.len() + row) * cols.len() + col) * 3;
            let of_whole = ((frame * height + rows.start + row) * width + cols.start + col) * 3;
            assert_eq!(part[of_part..][..3], whole[of_whole..][..3], "{precision:?} {frame} {row} {col}");
        }
    }
}

#[test]
fn a_cache_does_not_keep_the_chunk_alive() {
    let gpu = gpu(Precision::F32);
    let conv = random_conv(&gpu, 8, 8);
    let before = gpu.device.used();
    let x = gpu.upload("test", &noise(6 * 64 * 64 * 8, 1), &[6, 64, 64, 8]).unwrap();
    let (out, cache) = causal_conv3d(&gpu, &x, &conv.gpu, None).unwrap();
    drop((x, out));
    assert_eq!(gpu.device.used() - before, 4 * 2 * 64 * 64 * 8);
    drop(cache);
    assert_eq!(gpu.device.used(), before);
}

#[test]
fn other_shapes_than_a_convolution_has_are_errors_that_name_them() {
    let gpu = gpu(Precision::Bf16);
    let conv = random_conv(&gpu, 2, 3).gpu;
    let t = |shape: &[usize]| gpu.upload("test", &vec![0.0; shape.iter().product()], shape).unwrap();
    let error = causal_conv3d(&gpu, &t(&[2, 4, 4, 2]), &conv, None).err().unwrap().to_string();
    assert!(error.contains("[T, H, W, 3]") && error.contains("[2, 4, 4, 2]"), "{error}");
    let cache = ConvCache(t(&[1, 4, 4, 3]));
    let error = causal_conv3d(&gpu, &t(&[2, 4, 4, 3]), &conv, Some(&cache)).err().unwrap().to_string();
    assert!(error.contains("cache [2, 4, 4, 3]"), "{error}");
    assert!(causal_conv3d(&gpu, &t(&[0, 4, 4, 3]), &conv, None).is_err());
    let raw = |shape, bytes| RawTensor { dtype: RawDtype::F32, shape, bytes };
    assert!(conv_weight(&gpu, raw(&[1, 1, 3, 3, 3], &[0; 4]), raw(&[1], &[0; 4])).is_err());
    assert!(conv_weight(&gpu, raw(&[1, 1, 3, 3, 3], &[0; 108]), raw(&[2], &[0; 8])).is_err());
    assert!(conv_weight(&gpu, raw(&[1, 1, 3, 3, 1], &[0; 36]), raw(&[1], &[0; 4])).is_err());
}
