//! What people read.

use std::collections::BTreeMap;

use farm_core::api::{AttemptView, AuditEntry, AuditPage, BatchView, LogLine, LogPage};
use farm_core::id::{Epoch, JobId, NodeId, SubmissionId};
use farm_core::job::state::JobState;
use sqlx::any::AnyRow;

use super::super::store::{JobFilter, JobRecord, QueueError};
use super::rows::{
    get_attempt, get_flag, get_i32, get_i64, get_job_id, get_json, get_optional, get_optional_i64, get_optional_json,
    get_optional_node, get_optional_text, get_optional_time, get_seed, get_state, get_submission_id, get_tenant,
    get_text, get_time, get_u64, tail_of,
};
use super::{SqlQueue, query};

const RECORD: &str = "SELECT j.id, j.request, j.seed, j.priority, j.tenant, j.model, j.state, j.reason, j.result, j.warnings, \
     j.attempt, j.node, j.submitted, j.finished FROM jobs j";

const BATCH: &str = "SELECT n, id, tenant, committed, max_failures, paused FROM submissions WHERE reply IS NOT NULL";

impl SqlQueue {
    pub(super) async fn read_counts(&self) -> Result<BTreeMap<JobState, u64>, QueueError> {
        let rows = query("SELECT state, COUNT(*) AS jobs FROM jobs GROUP BY state").fetch_all(&self.readers).await?;
        rows.iter().map(|row| Ok((get_state(row, "state")?, get_u64(row, "jobs")?))).collect()
    }

    pub(super) async fn read_jobs_ending_in(&self, ending: &str) -> Result<Vec<JobId>, QueueError> {
        if ending.len() < 4 || !ending.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c)) {
            return Ok(Vec::new());
        }
        // 'g' follows the last hex digit: the range holds every tail that begins with these digits.
        let text = "SELECT id FROM jobs WHERE tail >= $1 AND tail < $2 AND id LIKE $3 LIMIT 10";
        let tail = tail_of(ending);
        let rows = query(text)
            .bind(tail.clone())
            .bind(format!("{tail}g"))
            .bind(format!("%{ending}"))
            .fetch_all(&self.readers)
            .await?;
        rows.iter().map(|row| get_job_id(row, "id")).collect()
    }

    pub(super) async fn read_job(&self, job: JobId) -> Result<Option<JobRecord>, QueueError> {
        let text = format!("{RECORD} WHERE j.id = $1");
        let row = query(text).bind(job.to_string()).fetch_optional(&self.readers).await?;
        row.as_ref().map(record).transpose()
    }

    pub(super) async fn read_jobs(&self, filter: JobFilter) -> Result<Vec<JobRecord>, QueueError> {
        let JobFilter { state, submission, after, limit } = filter;
        let mut text = RECORD.to_owned();
        let mut values = Vec::new();
        let mut place = |value: String| {
            values.push(value);
            format!("${}", values.len() + 1)
        };
        if let Some(submission) = submission {
            let place = place(submission.to_string());
            text += &format!(
                " JOIN submission_jobs m ON m.job = j.seq AND m.submission = (SELECT n FROM submissions WHERE id = {place})"
            );
        }
        text += " WHERE 1 = 1";
        if let Some(state) = state {
            text += &format!(" AND j.state = {}", place(state.as_str().to_owned()));
        }
        if let Some(after) = after {
            text += &format!(" AND j.seq > (SELECT o.seq FROM jobs o WHERE o.id = {})", place(after.to_string()));
        }
        text += " ORDER BY j.seq LIMIT $1";
        let mut select = query(text).bind(i64::from(limit));
        for value in values {
            select = select.bind(value);
        }
        let rows = select.fetch_all(&self.readers).await?;
        rows.iter().map(record).collect()
    }

    pub(super) async fn read_attempts(&self, job: JobId) -> Result<Vec<AttemptView>, QueueError> {
        let text = "SELECT attempt, epoch, node, devices, started, ended, outcome, message, device_ms FROM attempts \
                    WHERE job = (SELECT seq FROM jobs WHERE id = $1) ORDER BY attempt";
        let rows = query(text).bind(job.to_string()).fetch_all(&self.readers).await?;
        rows.iter()
            .map(|row| {
                Ok(AttemptView {
                    attempt: get_attempt(row, "attempt")?,
                    epoch: Epoch(get_u64(row, "epoch")?),
                    node: NodeId(get_text(row, "node")?),
                    devices: get_json(row, "devices")?,
                    started: get_time(row, "started")?,
                    ended: get_optional_time(row, "ended")?,
                    outcome: get_text(row, "outcome")?,
                    message: get_optional_text(row, "message")?,
                    device_seconds: get_optional_i64(row, "device_ms")?.map(|millis| millis as f64 / 1000.0),
                })
            })
            .collect()
    }

    pub(super) async fn read_log(&self, job: JobId, after: u64, limit: u32) -> Result<LogPage, QueueError> {
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        let text = "SELECT n, at, attempt, line FROM job_log \
                    WHERE job = (SELECT seq FROM jobs WHERE id = $1) AND n > $2 ORDER BY n LIMIT $3";
        let select = query(text).bind(job.to_string()).bind(after).bind(i64::from(limit));
        let rows = select.fetch_all(&self.readers).await?;
        let mut page = LogPage { lines: Vec::with_capacity(rows.len()), next: after.cast_unsigned() };
        for row in &rows {
            page.next = get_u64(row, "n")?;
            page.lines.push(LogLine {
                at: get_time(row, "at")?,
                attempt: get_optional(row, "attempt")?.map(farm_core::id::AttemptNo),
                line: get_text(row, "line")?,
            });
        }
        Ok(page)
    }

    pub(super) async fn read_audit(&self, after: u64, limit: u32) -> Result<AuditPage, QueueError> {
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        let text = "SELECT n, at, who, action, subject, detail FROM audit WHERE n > $1 ORDER BY n LIMIT $2";
        let rows = query(text).bind(after).bind(i64::from(limit)).fetch_all(&self.readers).await?;
        let mut page = AuditPage { entries: Vec::with_capacity(rows.len()), next: after.cast_unsigned() };
        for row in &rows {
            page.next = get_u64(row, "n")?;
            page.entries.push(AuditEntry {
                number: page.next,
                at: get_time(row, "at")?,
                by: get_text(row, "who")?,
                action: get_text(row, "action")?,
                subject: get_text(row, "subject")?,
                detail: get_text(row, "detail")?,
            });
        }
        Ok(page)
    }

    pub(super) async fn read_batch(&self, submission: SubmissionId) -> Result<Option<BatchView>, QueueError> {
        let text = format!("{BATCH} AND id = $1");
        let row = query(text).bind(submission.to_string()).fetch_optional(&self.readers).await?;
        let Some(row) = row else { return Ok(None) };
        self.view(&row).await.map(Some)
    }

    pub(super) async fn read_batches(&self, limit: u32) -> Result<Vec<BatchView>, QueueError> {
        let text = format!("{BATCH} ORDER BY committed DESC, n DESC LIMIT $1");
        let rows = query(text).bind(i64::from(limit)).fetch_all(&self.readers).await?;
        let mut views = Vec::with_capacity(rows.len());
        for row in &rows {
            views.push(self.view(row).await?);
        }
        Ok(views)
    }

    async fn view(&self, row: &AnyRow) -> Result<BatchView, QueueError> {
        let text = "SELECT j.state, COUNT(*) AS jobs FROM submission_jobs m JOIN jobs j ON j.seq = m.job \
                    WHERE m.submission = $1 GROUP BY j.state";
        let counts = query(text).bind(get_i64(row, "n")?).fetch_all(&self.readers).await?;
        Ok(BatchView {
            submission: get_submission_id(row, "id")?,
            tenant: get_tenant(row, "tenant")?,
            submitted: get_time(row, "committed")?,
            jobs: counts
                .iter()
                .map(|row| Ok((get_state(row, "state")?, get_u64(row, "jobs")?)))
                .collect::<Result<_, QueueError>>()?,
            max_failures: get_optional(row, "max_failures")?,
            paused: get_flag(row, "paused")?,
            eta_seconds: None,
            summary: String::new(),
        })
    }
}

fn record(row: &AnyRow) -> Result<JobRecord, QueueError> {
    Ok(JobRecord {
        job: get_job_id(row, "id")?,
        request: get_json(row, "request")?,
        seed: get_seed(row)?,
        priority: get_i32(row, "priority")?,
        tenant: get_tenant(row, "tenant")?,
        model: get_optional_text(row, "model")?,
        state: get_state(row, "state")?,
        reason: get_optional_text(row, "reason")?,
        result: get_optional_json(row, "result")?,
        warnings: get_json(row, "warnings")?,
        attempt: get_attempt(row, "attempt")?,
        node: get_optional_node(row, "node")?,
        submitted: get_time(row, "submitted")?,
        finished: get_optional_time(row, "finished")?,
    })
}
