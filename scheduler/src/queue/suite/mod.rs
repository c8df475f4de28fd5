//! What a queue store has to do, whichever database it is in: every rule here runs on SQLite and on Postgres, and after each
//! the rows are checked against the farm's invariants.

mod changes;
mod lead;
mod submissions;
mod upkeep;

use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::api::{OpenSubmission, SubmissionReply};
use farm_core::id::{AttemptKey, AttemptNo, BootId, DeviceIndex, Epoch, JobId, NodeId, SubmissionId, TenantId};
use farm_core::job::state::{FailureKind, JobState};
use farm_core::parallel::topology::Topology;
use farm_core::tiles::plan::Tiling;
use farm_core::wire::to_node::StartAttempt;
use jiff::Timestamp;
use tempfile::TempDir;
use uuid::Uuid;

use super::store::{Batch, Committed, NewDependency, NewJob, QueueError, QueueStore};
use super::testing::Postgres;
use crate::core::effects::{Change, Outcome};
use crate::core::events::Counts;

/// A queue that can be opened again and again, as processes that start again do.
struct Queue {
    place: String,
    _folder: Option<TempDir>,
}

impl Queue {
    fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { place: folder.path().to_str().unwrap().to_owned(), _folder: Some(folder) }
    }

    fn postgres(server: &Postgres) -> Self {
        Self { place: server.database(), _folder: None }
    }

    async fn open(&self) -> Arc<dyn QueueStore> {
        super::open(&self.place.parse().unwrap()).await.unwrap()
    }

    /// Opens it and leads.
    async fn lead(&self) -> (Arc<dyn QueueStore>, Epoch) {
        let store = self.open().await;
        let epoch = reign(&*store).await;
        (store, epoch)
    }

    async fn check(&self) {
        assert_eq!(self.open().await.violations().await.unwrap(), [""; 0]);
    }
}

/// One test for each rule on SQLite, and one for all on Postgres, since a server takes a second to start.
macro_rules! rules {
    ($($rule:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test] async fn $rule() {
                let queue = crate::queue::suite::Queue::sqlite();
                super::$rule(&queue).await;
                queue.check().await;
            })*
        }

        #[tokio::test]
        async fn postgres() {
            let server = crate::queue::testing::Postgres::start(&crate::queue::testing::Setup::default());
            $({
                println!("{}", stringify!($rule));
                let queue = crate::queue::suite::Queue::postgres(&server);
                $rule(&queue).await;
                queue.check().await;
            })*
        }
    };
}
use rules;

/// Waits until nobody else leads.
async fn reign(store: &dyn QueueStore) -> Epoch {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(epoch) = store.campaign("127.0.0.1:1").await.unwrap() {
            return epoch;
        }
        assert!(Instant::now() < end, "somebody else leads for ever");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millisecond(1_700_000_000_000 + millis).unwrap()
}

/// The hour of `at(0)`.
const HOUR: i64 = 1_700_000_000_000 / 3_600_000;

fn new_job(n: u32) -> NewJob {
    let mut key = [0; 32];
    key[..4].copy_from_slice(&n.to_le_bytes());
    NewJob {
        job: JobId::new(),
        key,
        request: serde_json::from_str(&format!(r#"{{"prompt":"prompt {n}"}}"#)).unwrap(),
        seed: n.into(),
        priority: 0,
        model: None,
        after: Vec::new(),
    }
}

fn after(n: u32, after: impl IntoIterator<Item = NewDependency>) -> NewJob {
    NewJob { after: after.into_iter().collect(), ..new_job(n) }
}

fn batch(submission: SubmissionId, jobs: Vec<NewJob>) -> Batch {
    let reply = SubmissionReply {
        submission,
        new: 0,
        existing: 0,
        requeued: 0,
        lines: Vec::new(),
        bad_lines: 0,
        waiting: None,
    };
    Batch { submission, tenant: TenantId::default(), max_queued: None, max_failures: None, jobs, reply }
}

async fn opened(store: &dyn QueueStore) -> SubmissionId {
    let submission = SubmissionId(Uuid::now_v7());
    store.open_submission(submission, OpenSubmission::default(), at(0)).await.unwrap();
    submission
}

async fn submit(store: &dyn QueueStore, epoch: Epoch, jobs: Vec<NewJob>) -> (SubmissionId, Committed) {
    let submission = opened(store).await;
    let committed = store.commit_submission(epoch, batch(submission, jobs), at(1)).await.unwrap();
    (submission, committed)
}

/// Submits so many jobs.
async fn jobs(store: &dyn QueueStore, epoch: Epoch, count: u32) -> Vec<JobId> {
    let (_, committed) = submit(store, epoch, (1..=count).map(new_job).collect()).await;
    committed.submitted.queued.iter().map(|job| job.job).collect()
}

/// Why a submission of these is refused.
async fn refusal(store: &dyn QueueStore, epoch: Epoch, jobs: Vec<NewJob>) -> String {
    let submission = opened(store).await;
    refused(store.commit_submission(epoch, batch(submission, jobs), at(1)).await)
}

fn refused(result: Result<Committed, QueueError>) -> String {
    match result {
        Err(QueueError::Refused(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

fn key(job: JobId, attempt: u32, epoch: Epoch) -> AttemptKey {
    AttemptKey { job, attempt: AttemptNo(attempt), epoch }
}

fn started(key: AttemptKey) -> Change {
    Change::Started {
        start: Arc::new(StartAttempt {
            key,
            devices: vec![DeviceIndex(1), DeviceIndex(3)],
            topology: Topology::new(2, 1, 1).unwrap(),
            model: "m".to_owned(),
            model_hash: "h".to_owned(),
            spec_json: "{}".to_owned(),
            tiling: Tiling::AUTO,
        }),
        node: NodeId("a".to_owned()),
        boot: BootId(Uuid::from_u128(7)),
        device: "big".to_owned(),
        base: 2.5,
    }
}

fn ended(key: AttemptKey, outcome: Outcome, device_ms: u64) -> Change {
    Change::AttemptEnded { key, outcome, message: Some("so".to_owned()), device_ms }
}

fn lost(key: AttemptKey, losses: u32) -> Vec<Change> {
    let outcome = Outcome::Failed(FailureKind::NodeLost);
    vec![ended(key, outcome, 1000), Change::Requeued { job: key.job, counts: Counts { losses, ..Counts::default() } }]
}

fn done(key: AttemptKey, device_ms: u64) -> Vec<Change> {
    let result_json = result_json(key);
    vec![
        ended(key, Outcome::Completed, device_ms),
        Change::Done { job: key.job, result_json, warnings: vec!["cut".to_owned()] },
    ]
}

fn result_json(key: AttemptKey) -> String {
    format!(
        r#"{{"job":"{}","attempt":{},"epoch":{},"node":"a","clip":"c","clip_bytes":1,"clip_sha256":"0",
        "spec":{{"prompt":"a","negative_prompt":"","width":16,"height":16,"num_frames":1,"num_inference_steps":1,
        "guidance_scale":1.0,"threshold_noise":0.025,"linear_steps":null,"seed":1}},"model":"m","model_hash":"h",
        "program_version":"v","seconds":{{"text":0,"denoise":0,"decode":0,"encode":0,"upload":0,"total":0}},
        "finished":"2026-01-01T00:00:00Z"}}"#,
        key.job, key.attempt, key.epoch
    )
}

/// From queued to done.
async fn finish(store: &dyn QueueStore, epoch: Epoch, job: JobId, when: Timestamp) {
    let key = key(job, 1, epoch);
    store.apply(epoch, &[started(key)], when).await.unwrap();
    store.apply(epoch, &done(key, 1000), when).await.unwrap();
}

async fn state(store: &dyn QueueStore, job: JobId) -> JobState {
    store.job(job).await.unwrap().unwrap().state
}
