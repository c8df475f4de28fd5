//! What a starting scheduler reads, and the jobs as the core keeps them.

use std::collections::{BTreeSet, HashMap, HashSet};

use farm_core::id::{AttemptKey, Epoch, JobId, NodeId, SubmissionId, TenantId};
use farm_core::job::state::JobState;
use futures::TryStreamExt;
use sqlx::any::AnyRow;
use sqlx::query::Query;
use sqlx::{Any, Transaction};

use super::super::store::QueueError;
use super::rows::{
    corrupt, get_ask, get_attempt, get_boot, get_flag, get_i32, get_i64, get_job_id, get_json, get_map, get_optional,
    get_optional_i64, get_optional_text, get_seed, get_state, get_submission_id, get_tenant, get_text, get_u32,
    get_u64, json,
};
use super::{ROWS, SqlQueue, query};
use crate::core::events::{
    Clip, Dependency, LiveAttempt, LiveJob, LoadedRequest, MEASURED, Measured, Saved, SavedBatch, SavedTenant,
    SavedUsage,
};

const LIVE: &str = "j.state IN ('queued', 'running')";

/// Which jobs to read: a condition on `jobs j`, and its parameter `$1`.
#[derive(Clone)]
pub(super) struct Which {
    condition: String,
    value: Option<String>,
}

impl Which {
    pub fn live() -> Self {
        Self { condition: LIVE.to_owned(), value: None }
    }

    pub fn job(job: JobId) -> Self {
        Self { condition: "j.id = $1".to_owned(), value: Some(job.to_string()) }
    }

    fn query(&self, text: String) -> Query<'static, Any, sqlx::any::AnyArguments> {
        match &self.value {
            Some(value) => query(text).bind(value.clone()),
            None => query(text),
        }
    }
}

impl SqlQueue {
    /// These jobs, by their numbers.
    pub(super) fn which(&self, seqs: &[i64]) -> Result<Which, QueueError> {
        let rows = seqs.iter().map(|seq| [seq]).collect::<Vec<_>>();
        let v = self.dialect.rows(&[super::dialect::Column::Integer("seq")]);
        Ok(Which { condition: format!("j.seq IN (SELECT v.seq FROM {v} AS v)"), value: Some(json(&rows)?) })
    }

    pub(super) async fn read_all(&self, since_hour: i64) -> Result<Saved, QueueError> {
        let mut tx = self.begin_read().await?;
        let jobs = read_jobs(&mut tx, &Which::live()).await?;
        let saved = Saved {
            tenants: read_tenants(&mut tx).await?,
            batches: read_live_batches(&mut tx).await?,
            jobs: jobs.into_iter().map(|(_, job)| job).collect(),
            drained: {
                let rows = query("SELECT node FROM drained ORDER BY node").fetch_all(&mut *tx).await?;
                rows.iter().map(|row| get_text(row, "node").map(NodeId)).collect::<Result<_, _>>()?
            },
            paused: get_flag(&query("SELECT paused FROM farm").fetch_one(&mut *tx).await?, "paused")?,
            usage: read_usage(&mut tx, since_hour).await?,
            measured: read_measured(&mut tx).await?,
        };
        tx.rollback().await?;
        Ok(saved)
    }

    pub(super) async fn read_live_job(&self, job: JobId) -> Result<Option<(JobState, LiveJob)>, QueueError> {
        let mut tx = self.begin_read().await?;
        let found = read_jobs(&mut tx, &Which::job(job)).await?.pop();
        tx.rollback().await?;
        Ok(found)
    }

    pub(super) async fn read_requests(&self, jobs: &[JobId]) -> Result<Vec<LoadedRequest>, QueueError> {
        let v = self.dialect.rows(&[super::dialect::Column::Text("id")]);
        let text = format!("SELECT j.id, j.request, j.seed FROM {v} AS v JOIN jobs j ON j.id = v.id");
        let mut loaded = Vec::with_capacity(jobs.len());
        for chunk in jobs.chunks(ROWS) {
            let ids: Vec<[String; 1]> = chunk.iter().map(|job| [job.to_string()]).collect();
            for row in query(text.as_str()).bind(json(&ids)?).fetch_all(&self.readers).await? {
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
}

/// Jobs in order of submission. Row by row, because a row takes several times the memory of what is kept of it; and what most
/// jobs have none of is read apart.
pub(super) async fn read_jobs(
    tx: &mut Transaction<'static, Any>,
    which: &Which,
) -> Result<Vec<(JobState, LiveJob)>, QueueError> {
    let condition = &which.condition;
    let mut jobs: Vec<(JobState, LiveJob)> = Vec::new();
    let mut tenants: HashSet<TenantId> = HashSet::new();
    let text = format!(
        "SELECT j.seq, j.id, j.priority, j.model, j.tenant, j.ask, j.require, j.paused, j.submitted, j.attempt, j.counts, \
         j.state FROM jobs j WHERE {condition} ORDER BY j.seq"
    );
    let mut rows = which.query(text).fetch(&mut **tx);
    while let Some(row) = rows.try_next().await? {
        jobs.push(job(&row, &mut tenants)?);
    }
    drop(rows);
    let text = format!(
        "SELECT a.job, a.attempt, a.epoch, a.node, a.boot, a.devices, a.started, a.base, a.model, j.model_hash, j.spec \
         FROM attempts a JOIN jobs j ON j.seq = a.job WHERE a.outcome = 'running' AND {condition} ORDER BY a.job"
    );
    let mut cursor = Cursor::new(&mut jobs);
    let mut rows = which.query(text).fetch(&mut **tx);
    while let Some(row) = rows.try_next().await? {
        if let Some((_, job)) = cursor.seek(get_u64(&row, "job")?) {
            job.running = Some(Box::new(attempt(&row, job.job)?));
        }
    }
    drop(rows);
    read_memberships(tx, which, &mut jobs).await?;
    read_dependencies(tx, which, &mut jobs).await?;
    let torn = jobs.iter().find(|(state, job)| (*state == JobState::Running) != job.running.is_some());
    match torn {
        None => Ok(jobs),
        Some((state, job)) => {
            Err(corrupt(&format!("job {}", job.job), format!("is {} and has another attempt", state.as_str())))
        }
    }
}

/// Walks along jobs, which are in order, as rows that are in the same order come.
struct Cursor<'a> {
    jobs: &'a mut [(JobState, LiveJob)],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn new(jobs: &'a mut [(JobState, LiveJob)]) -> Self {
        Self { jobs, at: 0 }
    }

    fn seek(&mut self, seq: u64) -> Option<&mut (JobState, LiveJob)> {
        while self.jobs.get(self.at).is_some_and(|(_, job)| job.seq < seq) {
            self.at += 1;
        }
        self.jobs.get_mut(self.at).filter(|(_, job)| job.seq == seq)
    }
}

async fn read_memberships(
    tx: &mut Transaction<'static, Any>,
    which: &Which,
    jobs: &mut [(JobState, LiveJob)],
) -> Result<(), QueueError> {
    let condition = &which.condition;
    let members = format!("submission_jobs m JOIN jobs j ON j.seq = m.job WHERE {condition}");
    let text = format!("SELECT s.n, s.id FROM submissions s WHERE s.n IN (SELECT m.submission FROM {members})");
    let rows = which.query(text).fetch_all(&mut **tx).await?;
    let ids: HashMap<i64, SubmissionId> = rows
        .iter()
        .map(|row| Ok((get_i64(row, "n")?, get_submission_id(row, "id")?)))
        .collect::<Result<_, QueueError>>()?;
    let text = format!("SELECT m.job, m.submission FROM {members} ORDER BY m.job, m.submission");
    let mut cursor = Cursor::new(jobs);
    let mut rows = which.query(text).fetch(&mut **tx);
    while let Some(row) = rows.try_next().await? {
        let submission = ids.get(&get_i64(&row, "submission")?);
        if let (Some((_, job)), Some(submission)) = (cursor.seek(get_u64(&row, "job")?), submission) {
            job.batches.push(*submission);
        }
    }
    Ok(())
}

/// A batch that has failed or live jobs is not done.
async fn read_dependencies(
    tx: &mut Transaction<'static, Any>,
    which: &Which,
    jobs: &mut [(JobState, LiveJob)],
) -> Result<(), QueueError> {
    let condition = &which.condition;
    let text = format!(
        "SELECT d.job, d.on_batch, o.id AS on_job FROM dependencies d JOIN jobs j ON j.seq = d.job \
         LEFT JOIN jobs o ON o.seq = d.on_job WHERE {condition} AND (o.seq IS NULL OR o.state <> 'done') \
         ORDER BY d.job, d.place"
    );
    let mut found = Vec::new();
    let mut batches = BTreeSet::new();
    let mut rows = which.query(text).fetch(&mut **tx);
    while let Some(row) = rows.try_next().await? {
        let on_batch = get_optional_i64(&row, "on_batch")?;
        let on_job = get_optional_text(&row, "on_job")?;
        batches.extend(on_batch);
        found.push((get_u64(&row, "job")?, on_batch, on_job));
    }
    drop(rows);
    let mut open: HashMap<i64, SubmissionId> = HashMap::new();
    for batch in batches {
        let text = "SELECT s.id FROM submissions s WHERE s.n = $1 AND EXISTS (SELECT 1 FROM submission_jobs m \
                    JOIN jobs b ON b.seq = m.job WHERE m.submission = s.n AND b.state IN ('queued', 'running', 'failed'))";
        if let Some(row) = query(text).bind(batch).fetch_optional(&mut **tx).await? {
            open.insert(batch, get_submission_id(&row, "id")?);
        }
    }
    let mut cursor = Cursor::new(jobs);
    for (seq, on_batch, on_job) in found {
        let Some((_, job)) = cursor.seek(seq) else { continue };
        let on_job = on_job.map(|id| id.parse().map_err(|error| corrupt("job id", error))).transpose()?;
        let dependency = match (on_job, on_batch) {
            (Some(id), _) => Some(Dependency::Job(id)),
            (None, Some(batch)) => open.get(&batch).map(|id| Dependency::Batch(*id)),
            (None, None) => None,
        };
        job.after.extend(dependency);
    }
    Ok(())
}

fn job(row: &AnyRow, tenants: &mut HashSet<TenantId>) -> Result<(JobState, LiveJob), QueueError> {
    // One copy of each name.
    let tenant = get_tenant(row, "tenant")?;
    let tenant = match tenants.get(&tenant) {
        Some(known) => known.clone(),
        None => {
            tenants.insert(tenant.clone());
            tenant
        }
    };
    let live = LiveJob {
        job: get_job_id(row, "id")?,
        seq: get_u64(row, "seq")?,
        priority: get_i32(row, "priority")?,
        model: get_optional_text(row, "model")?,
        tenant,
        batches: Vec::new(),
        ask: get_ask(row)?,
        require: get_map(row, "require")?,
        after: Vec::new(),
        paused: get_flag(row, "paused")?,
        submitted_ms: get_i64(row, "submitted")?,
        attempt: get_attempt(row, "attempt")?,
        counts: get_map(row, "counts")?,
        running: None,
    };
    Ok((get_state(row, "state")?, live))
}

fn attempt(row: &AnyRow, job: JobId) -> Result<LiveAttempt, QueueError> {
    Ok(LiveAttempt {
        key: AttemptKey { job, attempt: get_attempt(row, "attempt")?, epoch: Epoch(get_u64(row, "epoch")?) },
        node: NodeId(get_text(row, "node")?),
        boot: get_boot(row, "boot")?,
        devices: get_json(row, "devices")?,
        clip: Clip {
            model: get_text(row, "model")?,
            model_hash: get_text(row, "model_hash")?,
            spec_json: get_text(row, "spec")?,
        },
        started_ms: get_i64(row, "started")?,
        base: sqlx::Row::try_get(row, "base")?,
    })
}

async fn read_tenants(tx: &mut Transaction<'static, Any>) -> Result<Vec<SavedTenant>, QueueError> {
    let rows = query("SELECT id, spec, paused FROM tenants ORDER BY id").fetch_all(&mut **tx).await?;
    rows.iter()
        .map(|row| {
            Ok(SavedTenant {
                tenant: get_tenant(row, "id")?,
                spec: get_json(row, "spec")?,
                paused: get_flag(row, "paused")?,
            })
        })
        .collect()
}

async fn read_live_batches(tx: &mut Transaction<'static, Any>) -> Result<Vec<SavedBatch>, QueueError> {
    let text = format!(
        "SELECT s.id, s.max_failures, s.paused, CAST(SUM(CASE WHEN b.state = 'failed' THEN 1 ELSE 0 END) AS BIGINT) AS failed \
         FROM submissions s JOIN submission_jobs m ON m.submission = s.n JOIN jobs b ON b.seq = m.job \
         WHERE s.n IN (SELECT l.submission FROM jobs j JOIN submission_jobs l ON l.job = j.seq WHERE {LIVE}) \
         GROUP BY s.n, s.id, s.max_failures, s.paused ORDER BY s.n"
    );
    let rows = query(text).fetch_all(&mut **tx).await?;
    rows.iter()
        .map(|row| {
            Ok(SavedBatch {
                submission: get_submission_id(row, "id")?,
                max_failures: get_optional(row, "max_failures")?,
                failed: get_u32(row, "failed")?,
                paused: get_flag(row, "paused")?,
            })
        })
        .collect()
}

async fn read_usage(tx: &mut Transaction<'static, Any>, since_hour: i64) -> Result<Vec<SavedUsage>, QueueError> {
    let text = "SELECT tenant, hour, CAST(SUM(device_ms) AS BIGINT) AS device_ms FROM ledger WHERE hour >= $1 \
                GROUP BY tenant, hour ORDER BY hour, tenant";
    let rows = query(text).bind(since_hour).fetch_all(&mut **tx).await?;
    rows.iter()
        .map(|row| {
            Ok(SavedUsage {
                tenant: get_tenant(row, "tenant")?,
                hour: get_i64(row, "hour")?,
                device_ms: get_u64(row, "device_ms")?,
            })
        })
        .collect()
}

async fn read_measured(tx: &mut Transaction<'static, Any>) -> Result<Vec<Measured>, QueueError> {
    let text = "SELECT model, device, base, started, ended FROM attempts WHERE outcome = 'completed' \
                ORDER BY ended DESC, job DESC LIMIT $1";
    let rows = query(text).bind(MEASURED as i64).fetch_all(&mut **tx).await?;
    rows.iter()
        .rev()
        .map(|row| {
            let millis = get_i64(row, "ended")? - get_i64(row, "started")?;
            Ok(Measured {
                model: get_text(row, "model")?,
                device: get_text(row, "device")?,
                base: sqlx::Row::try_get(row, "base")?,
                seconds: millis.max(0) as f64 / 1000.0,
            })
        })
        .collect()
}
