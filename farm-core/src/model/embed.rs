//! Embeddings that come before the blocks: timestep and pooled caption.

use crate::engine::{Engine, Over};
use crate::model::ModelError;
use crate::model::config::DitConfig;
use crate::model::layers::Linear;
use crate::model::weights::Loader;

/// Sinusoid of the timestep, then a two-layer perceptron.
pub(super) struct TimestepEmbedder<E: Engine> {
    linear_1: Linear<E>,
    linear_2: Linear<E>,
    width: usize,
}

impl<E: Engine> TimestepEmbedder<E> {
    pub fn load(loader: &Loader<'_, E>, config: &DitConfig) -> Result<Self, ModelError> {
        let (width, d) = (config.time_dim, config.hidden_x);
        Ok(TimestepEmbedder {
            linear_1: Linear::load(loader, "t_embedder.mlp.0", d, width, Over::Few)?,
            linear_2: Linear::load(loader, "t_embedder.mlp.2", d, d, Over::Few)?,
            width,
        })
    }

    /// `[hidden_x]` of a timestep in 0..=1000.
    pub fn apply(&self, engine: &E, timestep: f32) -> Result<E::Tensor, ModelError> {
        let sinusoid = engine.upload(&sinusoid(timestep, self.width), &[self.width])?;
        let hidden = engine.silu(&self.linear_1.apply(engine, &sinusoid)?)?;
        self.linear_2.apply(engine, &hidden)
    }
}

/// `[cos(t·f) ‖ sin(t·f)]` with `f_i = 10000^(−i / half)`. Frequencies and angles are f32 like the reference's; at
/// t = 1000 an ulp of the frequency is 6e-5 of angle.
fn sinusoid(timestep: f32, width: usize) -> Vec<f32> {
    let half = width / 2;
    let angle = |i: usize| {
        let exponent = -(10_000f64.ln() as f32) * i as f32 / half as f32;
        f64::from(timestep * f64::from(exponent).exp() as f32)
    };
    let cos = (0..half).map(|i| angle(i).cos() as f32);
    cos.chain((0..half).map(|i| angle(i).sin() as f32)).collect()
}

/// Attention pooling of the caption: one query, the mean of the tokens, over the mean and the tokens.
pub(super) struct CaptionPool<E: Engine> {
    to_kv: Linear<E>,
    to_q: Linear<E>,
    to_out: Linear<E>,
    heads: usize,
    width: usize,
}

impl<E: Engine> CaptionPool<E> {
    pub fn load(loader: &Loader<'_, E>, config: &DitConfig) -> Result<Self, ModelError> {
        let width = config.text_dim;
        Ok(CaptionPool {
            to_kv: Linear::load(loader, "t5_y_embedder.to_kv", 2 * width, width, Over::Few)?,
            to_q: Linear::load(loader, "t5_y_embedder.to_q", width, width, Over::Few)?,
            to_out: Linear::load(loader, "t5_y_embedder.to_out", config.hidden_x, width, Over::Few)?,
            heads: config.pool_heads,
            width,
        })
    }

    /// `[hidden_x]` of the features `[tokens, text_dim]`; no tokens gives the constant of the null branch.
    pub fn apply(&self, engine: &E, features: Option<&E::Tensor>) -> Result<E::Tensor, ModelError> {
        let Some(features) = features else {
            // The query sees its own key only, a zero row, so the output is the value's bias.
            let Some(bias) = self.to_kv.bias() else {
                return Err(ModelError::Input("caption pooling has no bias".into()));
            };
            return self.to_out.apply(engine, &engine.narrow(bias, 0, self.width, self.width)?);
        };
        let mean = engine.upload(&mean_row(&engine.download(features)?, self.width), &[self.width])?;
        let rows = engine.concat(&[&engine.reshape(&mean, &[1, self.width])?, features], 0)?;
        let tokens = engine.shape(&rows)[0];
        let head_dim = self.width / self.heads;
        let by_head = |x: &E::Tensor, rows| engine.reshape(x, &[rows, self.heads, head_dim]);
        let kv = self.to_kv.apply(engine, &rows)?;
        let k = by_head(&engine.narrow(&kv, 1, 0, self.width)?, tokens)?;
        let v = by_head(&engine.narrow(&kv, 1, self.width, self.width)?, tokens)?;
        let q = by_head(&self.to_q.apply(engine, &mean)?, 1)?;
        let pooled = engine.attention(&q, &[&k], &[&v])?.out;
        self.to_out.apply(engine, &engine.reshape(&pooled, &[self.width])?)
    }
}

/// Mean of rows of `width` values, summed in f64. Once per prompt, so it is no engine operation.
fn mean_row(rows: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0f64; width];
    for row in rows.chunks_exact(width) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    let count = (rows.len() / width) as f64;
    sums.into_iter().map(|sum| (sum / count) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sinusoid_is_cos_then_sin_from_the_fastest_frequency() {
        let e = sinusoid(2.0, 8);
        assert_eq!(e[0], 2f32.cos());
        assert_eq!(e[4], 2f32.sin());
        assert!((f64::from(e[1]) - (2.0 * 10f64.powi(-1)).cos()).abs() < 1e-6);
        assert_eq!(sinusoid(0.0, 4), [1.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn mean_row_is_per_channel() {
        assert_eq!(mean_row(&[1.0, 2.0, 3.0, 6.0], 2), [2.0, 4.0]);
    }
}
