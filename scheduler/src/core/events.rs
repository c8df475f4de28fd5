//! What can happen to the farm.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Add;
use std::time::Duration;

use farm_core::api::TenantSpec;
use farm_core::id::{AttemptKey, AttemptNo, BootId, DeviceIndex, JobId, NodeId, SubmissionId, TenantId};
use farm_core::job::spec::RenderRequest;
use farm_core::wire::Envelope;
use farm_core::wire::to_scheduler::ToScheduler;
use serde::{Deserialize, Serialize};

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
    /// A submission was committed.
    Submitted(Submitted),
    /// Somebody wants something.
    Wish { wish: Wish, by: String },
    /// The requests that [`super::effects::Effects::load`] asked for.
    Loaded(Vec<LoadedRequest>),
    /// Time passes. What can start is started now.
    Tick,
}

/// What users and operators can ask for, checked as far as the queue store goes.
#[derive(Clone, Debug, PartialEq)]
pub enum Wish {
    /// Stop this job if it is queued or running.
    Cancel(JobId),
    /// Likewise all jobs of a batch.
    CancelBatch(SubmissionId),
    /// Queue this failed or cancelled job again.
    Retry(LiveJob),
    /// Start nothing of this until it is resumed; what runs is handed back at its next step.
    Pause(Scope),
    Resume(Scope),
    /// Start nothing on this node, and hand back what it runs. Holds until it is undrained, whatever joins by that name.
    Drain(NodeId),
    /// Also ends a quarantine.
    Undrain(NodeId),
    /// Makes or changes a tenant.
    SetTenant(TenantId, TenantSpec),
}

/// What can be paused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    Farm,
    Tenant(TenantId),
    Batch(SubmissionId),
    Job(JobId),
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Farm => f.write_str("the farm"),
            Self::Tenant(tenant) => write!(f, "tenant {tenant}"),
            Self::Batch(batch) => write!(f, "batch {batch}"),
            Self::Job(job) => write!(f, "job {job}"),
        }
    }
}

/// A committed submission.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Submitted {
    /// What it is as a batch; absent if it was committed before.
    pub batch: Option<SavedBatch>,
    /// Jobs that are queued now and were not before.
    pub queued: Vec<LiveJob>,
    /// Jobs of earlier submissions that are queued or running, and are of this batch too from now on.
    pub joined: Vec<JobId>,
}

/// All that the queue store keeps of the farm and that planning needs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Saved {
    /// Every tenant but, maybe, the default one.
    pub tenants: Vec<SavedTenant>,
    /// Batches with queued or running jobs.
    pub batches: Vec<SavedBatch>,
    /// Every queued and running job, in order of submission.
    pub jobs: Vec<LiveJob>,
    pub drained: Vec<NodeId>,
    /// The whole farm is paused.
    pub paused: bool,
    /// What was used in the last [`USAGE_HOURS`].
    pub usage: Vec<SavedUsage>,
    /// The newest completed attempts, at most [`MEASURED`], oldest first.
    pub measured: Vec<Measured>,
}

/// Hours of usage that planning looks back on.
pub const USAGE_HOURS: i64 = 24 * 14;
/// Completed attempts that predictions start from.
pub const MEASURED: usize = 512;

#[derive(Clone, Debug, PartialEq)]
pub struct SavedTenant {
    pub tenant: TenantId,
    pub spec: TenantSpec,
    pub paused: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SavedBatch {
    pub submission: SubmissionId,
    pub max_failures: Option<u32>,
    /// Its jobs that have failed.
    pub failed: u32,
    pub paused: bool,
}

/// Device time that a tenant's attempts, ended in one hour, have used.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedUsage {
    pub tenant: TenantId,
    /// Hours since 1970 (UTC).
    pub hour: i64,
    pub device_ms: u64,
}

/// How long an attempt took that was expected to take `base` seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    pub model: String,
    /// Name of its devices.
    pub device: String,
    /// By [`super::effects::Change::Started`].
    pub base: f64,
    pub seconds: f64,
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
    pub tenant: TenantId,
    /// Every batch that it is a job of, oldest first.
    pub batches: Vec<SubmissionId>,
    pub ask: Ask,
    /// Labels that the node has to have.
    pub require: BTreeMap<String, String>,
    /// What it comes after and is not done yet.
    pub after: Vec<Dependency>,
    /// A user paused this very job.
    pub paused: bool,
    /// Wall clock of its submission, milliseconds since 1970.
    pub submitted_ms: i64,
    /// The newest attempt; 0 before the first.
    pub attempt: AttemptNo,
    pub counts: Counts,
    /// The attempt that the queue store says is running. Boxed, because most jobs are queued.
    pub running: Option<Box<LiveAttempt>>,
}

/// What ended a job's attempts, since a user last queued it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// By a fault of their device.
    pub device: u32,
    /// By object storage.
    pub store: u32,
    /// By want of memory.
    pub memory: u32,
    /// With their node.
    pub losses: u32,
    /// With a node that died of its own, by the evidence that it left; they count as losses too.
    pub kills: u32,
    /// The newest attempt that counts as a kill.
    pub killed_at: u32,
    /// Handed back for a job with more right to the devices.
    pub preemptions: u32,
    /// It has run out of memory on fewer devices.
    pub least_devices: u32,
    /// How often the tiles of its decode were made smaller, for want of memory.
    pub smaller_tiles: u32,
}

/// What a job comes after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dependency {
    Job(JobId),
    /// All jobs of it.
    Batch(SubmissionId),
}

/// How much is asked for, as far as the line says: what planning needs of a request. Sizes that are left out are the
/// checkpoint's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ask {
    pub width: Option<u32>,
    pub height: Option<u32>,
    pub num_frames: Option<u32>,
    pub num_inference_steps: Option<u32>,
    /// Tokens of prompt and negative prompt, about: by their length, in steps of [`Ask::TEXT_STEP`].
    pub text: [u32; 2],
}

impl Ask {
    /// Prompts of about one length are one kind of clip.
    pub const TEXT_STEP: u32 = 64;
    /// Bytes of a prompt for each of its tokens, about.
    const BYTES_PER_TOKEN: usize = 4;

    pub fn of(request: &RenderRequest) -> Self {
        let tokens = |text: &str| {
            let tokens = text.len().div_ceil(Self::BYTES_PER_TOKEN).min(256) as u32;
            tokens.next_multiple_of(Self::TEXT_STEP)
        };
        Self {
            width: request.width,
            height: request.height,
            num_frames: request.num_frames,
            num_inference_steps: request.num_inference_steps,
            text: [tokens(&request.prompt), request.negative_prompt.as_deref().map_or(0, tokens)],
        }
    }
}

/// A granted attempt as the queue store knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct LiveAttempt {
    pub key: AttemptKey,
    pub node: NodeId,
    pub boot: BootId,
    pub devices: Vec<DeviceIndex>,
    pub clip: Clip,
    /// Wall clock of its start, milliseconds since 1970.
    pub started_ms: i64,
    /// As [`super::effects::Change::Started`] has it.
    pub base: f64,
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
