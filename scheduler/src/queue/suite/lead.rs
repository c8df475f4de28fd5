//! Who leads, and who does not any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::id::Epoch;
use tokio::time::timeout;

use super::super::location::Location;
use super::super::sql::SqlQueue;
use super::super::store::{LEADER_TTL, QueueError, QueueStore};
use super::super::testing::{Postgres, Setup};
use super::{Queue, at, batch, jobs, key, new_job, opened, reign, rules, started, state};
use crate::core::effects::Change;
use farm_core::job::state::JobState;

rules![an_epoch_only_grows, the_leader_is_known_to_all];

async fn an_epoch_only_grows(queue: &Queue) {
    for n in 1..4 {
        assert_eq!(queue.lead().await.1, Epoch(n));
    }
}

async fn the_leader_is_known_to_all(queue: &Queue) {
    let (store, other) = (queue.open().await, queue.open().await);
    assert_eq!(other.leader().await.unwrap(), None);
    let epoch = reign(&*store).await;
    store.beat(epoch).await.unwrap();
    let leader = other.leader().await.unwrap().unwrap();
    assert_eq!((leader.address.as_str(), leader.epoch), ("127.0.0.1:1", epoch));
    assert!(leader.silent < Duration::from_secs(5), "{:?}", leader.silent);
}

/// Asks until it leads; how long it took.
async fn take_over(store: &dyn QueueStore) -> Duration {
    let begun = Instant::now();
    reign(store).await;
    begun.elapsed()
}

#[tokio::test]
async fn a_standby_leads_when_the_leader_has_gone_or_is_silent() {
    let server = Postgres::start(&Setup::default());
    let queue = Queue::postgres(&server);
    let (first, epoch) = queue.lead().await;
    let standby = queue.open().await;
    // Longer than a silence would be borne.
    let end = Instant::now() + LEADER_TTL + Duration::from_secs(1);
    while Instant::now() < end {
        first.beat(epoch).await.unwrap();
        assert_eq!(standby.campaign("x").await.unwrap(), None, "the leader is there");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    drop(first);
    let took = take_over(&*standby).await;
    assert!(took < Duration::from_secs(2), "{took:?}");

    // Now the new leader is silent, in the middle of a write.
    let location: Location = queue.place.parse().unwrap();
    let silent = SqlQueue::open(&location).await.unwrap();
    drop(standby);
    let old = reign(&silent).await;
    let job = jobs(&silent, old, 1).await[0];
    let write = silent.unfinished(old).await.unwrap();
    let heir = queue.open().await;
    assert_eq!(heir.campaign("y").await.unwrap(), None);
    let took = take_over(&*heir).await;
    assert!(took > LEADER_TTL / 2 && took < 2 * LEADER_TTL, "{took:?}");
    assert!(write.commit().await.is_err(), "its session was ended");
    assert!(matches!(silent.beat(old).await, Err(QueueError::LeadLost(_))));
    let late = silent.apply(old, &[Change::Cancelled { job }], at(2)).await;
    assert!(matches!(late, Err(QueueError::Superseded(_))), "{late:?}");
    assert_eq!(state(&*heir, job).await, JobState::Queued);
    queue.check().await;
}

#[tokio::test]
async fn changes_are_written_while_a_submission_is_and_submissions_one_by_one() {
    const PATIENCE: Duration = Duration::from_secs(8);
    let server = Postgres::start(&Setup::default());
    let queue = Queue::postgres(&server);
    let location: Location = queue.place.parse().unwrap();
    let store = Arc::new(SqlQueue::open(&location).await.unwrap());
    let epoch = reign(&*store).await;
    let job = jobs(&*store, epoch, 1).await[0];
    let first = opened(&*store).await;
    // Its commit takes as long as somebody keeps its row.
    let mut keeps = store.unfinished(epoch).await.unwrap();
    sqlx::query("SELECT n FROM submissions FOR UPDATE").execute(&mut *keeps).await.unwrap();
    let commit = |submission, lines: std::ops::Range<u32>| {
        let store = store.clone();
        let lines = lines.map(new_job).collect();
        tokio::spawn(async move { store.commit_submission(epoch, batch(submission, lines), at(1)).await })
    };
    let slow = commit(first, 10..20);
    waits_for_locks(&store, 1).await;
    let second = opened(&*store).await;
    let behind = commit(second, 15..25);
    waits_for_locks(&store, 2).await;

    let change = [started(key(job, 1, epoch))];
    timeout(PATIENCE, store.apply(epoch, &change, at(2))).await.unwrap().unwrap();
    assert_eq!(state(&*store, job).await, JobState::Running);
    assert!(!slow.is_finished() && !behind.is_finished());

    keeps.rollback().await.unwrap();
    let (slow, behind) = (slow.await.unwrap().unwrap().reply, behind.await.unwrap().unwrap().reply);
    assert_eq!((slow.new, slow.existing), (10, 0));
    assert_eq!((behind.new, behind.existing), (5, 5));
    queue.check().await;
}

/// Waits until so many sessions wait for others.
async fn waits_for_locks(store: &SqlQueue, sessions: i64) {
    let text = "SELECT CAST(COUNT(*) AS BIGINT) FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
                AND datname = current_database()";
    let end = Instant::now() + Duration::from_secs(8);
    while sqlx::query_scalar::<_, i64>(text).fetch_one(store.readers()).await.unwrap() != sessions {
        assert!(Instant::now() < end, "nobody waits");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_leader_notices_that_its_database_is_gone() {
    let server = Postgres::start(&Setup::default());
    let queue = Queue::postgres(&server);
    let (store, epoch) = queue.lead().await;
    store.beat(epoch).await.unwrap();
    drop(server);
    assert!(matches!(store.beat(epoch).await, Err(QueueError::LeadLost(_))));
    assert!(store.campaign("x").await.is_err());
}
