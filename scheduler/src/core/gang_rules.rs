//! One test for each rule about clips on several devices.

use std::time::Duration;

use farm_core::id::DeviceIndex;
use farm_core::job::state::{FailureKind, JobState};
use farm_core::parallel::topology::Topology;
use farm_core::wire::to_scheduler::Registration;

use super::events::Event;
use super::fixture::*;

/// A world with node `a`, boot 1, whose devices may work together.
fn world(devices: usize) -> World {
    let mut world = World::new();
    world.register("a", boot(1), team(devices, &["m"]));
    world
}

/// The sizes of the groups that start when these jobs are all queued at once.
fn sizes(devices: usize, jobs: u64) -> Vec<usize> {
    let mut world = World::new();
    for n in 1..=jobs {
        world.submit(n, 0, Some("m"));
    }
    world.register("a", boot(1), team(devices, &["m"]));
    world.starts().iter().map(|(_, start)| start.devices.len()).collect()
}

#[test]
fn a_lone_clip_gets_the_whole_idle_node() {
    let mut world = world(4);
    let job = world.submit(1, 0, None);
    let start = world.start();
    assert_eq!(start.devices, [0, 1, 2, 3].map(DeviceIndex));
    assert_eq!(start.topology.world(), 4);
    assert_eq!(world.farm.sizes(), (1, 4, 0));
    assert!(world.farm.nodes()[0].devices.iter().all(|device| device.job == Some(job)));
}

#[test]
fn a_queue_shares_the_node_and_a_long_queue_gets_single_devices() {
    assert_eq!(sizes(4, 2), [2, 2]);
    assert_eq!(sizes(4, 4), [1, 1, 1, 1]);
    assert_eq!(sizes(4, 12), [1, 1, 1, 1]);
}

#[test]
fn what_equal_groups_leave_over_is_used() {
    let mut five = sizes(5, 2);
    five.sort();
    assert_eq!(five, [2, 3]);
}

#[test]
fn the_log_says_which_devices_and_how() {
    let mut world = world(2);
    world.submit(1, 0, None);
    let line = format!("{:?}", world.changes);
    assert!(line.contains("started on node a, devices 0+1, cfg 2 x ring 1 x ulysses 1"), "{line}");
}

#[test]
fn a_clip_takes_the_one_free_device_rather_than_wait_for_four() {
    let mut world = world(4);
    world.submit(1, 0, None);
    world.register("b", boot(2), team(1, &["m"]));
    world.submit(2, 0, None);
    assert_eq!((world.starts()[0].0.clone(), world.start().devices.len()), (node("b"), 1));
}

#[test]
fn nodes_without_rates_render_on_single_devices() {
    let mut world = World::new();
    world.register("a", boot(1), registration(4, &["m"]));
    world.submit(1, 0, None);
    assert_eq!(world.start().devices, [DeviceIndex(0)]);
    assert_eq!(world.start().topology, Topology::SOLO);
}

#[test]
fn a_failed_gang_gives_all_its_devices_back() {
    let mut world = world(4);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    world.report("a", boot(1), key, failed(FailureKind::Device));
    assert_eq!((world.state(job), world.farm.sizes()), (JobState::Queued, (1, 4, 4)));
    world.pass_with(Duration::from_secs(3), &[("a", boot(1), &[])]);
    assert_eq!(world.farm.sizes(), (1, 4, 0), "the next attempt has them again");
}

#[test]
fn a_cancelled_gang_frees_its_devices_together() {
    let mut world = world(4);
    let job = world.submit(1, 0, None);
    let key = world.start().key;
    let next = world.submit(2, 0, None);
    world.cancel(job);
    world.heartbeat("a", boot(1), &[key]);
    assert_eq!(world.state(next), JobState::Queued, "no device is free before the node has stopped");
    world.heartbeat("a", boot(1), &[]);
    assert_eq!(world.start().devices.len(), 4);
}

#[test]
fn a_clip_goes_on_with_whatever_devices_are_left() {
    let mut world = world(4);
    let job = world.submit(1, 0, None);
    world.register("b", boot(2), team(2, &["m"]));
    world.event(Event::SessionClosed(boot(1)));
    world.pass_with(Duration::from_secs(6), &[("b", boot(2), &[])]);
    assert_eq!(world.farm.running(job).unwrap().0, node("b"));
    assert_eq!(world.rows[&job].live.running.as_ref().unwrap().devices.len(), 2);
}

#[test]
fn devices_are_kept_for_a_clip_that_needs_several() {
    // The weights of the published model, about 20 GB, fit on two of these devices and not on one.
    let small = Registration { site_json: Some(site(1.7e10)), ..registration(3, &["m", "n"]) };
    let mut world = World::new();
    world.register("a", boot(1), small);
    let first = world.submit(1, 0, Some("m"));
    let key = world.start().key;
    assert!(world.start().devices.len() >= 2);
    let second = world.submit(2, 5, Some("m"));
    let third = world.submit(3, 0, Some("n"));
    assert!(world.starts().is_empty(), "what is free is too little or kept");
    world.report("a", boot(1), key, completed(key));
    assert_eq!(world.state(first), JobState::Done);
    assert_eq!(world.state(second), JobState::Running);
    assert_eq!(world.state(third), JobState::Queued);
}

#[test]
fn rates_and_shapes_that_do_not_parse_are_refused() {
    let mut world = World::new();
    let mut bad = team(1, &["m"]);
    bad.site_json = Some("{}".to_owned());
    world.register("a", boot(1), bad);
    assert!(world.refusal().contains("rates of the devices do not parse"), "{}", world.refusal());
    let mut bad = team(1, &["m"]);
    bad.models[0].shape_json = bad.models[0].shape_json.replace("\"layers\":48", "\"layers\":18446744073709551615");
    world.register("a", boot(1), bad);
    assert!(world.refusal().contains("shape of model m"), "{}", world.refusal());
}

#[test]
fn senseless_rates_predict_nothing() {
    let mut bad = team(4, &["m"]);
    bad.site_json = bad.site_json.map(|json| json.replace("100000000000000.0", "0.0"));
    let mut world = World::new();
    world.register("a", boot(1), bad);
    world.submit(1, 0, None);
    assert_eq!(world.start().devices.len(), 1);
}
