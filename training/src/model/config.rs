//! The shape of a decoder as data, read from GGUF metadata or from a transformers `config.json`.
//!
//! One decoder runs all families: whatever sets them apart is a field here, and nothing else in this crate asks
//! for a model's name. Both readers refuse what a file asks for and the decoder does not do.

mod gguf;
mod transformers;

use super::Module;
use super::rope::{Rope, Scaling};
use anyhow::{Result, bail};

pub use super::ops::Activation;

/// Shape and constants of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Architecture by its GGUF name, so that both forms of one model have one identity; transformers' `mistral` is
    /// `llama`, its `ministral3` is `mistral3`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Longest sequence the model was trained for.
    pub max_positions: usize,
    /// Epsilon of RMSNorm.
    pub norm_eps: f64,
    /// The output head is the token embedding.
    pub tied_head: bool,
    /// Rotations in use; [`Layer::rope`] picks one.
    pub ropes: Vec<Rope>,
    /// Each block's own way to attend.
    pub layers: Vec<Layer>,
    /// Factor on the products of queries and keys.
    pub attention_scale: f32,
    /// Attention scores s become `cap * tanh(s / cap)`.
    pub attention_cap: Option<f32>,
    /// Queries grow with their position.
    pub query_growth: Option<QueryGrowth>,
    /// Which linear layers add a bias, by [`Module`].
    pub biased: [bool; 7],
    /// Queries and keys pass an RMSNorm per head before they are rotated.
    pub query_key_norms: bool,
    /// What attention and feed-forward return passes an RMSNorm before it is added to the residual stream.
    pub post_norms: bool,
    /// safetensors hold norm weights less one; GGUF files hold them whole.
    pub norms_less_one: bool,
    /// Function of the feed-forward gate.
    pub activation: Activation,
    /// Factor on token embeddings.
    pub embedding_scale: f64,
    /// Logits l become `cap * tanh(l / cap)`.
    pub logit_cap: Option<f32>,
}

/// How one block attends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// A query sees its own and the `window - 1` positions before; all of them without a window.
    pub window: Option<usize>,
    /// Index into [`Config::ropes`].
    pub rope: usize,
}

/// Queries at position p are multiplied by `1 + beta * ln(1 + floor(p / original))` (Llama 4, Ministral 3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryGrowth {
    /// Strength.
    pub beta: f64,
    /// Context length of the pretraining.
    pub original: f64,
}

impl QueryGrowth {
    /// The factor at one position.
    pub fn at(&self, position: usize) -> f64 {
        1.0 + self.beta * (1.0 + (position as f64 / self.original).floor()).ln()
    }
}

/// The numbers that every file states.
struct Shape {
    hidden_size: usize,
    intermediate_size: usize,
    n_layers: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    max_positions: usize,
    norm_eps: f64,
    tied_head: bool,
}

const QKV: [bool; 7] = [true, true, true, false, false, false, false];

impl Config {
    /// What all models of an architecture share; rotation is plain and attention full until a file says otherwise.
    fn of_family(architecture: &str, s: Shape) -> Result<Self> {
        let gemma = match architecture {
            "llama" | "mistral3" | "qwen2" | "qwen3" => false,
            "gemma2" | "gemma3" => true,
            other => bail!(
                "architecture `{other}` is not supported; supported: llama (and mistral), mistral3 (ministral3), qwen2, \
                 qwen3, gemma2, gemma3"
            ),
        };
        Ok(Config {
            architecture: architecture.to_owned(),
            hidden_size: s.hidden_size,
            intermediate_size: s.intermediate_size,
            n_layers: s.n_layers,
            n_heads: s.n_heads,
            n_kv_heads: s.n_kv_heads,
            head_dim: s.head_dim,
            vocab_size: s.vocab_size,
            max_positions: s.max_positions,
            norm_eps: s.norm_eps,
            tied_head: s.tied_head,
            ropes: vec![Rope { theta: 10_000.0, scaling: Scaling::Plain }],
            layers: vec![Layer { window: None, rope: 0 }; s.n_layers],
            attention_scale: 1.0 / (s.head_dim as f32).sqrt(),
            attention_cap: None,
            query_growth: None,
            biased: if architecture == "qwen2" { QKV } else { [false; 7] },
            query_key_norms: matches!(architecture, "qwen3" | "gemma3"),
            post_norms: gemma,
            norms_less_one: gemma,
            activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
            embedding_scale: if gemma { (s.hidden_size as f64).sqrt() } else { 1.0 },
            logit_cap: None,
        })
    }

    /// Whether a linear layer adds a bias.
    pub fn has_bias(&self, module: Module) -> bool {
        self.biased[module as usize]
    }

    /// Output and input features of a block's linear layer.
    pub fn dims(&self, module: Module) -> (usize, usize) {
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        match module {
            Module::Q => (q, self.hidden_size),
            Module::K | Module::V => (kv, self.hidden_size),
            Module::O => (self.hidden_size, q),
            Module::Gate | Module::Up => (self.intermediate_size, self.hidden_size),
            Module::Down => (self.hidden_size, self.intermediate_size),
        }
    }

    fn validated(self) -> Result<Self> {
        let positive =
            [self.hidden_size, self.n_layers, self.n_heads, self.n_kv_heads, self.head_dim, self.vocab_size];
        if positive.contains(&0)
            || !self.n_heads.is_multiple_of(self.n_kv_heads)
            || !self.head_dim.is_multiple_of(2)
            || self.layers.len() != self.n_layers
            || self.layers.iter().any(|l| l.window == Some(0) || l.rope >= self.ropes.len())
        {
            bail!("the model's shape contradicts itself: {self:?}");
        }
        let positive = [Some(self.attention_scale), self.attention_cap, self.logit_cap];
        let good = positive.into_iter().flatten().all(|v| v.is_finite() && v > 0.0)
            && self.query_growth.is_none_or(|g| g.beta.is_finite() && g.original > 0.0)
            && self.ropes.iter().all(|r| {
                let numbers = r.frequencies(self.head_dim).into_iter().chain([r.magnitude()]);
                r.theta > 1.0 && numbers.into_iter().all(|f| f.is_finite() && f > 0.0)
            });
        if !good {
            bail!("a scale, cap or rotation of the model is not a positive number: {self:?}");
        }
        Ok(self)
    }
}

/// Blocks of which every `period`-th attends to everything and the others within `window`.
fn alternating(n_layers: usize, period: usize) -> Vec<bool> {
    (0..n_layers).map(|i| period == 0 || !(i + 1).is_multiple_of(period)).collect()
}
