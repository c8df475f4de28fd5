//! The frames of a clip, from those of its tiles.

use super::plan::{Mode, PIXELS, Span, TilePlan};

/// Pixels over which tiles with shared statistics fade into each other. They differ near their ends only, by a fifth as
/// much with every eight pixels inwards, so most of an overlap is there to be left out. Tiles that know nothing of each
/// other differ everywhere, and take all of it.
const FADE: f64 = 12.0;

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
        let [height, width] = plan.latent.map(|extent| extent * PIXELS);
        let mut cols = extents(&plan.col_spans(), width, plan.mode);
        for col in &mut cols {
            col.weights = col.weights.iter().flat_map(|&weight| [weight; 3]).collect();
        }
        Self { height, width, rows: extents(&plan.row_spans(), height, plan.mode), cols }
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
fn extents(spans: &[Span], extent: usize, mode: Mode) -> Vec<Extent> {
    let mut extents: Vec<Extent> = spans
        .iter()
        .enumerate()
        .map(|(place, span)| {
            let before = place.checked_sub(1).map(|before| fade(spans[before], *span, mode));
            let after = spans.get(place + 1).map(|after| fade(*span, *after, mode));
            let weight =
                |pixel: usize| before.map_or(1.0, |fade| fade(pixel)) * after.map_or(1.0, |fade| 1.0 - fade(pixel));
            let pixels = span.start * PIXELS..span.end * PIXELS;
            Extent { start: pixels.start, weights: pixels.map(|pixel| weight(pixel) as f32).collect() }
        })
        .collect();
    // They do already where tiles overlap in pairs.
    let mut sums = vec![0f32; extent];
    for extent in &extents {
        extent.weights.iter().zip(&mut sums[extent.start..]).for_each(|(weight, sum)| *sum += weight);
    }
    for extent in &mut extents {
        extent.weights.iter_mut().zip(&sums[extent.start..]).for_each(|(weight, sum)| *weight /= sum);
    }
    extents
}

/// How much of a pixel is the later of two neighbours', for pixels at places along the axis.
fn fade(a: Span, b: Span, mode: Mode) -> impl Fn(usize) -> f64 + Copy {
    let middle = ((a.end + b.start) * PIXELS) as f64 / 2.0;
    let overlap = ((a.end - b.start) * PIXELS) as f64;
    let width = if mode == Mode::Independent { overlap } else { overlap.min(FADE) };
    // Never 0/0: pixels have their middles between whole numbers.
    move |pixel| {
        let t = ((pixel as f64 + 0.5 - middle) / width + 0.5).clamp(0.0, 1.0);
        if mode == Mode::Independent { t } else { t * t * (3.0 - 2.0 * t) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tiles::plan::Tiling;

    fn plan(text: &str, latent: [usize; 2]) -> TilePlan {
        text.parse::<Tiling>().unwrap().plan(latent, 1).unwrap()
    }

    /// Frames of every tile, with `value` of tile, frame, row, column and channel of the clip.
    fn tiles<T>(plan: &TilePlan, frames: usize, value: impl Fn(usize, [usize; 4]) -> T) -> Vec<Vec<T>> {
        let pixels = |span: Span| span.start * PIXELS..span.end * PIXELS;
        let tile = |(number, tile): (usize, &crate::tiles::plan::Tile)| {
            let mut values = Vec::new();
            for (frame, y) in (0..frames).flat_map(|frame| pixels(tile.rows).map(move |y| (frame, y))) {
                for (x, c) in pixels(tile.cols).flat_map(|x| (0..3).map(move |c| (x, c))) {
                    values.push(value(number, [frame, y, x, c]));
                }
            }
            values
        };
        plan.tiles.iter().enumerate().map(tile).collect()
    }

    fn slices<T>(tiles: &[Vec<T>]) -> Vec<&[T]> {
        tiles.iter().map(|tile| &tile[..]).collect()
    }

    #[test]
    fn pixels_that_tiles_agree_on_become_the_bytes_of_one_tile() {
        let value = |[frame, y, x, c]: [usize; 4]| (frame * 7919 + y * 523 + x * 1021 + c * 20011) as u16;
        for text in ["whole", "shared:5x4+2", "independent:5x6+3", "exact:3x4", "shared:6x6+5", "shared:4x4+0"] {
            let plan = plan(text, [9, 11]);
            let got = Blender::new(&plan).chunk(&slices(&tiles(&plan, 2, |_, at| value(at))), 2).unwrap();
            let whole = tiles(&self::plan("whole", [9, 11]), 2, |_, at| (value(at) / 257) as u8);
            assert_eq!(got, whole[0], "{text}");
        }
        let plan = plan("shared:5x4+2", [9, 11]);
        for level in [0, 1, 256, 257, 32767, 65278, 65279, u16::MAX] {
            let got = Blender::new(&plan).chunk(&slices(&tiles(&plan, 1, |_, _| level)), 1).unwrap();
            assert!(got.iter().all(|&byte| u16::from(byte) == level / 257), "{level}");
        }
    }

    #[test]
    fn away_from_cuts_a_pixel_is_of_its_own_tile_alone() {
        let plan = plan("shared:8x8+4", [20, 14]);
        let got = Blender::new(&plan).floats(&slices(&tiles(&plan, 1, |number, _| number as f32)), 1).unwrap();
        let (mut inside, width) = (0, 14 * PIXELS);
        for (number, tile) in plan.tiles.iter().enumerate() {
            let own = |span: Span, extent: usize| {
                let first = if span.own_start == 0 { 0 } else { span.own_start * PIXELS + 10 };
                first..if span.own_end == extent { extent * PIXELS } else { span.own_end * PIXELS - 10 }
            };
            for (y, x) in own(tile.rows, 20).flat_map(|y| own(tile.cols, 14).map(move |x| (y, x))) {
                assert_eq!(got[(y * width + x) * 3], number as f32, "{y} {x}");
                inside += 1;
            }
        }
        assert!(inside > 20 * 14 * PIXELS * PIXELS / 4);
    }

    #[test]
    fn tiles_of_another_size_are_refused() {
        let plan = plan("shared:5x4+2", [9, 11]);
        let blender = Blender::new(&plan);
        let good = tiles(&plan, 2, |_, _| 0u16);
        assert!(blender.chunk(&slices(&good), 1).unwrap_err().contains("tile 0 has 7680 values, 1 frames of 40x32"));
        assert!(blender.chunk(&slices(&good)[1..], 2).unwrap_err().contains("tiles of 3x5"));
        let mut short = good.clone();
        short[3].pop();
        assert!(blender.chunk(&slices(&short), 2).unwrap_err().starts_with("tile 3"));
    }

    proptest! {
        #[test]
        fn weights_of_a_pixel_sum_to_one(
            extent in 1..80usize, tile in 2..20usize, overlap in 0..19usize, mode in 0..3usize
        ) {
            let mode = [Mode::Shared, Mode::Independent, Mode::Exact][mode];
            let size = match mode {
                Mode::Exact => format!("exact:{tile}x{tile}"),
                Mode::Independent => format!("independent:{tile}x{tile}+{}", overlap.min(tile - 1)),
                _ => format!("{tile}x{tile}+{}", overlap.min(tile - 1)),
            };
            let plan = plan(&size, [extent, 3]);
            let mut sums = vec![0f64; extent * PIXELS];
            for extent in extents(&plan.row_spans(), extent * PIXELS, plan.mode) {
                prop_assert!(extent.weights.iter().all(|weight| (0.0..=1.0).contains(weight)));
                extent.weights.iter().zip(&mut sums[extent.start..]).for_each(|(w, sum)| *sum += f64::from(*w));
            }
            prop_assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-6), "{size}: {sums:?}");
        }
    }
}
