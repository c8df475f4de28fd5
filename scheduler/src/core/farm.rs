//! The state of the farm and the one way to change it ([`Farm::step`]).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use farm_core::id::{AttemptKey, AttemptNo, BootId, DeviceIndex, Epoch, JobId, NodeId};
use farm_core::job::spec::GenerationDefaults;
use farm_core::job::state::{FailureKind, Progress};
use farm_core::parallel::cost::{ModelShape, Site};
use farm_core::tiles::plan::Tiling;
use farm_core::wire::to_node::{HelpDecode, StartAttempt, ToNode};
use farm_core::wire::to_scheduler::{DeviceInfo, Roles, ToScheduler};

use super::effects::{Change, Effects, Outcome};
use super::events::{Clip, Event, LiveJob, LoadedRequest, Time};
use super::forecast::Forecasts;
use super::help::Want;

/// Spans and counts that the rules use. The defaults are the product's; tests use smaller ones.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How often a node is asked to report.
    pub heartbeat: Duration,
    /// A node not heard of for this long gets no new work and does not defend its name.
    pub silent: Duration,
    /// A node not heard of for this long is lost, even though its session stands: nothing else notices a frozen
    /// process or a cut link.
    pub node_ttl: Duration,
    /// A node whose session ended has this long to come back in another.
    pub closed_ttl: Duration,
    /// After a start, how long running attempts of nodes that have not come back yet are left alone.
    pub window: Duration,
    /// How long a node may leave out an attempt that it had confirmed: its report may be on the way.
    pub unlisted: Duration,
    /// How long a started attempt may stay unconfirmed by a node that is alive.
    pub start: Duration,
    /// A tick this late means that this process stood still; the silence of that span is not the nodes'.
    pub pause: Duration,
    /// Attempts that a device or the store may fail before the job fails.
    pub failures: u32,
    /// Attempts that may end with their node before the job fails: it may be the job that kills them.
    pub losses: u32,
    /// Wait after the first failure; doubles with each.
    pub backoff: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(1),
            silent: Duration::from_secs(4),
            node_ttl: Duration::from_secs(15),
            closed_ttl: Duration::from_secs(5),
            window: Duration::from_secs(10),
            unlisted: Duration::from_secs(8),
            start: Duration::from_secs(30),
            pause: Duration::from_secs(2),
            failures: 3,
            losses: 10,
            backoff: Duration::from_secs(2),
        }
    }
}

/// A place in the queue: higher priority first, then earlier submission.
pub(super) type Rank = (Reverse<i32>, u64, JobId);

#[derive(Clone, Debug)]
pub(super) struct Job {
    pub seq: u64,
    pub priority: i32,
    pub model: Option<Arc<str>>,
    pub attempt: AttemptNo,
    pub failures: u32,
    pub losses: u32,
    pub phase: Phase,
}

#[derive(Clone, Debug)]
pub(super) enum Phase {
    Waiting,
    /// Waiting for a moment after a failure.
    Delayed {
        until: Time,
        cause: Box<str>,
    },
    Running(Box<Lease>),
}

/// Devices lent to an attempt.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub key: AttemptKey,
    pub node: NodeId,
    pub boot: BootId,
    /// The gang, all of one node and taken together; by and by without those that the attempt has given back. None are
    /// left while the clip is uploaded.
    pub devices: Vec<DeviceIndex>,
    pub clip: Clip,
    pub confirmation: Confirmation,
    pub progress: Option<Progress>,
    /// The newest answer to its wish for devices that decode.
    pub hands: Option<Hands>,
}

#[derive(Clone, Debug)]
pub(super) struct Hands {
    pub round: u32,
    pub keep: Vec<DeviceIndex>,
    pub helpers: u32,
}

#[derive(Clone, Debug)]
pub(super) enum Confirmation {
    /// The node has not listed the attempt yet; the command is repeated.
    Awaited { since: Time, start: Box<StartAttempt> },
    /// The node lists the attempt, or is expected to: an attempt from before this scheduler started.
    Listed,
    /// The node listed the attempt once and has stopped doing so.
    Unlisted { since: Time },
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub boot: BootId,
    pub version: String,
    pub devices: Vec<Device>,
    /// Without it nothing is predicted, and a clip gets one device.
    pub site: Option<Site>,
    pub models: BTreeMap<Arc<str>, NodeModel>,
    pub roles: Roles,
    /// Jobs whose attempts it runs, with devices or without.
    pub leases: BTreeSet<JobId>,
    pub last_seen: Time,
    pub session_closed: Option<Time>,
    /// Number of the newest heartbeat or registration: older ones that come late say nothing.
    pub heartbeat: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Device {
    pub name: String,
    pub slot: Slot,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Slot {
    Free,
    Leased(JobId),
    /// Decodes tiles of an attempt's clip; free once a heartbeat does not list that any more. Only here, never a row.
    Helping(Box<Help>),
    /// Told to stop; free once a heartbeat does not list the attempt any more.
    Stopping(AttemptKey),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Help {
    pub key: AttemptKey,
    /// The command, and when it was given, until the node lists the help.
    pub awaited: Option<(Time, HelpDecode)>,
}

#[derive(Clone, Debug)]
pub(super) struct NodeModel {
    pub hash: String,
    pub defaults: GenerationDefaults,
    pub shape: ModelShape,
}

/// Messages that changed nothing, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reports on attempts that were not running any more.
    pub stale_reports: u64,
    /// Commands to stop attempts that nobody had leased.
    pub strays_aborted: u64,
    /// Commands to stop help for attempts that nobody runs, or that nobody has asked for.
    pub strays_dismissed: u64,
}

pub struct Farm {
    pub(super) limits: Limits,
    pub(super) epoch: Epoch,
    /// Where results go; nodes have to agree.
    pub(super) store: String,
    /// How clips are decoded.
    pub(super) tiling: Tiling,
    /// Queued and running jobs.
    pub(super) jobs: HashMap<JobId, Job>,
    /// Waiting jobs by the model they name.
    pub(super) queues: BTreeMap<Option<Arc<str>>, BTreeSet<Rank>>,
    /// Delayed jobs by the moment they may go on.
    pub(super) delayed: BTreeSet<(Time, JobId)>,
    pub(super) nodes: BTreeMap<NodeId, Node>,
    pub(super) boots: HashMap<BootId, NodeId>,
    /// Running jobs of nodes that have not come back since this scheduler started.
    pub(super) orphans: BTreeSet<JobId>,
    pub(super) window_ends: Time,
    pub(super) loaded: HashMap<JobId, LoadedRequest>,
    /// Jobs that could not start for want of devices of one node, and how many they need.
    pub(super) short: BTreeMap<JobId, usize>,
    pub(super) forecasts: Forecasts,
    pub(super) now: Time,
    pub(super) last_tick: Time,
    /// Something changed that may let a queued job start.
    pub(super) replan: bool,
    pub(super) counters: Counters,
}

impl Farm {
    /// The farm as the queue store left it. `epoch` is this reign's; `store` is the normalised URL for results.
    pub fn restore(
        limits: Limits,
        epoch: Epoch,
        store: String,
        tiling: Tiling,
        live: impl IntoIterator<Item = LiveJob>,
        now: Time,
    ) -> Self {
        let mut farm = Self {
            window_ends: now + limits.window,
            limits,
            epoch,
            store,
            tiling,
            jobs: HashMap::new(),
            queues: BTreeMap::new(),
            delayed: BTreeSet::new(),
            nodes: BTreeMap::new(),
            boots: HashMap::new(),
            orphans: BTreeSet::new(),
            loaded: HashMap::new(),
            short: BTreeMap::new(),
            forecasts: Forecasts::default(),
            now,
            last_tick: now,
            replan: true,
            counters: Counters::default(),
        };
        for job in live {
            farm.admit_job(job);
        }
        farm
    }

    /// Applies one event. `now` may run backwards a little between callers; the farm's own time does not.
    pub fn step(&mut self, event: Event, now: Time) -> Effects {
        self.now = self.now.max(now);
        let mut fx = Effects::default();
        match event {
            Event::FromNode(envelope) => self.on_message(*envelope, &mut fx),
            Event::SessionClosed(boot) => self.on_session_closed(boot, &mut fx),
            Event::Submitted(jobs) => jobs.into_iter().for_each(|job| self.admit_job(job)),
            Event::Cancel(job) => self.on_cancel(job, &mut fx),
            Event::Retry(job) => self.on_retry(job, &mut fx),
            Event::Loaded(requests) => self.on_loaded(requests),
            Event::Tick => self.on_tick(&mut fx),
        }
        if self.replan {
            self.replan = false;
            self.place(&mut fx);
        }
        fx
    }

    fn on_message(&mut self, envelope: farm_core::wire::Envelope<ToScheduler>, fx: &mut Effects) {
        let farm_core::wire::Envelope { node, boot, seq, body, .. } = envelope;
        let registration = match body {
            ToScheduler::Register(registration) => return self.on_register(node, boot, seq, registration, fx),
            other => other,
        };
        let Some(known) = self.nodes.get_mut(&node).filter(|known| known.boot == boot) else {
            // Its state here is gone: this scheduler restarted or gave the node up. Reports stay in the outbox.
            return fx.send(&node, boot, ToNode::Reregister);
        };
        if self.now.since(known.last_seen) >= self.limits.silent || known.session_closed.is_some() {
            self.replan = true;
        }
        known.last_seen = self.now;
        known.session_closed = None;
        match registration {
            ToScheduler::Register(_) => {}
            ToScheduler::WantHands { key, round, tiles, url, token } => {
                self.on_want_hands(&node, boot, Want { key, round, tiles, url, token }, fx);
            }
            ToScheduler::Heartbeat { running, helping } => {
                fx.send(&node, boot, ToNode::HeartbeatSeen);
                self.on_listed(&node, seq, running, &helping, fx);
            }
            ToScheduler::Report { number, report } => self.on_report(&node, boot, number, report, fx),
            ToScheduler::Log { key, line } => {
                if self.lease(&key).is_some_and(|lease| lease.node == node) {
                    fx.log(key.job, Some(key.attempt), shortened(line));
                }
            }
        }
    }

    fn on_session_closed(&mut self, boot: BootId, fx: &mut Effects) {
        let now = self.now;
        if let Some(id) = self.boots.get(&boot)
            && let Some(node) = self.nodes.get_mut(id)
        {
            node.session_closed.get_or_insert(now);
            fx.note(format!("node {id}: session closed"));
        }
    }

    fn on_tick(&mut self, fx: &mut Effects) {
        self.forgive_own_pause();
        self.last_tick = self.now;
        while let Some(&(until, job)) = self.delayed.first()
            && until <= self.now
        {
            self.delayed.pop_first();
            self.wait(job);
        }
        let lost: Vec<(NodeId, String)> =
            self.nodes.iter().filter_map(|(id, node)| Some((id.clone(), self.why_lost(node)?))).collect();
        for (id, why) in lost {
            self.lose_node(&id, &why, fx);
        }
        if self.now >= self.window_ends {
            for job in std::mem::take(&mut self.orphans) {
                self.lose_lease(job, "did not come back after the scheduler's restart", fx);
            }
        }
    }

    /// If this process stood still, nobody was silent: all clocks that count silence are moved on by that span.
    fn forgive_own_pause(&mut self) {
        let gap = self.now.since(self.last_tick);
        if gap < self.limits.pause {
            return;
        }
        for node in self.nodes.values_mut() {
            node.last_seen = (node.last_seen + gap).min(self.now);
            node.session_closed = node.session_closed.map(|closed| (closed + gap).min(self.now));
            for device in &mut node.devices {
                if let Slot::Helping(help) = &mut device.slot
                    && let Some((since, _)) = &mut help.awaited
                {
                    *since = (*since + gap).min(self.now);
                }
            }
        }
        for job in self.jobs.values_mut() {
            if let Phase::Running(lease) = &mut job.phase
                && let Confirmation::Awaited { since, .. } | Confirmation::Unlisted { since } = &mut lease.confirmation
            {
                *since = (*since + gap).min(self.now);
            }
        }
        self.window_ends = self.window_ends + gap;
    }

    fn why_lost(&self, node: &Node) -> Option<String> {
        let silence = self.now.since(node.last_seen);
        if silence >= self.limits.node_ttl {
            return Some(format!("was silent for {} s", silence.as_secs()));
        }
        let closed = self.now.since(node.session_closed?);
        (closed >= self.limits.closed_ttl).then(|| format!("left {} s ago", closed.as_secs()))
    }

    fn on_cancel(&mut self, id: JobId, fx: &mut Effects) {
        let Some(job) = self.jobs.get(&id) else { return };
        if let Phase::Running(lease) = &job.phase {
            let (key, node, boot) = (lease.key, lease.node.clone(), lease.boot);
            let reason = "cancelled".to_owned();
            fx.changes.push(Change::AttemptEnded { key, outcome: Outcome::Aborted, message: Some(reason.clone()) });
            fx.send(&node, boot, ToNode::Abort { key, reason });
            self.release(id, Slot::Stopping(key), fx);
        }
        self.forget(id);
        fx.changes.push(Change::Cancelled { job: id });
        fx.log(id, None, "cancelled");
    }

    fn on_retry(&mut self, job: LiveJob, fx: &mut Effects) {
        if self.jobs.contains_key(&job.job) {
            return;
        }
        fx.changes.push(Change::Retried { job: job.job });
        fx.log(job.job, None, "queued again by a user");
        self.admit_job(LiveJob { failures: 0, losses: 0, running: None, ..job });
    }

    fn on_loaded(&mut self, requests: Vec<LoadedRequest>) {
        self.replan |= !requests.is_empty();
        self.loaded.extend(requests.into_iter().map(|request| (request.job, request)));
    }

    /// A job from the store, queued or running.
    fn admit_job(&mut self, live: LiveJob) {
        let id = live.job;
        let job = Job {
            seq: live.seq,
            priority: live.priority,
            model: live.model.map(|name| self.intern(name)),
            attempt: live.attempt,
            failures: live.failures,
            losses: live.losses,
            phase: Phase::Waiting,
        };
        if self.jobs.contains_key(&id) {
            return;
        }
        self.jobs.insert(id, job);
        match live.running {
            None => self.wait(id),
            Some(attempt) => {
                let lease = Lease {
                    key: attempt.key,
                    node: attempt.node,
                    boot: attempt.boot,
                    devices: attempt.devices,
                    clip: attempt.clip,
                    confirmation: Confirmation::Listed,
                    progress: None,
                    hands: None,
                };
                if let Some(job) = self.jobs.get_mut(&id) {
                    job.phase = Phase::Running(Box::new(lease));
                }
                self.orphans.insert(id);
            }
        }
    }

    /// One copy of each model name for all the jobs that name it.
    fn intern(&self, name: String) -> Arc<str> {
        let name: Arc<str> = name.into();
        match self.queues.get_key_value(&Some(name.clone())) {
            Some((Some(known), _)) => known.clone(),
            _ => name,
        }
    }

    /// Puts a job in the queue.
    pub(super) fn wait(&mut self, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.phase = Phase::Waiting;
        let rank = (Reverse(job.priority), job.seq, id);
        self.queues.entry(job.model.clone()).or_default().insert(rank);
        self.replan = true;
    }

    /// Takes a job out of the queue, if it is there.
    pub(super) fn unqueue(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        match job.phase {
            Phase::Waiting => {
                let rank = (Reverse(job.priority), job.seq, id);
                if let Some(queue) = self.queues.get_mut(&job.model) {
                    queue.remove(&rank);
                    if queue.is_empty() {
                        self.queues.remove(&job.model);
                    }
                }
            }
            Phase::Delayed { until, .. } => {
                self.delayed.remove(&(until, id));
            }
            Phase::Running(_) => {}
        }
    }

    /// Drops a job that is neither queued nor running any more.
    pub(super) fn forget(&mut self, id: JobId) {
        self.unqueue(id);
        self.orphans.remove(&id);
        self.jobs.remove(&id);
    }

    /// The lease of exactly this attempt.
    pub(super) fn lease(&self, key: &AttemptKey) -> Option<&Lease> {
        match &self.jobs.get(&key.job)?.phase {
            Phase::Running(lease) if lease.key == *key => Some(lease),
            _ => None,
        }
    }

    pub(super) fn lease_mut(&mut self, key: &AttemptKey) -> Option<&mut Lease> {
        match &mut self.jobs.get_mut(&key.job)?.phase {
            Phase::Running(lease) if lease.key == *key => Some(lease),
            _ => None,
        }
    }

    /// Ends a running job's lease: `slot` is what its devices become, and who helps is told to stop.
    pub(super) fn release(&mut self, id: JobId, slot: Slot, fx: &mut Effects) {
        let Some(Job { phase: Phase::Running(lease), .. }) = self.jobs.get(&id) else { return };
        let key = lease.key;
        if let Some(node) = self.nodes.get_mut(&lease.node) {
            node.leases.remove(&id);
            for device in node.devices.iter_mut().filter(|device| device.slot == Slot::Leased(id)) {
                device.slot = slot.clone();
            }
        }
        self.replan = true;
        self.dismiss_helpers(key, fx);
    }

    /// The attempt of a running job ended with its node.
    pub(super) fn lose_lease(&mut self, id: JobId, why: &str, fx: &mut Effects) {
        let Some(Job { phase: Phase::Running(lease), .. }) = self.jobs.get(&id) else { return };
        let (key, message) = (lease.key, format!("node {} {why}", lease.node));
        self.fail_attempt(key, FailureKind::NodeLost, message, fx);
    }

    /// A node is gone, and with it all that it ran.
    pub(super) fn lose_node(&mut self, id: &NodeId, why: &str, fx: &mut Effects) {
        let Some(node) = self.nodes.remove(id) else { return };
        self.boots.remove(&node.boot);
        fx.note(format!("node {id} is lost: {why}"));
        for job in node.leases {
            self.lose_lease(job, why, fx);
        }
        // One model fewer may leave exactly one.
        self.replan = true;
    }

    /// Heard of lately, with a session.
    pub(super) fn is_alive(&self, node: &Node) -> bool {
        node.session_closed.is_none() && self.now.since(node.last_seen) < self.limits.silent
    }
}

/// Text of nodes is kept, but not at any length.
pub(super) fn shortened(mut text: String) -> String {
    const MAX_TEXT: usize = 2000;
    if text.len() > MAX_TEXT {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text.push('…');
    }
    text
}

impl Node {
    /// Whether clips of this model are started here.
    pub(super) fn can_render(&self, model: &str) -> bool {
        self.roles.denoise && self.models.contains_key(model)
    }

    /// The models whose clips are started here.
    pub(super) fn rendered_models(&self) -> impl Iterator<Item = (&Arc<str>, &NodeModel)> {
        self.models.iter().filter(|_| self.roles.denoise)
    }

    /// The lowest first.
    pub(super) fn free_devices(&self) -> impl DoubleEndedIterator<Item = DeviceIndex> {
        let devices = self.devices.iter().enumerate();
        devices.filter(|(_, device)| device.slot == Slot::Free).map(|(i, _)| DeviceIndex(i as u32))
    }
}

impl Device {
    pub(super) fn new(info: &DeviceInfo) -> Self {
        Self { name: info.name.clone(), slot: Slot::Free }
    }
}
