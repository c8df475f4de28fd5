//! The start of what was picked: its request is at hand, its devices are kept.

use std::sync::Arc;

use farm_core::id::{AttemptKey, AttemptNo, JobId};
use farm_core::job::spec::RenderSpec;
use farm_core::wire::to_node::{StartAttempt, ToNode};
use rustc_hash::FxHashMap;

use super::effects::{Change, Effects, devices_text};
use super::events::{Clip, LoadedRequest};
use super::farm::{Confirmation, Farm, Job, Lease, Phase, Pick};
use super::jobs::End;

impl Farm {
    /// Starts the picked jobs whose requests came; the others are gone from the queue store's own table, or it could not
    /// be read, and wait again.
    pub(super) fn on_loaded(&mut self, requests: Vec<LoadedRequest>, fx: &mut Effects) {
        let of_job: FxHashMap<JobId, &LoadedRequest> = requests.iter().map(|request| (request.job, request)).collect();
        fx.changes.reserve(2 * self.picked.len());
        fx.sends.reserve(self.picked.len());
        for id in std::mem::take(&mut self.picked) {
            let Some(Job { phase: Phase::Picked(pick), .. }) = self.jobs.get(&id) else { continue };
            let pick = (**pick).clone();
            match of_job.get(&id) {
                Some(request) => {
                    if let Err(reason) = self.start(id, pick, request, fx) {
                        self.end(id, End::Failed(reason), fx);
                    }
                }
                None => {
                    self.unpick(id);
                    self.wait(id);
                }
            }
        }
    }

    /// Grants the lease, or says why the job can never start.
    fn start(&mut self, id: JobId, pick: Pick, request: &LoadedRequest, fx: &mut Effects) -> Result<(), String> {
        let Pick { node: node_id, devices, topology, model, bill } = pick;
        let now = self.now;
        let (Some(job), Some(node)) = (self.jobs.get(&id), self.nodes.get_mut(&node_id)) else { return Ok(()) };
        let Some(registered) = node.models.get(&model) else { return Ok(()) };
        let spec = RenderSpec::resolve(&request.request, &registered.defaults, request.seed)
            .map_err(|error| format!("does not fit model {model}: {error}"))?;
        let spec_json = serde_json::to_string(&spec).map_err(|error| format!("cannot be sent: {error}"))?;
        let attempt = AttemptNo(job.attempt.0 + 1);
        let key = AttemptKey { job: id, attempt, epoch: self.epoch };
        let start = Arc::new(StartAttempt {
            key,
            devices: devices.clone(),
            topology,
            model: model.to_string(),
            model_hash: registered.hash.clone(),
            spec_json,
            tiling: self.tiling.smaller(job.counts.smaller_tiles),
        });
        let boot = node.boot;
        node.warm = Some(model.clone());
        let device = node.devices.first().map(|device| device.name.clone()).unwrap_or_default();
        self.pin_model(id, &model);
        let clip = Clip {
            model: start.model.clone(),
            model_hash: start.model_hash.clone(),
            spec_json: start.spec_json.clone(),
        };
        let lease = Lease {
            key,
            node: node_id.clone(),
            boot,
            devices: devices.clone(),
            clip,
            confirmation: Confirmation::Awaited { since: now, start: start.clone() },
            progress: None,
            moved: now,
            hands: None,
            helpers: Vec::new(),
            bill,
            yielding: None,
        };
        if let Some(job) = self.jobs.get_mut(&id) {
            job.attempt = attempt;
            job.phase = Phase::Running(Box::new(lease));
        }
        let base = bill.base;
        fx.changes.push(Change::Started { start: start.clone(), node: node_id.clone(), boot, device, base });
        let line = match devices.as_slice() {
            [device] => format!("started on node {node_id}, device {device}"),
            _ => format!("started on node {node_id}, devices {}, {topology}", devices_text(&devices)),
        };
        fx.log(id, Some(attempt), line);
        fx.send(&node_id, boot, ToNode::Start(Box::new((*start).clone())));
        Ok(())
    }
}
