//! The queue store in one SQLite file: WAL, fully synchronous, one writing connection.

mod changes;
mod read;
mod submit;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use farm_core::api::{AttemptView, LogPage, SubmissionReply};
use farm_core::id::{AttemptNo, BootId, Epoch, JobId, NodeId, SubmissionId};
use farm_core::job::spec::RenderRequest;
use farm_core::job::state::JobState;
use futures::FutureExt;
use jiff::Timestamp;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{Row, Sqlite, Transaction};

use super::store::{Batch, Committed, JobFilter, JobRecord, QueueError, QueueStore, Stored, Submission};
use crate::core::effects::Change;
use crate::core::events::{LiveJob, LoadedRequest};

/// Longest wait for another connection's lock; only reads that overlap a checkpoint ever wait.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
const READERS: u32 = 4;

pub struct SqliteQueue {
    /// One connection: SQLite has one writer at a time, and waiting for it in a queue is fairer than by retries.
    writer: SqlitePool,
    readers: SqlitePool,
}

impl SqliteQueue {
    /// Opens the file, makes it if it is absent, and brings its tables up to date.
    pub async fn open(file: &Path) -> Result<Self, QueueError> {
        let options = SqliteConnectOptions::new()
            .filename(file)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        // Connections are kept for ever: a file needs no fresh ones, and the last to close would tidy up the log.
        let pool =
            |connections| SqlitePoolOptions::new().max_connections(connections).max_lifetime(None).idle_timeout(None);
        let writer = pool(1).connect_with(options.clone()).await?;
        sqlx::migrate!("./migrations").run(&writer).await?;
        let readers = pool(READERS).connect_with(options.pragma("query_only", "1")).await?;
        Ok(Self { writer, readers })
    }

    async fn begin(&self) -> Result<Transaction<'_, Sqlite>, QueueError> {
        Ok(self.writer.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// A transaction of the reign that holds now.
    async fn begin_in(&self, epoch: Epoch) -> Result<Transaction<'_, Sqlite>, QueueError> {
        let mut tx = self.begin().await?;
        let newest: i64 = sqlx::query("SELECT epoch FROM meta").fetch_one(&mut *tx).await?.try_get(0)?;
        if newest as u64 != epoch.0 {
            return Err(QueueError::Superseded(epoch));
        }
        Ok(tx)
    }
}

impl QueueStore for SqliteQueue {
    fn begin_epoch(&self) -> Stored<'_, Epoch> {
        async move {
            let mut tx = self.begin().await?;
            let epoch: i64 = sqlx::query("UPDATE meta SET epoch = epoch + 1 RETURNING epoch")
                .fetch_one(&mut *tx)
                .await?
                .try_get(0)?;
            tx.commit().await?;
            Ok(Epoch(epoch as u64))
        }
        .boxed()
    }

    fn live_jobs(&self) -> Stored<'_, Vec<LiveJob>> {
        self.read_live_jobs().boxed()
    }

    fn apply<'a>(&'a self, epoch: Epoch, changes: &'a [Change], at: Timestamp) -> Stored<'a, ()> {
        async move {
            let mut tx = self.begin_in(epoch).await?;
            for change in changes {
                changes::apply(&mut tx, change, at).await?;
            }
            Ok(tx.commit().await?)
        }
        .boxed()
    }

    fn requests<'a>(&'a self, jobs: &'a [JobId]) -> Stored<'a, Vec<LoadedRequest>> {
        self.read_requests(jobs).boxed()
    }

    fn live_job(&self, job: JobId) -> Stored<'_, Option<(JobState, LiveJob)>> {
        self.read_live_job(job).boxed()
    }

    fn open_submission(
        &self,
        submission: SubmissionId,
        model: Option<String>,
        priority: Option<i32>,
        at: Timestamp,
    ) -> Stored<'_, ()> {
        self.write_submission(submission, model, priority, at).boxed()
    }

    fn submission(&self, submission: SubmissionId) -> Stored<'_, Option<Submission>> {
        self.read_submission(submission).boxed()
    }

    fn put_page(&self, submission: SubmissionId, page: u32, bytes: Vec<u8>) -> Stored<'_, bool> {
        self.write_page(submission, page, bytes).boxed()
    }

    fn pages(&self, submission: SubmissionId) -> Stored<'_, Vec<(u32, u64)>> {
        self.read_pages(submission).boxed()
    }

    fn page(&self, submission: SubmissionId, page: u32) -> Stored<'_, Option<Vec<u8>>> {
        self.read_page(submission, page).boxed()
    }

    fn commit_submission(&self, epoch: Epoch, batch: Batch, at: Timestamp) -> Stored<'_, Committed> {
        self.write_batch(epoch, batch, at).boxed()
    }

    fn submission_counts(&self, submission: SubmissionId) -> Stored<'_, BTreeMap<JobState, u64>> {
        self.read_submission_counts(submission).boxed()
    }

    fn counts(&self) -> Stored<'_, BTreeMap<JobState, u64>> {
        self.read_counts().boxed()
    }

    fn jobs_ending_in<'a>(&'a self, ending: &'a str) -> Stored<'a, Vec<JobId>> {
        self.read_jobs_ending_in(ending).boxed()
    }

    fn job(&self, job: JobId) -> Stored<'_, Option<JobRecord>> {
        self.read_job(job).boxed()
    }

    fn jobs(&self, filter: JobFilter) -> Stored<'_, Vec<JobRecord>> {
        self.read_jobs(filter).boxed()
    }

    fn attempts(&self, job: JobId) -> Stored<'_, Vec<AttemptView>> {
        self.read_attempts(job).boxed()
    }

    fn log(&self, job: JobId, after: u64, limit: u32) -> Stored<'_, LogPage> {
        self.read_log(job, after, limit).boxed()
    }
}

/// Digits of an id's end that the `tail` column has, backwards.
const TAIL: usize = 12;

fn tail_of(hex: &str) -> String {
    hex.chars().rev().take(TAIL).collect()
}

fn corrupt(what: &str, error: impl std::fmt::Display) -> QueueError {
    QueueError::Corrupt(format!("{what}: {error}"))
}

fn get_job_id(row: &SqliteRow, column: &str) -> Result<JobId, QueueError> {
    let text: String = row.try_get(column)?;
    text.parse().map_err(|error| corrupt("job id", error))
}

fn get_boot(row: &SqliteRow, column: &str) -> Result<BootId, QueueError> {
    let text: String = row.try_get(column)?;
    text.parse().map(BootId).map_err(|error| corrupt("boot id", error))
}

fn get_json<T: serde::de::DeserializeOwned>(row: &SqliteRow, column: &str) -> Result<T, QueueError> {
    let text: String = row.try_get(column)?;
    serde_json::from_str(&text).map_err(|error| corrupt(column, error))
}

fn get_optional_json<T: serde::de::DeserializeOwned>(row: &SqliteRow, column: &str) -> Result<Option<T>, QueueError> {
    let text: Option<String> = row.try_get(column)?;
    text.map(|text| serde_json::from_str(&text).map_err(|error| corrupt(column, error))).transpose()
}

fn get_time(row: &SqliteRow, column: &str) -> Result<Timestamp, QueueError> {
    Timestamp::from_millisecond(row.try_get(column)?).map_err(|error| corrupt(column, error))
}

fn get_optional_time(row: &SqliteRow, column: &str) -> Result<Option<Timestamp>, QueueError> {
    let millis: Option<i64> = row.try_get(column)?;
    millis.map(|millis| Timestamp::from_millisecond(millis).map_err(|error| corrupt(column, error))).transpose()
}

fn get_state(row: &SqliteRow, column: &str) -> Result<JobState, QueueError> {
    let text: String = row.try_get(column)?;
    text.parse().map_err(|error: String| corrupt("job state", error))
}

/// Counts are written by this program only and fit.
fn get_u32(row: &SqliteRow, column: &str) -> Result<u32, QueueError> {
    let value: i64 = row.try_get(column)?;
    u32::try_from(value).map_err(|error| corrupt(column, error))
}

fn get_u64(row: &SqliteRow, column: &str) -> Result<u64, QueueError> {
    let value: i64 = row.try_get(column)?;
    u64::try_from(value).map_err(|error| corrupt(column, error))
}

/// SQLite's integers are signed; a seed is stored as the same 64 bits.
fn get_seed(row: &SqliteRow) -> Result<u64, QueueError> {
    let value: i64 = row.try_get("seed")?;
    Ok(value.cast_unsigned())
}

fn request_json(request: &RenderRequest) -> Result<String, QueueError> {
    serde_json::to_string(request).map_err(|error| corrupt("request", error))
}

fn reply_json(reply: &SubmissionReply) -> Result<String, QueueError> {
    serde_json::to_string(reply).map_err(|error| corrupt("reply", error))
}

fn get_attempt(row: &SqliteRow, column: &str) -> Result<AttemptNo, QueueError> {
    get_u32(row, column).map(AttemptNo)
}

fn get_optional_node(row: &SqliteRow, column: &str) -> Result<Option<NodeId>, QueueError> {
    let text: Option<String> = row.try_get(column)?;
    Ok(text.map(NodeId))
}
