//! What the engine asks of a GPU: memory, copies and launches, in the order in which they are asked for. Two things
//! answer: the driver ([`super::driver`]) and, without any GPU, an emulation on the processor ([`super::emulation`])
//! that runs the same kernels from the same arguments.

use std::fmt;
use std::sync::Arc;

use super::kernels::Kernel;
use crate::engine::Result;

/// Of a byte in a device's memory. 0 is none.
pub type Address = u64;

/// One GPU, or what stands in for it.
///
/// Work is put on one stream and done in order: a launch sees what was copied and computed before, and memory that is
/// freed is used again only by later work.
pub trait Device: Send + Sync + 'static {
    /// What a person calls it, for example `NVIDIA H100 80GB HBM3`.
    fn name(&self) -> String;

    /// `bytes` of memory, more than 0, aligned to 256; what it holds is undefined. Errors with
    /// [`OutOfMemory`](crate::engine::EngineError::OutOfMemory) if the device has no room.
    fn alloc(&self, bytes: usize) -> Result<Address>;
    /// Gives back what [`Device::alloc`] has given, with the same size.
    fn free(&self, address: Address, bytes: usize);

    /// Copies into the device's memory. `from` may change when this returns.
    fn copy_in(&self, to: Address, from: &[u8]) -> Result<()>;
    /// Waits for all that was asked for before, and copies out.
    fn copy_out(&self, from: Address, to: &mut [u8]) -> Result<()>;
    /// Copies within the device's memory; the two do not overlap.
    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()>;

    /// Starts a kernel.
    fn launch(&self, launch: &Launch<'_>) -> Result<()>;
    /// Starts a matrix product in a vendor's library; false if the device has none for it, and nothing was done.
    fn matmul(&self, matmul: &Matmul) -> Result<bool>;
}

/// A kernel with its arguments.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    pub kernel: Kernel,
    /// Blocks in x, y and z, none of them 0.
    pub grid: [u32; 3],
    /// Threads of a block, a multiple of 32 of at most 1024.
    pub block: u32,
    /// Bytes of shared memory beside what the kernel declares.
    pub shared: u32,
    /// In the kernel's order, and of its types: nothing can check them.
    pub args: &'a [Arg],
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    Pointer(Address),
    /// `int`
    Int(i32),
    /// `long long`
    Long(i64),
    Float(f32),
}

impl Arg {
    /// The value as the kernel reads it, in the first bytes.
    pub fn bytes(self) -> [u8; 8] {
        let mut bytes = [0; 8];
        match self {
            Self::Pointer(address) => bytes = address.to_ne_bytes(),
            Self::Int(value) => bytes[..4].copy_from_slice(&value.to_ne_bytes()),
            Self::Long(value) => bytes = value.to_ne_bytes(),
            Self::Float(value) => bytes[..4].copy_from_slice(&value.to_ne_bytes()),
        }
        bytes
    }
}

/// `out = x · weightᵀ (+ bias)`: x `[rows, inner]`, weight `[columns, inner]`, out `[rows, columns]`, all row-major and of
/// `dtype`; bias `[columns]` in f32. Sums in f32, in an order that does not depend on `rows`; the bias is added before the
/// one rounding to `dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matmul {
    pub x: Address,
    pub weight: Address,
    pub bias: Option<Address>,
    pub out: Address,
    pub rows: usize,
    pub columns: usize,
    pub inner: usize,
    pub dtype: Dtype,
}

/// The type of a tensor's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    /// Of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// Memory of a device, given back when the last user drops it.
pub struct Buffer<D: Device> {
    device: Arc<D>,
    address: Address,
    bytes: usize,
}

impl<D: Device> Buffer<D> {
    /// Without any bytes it takes no memory.
    pub fn new(device: &Arc<D>, bytes: usize) -> Result<Self> {
        let address = if bytes == 0 { 0 } else { device.alloc(bytes)? };
        Ok(Self { device: device.clone(), address, bytes })
    }

    pub fn address(&self) -> Address {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl<D: Device> Drop for Buffer<D> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.device.free(self.address, self.bytes);
        }
    }
}
