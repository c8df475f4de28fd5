//! The walk through the decoder, the only one: from norm to norm, with what the convolutions remember.

use super::{Exit, NORM_GROUPS, Tap, VaeDecoder};
use crate::engine::{ConvCache, Engine};
use crate::model::ModelError;
use crate::tiles::statistics::Totals;

/// What every convolution remembers of the frames that it has seen, in the order of use.
pub(super) struct Walk<E: Engine> {
    caches: Vec<ConvCache<E::Tensor>>,
    begun: bool,
}

/// Where a chunk has come to.
pub(super) enum Stop<T> {
    Norm(AtNorm<T>),
    /// `[t, H, W, 3]`
    Frames(T),
}

/// A chunk before a norm of a residual block.
pub(super) struct AtNorm<T> {
    /// Which of the network's.
    pub norm: usize,
    pub stage: usize,
    block: usize,
    /// What the block got.
    x: T,
    /// What its first convolution has made of it.
    h: Option<T>,
}

/// Rows and columns on each side that are not the tile's own.
#[derive(Clone, Copy, Default)]
pub(super) struct Margins {
    pub rows: [usize; 2],
    pub cols: [usize; 2],
}

impl<T> AtNorm<T> {
    /// The norm's input, `[T, H, W, C]`.
    pub fn input(&self) -> &T {
        self.h.as_ref().unwrap_or(&self.x)
    }

    fn half(&self) -> usize {
        usize::from(self.h.is_some())
    }

    /// Norm and SiLU of `x`, which is the input with or without pixels around it.
    pub fn norm<E: Engine<Tensor = T>>(
        &self,
        decoder: &VaeDecoder<E>,
        engine: &E,
        x: &T,
        totals: Option<&Totals>,
    ) -> Result<T, ModelError> {
        let norm = &decoder.stages[self.stage].blocks[self.block].norms[self.half()];
        Ok(engine.group_norm_silu(x, &norm.weight, &norm.bias, NORM_GROUPS, totals)?)
    }
}

impl<E: Engine> Walk<E> {
    pub fn new() -> Self {
        Self { caches: Vec::new(), begun: false }
    }

    /// Latent frames `[T, h, w, C]`, on to the first norm.
    pub fn begin(
        &mut self,
        decoder: &VaeDecoder<E>,
        engine: &E,
        latent: &E::Tensor,
        tap: Tap<'_, E>,
    ) -> Result<Stop<E::Tensor>, ModelError> {
        let first_chunk = !std::mem::replace(&mut self.begun, true);
        let x = decoder.conv_in.forward(engine, latent)?;
        arrive(decoder, engine, AtNorm { norm: 0, stage: 0, block: 0, x, h: None }, first_chunk, tap)
    }

    /// On from a norm, whose output is `normed`, through the convolution to the next norm. `margins` are those of
    /// `normed`; of the result they are cut off. At most three tensors of a stage's size are alive at a time.
    pub fn convolve(
        &mut self,
        decoder: &VaeDecoder<E>,
        engine: &E,
        mut at: AtNorm<E::Tensor>,
        normed: E::Tensor,
        margins: Margins,
        tap: Tap<'_, E>,
    ) -> Result<Stop<E::Tensor>, ModelError> {
        let (block, half) = (&decoder.stages[at.stage].blocks[at.block], at.half());
        at.h = None;
        // Every norm has its convolution. In the first chunk it remembers nothing yet.
        let first_chunk = self.caches.len() <= at.norm;
        let (mut out, cache) = engine.causal_conv3d(&normed, &block.convs[half], self.caches.get(at.norm))?;
        drop(normed);
        match self.caches.get_mut(at.norm) {
            Some(slot) => *slot = cache,
            None => self.caches.push(cache),
        }
        for (dim, [before, after]) in [(1, margins.rows), (2, margins.cols)] {
            if before + after > 0 {
                let len = engine.shape(&out)[dim] - before - after;
                out = engine.narrow(&out, dim, before, len)?;
            }
        }
        at.norm += 1;
        if half == 0 {
            at.h = Some(out);
            return Ok(Stop::Norm(at));
        }
        at.x = engine.add(&at.x, &out)?;
        drop(out);
        at.block += 1;
        arrive(decoder, engine, at, first_chunk, tap)
    }
}

/// After a block: before the next one, in whatever stage that is, or at the end.
fn arrive<E: Engine>(
    decoder: &VaeDecoder<E>,
    engine: &E,
    mut at: AtNorm<E::Tensor>,
    first_chunk: bool,
    tap: Tap<'_, E>,
) -> Result<Stop<E::Tensor>, ModelError> {
    // Tensors are replaced, not shadowed: a shadowed one would live to the end, and memory is what streaming is for.
    loop {
        let stage = &decoder.stages[at.stage];
        if at.block < stage.blocks.len() {
            return Ok(Stop::Norm(at));
        }
        match &stage.exit {
            Exit::Same => tap("vae.block_in", &at.x),
            Exit::Up { proj, temporal, spatial } => {
                at.x = proj.forward(engine, &at.x)?;
                let drop = if first_chunk { temporal - 1 } else { 0 };
                at.x = engine.depth_to_space_time(&at.x, *temporal, *spatial, drop)?;
                tap(&format!("vae.up{}", at.stage - 1), &at.x);
            }
            Exit::Frames { proj } => {
                at.x = engine.silu(&at.x)?;
                return Ok(Stop::Frames(proj.forward(engine, &at.x)?));
            }
        }
        (at.stage, at.block) = (at.stage + 1, 0);
    }
}
