//! Reports that are not acknowledged yet, as the session sees them. The node's disk has them too ([`crate::outbox`]).

use std::time::{Duration, Instant};

use farm_core::id::AttemptKey;
use farm_core::wire::to_scheduler::{AttemptReport, ToScheduler};

use super::state::Held;

/// A report that is not acknowledged is sent again after this.
const RESEND: Duration = Duration::from_secs(3);
/// A disk that has not taken a report by then is not waited for.
const DISK: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Pending {
    number: u64,
    report: AttemptReport,
    /// The attempt, listed until its report is acknowledged; none if it was an earlier process's.
    held: Option<Held>,
    /// When it is sent at the latest, unless it is on disk before.
    unkept: Option<Instant>,
    resend: Instant,
}

#[derive(Debug)]
pub struct Reports {
    /// Oldest first.
    pending: Vec<Pending>,
    last: u64,
}

impl Reports {
    /// With those that earlier processes of the node could not deliver.
    pub fn new(earlier: Vec<(u64, AttemptReport)>, now: Instant) -> Self {
        let last = earlier.iter().map(|(number, _)| *number).max().unwrap_or(0);
        let pending = |(number, report)| Pending { number, report, held: None, unkept: None, resend: now };
        Self { pending: earlier.into_iter().map(pending).collect(), last }
    }

    /// A new one. It is sent when it is on disk.
    pub fn add(&mut self, held: Held, report: AttemptReport, now: Instant) -> u64 {
        self.last += 1;
        let number = self.last;
        self.pending.push(Pending { number, report, held: Some(held), unkept: Some(now + DISK), resend: now });
        number
    }

    /// It is on disk, or the disk has failed.
    pub fn kept(&mut self, number: u64) {
        for pending in self.pending.iter_mut().filter(|pending| pending.number == number) {
            pending.unkept = None;
        }
    }

    /// Everything is sent at once.
    pub fn resend(&mut self, now: Instant) {
        self.pending.iter_mut().for_each(|pending| pending.resend = now);
    }

    /// True if the attempt is reported; the report is sent at once.
    pub fn resend_of(&mut self, key: AttemptKey, now: Instant) -> bool {
        match self.pending.iter_mut().find(|pending| pending.report.key == key) {
            Some(pending) => {
                pending.resend = now;
                true
            }
            None => false,
        }
    }

    /// Drops reports that nobody needs any more and returns their numbers.
    pub fn acknowledged(&mut self, number: u64) -> Vec<u64> {
        self.drop_all(|pending| pending.number == number)
    }

    pub fn aborted(&mut self, key: AttemptKey) -> Vec<u64> {
        self.drop_all(|pending| pending.report.key == key)
    }

    fn drop_all(&mut self, dropped: impl Fn(&Pending) -> bool) -> Vec<u64> {
        let (gone, pending) = std::mem::take(&mut self.pending).into_iter().partition(dropped);
        self.pending = pending;
        let gone: Vec<Pending> = gone;
        gone.into_iter().map(|pending| pending.number).collect()
    }

    /// What is to be sent now.
    pub fn due(&mut self, now: Instant) -> Vec<ToScheduler> {
        let due = |pending: &&mut Pending| now >= pending.resend && pending.unkept.is_none_or(|latest| now >= latest);
        let send = |pending: &mut Pending| {
            pending.resend = now + RESEND;
            ToScheduler::Report { number: pending.number, report: pending.report.clone() }
        };
        self.pending.iter_mut().filter(due).map(send).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Ended attempts that are the node's business still.
    pub fn held(&self) -> impl Iterator<Item = &Held> {
        self.pending.iter().filter_map(|pending| pending.held.as_ref())
    }
}
