//! Which queued jobs get which free devices: one pass over the queue in each tick.
//!
//! Tenants by what they have used of their share, least first. Within a tenant by priority, then shortest first, but a
//! job is never overtaken by one that was submitted later than [`STRETCH`] times its own predicted time. How many
//! devices a clip gets is the rule in [`super::gang`]; a gang is of one node, and it is taken and given back as a whole.
//! A job that needs more devices than any node has free has one kept for it ([`super::reserve`]).

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::ops::Bound;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use farm_core::id::{JobId, NodeId};

use super::class::{Class, ClassIx};
use super::effects::Effects;
use super::farm::{Farm, Node, Slot};
use super::fit::Fit;
use super::lend::{Blocked, Round};
use super::planted::{Bug, planted};
use super::stock::Filed;
use super::tenant::{Place, TenantIx};

/// Jobs that start in one tick at most; the next tick goes on.
pub const MAX_PICKS: usize = 2048;
/// Attempts on a node for each of its devices. Those that only upload have none, but they may pile up where the store is
/// slow, and a node does not take on any number.
const MAX_LEASES: usize = 4;
/// An attempt without a prediction is charged so many seconds on each device until it ends.
pub(super) const UNKNOWN_SECONDS: f64 = 60.0;
/// The queue is looked at so often even if nothing has happened.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A job waits for shorter ones that come within so many times its own predicted time after it, and for no later ones.
const STRETCH: f64 = 100.0;

/// The next job of a class of a tenant.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub place: Place,
    pub class: ClassIx,
    /// When its turn comes, in milliseconds since 1970.
    pub due: f64,
}

impl Head {
    fn rank(&self) -> (Reverse<i32>, f64, u64) {
        (self.place.0, self.due, self.place.2)
    }
}

impl Ord for Head {
    /// The greatest goes first.
    fn cmp(&self, other: &Self) -> Ordering {
        let ((priority, due, seq), (other_priority, other_due, other_seq)) = (self.rank(), other.rank());
        other_priority.cmp(&priority).then(other_due.total_cmp(&due)).then(other_seq.cmp(&seq))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Head {}

/// A tenant in a pass. The greatest goes first: the one that has used least of its share.
#[derive(Debug)]
pub(super) struct Turn {
    pub key: f64,
    pub tenant: TenantIx,
    pub heads: BinaryHeap<Head>,
}

impl Turn {
    fn rank(&self) -> (f64, Option<&Head>) {
        (self.key, self.heads.peek())
    }
}

impl Ord for Turn {
    fn cmp(&self, other: &Self) -> Ordering {
        let ((key, head), (other_key, other_head)) = (self.rank(), other.rank());
        let by_head = match (head, other_head) {
            (Some(a), Some(b)) => b.place.2.cmp(&a.place.2),
            (a, b) => a.is_some().cmp(&b.is_some()),
        };
        other_key.total_cmp(&key).then(by_head).then(other.tenant.cmp(&self.tenant))
    }
}

impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Turn {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Turn {}

impl Farm {
    /// Picks jobs for the devices that are free and asks for their requests.
    pub(super) fn plan(&mut self, fx: &mut Effects) {
        if !self.picked.is_empty() {
            return;
        }
        self.refile_all();
        if self.now >= self.look_again {
            self.replan = true;
        }
        if self.is_in_window() || self.paused || !std::mem::take(&mut self.replan) {
            return;
        }
        self.refresh_reservations();
        let mut round = self.round();
        self.start_kept(&mut round);
        let mut turns = self.turns(&mut round.fits);
        while self.picked.len() < MAX_PICKS
            && let Some(mut turn) = turns.pop()
        {
            let Some(head) = turn.heads.pop() else { continue };
            let tenant = turn.tenant;
            let goes_on = match self.try_start(&mut round, tenant, &head) {
                Ok(()) => true,
                Err(Blocked::Job) => true,
                Err(Blocked::Quota) => false,
                Err(Blocked::Class) => {
                    if round.unlucky.iter().all(|(unlucky, _)| *unlucky != tenant) {
                        round.unlucky.push((tenant, head.clone()));
                    }
                    false
                }
            };
            if goes_on && let Some(next) = self.next_head(tenant, &head) {
                turn.heads.push(next);
            }
            turn.key = self.tenants[tenant.0 as usize].key();
            if !turn.heads.is_empty() {
                turns.push(turn);
            }
        }
        if self.picked.len() >= MAX_PICKS {
            self.replan = true;
        }
        fx.load.extend(self.picked.iter().copied());
        // Patience ends, and quotas of device-seconds are by the hour.
        self.look_again = self.now + LOOK_AGAIN;
        self.preempt(&round.unlucky, fx);
    }

    /// Jobs that nodes are kept for go first, wherever they are in their queues: those before them may wait for just these
    /// nodes.
    fn start_kept(&mut self, round: &mut Round) {
        let kept: Vec<JobId> = self.reservations.iter().map(|(job, _)| job).collect();
        for id in kept {
            let Some(job) = self.jobs.get(&id) else { continue };
            let (tenant, class, place) = (job.tenant, job.class, job.place(id));
            let work = self.fit_in(&mut round.fits, class).work;
            // If not, its turn comes.
            let _ = self.try_start(round, tenant, &head(place, class, work));
        }
    }

    /// Something has happened since the last tick that may let a queued job start: the next one need not wait for its time.
    pub fn wants_tick(&self) -> bool {
        self.replan && !self.paused && !self.is_in_window()
    }

    fn round(&mut self) -> Round {
        let mut round = Round::default();
        for (ix, group) in self.stock.groups() {
            round.free_at_start.insert(ix, group.free().to_vec());
        }
        let waiting: Vec<(ClassIx, u64)> = self.classes.waiting().collect();
        for (class, jobs) in waiting {
            let fit = self.fit_in(&mut round.fits, class);
            for choice in &fit.choices {
                *round.waiting.entry(choice.group).or_default() += jobs as usize;
            }
        }
        round
    }

    /// Where jobs of the class can run.
    pub(super) fn fit(&self, ix: ClassIx) -> Fit {
        let only_model = self.only_model();
        self.fits.borrow_mut().fit(ix, self.classes.get(ix), only_model.as_ref(), &self.stock, &self.rates)
    }

    /// Likewise of a class that no job is of.
    pub(super) fn fit_of(&self, class: &Class) -> Fit {
        self.fits.borrow_mut().fit_anew(class, self.only_model().as_ref(), &self.stock, &self.rates)
    }

    pub(super) fn fit_in(&self, fits: &mut HashMap<ClassIx, Rc<Fit>>, ix: ClassIx) -> Rc<Fit> {
        if let Some(fit) = fits.get(&ix) {
            return fit.clone();
        }
        let fit = Rc::new(self.fit(ix));
        fits.insert(ix, fit.clone());
        fit
    }

    /// The tenants that have jobs to start, with the first of each class.
    fn turns(&self, fits: &mut HashMap<ClassIx, Rc<Fit>>) -> BinaryHeap<Turn> {
        let mut turns = BinaryHeap::new();
        for i in 0..self.tenants.len() {
            let tenant = &self.tenants[i];
            if tenant.paused || tenant.waiting.is_empty() {
                continue;
            }
            let (key, ix) = (tenant.key(), TenantIx(i as u32));
            let firsts: Vec<(ClassIx, Place)> =
                tenant.waiting.iter().filter_map(|(class, jobs)| Some((*class, *jobs.first()?))).collect();
            let heads = firsts.into_iter().map(|(class, place)| {
                let work = self.fit_in(fits, class).work;
                head(place, class, work)
            });
            turns.push(Turn { key, tenant: ix, heads: heads.collect() });
        }
        turns
    }

    /// The job of the same class after `head`.
    fn next_head(&self, tenant: TenantIx, of: &Head) -> Option<Head> {
        let jobs = self.tenants[tenant.0 as usize].waiting.get(&of.class)?;
        let place = jobs.range((Bound::Excluded(of.place), Bound::Unbounded)).next()?;
        // The same class takes the same time.
        Some(Head { place: *place, class: of.class, due: of.due + (place.1 - of.place.1) as f64 })
    }

    /// The name of the only model that clips are rendered with, if there is exactly one.
    pub(super) fn only_model(&self) -> Option<Arc<str>> {
        let mut names = self.models.iter().filter(|(_, known)| known.renderers > 0).map(|(name, _)| name);
        let first = names.next()?;
        names.next().is_none().then(|| first.clone())
    }

    /// This scheduler has just begun, and attempts run of which it has not heard yet: their devices come back with their
    /// nodes.
    pub(super) fn is_in_window(&self) -> bool {
        self.now < self.window_ends && !self.orphans.is_empty()
    }

    /// Nothing but its devices keeps the node from starting clips.
    pub(super) fn is_open(&self, id: &NodeId, node: &Node) -> bool {
        node.roles.denoise && self.is_alive(node) && self.closed(id, node).is_none()
    }

    /// As [`Self::is_open`], and it takes on another attempt.
    pub(super) fn starts_clips(&self, id: &NodeId, node: &Node) -> bool {
        self.is_open(id, node) && node.leases.len() < MAX_LEASES * node.devices.len()
    }

    /// Why a node that is there gets no new work.
    pub(super) fn closed(&self, id: &NodeId, node: &Node) -> Option<String> {
        if let Some(reason) = &node.leaving {
            return Some(format!("leaving: {reason}"));
        }
        self.barred(id)
    }

    /// What is held against a node of this name, whether it is there or not.
    pub(super) fn barred(&self, id: &NodeId) -> Option<String> {
        if self.drained.contains(id) && !planted(Bug::DrainForgotten) {
            return Some("drained".to_owned());
        }
        let (left, why) = self.health.get(id)?.quarantine(self.now)?;
        Some(format!("in quarantine for {} s: {why}", left.as_secs()))
    }

    fn refile_all(&mut self) {
        let ids: Vec<NodeId> = self
            .nodes
            .iter()
            .filter(|(id, node)| node.filed != self.file_of(id, node))
            .map(|(id, _)| id.clone())
            .collect();
        if !ids.is_empty() {
            self.replan = true;
        }
        for id in ids {
            self.refile(&id);
        }
    }

    /// Files a node anew after something of it has changed.
    pub(super) fn refile(&mut self, id: &NodeId) {
        let Some(node) = self.nodes.get(id) else { return };
        let new = self.file_of(id, node);
        if let Some(node) = self.nodes.get_mut(id) {
            self.stock.file(id, node.group, &mut node.filed, new);
        }
    }

    fn file_of(&self, id: &NodeId, node: &Node) -> Option<Filed> {
        let free = node.devices.iter().filter(|device| device.slot == Slot::Free).count();
        let open = free > 0 && self.reservations.holder(id).is_none() && self.starts_clips(id, node);
        open.then(|| (node.warm.clone(), free))
    }
}

pub(super) fn head(place: Place, class: ClassIx, work: f64) -> Head {
    Head { place, class, due: place.1 as f64 + 1000.0 * STRETCH * work }
}

pub(super) fn has_labels(node: Option<&Node>, class: &Class) -> bool {
    let has = |node: &Node| class.require.iter().all(|(name, value)| node.labels.get(name) == Some(value));
    class.require.is_empty() || node.is_some_and(has)
}
