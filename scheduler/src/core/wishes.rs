//! What users and operators ask for. Each wish that changes something leaves a line in the audit trail.

use farm_core::api::TenantSpec;
use farm_core::id::{AttemptKey, JobId, NodeId, SubmissionId, TenantId};

use super::effects::{Change, Effects};
use super::events::{Counts, LiveJob, Scope, Wish};
use super::farm::{Farm, Phase};
use super::jobs::End;
use super::planted::{Bug, planted};

impl Farm {
    pub(super) fn on_wish(&mut self, wish: Wish, by: String, fx: &mut Effects) {
        let done: Option<(&'static str, String, String)> = match wish {
            Wish::Cancel(job) => self.cancel(job, &by, fx).then(|| ("cancel", job.to_string(), String::new())),
            Wish::CancelBatch(batch) => self.cancel_batch(batch, &by, fx),
            Wish::Retry(job) => {
                let id = job.job;
                self.retry(job, &by, fx).then(|| ("retry", id.to_string(), String::new()))
            }
            Wish::Pause(scope) => self.pause(&scope, true, fx).then(|| ("pause", scope.to_string(), String::new())),
            Wish::Resume(scope) => self.pause(&scope, false, fx).then(|| ("resume", scope.to_string(), String::new())),
            Wish::Drain(node) => self.drain(&node, fx).then(|| ("drain", node.to_string(), String::new())),
            Wish::Undrain(node) => self.undrain(&node, fx).then(|| ("undrain", node.to_string(), String::new())),
            Wish::SetTenant(tenant, spec) => self.set_tenant(tenant, spec, fx),
        };
        if let Some((action, subject, detail)) = done {
            fx.changes.push(Change::Audit { by, action, subject, detail });
        }
    }

    fn cancel(&mut self, id: JobId, by: &str, fx: &mut Effects) -> bool {
        if !self.jobs.contains_key(&id) {
            return false;
        }
        if !planted(Bug::CancelledRunsOn) {
            self.stop(id, &format!("cancelled by {by}"), fx);
        }
        self.end(id, End::Cancelled, fx);
        true
    }

    fn cancel_batch(
        &mut self,
        batch: SubmissionId,
        by: &str,
        fx: &mut Effects,
    ) -> Option<(&'static str, String, String)> {
        let live: Vec<JobId> = self.batches.get(&batch)?.live.iter().copied().collect();
        for job in &live {
            self.stop(*job, &format!("cancelled by {by}"), fx);
        }
        // Together: those that come after others of the batch are cancelled like these.
        self.end_all(live.iter().map(|job| (*job, End::Cancelled)).collect(), fx);
        Some(("cancel", format!("batch {batch}"), format!("{} jobs", live.len())))
    }

    fn retry(&mut self, job: LiveJob, by: &str, fx: &mut Effects) -> bool {
        let id = job.job;
        if self.jobs.contains_key(&id) {
            return false;
        }
        fx.changes.push(Change::Retried { job: id });
        fx.log(id, None, format!("queued again by {by}"));
        self.revive(&job.batches, fx);
        self.admit_job(LiveJob { counts: Counts::default(), running: None, ..job });
        true
    }

    fn pause(&mut self, scope: &Scope, paused: bool, fx: &mut Effects) -> bool {
        let jobs: Vec<JobId> = match scope {
            Scope::Farm => {
                if self.paused == paused {
                    return false;
                }
                self.paused = paused;
                if paused { self.running_jobs().collect() } else { Vec::new() }
            }
            Scope::Tenant(id) => {
                let Some(ix) = self.tenant_ix.get(id).copied() else { return false };
                if std::mem::replace(&mut self.tenant_mut(ix).paused, paused) == paused {
                    return false;
                }
                let of_tenant = self.running_jobs().filter(|job| self.jobs[job].tenant == ix);
                if paused { of_tenant.collect() } else { Vec::new() }
            }
            Scope::Batch(id) => {
                let Some(batch) = self.batches.get_mut(id) else { return false };
                if std::mem::replace(&mut batch.paused, paused) == paused {
                    return false;
                }
                batch.live.iter().copied().collect()
            }
            Scope::Job(id) => {
                let Some(job) = self.jobs.get_mut(id) else { return false };
                if std::mem::replace(&mut job.paused, paused) == paused {
                    return false;
                }
                vec![*id]
            }
        };
        fx.changes.push(Change::Paused { scope: scope.clone(), paused });
        for job in jobs {
            if let Some(key) = self.running_key(job).filter(|_| paused) {
                self.hand_back(&key, "paused", false, fx);
            }
            if matches!(scope, Scope::Batch(_) | Scope::Job(_)) {
                self.resettle(job);
            }
        }
        self.replan = true;
        true
    }

    fn drain(&mut self, node: &NodeId, fx: &mut Effects) -> bool {
        if !self.drained.insert(node.clone()) {
            return false;
        }
        fx.changes.push(Change::Drained { node: node.clone(), drained: true });
        self.empty_node(node, "its node is drained", fx);
        true
    }

    fn undrain(&mut self, node: &NodeId, fx: &mut Effects) -> bool {
        let cured = self.health.remove(node).is_some();
        let drained = self.drained.remove(node);
        if drained {
            fx.changes.push(Change::Drained { node: node.clone(), drained: false });
        }
        self.replan = true;
        drained || cured
    }

    /// Hands back all that a node runs.
    pub(super) fn empty_node(&mut self, id: &NodeId, reason: &str, fx: &mut Effects) {
        self.reservations.drop_node(id);
        let jobs: Vec<JobId> = self.nodes.get(id).map(|node| node.leases.iter().copied().collect()).unwrap_or_default();
        for job in jobs {
            if let Some(key) = self.running_key(job) {
                self.hand_back(&key, reason, false, fx);
            }
        }
    }

    fn set_tenant(
        &mut self,
        id: TenantId,
        spec: TenantSpec,
        fx: &mut Effects,
    ) -> Option<(&'static str, String, String)> {
        let ix = self.tenant(&id);
        self.tenant_mut(ix).spec = spec.clone();
        let limit = |limit: Option<u64>| limit.map_or("none".to_owned(), |limit| limit.to_string());
        let quota = spec.quota;
        let detail = format!(
            "share {}, devices {}, queued {}, device-seconds {}",
            spec.share,
            limit(quota.devices.map(u64::from)),
            limit(quota.queued),
            limit(quota.device_seconds)
        );
        let subject = id.to_string();
        fx.changes.push(Change::Tenant { tenant: id, spec });
        self.replan = true;
        Some(("quota", subject, detail))
    }

    fn running_jobs(&self) -> impl Iterator<Item = JobId> {
        let leases = self.nodes.values().flat_map(|node| node.leases.iter().copied());
        leases.chain(self.orphans.iter().copied())
    }

    fn running_key(&self, job: JobId) -> Option<AttemptKey> {
        match &self.jobs.get(&job)?.phase {
            Phase::Running(lease) => Some(lease.key),
            _ => None,
        }
    }
}
