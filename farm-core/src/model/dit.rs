//! AsymmDiT: latent, timestep and text → velocity.

use crate::engine::{Engine, RopeTable};
use crate::model::ModelError;
use crate::model::block::{Block, Streams};
use crate::model::config::DitConfig;
use crate::model::embed::{CaptionPool, TimestepEmbedder};
use crate::model::layers::{Linear, Modulation, Observer};
use crate::model::weights::Loader;

/// Weights of the transformer.
pub struct Dit<E: Engine> {
    x_embedder: Linear<E>,
    t_embedder: TimestepEmbedder<E>,
    caption_pool: CaptionPool<E>,
    text_projection: Linear<E>,
    pos_frequencies: E::Tensor,
    blocks: Vec<Block<E>>,
    /// shift, scale.
    final_mod: Modulation<E, 2>,
    final_linear: Linear<E>,
    channels: usize,
    text_dim: usize,
}

/// A prompt as the transformer sees it, the same for every step.
pub struct TextConditioning<E: Engine> {
    /// Pooled caption `[hidden_x]`, added to the timestep embedding.
    pooled: E::Tensor,
    /// Text stream `[Lv, hidden_y]`; none without text.
    y: Option<E::Tensor>,
}

/// What depends on the latent's size alone, the same for every step and branch.
pub struct LatentGeometry<E: Engine> {
    /// Latent `[C, T, h, w]`.
    shape: [usize; 4],
    /// Tokens (T, h/2, w/2).
    grid: [usize; 3],
    rope: RopeTable<E::Tensor>,
}

impl<E: Engine> Dit<E> {
    pub fn load(loader: &Loader<'_, E>, config: &DitConfig) -> Result<Self, ModelError> {
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
            text_projection: Linear::load(loader, "t5_yproj", config.hidden_y, config.text_dim)?,
            pos_frequencies: loader.tensor("pos_frequencies", &frequencies)?,
            blocks: (0..config.num_layers).map(|i| Block::load(loader, config, i)).collect::<Result<_, _>>()?,
            final_mod: Modulation::load(loader, "final_layer.mod", d, d)?,
            final_linear: Linear::load(loader, "final_layer.linear", 4 * config.in_channels, d)?,
            channels: config.in_channels,
            text_dim: config.text_dim,
        })
    }

    /// Conditioning of a prompt's features `[tokens, text_dim]` (without padding), or of no text: the null branch.
    pub fn text_conditioning(
        &self,
        engine: &E,
        features: Option<&E::Tensor>,
    ) -> Result<TextConditioning<E>, ModelError> {
        if let Some(features) = features {
            let shape = engine.shape(features);
            if shape.len() != 2 || shape[0] == 0 || shape[1] != self.text_dim {
                return Err(ModelError::Input(format!(
                    "text features have shape {shape:?}, the transformer takes [tokens, {}]",
                    self.text_dim
                )));
            }
        }
        let y = features.map(|features| self.text_projection.apply(engine, features)).transpose()?;
        Ok(TextConditioning { pooled: self.caption_pool.apply(engine, features)?, y })
    }

    /// Checks the shape of a latent `[C, T, h, w]` and makes its rotary table.
    pub fn geometry(&self, engine: &E, shape: [usize; 4]) -> Result<LatentGeometry<E>, ModelError> {
        let [c, t, h, w] = shape;
        if c != self.channels || t == 0 || h == 0 || w == 0 || h % 2 != 0 || w % 2 != 0 {
            return Err(ModelError::Input(format!(
                "latent has shape {shape:?}, the transformer takes [{}, T, h, w] with even h and w",
                self.channels
            )));
        }
        let grid = [t, h / 2, w / 2];
        Ok(LatentGeometry { shape, grid, rope: engine.rope_table(&self.pos_frequencies, grid)? })
    }

    /// Velocity `[C, T, h, w]` of `latent` at `timestep` = 1000·(1 − σ), for every branch.
    ///
    /// The branches go through each block together, so a block's weights are needed once per call; each is computed on
    /// its own, so its bits do not depend on the others.
    pub fn velocities(
        &self,
        engine: &E,
        geometry: &LatentGeometry<E>,
        latent: &E::Tensor,
        timestep: f32,
        branches: &[&TextConditioning<E>],
    ) -> Result<Vec<E::Tensor>, ModelError> {
        self.forward(engine, geometry, latent, timestep, branches, &mut |_, _| {})
    }

    /// As [`Dit::velocities`] for one branch; shows `patch_embed`, `t_emb`, `pool`, `block{i}.attn_x` (attention after its
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
        let mut velocities = self.forward(engine, geometry, latent, timestep, &[branch], observe)?;
        velocities.pop().ok_or_else(|| ModelError::Input("a velocity needs a branch".into()))
    }

    fn forward(
        &self,
        engine: &E,
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
        let x = self.x_embedder.apply(engine, &engine.patchify(latent)?)?;
        observe("patch_embed", &x);
        let t_emb = self.t_embedder.apply(engine, timestep)?;
        observe("t_emb", &t_emb);
        let mut streams = Vec::with_capacity(branches.len());
        for branch in branches {
            observe("pool", &branch.pooled);
            let conditioning = engine.silu(&engine.add(&t_emb, &branch.pooled)?)?;
            streams.push(Streams::<E> { x: x.clone(), y: branch.y.clone(), conditioning });
        }
        for (i, block) in self.blocks.iter().enumerate() {
            let name = format!("block{i}");
            for streams in &mut streams {
                block.forward(engine, streams, &geometry.rope, &name, observe)?;
            }
        }
        streams.iter().map(|streams| self.final_layer(engine, streams, geometry.grid, observe)).collect()
    }

    fn final_layer(
        &self,
        engine: &E,
        streams: &Streams<E>,
        grid: [usize; 3],
        observe: Observer<'_, E::Tensor>,
    ) -> Result<E::Tensor, ModelError> {
        let [shift, scale] = self.final_mod.apply(engine, &streams.conditioning)?;
        let x = engine.modulated_layer_norm(&streams.x, &shift, &scale)?;
        observe("norm_out", &x);
        Ok(engine.unpatchify(&self.final_linear.apply(engine, &x)?, grid)?)
    }
}
