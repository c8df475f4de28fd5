//! Object storage: manifests that are created once, latents, and its moods.

use std::collections::BTreeMap;
use std::sync::Arc;

use farm_core::id::{AttemptNo, JobId};

use super::Ms;

#[derive(Default)]
pub struct Bucket {
    results: BTreeMap<JobId, (AttemptNo, Arc<str>)>,
    /// The latest step of each job whose latent is stored.
    latents: BTreeMap<JobId, u32>,
    /// Until then everything takes long.
    pub slow: Ms,
    /// Until then nothing works.
    pub fails: Ms,
    /// Manifests that were refused, because there was one.
    pub refused: u64,
}

impl Bucket {
    pub fn result(&self, job: JobId) -> Option<&(AttemptNo, Arc<str>)> {
        self.results.get(&job)
    }

    /// Creates the manifest, unless there is one. True if it was created.
    pub fn create(&mut self, job: JobId, attempt: AttemptNo, json: Arc<str>) -> bool {
        if self.results.contains_key(&job) {
            self.refused += 1;
            return false;
        }
        self.results.insert(job, (attempt, json));
        true
    }

    pub fn latent(&self, job: JobId) -> u32 {
        self.latents.get(&job).copied().unwrap_or(0)
    }

    pub fn keep_latent(&mut self, job: JobId, step: u32) {
        if step > 0 {
            let known = self.latents.entry(job).or_default();
            *known = step.max(*known);
        }
    }
}
