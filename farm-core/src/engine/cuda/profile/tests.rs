use std::path::Path;

use super::*;
use crate::engine::cpu::CpuEngine;
use crate::engine::cuda::CudaEngine;
use crate::engine::cuda::ceiling::ceiling;
use crate::engine::cuda::emulation::Emulation;
use crate::engine::{Draw, Engine};
use crate::model::config::{DitConfig, T5Config, VaeConfig};
use crate::model::dit::Dit;
use crate::model::latent::DitLatent;
use crate::model::t5::T5Encoder;
use crate::model::vae::VaeDecoder;
use crate::model::weights::checkpoint::Checkpoint;
use crate::model::weights::drawn::DrawnWeights;
use crate::model::weights::{Loader, WeightSource};
use crate::parallel::cost::ModelShape;
use crate::parallel::group::RankGroup;
use crate::precision::Precision;

type Watched = CudaEngine<Profiled<Emulation>>;

fn engine(precision: Precision) -> Watched {
    CudaEngine::new(Arc::new(Profiled::new(Arc::new(Emulation::default()))), precision)
}

fn profile(engine: &Watched, work: impl FnOnce()) -> Profile {
    engine.device().begin().unwrap();
    work();
    engine.device().end().unwrap()
}

/// FLOPs of every product of a forward with so many visual and text rows, the text's conditioning included: those of the
/// cost model, and what that leaves out as small, single rows and the network's ends.
fn forward_flops(model: &ModelShape, time: usize, tokens: usize, text: usize) -> f64 {
    let (d, dy, f) = (model.hidden_x, model.hidden_y, model.text_dim);
    let blocks = (0..model.layers).map(|layer| {
        let last = layer + 1 == model.layers;
        let queries = if last { tokens } else { tokens + text };
        let modulated = 4 * d * d + if text == 0 { 0 } else { dy * d * if last { 1 } else { 4 } };
        model.linear_flops(layer, tokens, text)
            + model.attention_flops(queries, tokens + text, model.heads)
            + (2 * modulated) as f64
    });
    let patches = 2 * tokens * 4 * model.channels * d;
    // The pooled text: keys and values of all rows and the mean, one query, and the output; the null branch has the last.
    let pool = if text == 0 { 0 } else { 2 * (text + 1) * 2 * f * f + 2 * f * f + 4 * (text + 1) * f } + 2 * f * d;
    let around = 2 * patches + 2 * (time * d + d * d) + 2 * 2 * d * d + pool + 2 * text * f * dy;
    blocks.sum::<f64>() + around as f64
}

#[test]
fn the_flops_that_a_forward_states_are_those_of_the_cost_model() {
    let checkpoint = Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/mochi-tiny")).unwrap();
    let (part, group) = (checkpoint.dit().unwrap(), RankGroup::solo().unwrap());
    let shape = part.config().shape();
    for precision in [Precision::F32, Precision::Bf16] {
        let engine = engine(precision);
        let dit = Dit::load(&Loader { engine: &engine, source: part }, part.config()).unwrap();
        let size = [12, 2, 4, 6];
        let (latent, text) = (drawn(&engine, &size), drawn(&engine, &[5, shape.text_dim]));
        for text in [Some(&text), None] {
            let made = profile(&engine, || {
                let geometry = dit.geometry(&engine, &group, size).unwrap();
                let branch = dit.text_conditioning(&engine, &group, text).unwrap();
                dit.velocities(&engine, &group, &geometry, &latent, 500.0, &[&branch]).unwrap();
            });
            let stated: u64 = made.records.iter().map(|record| record.flops).sum();
            let expected = forward_flops(&shape, shape.time_dim, 12, if text.is_some() { 5 } else { 0 });
            assert_eq!(stated as f64, expected, "{precision}, text {}", text.is_some());
            assert!(made.records.iter().all(|record| record.bytes > 0), "{:?}", made.records);
            assert!(made.busy() <= made.wall, "{made:?}");
        }
    }
}

fn drawn<E: Engine>(engine: &E, shape: &[usize]) -> E::Tensor {
    engine.draw(Draw { key: 7, first: 0, mean: 0.0, spread: 1.0 }, shape).unwrap()
}

#[test]
fn only_what_is_asked_for_in_a_stage_is_in_its_profile() {
    let engine = engine(Precision::F32);
    let x = drawn(&engine, &[1000]);
    let made = profile(&engine, || {
        let y = engine.add(&x, &x).unwrap();
        drop(engine.add(&y, &x).unwrap());
        engine.download(&y).unwrap();
    });
    engine.add(&x, &x).unwrap();
    let names: Vec<_> = made.records.iter().map(|record| (record.action.to_string(), record.calls)).collect();
    assert_eq!(names, [("add_f32".into(), 2), ("copy from the device".into(), 1)]);
    assert_eq!((made.records[0].bytes, made.records[1].bytes), (2 * 12_000, 4000));
    assert_eq!(made.peak, 12_000, "x, y and the sum of both");
    assert!(profile(&engine, || ()).records.is_empty());
}

#[test]
fn times_are_read_of_more_launches_than_may_be_open() {
    let engine = engine(Precision::F32);
    let x = drawn(&engine, &[1]);
    let made = profile(&engine, || {
        for _ in 0..MOST_OPEN + 100 {
            engine.silu(&x).unwrap();
        }
        assert_eq!(engine.device().log().open.len(), MOST_OPEN);
    });
    assert_eq!(made.records[0].calls, MOST_OPEN as u64 + 100);
}

#[test]
fn a_network_of_drawn_weights_computes_the_same_on_every_engine_and_stays_finite() {
    let group = RankGroup::solo().unwrap();
    let dit = DitConfig {
        num_layers: 3,
        num_heads: 2,
        head_dim: 32,
        hidden_x: 64,
        hidden_y: 32,
        ffn_x: 96,
        ffn_y: 64,
        in_channels: 4,
        text_dim: 32,
        time_dim: 16,
        pool_heads: 4,
    };
    let t5 =
        T5Config { vocab_size: 50, d_model: 32, num_heads: 2, d_kv: 16, d_ff: 48, num_layers: 2, ..T5Config::mochi1() };
    let vae = VaeConfig {
        latent_channels: 4,
        channels: vec![64, 32, 32, 32],
        layers: vec![1; 5],
        latents_mean: vec![0.0; 4],
        latents_std: vec![1.0; 4],
        ..VaeConfig::mochi1()
    };
    fn run<E: Engine>(
        engine: &E,
        dit: &DitConfig,
        t5: &T5Config,
        vae: &VaeConfig,
        group: &RankGroup<E>,
    ) -> [Vec<f32>; 3] {
        let source: Arc<dyn WeightSource> = Arc::new(DrawnWeights::t5(t5, 1));
        let text = T5Encoder::open(engine, source, t5).unwrap().encode(engine, &[3, 49, 0, 7]).unwrap();
        let source = DrawnWeights::dit(dit, 1);
        let dit = Dit::load(&Loader { engine, source: &source }, dit).unwrap();
        let latent = drawn(engine, &[4, 2, 4, 4]);
        let geometry = dit.geometry(engine, group, [4, 2, 4, 4]).unwrap();
        let branch = dit.text_conditioning(engine, group, Some(&text)).unwrap();
        let velocity = dit.velocities(engine, group, &geometry, &latent, 500.0, &[&branch]).unwrap().remove(0);
        let source = DrawnWeights::vae(vae, 1);
        let decoder = VaeDecoder::load(&Loader { engine, source: &source }, vae).unwrap();
        let latent = decoder.denormalize(engine, &DitLatent(latent)).unwrap();
        let frames = decoder.stream().push(engine, &latent, &mut |_, _| ()).unwrap();
        [text, velocity, frames].map(|x| engine.download(&x).unwrap())
    }
    let ours = run(&engine(Precision::F32), &dit, &t5, &vae, &RankGroup::solo().unwrap());
    let expected = run(&CpuEngine::new(1).unwrap(), &dit, &t5, &vae, &group);
    for (ours, expected) in ours.iter().zip(&expected) {
        let size = expected.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let apart = ours.iter().zip(expected).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        // Values keep their size on the way through.
        let root_mean_square = size / (expected.len() as f64).sqrt();
        assert!((0.05..20.0).contains(&root_mean_square), "{root_mean_square}");
        assert!(apart < 1e-5 * size, "{apart} of {size}");
    }
}

#[test]
fn drawn_values_have_the_same_bits_on_every_engine_and_fill_their_range() {
    let draw = Draw { key: u64::MAX - 5, first: 1 << 40, mean: 0.25, spread: 3.0 };
    let ours = engine(Precision::F32);
    let ours = ours.download(&ours.draw(draw, &[70, 1000]).unwrap()).unwrap();
    let cpu = CpuEngine::new(1).unwrap();
    let expected = cpu.download(&cpu.draw(draw, &[70, 1000]).unwrap()).unwrap();
    assert!(ours.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()));
    let (least, most) = ours.iter().fold((f32::MAX, f32::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
    assert!((-2.75..-2.74).contains(&least) && (3.24..3.25).contains(&most), "{least} {most}");
    let mean = ours.iter().map(|x| f64::from(*x)).sum::<f64>() / 70_000.0;
    assert!((mean - 0.25).abs() < 0.03, "{mean}");
}

#[test]
fn a_ceiling_has_what_the_device_has() {
    let device = Arc::new(Emulation::default());
    let ceiling = ceiling(&device).unwrap();
    let kinds: Vec<_> = ceiling.products.iter().map(|rate| (rate.dtype, rate.vendor)).collect();
    assert_eq!(kinds, [(Dtype::Bf16, false), (Dtype::F32, false)], "the emulation has no vendor's library");
    assert!(ceiling.flops(Dtype::F32).is_some_and(|flops| flops > 1e3) && ceiling.copy > 1e6, "{ceiling:?}");
    assert_eq!(device.used(), 0);
}
