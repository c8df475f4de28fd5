//! Where each artifact of a job lives below the store's prefix.

use crate::id::{AttemptNo, JobId};

/// `jobs/{job}/attempt/{n}/clip.mp4`
pub fn clip(job: JobId, attempt: AttemptNo) -> String {
    format!("jobs/{job}/attempt/{attempt}/clip.mp4")
}

/// `jobs/{job}/result.json`: created once, names the accepted attempt.
pub fn result(job: JobId) -> String {
    format!("jobs/{job}/result.json")
}
