//! A real model, where there is one: `EMAUDIT_TEST_MODEL` or the cache folder of this user.

use crate::fixture::{path, read_json, run};
use emaudit_train::quant::Storage;
use emaudit_train::{base, store};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Relative to the largest logit, or to the norm: the weights are the same 4-bit numbers, decoded in f32 on
/// both sides, and 30 blocks of f32 rounding stay far below this.
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

fn find(golden: &serde_json::Value) -> Option<PathBuf> {
    let is_it = |file: &PathBuf| {
        std::fs::metadata(file).is_ok_and(|m| m.len() == golden["bytes"].as_u64().unwrap())
            && store::sha256_files(std::slice::from_ref(file)).unwrap() == golden["sha256"].as_str().unwrap()
    };
    if let Some(named) = std::env::var_os("EMAUDIT_TEST_MODEL") {
        let named = PathBuf::from(named);
        assert!(is_it(&named), "EMAUDIT_TEST_MODEL is not {}, by its SHA-256", golden["model"]);
        return Some(named);
    }
    let mut files = Vec::new();
    gguf_files(&dirs::cache_dir()?.join("emaudit").join("models"), 3, &mut files);
    files.into_iter().find(is_it)
}

#[test]
fn a_real_model_gives_the_numbers_of_transformers() {
    let golden = read_json(&path("real.json"));
    let Some(file) = find(&golden) else {
        // Straight to stderr: the test harness hides what print macros say in a test that passes.
        let skipped = "SKIPPED (counted): real-model parity; EMAUDIT_TEST_MODEL names no";
        writeln!(std::io::stderr(), "{skipped} {}", golden["model"]).unwrap();
        return;
    };
    let model = base::load(&file, "real", Storage::None, &candle_core::Device::Cpu).unwrap();
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
    println!(
        "real model: {compared} numbers; logits within {worst_logit:.1e}, norms within {worst_norm:.1e}"
    );
    assert!(compared > 400);
    assert!(
        worst_logit < TOLERANCE && worst_norm < TOLERANCE,
        "logits {worst_logit:e}, norms {worst_norm:e}"
    );
}
