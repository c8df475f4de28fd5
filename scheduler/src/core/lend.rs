//! Devices for one job: where it would be done soonest, what is kept for it, and taking them.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use farm_core::id::{DeviceIndex, JobId, NodeId};
use rustc_hash::FxHashMap;

use super::class::{Class, ClassIx};
use super::events::Time;
use super::farm::{Bill, Farm, Job, Node, Phase, Pick, Slot};
use super::fit::{Choice, Fit};
use super::gang::{Grant, Load, grant};
use super::plan::{Head, UNKNOWN_SECONDS, has_labels};
use super::planted::{Bug, planted};
use super::reserve::Reservation;
use super::stock::{Found, GroupIx};
use super::tenant::TenantIx;

/// What the rule's choice for a pass depends on: class, group, devices needed, devices that can be had.
type Question = (ClassIx, GroupIx, usize, usize);

/// One pass over the queue.
#[derive(Default)]
pub(super) struct Round {
    pub fits: HashMap<ClassIx, Rc<Fit>>,
    /// Nodes of each group by free devices when the pass began.
    pub free_at_start: HashMap<GroupIx, Vec<usize>>,
    /// Jobs that wait for each group's devices, and those that the pass has started on them.
    pub waiting: HashMap<GroupIx, usize>,
    pub started: HashMap<GroupIx, usize>,
    /// The rule's choice for the whole pass.
    sizes: RefCell<FxHashMap<Question, Option<usize>>>,
    /// Nothing more of these can start.
    pub blocked: HashSet<ClassIx>,
    /// The first job of each tenant that has found no device.
    pub unlucky: Vec<(TenantIx, Head)>,
}

/// Why a job gets no devices in this pass.
pub(super) enum Blocked {
    /// No more devices for its class.
    Class,
    /// Its tenant may have no more.
    Quota,
    /// It waits for a node that is kept for it, or for its own sake; others of its class may still start.
    Job,
}

/// A job that asks for devices.
struct Case {
    job: JobId,
    tenant: TenantIx,
    ix: ClassIx,
    fit: Rc<Fit>,
    class: Arc<Class>,
    model: Arc<str>,
    /// Devices that it needs, and that its tenant may have.
    least: usize,
    most: usize,
    /// A node that failed it.
    avoid: Option<NodeId>,
}

/// Devices for it: so many of a node, by this choice of its fit.
struct Place {
    node: NodeId,
    devices: usize,
    choice: usize,
}

impl Farm {
    /// Gives the job devices if there are any for it.
    pub(super) fn try_start(&mut self, round: &mut Round, tenant: TenantIx, head: &Head) -> Result<(), Blocked> {
        let id = head.place.3;
        let kept = self.reservations.get(id).cloned();
        // The node that is kept for a job does not count for others of its class.
        if kept.is_none() && round.blocked.contains(&head.class) {
            return Err(Blocked::Class);
        }
        let fit = self.fit_in(&mut round.fits, head.class);
        let Some(case) = self.case(id, tenant, head.class, fit) else {
            round.blocked.insert(head.class);
            return Err(Blocked::Class);
        };
        let of_tenant = &self.tenants[tenant.0 as usize];
        // Not blocked for others: the quota is this tenant's.
        if case.most == 0 || !of_tenant.may_use(case.fit.work, self.hour()) {
            return Err(Blocked::Quota);
        }
        if let Some(place) = kept.as_ref().and_then(|kept| self.kept_place(&case, kept)) {
            return self.pick(round, &case, place);
        }
        if round.blocked.contains(&head.class) {
            return Err(Blocked::Job);
        }
        let needed = match self.best_place(round, &case) {
            Ok(place) => return self.pick(round, &case, place),
            Err(needed) => needed,
        };
        if kept.is_some() {
            return Err(Blocked::Job);
        }
        if let Some(place) = self.backfill(&case) {
            return self.pick(round, &case, place);
        }
        if let Some(devices) = needed.filter(|needed| *needed <= case.most)
            && !self.reservations.is_full()
        {
            self.reserve(&case, devices);
            return Err(Blocked::Job);
        }
        // Else another of its class may want fewer devices, or another node.
        if case.least <= 1 && case.most == usize::MAX {
            round.blocked.insert(head.class);
        }
        Err(Blocked::Class)
    }

    /// Nothing if it is unknown what model it means.
    fn case(&self, id: JobId, tenant: TenantIx, class: ClassIx, fit: Rc<Fit>) -> Option<Case> {
        let job = self.jobs.get(&id)?;
        let of_tenant = &self.tenants[tenant.0 as usize];
        let quota = of_tenant.quota().devices;
        Some(Case {
            job: id,
            tenant,
            ix: class,
            class: self.classes.get(class).clone(),
            model: fit.model.clone()?,
            fit,
            least: job.counts.least_devices.max(1) as usize,
            most: quota.map_or(usize::MAX, |most| most.saturating_sub(of_tenant.devices) as usize),
            avoid: job.avoid.clone(),
        })
    }

    /// Where the job would be done soonest; of equals, where most is free. Else how many devices it would need of one node,
    /// if nothing but their number is amiss.
    fn best_place(&self, round: &Round, case: &Case) -> Result<Place, Option<usize>> {
        let mut best: Option<((f64, Reverse<usize>), Place)> = None;
        let mut needed: Option<usize> = None;
        for (i, choice) in case.fit.choices.iter().enumerate() {
            match self.find(round, case, choice) {
                Ok((Found { node, free, warm }, devices)) => {
                    let seconds = choice.seconds_on(devices).unwrap_or(f64::MAX);
                    let score = (seconds + if warm { 0.0 } else { choice.load }, Reverse(free));
                    if best.as_ref().is_none_or(|(known, _)| score < *known) {
                        best = Some((score, Place { node: node.clone(), devices, choice: i }));
                    }
                }
                Err(of_group) => needed = needed.into_iter().chain(of_group).min(),
            }
        }
        best.map(|(_, place)| place).ok_or(needed)
    }

    /// The node of a group for a job, and how many devices; else as [`Self::best_place`].
    fn find<'a>(&'a self, round: &Round, case: &Case, choice: &Choice) -> Result<(Found<'a>, usize), Option<usize>> {
        let Case { class, model, least, most, .. } = case;
        let group = self.stock.group(choice.group);
        let free_most = group.most_free().min(*most);
        if free_most == 0 {
            let possible =
                |k: &usize| !choice.sizes.rated || choice.sizes.base.get(*k - 1).copied().flatten().is_some();
            return Err((*least..=group.spec.devices).find(possible).filter(|k| *k > 1));
        }
        let devices = match self.granted(round, case, choice, free_most) {
            Grant::Devices(devices) if devices >= *least => devices,
            // Nothing is predicted for so many: it is tried.
            Grant::Devices(_) if *least <= free_most => *least,
            Grant::Devices(_) => return Err(Some(*least).filter(|least| *least <= group.spec.devices)),
            Grant::Needs(devices) => return Err(Some(devices).filter(|devices| *devices <= group.spec.devices)),
        };
        if choice.sizes.topology(devices).is_none() {
            return Err(None);
        }
        let labelled = |id: &NodeId| has_labels(self.nodes.get(id), class);
        // Fewer devices than granted, where the labels leave no node with so many.
        for devices in (*least..=devices).rev() {
            let found = group.find(devices, model, |id| Some(id) != case.avoid.as_ref() && labelled(id));
            if let Some(found) = found.or_else(|| group.find(devices, model, labelled)) {
                return Ok((found, devices));
            }
            if class.require.is_empty() {
                break;
            }
        }
        Err(None)
    }

    /// The size of the job's gang by the rule in [`super::gang`].
    fn granted(&self, round: &Round, case: &Case, choice: &Choice, free_most: usize) -> Grant {
        if !choice.sizes.rated {
            return Grant::Devices(1);
        }
        let groups = || case.fit.choices.iter().map(|choice| choice.group);
        let counts = |free: &mut dyn Iterator<Item = &[usize]>| {
            let mut nodes = vec![0; free_most + 1];
            for (free, count) in free.flat_map(|of_group| of_group.iter().enumerate()) {
                nodes[free.min(free_most)] += count;
            }
            nodes
        };
        let waiting = round.waiting.get(&choice.group).copied().unwrap_or(1).max(1);
        let started = round.started.get(&choice.group).copied().unwrap_or(0);
        let seconds = || {
            let mut seconds = choice.sizes.base.clone();
            // Sizes of which nothing sensible is predicted count as not predicted; relations are those of the rates.
            seconds.iter_mut().take(case.least - 1).for_each(|seconds| *seconds = None);
            seconds
        };
        let start = || {
            let at_start = |ix| round.free_at_start.get(&ix).map_or(&[] as &[usize], Vec::as_slice);
            Load { free: counts(&mut groups().map(at_start)), waiting: waiting + started }
        };
        let free = |ix| self.stock.group(ix).free().iter().enumerate().map(|(free, count)| free.min(free_most) * count);
        if waiting > groups().flat_map(free).sum() {
            // What a pass begins with does not change, so its sizes need not be worked out for each job.
            let key = (case.ix, choice.group, case.least, free_most);
            let of_round = *round.sizes.borrow_mut().entry(key).or_insert_with(|| start().best(&seconds()));
            if let Some(size) = of_round.filter(|size| *size <= free_most) {
                return Grant::Devices(size);
            }
        }
        let now = Load { free: counts(&mut groups().map(|ix| self.stock.group(ix).free())), waiting };
        grant(&start(), &now, &seconds())
    }

    /// A node that is kept for another job but has devices free, for a job that ends before they are needed.
    fn backfill(&self, case: &Case) -> Option<Place> {
        self.reservations.iter().find_map(|(_, kept)| {
            let node = self.nodes.get(&kept.node).filter(|node| self.starts_clips(&kept.node, node))?;
            let at = kept.at.filter(|_| has_labels(Some(node), &case.class))?;
            let i = case.fit.choices.iter().position(|choice| choice.group == node.group)?;
            let choice = &case.fit.choices[i];
            let free = node.free_devices().count().min(case.most);
            let devices = (case.least..=free).find(|k| choice.seconds_on(*k).is_some())?;
            let ends = self.clock() + choice.seconds_on(devices)? + choice.load;
            (ends <= at.0.as_secs_f64()).then(|| Place { node: kept.node.clone(), devices, choice: i })
        })
    }

    /// The node that is kept for the job, if it has enough devices free now.
    fn kept_place(&self, case: &Case, kept: &Reservation) -> Option<Place> {
        let node = self.nodes.get(&kept.node).filter(|node| self.starts_clips(&kept.node, node))?;
        if node.free_devices().count() < kept.devices || kept.devices > case.most {
            return None;
        }
        let choice = case.fit.choices.iter().position(|choice| choice.group == node.group)?;
        Some(Place { node: kept.node.clone(), devices: kept.devices, choice })
    }

    /// Keeps the node for the job that is expected to have enough devices free first.
    fn reserve(&mut self, case: &Case, devices: usize) {
        let mut best: Option<(Option<Time>, NodeId)> = None;
        let groups = case.fit.choices.iter().map(|choice| self.stock.group(choice.group));
        for id in groups.filter(|group| group.spec.devices >= devices).flat_map(|group| &group.nodes) {
            let Some(node) = self.nodes.get(id) else { continue };
            let taken = self.reservations.holder(id).is_some();
            if taken || !self.is_open(id, node) || !has_labels(Some(node), &case.class) {
                continue;
            }
            let at = self.free_at(node, devices);
            // Unknown is later than any time.
            let key = |at: Option<Time>| at.unwrap_or(Time(Duration::MAX));
            if best.as_ref().is_none_or(|(known, _)| key(at) < key(*known)) {
                best = Some((at, id.clone()));
            }
        }
        let Some((at, node)) = best else { return };
        self.reservations.keep(case.job, Reservation { node: node.clone(), devices, at });
        self.refile(&node);
    }

    /// Nodes that are kept for jobs which could not take them now are kept no longer; the others get their new times.
    pub(super) fn refresh_reservations(&mut self) {
        let kept: Vec<(JobId, NodeId, usize)> =
            self.reservations.iter().map(|(job, kept)| (job, kept.node.clone(), kept.devices)).collect();
        for (job, id, devices) in kept {
            let allowed = self.jobs.get(&job).is_some_and(|job| {
                let tenant = &self.tenants[job.tenant.0 as usize];
                matches!(job.phase, Phase::Waiting) && !tenant.paused && tenant.may_have(devices)
            });
            match self.nodes.get(&id).filter(|node| allowed && self.is_open(&id, node)) {
                Some(node) => {
                    let at = self.free_at(node, devices);
                    self.reservations.expect(job, at);
                }
                None => {
                    self.reservations.drop_job(job);
                    self.refile(&id);
                }
            }
        }
    }

    /// When the node is expected to have so many devices free.
    fn free_at(&self, node: &Node, devices: usize) -> Option<Time> {
        let free_at = |slot: &Slot| match slot {
            Slot::Free => Some(self.now),
            Slot::Leased(job) => self.expected_end(*job),
            Slot::Helping(_) | Slot::Stopping(_) => None,
        };
        let mut times: Vec<Option<Time>> = node.devices.iter().map(|device| free_at(&device.slot)).collect();
        // Unknown ones last.
        times.sort_by_key(|at| at.map_or((1, Time::default()), |at| (0, at)));
        times.get(devices.checked_sub(1)?).copied().flatten()
    }

    /// When a running job is expected to end.
    pub(super) fn expected_end(&self, id: JobId) -> Option<Time> {
        let Job { phase: Phase::Running(lease), .. } = self.jobs.get(&id)? else { return None };
        if let Some(left) = lease.progress.and_then(|progress| progress.eta_seconds).filter(|left| left.is_finite()) {
            return Some(lease.moved.max(self.now) + Duration::from_secs_f32(left.clamp(0.0, 1e7)));
        }
        let total = Duration::try_from_secs_f64(lease.bill.expected?).ok()?;
        Some((lease.bill.since + total.saturating_sub(lease.bill.before)).max(self.now))
    }

    /// Takes the devices.
    fn pick(&mut self, round: &mut Round, case: &Case, place: Place) -> Result<(), Blocked> {
        let Place { node: node_id, devices: count, choice } = place;
        let (id, choice) = (case.job, &case.fit.choices[choice]);
        let expected = choice.seconds_on(count);
        let charged = expected.unwrap_or(UNKNOWN_SECONDS) * count as f64;
        let of_tenant = &self.tenants[case.tenant.0 as usize];
        if expected.is_some() && !of_tenant.may_use(charged, self.hour()) {
            return Err(Blocked::Quota);
        }
        let Some(topology) = choice.sizes.topology(count) else { return Err(Blocked::Job) };
        self.unqueue(id);
        let (Some(node), Some(job)) = (self.nodes.get_mut(&node_id), self.jobs.get_mut(&id)) else {
            return Err(Blocked::Job);
        };
        let devices: Vec<DeviceIndex> = node.free_devices().take(count).collect();
        let taken = if planted(Bug::GangHalfGranted) { 1 } else { devices.len() };
        for device in &devices[..taken] {
            node.devices[device.0 as usize].slot = Slot::Leased(id);
        }
        node.leases.insert(id);
        let base = choice.sizes.base.get(count - 1).copied().flatten().filter(|base| base.is_finite()).unwrap_or(0.0);
        let bill = Bill { size: count, since: self.now, base, expected, charged, ..Bill::default() };
        let model = case.model.clone();
        job.phase = Phase::Picked(Box::new(Pick { node: node_id.clone(), devices, topology, model, bill }));
        self.picked.push(id);
        let at = self.clock();
        let of_tenant = self.tenant_mut(case.tenant);
        of_tenant.devices += count as u32;
        of_tenant.running += 1;
        of_tenant.usage.begin(charged, at);
        for other in &case.fit.choices {
            if let Some(waiting) = round.waiting.get_mut(&other.group) {
                *waiting = waiting.saturating_sub(1);
            }
            *round.started.entry(other.group).or_default() += 1;
        }
        if let Some(kept) = self.reservations.get(id).map(|kept| kept.node.clone()) {
            self.reservations.drop_job(id);
            self.refile(&kept);
        }
        self.refile(&node_id);
        Ok(())
    }
}
