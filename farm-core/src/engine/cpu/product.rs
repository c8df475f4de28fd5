//! The matrix product that linear layers, attention and convolutions are made of.
//!
//! The right-hand matrix is arranged once in [`Panels`]. Of the left-hand one, [`Rows`], a few rows are multiplied with a
//! panel at a time: their sums stay in registers, and nothing of the left-hand matrix is copied.
//!
//! The order of additions depends on the depth only: every [`CHAIN`] products are summed from the first to the last with one
//! rounding for each, and these sums are added in order. So an element has the same bits whatever other rows
//! and columns are computed with it, on any number of threads, and with any instruction set.

use std::ops::Range;

use super::data::Kept;
use super::lanes::{Lanes, Plain};

/// Columns of a panel.
pub(super) const PANEL: usize = 32;
/// Products that are summed one after the other: more would lose digits. Sums that go on over several calls have to be cut at
/// multiples of it.
pub(super) const CHAIN: usize = 64;

/// Bytes of a cache line.
const LINE: usize = 64;

/// A right-hand matrix `[depth, columns]`: panels of [`PANEL`] columns, each `[depth, PANEL]`, the last filled with zeros.
pub(super) struct Panels {
    depth: usize,
    columns: usize,
    values: Kept<f32>,
}

impl Panels {
    /// From the transposed matrix, `[columns, depth]` with rows `stride` values apart.
    pub fn of_transposed(values: &[f32], [columns, depth]: [usize; 2], stride: usize) -> Self {
        let mut panels = Self::zeros(depth, columns);
        for (panel, to) in panels.iter_mut().enumerate() {
            let first = panel * PANEL;
            transpose_panel(&values[first * stride..], PANEL.min(columns - first), stride, to);
        }
        panels
    }

    pub fn zeros(depth: usize, columns: usize) -> Self {
        Self { depth, columns, values: Kept::zeros(columns.div_ceil(PANEL) * depth * PANEL) }
    }

    /// The panels, `[depth, PANEL]` each.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.values.chunks_exact_mut((self.depth * PANEL).max(1))
    }

    pub fn view(&self) -> PanelsView<'_> {
        PanelsView { values: &self.values, whole: self.depth, columns: self.columns, depth: 0..self.depth }
    }
}

/// Writes `columns` rows of the transposed matrix as one panel.
pub(super) fn transpose_panel(from: &[f32], columns: usize, stride: usize, to: &mut [f32]) {
    // Blocks that fit the first-level cache, so that no line of either side is fetched twice.
    const BLOCK: usize = 64;
    let depth = to.len() / PANEL;
    for start in (0..depth).step_by(BLOCK) {
        let len = BLOCK.min(depth - start);
        for column in 0..columns {
            let from = &from[column * stride + start..][..len];
            for (value, to) in from.iter().zip(to[start * PANEL + column..].iter_mut().step_by(PANEL)) {
                *to = *value;
            }
        }
    }
}

/// Some rows of [`Panels`].
#[derive(Clone)]
pub(super) struct PanelsView<'a> {
    /// As in [`Panels`], of matrices `[whole, columns]`.
    pub values: &'a [f32],
    pub whole: usize,
    pub columns: usize,
    pub depth: Range<usize>,
}

impl<'a> PanelsView<'a> {
    /// Rows `depth` of the matrix.
    pub fn part(&self, depth: Range<usize>) -> Self {
        Self { depth, ..self.clone() }
    }

    /// `[depth, PANEL]`
    pub fn panel(&self, panel: usize) -> &'a [f32] {
        let (first, len) = (panel * self.whole + self.depth.start, self.depth.len());
        &self.values[first * PANEL..][..len * PANEL]
    }

    fn fits(&self) -> bool {
        self.depth.end <= self.whole && self.values.len() == self.columns.div_ceil(PANEL) * self.whole * PANEL
    }
}

/// A left-hand matrix in memory that is someone else's. Row `i` is, one run after the other, the values
/// `i·stride .. i·stride + len` of each `(values, len)`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub count: usize,
    pub stride: usize,
    pub runs: &'a [(&'a [f32], usize)],
}

impl<'a> Rows<'a> {
    fn depth(&self) -> usize {
        self.runs.iter().map(|(_, len)| len).sum()
    }

    fn fits(&self) -> bool {
        self.count == 0 || self.runs.iter().all(|(values, len)| (self.count - 1) * self.stride + len <= values.len())
    }
}

/// Start and stride of rows that a product is written to.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub start: *mut f32,
    pub stride: usize,
}
// Safety: whoever makes one vouches for what it is used for, on whatever thread.
unsafe impl Send for Target {}
unsafe impl Sync for Target {}

impl Target {
    /// # Safety
    /// `offset` has to lie in the output.
    #[inline(always)]
    pub unsafe fn at(self, row: usize, column: usize) -> Self {
        // Safety: the caller's promise.
        unsafe { Self { start: self.start.add(row * self.stride + column), ..self } }
    }
}

/// What becomes of a product.
#[derive(Clone, Copy)]
pub(super) struct Finish<'a> {
    /// It is added to what is there.
    pub add: bool,
    /// And then a value to each column, of all columns of the right-hand matrix.
    pub bias: Option<&'a [f32]>,
}

impl Finish<'_> {
    pub const STORE: Finish<'static> = Finish { add: false, bias: None };
    pub const ADD: Finish<'static> = Finish { add: true, bias: None };
}

/// The product of `rows` with the given panels of `right`. Column 0 of the first given panel goes to column 0 of `out`.
/// Runs on the calling thread.
///
/// # Safety
/// `rows.count` rows of as many values as the panels have columns have to be valid for writes at `out`, and in use by nobody
/// else.
///
/// # Panics
/// If the sizes do not fit each other or their slices, which is a bug of the caller.
pub(super) unsafe fn product(
    rows: Rows<'_>,
    right: PanelsView<'_>,
    panels: Range<usize>,
    out: Target,
    finish: Finish<'_>,
) {
    assert!(rows.fits() && right.fits() && rows.depth() == right.depth.len());
    assert!(panels.end <= right.columns.div_ceil(PANEL));
    assert!(finish.bias.is_none_or(|bias| bias.len() == right.columns));
    #[cfg(target_arch = "x86_64")]
    {
        use super::lanes::x86::{Avx2, Avx512};

        #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,fma")]
        unsafe fn avx512(rows: Rows<'_>, right: PanelsView<'_>, panels: Range<usize>, out: Target, finish: Finish<'_>) {
            // Safety: as of the whole.
            unsafe { walk::<Avx512, 2, 14>(rows, right, panels, out, finish) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(rows: Rows<'_>, right: PanelsView<'_>, panels: Range<usize>, out: Target, finish: Finish<'_>) {
            // Safety: as of the whole.
            unsafe { walk::<Avx2, 4, 3>(rows, right, panels, out, finish) }
        }
        if super::wide::has_avx512() {
            // Safety: the features were found on this CPU; the rest is the caller's promise.
            return unsafe { avx512(rows, right, panels, out, finish) };
        }
        if super::wide::has_avx2() {
            // Safety: as above.
            return unsafe { avx2(rows, right, panels, out, finish) };
        }
    }
    // Safety: the caller's promise.
    unsafe { walk::<Plain, 2, 4>(rows, right, panels, out, finish) }
}

/// [`product`] with vectors `L`, `V` of which are a part of a panel, and at most `MOST` rows at a time.
#[inline(always)]
unsafe fn walk<L: Lanes, const V: usize, const MOST: usize>(
    rows: Rows<'_>,
    right: PanelsView<'_>,
    panels: Range<usize>,
    out: Target,
    finish: Finish<'_>,
) {
    let tiles = rows.count.div_ceil(MOST);
    for (column, panel) in panels.enumerate() {
        let values = right.panel(panel);
        // Fetched while this one is used: of a few rows, a product waits for little else than the weights.
        let next = values.as_ptr().wrapping_add(right.whole * PANEL).cast::<u8>();
        let bytes = size_of_val(values);
        let width = PANEL.min(right.columns - panel * PANEL);
        for part in (0..width).step_by(V * L::WIDTH) {
            let width = (V * L::WIDTH).min(width - part);
            let finish = Finish { bias: finish.bias.map(|bias| &bias[panel * PANEL + part..]), ..finish };
            for tile in 0..tiles {
                // Tiles of equal size, but for one row: a last tile of a few rows would waste most of its time.
                let (first, end) = (tile * rows.count / tiles, (tile + 1) * rows.count / tiles);
                if part == 0 {
                    for line in (tile * bytes / tiles..(tile + 1) * bytes / tiles).step_by(LINE) {
                        L::fetch(next.wrapping_add(line));
                    }
                }
                // Safety: the rows lie in `rows`, the columns in the panel, and both in `out`.
                unsafe {
                    let out = out.at(first, column * PANEL + part);
                    let task = Tile { rows, first, right: values.as_ptr().add(part), out, width, finish };
                    task.run::<L, V, MOST>(end - first);
                }
            }
        }
    }
}

/// Some rows times a part of a panel.
struct Tile<'a> {
    rows: Rows<'a>,
    first: usize,
    right: *const f32,
    out: Target,
    /// Columns that there are; the others are zeros of the panel.
    width: usize,
    finish: Finish<'a>,
}

impl Tile<'_> {
    #[inline(always)]
    unsafe fn run<L: Lanes, const V: usize, const MOST: usize>(&self, rows: usize) {
        macro_rules! rows {
            ($($n:literal)*) => {
                match rows {
                    // Safety: the caller's promise.
                    $($n if $n <= MOST => unsafe { self.sum::<L, V, $n>() },)*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    }

    #[inline(always)]
    unsafe fn sum<L: Lanes, const V: usize, const R: usize>(&self) {
        // Safety: the caller's promise; a panel's part of V vectors is V·WIDTH columns wide, zeros included.
        unsafe {
            let mut runs = self.rows.runs.iter();
            let mut next_run =
                || runs.next().map(|(values, len)| (values.as_ptr().add(self.first * self.rows.stride), *len));
            let (mut run, mut right, mut begun) = (next_run(), self.right, self.finish.add);
            loop {
                let mut sums = [[L::splat(0.0); V]; R];
                let mut left_over = CHAIN;
                while let Some((left, len)) = run
                    && left_over > 0
                {
                    let taken = len.min(left_over);
                    sums = accumulate::<L, V, R>(sums, left, self.rows.stride, right, taken);
                    right = right.add(taken * PANEL);
                    left_over -= taken;
                    run = if taken == len { next_run() } else { Some((left.add(taken), len - taken)) };
                }
                if self.width == V * L::WIDTH {
                    write::<L, V, R>(sums, self.out, begun);
                } else {
                    let mut buffer = [[0f32; PANEL]; R];
                    write::<L, V, R>(sums, Target { start: buffer.as_mut_ptr().cast(), stride: PANEL }, false);
                    self.write_narrow(&buffer, begun);
                }
                begun = true;
                if run.is_none() {
                    break;
                }
            }
            if let Some(bias) = self.finish.bias {
                for r in 0..R {
                    let out = std::slice::from_raw_parts_mut(self.out.at(r, 0).start, self.width);
                    out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
                }
            }
        }
    }

    /// Where the panel's columns are more than there are.
    unsafe fn write_narrow(&self, sums: &[[f32; PANEL]], begun: bool) {
        for (r, sums) in sums.iter().enumerate() {
            // Safety: `width` columns of each row are the caller's promise.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.at(r, 0).start, self.width) };
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = if begun { *out + sum } else { *sum };
            }
        }
    }
}

/// Adds the products of one run.
#[inline(always)]
unsafe fn accumulate<L: Lanes, const V: usize, const R: usize>(
    mut sums: [[L; V]; R],
    left: *const f32,
    stride: usize,
    right: *const f32,
    len: usize,
) -> [[L; V]; R] {
    for k in 0..len {
        // Safety: `len` values of R rows and `len` rows of a panel are the caller's promise.
        unsafe {
            // The side with fewer vectors waits in registers: beside the sums there is no room for both.
            if R < V {
                let left: [L; R] = std::array::from_fn(|r| L::splat(*left.add(r * stride + k)));
                for v in 0..V {
                    let right = L::load(right.add(k * PANEL + v * L::WIDTH));
                    for (sums, left) in sums.iter_mut().zip(left) {
                        sums[v] = left.fma(right, sums[v]);
                    }
                }
            } else {
                let right: [L; V] = std::array::from_fn(|v| L::load(right.add(k * PANEL + v * L::WIDTH)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let left = L::splat(*left.add(r * stride + k));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = left.fma(right, *sum);
                    }
                }
            }
        }
    }
    sums
}

/// Stores sums, or adds them to what is there. By value, and without a choice in the loops: else the compiler keeps them in
/// memory.
#[inline(always)]
unsafe fn write<L: Lanes, const V: usize, const R: usize>(sums: [[L; V]; R], out: Target, begun: bool) {
    // Safety: the caller's promise.
    unsafe {
        if begun {
            for (r, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    let to = out.at(r, v * L::WIDTH).start;
                    L::load(to).add(sum).store(to);
                }
            }
        } else {
            for (r, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    sum.store(out.at(r, v * L::WIDTH).start);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn all_instruction_sets_have_the_same_bits() {
        // Rows in two runs, more of them than a tile; a narrow last panel; more products than a chain.
        let (count, runs, columns) = (31, [50, 41], 71);
        let depth: usize = runs.iter().sum();
        let (first, second) = (values(count * runs[0], 1), values(count * runs[0], 2));
        let right = Panels::of_transposed(&values(columns * depth, 3), [columns, depth], depth);
        let bias = values(columns, 4);
        let rows = Rows { count, stride: runs[0], runs: &[(&first, runs[0]), (&second, runs[1])] };
        let finish = Finish { add: true, bias: Some(&bias) };
        let run = |with: unsafe fn(Rows<'_>, PanelsView<'_>, Range<usize>, Target, Finish<'_>)| {
            let mut out = values(count * columns, 5);
            let to = Target { start: out.as_mut_ptr(), stride: columns };
            // Safety: `out` has `count` rows of `columns` values; instruction sets are those of this machine.
            unsafe { with(rows, right.view(), 0..columns.div_ceil(PANEL), to, finish) };
            out
        };
        let plain = run(walk::<Plain, 2, 4>);
        assert!(plain == run(product));
        #[cfg(target_arch = "x86_64")]
        if super::super::wide::has_avx2() {
            assert!(plain == run(walk::<super::super::lanes::x86::Avx2, 4, 3>));
        }
    }
}
