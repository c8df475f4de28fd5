//! The HTTP API between `farmctl` (and people's own tools) and the scheduler: bodies of `/v1/…`, all JSON.
//!
//! | method and path | body → reply |
//! |---|---|
//! | `GET /v1/farm` | → [`FarmInfo`] |
//! | `POST /v1/submissions` | [`OpenSubmission`] → [`SubmissionOpened`] |
//! | `PUT /v1/submissions/{id}/pages/{n}` | raw bytes of the file from `n · PAGE_BYTES` on, at most [`PAGE_BYTES`]; idempotent → 204 |
//! | `POST /v1/submissions/{id}/commit` | [`CommitSubmission`] → [`SubmissionReply`]; 422 with [`ApiError`] and `lines` if refused |
//! | `GET /v1/submissions/{id}` | a full id or a unique ending of one, at least 4 characters → [`BatchView`] |
//! | `GET /v1/jobs?state=&submission=&after=&limit=` | → [`JobPage`], oldest first |
//! | `GET /v1/jobs/{job}` | a full id or a unique ending of one, at least 4 characters → [`JobDetail`] |
//! | `GET /v1/jobs/{job}/log?after=` | → [`LogPage`] |
//! | `POST /v1/jobs/{job}/cancel`, `…/retry` | → [`JobView`]; 409 if the state does not allow it |
//! | `GET /v1/jobs/{job}/clip` | → the mp4, with its sha-256 in `x-content-sha256` |
//! | `GET /v1/nodes` | → [`NodeList`] |
//! | `POST /v1/cluster` | upgrade to the nodes' session (see `wire::cluster`) |
//! | `GET /v1/submissions?limit=` | → [`BatchList`], [`MAX_LIST`] at most |
//! | `POST /v1/submissions/{id}/cancel`, `…/pause`, `…/resume` | → [`BatchView`] |
//! | `POST /v1/jobs/{job}/pause`, `…/resume` | → [`JobView`] |
//! | `GET /v1/jobs/{job}/why` | → [`WhyView`] |
//! | `GET /v1/queue` | → [`QueueView`] |
//! | `POST /v1/queue/pause`, `…/resume` | the whole farm → [`QueueView`] |
//! | `POST /v1/nodes/{node}/drain`, `…/undrain` | → [`NodeView`] |
//! | `GET /v1/tenants` | → [`TenantList`] |
//! | `PUT /v1/tenants/{tenant}` | [`TenantSpec`] → [`TenantView`] |
//! | `POST /v1/tenants/{tenant}/pause`, `…/resume` | → [`TenantView`] |
//! | `GET /v1/usage?by=&since=&until=` | times as in RFC 3339, `since` taken in and `until` left out → [`UsageList`] |
//! | `GET /v1/audit?after=` | entries with a greater number → [`AuditPage`], [`MAX_LIST`] at most |
//! | `POST /v1/gc` | [`GcRequest`] → [`GcReport`] |
//!
//! Who asks may name itself in `x-farm-user`; the audit trail keeps it. A scheduler that stands by answers 503 with
//! [`ApiError::leader`].
//!
//! Errors are [`ApiError`] with a matching status. A scheduler with a secret wants `authorization: Bearer SECRET`.

mod queue;

use std::collections::BTreeMap;

pub use self::queue::*;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{AttemptNo, DeviceIndex, Epoch, JobId, NodeId, SubmissionId, TenantId};
use crate::job::spec::{RenderRequest, RenderSpec};
use crate::job::state::{JobState, Progress};
use crate::parallel::topology::Topology;
use crate::precision::Precision;
use crate::tiles::plan::{Mode, Tile, Tiling};

/// Bytes of one page of a submission; the last may be shorter.
pub const PAGE_BYTES: usize = 1 << 20;
/// Largest prompt file.
pub const MAX_SUBMISSION_BYTES: usize = 256 << 20;
/// Largest page of a listing, and the default.
pub const MAX_LIST: u32 = 1000;

/// What every failed call answers with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ApiError {
    /// Lowercase, short, with ids; says what to do where there is something to do.
    pub error: String,
    /// For a refused submission: the first bad lines.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<LineError>,
    /// How many bad lines there are in all.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bad_lines: u64,
    /// Of a scheduler that stands by: the address of the one that leads, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// One bad line of a prompt file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineError {
    /// From 1.
    pub line: u64,
    /// In characters, from 1.
    pub column: u64,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FarmInfo {
    pub version: String,
    pub epoch: Epoch,
    pub store: String,
    pub models: Vec<ModelView>,
    /// Jobs by state.
    pub jobs: BTreeMap<JobState, u64>,
    pub nodes: u64,
    pub devices: u64,
    pub idle_devices: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelView {
    pub name: String,
    pub hash: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OpenSubmission {
    /// For lines that name no model.
    #[serde(default)]
    pub model: Option<String>,
    /// For lines that name no priority. Higher goes first; 0 if nobody says.
    #[serde(default)]
    pub priority: Option<i32>,
    /// Who the jobs are charged to.
    #[serde(default)]
    pub tenant: TenantId,
    /// Ids of jobs or batches that all lines come after.
    #[serde(default)]
    pub after: Vec<String>,
    /// Cancel the rest of the batch when more of its jobs than this have failed.
    #[serde(default)]
    pub max_failures: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubmissionOpened {
    pub submission: SubmissionId,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CommitSubmission {
    /// Length of the file, so that a lost page is noticed.
    pub bytes: u64,
    /// Queue the good lines even if there are bad ones.
    #[serde(default)]
    pub skip_invalid: bool,
    /// Make new jobs even for lines that were submitted before.
    #[serde(default)]
    pub again: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubmissionReply {
    pub submission: SubmissionId,
    /// Jobs made by this submission.
    pub new: u64,
    /// Jobs that an earlier submission of the same lines made and that are queued, running or done.
    pub existing: u64,
    /// Failed or cancelled jobs of an earlier submission, queued again.
    pub requeued: u64,
    /// With `skip_invalid`: the first bad lines, and how many there are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<LineError>,
    #[serde(default)]
    pub bad_lines: u64,
    /// Why nothing will run yet, for example that no node has registered the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobView {
    pub job: JobId,
    /// The user's own name for the line.
    pub id: Option<String>,
    pub state: JobState,
    pub prompt: String,
    pub model: Option<String>,
    pub priority: i32,
    #[serde(default)]
    pub tenant: TenantId,
    pub submitted: Timestamp,
    pub finished: Option<Timestamp>,
    pub attempt: AttemptNo,
    pub node: Option<NodeId>,
    pub progress: Option<Progress>,
    /// Why a queued job does not run yet, or why a failed one failed.
    pub reason: Option<String>,
    /// Where the clip is, once the job is done.
    pub clip: Option<String>,
    #[serde(default)]
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobPage {
    pub jobs: Vec<JobView>,
    /// Pass as `after` for the next page; absent on the last.
    pub next: Option<JobId>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobDetail {
    #[serde(flatten)]
    pub view: JobView,
    pub request: RenderRequest,
    pub seed: u64,
    pub attempts: Vec<AttemptView>,
    pub result: Option<JobResult>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttemptView {
    pub attempt: AttemptNo,
    pub epoch: Epoch,
    pub node: NodeId,
    /// The devices of the node that it has or had, together.
    pub devices: Vec<DeviceIndex>,
    pub started: Timestamp,
    pub ended: Option<Timestamp>,
    /// `running`, `completed`, `aborted`, `interrupted`, or the kind of failure.
    pub outcome: String,
    pub message: Option<String>,
    /// What it used, once it has ended.
    #[serde(default)]
    pub device_seconds: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogPage {
    pub lines: Vec<LogLine>,
    /// Pass as `after` to read on.
    pub next: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogLine {
    pub at: Timestamp,
    pub attempt: Option<AttemptNo>,
    pub line: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeList {
    pub nodes: Vec<NodeView>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    pub node: NodeId,
    pub version: String,
    /// What its devices are for: `denoise`, `decode`, or both.
    #[serde(default)]
    pub roles: Vec<String>,
    pub devices: Vec<DeviceView>,
    pub models: Vec<ModelView>,
    pub last_heartbeat_seconds: f32,
    /// False while the scheduler waits for a silent node to come back.
    pub alive: bool,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Why it gets no new work though it is there: `drained`, `leaving: …`, `in quarantine for 300 s: …`; or that it is not there:
    /// `not joined`.
    #[serde(default)]
    pub closed: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceView {
    pub name: String,
    pub job: Option<JobId>,
    /// It decodes tiles of the job's clip for the attempt that runs it.
    #[serde(default)]
    pub helps: bool,
    pub progress: Option<Progress>,
}

/// The manifest `jobs/{job}/result.json`: written once by the attempt that finished first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobResult {
    pub job: JobId,
    pub attempt: AttemptNo,
    pub epoch: Epoch,
    pub node: NodeId,
    /// The devices of the node that rendered the clip together, by rank. Results of versions that knew no groups leave
    /// this and the topology out.
    #[serde(default)]
    pub devices: Vec<DeviceIndex>,
    /// How the clip was spread over them.
    #[serde(default = "solo")]
    pub topology: Topology,
    /// How the latent was computed. Results of versions that knew one precision leave it out.
    #[serde(default)]
    pub precision: Precision,
    /// How its latent was decoded. Results of versions that knew no tiles leave it out.
    #[serde(default)]
    pub decode: Option<DecodeRecord>,
    /// Key of the clip below the store's prefix.
    pub clip: String,
    pub clip_bytes: u64,
    pub clip_sha256: String,
    pub spec: RenderSpec,
    pub model: String,
    pub model_hash: String,
    pub program_version: String,
    pub seconds: StageSeconds,
    pub finished: Timestamp,
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// The tiles of a clip's decode, and who had them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodeRecord {
    pub tiling: Tiling,
    pub mode: Mode,
    /// Tiles in a column and in a row.
    pub grid: [usize; 2],
    /// Row by row, in latent pixels.
    pub tiles: Vec<Tile>,
    /// The devices that had a tile, by node. The frames do not depend on them.
    pub hands: Vec<String>,
}

fn solo() -> Topology {
    Topology::SOLO
}

/// Wall time of each stage of the accepted attempt. Encoding runs beside decoding; `encode` is its own share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageSeconds {
    pub text: f64,
    pub denoise: f64,
    pub decode: f64,
    pub encode: f64,
    pub upload: f64,
    pub total: f64,
}
