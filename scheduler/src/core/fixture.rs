//! A farm on a model of the queue store, for tests: applies what the core asks for, refuses what a database would
//! refuse, and checks the whole picture after every event.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use farm_core::api::{JobResult, StageSeconds, TenantSpec};
use farm_core::id::{AttemptKey, AttemptNo, BootId, DeviceIndex, Epoch, JobId, NodeId, SubmissionId, TenantId};
use farm_core::job::spec::{GenerationDefaults, RenderRequest, RenderSpec};
use farm_core::job::state::{FailureKind, JobState, Progress, Stage};
use farm_core::parallel::cost::{DeviceRates, LinkRates, ModelShape, Site};
use farm_core::parallel::topology::Topology;
use farm_core::precision::Precision;
use farm_core::store::key;
use farm_core::tiles::plan::Tiling;
use farm_core::wire::to_node::{HelpDecode, StartAttempt, ToNode};
use farm_core::wire::to_scheduler::{
    AttemptOutcome, AttemptReport, DeviceInfo, Helping, ModelInfo, Registration, Roles, RunningAttempt, ToScheduler,
};
use farm_core::wire::{Envelope, StopNo};
use uuid::Uuid;

use super::effects::{Change, Effects, Outcome, Send};
use super::events::{
    Ask, Clip, Counts, Event, LiveAttempt, LiveJob, LoadedRequest, Saved, SavedBatch, SavedTenant, SavedUsage, Scope,
    Submitted, Time, Wish,
};
use super::farm::{Farm, Limits, Phase, Slot};
use super::fit::clip_shape;

pub const STORE: &str = "file:///results";
/// The wall clock at time zero, in milliseconds since 1970.
const WALL: i64 = 1_000_000 * 3_600_000;

/// A job's row.
#[derive(Clone, Debug)]
pub struct Row {
    pub state: JobState,
    pub live: LiveJob,
    pub request: RenderRequest,
    pub reason: Option<String>,
    pub outcomes: Vec<&'static str>,
    pub times_done: u32,
}

pub struct World {
    pub farm: Farm,
    pub limits: Limits,
    pub now: Time,
    pub rows: BTreeMap<JobId, Row>,
    /// The queue store's other tables.
    pub saved: Saved,
    /// Messages of the newest event.
    pub sent: Vec<Send>,
    /// Changes of the newest event.
    pub changes: Vec<Change>,
    pub notes: Vec<String>,
    /// Every attempt ever started, with the process it was given to.
    pub started: Vec<(AttemptKey, NodeId, BootId)>,
    /// The devices that each was started on.
    pub gangs: HashMap<AttemptKey, Vec<DeviceIndex>>,
    /// Every device that was ever told to help, with its process.
    pub helped: Vec<(AttemptKey, DeviceIndex, NodeId, BootId)>,
    /// Devices that help by what their process said last and by what the farm made of that.
    helping: HashMap<BootId, Vec<Helping>>,
    seq: u64,
}

pub fn boot(n: u128) -> BootId {
    BootId(Uuid::from_u128(n))
}

pub fn node(name: &str) -> NodeId {
    NodeId(name.to_owned())
}

pub fn tenant(name: &str) -> TenantId {
    name.parse().unwrap()
}

pub fn batch_id(n: u128) -> SubmissionId {
    SubmissionId(Uuid::from_u128(n))
}

pub fn job_id(n: u64) -> JobId {
    JobId(Uuid::from_u128(n.into()))
}

pub fn model(name: &str) -> ModelInfo {
    let defaults_json = serde_json::to_string(&GenerationDefaults::default()).unwrap();
    let shape_json = serde_json::to_string(&ModelShape::mochi1()).unwrap();
    ModelInfo { name: name.to_owned(), hash: format!("hash-of-{name}"), defaults_json, shape_json }
}

/// A model whose weights are small.
pub fn small_model(name: &str) -> ModelInfo {
    let shape = ModelShape { layers: 2, ..ModelShape::mochi1() };
    ModelInfo { shape_json: serde_json::to_string(&shape).unwrap(), ..model(name) }
}

/// Devices on which two render a clip of the default size in half the time, and more gain less, with `memory` bytes each.
pub fn site(memory: f64) -> String {
    let device =
        DeviceRates { linear: 1e14, attention: 1e14, memory, bandwidth: 1e12, value_bytes: 2, shared_weights: false };
    let link = LinkRates { bandwidth: 5e9, latency: 1e-5 };
    serde_json::to_string(&Site::one_host(device, link)).unwrap()
}

/// As [`registration`], with devices that may work together.
pub fn team(devices: usize, models: &[&str]) -> Registration {
    Registration { site_json: Some(site(1e12)), ..registration(devices, models) }
}

/// A node that only decodes.
pub fn decoder(devices: usize, models: &[&str]) -> Registration {
    Registration { roles: Roles { denoise: false, decode: true }, ..registration(devices, models) }
}

/// Without rates: every clip gets one device.
pub fn registration(devices: usize, models: &[&str]) -> Registration {
    Registration {
        version: "test".to_owned(),
        devices: (0..devices).map(|_| DeviceInfo { name: "cpu".to_owned() }).collect(),
        site_json: None,
        models: models.iter().map(|name| model(name)).collect(),
        store: STORE.to_owned(),
        roles: Roles::ALL,
        labels: BTreeMap::new(),
        crash: None,
        running: Vec::new(),
        helping: Vec::new(),
        heard: StopNo::default(),
    }
}

/// An attempt that has these devices left.
pub fn listed_on(key: AttemptKey, devices: &[u32]) -> RunningAttempt {
    RunningAttempt {
        key,
        progress: Progress { stage: Stage::Denoise, done: 1, total: 2, eta_seconds: None },
        devices: devices.iter().copied().map(DeviceIndex).collect(),
    }
}

pub fn completed(key: AttemptKey) -> AttemptOutcome {
    let request: RenderRequest = serde_json::from_str(r#"{"prompt":"a"}"#).unwrap();
    let result = JobResult {
        job: key.job,
        attempt: key.attempt,
        epoch: key.epoch,
        node: node("a"),
        devices: vec![DeviceIndex(0)],
        decode: None,
        topology: Topology::SOLO,
        precision: Precision::default(),
        clip: key::clip(key.job, key.attempt),
        clip_bytes: 3,
        clip_sha256: "0".repeat(64),
        spec: RenderSpec::resolve(&request, &GenerationDefaults::default(), 1).unwrap(),
        model: "m".to_owned(),
        model_hash: "hash-of-m".to_owned(),
        program_version: "test".to_owned(),
        seconds: StageSeconds::default(),
        finished: jiff::Timestamp::UNIX_EPOCH,
        warnings: Vec::new(),
    };
    let result_json = serde_json::to_string(&result).unwrap();
    AttemptOutcome::Completed { accepted: key.attempt, result_json, warnings: Vec::new() }
}

pub fn failed(kind: FailureKind) -> AttemptOutcome {
    AttemptOutcome::Failed { kind, message: "out of luck".to_owned() }
}

impl World {
    pub fn new() -> Self {
        let limits = Limits::default();
        let store = STORE.to_owned();
        let farm =
            Farm::restore(limits.clone(), Epoch(1), store, Tiling::AUTO, Saved::default(), WALL, Time::default());
        Self {
            farm,
            limits,
            now: Time::default(),
            rows: BTreeMap::new(),
            saved: Saved::default(),
            sent: Vec::new(),
            changes: Vec::new(),
            notes: Vec::new(),
            started: Vec::new(),
            gangs: HashMap::new(),
            helped: Vec::new(),
            helping: HashMap::new(),
            seq: 0,
        }
    }

    /// Kill -9 and start again from what is committed.
    pub fn restart(&mut self) {
        let live = self.rows.values().filter(|row| !row.state.is_terminal()).map(|row| row.live.clone());
        let mut jobs: Vec<LiveJob> = live.collect();
        jobs.sort_by_key(|job| job.seq);
        let mut saved = Saved { jobs, ..self.saved.clone() };
        saved.batches.retain(|batch| saved.jobs.iter().any(|job| job.batches.contains(&batch.submission)));
        let epoch = Epoch(self.farm.epoch().0 + 1);
        self.helping.clear();
        // A new process counts from zero; going on is as good.
        let wall = WALL + self.now.0.as_millis() as i64;
        let store = STORE.to_owned();
        self.farm = Farm::restore(self.limits.clone(), epoch, store, Tiling::AUTO, saved, wall, self.now);
        self.check();
    }

    /// One event to its end, and a tick right after it: changes are committed, requests loaded.
    pub fn event(&mut self, event: Event) {
        self.sent.clear();
        self.changes.clear();
        let is_tick = matches!(event, Event::Tick);
        self.step(event);
        if !is_tick {
            self.step(Event::Tick);
        }
        self.check();
    }

    fn step(&mut self, event: Event) {
        let mut effects = self.farm.step(event, self.now);
        loop {
            let Effects { changes, sends, load, notes } = effects;
            for change in &changes {
                self.commit(change);
            }
            self.changes.extend(changes);
            sends.iter().for_each(|send| self.note_start(send));
            sends.iter().for_each(|send| self.note_help(send));
            self.sent.extend(sends);
            self.notes.extend(notes);
            if load.is_empty() {
                break;
            }
            let loaded =
                load.iter().map(|job| LoadedRequest { job: *job, request: self.rows[job].request.clone(), seed: 1 });
            effects = self.farm.step(Event::Loaded(loaded.collect()), self.now);
        }
    }

    pub fn wish(&mut self, wish: Wish) {
        self.event(Event::Wish { wish, by: "somebody".to_owned() });
    }

    pub fn cancel(&mut self, job: JobId) {
        self.wish(Wish::Cancel(job));
    }

    pub fn set_tenant(&mut self, name: &str, spec: TenantSpec) {
        self.wish(Wish::SetTenant(tenant(name), spec));
    }

    fn note_start(&mut self, send: &Send) {
        let ToNode::Start(start) = &send.message else { return };
        let spec: RenderSpec = serde_json::from_str(&start.spec_json).unwrap();
        let clip = clip_shape(Ask::default(), &GenerationDefaults::default()).unwrap();
        assert_eq!((spec.width, spec.height), (848, 480), "topologies are checked for the default size");
        start.topology.check(start.devices.len(), ModelShape::mochi1().heads, clip.tokens).unwrap();
        let entry = (start.key, send.node.clone(), send.boot);
        if !self.started.contains(&entry) {
            assert!(self.started.iter().all(|(key, ..)| *key != start.key), "an attempt has one owner");
            self.started.push(entry);
            self.gangs.insert(start.key, start.devices.clone());
        }
    }

    fn note_help(&mut self, send: &Send) {
        let ToNode::Help(help) = &send.message else { return };
        assert!(self.farm.lease(&help.key).is_some(), "nobody helps an attempt that is over");
        let entry = (help.key, help.device, send.node.clone(), send.boot);
        if !self.helped.contains(&entry) {
            let node = &self.farm.nodes[&send.node];
            assert!(node.roles.decode && node.models[help.model.as_str()].hash == help.model_hash);
            self.helped.push(entry);
        }
    }

    pub fn submit(&mut self, n: u64, priority: i32, model: Option<&str>) -> JobId {
        self.submit_request(n, priority, model, r#"{"prompt":"a"}"#)
    }

    pub fn submit_request(&mut self, n: u64, priority: i32, model: Option<&str>, request: &str) -> JobId {
        let live = LiveJob { priority, model: model.map(str::to_owned), ..self.line(n) };
        self.submit_line(live, request)
    }

    /// A line of a prompt file, as job number `n`.
    pub fn line(&self, n: u64) -> LiveJob {
        LiveJob {
            job: job_id(n),
            seq: n,
            priority: 0,
            model: None,
            tenant: TenantId::default(),
            batches: Vec::new(),
            ask: Ask::default(),
            require: BTreeMap::new(),
            after: Vec::new(),
            paused: false,
            submitted_ms: WALL + self.now.0.as_millis() as i64,
            attempt: AttemptNo(0),
            counts: Counts::default(),
            running: None,
        }
    }

    pub fn submit_line(&mut self, live: LiveJob, request: &str) -> JobId {
        let job = live.job;
        self.submit_all(vec![live], None, request);
        job
    }

    /// All lines at once, as a batch if it has a number.
    pub fn submit_all(&mut self, lines: Vec<LiveJob>, batch: Option<(u128, Option<u32>)>, request: &str) {
        let request: RenderRequest = serde_json::from_str(request).unwrap();
        let batch = batch.map(|(n, max_failures)| SavedBatch {
            submission: batch_id(n),
            max_failures,
            failed: 0,
            paused: false,
        });
        let mut queued = Vec::new();
        for mut live in lines {
            live.ask = Ask::of(&request);
            live.batches.extend(batch.as_ref().map(|batch| batch.submission));
            let row = Row {
                state: JobState::Queued,
                live: live.clone(),
                request: request.clone(),
                reason: None,
                outcomes: Vec::new(),
                times_done: 0,
            };
            assert!(self.rows.insert(live.job, row).is_none());
            queued.push(live);
        }
        self.saved.batches.extend(batch.clone());
        self.event(Event::Submitted(Submitted { batch, queued, joined: Vec::new() }));
    }

    pub fn message(&mut self, id: &str, boot: BootId, body: ToScheduler) {
        self.seq += 1;
        let helping = match &body {
            ToScheduler::Register(Registration { helping, .. }) | ToScheduler::Heartbeat { helping, .. } => {
                Some(helping.clone())
            }
            _ => None,
        };
        let envelope = Envelope { epoch: self.farm.epoch(), node: node(id), boot, seq: self.seq, body };
        self.event(Event::FromNode(Box::new(envelope)));
        let refused = |send: &Send| matches!(send.message, ToNode::Refused { .. } | ToNode::Reregister);
        let slot = |farm: &Farm, boot, device: DeviceIndex| {
            let node = farm.nodes.values().find(|node| node.boot == boot)?;
            Some(node.devices.get(device.0 as usize)?.slot.clone())
        };
        if let Some(mut helping) = helping.filter(|_| !self.sent.iter().any(refused)) {
            helping.retain(|help| {
                let slot = slot(&self.farm, boot, help.device);
                assert_ne!(slot, Some(Slot::Free), "a device that is listed is not free");
                matches!(slot, Some(Slot::Helping(known)) if known.key == help.key)
            });
            self.helping.insert(boot, helping);
        }
        for (boot, helping) in &self.helping {
            for help in helping {
                let slot = slot(&self.farm, *boot, help.device);
                let helps = slot.is_none_or(|slot| matches!(slot, Slot::Helping(known) if known.key == help.key));
                assert!(helps, "device {} is free or another's before its node says so", help.device);
            }
        }
    }

    pub fn register(&mut self, id: &str, boot: BootId, registration: Registration) {
        self.message(id, boot, ToScheduler::Register(registration));
    }

    pub fn heartbeat(&mut self, id: &str, boot: BootId, keys: &[AttemptKey]) {
        let running = keys.iter().map(|key| self.listed(*key)).collect();
        self.beat(id, boot, running, &[]);
    }

    /// A heartbeat in full.
    pub fn beat(&mut self, id: &str, boot: BootId, running: Vec<RunningAttempt>, helping: &[(AttemptKey, u32)]) {
        let helping = helping.iter().map(|(key, device)| Helping { key: *key, device: DeviceIndex(*device) }).collect();
        // Whatever it was told before.
        self.beat_having_heard(self.farm.stop, id, boot, running, helping);
    }

    pub fn beat_having_heard(
        &mut self,
        heard: StopNo,
        id: &str,
        boot: BootId,
        running: Vec<RunningAttempt>,
        helping: Vec<Helping>,
    ) {
        self.message(id, boot, ToScheduler::Heartbeat { running, helping, heard });
    }

    /// The attempt's latent is finished, and its decode has this many tiles.
    pub fn want_hands(&mut self, id: &str, boot: BootId, key: AttemptKey, round: u32, tiles: u32) {
        let (url, token) = ("http://there:1".to_owned(), "secret".to_owned());
        self.message(id, boot, ToScheduler::WantHands { key, round, tiles, url, token });
    }

    /// An attempt that has all its devices still.
    pub fn listed(&self, key: AttemptKey) -> RunningAttempt {
        let devices = self.gangs.get(&key).cloned().unwrap_or_default();
        RunningAttempt { devices, ..listed_on(key, &[]) }
    }

    pub fn report(&mut self, id: &str, boot: BootId, key: AttemptKey, outcome: AttemptOutcome) {
        self.message(id, boot, ToScheduler::Report { number: 7, report: AttemptReport { key, outcome } });
    }

    pub fn pass(&mut self, span: Duration) {
        // In steps, as ticks come: a single jump would be taken for a pause of the scheduler.
        let step = Duration::from_millis(500);
        let end = self.now + span;
        while self.now < end {
            self.now = (self.now + step).min(end);
            self.event(Event::Tick);
        }
    }

    /// Time passes while these nodes go on reporting.
    pub fn pass_with(&mut self, span: Duration, beats: &[(&str, BootId, &[AttemptKey])]) {
        let end = self.now + span;
        while self.now < end {
            self.pass(Duration::from_millis(500));
            for (id, boot, keys) in beats {
                self.heartbeat(id, *boot, keys);
            }
        }
    }

    pub fn state(&self, job: JobId) -> JobState {
        self.rows[&job].state
    }

    pub fn reason(&self, job: JobId) -> String {
        self.farm.wait_reason(job).unwrap_or_default()
    }

    /// Commands to start in the newest event.
    pub fn starts(&self) -> Vec<(NodeId, StartAttempt)> {
        let start = |send: &Send| match &send.message {
            ToNode::Start(start) => Some((send.node.clone(), (**start).clone())),
            _ => None,
        };
        self.sent.iter().filter_map(start).collect()
    }

    /// The one command to start in the newest event.
    pub fn start(&self) -> StartAttempt {
        let starts = self.starts();
        assert_eq!(starts.len(), 1, "{:?}", self.sent);
        starts[0].1.clone()
    }

    pub fn aborts(&self) -> Vec<AttemptKey> {
        let abort = |send: &Send| match &send.message {
            ToNode::Abort { key, .. } => Some(*key),
            _ => None,
        };
        self.sent.iter().filter_map(abort).collect()
    }

    /// The one answer to a wish for hands in the newest event: devices that the attempt keeps, and the number of helpers.
    pub fn hands(&self) -> (Vec<u32>, u32) {
        let answer = |send: &Send| match &send.message {
            ToNode::Hands { keep, helpers, .. } => Some((keep.iter().map(|device| device.0).collect(), *helpers)),
            _ => None,
        };
        let answers: Vec<_> = self.sent.iter().filter_map(answer).collect();
        assert_eq!(answers.len(), 1, "{:?}", self.sent);
        answers[0].clone()
    }

    /// Who was told to help in the newest event.
    pub fn helps(&self) -> Vec<(&str, HelpDecode)> {
        let help = |send: &'_ Send| match &send.message {
            ToNode::Help(help) => Some((**help).clone()),
            _ => None,
        };
        self.sent.iter().filter_map(|send| Some((send.node.0.as_str(), help(send)?))).collect()
    }

    /// The devices that were told to help in the newest event.
    pub fn helpers(&self) -> Vec<(&str, u32)> {
        self.helps().into_iter().map(|(id, help)| (id, help.device.0)).collect()
    }

    /// The devices that were told to stop helping in the newest event.
    pub fn dismissed(&self) -> Vec<(&str, AttemptKey, u32)> {
        let dismissal = |send: &'_ Send| match send.message {
            ToNode::Dismiss { key, device, .. } => Some((key, device.0)),
            _ => None,
        };
        let dismissed = self.sent.iter().filter_map(|send| Some((send.node.0.as_str(), dismissal(send)?)));
        dismissed.map(|(id, (key, device))| (id, key, device)).collect()
    }

    pub fn refusal(&self) -> String {
        match &self.sent[0].message {
            ToNode::Refused { reason } => reason.clone(),
            other => panic!("not refused: {other:?}"),
        }
    }

    pub fn retry(&mut self, job: JobId) {
        let row = self.rows[&job].live.clone();
        self.wish(Wish::Retry(row));
    }

    /// What the database does, with its refusals.
    fn commit(&mut self, change: &Change) {
        let wall = WALL + self.now.0.as_millis() as i64;
        match change {
            Change::Started { start, node, boot, base, .. } => {
                let row = self.row(start.key.job, &[JobState::Queued]);
                assert_eq!(start.key.attempt.0, row.live.attempt.0 + 1, "attempts count up");
                row.live.attempt = start.key.attempt;
                row.live.model = Some(start.model.clone());
                assert!(base.is_finite() && *base >= 0.0);
                row.live.running = Some(Box::new(LiveAttempt {
                    key: start.key,
                    node: node.clone(),
                    boot: *boot,
                    devices: start.devices.clone(),
                    clip: Clip {
                        model: start.model.clone(),
                        model_hash: start.model_hash.clone(),
                        spec_json: start.spec_json.clone(),
                    },
                    started_ms: wall,
                    base: *base,
                }));
                row.outcomes.push("running");
                row.state = JobState::Running;
            }
            Change::AttemptEnded { key, outcome, device_ms, .. } => {
                let row = self.row(key.job, &[JobState::Running]);
                let running = row.live.running.take().expect("an attempt runs");
                assert_eq!(running.key, *key);
                *row.outcomes.last_mut().unwrap() = outcome.as_str();
                if *outcome == Outcome::Completed {
                    assert_eq!(row.times_done, 0);
                }
                let (tenant, hour) = (row.live.tenant.clone(), wall / 3_600_000);
                self.saved.usage.push(SavedUsage { tenant, hour, device_ms: *device_ms });
            }
            Change::Done { job, .. } => {
                let row = self.row(*job, &[JobState::Running]);
                row.state = JobState::Done;
                row.times_done += 1;
                assert_eq!(row.times_done, 1, "done at most once");
                let done = *job;
                for row in self.rows.values_mut() {
                    row.live.after.retain(|after| *after != super::events::Dependency::Job(done));
                }
            }
            Change::Requeued { job, counts } => {
                let row = self.row(*job, &[JobState::Running]);
                row.live.counts = *counts;
                row.state = JobState::Queued;
            }
            Change::Counted { job, counts } => {
                self.row(*job, &[JobState::Queued, JobState::Running]).live.counts = *counts;
            }
            Change::Failed { job, reason } => {
                let row = self.row(*job, &[JobState::Queued, JobState::Running]);
                row.reason = Some(reason.clone());
                row.state = JobState::Failed;
                let batches = row.live.batches.clone();
                self.saved.batches.iter_mut().filter(|b| batches.contains(&b.submission)).for_each(|b| b.failed += 1);
            }
            Change::Cancelled { job } => {
                self.row(*job, &[JobState::Queued, JobState::Running]).state = JobState::Cancelled;
            }
            Change::Retried { job } => {
                let row = self.row(*job, &[JobState::Failed, JobState::Cancelled]);
                (row.live.counts, row.reason) = (Counts::default(), None);
                row.state = JobState::Queued;
            }
            Change::Paused { scope, paused } => match scope {
                Scope::Farm => self.saved.paused = *paused,
                Scope::Tenant(id) => self.tenant_row(id).paused = *paused,
                Scope::Batch(id) => {
                    let of = self.saved.batches.iter_mut().filter(|batch| batch.submission == *id);
                    of.for_each(|batch| batch.paused = *paused);
                }
                Scope::Job(job) => self.row(*job, &[JobState::Queued, JobState::Running]).live.paused = *paused,
            },
            Change::Drained { node, drained } => {
                self.saved.drained.retain(|known| known != node);
                self.saved.drained.extend(drained.then(|| node.clone()));
            }
            Change::Tenant { tenant, spec } => self.tenant_row(tenant).spec = spec.clone(),
            Change::Audit { by, .. } => assert_eq!(by, "somebody"),
            Change::Log { job, .. } => assert!(self.rows.contains_key(job)),
        }
    }

    fn tenant_row(&mut self, id: &TenantId) -> &mut SavedTenant {
        let known = self.saved.tenants.iter().position(|tenant| tenant.tenant == *id);
        let at = known.unwrap_or(self.saved.tenants.len());
        if known.is_none() {
            self.saved.tenants.push(SavedTenant { tenant: id.clone(), spec: TenantSpec::default(), paused: false });
        }
        &mut self.saved.tenants[at]
    }

    fn row(&mut self, job: JobId, expected: &[JobState]) -> &mut Row {
        let row = self.rows.get_mut(&job).expect("the job exists");
        assert!(expected.contains(&row.state), "job {job} is {:?}, not one of {expected:?}", row.state);
        row
    }

    /// What must hold after every event.
    pub fn check(&self) {
        for (id, row) in &self.rows {
            let attempt = row.live.running.as_ref();
            assert_eq!(attempt.is_some(), row.state == JobState::Running, "job {id}");
            match self.farm.jobs.get(id).map(|job| &job.phase) {
                None => assert!(row.state.is_terminal(), "job {id} is forgotten"),
                Some(Phase::Running(lease)) => {
                    assert_eq!(Some(lease.key), attempt.map(|attempt| attempt.key));
                    let granted = &self.gangs[&lease.key];
                    assert!(lease.devices.iter().all(|device| granted.contains(device)), "a lease only shrinks");
                }
                Some(Phase::Waiting | Phase::Held | Phase::Picked(_) | Phase::Delayed { .. }) => {
                    assert_eq!(row.state, JobState::Queued);
                    assert!(!self.reason(*id).is_empty(), "every queued job has a reason");
                }
            }
        }
        assert!(self.farm.jobs.keys().all(|job| self.rows.contains_key(job)));
        let queue = self.farm.queue_view();
        assert_eq!(queue.waiting.values().sum::<u64>(), queue.queued, "every queued job has one reason");
        let mut reasons = BTreeMap::new();
        for reason in self.farm.jobs.keys().filter_map(|job| self.farm.reason(*job)) {
            *reasons.entry(reason.code).or_insert(0) += 1;
        }
        assert_eq!(queue.waiting, reasons, "those of single jobs add up to those of the queue");
    }
}
