//! AVX2 + FMA + F16C and AVX-512: registers for the generic algorithm, and thin wrappers that switch them on.

use super::dispatch::{KernelKind, Ops, Table};
use super::edit;
use super::generic::{self, Ahead, GROUP, Memory, Vector};
use super::many;
use crate::activations::Element;
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::sync::atomic::{AtomicUsize, Ordering};

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

/// The same, and that the CPU rounds to bf16 itself.
pub(super) fn has_avx512_bf16() -> bool {
    has_avx512() && is_x86_feature_detected!("avx512bf16")
}

/// [`Vector::soon`] of AVX-512, by the CPU's first cache.
static SOON_512: AtomicUsize = AtomicUsize::new(generic::SOON);

/// Lets rows be fetched farther ahead where the first cache has room for them.
pub(super) fn measure_first_cache() {
    if first_cache().is_some_and(|bytes| bytes > 32 << 10) {
        SOON_512.store(1024, Ordering::Relaxed);
    }
}

/// Bytes of the first data cache, if the CPU says: in the leaf of Intel's, or in that of AMD's, which has the same form.
fn first_cache() -> Option<usize> {
    let leaf =
        |leaf: u32| (0..8).map(move |part| __cpuid_count(leaf, part)).take_while(|found| found.eax & 31 != 0);
    let amd = __cpuid(1 << 31).eax >= 0x8000_001d;
    let mut caches = leaf(4).chain(leaf(0x8000_001d).take(if amd { 8 } else { 0 }));
    // Type 1 is data; the level stands above it.
    let first = caches.find(|found| found.eax & 0xff == 0x21)?;
    let field = |from: u32, bits: u32| (first.ebx >> from & ((1 << bits) - 1)) as usize + 1;
    Some(field(22, 10) * field(12, 10) * field(0, 12) * (first.ecx as usize + 1))
}

/// Wraps the generic algorithm for one vector and a set of CPU features.
macro_rules! kernel {
    ($module:ident, $kind:expr, $vector:ty, $features:literal) => {
        pub(super) mod $module {
            use super::*;

            pub(crate) static TABLE: Table = Table { kind: $kind, f32: ops(), f16: ops(), bf16: ops() };

            pub(super) const fn ops<T: Element>() -> Ops<T>
            where
                $vector: Memory<T>,
            {
                Ops {
                    dot: dot::<T>,
                    squares: squares::<T>,
                    measure: measure::<T>,
                    dots: dots::<T>,
                    dots_of_row: dots_of_row::<T>,
                    edit_peak: edit_peak::<T>,
                    edit: edit::<T>,
                    edit_group: edit_group::<T>,
                    edit_normal_group: edit_group::<T>,
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
                unsafe { generic::reduce::<$vector, T, true, false>(row, direction, None).0 }
            }

            /// # Safety
            /// The CPU has the features named above.
            #[target_feature(enable = $features)]
            unsafe fn squares<T: Element>(row: &[T]) -> f32
            where
                $vector: Memory<T>,
            {
                // SAFETY: passed on to the caller.
                unsafe { generic::reduce::<$vector, T, false, true>(row, &[], None).1 }
            }

            /// # Safety
            /// As for [`dot`], for all rows.
            #[target_feature(enable = $features)]
            unsafe fn measure<T: Element>(
                rows: [&[T]; GROUP],
                direction: Option<&[f32]>,
                ahead: [Ahead; GROUP],
            ) -> [(f32, f32); GROUP]
            where
                $vector: Memory<T>,
            {
                // SAFETY: passed on to the caller.
                unsafe { generic::measure::<$vector, T>(rows, direction, ahead) }
            }

            /// # Safety
            /// - The CPU has the features named above.
            /// - Rows and directions have the same length; `out` has an element for each pair.
            #[target_feature(enable = $features)]
            unsafe fn dots<T: Element>(rows: &[&[T]], directions: &[&[f32]], next: &[&[T]], out: &mut [f32])
            where
                $vector: Memory<T>,
            {
                // SAFETY: passed on to the caller.
                unsafe { many::dots::<$vector, T>(rows, directions, next, out) }
            }

            /// # Safety
            /// As for [`dots`].
            #[target_feature(enable = $features)]
            unsafe fn dots_of_row<T: Element>(row: &[T], directions: &[&[f32]], out: &mut [f32])
            where
                $vector: Memory<T>,
            {
                // SAFETY: passed on to the caller.
                unsafe { many::dots_of_row::<$vector, T>(row, directions, out) }
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
                unsafe { edit::edit::<$vector, T>(row, direction, c) }
            }

            /// # Safety
            /// As for [`dot`], for all rows.
            #[target_feature(enable = $features)]
            unsafe fn edit_group<T: Element>(
                rows: [&mut [T]; GROUP],
                direction: &[f32],
                c: [f32; GROUP],
                ahead: [Ahead; GROUP],
            ) where
                $vector: Memory<T>,
            {
                // SAFETY: passed on to the caller.
                unsafe { edit::edit_group::<$vector, T, false>(rows, direction, c, ahead) }
            }
        }
    };
}

kernel!(avx2, KernelKind::Avx2, Ymm, "avx2,fma,f16c");
kernel!(avx512, KernelKind::Avx512, Zmm, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq");

/// The AVX-512 kernel where the CPU rounds to bf16 itself.
pub(super) static AVX512_BF16: Table = Table {
    kind: KernelKind::Avx512,
    f32: avx512::ops(),
    f16: avx512::ops(),
    bf16: Ops { edit_normal_group, ..avx512::ops() },
};

/// # Safety
/// - The CPU has the features named below.
/// - Rows and direction have the same length.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn edit_normal_group(
    rows: [&mut [bf16]; GROUP],
    direction: &[f32],
    c: [f32; GROUP],
    ahead: [Ahead; GROUP],
) {
    // SAFETY: passed on to the caller.
    unsafe { edit::edit_group::<Zmm, bf16, true>(rows, direction, c, ahead) }
}

/// Lane 0 takes lane 2 and lane 1 takes lane 3; then lane 0 takes lane 1.
///
/// # Safety
/// None beyond the baseline of x86-64.
#[inline(always)]
unsafe fn fold4(lanes: __m128) -> f32 {
    unsafe {
        let pair = _mm_add_ps(lanes, _mm_movehl_ps(lanes, lanes));
        _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    }
}

/// All bits of the first `count` lanes of eight.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn first8(count: usize) -> __m256i {
    unsafe {
        let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lane)
    }
}

/// The bits of the first `count` lanes of sixteen.
#[inline(always)]
fn first16(count: usize) -> __mmask16 {
    ((1u32 << count) - 1) as __mmask16
}

/// Eight lanes.
#[derive(Clone, Copy)]
pub(super) struct Ymm(__m256);

// SAFETY of every block below: the caller vouches for AVX2, FMA and F16C, and for the pointers.
impl Vector for Ymm {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;

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
    unsafe fn subtract(self, other: Self) -> Self {
        unsafe { Ymm(_mm256_sub_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        unsafe { Ymm(_mm256_mul_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn max_abs(self, other: Self) -> Self {
        unsafe { Ymm(_mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0), other.0)) }
    }

    #[inline(always)]
    unsafe fn fold(self) -> f32 {
        unsafe { fold4(_mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0))) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn prefetch_later(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
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

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        unsafe { Ymm(_mm256_maskload_ps(from, first8(count))) }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        unsafe { _mm256_maskstore_ps(to, first8(count), self.0) }
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
    const REGISTERS: usize = 32;

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
    unsafe fn subtract(self, other: Self) -> Self {
        unsafe { Zmm(_mm512_sub_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        unsafe { Zmm(_mm512_mul_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn max_abs(self, other: Self) -> Self {
        unsafe { Zmm(_mm512_max_ps(_mm512_abs_ps(self.0), other.0)) }
    }

    #[inline(always)]
    unsafe fn fold(self) -> f32 {
        unsafe {
            let upper = _mm512_extractf32x8_ps::<1>(self.0);
            Ymm(_mm256_add_ps(_mm512_castps512_ps256(self.0), upper)).fold()
        }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn prefetch_later(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }

    #[inline(always)]
    fn soon() -> usize {
        SOON_512.load(Ordering::Relaxed)
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

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        unsafe { Zmm(_mm512_maskz_loadu_ps(first16(count), from)) }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        unsafe { _mm512_mask_storeu_ps(to, first16(count), self.0) }
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

    #[inline(always)]
    unsafe fn load_first(from: *const f16, count: usize) -> Self {
        unsafe { Zmm(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(count), from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f16, count: usize) {
        unsafe {
            let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            _mm256_mask_storeu_epi16(to.cast(), first16(count), halves);
        }
    }
}

impl Memory<bf16> for Zmm {
    #[inline(always)]
    unsafe fn load(from: *const bf16) -> Self {
        unsafe { Zmm(widen(_mm256_loadu_si256(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_pair(from: *const bf16) -> (Self, Self) {
        unsafe {
            let both = _mm512_loadu_si512(from.cast());
            (Zmm(spread(both, LOWER)), Zmm(spread(both, UPPER)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut bf16) {
        unsafe { _mm256_storeu_si256(to.cast(), narrow(self.0)) }
    }

    #[inline(always)]
    unsafe fn store_pair(self, second: Self, to: *mut bf16) {
        unsafe { _mm512_storeu_si512(to.cast(), narrow_pair(self.0, second.0)) }
    }

    // One instruction, which takes subnormals for 0. Only called where the CPU has AVX-512 BF16.
    #[inline(always)]
    unsafe fn store_normal_pair(self, second: Self, to: *mut bf16) {
        unsafe {
            let rounded = _mm512_cvtne2ps_pbh(second.0, self.0);
            _mm512_storeu_si512(to.cast(), std::mem::transmute::<__m512bh, __m512i>(rounded));
        }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const bf16, count: usize) -> Self {
        unsafe { Zmm(widen(_mm256_maskz_loadu_epi16(first16(count), from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut bf16, count: usize) {
        unsafe { _mm256_mask_storeu_epi16(to.cast(), first16(count), narrow(self.0)) }
    }
}

/// bf16 to f32: element `i` becomes the upper half of lane `i`.
///
/// # Safety
/// The CPU has AVX-512 BW.
#[inline(always)]
unsafe fn widen(halves: __m256i) -> __m512 {
    unsafe { spread(_mm512_castsi256_si512(halves), LOWER) }
}

/// Where the sixteen lower and the sixteen upper words go, twice each.
const LOWER: [u16; 32] = places(1, 2, 0);
const UPPER: [u16; 32] = places(1, 2, 16);

/// Sixteen of the words as the upper halves of lanes: one permutation that zeroes the lower halves, where to widen and
/// shift would be two instructions.
///
/// # Safety
/// The CPU has AVX-512 BW.
#[inline(always)]
unsafe fn spread(words: __m512i, places: [u16; 32]) -> __m512 {
    unsafe {
        let places = std::mem::transmute::<[u16; 32], __m512i>(places);
        _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(odd_words(), places, words))
    }
}

/// A mask of the odd words, hidden from the compiler: of a mask that it knows it makes a second instruction, an `and`.
#[inline(always)]
fn odd_words() -> __mmask32 {
    let mut mask = 0xaaaa_aaaa;
    // SAFETY: no instruction at all.
    unsafe {
        std::arch::asm!("/* {0:e} */", inout(reg) mask, options(pure, nomem, nostack, preserves_flags))
    };
    mask
}

/// f32 to bf16 in the upper half of each lane, as for eight lanes. Not `vcvtneps2bf16`: it drops subnormals.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn round(lanes: __m512) -> __m512i {
    unsafe {
        let bits = _mm512_castps_si512(lanes);
        let odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x1_0000));
        let half = _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
        _mm512_add_epi32(bits, half)
    }
}

/// f32 to bf16.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn narrow(lanes: __m512) -> __m256i {
    unsafe { _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(round(lanes))) }
}

/// Twice f32 to bf16, packed by one permutation.
///
/// # Safety
/// The CPU has AVX-512 BW.
#[inline(always)]
unsafe fn narrow_pair(first: __m512, second: __m512) -> __m512i {
    const ODD: [u16; 32] = places(2, 1, 1);
    unsafe {
        let upper = std::mem::transmute::<[u16; 32], __m512i>(ODD);
        _mm512_permutex2var_epi16(round(first), upper, round(second))
    }
}

/// Place `i` takes the word `first + i * times / over`.
const fn places(times: u16, over: u16, first: u16) -> [u16; 32] {
    let mut places = [0; 32];
    let mut i = 0;
    while i < 32 {
        places[i] = first + i as u16 * times / over;
        i += 1;
    }
    places
}

#[cfg(test)]
mod tests {
    /// Linux reads the same leaves.
    #[test]
    fn the_first_cache_is_as_large_as_the_system_says() {
        let file = "/sys/devices/system/cpu/cpu0/cache/index0/size";
        let said = std::fs::read_to_string(file)
            .ok()
            .and_then(|text| text.trim().strip_suffix('K')?.parse::<usize>().ok());
        let found = super::first_cache();
        println!("{found:?}, the system says {said:?} KiB");
        if let (Some(found), Some(said)) = (found, said) {
            assert_eq!(found, 1024 * said);
        }
    }
}
