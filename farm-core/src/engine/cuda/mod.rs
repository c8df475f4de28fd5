//! The CUDA engine.

mod cache;
pub mod device;
pub mod emulation;
pub mod kernels;
pub mod tensor;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::device::*;
    use super::emulation::Emulation;
    use super::kernels;
    use super::tensor::Tensor;

    #[test]
    fn a_kernel_runs() {
        let device = Arc::new(Emulation::default());
        let x = Tensor::new("test", &device, &[1000], Dtype::F32).unwrap();
        let values: Vec<u8> = (0..1000).flat_map(|i| (i as f32).to_le_bytes()).collect();
        device.copy_in(x.address(), &values).unwrap();
        let out = Tensor::new("test", &device, &[1000], Dtype::F32).unwrap();
        let args = [x.pointer(), x.pointer(), out.pointer(), Arg::Long(1000)];
        let launch = Launch { kernel: kernels::add.of(Dtype::F32), grid: [3, 1, 1], block: 128, shared: 0, args: &args };
        device.launch(&launch).unwrap();
        let mut bytes = vec![0; 4000];
        device.copy_out(out.address(), &mut bytes).unwrap();
        for (i, x) in bytes.as_chunks().0.iter().enumerate() {
            assert_eq!(f32::from_le_bytes(*x), 2.0 * i as f32);
        }
    }
}
