//! Rows by columns, and products in bf16 piece by piece: what a thread decodes of a weight, and multiplies next, stays in
//! its cache. Pieces have no gaps between their rows: oneDNN 2.6 multiplies matrix tiles fast only where there are none.

use super::bench::{Place, Rows, Side, Workbench, by_rows, plain, rows_per_task};
use crate::accelerator::{Columns, Sum};
use crate::model::product::{Matrix, Threads};
use crate::model::vector::narrow;
use anyhow::Result;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of which some columns each stand by themselves.
pub struct Pieces(Vec<(Range<usize>, Rows)>);

impl Pieces {
    /// Number of rows.
    pub fn count(&self) -> usize {
        self.0.first().map_or(0, |(_, rows)| rows.count())
    }

    /// Each with the columns that it has.
    pub fn iter(&self) -> impl Iterator<Item = (&Range<usize>, &Rows)> {
        self.0.iter().map(|(columns, rows)| (columns, rows))
    }

    /// What lies in `columns`, counted from the first of them.
    pub fn within(&self, columns: &Range<usize>) -> impl Iterator<Item = (Range<usize>, Side<'_>)> {
        self.iter().filter_map(move |(here, rows)| {
            let (start, end) = (here.start.max(columns.start), here.end.min(columns.end));
            let side = || plain(rows).columns(start - here.start..end - here.start);
            (start < end).then(|| (start - columns.start..end - columns.start, side()))
        })
    }
}

impl Workbench {
    /// Fresh rows, each filled by `f(row, values)`: in bf16 divided into `columns`, which follow each other from 0 on; in
    /// f32, where gaps cost nothing, one piece.
    pub fn fill_pieces(
        &self,
        count: usize,
        columns: Vec<Range<usize>>,
        f: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Pieces {
        let width = columns.last().map_or(0, |last| last.end);
        if self.accelerator().is_none() {
            return Pieces(vec![(0..width, self.fill(count, (width, 0), f))]);
        }
        let mut buffers: Vec<_> = columns.iter().map(|columns| self.halves(count * columns.len())).collect();
        let rows = rows_per_task(width);
        let mut tasks: Vec<Vec<&mut [bf16]>> = (0..count.div_ceil(rows)).map(|_| Vec::new()).collect();
        for (buffer, columns) in buffers.iter_mut().zip(&columns) {
            for (task, block) in tasks.iter_mut().zip(buffer.chunks_mut(rows * columns.len())) {
                task.push(block);
            }
        }
        tasks.into_par_iter().enumerate().for_each(|(task, mut blocks)| {
            let mut scratch = vec![0f32; width];
            for row in task * rows..((task + 1) * rows).min(count) {
                f(row, &mut scratch);
                for (block, columns) in blocks.iter_mut().zip(&columns) {
                    let (to, rest) = std::mem::take(block).split_at_mut(columns.len());
                    narrow(&scratch[columns.clone()], to);
                    *block = rest;
                }
            }
        });
        let rows =
            columns.iter().zip(buffers).map(|(columns, values)| Rows::of_halves(values, columns.len()));
        Pieces(columns.iter().cloned().zip(rows).collect())
    }

    /// Values that `f` changes row by row, as [`Workbench::fill_pieces`] gives them.
    pub fn pieces(
        &self,
        mut values: Vec<f32>,
        columns: Vec<Range<usize>>,
        f: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Pieces {
        let width = columns.last().map_or(0, |last| last.end);
        if self.accelerator().is_none() {
            by_rows(&mut values, width, f);
            return Pieces(vec![(0..width, self.rows(values, width))]);
        }
        let pieces = self.fill_pieces(values.len() / width, columns, |row, to| {
            to.copy_from_slice(&values[row * width..][..width]);
            f(row, to);
        });
        self.done(values);
        pieces
    }

    /// Runs `f` on each of some pieces: in bf16 side by side, each on its thread, for parts of a piece have gaps; in f32 one
    /// after the other, each on all threads.
    pub fn on_threads<I: Send, O: Send>(
        &self,
        work: Vec<I>,
        f: impl Fn(I, Threads) -> Result<O> + Sync,
    ) -> Result<Vec<O>> {
        match self.accelerator() {
            None => work.into_iter().map(|piece| f(piece, Threads::All)).collect(),
            Some(_) => work.into_par_iter().map(|piece| f(piece, Threads::One)).collect(),
        }
    }

    /// Takes pieces back.
    pub fn release_pieces(&self, pieces: Pieces) {
        pieces.0.into_iter().for_each(|(_, rows)| self.release(rows));
    }

    /// `to = lhs rhs^T` in bf16: `write(lines, values)` gives lines of `rhs` when they are needed, to the thread that
    /// multiplies them.
    pub fn multiply_turned<T: Pooled>(
        &self,
        to: Place<'_, T>,
        lhs: &Side<'_>,
        write: impl Fn(Range<usize>, &mut [bf16]) -> Result<()> + Sync,
    ) -> Result<()> {
        let (accelerator, lhs) = self.in_bf16(lhs)?;
        let (rows, depth) = lhs.dims();
        let pieces = split(to.stride, PIECE / depth, rayon::current_num_threads());
        accelerator.by_columns(to.to, (rows, to.stride), &pieces, |piece, mut columns| {
            let mut values = self.halves(piece.len() * depth);
            write(piece.clone(), &mut values)?;
            self.put_product(&mut columns, (lhs, piece.len() < to.stride), &values, depth)?;
            self.done_halves(values);
            Ok(())
        })
    }

    /// The same with an `rhs` that lies in memory in bf16.
    pub fn multiply_kept<T: Pooled>(&self, to: Place<'_, T>, lhs: &Side<'_>, rhs: &[bf16]) -> Result<()> {
        let (accelerator, lhs) = self.in_bf16(lhs)?;
        let (rows, depth) = lhs.dims();
        let pieces = split(to.stride, to.stride, rayon::current_num_threads());
        accelerator.by_columns(to.to, (rows, to.stride), &pieces, |piece, mut columns| {
            let values = &rhs[piece.start * depth..piece.end * depth];
            self.put_product(&mut columns, (lhs, piece.len() < to.stride), values, depth)
        })
    }

    /// `lhs rhs^T` as some columns of a result, or as all.
    fn put_product<T: Pooled>(
        &self,
        columns: &mut Columns<'_, T>,
        (lhs, some): (Matrix<'_, bf16>, bool),
        rhs: &[bf16],
        depth: usize,
    ) -> Result<()> {
        let count = rhs.len() / depth;
        let rhs = Matrix::new(rhs, (count, depth), (depth, 1)).t();
        if !some || !columns.wants_dense() {
            return columns.add(lhs, rhs);
        }
        let mut dense = T::take(self, lhs.dims().0 * count);
        columns.add_in(&mut dense, true, lhs, rhs)?;
        T::give(self, dense);
        Ok(())
    }

    /// `to = lhs rhs` in bf16, `lhs` being pieces that follow each other: `write(lines, columns, values)` gives a part of
    /// `rhs` when it is needed, to the thread that multiplies it.
    pub fn multiply_plain(
        &self,
        to: Place<'_>,
        lhs: &[(Range<usize>, &Rows)],
        write: impl Fn(Range<usize>, Range<usize>, &mut [bf16]) -> Result<()> + Sync,
    ) -> Result<()> {
        let sides: Vec<_> = lhs.iter().map(|(_, rows)| plain(rows)).collect();
        let sides = sides.iter().map(|side| self.in_bf16(side)).collect::<Result<Vec<_>>>()?;
        let Some(&(accelerator, first)) = sides.first() else { return Ok(()) };
        let count = first.dims().0;
        let pieces = split(to.stride, WIDE, rayon::current_num_threads());
        accelerator.by_columns(to.to, (count, to.stride), &pieces, |columns, mut sum| {
            let through = accelerator.wants_dense() && columns.len() < to.stride;
            let mut dense = self.floats(if through { count * columns.len() } else { 0 });
            for (at, ((lines, _), (_, lhs))) in lhs.iter().zip(&sides).enumerate() {
                let mut values = self.halves(lines.len() * columns.len());
                write(lines.clone(), columns.clone(), &mut values)?;
                let rhs = Matrix::new(&values, (lines.len(), columns.len()), (columns.len(), 1));
                match through {
                    true => sum.add_in(&mut dense, at + 1 == sides.len(), *lhs, rhs)?,
                    false => sum.add(*lhs, rhs)?,
                }
                self.done_halves(values);
            }
            self.done(dense);
            Ok(())
        })
    }
}

/// Values that a workbench keeps buffers of.
pub trait Pooled: Sum {
    /// A buffer with values left over.
    fn take(bench: &Workbench, len: usize) -> Vec<Self>;
    /// Gives it back.
    fn give(bench: &Workbench, buffer: Vec<Self>);
}

impl Pooled for f32 {
    fn take(bench: &Workbench, len: usize) -> Vec<f32> {
        bench.floats(len)
    }

    fn give(bench: &Workbench, buffer: Vec<f32>) {
        bench.done(buffer);
    }
}

impl Pooled for bf16 {
    fn take(bench: &Workbench, len: usize) -> Vec<bf16> {
        bench.halves(len)
    }

    fn give(bench: &Workbench, buffer: Vec<bf16>) {
        bench.done_halves(buffer);
    }
}

/// Values of a weight that a thread turns to bf16 at a time: 768 KiB stay in its cache until they are multiplied, and a
/// copy of the whole model is never held.
pub const PIECE: usize = 384 << 10;
/// Bytes of such a piece.
pub const PIECE_BYTES: usize = PIECE * size_of::<bf16>();
/// Most columns of a result that a thread adds up at a time.
pub const WIDE: usize = 512;

/// Pieces of rows that no weight is decoded for.
pub fn pieces_of_rows(width: usize) -> Vec<Range<usize>> {
    split(width, 2 * WIDE, rayon::current_num_threads())
}

/// Equal parts of `0..whole` of at most about `most`, as many as are a multiple of `threads`.
pub fn split(whole: usize, most: usize, threads: usize) -> Vec<Range<usize>> {
    /// Parts begin at multiples of this.
    const ROUND: usize = 32;
    let count = whole.div_ceil(most.max(ROUND)).next_multiple_of(threads);
    let step = whole.div_ceil(count).next_multiple_of(ROUND);
    (0..whole).step_by(step).map(|start| start..(start + step).min(whole)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::vector::to_bf16;
    use crate::random::uniform;
    use crate::recipe::Compute;
    use std::io::Write;

    /// Deeper and wider than one piece, on one thread and on several, against sums in f64 of the same bf16 values. Sums
    /// in f32 of n terms are off by at most n roundings of 2^-24 of the terms' sizes, and a result in bf16, which has 8
    /// bits, by one of 2^-8.
    #[test]
    fn products_by_pieces_are_products() {
        let bench = match Workbench::new(Compute::Bf16) {
            Ok(bench) => bench,
            Err(error) => {
                writeln!(std::io::stderr(), "\nskipped: products by pieces in bf16: {error:#}").unwrap();
                return;
            }
        };
        let number = |seed: u64, i: usize| (uniform(&[seed, i as u64]) * 2.0 - 1.0) as f32;
        for (rows, depth, wide) in [(70, 3000, 300), (33, 1700, 576), (9, 40, 24)] {
            let x = bench.fill(rows, (depth, 0), |row, x| {
                x.iter_mut().enumerate().for_each(|(i, x)| *x = number(1, row * depth + i));
            });
            let pieces = bench.fill_pieces(rows, split(depth, 700, 1), |row, to| {
                to.copy_from_slice(x.read(row, &mut Vec::new()));
            });
            let in_pieces: Vec<_> = pieces.iter().map(|(columns, rows)| (columns.clone(), rows)).collect();
            let weight = |line: usize, column: usize| to_bf16(number(2, line * wide + column));
            let mut scratch = Vec::new();
            let x_values: Vec<f32> = (0..rows).flat_map(|row| x.read(row, &mut scratch).to_vec()).collect();
            let w_values: Vec<f32> = (0..depth * wide).map(|i| weight(i / wide, i % wide).to_f32()).collect();
            let sum = |row: usize, column: usize, f: fn(f64) -> f64| -> f64 {
                let line = x_values[row * depth..][..depth].iter();
                line.zip(w_values[column..].iter().step_by(wide))
                    .map(|(x, w)| f(f64::from(*x) * f64::from(*w)))
                    .sum()
            };
            for threads in [1, 2, 3] {
                let (mut plainly, mut turned) = (vec![7f32; rows * wide], vec![7f32; rows * wide]);
                let mut rounded = vec![bf16::ONE; rows * wide];
                let by_lines = |lines: Range<usize>, columns: Range<usize>, to: &mut [bf16]| {
                    for (to, line) in to.chunks_mut(columns.len()).zip(lines) {
                        to.iter_mut()
                            .zip(columns.clone())
                            .for_each(|(to, column)| *to = weight(line, column));
                    }
                    Ok(())
                };
                let by_columns = |columns: Range<usize>, to: &mut [bf16]| {
                    for (to, column) in to.chunks_mut(depth).zip(columns) {
                        to.iter_mut().enumerate().for_each(|(line, to)| *to = weight(line, column));
                    }
                    Ok(())
                };
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    bench
                        .multiply_plain(Place { to: &mut plainly, stride: wide }, &in_pieces, by_lines)
                        .unwrap();
                    bench
                        .multiply_turned(Place { to: &mut turned, stride: wide }, &plain(&x), by_columns)
                        .unwrap();
                    bench
                        .multiply_turned(Place { to: &mut rounded, stride: wide }, &plain(&x), by_columns)
                        .unwrap();
                });
                for i in 0..rows * wide {
                    let (exact, size) = (sum(i / wide, i % wide, |v| v), sum(i / wide, i % wide, f64::abs));
                    let allowed = depth as f64 * 2f64.powi(-24) * size;
                    for found in [plainly[i], turned[i]] {
                        assert!(
                            (f64::from(found) - exact).abs() <= allowed,
                            "{threads} threads: {found} for {exact}"
                        );
                    }
                    let short = rounded[i].to_f64();
                    assert!(
                        (short - exact).abs() <= allowed + 2f64.powi(-8) * (exact.abs() + allowed),
                        "{short} for {exact}"
                    );
                }
            }
        }
    }

    #[test]
    fn parts_are_all_of_it_and_as_many_as_threads_need() {
        for (whole, most, threads) in
            [(3072, 600, 2), (576, 512, 2), (1536, 512, 3), (40, 512, 2), (1, 1, 4), (151_936, 256, 16)]
        {
            let parts = split(whole, most, threads);
            assert_eq!(parts.iter().cloned().flatten().collect::<Vec<_>>(), (0..whole).collect::<Vec<_>>());
            assert!(parts.iter().all(|part| part.len() <= most.next_multiple_of(32) && part.start % 32 == 0));
            assert!(
                parts.len() >= threads.min(whole.div_ceil(32)) || whole.div_ceil(parts.len()) <= 64,
                "{parts:?}"
            );
        }
    }
}
