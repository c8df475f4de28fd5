//! Bodies about the queue as a whole: batches, tenants, waiting, usage, the audit trail.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::is_zero;
use crate::id::{JobId, SubmissionId, TenantId};
use crate::job::state::JobState;

/// Largest and smallest share of a tenant; the ratio of two shares is what counts.
pub const SHARES: (f64, f64) = (0.001, 1000.0);

/// How a batch stands: all the jobs of one submission.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchView {
    pub submission: SubmissionId,
    pub tenant: TenantId,
    pub submitted: Timestamp,
    /// Jobs by state. Lines that were jobs of an earlier submission count here too.
    pub jobs: BTreeMap<JobState, u64>,
    /// The batch is cancelled when more of its jobs than this have failed; never, if absent.
    pub max_failures: Option<u32>,
    pub paused: bool,
    /// Predicted seconds until the last of its jobs ends, if there is a prediction.
    pub eta_seconds: Option<f64>,
    /// For people, in one line: `7 of 12 done, 4 running, 1 queued, about 40 s left`.
    pub summary: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchList {
    /// The newest first.
    pub batches: Vec<BatchView>,
}

/// Limits of a tenant; what is absent is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    /// Devices at one time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<u32>,
    /// Jobs that wait or run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued: Option<u64>,
    /// Device-seconds in any 24 hours, counted by the hour.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_seconds: Option<u64>,
}

/// What an operator says of a tenant: `PUT /v1/tenants/{tenant}` makes or replaces it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantSpec {
    /// Its part of the farm when others want it too, against other tenants' parts.
    #[serde(default = "one")]
    pub share: f64,
    #[serde(default)]
    pub quota: Quota,
}

fn one() -> f64 {
    1.0
}

impl Default for TenantSpec {
    fn default() -> Self {
        Self { share: 1.0, quota: Quota::default() }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TenantView {
    pub tenant: TenantId,
    #[serde(flatten)]
    pub spec: TenantSpec,
    pub paused: bool,
    pub queued: u64,
    pub running: u64,
    /// Devices that it has now.
    pub devices: u64,
    /// Device-seconds, older ones counting less: who has least of it for its share goes first.
    pub usage: f64,
    /// Device-seconds in the last 24 hours, as its quota counts them.
    pub day: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TenantList {
    pub tenants: Vec<TenantView>,
}

/// Why a queued job does not run: a closed list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitCode {
    /// Somebody paused the job, its batch, its tenant or the farm.
    Paused,
    /// Jobs that it comes after are not done.
    After,
    /// An attempt failed a moment ago.
    Backoff,
    /// The scheduler has just begun and waits for its nodes.
    Starting,
    /// No node has registered the model; or several models are registered, and the job names none.
    Model,
    /// No node with the model has the labels that the job requires.
    Labels,
    /// No node with the model has devices with enough memory, all together.
    Memory,
    /// All nodes that could take it are silent, drained, leaving or in quarantine.
    Nodes,
    /// The tenant has all the devices that its quota allows.
    QuotaDevices,
    /// The tenant has used, or is about to use, the device-seconds that its quota allows.
    QuotaSeconds,
    /// It needs several devices of one node at once; as they get free they are kept for it.
    Gang,
    /// Free devices are kept for a clip that needs several, and this one would not end in time.
    Reserved,
    /// Devices are busy, and other tenants have used less of their share.
    Share,
    /// Devices are busy, and jobs of the same tenant go first.
    Turn,
    /// It is first, and all devices are busy.
    Busy,
    /// It will be looked at in the next tick.
    Planning,
}

impl WaitCode {
    pub const ALL: [Self; 16] = [
        Self::Paused,
        Self::After,
        Self::Backoff,
        Self::Starting,
        Self::Model,
        Self::Labels,
        Self::Memory,
        Self::Nodes,
        Self::QuotaDevices,
        Self::QuotaSeconds,
        Self::Gang,
        Self::Reserved,
        Self::Share,
        Self::Turn,
        Self::Busy,
        Self::Planning,
    ];
}

/// `GET /v1/jobs/{job}/why`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WhyView {
    pub job: JobId,
    pub state: JobState,
    /// Absent unless it is queued.
    pub code: Option<WaitCode>,
    /// The reason in words.
    pub reason: String,
    /// What would change it.
    pub change: Option<String>,
    /// Predicted seconds until it starts.
    pub starts_in_seconds: Option<f64>,
    /// Predicted seconds until its clip is there.
    pub eta_seconds: Option<f64>,
}

/// `GET /v1/queue`: the farm's work at a glance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QueueView {
    pub queued: u64,
    pub running: u64,
    /// Queued jobs by why they wait; they add up to `queued`.
    pub waiting: BTreeMap<WaitCode, u64>,
    /// Somebody paused the whole farm.
    pub paused: bool,
    /// Predicted seconds until the queue is empty.
    pub eta_seconds: Option<f64>,
    /// Clips finished in the last hour, by this scheduler.
    pub clips_last_hour: u64,
}

/// `GET /v1/usage?by=tenant|day|label:NAME&since=&until=`: what ended attempts used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UsageList {
    pub by: String,
    pub rows: Vec<UsageRow>,
    /// Currency of the costs, from the scheduler's configuration.
    pub currency: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UsageRow {
    /// The tenant, the day (UTC), or the label's value; empty for jobs without the label.
    pub name: String,
    pub attempts: u64,
    /// Clips that were finished.
    pub clips: u64,
    pub device_seconds: f64,
    /// Of those, what attempts without a clip used.
    pub lost_device_seconds: f64,
    /// Absent where a device's price is not configured.
    pub cost: Option<f64>,
}

/// `GET /v1/audit?after=`: who did what, oldest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuditPage {
    pub entries: Vec<AuditEntry>,
    /// Pass as `after` to read on.
    pub next: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuditEntry {
    pub number: u64,
    pub at: Timestamp,
    /// Who, as they call themselves: the farm has one secret for all.
    pub by: String,
    /// For example `cancel`, `drain`, `quota`.
    pub action: String,
    /// What it was done to.
    pub subject: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// `POST /v1/gc`: removes what retention no longer keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GcRequest {
    /// Only count.
    #[serde(default)]
    pub dry_run: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReport {
    pub dry_run: bool,
    /// Objects of attempts that were not accepted, and their bytes.
    pub clips: u64,
    pub clip_bytes: u64,
    /// Latents of jobs that have ended.
    pub latents: u64,
    pub latent_bytes: u64,
    /// Rows of logs, of ended jobs, of the audit trail.
    pub log_rows: u64,
    pub job_rows: u64,
    pub audit_rows: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub errors: u64,
    /// One call does a bounded amount of work, and there may be more to do.
    #[serde(default)]
    pub more: bool,
}
