//! Wide vectors without intrinsics: loops written over fixed lanes, compiled for the widest registers of the machine.
//!
//! Rust never fuses a multiplication with an addition by itself, and where `mul_add` does, it does so at every width: a loop
//! has the same bits on every machine.

/// Lanes of a reduction. Fixed, so that the order of additions does not depend on the machine.
const LANES: usize = 16;

/// Runs `f`, compiled for the widest vectors that this CPU has. Only code that is inlined profits: `f` and what it calls
/// have to be `#[inline(always)]`, because three callers of one closure are reason enough for the compiler not to.
#[inline(always)]
pub(super) fn wide<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        fn avx512<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        if has_avx512() {
            // Safety: the features were just found on this CPU.
            return unsafe { avx512(f) };
        }
        if has_avx2() {
            // Safety: as above.
            return unsafe { avx2(f) };
        }
    }
    f()
}

/// The instructions of every kernel for vectors of 512 bits.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("fma")
}

/// Likewise of 256 bits.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// e^x within 1.5 ulp. Below -87.33, where f32 turns subnormal, 0; above 88.37 infinity; NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOW: f32 = -87.336_54;
    const HIGH: f32 = 88.376_26;
    // 1.5·2²³: adding it rounds to an integer, which is then in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // x − n·ln 2 with ln 2 in two parts.
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    // e^r on |r| ≤ ln 2 / 2: 1 + r + r²·p(r), minimax coefficients of the Cephes library.
    let p = 1.987_569_1e-4_f32.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    let y = (p.mul_add(r * r, r) + 1.0) * power;
    if x < LOW {
        0.0
    } else if x > HIGH {
        f32::INFINITY
    } else {
        y
    }
}

/// x · sigmoid(x).
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), as x · sigmoid(2·√(2/π)·(…)), which is the same function.
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> f32 {
    let inner = 1.595_769_2 * (x + 0.044_715 * (x * x * x));
    x / (1.0 + exp(-inner))
}

/// Σ f(x) in f64 over fixed lanes.
#[inline(always)]
pub(super) fn sum_f64(values: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    let mut lanes = [0f64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(f64::from(x));
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(f64::from(x));
    }
    join(lanes, |a, b| a + b)
}

/// Joins lanes pairwise: 16, 8, 4, 2, 1.
#[inline(always)]
fn join<T: Copy>(mut lanes: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}

/// The greatest value; -∞ of none. Ignores NaN.
#[inline(always)]
pub(super) fn max(values: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*lane, x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = greater(*lane, x);
    }
    join(lanes, greater)
}

/// Replaces every x by e^(scale·x − shift) and returns their sum, over fixed lanes.
#[inline(always)]
pub(super) fn exp_minus(values: &mut [f32], scale: f32, shift: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x = exp(x.mul_add(scale, -shift));
            *lane += *x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *x = exp(x.mul_add(scale, -shift));
        *lane += *x;
    }
    join(lanes, |a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_one_and_a_half_ulp() {
        let mut worst = 0f64;
        for i in 0..2_000_000 {
            let x = -87.3 + 175.6 * i as f32 / 2e6;
            let exact = f64::from(x).exp();
            let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            worst = worst.max((f64::from(exp(x)) - exact).abs() / ulp);
        }
        assert!(worst < 1.5, "{worst} ulp");
    }

    #[test]
    fn exp_keeps_nan_and_saturates() {
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn widths_agree_in_every_bit() {
        let values: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.37).sin() * 40.0).collect();
        let (mut narrow, mut vector) = (values.clone(), values.clone());
        let narrow_sum = exp_minus(&mut narrow, 0.7, 1.25);
        let vector_sum = wide(
            #[inline(always)]
            || exp_minus(&mut vector, 0.7, 1.25),
        );
        assert_eq!(narrow_sum.to_bits(), vector_sum.to_bits());
        assert_eq!(narrow, vector);
        let square = |x: f64| x * x;
        assert_eq!(
            sum_f64(&values, square).to_bits(),
            wide(
                #[inline(always)]
                || sum_f64(&values, square)
            )
            .to_bits()
        );
        assert_eq!(
            max(&values),
            wide(
                #[inline(always)]
                || max(&values)
            )
        );
    }

    #[test]
    fn gelu_is_the_tanh_form() {
        for i in -80..80 {
            let x = i as f32 * 0.1;
            let u = f64::from(x);
            let exact = 0.5 * u * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (u + 0.044715 * u * u * u)).tanh());
            assert!((f64::from(gelu_tanh(x)) - exact).abs() < 1e-6 * exact.abs().max(0.1), "{x}");
        }
    }
}
