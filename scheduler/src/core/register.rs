//! Who may join, and what becomes of attempts that outlived a session or a scheduler.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use farm_core::id::{AttemptKey, BootId, DeviceIndex, JobId, NodeId};
use farm_core::job::spec::{MAX_LABEL_BYTES, MAX_LABELS};
use farm_core::parallel::cost::{ModelShape, Site};
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{Crash, Registration, Roles, RunningAttempt};

use super::effects::{Change, Effects};
use super::farm::{Confirmation, Device, Farm, Job, KnownModel, Node, NodeModel, Phase, Slot, shortened};
use super::jobs::End;
use super::stock::{Spec, coarse};

const MAX_NAME: usize = 128;
const MAX_DEVICES: usize = 256;
const MAX_MODELS: usize = 256;
/// Larger than any width of a network or number of its layers.
const MAX_MODEL_SIZE: usize = 1 << 20;

/// What a registration says, read and checked.
struct Admitted {
    site: Option<Site>,
    models: BTreeMap<Arc<str>, NodeModel>,
}

impl Farm {
    pub(super) fn on_register(
        &mut self,
        id: NodeId,
        boot: BootId,
        seq: u64,
        registration: Registration,
        fx: &mut Effects,
    ) {
        let Admitted { site, models } = match self.admit(&id, boot, &registration) {
            Ok(admitted) => admitted,
            Err(reason) => {
                fx.note(format!("node {} is refused: {reason}", id.0.escape_debug()));
                return fx.send(&id, boot, ToNode::Refused { reason });
            }
        };
        let fresh = self.nodes.get(&id).is_none_or(|known| known.boot != boot);
        if let Some(known) = self.nodes.get(&id) {
            if known.boot != boot {
                self.lose_node(&id, "restarted", fx);
            } else if known.devices.len() != registration.devices.len() {
                self.lose_node(&id, "came back with other devices", fx);
            }
        }
        let (devices, leases, heartbeat) = match self.nodes.remove(&id) {
            Some(mut known) => {
                self.withdraw(&id, &mut known);
                (known.devices, known.leases, known.heartbeat)
            }
            None => (registration.devices.iter().map(Device::new).collect(), BTreeSet::new(), 0),
        };
        let (devices_count, names) = (devices.len(), models.keys().map(|m| m.to_string()).collect::<Vec<_>>());
        let roles = registration.roles.names().join(" and ");
        self.count_models(&models, registration.roles);
        let models = Arc::new(models);
        let spec = Spec {
            devices: devices_count,
            device: devices.first().map(|device: &Device| device.name.as_str()).unwrap_or_default().into(),
            site: site.map(coarse),
            models: models.clone(),
            roles: registration.roles,
        };
        let group = self.stock.join(&id, spec);
        let node = Node {
            boot,
            version: registration.version,
            devices,
            models,
            roles: registration.roles,
            labels: registration.labels,
            group,
            filed: None,
            warm: None,
            leaving: None,
            leases,
            last_seen: self.now,
            session_closed: None,
            heartbeat,
        };
        self.nodes.insert(id.clone(), node);
        self.boots.insert(boot, id.clone());
        fx.note(format!("node {id} joined: {devices_count} devices to {roles}, models {}", names.join(", ")));
        fx.send(&id, boot, ToNode::Welcome { heartbeat_ms: self.limits.heartbeat.as_millis() as u64 });
        self.adopt_orphans(&id, boot, &registration.running, fx);
        if fresh && let Some(crash) = registration.crash {
            self.on_crash(&id, crash, fx);
        }
        self.on_listed(&id, seq, registration.heard, registration.running, &registration.helping, fx);
        if self.drained.contains(&id) {
            self.empty_node(&id, "its node is drained", fx);
        }
        self.replan = true;
    }

    fn count_models(&mut self, models: &BTreeMap<Arc<str>, NodeModel>, roles: Roles) {
        for (name, model) in models {
            let known = self.models.entry(name.clone()).or_insert_with(|| KnownModel {
                hash: model.hash.clone(),
                defaults: model.defaults.clone(),
                nodes: 0,
                renderers: 0,
            });
            known.nodes += 1;
            known.renderers += usize::from(roles.denoise);
        }
    }

    /// Takes a node that is leaving the table out of what is kept beside it.
    pub(super) fn withdraw(&mut self, id: &NodeId, node: &mut Node) {
        self.stock.file(id, node.group, &mut node.filed, None);
        self.stock.leave(id, node.group);
        for name in node.models.keys() {
            if let Some(known) = self.models.get_mut(name) {
                known.nodes -= 1;
                known.renderers -= usize::from(node.roles.denoise);
                if known.nodes == 0 {
                    self.models.remove(name);
                }
            }
        }
    }

    /// The node has said that it stops soon.
    pub(super) fn on_leaving(&mut self, id: &NodeId, reason: String, fx: &mut Effects) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        if node.leaving.is_none() {
            fx.note(format!("node {id} is leaving: {reason}"));
        }
        node.leaving = Some(reason);
        self.reservations.drop_node(id);
    }

    /// What the node found of its process before this one. A job that was there when nodes died of their own, as often as
    /// the limit says, is parked.
    fn on_crash(&mut self, id: &NodeId, crash: Crash, fx: &mut Effects) {
        let cause = shortened(crash.cause);
        fx.note(format!("node {id}: its process before this one died: {cause}"));
        if !crash.own_fault {
            return;
        }
        for key in crash.attempts.iter().take(MAX_DEVICES) {
            let limit = self.limits.kills;
            let Some(job) = self.jobs.get_mut(&key.job) else { continue };
            // Heard of already, or not of this job's time in the queue.
            if key.attempt.0 <= job.counts.killed_at || key.attempt > job.attempt {
                continue;
            }
            job.counts.kills += 1;
            job.counts.killed_at = key.attempt.0;
            let (counts, kills) = (job.counts, job.counts.kills);
            fx.changes.push(Change::Counted { job: key.job, counts });
            fx.log(key.job, Some(key.attempt), format!("node {id} died while it ran this: {cause}"));
            if kills >= limit {
                self.stop(key.job, "its nodes die", fx);
                let reason =
                    format!("poison: {kills} nodes died while they ran it, last {id}: {cause}; its log has all");
                self.end(key.job, End::Failed(reason), fx);
            }
        }
    }

    /// Attempts of the time before this scheduler started: those of this very process go on, those of an earlier
    /// process of the node died with it.
    fn adopt_orphans(&mut self, id: &NodeId, boot: BootId, running: &[RunningAttempt], fx: &mut Effects) {
        let listed = |key: AttemptKey| running.iter().find(|attempt| attempt.key == key);
        let mut of_node: Vec<(JobId, AttemptKey, BootId)> = self
            .orphans
            .iter()
            .filter_map(|job| match &self.jobs.get(job)?.phase {
                Phase::Running(lease) if lease.node == *id => Some((*job, lease.key, lease.boot)),
                _ => None,
            })
            .collect();
        // A device that one attempt has given back may be another's by now. The queue store does not know, but the node
        // says what the attempts that it lists still have; the others get what is left.
        of_node.sort_by_key(|(_, key, _)| listed(*key).is_none());
        for (job, key, lease_boot) in of_node {
            self.orphans.remove(&job);
            if lease_boot != boot {
                self.lose_lease(job, "restarted", Slot::Free, fx);
                continue;
            }
            let Some(node) = self.nodes.get_mut(id) else { return };
            let Some(Job { phase: Phase::Running(lease), tenant, .. }) = self.jobs.get_mut(&job) else { continue };
            if lease.devices.iter().any(|device| device.0 as usize >= node.devices.len()) {
                self.lose_lease(job, "came back with other devices", Slot::Free, fx);
                continue;
            }
            let has = |device: &DeviceIndex| listed(key).is_none_or(|attempt| attempt.devices.contains(device));
            let before = lease.devices.len();
            lease.devices.retain(|device| has(device) && node.devices[device.0 as usize].slot == Slot::Free);
            self.tenants[tenant.0 as usize].devices -= (before - lease.devices.len()) as u32;
            for device in &lease.devices {
                node.devices[device.0 as usize].slot = Slot::Leased(job);
            }
            node.leases.insert(job);
            lease.confirmation = Confirmation::Listed;
        }
    }

    /// What the node brings, or why it may not join.
    fn admit(&self, id: &NodeId, boot: BootId, registration: &Registration) -> Result<Admitted, String> {
        check_name("node name", &id.0)?;
        if registration.store != self.store {
            return Err(format!(
                "the node puts results into {} but the farm's store is {}; start both with the same --store",
                registration.store, self.store
            ));
        }
        let devices = registration.devices.len();
        if !(1..=MAX_DEVICES).contains(&devices) {
            return Err(format!("{devices} devices; a node has 1..={MAX_DEVICES}"));
        }
        if registration.roles.names().is_empty() {
            return Err("the node has no role; it may denoise, decode, or both".to_owned());
        }
        if let Some(other) = self.boots.get(&boot).filter(|other| *other != id) {
            return Err(format!("this process joined as {other} before; it cannot be {id} as well"));
        }
        if let Some(known) = self.nodes.get(id)
            && known.boot != boot
            && self.is_alive(known)
        {
            return Err(format!("node {id} is already joined by another process that is alive; choose another --name"));
        }
        check_labels(&registration.labels)?;
        let site = registration.site_json.as_deref().map(read_site).transpose()?;
        Ok(Admitted { site, models: self.admit_models(id, registration)? })
    }

    fn admit_models(&self, id: &NodeId, registration: &Registration) -> Result<BTreeMap<Arc<str>, NodeModel>, String> {
        let count = registration.models.len();
        if count > MAX_MODELS {
            return Err(format!("{count} models; a node has at most {MAX_MODELS}"));
        }
        let mut names = HashSet::new();
        let mut models = BTreeMap::new();
        for model in &registration.models {
            check_name("model name", &model.name)?;
            if !names.insert(&model.name) {
                return Err(format!("model {} is registered twice", model.name));
            }
            let own = self.nodes.get(id).is_some_and(|node| node.models.contains_key(model.name.as_str()));
            if let Some(known) = self.models.get(model.name.as_str())
                && known.hash != model.hash
                && known.nodes > usize::from(own)
            {
                let holds =
                    |(other, node): &(&NodeId, &Node)| *other != id && node.models.contains_key(model.name.as_str());
                let other = self.nodes.iter().find(holds).map(|(other, _)| other.to_string()).unwrap_or_default();
                return Err(format!(
                    "model {} has hash {:.12} here but {:.12} on node {other}; give one of them another name",
                    model.name, model.hash, known.hash
                ));
            }
            let defaults = serde_json::from_str(&model.defaults_json)
                .map_err(|error| format!("generation defaults of model {} do not parse: {error}", model.name))?;
            let shape =
                read_shape(&model.shape_json).map_err(|error| format!("shape of model {}: {error}", model.name))?;
            models.insert(self.intern(&model.name), NodeModel { hash: model.hash.clone(), defaults, shape });
        }
        Ok(models)
    }
}

/// Rates that predict nothing sensible are not noticed here: a prediction that is no time is none.
fn read_site(json: &str) -> Result<Site, String> {
    serde_json::from_str(json).map_err(|error| format!("rates of the devices do not parse: {error}"))
}

/// Sizes that the arithmetic of predictions can take.
fn read_shape(json: &str) -> Result<ModelShape, String> {
    let shape: ModelShape = serde_json::from_str(json).map_err(|error| format!("it does not parse: {error}"))?;
    let ModelShape { layers, heads, head_dim, hidden_x, hidden_y, ffn_x, ffn_y, text_dim, time_dim, channels } = shape;
    let sizes = [layers, heads, head_dim, hidden_x, hidden_y, ffn_x, ffn_y, text_dim, time_dim, channels];
    match sizes.into_iter().find(|size| !(1..=MAX_MODEL_SIZE).contains(size)) {
        Some(size) => Err(format!("a size of {size} is not in 1..={MAX_MODEL_SIZE}")),
        None => Ok(shape),
    }
}

fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), String> {
    let fits = |text: &str| text.len() <= MAX_LABEL_BYTES && !text.chars().any(char::is_control);
    if labels.len() > MAX_LABELS || labels.iter().any(|(name, value)| !fits(name) || !fits(value)) {
        return Err(format!(
            "a node has at most {MAX_LABELS} labels, each of {MAX_LABEL_BYTES} bytes without control characters"
        ));
    }
    Ok(())
}

/// Names appear in logs, tables and messages.
fn check_name(what: &str, name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        return Err(format!("{what} {:.40?} is not 1..={MAX_NAME} bytes without control characters", name));
    }
    Ok(())
}
