//! Any sequence of events, honest or not, leaves a legal farm; see [`World::check`] for what that is.

use std::time::Duration;

use farm_core::id::{AttemptKey, JobId};
use farm_core::job::state::{FailureKind, JobState};
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{AttemptReport, ToScheduler};
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
        models: u8,
        running: u32,
    },
    Heartbeat {
        node: u8,
        boot: u8,
        listed: u32,
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
    HonestHeartbeat {
        start: usize,
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
        4 => (0..3u8, 0..5u8, 0..4usize, any::<u8>(), any::<u32>()).prop_map(
            |(node, boot, devices, models, running)| Step::Register { node, boot, devices, models, running }
        ),
        3 => (0..3u8, 0..5u8, any::<u32>()).prop_map(|(node, boot, listed)| Step::Heartbeat { node, boot, listed }),
        2 => (0..3u8, 0..5u8, any::<usize>(), any::<u8>(), 1..3u8)
            .prop_map(|(node, boot, start, outcome, times)| Step::Report { node, boot, start, outcome, times }),
        4 => (any::<usize>(), any::<u8>()).prop_map(|(start, outcome)| Step::HonestReport { start, outcome }),
        4 => any::<usize>().prop_map(|start| Step::HonestHeartbeat { start }),
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
    /// Every attempt ever started: its key, node and boot.
    starts: Vec<(AttemptKey, String, farm_core::id::BootId)>,
    jobs: Vec<JobId>,
}

impl Run {
    fn apply(&mut self, step: Step) {
        let world = &mut self.world;
        match step {
            Step::Submit { priority, model } => {
                let model = [None, Some("m"), Some("n"), Some("nobody's")][model as usize % 4];
                let n = self.jobs.len() as u64 + 1;
                self.jobs.push(world.submit(n, priority, model));
            }
            Step::Register { node, boot: b, devices, models, running } => {
                let models: &[&str] = [&["m"][..], &["n"], &["m", "n"], &[]][models as usize % 4];
                let mut registration = registration(devices, models);
                registration.running = subset(&self.starts, running).into_iter().map(listed).collect();
                world.register(NODES[node as usize], boot(b.into()), registration);
            }
            Step::Heartbeat { node, boot: b, listed } => {
                let keys = subset(&self.starts, listed);
                world.heartbeat(NODES[node as usize], boot(b.into()), &keys);
            }
            Step::Report { node, boot: b, start, outcome, times } => {
                if let Some((key, ..)) = self.starts.get(start % self.starts.len().max(1)).cloned() {
                    for _ in 0..times {
                        self.report(NODES[node as usize].to_owned(), boot(b.into()), key, outcome);
                    }
                }
            }
            Step::HonestReport { start, outcome } => {
                if let Some((key, node, boot)) = self.starts.get(start % self.starts.len().max(1)).cloned() {
                    self.report(node, boot, key, outcome);
                }
            }
            Step::HonestHeartbeat { start } => {
                if let Some((_, node, boot)) = self.starts.get(start % self.starts.len().max(1)).cloned() {
                    let of_boot = self.starts.iter().filter(|(.., b)| *b == boot);
                    let live = of_boot.filter(|(key, ..)| world.farm.lease(key).is_some());
                    let keys: Vec<AttemptKey> = live.map(|(key, ..)| *key).collect();
                    world.heartbeat(&node, boot, &keys);
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
        self.note_starts();
    }

    fn note_starts(&mut self) {
        for send in &self.world.sent {
            if let ToNode::Start(start) = &send.message {
                let entry = (start.key, send.node.0.clone(), send.boot);
                if !self.starts.contains(&entry) {
                    assert!(self.starts.iter().all(|(key, ..)| *key != entry.0), "an attempt has one owner");
                    self.starts.push(entry);
                }
            }
        }
    }

    fn report(&mut self, node: String, boot: farm_core::id::BootId, key: AttemptKey, outcome: u8) {
        let outcome = match outcome % 6 {
            0 => failed(FailureKind::Input),
            1 => failed(FailureKind::Device),
            2 => failed(FailureKind::Store),
            3 => failed(FailureKind::NodeLost),
            _ => completed(key),
        };
        let world = &mut self.world;
        let owner = world.farm.lease(&key).is_some_and(|lease| lease.node.0 == node && lease.boot == boot);
        let known = world.farm.nodes.get(&farm_core::id::NodeId(node.clone())).is_some_and(|n| n.boot == boot);
        let report = ToScheduler::Report { number: 1, report: AttemptReport { key, outcome } };
        world.message(&node, boot, report.clone());
        if !(owner && known) {
            let starts = world.starts().len();
            let touched = world.changes.iter().any(|change| {
                !matches!(change, super::effects::Change::Started { .. } | super::effects::Change::Log { .. })
            });
            // A report from a node that was silent also says that it is alive, so others' work may start there.
            assert!(!touched, "a stale report changes nothing: {:?} {starts}", world.changes);
        }
        let acknowledged = world.sent.iter().any(|send| matches!(send.message, ToNode::Acknowledged { .. }));
        assert_eq!(acknowledged, known);
        self.note_starts();
        // Its replay is a no-op.
        self.world.message(&node, boot, report);
        assert!(self.world.changes.is_empty(), "{:?}", self.world.changes);
        self.note_starts();
    }
}

/// The attempts whose bit is set, by their number modulo 32.
fn subset(starts: &[(AttemptKey, String, farm_core::id::BootId)], bits: u32) -> Vec<AttemptKey> {
    let chosen = starts.iter().enumerate().filter(|(i, _)| bits >> (i % 32) & 1 == 1);
    chosen.map(|(_, (key, ..))| *key).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_events_leaves_a_legal_farm(steps in prop::collection::vec(step(), 1..80)) {
        let mut run = Run { world: World::new(), starts: Vec::new(), jobs: Vec::new() };
        for step in steps {
            run.apply(step);
        }
        // Whatever happened, a healthy node finishes what is left.
        let healthy = boot(99);
        run.world.pass(Duration::from_secs(120));
        run.world.register("z", healthy, registration(2, &["m", "n"]));
        run.note_starts();
        for _ in 0..10 * run.jobs.len() + 10 {
            let mine: Vec<AttemptKey> = run.starts.iter().filter(|(.., b)| *b == healthy).map(|(key, ..)| *key)
                .filter(|key| run.world.farm.lease(key).is_some()).collect();
            let Some(key) = mine.first().copied() else { break };
            run.world.report("z", healthy, key, completed(key));
            run.note_starts();
            run.world.heartbeat("z", healthy, &mine[1..]);
            run.note_starts();
        }
        for (job, row) in &run.world.rows {
            let nameless = row.live.model.is_none() || row.live.model.as_deref() == Some("nobody's");
            prop_assert!(row.state.is_terminal() || nameless, "job {job} is {:?}", row.state);
        }
    }
}
