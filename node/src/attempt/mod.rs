//! One attempt from its lease to its report: denoise, decode, upload, and create the result that decides which attempt
//! counts.
//!
//! The devices of the lease denoise together ([`gang`]). The finished latent goes to the store; then whatever devices the
//! scheduler names decode it ([`decode`]), those of the lease or others, and the rest of the lease is given back.

mod decode;
mod gang;
pub mod help;
mod memory;
mod result;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use farm_core::api::{DecodeRecord, JobResult, StageSeconds};
use farm_core::id::{AttemptKey, DeviceIndex, NodeId};
use farm_core::job::spec::RenderSpec;
use farm_core::job::state::{FailureKind, Progress, Stage};
use farm_core::model::config::VaeConfig;
use farm_core::model::latent::LatentCheckpoint;
use farm_core::model::pipeline::Start;
use farm_core::parallel::cost::{ModelShape, Site};
use farm_core::precision::Precision;
use farm_core::store::artifact::{ArtifactStore, StoreError};
use farm_core::store::key;
use farm_core::wire::to_node::StartAttempt;
use farm_core::wire::to_scheduler::AttemptOutcome;
use tokio::sync::mpsc;

use self::decode::ClipDecode;
use crate::checkpoints::Checkpoints;
use crate::data_plane::DataPlane;
use crate::decode as tiles;
use crate::device_thread::{Denoised, DeviceHandle, Monitor, Orders, RenderError, Reservation};
use crate::progress::ProgressCell;
use crate::scratch::Scratch;

/// Longest failure message of a report.
const MAX_MESSAGE_BYTES: usize = 4096;

/// What all attempts of a node share.
pub struct Workshop {
    pub node: NodeId,
    pub store: ArtifactStore,
    pub scratch: Arc<Scratch>,
    pub devices: Vec<DeviceHandle>,
    /// By name.
    pub models: HashMap<String, Offered>,
    /// Steps between two latent checkpoints of a clip; 0 for none.
    pub checkpoint_steps: u32,
    /// What the devices are, if their memory is limited.
    pub memory: Option<Site>,
    /// Of all devices.
    pub precision: Precision,
    /// A scheduler that has not said by then who decodes is away; one of the lease's own devices begins.
    pub alone_after: Duration,
    /// Lets other nodes' devices join decodes, and this node's join others'.
    pub data: DataPlane,
    /// Takes lines for jobs' logs.
    pub log: Box<dyn Fn(AttemptKey, String) + Send + Sync>,
    /// Told which attempts hold devices, before they get them and after they have given them back.
    pub holding: Box<Holding>,
    /// Asks the scheduler for devices to decode on.
    pub want_hands: Box<dyn Fn(AttemptKey, HandsWanted) + Send + Sync>,
}

type Holding = dyn Fn(&[AttemptKey]) + Send + Sync;

/// A model that the node has.
#[derive(Clone)]
pub struct Offered {
    /// Content hash of the checkpoint.
    pub hash: String,
    pub shape: ModelShape,
    pub vae: VaeConfig,
}

/// The devices of an attempt's lease that it has not given back. Dropping one gives it back.
pub type Lease = BTreeMap<DeviceIndex, Reservation>;

/// What an attempt asks for when its latent is finished.
#[derive(Clone, Debug)]
pub struct HandsWanted {
    pub round: u32,
    pub tiles: u32,
    /// Where hands join, and with what.
    pub url: String,
    pub token: String,
}

/// What it gets.
#[derive(Clone, Debug)]
pub struct Hands {
    pub round: u32,
    /// Devices of the lease that decode; the others are to be given back.
    pub keep: Vec<DeviceIndex>,
    /// Devices that will join through the data plane.
    pub helpers: u32,
}

impl Workshop {
    /// The model of that name, if it is the very one. If not it is not the input's fault: another node may have it.
    fn model(&self, name: &str, hash: &str) -> Result<&Offered, Failure> {
        match self.models.get(name) {
            None => Err(Failure::new(FailureKind::Device, format!("this node has no model named {name}"))),
            Some(model) if model.hash != hash => Err(Failure::new(
                FailureKind::Device,
                format!("model {name} is {} on this node, the job wants {hash}", model.hash),
            )),
            Some(model) => Ok(model),
        }
    }
}

#[derive(Debug)]
struct Failure {
    kind: FailureKind,
    message: String,
}

impl Failure {
    fn new(kind: FailureKind, message: impl ToString) -> Self {
        Self { kind, message: message.to_string() }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::new(FailureKind::Store, error)
    }
}

impl From<RenderError> for Failure {
    fn from(error: RenderError) -> Self {
        match error {
            RenderError::Failed { kind, message } => Self { kind, message },
            RenderError::Group(error) => Self::new(FailureKind::Device, error),
            // Whoever stopped it does not wait for this, and a hand-over is no failure where it is asked for.
            error @ (RenderError::Stopped | RenderError::HandedOver { .. }) => Self::new(FailureKind::Device, error),
        }
    }
}

/// Runs the attempt to its end. Devices are given back as soon as they have nothing more to do: those that do not decode
/// when the latent is finished, the others with their last tile. [`Orders::stop`] ends the devices' part at their next
/// step; dropping the future ends ours. `hands` brings the answers to what is asked for.
pub async fn run(
    workshop: Arc<Workshop>,
    start: StartAttempt,
    lease: Lease,
    hands: mpsc::Receiver<Hands>,
    progress: ProgressCell,
    orders: Orders,
) -> AttemptOutcome {
    let attempt = start.key;
    let outcome = match attempt_clip(&workshop, &start, lease, hands, progress, orders).await {
        Ok(outcome) => outcome,
        Err(Failure { kind, mut message }) => {
            if message.len() > MAX_MESSAGE_BYTES {
                message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
                message.push('…');
            }
            AttemptOutcome::Failed { kind, message }
        }
    };
    match &outcome {
        AttemptOutcome::Completed { accepted, .. } => tracing::info!(%attempt, %accepted, "attempt completed"),
        AttemptOutcome::Interrupted { step } => tracing::info!(%attempt, step, "attempt handed back"),
        AttemptOutcome::Failed { kind, message } => {
            tracing::warn!(%attempt, kind = kind.as_str(), %message, "attempt failed");
            (workshop.log)(attempt, format!("failed ({}): {message}", kind.as_str()));
        }
    }
    outcome
}

async fn attempt_clip(
    workshop: &Arc<Workshop>,
    start: &StartAttempt,
    lease: Lease,
    hands: mpsc::Receiver<Hands>,
    progress: ProgressCell,
    orders: Orders,
) -> Result<AttemptOutcome, Failure> {
    let began = Instant::now();
    let attempt = start.key;
    let log = {
        let workshop = workshop.clone();
        Arc::new(move |line: String| {
            tracing::info!(%attempt, "{line}");
            (workshop.log)(attempt, line);
        })
    };
    let monitor = Monitor::new(progress, orders, log);

    let spec: RenderSpec = serde_json::from_str(&start.spec_json)
        .map_err(|e| Failure::new(FailureKind::Input, format!("the spec cannot be rendered: {e}")))?;
    let checkpoints = Checkpoints {
        store: workshop.store.clone(),
        folder: key::latents(attempt.job),
        spec: Arc::new(spec.clone()),
        model_hash: start.model_hash.as_str().into(),
        precision: workshop.precision,
    };

    // An earlier attempt may have finished without the scheduler hearing of it: then there is nothing to do.
    if workshop.store.head(&key::result(attempt.job)).await?.is_some() {
        monitor.log(format!("{}: the result exists already", workshop.node));
        checkpoints.clear().await;
        return result::existing_result(workshop, attempt).await;
    }

    let model = workshop.model(&start.model, &start.model_hash)?;
    let shape = tiles::shape(start.tiling, spec.latent_shape(), &model.vae).map_err(|error| {
        Failure::new(FailureKind::Input, format!("cannot be decoded with --tiles {}: {error}", start.tiling))
    })?;
    let scratch_failure = |e| Failure::new(FailureKind::Device, format!("cannot use the scratch folder: {e}"));
    // Shared with the encoder's thread, which may still write when this future is gone.
    let folder = Arc::new(workshop.scratch.attempt().map_err(scratch_failure)?);
    let clip = folder.path().join("clip.mp4");

    let latent = match latent(workshop, start, &checkpoints, &lease, &monitor).await? {
        Reached::Finished(latent) => latent,
        Reached::HandedOver => return Ok(AttemptOutcome::Interrupted { step: monitor.progress.saved() }),
    };
    if let Some(site) = &workshop.memory {
        memory::check_decode(&shape, &model.vae, site).inspect_err(|_| decode::begin(&spec, &monitor))?;
    }
    let decode = ClipDecode {
        workshop,
        start,
        spec: &spec,
        shape: shape.clone(),
        clip: clip.clone(),
        folder,
        monitor: &monitor,
    };
    let precision = latent.finished.precision;
    let stitched = decode.run(latent.finished, latent.stored, lease, hands).await?;
    for warning in &latent.warnings {
        monitor.log(format!("warning: {warning}"));
    }

    let upload_began = Instant::now();
    monitor.advance(Progress { stage: Stage::Upload, done: 0, total: 1, eta_seconds: None });
    let (clip_bytes, clip_sha256) = result::hash_file(&clip).await.map_err(scratch_failure)?;
    let clip_key = key::clip(attempt.job, attempt.attempt);
    workshop.store.put_file(&clip_key, &clip).await?;
    let upload = upload_began.elapsed().as_secs_f64();
    let seconds = StageSeconds {
        text: latent.text_seconds,
        denoise: latent.denoise_seconds,
        decode: stitched.decode_seconds,
        encode: stitched.encode_seconds,
        upload,
        total: began.elapsed().as_secs_f64(),
    };
    let result = JobResult {
        job: attempt.job,
        attempt: attempt.attempt,
        epoch: attempt.epoch,
        node: workshop.node.clone(),
        devices: start.devices.clone(),
        topology: start.topology,
        // An earlier attempt may have made the latent elsewhere.
        precision,
        decode: Some(DecodeRecord {
            tiling: start.tiling,
            mode: shape.plan.mode,
            grid: shape.plan.grid,
            tiles: shape.plan.tiles.clone(),
            hands: stitched.hands,
        }),
        clip: clip_key,
        clip_bytes,
        clip_sha256,
        spec,
        model: start.model.clone(),
        model_hash: start.model_hash.clone(),
        program_version: farm_core::VERSION.to_owned(),
        seconds,
        finished: jiff::Timestamp::now(),
        warnings: latent.warnings,
    };
    let outcome = result::publish(workshop, attempt, result).await?;
    checkpoints.clear().await;
    Ok(outcome)
}

/// A finished latent that is in the store.
struct Latent {
    finished: Arc<LatentCheckpoint>,
    /// As it is stored.
    stored: Bytes,
    text_seconds: f64,
    denoise_seconds: f64,
    warnings: Vec<String>,
}

/// How far an attempt comes before its decode.
enum Reached {
    Finished(Latent),
    /// It is to go on elsewhere, from the last latent in the store.
    HandedOver,
}

/// The finished latent: an earlier attempt's, or made by the devices of the lease. It is in the store when this returns, so
/// that nothing that happens to the decode makes anybody denoise again.
async fn latent(
    workshop: &Arc<Workshop>,
    start: &StartAttempt,
    checkpoints: &Checkpoints,
    lease: &Lease,
    monitor: &Monitor,
) -> Result<Reached, Failure> {
    let spec = &checkpoints.spec;
    // A first attempt has nothing to go on with.
    let from = if start.key.attempt.0 > 1 { checkpoints.latest(&|note| monitor.log(note)).await } else { None };
    let (denoised, precision) = match from {
        Some(finished) if finished.step == spec.num_inference_steps => {
            monitor.log("the latent is finished already".to_owned());
            (Denoised { latent: finished.values, ..Denoised::default() }, finished.precision)
        }
        from => {
            if let Some(checkpoint) = &from {
                monitor.progress.save(checkpoint.step);
                monitor.log(format!("resumed at step {} of {}", checkpoint.step, spec.num_inference_steps));
            }
            if monitor.hands_over() {
                return Ok(Reached::HandedOver);
            }
            if let Some(site) = &workshop.memory {
                memory::check_denoise(workshop.model(&start.model, &start.model_hash)?, spec, start.topology, site)?;
            }
            let from = from.map_or(Start::Seed, Start::Checkpoint);
            match gang::denoise(workshop, start, checkpoints, from, lease, monitor).await {
                Err(RenderError::HandedOver { step }) => {
                    let saved = monitor.progress.saved();
                    if saved < step {
                        monitor
                            .log(format!("the latent of step {step} is not stored; the last one is of step {saved}"));
                    }
                    return Ok(Reached::HandedOver);
                }
                denoised => (denoised?, checkpoints.precision),
            }
        }
    };
    let Denoised { latent, text_seconds, denoise_seconds, warnings } = denoised;
    let store_failure = |reason| Failure::new(FailureKind::Store, reason);
    let finished = LatentCheckpoint { step: spec.num_inference_steps, precision, values: latent };
    let finished = Arc::new(checkpoints.finish(finished).await.map_err(store_failure)?);
    let stored = checkpoints.bytes(finished.clone()).await.map_err(store_failure)?;
    monitor.progress.save(spec.num_inference_steps);
    Ok(Reached::Finished(Latent { finished, stored, text_seconds, denoise_seconds, warnings }))
}

#[cfg(test)]
mod tests;
