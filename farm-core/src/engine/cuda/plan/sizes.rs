//! Bytes of the networks' weights, and of the tensors that are alive where a stage takes most. Counted from what the model's
//! code holds: [`Block::forward`](crate::model) and the walk through the decoder are to be read beside it.

use super::{Clip, Networks};
use crate::engine::cuda::device::Dtype;
use crate::model::config::{T5Config, VaeConfig};
use crate::model::vae::{NORM_GROUPS, decode_values_per_pixel};
use crate::parallel::cost::ModelShape;
use crate::parallel::shard::Shares;
use crate::parallel::topology::Topology;
use crate::precision::Precision;

const F32: u64 = 4;
/// Of the product inside [`Engine::linear_swiglu`](crate::engine::Engine::linear_swiglu), which is computed in chunks of rows.
const GATED_CHUNK: u64 = 256 << 20;
/// What libraries ask for beside tensors.
const WORKSPACE: u64 = 64 << 20;

/// A network's weights: matrices in the type that it computes in, and what is f32 in every precision (norms and biases).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Values {
    pub matrices: u64,
    pub vectors: u64,
}

impl Values {
    pub fn bytes(self, matrices: Dtype) -> u64 {
        self.matrices * matrices.bytes() as u64 + self.vectors * F32
    }
}

pub fn dtype(precision: Precision) -> Dtype {
    match precision {
        Precision::F32 => Dtype::F32,
        Precision::Bf16 => Dtype::Bf16,
    }
}

/// Block `layer` of the transformer.
pub fn block(model: &ModelShape, layer: usize) -> Values {
    let (d, dy) = (model.hidden_x as u64, model.hidden_y as u64);
    // The modulations' biases and the projections', and four norms over a head. The last block has one modulation of the
    // text instead of four, and does not project it.
    let text = if layer + 1 == model.layers { dy } else { 4 * dy + dy };
    let vectors = 4 * d + d + text + 4 * model.head_dim as u64;
    Values { matrices: model.block_parameters(layer) - vectors, vectors }
}

/// The transformer outside its blocks.
pub fn around_blocks(model: &ModelShape) -> Values {
    let (d, dy, text) = (model.hidden_x as u64, model.hidden_y as u64, model.text_dim as u64);
    // Patches, timestep, pooled text (keys and values, query, output), text, modulation, velocity, and the positions.
    let biases = d + 2 * d + (2 * text + text + d) + dy + 2 * d + 4 * model.channels as u64;
    let vectors = biases + 3 * (model.heads * model.head_dim / 2) as u64;
    Values { matrices: model.other_parameters() - vectors, vectors }
}

/// A block of the text encoder. (Its embedding table stays in its file.)
pub fn text_block(t5: &T5Config) -> Values {
    let (d, inner, hidden) = (t5.d_model as u64, (t5.num_heads * t5.d_kv) as u64, t5.d_ff as u64);
    Values { matrices: 4 * d * inner + 3 * d * hidden, vectors: 2 * d }
}

/// The text encoder outside its blocks.
pub fn around_text_blocks(t5: &T5Config) -> Values {
    Values { matrices: 0, vectors: t5.d_model as u64 }
}

pub fn decoder(vae: &VaeConfig) -> Values {
    let mut values = Values::default();
    let mut linear = |out: u64, input: u64| {
        values.matrices += out * input;
        values.vectors += out;
    };
    let channels: Vec<u64> = vae.channels.iter().map(|channels| *channels as u64).collect();
    let (Some(&first), Some(&last)) = (channels.first(), channels.last()) else { return values };
    linear(first, vae.latent_channels as u64);
    let factors = vae.temporal_expansions.iter().zip(&vae.spatial_expansions);
    for (pair, (temporal, spatial)) in channels.windows(2).zip(factors) {
        linear(pair[1] * (temporal * spatial * spatial) as u64, pair[0]);
    }
    linear(3, last);
    // `layers` counts the blocks before the first up stage apart from those in it.
    for (part, blocks) in vae.layers.iter().enumerate() {
        let Some(width) = channels.get(part.saturating_sub(1)) else { continue };
        // Two convolutions with bias, two norms with weight and bias.
        values.matrices += *blocks as u64 * 2 * 27 * width * width;
        values.vectors += *blocks as u64 * 2 * 3 * width;
    }
    values
}

/// Tensors of the text encoder at its peak, both texts going through it together.
pub fn text_activations(t5: &T5Config, text: [usize; 2]) -> u64 {
    let (d, inner, hidden) = (t5.d_model as u64, (t5.num_heads * t5.d_kv) as u64, t5.d_ff as u64);
    let rows = |rows: usize| rows as u64;
    let bias = |text: usize| t5.num_heads as u64 * rows(text) * rows(text);
    let streams: u64 = text.iter().map(|text| rows(*text) * d + bias(*text)).sum();
    let most = text[0].max(text[1]);
    // Normed, then q, k, v and what they attend to; or both halves of the feed-forward and their product. Each ends in what
    // is added to the stream, and the sum.
    let attention = d + 4 * inner + 2 * d;
    let feed_forward = d + 3 * hidden + 2 * d;
    F32 * (streams + rows(most) * attention.max(feed_forward)) + WORKSPACE
}

/// Bytes of the transformer's tensors at the peak of a step, on the rank that has most. `brought`: both branches go through
/// each block together, because it is brought to the device for them.
pub fn denoise_tensors(
    networks: &Networks<'_>,
    clip: &Clip,
    precision: Precision,
    topology: Topology,
    brought: bool,
) -> u64 {
    let Denoise { held, attention, feed_forward, .. } = denoise(networks, clip, precision, topology, brought);
    held + attention.max(feed_forward)
}

/// As [`denoise_tensors`], with what is computed in beside tensors.
pub fn denoise_activations(
    networks: &Networks<'_>,
    clip: &Clip,
    precision: Precision,
    topology: Topology,
    brought: bool,
) -> u64 {
    let Denoise { held, attention, feed_forward, gated } = denoise(networks, clip, precision, topology, brought);
    held + attention.max(feed_forward + gated.min(GATED_CHUNK)) + WORKSPACE
}

/// Bytes of a step.
struct Denoise {
    /// All the time.
    held: u64,
    /// Until a block has attended, and after, at the peaks of both.
    attention: u64,
    feed_forward: u64,
    /// Of the product inside the feed-forward, if it were computed at once.
    gated: u64,
}

fn denoise(networks: &Networks<'_>, clip: &Clip, precision: Precision, topology: Topology, brought: bool) -> Denoise {
    let model = networks.dit;
    let bytes = dtype(precision).bytes() as u64;
    let text = clip.text[0].max(clip.text[1]);
    let shares = Shares::new(topology, clip.tokens(), text, model.heads, model.head_dim);
    let [rows, text_rows] = shares.row_counts(0).map(|rows| rows as u64);
    let (d, dy) = (model.hidden_x as u64, model.hidden_y as u64);
    let (x, y, text_x) = (rows * d * bytes, text_rows * dy * bytes, text_rows * d * bytes);

    // The rotary table, the latent with what becomes of it, the features of both texts.
    let latent = model.channels as u64 * clip.latent_pixels() * clip.latent_frames();
    let held = F32 * (rows * d + 6 * latent + (clip.text[0] + clip.text[1]) as u64 * model.text_dim as u64);
    let branches = if brought && topology.cfg() == 1 { 2 } else { 1 };
    let streams = branches * (x + 2 * y);

    // q, k and v before and after they are split.
    let split = 6 * x;
    let segment = shares.segment(0).iter().sum::<usize>() as u64 * (shares.heads(0).len() * model.head_dim) as u64;
    // Of the text q, k and v are there already, and it is as many again while the visual rows attend.
    let own = 3 * (x + text_x);
    let attention = if topology.ring() > 1 {
        // Queries, keys and values, those that come, those that go; partial sums, the next, and both merged.
        own + segment * (7 * bytes + 3 * F32)
    } else if topology.ulysses() > 1 {
        // What was sent or what it is put together to, and what has come.
        own + 2 * (own.max(3 * segment * bytes))
    } else {
        own + x + text_x
    };
    let attended = attention + rows * model.heads as u64 * F32;
    let hidden = rows * model.ffn_x as u64 * bytes;
    Denoise {
        held: held + streams,
        attention: split.max(attended),
        // Normed and gated, or gated and projected.
        feed_forward: x + hidden,
        gated: 2 * hidden,
    }
}

/// Tensors of the decoder for each latent pixel of a tile.
pub fn decode_bytes_per_pixel(vae: &VaeConfig, precision: Precision) -> u64 {
    let [remembered, working] = decode_values_per_pixel(vae);
    (remembered + working) * dtype(precision).bytes() as u64
}

/// What a decode takes beside its tensors: the latent, sums of the norms, the libraries' part.
pub fn beside_decode(vae: &VaeConfig, clip: &Clip) -> u64 {
    let latent = vae.latent_channels as u64 * clip.latent_pixels() * clip.latent_frames();
    F32 * (3 * latent + 2 * NORM_GROUPS as u64 * 6) + WORKSPACE
}
