//! One test for each rule about whose jobs go first: tenants, priorities, quotas, gangs, who gives way.

use std::time::Duration;

use farm_core::api::{Quota, TenantSpec, WaitCode};
use farm_core::id::{DeviceIndex, JobId};
use farm_core::job::state::{FailureKind, JobState, Progress, Stage};
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{AttemptOutcome, Registration, RunningAttempt};

use super::events::LiveJob;
use super::fixture::*;

const SHORT: &str = r#"{"prompt":"a","num_inference_steps":4}"#;
const LONG: &str = r#"{"prompt":"a","num_inference_steps":64}"#;

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn world(devices: usize) -> World {
    let mut world = World::new();
    for name in ["red", "blue"] {
        world.set_tenant(name, TenantSpec::default());
    }
    world.register("a", boot(1), team(devices, &["m"]));
    world
}

fn submit(world: &mut World, n: u64, owner: &str, priority: i32, request: &str) -> JobId {
    let line = LiveJob { tenant: tenant(owner), priority, ..world.line(n) };
    world.submit_line(line, request)
}

fn quota(devices: Option<u32>, device_seconds: Option<u64>) -> TenantSpec {
    TenantSpec { share: 1.0, quota: Quota { devices, queued: None, device_seconds } }
}

fn code(world: &World, job: JobId) -> WaitCode {
    world.farm.reason(job).unwrap().code
}

/// Ends what runs, `after` a while, and says whose job starts next.
fn next(world: &mut World, running: JobId, after: u64) -> JobId {
    let key = world.rows[&running].live.running.as_ref().unwrap().key;
    world.pass_with(seconds(after), &[("a", boot(1), &[key])]);
    world.report("a", boot(1), key, completed(key));
    world.start().key.job
}

#[test]
fn the_tenant_that_has_used_least_goes_first_whatever_the_priorities_of_others() {
    let mut world = world(1);
    // Too short to be worth handing back.
    let first = submit(&mut world, 1, "red", 0, r#"{"prompt":"a","num_inference_steps":1,"num_frames":61}"#);
    let red = submit(&mut world, 2, "red", 9, LONG);
    let blue = submit(&mut world, 3, "blue", 0, LONG);
    assert_eq!((code(&world, red), code(&world, blue)), (WaitCode::Share, WaitCode::Busy));
    assert_eq!(next(&mut world, first, 50), blue);
    world.cancel(blue);
    world.heartbeat("a", boot(1), &[]);
    assert_eq!(world.state(red), JobState::Running);
}

#[test]
fn a_share_twice_as_large_may_use_twice_as_much() {
    let mut world = world(1);
    world.set_tenant("red", TenantSpec { share: 2.0, ..TenantSpec::default() });
    let mut running = submit(&mut world, 1, "red", 0, LONG);
    for n in 2..20 {
        submit(&mut world, n, if n % 2 == 0 { "red" } else { "blue" }, 0, LONG);
    }
    let mut of_red = 0;
    for _ in 0..9 {
        running = next(&mut world, running, 20);
        of_red += u32::from(world.rows[&running].live.tenant == tenant("red"));
    }
    assert!((5..=7).contains(&of_red), "{of_red} of 9");
}

#[test]
fn within_a_tenant_priority_comes_first_and_then_what_is_shorter() {
    let mut world = world(1);
    let first = submit(&mut world, 1, "red", 0, LONG);
    let long = submit(&mut world, 2, "red", 0, LONG);
    let short = submit(&mut world, 3, "red", 0, SHORT);
    let urgent = submit(&mut world, 4, "red", 5, LONG);
    assert_eq!((code(&world, long), code(&world, urgent)), (WaitCode::Turn, WaitCode::Busy));
    assert_eq!(next(&mut world, first, 1), urgent);
    assert_eq!(next(&mut world, urgent, 1), short);
    assert_eq!(next(&mut world, short, 1), long);
}

#[test]
fn what_was_begun_goes_on_before_what_is_shorter() {
    let mut world = world(1);
    let long = submit(&mut world, 1, "red", 0, LONG);
    let key = world.start().key;
    submit(&mut world, 2, "red", 0, SHORT);
    world.report("a", boot(1), key, AttemptOutcome::Interrupted { step: 7 });
    assert_eq!(world.start().key.job, long);
    let key = world.start().key;
    world.report("a", boot(1), key, failed(FailureKind::Store));
    assert_eq!(world.start().key.job, job_id(2), "but not what fails");
}

#[test]
fn a_long_job_is_not_overtaken_for_ever() {
    let mut world = world(1);
    let mut running = submit(&mut world, 1, "red", 0, SHORT);
    let long = submit(&mut world, 2, "red", 0, LONG);
    for n in 3..2000 {
        submit(&mut world, n, "red", 0, SHORT);
        world.now = world.now + seconds(3000);
        world.event(super::events::Event::Tick);
        running = next(&mut world, running, 0);
        if running == long {
            return;
        }
    }
    panic!("shorter jobs that came later went first two thousand times");
}

#[test]
fn a_quota_of_devices_is_never_exceeded() {
    let mut world = world(4);
    world.set_tenant("red", quota(Some(3), None));
    let gang = submit(&mut world, 1, "red", 0, LONG);
    assert_eq!(world.rows[&gang].live.running.as_ref().unwrap().devices.len(), 3);
    let more = submit(&mut world, 2, "red", 0, LONG);
    assert_eq!(code(&world, more), WaitCode::QuotaDevices);
    assert!(world.reason(more).contains("3 of the 3 devices"), "{}", world.reason(more));
    let other = submit(&mut world, 3, "blue", 0, LONG);
    assert_eq!(world.state(other), JobState::Running, "what is left is for others");
    world.set_tenant("red", quota(None, None));
    assert_eq!(code(&world, more), WaitCode::Busy);
}

#[test]
fn a_quota_of_device_seconds_counts_what_runs_as_it_is_predicted() {
    let mut world = world(1);
    let first = submit(&mut world, 1, "blue", 0, LONG);
    let work = world.farm.why(first).unwrap().eta_seconds.unwrap();
    world.set_tenant("red", quota(None, Some((1.5 * work) as u64)));
    let red = submit(&mut world, 2, "red", 0, LONG);
    let second = submit(&mut world, 3, "red", 0, LONG);
    world.cancel(first);
    world.heartbeat("a", boot(1), &[]);
    assert_eq!(world.state(red), JobState::Running);
    assert_eq!(code(&world, second), WaitCode::QuotaSeconds);
    assert!(world.farm.why(second).unwrap().change.unwrap().contains("farmctl quota red"));
}

#[test]
fn what_no_quota_could_meet_is_known_before() {
    let mut world = world(1);
    let never = |world: &World, memory: &str| {
        let ask = super::events::Ask { num_inference_steps: Some(64), ..Default::default() };
        world.farm.never(&tenant("red"), ask, Some(memory), &Default::default())
    };
    assert_eq!(never(&world, "m"), None);
    world.set_tenant("red", quota(Some(0), None));
    assert!(never(&world, "m").unwrap().contains("allows no device"));
    world.set_tenant("red", quota(None, Some(1)));
    assert!(never(&world, "m").unwrap().contains("device-seconds"));
    world.set_tenant("red", quota(Some(1), None));
    world.register("b", boot(2), Registration { site_json: Some(site(1.7e10)), ..registration(2, &["n"]) });
    assert!(never(&world, "n").unwrap().contains("needs 2 devices at once"));
    assert_eq!(never(&world, "m"), None);
}

/// Node `a` of two devices, on which clips of the model `m` fit only together; `n` is a model for one device.
fn tight() -> World {
    let small = Registration { site_json: Some(site(1.7e10)), ..registration(2, &[]) };
    let small = Registration { models: vec![model("m"), small_model("n")], ..small };
    let mut world = World::new();
    world.register("a", boot(1), small);
    world
}

#[test]
fn a_free_device_of_a_node_that_is_kept_goes_to_a_clip_that_ends_in_time() {
    let mut world = tight();
    let steps = |n: u32| format!(r#"{{"prompt":"a","num_inference_steps":{n}}}"#);
    let line = |world: &World, n: u64, model: &str| LiveJob { model: Some(model.to_owned()), ..world.line(n) };
    world.submit_all(vec![line(&world, 1, "n"), line(&world, 2, "n")], None, &steps(1000));
    let [one, two] = [1, 2].map(job_id);
    assert_eq!((world.state(one), world.state(two)), (JobState::Running, JobState::Running));
    let key = world.rows[&two].live.running.as_ref().unwrap().key;
    world.cancel(one);
    world.heartbeat("a", boot(1), &[key]);
    // One device is free, the other busy for long.
    let gang = world.submit_line(line(&world, 3, "m"), LONG);
    assert_eq!(code(&world, gang), WaitCode::Gang);
    let long = world.submit_line(line(&world, 4, "n"), &steps(1000));
    assert_eq!(code(&world, long), WaitCode::Reserved);
    let short = world.submit_line(line(&world, 5, "n"), &steps(1));
    assert_eq!(world.state(short), JobState::Running, "it is over before the gang can start");
    assert_eq!((world.state(gang), world.state(long)), (JobState::Queued, JobState::Queued));
}

fn yields(world: &World) -> Vec<JobId> {
    let job = |send: &super::effects::Send| match &send.message {
        ToNode::Yield { key, .. } => Some(key.job),
        _ => None,
    };
    world.sent.iter().filter_map(job).collect()
}

#[test]
fn a_higher_priority_of_the_same_tenant_takes_the_devices_and_the_latent_is_kept() {
    let mut world = world(1);
    let low = submit(&mut world, 1, "red", 0, LONG);
    let key = world.start().key;
    let high = submit(&mut world, 2, "red", 5, LONG);
    world.pass_with(seconds(2), &[("a", boot(1), &[key])]);
    world.heartbeat("a", boot(1), &[key]);
    assert_eq!(yields(&world), [low], "said again until the node does it");
    assert_eq!(world.farm.running(low).unwrap().0, node("a"));
    world.report("a", boot(1), key, AttemptOutcome::Interrupted { step: 7 });
    assert_eq!(world.start().key.job, high);
    let row = &world.rows[&low];
    assert_eq!((row.state, &row.outcomes[..]), (JobState::Queued, &["interrupted"][..]));
    assert_eq!((row.live.counts.preemptions, row.live.counts.device, row.live.counts.losses), (1, 0, 0));
}

#[test]
fn a_clip_that_is_decoded_or_nearly_done_is_left_alone() {
    for (stage, eta) in [(Stage::Decode, 500.0), (Stage::Denoise, 10.0)] {
        let mut world = world(1);
        submit(&mut world, 1, "red", 0, LONG);
        let key = world.start().key;
        submit(&mut world, 2, "red", 5, LONG);
        let progress = Progress { stage, done: 1, total: 2, eta_seconds: Some(eta) };
        for _ in 0..10 {
            let running = RunningAttempt { key, progress, devices: vec![DeviceIndex(0)] };
            world.beat("a", boot(1), vec![running], &[]);
            assert!(yields(&world).is_empty(), "{stage:?}");
            world.pass(Duration::from_millis(500));
        }
    }
}

#[test]
fn a_tenant_without_any_device_takes_one_of_a_tenant_that_has_all_after_a_minute() {
    let mut world = world(2);
    let red = submit(&mut world, 1, "red", 0, r#"{"prompt":"a","num_inference_steps":1000}"#);
    let key = world.start().key;
    assert_eq!(world.start().devices.len(), 2);
    let blue = submit(&mut world, 3, "blue", 0, LONG);
    let mut told = Vec::new();
    for second in 0..70 {
        world.pass_with(seconds(1), &[("a", boot(1), &[key])]);
        told.extend(yields(&world).into_iter().map(|job| (second, job)));
    }
    assert!(told.iter().all(|told| told.0 >= 55 && told.1 == red) && !told.is_empty(), "{told:?}");
    world.report("a", boot(1), key, AttemptOutcome::Interrupted { step: 9 });
    let devices = |job: JobId| world.rows[&job].live.running.as_ref().map_or(0, |running| running.devices.len());
    assert_eq!((devices(blue), devices(red)), (1, 1), "it goes on with what is left");
}

#[test]
fn a_node_that_has_run_the_model_is_taken_before_others() {
    let mut world = World::new();
    for (name, n) in [("a", 1), ("b", 2)] {
        world.register(name, boot(n), team(1, &["m", "n"]));
    }
    let of = |world: &World, n: u64, model: &str| LiveJob { model: Some(model.to_owned()), ..world.line(n) };
    world.submit_line(of(&world, 1, "n"), LONG);
    let (first, key) = (world.starts()[0].0.clone(), world.start().key);
    world.report(&first.0, if first == node("a") { boot(1) } else { boot(2) }, key, completed(key));
    world.submit_line(of(&world, 2, "m"), LONG);
    let second = world.starts()[0].0.clone();
    assert_ne!(first, second, "the one that has run nothing");
    world.submit_line(of(&world, 3, "n"), LONG);
    assert_eq!(world.starts()[0].0, first);
}
