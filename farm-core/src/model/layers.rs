//! Layers that several parts are made of.

use crate::engine::{Engine, Over};
use crate::model::ModelError;
use crate::model::weights::Tensors;

/// A look at the values inside a network, by the names of the reference tensors (`block0.x`, …). Called for every value
/// of note in the order of computation; costs nothing but the call.
pub type Observer<'a, T> = &'a mut dyn FnMut(&str, &T);

/// `x · Wᵀ (+ b)`.
pub(crate) struct Linear<E: Engine> {
    weight: E::Matrix,
    bias: Option<E::Tensor>,
}

impl<E: Engine> Linear<E> {
    /// `{prefix}.weight` `[out, input]` and `{prefix}.bias` `[out]`.
    pub fn load(
        loader: &dyn Tensors<E>,
        prefix: &str,
        out: usize,
        input: usize,
        over: Over,
    ) -> Result<Self, ModelError> {
        let bias = loader.tensor(&format!("{prefix}.bias"), &[out])?;
        Ok(Linear { bias: Some(bias), ..Self::load_without_bias(loader, prefix, out, input, over)? })
    }

    /// `{prefix}.weight` `[out, input]`.
    pub fn load_without_bias(
        loader: &dyn Tensors<E>,
        prefix: &str,
        out: usize,
        input: usize,
        over: Over,
    ) -> Result<Self, ModelError> {
        Ok(Linear { weight: loader.matrix(&format!("{prefix}.weight"), &[out, input], over)?, bias: None })
    }

    /// `{prefix}.weight` `[out, channels, 2, 2]`, a convolution of 2×2 patches, as a matrix over `channels · 4` values.
    pub fn load_patches(
        loader: &dyn Tensors<E>,
        prefix: &str,
        out: usize,
        channels: usize,
    ) -> Result<Self, ModelError> {
        let weight = loader.matrix(&format!("{prefix}.weight"), &[out, channels, 2, 2], Over::Few)?;
        let bias = loader.tensor(&format!("{prefix}.bias"), &[out])?;
        Ok(Linear { weight, bias: Some(bias) })
    }

    /// `[rows, input]` → `[rows, out]`, or `[input]` → `[out]`.
    pub fn apply(&self, engine: &E, x: &E::Tensor) -> Result<E::Tensor, ModelError> {
        Ok(engine.linear(x, &self.weight, self.bias.as_ref())?)
    }

    pub fn bias(&self) -> Option<&E::Tensor> {
        self.bias.as_ref()
    }
}

/// SwiGLU: `w2 · (silu(a) ⊙ g)` with `[a ‖ g] = w1 · x`, no bias.
pub(crate) struct FeedForward<E: Engine> {
    w1: E::Matrix,
    w2: Linear<E>,
}

impl<E: Engine> FeedForward<E> {
    /// `{prefix}.w1` `[2·hidden, width]` and `{prefix}.w2` `[width, hidden]`.
    pub fn load(
        loader: &dyn Tensors<E>,
        prefix: &str,
        width: usize,
        hidden: usize,
        over: Over,
    ) -> Result<Self, ModelError> {
        Ok(FeedForward {
            w1: loader.matrix(&format!("{prefix}.w1.weight"), &[2 * hidden, width], over)?,
            w2: Linear::load_without_bias(loader, &format!("{prefix}.w2"), width, hidden, over)?,
        })
    }

    /// Takes `x`, which nothing reads after the first product.
    pub fn apply(&self, engine: &E, x: E::Tensor) -> Result<E::Tensor, ModelError> {
        let hidden = engine.linear_swiglu(&x, &self.w1)?;
        drop(x);
        self.w2.apply(engine, &hidden)
    }
}

/// A modulation: a projection of the conditioning, cut into `N` vectors.
pub(crate) struct Modulation<E: Engine, const N: usize> {
    projection: Linear<E>,
    width: usize,
}

impl<E: Engine, const N: usize> Modulation<E, N> {
    /// `{prefix}` projects `input` to `N · width`.
    pub fn load(loader: &dyn Tensors<E>, prefix: &str, width: usize, input: usize) -> Result<Self, ModelError> {
        Ok(Modulation { projection: Linear::load(loader, prefix, N * width, input, Over::Few)?, width })
    }

    /// `silu(c)` `[input]` → the vectors `[width]` in stored order.
    pub fn apply(&self, engine: &E, conditioning: &E::Tensor) -> Result<[E::Tensor; N], ModelError> {
        let all = self.projection.apply(engine, conditioning)?;
        let mut parts = Vec::with_capacity(N);
        for i in 0..N {
            parts.push(engine.narrow(&all, 0, i * self.width, self.width)?);
        }
        // As many as were pushed.
        parts.try_into().map_err(|_| ModelError::Input(format!("modulation has not {N} parts")))
    }
}
