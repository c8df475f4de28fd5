//! What is computed: sizes of a transformer and of a clip, and the arithmetic that they stand for.

use serde::{Deserialize, Serialize};

use crate::job::spec::{FRAME_STEP, SpecError, check_frames, check_size, check_steps};

/// Text tokens of a prompt at most, its end mark among them.
pub const MAX_TEXT_TOKENS: usize = 256;

/// Sizes of the transformer, as far as time, traffic and memory depend on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    pub layers: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// Widths of the visual and of the text stream. The visual one is heads · head_dim.
    pub hidden_x: usize,
    pub hidden_y: usize,
    /// SwiGLU widths of each stream.
    pub ffn_x: usize,
    pub ffn_y: usize,
    /// Width of the text features.
    pub text_dim: usize,
    /// Width of the sinusoidal timestep embedding.
    pub time_dim: usize,
    /// Channels of the latent; a token is a patch of 2×2 of them.
    pub channels: usize,
}

impl ModelShape {
    /// The published checkpoint (genmo/mochi-1-preview).
    pub const fn mochi1() -> Self {
        Self {
            layers: 48,
            heads: 24,
            head_dim: 128,
            hidden_x: 3072,
            hidden_y: 1536,
            ffn_x: 8192,
            ffn_y: 4096,
            text_dim: 4096,
            time_dim: 256,
            channels: 12,
        }
    }

    /// Parameters that a visual token, and a text token, meets in the linear layers of block `layer`.
    fn token_parameters(&self, layer: usize) -> [f64; 2] {
        let (d, dy) = (self.hidden_x as f64, self.hidden_y as f64);
        let visual = 4.0 * d * d + 3.0 * d * self.ffn_x as f64;
        let qkv = 3.0 * dy * d;
        // Nothing reads the text after the last block.
        let update = if self.is_last(layer) { 0.0 } else { dy * d + 3.0 * dy * self.ffn_y as f64 };
        [visual, qkv + update]
    }

    fn is_last(&self, layer: usize) -> bool {
        layer + 1 == self.layers
    }

    /// FLOPs of the linear layers of block `layer` for so many visual and text rows. Projections of single rows
    /// (modulation) are left out, as are the first and the last layer of the network: together less than 0.1 %.
    pub fn linear_flops(&self, layer: usize, tokens: usize, text: usize) -> f64 {
        let [visual, textual] = self.token_parameters(layer);
        2.0 * (tokens as f64 * visual + text as f64 * textual)
    }

    /// FLOPs of attention of `queries` rows over `keys` rows in `heads` heads.
    pub fn attention_flops(&self, queries: usize, keys: usize, heads: usize) -> f64 {
        4.0 * queries as f64 * keys as f64 * (heads * self.head_dim) as f64
    }

    /// Values read and written between the products of one block: norms, rotation, gates and residuals, each of which
    /// reads its input from memory and writes its output back.
    pub fn elementwise_values(&self, tokens: usize, text: usize) -> f64 {
        // Per row: two norms 2d each, split and rotation 6d, two residuals 3d each. SwiGLU is part of its product.
        let row = |d: usize| (4 * d + 6 * self.hidden_x + 6 * d) as f64;
        tokens as f64 * row(self.hidden_x) + text as f64 * row(self.hidden_y)
    }

    /// Parameters of block `layer`.
    pub fn block_parameters(&self, layer: usize) -> u64 {
        let (d, dy) = (self.hidden_x as u64, self.hidden_y as u64);
        let (fx, fy, head_dim) = (self.ffn_x as u64, self.ffn_y as u64, self.head_dim as u64);
        let visual = linear(d, 4 * d) + 3 * d * d + linear(d, d) + 3 * d * fx + 2 * head_dim;
        let keys = 3 * dy * d + 2 * head_dim;
        let text = if self.is_last(layer) { linear(d, dy) } else { linear(d, 4 * dy) + linear(d, dy) + 3 * dy * fy };
        visual + keys + text
    }

    /// Parameters outside the blocks.
    pub fn other_parameters(&self) -> u64 {
        let (d, dy, text) = (self.hidden_x as u64, self.hidden_y as u64, self.text_dim as u64);
        let patch = 4 * self.channels as u64;
        let time = linear(self.time_dim as u64, d) + linear(d, d);
        let pool = linear(text, 2 * text) + linear(text, text) + linear(text, d);
        let positions = 3 * (self.heads * self.head_dim / 2) as u64;
        linear(patch, d) + time + pool + linear(text, dy) + positions + linear(d, 2 * d) + linear(d, patch)
    }

    /// Values per token of the velocity that leaves the network.
    pub fn velocity_values(&self) -> usize {
        4 * self.channels
    }
}

/// Weights and bias.
fn linear(from: u64, to: u64) -> u64 {
    from * to + to
}

/// Sizes of a clip, as the transformer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClipShape {
    /// Visual tokens.
    pub tokens: usize,
    /// Text tokens of the conditional and of the unconditional branch; without a negative prompt the latter has none.
    pub text: [usize; 2],
    pub steps: usize,
}

impl ClipShape {
    /// A clip of `num_frames` frames of `width` × `height` pixels in `steps` steps, with the sizes that a
    /// [`RenderSpec`](crate::job::spec::RenderSpec) may have. `text` is cut to [`MAX_TEXT_TOKENS`], as prompts are.
    pub fn new(width: u32, height: u32, num_frames: u32, steps: u32, text: [usize; 2]) -> Result<Self, SpecError> {
        check_size("width", width)?;
        check_size("height", height)?;
        check_frames(num_frames)?;
        check_steps(steps)?;
        let latent_frames = (num_frames - 1) / FRAME_STEP + 1;
        // Patches of 2×2 latent pixels, 8×8 pixels each.
        let tokens = latent_frames as usize * (height / 16) as usize * (width / 16) as usize;
        Ok(Self { tokens, text: text.map(|text| text.min(MAX_TEXT_TOKENS)), steps: steps as usize })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::spec::MAX_STEPS;

    /// FLOPs of one forward: (linear layers, attention).
    fn forward(model: &ModelShape, tokens: usize, text: usize) -> (f64, f64) {
        let linear = (0..model.layers).map(|layer| model.linear_flops(layer, tokens, text)).sum();
        let attention = model.attention_flops(tokens + text, tokens + text, model.heads) * model.layers as f64;
        (linear, attention)
    }

    #[test]
    fn sizes_of_the_published_checkpoint_are_the_published_ones() {
        let model = ModelShape::mochi1();
        assert_eq!(model.block_parameters(0), 207_641_600);
        let all = (0..48).map(|layer| model.block_parameters(layer)).sum::<u64>() + model.other_parameters();
        assert!(all.abs_diff(10_028_000_000) < 500_000, "published as 10.028 billion, counted {all}");
    }

    #[test]
    fn flops_are_those_of_the_published_table() {
        // frames, tokens, PFLOP of the linear layers, of the attention, and of both, with 256 text tokens
        let table = [
            (19, 6_360, 0.069, 0.026, 0.096),
            (31, 9_540, 0.104, 0.057, 0.161),
            (49, 14_310, 0.156, 0.125, 0.282),
            (85, 23_850, 0.259, 0.343, 0.603),
            (163, 44_520, 0.484, 1.183, 1.668),
        ];
        let model = ModelShape::mochi1();
        for (frames, tokens, linear, attention, all) in table {
            let clip = ClipShape::new(848, 480, frames, 64, [256, 0]).unwrap();
            assert_eq!(clip.tokens, tokens);
            let got = forward(&model, tokens, 256);
            // The table's linear column is the visual stream alone; it has three digits.
            let visual = forward(&model, tokens, 0).0;
            for (got, expected) in [(visual, linear), (got.1, attention), (got.0 + got.1, all)] {
                assert!((got / 1e15 - expected).abs() < 0.00055, "{frames} frames: {got:e}, expected {expected} PFLOP");
            }
        }
    }

    #[test]
    fn a_clip_that_cannot_be_rendered_has_no_shape() {
        assert!(ClipShape::new(850, 480, 49, 64, [0, 0]).unwrap_err().to_string().contains("width 850"));
        assert!(ClipShape::new(848, 480, 50, 64, [0, 0]).is_err());
        assert!(ClipShape::new(848, 480, 49, MAX_STEPS + 1, [0, 0]).is_err());
        assert_eq!(ClipShape::new(16, 16, 1, 1, [900, 0]).unwrap().text, [MAX_TEXT_TOKENS, 0]);
    }
}
