//! Tensors in a device's memory: contiguous, row-major, f32 or bf16.

use std::sync::Arc;

use super::device::{Address, Arg, Buffer, Device, Dtype};
use crate::engine::{EngineError, Result, Transfer};

/// A tensor, or a part of one that is contiguous. Cloning shares the memory.
pub struct Tensor<D: Device> {
    buffer: Arc<Buffer<D>>,
    /// Of the first value, in bytes.
    offset: usize,
    shape: Vec<usize>,
    dtype: Dtype,
}

impl<D: Device> Clone for Tensor<D> {
    fn clone(&self) -> Self {
        Self { buffer: self.buffer.clone(), offset: self.offset, shape: self.shape.clone(), dtype: self.dtype }
    }
}

impl<D: Device> Tensor<D> {
    /// Values are undefined.
    pub fn new(op: &'static str, device: &Arc<D>, shape: &[usize], dtype: Dtype) -> Result<Self> {
        let bytes = shape.iter().try_fold(dtype.bytes(), |bytes, size| bytes.checked_mul(*size));
        let bytes = bytes.ok_or(EngineError::OutOfMemory { op, wanted: usize::MAX })?;
        let buffer = Buffer::new(device, bytes).map_err(|error| match error {
            EngineError::OutOfMemory { wanted, .. } => EngineError::OutOfMemory { op, wanted },
            other => other,
        })?;
        Ok(Self { buffer: Arc::new(buffer), offset: 0, shape: shape.to_vec(), dtype })
    }

    /// What lies at `offset` bytes of a buffer. Panics if it goes beyond the end.
    pub fn within(buffer: &Arc<Buffer<D>>, offset: usize, shape: &[usize], dtype: Dtype) -> Self {
        let tensor = Self { buffer: buffer.clone(), offset, shape: shape.to_vec(), dtype };
        assert!(offset + tensor.len() * dtype.bytes() <= buffer.bytes(), "a tensor beyond the end of its memory");
        tensor
    }

    pub fn dims(&self) -> &[usize] {
        &self.shape
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Of the first value.
    pub fn address(&self) -> Address {
        self.buffer.address() + self.offset as u64
    }

    pub fn pointer(&self) -> Arg {
        Arg::Pointer(self.address())
    }

    /// The same values with another shape, which has to have as many.
    pub fn reshaped(&self, shape: &[usize]) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>(), self.len());
        Self { shape: shape.to_vec(), ..self.clone() }
    }

    /// The values `start..` in memory, as many as `shape` has. Panics if there are not so many.
    pub fn part(&self, start: usize, shape: &[usize]) -> Self {
        assert!(start + shape.iter().product::<usize>() <= self.len(), "a part beyond the end of a tensor");
        Self { offset: self.offset + start * self.dtype.bytes(), shape: shape.to_vec(), ..self.clone() }
    }
}

impl<D: Device> Transfer for Tensor<D> {
    fn sizes(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn byte_len(&self) -> usize {
        self.len() * self.dtype.bytes()
    }
}
