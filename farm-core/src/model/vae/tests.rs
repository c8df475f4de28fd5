use std::sync::Mutex;

use super::random::RandomWeights;
use super::*;
use crate::engine::cpu::CpuEngine;
use crate::model::weights::{StoredTensor, WeightError, WeightSource};

/// Two up stages, other expansions and other layer counts than the published decoder.
fn config() -> VaeConfig {
    VaeConfig {
        latent_channels: 3,
        channels: vec![64, 32, 32],
        layers: vec![1, 2, 1, 1],
        temporal_expansions: vec![2, 3],
        spatial_expansions: vec![2, 1],
        latents_mean: vec![0.0, 1.0, -1.0],
        latents_std: vec![1.0, 2.0, 0.5],
    }
}

fn decode(engine: &CpuEngine, decoder: &VaeDecoder<CpuEngine>, chunk: usize) -> (Vec<usize>, Vec<f32>) {
    let (frames, latents) = (5, (0..3 * 5 * 4 * 6).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>());
    let latent = DitLatent(engine.upload(&latents, &[3, frames, 4, 6]).unwrap());
    let latent = decoder.denormalize(engine, &latent).unwrap();
    let mut stream = decoder.stream();
    let (mut counts, mut values) = (Vec::new(), Vec::new());
    for start in (0..frames).step_by(chunk) {
        let part = VaeLatent(engine.narrow(&latent.0, 0, start, chunk.min(frames - start)).unwrap());
        let out = stream.push(engine, &part, &mut |_, _| ()).unwrap();
        assert_eq!(engine.shape(&out)[1..], [8, 12, 3]);
        counts.push(engine.shape(&out)[0]);
        values.extend(engine.download(&out).unwrap());
    }
    (counts, values)
}

#[test]
fn every_chunk_length_gives_the_frames_of_the_whole_decode() {
    let engine = CpuEngine::new(1).unwrap();
    let decoder = random::decoder(&engine, &config(), 1).unwrap();
    let (counts, whole) = decode(&engine, &decoder, 5);
    assert_eq!(counts, [6 * 4 + 1]);
    assert!(whole.iter().any(|v| v.abs() > 1e-3) && whole.iter().all(|v| v.is_finite()));
    for (chunk, expected) in [(1, vec![1, 6, 6, 6, 6]), (2, vec![7, 12, 6]), (3, vec![13, 12])] {
        let (counts, parts) = decode(&engine, &decoder, chunk);
        assert_eq!(counts, expected, "chunks of {chunk}");
        assert_eq!(parts, whole, "chunks of {chunk}");
    }
    for threads in [2, 3] {
        let engine = CpuEngine::new(threads).unwrap();
        assert_eq!(decode(&engine, &decoder, 2).1, whole, "{threads} threads");
    }
}

/// Remembers what it was asked for.
struct Asked(RandomWeights, Mutex<Vec<String>>);

impl WeightSource for Asked {
    fn get(&self, name: &str) -> Result<StoredTensor<'_>, WeightError> {
        self.1.lock().unwrap().push(name.into());
        self.0.get(name)
    }
}

#[test]
fn every_tensor_of_the_checkpoint_is_read_once() {
    let engine = CpuEngine::new(1).unwrap();
    let source = Asked(RandomWeights::new(&config(), 1), Mutex::default());
    let decoder = VaeDecoder::load(&Loader { engine: &engine, source: &source }, &config()).unwrap();
    let mut asked = source.1.lock().unwrap().clone();
    asked.sort();
    let mut all: Vec<_> = source.0.names().map(String::from).collect();
    all.sort();
    assert_eq!(asked, all);
    assert_eq!((decoder.norms(), decoder.spatial_factor()), (10, 2));
}

#[test]
fn a_config_that_does_not_fit_together_is_refused() {
    let engine = CpuEngine::new(1).unwrap();
    let source = RandomWeights::new(&config(), 1);
    let loader = Loader { engine: &engine, source: &source };
    let breaks: [fn(&mut VaeConfig); 6] = [
        |c| c.layers.truncate(3),
        |c| c.channels.clear(),
        |c| c.channels[1] = 48,
        |c| c.temporal_expansions[0] = 0,
        |c| c.spatial_expansions.push(2),
        |c| c.latents_std.truncate(2),
    ];
    for break_it in breaks {
        let mut config = config();
        break_it(&mut config);
        let error = VaeDecoder::load(&loader, &config).err().unwrap().to_string();
        assert!(error.contains("does not fit together"), "{error}");
    }
}
