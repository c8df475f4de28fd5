//! What a hand, a device that decodes tiles, and the crew of a clip say to each other. Messages of one hand arrive in
//! order, each once, or the hand is lost.

use std::sync::Arc;

use super::plan::{Mode, Tile};
use super::statistics::{Sums, Totals};

/// Crew → hand.
#[derive(Clone, Debug, PartialEq)]
pub enum ToHand {
    /// Decode this tile from the beginning. The first steps are closed already: `closed` are their totals, and what the
    /// hand would give for them is of no interest. Neither are frames of chunks before `wanted_from`.
    Assign { number: u32, tile: Tile, frame: Frame, wanted_from: u32, closed: Vec<Arc<Totals>> },
    /// A step is closed. Goes to every hand that has a tile, in the order of steps. `edges` are those of the neighbours of
    /// the hand's tiles, by tile; empty unless the mode is exact.
    Closed { step: u32, totals: Arc<Totals>, edges: Vec<(u32, Arc<Edges>)> },
    /// Another hand has this tile now.
    Drop { number: u32 },
    /// The clip is decoded, or needs this hand no more.
    Done,
}

/// What a tile is a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub mode: Mode,
    /// Height and width of the whole latent.
    pub latent: [usize; 2],
    /// Tiles in a column and in a row; they are numbered row by row.
    pub grid: [usize; 2],
}

/// Hand → crew.
#[derive(Clone, Debug, PartialEq)]
pub enum FromHand {
    /// A tile has come to this step: for the norms of a chunk in modes that exchange, else one step at a chunk's start,
    /// with nothing in it. `busy_ms` is how long the device has worked on tiles of this clip so far.
    Given { number: u32, step: u32, busy_ms: u64, sums: Sums, edges: Option<Edges> },
    /// A tile's part of a chunk, in the plan's pixel format: `frames · height · width · 3` values, row-major.
    Frames { number: u32, chunk: u32, pixels: Pixels },
    /// The device cannot go on.
    Failed { message: String },
}

/// Pixels of a tile.
#[derive(Clone, Debug, PartialEq)]
pub enum Pixels {
    /// Of the only tile: ready to be encoded.
    Rgb8(Vec<u8>),
    /// To be blended with other tiles: `trunc(257 · 255 · clamp((x + 1)/2, 0, 1))`, a 257th of which is the byte.
    Rgb16(Vec<u16>),
}

/// The outermost pixels of the part of a norm's input that a tile owns: `[frames, 1, width, C]` each for its first and
/// last row and `[frames, height, 1, C]` for its first and last column, f32.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Edges {
    pub top: Vec<f32>,
    pub bottom: Vec<f32>,
    pub left: Vec<f32>,
    pub right: Vec<f32>,
}
