//! The algorithm once, over a small vector trait.
//!
//! Everything here is `inline(always)` so that it is compiled inside a `target_feature` wrapper, and there
//! with the instructions of that wrapper.

use crate::activations::Element;
use std::ops::Range;

/// Independent accumulators: enough to hide the latency of an addition behind the loads.
pub(super) const UNROLL: usize = 4;
/// Rows that are measured together before they are edited.
pub(super) const GROUP: usize = 4;
/// Lanes of the widest vector.
const MAX_LANES: usize = 16;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// A register of f32 lanes.
///
/// # Safety
/// Every method must only be called where the CPU has the instructions of the implementing vector.
pub(super) trait Vector: Copy {
    const LANES: usize;
    /// How many of them the CPU has.
    const REGISTERS: usize;
    unsafe fn splat(value: f32) -> Self;
    /// `self * other + sum`, with one or two roundings as `contract.md` says for the kernel.
    unsafe fn multiply_add(self, other: Self, sum: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn subtract(self, other: Self) -> Self;
    unsafe fn multiply(self, other: Self) -> Self;
    /// `self - factor * other`, always with two roundings.
    #[inline(always)]
    unsafe fn subtract_scaled(self, factor: Self, other: Self) -> Self {
        // SAFETY: passed on to the caller.
        unsafe { self.subtract(factor.multiply(other)) }
    }
    /// Lane-wise `max(|self|, other)`; no NaN goes in.
    unsafe fn max_abs(self, other: Self) -> Self;
    /// The lanes folded in halves: lane `i` takes lane `i + LANES / 2`, and so on.
    unsafe fn fold(self) -> f32;
    /// Asks for a cache line; the address need not be one that may be read.
    unsafe fn prefetch(address: *const u8);
    /// The same, into the second cache only: what is wanted later would push out what is wanted now.
    unsafe fn prefetch_later(address: *const u8);

    /// How many bytes ahead rows that are read side by side are fetched.
    #[inline(always)]
    fn soon() -> usize {
        SOON
    }
}

/// Far enough that the second cache has answered when the element is wanted; twice as far, a first cache of 32 KiB has
/// often dropped it again.
pub(super) const SOON: usize = 384;

/// Reading and writing a register as elements of `T`, without alignment beyond that of `T`.
///
/// # Safety
/// As for [`Vector`]; and the pointer must be good for as many elements as are loaded or stored:
/// `LANES`, two times that, or the `count < LANES` that is given.
pub(super) trait Memory<T: Element>: Vector {
    unsafe fn load(from: *const T) -> Self;
    unsafe fn store(self, to: *mut T);

    /// Loads `count` elements, the other lanes zero.
    #[inline(always)]
    unsafe fn load_first(from: *const T, count: usize) -> Self {
        let mut buffer = [T::default(); MAX_LANES];
        // SAFETY: `count < LANES <= MAX_LANES`; `from` is good for `count` elements.
        unsafe {
            std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), count);
            Self::load(buffer.as_ptr())
        }
    }

    /// Loads two registers, one after the other.
    #[inline(always)]
    unsafe fn load_pair(from: *const T) -> (Self, Self) {
        // SAFETY: `from` is good for `2 * LANES` elements.
        unsafe { (Self::load(from), Self::load(from.add(Self::LANES))) }
    }

    /// Stores two registers, one after the other.
    #[inline(always)]
    unsafe fn store_pair(self, second: Self, to: *mut T) {
        // SAFETY: `to` is good for `2 * LANES` elements.
        unsafe {
            self.store(to);
            second.store(to.add(Self::LANES));
        }
    }

    /// Stores two registers of which each lane is 0 or a normal f32.
    #[inline(always)]
    unsafe fn store_normal_pair(self, second: Self, to: *mut T) {
        // SAFETY: `to` is good for `2 * LANES` elements.
        unsafe { self.store_pair(second, to) }
    }

    /// Stores the first `count` lanes.
    #[inline(always)]
    unsafe fn store_first(self, to: *mut T, count: usize) {
        let mut buffer = [T::default(); MAX_LANES];
        // SAFETY: as in `load_first`, the other way round.
        unsafe {
            self.store(buffer.as_mut_ptr());
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), to, count);
        }
    }
}

/// Loads `UNROLL` registers, two and two.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - `from` is good for reading `UNROLL * LANES` elements.
#[inline(always)]
unsafe fn load_block<V: Memory<T>, T: Element>(from: *const T) -> [V; UNROLL] {
    // SAFETY: passed on to the caller.
    unsafe {
        let (a, b) = V::load_pair(from);
        let (c, d) = V::load_pair(from.add(2 * V::LANES));
        [a, b, c, d]
    }
}

/// Loads `count <= LANES` elements, the other lanes zero.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - `from` is good for reading `count` elements.
#[inline(always)]
pub(super) unsafe fn load_part<V: Memory<T>, T: Element>(from: *const T, count: usize) -> V {
    // SAFETY: passed on to the caller.
    unsafe { if count == V::LANES { V::load(from) } else { V::load_first(from, count) } }
}

/// Half of a row to come, fetched into the second cache while another one is worked on, evenly over the pass.
#[derive(Clone, Copy)]
pub(super) struct Ahead(*const u8);

impl Ahead {
    /// The first half of `next`; where there is none `row` itself, which is at hand.
    #[inline(always)]
    pub(super) fn first_half<T>(next: &[T], row: &[T]) -> Ahead {
        Ahead(if next.is_empty() { row.as_ptr() } else { next.as_ptr() }.cast())
    }

    /// The second half, likewise.
    #[inline(always)]
    pub(super) fn second_half<T>(next: &[T], row: &[T]) -> Ahead {
        Ahead(Ahead::first_half(next, row).0.wrapping_add(size_of_val(next) / 2))
    }

    /// Fetches what belongs to the block of `UNROLL` registers of `T` that begins with the element `at`.
    ///
    /// # Safety
    /// The CPU has the instructions of `V`.
    #[inline(always)]
    pub(super) unsafe fn fetch<V: Vector, T>(self, at: usize) {
        let half = UNROLL * V::LANES * size_of::<T>() / 2;
        for line in 0..half.div_ceil(LINE) {
            // SAFETY: passed on to the caller; the address is only a hint.
            unsafe { V::prefetch_later(self.0.wrapping_add(at * size_of::<T>() / 2 + line * LINE)) };
        }
    }
}

/// What is fetched while `R` rows are read side by side.
#[derive(Clone, Copy)]
pub(super) enum Fetch<const R: usize> {
    Nothing,
    /// The rows themselves, [`Vector::soon`] bytes ahead.
    Soon,
    /// Rows to come.
    Halves([Ahead; R]),
}

impl<const R: usize> Fetch<R> {
    /// What belongs to row `r` at the pair of registers that begins with the element `place`, the first of a block or not.
    ///
    /// # Safety
    /// The CPU has the instructions of `V`.
    #[inline(always)]
    unsafe fn fetch<V: Vector, T>(self, row: *const T, r: usize, place: usize, first: bool) {
        // SAFETY: passed on to the caller; the address is only a hint.
        unsafe {
            match self {
                Fetch::Soon => {
                    let soon = row.wrapping_add(place).cast::<u8>().wrapping_add(V::soon());
                    for line in 0..(2 * V::LANES * size_of::<T>()).div_ceil(LINE) {
                        V::prefetch(soon.wrapping_add(line * LINE));
                    }
                }
                Fetch::Halves(ahead) if first => ahead[r].fetch::<V, T>(place),
                _ => {}
            }
        }
    }
}

/// Adds the accumulators in pairs, then folds the lanes in halves.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
pub(super) unsafe fn total<V: Vector>(sums: [V; UNROLL]) -> f32 {
    // SAFETY: passed on to the caller.
    unsafe { sums[0].add(sums[1]).add(sums[2].add(sums[3])).fold() }
}

/// `(row . direction, row . row)`, each 0 unless asked for. Their bits do not depend on what else is asked for.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - `row` and `direction` have the same length; without `DOT` the direction is not looked at.
#[inline(always)]
pub(super) unsafe fn reduce<V, T, const DOT: bool, const SQUARES: bool>(
    row: &[T],
    direction: &[f32],
    ahead: Option<Ahead>,
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
            if let Some(ahead) = ahead {
                ahead.fetch::<V, T>(at);
            }
            let x = load_block::<V, T>(h.add(at));
            for k in 0..UNROLL {
                if DOT {
                    let y = <V as Memory<f32>>::load(u.add(at + k * V::LANES));
                    dots[k] = x[k].multiply_add(y, dots[k]);
                }
                if SQUARES {
                    squares[k] = x[k].multiply_add(x[k], squares[k]);
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
        (if DOT { total(dots) } else { 0.0 }, if SQUARES { total(squares) } else { 0.0 })
    }
}

/// `R x D` dot products at once, and the sums of squares of the rows where asked for, each with the bits of
/// [`reduce`]: every element is loaded once.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - Every row and direction is `width` elements long.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "closures would be compiled without the wrapper's instructions"
)]
pub(super) unsafe fn tile<V, T, const R: usize, const D: usize, const SQUARES: bool>(
    rows: [*const T; R],
    directions: [*const f32; D],
    width: usize,
    fetch: Fetch<R>,
) -> ([[f32; D]; R], [f32; R])
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    // SAFETY: `at + count <= width` at every access.
    unsafe {
        let mut sums = [[[V::splat(0.0); UNROLL]; D]; R];
        let mut squares = [[V::splat(0.0); UNROLL]; R];
        let mut y = [V::splat(0.0); D];
        let mut at = 0;
        while at + UNROLL * V::LANES <= width {
            for pair in 0..UNROLL / 2 {
                let (place, k) = (at + 2 * pair * V::LANES, 2 * pair);
                let mut z = y;
                for d in 0..D {
                    y[d] = <V as Memory<f32>>::load(directions[d].add(place));
                    z[d] = <V as Memory<f32>>::load(directions[d].add(place + V::LANES));
                }
                for r in 0..R {
                    fetch.fetch::<V, T>(rows[r], r, place, pair == 0);
                    let (x, w) = <V as Memory<T>>::load_pair(rows[r].add(place));
                    for d in 0..D {
                        sums[r][d][k] = x.multiply_add(y[d], sums[r][d][k]);
                        sums[r][d][k + 1] = w.multiply_add(z[d], sums[r][d][k + 1]);
                    }
                    if SQUARES {
                        squares[r][k] = x.multiply_add(x, squares[r][k]);
                        squares[r][k + 1] = w.multiply_add(w, squares[r][k + 1]);
                    }
                }
            }
            at += UNROLL * V::LANES;
        }
        // Written out, since a loop that the compiler leaves rolled keeps all accumulators in memory, and the loop above
        // then stores them at every turn.
        last::<V, T, R, D, SQUARES, 0>(rows, directions, at..width, &mut sums, &mut squares);
        last::<V, T, R, D, SQUARES, 1>(rows, directions, at..width, &mut sums, &mut squares);
        last::<V, T, R, D, SQUARES, 2>(rows, directions, at..width, &mut sums, &mut squares);
        last::<V, T, R, D, SQUARES, 3>(rows, directions, at..width, &mut sums, &mut squares);
        let mut out = ([[0.0; D]; R], [0.0; R]);
        for r in 0..R {
            for d in 0..D {
                out.0[r][d] = total(sums[r][d]);
            }
            if SQUARES {
                out.1[r] = total(squares[r]);
            }
        }
        out
    }
}

/// The `K`-th of the last chunks of a tile, where there is one, added to its accumulators.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - Every row and direction reaches to the end of `columns`.
#[inline(always)]
unsafe fn last<V, T, const R: usize, const D: usize, const SQUARES: bool, const K: usize>(
    rows: [*const T; R],
    directions: [*const f32; D],
    columns: Range<usize>,
    sums: &mut [[[V; UNROLL]; D]; R],
    squares: &mut [[V; UNROLL]; R],
) where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let at = columns.start + K * V::LANES;
    if at >= columns.end {
        return;
    }
    // SAFETY: `at + count <= columns.end`.
    unsafe {
        let count = V::LANES.min(columns.end - at);
        let mut y = [V::splat(0.0); D];
        for d in 0..D {
            y[d] = load_part::<V, f32>(directions[d].add(at), count);
        }
        for r in 0..R {
            let x = load_part::<V, T>(rows[r].add(at), count);
            for d in 0..D {
                sums[r][d][K] = x.multiply_add(y[d], sums[r][d][K]);
            }
            if SQUARES {
                squares[r][K] = x.multiply_add(x, squares[r][K]);
            }
        }
    }
}

/// `(row . direction, row . row)` of some rows, each with the bits of [`reduce`], the first 0 without a direction; where
/// there are registers enough they are read side by side.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - All rows and the direction have the same length.
#[inline(always)]
pub(super) unsafe fn measure<V, T>(
    rows: [&[T]; GROUP],
    direction: Option<&[f32]>,
    ahead: [Ahead; GROUP],
) -> [(f32, f32); GROUP]
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (mut out, mut h, width) = ([(0.0, 0.0); GROUP], [std::ptr::null(); GROUP], rows[0].len());
    for r in 0..GROUP {
        h[r] = rows[r].as_ptr();
    }
    // SAFETY: passed on to the caller.
    unsafe {
        match direction {
            Some(u) if V::REGISTERS >= 32 => {
                let (dots, squares) =
                    tile::<V, T, GROUP, 1, true>(h, [u.as_ptr()], width, Fetch::Halves(ahead));
                for r in 0..GROUP {
                    out[r] = (dots[r][0], squares[r]);
                }
            }
            None if V::REGISTERS >= 32 => {
                let (_, squares) = tile::<V, T, GROUP, 0, true>(h, [], width, Fetch::Halves(ahead));
                for r in 0..GROUP {
                    out[r].1 = squares[r];
                }
            }
            Some(u) => {
                for r in 0..GROUP {
                    out[r] = reduce::<V, T, true, true>(rows[r], u, Some(ahead[r]));
                }
            }
            None => {
                for r in 0..GROUP {
                    out[r] = reduce::<V, T, false, true>(rows[r], &[], Some(ahead[r]));
                }
            }
        }
    }
    out
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
        let mut lanes = [0.0; MAX_LANES];
        <V as Memory<f32>>::store(peak, lanes.as_mut_ptr());
        lanes.into_iter().fold(0.0, f32::max)
    }
}
