//! One block: what forward keeps of it, and its backward.

use super::bench::{Rows, Workbench, by_rows};
use super::linear::{Linear, LoraGradient};
use super::pieces::{Pieces, pieces_of_rows};
use crate::lora::Lora;
use crate::model::attention::{Heads, Scores, Sizes, Visibility};
use crate::model::decoder::{Block, Pass};
use crate::model::{Config, Module, kernels, ops::Norm, vector};
use anyhow::{Context, Result};

/// What backward needs of a block: its inputs to what cannot be had again by a cheap pass over rows.
pub struct Kept {
    /// The residual stream before attention and before the feed-forward layer.
    x: Vec<f32>,
    middle: Vec<f32>,
    /// Queries, keys and values side by side, as their layers gave them.
    qkv: Rows,
    mixed: Rows,
    /// Gate and up side by side.
    gate_up: Rows,
    /// What attention and feed-forward returned, where a norm follows.
    left: [Option<Rows>; 2],
    /// s (x A^T) of the adapters of each of [`GROUPS`].
    low: [Option<Rows>; 4],
}

impl Kept {
    /// Gives the buffers back.
    fn release(self, bench: &Workbench) {
        let Kept { x, middle, qkv, mixed, gate_up, left, low } = self;
        [x, middle].into_iter().for_each(|buffer| bench.done(buffer));
        let rows = [qkv, mixed, gate_up].into_iter();
        rows.chain(left.into_iter().chain(low).flatten()).for_each(|rows| bench.release(rows));
    }
}

/// Modules that read the same rows, in the order of a block.
const GROUPS: [&[Module]; 4] =
    [&[Module::Q, Module::K, Module::V], &[Module::O], &[Module::Gate, Module::Up], &[Module::Down]];
/// Places in it.
const QKV: usize = 0;
const O: usize = 1;
const GATE_UP: usize = 2;
const DOWN: usize = 3;

/// A block on one batch.
pub struct Work<'a> {
    pub bench: &'a Workbench,
    pub config: &'a Config,
    pub block: &'a Block,
    pub layer: usize,
    pub pass: &'a Pass,
    pub loras: Option<&'a [Option<Lora>; 7]>,
}

/// A row after its norm.
fn normed(norm: &Norm, x: &[f32], row: usize, y: &mut [f32]) {
    kernels::norm(&x[row * y.len()..][..y.len()], norm.values(), norm.eps(), y);
}

/// Gradients of a block's adapters, by [`Module`].
pub type Gradients = [Option<LoraGradient>; 7];

impl Work<'_> {
    fn linear(&self, group: usize) -> Result<Linear<'_>> {
        let lora = |module: Module| self.loras.and_then(|l| l[module as usize].as_ref());
        let layer = |module: Module| (&self.block.linears[module as usize], lora(module));
        Linear::new(self.bench, GROUPS[group].iter().map(|&module| layer(module)))
    }

    fn rows(&self) -> usize {
        self.pass.visible.left_pad.len() * self.tokens()
    }

    fn tokens(&self) -> usize {
        self.pass.tokens
    }

    fn normed(&self, norm: &Norm, x: &[f32], room: usize) -> Rows {
        let width = norm.values().len();
        self.bench.fill(x.len() / width, (width, room), |row, y| normed(norm, x, row, y))
    }

    /// The same for backward.
    fn normed_pieces(&self, norm: &Norm, x: &[f32]) -> Pieces {
        let width = norm.values().len();
        self.bench.fill_pieces(x.len() / width, pieces_of_rows(width), |row, y| normed(norm, x, row, y))
    }

    /// `gradient` of a norm's output becomes that of its input `x`, plus `more`.
    fn norm_back(&self, norm: &Norm, x: &[f32], more: Option<&[f32]>, gradient: &mut [f32]) {
        let width = norm.values().len();
        by_rows(gradient, width, |row, dx| {
            let here = row * width..(row + 1) * width;
            kernels::norm_gradient(&x[here.clone()], norm.values(), norm.eps(), more.map(|m| &m[here]), dx);
        });
    }

    /// Values per row of queries and of keys.
    fn widths(&self) -> (usize, usize) {
        let c = self.config;
        (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim)
    }

    /// Rows of queries, keys and values in f32, the first two after their norms and rotations.
    fn turned(&self, qkv: &Rows) -> Vec<f32> {
        let (dim, (queries, keys)) = (self.config.head_dim, self.widths());
        let rotations = &self.pass.rotations[self.config.layers[self.layer].rope];
        let mut turned = self.bench.floats(qkv.count() * qkv.width());
        by_rows(&mut turned, qkv.width(), |row, to| {
            let (mut scratch, mut head) = (Vec::new(), vec![0f32; dim]);
            to.copy_from_slice(qkv.read(row, &mut scratch));
            for (which, columns) in [0..queries, queries..queries + keys].into_iter().enumerate() {
                let x = &mut to[columns];
                if let Some(norms) = &self.block.query_key_norms {
                    for x in x.chunks_mut(dim) {
                        kernels::norm(x, norms[which].values(), norms[which].eps(), &mut head);
                        x.copy_from_slice(&head);
                    }
                }
                let (cos, sin) = rotations[which].row(row);
                kernels::rotate(x, cos, sin, 1.0);
            }
        });
        turned
    }

    /// The gradient of a row of turned queries (0) or keys (1) becomes that of `x`, which their layer gave.
    fn turn_back(&self, which: usize, row: usize, x: &[f32], dx: &mut [f32]) {
        let dim = self.config.head_dim;
        let (cos, sin) = self.pass.rotations[self.config.layers[self.layer].rope][which].row(row);
        kernels::rotate(dx, cos, sin, -1.0);
        if let Some(norms) = &self.block.query_key_norms {
            let norm = &norms[which];
            for (dx, x) in dx.chunks_mut(dim).zip(x.chunks(dim)) {
                kernels::norm_gradient(x, norm.values(), norm.eps(), None, dx);
            }
        }
    }

    fn heads(&self) -> Heads {
        let c = self.config;
        Heads {
            sizes: Sizes {
                batch: self.pass.visible.left_pad.len(),
                kv_heads: c.n_kv_heads,
                group: c.n_heads / c.n_kv_heads,
                tokens: self.tokens(),
                keys: self.tokens(),
                dim: c.head_dim,
            },
            scores: Scores { scale: c.attention_scale, cap: c.attention_cap },
            visible: Visibility { window: c.layers[self.layer].window, ..self.pass.visible.clone() },
        }
    }

    fn inner(&self, gate_up: &Rows, room: usize) -> Rows {
        let width = self.config.intermediate_size;
        self.bench.fill(gate_up.count(), (width, room), |row, y| self.gated(gate_up, row, y))
    }

    /// The same for backward.
    fn inner_pieces(&self, gate_up: &Rows) -> Pieces {
        let columns = pieces_of_rows(self.config.intermediate_size);
        self.bench.fill_pieces(gate_up.count(), columns, |row, y| self.gated(gate_up, row, y))
    }

    fn gated(&self, gate_up: &Rows, row: usize, y: &mut [f32]) {
        let mut scratch = Vec::new();
        let (gate, up) = gate_up.read(row, &mut scratch).split_at(y.len());
        kernels::gated(self.config.activation, gate, up, y);
    }

    /// What attention (0) or feed-forward (1) adds to the residual stream `x`, added; and itself, where it is needed.
    fn leave(&self, half: usize, x: &[f32], mut y: Vec<f32>) -> (Vec<f32>, Option<Rows>) {
        let width = self.config.hidden_size;
        let mut left = None;
        if let Some(norms) = &self.block.post_norms {
            let (norm, before) = (&norms[half], y);
            y = self.bench.floats(before.len());
            by_rows(&mut y, width, |row, y| {
                kernels::norm(&before[row * width..][..width], norm.values(), norm.eps(), y);
            });
            left = Some(self.bench.rows(before, width));
        }
        by_rows(&mut y, width, |row, y| vector::add(&x[row * width..][..width], y));
        (y, left)
    }

    /// The gradient of what [`Work::leave`] was given, from that of what it returned.
    fn leave_back(
        &self,
        half: usize,
        left: Option<&Rows>,
        dy: &[f32],
        linear: &Linear<'_>,
    ) -> Result<Pieces> {
        let width = self.config.hidden_size;
        let norm = match &self.block.post_norms {
            None => None,
            Some(norms) => Some((&norms[half], left.context("what a norm took in was not kept")?)),
        };
        Ok(self.bench.fill_pieces(self.rows(), linear.pieces(), |row, dx| {
            dx.copy_from_slice(&dy[row * width..][..width]);
            if let Some((norm, left)) = norm {
                let mut scratch = Vec::new();
                kernels::norm_gradient(left.read(row, &mut scratch), norm.values(), norm.eps(), None, dx);
            }
        }))
    }

    /// The block's output for its input `x`, and what backward needs.
    pub fn forward(&self, x: Vec<f32>) -> Result<(Vec<f32>, Kept)> {
        let bench = self.bench;
        let linear = self.linear(QKV)?;
        let mut h = self.normed(&self.block.attention_norm, &x, linear.rank());
        let (qkv, low_qkv) = linear.forward_rows(&mut h)?;
        bench.release(h);
        let linear = self.linear(O)?;
        let mut mixed = self.mixed(&qkv, linear.rank())?;
        let (attended, low_o) = linear.forward(&mut mixed)?;
        let (middle, left_attention) = self.leave(0, &x, attended);
        let linear = self.linear(GATE_UP)?;
        let mut h = self.normed(&self.block.mlp_norm, &middle, linear.rank());
        let (gate_up, low_gate_up) = linear.forward_rows(&mut h)?;
        bench.release(h);
        let linear = self.linear(DOWN)?;
        let mut inner = self.inner(&gate_up, linear.rank());
        let (down, low_down) = linear.forward(&mut inner)?;
        bench.release(inner);
        let (y, left_mlp) = self.leave(1, &middle, down);
        let (left, low) = ([left_attention, left_mlp], [low_qkv, low_o, low_gate_up, low_down]);
        Ok((y, Kept { x, middle, qkv, mixed, gate_up, left, low }))
    }

    /// What attention makes of the values.
    fn mixed(&self, qkv: &Rows, room: usize) -> Result<Rows> {
        let (turned, heads) = (self.turned(qkv), self.heads());
        let by_head = heads.forward(self.bench, &turned)?;
        self.bench.done(turned);
        let mixed =
            self.bench.fill(self.rows(), (self.widths().0, room), |row, to| heads.gather(&by_head, row, to));
        self.bench.done(by_head);
        Ok(mixed)
    }

    /// Turns the gradient in the block's output into that in its input, and gives `kept` back.
    pub fn backward(&self, kept: Kept, dy: Vec<f32>) -> Result<(Vec<f32>, Gradients)> {
        let bench = self.bench;
        let mut gradients: Gradients = [const { None }; 7];
        let mut back = |group: usize, linear: &Linear<'_>, x: Pieces, dy: Pieces| -> Result<Vec<f32>> {
            let (dx, found) = linear.backward(kept.low[group].as_ref().map(|low| (&x, low)), &dy)?;
            [x, dy].into_iter().for_each(|pieces| bench.release_pieces(pieces));
            for (&module, found) in GROUPS[group].iter().zip(found) {
                gradients[module as usize] = found;
            }
            Ok(dx)
        };

        let linear = self.linear(DOWN)?;
        let out = self.leave_back(1, kept.left[1].as_ref(), &dy, &linear)?;
        let dinner = back(DOWN, &linear, self.inner_pieces(&kept.gate_up), out)?;
        let linear = self.linear(GATE_UP)?;
        let dgate_up = self.gated_back(&kept.gate_up, dinner, &linear);
        let h = self.normed_pieces(&self.block.mlp_norm, &kept.middle);
        let mut dmiddle = back(GATE_UP, &linear, h, dgate_up)?;
        self.norm_back(&self.block.mlp_norm, &kept.middle, Some(&dy), &mut dmiddle);
        bench.done(dy);

        let linear = self.linear(O)?;
        let out = self.leave_back(0, kept.left[0].as_ref(), &dmiddle, &linear)?;
        let mixed = bench.fill_pieces(self.rows(), pieces_of_rows(self.widths().0), |row, to| {
            to.copy_from_slice(kept.mixed.read(row, &mut Vec::new()));
        });
        let dmixed = back(O, &linear, mixed, out)?;
        let linear = self.linear(QKV)?;
        let dqkv = self.attention_back(&kept.qkv, dmixed, &linear)?;
        let h = self.normed_pieces(&self.block.attention_norm, &kept.x);
        let mut dx = back(QKV, &linear, h, dqkv)?;
        self.norm_back(&self.block.attention_norm, &kept.x, Some(&dmiddle), &mut dx);
        bench.done(dmiddle);
        kept.release(bench);
        Ok((dx, gradients))
    }

    /// The gradients of gate and up.
    fn gated_back(&self, gate_up: &Rows, dinner: Vec<f32>, linear: &Linear<'_>) -> Pieces {
        let width = self.config.intermediate_size;
        let both = self.bench.fill_pieces(self.rows(), linear.pieces(), |row, to| {
            let mut scratch = Vec::new();
            let (gate, up) = gate_up.read(row, &mut scratch).split_at(width);
            let (dgate, dup) = to.split_at_mut(width);
            dup.copy_from_slice(&dinner[row * width..][..width]);
            kernels::gated_gradient(self.config.activation, gate, up, dup, dgate);
        });
        self.bench.done(dinner);
        both
    }

    /// The gradients of what the layers of queries, keys and values gave.
    fn attention_back(&self, qkv: &Rows, dmixed: Vec<f32>, linear: &Linear<'_>) -> Result<Pieces> {
        let (bench, heads, (queries, keys)) = (self.bench, self.heads(), self.widths());
        let turned = self.turned(qkv);
        let by_head = heads.backward(bench, &turned, &dmixed)?;
        [turned, dmixed].into_iter().for_each(|buffer| bench.done(buffer));
        let dqkv = bench.fill_pieces(self.rows(), linear.pieces(), |row, to| {
            let mut scratch = Vec::new();
            let x = qkv.read(row, &mut scratch);
            let columns = [0..queries, queries..queries + keys, queries + keys..queries + 2 * keys];
            for (which, (by_head, columns)) in by_head.iter().zip(columns).enumerate() {
                let to = &mut to[columns.clone()];
                heads.gather(by_head, row, to);
                if which < 2 {
                    self.turn_back(which, row, &x[columns], to);
                }
            }
        });
        by_head.into_iter().for_each(|buffer| bench.done(buffer));
        Ok(dqkv)
    }
}

impl Kept {
    /// Gives everything back but the block's input.
    pub fn into_input(self, bench: &Workbench) -> Vec<f32> {
        let mut kept = self;
        let x = std::mem::take(&mut kept.x);
        kept.release(bench);
        x
    }
}
