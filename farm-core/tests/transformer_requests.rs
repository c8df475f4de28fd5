//! What the text encoder, the transformer and the sampler make of requests: refusals, stopping, threads.
#![cfg(feature = "model")]

use std::ops::ControlFlow;
use std::path::Path;

use farm_core::engine::Engine;
use farm_core::engine::cpu::CpuEngine;
use farm_core::job::spec::GuidanceScale;
use farm_core::model::ModelError;
use farm_core::model::dit::{Dit, TextConditioning};
use farm_core::model::noise::normals;
use farm_core::model::sampler::Sampler;
use farm_core::model::schedule::SigmaSchedule;
use farm_core::model::t5::T5Encoder;
use farm_core::model::weights::Loader;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::group::RankGroup;

const SHAPE: [usize; 4] = [12, 2, 6, 10];

struct Model {
    engine: CpuEngine,
    t5: T5Encoder<CpuEngine>,
    dit: Dit<CpuEngine>,
    vocab: u32,
    solo: RankGroup<CpuEngine>,
}

impl Model {
    fn open(threads: usize) -> Model {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/small");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let engine = CpuEngine::new(threads).unwrap();
        let (t5, dit) = (checkpoint.t5().unwrap(), checkpoint.dit().unwrap());
        Model {
            t5: T5Encoder::load(&engine, t5.clone(), t5.config()).unwrap(),
            dit: Dit::load(&Loader { engine: &engine, source: dit }, dit.config()).unwrap(),
            vocab: t5.config().vocab_size as u32,
            engine,
            solo: RankGroup::solo().unwrap(),
        }
    }

    fn text(&self, ids: &[u32]) -> TextConditioning<CpuEngine> {
        let features = self.t5.encode(&self.engine, ids).unwrap();
        self.dit.text_conditioning(&self.engine, &self.solo, Some(&features)).unwrap()
    }

    /// Four steps of one prompt against another.
    fn sample(
        &self,
        guidance: &GuidanceScale,
        on_step: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<f32>, ModelError> {
        let sampler = Sampler {
            dit: &self.dit,
            geometry: &self.dit.geometry(&self.engine, &self.solo, SHAPE)?,
            cond: &self.text(&[5, 9, 33, 1]),
            uncond: &self.text(&[7, 1]),
            schedule: &SigmaSchedule::linear_quadratic(4, 0.025, None)?,
            guidance,
            group: &self.solo,
        };
        let count = SHAPE.iter().product::<usize>() as u64;
        let noise = self.engine.upload(&normals(1, 0..count), &SHAPE)?;
        let latent = sampler.run(&self.engine, &noise, 0, &mut |done, total, _| on_step(done, total))?;
        Ok(self.engine.download(&latent)?)
    }
}

#[track_caller]
fn refused<T>(result: Result<T, ModelError>, part: &str) {
    match result {
        Err(ModelError::Input(message)) => assert!(message.contains(part), "{message}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted, expected: {part}"),
    }
}

#[test]
fn a_latent_has_the_same_bits_for_any_number_of_threads() {
    let latent = |threads| -> Vec<u32> {
        let latent = Model::open(threads).sample(&GuidanceScale::Constant(4.5), &mut |_, _| ControlFlow::Continue(()));
        latent.unwrap().into_iter().map(f32::to_bits).collect()
    };
    let one = latent(1);
    assert!(one == latent(2));
    assert!(one == latent(3));
}

#[test]
fn sampling_stops_when_told_and_reports_every_step() {
    let model = Model::open(1);
    let guidance = GuidanceScale::PerStep(vec![1.0, 2.0, 3.0, 4.0]);
    let mut seen = Vec::new();
    let mut keep = |done, total| {
        seen.push((done, total));
        ControlFlow::Continue(())
    };
    model.sample(&guidance, &mut keep).unwrap();
    assert_eq!(seen, [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]);
    for last in [0, 2, 4] {
        let mut seen = 0;
        let mut stop = |done, _| {
            seen = done;
            if done == last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        assert!(matches!(model.sample(&guidance, &mut stop), Err(ModelError::Stopped)));
        assert_eq!(seen, last);
    }
}

#[test]
fn every_value_of_a_guidance_list_counts_and_its_length_is_checked() {
    let model = Model::open(1);
    let sample =
        |list: &[f64]| model.sample(&GuidanceScale::PerStep(list.to_vec()), &mut |_, _| ControlFlow::Continue(()));
    let base = sample(&[4.0; 4]).unwrap();
    for step in 0..4 {
        let mut list = [4.0; 4];
        list[step] = 1.0;
        assert_ne!(sample(&list).unwrap(), base, "step {step}");
    }
    refused(sample(&[4.0; 3]), "3 values for 4 steps");
}

#[test]
fn prompts_and_latents_that_do_not_fit_the_checkpoint_are_refused() {
    let model = Model::open(1);
    let e = &model.engine;
    refused(model.t5.encode(e, &[]), "without any token");
    refused(model.t5.encode(e, &[1, model.vocab]), "vocabulary");
    for shape in [[11, 2, 6, 10], [12, 0, 6, 10], [12, 2, 5, 10], [12, 2, 6, 0]] {
        refused(model.dit.geometry(e, &model.solo, shape), "latent has shape");
    }
    for shape in [[0, 64], [3, 63]] {
        let features = e.upload(&vec![0.0; shape[0] * shape[1]], &shape).unwrap();
        refused(model.dit.text_conditioning(e, &model.solo, Some(&features)), "text features");
    }
    let geometry = model.dit.geometry(e, &model.solo, SHAPE).unwrap();
    let other = e.upload(&vec![0.0; 12 * 2 * 6 * 8], &[12, 2, 6, 8]).unwrap();
    refused(model.dit.velocities(e, &model.solo, &geometry, &other, 0.0, &[&model.text(&[1])]), "expected");
}

#[test]
fn a_branch_has_the_same_bits_alone_and_beside_another() {
    let model = Model::open(2);
    let e = &model.engine;
    let geometry = model.dit.geometry(e, &model.solo, SHAPE).unwrap();
    let z = e.upload(&normals(3, 0..SHAPE.iter().product::<usize>() as u64), &SHAPE).unwrap();
    let (cond, uncond) = (model.text(&[5, 9, 1]), model.dit.text_conditioning(e, &model.solo, None).unwrap());
    let of = |branches: &[_]| -> Vec<Vec<f32>> {
        let velocities = model.dit.velocities(e, &model.solo, &geometry, &z, 500.0, branches).unwrap();
        velocities.iter().map(|v| e.download(v).unwrap()).collect()
    };
    assert!(of(&[&cond, &uncond]) == [of(&[&cond]), of(&[&uncond])].concat());
}
