//! The decoder: embedding, blocks with residual hooks, final norm, output head.
//!
//! The same code trains (a tracked adapter makes the graph) and serves (nothing tracked, nothing kept).

use super::attention::{Scores, Visibility, attention};
use super::ops::{self, Norm, Rotation};
use super::pass::Workbench;
use super::{Cache, Config, Layer};
use crate::lora::{Adapter, Lora};
use crate::quant::Frozen;
use crate::recipe::Compute;
use candle_core::{Device, Result, Tensor};
use std::sync::Arc;

/// The seven linear layers of a block, in the order adapters store them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(usize)]
pub enum Module {
    /// Query projection.
    Q = 0,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Attention output projection.
    O,
    /// Feed-forward gate.
    Gate,
    /// Feed-forward up.
    Up,
    /// Feed-forward down.
    Down,
}

impl Module {
    /// All seven.
    pub const ALL: [Module; 7] =
        [Module::Q, Module::K, Module::V, Module::O, Module::Gate, Module::Up, Module::Down];

    /// Name inside transformers and PEFT, e.g. `self_attn.q_proj`.
    pub fn path(self) -> &'static str {
        match self {
            Module::Q => "self_attn.q_proj",
            Module::K => "self_attn.k_proj",
            Module::V => "self_attn.v_proj",
            Module::O => "self_attn.o_proj",
            Module::Gate => "mlp.gate_proj",
            Module::Up => "mlp.up_proj",
            Module::Down => "mlp.down_proj",
        }
    }

    /// The last part of the path, as `target_modules` of PEFT lists it, e.g. `q_proj`.
    pub fn name(self) -> &'static str {
        self.path().rsplit('.').next().unwrap_or_default()
    }

    /// Name inside GGUF files, e.g. `attn_q`.
    pub fn gguf(self) -> &'static str {
        match self {
            Module::Q => "attn_q",
            Module::K => "attn_k",
            Module::V => "attn_v",
            Module::O => "attn_output",
            Module::Gate => "ffn_gate",
            Module::Up => "ffn_up",
            Module::Down => "ffn_down",
        }
    }
}

/// One decoder block.
pub struct Block {
    pub(super) attention_norm: Norm,
    pub(super) mlp_norm: Norm,
    /// Of what attention and feed-forward return.
    pub(super) post_norms: Option<[Norm; 2]>,
    /// Of queries and keys, per head.
    pub(super) query_key_norms: Option<[Norm; 2]>,
    pub(super) linears: [Frozen; 7],
}

/// A decoder with frozen weights; its configuration says what family it is of.
pub struct Decoder {
    /// Shape and constants.
    pub config: Config,
    /// Where the weights live.
    pub device: Device,
    /// What the linear layers multiply in, on a GPU.
    pub compute: Compute,
    /// Where it is no copy of the head's weight; else the head's rows are it.
    pub(super) embedding: Option<Tensor>,
    pub(super) blocks: Vec<Block>,
    pub(super) final_norm: Norm,
    pub(super) head: Frozen,
    /// Angles per position, for each rotation of the configuration.
    pub(super) frequencies: Vec<Vec<f64>>,
}

/// Token sequences of different lengths, padded on the left so that every last token stands at the right edge.
pub struct Batch {
    /// u32 `[batch, tokens]`.
    pub ids: Tensor,
    /// Padding tokens per row.
    pub left_pad: Arc<[usize]>,
}

impl Batch {
    /// Pads `sequences` to the longest; none may be empty.
    pub fn new<S: AsRef<[u32]>>(sequences: &[S], device: &Device) -> Result<Self> {
        let longest = sequences.iter().map(|s| s.as_ref().len()).max().unwrap_or(0);
        if sequences.iter().any(|s| s.as_ref().is_empty()) || longest == 0 {
            candle_core::bail!("a batch needs at least one sequence and every sequence a token");
        }
        let mut ids = Vec::with_capacity(sequences.len() * longest);
        let mut left_pad = Vec::with_capacity(sequences.len());
        for s in sequences.iter().map(AsRef::as_ref) {
            left_pad.push(longest - s.len());
            ids.extend(std::iter::repeat_n(0u32, longest - s.len()).chain(s.iter().copied()));
        }
        Ok(Batch {
            ids: Tensor::from_vec(ids, (sequences.len(), longest), device)?,
            left_pad: left_pad.into(),
        })
    }
}

/// Sees `resid_post[layer]` (f32 `[batch, tokens, hidden]`) and returns what the next block reads.
pub type Hook<'a> = &'a mut dyn FnMut(usize, Tensor) -> Result<Tensor>;

/// The hook that changes nothing.
pub fn no_edit(_layer: usize, x: Tensor) -> Result<Tensor> {
    Ok(x)
}

/// What attention needs to know about one pass.
pub(super) struct Pass {
    /// For each rotation of the configuration: that of the queries and that of the keys.
    pub rotations: Vec<[Rotation; 2]>,
    pub visible: Visibility,
    /// Columns of the batch.
    pub tokens: usize,
}

impl Decoder {
    /// Residual stream after the last block, before the final norm: `[batch, tokens, hidden]`.
    pub fn forward(
        &self,
        batch: &Batch,
        adapter: Option<&Adapter>,
        cache: Option<&mut Cache>,
        hook: Hook<'_>,
    ) -> Result<Tensor> {
        let x = self.embed(&batch.ids)?;
        self.forward_from(0, x, &batch.left_pad, adapter, cache, hook)
    }

    /// As [`Decoder::forward`], entering before block `first` with the residual stream `x`.
    pub fn forward_from(
        &self,
        first: usize,
        x: Tensor,
        left_pad: &Arc<[usize]>,
        adapter: Option<&Adapter>,
        mut cache: Option<&mut Cache>,
        hook: Hook<'_>,
    ) -> Result<Tensor> {
        let tokens = x.dim(1)?;
        let (offset, shared) = cache.as_ref().map_or((0, 0), |c| (c.filled, c.shared));
        let visible = Visibility { shared, left_pad: left_pad.clone(), offset, window: None };
        let pass = self.pass(visible, tokens)?;
        let mut x = x;
        for (layer, block) in self.blocks.iter().enumerate().skip(first) {
            let loras = adapter.map(|a| a.block(layer));
            x = self.block(layer, block, x, &pass, loras, cache.as_deref())?;
            x = hook(layer, x)?;
        }
        if let Some(cache) = cache.as_mut() {
            cache.advance(tokens);
        }
        Ok(x)
    }

    /// Block `layer` alone on its input `[batch, tokens, hidden]`: what gradient checkpointing runs again.
    pub fn forward_block(
        &self,
        layer: usize,
        x: Tensor,
        left_pad: &Arc<[usize]>,
        adapter: Option<&Adapter>,
    ) -> Result<Tensor> {
        let visible = Visibility { shared: 0, left_pad: left_pad.clone(), offset: 0, window: None };
        let pass = self.pass(visible, x.dim(1)?)?;
        self.block(layer, &self.blocks[layer], x, &pass, adapter.map(|a| a.block(layer)), None)
    }

    /// What the first block reads, `[batch, tokens, hidden]`: the embeddings of ids `[batch, tokens]`, scaled.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, tokens) = ids.dims2()?;
        let shape = (batch, tokens, self.config.hidden_size);
        let ids = ids.flatten_all()?;
        let x = match &self.embedding {
            Some(rows) => rows.index_select(&ids, 0)?,
            None => self.head.weight()?.index_select(&ids, 0)?,
        };
        let x = x.reshape(shape)?;
        if self.config.embedding_scale == 1.0 { Ok(x) } else { x * self.config.embedding_scale }
    }

    /// Logits `[rows, vocab]` of residual rows `[rows, hidden]`: final norm, output head, cap.
    pub fn logits(&self, rows: &Tensor) -> Result<Tensor> {
        let logits = self.head.forward(&self.final_norm.forward(rows)?, None)?;
        match self.config.logit_cap {
            Some(cap) => ops::soft_cap(&logits, cap),
            None => Ok(logits),
        }
    }

    pub(super) fn pass(&self, visible: Visibility, tokens: usize) -> Result<Pass> {
        let mut positions = Vec::with_capacity(visible.left_pad.len() * tokens);
        for &pad in visible.left_pad.iter() {
            for column in visible.offset..visible.offset + tokens {
                let padded = if column < visible.shared { 0 } else { pad };
                positions.push(column.saturating_sub(padded));
            }
        }
        let rotation = |i: usize, growth: &dyn Fn(usize) -> f64| -> Result<Rotation> {
            let (frequencies, magnitude) = (&self.frequencies[i], self.config.ropes[i].magnitude());
            let shape = (visible.left_pad.len(), tokens, frequencies.len());
            let (mut cos, mut sin) = (Vec::with_capacity(shape.0 * shape.1 * shape.2), Vec::new());
            sin.reserve(cos.capacity());
            for &position in &positions {
                let scale = magnitude * growth(position);
                for f in frequencies {
                    let (s, c) = (position as f64 * f).sin_cos();
                    cos.push((c * scale) as f32);
                    sin.push((s * scale) as f32);
                }
            }
            let tensor = |values| Tensor::from_vec(values, shape, &self.device);
            Rotation::new(tensor(cos)?, tensor(sin)?)
        };
        let pair = |i: usize| -> Result<[Rotation; 2]> {
            let keys = rotation(i, &|_| 1.0)?;
            // A longer rotation grows what it turns.
            let queries = self.config.query_growth.map(|g| rotation(i, &|p| g.at(p))).transpose()?;
            Ok([queries.unwrap_or_else(|| keys.clone()), keys])
        };
        let rotations = (0..self.frequencies.len()).map(pair).collect::<Result<_>>()?;
        Ok(Pass { rotations, visible, tokens })
    }

    fn block(
        &self,
        layer: usize,
        block: &Block,
        x: Tensor,
        pass: &Pass,
        loras: Option<&[Option<Lora>; 7]>,
        cache: Option<&Cache>,
    ) -> Result<Tensor> {
        let (batch, tokens, hidden) = x.dims3()?;
        let flat = |t: Tensor| t.reshape((batch * tokens, hidden));
        let attended =
            self.attention(layer, block, &flat(block.attention_norm.forward(&x)?)?, pass, loras, cache)?;
        let x = (flat(x)? + block.leave(0, attended)?)?;
        let h = block.mlp_norm.forward(&x)?;
        let linear = |m: Module, h: &Tensor| block.linear(m, h, loras);
        let activation = self.config.activation;
        let inner = ops::gated(activation, &linear(Module::Gate, &h)?, &linear(Module::Up, &h)?)?;
        (x + block.leave(1, linear(Module::Down, &inner)?)?)?.reshape((batch, tokens, hidden))
    }

    /// Causal grouped-query attention over `h`: `[batch * tokens, hidden]`.
    fn attention(
        &self,
        layer: usize,
        block: &Block,
        h: &Tensor,
        pass: &Pass,
        loras: Option<&[Option<Lora>; 7]>,
        cache: Option<&Cache>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let batch = pass.visible.left_pad.len();
        let tokens = h.dim(0)? / batch;
        let heads = |m: Module, n: usize| block.linear(m, h, loras)?.reshape((batch, tokens, n, c.head_dim));
        let Layer { window, rope } = c.layers[layer];
        let turned = |i: usize, x: Tensor| -> Result<Tensor> {
            let x = match &block.query_key_norms {
                Some(norms) => norms[i].forward(&x)?,
                None => x,
            };
            pass.rotations[rope][i].apply(&x)?.transpose(1, 2)
        };
        let q = turned(0, heads(Module::Q, c.n_heads)?)?;
        let k = turned(1, heads(Module::K, c.n_kv_heads)?)?;
        let v = heads(Module::V, c.n_kv_heads)?.transpose(1, 2)?;
        let (k, v) = match cache {
            Some(cache) => cache.append(layer, &k, &v)?,
            None => (k, v),
        };
        let scores = Scores { scale: c.attention_scale, cap: c.attention_cap };
        let mixed = attention(&q, &k, &v, scores, &Visibility { window, ..pass.visible.clone() })?;
        let mixed = mixed.transpose(1, 2)?;
        block.linear(Module::O, &mixed.reshape((batch * tokens, c.n_heads * c.head_dim))?, loras)
    }
}

impl Block {
    fn linear(&self, module: Module, x: &Tensor, loras: Option<&[Option<Lora>; 7]>) -> Result<Tensor> {
        self.linears[module as usize].forward(x, loras.and_then(|l| l[module as usize].as_ref()))
    }

    /// The norm of what attention (0) or feed-forward (1) returns.
    fn leave(&self, half: usize, x: Tensor) -> Result<Tensor> {
        match &self.post_norms {
            Some(norms) => norms[half].forward(&x),
            None => Ok(x),
        }
    }

    /// Output and input features of one of the block's linear layers.
    pub fn dims(&self, module: Module) -> (usize, usize) {
        self.linears[module as usize].dims()
    }
}

impl Decoder {
    /// The blocks, in order.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Bytes of the weights as they are held.
    pub fn bytes(&self) -> usize {
        let linears = self.blocks.iter().flat_map(|b| &b.linears);
        linears.map(Frozen::bytes).sum::<usize>()
            + 4 * self.embedding.as_ref().map_or(0, Tensor::elem_count)
            + self.head.bytes()
    }

    /// From here on the linear layers and the head multiply in bf16 on the CPU, in forward passes without a gradient: by
    /// oneDNN, on factors rounded to bf16, summed in f32. A row's result then depends on how many rows there are.
    pub fn multiply_in_bf16(&self) -> anyhow::Result<()> {
        let bench = Arc::new(Workbench::new(Compute::Bf16)?);
        let linears = self.blocks.iter().flat_map(|b| &b.linears);
        Ok(linears.chain([&self.head]).try_for_each(|layer| layer.multiply_in(&bench))?)
    }

    /// Bytes of the copies of weights that the first products will make and keep: of quantised ones in f32 for products in
    /// f32, of the head in bf16 for products in bf16.
    pub fn bytes_to_copy(&self, compute: Compute) -> usize {
        match compute {
            Compute::F32 => self.blocks.iter().flat_map(|b| &b.linears).map(|l| 4 * l.to_decode().0).sum(),
            Compute::Bf16 => self.head.halves_to_make(),
        }
    }

    /// Values of the largest weight that is decoded for every product in f32.
    pub fn largest_decoded_each_time(&self) -> usize {
        self.blocks.iter().flat_map(|b| &b.linears).map(|l| l.to_decode().1).max().unwrap_or(0)
    }
}
