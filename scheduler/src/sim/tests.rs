//! A short run of the simulator, and the check that it finds bugs: each of [`Bug`] is planted, and has to be found.

use super::runner::{Outcome, Size, run};
use crate::core::planted::{Bug, with};

/// A schedule of these that breaks an invariant.
fn broken(seeds: std::ops::Range<u64>, size: Size) -> Option<Outcome> {
    seeds.map(|seed| run(seed, size, false)).find(|outcome| outcome.broken.is_some())
}

fn assert_sound(seeds: std::ops::Range<u64>, size: Size) {
    if let Some(outcome) = broken(seeds, size) {
        let trace = run(outcome.seed, size, true).trace;
        let last = trace[trace.len().saturating_sub(100)..].join("\n");
        panic!("seed {} {size:?}: {}\n{last}", outcome.seed, outcome.broken.unwrap());
    }
}

#[test]
fn random_schedules_keep_all_invariants() {
    assert_sound(0..200, Size::Small);
}

#[test]
fn a_large_farm_keeps_all_invariants() {
    assert_sound(0..2, Size::Large(100));
}

#[test]
fn a_seed_is_a_schedule() {
    for seed in 0..20 {
        let [first, second] = [false, true].map(|traced| run(seed, Size::Small, traced));
        assert_eq!((first.hash, first.events, first.milliseconds), (second.hash, second.events, second.milliseconds));
        assert!(first.trace.is_empty() && !second.trace.is_empty());
    }
    assert_ne!(run(1, Size::Small, false).hash, run(2, Size::Small, false).hash);
}

/// The bug is found in some of the first schedules.
fn assert_found(bug: Bug) {
    let found = with(bug, || broken(0..300, Size::Small));
    let found = found.unwrap_or_else(|| panic!("{bug:?} is not found"));
    println!("{bug:?}: seed {}: {}", found.seed, found.broken.unwrap());
}

macro_rules! planted {
    ($($name:ident: $bug:ident,)+) => {
        $(
            #[test]
            fn $name() {
                assert_found(Bug::$bug);
            }
        )+
    };
}

planted! {
    finds_a_store_that_does_not_check_the_epoch: EpochNotChecked,
    finds_a_stale_report_that_is_applied: StaleReportAccepted,
    finds_an_answer_before_the_commit: AcknowledgedTooEarly,
    finds_devices_that_are_free_too_early: FreedTooEarly,
    finds_a_job_that_is_queued_while_it_runs: RequeuedWhileRunning,
    finds_a_lost_lease_that_counts: LostLeaseCounts,
    finds_half_a_gang: GangHalfGranted,
    finds_a_submission_that_is_admitted_twice: AdmittedTwice,
    finds_a_ledger_without_helpers: HelpersNotCharged,
    finds_a_drain_that_is_forgotten: DrainForgotten,
    finds_a_reservation_that_is_kept: ReservationKept,
    finds_a_state_without_a_reason: ReasonMissing,
    finds_an_old_heartbeat_that_is_taken_for_news: OldHeartbeatTaken,
    finds_a_job_that_does_not_wait_for_another: DependencyIgnored,
    finds_a_handing_back_that_counts: HandingBackCounts,
    finds_a_cancelled_job_that_runs_on: CancelledRunsOn,
}
