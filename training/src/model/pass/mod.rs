//! Loss and gradients of a batch on the CPU, without a graph.
//!
//! The decoder's operations record every intermediate tensor when candle is to find the gradient. Here forward and
//! backward are written out, block by block: forward keeps what backward cannot form again cheaply, products run in
//! f32 or bf16, and buffers are used again. The formulas are those of the ops; tests hold the two against each other.

mod bench;
mod block;
mod head;
mod linear;
mod pieces;

pub use bench::{Place, Workbench, by_rows, narrow_all, plain};
pub use head::head_rows;
pub use linear::LoraGradient;
pub use pieces::PIECE_BYTES;

use super::Decoder;
use super::attention::Visibility;
use super::decoder::Pass;
use crate::lora::Adapter;
use anyhow::{Context, Result};
use block::{Kept, Work};
use candle_core::Tensor;
use std::sync::Arc;

/// A padded batch, and which of its rows predict which tokens.
pub struct Task<'a> {
    /// u32 `[batch, tokens]`.
    pub ids: &'a Tensor,
    /// Padding per row.
    pub left_pad: &'a Arc<[usize]>,
    /// Rows of `[batch * tokens]` that predict a target.
    pub rows: &'a [u32],
    /// The targets.
    pub targets: &'a [u32],
}

/// The gradients of every block's adapters, by module.
pub type Gradients = Vec<[Option<LoraGradient>; 7]>;

impl Decoder {
    fn work<'a>(
        &'a self,
        bench: &'a Workbench,
        pass: &'a Pass,
        layer: usize,
        adapter: Option<&'a Adapter>,
    ) -> Work<'a> {
        let loras = adapter.map(|a| a.block(layer));
        Work { bench, config: &self.config, block: &self.blocks[layer], layer, pass, loras }
    }

    fn begin(&self, bench: &Workbench, task: &Task<'_>) -> Result<(Pass, Vec<f32>)> {
        let visible = Visibility { shared: 0, left_pad: task.left_pad.clone(), offset: 0, window: None };
        let pass = self.pass(visible, task.ids.dim(1)?)?;
        let embedded = self.embed(task.ids)?.flatten_all()?.to_vec1::<f32>()?;
        let mut x = bench.floats(embedded.len());
        x.copy_from_slice(&embedded);
        Ok((pass, x))
    }

    /// The rows of the residual stream that predict a target.
    fn predicting(&self, bench: &Workbench, x: &[f32], task: &Task<'_>) -> Vec<f32> {
        let width = self.config.hidden_size;
        let mut rows = bench.floats(task.rows.len() * width);
        for (to, &row) in rows.chunks_mut(width).zip(task.rows) {
            to.copy_from_slice(&x[row as usize * width..][..width]);
        }
        rows
    }

    /// Mean cross-entropy (nats) over the targets.
    pub fn loss(&self, bench: &Workbench, task: &Task<'_>, adapter: Option<&Adapter>) -> Result<f64> {
        let (pass, mut x) = self.begin(bench, task)?;
        for layer in 0..self.blocks.len() {
            let (y, kept) = self.work(bench, &pass, layer, adapter).forward(x)?;
            bench.done(kept.into_input(bench));
            x = y;
        }
        let mut rows = self.predicting(bench, &x, task);
        bench.done(x);
        let loss = head::loss(bench, self, &mut rows, task.targets, None);
        bench.done(rows);
        loss
    }

    /// The same, and the gradient of `share` times it in the adapter. With `checkpointing` only the residual stream
    /// between blocks is kept, and each block runs again when backward comes to it (Chen et al. 2016).
    pub fn loss_and_gradients(
        &self,
        bench: &Workbench,
        task: &Task<'_>,
        adapter: &Adapter,
        share: f64,
        checkpointing: bool,
    ) -> Result<(f64, Gradients)> {
        enum Held {
            All(Box<Kept>),
            Input(Vec<f32>),
        }
        let (pass, mut x) = self.begin(bench, task)?;
        let mut held = Vec::with_capacity(self.blocks.len());
        for layer in 0..self.blocks.len() {
            let (y, kept) = self.work(bench, &pass, layer, Some(adapter)).forward(x)?;
            held.push(if checkpointing {
                Held::Input(kept.into_input(bench))
            } else {
                Held::All(Box::new(kept))
            });
            x = y;
        }
        let mut rows = self.predicting(bench, &x, task);
        let loss = head::loss(bench, self, &mut rows, task.targets, Some(share))?;
        let width = self.config.hidden_size;
        let mut dx = x;
        dx.fill(0.0);
        for (from, &row) in rows.chunks(width).zip(task.rows) {
            dx[row as usize * width..][..width].copy_from_slice(from);
        }
        bench.done(rows);
        let mut gradients: Gradients = Vec::with_capacity(self.blocks.len());
        for layer in (0..self.blocks.len()).rev() {
            let work = self.work(bench, &pass, layer, Some(adapter));
            let kept = match held.pop().context("a block without an input")? {
                Held::All(kept) => *kept,
                Held::Input(x) => {
                    let (y, kept) = work.forward(x)?;
                    bench.done(y);
                    kept
                }
            };
            let (before, found) = work.backward(kept, dx)?;
            dx = before;
            gradients.push(found);
        }
        bench.done(dx);
        gradients.reverse();
        Ok((loss, gradients))
    }
}
