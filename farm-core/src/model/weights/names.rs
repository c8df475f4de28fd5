//! Every tensor of the three networks: its name in the original layout (which model code uses), its shape, and where
//! each layout stores it. The mapping between the layouts is this table and nothing else.

use crate::model::config::{DitConfig, T5Config, VaeConfig};

/// How a layout's stored tensors make up the original one, along dimension 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rows {
    /// Stored as it is.
    Whole,
    /// Stored in equal parts, in order: q, k, v.
    Concatenated,
    /// Stored with its halves exchanged.
    HalvesSwapped,
}

/// One tensor of a network.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Name in the original layout.
    pub name: String,
    /// Shape in the original layout.
    pub shape: Vec<usize>,
    /// Names in the file, more than one for [`Rows::Concatenated`].
    pub stored: Vec<String>,
    pub rows: Rows,
}

/// Which names the files use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// With the prefix that repackaged single files put before every name; mostly empty.
    Original {
        prefix: String,
    },
    Diffusers,
}

struct Table<'a> {
    naming: &'a Naming,
    entries: Vec<Entry>,
}

impl Table<'_> {
    fn push(&mut self, name: String, diffusers: Vec<String>, rows: Rows, shape: &[usize]) {
        let (stored, rows) = match self.naming {
            Naming::Original { prefix } => (vec![format!("{prefix}{name}")], Rows::Whole),
            Naming::Diffusers => (diffusers, rows),
        };
        self.entries.push(Entry { name, shape: shape.to_vec(), stored, rows });
    }

    /// `{name}.weight`.
    fn weight(&mut self, name: &str, diffusers: &str, rows: Rows, shape: &[usize]) {
        self.push(format!("{name}.weight"), vec![format!("{diffusers}.weight")], rows, shape);
    }

    /// `{name}.weight` and a `{name}.bias` as long as the weight's dimension 0.
    fn both(&mut self, name: &str, diffusers: &str, rows: Rows, shape: &[usize]) {
        self.weight(name, diffusers, rows, shape);
        self.push(format!("{name}.bias"), vec![format!("{diffusers}.bias")], rows, &shape[..1]);
    }
}

/// The transformer. Names depend on nothing but the number of layers.
pub(super) fn dit(c: &DitConfig, naming: &Naming) -> Vec<Entry> {
    use Rows::{Concatenated, HalvesSwapped, Whole};
    let mut t = Table { naming, entries: Vec::new() };
    let (x, y, text) = (c.hidden_x, c.hidden_y, c.text_dim);

    t.push("pos_frequencies".into(), vec!["pos_frequencies".into()], Whole, &[3, c.num_heads, c.head_dim / 2]);
    t.both("x_embedder.proj", "patch_embed.proj", Whole, &[x, c.in_channels, 2, 2]);
    t.both("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1", Whole, &[x, c.time_dim]);
    t.both("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2", Whole, &[x, x]);
    t.both("t5_y_embedder.to_kv", "time_embed.pooler.to_kv", Whole, &[2 * text, text]);
    t.both("t5_y_embedder.to_q", "time_embed.pooler.to_q", Whole, &[text, text]);
    t.both("t5_y_embedder.to_out", "time_embed.pooler.to_out", Whole, &[x, text]);
    t.both("t5_yproj", "time_embed.caption_proj", Whole, &[y, text]);

    for i in 0..c.num_layers {
        let last = i + 1 == c.num_layers;
        let (a, b) = (format!("blocks.{i}"), format!("transformer_blocks.{i}"));
        let n = |name: &str| format!("{a}.{name}");
        let d = |name: &str| format!("{b}.{name}");
        t.both(&n("mod_x"), &d("norm1.linear"), Whole, &[4 * x, x]);
        // The last block modulates its text once, and each class calls that layer by another name.
        if last {
            t.both(&n("mod_y"), &d("norm1_context.linear_1"), Whole, &[y, x]);
        } else {
            t.both(&n("mod_y"), &d("norm1_context.linear"), Whole, &[4 * y, x]);
        }
        for (name, parts, width) in [
            ("attn.qkv_x.weight", ["to_q", "to_k", "to_v"], x),
            ("attn.qkv_y.weight", ["add_q_proj", "add_k_proj", "add_v_proj"], y),
        ] {
            let stored = parts.map(|part| d(&format!("attn1.{part}.weight"))).to_vec();
            t.push(n(name), stored, Concatenated, &[3 * x, width]);
        }
        for (name, diffusers) in
            [("q_norm_x", "norm_q"), ("k_norm_x", "norm_k"), ("q_norm_y", "norm_added_q"), ("k_norm_y", "norm_added_k")]
        {
            t.weight(&n(&format!("attn.{name}")), &d(&format!("attn1.{diffusers}")), Whole, &[c.head_dim]);
        }
        t.both(&n("attn.proj_x"), &d("attn1.to_out.0"), Whole, &[x, x]);
        t.weight(&n("mlp_x.w1"), &d("ff.net.0.proj"), HalvesSwapped, &[2 * c.ffn_x, x]);
        t.weight(&n("mlp_x.w2"), &d("ff.net.2"), Whole, &[x, c.ffn_x]);
        if !last {
            t.both(&n("attn.proj_y"), &d("attn1.to_add_out"), Whole, &[y, x]);
            t.weight(&n("mlp_y.w1"), &d("ff_context.net.0.proj"), HalvesSwapped, &[2 * c.ffn_y, y]);
            t.weight(&n("mlp_y.w2"), &d("ff_context.net.2"), Whole, &[y, c.ffn_y]);
        }
    }

    t.both("final_layer.mod", "norm_out.linear", HalvesSwapped, &[2 * x, x]);
    t.both("final_layer.linear", "proj_out", Whole, &[4 * c.in_channels, x]);
    t.entries
}

/// The VAE decoder. Names depend on nothing but `layers`.
pub(super) fn vae(c: &VaeConfig, naming: &Naming) -> Vec<Entry> {
    use Rows::Whole;
    let mut t = Table { naming, entries: Vec::new() };
    let ups = c.channels.len() - 1;

    let res_blocks =
        |t: &mut Table<'_>, count: usize, name: &dyn Fn(usize) -> String, diffusers: &str, width: usize| {
            for i in 0..count {
                let (a, b) = (name(i), format!("{diffusers}.resnets.{i}"));
                t.both(&format!("{a}.stack.0"), &format!("{b}.norm1.norm_layer"), Whole, &[width]);
                t.both(&format!("{a}.stack.2"), &format!("{b}.conv1.conv"), Whole, &[width, width, 3, 3, 3]);
                t.both(&format!("{a}.stack.3"), &format!("{b}.norm2.norm_layer"), Whole, &[width]);
                t.both(&format!("{a}.stack.5"), &format!("{b}.conv2.conv"), Whole, &[width, width, 3, 3, 3]);
            }
        };

    t.both("blocks.0.0", "decoder.conv_in", Whole, &[c.channels[0], c.latent_channels, 1, 1, 1]);
    res_blocks(&mut t, c.layers[0], &|i| format!("blocks.0.{}", i + 1), "decoder.block_in", c.channels[0]);
    for b in 0..ups {
        let (name, diffusers) = (format!("blocks.{}", b + 1), format!("decoder.up_blocks.{b}"));
        res_blocks(&mut t, c.layers[b + 1], &|i| format!("{name}.blocks.{i}"), &diffusers, c.channels[b]);
        let rows = c.channels[b + 1] * c.temporal_expansions[b] * c.spatial_expansions[b] * c.spatial_expansions[b];
        t.both(&format!("{name}.proj"), &format!("{diffusers}.proj"), Whole, &[rows, c.channels[b]]);
    }
    let out = ups + 1;
    res_blocks(&mut t, c.layers[out], &|i| format!("blocks.{out}.{i}"), "decoder.block_out", c.channels[ups]);
    t.both("output_proj", "decoder.proj_out", Whole, &[3, c.channels[ups]]);
    t.entries
}

/// The embedding table's two names; files may have either, or both for the same values.
pub(super) const T5_EMBEDDING: [&str; 2] = ["shared.weight", "encoder.embed_tokens.weight"];

/// The text encoder, which has one layout. `embedding` is the name under which the file stores `shared.weight`.
pub(super) fn t5(c: &T5Config, embedding: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut push = |name: String, stored: &str, shape: &[usize]| {
        let stored = vec![stored.to_string()];
        entries.push(Entry { name, shape: shape.to_vec(), stored, rows: Rows::Whole });
    };
    let inner = c.num_heads * c.d_kv;
    push(T5_EMBEDDING[0].into(), embedding, &[c.vocab_size, c.d_model]);
    for i in 0..c.num_layers {
        let block = format!("encoder.block.{i}.layer");
        let attention = format!("{block}.0.SelfAttention");
        let feed_forward = format!("{block}.1.DenseReluDense");
        let mut weight = |name: String, shape: &[usize]| push(name.clone(), &name, shape);
        for projection in ["q", "k", "v"] {
            weight(format!("{attention}.{projection}.weight"), &[inner, c.d_model]);
        }
        weight(format!("{attention}.o.weight"), &[c.d_model, inner]);
        if i == 0 {
            let shape = [c.relative_attention_num_buckets, c.num_heads];
            weight(format!("{attention}.relative_attention_bias.weight"), &shape);
        }
        weight(format!("{block}.0.layer_norm.weight"), &[c.d_model]);
        weight(format!("{feed_forward}.wi_0.weight"), &[c.d_ff, c.d_model]);
        weight(format!("{feed_forward}.wi_1.weight"), &[c.d_ff, c.d_model]);
        weight(format!("{feed_forward}.wo.weight"), &[c.d_model, c.d_ff]);
        weight(format!("{block}.1.layer_norm.weight"), &[c.d_model]);
    }
    let name = "encoder.final_layer_norm.weight";
    push(name.into(), name, &[c.d_model]);
    entries
}
