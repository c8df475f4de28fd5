//! Usage, the audit trail, and what becomes of old rows.

use std::collections::BTreeMap;
use std::time::Duration;

use farm_core::id::{AttemptNo, JobId};
use farm_core::job::state::JobState;
use jiff::Timestamp;
use sqlx::{AnyConnection, AssertSqlSafe, Connection, Executor};

use super::super::location::Location;
use super::super::store::{Leftover, NewDependency, NewJob, Pruned, QueueStore, Retention, UsageBy, Used};
use super::{Queue, after, at, done, ended, finish, jobs, key, lost, new_job, rules, started, state, submit};
use crate::core::effects::{Change, Outcome};
use crate::core::events::Counts;

rules![
    usage_is_what_ended_attempts_used,
    the_audit_trail_is_read_from_where_one_was,
    objects_of_ended_jobs_are_to_be_cleaned_once,
    old_rows_go_and_usage_stays,
    what_live_jobs_need_stays,
    old_logs_and_audit_lines_go,
    spoilt_rows_are_noticed,
];

const DAY: i64 = 24 * 3_600_000;
const EVER: (Timestamp, Timestamp) = (Timestamp::UNIX_EPOCH, Timestamp::MAX);

const SHORT: Retention = Retention {
    leftovers: Duration::from_millis(10),
    logs: Duration::from_millis(100),
    jobs: Duration::from_millis(1000),
    audit: Duration::from_millis(5000),
};

async fn usage(store: &dyn QueueStore, by: UsageBy) -> Vec<(String, String, u64, u64, u64, u64)> {
    let used = store.usage(by, EVER.0, EVER.1).await.unwrap();
    let row = |used: Used| (used.name, used.device, used.attempts, used.clips, used.device_ms, used.lost_device_ms);
    used.into_iter().map(row).collect()
}

fn row(name: &str, attempts: u64, clips: u64, used: u64, lost: u64) -> (String, String, u64, u64, u64, u64) {
    (name.to_owned(), "big".to_owned(), attempts, clips, used, lost)
}

async fn usage_is_what_ended_attempts_used(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let labelled = |n, film: &str, extra: &str| {
        let mut job = new_job(n);
        job.request.labels = BTreeMap::from([("film".to_owned(), film.to_owned()), ("x".to_owned(), extra.to_owned())]);
        job
    };
    let lines = vec![labelled(1, "a", "1"), labelled(2, "a", "2"), labelled(3, "b", "1"), new_job(4)];
    let (_, committed) = submit(&*store, epoch, lines).await;
    let jobs: Vec<JobId> = committed.submitted.queued.iter().map(|job| job.job).collect();
    store.apply(epoch, &jobs.iter().map(|job| started(key(*job, 1, epoch))).collect::<Vec<_>>(), at(0)).await.unwrap();
    let [a, b, c, d] = [0, 1, 2, 3].map(|i: usize| key(jobs[i], 1, epoch));
    store.apply(epoch, &[done(a, 100), lost(b, 1)].concat(), at(5)).await.unwrap();
    store.apply(epoch, &[done(c, 30), done(d, 4)].concat(), at(DAY)).await.unwrap();
    assert_eq!(usage(&*store, UsageBy::Tenant).await, [row("default", 4, 3, 1134, 1000)]);
    assert_eq!(
        usage(&*store, UsageBy::Day).await,
        [row("2023-11-14", 2, 1, 1100, 1000), row("2023-11-15", 2, 2, 34, 0)]
    );
    assert_eq!(
        usage(&*store, UsageBy::Label("film".to_owned())).await,
        [row("", 1, 1, 4, 0), row("a", 2, 1, 1100, 1000), row("b", 1, 1, 30, 0)]
    );
    assert_eq!(usage(&*store, UsageBy::Label("none".to_owned())).await, [row("", 4, 3, 1134, 1000)]);
    let between = async |since, until| {
        store.usage(UsageBy::Tenant, at(since), at(until)).await.unwrap().iter().map(|used| used.attempts).sum::<u64>()
    };
    assert_eq!(
        [between(0, 1).await, between(1, DAY).await, between(DAY, 2 * DAY).await, between(9, 9).await],
        [2, 4, 2, 2]
    );
    assert_eq!(between(-DAY, -DAY / 2).await, 0);
}

async fn the_audit_trail_is_read_from_where_one_was(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let line = |n: u32| Change::Audit {
        by: "eve\0".to_owned(),
        action: "cancel",
        subject: format!("job {n}"),
        detail: String::new(),
    };
    store.apply(epoch, &(1..=5).map(line).collect::<Vec<_>>(), at(1)).await.unwrap();
    let first = store.audit(0, 2).await.unwrap();
    let rest = store.audit(first.next, 10).await.unwrap();
    let subjects: Vec<_> = first.entries.iter().chain(&rest.entries).map(|entry| entry.subject.as_str()).collect();
    assert_eq!(subjects, ["job 1", "job 2", "job 3", "job 4", "job 5"]);
    assert_eq!((first.entries[0].by.as_str(), first.entries[0].at), ("eve\u{FFFD}", at(1)));
    let end = store.audit(rest.next, 10).await.unwrap();
    assert_eq!((end.entries.len(), end.next), (0, rest.next));
}

async fn objects_of_ended_jobs_are_to_be_cleaned_once(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let jobs = jobs(&*store, epoch, 3).await;
    let [first, second] = [1, 2].map(|attempt| key(jobs[0], attempt, epoch));
    store.apply(epoch, &[started(first)], at(1)).await.unwrap();
    store.apply(epoch, &lost(first, 1), at(2)).await.unwrap();
    store.apply(epoch, &[started(second)], at(3)).await.unwrap();
    // The second attempt found the first one's clip.
    let result_json = super::result_json(first);
    let found = [ended(second, Outcome::Completed, 1), Change::Done { job: jobs[0], result_json, warnings: vec![] }];
    store.apply(epoch, &found, at(4)).await.unwrap();
    store.apply(epoch, &[Change::Failed { job: jobs[1], reason: "bad".to_owned() }], at(5)).await.unwrap();
    let leftovers = async |when| store.leftovers(SHORT, at(when), 10).await.unwrap();
    assert_eq!(leftovers(14).await, []);
    let done = Leftover { job: jobs[0], attempts: AttemptNo(2), accepted: Some(AttemptNo(1)) };
    let failed = Leftover { job: jobs[1], attempts: AttemptNo(0), accepted: None };
    assert_eq!(leftovers(100).await, [done, failed]);
    store.mark_clean(epoch, &[jobs[0], jobs[1], jobs[2]]).await.unwrap();
    assert_eq!(leftovers(100).await, []);
    store.apply(epoch, &[Change::Retried { job: jobs[1] }], at(6)).await.unwrap();
    store.apply(epoch, &[Change::Cancelled { job: jobs[1] }, Change::Cancelled { job: jobs[2] }], at(7)).await.unwrap();
    assert_eq!(leftovers(100).await.iter().map(|left| left.job).collect::<Vec<_>>(), jobs[1..]);
}

async fn old_rows_go_and_usage_stays(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let mut labelled = new_job(1);
    labelled.request.labels = BTreeMap::from([("film".to_owned(), "a".to_owned())]);
    let (submission, committed) = submit(&*store, epoch, vec![labelled, after(2, [NewDependency::Line(0)])]).await;
    let jobs: Vec<JobId> = committed.submitted.queued.iter().map(|job| job.job).collect();
    finish(&*store, epoch, jobs[0], at(2)).await;
    let log = Change::Log { job: jobs[1], attempt: None, line: "x".to_owned() };
    store.apply(epoch, &[log, Change::Cancelled { job: jobs[1] }], at(500)).await.unwrap();
    let prune = async |when, dry_run| store.prune(epoch, SHORT, at(when), dry_run).await.unwrap();
    assert_eq!(prune(9000, false).await.jobs, 0, "their objects may be there");
    store.mark_clean(epoch, &jobs).await.unwrap();
    assert_eq!(prune(1002, true).await.jobs, 0);
    assert_eq!(prune(1003, true).await.jobs, 1);
    assert_eq!(prune(1003, false).await.jobs, 1);
    queue.check().await;
    assert_eq!(store.job(jobs[0]).await.unwrap(), None);
    let left = store.batch(submission).await.unwrap().unwrap().jobs;
    assert_eq!(left, [(JobState::Cancelled, 1)].into());
    assert_eq!(prune(2000, false).await.jobs, 1);
    assert_eq!((store.batch(submission).await.unwrap(), store.submission(submission).await.unwrap()), (None, None));
    assert_eq!(prune(2000, false).await, Pruned::default());
    assert_eq!(usage(&*store, UsageBy::Label("film".to_owned())).await, [row("a", 1, 1, 1000, 0)]);
    // The same line is a new job now.
    let (_, again) = submit(&*store, epoch, vec![new_job(1)]).await;
    assert_eq!(again.reply.new, 1);
    let next_day = at(DAY);
    store.prune(epoch, SHORT, next_day, false).await.unwrap();
    assert_eq!(usage(&*store, UsageBy::Tenant).await, [], "its hour is past");
}

async fn what_live_jobs_need_stays(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let (_, one) = submit(&*store, epoch, vec![new_job(1)]).await;
    let (batch, two) = submit(&*store, epoch, vec![new_job(2)]).await;
    let (_, three) = submit(&*store, epoch, vec![new_job(3), new_job(4)]).await;
    let (_, four) = submit(&*store, epoch, vec![new_job(5)]).await;
    let job = |committed: &super::Committed, i: usize| committed.submitted.queued[i].job;
    let (first, second, third, live, free) =
        (job(&one, 0), job(&two, 0), job(&three, 0), job(&three, 1), job(&four, 0));
    let waiter = |n, on| NewJob { priority: 1, ..after(n, [NewDependency::Id(on)]) };
    let (_, waiting) = submit(&*store, epoch, vec![waiter(6, first.0), waiter(7, batch.0)]).await;
    for ended in [first, second, third, free] {
        finish(&*store, epoch, ended, at(2)).await;
    }
    store.mark_clean(epoch, &[first, second, third, free]).await.unwrap();
    let prune = async || store.prune(epoch, SHORT, at(9000), false).await.unwrap().jobs;
    assert_eq!(prune().await, 1);
    assert_eq!(store.job(free).await.unwrap(), None);
    for kept in [first, second, third] {
        assert_eq!(state(&*store, kept).await, JobState::Done);
    }
    let gone = [live, job(&waiting, 0), job(&waiting, 1)];
    store.apply(epoch, &gone.map(|job| Change::Cancelled { job }), at(3)).await.unwrap();
    assert_eq!(prune().await, 3, "those that ended are not clean, but need nothing");
    store.mark_clean(epoch, &gone).await.unwrap();
    assert_eq!(prune().await, 3);
    assert_eq!(store.batches(10).await.unwrap(), []);
}

async fn old_logs_and_audit_lines_go(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let jobs = jobs(&*store, epoch, 2).await;
    let log = |job: JobId| Change::Log { job, attempt: None, line: "x".to_owned() };
    let audit = Change::Audit { by: String::new(), action: "x", subject: String::new(), detail: String::new() };
    store.apply(epoch, &[log(jobs[0]), log(jobs[1]), audit.clone()], at(2)).await.unwrap();
    store.apply(epoch, &[Change::Cancelled { job: jobs[0] }], at(3)).await.unwrap();
    store.apply(epoch, &[audit], at(4000)).await.unwrap();
    let expected = Pruned { logs: 1, jobs: 0, audit: 1 };
    for dry_run in [true, false] {
        assert_eq!(store.prune(epoch, SHORT, at(6000), dry_run).await.unwrap(), expected);
    }
    let lines = async |job| store.log(job, 0, 9).await.unwrap().lines.len();
    assert_eq!((lines(jobs[0]).await, lines(jobs[1]).await), (0, 1));
    assert_eq!(store.audit(0, 9).await.unwrap().entries.len(), 1);
}

/// Each way of spoiling the rows is noticed. What the database's own guards refuse is not among them.
async fn spoilt_rows_are_noticed(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let jobs = jobs(&*store, epoch, 4).await;
    finish(&*store, epoch, jobs[0], at(2)).await;
    let first = key(jobs[1], 1, epoch);
    store.apply(epoch, &[started(first)], at(2)).await.unwrap();
    store.apply(epoch, &lost(first, 1), at(3)).await.unwrap();
    store.apply(epoch, &[started(key(jobs[1], 2, epoch))], at(4)).await.unwrap();
    let counts = Counts { losses: 2, ..Counts::default() };
    store.apply(epoch, &[Change::Counted { job: jobs[2], counts }], at(4)).await.unwrap();
    queue.check().await;
    let url = queue.place.parse::<Location>().unwrap().url().unwrap();
    let mut connection = AnyConnection::connect(&url).await.unwrap();
    for (spoil, repair, noticed) in [
        (
            "UPDATE attempts SET outcome = 'aborted' WHERE outcome = 'completed'",
            "UPDATE attempts SET outcome = 'completed' WHERE outcome = 'aborted'",
            "is done and has 0 completed attempts",
        ),
        (
            "UPDATE jobs SET state = 'queued' WHERE seq = 2",
            "UPDATE jobs SET state = 'running' WHERE seq = 2",
            "is queued and has 1 running attempts",
        ),
        (
            "UPDATE jobs SET state = 'running' WHERE seq = 3",
            "UPDATE jobs SET state = 'queued' WHERE seq = 3",
            "is running and has 0 running attempts",
        ),
        ("UPDATE jobs SET attempt = 2 WHERE seq = 3", "UPDATE jobs SET attempt = 0 WHERE seq = 3", "says attempt 2"),
        (
            "UPDATE attempts SET epoch = 9 WHERE job = 2 AND attempt = 1",
            "UPDATE attempts SET epoch = 1",
            "after one of epoch 9",
        ),
        ("UPDATE attempts SET epoch = 9 WHERE job = 1", "UPDATE attempts SET epoch = 1", "which has not begun"),
        (
            "UPDATE ledger SET device_ms = device_ms + 1",
            "UPDATE ledger SET device_ms = device_ms - 1",
            "by 0 attempts, 0 clips and 1 ms",
        ),
        ("UPDATE ledger SET clips = clips + 1", "UPDATE ledger SET clips = clips - 1", "1 clips"),
        ("DELETE FROM submission_jobs WHERE job = 4", "INSERT INTO submission_jobs VALUES (1, 4)", "is of no batch"),
        ("UPDATE submissions SET jobs = 5", "UPDATE submissions SET jobs = 4", "had 5 jobs"),
        (
            "UPDATE jobs SET state = 'failed', reason = '', finished = 1 WHERE seq = 4",
            "UPDATE jobs SET state = 'queued', finished = NULL WHERE seq = 4",
            "failed without a reason",
        ),
        ("INSERT INTO dependencies VALUES (2, 1, 4, NULL)", "DELETE FROM dependencies", "before job"),
    ] {
        connection.execute(sqlx::raw_sql(AssertSqlSafe(spoil))).await.unwrap();
        let violations = store.violations().await.unwrap();
        assert!(violations.iter().any(|violation| violation.contains(noticed)), "{spoil}: {violations:?}");
        connection.execute(sqlx::raw_sql(AssertSqlSafe(repair))).await.unwrap();
        queue.check().await;
    }
}
