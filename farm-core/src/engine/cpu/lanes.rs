//! Vectors of f32 of the instruction sets that kernels are compiled for.

/// A vector of f32. Every operation rounds once in each lane, [`Lanes::fma`] included, so a kernel that is written over
/// lanes has the same bits with every implementation.
///
/// # Safety
/// An implementation may only be used on a machine that has its instructions. Loads and stores are of [`Lanes::WIDTH`]
/// values, which have to be valid; they need no alignment.
pub(super) trait Lanes: Copy {
    const WIDTH: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `self · factor + sum`, rounded once.
    unsafe fn fma(self, factor: Self, sum: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    /// Asks for a cache line that will be wanted soon. It may point anywhere.
    fn fetch(line: *const u8);
}

/// For any machine, and to compare the others with: the compiler makes of it what it can.
#[derive(Clone, Copy)]
pub(super) struct Plain([f32; 8]);

impl Lanes for Plain {
    const WIDTH: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // Safety: the caller's promise.
        unsafe { Self(from.cast::<[f32; 8]>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // Safety: the caller's promise.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn fma(self, factor: Self, sum: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(factor.0[i], sum.0[i])))
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    fn fetch(_: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
macro_rules! lanes {
    ($name:ident, $vector:ty, $width:literal, $splat:ident, $load:ident, $store:ident, $fma:ident, $add:ident) => {
        #[derive(Clone, Copy)]
        pub(in super::super) struct $name($vector);

        // Safety of all: the caller's promise.
        impl Lanes for $name {
            const WIDTH: usize = $width;

            #[inline(always)]
            unsafe fn splat(x: f32) -> Self {
                unsafe { Self($splat(x)) }
            }

            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                unsafe { Self($load(from)) }
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                unsafe { $store(to, self.0) }
            }

            #[inline(always)]
            unsafe fn fma(self, factor: Self, sum: Self) -> Self {
                unsafe { Self($fma(self.0, factor.0, sum.0)) }
            }

            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                unsafe { Self($add(self.0, other.0)) }
            }

            #[inline(always)]
            fn fetch(line: *const u8) {
                // Safety: fetching changes nothing, wherever it points.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::Lanes;

    lanes!(Avx512, __m512, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps, _mm512_add_ps);
    lanes!(Avx2, __m256, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps, _mm256_add_ps);
}
