//! Which queued jobs get which free devices: one pass over the queue in each tick.
//!
//! Tenants by what they have used of their share, least first. Within a tenant by priority, then shortest first, but a
//! job is never overtaken by one that was submitted later than [`STRETCH`] times its own predicted time. How many
//! devices a clip gets is the rule in [`super::gang`]; a gang is of one node, and it is taken and given back as a whole.
//! A job that needs more devices than any node has free has one kept for it ([`super::reserve`]).

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::ops::Bound;
use std::rc::Rc;
use std::sync::Arc;

use farm_core::id::{DeviceIndex, JobId, NodeId};

use super::class::{Class, ClassIx};
use super::effects::Effects;
use super::events::Time;
use super::farm::{Bill, Farm, Job, Node, Phase, Pick, Slot};
use super::fit::{Choice, Fit};
use super::gang::{Grant, Load, grant};
use super::planted::{Bug, planted};
use super::reserve::Reservation;
use super::stock::{Found, GroupIx};
use super::tenant::{Place, TenantIx};

/// Jobs that start in one tick at most; the next tick goes on.
pub const MAX_PICKS: usize = 2048;
/// Attempts on a node for each of its devices. Those that only upload have none, but they may pile up where the store is
/// slow, and a node does not take on any number.
const MAX_LEASES: usize = 4;
/// An attempt without a prediction is charged so many seconds on each device until it ends.
pub(super) const UNKNOWN_SECONDS: f64 = 60.0;
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

/// One pass over the queue.
#[derive(Default)]
struct Round {
    fits: HashMap<ClassIx, Rc<Fit>>,
    /// Nodes of each group by free devices when the pass began.
    free_at_start: HashMap<GroupIx, Vec<usize>>,
    /// Jobs that wait for each group's devices, and those that the pass has started on them.
    waiting: HashMap<GroupIx, usize>,
    started: HashMap<GroupIx, usize>,
    /// Nothing more of these can start.
    blocked: HashSet<ClassIx>,
    /// The first job of each tenant that has found no device.
    unlucky: Vec<(TenantIx, Head)>,
}

/// Why a job gets no devices in this pass.
enum Blocked {
    /// No more devices for its class.
    Class,
    /// Its tenant may have no more.
    Quota,
    /// It waits for a node that is kept for it, or for its own sake; others of its class may still start.
    Job,
}

impl Farm {
    /// Picks jobs for the devices that are free and asks for their requests.
    pub(super) fn plan(&mut self, fx: &mut Effects) {
        if !self.picked.is_empty() {
            return;
        }
        self.refile_all();
        if self.is_in_window() || !std::mem::take(&mut self.replan) || self.paused {
            return;
        }
        self.refresh_reservations();
        let mut round = self.round();
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
        self.preempt(&round.unlucky, fx);
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

    fn fit_in(&self, fits: &mut HashMap<ClassIx, Rc<Fit>>, ix: ClassIx) -> Rc<Fit> {
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

    fn try_start(&mut self, round: &mut Round, tenant: TenantIx, head: &Head) -> Result<(), Blocked> {
        if round.blocked.contains(&head.class) {
            return Err(Blocked::Class);
        }
        let id = head.place.3;
        let Some(job) = self.jobs.get(&id) else { return Err(Blocked::Job) };
        let least = job.counts.least_devices.max(1) as usize;
        let avoid = job.avoid.clone();
        let fit = self.fit_in(&mut round.fits, head.class);
        let Some(model) = fit.model.clone() else {
            round.blocked.insert(head.class);
            return Err(Blocked::Class);
        };
        let of_tenant = &self.tenants[tenant.0 as usize];
        let most =
            of_tenant.quota().devices.map_or(usize::MAX, |most| (most.saturating_sub(of_tenant.devices)) as usize);
        // Not blocked for others: the quota is this tenant's.
        if most == 0 || (fit.work > 0.0 && !of_tenant.may_use(fit.work, self.hour())) {
            return Err(Blocked::Quota);
        }
        let class = self.classes.get(head.class).clone();
        if let Some(reservation) = self.reservations.get(id).cloned() {
            return self.start_reserved(round, head, &fit, &model, reservation, most);
        }
        // Soonest done; of equals, where most is free.
        let mut best: Option<((f64, Reverse<usize>), NodeId, usize, usize)> = None;
        let mut needed = usize::MAX;
        for (i, choice) in fit.choices.iter().enumerate() {
            let found = self.find(round, &fit, choice, &class, &model, (least, most), avoid.as_ref());
            match found {
                Ok((Found { node, free, warm }, devices)) => {
                    let seconds = choice.seconds_on(devices).unwrap_or(f64::MAX);
                    let score = (seconds + if warm { 0.0 } else { choice.load }, Reverse(free));
                    if best.as_ref().is_none_or(|(known, ..)| score < *known) {
                        best = Some((score, node.clone(), devices, i));
                    }
                }
                Err(Some(devices)) => needed = needed.min(devices),
                Err(None) => {}
            }
        }
        if let Some((_, node, devices, i)) = best {
            self.pick(round, tenant, head, &node, devices, &fit, i, &model);
            return Ok(());
        }
        if let Some((node, devices, i)) = self.backfill(&fit, &class, least, most) {
            self.pick(round, tenant, head, &node, devices, &fit, i, &model);
            return Ok(());
        }
        if needed != usize::MAX && needed <= most && !self.reservations.is_full() {
            self.reserve(id, &fit, &class, needed);
            return Err(Blocked::Job);
        }
        // Another of its class may want fewer devices, or another node.
        if least > 1 || most != usize::MAX {
            return Err(Blocked::Class);
        }
        round.blocked.insert(head.class);
        Err(Blocked::Class)
    }

    /// The node of a group for a job, and how many devices. Else how many devices it would need of one node, if nothing but
    /// their number is amiss.
    #[allow(clippy::too_many_arguments)] // all of one pass over a small table
    fn find<'a>(
        &'a self,
        round: &Round,
        fit: &Fit,
        choice: &Choice,
        class: &Class,
        model: &Arc<str>,
        (least, most): (usize, usize),
        avoid: Option<&NodeId>,
    ) -> Result<(Found<'a>, usize), Option<usize>> {
        let group = self.stock.group(choice.group);
        let mut seconds = choice.sizes.base.clone();
        // Sizes of which nothing sensible is predicted count as not predicted; relations are those of the rates.
        seconds.iter_mut().take(least - 1).for_each(|seconds| *seconds = None);
        let free_most = group.most_free().min(most);
        if free_most == 0 {
            let possible =
                |k: &usize| !choice.sizes.rated || choice.sizes.base.get(*k - 1).copied().flatten().is_some();
            return Err((least..=group.spec.devices).find(possible).filter(|k| *k > 1));
        }
        let load = |free_of: &dyn Fn(GroupIx) -> Vec<usize>, waiting: usize| {
            let mut nodes = vec![0; free_most + 1];
            for other in &fit.choices {
                for (free, count) in free_of(other.group).into_iter().enumerate() {
                    nodes[free.min(free_most)] += count;
                }
            }
            Load { free: nodes, waiting }
        };
        let waiting = round.waiting.get(&choice.group).copied().unwrap_or(1).max(1);
        let started = round.started.get(&choice.group).copied().unwrap_or(0);
        let at_start = |ix: GroupIx| round.free_at_start.get(&ix).cloned().unwrap_or_default();
        let start = load(&at_start, waiting + started);
        let now = load(&|ix| self.stock.group(ix).free().to_vec(), waiting);
        let granted = if choice.sizes.rated { grant(&start, &now, &seconds) } else { Grant::Devices(1) };
        let devices = match granted {
            Grant::Devices(devices) if devices >= least => devices,
            // Nothing is predicted for so many: it is tried.
            Grant::Devices(_) if least <= free_most => least,
            Grant::Devices(_) => return Err(Some(least).filter(|least| *least <= group.spec.devices)),
            Grant::Needs(devices) => return Err(Some(devices).filter(|devices| *devices <= group.spec.devices)),
        };
        let labelled = |id: &NodeId| has_labels(self.nodes.get(id), class);
        // Fewer devices than granted, where the labels leave no node with so many.
        for devices in (least..=devices).rev() {
            let found = group.find(devices, model, |id| Some(id) != avoid && labelled(id));
            if let Some(found) = found.or_else(|| group.find(devices, model, labelled)) {
                return Ok((found, devices));
            }
            if class.require.is_empty() {
                break;
            }
        }
        Err(None)
    }

    /// A node that is kept for another job but has devices free, for a job that ends before they are needed.
    fn backfill(&self, fit: &Fit, class: &Class, least: usize, most: usize) -> Option<(NodeId, usize, usize)> {
        for (_, reservation) in self.reservations.iter() {
            let Some(node) =
                self.nodes.get(&reservation.node).filter(|node| self.starts_clips(&reservation.node, node))
            else {
                continue;
            };
            let free = node.free_devices().count();
            let (Some(at), Some(i)) =
                (reservation.at, fit.choices.iter().position(|choice| choice.group == node.group))
            else {
                continue;
            };
            let choice = &fit.choices[i];
            let size = (least..=free.min(most)).find(|k| choice.seconds_on(*k).is_some());
            if let Some(size) = size.filter(|_| has_labels(Some(node), class))
                && let Some(seconds) = choice.seconds_on(size)
                && self.clock() + seconds + choice.load <= at.0.as_secs_f64()
            {
                return Some((reservation.node.clone(), size, i));
            }
        }
        None
    }

    /// The node that is kept for the job, if it has enough devices free now.
    fn start_reserved(
        &mut self,
        round: &mut Round,
        head: &Head,
        fit: &Fit,
        model: &Arc<str>,
        reservation: Reservation,
        most: usize,
    ) -> Result<(), Blocked> {
        let Reservation { node: id, devices, .. } = reservation;
        let ready = self.nodes.get(&id).filter(|node| self.starts_clips(&id, node));
        let ready = ready.filter(|node| node.free_devices().count() >= devices && devices <= most);
        let choice = ready.and_then(|node| fit.choices.iter().position(|choice| choice.group == node.group));
        let Some(i) = choice else { return Err(Blocked::Job) };
        let Some(tenant) = self.jobs.get(&head.place.3).map(|job| job.tenant) else { return Err(Blocked::Job) };
        self.pick(round, tenant, head, &id, devices, fit, i, model);
        Ok(())
    }

    /// Keeps the node for the job that is expected to have enough devices free first.
    fn reserve(&mut self, id: JobId, fit: &Fit, class: &Class, devices: usize) {
        let mut best: Option<(Option<Time>, NodeId)> = None;
        for choice in &fit.choices {
            let group = self.stock.group(choice.group);
            if group.spec.devices < devices {
                continue;
            }
            for node_id in &group.nodes {
                let Some(node) = self.nodes.get(node_id) else { continue };
                let taken = self.reservations.holder(node_id).is_some();
                if taken || !self.is_open(node_id, node) || !has_labels(Some(node), class) {
                    continue;
                }
                let at = self.free_at(node, devices);
                // Unknown is later than any time.
                let key = |at: Option<Time>| at.unwrap_or(Time(std::time::Duration::MAX));
                if best.as_ref().is_none_or(|(known, _)| key(at) < key(*known)) {
                    best = Some((at, node_id.clone()));
                }
            }
        }
        let Some((at, node)) = best else { return };
        self.reservations.keep(id, Reservation { node: node.clone(), devices, at });
        self.refile(&node);
    }

    fn refresh_reservations(&mut self) {
        let kept: Vec<(JobId, NodeId, usize)> =
            self.reservations.iter().map(|(job, kept)| (job, kept.node.clone(), kept.devices)).collect();
        for (job, id, devices) in kept {
            match self.nodes.get(&id).filter(|node| self.is_open(&id, node)) {
                Some(node) => {
                    let at = self.free_at(node, devices);
                    self.reservations.expect(job, at);
                }
                None => self.reservations.drop_job(job),
            }
        }
    }

    /// When the node is expected to have so many devices free.
    fn free_at(&self, node: &Node, devices: usize) -> Option<Time> {
        let mut times = Vec::new();
        for device in &node.devices {
            times.push(match &device.slot {
                Slot::Free => Some(self.now),
                Slot::Leased(job) => self.expected_end(*job),
                Slot::Helping(_) | Slot::Stopping(_) => None,
            });
        }
        // Unknown ones last.
        times.sort_by_key(|at| at.map_or((1, Time::default()), |at| (0, at)));
        times.get(devices.checked_sub(1)?).copied().flatten()
    }

    /// When a running job is expected to end.
    pub(super) fn expected_end(&self, id: JobId) -> Option<Time> {
        let Job { phase: Phase::Running(lease), .. } = self.jobs.get(&id)? else { return None };
        if let Some(left) = lease.progress.and_then(|progress| progress.eta_seconds).filter(|left| left.is_finite()) {
            return Some(lease.moved.max(self.now) + std::time::Duration::from_secs_f32(left.clamp(0.0, 1e7)));
        }
        let total = std::time::Duration::try_from_secs_f64(lease.bill.expected?).ok()?;
        Some((lease.bill.since + total.saturating_sub(lease.bill.before)).max(self.now))
    }

    #[allow(clippy::too_many_arguments)] // what was decided, all of it
    fn pick(
        &mut self,
        round: &mut Round,
        tenant: TenantIx,
        head: &Head,
        node_id: &NodeId,
        count: usize,
        fit: &Fit,
        choice: usize,
        model: &Arc<str>,
    ) {
        let (id, choice) = (head.place.3, &fit.choices[choice]);
        self.unqueue(id);
        let Some(node) = self.nodes.get_mut(node_id) else { return };
        let devices: Vec<DeviceIndex> = node.free_devices().take(count).collect();
        let taken = if planted(Bug::GangHalfGranted) { 1 } else { devices.len() };
        for device in &devices[..taken] {
            node.devices[device.0 as usize].slot = Slot::Leased(id);
        }
        node.leases.insert(id);
        let base = choice.sizes.base.get(count - 1).copied().flatten().filter(|base| base.is_finite()).unwrap_or(0.0);
        let expected = choice.seconds_on(count);
        let topology = choice.sizes.topology(count);
        let charged = expected.unwrap_or(UNKNOWN_SECONDS) * count as f64;
        let bill = Bill { size: count, since: self.now, base, expected, charged, ..Bill::default() };
        let pick = Pick { node: node_id.clone(), devices, topology, model: model.clone(), bill };
        let at = self.clock();
        let of_tenant = &mut self.tenants[tenant.0 as usize];
        of_tenant.devices += count as u32;
        of_tenant.running += 1;
        of_tenant.usage.begin(charged, at);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.phase = Phase::Picked(Box::new(pick));
        self.picked.push(id);
        self.reservations.drop_job(id);
        for other in &fit.choices {
            if let Some(waiting) = round.waiting.get_mut(&other.group) {
                *waiting = waiting.saturating_sub(1);
            }
            *round.started.entry(other.group).or_default() += 1;
        }
        self.refile(node_id);
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
    fn starts_clips(&self, id: &NodeId, node: &Node) -> bool {
        self.is_open(id, node) && node.leases.len() < MAX_LEASES * node.devices.len()
    }

    /// Why a node that is there gets no new work.
    pub(super) fn closed(&self, id: &NodeId, node: &Node) -> Option<String> {
        if let Some(reason) = &node.leaving {
            return Some(format!("leaving: {reason}"));
        }
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
    fn refile(&mut self, id: &NodeId) {
        let Some(node) = self.nodes.get(id) else { return };
        let new = self.file_of(id, node);
        if let Some(node) = self.nodes.get_mut(id) {
            self.stock.file(id, node.group, &mut node.filed, new);
        }
    }

    fn file_of(&self, id: &NodeId, node: &Node) -> Option<super::stock::Filed> {
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
