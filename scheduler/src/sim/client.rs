//! People: they submit, cancel, retry, pause, drain, set quotas; and ask again when nobody answers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use farm_core::api::{Quota, TenantSpec};
use farm_core::id::{AttemptNo, JobId, SubmissionId};
use uuid::Uuid;

use super::Ms;
use super::plan::Trait;
use super::scheduler::Inbound;
use super::store::{NewBatch, NewJob, Refused, index_of};
use super::world::{Due, World};
use crate::core::events::{Counts, Dependency, LiveJob, Scope, Wish};

/// Whoever has no answer by then asks again.
const PATIENCE: Ms = 10_000;
const AGAIN: Ms = 1_000;
/// Wishes are given up after so many tries; submissions never.
const TRIES: u32 = 30;

/// What has to be read of the store first.
#[derive(Clone, Debug)]
pub enum Order {
    Wish(Box<Wish>),
    Retry(JobId),
}

#[derive(Clone)]
pub enum Ask {
    /// A new submission, made up when its time comes.
    New,
    Submit(NewBatch),
    /// Anything else, made up when its time comes.
    Any,
    Order(Order),
}

#[derive(Clone)]
pub struct Call {
    pub number: u64,
    pub ask: Ask,
    pub tries: u32,
}

#[derive(Default)]
pub struct Clients {
    calls: u64,
    submissions: u64,
    keys: u64,
    answered: BTreeSet<u64>,
    /// Submissions that were not answered yet.
    pub open: BTreeSet<u64>,
}

impl World {
    pub fn prepare_clients(&mut self) {
        for at in std::mem::take(&mut self.plan.submissions) {
            let number = self.new_call();
            self.clients.open.insert(number);
            self.at(at, Due::Call(Box::new(Call { number, ask: Ask::New, tries: 0 })));
        }
        for at in std::mem::take(&mut self.plan.wishes) {
            let number = self.new_call();
            self.at(at, Due::Call(Box::new(Call { number, ask: Ask::Any, tries: 0 })));
        }
    }

    fn new_call(&mut self) -> u64 {
        self.clients.calls += 1;
        self.clients.calls
    }

    pub fn wish_for(&mut self, wish: Wish, delay: Ms) {
        let number = self.new_call();
        self.after(delay, Due::Call(Box::new(Call { number, ask: Ask::Order(Order::Wish(Box::new(wish))), tries: 0 })));
    }

    pub fn answered(&mut self, call: u64) {
        self.clients.answered.insert(call);
        self.clients.open.remove(&call);
    }

    pub fn call(&mut self, call: Call) {
        let Call { number, ask, tries } = call;
        if self.clients.answered.contains(&number) {
            return;
        }
        let ask = match ask {
            Ask::New => Ask::Submit(self.new_batch()),
            Ask::Any => match self.any_order() {
                Some(order) => Ask::Order(order),
                None => return,
            },
            known => known,
        };
        let again = |delay: Ms, world: &mut Self| {
            if matches!(ask, Ask::Submit(_)) || tries < TRIES {
                let call = Call { number, ask: ask.clone(), tries: tries + 1 };
                world.after(delay, Due::Call(Box::new(call)));
            }
        };
        let Some(scheduler) = self.reached() else { return again(AGAIN, self) };
        let reign = self.schedulers[scheduler].reign;
        again(PATIENCE, self);
        match ask.clone() {
            Ask::Submit(batch)
                if batch.jobs.iter().any(|job| !job.live.after.is_empty() || !job.after_lines.is_empty()) =>
            {
                self.inbound(scheduler, reign, Inbound::Commit(Box::new(batch), number));
            }
            Ask::Submit(batch) => self.commit_beside(scheduler, number, batch),
            Ask::Order(order) => {
                self.note(|| format!("order {order:?}"));
                self.inbound(scheduler, reign, Inbound::Order(order, number));
            }
            Ask::New | Ask::Any => {}
        }
    }

    /// Long files are committed beside the actor, which is told after.
    fn commit_beside(&mut self, scheduler: usize, number: u64, batch: NewBatch) {
        let (now, wall) = (self.now, self.schedulers[scheduler].wall(self.now));
        let cut = self.database_down > now || self.schedulers[scheduler].cut > now;
        let reign = self.schedulers[scheduler].reign;
        let Some(lead) = self.schedulers[scheduler].lead.as_mut().filter(|lead| !lead.rows_taken && !cut) else {
            return;
        };
        match self.store.commit(lead.epoch, batch, wall) {
            Ok(submitted) => {
                lead.rows_taken = true;
                let what = Box::new(Inbound::Submitted(Box::new(submitted), number));
                let takes = self.random.span(5, 500);
                self.after(takes, Due::Inbound { scheduler, reign, what });
            }
            Err(Refused::User(_)) => self.answered(number),
            Err(Refused::Superseded) => {}
            Err(Refused::Broken(invariant, text)) => self.fail(invariant, text),
        }
    }

    fn new_batch(&mut self) -> NewBatch {
        self.clients.submissions += 1;
        let submission = SubmissionId(Uuid::from_u128((1 << 64) | u128::from(self.clients.submissions)));
        let first = self.plan.flood && self.random.chance(0.85);
        let tenants = if first { 1 } else { self.plan.tenants.len() as u64 };
        let tenant = self.plan.tenants[self.random.below(tenants) as usize].clone();
        let lines = if self.plan.large { self.plan.lines } else { self.random.between(1, self.plan.lines) };
        let known = self.store.rows.len() as u64;
        let after_batch = self.random.chance(0.1).then(|| self.some_batch()).flatten();
        let require_some = self.random.chance(0.2);
        let gpus: &[&str] = if self.plan.large { &["h100"] } else { &["h100", "a100"] };
        let mut jobs = Vec::new();
        for line in 0..lines {
            let kind = self.random.pick_of(&self.plan.kinds).clone();
            // Some lines are jobs of earlier submissions.
            let old = self.random.chance(0.05).then(|| self.random.below(self.clients.keys + 1));
            self.clients.keys += u64::from(old.is_none());
            let key = old.unwrap_or(self.clients.keys);
            let mut after: Vec<Dependency> = after_batch.into_iter().map(Dependency::Batch).collect();
            if known > 0 && !self.plan.large && self.random.chance(0.05) {
                after.push(Dependency::Job(super::store::job_id(self.random.below(known) as usize)));
            }
            let after_line = line > 0 && !self.plan.large && self.random.chance(0.1);
            let after_lines = if after_line { vec![self.random.below(line) as usize] } else { Vec::new() };
            let mut require = BTreeMap::new();
            if require_some && self.random.chance(0.5) {
                require.insert("gpu".to_owned(), self.random.pick(gpus).to_owned());
            }
            let odd = [Trait::Poison, Trait::Bad, Trait::Large(2), Trait::Large(4), Trait::LargeTiles];
            let is = if self.random.chance(self.plan.odd) { self.random.pick(&odd) } else { Trait::Plain };
            let live = LiveJob {
                job: super::store::job_id(0),
                seq: 0,
                priority: self.random.pick(&[0, 0, 0, 1, 5]),
                model: kind.model.clone(),
                tenant: tenant.clone(),
                batches: Vec::new(),
                ask: kind.ask,
                require,
                after,
                paused: false,
                submitted_ms: 0,
                attempt: AttemptNo(0),
                counts: Counts::default(),
                running: None,
            };
            jobs.push(NewJob { key, request: Arc::clone(&kind.request), live, after_lines, is });
        }
        let max_failures = self.random.chance(0.3).then(|| self.random.below(3) as u32);
        let max_queued = self.store.tenants.get(&tenant).and_then(|(spec, _)| spec.quota.queued);
        self.mix(&[5, lines]);
        NewBatch { submission, max_failures, jobs, max_queued }
    }

    fn some_batch(&mut self) -> Option<SubmissionId> {
        let batches = self.store.batches.len() as u64;
        self.store.batches.keys().nth(self.random.below(batches) as usize).copied()
    }

    fn some_job(&mut self) -> Option<JobId> {
        let jobs = self.store.rows.len() as u64;
        (jobs > 0).then(|| super::store::job_id(self.random.below(jobs) as usize))
    }

    fn any_order(&mut self) -> Option<Order> {
        let tenant = self.random.pick_of(&self.plan.tenants).clone();
        let node = self.nodes[self.random.below(self.nodes.len() as u64) as usize].id.clone();
        let scope = match self.random.below(6) {
            0 => Scope::Farm,
            1 | 2 => Scope::Tenant(tenant.clone()),
            3 => Scope::Batch(self.some_batch()?),
            _ => Scope::Job(self.some_job()?),
        };
        let back = self.random.chance(0.7).then(|| self.random.between(1_000, 30_000));
        Some(match self.random.below(9) {
            0 | 1 => Order::Wish(Box::new(Wish::Cancel(self.some_job()?))),
            2 => Order::Wish(Box::new(Wish::CancelBatch(self.some_batch()?))),
            3 => Order::Retry(self.some_job()?),
            4 | 5 => {
                if let Some(delay) = back {
                    self.wish_for(Wish::Resume(scope.clone()), delay);
                }
                Order::Wish(Box::new(Wish::Pause(scope)))
            }
            6 | 7 => {
                if let Some(delay) = back {
                    self.wish_for(Wish::Undrain(node.clone()), delay);
                }
                Order::Wish(Box::new(Wish::Drain(node)))
            }
            _ => {
                let limited =
                    |world: &mut Self, least, most| world.random.chance(0.5).then(|| world.random.between(least, most));
                let devices = limited(self, 1, 8).map(|devices| devices as u32);
                let quota = Quota { devices, queued: limited(self, 5, 60), device_seconds: limited(self, 30, 600) };
                let share = self.random.pick(&[0.5, 1.0, 4.0]);
                Order::Wish(Box::new(Wish::SetTenant(tenant, TenantSpec { share, quota })))
            }
        })
    }

    /// The job cannot be rendered on any node of this farm: somebody gives it up.
    pub fn give_up(&mut self, job: JobId) {
        if self.store.rows.get(index_of(job)).is_some() {
            self.wish_for(Wish::Cancel(job), 0);
        }
    }
}
