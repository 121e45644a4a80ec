//! Products of which each thread computes some columns, with what it writes of the right side itself.

use super::{Accelerator, Place, Sum};
use crate::model::product::Matrix;
use anyhow::Result;
use half::bf16;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

impl Accelerator {
    /// Whether products by matrix tiles are fast for results without gaps alone.
    pub fn wants_dense(&self) -> bool {
        self.tiles
    }

    /// Runs `f` for each of `pieces` of the columns of a result, on all threads of the pool; `f` gets the piece, and what
    /// adds products to it.
    ///
    /// # Panics
    /// If pieces overlap or do not fit into `dst`.
    pub fn by_columns<T: Sum>(
        &self,
        dst: &mut [T],
        (rows, row_stride): (usize, usize),
        pieces: &[Range<usize>],
        f: impl Fn(&Range<usize>, Columns<'_, T>) -> Result<()> + Sync,
    ) -> Result<()> {
        let ordered = pieces.windows(2).all(|pair| pair[0].end <= pair[1].start);
        let inside = pieces.iter().all(|piece| piece.start <= piece.end && piece.end <= row_stride);
        assert!(ordered && inside && rows * row_stride <= dst.len(), "pieces of a result");
        let place = Place(dst.as_mut_ptr());
        pieces.par_iter().try_for_each(|piece| {
            let columns = Columns {
                accelerator: self,
                dst: place.at(piece.start),
                dims: (rows, piece.len()),
                row_stride,
                begun: false,
                here: PhantomData,
            };
            f(piece, columns)
        })
    }
}

/// Columns of a result, which one thread computes.
pub struct Columns<'a, T> {
    accelerator: &'a Accelerator,
    /// Of `dims` values, in rows `row_stride` apart, which nobody else touches while this lives.
    dst: *mut T,
    dims: (usize, usize),
    row_stride: usize,
    begun: bool,
    here: PhantomData<&'a mut T>,
}

impl<T: Sum> Columns<'_, T> {
    /// As [`Accelerator::wants_dense`].
    pub fn wants_dense(&self) -> bool {
        self.accelerator.wants_dense()
    }

    /// Adds `lhs rhs` to the products before; the first one takes the place of what was there.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn add(&mut self, lhs: Matrix<'_, bf16>, rhs: Matrix<'_, bf16>) -> Result<()> {
        let ((m, k), (depth, n)) = (lhs.dims(), rhs.dims());
        assert!(k == depth && (m, n) == self.dims, "shapes of a matrix product");
        let add = std::mem::replace(&mut self.begun, true);
        // SAFETY: `by_columns` has checked that the columns lie inside the result, and gives them to nobody else.
        unsafe { self.accelerator.part(self.dst, self.row_stride, add, lhs, rhs) }
    }

    /// The same by way of `dense`, which has room for the columns and no gaps: products are added up there, and with
    /// `last` copied to their place.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn add_in(
        &mut self,
        dense: &mut [T],
        last: bool,
        lhs: Matrix<'_, bf16>,
        rhs: Matrix<'_, bf16>,
    ) -> Result<()> {
        let ((m, k), (depth, n)) = (lhs.dims(), rhs.dims());
        assert!(k == depth && (m, n) == self.dims && dense.len() == m * n, "shapes of a matrix product");
        let add = std::mem::replace(&mut self.begun, true);
        // SAFETY: `dense` is a borrowed slice of all values of the result.
        unsafe { self.accelerator.part(dense.as_mut_ptr(), n, add, lhs, rhs)? };
        for (i, row) in dense.chunks(n).enumerate().filter(|_| last) {
            // SAFETY: as for `add`; the slice is another one than the result.
            unsafe { self.dst.add(i * self.row_stride).copy_from_nonoverlapping(row.as_ptr(), n) };
        }
        Ok(())
    }
}
