//! Heartbeats and reports: which attempts live, which have ended and how, and what becomes of their jobs.

use std::collections::HashSet;
use std::time::Duration;

use farm_core::api::JobResult;
use farm_core::id::{AttemptKey, AttemptNo, BootId, DeviceIndex, JobId, NodeId};
use farm_core::job::state::FailureKind;
use farm_core::store::key;
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{AttemptOutcome, AttemptReport, Helping, RunningAttempt};

use super::effects::{Change, Effects, Outcome};
use super::farm::{Confirmation, Farm, Job, Phase, Slot, shortened};

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
        running: Vec<RunningAttempt>,
        helping: &[Helping],
        fx: &mut Effects,
    ) {
        let Some(node) = self.nodes.get_mut(id).filter(|node| seq > node.heartbeat) else { return };
        node.heartbeat = seq;
        let boot = node.boot;
        self.on_running(id, boot, running, fx);
        self.on_helping(id, boot, helping, fx);
    }

    fn on_running(&mut self, id: &NodeId, boot: BootId, running: Vec<RunningAttempt>, fx: &mut Effects) {
        let listed: HashSet<AttemptKey> = running.iter().map(|attempt| attempt.key).collect();
        self.free_stopped(id, &running);
        for attempt in running {
            match self.lease_mut(&attempt.key).filter(|lease| lease.node == *id && lease.boot == boot) {
                Some(lease) => {
                    lease.confirmation = Confirmation::Listed;
                    lease.progress = Some(attempt.progress);
                    // What is given back is never lent to the attempt again, so a lease only shrinks.
                    let kept = |device: &DeviceIndex| attempt.devices.contains(device);
                    let (held, given_back) = std::mem::take(&mut lease.devices).into_iter().partition(kept);
                    lease.devices = held;
                    self.take_back(id, given_back);
                }
                None => {
                    self.counters.strays_aborted += 1;
                    let reason = "not leased to this node".to_owned();
                    fx.send(id, boot, ToNode::Abort { key: attempt.key, reason });
                }
            }
        }
        self.chase_unlisted(id, boot, &listed, fx);
    }

    /// Devices that an attempt has given back before its end.
    fn take_back(&mut self, id: &NodeId, devices: Vec<DeviceIndex>) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        for device in devices {
            node.devices[device.0 as usize].slot = Slot::Free;
            self.replan = true;
        }
    }

    /// Devices of attempts that were told to stop and do not list them any more.
    fn free_stopped(&mut self, id: &NodeId, running: &[RunningAttempt]) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        for (i, device) in node.devices.iter_mut().enumerate() {
            let has = |attempt: &RunningAttempt| attempt.devices.contains(&DeviceIndex(i as u32));
            if let Slot::Stopping(key) = device.slot
                && !running.iter().any(|attempt| attempt.key == key && has(attempt))
            {
                device.slot = Slot::Free;
                self.replan = true;
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
                        fx.send(id, boot, ToNode::Start(start.clone()));
                    }
                }
                Overdue::Lost(why) => {
                    let key = lease.key;
                    fx.send(id, boot, ToNode::Abort { key, reason: why.to_owned() });
                    self.lose_lease(job, why, fx);
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
        if !self.lease(&key).is_some_and(|lease| lease.node == *id && lease.boot == boot) {
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
            AttemptOutcome::Failed { kind, message } => self.fail_attempt(key, kind, shortened(message), fx),
        }
    }

    fn complete(&mut self, key: AttemptKey, result_json: String, warnings: Vec<String>, fx: &mut Effects) {
        self.release(key.job, Slot::Free, fx);
        self.forget(key.job);
        fx.changes.push(Change::AttemptEnded { key, outcome: Outcome::Completed, message: None });
        for warning in &warnings {
            fx.log(key.job, Some(key.attempt), format!("warning: {warning}"));
        }
        fx.log(key.job, Some(key.attempt), "done");
        fx.changes.push(Change::Done { job: key.job, result_json, warnings });
    }

    /// A running attempt ended without a clip: its devices are free, and its job fails or goes back to the queue.
    pub(super) fn fail_attempt(&mut self, key: AttemptKey, kind: FailureKind, message: String, fx: &mut Effects) {
        self.release(key.job, Slot::Free, fx);
        self.orphans.remove(&key.job);
        let limits = self.limits.clone();
        let Some(job) = self.jobs.get_mut(&key.job) else { return };
        let verdict = match kind {
            FailureKind::Input => Verdict::Fail(message.clone()),
            FailureKind::Device | FailureKind::Store => {
                job.failures += 1;
                if job.failures >= limits.failures {
                    Verdict::Fail(format!("failed {} times, last by {}: {message}", job.failures, cause(kind)))
                } else {
                    let doublings = (job.failures - 1).min(16);
                    Verdict::Delay((limits.backoff * (1 << doublings)).min(MAX_BACKOFF))
                }
            }
            FailureKind::NodeLost => {
                job.losses += 1;
                if job.losses >= limits.losses {
                    Verdict::Fail(format!("lost its node {} times, last: {message}", job.losses))
                } else {
                    Verdict::Requeue
                }
            }
        };
        let (failures, losses) = (job.failures, job.losses);
        fx.log(key.job, Some(key.attempt), format!("attempt failed by {}: {message}", cause(kind)));
        let ended = Change::AttemptEnded { key, outcome: Outcome::Failed(kind), message: Some(message.clone()) };
        fx.changes.push(ended);
        let requeued = Change::Requeued { job: key.job, failures, losses };
        match verdict {
            Verdict::Fail(reason) => {
                self.forget(key.job);
                fx.log(key.job, None, format!("failed: {reason}"));
                fx.changes.push(Change::Failed { job: key.job, reason });
            }
            Verdict::Delay(wait) => {
                let until = self.now + wait;
                job.phase = Phase::Delayed { until, cause: message.into() };
                self.delayed.insert((until, key.job));
                fx.changes.push(requeued);
            }
            Verdict::Requeue => {
                self.wait(key.job);
                fx.changes.push(requeued);
            }
        }
    }
}

enum Verdict {
    Fail(String),
    Delay(Duration),
    Requeue,
}

fn cause(kind: FailureKind) -> &'static str {
    match kind {
        FailureKind::Input => "its input",
        FailureKind::Device => "its device",
        FailureKind::Store => "the store",
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
