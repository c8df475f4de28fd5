//! One attempt from its lease to its report: render, upload, and create the result that decides which attempt counts.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use bytes::Bytes;
use farm_core::api::{JobResult, StageSeconds};
use farm_core::comm::{Patience, local};
use farm_core::id::{AttemptKey, DeviceIndex, NodeId};
use farm_core::job::spec::RenderSpec;
use farm_core::job::state::{FailureKind, Progress, Stage};
use farm_core::model::pipeline::Start;
use farm_core::parallel::group::RankGroup;
use farm_core::store::artifact::{ArtifactStore, Create, StoreError};
use farm_core::store::key;
use farm_core::wire::to_node::StartAttempt;
use farm_core::wire::to_scheduler::AttemptOutcome;
use futures::future::{join, join_all};
use sha2::{Digest, Sha256};

use crate::checkpoints::{Checkpoints, Slot};
use crate::device_thread::{DeviceHandle, Monitor, RenderError, Rendered, Reservation, Work};
use crate::progress::ProgressCell;
use crate::scratch::Scratch;

/// Largest `result.json` that is read. A report carries it, and an envelope has 256 KiB.
const MAX_RESULT_BYTES: usize = 192 * 1024;
/// Longest failure message of a report.
const MAX_MESSAGE_BYTES: usize = 4096;

/// What all attempts of a node share.
pub struct Workshop {
    pub node: NodeId,
    pub store: ArtifactStore,
    pub scratch: Arc<Scratch>,
    pub devices: Vec<DeviceHandle>,
    /// Content hash of each model by name.
    pub models: HashMap<String, String>,
    /// Steps between two latent checkpoints of a clip; 0 for none.
    pub checkpoint_steps: u32,
    /// Takes lines for jobs' logs.
    pub log: Box<dyn Fn(AttemptKey, String) + Send + Sync>,
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
            // Whoever stopped it does not wait for this.
            RenderError::Stopped => Self::new(FailureKind::Device, "stopped"),
        }
    }
}

/// Runs the attempt to its end. The devices are released (`reservation` dropped) as soon as the last frame is encoded;
/// the upload runs on without them. Setting `stop` ends the devices' part at their next step; dropping the future ends
/// ours.
pub async fn run(
    workshop: Arc<Workshop>,
    start: StartAttempt,
    reservation: Reservation,
    progress: ProgressCell,
    stop: Arc<AtomicBool>,
) -> AttemptOutcome {
    let attempt = start.key;
    let outcome = match attempt_clip(&workshop, &start, reservation, progress, stop).await {
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
    reservation: Reservation,
    progress: ProgressCell,
    stop: Arc<AtomicBool>,
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
    let monitor = Monitor::new(progress, stop, log);

    let spec: RenderSpec = serde_json::from_str(&start.spec_json)
        .map_err(|e| Failure::new(FailureKind::Input, format!("the spec cannot be rendered: {e}")))?;
    let checkpoints = Checkpoints {
        store: workshop.store.clone(),
        folder: key::latents(attempt.job),
        spec: Arc::new(spec.clone()),
        model_hash: start.model_hash.as_str().into(),
    };

    // An earlier attempt may have finished without the scheduler hearing of it: then there is nothing to do.
    if workshop.store.head(&key::result(attempt.job)).await?.is_some() {
        monitor.log(format!("{}: the result exists already", workshop.node));
        checkpoints.clear().await;
        return existing_result(workshop, attempt).await;
    }

    let gang = gang(workshop, start)?;
    check_model(workshop, start)?;
    let scratch_failure = |e| Failure::new(FailureKind::Device, format!("cannot use the scratch folder: {e}"));
    // Shared with the devices' threads, which may still write when this future is gone.
    let folder = Arc::new(workshop.scratch.attempt().map_err(scratch_failure)?);
    let clip = folder.path().join("clip.mp4");
    // A first attempt has nothing to go on with.
    let from = if attempt.attempt.0 > 1 { checkpoints.latest(&|note| monitor.log(note)).await } else { None };
    if let Some(checkpoint) = &from {
        monitor.log(format!("resumed at step {} of {}", checkpoint.step, spec.num_inference_steps));
    }
    let from = Arc::new(from.map_or(Start::Seed, Start::Checkpoint));
    // The scheduler writes its own line into the job's log when it hands the attempt out.
    tracing::info!(%attempt, devices = ?start.devices, topology = %start.topology, model = start.model, "attempt starts");
    let (slot, inbox) = Slot::new(workshop.checkpoint_steps);
    let kept: Reservation = Arc::new((reservation, folder.clone()));
    let ranks = local::ranks(gang.len(), Patience::default()).into_iter().zip(&gang).map(|(rank, handle)| {
        let group = RankGroup::new(start.topology, Arc::new(rank)).map_err(RenderError::device)?;
        let work = Work {
            model: start.model.clone(),
            spec: spec.clone(),
            group,
            start: from.clone(),
            checkpoints: slot.clone(),
            clip: clip.clone(),
            monitor: monitor.clone(),
        };
        Ok(handle.render(work, kept.clone()))
    });
    let ranks = ranks.collect::<Result<Vec<_>, RenderError>>()?;
    // From here on only the devices' threads have them, and let go of them.
    drop((kept, slot));
    let (rendered, ()) = join(join_all(ranks), checkpoints.save_all(inbox)).await;
    let Rendered { seconds, warnings } = of_all(rendered, &start.devices)?;
    for warning in &warnings {
        monitor.log(format!("warning: {warning}"));
    }

    let upload_began = Instant::now();
    monitor.advance(Progress { stage: Stage::Upload, done: 0, total: 1, eta_seconds: None });
    let (clip_bytes, clip_sha256) = hash_file(&clip).await.map_err(scratch_failure)?;
    let clip_key = key::clip(attempt.job, attempt.attempt);
    workshop.store.put_file(&clip_key, &clip).await?;
    let upload = upload_began.elapsed().as_secs_f64();
    let result = JobResult {
        job: attempt.job,
        attempt: attempt.attempt,
        epoch: attempt.epoch,
        node: workshop.node.clone(),
        devices: start.devices.clone(),
        topology: start.topology,
        clip: clip_key,
        clip_bytes,
        clip_sha256,
        spec,
        model: start.model.clone(),
        model_hash: start.model_hash.clone(),
        program_version: farm_core::VERSION.to_owned(),
        seconds: StageSeconds { upload, total: began.elapsed().as_secs_f64(), ..seconds },
        finished: jiff::Timestamp::now(),
        warnings,
    };
    let outcome = publish(workshop, attempt, result).await?;
    checkpoints.clear().await;
    Ok(outcome)
}

/// The devices of the lease, by rank.
fn gang<'a>(workshop: &'a Workshop, start: &StartAttempt) -> Result<Vec<&'a DeviceHandle>, Failure> {
    let (devices, topology) = (&start.devices, start.topology);
    if devices.len() != topology.world() {
        let message = format!("{topology} needs {} devices, the lease has {}", topology.world(), devices.len());
        return Err(Failure::new(FailureKind::Device, message));
    }
    let known = workshop.devices.len();
    let handle = |device: &DeviceIndex| {
        let missing = || Failure::new(FailureKind::Device, format!("no device {device}, the node has {known}"));
        workshop.devices.get(device.0 as usize).ok_or_else(missing)
    };
    devices.iter().map(handle).collect()
}

/// The leader's clip, or the failure that ended the group: that of the first rank that failed by itself, if any did.
fn of_all(rendered: Vec<Result<Rendered, RenderError>>, devices: &[DeviceIndex]) -> Result<Rendered, RenderError> {
    let mut ended = None;
    let mut clip = None;
    for (rank, rendered) in rendered.into_iter().enumerate() {
        match rendered {
            Ok(rendered) if rank == 0 => clip = Some(rendered),
            Ok(_) => {}
            Err(RenderError::Failed { kind, message }) => {
                let place = match devices {
                    [_] => String::new(),
                    _ => format!("rank {rank} of {} (device {}): ", devices.len(), devices[rank]),
                };
                return Err(RenderError::Failed { kind, message: place + &message });
            }
            Err(error) => {
                ended.get_or_insert(error);
            }
        }
    }
    match (ended, clip) {
        (None, Some(clip)) => Ok(clip),
        (Some(error), _) => Err(error),
        (None, None) => Err(RenderError::device("the group has no leader")),
    }
}

fn check_model(workshop: &Workshop, start: &StartAttempt) -> Result<(), Failure> {
    // Neither is the input's fault: another node may have the right checkpoint.
    match workshop.models.get(&start.model) {
        None => Err(Failure::new(FailureKind::Device, format!("this node has no model named {}", start.model))),
        Some(hash) if *hash != start.model_hash => Err(Failure::new(
            FailureKind::Device,
            format!("model {} is {hash} on this node, the job wants {}", start.model, start.model_hash),
        )),
        Some(_) => Ok(()),
    }
}

/// The commit point: of all attempts of a job, one creates the result.
async fn publish(workshop: &Workshop, attempt: AttemptKey, result: JobResult) -> Result<AttemptOutcome, Failure> {
    let result_json = serde_json::to_string(&result)
        .map_err(|e| Failure::new(FailureKind::Device, format!("the result does not encode: {e}")))?;
    let created =
        workshop.store.create(&key::result(attempt.job), Bytes::copy_from_slice(result_json.as_bytes())).await?;
    match created {
        Create::Created => {
            let accepted = attempt.attempt;
            Ok(AttemptOutcome::Completed { accepted, result_json, warnings: result.warnings })
        }
        Create::AlreadyExists => {
            let outcome = existing_result(workshop, attempt).await?;
            if let AttemptOutcome::Completed { accepted, .. } = &outcome
                && *accepted != attempt.attempt
                && let Err(error) = workshop.store.delete(&result.clip).await
            {
                // It takes space, no more.
                tracing::warn!(%attempt, %error, "cannot delete the clip of an attempt that was not accepted");
            }
            Ok(outcome)
        }
    }
}

/// Reports what the attempt that was first has made: perhaps this one, by a request that seemed to fail.
async fn existing_result(workshop: &Workshop, attempt: AttemptKey) -> Result<AttemptOutcome, Failure> {
    let result_key = key::result(attempt.job);
    let bytes = workshop.store.get(&result_key, MAX_RESULT_BYTES).await?;
    let result: JobResult = serde_json::from_slice(&bytes).map_err(|e| {
        let at = workshop.store.url_of(&result_key);
        Failure::new(FailureKind::Store, format!("{at} is no result of this program: {e}; move it away"))
    })?;
    if result.job != attempt.job {
        let at = workshop.store.url_of(&result_key);
        return Err(Failure::new(FailureKind::Store, format!("{at} is about job {}; move it away", result.job)));
    }
    Ok(AttemptOutcome::Completed {
        accepted: result.attempt,
        result_json: String::from_utf8_lossy(&bytes).into_owned(),
        warnings: result.warnings,
    })
}

/// Length and sha-256 in hex.
async fn hash_file(path: &Path) -> std::io::Result<(u64, String)> {
    let path = path.to_owned();
    let hashed = tokio::task::spawn_blocking(move || {
        let mut file = std::fs::File::open(path)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        let mut bytes = 0;
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok((bytes, format!("{:x}", hash.finalize()))),
                n => {
                    hash.update(&buffer[..n]);
                    bytes += n as u64;
                }
            }
        }
    });
    hashed.await.map_err(std::io::Error::other)?
}

#[cfg(test)]
#[path = "attempt_tests.rs"]
mod tests;
