use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use farm_core::id::{AttemptNo, DeviceIndex, Epoch, JobId};
use farm_core::job::spec::GenerationDefaults;
use farm_core::parallel::topology::Topology;
use farm_core::tiles::plan::Tiling;
use uuid::Uuid;

use super::*;
use crate::device_thread::Device;

/// What the fake device does with a clip.
#[derive(Clone)]
enum Behaviour {
    Render,
    Panic,
    /// Says when it has begun, then goes through steps until it is told to stop.
    StepUntilStopped(Arc<tokio::sync::Notify>),
}

/// Writes a few bytes as a clip; only the order of things is of interest here.
struct FakeDevice {
    behaviour: Behaviour,
    rendered: Arc<AtomicUsize>,
}

impl Device for FakeDevice {
    fn render(&mut self, work: Work) -> Result<Rendered, RenderError> {
        let step = |done| work.monitor.advance(Progress { stage: Stage::Denoise, done, total: 3, eta_seconds: None });
        match &self.behaviour {
            Behaviour::Render => {
                step(1);
                std::fs::write(&work.clip, format!("clip of {}", work.spec.prompt)).map_err(RenderError::device)?;
                self.rendered.fetch_add(1, Ordering::Relaxed);
                Ok(Rendered {
                    seconds: StageSeconds { denoise: 2.0, ..StageSeconds::default() },
                    warnings: vec!["the prompt was cut".into()],
                })
            }
            Behaviour::Panic => panic!("index out of bounds"),
            Behaviour::StepUntilStopped(begun) => {
                begun.notify_one();
                while step(1) {
                    std::thread::yield_now();
                }
                Err(RenderError::Stopped)
            }
        }
    }
}

/// A node of one device over a memory store.
struct Bench {
    workshop: Arc<Workshop>,
    rendered: Arc<AtomicUsize>,
    log: Arc<Mutex<Vec<String>>>,
    data: tempfile::TempDir,
}

impl Bench {
    fn new(behaviour: Behaviour) -> Self {
        let data = tempfile::tempdir().unwrap();
        let (rendered, log) = (Arc::<AtomicUsize>::default(), Arc::<Mutex<Vec<String>>>::default());
        let device = FakeDevice { behaviour, rendered: rendered.clone() };
        let lines = log.clone();
        let workshop = Arc::new(Workshop {
            node: NodeId("n".into()),
            store: ArtifactStore::open("memory:").unwrap(),
            scratch: Arc::new(Scratch::open(&data.path().join("node")).unwrap()),
            devices: vec![DeviceHandle::spawn(DeviceIndex(0), device).unwrap()],
            models: [("tiny".to_owned(), "abc".to_owned())].into(),
            checkpoint_steps: 0,
            log: Box::new(move |_, line| lines.lock().unwrap().push(line)),
        });
        Self { workshop, rendered, log, data }
    }

    async fn run(&self, start: StartAttempt) -> AttemptOutcome {
        run(self.workshop.clone(), start, Arc::new(()), ProgressCell::new(), Arc::default()).await
    }

    fn scratch_entries(&self) -> usize {
        std::fs::read_dir(self.data.path().join("node/clips")).unwrap().count()
    }

    async fn stored_result(&self) -> JobResult {
        serde_json::from_slice(&self.workshop.store.get(&key::result(job()), 100_000).await.unwrap()).unwrap()
    }
}

fn job() -> JobId {
    JobId(Uuid::from_u128(42))
}

fn start(n: u32) -> StartAttempt {
    let request = serde_json::from_str(r#"{"prompt":"a ball"}"#).unwrap();
    let spec = RenderSpec::resolve(&request, &GenerationDefaults::default(), 1).unwrap();
    StartAttempt {
        key: AttemptKey { job: job(), attempt: AttemptNo(n), epoch: Epoch(1) },
        devices: vec![DeviceIndex(0)],
        topology: Topology::SOLO,
        model: "tiny".into(),
        model_hash: "abc".into(),
        spec_json: serde_json::to_string(&spec).unwrap(),
        tiling: Tiling::AUTO,
    }
}

fn accepted(outcome: &AttemptOutcome) -> u32 {
    match outcome {
        AttemptOutcome::Completed { accepted, .. } => accepted.0,
        AttemptOutcome::Failed { kind, message } => panic!("{kind:?}: {message}"),
    }
}

fn failure(outcome: AttemptOutcome) -> (FailureKind, String) {
    match outcome {
        AttemptOutcome::Failed { kind, message } => (kind, message),
        AttemptOutcome::Completed { accepted, .. } => panic!("completed, accepted {accepted}"),
    }
}

#[tokio::test]
async fn a_completed_attempt_leaves_clip_and_result_and_nothing_in_scratch() {
    let bench = Bench::new(Behaviour::Render);
    let outcome = bench.run(start(1)).await;
    assert_eq!(accepted(&outcome), 1);
    let AttemptOutcome::Completed { result_json, warnings, .. } = outcome else { unreachable!() };
    let result = bench.stored_result().await;
    assert_eq!(serde_json::from_str::<JobResult>(&result_json).unwrap(), result);
    assert_eq!(warnings, ["the prompt was cut"]);
    let clip = bench.workshop.store.get(&result.clip, 1000).await.unwrap();
    assert_eq!(clip, "clip of a ball");
    assert_eq!((result.clip_bytes, result.clip_sha256), (14, format!("{:x}", Sha256::digest(&clip))));
    assert_eq!(result.seconds.denoise, 2.0);
    assert!(result.seconds.total >= result.seconds.upload);
    assert_eq!(bench.scratch_entries(), 0);
    let log = bench.log.lock().unwrap();
    let at = |text: &str| log.iter().position(|line| line.contains(text)).unwrap_or_else(|| panic!("{text}: {log:?}"));
    assert!(at("denoise begins") < at("upload begins"));
    assert!(at("warning: the prompt was cut") < log.len());
}

#[tokio::test]
async fn of_two_attempts_that_finish_one_is_accepted_and_the_other_says_which() {
    let bench = Bench::new(Behaviour::Render);
    let winner = bench.run(start(1)).await;
    // The second is past its look for a result when the first creates it.
    let late = JobResult { attempt: AttemptNo(2), clip: key::clip(job(), AttemptNo(2)), ..bench.stored_result().await };
    bench.workshop.store.put(&late.clip, Bytes::from("late clip")).await.unwrap();
    let loser = publish(&bench.workshop, start(2).key, late.clone()).await.unwrap();
    assert_eq!((accepted(&winner), accepted(&loser)), (1, 1));
    assert_eq!(bench.stored_result().await.attempt, AttemptNo(1));
    assert_eq!(bench.workshop.store.head(&late.clip).await.unwrap(), None, "the loser's clip is removed");
    assert!(bench.workshop.store.head(&key::clip(job(), AttemptNo(1))).await.unwrap().is_some());
}

#[tokio::test]
async fn a_job_whose_result_exists_is_reported_without_rendering() {
    let bench = Bench::new(Behaviour::Render);
    bench.run(start(1)).await;
    assert_eq!(accepted(&bench.run(start(2)).await), 1);
    assert_eq!(bench.rendered.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn another_checkpoint_or_an_unknown_model_is_left_to_other_nodes() {
    let bench = Bench::new(Behaviour::Render);
    let (kind, message) = failure(bench.run(StartAttempt { model_hash: "def".into(), ..start(1) }).await);
    assert_eq!(kind, FailureKind::Device);
    assert!(message.contains("abc") && message.contains("def"), "{message}");
    let (kind, message) = failure(bench.run(StartAttempt { model: "big".into(), ..start(1) }).await);
    assert_eq!(kind, FailureKind::Device);
    assert!(message.contains("big"), "{message}");
}

#[tokio::test]
async fn a_spec_that_no_node_can_render_fails_the_job() {
    let bench = Bench::new(Behaviour::Render);
    let spec_json = start(1).spec_json.replace(r#""num_frames":163"#, r#""num_frames":8"#);
    let (kind, message) = failure(bench.run(StartAttempt { spec_json, ..start(1) }).await);
    assert_eq!(kind, FailureKind::Input);
    assert!(message.contains("num_frames 8"), "{message}");
}

#[tokio::test]
async fn a_panic_fails_the_attempt_and_leaves_the_device_alive() {
    let bench = Bench::new(Behaviour::Panic);
    for n in 1..3 {
        let (kind, message) = failure(bench.run(start(n)).await);
        assert_eq!(kind, FailureKind::Device);
        assert!(message.contains("panicked: index out of bounds"), "{message}");
    }
    assert_eq!(bench.scratch_entries(), 0);
}

#[tokio::test]
async fn a_foreign_result_is_a_store_failure_that_names_it() {
    let bench = Bench::new(Behaviour::Render);
    bench.workshop.store.put(&key::result(job()), Bytes::from("{}")).await.unwrap();
    let (kind, message) = failure(bench.run(start(1)).await);
    assert_eq!(kind, FailureKind::Store);
    assert!(message.contains("result.json"), "{message}");
}

/// Tells when it is dropped.
struct Tell(Option<tokio::sync::oneshot::Sender<()>>);

impl Drop for Tell {
    fn drop(&mut self) {
        if let Some(told) = self.0.take() {
            let _ = told.send(());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_attempt_gives_its_device_back_and_leaves_nothing() {
    let begun = Arc::new(tokio::sync::Notify::new());
    let bench = Bench::new(Behaviour::StepUntilStopped(begun.clone()));
    let stop = Arc::new(AtomicBool::new(false));
    let (told, released) = tokio::sync::oneshot::channel();
    let reservation = Arc::new(Tell(Some(told)));
    let running = tokio::spawn(run(bench.workshop.clone(), start(1), reservation, ProgressCell::new(), stop.clone()));
    begun.notified().await;
    stop.store(true, Ordering::Relaxed);
    running.abort();
    released.await.unwrap();
    assert!(running.await.unwrap_err().is_cancelled());
    assert_eq!(bench.workshop.store.head(&key::result(job())).await.unwrap(), None);
}

#[tokio::test]
async fn the_device_is_free_before_the_upload_begins() {
    let bench = Bench::new(Behaviour::Render);
    let (told, mut released) = tokio::sync::oneshot::channel();
    let progress = ProgressCell::new();
    let attempt = run(bench.workshop.clone(), start(1), Arc::new(Tell(Some(told))), progress.clone(), Arc::default());
    tokio::pin!(attempt);
    // Whichever of the two is seen first, an attempt that uploads has no device any more.
    let outcome = std::future::poll_fn(|cx| {
        let polled = attempt.as_mut().poll(cx);
        if progress.get().stage == Stage::Upload {
            assert!(!matches!(released.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Empty)));
        }
        polled
    });
    assert_eq!(accepted(&outcome.await), 1);
}

/// Groups of real devices on the bundled checkpoint.
mod gang {
    use std::path::Path;

    use farm_core::model::weights::checkpoint::Checkpoint;

    use super::*;
    use crate::cpu_device::CpuDevice;
    use crate::models::ModelShelf;

    /// What rank 2 does instead of its work.
    #[derive(Clone, Copy)]
    enum Fault {
        Fail,
        Panic,
        /// Takes its place in the group and never says anything, until it is told to stop.
        Hang,
    }

    /// A device that has its fault once, and works from then on.
    struct Faulty {
        device: CpuDevice,
        fault: Arc<Mutex<Option<Fault>>>,
        begun: Arc<tokio::sync::Notify>,
    }

    impl Device for Faulty {
        fn render(&mut self, work: Work) -> Result<Rendered, RenderError> {
            let fault = if work.group.rank() == 2 { self.fault.lock().unwrap().take() } else { None };
            match fault {
                None => self.device.render(work),
                Some(Fault::Fail) => {
                    work.group.abort("out of memory");
                    Err(RenderError::device("out of memory"))
                }
                Some(Fault::Panic) => panic!("index out of bounds"),
                Some(Fault::Hang) => {
                    self.begun.notify_one();
                    while !work.monitor.is_stopped() {
                        std::thread::yield_now();
                    }
                    work.group.abort("stopped");
                    Err(RenderError::Stopped)
                }
            }
        }
    }

    struct Gang {
        workshop: Arc<Workshop>,
        hash: String,
        begun: Arc<tokio::sync::Notify>,
        log: Arc<Mutex<Vec<String>>>,
        _data: tempfile::TempDir,
    }

    impl Gang {
        fn new(devices: u32, fault: Option<Fault>) -> Self {
            let data = tempfile::tempdir().unwrap();
            let model = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("assets/mochi-tiny");
            let hash = Checkpoint::open(&model).unwrap().content_hash().unwrap().to_owned();
            let shelf = Arc::new(ModelShelf::open([("tiny".to_owned(), model)], 1).unwrap());
            let (fault, begun) = (Arc::new(Mutex::new(fault)), Arc::new(tokio::sync::Notify::new()));
            let device = |index| {
                let device = CpuDevice::new(1, shelf.clone()).unwrap();
                let faulty = Faulty { device, fault: fault.clone(), begun: begun.clone() };
                DeviceHandle::spawn(DeviceIndex(index), faulty).unwrap()
            };
            let log = Arc::<Mutex<Vec<String>>>::default();
            let lines = log.clone();
            let workshop = Arc::new(Workshop {
                node: NodeId("n".into()),
                store: ArtifactStore::open("memory:").unwrap(),
                scratch: Arc::new(Scratch::open(&data.path().join("node")).unwrap()),
                devices: (0..devices).map(device).collect(),
                models: [("tiny".to_owned(), hash.clone())].into(),
                checkpoint_steps: 2,
                log: Box::new(move |_, line| lines.lock().unwrap().push(line)),
            });
            Self { workshop, hash, begun, log, _data: data }
        }

        /// The nth attempt at job `job`, on the first devices of the node.
        fn start(&self, job: u128, n: u32, topology: Topology) -> StartAttempt {
            let request = r#"{"prompt":"a red ball","width":64,"height":64,"num_frames":7,"num_inference_steps":6}"#;
            let request = serde_json::from_str(request).unwrap();
            let spec = RenderSpec::resolve(&request, &GenerationDefaults::default(), 1).unwrap();
            StartAttempt {
                key: AttemptKey { job: JobId(Uuid::from_u128(job)), attempt: AttemptNo(n), epoch: Epoch(1) },
                devices: (0..topology.world() as u32).map(DeviceIndex).collect(),
                topology,
                model: "tiny".into(),
                model_hash: self.hash.clone(),
                spec_json: serde_json::to_string(&spec).unwrap(),
                tiling: Tiling::AUTO,
            }
        }

        async fn run(&self, start: StartAttempt) -> AttemptOutcome {
            run(self.workshop.clone(), start, Arc::new(()), ProgressCell::new(), Arc::default()).await
        }

        /// The result of a clip that goes well.
        async fn result(&self, start: StartAttempt) -> JobResult {
            match self.run(start).await {
                AttemptOutcome::Completed { result_json, .. } => serde_json::from_str(&result_json).unwrap(),
                AttemptOutcome::Failed { kind, message } => panic!("{kind:?}: {message}"),
            }
        }

        fn logged(&self, text: &str) -> bool {
            self.log.lock().unwrap().iter().any(|line| line.contains(text))
        }
    }

    fn topology(cfg: usize, ring: usize, ulysses: usize) -> Topology {
        Topology::new(cfg, ring, ulysses).unwrap()
    }

    #[tokio::test]
    async fn a_gang_renders_the_clip_of_one_device_and_says_who_did() {
        let gang = Gang::new(4, None);
        let solo = gang.result(gang.start(1, 1, Topology::SOLO)).await;
        for (job, topology) in [(2, topology(2, 1, 2)), (3, topology(1, 1, 3))] {
            let result = gang.result(gang.start(job, 1, topology)).await;
            assert_eq!((result.topology, result.devices.len()), (topology, topology.world()));
            assert_eq!(result.clip_sha256, solo.clip_sha256, "{topology}");
        }
    }

    #[tokio::test]
    async fn one_rank_that_fails_ends_the_attempt_with_its_reason_and_all_devices_work_again() {
        for (fault, reason) in [(Fault::Fail, "out of memory"), (Fault::Panic, "panicked: index out of bounds")] {
            let gang = Gang::new(4, Some(fault));
            let (told, released) = tokio::sync::oneshot::channel();
            let (reservation, start) = (Arc::new(Tell(Some(told))), gang.start(1, 1, topology(2, 1, 2)));
            let attempt = run(gang.workshop.clone(), start, reservation, ProgressCell::new(), Arc::default());
            let (kind, message) = failure(attempt.await);
            assert_eq!(kind, FailureKind::Device);
            assert_eq!(message, format!("rank 2 of 4 (device 2): {reason}"));
            released.await.unwrap();
            let result = gang.result(gang.start(1, 2, topology(1, 1, 4))).await;
            assert_eq!(result.devices.len(), 4);
        }
    }

    #[tokio::test]
    async fn an_abort_stops_all_ranks() {
        let gang = Gang::new(4, Some(Fault::Hang));
        let stop = Arc::new(AtomicBool::new(false));
        let (told, released) = tokio::sync::oneshot::channel();
        let (reservation, start) = (Arc::new(Tell(Some(told))), gang.start(1, 1, topology(1, 1, 4)));
        let running = tokio::spawn(run(gang.workshop.clone(), start, reservation, ProgressCell::new(), stop.clone()));
        gang.begun.notified().await;
        stop.store(true, Ordering::Relaxed);
        running.abort();
        released.await.unwrap();
        gang.result(gang.start(1, 2, topology(1, 1, 4))).await;
    }

    #[tokio::test]
    async fn a_lease_of_another_size_than_its_topology_is_refused() {
        let gang = Gang::new(2, None);
        let start = StartAttempt { devices: vec![DeviceIndex(0)], ..gang.start(1, 1, topology(2, 1, 1)) };
        let (kind, message) = failure(gang.run(start).await);
        assert_eq!((kind, message.contains("needs 2 devices, the lease has 1")), (FailureKind::Device, true));
        let unknown = gang.start(1, 1, topology(1, 1, 3));
        assert!(failure(gang.run(unknown).await).1.contains("no device 2, the node has 2"));
    }

    #[tokio::test]
    async fn a_clip_goes_on_at_its_latest_latent_at_another_world_size_and_leaves_none() {
        let gang = Gang::new(4, None);
        let whole = gang.result(gang.start(1, 1, Topology::SOLO)).await;
        // The latents that an attempt of four left when its node died: those of the whole clip, from a run that keeps
        // them.
        let start = gang.start(2, 2, topology(1, 1, 3));
        let spec: Arc<RenderSpec> = Arc::new(serde_json::from_str(&start.spec_json).unwrap());
        let checkpoints = Checkpoints {
            store: gang.workshop.store.clone(),
            folder: key::latents(start.key.job),
            spec: spec.clone(),
            model_hash: gang.hash.as_str().into(),
        };
        let (slot, inbox) = Slot::new(4);
        denoise_into(&gang, &start, slot);
        checkpoints.save_all(inbox).await;
        assert_eq!(checkpoints.latest(&|note| panic!("{note}")).await.unwrap().step, 4);

        let result = gang.result(start).await;
        assert!(gang.logged("resumed at step 4 of 6"), "{:?}", gang.log.lock().unwrap());
        assert_eq!(result.clip_sha256, whole.clip_sha256);
        assert!(checkpoints.latest(&|_| ()).await.is_none(), "a finished clip keeps no latents");
    }

    /// Denoises the clip on one device, and puts its latents into the slot.
    fn denoise_into(gang: &Gang, start: &StartAttempt, slot: Slot) {
        let (folder, log) = (tempfile::tempdir().unwrap(), Arc::new(|_: String| ()));
        let work = Work {
            model: start.model.clone(),
            spec: serde_json::from_str(&start.spec_json).unwrap(),
            group: RankGroup::solo().unwrap(),
            start: Arc::new(Start::Seed),
            checkpoints: slot,
            clip: folder.path().join("clip.mp4"),
            monitor: Monitor::new(ProgressCell::new(), Arc::default(), log),
        };
        let rendered = gang.workshop.devices[0].render(work, Arc::new(()));
        futures::executor::block_on(rendered).unwrap();
    }

    #[tokio::test]
    async fn an_attempt_that_ends_early_leaves_latents_for_the_next() {
        let gang = Gang::new(4, None);
        let long = |n, topology| {
            let start = gang.start(1, n, topology);
            let spec_json = start.spec_json.replace("\"num_inference_steps\":6", "\"num_inference_steps\":200");
            StartAttempt { spec_json, ..start }
        };
        let stop = Arc::new(AtomicBool::new(false));
        let first = long(1, topology(2, 1, 2));
        let running = tokio::spawn(run(gang.workshop.clone(), first, Arc::new(()), ProgressCell::new(), stop.clone()));
        let folder = key::latents(JobId(Uuid::from_u128(1)));
        while gang.workshop.store.list(&folder, 1).await.unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        stop.store(true, Ordering::Relaxed);
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        let result = gang.result(long(2, topology(1, 1, 3))).await;
        assert_eq!(result.devices.len(), 3);
        assert!(gang.logged("resumed at step "), "{:?}", gang.log.lock().unwrap());
    }
}
