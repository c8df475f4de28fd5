//! How far an attempt is: written by its device thread, read by heartbeats, waited for by nobody.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use farm_core::job::state::{Progress, Stage};

/// The latest progress of one attempt. Cloning shares it.
#[derive(Clone, Debug)]
pub struct ProgressCell {
    latest: Arc<Mutex<Progress>>,
    saved: Arc<AtomicU32>,
}

impl ProgressCell {
    pub fn new() -> Self {
        let starting = Progress { stage: Stage::Starting, done: 0, total: 0, eta_seconds: None };
        Self { latest: Arc::new(Mutex::new(starting)), saved: Arc::default() }
    }

    /// Returns the stage that the new progress ended, if it is of another.
    pub fn set(&self, progress: Progress) -> Option<Stage> {
        // A panic cannot leave the value half written.
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *latest, progress).stage;
        (before != progress.stage).then_some(before)
    }

    pub fn get(&self) -> Progress {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The latent of this step is in the store.
    pub fn save(&self, step: u32) {
        self.saved.fetch_max(step, Ordering::Relaxed);
    }

    /// The last step whose latent is known to be in the store, 0 if there is none.
    pub fn saved(&self) -> u32 {
        self.saved.load(Ordering::Relaxed)
    }
}
