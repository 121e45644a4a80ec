//! `config.json` of a transformers folder, the text model inside a multimodal one included.

use super::{Config, Layer, QueryGrowth, Shape, alternating};
use crate::model::Activation;
use crate::model::rope::{Rope, Scaling, yarn_magnitude};
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The keys of `config.json` that these families' classes in transformers compute with.
#[derive(serde::Deserialize)]
struct Text {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_local_base_freq: Option<f64>,
    rope_parameters: Option<Map<String, Value>>,
    rope_scaling: Option<Map<String, Value>>,
    partial_rotary_factor: Option<f64>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    sliding_window: Option<usize>,
    sliding_window_pattern: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    query_pre_attn_scalar: Option<f32>,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
    use_bidirectional_attention: Option<bool>,
    tie_word_embeddings: Option<bool>,
    quantization_config: Option<Value>,
}

/// One rotation as `rope_parameters` or `rope_scaling` write it.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RopeParameters {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// The older name.
    r#type: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    attention_factor: Option<f64>,
    truncate: Option<bool>,
    llama_4_scaling_beta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    /// Ministral 3 repeats the model's own.
    #[serde(rename = "max_position_embeddings")]
    _max_position_embeddings: Option<f64>,
}

fn default_positions() -> usize {
    2048
}
fn default_eps() -> f64 {
    1e-6
}

/// What transformers assumes where `config.json` is silent, as published files are: Gemma's leave most of it out.
fn defaults(model_type: &str) -> Value {
    let gemma = json!({
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": true,
    });
    let mistral = json!({
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
    });
    let over = |base: Value, own: Value| {
        let (Value::Object(mut base), Value::Object(own)) = (base, own) else { return Value::Null };
        base.extend(own);
        Value::Object(base)
    };
    match model_type {
        "gemma2" => over(
            gemma,
            json!({"vocab_size": 256000, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
                   "final_logit_softcapping": 30.0}),
        ),
        "gemma3_text" => over(
            gemma,
            json!({"vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6,
                   "rope_local_base_freq": 1e4}),
        ),
        "mistral" => mistral,
        "ministral3" => over(
            mistral,
            json!({"vocab_size": 131072, "num_hidden_layers": 34, "head_dim": 128, "max_position_embeddings": 262144,
                   "rms_norm_eps": 1e-5, "sliding_window": null,
                   "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0,
                       "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
                       "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}}),
        ),
        _ => json!({}),
    }
}

impl Config {
    /// Reads `config.json` of a transformers folder.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let parsed = serde_json::from_str(&text).map_err(anyhow::Error::from).and_then(read);
        parsed
            .and_then(Config::validated)
            .with_context(|| format!("{} is no configuration that this decoder runs", path.display()))
    }
}

/// The text model's own part, with defaults filled in, and its `model_type`.
fn text_part(whole: Value) -> Result<(Text, String)> {
    let Value::Object(outer) = whole else { bail!("it is not an object") };
    let kind = |map: &Map<String, Value>| Some(map.get("model_type")?.as_str()?.to_owned());
    let outer_kind = kind(&outer).context("it has no `model_type`")?;
    let inner = match outer.get("text_config") {
        Some(Value::Object(inner)) => inner.clone(),
        _ => outer.clone(),
    };
    let model_type = match (outer_kind.as_str(), kind(&inner)) {
        ("gemma3", None) => "gemma3_text".to_owned(),
        ("mistral3", None) => "mistral".to_owned(),
        (_, Some(inner)) => inner,
        (outer, None) => outer.to_owned(),
    };
    let Value::Object(mut map) = defaults(&model_type) else { bail!("`{model_type}` is not supported") };
    let tied = inner.get("tie_word_embeddings").or(outer.get("tie_word_embeddings")).cloned();
    map.extend(inner);
    // A multimodal model is tied unless it says otherwise.
    let nested = outer.contains_key("text_config").then_some(Value::Bool(true));
    if let Some(tied) = tied.or(nested) {
        map.insert("tie_word_embeddings".into(), tied);
    }
    if let Some(quantization) = outer.get("quantization_config") {
        map.insert("quantization_config".into(), quantization.clone());
    }
    Ok((serde_json::from_value(Value::Object(map))?, model_type))
}

fn read(whole: Value) -> Result<Config> {
    let (text, model_type) = text_part(whole)?;
    let architecture = match model_type.as_str() {
        "mistral" => "llama",
        "ministral3" => "mistral3",
        "gemma3_text" => "gemma3",
        other => other,
    };
    let gemma = matches!(architecture, "gemma2" | "gemma3");
    let mut config = Config::of_family(
        architecture,
        Shape {
            hidden_size: text.hidden_size,
            intermediate_size: text.intermediate_size,
            n_layers: text.num_hidden_layers,
            n_heads: text.num_attention_heads,
            n_kv_heads: text.num_key_value_heads.unwrap_or(text.num_attention_heads),
            head_dim: text.head_dim.unwrap_or(match architecture {
                "qwen3" => 128,
                _ => text.hidden_size / text.num_attention_heads.max(1),
            }),
            vocab_size: text.vocab_size,
            max_positions: text.max_position_embeddings,
            norm_eps: text.rms_norm_eps,
            tied_head: text.tie_word_embeddings.unwrap_or(false),
        },
    )?;
    config.activation = activation(&text, gemma)?;
    refuse(&text, architecture, &model_type)?;
    for (i, biased) in config.biased.iter_mut().enumerate() {
        *biased |= if i < 4 { text.attention_bias } else { text.mlp_bias };
    }
    if gemma {
        config.attention_scale = 1.0 / text.query_pre_attn_scalar.unwrap_or(256.0).sqrt();
        config.attention_cap = text.attn_logit_softcapping;
        config.logit_cap = text.final_logit_softcapping;
    }
    let sliding = sliding(&text, &model_type)?;
    let qwen = matches!(architecture, "qwen2" | "qwen3");
    let window = text.sliding_window.filter(|_| !qwen || text.use_sliding_window);
    if sliding.contains(&true) && window.is_none() {
        bail!("`layer_types` has sliding attention and `sliding_window` says no width");
    }
    let layer =
        |&s: &bool| Layer { window: window.filter(|_| s), rope: usize::from(s && architecture == "gemma3") };
    config.layers = sliding.iter().map(layer).collect();
    (config.ropes, config.query_growth) = ropes(&text, architecture)?;
    Ok(config)
}

fn activation(text: &Text, gemma: bool) -> Result<Activation> {
    let name = if gemma { &text.hidden_activation } else { &text.hidden_act };
    match name.as_deref().unwrap_or(if gemma { "gelu_pytorch_tanh" } else { "silu" }) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => bail!("activation `{other}` is not supported; supported: silu, gelu_pytorch_tanh"),
    }
}

fn refuse(text: &Text, architecture: &str, model_type: &str) -> Result<()> {
    if text.use_bidirectional_attention == Some(true) {
        bail!("`use_bidirectional_attention` is not supported: a decoder sees only what came before");
    }
    if text.partial_rotary_factor.is_some_and(|f| f != 1.0) {
        bail!("`partial_rotary_factor` other than 1 is not supported");
    }
    if architecture == "llama" && model_type == "llama" && text.sliding_window.is_some() {
        bail!("`sliding_window` has no meaning in a Llama; a Mistral says so in `model_type`");
    }
    // transformers reads the key and never uses it; whoever wrote it meant something else.
    if architecture == "gemma3" && text.attn_logit_softcapping.is_some() {
        bail!("`attn_logit_softcapping` has no meaning in Gemma 3");
    }
    if let Some(method) = text.quantization_config.as_ref().filter(|q| !q.is_null()) {
        let name = method.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
        if name != "fp8" {
            bail!("weights quantised by `{name}` are not supported; supported: fp8, or a GGUF file");
        }
    }
    Ok(())
}

/// Which blocks attend within the window.
fn sliding(text: &Text, model_type: &str) -> Result<Vec<bool>> {
    let n = text.num_hidden_layers;
    if let Some(types) = &text.layer_types {
        if types.len() != n {
            bail!("`layer_types` names {} layers, `num_hidden_layers` is {n}", types.len());
        }
        let sliding = |t: &String| match t.as_str() {
            "full_attention" => Ok(false),
            "sliding_attention" => Ok(true),
            other => bail!("attention of the type `{other}` is not supported"),
        };
        return types.iter().map(sliding).collect();
    }
    Ok(match model_type {
        "mistral" | "ministral3" => vec![text.sliding_window.is_some(); n],
        "qwen2" | "qwen3" if text.use_sliding_window => {
            (0..n).map(|i| i >= text.max_window_layers.unwrap_or(28)).collect()
        }
        "gemma2" => alternating(n, 2),
        "gemma3_text" => alternating(n, text.sliding_window_pattern.unwrap_or(6)),
        _ => vec![false; n],
    })
}

/// The rotations, and the growth of queries that Ministral 3 writes among their parameters.
fn ropes(text: &Text, architecture: &str) -> Result<(Vec<Rope>, Option<QueryGrowth>)> {
    let one = |map: Option<&Value>, theta: Option<f64>| -> Result<(Rope, Option<QueryGrowth>)> {
        let map = map.filter(|m| !m.is_null()).cloned().unwrap_or_else(|| json!({}));
        let parameters: RopeParameters =
            serde_json::from_value(map).context("rope parameters that are not understood")?;
        rope(parameters, theta, text.max_position_embeddings as f64)
    };
    let written = text.rope_scaling.as_ref().or(text.rope_parameters.as_ref());
    let whole = written.map(|m| Value::Object(m.clone()));
    if architecture != "gemma3" {
        let (rope, growth) = one(whole.as_ref(), text.rope_theta)?;
        if growth.is_some() && architecture != "mistral3" {
            bail!("`llama_4_scaling_beta` has no meaning in this architecture");
        }
        return Ok((vec![rope], growth));
    }
    // Gemma 3 has one rotation for full and one for sliding attention; older files scale the first only.
    let nested = text.rope_parameters.as_ref();
    let of = |key: &str| nested.and_then(|m| m.get(key));
    let full = match text.rope_scaling.as_ref() {
        Some(scaling) => Some(Value::Object(scaling.clone())),
        None => of("full_attention").cloned(),
    };
    if let Some(stray) = nested.and_then(|m| m.keys().find(|k| !k.ends_with("_attention"))) {
        bail!("`rope_parameters` of Gemma 3 has one entry per kind of attention, found `{stray}`");
    }
    let full = one(full.as_ref(), text.rope_theta)?.0;
    let local = one(of("sliding_attention"), text.rope_local_base_freq)?.0;
    Ok((vec![full, local], None))
}

fn rope(p: RopeParameters, theta: Option<f64>, positions: f64) -> Result<(Rope, Option<QueryGrowth>)> {
    if p.partial_rotary_factor.is_some_and(|f| f != 1.0) {
        bail!("`partial_rotary_factor` other than 1 is not supported");
    }
    let kind = p.rope_type.or(p.r#type).unwrap_or_else(|| "default".to_owned());
    let need = |value: Option<f64>, name: &str| {
        value.with_context(|| format!("rope scaling `{kind}` needs a `{name}`"))
    };
    let original = p.original_max_position_embeddings.unwrap_or(positions);
    let scaling = match kind.as_str() {
        "default" => Scaling::Plain,
        "linear" => Scaling::Linear { factor: need(p.factor, "factor")? },
        "llama3" => Scaling::Llama3 {
            factor: need(p.factor, "factor")?,
            low: need(p.low_freq_factor, "low_freq_factor")?,
            high: need(p.high_freq_factor, "high_freq_factor")?,
            original,
        },
        "yarn" => {
            let factor = p.factor.unwrap_or(positions / original);
            let magnitude = match (p.attention_factor, p.mscale, p.mscale_all_dim) {
                (Some(given), ..) => given,
                (_, Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                    yarn_magnitude(factor, m) / yarn_magnitude(factor, all)
                }
                _ => yarn_magnitude(factor, 1.0),
            };
            Scaling::Yarn {
                factor,
                beta_fast: p.beta_fast.unwrap_or(32.0),
                beta_slow: p.beta_slow.unwrap_or(1.0),
                original,
                magnitude,
                truncate: p.truncate.unwrap_or(true),
            }
        }
        other => bail!("rope scaling `{other}` is not supported; supported: default, linear, llama3, yarn"),
    };
    let growth = p.llama_4_scaling_beta.map(|beta| QueryGrowth { beta, original });
    Ok((Rope { theta: p.rope_theta.or(theta).unwrap_or(10_000.0), scaling }, growth))
}
