//! When a turn plans.

use std::sync::Mutex;

use farm_core::api::{OpenSubmission, SubmissionReply};
use farm_core::id::{BootId, Epoch, SubmissionId, TenantId};
use farm_core::tiles::plan::Tiling;
use farm_core::wire::cluster::ClusterError;
use farm_core::wire::to_node::ToNode;
use uuid::Uuid;

use super::*;
use crate::core::farm::Limits;
use crate::core::fixture::{STORE, boot, node, registration};
use crate::queue::location::Location;
use crate::queue::store::{Batch, NewJob};

/// How many attempts were started.
#[derive(Default)]
pub struct Starts(Mutex<usize>);

impl NodeLink for Starts {
    fn send(&self, _: BootId, frame: Vec<u8>) -> Result<(), ClusterError> {
        let envelope: Envelope<ToNode> = codec::decode(&frame).unwrap();
        *self.0.lock().unwrap() += usize::from(matches!(envelope.body, ToNode::Start(_)));
        Ok(())
    }

    fn accept(&self, _: hyper::upgrade::Upgraded, _: BootId) -> Result<(), ClusterError> {
        Ok(())
    }

    fn disconnect(&self, _: BootId) {}

    fn disconnect_all(&self) {}
}

fn new_job(n: u8) -> NewJob {
    NewJob {
        job: JobId::new(),
        key: [n; 32],
        request: serde_json::from_str(r#"{"prompt":"a"}"#).unwrap(),
        seed: n.into(),
        priority: 0,
        model: None,
        after: Vec::new(),
    }
}

async fn submit(store: &dyn QueueStore, epoch: Epoch, jobs: Vec<NewJob>) {
    let submission = SubmissionId(Uuid::now_v7());
    let (now, tenant) = (Timestamp::now(), TenantId::default());
    store.open_submission(submission, OpenSubmission::default(), now).await.unwrap();
    let (new, existing, requeued, bad_lines) = (0, 0, 0, 0);
    let reply = SubmissionReply { submission, new, existing, requeued, lines: Vec::new(), bad_lines, waiting: None };
    let batch = Batch { submission, tenant, max_queued: None, max_failures: None, jobs, reply };
    store.commit_submission(epoch, batch, now).await.unwrap();
}

/// A node with one device joins.
fn joins(n: u8) -> Message {
    let (node, boot) = (node(&n.to_string()), boot(n.into()));
    let body = ToScheduler::Register(registration(1, &["m"]));
    let bytes = codec::encode(&Envelope { epoch: Epoch(0), node, boot, seq: 1, body }).unwrap();
    Message::Frame { bytes, at: Time::default() }
}

#[tokio::test]
async fn a_job_starts_in_the_turn_that_lets_it_unless_there_was_a_plan_just_now() {
    let folder = tempfile::tempdir().unwrap();
    let store = crate::queue::open(&Location::folder(folder.path())).await.unwrap();
    let epoch = store.campaign("x").await.unwrap().unwrap();
    submit(&*store, epoch, vec![new_job(1), new_job(2)]).await;
    let saved = store.load(0).await.unwrap();
    let limits = Limits::default();
    let farm = Farm::restore(limits, epoch, STORE.to_owned(), Tiling::AUTO, saved, 0, Time::default());
    let starts = Arc::new(Starts::default());
    let reign = Arc::new(Reign::alone(epoch));
    let mut state = State::new(farm, Instant::now(), reign, store, starts.clone());
    let started = || *starts.0.lock().unwrap();

    let again = state.turn(&mut vec![joins(1)], false).await.unwrap();
    assert_eq!((started(), again), (1, None));
    state.rests_until = Instant::now() + Duration::from_secs(3600);
    let again = state.turn(&mut vec![joins(2)], false).await.unwrap();
    assert_eq!(started(), 1);
    assert!(again.is_some_and(|wait| wait > Duration::ZERO), "{again:?}");
    state.turn(&mut Vec::new(), true).await.unwrap();
    assert_eq!(started(), 2, "a tick waits for nothing");
    assert!(state.rests_until < Instant::now() + Duration::from_secs(60));
}
