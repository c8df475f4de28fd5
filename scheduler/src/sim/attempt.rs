//! What an attempt does on its node: loads, denoises, asks for hands, decodes, uploads, creates the manifest, reports.

use std::sync::Arc;

use farm_core::api::{JobResult, StageSeconds};
use farm_core::id::{AttemptKey, AttemptNo, DeviceIndex};
use farm_core::job::state::{FailureKind, Progress, Stage};
use farm_core::precision::Precision;
use farm_core::store::key;
use farm_core::tiles::plan::Tiling;
use farm_core::wire::to_node::StartAttempt;
use farm_core::wire::to_scheduler::{AttemptOutcome, RunningAttempt};

use super::Ms;
use super::hardware::{Holder, Reserve};
use super::plan::Trait;
use super::store::index_of;
use super::world::{Due, World};

/// Steps between two stored latents.
const CHECKPOINT: u32 = 8;
/// A node that gets no answer to its wish for hands begins by itself.
const PATIENCE: Ms = 5_000;
/// Rounds of wishes.
const ROUNDS: u32 = 4;

pub struct Wish {
    pub round: u32,
    pub tiles: u32,
    pub resend: Ms,
}

pub struct Run {
    pub key: AttemptKey,
    start: StartAttempt,
    /// Of its lease, not given back.
    pub devices: Vec<DeviceIndex>,
    pub stage: Stage,
    since: Ms,
    /// Counts what it waits for; what is due for an earlier turn is over.
    turn: u32,
    first_step: u32,
    steps: u32,
    step_ms: Ms,
    pub wish: Option<Wish>,
    rounds: u32,
    pub yielding: bool,
    /// It has its devices.
    granted: bool,
    pub hangs: bool,
    /// The failure that it is heading for.
    fate: Option<FailureKind>,
    helpers: u32,
}

impl Run {
    pub fn new(start: StartAttempt, now: Ms) -> Self {
        Self {
            key: start.key,
            devices: start.devices.clone(),
            start,
            stage: Stage::Starting,
            since: now,
            turn: 0,
            first_step: 0,
            steps: 1,
            step_ms: 1,
            wish: None,
            rounds: 0,
            yielding: false,
            granted: false,
            hangs: false,
            fate: None,
            helpers: 0,
        }
    }

    /// Steps that are done.
    fn step(&self, now: Ms) -> u32 {
        match self.stage {
            Stage::Starting | Stage::Text => self.first_step,
            Stage::Denoise if self.hangs => self.first_step,
            Stage::Denoise => (self.first_step + ((now - self.since) / self.step_ms) as u32).min(self.steps),
            Stage::Decode | Stage::Upload => self.steps,
        }
    }

    pub fn listed(&self, now: Ms) -> RunningAttempt {
        let done = self.step(now);
        // Whatever a node predicts, it is only believed as far as it makes sense.
        let left = u64::from(self.steps - done) * self.step_ms;
        let eta_seconds = match (self.key.job.0.as_u128() % 7, self.stage) {
            (0, _) => None,
            (1, _) => Some(f32::NAN),
            (_, Stage::Denoise) => Some(left as f32 / 1000.0),
            _ => None,
        };
        let progress = Progress { stage: self.stage, done, total: self.steps, eta_seconds };
        RunningAttempt { key: self.key, progress, devices: self.devices.clone() }
    }

    /// An attempt that has ended and whose report is not acknowledged.
    pub fn reported(key: AttemptKey) -> RunningAttempt {
        let progress = Progress { stage: Stage::Upload, done: 1, total: 1, eta_seconds: None };
        RunningAttempt { key, progress, devices: Vec::new() }
    }
}

impl World {
    pub fn begin(&mut self, n: usize, start: StartAttempt) {
        let (key, now) = (start.key, self.now);
        let devices = start.devices.clone();
        self.nodes[n].running.push(Run::new(start, now));
        let late = self.is_late(&key);
        match self.nodes[n].devices.reserve(Holder::Attempt(key), &devices, late, now) {
            Reserve::Granted => self.granted(n, Holder::Attempt(key)),
            Reserve::Queued => {}
            Reserve::Busy(excused) => {
                self.collision(n, key, &devices, excused);
                let message = "a device is busy".to_owned();
                self.end(n, key, AttemptOutcome::Failed { kind: FailureKind::Device, message });
            }
        }
    }

    /// It has its devices now.
    fn granted(&mut self, n: usize, holder: Holder) {
        let Holder::Attempt(key) = holder else {
            let Holder::Help(key, device) = holder else { return };
            return self.helper_begins(n, key, device);
        };
        if self.nodes[n].run(key).is_none() {
            return;
        }
        let gang: Vec<DeviceIndex> = self.nodes[n].devices.of(holder).map(|(device, _)| device).collect();
        let now = self.now;
        let Some(run) = self.nodes[n].run(key) else { return };
        run.granted = true;
        let mut wanted = run.start.devices.clone();
        wanted.sort();
        if gang != wanted {
            return self.fail("I8", format!("attempt {key} has {gang:?} of {wanted:?}"));
        }
        let (since, takes) = (now, self.random.between(200, 2_000));
        self.draw_fate(n, key);
        if let Some(run) = self.nodes[n].run(key) {
            run.since = since;
        }
        self.next_stage(n, key, takes);
    }

    /// How it will go, and how fast.
    fn draw_fate(&mut self, n: usize, key: AttemptKey) {
        let index = index_of(key.job);
        let Some(row) = self.store.rows.get(index) else { return };
        let (is, request) = (row.is, row.request.clone());
        let kinds = &self.plan.kinds;
        let kind = kinds.iter().find(|kind| kind.request.height == request.height).unwrap_or(&kinds[0]);
        let (seconds, steps) = (kind.seconds, kind.steps);
        let luck = self.plan.luck;
        let odd = self.random.pick(&[0.7, 0.9, 1.0, 1.0, 1.2, 4.0]);
        let first_step = self.bucket.latent(key.job).min(steps);
        let draws = [luck.device_fails, luck.out_of_memory, luck.hangs].map(|chance| self.random.chance(chance));
        let Some(run) = self.nodes[n].run(key) else { return };
        let devices = run.devices.len().max(1);
        let smaller_tiles = run.start.tiling != Tiling::AUTO;
        run.fate = match is {
            Trait::Bad => Some(FailureKind::Input),
            Trait::Large(least) if (devices as u32) < least => Some(FailureKind::OutOfMemory),
            _ if draws[0] => Some(FailureKind::Device),
            _ if draws[1] && devices == 1 => Some(FailureKind::OutOfMemory),
            _ => None,
        };
        let _ = smaller_tiles;
        run.hangs = draws[2];
        run.first_step = first_step;
        run.steps = steps;
        let total = 1000.0 * seconds * odd / (devices as f64).powf(0.8);
        run.step_ms = ((total / f64::from(steps)) as Ms).max(1);
    }

    /// Something is due for the attempt after a while.
    fn next_stage(&mut self, n: usize, key: AttemptKey, takes: Ms) {
        let boots = self.nodes[n].boots;
        let Some(run) = self.nodes[n].run(key) else { return };
        run.turn += 1;
        let turn = run.turn;
        self.after(takes, Due::Stage { node: n, boots, key, turn });
    }

    pub fn stage_over(&mut self, n: usize, key: AttemptKey, turn: u32) {
        let Some(run) = self.nodes[n].run(key).filter(|run| run.turn == turn) else { return };
        match run.stage {
            Stage::Starting | Stage::Text => self.started(n, key),
            Stage::Denoise => self.denoised(n, key),
            Stage::Decode => self.decoded(n, key),
            Stage::Upload => self.uploaded(n, key),
        }
    }

    fn fail_run(&mut self, n: usize, key: AttemptKey, kind: FailureKind) {
        self.count(match kind {
            FailureKind::Input => "attempt with a bad input",
            FailureKind::Device => "attempt failed by its device",
            FailureKind::Store => "attempt failed by the bucket",
            FailureKind::OutOfMemory => "attempt out of memory",
            FailureKind::NodeLost => "attempt lost",
        });
        self.checkpoint(n, key);
        let message = format!("{} on n{n}", kind.as_str());
        self.end(n, key, AttemptOutcome::Failed { kind, message });
    }

    fn started(&mut self, n: usize, key: AttemptKey) {
        let now = self.now;
        if let Some((accepted, json)) = self.bucket.result(key.job).cloned() {
            return self.complete(n, key, accepted, &json);
        }
        let broken = self.nodes[n]
            .devices
            .of(Holder::Attempt(key))
            .any(|(device, _)| self.nodes[n].devices.broken[device.0 as usize] > now);
        let Some(run) = self.nodes[n].run(key) else { return };
        if broken || run.fate == Some(FailureKind::Input) {
            let kind = if broken { FailureKind::Device } else { FailureKind::Input };
            return self.fail_run(n, key, kind);
        }
        if run.yielding {
            let step = run.first_step;
            return self.end(n, key, AttemptOutcome::Interrupted { step });
        }
        run.stage = Stage::Denoise;
        run.since = now;
        if run.hangs {
            return self.count("group hangs");
        }
        let takes = u64::from(run.steps - run.first_step) * run.step_ms;
        // A failure comes somewhere on the way.
        let fails = run.fate.is_some();
        let poison = self.store.rows.get(index_of(key.job)).is_some_and(|row| row.is == Trait::Poison);
        let takes = if fails || poison { self.random.below(takes + 1) } else { takes };
        self.next_stage(n, key, takes.max(1));
    }

    fn denoised(&mut self, n: usize, key: AttemptKey) {
        let now = self.now;
        if self.store.rows.get(index_of(key.job)).is_some_and(|row| row.is == Trait::Poison) {
            self.count("node killed by its job");
            let down = self.random.between(500, 5_000);
            return self.kill_node(n, Some(true), down);
        }
        let Some(run) = self.nodes[n].run(key) else { return };
        if let Some(kind) = run.fate {
            return self.fail_run(n, key, kind);
        }
        let step = run.step(now);
        if run.yielding && step < run.steps {
            return self.interrupt(n, key, step);
        }
        if self.bucket.fails > now {
            return self.fail_run(n, key, FailureKind::Store);
        }
        let Some(run) = self.nodes[n].run(key) else { return };
        let steps = run.steps;
        run.stage = Stage::Decode;
        run.since = now;
        self.bucket.keep_latent(key.job, steps);
        self.want_hands(n, key);
    }

    fn interrupt(&mut self, n: usize, key: AttemptKey, step: u32) {
        if self.bucket.fails <= self.now {
            self.bucket.keep_latent(key.job, step);
        }
        self.count("attempt handed back");
        self.end(n, key, AttemptOutcome::Interrupted { step });
    }

    /// The latents that a run has stored on its way.
    pub fn checkpoint(&mut self, n: usize, key: AttemptKey) {
        let now = self.now;
        if self.bucket.fails > now {
            return;
        }
        let Some(run) = self.nodes[n].run(key).filter(|run| run.granted) else { return };
        let step = run.step(now);
        let kept = if step == run.steps { step } else { step / CHECKPOINT * CHECKPOINT };
        self.bucket.keep_latent(key.job, kept);
    }

    /// The attempt is to be handed back at its next step.
    pub fn hand_over(&mut self, n: usize, key: AttemptKey) {
        let now = self.now;
        if let Some(report) = self.nodes[n].reports.iter_mut().find(|report| report.report.key == key) {
            report.resend = now;
            return self.wake_by(n, now);
        }
        let Some(run) = self.nodes[n].run(key).filter(|run| !run.yielding) else { return };
        run.yielding = true;
        if !run.granted {
            let holder = Holder::Attempt(key);
            self.nodes[n].devices.stop(holder);
            return self.end(n, key, AttemptOutcome::Interrupted { step: 0 });
        }
        if matches!(run.stage, Stage::Denoise) && !run.hangs && run.fate.is_none() {
            let done = (now - run.since) % run.step_ms;
            let takes = run.step_ms - done;
            self.next_stage(n, key, takes);
        }
    }

    fn want_hands(&mut self, n: usize, key: AttemptKey) {
        let height = self.store.rows.get(index_of(key.job)).and_then(|row| row.request.height);
        let tiles = self.plan.kinds.iter().find(|kind| kind.request.height == height).map_or(1, |kind| kind.tiles);
        let now = self.now;
        let Some(run) = self.nodes[n].run(key) else { return };
        run.rounds += 1;
        run.wish = Some(Wish { round: run.rounds, tiles, resend: now });
        self.wake_by(n, now);
        self.next_stage(n, key, PATIENCE);
    }

    /// The answer to its wish.
    pub fn hands(&mut self, n: usize, key: AttemptKey, round: u32, keep: Vec<DeviceIndex>, helpers: u32) {
        let Some(run) = self.nodes[n].run(key) else { return };
        if run.wish.as_ref().is_none_or(|wish| wish.round != round) {
            return;
        }
        run.wish = None;
        let lost = keep.iter().find(|device| !run.devices.contains(device)).copied();
        let had = run.devices.clone();
        run.devices.retain(|device| keep.contains(device));
        run.helpers = helpers;
        if let Some(device) = lost {
            return self.fail(
                "I1",
                format!("attempt {key} is to keep {keep:?} in round {round}; it has {had:?}: not {device}"),
            );
        }
        self.let_go(n, Holder::Attempt(key), &keep);
        self.beat_now(n);
        self.decode(n, key);
    }

    fn decode(&mut self, n: usize, key: AttemptKey) {
        let slow = self.random.between(500, 6_000);
        let Some(run) = self.nodes[n].run(key) else { return };
        let hands = run.devices.len() as u64 + u64::from(run.helpers);
        let takes = slow.checked_div(hands).map_or(PATIENCE, |share| 200 + share);
        self.next_stage(n, key, takes);
    }

    fn decoded(&mut self, n: usize, key: AttemptKey) {
        let Some(run) = self.nodes[n].run(key) else { return };
        if run.wish.take().is_some() && !run.devices.is_empty() {
            // Nobody has answered: its first device begins.
            let keep = vec![run.devices[0]];
            run.devices.truncate(1);
            self.let_go(n, Holder::Attempt(key), &keep);
            self.beat_now(n);
            return self.decode(n, key);
        }
        let Some(run) = self.nodes[n].run(key) else { return };
        let (own, rounds, tiling) = (!run.devices.is_empty(), run.rounds, run.start.tiling);
        let helped = self.truth.get(&key).is_some_and(|truth| {
            truth.helpers.iter().any(|(node, boots, device)| {
                let holder = Holder::Help(key, *device);
                self.nodes[*node].is(*boots) && self.nodes[*node].devices.of(holder).any(|(_, hold)| !hold.stopping)
            })
        });
        if !own && !helped {
            if rounds >= ROUNDS {
                return self.fail_run(n, key, FailureKind::Device);
            }
            return self.want_hands(n, key);
        }
        let is = self.store.rows.get(index_of(key.job)).map(|row| row.is);
        if is == Some(Trait::LargeTiles) && tiling == Tiling::AUTO {
            return self.fail_run(n, key, FailureKind::OutOfMemory);
        }
        self.decode_over(key);
        let now = self.now;
        let Some(run) = self.nodes[n].run(key) else { return };
        run.stage = Stage::Upload;
        run.since = now;
        run.devices.clear();
        self.let_go(n, Holder::Attempt(key), &[]);
        self.beat_now(n);
        let typical = if self.bucket.slow > now { 8_000 } else { 200 };
        let takes = self.random.span(typical, 30_000);
        self.next_stage(n, key, takes);
    }

    /// Nobody's hands are wanted any more: helpers notice, sooner or later.
    pub fn decode_over(&mut self, key: AttemptKey) {
        let Some(truth) = self.truth.get_mut(&key) else { return };
        if std::mem::replace(&mut truth.decoded, true) {
            return;
        }
        for (node, boots, device) in truth.helpers.clone() {
            let takes =
                if self.random.chance(0.9) { self.random.between(10, 300) } else { self.random.between(1_000, 20_000) };
            self.after(takes, Due::HelpOver { node, boots, key, device });
        }
    }

    /// A device of some node is there for the attempt's decode.
    pub fn helper_begins(&mut self, n: usize, key: AttemptKey, device: DeviceIndex) {
        let boots = self.nodes[n].boots;
        if self.truth.get(&key).is_none_or(|truth| truth.decoded) {
            let takes = self.random.between(100, 3_000);
            self.after(takes, Due::HelpOver { node: n, boots, key, device });
        }
    }

    fn uploaded(&mut self, n: usize, key: AttemptKey) {
        if self.bucket.fails > self.now {
            return self.fail_run(n, key, FailureKind::Store);
        }
        let json = self.manifest(n, key);
        let created = self.bucket.create(key.job, key.attempt, json);
        if created && self.random.chance(self.plan.luck.put_unanswered) {
            // It is there, but nobody has said so: tried again, it is refused, and found.
            self.count("manifest created without an answer");
        } else if !created {
            self.count("manifest refused");
        }
        if let Some((accepted, json)) = self.bucket.result(key.job).cloned() {
            self.complete(n, key, accepted, &json);
        }
    }

    fn complete(&mut self, n: usize, key: AttemptKey, accepted: AttemptNo, json: &Arc<str>) {
        let result_json = json.to_string();
        self.end(n, key, AttemptOutcome::Completed { accepted, result_json, warnings: Vec::new() });
    }

    fn manifest(&mut self, n: usize, key: AttemptKey) -> Arc<str> {
        let node = self.nodes[n].id.clone();
        let Some(run) = self.nodes[n].run(key) else { return "".into() };
        let StartAttempt { devices, topology, model, model_hash, spec_json, .. } = run.start.clone();
        let Ok(spec) = serde_json::from_str(&spec_json) else {
            self.fail("I3", format!("the spec of attempt {key} does not parse"));
            return "".into();
        };
        let result = JobResult {
            job: key.job,
            attempt: key.attempt,
            epoch: key.epoch,
            node,
            devices,
            topology,
            precision: Precision::default(),
            decode: None,
            clip: key::clip(key.job, key.attempt),
            clip_bytes: 1,
            clip_sha256: "0".repeat(64),
            spec,
            model,
            model_hash,
            program_version: "simulated".to_owned(),
            seconds: StageSeconds::default(),
            finished: jiff::Timestamp::UNIX_EPOCH,
            warnings: Vec::new(),
        };
        serde_json::to_string(&result).unwrap_or_default().into()
    }

    /// The holder has let go of all devices but `keep`; others may get theirs.
    pub fn let_go(&mut self, n: usize, holder: Holder, keep: &[DeviceIndex]) {
        let (held, granted) = self.nodes[n].devices.release(holder, keep, self.now);
        let (Holder::Attempt(key) | Holder::Help(key, _)) = holder;
        self.truth.entry(key).or_default().held += held;
        if keep.is_empty() {
            self.help_ended(n, holder);
        }
        granted.into_iter().for_each(|holder| self.granted(n, holder));
    }
}
