//! Edits in place, once for all vectors, like `generic`.

use super::generic::{Ahead, GROUP, Memory, UNROLL};
use crate::activations::Element;
use std::ops::Range;

/// `row_i <- round(row_i - c * direction_i)`.
///
/// # Safety
/// As for [`super::generic::reduce`].
#[inline(always)]
pub(super) unsafe fn edit<V, T>(row: &mut [T], direction: &[f32], c: f32)
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (width, h, u) = (row.len(), row.as_mut_ptr(), direction.as_ptr());
    // SAFETY: `at + count <= width` at every access.
    unsafe {
        let factor = V::splat(c);
        let mut at = 0;
        while at + UNROLL * V::LANES <= width {
            for k in 0..UNROLL / 2 {
                let (first, second) = (at + 2 * k * V::LANES, at + (2 * k + 1) * V::LANES);
                let (x, y) = <V as Memory<T>>::load_pair(h.add(first));
                let x = x.subtract_scaled(factor, <V as Memory<f32>>::load(u.add(first)));
                let y = y.subtract_scaled(factor, <V as Memory<f32>>::load(u.add(second)));
                <V as Memory<T>>::store_pair(x, y, h.add(first));
            }
            at += UNROLL * V::LANES;
        }
        edit_last::<V, T>(h, u, factor, at..width);
    }
}

/// [`edit`] of some rows, each with its `c`. With `NORMAL` every difference is 0 or a normal f32.
///
/// # Safety
/// As for [`super::generic::reduce`], for all rows.
#[inline(always)]
pub(super) unsafe fn edit_group<V, T, const NORMAL: bool>(
    rows: [&mut [T]; GROUP],
    direction: &[f32],
    c: [f32; GROUP],
    ahead: [Ahead; GROUP],
) where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let h = rows.map(<[T]>::as_mut_ptr);
    // SAFETY: passed on to the caller.
    unsafe {
        if V::REGISTERS >= 32 && c.iter().all(|other| other.to_bits() == c[0].to_bits()) {
            return edit_beside::<V, T, GROUP, NORMAL, true>(h, direction, c, ahead);
        }
        // All side by side where nothing is converted, which takes registers and time of its own.
        if V::REGISTERS >= 32 && size_of::<T>() == size_of::<f32>() {
            return edit_beside::<V, T, GROUP, NORMAL, false>(h, direction, c, ahead);
        }
        for k in [0, 2] {
            let (h, c, ahead) = ([h[k], h[k + 1]], [c[k], c[k + 1]], [ahead[k], ahead[k + 1]]);
            edit_beside::<V, T, 2, NORMAL, false>(h, direction, c, ahead);
        }
    }
}

/// `R` rows side by side, the direction read once for all, and with `SAME`, where all factors are equal, multiplied once.
///
/// # Safety
/// As for [`edit_group`].
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "closures would be compiled without the wrapper's instructions"
)]
unsafe fn edit_beside<V, T, const R: usize, const NORMAL: bool, const SAME: bool>(
    h: [*mut T; R],
    direction: &[f32],
    c: [f32; R],
    ahead: [Ahead; R],
) where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (width, u) = (direction.len(), direction.as_ptr());
    // SAFETY: `at + count <= width` at every access.
    unsafe {
        let mut factors = [V::splat(0.0); R];
        for r in 0..R {
            factors[r] = V::splat(c[r]);
        }
        let mut at = 0;
        while at + UNROLL * V::LANES <= width {
            for r in 0..R {
                ahead[r].fetch::<V, T>(at);
            }
            for k in 0..UNROLL / 2 {
                let place = at + 2 * k * V::LANES;
                let (mut y, mut z) = <V as Memory<f32>>::load_pair(u.add(place));
                if SAME {
                    (y, z) = (factors[0].multiply(y), factors[0].multiply(z));
                }
                // All rows are loaded before one is stored: where they lie whole pages apart, a load would wait for the
                // store before it.
                let mut edited = [(y, z); R];
                for r in 0..R {
                    let (x, w) = <V as Memory<T>>::load_pair(h[r].add(place));
                    edited[r] = if SAME {
                        (x.subtract(y), w.subtract(z))
                    } else {
                        (x.subtract_scaled(factors[r], y), w.subtract_scaled(factors[r], z))
                    };
                }
                for r in 0..R {
                    let (x, w) = edited[r];
                    if NORMAL {
                        <V as Memory<T>>::store_normal_pair(x, w, h[r].add(place));
                    } else {
                        <V as Memory<T>>::store_pair(x, w, h[r].add(place));
                    }
                }
            }
            at += UNROLL * V::LANES;
        }
        for r in 0..R {
            edit_last::<V, T>(h[r], u, factors[r], at..width);
        }
    }
}

/// The last chunks of an edit.
///
/// # Safety
/// - The CPU has the instructions of `V`.
/// - Row and direction reach to the end of `columns`.
#[inline(always)]
unsafe fn edit_last<V, T>(h: *mut T, u: *const f32, factor: V, columns: Range<usize>)
where
    V: Memory<T> + Memory<f32>,
    T: Element,
{
    let (mut at, width) = (columns.start, columns.end);
    // SAFETY: `at + count <= width` at every access.
    unsafe {
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
