//! Weights that wait in the host's memory, and the slots of a device's memory that they are fetched into in turn.
//!
//! A slot is in use from the start of its fetch until the last tensor in it is dropped. Then a mark goes into the order of
//! work, and the next fetch into the slot begins after it: after everything that has read the slot, whenever that is. The
//! host waits for nothing.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::{Address, Buffer, Device, Dtype};
use super::gpu::Gpu;
use super::tensor::Tensor;
use crate::engine::{EngineError, Result};

/// What a device's own memory is aligned to.
const ALIGN: usize = 256;

/// Tensors in the host's memory.
pub struct Parked<D: Device> {
    host: D::Host,
    pieces: Arc<[Piece]>,
}

struct Piece {
    /// In bytes.
    offset: usize,
    shape: Vec<usize>,
    dtype: Dtype,
}

/// Slots of one size, each of which holds what was parked together.
pub struct Slots<D: Device>(Arc<Pool<D>>);

struct Pool<D: Device> {
    device: Arc<D>,
    memory: Vec<Buffer<D>>,
    /// Bytes of each.
    bytes: usize,
    free: Mutex<VecDeque<Free<D>>>,
}

/// A slot that nothing is in from `since` on.
struct Free<D: Device> {
    slot: usize,
    since: D::Mark,
}

/// A slot in use. Dropped, it gives the slot back.
pub struct Lease<D: Device> {
    pool: Arc<Pool<D>>,
    slot: usize,
}

/// Parked tensors on their way into a slot.
pub struct Fetch<D: Device> {
    /// None once it is finished.
    lease: Option<Lease<D>>,
    arrived: D::Mark,
    pieces: Arc<[Piece]>,
}

/// Copies tensors into the host's memory, bit by bit. Waits for the device.
pub fn park<D: Device>(gpu: &Gpu<D>, tensors: &[&Tensor<D>]) -> Result<Parked<D>> {
    let (mut pieces, mut bytes) = (Vec::with_capacity(tensors.len()), 0usize);
    for tensor in tensors {
        pieces.push(Piece { offset: bytes, shape: tensor.dims().to_vec(), dtype: tensor.dtype() });
        bytes += (tensor.len() * tensor.dtype().bytes()).next_multiple_of(ALIGN);
    }
    let mut host = gpu.device.host(bytes.max(ALIGN))?;
    for (piece, tensor) in pieces.iter().zip(tensors) {
        if !tensor.is_empty() {
            let len = tensor.len() * tensor.dtype().bytes();
            gpu.device.copy_out(tensor.address(), &mut host.as_mut()[piece.offset..][..len])?;
        }
    }
    Ok(Parked { host, pieces: pieces.into() })
}

impl<D: Device> Slots<D> {
    /// `count` slots, each with room for any of `parked`.
    pub fn new(gpu: &Gpu<D>, parked: &[&Parked<D>], count: usize) -> Result<Self> {
        let bytes = parked.iter().map(|parked| parked.host.as_ref().len()).max().unwrap_or(0);
        let memory = (0..count).map(|_| Buffer::new(&gpu.device, bytes)).collect::<Result<Vec<_>>>()?;
        // Work that is under way may still use what the memory was before.
        let free = (0..count).map(|slot| Ok(Free { slot, since: gpu.device.mark()? })).collect::<Result<_>>()?;
        Ok(Self(Arc::new(Pool { device: gpu.device.clone(), memory, bytes, free: Mutex::new(free) })))
    }

    /// Starts a fetch into the slot that was given back first.
    pub fn start_fetch(&self, parked: &Parked<D>) -> Result<Fetch<D>> {
        const OP: &str = "start_fetch";
        let failed = |message: String| EngineError::Backend { op: OP, message };
        let pool = &self.0;
        let len = parked.host.as_ref().len();
        if len > pool.bytes {
            return Err(failed(format!("{len} bytes do not fit into a slot of {}", pool.bytes)));
        }
        let free = pool.free.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Free { slot, since } = free.ok_or_else(|| failed("every slot is in use".into()))?;
        let lease = Lease { pool: pool.clone(), slot };
        let arrived = pool.device.fetch(pool.memory[slot].address(), &parked.host, &since)?;
        Ok(Fetch { lease: Some(lease), arrived, pieces: parked.pieces.clone() })
    }
}

impl<D: Device> Fetch<D> {
    /// The tensors, in the order in which they were parked, for work that is asked for from now on.
    pub fn finish(mut self) -> Result<Vec<Tensor<D>>> {
        let lease = self
            .arrive()?
            .ok_or_else(|| EngineError::Backend { op: "finish_fetch", message: "nothing is on its way".into() })?;
        let memory = Arc::new(Buffer::lent(lease));
        let tensor = |piece: &Piece| Tensor::within(&memory, piece.offset, &piece.shape, piece.dtype);
        Ok(self.pieces.iter().map(tensor).collect())
    }

    /// Has later work wait for what is on its way.
    fn arrive(&mut self) -> Result<Option<Lease<D>>> {
        let Some(lease) = self.lease.take() else { return Ok(None) };
        lease.pool.device.wait(&self.arrived)?;
        Ok(Some(lease))
    }
}

impl<D: Device> Drop for Fetch<D> {
    /// Of a fetch that nobody has finished: its slot is free when it has arrived. (If a device cannot even wait, there is
    /// no later work.)
    fn drop(&mut self) {
        let _ = self.arrive();
    }
}

impl<D: Device> Lease<D> {
    /// The slot's memory: its device, where it begins, and its bytes.
    pub fn memory(&self) -> (Arc<D>, Address, usize) {
        let memory = &self.pool.memory[self.slot];
        (self.pool.device.clone(), memory.address(), memory.bytes())
    }
}

impl<D: Device> Drop for Lease<D> {
    /// A slot that no mark can be set for stays in use: whoever needs it hears that.
    fn drop(&mut self) {
        if let Ok(since) = self.pool.device.mark() {
            let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
            free.push_back(Free { slot: self.slot, since });
        }
    }
}

#[cfg(test)]
mod tests;
