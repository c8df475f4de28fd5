//! What every queue store has to do. A store joins by an [`Opener`] and one line of [`suite!`].

use std::sync::Arc;

use farm_core::api::SubmissionReply;
use farm_core::id::{AttemptKey, AttemptNo, BootId, DeviceIndex, Epoch, JobId, NodeId, SubmissionId};
use farm_core::job::state::{FailureKind, JobState};
use farm_core::parallel::topology::Topology;
use farm_core::tiles::plan::Tiling;
use farm_core::wire::to_node::StartAttempt;
use futures::future::BoxFuture;
use jiff::Timestamp;
use uuid::Uuid;

use super::sqlite::SqliteQueue;
use super::store::{
    Batch, Committed, JobFilter, MAX_LOG_LINES, MAX_OPEN_SUBMISSIONS, NewJob, QueueError, QueueStore,
    STALE_SUBMISSION_MS,
};
use crate::core::effects::{Change, Outcome};
use crate::core::events::Time;
use crate::core::farm::{Farm, Limits};

/// Opens the same queue each time, as a process that starts again does.
trait Opener: Send + Sync {
    fn open(&self) -> BoxFuture<'_, Arc<dyn QueueStore>>;
}

struct Sqlite(tempfile::TempDir);

impl Opener for Sqlite {
    fn open(&self) -> BoxFuture<'_, Arc<dyn QueueStore>> {
        Box::pin(async {
            let queue = SqliteQueue::open(&self.0.path().join("queue.sqlite")).await.unwrap();
            Arc::new(queue) as Arc<dyn QueueStore>
        })
    }
}

macro_rules! suite {
    ($store:ident, $opener:expr, [$($rule:ident),* $(,)?]) => {
        mod $store {
            $(#[tokio::test] async fn $rule() { super::$rule(&$opener).await; })*
        }
    };
}

suite!(
    sqlite,
    super::Sqlite(tempfile::tempdir().unwrap()),
    [
        an_epoch_only_grows,
        a_write_of_an_old_reign_is_refused,
        a_submission_is_committed_once,
        the_same_lines_are_the_same_jobs,
        failed_and_cancelled_jobs_are_queued_again,
        pages_are_kept_until_the_commit,
        uploads_that_nobody_commits_do_not_pile_up,
        a_job_passes_through_its_states,
        a_change_that_does_not_fit_undoes_its_whole_transaction,
        live_jobs_are_what_a_restart_needs,
        every_committed_prefix_is_a_legal_farm,
        a_log_keeps_its_newest_lines,
        jobs_are_found_by_the_end_of_their_id,
        listings_come_in_pages_by_state_and_submission,
        odd_text_and_extreme_numbers_survive,
    ]
);

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millisecond(1_700_000_000_000 + millis).unwrap()
}

fn new_job(n: u8) -> NewJob {
    NewJob {
        job: JobId::new(),
        key: [n; 32],
        request: serde_json::from_str(&format!(r#"{{"prompt":"prompt {n}"}}"#)).unwrap(),
        seed: n.into(),
        priority: 0,
        model: None,
    }
}

async fn submit(store: &dyn QueueStore, epoch: Epoch, jobs: Vec<NewJob>) -> (SubmissionId, Committed) {
    let submission = SubmissionId(Uuid::now_v7());
    store.open_submission(submission, None, None, at(0)).await.unwrap();
    let committed = store.commit_submission(epoch, batch(submission, jobs), at(1)).await.unwrap();
    (submission, committed)
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
    Batch { submission, jobs, reply }
}

fn key(job: JobId, attempt: u32, epoch: Epoch) -> AttemptKey {
    AttemptKey { job, attempt: AttemptNo(attempt), epoch }
}

fn started(key: AttemptKey) -> Change {
    Change::Started {
        start: Box::new(StartAttempt {
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
    }
}

fn lost(key: AttemptKey, losses: u32) -> Vec<Change> {
    let outcome = Outcome::Failed(FailureKind::NodeLost);
    vec![
        Change::AttemptEnded { key, outcome, message: Some("gone".to_owned()) },
        Change::Requeued { job: key.job, failures: 0, losses },
    ]
}

async fn state(store: &dyn QueueStore, job: JobId) -> JobState {
    store.job(job).await.unwrap().unwrap().state
}

async fn an_epoch_only_grows(opener: &dyn Opener) {
    for n in 1..4 {
        assert_eq!(opener.open().await.begin_epoch().await.unwrap(), Epoch(n));
    }
}

async fn a_write_of_an_old_reign_is_refused(opener: &dyn Opener) {
    let store = opener.open().await;
    let old = store.begin_epoch().await.unwrap();
    let (_, committed) = submit(&*store, old, vec![new_job(1)]).await;
    let job = committed.queued[0].job;
    store.begin_epoch().await.unwrap();
    let refused = store.apply(old, &[Change::Cancelled { job }], at(2)).await;
    assert!(matches!(refused, Err(QueueError::Superseded(Epoch(1)))), "{refused:?}");
    assert_eq!(state(&*store, job).await, JobState::Queued);
}

async fn a_submission_is_committed_once(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    let (submission, first) = submit(&*store, epoch, vec![new_job(1), new_job(2)]).await;
    assert_eq!((first.reply.new, first.queued.len()), (2, 2));
    assert_eq!(first.queued.iter().map(|job| job.seq).collect::<Vec<_>>(), [1, 2]);
    let again = store.commit_submission(epoch, batch(submission, vec![new_job(3)]), at(2)).await.unwrap();
    assert_eq!((again.reply, again.queued.len()), (first.reply.clone(), 0));
    assert_eq!(store.submission(submission).await.unwrap().unwrap().reply, Some(first.reply));
    assert_eq!(store.counts().await.unwrap().get(&JobState::Queued), Some(&2));
    let unknown = store.commit_submission(epoch, batch(SubmissionId(Uuid::nil()), vec![new_job(3)]), at(2)).await;
    assert!(matches!(unknown, Err(QueueError::Conflict(_))));
}

async fn the_same_lines_are_the_same_jobs(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    // More than one statement's worth.
    let many = || (0..1234u32).map(|n| NewJob { key: key_of(n), ..new_job(1) }).collect::<Vec<_>>();
    fn key_of(n: u32) -> [u8; 32] {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&n.to_le_bytes());
        key
    }
    let (_, first) = submit(&*store, epoch, many()).await;
    assert_eq!((first.reply.new, first.reply.existing), (1234, 0));
    let mut more = many();
    more.push(NewJob { key: key_of(9999), ..new_job(1) });
    let (submission, second) = submit(&*store, epoch, more).await;
    assert_eq!((second.reply.new, second.reply.existing, second.queued.len()), (1, 1234, 1));
    let counts = store.submission_counts(submission).await.unwrap();
    assert_eq!(counts.get(&JobState::Queued), Some(&1235));
}

async fn failed_and_cancelled_jobs_are_queued_again(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    let (_, committed) = submit(&*store, epoch, vec![new_job(1), new_job(2), new_job(3), new_job(4)]).await;
    let jobs: Vec<JobId> = committed.queued.iter().map(|job| job.job).collect();
    let changes = [
        Change::Failed { job: jobs[0], reason: "bad".to_owned() },
        Change::Cancelled { job: jobs[1] },
        started(key(jobs[2], 1, epoch)),
    ];
    store.apply(epoch, &changes, at(2)).await.unwrap();
    let urgent = |n| NewJob { priority: 9, seed: 99, ..new_job(n) };
    let (_, again) = submit(&*store, epoch, vec![urgent(1), urgent(2), urgent(3), urgent(4)]).await;
    assert_eq!((again.reply.new, again.reply.requeued, again.reply.existing), (0, 2, 2));
    assert_eq!(
        again.queued.iter().map(|job| (job.job, job.priority)).collect::<Vec<_>>(),
        [(jobs[0], 9), (jobs[1], 9)]
    );
    let record = store.job(jobs[0]).await.unwrap().unwrap();
    assert_eq!((record.state, record.reason, record.finished, record.seed), (JobState::Queued, None, None, 1));
}

async fn pages_are_kept_until_the_commit(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    let submission = SubmissionId(Uuid::now_v7());
    assert!(!store.put_page(submission, 0, b"x".to_vec()).await.unwrap(), "nothing was opened");
    store.open_submission(submission, Some("m".to_owned()), Some(-3), at(0)).await.unwrap();
    for (page, bytes) in [(1, "second"), (0, "lost"), (0, "first")] {
        assert!(store.put_page(submission, page, bytes.as_bytes().to_vec()).await.unwrap());
    }
    let store = opener.open().await;
    assert_eq!(store.pages(submission).await.unwrap(), [(0, 5), (1, 6)]);
    assert_eq!(store.page(submission, 0).await.unwrap().unwrap(), b"first");
    let read = store.submission(submission).await.unwrap().unwrap();
    assert_eq!((read.model.as_deref(), read.priority, read.reply), (Some("m"), Some(-3), None));
    store.commit_submission(epoch, batch(submission, vec![new_job(1)]), at(1)).await.unwrap();
    assert!(store.pages(submission).await.unwrap().is_empty());
    assert!(!store.put_page(submission, 0, b"late".to_vec()).await.unwrap());
}

async fn uploads_that_nobody_commits_do_not_pile_up(opener: &dyn Opener) {
    let store = opener.open().await;
    let first = SubmissionId(Uuid::now_v7());
    store.open_submission(first, None, None, at(0)).await.unwrap();
    store.put_page(first, 0, b"x".to_vec()).await.unwrap();
    for _ in 1..MAX_OPEN_SUBMISSIONS {
        store.open_submission(SubmissionId(Uuid::now_v7()), None, None, at(1)).await.unwrap();
    }
    let refused = store.open_submission(SubmissionId(Uuid::now_v7()), None, None, at(2)).await;
    assert!(matches!(refused, Err(QueueError::TooManySubmissions(MAX_OPEN_SUBMISSIONS))), "{refused:?}");
    let later = at(STALE_SUBMISSION_MS + 10);
    store.open_submission(SubmissionId(Uuid::now_v7()), None, None, later).await.unwrap();
    assert_eq!(store.submission(first).await.unwrap(), None);
    assert!(store.pages(first).await.unwrap().is_empty());
}

async fn a_job_passes_through_its_states(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    let (_, committed) = submit(&*store, epoch, vec![new_job(1)]).await;
    let job = committed.queued[0].job;
    let (first, second) = (key(job, 1, epoch), key(job, 2, epoch));
    store.apply(epoch, &[started(first)], at(10)).await.unwrap();
    assert_eq!(state(&*store, job).await, JobState::Running);
    store.apply(epoch, &lost(first, 1), at(20)).await.unwrap();
    store.apply(epoch, &[started(second)], at(30)).await.unwrap();
    let ended = Change::AttemptEnded { key: second, outcome: Outcome::Aborted, message: None };
    store.apply(epoch, &[ended, Change::Cancelled { job }], at(40)).await.unwrap();
    let record = store.job(job).await.unwrap().unwrap();
    assert_eq!((record.state, record.attempt, record.finished), (JobState::Cancelled, AttemptNo(2), Some(at(40))));
    assert_eq!((record.model.as_deref(), record.node), (Some("m"), Some(NodeId("a".to_owned()))));
    let attempts = store.attempts(job).await.unwrap();
    let outcomes: Vec<_> = attempts.iter().map(|a| (a.attempt.0, a.outcome.as_str(), a.started, a.ended)).collect();
    assert_eq!(outcomes, [(1, "node_lost", at(10), Some(at(20))), (2, "aborted", at(30), Some(at(40)))]);
    assert_eq!(attempts[0].message.as_deref(), Some("gone"));
    assert_eq!(attempts[0].devices, [DeviceIndex(1), DeviceIndex(3)]);
    store.apply(epoch, &[Change::Retried { job }], at(50)).await.unwrap();
    let (state, live) = store.live_job(job).await.unwrap().unwrap();
    assert_eq!((state, live.attempt, live.losses, live.running), (JobState::Queued, AttemptNo(2), 0, None));
}

async fn a_change_that_does_not_fit_undoes_its_whole_transaction(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    let (_, committed) = submit(&*store, epoch, vec![new_job(1), new_job(2)]).await;
    let (a, b) = (committed.queued[0].job, committed.queued[1].job);
    let misfits = [
        Change::Done { job: b, result_json: "{}".to_owned(), warnings: Vec::new() },
        Change::Requeued { job: b, failures: 0, losses: 0 },
        Change::Retried { job: b },
        Change::AttemptEnded { key: key(b, 1, epoch), outcome: Outcome::Completed, message: None },
        started(key(b, 2, epoch)),
        Change::Cancelled { job: JobId::new() },
        Change::Log { job: JobId::new(), attempt: None, line: String::new() },
    ];
    for misfit in misfits {
        let result = store.apply(epoch, &[Change::Cancelled { job: a }, misfit.clone()], at(2)).await;
        assert!(matches!(result, Err(QueueError::Conflict(_))), "{misfit:?}: {result:?}");
        assert_eq!(state(&*store, a).await, JobState::Queued, "{misfit:?}");
    }
    store.apply(epoch, &[started(key(a, 1, epoch))], at(3)).await.unwrap();
    assert!(store.apply(epoch, &[started(key(a, 2, epoch))], at(3)).await.is_err(), "one live attempt");
}

async fn live_jobs_are_what_a_restart_needs(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    let (_, committed) = submit(&*store, epoch, vec![new_job(1), new_job(2), new_job(3)]).await;
    let jobs: Vec<JobId> = committed.queued.iter().map(|job| job.job).collect();
    let running = key(jobs[1], 1, epoch);
    store.apply(epoch, &[Change::Cancelled { job: jobs[0] }, started(running)], at(2)).await.unwrap();
    drop(store);
    let store = opener.open().await;
    let live = store.live_jobs().await.unwrap();
    assert_eq!(live.iter().map(|job| (job.job, job.seq)).collect::<Vec<_>>(), [(jobs[1], 2), (jobs[2], 3)]);
    let attempt = live[0].running.clone().unwrap();
    assert_eq!(
        (attempt.key, attempt.devices, attempt.boot),
        (running, vec![DeviceIndex(1), DeviceIndex(3)], BootId(Uuid::from_u128(7)))
    );
    let clip = (attempt.clip.model.as_str(), attempt.clip.model_hash.as_str(), attempt.clip.spec_json.as_str());
    assert_eq!(clip, ("m", "h", "{}"), "what helpers of it are told");
    assert_eq!(live[1].running, None);
    let requests = store.requests(&[jobs[2], jobs[1]]).await.unwrap();
    assert_eq!(requests.len(), 2);
    assert!(
        requests.iter().any(|loaded| loaded.job == jobs[2] && loaded.request.prompt == "prompt 3" && loaded.seed == 3)
    );
    assert!(store.requests(&[JobId::new()]).await.is_err());
}

/// The life of a few jobs, with the store dropped and opened again after each transaction.
async fn every_committed_prefix_is_a_legal_farm(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    let (_, committed) = submit(&*store, epoch, (1..=3).map(new_job).collect()).await;
    let jobs: Vec<JobId> = committed.queued.iter().map(|job| job.job).collect();
    let k = |job: usize, attempt| key(jobs[job], attempt, epoch);
    let done = |job: usize, attempt| {
        let ended = Change::AttemptEnded { key: k(job, attempt), outcome: Outcome::Completed, message: None };
        let result_json = result_json(k(job, attempt));
        vec![ended, Change::Done { job: jobs[job], result_json, warnings: vec!["cut".to_owned()] }]
    };
    let transactions = [
        (vec![started(k(0, 1))], [1, 0, 0]),
        (lost(k(0, 1), 1), [0, 0, 0]),
        ([vec![started(k(0, 2))], vec![Change::Cancelled { job: jobs[1] }]].concat(), [1, 9, 0]),
        (done(0, 2), [9, 9, 0]),
        (vec![Change::Retried { job: jobs[1] }], [9, 0, 0]),
        (vec![started(k(1, 1)), Change::Failed { job: jobs[2], reason: "bad".to_owned() }], [9, 1, 9]),
        (done(1, 1), [9, 9, 9]),
    ];
    drop(store);
    for (n, (changes, expected)) in transactions.into_iter().enumerate() {
        let store = opener.open().await;
        store.apply(epoch, &changes, at(n as i64)).await.unwrap();
        drop(store);
        let live = opener.open().await.live_jobs().await.unwrap();
        let farm = Farm::restore(Limits::default(), epoch, "memory:".to_owned(), Tiling::AUTO, live, Time::default());
        for (job, expected) in jobs.iter().zip(expected) {
            let found = match (farm.holds(*job), farm.running(*job)) {
                (true, Some(_)) => 1,
                (true, None) => 0,
                (false, _) => 9,
            };
            assert_eq!(found, expected, "transaction {n}, job {job}");
        }
    }
    let store = opener.open().await;
    let record = store.job(jobs[0]).await.unwrap().unwrap();
    assert_eq!((record.state, record.warnings), (JobState::Done, vec!["cut".to_owned()]));
    assert_eq!(record.result.unwrap().attempt, AttemptNo(2));
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

async fn a_log_keeps_its_newest_lines(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    let (_, committed) = submit(&*store, epoch, vec![new_job(1), new_job(2)]).await;
    let (job, other) = (committed.queued[0].job, committed.queued[1].job);
    let total = MAX_LOG_LINES as u64 + 5;
    let line = |n: u64| Change::Log { job, attempt: (n > 1).then_some(AttemptNo(1)), line: format!("line {n}") };
    store.apply(epoch, &(1..=total).map(line).collect::<Vec<_>>(), at(2)).await.unwrap();
    store.apply(epoch, &[Change::Log { job: other, attempt: None, line: "other".to_owned() }], at(3)).await.unwrap();
    let page = store.log(job, 0, 3).await.unwrap();
    assert_eq!((page.lines[0].line.as_str(), page.lines.len(), page.next), ("line 6", 3, 8));
    let rest = store.log(job, page.next, 2000).await.unwrap();
    assert_eq!((rest.lines.len(), rest.next), (MAX_LOG_LINES as usize - 3, total));
    let end = store.log(job, total, 10).await.unwrap();
    assert_eq!((end.lines.len(), end.next), (0, total));
    assert_eq!(store.log(other, 0, 10).await.unwrap().lines[0].at, at(3));
}

async fn jobs_are_found_by_the_end_of_their_id(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    let with_id = |n: u8, id: &str| NewJob { job: id.parse().unwrap(), ..new_job(n) };
    let (a, b) = ("00000000000000000000aaaaaaaabeef", "00000000000000000000bbbbbbbbbeef");
    submit(&*store, epoch, vec![with_id(1, a), with_id(2, b)]).await;
    let found = async |ending: &str| {
        store.jobs_ending_in(ending).await.unwrap().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(found("abeef").await, [a]);
    assert_eq!(found("beef").await.len(), 2);
    assert_eq!(found(&b[5..]).await, [b]);
    assert_eq!(found("1aaaaaaaabeef").await, [""; 0]);
    assert_eq!(found("ffff").await, [""; 0]);
}

async fn listings_come_in_pages_by_state_and_submission(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    let (_, first) = submit(&*store, epoch, (1..=3).map(new_job).collect()).await;
    let (second, _) = submit(&*store, epoch, (3..=4).map(new_job).collect()).await;
    let jobs: Vec<JobId> = first.queued.iter().map(|job| job.job).collect();
    store.apply(epoch, &[Change::Cancelled { job: jobs[1] }], at(2)).await.unwrap();
    let list = async |filter: JobFilter| {
        let records = store.jobs(filter).await.unwrap();
        records.into_iter().map(|record| record.request.prompt).collect::<Vec<_>>()
    };
    let all = JobFilter { limit: 10, ..JobFilter::default() };
    assert_eq!(list(all).await, ["prompt 1", "prompt 2", "prompt 3", "prompt 4"]);
    assert_eq!(list(JobFilter { limit: 2, ..all }).await, ["prompt 1", "prompt 2"]);
    assert_eq!(list(JobFilter { after: Some(jobs[1]), limit: 1, ..all }).await, ["prompt 3"]);
    assert_eq!(list(JobFilter { state: Some(JobState::Cancelled), ..all }).await, ["prompt 2"]);
    assert_eq!(list(JobFilter { submission: Some(second), ..all }).await, ["prompt 3", "prompt 4"]);
}

async fn odd_text_and_extreme_numbers_survive(opener: &dyn Opener) {
    let store = opener.open().await;
    let epoch = store.begin_epoch().await.unwrap();
    let mut odd = new_job(1);
    odd.request.prompt = "\0 'quoted' \"twice\" %_ \u{1F3AC} \u{FEFF}\r\n".to_owned();
    (odd.seed, odd.priority, odd.model) = (u64::MAX, i32::MIN, Some("m'); DROP TABLE jobs; --\0".to_owned()));
    let (_, committed) = submit(&*store, epoch, vec![odd.clone()]).await;
    let job = committed.queued[0].job;
    let line = "a\0b";
    store.apply(epoch, &[Change::Log { job, attempt: None, line: line.to_owned() }], at(2)).await.unwrap();
    let store = opener.open().await;
    let record = store.job(job).await.unwrap().unwrap();
    assert_eq!(
        (record.request, record.seed, record.priority, record.model),
        (odd.request, u64::MAX, i32::MIN, odd.model)
    );
    assert_eq!(store.log(job, 0, 1).await.unwrap().lines[0].line, line);
}
