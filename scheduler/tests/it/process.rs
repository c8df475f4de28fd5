//! The program itself: what it prints and refuses, and how it comes back from kill -9, with a node on the real wire.

use std::path::Path;
use std::process::{Command, Output};

use farm_core::api::{FarmInfo, JobDetail, JobPage, OpenSubmission};
use farm_core::id::{AttemptNo, BootId, Epoch, NodeId};
use farm_core::job::state::{JobState, Progress, Stage};
use farm_core::store::artifact::ArtifactStore;
use farm_core::wire::cluster::{Cluster, ClusterEvent, Role};
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{AttemptReport, RunningAttempt, ToScheduler};
use farm_core::wire::{Envelope, codec};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::support::*;

fn command(data: &Path, listen: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farm-scheduler"));
    command.arg("--data").arg(data).arg("--store").arg(data.join("results")).args(["--listen", listen]);
    command
}

fn fails(mut command: Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    assert!(!status.success());
    String::from_utf8(stderr).unwrap()
}

fn launch(data: &Path, listen: &str) -> Process {
    Process::start(command(data, listen))
}

/// A node on the real wire, with no renderer behind it.
struct WireNode {
    cluster: Cluster,
    events: mpsc::Receiver<ClusterEvent>,
    boot: BootId,
    sent: u64,
}

impl WireNode {
    async fn start() -> Self {
        let boot = BootId(Uuid::new_v4());
        let (cluster, events) = Cluster::start(Role::Node, boot, None).await.unwrap();
        Self { cluster, events, boot, sent: 0 }
    }

    async fn dial(&mut self, http: &Http) {
        let address = http.address.to_string();
        until("a session", async || self.cluster.dial(&address, None).await.ok()).await;
        self.wait_for(|event| matches!(event, ClusterEvent::Ready { .. })).await;
    }

    async fn wait_for(&mut self, wanted: impl Fn(&ClusterEvent) -> bool) -> ClusterEvent {
        loop {
            let event = tokio::time::timeout(PATIENCE, self.events.recv()).await.unwrap().unwrap();
            if wanted(&event) {
                return event;
            }
        }
    }

    async fn say(&mut self, body: ToScheduler) {
        self.sent += 1;
        let node = NodeId("wire".to_owned());
        let envelope = Envelope { epoch: Epoch(0), node, boot: self.boot, seq: self.sent, body };
        let frame = codec::encode(&envelope).unwrap();
        // The peer's gateway is found a moment after the session is ready.
        until("a gateway", async || self.cluster.send_to_scheduler(frame.clone()).ok()).await;
    }

    async fn hear<T>(&mut self, wanted: impl Fn(&ToNode) -> Option<T>) -> T {
        loop {
            let ClusterEvent::Frame(frame) = self.wait_for(|event| matches!(event, ClusterEvent::Frame(_))).await
            else {
                continue;
            };
            let envelope: Envelope<ToNode> = codec::decode(&frame).unwrap();
            if let Some(found) = wanted(&envelope.body) {
                return found;
            }
        }
    }
}

#[tokio::test]
async fn a_scheduler_killed_in_mid_clip_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let store = ArtifactStore::open(folder.path().join("results").to_str().unwrap()).unwrap();
    let mut first = launch(folder.path(), "127.0.0.1:0");
    let mut node = WireNode::start().await;
    node.dial(&first.http).await;
    node.say(ToScheduler::Register(registration(1, &["tiny"], store.url()))).await;
    node.hear(|message| matches!(message, ToNode::Welcome { .. }).then_some(())).await;
    first.http.submit(OpenSubmission::default(), "{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}\n").await;
    let start = node
        .hear(|message| match message {
            ToNode::Start(start) => Some((**start).clone()),
            _ => None,
        })
        .await;

    assert_eq!(first.end(libc::SIGKILL), None);
    node.wait_for(|event| matches!(event, ClusterEvent::Closed { .. })).await;
    let address = first.http.address.to_string();
    let mut second = launch(folder.path(), &address);
    let info: FarmInfo = second.http.get("/v1/farm").await;
    assert_eq!((info.epoch, info.jobs[&JobState::Running], info.jobs[&JobState::Queued]), (Epoch(2), 1, 1));

    node.dial(&second.http).await;
    let progress = Progress { stage: Stage::Decode, done: 1, total: 2, eta_seconds: None };
    let running = vec![RunningAttempt { key: start.key, progress, devices: start.devices.clone() }];
    // A heartbeat out of the blue: the scheduler asks who that is.
    node.say(ToScheduler::Heartbeat { running: running.clone(), helping: Vec::new(), heard: Default::default() }).await;
    node.hear(|message| matches!(message, ToNode::Reregister).then_some(())).await;
    let mut again = registration(1, &["tiny"], store.url());
    again.running = running;
    node.say(ToScheduler::Register(again)).await;
    node.hear(|message| matches!(message, ToNode::Welcome { .. }).then_some(())).await;
    let report = AttemptReport { key: start.key, outcome: completed(&start, 1) };
    node.say(ToScheduler::Report { number: 5, report }).await;
    node.hear(|message| matches!(message, ToNode::Acknowledged { report: 5 }).then_some(())).await;
    let done: JobDetail = second.http.get(&format!("/v1/jobs/{}", start.key.job)).await;
    assert_eq!((done.view.state, done.view.attempt), (JobState::Done, AttemptNo(1)));
    let next = node
        .hear(|message| match message {
            ToNode::Start(start) => Some(start.key),
            _ => None,
        })
        .await;
    assert_eq!((next.epoch, next.attempt), (Epoch(2), AttemptNo(1)));
    assert_eq!(second.end(libc::SIGTERM), Some(0));
}

#[test]
fn bad_settings_are_refused_with_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    let open = fails(command(folder.path(), "0.0.0.0:0"));
    assert!(open.contains("--secret-file"), "{open}");
    let mut weak = command(folder.path(), "0.0.0.0:0");
    let file = folder.path().join("secret");
    std::fs::write(&file, "short").unwrap();
    weak.arg("--secret-file").arg(&file);
    let weak = fails(weak);
    assert!(weak.contains("chmod 600") || weak.contains("less than 16"), "{weak}");
    let mut both = command(folder.path(), "127.0.0.1:0");
    both.args(["--queue", "postgres://farm@127.0.0.1/farm"]);
    assert!(fails(both).contains("cannot be used with"));
    let mut folder_for_many = Command::new(env!("CARGO_BIN_EXE_farm-scheduler"));
    folder_for_many.args(["--queue", "data", "--store", "results"]);
    assert!(fails(folder_for_many).contains("a folder is named with --data"));
    let mut prices = command(folder.path(), "127.0.0.1:0");
    let file = folder.path().join("farm.toml");
    std::fs::write(&file, "[prices]\nevery_hour = 1\n").unwrap();
    prices.arg("--config").arg(&file);
    assert!(fails(prices).contains("farm.toml is not right"));
    let mut nowhere = command(folder.path(), "127.0.0.1:0");
    nowhere.args(["--secret-file", "/does/not/exist"]);
    assert!(fails(nowhere).contains("cannot open secret file"));
}

#[tokio::test]
async fn a_data_folder_has_one_scheduler_and_ctrl_c_ends_it_cleanly() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = launch(folder.path(), "127.0.0.1:0");
    let second = fails(command(folder.path(), "127.0.0.1:0"));
    assert!(second.contains("in use by another farm-scheduler"), "{second}");
    let page: JobPage = first.http.get("/v1/jobs").await;
    assert!(page.jobs.is_empty());
    assert_eq!(first.end(libc::SIGINT), Some(0));
    let mut third = launch(folder.path(), "127.0.0.1:0");
    assert_eq!(third.end(libc::SIGTERM), Some(0));
}
