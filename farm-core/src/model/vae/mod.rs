//! The VAE decoder: latents in, frames out, in pieces of any length, and of a whole frame or of a tile of it.
//!
//! All mixing over time is in the causal convolutions, each of which looks back two frames; norms are per frame. So a
//! [`DecodeStream`] that keeps the last two input frames of every convolution gives, chunk by chunk, the frames of the
//! whole decode to the bit, and its memory does not grow with their number. The first chunk of `m` latents gives
//! `6(m − 1) + 1` frames, every later one `6m` (6 being the product of the temporal expansions): an up stage drops its first
//! `expansion − 1` frames, but of the clip, not of a chunk.
//!
//! The network is walked in one place, [`walk`], which stops before every norm. A [`DecodeStream`] walks on with the
//! statistics of what it has; a [`TileStream`] may wait there for those of the whole frame.

pub mod random;
mod tile;
mod walk;

#[cfg(test)]
mod tests;

pub use self::tile::{Advance, TileStream};
use self::walk::{Stop, Walk};
use crate::engine::{Engine, Over, SequenceOps};
use crate::model::ModelError;
use crate::model::config::VaeConfig;
use crate::model::latent::{DitLatent, VaeLatent};
use crate::model::weights::{Loader, Tensors};

/// Groups of every group norm; part of the architecture, written in no config.
pub const NORM_GROUPS: usize = 32;

/// Weights of the decoder. Parts are named as in the original checkpoint.
pub struct VaeDecoder<E: Engine> {
    mean: Vec<f32>,
    std: Vec<f32>,
    conv_in: Pointwise<E>,
    stages: Vec<Stage<E>>,
}

/// A 1×1×1 convolution: a matrix product over the channels of every pixel.
struct Pointwise<E: Engine> {
    weight: E::Matrix,
    bias: E::Tensor,
}

/// `x + conv₂(silu(norm₂(conv₁(silu(norm₁(x))))))`
struct ResBlock<E: Engine> {
    norms: [Norm<E>; 2],
    convs: [E::ConvWeight; 2],
}

struct Norm<E: Engine> {
    weight: E::Tensor,
    bias: E::Tensor,
}

/// ResBlocks of one resolution, and what comes of them.
struct Stage<E: Engine> {
    blocks: Vec<ResBlock<E>>,
    /// Its pixels in a latent pixel's height, and in its width.
    scale: usize,
    exit: Exit<E>,
}

enum Exit<E: Engine> {
    /// The next stage has the same resolution.
    Same,
    /// Channels are traded for frames and pixels.
    Up {
        proj: Pointwise<E>,
        temporal: usize,
        spatial: usize,
    },
    Frames {
        proj: Pointwise<E>,
    },
}

/// Looks at a stage's output, `[T, H, W, C]`, under its golden name. For comparing stage by stage.
pub type Tap<'a, E> = &'a mut dyn FnMut(&str, &<E as SequenceOps>::Tensor);

impl<E: Engine> VaeDecoder<E> {
    pub fn load(loader: &Loader<'_, E>, config: &VaeConfig) -> Result<Self, ModelError> {
        let ups = check(config)?;
        let channels = &config.channels;
        let (first, last) = (channels[0], channels[ups]);

        let conv_in = Pointwise {
            // [C, latent channels, 1, 1, 1]
            weight: loader.matrix("blocks.0.0.weight", &[first, config.latent_channels, 1, 1, 1], Over::Few)?,
            bias: loader.tensor("blocks.0.0.bias", &[first])?,
        };
        let res_blocks = |count: usize, channels: usize, name: &dyn Fn(usize) -> String| {
            (0..count).map(|i| ResBlock::load(loader, &name(i), channels)).collect::<Result<Vec<_>, _>>()
        };
        let block_in = res_blocks(config.layers[0], first, &|i| format!("blocks.0.{}", i + 1))?;
        let mut stages = vec![Stage { blocks: block_in, scale: 1, exit: Exit::Same }];
        let mut scale = 1;
        for up in 0..ups {
            let name = format!("blocks.{}", up + 1);
            let (input, output) = (channels[up], channels[up + 1]);
            let (temporal, spatial) = (config.temporal_expansions[up], config.spatial_expansions[up]);
            let blocks = res_blocks(config.layers[up + 1], input, &|i| format!("{name}.blocks.{i}"))?;
            let packed = output * temporal * spatial * spatial;
            let proj = Pointwise::load(loader, &format!("{name}.proj"), packed, input)?;
            stages.push(Stage { blocks, scale, exit: Exit::Up { proj, temporal, spatial } });
            scale *= spatial;
        }
        stages.push(Stage {
            blocks: res_blocks(config.layers[ups + 1], last, &|i| format!("blocks.{}.{i}", ups + 1))?,
            scale,
            exit: Exit::Frames { proj: Pointwise::load(loader, "output_proj", 3, last)? },
        });
        Ok(Self {
            mean: config.latents_mean.iter().map(|&v| v as f32).collect(),
            std: config.latents_std.iter().map(|&v| v as f32).collect(),
            conv_in,
            stages,
        })
    }

    /// Pixels of a frame in a latent pixel's height, and in its width.
    pub fn spatial_factor(&self) -> usize {
        self.stages.last().map_or(1, |stage| stage.scale)
    }

    /// Group norms, at each of which the tiles of a frame may exchange their sums.
    pub fn norms(&self) -> u32 {
        self.stages.iter().map(|stage| 2 * stage.blocks.len() as u32).sum()
    }

    fn latent_channels(&self) -> usize {
        self.mean.len()
    }

    /// From the transformer's space to the decoder's.
    pub fn denormalize(&self, engine: &E, latent: &DitLatent<E::Tensor>) -> Result<VaeLatent<E::Tensor>, ModelError> {
        Ok(VaeLatent(engine.denormalize_latent(&latent.0, &self.mean, &self.std)?))
    }

    /// A decode that starts with the clip's first latent frame.
    pub fn stream(&self) -> DecodeStream<'_, E> {
        DecodeStream { decoder: self, walk: Walk::new() }
    }
}

/// A clip in the middle of its decode.
pub struct DecodeStream<'a, E: Engine> {
    decoder: &'a VaeDecoder<E>,
    walk: Walk<E>,
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
        let mut stop = self.walk.begin(self.decoder, engine, &latent.0, tap)?;
        loop {
            match stop {
                Stop::Frames(frames) => return Ok(frames),
                Stop::Norm(at) => {
                    let normed = at.norm(self.decoder, engine, at.input(), None)?;
                    stop = self.walk.convolve(self.decoder, engine, at, normed, Default::default(), tap)?;
                }
            }
        }
    }
}

/// Bytes that decoding takes for each latent pixel of a tile, in chunks of one latent frame and f32: what the
/// convolutions remember and, where it takes most, the largest tensors that are alive at a time; an eighth more for what
/// an allocator keeps.
pub fn decode_bytes_per_pixel(config: &VaeConfig) -> u64 {
    let [remembered, working] = decode_values_per_pixel(config);
    4 * (remembered + working) * 9 / 8
}

/// Values for each latent pixel of a tile: what the convolutions remember, and the tensors that are alive where they take
/// most.
pub fn decode_values_per_pixel(config: &VaeConfig) -> [u64; 2] {
    let up = |list: &[usize], stage: usize| list.get(stage).map_or(1, |&factor| factor as u64);
    let (mut frames, mut area) = (1, 1);
    let (mut remembered, mut working) = (0u64, 0u64);
    // `layers` counts the blocks before the first up stage apart from those in it.
    let layers = config.layers.iter().skip(1).enumerate();
    for (stage, (&channels, (index, &layers))) in config.channels.iter().zip(layers).enumerate() {
        let blocks = layers as u64 + if index == 0 { config.layers[0] as u64 } else { 0 };
        let values = channels as u64 * area;
        // Two convolutions a block, two frames each.
        remembered += 4 * blocks * values;
        // A block holds its input, a norm's output and a convolution's, and with pixels around it one more.
        working = working.max(4 * frames * values);
        let input = frames * values;
        frames *= up(&config.temporal_expansions, stage);
        area *= up(&config.spatial_expansions, stage).pow(2);
        // Projected, then rearranged.
        let output = config.channels.get(stage + 1).map_or(0, |&channels| frames * channels as u64 * area);
        working = working.max(input + 2 * output);
    }
    [remembered, working]
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

impl<E: Engine> Pointwise<E> {
    fn load(loader: &Loader<'_, E>, prefix: &str, output: usize, input: usize) -> Result<Self, ModelError> {
        Ok(Self {
            weight: loader.matrix(&format!("{prefix}.weight"), &[output, input], Over::Few)?,
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
        Ok(Self { norms: [norm(0)?, norm(3)?], convs: [conv(2)?, conv(5)?] })
    }
}
