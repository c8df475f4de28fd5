//! A node's process: its session with the schedulers, and what it keeps on its disk. The rules are those of the node's
//! own session; what an attempt does is in `attempt`.

use std::collections::HashSet;

use farm_core::id::{AttemptKey, BootId, DeviceIndex, Epoch, NodeId};
use farm_core::wire::to_node::{HelpDecode, StartAttempt, ToNode};
use farm_core::wire::to_scheduler::{
    AttemptOutcome, AttemptReport, Crash, Helping, Registration, RunningAttempt, ToScheduler,
};
use farm_core::wire::{Envelope, StopNo};

use super::Ms;
use super::attempt::Run;
use super::hardware::{Devices, Holder, Reserve};
use super::plan::NodePlan;
use super::world::{Due, World, boot_id};

const RESEND: Ms = 3_000;
const RESEND_WISH: Ms = 1_000;
const HANDSHAKE: Ms = 10_000;
/// Without an answered heartbeat for so long, the session is given up.
const SILENCE: Ms = 10_000;
/// Without any scheduler for so long, attempts are stopped.
const CUT_OFF: Ms = 120_000;
const FIRST_REDIAL: Ms = 200;
const LAST_REDIAL: Ms = 5_000;
const REFUSED_REDIAL: Ms = 10_000;
/// Attempts and reports, and helps, that a node takes on for each of its devices.
const HELD_PER_DEVICE: usize = 8;

#[derive(Clone, Copy, Debug)]
pub enum Link {
    Waiting { until: Ms },
    Dialing,
    Registering { connection: usize, resend: Ms, until: Ms },
    Joined { connection: usize, heartbeat: Ms, answered: Ms },
}

pub struct Report {
    pub number: u64,
    pub report: AttemptReport,
    /// Of this process: it is listed until it is acknowledged.
    pub own: bool,
    pub resend: Ms,
}

pub struct Help {
    pub key: AttemptKey,
    pub device: DeviceIndex,
    pub round: u32,
    pub dismissed: bool,
}

pub struct Leaving {
    pub until: Ms,
    pub say: Ms,
}

pub struct Node {
    pub id: NodeId,
    pub plan: NodePlan,
    pub up: bool,
    pub boots: u32,
    pub boot: BootId,
    pub skewed: bool,
    /// SIGSTOP: until then.
    pub frozen: Ms,
    /// Until then nothing goes from it, or comes to it.
    pub cut_up: Ms,
    pub cut_down: Ms,
    pub disk_full: Ms,
    pub link: Link,
    pub target: usize,
    redial: Ms,
    pub epoch: u64,
    /// Messages sent by this process.
    pub seq: u64,
    pub running: Vec<Run>,
    pub helps: Vec<Help>,
    pub heard: StopNo,
    pub reports: Vec<Report>,
    last_report: u64,
    /// What survives the process.
    disk: Vec<(u64, AttemptReport)>,
    crash: Option<Crash>,
    ended: HashSet<AttemptKey>,
    helped: Vec<(AttemptKey, DeviceIndex, u32)>,
    pub cut_off: Option<Ms>,
    pub leaving: Option<Leaving>,
    pub devices: Devices,
    pub wake_serial: u64,
    wake_at: Ms,
}

impl Node {
    pub fn new(index: usize, plan: NodePlan) -> Self {
        let devices = plan.registration.devices.len();
        Self {
            id: NodeId(format!("n{index}")),
            skewed: plan.skewed,
            plan,
            up: false,
            boots: 0,
            boot: boot_id(index, 0),
            frozen: 0,
            cut_up: 0,
            cut_down: 0,
            disk_full: 0,
            link: Link::Waiting { until: 0 },
            target: index,
            redial: FIRST_REDIAL,
            epoch: 0,
            seq: 0,
            running: Vec::new(),
            helps: Vec::new(),
            heard: StopNo::default(),
            reports: Vec::new(),
            last_report: 0,
            disk: Vec::new(),
            crash: None,
            ended: HashSet::new(),
            helped: Vec::new(),
            cut_off: None,
            leaving: None,
            devices: Devices::new(devices),
            wake_serial: 0,
            wake_at: Ms::MAX,
        }
    }

    /// Its process is the one of that number.
    pub fn is(&self, boots: u32) -> bool {
        self.up && self.boots == boots
    }

    pub fn connection(&self) -> Option<usize> {
        match self.link {
            Link::Registering { connection, .. } | Link::Joined { connection, .. } => Some(connection),
            Link::Waiting { .. } | Link::Dialing => None,
        }
    }

    pub fn run(&mut self, key: AttemptKey) -> Option<&mut Run> {
        self.running.iter_mut().find(|run| run.key == key)
    }

    /// All that it lists.
    fn listed(&self, now: Ms) -> (Vec<RunningAttempt>, Vec<Helping>) {
        let running = self.running.iter().map(|run| run.listed(now));
        let reported = self.reports.iter().filter(|report| report.own).map(|report| Run::reported(report.report.key));
        let helping = self.helps.iter().map(|help| Helping { key: help.key, device: help.device });
        (running.chain(reported).collect(), helping.collect())
    }

    fn limit(&self) -> usize {
        HELD_PER_DEVICE * self.devices.holds.len()
    }

    pub fn remember(&mut self, key: AttemptKey) {
        self.ended.insert(key);
    }

    fn joined(&self) -> bool {
        matches!(self.link, Link::Joined { .. })
    }
}

impl World {
    /// A new process.
    pub fn boot(&mut self, n: usize) {
        let now = self.now;
        let node = &mut self.nodes[n];
        node.boots += 1;
        node.boot = boot_id(n, node.boots);
        node.up = true;
        (node.epoch, node.seq, node.redial) = (0, 0, FIRST_REDIAL);
        node.link = Link::Waiting { until: now };
        node.cut_off = Some(now);
        let own = false;
        node.reports = node
            .disk
            .iter()
            .map(|(number, report)| Report { number: *number, report: report.clone(), own, resend: now })
            .collect();
        node.last_report = node.disk.iter().map(|(number, _)| *number).max().unwrap_or(0);
        let boots = node.boots;
        self.note(|| format!("node n{n} begins as process {boots}"));
        self.wake_in(n, 0);
    }

    /// The process is gone; what it held is idle. `fault` is what its disk says of it, if anything.
    pub fn kill_node(&mut self, n: usize, fault: Option<bool>, down: Ms) {
        if !self.nodes[n].up {
            return;
        }
        self.note(|| format!("node n{n} dies"));
        self.mix(&[3, n as u64]);
        self.hang_up(n);
        let keys: Vec<AttemptKey> = self.nodes[n].running.iter().map(|run| run.key).collect();
        for key in &keys {
            self.checkpoint(n, *key);
            self.decode_over(*key);
        }
        for truth in self.truth.values_mut().filter(|truth| truth.helpers.iter().any(|(node, ..)| *node == n)) {
            truth.disturbed = true;
        }
        let node = &mut self.nodes[n];
        if let Some(own_fault) = fault
            && !keys.is_empty()
        {
            node.crash = Some(Crash { attempts: keys, cause: "signal 9".to_owned(), own_fault });
        }
        node.up = false;
        (node.frozen, node.leaving, node.cut_off) = (0, None, None);
        node.running.clear();
        node.helps.clear();
        node.heard = StopNo::default();
        node.reports.clear();
        node.ended.clear();
        node.helped.clear();
        node.devices.clear();
        node.link = Link::Waiting { until: 0 };
        let boots = node.boots;
        self.after(down, Due::NodeUp { node: n, boots });
    }

    /// It stops by itself, in good order, and somebody starts it again.
    pub fn leave_for_good(&mut self, n: usize) {
        let down = self.random.between(500, 20_000);
        self.kill_node(n, None, down);
    }

    pub fn wake_in(&mut self, n: usize, delay: Ms) {
        let at = self.now + delay;
        let node = &mut self.nodes[n];
        node.wake_serial += 1;
        node.wake_at = at;
        let (boots, serial) = (node.boots, node.wake_serial);
        self.at(at, Due::Wake { node: n, boots, serial });
    }

    /// Sees to it that the node looks at what is due by then.
    pub fn wake_by(&mut self, n: usize, at: Ms) {
        if at < self.nodes[n].wake_at || self.nodes[n].wake_at <= self.now {
            self.wake_in(n, at.saturating_sub(self.now));
        }
    }

    /// Whatever is due by now.
    pub fn wake(&mut self, n: usize) {
        let now = self.now;
        self.nodes[n].wake_at = now;
        self.part(n);
        if !self.nodes[n].up {
            return;
        }
        let interval = self.plan.limits.heartbeat.as_millis() as Ms;
        match self.nodes[n].link {
            Link::Waiting { until } if now >= until => self.dial(n),
            Link::Registering { until, .. } if now >= until => {
                self.hang_up(n);
                self.lose_link(n);
            }
            Link::Registering { connection, resend, until } if now >= resend => {
                self.nodes[n].link = Link::Registering { connection, resend: now + RESEND, until };
                self.say_registration(n);
            }
            Link::Joined { answered, .. } if now >= answered + SILENCE => {
                self.count("session given up by its node");
                self.hang_up(n);
                self.lose_link(n);
            }
            Link::Joined { connection, heartbeat, answered } => {
                self.say_what_is_due(n);
                if now >= heartbeat {
                    self.nodes[n].link = Link::Joined { connection, heartbeat: now + interval, answered };
                    let (running, helping) = self.nodes[n].listed(now);
                    let heard = self.nodes[n].heard;
                    self.send_up(n, ToScheduler::Heartbeat { running, helping, heard });
                }
            }
            _ => {}
        }
        if self.nodes[n].cut_off.is_some_and(|since| now >= since + CUT_OFF) {
            self.stop_everything(n);
        }
        let next = self.next_wake(n);
        self.wake_in(n, next.max(now + 1) - now);
    }

    fn next_wake(&self, n: usize) -> Ms {
        let node = &self.nodes[n];
        let mut next = match node.link {
            Link::Waiting { until } => until,
            Link::Dialing => self.now + 6_000,
            Link::Registering { resend, until, .. } => resend.min(until),
            Link::Joined { heartbeat, answered, .. } => {
                let reports = node.reports.iter().map(|report| report.resend);
                let wishes = node.running.iter().filter_map(|run| run.wish.as_ref()).map(|wish| wish.resend);
                reports.chain(wishes).fold(heartbeat.min(answered + SILENCE), Ms::min)
            }
        };
        if let Some(since) = node.cut_off
            && !(node.running.is_empty() && node.helps.is_empty())
        {
            next = next.min(since + CUT_OFF);
        }
        if let Some(leaving) = &node.leaving {
            next = next.min(leaving.until).min(leaving.say.max(self.now + 200));
        }
        next
    }

    /// Reports and wishes that are not answered.
    fn say_what_is_due(&mut self, n: usize) {
        let now = self.now;
        let mut said = Vec::new();
        let node = &mut self.nodes[n];
        for report in node.reports.iter_mut().filter(|report| now >= report.resend) {
            report.resend = now + RESEND;
            said.push(ToScheduler::Report { number: report.number, report: report.report.clone() });
        }
        for run in &mut node.running {
            let key = run.key;
            let Some(wish) = run.wish.as_mut().filter(|wish| now >= wish.resend) else { continue };
            wish.resend = now + RESEND_WISH;
            let (url, token) = ("http://n".to_owned(), "t".to_owned());
            said.push(ToScheduler::WantHands { key, round: wish.round, tiles: wish.tiles, url, token });
        }
        said.into_iter().for_each(|body| self.send_up(n, body));
    }

    /// The farewell of a node that leaves.
    fn part(&mut self, n: usize) {
        let now = self.now;
        let node = &mut self.nodes[n];
        let joined = node.joined();
        let Some(leaving) = &mut node.leaving else { return };
        let say = joined && now >= leaving.say;
        if say {
            leaving.say = now + 1_000;
        }
        let over = now >= leaving.until;
        if say {
            self.send_up(n, ToScheduler::Leaving { reason: "spot notice".to_owned() });
        }
        let node = &self.nodes[n];
        if over || (node.running.is_empty() && node.reports.is_empty()) {
            self.leave_for_good(n);
        }
    }

    pub fn notice(&mut self, n: usize, patience: Ms) {
        if !self.nodes[n].up || self.nodes[n].leaving.is_some() {
            return;
        }
        self.nodes[n].leaving = Some(Leaving { until: self.now + patience, say: self.now });
        let keys: Vec<AttemptKey> = self.nodes[n].running.iter().map(|run| run.key).collect();
        keys.into_iter().for_each(|key| self.hand_over(n, key));
        let helps: Vec<_> = self.nodes[n].helps.iter().map(|help| (help.key, help.device)).collect();
        helps.into_iter().for_each(|(key, device)| self.dismiss(n, key, device));
        self.wake_by(n, self.now);
    }

    /// No scheduler for too long: nobody is told.
    fn stop_everything(&mut self, n: usize) {
        if self.nodes[n].running.is_empty() && self.nodes[n].helps.is_empty() {
            return;
        }
        self.count("node cut off stops its attempts");
        let keys: Vec<AttemptKey> = self.nodes[n].running.iter().map(|run| run.key).collect();
        keys.into_iter().for_each(|key| self.abort(n, key));
        let helps: Vec<_> = self.nodes[n].helps.iter().map(|help| (help.key, help.device)).collect();
        helps.into_iter().for_each(|(key, device)| self.dismiss(n, key, device));
    }

    pub fn register(&mut self, n: usize, connection: usize) {
        let now = self.now;
        self.nodes[n].link = Link::Registering { connection, resend: now + RESEND, until: now + HANDSHAKE };
        self.say_registration(n);
        self.wake_in(n, RESEND);
    }

    fn say_registration(&mut self, n: usize) {
        let node = &self.nodes[n];
        let (running, helping) = node.listed(self.now);
        let (crash, heard) = (node.crash.clone(), node.heard);
        let registration = Registration { running, helping, heard, crash, ..(*node.plan.registration).clone() };
        self.send_up(n, ToScheduler::Register(registration));
    }

    pub fn lose_link(&mut self, n: usize) {
        self.nodes[n].cut_off.get_or_insert(self.now);
        self.nodes[n].target += 1;
        self.redial(n);
    }

    pub fn redial(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        let wait = node.redial;
        node.redial = (2 * wait).min(LAST_REDIAL);
        let wait = self.random.between(wait / 2, wait);
        self.nodes[n].link = Link::Waiting { until: self.now + wait };
        self.wake_in(n, wait);
    }

    pub fn hear(&mut self, n: usize, envelope: Envelope<ToNode>) {
        let now = self.now;
        if envelope.epoch.0 < self.nodes[n].epoch {
            return self.count("command of an earlier epoch refused");
        }
        match envelope.body {
            ToNode::Welcome { .. } => self.welcome(n, envelope.epoch),
            ToNode::Refused { reason } => {
                if self.nodes[n].connection().is_some() {
                    self.note(|| format!("n{n} is refused: {reason}"));
                    self.hang_up(n);
                    self.nodes[n].cut_off.get_or_insert(now);
                    self.nodes[n].link = Link::Waiting { until: now + REFUSED_REDIAL };
                    self.wake_in(n, REFUSED_REDIAL);
                }
            }
            ToNode::Reregister => {
                if let Some(connection) = self.nodes[n].connection() {
                    self.nodes[n].cut_off.get_or_insert(now);
                    self.register(n, connection);
                }
            }
            ToNode::HeartbeatSeen => {
                if let Link::Joined { answered, .. } = &mut self.nodes[n].link {
                    *answered = now;
                }
            }
            ToNode::Start(start) => self.start(n, *start),
            ToNode::Abort { key, stop, reason } => {
                self.nodes[n].heard = self.nodes[n].heard.max(stop);
                self.note(|| format!("n{n} is to stop {key}: {reason}"));
                self.abort(n, key);
            }
            ToNode::Yield { key, .. } => {
                if self.nodes[n].plan.knows_yield {
                    self.hand_over(n, key);
                }
            }
            ToNode::Hands { key, round, keep, helpers } => self.hands(n, key, round, keep, helpers),
            ToNode::Help(help) => self.help(n, *help),
            ToNode::Dismiss { key, device, stop } => {
                self.nodes[n].heard = self.nodes[n].heard.max(stop);
                self.dismiss(n, key, device);
            }
            ToNode::Acknowledged { report } => {
                self.nodes[n].reports.retain(|known| known.number != report);
                self.nodes[n].disk.retain(|(number, _)| *number != report);
            }
        }
    }

    fn welcome(&mut self, n: usize, epoch: Epoch) {
        let now = self.now;
        let node = &mut self.nodes[n];
        let Link::Registering { connection, .. } = node.link else { return };
        node.epoch = epoch.0;
        node.redial = FIRST_REDIAL;
        (node.cut_off, node.crash) = (None, None);
        node.link = Link::Joined { connection, heartbeat: now, answered: now };
        node.reports.iter_mut().for_each(|report| report.resend = now);
        node.running.iter_mut().filter_map(|run| run.wish.as_mut()).for_each(|wish| wish.resend = now);
        if let Some(leaving) = &mut node.leaving {
            leaving.say = now;
        }
        self.wake_in(n, 0);
    }

    fn start(&mut self, n: usize, start: StartAttempt) {
        let (key, now) = (start.key, self.now);
        if !self.store.knows_attempt(&key) {
            return self.fail("I9", format!("node n{n} is told to start {key}, which is not committed"));
        }
        let node = &mut self.nodes[n];
        if let Some(report) = node.reports.iter_mut().find(|report| report.report.key == key) {
            report.resend = now;
            return self.wake_by(n, now);
        }
        let known = node.running.iter().any(|run| run.key == key) || node.ended.contains(&key);
        let full = node.running.len() + node.reports.len() >= node.limit();
        if known || full || !node.joined() {
            return;
        }
        if node.leaving.is_some() {
            let run = Run::new(start, now);
            self.nodes[n].running.push(run);
            return self.end(n, key, AttemptOutcome::Interrupted { step: 0 });
        }
        self.begin(n, start);
    }

    /// The attempt is of no interest any more: nothing is reported for it.
    pub fn abort(&mut self, n: usize, key: AttemptKey) {
        self.checkpoint(n, key);
        let node = &mut self.nodes[n];
        node.reports.retain(|report| report.report.key != key);
        node.disk.retain(|(_, report)| report.key != key);
        node.remember(key);
        let Some(at) = node.running.iter().position(|run| run.key == key) else { return };
        let run = node.running.swap_remove(at);
        self.decode_over(key);
        let takes = if run.hangs { self.random.between(2_000, 15_000) } else { self.random.between(10, 2_000) };
        self.stop_holder(n, Holder::Attempt(key), takes);
    }

    /// The holder is told to stop; its devices are idle after a while.
    pub fn stop_holder(&mut self, n: usize, holder: Holder, takes: Ms) {
        if self.nodes[n].devices.stop(holder) {
            return self.help_ended(n, holder);
        }
        let boots = self.nodes[n].boots;
        self.after(takes, Due::Stopped { node: n, boots, holder });
    }

    /// Its end, for the scheduler.
    pub fn end(&mut self, n: usize, key: AttemptKey, outcome: AttemptOutcome) {
        let now = self.now;
        let Some(at) = self.nodes[n].running.iter().position(|run| run.key == key) else { return };
        self.nodes[n].running.swap_remove(at);
        self.note(|| format!("n{n} ends {key}: {}", outcome_text(&outcome)));
        self.mix(&[4, n as u64, key.job.0.as_u128() as u64, key.attempt.0.into()]);
        self.decode_over(key);
        self.let_go(n, Holder::Attempt(key), &[]);
        let node = &mut self.nodes[n];
        node.remember(key);
        node.last_report += 1;
        let (number, report) = (node.last_report, AttemptReport { key, outcome });
        if node.disk_full <= now {
            node.disk.push((number, report.clone()));
        } else {
            self.count("report not on disk");
        }
        self.nodes[n].reports.push(Report { number, report, own: true, resend: now });
        self.beat_now(n);
    }

    /// A heartbeat is due now.
    pub fn beat_now(&mut self, n: usize) {
        let now = self.now;
        if let Link::Joined { heartbeat, .. } = &mut self.nodes[n].link {
            *heartbeat = now;
        }
        self.wake_by(n, now);
    }

    fn help(&mut self, n: usize, help: HelpDecode) {
        let HelpDecode { key, device, round, .. } = help;
        let node = &self.nodes[n];
        let known = node.helps.iter().any(|help| help.key == key && help.device == device);
        let over = node.helped.iter().any(|(k, d, r)| *k == key && *d == device && *r >= round);
        if known || over || !node.joined() || node.leaving.is_some() || node.helps.len() >= node.limit() {
            return;
        }
        self.note(|| format!("n{n} is to help {key} with {device}, round {round}"));
        self.nodes[n].helps.push(Help { key, device, round, dismissed: false });
        let late = self.is_late(&key);
        match self.nodes[n].devices.reserve(Holder::Help(key, device), &[device], late, self.now) {
            Reserve::Granted => self.helper_begins(n, key, device),
            Reserve::Queued => {}
            Reserve::Busy(excused) => {
                self.collision(n, key, &[device], excused);
                self.help_ended(n, Holder::Help(key, device));
            }
        }
        self.beat_now(n);
    }

    pub fn dismiss(&mut self, n: usize, key: AttemptKey, device: DeviceIndex) {
        let help = self.nodes[n].helps.iter_mut().find(|help| help.key == key && help.device == device);
        let Some(help) = help.filter(|help| !help.dismissed) else { return };
        help.dismissed = true;
        self.note(|| format!("n{n} is to stop helping {key} with {device}"));
        let holder = Holder::Help(key, device);
        let takes = self.random.between(10, 1_000);
        self.stop_holder(n, holder, takes);
    }

    pub fn help_ended(&mut self, n: usize, holder: Holder) {
        let Holder::Help(key, device) = holder else { return };
        let node = &mut self.nodes[n];
        let Some(at) = node.helps.iter().position(|help| help.key == key && help.device == device) else { return };
        let help = node.helps.swap_remove(at);
        self.note(|| format!("n{n} has stopped helping {key} with {device}"));
        let node = &mut self.nodes[n];
        node.helped.push((key, device, help.round));
        self.beat_now(n);
    }

    /// The scheduler had given it up before the command came.
    pub fn is_late(&self, key: &AttemptKey) -> bool {
        self.schedulers
            .iter()
            .filter_map(|scheduler| scheduler.lead.as_ref())
            .all(|lead| lead.farm.owner(key).is_none())
    }

    /// A device is given to two at once.
    pub fn collision(&mut self, n: usize, key: AttemptKey, devices: &[DeviceIndex], excused: bool) {
        if excused {
            return self.count("late command met a busy device");
        }
        let holds: Vec<String> =
            devices.iter().map(|device| format!("{:?}", self.nodes[n].devices.holds.get(device.0 as usize))).collect();
        let (holds, waiting) = (holds.join(", "), self.nodes[n].devices.waiting());
        self.fail("I1", format!("node n{n} is to give devices {devices:?} to {key}; they have {holds}; {waiting}"));
    }
}

pub fn outcome_text(outcome: &AttemptOutcome) -> String {
    match outcome {
        AttemptOutcome::Completed { accepted, .. } => format!("completed, accepted {accepted}"),
        AttemptOutcome::Interrupted { step } => format!("interrupted at step {step}"),
        AttemptOutcome::Failed { kind, .. } => format!("failed by {}", kind.as_str()),
    }
}
