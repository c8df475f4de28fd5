//! What the session actor is told.

use std::time::Duration;

use farm_core::id::{AttemptKey, DeviceIndex};
use farm_core::wire::cluster::{ClusterError, ClusterEvent};
use farm_core::wire::to_scheduler::AttemptOutcome;
use ractor::ActorRef;
use ractor_cluster::RactorMessage;

use crate::device_pool::messages::PoolMessage;

#[derive(RactorMessage)]
pub enum SessionMessage {
    /// Where attempts are started; the first message.
    Pool(ActorRef<PoolMessage>),
    Cluster(ClusterEvent),
    Dialed(Result<(), ClusterError>),
    /// An attempt ended by itself. Aborted ones do not.
    Ended {
        key: AttemptKey,
        outcome: AttemptOutcome,
    },
    /// The latent of an attempt is finished: who may decode its tiles? Answered by [`PoolMessage::Hands`].
    WantHands {
        key: AttemptKey,
        round: u32,
        tiles: u32,
        /// Where hands join, and what they have to show for it.
        url: String,
        token: String,
    },
    /// An attempt that goes on has given back all its devices but these.
    Released {
        key: AttemptKey,
        keep: Vec<DeviceIndex>,
    },
    /// A device that helped is idle, whatever the reason.
    HelpEnded {
        key: AttemptKey,
        device: DeviceIndex,
    },
    /// A line for a job's log.
    Log {
        key: AttemptKey,
        line: String,
    },
    /// Time passes.
    Tick,
    /// A report is on disk, or the disk cannot take it.
    Kept {
        number: u64,
    },
    /// Hand everything back and end, within the time.
    Leave {
        reason: String,
        patience: Duration,
    },
}
