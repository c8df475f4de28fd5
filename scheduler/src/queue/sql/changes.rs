//! Changes, each guarded by the state that it expects: a statement for each group of a kind.

use std::collections::HashMap;

use farm_core::id::{AttemptNo, JobId};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::{Any, Transaction};

use super::super::store::{MAX_LOG_LINES, QueueError};
use super::dialect::Column::{Integer, Real, Text};
use super::dialect::{Column, Dialect};
use super::groups::{Kind, groups};
use super::rows::{corrupt, json as to_json, text};
use super::{ROW_BYTES, ROWS, query};
use crate::core::effects::{Change, Outcome};
use crate::core::events::{Counts, Scope};

/// Milliseconds of an hour.
pub(super) const HOUR_MS: i64 = 60 * 60 * 1000;

pub(super) async fn apply(
    tx: &mut Transaction<'static, Any>,
    dialect: Dialect,
    changes: &[Change],
    at: Timestamp,
) -> Result<(), QueueError> {
    let mut writer = Writer { tx, dialect, at: at.as_millisecond() };
    for (kind, group) in groups(changes) {
        match kind {
            Kind::Log => writer.log(&group).await?,
            Kind::Paused | Kind::Drained | Kind::Tenant => {
                for change in group {
                    writer.single(change).await?;
                }
            }
            _ => writer.group(kind, &group).await?,
        }
    }
    Ok(())
}

/// Rows of one kind, cut so that no statement takes too much.
pub(super) struct Rows {
    rows: Vec<String>,
}

impl Rows {
    pub fn new() -> Self {
        Self { rows: Vec::new() }
    }

    pub fn push(&mut self, row: &Value) {
        self.rows.push(row.to_string());
    }

    /// Each as a JSON array, with the number of its rows.
    pub fn parts(&self) -> impl Iterator<Item = (String, u64)> {
        let mut rest = self.rows.as_slice();
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let mut bytes = 0;
            let fits = |row: &&String| {
                bytes += row.len();
                bytes <= ROW_BYTES
            };
            let count = rest.iter().take(ROWS).take_while(fits).count().max(1);
            let (part, others) = rest.split_at(count);
            rest = others;
            Some((format!("[{}]", part.join(",")), count as u64))
        })
    }
}

/// The manifest's attempt: whose clip is the job's.
#[derive(Deserialize)]
struct Accepted {
    attempt: AttemptNo,
}

struct Writer<'a> {
    tx: &'a mut Transaction<'static, Any>,
    dialect: Dialect,
    at: i64,
}

impl Writer<'_> {
    async fn group(&mut self, kind: Kind, group: &[&Change]) -> Result<(), QueueError> {
        let mut rows = Rows::new();
        for change in group {
            rows.push(&row(change)?);
        }
        let of_state = |states: &[&str]| self.dialect.is_one_of("jobs.state", states);
        let of_outcome = |outcome| self.dialect.is_one_of("a.outcome", &[outcome]);
        // The job has no attempt under way.
        let idle =
            format!("NOT EXISTS (SELECT 1 FROM attempts a WHERE a.job = jobs.seq AND {})", of_outcome("running"));
        let (live, running) = (of_state(&["queued", "running"]), of_state(&["running"]));
        match kind {
            Kind::Started => self.start(&rows, group).await,
            Kind::AttemptEnded => self.end_attempts(&rows, group).await,
            Kind::Done => {
                let columns = [Text("job"), Text("result"), Text("warnings"), Integer("accepted")];
                let set =
                    "state = 'done', result = v.result, warnings = v.warnings, accepted = v.accepted, finished = $2";
                let fits = format!(
                    "{running} AND EXISTS (SELECT 1 FROM attempts a WHERE a.job = jobs.seq AND a.attempt = jobs.attempt AND {})",
                    of_outcome("completed")
                );
                self.update_jobs(&rows, group, "done", &columns, set, &fits).await
            }
            Kind::Requeued => {
                let (columns, set) = ([Text("job"), Text("counts")], "state = 'queued', counts = v.counts");
                let fits = format!("{running} AND {idle}");
                self.update_jobs(&rows, group, "queued", &columns, set, &fits).await
            }
            Kind::Counted => {
                let (columns, set) = ([Text("job"), Text("counts")], "counts = v.counts");
                self.update_jobs(&rows, group, "counted", &columns, set, &live).await
            }
            Kind::Failed => {
                let (columns, set) =
                    ([Text("job"), Text("reason")], "state = 'failed', reason = v.reason, finished = $2");
                let fits = format!("{live} AND {idle}");
                self.update_jobs(&rows, group, "failed", &columns, set, &fits).await
            }
            Kind::Cancelled => {
                let (columns, set) = ([Text("job")], "state = 'cancelled', finished = $2");
                let fits = format!("{live} AND {idle}");
                self.update_jobs(&rows, group, "cancelled", &columns, set, &fits).await
            }
            Kind::Retried => {
                let set = "state = 'queued', reason = NULL, finished = NULL, counts = '{}', clean = 0";
                let fits = of_state(&["failed", "cancelled"]);
                self.update_jobs(&rows, group, "queued again", &[Text("job")], set, &fits).await
            }
            Kind::Audit => {
                let v = self.dialect.rows(&[Text("who"), Text("action"), Text("subject"), Text("detail")]);
                let insert = format!(
                    "INSERT INTO audit (at, who, action, subject, detail) \
                     SELECT $2, v.who, v.action, v.subject, v.detail FROM {v} AS v ORDER BY v.ord"
                );
                self.run(&insert, &rows, group, "written to the audit trail").await
            }
            Kind::Paused | Kind::Drained | Kind::Tenant | Kind::Log => Ok(()),
        }
    }

    async fn start(&mut self, rows: &Rows, group: &[&Change]) -> Result<(), QueueError> {
        let columns = [
            Text("job"),
            Integer("attempt"),
            Integer("epoch"),
            Text("node"),
            Text("boot"),
            Text("devices"),
            Text("device"),
            Text("model"),
            Text("model_hash"),
            Text("spec"),
            Real("base"),
        ];
        let set = "state = 'running', attempt = v.attempt, node = v.node, model = v.model, model_hash = v.model_hash, \
                   spec = v.spec, reason = NULL";
        let queued = self.dialect.is_one_of("jobs.state", &["queued"]);
        let fits = format!("{queued} AND jobs.attempt = v.attempt - 1");
        self.update_jobs(rows, group, "started", &columns, set, &fits).await?;
        let insert = format!(
            "INSERT INTO attempts (job, attempt, epoch, node, boot, devices, device, model, tenant, base, started, outcome) \
             SELECT j.seq, v.attempt, v.epoch, v.node, v.boot, v.devices, v.device, v.model, j.tenant, v.base, $2, 'running' \
             FROM {} AS v JOIN jobs j ON j.id = v.job",
            self.dialect.rows(&columns)
        );
        self.run(&insert, rows, group, "given an attempt").await
    }

    async fn end_attempts(&mut self, rows: &Rows, group: &[&Change]) -> Result<(), QueueError> {
        let v = self.dialect.rows(&[
            Text("job"),
            Integer("attempt"),
            Integer("epoch"),
            Text("outcome"),
            Text("message"),
            Integer("device_ms"),
        ]);
        // The jobs first: attempts are alike in number and epoch, and Postgres would rather compare each with each by those
        // than find them by their jobs.
        let end = format!(
            "WITH v AS MATERIALIZED (SELECT v.*, j.seq FROM {v} AS v JOIN jobs j ON j.id = v.job) \
             UPDATE attempts SET outcome = v.outcome, message = v.message, device_ms = v.device_ms, ended = $2 FROM v \
             WHERE attempts.job = v.seq AND attempts.attempt = v.attempt AND attempts.epoch = v.epoch \
             AND {}",
            self.dialect.is_one_of("attempts.outcome", &["running"])
        );
        self.run(&end, rows, group, "ended as attempts").await?;
        let charge = format!(
            "INSERT INTO ledger (hour, tenant, device, labels, attempts, clips, device_ms, lost_ms) \
             SELECT $2, a.tenant, a.device, j.labels, COUNT(*), \
             SUM(CASE WHEN v.outcome = 'completed' THEN 1 ELSE 0 END), SUM(v.device_ms), \
             SUM(CASE WHEN v.outcome = 'completed' THEN 0 ELSE v.device_ms END) \
             FROM {v} AS v JOIN jobs j ON j.id = v.job JOIN attempts a ON a.job = j.seq AND a.attempt = v.attempt \
             WHERE 1 = 1 GROUP BY a.tenant, a.device, j.labels \
             ON CONFLICT (hour, tenant, device, labels) DO UPDATE SET attempts = ledger.attempts + excluded.attempts, \
             clips = ledger.clips + excluded.clips, device_ms = ledger.device_ms + excluded.device_ms, \
             lost_ms = ledger.lost_ms + excluded.lost_ms"
        );
        for (part, _) in rows.parts() {
            let hour = self.at.div_euclid(HOUR_MS);
            query(charge.as_str()).bind(part).bind(hour).execute(&mut **self.tx).await?;
        }
        Ok(())
    }

    async fn log(&mut self, group: &[&Change]) -> Result<(), QueueError> {
        let v = self.dialect.rows(&[Text("job"), Integer("k"), Integer("attempt"), Text("line")]);
        let last = "COALESCE((SELECT MAX(l.n) FROM job_log l WHERE l.job = j.seq), 0)";
        let insert = format!(
            "INSERT INTO job_log (job, n, at, attempt, line) \
             SELECT j.seq, {last} + v.k, $2, v.attempt, v.line FROM {v} AS v JOIN jobs j ON j.id = v.job"
        );
        let trim = format!(
            "DELETE FROM job_log WHERE (job, n) IN (SELECT l.job, l.n FROM \
             (SELECT j.seq, {last} AS n FROM {v} AS v JOIN jobs j ON j.id = v.job WHERE v.k = 1) AS t \
             JOIN job_log l ON l.job = t.seq AND l.n <= t.n - $2)"
        );
        for chunk in group.chunks(ROWS) {
            let mut rows = Rows::new();
            let mut lines: HashMap<JobId, u64> = HashMap::new();
            for change in chunk {
                let Change::Log { job, attempt, line } = change else { continue };
                let k = lines.entry(*job).or_insert(0);
                *k += 1;
                rows.push(&json!([job.to_string(), *k, attempt.map(|attempt| attempt.0), text(line)]));
            }
            self.run(&insert, &rows, chunk, "given a log line").await?;
            for (part, _) in rows.parts() {
                query(trim.as_str()).bind(part).bind(MAX_LOG_LINES).execute(&mut **self.tx).await?;
            }
        }
        Ok(())
    }

    /// Sets columns of jobs that fit; every one has to.
    async fn update_jobs(
        &mut self,
        rows: &Rows,
        group: &[&Change],
        what: &str,
        columns: &[Column],
        set: &str,
        fits: &str,
    ) -> Result<(), QueueError> {
        let v = self.dialect.rows(columns);
        let update = format!("UPDATE jobs SET {set} FROM {v} AS v WHERE jobs.id = v.job AND {fits}");
        self.run(&update, rows, group, what).await
    }

    /// Runs a statement that has to hit as many rows as it is given; anything else means that the caller's picture is wrong.
    async fn run(&mut self, statement: &str, rows: &Rows, group: &[&Change], what: &str) -> Result<(), QueueError> {
        for (part, count) in rows.parts() {
            let mut statement_query = query(statement).bind(part);
            if statement.contains("$2") {
                statement_query = statement_query.bind(self.at);
            }
            let hit = match statement_query.execute(&mut **self.tx).await {
                Ok(done) => done.rows_affected(),
                Err(error) => return Err(conflict_or(error)),
            };
            if hit != count {
                return Err(QueueError::Conflict(format!(
                    "only {hit} of {count} can be {what} as they are: {}",
                    named(group)
                )));
            }
        }
        Ok(())
    }

    async fn single(&mut self, change: &Change) -> Result<(), QueueError> {
        let tx = &mut **self.tx;
        let (hit, what) = match change {
            Change::Paused { scope: Scope::Farm, paused } => {
                let done = query("UPDATE farm SET paused = $1").bind(i64::from(*paused)).execute(tx).await?;
                (done.rows_affected(), "the farm".to_owned())
            }
            Change::Paused { scope: Scope::Tenant(tenant), paused } => {
                let text = "INSERT INTO tenants (id, spec, paused) VALUES ($1, '{}', $2) \
                            ON CONFLICT (id) DO UPDATE SET paused = excluded.paused";
                let done = query(text).bind(tenant.to_string()).bind(i64::from(*paused)).execute(tx).await?;
                (done.rows_affected(), format!("tenant {tenant}"))
            }
            Change::Paused { scope: Scope::Batch(batch), paused } => {
                let text = "UPDATE submissions SET paused = $2 WHERE id = $1 AND reply IS NOT NULL";
                let done = query(text).bind(batch.to_string()).bind(i64::from(*paused)).execute(tx).await?;
                (done.rows_affected(), format!("batch {batch}"))
            }
            Change::Paused { scope: Scope::Job(job), paused } => {
                let text = "UPDATE jobs SET paused = $2 WHERE id = $1 AND state IN ('queued', 'running')";
                let done = query(text).bind(job.to_string()).bind(i64::from(*paused)).execute(tx).await?;
                (done.rows_affected(), format!("job {job}"))
            }
            Change::Drained { node, drained } => {
                let text = match drained {
                    true => "INSERT INTO drained (node) VALUES ($1) ON CONFLICT (node) DO NOTHING",
                    false => "DELETE FROM drained WHERE node = $1",
                };
                query(text).bind(text_of(&node.0)).execute(tx).await?;
                return Ok(());
            }
            Change::Tenant { tenant, spec } => {
                let text = "INSERT INTO tenants (id, spec) VALUES ($1, $2) \
                            ON CONFLICT (id) DO UPDATE SET spec = excluded.spec";
                let done = query(text).bind(tenant.to_string()).bind(to_json(spec)?).execute(tx).await?;
                (done.rows_affected(), format!("tenant {tenant}"))
            }
            _ => return Ok(()),
        };
        match hit {
            1 => Ok(()),
            _ => Err(QueueError::Conflict(format!("{what} cannot be paused or resumed as it is"))),
        }
    }
}

fn text_of(value: &str) -> String {
    text(value).into_owned()
}

/// The values of a change, in the order of its statement's columns.
fn row(change: &Change) -> Result<Value, QueueError> {
    Ok(match change {
        Change::Started { start, node, boot, device, base } => json!([
            start.key.job.to_string(),
            start.key.attempt.0,
            start.key.epoch.0,
            text(&node.0),
            boot.to_string(),
            to_json(&start.devices)?,
            text(device),
            text(&start.model),
            text(&start.model_hash),
            start.spec_json,
            if base.is_finite() { *base } else { 0.0 },
        ]),
        Change::AttemptEnded { key, outcome, message, device_ms } => json!([
            key.job.to_string(),
            key.attempt.0,
            key.epoch.0,
            outcome.as_str(),
            message.as_deref().map(text),
            i64::try_from(*device_ms).unwrap_or(i64::MAX),
        ]),
        Change::Done { job, result_json, warnings } => {
            let accepted: Accepted =
                serde_json::from_str(result_json).map_err(|error| corrupt("the manifest of a job", error))?;
            json!([job.to_string(), result_json, to_json(warnings)?, accepted.attempt.0])
        }
        Change::Requeued { job, counts } | Change::Counted { job, counts } => {
            json!([job.to_string(), counts_json(counts)?])
        }
        Change::Failed { job, reason } => json!([job.to_string(), text(reason)]),
        Change::Cancelled { job } | Change::Retried { job } => json!([job.to_string()]),
        Change::Audit { by, action, subject, detail } => {
            json!([text(by), action, text(subject), text(detail)])
        }
        Change::Log { .. } | Change::Paused { .. } | Change::Drained { .. } | Change::Tenant { .. } => Value::Null,
    })
}

/// Most jobs never fail: they have an empty map, which nobody parses.
fn counts_json(counts: &Counts) -> Result<String, QueueError> {
    if *counts == Counts::default() { Ok("{}".to_owned()) } else { to_json(counts) }
}

/// The database's own guards say the same as ours.
pub(super) fn conflict_or(error: sqlx::Error) -> QueueError {
    match &error {
        sqlx::Error::Database(database)
            if database.is_unique_violation()
                || database.is_check_violation()
                || database.is_foreign_key_violation() =>
        {
            QueueError::Conflict(database.message().to_owned())
        }
        _ => QueueError::Database(error),
    }
}

/// Some of the jobs that a group is about, for people.
fn named(group: &[&Change]) -> String {
    const SHOWN: usize = 3;
    let jobs = group.iter().filter_map(|change| match change {
        Change::Started { start, .. } => Some(format!("job {} attempt {}", start.key.job, start.key.attempt)),
        Change::AttemptEnded { key, outcome, .. } => {
            Some(format!("job {} attempt {} {}", key.job, key.attempt, ended(*outcome)))
        }
        Change::Done { job, .. }
        | Change::Requeued { job, .. }
        | Change::Counted { job, .. }
        | Change::Failed { job, .. }
        | Change::Cancelled { job }
        | Change::Retried { job }
        | Change::Log { job, .. } => Some(format!("job {job}")),
        _ => None,
    });
    let mut shown: Vec<String> = jobs.take(SHOWN).collect();
    if group.len() > SHOWN {
        shown.push(format!("{} more", group.len() - SHOWN));
    }
    shown.join(", ")
}

fn ended(outcome: Outcome) -> &'static str {
    outcome.as_str()
}
