//! The commit of a submission: all of its lines or none.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use farm_core::api::SubmissionReply;
use farm_core::id::{AttemptNo, Epoch, JobId, TenantId};
use farm_core::job::state::JobState;
use jiff::Timestamp;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::{Any, Transaction};
use uuid::Uuid;

use super::super::store::{Batch, Committed, NewDependency, NewJob, QueueError};
use super::changes::{Rows, conflict_or};
use super::dialect::Column::{Integer, Text};
use super::dialect::{Column, Dialect};
use super::load::read_jobs;
use super::rows::{
    ask_json, get_i64, get_job_id, get_optional_json, get_state, get_text, json as to_json, tail_of, text,
};
use super::{ROWS, SqlQueue, query};
use crate::core::events::{Ask, Counts, Dependency, LiveJob, SavedBatch, Submitted};

/// A line of the submission, once it is a job.
#[derive(Clone, Copy)]
struct Line {
    seq: i64,
    job: JobId,
    /// It was done before.
    done: bool,
    fate: Fate,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    New,
    /// It had failed or was cancelled.
    Requeued,
    /// An earlier submission's, whatever its state.
    Existing,
}

/// What lines come after, outside the submission.
#[derive(Clone, Copy)]
struct Target {
    on: Dependency,
    /// Number of the job or of the batch.
    n: i64,
    done: bool,
}

/// One commit under way.
struct Commit {
    tx: Transaction<'static, Any>,
    dialect: Dialect,
    at: i64,
    /// Number of the submission.
    n: i64,
}

impl SqlQueue {
    pub(super) async fn write_batch(&self, epoch: Epoch, batch: Batch, at: Timestamp) -> Result<Committed, QueueError> {
        let Batch { submission, tenant, max_queued, max_failures, jobs, mut reply } = batch;
        let mut tx = self.begin_in(epoch).await?;
        if let Some(wait) = self.dialect.one_at_a_time() {
            // Their lines are numbered, and may be the same jobs.
            query(wait).fetch_one(&mut *tx).await?;
        }
        let open = format!("SELECT n, reply FROM submissions WHERE id = $1{}", self.dialect.for_update());
        let row = query(open)
            .bind(submission.to_string())
            .fetch_optional(&mut *tx)
            .await?
            .ok_or_else(|| QueueError::Conflict(format!("there is no submission {submission}")))?;
        if let Some(reply) = get_optional_json(&row, "reply")? {
            return Ok(Committed { reply, submitted: Submitted::default() });
        }
        let mut commit = Commit { tx, dialect: self.dialect, at: at.as_millisecond(), n: get_i64(&row, "n")? };
        commit.check_tenant(&tenant).await?;
        let targets = commit.targets(&jobs).await?;
        let (lines, joined) = commit.write_lines(&tenant, &jobs).await?;
        let requeued: Vec<i64> = lines.iter().filter(|line| line.fate == Fate::Requeued).map(|line| line.seq).collect();
        commit.write_dependencies(&jobs, &lines, &requeued, &targets).await?;
        let count = |fate| lines.iter().filter(|line| line.fate == fate).count() as u64;
        (reply.new, reply.requeued, reply.existing) = (count(Fate::New), count(Fate::Requeued), count(Fate::Existing));
        commit.check_quota(&tenant, max_queued, reply.new + reply.requeued).await?;
        commit.finish(&reply, max_failures, lines.len() as i64).await?;

        let mut queued: Vec<LiveJob> = Vec::new();
        for chunk in requeued.chunks(ROWS) {
            let again = read_jobs(&mut commit.tx, &self.which(chunk)?).await?;
            queued.extend(again.into_iter().map(|(_, job)| job));
        }
        let new = jobs.into_iter().enumerate().filter(|(i, _)| lines[*i].fate == Fate::New);
        queued.extend(new.map(|(i, job)| LiveJob {
            job: job.job,
            seq: lines[i].seq.cast_unsigned(),
            priority: job.priority,
            model: job.model.map(|model| text(&model).into_owned()),
            tenant: tenant.clone(),
            batches: vec![submission],
            ask: Ask::of(&job.request),
            require: job.request.require,
            after: open_dependencies(&job.after, &lines, &targets),
            paused: false,
            submitted_ms: commit.at,
            attempt: AttemptNo(0),
            counts: Counts::default(),
            running: None,
        }));
        queued.sort_by_key(|job| job.seq);
        commit.tx.commit().await?;
        let batch = SavedBatch { submission, max_failures, failed: 0, paused: false };
        Ok(Committed { reply, submitted: Submitted { batch: Some(batch), queued, joined } })
    }
}

/// Of what a line comes after: what is not done, each once.
fn open_dependencies(after: &[NewDependency], lines: &[Line], targets: &HashMap<Uuid, Target>) -> Vec<Dependency> {
    let mut open = Vec::new();
    for dependency in after {
        let (on, done) = match dependency {
            NewDependency::Line(i) => match lines.get(*i) {
                Some(line) => (Dependency::Job(line.job), line.done),
                None => continue,
            },
            NewDependency::Id(id) => match targets.get(id) {
                Some(target) => (target.on, target.done),
                None => continue,
            },
        };
        if !done && !open.contains(&on) {
            open.push(on);
        }
    }
    open
}

impl Commit {
    async fn check_tenant(&mut self, tenant: &TenantId) -> Result<(), QueueError> {
        if tenant.as_str() == TenantId::DEFAULT {
            return Ok(());
        }
        let text = "SELECT id FROM tenants WHERE id = $1";
        match query(text).bind(tenant.to_string()).fetch_optional(&mut *self.tx).await? {
            Some(_) => Ok(()),
            None => Err(QueueError::Refused(format!(
                "there is no tenant {tenant}; make it with `farmctl quota {tenant} --share 1`, or submit for another with --tenant"
            ))),
        }
    }

    async fn check_quota(&mut self, tenant: &TenantId, most: Option<u64>, added: u64) -> Result<(), QueueError> {
        let Some(most) = most else { return Ok(()) };
        let text = "SELECT COUNT(*) AS live FROM jobs WHERE tenant = $1 AND state IN ('queued', 'running')";
        let row = query(text).bind(tenant.to_string()).fetch_one(&mut *self.tx).await?;
        let live = get_i64(&row, "live")?.cast_unsigned();
        if live <= most || added == 0 {
            return Ok(());
        }
        let before = live - added;
        Err(QueueError::Refused(format!(
            "tenant {tenant} may have {most} jobs that wait or run, has {before}, and these would be {added} more; \
             wait for some of them, or submit fewer"
        )))
    }

    /// The jobs and batches of the farm that lines come after.
    async fn targets(&mut self, jobs: &[NewJob]) -> Result<HashMap<Uuid, Target>, QueueError> {
        let ids: BTreeSet<Uuid> = jobs
            .iter()
            .flat_map(|job| &job.after)
            .filter_map(|after| match after {
                NewDependency::Id(id) => Some(*id),
                NewDependency::Line(_) => None,
            })
            .collect();
        let mut targets = HashMap::new();
        let v = self.dialect.rows(&[Text("id")]);
        let find = format!("SELECT j.id, j.seq, j.state FROM {v} AS v JOIN jobs j ON j.id = v.id");
        let ids: Vec<Uuid> = ids.into_iter().collect();
        for chunk in ids.chunks(ROWS) {
            let names: Vec<[String; 1]> = chunk.iter().map(|id| [id.simple().to_string()]).collect();
            for row in query(find.as_str()).bind(to_json(&names)?).fetch_all(&mut *self.tx).await? {
                let (job, state) = (get_job_id(&row, "id")?, get_state(&row, "state")?);
                let why = match state {
                    JobState::Failed => Some("has failed"),
                    JobState::Cancelled => Some("was cancelled"),
                    JobState::Queued | JobState::Running | JobState::Done => None,
                };
                if let Some(why) = why {
                    return Err(QueueError::Refused(format!(
                        "job {job} that comes first {why}; retry it, or leave it out of after"
                    )));
                }
                let done = state == JobState::Done;
                targets.insert(job.0, Target { on: Dependency::Job(job), n: get_i64(&row, "seq")?, done });
            }
        }
        let others: Vec<Uuid> = ids.into_iter().filter(|id| !targets.contains_key(id)).collect();
        for id in others {
            targets.insert(id, self.batch_target(id).await?);
        }
        Ok(targets)
    }

    async fn batch_target(&mut self, id: Uuid) -> Result<Target, QueueError> {
        let find = "SELECT n FROM submissions WHERE id = $1 AND reply IS NOT NULL";
        let row = query(find).bind(id.simple().to_string()).fetch_optional(&mut *self.tx).await?;
        let Some(row) = row else {
            return Err(QueueError::Refused(format!(
                "there is no job or batch {} to come after; it may be long over, then leave it out",
                id.simple()
            )));
        };
        let n = get_i64(&row, "n")?;
        let text = "SELECT j.state, COUNT(*) AS jobs FROM submission_jobs m JOIN jobs j ON j.seq = m.job \
                    WHERE m.submission = $1 GROUP BY j.state";
        let rows = query(text).bind(n).fetch_all(&mut *self.tx).await?;
        let counts: BTreeMap<JobState, i64> = rows
            .iter()
            .map(|row| Ok((get_state(row, "state")?, get_i64(row, "jobs")?)))
            .collect::<Result<_, QueueError>>()?;
        let batch = farm_core::id::SubmissionId(id);
        if let Some(failed) = counts.get(&JobState::Failed) {
            return Err(QueueError::Refused(format!(
                "{failed} jobs of batch {batch} that comes first have failed; retry them, or leave it out of after"
            )));
        }
        if counts.len() == 1 && counts.contains_key(&JobState::Cancelled) {
            return Err(QueueError::Refused(format!(
                "batch {batch} that comes first was cancelled; leave it out of after"
            )));
        }
        let live = counts.contains_key(&JobState::Queued) || counts.contains_key(&JobState::Running);
        Ok(Target { on: Dependency::Batch(batch), n, done: !live })
    }

    /// Makes jobs of the lines, or finds those that they are. Also gives the earlier ones that are queued or running.
    async fn write_lines(&mut self, tenant: &TenantId, jobs: &[NewJob]) -> Result<(Vec<Line>, Vec<JobId>), QueueError> {
        let row = query("SELECT COALESCE(MAX(seq), 0) AS last FROM jobs").fetch_one(&mut *self.tx).await?;
        let mut next = get_i64(&row, "last")? + 1;
        let mut lines: Vec<Line> = Vec::with_capacity(jobs.len());
        let mut joined = Vec::new();
        let mut label_sets: HashSet<String> = HashSet::from([String::new()]);
        for chunk in jobs.chunks(ROWS) {
            let known = self.known(chunk).await?;
            let (mut new, mut labels, mut again) = (Rows::new(), Rows::new(), Rows::new());
            let mut members = Rows::new();
            for job in chunk {
                let line = match known.get(&key_text(&job.key)) {
                    None => {
                        let set = label_set(&job.request.labels)?;
                        if !label_sets.contains(&set) {
                            labels.push(&json!([set, to_json(&job.request.labels)?]));
                            label_sets.insert(set.clone());
                        }
                        new.push(&new_row(next, job, &set)?);
                        next += 1;
                        Line { seq: next - 1, job: job.job, done: false, fate: Fate::New }
                    }
                    Some((seq, id, state)) => {
                        let fate = match state {
                            JobState::Failed | JobState::Cancelled => Fate::Requeued,
                            JobState::Queued | JobState::Running | JobState::Done => Fate::Existing,
                        };
                        if fate == Fate::Requeued {
                            again.push(&json!([seq, job.priority]));
                        } else if *state != JobState::Done {
                            joined.push(*id);
                        }
                        Line { seq: *seq, job: *id, done: *state == JobState::Done, fate }
                    }
                };
                members.push(&json!([line.seq]));
                lines.push(line);
            }
            self.insert_labels(&labels).await?;
            self.insert_jobs(&new, tenant).await?;
            self.requeue(&again, tenant).await?;
            self.insert_members(&members).await?;
        }
        Ok((lines, joined))
    }

    /// Which of these lines are jobs already, by key.
    async fn known(&mut self, jobs: &[NewJob]) -> Result<HashMap<String, (i64, JobId, JobState)>, QueueError> {
        let v = self.dialect.rows(&[Text("key")]);
        let text = format!("SELECT j.key, j.seq, j.id, j.state FROM {v} AS v JOIN jobs j ON j.key = v.key");
        let keys: Vec<[String; 1]> = jobs.iter().map(|job| [key_text(&job.key)]).collect();
        let rows = query(text).bind(to_json(&keys)?).fetch_all(&mut *self.tx).await?;
        rows.iter()
            .map(|row| {
                let known = (get_i64(row, "seq")?, get_job_id(row, "id")?, get_state(row, "state")?);
                Ok((get_text(row, "key")?, known))
            })
            .collect()
    }

    async fn insert_labels(&mut self, rows: &Rows) -> Result<(), QueueError> {
        let v = self.dialect.rows(&[Text("id"), Text("labels")]);
        let text = format!(
            "INSERT INTO label_sets (id, labels) SELECT v.id, v.labels FROM {v} AS v WHERE 1 = 1 \
             ON CONFLICT (id) DO NOTHING"
        );
        self.run(&text, rows, Vec::new()).await
    }

    async fn insert_jobs(&mut self, rows: &Rows, tenant: &TenantId) -> Result<(), QueueError> {
        const COLUMNS: [Column; 11] = [
            Integer("seq"),
            Text("id"),
            Text("tail"),
            Text("key"),
            Text("request"),
            Text("ask"),
            Text("require"),
            Text("labels"),
            Integer("seed"),
            Integer("priority"),
            Text("model"),
        ];
        let text = format!(
            "INSERT INTO jobs (seq, id, tail, key, request, ask, require, labels, seed, priority, model, state, submitted, tenant) \
             SELECT v.seq, v.id, v.tail, v.key, v.request, v.ask, v.require, v.labels, v.seed, v.priority, v.model, 'queued', \
             $2, $3 FROM {} AS v",
            self.dialect.rows(&COLUMNS)
        );
        self.run(&text, rows, vec![Value::from(self.at), Value::from(tenant.as_str())]).await
    }

    /// Queues failed and cancelled jobs again, with the priority and on the account of this submission. They keep their
    /// seed and their place.
    async fn requeue(&mut self, rows: &Rows, tenant: &TenantId) -> Result<(), QueueError> {
        let v = self.dialect.rows(&[Integer("seq"), Integer("priority")]);
        let text = format!(
            "UPDATE jobs SET state = 'queued', reason = NULL, finished = NULL, counts = '{{}}', clean = 0, \
             priority = v.priority, tenant = $2 FROM {v} AS v WHERE jobs.seq = v.seq"
        );
        self.run(&text, rows, vec![Value::from(tenant.as_str())]).await
    }

    async fn insert_members(&mut self, rows: &Rows) -> Result<(), QueueError> {
        let v = self.dialect.rows(&[Integer("job")]);
        let text = format!("INSERT INTO submission_jobs (submission, job) SELECT $2, v.job FROM {v} AS v");
        self.run(&text, rows, vec![Value::from(self.n)]).await
    }

    /// New jobs and those that are queued again come after what their lines say now; others keep what they have.
    async fn write_dependencies(
        &mut self,
        jobs: &[NewJob],
        lines: &[Line],
        requeued: &[i64],
        targets: &HashMap<Uuid, Target>,
    ) -> Result<(), QueueError> {
        let mut rows = Rows::new();
        let mut closing = false;
        for (job, line) in jobs.iter().zip(lines).filter(|(_, line)| line.fate != Fate::Existing) {
            let mut seen = BTreeSet::new();
            for dependency in &job.after {
                let (on_job, on_batch) = match dependency {
                    NewDependency::Line(i) => match lines.get(*i) {
                        Some(other) => (Some(other.seq), None),
                        None => return Err(QueueError::Conflict(format!("there is no line {i} to come after"))),
                    },
                    NewDependency::Id(id) => match targets.get(id).map(|target| (target.on, target.n)) {
                        Some((Dependency::Job(_), n)) => (Some(n), None),
                        Some((Dependency::Batch(_), n)) => (None, Some(n)),
                        None => continue,
                    },
                };
                if seen.insert((on_job, on_batch)) {
                    rows.push(&json!([line.seq, seen.len(), on_job, on_batch]));
                    closing |= line.fate == Fate::Requeued;
                }
            }
        }
        let mut again = Rows::new();
        requeued.iter().for_each(|seq| again.push(&json!([seq])));
        let v = self.dialect.rows(&[Integer("job")]);
        let text = format!("DELETE FROM dependencies WHERE job IN (SELECT v.job FROM {v} AS v)");
        self.run(&text, &again, Vec::new()).await?;
        let v = self.dialect.rows(&[Integer("job"), Integer("place"), Integer("on_job"), Integer("on_batch")]);
        let text = format!(
            "INSERT INTO dependencies (job, place, on_job, on_batch) \
             SELECT v.job, v.place, v.on_job, v.on_batch FROM {v} AS v"
        );
        self.run(&text, &rows, Vec::new()).await?;
        if closing { self.check_cycles(&again).await } else { Ok(()) }
    }

    /// New jobs are in nobody's way, but one that is queued again may be what others wait for.
    async fn check_cycles(&mut self, requeued: &Rows) -> Result<(), QueueError> {
        let v = self.dialect.rows(&[Integer("job")]);
        let text = format!(
            "WITH RECURSIVE reach (origin, job) AS ( \
             SELECT v.job, v.job FROM {v} AS v UNION \
             SELECT r.origin, COALESCE(d.on_job, m.job) FROM reach r JOIN dependencies d ON d.job = r.job \
             LEFT JOIN submission_jobs m ON m.submission = d.on_batch) \
             SELECT j.id FROM reach r JOIN dependencies d ON d.job = r.job \
             LEFT JOIN submission_jobs m ON m.submission = d.on_batch \
             JOIN jobs j ON j.seq = r.origin WHERE COALESCE(d.on_job, m.job) = r.origin LIMIT 1"
        );
        for (part, _) in requeued.parts() {
            if let Some(row) = query(text.as_str()).bind(part).fetch_optional(&mut *self.tx).await? {
                return Err(QueueError::Refused(format!(
                    "job {} would come after itself; leave out what it is to come after",
                    get_job_id(&row, "id")?
                )));
            }
        }
        Ok(())
    }

    async fn finish(
        &mut self,
        reply: &SubmissionReply,
        max_failures: Option<u32>,
        jobs: i64,
    ) -> Result<(), QueueError> {
        query("DELETE FROM submission_pages WHERE submission = $1").bind(self.n).execute(&mut *self.tx).await?;
        query("UPDATE submissions SET reply = $2, committed = $3, jobs = $4, max_failures = $5 WHERE n = $1")
            .bind(self.n)
            .bind(to_json(reply)?)
            .bind(self.at)
            .bind(jobs)
            .bind(max_failures.map(i64::from))
            .execute(&mut *self.tx)
            .await?;
        Ok(())
    }

    /// Runs a statement for all rows; `more` are its parameters from `$2` on.
    async fn run(&mut self, text: &str, rows: &Rows, more: Vec<Value>) -> Result<(), QueueError> {
        for (part, _) in rows.parts() {
            let mut statement = query(text).bind(part);
            for value in &more {
                statement = match value {
                    Value::Number(number) => statement.bind(number.as_i64()),
                    other => statement.bind(other.as_str().map(str::to_owned)),
                };
            }
            statement.execute(&mut *self.tx).await.map_err(conflict_or)?;
        }
        Ok(())
    }
}

fn key_text(key: &[u8; 32]) -> String {
    use std::fmt::Write;
    key.iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The name of a set of labels; empty for no labels.
fn label_set(labels: &BTreeMap<String, String>) -> Result<String, QueueError> {
    if labels.is_empty() {
        return Ok(String::new());
    }
    let digest: [u8; 32] = Sha256::digest(to_json(labels)?).into();
    Ok(key_text(&digest)[..32].to_owned())
}

fn new_row(seq: i64, job: &NewJob, labels: &str) -> Result<Value, QueueError> {
    let id = job.job.to_string();
    Ok(json!([
        seq,
        id,
        tail_of(&id),
        key_text(&job.key),
        to_json(&job.request)?,
        ask_json(&Ask::of(&job.request))?,
        to_json(&job.request.require)?,
        labels,
        job.seed.cast_signed(),
        job.priority,
        job.model.as_deref().map(text),
    ]))
}
