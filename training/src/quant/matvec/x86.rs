//! AVX2 and AVX-512 registers, and thin wrappers that switch them on.

use super::lanes::Lanes;
use super::{Job, columns};
use crate::quant::{BLOCK, CODEBOOK};
use std::arch::x86_64::*;
use std::ops::Range;

/// Whether this processor and operating system run [`avx2`].
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// Whether this processor and operating system run [`avx512`].
pub(super) fn has_avx512() -> bool {
    has_avx2() && is_x86_feature_detected!("avx512f")
}

/// # Safety
/// As for [`columns`], where [`has_avx2`] says yes.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2(job: &Job<'_>, part: Range<usize>) {
    // SAFETY: passed on to the caller. Twelve sums, three weights and one row are sixteen registers.
    unsafe { columns::<Eight, 4>(job, part) }
}

/// # Safety
/// As for [`columns`], where [`has_avx512`] says yes.
#[target_feature(enable = "avx2,fma,avx512f")]
pub(super) unsafe fn avx512(job: &Job<'_>, part: Range<usize>) {
    // SAFETY: passed on to the caller. Twenty-four sums and three weights leave five of 32 registers.
    unsafe { columns::<Sixteen, 8>(job, part) }
}

/// Where the eight codes of four bytes begin: the first of a byte is its high half.
const SHIFTS: [i32; 8] = [4, 0, 12, 8, 20, 16, 28, 24];

#[derive(Clone, Copy)]
struct Eight(__m256);

impl Lanes for Eight {
    const WIDTH: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: AVX2 is there, as everywhere below.
        unsafe { Eight(_mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: passed on; no alignment is needed.
        unsafe { Eight(_mm256_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn fetch(from: *const f32) {
        // SAFETY: a hint that reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, by: Self, to: Self) -> Self {
        // SAFETY: FMA is there.
        unsafe { Eight(_mm256_fmadd_ps(self.0, by.0, to.0)) }
    }

    #[inline(always)]
    unsafe fn sums(of: [Self; 4]) -> [f32; 4] {
        // SAFETY: arithmetic alone; the store has room for four values.
        unsafe {
            let halves =
                of.map(|Eight(v)| _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)));
            transposed_sum(halves)
        }
    }

    #[inline(always)]
    unsafe fn decode(packed: *const u8, scale: f32, into: &mut [f32; BLOCK]) {
        // SAFETY: reads eight times four bytes and writes eight values each; the codebook has two times eight.
        unsafe {
            let low = _mm256_loadu_ps(CODEBOOK.as_ptr());
            let high = _mm256_loadu_ps(CODEBOOK.as_ptr().add(8));
            let shifts = _mm256_loadu_si256(SHIFTS.as_ptr().cast());
            let scale = _mm256_set1_ps(scale);
            for i in 0..BLOCK / 8 {
                let word = packed.cast::<i32>().add(i).read_unaligned();
                let codes = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
                // The permutation looks at the three low bits; the fourth chooses the half.
                let half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                let values = _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(low, codes),
                    _mm256_permutevar8x32_ps(high, codes),
                    half,
                );
                _mm256_storeu_ps(into.as_mut_ptr().add(8 * i), _mm256_mul_ps(values, scale));
            }
        }
    }
}

/// The sum of each of four registers of four.
///
/// # Safety
/// Needs what every x86-64 has.
#[inline(always)]
unsafe fn transposed_sum([a, b, c, d]: [__m128; 4]) -> [f32; 4] {
    // SAFETY: arithmetic alone; the store has room for four values.
    unsafe {
        let ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        let cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        let mut sums = [0f32; 4];
        _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
        sums
    }
}

#[derive(Clone, Copy)]
struct Sixteen(__m512);

impl Lanes for Sixteen {
    const WIDTH: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: AVX-512 F is there, as everywhere below.
        unsafe { Sixteen(_mm512_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: passed on; no alignment is needed.
        unsafe { Sixteen(_mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn fetch(from: *const f32) {
        // SAFETY: a hint that reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, by: Self, to: Self) -> Self {
        // SAFETY: AVX-512 F is there.
        unsafe { Sixteen(_mm512_fmadd_ps(self.0, by.0, to.0)) }
    }

    #[inline(always)]
    unsafe fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        // SAFETY: arithmetic alone.
        unsafe {
            // Four by four within each quarter of the registers, then the quarters.
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a.0, b.0), _mm512_unpackhi_ps(a.0, b.0));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c.0, d.0), _mm512_unpackhi_ps(c.0, d.0));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            let quarters = _mm512_add_ps(low, high);
            let upper = _mm512_castpd_ps(_mm512_castpd256_pd512(_mm512_extractf64x4_pd::<1>(
                _mm512_castps_pd(quarters),
            )));
            let halves = _mm512_castps512_ps256(_mm512_add_ps(quarters, upper));
            let sum = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
            let mut sums = [0f32; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), sum);
            sums
        }
    }

    #[inline(always)]
    unsafe fn decode(packed: *const u8, scale: f32, into: &mut [f32; BLOCK]) {
        // SAFETY: reads half a block of bytes and writes a block of values; the codebook has sixteen.
        unsafe {
            let codebook = _mm512_loadu_ps(CODEBOOK.as_ptr());
            let shifts = _mm512_broadcast_i64x4(_mm256_loadu_si256(SHIFTS.as_ptr().cast()));
            let words = _mm512_castsi256_si512(_mm256_loadu_si256(packed.cast()));
            let scale = _mm512_set1_ps(scale);
            for i in 0..BLOCK / 16 {
                let word = 2 * i as i32;
                let pair = _mm512_inserti64x4::<1>(
                    _mm512_castsi256_si512(_mm256_set1_epi32(word)),
                    _mm256_set1_epi32(word + 1),
                );
                let codes = _mm512_srlv_epi32(_mm512_permutexvar_epi32(pair, words), shifts);
                // The permutation looks at the four low bits alone.
                let values = _mm512_mul_ps(_mm512_permutexvar_ps(codes, codebook), scale);
                _mm512_storeu_ps(into.as_mut_ptr().add(16 * i), values);
            }
        }
    }
}
