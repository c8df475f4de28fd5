//! The queue database, in memory: rows, and the guards that a database has. A change that finds a row in another state
//! than it expects is a broken invariant here, because the core alone writes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use farm_core::api::TenantSpec;
use farm_core::id::{AttemptKey, AttemptNo, Epoch, JobId, NodeId, SubmissionId, TenantId};
use farm_core::job::spec::RenderRequest;
use farm_core::job::state::JobState;
use uuid::Uuid;

use super::Ms;
use super::plan::Trait;
use crate::core::effects::{Change, Outcome};
use crate::core::events::{
    Clip, Counts, Dependency, LiveAttempt, LiveJob, LoadedRequest, MEASURED, Measured, Saved, SavedBatch, SavedTenant,
    SavedUsage, Scope, Submitted, USAGE_HOURS,
};
use crate::core::planted::{Bug, planted};

const HOUR_MS: i64 = 3_600_000;

/// A job's row.
#[derive(Clone, Debug)]
pub struct Row {
    pub state: JobState,
    /// Its `running` and `after` are as the core would load them.
    pub live: LiveJob,
    pub request: Arc<RenderRequest>,
    pub is: Trait,
    pub reason: Option<String>,
    pub result: Option<Arc<str>>,
    pub attempts: Vec<Attempt>,
    /// All that it comes after, done or not.
    pub after: Vec<Dependency>,
    /// The core of the present reign has not been told of it yet.
    pub untold: bool,
}

#[derive(Clone, Debug)]
pub struct Attempt {
    pub key: AttemptKey,
    pub device: String,
    pub base: f64,
    pub started_ms: i64,
    pub ended: Option<(Outcome, u64)>,
}

#[derive(Clone, Debug)]
pub struct Batch {
    pub max_failures: Option<u32>,
    pub paused: bool,
    pub jobs: Vec<JobId>,
    /// All its jobs had ended once; some may have been tried again since.
    pub was_over: bool,
    /// Jobs that are not ended.
    live: usize,
}

/// A line of a submission.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Lines with equal keys are one job.
    pub key: u64,
    pub request: Arc<RenderRequest>,
    pub live: LiveJob,
    /// Lines of the same submission, before this one, that it comes after.
    pub after_lines: Vec<usize>,
    pub is: Trait,
}

/// A whole submission.
#[derive(Clone, Debug)]
pub struct NewBatch {
    pub submission: SubmissionId,
    pub max_failures: Option<u32>,
    pub jobs: Vec<NewJob>,
    pub max_queued: Option<u64>,
}

/// Why a transaction does not happen.
#[derive(Clone, Debug, PartialEq)]
pub enum Refused {
    Superseded,
    /// For whoever asked.
    User(String),
    /// The caller's picture is wrong: invariant and text.
    Broken(&'static str, String),
}

/// Who holds the leader's lock, and since when it has said nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seat {
    pub scheduler: usize,
    pub reign: u32,
    pub beat: Ms,
}

#[derive(Default)]
pub struct Store {
    pub epoch: u64,
    pub seat: Option<Seat>,
    pub rows: Vec<Row>,
    by_key: BTreeMap<(TenantId, u64), usize>,
    pub tenants: BTreeMap<TenantId, (TenantSpec, bool)>,
    pub batches: BTreeMap<SubmissionId, Batch>,
    pub drained: BTreeSet<NodeId>,
    pub paused: bool,
    pub ledger: BTreeMap<(i64, TenantId), u64>,
    measured: Vec<Measured>,
    /// Attempts that have ended.
    pub ended: u64,
    /// Rows that are not ended.
    pub live: BTreeSet<JobId>,
    pub retries: u64,
}

pub fn job_id(index: usize) -> JobId {
    JobId(Uuid::from_u128(index as u128 + 1))
}

pub fn index_of(job: JobId) -> usize {
    (job.0.as_u128() as usize).wrapping_sub(1)
}

fn broken<T>(invariant: &'static str, text: impl Into<String>) -> Result<T, Refused> {
    Err(Refused::Broken(invariant, text.into()))
}

impl Store {
    pub fn row(&self, job: JobId) -> Option<&Row> {
        self.rows.get(index_of(job))
    }

    fn check_epoch(&self, epoch: Epoch) -> Result<(), Refused> {
        if epoch.0 == self.epoch || planted(Bug::EpochNotChecked) { Ok(()) } else { Err(Refused::Superseded) }
    }

    /// A new reign.
    pub fn begin(&mut self, scheduler: usize, reign: u32, now: Ms) -> Epoch {
        self.epoch += 1;
        self.seat = Some(Seat { scheduler, reign, beat: now });
        self.rows.iter_mut().for_each(|row| row.untold = false);
        Epoch(self.epoch)
    }

    /// The leader is there; false if it is not the leader any more.
    pub fn beat(&mut self, epoch: Epoch, now: Ms) -> bool {
        match &mut self.seat {
            Some(seat) if epoch.0 == self.epoch => {
                seat.beat = now;
                true
            }
            _ => false,
        }
    }

    fn is_done(&self, dependency: &Dependency) -> bool {
        match dependency {
            Dependency::Job(job) => self.row(*job).is_some_and(|row| row.state == JobState::Done),
            Dependency::Batch(batch) => self.batches.get(batch).is_some_and(|batch| {
                batch.jobs.iter().all(|job| {
                    let state = self.row(*job).map(|row| row.state);
                    matches!(state, Some(JobState::Done | JobState::Cancelled))
                })
            }),
        }
    }

    /// It has ended, and not well: nothing that comes after it ever starts, unless somebody tries it again.
    pub fn is_hopeless(&self, dependency: &Dependency) -> bool {
        let state = |job: &JobId| self.row(*job).map(|row| row.state);
        match dependency {
            Dependency::Job(job) => !matches!(state(job), Some(JobState::Queued | JobState::Running | JobState::Done)),
            Dependency::Batch(batch) => self.batches.get(batch).is_none_or(|batch| {
                let live = batch.jobs.iter().any(|job| self.live.contains(job));
                !live && !self.is_done(dependency)
            }),
        }
    }

    /// A job as the core loads it.
    fn live_of(&self, row: &Row) -> LiveJob {
        LiveJob { after: row.after.iter().filter(|on| !self.is_done(on)).copied().collect(), ..row.live.clone() }
    }

    pub fn live_job(&self, job: JobId) -> Option<(JobState, LiveJob)> {
        self.row(job).map(|row| (row.state, self.live_of(row)))
    }

    /// All that planning needs.
    pub fn load(&mut self, wall_ms: i64) -> Saved {
        let since = wall_ms.div_euclid(HOUR_MS) - USAGE_HOURS;
        let usage = self.ledger.iter().filter(|((hour, _), _)| *hour >= since);
        let jobs: Vec<LiveJob> = self.live.iter().filter_map(|job| Some(self.live_of(self.row(*job)?))).collect();
        let with_live: BTreeSet<SubmissionId> = jobs.iter().flat_map(|job| job.batches.iter().copied()).collect();
        let failed = |batch: &Batch| {
            batch.jobs.iter().filter(|job| self.row(**job).is_some_and(|row| row.state == JobState::Failed)).count()
        };
        let batches = self.batches.iter().filter(|(id, _)| with_live.contains(id)).map(|(id, batch)| SavedBatch {
            submission: *id,
            max_failures: batch.max_failures,
            failed: failed(batch) as u32,
            paused: batch.paused,
        });
        let tenants = self.tenants.iter();
        let first = self.measured.len().saturating_sub(MEASURED);
        Saved {
            tenants: tenants
                .map(|(tenant, (spec, paused))| SavedTenant {
                    tenant: tenant.clone(),
                    spec: spec.clone(),
                    paused: *paused,
                })
                .collect(),
            batches: batches.collect(),
            drained: self.drained.iter().cloned().collect(),
            paused: self.paused,
            usage: usage
                .map(|((hour, tenant), ms)| SavedUsage { tenant: tenant.clone(), hour: *hour, device_ms: *ms })
                .collect(),
            measured: self.measured[first..].to_vec(),
            jobs,
        }
    }

    pub fn requests(&self, jobs: &[JobId]) -> Vec<LoadedRequest> {
        let request = |job: &JobId| {
            let row = self.row(*job)?;
            Some(LoadedRequest { job: *job, request: (*row.request).clone(), seed: 7 })
        };
        jobs.iter().filter_map(request).collect()
    }

    /// A submission in one transaction. Committed again, it changes nothing.
    pub fn commit(&mut self, epoch: Epoch, batch: NewBatch, wall_ms: i64) -> Result<Submitted, Refused> {
        self.check_epoch(epoch)?;
        let NewBatch { submission, max_failures, jobs, max_queued } = batch;
        if self.batches.contains_key(&submission) {
            return Ok(Submitted::default());
        }
        if jobs.iter().any(|job| job.live.after.iter().any(|on| self.is_hopeless(on))) {
            return Err(Refused::User("it comes after something that has failed".to_owned()));
        }
        if let (Some(most), Some(first)) = (max_queued, jobs.first()) {
            let tenant = &first.live.tenant;
            let live = self.live.iter().filter(|job| self.row(**job).is_some_and(|row| row.live.tenant == *tenant));
            if live.count() as u64 + jobs.len() as u64 > most {
                return Err(Refused::User("the tenant may have no more jobs".to_owned()));
            }
        }
        let mut submitted = Submitted::default();
        let (mut members, mut lines) = (Vec::new(), Vec::new());
        for new in jobs {
            let key = (new.live.tenant.clone(), new.key);
            match self.by_key.get(&key).copied() {
                None => {
                    let job = job_id(self.rows.len());
                    let seq = self.rows.len() as u64 + 1;
                    let mut after = new.live.after.clone();
                    let on_lines = new.after_lines.iter().filter_map(|line| lines.get(*line));
                    let on_lines = on_lines.map(|on| Dependency::Job(*on)).filter(|on| !self.is_hopeless(on));
                    after.extend(on_lines);
                    lines.push(job);
                    let live = LiveJob {
                        job,
                        seq,
                        submitted_ms: wall_ms,
                        batches: vec![submission],
                        running: None,
                        ..new.live
                    };
                    self.by_key.insert(key, self.rows.len());
                    self.rows.push(Row {
                        state: JobState::Queued,
                        live,
                        request: new.request,
                        is: new.is,
                        reason: None,
                        result: None,
                        attempts: Vec::new(),
                        after,
                        untold: true,
                    });
                    self.live.insert(job);
                    members.push(job);
                }
                Some(index) => {
                    lines.push(self.rows[index].live.job);
                    self.rejoin(index, submission, &mut members, &mut submitted);
                }
            }
        }
        let live = members.iter().filter(|job| self.live.contains(job)).count();
        let batch = Batch { max_failures, paused: false, jobs: members.clone(), was_over: live == 0, live };
        self.batches.insert(submission, batch);
        let fresh = members.iter().filter(|job| self.row(**job).is_some_and(|row| row.untold));
        submitted.queued = fresh.filter_map(|job| Some(self.live_of(self.row(*job)?))).collect();
        let failed = members.iter().filter(|job| self.row(**job).is_some_and(|row| row.state == JobState::Failed));
        let failed = failed.count() as u32;
        submitted.batch = Some(SavedBatch { submission, max_failures, failed, paused: false });
        Ok(submitted)
    }

    /// A line that is a job already.
    fn rejoin(&mut self, index: usize, submission: SubmissionId, members: &mut Vec<JobId>, submitted: &mut Submitted) {
        let hopeless = self.rows[index].after.iter().any(|on| self.is_hopeless(on));
        let row = &mut self.rows[index];
        let job = row.live.job;
        if members.contains(&job) {
            return;
        }
        members.push(job);
        row.live.batches.push(submission);
        match row.state {
            // Not where it comes after what has failed: it would wait for ever.
            JobState::Failed | JobState::Cancelled if !hopeless => {
                row.state = JobState::Queued;
                (row.reason, row.live.counts, row.untold) = (None, Counts::default(), true);
                self.live.insert(job);
                let batches = row.live.batches.clone();
                self.count_live(&batches, true);
            }
            JobState::Queued | JobState::Running if !row.untold => submitted.joined.push(job),
            _ => {}
        }
    }

    /// Applies all changes or none.
    pub fn apply(&mut self, epoch: Epoch, changes: &[Change], wall_ms: i64) -> Result<(), Refused> {
        self.check_epoch(epoch)?;
        changes.iter().try_for_each(|change| self.apply_one(change, wall_ms))
    }

    fn apply_one(&mut self, change: &Change, wall_ms: i64) -> Result<(), Refused> {
        use JobState::{Cancelled, Done, Failed, Queued, Running};
        match change {
            Change::Started { .. } => self.start(change, wall_ms)?,
            Change::AttemptEnded { key, outcome, device_ms, .. } => {
                let row = self.expect(key.job, &[Running])?;
                if row.live.running.take().is_none_or(|running| running.key != *key) {
                    return broken("I9", format!("attempt {key} ends and does not run"));
                }
                let tenant = row.live.tenant.clone();
                let Some(attempt) = row.attempts.last_mut() else { return broken("I9", "an attempt without a row") };
                attempt.ended = Some((*outcome, *device_ms));
                let seconds = (wall_ms - attempt.started_ms) as f64 / 1000.0;
                let (device, base, first) = (attempt.device.clone(), attempt.base, key.attempt.0 == 1);
                let model = row.live.model.clone().unwrap_or_default();
                if *outcome == Outcome::Completed && first {
                    self.measured.push(Measured { model, device, base, seconds });
                }
                self.ended += 1;
                *self.ledger.entry((wall_ms.div_euclid(HOUR_MS), tenant)).or_default() += device_ms;
            }
            Change::Done { job, result_json, .. } => {
                let row = self.expect(*job, &[Running])?;
                idle(row)?;
                if row.result.is_some() {
                    return broken("I2", format!("job {job} has two results"));
                }
                row.result = Some(result_json.as_str().into());
                row.state = Done;
            }
            Change::Requeued { job, counts } => {
                let row = self.expect(*job, &[Running])?;
                idle(row)?;
                let interrupted =
                    matches!(row.attempts.last(), Some(Attempt { ended: Some((Outcome::Interrupted, _)), .. }));
                let known = row.live.counts;
                if interrupted && *counts != (Counts { preemptions: counts.preemptions, ..known }) {
                    return broken("I9", format!("job {job} was handed back, and that counts against it: {counts:?}"));
                }
                row.live.counts = *counts;
                row.state = Queued;
            }
            Change::Counted { job, counts } => self.expect(*job, &[Queued, Running])?.live.counts = *counts,
            Change::Failed { job, reason } => {
                let row = self.expect(*job, &[Queued, Running])?;
                idle(row)?;
                if reason.is_empty() {
                    return broken("I6", format!("job {job} has failed for no reason"));
                }
                row.reason = Some(reason.clone());
                row.state = Failed;
            }
            Change::Cancelled { job } => {
                let row = self.expect(*job, &[Queued, Running])?;
                idle(row)?;
                row.state = Cancelled;
            }
            Change::Retried { job } => {
                let row = self.expect(*job, &[Failed, Cancelled])?;
                row.state = Queued;
                (row.reason, row.live.counts) = (None, Counts::default());
                let batches = row.live.batches.clone();
                self.count_live(&batches, true);
                self.live.insert(*job);
                self.retries += 1;
            }
            Change::Paused { scope, paused } => self.pause(scope, *paused)?,
            Change::Drained { node, drained: true } => drop(self.drained.insert(node.clone())),
            Change::Drained { node, drained: false } => drop(self.drained.remove(node)),
            Change::Tenant { tenant, spec } => self.tenants.entry(tenant.clone()).or_default().0 = spec.clone(),
            Change::Log { job, .. } if self.row(*job).is_none() => return broken("I9", format!("no job {job}")),
            Change::Log { .. } | Change::Audit { .. } => {}
        }
        if let Change::Done { job, .. } | Change::Failed { job, .. } | Change::Cancelled { job } = change {
            self.live.remove(job);
            let batches = self.row(*job).map(|row| row.live.batches.clone()).unwrap_or_default();
            self.count_live(&batches, false);
        }
        Ok(())
    }

    /// A job of these batches has ended, or has begun again.
    fn count_live(&mut self, batches: &[SubmissionId], more: bool) {
        for id in batches {
            if let Some(batch) = self.batches.get_mut(id) {
                batch.live = if more { batch.live + 1 } else { batch.live.saturating_sub(1) };
                batch.was_over |= batch.live == 0;
            }
        }
    }

    fn pause(&mut self, scope: &Scope, paused: bool) -> Result<(), Refused> {
        match scope {
            Scope::Farm => self.paused = paused,
            Scope::Tenant(tenant) => self.tenants.entry(tenant.clone()).or_default().1 = paused,
            Scope::Batch(batch) => match self.batches.get_mut(batch) {
                Some(batch) => batch.paused = paused,
                None => return broken("I9", format!("there is no batch {batch}")),
            },
            Scope::Job(job) => self.expect(*job, &[JobState::Queued, JobState::Running])?.live.paused = paused,
        }
        Ok(())
    }

    fn start(&mut self, change: &Change, wall_ms: i64) -> Result<(), Refused> {
        let Change::Started { start, node, boot, device, base } = change else { return Ok(()) };
        let key = start.key;
        self.may_start(key.job, node)?;
        let row = self.expect(key.job, &[JobState::Queued])?;
        if key.attempt.0 != row.live.attempt.0 + 1 {
            return broken("I9", format!("attempt {key} after attempt {}", row.live.attempt));
        }
        row.live.attempt = key.attempt;
        row.live.model = Some(start.model.clone());
        let clip = Clip {
            model: start.model.clone(),
            model_hash: start.model_hash.clone(),
            spec_json: start.spec_json.clone(),
        };
        let attempt = LiveAttempt {
            key,
            node: node.clone(),
            boot: *boot,
            devices: start.devices.clone(),
            clip,
            started_ms: wall_ms,
            base: *base,
        };
        row.live.running = Some(Box::new(attempt));
        row.attempts.push(Attempt { key, device: device.clone(), base: *base, started_ms: wall_ms, ended: None });
        row.state = JobState::Running;
        Ok(())
    }

    /// Nothing forbids the job to start there.
    fn may_start(&self, job: JobId, node: &NodeId) -> Result<(), Refused> {
        if self.drained.contains(node) {
            return broken("I10", format!("job {job} starts on node {node}, which is drained"));
        }
        let Some(row) = self.row(job) else { return broken("I9", format!("there is no job {job}")) };
        let was_done = |on: &Dependency| match on {
            Dependency::Batch(batch) => self.batches.get(batch).is_some_and(|batch| batch.was_over),
            Dependency::Job(_) => self.is_done(on),
        };
        if let Some(early) = row.after.iter().find(|on| !was_done(on)) {
            return broken("I9", format!("job {job} starts before {early:?} is done"));
        }
        let tenant_paused = self.tenants.get(&row.live.tenant).is_some_and(|(_, paused)| *paused);
        let batch_paused =
            row.live.batches.iter().any(|batch| self.batches.get(batch).is_some_and(|batch| batch.paused));
        if self.paused || tenant_paused || batch_paused || row.live.paused {
            return broken("I9", format!("job {job} starts and is paused"));
        }
        Ok(())
    }

    fn expect(&mut self, job: JobId, states: &[JobState]) -> Result<&mut Row, Refused> {
        match self.rows.get_mut(index_of(job)) {
            None => broken("I9", format!("there is no job {job}")),
            Some(row) if !states.contains(&row.state) => {
                broken("I9", format!("job {job} is {}, not one of {states:?}", row.state.as_str()))
            }
            Some(row) => Ok(row),
        }
    }

    /// Device time of the tenant's ended attempts, in milliseconds.
    pub fn used(&self, tenant: &TenantId) -> u64 {
        self.ledger.iter().filter(|((_, of), _)| of == tenant).map(|(_, ms)| ms).sum()
    }

    /// That of all attempts' rows together.
    pub fn used_by_attempts(&self) -> u64 {
        self.rows.iter().flat_map(|row| &row.attempts).filter_map(|attempt| Some(attempt.ended?.1)).sum()
    }

    /// The attempt has ended, or never began.
    pub fn is_over(&self, key: &AttemptKey) -> bool {
        let running = self.row(key.job).and_then(|row| row.live.running.as_ref());
        running.is_none_or(|running| running.key != *key)
    }

    pub fn knows_attempt(&self, key: &AttemptKey) -> bool {
        let number = AttemptNo(key.attempt.0);
        let attempt = self.row(key.job).and_then(|row| row.attempts.get(number.0 as usize - 1));
        attempt.is_some_and(|attempt| attempt.key == *key)
    }
}

/// No attempt of the job is under way.
fn idle(row: &Row) -> Result<(), Refused> {
    match &row.live.running {
        None => Ok(()),
        Some(running) => broken("I9", format!("job {} changes while attempt {} runs", row.live.job, running.key)),
    }
}
