//! A frozen weight as products on the CPU read it, in the precision of the workbench.

use super::Frozen;
use super::frozen::Weight;
use crate::model::pass::{Place, Workbench, plain};
use crate::model::product::{Elements, Matrix};
use crate::model::vector::narrow;
use anyhow::{Result, bail};
use half::bf16;
use std::ops::Range;

impl Frozen {
    /// Hands over the weight in f32, decoded into a buffer where no decoded copy is kept.
    pub fn with_full(&self, bench: &Workbench, f: impl FnOnce(Matrix<'_>) -> Result<()>) -> Result<()> {
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

    /// Writes `outs` and `ins` of the weight in bf16 into rows of `stride` values; what stands behind them there stays.
    pub fn write(&self, outs: Range<usize>, ins: Range<usize>, to: &mut [bf16], stride: usize) -> Result<()> {
        if let Some(halves) = self.halves() {
            let width = self.dims().1;
            for (to, out) in to.chunks_mut(stride).zip(outs) {
                to[..ins.len()].copy_from_slice(&halves[out * width..][ins.clone()]);
            }
            return Ok(());
        }
        match self.stored() {
            Weight::Quantized { nf4, .. } => nf4.decode_piece(outs, ins, to, stride),
            Weight::Full(weight) => {
                let weight = Elements::of(weight);
                let weight = weight.matrix(&[])?;
                for (to, out) in to.chunks_mut(stride).zip(outs) {
                    narrow(&weight.line(out)[ins.clone()], &mut to[..ins.len()]);
                }
            }
            Weight::Placed(_) => bail!("the weight is on a GPU"),
        }
        Ok(())
    }

    /// `x W^T` in bf16, of row-major rows.
    pub(super) fn product_in_bf16(&self, bench: &Workbench, x: &[f32]) -> Result<Vec<f32>> {
        let (out, inp) = self.dims();
        let rows = bench.rows_of(x, inp);
        let mut y = vec![0f32; rows.count() * out];
        let to = Place { to: &mut y, stride: out };
        match self.halves() {
            Some(halves) => bench.multiply_kept(to, &plain(&rows), halves)?,
            None => bench.multiply_turned(to, &plain(&rows), |outs, to| self.write(outs, 0..inp, to, inp))?,
        }
        bench.release(rows);
        Ok(y)
    }
}
