//! The metadata of a GGUF file.

use super::{Config, Layer, QueryGrowth, Shape, alternating};
use crate::model::Module;
use crate::model::rope::{Rope, Scaling, yarn_magnitude};
use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::{Content, Value};

/// Keys below the architecture's name that are understood here. Any other is refused unless it says zero or no.
const KNOWN: [&str; 27] = [
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.scale",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.finetuned",
    "tensor_data_layout",
];

/// The metadata below the architecture's name.
struct Metadata<'a> {
    content: &'a Content,
    architecture: String,
}

impl Metadata<'_> {
    fn find(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(&format!("{}.{key}", self.architecture))
    }

    fn number(&self, key: &str) -> Result<usize> {
        let name = format!("{}.{key}", self.architecture);
        let value = self.find(key).with_context(|| format!("the GGUF has no `{name}`"))?;
        integer(value).with_context(|| format!("the GGUF's `{name}`"))
    }

    fn number_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.find(key).is_some() { self.number(key) } else { Ok(default) }
    }

    fn real(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.find(key) else { return Ok(None) };
        let value = value.to_f32().with_context(|| format!("the GGUF's `{}.{key}`", self.architecture))?;
        Ok(Some(shortest(value)))
    }

    fn real_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.real(key)?.unwrap_or(default))
    }

    fn refuse_unknown(&self) -> Result<()> {
        let prefix = format!("{}.", self.architecture);
        let mut names: Vec<_> = self.content.metadata.iter().collect();
        names.sort_by_key(|(name, _)| name.as_str());
        for (name, value) in names {
            let Some(key) = name.strip_prefix(&prefix) else { continue };
            let says_no = match value {
                Value::Bool(v) => !v,
                Value::F32(v) => *v == 0.0,
                other => integer(other).is_ok_and(|v| v == 0),
            };
            // Only the false value of this one asks for something else.
            let causal = key == "attention.causal" && matches!(value, Value::Bool(true));
            if !KNOWN.contains(&key) && !causal && (!says_no || key == "attention.causal") {
                bail!("the GGUF asks for `{name}` = {value:?}, which this decoder does not do");
            }
        }
        Ok(())
    }
}

impl Config {
    /// Reads the metadata of a GGUF file; divisors of the frequencies, which are a tensor, come later.
    pub fn from_gguf(content: &Content) -> Result<Self> {
        let architecture = content
            .metadata
            .get("general.architecture")
            .context("the GGUF has no `general.architecture`")?
            .to_string()?
            .clone();
        let m = Metadata { content, architecture };
        let a = m.architecture.as_str();
        let vocab_size = content
            .tensor_infos
            .get("token_embd.weight")
            .and_then(|t| t.shape.dims().first().copied())
            .context("the GGUF has no `token_embd.weight`")?;
        // An unknown architecture is named before its keys are looked for.
        let shape = || -> Result<Shape> {
            let (hidden_size, n_heads) = (m.number("embedding_length")?, m.number("attention.head_count")?);
            Ok(Shape {
                hidden_size,
                intermediate_size: m.number("feed_forward_length")?,
                n_layers: m.number("block_count")?,
                n_heads,
                n_kv_heads: m.number_or("attention.head_count_kv", n_heads)?,
                head_dim: m.number_or("attention.key_length", hidden_size / n_heads.max(1))?,
                vocab_size,
                max_positions: m.number("context_length")?,
                norm_eps: m.real_or("attention.layer_norm_rms_epsilon", 1e-5)?,
                tied_head: !content.tensor_infos.contains_key("output.weight"),
            })
        };
        let mut config = Config::of_family(a, shape()?)?;
        m.refuse_unknown()?;
        for key in ["attention.value_length", "rope.dimension_count"] {
            let found = m.number_or(key, config.head_dim)?;
            if found != config.head_dim {
                bail!("`{a}.{key}` is {found} and heads have {} elements: not supported", config.head_dim);
            }
        }
        for (i, module) in Module::ALL.into_iter().enumerate() {
            config.biased[i] |= content.tensor_infos.contains_key(&format!("blk.0.{}.bias", module.gguf()));
        }
        attention(&m, &mut config)?;
        rotation(&m, &mut config)?;
        config.validated()
    }
}

fn attention(m: &Metadata<'_>, config: &mut Config) -> Result<()> {
    let positive = |v: Option<f64>| v.map(|v| v as f32).filter(|v| *v != 0.0);
    if config.architecture == "gemma2" {
        (config.attention_cap, config.logit_cap) = (Some(50.0), Some(30.0));
    }
    if let Some(cap) = m.real("attn_logit_softcapping")? {
        config.attention_cap = positive(Some(cap));
    }
    if let Some(cap) = m.real("final_logit_softcapping")? {
        config.logit_cap = positive(Some(cap));
    }
    // The 27B models of Gemma scale by hidden size over heads; no key says so, llama.cpp goes by their depth too.
    if matches!((config.architecture.as_str(), config.n_layers), ("gemma2", 46) | ("gemma3", 62)) {
        config.attention_scale = 1.0 / ((config.hidden_size / config.n_heads) as f32).sqrt();
    }
    if let Some(scale) = positive(m.real("attention.scale")?) {
        config.attention_scale = scale;
    }
    let default = if config.architecture == "gemma2" { 4096 } else { 0 };
    let window = match m.number_or("attention.sliding_window", default)? {
        0 => return Ok(()),
        window => window,
    };
    let n = config.n_layers;
    let sliding = match (m.find("attention.sliding_window_pattern"), config.architecture.as_str()) {
        (Some(Value::Array(blocks)), _) => {
            blocks.iter().map(|b| Ok(b.to_bool()?)).collect::<Result<Vec<bool>>>()?
        }
        (Some(period), _) => alternating(n, integer(period)?),
        (None, "gemma2") => alternating(n, 2),
        (None, "gemma3") => alternating(n, 6),
        (None, _) => vec![true; n],
    };
    let rope = |sliding| usize::from(sliding && config.architecture == "gemma3");
    config.layers = sliding.iter().map(|&s| Layer { window: s.then_some(window), rope: rope(s) }).collect();
    Ok(())
}

fn rotation(m: &Metadata<'_>, config: &mut Config) -> Result<()> {
    let original = m.number_or("rope.scaling.original_context_length", config.max_positions)? as f64;
    let factor = m.real("rope.scaling.factor")?;
    // A factor alone is a linear one.
    let default = if factor.is_some_and(|f| f != 0.0) { "linear" } else { "none" };
    let kind = match m.find("rope.scaling.type") {
        Some(kind) => kind.to_string()?.as_str(),
        None => default,
    };
    let need = || factor.with_context(|| format!("rope scaling `{kind}` needs a factor"));
    let scaling = match kind {
        "none" => Scaling::Plain,
        "linear" => Scaling::Linear { factor: need()? },
        "yarn" => {
            let factor = need()?;
            let magnitude = match m.real_or("rope.scaling.yarn_log_multiplier", 0.0)? {
                0.0 => yarn_magnitude(factor, 1.0),
                all => yarn_magnitude(factor, 1.0) / yarn_magnitude(factor, all),
            };
            Scaling::Yarn {
                factor,
                beta_fast: m.real_or("rope.scaling.yarn_beta_fast", 32.0)?,
                beta_slow: m.real_or("rope.scaling.yarn_beta_slow", 1.0)?,
                original,
                magnitude,
                truncate: true,
            }
        }
        other => bail!("rope scaling `{other}` is not supported; supported: none, linear, yarn"),
    };
    let theta = m.real_or("rope.freq_base", 10_000.0)?;
    config.ropes = vec![Rope { theta, scaling }];
    if config.architecture == "gemma3" {
        let theta = m.real_or("rope.freq_base_swa", 10_000.0)?;
        config.ropes.push(Rope { theta, scaling: Scaling::Plain });
    } else if m.real("rope.freq_base_swa")?.is_some_and(|swa| swa != theta) {
        bail!("a rotation of its own for sliding attention is not supported in `{}`", m.architecture);
    }
    let beta = m.real_or("attention.temperature_scale", 0.0)?;
    config.query_growth = (beta != 0.0).then_some(QueryGrowth { beta, original });
    Ok(())
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
