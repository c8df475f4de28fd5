//! A clip rendered by a group is the clip of one rank: to the bit without a ring, close to it with one.
#![cfg(feature = "model")]

mod ranks;

use std::collections::HashMap;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use farm_core::engine::cpu::CpuEngine;
use farm_core::engine::streaming::Streaming;
use farm_core::engine::{Engine, RawDtype, RawTensor};
use farm_core::job::spec::{GuidanceScale, RenderRequest, RenderSpec};
use farm_core::job::state::{Progress, Stage};
use farm_core::model::ModelError;
use farm_core::model::config::DitConfig;
use farm_core::model::dit::Dit;
use farm_core::model::latent::LatentCheckpoint;
use farm_core::model::noise::normals;
use farm_core::model::pipeline::{Pipeline, RenderObserver, Residency, Start};
use farm_core::model::sampler::Sampler;
use farm_core::model::schedule::SigmaSchedule;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::model::weights::{Loader, StoredTensor, Values, WeightError, WeightSource};
use farm_core::parallel::group::RankGroup;
use farm_core::parallel::topology::Topology;
use sha2::{Digest, Sha256};

use crate::ranks::{on_ranks, topologies};

// ---- the transformer, random weights ----

/// Random weights of a small transformer.
struct RandomWeights(HashMap<String, (Vec<usize>, Vec<u8>)>);

impl RandomWeights {
    fn new(c: &DitConfig) -> Self {
        let (d, dy, text) = (c.hidden_x, c.hidden_y, c.text_dim);
        let mut shapes = vec![
            ("x_embedder.proj.weight".to_owned(), vec![d, c.in_channels, 2, 2]),
            ("x_embedder.proj.bias".into(), vec![d]),
            ("pos_frequencies".into(), vec![3, c.num_heads, c.head_dim / 2]),
        ];
        let mut linear = |name: &str, out: usize, input: usize, bias: bool| {
            shapes.push((format!("{name}.weight"), vec![out, input]));
            shapes.extend(bias.then(|| (format!("{name}.bias"), vec![out])));
        };
        linear("t_embedder.mlp.0", d, c.time_dim, true);
        linear("t_embedder.mlp.2", d, d, true);
        linear("t5_y_embedder.to_kv", 2 * text, text, true);
        linear("t5_y_embedder.to_q", text, text, true);
        linear("t5_y_embedder.to_out", d, text, true);
        linear("t5_yproj", dy, text, true);
        linear("final_layer.mod", 2 * d, d, true);
        linear("final_layer.linear", 4 * c.in_channels, d, true);
        for i in 0..c.num_layers {
            let last = i + 1 == c.num_layers;
            let block = |part: &str| format!("blocks.{i}.{part}");
            linear(&block("mod_x"), 4 * d, d, true);
            linear(&block("mod_y"), if last { dy } else { 4 * dy }, d, true);
            linear(&block("attn.qkv_x"), 3 * d, d, false);
            linear(&block("attn.qkv_y"), 3 * d, dy, false);
            linear(&block("attn.proj_x"), d, d, true);
            linear(&block("mlp_x.w1"), 2 * c.ffn_x, d, false);
            linear(&block("mlp_x.w2"), d, c.ffn_x, false);
            if !last {
                linear(&block("attn.proj_y"), dy, d, true);
                linear(&block("mlp_y.w1"), 2 * c.ffn_y, dy, false);
                linear(&block("mlp_y.w2"), dy, c.ffn_y, false);
            }
        }
        for (i, norm) in
            (0..c.num_layers).flat_map(|i| ["q_norm_x", "k_norm_x", "q_norm_y", "k_norm_y"].map(|n| (i, n)))
        {
            shapes.push((format!("blocks.{i}.attn.{norm}.weight"), vec![c.head_dim]));
        }
        let weights = shapes.into_iter().enumerate().map(|(seed, (name, shape))| {
            let fan_in = shape.iter().skip(1).product::<usize>().max(1);
            let values = normals(seed as u64, 0..shape.iter().product::<usize>() as u64);
            let scale = 1.0 / (fan_in as f32).sqrt();
            let bytes = values.iter().flat_map(|x| (x * scale).to_le_bytes()).collect();
            (name, (shape, bytes))
        });
        Self(weights.collect())
    }
}

impl WeightSource for RandomWeights {
    fn get(&self, name: &str) -> Result<StoredTensor<'_>, WeightError> {
        let (shape, bytes) = self.0.get(name).ok_or_else(|| WeightError::Missing { name: name.into() })?;
        let raw = RawTensor { dtype: RawDtype::F32, shape, bytes };
        Ok(StoredTensor { shape: shape.clone(), values: Values::Pieces(vec![raw]) })
    }
}

struct Sample {
    engine: CpuEngine,
    weights: RandomWeights,
    config: DitConfig,
    /// Latent `[12, T, h, w]`.
    latent: [usize; 4],
    features: Vec<f32>,
    text: usize,
}

impl Sample {
    fn new(heads: usize, latent: [usize; 4], text: usize) -> Self {
        let config = DitConfig {
            num_layers: 2,
            num_heads: heads,
            head_dim: 8,
            hidden_x: 8 * heads,
            hidden_y: 16,
            ffn_x: 24,
            ffn_y: 20,
            in_channels: 12,
            text_dim: 16,
            time_dim: 8,
            pool_heads: 2,
        };
        let weights = RandomWeights::new(&config);
        let features = normals(77, 0..(text * config.text_dim) as u64);
        Self { engine: CpuEngine::new(1).unwrap(), weights, config, latent, features, text }
    }

    fn loader(&self) -> Loader<'_, CpuEngine> {
        Loader { engine: &self.engine, source: &self.weights }
    }

    fn whole(&self) -> Dit<CpuEngine> {
        Dit::load(&self.loader(), &self.config).unwrap()
    }

    /// Two guided steps: the latent, the same on every rank.
    fn over(&self, topology: Topology, dit: &(dyn Fn(&RankGroup<CpuEngine>) -> Dit<CpuEngine> + Sync)) -> Vec<f32> {
        let schedule = SigmaSchedule::linear_quadratic(2, 0.3, None).unwrap();
        let noise = normals(5, 0..self.latent.iter().product::<usize>() as u64);
        let latents = on_ranks(topology, |group: &RankGroup<CpuEngine>| {
            let e = &self.engine;
            let dit = dit(group);
            let features =
                (self.text > 0).then(|| e.upload(&self.features, &[self.text, self.config.text_dim]).unwrap());
            let geometry = dit.geometry(e, group, self.latent).unwrap();
            let sampler = Sampler {
                dit: &dit,
                geometry: &geometry,
                cond: &dit.text_conditioning(e, group, features.as_ref()).unwrap(),
                uncond: &dit.text_conditioning(e, group, None).unwrap(),
                schedule: &schedule,
                guidance: &GuidanceScale::Constant(3.0),
                group,
            };
            let noise = e.upload(&noise, &self.latent).unwrap();
            let latent = sampler.run(e, &noise, 0, &mut |_, _, _| ControlFlow::Continue(())).unwrap();
            e.download(&latent).unwrap()
        });
        assert!(latents.iter().all(|latent| *latent == latents[0]), "{topology}: ranks differ");
        latents.into_iter().next().unwrap()
    }
}

#[track_caller]
fn assert_close(got: &[f32], expected: &[f32], tolerance: f32, case: &str) {
    let worst = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(got.len() == expected.len() && worst <= tolerance, "{case}: {worst}");
}

#[test]
fn the_transformer_over_every_topology_equals_one_rank() {
    // 105, 97 and 13 tokens.
    for latent in [[12, 3, 10, 14], [12, 1, 2, 194], [12, 1, 26, 2]] {
        for heads in [6, 5, 12] {
            for text in [0, 1, 17] {
                let sample = Sample::new(heads, latent, text);
                let tokens = latent[1] * latent[2] * latent[3] / 4;
                let expected = sample.over(Topology::SOLO, &|_| sample.whole());
                for topology in topologies(12, heads, tokens) {
                    let got = sample.over(topology, &|_| sample.whole());
                    let case = format!("{topology}, {tokens} tokens, {heads} heads, {text} text rows");
                    assert_close(&got, &expected, 1e-4, &case);
                    assert!(topology.ring() > 1 || got == expected, "{case}: bits");
                }
            }
        }
    }
}

#[test]
fn sharded_weights_change_no_bit() {
    let sample = Sample::new(6, [12, 3, 10, 14], 17);
    for (cfg, ring, ulysses) in [(1, 1, 1), (1, 1, 3), (2, 1, 2), (2, 2, 1), (1, 1, 5)] {
        let topology = Topology::new(cfg, ring, ulysses).unwrap();
        let whole = sample.over(topology, &|_| sample.whole());
        let sharded =
            sample.over(topology, &|group| Dit::load_sharded(&sample.loader(), &sample.config, group).unwrap());
        assert!(whole == sharded, "{topology}");
    }
}

// ---- whole clips, the bundled checkpoint ----

/// Keeps the frames' hash and the latent, and takes a checkpoint if asked to.
#[derive(Default)]
struct Record {
    frames: Sha256,
    latent: Vec<f32>,
    checkpoint_at: Option<u32>,
    checkpoint: Option<LatentCheckpoint>,
    fail_at: Option<u32>,
    steps: Vec<u32>,
}

impl RenderObserver for Record {
    fn progress(&mut self, progress: Progress) -> ControlFlow<()> {
        if progress.stage == Stage::Denoise {
            self.steps.push(progress.done);
            if self.fail_at == Some(progress.done) {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    fn warning(&mut self, message: &str) {
        panic!("{message}");
    }

    fn wants_checkpoint(&mut self, step: u32, _steps: u32) -> bool {
        self.checkpoint_at == Some(step)
    }

    fn checkpoint(&mut self, checkpoint: LatentCheckpoint) {
        self.checkpoint = Some(checkpoint);
    }

    fn latent(&mut self, values: &[f32], _shape: [usize; 4]) -> io::Result<()> {
        self.latent = values.to_vec();
        Ok(())
    }

    fn frames(&mut self, rgb24: &[u8], _count: usize) -> io::Result<()> {
        self.frames.update(rgb24);
        Ok(())
    }
}

/// sha-256 of the raw frames.
fn hash(record: &Record) -> String {
    format!("{:x}", record.frames.clone().finalize())
}

struct Clip {
    engine: CpuEngine,
    pipeline: Pipeline<CpuEngine>,
    spec: RenderSpec,
}

impl Clip {
    fn new(width: u32, height: u32, residency: Residency) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/mochi-tiny");
        let engine = CpuEngine::new(1).unwrap();
        let pipeline = Pipeline::open(&engine, Checkpoint::open(&dir).unwrap(), residency).unwrap();
        let request = format!(
            r#"{{"prompt": "a red ball moving left on a black background", "negative_prompt": "blue",
                "width": {width}, "height": {height}, "num_frames": 13, "num_inference_steps": 4}}"#
        );
        let request: RenderRequest = serde_json::from_str(&request).unwrap();
        let spec = RenderSpec::resolve(&request, pipeline.defaults(), 11).unwrap();
        Self { engine, pipeline, spec }
    }

    /// Renders over a group; the leader's record and what every rank said.
    fn over(
        &self,
        topology: Topology,
        start: &Start,
        record: &(dyn Fn(usize) -> Record + Sync),
    ) -> (Record, Vec<Result<(), ModelError>>) {
        let mut ranks = on_ranks(topology, |group: &RankGroup<CpuEngine>| {
            let mut record = record(group.rank());
            let done = if group.is_leader() {
                self.pipeline.render(&self.engine, group, &self.spec, start, &mut record).map(drop)
            } else {
                self.pipeline.denoise(&self.engine, group, &self.spec, &Start::Seed, &mut record).map(drop)
            };
            (record, done)
        });
        let leader = std::mem::take(&mut ranks[0].0);
        (leader, ranks.into_iter().map(|(_, done)| done).collect())
    }

    fn whole(&self, topology: Topology, start: &Start) -> Record {
        let (record, done) = self.over(topology, start, &|_| Record::default());
        done.into_iter().for_each(|done| done.unwrap());
        record
    }
}

#[test]
fn a_clip_has_the_same_frames_on_every_group_without_a_ring() {
    // 36 and 30 tokens, 12 heads, two texts of different lengths.
    for (width, height) in [(64, 48), (32, 80)] {
        let clip = Clip::new(width, height, Residency::Kept);
        let expected = hash(&clip.whole(Topology::SOLO, &Start::Seed));
        let mut seen = 0;
        for cfg in [1, 2] {
            for ulysses in [1, 2, 3, 4, 5, 7, 8, 11, 12] {
                let topology = Topology::new(cfg, 1, ulysses).unwrap();
                assert_eq!(hash(&clip.whole(topology, &Start::Seed)), expected, "{topology}");
                seen += 1;
            }
        }
        assert!(seen >= 10);
    }
}

#[test]
fn a_ring_changes_the_latent_by_rounding_only() {
    let clip = Clip::new(64, 48, Residency::Kept);
    let expected = clip.whole(Topology::SOLO, &Start::Seed).latent;
    for topology in topologies(8, 12, 36).into_iter().filter(|topology| topology.ring() > 1) {
        assert_close(&clip.whole(topology, &Start::Seed).latent, &expected, 1e-4, &topology.to_string());
    }
}

#[test]
fn weights_that_come_and_go_or_are_dealt_out_change_no_frame() {
    let expected = hash(&Clip::new(32, 80, Residency::Kept).whole(Topology::SOLO, &Start::Seed));
    let topology = Topology::new(2, 1, 3).unwrap();
    let streamed = |resident, slots| Residency::Streamed(Streaming { resident, slots });
    for residency in [Residency::WhileUsed, Residency::Sharded, streamed(0, 2), streamed(1, 3)] {
        let clip = Clip::new(32, 80, residency);
        // Twice: what was released is loaded again.
        for _ in 0..2 {
            assert_eq!(hash(&clip.whole(topology, &Start::Seed)), expected, "{residency:?}");
        }
    }
}

#[test]
fn a_clip_goes_on_from_a_checkpoint_on_another_group() {
    let clip = Clip::new(64, 48, Residency::Kept);
    let expected = clip.whole(Topology::SOLO, &Start::Seed);
    let first = Topology::new(2, 1, 5).unwrap();
    let (record, _) = clip.over(first, &Start::Seed, &|_| Record { checkpoint_at: Some(3), ..Record::default() });
    let bytes = record.checkpoint.unwrap().to_bytes(&clip.spec, "hash").unwrap();
    let checkpoint = LatentCheckpoint::from_bytes(&bytes, &clip.spec, "hash").unwrap();
    assert_eq!(checkpoint.step, 3);
    for topology in [Topology::SOLO, Topology::new(1, 1, 7).unwrap()] {
        let resumed = clip.whole(topology, &Start::Checkpoint(checkpoint.clone()));
        assert_eq!(resumed.steps, [3, 4], "{topology}: only the rest is computed");
        assert_eq!(hash(&resumed), hash(&expected), "{topology}");
    }
    let wrong = LatentCheckpoint { step: 9, ..checkpoint };
    let (_, done) = clip.over(Topology::SOLO, &Start::Checkpoint(wrong), &|_| Record::default());
    assert!(done[0].as_ref().unwrap_err().to_string().contains("before step 9"));
}

#[test]
fn a_rank_that_stops_ends_the_others_and_is_named() {
    let clip = Clip::new(64, 48, Residency::Kept);
    let topology = Topology::new(2, 1, 2).unwrap();
    for stops in 0..4 {
        let record = |rank| Record { fail_at: (rank == stops).then_some(2), ..Record::default() };
        let (_, done) = clip.over(topology, &Start::Seed, &record);
        for (rank, done) in done.into_iter().enumerate() {
            match done {
                Err(ModelError::Stopped) => assert_eq!(rank, stops),
                Err(ModelError::Comm(error)) => assert_eq!(error.rank(), Some(stops), "{error}"),
                other => panic!("rank {rank}: {:?}", other.err().map(|error| error.to_string())),
            }
        }
        // The engine and the weights are as good as before.
        clip.whole(topology, &Start::Seed);
    }
}

#[test]
fn a_group_that_does_not_fit_the_clip_is_refused_on_every_rank() {
    let clip = Clip::new(16, 16, Residency::WhileUsed);
    // One token in each of three latent frames.
    let (_, done) = clip.over(Topology::new(1, 4, 1).unwrap(), &Start::Seed, &|_| Record::default());
    for done in done {
        let error = done.unwrap_err().to_string();
        assert!(error.contains("4 sequence ranks share 3 tokens"), "{error}");
    }
}
