//! A whole clip, with the bundled checkpoint.
#![cfg(feature = "model")]

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use farm_core::engine::Engine;
use farm_core::engine::cpu::CpuEngine;
use farm_core::job::spec::{GuidanceScale, RenderRequest, RenderSpec};
use farm_core::job::state::{Progress, Stage};
use farm_core::model::ModelError;
use farm_core::model::latent::{DitLatent, LatentCheckpoint};
use farm_core::model::noise::normals;
use farm_core::model::pipeline::{Pipeline, RenderObserver, Residency, Start};
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::group::RankGroup;

fn pipeline(engine: &CpuEngine) -> Pipeline<CpuEngine> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/mochi-tiny");
    Pipeline::open(engine, Checkpoint::open(&dir).unwrap(), Residency::Kept).unwrap()
}

fn solo() -> RankGroup<CpuEngine> {
    RankGroup::solo().unwrap()
}

fn spec(pipeline: &Pipeline<CpuEngine>, prompt: &str) -> RenderSpec {
    let request = RenderRequest {
        prompt: prompt.into(),
        negative_prompt: None,
        width: Some(32),
        height: Some(48),
        num_frames: Some(13),
        num_inference_steps: Some(3),
        guidance_scale: Some(GuidanceScale::PerStep(vec![1.0, 4.5, 2.0])),
        seed: None,
        id: None,
        priority: None,
        model: None,
        labels: BTreeMap::new(),
        after: Vec::new(),
        require: BTreeMap::new(),
    };
    RenderSpec::resolve(&request, pipeline.defaults(), 7).unwrap()
}

#[derive(Default)]
struct Record {
    progress: Vec<(Stage, u32, u32)>,
    etas: Vec<(Stage, f32)>,
    warnings: Vec<String>,
    latent: Vec<f32>,
    counts: Vec<usize>,
    rgb24: Vec<u8>,
    stop_at: Option<(Stage, u32)>,
    /// After so many calls to decide on it.
    hand_over_after: Option<usize>,
    checkpoints: Vec<LatentCheckpoint>,
    full: bool,
}

impl RenderObserver for Record {
    fn progress(&mut self, progress: Progress) -> ControlFlow<()> {
        self.progress.push((progress.stage, progress.done, progress.total));
        self.etas.extend(progress.eta_seconds.map(|eta| (progress.stage, eta)));
        if self.stop_at == Some((progress.stage, progress.done)) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    fn warning(&mut self, message: &str) {
        self.warnings.push(message.into());
    }

    fn hands_over(&mut self) -> bool {
        let Some(left) = &mut self.hand_over_after else { return false };
        let now = *left == 0;
        *left = left.saturating_sub(1);
        now
    }

    fn checkpoint(&mut self, checkpoint: LatentCheckpoint) {
        self.checkpoints.push(checkpoint);
    }

    fn latent(&mut self, values: &[f32], shape: [usize; 4]) -> io::Result<()> {
        assert_eq!(shape, [12, 3, 6, 4]);
        self.latent = values.to_vec();
        Ok(())
    }

    fn frames(&mut self, rgb24: &[u8], count: usize) -> io::Result<()> {
        if self.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        assert_eq!(rgb24.len(), count * 48 * 32 * 3);
        self.counts.push(count);
        self.rgb24.extend(rgb24);
        Ok(())
    }
}

#[test]
fn a_clip_has_its_frames_and_tells_how_far_it_is() {
    let engine = CpuEngine::new(1).unwrap();
    let pipeline = pipeline(&engine);
    let mut record = Record::default();
    let spec = spec(&pipeline, "a red ball moving left");
    let rendered = pipeline.render(&engine, &solo(), &spec, &Start::Seed, &mut record).unwrap();
    assert_eq!(record.counts.iter().sum::<usize>(), 13);
    use Stage::{Decode, Denoise, Text};
    let expected = [(Text, 0, 1), (Denoise, 0, 3), (Denoise, 1, 3), (Denoise, 2, 3), (Denoise, 3, 3)];
    assert_eq!(record.progress[..5], expected);
    assert_eq!(record.progress[5..], [(Decode, 0, 13), (Decode, 1, 13), (Decode, 7, 13), (Decode, 13, 13)]);
    assert!(record.etas.iter().any(|(stage, eta)| *stage == Denoise && *eta > 0.0), "{:?}", record.etas);
    assert_eq!(record.etas.last().copied(), Some((Decode, 0.0)));
    let seconds = rendered.seconds;
    assert!(seconds.text > 0.0 && seconds.denoise > 0.0 && seconds.decode > 0.0);
    assert!(seconds.total >= seconds.text + seconds.denoise + seconds.decode + seconds.encode);
    // A clip of one colour is not a clip.
    assert!(record.rgb24.iter().max() > record.rgb24.iter().min());
}

#[test]
fn threads_shared_weights_and_noise_from_outside_change_no_bit() {
    let engine = CpuEngine::new(1).unwrap();
    let pipeline = pipeline(&engine);
    let spec = spec(&pipeline, "a blue triangle staying still on a navy background");
    let mut expected = Record::default();
    pipeline.render(&engine, &solo(), &spec, &Start::Seed, &mut expected).unwrap();

    let noise = normals(spec.seed, 0..12 * 3 * 6 * 4);
    for threads in [2, 3] {
        let other = CpuEngine::new(threads).unwrap();
        let mut got = Record::default();
        pipeline.render(&other, &solo(), &spec, &Start::Noise(noise.clone()), &mut got).unwrap();
        assert_eq!(got.latent, expected.latent, "{threads} threads");
        assert_eq!(got.rgb24, expected.rgb24, "{threads} threads");
    }

    let mut decoded = Record::default();
    let latent = DitLatent(engine.upload(&expected.latent, &spec.latent_shape()).unwrap());
    pipeline.decode(&engine, &latent, &mut decoded).unwrap();
    assert_eq!(decoded.rgb24, expected.rgb24, "decoded from the stored latent");
}

#[test]
fn empty_and_over_long_prompts_are_rendered() {
    let engine = CpuEngine::new(1).unwrap();
    let pipeline = pipeline(&engine);
    let mut record = Record::default();
    pipeline.render(&engine, &solo(), &spec(&pipeline, ""), &Start::Seed, &mut record).unwrap();
    assert!(record.warnings.is_empty() && record.rgb24.len() == 13 * 48 * 32 * 3);

    let mut record = Record::default();
    let mut spec = spec(&pipeline, &"red ".repeat(400));
    spec.negative_prompt = "blue ".repeat(300);
    pipeline.denoise(&engine, &solo(), &spec, &Start::Seed, &mut record).unwrap();
    let [prompt, negative] = &record.warnings[..] else { panic!("{:?}", record.warnings) };
    assert!(prompt.starts_with("the prompt has ") && prompt.ends_with("the first 255 are used"), "{prompt}");
    assert!(negative.starts_with("the negative prompt has "), "{negative}");
}

#[test]
fn a_render_stops_at_every_report_and_on_a_full_disk() {
    let engine = CpuEngine::new(1).unwrap();
    let pipeline = pipeline(&engine);
    let spec = spec(&pipeline, "a red ball");
    for stop_at in [(Stage::Text, 0), (Stage::Denoise, 0), (Stage::Denoise, 2), (Stage::Decode, 0), (Stage::Decode, 7)]
    {
        let mut record = Record { stop_at: Some(stop_at), ..Record::default() };
        let result = pipeline.render(&engine, &solo(), &spec, &Start::Seed, &mut record);
        assert!(matches!(result, Err(ModelError::Stopped)), "{stop_at:?}");
        let (stage, done, _) = *record.progress.last().unwrap();
        assert_eq!((stage, done), stop_at);
    }
    let mut record = Record { full: true, ..Record::default() };
    assert!(matches!(pipeline.render(&engine, &solo(), &spec, &Start::Seed, &mut record), Err(ModelError::Output(_))));
    let start = Start::Noise(vec![0.0; 5]);
    let error = pipeline.denoise(&engine, &solo(), &spec, &start, &mut Record::default()).err().unwrap().to_string();
    assert!(error.contains("start with 5 values"), "{error}");
}

#[test]
fn a_denoise_is_handed_over_between_two_steps_and_taken_up_with_the_same_bits() {
    let engine = CpuEngine::new(1).unwrap();
    let pipeline = pipeline(&engine);
    let spec = spec(&pipeline, "a red ball");
    let whole = pipeline.denoise(&engine, &solo(), &spec, &Start::Seed, &mut Record::default()).unwrap();
    for at in 0..3 {
        let mut record = Record { hand_over_after: Some(at), ..Record::default() };
        let result = pipeline.denoise(&engine, &solo(), &spec, &Start::Seed, &mut record);
        assert!(matches!(result, Err(ModelError::HandedOver { step }) if step == at as u32));
        let steps: Vec<u32> = record.checkpoints.iter().map(|checkpoint| checkpoint.step).collect();
        // Nothing is there before the first step that anybody could not make again.
        let expected = if at == 0 { vec![] } else { vec![at as u32] };
        assert_eq!(steps, expected);
        if let Some(checkpoint) = record.checkpoints.pop() {
            let start = Start::Checkpoint(checkpoint);
            let rest = pipeline.denoise(&engine, &solo(), &spec, &start, &mut Record::default()).unwrap();
            assert_eq!(rest.values, whole.values);
        }
    }
    // Past the last step nobody is asked.
    let mut record = Record { hand_over_after: Some(3), ..Record::default() };
    assert!(pipeline.denoise(&engine, &solo(), &spec, &Start::Seed, &mut record).is_ok());
}
