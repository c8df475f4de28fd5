//! Uploads, their commits, and how they are found again.

use farm_core::api::{OpenSubmission, TenantSpec};
use farm_core::id::{JobId, SubmissionId, TenantId};
use farm_core::job::state::JobState;
use uuid::Uuid;

use super::super::store::{JobFilter, MAX_OPEN_SUBMISSIONS, NewDependency, NewJob, QueueError, STALE_SUBMISSION_MS};
use super::{
    Queue, after, at, batch, done, finish, jobs, key, new_job, opened, refusal, refused, rules, started, state, submit,
};
use crate::core::effects::Change;
use crate::core::events::Dependency;

rules![
    a_submission_is_committed_once,
    the_same_lines_are_the_same_jobs,
    failed_and_cancelled_jobs_are_queued_again,
    a_submission_is_of_a_tenant_that_is_known,
    a_tenant_has_no_more_jobs_than_its_quota,
    lines_come_after_lines_jobs_and_batches,
    what_can_never_be_is_refused,
    a_job_that_is_queued_again_does_not_come_after_itself,
    pages_are_kept_until_the_commit,
    uploads_that_nobody_commits_do_not_pile_up,
    jobs_are_found_by_the_end_of_their_id,
    listings_come_in_pages_by_state_and_submission,
    batches_are_counted_and_listed,
];

async fn a_submission_is_committed_once(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let (submission, first) = submit(&*store, epoch, vec![new_job(1), new_job(2)]).await;
    assert_eq!((first.reply.new, first.submitted.queued.len()), (2, 2));
    assert_eq!(first.submitted.queued.iter().map(|job| job.seq).collect::<Vec<_>>(), [1, 2]);
    let again = store.commit_submission(epoch, batch(submission, vec![new_job(3)]), at(2)).await.unwrap();
    assert_eq!((again.reply, again.submitted), (first.reply.clone(), Default::default()));
    assert_eq!(store.submission(submission).await.unwrap().unwrap().reply, Some(first.reply));
    assert_eq!(store.counts().await.unwrap().get(&JobState::Queued), Some(&2));
    let unknown = store.commit_submission(epoch, batch(SubmissionId(Uuid::nil()), vec![new_job(3)]), at(2)).await;
    assert!(matches!(unknown, Err(QueueError::Conflict(_))));
}

async fn the_same_lines_are_the_same_jobs(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    // More than one statement's worth.
    let many = || (1..=1234).map(new_job).collect::<Vec<_>>();
    let (before, first) = submit(&*store, epoch, many()).await;
    assert_eq!((first.reply.new, first.reply.existing), (1234, 0));
    let jobs: Vec<JobId> = first.submitted.queued.iter().map(|job| job.job).collect();
    finish(&*store, epoch, jobs[0], at(2)).await;
    let mut more = many();
    more.push(new_job(9999));
    let (submission, second) = submit(&*store, epoch, more).await;
    assert_eq!((second.reply.new, second.reply.existing, second.submitted.queued.len()), (1, 1234, 1));
    assert_eq!(second.submitted.joined, jobs[1..], "those that are still to be done");
    let counts = store.batch(submission).await.unwrap().unwrap().jobs;
    assert_eq!(counts, [(JobState::Queued, 1234), (JobState::Done, 1)].into());
    let saved = store.load(0).await.unwrap();
    assert_eq!(saved.jobs[0].batches, [before, submission]);
    assert_eq!(saved.batches.len(), 2);
}

async fn failed_and_cancelled_jobs_are_queued_again(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let jobs = jobs(&*store, epoch, 4).await;
    let changes = [
        Change::Failed { job: jobs[0], reason: "bad".to_owned() },
        Change::Cancelled { job: jobs[1] },
        started(key(jobs[2], 1, epoch)),
    ];
    store.apply(epoch, &changes, at(2)).await.unwrap();
    let urgent = |n| NewJob { priority: 9, seed: 99, ..new_job(n) };
    let (submission, again) = submit(&*store, epoch, vec![urgent(1), urgent(2), urgent(3), urgent(4)]).await;
    assert_eq!((again.reply.new, again.reply.requeued, again.reply.existing), (0, 2, 2));
    let queued = again.submitted.queued;
    assert_eq!(queued.iter().map(|job| (job.job, job.priority)).collect::<Vec<_>>(), [(jobs[0], 9), (jobs[1], 9)]);
    assert_eq!(again.submitted.joined, jobs[2..]);
    assert_eq!(queued[0].batches.last(), Some(&submission));
    assert_eq!(store.live_job(jobs[0]).await.unwrap(), Some((JobState::Queued, queued[0].clone())));
    let record = store.job(jobs[0]).await.unwrap().unwrap();
    assert_eq!((record.state, record.reason, record.finished, record.seed), (JobState::Queued, None, None, 1));
}

async fn a_submission_is_of_a_tenant_that_is_known(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let lab: TenantId = "lab".parse().unwrap();
    let submission = SubmissionId(Uuid::now_v7());
    let open = OpenSubmission {
        model: Some("m".to_owned()),
        priority: Some(-3),
        tenant: lab.clone(),
        after: vec!["x".to_owned()],
        max_failures: Some(2),
    };
    store.open_submission(submission, open.clone(), at(0)).await.unwrap();
    let read = store.submission(submission).await.unwrap().unwrap();
    assert_eq!((read.model, read.priority, read.tenant), (open.model, open.priority, lab.clone()));
    assert_eq!((read.after, read.max_failures, read.reply), (open.after, open.max_failures, None));
    let of_lab = || super::Batch { tenant: lab.clone(), max_failures: Some(2), ..batch(submission, vec![new_job(1)]) };
    let why = refused(store.commit_submission(epoch, of_lab(), at(1)).await);
    assert!(why.contains("no tenant lab"), "{why}");
    let tenant = Change::Tenant { tenant: lab.clone(), spec: TenantSpec::default() };
    store.apply(epoch, &[tenant], at(1)).await.unwrap();
    let committed = store.commit_submission(epoch, of_lab(), at(1)).await.unwrap();
    assert_eq!(committed.submitted.queued[0].tenant, lab);
    let view = store.batch(submission).await.unwrap().unwrap();
    assert_eq!((view.tenant, view.max_failures), (lab, Some(2)));
}

async fn a_tenant_has_no_more_jobs_than_its_quota(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let most = |submission, lines| super::Batch { max_queued: Some(5), ..batch(submission, lines) };
    let first = opened(&*store).await;
    let committed = store.commit_submission(epoch, most(first, (1..=4).map(new_job).collect()), at(1)).await.unwrap();
    let second = opened(&*store).await;
    // One of them is there already.
    let lines = || (4..=6).map(new_job).collect::<Vec<_>>();
    let why = refused(store.commit_submission(epoch, most(second, lines()), at(1)).await);
    assert!(why.contains("may have 5 jobs") && why.contains("has 4") && why.contains("be 2 more"), "{why}");
    assert_eq!(store.counts().await.unwrap().get(&JobState::Queued), Some(&4));
    finish(&*store, epoch, committed.submitted.queued[0].job, at(2)).await;
    let committed = store.commit_submission(epoch, most(second, lines()), at(3)).await.unwrap();
    assert_eq!((committed.reply.new, committed.reply.existing), (2, 1));
}

async fn lines_come_after_lines_jobs_and_batches(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let (earlier, first) = submit(&*store, epoch, vec![new_job(1), new_job(2)]).await;
    let (a, b) = (first.submitted.queued[0].job, first.submitted.queued[1].job);
    let (over, second) = submit(&*store, epoch, vec![new_job(3)]).await;
    let c = second.submitted.queued[0].job;
    finish(&*store, epoch, c, at(2)).await;
    let lines = vec![
        after(4, [NewDependency::Line(1), NewDependency::Id(a.0), NewDependency::Line(1)]),
        new_job(5),
        after(6, [NewDependency::Id(earlier.0), NewDependency::Id(over.0), NewDependency::Id(c.0)]),
        // Comes after a line that is an earlier submission's job, which is done.
        after(7, [NewDependency::Line(4)]),
        new_job(3),
    ];
    let (_, third) = submit(&*store, epoch, lines).await;
    let queued = third.submitted.queued;
    let (x, y, z) = (&queued[0], &queued[1], &queued[2]);
    assert_eq!(x.after, [Dependency::Job(y.job), Dependency::Job(a)]);
    assert_eq!(
        (z.after.as_slice(), queued[3].after.as_slice()),
        ([Dependency::Batch(earlier)].as_slice(), [].as_slice())
    );
    let loaded = async || {
        let jobs = store.load(0).await.unwrap().jobs;
        jobs.into_iter().filter(|job| queued.iter().any(|other| other.job == job.job)).collect::<Vec<_>>()
    };
    assert_eq!(loaded().await, queued, "a restart sees what the commit gave");
    finish(&*store, epoch, a, at(3)).await;
    finish(&*store, epoch, b, at(3)).await;
    let now = loaded().await;
    assert_eq!(now[0].after, [Dependency::Job(y.job)]);
    assert!(now[2].after.is_empty(), "all of the batch is done");
}

async fn what_can_never_be_is_refused(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let (one, first) = submit(&*store, epoch, vec![new_job(1), new_job(2)]).await;
    let (two, second) = submit(&*store, epoch, vec![new_job(3)]).await;
    let job = |committed: &super::Committed, i: usize| committed.submitted.queued[i].job;
    let changes =
        [Change::Failed { job: job(&first, 0), reason: "bad".to_owned() }, Change::Cancelled { job: job(&second, 0) }];
    store.apply(epoch, &changes, at(2)).await.unwrap();
    for (id, reason) in [
        (Uuid::now_v7(), "no job or batch"),
        (job(&first, 0).0, "has failed"),
        (job(&second, 0).0, "was cancelled"),
        (one.0, "1 jobs of batch"),
        (two.0, "was cancelled"),
    ] {
        let why = refusal(&*store, epoch, vec![new_job(8), after(9, [NewDependency::Id(id)])]).await;
        assert!(why.contains(reason) && why.contains(&id.simple().to_string()), "{why}");
    }
    // Itself, before it is committed.
    let own = opened(&*store).await;
    let why =
        refused(store.commit_submission(epoch, batch(own, vec![after(9, [NewDependency::Id(own.0)])]), at(1)).await);
    assert!(why.contains("no job or batch"), "{why}");
    assert_eq!(store.counts().await.unwrap().get(&JobState::Queued), Some(&1), "nothing was written");
}

/// A job that was cancelled may be what the others of its batch, or another job, wait for.
async fn a_job_that_is_queued_again_does_not_come_after_itself(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let (earlier, first) = submit(&*store, epoch, vec![new_job(1), new_job(2)]).await;
    let (a, b) = (first.submitted.queued[0].job, first.submitted.queued[1].job);
    let (_, second) = submit(&*store, epoch, vec![after(3, [NewDependency::Id(a.0)])]).await;
    let c = second.submitted.queued[0].job;
    store.apply(epoch, &[Change::Cancelled { job: a }], at(2)).await.unwrap();
    for on in [earlier.0, c.0] {
        let why = refusal(&*store, epoch, vec![after(1, [NewDependency::Id(on)])]).await;
        assert!(why.contains("after itself"), "{why}");
        assert_eq!(state(&*store, a).await, JobState::Cancelled);
    }
    let (_, again) = submit(&*store, epoch, vec![after(1, [NewDependency::Id(b.0)])]).await;
    assert_eq!(again.submitted.queued[0].after, [Dependency::Job(b)]);
}

async fn pages_are_kept_until_the_commit(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let submission = SubmissionId(Uuid::now_v7());
    assert!(!store.put_page(submission, 0, b"x".to_vec()).await.unwrap(), "nothing was opened");
    store.open_submission(submission, OpenSubmission::default(), at(0)).await.unwrap();
    for (page, bytes) in [(1, "second"), (0, "lost"), (0, "first")] {
        assert!(store.put_page(submission, page, bytes.as_bytes().to_vec()).await.unwrap());
    }
    assert_eq!(queue.open().await.pages(submission).await.unwrap(), [(0, 5), (1, 6)]);
    assert_eq!(store.page(submission, 0).await.unwrap().unwrap(), b"first");
    assert_eq!(store.page(submission, 2).await.unwrap(), None);
    store.commit_submission(epoch, batch(submission, vec![new_job(1)]), at(1)).await.unwrap();
    assert!(store.pages(submission).await.unwrap().is_empty());
    assert!(!store.put_page(submission, 0, b"late".to_vec()).await.unwrap());
}

async fn uploads_that_nobody_commits_do_not_pile_up(queue: &Queue) {
    let store = queue.open().await;
    let first = opened(&*store).await;
    store.put_page(first, 0, b"x".to_vec()).await.unwrap();
    for _ in 1..MAX_OPEN_SUBMISSIONS {
        opened(&*store).await;
    }
    let open = async |when| store.open_submission(SubmissionId(Uuid::now_v7()), OpenSubmission::default(), when).await;
    let refused = open(at(2)).await;
    assert!(matches!(refused, Err(QueueError::TooManySubmissions(MAX_OPEN_SUBMISSIONS))), "{refused:?}");
    open(at(STALE_SUBMISSION_MS + 10)).await.unwrap();
    assert_eq!(store.submission(first).await.unwrap(), None);
    assert!(store.pages(first).await.unwrap().is_empty());
}

async fn jobs_are_found_by_the_end_of_their_id(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let with_id = |n, id: &str| NewJob { job: id.parse().unwrap(), ..new_job(n) };
    let (a, b) = ("00000000000000000000aaaaaaaabeef", "00000000000000000000bbbbbbbbbeef");
    submit(&*store, epoch, vec![with_id(1, a), with_id(2, b)]).await;
    let found = async |ending: &str| {
        store.jobs_ending_in(ending).await.unwrap().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(found("abeef").await, [a]);
    assert_eq!(found("beef").await.len(), 2);
    assert_eq!(found(&b[5..]).await, [b]);
    for none in ["1aaaaaaaabeef", "ffff", "eef", "%eef", "bee_"] {
        assert_eq!(found(none).await, [""; 0], "{none}");
    }
}

async fn listings_come_in_pages_by_state_and_submission(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let jobs = jobs(&*store, epoch, 3).await;
    let (second, _) = submit(&*store, epoch, (3..=4).map(new_job).collect()).await;
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
    let narrow = JobFilter { submission: Some(second), state: Some(JobState::Queued), after: Some(jobs[2]), limit: 9 };
    assert_eq!(list(narrow).await, ["prompt 4"]);
}

async fn batches_are_counted_and_listed(queue: &Queue) {
    let (store, epoch) = queue.lead().await;
    let (first, committed) = submit(&*store, epoch, (1..=3).map(new_job).collect()).await;
    let (second, _) = submit(&*store, epoch, vec![]).await;
    let open = opened(&*store).await;
    let running = key(committed.submitted.queued[0].job, 1, epoch);
    store.apply(epoch, &[started(running)], at(2)).await.unwrap();
    let view = store.batch(first).await.unwrap().unwrap();
    assert_eq!((view.submitted, view.jobs), (at(1), [(JobState::Queued, 2), (JobState::Running, 1)].into()));
    store.apply(epoch, &done(running, 1), at(3)).await.unwrap();
    let list = store.batches(10).await.unwrap();
    assert_eq!(list.iter().map(|batch| batch.submission).collect::<Vec<_>>(), [second, first]);
    assert_eq!(list[1].jobs, [(JobState::Queued, 2), (JobState::Done, 1)].into());
    assert_eq!(store.batches(1).await.unwrap().len(), 1);
    assert_eq!(store.batch(open).await.unwrap(), None, "it is no batch yet");
}
