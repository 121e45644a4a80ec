//! What is wrong is refused, and the error names it.

use crate::decoder::write_gguf;
use crate::fixture::*;
use candle_core::{DType, Device, Tensor};
use emaudit_train::lora::Adapter;
use emaudit_train::quant::Storage;
use std::collections::BTreeMap;
use std::path::Path;

type Tensors = BTreeMap<String, Tensor>;

fn zeros(rows: usize, cols: usize) -> Tensor {
    Tensor::zeros((rows, cols), DType::F32, &Device::Cpu).unwrap()
}

#[track_caller]
fn expect(error: Option<anyhow::Error>, names: &[&str]) {
    let error = format!("{:#}", error.expect("this should have been refused"));
    println!("{error}");
    for name in names {
        assert!(error.contains(name), "`{name}` is missing from: {error}");
    }
}

#[track_caller]
fn refused_model(names: &[&str], edit: impl FnOnce(&mut Tensors, &mut serde_json::Value)) {
    let folder = edited(edit);
    expect(load(folder.path(), Storage::None).err(), names);
}

#[track_caller]
fn refused_adapter(names: &[&str], edit: impl FnOnce(&mut Tensors, &mut serde_json::Value)) {
    let folder = edited_adapter(edit);
    expect(Adapter::load(folder.path(), &tiny()).err(), names);
}

#[test]
fn tensors_that_are_missing_or_misshapen() {
    let k = "model.layers.1.self_attn.k_proj.weight";
    refused_model(&[k, "[48, 60]", "[48, 64]"], |t, _| {
        t.insert(k.into(), zeros(48, 60));
    });
    refused_model(&[k], |t, _| {
        t.remove(k);
    });
    for name in ["model.norm.weight", "model.embed_tokens.weight", "model.layers.2.input_layernorm.weight"] {
        refused_model(&[name], |t, _| {
            t.remove(name);
        });
    }
    refused_model(&["model.layers.3."], |_, c| c["num_hidden_layers"] = 4.into());
    refused_model(&["model.embed_tokens.weight", "[128, 64]", "[129, 64]"], |_, c| {
        c["vocab_size"] = 129.into()
    });
    refused_model(&[k, "F64"], |t, _| {
        let wide = t[k].to_dtype(DType::F64).unwrap();
        t.insert(k.into(), wide);
    });
}

/// Trap: transformers would draw a random head, and a loader that falls back to the embedding answers nonsense.
#[test]
fn a_head_of_its_own_that_is_not_there() {
    refused_model(&["lm_head.weight"], |t, _| {
        t.remove("lm_head.weight");
    });
    // The default of the Llama family is a head of its own.
    refused_model(&["lm_head.weight"], |t, c| {
        t.remove("lm_head.weight");
        c.as_object_mut().unwrap().remove("tie_word_embeddings");
    });
}

#[test]
fn configurations_that_are_not_understood() {
    refused_model(&["gpt2", "not supported"], |_, c| c["model_type"] = "gpt2".into());
    refused_model(&["gelu"], |_, c| c["hidden_act"] = "gelu".into());
    refused_model(&["longrope", "supported: default, linear"], |_, c| {
        c["rope_parameters"]["rope_type"] = "longrope".into()
    });
    refused_model(&["llama3", "low_freq_factor"], |_, c| {
        c["rope_scaling"] = serde_json::json!({"type": "llama3", "factor": 2.0})
    });
    refused_model(&["rope parameters", "spiral"], |_, c| c["rope_parameters"]["spiral"] = 2.0.into());
    refused_model(&["not a positive number"], |_, c| {
        c["rope_scaling"] = serde_json::json!({"type": "linear", "factor": 0.0})
    });
    refused_model(&["partial_rotary_factor"], |_, c| c["partial_rotary_factor"] = 0.5.into());
    refused_model(&["sliding_window"], |_, c| c["sliding_window"] = 8.into());
    refused_model(&["chunked_attention"], |_, c| {
        c["layer_types"] = serde_json::json!(vec!["chunked_attention"; 3])
    });
    refused_model(&["`layer_types` names 2"], |_, c| {
        c["layer_types"] = serde_json::json!(vec!["full_attention"; 2])
    });
    refused_model(&["says no width"], |_, c| {
        c["layer_types"] = serde_json::json!(vec!["sliding_attention"; 3])
    });
    refused_model(&["gptq", "fp8"], |_, c| {
        c["quantization_config"] = serde_json::json!({"quant_method": "gptq"})
    });
    refused_model(&["`use_bidirectional_attention`"], |_, c| c["use_bidirectional_attention"] = true.into());
    refused_model(&["n_heads: 0"], |_, c| {
        c["num_attention_heads"] = 0.into();
        c["num_key_value_heads"] = 1.into();
    });
    refused_model(&["n_kv_heads: 3"], |_, c| c["num_key_value_heads"] = 3.into());
    refused_model(&["config.json", "hidden_size"], |_, c| {
        c.as_object_mut().unwrap().remove("hidden_size");
    });
}

/// A tensor that nothing asks for is a part of the network: left out, it would be another model.
#[test]
fn tensors_that_would_be_left_out() {
    for extra in
        ["model.layers.1.self_attn.q_proj.bias", "model.layers.2.self_attn.q_norm.weight", "model.gate"]
    {
        refused_model(&[extra, "belongs to no part"], |t, _| {
            t.insert(extra.into(), zeros(1, 1));
        });
    }
    // What transformers does not read either.
    let folder = edited(|t, _| {
        for unread in ["model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.weight"] {
            t.insert(unread.into(), zeros(1, 1));
        }
    });
    load(folder.path(), Storage::None).unwrap();
    // The configuration asks for a bias that is not there.
    refused_model(&["model.layers.0.self_attn.q_proj.bias"], |_, c| c["attention_bias"] = true.into());
}

#[test]
fn an_index_that_names_what_is_not_there() {
    let folder = edited(|_, _| ());
    let index = folder.path().join("model.safetensors.index.json");
    for (file, says) in [("model-00002-of-00002.safetensors", "00002"), ("../model.safetensors", "../")] {
        let map = serde_json::json!({"weight_map": {"model.norm.weight": file}});
        std::fs::write(&index, map.to_string()).unwrap();
        expect(load(folder.path(), Storage::None).err(), &[says, "not in the folder"]);
    }
    std::fs::write(&index, "[]").unwrap();
    expect(load(folder.path(), Storage::None).err(), &["not an index"]);
}

#[test]
fn files_that_are_damaged_or_absent() {
    let folder = edited(|_, _| ());
    let file = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let huge = [&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat();
    for damaged in
        [&bytes[..bytes.len() - 4], &bytes[..20], &bytes[..4], b"", &huge, &[&bytes[..], b"0000"].concat()]
    {
        std::fs::write(&file, damaged).unwrap();
        expect(load(folder.path(), Storage::None).err(), &["model.safetensors"]);
    }
    std::fs::remove_file(&file).unwrap();
    expect(load(folder.path(), Storage::None).err(), &["model*.safetensors"]);
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    expect(load(folder.path(), Storage::None).err(), &[]);
    expect(load(Path::new("nowhere/model.gguf"), Storage::None).err(), &["nowhere/model.gguf"]);
    let not_gguf = folder.path().join("text.gguf");
    std::fs::write(&not_gguf, "some text, and then some more of it").unwrap();
    expect(load(&not_gguf, Storage::None).err(), &["text.gguf", "not a GGUF file"]);
}

#[test]
fn gguf_files_of_other_models_or_with_holes() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    for missing in ["blk.1.attn_k.weight", "output_norm.weight", "token_embd.weight"] {
        write_gguf(&file, "llama", Some(missing));
        expect(load(&file, Storage::None).err(), &[missing]);
    }
    write_gguf(&file, "mamba", None);
    expect(load(&file, Storage::None).err(), &["mamba", "not supported"]);
}

#[test]
fn weights_that_are_not_numbers_do_not_become_nf4() {
    let k = "model.layers.1.self_attn.k_proj.weight";
    let folder = edited(|t, _| {
        let damaged = (zeros(48, 64) / 0.0).unwrap();
        t.insert(k.into(), damaged);
    });
    expect(load(folder.path(), Storage::Nf4).err(), &[k, "not finite"]);
}

#[test]
fn adapters_of_other_models() {
    let q = "base_model.model.model.layers.1.self_attn.q_proj";
    // Another width.
    refused_adapter(&[q, "[4, 80]", "[4, 64]"], |t, _| {
        t.insert(format!("{q}.lora_A.weight"), zeros(4, 80));
    });
    // More blocks.
    refused_adapter(&["base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"], |t, _| {
        for part in ["A", "B"] {
            let copy = t[&format!("{q}.lora_{part}.weight")].clone();
            t.insert(format!("base_model.model.model.layers.3.self_attn.q_proj.lora_{part}.weight"), copy);
        }
    });
    // Another naming of the layers.
    refused_adapter(&["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"], |t, _| {
        t.insert("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight".into(), zeros(4, 64));
    });
    // A rank that the configuration does not say.
    refused_adapter(&["self_attn.q_proj"], |_, c| c["r"] = 8.into());
    refused_adapter(&["no LoRA tensors"], |t, _| t.clear());
}

#[test]
fn half_a_lora() {
    for part in ["A", "B"] {
        let name = format!("base_model.model.model.layers.1.mlp.up_proj.lora_{part}.weight");
        refused_adapter(&["base_model.model.model.layers.1.mlp.up_proj", "lora_A", "lora_B"], |t, _| {
            t.remove(&name);
        });
    }
}

#[test]
fn adapters_that_are_more_than_a_lora() {
    refused_adapter(&["LOHA"], |_, c| c["peft_type"] = "LOHA".into());
    refused_adapter(&["missing"], |_, c| {
        c.as_object_mut().unwrap().remove("peft_type");
    });
    for key in ["use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"] {
        refused_adapter(&[key], |_, c| c[key] = true.into());
    }
    for key in ["rank_pattern", "alpha_pattern"] {
        refused_adapter(&[key], |_, c| c[key] = serde_json::json!({"q_proj": 8}));
    }
    refused_adapter(&["modules_to_save"], |_, c| c["modules_to_save"] = serde_json::json!(["lm_head"]));
    refused_adapter(&["alora_invocation_tokens"], |_, c| {
        c["alora_invocation_tokens"] = serde_json::json!([1, 2])
    });
    refused_adapter(&["layer_replication"], |_, c| {
        c["layer_replication"] = serde_json::json!([[0, 3], [1, 3]])
    });
    // These change the base weights when they start, so the saved update alone is not the model.
    for start in ["pissa", "pissa_niter_16", "olora", "corda", "loftq"] {
        refused_adapter(&["init_lora_weights", start], |_, c| c["init_lora_weights"] = start.into());
    }
    refused_adapter(&["`r`"], |_, c| c["r"] = 0.into());
    // These leave them alone.
    for start in [serde_json::json!(true), "gaussian".into(), "orthogonal".into()] {
        let folder = edited_adapter(|_, c| c["init_lora_weights"] = start);
        assert!(Adapter::load(folder.path(), &tiny()).is_ok());
    }
}
