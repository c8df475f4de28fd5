//! Nodes that are kept for jobs which need several of their devices at once, so that smaller jobs do not take them one by
//! one for ever. Others may use what is free there if they end in time.

use std::collections::{BTreeMap, HashMap};

use farm_core::id::{JobId, NodeId};

use super::events::Time;
use super::planted::{Bug, planted};

/// At most so many jobs have a node kept for them.
const MAX_RESERVATIONS: usize = 16;

#[derive(Clone, Debug, PartialEq)]
pub struct Reservation {
    pub node: NodeId,
    /// Devices that the job needs.
    pub devices: usize,
    /// When they are expected to be free; unknown if an attempt there has no prediction.
    pub at: Option<Time>,
}

#[derive(Clone, Debug, Default)]
pub struct Reservations {
    of_job: BTreeMap<JobId, Reservation>,
    of_node: HashMap<NodeId, JobId>,
}

impl Reservations {
    pub fn get(&self, job: JobId) -> Option<&Reservation> {
        self.of_job.get(&job)
    }

    pub fn holder(&self, node: &NodeId) -> Option<JobId> {
        self.of_node.get(node).copied()
    }

    pub fn iter(&self) -> impl Iterator<Item = (JobId, &Reservation)> {
        self.of_job.iter().map(|(job, reservation)| (*job, reservation))
    }

    pub fn is_full(&self) -> bool {
        self.of_job.len() >= MAX_RESERVATIONS
    }

    /// Keeps a node that is kept for nobody.
    pub fn keep(&mut self, job: JobId, reservation: Reservation) {
        self.drop_job(job);
        self.of_node.insert(reservation.node.clone(), job);
        self.of_job.insert(job, reservation);
    }

    pub fn expect(&mut self, job: JobId, at: Option<Time>) {
        if let Some(reservation) = self.of_job.get_mut(&job) {
            reservation.at = at;
        }
    }

    pub fn drop_job(&mut self, job: JobId) {
        if planted(Bug::ReservationKept) {
            return;
        }
        if let Some(reservation) = self.of_job.remove(&job) {
            self.of_node.remove(&reservation.node);
        }
    }

    pub fn drop_node(&mut self, node: &NodeId) {
        if let Some(job) = self.of_node.remove(node) {
            self.of_job.remove(&job);
        }
    }

    /// Jobs and nodes say the same, and each pair makes sense.
    pub fn check(&self, makes_sense: impl Fn(JobId, &NodeId) -> bool) -> Result<(), String> {
        if self.of_job.len() != self.of_node.len() {
            return Err(format!("{} jobs have {} nodes kept for them", self.of_job.len(), self.of_node.len()));
        }
        for (job, kept) in &self.of_job {
            if self.of_node.get(&kept.node) != Some(job) || !makes_sense(*job, &kept.node) {
                return Err(format!("node {} is kept for job {job} for no reason", kept.node));
            }
        }
        Ok(())
    }
}
