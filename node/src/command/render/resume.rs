//! Latent checkpoints of `farm-node render`: a render that is started again goes on where the last one was.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use farm_core::job::spec::RenderSpec;
use farm_core::model::latent::LatentCheckpoint;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::precision::Precision;
use farm_core::store::artifact::ArtifactStore;
use sha2::{Digest, Sha256};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::checkpoints::{Checkpoints, Slot};

#[derive(clap::Args)]
#[command(next_help_heading = "Resuming")]
pub struct ResumeArgs {
    /// Where the latent is saved while the clip is denoised: a folder or s3://bucket/prefix. The same command started
    /// again, on any number of devices, goes on from there; a finished clip leaves nothing behind
    #[arg(long, value_name = "URL")]
    checkpoints: Option<PathBuf>,
    /// Steps from one saved latent to the next
    #[arg(long, value_name = "K", default_value_t = 4, requires = "checkpoints")]
    checkpoint_steps: u32,
}

impl ResumeArgs {
    pub fn wanted(&self) -> bool {
        self.checkpoints.is_some()
    }
}

/// What a latent depends on; the model and the request as hashes.
#[derive(Default)]
pub struct Identity {
    model: String,
    request: String,
    precision: Precision,
}

impl Identity {
    /// Reads every byte of the checkpoint.
    pub fn of(checkpoint: &Checkpoint, spec: &RenderSpec, precision: Precision) -> anyhow::Result<Self> {
        let request = format!("{:x}", Sha256::digest(serde_json::to_vec(spec)?));
        Ok(Self { model: checkpoint.content_hash()?.to_owned(), request, precision })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, request, precision } = self;
        write!(f, "{precision}, model {model}, request {request}")
    }
}

/// The saved latents of one clip.
pub struct Saved {
    runtime: Runtime,
    checkpoints: Arc<Checkpoints>,
    slot: Slot,
    saving: JoinHandle<()>,
}

impl Saved {
    /// None if none are asked for.
    pub fn open(args: &ResumeArgs, spec: &RenderSpec, identity: &Identity) -> anyhow::Result<Option<Self>> {
        let Some(url) = &args.checkpoints else { return Ok(None) };
        let url = url.to_str().context("the URL of the checkpoints is not UTF-8")?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let store = ArtifactStore::open(url)?;
        runtime.block_on(store.probe())?;
        let checkpoints = Arc::new(Checkpoints {
            store,
            folder: format!("clips/{}-{}", identity.request, identity.model),
            spec: Arc::new(spec.clone()),
            model_hash: identity.model.as_str().into(),
            precision: identity.precision,
        });
        let (slot, inbox) = Slot::new(args.checkpoint_steps);
        let saver = checkpoints.clone();
        let saving = runtime.spawn(async move { saver.save_all(inbox, &|_| ()).await });
        Ok(Some(Self { runtime, checkpoints, slot, saving }))
    }

    /// Where to go on, if there is anything that fits.
    pub fn latest(&self) -> Option<LatentCheckpoint> {
        self.runtime.block_on(self.checkpoints.latest(&|note| eprintln!("note: {note}")))
    }

    pub fn wants(&self, step: u32) -> bool {
        self.slot.wants(step)
    }

    /// Saves it beside the denoise.
    pub fn put(&self, checkpoint: LatentCheckpoint) {
        self.slot.put(checkpoint);
    }

    /// The clip is there; nobody goes on from here.
    pub fn clear(self) {
        let Self { runtime, checkpoints, slot, saving } = self;
        drop(slot);
        runtime.block_on(async {
            // One that is being written would stay behind.
            if saving.await.is_ok() {
                checkpoints.clear().await;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_compute_differently_say_so_when_they_form_a_group() {
        let identity = |precision| Identity { precision, ..Identity::default() }.to_string();
        assert_ne!(identity(Precision::F32), identity(Precision::Bf16));
    }
}
