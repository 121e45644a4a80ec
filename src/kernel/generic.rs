//! The algorithm once, over a small vector trait; and the portable vector, an array the compiler vectorises.
//!
//! Everything here is `inline(always)` so that it is compiled inside a `target_feature` wrapper, and there
//! with the instructions of that wrapper.

use super::dispatch::{KernelKind, Ops, Table};
use crate::activations::Element;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Independent accumulators: enough to hide the latency of an addition behind the loads.
pub(super) const UNROLL: usize = 4;
/// Lanes of the widest vector.
const MAX_LANES: usize = 16;

/// A register of f32 lanes.
///
/// # Safety
/// Every method must only be called where the CPU has the instructions of the implementing vector.
pub(super) trait Vector: Copy {
    const LANES: usize;
    unsafe fn splat(value: f32) -> Self;
    /// `self * other + sum`, with one or two roundings as `contract.md` says for the kernel.
    unsafe fn multiply_add(self, other: Self, sum: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    /// `self - factor * other`, always with two roundings.
    unsafe fn subtract_scaled(self, factor: Self, other: Self) -> Self;
    /// Lane-wise `max(|self|, other)`; no NaN goes in.
    unsafe fn max_abs(self, other: Self) -> Self;
}

/// Reading and writing a register as elements of `T`, without alignment beyond that of `T`.
///
/// # Safety
/// As for [`Vector`]; and the pointer must be good for `LANES` elements.
pub(super) trait Memory<T>: Vector {
    unsafe fn load(from: *const T) -> Self;
    unsafe fn store(self, to: *mut T);
}

/// Loads `count <= LANES` elements, the other lanes zero.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - `from` is good for reading `count` elements.
#[inline(always)]
unsafe fn load_part<V: Memory<T>, T: Element>(from: *const T, count: usize) -> V {
    // SAFETY: a full chunk is read where it lies; a partial one is copied into a buffer of MAX_LANES >= LANES.
    unsafe {
        if count == V::LANES {
            return V::load(from);
        }
        let mut buffer = [T::default(); MAX_LANES];
        std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), count);
        V::load(buffer.as_ptr())
    }
}

/// Stores the first `count <= LANES` lanes.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - `to` is good for writing `count` elements.
#[inline(always)]
unsafe fn store_part<V: Memory<T>, T: Element>(vector: V, to: *mut T, count: usize) {
    // SAFETY: as in `load_part`, the other way round.
    unsafe {
        if count == V::LANES {
            return vector.store(to);
        }
        let mut buffer = [T::default(); MAX_LANES];
        vector.store(buffer.as_mut_ptr());
        std::ptr::copy_nonoverlapping(buffer.as_ptr(), to, count);
    }
}

/// The lanes as an array; lanes beyond `LANES` are zero.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
unsafe fn lanes<V: Memory<f32>>(vector: V) -> [f32; MAX_LANES] {
    let mut lanes = [0.0; MAX_LANES];
    // SAFETY: the array holds MAX_LANES >= LANES elements.
    unsafe { vector.store(lanes.as_mut_ptr()) };
    lanes
}

/// Adds the accumulators in pairs, then folds the lanes in halves.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
unsafe fn total<V: Memory<f32>>(sums: [V; UNROLL]) -> f32 {
    // SAFETY: passed on to the caller.
    let mut lanes = unsafe { lanes(sums[0].add(sums[1]).add(sums[2].add(sums[3]))) };
    let mut half = V::LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `(row . direction, row . row)`, each 0 unless asked for. Their bits do not depend on what else is asked for.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - `row` and `direction` have the same length.
#[inline(always)]
pub(super) unsafe fn reduce<V, T, const DOT: bool, const SQUARES: bool>(
    row: &[T],
    direction: &[f32],
) -> (f32, f32)
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (width, h, u) = (row.len(), row.as_ptr(), direction.as_ptr());
    // SAFETY: `at + count <= width` at every access.
    unsafe {
        let mut dots = [V::splat(0.0); UNROLL];
        let mut squares = dots;
        let mut at = 0;
        while at + UNROLL * V::LANES <= width {
            for k in 0..UNROLL {
                let x = <V as Memory<T>>::load(h.add(at + k * V::LANES));
                if DOT {
                    let y = <V as Memory<f32>>::load(u.add(at + k * V::LANES));
                    dots[k] = x.multiply_add(y, dots[k]);
                }
                if SQUARES {
                    squares[k] = x.multiply_add(x, squares[k]);
                }
            }
            at += UNROLL * V::LANES;
        }
        // A constant trip count keeps the accumulators in registers; fewer than UNROLL full chunks are left.
        for k in 0..UNROLL {
            if at < width {
                let count = V::LANES.min(width - at);
                let x = load_part::<V, T>(h.add(at), count);
                if DOT {
                    let y = load_part::<V, f32>(u.add(at), count);
                    dots[k] = x.multiply_add(y, dots[k]);
                }
                if SQUARES {
                    squares[k] = x.multiply_add(x, squares[k]);
                }
                at += count;
            }
        }
        (total(dots), total(squares))
    }
}

/// `max_i |row_i - c * direction_i|` in f32.
///
/// # Safety
/// As for [`reduce`].
#[inline(always)]
pub(super) unsafe fn edit_peak<V, T>(row: &[T], direction: &[f32], c: f32) -> f32
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let width = row.len();
    // SAFETY: `at + count <= width` at every access.
    unsafe {
        let factor = V::splat(c);
        let mut peak = V::splat(0.0);
        let mut at = 0;
        while at < width {
            let count = V::LANES.min(width - at);
            let x = load_part::<V, T>(row.as_ptr().add(at), count);
            let y = load_part::<V, f32>(direction.as_ptr().add(at), count);
            peak = x.subtract_scaled(factor, y).max_abs(peak);
            at += count;
        }
        lanes(peak).into_iter().fold(0.0, f32::max)
    }
}

/// `row_i <- round(row_i - c * direction_i)`.
///
/// # Safety
/// As for [`reduce`].
#[inline(always)]
pub(super) unsafe fn edit<V, T>(row: &mut [T], direction: &[f32], c: f32)
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (width, h) = (row.len(), row.as_mut_ptr());
    // SAFETY: `at + count <= width` at every access.
    unsafe {
        let factor = V::splat(c);
        let mut at = 0;
        while at < width {
            let count = V::LANES.min(width - at);
            let x = load_part::<V, T>(h.add(at), count);
            let y = load_part::<V, f32>(direction.as_ptr().add(at), count);
            store_part::<V, T>(x.subtract_scaled(factor, y), h.add(at), count);
            at += count;
        }
    }
}

pub(super) static TABLE: Table = Table { kind: KernelKind::Portable, f32: ops(), f16: ops(), bf16: ops() };

const fn ops<T: Element>() -> Ops<T>
where
    Portable: Memory<T>,
{
    Ops {
        dot: dot::<T>,
        dot_squares: dot_squares::<T>,
        edit_peak: edit_peak::<Portable, T>,
        edit: edit::<Portable, T>,
    }
}

/// # Safety
/// As for [`reduce`].
unsafe fn dot<T: Element>(row: &[T], direction: &[f32]) -> f32
where
    Portable: Memory<T>,
{
    // SAFETY: passed on to the caller.
    unsafe { reduce::<Portable, T, true, false>(row, direction).0 }
}

/// Two passes: both sums at once need more registers than most targets have, and the compiler then gives up vectors.
///
/// # Safety
/// As for [`reduce`].
unsafe fn dot_squares<T: Element>(row: &[T], direction: &[f32]) -> (f32, f32)
where
    Portable: Memory<T>,
{
    // SAFETY: passed on to the caller.
    unsafe {
        let (dot, _) = reduce::<Portable, T, true, false>(row, direction);
        let (_, squares) = reduce::<Portable, T, false, true>(row, direction);
        (dot, squares)
    }
}

/// Eight lanes in an array; every target has it.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 8]);

// No instruction beyond the target's baseline is used, so the first rule of `# Safety` is void here.
#[expect(clippy::needless_range_loop, reason = "zipped iterators keep bf16 rows from being vectorised")]
impl Vector for Portable {
    const LANES: usize = 8;

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
    unsafe fn subtract_scaled(self, factor: Self, other: Self) -> Self {
        let mut out = self.0;
        for i in 0..8 {
            out[i] -= factor.0[i] * other.0[i];
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
