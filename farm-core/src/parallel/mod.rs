//! How one clip is spread over a group of devices (unified sequence parallelism, USP): guidance branches × ring ×
//! Ulysses.
//!
//! [`topology`] and [`shard`] say who holds what and are plain arithmetic; [`cost`] predicts which degrees are fastest.

pub mod cost;
pub mod shard;
pub mod topology;
