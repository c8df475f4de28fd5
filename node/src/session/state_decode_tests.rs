//! Hands for the decode of this node's attempts, and help for others'.

use super::*;

/// The devices that help in the newest heartbeat or registration.
fn helping(sent: &[ToScheduler]) -> Option<Vec<AttemptKey>> {
    sent.iter().rev().find_map(|message| match message {
        ToScheduler::Heartbeat { helping, .. } => Some(helping.iter().map(|help| help.key).collect()),
        ToScheduler::Register(registration) => Some(registration.helping.iter().map(|help| help.key).collect()),
        _ => None,
    })
}

/// Rounds of the wishes that were sent.
fn wishes(sent: &[ToScheduler]) -> Vec<u32> {
    let round = |message: &ToScheduler| match message {
        ToScheduler::WantHands { round, .. } => Some(*round),
        _ => None,
    };
    sent.iter().filter_map(round).collect()
}

/// What the attempts were answered.
fn answers(out: &[Action]) -> Vec<(u32, u32)> {
    let answer = |action: &Action| match action {
        Action::Hands { key, round, .. } => Some((key.attempt.0, *round)),
        _ => None,
    };
    out.iter().filter_map(answer).collect()
}

fn dismissals(out: &[Action]) -> usize {
    out.iter().filter(|action| matches!(action, Action::Dismiss { .. })).count()
}

#[test]
fn a_wish_is_repeated_until_its_round_is_answered_and_answered_once() {
    let mut bench = Bench::joined();
    bench.start(1);
    bench.on(want(1, 1));
    assert_eq!(wishes(&bench.sent()), [1], "at once");
    bench.pass(RESEND_WISH);
    assert_eq!(wishes(&bench.sent()), [1]);
    bench.receive(5, hands(1, 7));
    bench.receive(5, hands(2, 1));
    assert!(answers(&bench.out).is_empty(), "of another round or attempt");
    bench.receive(5, hands(1, 1));
    bench.receive(5, hands(1, 1));
    assert_eq!(answers(&bench.out), [(1, 1)]);
    bench.pass(3 * RESEND_WISH);
    assert!(wishes(&bench.sent()).is_empty());

    bench.on(want(1, 2));
    bench.on(want(1, 3));
    bench.on(want(1, 2));
    bench.sent();
    bench.pass(RESEND_WISH);
    assert_eq!(wishes(&bench.sent()), [3], "a newer round takes the place of an older one");
    bench.receive(5, hands(1, 2));
    assert!(answers(&bench.out).is_empty());
}

#[test]
fn a_wish_waits_for_a_scheduler_and_ends_with_its_attempt() {
    let mut bench = Bench::joined();
    for n in 1..=3 {
        bench.start(n);
    }
    bench.on(Event::Closed(SCHEDULER));
    (1..=3).for_each(|n| bench.on(want(n, 1)));
    assert!(wishes(&bench.sent()).is_empty());
    bench.wait_for(|action| matches!(action, Action::Dial(_)));
    bench.on(Event::Dialed(Ok(())));
    bench.on(Event::Ready(SCHEDULER));
    assert!(wishes(&bench.sent()).is_empty(), "nobody knows this node yet");
    bench.receive(6, ToNode::Welcome { heartbeat_ms: 1000 });
    assert_eq!(wishes(&bench.sent()), [1, 1, 1]);
    bench.receive(6, ToNode::Abort { key: key(1), stop: StopNo::default(), reason: "cancelled".into() });
    bench.on(Event::Ended { key: key(2), outcome: failed() });
    bench.pass(RESEND_WISH);
    assert_eq!(wishes(&bench.sent()), [1]);
    bench.on(want(1, 2));
    assert!(wishes(&bench.sent()).is_empty(), "of an attempt that is no more");
}

#[test]
fn a_device_that_is_given_back_is_told_at_once_and_an_attempt_that_ended_has_none() {
    let mut bench = Bench::joined();
    bench.start(1);
    let devices = |sent: &[ToScheduler]| match sent.iter().rev().find(|m| matches!(m, ToScheduler::Heartbeat { .. })) {
        Some(ToScheduler::Heartbeat { running, .. }) => running.iter().map(|attempt| attempt.devices.len()).collect(),
        _ => Vec::new(),
    };
    bench.on(Event::Released { key: key(1), keep: vec![DeviceIndex(0), DeviceIndex(5)] });
    assert_eq!(devices(&bench.sent()), [1], "and none that it never had");
    bench.on(Event::Released { key: key(1), keep: vec![] });
    assert_eq!(devices(&bench.sent()), [0]);
    bench.start(2);
    bench.on(Event::Ended { key: key(2), outcome: failed() });
    bench.sent();
    bench.pass(Duration::from_secs(1));
    assert_eq!(devices(&bench.sent()), [0, 0]);
}

#[test]
fn a_help_begins_once_a_round_and_is_listed_from_its_beginning_to_its_end() {
    let mut bench = Bench::joined();
    bench.sent();
    for _ in 0..2 {
        bench.receive(5, help(1, 1));
    }
    assert_eq!(helps(&bench.out), 1);
    assert_eq!(helping(&bench.sent()), Some(vec![key(1)]), "at once");
    bench.on(help_ended(1));
    assert_eq!(helping(&bench.sent()), Some(vec![]), "at once");
    bench.receive(5, help(1, 1));
    assert_eq!(helps(&bench.out), 0, "a late repeat");
    bench.receive(5, help(1, 2));
    assert_eq!(helps(&bench.out), 1, "all hands were lost, and this one is asked again");
    bench.receive(4, dismiss(1));
    assert_eq!(dismissals(&bench.out), 0, "of an older epoch");
}

#[test]
fn a_dismissed_device_is_listed_until_it_is_idle() {
    let mut bench = Bench::joined();
    bench.receive(5, help(1, 1));
    bench.out.clear();
    for _ in 0..2 {
        bench.receive(5, dismiss(1));
        bench.receive(5, dismiss(2));
    }
    assert_eq!(dismissals(&bench.out), 1);
    bench.sent();
    bench.pass(Duration::from_secs(1));
    assert_eq!(helping(&bench.sent()), Some(vec![key(1)]));
    bench.on(help_ended(1));
    assert_eq!(helping(&bench.sent()), Some(vec![]));
}

#[test]
fn helps_survive_a_lost_session_but_neither_two_minutes_alone_nor_the_nodes_leave() {
    let mut bench = Bench::joined();
    bench.receive(5, help(1, 1));
    bench.on(Event::Closed(SCHEDULER));
    bench.receive(5, help(2, 1));
    assert_eq!(helps(&bench.out), 1, "only a scheduler that listens is obeyed");
    bench.wait_for(|action| matches!(action, Action::Dial(_)));
    bench.on(Event::Dialed(Ok(())));
    bench.on(Event::Ready(SCHEDULER));
    assert_eq!(helping(&bench.sent()), Some(vec![key(1)]));
    bench.on(Event::Closed(SCHEDULER));
    bench.pass(CUT_OFF);
    assert_eq!(dismissals(&bench.out), 1);

    let mut leaving = Bench::joined();
    leaving.receive(5, help(1, 1));
    leaving.on(Event::Leave { reason: "told to".into(), patience: Duration::from_secs(25) });
    assert_eq!(dismissals(&leaving.out), 1);
    leaving.out.clear();
    leaving.receive(5, help(2, 1));
    assert_eq!(helps(&leaving.out), 0);
}
