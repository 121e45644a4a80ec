//! Many rows, many directions: which of them share a load, in which order memory is read.

use super::generic::{Fetch, LINE, Memory, UNROLL, load_part, reduce, tile, total};
use crate::activations::Element;
use std::ops::Range;

/// Rows that [`dots`] takes together where there is one direction: read side by side they keep memory busy, and the more
/// there are, the less often the direction comes from the second cache, out of which they push it.
pub(super) const SIDE_BY_SIDE: usize = 6;
/// Rows that [`dots`] takes together where there are several: with four directions and one accumulator of each pair
/// they fill 32 registers.
pub(super) const ROWS: usize = 6;
/// Directions whose sums are kept at once, and the columns in which they are made: many, for loading and storing the
/// accumulators takes its time at each turn, yet so few that what one accumulator takes of them stays near.
const DIRECTIONS: usize = 8;
const BLOCK: usize = 2048;
/// Bytes that stay in the first cache, with room for what else is in use.
const NEAR: usize = 24 << 10;

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
    let mut done = 0;
    // SAFETY: all lengths are `width`; `done` stays within `rows`.
    unsafe {
        if count == 1 {
            while V::REGISTERS >= 32 && done + SIDE_BY_SIDE <= rows.len() {
                let (rows, out) = (&rows[done..], &mut out[done..]);
                columns::<V, T, SIDE_BY_SIDE, 1>(rows, directions, 0, out);
                done += SIDE_BY_SIDE;
            }
            for r in done..rows.len() {
                out[r] = reduce::<V, T, true, false>(rows[r], directions[0], None).0;
            }
            return;
        }
        while V::REGISTERS >= 32 && done + ROWS <= rows.len() {
            let next = if done == 0 { next } else { &[] };
            grid::<V, T>(&*rows.as_ptr().add(done).cast(), directions, next, &mut out[done * count..]);
            done += ROWS;
        }
        for (row, out) in rows[done..].iter().zip(out[done * count..].chunks_exact_mut(count)) {
            dots_of_row::<V, T>(row, directions, out);
        }
    }
}

/// One row with every direction. Directions share the loads of the row, but not where the second cache has to give them
/// and the first one keeps the row: one long stream comes faster than four.
///
/// # Safety
/// As for [`dots`].
#[inline(always)]
pub(super) unsafe fn dots_of_row<V, T>(row: &[T], directions: &[&[f32]], out: &mut [f32])
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (rows, count, mut done) = (std::slice::from_ref(&row), directions.len(), 0);
    let one = row.len() * size_of::<f32>();
    let shared = one * count <= NEAR || one + size_of_val(row) > NEAR;
    // SAFETY: all lengths are `width`; `done` stays within `directions`.
    unsafe {
        while done < count {
            if V::REGISTERS >= 32 && shared && done + 4 <= count {
                columns::<V, T, 1, 4>(rows, directions, done, out);
                done += 4;
            } else if V::REGISTERS >= 16 && shared && done + 2 <= count {
                columns::<V, T, 1, 2>(rows, directions, done, out);
                done += 2;
            } else {
                out[done] = reduce::<V, T, true, false>(row, directions[done], None).0;
                done += 1;
            }
        }
    }
}

/// [`ROWS`] rows with every direction, block by block of columns: each time over a block adds to one accumulator of some
/// pairs, so that a load serves three products or more.
///
/// # Safety
/// As for [`dots`].
#[inline(always)]
unsafe fn grid<V, T>(rows: &[&[T]; ROWS], directions: &[&[f32]], next: &[&[T]], out: &mut [f32])
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (width, count) = (rows[0].len(), directions.len());
    let mut h = [std::ptr::null(); ROWS];
    for r in 0..ROWS {
        h[r] = rows[r].as_ptr();
    }
    let mut first = 0;
    while first < count {
        let some = DIRECTIONS.min(count - first);
        let shift = (UNROLL * (some / 4 + some % 4)).next_power_of_two().ilog2();
        let mut u = [std::ptr::null(); DIRECTIONS];
        for d in 0..some {
            u[d] = directions[first + d].as_ptr();
        }
        // SAFETY: `d` stays within `some`, blocks within `width`.
        unsafe {
            let mut sums = [[[V::splat(0.0); ROWS]; DIRECTIONS]; UNROLL];
            let mut from = 0;
            while from < width {
                let columns = from..width.min(from + BLOCK);
                let mut later = Later { rows: if first == 0 { next } else { &[] }, part: 0, shift };
                // What one accumulator of every pair takes stays in the first cache from one tile to the next.
                for k in 0..UNROLL {
                    let (columns, sums, mut d) = (columns.clone(), &mut sums[k], 0);
                    // Where an element is converted it serves all eight.
                    if size_of::<T>() < size_of::<f32>() && some == DIRECTIONS {
                        for r in [0, 3] {
                            let h = [h[r], h[r + 1], h[r + 2]];
                            block::<V, T, 3, 8>(h, r, u, columns.clone(), k, sums, &mut later);
                        }
                        d = some;
                    }
                    while d + 4 <= some {
                        let u = [u[d], u[d + 1], u[d + 2], u[d + 3]];
                        block::<V, T, ROWS, 4>(h, 0, u, columns.clone(), k, &mut sums[d..], &mut later);
                        d += 4;
                    }
                    while d < some {
                        block::<V, T, ROWS, 1>(h, 0, [u[d]], columns.clone(), k, &mut sums[d..], &mut later);
                        d += 1;
                    }
                }
                from = columns.end;
            }
            for r in 0..ROWS {
                for d in 0..some {
                    out[r * count + first + d] = total([0, 1, 2, 3].map(|k| sums[k][d][r]));
                }
            }
        }
        first += some;
    }
}

/// The rows to come, of which every time over a block fetches a part.
struct Later<'a, T> {
    rows: &'a [&'a [T]],
    part: usize,
    /// There are at most `2^shift` parts.
    shift: u32,
}

impl<T> Later<'_, T> {
    /// Where the next part of each row's `columns` begins, or nothing where they do not all have them.
    #[inline(always)]
    fn next_part(&mut self, columns: &Range<usize>) -> Option<[*const u8; ROWS]> {
        let offset = ((columns.len() * size_of::<T>()) >> self.shift) * self.part;
        self.part += 1;
        let mut parts = [std::ptr::null(); ROWS];
        for (part, row) in parts.iter_mut().zip(self.rows) {
            *part = row.get(columns.start..)?.as_ptr().cast::<u8>().wrapping_add(offset);
        }
        if self.rows.len() == ROWS { Some(parts) } else { None }
    }
}

/// Of a block of columns every chunk that accumulator `k` takes: of `R` rows, the `first` and so on, with `D` directions.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - Rows and directions reach to the end of `columns`, which begin at a multiple of `UNROLL * LANES`.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "closures would be compiled without the wrapper's instructions"
)]
unsafe fn block<V, T, const R: usize, const D: usize>(
    rows: [*const T; R],
    first: usize,
    directions: [*const f32; D],
    columns: Range<usize>,
    k: usize,
    sums: &mut [[V; ROWS]],
    later: &mut Later<'_, T>,
) where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    assert!(sums.len() >= D && first + R <= ROWS);
    // SAFETY: `at + count <= columns.end` at every access.
    unsafe {
        let ahead = later.next_part(&columns);
        let mut own = [[V::splat(0.0); R]; D];
        for d in 0..D {
            for r in 0..R {
                own[d][r] = sums[d][first + r];
            }
        }
        // Columns from one chunk to the next, and from one line that is fetched to the next.
        let stride = UNROLL * V::LANES;
        let line = ((LINE << later.shift) / size_of::<T>()).max(stride);
        let mut at = columns.start + k * V::LANES;
        let mut turn = columns.start;
        while turn < columns.end {
            if let Some(ahead) = ahead {
                for r in 0..ROWS {
                    let fetched = ((turn - columns.start) * size_of::<T>()) >> later.shift;
                    V::prefetch_later(ahead[r].wrapping_add(fetched));
                }
            }
            turn = columns.end.min(turn + line);
            while at + V::LANES <= turn {
                add_chunk::<V, T, R, D>(rows, directions, at, V::LANES, &mut own);
                at += stride;
            }
        }
        if at < columns.end {
            add_chunk::<V, T, R, D>(rows, directions, at, columns.end - at, &mut own);
        }
        for d in 0..D {
            for r in 0..R {
                sums[d][first + r] = own[d][r];
            }
        }
    }
}

/// One chunk of `count` columns, of every row with every direction.
///
/// # Safety
/// As for [`block`], to `at + count`.
#[inline(always)]
unsafe fn add_chunk<V, T, const R: usize, const D: usize>(
    rows: [*const T; R],
    directions: [*const f32; D],
    at: usize,
    count: usize,
    sums: &mut [[V; R]; D],
) where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (mut x, mut y) = ([sums[0][0]; R], [sums[0][0]; D]);
    // SAFETY: passed on to the caller.
    unsafe {
        // What there is less of stays in registers.
        if D > R {
            for r in 0..R {
                x[r] = load_part::<V, T>(rows[r].add(at), count);
            }
            for d in 0..D {
                let y = load_part::<V, f32>(directions[d].add(at), count);
                for r in 0..R {
                    sums[d][r] = x[r].multiply_add(y, sums[d][r]);
                }
            }
        } else {
            for d in 0..D {
                y[d] = load_part::<V, f32>(directions[d].add(at), count);
            }
            for r in 0..R {
                let x = load_part::<V, T>(rows[r].add(at), count);
                for d in 0..D {
                    sums[d][r] = x.multiply_add(y[d], sums[d][r]);
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
    let fetch = if R == SIDE_BY_SIDE { Fetch::Soon } else { Fetch::Nothing };
    let (found, _) = unsafe { tile::<V, T, R, D, false>(h, u, rows[0].len(), fetch) };
    for r in 0..R {
        for d in 0..D {
            out[r * directions.len() + first + d] = found[r][d];
        }
    }
}
