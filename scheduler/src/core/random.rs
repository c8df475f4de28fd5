//! Any sequence of events, honest or not, leaves a legal farm; see [`World::check`] for what that is.

use std::time::Duration;

use farm_core::id::{AttemptKey, BootId, JobId, NodeId};
use farm_core::job::state::{FailureKind, JobState};
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{AttemptReport, Helping, Roles, RunningAttempt, ToScheduler};
use proptest::prelude::*;

use super::events::Event;
use super::fixture::*;

#[derive(Clone, Debug)]
enum Step {
    Submit {
        priority: i32,
        model: u8,
    },
    Register {
        node: u8,
        boot: u8,
        devices: usize,
        /// Whether it says how fast they are, so that clips may be rendered by several.
        rated: bool,
        models: u8,
        roles: u8,
        running: u32,
        helping: u32,
    },
    Heartbeat {
        node: u8,
        boot: u8,
        listed: u32,
        /// Bits of the devices that listed attempts have left.
        left: u32,
        helping: u32,
    },
    /// A wish for devices that decode the nth start ever sent, from its own process or from another.
    Want {
        start: usize,
        other: Option<(u8, u8)>,
        round: u32,
        tiles: u32,
    },
    /// A report on the nth start ever sent, from any process, `times` over.
    Report {
        node: u8,
        boot: u8,
        start: usize,
        outcome: u8,
        times: u8,
    },
    /// What an honest node does: reports on an attempt that it was told to start.
    HonestReport {
        start: usize,
        outcome: u8,
    },
    /// Lists the attempts that it runs, with the devices whose bits are set, and the helps that it was told of, unless
    /// they have ended.
    HonestHeartbeat {
        start: usize,
        left: u32,
        ended: u32,
    },
    Closed {
        boot: u8,
    },
    Pass {
        millis: u64,
    },
    Jump {
        millis: u64,
    },
    Cancel {
        job: usize,
    },
    Retry {
        job: usize,
    },
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (-1..2i32, any::<u8>()).prop_map(|(priority, model)| Step::Submit { priority, model }),
        4 => (0..3u8, 0..5u8, 0..6usize, any::<bool>(), any::<u8>(), 0..8u8, any::<u32>(), any::<u32>()).prop_map(
            |(node, boot, devices, rated, models, roles, running, helping)| {
                Step::Register { node, boot, devices, rated, models, roles, running, helping }
            }
        ),
        3 => (0..3u8, 0..5u8, any::<u32>(), any::<u32>(), any::<u32>())
            .prop_map(|(node, boot, listed, left, helping)| Step::Heartbeat { node, boot, listed, left, helping }),
        4 => (any::<usize>(), prop::option::weighted(0.2, (0..3u8, 0..5u8)), 0..4u32, 0..20u32)
            .prop_map(|(start, other, round, tiles)| Step::Want { start, other, round, tiles }),
        2 => (0..3u8, 0..5u8, any::<usize>(), any::<u8>(), 1..3u8)
            .prop_map(|(node, boot, start, outcome, times)| Step::Report { node, boot, start, outcome, times }),
        4 => (any::<usize>(), any::<u8>()).prop_map(|(start, outcome)| Step::HonestReport { start, outcome }),
        4 => (any::<usize>(), prop_oneof![any::<u32>(), Just(u32::MAX)], prop_oneof![any::<u32>(), Just(0)])
            .prop_map(|(start, left, ended)| Step::HonestHeartbeat { start, left, ended }),
        1 => (0..5u8).prop_map(|boot| Step::Closed { boot }),
        3 => (0..20_000u64).prop_map(|millis| Step::Pass { millis }),
        1 => (0..60_000u64).prop_map(|millis| Step::Jump { millis }),
        2 => any::<usize>().prop_map(|job| Step::Cancel { job }),
        2 => any::<usize>().prop_map(|job| Step::Retry { job }),
        1 => Just(Step::Restart),
    ]
}

const NODES: [&str; 3] = ["a", "b", "c"];

struct Run {
    world: World,
    jobs: Vec<JobId>,
}

impl Run {
    fn apply(&mut self, step: Step) {
        let nth = |world: &World, n: usize| world.started.get(n % world.started.len().max(1)).cloned();
        let world = &mut self.world;
        match step {
            Step::Submit { priority, model } => {
                let model = [None, Some("m"), Some("n"), Some("nobody's")][model as usize % 4];
                let n = self.jobs.len() as u64 + 1;
                self.jobs.push(world.submit(n, priority, model));
            }
            Step::Register { node, boot: b, devices, rated, models, roles, running, helping } => {
                let models: &[&str] = [&["m"][..], &["n"], &["m", "n"], &[]][models as usize % 4];
                let mut registration = if rated { team(devices, models) } else { registration(devices, models) };
                registration.running =
                    subset(&world.started, running).into_iter().map(|key| world.listed(key)).collect();
                registration.roles = Roles { denoise: roles != 0, decode: roles != 1 };
                registration.helping = helps(world, helping);
                world.register(NODES[node as usize], boot(b.into()), registration);
            }
            Step::Heartbeat { node, boot: b, listed, left, helping } => {
                let running =
                    subset(&world.started, listed).into_iter().map(|key| has_left(world, key, left)).collect();
                let helping = helps(world, helping);
                world.message(NODES[node as usize], boot(b.into()), ToScheduler::Heartbeat { running, helping });
            }
            Step::Want { start, other, round, tiles } => {
                let Some((key, owner, owner_boot)) = nth(world, start) else { return };
                let (node, boot) = match other {
                    Some((node, b)) => (NODES[node as usize], boot(b.into())),
                    None => (owner.0.as_str(), owner_boot),
                };
                for _ in 0..2 {
                    let told = world.helped.len();
                    world.want_hands(node, boot, key, round, tiles);
                    let again = told < world.helped.len();
                    let answered = world.sent.iter().any(|send| matches!(send.message, ToNode::Hands { .. }));
                    assert!(answered || !again, "who helps is told together with who is helped");
                }
            }
            Step::Report { node, boot: b, start, outcome, times } => {
                if let Some((key, ..)) = nth(world, start) {
                    for _ in 0..times {
                        self.report(NODES[node as usize], boot(b.into()), key, outcome);
                    }
                }
            }
            Step::HonestReport { start, outcome } => {
                if let Some((key, node, boot)) = nth(world, start) {
                    self.report(&node.0, boot, key, outcome);
                }
            }
            Step::HonestHeartbeat { start, left, ended } => {
                if let Some((_, node, boot)) = nth(world, start) {
                    let of_boot = world.started.iter().filter(|(_, n, b)| *n == node && *b == boot);
                    let live = of_boot.filter(|(key, ..)| world.farm.lease(key).is_some());
                    let running = live.map(|(key, ..)| has_left(world, *key, left)).collect();
                    let of_boot = world.helped.iter().filter(|(_, _, n, b)| *n == node && *b == boot);
                    let live = of_boot.filter(|(key, ..)| world.farm.lease(key).is_some());
                    let helping = live.map(|(key, device, ..)| (*key, device.0));
                    let helping: Vec<_> = helping.filter(|(_, device)| ended >> (device % 32) & 1 == 0).collect();
                    world.beat(&node.0, boot, running, &helping);
                    assert!(world.aborts().is_empty() || !world.farm.boots.contains_key(&boot));
                }
            }
            Step::Closed { boot: b } => world.event(Event::SessionClosed(boot(b.into()))),
            Step::Pass { millis } => world.pass(Duration::from_millis(millis)),
            Step::Jump { millis } => {
                world.now = world.now + Duration::from_millis(millis);
                world.event(Event::Tick);
            }
            Step::Cancel { job } => {
                if let Some(job) = self.jobs.get(job % self.jobs.len().max(1)) {
                    let ended = world.state(*job).is_terminal();
                    world.event(Event::Cancel(*job));
                    assert!(!ended || world.changes.is_empty(), "what has ended cannot be cancelled");
                }
            }
            Step::Retry { job } => {
                if let Some(job) = self.jobs.get(job % self.jobs.len().max(1))
                    && matches!(world.state(*job), JobState::Failed | JobState::Cancelled)
                {
                    world.retry(*job);
                }
            }
            Step::Restart => world.restart(),
        }
    }

    fn report(&mut self, node: &str, boot: BootId, key: AttemptKey, outcome: u8) {
        let outcome = match outcome % 6 {
            0 => failed(FailureKind::Input),
            1 => failed(FailureKind::Device),
            2 => failed(FailureKind::Store),
            3 => failed(FailureKind::NodeLost),
            _ => completed(key),
        };
        let world = &mut self.world;
        let owner = world.farm.lease(&key).is_some_and(|lease| lease.node.0 == *node && lease.boot == boot);
        let known = world.farm.nodes.get(&NodeId(node.to_owned())).is_some_and(|n| n.boot == boot);
        let report = ToScheduler::Report { number: 1, report: AttemptReport { key, outcome } };
        world.message(node, boot, report.clone());
        if !(owner && known) {
            let touched = world.changes.iter().any(|change| {
                !matches!(change, super::effects::Change::Started { .. } | super::effects::Change::Log { .. })
            });
            // A report from a node that was silent also says that it is alive, so others' work may start there.
            assert!(!touched, "a stale report changes nothing: {:?}", world.changes);
        }
        let acknowledged = world.sent.iter().any(|send| matches!(send.message, ToNode::Acknowledged { .. }));
        assert_eq!(acknowledged, known);
        // Its replay is a no-op.
        self.world.message(node, boot, report);
        assert!(self.world.changes.is_empty(), "{:?}", self.world.changes);
    }
}

/// The attempts whose bit is set, by their number modulo 32.
fn subset(starts: &[(AttemptKey, NodeId, BootId)], bits: u32) -> Vec<AttemptKey> {
    let chosen = starts.iter().enumerate().filter(|(i, _)| bits >> (i % 32) & 1 == 1);
    chosen.map(|(_, (key, ..))| *key).collect()
}

/// The helps whose bit is set, by their number modulo 32.
fn helps(world: &World, bits: u32) -> Vec<Helping> {
    let chosen = world.helped.iter().enumerate().filter(|(i, _)| bits >> (i % 32) & 1 == 1);
    chosen.map(|(_, (key, device, ..))| Helping { key: *key, device: *device }).collect()
}

/// The attempt with those of its devices whose bits are set.
fn has_left(world: &World, key: AttemptKey, bits: u32) -> RunningAttempt {
    let RunningAttempt { mut devices, progress, .. } = world.listed(key);
    devices.retain(|device| bits >> (device.0 % 32) & 1 == 1);
    RunningAttempt { key, progress, devices }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_events_leaves_a_legal_farm(steps in prop::collection::vec(step(), 1..80)) {
        let mut run = Run { world: World::new(), jobs: Vec::new() };
        for step in steps {
            run.apply(step);
        }
        // Whatever happened, a healthy node finishes what is left.
        let healthy = boot(99);
        run.world.pass(Duration::from_secs(120));
        run.world.register("z", healthy, team(3, &["m", "n"]));
        for _ in 0..10 * run.jobs.len() + 10 {
            let mine: Vec<AttemptKey> = run.world.started.iter().filter(|(.., b)| *b == healthy).map(|(key, ..)| *key)
                .filter(|key| run.world.farm.lease(key).is_some()).collect();
            let Some(key) = mine.first().copied() else { break };
            let running: Vec<_> = mine.iter().map(|key| run.world.listed(*key)).collect();
            run.world.want_hands("z", healthy, key, 1, 3);
            let helping: Vec<_> = run.world.helpers().into_iter().map(|(_, device)| (key, device)).collect();
            run.world.beat("z", healthy, running.clone(), &helping);
            prop_assert!(run.world.dismissed().is_empty());
            run.world.report("z", healthy, key, completed(key));
            prop_assert_eq!(run.world.dismissed().len(), helping.len());
            run.world.beat("z", healthy, running[1..].to_vec(), &[]);
        }
        prop_assert_eq!(run.world.farm.sizes(), (1, 3, 3), "nothing is lent to nobody");
        for (job, row) in &run.world.rows {
            let nameless = row.live.model.is_none() || row.live.model.as_deref() == Some("nobody's");
            prop_assert!(row.state.is_terminal() || nameless, "job {job} is {:?}", row.state);
        }
    }
}
