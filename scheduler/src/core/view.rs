//! What people may ask of the farm. Nothing here changes it.

use farm_core::api::{DeviceView, ModelView, NodeView, TenantView};
use farm_core::id::{Epoch, JobId, NodeId, TenantId};
use farm_core::job::state::Progress;

use super::events::Time;
use super::farm::{Counters, Device, Farm, Node, Phase, Slot};
use super::resolve::Models;
use super::tenant::Tenant;

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
        let rendered = self.models.iter().filter(|(_, known)| known.renderers > 0);
        Models(rendered.map(|(name, known)| (name.to_string(), (known.hash.clone(), known.defaults.clone()))).collect())
    }

    /// Where a running job is and how far; `None` if it is not running.
    pub fn running(&self, job: JobId) -> Option<(NodeId, Option<Progress>)> {
        match &self.jobs.get(&job)?.phase {
            Phase::Running(lease) => Some((lease.node.clone(), lease.progress)),
            _ => None,
        }
    }

    pub fn nodes(&self) -> Vec<NodeView> {
        self.nodes.iter().map(|(id, node)| self.view_of_node(id, node)).collect()
    }

    /// Whether a node of this name has joined, or was drained and left, or was in quarantine.
    pub fn knows_node(&self, id: &NodeId) -> bool {
        self.nodes.contains_key(id) || self.drained.contains(id) || self.health.contains_key(id)
    }

    /// Of one that is not there: that, and what awaits it.
    pub fn node_view(&self, id: &NodeId) -> NodeView {
        if let Some(node) = self.nodes.get(id) {
            return self.view_of_node(id, node);
        }
        let barred = self.barred(id).map(|why| format!("{why}; "));
        NodeView {
            node: id.clone(),
            version: String::new(),
            roles: Vec::new(),
            devices: Vec::new(),
            models: Vec::new(),
            last_heartbeat_seconds: 0.0,
            alive: false,
            labels: Default::default(),
            closed: Some(format!("{}not joined", barred.unwrap_or_default())),
        }
    }

    fn view_of_node(&self, id: &NodeId, node: &Node) -> NodeView {
        let models = node.models.iter();
        NodeView {
            node: id.clone(),
            version: node.version.clone(),
            roles: node.roles.names().into_iter().map(str::to_owned).collect(),
            devices: node.devices.iter().map(|device| self.device_view(device)).collect(),
            models: models
                .map(|(name, model)| ModelView { name: name.to_string(), hash: model.hash.clone() })
                .collect(),
            last_heartbeat_seconds: self.now.since(node.last_seen).as_secs_f32(),
            alive: self.is_alive(node),
            labels: node.labels.clone(),
            closed: self.closed(id, node),
        }
    }

    /// Whether jobs may be charged to it: the default tenant, and those that an operator has made.
    pub fn knows_tenant(&self, id: &TenantId) -> bool {
        self.tenant_ix.contains_key(id)
    }

    /// How many jobs of the tenant may wait or run at a time, if that is limited.
    pub fn max_queued(&self, id: &TenantId) -> Option<u64> {
        self.tenants[self.tenant_ix.get(id)?.0 as usize].spec.quota.queued
    }

    pub fn tenants(&self) -> Vec<TenantView> {
        self.tenants.iter().map(|tenant| self.view_of_tenant(tenant)).collect()
    }

    pub fn tenant_view(&self, id: &TenantId) -> Option<TenantView> {
        self.tenant_ix.get(id).map(|ix| self.view_of_tenant(&self.tenants[ix.0 as usize]))
    }

    fn view_of_tenant(&self, tenant: &Tenant) -> TenantView {
        TenantView {
            tenant: tenant.id.clone(),
            spec: tenant.spec.clone(),
            paused: tenant.paused,
            queued: tenant.live - tenant.running,
            running: tenant.running,
            devices: tenant.devices.into(),
            usage: tenant.usage.decayed(self.clock()),
            day: tenant.usage.day_seconds(self.hour()),
        }
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
}
