//! How far an attempt is: written by its device thread, read by heartbeats, waited for by nobody.

use std::sync::{Arc, Mutex, PoisonError};

use farm_core::job::state::{Progress, Stage};

/// The latest progress of one attempt. Cloning shares it.
#[derive(Clone, Debug)]
pub struct ProgressCell(Arc<Mutex<Progress>>);

impl ProgressCell {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Progress { stage: Stage::Starting, done: 0, total: 0, eta_seconds: None })))
    }

    /// Returns the stage that the new progress ended, if it is of another.
    pub fn set(&self, progress: Progress) -> Option<Stage> {
        // A panic cannot leave the value half written.
        let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *latest, progress).stage;
        (before != progress.stage).then_some(before)
    }

    pub fn get(&self) -> Progress {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
