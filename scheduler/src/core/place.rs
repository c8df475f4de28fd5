//! Which queued job gets which free device: first come, first served, higher priority first. One clip takes one
//! device, but a lease names a list, and it is taken and given back as a whole.

use std::collections::{BTreeMap, BTreeSet, btree_set};
use std::sync::Arc;

use farm_core::id::{AttemptKey, AttemptNo, DeviceIndex, JobId, NodeId};
use farm_core::job::spec::RenderSpec;
use farm_core::wire::to_node::{StartAttempt, ToNode};

use super::effects::{Change, Effects, devices_text};
use super::events::LoadedRequest;
use super::farm::{Confirmation, Farm, Lease, Phase, Rank, Slot, WaitReason};

/// At most so many starts in one transaction.
const MAX_STARTS: usize = 1024;

struct Assignment {
    job: JobId,
    node: NodeId,
    device: DeviceIndex,
    model: Arc<str>,
}

impl Farm {
    /// Starts what can start. Jobs whose requests are not at hand are asked for and placed when those come; the plan
    /// is the same then, because nothing else happens in between.
    pub(super) fn place(&mut self, fx: &mut Effects) {
        loop {
            let mut failed = false;
            let plan = self.plan();
            for assignment in plan {
                match self.loaded.remove(&assignment.job) {
                    None => fx.load.push(assignment.job),
                    Some(request) => failed |= !self.start(assignment, request, fx),
                }
            }
            // A job that failed leaves its device to the next one.
            if !failed || !fx.load.is_empty() {
                break;
            }
        }
        self.loaded.clear();
    }

    /// Nothing that waits could start.
    #[cfg(test)]
    pub(super) fn is_settled(&self) -> bool {
        self.plan().is_empty()
    }

    fn plan(&self) -> Vec<Assignment> {
        let mut plan = Vec::new();
        if self.queues.is_empty() {
            return plan;
        }
        let mut free = self.free_devices();
        if free.is_empty() {
            return plan;
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
        while plan.len() < MAX_STARTS
            && let Some(first) = (0..queues.len()).min_by_key(|&i| queues[i].0)
        {
            let (head, model, rest) = &mut queues[first];
            let Some((node, device)) = self.take_free(&mut free, model) else {
                drop(queues.swap_remove(first));
                continue;
            };
            plan.push(Assignment { job: head.2, node, device, model: model.clone() });
            match rest.next() {
                Some(next) => *head = *next,
                None => drop(queues.swap_remove(first)),
            }
        }
        plan
    }

    /// Free devices of nodes that are alive, the lowest index last.
    fn free_devices(&self) -> BTreeMap<NodeId, Vec<DeviceIndex>> {
        let free_of = |node: &super::farm::Node| -> Vec<DeviceIndex> {
            let indices = node.devices.iter().enumerate().rev();
            indices.filter(|(_, device)| device.slot == Slot::Free).map(|(i, _)| DeviceIndex(i as u32)).collect()
        };
        self.nodes
            .iter()
            .filter(|(_, node)| self.is_alive(node))
            .map(|(id, node)| (id.clone(), free_of(node)))
            .filter(|(_, free)| !free.is_empty())
            .collect()
    }

    /// Takes a device of the node with the model that has most free ones; of equals, the first by name.
    fn take_free(&self, free: &mut BTreeMap<NodeId, Vec<DeviceIndex>>, model: &str) -> Option<(NodeId, DeviceIndex)> {
        let has_model = |id: &NodeId| self.nodes.get(id).is_some_and(|node| node.models.contains_key(model));
        let (id, devices) = free
            .iter_mut()
            .filter(|(id, devices)| !devices.is_empty() && has_model(id))
            .rev() // because the last of equals wins
            .max_by_key(|(_, devices)| devices.len())?;
        Some((id.clone(), devices.pop()?))
    }

    /// The name of the only registered model, if there is exactly one.
    fn only_model(&self) -> Option<Arc<str>> {
        let mut names = self.nodes.values().flat_map(|node| node.models.keys());
        let first = names.next()?;
        names.all(|name| name == first).then(|| first.clone())
    }

    /// Grants the lease. False if the request does not fit the model's defaults: then the job has failed.
    fn start(&mut self, assignment: Assignment, loaded: LoadedRequest, fx: &mut Effects) -> bool {
        let Assignment { job: id, node: node_id, device, model } = assignment;
        let now = self.now;
        let (Some(job), Some(node)) = (self.jobs.get(&id), self.nodes.get_mut(&node_id)) else { return true };
        let Some(registered) = node.models.get(&model) else { return true };
        let spec = RenderSpec::resolve(&loaded.request, &registered.defaults, loaded.seed)
            .map_err(|error| error.to_string())
            .and_then(|spec| serde_json::to_string(&spec).map_err(|error| error.to_string()));
        let spec_json = match spec {
            Ok(spec_json) => spec_json,
            Err(error) => {
                let reason = format!("does not fit model {model}: {error}");
                fx.log(id, None, format!("failed: {reason}"));
                fx.changes.push(Change::Failed { job: id, reason });
                self.forget(id);
                return false;
            }
        };
        let attempt = AttemptNo(job.attempt.0 + 1);
        let key = AttemptKey { job: id, attempt, epoch: self.epoch };
        let devices = vec![device];
        let start = Box::new(StartAttempt {
            key,
            devices: devices.clone(),
            model: model.to_string(),
            model_hash: registered.hash.clone(),
            spec_json,
        });
        let boot = node.boot;
        for device in &devices {
            node.devices[device.0 as usize].slot = Slot::Leased(id);
        }
        self.unqueue(id);
        if let Some(job) = self.jobs.get_mut(&id) {
            job.attempt = attempt;
            // From now on the job is this model's, even if others join.
            job.model = Some(model);
            job.phase = Phase::Running(Box::new(Lease {
                key,
                node: node_id.clone(),
                boot,
                devices: devices.clone(),
                confirmation: Confirmation::Awaited { since: now, start: start.clone() },
                progress: None,
            }));
        }
        fx.changes.push(Change::Started { start: start.clone(), node: node_id.clone(), boot });
        fx.log(id, Some(attempt), format!("started on node {node_id}, device {}", devices_text(&devices)));
        fx.send(&node_id, boot, ToNode::Start(start));
        true
    }

    /// Why a job is not running; `None` if it is, or if it is not queued.
    pub fn wait_reason(&self, id: JobId) -> Option<WaitReason> {
        let job = self.jobs.get(&id)?;
        match &job.phase {
            Phase::Running(_) => None,
            Phase::Delayed { until, cause } => {
                let seconds = until.since(self.now).as_secs_f64().ceil() as u64;
                Some(WaitReason::Delayed { seconds, cause: cause.to_string() })
            }
            Phase::Waiting => Some(self.model_wait_reason(job.model.as_deref())),
        }
    }

    /// Why jobs that name this model cannot start at all, if they cannot.
    pub fn cannot_start(&self, named: Option<&str>) -> Option<WaitReason> {
        match self.model_wait_reason(named) {
            WaitReason::Busy { .. } => None,
            reason => Some(reason),
        }
    }

    fn model_wait_reason(&self, named: Option<&str>) -> WaitReason {
        let names: BTreeSet<&Arc<str>> = self.nodes.values().flat_map(|node| node.models.keys()).collect();
        let registered: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        let model = match (named, registered.as_slice()) {
            (_, []) if named.is_none() => return WaitReason::NoModel,
            (None, [only]) => only.clone(),
            (None, _) => return WaitReason::Ambiguous { registered },
            (Some(name), _) if !registered.iter().any(|known| known == name) => {
                return WaitReason::UnknownModel { name: name.to_owned(), registered };
            }
            (Some(name), _) => name.to_owned(),
        };
        let with_model = || self.nodes.values().filter(|node| node.models.contains_key(model.as_str()));
        let devices = with_model().map(|node| node.devices.len()).sum();
        let silent = with_model().filter(|node| !self.is_alive(node)).map(|node| node.devices.len()).sum();
        WaitReason::Busy { model, devices, silent }
    }
}
