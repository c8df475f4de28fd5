//! A scheduler on a real port, nodes that are only messages, and a client.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farm_core::api::{
    CommitSubmission, JobResult, OpenSubmission, PAGE_BYTES, StageSeconds, SubmissionOpened, TenantView,
};
use farm_core::id::{AttemptKey, BootId, Epoch, NodeId, SubmissionId};
use farm_core::job::spec::{GenerationDefaults, RenderSpec};
use farm_core::parallel::cost::ModelShape;
use farm_core::precision::Precision;
use farm_core::store::artifact::ArtifactStore;
use farm_core::store::key;
use farm_core::tiles::plan::Tiling;
use farm_core::wire::cluster::ClusterError;
use farm_core::wire::to_node::{StartAttempt, ToNode};
use farm_core::wire::to_scheduler::{
    AttemptOutcome, AttemptReport, DeviceInfo, ModelInfo, Registration, Roles, RunningAttempt, ToScheduler,
};
use farm_core::wire::{Envelope, StopNo, codec};
use farm_scheduler::actor::Scheduler;
use farm_scheduler::api::{Api, Secret, router};
use farm_scheduler::config::Config;
use farm_scheduler::core::farm::Limits;
use farm_scheduler::gc::Gc;
use farm_scheduler::lead::{Candidate, Standing};
use farm_scheduler::link::NodeLink;
use farm_scheduler::listen;
use farm_scheduler::queue::location::Location;
use farm_scheduler::queue::store::Retention;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::de::DeserializeOwned;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Longest wait for anything; only a failing test takes that long.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for a condition.
pub async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "never saw: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What the scheduler sent to nodes.
#[derive(Default)]
pub struct Sent(Mutex<VecDeque<Envelope<ToNode>>>);

impl Sent {
    pub fn take(&self, wanted: impl Fn(&Envelope<ToNode>) -> bool) -> Option<Envelope<ToNode>> {
        let mut sent = self.0.lock().unwrap();
        let found = sent.iter().position(wanted)?;
        sent.remove(found)
    }
}

impl NodeLink for Sent {
    fn send(&self, _: BootId, frame: Vec<u8>) -> Result<(), ClusterError> {
        self.0.lock().unwrap().push_back(codec::decode(&frame).unwrap());
        Ok(())
    }

    fn accept(&self, _: hyper::upgrade::Upgraded, _: BootId) -> Result<(), ClusterError> {
        Ok(())
    }

    fn disconnect(&self, _: BootId) {}

    fn disconnect_all(&self) {}
}

pub struct Rig {
    pub http: Http,
    pub scheduler: Scheduler,
    pub sent: Arc<Sent>,
    pub artifacts: ArtifactStore,
    /// Lives as long as the rig.
    folder: Arc<tempfile::TempDir>,
    stop: CancellationToken,
}

impl Rig {
    pub async fn start() -> Self {
        Self::set_up(folder(), None, Config::default()).await
    }

    /// The next scheduler on the same data. No node has joined it.
    pub async fn restart(self) -> Self {
        let folder = self.folder.clone();
        drop(self);
        Self::set_up(folder, None, Config::default()).await
    }

    pub async fn with_secret(secret: Option<&str>) -> Self {
        Self::set_up(folder(), secret, Config::default()).await
    }

    /// One that keeps nothing of ended jobs.
    pub async fn forgetful() -> Self {
        let none = Duration::ZERO;
        let mut config = Config::default();
        config.keep.0 = Retention { leftovers: none, logs: none, jobs: Duration::from_secs(3600), audit: none };
        Self::set_up(folder(), None, config).await
    }

    async fn set_up(folder: Arc<tempfile::TempDir>, secret: Option<&str>, config: Config) -> Self {
        let secret = secret.map(|text| {
            use std::os::unix::fs::PermissionsExt;
            let file = folder.path().join("secret");
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
            Secret::read(&file).unwrap()
        });
        let artifacts = ArtifactStore::open(folder.path().join("results").to_str().unwrap()).unwrap();
        let queue = farm_scheduler::queue::open(&Location::folder(folder.path())).await.unwrap();
        let sent = Arc::new(Sent::default());
        let link: Arc<dyn NodeLink> = sent.clone();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let candidate = Candidate {
            store: queue.clone(),
            is_shared: false,
            link: link.clone(),
            address: address.to_string(),
            limits: Limits::default(),
            results: artifacts.url().to_owned(),
            tiling: Tiling::AUTO,
        };
        let stop = CancellationToken::new();
        let (standing, stands) = watch::channel(Standing::StandsBy(None));
        tokio::spawn(candidate.run(standing, stop.clone()));
        let scheduler = until("a leader", async || match &*stands.borrow() {
            Standing::Leads(scheduler) => Some(scheduler.clone()),
            Standing::StandsBy(_) => None,
        })
        .await;
        let token = secret.as_ref().map(|secret| secret.as_str().to_owned());
        let gc = Gc::new(artifacts.clone(), queue.clone(), config.keep.0);
        let api = Api::new(stands, queue, artifacts.clone(), link, secret, gc, config.prices);
        tokio::spawn(listen::serve(listener, router(api), stop.clone()));
        Self { http: Http::new(address, token), scheduler, sent, artifacts, folder, stop }
    }

    /// A node that has been welcomed.
    pub async fn node(&self, name: &str, devices: usize, models: &[&str]) -> FakeNode<'_> {
        let node = FakeNode { rig: self, node: NodeId(name.to_owned()), boot: BootId(Uuid::new_v4()) };
        node.say(ToScheduler::Register(registration(devices, models, self.artifacts.url()))).await;
        node.hear("welcome", |message| matches!(message, ToNode::Welcome { .. })).await;
        node
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn folder() -> Arc<tempfile::TempDir> {
    Arc::new(tempfile::tempdir().unwrap())
}

pub fn registration(devices: usize, models: &[&str], store: &str) -> Registration {
    let defaults_json = serde_json::to_string(&defaults()).unwrap();
    let model = |name: &&str| ModelInfo {
        name: name.to_string(),
        hash: format!("hash-of-{name}"),
        defaults_json: defaults_json.clone(),
        shape_json: serde_json::to_string(&ModelShape::mochi1()).unwrap(),
    };
    Registration {
        version: "test".to_owned(),
        devices: (0..devices).map(|n| DeviceInfo { name: format!("cpu {n}") }).collect(),
        site_json: None,
        models: models.iter().map(model).collect(),
        store: store.to_owned(),
        roles: Roles::ALL,
        labels: BTreeMap::new(),
        crash: None,
        running: Vec::new(),
        helping: Vec::new(),
        heard: StopNo::default(),
    }
}

pub fn defaults() -> GenerationDefaults {
    GenerationDefaults { width: 64, height: 64, num_frames: 25, num_inference_steps: 24, ..Default::default() }
}

pub struct FakeNode<'a> {
    rig: &'a Rig,
    pub node: NodeId,
    pub boot: BootId,
}

impl FakeNode<'_> {
    pub async fn say(&self, body: ToScheduler) {
        static SEQ: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let seq = SEQ.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let envelope = Envelope { epoch: Epoch(0), node: self.node.clone(), boot: self.boot, seq, body };
        self.rig.scheduler.frame(codec::encode(&envelope).unwrap()).await.unwrap();
    }

    pub async fn hear(&self, what: &str, wanted: impl Fn(&ToNode) -> bool) -> ToNode {
        let mine = |envelope: &Envelope<ToNode>| envelope.boot == self.boot && wanted(&envelope.body);
        until(what, async || self.rig.sent.take(mine)).await.body
    }

    pub async fn hear_start(&self) -> StartAttempt {
        match self.hear("a start", |message| matches!(message, ToNode::Start(_))).await {
            ToNode::Start(start) => *start,
            other => panic!("{other:?}"),
        }
    }

    pub async fn beat(&self, running: Vec<RunningAttempt>) {
        // Whatever it was told.
        let heard = StopNo { epoch: Epoch(u64::MAX), number: 0 };
        self.say(ToScheduler::Heartbeat { running, helping: Vec::new(), heard }).await;
        self.hear("an answer", |message| matches!(message, ToNode::HeartbeatSeen)).await;
    }

    /// Reports and waits until that is committed.
    pub async fn report(&self, key: AttemptKey, outcome: AttemptOutcome) {
        self.say(ToScheduler::Report { number: 1, report: AttemptReport { key, outcome } }).await;
        self.hear("an acknowledgement", |message| matches!(message, ToNode::Acknowledged { .. })).await;
    }

    /// Stores a clip and reports it.
    pub async fn complete(&self, start: &StartAttempt, clip: &[u8]) {
        let path = key::clip(start.key.job, start.key.attempt);
        self.rig.artifacts.put(&path, clip.to_vec().into()).await.unwrap();
        self.report(start.key, completed(start, clip.len() as u64)).await;
    }
}

pub fn completed(start: &StartAttempt, bytes: u64) -> AttemptOutcome {
    let spec: RenderSpec = serde_json::from_str(&start.spec_json).unwrap();
    let result = JobResult {
        job: start.key.job,
        attempt: start.key.attempt,
        epoch: start.key.epoch,
        node: NodeId("a".to_owned()),
        devices: start.devices.clone(),
        decode: None,
        topology: start.topology,
        precision: Precision::default(),
        clip: key::clip(start.key.job, start.key.attempt),
        clip_bytes: bytes,
        clip_sha256: "ab".repeat(32),
        spec,
        model: start.model.clone(),
        model_hash: start.model_hash.clone(),
        program_version: "test".to_owned(),
        seconds: StageSeconds::default(),
        finished: jiff::Timestamp::now(),
        warnings: Vec::new(),
    };
    let result_json = serde_json::to_string(&result).unwrap();
    AttemptOutcome::Completed { accepted: start.key.attempt, result_json, warnings: vec!["cut".to_owned()] }
}

/// A running scheduler, killed with the test.
pub struct Process {
    child: Child,
    pub http: Http,
}

impl Process {
    /// Starts the program and waits until it knows who leads.
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").unwrap_or_else(|| panic!("{line:?}"));
        Self { http: Http::new(address.parse().unwrap(), None), child }
    }

    pub fn send(&self, signal: i32) {
        // SAFETY: plain numbers; the child is not reaped yet, so the number is its own.
        assert_eq!(unsafe { libc::kill(self.child.id() as libc::pid_t, signal) }, 0);
    }

    /// Sends a signal that ends it and gives the exit code, if it was not the signal itself that did.
    pub fn end(&mut self, signal: i32) -> Option<i32> {
        self.send(signal);
        self.ended()
    }

    /// Waits for its end and gives the exit code, if it was no signal that ended it.
    pub fn ended(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client of the API.
#[derive(Clone)]
pub struct Http {
    pub address: SocketAddr,
    token: Option<String>,
    client: reqwest::Client,
}

impl Http {
    pub fn new(address: SocketAddr, token: Option<String>) -> Self {
        Self { address, token, client: reqwest::Client::new() }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("http://{}{path}", self.address)).timeout(PATIENCE);
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> T {
        ok(self.request(Method::GET, path)).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str) -> T {
        ok(self.request(Method::POST, path).header("x-farm-user", "ada")).await
    }

    pub async fn set_tenant(&self, tenant: &str, spec: &str) -> TenantView {
        ok(self
            .request(Method::PUT, &format!("/v1/tenants/{tenant}"))
            .header("x-farm-user", "ada")
            .body(spec.to_owned()))
        .await
    }

    /// Uploads a file, page by page.
    pub async fn upload(&self, options: OpenSubmission, file: &[u8]) -> SubmissionId {
        let opened: SubmissionOpened = ok(self.request(Method::POST, "/v1/submissions").json(&options)).await;
        for (page, bytes) in file.chunks(PAGE_BYTES).enumerate() {
            let path = format!("/v1/submissions/{}/pages/{page}", opened.submission);
            let put = self.request(Method::PUT, &path).body(bytes.to_vec()).send().await.unwrap();
            assert_eq!(put.status(), StatusCode::NO_CONTENT);
        }
        opened.submission
    }

    pub fn commit(&self, submission: SubmissionId, commit: &CommitSubmission) -> RequestBuilder {
        self.request(Method::POST, &format!("/v1/submissions/{submission}/commit")).json(commit)
    }

    /// Uploads and commits.
    pub async fn submit(&self, options: OpenSubmission, file: &str) -> farm_core::api::SubmissionReply {
        let submission = self.upload(options, file.as_bytes()).await;
        ok(self.commit(submission, &commit(file))).await
    }
}

pub fn commit(file: &str) -> CommitSubmission {
    CommitSubmission { bytes: file.len() as u64, ..CommitSubmission::default() }
}

pub async fn ok<T: DeserializeOwned>(request: RequestBuilder) -> T {
    let response = request.send().await.unwrap();
    let status = response.status();
    let text = response.text().await.unwrap();
    assert!(status.is_success(), "{status}: {text}");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A refusal with this status, and what it says.
pub async fn refused(request: RequestBuilder, status: StatusCode) -> farm_core::api::ApiError {
    let response: Response = request.send().await.unwrap();
    assert_eq!(response.status(), status, "{:?}", response.text().await);
    response.json().await.unwrap()
}
