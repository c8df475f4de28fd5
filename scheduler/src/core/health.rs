//! Nodes that fail what others can do are left alone for a while.

use std::time::Duration;

use farm_core::id::JobId;

use super::events::Time;

/// Attempts in a row, of different jobs, that a node's devices may fail.
const FAILURES: u32 = 3;
const FIRST_QUARANTINE: Duration = Duration::from_secs(5 * 60);
const LONGEST_QUARANTINE: Duration = Duration::from_secs(60 * 60);

/// A node's record, kept over its sessions and restarts.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// Attempts in a row that its devices have failed.
    failures: u32,
    /// The job of the last one: a job that fails twice says no more of the node than once.
    last: Option<JobId>,
    /// Quarantines since it last finished a clip.
    quarantines: u32,
    until: Option<Time>,
    why: String,
}

impl Health {
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// True if a quarantine begins.
    pub fn failed(&mut self, job: JobId, message: &str, now: Time) -> bool {
        if self.last != Some(job) {
            self.failures += 1;
        }
        self.last = Some(job);
        if self.failures < FAILURES || self.quarantine(now).is_some() {
            return false;
        }
        let span = (FIRST_QUARANTINE * 2u32.pow(self.quarantines.min(8))).min(LONGEST_QUARANTINE);
        self.quarantines += 1;
        self.until = Some(now + span);
        self.why = message.to_owned();
        // After it, one more failure is enough.
        self.failures = FAILURES - 1;
        true
    }

    /// How long its quarantine lasts yet, and why it began.
    pub fn quarantine(&self, now: Time) -> Option<(Duration, &str)> {
        let left = self.until?.since(now);
        (!left.is_zero()).then_some((left, self.why.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::job_id;
    use super::*;

    fn at(seconds: u64) -> Time {
        Time(Duration::from_secs(seconds))
    }

    #[test]
    fn three_jobs_in_a_row_begin_a_quarantine_and_one_more_a_longer_one() {
        let mut health = Health::default();
        assert!(!health.failed(job_id(1), "a", at(0)) && !health.failed(job_id(2), "b", at(1)));
        assert!(health.failed(job_id(3), "c", at(2)));
        assert_eq!(health.quarantine(at(2)), Some((Duration::from_secs(300), "c")));
        assert_eq!(health.quarantine(at(302)), None);
        assert!(health.failed(job_id(4), "d", at(400)));
        assert_eq!(health.quarantine(at(400)).unwrap().0, Duration::from_secs(600));
    }

    #[test]
    fn one_job_alone_says_little_and_a_clip_clears_the_record() {
        let mut health = Health::default();
        for _ in 0..10 {
            assert!(!health.failed(job_id(1), "a", at(0)));
        }
        assert!(!health.failed(job_id(2), "a", at(0)));
        health.succeeded();
        assert!(!health.failed(job_id(3), "a", at(0)));
    }
}
