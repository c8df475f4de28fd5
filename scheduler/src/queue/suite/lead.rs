//! Who leads, and who does not any more.

use std::time::{Duration, Instant};

use farm_core::id::Epoch;

use super::super::location::Location;
use super::super::sql::SqlQueue;
use super::super::store::{LEADER_TTL, QueueError, QueueStore};
use super::super::testing::{Postgres, Setup};
use super::{Queue, at, jobs, reign, rules, state};
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
async fn a_leader_notices_that_its_database_is_gone() {
    let server = Postgres::start(&Setup::default());
    let queue = Queue::postgres(&server);
    let (store, epoch) = queue.lead().await;
    store.beat(epoch).await.unwrap();
    drop(server);
    assert!(matches!(store.beat(epoch).await, Err(QueueError::LeadLost(_))));
    assert!(store.campaign("x").await.is_err());
}
