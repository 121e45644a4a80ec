//! The portable vector: an array, which the compiler vectorises with what every CPU of the target has.

use super::dispatch::{KernelKind, Ops, Table};
use super::edit::edit;
use super::generic::{Ahead, GROUP, Memory, Vector, edit_peak, reduce};
use super::many::{dots, dots_of_row};
use crate::activations::Element;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

pub(super) static TABLE: Table = Table { kind: KernelKind::Portable, f32: ops(), f16: ops(), bf16: ops() };

const fn ops<T: Element>() -> Ops<T>
where
    Portable: Memory<T>,
{
    Ops {
        dot: dot::<T>,
        squares: squares::<T>,
        measure: measure::<T>,
        dots: dots::<Portable, T>,
        dots_of_row: dots_of_row::<Portable, T>,
        edit_peak: edit_peak::<Portable, T>,
        edit: edit_one::<T>,
        edit_group: edit_group::<T>,
        edit_normal_group: edit_group::<T>,
    }
}

/// # Safety
/// As for [`reduce`].
unsafe fn dot<T: Element>(row: &[T], direction: &[f32]) -> f32
where
    Portable: Memory<T>,
{
    // SAFETY: passed on to the caller.
    unsafe { reduce::<Portable, T, true, false>(row, direction, None).0 }
}

/// # Safety
/// As for [`reduce`].
unsafe fn squares<T: Element>(row: &[T]) -> f32
where
    Portable: Memory<T>,
{
    // SAFETY: passed on to the caller.
    unsafe { reduce::<Portable, T, false, true>(row, &[], None).1 }
}

/// Two passes a row: both sums at once need more registers than most targets have, and the compiler then gives up
/// vectors.
///
/// # Safety
/// As for [`reduce`].
unsafe fn measure<T: Element>(
    rows: [&[T]; GROUP],
    direction: Option<&[f32]>,
    _: [Ahead; GROUP],
) -> [(f32, f32); GROUP]
where
    Portable: Memory<T>,
{
    // SAFETY: passed on to the caller.
    rows.map(|row| unsafe { (direction.map_or(0.0, |direction| dot(row, direction)), squares(row)) })
}

/// Never inlined: as arguments of a function, row and direction are known not to overlap, without which the compiler
/// gives up vectors.
///
/// # Safety
/// As for [`reduce`].
#[inline(never)]
unsafe fn edit_one<T: Element>(row: &mut [T], direction: &[f32], c: f32)
where
    Portable: Memory<T>,
{
    // SAFETY: passed on to the caller.
    unsafe { edit::<Portable, T>(row, direction, c) }
}

/// # Safety
/// As for [`reduce`], for all rows.
unsafe fn edit_group<T: Element>(
    rows: [&mut [T]; GROUP],
    direction: &[f32],
    c: [f32; GROUP],
    _: [Ahead; GROUP],
) where
    Portable: Memory<T>,
{
    for (row, c) in rows.into_iter().zip(c) {
        // SAFETY: passed on to the caller.
        unsafe { edit_one(row, direction, c) };
    }
}

/// Eight lanes in an array; every target has it.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 8]);

// No instruction beyond the target's baseline is used, so the first rule of `# Safety` is void here.
#[expect(clippy::needless_range_loop, reason = "zipped iterators keep bf16 rows from being vectorised")]
impl Vector for Portable {
    const LANES: usize = 8;
    // Unknown; one dot product at a time is what compilers keep in registers.
    const REGISTERS: usize = 0;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Portable([value; 8])
    }

    // Two roundings: without the instruction a fused multiply-add would be a library call per element.
    #[inline(always)]
    unsafe fn multiply_add(self, other: Self, sum: Self) -> Self {
        let mut out = sum.0;
        for i in 0..8 {
            out[i] += self.0[i] * other.0[i];
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        let mut out = self.0;
        for i in 0..8 {
            out[i] += other.0[i];
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn subtract(self, other: Self) -> Self {
        let mut out = self.0;
        for i in 0..8 {
            out[i] -= other.0[i];
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        let mut out = self.0;
        for i in 0..8 {
            out[i] *= other.0[i];
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn max_abs(self, other: Self) -> Self {
        let mut out = other.0;
        for i in 0..8 {
            // Not `f32::max`: its care for NaN would cost three instructions.
            let size = self.0[i].abs();
            out[i] = if size > out[i] { size } else { out[i] };
        }
        Portable(out)
    }

    #[inline(always)]
    unsafe fn fold(self) -> f32 {
        let mut lanes = self.0;
        let mut half = 4;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }

    // No instruction that every target has.
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn prefetch_later(_: *const u8) {}
}

impl Memory<f32> for Portable {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's pointer is good for 8 elements.
        Portable(unsafe { from.cast::<[f32; 8]>().read() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's pointer is good for 8 elements.
        unsafe { to.cast::<[f32; 8]>().write(self.0) }
    }
}

impl Memory<f16> for Portable {
    #[inline(always)]
    unsafe fn load(from: *const f16) -> Self {
        let mut lanes = [0.0; 8];
        // SAFETY: the caller's pointer is good for 8 elements.
        unsafe { from.cast::<[f16; 8]>().read() }.convert_to_f32_slice(&mut lanes);
        Portable(lanes)
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f16) {
        let mut lanes = [f16::ZERO; 8];
        lanes.convert_from_f32_slice(&self.0);
        // SAFETY: the caller's pointer is good for 8 elements.
        unsafe { to.cast::<[f16; 8]>().write(lanes) }
    }
}

impl Memory<bf16> for Portable {
    #[inline(always)]
    unsafe fn load(from: *const bf16) -> Self {
        // SAFETY: the caller's pointer is good for 8 elements, and bf16 is a u16 in memory.
        let halves = unsafe { from.cast::<[u16; 8]>().read() };
        Portable(halves.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    // Ties to even, without the branch for NaN that a finite value does not need.
    #[inline(always)]
    unsafe fn store(self, to: *mut bf16) {
        let rounded = self.0.map(|value| {
            let bits = value.to_bits();
            (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
        });
        // SAFETY: as in `load`.
        unsafe { to.cast::<[u16; 8]>().write(rounded) }
    }
}
