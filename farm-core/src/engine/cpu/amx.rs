//! Products on the matrix units of x86 processors (AMX): 16 rows by 16 columns of bf16 pairs at a time, summed in f32.
//!
//! An f32 value is exactly the sum of three bf16 *pieces*: its rounding, the rounding of what is left, and the rest. Of the
//! nine products of two values' pieces the six largest are summed; the others are below 2⁻²³ of the product. So with three
//! pieces a product is as exact as one of f32 numbers, at several times the rate of the vector units. With one piece it is
//! that of values rounded to bf16.
//!
//! Products of pieces are exact in f32; every addition rounds once, to the nearest. Additions are in the order of the depth,
//! in runs of [`DEPTH`], whatever else is computed with a row: a row has the same bits with any number of others. Subnormal
//! numbers count as zero.

use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::data::Bits;
use super::product::{Finish, PANEL, Target};

/// Rows and columns of a tile of sums, and pairs of depth of a tile of factors.
const TILE: usize = 16;
/// Depth of a tile.
pub(super) const STEP: usize = 2 * TILE;
/// Values of a tile: 1 KiB.
const TILE_VALUES: usize = TILE * STEP;
/// Additions in a row; multiples of it may be cut into several products that are added.
pub(super) const DEPTH: usize = 512;

/// Whether this machine has them and lets this process use them.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && is_permitted())
}

fn has_instructions() -> bool {
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    if __cpuid(0).eax < 7 || !is_x86_feature_detected!("avx512bf16") || !is_x86_feature_detected!("avx512bw") {
        return false;
    }
    __cpuid_count(7, 0).edx & (BF16 | TILES) == BF16 | TILES
}

/// Linux keeps the tiles' state for a process only if it asks.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // Safety: the call takes two numbers and changes nothing but this permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// 16 lines of 32 values of bf16.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile([u16; TILE_VALUES]);

// Safety: numbers.
unsafe impl Bits for Tile {}

impl Default for Tile {
    fn default() -> Self {
        Self([0; TILE_VALUES])
    }
}

/// Tiles of `rows` × `depth` left-hand values of so many pieces.
pub(super) fn left_tiles(rows: usize, depth: usize, pieces: usize) -> usize {
    rows.div_ceil(TILE) * depth.div_ceil(STEP) * pieces
}

/// Tiles of `panels` panels of right-hand values of this depth.
pub(super) fn right_tiles(depth: usize, panels: usize, pieces: usize) -> usize {
    panels * depth.div_ceil(STEP) * pieces * (PANEL / TILE)
}

/// Arranges rows for products from the left: `[row tiles][steps][pieces][16 rows][32]`, zeros beyond the last row and value.
///
/// # Panics
/// If the machine has no matrix units, or the rows do not fit their slice.
pub(super) fn arrange_left<const P: usize>(
    values: &[f32],
    stride: usize,
    [rows, depth]: [usize; 2],
    to: &mut Vec<Tile>,
) {
    assert!(available() && (rows == 0 || (rows - 1) * stride + depth <= values.len()));
    to.resize(left_tiles(rows, depth, P), Tile::default());
    // Safety: the instructions are there; the rest was just checked.
    unsafe { arrange_rows::<P>(values, stride, [rows, depth], to) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn arrange_rows<const P: usize>(values: &[f32], stride: usize, [rows, depth]: [usize; 2], to: &mut [Tile]) {
    let steps = depth.div_ceil(STEP);
    for row in 0..rows.next_multiple_of(TILE) {
        let width = if row < rows { depth } else { 0 };
        let mut to =
            to[row / TILE * steps * P..][..steps * P].as_mut_ptr().cast::<u16>().wrapping_add(row % TILE * STEP);
        for step in 0..steps {
            let at = row * stride + step * STEP;
            // Safety: 32 values are there, or as many as are loaded; the line lies in its tile, and those of the other
            // pieces in theirs.
            unsafe {
                let halves = match width.saturating_sub(step * STEP) {
                    STEP.. => [0, TILE].map(|half| _mm512_loadu_ps(values.as_ptr().add(at + half))),
                    left => [(0, left.min(TILE)), (TILE, left.saturating_sub(TILE))].map(|(half, left)| {
                        let some = ((1u32 << left) - 1) as __mmask16;
                        _mm512_maskz_loadu_ps(some, values.as_ptr().wrapping_add(at + half))
                    }),
                };
                split_line::<P>(halves, None, to, TILE_VALUES);
            }
            to = to.wrapping_add(P * TILE_VALUES);
        }
    }
}

/// Arranges a panel `[depth, 32]` for products from the right: `[steps][pieces][2 halves][16 pairs of rows][16 columns][2]`,
/// zeros beyond the last row.
///
/// # Panics
/// If the machine has no matrix units, or there is no room.
pub(super) fn arrange_right<const P: usize>(panel: &[f32], to: &mut [Tile]) {
    assert!(available() && to.len() == right_tiles(panel.len() / PANEL, 1, P));
    // Safety: the instructions are there; the rest was just checked.
    unsafe { arrange_panel::<P>(panel, to) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn arrange_panel<const P: usize>(panel: &[f32], to: &mut [Tile]) {
    const HALVES: usize = PANEL / TILE;
    let depth = panel.len() / PANEL;
    let zeros = [0f32; PANEL];
    // Column by column the value of the even row and the one of the odd row.
    let order: [u16; STEP] = std::array::from_fn(|i| (i / 2 + i % 2 * TILE) as u16);
    // Safety: 32 values.
    let order = unsafe { _mm512_loadu_epi16(order.as_ptr().cast()) };
    for pair in 0..depth.div_ceil(STEP) * TILE {
        let row = |row: usize| if row < depth { &panel[row * PANEL..][..PANEL] } else { &zeros[..] };
        let (even, odd) = (row(2 * pair), row(2 * pair + 1));
        for half in 0..HALVES {
            let to = &mut to[pair / TILE * P * HALVES + half..];
            // Safety: 16 values of each row; the line lies in its tile, and those of the other pieces in theirs.
            unsafe {
                let rows = [&even[half * TILE..], &odd[half * TILE..]].map(|row| _mm512_loadu_ps(row.as_ptr()));
                let to = to.as_mut_ptr().cast::<u16>().add(pair % TILE * STEP);
                split_line::<P>(rows, Some(order), to, HALVES * TILE_VALUES);
            }
        }
    }
}

/// Writes the pieces of 32 values, in this order, `stride` values apart.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn split_line<const P: usize>(mut halves: [__m512; 2], order: Option<__m512i>, to: *mut u16, stride: usize) {
    for piece in 0..P {
        // Safety: both are 64 bytes without invalid values.
        let rounded: __m512i = unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(halves[1], halves[0])) };
        let line = order.map_or(rounded, |order| _mm512_permutexvar_epi16(order, rounded));
        // Safety: the caller's promise.
        unsafe { _mm512_storeu_epi16(to.add(piece * stride).cast(), line) };
        if piece + 1 < P {
            let widened = [_mm512_castsi512_si256(rounded), _mm512_extracti64x4_epi64::<1>(rounded)]
                .map(|half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half))));
            // Exact: what is left has no more digits than the value had.
            halves = [_mm512_sub_ps(halves[0], widened[0]), _mm512_sub_ps(halves[1], widened[1])];
        }
    }
}

/// The product of arranged rows with one arranged panel, to `width` columns of `out`; a bias is that of these columns.
///
/// # Safety
/// `rows` rows of `width` values at `out` have to be valid for reads and writes, and in use by nobody else.
///
/// # Panics
/// If the sizes do not fit.
pub(super) unsafe fn product<const P: usize>(
    _: &Configured,
    left: &[Tile],
    right: &[Tile],
    [rows, width]: [usize; 2],
    out: Target,
    finish: Finish<'_>,
) {
    const BLOCK: usize = 2 * TILE;
    let steps = right.len() / (P * PANEL / TILE);
    assert!(right.len() == right_tiles(steps * STEP, 1, P));
    assert!(left.len() == left_tiles(rows, steps * STEP, P) && width <= PANEL);
    assert!(finish.bias.is_none_or(|bias| bias.len() >= width));
    let mut sums = Block([[0.0; PANEL]; BLOCK]);
    let buffer = Target { start: sums.0.as_mut_ptr().cast(), stride: PANEL };
    for first in (0..rows).step_by(BLOCK) {
        let upper = left[first / TILE * steps * P..].as_ptr();
        // Without a second tile of rows the first stands in for it, and nobody reads the result.
        let lower = if first + TILE < rows { upper.wrapping_add(steps * P) } else { upper };
        // Safety: the row is there.
        let to = unsafe { out.at(first, 0) };
        // What is written at the end is fetched meanwhile.
        for row in 0..BLOCK.min(rows - first) {
            let line = to.start.wrapping_add(row * to.stride).cast::<i8>();
            // Safety: fetching changes nothing, wherever it points.
            unsafe {
                _mm_prefetch::<_MM_HINT_ET0>(line);
                _mm_prefetch::<_MM_HINT_ET0>(line.wrapping_add(64));
            }
        }
        let whole = first + BLOCK <= rows && width == PANEL && !finish.add && finish.bias.is_none();
        // Safety: tiles are configured; each pointer has the tiles of `steps` steps by the assertions; a whole block lies in
        // `out`, which is the caller's promise.
        unsafe {
            block::<P>([upper, lower], right.as_ptr(), steps, if whole { to } else { buffer });
            if !whole {
                write(&sums, rows - first, width, to, finish);
            }
        }
    }
}

/// Some rows and columns of sums, to `out`.
///
/// # Safety
/// As for [`product`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn write(sums: &Block, rows: usize, width: usize, out: Target, finish: Finish<'_>) {
    for (row, sums) in sums.0.iter().enumerate().take(rows) {
        // Safety: the caller's promise.
        let out = unsafe { std::slice::from_raw_parts_mut(out.at(row, 0).start, width) };
        if finish.add {
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        } else {
            out.copy_from_slice(&sums[..width]);
        }
        if let Some(bias) = finish.bias {
            out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
        }
    }
}

/// [`arrange_left`] with one piece, or else three.
pub(super) fn arrange_left_of(pieces: usize, values: &[f32], stride: usize, sizes: [usize; 2], to: &mut Vec<Tile>) {
    match pieces {
        1 => arrange_left::<1>(values, stride, sizes, to),
        _ => arrange_left::<3>(values, stride, sizes, to),
    }
}

/// [`product`] with one piece, or else three.
///
/// # Safety
/// As for [`product`].
pub(super) unsafe fn product_of(
    pieces: usize,
    tiles: &Configured,
    left: &[Tile],
    right: &[Tile],
    sizes: [usize; 2],
    out: Target,
    finish: Finish<'_>,
) {
    // Safety: the caller's promise.
    unsafe {
        match pieces {
            1 => product::<1>(tiles, left, right, sizes, out, finish),
            _ => product::<3>(tiles, left, right, sizes, out, finish),
        }
    }
}

/// Sums of 32 rows and columns.
#[repr(C, align(64))]
struct Block([[f32; PANEL]; 2 * TILE]);

/// While it lives, this thread's tile registers are of 16 rows of 64 bytes.
pub(super) struct Configured(PhantomData<*const ()>);

impl Configured {
    /// # Panics
    /// If the machine has no matrix units.
    pub fn new() -> Self {
        assert!(available());
        #[repr(C, align(64))]
        struct Layout {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            bytes: [u16; 16],
            rows: [u8; 16],
        }
        static LAYOUT: Layout = Layout {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        // Safety: the layout is one of palette 1, and the caller has found tiles to be available.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const LAYOUT, options(nostack, readonly)) };
        Self(PhantomData)
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // Without it the kernel saves 8 KiB at every switch of this thread.
        // Safety: the tiles hold nothing that anybody wants.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// All products of two tiles of rows with two of columns, summed over the steps, to `out`.
///
/// # Safety
/// Tiles have to be configured, each pointer has to have the tiles of `steps` steps, and `out` room for 32 rows and columns.
unsafe fn block<const P: usize>(left: [*const Tile; 2], right: *const Tile, steps: usize, out: Target) {
    let lower = out.start.wrapping_add(TILE * out.stride);
    // The four products of what is loaded.
    macro_rules! four {
        () => {
            "tdpbf16ps tmm0, tmm4, tmm6
             tdpbf16ps tmm1, tmm4, tmm7
             tdpbf16ps tmm2, tmm5, tmm6
             tdpbf16ps tmm3, tmm5, tmm7
            "
        };
    }
    macro_rules! left {
        ($piece:literal) => {
            concat!(
                "tileloadd tmm4, [{a} + {line}*1 + 1024*",
                $piece,
                "]\n",
                "tileloadd tmm5, [{b} + {line}*1 + 1024*",
                $piece,
                "]\n"
            )
        };
    }
    macro_rules! right {
        ($piece:literal) => {
            concat!(
                "tileloadd tmm6, [{c} + {line}*1 + 2048*",
                $piece,
                "]\n",
                "tileloadd tmm7, [{c} + {line}*1 + 2048*",
                $piece,
                " + 1024]\n"
            )
        };
    }
    macro_rules! steps {
        ($pieces:literal, $($body:expr),*) => {
            // Safety: the caller's promise.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "test {n}, {n}",
                    "jz 3f",
                    "2:",
                    $($body,)*
                    concat!("add {a}, 1024*", $pieces),
                    concat!("add {b}, 1024*", $pieces),
                    concat!("add {c}, 2048*", $pieces),
                    "dec {n}",
                    "jnz 2b",
                    "3:",
                    "tilestored [{out} + {row}*1], tmm0",
                    "tilestored [{out} + {row}*1 + 64], tmm1",
                    "tilestored [{lower} + {row}*1], tmm2",
                    "tilestored [{lower} + {row}*1 + 64], tmm3",
                    a = inout(reg) left[0] => _,
                    b = inout(reg) left[1] => _,
                    c = inout(reg) right => _,
                    n = inout(reg) steps => _,
                    out = in(reg) out.start,
                    lower = in(reg) lower,
                    line = in(reg) 64usize,
                    row = in(reg) 4 * out.stride,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack)
                )
            }
        };
    }
    match P {
        1 => steps!(1, left!(0), right!(0), four!()),
        // The order of the pieces changes one side at a time.
        _ => steps!(
            3,
            left!(2),
            right!(0),
            four!(),
            left!(0),
            four!(),
            left!(1),
            four!(),
            right!(1),
            four!(),
            left!(0),
            four!(),
            right!(2),
            four!()
        ),
    }
}
