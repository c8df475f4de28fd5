//! What the scheduler asks of its queue store. One trait, so that other databases can take SQLite's place.

use std::collections::BTreeMap;
use std::time::Duration;

use farm_core::api::{AttemptView, JobResult, LogPage, SubmissionReply};
use farm_core::id::{AttemptNo, Epoch, JobId, NodeId, SubmissionId};
use farm_core::job::spec::RenderRequest;
use farm_core::job::state::JobState;
use futures::future::BoxFuture;
use jiff::Timestamp;

use crate::core::effects::Change;
use crate::core::events::{LiveJob, LoadedRequest};

/// Log lines kept for each job; older ones go.
pub const MAX_LOG_LINES: i64 = 1000;
/// Uploads that may be under way at a time.
pub const MAX_OPEN_SUBMISSIONS: i64 = 64;
/// An upload older than this that was never committed is dropped when room is needed, in milliseconds.
pub const STALE_SUBMISSION_MS: i64 = 60 * 60 * 1000;

#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A row is not in the state that the change expects: the caller's picture is wrong, nothing was written.
    #[error("queue store disagrees: {0}")]
    Conflict(String),
    /// Another scheduler has begun a newer reign over this store.
    #[error("epoch {0} is over: another scheduler has taken over this queue")]
    Superseded(Epoch),
    #[error("queue store holds something unreadable: {0}")]
    Corrupt(String),
    #[error("{0} uploads are under way; commit one or try again later")]
    TooManySubmissions(i64),
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
}

/// A whole submission, to be committed at once.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    pub submission: SubmissionId,
    pub jobs: Vec<NewJob>,
    /// `new`, `existing` and `requeued` are filled in by the commit.
    pub reply: SubmissionReply,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Committed {
    pub reply: SubmissionReply,
    /// Jobs that are queued now and were not before. Empty if the submission was committed earlier.
    pub queued: Vec<LiveJob>,
}

/// An upload.
#[derive(Clone, Debug, PartialEq)]
pub struct Submission {
    pub model: Option<String>,
    pub priority: Option<i32>,
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

/// Writes are durable when their future ends. There is one writer, the scheduler that began the newest epoch.
pub trait QueueStore: Send + Sync {
    /// Begins a new reign.
    fn begin_epoch(&self) -> Stored<'_, Epoch>;

    /// Every queued and running job, in order of submission.
    fn live_jobs(&self) -> Stored<'_, Vec<LiveJob>>;

    /// Applies all changes or none.
    fn apply<'a>(&'a self, epoch: Epoch, changes: &'a [Change], at: Timestamp) -> Stored<'a, ()>;

    /// The requests of these jobs, in any order.
    fn requests<'a>(&'a self, jobs: &'a [JobId]) -> Stored<'a, Vec<LoadedRequest>>;

    /// One job as the core keeps it, whatever its state.
    fn live_job(&self, job: JobId) -> Stored<'_, Option<(JobState, LiveJob)>>;

    fn open_submission(
        &self,
        submission: SubmissionId,
        model: Option<String>,
        priority: Option<i32>,
        at: Timestamp,
    ) -> Stored<'_, ()>;

    fn submission(&self, submission: SubmissionId) -> Stored<'_, Option<Submission>>;

    /// Puts a page; a page put again replaces the first. False if the submission is committed.
    fn put_page(&self, submission: SubmissionId, page: u32, bytes: Vec<u8>) -> Stored<'_, bool>;

    /// Number and length of each page, in order.
    fn pages(&self, submission: SubmissionId) -> Stored<'_, Vec<(u32, u64)>>;

    fn page(&self, submission: SubmissionId, page: u32) -> Stored<'_, Option<Vec<u8>>>;

    /// Commits a submission in one transaction and drops its pages. Committing it again changes nothing and gives
    /// the first reply.
    fn commit_submission(&self, epoch: Epoch, batch: Batch, at: Timestamp) -> Stored<'_, Committed>;

    /// Jobs of a submission by state.
    fn submission_counts(&self, submission: SubmissionId) -> Stored<'_, BTreeMap<JobState, u64>>;

    /// All jobs by state.
    fn counts(&self) -> Stored<'_, BTreeMap<JobState, u64>>;

    /// Jobs whose id ends in these hex digits (at least 4), at most 10.
    fn jobs_ending_in<'a>(&'a self, ending: &'a str) -> Stored<'a, Vec<JobId>>;

    fn job(&self, job: JobId) -> Stored<'_, Option<JobRecord>>;

    /// Oldest first.
    fn jobs(&self, filter: JobFilter) -> Stored<'_, Vec<JobRecord>>;

    fn attempts(&self, job: JobId) -> Stored<'_, Vec<AttemptView>>;

    /// Log lines with a number above `after`.
    fn log(&self, job: JobId, after: u64, limit: u32) -> Stored<'_, LogPage>;
}
