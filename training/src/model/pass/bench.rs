//! Rows of activations in the precision of the products, and the buffers they live in.

use crate::accelerator::Accelerator;
use crate::model::product::{self, Matrix, Threads};
use crate::model::vector::{narrow, widen};
use crate::recipe::Compute;
use anyhow::Result;
use half::bf16;
use rayon::prelude::*;
use std::cell::RefCell;
use std::sync::Arc;

/// Row-major values that products read.
pub struct Rows {
    values: Values,
    width: usize,
}

enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Rows {
    /// Values per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        let len = match &self.values {
            Values::F32(v) => v.len(),
            Values::Bf16(v) => v.len(),
        };
        len / self.width
    }

    /// The rows from `first` on, as f32; `scratch` takes them where they are not.
    pub fn read<'a>(&'a self, first: usize, count: usize, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        let range = first * self.width..(first + count) * self.width;
        match &self.values {
            Values::F32(v) => &v[range],
            Values::Bf16(v) => {
                scratch.resize(range.len(), 0.0);
                widen(&v[range], scratch);
                scratch
            }
        }
    }
}

/// How products are computed, and buffers between two uses: fresh pages from the system cost as much as the
/// arithmetic that fills them.
pub struct Workbench {
    accelerator: Option<Arc<Accelerator>>,
    floats: RefCell<Vec<Vec<f32>>>,
    halves: RefCell<Vec<Vec<bf16>>>,
}

/// A buffer of `len` values with whatever they were: the smallest idle one that holds them, or a new one in place of
/// the largest that does not, so that batches of other sizes do not pile up.
fn take<T: Copy + Default>(idle: &RefCell<Vec<Vec<T>>>, len: usize) -> Vec<T> {
    let mut idle = idle.borrow_mut();
    let fits = (0..idle.len()).filter(|&i| (len..=2 * len).contains(&idle[i].capacity()));
    let mut buffer = match fits.min_by_key(|&i| idle[i].capacity()) {
        Some(i) => idle.swap_remove(i),
        None => {
            let small = (0..idle.len()).filter(|&i| idle[i].capacity() < len);
            if let Some(i) = small.max_by_key(|&i| idle[i].capacity()) {
                idle.swap_remove(i);
            }
            Vec::with_capacity(len)
        }
    };
    buffer.resize(len, T::default());
    buffer
}

/// One side of a product: rows, or their transpose.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    rows: &'a Rows,
    turned: bool,
}

/// The rows as they are.
pub fn plain(rows: &Rows) -> Side<'_> {
    Side { rows, turned: false }
}

/// Their transpose.
pub fn turned(rows: &Rows) -> Side<'_> {
    Side { rows, turned: true }
}

impl<'a> Side<'a> {
    fn matrix<T: Copy>(&self, values: &'a [T]) -> Matrix<'a, T> {
        let width = self.rows.width;
        let matrix = Matrix::new(values, (values.len() / width, width), (width, 1));
        if self.turned { matrix.t() } else { matrix }
    }
}

impl Workbench {
    /// For products in f32 or, where oneDNN is found, in bf16.
    pub fn new(compute: Compute) -> Result<Self> {
        let accelerator = match compute {
            Compute::F32 => None,
            Compute::Bf16 => Some(Accelerator::find()?),
        };
        Ok(Workbench { accelerator, floats: RefCell::default(), halves: RefCell::default() })
    }

    /// What multiplies bf16, where products are in bf16.
    pub fn accelerator(&self) -> Option<&Arc<Accelerator>> {
        self.accelerator.as_ref()
    }

    /// A buffer with values left over.
    pub fn floats(&self, len: usize) -> Vec<f32> {
        take(&self.floats, len)
    }

    /// As [`Workbench::floats`].
    pub fn halves(&self, len: usize) -> Vec<bf16> {
        take(&self.halves, len)
    }

    /// Takes a buffer back.
    pub fn done(&self, buffer: Vec<f32>) {
        if buffer.capacity() > 0 {
            self.floats.borrow_mut().push(buffer);
        }
    }

    /// As [`Workbench::done`].
    pub fn done_halves(&self, buffer: Vec<bf16>) {
        self.halves.borrow_mut().push(buffer);
    }

    /// Takes rows back.
    pub fn release(&self, rows: Rows) {
        match rows.values {
            Values::F32(v) => self.done(v),
            Values::Bf16(v) => self.done_halves(v),
        }
    }

    /// Values as products read them.
    pub fn rows(&self, values: Vec<f32>, width: usize) -> Rows {
        if self.accelerator.is_none() {
            return Rows { values: Values::F32(values), width };
        }
        let mut halves = self.halves(values.len());
        let (to, from) = (halves.par_chunks_mut(GRAIN), values.par_chunks(GRAIN));
        to.zip(from).for_each(|(to, from)| narrow(from, to));
        self.done(values);
        Rows { values: Values::Bf16(halves), width }
    }

    /// A copy in f32.
    pub fn copy(&self, rows: &Rows) -> Vec<f32> {
        let len = rows.count() * rows.width;
        let mut copy = self.floats(len);
        copy.par_chunks_mut(GRAIN).enumerate().for_each(|(i, to)| {
            let range = i * GRAIN..i * GRAIN + to.len();
            match &rows.values {
                Values::F32(v) => to.copy_from_slice(&v[range]),
                Values::Bf16(v) => widen(&v[range], to),
            }
        });
        copy
    }

    /// Fresh rows, each filled by `f(row, values)`.
    pub fn fill(&self, count: usize, width: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Rows {
        if self.accelerator.is_none() {
            let mut values = self.floats(count * width);
            by_rows(&mut values, width, f);
            return Rows { values: Values::F32(values), width };
        }
        let mut halves = self.halves(count * width);
        let rows = rows_per_task(width);
        halves.par_chunks_mut(rows * width).enumerate().for_each(|(task, block)| {
            let mut scratch = vec![0f32; width];
            for (i, to) in block.chunks_mut(width).enumerate() {
                f(task * rows + i, &mut scratch);
                narrow(&scratch, to);
            }
        });
        Rows { values: Values::Bf16(halves), width }
    }

    /// The transposed rows.
    fn transposed(&self, rows: &Rows) -> Rows {
        let (count, width) = (rows.count(), rows.width);
        let values = match &rows.values {
            Values::F32(v) => {
                let mut to = self.floats(v.len());
                transpose(v, width, &mut to);
                Values::F32(to)
            }
            Values::Bf16(v) => {
                let mut to = self.halves(v.len());
                transpose(v, width, &mut to);
                Values::Bf16(to)
            }
        };
        Rows { values, width: count }
    }

    /// `dst = lhs rhs` or, with `add`, `dst += lhs rhs`.
    pub fn multiply(&self, dst: &mut [f32], add: bool, lhs: Side<'_>, rhs: Side<'_>) -> Result<()> {
        match (&lhs.rows.values, &rhs.rows.values) {
            (Values::F32(a), Values::F32(b)) => {
                product::product(dst, add, lhs.matrix(a), rhs.matrix(b), Threads::All);
                Ok(())
            }
            (Values::Bf16(_), Values::Bf16(b)) if lhs.turned => {
                let copy = self.transposed(lhs.rows);
                let Values::Bf16(a) = &copy.values else { unreachable!("a copy is of the same kind") };
                let width = rhs.matrix(b).dims().1;
                self.multiply_bf16(dst, width, 0, add, plain(&copy).matrix(a), rhs.matrix(b))?;
                self.release(copy);
                Ok(())
            }
            (Values::Bf16(a), Values::Bf16(b)) => {
                let rhs = rhs.matrix(b);
                self.multiply_bf16(dst, rhs.dims().1, 0, add, lhs.matrix(a), rhs)
            }
            _ => anyhow::bail!("a product of f32 and bf16 rows"),
        }
    }

    /// The same with a weight: f32 as it is.
    pub fn multiply_f32(&self, dst: &mut [f32], add: bool, lhs: &Rows, rhs: Matrix<'_>) -> Result<()> {
        let Values::F32(a) = &lhs.values else { anyhow::bail!("f32 rows are needed") };
        product::product(dst, add, plain(lhs).matrix(a), rhs, Threads::All);
        Ok(())
    }

    /// The same with a piece of a weight in bf16: `columns` of the left side, and the columns of the result from
    /// `column` on, of `row_stride` in all.
    pub fn multiply_piece(
        &self,
        dst: &mut [f32],
        (row_stride, column): (usize, usize),
        add: bool,
        (lhs, columns): (&Rows, std::ops::Range<usize>),
        rhs: Matrix<'_, bf16>,
    ) -> Result<()> {
        let Values::Bf16(a) = &lhs.values else { anyhow::bail!("bf16 rows are needed") };
        let shape = (lhs.count(), columns.len());
        let lhs = Matrix::new(&a[columns.start..], shape, (lhs.width, 1));
        self.multiply_bf16(dst, row_stride, column, add, lhs, rhs)
    }

    /// Rows of the result are shared out among the threads.
    fn multiply_bf16(
        &self,
        dst: &mut [f32],
        row_stride: usize,
        column: usize,
        add: bool,
        lhs: Matrix<'_, bf16>,
        rhs: Matrix<'_, bf16>,
    ) -> Result<()> {
        let Some(accelerator) = &self.accelerator else { anyhow::bail!("no accelerator for bf16") };
        let rows = lhs.dims().0;
        let share = rows.div_ceil(rayon::current_num_threads()).next_multiple_of(16);
        dst.par_chunks_mut(share * row_stride).enumerate().try_for_each(|(i, dst)| {
            let lhs = lhs.rows(i * share, share.min(rows - i * share));
            accelerator.product(&mut dst[column..], row_stride, add, lhs, rhs)
        })
    }
}

/// Elements per parallel task: below this a thread hand-over costs more than the arithmetic.
const GRAIN: usize = 16 * 1024;

fn rows_per_task(width: usize) -> usize {
    (GRAIN / width.max(1)).max(1)
}

/// Runs `f(row, values)` over all rows, in parallel.
pub fn by_rows(values: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = rows_per_task(width);
    values.par_chunks_mut(rows * width).enumerate().for_each(|(task, block)| {
        block.chunks_mut(width).enumerate().for_each(|(i, row)| f(task * rows + i, row));
    });
}

/// Row-major `from` of `width` columns, column by column; in squares, so that both sides stay in the cache.
pub fn transpose<T: Copy + Send + Sync>(from: &[T], width: usize, to: &mut [T]) {
    const SQUARE: usize = 32;
    let count = from.len() / width;
    to.par_chunks_mut(SQUARE * count).enumerate().for_each(|(strip, to)| {
        for first in (0..count).step_by(SQUARE) {
            for (c, column) in to.chunks_mut(count).enumerate() {
                for r in first..(first + SQUARE).min(count) {
                    column[r] = from[r * width + strip * SQUARE + c];
                }
            }
        }
    });
}

/// As [`by_rows`], over two arrays of one shape.
pub fn by_pairs(
    a: &mut [f32],
    b: &mut [f32],
    width: usize,
    f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    let rows = rows_per_task(width);
    let blocks = a.par_chunks_mut(rows * width).zip(b.par_chunks_mut(rows * width));
    blocks.enumerate().for_each(|(task, (a, b))| {
        let both = a.chunks_mut(width).zip(b.chunks_mut(width));
        both.enumerate().for_each(|(i, (a, b))| f(task * rows + i, a, b));
    });
}
