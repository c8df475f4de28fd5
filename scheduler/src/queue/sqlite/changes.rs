//! One change, one or two guarded statements.

use farm_core::id::JobId;
use jiff::Timestamp;
use sqlx::sqlite::{Sqlite, SqliteArguments};
use sqlx::{Transaction, query};

use super::super::store::{MAX_LOG_LINES, QueueError};
use crate::core::effects::Change;

type Statement<'q> = sqlx::query::Query<'q, Sqlite, SqliteArguments>;

/// Runs a statement that has to hit exactly one row; anything else means that the caller's picture is wrong.
async fn exactly_one(
    tx: &mut Transaction<'_, Sqlite>,
    statement: Statement<'_>,
    what: &str,
    job: JobId,
) -> Result<(), QueueError> {
    match statement.execute(&mut **tx).await?.rows_affected() {
        1 => Ok(()),
        _ => Err(QueueError::Conflict(format!("{what} of job {job} does not fit its state"))),
    }
}

pub(super) async fn apply(tx: &mut Transaction<'_, Sqlite>, change: &Change, at: Timestamp) -> Result<(), QueueError> {
    let at = at.as_millisecond();
    match change {
        Change::Started { start, node, boot } => {
            let key = start.key;
            let id = key.job.to_string();
            let statement = query(
                "UPDATE jobs SET state = 'running', attempt = ?, node = ?, model = ?, model_hash = ?, spec = ?, \
                 reason = NULL WHERE id = ? AND state = 'queued' AND attempt = ? - 1",
            )
            .bind(key.attempt.0)
            .bind(&node.0)
            .bind(&start.model)
            .bind(&start.model_hash)
            .bind(&start.spec_json)
            .bind(&id)
            .bind(key.attempt.0);
            exactly_one(tx, statement, "the start", key.job).await?;
            let devices = serde_json::to_string(&start.devices)
                .map_err(|error| QueueError::Corrupt(format!("devices: {error}")))?;
            let statement = query(
                "INSERT INTO attempts (job, attempt, epoch, node, boot, devices, started, outcome) \
                 SELECT seq, ?, ?, ?, ?, ?, ?, 'running' FROM jobs WHERE id = ?",
            )
            .bind(key.attempt.0)
            .bind(key.epoch.0 as i64)
            .bind(&node.0)
            .bind(boot.to_string())
            .bind(devices)
            .bind(at)
            .bind(&id);
            exactly_one(tx, statement, "the attempt", key.job).await
        }
        Change::AttemptEnded { key, outcome, message } => {
            let statement = query(
                "UPDATE attempts SET outcome = ?, message = ?, ended = ? \
                 WHERE job = (SELECT seq FROM jobs WHERE id = ?) AND attempt = ? AND epoch = ? AND outcome = 'running'",
            )
            .bind(outcome.as_str())
            .bind(message)
            .bind(at)
            .bind(key.job.to_string())
            .bind(key.attempt.0)
            .bind(key.epoch.0 as i64);
            exactly_one(tx, statement, "the attempt's end", key.job).await
        }
        Change::Done { job, result_json, warnings } => {
            let warnings =
                serde_json::to_string(warnings).map_err(|error| QueueError::Corrupt(format!("warnings: {error}")))?;
            let statement = query(
                "UPDATE jobs SET state = 'done', result = ?, warnings = ?, finished = ? \
                 WHERE id = ? AND state = 'running'",
            )
            .bind(result_json)
            .bind(warnings)
            .bind(at)
            .bind(job.to_string());
            exactly_one(tx, statement, "the end", *job).await
        }
        Change::Requeued { job, failures, losses } => {
            let statement =
                query("UPDATE jobs SET state = 'queued', failures = ?, losses = ? WHERE id = ? AND state = 'running'")
                    .bind(*failures)
                    .bind(*losses)
                    .bind(job.to_string());
            exactly_one(tx, statement, "the requeue", *job).await
        }
        Change::Failed { job, reason } => {
            let statement = query(
                "UPDATE jobs SET state = 'failed', reason = ?, finished = ? \
                 WHERE id = ? AND state IN ('queued', 'running')",
            )
            .bind(reason)
            .bind(at)
            .bind(job.to_string());
            exactly_one(tx, statement, "the failure", *job).await
        }
        Change::Cancelled { job } => {
            let statement = query(
                "UPDATE jobs SET state = 'cancelled', finished = ? WHERE id = ? AND state IN ('queued', 'running')",
            )
            .bind(at)
            .bind(job.to_string());
            exactly_one(tx, statement, "the cancellation", *job).await
        }
        Change::Retried { job } => {
            let statement = query(
                "UPDATE jobs SET state = 'queued', reason = NULL, finished = NULL, failures = 0, losses = 0 \
                 WHERE id = ? AND state IN ('failed', 'cancelled')",
            )
            .bind(job.to_string());
            exactly_one(tx, statement, "the retry", *job).await
        }
        Change::Log { job, attempt, line } => {
            let inserted = query(
                "INSERT INTO job_log (job, n, at, attempt, line) \
                 SELECT seq, COALESCE((SELECT MAX(n) FROM job_log WHERE job = seq), 0) + 1, ?, ?, ? \
                 FROM jobs WHERE id = ?",
            )
            .bind(at)
            .bind(attempt.map(|attempt| attempt.0))
            .bind(line)
            .bind(job.to_string());
            exactly_one(tx, inserted, "a log line", *job).await?;
            query(
                "DELETE FROM job_log WHERE job = (SELECT seq FROM jobs WHERE id = ?1) AND n <= \
                 (SELECT MAX(n) FROM job_log WHERE job = (SELECT seq FROM jobs WHERE id = ?1)) - ?2",
            )
            .bind(job.to_string())
            .bind(MAX_LOG_LINES)
            .execute(&mut **tx)
            .await?;
            Ok(())
        }
    }
}
