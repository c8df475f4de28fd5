//! What must hold of the farm's state after every event: for the simulator and the tests. Nothing here changes it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use farm_core::id::{AttemptKey, BootId, DeviceIndex, JobId, NodeId, TenantId};

use super::class::ClassIx;
use super::events::Dependency;
use super::farm::{Farm, Job, Phase, Slot};
use super::tenant::{Place, TenantIx};

/// What the core thinks of a job that is not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    Queued,
    Running(AttemptKey),
}

/// Fails with a text if the condition does not hold.
macro_rules! ensure {
    ($holds:expr, $($text:tt)+) => {
        if !$holds {
            return Err(format!($($text)+));
        }
    };
}

/// What all jobs together say of what is kept beside them.
#[derive(Default)]
struct Sums {
    /// Live jobs, those that have devices, and those devices.
    tenants: HashMap<TenantIx, (u64, u64, u32)>,
    waiting: BTreeMap<(TenantIx, ClassIx), BTreeSet<Place>>,
    /// Jobs, and those that wait for devices.
    classes: HashMap<ClassIx, (u64, u64)>,
    delayed: usize,
    picked: usize,
}

impl Farm {
    /// The structures agree with each other.
    pub fn check(&self) -> Result<(), String> {
        let mut sums = Sums::default();
        for (id, job) in self.jobs.iter() {
            self.check_phase(*id, job)?;
            sums.add(*id, job);
        }
        self.check_sums(&sums)?;
        ensure!(self.boots.len() == self.nodes.len(), "{} boots of {} nodes", self.boots.len(), self.nodes.len());
        for id in self.nodes.keys() {
            self.check_node(id)?;
        }
        self.check_models()?;
        self.check_batches()?;
        self.dependencies.check(|dependency| match dependency {
            Dependency::Job(job) => self.jobs.contains_key(&job),
            Dependency::Batch(batch) => self.batches.contains_key(&batch),
        })?;
        self.stock.check(|id| self.nodes.get(id).map(|node| (node.group, node.filed.clone())))?;
        self.reservations.check(|job, node| {
            let waits = self.jobs.get(&job).is_some_and(|job| matches!(job.phase, Phase::Waiting));
            waits && self.nodes.contains_key(node)
        })?;
        let runs = |job: &&JobId| matches!(self.jobs.get(job), Some(Job { phase: Phase::Running(_), .. }));
        let idle = self.orphans.iter().find(|job| !runs(job));
        ensure!(idle.is_none(), "orphan {idle:?} does not run");
        Ok(())
    }

    /// A job, and the devices that it has.
    pub fn check_job(&self, id: JobId) -> Result<(), String> {
        self.jobs.get(&id).map_or(Ok(()), |job| self.check_phase(id, job))
    }

    fn check_phase(&self, id: JobId, job: &Job) -> Result<(), String> {
        match &job.phase {
            Phase::Waiting => ensure!(!self.is_held(id, job), "job {id} waits for devices and is held"),
            Phase::Held => ensure!(self.is_held(id, job), "job {id} is held by nothing"),
            Phase::Delayed { until, .. } => {
                ensure!(self.delayed.contains(&(*until, id)), "job {id} is delayed for ever");
            }
            Phase::Picked(pick) => {
                ensure!(self.picked.contains(&id), "job {id} is picked and not in the list");
                self.check_slots(id, &pick.node, &pick.devices)?;
            }
            Phase::Running(lease) => {
                ensure!(lease.key.attempt == job.attempt && lease.key.job == id, "job {id} has lease {}", lease.key);
                match self.nodes.get(&lease.node).filter(|_| !self.orphans.contains(&id)) {
                    None => ensure!(self.orphans.contains(&id), "attempt {} has no node", lease.key),
                    Some(node) => {
                        ensure!(node.boot == lease.boot, "attempt {} is of another process", lease.key);
                        self.check_slots(id, &lease.node, &lease.devices)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The job has exactly these devices of the node.
    fn check_slots(&self, id: JobId, node_id: &NodeId, devices: &[DeviceIndex]) -> Result<(), String> {
        let Some(node) = self.nodes.get(node_id) else { return Err(format!("job {id} has devices of no node")) };
        ensure!(node.leases.contains(&id), "node {node_id} does not know of job {id}");
        for (i, device) in node.devices.iter().enumerate() {
            let (has, is) = (devices.contains(&DeviceIndex(i as u32)), device.slot == Slot::Leased(id));
            ensure!(has == is, "device {i} of node {node_id} is {:?}, and job {id} has {devices:?}", device.slot);
        }
        Ok(())
    }

    /// A node, and all that it runs.
    pub fn check_node(&self, id: &NodeId) -> Result<(), String> {
        let Some(node) = self.nodes.get(id) else { return Ok(()) };
        ensure!(self.boots.get(&node.boot) == Some(id), "boot {} is not node {id}'s", node.boot);
        for device in &node.devices {
            match &device.slot {
                Slot::Leased(job) => ensure!(node.leases.contains(job), "node {id} lends a device to idle job {job}"),
                Slot::Helping(help) => {
                    let command = help.awaited.as_ref().map(|(_, command)| command.key);
                    ensure!(command.is_none_or(|key| key == help.key), "node {id} is told to help another attempt");
                }
                Slot::Free | Slot::Stopping(_) => {}
            }
        }
        for job in &node.leases {
            let known = self.jobs.get(job);
            let of_node = known.is_some_and(|job| match &job.phase {
                Phase::Running(lease) => lease.node == *id,
                Phase::Picked(pick) => pick.node == *id,
                _ => false,
            });
            ensure!(of_node, "node {id} has a lease of job {job}, which does not run there");
            if let Some(known) = known {
                self.check_phase(*job, known)?;
            }
        }
        Ok(())
    }

    fn check_sums(&self, sums: &Sums) -> Result<(), String> {
        for (i, tenant) in self.tenants.iter().enumerate() {
            let ix = TenantIx(i as u32);
            let known = (tenant.live, tenant.running, tenant.devices);
            let counted = sums.tenants.get(&ix).copied().unwrap_or_default();
            ensure!(known == counted, "tenant {} counts {known:?}, its jobs make {counted:?}", tenant.id);
            for (class, places) in &tenant.waiting {
                let counted = sums.waiting.get(&(ix, *class));
                ensure!(
                    counted == Some(places),
                    "queue of tenant {} class {class:?}: {places:?}, {counted:?}",
                    tenant.id
                );
            }
        }
        let queues: usize = self.tenants.iter().map(|tenant| tenant.waiting.len()).sum();
        ensure!(queues == sums.waiting.len(), "{queues} queues, {} wanted", sums.waiting.len());
        ensure!(sums.delayed == self.delayed.len(), "{} delayed, {} known", sums.delayed, self.delayed.len());
        ensure!(sums.picked == self.picked.len(), "{} picked, {} known", sums.picked, self.picked.len());
        self.classes.check(&sums.classes)
    }

    fn check_models(&self) -> Result<(), String> {
        let mut counted: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for node in self.nodes.values() {
            for name in node.models.keys() {
                let (nodes, renderers) = counted.entry(name).or_default();
                *nodes += 1;
                *renderers += usize::from(node.roles.denoise);
            }
        }
        let known: BTreeMap<&str, (usize, usize)> =
            self.models.iter().map(|(name, model)| (name.as_ref(), (model.nodes, model.renderers))).collect();
        ensure!(known == counted, "models {known:?}, nodes have {counted:?}");
        Ok(())
    }

    fn check_batches(&self) -> Result<(), String> {
        for (id, job) in self.jobs.iter() {
            let stray =
                job.batches.iter().find(|batch| !self.batches.get(*batch).is_some_and(|known| known.live.contains(id)));
            ensure!(stray.is_none(), "job {id} is not in its batch {stray:?}");
        }
        for (id, batch) in &self.batches {
            ensure!(!batch.live.is_empty(), "batch {id} has no job and is kept");
            let gone = batch.live.iter().find(|job| !self.jobs.get(job).is_some_and(|job| job.batches.contains(id)));
            ensure!(gone.is_none(), "batch {id} has job {gone:?}, which is not of it");
        }
        Ok(())
    }

    /// What the core has of a job; `None` if it has ended, or was never heard of.
    pub fn held(&self, job: JobId) -> Option<Held> {
        Some(match &self.jobs.get(&job)?.phase {
            Phase::Running(lease) => Held::Running(lease.key),
            _ => Held::Queued,
        })
    }

    /// Queued and running jobs.
    pub fn live(&self) -> impl Iterator<Item = JobId> {
        self.jobs.keys().copied()
    }

    /// The process that the attempt is leased to, if it is the job's attempt now.
    pub fn owner(&self, key: &AttemptKey) -> Option<(&NodeId, BootId)> {
        self.lease(key).map(|lease| (&lease.node, lease.boot))
    }

    /// The devices that the attempt has, and how many help it.
    pub fn devices_of(&self, key: &AttemptKey) -> Option<(&[DeviceIndex], usize)> {
        self.lease(key).map(|lease| (lease.devices.as_slice(), lease.helpers.len()))
    }

    /// Jobs that have devices of the node.
    pub fn leases_on(&self, node: &NodeId) -> usize {
        self.nodes.get(node).map_or(0, |node| node.leases.len())
    }

    pub fn tenant_of(&self, job: JobId) -> Option<&TenantId> {
        self.jobs.get(&job).map(|job| &self.tenants[job.tenant.0 as usize].id)
    }
}

impl Sums {
    fn add(&mut self, id: JobId, job: &Job) {
        let (live, running, devices) = self.tenants.entry(job.tenant).or_default();
        *live += 1;
        let class = self.classes.entry(job.class).or_default();
        class.0 += 1;
        match &job.phase {
            Phase::Waiting => {
                class.1 += 1;
                self.waiting.entry((job.tenant, job.class)).or_default().insert(job.place(id));
            }
            Phase::Held => {}
            Phase::Delayed { .. } => self.delayed += 1,
            Phase::Picked(pick) => {
                self.picked += 1;
                *running += 1;
                *devices += pick.devices.len() as u32;
            }
            Phase::Running(lease) => {
                *running += 1;
                *devices += lease.devices.len() as u32;
            }
        }
    }
}
