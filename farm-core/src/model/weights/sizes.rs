//! Sizes of a network from the shapes of its tensors, with `config.json` asked where shapes cannot tell and held
//! against them where they can.

use std::collections::HashMap;
use std::fmt::Display;
use std::path::Path;

use serde_json::{Map, Value};

use super::checkpoint::CheckpointError;
use super::names::{self, Entry, Naming, Rows};
use crate::model::config::{DitConfig, T5Config, VaeConfig};

/// GroupNorm groups of the VAE.
const VAE_GROUPS: usize = 32;
/// Heads of the caption pooling; no tensor shows them and no layout stores them.
const POOL_HEADS: usize = 8;
/// The bucket function of the T5 bias is a table made for these two.
const T5_BUCKETS: usize = 32;
const T5_MAX_DISTANCE: usize = 128;
/// No width comes near; keeps products of sizes from a hostile file away from overflow (an empty tensor may claim any).
const MAX_DIM: usize = 1 << 24;
/// Up stages of the published decoder, in decoding order.
const TEMPORAL_EXPANSIONS: [usize; 3] = [3, 2, 1];
const SPATIAL_EXPANSIONS: [usize; 3] = [2, 2, 2];

/// Statistics of the published latents, for the layout that does not carry them.
const LATENTS_MEAN: [f64; 12] = [
    -0.06730895953510081,
    -0.038011381506090416,
    -0.07477820912866141,
    -0.05565264470995561,
    0.012767231469026969,
    -0.04703542746246419,
    0.043896967884726704,
    -0.09346305707025976,
    -0.09918314763016893,
    -0.008729793427399178,
    -0.011931556316503654,
    -0.0321993391887285,
];
const LATENTS_STD: [f64; 12] = [
    0.9263795028493863,
    0.9248894543193766,
    0.9393059390890617,
    0.959253732819592,
    0.8244560132752793,
    0.917259975397747,
    0.9294154431013696,
    1.3720942357788521,
    0.881393668867029,
    0.9168315692124348,
    0.9185249279345552,
    0.9274757570805041,
];

/// What stands against reading the sizes; a sentence for the user.
pub(super) type Problem = String;

/// Names and shapes as the files have them.
pub(super) type StoredShapes<'a> = HashMap<&'a str, &'a [usize]>;

/// A part's `config.json`.
pub(super) struct ConfigFile {
    /// As the user knows it: `transformer/config.json`.
    name: String,
    values: Map<String, Value>,
}

impl ConfigFile {
    pub fn parse(name: String, path: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let values = serde_json::from_slice(bytes).map_err(|error| CheckpointError::file(path, error.to_string()))?;
        Ok(Self { name, values })
    }

    /// The value of `key` read by `read`; absent and null are both none.
    fn value<T>(&self, key: &str, wanted: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, Problem> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(format!("{}: {key} is {value}, expected {wanted}", self.name)),
            },
        }
    }

    fn usize(&self, key: &str) -> Result<Option<usize>, Problem> {
        self.value(key, "a whole number", as_usize)
    }

    fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>, Problem> {
        self.value(key, "a list of whole numbers", |value| value.as_array()?.iter().map(as_usize).collect())
    }

    fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, Problem> {
        self.value(key, "a list of numbers", |value| value.as_array()?.iter().map(Value::as_f64).collect())
    }

    /// The file and the tensors say the same, or the file says nothing.
    fn agrees<T: PartialEq + Display>(&self, key: &str, says: Option<T>, tensors: T) -> Result<(), Problem> {
        match says {
            Some(says) if says != tensors => {
                Err(format!("{} says {key} is {says}, the tensors say {tensors}", self.name))
            }
            _ => Ok(()),
        }
    }

    fn size_agrees(&self, key: &str, tensors: usize) -> Result<(), Problem> {
        self.agrees(key, self.usize(key)?, tensors)
    }

    /// The file says `expected`, the only kind of network there is here, or nothing.
    fn is(&self, key: &str, expected: &str) -> Result<(), Problem> {
        match self.values.get(key) {
            Some(value) if !value.is_null() && value.as_str() != Some(expected) => {
                Err(format!("{}: {key} is {value}, only \"{expected}\" is supported", self.name))
            }
            _ => Ok(()),
        }
    }
}

fn as_usize(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|value| value.try_into().ok())
}

/// Shapes by original-layout names, whatever the files call them.
struct Shapes<'a> {
    stored: &'a StoredShapes<'a>,
    entries: HashMap<String, Entry>,
}

impl<'a> Shapes<'a> {
    fn new(stored: &'a StoredShapes<'a>, entries: Vec<Entry>) -> Self {
        Self { stored, entries: entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect() }
    }

    fn get(&self, name: &str) -> Result<Vec<usize>, Problem> {
        let entry = self.entries.get(name).ok_or_else(|| format!("there is no tensor for {name}"))?;
        let mut whole: Option<Vec<usize>> = None;
        for stored in &entry.stored {
            let shape = self.stored.get(stored.as_str()).ok_or_else(|| format!("tensor {stored} is missing"))?;
            match &mut whole {
                None => whole = Some(shape.to_vec()),
                // Added without overflow: every shape was checked against the bytes of a file.
                Some(whole) if entry.rows == Rows::Concatenated && !whole.is_empty() && !shape.is_empty() => {
                    whole[0] = whole[0].saturating_add(shape[0]);
                }
                Some(_) => {}
            }
        }
        whole.ok_or_else(|| format!("there is no tensor for {name}"))
    }

    /// Dimension `dim` of tensor `name`, 1..=MAX_DIM.
    fn dim(&self, name: &str, dim: usize) -> Result<usize, Problem> {
        let shape = self.get(name)?;
        match shape.get(dim) {
            Some(&size) if (1..=MAX_DIM).contains(&size) => Ok(size),
            Some(&size) => Err(format!("tensor {name} has shape {shape:?}, and {size} is not in 1..={MAX_DIM}")),
            None => Err(format!("tensor {name} has shape {shape:?}, which has no dimension {dim}")),
        }
    }
}

/// One more than the highest N among the names `{prefix}{N}.…`.
fn count(stored: &StoredShapes<'_>, prefix: &str) -> usize {
    let number = |name: &&str| {
        let (number, _) = name.strip_prefix(prefix)?.split_once('.')?;
        // Four digits are more layers than any network has; longer ones end up among the unexpected tensors.
        (number.len() <= 4).then(|| number.parse::<usize>().ok())?
    };
    stored.keys().filter_map(number).max().map_or(0, |highest| highest + 1)
}

/// Sizes of the transformer and, in `problems`, where `config.json` contradicts them.
pub(super) fn dit(
    stored: &StoredShapes<'_>,
    naming: &Naming,
    config: Option<&ConfigFile>,
    problems: &mut Vec<Problem>,
) -> Result<DitConfig, Problem> {
    let num_layers = match naming {
        Naming::Original { prefix } => count(stored, &format!("{prefix}blocks.")),
        Naming::Diffusers => count(stored, "transformer_blocks."),
    };
    if num_layers == 0 {
        return Err("the transformer has no blocks".into());
    }
    let unsized_config = DitConfig {
        num_layers,
        num_heads: 0,
        head_dim: 0,
        hidden_x: 0,
        hidden_y: 0,
        ffn_x: 0,
        ffn_y: 0,
        in_channels: 0,
        text_dim: 0,
        time_dim: 0,
        pool_heads: POOL_HEADS,
    };
    let shapes = Shapes::new(stored, names::dit(&unsized_config, naming));
    let head_dim = shapes.dim("blocks.0.attn.q_norm_x.weight", 0)?;
    let qkv_rows = shapes.dim("blocks.0.attn.qkv_x.weight", 0)?;
    let c = DitConfig {
        head_dim,
        num_heads: qkv_rows / 3 / head_dim,
        hidden_x: shapes.dim("x_embedder.proj.weight", 0)?,
        in_channels: shapes.dim("x_embedder.proj.weight", 1)?,
        hidden_y: shapes.dim("t5_yproj.weight", 0)?,
        text_dim: shapes.dim("t5_yproj.weight", 1)?,
        time_dim: shapes.dim("t_embedder.mlp.0.weight", 1)?,
        ffn_x: shapes.dim("blocks.0.mlp_x.w2.weight", 1)?,
        // A single block is the last one, which has no text feed-forward.
        ffn_y: if num_layers > 1 { shapes.dim("blocks.0.mlp_y.w2.weight", 1)? } else { 0 },
        ..unsized_config
    };
    if qkv_rows != 3 * c.hidden_x || c.num_heads * head_dim != c.hidden_x || !head_dim.is_multiple_of(2) {
        return Err(format!("qkv_x has {qkv_rows} rows, which is not 3 · {} made of heads of {head_dim}", c.hidden_x));
    }
    if !c.text_dim.is_multiple_of(POOL_HEADS) || !c.time_dim.is_multiple_of(2) {
        return Err(format!(
            "text width {} has to divide by {POOL_HEADS} and timestep width {} by 2",
            c.text_dim, c.time_dim
        ));
    }
    if let Some(config) = config {
        let checks = [
            config.size_agrees("num_layers", c.num_layers),
            config.size_agrees("num_attention_heads", c.num_heads),
            config.size_agrees("attention_head_dim", c.head_dim),
            config.size_agrees("pooled_projection_dim", c.hidden_y),
            config.size_agrees("text_embed_dim", c.text_dim),
            config.size_agrees("time_embed_dim", c.time_dim),
            config.size_agrees("in_channels", c.in_channels),
            config.size_agrees("out_channels", c.in_channels),
            config.size_agrees("patch_size", 2),
            config.is("activation_fn", "swiglu"),
            config.is("qk_norm", "rms_norm"),
        ];
        problems.extend(checks.into_iter().filter_map(Result::err));
    }
    Ok(c)
}

/// Sizes of the VAE decoder. Expansions and latent statistics are those of `config.json`, else the published ones.
pub(super) fn vae(
    stored: &StoredShapes<'_>,
    naming: &Naming,
    config: Option<&ConfigFile>,
    problems: &mut Vec<Problem>,
) -> Result<VaeConfig, Problem> {
    let ups = match naming {
        Naming::Original { .. } => {
            (1..).take_while(|b| stored.contains_key(format!("blocks.{b}.proj.weight").as_str())).count()
        }
        Naming::Diffusers => count(stored, "decoder.up_blocks."),
    };
    if ups == 0 {
        return Err("the decoder has no up stages".into());
    }
    let out = ups + 1;
    let layers: Vec<usize> = match naming {
        Naming::Original { .. } => (0..=out)
            .map(|stage| match stage {
                // Index 0 is the first convolution.
                0 => count(stored, "blocks.0.").saturating_sub(1),
                _ if stage == out => count(stored, &format!("blocks.{out}.")),
                _ => count(stored, &format!("blocks.{stage}.blocks.")),
            })
            .collect(),
        Naming::Diffusers => (0..=out)
            .map(|stage| match stage {
                0 => count(stored, "decoder.block_in.resnets."),
                _ if stage == out => count(stored, "decoder.block_out.resnets."),
                _ => count(stored, &format!("decoder.up_blocks.{}.resnets.", stage - 1)),
            })
            .collect(),
    };

    let expansions = |key: &str, published: [usize; 3]| -> Result<Vec<usize>, Problem> {
        let mut list = match config.map(|config| config.sizes(key)).transpose()?.flatten() {
            // Stored in encoding order.
            Some(list) => list.into_iter().rev().collect(),
            None => published.to_vec(),
        };
        if list.len() != ups || list.iter().any(|&factor| !(1..=8).contains(&factor)) {
            return Err(format!("{key} {list:?} (decoding order) does not fit the decoder's {ups} up stages"));
        }
        list.shrink_to_fit();
        Ok(list)
    };
    let unsized_config = VaeConfig {
        latent_channels: 0,
        channels: vec![0; ups + 1],
        layers,
        temporal_expansions: expansions("temporal_expansions", TEMPORAL_EXPANSIONS)?,
        spatial_expansions: expansions("spatial_expansions", SPATIAL_EXPANSIONS)?,
        latents_mean: Vec::new(),
        latents_std: Vec::new(),
    };
    let shapes = Shapes::new(stored, names::vae(&unsized_config, naming));
    let latent_channels = shapes.dim("blocks.0.0.weight", 1)?;
    // Every stage's width is what its projection, or the output projection, takes in.
    let mut channels =
        (1..=ups).map(|b| shapes.dim(&format!("blocks.{b}.proj.weight"), 1)).collect::<Result<Vec<_>, _>>()?;
    channels.push(shapes.dim("output_proj.weight", 1)?);
    if let Some(width) = channels.iter().find(|width| !width.is_multiple_of(VAE_GROUPS)) {
        return Err(format!("the decoder has a stage of {width} channels, not a multiple of its {VAE_GROUPS} groups"));
    }
    for b in 0..ups {
        let rows = shapes.dim(&format!("blocks.{}.proj.weight", b + 1), 0)?;
        let (st, s) = (unsized_config.temporal_expansions[b], unsized_config.spatial_expansions[b]);
        if channels[b + 1].checked_mul(st * s * s) != Some(rows) {
            return Err(format!(
                "the projection of up stage {b} has {rows} rows, but expansions {st} (time) and {s} (space) of {} channels need {}",
                channels[b + 1],
                channels[b + 1].saturating_mul(st * s * s)
            ));
        }
    }

    let numbers = |key: &str, published: &[f64]| -> Result<Vec<f64>, Problem> {
        let list = config.map(|config| config.numbers(key)).transpose()?.flatten();
        let list = list.unwrap_or_else(|| published.to_vec());
        if list.len() == latent_channels {
            Ok(list)
        } else {
            Err(format!("{key} has {} values for {latent_channels} latent channels", list.len()))
        }
    };
    let scaling = config.map(|config| config.value("scaling_factor", "a number", Value::as_f64)).transpose()?.flatten();
    let mut latents_std = numbers("latents_std", &LATENTS_STD)?;
    // z·std/scaling_factor + mean.
    latents_std.iter_mut().for_each(|std| *std /= scaling.unwrap_or(1.0));
    let latents_mean = numbers("latents_mean", &LATENTS_MEAN)?;
    if latents_std.iter().any(|&std| !(std.is_finite() && std > 0.0))
        || latents_mean.iter().any(|mean| !mean.is_finite())
    {
        return Err("latents_std has to be positive and finite, latents_mean finite".into());
    }

    let c = VaeConfig { latent_channels, channels, latents_mean, latents_std, ..unsized_config };
    if let Some(config) = config {
        let reversed = |key: &str, tensors: &[usize]| {
            let says = config.sizes(key)?.map(|list| format!("{list:?}"));
            config.agrees(key, says, format!("{:?}", tensors.iter().rev().collect::<Vec<_>>()))
        };
        let checks = [
            reversed("decoder_block_out_channels", &c.channels),
            reversed("layers_per_block", &c.layers),
            config.size_agrees("latent_channels", c.latent_channels),
            config.size_agrees("out_channels", 3),
            config.is("act_fn", "silu"),
        ];
        problems.extend(checks.into_iter().filter_map(Result::err));
    }
    Ok(c)
}

/// Sizes of the text encoder. Only the layer norm's epsilon is taken from `config.json`.
pub(super) fn t5(
    stored: &StoredShapes<'_>,
    embedding: &str,
    config: Option<&ConfigFile>,
    problems: &mut Vec<Problem>,
) -> Result<T5Config, Problem> {
    let num_layers = count(stored, "encoder.block.");
    if num_layers == 0 {
        return Err("the text encoder has no blocks".into());
    }
    let unsized_config = T5Config {
        vocab_size: 0,
        d_model: 0,
        num_heads: 0,
        d_kv: 0,
        d_ff: 0,
        num_layers,
        relative_attention_num_buckets: 0,
        layer_norm_epsilon: 0.0,
    };
    let shapes = Shapes::new(stored, names::t5(&unsized_config, embedding));
    let attention = "encoder.block.0.layer.0.SelfAttention";
    let inner = shapes.dim(&format!("{attention}.q.weight"), 0)?;
    let num_heads = shapes.dim(&format!("{attention}.relative_attention_bias.weight"), 1)?;
    if !inner.is_multiple_of(num_heads) {
        return Err(format!("the attention width {inner} does not divide into {num_heads} heads"));
    }
    let epsilon = match config {
        Some(config) => config.value("layer_norm_epsilon", "a number", Value::as_f64)?,
        None => None,
    };
    let c = T5Config {
        vocab_size: shapes.dim(names::T5_EMBEDDING[0], 0)?,
        d_model: shapes.dim(names::T5_EMBEDDING[0], 1)?,
        num_heads,
        d_kv: inner / num_heads,
        d_ff: shapes.dim("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0)?,
        relative_attention_num_buckets: shapes.dim(&format!("{attention}.relative_attention_bias.weight"), 0)?,
        layer_norm_epsilon: epsilon.unwrap_or(1e-6),
        ..unsized_config
    };
    if c.relative_attention_num_buckets != T5_BUCKETS {
        let buckets = c.relative_attention_num_buckets;
        return Err(format!("the relative position table has {buckets} buckets, only {T5_BUCKETS} are supported"));
    }
    if !(c.layer_norm_epsilon > 0.0 && c.layer_norm_epsilon < 1.0) {
        return Err(format!("layer_norm_epsilon is {}", c.layer_norm_epsilon));
    }
    if let Some(config) = config {
        let checks = [
            config.size_agrees("vocab_size", c.vocab_size),
            config.size_agrees("d_model", c.d_model),
            config.size_agrees("num_heads", c.num_heads),
            config.size_agrees("d_kv", c.d_kv),
            config.size_agrees("d_ff", c.d_ff),
            config.size_agrees("num_layers", c.num_layers),
            config.size_agrees("relative_attention_num_buckets", c.relative_attention_num_buckets),
            config.size_agrees("relative_attention_max_distance", T5_MAX_DISTANCE),
            config.is("feed_forward_proj", "gated-gelu"),
        ];
        problems.extend(checks.into_iter().filter_map(Result::err));
    }
    Ok(c)
}
