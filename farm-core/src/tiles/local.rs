//! All tiles of a clip on one engine, norm by norm: what a crew of devices does, without the devices.

use std::sync::Arc;

use super::blend::Blender;
use super::message::{Edges, Frame};
use super::plan::{Mode, TilePlan, Tiling};
use super::quality::Quality;
use super::statistics::{Sums, Totals, merge};
use crate::engine::Engine;
use crate::model::ModelError;
use crate::model::latent::VaeLatent;
use crate::model::vae::{Advance, TileStream, VaeDecoder};

/// The tiles of a clip, side by side.
pub struct Lockstep<E: Engine>(Vec<TileStream<E>>);

impl<E: Engine> Lockstep<E> {
    pub fn new(decoder: &Arc<VaeDecoder<E>>, plan: &TilePlan) -> Result<Self, ModelError> {
        let frame = Frame { mode: plan.mode, latent: plan.latent, grid: plan.grid };
        let tiles = plan.tiles.iter().zip(0..);
        tiles
            .map(|(&tile, number)| TileStream::new(decoder.clone(), number, tile, frame))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The next latent frames `[T, h, w, C]` → the frames of each tile. `close` makes totals of the tiles' sums, at every
    /// norm in modes that exchange.
    pub fn chunk(
        &mut self,
        engine: &E,
        latent: &VaeLatent<E::Tensor>,
        close: &mut dyn FnMut(&[Sums]) -> Result<Totals, String>,
    ) -> Result<Vec<E::Tensor>, ModelError> {
        let mut steps = self.0.iter_mut().map(|tile| tile.begin(engine, latent)).collect::<Result<Vec<_>, _>>()?;
        loop {
            let (mut sums, mut edges, mut frames) = (Vec::new(), Vec::new(), Vec::new());
            for (number, step) in (0..).zip(steps) {
                match step {
                    Advance::Norm { sums: part, edges: strips } => {
                        sums.push(part);
                        edges.extend(strips.map(|strips: Edges| (number, Arc::new(strips))));
                    }
                    Advance::Frames(x) => frames.push(x),
                }
            }
            // All have the same network before them.
            if sums.is_empty() {
                return Ok(frames);
            }
            let totals = close(&sums).map_err(ModelError::Input)?;
            let tiles = self.0.iter_mut();
            steps = tiles.map(|tile| tile.advance(engine, &totals, &edges)).collect::<Result<Vec<_>, _>>()?;
        }
    }
}

/// The frames `[F, H, W, 3]` of a whole latent `[T, h, w, C]`, decoded in tiles in chunks of one latent frame and blended.
pub fn decode<E: Engine>(
    engine: &E,
    decoder: &Arc<VaeDecoder<E>>,
    latent: &VaeLatent<E::Tensor>,
    plan: &TilePlan,
    close: &mut dyn FnMut(&[Sums]) -> Result<Totals, String>,
) -> Result<Vec<f32>, ModelError> {
    let (mut tiles, blender, mut clip) = (Lockstep::new(decoder, plan)?, Blender::new(plan), Vec::new());
    for t in 0..engine.shape(&latent.0)[0] {
        let chunk = tiles.chunk(engine, &VaeLatent(engine.narrow(&latent.0, 0, t, 1)?), close)?;
        let frames = chunk.first().map_or(0, |frames| engine.shape(frames)[0]);
        let chunk = chunk.iter().map(|frames| engine.download(frames)).collect::<Result<Vec<_>, _>>()?;
        let chunk: Vec<&[f32]> = chunk.iter().map(|frames| &frames[..]).collect();
        clip.extend(blender.floats(&chunk, frames).map_err(ModelError::Input)?);
    }
    Ok(clip)
}

/// A clip that was decoded whole, to compare tiles with.
pub struct Whole {
    pub frames: Vec<f32>,
    /// The statistics that its norms had, in order.
    pub totals: Vec<Totals>,
}

/// What comes of a decode in tiles.
pub struct Measured {
    pub quality: Quality,
    /// The same with the statistics of the whole decode instead of the tiles' own sums, in shared mode: what is lost by
    /// other means.
    pub oracle: Option<Quality>,
}

impl Whole {
    pub fn decode<E: Engine>(
        engine: &E,
        decoder: &Arc<VaeDecoder<E>>,
        latent: &VaeLatent<E::Tensor>,
    ) -> Result<Self, ModelError> {
        // A single tile that shows its statistics has the bits of one that does not.
        let mut plan = plan_of(engine, latent, Tiling::WHOLE)?;
        plan.mode = Mode::Shared;
        let mut totals = Vec::new();
        let frames = decode(engine, decoder, latent, &plan, &mut |sums| {
            totals.push(merge(sums)?);
            Ok(totals[totals.len() - 1].clone())
        })?;
        Ok(Self { frames, totals })
    }

    /// Decodes the same latent in tiles.
    pub fn measure<E: Engine>(
        &self,
        engine: &E,
        decoder: &Arc<VaeDecoder<E>>,
        latent: &VaeLatent<E::Tensor>,
        plan: &TilePlan,
    ) -> Result<Measured, ModelError> {
        let frames = decode(engine, decoder, latent, plan, &mut |sums| merge(sums))?;
        let quality = Quality::of(&frames, &self.frames, plan);
        if plan.mode != Mode::Shared {
            return Ok(Measured { quality, oracle: None });
        }
        let mut totals = self.totals.iter();
        let frames = decode(engine, decoder, latent, plan, &mut |_| {
            totals.next().cloned().ok_or_else(|| "more norms than the whole decode has".into())
        })?;
        Ok(Measured { quality, oracle: Some(Quality::of(&frames, &self.frames, plan)) })
    }
}

/// The tiles of a latent `[T, h, w, C]`, without a limit of memory.
pub fn plan_of<E: Engine>(engine: &E, latent: &VaeLatent<E::Tensor>, tiling: Tiling) -> Result<TilePlan, ModelError> {
    let shape = engine.shape(&latent.0);
    let &[_, height, width, _] = &shape[..] else {
        return Err(ModelError::Input(format!("a latent to decode is [T, h, w, C], not {shape:?}")));
    };
    tiling.plan([height, width], 1).map_err(ModelError::Input)
}
