//! Uploads and their commit.

use std::collections::HashMap;

use farm_core::id::{AttemptNo, Epoch, SubmissionId};
use farm_core::job::state::JobState;
use jiff::Timestamp;
use sqlx::{QueryBuilder, Row, Sqlite, Transaction, query};

use super::super::store::{
    Batch, Committed, MAX_OPEN_SUBMISSIONS, NewJob, QueueError, STALE_SUBMISSION_MS, Submission,
};
use super::{
    SqliteQueue, get_job_id, get_optional_json, get_state, get_u32, get_u64, reply_json, request_json, tail_of,
};
use crate::core::events::LiveJob;

/// Rows of one statement: SQLite takes at most 32,766 values.
const ROWS: usize = 500;

/// A job that an earlier submission made.
struct Known {
    seq: i64,
    state: JobState,
}

impl SqliteQueue {
    pub(super) async fn write_submission(
        &self,
        submission: SubmissionId,
        model: Option<String>,
        priority: Option<i32>,
        at: Timestamp,
    ) -> Result<(), QueueError> {
        let mut tx = self.begin().await?;
        let at = at.as_millisecond();
        let stale = at - STALE_SUBMISSION_MS;
        query(
            "DELETE FROM submission_pages WHERE submission IN \
             (SELECT id FROM submissions WHERE reply IS NULL AND opened < ?)",
        )
        .bind(stale)
        .execute(&mut *tx)
        .await?;
        query("DELETE FROM submissions WHERE reply IS NULL AND opened < ?").bind(stale).execute(&mut *tx).await?;
        let open: i64 =
            query("SELECT COUNT(*) FROM submissions WHERE reply IS NULL").fetch_one(&mut *tx).await?.try_get(0)?;
        if open >= MAX_OPEN_SUBMISSIONS {
            return Err(QueueError::TooManySubmissions(open));
        }
        query("INSERT INTO submissions (id, model, priority, opened) VALUES (?, ?, ?, ?)")
            .bind(submission.to_string())
            .bind(model)
            .bind(priority)
            .bind(at)
            .execute(&mut *tx)
            .await?;
        Ok(tx.commit().await?)
    }

    pub(super) async fn read_submission(&self, submission: SubmissionId) -> Result<Option<Submission>, QueueError> {
        let row = query("SELECT model, priority, reply FROM submissions WHERE id = ?")
            .bind(submission.to_string())
            .fetch_optional(&self.readers)
            .await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(Submission {
            model: row.try_get("model")?,
            priority: row.try_get("priority")?,
            reply: get_optional_json(&row, "reply")?,
        }))
    }

    pub(super) async fn write_page(
        &self,
        submission: SubmissionId,
        page: u32,
        bytes: Vec<u8>,
    ) -> Result<bool, QueueError> {
        let put = query(
            "INSERT INTO submission_pages (submission, page, bytes) \
             SELECT id, ?, ? FROM submissions WHERE id = ? AND reply IS NULL \
             ON CONFLICT (submission, page) DO UPDATE SET bytes = excluded.bytes",
        )
        .bind(page)
        .bind(bytes)
        .bind(submission.to_string())
        .execute(&self.writer)
        .await?;
        Ok(put.rows_affected() == 1)
    }

    pub(super) async fn read_pages(&self, submission: SubmissionId) -> Result<Vec<(u32, u64)>, QueueError> {
        let rows =
            query("SELECT page, length(bytes) AS length FROM submission_pages WHERE submission = ? ORDER BY page")
                .bind(submission.to_string())
                .fetch_all(&self.readers)
                .await?;
        rows.iter().map(|row| Ok((get_u32(row, "page")?, get_u64(row, "length")?))).collect()
    }

    pub(super) async fn read_page(&self, submission: SubmissionId, page: u32) -> Result<Option<Vec<u8>>, QueueError> {
        let row = query("SELECT bytes FROM submission_pages WHERE submission = ? AND page = ?")
            .bind(submission.to_string())
            .bind(page)
            .fetch_optional(&self.readers)
            .await?;
        Ok(row.map(|row| row.try_get("bytes")).transpose()?)
    }

    pub(super) async fn write_batch(&self, epoch: Epoch, batch: Batch, at: Timestamp) -> Result<Committed, QueueError> {
        let Batch { submission, jobs, mut reply } = batch;
        let mut tx = self.begin_in(epoch).await?;
        let row = query("SELECT reply FROM submissions WHERE id = ?")
            .bind(submission.to_string())
            .fetch_optional(&mut *tx)
            .await?
            .ok_or_else(|| QueueError::Conflict(format!("there is no submission {submission}")))?;
        if let Some(reply) = get_optional_json(&row, "reply")? {
            return Ok(Committed { reply, queued: Vec::new() });
        }
        let last: i64 = query("SELECT COALESCE(MAX(seq), 0) FROM jobs").fetch_one(&mut *tx).await?.try_get(0)?;
        let mut next = last + 1;
        let mut queued = Vec::new();
        for chunk in jobs.chunks(ROWS) {
            let known = known_jobs(&mut tx, chunk).await?;
            let mut new = Vec::new();
            let mut seqs = Vec::with_capacity(chunk.len());
            for job in chunk {
                match known.get(&job.key) {
                    None => {
                        new.push((next, job));
                        seqs.push(next);
                        next += 1;
                    }
                    Some(known) => {
                        seqs.push(known.seq);
                        if matches!(known.state, JobState::Failed | JobState::Cancelled) {
                            queued.push(requeue(&mut tx, known.seq, job).await?);
                            reply.requeued += 1;
                        } else {
                            reply.existing += 1;
                        }
                    }
                }
            }
            insert_jobs(&mut tx, &new, at).await?;
            insert_memberships(&mut tx, submission, &seqs).await?;
            reply.new += new.len() as u64;
            queued.extend(new.iter().map(|(seq, job)| LiveJob {
                job: job.job,
                seq: seq.cast_unsigned(),
                priority: job.priority,
                model: job.model.clone(),
                attempt: AttemptNo(0),
                failures: 0,
                losses: 0,
                running: None,
            }));
        }
        query("DELETE FROM submission_pages WHERE submission = ?")
            .bind(submission.to_string())
            .execute(&mut *tx)
            .await?;
        query("UPDATE submissions SET reply = ? WHERE id = ?")
            .bind(reply_json(&reply)?)
            .bind(submission.to_string())
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Committed { reply, queued })
    }
}

/// Which of these lines are jobs already.
async fn known_jobs(tx: &mut Transaction<'_, Sqlite>, jobs: &[NewJob]) -> Result<HashMap<[u8; 32], Known>, QueueError> {
    let mut select = QueryBuilder::new("SELECT key, seq, state FROM jobs WHERE key IN (");
    let mut keys = select.separated(", ");
    for job in jobs {
        keys.push_bind(job.key.to_vec());
    }
    select.push(")");
    let rows = select.build().fetch_all(&mut **tx).await?;
    rows.iter()
        .map(|row| {
            let key: Vec<u8> = row.try_get("key")?;
            let key = key.try_into().map_err(|_| QueueError::Corrupt("a job's key is not 32 bytes".to_owned()))?;
            Ok((key, Known { seq: row.try_get("seq")?, state: get_state(row, "state")? }))
        })
        .collect()
}

/// Queues a failed or cancelled job again, with the new submission's priority. It keeps its seed and its place.
async fn requeue(tx: &mut Transaction<'_, Sqlite>, seq: i64, job: &NewJob) -> Result<LiveJob, QueueError> {
    let row = query(
        "UPDATE jobs SET state = 'queued', reason = NULL, finished = NULL, failures = 0, losses = 0, priority = ? \
         WHERE seq = ? RETURNING id, model, attempt",
    )
    .bind(job.priority)
    .bind(seq)
    .fetch_one(&mut **tx)
    .await?;
    Ok(LiveJob {
        job: get_job_id(&row, "id")?,
        seq: seq.cast_unsigned(),
        priority: job.priority,
        model: row.try_get("model")?,
        attempt: AttemptNo(get_u32(&row, "attempt")?),
        failures: 0,
        losses: 0,
        running: None,
    })
}

async fn insert_jobs(
    tx: &mut Transaction<'_, Sqlite>,
    jobs: &[(i64, &NewJob)],
    at: Timestamp,
) -> Result<(), QueueError> {
    if jobs.is_empty() {
        return Ok(());
    }
    let requests = jobs.iter().map(|(_, job)| request_json(&job.request)).collect::<Result<Vec<_>, _>>()?;
    let mut insert =
        QueryBuilder::new("INSERT INTO jobs (seq, id, tail, key, request, seed, priority, model, state, submitted) ");
    insert.push_values(jobs.iter().zip(requests), |mut row, ((seq, job), request)| {
        let id = job.job.to_string();
        row.push_bind(*seq)
            .push_bind(id.clone())
            .push_bind(tail_of(&id))
            .push_bind(job.key.to_vec())
            .push_bind(request)
            .push_bind(job.seed.cast_signed())
            .push_bind(job.priority)
            .push_bind(job.model.clone())
            .push_bind("queued")
            .push_bind(at.as_millisecond());
    });
    insert.build().execute(&mut **tx).await?;
    Ok(())
}

async fn insert_memberships(
    tx: &mut Transaction<'_, Sqlite>,
    submission: SubmissionId,
    jobs: &[i64],
) -> Result<(), QueueError> {
    let mut insert = QueryBuilder::new("INSERT INTO submission_jobs (submission, job) ");
    insert.push_values(jobs, |mut row, job| {
        row.push_bind(submission.to_string()).push_bind(*job);
    });
    insert.build().execute(&mut **tx).await?;
    Ok(())
}
