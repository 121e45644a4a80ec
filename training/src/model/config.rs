//! The shape of a decoder, read from GGUF metadata or from a transformers `config.json`.

use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::{Content, Value};
use std::path::Path;

/// Shape and constants of a Llama-family decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Architecture name as GGUF and transformers give it.
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
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Epsilon of RMSNorm.
    pub norm_eps: f64,
    /// The output head is the token embedding.
    pub tied_head: bool,
}

/// The subset of `config.json` that matters; transformers omits what equals its defaults.
#[derive(serde::Deserialize)]
struct HfConfig {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    rope_parameters: Option<RopeParameters>,
    rope_scaling: Option<RopeParameters>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    #[serde(default = "default_activation")]
    hidden_act: String,
    #[serde(default)]
    tie_word_embeddings: bool,
}

#[derive(serde::Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

fn default_positions() -> usize {
    2048
}
fn default_eps() -> f64 {
    1e-6
}
fn default_activation() -> String {
    "silu".into()
}

impl Config {
    /// Reads `config.json` of a transformers folder.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let c: HfConfig = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a decoder configuration", path.display()))?;
        if c.hidden_act != "silu" {
            bail!("activation `{}` is not supported; the Llama family uses `silu`", c.hidden_act);
        }
        for rope in [&c.rope_parameters, &c.rope_scaling].into_iter().flatten() {
            if let Some(kind) = rope.rope_type.as_deref().filter(|k| *k != "default") {
                bail!("rope scaling `{kind}` is not supported yet");
            }
        }
        let theta = c.rope_theta.or(c.rope_parameters.and_then(|r| r.rope_theta)).unwrap_or(10_000.0);
        Config {
            architecture: c.model_type,
            hidden_size: c.hidden_size,
            intermediate_size: c.intermediate_size,
            n_layers: c.num_hidden_layers,
            n_heads: c.num_attention_heads,
            n_kv_heads: c.num_key_value_heads.unwrap_or(c.num_attention_heads),
            head_dim: c.head_dim.unwrap_or(c.hidden_size / c.num_attention_heads.max(1)),
            vocab_size: c.vocab_size,
            max_positions: c.max_position_embeddings,
            rope_theta: theta,
            norm_eps: c.rms_norm_eps,
            tied_head: c.tie_word_embeddings,
        }
        .validated()
    }

    /// Reads the metadata of a GGUF file.
    pub fn from_gguf(content: &Content) -> Result<Self> {
        let text = |key: &str| -> Result<String> {
            Ok(content
                .metadata
                .get(key)
                .with_context(|| format!("the GGUF has no `{key}`"))?
                .to_string()?
                .clone())
        };
        let architecture = text("general.architecture")?;
        let find = |key: &str| content.metadata.get(&format!("{architecture}.{key}"));
        let number = |key: &str| -> Result<usize> {
            integer(find(key).with_context(|| format!("the GGUF has no `{architecture}.{key}`"))?)
        };
        let real =
            |key: &str, default: f64| find(key).and_then(|v| v.to_f32().ok()).map_or(default, shortest);
        if let Some(kind) =
            find("rope.scaling.type").and_then(|v| v.to_string().ok()).filter(|k| *k != "none")
        {
            bail!("rope scaling `{kind}` is not supported yet");
        }
        let (hidden_size, n_heads) = (number("embedding_length")?, number("attention.head_count")?);
        let vocab_size = content
            .tensor_infos
            .get("token_embd.weight")
            .and_then(|t| t.shape.dims().first().copied())
            .context("the GGUF has no `token_embd.weight`")?;
        Config {
            hidden_size,
            intermediate_size: number("feed_forward_length")?,
            n_layers: number("block_count")?,
            n_heads,
            n_kv_heads: number("attention.head_count_kv").unwrap_or(n_heads),
            head_dim: number("attention.key_length").unwrap_or(hidden_size / n_heads.max(1)),
            vocab_size,
            max_positions: number("context_length")?,
            rope_theta: real("rope.freq_base", 10_000.0),
            norm_eps: real("attention.layer_norm_rms_epsilon", 1e-5),
            tied_head: !content.tensor_infos.contains_key("output.weight"),
            architecture,
        }
        .validated()
    }

    fn validated(self) -> Result<Self> {
        if self.architecture != "llama" {
            bail!("architecture `{}` is not supported yet; supported: llama", self.architecture);
        }
        let positive =
            [self.hidden_size, self.n_layers, self.n_heads, self.n_kv_heads, self.head_dim, self.vocab_size];
        if positive.contains(&0)
            || !self.n_heads.is_multiple_of(self.n_kv_heads)
            || !self.head_dim.is_multiple_of(2)
        {
            bail!("the model's shape contradicts itself: {self:?}");
        }
        Ok(self)
    }
}

fn integer(value: &Value) -> Result<usize> {
    Ok(match value {
        Value::U32(v) => *v as usize,
        Value::I32(v) => usize::try_from(*v)?,
        Value::U64(v) => usize::try_from(*v)?,
        Value::I64(v) => usize::try_from(*v)?,
        other => bail!("expected an integer, found {other:?}"),
    })
}

/// The decimal number that was meant: f32 1e-5 read as f64 is 9.99999974e-6, transformers has 1e-5.
fn shortest(v: f32) -> f64 {
    v.to_string().parse().unwrap_or(v as f64)
}
