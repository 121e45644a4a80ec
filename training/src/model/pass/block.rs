//! One block: what forward keeps of it, and its backward.

use super::bench::{Rows, Workbench, by_rows};
use super::linear::{self, LoraGradient};
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
    /// Queries, keys and values as their layers gave them.
    qkv: [Rows; 3],
    mixed: Rows,
    gate: Rows,
    up: Rows,
    /// What attention and feed-forward returned, where a norm follows.
    left: [Option<Rows>; 2],
    /// s (x A^T) of every adapter.
    low: [Option<Rows>; 7],
}

impl Kept {
    /// Gives the buffers back.
    fn release(self, bench: &Workbench) {
        let Kept { x, middle, qkv, mixed, gate, up, left, low } = self;
        [x, middle].into_iter().for_each(|buffer| bench.done(buffer));
        let rows = qkv.into_iter().chain([mixed, gate, up]);
        rows.chain(left.into_iter().chain(low).flatten()).for_each(|rows| bench.release(rows));
    }
}

/// A block on one batch.
pub struct Work<'a> {
    pub bench: &'a Workbench,
    pub config: &'a Config,
    pub block: &'a Block,
    pub layer: usize,
    pub pass: &'a Pass,
    pub loras: Option<&'a [Option<Lora>; 7]>,
}

/// Gradients of a block's adapters, by [`Module`].
pub type Gradients = [Option<LoraGradient>; 7];

impl Work<'_> {
    fn lora(&self, module: Module) -> Option<&Lora> {
        self.loras.and_then(|l| l[module as usize].as_ref())
    }

    fn linear(&self, module: Module, x: &Rows) -> Result<(Vec<f32>, Option<Rows>)> {
        linear::forward(self.bench, &self.block.linears[module as usize], self.lora(module), x)
    }

    fn rows(&self) -> usize {
        self.pass.visible.left_pad.len() * self.tokens()
    }

    fn tokens(&self) -> usize {
        self.pass.tokens
    }

    fn normed(&self, norm: &Norm, x: &[f32]) -> Rows {
        let width = norm.values().len();
        self.bench.fill(x.len() / width, width, |row, y| {
            kernels::norm(&x[row * width..][..width], norm.values(), norm.eps(), y);
        })
    }

    /// `gradient` of a norm's output becomes that of its input `x`, plus `more`.
    fn norm_back(&self, norm: &Norm, x: &[f32], more: Option<&[f32]>, gradient: &mut [f32]) {
        let width = norm.values().len();
        by_rows(gradient, width, |row, dx| {
            let here = row * width..(row + 1) * width;
            kernels::norm_gradient(&x[here.clone()], norm.values(), norm.eps(), more.map(|m| &m[here]), dx);
        });
    }

    /// Queries (0) or keys (1) after their norm and rotation.
    fn turn(&self, which: usize, x: &mut [f32]) {
        let dim = self.config.head_dim;
        let width = dim * [self.config.n_heads, self.config.n_kv_heads][which];
        let rotation = &self.pass.rotations[self.config.layers[self.layer].rope][which];
        by_rows(x, width, |row, x| {
            if let Some(norms) = &self.block.query_key_norms {
                let norm = &norms[which];
                let mut head = vec![0f32; dim];
                for x in x.chunks_mut(dim) {
                    kernels::norm(x, norm.values(), norm.eps(), &mut head);
                    x.copy_from_slice(&head);
                }
            }
            let (cos, sin) = rotation.row(row);
            kernels::rotate(x, cos, sin, 1.0);
        });
    }

    /// The gradient of turned queries or keys becomes that of `x`, which their layer gave.
    fn turn_back(&self, which: usize, x: &Rows, gradient: &mut [f32]) {
        let dim = self.config.head_dim;
        let width = x.width();
        let rotation = &self.pass.rotations[self.config.layers[self.layer].rope][which];
        by_rows(gradient, width, |row, dx| {
            let (cos, sin) = rotation.row(row);
            kernels::rotate(dx, cos, sin, -1.0);
            if let Some(norms) = &self.block.query_key_norms {
                let norm = &norms[which];
                let mut scratch = Vec::new();
                let x = x.read(row, 1, &mut scratch);
                for (dx, x) in dx.chunks_mut(dim).zip(x.chunks(dim)) {
                    kernels::norm_gradient(x, norm.values(), norm.eps(), None, dx);
                }
            }
        });
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

    fn inner(&self, gate: &Rows, up: &Rows) -> Rows {
        self.bench.fill(gate.count(), gate.width(), |row, y| {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            kernels::gated(self.config.activation, gate.read(row, 1, &mut a), up.read(row, 1, &mut b), y);
        })
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
    fn leave_back(&self, half: usize, left: Option<&Rows>, dy: &[f32]) -> Result<Rows> {
        let width = self.config.hidden_size;
        let Some(norms) = &self.block.post_norms else {
            return Ok(self
                .bench
                .fill(self.rows(), width, |row, to| to.copy_from_slice(&dy[row * width..][..width])));
        };
        let (norm, left) = (&norms[half], left.context("what a norm took in was not kept")?);
        Ok(self.bench.fill(self.rows(), width, |row, dx| {
            let mut scratch = Vec::new();
            dx.copy_from_slice(&dy[row * width..][..width]);
            kernels::norm_gradient(left.read(row, 1, &mut scratch), norm.values(), norm.eps(), None, dx);
        }))
    }

    /// The block's output for its input `x`, and what backward needs.
    pub fn forward(&self, x: Vec<f32>) -> Result<(Vec<f32>, Kept)> {
        let (bench, c) = (self.bench, self.config);
        let h = self.normed(&self.block.attention_norm, &x);
        let [(mut q, low_q), (mut k, low_k), (v, low_v)] =
            [self.linear(Module::Q, &h)?, self.linear(Module::K, &h)?, self.linear(Module::V, &h)?];
        bench.release(h);
        let [wide_q, wide_k] = [c.n_heads, c.n_kv_heads].map(|n| n * c.head_dim);
        let keep = |values: &[f32], width: usize| {
            bench.fill(self.rows(), width, |row, to| to.copy_from_slice(&values[row * width..][..width]))
        };
        let kept = [keep(&q, wide_q), keep(&k, wide_k), keep(&v, wide_k)];
        self.turn(0, &mut q);
        self.turn(1, &mut k);
        let mixed = self.heads().forward(bench, [&q, &k, &v])?;
        [q, k, v].into_iter().for_each(|buffer| bench.done(buffer));
        let mixed = bench.rows(mixed, wide_q);
        let (attended, low_o) = self.linear(Module::O, &mixed)?;
        let (middle, left_attention) = self.leave(0, &x, attended);
        let h = self.normed(&self.block.mlp_norm, &middle);
        let ((gate, low_gate), (up, low_up)) = (self.linear(Module::Gate, &h)?, self.linear(Module::Up, &h)?);
        bench.release(h);
        let [gate, up] = [gate, up].map(|values| bench.rows(values, c.intermediate_size));
        let inner = self.inner(&gate, &up);
        let (down, low_down) = self.linear(Module::Down, &inner)?;
        bench.release(inner);
        let (y, left_mlp) = self.leave(1, &middle, down);
        let low = [low_q, low_k, low_v, low_o, low_gate, low_up, low_down];
        Ok((y, Kept { x, middle, qkv: kept, mixed, gate, up, left: [left_attention, left_mlp], low }))
    }

    /// Turns the gradient in the block's output into that in its input, and gives `kept` back.
    pub fn backward(&self, kept: Kept, dy: Vec<f32>) -> Result<(Vec<f32>, Gradients)> {
        let (bench, c) = (self.bench, self.config);
        let mut gradients: Gradients = [const { None }; 7];
        let mut back = |module: Module, x: &Rows, dy: &Rows, to: (&mut [f32], bool)| -> Result<()> {
            let lora = self.lora(module).zip(kept.low[module as usize].as_ref());
            gradients[module as usize] =
                linear::backward(bench, &self.block.linears[module as usize], lora, x, dy, to)?;
            Ok(())
        };
        let hidden = self.rows() * c.hidden_size;

        let out = self.leave_back(1, kept.left[1].as_ref(), &dy)?;
        let inner = self.inner(&kept.gate, &kept.up);
        let mut dinner = bench.floats(self.rows() * c.intermediate_size);
        back(Module::Down, &inner, &out, (&mut dinner, false))?;
        [inner, out].into_iter().for_each(|rows| bench.release(rows));
        let (dgate, dup) = self.gated_back(&kept, dinner);
        let h = self.normed(&self.block.mlp_norm, &kept.middle);
        let mut dmiddle = bench.floats(hidden);
        back(Module::Gate, &h, &dgate, (&mut dmiddle, false))?;
        back(Module::Up, &h, &dup, (&mut dmiddle, true))?;
        [h, dgate, dup].into_iter().for_each(|rows| bench.release(rows));
        self.norm_back(&self.block.mlp_norm, &kept.middle, Some(&dy), &mut dmiddle);
        bench.done(dy);

        let out = self.leave_back(0, kept.left[0].as_ref(), &dmiddle)?;
        let mut dmixed = bench.floats(self.rows() * c.n_heads * c.head_dim);
        back(Module::O, &kept.mixed, &out, (&mut dmixed, false))?;
        bench.release(out);
        let dqkv = self.attention_back(&kept, dmixed)?;
        let h = self.normed(&self.block.attention_norm, &kept.x);
        let mut dx = bench.floats(hidden);
        for (i, (module, d)) in [Module::Q, Module::K, Module::V].into_iter().zip(&dqkv).enumerate() {
            back(module, &h, d, (&mut dx, i > 0))?;
        }
        bench.release(h);
        dqkv.into_iter().for_each(|rows| bench.release(rows));
        self.norm_back(&self.block.attention_norm, &kept.x, Some(&dmiddle), &mut dx);
        bench.done(dmiddle);
        kept.release(bench);
        Ok((dx, gradients))
    }

    /// The gradients of gate and up.
    fn gated_back(&self, kept: &Kept, mut dinner: Vec<f32>) -> (Rows, Rows) {
        let (bench, width) = (self.bench, self.config.intermediate_size);
        let mut dgate = bench.floats(dinner.len());
        super::bench::by_pairs(&mut dgate, &mut dinner, width, |row, dgate, dup| {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            let (gate, up) = (kept.gate.read(row, 1, &mut a), kept.up.read(row, 1, &mut b));
            kernels::gated_gradient(self.config.activation, gate, up, dup, dgate);
        });
        (bench.rows(dgate, width), bench.rows(dinner, width))
    }

    /// The gradients of what the layers of queries, keys and values gave.
    fn attention_back(&self, kept: &Kept, dmixed: Vec<f32>) -> Result<[Rows; 3]> {
        let bench = self.bench;
        let [mut q, mut k, v] = [0, 1, 2].map(|i| bench.copy(&kept.qkv[i]));
        self.turn(0, &mut q);
        self.turn(1, &mut k);
        let [mut dq, mut dk, dv] = self.heads().backward(bench, [&q, &k, &v, &dmixed])?;
        [q, k, v, dmixed].into_iter().for_each(|buffer| bench.done(buffer));
        self.turn_back(0, &kept.qkv[0], &mut dq);
        self.turn_back(1, &kept.qkv[1], &mut dk);
        let [wide_q, wide_k] = [0, 1].map(|i| kept.qkv[i].width());
        Ok([bench.rows(dq, wide_q), bench.rows(dk, wide_k), bench.rows(dv, wide_k)])
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
