//! The real core with simulated nodes, in simulated time. Nodes do what real ones do as far as the core can tell: they
//! join, list what they run once a second, report at once when an attempt ends, and hand back what they are told to.
//! Messages take no time.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;

use farm_core::api::{JobResult, StageSeconds};
use farm_core::id::{AttemptKey, AttemptNo, BootId, DeviceIndex, Epoch, JobId, NodeId, SubmissionId, TenantId};
use farm_core::job::spec::{GenerationDefaults, RenderRequest, RenderSpec};
use farm_core::job::state::{Progress, Stage};
use farm_core::parallel::cost::{ModelShape, Site};
use farm_core::parallel::topology::Topology;
use farm_core::precision::Precision;
use farm_core::store::key;
use farm_core::tiles::plan::Tiling;
use farm_core::wire::to_node::{StartAttempt, ToNode};
use farm_core::wire::to_scheduler::{
    AttemptOutcome, AttemptReport, DeviceInfo, ModelInfo, Registration, Roles, RunningAttempt, ToScheduler,
};
use farm_core::wire::{Envelope, StopNo};
use uuid::Uuid;

use super::clock::{Span, timed};
use crate::core::effects::{Change, Effects};
use crate::core::events::{Ask, Counts, Event, LiveJob, LoadedRequest, Saved, SavedBatch, Submitted, Time};
use crate::core::farm::{Farm, Limits};
use crate::queue::store::NewJob;

const STORE: &str = "file:///results";
/// 2026-01-01, in milliseconds since 1970.
const WALL_MS: i64 = 1_767_225_600_000;
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Jobs of a submission.
const BATCH: usize = 10_000;

/// Jobs that ask for the same.
#[derive(Clone, Debug)]
pub struct Kind {
    pub request: RenderRequest,
    pub model: Option<String>,
    pub least_devices: u32,
}

impl Kind {
    pub fn new(request: RenderRequest, model: Option<String>) -> Self {
        Self { request, model, least_devices: 0 }
    }
}

/// A job of the world. What it waits and takes is kept in milliseconds since the start.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    pub kind: u32,
    pub tenant: u32,
    pub priority: i16,
    /// True run time that is left.
    pub left_ms: u32,
    pub submitted_ms: u32,
    /// When it got its devices first.
    pub started_ms: u32,
    pub ended_ms: u32,
}

/// Not yet.
pub const NEVER: u32 = u32::MAX;

impl Item {
    pub fn new(kind: u32, tenant: u32, run_time: Duration) -> Self {
        let left_ms = run_time.as_millis() as u32;
        Self { kind, tenant, priority: 0, left_ms, submitted_ms: 0, started_ms: NEVER, ended_ms: NEVER }
    }
}

/// What the core took, by what it did.
#[derive(Clone, Debug, Default)]
pub struct Costs {
    pub submits: Span,
    pub ticks: Span,
    /// Starts of what a tick has picked.
    pub starts: Span,
    pub reports: Span,
    pub heartbeats: Span,
    /// Each tick, with the jobs that it picked and their starts.
    pub each_tick: Vec<(usize, Span)>,
}

impl Costs {
    /// All but the submitting.
    pub fn total(&self) -> Span {
        let mut total = self.ticks;
        for span in [self.starts, self.reports, self.heartbeats] {
            total += span;
        }
        total
    }
}

/// How a world differs from the usual.
#[derive(Clone, Debug)]
pub struct Rules {
    pub tick: Duration,
    /// Time passes for the core whenever something has ended, too.
    pub eager: bool,
    /// A device that has not just run the model loads it for so long first.
    pub load: Duration,
}

impl Default for Rules {
    fn default() -> Self {
        Self { tick: Duration::from_millis(100), eager: false, load: Duration::ZERO }
    }
}

pub struct World {
    pub farm: Farm,
    pub rules: Rules,
    pub now: Time,
    pub items: Vec<Item>,
    pub costs: Costs,
    /// Device time that attempts have had.
    pub busy: Duration,
    /// Starts on a node that had run another model before.
    pub switches: u64,
    pub starts: u64,
    pub ended: usize,
    pub preemptions: u64,
    kinds: Vec<Kind>,
    tenants: Vec<TenantId>,
    nodes: Vec<Node>,
    due: BinaryHeap<Reverse<Due>>,
    next_tick: Time,
    order: u64,
    batches: u128,
    result: ResultText,
    /// Every change that the core asked for, if wanted.
    pub changes: Option<Vec<Change>>,
}

struct Node {
    id: NodeId,
    boot: BootId,
    seq: u64,
    running: Vec<Running>,
    heard: StopNo,
    warm: Option<String>,
}

struct Running {
    key: AttemptKey,
    devices: Vec<DeviceIndex>,
    since: Time,
    ends: Time,
    steps: u32,
    yields: bool,
}

/// Something that a node will do.
struct Due {
    at: Time,
    order: u64,
    node: u32,
    /// The attempt that ends; none: a heartbeat.
    key: Option<AttemptKey>,
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Due {}

impl World {
    pub fn new(rules: Rules, tenants: usize, saved: Saved) -> Self {
        let now = Time::default();
        let store = STORE.to_owned();
        Self {
            farm: Farm::restore(Limits::default(), Epoch(1), store, Tiling::AUTO, saved, WALL_MS, now),
            next_tick: now,
            rules,
            now,
            items: Vec::new(),
            costs: Costs::default(),
            busy: Duration::ZERO,
            switches: 0,
            starts: 0,
            ended: 0,
            preemptions: 0,
            kinds: Vec::new(),
            tenants: (0..tenants).map(|i| format!("tenant-{i}").parse().unwrap_or_default()).collect(),
            nodes: Vec::new(),
            due: BinaryHeap::new(),
            order: 0,
            batches: 0,
            result: ResultText::new(),
            changes: None,
        }
    }

    pub fn kind(&mut self, kind: Kind) -> u32 {
        self.kinds.push(kind);
        self.kinds.len() as u32 - 1
    }

    /// A node joins, and says once a second that it is there.
    pub fn join(&mut self, registration: Registration) {
        let ix = self.nodes.len() as u32;
        let boot = BootId(Uuid::from_u128(u128::from(ix) + 1));
        self.nodes.push(Node {
            id: NodeId(format!("node-{ix:05}")),
            boot,
            seq: 0,
            running: Vec::new(),
            heard: StopNo::default(),
            warm: None,
        });
        let event = self.message(ix, ToScheduler::Register(registration));
        let effects = self.farm.step(event, self.now);
        self.obey(effects);
        // Spread over the second, as nodes that joined at any time are.
        let first = HEARTBEAT.mul_f64(f64::from(ix) * 0.618_034 % 1.0);
        self.push(self.now + first, ix, None);
    }

    /// Jobs come, in submissions of at most [`BATCH`]. Gives the index of the first.
    pub fn submit(&mut self, items: impl IntoIterator<Item = Item>) -> usize {
        let first = self.items.len();
        let now_ms = self.now_ms();
        let mut queued = Vec::new();
        for mut item in items {
            item.submitted_ms = now_ms;
            queued.push(self.live(self.items.len(), &item));
            self.items.push(item);
            if queued.len() == BATCH {
                self.commit(std::mem::take(&mut queued));
            }
        }
        if !queued.is_empty() {
            self.commit(queued);
        }
        first
    }

    fn live(&self, ix: usize, item: &Item) -> LiveJob {
        let kind = &self.kinds[item.kind as usize];
        LiveJob {
            job: job_id(ix),
            seq: ix as u64,
            priority: item.priority.into(),
            model: kind.model.clone(),
            tenant: self.tenants[item.tenant as usize].clone(),
            batches: vec![submission_id(self.batches)],
            ask: Ask::of(&kind.request),
            require: kind.request.require.clone(),
            after: Vec::new(),
            paused: false,
            submitted_ms: WALL_MS + self.now.0.as_millis() as i64,
            attempt: AttemptNo(0),
            counts: Counts { least_devices: kind.least_devices, ..Counts::default() },
            running: None,
        }
    }

    /// A job as the queue store is given it.
    pub fn new_job(&self, ix: usize) -> NewJob {
        let item = &self.items[ix];
        let kind = &self.kinds[item.kind as usize];
        let mut key = [0; 32];
        key[..8].copy_from_slice(&(ix as u64).to_le_bytes());
        NewJob {
            job: job_id(ix),
            key,
            request: kind.request.clone(),
            seed: 1,
            priority: item.priority.into(),
            model: kind.model.clone(),
            after: Vec::new(),
        }
    }

    fn commit(&mut self, mut queued: Vec<LiveJob>) {
        let submission = submission_id(self.batches);
        queued.iter_mut().for_each(|job| job.batches[0] = submission);
        self.batches += 1;
        let batch = SavedBatch { submission, max_failures: None, failed: 0, paused: false };
        let event = Event::Submitted(Submitted { batch: Some(batch), queued, joined: Vec::new() });
        let (effects, span) = timed(|| self.farm.step(event, self.now));
        self.costs.submits += span;
        self.obey(effects);
    }

    pub fn devices_in_use(&self) -> usize {
        self.nodes.iter().flat_map(|node| &node.running).map(|running| running.devices.len()).sum()
    }

    /// All that nodes do until the next tick, and the tick.
    pub fn run_tick(&mut self) {
        let at = self.next_tick;
        let mut reports = Vec::new();
        let mut heartbeats = Vec::new();
        while self.due.peek().is_some_and(|Reverse(due)| due.at <= at) {
            let Some(Reverse(due)) = self.due.pop() else { break };
            match due.key {
                None => {
                    heartbeats.push((self.heartbeat(due.node, due.at), due.at));
                    self.push(due.at + HEARTBEAT, due.node, None);
                }
                Some(key) => {
                    let Some(report) = self.end(due.node, key, due.at) else { continue };
                    reports.push((report, due.at));
                    if self.rules.eager {
                        self.now = due.at;
                        self.feed(&mut reports, |costs| &mut costs.reports);
                        // What ends at one moment is planned for at once.
                        let more = self.due.peek().is_some_and(|Reverse(due)| due.at == self.now);
                        if !more && self.farm.wants_tick() {
                            self.tick();
                        }
                    }
                }
            }
        }
        self.feed(&mut reports, |costs| &mut costs.reports);
        self.feed(&mut heartbeats, |costs| &mut costs.heartbeats);
        self.now = at;
        self.next_tick = at + self.rules.tick;
        self.tick();
    }

    fn feed(&mut self, events: &mut Vec<(Event, Time)>, cost: impl Fn(&mut Costs) -> &mut Span) {
        if events.is_empty() {
            return;
        }
        let mut all = Vec::with_capacity(events.len());
        let ((), span) = timed(|| all.extend(events.drain(..).map(|(event, at)| self.farm.step(event, at))));
        *cost(&mut self.costs) += span;
        all.into_iter().for_each(|effects| self.obey(effects));
    }

    fn tick(&mut self) {
        let (effects, mut span) = timed(|| self.farm.step(Event::Tick, self.now));
        self.costs.ticks += span;
        let picked = effects.load.len();
        if picked > 0 {
            let request = |job: &JobId| {
                let kind = &self.kinds[self.items[job_ix(*job)].kind as usize];
                LoadedRequest { job: *job, request: kind.request.clone(), seed: 1 }
            };
            let loaded: Vec<LoadedRequest> = effects.load.iter().map(request).collect();
            let (started, more) = timed(|| self.farm.step(Event::Loaded(loaded), self.now));
            self.costs.starts += more;
            span += more;
            self.obey(started);
        }
        self.costs.each_tick.push((picked, span));
        self.obey(effects);
    }

    /// What nodes make of what they are sent.
    fn obey(&mut self, effects: Effects) {
        for send in effects.sends {
            let ix = send.boot.0.as_u128() as u32 - 1;
            match send.message {
                ToNode::Start(start) => self.start(ix, *start),
                ToNode::Yield { key, .. } => self.hand_back(ix, key),
                ToNode::Abort { key, stop, .. } => self.abort(ix, key, stop),
                ToNode::Refused { reason } => panic!("node {ix} is refused: {reason}"),
                _ => {}
            }
        }
        if let Some(kept) = &mut self.changes {
            kept.extend(effects.changes);
        }
    }

    fn start(&mut self, ix: u32, start: StartAttempt) {
        let (now, now_ms) = (self.now, self.now_ms());
        let node = &mut self.nodes[ix as usize];
        if node.running.iter().any(|running| running.key == start.key) {
            return;
        }
        let item = &mut self.items[job_ix(start.key.job)];
        if item.started_ms == NEVER {
            item.started_ms = now_ms;
        }
        self.starts += 1;
        let mut takes = Duration::from_millis(item.left_ms.into());
        if node.warm.as_ref() != Some(&start.model) {
            self.switches += u64::from(node.warm.is_some());
            takes += self.rules.load;
            node.warm = Some(start.model);
        }
        let steps = self.kinds[item.kind as usize].request.num_inference_steps.unwrap_or(64);
        let ends = now + takes;
        node.running.push(Running { key: start.key, devices: start.devices, since: now, ends, steps, yields: false });
        self.push(ends, ix, Some(start.key));
    }

    /// Told to hand back: it does so at the end of the step.
    fn hand_back(&mut self, ix: u32, key: AttemptKey) {
        let now = self.now;
        let running = self.nodes[ix as usize].running.iter_mut().find(|running| running.key == key && !running.yields);
        let Some(running) = running else { return };
        let step = running.ends.since(running.since) / running.steps.max(1);
        let ends = (now + step).min(running.ends);
        if ends < running.ends {
            (running.yields, running.ends) = (true, ends);
            self.push(ends, ix, Some(key));
        }
    }

    /// The attempt ends now, if it has not ended already: the report.
    fn end(&mut self, ix: u32, key: AttemptKey, at: Time) -> Option<Event> {
        let node = &mut self.nodes[ix as usize];
        let i = node.running.iter().position(|running| running.key == key && running.ends == at)?;
        let Running { devices, since, yields, .. } = node.running.swap_remove(i);
        let took = at.since(since);
        self.busy += took * devices.len() as u32;
        let item = &mut self.items[job_ix(key.job)];
        let outcome = if yields {
            self.preemptions += 1;
            item.left_ms = item.left_ms.saturating_sub(took.as_millis() as u32);
            AttemptOutcome::Interrupted { step: 1 }
        } else {
            self.ended += 1;
            item.ended_ms = at.0.as_millis() as u32;
            AttemptOutcome::Completed { accepted: key.attempt, result_json: self.result.of(key), warnings: Vec::new() }
        };
        let report = AttemptReport { key, outcome };
        Some(self.message(ix, ToScheduler::Report { number: 1, report }))
    }

    fn abort(&mut self, ix: u32, key: AttemptKey, stop: StopNo) {
        let node = &mut self.nodes[ix as usize];
        node.heard = node.heard.max(stop);
        node.running.retain(|running| running.key != key);
    }

    fn heartbeat(&mut self, ix: u32, at: Time) -> Event {
        let listed = |running: &Running| {
            let (all, gone) = (running.ends.since(running.since), at.since(running.since));
            let part = if all.is_zero() { 1.0 } else { gone.as_secs_f64() / all.as_secs_f64() };
            let progress = Progress {
                stage: Stage::Denoise,
                done: (part * f64::from(running.steps)) as u32,
                total: running.steps,
                eta_seconds: Some(running.ends.since(at).as_secs_f32()),
            };
            RunningAttempt { key: running.key, progress, devices: running.devices.clone() }
        };
        let running = self.nodes[ix as usize].running.iter().map(listed).collect();
        let heard = self.nodes[ix as usize].heard;
        self.message(ix, ToScheduler::Heartbeat { running, helping: Vec::new(), heard })
    }

    fn message(&mut self, ix: u32, body: ToScheduler) -> Event {
        let node = &mut self.nodes[ix as usize];
        node.seq += 1;
        let (id, boot, seq) = (node.id.clone(), node.boot, node.seq);
        Event::FromNode(Box::new(Envelope { epoch: Epoch(1), node: id, boot, seq, body }))
    }

    fn push(&mut self, at: Time, node: u32, key: Option<AttemptKey>) {
        self.order += 1;
        self.due.push(Reverse(Due { at, order: self.order, node, key }));
    }

    fn now_ms(&self) -> u32 {
        self.now.0.as_millis() as u32
    }
}

fn job_id(ix: usize) -> JobId {
    JobId(Uuid::from_u128(ix as u128 + 1))
}

fn job_ix(id: JobId) -> usize {
    id.0.as_u128() as usize - 1
}

fn submission_id(n: u128) -> SubmissionId {
    SubmissionId(Uuid::from_u128(n + 1))
}

/// A manifest as nodes write it.
struct ResultText(JobResult);

impl ResultText {
    fn new() -> Self {
        let request = RenderRequest { negative_prompt: Some("blurry".to_owned()), ..request(PROMPT) };
        let spec = RenderSpec::resolve(&request, &GenerationDefaults::default(), 1);
        Self(JobResult {
            job: job_id(0),
            attempt: AttemptNo(1),
            epoch: Epoch(1),
            node: NodeId("node-00000".to_owned()),
            devices: vec![DeviceIndex(0)],
            decode: None,
            topology: Topology::SOLO,
            precision: Precision::default(),
            clip: String::new(),
            clip_bytes: 1_000_000,
            clip_sha256: "0".repeat(64),
            spec: spec.expect("the defaults are legal"),
            model: "model-0".to_owned(),
            model_hash: "0".repeat(64),
            program_version: farm_core::VERSION.to_owned(),
            seconds: StageSeconds::default(),
            finished: jiff::Timestamp::UNIX_EPOCH,
            warnings: Vec::new(),
        })
    }

    fn of(&mut self, key: AttemptKey) -> String {
        (self.0.job, self.0.attempt) = (key.job, key.attempt);
        self.0.clip = key::clip(key.job, key.attempt);
        serde_json::to_string(&self.0).unwrap_or_default()
    }
}

/// About as long as prompts are.
pub const PROMPT: &str = "A hand with delicate fingers picks up a bright yellow lemon from a wooden bowl filled with \
lemons and sprigs of mint against a peach-coloured background. The hand gently tosses the lemon up and catches it.";

pub fn request(prompt: &str) -> RenderRequest {
    serde_json::from_value(serde_json::json!({ "prompt": prompt })).expect("a prompt is a request")
}

/// A node with `devices` of one kind. Without a site nothing is known of their rates.
pub fn registration(devices: usize, device: &str, site: Option<&Site>, models: &[ModelInfo]) -> Registration {
    Registration {
        version: farm_core::VERSION.to_owned(),
        devices: (0..devices).map(|_| DeviceInfo { name: device.to_owned() }).collect(),
        site_json: site.map(|site| serde_json::to_string(site).expect("rates are numbers")),
        models: models.to_vec(),
        store: STORE.to_owned(),
        roles: Roles::ALL,
        labels: Default::default(),
        crash: None,
        running: Vec::new(),
        helping: Vec::new(),
        heard: StopNo::default(),
    }
}

pub fn model(name: &str, shape: &ModelShape) -> ModelInfo {
    ModelInfo {
        name: name.to_owned(),
        hash: format!("{name:0>64}"),
        defaults_json: serde_json::to_string(&GenerationDefaults::default()).expect("defaults are plain"),
        shape_json: serde_json::to_string(shape).expect("sizes are numbers"),
    }
}
