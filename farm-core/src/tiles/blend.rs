//! The frames of a clip, from those of its tiles.

use super::plan::{PIXELS, Span, TilePlan};

/// Adds up tiles, each with a weight for every pixel.
///
/// A weight is the product of one for the row and one for the column. Along each axis, weights sum to one; where tiles
/// overlap, one fades into the other around the middle of the overlap.
pub struct Blender {
    /// Of a frame, in pixels.
    height: usize,
    width: usize,
    /// Of each row of tiles, and of each column.
    rows: Vec<Extent>,
    cols: Vec<Extent>,
}

/// Pixels of a tile along one axis.
struct Extent {
    start: usize,
    /// One for each pixel of a row of tiles, one for each value (three a pixel) of a column.
    weights: Vec<f32>,
}

impl Blender {
    pub fn new(plan: &TilePlan) -> Self {
        let [_, across] = plan.grid;
        let rows: Vec<Span> = plan.tiles.iter().step_by(across.max(1)).map(|tile| tile.rows).collect();
        let cols: Vec<Span> = plan.tiles.iter().take(across).map(|tile| tile.cols).collect();
        let [height, width] = plan.latent.map(|extent| extent * PIXELS);
        let mut cols = extents(&cols, width);
        for col in &mut cols {
            col.weights = col.weights.iter().flat_map(|&weight| [weight; 3]).collect();
        }
        Self { height, width, rows: extents(&rows, height), cols }
    }

    /// Frames of the whole clip as RGB24 bytes, from those of all tiles in the plan's order, `[frames, height, width, 3]`
    /// each as [`Pixels::Rgb16`](super::message::Pixels). Where only one tile contributes they are the bytes that it
    /// would give by itself. Needs memory for the result and for one row. Errors if a tile has another size.
    pub fn chunk(&self, tiles: &[&[u16]], frames: usize) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::with_capacity(frames * self.height * self.width * 3);
        // Halves round the sum to a whole number: tiles that agree give what they agree on.
        self.rows(tiles, frames, |row| bytes.extend(row.iter().map(|value| ((value + 0.5) * (1.0 / 257.0)) as u8)))?;
        Ok(bytes)
    }

    /// The same for values that nothing was done to, for measurements.
    pub fn floats(&self, tiles: &[&[f32]], frames: usize) -> Result<Vec<f32>, String> {
        let mut values = Vec::with_capacity(frames * self.height * self.width * 3);
        self.rows(tiles, frames, |row| values.extend_from_slice(row))?;
        Ok(values)
    }

    /// Gives away every row of every frame, summed up in f32 in the plan's order.
    fn rows<T: Copy + Into<f32>>(
        &self,
        tiles: &[&[T]],
        frames: usize,
        mut give: impl FnMut(&[f32]),
    ) -> Result<(), String> {
        if tiles.len() != self.rows.len() * self.cols.len() {
            return Err(format!("{} tiles of {}x{}", tiles.len(), self.rows.len(), self.cols.len()));
        }
        let places = self.rows.iter().flat_map(|row| self.cols.iter().map(move |col| (row, col)));
        for (number, (tile, (row, col))) in tiles.iter().zip(places).enumerate() {
            let (height, values) = (row.weights.len(), col.weights.len());
            if tile.len() != frames * height * values {
                return Err(format!(
                    "tile {number} has {} values, {frames} frames of {height}x{} pixels need {}",
                    tile.len(),
                    values / 3,
                    frames * height * values
                ));
            }
        }
        let mut sum = vec![0f32; self.width * 3];
        for frame in 0..frames {
            for y in 0..self.height {
                sum.fill(0.0);
                for (row, tiles) in self.rows.iter().zip(tiles.chunks(self.cols.len())) {
                    let height = row.weights.len();
                    let Some(inside) = y.checked_sub(row.start).filter(|&inside| inside < height) else { continue };
                    let weight = row.weights[inside];
                    for (col, tile) in self.cols.iter().zip(tiles) {
                        let len = col.weights.len();
                        let values = &tile[(frame * height + inside) * len..][..len];
                        let sum = &mut sum[col.start * 3..][..len];
                        for ((sum, &value), across) in sum.iter_mut().zip(values).zip(&col.weights) {
                            *sum += value.into() * (weight * across);
                        }
                    }
                }
                give(&sum);
            }
        }
        Ok(())
    }
}

/// Weights of tiles in a row that cover `extent` pixels together.
fn extents(spans: &[Span], extent: usize) -> Vec<Extent> {
    let mut extents: Vec<Extent> = spans
        .iter()
        .enumerate()
        .map(|(place, span)| {
            let before = place.checked_sub(1).map(|before| fade(spans[before], *span));
            let after = spans.get(place + 1).map(|after| fade(*span, *after));
            let weight =
                |pixel: usize| before.map_or(1.0, |fade| fade(pixel)) * after.map_or(1.0, |fade| 1.0 - fade(pixel));
            let pixels = span.start * PIXELS..span.end * PIXELS;
            Extent { start: pixels.start, weights: pixels.map(|pixel| weight(pixel) as f32).collect() }
        })
        .collect();
    // Tiles of plans of ours overlap in pairs, and weights sum to one already.
    let mut sums = vec![0f32; extent];
    for extent in &extents {
        extent.weights.iter().zip(&mut sums[extent.start..]).for_each(|(weight, sum)| *sum += weight);
    }
    for extent in &mut extents {
        extent.weights.iter_mut().zip(&sums[extent.start..]).for_each(|(weight, sum)| *weight /= sum);
    }
    extents
}

/// How much of a pixel is the later of two neighbours'.
fn fade(a: Span, b: Span) -> impl Fn(usize) -> f64 + Copy {
    let middle = ((a.end + b.start) * PIXELS) as f64 / 2.0;
    let half = ((a.end - b.start) * PIXELS) as f64 / 2.0;
    // By measurement, see docs/tiles.md.
    let half = half / 2.0;
    move |pixel| {
        let t = ((pixel as f64 + 0.5 - middle + half) / (2.0 * half)).clamp(0.0, 1.0);
        t * t * (3.0 - 2.0 * t)
    }
}
