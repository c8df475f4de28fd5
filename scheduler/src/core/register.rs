//! Who may join, and what becomes of attempts that outlived a session or a scheduler.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use farm_core::id::{AttemptKey, BootId, DeviceIndex, JobId, NodeId};
use farm_core::parallel::cost::{ModelShape, Site};
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{Registration, RunningAttempt};

use super::effects::Effects;
use super::farm::{Confirmation, Device, Farm, Job, Node, NodeModel, Phase, Slot};

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
        if let Some(known) = self.nodes.get(&id) {
            if known.boot != boot {
                self.lose_node(&id, "restarted", fx);
            } else if known.devices.len() != registration.devices.len() {
                self.lose_node(&id, "came back with other devices", fx);
            }
        }
        let (devices, leases, heartbeat) = match self.nodes.remove(&id) {
            Some(known) => (known.devices, known.leases, known.heartbeat),
            None => (registration.devices.iter().map(Device::new).collect(), BTreeSet::new(), 0),
        };
        let (devices_count, names) = (devices.len(), models.keys().map(|m| m.to_string()).collect::<Vec<_>>());
        let roles = registration.roles.names().join(" and ");
        let node = Node {
            boot,
            version: registration.version,
            devices,
            site,
            models,
            roles: registration.roles,
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
        self.on_listed(&id, seq, registration.running, &registration.helping, fx);
        self.replan = true;
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
                self.lose_lease(job, "restarted", fx);
                continue;
            }
            let Some(node) = self.nodes.get_mut(id) else { return };
            let Some(Job { phase: Phase::Running(lease), .. }) = self.jobs.get_mut(&job) else { continue };
            if lease.devices.iter().any(|device| device.0 as usize >= node.devices.len()) {
                self.lose_lease(job, "came back with other devices", fx);
                continue;
            }
            let has = |device: &DeviceIndex| listed(key).is_none_or(|attempt| attempt.devices.contains(device));
            lease.devices.retain(|device| has(device) && node.devices[device.0 as usize].slot == Slot::Free);
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
            let others = self.nodes.iter().filter(|(other, _)| *other != id);
            for (other, node) in others {
                if let Some(known) = node.models.get(model.name.as_str())
                    && known.hash != model.hash
                {
                    return Err(format!(
                        "model {} has hash {:.12} here but {:.12} on node {other}; give one of them another name",
                        model.name, model.hash, known.hash
                    ));
                }
            }
            let defaults = serde_json::from_str(&model.defaults_json)
                .map_err(|error| format!("generation defaults of model {} do not parse: {error}", model.name))?;
            let shape =
                read_shape(&model.shape_json).map_err(|error| format!("shape of model {}: {error}", model.name))?;
            models.insert(Arc::from(model.name.as_str()), NodeModel { hash: model.hash.clone(), defaults, shape });
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

/// Names appear in logs, tables and messages.
fn check_name(what: &str, name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        return Err(format!("{what} {:.40?} is not 1..={MAX_NAME} bytes without control characters", name));
    }
    Ok(())
}
