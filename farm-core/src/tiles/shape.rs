//! What a clip's decode consists of: its tiles, its chunks, and the steps between which tiles exchange. Everything that
//! comes from another process is checked against it.

use super::message::{Frame, Pixels};
use super::plan::{Mode, PIXELS, Tile, TilePlan};
use super::statistics::Sums;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    pub plan: TilePlan,
    /// Frames of each chunk.
    pub frames: Vec<u32>,
    /// The norms of a chunk, in order; empty in modes without exchange.
    pub norms: Vec<NormShape>,
}

/// The sums of one norm of the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NormShape {
    /// Frames that there are of one latent frame: of the clip's first, and of any other.
    pub frames: [usize; 2],
    pub groups: usize,
    /// Values of a frame's group for each latent pixel.
    pub per_pixel: u64,
}

impl Shape {
    /// `norms` are the decoder's, whatever the mode.
    pub fn new(plan: TilePlan, frames: Vec<u32>, norms: Vec<NormShape>) -> Self {
        let norms = if plan.mode.exchanges() { norms } else { Vec::new() };
        Self { plan, frames, norms }
    }

    /// Steps of a chunk: one per norm, or one in front of it.
    pub fn steps(&self) -> u32 {
        self.norms.len().max(1) as u32
    }

    pub fn chunks(&self) -> u32 {
        self.frames.len() as u32
    }

    pub fn all_steps(&self) -> u32 {
        self.steps() * self.chunks()
    }

    /// Whether steps are norms, in the middle of a chunk.
    pub fn exchange(&self) -> bool {
        !self.norms.is_empty()
    }

    pub fn frame(&self) -> Frame {
        Frame { mode: self.plan.mode, latent: self.plan.latent, grid: self.plan.grid }
    }

    /// Height and width of the clip.
    pub fn frame_size(&self) -> [usize; 2] {
        self.plan.latent.map(|side| side * PIXELS)
    }

    /// Height and width of a tile's frames.
    pub fn tile_size(&self, tile: Tile) -> [usize; 2] {
        let size = match self.plan.mode {
            Mode::Exact => [tile.rows.own().len(), tile.cols.own().len()],
            Mode::Whole | Mode::Shared | Mode::Independent => [tile.rows.len(), tile.cols.len()],
        };
        size.map(|side| side * PIXELS)
    }

    /// Values that a tile has in a chunk.
    pub fn pixel_values(&self, tile: Tile, chunk: u32) -> usize {
        let frames = self.frames.get(chunk as usize).copied().unwrap_or(0) as usize;
        frames * self.tile_size(tile).into_iter().product::<usize>() * 3
    }

    /// Whether sums are such as this tile has at this step. Both are in range.
    pub fn check_sums(&self, number: u32, step: u32, sums: &Sums) -> Result<(), String> {
        let tile = &self.plan.tiles[number as usize];
        let own = (tile.rows.own().len() * tile.cols.own().len()) as u64;
        let (count, moments) = match self.norms.get((step % self.steps()) as usize) {
            Some(norm) => (own * norm.per_pixel, norm.frames[usize::from(step >= self.steps())] * norm.groups),
            None => (0, 0),
        };
        let got = sums.moments.len();
        if (sums.count, got) != (count, moments) {
            let of = sums.count;
            return Err(format!(
                "tile {number} has {moments} sums of {count} values at step {step}, not {got} of {of}"
            ));
        }
        match sums.moments.iter().flatten().all(|value| value.is_finite()) {
            true => Ok(()),
            false => Err(format!("the sums of tile {number} at step {step} are not finite")),
        }
    }

    /// Whether pixels are as many, and of the kind, as this tile has in this chunk. Both are in range.
    pub fn check_pixels(&self, number: u32, chunk: u32, pixels: &Pixels) -> Result<(), String> {
        let expected = self.pixel_values(self.plan.tiles[number as usize], chunk);
        let alone = self.plan.tiles.len() == 1;
        let (kind, got) = match pixels {
            Pixels::Rgb8(values) => (alone, values.len()),
            Pixels::Rgb16(values) => (!alone, values.len()),
        };
        match kind && got == expected {
            true => Ok(()),
            false => {
                Err(format!("tile {number} has {expected} values in chunk {chunk}, not {got}, or not of this kind"))
            }
        }
    }
}
