//! When queued jobs are expected to start and end. The rule is the planner's own, taken as if work could be poured: devices
//! go to the tenants that have used least of their share until all have used the same of it. So a job starts when its
//! tenant's level has risen over all its tenant's work that goes before it.

use farm_core::id::{JobId, SubmissionId};

use super::farm::{Farm, Job, Phase};
use super::plan::{Head, head};
use super::tenant::Tenant;

/// Jobs of a batch that are looked at for its end, the newest ones.
const MAX_LOOKED_AT: usize = 1000;

/// Device-seconds that wait, by tenant.
#[derive(Clone, Debug, PartialEq)]
pub struct Outlook {
    /// Devices that start clips.
    pub devices: f64,
    /// Of what runs, expected yet.
    pub running: f64,
    pub tenants: Vec<Pool>,
}

/// A tenant's part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pool {
    /// Used so far, over the share.
    pub level: f64,
    pub share: f64,
    /// Device-seconds that wait.
    pub work: f64,
}

impl Outlook {
    /// Seconds until every tenant that has work left has used so much of its share.
    pub fn until(&self, level: f64) -> f64 {
        let poured = |pool: &Pool| (pool.share * (level - pool.level)).clamp(0.0, pool.work);
        (self.running + self.tenants.iter().map(poured).sum::<f64>()) / self.devices
    }

    /// Seconds until nothing waits or runs.
    pub fn until_empty(&self) -> f64 {
        self.until(f64::INFINITY)
    }
}

impl Farm {
    fn outlook(&self) -> Option<Outlook> {
        let open = self.nodes.iter().filter(|(id, node)| self.is_open(id, node));
        let devices: usize = open.clone().map(|(_, node)| node.devices.len()).sum();
        let running = open.flat_map(|(_, node)| &node.leases).filter_map(|job| {
            let left = self.expected_end(*job)?.since(self.now).as_secs_f64();
            match &self.jobs.get(job)?.phase {
                Phase::Running(lease) => Some(left * lease.devices.len() as f64),
                _ => None,
            }
        });
        let at = self.clock();
        let pool = |tenant: &Tenant| {
            let share = tenant.spec.share;
            let work = tenant.waiting.iter().map(|(class, jobs)| self.fit(*class).work * jobs.len() as f64).sum();
            Pool { level: tenant.usage.decayed(at) / share, share, work }
        };
        let tenants = self.tenants.iter().filter(|tenant| !tenant.paused && !tenant.waiting.is_empty());
        let outlook = Outlook { devices: devices as f64, running: running.sum(), tenants: tenants.map(pool).collect() };
        (devices > 0 && !self.paused).then_some(outlook)
    }

    /// Predicted seconds until the queue is empty.
    pub(super) fn queue_eta(&self) -> Option<f64> {
        let eta = self.outlook()?.until_empty();
        eta.is_finite().then_some(eta)
    }

    /// Predicted seconds until a queued job starts, and from then to its end.
    pub(super) fn forecast(&self, id: JobId, job: &Job) -> Option<(f64, f64)> {
        let fit = self.fit(job.class);
        if fit.work <= 0.0 {
            return None;
        }
        let run = fit.choices.iter().filter_map(|choice| {
            let sizes = 1..=choice.seconds.len();
            sizes.filter_map(|size| choice.seconds_on(size)).reduce(f64::max)
        });
        let run = run.reduce(f64::min)?;
        match &job.phase {
            Phase::Picked(_) => Some((0.0, run)),
            Phase::Delayed { until, .. } => Some((until.since(self.now).as_secs_f64(), run)),
            Phase::Waiting => {
                let tenant = &self.tenants[job.tenant.0 as usize];
                let outlook = self.outlook()?;
                let own = head(job.place(id), job.class, fit.work);
                let level = tenant.usage.decayed(self.clock()) / tenant.spec.share;
                let start = outlook.until(level + self.work_before(tenant, &own) / tenant.spec.share);
                (start.is_finite() && !tenant.paused).then_some((start, run))
            }
            Phase::Held | Phase::Running(_) => None,
        }
    }

    /// Device-seconds of the tenant's jobs that go before this one.
    fn work_before(&self, tenant: &Tenant, own: &Head) -> f64 {
        let of_class = |(class, jobs): (&super::class::ClassIx, &std::collections::BTreeSet<super::tenant::Place>)| {
            let work = self.fit(*class).work;
            let before = jobs.iter().take_while(|place| head(**place, *class, work) > *own).count();
            before as f64 * work
        };
        tenant.waiting.iter().map(of_class).sum()
    }

    /// Predicted seconds until the last job of the batch ends, if all of them that wait for something have a prediction.
    pub fn batch_eta(&self, batch: SubmissionId) -> Option<f64> {
        let live = &self.batches.get(&batch)?.live;
        let mut last: Option<(Head, JobId)> = None;
        let mut eta: f64 = 0.0;
        for id in live.iter().rev().take(MAX_LOOKED_AT) {
            let job = self.jobs.get(id)?;
            match &job.phase {
                Phase::Running(_) => eta = eta.max(self.expected_end(*id)?.since(self.now).as_secs_f64()),
                Phase::Waiting => {
                    let own = head(job.place(*id), job.class, self.fit(job.class).work);
                    // The one that goes last.
                    if last.as_ref().is_none_or(|(known, _)| own < *known) {
                        last = Some((own, *id));
                    }
                }
                _ => {
                    let (start, run) = self.forecast(*id, job)?;
                    eta = eta.max(start + run);
                }
            }
        }
        if let Some((_, id)) = last {
            let (start, run) = self.forecast(id, self.jobs.get(&id)?)?;
            eta = eta.max(start + run);
        }
        Some(eta)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(level: f64, share: f64, work: f64) -> Pool {
        Pool { level, share, work }
    }

    #[test]
    fn a_tenant_that_has_used_less_is_served_first() {
        let tenants = vec![pool(0.0, 1.0, 100.0), pool(60.0, 1.0, 100.0)];
        let outlook = Outlook { devices: 2.0, running: 20.0, tenants };
        assert_eq!(outlook.until(0.0), 10.0, "what runs has to end");
        assert_eq!(outlook.until(60.0), 40.0, "nobody else is served before both have used the same");
        assert_eq!(outlook.until(100.0), 80.0);
        assert_eq!(outlook.until_empty(), 110.0);
    }

    proptest! {
        #[test]
        fn all_work_takes_as_long_as_it_is_over_the_devices(
            devices in 1..100u32,
            pools in prop::collection::vec((0.0..1e4f64, 0.1..10.0f64, 0.0..1e4f64), 0..20),
        ) {
            let tenants: Vec<Pool> = pools.into_iter().map(|(level, share, work)| pool(level, share, work)).collect();
            let work: f64 = tenants.iter().map(|pool| pool.work).sum();
            let outlook = Outlook { devices: devices.into(), running: 5.0, tenants };
            prop_assert!((outlook.until_empty() - (5.0 + work) / f64::from(devices)).abs() < 1e-6);
            let levels = [0.0, 10.0, 100.0, 1e3, 1e5].map(|level| outlook.until(level));
            prop_assert!(levels.is_sorted());
            prop_assert!(levels.iter().all(|seconds| *seconds <= outlook.until_empty()));
        }
    }
}
