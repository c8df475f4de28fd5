//! Noise as a pure function of (seed, element index), so that one seed gives one clip on any device and any split.
//!
//! It fixes the look of every clip ever rendered and therefore never changes:
//!
//! - Element `i` of a latent `[C, T, h, w]` in row-major order belongs to block `b = i / 4`.
//! - Philox 4x32-10 with counter `(b mod 2³², b / 2³², 0, 0)` and key `(seed mod 2³², seed / 2³²)` gives words w0..w3.
//! - Elements 4b and 4b+1 are `r·cos φ` and `r·sin φ` with `r = √(−2·ln((w0 + ½)/2³²))`, `φ = 2π·w1/2³²`; elements 4b+2
//!   and 4b+3 likewise from w2 and w3 (Box–Muller).
//! - Computed in f64 and rounded once to f32. Logarithm, sine and cosine are series made of additions, multiplications
//!   and divisions only, so that no maths library can change a bit. Largest possible value: 6.76.

use std::f64::consts::{LN_2, PI, SQRT_2};
use std::ops::Range;

/// Elements `range` of the noise of `seed`.
pub fn normals(seed: u64, range: Range<u64>) -> Vec<f32> {
    let mut out = Vec::with_capacity((range.end.saturating_sub(range.start)) as usize);
    let mut index = range.start;
    while index < range.end {
        let block = block(seed, index / 4);
        let from = (index % 4) as usize;
        let to = (range.end - (index - from as u64)).min(4) as usize;
        out.extend_from_slice(&block[from..to]);
        index += (to - from) as u64;
    }
    out
}

/// Elements 4b to 4b+3.
fn block(seed: u64, b: u64) -> [f32; 4] {
    let [w0, w1, w2, w3] = philox([b as u32, (b >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let ([a, b], [c, d]) = (box_muller(w0, w1), box_muller(w2, w3));
    [a, b, c, d]
}

/// Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let [a, b] = [0xd251_1f53 * u64::from(counter[0]), 0xcd9e_8d57 * u64::from(counter[2])];
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

/// Two independent normal values of two uniform words.
fn box_muller(radius: u32, turn: u32) -> [f32; 2] {
    // (w + ½) / 2³², exact, in (0, 1).
    let uniform = (2.0 * f64::from(radius) + 1.0) / (1u64 << 33) as f64;
    let r = (-2.0 * ln(uniform)).sqrt();
    let [cos, sin] = cos_sin_turn(turn);
    [(r * cos) as f32, (r * sin) as f32]
}

/// Natural logarithm of a normal x > 0, within a few ulp.
fn ln(x: f64) -> f64 {
    let mut exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    let mut mantissa = f64::from_bits((x.to_bits() & ((1 << 52) - 1)) | (1023 << 52));
    if mantissa > SQRT_2 {
        (mantissa, exponent) = (mantissa / 2.0, exponent + 1);
    }
    // 2·artanh(s); |s| ≤ 0.172, so the first term left out is below 1e-18.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let mut series = 0.0;
    for odd in (1..=23).rev().step_by(2) {
        series = series * (s * s) + 1.0 / f64::from(odd);
    }
    f64::from(exponent) * LN_2 + 2.0 * s * series
}

/// [cos, sin] of `turn`/2³² of a full turn, within a few ulp.
fn cos_sin_turn(turn: u32) -> [f64; 2] {
    // Nearest quarter turn, and the signed rest in [−1/8, 1/8) turn.
    let quarter = turn.wrapping_add(1 << 29) >> 30;
    let rest = turn.wrapping_sub(quarter << 30) as i32;
    let x = f64::from(rest) * (2.0 * PI / (1u64 << 32) as f64);
    // Taylor series; the first terms left out are below 1e-19.
    let (mut cos, mut sin) = (0.0, 0.0);
    for k in (0..=9).rev() {
        let k = f64::from(2 * k);
        cos = 1.0 - x * x * cos / ((k + 1.0) * (k + 2.0));
        sin = 1.0 - x * x * sin / ((k + 2.0) * (k + 3.0));
    }
    sin *= x;
    match quarter {
        0 => [cos, sin],
        1 => [-sin, cos],
        2 => [-cos, -sin],
        _ => [sin, -cos],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        let counter = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344];
        let answer = [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1];
        assert_eq!(philox(counter, [0xa4093822, 0x299f31d0]), answer);
    }

    #[test]
    fn the_values_never_change() {
        let bits = |seed, range| normals(seed, range).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(0, 0..6), [0x3f7dbb33, 0xbf6cb6b0, 0xbf1e1b9f, 0xbef6d1b2, 0xbe1d5357, 0x3e392a6d]);
        assert_eq!(bits(1_710_977_262, 0..3), [0x3f62d720, 0x3f526baf, 0xbffe6c3d]);
        assert_eq!(bits(u64::MAX, (1 << 34) + 1..(1 << 34) + 3), [0xbed32f9e, 0xbc107f7c]);
    }

    #[test]
    fn any_split_gives_the_same_values() {
        let whole = normals(7, 0..97);
        for cut in 0..97 {
            let parts = [normals(7, 0..cut), normals(7, cut..97)].concat();
            assert_eq!(parts, whole, "cut at {cut}");
        }
        assert!(normals(7, 5..5).is_empty());
    }

    #[test]
    fn both_halves_of_seed_and_block_count() {
        let first = normals(1, 0..4);
        assert_ne!(first, normals(1 | 1 << 32, 0..4));
        assert_ne!(first, normals(1, 1 << 34..(1 << 34) + 4));
    }

    #[test]
    fn values_are_standard_normal() {
        let values = normals(3, 0..400_000);
        let moment = |k: i32| values.iter().map(|&x| f64::from(x).powi(k)).sum::<f64>() / values.len() as f64;
        // Four standard errors of each moment: 1, √2, √15, √96 over √n.
        for (k, expected, error) in [(1, 0.0, 1.0), (2, 1.0, 1.42), (3, 0.0, 3.88), (4, 3.0, 9.8)] {
            assert!((moment(k) - expected).abs() < 4.0 * error / 632.0, "moment {k}: {}", moment(k));
        }
        let neighbours: f64 = values.windows(2).map(|pair| f64::from(pair[0]) * f64::from(pair[1])).sum();
        assert!((neighbours / values.len() as f64).abs() < 4.0 / 632.0);
    }

    #[test]
    fn series_are_accurate() {
        for i in 0..100_000u32 {
            let word = i.wrapping_mul(2_654_435_761);
            let x = (2.0 * f64::from(word) + 1.0) / (1u64 << 33) as f64;
            assert!((ln(x) - x.ln()).abs() <= 4.0 * f64::EPSILON * x.ln().abs(), "ln {x}");
            let angle = f64::from(word) / (1u64 << 32) as f64 * 2.0 * PI;
            let [cos, sin] = cos_sin_turn(word);
            assert!((cos - angle.cos()).abs() < 2e-15 && (sin - angle.sin()).abs() < 2e-15, "turn {word}");
        }
    }
}
