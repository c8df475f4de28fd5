//! Which running attempt is handed back for a job that waits: the rule, as a function.
//!
//! A job of higher priority takes the devices of one of lower priority of its own tenant. A tenant that has no device at
//! all takes them from one that has more than its part of the farm and has used more of its share; a gang of it may go on
//! with fewer. Nothing is taken that ends soon anyway, that decodes already, or that was handed back often before: its
//! latent is kept, so what is lost is at most a step and a start. And nothing is taken for a tenant whose turn comes soon:
//! where clips are short, handing back only makes everybody wait.

use std::time::Duration;

use farm_core::id::{AttemptKey, JobId, NodeId};
use farm_core::job::state::Stage;

use super::effects::Effects;
use super::farm::{Farm, Node, Phase};
use super::plan::Head;
use super::reserve::Reservation;
use super::stock::GroupIx;
use super::tenant::{Tenant, TenantIx};

/// What is expected to end within this is left alone.
const SOON: Duration = Duration::from_secs(30);
/// A tenant without any device waits so long before it takes one of another tenant.
const PATIENCE_MS: i64 = 60_000;
/// A job is handed back for others so often at most.
const MAX_PREEMPTIONS: u32 = 3;
/// Attempts that are handed back in one pass for others, at most.
const MAX_AT_ONCE: usize = 8;
/// Between two passes.
const PAUSE: Duration = Duration::from_secs(1);
/// Tenants that are looked at in one pass, those first that have used least of their share.
const MAX_TENANTS: usize = 64;

/// A tenant's first job, that has found no device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Waiter {
    pub priority: i32,
    pub waited_ms: i64,
    /// Devices that its tenant has.
    pub has: u32,
    /// By [`Tenant::key`].
    pub key: f64,
    /// As many attempts as tenants go first, and one more, are expected to end soon on devices that it could use.
    pub soon: bool,
}

/// A running attempt on devices that the waiter could use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Runner {
    pub same_tenant: bool,
    pub priority: i32,
    /// Expected until its end; `None` if nothing is predicted.
    pub left: Option<Duration>,
    /// It is before its first step or at its steps.
    pub denoises: bool,
    pub preemptions: u32,
    /// Devices that its tenant has beyond its part of the farm.
    pub surplus: f64,
    /// By [`Tenant::key`].
    pub key: f64,
    pub devices: usize,
}

/// The index of the attempt to hand back, if any is to be.
pub fn victim(waiter: &Waiter, runners: &[Runner]) -> Option<usize> {
    let allowed = |runner: &Runner| {
        let by_priority = runner.same_tenant && runner.priority < waiter.priority;
        let by_share = !runner.same_tenant
            && waiter.has == 0
            && waiter.waited_ms >= PATIENCE_MS
            && !waiter.soon
            && runner.key > waiter.key
            && (runner.surplus >= runner.devices as f64 || runner.devices > 1 && runner.surplus > 0.0);
        let worth_it = runner.left.is_none_or(|left| left > SOON);
        (by_priority || by_share) && worth_it && runner.denoises && runner.preemptions < MAX_PREEMPTIONS
    };
    let allowed = runners.iter().enumerate().filter(|(_, runner)| allowed(runner));
    // One's own first, then the least important, then that of the richest tenant, then what would take longest.
    let rank = |runner: &Runner| {
        let surplus = if runner.same_tenant { 0.0 } else { runner.surplus };
        (!runner.same_tenant, runner.priority, -surplus, std::cmp::Reverse(runner.left.unwrap_or(Duration::MAX)))
    };
    allowed.min_by(|(_, a), (_, b)| rank(a).partial_cmp(&rank(b)).unwrap_or(std::cmp::Ordering::Equal)).map(|(i, _)| i)
}

/// An attempt that might be handed back.
struct Candidate {
    key: AttemptKey,
    node: NodeId,
    group: GroupIx,
    tenant: TenantIx,
    runner: Runner,
}

impl Farm {
    /// Hands back what has to give way to the first jobs of tenants that have found no device, and keeps its node for them.
    pub(super) fn preempt(&mut self, unlucky: &[(TenantIx, Head)], fx: &mut Effects) {
        let waiter = |(tenant, head): &(TenantIx, Head)| Waiter {
            priority: head.place.0.0,
            waited_ms: self.wall() - self.jobs.get(&head.place.3).map_or(self.wall(), |job| job.submitted_ms),
            has: self.tenants[tenant.0 as usize].devices,
            key: self.tenants[tenant.0 as usize].key(),
            soon: false,
        };
        let may = |waiter: &Waiter| waiter.priority > 0 || (waiter.has == 0 && waiter.waited_ms >= PATIENCE_MS);
        // Those that go first are all that are unlucky, whether they may take anything or not.
        let all = unlucky.iter().take(MAX_TENANTS).enumerate();
        let waiters = all.map(|(first, unlucky)| (first, unlucky.0, unlucky.1.clone(), waiter(unlucky)));
        let waiters: Vec<_> = waiters.filter(|(.., waiter)| may(waiter)).collect();
        if waiters.is_empty() || self.now.since(self.preempted) < PAUSE {
            return;
        }
        self.preempted = self.now;
        let mut candidates = self.candidates();
        for (first, tenant, head, mut waiter) in waiters.into_iter().take(MAX_AT_ONCE) {
            if self.reservations.is_full() {
                return;
            }
            let fit = self.fit(head.class);
            let size = |group: GroupIx| {
                let choice = fit.choices.iter().find(|choice| choice.group == group)?;
                (1..=self.stock.group(group).spec.devices)
                    .find(|k| !choice.sizes.rated || choice.seconds_on(*k).is_some())
            };
            let possible: Vec<usize> = (0..candidates.len())
                .filter(|i| {
                    let Candidate { group, node, runner, .. } = &candidates[*i];
                    self.reservations.holder(node).is_none() && size(*group).is_some_and(|size| size <= runner.devices)
                })
                .collect();
            let of = |i: &usize| Runner { same_tenant: candidates[*i].tenant == tenant, ..candidates[*i].runner };
            let runners: Vec<Runner> = possible.iter().map(of).collect();
            let ends_soon = |runner: &&Runner| runner.left.is_some_and(|left| left <= SOON);
            waiter.soon = runners.iter().filter(ends_soon).count() > first;
            let Some(i) = victim(&waiter, &runners).map(|i| possible[i]) else { continue };
            let Candidate { key, node, group, .. } = candidates.swap_remove(i);
            let devices = size(group).unwrap_or(1);
            let job = head.place.3;
            self.reservations.keep(job, Reservation { node, devices, at: Some(self.now) });
            self.hand_back(&key, &format!("job {} goes first", job.short()), true, fx);
        }
    }

    fn candidates(&self) -> Vec<Candidate> {
        // The parts of the farm are among tenants that want or have some of it.
        let active = |t: &&Tenant| !t.paused && (t.devices > 0 || !t.waiting.is_empty());
        let shares: f64 = self.tenants.iter().filter(active).map(|t| t.spec.share).sum();
        let renderers = self.nodes.values().filter(|node| node.roles.denoise);
        let devices: usize = renderers.map(|node| node.devices.len()).sum();
        let leases = self.nodes.iter().flat_map(|(id, node)| node.leases.iter().map(move |job| (id, node, job)));
        let candidate = |(id, node, job): (&NodeId, &Node, &JobId)| {
            let job = self.jobs.get(job)?;
            let Phase::Running(lease) = &job.phase else { return None };
            if lease.yielding.is_some() || lease.devices.is_empty() || !self.is_open(id, node) {
                return None;
            }
            let owner = &self.tenants[job.tenant.0 as usize];
            let stage = lease.progress.map_or(Stage::Starting, |progress| progress.stage);
            let runner = Runner {
                same_tenant: false,
                priority: job.priority,
                left: self.expected_end(lease.key.job).map(|end| end.since(self.now)),
                denoises: matches!(stage, Stage::Starting | Stage::Text | Stage::Denoise),
                preemptions: job.counts.preemptions,
                surplus: owner.devices as f64 - devices as f64 * owner.spec.share / shares,
                key: owner.key(),
                devices: lease.devices.len(),
            };
            Some(Candidate { key: lease.key, node: id.clone(), group: node.group, tenant: job.tenant, runner })
        };
        leases.filter_map(candidate).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn runner() -> Runner {
        Runner {
            same_tenant: true,
            priority: 0,
            left: Some(Duration::from_secs(100)),
            denoises: true,
            preemptions: 0,
            surplus: 4.0,
            key: 2.0,
            devices: 1,
        }
    }

    fn any_runner() -> impl Strategy<Value = Runner> {
        let numbers = (0..5u32, -2.0..4.0f64, 0.0..4.0f64, 1..4usize);
        (any::<bool>(), 0..3i32, prop::option::of(0..100u64), any::<bool>(), numbers).prop_map(
            |(same_tenant, priority, left, denoises, (preemptions, surplus, key, devices))| Runner {
                same_tenant,
                priority,
                left: left.map(Duration::from_secs),
                denoises,
                preemptions,
                surplus,
                key,
                devices,
            },
        )
    }

    #[test]
    fn the_least_important_of_ones_own_gives_way() {
        let waiter = Waiter { priority: 5, waited_ms: 0, has: 3, key: 1.0, soon: false };
        let runners = [Runner { priority: 5, ..runner() }, Runner { priority: 2, ..runner() }, runner()];
        assert_eq!(victim(&waiter, &runners), Some(2));
        assert_eq!(victim(&Waiter { priority: 0, ..waiter }, &runners), None);
    }

    #[test]
    fn a_tenant_without_devices_takes_one_of_a_tenant_with_too_many() {
        let other = Runner { same_tenant: false, ..runner() };
        let waiter = Waiter { priority: 0, waited_ms: PATIENCE_MS, has: 0, key: 1.0, soon: false };
        assert_eq!(victim(&waiter, &[Runner { surplus: 2.0, ..other }, other]), Some(1));
        assert_eq!(victim(&Waiter { has: 1, ..waiter }, &[other]), None);
        assert_eq!(victim(&Waiter { waited_ms: PATIENCE_MS - 1, ..waiter }, &[other]), None);
        assert_eq!(victim(&waiter, &[Runner { surplus: 0.5, ..other }]), None, "its part is its own");
        assert_eq!(victim(&waiter, &[Runner { key: 0.5, ..other }]), None, "it has used less");
        assert_eq!(victim(&Waiter { soon: true, ..waiter }, &[other]), None, "its turn comes soon");
    }

    proptest! {
        #[test]
        fn nobody_gives_way_who_need_not(
            priority in 0..3i32, waited_ms in 0..120_000i64, has in 0..2u32, soon in any::<bool>(),
            runners in prop::collection::vec(any_runner(), 0..8)
        ) {
            if let Some(i) = victim(&Waiter { priority, waited_ms, has, key: 2.0, soon }, &runners) {
                let runner = runners[i];
                prop_assert!(runner.denoises && runner.preemptions < MAX_PREEMPTIONS);
                prop_assert!(runner.left.is_none_or(|left| left > SOON));
                if runner.same_tenant {
                    prop_assert!(runner.priority < priority);
                } else {
                    prop_assert!(has == 0 && !soon && runner.surplus >= 0.0 && runner.key > 2.0);
                }
            }
        }
    }
}
