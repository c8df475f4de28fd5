//! Operations of the VAE decoder.

use candle_core::Tensor;

use crate::engine::{EngineError, RawTensor, Result};

/// A packed convolution. Public only because it is the engine's associated type; the module is private.
pub struct PackedConv {}

fn missing<T>(op: &'static str) -> Result<T> {
    Err(EngineError::Backend { op, message: "not part of this build".into() })
}

pub(super) fn pack_conv(_weight: RawTensor<'_>, _bias: RawTensor<'_>) -> Result<PackedConv> {
    missing("conv_weight")
}

pub(super) fn causal_conv3d(_x: &Tensor, _w: &PackedConv, _cache: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    missing("causal_conv3d")
}

pub(super) fn group_norm_silu(_x: &Tensor, _weight: &Tensor, _bias: &Tensor, _groups: usize) -> Result<Tensor> {
    missing("group_norm_silu")
}

pub(super) fn depth_to_space_time(_x: &Tensor, _st: usize, _s: usize, _drop: usize) -> Result<Tensor> {
    missing("depth_to_space_time")
}

pub(super) fn denormalize_latent(_latent: &Tensor, _mean: &[f32], _std: &[f32]) -> Result<Tensor> {
    missing("denormalize_latent")
}

pub(super) fn to_rgb8(_x: &Tensor) -> Result<Vec<u8>> {
    missing("to_rgb8")
}
