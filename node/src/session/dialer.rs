//! Which of the farm's schedulers is dialled, and when. One of them leads, the others stand by for it.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Waits after a round in which no scheduler let the node in: doubled from the first to the last, then kept. Jittered, so
/// that the nodes of a farm do not come back in step.
const FIRST: Duration = Duration::from_millis(200);
const LAST: Duration = Duration::from_secs(5);
/// The longest wait while schedulers stand by: one of them is about to lead.
const STANDBY: Duration = Duration::from_millis(500);

/// Why a dial has led to no session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missed {
    Unreachable(String),
    /// It waits for the leader to go, which is the one with this number, if that is known.
    Standby {
        leader: Option<usize>,
    },
}

#[derive(Debug)]
pub struct Dialer {
    schedulers: usize,
    at: usize,
    /// Dials of this round.
    tried: usize,
    /// One of them has reached a scheduler that stands by.
    standby: bool,
    wait: Duration,
    rng: StdRng,
}

impl Dialer {
    /// `seed` is for the jitter.
    pub fn new(schedulers: usize, seed: u64) -> Self {
        let rng = StdRng::seed_from_u64(seed);
        Self { schedulers: schedulers.max(1), at: 0, tried: 0, standby: false, wait: FIRST, rng }
    }

    /// The number of the scheduler that is dialled next, or has been last.
    pub fn at(&self) -> usize {
        self.at
    }

    /// The scheduler has welcomed the node: it is the first to be tried when the session is lost.
    pub fn joined(&mut self) {
        (self.tried, self.standby, self.wait) = (0, false, FIRST);
    }

    /// The dial, or the session that came of it, was for nothing. Returns the wait before the next one, which is none as
    /// long as there are schedulers that have not been tried in this round.
    pub fn missed(&mut self, missed: &Missed) -> Duration {
        self.tried += 1;
        let next = (self.at + 1) % self.schedulers;
        self.at = match missed {
            Missed::Standby { leader } => {
                self.standby = true;
                leader.filter(|leader| *leader < self.schedulers).unwrap_or(next)
            }
            Missed::Unreachable(_) => next,
        };
        if self.tried < self.schedulers {
            return Duration::ZERO;
        }
        let wait = if self.standby { self.wait.min(STANDBY) } else { self.wait };
        (self.tried, self.standby, self.wait) = (0, false, (self.wait * 2).min(LAST));
        self.jittered(wait)
    }

    /// The wait before the same scheduler is dialled again, whose session is lost.
    pub fn lost(&mut self) -> Duration {
        (self.tried, self.standby) = (0, false);
        self.jittered(self.wait)
    }

    /// Half to all of `wait`.
    pub fn jittered(&mut self, wait: Duration) -> Duration {
        wait.mul_f64(self.rng.random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn down() -> Missed {
        Missed::Unreachable("down".into())
    }

    #[test]
    fn every_scheduler_is_tried_before_any_wait_and_the_leader_is_tried_next() {
        let mut dialer = Dialer::new(3, 1);
        let mut tried = vec![dialer.at()];
        while dialer.missed(&down()).is_zero() {
            tried.push(dialer.at());
        }
        assert_eq!(tried, [0, 1, 2]);
        assert_eq!(dialer.missed(&Missed::Standby { leader: Some(2) }), Duration::ZERO);
        assert_eq!(dialer.at(), 2);
        dialer.joined();
        assert!(dialer.lost() <= FIRST);
        assert_eq!(dialer.at(), 2, "the last good one is tried first");
    }

    #[test]
    fn while_schedulers_stand_by_the_waits_stay_short() {
        let mut dialer = Dialer::new(2, 1);
        for _ in 0..50 {
            let waits = [dialer.missed(&down()), dialer.missed(&Missed::Standby { leader: None })];
            assert!(waits[0].is_zero() && waits[1] <= STANDBY && !waits[1].is_zero(), "{waits:?}");
        }
    }

    proptest! {
        #[test]
        fn no_more_than_one_dial_for_each_scheduler_goes_without_a_wait(
            schedulers in 1..6usize,
            misses in prop::collection::vec(prop::option::of(0..9usize), 1..100),
        ) {
            let mut dialer = Dialer::new(schedulers, 1);
            let mut in_a_row = 0;
            for leader in misses {
                let wait = dialer.missed(&leader.map_or_else(down, |leader| Missed::Standby { leader: Some(leader) }));
                in_a_row = if wait.is_zero() { in_a_row + 1 } else { 0 };
                prop_assert!(in_a_row < schedulers && dialer.at() < schedulers && wait <= LAST);
            }
        }
    }
}
