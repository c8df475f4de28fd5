//! The engine of a device of this node, whichever kind it is. Programs choose their devices when they start, so this is one
//! type; each operation goes on to the engine behind it.

use std::ops::Range;
use std::sync::Arc;

use farm_core::engine::cpu::CpuEngine;
#[cfg(feature = "cuda")]
use farm_core::engine::cuda::{CudaEngine, driver::CudaDevice, emulation::Emulation};
use farm_core::engine::{
    AttentionOut, ConvCache, Draw, Engine, EngineError, Over, Port, Qkv, RawTensor, Result, RopeTable, SequenceOps,
    Transfer,
};
use farm_core::precision::Precision;
use farm_core::tiles::statistics::{Sums, Totals};

/// Declares one kind of device after the other, and what goes from the types of [`DeviceEngine`] to theirs.
macro_rules! kinds {
    ($($(#[$when:meta])? $kind:ident($engine:ty) in $module:ident,)*) => {
        pub enum DeviceEngine {
            $($(#[$when])? $kind($engine),)*
        }

        #[derive(Clone)]
        pub enum Tensor {
            $($(#[$when])? $kind(<$engine as SequenceOps>::Tensor),)*
        }

        #[derive(Clone)]
        pub enum Matrix {
            $($(#[$when])? $kind(<$engine as Engine>::Matrix),)*
        }

        pub enum ConvWeight {
            $($(#[$when])? $kind(<$engine as Engine>::ConvWeight),)*
        }

        pub enum Parked {
            $($(#[$when])? $kind(<$engine as Engine>::Parked),)*
        }

        pub enum Slots {
            $($(#[$when])? $kind(<$engine as Engine>::Slots),)*
        }

        pub enum Fetch {
            $($(#[$when])? $kind(<$engine as Engine>::Fetch),)*
        }

        impl Transfer for Tensor {
            fn sizes(&self) -> Vec<usize> {
                match self {
                    $($(#[$when])? Self::$kind(x) => x.sizes(),)*
                }
            }

            fn byte_len(&self) -> usize {
                match self {
                    $($(#[$when])? Self::$kind(x) => x.byte_len(),)*
                }
            }
        }

        $(
            $(#[$when])?
            mod $module {
                use super::*;

                type Own = <$engine as SequenceOps>::Tensor;

                // A program has devices of one kind, so that values of another never come to an engine.
                #[allow(unreachable_patterns)]
                pub fn tensor(x: &Tensor) -> Result<&Own> {
                    match x {
                        Tensor::$kind(x) => Ok(x),
                        _ => Err(foreign()),
                    }
                }

                pub fn optional(x: Option<&Tensor>) -> Result<Option<&Own>> {
                    x.map(tensor).transpose()
                }

                pub fn tensors<'a>(all: &[&'a Tensor]) -> Result<Vec<&'a Own>> {
                    all.iter().map(|x| tensor(x)).collect()
                }

                #[allow(unreachable_patterns)]
                pub fn matrix(x: &Matrix) -> Result<&<$engine as Engine>::Matrix> {
                    match x {
                        Matrix::$kind(x) => Ok(x),
                        _ => Err(foreign()),
                    }
                }

                #[allow(unreachable_patterns)]
                pub fn conv(x: &ConvWeight) -> Result<&<$engine as Engine>::ConvWeight> {
                    match x {
                        ConvWeight::$kind(x) => Ok(x),
                        _ => Err(foreign()),
                    }
                }

                #[allow(unreachable_patterns)]
                pub fn owned(x: Matrix) -> Result<<$engine as Engine>::Matrix> {
                    match x {
                        Matrix::$kind(x) => Ok(x),
                        _ => Err(foreign()),
                    }
                }

                #[allow(unreachable_patterns)]
                pub fn parked(x: &Parked) -> Result<&<$engine as Engine>::Parked> {
                    match x {
                        Parked::$kind(x) => Ok(x),
                        _ => Err(foreign()),
                    }
                }

                #[allow(unreachable_patterns)]
                pub fn slots(x: &Slots) -> Result<&<$engine as Engine>::Slots> {
                    match x {
                        Slots::$kind(x) => Ok(x),
                        _ => Err(foreign()),
                    }
                }

                #[allow(unreachable_patterns)]
                pub fn fetch(x: Fetch) -> Result<<$engine as Engine>::Fetch> {
                    match x {
                        Fetch::$kind(x) => Ok(x),
                        _ => Err(foreign()),
                    }
                }

                pub fn wrap_parked(x: <$engine as Engine>::Parked) -> Parked {
                    Parked::$kind(x)
                }

                pub fn wrap_slots(x: <$engine as Engine>::Slots) -> Slots {
                    Slots::$kind(x)
                }

                pub fn wrap_fetch(x: <$engine as Engine>::Fetch) -> Fetch {
                    Fetch::$kind(x)
                }

                pub fn attended(x: &AttentionOut<Tensor>) -> Result<AttentionOut<Own>> {
                    Ok(AttentionOut { out: tensor(&x.out)?.clone(), lse: tensor(&x.lse)?.clone() })
                }

                pub fn wrap(x: Own) -> Tensor {
                    Tensor::$kind(x)
                }

                struct OwnPort(Arc<dyn Port<Own>>);

                impl Port<Tensor> for OwnPort {
                    fn hand(&self, x: &Tensor) -> Result<Tensor> {
                        self.0.hand(tensor(x)?).map(wrap)
                    }

                    fn take(&self, x: Tensor) -> Result<Tensor> {
                        self.0.take(tensor(&x)?.clone()).map(wrap)
                    }
                }

                pub fn wrap_port(port: Arc<dyn Port<Own>>) -> Arc<dyn Port<Tensor>> {
                    Arc::new(OwnPort(port))
                }

                pub fn wrap_matrix(x: <$engine as Engine>::Matrix) -> Matrix {
                    Matrix::$kind(x)
                }

                pub fn wrap_conv(x: <$engine as Engine>::ConvWeight) -> ConvWeight {
                    ConvWeight::$kind(x)
                }
            }
        )*
    };
}

kinds! {
    Cpu(CpuEngine) in of_cpu,
    #[cfg(feature = "cuda")]
    Cuda(CudaEngine<CudaDevice>) in of_cuda,
    #[cfg(feature = "cuda")]
    Emulated(CudaEngine<Emulation>) in of_emulated,
}

/// The same for the engine of any kind, with the functions of its module.
macro_rules! each {
    ($self:ident, $engine:ident => $body:expr) => {
        match $self {
            DeviceEngine::Cpu($engine) => {
                #[allow(unused_imports)]
                use of_cpu::*;
                $body
            }
            #[cfg(feature = "cuda")]
            DeviceEngine::Cuda($engine) => {
                #[allow(unused_imports)]
                use of_cuda::*;
                $body
            }
            #[cfg(feature = "cuda")]
            DeviceEngine::Emulated($engine) => {
                #[allow(unused_imports)]
                use of_emulated::*;
                $body
            }
        }
    };
}

fn foreign() -> EngineError {
    EngineError::Backend { op: "engine", message: "a value of another kind of device".into() }
}

impl SequenceOps for DeviceEngine {
    type Tensor = Tensor;

    fn port(&self) -> Option<Arc<dyn Port<Tensor>>> {
        each!(self, e => e.port().map(wrap_port))
    }

    fn reshape(&self, x: &Tensor, shape: &[usize]) -> Result<Tensor> {
        each!(self, e => e.reshape(tensor(x)?, shape).map(wrap))
    }

    fn narrow(&self, x: &Tensor, dim: usize, start: usize, len: usize) -> Result<Tensor> {
        each!(self, e => e.narrow(tensor(x)?, dim, start, len).map(wrap))
    }

    fn concat(&self, parts: &[&Tensor], dim: usize) -> Result<Tensor> {
        each!(self, e => e.concat(&tensors(parts)?, dim).map(wrap))
    }

    fn to_bytes(&self, x: &Tensor) -> Result<Vec<u8>> {
        each!(self, e => e.to_bytes(tensor(x)?))
    }

    fn tensor_of_bytes(&self, bytes: &[u8], shape: &[usize]) -> Result<Tensor> {
        each!(self, e => e.tensor_of_bytes(bytes, shape).map(wrap))
    }

    fn attention(&self, q: &Tensor, keys: &[&Tensor], values: &[&Tensor]) -> Result<AttentionOut<Tensor>> {
        each!(self, e => {
            let got = e.attention(tensor(q)?, &tensors(keys)?, &tensors(values)?)?;
            Ok(AttentionOut { out: wrap(got.out), lse: wrap(got.lse) })
        })
    }

    fn attention_part(&self, q: &Tensor, keys: &[&Tensor], values: &[&Tensor]) -> Result<AttentionOut<Tensor>> {
        each!(self, e => {
            let got = e.attention_part(tensor(q)?, &tensors(keys)?, &tensors(values)?)?;
            Ok(AttentionOut { out: wrap(got.out), lse: wrap(got.lse) })
        })
    }

    fn merge_attention(&self, a: &AttentionOut<Tensor>, b: &AttentionOut<Tensor>) -> Result<AttentionOut<Tensor>> {
        each!(self, e => {
            let got = e.merge_attention(&attended(a)?, &attended(b)?)?;
            Ok(AttentionOut { out: wrap(got.out), lse: wrap(got.lse) })
        })
    }

    fn whole_attention(&self, part: AttentionOut<Tensor>) -> Result<Tensor> {
        each!(self, e => e.whole_attention(attended(&part)?).map(wrap))
    }
}

impl Engine for DeviceEngine {
    type Matrix = Matrix;
    type ConvWeight = ConvWeight;
    type Parked = Parked;
    type Slots = Slots;
    type Fetch = Fetch;

    fn name(&self) -> String {
        each!(self, e => e.name())
    }

    fn precision(&self) -> Precision {
        each!(self, e => e.precision())
    }

    fn weight(&self, pieces: &[RawTensor<'_>]) -> Result<Tensor> {
        each!(self, e => e.weight(pieces).map(wrap))
    }

    fn matrix(&self, weight: &Tensor, over: Over) -> Result<Matrix> {
        each!(self, e => e.matrix(tensor(weight)?, over).map(wrap_matrix))
    }

    fn stored_matrix(&self, pieces: &[RawTensor<'_>], over: Over) -> Result<Matrix> {
        each!(self, e => e.stored_matrix(pieces, over).map(wrap_matrix))
    }

    fn conv_weight(&self, weight: RawTensor<'_>, bias: RawTensor<'_>) -> Result<ConvWeight> {
        each!(self, e => e.conv_weight(weight, bias).map(wrap_conv))
    }

    fn upload(&self, values: &[f32], shape: &[usize]) -> Result<Tensor> {
        each!(self, e => e.upload(values, shape).map(wrap))
    }

    fn draw(&self, draw: Draw, shape: &[usize]) -> Result<Tensor> {
        each!(self, e => e.draw(draw, shape).map(wrap))
    }

    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        each!(self, e => e.download(tensor(x)?))
    }

    fn park(&self, matrices: Vec<Matrix>) -> Result<Parked> {
        each!(self, e => {
            let own = matrices.into_iter().map(owned).collect::<Result<Vec<_>>>()?;
            e.park(own).map(wrap_parked)
        })
    }

    fn slots(&self, all: &[&Parked], count: usize) -> Result<Slots> {
        each!(self, e => {
            let own = all.iter().map(|x| parked(x)).collect::<Result<Vec<_>>>()?;
            e.slots(&own, count).map(wrap_slots)
        })
    }

    fn start_fetch(&self, into: &Slots, from: &Parked) -> Result<Fetch> {
        each!(self, e => e.start_fetch(slots(into)?, parked(from)?).map(wrap_fetch))
    }

    fn finish_fetch(&self, started: Fetch) -> Result<Vec<Matrix>> {
        each!(self, e => Ok(e.finish_fetch(fetch(started)?)?.into_iter().map(wrap_matrix).collect()))
    }

    fn linear(&self, x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
        each!(self, e => e.linear(tensor(x)?, matrix(weight)?, optional(bias)?).map(wrap))
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        each!(self, e => e.add(tensor(a)?, tensor(b)?).map(wrap))
    }

    fn silu(&self, x: &Tensor) -> Result<Tensor> {
        each!(self, e => e.silu(tensor(x)?).map(wrap))
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        each!(self, e => e.rms_norm(tensor(x)?, tensor(weight)?, eps).map(wrap))
    }

    fn t5_attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, bias: &Tensor, heads: usize) -> Result<Tensor> {
        each!(self, e => e.t5_attention(tensor(q)?, tensor(k)?, tensor(v)?, tensor(bias)?, heads).map(wrap))
    }

    fn gelu_gated(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        each!(self, e => e.gelu_gated(tensor(a)?, tensor(b)?).map(wrap))
    }

    fn rope_table(&self, frequencies: &Tensor, grid: [usize; 3], tokens: Range<usize>) -> Result<RopeTable<Tensor>> {
        each!(self, e => {
            let table = e.rope_table(tensor(frequencies)?, grid, tokens)?;
            Ok(RopeTable { cos: wrap(table.cos), sin: wrap(table.sin) })
        })
    }

    fn patchify(&self, latent: &Tensor) -> Result<Tensor> {
        each!(self, e => e.patchify(tensor(latent)?).map(wrap))
    }

    fn unpatchify(&self, patches: &Tensor, grid: [usize; 3]) -> Result<Tensor> {
        each!(self, e => e.unpatchify(tensor(patches)?, grid).map(wrap))
    }

    fn modulated_rms_norm(&self, x: &Tensor, scale: &Tensor) -> Result<Tensor> {
        each!(self, e => e.modulated_rms_norm(tensor(x)?, tensor(scale)?).map(wrap))
    }

    fn gated_residual(&self, x: &Tensor, branch: &Tensor, gate: &Tensor) -> Result<Tensor> {
        each!(self, e => e.gated_residual(tensor(x)?, tensor(branch)?, tensor(gate)?).map(wrap))
    }

    fn split_qkv(
        &self,
        packed: &Tensor,
        q_norm: &Tensor,
        k_norm: &Tensor,
        heads: usize,
        rope: Option<&RopeTable<Tensor>>,
    ) -> Result<Qkv<Tensor>> {
        each!(self, e => {
            let rope = match rope {
                Some(table) => Some(RopeTable { cos: tensor(&table.cos)?.clone(), sin: tensor(&table.sin)?.clone() }),
                None => None,
            };
            let got = e.split_qkv(tensor(packed)?, tensor(q_norm)?, tensor(k_norm)?, heads, rope.as_ref())?;
            Ok(Qkv { q: wrap(got.q), k: wrap(got.k), v: wrap(got.v) })
        })
    }

    fn linear_swiglu(&self, x: &Tensor, weight: &Matrix) -> Result<Tensor> {
        each!(self, e => e.linear_swiglu(tensor(x)?, matrix(weight)?).map(wrap))
    }

    fn modulated_layer_norm(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        each!(self, e => e.modulated_layer_norm(tensor(x)?, tensor(shift)?, tensor(scale)?).map(wrap))
    }

    fn euler_step(
        &self,
        z: &Tensor,
        cond: &Tensor,
        uncond: Option<&Tensor>,
        guidance: f32,
        dsigma: f32,
    ) -> Result<Tensor> {
        each!(self, e => e.euler_step(tensor(z)?, tensor(cond)?, optional(uncond)?, guidance, dsigma).map(wrap))
    }

    fn denormalize_latent(&self, latent: &Tensor, mean: &[f32], std: &[f32]) -> Result<Tensor> {
        each!(self, e => e.denormalize_latent(tensor(latent)?, mean, std).map(wrap))
    }

    fn causal_conv3d(
        &self,
        x: &Tensor,
        weight: &ConvWeight,
        cache: Option<&ConvCache<Tensor>>,
    ) -> Result<(Tensor, ConvCache<Tensor>)> {
        each!(self, e => {
            let cache = match cache {
                Some(cache) => Some(ConvCache(tensor(&cache.0)?.clone())),
                None => None,
            };
            let (out, cache) = e.causal_conv3d(tensor(x)?, conv(weight)?, cache.as_ref())?;
            Ok((wrap(out), ConvCache(wrap(cache.0))))
        })
    }

    fn group_sums(&self, x: &Tensor, groups: usize, rows: Range<usize>, cols: Range<usize>) -> Result<Sums> {
        each!(self, e => e.group_sums(tensor(x)?, groups, rows, cols))
    }

    fn group_norm_silu(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        groups: usize,
        totals: Option<&Totals>,
    ) -> Result<Tensor> {
        each!(self, e => e.group_norm_silu(tensor(x)?, tensor(weight)?, tensor(bias)?, groups, totals).map(wrap))
    }

    fn depth_to_space_time(&self, x: &Tensor, st: usize, s: usize, drop: usize) -> Result<Tensor> {
        each!(self, e => e.depth_to_space_time(tensor(x)?, st, s, drop).map(wrap))
    }

    fn to_rgb8(&self, x: &Tensor) -> Result<Vec<u8>> {
        each!(self, e => e.to_rgb8(tensor(x)?))
    }

    fn to_rgb16(&self, x: &Tensor) -> Result<Vec<u16>> {
        each!(self, e => e.to_rgb16(tensor(x)?))
    }
}
