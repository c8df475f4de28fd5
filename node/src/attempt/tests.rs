mod gang;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use farm_core::id::{AttemptNo, DeviceIndex, Epoch, JobId};
use farm_core::job::spec::GenerationDefaults;
use farm_core::parallel::cost::devices::Devices;
use farm_core::parallel::group::RankGroup;
use farm_core::parallel::topology::Topology;
use farm_core::precision::Precision;
use farm_core::tiles::hand::{Hand, Todo};
use farm_core::tiles::message::{FromHand, Pixels};
use farm_core::tiles::plan::{Mode, Tiling};
use farm_core::tiles::statistics::Sums;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::*;
use crate::checkpoints::Slot;
use crate::data_plane::Options;
use crate::device_thread::{Decode, Denoise, Device};

/// What the fake device does with a clip.
#[derive(Clone)]
enum Behaviour {
    Render,
    Panic,
    /// Says when it has begun, then goes through steps until it is told to stop.
    StepUntilStopped(Arc<tokio::sync::Notify>),
    /// Denoises, and fails whenever it is to decode.
    FailDecodes,
}

/// Makes grey clips; only the order of things is of interest here.
struct FakeDevice {
    behaviour: Behaviour,
    denoised: Arc<AtomicUsize>,
}

impl Device for FakeDevice {
    fn denoise(&mut self, work: Denoise) -> Result<Denoised, RenderError> {
        let step = |done| work.monitor.advance(Progress { stage: Stage::Denoise, done, total: 3, eta_seconds: None });
        match &self.behaviour {
            Behaviour::Render | Behaviour::FailDecodes => {
                step(1);
                self.denoised.fetch_add(1, Ordering::Relaxed);
                let latent = vec![0.5; work.spec.latent_shape().iter().product()];
                Ok(Denoised {
                    latent,
                    text_seconds: 1.0,
                    denoise_seconds: 2.0,
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

    fn decode(&mut self, work: Decode) {
        let Decode { shape: [_, chunks, height, width], mut link, .. } = work;
        if matches!(self.behaviour, Behaviour::FailDecodes) {
            return link.to.blocking_send(FromHand::Failed { message: "no memory".into() }).unwrap();
        }
        let mut hand = Hand::new(0, chunks as u32);
        loop {
            match hand.todo() {
                Todo::Done => return,
                Todo::Wait => match link.from.blocking_recv() {
                    Some(message) => hand.hear(message).unwrap(),
                    None => return,
                },
                Todo::Give { number, step } => {
                    let sums = Sums::default();
                    link.to.blocking_send(FromHand::Given { number, step, busy_ms: 0, sums, edges: None }).unwrap();
                }
                Todo::Frames { number, chunk } => {
                    let frames = if chunk == 0 { 1 } else { 6 };
                    let pixels = Pixels::Rgb8(vec![128; frames * 64 * height * width * 3]);
                    link.to.blocking_send(FromHand::Frames { number, chunk, pixels }).unwrap();
                }
                _ => {}
            }
        }
    }
}

/// Where the scheduler's answers go.
type Answers = Arc<Mutex<Option<mpsc::Sender<Hands>>>>;

/// A node over a memory store, and a scheduler that lets all devices of a lease decode.
async fn workshop(
    data: &tempfile::TempDir,
    devices: Vec<DeviceHandle>,
    models: HashMap<String, Offered>,
    checkpoint_steps: u32,
) -> (Arc<Workshop>, Answers, Arc<Mutex<Vec<String>>>) {
    let (log, answers) = (Arc::<Mutex<Vec<String>>>::default(), Answers::default());
    let (lines, told) = (log.clone(), answers.clone());
    let all: Vec<DeviceIndex> = (0..devices.len() as u32).map(DeviceIndex).collect();
    let options = Options { listen: ([127, 0, 0, 1], 0).into(), host: None, tls: None, patience: Default::default() };
    let workshop = Arc::new(Workshop {
        node: NodeId("n".into()),
        store: ArtifactStore::open("memory:").unwrap(),
        scratch: Arc::new(Scratch::open(&data.path().join("node")).unwrap()),
        devices,
        models,
        checkpoint_steps,
        memory: None,
        precision: Precision::F32,
        alone_after: Duration::from_millis(50),
        data: DataPlane::start(options).await.unwrap(),
        holding: Box::new(|_| ()),
        log: Box::new(move |_, line| lines.lock().unwrap().push(line)),
        want_hands: Box::new(move |_, wanted| {
            let hands = Hands { round: wanted.round, keep: all.clone(), helpers: 0 };
            told.lock().unwrap().as_ref().unwrap().try_send(hands).unwrap();
        }),
    });
    (workshop, answers, log)
}

/// The attempt with a lease whose devices' last reservation is `kept`.
fn attempt(
    (workshop, answers): (&Arc<Workshop>, &Answers),
    start: StartAttempt,
    kept: Reservation,
    progress: ProgressCell,
    orders: Orders,
) -> impl Future<Output = AttemptOutcome> + Send + use<> {
    let lease = start.devices.iter().map(|&device| (device, kept.clone())).collect();
    let (tell, hands) = mpsc::channel(4);
    *answers.lock().unwrap() = Some(tell);
    run(workshop.clone(), start, lease, hands, progress, orders)
}

/// A node of one fake device.
struct Bench {
    workshop: Arc<Workshop>,
    answers: Answers,
    denoised: Arc<AtomicUsize>,
    log: Arc<Mutex<Vec<String>>>,
    data: tempfile::TempDir,
}

impl Bench {
    async fn new(behaviour: Behaviour) -> Self {
        let data = tempfile::tempdir().unwrap();
        let denoised = Arc::<AtomicUsize>::default();
        let device = FakeDevice { behaviour, denoised: denoised.clone() };
        let devices = vec![DeviceHandle::spawn(DeviceIndex(0), device).unwrap()];
        let models =
            [("tiny".to_owned(), Offered { hash: "abc".into(), shape: ModelShape::mochi1(), vae: vae() })].into();
        let (workshop, answers, log) = workshop(&data, devices, models, 0).await;
        Self { workshop, answers, denoised, log, data }
    }

    /// With devices that have so many bytes each.
    fn limit(&mut self, memory: f64) {
        let known = Devices::embedded().unwrap();
        let (mut device, link) = (known.device("cpu").unwrap(), known.link("local").unwrap());
        device.memory = memory;
        Arc::get_mut(&mut self.workshop).unwrap().memory = Some(Site::one_host(device, link));
    }

    async fn run(&self, start: StartAttempt) -> AttemptOutcome {
        attempt((&self.workshop, &self.answers), start, Arc::new(()), ProgressCell::new(), Orders::default()).await
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

/// Nobody decodes with it.
pub(super) fn vae() -> VaeConfig {
    VaeConfig {
        latent_channels: 12,
        channels: vec![32],
        layers: vec![1, 1],
        temporal_expansions: vec![],
        spatial_expansions: vec![],
        latents_mean: vec![0.0; 12],
        latents_std: vec![1.0; 12],
    }
}

fn start(n: u32) -> StartAttempt {
    let request = r#"{"prompt":"a ball","width":32,"height":16,"num_frames":13,"num_inference_steps":6}"#;
    let request = serde_json::from_str(request).unwrap();
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
        other => panic!("{other:?}"),
    }
}

fn failure(outcome: AttemptOutcome) -> (FailureKind, String) {
    match outcome {
        AttemptOutcome::Failed { kind, message } => (kind, message),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_completed_attempt_leaves_clip_and_result_and_nothing_in_scratch() {
    let bench = Bench::new(Behaviour::Render).await;
    let outcome = bench.run(start(1)).await;
    assert_eq!(accepted(&outcome), 1);
    let AttemptOutcome::Completed { result_json, warnings, .. } = outcome else { unreachable!() };
    let result = bench.stored_result().await;
    assert_eq!(serde_json::from_str::<JobResult>(&result_json).unwrap(), result);
    assert_eq!(warnings, ["the prompt was cut"]);
    let clip = bench.workshop.store.get(&result.clip, 1 << 20).await.unwrap();
    assert_eq!((result.clip_bytes, result.clip_sha256), (clip.len() as u64, format!("{:x}", Sha256::digest(&clip))));
    assert_eq!((result.seconds.text, result.seconds.denoise), (1.0, 2.0));
    let decode = result.decode.unwrap();
    assert_eq!((decode.mode, decode.grid, decode.hands), (Mode::Whole, [1, 1], vec!["n 0".to_owned()]));
    assert!(result.seconds.total >= result.seconds.upload);
    assert_eq!(bench.scratch_entries(), 0);
    let log = bench.log.lock().unwrap();
    let at = |text: &str| log.iter().position(|line| line.contains(text)).unwrap_or_else(|| panic!("{text}: {log:?}"));
    assert!(at("denoise begins") < at("decode begins") && at("decode begins") < at("upload begins"));
    assert!(at("warning: the prompt was cut") < log.len());
}

#[tokio::test]
async fn of_two_attempts_that_finish_one_is_accepted_and_the_other_says_which() {
    let bench = Bench::new(Behaviour::Render).await;
    let winner = bench.run(start(1)).await;
    // The second is past its look for a result when the first creates it.
    let late = JobResult { attempt: AttemptNo(2), clip: key::clip(job(), AttemptNo(2)), ..bench.stored_result().await };
    bench.workshop.store.put(&late.clip, Bytes::from("late clip")).await.unwrap();
    let loser = result::publish(&bench.workshop, start(2).key, late.clone()).await.unwrap();
    assert_eq!((accepted(&winner), accepted(&loser)), (1, 1));
    assert_eq!(bench.stored_result().await.attempt, AttemptNo(1));
    assert_eq!(bench.workshop.store.head(&late.clip).await.unwrap(), None, "the loser's clip is removed");
    assert!(bench.workshop.store.head(&key::clip(job(), AttemptNo(1))).await.unwrap().is_some());
}

#[tokio::test]
async fn a_job_whose_result_exists_is_reported_without_rendering() {
    let bench = Bench::new(Behaviour::Render).await;
    bench.run(start(1)).await;
    assert_eq!(accepted(&bench.run(start(2)).await), 1);
    assert_eq!(bench.denoised.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn another_checkpoint_or_an_unknown_model_is_left_to_other_nodes() {
    let bench = Bench::new(Behaviour::Render).await;
    let (kind, message) = failure(bench.run(StartAttempt { model_hash: "def".into(), ..start(1) }).await);
    assert_eq!(kind, FailureKind::Device);
    assert!(message.contains("abc") && message.contains("def"), "{message}");
    let (kind, message) = failure(bench.run(StartAttempt { model: "big".into(), ..start(1) }).await);
    assert_eq!(kind, FailureKind::Device);
    assert!(message.contains("big"), "{message}");
}

#[tokio::test]
async fn a_spec_that_no_node_can_render_fails_the_job() {
    let bench = Bench::new(Behaviour::Render).await;
    let spec_json = start(1).spec_json.replace(r#""num_frames":13"#, r#""num_frames":8"#);
    let (kind, message) = failure(bench.run(StartAttempt { spec_json, ..start(1) }).await);
    assert_eq!(kind, FailureKind::Input);
    assert!(message.contains("num_frames 8"), "{message}");
}

#[tokio::test]
async fn a_panic_fails_the_attempt_and_leaves_the_device_alive() {
    let bench = Bench::new(Behaviour::Panic).await;
    for n in 1..3 {
        let (kind, message) = failure(bench.run(start(n)).await);
        assert_eq!(kind, FailureKind::Device);
        assert!(message.contains("panicked: index out of bounds"), "{message}");
    }
    assert_eq!(bench.scratch_entries(), 0);
}

#[tokio::test]
async fn a_foreign_result_is_a_store_failure_that_names_it() {
    let bench = Bench::new(Behaviour::Render).await;
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
    let bench = Bench::new(Behaviour::StepUntilStopped(begun.clone())).await;
    let orders = Orders::default();
    let (told, released) = tokio::sync::oneshot::channel();
    let reservation = Arc::new(Tell(Some(told)));
    let at = (&bench.workshop, &bench.answers);
    let running = tokio::spawn(attempt(at, start(1), reservation, ProgressCell::new(), orders.clone()));
    begun.notified().await;
    orders.stop();
    running.abort();
    released.await.unwrap();
    assert!(running.await.unwrap_err().is_cancelled());
    assert_eq!(bench.workshop.store.head(&key::result(job())).await.unwrap(), None);
}

#[tokio::test]
async fn the_device_is_free_before_the_upload_begins() {
    let bench = Bench::new(Behaviour::Render).await;
    let (told, mut released) = tokio::sync::oneshot::channel();
    let progress = ProgressCell::new();
    let at = (&bench.workshop, &bench.answers);
    let attempt = attempt(at, start(1), Arc::new(Tell(Some(told))), progress.clone(), Orders::default());
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

#[tokio::test]
async fn a_decode_that_fails_leaves_the_latent_and_the_next_attempt_does_not_denoise() {
    let bench = Bench::new(Behaviour::FailDecodes).await;
    let (kind, message) = failure(bench.run(start(1)).await);
    assert_eq!(kind, FailureKind::Device);
    assert!(message.contains("no device has joined the decode, or stayed in it"), "{message}");
    let log = || bench.log.lock().unwrap().join("; ");
    assert!(log().contains("no memory"), "{}", log());
    failure(bench.run(start(2)).await);
    assert!(log().contains("the latent is finished already"), "{}", log());
    assert_eq!(bench.denoised.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_latent_of_another_precision_is_decoded_if_it_is_finished_and_else_made_anew() {
    for (precision, step, denoised, said) in [
        (Precision::F32, 6, 0, Precision::F32),
        (Precision::F32, 3, 1, Precision::Bf16),
        (Precision::Bf16, 3, 1, Precision::Bf16),
    ] {
        let mut bench = Bench::new(Behaviour::Render).await;
        Arc::get_mut(&mut bench.workshop).unwrap().precision = Precision::Bf16;
        let spec: RenderSpec = serde_json::from_str(&start(2).spec_json).unwrap();
        let latent = LatentCheckpoint { step, precision, values: vec![0.25; spec.latent_shape().iter().product()] };
        let key = key::latent(&key::latents(job()), step);
        bench.workshop.store.put(&key, latent.to_bytes(&spec, "abc").unwrap().into()).await.unwrap();
        assert_eq!(accepted(&bench.run(start(2)).await), 2);
        assert_eq!(bench.denoised.load(Ordering::Relaxed), denoised, "{precision} {step}");
        assert_eq!(bench.stored_result().await.precision, said, "{precision} {step}");
        let passed_over = "step 3 is passed over: it is of fp32, and this run computes in bf16";
        let log = bench.log.lock().unwrap().join("; ");
        assert_eq!(log.contains(passed_over), step == 3 && precision == Precision::F32, "{log}");
    }
}

#[tokio::test]
async fn without_a_word_from_the_scheduler_a_device_of_the_lease_decodes() {
    let bench = Bench::new(Behaviour::Render).await;
    // An answer to no question of this attempt.
    let (tell, hands) = mpsc::channel(4);
    tell.send(Hands { round: 7, keep: vec![], helpers: 9 }).await.unwrap();
    let (other, _unheard) = mpsc::channel(4);
    *bench.answers.lock().unwrap() = Some(other);
    let lease = [(DeviceIndex(0), Arc::new(()) as Reservation)].into();
    let outcome = run(bench.workshop.clone(), start(1), lease, hands, ProgressCell::new(), Orders::default()).await;
    assert_eq!(accepted(&outcome), 1);
}

#[tokio::test]
async fn an_attempt_that_yields_before_its_first_step_ends_with_none_and_uses_no_device() {
    let bench = Bench::new(Behaviour::Render).await;
    let orders = Orders::default();
    orders.hand_over();
    let at = (&bench.workshop, &bench.answers);
    let outcome = attempt(at, start(1), Arc::new(()), ProgressCell::new(), orders).await;
    assert_eq!(outcome, AttemptOutcome::Interrupted { step: 0 });
    assert_eq!(bench.denoised.load(Ordering::Relaxed), 0);
    assert_eq!(accepted(&bench.run(start(2)).await), 2);
}

#[tokio::test]
async fn a_yield_in_decode_or_upload_runs_to_the_end() {
    for stage in [Stage::Decode, Stage::Upload] {
        let mut told = false;
        // An upload to memory may be over between two looks.
        for _ in 0..100 {
            let bench = Bench::new(Behaviour::Render).await;
            let (orders, progress) = (Orders::default(), ProgressCell::new());
            let at = (&bench.workshop, &bench.answers);
            let attempt = attempt(at, start(1), Arc::new(()), progress.clone(), orders.clone());
            tokio::pin!(attempt);
            let outcome = std::future::poll_fn(|cx| {
                if progress.get().stage == stage {
                    orders.hand_over();
                    told = true;
                }
                attempt.as_mut().poll(cx)
            });
            assert_eq!(accepted(&outcome.await), 1);
            if told {
                break;
            }
        }
        assert!(told, "{stage:?} was never seen");
    }
}

#[tokio::test]
async fn a_clip_that_is_predicted_to_have_no_room_is_not_begun() {
    let mut bench = Bench::new(Behaviour::Render).await;
    bench.limit(1e6);
    let (kind, message) = failure(bench.run(start(1)).await);
    assert_eq!(kind, FailureKind::OutOfMemory);
    assert!(message.contains("denoising it takes about") && message.contains("1000000"), "{message}");
    assert_eq!(bench.denoised.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_tile_that_is_predicted_to_have_no_room_fails_in_the_decode_with_the_latent_stored() {
    let mut bench = Bench::new(Behaviour::FailDecodes).await;
    failure(bench.run(start(1)).await);
    bench.limit(1e3);
    let progress = ProgressCell::new();
    let at = (&bench.workshop, &bench.answers);
    let outcome = attempt(at, start(2), Arc::new(()), progress.clone(), Orders::default()).await;
    let (kind, message) = failure(outcome);
    assert_eq!((kind, progress.get().stage), (FailureKind::OutOfMemory, Stage::Decode));
    assert!(message.contains("decoding a tile of 1 takes about"), "{message}");
}
