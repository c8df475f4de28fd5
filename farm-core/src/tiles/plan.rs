//! Which part of a clip each tile covers: integers, in latent pixels.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::parallel::shard::Split;

/// Pixels of a clip in a latent pixel's height, and in its width. [`Pipeline::open`] refuses a decoder that makes others.
///
/// [`Pipeline::open`]: crate::model::pipeline::Pipeline::open
pub const PIXELS: usize = 8;
/// Latents of fewer pixels than this are decoded whole unless somebody asks for tiles: 480×320 pixels of a clip.
const TILED_FROM: usize = 60 * 40;
/// The largest tile where nobody names one: a frame of 848×480 has 3×6. They are fitted to the frame, which saves a sixth of
/// the work against full-size ones.
const TILE: [usize; 2] = [24, 24];
const OVERLAP: usize = 4;
/// A patch of the transformer is two latent pixels wide.
const MIN_TILE: usize = 2;
/// More tiles than this would spend their time in exchanges.
const MAX_TILES: usize = 1024;

/// How much tiles tell each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// One tile that is the whole frame.
    Whole,
    /// Statistics of every norm are those of the whole frame.
    Shared,
    /// Nothing.
    Independent,
    /// Statistics, and before every convolution the pixels around each tile: equals `Whole` but for rounding.
    Exact,
}

impl Mode {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Shared => "shared",
            Self::Independent => "independent",
            Self::Exact => "exact",
        }
    }

    /// Tiles meet at every norm.
    pub fn exchanges(self) -> bool {
        matches!(self, Self::Shared | Self::Exact)
    }
}

/// How a clip is to be decoded, as a person or a farm says it:
/// `auto | whole | exact | [shared:|independent:|exact:]HxW[+OVERLAP]`, each with `@BYTES` for the memory of one tile.
/// Sizes are in latent pixels, which are 8 pixels of a clip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tiling {
    choice: Choice,
    /// Bytes that the decode of one tile may take.
    memory: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Auto,
    Whole,
    Tiles { mode: Mode, tile: [usize; 2], overlap: usize },
}

/// The tiles of a clip. The same for whoever makes it: it depends on the tiling, the clip's size and the checkpoint only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TilePlan {
    pub mode: Mode,
    /// Height and width of the latent.
    pub latent: [usize; 2],
    /// Row-major.
    pub tiles: Vec<Tile>,
    /// Tiles in a column and in a row.
    pub grid: [usize; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tile {
    pub rows: Span,
    pub cols: Span,
}

/// An extent of a tile: `start .. end`, of which `own_start .. own_end` is nobody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    pub start: usize,
    pub end: usize,
    pub own_start: usize,
    pub own_end: usize,
}

impl TilePlan {
    /// Extents of the rows of tiles, downwards.
    pub fn row_spans(&self) -> Vec<Span> {
        self.tiles.iter().step_by(self.grid[1].max(1)).map(|tile| tile.rows).collect()
    }

    /// Extents of the columns of tiles, to the right.
    pub fn col_spans(&self) -> Vec<Span> {
        self.tiles.iter().take(self.grid[1]).map(|tile| tile.cols).collect()
    }
}

impl Span {
    pub fn len(self) -> usize {
        self.end - self.start
    }

    pub fn is_empty(self) -> bool {
        self.end == self.start
    }

    /// What it owns, counted from its own start.
    pub fn own(self) -> Range<usize> {
        self.own_start - self.start..self.own_end - self.start
    }
}

impl Tile {
    /// Latent pixels, overlap included.
    pub fn pixels(self) -> usize {
        self.rows.len() * self.cols.len()
    }
}

impl Tiling {
    pub const AUTO: Self = Self { choice: Choice::Auto, memory: None };
    pub const WHOLE: Self = Self { choice: Choice::Whole, memory: None };

    /// For devices on which the decode has run out of memory `times` over: tiles of half the area each time, to a point.
    pub fn smaller(self, times: u32) -> Self {
        if times == 0 {
            return self;
        }
        let (mode, tile, overlap) = match self.choice {
            Choice::Auto | Choice::Whole => (Mode::Shared, TILE, OVERLAP),
            Choice::Tiles { mode, tile, overlap } => (mode, tile, overlap),
        };
        let least = (2 * overlap).max(MIN_TILE);
        let mut tile = tile;
        for _ in 0..times {
            let side = usize::from(tile[1] > tile[0]);
            tile[side] = (tile[side] / 2).max(least.min(tile[side]));
        }
        Self { choice: Choice::Tiles { mode, tile, overlap }, ..self }
    }

    /// The tiles of a latent of `[height, width]`. `bytes_per_pixel` is what decoding takes for each latent pixel of a
    /// tile; it is looked at only where memory is limited.
    pub fn plan(self, latent: [usize; 2], bytes_per_pixel: u64) -> Result<TilePlan, String> {
        let [height, width] = latent;
        if height == 0 || width == 0 {
            return Err(format!("a latent of {height}x{width} has no pixels to decode"));
        }
        let most = self.memory.map_or(usize::MAX, |bytes| (bytes / bytes_per_pixel.max(1)) as usize);
        let (mode, mut tile, overlap) = match self.choice {
            Choice::Auto if height * width < TILED_FROM && height * width <= most => (Mode::Whole, latent, 0),
            Choice::Auto => (Mode::Shared, [fitted(height), fitted(width)], OVERLAP),
            Choice::Whole => (Mode::Whole, latent, 0),
            Choice::Tiles { mode, tile, overlap } => (mode, tile, overlap),
        };
        tile = [tile[0].min(height), tile[1].min(width)];
        // Pixels around an exact tile come from its neighbours.
        let (overlap, halo) = if mode == Mode::Exact { (0, 2) } else { (overlap, 0) };
        while (tile[0] + halo) * (tile[1] + halo) > most {
            let side = usize::from(tile[1] > tile[0]);
            if mode == Mode::Whole || tile[side] <= MIN_TILE.max(overlap + 1) {
                return Err(format!(
                    "a tile of {}x{} latent pixels takes {} bytes to decode, and {} are allowed; allow more{}",
                    tile[0],
                    tile[1],
                    ((tile[0] + halo) * (tile[1] + halo)) as u64 * bytes_per_pixel,
                    self.memory.unwrap_or(u64::MAX),
                    if mode == Mode::Whole { ", or decode in tiles" } else { ", or let tiles overlap less" },
                ));
            }
            tile[side] -= 1;
        }
        let exact = mode == Mode::Exact;
        let (rows, cols) = (spans(height, tile[0], overlap, exact), spans(width, tile[1], overlap, exact));
        if rows.len() * cols.len() > MAX_TILES {
            return Err(format!(
                "{}x{} tiles are more than {MAX_TILES}; choose larger ones for a latent of {height}x{width}",
                rows.len(),
                cols.len()
            ));
        }
        let tiles = rows.iter().flat_map(|&rows| cols.iter().map(move |&cols| Tile { rows, cols }));
        let tiles: Vec<Tile> = tiles.collect();
        // One tile has nobody to exchange with.
        let mode = if tiles.len() == 1 { Mode::Whole } else { mode };
        Ok(TilePlan { mode, latent, grid: [rows.len(), cols.len()], tiles })
    }
}

/// The shortest tile of which no more are needed than of the usual one.
fn fitted(extent: usize) -> usize {
    let count = extent.saturating_sub(OVERLAP).div_ceil(TILE[0] - OVERLAP).max(1);
    (extent + OVERLAP * (count - 1)).div_ceil(count)
}

/// As few tiles as do. Those that overlap are `tile` long each and lie as evenly as can be, neighbours sharing `overlap`
/// or more: shorter ones that share no more than that cost a fifth less at usual sizes, and differ from the whole decode
/// ten to fifty times as much. Exact ones, which gain nothing by that, are as even as can be.
fn spans(extent: usize, tile: usize, overlap: usize, exact: bool) -> Vec<Span> {
    if tile >= extent {
        return vec![Span { start: 0, end: extent, own_start: 0, own_end: extent }];
    }
    let count = (extent - overlap).div_ceil(tile - overlap);
    if exact {
        let runs = Split::new(extent, count);
        let span = |run: Range<usize>| Span { start: run.start, end: run.end, own_start: run.start, own_end: run.end };
        return runs.ranges().map(span).collect();
    }
    let start = |place: usize| place * (extent - tile) / (count - 1);
    // Two neighbours change hands in the middle of what they share.
    let cut = |place: usize| (start(place) + start(place - 1) + tile) / 2;
    (0..count)
        .map(|place| Span {
            start: start(place),
            end: start(place) + tile,
            own_start: if place == 0 { 0 } else { cut(place) },
            own_end: if place + 1 == count { extent } else { cut(place + 1) },
        })
        .collect()
}

impl FromStr for Tiling {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        const HINT: &str = "write auto, whole, exact or HxW in latent pixels (8 pixels each), for example 24x24+4; \
                            before HxW, shared: (the default), independent: or exact:; after it, @BYTES of memory";
        let (choice, memory) = match text.split_once('@') {
            Some((choice, memory)) => {
                (choice, Some(memory.parse().map_err(|_| format!("{memory:?} is no number of bytes; {HINT}"))?))
            }
            None => (text, None),
        };
        let (mode, size) = match choice.split_once(':') {
            None => match choice {
                "auto" => return Ok(Self { choice: Choice::Auto, memory }),
                "whole" => return Ok(Self { choice: Choice::Whole, memory }),
                "exact" => {
                    return Ok(Self { choice: Choice::Tiles { mode: Mode::Exact, tile: TILE, overlap: 0 }, memory });
                }
                size => (Mode::Shared, size),
            },
            Some(("shared", size)) => (Mode::Shared, size),
            Some(("independent", size)) => (Mode::Independent, size),
            Some(("exact", size)) => (Mode::Exact, size),
            Some((mode, _)) => return Err(format!("no mode {mode:?}; {HINT}")),
        };
        let (size, overlap) = size.split_once('+').map_or((size, None), |(size, overlap)| (size, Some(overlap)));
        let number = |text: &str| text.parse::<usize>().map_err(|_| format!("{text:?} is no number; {HINT}"));
        let (height, width) = size.split_once('x').ok_or_else(|| format!("{size:?} is no size; {HINT}"))?;
        let tile = [number(height)?, number(width)?];
        let least = tile[0].min(tile[1]);
        let overlap = match (overlap, mode) {
            (Some(overlap), Mode::Exact) => {
                return Err(format!("exact tiles do not overlap: leave +{overlap} out"));
            }
            (Some(overlap), _) => number(overlap)?,
            (None, Mode::Exact) => 0,
            (None, _) => OVERLAP.min(least / 2),
        };
        if least < MIN_TILE {
            return Err(format!("a tile is at least {MIN_TILE}x{MIN_TILE} latent pixels, not {size}"));
        }
        if overlap >= least {
            return Err(format!("tiles of {size} overlap by at most {} latent pixels, not {overlap}", least - 1));
        }
        Ok(Self { choice: Choice::Tiles { mode, tile, overlap }, memory })
    }
}

impl fmt::Display for Tiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.choice {
            Choice::Auto => write!(f, "auto")?,
            Choice::Whole => write!(f, "whole")?,
            Choice::Tiles { mode, tile: [height, width], overlap } => match mode {
                Mode::Exact => write!(f, "exact:{height}x{width}")?,
                Mode::Independent => write!(f, "independent:{height}x{width}+{overlap}")?,
                Mode::Shared | Mode::Whole => write!(f, "shared:{height}x{width}+{overlap}")?,
            },
        }
        self.memory.map_or(Ok(()), |memory| write!(f, "@{memory}"))
    }
}

impl TryFrom<String> for Tiling {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Tiling> for String {
    fn from(tiling: Tiling) -> Self {
        tiling.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tiling(text: &str) -> Tiling {
        text.parse().unwrap()
    }

    #[test]
    fn tilings_are_read_as_documented_and_nothing_else() {
        for good in ["auto", "whole", "exact:24x24", "shared:8x8+2", "independent:12x20+4", "exact:2x2@1000", "auto@5"]
        {
            assert_eq!(tiling(good).to_string(), good);
        }
        assert_eq!(tiling("12x12+4"), tiling("shared:12x12+4"));
        assert_eq!(tiling("exact"), tiling("exact:24x24"));
        for bad in ["", "8", "8x", "x8", "8x8+8", "1x8", "8x8+-1", "exact:8x8+2", "fast:8x8", "auto@", "auto@lots"] {
            assert!(bad.parse::<Tiling>().is_err(), "{bad}");
        }
    }

    #[test]
    fn small_clips_are_decoded_whole_and_large_ones_in_tiles() {
        let plan = Tiling::AUTO.plan([24, 16], 1).unwrap();
        assert_eq!((plan.mode, plan.tiles.len()), (Mode::Whole, 1));
        let plan = Tiling::AUTO.plan([60, 106], 1).unwrap();
        assert_eq!((plan.mode, plan.grid), (Mode::Shared, [3, 6]));
        assert!(plan.tiles.iter().all(|tile| (tile.rows.len(), tile.cols.len()) == (23, 21)));
        assert_eq!(tiling("shared:8x8+2").plan([8, 6], 1).unwrap().mode, Mode::Whole);
    }

    #[test]
    fn exact_tiles_do_not_overlap_and_differ_by_one_pixel_at_most() {
        let plan = tiling("exact:8x10").plan([23, 24], 1).unwrap();
        let [rows, cols] =
            [plan.row_spans(), plan.col_spans()].map(|spans| spans.iter().map(|s| s.len()).collect::<Vec<_>>());
        assert_eq!((rows, cols), (vec![8, 8, 7], vec![8, 8, 8]));
        assert!(plan.tiles.iter().all(|tile| tile.rows.own() == (0..tile.rows.len())));
    }

    #[test]
    fn what_does_not_fit_the_memory_is_refused_and_tiles_shrink_to_it() {
        assert!(tiling("whole@999").plan([10, 10], 10).unwrap_err().contains("decode in tiles"));
        let plan = tiling("auto@1000").plan([10, 40], 10).unwrap();
        assert_eq!(plan.mode, Mode::Shared);
        assert!(plan.tiles.iter().all(|tile| tile.pixels() <= 100));
        assert!(tiling("8x8+4@100").plan([10, 40], 10).is_err());
    }

    proptest! {
        #[test]
        fn every_pixel_is_covered_and_owned_once(
            height in 1..70usize, width in 1..120usize, tile in 2..30usize, overlap in 0..15usize, memory in 100..2000u64
        ) {
            let overlap = overlap.min(tile - 1);
            let text = format!("{tile}x{tile}+{overlap}@{memory}");
            let Ok(plan) = tiling(&text).plan([height, width], 2) else { return Ok(()) };
            let mut owned = vec![0u8; height * width];
            for (spans, extent) in [(plan.row_spans(), height), (plan.col_spans(), width)] {
                prop_assert!(spans.windows(2).all(|pair| pair[0].end >= pair[1].start + overlap), "{spans:?}");
                prop_assert!(spans.iter().all(|span| span.len() == extent.min(spans[0].len())));
            }
            for tile in &plan.tiles {
                prop_assert!(tile.pixels() as u64 * 2 <= memory);
                for span in [tile.rows, tile.cols] {
                    prop_assert!(span.start <= span.own_start && span.own_start < span.own_end && span.own_end <= span.end);
                }
                for row in tile.rows.own_start..tile.rows.own_end {
                    for col in tile.cols.own_start..tile.cols.own_end {
                        owned[row * width + col] += 1;
                    }
                }
            }
            prop_assert!(owned.iter().all(|&times| times == 1));
        }
    }
}
