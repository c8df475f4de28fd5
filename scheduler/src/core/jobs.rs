//! The life of a job: from its admission to its end, and what its end means for others.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use farm_core::id::{AttemptKey, BootId, JobId, NodeId, TenantId};
use farm_core::job::state::FailureKind;
use farm_core::wire::StopNo;
use farm_core::wire::to_node::ToNode;

use super::batch::Batch;
use super::class::Class;
use super::effects::{Change, Effects, Outcome};
use super::events::{Dependency, LiveAttempt, LiveJob, SavedBatch, Scope, Submitted};
use super::farm::{Bill, Confirmation, Farm, Job, Lease, Node, Phase, Slot, Stopping};
use super::plan::UNKNOWN_SECONDS;
use super::planted::{Bug, planted};
use super::tenant::{Tenant, TenantIx};

/// How a job ends for good.
#[derive(Clone, Debug)]
pub(super) enum End {
    Done { result_json: String, warnings: Vec<String> },
    Failed(String),
    Cancelled,
}

impl Farm {
    /// The tenant of this name. One that is not known yet has a share of 1 and no quota.
    pub(super) fn tenant(&mut self, id: &TenantId) -> TenantIx {
        if let Some(ix) = self.tenant_ix.get(id) {
            return *ix;
        }
        let ix = TenantIx(self.tenants.len() as u32);
        self.tenants.push(Tenant::new(id.clone(), Default::default(), false));
        self.tenant_ix.insert(id.clone(), ix);
        ix
    }

    pub(super) fn tenant_mut(&mut self, ix: TenantIx) -> &mut Tenant {
        &mut self.tenants[ix.0 as usize]
    }

    pub(super) fn on_submitted(&mut self, submitted: Submitted, fx: &mut Effects) {
        let Submitted { batch, queued, joined } = submitted;
        let batch_id = batch.as_ref().map(|batch| batch.submission);
        if let Some(batch) = batch {
            // Heard of twice, it has its jobs already.
            self.batches.entry(batch.submission).or_insert_with(|| Batch::new(batch));
        }
        for job in queued {
            self.revive(&job.batches, fx);
            self.admit_job(job);
        }
        let Some(batch) = batch_id else { return };
        for id in joined {
            if let Some(job) = self.jobs.get_mut(&id)
                && !job.batches.contains(&batch)
            {
                job.batches.push(batch);
                self.enter_batch(batch, id);
                self.resettle(id);
            }
        }
        // A batch without anything to do, and one whose jobs had all failed before, is over at once.
        self.end_empty_batch(batch, fx);
    }

    /// Batches that had ended begin again with one of their jobs; nobody has them paused any more.
    pub(super) fn revive(&mut self, batches: &[farm_core::id::SubmissionId], fx: &mut Effects) {
        for batch in batches.iter().filter(|batch| !self.batches.contains_key(*batch)) {
            fx.changes.push(Change::Paused { scope: Scope::Batch(*batch), paused: false });
        }
    }

    fn enter_batch(&mut self, batch: farm_core::id::SubmissionId, id: JobId) {
        let fresh = || Batch::new(SavedBatch { submission: batch, max_failures: None, failed: 0, paused: false });
        self.batches.entry(batch).or_insert_with(fresh).live.insert(id);
    }

    /// A job from the store, queued or running.
    pub(super) fn admit_job(&mut self, live: LiveJob) {
        let id = live.job;
        if self.jobs.contains_key(&id) && !planted(Bug::AdmittedTwice) {
            return;
        }
        let tenant = self.tenant(&live.tenant);
        let model = live.model.map(|name| self.intern(&name));
        let ask = live.ask;
        let class = self.classes.add_job(Class { model: model.clone(), ask, require: Arc::new(live.require) });
        for batch in &live.batches {
            self.enter_batch(*batch, id);
        }
        // One that runs has waited for them; they may have been tried again since.
        if live.running.is_none() {
            self.dependencies.add(id, live.after);
        }
        let job = Job {
            seq: live.seq,
            priority: live.priority,
            tenant,
            class,
            batches: live.batches,
            paused: live.paused,
            submitted_ms: live.submitted_ms,
            attempt: live.attempt,
            counts: live.counts,
            avoid: None,
            phase: Phase::Held,
        };
        self.jobs.insert(id, job);
        self.tenant_mut(tenant).live += 1;
        match live.running {
            None => self.wait(id),
            Some(attempt) => self.adopt(id, *attempt),
        }
    }

    /// A job that ran when the store was last written.
    fn adopt(&mut self, id: JobId, attempt: LiveAttempt) {
        let LiveAttempt { key, node, boot, devices, clip, started_ms, base } = attempt;
        let before = Duration::from_millis(self.wall().saturating_sub(started_ms).max(0) as u64);
        let used = before * devices.len() as u32;
        let bill = Bill {
            size: devices.len(),
            since: self.now,
            used,
            before,
            base,
            expected: None,
            charged: UNKNOWN_SECONDS * devices.len() as f64,
        };
        let lease = Lease {
            key,
            node,
            boot,
            devices,
            clip,
            confirmation: Confirmation::Listed,
            progress: None,
            moved: self.now,
            hands: None,
            helpers: Vec::new(),
            bill,
            yielding: None,
        };
        let at = self.clock();
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let tenant = &mut self.tenants[job.tenant.0 as usize];
        tenant.usage.begin(lease.bill.charged, at);
        tenant.running += 1;
        tenant.devices += lease.devices.len() as u32;
        job.phase = Phase::Running(Box::new(lease));
        self.orphans.insert(id);
    }

    /// One copy of each model name.
    pub(super) fn intern(&self, name: &str) -> Arc<str> {
        match self.models.get_key_value(name) {
            Some((known, _)) => known.clone(),
            None => name.into(),
        }
    }

    /// The job goes on with this model, even if others join.
    pub(super) fn pin_model(&mut self, id: JobId, model: &Arc<str>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let class = self.classes.get(job.class).clone();
        if class.model.as_ref() == Some(model) {
            return;
        }
        let pinned = self.classes.add_job(Class { model: Some(model.clone()), ..(*class).clone() });
        self.drop_class(id);
        if let Some(job) = self.jobs.get_mut(&id) {
            job.class = pinned;
        }
    }

    fn drop_class(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        if self.classes.drop_job(job.class) {
            self.fits.borrow_mut().forget(job.class);
        }
    }

    /// Whether it may not start whatever is free.
    pub(super) fn is_held(&self, id: JobId, job: &Job) -> bool {
        let batch_paused = |batch| self.batches.get(batch).is_some_and(|batch: &Batch| batch.paused);
        let after = !self.dependencies.of(id).is_empty() && !planted(Bug::DependencyIgnored);
        job.paused || after || job.batches.iter().any(batch_paused)
    }

    /// Puts a job that has no devices in the queue, or holds it.
    pub(super) fn wait(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let held = self.is_held(id, job);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.phase = if held { Phase::Held } else { Phase::Waiting };
        if !held {
            let place = job.place(id);
            self.tenants[job.tenant.0 as usize].waiting.entry(job.class).or_default().insert(place);
            self.classes.count_waiting(job.class, true);
            self.replan = true;
        }
    }

    /// Takes a job out of the queue, if it is there.
    pub(super) fn unqueue(&mut self, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        match job.phase {
            Phase::Waiting => {
                let place = job.place(id);
                let waiting = &mut self.tenants[job.tenant.0 as usize].waiting;
                if let Some(jobs) = waiting.get_mut(&job.class) {
                    jobs.remove(&place);
                    if jobs.is_empty() {
                        waiting.remove(&job.class);
                    }
                }
                self.classes.count_waiting(job.class, false);
                job.phase = Phase::Held;
            }
            Phase::Delayed { until, .. } => {
                self.delayed.remove(&(until, id));
                job.phase = Phase::Held;
            }
            Phase::Held | Phase::Picked(_) | Phase::Running(_) => {}
        }
    }

    /// What holds the job may have changed.
    pub(super) fn resettle(&mut self, id: JobId) {
        if self.jobs.get(&id).is_some_and(|job| matches!(job.phase, Phase::Waiting | Phase::Held)) {
            self.unqueue(id);
            self.wait(id);
        }
        self.reservations.drop_job(id);
    }

    /// Takes the devices of a job that was picked back.
    pub(super) fn unpick(&mut self, id: JobId) {
        let (at, hour) = (self.clock(), self.hour());
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Phase::Picked(pick) = &job.phase else { return };
        let (node, count, bill) = (pick.node.clone(), pick.devices.len() as u32, pick.bill);
        job.phase = Phase::Held;
        let tenant = &mut self.tenants[job.tenant.0 as usize];
        tenant.devices -= count;
        tenant.running -= 1;
        tenant.usage.end(bill.charged, bill.since.0.as_secs_f64(), 0.0, at, hour);
        if let Some(node) = self.nodes.get_mut(&node) {
            node.leases.remove(&id);
            for device in node.devices.iter_mut().filter(|device| device.slot == Slot::Leased(id)) {
                device.slot = Slot::Free;
            }
        }
        self.picked.retain(|picked| *picked != id);
        self.replan = true;
    }

    /// Ends a job, and those that this ends.
    pub(super) fn end(&mut self, id: JobId, end: End, fx: &mut Effects) {
        self.end_all(VecDeque::from([(id, end)]), fx);
    }

    /// Ends jobs, and then those that this ends: what becomes of these themselves has nothing to do with each other.
    pub(super) fn end_all(&mut self, mut ends: VecDeque<(JobId, End)>, fx: &mut Effects) {
        while let Some((id, end)) = ends.pop_front() {
            self.end_one(id, end, &mut ends, fx);
        }
    }

    fn end_one(&mut self, id: JobId, end: End, ends: &mut VecDeque<(JobId, End)>, fx: &mut Effects) {
        self.unpick(id);
        self.unqueue(id);
        self.orphans.remove(&id);
        self.reservations.drop_job(id);
        self.dependencies.forget(id);
        self.drop_class(id);
        let Some(job) = self.jobs.remove(&id) else { return };
        self.tenants[job.tenant.0 as usize].live -= 1;
        let done = matches!(end, End::Done { .. });
        let failed = matches!(end, End::Failed(_));
        match end {
            End::Done { result_json, warnings } => {
                fx.log(id, None, "done");
                fx.changes.push(Change::Done { job: id, result_json, warnings });
            }
            End::Failed(reason) => {
                fx.log(id, None, format!("failed: {reason}"));
                fx.changes.push(Change::Failed { job: id, reason });
            }
            End::Cancelled => {
                fx.log(id, None, "cancelled");
                fx.changes.push(Change::Cancelled { job: id });
            }
        }
        let own = Dependency::Job(id);
        if done {
            for waiter in self.dependencies.done(own) {
                self.resettle(waiter);
            }
        } else {
            let why = if failed { "has failed" } else { "was cancelled" };
            let reason = format!("job {} that it comes after {why}", id.short());
            ends.extend(self.dependencies.waiting_for(own).into_iter().map(|job| (job, End::Failed(reason.clone()))));
        }
        for batch in job.batches {
            let Some(known) = self.batches.get_mut(&batch) else { continue };
            known.live.remove(&id);
            known.failed += failed as u32;
            if failed && known.is_given_up() {
                fx.note(format!("batch {batch} is given up: {} of its jobs have failed", known.failed));
                // Before those that only come after a job that has failed: its jobs are given up, whatever they come after.
                known.live.iter().for_each(|job| ends.push_front((*job, End::Cancelled)));
                for job in known.live.clone() {
                    self.stop(job, "its batch is given up", fx);
                }
            }
            ends.extend(self.ended_batch(batch));
        }
    }

    /// If all jobs of the batch have ended: what becomes of jobs that come after it.
    fn ended_batch(&mut self, batch: farm_core::id::SubmissionId) -> Vec<(JobId, End)> {
        let Some(known) = self.batches.get(&batch).filter(|known| known.live.is_empty()) else { return Vec::new() };
        let (failed, own) = (known.failed, Dependency::Batch(batch));
        self.batches.remove(&batch);
        if failed > 0 {
            let reason = format!("{failed} jobs of batch {batch} that it comes after have failed");
            return self
                .dependencies
                .waiting_for(own)
                .into_iter()
                .map(|job| (job, End::Failed(reason.clone())))
                .collect();
        }
        for waiter in self.dependencies.done(own) {
            self.resettle(waiter);
        }
        Vec::new()
    }

    fn end_empty_batch(&mut self, batch: farm_core::id::SubmissionId, fx: &mut Effects) {
        for (job, end) in self.ended_batch(batch) {
            self.end(job, end, fx);
        }
    }

    /// Takes the devices of a job that will not go on. They are free when its node says that it has stopped.
    pub(super) fn stop(&mut self, id: JobId, reason: &str, fx: &mut Effects) {
        let Some(Job { phase: Phase::Running(lease), .. }) = self.jobs.get(&id) else { return };
        let (key, node, boot) = (lease.key, lease.node.clone(), lease.boot);
        if planted(Bug::FreedTooEarly) {
            return self.release(id, Slot::Free, Outcome::Aborted, Some(reason.to_owned()), fx);
        }
        let slot = self.abort(&node, boot, key, reason.to_owned(), fx);
        self.release(id, slot, Outcome::Aborted, Some(reason.to_owned()), fx);
    }

    /// Tells the node to stop the attempt. Gives what its devices are until then.
    pub(super) fn abort(
        &mut self,
        node: &NodeId,
        boot: BootId,
        key: AttemptKey,
        reason: String,
        fx: &mut Effects,
    ) -> Slot {
        let stop = self.next_stop();
        fx.send(node, boot, ToNode::Abort { key, stop, reason });
        Slot::Stopping(Box::new(Stopping { key, command: stop, helps: false }))
    }

    pub(super) fn next_stop(&mut self) -> StopNo {
        self.stop.number += 1;
        self.stop
    }

    /// Ends a running job's lease; the job itself is left in no queue. `slot` is what its devices become, and who helps is
    /// told to stop.
    pub(super) fn release(
        &mut self,
        id: JobId,
        slot: Slot,
        outcome: Outcome,
        message: Option<String>,
        fx: &mut Effects,
    ) {
        let (at, hour, now) = (self.clock(), self.hour(), self.now);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Phase::Running(lease) = std::mem::replace(&mut job.phase, Phase::Held) else { return };
        let bill = lease.bill;
        let running = now.since(bill.since) * lease.devices.len() as u32;
        let helped: Duration = lease.helpers.iter().map(|helper| self.helper_time(&lease.key, helper)).sum();
        let helped = if planted(Bug::HelpersNotCharged) { Duration::ZERO } else { helped };
        let used = bill.used + running + helped;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let tenant = &mut self.tenants[job.tenant.0 as usize];
        tenant.usage.end(bill.charged, bill.since.0.as_secs_f64(), used.as_secs_f64(), at, hour);
        tenant.running -= 1;
        if outcome != Outcome::Failed(FailureKind::NodeLost) || !planted(Bug::LostLeaseCounts) {
            tenant.devices -= lease.devices.len() as u32;
        }
        if let Some(node) = self.nodes.get_mut(&lease.node) {
            node.leases.remove(&id);
            for device in node.devices.iter_mut().filter(|device| device.slot == Slot::Leased(id)) {
                device.slot = slot.clone();
            }
        }
        self.orphans.remove(&id);
        let device_ms = used.as_millis() as u64;
        if outcome != Outcome::Interrupted || !planted(Bug::RequeuedWhileRunning) {
            fx.changes.push(Change::AttemptEnded { key: lease.key, outcome, message, device_ms });
        }
        self.replan = true;
        self.dismiss_helpers(lease.key, &lease.helpers, fx);
    }

    /// The attempt of a running job ended with its node.
    pub(super) fn lose_lease(&mut self, id: JobId, why: &str, slot: Slot, fx: &mut Effects) {
        let Some(job) = self.jobs.get(&id) else { return };
        match &job.phase {
            Phase::Running(lease) => {
                let (key, message) = (lease.key, format!("node {} {why}", lease.node));
                self.end_attempt(key, FailureKind::NodeLost, message, slot, fx);
            }
            Phase::Picked(_) => {
                self.unpick(id);
                self.wait(id);
            }
            _ => {}
        }
    }

    /// A node is gone, and with it all that it ran.
    pub(super) fn lose_node(&mut self, id: &NodeId, why: &str, fx: &mut Effects) {
        // What it helped with is charged up to now.
        let helps = |node: &Node| {
            (0..node.devices.len()).filter(|i| matches!(node.devices[*i].slot, Slot::Helping(_))).collect()
        };
        let helping: Vec<usize> = self.nodes.get(id).map(helps).unwrap_or_default();
        helping.into_iter().for_each(|device| self.end_help(id, device));
        let Some(mut node) = self.nodes.remove(id) else { return };
        self.boots.remove(&node.boot);
        self.withdraw(id, &mut node);
        self.reservations.drop_node(id);
        fx.note(format!("node {id} is lost: {why}"));
        for job in node.leases {
            self.lose_lease(job, why, Slot::Free, fx);
        }
        // One model fewer may leave exactly one.
        self.replan = true;
    }

    /// A running attempt is handed back, if it has not been told before.
    pub(super) fn hand_back(&mut self, key: &AttemptKey, reason: &str, preempted: bool, fx: &mut Effects) {
        let Some(lease) = self.lease_mut(key).filter(|lease| lease.yielding.is_none()) else { return };
        lease.yielding = Some(super::farm::Yield { reason: reason.into(), preempted });
        let (node, boot) = (lease.node.clone(), lease.boot);
        fx.log(key.job, Some(key.attempt), format!("is to be handed back: {reason}"));
        fx.send(&node, boot, ToNode::Yield { key: *key, reason: reason.to_owned() });
    }
}
