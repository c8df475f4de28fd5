//! One test for each rule about what stops, holds and ends jobs: pauses, drains, batches, what comes after what, causes of
//! failure.

use std::collections::BTreeMap;
use std::time::Duration;

use farm_core::api::{TenantSpec, WaitCode};
use farm_core::id::{AttemptKey, JobId};
use farm_core::job::state::{FailureKind, JobState, Progress, Stage};
use farm_core::wire::StopNo;
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{AttemptOutcome, Crash, Registration, RunningAttempt, ToScheduler};

use super::events::{Dependency, Event, LiveJob, Scope, Wish};
use super::fixture::*;

const ANY: &str = r#"{"prompt":"a"}"#;

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn world(devices: usize) -> World {
    let mut world = World::new();
    world.register("a", boot(1), registration(devices, &["m"]));
    world
}

fn code(world: &World, job: JobId) -> WaitCode {
    world.farm.reason(job).unwrap().code
}

fn yields(world: &World) -> Vec<AttemptKey> {
    let key = |send: &super::effects::Send| match &send.message {
        ToNode::Yield { key, .. } => Some(*key),
        _ => None,
    };
    world.sent.iter().filter_map(key).collect()
}

const INTERRUPTED: AttemptOutcome = AttemptOutcome::Interrupted { step: 3 };

#[test]
fn a_pause_of_any_scope_hands_back_what_runs_and_starts_nothing_until_it_is_resumed() {
    for scope in 0..4 {
        let mut world = world(1);
        world.submit_all(vec![world.line(1), world.line(2)], Some((7, None)), ANY);
        let (key, waiting) = (world.start().key, job_id(2));
        let scope = match scope {
            0 => Scope::Farm,
            1 => Scope::Tenant(Default::default()),
            2 => Scope::Batch(batch_id(7)),
            _ => Scope::Job(key.job),
        };
        world.wish(Wish::Pause(scope.clone()));
        assert_eq!(yields(&world), [key], "{scope}");
        world.report("a", boot(1), key, INTERRUPTED);
        assert_eq!(code(&world, key.job), WaitCode::Paused, "{scope}");
        assert_eq!(world.state(waiting) == JobState::Running, matches!(scope, Scope::Job(_)), "{scope}");
        world.restart();
        assert_eq!(code(&world, key.job), WaitCode::Paused, "a restart changes nothing");
        world.register("a", boot(1), registration(2, &["m"]));
        world.pass_with(seconds(20), &[("a", boot(1), &[])]);
        assert_eq!(world.state(key.job), JobState::Queued, "{scope}");
        world.wish(Wish::Resume(scope));
        world.event(Event::Tick);
        assert_eq!(world.state(key.job), JobState::Running);
    }
}

#[test]
fn devices_of_a_stopped_attempt_are_free_once_their_node_has_heard_of_it_and_not_by_a_list_from_before_its_start() {
    let mut world = world(1);
    world.submit(1, 0, None);
    let key = world.start().key;
    world.wish(Wish::Cancel(key.job));
    let heard_of = world.farm.stop;
    world.submit(2, 0, None);
    let before = StopNo { number: heard_of.number - 1, ..heard_of };
    world.beat_having_heard(before, "a", boot(1), vec![], vec![]);
    assert_eq!(world.aborts(), [key], "told again");
    world.event(Event::Tick);
    assert_eq!(world.state(job_id(2)), JobState::Queued, "the list may be from before the attempt began");
    world.beat_having_heard(heard_of, "a", boot(1), vec![world.listed(key)], vec![]);
    world.event(Event::Tick);
    assert_eq!(world.state(job_id(2)), JobState::Queued, "it has not stopped yet");
    world.beat_having_heard(heard_of, "a", boot(1), vec![], vec![]);
    world.event(Event::Tick);
    assert_eq!(world.state(job_id(2)), JobState::Running);
}

#[test]
fn a_node_that_comes_back_frees_what_it_does_not_list_only_if_it_has_heard_that_it_is_to_stop() {
    let mut world = world(1);
    world.submit(1, 0, None);
    let key = world.start().key;
    world.wish(Wish::Cancel(key.job));
    let heard_of = world.farm.stop;
    world.submit(2, 0, None);
    world.event(Event::SessionClosed(boot(1)));
    // The command to start it may be on the way yet, and that to stop it is lost.
    world.register("a", boot(1), registration(1, &["m"]));
    assert_eq!(world.aborts(), [key], "told again");
    world.event(Event::Tick);
    assert_eq!(world.state(job_id(2)), JobState::Queued);
    world.event(Event::SessionClosed(boot(1)));
    world.register("a", boot(1), Registration { heard: heard_of, ..registration(1, &["m"]) });
    world.event(Event::Tick);
    assert_eq!(world.state(job_id(2)), JobState::Running);
}

#[test]
fn a_drained_node_hands_back_what_it_runs_and_gets_nothing_until_it_is_undrained() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.wish(Wish::Drain(node("a")));
    assert_eq!(yields(&world), [key]);
    world.report("a", boot(1), key, INTERRUPTED);
    assert_eq!((world.state(job), code(&world, job)), (JobState::Queued, WaitCode::Nodes));
    assert!(world.reason(job).contains("a is drained"), "{}", world.reason(job));
    let counts = world.rows[&job].live.counts;
    assert_eq!((counts.device, counts.losses, counts.preemptions), (0, 0, 0), "nobody's failure");
    world.event(Event::SessionClosed(boot(1)));
    world.register("a", boot(2), registration(1, &["m"]));
    assert_eq!(world.state(job), JobState::Queued, "whatever joins by that name");
    world.restart();
    world.register("a", boot(2), registration(1, &["m"]));
    assert_eq!(world.state(job), JobState::Queued, "nor after a restart");
    world.wish(Wish::Undrain(node("a")));
    assert_eq!(world.start().key.attempt.0, 2);
}

#[test]
fn a_node_that_leaves_gets_no_new_work_and_hands_its_clips_to_others() {
    let mut world = world(2);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.message("a", boot(1), ToScheduler::Leaving { reason: "spot notice".to_owned() });
    let waiting = world.submit(2, 0, None);
    assert!(world.reason(waiting).contains("a is leaving: spot notice"), "{}", world.reason(waiting));
    world.register("b", boot(2), registration(2, &["m"]));
    assert_eq!(world.state(waiting), JobState::Running);
    world.report("a", boot(1), key, INTERRUPTED);
    assert_eq!(world.farm.running(job).unwrap().0, node("b"));
    assert_eq!(world.rows[&job].live.counts.losses, 0);
}

#[test]
fn three_jobs_that_fail_on_one_node_put_it_into_quarantine() {
    let mut world = world(1);
    for n in 1..=3 {
        world.submit(n, 0, None);
        let key = world.start().key;
        world.report("a", boot(1), key, failed(FailureKind::Device));
        world.cancel(key.job);
    }
    let job = world.submit(4, 0, None);
    assert!(world.reason(job).contains("a is in quarantine for 300 s: out of luck"), "{}", world.reason(job));
    world.wish(Wish::Undrain(node("a")));
    assert_eq!(world.state(job), JobState::Running, "undraining ends it");
}

#[test]
fn a_job_goes_to_another_node_than_the_one_that_failed_it() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.report("a", boot(1), key, failed(FailureKind::Device));
    world.register("b", boot(2), registration(1, &["m"]));
    world.pass_with(seconds(3), &[("a", boot(1), &[]), ("b", boot(2), &[])]);
    assert_eq!(world.farm.running(job).unwrap().0, node("b"));
}

#[test]
fn a_job_that_kills_its_node_twice_is_parked_with_the_evidence() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    for n in 1..=2 {
        let key = world.rows[&job].live.running.as_ref().unwrap().key;
        world.event(Event::SessionClosed(boot(n)));
        let crash = Crash { attempts: vec![key], cause: "signal 11 (SIGSEGV)".to_owned(), own_fault: true };
        let again = Registration { crash: Some(crash), ..registration(1, &["m"]) };
        for _ in 0..3 {
            world.register("a", boot(n + 1), again.clone());
        }
        assert_eq!(world.rows[&job].live.counts.kills, n as u32, "counted once, however often it is said");
    }
    assert_eq!(world.state(job), JobState::Failed);
    let reason = world.rows[&job].reason.clone().unwrap();
    assert!(reason.starts_with("poison: 2 nodes died while they ran it, last a: signal 11"), "{reason}");
}

#[test]
fn a_node_that_was_killed_from_outside_says_nothing_of_its_jobs() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.event(Event::SessionClosed(boot(1)));
    let crash = Crash { attempts: vec![key], cause: "no trace".to_owned(), own_fault: false };
    world.register("a", boot(2), Registration { crash: Some(crash), ..registration(1, &["m"]) });
    assert_eq!((world.state(job), world.rows[&job].live.counts.kills), (JobState::Running, 0));
}

#[test]
fn a_clip_that_runs_out_of_memory_gets_more_devices() {
    let mut world = World::new();
    world.register("a", boot(1), registration(1, &["m"]));
    world.register("b", boot(2), registration(4, &["m"]));
    let mut sizes = Vec::new();
    let job = world.submit(2, 0, None);
    while world.state(job) == JobState::Running {
        let running = world.rows[&job].live.running.clone().unwrap();
        sizes.push(running.devices.len());
        world.report(&running.node.0, running.boot, running.key, failed(FailureKind::OutOfMemory));
    }
    assert_eq!(sizes, [1, 2, 4]);
    assert!(world.rows[&job].reason.clone().unwrap().starts_with("ran out of memory 3 times"));
}

#[test]
fn a_decode_that_runs_out_of_memory_gets_smaller_tiles() {
    let mut world = world(1);
    world.submit(1, 0, None);
    let (key, before) = (world.start().key, world.start().tiling);
    let progress = Progress { stage: Stage::Decode, done: 0, total: 9, eta_seconds: None };
    let running = RunningAttempt { key, progress, devices: world.start().devices };
    world.beat("a", boot(1), vec![running], &[]);
    world.report("a", boot(1), key, failed(FailureKind::OutOfMemory));
    let start = world.start();
    assert_eq!((start.devices.len(), start.tiling), (1, before.smaller(1)));
}

#[test]
fn an_attempt_without_progress_is_given_up_but_its_devices_only_when_the_node_has_stopped() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.pass_with(seconds(605), &[("a", boot(1), &[key])]);
    assert_eq!(world.rows[&job].outcomes, ["device"]);
    assert!(world.farm.running(job).is_none());
    world.pass_with(seconds(5), &[("a", boot(1), &[])]);
    assert_eq!(world.state(job), JobState::Running);
}

fn after(world: &World, n: u64, what: Dependency) -> LiveJob {
    LiveJob { after: vec![what], ..world.line(n) }
}

#[test]
fn a_job_starts_after_what_it_comes_after_is_done_and_fails_with_it() {
    for good in [true, false] {
        let mut world = world(2);
        let first = world.submit(1, 0, None);
        let key = world.start().key;
        let second = world.submit_line(after(&world, 2, Dependency::Job(first)), ANY);
        let third = world.submit_line(after(&world, 3, Dependency::Job(second)), ANY);
        assert_eq!((code(&world, second), code(&world, third)), (WaitCode::After, WaitCode::After));
        world.restart();
        world.register("a", boot(1), registration(2, &["m"]));
        let outcome = if good { completed(key) } else { failed(FailureKind::Input) };
        world.report("a", boot(1), key, outcome);
        let expected = if good { (JobState::Running, JobState::Queued) } else { (JobState::Failed, JobState::Failed) };
        assert_eq!((world.state(second), world.state(third)), expected);
        if !good {
            let reason = world.rows[&third].reason.clone().unwrap();
            assert_eq!(reason, format!("job {} that it comes after has failed", second.short()));
        }
    }
}

#[test]
fn a_job_that_comes_after_a_batch_waits_for_all_of_it() {
    let mut world = world(1);
    world.submit_all(vec![world.line(1), world.line(2)], Some((7, None)), ANY);
    let key = world.start().key;
    let last = world.submit_line(after(&world, 3, Dependency::Batch(batch_id(7))), ANY);
    world.report("a", boot(1), key, completed(key));
    let key = world.start().key;
    assert_eq!((key.job, world.state(last)), (job_id(2), JobState::Queued));
    world.report("a", boot(1), key, completed(key));
    assert_eq!(world.start().key.job, last);
}

#[test]
fn a_batch_is_given_up_when_more_of_its_jobs_fail_than_it_puts_up_with() {
    let mut world = world(1);
    world.submit_all((1..=4).map(|n| world.line(n)).collect(), Some((7, Some(1))), ANY);
    for _ in 0..2 {
        assert_eq!(world.state(job_id(4)), JobState::Queued);
        let key = world.start().key;
        world.report("a", boot(1), key, failed(FailureKind::Input));
    }
    let states = [1, 2, 3, 4].map(|n| world.state(job_id(n)));
    let (failed, cancelled) = (JobState::Failed, JobState::Cancelled);
    assert_eq!(states, [failed, failed, cancelled, cancelled]);
}

#[test]
fn jobs_of_a_batch_that_come_after_each_other_are_cancelled_with_it() {
    for is_given_up in [false, true] {
        let mut world = world(1);
        let most = is_given_up.then_some(0);
        let lines = vec![
            world.line(1),
            after(&world, 2, Dependency::Job(job_id(1))),
            after(&world, 3, Dependency::Job(job_id(2))),
            world.line(4),
        ];
        world.submit_all(lines, Some((7, most)), ANY);
        let key = world.start().key;
        assert_eq!(key.job, job_id(1));
        let outside = world.submit_line(after(&world, 5, Dependency::Job(job_id(3))), ANY);
        if is_given_up {
            world.report("a", boot(1), key, failed(FailureKind::Input));
        } else {
            world.wish(Wish::CancelBatch(batch_id(7)));
        }
        let (failed, cancelled) = (JobState::Failed, JobState::Cancelled);
        let first = if is_given_up { failed } else { cancelled };
        assert_eq!([1, 2, 3, 4].map(|n| world.state(job_id(n))), [first, cancelled, cancelled, cancelled]);
        assert_eq!(world.state(outside), failed, "it is of no batch that was cancelled");
    }
}

#[test]
fn labels_that_a_job_requires_are_those_of_the_node() {
    let mut world = world(1);
    let require = BTreeMap::from([("gpu".to_owned(), "h100".to_owned())]);
    let job = world.submit_line(LiveJob { require: require.clone(), ..world.line(1) }, ANY);
    assert_eq!(
        (code(&world, job), world.reason(job)),
        (WaitCode::Labels, "no node with model m has gpu=h100".to_owned())
    );
    world.register("b", boot(2), Registration { labels: require, ..registration(1, &["m"]) });
    assert_eq!(world.starts()[0].0, node("b"));
}

#[test]
fn a_clip_that_no_node_has_memory_for_says_so() {
    let mut world = World::new();
    world.register("a", boot(1), Registration { site_json: Some(site(1e9)), ..registration(2, &["m"]) });
    let job = world.submit(1, 0, Some("m"));
    assert_eq!(code(&world, job), WaitCode::Memory);
}

#[test]
fn every_wish_that_changes_something_leaves_a_line_in_the_audit_trail() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let mut audited = |wish: Wish| {
        world.wish(wish);
        let action = |change: &super::effects::Change| match change {
            super::effects::Change::Audit { action, .. } => Some(*action),
            _ => None,
        };
        world.changes.iter().filter_map(action).collect::<Vec<_>>()
    };
    assert_eq!(audited(Wish::Drain(node("a"))), ["drain"]);
    assert!(audited(Wish::Drain(node("a"))).is_empty(), "it was drained already");
    assert_eq!(audited(Wish::Undrain(node("a"))), ["undrain"]);
    assert_eq!(audited(Wish::Pause(Scope::Farm)), ["pause"]);
    assert_eq!(audited(Wish::SetTenant(tenant("red"), TenantSpec::default())), ["quota"]);
    assert_eq!(audited(Wish::Cancel(job)), ["cancel"]);
    assert!(audited(Wish::Cancel(job)).is_empty());
}
