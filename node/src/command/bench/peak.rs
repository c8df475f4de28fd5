//! `farm-node bench peak`: what one core computes at most, by instructions that touch nothing but registers, and what the
//! memory moves. What a network does is held against this.

use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::cores;

/// A measurement takes at least so long, and is the best of so many: whatever else runs on the core only takes away.
const LEAST: Duration = Duration::from_millis(50);
const TRIES: usize = 5;
/// Larger than caches of one core's share, and copied whole.
const COPY_BYTES: usize = 256 << 20;
const COPIES: usize = 5;

#[derive(clap::Args)]
pub struct Args {
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
}

/// Of one core. An addition and a multiplication are two operations.
#[derive(Serialize)]
struct Figures {
    /// Vectors of the f32 figure.
    vectors: &'static str,
    /// Multiply-adds, FLOP/s.
    f32_flops: f64,
    /// Products of bf16 tiles with f32 sums, FLOP/s; none without AMX.
    tile_flops: Option<f64>,
    /// Of a copy larger than the caches: bytes read and bytes written, a second.
    copy_bytes: f64,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    // One core, and the same for all figures.
    if let Some(&core) = cores::allowed()?.last() {
        cores::pin_thread(&[core])?;
    }
    let (vectors, f32_flops) = multiply_adds();
    let figures = Figures { vectors, f32_flops, tile_flops: tile_products(), copy_bytes: copy() };
    if args.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!("{}", figures.table());
    }
    Ok(ExitCode::SUCCESS)
}

impl Figures {
    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(["of one core", "with", "measured"]);
        let giga = |value: f64, unit: &str| format!("{:.0} {unit}", value / 1e9);
        table.add_row(["f32 multiply-adds", self.vectors, &giga(self.f32_flops, "GFLOP/s")]);
        let tiles = self.tile_flops.map_or("not here".into(), |flops| giga(flops, "GFLOP/s"));
        table.add_row(["bf16 products, f32 sums", "AMX", &tiles]);
        table.add_row(["copy, read and written", "memory", &giga(self.copy_bytes, "GB/s")]);
        if let Some(column) = table.column_mut(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

/// The most operations a second that `work` does: it is given a number of rounds of `per_round` operations each.
fn best_rate(per_round: f64, mut work: impl FnMut(u64)) -> f64 {
    let mut timed = |rounds| {
        let started = Instant::now();
        work(rounds);
        started.elapsed()
    };
    // The first run wakes the units up and finds the number of rounds.
    let mut rounds = 1 << 10;
    while timed(rounds) < LEAST && rounds < 1 << 40 {
        rounds *= 2;
    }
    let seconds = (0..TRIES).map(|_| timed(rounds).as_secs_f64()).fold(f64::INFINITY, f64::min);
    rounds as f64 * per_round / seconds
}

/// f32 multiply-adds of the widest vectors here, and what these are called.
pub(super) fn multiply_adds() -> (&'static str, f64) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the instructions were just found on this processor.
            let rate = best_rate(x86::AVX512_OPERATIONS, |rounds| unsafe { x86::avx512(rounds) });
            return ("AVX-512", rate);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            let rate = best_rate(x86::AVX2_OPERATIONS, |rounds| unsafe { x86::avx2(rounds) });
            return ("AVX2", rate);
        }
    }
    ("the compiler's vectors", best_rate(2.0 * PLAIN_SUMS as f64, plain))
}

const PLAIN_SUMS: usize = 64;

/// A multiplication and an addition for each of the sums, as the compiler puts them into vectors.
fn plain(rounds: u64) {
    let (factor, step) = (black_box(0.5f32), black_box(1.0f32));
    let mut sums = [0f32; PLAIN_SUMS];
    for _ in 0..rounds {
        sums.iter_mut().for_each(|sum| *sum = *sum * factor + step);
    }
    black_box(sums);
}

/// Products of tiles; none where there are none.
fn tile_products() -> Option<f64> {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if x86::tiles_permitted() {
        // SAFETY: the instructions are here, and this process may use them.
        return Some(best_rate(x86::TILE_OPERATIONS, |rounds| unsafe { x86::tiles(rounds) }));
    }
    None
}

/// Bytes read and written a second by copies that no cache holds.
fn copy() -> f64 {
    let from = vec![1u8; COPY_BYTES];
    let mut to = vec![2u8; COPY_BYTES];
    let mut best = f64::INFINITY;
    for _ in 0..COPIES {
        let started = Instant::now();
        black_box(&mut to[..]).copy_from_slice(black_box(&from));
        best = best.min(started.elapsed().as_secs_f64());
    }
    black_box(to);
    2.0 * COPY_BYTES as f64 / best
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    /// A factor and what is added: the sums go towards 2, far from where arithmetic is slow.
    static NUMBERS: [f32; 2] = [0.5, 1.0];

    /// `sum = sum * factor + step` in a loop over registers of the names and the factors that are given. The sums are more than
    /// two units of four or five cycles each have under way, and do not wait for each other.
    macro_rules! multiply_adds {
        ($rounds:ident, $zero:literal, $register:literal, $factor:literal, $step:literal, $($sum:literal)*) => {
            asm!(
                $(concat!($zero, " ", $register, $sum, ", ", $register, $sum, ", ", $register, $sum),)*
                concat!("vbroadcastss ", $register, $factor, ", [{numbers}]"),
                concat!("vbroadcastss ", $register, $step, ", [{numbers} + 4]"),
                "2:",
                $(concat!("vfmadd213ps ", $register, $sum, ", ", $register, $factor, ", ", $register, $step),)*
                "dec rcx",
                "jnz 2b",
                numbers = in(reg) &NUMBERS,
                inout("rcx") $rounds.max(1) => _,
                clobber_abi("C"),
                options(nostack, readonly),
            )
        };
    }

    /// Operations of a round.
    pub const AVX512_OPERATIONS: f64 = (20 * 16 * 2) as f64;
    pub const AVX2_OPERATIONS: f64 = (12 * 8 * 2) as f64;

    #[target_feature(enable = "avx512f")]
    pub fn avx512(rounds: u64) {
        // SAFETY: reads the two numbers, and changes registers that are named or belong to the callee.
        unsafe {
            multiply_adds!(rounds, "vpxord", "zmm", "30", "31",
                "0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "10" "11" "12" "13" "14" "15" "16" "17" "18" "19")
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn avx2(rounds: u64) {
        // SAFETY: as above.
        unsafe {
            multiply_adds!(rounds, "vxorps", "ymm", "14", "15", "0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "10" "11")
        }
    }

    /// Four products of 16×32 by 32×16 values.
    pub const TILE_OPERATIONS: f64 = (4 * 16 * 16 * 32 * 2) as f64;

    /// Whether the processor has tiles of bf16, and the kernel gives them to this process. It has to be asked.
    #[cfg(target_os = "linux")]
    pub fn tiles_permitted() -> bool {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        __cpuid(0).eax >= 7
            && __cpuid_count(7, 0).edx & (BF16 | TILES) == BF16 | TILES
            // SAFETY: the call takes two numbers and changes nothing but this permission.
            && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }

    /// Eight tiles of 16 lines of 64 bytes.
    #[repr(C, align(64))]
    struct TileConfig {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        line_bytes: [u16; 16],
        lines: [u8; 16],
    }

    /// Four sums of four products: two tiles from the left, two from the right.
    ///
    /// # Safety
    /// [`tiles_permitted`] has said yes.
    #[cfg(target_os = "linux")]
    pub unsafe fn tiles(rounds: u64) {
        let mut config =
            TileConfig { palette: 1, start_row: 0, reserved: [0; 14], line_bytes: [0; 16], lines: [0; 16] };
        config.line_bytes[..8].fill(64);
        config.lines[..8].fill(16);
        // SAFETY: the caller vouches for the instructions. They read the configuration, write tile registers, which belong to
        // the callee, and leave them released.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec rcx",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &config,
                inout("rcx") rounds.max(1) => _,
                clobber_abi("C"),
                options(nostack, readonly),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_count_rounds_and_are_of_the_best_try() {
        let mut calls = 0;
        let rate = best_rate(2.0, |rounds| {
            calls += 1;
            // 5 ns a round, and every other call is disturbed.
            let spin = Duration::from_nanos(5 * rounds) * (1 + calls % 2);
            let started = Instant::now();
            while started.elapsed() < spin {}
        });
        assert!(rate <= 0.4e9 && rate > 0.05e9, "{rate}");
    }

    #[test]
    fn every_way_to_compute_that_is_here_has_a_rate() {
        let (_, vectors) = multiply_adds();
        assert!(vectors > 0.0 && vectors.is_finite());
        assert!(tile_products().is_none_or(|tiles| tiles > 0.0 && tiles.is_finite()));
        let plain = best_rate(2.0 * PLAIN_SUMS as f64, plain);
        assert!(plain > 0.0 && plain.is_finite());
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the instructions were just found on this processor.
            let narrow = best_rate(x86::AVX2_OPERATIONS, |rounds| unsafe { x86::avx2(rounds) });
            assert!(narrow > plain, "{narrow} {plain}");
        }
    }
}
