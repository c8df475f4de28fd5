//! One test for each rule.

use std::time::Duration;

use farm_core::id::{AttemptNo, DeviceIndex, Epoch};
use farm_core::job::spec::RenderSpec;
use farm_core::job::state::{FailureKind, JobState};
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{AttemptOutcome, Roles};

use super::effects::Change;
use super::events::Event;
use super::fixture::*;

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A world with node `a`, boot 1.
fn world(devices: usize) -> World {
    let mut world = World::new();
    world.register("a", boot(1), registration(devices, &["m"]));
    world
}

#[test]
fn first_come_first_served_and_higher_priority_first() {
    let mut world = World::new();
    let first = world.submit(1, 0, Some("m"));
    let second = world.submit(2, 0, Some("m"));
    let urgent = world.submit(3, 5, None);
    let mut order = Vec::new();
    world.register("a", boot(1), registration(1, &["m"]));
    for _ in 0..3 {
        let key = world.start().key;
        order.push(key.job);
        world.report("a", boot(1), key, completed(key));
    }
    assert_eq!(order, [urgent, first, second]);
    assert!(world.starts().is_empty());
}

#[test]
fn a_start_carries_the_lease_and_the_resolved_spec() {
    let mut world = world(2);
    let job = world.submit_request(1, 0, None, r#"{"prompt":"a ball","num_inference_steps":3}"#);
    let start = world.start();
    assert_eq!((start.key.job, start.key.attempt, start.key.epoch), (job, AttemptNo(1), Epoch(1)));
    assert_eq!(start.devices, [DeviceIndex(0)]);
    assert_eq!((start.model.as_str(), start.model_hash.as_str()), ("m", "hash-of-m"));
    let spec: RenderSpec = serde_json::from_str(&start.spec_json).unwrap();
    assert_eq!((spec.prompt.as_str(), spec.num_inference_steps, spec.width, spec.seed), ("a ball", 3, 848, 1));
    assert_eq!(world.state(job), JobState::Running);
}

#[test]
fn clips_spread_over_nodes() {
    let mut world = world(2);
    world.register("b", boot(2), registration(2, &["m"]));
    let mut nodes = Vec::new();
    for n in 1..=4 {
        world.submit(n, 0, None);
        nodes.push(world.starts()[0].0.to_string());
    }
    assert_eq!(nodes, ["a", "b", "a", "b"]);
}

#[test]
fn a_job_goes_only_to_a_node_with_its_model() {
    let mut world = World::new();
    world.register("a", boot(1), registration(1, &["other"]));
    let job = world.submit(1, 0, Some("m"));
    assert!(world.starts().is_empty());
    assert_eq!(world.reason(job), "no node has registered model m (registered: other)");
    world.register("b", boot(2), registration(1, &["m"]));
    assert_eq!(world.starts()[0].0, node("b"));
}

#[test]
fn a_job_without_model_waits_for_one_to_be_registered() {
    let mut world = World::new();
    let job = world.submit(1, 0, None);
    assert_eq!(world.reason(job), "no node has registered a model yet");
    world.register("a", boot(1), registration(1, &["m"]));
    assert_eq!(world.start().key.job, job);
}

#[test]
fn a_job_without_model_does_not_guess_between_two() {
    let mut world = World::new();
    let job = world.submit(1, 0, None);
    world.register("a", boot(1), registration(1, &["m", "n"]));
    assert!(world.starts().is_empty());
    assert!(world.reason(job).starts_with("several models are registered (m, n)"), "{}", world.reason(job));
}

#[test]
fn a_job_keeps_the_model_of_its_first_attempt() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.register("b", boot(2), registration(1, &["n"]));
    world.report("a", boot(1), key, failed(FailureKind::NodeLost));
    assert_eq!(world.start().key.job, job);
    assert_eq!(world.start().model, "m");
}

#[test]
fn a_job_that_waits_for_a_device_says_so() {
    let mut world = world(1);
    world.submit(1, 0, None);
    let job = world.submit(2, 0, None);
    assert_eq!(world.reason(job), "all 1 devices with model m are busy");
}

#[test]
fn a_request_that_does_not_fit_the_model_fails_and_leaves_the_device_to_the_next() {
    let mut world = World::new();
    // 64 steps are the model's default.
    let bad = world.submit_request(1, 0, Some("m"), r#"{"prompt":"a","guidance_scale":[1.0,2.0]}"#);
    let good = world.submit(2, 0, Some("m"));
    world.register("a", boot(1), registration(1, &["m"]));
    world.event(Event::Tick);
    assert_eq!(world.state(bad), JobState::Failed);
    let reason = world.rows[&bad].reason.clone().unwrap();
    assert_eq!(reason, "does not fit model m: guidance_scale has 2 values for 64 steps");
    assert_eq!(world.start().key.job, good);
}

#[test]
fn completed_is_committed_once_and_acknowledged_always() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    for n in 0..3 {
        world.report("a", boot(1), key, completed(key));
        assert_eq!(world.changes.is_empty(), n > 0);
        assert!(matches!(world.sent[0].message, ToNode::Acknowledged { report: 7 }));
    }
    assert_eq!(world.state(job), JobState::Done);
    assert_eq!(world.farm.counters().stale_reports, 2);
}

#[test]
fn a_result_of_another_job_or_place_is_not_accepted() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    let AttemptOutcome::Completed { result_json, .. } = completed(key) else { unreachable!() };
    let elsewhere = result_json.replace("clip.mp4", "../../etc/passwd");
    let outcome = AttemptOutcome::Completed { accepted: key.attempt, result_json: elsewhere, warnings: Vec::new() };
    world.report("a", boot(1), key, outcome);
    assert_eq!(world.state(job), JobState::Queued);
    assert!(world.reason(job).contains("result is not usable"), "{}", world.reason(job));
}

#[test]
fn an_earlier_attempts_result_is_accepted_from_a_later_one() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let first = world.start().key;
    world.register("a", boot(2), registration(1, &["m"])); // refused: boot 1 is alive
    world.pass(seconds(5));
    world.register("a", boot(2), registration(1, &["m"]));
    let second = world.start().key;
    assert_eq!(second.attempt, AttemptNo(2));
    // The second attempt found the first one's result in the store.
    world.report("a", boot(2), second, completed(first));
    assert_eq!(world.state(job), JobState::Done);
}

#[test]
fn a_report_counts_only_from_the_owner_of_the_lease() {
    let mut world = world(1);
    world.register("b", boot(2), registration(1, &["m"]));
    let job = world.submit(1, 0, None);
    let (owner, start) = world.starts().remove(0);
    let other = if owner == node("a") { ("b", boot(2)) } else { ("a", boot(1)) };
    world.report(other.0, other.1, start.key, completed(start.key));
    assert_eq!(world.state(job), JobState::Running);
    let mut stale = start.key;
    stale.epoch = Epoch(9);
    world.report("a", boot(1), stale, completed(stale));
    assert!(world.changes.is_empty());
    assert_eq!(world.farm.counters().stale_reports, 2);
}

#[test]
fn bad_input_fails_the_job_at_once() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.report("a", boot(1), key, failed(FailureKind::Input));
    assert_eq!(world.state(job), JobState::Failed);
    assert_eq!(world.rows[&job].reason.as_deref(), Some("out of luck"));
}

#[test]
fn the_third_failure_of_a_device_fails_the_job_and_those_of_the_store_are_counted_apart() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let (device, store) = (FailureKind::Device, FailureKind::Store);
    for (kind, wait) in [(device, 2), (store, 5), (store, 10), (store, 20), (device, 4)] {
        let key = world.start().key;
        world.report("a", boot(1), key, failed(kind));
        assert_eq!(world.state(job), JobState::Queued);
        assert_eq!(world.reason(job), format!("tries again in {wait} s after a failure: out of luck"));
        world.pass_with(seconds(wait - 1), &[("a", boot(1), &[])]);
        assert!(world.farm.running(job).is_none());
        while world.farm.running(job).is_none() {
            world.pass(Duration::from_millis(500));
        }
    }
    let key = world.start().key;
    world.report("a", boot(1), key, failed(FailureKind::Device));
    assert_eq!(world.state(job), JobState::Failed);
    let reason = world.rows[&job].reason.clone().unwrap();
    assert_eq!(reason, "devices failed it 3 times, last: out of luck");
}

#[test]
fn a_job_that_loses_ten_nodes_fails() {
    let mut world = World::new();
    let job = world.submit(1, 0, Some("m"));
    for n in 1..=10 {
        world.register("a", boot(n), registration(1, &["m"]));
        assert_eq!(world.start().key.attempt, AttemptNo(n as u32));
        world.event(Event::SessionClosed(boot(n)));
    }
    world.register("a", boot(11), registration(1, &["m"]));
    assert_eq!(world.state(job), JobState::Failed);
    assert!(world.rows[&job].reason.clone().unwrap().starts_with("lost its node 10 times"));
}

#[test]
fn a_closed_session_is_forgiven_if_the_node_comes_back_in_time() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.event(Event::SessionClosed(boot(1)));
    world.pass(seconds(4));
    let mut again = registration(1, &["m"]);
    again.running = vec![world.listed(key)];
    world.register("a", boot(1), again);
    world.pass_with(seconds(30), &[("a", boot(1), &[key])]);
    assert_eq!(world.state(job), JobState::Running);
    assert_eq!(world.rows[&job].live.attempt, AttemptNo(1));
}

#[test]
fn a_killed_nodes_clip_goes_elsewhere_within_seconds() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    world.register("b", boot(2), registration(1, &["m"]));
    world.event(Event::SessionClosed(boot(1)));
    world.pass_with(Duration::from_millis(5500), &[("b", boot(2), &[])]);
    assert_eq!(world.farm.running(job).unwrap().0, node("b"));
    assert_eq!(world.rows[&job].outcomes, ["node_lost", "running"]);
}

#[test]
fn a_silent_node_is_lost_at_its_ttl_and_told_to_stop_when_it_comes_back() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.pass(Duration::from_millis(14_500));
    assert_eq!(world.state(job), JobState::Running);
    assert!(!world.farm.nodes()[0].alive);
    world.pass(seconds(1));
    assert_eq!(world.state(job), JobState::Queued);
    assert!(world.farm.nodes().is_empty());
    world.heartbeat("a", boot(1), &[key]);
    assert!(matches!(world.sent[0].message, ToNode::Reregister));
    let mut again = registration(1, &["m"]);
    again.running = vec![world.listed(key)];
    world.register("a", boot(1), again);
    assert_eq!(world.aborts(), [key]);
    assert!(world.starts().is_empty(), "no device is free before the node has stopped");
    world.heartbeat("a", boot(1), &[]);
    assert_eq!(world.start().key.attempt, AttemptNo(2));
}

#[test]
fn a_silent_node_gets_no_new_work() {
    let mut world = world(1);
    world.pass(seconds(5));
    let job = world.submit(1, 0, None);
    assert!(world.starts().is_empty());
    assert_eq!(world.reason(job), "no node that could take it takes new work: a is silent");
    world.heartbeat("a", boot(1), &[]);
    assert_eq!(world.start().key.job, job);
}

#[test]
fn a_pause_of_the_scheduler_is_not_the_nodes_silence() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    world.now = world.now + seconds(60);
    world.event(Event::Tick);
    assert_eq!(world.state(job), JobState::Running);
    assert!(world.farm.nodes()[0].alive);
    world.pass(seconds(16));
    assert_eq!(world.state(job), JobState::Queued);
}

#[test]
fn a_start_is_repeated_until_the_node_lists_the_attempt() {
    let mut world = world(1);
    world.submit(1, 0, None);
    let start = world.start();
    world.heartbeat("a", boot(1), &[]);
    assert_eq!(world.start(), start);
    world.heartbeat("a", boot(1), &[start.key]);
    assert!(world.starts().is_empty());
    world.heartbeat("a", boot(1), &[]);
    assert!(world.starts().is_empty(), "once confirmed, it is not started twice");
}

#[test]
fn an_attempt_that_is_never_taken_up_is_lost() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    world.pass_with(seconds(30), &[("a", boot(1), &[])]);
    assert_eq!(world.rows[&job].outcomes, ["node_lost"], "its devices are kept until the node has heard that");
    world.heartbeat("a", boot(1), &[]);
    world.event(Event::Tick);
    assert_eq!(world.rows[&job].outcomes, ["node_lost", "running"]);
}

#[test]
fn an_attempt_that_a_node_drops_without_a_report_is_lost_after_a_grace() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.heartbeat("a", boot(1), &[key]);
    world.pass_with(seconds(7), &[("a", boot(1), &[])]);
    assert_eq!(world.rows[&job].outcomes, ["running"]);
    world.pass_with(seconds(2), &[("a", boot(1), &[])]);
    assert_eq!(world.rows[&job].outcomes, ["node_lost", "running"]);
}

#[test]
fn a_heartbeat_that_comes_late_says_nothing() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.heartbeat("a", boot(1), &[key]);
    // The clock of late heartbeats: number 0 is older than any.
    let late = farm_core::wire::Envelope {
        epoch: Epoch(1),
        node: node("a"),
        boot: boot(1),
        seq: 0,
        body: farm_core::wire::to_scheduler::ToScheduler::Heartbeat {
            running: Vec::new(),
            helping: Vec::new(),
            heard: Default::default(),
        },
    };
    for _ in 0..40 {
        world.pass(Duration::from_millis(500));
        world.event(Event::FromNode(Box::new(late.clone())));
    }
    assert_eq!(world.rows[&job].outcomes, ["running"]);
}

#[test]
fn an_attempt_without_lease_is_aborted() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    let mut ghost = key;
    ghost.attempt = AttemptNo(9);
    world.heartbeat("a", boot(1), &[key, ghost]);
    assert_eq!(world.aborts(), [ghost]);
    assert_eq!(world.state(job), JobState::Running);
}

#[test]
fn every_heartbeat_of_a_known_node_is_answered() {
    let mut world = world(1);
    world.heartbeat("a", boot(1), &[]);
    assert!(matches!(world.sent[0].message, ToNode::HeartbeatSeen));
    world.heartbeat("b", boot(2), &[]);
    assert!(matches!(world.sent[0].message, ToNode::Reregister));
}

#[test]
fn a_cancelled_job_frees_its_device_once_the_node_has_stopped_it() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let next = world.submit(2, 0, None);
    world.cancel(next);
    assert_eq!(world.state(next), JobState::Cancelled);
    let waiting = world.submit(3, 0, None);
    world.heartbeat("a", boot(1), &[]);
    let key = world.start().key;
    world.cancel(job);
    assert_eq!((world.state(job), world.aborts()), (JobState::Cancelled, vec![key]));
    assert_eq!(world.rows[&job].outcomes, ["aborted"]);
    world.heartbeat("a", boot(1), &[key]);
    assert!(world.starts().is_empty(), "the device is not free yet");
    assert_eq!(world.aborts(), [key], "the command is repeated");
    world.heartbeat("a", boot(1), &[]);
    assert_eq!(world.start().key.job, waiting);
}

#[test]
fn a_cancelled_jobs_late_report_changes_nothing() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.cancel(job);
    world.report("a", boot(1), key, completed(key));
    assert_eq!(world.state(job), JobState::Cancelled);
    assert!(world.changes.is_empty());
}

#[test]
fn a_retried_job_starts_afresh_with_the_next_attempt_number() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.report("a", boot(1), key, failed(FailureKind::Input));
    world.retry(job);
    assert_eq!(world.start().key.attempt, AttemptNo(2));
    assert_eq!(world.rows[&job].live.counts.device, 0);
}

#[test]
fn a_name_is_defended_while_its_process_is_alive() {
    let mut world = world(1);
    world.register("a", boot(2), registration(1, &["m"]));
    assert!(world.refusal().contains("--name"), "{}", world.refusal());
    world.event(Event::SessionClosed(boot(1)));
    world.register("a", boot(2), registration(1, &["m"]));
    assert!(matches!(world.sent[0].message, ToNode::Welcome { heartbeat_ms: 1000 }));
}

#[test]
fn a_restarted_nodes_attempts_are_lost_at_once() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    world.event(Event::SessionClosed(boot(1)));
    world.register("a", boot(2), registration(1, &["m"]));
    assert_eq!(world.rows[&job].outcomes, ["node_lost", "running"]);
    assert_eq!(world.start().key.attempt, AttemptNo(2));
}

#[test]
fn a_node_with_another_store_is_refused_with_both() {
    let mut world = World::new();
    let mut other = registration(1, &["m"]);
    other.store = "s3://elsewhere".to_owned();
    world.register("a", boot(1), other);
    let refusal = world.refusal();
    assert!(refusal.contains("s3://elsewhere") && refusal.contains(STORE), "{refusal}");
}

#[test]
fn one_name_is_one_checkpoint() {
    let mut world = world(1);
    let mut other = registration(1, &["m"]);
    other.models[0].hash = "other".to_owned();
    world.register("b", boot(2), other.clone());
    assert!(world.refusal().contains("model m has hash other here"), "{}", world.refusal());
    // Its own earlier hash does not count: the operator changed the model and started again.
    world.event(Event::SessionClosed(boot(1)));
    world.register("a", boot(3), other);
    assert!(matches!(world.sent[0].message, ToNode::Welcome { .. }));
}

#[test]
fn a_senseless_registration_is_refused() {
    let mut world = World::new();
    let mut refused = |name: &str, change: &dyn Fn(&mut farm_core::wire::to_scheduler::Registration)| {
        let mut bad = registration(1, &["m"]);
        change(&mut bad);
        world.register(name, boot(1), bad);
        world.refusal()
    };
    assert!(refused("", &|_| {}).contains("node name"));
    assert!(refused("a\nb", &|_| {}).contains("node name"));
    assert!(refused("a", &|r| r.devices.clear()).contains("0 devices"));
    assert!(refused("a", &|r| r.roles = Roles { denoise: false, decode: false }).contains("no role"));
    assert!(refused("a", &|r| r.models[0].defaults_json = "{".to_owned()).contains("do not parse"));
    assert!(refused("a", &|r| r.models.push(model("m"))).contains("twice"));
    assert!(refused("a", &|r| r.models[0].name.clear()).contains("model name"));
}

#[test]
fn after_a_restart_running_attempts_are_adopted() {
    let mut world = world(2);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.restart();
    world.pass(seconds(5));
    let mut again = registration(2, &["m"]);
    again.running = vec![world.listed(key)];
    world.register("a", boot(1), again);
    assert!(world.aborts().is_empty());
    assert_eq!(world.farm.sizes(), (1, 2, 1));
    world.pass_with(seconds(20), &[("a", boot(1), &[key])]);
    world.report("a", boot(1), key, completed(key));
    assert_eq!((world.state(job), world.rows[&job].live.attempt), (JobState::Done, AttemptNo(1)));
}

#[test]
fn after_a_restart_a_report_from_the_outbox_counts() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.restart();
    world.report("a", boot(1), key, completed(key));
    assert!(matches!(world.sent[0].message, ToNode::Reregister), "not before the node is known");
    world.register("a", boot(1), registration(1, &["m"]));
    world.report("a", boot(1), key, completed(key));
    assert_eq!(world.state(job), JobState::Done);
}

#[test]
fn after_a_restart_nobody_is_lost_within_the_window() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    world.restart();
    world.register("b", boot(2), registration(1, &["m"]));
    let free = world.submit(2, 0, None);
    assert!(world.starts().is_empty());
    assert!(world.reason(free).contains("waits at most 8 s for its nodes"), "{}", world.reason(free));
    world.pass_with(Duration::from_millis(7_500), &[("b", boot(2), &[])]);
    assert_eq!(world.state(job), JobState::Running);
    world.pass_with(seconds(1), &[("b", boot(2), &[])]);
    assert_eq!(world.rows[&job].outcomes, ["node_lost", "running"], "what was begun first goes first");
    assert_eq!(world.state(free), JobState::Queued);
}

#[test]
fn after_a_restart_a_new_boot_of_the_node_proves_the_old_attempt_dead() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    world.restart();
    world.register("a", boot(2), registration(1, &["m"]));
    let start = world.start();
    assert_eq!((start.key.job, start.key.attempt, start.key.epoch), (job, AttemptNo(2), Epoch(2)));
}

#[test]
fn a_retry_wait_does_not_survive_a_restart_but_its_count_does() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.report("a", boot(1), key, failed(FailureKind::Device));
    world.restart();
    assert_eq!(world.rows[&job].live.counts.device, 1);
    world.register("a", boot(1), registration(1, &["m"]));
    assert_eq!(world.start().key.attempt, AttemptNo(2));
}

#[test]
fn a_node_log_line_needs_the_lease() {
    let mut world = world(1);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    let log = |line: &str| farm_core::wire::to_scheduler::ToScheduler::Log { key, line: line.to_owned() };
    world.message("a", boot(1), log(&"x".repeat(100_000)));
    match &world.changes[..] {
        [Change::Log { job: of, line, .. }] => assert!(*of == job && line.len() < 3000),
        other => panic!("{other:?}"),
    }
    world.cancel(job);
    world.message("a", boot(1), log("late"));
    assert!(world.changes.is_empty());
}
