//! The CUDA engine: operations on a [`Device`](device::Device), which is a GPU or its [emulation](emulation::Emulation).
//!
//! Layers, from the bottom: a device has memory and runs kernels; [`tensor`]s are in its memory; [`ops`] check shapes,
//! choose kernels and start them; [`CudaEngine`] is the engine's traits over them. Kernels are the files in `kernels/`.
//!
//! In f32 every tensor is f32. In bf16 weights and what is computed from them are bf16, with f32 sums inside every kernel and
//! one rounding at its end; f32 stay the latent and the sampler, the text encoder, rotary tables, the weights of
//! norms and biases, and statistics.

mod cache;
pub mod ceiling;
pub mod device;
pub mod driver;
pub mod emulation;
mod engine;
mod gpu;
pub mod kernels;
mod ops;
pub mod parking;
pub mod plan;
pub mod profile;
pub mod tensor;

pub use self::engine::CudaEngine;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::device::*;
    use super::emulation::Emulation;
    use super::gpu::Gpu;
    use super::kernels;
    use crate::engine::EngineError;
    use crate::precision::Precision;

    fn gpu() -> Gpu<Emulation> {
        Gpu::new(Arc::new(Emulation::default()), Precision::Bf16)
    }

    #[test]
    fn a_kernel_gets_its_arguments_and_gives_its_values() {
        let gpu = gpu();
        let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        let x = gpu.upload("test", &values, &[1000]).unwrap();
        let out = gpu.empty("test", &[1000], Dtype::F32).unwrap();
        let args = [x.pointer(), x.pointer(), out.pointer(), Arg::Long(1000)];
        gpu.over_values(kernels::add.of(Dtype::F32), 1000, &args, Work::moving(12000)).unwrap();
        let doubled: Vec<f32> = values.iter().map(|x| x + x).collect();
        assert_eq!(gpu.download(&out).unwrap(), doubled);
    }

    #[test]
    fn arguments_of_other_types_than_the_kernel_takes_are_refused() {
        let gpu = gpu();
        let x = gpu.upload("test", &[1.0], &[1]).unwrap();
        let args = [x.pointer(), x.pointer(), x.pointer(), Arg::Int(1)];
        let refused = gpu.over_values(kernels::add.of(Dtype::F32), 1, &args, Work::moving(12));
        assert!(matches!(refused, Err(EngineError::Backend { message, .. }) if message.contains("takes pppl")));
    }

    #[test]
    fn conversions_round_to_the_nearest() {
        let gpu = gpu();
        // A tie to even on both sides, a rounding that carries, and what is no number.
        let values = [1.0, 1.003_906_2, 1.011_718_8, 1.9999, -0.0, f32::INFINITY, f32::NAN, 1e-40, f32::MAX];
        let x = gpu.upload("test", &values, &[3, 3]).unwrap();
        let rounded = gpu.download(&gpu.cast(&x, Dtype::Bf16).unwrap()).unwrap();
        for (got, value) in rounded.iter().zip(values) {
            assert_eq!(got.to_bits(), half::bf16::from_f32(value).to_f32().to_bits(), "{value}");
        }
    }

    #[test]
    fn memory_has_an_end_and_comes_back() {
        let gpu = Gpu::new(Arc::new(Emulation::with_memory(8192)), Precision::F32);
        let x = gpu.empty("test", &[1024], Dtype::F32).unwrap();
        let wanted = gpu.empty("large", &[2048], Dtype::F32).map(drop);
        assert!(matches!(wanted, Err(EngineError::OutOfMemory { op: "large", wanted: 8192 })));
        drop(x);
        assert_eq!(gpu.device.used(), 0);
        gpu.empty("large", &[2048], Dtype::F32).unwrap();
    }
}
