//! A device with what every operation needs of it: tensors, launches of a usual form, conversions.

use std::sync::{Arc, OnceLock};

use super::device::{Arg, Device, Dtype, Launch, Work};
use super::kernels::{self, Kernel};
use super::tensor::Tensor;
use crate::engine::{EngineError, Result};
use crate::precision::Precision;

/// Threads of a block where a kernel does not care.
pub const BLOCK: u32 = 256;
/// More blocks than this have nothing to gain: threads take several values each.
const MOST_BLOCKS: usize = 1 << 16;

/// A device and how it computes.
pub struct Gpu<D: Device> {
    pub device: Arc<D>,
    pub precision: Precision,
    /// Whether attention takes the kernel of Hopper's own instructions, which its first use finds out.
    pub hopper: OnceLock<bool>,
}

impl<D: Device> Gpu<D> {
    pub fn new(device: Arc<D>, precision: Precision) -> Self {
        Self { device, precision, hopper: OnceLock::new() }
    }

    /// Of weights, and of what is computed from them.
    pub fn dtype(&self) -> Dtype {
        match self.precision {
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::Bf16,
        }
    }

    /// Its values are undefined.
    pub fn empty(&self, op: &'static str, shape: &[usize], dtype: Dtype) -> Result<Tensor<D>> {
        Tensor::new(op, &self.device, shape, dtype)
    }

    /// f32 values in the device's memory.
    pub fn upload(&self, op: &'static str, values: &[f32], shape: &[usize]) -> Result<Tensor<D>> {
        if shape.iter().product::<usize>() != values.len() {
            return Err(shape_error(op, format!("{} values", shape.iter().product::<usize>()), &[values.len()]));
        }
        let out = self.empty(op, shape, Dtype::F32)?;
        if !values.is_empty() {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            self.device.copy_in(out.address(), &bytes)?;
        }
        Ok(out)
    }

    /// The values of a tensor of either type, after all work that was started.
    pub fn download(&self, x: &Tensor<D>) -> Result<Vec<f32>> {
        let x = self.cast(x, Dtype::F32)?;
        let mut bytes = vec![0; 4 * x.len()];
        if !bytes.is_empty() {
            self.device.copy_out(x.address(), &mut bytes)?;
        }
        Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// The same values in another type: exact to f32, rounded to the nearest to bf16.
    pub fn cast(&self, x: &Tensor<D>, dtype: Dtype) -> Result<Tensor<D>> {
        if x.dtype() == dtype {
            return Ok(x.clone());
        }
        let kernel = match dtype {
            Dtype::F32 => kernels::to_f32_of_bf16,
            Dtype::Bf16 => kernels::to_bf16_of_f32,
        };
        let out = self.empty("cast", x.dims(), dtype)?;
        self.over_values(
            kernel,
            x.len(),
            &[x.pointer(), out.pointer(), Arg::Long(x.len() as i64)],
            moving(&[x, &out]),
        )?;
        Ok(out)
    }

    /// Starts a kernel whose threads loop over `count` values; none if there are none.
    pub fn over_values(&self, kernel: Kernel, count: usize, args: &[Arg], work: Work) -> Result<()> {
        let blocks = count.div_ceil(BLOCK as usize).min(MOST_BLOCKS) as u32;
        self.launch(kernel, [blocks, 1, 1], BLOCK, 0, args, work)
    }

    /// Starts a kernel; none if the grid has no blocks.
    pub fn launch(
        &self,
        kernel: Kernel,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        args: &[Arg],
        work: Work,
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        self.device.launch(&Launch { kernel, grid, block, shared, args, work })
    }
}

/// The work of a kernel that reads or writes each value of these once.
pub fn moving<D: Device>(tensors: &[&Tensor<D>]) -> Work {
    Work::moving(tensors.iter().map(|x| x.len() * x.dtype().bytes()).sum())
}

/// An operation does not take this shape.
pub fn shape_error(op: &'static str, expected: impl Into<String>, got: &[usize]) -> EngineError {
    EngineError::Shape { op, expected: expected.into(), got: format!("{got:?}") }
}

/// The sizes of a tensor that has to have `N` of them, called `form`.
pub fn dims<D: Device, const N: usize>(op: &'static str, form: &str, x: &Tensor<D>) -> Result<[usize; N]> {
    x.dims().try_into().map_err(|_| shape_error(op, form, x.dims()))
}

/// `x`, called `what`, has exactly this shape.
pub fn expect<D: Device>(op: &'static str, what: &str, x: &Tensor<D>, shape: &[usize]) -> Result<()> {
    if x.dims() != shape {
        return Err(shape_error(op, format!("{what} {shape:?}"), x.dims()));
    }
    Ok(())
}

/// A size as a kernel takes it.
pub fn int(op: &'static str, size: usize) -> Result<Arg> {
    let message = || format!("{size} is more than a kernel counts to");
    i32::try_from(size).map(Arg::Int).map_err(|_| EngineError::Backend { op, message: message() })
}
