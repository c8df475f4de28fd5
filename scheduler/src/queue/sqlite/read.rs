//! What people and a starting scheduler read.

use std::collections::BTreeMap;

use farm_core::api::{AttemptView, LogLine, LogPage};
use farm_core::id::{AttemptKey, AttemptNo, Epoch, JobId, NodeId, SubmissionId};
use farm_core::job::state::JobState;
use futures::TryStreamExt;
use sqlx::sqlite::SqliteRow;
use sqlx::{QueryBuilder, Row, query};

use super::super::store::{JobFilter, JobRecord, QueueError};
use super::{
    SqliteQueue, get_attempt, get_boot, get_job_id, get_json, get_optional_json, get_optional_node, get_optional_time,
    get_seed, get_state, get_time, get_u32, get_u64, tail_of,
};
use crate::core::events::{Clip, LiveAttempt, LiveJob, LoadedRequest};

const LIVE: &str = "SELECT j.id, j.seq, j.priority, j.model, j.attempt, j.failures, j.losses, j.state, \
     a.epoch, a.node, a.boot, a.devices, j.model_hash, j.spec FROM jobs j \
     LEFT JOIN attempts a ON a.job = j.seq AND a.attempt = j.attempt AND a.outcome = 'running'";

const RECORD: &str = "SELECT j.id, j.request, j.seed, j.priority, j.model, j.state, j.reason, j.result, j.warnings, \
     j.attempt, j.node, j.submitted, j.finished FROM jobs j";

/// Ids of one statement.
const IDS: usize = 500;

impl SqliteQueue {
    pub(super) async fn read_live_jobs(&self) -> Result<Vec<LiveJob>, QueueError> {
        let mut select = QueryBuilder::new(LIVE);
        select.push(" WHERE j.state IN ('queued', 'running') ORDER BY j.seq");
        // Row by row: a row takes several times the memory of what is kept of it.
        let mut rows = select.build().fetch(&self.writer);
        let mut jobs = Vec::new();
        while let Some(row) = rows.try_next().await? {
            jobs.push(live_job(&row)?.1);
        }
        Ok(jobs)
    }

    pub(super) async fn read_live_job(&self, job: JobId) -> Result<Option<(JobState, LiveJob)>, QueueError> {
        let mut select = QueryBuilder::new(LIVE);
        select.push(" WHERE j.id = ").push_bind(job.to_string());
        let row = select.build().fetch_optional(&self.writer).await?;
        row.as_ref().map(live_job).transpose()
    }

    pub(super) async fn read_requests(&self, jobs: &[JobId]) -> Result<Vec<LoadedRequest>, QueueError> {
        let mut loaded = Vec::with_capacity(jobs.len());
        for chunk in jobs.chunks(IDS) {
            let mut select = QueryBuilder::new("SELECT id, request, seed FROM jobs WHERE id IN (");
            let mut ids = select.separated(", ");
            for job in chunk {
                ids.push_bind(job.to_string());
            }
            select.push(")");
            for row in select.build().fetch_all(&self.readers).await? {
                loaded.push(LoadedRequest {
                    job: get_job_id(&row, "id")?,
                    request: get_json(&row, "request")?,
                    seed: get_seed(&row)?,
                });
            }
        }
        if loaded.len() != jobs.len() {
            return Err(QueueError::Conflict(format!("{} of {} jobs are gone", jobs.len() - loaded.len(), jobs.len())));
        }
        Ok(loaded)
    }

    pub(super) async fn read_submission_counts(
        &self,
        submission: SubmissionId,
    ) -> Result<BTreeMap<JobState, u64>, QueueError> {
        let rows = query(
            "SELECT j.state, COUNT(*) AS jobs FROM submission_jobs s JOIN jobs j ON j.seq = s.job \
             WHERE s.submission = ? GROUP BY j.state",
        )
        .bind(submission.to_string())
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(|row| Ok((get_state(row, "state")?, get_u64(row, "jobs")?))).collect()
    }

    pub(super) async fn read_counts(&self) -> Result<BTreeMap<JobState, u64>, QueueError> {
        let rows = query("SELECT state, COUNT(*) AS jobs FROM jobs GROUP BY state").fetch_all(&self.readers).await?;
        rows.iter().map(|row| Ok((get_state(row, "state")?, get_u64(row, "jobs")?))).collect()
    }

    pub(super) async fn read_jobs_ending_in(&self, ending: &str) -> Result<Vec<JobId>, QueueError> {
        let tail = tail_of(ending);
        // 'g' follows the last hex digit: the range holds every tail that begins with these digits.
        let rows = query("SELECT id FROM jobs WHERE tail >= ?1 AND tail < ?1 || 'g' AND id LIKE '%' || ?2 LIMIT 10")
            .bind(tail)
            .bind(ending)
            .fetch_all(&self.readers)
            .await?;
        rows.iter().map(|row| get_job_id(row, "id")).collect()
    }

    pub(super) async fn read_job(&self, job: JobId) -> Result<Option<JobRecord>, QueueError> {
        let mut select = QueryBuilder::new(RECORD);
        select.push(" WHERE j.id = ").push_bind(job.to_string());
        let row = select.build().fetch_optional(&self.readers).await?;
        row.as_ref().map(record).transpose()
    }

    pub(super) async fn read_jobs(&self, filter: JobFilter) -> Result<Vec<JobRecord>, QueueError> {
        let mut select = QueryBuilder::new(RECORD);
        if let Some(submission) = filter.submission {
            select
                .push(" JOIN submission_jobs s ON s.job = j.seq AND s.submission = ")
                .push_bind(submission.to_string());
        }
        select.push(" WHERE 1 = 1");
        if let Some(state) = filter.state {
            select.push(" AND j.state = ").push_bind(state.as_str());
        }
        if let Some(after) = filter.after {
            select.push(" AND j.seq > (SELECT seq FROM jobs WHERE id = ").push_bind(after.to_string()).push(")");
        }
        select.push(" ORDER BY j.seq LIMIT ").push_bind(filter.limit);
        let rows = select.build().fetch_all(&self.readers).await?;
        rows.iter().map(record).collect()
    }

    pub(super) async fn read_attempts(&self, job: JobId) -> Result<Vec<AttemptView>, QueueError> {
        let rows = query(
            "SELECT attempt, epoch, node, devices, started, ended, outcome, message FROM attempts \
             WHERE job = (SELECT seq FROM jobs WHERE id = ?) ORDER BY attempt",
        )
        .bind(job.to_string())
        .fetch_all(&self.readers)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(AttemptView {
                    attempt: get_attempt(row, "attempt")?,
                    epoch: Epoch(get_u64(row, "epoch")?),
                    node: NodeId(row.try_get("node")?),
                    devices: get_json(row, "devices")?,
                    started: get_time(row, "started")?,
                    ended: get_optional_time(row, "ended")?,
                    outcome: row.try_get("outcome")?,
                    message: row.try_get("message")?,
                })
            })
            .collect()
    }

    pub(super) async fn read_log(&self, job: JobId, after: u64, limit: u32) -> Result<LogPage, QueueError> {
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        let rows = query(
            "SELECT n, at, attempt, line FROM job_log \
             WHERE job = (SELECT seq FROM jobs WHERE id = ?) AND n > ? ORDER BY n LIMIT ?",
        )
        .bind(job.to_string())
        .bind(after)
        .bind(limit)
        .fetch_all(&self.readers)
        .await?;
        let mut page = LogPage { lines: Vec::with_capacity(rows.len()), next: after.cast_unsigned() };
        for row in &rows {
            page.next = get_u64(row, "n")?;
            let attempt: Option<i64> = row.try_get("attempt")?;
            page.lines.push(LogLine {
                at: get_time(row, "at")?,
                attempt: attempt.map(|_| get_attempt(row, "attempt")).transpose()?,
                line: row.try_get("line")?,
            });
        }
        Ok(page)
    }
}

fn live_job(row: &SqliteRow) -> Result<(JobState, LiveJob), QueueError> {
    let job = get_job_id(row, "id")?;
    let attempt = get_attempt(row, "attempt")?;
    let state = get_state(row, "state")?;
    let running = match state {
        JobState::Running => Some(Box::new(live_attempt(row, job, attempt)?)),
        _ => None,
    };
    let live = LiveJob {
        job,
        seq: get_u64(row, "seq")?,
        priority: row.try_get("priority")?,
        model: row.try_get("model")?,
        attempt,
        failures: get_u32(row, "failures")?,
        losses: get_u32(row, "losses")?,
        running,
    };
    Ok((state, live))
}

fn live_attempt(row: &SqliteRow, job: JobId, attempt: AttemptNo) -> Result<LiveAttempt, QueueError> {
    let node = get_optional_node(row, "node")?
        .ok_or_else(|| QueueError::Corrupt(format!("job {job} is running without a running attempt")))?;
    Ok(LiveAttempt {
        key: AttemptKey { job, attempt, epoch: Epoch(get_u64(row, "epoch")?) },
        node,
        boot: get_boot(row, "boot")?,
        devices: get_json(row, "devices")?,
        clip: Clip {
            model: row.try_get("model")?,
            model_hash: row.try_get("model_hash")?,
            spec_json: row.try_get("spec")?,
        },
    })
}

fn record(row: &SqliteRow) -> Result<JobRecord, QueueError> {
    Ok(JobRecord {
        job: get_job_id(row, "id")?,
        request: get_json(row, "request")?,
        seed: get_seed(row)?,
        priority: row.try_get("priority")?,
        model: row.try_get("model")?,
        state: get_state(row, "state")?,
        reason: row.try_get("reason")?,
        result: get_optional_json(row, "result")?,
        warnings: get_json(row, "warnings")?,
        attempt: get_attempt(row, "attempt")?,
        node: get_optional_node(row, "node")?,
        submitted: get_time(row, "submitted")?,
        finished: get_optional_time(row, "finished")?,
    })
}
