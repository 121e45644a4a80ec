//! A register of f32 values: what the algorithm needs of it, and one made of an array.

use crate::quant::{BLOCK, CODEBOOK};

/// A register of `WIDTH` values.
///
/// # Safety
/// All functions may be called only where the processor has the features that the type stands for.
pub(super) trait Lanes: Copy {
    const WIDTH: usize;

    /// Zeros.
    unsafe fn zero() -> Self;

    /// # Safety
    /// `WIDTH` values can be read.
    unsafe fn load(from: *const f32) -> Self;

    /// Asks for the memory at `from`, whether it can be read or not.
    unsafe fn fetch(_from: *const f32) {}

    /// The first `count < WIDTH` values, then zeros.
    ///
    /// # Safety
    /// `count` values can be read.
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        let mut values = [0f32; 16];
        // SAFETY: `count` values can be read, there is room for 15; a register has at most 16.
        unsafe {
            std::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), count.min(15));
            Self::load(values.as_ptr())
        }
    }

    /// `self by + to`.
    unsafe fn mul_add(self, by: Self, to: Self) -> Self;

    /// The sum of each, in the same order whichever place it has.
    unsafe fn sums(of: [Self; 4]) -> [f32; 4];

    /// A block of NF4 codes, times `scale`.
    ///
    /// # Safety
    /// `BLOCK / 2` bytes can be read.
    unsafe fn decode(packed: *const u8, scale: f32, into: &mut [f32; BLOCK]);
}

/// For every processor.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 8]);

impl Lanes for Portable {
    const WIDTH: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Portable([0.0; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: passed on; an array of f32 needs the alignment of one.
        unsafe { Portable(*from.cast()) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, by: Self, to: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] * by.0[i] + to.0[i]))
    }

    #[inline(always)]
    unsafe fn sums(of: [Self; 4]) -> [f32; 4] {
        of.map(|Portable([a, b, c, d, e, f, g, h])| ((a + e) + (c + g)) + ((b + f) + (d + h)))
    }

    #[inline(always)]
    unsafe fn decode(packed: *const u8, scale: f32, into: &mut [f32; BLOCK]) {
        for (i, pair) in into.chunks_exact_mut(2).enumerate() {
            // SAFETY: i is below half a block.
            let byte = unsafe { *packed.add(i) } as usize;
            pair[0] = CODEBOOK[byte >> 4] * scale;
            pair[1] = CODEBOOK[byte & 15] * scale;
        }
    }
}
