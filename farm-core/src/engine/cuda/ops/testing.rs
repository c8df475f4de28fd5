//! The same values on the emulated device and on the CPU engine.

use std::sync::Arc;

use candle_core::Tensor as CpuTensor;

use crate::engine::cpu::CpuEngine;
use crate::engine::cuda::device::{Device, Dtype};
use crate::engine::cuda::emulation::Emulation;
use crate::engine::cuda::gpu::Gpu;
use crate::engine::cuda::tensor::Tensor;
use crate::engine::{Engine, Result};
use crate::precision::Precision;

pub const BOTH: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];

pub fn gpu() -> Gpu<Emulation> {
    Gpu::new(Arc::new(Emulation::default()), Precision::Bf16)
}

pub fn cpu() -> CpuEngine {
    CpuEngine::new(1).unwrap()
}

/// Values in [-1, 1] that `dtype` has, different for every seed.
pub fn values(n: usize, seed: u64, dtype: Dtype) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| rounded(next(), dtype)).collect()
}

pub fn rounded(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

/// One tensor in both places.
pub struct Twin {
    pub gpu: Tensor<Emulation>,
    pub cpu: CpuTensor,
}

/// With values of `dtype` on the device.
pub fn twin(gpu: &Gpu<Emulation>, shape: &[usize], seed: u64, dtype: Dtype) -> Twin {
    twin_of(gpu, &values(shape.iter().product(), seed, dtype), shape, dtype)
}

pub fn twin_of(gpu: &Gpu<Emulation>, values: &[f32], shape: &[usize], dtype: Dtype) -> Twin {
    Twin { gpu: at(gpu, values, shape, dtype, 0), cpu: cpu().upload(values, shape).unwrap() }
}

/// As a part of a larger tensor, `offset` values behind its beginning.
pub fn at<D: Device>(gpu: &Gpu<D>, values: &[f32], shape: &[usize], dtype: Dtype, offset: usize) -> Tensor<D> {
    let all: Vec<f32> = std::iter::repeat_n(f32::NAN, offset).chain(values.iter().copied()).collect();
    let all = gpu.upload("test", &all, &[all.len()]).unwrap();
    gpu.cast(&all, dtype).unwrap().part(offset, shape)
}

/// `got` is `expected` but for `noise` of it, and one rounding to its own type.
#[track_caller]
pub fn assert_close(gpu: &Gpu<Emulation>, got: &Tensor<Emulation>, expected: &CpuTensor, noise: f32, case: &str) {
    assert_eq!(got.dims(), expected.dims(), "{case}");
    let half_step = if got.dtype() == Dtype::Bf16 { 1.0 / 256.0 } else { 0.0 };
    let (got, expected) = (gpu.download(got).unwrap(), cpu().download(expected).unwrap());
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let close = (got - expected).abs() <= half_step * expected.abs() + noise * expected.abs().max(1.0);
        assert!(close || got == expected, "{case}, value {i}: {got} instead of {expected}");
    }
}

/// The same values, to the bit.
#[track_caller]
pub fn assert_same(gpu: &Gpu<Emulation>, got: &Tensor<Emulation>, expected: &[f32], case: &str) {
    let got = gpu.download(got).unwrap();
    assert_eq!(got.len(), expected.len(), "{case}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(got.to_bits() == expected.to_bits(), "{case}, value {i}: {got} instead of {expected}");
    }
}

/// Both engines refuse, with the same words.
#[track_caller]
pub fn assert_refused<A, B>(gpu: Result<A>, cpu: Result<B>) {
    let (Err(gpu), Err(cpu)) = (gpu, cpu) else { panic!("not refused by both") };
    assert_eq!(gpu.to_string(), cpu.to_string());
}
