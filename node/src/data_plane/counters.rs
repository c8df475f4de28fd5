//! What went wrong on the data plane since the node started.

use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests with a wrong token, or none.
    pub refused_tokens: u64,
    /// Messages or headers of them whose checksum was wrong, that were missing, or that could not be read.
    pub corrupt_messages: u64,
    /// Messages that came again and were dropped.
    pub duplicates: u64,
    /// Streams that took the place of a broken one.
    pub reconnects: u64,
    /// Channels that ended before both ends were done.
    pub lost_channels: u64,
    /// Latents that did not come from their node, whatever the reason.
    pub missed_latents: u64,
    /// Latents that were longer or shorter than announced.
    pub lying_lengths: u64,
    /// Latents whose content was not what was announced.
    pub wrong_hashes: u64,
    /// Connections, hands and messages over a limit.
    pub over_limits: u64,
}

#[derive(Clone, Copy)]
pub(super) enum Count {
    RefusedToken,
    CorruptMessage,
    Duplicate,
    Reconnect,
    LostChannel,
    MissedLatent,
    LyingLength,
    WrongHash,
    OverLimit,
}

#[derive(Default)]
pub(super) struct Counting([AtomicU64; 9]);

impl Counting {
    pub(super) fn add(&self, count: Count) {
        self.0[count as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self, count: Count) -> u64 {
        self.0[count as usize].load(Ordering::Relaxed)
    }

    pub(super) fn counters(&self) -> Counters {
        Counters {
            refused_tokens: self.get(Count::RefusedToken),
            corrupt_messages: self.get(Count::CorruptMessage),
            duplicates: self.get(Count::Duplicate),
            reconnects: self.get(Count::Reconnect),
            lost_channels: self.get(Count::LostChannel),
            missed_latents: self.get(Count::MissedLatent),
            lying_lengths: self.get(Count::LyingLength),
            wrong_hashes: self.get(Count::WrongHash),
            over_limits: self.get(Count::OverLimit),
        }
    }
}
