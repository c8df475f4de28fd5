//! The decode of one tile, which stops where tiles have to know of each other.

use std::sync::Arc;

use super::walk::{AtNorm, Margins, Stop, Walk};
use super::{NORM_GROUPS, VaeDecoder};
use crate::engine::Engine;
use crate::model::ModelError;
use crate::model::latent::VaeLatent;
use crate::tiles::message::{Edges, Frame};
use crate::tiles::plan::{Mode, Span, Tile};
use crate::tiles::statistics::{Sums, Totals};

/// A tile of a clip in the middle of its decode. After an error it has lost its place and is of no more use.
pub struct TileStream<E: Engine> {
    decoder: Arc<VaeDecoder<E>>,
    number: u32,
    tile: Tile,
    frame: Frame,
    walk: Walk<E>,
    /// Chunks begun.
    chunks: u32,
    waiting: Option<AtNorm<E::Tensor>>,
}

/// What a tile has come to.
pub enum Advance<T> {
    /// A norm whose statistics are those of the whole frame: [`TileStream::advance`] goes on from it. `edges` in exact mode.
    Norm { sums: Sums, edges: Option<Edges> },
    /// The end of the chunk: `[t, height, width, 3]` of the tile, overlap included, about -1 … 1, not clamped.
    Frames(T),
}

impl<E: Engine> TileStream<E> {
    /// Errors if `tile` cannot be number `number` of such a frame.
    pub fn new(decoder: Arc<VaeDecoder<E>>, number: u32, tile: Tile, frame: Frame) -> Result<Self, ModelError> {
        let [grid_rows, grid_cols] = frame.grid;
        let fits = |span: Span, place: usize, of: usize, extent: usize| {
            let inside = span.start <= span.own_start && span.own_start < span.own_end && span.own_end <= span.end;
            let first = (place == 0) == (span.start == 0) && (place == 0) == (span.own_start == 0);
            let last = (place + 1 == of) == (span.end == extent) && (place + 1 == of) == (span.own_end == extent);
            let own = frame.mode != Mode::Exact || (span.own_start, span.own_end) == (span.start, span.end);
            inside && first && last && own
        };
        let place = (number as usize).checked_div(grid_cols).zip((number as usize).checked_rem(grid_cols));
        let fits = place.is_some_and(|(row, col)| {
            row < grid_rows
                && fits(tile.rows, row, grid_rows, frame.latent[0])
                && fits(tile.cols, col, grid_cols, frame.latent[1])
                && (frame.mode != Mode::Whole || frame.grid == [1, 1])
        });
        if !fits {
            return Err(ModelError::Input(format!("{tile:?} cannot be tile {number} of {frame:?}")));
        }
        Ok(Self { decoder, number, tile, frame, walk: Walk::new(), chunks: 0, waiting: None })
    }

    /// The next latent frames `[T, h, w, C]` of the whole clip, of which the tile takes its part.
    pub fn begin(&mut self, engine: &E, latent: &VaeLatent<E::Tensor>) -> Result<Advance<E::Tensor>, ModelError> {
        if let Some(at) = &self.waiting {
            let (number, chunk, norm) = (self.number, self.chunks - 1, at.norm);
            return Err(ModelError::Input(format!(
                "tile {number} waits at norm {norm} of chunk {chunk}, the next cannot begin"
            )));
        }
        let shape = engine.shape(&latent.0);
        let [height, width] = self.frame.latent;
        if !matches!(shape[..], [t, h, w, c] if t > 0 && [h, w, c] == [height, width, self.decoder.latent_channels()]) {
            return Err(ModelError::Input(format!(
                "tile {} is one of latents [T, {height}, {width}, {}], not of {shape:?}",
                self.number,
                self.decoder.latent_channels()
            )));
        }
        self.chunks += 1;
        let Tile { rows, cols } = self.tile;
        let part = engine.narrow(&latent.0, 1, rows.start, rows.len())?;
        let part = engine.narrow(&part, 2, cols.start, cols.len())?;
        let decoder = self.decoder.clone();
        let stop = self.walk.begin(&decoder, engine, &part, &mut |_, _| ())?;
        self.go_on(engine, stop)
    }

    /// On from a norm with the totals of all tiles and, in exact mode, the edges at this norm of those around this one.
    pub fn advance(
        &mut self,
        engine: &E,
        totals: &Totals,
        edges: &[(u32, Arc<Edges>)],
    ) -> Result<Advance<E::Tensor>, ModelError> {
        let Some(at) = self.waiting.take() else {
            return Err(ModelError::Input(format!("tile {} waits at no norm, it has use for no totals", self.number)));
        };
        let shape = engine.shape(at.input());
        self.check(&at, totals, shape[0])?;
        let (normed, margins) = if self.frame.mode == Mode::Exact {
            let (extended, margins) = self.extended(engine, &at, edges)?;
            (at.norm(&self.decoder, engine, &extended, Some(totals))?, margins)
        } else {
            (at.norm(&self.decoder, engine, at.input(), Some(totals))?, Margins::default())
        };
        let decoder = self.decoder.clone();
        let stop = self.walk.convolve(&decoder, engine, at, normed, margins, &mut |_, _| ())?;
        self.go_on(engine, stop)
    }

    /// To where other tiles are needed.
    fn go_on(&mut self, engine: &E, mut stop: Stop<E::Tensor>) -> Result<Advance<E::Tensor>, ModelError> {
        let decoder = self.decoder.clone();
        loop {
            match stop {
                Stop::Frames(frames) => return Ok(Advance::Frames(frames)),
                Stop::Norm(at) if !self.frame.mode.exchanges() => {
                    let normed = at.norm(&decoder, engine, at.input(), None)?;
                    stop = self.walk.convolve(&decoder, engine, at, normed, Margins::default(), &mut |_, _| ())?;
                }
                Stop::Norm(at) => {
                    let scale = decoder.stages[at.stage].scale;
                    let [rows, cols] = [self.tile.rows, self.tile.cols].map(|span| {
                        let own = span.own();
                        own.start * scale..own.end * scale
                    });
                    let sums = engine.group_sums(at.input(), NORM_GROUPS, rows, cols)?;
                    let exact = self.frame.mode == Mode::Exact;
                    let edges = if exact { Some(edges(engine, at.input())?) } else { None };
                    self.waiting = Some(at);
                    return Ok(Advance::Norm { sums, edges });
                }
            }
        }
    }

    /// Totals come from elsewhere.
    fn check(&self, at: &AtNorm<E::Tensor>, totals: &Totals, frames: usize) -> Result<(), ModelError> {
        let expected = frames * NORM_GROUPS;
        if totals.0.len() != expected {
            return Err(self.refused(at, format!("{} totals, {expected} are needed", totals.0.len())));
        }
        let bad = |[mean, variance]: &[f32; 2]| !(mean.is_finite() && variance.is_finite() && *variance >= 0.0);
        match totals.0.iter().position(bad) {
            Some(group) => {
                let [mean, variance] = totals.0[group];
                Err(self.refused(at, format!("group {group} has mean {mean} and variance {variance}")))
            }
            None => Ok(()),
        }
    }

    fn refused(&self, at: &AtNorm<E::Tensor>, what: String) -> ModelError {
        ModelError::Input(format!("tile {}, chunk {}, norm {}: {what}", self.number, self.chunks - 1, at.norm))
    }

    /// The norm's input with one more row or column wherever there is a neighbour. (At the frame's border there is none:
    /// there the convolution repeats what is outermost, and that is what it does in the whole frame.)
    fn extended(
        &self,
        engine: &E,
        at: &AtNorm<E::Tensor>,
        edges: &[(u32, Arc<Edges>)],
    ) -> Result<(E::Tensor, Margins), ModelError> {
        let &[frames, height, width, channels] = &engine.shape(at.input())[..] else {
            return Err(self.refused(at, "its input is no volume".into()));
        };
        let strip = |neighbour: u32, side: &str, values: fn(&Edges) -> &[f32], pixels: Option<usize>| {
            let found = edges.iter().find(|(number, _)| *number == neighbour);
            let values = found.map(|(_, edges)| values(edges));
            let values = values.ok_or_else(|| self.refused(at, format!("no edges of tile {neighbour}")))?;
            // Of a corner the length is not known, but that it has one.
            let pixels = pixels.unwrap_or(values.len() / (frames * channels));
            if pixels == 0 || values.len() != frames * pixels * channels {
                let got = values.len();
                let what =
                    format!("the {side} edge of tile {neighbour} has {got} values, not {frames}x{pixels}x{channels}");
                return Err(self.refused(at, what));
            }
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                return Err(self.refused(at, format!("the {side} edge of tile {neighbour} holds {value}")));
            }
            Ok((values.to_vec(), pixels))
        };
        let [above, here, below] = self.around();
        // A row above or below, with the corners it has.
        let row = |[left, middle, right]: [Option<u32>; 3], side: &str, values: fn(&Edges) -> &[f32]| {
            let Some(middle) = middle else { return Ok(None) };
            let (values_of_middle, _) = strip(middle, side, values, Some(width))?;
            let corner = |tile: Option<u32>, last: bool| -> Result<Option<E::Tensor>, ModelError> {
                let Some(tile) = tile else { return Ok(None) };
                let (values, pixels) = strip(tile, side, values, None)?;
                let row = engine.upload(&values, &[frames, 1, pixels, channels])?;
                Ok(Some(engine.narrow(&row, 2, if last { pixels - 1 } else { 0 }, 1)?))
            };
            let middle = engine.upload(&values_of_middle, &[frames, 1, width, channels])?;
            let parts = [corner(left, true)?, Some(middle), corner(right, false)?];
            join(engine, parts.iter().flatten().collect(), 2).map(Some)
        };
        let column = |tile: Option<u32>, side: &str, values: fn(&Edges) -> &[f32]| {
            let Some(tile) = tile else { return Ok(None) };
            let (values, _) = strip(tile, side, values, Some(height))?;
            Ok::<_, ModelError>(Some(engine.upload(&values, &[frames, height, 1, channels])?))
        };
        let (top, bottom) = (row(above, "bottom", |e| &e.bottom)?, row(below, "top", |e| &e.top)?);
        let (left, right) = (column(here[0], "right", |e| &e.right)?, column(here[2], "left", |e| &e.left)?);
        let margins = Margins {
            rows: [&top, &bottom].map(|side| usize::from(side.is_some())),
            cols: [&left, &right].map(|side| usize::from(side.is_some())),
        };
        let middle =
            join(engine, [left.as_ref(), Some(at.input()), right.as_ref()].into_iter().flatten().collect(), 2)?;
        let parts = [top.as_ref(), Some(&middle), bottom.as_ref()];
        Ok((join(engine, parts.into_iter().flatten().collect(), 1)?, margins))
    }

    /// Numbers of the tiles around this one, and its own in the middle.
    fn around(&self) -> [[Option<u32>; 3]; 3] {
        let [rows, cols] = self.frame.grid;
        let (row, col) = (self.number as usize / cols, self.number as usize % cols);
        let near = |at: usize, step: usize, of: usize| (at + step).checked_sub(1).filter(|&place| place < of);
        [0, 1, 2].map(|down| {
            [0, 1, 2].map(|right| {
                let (row, col) = near(row, down, rows).zip(near(col, right, cols))?;
                Some((row * cols + col) as u32)
            })
        })
    }
}

/// One part as it is, or several one after the other.
fn join<E: Engine>(engine: &E, parts: Vec<&E::Tensor>, dim: usize) -> Result<E::Tensor, ModelError> {
    match parts[..] {
        [part] => Ok(part.clone()),
        _ => Ok(engine.concat(&parts, dim)?),
    }
}

/// The outermost rows and columns of `x` `[T, H, W, C]`.
fn edges<E: Engine>(engine: &E, x: &E::Tensor) -> Result<Edges, ModelError> {
    let shape = engine.shape(x);
    let strip = |dim: usize, at: usize| -> Result<Vec<f32>, ModelError> {
        Ok(engine.download(&engine.narrow(x, dim, at, 1)?)?)
    };
    Ok(Edges { top: strip(1, 0)?, bottom: strip(1, shape[1] - 1)?, left: strip(2, 0)?, right: strip(2, shape[2] - 1)? })
}
