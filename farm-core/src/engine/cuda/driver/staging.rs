//! The way into a device's memory.

use std::sync::Arc;

use super::api::call;
use super::context::{Event, Pinned, Stream};
use crate::engine::Result;
use crate::engine::cuda::device::Address;

/// Bytes of each of the two halves.
const HALF: usize = 8 << 20;
/// Pieces begin at multiples of this, so that no two share a line of the cache.
const ALIGN: usize = 64;

/// Memory of the host that the GPU reads by itself, bounded and used again: what is copied goes through it piece by piece,
/// and is the caller's own again at once. While the GPU reads one half the other is filled. A half is waited for only when
/// it is full and wanted again, so many small copies do not hold up the host.
pub(super) struct Staging {
    stream: Arc<Stream>,
    memory: Pinned,
    /// Behind the last copy out of each half, once it is full.
    read: [Event; 2],
    /// The one that is filled.
    half: usize,
    /// Bytes of it.
    used: usize,
}

impl Staging {
    pub(super) fn new(stream: &Arc<Stream>) -> Result<Self> {
        Ok(Self {
            memory: Pinned::new(&stream.context, 2 * HALF)?,
            read: [Event::new(stream)?, Event::new(stream)?],
            stream: stream.clone(),
            half: 0,
            used: 0,
        })
    }

    /// Starts a copy to memory of the device, which has room for it.
    pub(super) fn copy(&mut self, mut to: Address, mut from: &[u8]) -> Result<()> {
        let driver = self.stream.context.enter()?;
        while !from.is_empty() {
            if self.used == HALF {
                self.turn()?;
            }
            let (piece, rest) = from.split_at(from.len().min(HALF - self.used));
            let start = self.half * HALF + self.used;
            let place = &mut self.memory.bytes_mut()[start..start + piece.len()];
            place.copy_from_slice(piece);
            // SAFETY: the place lives as long as this and is not written again before its half's event has passed.
            unsafe { call!(driver, cuMemcpyHtoDAsync(to, place.as_ptr().cast(), piece.len(), self.stream.raw)) }?;
            self.used = (self.used + piece.len()).next_multiple_of(ALIGN);
            to += piece.len() as u64;
            from = rest;
        }
        Ok(())
    }

    /// Goes on with the other half.
    fn turn(&mut self) -> Result<()> {
        self.read[self.half].record()?;
        let other = 1 - self.half;
        self.read[other].wait()?;
        (self.half, self.used) = (other, 0);
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // The GPU may still read. There is nobody to tell of an error.
        let _ = self.stream.synchronize();
    }
}
