//! The engine over a device: the traits' methods, each one function of [`super::ops`].

use std::ops::Range;
use std::sync::Arc;

use super::device::Device;
use super::gpu::Gpu;
use super::ops::{attention, pointwise, product, rows, volume, weights};
use super::parking;
use super::tensor::Tensor;
use crate::engine::{
    AttentionOut, ConvCache, Draw, Engine, Over, Port, Qkv, RawTensor, Result, RopeTable, SequenceOps,
};
use crate::precision::Precision;
use crate::tiles::statistics::{Sums, Totals};

/// One GPU.
pub struct CudaEngine<D: Device> {
    gpu: Gpu<D>,
}

impl<D: Device> CudaEngine<D> {
    pub fn new(device: Arc<D>, precision: Precision) -> Self {
        Self { gpu: Gpu::new(device, precision) }
    }

    pub fn device(&self) -> &Arc<D> {
        &self.gpu.device
    }
}

/// Tensors go from one GPU's memory to another's when they are taken.
struct OtherMemory<D: Device>(Arc<D>);

impl<D: Device> Port<Tensor<D>> for OtherMemory<D> {
    fn hand(&self, x: &Tensor<D>) -> Result<Tensor<D>> {
        x.handed()
    }

    fn take(&self, x: Tensor<D>) -> Result<Tensor<D>> {
        x.taken(&self.0)
    }
}

impl<D: Device> SequenceOps for CudaEngine<D> {
    type Tensor = Tensor<D>;

    fn port(&self) -> Option<Arc<dyn Port<Tensor<D>>>> {
        Some(Arc::new(OtherMemory(self.gpu.device.clone())))
    }

    fn reshape(&self, x: &Tensor<D>, shape: &[usize]) -> Result<Tensor<D>> {
        pointwise::reshape(&self.gpu, x, shape)
    }

    fn narrow(&self, x: &Tensor<D>, dim: usize, start: usize, len: usize) -> Result<Tensor<D>> {
        pointwise::narrow(&self.gpu, x, dim, start, len)
    }

    fn concat(&self, parts: &[&Tensor<D>], dim: usize) -> Result<Tensor<D>> {
        pointwise::concat(&self.gpu, parts, dim)
    }

    fn to_bytes(&self, x: &Tensor<D>) -> Result<Vec<u8>> {
        pointwise::to_bytes(&self.gpu, x)
    }

    fn tensor_of_bytes(&self, bytes: &[u8], shape: &[usize]) -> Result<Tensor<D>> {
        pointwise::tensor_of_bytes(&self.gpu, bytes, shape)
    }

    fn attention(&self, q: &Tensor<D>, keys: &[&Tensor<D>], values: &[&Tensor<D>]) -> Result<AttentionOut<Tensor<D>>> {
        attention::attention(&self.gpu, q, keys, values, false)
    }

    fn attention_part(
        &self,
        q: &Tensor<D>,
        keys: &[&Tensor<D>],
        values: &[&Tensor<D>],
    ) -> Result<AttentionOut<Tensor<D>>> {
        attention::attention(&self.gpu, q, keys, values, true)
    }

    fn merge_attention(
        &self,
        a: &AttentionOut<Tensor<D>>,
        b: &AttentionOut<Tensor<D>>,
    ) -> Result<AttentionOut<Tensor<D>>> {
        rows::merge_attention(&self.gpu, a, b)
    }

    fn whole_attention(&self, part: AttentionOut<Tensor<D>>) -> Result<Tensor<D>> {
        self.gpu.cast(&part.out, self.gpu.dtype())
    }
}

impl<D: Device> Engine for CudaEngine<D> {
    type Matrix = weights::Matrix<D>;
    type ConvWeight = weights::ConvWeight<D>;
    type Parked = parking::Parked<D>;
    type Slots = parking::Slots<D>;
    type Fetch = parking::Fetch<D>;

    fn name(&self) -> String {
        self.gpu.device.name()
    }

    fn precision(&self) -> Precision {
        self.gpu.precision
    }

    fn weight(&self, pieces: &[RawTensor<'_>]) -> Result<Tensor<D>> {
        weights::weight(&self.gpu, pieces)
    }

    fn matrix(&self, weight: &Tensor<D>, over: Over) -> Result<weights::Matrix<D>> {
        weights::matrix(&self.gpu, weight, over)
    }

    fn stored_matrix(&self, pieces: &[RawTensor<'_>], over: Over) -> Result<weights::Matrix<D>> {
        weights::stored_matrix(&self.gpu, pieces, over)
    }

    fn conv_weight(&self, weight: RawTensor<'_>, bias: RawTensor<'_>) -> Result<weights::ConvWeight<D>> {
        weights::conv_weight(&self.gpu, weight, bias)
    }

    fn upload(&self, values: &[f32], shape: &[usize]) -> Result<Tensor<D>> {
        self.gpu.upload("upload", values, shape)
    }

    fn draw(&self, draw: Draw, shape: &[usize]) -> Result<Tensor<D>> {
        pointwise::draw(&self.gpu, draw, shape)
    }

    fn download(&self, x: &Tensor<D>) -> Result<Vec<f32>> {
        self.gpu.download(x)
    }

    fn park(&self, matrices: Vec<weights::Matrix<D>>) -> Result<parking::Parked<D>> {
        let tensors: Vec<_> = matrices.iter().map(weights::Matrix::tensor).collect();
        parking::park(&self.gpu, &tensors)
    }

    fn slots(&self, parked: &[&parking::Parked<D>], count: usize) -> Result<parking::Slots<D>> {
        parking::Slots::new(&self.gpu, parked, count)
    }

    fn start_fetch(&self, slots: &parking::Slots<D>, parked: &parking::Parked<D>) -> Result<parking::Fetch<D>> {
        slots.start_fetch(parked)
    }

    fn finish_fetch(&self, fetch: parking::Fetch<D>) -> Result<Vec<weights::Matrix<D>>> {
        Ok(fetch.finish()?.into_iter().map(weights::Matrix::of).collect())
    }

    fn linear(&self, x: &Tensor<D>, weight: &weights::Matrix<D>, bias: Option<&Tensor<D>>) -> Result<Tensor<D>> {
        product::linear(&self.gpu, x, weight, bias)
    }

    fn add(&self, a: &Tensor<D>, b: &Tensor<D>) -> Result<Tensor<D>> {
        pointwise::add(&self.gpu, a, b)
    }

    fn silu(&self, x: &Tensor<D>) -> Result<Tensor<D>> {
        pointwise::silu(&self.gpu, x)
    }

    fn rms_norm(&self, x: &Tensor<D>, weight: &Tensor<D>, eps: f32) -> Result<Tensor<D>> {
        rows::rms_norm(&self.gpu, x, weight, eps)
    }

    fn t5_attention(
        &self,
        q: &Tensor<D>,
        k: &Tensor<D>,
        v: &Tensor<D>,
        bias: &Tensor<D>,
        heads: usize,
    ) -> Result<Tensor<D>> {
        attention::t5_attention(&self.gpu, q, k, v, bias, heads)
    }

    fn gelu_gated(&self, a: &Tensor<D>, b: &Tensor<D>) -> Result<Tensor<D>> {
        pointwise::gelu_gated(&self.gpu, a, b)
    }

    fn rope_table(
        &self,
        frequencies: &Tensor<D>,
        grid: [usize; 3],
        tokens: Range<usize>,
    ) -> Result<RopeTable<Tensor<D>>> {
        rows::rope_table(&self.gpu, frequencies, grid, tokens)
    }

    fn patchify(&self, latent: &Tensor<D>) -> Result<Tensor<D>> {
        pointwise::patchify(&self.gpu, latent)
    }

    fn unpatchify(&self, patches: &Tensor<D>, grid: [usize; 3]) -> Result<Tensor<D>> {
        pointwise::unpatchify(&self.gpu, patches, grid)
    }

    fn modulated_rms_norm(&self, x: &Tensor<D>, scale: &Tensor<D>) -> Result<Tensor<D>> {
        rows::modulated_rms_norm(&self.gpu, x, scale)
    }

    fn gated_residual(&self, x: &Tensor<D>, branch: &Tensor<D>, gate: &Tensor<D>) -> Result<Tensor<D>> {
        rows::gated_residual(&self.gpu, x, branch, gate)
    }

    fn split_qkv(
        &self,
        packed: &Tensor<D>,
        q_norm: &Tensor<D>,
        k_norm: &Tensor<D>,
        heads: usize,
        rope: Option<&RopeTable<Tensor<D>>>,
    ) -> Result<Qkv<Tensor<D>>> {
        rows::split_qkv(&self.gpu, packed, q_norm, k_norm, heads, rope)
    }

    fn linear_swiglu(&self, x: &Tensor<D>, weight: &weights::Matrix<D>) -> Result<Tensor<D>> {
        product::linear_swiglu(&self.gpu, x, weight)
    }

    fn modulated_layer_norm(&self, x: &Tensor<D>, shift: &Tensor<D>, scale: &Tensor<D>) -> Result<Tensor<D>> {
        rows::modulated_layer_norm(&self.gpu, x, shift, scale)
    }

    fn euler_step(
        &self,
        z: &Tensor<D>,
        cond: &Tensor<D>,
        uncond: Option<&Tensor<D>>,
        guidance: f32,
        dsigma: f32,
    ) -> Result<Tensor<D>> {
        pointwise::euler_step(&self.gpu, z, cond, uncond, guidance, dsigma)
    }

    fn denormalize_latent(&self, latent: &Tensor<D>, mean: &[f32], std: &[f32]) -> Result<Tensor<D>> {
        volume::denormalize_latent(&self.gpu, latent, mean, std)
    }

    fn causal_conv3d(
        &self,
        x: &Tensor<D>,
        weight: &weights::ConvWeight<D>,
        cache: Option<&ConvCache<Tensor<D>>>,
    ) -> Result<(Tensor<D>, ConvCache<Tensor<D>>)> {
        product::causal_conv3d(&self.gpu, x, weight, cache)
    }

    fn group_sums(&self, x: &Tensor<D>, groups: usize, rows: Range<usize>, cols: Range<usize>) -> Result<Sums> {
        volume::group_sums(&self.gpu, x, groups, rows, cols)
    }

    fn group_norm_silu(
        &self,
        x: &Tensor<D>,
        weight: &Tensor<D>,
        bias: &Tensor<D>,
        groups: usize,
        totals: Option<&Totals>,
    ) -> Result<Tensor<D>> {
        volume::group_norm_silu(&self.gpu, x, weight, bias, groups, totals)
    }

    fn depth_to_space_time(&self, x: &Tensor<D>, st: usize, s: usize, drop: usize) -> Result<Tensor<D>> {
        volume::depth_to_space_time(&self.gpu, x, st, s, drop)
    }

    fn to_rgb8(&self, x: &Tensor<D>) -> Result<Vec<u8>> {
        volume::to_rgb8(&self.gpu, x)
    }

    fn to_rgb16(&self, x: &Tensor<D>) -> Result<Vec<u16>> {
        volume::to_rgb16(&self.gpu, x)
    }
}
