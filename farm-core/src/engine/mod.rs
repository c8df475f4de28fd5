//! The engine: the few dozen fused operations that Mochi needs, and the tensor type they work on.
//!
//! Model code (`crate::model`) is written once, generic over [`Engine`]. An engine is one device: it owns its threads
//! or its stream, its memory and its tensors. [`cpu::CpuEngine`] is the reference; an engine for another device
//! implements the same operations with the same rounding rules and changes nothing above.
//!
//! Conventions
//! - One sample. A sequence is `[rows, channels]`, a volume is `[T, H, W, C]` (channels last, so that a 1×1×1
//!   convolution is [`Engine::linear`] over `T·H·W` rows). Row-major.
//! - Weights keep the checkpoint's orientation: `[out, in]`, convolutions `[out, in, 3, 3, 3]`. An engine repacks
//!   them once, in [`Engine::matrix`] and [`Engine::conv_weight`].
//! - Statistics (means, variances, softmax, log-sum-exp) are accumulated in f32 or better on every engine.
//!   On the CPU engine every value is f32; each operation documents its order of roundings, and its result has the
//!   same bits for any number of threads.

#[cfg(feature = "model")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod streaming;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::precision::Precision;
use crate::tiles::statistics::{Sums, Totals};

/// What an engine cannot do. Carries the operation and the shapes, so that the caller can name the tensor.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("{op}: expected shape {expected}, got {got}")]
    Shape { op: &'static str, expected: String, got: String },
    #[error("{op}: out of memory, wanted {wanted} bytes")]
    OutOfMemory { op: &'static str, wanted: usize },
    #[error("{op}: {message}")]
    Backend { op: &'static str, message: String },
}

pub type Result<T> = std::result::Result<T, EngineError>;

/// A weight's values as a checkpoint stores them: borrowed bytes of a memory-mapped file, little endian.
#[derive(Clone, Copy)]
pub struct RawTensor<'a> {
    pub dtype: RawDtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawDtype {
    F32,
    F16,
    Bf16,
}

impl RawDtype {
    /// Of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl fmt::Debug for RawTensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{:?}", self.dtype, self.shape)
    }
}

/// Values that nobody has stored, for measurements: value `i` is `mean + spread · u`, with u in [-1, 1) made of 24 bits of a
/// hash of `key` and `first + i`. Product and sum are rounded once each, so it has the same bits on every engine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    pub key: u64,
    pub first: u64,
    pub mean: f32,
    pub spread: f32,
}

impl Draw {
    /// By splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    pub fn value(&self, i: u64) -> f32 {
        let at = self.first.wrapping_add(i).wrapping_add(1);
        let mut bits = self.key.wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        let u = ((bits >> 40) as f32 - 8_388_608.0) / 8_388_608.0;
        self.mean + self.spread * u
    }
}

/// What a linear layer is applied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// The visual tokens: most of the work. An engine may do it by other means than the rest, in an order of additions of
    /// their own.
    Tokens,
    /// Text or a single vector, or what leads into or out of the network.
    Few,
    /// A prompt in the text encoder: f32 on every engine, whatever its precision. It is done once a clip, and all later work
    /// hangs on it.
    Encoder,
}

/// Rotary tables of one request, `[tokens, heads, head_dim / 2]` each, made by [`Engine::rope_table`].
pub struct RopeTable<T> {
    pub cos: T,
    pub sin: T,
}

/// Queries, keys and values of one stream: `[rows, heads, head_dim]` each.
#[derive(Clone)]
pub struct Qkv<T> {
    pub q: T,
    pub k: T,
    pub v: T,
}

/// Attention output `[rows, heads · head_dim]` and its natural log-sum-exp `[rows, heads]`, with which partial results
/// over disjoint keys are merged.
pub struct AttentionOut<T> {
    pub out: T,
    pub lse: T,
}

/// The last two input frames of a causal convolution, `[2, H, W, C]`: all that a later time chunk needs of earlier ones.
pub struct ConvCache<T>(pub T);

/// What a transport has to know of a tensor that it carries.
pub trait Transfer: Clone + Send + Sync + 'static {
    fn sizes(&self) -> Vec<usize>;
    /// Bytes of its values.
    fn byte_len(&self) -> usize;
}

/// How tensors get from the device of one rank of a process to that of another, if each has a memory of its own.
pub trait Port<T>: Send + Sync {
    /// What another rank is to be given for `x`. Nobody waits.
    fn hand(&self, x: &T) -> Result<T>;
    /// What another rank has handed over, in the memory of this device, for work that is asked for from now on.
    fn take(&self, x: T) -> Result<T>;
}

/// Tensors of a device and the attention over them: all that a group of ranks needs to know of its engines.
///
/// Every operation checks its shapes and returns [`EngineError::Shape`] rather than panicking. A dimension may be 0.
pub trait SequenceOps: Send + Sync + 'static {
    /// A device tensor. Cloning shares the storage.
    type Tensor: Transfer;

    /// None if all devices of a process have one memory: then every tensor is every engine's.
    fn port(&self) -> Option<Arc<dyn Port<Self::Tensor>>> {
        None
    }
    fn shape(&self, x: &Self::Tensor) -> Vec<usize> {
        x.sizes()
    }
    /// A view with another shape and the same number of elements.
    fn reshape(&self, x: &Self::Tensor, shape: &[usize]) -> Result<Self::Tensor>;
    /// Elements `start .. start + len` of dimension `dim`.
    fn narrow(&self, x: &Self::Tensor, dim: usize, start: usize, len: usize) -> Result<Self::Tensor>;
    /// Concatenation along dimension `dim`.
    fn concat(&self, parts: &[&Self::Tensor], dim: usize) -> Result<Self::Tensor>;
    /// The values as they travel between processes: row-major, little endian, in the engine's own type.
    fn to_bytes(&self, x: &Self::Tensor) -> Result<Vec<u8>>;
    /// The inverse of [`SequenceOps::to_bytes`].
    fn tensor_of_bytes(&self, bytes: &[u8], shape: &[usize]) -> Result<Self::Tensor>;

    /// Softmax attention with scale 1/√d of q `[Q, heads, d]` over the concatenation of the `keys`/`values` segments
    /// `[K_i, heads, d]`, blockwise with an online softmax: nothing of size Q·K is stored.
    fn attention(
        &self,
        q: &Self::Tensor,
        keys: &[&Self::Tensor],
        values: &[&Self::Tensor],
    ) -> Result<AttentionOut<Self::Tensor>>;
    /// As [`SequenceOps::attention`] over some of the keys: its output is f32 also on an engine that computes in another type,
    /// so that parts are not rounded before they are merged.
    fn attention_part(
        &self,
        q: &Self::Tensor,
        keys: &[&Self::Tensor],
        values: &[&Self::Tensor],
    ) -> Result<AttentionOut<Self::Tensor>> {
        self.attention(q, keys, values)
    }
    /// Attention over the keys of both parts, a part itself: with the larger of both log-sum-exps m and w = e^(lse − m),
    /// `out = (wₐ·a + w_b·b) / (wₐ + w_b)` and `lse = m + ln(wₐ + w_b)`, all in f32 or better.
    fn merge_attention(
        &self,
        a: &AttentionOut<Self::Tensor>,
        b: &AttentionOut<Self::Tensor>,
    ) -> Result<AttentionOut<Self::Tensor>>;
    /// The output of a part that has all keys, rounded once to what the engine computes in.
    fn whole_attention(&self, part: AttentionOut<Self::Tensor>) -> Result<Self::Tensor> {
        Ok(part.out)
    }
}

/// The operations of one device. See the module docs for conventions.
///
/// A row of an output depends on the same row of the input only, to the last bit: whoever holds a part of the rows
/// computes the same values as who holds them all.
pub trait Engine: SequenceOps {
    /// A weight `[out, in]` of a linear layer, arranged for [`Engine::linear`]. Cloning shares the storage.
    type Matrix: Clone + Send + Sync + 'static;
    /// A packed 3×3×3 convolution weight with its bias.
    type ConvWeight: Send + Sync + 'static;
    /// Matrices that wait outside the device's memory, to be fetched together.
    type Parked: Send + Sync + 'static;
    /// Room in the device's memory for parked matrices.
    type Slots: Send + Sync + 'static;
    /// Matrices on their way into a slot. Dropped, it gives the slot back.
    type Fetch;

    /// What the device is called in logs and results, for example `cpu:0 (1 thread)`.
    fn name(&self) -> String;
    /// How the engine computes. Latents of different precisions must not be mixed.
    fn precision(&self) -> Precision;

    // ---- moving data ----

    /// Takes a stored weight, given as pieces that are concatenated along dimension 0 (one piece if the file stores it
    /// whole), and widens it to the engine's compute type (f32 on CPU). Exact: f16 and bf16 are subsets of f32.
    fn weight(&self, pieces: &[RawTensor<'_>]) -> Result<Self::Tensor>;
    /// Arranges a weight `[out, in]` for [`Engine::linear`]. Exact, unless the engine was made to round what is computed over
    /// the visual tokens.
    fn matrix(&self, weight: &Self::Tensor, over: Over) -> Result<Self::Matrix>;
    /// As [`Engine::matrix`] from pieces as [`Engine::weight`] takes them, without a tensor in between. Dimensions behind the
    /// first count as one.
    fn stored_matrix(&self, pieces: &[RawTensor<'_>], over: Over) -> Result<Self::Matrix>;
    /// Packs a `[out, in, 3, 3, 3]` weight and its `[out]` bias for [`Engine::causal_conv3d`].
    fn conv_weight(&self, weight: RawTensor<'_>, bias: RawTensor<'_>) -> Result<Self::ConvWeight>;
    /// Copies values in. Errors if `values.len()` is not the product of `shape`.
    fn upload(&self, values: &[f32], shape: &[usize]) -> Result<Self::Tensor>;
    /// Draws values where they are used. An engine with a memory of its own draws there.
    fn draw(&self, draw: Draw, shape: &[usize]) -> Result<Self::Tensor> {
        let values: Vec<f32> = (0..shape.iter().product::<usize>() as u64).map(|i| draw.value(i)).collect();
        self.upload(&values, shape)
    }
    /// Copies values out, row-major.
    fn download(&self, x: &Self::Tensor) -> Result<Vec<f32>>;

    // ---- weights that wait outside the device's memory ----

    /// Moves matrices out of the device's memory, as they are: their room there is free when the last clone is dropped.
    /// Where the device's memory is the host's they stay where they are.
    fn park(&self, matrices: Vec<Self::Matrix>) -> Result<Self::Parked>;
    /// `count` slots, each with room for any of `parked`.
    fn slots(&self, parked: &[&Self::Parked], count: usize) -> Result<Self::Slots>;
    /// Starts fetching into the slot that was given back first, and returns at once: the fetch begins when all work that was
    /// asked for while the slot was in use is done, and goes on beside other work. Errors if every slot is in use.
    fn start_fetch(&self, slots: &Self::Slots, parked: &Self::Parked) -> Result<Self::Fetch>;
    /// The matrices of a fetch, in the order of [`Engine::park`], for work that is asked for from now on; it begins when they
    /// are there. When all of them are dropped the slot is given back.
    fn finish_fetch(&self, fetch: Self::Fetch) -> Result<Vec<Self::Matrix>>;

    // ---- shared by the networks ----

    /// `x · Wᵀ + b`: `[M, K] × [N, K] (+ [N]) → [M, N]`, or `[K] → [N]` for a single vector. Bias is added after the
    /// full sum, one rounding.
    fn linear(&self, x: &Self::Tensor, weight: &Self::Matrix, bias: Option<&Self::Tensor>) -> Result<Self::Tensor>;
    /// Element-wise `a + b` of equal shapes.
    fn add(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// Element-wise `x · sigmoid(x)`.
    fn silu(&self, x: &Self::Tensor) -> Result<Self::Tensor>;

    // ---- T5 encoder (spec: T5 v1.1) ----

    /// `x / sqrt(mean(x²) + eps) · weight` over the last dimension.
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Tensor, eps: f32) -> Result<Self::Tensor>;
    /// T5 self-attention without 1/√d: `softmax(q·kᵀ + bias)·v`; q, k, v `[L, heads·d]`, bias `[heads, L, L]` → `[L, heads·d]`.
    fn t5_attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        bias: &Self::Tensor,
        heads: usize,
    ) -> Result<Self::Tensor>;
    /// `gelu_tanh(a) ⊙ b`, equal shapes.
    fn gelu_gated(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;

    // ---- AsymmDiT ----

    /// cos and sin of `t·P[0] + row·P[1] + col·P[2]` for a run of tokens of a `(t, rows, cols)` grid.
    /// `frequencies` is `[3, heads, head_dim / 2]`; angles, cos and sin in f32.
    fn rope_table(
        &self,
        frequencies: &Self::Tensor,
        grid: [usize; 3],
        tokens: Range<usize>,
    ) -> Result<RopeTable<Self::Tensor>>;
    /// Latent `[C, T, h, w]` → patches `[T·h/2·w/2, C·4]`, inner order (c, di, dj).
    fn patchify(&self, latent: &Self::Tensor) -> Result<Self::Tensor>;
    /// Patches `[T·h/2·w/2, 4·C]`, inner order (p1, p2, c) → latent `[C, T, h, w]`. `grid` is `(T, h/2, w/2)`.
    fn unpatchify(&self, patches: &Self::Tensor, grid: [usize; 3]) -> Result<Self::Tensor>;
    /// `rms(x, 1e-6) · (1 + scale)`: x `[M, D]`, scale `[D]`.
    fn modulated_rms_norm(&self, x: &Self::Tensor, scale: &Self::Tensor) -> Result<Self::Tensor>;
    /// `x + rms(branch, 1e-6) · tanh(gate)`: x, branch `[M, D]`, gate `[D]`. The sandwich residual.
    fn gated_residual(&self, x: &Self::Tensor, branch: &Self::Tensor, gate: &Self::Tensor) -> Result<Self::Tensor>;
    /// Splits packed `[M, 3·heads·d]` (q, k, v; head-major inside each), normalises q and k with `rms(·, 1e-5)·weight[d]`
    /// and, with a table, rotates interleaved pairs of q and k.
    fn split_qkv(
        &self,
        packed: &Self::Tensor,
        q_norm: &Self::Tensor,
        k_norm: &Self::Tensor,
        heads: usize,
        rope: Option<&RopeTable<Self::Tensor>>,
    ) -> Result<Qkv<Self::Tensor>>;
    /// `silu(a) ⊙ g` with `[a ‖ g] = x · Wᵀ`: x `[M, D]`, W `[2F, D]` → `[M, F]`.
    fn linear_swiglu(&self, x: &Self::Tensor, weight: &Self::Matrix) -> Result<Self::Tensor>;
    /// `layer_norm(x, 1e-6) · (1 + scale) + shift`, no affine: x `[M, D]`; scale, shift `[D]`.
    fn modulated_layer_norm(
        &self,
        x: &Self::Tensor,
        shift: &Self::Tensor,
        scale: &Self::Tensor,
    ) -> Result<Self::Tensor>;

    // ---- sampler ----

    /// One guided Euler step in f32: `v = uncond + g·(cond − uncond)`, `z + dσ·v`; every product and sum is one rounding,
    /// no fused multiply-add. Without `uncond`, `v = cond`.
    fn euler_step(
        &self,
        z: &Self::Tensor,
        cond: &Self::Tensor,
        uncond: Option<&Self::Tensor>,
        guidance: f32,
        dsigma: f32,
    ) -> Result<Self::Tensor>;

    // ---- VAE decoder ----

    /// DiT-normalised latent `[C, T, h, w]` → `z·std[c] + mean[c]` as a volume `[T, h, w, C]`.
    fn denormalize_latent(&self, latent: &Self::Tensor, mean: &[f32], std: &[f32]) -> Result<Self::Tensor>;
    /// Causal 3×3×3 convolution, stride 1: x `[T, H, W, Cin]` → `[T, H, W, Cout]`. Space is padded by replication.
    /// Time is preceded by `cache`, or by two copies of the first frame if there is none; the returned cache serves the next chunk.
    fn causal_conv3d(
        &self,
        x: &Self::Tensor,
        weight: &Self::ConvWeight,
        cache: Option<&ConvCache<Self::Tensor>>,
    ) -> Result<(Self::Tensor, ConvCache<Self::Tensor>)>;
    /// Sums of `x` `[T, H, W, C]` for a group norm: per frame and group, over the rectangle `rows` × `cols` of each frame.
    /// In f64 and in an order that depends on the rectangle's size only.
    fn group_sums(&self, x: &Self::Tensor, groups: usize, rows: Range<usize>, cols: Range<usize>) -> Result<Sums>;
    /// `silu((x − mean)·a + bias)` with `a = weight / sqrt(variance + 1e-5)`, computed in f64 from the f32 variance and
    /// rounded once: a group norm over (C/groups, H, W) of each frame `[T, H, W, C]`. Mean and variance are `totals`,
    /// `[T · groups]`; without any they are those of `x` itself, rounded to f32 as [`merge`] does: the same bits as with
    /// the totals of its own [`Engine::group_sums`].
    ///
    /// [`merge`]: crate::tiles::statistics::merge
    fn group_norm_silu(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        bias: &Self::Tensor,
        groups: usize,
        totals: Option<&Totals>,
    ) -> Result<Self::Tensor>;
    /// Depth to space and time: `[T, H, W, C·st·s·s]`, channel order (c, st, s, s) with c slowest → `[st·T − drop, s·H, s·W, C]`,
    /// without the first `drop` frames.
    fn depth_to_space_time(&self, x: &Self::Tensor, st: usize, s: usize, drop: usize) -> Result<Self::Tensor>;
    /// Frames `[T, H, W, 3]` in [-1, 1] → RGB24 bytes: `trunc(255 · clamp((x + 1)/2, 0, 1))`; NaN becomes 0.
    fn to_rgb8(&self, x: &Self::Tensor) -> Result<Vec<u8>>;
    /// The same frames with 16 bits a value, to be blended: `trunc(257 · 255 · clamp((x + 1)/2, 0, 1))`. A 257th of it,
    /// truncated, is the byte of [`Engine::to_rgb8`].
    fn to_rgb16(&self, x: &Self::Tensor) -> Result<Vec<u16>>;
}
