//! What has ended goes when it is old.

use std::time::Duration;

use farm_core::id::{AttemptNo, Epoch, JobId};
use jiff::Timestamp;
use sqlx::{Any, Transaction};

use super::super::store::{Leftover, PRUNE_ROWS, Pruned, QueueError, Retention};
use super::changes::HOUR_MS;
use super::dialect::Column::{Integer, Text};
use super::rows::{get_attempt, get_i64, get_job_id, get_optional, get_u64, json};
use super::{ROWS, SqlQueue, query};

/// Ended jobs `o` that nothing needs any more.
const OLD: &str = "jobs o WHERE o.finished < $1 AND o.clean = 1 \
     AND NOT EXISTS (SELECT 1 FROM dependencies d JOIN jobs w ON w.seq = d.job \
     WHERE d.on_job = o.seq AND w.state IN ('queued', 'running')) \
     AND NOT EXISTS (SELECT 1 FROM submission_jobs m WHERE m.job = o.seq AND m.submission IN (SELECT b.n FROM busy b))";

/// Batches with live jobs, and those that live jobs come after.
const BUSY: &str = "WITH busy AS ( \
     SELECT m.submission AS n FROM jobs w JOIN submission_jobs m ON m.job = w.seq WHERE w.state IN ('queued', 'running') \
     UNION SELECT d.on_batch FROM dependencies d JOIN jobs w ON w.seq = d.job \
     WHERE d.on_batch IS NOT NULL AND w.state IN ('queued', 'running'))";

/// Ended jobs `o` with old logs.
const LOGGED: &str = "jobs o WHERE o.finished < $1 AND EXISTS (SELECT 1 FROM job_log l WHERE l.job = o.seq)";

fn before(at: Timestamp, age: Duration) -> i64 {
    at.as_millisecond().saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX))
}

impl SqlQueue {
    pub(super) async fn read_leftovers(
        &self,
        retention: Retention,
        at: Timestamp,
        limit: u32,
    ) -> Result<Vec<Leftover>, QueueError> {
        let text = "SELECT id, attempt, accepted FROM jobs WHERE finished IS NOT NULL AND clean = 0 AND finished < $1 \
                    ORDER BY finished, seq LIMIT $2";
        let select = query(text).bind(before(at, retention.leftovers)).bind(i64::from(limit));
        let rows = select.fetch_all(&self.readers).await?;
        rows.iter()
            .map(|row| {
                Ok(Leftover {
                    job: get_job_id(row, "id")?,
                    attempts: get_attempt(row, "attempt")?,
                    accepted: get_optional(row, "accepted")?.map(AttemptNo),
                })
            })
            .collect()
    }

    /// A job that was queued again in the meantime is left alone.
    pub(super) async fn write_clean(&self, epoch: Epoch, jobs: &[JobId]) -> Result<(), QueueError> {
        let mut tx = self.begin_alone(epoch).await?;
        let v = self.dialect.rows(&[Text("id")]);
        let text =
            format!("UPDATE jobs SET clean = 1 FROM {v} AS v WHERE jobs.id = v.id AND jobs.finished IS NOT NULL");
        for chunk in jobs.chunks(ROWS) {
            let ids: Vec<[String; 1]> = chunk.iter().map(|job| [job.to_string()]).collect();
            query(text.as_str()).bind(json(&ids)?).execute(&mut *tx).await?;
        }
        Ok(tx.commit().await?)
    }

    pub(super) async fn remove_old(
        &self,
        epoch: Epoch,
        retention: Retention,
        at: Timestamp,
        dry_run: bool,
    ) -> Result<Pruned, QueueError> {
        let (jobs, logs, audit) = (before(at, retention.jobs), before(at, retention.logs), before(at, retention.audit));
        if dry_run {
            let count =
                async |text: String, cut: i64| get_u64(&query(text).bind(cut).fetch_one(&self.readers).await?, "n");
            let lines = format!("SELECT COUNT(*) AS n FROM job_log l WHERE l.job IN (SELECT o.seq FROM {LOGGED})");
            return Ok(Pruned {
                logs: count(lines, logs).await?,
                jobs: count(format!("{BUSY} SELECT COUNT(*) AS n FROM {OLD}"), jobs).await?,
                audit: count("SELECT COUNT(*) AS n FROM audit WHERE at < $1".to_owned(), audit).await?,
            });
        }
        // Looked for beside the writer, since it may take a while; what matters of it is checked again below.
        let text = format!("{BUSY} SELECT o.seq FROM {OLD} ORDER BY o.finished, o.seq LIMIT $2");
        let rows = query(text).bind(jobs).bind(PRUNE_ROWS).fetch_all(&self.readers).await?;
        let found = rows.iter().map(|row| Ok([get_i64(row, "seq")?])).collect::<Result<Vec<_>, QueueError>>()?;

        let mut tx = self.begin_alone(epoch).await?;
        let mut pruned = self.remove_jobs(&mut tx, &found).await?;
        let text =
            format!("DELETE FROM job_log WHERE job IN (SELECT o.seq FROM {LOGGED} ORDER BY o.finished LIMIT $2)");
        pruned.logs += query(text).bind(logs).bind(PRUNE_ROWS).execute(&mut *tx).await?.rows_affected();
        let text = "DELETE FROM audit WHERE n IN (SELECT a.n FROM audit a WHERE a.at < $1 ORDER BY a.n LIMIT $2)";
        pruned.audit = query(text).bind(audit).bind(PRUNE_ROWS).execute(&mut *tx).await?.rows_affected();
        // Batches of which nothing is left; hours of which every attempt is gone; labels that nobody has.
        query(
            "DELETE FROM submissions WHERE reply IS NOT NULL AND pruned = jobs AND committed < $1 \
             AND NOT EXISTS (SELECT 1 FROM dependencies d WHERE d.on_batch = submissions.n)",
        )
        .bind(jobs)
        .execute(&mut *tx)
        .await?;
        let hour = audit.div_euclid(HOUR_MS);
        query("DELETE FROM ledger WHERE hour < $1 AND pruned = attempts").bind(hour).execute(&mut *tx).await?;
        query(
            "DELETE FROM label_sets WHERE id IN (SELECT s.id FROM label_sets s WHERE s.id <> '' \
             AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.labels = s.id AND j.labels <> '') \
             AND NOT EXISTS (SELECT 1 FROM ledger l WHERE l.labels = s.id AND l.labels <> '') LIMIT $1)",
        )
        .bind(PRUNE_ROWS)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(pruned)
    }

    /// Jobs, and all that is theirs alone. What their attempts used stays in the ledger.
    async fn remove_jobs(&self, tx: &mut Transaction<'static, Any>, found: &[[i64; 1]]) -> Result<Pruned, QueueError> {
        let v = self.dialect.rows(&[Integer("seq")]);
        let still = format!(
            "SELECT o.seq FROM {v} AS v JOIN jobs o ON o.seq = v.seq WHERE o.finished IS NOT NULL AND o.clean = 1 \
             AND NOT EXISTS (SELECT 1 FROM dependencies d JOIN jobs w ON w.seq = d.job \
             WHERE d.on_job = o.seq AND w.state IN ('queued', 'running')) \
             AND NOT EXISTS (SELECT 1 FROM submission_jobs m JOIN dependencies d ON d.on_batch = m.submission \
             JOIN jobs w ON w.seq = d.job WHERE m.job = o.seq AND w.state IN ('queued', 'running'))"
        );
        let rows = query(still).bind(json(found)?).fetch_all(&mut **tx).await?;
        let seqs = rows.iter().map(|row| Ok([get_i64(row, "seq")?])).collect::<Result<Vec<_>, QueueError>>()?;
        if seqs.is_empty() {
            return Ok(Pruned::default());
        }
        let gone = format!("(SELECT v.seq FROM {v} AS v)");
        let statements = [
            format!("DELETE FROM job_log WHERE job IN {gone}"),
            format!(
                "UPDATE ledger SET pruned = ledger.pruned + s.attempts, pruned_ms = ledger.pruned_ms + s.device_ms FROM ( \
                 SELECT a.ended / {HOUR_MS} AS hour, a.tenant, a.device, j.labels, COUNT(*) AS attempts, \
                 CAST(SUM(a.device_ms) AS BIGINT) AS device_ms FROM jobs j JOIN attempts a ON a.job = j.seq \
                 WHERE j.seq IN {gone} GROUP BY a.ended / {HOUR_MS}, a.tenant, a.device, j.labels) AS s \
                 WHERE ledger.hour = s.hour AND ledger.tenant = s.tenant AND ledger.device = s.device \
                 AND ledger.labels = s.labels"
            ),
            format!(
                "UPDATE submissions SET pruned = submissions.pruned + s.jobs FROM ( \
                 SELECT m.submission, COUNT(*) AS jobs FROM submission_jobs m WHERE m.job IN {gone} GROUP BY m.submission) \
                 AS s WHERE submissions.n = s.submission"
            ),
            format!("DELETE FROM dependencies WHERE job IN {gone}"),
            format!("DELETE FROM dependencies WHERE on_job IN {gone}"),
            format!("DELETE FROM attempts WHERE job IN {gone}"),
            format!("DELETE FROM submission_jobs WHERE job IN {gone}"),
            format!("DELETE FROM jobs WHERE seq IN {gone}"),
        ];
        let part = json(&seqs)?;
        let mut hit = Vec::with_capacity(statements.len());
        for statement in statements {
            hit.push(query(statement).bind(part.clone()).execute(&mut **tx).await?.rows_affected());
        }
        Ok(Pruned { logs: hit[0], jobs: hit[hit.len() - 1], audit: 0 })
    }
}
