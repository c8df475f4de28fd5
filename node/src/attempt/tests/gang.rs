//! Groups of real devices on the bundled checkpoint.

use std::path::Path;

use farm_core::model::weights::checkpoint::Checkpoint;

use super::*;
use crate::devices::Compute;
use crate::engine_device::EngineDevice;
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
    device: EngineDevice,
    fault: Arc<Mutex<Option<Fault>>>,
    begun: Arc<tokio::sync::Notify>,
}

impl Device for Faulty {
    fn denoise(&mut self, work: Denoise) -> Result<Denoised, RenderError> {
        let fault = if work.group.rank() == 2 { self.fault.lock().unwrap().take() } else { None };
        match fault {
            None => self.device.denoise(work),
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

    fn decode(&mut self, work: Decode) {
        self.device.decode(work);
    }
}

struct Gang {
    workshop: Arc<Workshop>,
    answers: Answers,
    hash: String,
    begun: Arc<tokio::sync::Notify>,
    log: Arc<Mutex<Vec<String>>>,
    _data: tempfile::TempDir,
}

impl Gang {
    async fn new(devices: u32, fault: Option<Fault>) -> Self {
        let data = tempfile::tempdir().unwrap();
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("assets/mochi-tiny");
        let hash = Checkpoint::open(&model).unwrap().content_hash().unwrap().to_owned();
        let compute = Compute::unpinned(1);
        let shelf = Arc::new(ModelShelf::open([("tiny".to_owned(), model)], &compute).unwrap());
        let (fault, begun) = (Arc::new(Mutex::new(fault)), Arc::new(tokio::sync::Notify::new()));
        let device = |index| {
            let device = EngineDevice::new(&compute, index as usize, shelf.clone()).unwrap();
            let faulty = Faulty { device, fault: fault.clone(), begun: begun.clone() };
            DeviceHandle::spawn(DeviceIndex(index), faulty).unwrap()
        };
        let handles = (0..devices).map(device).collect();
        let (workshop, answers, log) = workshop(&data, handles, shelf.offered(), 2).await;
        Self { workshop, answers, hash, begun, log, _data: data }
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
        self.attempt(start, Arc::new(()), Orders::default()).await
    }

    fn attempt(
        &self,
        start: StartAttempt,
        kept: Reservation,
        orders: Orders,
    ) -> impl Future<Output = AttemptOutcome> + Send + use<> {
        attempt((&self.workshop, &self.answers), start, kept, ProgressCell::new(), orders)
    }

    /// The result of a clip that goes well.
    async fn result(&self, start: StartAttempt) -> JobResult {
        match self.run(start).await {
            AttemptOutcome::Completed { result_json, .. } => serde_json::from_str(&result_json).unwrap(),
            other => panic!("{other:?}"),
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
    let gang = Gang::new(4, None).await;
    let solo = gang.result(gang.start(1, 1, Topology::SOLO)).await;
    for (job, topology) in [(2, topology(2, 1, 2)), (3, topology(1, 1, 3))] {
        let result = gang.result(gang.start(job, 1, topology)).await;
        assert_eq!((result.topology, result.devices.len()), (topology, topology.world()));
        assert_eq!(result.clip_sha256, solo.clip_sha256, "{topology}");
    }
}

#[tokio::test]
async fn a_clip_in_tiles_has_the_same_bytes_on_any_number_of_devices() {
    let gang = Gang::new(3, None).await;
    let tiles = |job, devices: u32| {
        let devices: Vec<DeviceIndex> = (0..devices).map(DeviceIndex).collect();
        let topology = topology(1, 1, devices.len());
        let tiling = "shared:4x4+2".parse().unwrap();
        StartAttempt { tiling, devices, ..gang.start(job, 1, topology) }
    };
    let solo = gang.result(tiles(1, 1)).await;
    let decode = solo.decode.unwrap();
    assert_eq!((decode.mode, decode.grid, decode.hands.len()), (Mode::Shared, [3, 3], 1));
    for devices in [2, 3] {
        let result = gang.result(tiles(devices.into(), devices)).await;
        assert_eq!(result.clip_sha256, solo.clip_sha256, "{devices} devices");
        assert_eq!(result.decode.unwrap().hands.len(), devices as usize);
    }
}

#[tokio::test]
async fn one_rank_that_fails_ends_the_attempt_with_its_reason_and_all_devices_work_again() {
    for (fault, reason) in [(Fault::Fail, "out of memory"), (Fault::Panic, "panicked: index out of bounds")] {
        let gang = Gang::new(4, Some(fault)).await;
        let (told, released) = tokio::sync::oneshot::channel();
        let (reservation, start) = (Arc::new(Tell(Some(told))), gang.start(1, 1, topology(2, 1, 2)));
        let (kind, message) = failure(gang.attempt(start, reservation, Orders::default()).await);
        assert_eq!(kind, FailureKind::Device);
        assert_eq!(message, format!("rank 2 of 4 (device 2): {reason}"));
        released.await.unwrap();
        let result = gang.result(gang.start(1, 2, topology(1, 1, 4))).await;
        assert_eq!(result.devices.len(), 4);
    }
}

#[tokio::test]
async fn an_abort_stops_all_ranks() {
    let gang = Gang::new(4, Some(Fault::Hang)).await;
    let orders = Orders::default();
    let (told, released) = tokio::sync::oneshot::channel();
    let (reservation, start) = (Arc::new(Tell(Some(told))), gang.start(1, 1, topology(1, 1, 4)));
    let running = tokio::spawn(gang.attempt(start, reservation, orders.clone()));
    gang.begun.notified().await;
    orders.stop();
    running.abort();
    released.await.unwrap();
    gang.result(gang.start(1, 2, topology(1, 1, 4))).await;
}

#[tokio::test]
async fn a_lease_of_another_size_than_its_topology_is_refused() {
    let gang = Gang::new(2, None).await;
    let start = StartAttempt { devices: vec![DeviceIndex(0)], ..gang.start(1, 1, topology(2, 1, 1)) };
    let (kind, message) = failure(gang.run(start).await);
    assert_eq!((kind, message.contains("needs 2 devices, the lease has 1")), (FailureKind::Device, true));
    let unknown = gang.start(1, 1, topology(1, 1, 3));
    assert!(failure(gang.run(unknown).await).1.contains("no device 2, the node has 2"));
}

#[tokio::test]
async fn a_clip_goes_on_at_its_latest_latent_at_another_world_size_and_leaves_none() {
    let gang = Gang::new(4, None).await;
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
        precision: Precision::F32,
    };
    let (slot, inbox) = Slot::new(4);
    denoise_into(&gang, &start, slot);
    checkpoints.save_all(inbox, &|_| ()).await;
    assert_eq!(checkpoints.latest(&|note| panic!("{note}")).await.unwrap().step, 4);

    let result = gang.result(start).await;
    assert!(gang.logged("resumed at step 4 of 6"), "{:?}", gang.log.lock().unwrap());
    assert_eq!(result.clip_sha256, whole.clip_sha256);
    assert!(checkpoints.latest(&|_| ()).await.is_none(), "a finished clip keeps no latents");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_yield_at_a_step_border_keeps_the_latent_of_the_whole_gang_and_others_go_on_from_it() {
    let gang = Gang::new(4, None).await;
    let long = |job, n, topology| {
        let start = gang.start(job, n, topology);
        let spec_json = start.spec_json.replace("\"num_inference_steps\":6", "\"num_inference_steps\":60");
        StartAttempt { spec_json, ..start }
    };
    let whole = gang.result(long(9, 1, Topology::SOLO)).await;
    for (job, first, then) in [(1, Topology::SOLO, topology(2, 1, 2)), (2, topology(2, 1, 2), topology(1, 1, 3))] {
        let (orders, progress) = (Orders::default(), ProgressCell::new());
        let (told, mut released) = tokio::sync::oneshot::channel();
        let (at, kept) = ((&gang.workshop, &gang.answers), Arc::new(Tell(Some(told))));
        let running = tokio::spawn(attempt(at, long(job, 1, first), kept, progress.clone(), orders.clone()));
        // An odd step: the checkpoints that are due come after even ones.
        while progress.get().stage != Stage::Denoise || progress.get().done % 2 == 0 {
            assert!(!running.is_finished());
            tokio::task::yield_now().await;
        }
        orders.hand_over();
        let AttemptOutcome::Interrupted { step } = running.await.unwrap() else { panic!("not handed over") };
        assert!((1..60).contains(&step));
        assert!(released.try_recv().is_ok(), "all devices are idle again");
        let folder = key::latents(JobId(Uuid::from_u128(job)));
        let stored = gang.workshop.store.list(&folder, 100).await.unwrap();
        assert!(stored.contains(&key::latent(&folder, step)), "step {step}: {stored:?}");

        // Told again before it has begun, the next one hands over what it was given.
        let orders = Orders::default();
        orders.hand_over();
        let second = gang.attempt(long(job, 2, then), Arc::new(()), orders).await;
        assert_eq!(second, AttemptOutcome::Interrupted { step });
        let result = gang.result(long(job, 3, then)).await;
        assert!(gang.logged(&format!("resumed at step {step} of 60")));
        assert_eq!(result.clip_sha256, whole.clip_sha256, "{first} and then {then}");
    }
}

/// Denoises the clip on one device, and puts its latents into the slot.
fn denoise_into(gang: &Gang, start: &StartAttempt, slot: Slot) {
    let log = Arc::new(|_: String| ());
    let work = Denoise {
        model: start.model.clone(),
        spec: serde_json::from_str(&start.spec_json).unwrap(),
        group: RankGroup::solo().unwrap(),
        start: Arc::new(Start::Seed),
        checkpoints: slot,
        monitor: Monitor::new(ProgressCell::new(), Orders::default(), log),
    };
    let denoised = gang.workshop.devices[0].denoise(work, Arc::new(()));
    futures::executor::block_on(denoised).unwrap();
}

#[tokio::test]
async fn an_attempt_that_ends_early_leaves_latents_for_the_next() {
    let gang = Gang::new(4, None).await;
    let long = |n, topology| {
        let start = gang.start(1, n, topology);
        let spec_json = start.spec_json.replace("\"num_inference_steps\":6", "\"num_inference_steps\":200");
        StartAttempt { spec_json, ..start }
    };
    let orders = Orders::default();
    let first = long(1, topology(2, 1, 2));
    let running = tokio::spawn(gang.attempt(first, Arc::new(()), orders.clone()));
    let folder = key::latents(JobId(Uuid::from_u128(1)));
    while gang.workshop.store.list(&folder, 1).await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    orders.stop();
    running.abort();
    assert!(running.await.unwrap_err().is_cancelled());
    let result = gang.result(long(2, topology(1, 1, 3))).await;
    assert_eq!(result.devices.len(), 3);
    assert!(gang.logged("resumed at step "), "{:?}", gang.log.lock().unwrap());
}
