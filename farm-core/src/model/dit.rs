//! AsymmDiT: latent, timestep and text → velocity.

use std::ops::Range;

use crate::engine::streaming::Streaming;
use crate::engine::{Engine, Over, RopeTable};
use crate::model::ModelError;
use crate::model::block::{Sequence, Streams};
use crate::model::blocks::Blocks;
use crate::model::config::DitConfig;
use crate::model::embed::{CaptionPool, TimestepEmbedder};
use crate::model::layers::{Linear, Modulation, Observer};
use crate::model::weights::{Loader, Tensors};
use crate::parallel::group::RankGroup;
use crate::parallel::shard::{Shares, Split};

/// Weights of the transformer.
pub struct Dit<E: Engine> {
    x_embedder: Linear<E>,
    t_embedder: TimestepEmbedder<E>,
    caption_pool: CaptionPool<E>,
    text_projection: Linear<E>,
    pos_frequencies: E::Tensor,
    blocks: Blocks<E>,
    /// shift, scale.
    final_mod: Modulation<E, 2>,
    final_linear: Linear<E>,
    config: DitConfig,
}

/// A prompt as the transformer sees it, the same for every step.
pub struct TextConditioning<E: Engine> {
    /// Pooled caption `[hidden_x]`, added to the timestep embedding.
    pooled: E::Tensor,
    /// This rank's rows of the text stream, `[rows, hidden_y]`; none without any.
    y: Option<E::Tensor>,
    /// Rows of all ranks; 0 without text.
    text_rows: usize,
}

/// What depends on the latent's size alone, the same for every step and branch.
pub struct LatentGeometry<E: Engine> {
    /// Latent `[C, T, h, w]`.
    shape: [usize; 4],
    /// Tokens (T, h/2, w/2).
    grid: [usize; 3],
    /// The tokens of this rank.
    tokens: Range<usize>,
    /// Of this rank's tokens.
    rope: RopeTable<E::Tensor>,
}

impl<E: Engine> LatentGeometry<E> {
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    fn all_tokens(&self) -> usize {
        self.grid.iter().product()
    }
}

impl<E: Engine> Dit<E> {
    /// All weights of the network.
    pub fn load(loader: &Loader<'_, E>, config: &DitConfig) -> Result<Self, ModelError> {
        Self::with_blocks(loader, config, Blocks::load)
    }

    /// This rank's share of the blocks' weights (and all others, which are few): [`Dit::velocities`] gathers the blocks
    /// from the group, each while the one before it computes.
    pub fn load_sharded(loader: &Loader<'_, E>, config: &DitConfig, group: &RankGroup<E>) -> Result<Self, ModelError> {
        Self::with_blocks(loader, config, |loader, config| Blocks::load_sharded(loader, config, group))
    }

    /// All weights of the network, of which the matrices of some blocks wait in the host's memory: [`Dit::velocities`] fetches
    /// them, each while blocks before it compute. The values and their bits are those of [`Dit::load`].
    pub fn load_streamed(loader: &Loader<'_, E>, config: &DitConfig, streaming: Streaming) -> Result<Self, ModelError> {
        Self::with_blocks(loader, config, |loader, config| Blocks::load_streamed(loader, config, streaming))
    }

    fn with_blocks(
        loader: &Loader<'_, E>,
        config: &DitConfig,
        blocks: impl FnOnce(&Loader<'_, E>, &DitConfig) -> Result<Blocks<E>, ModelError>,
    ) -> Result<Self, ModelError> {
        let d = config.hidden_x;
        let bad = |what: String| Err(ModelError::Input(format!("transformer: {what}")));
        if config.num_heads * config.head_dim != d || !config.head_dim.is_multiple_of(2) {
            return bad(format!("width {d} is not {} heads of an even {}", config.num_heads, config.head_dim));
        }
        if config.pool_heads == 0 || !config.text_dim.is_multiple_of(config.pool_heads) {
            return bad(format!("text width {} is not divisible by {} heads", config.text_dim, config.pool_heads));
        }
        if config.time_dim < 2 || !config.time_dim.is_multiple_of(2) {
            return bad(format!("timestep width {} is not even", config.time_dim));
        }
        let frequencies = [3, config.num_heads, config.head_dim / 2];
        Ok(Dit {
            x_embedder: Linear::load_patches(loader, "x_embedder.proj", d, config.in_channels)?,
            t_embedder: TimestepEmbedder::load(loader, config)?,
            caption_pool: CaptionPool::load(loader, config)?,
            text_projection: Linear::load(loader, "t5_yproj", config.hidden_y, config.text_dim, Over::Few)?,
            pos_frequencies: loader.tensor("pos_frequencies", &frequencies)?,
            blocks: blocks(loader, config)?,
            final_mod: Modulation::load(loader, "final_layer.mod", d, d)?,
            final_linear: Linear::load(loader, "final_layer.linear", 4 * config.in_channels, d, Over::Few)?,
            config: config.clone(),
        })
    }

    /// Conditioning of a prompt's features `[tokens, text_dim]` (without padding), or of no text: the null branch.
    pub fn text_conditioning(
        &self,
        engine: &E,
        group: &RankGroup<E>,
        features: Option<&E::Tensor>,
    ) -> Result<TextConditioning<E>, ModelError> {
        let mut text_rows = 0;
        if let Some(features) = features {
            let shape = engine.shape(features);
            if shape.len() != 2 || shape[0] == 0 || shape[1] != self.config.text_dim {
                return Err(ModelError::Input(format!(
                    "text features have shape {shape:?}, the transformer takes [tokens, {}]",
                    self.config.text_dim
                )));
            }
            text_rows = shape[0];
        }
        let [_, rows] = self.shares(group, 0, text_rows).rows(group.rank());
        let y = match features {
            Some(features) if !rows.is_empty() => {
                let features = engine.narrow(features, 0, rows.start, rows.len())?;
                Some(self.text_projection.apply(engine, &features)?)
            }
            _ => None,
        };
        Ok(TextConditioning { pooled: self.caption_pool.apply(engine, features)?, y, text_rows })
    }

    /// Checks the shape of a latent `[C, T, h, w]` against the network and the group, and makes the rotary table of this
    /// rank's tokens.
    pub fn geometry(
        &self,
        engine: &E,
        group: &RankGroup<E>,
        shape: [usize; 4],
    ) -> Result<LatentGeometry<E>, ModelError> {
        let [c, t, h, w] = shape;
        if c != self.config.in_channels || t == 0 || h == 0 || w == 0 || h % 2 != 0 || w % 2 != 0 {
            return Err(ModelError::Input(format!(
                "latent has shape {shape:?}, the transformer takes [{}, T, h, w] with even h and w",
                self.config.in_channels
            )));
        }
        let grid = [t, h / 2, w / 2];
        let (topology, all) = (group.topology(), grid.iter().product());
        topology
            .check(topology.world(), self.config.num_heads, all)
            .map_err(|error| ModelError::Input(error.to_string()))?;
        let [tokens, _] = self.shares(group, all, 0).rows(group.rank());
        let rope = engine.rope_table(&self.pos_frequencies, grid, tokens.clone())?;
        Ok(LatentGeometry { shape, grid, tokens, rope })
    }

    fn shares(&self, group: &RankGroup<E>, tokens: usize, text: usize) -> Shares {
        Shares::new(group.topology(), tokens, text, self.config.num_heads, self.config.head_dim)
    }

    /// Velocity `[C, T, h, w]` of `latent` at `timestep` = 1000·(1 − σ), for every branch.
    ///
    /// Called by all ranks of a branch at once; each gets the whole velocity. The branches go through each block
    /// together, so a block's weights are needed once per call; each is computed on its own, so its bits do not depend
    /// on the others.
    pub fn velocities(
        &self,
        engine: &E,
        group: &RankGroup<E>,
        geometry: &LatentGeometry<E>,
        latent: &E::Tensor,
        timestep: f32,
        branches: &[&TextConditioning<E>],
    ) -> Result<Vec<E::Tensor>, ModelError> {
        self.forward(engine, group, geometry, latent, timestep, branches, &mut |_, _| {})
    }

    /// As [`Dit::velocities`] for one branch on a single rank; shows `patch_embed`, `t_emb`, `pool`, `block{i}.attn_x` (attention after its
    /// output projection), `block{i}.x`, `block{i}.y` (not without text) and `norm_out`.
    pub fn velocity_observed(
        &self,
        engine: &E,
        geometry: &LatentGeometry<E>,
        latent: &E::Tensor,
        timestep: f32,
        branch: &TextConditioning<E>,
        observe: Observer<'_, E::Tensor>,
    ) -> Result<E::Tensor, ModelError> {
        let solo = RankGroup::solo()?;
        let mut velocities = self.forward(engine, &solo, geometry, latent, timestep, &[branch], observe)?;
        velocities.pop().ok_or_else(|| ModelError::Input("a velocity needs a branch".into()))
    }

    #[expect(clippy::too_many_arguments, reason = "the arguments of `velocities` and the observer")]
    fn forward(
        &self,
        engine: &E,
        group: &RankGroup<E>,
        geometry: &LatentGeometry<E>,
        latent: &E::Tensor,
        timestep: f32,
        branches: &[&TextConditioning<E>],
        observe: Observer<'_, E::Tensor>,
    ) -> Result<Vec<E::Tensor>, ModelError> {
        if engine.shape(latent) != geometry.shape {
            let (got, expected) = (engine.shape(latent), geometry.shape);
            return Err(ModelError::Input(format!("latent has shape {got:?}, expected {expected:?}")));
        }
        let tokens = &geometry.tokens;
        let x = {
            let patches = engine.narrow(&engine.patchify(latent)?, 0, tokens.start, tokens.len())?;
            self.x_embedder.apply(engine, &patches)?
        };
        observe("patch_embed", &x);
        let t_emb = self.t_embedder.apply(engine, timestep)?;
        observe("t_emb", &t_emb);
        let mut streams = Vec::with_capacity(branches.len());
        for branch in branches {
            observe("pool", &branch.pooled);
            let conditioning = engine.silu(&engine.add(&t_emb, &branch.pooled)?)?;
            let (x, y) = (x.clone(), branch.y.clone());
            streams.push(Streams::<E> { x, y, text_rows: branch.text_rows, conditioning });
        }
        // Every branch has its own from its first block on; here it would stay to the end.
        drop(x);
        let sequence = Sequence { group, tokens: geometry.all_tokens(), rope: &geometry.rope };
        self.blocks.for_each(engine, group, |i, block| {
            let name = format!("block{i}");
            streams.iter_mut().try_for_each(|streams| block.forward(engine, streams, &sequence, &name, observe))
        })?;
        streams.iter().map(|streams| self.final_layer(engine, group, streams, geometry, observe)).collect()
    }

    /// Whether several branches of one call save traffic: a block is gathered, or fetched, once for all of them.
    pub fn brings_weights(&self) -> bool {
        self.blocks.are_brought()
    }

    fn final_layer(
        &self,
        engine: &E,
        group: &RankGroup<E>,
        streams: &Streams<E>,
        geometry: &LatentGeometry<E>,
        observe: Observer<'_, E::Tensor>,
    ) -> Result<E::Tensor, ModelError> {
        let [shift, scale] = self.final_mod.apply(engine, &streams.conditioning)?;
        let x = engine.modulated_layer_norm(&streams.x, &shift, &scale)?;
        observe("norm_out", &x);
        let patches = self.final_linear.apply(engine, &x)?;
        let width = 4 * self.config.in_channels;
        let split = Split::new(geometry.all_tokens(), group.topology().sequence_ranks());
        let shapes: Vec<_> = split.ranges().map(|tokens| vec![tokens.len(), width]).collect();
        let parts = group.sequence.all_gather_v(patches, &shapes)?;
        let patches = engine.concat(&parts.iter().collect::<Vec<_>>(), 0)?;
        Ok(engine.unpatchify(&patches, geometry.grid)?)
    }
}
