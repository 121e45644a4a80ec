//! Forward passes: transformers' numbers, padding, cache, steering, GGUF.

use crate::fixture::*;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use emaudit_train::capture;
use emaudit_train::model::{Batch, Cache, Decoder, Prefix, no_edit};
use emaudit_train::quant::Storage;
use std::path::Path;

on_every_device!(
    logits_and_every_blocks_residual_are_those_of_transformers,
    a_vector_added_in_the_hook_is_the_vector_added_by_hand,
    a_left_padded_batch_is_its_sequences_one_by_one,
    captured_rows_are_the_last_tokens_whatever_the_order,
    decoding_with_the_cache_is_decoding_from_the_start,
    a_padded_batch_decodes_with_the_cache_and_rows_can_be_picked,
    a_beginning_read_once_changes_nothing_even_beside_padding,
);

fn logits_and_every_blocks_residual_are_those_of_transformers(device: &Device) {
    let (decoder, golden) = (tiny_on(device), Golden::open("golden.safetensors"));
    let c = &decoder.config;
    for i in 0..SEQUENCES {
        let ids = golden.ids(i);
        let (logits, residuals) = run(&decoder, &ids, None);
        assert_eq!(residuals.len(), c.n_layers);
        for (layer, x) in residuals.iter().enumerate() {
            let allowed = tolerance(roundings(c, ids.len(), layer + 1));
            assert_close(
                &format!("residual {i}.{layer}"),
                x,
                golden.get(&format!("residual.{i}.{layer}")),
                allowed,
            );
        }
        let expected = golden.get(&format!("logits.{i}"));
        assert_close(&format!("logits {i}"), &logits, expected, logits_tolerance(c, ids.len()));
    }
}

#[test]
fn a_tied_head_is_the_embedding() {
    let golden = Golden::open("golden.safetensors");
    let ids = golden.ids(0);
    // Two ways to say it: without the tensor, and with one that transformers would ignore.
    for keep in [false, true] {
        let folder = edited(|tensors, config| {
            config["tie_word_embeddings"] = true.into();
            if !keep {
                tensors.remove("lm_head.weight");
            }
        });
        let tied = load(folder.path(), Storage::None).unwrap();
        let allowed = logits_tolerance(&tied.config, ids.len());
        assert_close("tied head", &logits(&tied, &ids, None), golden.get("tied.logits"), allowed);
    }
}

fn a_vector_added_in_the_hook_is_the_vector_added_by_hand(device: &Device) {
    let (decoder, golden) = (tiny_on(device), Golden::open("golden.safetensors"));
    let (ids, vector) = (golden.ids(0), golden.get("steer.vector").to_device(device).unwrap());
    let batch = Batch::new(&[&ids], &decoder.device).unwrap();
    let site = 1;
    let mut add = |layer: usize, x: Tensor| if layer == site { x.broadcast_add(&vector) } else { Ok(x) };
    let hooked = decoder.forward(&batch, None, None, &mut add).unwrap();

    let (_, residuals) = run(&decoder, &ids, None);
    let moved = residuals[site].broadcast_add(&vector).unwrap().unsqueeze(0).unwrap();
    let by_hand = decoder.forward_from(site + 1, moved, &batch.left_pad, None, None, &mut no_edit).unwrap();
    assert_same("steered residual", &hooked, &by_hand);

    let steered = decoder.logits(&hooked.squeeze(0).unwrap()).unwrap();
    let allowed = logits_tolerance(&decoder.config, ids.len());
    assert_close("steered logits", &steered, golden.get("steer.logits"), allowed);
    assert!(
        deviation(&logits(&decoder, &ids, None), golden.get("steer.logits")) > 0.05,
        "steering does nothing"
    );
}

fn a_left_padded_batch_is_its_sequences_one_by_one(device: &Device) {
    let (decoder, golden) = (tiny_on(device), Golden::open("golden.safetensors"));
    let sequences: Vec<Vec<u32>> = (0..SEQUENCES).map(|i| golden.ids(i)).collect();
    let batch = Batch::new(&sequences, &decoder.device).unwrap();
    let together = batch_logits(&decoder, &batch);
    for (i, ids) in sequences.iter().enumerate() {
        let own = together.get(i).unwrap().narrow(0, batch.left_pad[i], ids.len()).unwrap();
        let allowed = logits_tolerance(&decoder.config, ids.len());
        assert_close(&format!("padded row {i}"), &own, &logits(&decoder, ids, None), allowed);
    }
}

fn captured_rows_are_the_last_tokens_whatever_the_order(device: &Device) {
    let (decoder, golden) = (tiny_on(device), Golden::open("golden.safetensors"));
    let prompts: Vec<Vec<u32>> = (0..SEQUENCES).map(|i| golden.ids(i)).collect();
    let captured = capture::last_prompt(&decoder, &prompts, None, |_| Ok(())).unwrap();
    for (i, ids) in prompts.iter().enumerate() {
        for layer in 0..decoder.config.n_layers {
            let row = Tensor::new(captured.row(layer, i), &Device::Cpu).unwrap();
            let expected = golden.get(&format!("residual.{i}.{layer}")).get(ids.len() - 1).unwrap();
            let allowed = tolerance(roundings(&decoder.config, ids.len(), layer + 1));
            assert_close(&format!("captured row {i}.{layer}"), &row, &expected, allowed);
        }
    }
}

fn decoding_with_the_cache_is_decoding_from_the_start(device: &Device) {
    let (decoder, golden) = (tiny_on(device), Golden::open("golden.safetensors"));
    let ids = golden.ids(0);
    let whole = logits(&decoder, &ids, None);
    let allowed = logits_tolerance(&decoder.config, ids.len());
    let mut cache = Cache::new(&decoder.config, 1, ids.len(), &decoder.device).unwrap();
    let mut done = 0;
    for take in [5, 1, 3, 1, 1, 2] {
        let batch = Batch::new(&[&ids[done..done + take]], &decoder.device).unwrap();
        let x = decoder.forward(&batch, None, Some(&mut cache), &mut no_edit).unwrap();
        let own = decoder.logits(&x.squeeze(0).unwrap()).unwrap();
        assert_close(&format!("cached from {done}"), &own, &whole.narrow(0, done, take).unwrap(), allowed);
        done += take;
        assert_eq!(cache.filled, done);
    }
    assert_eq!(done, ids.len());
    let one_more = Batch::new(&[&[1u32]], &decoder.device).unwrap();
    let full = decoder.forward(&one_more, None, Some(&mut cache), &mut no_edit).unwrap_err();
    assert!(full.to_string().contains("the cache holds 13 tokens"), "{full}");
}

fn a_padded_batch_decodes_with_the_cache_and_rows_can_be_picked(device: &Device) {
    let (decoder, golden) = (tiny_on(device), Golden::open("golden.safetensors"));
    let sequences: Vec<Vec<u32>> = (0..SEQUENCES).map(|i| golden.ids(i)).collect();
    let prompts: Vec<&[u32]> = sequences.iter().map(|s| &s[..s.len() - 2]).collect();
    let prefill = Batch::new(&prompts, &decoder.device).unwrap();
    let capacity = prefill.ids.dim(1).unwrap() + 2;
    let mut cache = Cache::new(&decoder.config, SEQUENCES, capacity, &decoder.device).unwrap();
    decoder.forward(&prefill, None, Some(&mut cache), &mut no_edit).unwrap();
    // Row 1 leaves and row 2 goes first, twice.
    let kept = [2u32, 0, 2];
    let mut cache = cache.select(&kept).unwrap();
    let left_pad = kept.iter().map(|&r| prefill.left_pad[r as usize]).collect::<Vec<_>>();
    for step in 0..2 {
        let next: Vec<u32> = kept
            .iter()
            .map(|&r| prompts[r as usize].len() + step)
            .zip(&kept)
            .map(|(at, &r)| sequences[r as usize][at])
            .collect();
        let ids = Tensor::from_vec(next, (kept.len(), 1), &decoder.device).unwrap();
        let batch = Batch { ids, left_pad: left_pad.clone().into() };
        let x = decoder.forward(&batch, None, Some(&mut cache), &mut no_edit).unwrap();
        let own = all_logits(&decoder, &x);
        for (i, &r) in kept.iter().enumerate() {
            let ids = &sequences[r as usize];
            let expected = logits(&decoder, ids, None).narrow(0, ids.len() - 2 + step, 1).unwrap();
            let allowed = logits_tolerance(&decoder.config, ids.len());
            assert_close(&format!("row {r}, step {step}"), &own.get(i).unwrap(), &expected, allowed);
        }
    }
}

fn a_beginning_read_once_changes_nothing_even_beside_padding(device: &Device) {
    let (decoder, golden) = (tiny_on(device), Golden::open("golden.safetensors"));
    let beginning = &golden.ids(0)[..4];
    let rests = [&golden.ids(1)[..], &golden.ids(1)[..2], &golden.ids(2)[..]];
    let sequences: Vec<Vec<u32>> = rests.iter().map(|rest| [beginning, rest].concat()).collect();
    let capacity = sequences.iter().map(Vec::len).max().unwrap();
    let prefix = Prefix::read(&decoder, &sequences, None, capacity, &mut no_edit).unwrap();
    let (batch, mut cache) = prefix.continued(&decoder, &sequences).unwrap();
    assert!(cache.shared >= beginning.len() && batch.left_pad.iter().any(|&pad| pad > 0));
    let x = decoder.forward(&batch, None, Some(&mut cache), &mut no_edit).unwrap();
    let own = all_logits(&decoder, &x);
    for (i, ids) in sequences.iter().enumerate() {
        let rest = ids.len() - cache.shared;
        let expected = logits(&decoder, ids, None).narrow(0, cache.shared, rest).unwrap();
        let own = own.get(i).unwrap().narrow(0, batch.left_pad[i], rest).unwrap();
        let allowed = logits_tolerance(&decoder.config, ids.len());
        assert_close(&format!("row {i}"), &own, &expected, allowed);
    }
}

/// llama.cpp's converter: rows of q and k are interleaved, head by head.
fn permuted(weight: &Tensor, heads: usize) -> Tensor {
    let (rows, cols) = weight.dims2().unwrap();
    let pairs = weight.reshape((heads, 2, rows / heads / 2, cols)).unwrap();
    pairs.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, cols)).unwrap()
}

/// The tiny model as llama.cpp's converter would write it; `skip` leaves one tensor out.
pub fn write_gguf(path: &Path, architecture: &str, skip: Option<&str>) {
    let stored = candle_core::safetensors::load(fixture_model(), &Device::Cpu).unwrap();
    let mut tensors: Vec<(String, QTensor)> = Vec::new();
    for (name, tensor) in stored {
        let tensor = tensor.to_dtype(DType::F32).unwrap();
        let tensor = match () {
            _ if name.contains("q_proj") => permuted(&tensor, 4),
            _ if name.contains("k_proj") => permuted(&tensor, 2),
            _ => tensor,
        };
        let mut name = name.replace("model.layers.", "blk.");
        for (theirs, ours) in [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ] {
            name = name.replace(theirs, ours);
        }
        if skip != Some(name.as_str()) {
            tensors.push((name, QTensor::quantize(&tensor, GgmlDType::F32).unwrap()));
        }
    }
    let key = |k: &str| format!("{architecture}.{k}");
    let metadata = [
        ("general.architecture".to_owned(), Value::String(architecture.into())),
        (key("embedding_length"), Value::U32(64)),
        (key("feed_forward_length"), Value::U32(96)),
        (key("block_count"), Value::U32(3)),
        (key("attention.head_count"), Value::U32(4)),
        (key("attention.head_count_kv"), Value::U32(2)),
        (key("attention.key_length"), Value::U32(24)),
        (key("attention.value_length"), Value::U32(24)),
        (key("rope.dimension_count"), Value::U32(24)),
        (key("rope.freq_base"), Value::F32(5000.0)),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(1e-5)),
        (key("context_length"), Value::U32(64)),
        (key("vocab_size"), Value::U32(128)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

fn fixture_model() -> std::path::PathBuf {
    path("tiny/model.safetensors")
}

#[test]
fn a_gguf_of_the_same_weights_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    write_gguf(&file, "llama", None);
    let (gguf, safetensors): (Decoder, Decoder) = (load(&file, Storage::None).unwrap(), tiny());
    assert_eq!(gguf.config, safetensors.config);
    let ids = Golden::open("golden.safetensors").ids(0);
    assert_same("GGUF logits", &logits(&gguf, &ids, None), &logits(&safetensors, &ids, None));
}

#[test]
fn a_gguf_without_a_head_is_tied() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    write_gguf(&file, "llama", Some("output.weight"));
    let gguf = load(&file, Storage::None).unwrap();
    let golden = Golden::open("golden.safetensors");
    let allowed = logits_tolerance(&gguf.config, golden.ids(0).len());
    assert_close("tied GGUF", &logits(&gguf, &golden.ids(0), None), golden.get("tied.logits"), allowed);
}

#[test]
fn weights_in_several_files_are_one_model() {
    let folder = edited(|_, _| ());
    let whole = folder.path().join("model.safetensors");
    let tensors = candle_core::safetensors::load(&whole, &Device::Cpu).unwrap();
    std::fs::remove_file(&whole).unwrap();
    let (first, second): (Vec<_>, Vec<_>) = tensors.iter().partition(|(name, _)| name.contains("layers.1"));
    for (i, part) in [first, second].into_iter().enumerate() {
        let bytes = safetensors::serialize(part.into_iter().map(|(k, v)| (k.as_str(), v)), None).unwrap();
        std::fs::write(folder.path().join(format!("model-0000{}-of-00002.safetensors", i + 1)), bytes)
            .unwrap();
    }
    let ids = Golden::open("golden.safetensors").ids(0);
    let split = load(folder.path(), Storage::None).unwrap();
    assert_same("logits", &logits(&split, &ids, None), &logits(&tiny(), &ids, None));
}
