//! What the engine asks of a GPU: memory, copies and launches, in the order in which they are asked for. Two things
//! answer: the driver ([`super::driver`]) and, without any GPU, an emulation on the processor ([`super::emulation`])
//! that runs the same kernels from the same arguments.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::kernels::{Kernel, Source};
use super::parking::Lease;
use crate::engine::Result;

/// Of a byte in a device's memory. 0 is none.
pub type Address = u64;

/// One GPU, or what stands in for it.
///
/// Work is put on one stream and done in order: a launch sees what was copied and computed before, and memory that is
/// freed is used again only by later work. Beside it there are two more, one of fetches and one of copies from other
/// devices; marks say what of one stream comes before what of another, also of another device's. Nothing but
/// [`Device::copy_out`] waits for the device.
pub trait Device: Send + Sync + 'static {
    /// Memory of the host that fetches read: page-locked (`cuMemHostAlloc`), because from other memory copies are slower and
    /// wait for the host. Dropped, it is given back when every fetch from it is done (`cuStreamSynchronize` of the second
    /// stream, then `cuMemFreeHost`).
    type Host: AsRef<[u8]> + AsMut<[u8]> + Send + Sync + 'static;
    /// A point in the order of a stream's work (an event with `CU_EVENT_DISABLE_TIMING`). It may be dropped at any time, what
    /// waits for it goes on waiting.
    type Mark: Send + Sync + 'static;

    /// What a person calls it, for example `NVIDIA H100 80GB HBM3`.
    fn name(&self) -> String;
    /// Whether the kernels of this file can run on it.
    fn runs(&self, source: Source) -> bool;

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

    /// `bytes` of the host's memory, more than 0; what it holds is undefined. Errors with
    /// [`OutOfMemory`](crate::engine::EngineError::OutOfMemory) if there is no room.
    fn host(&self, bytes: usize) -> Result<Self::Host>;
    /// The point after all work that was asked for so far, fetches aside (`cuEventRecord` on the stream of work).
    fn mark(&self) -> Result<Self::Mark>;
    /// Starts copying all of `from` to the device's memory, after the fetches before and not before `after` (on the second
    /// stream `cuStreamWaitEvent`, `cuMemcpyHtoDAsync` and `cuEventRecord`). Returns the point at which it is done. `from`
    /// does not change until then.
    fn fetch(&self, to: Address, from: &Self::Host, after: &Self::Mark) -> Result<Self::Mark>;
    /// Work that is asked for from now on begins after `mark`, which may be another device's (`cuStreamWaitEvent` on the stream
    /// of work). The host does not wait.
    fn wait(&self, mark: &Self::Mark) -> Result<()>;
    /// Starts copying `bytes`, more than 0, at `from` in the memory of `peer` into memory of this device, which is allocated
    /// for it, not before `after` and beside other work (`cuMemAllocAsync`, `cuStreamWaitEvent` and `cuMemcpyPeerAsync` on the
    /// third stream). Returns where, and the point at which it is done. `from` does not change until then.
    fn pull(&self, peer: &Self, from: Address, bytes: usize, after: &Self::Mark) -> Result<(Address, Self::Mark)>;

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
    pub work: Work,
}

/// What a launch does, said by the operation that starts it, for those who measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Of matrix products, convolutions and attention; a multiplication and an addition are two. Other kernels have none
    /// to speak of: their time is that of their bytes.
    pub flops: u64,
    /// Read and written, of every tensor once. Never 0: nothing is started for nothing.
    pub bytes: u64,
    /// Rows, columns, and products that are summed for each value, where there are FLOPs.
    pub sizes: Option<[usize; 3]>,
}

impl Work {
    /// Reads and writes so many bytes.
    pub fn moving(bytes: usize) -> Self {
        Self { flops: 0, bytes: bytes as u64, sizes: None }
    }

    /// `count` matrix products beside it: `[rows, columns]` values, each the sum of `inner` products.
    pub fn products(self, count: usize, sizes @ [rows, columns, inner]: [usize; 3]) -> Self {
        let flops = [2 * count, rows, columns, inner].into_iter().map(|size| size as u64).product();
        Self { flops, sizes: Some(sizes), ..self }
    }
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
    /// `const __grid_constant__ TensorMap`, of 128 bytes that the device makes of this.
    Map(TensorMap),
}

/// A tensor of bf16 of which a kernel lets boxes be copied into shared memory (TMA), with the swizzle of 128 bytes. What a box
/// has beyond the tensor is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// A multiple of 16.
    pub address: Address,
    /// The first is of the dimension whose values lie side by side.
    pub sizes: [u64; 3],
    /// Bytes from one to the next in the other dimensions, multiples of 16.
    pub strides: [u64; 2],
    /// Values of a box: 64 in the first dimension, at most 256 in the others.
    pub region: [u32; 3],
}

/// An argument as a kernel reads it, in the first bytes; aligned for every type.
#[repr(C, align(64))]
pub struct Value(pub [u8; 128]);

impl Arg {
    /// `encode` writes a tensor map.
    pub fn value(&self, encode: impl FnOnce(&TensorMap, &mut Value) -> Result<()>) -> Result<Value> {
        let mut value = Value([0; 128]);
        match self {
            Self::Pointer(address) => value.0[..8].copy_from_slice(&address.to_ne_bytes()),
            Self::Int(number) => value.0[..4].copy_from_slice(&number.to_ne_bytes()),
            Self::Long(number) => value.0[..8].copy_from_slice(&number.to_ne_bytes()),
            Self::Float(number) => value.0[..4].copy_from_slice(&number.to_ne_bytes()),
            Self::Map(map) => encode(map, &mut value)?,
        }
        Ok(value)
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

impl Matmul {
    pub fn work(&self) -> Work {
        let Self { rows, columns, inner, .. } = *self;
        let values = rows * inner + columns * inner + rows * columns;
        let bias = if self.bias.is_some() { Dtype::F32.bytes() * columns } else { 0 };
        Work::moving(values * self.dtype.bytes() + bias).products(1, [rows, columns, inner])
    }
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

/// Memory of a device, given back when the last user drops it: to the device, or to whom it is lent by.
pub struct Buffer<D: Device> {
    device: Arc<D>,
    address: Address,
    bytes: usize,
    lease: Option<Lease<D>>,
    /// Where others are done with copying from it.
    copied: Mutex<Vec<D::Mark>>,
}

impl<D: Device> Buffer<D> {
    /// Without any bytes it takes no memory.
    pub fn new(device: &Arc<D>, bytes: usize) -> Result<Self> {
        let address = if bytes == 0 { 0 } else { device.alloc(bytes)? };
        Ok(Self::of(device.clone(), address, bytes, None))
    }

    /// A copy in the memory of `device` of what another device has at `from` in `other`. That one's work so far, up to `after`,
    /// comes before, later work of `device` after it; neither the host nor other work waits.
    pub fn pulled(device: &Arc<D>, other: &Self, from: Address, bytes: usize, after: &D::Mark) -> Result<Self> {
        let (address, arrived) = device.pull(&other.device, from, bytes, after)?;
        let buffer = Self::of(device.clone(), address, bytes, None);
        // In this order: were there no waiting for it, it must not be freed before the copy is done.
        let waiting = device.wait(&arrived);
        other.copied.lock().unwrap_or_else(PoisonError::into_inner).push(arrived);
        waiting.map(|()| buffer)
    }

    fn of(device: Arc<D>, address: Address, bytes: usize, lease: Option<Lease<D>>) -> Self {
        Self { device, address, bytes, lease, copied: Mutex::default() }
    }

    /// All of the memory that a lease lends.
    pub fn lent(lease: Lease<D>) -> Self {
        let (device, address, bytes) = lease.memory();
        Self::of(device, address, bytes, Some(lease))
    }

    pub fn device(&self) -> &Arc<D> {
        &self.device
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
        for copied in self.copied.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // Memory that nothing says is read to its end stays taken.
            if self.device.wait(&copied).is_err() {
                return;
            }
        }
        if self.bytes > 0 && self.lease.is_none() {
            self.device.free(self.address, self.bytes);
        }
    }
}
