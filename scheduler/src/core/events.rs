//! What can happen to the farm.

use std::ops::Add;
use std::time::Duration;

use farm_core::id::{AttemptKey, AttemptNo, BootId, DeviceIndex, JobId, NodeId};
use farm_core::job::spec::RenderRequest;
use farm_core::wire::Envelope;
use farm_core::wire::to_scheduler::ToScheduler;

/// A moment on this process's monotonic clock, counted from its start. Wall clocks decide nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Duration);

impl Time {
    /// Zero if `earlier` is later.
    pub fn since(self, earlier: Time) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Time {
    type Output = Time;
    fn add(self, span: Duration) -> Time {
        Time(self.0.saturating_add(span))
    }
}

#[derive(Clone, Debug)]
pub enum Event {
    /// A message from a node, already decoded.
    FromNode(Box<Envelope<ToScheduler>>),
    /// The session that carried this boot's messages ended. The node may come back in another.
    SessionClosed(BootId),
    /// These jobs were committed as queued, by a submission.
    Submitted(Vec<LiveJob>),
    /// Stop this job if it is queued or running.
    Cancel(JobId),
    /// Queue this failed or cancelled job again.
    Retry(LiveJob),
    /// The requests that [`super::effects::Effects::load`] asked for.
    Loaded(Vec<LoadedRequest>),
    /// Time passes.
    Tick,
}

/// What the core keeps of a queued or running job. The request itself stays in the queue store until it is placed,
/// so memory does not grow with the length of prompts.
#[derive(Clone, Debug, PartialEq)]
pub struct LiveJob {
    pub job: JobId,
    /// Order of submission.
    pub seq: u64,
    /// Higher goes first.
    pub priority: i32,
    /// `None`: whichever model is the only one registered.
    pub model: Option<String>,
    /// The newest attempt; 0 before the first.
    pub attempt: AttemptNo,
    /// Attempts that ended by a fault of their device or the store, since the job was last queued by a user.
    pub failures: u32,
    /// Attempts that ended with their node, likewise.
    pub losses: u32,
    /// The attempt that the queue store says is running. Boxed, because most jobs are queued.
    pub running: Option<Box<LiveAttempt>>,
}

/// A granted attempt as the queue store knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct LiveAttempt {
    pub key: AttemptKey,
    pub node: NodeId,
    pub boot: BootId,
    pub devices: Vec<DeviceIndex>,
    pub clip: Clip,
}

/// What a device has to know of a clip to decode tiles of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Clip {
    pub model: String,
    pub model_hash: String,
    /// The [`farm_core::job::spec::RenderSpec`] as JSON.
    pub spec_json: String,
}

/// What placing a job needs of its row.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadedRequest {
    pub job: JobId,
    pub request: RenderRequest,
    /// Drawn at submission; used if the request names none.
    pub seed: u64,
}
