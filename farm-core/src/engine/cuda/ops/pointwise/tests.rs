//! Against the CPU engine, in the emulation.

use super::*;
use crate::engine::cuda::emulation::Emulation;
use crate::engine::cuda::ops::testing::*;
use crate::engine::{Engine, Over, SequenceOps, Transfer};

/// Numbers of values around a vector's, and more than a block takes.
const COUNTS: [usize; 7] = [0, 1, 7, 8, 9, 37, 2500];

#[test]
fn operations_on_pairs_are_the_cpus_but_for_one_rounding() {
    let (gpu, cpu) = (gpu(), cpu());
    for (dtype, count) in BOTH.into_iter().flat_map(|dtype| COUNTS.map(|count| (dtype, count))) {
        let wide = |seed| values(count, seed, Dtype::F32).iter().map(|x| rounded(x * 9.0, dtype)).collect::<Vec<_>>();
        let [a, b] = [1, 2].map(|seed| twin_of(&gpu, &wide(seed), &[count], dtype));
        let case = format!("{count} values in {dtype}");
        assert_close(&gpu, &add(&gpu, &a.gpu, &b.gpu).unwrap(), &cpu.add(&a.cpu, &b.cpu).unwrap(), 0.0, &case);
        let gated = cpu.gelu_gated(&a.cpu, &b.cpu).unwrap();
        assert_close(&gpu, &gelu_gated(&gpu, &a.gpu, &b.gpu).unwrap(), &gated, 1e-6, &case);
        assert_close(&gpu, &silu(&gpu, &a.gpu).unwrap(), &cpu.silu(&a.cpu).unwrap(), 1e-6, &case);
    }
}

#[test]
fn gates_far_from_zero_give_numbers() {
    let gpu = gpu();
    let far = [-1e30, -1000.0, -100.0, -88.0, 88.0, 1000.0];
    for dtype in BOTH {
        let (x, one) = (at(&gpu, &far, &[6], dtype, 0), at(&gpu, &[1.0; 6], &[6], dtype, 0));
        let expected = far.map(|x| rounded(x.max(0.0), dtype));
        for got in [silu(&gpu, &x).unwrap(), gelu_gated(&gpu, &x, &one).unwrap()] {
            for (got, expected) in gpu.download(&got).unwrap().iter().zip(expected) {
                assert!((got - expected).abs() < 1e-30 + 1e-6 * expected, "{got} instead of {expected}");
            }
        }
    }
}

fn gated(gpu: &Gpu<Emulation>, x: &Tensor<Emulation>) -> Result<Tensor<Emulation>> {
    let out = gpu.empty("test", &[x.dims()[0], x.dims()[1] / 2], x.dtype())?;
    swiglu(gpu, x, &out).map(|()| out)
}

#[test]
fn halves_of_a_row_are_gated() {
    let (gpu, cpu) = (gpu(), cpu());
    for (dtype, width) in BOTH.into_iter().flat_map(|dtype| [0, 1, 7, 8, 24, 300].map(|width| (dtype, width))) {
        let x = twin(&gpu, &[5, 2 * width], 3, dtype);
        // The identity, so that the CPU's product gives the halves as they are.
        let identity: Vec<f32> =
            (0..4 * width * width).map(|i| f32::from(i / (2 * width) == i % (2 * width))).collect();
        let identity = cpu.upload(&identity, &[2 * width, 2 * width]).unwrap();
        let identity = cpu.matrix(&identity, Over::Few).unwrap();
        let expected = cpu.linear_swiglu(&x.cpu, &identity).unwrap();
        assert_close(&gpu, &gated(&gpu, &x.gpu).unwrap(), &expected, 1e-6, &format!("{width} in {dtype}"));
    }
    let odd = at(&gpu, &[0.0; 6], &[2, 3], Dtype::F32, 0);
    assert!(matches!(gated(&gpu, &odd), Err(crate::engine::EngineError::Shape { op: "linear_swiglu", .. })));
}

#[test]
fn an_euler_step_has_the_cpus_bits() {
    let (gpu, cpu) = (gpu(), cpu());
    for (dtype, count) in BOTH.into_iter().flat_map(|dtype| COUNTS.map(|count| (dtype, count))) {
        let z = twin(&gpu, &[count], 1, Dtype::F32);
        let [cond, uncond] = [2, 3].map(|seed| twin(&gpu, &[count], seed, dtype));
        for guided in [true, false] {
            let (on_gpu, on_cpu) = (guided.then_some(&uncond.gpu), guided.then_some(&uncond.cpu));
            let got = euler_step(&gpu, &z.gpu, &cond.gpu, on_gpu, 4.5, -0.013).unwrap();
            let expected = cpu.euler_step(&z.cpu, &cond.cpu, on_cpu, 4.5, -0.013).unwrap();
            assert_eq!(got.dtype(), Dtype::F32);
            assert_same(&gpu, &got, &cpu.download(&expected).unwrap(), &format!("{count} values in {dtype}"));
        }
    }
}

#[test]
fn where_values_lie_does_not_change_them() {
    let gpu = gpu();
    for dtype in BOTH {
        let [a, b] = [1, 2].map(|seed| values(600, seed, dtype));
        let run = |offset| {
            let (a, b) = (at(&gpu, &a, &[6, 100], dtype, offset), at(&gpu, &b, &[6, 100], dtype, 2 * offset));
            let other = if dtype == Dtype::F32 { Dtype::Bf16 } else { Dtype::F32 };
            [
                add(&gpu, &a, &b),
                gelu_gated(&gpu, &a, &b),
                silu(&gpu, &a),
                gated(&gpu, &a),
                euler_step(&gpu, &a, &b, Some(&a), 3.0, -0.1),
                gpu.cast(&a, other),
                narrow(&gpu, &a, 1, 8, 64),
                concat(&gpu, &[&a, &b], 1),
                concat(&gpu, &[&a, &b], 0),
            ]
            .map(|out| gpu.download(&out.unwrap()).unwrap())
        };
        let aligned = run(0);
        for offset in [1, 3, 8] {
            assert!(run(offset) == aligned, "{dtype}, {offset} values behind the beginning");
        }
    }
}

#[test]
fn of_two_types_the_wider_counts() {
    let (gpu, cpu) = (gpu(), cpu());
    let (a, b) = (twin(&gpu, &[3, 4], 1, Dtype::F32), twin(&gpu, &[3, 4], 2, Dtype::Bf16));
    let sum = cpu.download(&cpu.add(&a.cpu, &b.cpu).unwrap()).unwrap();
    assert_same(&gpu, &add(&gpu, &a.gpu, &b.gpu).unwrap(), &sum, "f32 and bf16");
    assert_same(&gpu, &add(&gpu, &b.gpu, &a.gpu).unwrap(), &sum, "bf16 and f32");
    let rows = cpu.download(&cpu.concat(&[&b.cpu, &a.cpu], 0).unwrap()).unwrap();
    assert_same(&gpu, &concat(&gpu, &[&b.gpu, &a.gpu], 0).unwrap(), &rows, "rows");
    // No values ask for no type.
    let none = gpu.empty("test", &[0, 4], Dtype::F32).unwrap();
    assert_eq!(concat(&gpu, &[&none, &b.gpu, &b.gpu], 0).unwrap().dtype(), Dtype::Bf16);
}

#[test]
fn parts_and_whole_are_the_cpus() {
    let (gpu, cpu) = (gpu(), cpu());
    // Runs of odd and of even lengths, and of whole vectors.
    for (dtype, shape) in BOTH.into_iter().flat_map(|dtype| [[3, 5, 7], [4, 6, 16], [2, 16, 8]].map(|s| (dtype, s))) {
        let x = twin(&gpu, &shape, 5, dtype);
        for (dim, size) in shape.into_iter().enumerate() {
            let parts: Vec<_> = [0..1, 1..1, 1..size].into_iter().map(|range| (range.start, range.len())).collect();
            let on_gpu: Vec<_> = parts.iter().map(|(at, len)| narrow(&gpu, &x.gpu, dim, *at, *len).unwrap()).collect();
            let case = format!("dimension {dim} of {shape:?} in {dtype}");
            for (part, (at, len)) in on_gpu.iter().zip(&parts) {
                let expected = cpu.narrow(&x.cpu, dim, *at, *len).unwrap();
                assert_eq!(part.dims(), expected.dims());
                assert_same(&gpu, part, &cpu.download(&expected).unwrap(), &case);
            }
            let whole = concat(&gpu, &on_gpu.iter().collect::<Vec<_>>(), dim).unwrap();
            assert_eq!((whole.dims(), whole.dtype()), (&shape[..], dtype));
            assert_same(&gpu, &whole, &cpu.download(&x.cpu).unwrap(), &case);
        }
    }
}

#[test]
fn rows_of_a_tensor_are_not_copied() {
    let gpu = gpu();
    let x = at(&gpu, &values(24, 1, Dtype::F32), &[4, 6], Dtype::F32, 0);
    assert_eq!(narrow(&gpu, &x, 0, 1, 2).unwrap().address(), x.address() + 24);
    assert_eq!(reshape(&gpu, &x, &[1, 24]).unwrap().address(), x.address());
    // With one row its columns lie together too.
    let row = reshape(&gpu, &x, &[1, 24]).unwrap();
    assert_eq!(narrow(&gpu, &row, 1, 3, 2).unwrap().address(), x.address() + 12);
}

#[test]
fn bytes_are_the_tensors_own_type() {
    let (gpu, values) = (gpu(), [1.0, -2.5, 0.15625]);
    let f32_bytes: Vec<u8> = values.iter().flat_map(|x: &f32| x.to_le_bytes()).collect();
    let bf16_bytes: Vec<u8> = values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
    for (dtype, bytes) in [(Dtype::F32, f32_bytes), (Dtype::Bf16, bf16_bytes)] {
        let x = at(&gpu, &values, &[3, 1], dtype, 5);
        assert_eq!(to_bytes(&gpu, &x).unwrap(), bytes);
        assert_eq!(x.byte_len(), bytes.len());
        let back = tensor_of_bytes(&gpu, &bytes, &[1, 3]).unwrap();
        assert_eq!((back.dims(), back.dtype()), (&[1, 3][..], dtype));
        assert_same(&gpu, &back, &values, "back");
    }
    assert!(to_bytes(&gpu, &tensor_of_bytes(&gpu, &[], &[0, 3]).unwrap()).unwrap().is_empty());
    for (bytes, shape) in [(&[0; 9][..], &[3][..]), (&[0; 8], &[3]), (&[], &[1]), (&[0; 4], &[usize::MAX, 4])] {
        assert!(tensor_of_bytes(&gpu, bytes, shape).is_err(), "{} bytes as {shape:?}", bytes.len());
    }
}

#[test]
fn patches_and_latents_are_the_cpus() {
    let (gpu, cpu) = (gpu(), cpu());
    for (dtype, [c, t, rows, columns]) in
        BOTH.into_iter().flat_map(|dtype| [[12, 3, 5, 7], [1, 2, 1, 3], [3, 0, 2, 2]].map(|grid| (dtype, grid)))
    {
        let latent = twin(&gpu, &[c, t, 2 * rows, 2 * columns], 7, dtype);
        let patches = cpu.patchify(&latent.cpu).unwrap();
        let got = patchify(&gpu, &latent.gpu).unwrap();
        assert_eq!((got.dims(), got.dtype()), (patches.dims(), Dtype::F32));
        assert_same(&gpu, &got, &cpu.download(&patches).unwrap(), "patches");

        let patches = twin(&gpu, &[t * rows * columns, 4 * c], 8, dtype);
        let expected = cpu.unpatchify(&patches.cpu, [t, rows, columns]).unwrap();
        let got = unpatchify(&gpu, &patches.gpu, [t, rows, columns]).unwrap();
        assert_eq!((got.dims(), got.dtype()), (expected.dims(), Dtype::F32));
        assert_same(&gpu, &got, &cpu.download(&expected).unwrap(), "latent");
    }
}

#[test]
fn shapes_are_refused_as_the_cpu_does() {
    let (gpu, cpu) = (gpu(), cpu());
    let (a, b) = (twin(&gpu, &[3, 4], 1, Dtype::F32), twin(&gpu, &[4, 3], 2, Dtype::F32));
    let cube = twin(&gpu, &[3, 4, 1], 3, Dtype::F32);
    assert_refused(add(&gpu, &a.gpu, &b.gpu), cpu.add(&a.cpu, &b.cpu));
    assert_refused(gelu_gated(&gpu, &a.gpu, &b.gpu), cpu.gelu_gated(&a.cpu, &b.cpu));
    for (x, y) in [(&a, &b), (&b, &a)] {
        let on_gpu = euler_step(&gpu, &a.gpu, &x.gpu, Some(&y.gpu), 1.0, 1.0);
        assert_refused(on_gpu, cpu.euler_step(&a.cpu, &x.cpu, Some(&y.cpu), 1.0, 1.0));
    }
    assert_refused(reshape(&gpu, &a.gpu, &[5, 2]), cpu.reshape(&a.cpu, &[5, 2]));
    for (dim, start, len) in [(2, 0, 0), (1, 2, 3), (0, usize::MAX, 2)] {
        assert_refused(narrow(&gpu, &a.gpu, dim, start, len), cpu.narrow(&a.cpu, dim, start, len));
    }
    assert_refused(concat(&gpu, &[], 0), cpu.concat(&[], 0));
    for (x, dim) in [(&b, 0), (&cube, 1), (&a, 2)] {
        assert_refused(concat(&gpu, &[&a.gpu, &x.gpu], dim), cpu.concat(&[&a.cpu, &x.cpu], dim));
    }
    assert_refused(patchify(&gpu, &a.gpu), cpu.patchify(&a.cpu));
    let odd = twin(&gpu, &[2, 1, 3, 2], 3, Dtype::F32);
    assert_refused(patchify(&gpu, &odd.gpu), cpu.patchify(&odd.cpu));
    for grid in [[1, 2, 2], [1, 3, 1]] {
        assert_refused(unpatchify(&gpu, &b.gpu, grid), cpu.unpatchify(&b.cpu, grid));
    }
}
