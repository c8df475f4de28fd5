//! What the session actor is told.

use farm_core::id::AttemptKey;
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
    /// A line for a job's log.
    Log {
        key: AttemptKey,
        line: String,
    },
    /// Time passes.
    Tick,
    /// Leave the farm.
    Stop,
}
