//! Handing attempts back, leaving, reports on disk, several schedulers.

use super::*;

const PATIENCE: Duration = Duration::from_secs(25);

fn leave(bench: &mut Bench) {
    bench.on(Event::Leave { reason: "told to".into(), patience: PATIENCE });
}

fn interrupted(step: u32) -> AttemptOutcome {
    AttemptOutcome::Interrupted { step }
}

fn yields(bench: &mut Bench) -> Vec<AttemptKey> {
    let yielded = |action| match action {
        Action::Yield(key) => Some(key),
        _ => None,
    };
    std::mem::take(&mut bench.out).into_iter().filter_map(yielded).collect()
}

fn exits(bench: &Bench) -> bool {
    bench.out.iter().any(|action| matches!(action, Action::Exit))
}

/// Outcomes of the reports that were sent.
fn outcomes(sent: &[ToScheduler]) -> Vec<AttemptOutcome> {
    let outcome = |message: &ToScheduler| match message {
        ToScheduler::Report { report, .. } => Some(report.outcome.clone()),
        _ => None,
    };
    sent.iter().filter_map(outcome).collect()
}

#[test]
fn an_attempt_is_told_to_yield_once_and_goes_on_until_it_has() {
    let mut bench = Bench::joined();
    bench.start(1);
    let yield_it = || ToNode::Yield { key: key(1), reason: "preempted".into() };
    bench.receive(4, yield_it());
    assert!(yields(&mut bench).is_empty(), "an older epoch has no say");
    (0..3).for_each(|_| bench.receive(5, yield_it()));
    assert_eq!(yields(&mut bench), [key(1)]);
    bench.pass(Duration::from_secs(1));
    assert_eq!(listed(&bench.sent()), Some(vec![key(1)]));
    bench.on(Event::Ended { key: key(1), outcome: interrupted(8) });
    assert_eq!(outcomes(&bench.sent()), [interrupted(8)]);
    // The report is on its way, or lost.
    bench.receive(5, yield_it());
    let sent = bench.sent();
    assert_eq!(outcomes(&sent), [interrupted(8)]);
    // Of an attempt that nobody knows, nothing is said.
    bench.receive(5, ToNode::Yield { key: key(2), reason: "preempted".into() });
    assert!(yields(&mut bench).is_empty());
}

#[test]
fn an_aborted_attempt_reports_nothing_though_it_was_to_yield() {
    let mut bench = Bench::joined();
    bench.start(1);
    bench.receive(5, ToNode::Yield { key: key(1), reason: "preempted".into() });
    bench.receive(5, ToNode::Abort { key: key(1), stop: StopNo::default(), reason: "superseded".into() });
    bench.on(Event::Ended { key: key(1), outcome: interrupted(8) });
    assert!(outcomes(&bench.sent()).is_empty());
}

#[test]
fn a_leaving_node_hands_back_everything_and_then_exits() {
    let mut bench = Bench::joined();
    bench.start(1);
    bench.receive(5, help(7, 1));
    bench.out.clear();
    leave(&mut bench);
    assert!(bench.out.iter().any(|action| matches!(action, Action::Dismiss { .. })));
    assert!(bench.out.iter().any(|action| matches!(action, Action::Send(ToScheduler::Leaving { .. }))));
    assert_eq!(yields(&mut bench), [key(1)]);
    // It says so again and again, and takes nothing on: what comes is handed back untouched.
    bench.wait_for(|action| matches!(action, Action::Send(ToScheduler::Leaving { .. })));
    assert_eq!(bench.start(2), 0);
    bench.receive(5, help(8, 1));
    assert_eq!(helps(&bench.out), 0);
    bench.on(Event::Ended { key: key(1), outcome: interrupted(16) });
    bench.receive(5, ToNode::Acknowledged { report: 1 });
    assert!(!exits(&bench));
    bench.pass(Duration::from_secs(3));
    let sent = outcomes(&bench.sent());
    assert!(sent.contains(&interrupted(16)) && !sent.contains(&failed()), "{sent:?}");
    bench.receive(5, ToNode::Acknowledged { report: 2 });
    assert!(exits(&bench));
}

#[test]
fn a_leaving_node_with_nothing_to_say_exits_at_once() {
    let mut alone = Bench::new();
    leave(&mut alone);
    assert!(exits(&alone));
    let mut idle = Bench::joined();
    leave(&mut idle);
    assert!(exits(&idle));
}

#[test]
fn what_has_not_yielded_when_time_is_up_is_handed_back_as_it_is() {
    let mut bench = Bench::joined();
    bench.receive(5, start(1));
    for action in std::mem::take(&mut bench.out) {
        if let Action::Start { progress, .. } = action {
            progress.save(24);
        }
    }
    leave(&mut bench);
    let since = bench.now;
    let stay = |bench: &mut Bench, wanted: fn(&Action) -> bool| {
        while !bench.out.iter().any(wanted) {
            assert!(bench.now < since + 2 * PATIENCE);
            bench.receive(5, ToNode::HeartbeatSeen);
            bench.pass(Duration::from_millis(50));
        }
        bench.now - since
    };
    let aborted = stay(&mut bench, |action| matches!(action, Action::Abort(_)));
    assert!(aborted < PATIENCE && aborted + Duration::from_secs(2) > PATIENCE, "{aborted:?}");
    assert_eq!(outcomes(&bench.sent()), [interrupted(24)]);
    assert!(stay(&mut bench, |action| matches!(action, Action::Exit)) <= PATIENCE + Duration::from_millis(50));
}

#[test]
fn who_is_told_to_leave_again_has_the_shorter_time() {
    let mut bench = Bench::joined();
    bench.start(1);
    leave(&mut bench);
    bench.on(Event::Leave { reason: "told again".into(), patience: Duration::from_secs(2) });
    assert!(bench.wait_for(|action| matches!(action, Action::Exit)) <= Duration::from_secs(2));
}

#[test]
fn a_leaving_node_waits_for_a_scheduler_that_changes_but_not_for_one_that_is_gone() {
    let mut bench = Bench::joined();
    bench.start(1);
    bench.on(Event::Closed(SCHEDULER));
    leave(&mut bench);
    bench.on(Event::Ended { key: key(1), outcome: interrupted(8) });
    assert!(!exits(&bench));
    bench.join(6);
    let sent = bench.sent();
    assert_eq!(outcomes(&sent), [interrupted(8)]);
    assert!(sent.iter().any(|message| matches!(message, ToScheduler::Leaving { .. })), "{sent:?}");
    bench.receive(6, ToNode::Acknowledged { report: 1 });
    assert!(exits(&bench));

    let mut bench = Bench::joined();
    bench.start(1);
    bench.on(Event::Closed(SCHEDULER));
    leave(&mut bench);
    assert_eq!(yields(&mut bench), [key(1)], "its latent is stored all the same");
    bench.on(Event::Ended { key: key(1), outcome: interrupted(8) });
    assert!(bench.wait_for(|action| matches!(action, Action::Exit)) <= NOBODY + Duration::from_secs(1));
}

#[test]
fn a_report_is_sent_when_it_is_on_disk_or_the_disk_takes_too_long() {
    let mut bench = Bench::joined();
    bench.start(1);
    bench.start(2);
    bench.sent();
    let on = |bench: &mut Bench, event| bench.session.on(event, bench.now, &mut bench.out);
    on(&mut bench, Event::Ended { key: key(1), outcome: failed() });
    on(&mut bench, Event::Ended { key: key(2), outcome: failed() });
    assert!(matches!(bench.out[0], Action::Keep { number: 1, .. }));
    let sent = bench.sent();
    assert!(reports(&sent).is_empty(), "{sent:?}");
    on(&mut bench, Event::Kept { number: 2 });
    assert_eq!(reports(&bench.sent()), [2]);
    bench.pass(Duration::from_secs(2));
    assert_eq!(reports(&bench.sent()), [1]);
    bench.receive(5, ToNode::Acknowledged { report: 1 });
    assert!(bench.out.iter().any(|action| matches!(action, Action::Forget { number: 1 })));
}

#[test]
fn reports_of_an_earlier_process_are_sent_again_and_hold_nothing() {
    let report = AttemptReport { key: key(1), outcome: failed() };
    let mut bench = Bench::with(1, vec![(7, report)], None);
    bench.join(5);
    let sent = bench.sent();
    assert_eq!((reports(&sent), listed(&sent)), (vec![7], Some(vec![])));
    // New reports have numbers of their own.
    bench.start(2);
    bench.on(Event::Ended { key: key(2), outcome: failed() });
    assert_eq!(reports(&bench.sent()), [8]);
    bench.receive(5, ToNode::Acknowledged { report: 7 });
    assert!(bench.out.iter().any(|action| matches!(action, Action::Forget { number: 7 })));
    bench.pass(Duration::from_secs(3));
    assert_eq!(reports(&bench.sent()), [8]);
}

#[test]
fn a_crash_and_the_labels_are_registered_and_the_crash_only_until_it_is_known() {
    let crash = Crash { attempts: vec![key(1)], cause: "signal 11".into(), own_fault: true };
    let mut bench = Bench::with(1, vec![], Some(crash.clone()));
    let registered = |bench: &mut Bench| {
        let registration = |message| match message {
            ToScheduler::Register(registration) => Some(registration),
            _ => None,
        };
        bench.sent().into_iter().find_map(registration).unwrap()
    };
    bench.on(Event::Tick);
    bench.on(Event::Dialed(Ok(())));
    bench.on(Event::Ready(SCHEDULER));
    let registration = registered(&mut bench);
    assert_eq!((registration.crash, &registration.labels["gpu"][..]), (Some(crash), "h100"));
    bench.receive(5, ToNode::Welcome { heartbeat_ms: 1000 });
    assert!(bench.out.iter().any(|action| matches!(action, Action::CrashKnown)));
    bench.receive(5, ToNode::Reregister);
    assert_eq!(registered(&mut bench).crash, None);
}

#[test]
fn a_node_finds_the_scheduler_that_leads_by_itself() {
    let mut bench = Bench::with(3, vec![], None);
    let dialled = |bench: &mut Bench| {
        let dial = |action: &Action| match action {
            Action::Dial(scheduler) => Some(*scheduler),
            _ => None,
        };
        let dialled = bench.out.iter().find_map(dial);
        bench.out.clear();
        dialled
    };
    bench.on(Event::Tick);
    assert_eq!(dialled(&mut bench), Some(0));
    bench.on(Event::Dialed(Err(Missed::Standby { leader: Some(2) })));
    assert_eq!(dialled(&mut bench), Some(2), "at once, and the one that leads");
    bench.on(Event::Dialed(Ok(())));
    bench.on(Event::Ready(SCHEDULER));
    bench.receive(5, ToNode::Welcome { heartbeat_ms: 1000 });
    bench.out.clear();
    // A session that closes: the same one first, then the others without a wait.
    bench.on(Event::Closed(SCHEDULER));
    bench.pass(Duration::from_millis(200));
    assert_eq!(dialled(&mut bench), Some(2));
    bench.on(Event::Dialed(Err(down())));
    assert_eq!(dialled(&mut bench), Some(0));
    bench.on(Event::Dialed(Err(Missed::Standby { leader: None })));
    assert_eq!(dialled(&mut bench), Some(1));
    // While one is about to lead, the next round is soon.
    bench.on(Event::Dialed(Err(down())));
    assert_eq!(dialled(&mut bench), None);
    bench.pass(Duration::from_millis(500));
    assert!(dialled(&mut bench).is_some());
}
