//! The queue store in SQL: one program for SQLite (WAL, fully synchronous) and Postgres. They differ in a few words
//! ([`dialect`]), in how a leader is found ([`lead`]), and in nothing that a caller could see.

mod changes;
mod check;
mod dialect;
mod gc;
mod groups;
mod lead;
mod load;
mod read;
mod rows;
mod submit;
mod upload;
mod usage;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use farm_core::api::{AttemptView, AuditPage, BatchView, LogPage, OpenSubmission};
use farm_core::id::{Epoch, JobId, SubmissionId};
use farm_core::job::state::JobState;
use futures::FutureExt;
use jiff::Timestamp;
use sqlx::any::{AnyArguments, AnyPoolOptions, install_default_drivers};
use sqlx::query::Query;
use sqlx::{Any, AnyConnection, AnyPool, AssertSqlSafe, Executor, Transaction};
use uuid::Uuid;

use self::dialect::Dialect;
use self::lead::Seat;
use self::rows::get_i64;
use super::location::Location;
use super::store::{
    Batch, Committed, JobFilter, JobRecord, Leader, Leftover, Pruned, QueueError, QueueStore, Retention, Stored,
    Submission, UsageBy, Used,
};
use crate::core::effects::Change;
use crate::core::events::{LiveJob, LoadedRequest, Saved};

/// Longest wait for a free connection, and in SQLite for another connection's lock.
const WAIT: Duration = Duration::from_secs(10);
/// Longest wait of a write in SQLite for the one before, which may be a submission of a million lines: the end of this wait
/// is the end of the reign.
const WRITE_WAIT: Duration = Duration::from_secs(120);
const READERS: u32 = 4;
/// Of Postgres: the scheduler's own writes, and pages of uploads beside them.
const WRITERS: u32 = 4;
/// Rows of one statement.
const ROWS: usize = 1000;
/// Their JSON, about, in bytes.
const ROW_BYTES: usize = 4 << 20;

pub struct SqlQueue {
    dialect: Dialect,
    /// SQLite has one writer at a time, and waiting for one connection is fairer than retries.
    writer: AnyPool,
    readers: AnyPool,
    seat: Seat,
}

/// A statement whose text is made of this module's own words; values are bound.
fn query(text: impl Into<String>) -> Query<'static, Any, AnyArguments> {
    sqlx::query(AssertSqlSafe(text.into()))
}

impl SqlQueue {
    /// Opens the queue, makes it if it is absent, and brings its tables up to date.
    pub async fn open(location: &Location) -> Result<Self, QueueError> {
        install_default_drivers();
        let url = location.url()?;
        let opened = |source| QueueError::Open { location: location.to_string(), source };
        match location {
            Location::File(file) => {
                make_folder(file).map_err(|error| opened(sqlx::Error::Io(error)))?;
                let writer = pool(1, SQLITE_SESSION.to_owned()).acquire_timeout(WRITE_WAIT);
                let writer = writer.connect(&url).await.map_err(opened)?;
                sqlx::migrate!("./migrations/sqlite").run(&writer).await?;
                let readers = format!("{SQLITE_SESSION} PRAGMA query_only = 1;");
                let readers = pool(READERS, readers).connect(&url).await.map_err(opened)?;
                Ok(Self { dialect: Dialect::Sqlite, writer, readers, seat: Seat::Always })
            }
            Location::Postgres(_) => {
                let owner = format!("farm-scheduler {}", Uuid::new_v4().simple());
                let session = postgres_session(&owner, Duration::from_secs(120));
                let writer = pool(WRITERS, session.clone()).connect(&url).await.map_err(opened)?;
                sqlx::migrate!("./migrations/postgres").run(&writer).await?;
                let readers = pool(READERS, session).connect(&url).await.map_err(opened)?;
                Ok(Self { dialect: Dialect::Postgres, writer, readers, seat: Seat::contested(url, owner) })
            }
        }
    }

    async fn begin(&self) -> Result<Transaction<'static, Any>, QueueError> {
        Ok(self.writer.begin_with(self.dialect.begin_write()).await?)
    }

    /// A transaction of the reign that holds now. No new reign comes between, and no write that began by
    /// [`Self::begin_alone`]. Of those that did not, each leaves alone what the others change: the changes of live jobs, and
    /// one submission at a time.
    async fn begin_in(&self, epoch: Epoch) -> Result<Transaction<'static, Any>, QueueError> {
        self.begin_locked(epoch, self.dialect.for_share()).await
    }

    /// Likewise, and no other write comes between.
    async fn begin_alone(&self, epoch: Epoch) -> Result<Transaction<'static, Any>, QueueError> {
        self.begin_locked(epoch, self.dialect.for_update()).await
    }

    async fn begin_locked(&self, epoch: Epoch, lock: &str) -> Result<Transaction<'static, Any>, QueueError> {
        let mut tx = self.begin().await?;
        let reign = format!("SELECT epoch FROM reign{lock}");
        let newest = get_i64(&query(reign).fetch_one(&mut *tx).await?, "epoch")?;
        if newest.cast_unsigned() != epoch.0 {
            return Err(QueueError::Superseded(epoch));
        }
        Ok(tx)
    }

    /// A write that stops in the middle.
    #[cfg(test)]
    pub async fn unfinished(&self, epoch: Epoch) -> Result<Transaction<'static, Any>, QueueError> {
        self.begin_in(epoch).await
    }

    #[cfg(test)]
    pub fn readers(&self) -> &AnyPool {
        &self.readers
    }

    /// A transaction whose reads all see one moment.
    async fn begin_read(&self) -> Result<Transaction<'static, Any>, QueueError> {
        Ok(self.readers.begin_with(self.dialect.begin_read()).await?)
    }
}

const SQLITE_SESSION: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = 1; \
     PRAGMA busy_timeout = 10000;";

/// Nothing waits for ever: not for a lock, not for a client that has stopped in a transaction, not for a network that is
/// cut. A plan that was made for a young table is not kept when it has grown. `owner` names the sessions of this store, so that they can be ended together.
fn postgres_session(owner: &str, statement: Duration) -> String {
    format!(
        "SET application_name = '{owner}'; SET statement_timeout = {}; SET lock_timeout = 10000; \
         SET idle_in_transaction_session_timeout = 15000; SET tcp_keepalives_idle = 2; \
         SET tcp_keepalives_interval = 1; SET tcp_keepalives_count = 3; SET tcp_user_timeout = 5000; \
         SET jit = off; SET plan_cache_mode = force_custom_plan; SET random_page_cost = 1.1;",
        statement.as_millis()
    )
}

/// Connections are kept for ever: the last of a file to close would tidy up its log, and a server's are made anew when
/// they break.
fn pool(connections: u32, session: String) -> AnyPoolOptions {
    AnyPoolOptions::new()
        .max_connections(connections)
        .max_lifetime(None)
        .idle_timeout(None)
        .acquire_timeout(WAIT)
        .after_connect(move |connection, _| {
            let session = session.clone();
            Box::pin(async move { set_session(connection, session).await })
        })
}

async fn set_session(connection: &mut AnyConnection, session: String) -> sqlx::Result<()> {
    connection.execute(sqlx::raw_sql(AssertSqlSafe(session))).await.map(drop)
}

fn make_folder(file: &Path) -> std::io::Result<()> {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => std::fs::create_dir_all(folder),
        _ => Ok(()),
    }
}

impl QueueStore for SqlQueue {
    fn campaign<'a>(&'a self, address: &'a str) -> Stored<'a, Option<Epoch>> {
        self.run_for_leader(address).boxed()
    }

    fn beat(&self, epoch: Epoch) -> Stored<'_, ()> {
        self.say_alive(epoch).boxed()
    }

    fn resign(&self, epoch: Epoch) -> Stored<'_, ()> {
        self.step_down(epoch).boxed()
    }

    fn leader(&self) -> Stored<'_, Option<Leader>> {
        self.read_leader().boxed()
    }

    fn load(&self, since_hour: i64) -> Stored<'_, Saved> {
        self.read_all(since_hour).boxed()
    }

    fn apply<'a>(&'a self, epoch: Epoch, changes: &'a [Change], at: Timestamp) -> Stored<'a, ()> {
        async move {
            let mut tx = self.begin_in(epoch).await?;
            changes::apply(&mut tx, self.dialect, changes, at).await?;
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

    fn open_submission(&self, submission: SubmissionId, open: OpenSubmission, at: Timestamp) -> Stored<'_, ()> {
        self.write_submission(submission, open, at).boxed()
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

    fn batch(&self, submission: SubmissionId) -> Stored<'_, Option<BatchView>> {
        self.read_batch(submission).boxed()
    }

    fn batches(&self, limit: u32) -> Stored<'_, Vec<BatchView>> {
        self.read_batches(limit).boxed()
    }

    fn usage(&self, by: UsageBy, since: Timestamp, until: Timestamp) -> Stored<'_, Vec<Used>> {
        self.read_usage(by, since, until).boxed()
    }

    fn audit(&self, after: u64, limit: u32) -> Stored<'_, AuditPage> {
        self.read_audit(after, limit).boxed()
    }

    fn leftovers(&self, retention: Retention, at: Timestamp, limit: u32) -> Stored<'_, Vec<Leftover>> {
        self.read_leftovers(retention, at, limit).boxed()
    }

    fn mark_clean<'a>(&'a self, epoch: Epoch, jobs: &'a [JobId]) -> Stored<'a, ()> {
        self.write_clean(epoch, jobs).boxed()
    }

    fn prune(&self, epoch: Epoch, retention: Retention, at: Timestamp, dry_run: bool) -> Stored<'_, Pruned> {
        self.remove_old(epoch, retention, at, dry_run).boxed()
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

    fn violations(&self) -> Stored<'_, Vec<String>> {
        self.check_rows().boxed()
    }

    fn log(&self, job: JobId, after: u64, limit: u32) -> Stored<'_, LogPage> {
        self.read_log(job, after, limit).boxed()
    }
}
