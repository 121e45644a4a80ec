//! Rows of activations in the precision of the products, and the buffers they live in.

use crate::accelerator::Accelerator;
use crate::model::product::{self, Matrix, Threads};
use crate::model::vector::{narrow, widen};
use crate::recipe::Compute;
use anyhow::Result;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Row-major values that products read.
///
/// Behind each row may be room for what an adapter makes of it: a row and its room are one operand of a product in bf16.
pub struct Rows {
    values: Values,
    width: usize,
    room: usize,
}

enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Rows {
    /// Rows in bf16 without room.
    pub(super) fn of_halves(values: Vec<bf16>, width: usize) -> Rows {
        Rows { values: Values::Bf16(values), width, room: 0 }
    }

    /// Values per row, without the room.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Values behind each row.
    pub fn room(&self) -> usize {
        self.room
    }

    fn stride(&self) -> usize {
        self.width + self.room
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        let len = match &self.values {
            Values::F32(v) => v.len(),
            Values::Bf16(v) => v.len(),
        };
        len / self.stride()
    }

    /// A row as f32; `scratch` takes it where it is not.
    pub fn read<'a>(&'a self, row: usize, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        let range = row * self.stride()..row * self.stride() + self.width;
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
    floats: Idle<f32>,
    halves: Idle<bf16>,
}

/// Buffers that nobody uses.
type Idle<T> = Mutex<Vec<Vec<T>>>;

/// A buffer of `len` values with whatever they were: the smallest idle one that holds them, or a new one in place of
/// the largest that does not, so that batches of other sizes do not pile up.
fn take<T: Copy + Default>(idle: &Idle<T>, len: usize) -> Vec<T> {
    let mut idle = idle.lock().unwrap_or_else(PoisonError::into_inner);
    let fits = (0..idle.len()).filter(|&i| (len..=2 * len).contains(&idle[i].capacity()));
    // The last of several: it is the one most likely to be in the cache.
    let mut buffer = match fits.rev().min_by_key(|&i| idle[i].capacity()) {
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

/// One side of a product: lines and columns of rows, or their transpose.
#[derive(Clone)]
pub struct Side<'a> {
    rows: &'a Rows,
    lines: Range<usize>,
    columns: Range<usize>,
    turned: bool,
}

/// The rows as they are.
pub fn plain(rows: &Rows) -> Side<'_> {
    Side { rows, lines: 0..rows.count(), columns: 0..rows.width, turned: false }
}

impl<'a> Side<'a> {
    /// The rows with what stands in their room.
    pub fn whole(rows: &'a Rows) -> Self {
        Side { columns: 0..rows.stride(), ..plain(rows) }
    }

    /// Some of the rows.
    pub fn lines(self, lines: Range<usize>) -> Self {
        Side { lines, ..self }
    }

    /// Some of the columns.
    pub fn columns(self, columns: Range<usize>) -> Self {
        Side { columns, ..self }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Side { turned: !self.turned, ..self }
    }

    fn matrix<T: Copy>(&self, values: &'a [T]) -> Matrix<'a, T> {
        let stride = self.rows.stride();
        let first = &values[self.lines.start * stride + self.columns.start..];
        let matrix = Matrix::new(first, (self.lines.len(), self.columns.len()), (stride, 1));
        if self.turned { matrix.t() } else { matrix }
    }
}

/// Where a product goes: columns of row-major values, from the first of the slice on, their rows `stride` apart.
pub struct Place<'a, T = f32> {
    /// The values.
    pub to: &'a mut [T],
    /// Distance of rows.
    pub stride: usize,
}

impl Workbench {
    /// For products in f32 or, where oneDNN is found, in bf16.
    pub fn new(compute: Compute) -> Result<Self> {
        let accelerator = match compute {
            Compute::F32 => None,
            Compute::Bf16 => Some(Accelerator::find()?),
        };
        Ok(Workbench { accelerator, floats: Idle::default(), halves: Idle::default() })
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
            self.floats.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
        }
    }

    /// As [`Workbench::done`].
    pub fn done_halves(&self, buffer: Vec<bf16>) {
        self.halves.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
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
            return Rows { values: Values::F32(values), width, room: 0 };
        }
        let rows = self.rows_of(&values, width);
        self.done(values);
        rows
    }

    /// A copy of values as products read them.
    pub fn rows_of(&self, values: &[f32], width: usize) -> Rows {
        if self.accelerator.is_none() {
            let mut copy = self.floats(values.len());
            copy.copy_from_slice(values);
            return Rows { values: Values::F32(copy), width, room: 0 };
        }
        let mut halves = self.halves(values.len());
        narrow_all(values, &mut halves);
        Rows::of_halves(halves, width)
    }

    /// Fresh rows, each filled by `f(row, values)`, with zeros in their `room`; products in f32 need none and get none.
    pub fn fill(
        &self,
        count: usize,
        (width, room): (usize, usize),
        f: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Rows {
        if self.accelerator.is_none() {
            let mut values = self.floats(count * width);
            by_rows(&mut values, width, f);
            return Rows { values: Values::F32(values), width, room: 0 };
        }
        let stride = width + room;
        let mut halves = self.halves(count * stride);
        let rows = rows_per_task(stride);
        halves.par_chunks_mut(rows * stride).enumerate().for_each(|(task, block)| {
            let mut scratch = vec![0f32; width];
            for (i, to) in block.chunks_mut(stride).enumerate() {
                f(task * rows + i, &mut scratch);
                narrow(&scratch, &mut to[..width]);
                to[width..].fill(bf16::ZERO);
            }
        });
        Rows { values: Values::Bf16(halves), width, room }
    }

    /// Fresh rows in bf16, without room, that `f` fills; the accelerator must be there.
    pub fn halves_by(
        &self,
        count: usize,
        width: usize,
        f: impl FnOnce(&mut [bf16]) -> Result<()>,
    ) -> Result<Rows> {
        let mut halves = self.halves(count * width);
        f(&mut halves)?;
        Ok(Rows::of_halves(halves, width))
    }

    /// Copies `low` into the room of rows in bf16.
    pub fn put(&self, rows: &mut Rows, low: &Rows) {
        let (width, stride) = (rows.width, rows.stride());
        if let (Values::Bf16(to), Values::Bf16(low)) = (&mut rows.values, &low.values) {
            let room = stride - width;
            to.chunks_mut(stride)
                .zip(low.chunks(room))
                .for_each(|(to, low)| to[width..].copy_from_slice(low));
        }
    }

    /// The transposed rows, without room.
    pub fn transposed(&self, rows: &Rows) -> Rows {
        debug_assert_eq!(rows.room, 0);
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
        Rows { values, width: count, room: 0 }
    }

    /// `to = lhs rhs` or, with `add`, `to += lhs rhs`.
    pub fn multiply(
        &self,
        to: Place<'_>,
        add: bool,
        lhs: &Side<'_>,
        rhs: &Side<'_>,
        threads: Threads,
    ) -> Result<()> {
        match (&lhs.rows.values, &rhs.rows.values, &self.accelerator) {
            (Values::F32(a), Values::F32(b), _) => {
                product::product_into(to.to, to.stride, add, lhs.matrix(a), rhs.matrix(b), threads);
                Ok(())
            }
            (Values::Bf16(a), Values::Bf16(b), Some(accelerator)) => {
                accelerator.product(to.to, to.stride, add, lhs.matrix(a), rhs.matrix(b), threads)
            }
            _ => anyhow::bail!("a product of f32 and bf16 rows"),
        }
    }

    /// The same with a weight in f32.
    pub fn multiply_f32(&self, to: Place<'_>, add: bool, lhs: &Side<'_>, rhs: Matrix<'_>) -> Result<()> {
        let Values::F32(a) = &lhs.rows.values else { anyhow::bail!("f32 rows are needed") };
        product::product_into(to.to, to.stride, add, lhs.matrix(a), rhs, Threads::All);
        Ok(())
    }

    /// The accelerator, and a side as it reads it.
    pub(super) fn in_bf16<'a>(&self, side: &Side<'a>) -> Result<(&Arc<Accelerator>, Matrix<'a, bf16>)> {
        match (&side.rows.values, &self.accelerator) {
            (Values::Bf16(values), Some(accelerator)) => Ok((accelerator, side.matrix(values))),
            _ => anyhow::bail!("bf16 rows and an accelerator are needed"),
        }
    }
}

/// Elements per parallel task: below this a thread hand-over costs more than the arithmetic.
const GRAIN: usize = 16 * 1024;

/// Rounds to bf16, in parallel.
pub fn narrow_all(from: &[f32], to: &mut [bf16]) {
    to.par_chunks_mut(GRAIN).zip(from.par_chunks(GRAIN)).for_each(|(to, from)| narrow(from, to));
}

/// Rows of this width that one task takes.
pub(super) fn rows_per_task(width: usize) -> usize {
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
