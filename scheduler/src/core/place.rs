//! Which queued job gets which free devices: first come, first served, higher priority first. How many devices a clip
//! gets is the rule in [`super::gang`]; a gang is of one node, and it is taken and given back as a whole.

use std::cmp::Reverse;
use std::collections::{BTreeMap, btree_set};
use std::sync::Arc;

use farm_core::id::{AttemptKey, AttemptNo, DeviceIndex, JobId, NodeId};
use farm_core::job::spec::RenderSpec;
use farm_core::parallel::topology::Topology;
use farm_core::wire::to_node::{StartAttempt, ToNode};

use super::effects::{Change, Effects, devices_text};
use super::events::{Clip, LoadedRequest};
use super::farm::{Confirmation, Farm, Lease, Node, Phase, Rank, Slot};
use super::forecast::{Sizes, clip_shape};
use super::gang::{Grant, Load, grant};

/// At most so many jobs are looked at in one go.
const MAX_CANDIDATES: usize = 1024;
/// Attempts on a node for each of its devices. Those that only upload have none, but they may pile up where the store is
/// slow, and a node does not take on any number.
const MAX_LEASES: usize = 4;

/// Free devices by node, the lowest index last. No list is empty.
type Free = BTreeMap<NodeId, Vec<DeviceIndex>>;

/// A job that could have a device.
struct Candidate {
    job: JobId,
    model: Arc<str>,
}

/// The devices that a job gets.
struct Gang {
    node: NodeId,
    devices: Vec<DeviceIndex>,
    topology: Topology,
}

/// One pass over the queue.
struct Round {
    at_start: Free,
    free: Free,
    /// The models of the clips that have got their devices in it.
    started: Vec<Arc<str>>,
}

impl Round {
    fn new(free: Free) -> Self {
        Self { at_start: free.clone(), free, started: Vec::new() }
    }
}

impl Farm {
    /// Starts what can start. The requests of all jobs that may be among it are needed for that; if they are not at
    /// hand they are asked for, and this is called again when they come.
    pub(super) fn place(&mut self, fx: &mut Effects) {
        self.short.clear();
        loop {
            let candidates = self.candidates();
            if candidates.iter().any(|candidate| !self.loaded.contains_key(&candidate.job)) {
                fx.load.extend(candidates.iter().map(|candidate| candidate.job));
                break;
            }
            // Until nothing more can: jobs that fail, and gangs that leave devices over, make room for others.
            if !self.start_candidates(candidates, fx) {
                break;
            }
        }
        self.loaded.clear();
    }

    /// Nothing that waits could start.
    #[cfg(test)]
    pub(super) fn is_settled(&self) -> bool {
        self.candidates().is_empty() || !self.short.is_empty()
    }

    /// The jobs that would start now if each took one device, in order: none beyond them can.
    fn candidates(&self) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        if self.queues.is_empty() {
            return candidates;
        }
        let mut free = self.free_devices();
        if free.is_empty() {
            return candidates;
        }
        let only_model = self.only_model();
        // The queues whose model is known, each with its head.
        let mut queues: Vec<(Rank, Arc<str>, btree_set::Iter<'_, Rank>)> = self
            .queues
            .iter()
            .filter_map(|(named, queue)| {
                let mut rest = queue.iter();
                Some((*rest.next()?, named.clone().or_else(|| only_model.clone())?, rest))
            })
            .collect();
        while candidates.len() < MAX_CANDIDATES
            && let Some(first) = (0..queues.len()).min_by_key(|&i| queues[i].0)
        {
            let (head, model, rest) = &mut queues[first];
            let Some(node) = self.most_free(&free, model, &[]) else {
                drop(queues.swap_remove(first));
                continue;
            };
            take(&mut free, &node, 1);
            candidates.push(Candidate { job: head.2, model: model.clone() });
            match rest.next() {
                Some(next) => *head = *next,
                None => drop(queues.swap_remove(first)),
            }
        }
        candidates
    }

    /// Starts those of the candidates, whose requests are at hand, that get devices. True if any started or failed.
    fn start_candidates(&mut self, candidates: Vec<Candidate>, fx: &mut Effects) -> bool {
        let mut round = Round::new(self.free_devices());
        let mut moved = false;
        // Nobody overtakes a job of the same model that waits for more devices.
        let mut stopped: Vec<Arc<str>> = Vec::new();
        for Candidate { job, model } in candidates {
            let Some(request) = self.loaded.get(&job).filter(|_| !stopped.contains(&model)) else { continue };
            let Some(node) = self.most_free(&round.free, &model, &[]) else { continue };
            let spec = match self.resolve(request, &node, &model) {
                Ok(spec) => spec,
                Err(error) => {
                    self.reject(job, format!("does not fit model {model}: {error}"), fx);
                    moved = true;
                    continue;
                }
            };
            match self.gang(&mut round, &model, &spec) {
                Ok(gang) => moved |= self.start(job, model, &spec, gang, fx),
                Err(needed) => {
                    self.short.insert(job, needed);
                    // As devices get free they are kept for it: each of these nodes has enough of them in all.
                    round.free.retain(|id, _| !self.can_render(id, &model));
                    stopped.push(model);
                }
            }
        }
        moved
    }

    /// Takes the devices for a clip, or says how many it needs of one node.
    fn gang(&mut self, round: &mut Round, model: &Arc<str>, spec: &RenderSpec) -> Result<Gang, usize> {
        let (mut tried, mut needed) = (Vec::new(), usize::MAX);
        while let Some(id) = self.most_free(&round.free, model, &tried) {
            let sizes = self.forecast(&id, model, spec);
            let most = round.free.get(&id).map_or(0, Vec::len);
            let waiting = self.waiting_for(&id);
            let load = |free: &Free, waiting| Load { free: self.free_counts(free, model, most), waiting };
            let started = round.started.iter().filter(|model| self.can_render(&id, model)).count();
            let start = load(&round.at_start, waiting + started);
            match grant(&start, &load(&round.free, waiting), &sizes.seconds) {
                Grant::Devices(count) => {
                    let devices = take(&mut round.free, &id, count);
                    round.started.push(model.clone());
                    return Ok(Gang { node: id, devices, topology: sizes.topology(count) });
                }
                Grant::Needs(count) => needed = needed.min(count),
            }
            tried.push(id);
        }
        Err(needed)
    }

    /// Free devices of each node with the model. No group is larger than `most`, which is what the node in question
    /// has: what another has beyond that does not count.
    fn free_counts(&self, free: &Free, model: &str, most: usize) -> Vec<usize> {
        let with_model = free.iter().filter(|(id, _)| self.can_render(id, model));
        with_model.map(|(_, devices)| devices.len().min(most)).collect()
    }

    /// Predictions for a clip on each number of the node's devices.
    fn forecast(&mut self, id: &NodeId, model: &Arc<str>, spec: &RenderSpec) -> Sizes {
        let known = self.nodes.get(id).and_then(|node| Some((node, node.site?, node.models.get(model)?.shape)));
        match (known, clip_shape(spec)) {
            (Some((node, site, shape)), Some(clip)) => {
                let devices = node.devices.len();
                self.forecasts.sizes(&site, &shape, clip, devices)
            }
            _ => Sizes::default(),
        }
    }

    /// Queued jobs, that do not wait for a moment after a failure, that the node could take.
    pub(super) fn waiting_for(&self, id: &NodeId) -> usize {
        let Some(node) = self.nodes.get(id) else { return 0 };
        let only_model = self.only_model();
        let queues = self
            .queues
            .iter()
            .filter(|(named, _)| named.as_ref().or(only_model.as_ref()).is_some_and(|model| node.can_render(model)));
        queues.map(|(_, queue)| queue.len()).sum()
    }

    /// Free devices of nodes that are alive and start clips.
    fn free_devices(&self) -> Free {
        let takes_clips = |node: &Node| {
            node.roles.denoise && self.is_alive(node) && node.leases.len() < MAX_LEASES * node.devices.len()
        };
        self.nodes
            .iter()
            .filter(|(_, node)| takes_clips(node))
            .map(|(id, node)| (id.clone(), node.free_devices().rev().collect::<Vec<_>>()))
            .filter(|(_, free)| !free.is_empty())
            .collect()
    }

    /// The node with the model that has most free devices, but for those `tried`; of equals, the first by name.
    fn most_free(&self, free: &Free, model: &str, tried: &[NodeId]) -> Option<NodeId> {
        let possible = free.iter().filter(|(id, _)| self.can_render(id, model) && !tried.contains(id));
        possible.min_by_key(|(_, devices)| Reverse(devices.len())).map(|(id, _)| id.clone())
    }

    fn can_render(&self, id: &NodeId, model: &str) -> bool {
        self.nodes.get(id).is_some_and(|node| node.can_render(model))
    }

    /// The name of the only model that clips are rendered with, if there is exactly one.
    fn only_model(&self) -> Option<Arc<str>> {
        let mut names = self.nodes.values().flat_map(|node| node.rendered_models()).map(|(name, _)| name);
        let first = names.next()?;
        names.all(|name| name == first).then(|| first.clone())
    }

    fn resolve(&self, loaded: &LoadedRequest, node: &NodeId, model: &str) -> Result<RenderSpec, String> {
        let registered = self.nodes.get(node).and_then(|node| node.models.get(model));
        let defaults = &registered.ok_or_else(|| format!("node {node} does not have it"))?.defaults;
        RenderSpec::resolve(&loaded.request, defaults, loaded.seed).map_err(|error| error.to_string())
    }

    /// The job fails before any attempt at it.
    fn reject(&mut self, id: JobId, reason: String, fx: &mut Effects) {
        fx.log(id, None, format!("failed: {reason}"));
        fx.changes.push(Change::Failed { job: id, reason });
        self.forget(id);
    }

    /// Grants the lease. False if nothing has changed.
    fn start(&mut self, id: JobId, model: Arc<str>, spec: &RenderSpec, gang: Gang, fx: &mut Effects) -> bool {
        let Gang { node: node_id, devices, topology } = gang;
        let now = self.now;
        let spec_json = match serde_json::to_string(spec) {
            Ok(spec_json) => spec_json,
            Err(error) => {
                self.reject(id, format!("cannot be sent: {error}"), fx);
                return true;
            }
        };
        let (Some(job), Some(node)) = (self.jobs.get(&id), self.nodes.get_mut(&node_id)) else { return false };
        let Some(registered) = node.models.get(&model) else { return false };
        let attempt = AttemptNo(job.attempt.0 + 1);
        let key = AttemptKey { job: id, attempt, epoch: self.epoch };
        let start = Box::new(StartAttempt {
            key,
            devices: devices.clone(),
            topology,
            model: model.to_string(),
            model_hash: registered.hash.clone(),
            spec_json,
            tiling: self.tiling,
        });
        let boot = node.boot;
        for device in &devices {
            node.devices[device.0 as usize].slot = Slot::Leased(id);
        }
        node.leases.insert(id);
        self.unqueue(id);
        if let Some(job) = self.jobs.get_mut(&id) {
            job.attempt = attempt;
            // From now on the job is this model's, even if others join.
            let clip = Clip {
                model: start.model.clone(),
                model_hash: start.model_hash.clone(),
                spec_json: start.spec_json.clone(),
            };
            job.model = Some(model);
            job.phase = Phase::Running(Box::new(Lease {
                key,
                node: node_id.clone(),
                boot,
                devices: devices.clone(),
                clip,
                confirmation: Confirmation::Awaited { since: now, start: start.clone() },
                progress: None,
                hands: None,
            }));
        }
        fx.changes.push(Change::Started { start: start.clone(), node: node_id.clone(), boot });
        let on = match devices.len() {
            1 => format!("device {}", devices_text(&devices)),
            _ => format!("devices {}, {topology}", devices_text(&devices)),
        };
        fx.log(id, Some(attempt), format!("started on node {node_id}, {on}"));
        fx.send(&node_id, boot, ToNode::Start(start));
        true
    }
}

/// Takes `count` devices of a node, or all if it has fewer, the lowest first.
fn take(free: &mut Free, node: &NodeId, count: usize) -> Vec<DeviceIndex> {
    let Some(devices) = free.get_mut(node) else { return Vec::new() };
    let mut taken = devices.split_off(devices.len().saturating_sub(count));
    taken.reverse();
    if devices.is_empty() {
        free.remove(node);
    }
    taken
}
