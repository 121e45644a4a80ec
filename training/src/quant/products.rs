//! Products of activations with a frozen weight on the CPU, in the precision of the workbench.

use super::Frozen;
use super::frozen::Weight;
use super::nf4::BLOCK;
use crate::model::pass::{Rows, Workbench};
use crate::model::product::{Elements, Matrix};
use crate::model::vector::narrow;
use anyhow::{Result, bail};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// Values of a weight that are turned to bf16 at a time: 4 MiB stay in the cache until they are multiplied, and a
/// copy of the whole model is never held.
const PIECE: usize = 2 << 20;
/// Bytes of such a piece.
pub const PIECE_BYTES: usize = PIECE * size_of::<bf16>();

impl Frozen {
    /// `y = x W^T`
    pub(crate) fn multiply(&self, bench: &Workbench, x: &Rows, y: &mut [f32]) -> Result<()> {
        let (out, inp) = self.dims();
        if bench.accelerator().is_none() {
            return self.with_full(bench, |weight| bench.multiply_f32(y, false, x, weight.t()));
        }
        for outs in pieces(out, inp) {
            let place = (out, outs.start);
            self.with_piece(bench, outs, 0..inp, |weight| {
                bench.multiply_piece(y, place, false, (x, 0..inp), weight.t())
            })?;
        }
        Ok(())
    }

    /// `dx = dy W` or, with `add`, `dx += dy W`
    pub(crate) fn multiply_back(
        &self,
        bench: &Workbench,
        dy: &Rows,
        dx: &mut [f32],
        add: bool,
    ) -> Result<()> {
        let (out, inp) = self.dims();
        if bench.accelerator().is_none() {
            return self.with_full(bench, |weight| bench.multiply_f32(dx, add, dy, weight));
        }
        if out >= inp || !inp.is_multiple_of(BLOCK) {
            for outs in pieces(out, inp) {
                let add = add || outs.start > 0;
                let columns = outs.clone();
                self.with_piece(bench, outs, 0..inp, |weight| {
                    bench.multiply_piece(dx, (inp, 0), add, (dy, columns), weight)
                })?;
            }
            return Ok(());
        }
        for ins in pieces(inp, out) {
            let place = (inp, ins.start);
            self.with_piece(bench, 0..out, ins, |weight| {
                bench.multiply_piece(dx, place, add, (dy, 0..out), weight)
            })?;
        }
        Ok(())
    }

    /// Hands over the weight in f32, decoded into a buffer where no decoded copy is kept.
    fn with_full(&self, bench: &Workbench, f: impl FnOnce(Matrix<'_>) -> Result<()>) -> Result<()> {
        if let Weight::Quantized { nf4, decoded: None, .. } = self.stored() {
            let mut buffer = bench.floats(nf4.rows * nf4.cols);
            nf4.decode(&mut buffer);
            f(Matrix::new(&buffer, (nf4.rows, nf4.cols), (nf4.cols, 1)))?;
            bench.done(buffer);
            return Ok(());
        }
        let weight = self.weight()?;
        f(Elements::of(&weight).matrix(&[])?)
    }

    /// Hands over `outs` and `ins` of the weight in bf16.
    fn with_piece(
        &self,
        bench: &Workbench,
        outs: Range<usize>,
        ins: Range<usize>,
        f: impl FnOnce(Matrix<'_, bf16>) -> Result<()>,
    ) -> Result<()> {
        let shape = (outs.len(), ins.len());
        let mut buffer = bench.halves(shape.0 * shape.1);
        match self.stored() {
            Weight::Quantized { nf4, .. } => nf4.decode_piece(outs, ins, &mut buffer),
            Weight::Full(weight) => rounded(Elements::of(weight).matrix(&[])?, outs, ins, &mut buffer),
            Weight::Placed(_) => bail!("the weight is on a GPU"),
        }
        f(Matrix::new(&buffer, shape, (shape.1, 1)))?;
        bench.done_halves(buffer);
        Ok(())
    }
}

/// Parts of `0..long` of which each, times `other`, has about [`PIECE`] values; they begin at multiples of 64.
fn pieces(long: usize, other: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (PIECE / other.max(1) / 64 * 64).max(64);
    (0..long).step_by(step).map(move |start| start..(start + step).min(long))
}

/// Rounds a piece of a row-major matrix to bf16.
fn rounded(weight: Matrix<'_>, outs: Range<usize>, ins: Range<usize>, to: &mut [bf16]) {
    to.par_chunks_mut(ins.len()).enumerate().for_each(|(i, to)| {
        narrow(&weight.line(outs.start + i)[ins.clone()], to);
    });
}
