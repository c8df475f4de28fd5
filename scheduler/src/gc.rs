//! Removes what nobody needs any more: clips of attempts that were not accepted, latents of ended jobs, old rows.
//!
//! An object goes only if its job ended at least [`Retention::leftovers`] ago, which is longer than any attempt outlives
//! its job, and only if it is a latent or the clip of an attempt up to the newest of that time. So the attempts of a job
//! that is queued again meanwhile lose nothing but latents, without which they begin anew. The manifest stays, and the
//! clip that it names, also of a job that is not done: its next attempt would take that result over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::api::{GcReport, JobResult};
use farm_core::id::JobId;
use farm_core::store::artifact::{ArtifactStore, StoreError};
use farm_core::store::key;
use futures::StreamExt;
use jiff::Timestamp;
use tokio::sync::{Mutex, watch};

use crate::actor::{CallError, Scheduler};
use crate::lead::Standing;
use crate::queue::store::{Leftover, Pruned, QueueError, QueueStore, Retention};

/// How often a leader cleans up by itself.
const EVERY: Duration = Duration::from_secs(60 * 60);
/// Between two steps of one cleaning.
const PAUSE: Duration = Duration::from_secs(1);
/// Steps of one cleaning; the rest is left for the next.
const STEPS: usize = 1000;
/// Jobs of one step.
const JOBS: u32 = 1000;
/// Jobs that are looked at together.
const TOGETHER: usize = 16;
/// A step takes up no more jobs after this.
const STEP: Duration = Duration::from_secs(20);
/// Objects of one job that are looked at; what is beyond is left for the next step.
const OBJECTS: usize = 10_000;
const MAX_MANIFEST: usize = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum GcError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Queue(#[from] QueueError),
}

/// Cloning shares it.
#[derive(Clone)]
pub struct Gc {
    artifacts: ArtifactStore,
    queue: Arc<dyn QueueStore>,
    keep: Retention,
    /// One step at a time.
    turn: Arc<Mutex<()>>,
}

/// What becomes of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stays,
    /// A clip that was not accepted.
    Clip,
    Latent,
}

fn fate(key: &str, leftover: &Leftover, accepted: Option<&str>) -> Fate {
    if accepted == Some(key) {
        Fate::Stays
    } else if key::clip_attempt(leftover.job, key).is_some_and(|attempt| attempt <= leftover.attempts) {
        Fate::Clip
    } else if key::latent_step(&key::latents(leftover.job), key).is_some() {
        Fate::Latent
    } else {
        Fate::Stays
    }
}

impl Gc {
    pub fn new(artifacts: ArtifactStore, queue: Arc<dyn QueueStore>, keep: Retention) -> Self {
        Self { artifacts, queue, keep, turn: Arc::default() }
    }

    /// Cleans up every hour while this process leads.
    pub async fn run(self, standing: watch::Receiver<Standing>) {
        loop {
            tokio::time::sleep(EVERY).await;
            for _ in 0..STEPS {
                let Standing::Leads(scheduler) = standing.borrow().clone() else { break };
                match self.step(&scheduler, false).await {
                    Ok(report) => {
                        if (GcReport { more: false, ..report }) != GcReport::default() {
                            let GcReport { clips, latents, log_rows, job_rows, audit_rows, errors, .. } = report;
                            tracing::info!(clips, latents, log_rows, job_rows, audit_rows, errors, "cleaned up");
                        }
                        if !report.more || report.errors > 0 {
                            break;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot clean up");
                        break;
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    /// Removes a bounded number of objects and rows, or only counts them.
    pub async fn step(&self, scheduler: &Scheduler, dry_run: bool) -> Result<GcReport, GcError> {
        let _turn = self.turn.lock().await;
        let begun = Instant::now();
        let mut report = GcReport { dry_run, ..GcReport::default() };
        let mut more = false;
        loop {
            let mut cleaned = 0;
            let leftovers = self.queue.leftovers(self.keep, Timestamp::now(), JOBS).await?;
            for some in leftovers.chunks(TOGETHER) {
                if begun.elapsed() >= STEP {
                    more = true;
                    break;
                }
                let clean = self.clean(scheduler, some, &mut report).await?;
                cleaned += clean.len();
                if !dry_run && !clean.is_empty() {
                    self.queue.mark_clean(scheduler.epoch(), &clean).await?;
                }
            }
            more |= leftovers.len() == JOBS as usize;
            // Most jobs leave nothing: then the next are looked at.
            let found = GcReport { dry_run, ..GcReport::default() } != report;
            if !more || dry_run || found || cleaned == 0 || begun.elapsed() >= STEP {
                break;
            }
            more = false;
        }
        let pruned = scheduler.prune(self.keep, dry_run).await??;
        (report.log_rows, report.job_rows, report.audit_rows) = (pruned.logs, pruned.jobs, pruned.audit);
        // All old rows are counted, but not all are removed at once.
        report.more = more || !dry_run && pruned != Pruned::default();
        Ok(report)
    }

    /// Gives the jobs that hold nothing superfluous any more.
    async fn clean(
        &self,
        scheduler: &Scheduler,
        leftovers: &[Leftover],
        report: &mut GcReport,
    ) -> Result<Vec<JobId>, GcError> {
        let mut ended = leftovers.to_vec();
        // Queued again since the rows were read.
        let ended = scheduler
            .ask(move |farm| {
                ended.retain(|leftover| !farm.holds(leftover.job));
                ended
            })
            .await?;
        let dry_run = report.dry_run;
        let mut cleaned = futures::stream::iter(ended)
            .map(|leftover| async move { (leftover.job, self.clean_job(&leftover, dry_run).await) })
            .buffer_unordered(TOGETHER);
        let mut clean = Vec::new();
        while let Some((job, (found, outcome))) = cleaned.next().await {
            report.clips += found.clips;
            report.clip_bytes += found.clip_bytes;
            report.latents += found.latents;
            report.latent_bytes += found.latent_bytes;
            match outcome {
                Ok(true) => clean.push(job),
                Ok(false) => {}
                Err(error) => {
                    report.errors += 1;
                    tracing::warn!(%job, %error, "cannot clean up a job's objects");
                }
            }
        }
        Ok(clean)
    }

    /// What was removed, and whether that is all.
    async fn clean_job(&self, leftover: &Leftover, dry_run: bool) -> (GcReport, Result<bool, String>) {
        let mut found = GcReport::default();
        let outcome = self.remove(leftover, dry_run, &mut found).await.map_err(|error| error.to_string());
        (found, outcome)
    }

    async fn remove(&self, leftover: &Leftover, dry_run: bool, found: &mut GcReport) -> Result<bool, StoreError> {
        let objects = self.artifacts.list_sizes(&key::job(leftover.job), OBJECTS).await?;
        let manifest = key::result(leftover.job);
        let accepted = match leftover.accepted {
            Some(attempt) => Some(key::clip(leftover.job, attempt)),
            None if objects.iter().any(|(key, _)| *key == manifest) => {
                let bytes = self.artifacts.get(&manifest, MAX_MANIFEST).await?;
                match serde_json::from_slice::<JobResult>(&bytes) {
                    Ok(result) => Some(result.clip),
                    Err(error) => {
                        // Whatever it means to name stays.
                        tracing::warn!(manifest, %error, "cannot read a result; its job's objects stay");
                        return Ok(true);
                    }
                }
            }
            None => None,
        };
        for (key, bytes) in &objects {
            let (count, sum) = match fate(key, leftover, accepted.as_deref()) {
                Fate::Stays => continue,
                Fate::Clip => (&mut found.clips, &mut found.clip_bytes),
                Fate::Latent => (&mut found.latents, &mut found.latent_bytes),
            };
            if !dry_run {
                self.artifacts.delete(key).await?;
            }
            *count += 1;
            *sum += bytes;
        }
        Ok(objects.len() < OBJECTS)
    }
}

#[cfg(test)]
mod tests {
    use farm_core::id::AttemptNo;
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    proptest! {
        #[test]
        fn only_latents_and_clips_of_lost_attempts_go(
            attempts in 0u32..6,
            accepted in proptest::option::of(1u32..6),
            n in 0u32..9,
            step in 0u32..200_000,
        ) {
            let [job, other] = [1, 2].map(|n| JobId(Uuid::from_u128(n)));
            let leftover = Leftover { job, attempts: AttemptNo(attempts), accepted: accepted.map(AttemptNo) };
            let kept = accepted.map(|n| key::clip(job, AttemptNo(n)));
            let of = |key: &str| fate(key, &leftover, kept.as_deref());
            let lost = n <= attempts && Some(n) != accepted;
            prop_assert_eq!(of(&key::clip(job, AttemptNo(n))), if lost { Fate::Clip } else { Fate::Stays });
            prop_assert_eq!(of(&key::latent(&key::latents(job), step)), Fate::Latent);
            let strange = [
                key::result(job),
                key::clip(other, AttemptNo(n)),
                key::latent(&key::latents(other), step),
                format!("{}/notes.txt", key::job(job)),
                format!("{}/latent/{step}.json", key::job(job)),
                "probe/x".to_owned(),
            ];
            for key in strange {
                prop_assert_eq!(of(&key), Fate::Stays, "{}", key);
            }
        }
    }
}
