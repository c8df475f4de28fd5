//! Changes, and what a restart finds of them.

use farm_core::api::{Quota, TenantSpec};
use farm_core::id::{AttemptNo, BootId, DeviceIndex, JobId, NodeId, TenantId};
use farm_core::job::state::JobState;
use uuid::Uuid;

use super::super::store::{MAX_LOG_LINES, QueueError};
use super::{
    HOUR, Queue, at, done, ended, finish, jobs, key, lost, new_job, reign, result_json, rules, started, state, submit,
};
use crate::core::effects::{Change, Outcome};
use crate::core::events::{Counts, Scope};

rules![
    a_write_of_an_old_reign_is_refused,
    a_job_passes_through_its_states,
    a_change_that_does_not_fit_undoes_its_whole_transaction,
    a_thousand_jobs_change_in_one_transaction,
    a_job_changes_several_times_in_one_transaction,
    live_jobs_are_what_a_restart_needs,
    every_committed_prefix_can_be_loaded,
    pauses_drains_and_tenants_outlive_a_restart,
    predictions_start_from_the_newest_completed_attempts,
    a_log_keeps_its_newest_lines,
    odd_text_and_extreme_numbers_survive,
];

async fn a_write_of_an_old_reign_is_refused(queue: &Queue) {
    let (store, old) = queue.lead().await;
    let job = jobs(&*store, old, 1).await[0];
    reign(&*store).await;
    let refused = store.apply(old, &[Change::Cancelled { job }], at(2)).await;
    assert!(matches!(refused, Err(QueueError::Superseded(epoch)) if epoch == old), "{refused:?}");
    assert!(matches!(store.beat(old).await, Err(QueueError::Superseded(_))));
    assert!(matches!(store.mark_clean(old, &[job]).await, Err(QueueError::Superseded(_))));
    assert_eq!(state(&*store, job).await, JobState::Queued);
}

async fn a_job_passes_through_its_states(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let job = jobs(&*store, epoch, 1).await[0];
    let (first, second) = (key(job, 1, epoch), key(job, 2, epoch));
    store.apply(epoch, &[started(first)], at(10)).await.unwrap();
    assert_eq!(state(&*store, job).await, JobState::Running);
    store.apply(epoch, &lost(first, 1), at(20)).await.unwrap();
    store.apply(epoch, &[started(second)], at(30)).await.unwrap();
    let counts = Counts { losses: 1, kills: 1, killed_at: 1, ..Counts::default() };
    store.apply(epoch, &[Change::Counted { job, counts }], at(35)).await.unwrap();
    assert_eq!(store.live_job(job).await.unwrap().unwrap().1.counts, counts);
    store.apply(epoch, &[ended(second, Outcome::Aborted, 7), Change::Cancelled { job }], at(40)).await.unwrap();
    let record = store.job(job).await.unwrap().unwrap();
    assert_eq!((record.state, record.attempt, record.finished), (JobState::Cancelled, AttemptNo(2), Some(at(40))));
    assert_eq!((record.model.as_deref(), record.node), (Some("m"), Some(NodeId("a".to_owned()))));
    let attempts = store.attempts(job).await.unwrap();
    let outcomes: Vec<_> = attempts.iter().map(|a| (a.attempt.0, a.outcome.as_str(), a.started, a.ended)).collect();
    assert_eq!(outcomes, [(1, "node_lost", at(10), Some(at(20))), (2, "aborted", at(30), Some(at(40)))]);
    assert_eq!((attempts[0].message.as_deref(), attempts[1].device_seconds), (Some("so"), Some(0.007)));
    assert_eq!(attempts[0].devices, [DeviceIndex(1), DeviceIndex(3)]);
    store.apply(epoch, &[Change::Retried { job }], at(50)).await.unwrap();
    let (state, live) = store.live_job(job).await.unwrap().unwrap();
    assert_eq!(
        (state, live.attempt, live.counts, live.running),
        (JobState::Queued, AttemptNo(2), Counts::default(), None)
    );
    assert_eq!(store.live_job(JobId::new()).await.unwrap(), None);
}

async fn a_change_that_does_not_fit_undoes_its_whole_transaction(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let jobs = jobs(&*store, epoch, 3).await;
    let (a, b, running) = (jobs[0], jobs[1], jobs[2]);
    store.apply(epoch, &[started(key(running, 1, epoch))], at(2)).await.unwrap();
    let misfits = [
        Change::Done { job: b, result_json: result_json(key(b, 1, epoch)), warnings: Vec::new() },
        // It has no completed attempt, and its attempt still runs.
        Change::Done { job: running, result_json: result_json(key(running, 1, epoch)), warnings: Vec::new() },
        Change::Requeued { job: running, counts: Counts::default() },
        Change::Cancelled { job: running },
        Change::Requeued { job: b, counts: Counts::default() },
        Change::Counted { job: JobId::new(), counts: Counts::default() },
        Change::Retried { job: b },
        ended(key(b, 1, epoch), Outcome::Completed, 1),
        ended(key(running, 2, epoch), Outcome::Completed, 1),
        started(key(b, 2, epoch)),
        started(key(running, 2, epoch)),
        Change::Cancelled { job: JobId::new() },
        Change::Paused { scope: Scope::Job(JobId::new()), paused: true },
        Change::Log { job: JobId::new(), attempt: None, line: String::new() },
    ];
    for misfit in misfits {
        let result = store.apply(epoch, &[Change::Cancelled { job: a }, misfit.clone()], at(2)).await;
        assert!(matches!(result, Err(QueueError::Conflict(_))), "{misfit:?}: {result:?}");
        assert_eq!(state(&*store, a).await, JobState::Queued, "{misfit:?}");
    }
    let result = store.apply(epoch, &[started(key(b, 2, epoch))], at(2)).await.unwrap_err().to_string();
    assert!(result.contains(&b.to_string()), "{result}");
}

/// More than one statement's worth of each kind, in the order in which a core makes them.
async fn a_thousand_jobs_change_in_one_transaction(queue: &Queue) {
    const JOBS: u32 = 1500;
    let (store, epoch) = queue.lead().await;
    let jobs = jobs(&*store, epoch, JOBS).await;
    let line = |job, line: &str| Change::Log { job, attempt: None, line: line.to_owned() };
    let start = |job: &JobId| [started(key(*job, 1, epoch)), line(*job, "started")];
    store.apply(epoch, &jobs.iter().flat_map(start).collect::<Vec<_>>(), at(2)).await.unwrap();
    assert_eq!(store.counts().await.unwrap(), [(JobState::Running, JOBS.into())].into());
    let end = |(i, job): (usize, &JobId)| {
        let mut changes = if i % 2 == 0 { done(key(*job, 1, epoch), 10) } else { lost(key(*job, 1, epoch), 1) };
        changes.insert(1, line(*job, "ended"));
        changes
    };
    store.apply(epoch, &jobs.iter().enumerate().flat_map(end).collect::<Vec<_>>(), at(3)).await.unwrap();
    let half = u64::from(JOBS) / 2;
    assert_eq!(store.counts().await.unwrap(), [(JobState::Queued, half), (JobState::Done, half)].into());
    let lines: Vec<String> = store.log(jobs[7], 0, 9).await.unwrap().lines.into_iter().map(|line| line.line).collect();
    assert_eq!(lines, ["started", "ended"]);
    let used = store.load(0).await.unwrap().usage;
    assert_eq!(used.iter().map(|used| used.device_ms).sum::<u64>(), half * 1010);
}

async fn a_job_changes_several_times_in_one_transaction(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let jobs = jobs(&*store, epoch, 2).await;
    let life = |job: JobId, lives: u32| {
        let life = move |n| [vec![started(key(job, n, epoch))], lost(key(job, n, epoch), n)].concat();
        (1..=lives).flat_map(life).collect::<Vec<_>>()
    };
    let mut changes = [life(jobs[0], 3), life(jobs[1], 2)].concat();
    changes.extend([Change::Cancelled { job: jobs[1] }, Change::Retried { job: jobs[1] }]);
    changes.extend([
        Change::Paused { scope: Scope::Farm, paused: true },
        Change::Paused { scope: Scope::Farm, paused: false },
    ]);
    store.apply(epoch, &changes, at(2)).await.unwrap();
    let live = |job| store.live_job(job);
    let (first, second) = (live(jobs[0]).await.unwrap().unwrap().1, live(jobs[1]).await.unwrap().unwrap().1);
    assert_eq!((first.attempt.0, first.counts.losses), (3, 3));
    assert_eq!((second.attempt.0, second.counts.losses), (2, 0));
    assert!(!store.load(0).await.unwrap().paused);
}

async fn live_jobs_are_what_a_restart_needs(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let mut third = new_job(3);
    third.request = serde_json::from_str(
        r#"{"prompt":"prompt 3","width":64,"num_frames":7,"require":{"gpu":"big"},"labels":{"film":"a"}}"#,
    )
    .unwrap();
    let (submission, committed) = submit(&*store, epoch, vec![new_job(1), new_job(2), third]).await;
    let queued = committed.submitted.queued;
    let jobs: Vec<JobId> = queued.iter().map(|job| job.job).collect();
    let running = key(jobs[1], 1, epoch);
    store.apply(epoch, &[Change::Cancelled { job: jobs[0] }, started(running)], at(2)).await.unwrap();
    drop(store);
    let store = queue.open().await;
    let saved = store.load(0).await.unwrap();
    assert_eq!(saved.jobs.iter().map(|job| (job.job, job.seq)).collect::<Vec<_>>(), [(jobs[1], 2), (jobs[2], 3)]);
    let attempt = saved.jobs[0].running.clone().unwrap();
    assert_eq!(
        (attempt.key, attempt.devices, attempt.boot, attempt.base),
        (running, vec![DeviceIndex(1), DeviceIndex(3)], BootId(Uuid::from_u128(7)), 2.5)
    );
    assert_eq!(attempt.started_ms, at(2).as_millisecond());
    let clip = (attempt.clip.model.as_str(), attempt.clip.model_hash.as_str(), attempt.clip.spec_json.as_str());
    assert_eq!(clip, ("m", "h", "{}"), "what helpers of it are told");
    assert_eq!(saved.jobs[1], queued[2], "what the commit gave is what a restart reads");
    assert_eq!((saved.jobs[1].ask.width, saved.jobs[1].ask.num_frames), (Some(64), Some(7)));
    assert_eq!(saved.jobs[1].require, [("gpu".to_owned(), "big".to_owned())].into());
    assert_eq!(saved.batches, [committed.submitted.batch.unwrap()]);
    assert_eq!(saved.batches[0].submission, submission);
    let requests = store.requests(&[jobs[2], jobs[1]]).await.unwrap();
    assert_eq!(requests.len(), 2);
    assert!(
        requests.iter().any(|loaded| loaded.job == jobs[2] && loaded.request.prompt == "prompt 3" && loaded.seed == 3)
    );
    assert!(store.requests(&[JobId::new()]).await.is_err());
}

/// The life of a few jobs, with the store dropped and opened again after each transaction.
async fn every_committed_prefix_can_be_loaded(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let jobs = jobs(&*store, epoch, 3).await;
    let k = |job: usize, attempt| key(jobs[job], attempt, epoch);
    // For each job: 0 waits, 1 runs, 9 has ended.
    let transactions = [
        (vec![started(k(0, 1))], [1, 0, 0]),
        (lost(k(0, 1), 1), [0, 0, 0]),
        ([vec![started(k(0, 2))], vec![Change::Cancelled { job: jobs[1] }]].concat(), [1, 9, 0]),
        (done(k(0, 2), 5), [9, 9, 0]),
        (vec![Change::Retried { job: jobs[1] }], [9, 0, 0]),
        (vec![started(k(1, 1)), Change::Failed { job: jobs[2], reason: "bad".to_owned() }], [9, 1, 9]),
        (done(k(1, 1), 5), [9, 9, 9]),
    ];
    drop(store);
    for (n, (changes, expected)) in transactions.into_iter().enumerate() {
        queue.open().await.apply(epoch, &changes, at(n as i64)).await.unwrap();
        let saved = queue.open().await.load(0).await.unwrap();
        for (job, expected) in jobs.iter().zip(expected) {
            let found = match saved.jobs.iter().find(|live| live.job == *job) {
                Some(live) => i32::from(live.running.is_some()),
                None => 9,
            };
            assert_eq!(found, expected, "transaction {n}, job {job}");
        }
        queue.check().await;
    }
    let record = queue.open().await.job(jobs[0]).await.unwrap().unwrap();
    assert_eq!((record.state, record.warnings), (JobState::Done, vec!["cut".to_owned()]));
    assert_eq!(record.result.unwrap().attempt, AttemptNo(2));
}

async fn pauses_drains_and_tenants_outlive_a_restart(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let (submission, committed) = submit(&*store, epoch, vec![new_job(1)]).await;
    let job = committed.submitted.queued[0].job;
    let tenant: TenantId = "lab".parse().unwrap();
    let quota = Quota { devices: Some(4), queued: None, device_seconds: Some(1000) };
    let spec = TenantSpec { share: 2.5, quota };
    let node = NodeId("a".to_owned());
    let paused = |paused| {
        [
            Scope::Farm,
            Scope::Tenant(tenant.clone()),
            Scope::Tenant(TenantId::default()),
            Scope::Batch(submission),
            Scope::Job(job),
        ]
        .map(|scope| Change::Paused { scope, paused })
    };
    let mut changes = vec![Change::Tenant { tenant: tenant.clone(), spec: spec.clone() }];
    changes.extend(paused(true));
    changes.extend([true, true].map(|drained| Change::Drained { node: node.clone(), drained }));
    store.apply(epoch, &changes, at(2)).await.unwrap();
    let saved = queue.open().await.load(0).await.unwrap();
    assert!(saved.paused && saved.batches[0].paused && saved.jobs[0].paused);
    assert_eq!(saved.drained, std::slice::from_ref(&node));
    let tenants: Vec<_> = saved.tenants.iter().map(|row| (row.tenant.as_str(), row.spec.clone(), row.paused)).collect();
    assert_eq!(tenants, [("default", TenantSpec::default(), true), ("lab", spec, true)]);
    assert!(store.batch(submission).await.unwrap().unwrap().paused);
    let mut changes = paused(false).to_vec();
    changes.push(Change::Drained { node, drained: false });
    changes.push(Change::Tenant { tenant, spec: TenantSpec::default() });
    store.apply(epoch, &changes, at(3)).await.unwrap();
    let saved = store.load(0).await.unwrap();
    assert!(!saved.paused && !saved.batches[0].paused && !saved.jobs[0].paused && saved.drained.is_empty());
    assert!(saved.tenants.iter().all(|tenant| !tenant.paused && tenant.spec == TenantSpec::default()));
}

async fn predictions_start_from_the_newest_completed_attempts(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let jobs = jobs(&*store, epoch, 3).await;
    store.apply(epoch, &[started(key(jobs[0], 1, epoch))], at(0)).await.unwrap();
    store.apply(epoch, &done(key(jobs[0], 1, epoch), 9), at(1500)).await.unwrap();
    store.apply(epoch, &[started(key(jobs[1], 1, epoch))], at(2000)).await.unwrap();
    store.apply(epoch, &lost(key(jobs[1], 1, epoch), 1), at(9000)).await.unwrap();
    finish(&*store, epoch, jobs[2], at(9500)).await;
    let saved = store.load(HOUR).await.unwrap();
    let measured: Vec<_> =
        saved.measured.iter().map(|m| (m.model.as_str(), m.device.as_str(), m.base, m.seconds)).collect();
    assert_eq!(measured, [("m", "big", 2.5, 1.5), ("m", "big", 2.5, 0.0)]);
    let usage: Vec<_> = saved.usage.iter().map(|used| (used.tenant.as_str(), used.hour, used.device_ms)).collect();
    assert_eq!(usage, [("default", HOUR, 2009)]);
    assert!(store.load(HOUR + 1).await.unwrap().usage.is_empty());
}

async fn a_log_keeps_its_newest_lines(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let jobs = jobs(&*store, epoch, 2).await;
    let (job, other) = (jobs[0], jobs[1]);
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

/// Postgres has no character zero: in free text it becomes another. Requests keep it.
async fn odd_text_and_extreme_numbers_survive(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let mut odd = new_job(1);
    odd.request.prompt = "\0 'quoted' \"twice\" %_ \u{1F3AC} \u{FEFF}\r\n".to_owned();
    odd.request.labels = [("\0'\"".to_owned(), "\u{1F3AC}".to_owned())].into();
    (odd.seed, odd.priority, odd.model) = (u64::MAX, i32::MIN, Some("m'); DROP TABLE jobs; --\0".to_owned()));
    let (_, committed) = submit(&*store, epoch, vec![odd.clone()]).await;
    let job = committed.submitted.queued[0].job;
    let line = "'\"a\0b\\u0000\u{1F3AC}";
    let log = Change::Log { job, attempt: None, line: line.to_owned() };
    let failed = Change::Failed { job, reason: line.to_owned() };
    store.apply(epoch, &[log, failed], at(2)).await.unwrap();
    let store = queue.open().await;
    let record = store.job(job).await.unwrap().unwrap();
    assert_eq!((record.request, record.seed, record.priority), (odd.request, u64::MAX, i32::MIN));
    assert_eq!(record.model, odd.model.map(|model| model.replace('\0', "\u{FFFD}")));
    assert_eq!(record.reason, Some(line.replace('\0', "\u{FFFD}")));
    assert_eq!(store.log(job, 0, 1).await.unwrap().lines[0].line, line.replace('\0', "\u{FFFD}"));
}
