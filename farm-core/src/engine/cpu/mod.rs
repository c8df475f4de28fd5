//! The CPU engine: candle-core tensors in f32, with own kernels where candle has none or a slow one.
//!
//! Every operation is cut into tasks by shape alone, so results have the same bits for any number of threads.
//! candle's own operations are used only where they move data; it would run arithmetic on a process-wide pool.

#[cfg_attr(not(target_arch = "x86_64"), path = "amx_absent.rs")]
mod amx;
mod attention;
mod conv;
mod data;
mod elementwise;
mod group_norm;
mod lanes;
mod linear;
mod norm;
mod pool;
mod product;
mod rope;
#[cfg(test)]
mod tests;
mod volume;
mod wide;

use std::ops::Range;

use candle_core::Tensor;

use self::data::{candle, from_vec, shape_error, slice, widen_pieces};
use self::pool::Pool;
use crate::engine::{
    AttentionOut, ConvCache, Engine, EngineError, Over, Qkv, RawTensor, Result, RopeTable, SequenceOps,
};
use crate::precision::Precision;
use crate::tiles::statistics::{Sums, Totals};

/// What computes linear layers over the visual tokens, and attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Units {
    Vectors,
    /// Vectors, with weights of linear layers rounded to bf16.
    Halves,
    /// Matrix units, each f32 number as the sum of three of bf16.
    Split,
    /// Matrix units, numbers rounded to bf16.
    Rounded,
}

impl Units {
    fn over(self, over: Over) -> Self {
        if over == Over::Tokens { self } else { Self::Vectors }
    }
}

/// The units of this machine's processor that are used, by their names, the widest last. None: the plainest.
pub fn units() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let vectors = [("AVX2", wide::has_avx2()), ("AVX-512", wide::has_avx512())];
    #[cfg(not(target_arch = "x86_64"))]
    let vectors = [];
    let all = vectors.into_iter().chain([("AMX", amx::available())]);
    all.filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

/// One CPU device: a number of threads of its own.
pub struct CpuEngine {
    pool: Pool,
    units: Units,
}

impl CpuEngine {
    /// An engine with `threads` threads, in f32. Errors if `threads` is 0 or the threads cannot be started.
    pub fn new(threads: usize) -> Result<CpuEngine> {
        Self::with_precision(threads, Precision::F32)
    }

    /// As [`CpuEngine::new`].
    pub fn with_precision(threads: usize, precision: Precision) -> Result<CpuEngine> {
        if threads == 0 {
            let message = "a device needs at least 1 thread".into();
            return Err(EngineError::Backend { op: "start threads", message });
        }
        let units = match precision {
            Precision::F32 if amx::available() => Units::Split,
            Precision::F32 => Units::Vectors,
            Precision::Bf16 if amx::available() => Units::Rounded,
            Precision::Bf16 => Units::Halves,
        };
        Ok(CpuEngine { pool: Pool::new(threads)?, units })
    }

    /// Runs `f` with its number on each thread of this engine, for what only a thread can do for itself, such as choosing
    /// its core.
    pub fn on_every_thread<R: Send>(&self, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
        self.pool.on_every_thread(f)
    }
}

impl SequenceOps for CpuEngine {
    type Tensor = Tensor;

    fn reshape(&self, x: &Tensor, shape: &[usize]) -> Result<Tensor> {
        if shape.iter().product::<usize>() != x.elem_count() {
            return Err(shape_error("reshape", format!("as many elements as {shape:?}"), x.dims()));
        }
        x.reshape(shape).map_err(|error| candle("reshape", error))
    }

    fn narrow(&self, x: &Tensor, dim: usize, start: usize, len: usize) -> Result<Tensor> {
        if dim >= x.dims().len() || start.checked_add(len).is_none_or(|end| end > x.dims()[dim]) {
            return Err(shape_error("narrow", format!("elements {start}..{start}+{len} of dimension {dim}"), x.dims()));
        }
        // A view along dimension 0; along others a copy, because every kernel here wants contiguous values.
        x.narrow(dim, start, len).and_then(|x| x.contiguous()).map_err(|error| candle("narrow", error))
    }

    fn concat(&self, parts: &[&Tensor], dim: usize) -> Result<Tensor> {
        elementwise::concat(parts, dim)
    }

    fn to_bytes(&self, x: &Tensor) -> Result<Vec<u8>> {
        data::to_bytes(x)
    }

    fn tensor_of_bytes(&self, bytes: &[u8], shape: &[usize]) -> Result<Tensor> {
        data::tensor_of_bytes(bytes, shape)
    }

    fn attention(&self, q: &Tensor, keys: &[&Tensor], values: &[&Tensor]) -> Result<AttentionOut<Tensor>> {
        attention::attention(&self.pool, self.units, q, keys, values)
    }

    fn merge_attention(&self, a: &AttentionOut<Tensor>, b: &AttentionOut<Tensor>) -> Result<AttentionOut<Tensor>> {
        attention::merge(&self.pool, a, b)
    }
}

impl Engine for CpuEngine {
    type Matrix = linear::Matrix;
    type ConvWeight = conv::PackedConv;
    type Parked = Vec<linear::Matrix>;
    type Slots = ();
    type Fetch = Vec<linear::Matrix>;

    fn name(&self) -> String {
        match self.pool.threads() {
            1 => "cpu (1 thread)".into(),
            n => format!("cpu ({n} threads)"),
        }
    }

    fn precision(&self) -> Precision {
        match self.units {
            Units::Vectors | Units::Split => Precision::F32,
            Units::Halves | Units::Rounded => Precision::Bf16,
        }
    }

    // ---- moving data ----

    fn weight(&self, pieces: &[RawTensor<'_>]) -> Result<Tensor> {
        let (values, shape) = widen_pieces("weight", pieces)?;
        from_vec("weight", values, &shape)
    }

    fn matrix(&self, weight: &Tensor, over: Over) -> Result<linear::Matrix> {
        linear::matrix(self.units.over(over), weight)
    }

    fn stored_matrix(&self, pieces: &[RawTensor<'_>], over: Over) -> Result<linear::Matrix> {
        linear::stored_matrix(self.units.over(over), pieces)
    }

    fn conv_weight(&self, weight: RawTensor<'_>, bias: RawTensor<'_>) -> Result<conv::PackedConv> {
        conv::pack_conv(weight, bias)
    }

    fn upload(&self, values: &[f32], shape: &[usize]) -> Result<Tensor> {
        from_vec("upload", values.to_vec(), shape)
    }

    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        Ok(slice("download", x)?.to_vec())
    }

    // ---- weights that wait outside the device's memory: this device has no other than the host's ----

    fn park(&self, matrices: Vec<linear::Matrix>) -> Result<Vec<linear::Matrix>> {
        Ok(matrices)
    }

    fn slots(&self, _parked: &[&Vec<linear::Matrix>], _count: usize) -> Result<()> {
        Ok(())
    }

    fn start_fetch(&self, _slots: &(), parked: &Vec<linear::Matrix>) -> Result<Vec<linear::Matrix>> {
        Ok(parked.clone())
    }

    fn finish_fetch(&self, fetch: Vec<linear::Matrix>) -> Result<Vec<linear::Matrix>> {
        Ok(fetch)
    }

    // ---- shared by the networks ----

    fn linear(&self, x: &Tensor, weight: &linear::Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
        linear::linear(&self.pool, x, weight, bias)
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        elementwise::add(&self.pool, a, b)
    }

    fn silu(&self, x: &Tensor) -> Result<Tensor> {
        elementwise::silu(&self.pool, x)
    }

    // ---- T5 encoder ----

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        norm::rms_norm(&self.pool, x, weight, eps)
    }

    fn t5_attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, bias: &Tensor, heads: usize) -> Result<Tensor> {
        attention::t5_attention(&self.pool, [q, k, v], bias, heads)
    }

    fn gelu_gated(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        elementwise::gelu_gated(&self.pool, a, b)
    }

    // ---- AsymmDiT ----

    fn rope_table(&self, frequencies: &Tensor, grid: [usize; 3], tokens: Range<usize>) -> Result<RopeTable<Tensor>> {
        rope::rope_table(&self.pool, frequencies, grid, tokens)
    }

    fn patchify(&self, latent: &Tensor) -> Result<Tensor> {
        elementwise::patchify(latent)
    }

    fn unpatchify(&self, patches: &Tensor, grid: [usize; 3]) -> Result<Tensor> {
        elementwise::unpatchify(patches, grid)
    }

    fn modulated_rms_norm(&self, x: &Tensor, scale: &Tensor) -> Result<Tensor> {
        norm::modulated_rms_norm(&self.pool, x, scale)
    }

    fn gated_residual(&self, x: &Tensor, branch: &Tensor, gate: &Tensor) -> Result<Tensor> {
        norm::gated_residual(&self.pool, x, branch, gate)
    }

    fn split_qkv(
        &self,
        packed: &Tensor,
        q_norm: &Tensor,
        k_norm: &Tensor,
        heads: usize,
        rope: Option<&RopeTable<Tensor>>,
    ) -> Result<Qkv<Tensor>> {
        rope::split_qkv(&self.pool, packed, [q_norm, k_norm], heads, rope)
    }

    fn linear_swiglu(&self, x: &Tensor, weight: &linear::Matrix) -> Result<Tensor> {
        linear::linear_swiglu(&self.pool, x, weight)
    }

    fn modulated_layer_norm(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        norm::modulated_layer_norm(&self.pool, x, shift, scale)
    }

    // ---- sampler ----

    fn euler_step(
        &self,
        z: &Tensor,
        cond: &Tensor,
        uncond: Option<&Tensor>,
        guidance: f32,
        dsigma: f32,
    ) -> Result<Tensor> {
        elementwise::euler_step(&self.pool, z, cond, uncond, guidance, dsigma)
    }

    // ---- VAE decoder ----

    fn denormalize_latent(&self, latent: &Tensor, mean: &[f32], std: &[f32]) -> Result<Tensor> {
        volume::denormalize_latent(latent, mean, std)
    }

    fn causal_conv3d(
        &self,
        x: &Tensor,
        weight: &conv::PackedConv,
        cache: Option<&ConvCache<Tensor>>,
    ) -> Result<(Tensor, ConvCache<Tensor>)> {
        let (out, cache) = conv::causal_conv3d(&self.pool, x, weight, cache.map(|c| &c.0))?;
        Ok((out, ConvCache(cache)))
    }

    fn group_sums(&self, x: &Tensor, groups: usize, rows: Range<usize>, cols: Range<usize>) -> Result<Sums> {
        group_norm::group_sums(&self.pool, x, groups, rows, cols)
    }

    fn group_norm_silu(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        groups: usize,
        totals: Option<&Totals>,
    ) -> Result<Tensor> {
        group_norm::group_norm_silu(&self.pool, x, weight, bias, groups, totals)
    }

    fn depth_to_space_time(&self, x: &Tensor, st: usize, s: usize, drop: usize) -> Result<Tensor> {
        volume::depth_to_space_time(&self.pool, x, st, s, drop)
    }

    fn to_rgb8(&self, x: &Tensor) -> Result<Vec<u8>> {
        volume::to_rgb8(&self.pool, x)
    }

    fn to_rgb16(&self, x: &Tensor) -> Result<Vec<u16>> {
        volume::to_rgb16(&self.pool, x)
    }
}
