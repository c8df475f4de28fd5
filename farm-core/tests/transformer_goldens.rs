//! The text encoder, the transformer and the sampler against what PyTorch computes for the same weights and inputs
//! (`tests/goldens`). Rule: max|a − b| ≤ tolerance · max(1, max|b|).
#![cfg(feature = "model")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use farm_core::engine::cpu::CpuEngine;
use farm_core::engine::{Engine, SequenceOps};
use farm_core::job::spec::GuidanceScale;
use farm_core::model::dit::{Dit, TextConditioning};
use farm_core::model::sampler::Sampler;
use farm_core::model::schedule::SigmaSchedule;
use farm_core::model::t5::T5Encoder;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::model::weights::{Loader, Tensors};
use farm_core::parallel::group::RankGroup;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

const T5: f64 = 3e-5;
const DIT: f64 = 1e-4;
const SAMPLER: f64 = 1e-4;

type Tensor = <CpuEngine as SequenceOps>::Tensor;

/// A golden file; masks and ids become f32, which holds them exactly.
struct Goldens(BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl Goldens {
    fn read(path: &Path) -> Goldens {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let widen = |view: &TensorView<'_>| -> Vec<f32> {
            let data = view.data();
            match view.dtype() {
                Dtype::F32 => data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
                Dtype::I64 => data.chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect(),
                Dtype::U8 => data.iter().map(|&b| f32::from(b)).collect(),
                other => panic!("golden of type {other:?}"),
            }
        };
        Goldens(file.tensors().into_iter().map(|(name, v)| (name, (v.shape().to_vec(), widen(&v)))).collect())
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn values(&self, name: &str) -> &[f32] {
        &self.0[name].1
    }

    fn shape(&self, name: &str) -> &[usize] {
        &self.0[name].0
    }

    /// Sample `i` of a batch. `patch_embed` is a batch of frames, so samples are counted by those of the input.
    fn sample(&self, name: &str, i: usize, samples: usize) -> &[f32] {
        let values = self.values(name);
        &values[i * values.len() / samples..(i + 1) * values.len() / samples]
    }

    /// Number of valid tokens of row `i` of a mask.
    fn tokens(&self, name: &str, i: usize) -> usize {
        let row = self.shape(name)[1];
        self.values(name)[i * row..][..row].iter().filter(|m| **m != 0.0).count()
    }

    /// The first `tokens` rows of sample `i` of `dit.text`.
    fn text(&self, i: usize, tokens: usize) -> (&[f32], [usize; 2]) {
        let [samples, _, width] = self.shape("dit.text")[..] else { panic!("dit.text is not a batch of rows") };
        (&self.sample("dit.text", i, samples)[..tokens * width], [tokens, width])
    }
}

/// `expected` may have padded rows behind those of `got`.
#[track_caller]
fn check(what: &str, got: &[f32], expected: &[f32], tolerance: f64) {
    let expected = &expected[..got.len()];
    let worst = got.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    let scale = expected.iter().map(|b| f64::from(b.abs())).fold(1.0, f64::max);
    println!("{what:50} {worst:.2e} of {:.2e} ({:.1} %)", tolerance * scale, 100.0 * worst / (tolerance * scale));
    assert!(!got.iter().any(|x| x.is_nan()), "{what} has NaN");
    assert!(worst <= tolerance * scale, "{what}: differs by {worst:.3e}, allowed {:.3e}", tolerance * scale);
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn open(folder: &str) -> Checkpoint {
    Checkpoint::open(&repository().join(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"))
}

fn goldens(name: &str) -> Goldens {
    Goldens::read(&repository().join("tests/goldens").join(name).join("goldens.safetensors"))
}

fn engine() -> CpuEngine {
    CpuEngine::new(2).unwrap()
}

fn load_dit(engine: &CpuEngine, checkpoint: &Checkpoint) -> Dit<CpuEngine> {
    let part = checkpoint.dit().unwrap();
    Dit::load(&Loader { engine, source: part }, part.config()).unwrap()
}

fn conditioning(
    engine: &CpuEngine,
    dit: &Dit<CpuEngine>,
    (features, shape): (&[f32], [usize; 2]),
) -> TextConditioning<CpuEngine> {
    let features = (shape[0] > 0).then(|| engine.upload(features, &shape).unwrap());
    dit.text_conditioning(engine, &RankGroup::solo().unwrap(), features.as_ref()).unwrap()
}

fn check_text_encoder(folder: &str, goldens: &Goldens) {
    let engine = engine();
    let checkpoint = open(folder);
    let part = checkpoint.t5().unwrap();
    let encoder = T5Encoder::load(&engine, part.clone(), part.config()).unwrap();
    let samples = goldens.shape("t5.ids")[0];
    for i in 0..samples {
        let tokens = goldens.tokens("t5.mask", i);
        let ids: Vec<u32> = goldens.sample("t5.ids", i, samples)[..tokens].iter().map(|id| *id as u32).collect();
        let mut seen = 0;
        encoder
            .encode_observed(&engine, &ids, &mut |name, x| {
                let name = format!("t5.{name}");
                if goldens.has(&name) {
                    seen += 1;
                    let got = engine.download(x).unwrap();
                    check(&format!("{folder} sample {i} {name}"), &got, goldens.sample(&name, i, samples), T5);
                }
            })
            .unwrap();
        assert!(seen > 0);
    }
}

/// Every sample of the batch alone, every value that both sides name.
fn check_transformer(folder: &str, goldens: &Goldens) {
    let engine = engine();
    let dit = load_dit(&engine, &open(folder));
    let [samples, c, t, h, w] = goldens.shape("dit.in")[..] else { panic!("dit.in is not a batch of latents") };
    let geometry = dit.geometry(&engine, &RankGroup::solo().unwrap(), [c, t, h, w]).unwrap();
    let mut lengths = Vec::new();
    for i in 0..samples {
        let tokens = goldens.tokens("dit.mask", i);
        lengths.push(tokens);
        let branch = conditioning(&engine, &dit, goldens.text(i, tokens));
        let latent = engine.upload(goldens.sample("dit.in", i, samples), &[c, t, h, w]).unwrap();
        let mut observe = |name: &str, x: &Tensor| {
            let name = format!("dit.{name}");
            if goldens.has(&name) {
                let got = engine.download(x).unwrap();
                check(&format!("{folder} sample {i} {name}"), &got, goldens.sample(&name, i, samples), DIT);
            }
        };
        let timestep = goldens.values("dit.t")[i];
        let out = dit.velocity_observed(&engine, &geometry, &latent, timestep, &branch, &mut observe).unwrap();
        let got = engine.download(&out).unwrap();
        check(&format!("{folder} sample {i} dit.out"), &got, goldens.sample("dit.out", i, samples), DIT);
    }
    assert!(lengths.contains(&0), "no sample without text among {lengths:?}");
}

fn check_rope(folder: &str, goldens: &Goldens) {
    let engine = engine();
    let checkpoint = open(folder);
    let part = checkpoint.dit().unwrap();
    let loader = Loader { engine: &engine, source: part };
    let shape = [3, part.config().num_heads, part.config().head_dim / 2];
    let frequencies = loader.tensor("pos_frequencies", &shape).unwrap();
    let [_, _, t, h, w] = goldens.shape("dit.in")[..] else { panic!("dit.in is not a batch of latents") };
    let table = engine.rope_table(&frequencies, [t, h / 2, w / 2], 0..t * h * w / 4).unwrap();
    check(&format!("{folder} rope.cos"), &engine.download(&table.cos).unwrap(), goldens.values("rope.cos"), DIT);
    check(&format!("{folder} rope.sin"), &engine.download(&table.sin).unwrap(), goldens.values("rope.sin"), DIT);
}

/// The guided loop: prompt of `dit.text` row `prompt`, no negative prompt, guidance 4.5.
fn check_sampler(folder: &str, goldens: &Goldens, prompt: usize) {
    let engine = engine();
    let dit = load_dit(&engine, &open(folder));
    let steps = goldens.shape("sched.timesteps")[0];
    let schedule = SigmaSchedule::linear_quadratic(steps, 0.025, None).unwrap();
    // The golden's sigmas count from data to noise.
    let rising: Vec<f32> = schedule.sigmas().iter().map(|sigma| (1.0 - sigma) as f32).collect();
    check(&format!("{folder} sched.sigmas"), &rising, goldens.values("sched.sigmas"), 1e-6);
    let timesteps: Vec<f32> = (0..steps).map(|step| schedule.timestep(step)).collect();
    check(&format!("{folder} sched.timesteps"), &timesteps, goldens.values("sched.timesteps"), 1e-6);

    let shape: [usize; 4] = goldens.shape("sample.noise")[1..].try_into().unwrap();
    let noise = engine.upload(goldens.values("sample.noise"), &shape).unwrap();
    let tokens = goldens.tokens("dit.mask", prompt);
    let cond = conditioning(&engine, &dit, goldens.text(prompt, tokens));
    let solo = RankGroup::solo().unwrap();
    let uncond = dit.text_conditioning(&engine, &solo, None).unwrap();
    let geometry = dit.geometry(&engine, &solo, shape).unwrap();
    let run = |guidance: &GuidanceScale| {
        let sampler = Sampler {
            dit: &dit,
            geometry: &geometry,
            cond: &cond,
            uncond: &uncond,
            schedule: &schedule,
            guidance,
            group: &solo,
        };
        let mut latents = Vec::new();
        let mut observe = |done: usize, total: usize, z: &Tensor| {
            assert_eq!((done, total), (latents.len(), steps));
            latents.push(engine.download(z).unwrap());
            ControlFlow::Continue(())
        };
        let last = sampler.run(&engine, &noise, 0, &mut observe).unwrap();
        assert_eq!(latents.last(), Some(&engine.download(&last).unwrap()));
        latents
    };
    let latents = run(&GuidanceScale::Constant(4.5));
    assert_eq!(latents.len(), steps + 1);
    for (step, z) in latents.iter().skip(1).enumerate() {
        check(&format!("{folder} sample.z{step}"), z, goldens.values(&format!("sample.z{step}")), SAMPLER);
    }
    assert!(latents == run(&GuidanceScale::PerStep(vec![4.5; steps])), "{folder}: a list is not its number");
}

#[test]
fn text_encoder_is_the_reference() {
    check_text_encoder("tests/goldens/small", &goldens("small"));
    check_text_encoder("assets/mochi-tiny", &goldens("mochi-tiny"));
}

#[test]
fn transformer_is_the_reference_in_both_layouts() {
    for folder in ["tests/goldens/small", "tests/goldens/small/original"] {
        check_transformer(folder, &goldens("small"));
        check_rope(folder, &goldens("small"));
    }
}

#[test]
fn transformer_with_widened_bf16_weights_is_the_reference() {
    check_transformer("tests/goldens/small-bf16", &goldens("small-bf16"));
    check_transformer("assets/mochi-tiny", &goldens("mochi-tiny"));
    check_rope("assets/mochi-tiny", &goldens("mochi-tiny"));
}

#[test]
fn guided_sampling_is_the_reference_in_both_orders() {
    check_sampler("tests/goldens/small", &goldens("small"), 0);
    check_sampler("assets/mochi-tiny", &goldens("mochi-tiny"), 0);
}
