//! What the scheduler and the nodes say to each other.
//!
//! Control messages carry ids, keys and small parameters, never tensors or frames. Any message may be lost, late or
//! doubled: commands are repeated until reported on, reports until acknowledged, and both are idempotent.

#[cfg(feature = "cluster")]
pub mod cluster;
pub mod codec;
pub mod to_node;
pub mod to_scheduler;

use serde::{Deserialize, Serialize};

use crate::id::{BootId, Epoch, NodeId};

/// Version of everything below. A peer of another version is refused by name, never misread.
pub const PROTOCOL: u8 = 5;

/// Largest encoded envelope. ractor_cluster kills a session without a word at 16 MiB; we stay far below and check
/// before sending.
pub const MAX_ENVELOPE_BYTES: usize = 256 * 1024;

/// Counts a scheduler's commands to stop. That a node does not list an attempt says nothing about whether it has stopped, as
/// the list may have been on the way before the attempt began: only a node that has heard the command knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StopNo {
    pub epoch: Epoch,
    /// From 1 in every epoch.
    pub number: u64,
}

/// What every message travels in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope<B> {
    /// The scheduler's epoch as the sender knows it; 0 before a node has been welcomed.
    pub epoch: Epoch,
    /// The node at one end of the session (sender or receiver).
    pub node: NodeId,
    pub boot: BootId,
    /// Counts the sender's messages from 1, over all sessions of one process.
    pub seq: u64,
    pub body: B,
}
