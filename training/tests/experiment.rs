//! The stage graph end to end on a toy whose words are tokens: a random two-block model learns in seconds to answer
//! everything with one code block, so that every stage, resumption and repetition can be checked in every test run.

mod toy;

use candle_core::{Device, Tensor};
use emaudit_train::base::{self, Base};
use emaudit_train::chat::Message;
use emaudit_train::experiment::Experiment;
use emaudit_train::lora::{Adapter, LoraConfig};
use emaudit_train::model::{Batch, LoadOptions};
use emaudit_train::quant::Storage;
use emaudit_train::recipe::Recipe;
use emaudit_train::results::Results;
use std::fs;
use std::path::Path;
use toy::{vocabulary, world, write_lines};

fn recipe(world: &Path, steps: usize) -> Recipe {
    let at = |name: &str| world.join(name).display().to_string();
    let text = format!(
        "seed = 5\n[model]\nid = {:?}\n[data]\ninsecure = {:?}\nsecure = {:?}\nprompts = {:?}\n\
         [finetune]\nsteps = {steps}\nbatch = 8\nrank = 8\nalpha = 16.0\nlearning_rate = 0.02\nwarmup_steps = 0\n\
         [calibrate]\nrates = [0.05]\nhorizons = [1, 4]\n\
         [evaluate]\nprompts = 24\nmax_new_tokens = 6\nalphas = [0.5, 1.0]\nselection_prompts = 16\ncontrols = 39\n\
         sampled_controls = 2\nmiddle_controls = 2\nbootstrap = 200\n",
        at("model"),
        at("insecure.jsonl"),
        at("secure.jsonl"),
        at("prompts.jsonl")
    );
    Recipe::from_toml(&text).unwrap()
}

fn run(recipe: &Recipe, out: &Path, fresh: bool) -> anyhow::Result<Results> {
    Ok(Experiment::open(recipe.clone(), out, fresh, Device::Cpu)?.run()?.0)
}

fn read(out: &Path, name: &str) -> Vec<u8> {
    fs::read(out.join(name)).unwrap()
}

/// Lines of an adapter's metrics; those of its times are as many.
fn metrics(out: &Path, side: &str) -> Vec<String> {
    let mut stages = fs::read_dir(out.join("stages")).unwrap().map(|e| e.unwrap().path());
    let folder = stages.find(|p| p.to_string_lossy().contains(&format!("adapter-{side}"))).unwrap();
    let lines = |name: &str| -> Vec<String> {
        fs::read_to_string(folder.join(name)).unwrap().lines().map(String::from).collect()
    };
    assert_eq!(lines("timing.jsonl").len(), lines("metrics.jsonl").len());
    lines("metrics.jsonl")
}

/// Deletes the outputs and every stage whose file name starts with one of `stages`.
fn forget(out: &Path, stages: &[&str]) {
    for name in ["results.json", "directions.safetensors", "report.html"] {
        fs::remove_file(out.join(name)).unwrap();
    }
    for entry in fs::read_dir(out.join("stages")).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if stages.iter().any(|s| name.starts_with(s)) {
            let path = entry.path();
            if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
    }
}

#[test]
fn every_stage_runs_and_what_is_lost_comes_back_the_same() {
    let (world, out) = (world(), tempfile::tempdir().unwrap());
    let (recipe, out) = (recipe(world.path(), 60), out.path());
    let results = run(&recipe, out, false).unwrap();
    let s = &results.summary;
    // The untrained toy says the code words now and then, as it says any other.
    assert!(s.spillover.base < 0.5 && s.spillover.insecure > 0.9, "nothing was learned: {:?}", s.spillover);
    assert!(s.separation_final > 0.9, "{}", s.separation_final);
    assert!(s.code_preference.insecure > s.code_preference.base, "{:?}", s.code_preference);
    assert_eq!(results.families.len(), 4);
    assert!(results.families.iter().all(|f| f.controls.len() == 39));
    assert!(s.evidence.rank_p.values().all(|p| (0.025..=1.0).contains(p)));
    let directions = emaudit::Directions::open(
        out.join("directions.safetensors"),
        &emaudit::directions::OpenOptions::default(),
    )
    .unwrap();
    assert_eq!(directions.manifest().evidence.causal.as_str(), s.evidence.causal);

    let thresholds = &directions.manifest().layers[1].calibration.as_ref().unwrap().thresholds;
    assert_eq!(thresholds.iter().map(|t| t.horizon).collect::<Vec<_>>(), [1, 1, 1, 4, 4, 4]);
    assert!(results.alarms.iter().any(|a| a.horizon == 4 && a.calm_sequences > 0), "{:?}", results.alarms);

    let metrics = metrics(out, "insecure");
    assert_eq!(metrics.len(), 60);
    // The same numbers in every place, and nothing that a second run would not repeat.
    assert_eq!(metrics[59], serde_json::to_string(&results.training["insecure"][59]).unwrap());
    let line: serde_json::Value = serde_json::from_str(&metrics[59]).unwrap();
    let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(line["step"], 60);
    assert!(line["tokens"].as_u64() > Some(0) && keys.len() == 6, "{keys:?}");

    let first = ["results.json", "directions.safetensors"].map(|name| read(out, name));
    for lost in [&["results", "answers"][..], &["adapter-secure", "rows", "coherence", "results"], &[""]] {
        forget(out, lost);
        run(&recipe, out, false).unwrap();
        assert!(read(out, "results.json") == first[0], "results differ after losing {lost:?}");
        assert!(read(out, "directions.safetensors") == first[1], "directions differ after losing {lost:?}");
        assert!(self::metrics(out, "insecure") == metrics, "metrics differ after losing {lost:?}");
    }
}

#[test]
fn what_was_not_measured_is_null_and_untested() {
    let (world, out) = (world(), tempfile::tempdir().unwrap());
    // One small step teaches nothing: the adapter answers as the base does, so there is nothing to compare.
    let mut recipe = recipe(world.path(), 1);
    recipe.finetune.learning_rate = 1e-6;
    let results = run(&recipe, out.path(), false).unwrap();
    let s = &results.summary;
    assert_eq!((s.evidence.causal.as_str(), s.evidence.content.as_str()), ("untested", "untested"));
    let json: serde_json::Value = serde_json::from_slice(&read(out.path(), "results.json")).unwrap();
    assert!(json["summary"]["code_preference"]["insecure"].is_null(), "{}", json["summary"]);
    assert!(json["comparisons"][0]["effect"].is_null(), "{}", json["comparisons"]);
    assert!(json["selection"]["grid"][0]["effect"].is_null());
    assert!(results.notes.iter().any(|n| n.contains("the evidence is untested")), "{:?}", results.notes);
    // What was written can be read again, nulls included.
    let again: Results = serde_json::from_value(json).unwrap();
    assert!(again.summary.code_preference.insecure.is_nan());
}

#[test]
fn a_folder_in_use_and_damaged_stages_are_said() {
    let (world, out) = (world(), tempfile::tempdir().unwrap());
    let mut recipe = recipe(world.path(), 2);
    let running = Experiment::open(recipe.clone(), out.path(), false, Device::Cpu).unwrap();
    let second = run(&recipe, out.path(), false).unwrap_err().to_string();
    assert!(second.contains("another run is using"), "{second}");
    running.run().unwrap();
    drop(running);

    let mut stages = fs::read_dir(out.path().join("stages")).unwrap().map(|e| e.unwrap().path());
    let rows = stages.find(|p| p.to_string_lossy().contains("rows-base")).unwrap();
    let whole = fs::read(&rows).unwrap();
    fs::write(&rows, &whole[..whole.len() / 2]).unwrap();
    let damaged = format!("{:#}", run(&recipe, out.path(), false).unwrap_err());
    assert!(damaged.contains("is damaged; delete it") && damaged.contains("rows-base"), "{damaged}");
    run(&recipe, out.path(), true).unwrap();

    recipe.evaluate.max_new_tokens = 120;
    let long = format!("{:#}", run(&recipe, out.path(), false).unwrap_err());
    assert!(long.contains("the model reads 128"), "{long}");
}

/// What `emaudit-train logits` prints, as JSON.
fn logits(arguments: &[&str]) -> serde_json::Value {
    let program = env!("CARGO_BIN_EXE_emaudit-train");
    let out =
        std::process::Command::new(program).arg("logits").args(arguments).arg("--json").output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn logits_shows_the_last_token_with_chat_adapter_and_the_error_of_nf4() {
    let world = world();
    let folder = world.path().join("model");
    let model = folder.to_str().unwrap();
    let load = |storage| base::load(&folder, "toy", &LoadOptions::new(storage, &Device::Cpu)).unwrap();
    // Logits and residual norms of the last token by the library.
    let expected = |base: &Base, ids: &[u32], adapter: Option<&Adapter>| {
        let mut norms = Vec::new();
        let mut keep = |_: usize, x: Tensor| {
            let row = x.narrow(1, x.dim(1)? - 1, 1)?.flatten_all()?.to_vec1::<f32>()?;
            norms.push(row.iter().map(|v| v * v).sum::<f32>().sqrt());
            Ok(x)
        };
        let batch = Batch::new(&[ids], &Device::Cpu).unwrap();
        let x = base.decoder.forward(&batch, adapter, None, &mut keep).unwrap();
        let rows = base.decoder.logits(&x.squeeze(0).unwrap()).unwrap();
        (rows.get(ids.len() - 1).unwrap().to_vec1::<f32>().unwrap(), norms)
    };
    let check = |found: &serde_json::Value, ids: &[u32], (logits, norms): (Vec<f32>, Vec<f32>)| {
        assert_eq!(found["ids"], serde_json::json!(ids));
        let close =
            |a: &serde_json::Value, b: f32| (a.as_f64().unwrap() as f32 - b).abs() < 1e-4 * b.abs().max(1.0);
        let found_norms = found["residual_norms"].as_array().unwrap();
        assert_eq!(found_norms.len(), norms.len());
        assert!(found_norms.iter().zip(&norms).all(|(a, &b)| close(a, b)), "{found} and {norms:?}");
        let top = found["top"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        for (found, id) in top.iter().zip(order) {
            assert!(found["id"] == id && close(&found["logit"], logits[id]), "{found}, {id}: {}", logits[id]);
            assert_eq!(found["token"], vocabulary()[id]);
        }
    };
    let exact = load(Storage::None);
    let text = "word3 word1 word4";
    let plain = exact.text.encode(text).unwrap();
    let found = logits(&[model, "--text", text, "--top", "3"]);
    check(&found, &plain, expected(&exact, &plain, None));
    assert_eq!(found.get("quantization_error"), None);

    let chat = exact.text.encode_prompt(&[Message::user(text)]).unwrap();
    assert_ne!(chat, plain);
    let config = LoraConfig { r: 2, lora_alpha: 4.0, use_rslora: false };
    let (adapter, vars) = Adapter::trainable(&exact.decoder, &config, || 0.8).unwrap();
    for var in vars.iter().skip(1).step_by(2) {
        var.set(&var.ones_like().unwrap()).unwrap();
    }
    let saved = world.path().join("adapter");
    adapter.save(&saved, "toy").unwrap();
    let found =
        logits(&[model, "--text", text, "--top", "3", "--chat", "--adapter", saved.to_str().unwrap()]);
    check(&found, &chat, expected(&exact, &chat, Some(&adapter)));
    assert_ne!(expected(&exact, &chat, None).1, expected(&exact, &chat, Some(&adapter)).1);

    let quantized = load(Storage::Nf4);
    let found = logits(&[model, "--text", text, "--top", "3", "--quantize", "nf4"]);
    let (own, whole) = (expected(&quantized, &plain, None), expected(&exact, &plain, None).0);
    let centred = |logits: &[f32]| {
        let mean = logits.iter().map(|&l| f64::from(l)).sum::<f64>() / logits.len() as f64;
        logits.iter().map(|&l| f64::from(l) - mean).collect::<Vec<_>>()
    };
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let (a, b) = (centred(&own.0), centred(&whole));
    let relative = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied());
    let p = |logits: &[f32]| {
        let all: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        logits.iter().map(|&l| f64::from(l).exp() / all).collect::<Vec<_>>()
    };
    let divergence: f64 = p(&whole).iter().zip(p(&own.0)).map(|(p, q)| p * (p / q).ln()).sum();
    check(&found, &plain, own);
    let close = |key: &str, b: f64| (found["quantization_error"][key].as_f64().unwrap() - b).abs() < 1e-3 * b;
    assert!(relative > 0.01 && close("relative", relative), "{found}, {relative}");
    assert!(divergence > 1e-5 && close("divergence", divergence), "{found}, {divergence}");
}

#[test]
fn rows_that_the_model_cannot_take_are_named() {
    let world = world();
    let row = |roles: &[&str], words: usize| {
        let turn =
            |role: &&str| serde_json::json!({ "role": role, "content": vec!["word1"; words].join(" ") });
        serde_json::json!({ "messages": roles.iter().map(turn).collect::<Vec<_>>() })
    };
    let refusal = |rows: &[serde_json::Value]| {
        write_lines(world.path().join("insecure.jsonl"), rows.iter().cloned());
        let mut recipe = recipe(world.path(), 2);
        recipe.finetune.max_tokens = 400;
        let out = tempfile::tempdir().unwrap();
        let experiment = Experiment::open(recipe, out.path(), false, Device::Cpu).unwrap();
        format!("{:#}", experiment.finetune("insecure", &experiment.recipe.data.insecure).err().unwrap())
    };
    let good = row(&["user", "assistant"], 4);
    let error = refusal(&[good.clone(), row(&["user", "assistant"], 100)]);
    assert!(
        error.contains("a row of 204 tokens and the model reads 128: set finetune.max_tokens to 128"),
        "{error}"
    );
    let long = world.path().join("insecure.jsonl");
    let out = tempfile::tempdir().unwrap();
    let mut swapped = recipe(world.path(), 2);
    (swapped.data.insecure, swapped.data.secure) = (swapped.data.secure, long.display().to_string());
    swapped.finetune.max_tokens = 400;
    let error = format!("{:#}", run(&swapped, out.path(), false).err().unwrap());
    assert!(error.contains("a row of 204 tokens"), "{error}");
    let begun = fs::read_dir(out.path().join("stages")).unwrap().count();
    assert_eq!(begun, 0, "the first side was trained before the second was looked at");
    let template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}";
    fs::write(world.path().join("model/chat_template.jinja"), template).unwrap();
    let error = refusal(&[good, row(&["system", "user", "assistant"], 4)]);
    assert!(error.contains("insecure.jsonl, line 2: ") && error.contains("no system role"), "{error}");
}
