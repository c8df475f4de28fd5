//! Queued and running jobs by id.

use std::collections::HashMap;
use std::ops::Index;

use farm_core::id::JobId;
use rustc_hash::FxBuildHasher;

use super::farm::Job;

/// Each job has a place of its own, so that a table of a million grows without moving them and its empty places are
/// small. The hash is a quick one: ids are drawn by schedulers, not by users.
#[derive(Debug, Default)]
pub(super) struct Jobs(HashMap<JobId, Box<Job>, FxBuildHasher>);

impl Jobs {
    pub fn with_capacity(jobs: usize) -> Self {
        Self(HashMap::with_capacity_and_hasher(jobs, FxBuildHasher))
    }

    pub fn get(&self, id: &JobId) -> Option<&Job> {
        self.0.get(id).map(|job| &**job)
    }

    pub fn get_mut(&mut self, id: &JobId) -> Option<&mut Job> {
        self.0.get_mut(id).map(|job| &mut **job)
    }

    pub fn insert(&mut self, id: JobId, job: Job) {
        self.0.insert(id, Box::new(job));
    }

    pub fn remove(&mut self, id: &JobId) -> Option<Box<Job>> {
        self.0.remove(id)
    }

    pub fn contains_key(&self, id: &JobId) -> bool {
        self.0.contains_key(id)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&JobId, &Job)> {
        self.0.iter().map(|(id, job)| (id, &**job))
    }

    pub fn keys(&self) -> impl Iterator<Item = &JobId> {
        self.0.keys()
    }

    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut Job> {
        self.0.values_mut().map(|job| &mut **job)
    }
}

impl Index<&JobId> for Jobs {
    type Output = Job;
    fn index(&self, id: &JobId) -> &Job {
        &self.0[id]
    }
}
