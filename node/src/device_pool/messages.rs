//! What the device pool is told.

use farm_core::id::{AttemptKey, DeviceIndex};
use farm_core::wire::to_node::{HelpDecode, StartAttempt};

use ractor_cluster::RactorMessage;

use super::state::Holder;
use crate::progress::ProgressCell;

#[derive(RactorMessage)]
pub enum PoolMessage {
    Start {
        start: Box<StartAttempt>,
        progress: ProgressCell,
    },
    /// Stop it as soon as its device comes up for air; report nothing.
    Abort(AttemptKey),
    /// Hand it over at its next step border; its end is reported.
    Yield(AttemptKey),
    /// Who decodes the attempt's clip: these of its own devices, and so many others that will join.
    Hands {
        key: AttemptKey,
        round: u32,
        keep: Vec<DeviceIndex>,
        helpers: u32,
    },
    /// Decode tiles of an attempt that may be any node's.
    Help(Box<HelpDecode>),
    /// Stop that as soon as the device comes up for air.
    Dismiss {
        key: AttemptKey,
        device: DeviceIndex,
    },
    /// The device is idle again.
    Released {
        holder: Holder,
        device: DeviceIndex,
    },
    /// The attempt is over, upload and all.
    Finished(AttemptKey),
}
