//! NF4 blocks back to numbers, in f32 or bf16, whole matrices or pieces of them.

use super::nf4::{BLOCK, CODEBOOK};
use super::{Nf4, Sign};
use crate::model::vector::to_bf16;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// Blocks per parallel task.
const TASK: usize = 256;

/// What a block decodes to.
pub trait Decoded: Copy + Send + Sync {
    /// Zero.
    const ZERO: Self;
    /// The 16 values of a block, as they are stored, in words of 32 bits.
    fn table(scale: f32) -> [u32; 16];
    /// Decodes a block.
    fn block(packed: &[u8], table: &[u32; 16], to: &mut [Self]);
}

impl Decoded for f32 {
    const ZERO: f32 = 0.0;

    fn table(scale: f32) -> [u32; 16] {
        CODEBOOK.map(|c| (c * scale).to_bits())
    }

    fn block(packed: &[u8], table: &[u32; 16], to: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") && packed.len() == BLOCK / 2 && to.len() == BLOCK {
            // SAFETY: the processor has AVX-512F, and the slices have a block's lengths.
            return unsafe { avx512::block_f32(packed, table, to) };
        }
        for (to, b) in to.chunks_exact_mut(2).zip(packed) {
            to[0] = f32::from_bits(table[usize::from(b >> 4)]);
            to[1] = f32::from_bits(table[usize::from(b & 15)]);
        }
    }
}

impl Decoded for bf16 {
    const ZERO: bf16 = bf16::ZERO;

    fn table(scale: f32) -> [u32; 16] {
        CODEBOOK.map(|c| u32::from(to_bf16(c * scale).to_bits()))
    }

    fn block(packed: &[u8], table: &[u32; 16], to: &mut [bf16]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") && packed.len() == BLOCK / 2 && to.len() == BLOCK {
            // SAFETY: the processor has AVX-512F, and the slices have a block's lengths.
            return unsafe { avx512::block_bf16(packed, table, to) };
        }
        for (to, b) in to.chunks_exact_mut(2).zip(packed) {
            to[0] = bf16::from_bits(table[usize::from(b >> 4)] as u16);
            to[1] = bf16::from_bits(table[usize::from(b & 15)] as u16);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use half::bf16;
    use std::arch::x86_64::*;

    /// # Safety
    /// `packed` must have 32 bytes and `to` 64 values, on a processor with AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn block_bf16(packed: &[u8], table: &[u32; 16], to: &mut [bf16]) {
        // SAFETY: loads and stores are unaligned ones, of 64 bytes of the table, two times 16 of the 32 bytes packed and
        // two times 64 of the 128 bytes of the result.
        unsafe {
            let first = _mm512_loadu_si512(table.as_ptr().cast());
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

    /// # Safety
    /// As [`block_bf16`].
    #[target_feature(enable = "avx512f")]
    pub unsafe fn block_f32(packed: &[u8], table: &[u32; 16], to: &mut [f32]) {
        // SAFETY: as above; the result has 256 bytes, written in four times 64.
        unsafe {
            let values = _mm512_loadu_si512(table.as_ptr().cast());
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
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

impl Nf4 {
    /// Decodes the whole matrix, row-major.
    pub fn decode<T: Decoded>(&self, to: &mut [T]) {
        to.par_chunks_mut(TASK * BLOCK).enumerate().for_each(|(task, to)| {
            for (i, to) in to.chunks_mut(BLOCK).enumerate() {
                self.decode_block(task * TASK + i, to);
            }
        });
    }

    fn decode_block<T: Decoded>(&self, block: usize, to: &mut [T]) {
        let packed = &self.packed[block * (BLOCK / 2)..][..BLOCK / 2];
        T::block(packed, &T::table(self.scale(Sign::Signed.map(), block)), to);
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
                // A block, or the part of one that lies in this row and these columns.
                let first = at % BLOCK;
                let (here, rest) = to.split_at_mut((BLOCK - first).min(end - at));
                match here.len() {
                    BLOCK => self.decode_block(at / BLOCK, here),
                    len => {
                        self.decode_block(at / BLOCK, &mut whole);
                        here.copy_from_slice(&whole[first..first + len]);
                    }
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
        for scale in [1.0f32, 0.031_25, 3.3e-5, 7.7e4] {
            for packed in packed.chunks(BLOCK / 2) {
                let pairs = packed.iter().flat_map(|b| [b >> 4, b & 15]);
                let expected: Vec<f32> = pairs.map(|c| CODEBOOK[c as usize] * scale).collect();
                let mut full = [0f32; BLOCK];
                f32::block(packed, &f32::table(scale), &mut full);
                assert_eq!(full.as_slice(), expected);
                let mut short = [bf16::ZERO; BLOCK];
                bf16::block(packed, &bf16::table(scale), &mut short);
                assert_eq!(short.to_vec(), expected.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>());
                // Half a block takes the plain loop.
                let mut plain = [0f32; BLOCK / 2];
                f32::block(&packed[..BLOCK / 4], &f32::table(scale), &mut plain);
                assert_eq!(plain, full[..BLOCK / 2]);
            }
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
