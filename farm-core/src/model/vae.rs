//! The VAE decoder: latents in, frames out, in pieces of any length.
//!
//! All mixing over time is in the causal convolutions, each of which looks back two frames; norms are per frame. So a
//! [`DecodeStream`] that keeps the last two input frames of every convolution gives, chunk by chunk, the frames of the
//! whole decode to the bit, and its memory does not grow with their number. The first chunk of `m` latents gives
//! `6(m − 1) + 1` frames, every later one `6m` (6 being the product of the temporal expansions): an up stage drops its first
//! `expansion − 1` frames, but of the clip, not of a chunk.

use crate::engine::{ConvCache, Engine, SequenceOps};
use crate::model::ModelError;
use crate::model::config::VaeConfig;
use crate::model::latent::{DitLatent, VaeLatent};
use crate::model::weights::{Loader, Tensors};

/// Groups of every group norm; part of the architecture, written in no config.
const NORM_GROUPS: usize = 32;

/// Weights of the decoder. Parts are named as in the original checkpoint.
pub struct VaeDecoder<E: Engine> {
    mean: Vec<f32>,
    std: Vec<f32>,
    conv_in: Pointwise<E>,
    block_in: Vec<ResBlock<E>>,
    up: Vec<UpStage<E>>,
    block_out: Vec<ResBlock<E>>,
    output_proj: Pointwise<E>,
}

/// A 1×1×1 convolution: a matrix product over the channels of every pixel.
struct Pointwise<E: Engine> {
    weight: E::Tensor,
    bias: E::Tensor,
}

/// `x + conv₂(silu(norm₂(conv₁(silu(norm₁(x))))))`
struct ResBlock<E: Engine> {
    norm1: Norm<E>,
    conv1: E::ConvWeight,
    norm2: Norm<E>,
    conv2: E::ConvWeight,
}

struct Norm<E: Engine> {
    weight: E::Tensor,
    bias: E::Tensor,
}

/// ResBlocks, then channels are traded for frames and pixels.
struct UpStage<E: Engine> {
    blocks: Vec<ResBlock<E>>,
    proj: Pointwise<E>,
    temporal: usize,
    spatial: usize,
}

/// Looks at a stage's output, `[T, H, W, C]`, under its golden name. For comparing stage by stage.
pub type Tap<'a, E> = &'a mut dyn FnMut(&str, &<E as SequenceOps>::Tensor);

impl<E: Engine> VaeDecoder<E> {
    pub fn load(loader: &Loader<'_, E>, config: &VaeConfig) -> Result<Self, ModelError> {
        let stages = check(config)?;
        let channels = &config.channels;
        let first = channels[0];

        let conv_in = Pointwise {
            // [C, latent channels, 1, 1, 1]
            weight: loader.engine.reshape(
                &loader.tensor("blocks.0.0.weight", &[first, config.latent_channels, 1, 1, 1])?,
                &[first, config.latent_channels],
            )?,
            bias: loader.tensor("blocks.0.0.bias", &[first])?,
        };
        let res_blocks = |count: usize, channels: usize, name: &dyn Fn(usize) -> String| {
            (0..count).map(|i| ResBlock::load(loader, &name(i), channels)).collect::<Result<Vec<_>, _>>()
        };
        let block_in = res_blocks(config.layers[0], first, &|i| format!("blocks.0.{}", i + 1))?;
        let up = (0..stages)
            .map(|stage| {
                let name = format!("blocks.{}", stage + 1);
                let (input, output) = (channels[stage], channels[stage + 1]);
                let (temporal, spatial) = (config.temporal_expansions[stage], config.spatial_expansions[stage]);
                Ok(UpStage {
                    blocks: res_blocks(config.layers[stage + 1], input, &|i| format!("{name}.blocks.{i}"))?,
                    proj: Pointwise::load(
                        loader,
                        &format!("{name}.proj"),
                        output * temporal * spatial * spatial,
                        input,
                    )?,
                    temporal,
                    spatial,
                })
            })
            .collect::<Result<Vec<_>, ModelError>>()?;
        let last = channels[stages];
        Ok(Self {
            mean: config.latents_mean.iter().map(|&v| v as f32).collect(),
            std: config.latents_std.iter().map(|&v| v as f32).collect(),
            conv_in,
            block_in,
            up,
            block_out: res_blocks(config.layers[stages + 1], last, &|i| format!("blocks.{}.{i}", stages + 1))?,
            output_proj: Pointwise::load(loader, "output_proj", 3, last)?,
        })
    }

    /// From the transformer's space to the decoder's.
    pub fn denormalize(&self, engine: &E, latent: &DitLatent<E::Tensor>) -> Result<VaeLatent<E::Tensor>, ModelError> {
        Ok(VaeLatent(engine.denormalize_latent(&latent.0, &self.mean, &self.std)?))
    }

    /// A decode that starts with the clip's first latent frame.
    pub fn stream(&self) -> DecodeStream<'_, E> {
        DecodeStream { decoder: self, memory: Memory { caches: Vec::new(), next: 0 }, started: false }
    }
}

/// The lists of a decoder's config fit together. Returns the number of up stages.
fn check(config: &VaeConfig) -> Result<usize, ModelError> {
    let stages = config.channels.len().saturating_sub(1);
    let expansions = config.temporal_expansions.iter().chain(&config.spatial_expansions);
    let fits = !config.channels.is_empty()
        && config.layers.len() == stages + 2
        && config.temporal_expansions.len() == stages
        && config.spatial_expansions.len() == stages
        && config.latents_mean.len() == config.latent_channels
        && config.latents_std.len() == config.latent_channels
        && config.channels.iter().all(|&c| c > 0 && c.is_multiple_of(NORM_GROUPS))
        && expansions.chain([&config.latent_channels]).all(|&n| n > 0);
    if !fits {
        return Err(ModelError::Input(format!(
            "vae config does not fit together: {} latent channels with {} means and {} deviations, channels {:?} \
             (each a multiple of {NORM_GROUPS}), {} layer counts (want two more than up stages), temporal expansions {:?}, \
             spatial expansions {:?} (want one per up stage)",
            config.latent_channels,
            config.latents_mean.len(),
            config.latents_std.len(),
            config.channels,
            config.layers.len(),
            config.temporal_expansions,
            config.spatial_expansions,
        )));
    }
    Ok(stages)
}

/// A clip in the middle of its decode.
pub struct DecodeStream<'a, E: Engine> {
    decoder: &'a VaeDecoder<E>,
    memory: Memory<E>,
    started: bool,
}

/// What every convolution remembers of the frames it has seen, in the order of use.
struct Memory<E: Engine> {
    caches: Vec<ConvCache<E::Tensor>>,
    /// The convolution whose turn it is.
    next: usize,
}

impl<E: Engine> DecodeStream<'_, E> {
    /// Decodes the next latent frames `[T, h, w, C]` (at least one) → frames `[t, H, W, 3]`, about -1 … 1, not clamped.
    /// After an error the stream has lost its place and is of no more use.
    pub fn push(
        &mut self,
        engine: &E,
        latent: &VaeLatent<E::Tensor>,
        tap: Tap<'_, E>,
    ) -> Result<E::Tensor, ModelError> {
        let decoder = self.decoder;
        let first_chunk = !std::mem::replace(&mut self.started, true);
        self.memory.next = 0;

        // Tensors are replaced, not shadowed: a shadowed one would live to the end, and memory is what streaming is for.
        let mut x = decoder.conv_in.forward(engine, &latent.0)?;
        for block in &decoder.block_in {
            x = block.forward(engine, x, &mut self.memory)?;
        }
        tap("vae.block_in", &x);
        for (stage, up) in decoder.up.iter().enumerate() {
            for block in &up.blocks {
                x = block.forward(engine, x, &mut self.memory)?;
            }
            x = up.proj.forward(engine, &x)?;
            let drop = if first_chunk { up.temporal - 1 } else { 0 };
            x = engine.depth_to_space_time(&x, up.temporal, up.spatial, drop)?;
            tap(&format!("vae.up{stage}"), &x);
        }
        for block in &decoder.block_out {
            x = block.forward(engine, x, &mut self.memory)?;
        }
        x = engine.silu(&x)?;
        decoder.output_proj.forward(engine, &x)
    }
}

impl<E: Engine> Pointwise<E> {
    fn load(loader: &Loader<'_, E>, prefix: &str, output: usize, input: usize) -> Result<Self, ModelError> {
        Ok(Self {
            weight: loader.tensor(&format!("{prefix}.weight"), &[output, input])?,
            bias: loader.tensor(&format!("{prefix}.bias"), &[output])?,
        })
    }

    /// `[T, H, W, C] → [T, H, W, C']`
    fn forward(&self, engine: &E, x: &E::Tensor) -> Result<E::Tensor, ModelError> {
        let mut shape = engine.shape(x);
        let channels = shape.pop().unwrap_or(0);
        let rows = engine.reshape(x, &[shape.iter().product(), channels])?;
        let rows = engine.linear(&rows, &self.weight, Some(&self.bias))?;
        shape.extend(engine.shape(&rows).last());
        Ok(engine.reshape(&rows, &shape)?)
    }
}

impl<E: Engine> ResBlock<E> {
    fn load(loader: &Loader<'_, E>, prefix: &str, channels: usize) -> Result<Self, ModelError> {
        let norm = |index: usize| -> Result<Norm<E>, ModelError> {
            let prefix = format!("{prefix}.stack.{index}");
            Ok(Norm {
                weight: loader.tensor(&format!("{prefix}.weight"), &[channels])?,
                bias: loader.tensor(&format!("{prefix}.bias"), &[channels])?,
            })
        };
        let conv = |index: usize| loader.conv3d(&format!("{prefix}.stack.{index}"), channels, channels);
        Ok(Self { norm1: norm(0)?, conv1: conv(2)?, norm2: norm(3)?, conv2: conv(5)? })
    }

    /// At most three tensors of the size of `x` are alive at a time, `x` included.
    fn forward(&self, engine: &E, x: E::Tensor, memory: &mut Memory<E>) -> Result<E::Tensor, ModelError> {
        let mut h = self.norm1.forward(engine, &x)?;
        h = memory.convolve(engine, &h, &self.conv1)?;
        h = self.norm2.forward(engine, &h)?;
        h = memory.convolve(engine, &h, &self.conv2)?;
        Ok(engine.add(&x, &h)?)
    }
}

impl<E: Engine> Norm<E> {
    fn forward(&self, engine: &E, x: &E::Tensor) -> Result<E::Tensor, ModelError> {
        Ok(engine.group_norm_silu(x, &self.weight, &self.bias, NORM_GROUPS)?)
    }
}

impl<E: Engine> Memory<E> {
    /// The next convolution of the network. In the first chunk it remembers nothing yet.
    fn convolve(&mut self, engine: &E, x: &E::Tensor, weight: &E::ConvWeight) -> Result<E::Tensor, ModelError> {
        let (out, cache) = engine.causal_conv3d(x, weight, self.caches.get(self.next))?;
        match self.caches.get_mut(self.next) {
            Some(slot) => *slot = cache,
            None => self.caches.push(cache),
        }
        self.next += 1;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex;

    use super::*;
    use crate::engine::cpu::CpuEngine;
    use crate::engine::{RawDtype, RawTensor};
    use crate::model::weights::{StoredTensor, WeightError, WeightSource};

    /// A checkpoint of small random values that has whatever it is asked for, and remembers the names.
    struct AnyWeights {
        shapes: HashMap<String, Vec<usize>>,
        values: Vec<u8>,
        asked: Mutex<Vec<String>>,
    }

    impl WeightSource for AnyWeights {
        fn get(&self, name: &str) -> Result<StoredTensor<'_>, WeightError> {
            let Some((key, shape)) = self.shapes.get_key_value(name) else {
                return Err(WeightError::Missing { name: name.into() });
            };
            self.asked.lock().unwrap().push(key.clone());
            let bytes = 4 * shape.iter().product::<usize>();
            let start = 4 * (name.bytes().map(usize::from).sum::<usize>() % 97);
            let piece = RawTensor { dtype: RawDtype::F32, shape, bytes: &self.values[start..start + bytes] };
            Ok(StoredTensor { shape: shape.clone(), pieces: vec![piece] })
        }
    }

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

    fn weights(config: &VaeConfig) -> AnyWeights {
        let mut shapes = HashMap::new();
        let mut layer = |name: &str, weight: &[usize]| {
            shapes.insert(format!("{name}.weight"), weight.to_vec());
            shapes.insert(format!("{name}.bias"), weight[..1].to_vec());
        };
        let res_block = |layer: &mut dyn FnMut(&str, &[usize]), name: String, c: usize| {
            for (index, shape) in [(0, &[c][..]), (2, &[c, c, 3, 3, 3]), (3, &[c]), (5, &[c, c, 3, 3, 3])] {
                layer(&format!("{name}.stack.{index}"), shape);
            }
        };
        layer("blocks.0.0", &[64, 3, 1, 1, 1]);
        res_block(&mut layer, "blocks.0.1".into(), 64);
        res_block(&mut layer, "blocks.1.blocks.0".into(), 64);
        res_block(&mut layer, "blocks.1.blocks.1".into(), 64);
        layer("blocks.1.proj", &[32 * 2 * 4, 64]);
        res_block(&mut layer, "blocks.2.blocks.0".into(), 32);
        layer("blocks.2.proj", &[32 * 3, 32]);
        res_block(&mut layer, "blocks.3.0".into(), 32);
        layer("output_proj", &[3, 32]);
        assert_eq!(config.channels, [64, 32, 32]);
        let mut state = 1u32;
        let values = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 24) as f32 - 0.5) * 0.1
        });
        let values = values.take(64 * 64 * 27 + 97).flat_map(f32::to_le_bytes).collect();
        AnyWeights { shapes, values, asked: Mutex::default() }
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
        let (config, source) = (config(), weights(&config()));
        let decoder = VaeDecoder::load(&Loader { engine: &engine, source: &source }, &config).unwrap();
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

    #[test]
    fn every_tensor_of_the_checkpoint_is_read_once() {
        let engine = CpuEngine::new(1).unwrap();
        let source = weights(&config());
        VaeDecoder::load(&Loader { engine: &engine, source: &source }, &config()).unwrap();
        let mut asked = source.asked.lock().unwrap().clone();
        asked.sort();
        let mut all: Vec<_> = source.shapes.keys().cloned().collect();
        all.sort();
        assert_eq!(asked, all);
    }

    #[test]
    fn a_config_that_does_not_fit_together_is_refused() {
        let engine = CpuEngine::new(1).unwrap();
        let source = weights(&config());
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
}
