//! Heartbeats and reports: which attempts live, which have ended and how, and what becomes of their jobs.

use std::collections::HashSet;
use std::time::Duration;

use farm_core::api::JobResult;
use farm_core::id::{AttemptKey, AttemptNo, BootId, DeviceIndex, JobId, NodeId};
use farm_core::job::state::{FailureKind, Progress, Stage};
use farm_core::store::key;
use farm_core::wire::StopNo;
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{AttemptOutcome, AttemptReport, Helping, RunningAttempt};

use super::effects::{Change, Effects, Outcome};
use super::farm::{Bill, Confirmation, Farm, Job, Phase, Slot, Stopping, shortened};
use super::jobs::End;
use super::plan::has_labels;
use super::planted::{Bug, planted};
use super::stock::Group;

/// Longest wait between two attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(60);

/// What a registered node should do about one of its leases.
enum Overdue {
    Nothing,
    Repeat,
    Lost(&'static str),
}

impl Farm {
    /// A registered node says, in its message number `seq`, what it holds: every attempt, with the devices that it has
    /// left, and every device that helps.
    pub(super) fn on_listed(
        &mut self,
        id: &NodeId,
        seq: u64,
        heard: StopNo,
        running: Vec<RunningAttempt>,
        helping: &[Helping],
        fx: &mut Effects,
    ) {
        let Some(node) = self.nodes.get_mut(id).filter(|node| seq > node.heartbeat || planted(Bug::OldHeartbeatTaken))
        else {
            return;
        };
        node.heartbeat = seq;
        let boot = node.boot;
        self.free_stopped(id, heard, &running, helping, fx);
        self.on_running(id, boot, running, fx);
        self.on_helping(id, boot, helping, fx);
    }

    fn on_running(&mut self, id: &NodeId, boot: BootId, running: Vec<RunningAttempt>, fx: &mut Effects) {
        let listed: HashSet<AttemptKey> = running.iter().map(|attempt| attempt.key).collect();
        let (now, stuck, mut hanging) = (self.now, self.limits.stuck, Vec::new());
        for attempt in running {
            match self.lease_mut(&attempt.key).filter(|lease| lease.node == *id && lease.boot == boot) {
                Some(lease) => {
                    lease.confirmation = Confirmation::Listed;
                    if lease.progress.map(place) != Some(place(attempt.progress)) {
                        lease.moved = now;
                    }
                    lease.progress = Some(attempt.progress);
                    if let Some(yielding) = &lease.yielding {
                        fx.send(id, boot, ToNode::Yield { key: attempt.key, reason: yielding.reason.to_string() });
                    }
                    if now.since(lease.moved) >= patience(&lease.bill, attempt.progress, stuck) {
                        hanging.push(attempt.key);
                    }
                    // What is given back is never lent to the attempt again, so a lease only shrinks.
                    let kept = |device: &DeviceIndex| attempt.devices.contains(device);
                    let (held, given_back) = std::mem::take(&mut lease.devices).into_iter().partition(kept);
                    lease.devices = held;
                    self.take_back(&attempt.key, id, given_back);
                }
                None => {
                    self.counters.strays_aborted += 1;
                    let slot = self.abort(id, boot, attempt.key, "not leased to this node".to_owned(), fx);
                    // Its devices are not idle before the node says so.
                    if let Some(node) = self.nodes.get_mut(id) {
                        for device in &attempt.devices {
                            if let Some(device) = node.devices.get_mut(device.0 as usize)
                                && device.slot == Slot::Free
                            {
                                device.slot = slot.clone();
                            }
                        }
                    }
                }
            }
        }
        self.chase_unlisted(id, boot, &listed, fx);
        for key in hanging {
            self.hang(key, fx);
        }
    }

    /// An attempt that does not get on is given up; its devices are free once its node does not list it any more.
    fn hang(&mut self, key: AttemptKey, fx: &mut Effects) {
        let Some(lease) = self.lease(&key) else { return };
        let (node, boot) = (lease.node.clone(), lease.boot);
        let silent = self.now.since(lease.moved).as_secs();
        let slot = self.abort(&node, boot, key, format!("no progress for {silent} s"), fx);
        let message = format!("no progress on node {node} for {silent} s");
        self.end_attempt(key, FailureKind::Device, message, slot, fx);
    }

    /// Devices that an attempt has given back before its end.
    fn take_back(&mut self, key: &AttemptKey, id: &NodeId, devices: Vec<DeviceIndex>) {
        let (now, count) = (self.now, devices.len() as u32);
        if let Some(Job { phase: Phase::Running(lease), tenant, .. }) = self.jobs.get_mut(&key.job) {
            lease.bill.used += now.since(lease.bill.since) * count;
            self.tenants[tenant.0 as usize].devices -= count;
        }
        let Some(node) = self.nodes.get_mut(id) else { return };
        for device in devices {
            node.devices[device.0 as usize].slot = Slot::Free;
            self.replan = true;
        }
    }

    /// Devices whose node has heard that it is to stop, and does not list them any more. Those that are listed are told
    /// again where the lists are gone through.
    fn free_stopped(
        &mut self,
        id: &NodeId,
        heard: StopNo,
        running: &[RunningAttempt],
        helping: &[Helping],
        fx: &mut Effects,
    ) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        let mut told = None;
        for (i, device) in node.devices.iter_mut().enumerate() {
            let Slot::Stopping(stopping) = &device.slot else { continue };
            let (Stopping { key, command: stop, helps }, index) = (**stopping, DeviceIndex(i as u32));
            let runs = running.iter().any(|attempt| attempt.key == key && attempt.devices.contains(&index));
            if runs || helping.iter().any(|help| help.key == key && help.device == index) {
                continue;
            }
            if heard >= stop {
                device.slot = Slot::Free;
                self.replan = true;
            } else if helps {
                fx.send(id, node.boot, ToNode::Dismiss { key, device: index, stop });
            } else if told.replace(stop) != Some(stop) {
                fx.send(id, node.boot, ToNode::Abort { key, stop, reason: "not leased to this node".to_owned() });
            }
        }
    }

    /// Leases of the node that it does not list: the command or the report may be on the way, but not for ever.
    fn chase_unlisted(&mut self, id: &NodeId, boot: BootId, listed: &HashSet<AttemptKey>, fx: &mut Effects) {
        for job in self.nodes.get(id).map(|node| node.leases.clone()).unwrap_or_default() {
            let (now, limits) = (self.now, self.limits.clone());
            let Some(Job { phase: Phase::Running(lease), .. }) = self.jobs.get_mut(&job) else { continue };
            if listed.contains(&lease.key) {
                continue;
            }
            let overdue = match &lease.confirmation {
                Confirmation::Awaited { since, .. } if now.since(*since) >= limits.start => {
                    Overdue::Lost("never took the attempt up")
                }
                Confirmation::Awaited { .. } => Overdue::Repeat,
                Confirmation::Listed => {
                    lease.confirmation = Confirmation::Unlisted { since: now };
                    Overdue::Nothing
                }
                Confirmation::Unlisted { since } if now.since(*since) >= limits.unlisted => {
                    Overdue::Lost("dropped the attempt without a report")
                }
                Confirmation::Unlisted { .. } => Overdue::Nothing,
            };
            match overdue {
                Overdue::Nothing => {}
                Overdue::Repeat => {
                    if let Confirmation::Awaited { start, .. } = &lease.confirmation {
                        fx.send(id, boot, ToNode::Start(Box::new((**start).clone())));
                    }
                }
                Overdue::Lost(why) => {
                    let key = lease.key;
                    let slot = self.abort(id, boot, key, why.to_owned(), fx);
                    self.lose_lease(job, why, slot, fx);
                }
            }
        }
    }

    /// The end of an attempt. Whatever it says, it is acknowledged once its consequences are committed; if the
    /// attempt is not the one that runs now, there are none.
    pub(super) fn on_report(
        &mut self,
        id: &NodeId,
        boot: BootId,
        number: u64,
        report: AttemptReport,
        fx: &mut Effects,
    ) {
        fx.send(id, boot, ToNode::Acknowledged { report: number });
        let AttemptReport { key, outcome } = report;
        let current = self.lease(&key).is_some_and(|lease| lease.node == *id && lease.boot == boot);
        if !current && !planted(Bug::StaleReportAccepted) {
            self.counters.stale_reports += 1;
            return fx.note(format!("node {id}: report on attempt {key} is stale and changes nothing"));
        }
        match outcome {
            AttemptOutcome::Completed { accepted, result_json, warnings } => {
                match check_result(key.job, accepted, &result_json) {
                    Ok(()) => self.complete(key, result_json, warnings, fx),
                    Err(wrong) => {
                        self.fail_attempt(key, FailureKind::Device, format!("result is not usable: {wrong}"), fx)
                    }
                }
            }
            AttemptOutcome::Interrupted { step } => self.take_job_back(key, step, fx),
            AttemptOutcome::Failed { kind, message } => self.fail_attempt(key, kind, shortened(message), fx),
        }
    }

    fn complete(&mut self, key: AttemptKey, result_json: String, warnings: Vec<String>, fx: &mut Effects) {
        self.learn(&key);
        // Most nodes have never failed anything.
        if !self.health.is_empty()
            && let Some(lease) = self.lease(&key)
            && let Some(health) = self.health.get_mut(&lease.node.clone())
        {
            health.succeeded();
        }
        let minute = self.now.0.as_secs() / 60;
        match self.finished.back_mut().filter(|(at, _)| *at == minute) {
            Some((_, clips)) => *clips += 1,
            None => self.finished.push_back((minute, 1)),
        }
        while self.finished.front().is_some_and(|(at, _)| at + 60 <= minute) {
            self.finished.pop_front();
        }
        for warning in &warnings {
            fx.log(key.job, Some(key.attempt), format!("warning: {warning}"));
        }
        self.release(key.job, Slot::Free, Outcome::Completed, None, fx);
        self.end(key.job, End::Done { result_json, warnings }, fx);
    }

    /// How long it took teaches predictions.
    fn learn(&mut self, key: &AttemptKey) {
        let Some(Job { phase: Phase::Running(lease), class, .. }) = self.jobs.get(&key.job) else { return };
        // An attempt that went on with another's latent took less.
        let first = key.attempt.0 == 1;
        let device = self.nodes.get(&lease.node).and_then(|node| node.devices.first());
        if let (Some(device), true) = (device, first) {
            let class = self.classes.get(*class);
            let seconds = (lease.bill.before + self.now.since(lease.bill.since)).as_secs_f64();
            let (base, model) = (lease.bill.base, self.intern(&lease.clip.model));
            self.rates.learn(&model, &device.name.as_str().into(), Some(class.ask), base, seconds);
        }
    }

    /// Handed back on purpose: no failure of anybody.
    fn take_job_back(&mut self, key: AttemptKey, step: u32, fx: &mut Effects) {
        let Some(lease) = self.lease(&key) else { return };
        let yielding = lease.yielding.clone();
        let why = yielding.as_ref().map_or("its node leaves", |yielding| &yielding.reason);
        let message = format!("handed back after {step} steps: {why}");
        fx.log(key.job, Some(key.attempt), message.clone());
        self.release(key.job, Slot::Free, Outcome::Interrupted, Some(message), fx);
        let Some(job) = self.jobs.get_mut(&key.job) else { return };
        job.counts.losses += u32::from(planted(Bug::HandingBackCounts));
        job.counts.preemptions += u32::from(yielding.is_some_and(|yielding| yielding.preempted));
        fx.changes.push(Change::Requeued { job: key.job, counts: job.counts });
        self.wait(key.job);
    }

    /// A running attempt ended without a clip: its devices are free, and its job fails or goes back to the queue.
    pub(super) fn fail_attempt(&mut self, key: AttemptKey, kind: FailureKind, message: String, fx: &mut Effects) {
        self.end_attempt(key, kind, message, Slot::Free, fx);
    }

    pub(super) fn end_attempt(
        &mut self,
        key: AttemptKey,
        kind: FailureKind,
        message: String,
        slot: Slot,
        fx: &mut Effects,
    ) {
        let Some(lease) = self.lease(&key) else { return };
        let (node, size) = (lease.node.clone(), lease.bill.size);
        let stage = lease.progress.map(|progress| progress.stage);
        fx.log(key.job, Some(key.attempt), format!("attempt failed by {}: {message}", cause(kind)));
        self.release(key.job, slot, Outcome::Failed(kind), Some(message.clone()), fx);
        if kind == FailureKind::Device {
            let health = self.health.entry(node.clone()).or_default();
            if health.failed(key.job, &message, self.now) {
                fx.note(format!("node {node} is in quarantine: {message}"));
                self.reservations.drop_node(&node);
            }
        }
        let largest = self.largest_for(key.job);
        let limits = self.limits.clone();
        let Some(job) = self.jobs.get_mut(&key.job) else { return };
        let counts = &mut job.counts;
        let wait = |first: Duration, count: u32| (first * (1 << (count - 1).min(16))).min(MAX_BACKOFF);
        let verdict = match kind {
            FailureKind::Input => Verdict::Fail(message.clone()),
            FailureKind::Device => {
                counts.device += 1;
                job.avoid = Some(node);
                match counts.device >= limits.failures {
                    true => Verdict::Fail(format!("devices failed it {} times, last: {message}", counts.device)),
                    false => Verdict::Delay(wait(limits.backoff, counts.device)),
                }
            }
            FailureKind::Store => {
                counts.store += 1;
                match counts.store >= limits.store_failures {
                    true => Verdict::Fail(format!("the store failed it {} times, last: {message}", counts.store)),
                    false => Verdict::Delay(wait(limits.store_backoff, counts.store)),
                }
            }
            FailureKind::OutOfMemory => {
                counts.memory += 1;
                let decode = matches!(stage, Some(Stage::Decode));
                if decode {
                    counts.smaller_tiles += 1;
                } else {
                    counts.least_devices = counts.least_devices.max(2 * size as u32);
                }
                let too_large = !decode && counts.least_devices as usize > largest;
                match counts.memory >= limits.memory_failures || too_large {
                    true => Verdict::Fail(format!("ran out of memory {} times, last: {message}", counts.memory)),
                    false => Verdict::Requeue,
                }
            }
            FailureKind::NodeLost => {
                counts.losses += 1;
                match counts.losses >= limits.losses {
                    true => Verdict::Fail(format!("lost its node {} times, last: {message}", counts.losses)),
                    false => Verdict::Requeue,
                }
            }
        };
        let requeued = Change::Requeued { job: key.job, counts: job.counts };
        match verdict {
            Verdict::Fail(reason) => self.end(key.job, End::Failed(reason), fx),
            Verdict::Delay(wait) => {
                let until = self.now + wait;
                job.phase = Phase::Delayed { until, cause: message.into() };
                self.delayed.insert((until, key.job));
                fx.changes.push(requeued);
            }
            Verdict::Requeue => {
                fx.changes.push(requeued);
                self.wait(key.job);
            }
        }
    }

    /// Devices of the largest node that could take the job.
    fn largest_for(&self, id: JobId) -> usize {
        let Some(job) = self.jobs.get(&id) else { return 0 };
        let (class, fit) = (self.classes.get(job.class), self.fit(job.class));
        let groups = fit.choices.iter().map(|choice| self.stock.group(choice.group));
        let labelled = |group: &&Group| group.nodes.iter().any(|node| has_labels(self.nodes.get(node), class));
        groups.filter(labelled).map(|group| group.spec.devices).max().unwrap_or(0)
    }
}

enum Verdict {
    Fail(String),
    Delay(Duration),
    Requeue,
}

/// How far an attempt is, whatever it expects: a group that hangs may expect something else every time, or nonsense.
fn place(progress: Progress) -> (Stage, u32, u32) {
    (progress.stage, progress.done, progress.total)
}

/// How long an attempt may say the same of its progress.
///
/// By what is expected of a step and not of the clip: what the first, short clips have taught may be wrong many times over.
fn patience(bill: &Bill, progress: Progress, stuck: Duration) -> Duration {
    let part = match progress.stage {
        Stage::Denoise => 10.0 / f64::from(progress.total.max(10)),
        _ => 1.0,
    };
    let expected = bill.expected.and_then(|seconds| Duration::try_from_secs_f64(part * seconds).ok());
    expected.unwrap_or_default().max(stuck)
}

fn cause(kind: FailureKind) -> &'static str {
    match kind {
        FailureKind::Input => "its input",
        FailureKind::Device => "its device",
        FailureKind::Store => "the store",
        FailureKind::OutOfMemory => "want of memory",
        FailureKind::NodeLost => "the loss of its node",
    }
}

/// The manifest has to be this job's and the accepted attempt's: its clip's key is what people fetch.
fn check_result(job: JobId, accepted: AttemptNo, result_json: &str) -> Result<(), String> {
    let result: JobResult = serde_json::from_str(result_json).map_err(|error| error.to_string())?;
    if result.job != job {
        return Err(format!("it is of job {}", result.job));
    }
    if result.attempt != accepted {
        return Err(format!("it is of attempt {}, not {accepted}", result.attempt));
    }
    let clip = key::clip(job, accepted);
    if result.clip != clip {
        return Err(format!("its clip is at {:?}, not at {clip:?}", result.clip));
    }
    Ok(())
}
