//! One test for each rule about who decodes.

use std::time::Duration;

use farm_core::id::{AttemptKey, BootId, DeviceIndex};
use farm_core::job::spec::RenderSpec;
use farm_core::job::state::{FailureKind, JobState};
use farm_core::wire::Envelope;
use farm_core::wire::to_scheduler::{Registration, Roles, ToScheduler};

use super::events::Event;
use super::farm::Slot;
use super::fixture::*;

const A: BootId = BootId(uuid::Uuid::from_u128(1));
const B: BootId = BootId(uuid::Uuid::from_u128(2));

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A clip runs on all devices of node `a`; node `b` only decodes.
fn world(devices: usize, decoders: usize) -> (World, AttemptKey) {
    let mut world = World::new();
    world.register("a", A, team(devices, &["m"]));
    world.submit(1, 0, Some("m"));
    let key = world.start().key;
    assert_eq!(world.start().devices.len(), devices);
    world.heartbeat("a", A, &[key]);
    if decoders > 0 {
        world.register("b", B, decoder(decoders, &["m"]));
    }
    (world, key)
}

fn free(world: &World, node: &str) -> usize {
    world.farm.nodes[&super::fixture::node(node)].free_devices().count()
}

#[test]
fn a_clip_is_decoded_by_idle_devices_that_only_decode_and_its_own_are_free_for_the_next() {
    let (mut world, key) = world(2, 3);
    let next = world.submit(2, 0, None);
    assert_eq!(world.state(next), JobState::Queued, "node b starts no clips");
    world.want_hands("a", A, key, 1, 18);
    assert_eq!(world.hands(), (vec![], 3));
    assert_eq!(world.helpers(), [("b", 0), ("b", 1), ("b", 2)]);
    assert_eq!(world.state(next), JobState::Queued, "no device is free before its node says so");
    world.beat("a", A, vec![listed_on(key, &[1])], &[]);
    assert_eq!(world.start().devices, [DeviceIndex(0)]);
    assert_eq!(world.state(next), JobState::Running, "while the first is decoded");
    world.report("a", A, key, completed(key));
    assert_eq!((world.state(key.job), free(&world, "a")), (JobState::Done, 1));
}

#[test]
fn no_more_devices_decode_than_there_are_tiles() {
    let (mut world, key) = world(2, 3);
    world.want_hands("a", A, key, 1, 2);
    assert_eq!((world.hands(), world.helpers()), ((vec![], 2), vec![("b", 0), ("b", 1)]));
}

#[test]
fn ones_own_devices_decode_where_no_clip_waits_for_them_and_one_where_one_does() {
    let (mut alone, key) = world(2, 1);
    alone.want_hands("a", A, key, 1, 18);
    assert_eq!(alone.hands(), (vec![0, 1], 1));
    let (mut busy, key) = world(2, 0);
    busy.submit(2, 0, None);
    busy.want_hands("a", A, key, 1, 18);
    assert_eq!(busy.hands(), (vec![0], 0));
}

#[test]
fn idle_devices_help_of_the_own_node_before_others() {
    let mut world = World::new();
    world.register("b", B, registration(1, &["m"]));
    world.register("a", A, registration(2, &["m"]));
    world.submit(1, 0, None);
    let key = world.start().key;
    world.want_hands("a", A, key, 1, 18);
    assert_eq!((world.hands(), world.helpers()), ((vec![0], 2), vec![("a", 1), ("b", 0)]));
    world.submit(2, 0, None);
    assert!(world.starts().is_empty(), "they are busy");
}

#[test]
fn who_helps_has_the_checkpoint_a_session_and_the_role() {
    let (mut world, key) = world(1, 1);
    world.register("c", boot(3), decoder(1, &["n"]));
    let roles = Roles { denoise: true, decode: false };
    world.register("d", boot(4), Registration { roles, ..registration(1, &["m"]) });
    world.event(Event::SessionClosed(B));
    world.want_hands("a", A, key, 1, 18);
    assert_eq!((world.hands(), world.helpers()), ((vec![0], 0), vec![]));
}

#[test]
fn a_node_that_only_denoises_decodes_what_nobody_else_can() {
    let mut world = World::new();
    let roles = Roles { denoise: true, decode: false };
    world.register("a", A, Registration { roles, ..registration(2, &["m"]) });
    world.submit(1, 0, None);
    let key = world.start().key;
    world.want_hands("a", A, key, 1, 18);
    assert_eq!(world.hands(), (vec![0], 0));
}

#[test]
fn devices_that_are_kept_for_a_clip_are_lent_only_where_there_is_no_other() {
    let (mut world, key) = world(1, 0);
    // The published model's weights fit on two of these devices and not on one.
    world.register("c", boot(3), Registration { site_json: Some(site(1.7e10)), ..registration(2, &["m", "n"]) });
    world.want_hands("a", A, key, 1, 2);
    assert_eq!((world.hands(), world.helpers()), ((vec![0], 1), vec![("c", 0)]));
    let short = world.submit(2, 0, Some("n"));
    assert_eq!(world.reason(short), "needs 2 devices of one node at once; those of node c are kept for it");
    world.want_hands("a", A, key, 2, 18);
    assert_eq!((world.hands(), world.helpers()), ((vec![0], 0), vec![]));
    world.beat("a", A, vec![listed_on(key, &[])], &[]);
    world.want_hands("a", A, key, 3, 18);
    assert_eq!((world.hands(), world.helpers()), ((vec![], 1), vec![("a", 0)]), "nobody waits for what it gave back");
    world.want_hands("a", A, key, 4, 18);
    assert_eq!((world.hands(), world.helpers()), ((vec![], 1), vec![("c", 1)]));
}

#[test]
fn a_command_to_help_carries_what_the_tiles_are_of() {
    let (mut world, key) = world(1, 1);
    world.want_hands("a", A, key, 1, 18);
    let (_, help) = world.helps().remove(0);
    assert_eq!((help.key, help.round, help.device), (key, 1, DeviceIndex(0)));
    assert_eq!((help.model.as_str(), help.model_hash.as_str()), ("m", "hash-of-m"));
    assert_eq!((help.url.as_str(), help.token.as_str()), ("http://there:1", "secret"));
    assert_eq!(serde_json::from_str::<RenderSpec>(&help.spec_json).unwrap().prompt, "a");
}

#[test]
fn a_repeated_wish_gets_the_same_answer_and_a_further_round_a_new_one() {
    let (mut world, key) = world(1, 1);
    world.want_hands("a", A, key, 1, 18);
    assert_eq!((world.hands(), world.changes.len()), ((vec![0], 1), 1));
    world.register("c", boot(3), decoder(1, &["m"]));
    world.want_hands("a", A, key, 1, 18);
    assert_eq!((world.hands(), world.helpers(), world.changes.len()), ((vec![0], 1), vec![], 0));
    world.want_hands("a", A, key, 2, 18);
    assert_eq!((world.hands(), world.helpers()), ((vec![0], 1), vec![("c", 0)]));
    world.want_hands("a", A, key, 1, 18);
    assert!(world.sent.is_empty(), "the answer to it is out of date");
}

#[test]
fn where_there_is_no_device_at_all_the_answer_says_so() {
    let (mut world, key) = world(1, 0);
    world.submit(2, 0, None);
    world.beat("a", A, vec![listed_on(key, &[])], &[]);
    assert_eq!(world.starts().len(), 1);
    world.want_hands("a", A, key, 1, 18);
    assert_eq!((world.hands(), world.changes.len()), ((vec![], 0), 0));
    world.register("b", B, decoder(1, &["m"]));
    world.want_hands("a", A, key, 2, 18);
    assert_eq!(world.hands(), (vec![], 1));
}

#[test]
fn only_the_owner_of_the_lease_is_answered() {
    let (mut world, key) = world(1, 1);
    world.want_hands("b", B, key, 1, 18);
    assert!(world.sent.is_empty());
    world.cancel(key.job);
    world.want_hands("a", A, key, 1, 18);
    assert!(world.sent.is_empty());
}

#[test]
fn nobody_is_sent_to_an_attempt_that_cannot_be_reached() {
    let (mut world, key) = world(1, 1);
    for (round, url) in [(1, String::new()), (2, "x".repeat(100_000))] {
        world.message("a", A, ToScheduler::WantHands { key, round, tiles: 9, url, token: String::new() });
        assert_eq!(world.hands(), (vec![0], 0));
    }
}

#[test]
fn the_log_says_who_decodes() {
    let (mut world, key) = world(2, 0);
    world.register("b", B, decoder(5, &["m"]));
    world.want_hands("a", A, key, 1, 18);
    let lines = format!("{:?}", world.changes);
    assert!(lines.contains("decode of 18 tiles on devices 0+1 here and 5 helpers: b 0, b 1, b 2, b 3, …"), "{lines}");
    let (mut alone, key) = self::world(1, 0);
    alone.want_hands("a", A, key, 1, 1);
    assert!(format!("{:?}", alone.changes).contains("decode of 1 tile on device 0 here\""), "{:?}", alone.changes);
}

#[test]
fn a_command_to_help_is_repeated_until_it_is_listed_and_the_device_is_free_when_it_is_not_any_more() {
    let (mut world, key) = world(1, 1);
    world.want_hands("a", A, key, 1, 18);
    let help = world.helps().remove(0).1;
    world.heartbeat("b", B, &[]);
    assert_eq!(world.helps(), [("b", help)]);
    world.beat("b", B, vec![], &[(key, 0)]);
    assert!(world.helps().is_empty() && world.dismissed().is_empty());
    assert_eq!(free(&world, "b"), 0);
    let view = &world.farm.nodes()[1];
    assert_eq!(
        (view.roles.join(" "), view.devices[0].job, view.devices[0].helps),
        ("decode".into(), Some(key.job), true)
    );
    world.heartbeat("b", B, &[]);
    assert!(world.sent.len() == 1 && free(&world, "b") == 1, "{:?}", world.sent);
}

#[test]
fn help_that_is_never_taken_up_is_given_up() {
    let (mut world, key) = world(1, 1);
    world.want_hands("a", A, key, 1, 18);
    world.pass_with(seconds(29), &[("a", A, &[key]), ("b", B, &[])]);
    assert_eq!(free(&world, "b"), 0);
    while world.dismissed().is_empty() {
        world.pass(Duration::from_millis(500));
        world.heartbeat("b", B, &[]);
    }
    assert_eq!((world.dismissed(), free(&world, "b")), (vec![("b", key, 0)], 0), "the command may be on the way yet");
    world.heartbeat("b", B, &[]);
    assert_eq!(free(&world, "b"), 1);
    // It was on the way all the time.
    world.beat("b", B, vec![], &[(key, 0)]);
    assert_eq!(free(&world, "b"), 0);
}

#[test]
fn helpers_of_an_attempt_that_ended_are_dismissed_and_busy_until_they_have_stopped() {
    for end in 0..4 {
        let (mut world, key) = world(1, 2);
        world.want_hands("a", A, key, 1, 18);
        world.beat("b", B, vec![], &[(key, 0)]);
        match end {
            0 => world.report("a", A, key, completed(key)),
            1 => world.report("a", A, key, failed(FailureKind::Device)),
            2 => world.cancel(key.job),
            _ => {
                world.event(Event::SessionClosed(A));
                for _ in 0..10 {
                    world.pass(Duration::from_millis(500));
                    if world.dismissed().is_empty() {
                        world.beat("b", B, vec![], &[(key, 0)]);
                    }
                }
            }
        }
        let commands = world.dismissed();
        assert!(commands.contains(&("b", key, 0)), "end {end}: {commands:?}");
        assert!(end == 3 || commands.contains(&("b", key, 1)), "the one that is not listed yet, too");
        world.beat("b", B, vec![], &[(key, 0)]);
        assert!(world.dismissed().contains(&("b", key, 0)), "repeated");
        world.beat("b", B, vec![], &[(key, 0)]);
        assert_eq!(free(&world, "b"), 1, "the one that never began");
        world.heartbeat("b", B, &[]);
        assert_eq!(free(&world, "b"), 2);
    }
}

#[test]
fn the_end_of_a_helper_is_not_the_end_of_the_attempt() {
    let (mut world, key) = world(1, 1);
    world.want_hands("a", A, key, 1, 18);
    world.event(Event::SessionClosed(B));
    world.pass_with(seconds(20), &[("a", A, &[key])]);
    assert_eq!((world.state(key.job), world.farm.nodes.len()), (JobState::Running, 1));
    // It comes back, with what it did not finish.
    let helping = vec![farm_core::wire::to_scheduler::Helping { key, device: DeviceIndex(0) }];
    world.register("b", B, Registration { helping, ..decoder(1, &["m"]) });
    assert_eq!((free(&world, "b"), world.dismissed().len()), (0, 0));
}

#[test]
fn help_that_nobody_asked_for_is_dismissed() {
    let (mut world, key) = world(1, 1);
    let ghost = AttemptKey { attempt: farm_core::id::AttemptNo(9), ..key };
    world.beat("b", B, vec![], &[(ghost, 0), (key, 7)]);
    assert_eq!(world.dismissed(), [("b", ghost, 0), ("b", key, 7)]);
    assert_eq!((free(&world, "b"), world.farm.counters().strays_dismissed), (0, 2));
    world.beat("a", A, vec![world.listed(key)], &[(key, 0)]);
    assert_eq!(world.dismissed(), [("a", key, 0)], "the device has a lease");
    world.heartbeat("b", B, &[]);
    assert_eq!(free(&world, "b"), 1);
}

#[test]
fn a_lease_only_shrinks_and_only_by_what_a_heartbeat_with_the_attempt_leaves_out() {
    let (mut world, key) = world(3, 0);
    world.heartbeat("a", A, &[]);
    assert_eq!(free(&world, "a"), 0, "the attempt is not listed: its report may be on the way");
    world.beat("a", A, vec![listed_on(key, &[0, 2])], &[]);
    assert_eq!(free(&world, "a"), 1);
    world.beat("a", A, vec![listed_on(key, &[0, 1, 9])], &[]);
    assert_eq!(free(&world, "a"), 2, "device 1 is not the attempt's any more");
    // Number 0 is older than any.
    let running = vec![listed_on(key, &[])];
    let body = ToScheduler::Register(Registration { running, ..team(3, &["m"]) });
    let late = Envelope { epoch: world.farm.epoch(), node: node("a"), boot: A, seq: 0, body };
    world.event(Event::FromNode(Box::new(late)));
    assert_eq!(free(&world, "a"), 2);
}

#[test]
fn an_attempt_that_only_uploads_is_lost_with_its_node() {
    let (mut world, key) = world(1, 0);
    world.beat("a", A, vec![listed_on(key, &[])], &[]);
    world.event(Event::SessionClosed(A));
    world.pass(seconds(6));
    assert_eq!(
        (world.state(key.job), world.rows[&key.job].outcomes.as_slice()),
        (JobState::Queued, &["node_lost"][..])
    );
}

#[test]
fn a_node_does_not_take_on_any_number_of_clips_while_its_uploads_stand_still() {
    let mut world = World::new();
    world.register("a", A, registration(1, &["m"]));
    for n in 1..=9 {
        world.submit(n, 0, None);
    }
    let mut keys = vec![world.started[0].0];
    for _ in 0..9 {
        world.beat("a", A, keys.iter().map(|key| listed_on(*key, &[])).collect(), &[]);
        keys = world.started.iter().map(|(key, ..)| *key).collect();
    }
    assert_eq!(keys.len(), 4);
    world.report("a", A, keys[0], completed(keys[0]));
    assert_eq!(world.starts().len(), 1);
}

#[test]
fn after_a_restart_attempts_keep_what_they_have_not_given_back() {
    let (mut world, first) = world(2, 0);
    world.beat("a", A, vec![listed_on(first, &[1])], &[]);
    world.submit(2, 0, None);
    let second = world.start().key;
    assert_eq!(world.start().devices, [DeviceIndex(0)]);
    // Both rows name device 0.
    world.restart();
    let running = vec![listed_on(second, &[0]), listed_on(first, &[1])];
    world.register("a", A, Registration { running, ..team(2, &["m"]) });
    let slots: Vec<_> = world.farm.nodes[&node("a")].devices.iter().map(|device| device.slot.clone()).collect();
    assert_eq!(slots, [Slot::Leased(second.job), Slot::Leased(first.job)]);
    assert!(world.aborts().is_empty() && world.changes.is_empty());
    // The first may have ended without anybody hearing of it: what it had is left over to it, if anything.
    world.restart();
    world.register("a", A, Registration { running: vec![listed_on(second, &[0])], ..team(2, &["m"]) });
    assert_eq!(world.farm.nodes[&node("a")].devices[0].slot, Slot::Leased(second.job));
    assert_eq!(world.farm.nodes[&node("a")].devices[1].slot, Slot::Leased(first.job));
}

#[test]
fn after_a_restart_helpers_go_on_and_more_can_be_asked() {
    let (mut world, key) = world(1, 3);
    world.want_hands("a", A, key, 1, 2);
    world.beat("b", B, vec![], &[(key, 0), (key, 1)]);
    world.restart();
    let helping = |device| farm_core::wire::to_scheduler::Helping { key, device: DeviceIndex(device) };
    let helping = vec![helping(0), helping(1)];
    world.register("b", B, Registration { helping, ..decoder(3, &["m"]) });
    assert_eq!((free(&world, "b"), world.dismissed().len()), (1, 0), "its attempt may come back");
    world.register("a", A, Registration { running: vec![world.listed(key)], ..team(1, &["m"]) });
    world.want_hands("a", A, key, 2, 18);
    assert_eq!(world.hands(), (vec![0], 1));
    assert_eq!(world.helps()[0].1.model_hash, "hash-of-m");
    world.cancel(key.job);
    assert_eq!(world.dismissed().len(), 3);
}

#[test]
fn after_a_restart_help_for_an_attempt_that_is_over_is_dismissed() {
    let (mut world, key) = world(1, 1);
    world.want_hands("a", A, key, 1, 2);
    world.beat("b", B, vec![], &[(key, 0)]);
    world.report("a", A, key, completed(key));
    world.restart();
    let helping = vec![farm_core::wire::to_scheduler::Helping { key, device: DeviceIndex(0) }];
    world.register("b", B, Registration { helping, ..decoder(1, &["m"]) });
    assert_eq!((world.dismissed(), free(&world, "b")), (vec![("b", key, 0)], 0));
}

#[test]
fn a_node_that_only_decodes_makes_no_model_one_that_clips_can_have() {
    let mut world = World::new();
    world.register("b", B, decoder(1, &["n"]));
    let job = world.submit(1, 0, Some("n"));
    assert_eq!(world.reason(job), "no node has registered model n (registered: none)");
    let nameless = world.submit(2, 0, None);
    assert_eq!(world.reason(nameless), "no node has registered a model yet");
    world.register("a", A, registration(1, &["m"]));
    assert_eq!(world.start().key.job, nameless, "there is one model to choose from");
    assert_eq!(world.farm.models().names(), ["m"]);
}
