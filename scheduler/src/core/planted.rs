//! Bugs that are planted on purpose, one at a time, to see that the simulator finds each. In the product there is none:
//! [`planted`] is `false` there, and what hangs on it is not compiled.

/// What has gone wrong in farms before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The store lets a leader write that was replaced.
    EpochNotChecked,
    /// A report is applied whoever sends it and whatever attempt it is of.
    StaleReportAccepted,
    /// A node is told that its report is committed before it is.
    AcknowledgedTooEarly,
    /// Devices of an attempt that has to stop are free at once, before their node has heard of it.
    FreedTooEarly,
    /// A job goes back to the queue while its attempt is still on the books.
    RequeuedWhileRunning,
    /// A lost attempt's devices count against its tenant's quota for ever.
    LostLeaseCounts,
    /// Only the first device of a gang is taken off the free ones.
    GangHalfGranted,
    /// A submission that is heard of twice is admitted twice.
    AdmittedTwice,
    /// The ledger leaves out what others' devices decoded.
    HelpersNotCharged,
    /// A node that is drained gets what was not started yet.
    DrainForgotten,
    /// A node that is kept for a job stays kept when the job is over.
    ReservationKept,
    /// Some state has no reason.
    ReasonMissing,
    /// A heartbeat that comes late is taken for news.
    OldHeartbeatTaken,
    /// A job does not wait for what it comes after.
    DependencyIgnored,
    /// What a node hands back counts as a failure of the job.
    HandingBackCounts,
    /// A cancelled job's attempt goes on.
    CancelledRunsOn,
}

#[cfg(test)]
pub use selected::{planted, with};

#[cfg(not(test))]
pub const fn planted(_: Bug) -> bool {
    false
}

#[cfg(test)]
mod selected {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    pub fn planted(bug: Bug) -> bool {
        PLANTED.with(|planted| planted.get() == Some(bug))
    }

    /// Runs `test` on this thread with the bug.
    pub fn with<T>(bug: Bug, test: impl FnOnce() -> T) -> T {
        PLANTED.with(|planted| planted.set(Some(bug)));
        let result = test();
        PLANTED.with(|planted| planted.set(None));
        result
    }
}
