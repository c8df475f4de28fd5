//! Batches, and who comes after whom.

use std::collections::{BTreeSet, HashMap};

use farm_core::id::JobId;

use super::events::{Dependency, SavedBatch};

/// All jobs of one submission.
#[derive(Clone, Debug)]
pub struct Batch {
    pub paused: bool,
    pub max_failures: Option<u32>,
    pub failed: u32,
    /// Those that are queued or running.
    pub live: BTreeSet<JobId>,
}

impl Batch {
    pub fn new(saved: SavedBatch) -> Self {
        let SavedBatch { max_failures, failed, paused, .. } = saved;
        Self { paused, max_failures, failed, live: BTreeSet::new() }
    }

    /// More of its jobs have failed than it puts up with.
    pub fn is_given_up(&self) -> bool {
        self.max_failures.is_some_and(|most| self.failed > most)
    }
}

/// Jobs that wait for others, and for whom. A job or batch that has ended well is nobody's business any more.
#[derive(Debug, Default)]
pub struct Dependencies {
    of_job: HashMap<JobId, Vec<Dependency>>,
    waiting: HashMap<Dependency, BTreeSet<JobId>>,
}

impl Dependencies {
    pub fn add(&mut self, job: JobId, after: Vec<Dependency>) {
        for dependency in &after {
            self.waiting.entry(*dependency).or_default().insert(job);
        }
        if !after.is_empty() {
            self.of_job.insert(job, after);
        }
    }

    /// Jobs that come after something that is not done.
    pub fn jobs(&self) -> usize {
        self.of_job.len()
    }

    /// What the job comes after and is not done.
    pub fn of(&self, job: JobId) -> &[Dependency] {
        self.of_job.get(&job).map_or(&[], Vec::as_slice)
    }

    /// The job has ended or was cancelled.
    pub fn forget(&mut self, job: JobId) {
        for dependency in self.of_job.remove(&job).unwrap_or_default() {
            if let Some(jobs) = self.waiting.get_mut(&dependency) {
                jobs.remove(&job);
                if jobs.is_empty() {
                    self.waiting.remove(&dependency);
                }
            }
        }
    }

    /// It is done. Gives the jobs that waited for it.
    pub fn done(&mut self, dependency: Dependency) -> Vec<JobId> {
        let jobs = self.waiting.remove(&dependency).unwrap_or_default();
        for job in &jobs {
            if let Some(after) = self.of_job.get_mut(job) {
                after.retain(|other| *other != dependency);
                if after.is_empty() {
                    self.of_job.remove(job);
                }
            }
        }
        jobs.into_iter().collect()
    }

    /// The jobs that wait for it.
    pub fn waiting_for(&self, dependency: Dependency) -> Vec<JobId> {
        self.waiting.get(&dependency).map(|jobs| jobs.iter().copied().collect()).unwrap_or_default()
    }

    /// Both directions say the same, and what is waited for is not over.
    pub fn check(&self, is_open: impl Fn(Dependency) -> bool) -> Result<(), String> {
        let there: usize = self.of_job.values().map(|after| after.iter().collect::<BTreeSet<_>>().len()).sum();
        let back: usize = self.waiting.values().map(BTreeSet::len).sum();
        if there != back {
            return Err(format!("{there} dependencies one way, {back} the other"));
        }
        for (job, after) in &self.of_job {
            if let Some(lost) = after.iter().find(|on| !self.waiting.get(*on).is_some_and(|jobs| jobs.contains(job))) {
                return Err(format!("{lost:?} does not know of job {job} that comes after it"));
            }
            if let Some(over) = after.iter().find(|on| !is_open(**on)) {
                return Err(format!("job {job} comes after {over:?}, which is over"));
            }
        }
        Ok(())
    }
}
