//! What people may ask of the farm. Nothing here changes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use farm_core::api::{DeviceView, ModelView, NodeView};
use farm_core::id::{Epoch, JobId, NodeId};
use farm_core::job::state::Progress;

use super::events::Time;
use super::farm::{Counters, Device, Farm, Phase, Slot};
use super::resolve::Models;

impl Farm {
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The normalised URL of the store for results.
    pub fn store(&self) -> &str {
        &self.store
    }

    /// The farm's own time: that of its newest event.
    pub fn now(&self) -> Time {
        self.now
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Queued or running.
    pub fn holds(&self, job: JobId) -> bool {
        self.jobs.contains_key(&job)
    }

    /// The models that clips can be rendered with.
    pub fn models(&self) -> Models {
        let mut models = BTreeMap::new();
        for (name, model) in self.nodes.values().flat_map(|node| node.rendered_models()) {
            models.entry(name.to_string()).or_insert_with(|| (model.hash.clone(), model.defaults.clone()));
        }
        Models(models)
    }

    /// Where a running job is and how far; `None` if it is not running.
    pub fn running(&self, job: JobId) -> Option<(NodeId, Option<Progress>)> {
        match &self.jobs.get(&job)?.phase {
            Phase::Running(lease) => Some((lease.node.clone(), lease.progress)),
            _ => None,
        }
    }

    pub fn nodes(&self) -> Vec<NodeView> {
        self.nodes
            .iter()
            .map(|(id, node)| NodeView {
                node: id.clone(),
                version: node.version.clone(),
                roles: node.roles.names().into_iter().map(str::to_owned).collect(),
                devices: node.devices.iter().map(|device| self.device_view(device)).collect(),
                models: node
                    .models
                    .iter()
                    .map(|(name, model)| ModelView { name: name.to_string(), hash: model.hash.clone() })
                    .collect(),
                last_heartbeat_seconds: self.now.since(node.last_seen).as_secs_f32(),
                alive: self.is_alive(node),
                labels: BTreeMap::new(),
                closed: None,
            })
            .collect()
    }

    fn device_view(&self, device: &Device) -> DeviceView {
        let (job, helps) = match &device.slot {
            Slot::Leased(job) => (Some(*job), false),
            Slot::Helping(help) => (Some(help.key.job), true),
            Slot::Free | Slot::Stopping(_) => (None, false),
        };
        let progress = job.and_then(|job| self.running(job)).and_then(|(_, progress)| progress);
        DeviceView { name: device.name.clone(), job, helps, progress }
    }

    /// Nodes, devices, free devices.
    pub fn sizes(&self) -> (u64, u64, u64) {
        let devices = || self.nodes.values().flat_map(|node| &node.devices);
        let idle = devices().filter(|device| device.slot == Slot::Free).count();
        (self.nodes.len() as u64, devices().count() as u64, idle as u64)
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
            Phase::Waiting => Some(match self.short.get(&id) {
                Some(&devices) => WaitReason::Short { devices },
                None => self.model_wait_reason(job.model.as_deref()),
            }),
        }
    }

    /// Why jobs that name this model cannot start at all, if they cannot.
    pub fn cannot_start(&self, named: Option<&str>) -> Option<WaitReason> {
        match self.model_wait_reason(named) {
            WaitReason::Busy { .. } | WaitReason::Short { .. } => None,
            reason => Some(reason),
        }
    }

    fn model_wait_reason(&self, named: Option<&str>) -> WaitReason {
        let rendered = self.nodes.values().flat_map(|node| node.rendered_models());
        let names: BTreeSet<&Arc<str>> = rendered.map(|(name, _)| name).collect();
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
        let with_model = || self.nodes.values().filter(|node| node.can_render(&model));
        let devices = with_model().map(|node| node.devices.len()).sum();
        let silent = with_model().filter(|node| !self.is_alive(node)).map(|node| node.devices.len()).sum();
        WaitReason::Busy { model, devices, silent }
    }
}

/// Why a queued job does not run.
#[derive(Clone, Debug, PartialEq)]
pub enum WaitReason {
    NoModel,
    UnknownModel {
        name: String,
        registered: Vec<String>,
    },
    Ambiguous {
        registered: Vec<String>,
    },
    Delayed {
        seconds: u64,
        cause: String,
    },
    Busy {
        model: String,
        devices: usize,
        silent: usize,
    },
    /// It needs so many devices of one node.
    Short {
        devices: usize,
    },
}

impl fmt::Display for WaitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoModel => f.write_str("no node has registered a model yet"),
            Self::UnknownModel { name, registered } if registered.is_empty() => {
                write!(f, "no node has registered model {name} (registered: none)")
            }
            Self::UnknownModel { name, registered } => {
                write!(f, "no node has registered model {name} (registered: {})", registered.join(", "))
            }
            Self::Ambiguous { registered } => write!(
                f,
                "several models are registered ({}) and the job names none; cancel it and submit it with a model",
                registered.join(", ")
            ),
            Self::Delayed { seconds, cause } => write!(f, "tries again in {seconds} s after a failure: {cause}"),
            Self::Short { devices } => write!(f, "needs {devices} devices of one node at once; they are kept for it"),
            Self::Busy { model, devices, silent: 0 } => {
                write!(f, "all {devices} devices with model {model} are busy")
            }
            Self::Busy { model, devices, silent } => {
                write!(f, "all {devices} devices with model {model} are busy or silent ({silent} silent)")
            }
        }
    }
}
