//! Latent checkpoints: where another run, on this node or another, takes a clip up if this one does not end well.
//!
//! Each is an object of its own that is created once, and replaced only by a run that cannot go on from it, so runs that
//! overlap do not disturb each other. None of this ever fails a clip: what cannot be written is not there later, and what
//! cannot be read is passed over.

use std::sync::Arc;

use bytes::Bytes;
use farm_core::job::spec::{MAX_STEPS, RenderSpec};
use farm_core::model::latent::LatentCheckpoint;
use farm_core::precision::Precision;
use farm_core::store::artifact::{ArtifactStore, Create, StoreError};
use farm_core::store::key;
use futures::{StreamExt, stream};
use tokio::sync::watch;

/// Checkpoints that are tried, from the latest down: if so many are damaged, the others are no better.
const TRIES: usize = 8;
/// A file is its values, the request, and this at most.
const HEADER_BYTES: usize = 1 << 16;
/// Deletions under way at a time.
const DELETIONS: usize = 8;

/// Bytes that a latent's file has at most.
pub fn max_bytes(spec: &RenderSpec) -> usize {
    let values = spec.latent_shape().iter().product::<usize>() * size_of::<f32>();
    // The request is in it as JSON within JSON, where a byte of it takes eight at most.
    values + 8 * (spec.prompt.len() + spec.negative_prompt.len()) + HEADER_BYTES
}

/// The checkpoints of one clip.
pub struct Checkpoints {
    pub store: ArtifactStore,
    /// Key of their folder, without a slash at its end.
    pub folder: String,
    pub spec: Arc<RenderSpec>,
    /// Content hash of the model: a latent of another is another clip's.
    pub model_hash: Arc<str>,
    /// What the clip is denoised in here.
    pub precision: Precision,
}

impl Checkpoints {
    /// The latest one that this run can go on from: it can be read, is of this clip and, unless it is finished, of this
    /// precision. `note` is told what had to be passed over.
    pub async fn latest(&self, note: &(dyn Fn(String) + Sync)) -> Option<LatentCheckpoint> {
        let mut steps = match self.steps().await {
            Ok(steps) => steps,
            Err(error) => {
                note(format!("cannot look for latent checkpoints: {error}"));
                return None;
            }
        };
        steps.sort_unstable_by(|a, b| b.cmp(a));
        for step in steps.into_iter().take(TRIES) {
            match self.read(step).await {
                Ok(checkpoint) => return Some(checkpoint),
                Err(reason) => note(format!("the latent checkpoint of step {step} is passed over: {reason}")),
            }
        }
        None
    }

    /// Stores one. If there is one of its step already that a run like this can go on from, that one stays and is returned.
    pub async fn save(&self, checkpoint: Arc<LatentCheckpoint>) -> Result<Option<LatentCheckpoint>, String> {
        let step = checkpoint.step;
        let (key, bytes) = (key::latent(&self.folder, step), self.bytes(checkpoint).await?);
        let created = self.store.create(&key, bytes.clone()).await.map_err(|error| error.to_string())?;
        if created == Create::Created {
            return Ok(None);
        }
        match self.read(step).await {
            Ok(first) => Ok(Some(first)),
            Err(reason) => {
                tracing::warn!(folder = self.folder, step, %reason, "a latent that is of no use is replaced");
                self.store.put(&key, bytes).await.map_err(|error| error.to_string())?;
                Ok(None)
            }
        }
    }

    /// The file of a checkpoint.
    pub async fn bytes(&self, checkpoint: Arc<LatentCheckpoint>) -> Result<Bytes, String> {
        let (spec, hash) = (self.spec.clone(), self.model_hash.clone());
        let bytes = tokio::task::spawn_blocking(move || checkpoint.to_bytes(&spec, &hash));
        Ok(bytes.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?.into())
    }

    /// Stores the finished latent, which the decode goes on from, and returns the one that is there afterwards: if another
    /// attempt has finished it as well, the first counts.
    pub async fn finish(&self, finished: LatentCheckpoint) -> Result<LatentCheckpoint, String> {
        let finished = Arc::new(finished);
        let first = self.save(finished.clone()).await?;
        Ok(first.unwrap_or_else(|| Arc::unwrap_or_clone(finished)))
    }

    /// Saves what is put into the slot, one at a time, until nobody can put anything into it any more. `saved` is told each
    /// step whose latent is in the store.
    pub async fn save_all(&self, mut inbox: Inbox, saved: &(dyn Fn(u32) + Sync)) {
        while inbox.changed().await.is_ok() {
            let latest = inbox.borrow_and_update().clone();
            let Some(checkpoint) = latest else { continue };
            let (step, folder) = (checkpoint.step, &self.folder);
            match self.save(checkpoint).await {
                Ok(first) => {
                    tracing::debug!(folder, step, created = first.is_none(), "latent checkpoint");
                    saved(step);
                }
                Err(reason) => tracing::warn!(folder, step, %reason, "cannot write a latent checkpoint"),
            }
        }
    }

    /// Deletes all of them, once nobody needs them. What stays behind takes space, no more.
    pub async fn clear(&self) {
        let failed = |error: StoreError| tracing::warn!(folder = self.folder, %error, "latent checkpoints stay behind");
        let steps = self.steps().await.unwrap_or_else(|error| {
            failed(error);
            Vec::new()
        });
        let deletions = steps.into_iter().map(|step| {
            let key = key::latent(&self.folder, step);
            async move { self.store.delete(&key).await }
        });
        let mut deletions = stream::iter(deletions).buffer_unordered(DELETIONS);
        while let Some(deleted) = deletions.next().await {
            deleted.unwrap_or_else(failed);
        }
    }

    async fn steps(&self) -> Result<Vec<u32>, StoreError> {
        let keys = self.store.list(&self.folder, MAX_STEPS as usize).await?;
        Ok(keys.iter().filter_map(|key| key::latent_step(&self.folder, key)).collect())
    }

    async fn read(&self, step: u32) -> Result<LatentCheckpoint, String> {
        let bytes = self.store.get(&key::latent(&self.folder, step), max_bytes(&self.spec)).await;
        let bytes = bytes.map_err(|error| error.to_string())?;
        let (spec, hash) = (self.spec.clone(), self.model_hash.clone());
        let read = tokio::task::spawn_blocking(move || LatentCheckpoint::from_bytes(&bytes, &spec, &hash));
        let checkpoint = read.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        // Copied under another name, it would be deleted under the wrong one, and `step` is what people are told.
        if checkpoint.step != step {
            return Err(format!("it is of step {}", checkpoint.step));
        }
        // A finished latent takes no more steps, and the decode is the same for all.
        if checkpoint.precision != self.precision && step < self.spec.num_inference_steps {
            return Err(format!("it is of {}, and this run computes in {}", checkpoint.precision, self.precision));
        }
        Ok(checkpoint)
    }
}

/// Where a device's thread leaves checkpoints to be saved: one place, in which the latest takes that of an earlier one.
#[derive(Clone)]
pub struct Slot {
    every: u32,
    latest: watch::Sender<Option<Arc<LatentCheckpoint>>>,
}

/// The other end of a [`Slot`].
pub type Inbox = watch::Receiver<Option<Arc<LatentCheckpoint>>>;

impl Slot {
    /// For one checkpoint every so many steps; for none if that is 0.
    pub fn new(every: u32) -> (Self, Inbox) {
        let (latest, inbox) = watch::channel(None);
        (Self { every, latest }, inbox)
    }

    pub fn wants(&self, step: u32) -> bool {
        self.every > 0 && step.is_multiple_of(self.every)
    }

    /// Does not wait.
    pub fn put(&self, checkpoint: LatentCheckpoint) {
        self.latest.send_replace(Some(Arc::new(checkpoint)));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use farm_core::id::JobId;
    use farm_core::job::spec::GenerationDefaults;
    use uuid::Uuid;

    use super::*;

    fn spec(seed: u64) -> Arc<RenderSpec> {
        let request = r#"{"prompt":"a ball","width":64,"height":64,"num_frames":7,"num_inference_steps":20}"#;
        let request = serde_json::from_str(request).unwrap();
        Arc::new(RenderSpec::resolve(&request, &GenerationDefaults::default(), seed).unwrap())
    }

    fn checkpoints(store: &ArtifactStore, job: u128) -> Checkpoints {
        let folder = key::latents(JobId(Uuid::from_u128(job)));
        let (spec, precision) = (spec(1), Precision::F32);
        Checkpoints { store: store.clone(), folder, spec, model_hash: "abc".into(), precision }
    }

    fn checkpoint(step: u32) -> LatentCheckpoint {
        LatentCheckpoint {
            step,
            precision: Precision::F32,
            values: vec![step as f32; spec(1).latent_shape().iter().product()],
        }
    }

    /// The step of the latest, and what is said on the way to it.
    async fn latest(checkpoints: &Checkpoints) -> (Option<u32>, Vec<String>) {
        let notes = Mutex::new(Vec::new());
        let latest = checkpoints.latest(&|note| notes.lock().unwrap().push(note)).await;
        if let Some(latest) = &latest {
            assert_eq!(*latest, checkpoint(latest.step));
        }
        (latest.map(|latest| latest.step), notes.into_inner().unwrap())
    }

    async fn save(checkpoints: &Checkpoints, steps: &[u32]) {
        for step in steps {
            assert_eq!(checkpoints.save(Arc::new(checkpoint(*step))).await, Ok(None));
        }
    }

    #[tokio::test]
    async fn the_latest_checkpoint_that_fits_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let folder = ArtifactStore::open(dir.path().to_str().unwrap()).unwrap();
        for store in [ArtifactStore::open("memory:").unwrap(), folder] {
            let clip = checkpoints(&store, 3);
            assert_eq!(latest(&clip).await, (None, vec![]));
            save(&clip, &[4, 16, 8]).await;
            assert_eq!(latest(&clip).await, (Some(16), vec![]));
        }
    }

    #[tokio::test]
    async fn what_is_damaged_or_of_another_clip_is_passed_over() {
        let store = ArtifactStore::open("memory:").unwrap();
        let clip = checkpoints(&store, 3);
        save(&clip, &[8, 16]).await;
        let key = key::latent(&clip.folder, 16);
        let good = store.get(&key, 1 << 20).await.unwrap();
        let seed = checkpoint(16).to_bytes(&spec(2), "abc").unwrap();
        let model = checkpoint(16).to_bytes(&spec(1), "def").unwrap();
        let misplaced = checkpoint(4).to_bytes(&spec(1), "abc").unwrap();
        for bad in [b"".to_vec(), good[..good.len() - 4].to_vec(), vec![255; 1 << 20], seed, model, misplaced] {
            store.put(&key, bad.into()).await.unwrap();
            let (step, notes) = latest(&clip).await;
            assert_eq!(step, Some(8), "{notes:?}");
            assert!(notes[0].contains("step 16 is passed over"), "{notes:?}");
        }
    }

    #[tokio::test]
    async fn of_one_step_the_first_checkpoint_stays() {
        let store = ArtifactStore::open("memory:").unwrap();
        let clip = checkpoints(&store, 3);
        save(&clip, &[8]).await;
        assert_eq!(clip.save(Arc::new(checkpoint(8))).await, Ok(Some(checkpoint(8))));
    }

    #[tokio::test]
    async fn runs_of_different_precisions_never_go_on_from_each_other_and_keep_each_other_from_nothing() {
        let store = ArtifactStore::open("memory:").unwrap();
        let exact = checkpoints(&store, 3);
        let rounded = Checkpoints { precision: Precision::Bf16, ..checkpoints(&store, 3) };
        save(&exact, &[4, 8, 20]).await;
        assert_eq!(latest(&rounded).await, (Some(20), vec![]), "a finished one takes no more steps");
        store.delete(&key::latent(&exact.folder, 20)).await.unwrap();
        let (step, notes) = latest(&rounded).await;
        assert_eq!((step, notes.len()), (None, 2));
        assert!(notes[0].contains("step 8 is passed over: it is of fp32, and this run computes in bf16"), "{notes:?}");
        let of_rounded = LatentCheckpoint { precision: Precision::Bf16, ..checkpoint(8) };
        assert_eq!(rounded.save(Arc::new(of_rounded.clone())).await, Ok(None));
        assert_eq!(rounded.latest(&|_| ()).await, Some(of_rounded));
        assert_eq!(latest(&exact).await.0, Some(4));
    }

    #[tokio::test]
    async fn a_cleared_clip_has_no_checkpoints_and_others_keep_theirs() {
        let store = ArtifactStore::open("memory:").unwrap();
        let (clip, other) = (checkpoints(&store, 3), checkpoints(&store, 4));
        save(&clip, &[4, 8]).await;
        save(&other, &[4]).await;
        clip.clear().await;
        assert_eq!((latest(&clip).await.0, latest(&other).await.0), (None, Some(4)));
    }

    #[tokio::test]
    async fn a_slow_store_gets_the_latest_and_delays_nobody() {
        let store = ArtifactStore::open("memory:").unwrap();
        let clip = checkpoints(&store, 3);
        let (slot, inbox) = Slot::new(4);
        assert!(slot.wants(8) && !slot.wants(9) && !Slot::new(0).0.wants(8));
        // The store takes none of these up before the last is there.
        for step in [4, 8, 12] {
            slot.put(checkpoint(step));
        }
        drop(slot);
        let saved = Mutex::new(Vec::new());
        clip.save_all(inbox, &|step| saved.lock().unwrap().push(step)).await;
        assert_eq!((clip.steps().await.unwrap(), saved.into_inner().unwrap()), (vec![12], vec![12]));
    }
}
