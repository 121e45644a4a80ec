//! The families as llama.cpp's converter writes them, against the same weights in a folder.

use crate::families::FAMILIES;
use crate::fixture::*;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use emaudit_train::quant::Storage;
use std::collections::BTreeMap;
use std::path::Path;

const NAMES: [(&str, &str); 16] = [
    ("model.layers.", "blk."),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attn_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// llama.cpp's converter for interleaved rotation: rows of q and k, head by head.
fn permuted(weight: &Tensor, heads: usize) -> Tensor {
    let dims = weight.dims().to_vec();
    let rest: usize = dims[1..].iter().product();
    let pairs = weight.reshape((heads, 2, dims[0] / heads / 2, rest)).unwrap();
    pairs.transpose(1, 2).unwrap().contiguous().unwrap().reshape(dims).unwrap()
}

/// The fixture's weights in f32, FP8 decoded, without what surrounds a text model.
fn weights(name: &str) -> BTreeMap<String, Tensor> {
    let file = path(&format!("families/{name}/model.safetensors"));
    let stored = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let as_f32 = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    let mut out = BTreeMap::new();
    for (key, tensor) in &stored {
        let kept =
            !["_scale_inv", "activation_scale"].iter().any(|e| key.ends_with(e)) && !key.contains("vision");
        if !kept {
            continue;
        }
        let mut value = as_f32(tensor);
        if let Some(scale) = stored.get(&format!("{key}_scale_inv")) {
            let scale = as_f32(scale);
            let (rows, cols) = value.dims2().unwrap();
            let grid = if scale.rank() == 0 { scale.reshape((1, 1)).unwrap() } else { scale };
            let (r, c) = grid.dims2().unwrap();
            let blocks = value.reshape((r, rows / r, c, cols / c)).unwrap();
            let grid = grid.reshape((r, 1, c, 1)).unwrap();
            value = blocks.broadcast_mul(&grid).unwrap().reshape((rows, cols)).unwrap();
        }
        out.insert(key.trim_start_matches("language_model.").to_owned(), value);
    }
    out
}

/// What the converter adds to the keys that all families have.
fn own_metadata(name: &str) -> Vec<(&'static str, Value)> {
    let bools = |list: &[bool]| Value::Array(list.iter().map(|&b| Value::Bool(b)).collect());
    let (u, f) = (Value::U32, Value::F32);
    match name {
        "llama3" => vec![("rope.freq_base", f(100.0)), ("rope.scaling.finetuned", Value::Bool(true))],
        "qwen2" => vec![
            ("rope.freq_base", f(500.0)),
            ("attention.sliding_window", u(5)),
            ("attention.sliding_window_pattern", bools(&[false, true, true])),
        ],
        "qwen3" => vec![("rope.freq_base", f(500.0))],
        "gemma2" => vec![
            ("rope.freq_base", f(500.0)),
            ("attention.sliding_window", u(4)),
            ("attn_logit_softcapping", f(1.5)),
            ("final_logit_softcapping", f(5.0)),
            ("attention.scale", f(1.0 / 20f32.sqrt())),
        ],
        "gemma3" => vec![
            ("rope.freq_base", f(700.0)),
            ("rope.freq_base_swa", f(30.0)),
            ("rope.scaling.type", Value::String("linear".into())),
            ("rope.scaling.factor", f(4.0)),
            ("attention.sliding_window", u(4)),
            ("attention.sliding_window_pattern", u(3)),
            ("final_logit_softcapping", f(6.0)),
            ("attention.scale", f(1.0 / 20f32.sqrt())),
        ],
        "mistral" => vec![("rope.freq_base", f(500.0)), ("attention.sliding_window", u(5))],
        "ministral3" => vec![
            ("rope.freq_base", f(100.0)),
            ("rope.scaling.type", Value::String("yarn".into())),
            ("rope.scaling.factor", f(4.0)),
            ("rope.scaling.original_context_length", u(8)),
            ("rope.scaling.yarn_beta_fast", f(2.0)),
            ("rope.scaling.yarn_beta_slow", f(0.5)),
            ("rope.scaling.yarn_log_multiplier", f(0.5)),
            ("attention.temperature_scale", f(0.3)),
        ],
        other => panic!("{other}"),
    }
}

/// llama.cpp's converter writes Llama 3's scaling as a divisor per frequency (`rope_freqs.weight`).
fn llama3_divisors() -> Tensor {
    let (base, dim, factor, low, high, context) = (100f64, 12usize, 4f64, 1f64, 4f64, 32f64);
    let divisor = |i: usize| {
        let wave = 2.0 * std::f64::consts::PI * base.powf(2.0 * i as f64 / dim as f64);
        let smooth = (context / wave - low) / (high - low);
        match () {
            _ if wave < context / high => 1.0,
            _ if wave > context / low => factor,
            _ => 1.0 / ((1.0 - smooth) / factor + smooth),
        }
    };
    let divisors: Vec<f32> = (0..dim / 2).map(|i| divisor(i) as f32).collect();
    assert!(divisors.contains(&1.0) && divisors.contains(&4.0));
    assert!(divisors.iter().any(|d| (1.01..3.99).contains(d)), "{divisors:?}");
    Tensor::new(divisors, &Device::Cpu).unwrap()
}

type Parts = (BTreeMap<String, Tensor>, BTreeMap<String, Value>);

/// Writes a family's fixture as a GGUF file, tensors and metadata changed by `edit`.
fn write(file: &Path, name: &str, architecture: &str, edit: impl FnOnce(&mut Parts)) {
    let gemma = architecture.starts_with("gemma");
    let interleaved = ["llama", "mistral3"].contains(&architecture);
    let mut tensors = BTreeMap::new();
    for (key, tensor) in weights(name) {
        let tensor = match () {
            _ if interleaved && key.contains("q_proj") => permuted(&tensor, 4),
            _ if interleaved && key.contains("k_proj") => permuted(&tensor, 2),
            _ if gemma && key.contains("norm") => (tensor + 1.0).unwrap(),
            _ => tensor,
        };
        let post = if gemma { "post_attention_norm" } else { "ffn_norm" };
        let mut key = key.replace("post_attention_layernorm", post);
        for (theirs, ours) in NAMES {
            key = key.replace(theirs, ours);
        }
        tensors.insert(key, tensor);
    }
    if name == "llama3" {
        tensors.insert("rope_freqs.weight".into(), llama3_divisors());
    }
    let layers = if name == "gemma3" { 4 } else { 3 };
    let eps = if ["llama3", "ministral3"].contains(&name) { 1e-5 } else { 1e-6 };
    let shape = [
        ("embedding_length", Value::U32(32)),
        ("feed_forward_length", Value::U32(48)),
        ("block_count", Value::U32(layers)),
        ("attention.head_count", Value::U32(4)),
        ("attention.head_count_kv", Value::U32(2)),
        ("attention.layer_norm_rms_epsilon", Value::F32(eps)),
        ("context_length", Value::U32(64)),
        ("vocab_size", Value::U32(96)),
    ];
    let mut metadata: BTreeMap<String, Value> = BTreeMap::new();
    let dim = if name == "qwen2" { 8 } else { 12 };
    let heads = ["attention.key_length", "attention.value_length", "rope.dimension_count"];
    let heads = heads.map(|key| (key, Value::U32(dim)));
    for (key, value) in shape.into_iter().chain(heads).chain(own_metadata(name)) {
        metadata.insert(format!("{architecture}.{key}"), value);
    }
    metadata.insert("general.architecture".into(), Value::String(architecture.into()));
    let mut parts = (tensors, metadata);
    edit(&mut parts);
    let quantized: Vec<(String, QTensor)> =
        parts.0.into_iter().map(|(k, t)| (k, QTensor::quantize(&t, GgmlDType::F32).unwrap())).collect();
    let tensors: Vec<(&str, &QTensor)> = quantized.iter().map(|(k, t)| (k.as_str(), t)).collect();
    let metadata: Vec<(&str, &Value)> = parts.1.iter().map(|(k, v)| (k.as_str(), v)).collect();
    gguf_file::write(&mut std::fs::File::create(file).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn a_gguf_of_the_same_weights_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    for (name, architecture) in FAMILIES {
        let file = folder.path().join(format!("{name}.gguf"));
        write(&file, name, architecture, |_| ());
        let gguf = load(&file, Storage::None).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        let stored = load(&path(&format!("families/{name}")), Storage::None).unwrap();
        let golden = Golden::open(&format!("families/{name}/golden.safetensors"));
        let (own, expected) = (logits(&gguf, &golden.ids(0), None), logits(&stored, &golden.ids(0), None));
        if name == "llama3" {
            // The divisors are rounded to f32, the configuration's own are not.
            let allowed = logits_tolerance(&gguf.config, golden.ids(0).len());
            assert_close(name, &own, &expected, allowed);
            continue;
        }
        assert_eq!(gguf.config, stored.config, "{name}");
        assert_same(name, &own, &expected);
    }
}

#[test]
fn what_a_gguf_asks_for_and_the_decoder_does_not_do_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    let refused = |name: &str, architecture: &str, says: &[&str], edit: &dyn Fn(&mut Parts)| {
        write(&file, name, architecture, edit);
        let error = format!("{:#}", load(&file, Storage::None).err().expect("this should have been refused"));
        for part in says {
            assert!(error.contains(part), "`{part}` is missing from: {error}");
        }
    };
    let set = |key: &'static str, value: Value| {
        move |p: &mut Parts| {
            p.1.insert(key.to_owned(), value.clone());
        }
    };
    let text = |s: &str| Value::String(s.into());
    for (key, value, says) in [
        ("qwen3.expert_count", Value::U32(8), "qwen3.expert_count"),
        ("qwen3.rope.scaling.type", text("longrope"), "longrope"),
        ("qwen3.rope.scaling.type", text("linear"), "needs a factor"),
        ("qwen3.rope.dimension_count", Value::U32(6), "rope.dimension_count"),
        ("qwen3.attention.causal", Value::Bool(false), "attention.causal"),
        ("qwen3.rope.scale_linear", Value::F32(2.0), "rope.scale_linear"),
        ("qwen3.residual_scale", Value::F32(0.5), "residual_scale"),
        ("qwen3.attention.head_count", text("four"), "attention.head_count"),
    ] {
        refused("qwen3", "qwen3", &[says], &set(key, value));
    }
    // Zero and no ask for nothing.
    write(&file, "qwen3", "qwen3", set("qwen3.expert_count", Value::U32(0)));
    load(&file, Storage::None).unwrap();
    // A part of the network that would be left out.
    let extra = |p: &mut Parts| {
        let norm = p.0["blk.1.attn_q_norm.weight"].clone();
        p.0.insert("blk.1.attn_output_norm.weight".into(), norm);
    };
    refused("qwen3", "qwen3", &["blk.1.attn_output_norm.weight", "belongs to no part"], &extra);
    let lost = |p: &mut Parts| drop(p.0.remove("blk.1.attn_k_norm.weight"));
    refused("qwen3", "qwen3", &["blk.1.attn_k_norm.weight"], &lost);
    let short = |p: &mut Parts| {
        p.0.insert("rope_freqs.weight".into(), Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap());
    };
    refused("llama3", "llama", &["rope_freqs.weight", "6 positive"], &short);
    refused("llama3", "llama", &["both"], &|p: &mut Parts| {
        p.1.insert("llama.rope.scaling.type".into(), Value::String("linear".into()));
        p.1.insert("llama.rope.scaling.factor".into(), Value::F32(2.0));
    });
}

/// Every tensor type against the gguf package.
#[test]
fn tensor_types_decode_as_in_the_gguf_package() {
    let mut file = std::fs::File::open(path("types.gguf")).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let golden = candle_core::safetensors::load(path("types.safetensors"), &Device::Cpu).unwrap();
    assert_eq!((golden.len(), content.tensor_infos.len()), (13, 13));
    for (name, expected) in &golden {
        let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
        let own = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap();
        // d * scale * q - dmin * m: four roundings on either side.
        assert_close(name, &own, expected, 8.0 * 2f32.powi(-24));
    }
}
