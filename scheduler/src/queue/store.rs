//! What the scheduler asks of its queue store.

use std::collections::BTreeMap;
use std::time::Duration;

use farm_core::api::{AttemptView, AuditPage, BatchView, JobResult, LogPage, OpenSubmission, SubmissionReply};
use farm_core::id::{AttemptNo, Epoch, JobId, NodeId, SubmissionId, TenantId};
use farm_core::job::spec::RenderRequest;
use farm_core::job::state::JobState;
use futures::future::BoxFuture;
use jiff::Timestamp;
use uuid::Uuid;

use crate::core::effects::Change;
use crate::core::events::{LiveJob, LoadedRequest, Saved, Submitted};

/// Log lines kept for each job; older ones go.
pub const MAX_LOG_LINES: i64 = 1000;
/// Uploads that may be under way at a time.
pub const MAX_OPEN_SUBMISSIONS: i64 = 64;
/// An upload older than this that was never committed is dropped when room is needed, in milliseconds.
pub const STALE_SUBMISSION_MS: i64 = 60 * 60 * 1000;

/// Ended jobs, and likewise logs, that one call removes.
pub const PRUNE_ROWS: i64 = 5000;

/// A leader that has not beaten for this long is deposed by whoever stands by.
pub const LEADER_TTL: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A row is not in the state that the change expects: the caller's picture is wrong, nothing was written.
    #[error("queue store disagrees: {0}")]
    Conflict(String),
    /// Another scheduler has begun a newer reign over this store.
    #[error("epoch {0} is over: another scheduler has taken over this queue")]
    Superseded(Epoch),
    /// The session that held the lead is gone. Another scheduler may lead any moment: this one must stop.
    #[error("the session that held the lead over this queue is gone: {0}; start again")]
    LeadLost(String),
    #[error("{0}")]
    Location(String),
    #[error("cannot open queue {location}: {source}; is it there, and may this user use it?")]
    Open { location: String, source: sqlx::Error },
    #[error("queue store holds something unreadable: {0}")]
    Corrupt(String),
    #[error("{0} uploads are under way; commit one or try again later")]
    TooManySubmissions(i64),
    /// The submission cannot be; nothing was written. For its sender.
    #[error("{0}")]
    Refused(String),
    #[error("queue store did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("queue store: {0}")]
    Database(#[from] sqlx::Error),
    #[error("queue store cannot be brought up to date: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

pub type Stored<'a, T> = BoxFuture<'a, Result<T, QueueError>>;

/// A line of a submission, ready to become a job.
#[derive(Clone, Debug, PartialEq)]
pub struct NewJob {
    pub job: JobId,
    pub key: [u8; 32],
    pub request: RenderRequest,
    pub seed: u64,
    pub priority: i32,
    pub model: Option<String>,
    pub after: Vec<NewDependency>,
}

/// What a line comes after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewDependency {
    /// Another line: an index into [`Batch::jobs`]. There are no cycles.
    Line(usize),
    /// A job or a batch of the farm. It is refused if there is none, or if it has failed or was cancelled.
    Id(Uuid),
}

/// A whole submission, to be committed at once.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    pub submission: SubmissionId,
    pub tenant: TenantId,
    /// The tenant's limit of jobs that wait or run. More are refused.
    pub max_queued: Option<u64>,
    pub max_failures: Option<u32>,
    pub jobs: Vec<NewJob>,
    /// `new`, `existing` and `requeued` are filled in by the commit.
    pub reply: SubmissionReply,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Committed {
    pub reply: SubmissionReply,
    /// Empty if the submission was committed earlier.
    pub submitted: Submitted,
}

/// An upload.
#[derive(Clone, Debug, PartialEq)]
pub struct Submission {
    pub model: Option<String>,
    pub priority: Option<i32>,
    pub tenant: TenantId,
    /// As the user wrote them.
    pub after: Vec<String>,
    pub max_failures: Option<u32>,
    /// Set once it is committed.
    pub reply: Option<SubmissionReply>,
}

/// A job's row.
#[derive(Clone, Debug, PartialEq)]
pub struct JobRecord {
    pub job: JobId,
    pub request: RenderRequest,
    pub seed: u64,
    pub priority: i32,
    pub tenant: TenantId,
    pub model: Option<String>,
    pub state: JobState,
    pub reason: Option<String>,
    pub result: Option<JobResult>,
    pub warnings: Vec<String>,
    pub attempt: AttemptNo,
    pub node: Option<NodeId>,
    pub submitted: Timestamp,
    pub finished: Option<Timestamp>,
}

/// Which jobs to list.
#[derive(Clone, Copy, Debug, Default)]
pub struct JobFilter {
    pub state: Option<JobState>,
    pub submission: Option<SubmissionId>,
    /// Only jobs submitted after this one.
    pub after: Option<JobId>,
    pub limit: u32,
}

/// Who leads.
#[derive(Clone, Debug, PartialEq)]
pub struct Leader {
    /// Where farmctl and nodes reach it.
    pub address: String,
    pub epoch: Epoch,
    /// Since it last said that it is there, by the store's clock.
    pub silent: Duration,
}

/// How usage is summed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsageBy {
    Tenant,
    /// UTC.
    Day,
    /// By the value that the jobs have for this label.
    Label(String),
}

/// A sum of ended attempts on devices of one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Used {
    /// As [`farm_core::api::UsageRow::name`].
    pub name: String,
    /// Name of the devices.
    pub device: String,
    pub attempts: u64,
    pub clips: u64,
    pub device_ms: u64,
    /// Of those, what attempts without a clip used.
    pub lost_device_ms: u64,
}

/// How long what has ended is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Latents, and objects of attempts that were not accepted, after the job's end.
    pub leftovers: Duration,
    /// Log lines, likewise.
    pub logs: Duration,
    /// Rows of ended jobs, their attempts and their log. Clips stay; usage stays in the ledger.
    pub jobs: Duration,
    /// Lines of the audit trail, and the ledger's hours.
    pub audit: Duration,
}

/// An ended job whose objects may hold something that nobody needs. Whatever is not this attempt's clip and the manifest
/// may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leftover {
    pub job: JobId,
    /// Its newest attempt: others have lower numbers.
    pub attempts: AttemptNo,
    /// Of a job that is done.
    pub accepted: Option<AttemptNo>,
}

/// Rows that were removed, or would be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    pub logs: u64,
    pub jobs: u64,
    pub audit: u64,
}

/// Writes are durable when their future ends. There is one writer, the scheduler that began the newest epoch: every
/// write checks that in its transaction.
pub trait QueueStore: Send + Sync {
    /// Begins a new reign, if nobody else leads; `None` if somebody does, and then it is to be asked again soon. A leader
    /// that has been silent for [`LEADER_TTL`] is deposed. `address` is where this process is reached. The lead ends with
    /// the process, or when the store is dropped. A folder is kept by its own lock: there nobody else ever leads.
    fn campaign<'a>(&'a self, address: &'a str) -> Stored<'a, Option<Epoch>>;

    /// The leader is there. To be called every second. An error means that the lead is lost, or may be.
    fn beat(&self, epoch: Epoch) -> Stored<'_, ()>;

    /// The leader ends its reign: somebody else may begin one at once.
    fn resign(&self, epoch: Epoch) -> Stored<'_, ()>;

    /// The newest leader, if there ever was one.
    fn leader(&self) -> Stored<'_, Option<Leader>>;

    /// All that planning needs. Hours of usage before `since_hour` are left out.
    fn load(&self, since_hour: i64) -> Stored<'_, Saved>;

    /// Applies all changes or none.
    fn apply<'a>(&'a self, epoch: Epoch, changes: &'a [Change], at: Timestamp) -> Stored<'a, ()>;

    /// The requests of these jobs, in any order.
    fn requests<'a>(&'a self, jobs: &'a [JobId]) -> Stored<'a, Vec<LoadedRequest>>;

    /// One job as the core keeps it, whatever its state.
    fn live_job(&self, job: JobId) -> Stored<'_, Option<(JobState, LiveJob)>>;

    fn open_submission(&self, submission: SubmissionId, open: OpenSubmission, at: Timestamp) -> Stored<'_, ()>;

    fn submission(&self, submission: SubmissionId) -> Stored<'_, Option<Submission>>;

    /// Puts a page; a page put again replaces the first. False if the submission is committed.
    fn put_page(&self, submission: SubmissionId, page: u32, bytes: Vec<u8>) -> Stored<'_, bool>;

    /// Number and length of each page, in order.
    fn pages(&self, submission: SubmissionId) -> Stored<'_, Vec<(u32, u64)>>;

    fn page(&self, submission: SubmissionId, page: u32) -> Stored<'_, Option<Vec<u8>>>;

    /// Commits a submission in one transaction and drops its pages. Committing it again changes nothing and gives
    /// the first reply.
    fn commit_submission(&self, epoch: Epoch, batch: Batch, at: Timestamp) -> Stored<'_, Committed>;

    /// A committed submission as a batch; `eta_seconds` and `summary` are left empty.
    fn batch(&self, submission: SubmissionId) -> Stored<'_, Option<BatchView>>;

    /// The newest batches, newest first.
    fn batches(&self, limit: u32) -> Stored<'_, Vec<BatchView>>;

    /// What ended attempts used in hours from `since` to before `until`.
    fn usage(&self, by: UsageBy, since: Timestamp, until: Timestamp) -> Stored<'_, Vec<Used>>;

    /// Lines of the audit trail with a number above `after`.
    fn audit(&self, after: u64, limit: u32) -> Stored<'_, AuditPage>;

    /// Jobs that ended longer ago than `retention.leftovers` and are not marked clean, oldest first.
    fn leftovers(&self, retention: Retention, at: Timestamp, limit: u32) -> Stored<'_, Vec<Leftover>>;

    /// Their objects are gone. A job that is queued again is not clean any more.
    fn mark_clean<'a>(&'a self, epoch: Epoch, jobs: &'a [JobId]) -> Stored<'a, ()>;

    /// Removes old rows, at most [`PRUNE_ROWS`] jobs at a time, or counts them. A job stays while it is not marked clean,
    /// while a batch of it has live jobs, and while a live job comes after it or after a batch of it.
    fn prune(&self, epoch: Epoch, retention: Retention, at: Timestamp, dry_run: bool) -> Stored<'_, Pruned>;

    /// All jobs by state.
    fn counts(&self) -> Stored<'_, BTreeMap<JobState, u64>>;

    /// Jobs whose id ends in these hex digits (at least 4), at most 10.
    fn jobs_ending_in<'a>(&'a self, ending: &'a str) -> Stored<'a, Vec<JobId>>;

    fn job(&self, job: JobId) -> Stored<'_, Option<JobRecord>>;

    /// Oldest first.
    fn jobs(&self, filter: JobFilter) -> Stored<'_, Vec<JobRecord>>;

    fn attempts(&self, job: JobId) -> Stored<'_, Vec<AttemptView>>;

    /// What the rows say against the farm's invariants, in words, a few of each kind; empty if all is well.
    fn violations(&self) -> Stored<'_, Vec<String>>;

    /// Log lines with a number above `after`.
    fn log(&self, job: JobId, after: u64, limit: u32) -> Stored<'_, LogPage>;
}
