//! AVX2 + FMA + F16C and AVX-512: registers for the generic algorithm, and thin wrappers that switch them on.

use super::dispatch::{KernelKind, Ops, Table};
use super::generic::{self, Memory, Vector};
use crate::activations::Element;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Whether this CPU and operating system run the AVX2 kernel.
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Whether this CPU and operating system run the AVX-512 kernel.
pub(super) fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
}

/// Wraps the generic algorithm for one vector and a set of CPU features.
macro_rules! kernel {
    ($module:ident, $kind:expr, $vector:ty, $features:literal) => {
        pub(super) mod $module {
            use super::*;

            pub(crate) static TABLE: Table = Table { kind: $kind, f32: ops(), f16: ops(), bf16: ops() };

            const fn ops<T: Element>() -> Ops<T>
            where
                $vector: Memory<T>,
            {
                Ops {
                    dot: dot::<T>,
                    dot_squares: dot_squares::<T>,
                    edit_peak: edit_peak::<T>,
                    edit: edit::<T>,
                }
            }

            /// # Safety
            /// - The CPU has the features named above.
            /// - `row` and `direction` have the same length.
            #[target_feature(enable = $features)]
            unsafe fn dot<T: Element>(row: &[T], direction: &[f32]) -> f32
            where
                $vector: Memory<T>,
            {
                // SAFETY: passed on to the caller.
                unsafe { generic::reduce::<$vector, T, true, false>(row, direction).0 }
            }

            /// # Safety
            /// As for [`dot`].
            #[target_feature(enable = $features)]
            unsafe fn dot_squares<T: Element>(row: &[T], direction: &[f32]) -> (f32, f32)
            where
                $vector: Memory<T>,
            {
                // SAFETY: passed on to the caller.
                unsafe { generic::reduce::<$vector, T, true, true>(row, direction) }
            }

            /// # Safety
            /// As for [`dot`].
            #[target_feature(enable = $features)]
            unsafe fn edit_peak<T: Element>(row: &[T], direction: &[f32], c: f32) -> f32
            where
                $vector: Memory<T>,
            {
                // SAFETY: passed on to the caller.
                unsafe { generic::edit_peak::<$vector, T>(row, direction, c) }
            }

            /// # Safety
            /// As for [`dot`].
            #[target_feature(enable = $features)]
            unsafe fn edit<T: Element>(row: &mut [T], direction: &[f32], c: f32)
            where
                $vector: Memory<T>,
            {
                // SAFETY: passed on to the caller.
                unsafe { generic::edit::<$vector, T>(row, direction, c) }
            }
        }
    };
}

kernel!(avx2, KernelKind::Avx2, Ymm, "avx2,fma,f16c");
kernel!(avx512, KernelKind::Avx512, Zmm, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq");

/// Eight lanes.
#[derive(Clone, Copy)]
pub(super) struct Ymm(__m256);

// SAFETY of every block below: the caller vouches for AVX2, FMA and F16C, and for the pointers.
impl Vector for Ymm {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Ymm(_mm256_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn multiply_add(self, other: Self, sum: Self) -> Self {
        unsafe { Ymm(_mm256_fmadd_ps(self.0, other.0, sum.0)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Ymm(_mm256_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn subtract_scaled(self, factor: Self, other: Self) -> Self {
        unsafe { Ymm(_mm256_sub_ps(self.0, _mm256_mul_ps(factor.0, other.0))) }
    }

    #[inline(always)]
    unsafe fn max_abs(self, other: Self) -> Self {
        unsafe { Ymm(_mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0), other.0)) }
    }
}

impl Memory<f32> for Ymm {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Ymm(_mm256_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
}

impl Memory<f16> for Ymm {
    #[inline(always)]
    unsafe fn load(from: *const f16) -> Self {
        unsafe { Ymm(_mm256_cvtph_ps(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f16) {
        unsafe { _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }
}

impl Memory<bf16> for Ymm {
    #[inline(always)]
    unsafe fn load(from: *const bf16) -> Self {
        unsafe {
            let upper = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())));
            Ymm(_mm256_castsi256_ps(upper))
        }
    }

    // Ties to even: add 0x7fff and the lowest kept bit, then drop the lower half. Values are finite.
    #[inline(always)]
    unsafe fn store(self, to: *mut bf16) {
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            let upper = _mm256_srli_epi32::<16>(rounded);
            let packed = _mm256_packus_epi32(upper, upper);
            let ordered = _mm256_permute4x64_epi64::<0b00_00_10_00>(packed);
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(ordered));
        }
    }
}

/// Sixteen lanes.
#[derive(Clone, Copy)]
pub(super) struct Zmm(__m512);

// SAFETY of every block below: the caller vouches for AVX-512 F, BW, VL and DQ, and for the pointers.
impl Vector for Zmm {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Zmm(_mm512_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn multiply_add(self, other: Self, sum: Self) -> Self {
        unsafe { Zmm(_mm512_fmadd_ps(self.0, other.0, sum.0)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Zmm(_mm512_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn subtract_scaled(self, factor: Self, other: Self) -> Self {
        unsafe { Zmm(_mm512_sub_ps(self.0, _mm512_mul_ps(factor.0, other.0))) }
    }

    #[inline(always)]
    unsafe fn max_abs(self, other: Self) -> Self {
        unsafe { Zmm(_mm512_max_ps(_mm512_abs_ps(self.0), other.0)) }
    }
}

impl Memory<f32> for Zmm {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Zmm(_mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
}

impl Memory<f16> for Zmm {
    #[inline(always)]
    unsafe fn load(from: *const f16) -> Self {
        unsafe { Zmm(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f16) {
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }
}

impl Memory<bf16> for Zmm {
    #[inline(always)]
    unsafe fn load(from: *const bf16) -> Self {
        unsafe {
            let upper = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())));
            Zmm(_mm512_castsi512_ps(upper))
        }
    }

    // As for eight lanes.
    #[inline(always)]
    unsafe fn store(self, to: *mut bf16) {
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            let upper = _mm512_srli_epi32::<16>(rounded);
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(upper));
        }
    }
}
