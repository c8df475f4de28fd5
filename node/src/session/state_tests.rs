use super::*;

use farm_core::id::{AttemptNo, DeviceIndex, JobId, NodeId};
use farm_core::job::state::FailureKind;
use farm_core::parallel::topology::Topology;
use farm_core::tiles::plan::Tiling;
use farm_core::wire::to_scheduler::{Crash, DeviceInfo, Roles};
use proptest::prelude::*;
use uuid::Uuid;

#[path = "state_decode_tests.rs"]
mod decode;
#[path = "state_leave_tests.rs"]
mod leave;

const SCHEDULER: BootId = BootId(Uuid::from_u128(1));
const BOOT: BootId = BootId(Uuid::from_u128(2));

/// A session with a hand-moved clock, and a disk that keeps reports at once.
struct Bench {
    session: Session,
    now: Instant,
    out: Vec<Action>,
}

impl Bench {
    fn new() -> Self {
        Self::with(1, vec![], None)
    }

    /// With so many schedulers, reports of an earlier process, and the death of one.
    fn with(schedulers: usize, earlier: Vec<(u64, AttemptReport)>, crash: Option<Crash>) -> Self {
        let now = Instant::now();
        let offer = Offer {
            devices: vec![DeviceInfo { name: "cpu".into() }],
            site_json: None,
            models: vec![],
            store: "memory:".into(),
            roles: Roles::ALL,
            labels: [("gpu".to_owned(), "h100".to_owned())].into(),
            crash,
        };
        let session = Session::new(BOOT, offer, earlier, Dialer::new(schedulers, 7), now);
        Self { session, now, out: Vec::new() }
    }

    /// A session welcomed under epoch 5, its registration and first heartbeat taken out.
    fn joined() -> Self {
        let mut bench = Self::new();
        bench.join(5);
        bench
    }

    fn join(&mut self, epoch: u64) {
        self.out.clear();
        self.wait_for(|action| matches!(action, Action::Dial(_)));
        self.on(Event::Dialed(Ok(())));
        self.on(Event::Ready(SCHEDULER));
        assert!(matches!(self.out.remove(0), Action::Send(ToScheduler::Register(_))));
        self.receive(epoch, ToNode::Welcome { heartbeat_ms: 1000 });
    }

    fn on(&mut self, event: Event) {
        let before = self.out.len();
        self.session.on(event, self.now, &mut self.out);
        let kept = |action: &Action| match action {
            Action::Keep { number, .. } => Some(*number),
            _ => None,
        };
        let kept: Vec<u64> = self.out[before..].iter().filter_map(kept).collect();
        for number in kept {
            self.session.on(Event::Kept { number }, self.now, &mut self.out);
        }
    }

    fn receive(&mut self, epoch: u64, body: ToNode) {
        self.on(received(epoch, BOOT, body));
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.on(Event::Tick);
    }

    /// Moves the clock until the action comes, and drops what came before it. Returns the time it took.
    fn wait_for(&mut self, wanted: impl Fn(&Action) -> bool) -> Duration {
        let start = self.now;
        loop {
            if let Some(at) = self.out.iter().position(&wanted) {
                self.out.drain(..=at);
                return self.now - start;
            }
            assert!(self.now - start < Duration::from_secs(600), "never happened; state {:?}", self.session);
            self.pass(Duration::from_millis(50));
        }
    }

    fn sent(&mut self) -> Vec<ToScheduler> {
        let sent = |action| match action {
            Action::Send(message) => Some(message),
            _ => None,
        };
        std::mem::take(&mut self.out).into_iter().filter_map(sent).collect()
    }

    fn start(&mut self, n: u32) -> usize {
        self.receive(5, start(n));
        let starts = self.out.iter().filter(|action| matches!(action, Action::Start { .. })).count();
        self.out.clear();
        starts
    }
}

fn down() -> Missed {
    Missed::Unreachable("down".into())
}

fn received(epoch: u64, boot: BootId, body: ToNode) -> Event {
    Event::Received(Envelope { epoch: Epoch(epoch), node: NodeId("n".into()), boot, seq: 1, body })
}

fn key(n: u32) -> AttemptKey {
    AttemptKey { job: JobId(Uuid::from_u128(9)), attempt: AttemptNo(n), epoch: Epoch(5) }
}

fn start(n: u32) -> ToNode {
    ToNode::Start(Box::new(StartAttempt {
        key: key(n),
        devices: vec![DeviceIndex(0)],
        topology: Topology::SOLO,
        model: "tiny".into(),
        model_hash: "00".into(),
        spec_json: "{}".into(),
        tiling: Tiling::AUTO,
    }))
}

fn help(n: u32, round: u32) -> ToNode {
    ToNode::Help(Box::new(HelpDecode {
        key: key(n),
        round,
        device: DeviceIndex(0),
        model: "tiny".into(),
        model_hash: "00".into(),
        spec_json: "{}".into(),
        url: "http://there".into(),
        token: "t".into(),
    }))
}

fn dismiss(n: u32) -> ToNode {
    ToNode::Dismiss { key: key(n), device: DeviceIndex(0), stop: StopNo::default() }
}

fn help_ended(n: u32) -> Event {
    Event::HelpEnded { key: key(n), device: DeviceIndex(0) }
}

fn hands(n: u32, round: u32) -> ToNode {
    ToNode::Hands { key: key(n), round, keep: vec![DeviceIndex(0)], helpers: 2 }
}

fn want(n: u32, round: u32) -> Event {
    Event::WantHands { key: key(n), round, tiles: 18, url: "http://here".into(), token: "t".into() }
}

fn failed() -> AttemptOutcome {
    AttemptOutcome::Failed { kind: FailureKind::Device, message: "x".into() }
}

fn reports(sent: &[ToScheduler]) -> Vec<u64> {
    let number = |message: &ToScheduler| match message {
        ToScheduler::Report { number, .. } => Some(*number),
        _ => None,
    };
    sent.iter().filter_map(number).collect()
}

fn listed(sent: &[ToScheduler]) -> Option<Vec<AttemptKey>> {
    sent.iter().rev().find_map(|message| match message {
        ToScheduler::Heartbeat { running, .. } => Some(running.iter().map(|attempt| attempt.key).collect()),
        _ => None,
    })
}

fn helps(out: &[Action]) -> usize {
    out.iter().filter(|action| matches!(action, Action::Help(_))).count()
}

#[test]
fn redialling_backs_off_with_jitter_to_a_cap_and_never_ends() {
    let mut bench = Bench::new();
    bench.on(Event::Tick);
    let mut waits = Vec::new();
    for _ in 0..50 {
        waits.push(bench.wait_for(|action| matches!(action, Action::Dial(_))));
        bench.on(Event::Dialed(Err(down())));
    }
    assert_eq!(waits[0], Duration::ZERO);
    assert!(waits[1] <= Duration::from_millis(250), "{waits:?}");
    let late = &waits[10..];
    assert!(late.iter().all(|wait| (2450..=5050).contains(&wait.as_millis())), "{late:?}");
    assert!(late.iter().any(|wait| *wait != late[0]), "no jitter: {late:?}");
}

#[test]
fn a_dialler_that_never_answers_is_not_waited_for() {
    let mut bench = Bench::new();
    bench.on(Event::Tick);
    bench.out.clear();
    assert!(bench.wait_for(|action| matches!(action, Action::Dial(_))) > DIAL);
    // What it brings later comes too late.
    bench.on(Event::Dialed(Err(down())));
    bench.wait_for(|action| matches!(action, Action::Dial(_)));
}

#[test]
fn a_registration_is_repeated_until_it_is_answered() {
    let mut bench = Bench::new();
    bench.on(Event::Tick);
    bench.on(Event::Dialed(Ok(())));
    bench.on(Event::Ready(SCHEDULER));
    for _ in 0..3 {
        bench.wait_for(|action| matches!(action, Action::Send(ToScheduler::Register(_))));
    }
    bench.wait_for(|action| matches!(action, Action::Disconnect(SCHEDULER)));
    bench.wait_for(|action| matches!(action, Action::Dial(_)));
}

#[test]
fn heartbeats_go_out_at_the_interval_that_the_welcome_names() {
    let mut bench = Bench::joined();
    bench.sent();
    for _ in 0..5 {
        bench.receive(5, ToNode::HeartbeatSeen);
        let wait = bench.wait_for(|action| matches!(action, Action::Send(ToScheduler::Heartbeat { .. })));
        assert_eq!(wait, Duration::from_millis(1000));
    }
}

#[test]
fn a_session_without_answered_heartbeats_is_dropped_and_redialled() {
    let mut bench = Bench::joined();
    // Other frames are no sign that the scheduler hears us.
    bench.pass(Duration::from_secs(9));
    bench.receive(5, ToNode::Acknowledged { report: 99 });
    let wait = bench.wait_for(|action| matches!(action, Action::Disconnect(SCHEDULER)));
    assert!(wait <= Duration::from_secs(1), "{wait:?}");
    assert!(bench.wait_for(|action| matches!(action, Action::Dial(_))) <= Duration::from_millis(250));
}

#[test]
fn a_repeated_start_is_a_no_op_in_every_stage_of_the_attempt() {
    let mut bench = Bench::joined();
    assert_eq!(bench.start(1), 1);
    assert_eq!(bench.start(1), 0);
    bench.on(Event::Ended { key: key(1), outcome: failed() });
    assert_eq!(bench.start(1), 0);
    bench.receive(5, ToNode::Acknowledged { report: 1 });
    assert_eq!(bench.start(1), 0);
    assert_eq!(bench.start(2), 1);
}

#[test]
fn a_report_is_sent_until_acknowledged_across_sessions_and_its_attempt_stays_listed() {
    let mut bench = Bench::joined();
    bench.start(1);
    bench.on(Event::Ended { key: key(1), outcome: failed() });
    assert_eq!(reports(&bench.sent()), [1]);
    bench.pass(RESEND);
    let sent = bench.sent();
    assert_eq!(reports(&sent), [1]);
    assert_eq!(listed(&sent), Some(vec![key(1)]));

    bench.on(Event::Closed(SCHEDULER));
    bench.pass(Duration::from_secs(30));
    assert!(reports(&bench.sent()).is_empty(), "there is no session");
    bench.on(Event::Dialed(Err(down())));
    bench.join(6);
    assert_eq!(reports(&bench.sent()), [1], "at once after the welcome");

    bench.receive(6, ToNode::Acknowledged { report: 1 });
    bench.pass(RESEND);
    let sent = bench.sent();
    assert_eq!((reports(&sent), listed(&sent)), (vec![], Some(vec![])));
}

#[test]
fn nothing_is_reported_for_an_aborted_attempt() {
    let mut bench = Bench::joined();
    bench.start(1);
    bench.receive(5, ToNode::Abort { key: key(1), stop: StopNo::default(), reason: "cancelled".into() });
    assert!(bench.out.iter().any(|action| matches!(action, Action::Abort(k) if *k == key(1))));
    bench.on(Event::Ended { key: key(1), outcome: failed() });
    // Also if it ended first, or if its start comes after the abort.
    bench.start(2);
    bench.out.clear();
    bench.on(Event::Closed(SCHEDULER));
    bench.on(Event::Ended { key: key(2), outcome: failed() });
    bench.join(5);
    bench.sent();
    bench.receive(5, ToNode::Abort { key: key(2), stop: StopNo::default(), reason: "cancelled".into() });
    bench.receive(5, ToNode::Abort { key: key(3), stop: StopNo::default(), reason: "cancelled".into() });
    assert_eq!(bench.start(3), 0);
    bench.pass(RESEND);
    let sent = bench.sent();
    assert_eq!((reports(&sent), listed(&sent)), (vec![], Some(vec![])));
}

#[test]
fn heartbeats_and_registrations_say_which_command_to_stop_was_heard_last() {
    let mut bench = Bench::joined();
    let heard = |bench: &mut Bench| {
        bench.pass(Duration::from_secs(1));
        let heartbeat = |message: &ToScheduler| match message {
            ToScheduler::Heartbeat { heard, .. } => Some(heard.number),
            _ => None,
        };
        bench.sent().iter().rev().find_map(heartbeat).unwrap()
    };
    let stop = |number| StopNo { epoch: Epoch(5), number };
    assert_eq!(heard(&mut bench), 0);
    bench.receive(5, ToNode::Abort { key: key(1), stop: stop(2), reason: "cancelled".into() });
    assert_eq!(heard(&mut bench), 2);
    bench.receive(5, ToNode::Abort { key: key(2), stop: stop(1), reason: "late".into() });
    assert_eq!(heard(&mut bench), 2);
    bench.receive(5, ToNode::Dismiss { key: key(1), device: DeviceIndex(0), stop: stop(3) });
    assert_eq!(heard(&mut bench), 3);
    bench.on(Event::Closed(SCHEDULER));
    bench.wait_for(|action| matches!(action, Action::Dial(_)));
    bench.on(Event::Dialed(Ok(())));
    bench.on(Event::Ready(SCHEDULER));
    let Some(ToScheduler::Register(registration)) = bench.sent().pop() else { panic!("not registered") };
    assert_eq!(registration.heard, stop(3));
}

#[test]
fn commands_of_an_older_epoch_or_for_another_process_are_refused_and_counted() {
    let mut bench = Bench::joined();
    bench.start(1);
    bench.receive(4, start(2));
    bench.receive(4, ToNode::Abort { key: key(1), stop: StopNo::default(), reason: "old".into() });
    let other = BootId(Uuid::from_u128(3));
    bench.on(received(5, other, start(3)));
    assert_eq!(bench.session.refused(), 3);
    assert!(bench.sent().is_empty() && bench.out.is_empty());
    bench.pass(Duration::from_secs(1));
    assert_eq!(listed(&bench.sent()), Some(vec![key(1)]));
}

#[test]
fn attempts_survive_a_scheduler_restart_but_not_two_minutes_alone() {
    let mut bench = Bench::joined();
    bench.start(1);
    bench.on(Event::Closed(SCHEDULER));
    bench.wait_for(|action| matches!(action, Action::Dial(_)));
    bench.on(Event::Dialed(Ok(())));
    bench.on(Event::Ready(SCHEDULER));
    let Some(ToScheduler::Register(registration)) = bench.sent().pop() else { panic!("not registered") };
    assert_eq!(registration.running.iter().map(|attempt| attempt.key).collect::<Vec<_>>(), [key(1)]);
    bench.receive(6, ToNode::Welcome { heartbeat_ms: 1000 });
    assert!(bench.sent().iter().all(|message| matches!(message, ToScheduler::Heartbeat { .. })));

    bench.on(Event::Closed(SCHEDULER));
    bench.pass(CUT_OFF - Duration::from_secs(1));
    assert!(!bench.out.iter().any(|action| matches!(action, Action::Abort(_))));
    bench.pass(Duration::from_secs(1));
    assert!(bench.out.iter().any(|action| matches!(action, Action::Abort(k) if *k == key(1))));
    bench.on(Event::Ended { key: key(1), outcome: failed() });
    bench.on(Event::Dialed(Err(down())));
    bench.join(7);
    assert!(reports(&bench.sent()).is_empty());
}

#[test]
fn a_refused_node_waits_longer_before_it_dials_again() {
    let mut bench = Bench::new();
    bench.on(Event::Tick);
    bench.on(Event::Dialed(Ok(())));
    bench.on(Event::Ready(SCHEDULER));
    bench.receive(5, ToNode::Refused { reason: "another store".into() });
    assert!(bench.out.iter().any(|action| matches!(action, Action::Disconnect(SCHEDULER))));
    assert!(bench.wait_for(|action| matches!(action, Action::Dial(_))) == Duration::ZERO, "the first dial");
    assert!(bench.wait_for(|action| matches!(action, Action::Dial(_))) >= REFUSED_REDIAL / 2);
}

#[test]
fn what_is_held_is_bounded_however_many_starts_come() {
    let mut bench = Bench::joined();
    let started: usize = (1..100).map(|n| bench.start(n)).sum();
    assert_eq!(started, HELD_PER_DEVICE);
    (1..100).for_each(|n| bench.receive(5, help(n, 1)));
    assert_eq!(helps(&bench.out), HELD_PER_DEVICE);
}

#[derive(Clone, Debug)]
enum Step {
    Pass(u64),
    Dialed(bool),
    Ready,
    Closed,
    Start(u64, u32),
    Abort(u64, u32),
    Acknowledged(u64, u64),
    Welcome(u64),
    Refused,
    Reregister,
    Seen,
    Ended(u32),
    Yield(u64, u32),
    Want(u32, u32),
    Hands(u64, u32, u32),
    Help(u64, u32, u32),
    Dismiss(u64, u32),
    HelpEnded(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..3000u64).prop_map(Step::Pass),
        4 => prop::bool::weighted(0.8).prop_map(Step::Dialed),
        4 => Just(Step::Ready),
        4 => (3..6u64).prop_map(Step::Welcome),
        1 => Just(Step::Closed),
        6 => (3..6u64, 1..6u32).prop_map(|(epoch, n)| Step::Start(epoch, n)),
        2 => (3..6u64, 1..6u32).prop_map(|(epoch, n)| Step::Abort(epoch, n)),
        2 => (3..6u64, 1..6u64).prop_map(|(epoch, n)| Step::Acknowledged(epoch, n)),
        1 => Just(Step::Refused),
        1 => Just(Step::Reregister),
        4 => Just(Step::Seen),
        4 => (1..6u32).prop_map(Step::Ended),
        2 => (3..6u64, 1..6u32).prop_map(|(epoch, n)| Step::Yield(epoch, n)),
        2 => (1..6u32, 1..4u32).prop_map(|(n, round)| Step::Want(n, round)),
        4 => (3..6u64, 1..6u32, 1..4u32).prop_map(|(epoch, n, round)| Step::Hands(epoch, n, round)),
        4 => (3..6u64, 1..6u32, 1..4u32).prop_map(|(epoch, n, round)| Step::Help(epoch, n, round)),
        2 => (3..6u64, 1..6u32).prop_map(|(epoch, n)| Step::Dismiss(epoch, n)),
        4 => (1..6u32).prop_map(Step::HelpEnded),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    #[test]
    fn whatever_happens_an_attempt_starts_once_and_only_unaborted_ends_are_reported(steps in steps()) {
        let mut bench = Bench::new();
        let mut started: Vec<AttemptKey> = Vec::new();
        let mut aborted: Vec<AttemptKey> = Vec::new();
        let mut ended: Vec<AttemptKey> = Vec::new();
        let mut answered: Vec<(AttemptKey, u32)> = Vec::new();
        let mut helped: Vec<(AttemptKey, u32)> = Vec::new();
        let mut busy: Vec<AttemptKey> = Vec::new();
        let mut yielded: Vec<AttemptKey> = Vec::new();
        let mut kept: Vec<u64> = Vec::new();
        let mut newest = 0;
        for step in steps {
            let epoch = bench.session.epoch().0;
            prop_assert!(epoch >= newest, "the epoch went back");
            newest = epoch;
            match step {
                Step::Pass(ms) => bench.pass(Duration::from_millis(ms)),
                Step::Dialed(ok) => bench.on(Event::Dialed(if ok { Ok(()) } else { Err(down()) })),
                Step::Ready => bench.on(Event::Ready(SCHEDULER)),
                Step::Closed => bench.on(Event::Closed(SCHEDULER)),
                Step::Start(epoch, n) => bench.receive(epoch, start(n)),
                Step::Abort(epoch, n) => {
                    bench.receive(epoch, ToNode::Abort { key: key(n), stop: StopNo::default(), reason: "r".into() });
                    if epoch >= newest {
                        aborted.push(key(n));
                    }
                }
                Step::Acknowledged(epoch, report) => bench.receive(epoch, ToNode::Acknowledged { report }),
                Step::Welcome(epoch) => bench.receive(epoch, ToNode::Welcome { heartbeat_ms: 500 }),
                Step::Refused => bench.receive(5, ToNode::Refused { reason: "r".into() }),
                Step::Reregister => bench.receive(5, ToNode::Reregister),
                Step::Seen => bench.receive(5, ToNode::HeartbeatSeen),
                Step::Ended(n) => {
                    if started.contains(&key(n)) && !ended.contains(&key(n)) {
                        ended.push(key(n));
                        bench.on(Event::Ended { key: key(n), outcome: failed() });
                    }
                }
                Step::Yield(epoch, n) => {
                    bench.receive(epoch, ToNode::Yield { key: key(n), reason: "r".into() });
                }
                Step::Want(n, round) => {
                    let asks_on = answered.iter().all(|(k, answered)| *k != key(n) || *answered < round);
                    if asks_on && started.contains(&key(n)) {
                        bench.on(want(n, round));
                    }
                }
                Step::Hands(epoch, n, round) => bench.receive(epoch, hands(n, round)),
                Step::Help(epoch, n, round) => bench.receive(epoch, help(n, round)),
                Step::Dismiss(epoch, n) => bench.receive(epoch, dismiss(n)),
                Step::HelpEnded(n) => {
                    busy.retain(|k| *k != key(n));
                    bench.on(help_ended(n));
                }
            }
            for action in std::mem::take(&mut bench.out) {
                match action {
                    Action::Start { start, .. } => {
                        prop_assert!(!started.contains(&start.key), "{} started twice", start.key);
                        prop_assert!(!aborted.contains(&start.key), "{} started after its abort", start.key);
                        prop_assert!(bench.session.peer().is_some());
                        started.push(start.key);
                    }
                    Action::Send(ToScheduler::Report { report, number }) => {
                        prop_assert!(kept.contains(&number), "sent before it is on disk");
                        prop_assert!(ended.contains(&report.key) && !aborted.contains(&report.key));
                    }
                    Action::Abort(key) => prop_assert!(started.contains(&key)),
                    Action::Yield(key) => {
                        prop_assert!(started.contains(&key) && !ended.contains(&key) && !aborted.contains(&key));
                        prop_assert!(!yielded.contains(&key), "told twice");
                        yielded.push(key);
                    }
                    Action::Keep { number, report } => {
                        prop_assert!(ended.contains(&report.key) && !aborted.contains(&report.key));
                        kept.push(number);
                    }
                    Action::Forget { number } => {
                        prop_assert!(kept.contains(&number), "forgets what was never kept");
                        kept.retain(|kept| *kept != number);
                    }
                    Action::Hands { key, round, .. } => {
                        prop_assert!(started.contains(&key) && !ended.contains(&key) && !aborted.contains(&key));
                        prop_assert!(!answered.contains(&(key, round)), "answered twice");
                        answered.push((key, round));
                    }
                    Action::Help(help) => {
                        let before = |(k, round): &(AttemptKey, u32)| *k == help.key && *round >= help.round;
                        prop_assert!(!helped.iter().any(before) && !busy.contains(&help.key), "helps twice");
                        helped.push((help.key, help.round));
                        busy.push(help.key);
                    }
                    Action::Dismiss { key, .. } => prop_assert!(busy.contains(&key)),
                    Action::Send(ToScheduler::Heartbeat { helping, .. }) => {
                        let mut listed: Vec<AttemptKey> = helping.iter().map(|help| help.key).collect();
                        let mut expected = busy.clone();
                        listed.sort_by_key(|key| key.attempt);
                        expected.sort_by_key(|key| key.attempt);
                        prop_assert_eq!(listed, expected, "what is busy is listed, and nothing else");
                    }
                    Action::Exit => prop_assert!(false, "nobody asked it to stop"),
                    _ => {}
                }
            }
        }
    }
}
