//! NF4 blocks back to numbers, in f32 or bf16, whole matrices or pieces of them.

use super::nf4::{BLOCK, CODEBOOK};
use super::{Nf4, Sign};
use crate::model::vector::to_bf16;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// Blocks per parallel task.
const TASK: usize = 256;

/// What blocks decode to.
pub trait Decoded: Copy + Send + Sync {
    /// Zero.
    const ZERO: Self;
    /// A value as it is stored.
    fn of(value: f32) -> Self;
    /// Decodes blocks that lie one behind the other; `scale` gives that of each.
    fn blocks(packed: &[u8], scale: impl Fn(usize) -> f32, to: &mut [Self]);
}

impl Decoded for f32 {
    const ZERO: f32 = 0.0;

    fn of(value: f32) -> f32 {
        value
    }

    fn blocks(packed: &[u8], scale: impl Fn(usize) -> f32, to: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F.
            return unsafe { avx512::blocks_f32(packed, scale, to) };
        }
        by_table(packed, scale, to);
    }
}

impl Decoded for bf16 {
    const ZERO: bf16 = bf16::ZERO;

    fn of(value: f32) -> bf16 {
        to_bf16(value)
    }

    fn blocks(packed: &[u8], scale: impl Fn(usize) -> f32, to: &mut [bf16]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F.
            return unsafe { avx512::blocks_bf16(packed, scale, to) };
        }
        by_table(packed, scale, to);
    }
}

/// The same on any processor.
fn by_table<T: Decoded>(packed: &[u8], scale: impl Fn(usize) -> f32, to: &mut [T]) {
    for (i, (packed, to)) in packed.chunks_exact(BLOCK / 2).zip(to.chunks_exact_mut(BLOCK)).enumerate() {
        let scale = scale(i);
        let table = CODEBOOK.map(|c| T::of(c * scale));
        for (to, b) in to.chunks_exact_mut(2).zip(packed) {
            to[0] = table[usize::from(b >> 4)];
            to[1] = table[usize::from(b & 15)];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{BLOCK, CODEBOOK};
    use half::bf16;
    use std::arch::x86_64::*;

    /// # Safety
    /// The processor has AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn blocks_bf16(packed: &[u8], scale: impl Fn(usize) -> f32, to: &mut [bf16]) {
        let (half, one) = (_mm512_set1_epi32(0x7fff), _mm512_set1_epi32(1));
        let blocks = packed.chunks_exact(BLOCK / 2).zip(to.chunks_exact_mut(BLOCK));
        // SAFETY: loads and stores are unaligned ones, of the 16 values of the codebook, two times 16 of a block's 32 bytes
        // and two times 64 of the 128 bytes of what it decodes to.
        unsafe {
            let codebook = _mm512_loadu_ps(CODEBOOK.as_ptr());
            for (i, (packed, to)) in blocks.enumerate() {
                // The 16 values of the block, rounded as `to_bf16` rounds, in the low half of each word, then in the high one.
                let exact = _mm512_mul_ps(codebook, _mm512_set1_ps(scale(i)));
                let (bits, nan) =
                    (_mm512_castps_si512(exact), _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(exact, exact));
                let cut = _mm512_srli_epi32::<16>(bits);
                let up = _mm512_add_epi32(half, _mm512_and_si512(cut, one));
                let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, up));
                let first = _mm512_mask_or_epi32(rounded, nan, cut, _mm512_set1_epi32(0x40));
                let second = _mm512_slli_epi32::<16>(first);
                for half in 0..2 {
                    let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(packed.as_ptr().add(16 * half).cast()));
                    // A permutation reads the low four bits of each index.
                    let pair = _mm512_or_si512(
                        _mm512_permutexvar_epi32(_mm512_srli_epi32::<4>(bytes), first),
                        _mm512_permutexvar_epi32(bytes, second),
                    );
                    _mm512_storeu_si512(to.as_mut_ptr().add(32 * half).cast(), pair);
                }
            }
        }
    }

    /// # Safety
    /// As [`blocks_bf16`].
    #[target_feature(enable = "avx512f")]
    pub unsafe fn blocks_f32(packed: &[u8], scale: impl Fn(usize) -> f32, to: &mut [f32]) {
        let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        let blocks = packed.chunks_exact(BLOCK / 2).zip(to.chunks_exact_mut(BLOCK));
        // SAFETY: as above; a block decodes to 256 bytes, written in four times 64.
        unsafe {
            let codebook = _mm512_loadu_ps(CODEBOOK.as_ptr());
            for (i, (packed, to)) in blocks.enumerate() {
                let values = _mm512_castps_si512(_mm512_mul_ps(codebook, _mm512_set1_ps(scale(i))));
                for half in 0..2 {
                    let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(packed.as_ptr().add(16 * half).cast()));
                    let first = _mm512_permutexvar_epi32(_mm512_srli_epi32::<4>(bytes), values);
                    let second = _mm512_permutexvar_epi32(bytes, values);
                    let to = to.as_mut_ptr().add(32 * half);
                    _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi32(first, low, second));
                    _mm512_storeu_si512(to.add(16).cast(), _mm512_permutex2var_epi32(first, high, second));
                }
            }
        }
    }
}

impl Nf4 {
    /// Decodes the whole matrix, row-major.
    pub fn decode<T: Decoded>(&self, to: &mut [T]) {
        to.par_chunks_mut(TASK * BLOCK)
            .enumerate()
            .for_each(|(task, to)| self.decode_blocks(task * TASK, to));
    }

    /// Decodes as many whole blocks as `to` holds.
    fn decode_blocks<T: Decoded>(&self, first: usize, to: &mut [T]) {
        let packed = &self.packed[first * (BLOCK / 2)..][..to.len() / 2];
        let map = Sign::Signed.map();
        T::blocks(packed, |block| self.scale(map, first + block), to);
    }

    /// Decodes the given rows and columns into rows of `stride` values, on this thread; what stands behind them there
    /// stays.
    pub fn decode_piece<T: Decoded>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        to: &mut [T],
        stride: usize,
    ) {
        let mut whole = [T::ZERO; BLOCK];
        for (to, row) in to.chunks_mut(stride).zip(rows) {
            let (mut at, end) = (row * self.cols + columns.start, row * self.cols + columns.end);
            let mut to = &mut to[..columns.len()];
            while at < end {
                // Whole blocks, or the part of one that lies in this row and these columns.
                let first = at % BLOCK;
                let blocks = if first == 0 { (end - at) / BLOCK * BLOCK } else { 0 };
                let part = (BLOCK - first).min(end - at);
                let (here, rest) = to.split_at_mut(if blocks > 0 { blocks } else { part });
                if blocks > 0 {
                    self.decode_blocks(at / BLOCK, here);
                } else {
                    self.decode_blocks(at / BLOCK, &mut whole);
                    here.copy_from_slice(&whole[first..first + part]);
                }
                at += here.len();
                to = rest;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_every_byte_decode_alike_with_and_without_vectors() {
        let packed: Vec<u8> = (0..=255).collect();
        let scales = [1.0f32, 0.031_25, 3.3e-5, 7.7e4, -2.5, f32::NAN, f32::INFINITY, 1e-40];
        let count = 2 * packed.len();
        for shift in 0..scales.len() {
            let scale = |block: usize| scales[(block + shift) % scales.len()];
            let bytes = packed.iter().enumerate();
            let expected: Vec<f32> = bytes
                .flat_map(|(i, b)| [b >> 4, b & 15].map(|c| CODEBOOK[c as usize] * scale(i / (BLOCK / 2))))
                .collect();
            // Of a NaN only that it is one is the same everywhere.
            let bits = |v: f32| if v.is_nan() { u32::MAX } else { v.to_bits() };
            let exact = |found: &[f32]| found.iter().zip(&expected).all(|(a, b)| bits(*a) == bits(*b));
            let rounded = |found: &[bf16]| {
                let expected = expected.iter().map(|v| bf16::from_f32(*v).to_f32());
                found.iter().zip(expected).all(|(a, b)| bits(a.to_f32()) == bits(b))
            };
            let (mut full, mut short) = (vec![0f32; count], vec![bf16::ZERO; count]);
            f32::blocks(&packed, scale, &mut full);
            bf16::blocks(&packed, scale, &mut short);
            assert!(exact(&full) && rounded(&short));
            (full, short) = (vec![0f32; count], vec![bf16::ZERO; count]);
            by_table(&packed, scale, &mut full);
            by_table(&packed, scale, &mut short);
            assert!(exact(&full) && rounded(&short));
        }
    }

    #[test]
    fn pieces_are_those_of_the_whole() {
        for (rows, cols) in [(130, 192), (16, 100)] {
            let values: Vec<f32> =
                (0..rows * cols).map(|i| ((i * 7919 % 2003) as f32 / 1001.5 - 1.0) * 0.1).collect();
            let nf4 = Nf4::quantize(&values, rows, cols).unwrap();
            let whole = nf4.dequantize();
            for (r, c) in
                [(0..rows, 0..cols), (rows / 2..rows, 0..cols), (3..5, 64..cols), (0..rows, cols - 36..cols)]
            {
                let stride = c.len() + 3;
                let mut piece = vec![7f32; r.len() * stride];
                nf4.decode_piece(r.clone(), c.clone(), &mut piece, stride);
                let row = |i: usize| [&whole[i * cols + c.start..i * cols + c.end], &[7.0; 3]].concat();
                let expected: Vec<f32> = r.clone().flat_map(row).collect();
                assert_eq!(piece, expected, "{r:?} {c:?}");
            }
        }
    }
}
