//! Sizes of the networks. All of them are read from the checkpoint; nothing here is a constant of the published model.

use crate::model::vae::NORM_GROUPS;
use crate::parallel::cost::ModelShape;
use crate::tiles::shape::NormShape;

/// T5 v1.1 encoder sizes (`text_encoder/config.json`).
#[derive(Clone, Debug, PartialEq)]
pub struct T5Config {
    pub vocab_size: usize,
    pub d_model: usize,
    pub num_heads: usize,
    pub d_kv: usize,
    pub d_ff: usize,
    pub num_layers: usize,
    /// Buckets of the relative position table (32); the distance table of the bucket function belongs to 32 and 128.
    pub relative_attention_num_buckets: usize,
    pub layer_norm_epsilon: f64,
}

/// AsymmDiT sizes. Everything but the number of heads follows from tensor shapes.
#[derive(Clone, Debug, PartialEq)]
pub struct DitConfig {
    pub num_layers: usize,
    pub num_heads: usize,
    pub head_dim: usize,
    /// Visual width, heads · head_dim.
    pub hidden_x: usize,
    /// Text width.
    pub hidden_y: usize,
    /// SwiGLU widths of each stream (the published rule differs between layouts, so the tensors decide).
    pub ffn_x: usize,
    pub ffn_y: usize,
    pub in_channels: usize,
    /// Width of the T5 features.
    pub text_dim: usize,
    /// Width of the sinusoidal timestep embedding.
    pub time_dim: usize,
    /// Heads of the caption pooling, 8 in every published layout.
    pub pool_heads: usize,
}

impl DitConfig {
    /// Sizes of the published transformer.
    pub fn mochi1() -> Self {
        let shape = ModelShape::mochi1();
        Self {
            num_layers: shape.layers,
            num_heads: shape.heads,
            head_dim: shape.head_dim,
            hidden_x: shape.hidden_x,
            hidden_y: shape.hidden_y,
            ffn_x: shape.ffn_x,
            ffn_y: shape.ffn_y,
            in_channels: shape.channels,
            text_dim: shape.text_dim,
            time_dim: shape.time_dim,
            pool_heads: 8,
        }
    }

    /// What the cost model has to know.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            layers: self.num_layers,
            heads: self.num_heads,
            head_dim: self.head_dim,
            hidden_x: self.hidden_x,
            hidden_y: self.hidden_y,
            ffn_x: self.ffn_x,
            ffn_y: self.ffn_y,
            text_dim: self.text_dim,
            time_dim: self.time_dim,
            channels: self.in_channels,
        }
    }
}

/// VAE decoder sizes, in decoding order (from latent to pixels).
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
    pub latent_channels: usize,
    /// Channels of the stages, first the widest: 768, 512, 256, 128.
    pub channels: Vec<usize>,
    /// ResBlocks: before the first up stage, in each up stage, after the last: 3, 6, 4, 3, 3.
    pub layers: Vec<usize>,
    /// Time and space factors of the up stages: 3, 2, 1 and 2, 2, 2.
    pub temporal_expansions: Vec<usize>,
    pub spatial_expansions: Vec<usize>,
    /// Per latent channel, for `z·std + mean`.
    pub latents_mean: Vec<f64>,
    pub latents_std: Vec<f64>,
}

impl T5Config {
    /// Sizes of the published encoder, T5 v1.1 XXL.
    pub fn mochi1() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 4096,
            num_heads: 64,
            d_kv: 64,
            d_ff: 10240,
            num_layers: 24,
            relative_attention_num_buckets: 32,
            layer_norm_epsilon: 1e-6,
        }
    }
}

impl VaeConfig {
    /// Sizes of the published decoder. Its latents are taken as they are.
    pub fn mochi1() -> Self {
        Self {
            latent_channels: 12,
            channels: vec![768, 512, 256, 128],
            layers: vec![3, 6, 4, 3, 3],
            temporal_expansions: vec![3, 2, 1],
            spatial_expansions: vec![2, 2, 2],
            latents_mean: vec![0.0; 12],
            latents_std: vec![1.0; 12],
        }
    }

    /// The sums that a frame's group norms need, norm by norm in the order of a decode: two in each ResBlock. The config is
    /// one that a decoder can be loaded with.
    pub fn norm_shapes(&self) -> Vec<NormShape> {
        let mut norms = Vec::new();
        let (mut frames, mut pixels) = (1, 1);
        let stages = self.channels.len();
        for (part, &blocks) in self.layers.iter().enumerate() {
            // The first part is before the up stages, the last after them; the stages expand after their blocks.
            let stage = part.saturating_sub(1).min(stages - 1);
            if let Some(before) = part.checked_sub(2) {
                frames *= self.temporal_expansions[before];
                pixels *= self.spatial_expansions[before].pow(2);
            }
            let per_pixel = (pixels * self.channels[stage] / NORM_GROUPS) as u64;
            norms.extend(vec![NormShape { frames: [1, frames], groups: NORM_GROUPS, per_pixel }; 2 * blocks]);
        }
        norms
    }
}
