//! The state of the farm and the one way to change it ([`Farm::step`]).

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use farm_core::id::{AttemptKey, AttemptNo, BootId, DeviceIndex, Epoch, JobId, NodeId, SubmissionId, TenantId};
use farm_core::job::spec::GenerationDefaults;
use farm_core::job::state::Progress;
use farm_core::parallel::cost::ModelShape;
use farm_core::parallel::topology::Topology;
use farm_core::tiles::plan::Tiling;
use farm_core::wire::StopNo;
use farm_core::wire::to_node::{HelpDecode, StartAttempt, ToNode};
use farm_core::wire::to_scheduler::{DeviceInfo, Roles, ToScheduler};

use super::batch::{Batch, Dependencies};
use super::class::{ClassIx, Classes};
use super::effects::Effects;
use super::events::{Clip, Counts, Event, Saved, SavedTenant, SavedUsage, Time};
use super::fit::Fits;
use super::health::Health;
use super::help::Want;
use super::rates::Rates;
use super::reserve::Reservations;
use super::stock::{Filed, GroupIx, Stock};
use super::table::Jobs;
use super::tenant::{Place, Tenant, TenantIx};

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
    /// An attempt that says the same of its progress for this long, and for ten times as long as a step is expected to take,
    /// hangs.
    pub stuck: Duration,
    /// Attempts that devices may fail before the job fails.
    pub failures: u32,
    /// Attempts that the store may fail. It is mostly the store's trouble, and passes.
    pub store_failures: u32,
    /// Attempts that may run out of memory.
    pub memory_failures: u32,
    /// Attempts that may end with their node before the job fails.
    pub losses: u32,
    /// Nodes that may die of the job, by the evidence that they leave.
    pub kills: u32,
    /// Wait after the first failure of a device; doubles with each.
    pub backoff: Duration,
    /// Likewise of the store.
    pub store_backoff: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(1),
            silent: Duration::from_secs(4),
            node_ttl: Duration::from_secs(15),
            closed_ttl: Duration::from_secs(5),
            window: Duration::from_secs(8),
            unlisted: Duration::from_secs(8),
            start: Duration::from_secs(30),
            pause: Duration::from_secs(2),
            stuck: Duration::from_secs(10 * 60),
            failures: 3,
            store_failures: 10,
            memory_failures: 4,
            losses: 10,
            kills: 2,
            backoff: Duration::from_secs(2),
            store_backoff: Duration::from_secs(5),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Job {
    pub seq: u64,
    pub priority: i32,
    pub tenant: TenantIx,
    pub class: ClassIx,
    pub batches: Vec<SubmissionId>,
    /// A user paused this very job.
    pub paused: bool,
    pub submitted_ms: i64,
    pub attempt: AttemptNo,
    pub counts: Counts,
    /// The node whose devices failed it last; another is better.
    pub avoid: Option<NodeId>,
    pub phase: Phase,
}

/// By so much earlier than it was does a job that was begun count as submitted: a hundred years.
const BEGUN_AHEAD_MS: i64 = 100 * 366 * 24 * 60 * 60 * 1000;

impl Job {
    pub fn place(&self, id: JobId) -> Place {
        let ahead = if self.is_begun() { BEGUN_AHEAD_MS } else { 0 };
        (Reverse(self.priority), self.submitted_ms - ahead, self.seq, id)
    }

    /// It lost its devices by no fault of its own: it goes on before what was not begun.
    fn is_begun(&self) -> bool {
        let Counts { device, store, memory, .. } = self.counts;
        self.attempt.0 > 0 && device + store + memory == 0
    }
}

#[derive(Clone, Debug)]
pub(super) enum Phase {
    /// For nothing but devices.
    Waiting,
    /// Paused, or after jobs that are not done.
    Held,
    /// Waiting for a moment after a failure.
    Delayed {
        until: Time,
        cause: Box<str>,
    },
    /// Has its devices; its request is on the way.
    Picked(Box<Pick>),
    Running(Box<Lease>),
}

/// Devices that are lent to a job whose attempt starts as soon as its request is there.
#[derive(Clone, Debug)]
pub(super) struct Pick {
    pub node: NodeId,
    pub devices: Vec<DeviceIndex>,
    pub topology: Topology,
    pub model: Arc<str>,
    pub bill: Bill,
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
    /// When the progress was last another.
    pub moved: Time,
    /// The newest answer to its wish for devices that decode.
    pub hands: Option<Hands>,
    /// Devices that decode for it.
    pub helpers: Vec<(NodeId, DeviceIndex)>,
    pub bill: Bill,
    pub yielding: Option<Yield>,
}

/// What an attempt uses and was expected to use.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bill {
    /// Devices of the gang at its start.
    pub size: usize,
    /// Since when its devices are counted by this process.
    pub since: Time,
    /// Device time of devices that are given back, of helpers that have ended, and of the time before this process.
    pub used: Duration,
    /// Wall time before this process.
    pub before: Duration,
    /// Seconds by the devices' rates alone.
    pub base: f64,
    /// Predicted seconds from start to end.
    pub expected: Option<f64>,
    /// Device-seconds that its tenant was charged at `since`.
    pub charged: f64,
}

/// The attempt was told to store its latent and to hand itself back.
#[derive(Clone, Debug)]
pub(super) struct Yield {
    pub reason: Box<str>,
    /// For a job with more right to the devices.
    pub preempted: bool,
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
    Awaited { since: Time, start: Arc<StartAttempt> },
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
    pub models: Arc<BTreeMap<Arc<str>, NodeModel>>,
    pub roles: Roles,
    pub labels: BTreeMap<String, String>,
    /// Its kind, and where it is filed there.
    pub group: GroupIx,
    pub filed: Option<Filed>,
    /// The model that it ran last.
    pub warm: Option<Arc<str>>,
    /// It has said that it stops soon, and why.
    pub leaving: Option<String>,
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
    /// Its node has been told to stop what it does for an attempt; free once the node has heard that and does not list it
    /// any more.
    Stopping(Box<Stopping>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Stopping {
    pub key: AttemptKey,
    pub command: StopNo,
    /// It decodes for the attempt, or was to.
    pub helps: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Help {
    pub key: AttemptKey,
    pub since: Time,
    /// The command, and when it was given, until the node lists the help.
    pub awaited: Option<(Time, HelpDecode)>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct NodeModel {
    pub hash: String,
    pub defaults: GenerationDefaults,
    pub shape: ModelShape,
}

/// A model that nodes have registered.
#[derive(Clone, Debug)]
pub(super) struct KnownModel {
    pub hash: String,
    pub defaults: GenerationDefaults,
    /// Nodes that have it, and those that render with it.
    pub nodes: usize,
    pub renderers: usize,
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
    /// The newest command to stop.
    pub(super) stop: StopNo,
    /// Where results go; nodes have to agree.
    pub(super) store: String,
    /// How clips are decoded.
    pub(super) tiling: Tiling,
    /// Milliseconds since 1970 at the clock's zero.
    pub(super) wall_ms: i64,
    /// Somebody paused the whole farm.
    pub(super) paused: bool,
    /// Queued and running jobs.
    pub(super) jobs: Jobs,
    pub(super) classes: Classes,
    /// The default tenant is the first.
    pub(super) tenants: Vec<Tenant>,
    pub(super) tenant_ix: HashMap<TenantId, TenantIx>,
    /// Those with queued or running jobs.
    pub(super) batches: BTreeMap<SubmissionId, Batch>,
    pub(super) dependencies: Dependencies,
    /// Delayed jobs by the moment they may go on.
    pub(super) delayed: BTreeSet<(Time, JobId)>,
    /// Jobs that have their devices and wait for their requests, in order.
    pub(super) picked: Vec<JobId>,
    pub(super) nodes: BTreeMap<NodeId, Node>,
    pub(super) boots: HashMap<BootId, NodeId>,
    pub(super) stock: Stock,
    pub(super) models: BTreeMap<Arc<str>, KnownModel>,
    /// Nodes that start nothing until somebody says so, joined or not.
    pub(super) drained: BTreeSet<NodeId>,
    pub(super) health: BTreeMap<NodeId, Health>,
    pub(super) reservations: Reservations,
    /// Running jobs of nodes that have not come back since this scheduler started.
    pub(super) orphans: BTreeSet<JobId>,
    pub(super) window_ends: Time,
    /// A memory of what is worked out from the rest.
    pub(super) fits: RefCell<Fits>,
    pub(super) rates: Rates,
    /// Clips that were finished, by minute of the clock, for an hour.
    pub(super) finished: VecDeque<(u64, u64)>,
    /// When running attempts were last looked at for some to give way.
    pub(super) preempted: Time,
    pub(super) now: Time,
    pub(super) last_tick: Time,
    /// Something changed that may let a queued job start.
    pub(super) replan: bool,
    /// When to look at the queue even if nothing has.
    pub(super) look_again: Time,
    pub(super) counters: Counters,
}

impl Farm {
    /// The farm as the queue store left it. `epoch` is this reign's; `store` is the normalised URL for results;
    /// `wall_ms` is what the wall clock shows, in milliseconds since 1970, when the farm's own clock is at `now`.
    pub fn restore(
        limits: Limits,
        epoch: Epoch,
        store: String,
        tiling: Tiling,
        saved: Saved,
        wall_ms: i64,
        now: Time,
    ) -> Self {
        let Saved { tenants, batches, jobs, drained, paused, usage, measured } = saved;
        let mut farm = Self {
            window_ends: now + limits.window,
            limits,
            epoch,
            stop: StopNo { epoch, number: 0 },
            store,
            tiling,
            wall_ms: wall_ms.saturating_sub(now.0.as_millis() as i64),
            paused,
            jobs: Jobs::with_capacity(jobs.len()),
            classes: Classes::default(),
            tenants: Vec::new(),
            tenant_ix: HashMap::new(),
            batches: BTreeMap::new(),
            dependencies: Dependencies::default(),
            delayed: BTreeSet::new(),
            picked: Vec::new(),
            nodes: BTreeMap::new(),
            boots: HashMap::new(),
            stock: Stock::default(),
            models: BTreeMap::new(),
            drained: drained.into_iter().collect(),
            health: BTreeMap::new(),
            reservations: Reservations::default(),
            orphans: BTreeSet::new(),
            fits: RefCell::default(),
            rates: Rates::restore(measured),
            finished: VecDeque::new(),
            preempted: now,
            now,
            last_tick: now,
            replan: true,
            look_again: now,
            counters: Counters::default(),
        };
        farm.tenant(&TenantId::default());
        for SavedTenant { tenant, spec, paused } in tenants {
            let ix = farm.tenant(&tenant);
            let tenant = farm.tenant_mut(ix);
            (tenant.spec, tenant.paused) = (spec, paused);
        }
        for SavedUsage { tenant, hour, device_ms } in usage {
            // In the middle of its hour.
            let at = farm.clock() + ((hour - farm.hour()) as f64 * 3600.0).min(0.0);
            let ix = farm.tenant(&tenant);
            farm.tenant_mut(ix).usage.remember(hour, device_ms as f64 / 1000.0, at);
        }
        for batch in batches {
            farm.batches.insert(batch.submission, Batch::new(batch));
        }
        for job in jobs {
            farm.admit_job(job);
        }
        farm
    }

    /// Seconds on the farm's clock.
    pub(super) fn clock(&self) -> f64 {
        self.now.0.as_secs_f64()
    }

    /// Milliseconds since 1970. The wall clock of this process's start plus the time since then: steps of the wall
    /// clock change nothing.
    pub(super) fn wall(&self) -> i64 {
        self.wall_ms.saturating_add(self.now.0.as_millis() as i64)
    }

    /// Hours since 1970.
    pub(super) fn hour(&self) -> i64 {
        self.wall().div_euclid(3_600_000)
    }

    /// Applies one event. `now` may run backwards a little between callers; the farm's own time does not.
    pub fn step(&mut self, event: Event, now: Time) -> Effects {
        self.now = self.now.max(now);
        // Before anything is heard: what waited for this process while it stood still would be judged by a clock that went on.
        self.forgive_own_pause();
        let mut fx = Effects::default();
        match event {
            Event::FromNode(envelope) => self.on_message(*envelope, &mut fx),
            Event::SessionClosed(boot) => self.on_session_closed(boot, &mut fx),
            Event::Submitted(submitted) => self.on_submitted(submitted, &mut fx),
            Event::Wish { wish, by } => self.on_wish(wish, by, &mut fx),
            Event::Loaded(requests) => self.on_loaded(requests, &mut fx),
            Event::Tick => self.on_tick(&mut fx),
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
        known.last_seen = self.now;
        known.session_closed = None;
        match registration {
            ToScheduler::Register(_) => {}
            ToScheduler::WantHands { key, round, tiles, url, token } => {
                self.on_want_hands(&node, boot, Want { key, round, tiles, url, token }, fx);
            }
            ToScheduler::Heartbeat { running, helping, heard } => {
                fx.send(&node, boot, ToNode::HeartbeatSeen);
                self.on_listed(&node, seq, heard, running, &helping, fx);
            }
            ToScheduler::Report { number, report } => self.on_report(&node, boot, number, report, fx),
            ToScheduler::Leaving { reason } => self.on_leaving(&node, shortened(reason), fx),
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
        self.last_tick = self.now;
        while let Some(&(until, job)) = self.delayed.first()
            && until <= self.now
        {
            self.delayed.pop_first();
            if let Some(job) = self.jobs.get_mut(&job) {
                job.phase = Phase::Held;
            }
            self.wait(job);
        }
        let lost: Vec<(NodeId, String)> =
            self.nodes.iter().filter_map(|(id, node)| Some((id.clone(), self.why_lost(node)?))).collect();
        for (id, why) in lost {
            self.lose_node(&id, &why, fx);
        }
        if self.now >= self.window_ends {
            for job in std::mem::take(&mut self.orphans) {
                self.lose_lease(job, "did not come back after the scheduler's restart", Slot::Free, fx);
            }
        }
        self.plan(fx);
    }

    /// If this process stood still, nobody was silent: all clocks that count silence are moved on by that span.
    fn forgive_own_pause(&mut self) {
        let gap = self.now.since(self.last_tick);
        if gap < self.limits.pause {
            return;
        }
        self.last_tick = self.now;
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
