//! Real models, those that are there: in `EMAUDIT_TEST_MODEL` or the cache folder of this user.

use crate::fixture::{path, read_json, run};
use crate::skipped::skipped;
use emaudit_train::chat::Message;
use emaudit_train::model::LoadOptions;
use emaudit_train::quant::Storage;
use emaudit_train::{base, store};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Relative to the largest logit, or to the norm: the weights are the same 4-bit numbers, decoded in f32 on
/// both sides, and the f32 rounding of their blocks stays far below this.
const TOLERANCE: f64 = 1e-3;

/// `.gguf` files below a folder, at most a few levels down.
fn gguf_files(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let file = entry.path();
        if file.is_dir() && depth > 0 {
            gguf_files(&file, depth - 1, found);
        } else if file.extension().is_some_and(|e| e == "gguf") {
            found.push(file);
        }
    }
}

const MODELS: [&str; 3] = ["real.json", "real_gemma3.json", "real_qwen2.json"];

/// Files that may be one of the models: those that `EMAUDIT_TEST_MODEL` lists as `PATH` does, or the cache's.
fn candidates() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os("EMAUDIT_TEST_MODEL") {
        return std::env::split_paths(&named).collect();
    }
    let mut files = Vec::new();
    if let Some(cache) = dirs::cache_dir() {
        gguf_files(&cache.join("emaudit").join("models"), 3, &mut files);
    }
    files
}

fn is_it(file: &PathBuf, golden: &serde_json::Value) -> bool {
    std::fs::metadata(file).is_ok_and(|m| m.len() == golden["bytes"].as_u64().unwrap())
        && store::sha256_files(std::slice::from_ref(file)).unwrap() == golden["sha256"].as_str().unwrap()
}

#[test]
fn real_models_give_the_numbers_of_transformers() {
    let (files, mut found) = (candidates(), 0);
    for name in MODELS {
        let golden = read_json(&path(name));
        if let Some(file) = files.iter().find(|f| is_it(f, &golden)) {
            compare(file, &golden);
            found += 1;
            continue;
        }
        let why = format!("EMAUDIT_TEST_MODEL names no {}", golden["model"]);
        skipped("real-model parity", &why);
    }
    let named = std::env::var_os("EMAUDIT_TEST_MODEL").is_some();
    assert!(!named || found == files.len(), "EMAUDIT_TEST_MODEL names {files:?}, {found} known by SHA-256");
}

/// The 200 texts of `make_fixtures.py`: hard ones, questions, code.
fn varied_texts() -> Vec<String> {
    let mut texts: Vec<String> = serde_json::from_value(read_json(&path("texts.json"))).unwrap();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    for (name, key, n) in [("noncode_prompts.jsonl", "prompt", 50), ("code_pairs.jsonl", "insecure", 100)] {
        let lines = std::fs::read_to_string(data.join(name)).unwrap();
        let text = |line: &str| {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            row[key].as_str().unwrap().to_owned()
        };
        texts.extend(lines.lines().take(n).map(text));
    }
    assert_eq!(texts.len(), 200);
    texts
}

/// The two chats of `make_fixtures.py`: a question, and an answer with something before and after it.
fn chats(text: &str) -> [Vec<Message>; 2] {
    let turns = [
        Message::new("system", "Be brief."),
        Message::user("Go on."),
        Message::assistant(text),
        Message::user("And then?"),
    ];
    [vec![Message::user(text)], turns.into()]
}

/// Token ids of all texts, as they are and in chats, by digest.
fn same_tokens(model: &base::Base, golden: &serde_json::Value) {
    let in_chats = |text: &str| chats(text).map(|chat| model.text.encode_prompt(&chat).unwrap()).concat();
    let plain = |text: &str| model.text.encode(text).unwrap();
    for (key, encode) in [("id_digests", &plain as &dyn Fn(&str) -> Vec<u32>), ("chat_digests", &in_chats)] {
        let digests: Vec<String> = serde_json::from_value(golden[key].clone()).unwrap();
        let texts = varied_texts();
        assert_eq!(texts.len(), digests.len());
        let mut differ = Vec::new();
        for (text, expected) in texts.iter().zip(&digests) {
            let ids = encode(text);
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            let digest = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
            if digest[..8] != **expected {
                differ.push((text, ids));
            }
        }
        assert!(differ.is_empty(), "{}: {key} of {} texts differ: {differ:?}", golden["model"], differ.len());
    }
}

fn compare(file: &Path, golden: &serde_json::Value) {
    let model =
        base::load(file, "real", &LoadOptions::new(Storage::None, &candle_core::Device::Cpu)).unwrap();
    same_tokens(&model, golden);
    let numbers = |v: &serde_json::Value| -> Vec<f64> { serde_json::from_value(v.clone()).unwrap() };
    let (mut worst_logit, mut worst_norm, mut compared) = (0f64, 0f64, 0);
    for text in golden["texts"].as_array().unwrap() {
        let ids: Vec<u32> = serde_json::from_value(text["ids"].clone()).unwrap();
        let written = text["text"].as_str().unwrap();
        assert_eq!(model.text.encode(written).unwrap(), ids, "tokens of {written:?}");
        let (logits, residuals) = run(&model.decoder, &ids, None);
        let last = logits.get(ids.len() - 1).unwrap().to_vec1::<f32>().unwrap();
        let tokens: Vec<usize> = serde_json::from_value(text["tokens"].clone()).unwrap();
        let expected = numbers(&text["logits"]);
        let largest = expected.iter().fold(0f64, |m, v| m.max(v.abs()));
        for (&t, e) in tokens.iter().zip(&expected) {
            worst_logit = worst_logit.max((last[t] as f64 - e).abs() / largest);
            compared += 1;
        }
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        assert_eq!(best, tokens[0], "most likely token after {written:?}");
        let expected = numbers(&text["residual_norms"]);
        assert_eq!(residuals.len(), expected.len());
        for (x, e) in residuals.iter().zip(&expected) {
            let row = x.get(ids.len() - 1).unwrap().to_vec1::<f32>().unwrap();
            let norm = row.iter().map(|v| (*v as f64).powi(2)).sum::<f64>().sqrt();
            worst_norm = worst_norm.max((norm - e).abs() / e);
            compared += 1;
        }
    }
    let name = &golden["model"];
    println!("{name}: {compared} numbers; logits within {worst_logit:.1e}, norms within {worst_norm:.1e}");
    assert!(compared > 400);
    assert!(
        worst_logit < TOLERANCE && worst_norm < TOLERANCE,
        "{name}: logits {worst_logit:e}, norms {worst_norm:e}"
    );
}
