//! T5 v1.1 encoder: prompt ids → features.
//!
//! Runs on the ids without padding: padded positions would be masked as keys and never read, so leaving them out gives
//! the same rows.

use std::sync::Arc;

use crate::engine::{Engine, Over};
use crate::model::ModelError;
use crate::model::config::T5Config;
use crate::model::layers::{Linear, Observer};
use crate::model::weights::{Loader, Tensors, WeightSource};

/// Buckets that [`bucket`] knows: half for keys after the query, in each half 8 exact distances and 8 growing ranges.
const BUCKETS: usize = 32;

/// Weights of the encoder.
pub struct T5Encoder<E: Engine> {
    /// Where the embedding table stays: a prompt needs as many of its rows as it has ids, and they are read when it comes.
    source: Arc<dyn WeightSource>,
    config: T5Config,
    /// `[BUCKETS, heads]`, kept on the host: every prompt length has a bias of its own.
    relative_bias: Vec<f32>,
    /// Empty if each is loaded when it is used.
    blocks: Vec<T5Block<E>>,
    final_norm: E::Tensor,
    heads: usize,
    eps: f32,
}

struct T5Block<E: Engine> {
    attention_norm: E::Tensor,
    q: Linear<E>,
    k: Linear<E>,
    v: Linear<E>,
    o: Linear<E>,
    ffn_norm: E::Tensor,
    wi_0: Linear<E>,
    wi_1: Linear<E>,
    wo: Linear<E>,
}

impl<E: Engine> T5Encoder<E> {
    /// Loads all but the embedding table; the encoder keeps `source` for that.
    pub fn load(engine: &E, source: Arc<dyn WeightSource>, config: &T5Config) -> Result<Self, ModelError> {
        let loader = &Loader { engine, source: &*source };
        let blocks = (0..config.num_layers).map(|i| T5Block::load(loader, config, i)).collect::<Result<_, _>>()?;
        Ok(T5Encoder { blocks, ..Self::open(engine, source, config)? })
    }

    /// Loads nothing large: every [`T5Encoder::encode_all`] loads block by block and drops each after its use. For who has
    /// few prompts, or no memory for all blocks at once.
    pub fn open(engine: &E, source: Arc<dyn WeightSource>, config: &T5Config) -> Result<Self, ModelError> {
        let loader = &Loader { engine, source: &*source };
        if config.relative_attention_num_buckets != BUCKETS {
            return Err(ModelError::Input(format!(
                "text encoder has {} relative position buckets, only {BUCKETS} are known",
                config.relative_attention_num_buckets
            )));
        }
        let table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        let relative_bias = loader.tensor(table, &[BUCKETS, config.num_heads])?;
        Ok(T5Encoder {
            relative_bias: engine.download(&relative_bias)?,
            blocks: Vec::new(),
            final_norm: loader.tensor("encoder.final_layer_norm.weight", &[config.d_model])?,
            source: source.clone(),
            config: config.clone(),
            heads: config.num_heads,
            eps: config.layer_norm_epsilon as f32,
        })
    }

    /// Features `[ids, d_model]` of a prompt's ids without padding.
    pub fn encode(&self, engine: &E, ids: &[u32]) -> Result<E::Tensor, ModelError> {
        self.encode_observed(engine, ids, &mut |_, _| {})
    }

    /// As [`T5Encoder::encode`] of several prompts, which go through each block one after the other.
    pub fn encode_all(&self, engine: &E, prompts: &[&[u32]]) -> Result<Vec<E::Tensor>, ModelError> {
        self.run(engine, prompts, &mut |_, _| {})
    }

    /// As [`T5Encoder::encode`]; shows the output of every block as `block{i}` and the features as `out`.
    pub fn encode_observed(
        &self,
        engine: &E,
        ids: &[u32],
        observe: Observer<'_, E::Tensor>,
    ) -> Result<E::Tensor, ModelError> {
        let mut features = self.run(engine, &[ids], observe)?;
        features.pop().ok_or_else(|| ModelError::Input("a prompt has features".into()))
    }

    /// Shows what it makes of each prompt in turn.
    fn run(
        &self,
        engine: &E,
        prompts: &[&[u32]],
        observe: Observer<'_, E::Tensor>,
    ) -> Result<Vec<E::Tensor>, ModelError> {
        if prompts.iter().any(|ids| ids.is_empty()) {
            return Err(ModelError::Input("a prompt without any token cannot be encoded".into()));
        }
        let config = &self.config;
        let &T5Config { vocab_size, d_model, num_layers, .. } = config;
        if let Some(id) = prompts.iter().copied().flatten().find(|id| **id as usize >= vocab_size) {
            return Err(ModelError::Input(format!(
                "token id {id} is outside the text encoder's vocabulary of {vocab_size}: the tokenizer belongs to \
                 another checkpoint"
            )));
        }
        let loader = Loader { engine, source: &*self.source };
        let mut streams = Vec::with_capacity(prompts.len());
        for ids in prompts {
            let bias = engine.upload(&self.position_bias(ids.len()), &[self.heads, ids.len(), ids.len()])?;
            streams.push((loader.rows("shared.weight", [vocab_size, d_model], ids)?, bias));
        }
        for i in 0..num_layers {
            let mut loaded = None;
            let block = match self.blocks.get(i) {
                Some(block) => block,
                None => &*loaded.insert(T5Block::load(&loader, config, i)?),
            };
            for (x, bias) in &mut streams {
                *x = block.forward(engine, x, bias, self.heads, self.eps)?;
                observe(&format!("block{i}"), x);
            }
        }
        let mut features = Vec::with_capacity(prompts.len());
        for (x, _) in streams {
            let out = engine.rms_norm(&x, &self.final_norm, self.eps)?;
            observe("out", &out);
            features.push(out);
        }
        Ok(features)
    }

    /// Bias `[heads, query, key]` of a prompt of `len` ids; every block adds the same.
    fn position_bias(&self, len: usize) -> Vec<f32> {
        let mut bias = Vec::with_capacity(self.heads * len * len);
        for head in 0..self.heads {
            for query in 0..len {
                bias.extend((0..len).map(|key| self.relative_bias[bucket(query, key) * self.heads + head]));
            }
        }
        bias
    }
}

impl<E: Engine> T5Block<E> {
    fn load(loader: &Loader<'_, E>, config: &T5Config, block: usize) -> Result<Self, ModelError> {
        let (d, inner) = (config.d_model, config.num_heads * config.d_kv);
        let (attention, ffn) = (format!("encoder.block.{block}.layer.0"), format!("encoder.block.{block}.layer.1"));
        let linear = |name: String, out, input| Linear::load_without_bias(loader, &name, out, input, Over::Encoder);
        Ok(T5Block {
            attention_norm: loader.tensor(&format!("{attention}.layer_norm.weight"), &[d])?,
            q: linear(format!("{attention}.SelfAttention.q"), inner, d)?,
            k: linear(format!("{attention}.SelfAttention.k"), inner, d)?,
            v: linear(format!("{attention}.SelfAttention.v"), inner, d)?,
            o: linear(format!("{attention}.SelfAttention.o"), d, inner)?,
            ffn_norm: loader.tensor(&format!("{ffn}.layer_norm.weight"), &[d])?,
            wi_0: linear(format!("{ffn}.DenseReluDense.wi_0"), config.d_ff, d)?,
            wi_1: linear(format!("{ffn}.DenseReluDense.wi_1"), config.d_ff, d)?,
            wo: linear(format!("{ffn}.DenseReluDense.wo"), d, config.d_ff)?,
        })
    }

    fn forward(
        &self,
        engine: &E,
        x: &E::Tensor,
        bias: &E::Tensor,
        heads: usize,
        eps: f32,
    ) -> Result<E::Tensor, ModelError> {
        let normed = engine.rms_norm(x, &self.attention_norm, eps)?;
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|projection| projection.apply(engine, &normed));
        let attended = engine.t5_attention(&q?, &k?, &v?, bias, heads)?;
        let x = engine.add(x, &self.o.apply(engine, &attended)?)?;

        let normed = engine.rms_norm(&x, &self.ffn_norm, eps)?;
        let hidden = engine.gelu_gated(&self.wi_0.apply(engine, &normed)?, &self.wi_1.apply(engine, &normed)?)?;
        Ok(engine.add(&x, &self.wo.apply(engine, &hidden)?)?)
    }
}

/// Bucket of the relative position `key − query`. Thresholds are integers, so that no platform's logarithm can move one.
fn bucket(query: usize, key: usize) -> usize {
    let base = if key > query { BUCKETS / 2 } else { 0 };
    let distance = key.abs_diff(query);
    // First distance of buckets 8 to 15.
    const STARTS: [usize; 8] = [8, 12, 16, 23, 32, 46, 64, 91];
    base + if distance < 8 { distance } else { 7 + STARTS.iter().filter(|start| distance >= **start).count() }
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn buckets_are_the_published_table() {
        let ranges = [(8, 11), (12, 15), (16, 22), (23, 31), (32, 45), (46, 63), (64, 90), (91, 255)];
        for (i, (first, last)) in ranges.into_iter().enumerate() {
            for distance in first..=last {
                assert_eq!(bucket(distance, 0), 8 + i, "key {distance} before the query");
                assert_eq!(bucket(0, distance), 24 + i, "key {distance} after the query");
            }
        }
        for distance in 0..8 {
            assert_eq!(bucket(distance, 0), distance);
            assert_eq!(bucket(0, distance), if distance > 0 { 16 + distance } else { 0 });
        }
    }
}
