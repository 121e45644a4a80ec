//! The algorithm once, over a small vector trait.
//!
//! Everything here is `inline(always)` so that it is compiled inside a `target_feature` wrapper, and there
//! with the instructions of that wrapper.

use crate::activations::Element;

/// Independent accumulators: enough to hide the latency of an addition behind the loads.
pub(super) const UNROLL: usize = 4;
/// Lanes of the widest vector.
const MAX_LANES: usize = 16;

/// Bytes of a cache line.
const LINE: usize = 64;

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
    /// `self - factor * other`, always with two roundings.
    unsafe fn subtract_scaled(self, factor: Self, other: Self) -> Self;
    /// Lane-wise `max(|self|, other)`; no NaN goes in.
    unsafe fn max_abs(self, other: Self) -> Self;
    /// The lanes folded in halves: lane `i` takes lane `i + LANES / 2`, and so on.
    unsafe fn fold(self) -> f32;
    /// Asks for a cache line; the address need not be one that may be read.
    unsafe fn prefetch(address: *const u8);
}

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

    /// Stores two registers, one after the other.
    #[inline(always)]
    unsafe fn store_pair(self, second: Self, to: *mut T) {
        // SAFETY: `to` is good for `2 * LANES` elements.
        unsafe {
            self.store(to);
            second.store(to.add(Self::LANES));
        }
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

/// Loads `count <= LANES` elements, the other lanes zero.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - `from` is good for reading `count` elements.
#[inline(always)]
unsafe fn load_part<V: Memory<T>, T: Element>(from: *const T, count: usize) -> V {
    // SAFETY: passed on to the caller.
    unsafe { if count == V::LANES { V::load(from) } else { V::load_first(from, count) } }
}

/// Memory to come, fetched into the second cache while a row is worked on, evenly over the pass.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    from: *const u8,
    /// The pass over a row fetches the row's size divided by `2^shift`.
    shift: u32,
}

impl Ahead {
    pub(super) const NOTHING: Ahead = Ahead { from: std::ptr::null(), shift: 0 };
    /// What keeps one pass in step with memory: far enough for its latency, near enough to be still there.
    const DISTANCE: usize = 4096;

    /// What follows a row in memory: the rows to come, where they are packed.
    #[inline(always)]
    pub(super) fn behind<T>(row: &[T]) -> Ahead {
        Ahead { from: row.as_ptr().cast::<u8>().wrapping_add(Ahead::DISTANCE), shift: 0 }
    }

    /// Part `part` of `2^shift` equal parts of a row; nothing of an empty one.
    #[inline(always)]
    pub(super) fn part<T>(row: &[T], part: usize, shift: u32) -> Ahead {
        if row.is_empty() {
            return Ahead::NOTHING;
        }
        let from = row.as_ptr().cast::<u8>().wrapping_add((size_of_val(row) >> shift) * part);
        Ahead { from, shift }
    }

    /// Cache lines for each block of `bytes`.
    #[inline(always)]
    fn lines(self, bytes: usize) -> usize {
        if self.from.is_null() { 0 } else { ((bytes / LINE) >> self.shift).max(1) }
    }

    /// Fetches what belongs to the block that begins `at` bytes into the pass.
    ///
    /// # Safety
    /// The CPU has the instructions of `V`.
    #[inline(always)]
    unsafe fn fetch<V: Vector>(self, at: usize, lines: usize) {
        for line in 0..lines {
            // SAFETY: passed on to the caller; the address is only a hint.
            unsafe { V::prefetch(self.from.wrapping_add((at >> self.shift) + line * LINE)) };
        }
    }
}

/// Adds the accumulators in pairs, then folds the lanes in halves.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
unsafe fn total<V: Vector>(sums: [V; UNROLL]) -> f32 {
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
    ahead: Ahead,
) -> (f32, f32)
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (width, h, u) = (row.len(), row.as_ptr(), direction.as_ptr());
    let lines = ahead.lines(UNROLL * V::LANES * size_of::<T>());
    // SAFETY: `at + count <= width` at every access.
    unsafe {
        let mut dots = [V::splat(0.0); UNROLL];
        let mut squares = dots;
        let mut at = 0;
        while at + UNROLL * V::LANES <= width {
            ahead.fetch::<V>(at * size_of::<T>(), lines);
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
unsafe fn tile<V, T, const R: usize, const D: usize, const SQUARES: bool>(
    rows: [*const T; R],
    directions: [*const f32; D],
    width: usize,
    ahead: [Ahead; R],
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
            for r in 0..R {
                ahead[r].fetch::<V>(at * size_of::<T>(), ahead[r].lines(UNROLL * V::LANES * size_of::<T>()));
            }
            for k in 0..UNROLL {
                let place = at + k * V::LANES;
                for d in 0..D {
                    y[d] = <V as Memory<f32>>::load(directions[d].add(place));
                }
                for r in 0..R {
                    let x = <V as Memory<T>>::load(rows[r].add(place));
                    for d in 0..D {
                        sums[r][d][k] = x.multiply_add(y[d], sums[r][d][k]);
                    }
                    if SQUARES {
                        squares[r][k] = x.multiply_add(x, squares[r][k]);
                    }
                }
            }
            at += UNROLL * V::LANES;
        }
        for k in 0..UNROLL {
            if at < width {
                let count = V::LANES.min(width - at);
                for d in 0..D {
                    y[d] = load_part::<V, f32>(directions[d].add(at), count);
                }
                for r in 0..R {
                    let x = load_part::<V, T>(rows[r].add(at), count);
                    for d in 0..D {
                        sums[r][d][k] = x.multiply_add(y[d], sums[r][d][k]);
                    }
                    if SQUARES {
                        squares[r][k] = x.multiply_add(x, squares[r][k]);
                    }
                }
                at += count;
            }
        }
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

/// `(row . direction, row . row)` of two rows, each with the bits of [`reduce`]; where there are registers enough the
/// direction is read once for both.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - Both rows and the direction have the same length.
#[inline(always)]
pub(super) unsafe fn reduce_pair<V, T>(
    rows: [&[T]; 2],
    direction: &[f32],
    ahead: [Ahead; 2],
) -> [(f32, f32); 2]
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    // SAFETY: passed on to the caller.
    unsafe {
        if V::REGISTERS >= 32 {
            let (h, u) = ([rows[0].as_ptr(), rows[1].as_ptr()], [direction.as_ptr()]);
            let ([[first], [second]], squares) = tile::<V, T, 2, 1, true>(h, u, direction.len(), ahead);
            return [(first, squares[0]), (second, squares[1])];
        }
        [
            reduce::<V, T, true, true>(rows[0], direction, ahead[0]),
            reduce::<V, T, true, true>(rows[1], direction, ahead[1]),
        ]
    }
}

/// Rows that [`dots`] takes together: with two directions and their accumulators they fill 32 registers, and
/// directions that do not fit the first cache are then read once for three rows.
pub(super) const ROWS: usize = 3;

/// Every row with every direction: `out[r * directions.len() + d]`. Fetches the rows to come in `next`.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - Rows and directions have the same length; `out` has `rows.len() * directions.len()` elements.
#[inline(always)]
pub(super) unsafe fn dots<V, T>(rows: &[&[T]], directions: &[&[f32]], next: &[&[T]], out: &mut [f32])
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let count = directions.len();
    // SAFETY: all lengths are `width`; `done` stays within `directions`.
    unsafe {
        if V::REGISTERS >= 32 && rows.len() == ROWS {
            let shift = count.div_ceil(2).next_power_of_two().ilog2();
            let mut done = 0;
            while done < count {
                let mut ahead = [Ahead::NOTHING; ROWS];
                for (a, row) in ahead.iter_mut().zip(next) {
                    *a = Ahead::part(row, done / 2, shift);
                }
                if done + 2 <= count {
                    columns::<V, T, ROWS, 2>(rows, directions, done, ahead, out);
                } else {
                    columns::<V, T, ROWS, 1>(rows, directions, done, ahead, out);
                }
                done += 2;
            }
            return;
        }
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(count)) {
            let (row, mut done) = (std::slice::from_ref(row), 0);
            while done < count {
                if V::REGISTERS >= 32 && done + 4 <= count {
                    columns::<V, T, 1, 4>(row, directions, done, [Ahead::NOTHING], out);
                    done += 4;
                } else if V::REGISTERS >= 16 && done + 2 <= count {
                    columns::<V, T, 1, 2>(row, directions, done, [Ahead::NOTHING], out);
                    done += 2;
                } else {
                    out[done] = reduce::<V, T, true, false>(row[0], directions[done], Ahead::NOTHING).0;
                    done += 1;
                }
            }
        }
    }
}

/// The tile of `R` rows and the `D` directions from `first` on.
///
/// # Safety
/// As for [`dots`]; there are `R` rows and at least `first + D` directions.
#[inline(always)]
unsafe fn columns<V, T, const R: usize, const D: usize>(
    rows: &[&[T]],
    directions: &[&[f32]],
    first: usize,
    ahead: [Ahead; R],
    out: &mut [f32],
) where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (mut h, mut u) = ([std::ptr::null(); R], [std::ptr::null(); D]);
    for r in 0..R {
        h[r] = rows[r].as_ptr();
    }
    for d in 0..D {
        u[d] = directions[first + d].as_ptr();
    }
    // SAFETY: passed on to the caller.
    let (found, _) = unsafe { tile::<V, T, R, D, false>(h, u, rows[0].len(), ahead) };
    for r in 0..R {
        for d in 0..D {
            out[r * directions.len() + first + d] = found[r][d];
        }
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
        let mut lanes = [0.0; MAX_LANES];
        <V as Memory<f32>>::store(peak, lanes.as_mut_ptr());
        lanes.into_iter().fold(0.0, f32::max)
    }
}

/// `row_i <- round(row_i - c * direction_i)`.
///
/// # Safety
/// As for [`reduce`].
#[inline(always)]
pub(super) unsafe fn edit<V, T>(row: &mut [T], direction: &[f32], c: f32, ahead: Ahead)
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (width, h, u) = (row.len(), row.as_mut_ptr(), direction.as_ptr());
    let lines = ahead.lines(UNROLL * V::LANES * size_of::<T>());
    // SAFETY: `at + count <= width` at every access.
    unsafe {
        let factor = V::splat(c);
        let mut at = 0;
        while at + UNROLL * V::LANES <= width {
            ahead.fetch::<V>(at * size_of::<T>(), lines);
            for k in 0..UNROLL / 2 {
                let (first, second) = (at + 2 * k * V::LANES, at + (2 * k + 1) * V::LANES);
                let x = <V as Memory<T>>::load(h.add(first));
                let x = x.subtract_scaled(factor, <V as Memory<f32>>::load(u.add(first)));
                let y = <V as Memory<T>>::load(h.add(second));
                let y = y.subtract_scaled(factor, <V as Memory<f32>>::load(u.add(second)));
                <V as Memory<T>>::store_pair(x, y, h.add(first));
            }
            at += UNROLL * V::LANES;
        }
        while at + V::LANES <= width {
            let x = <V as Memory<T>>::load(h.add(at));
            let y = <V as Memory<f32>>::load(u.add(at));
            <V as Memory<T>>::store(x.subtract_scaled(factor, y), h.add(at));
            at += V::LANES;
        }
        if at < width {
            let x = <V as Memory<T>>::load_first(h.add(at), width - at);
            let y = <V as Memory<f32>>::load_first(u.add(at), width - at);
            <V as Memory<T>>::store_first(x.subtract_scaled(factor, y), h.add(at), width - at);
        }
    }
}
