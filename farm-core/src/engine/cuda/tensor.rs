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
    /// Of a tensor that is handed to another rank: the point in its device's work from which on its values are there.
    ready: Option<Arc<D::Mark>>,
}

impl<D: Device> Clone for Tensor<D> {
    fn clone(&self) -> Self {
        let Self { buffer, offset, shape, dtype, ready } = self;
        Self { buffer: buffer.clone(), offset: *offset, shape: shape.clone(), dtype: *dtype, ready: ready.clone() }
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
        Ok(Self { buffer: Arc::new(buffer), offset: 0, shape: shape.to_vec(), dtype, ready: None })
    }

    /// What lies at `offset` bytes of a buffer. Panics if it goes beyond the end.
    pub fn within(buffer: &Arc<Buffer<D>>, offset: usize, shape: &[usize], dtype: Dtype) -> Self {
        let tensor = Self { buffer: buffer.clone(), offset, shape: shape.to_vec(), dtype, ready: None };
        assert!(offset + tensor.len() * dtype.bytes() <= buffer.bytes(), "a tensor beyond the end of its memory");
        tensor
    }

    /// The same tensor for a rank whose device may be another, as the work so far leaves it.
    pub fn handed(&self) -> Result<Self> {
        let ready = Some(Arc::new(self.buffer.device().mark()?));
        Ok(Self { ready, ..self.clone() })
    }

    /// A tensor that was handed to the rank on `device`: copied into its memory, or as it is if it lies there.
    pub fn taken(self, device: &Arc<D>) -> Result<Self> {
        const OP: &str = "take";
        if Arc::ptr_eq(self.buffer.device(), device) {
            return Ok(Self { ready: None, ..self });
        }
        if self.is_empty() {
            return Self::new(OP, device, &self.shape, self.dtype);
        }
        let unready =
            || EngineError::Backend { op: OP, message: "a tensor of another device that was not handed over".into() };
        let ready = self.ready.as_ref().ok_or_else(unready)?;
        let copy = Buffer::pulled(device, &self.buffer, self.address(), self.byte_len(), ready)?;
        Ok(Self { buffer: Arc::new(copy), offset: 0, ready: None, ..self })
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
