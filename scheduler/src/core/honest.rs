//! Honest nodes under messages that take their time, sessions that break, and processes that die: no device is ever
//! lent to two at once, and when all is quiet everything is done and free.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use farm_core::id::{AttemptKey, BootId, DeviceIndex, JobId};
use farm_core::job::state::FailureKind;
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{AttemptOutcome, AttemptReport, Helping, Registration, Roles, ToScheduler};
use proptest::prelude::*;

use super::events::Event;
use super::fixture::*;

const NAMES: [&str; 3] = ["a", "b", "c"];
/// `c` only decodes.
const DEVICES: [usize; 3] = [2, 3, 2];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Holder {
    Attempt(AttemptKey),
    Help(AttemptKey, u32),
}

/// What a node process is and knows; see the node's session and device pool.
struct Process {
    boot: BootId,
    joined: bool,
    up: VecDeque<ToScheduler>,
    down: VecDeque<ToNode>,
    /// Who has each device, and whether it was told to stop.
    devices: Vec<Option<(Holder, bool)>>,
    /// Those that wait for devices of others which were told to stop.
    waiting: Vec<(Holder, Vec<u32>)>,
    running: Vec<AttemptKey>,
    /// Rounds in which an attempt has asked for hands.
    asked: HashMap<AttemptKey, u32>,
    answered: HashMap<AttemptKey, u32>,
    reports: Vec<(u64, AttemptKey, AttemptOutcome)>,
    helping: Vec<(AttemptKey, u32)>,
    /// With the last round.
    seen: HashSet<(Holder, u32)>,
}

impl Process {
    fn new(boot: BootId, devices: usize) -> Self {
        Self {
            boot,
            joined: false,
            up: VecDeque::new(),
            down: VecDeque::new(),
            devices: vec![None; devices],
            waiting: Vec::new(),
            running: Vec::new(),
            asked: HashMap::new(),
            answered: HashMap::new(),
            reports: Vec::new(),
            helping: Vec::new(),
            seen: HashSet::new(),
        }
    }

    fn reserve(&mut self, holder: Holder, wanted: Vec<u32>) {
        let mut idle = true;
        for &device in &wanted {
            if let Some((other, stopping)) = self.devices[device as usize] {
                assert!(stopping, "device {device} is lent to {holder:?} and has {other:?}");
                idle = false;
            }
            let queued = self.waiting.iter().any(|(_, wanted)| wanted.contains(&device));
            assert!(!queued, "device {device} is lent twice");
        }
        match idle {
            true => wanted.iter().for_each(|device| self.devices[*device as usize] = Some((holder, false))),
            false => self.waiting.push((holder, wanted)),
        }
    }

    fn stop(&mut self, holder: Holder) {
        self.devices.iter_mut().flatten().filter(|(h, _)| *h == holder).for_each(|(_, stopping)| *stopping = true);
        let queued = self.waiting.len();
        self.waiting.retain(|(waiting, _)| *waiting != holder);
        if self.waiting.len() < queued {
            self.ended(holder);
        }
    }

    /// Its devices, but for those kept, are idle.
    fn let_go(&mut self, holder: Holder, keep: &[u32]) {
        for (i, device) in self.devices.iter_mut().enumerate() {
            if device.is_some_and(|(h, _)| h == holder) && !keep.contains(&(i as u32)) {
                *device = None;
            }
        }
        for (holder, wanted) in std::mem::take(&mut self.waiting) {
            self.waiting.retain(|(h, _)| *h != holder);
            self.reserve(holder, wanted);
        }
        if keep.is_empty() {
            self.ended(holder);
        }
    }

    fn ended(&mut self, holder: Holder) {
        if let Holder::Help(key, device) = holder {
            let helped = self.helping.len();
            self.helping.retain(|help| *help != (key, device));
            if self.helping.len() < helped {
                self.beat();
            }
        }
    }

    fn held(&self, key: AttemptKey) -> Vec<u32> {
        if let Some((_, wanted)) = self.waiting.iter().find(|(holder, _)| *holder == Holder::Attempt(key)) {
            return wanted.clone();
        }
        let has = |i: &usize| self.devices[*i].is_some_and(|(holder, _)| holder == Holder::Attempt(key));
        (0..self.devices.len()).filter(has).map(|i| i as u32).collect()
    }

    fn listed(&self) -> (Vec<farm_core::wire::to_scheduler::RunningAttempt>, Vec<Helping>) {
        let running = self.running.iter().map(|key| listed_on(*key, &self.held(*key)));
        let pending = self.reports.iter().map(|(_, key, _)| listed_on(*key, &[]));
        let helping = self.helping.iter().map(|(key, device)| Helping { key: *key, device: DeviceIndex(*device) });
        (running.chain(pending).collect(), helping.collect())
    }

    fn register(&mut self, name: usize) {
        let (running, helping) = self.listed();
        let roles = Roles { denoise: name != 2, decode: true };
        self.up.push_back(ToScheduler::Register(Registration {
            running,
            helping,
            roles,
            ..team(DEVICES[name], &["m"])
        }));
    }

    fn beat(&mut self) {
        if self.joined {
            let (running, helping) = self.listed();
            self.up.push_back(ToScheduler::Heartbeat { running, helping });
            for (key, round) in &self.asked {
                if self.answered.get(key) < Some(round) {
                    let (url, token) = ("u".to_owned(), "t".to_owned());
                    self.up.push_back(ToScheduler::WantHands { key: *key, round: *round, tiles: 4, url, token });
                }
            }
            for (number, key, outcome) in &self.reports {
                let report = AttemptReport { key: *key, outcome: outcome.clone() };
                self.up.push_back(ToScheduler::Report { number: *number, report });
            }
        }
    }

    fn end(&mut self, key: AttemptKey, outcome: AttemptOutcome) {
        self.let_go(Holder::Attempt(key), &[]);
        self.running.retain(|running| *running != key);
        self.asked.remove(&key);
        self.reports.push((self.seen.len() as u64 + 1000 * self.reports.len() as u64, key, outcome));
    }

    fn hear(&mut self, name: usize, message: ToNode) {
        match message {
            ToNode::Welcome { .. } => {
                self.joined = true;
                self.beat();
            }
            ToNode::Reregister => {
                self.joined = false;
                self.register(name);
            }
            ToNode::Start(start) if self.joined && self.seen.insert((Holder::Attempt(start.key), 0)) => {
                self.running.push(start.key);
                self.reserve(Holder::Attempt(start.key), start.devices.iter().map(|device| device.0).collect());
            }
            ToNode::Abort { key, .. } => {
                self.seen.insert((Holder::Attempt(key), 0));
                self.running.retain(|running| *running != key);
                self.asked.remove(&key);
                self.reports.retain(|(_, report, _)| *report != key);
                self.stop(Holder::Attempt(key));
            }
            ToNode::Hands { key, round, keep, .. }
                if self.asked.get(&key) == Some(&round) && self.answered.insert(key, round) != Some(round) =>
            {
                let keep: Vec<u32> = keep.iter().map(|device| device.0).collect();
                let held = self.held(key);
                assert!(keep.iter().all(|device| held.contains(device)), "{keep:?} of {held:?}");
                self.let_go(Holder::Attempt(key), &keep);
                self.beat();
            }
            ToNode::Hands { .. } => {}
            ToNode::Help(help) if self.joined => {
                let place = (help.key, help.device.0);
                let holder = Holder::Help(place.0, place.1);
                if !self.helping.contains(&place) && self.seen.insert((holder, help.round)) {
                    self.helping.push(place);
                    self.reserve(holder, vec![place.1]);
                    self.beat();
                }
            }
            ToNode::Dismiss { key, device } => self.stop(Holder::Help(key, device.0)),
            ToNode::Acknowledged { report } => self.reports.retain(|(number, ..)| *number != report),
            _ => {}
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Submit,
    Cancel(usize),
    Up(usize, usize),
    Down(usize, usize),
    Beat(usize),
    Pass(u64),
    /// The latent of an attempt is finished, or all its hands were lost.
    Want(usize, usize),
    End(usize, usize, bool),
    HelpEnds(usize, usize),
    /// A device that was told to stop does.
    Stops(usize, usize),
    /// The session breaks, and all that was on its way is lost.
    Cut(usize),
    Kill(usize),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let node = || 0..3usize;
    prop_oneof![
        4 => Just(Step::Submit),
        1 => any::<usize>().prop_map(Step::Cancel),
        12 => (node(), 1..5usize).prop_map(|(node, count)| Step::Up(node, count)),
        12 => (node(), 1..5usize).prop_map(|(node, count)| Step::Down(node, count)),
        6 => node().prop_map(Step::Beat),
        2 => (0..9000u64).prop_map(Step::Pass),
        6 => (node(), any::<usize>()).prop_map(|(node, n)| Step::Want(node, n)),
        3 => (node(), any::<usize>(), any::<bool>()).prop_map(|(node, n, done)| Step::End(node, n, done)),
        3 => (node(), any::<usize>()).prop_map(|(node, n)| Step::HelpEnds(node, n)),
        4 => (node(), any::<usize>()).prop_map(|(node, n)| Step::Stops(node, n)),
        1 => node().prop_map(Step::Cut),
        1 => node().prop_map(Step::Kill),
        1 => Just(Step::Restart),
    ]
}

struct Sim {
    world: World,
    nodes: Vec<Process>,
    jobs: Vec<JobId>,
    boots: u128,
}

impl Sim {
    fn new() -> Self {
        let mut sim = Self { world: World::new(), nodes: Vec::new(), jobs: Vec::new(), boots: 3 };
        for (name, devices) in DEVICES.into_iter().enumerate() {
            sim.nodes.push(Process::new(boot(name as u128 + 1), devices));
            sim.nodes[name].register(name);
        }
        sim
    }

    /// What the newest event sends is on its way.
    fn post(&mut self) {
        for send in std::mem::take(&mut self.world.sent) {
            if let Some(node) = self.nodes.iter_mut().find(|node| node.boot == send.boot) {
                node.down.push_back(send.message);
            }
        }
    }

    fn event(&mut self, event: Event) {
        self.world.event(event);
        self.post();
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Submit => {
                let job = self.world.submit(self.jobs.len() as u64 + 1, 0, Some("m"));
                self.post();
                self.jobs.push(job);
            }
            Step::Cancel(n) => {
                if let Some(job) = self.jobs.get(n % self.jobs.len().max(1)) {
                    self.event(Event::Cancel(*job));
                }
            }
            Step::Up(name, count) => {
                for _ in 0..count {
                    let node = &mut self.nodes[name];
                    let Some(message) = node.up.pop_front() else { break };
                    let boot = node.boot;
                    self.world.message(NAMES[name], boot, message);
                    self.post();
                }
            }
            Step::Down(name, count) => {
                for _ in 0..count {
                    let node = &mut self.nodes[name];
                    let Some(message) = node.down.pop_front() else { break };
                    node.hear(name, message);
                }
            }
            Step::Beat(name) => match self.nodes[name].joined {
                true => self.nodes[name].beat(),
                false => self.nodes[name].register(name),
            },
            Step::Pass(millis) => {
                // No message is under way for longer: a session that is silent for seconds is given up.
                for name in 0..3 {
                    self.apply(Step::Up(name, usize::MAX));
                    self.apply(Step::Down(name, usize::MAX));
                }
                let end = self.world.now + Duration::from_millis(millis);
                while self.world.now < end {
                    self.world.now = (self.world.now + Duration::from_millis(500)).min(end);
                    self.event(Event::Tick);
                }
            }
            Step::Want(name, n) => {
                let node = &mut self.nodes[name];
                // Not while it waits for its devices.
                let rendering = |key: &&AttemptKey| !node.waiting.iter().any(|(h, _)| *h == Holder::Attempt(**key));
                let keys: Vec<AttemptKey> = node.running.iter().filter(rendering).copied().collect();
                if let Some(key) = keys.get(n % keys.len().max(1))
                    && node.asked.get(key) == node.answered.get(key)
                {
                    *node.asked.entry(*key).or_insert(0) += 1;
                    node.beat();
                }
            }
            Step::End(name, n, done) => {
                let node = &mut self.nodes[name];
                let rendering = |key: &&AttemptKey| !node.waiting.iter().any(|(h, _)| *h == Holder::Attempt(**key));
                let keys: Vec<AttemptKey> = node.running.iter().filter(rendering).copied().collect();
                if let Some(key) = keys.get(n % keys.len().max(1)) {
                    node.end(*key, if done { completed(*key) } else { failed(FailureKind::NodeLost) });
                }
            }
            Step::HelpEnds(name, n) => {
                let node = &mut self.nodes[name];
                if let Some((key, device)) = node.helping.get(n % node.helping.len().max(1)).copied()
                    && !node.waiting.iter().any(|(holder, _)| *holder == Holder::Help(key, device))
                {
                    node.let_go(Holder::Help(key, device), &[]);
                }
            }
            Step::Stops(name, n) => {
                let node = &mut self.nodes[name];
                let stopping: Vec<Holder> =
                    node.devices.iter().flatten().filter(|(_, stopping)| *stopping).map(|(h, _)| *h).collect();
                if let Some(holder) = stopping.get(n % stopping.len().max(1)) {
                    node.let_go(*holder, &[]);
                }
            }
            Step::Cut(name) => {
                let node = &mut self.nodes[name];
                (node.joined, node.up, node.down) = Default::default();
                let boot = node.boot;
                node.register(name);
                self.event(Event::SessionClosed(boot));
            }
            Step::Kill(name) => {
                let old = self.nodes[name].boot;
                self.boots += 1;
                self.nodes[name] = Process::new(boot(self.boots), DEVICES[name]);
                self.nodes[name].register(name);
                self.event(Event::SessionClosed(old));
            }
            Step::Restart => {
                self.world.restart();
                for (name, node) in self.nodes.iter_mut().enumerate() {
                    (node.joined, node.up, node.down) = Default::default();
                    node.register(name);
                }
            }
        }
    }

    /// Nothing breaks any more, and everybody does what is to be done.
    fn settle(&mut self) {
        for _ in 0..60 + 4 * self.jobs.len() {
            for name in 0..3 {
                self.apply(Step::Beat(name));
                for _ in 0..3 {
                    self.apply(Step::Up(name, usize::MAX));
                    (0..3).for_each(|name| self.apply(Step::Down(name, usize::MAX)));
                }
                (0..3).for_each(|n| self.apply(Step::Stops(name, n)));
                (0..3).for_each(|n| self.apply(Step::Want(name, n)));
                // What has been answered is decoded.
                let node = &mut self.nodes[name];
                let decoded = |key: &&AttemptKey| node.answered.contains_key(*key);
                if let Some(key) = node.running.iter().find(decoded).copied() {
                    node.end(key, completed(key));
                }
                self.apply(Step::HelpEnds(name, 0));
            }
            self.apply(Step::Pass(900));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_device_is_lent_to_two_and_in_the_end_all_is_done_and_free(steps in prop::collection::vec(step(), 1..120)) {
        let mut sim = Sim::new();
        for step in steps {
            sim.apply(step);
        }
        sim.settle();
        for (job, row) in &sim.world.rows {
            prop_assert!(row.state.is_terminal(), "job {job} is {:?}", row.state);
        }
        prop_assert_eq!(sim.world.farm.sizes(), (3, 7, 7));
        prop_assert!(sim.nodes.iter().all(|node| node.devices.iter().all(Option::is_none)));
    }
}
