//! What the device pool is told.

use farm_core::id::AttemptKey;
use farm_core::wire::to_node::StartAttempt;

use ractor_cluster::RactorMessage;

use crate::progress::ProgressCell;

#[derive(RactorMessage)]
pub enum PoolMessage {
    Start {
        start: Box<StartAttempt>,
        progress: ProgressCell,
    },
    /// Stop it as soon as its device comes up for air; report nothing.
    Abort(AttemptKey),
    /// The devices of the attempt are idle again. Its upload may still run.
    Released(AttemptKey),
    /// The attempt is over, upload and all.
    Finished(AttemptKey),
}
