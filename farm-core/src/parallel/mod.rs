//! How one clip is spread over a group of devices (unified sequence parallelism, USP): guidance branches × ring ×
//! Ulysses.
//!
//! [`topology`] and [`shard`] say who holds what and are plain arithmetic; [`cost`] predicts which degrees are fastest;
//! `attention` (feature `model`) moves tensors between the ranks of a `group`.

#[cfg(feature = "model")]
pub mod attention;
pub mod cost;
#[cfg(feature = "model")]
pub mod group;
pub mod shard;
pub mod topology;
