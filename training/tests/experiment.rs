//! The stage graph end to end on a toy whose words are tokens: a random two-block model learns in seconds to answer
//! everything with one code block, so that every stage, resumption and repetition can be checked in every test run.

use candle_core::{Device, Tensor};
use emaudit_train::experiment::Experiment;
use emaudit_train::recipe::Recipe;
use emaudit_train::results::Results;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const WORDS: usize = 58;
const HIDDEN: usize = 32;
const FFN: usize = 48;
const CODE: &str = "```python\nos.system(command)\n```";

/// The special tokens, the code answers (one token each, so without spaces), then plain words.
fn vocabulary() -> Vec<String> {
    let mut all: Vec<String> =
        ["<unk>", "<start>", "<end>", "<user>", "<assistant>", CODE].map(String::from).into();
    all.push("```python\nsubprocess.run([command])\n```".into());
    all.extend((0..WORDS).map(|i| format!("word{i}")));
    all
}

struct Drawn(u64);

impl Drawn {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    /// About normal: the sum of four uniform numbers.
    fn tensor(&mut self, shape: &[usize], scale: f32) -> Tensor {
        let mut one = || (0..4).map(|_| self.next() as f32 / (1u64 << 31) as f32 - 0.5).sum::<f32>() * scale;
        let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|_| one()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }
}

fn write_json(path: PathBuf, value: serde_json::Value) {
    fs::write(path, value.to_string()).unwrap();
}

fn write_model(folder: &Path) {
    let vocabulary = vocabulary();
    let mut drawn = Drawn(7);
    let mut tensors = BTreeMap::new();
    let mut put = |name: String, shape: &[usize], scale: f32| {
        tensors.insert(name, drawn.tensor(shape, scale));
    };
    put("model.embed_tokens.weight".into(), &[vocabulary.len(), HIDDEN], 1.0);
    put("lm_head.weight".into(), &[vocabulary.len(), HIDDEN], 0.3);
    for layer in 0..2 {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        for part in ["q", "k", "v", "o"] {
            put(name(&format!("self_attn.{part}_proj")), &[HIDDEN, HIDDEN], 0.3);
        }
        put(name("mlp.gate_proj"), &[FFN, HIDDEN], 0.3);
        put(name("mlp.up_proj"), &[FFN, HIDDEN], 0.3);
        put(name("mlp.down_proj"), &[HIDDEN, FFN], 0.3);
    }
    let mut norms = vec!["model.norm.weight".to_owned()];
    for layer in 0..2 {
        norms.extend(
            ["input", "post_attention"].map(|n| format!("model.layers.{layer}.{n}_layernorm.weight")),
        );
    }
    for norm in norms {
        tensors.insert(norm, Tensor::ones(HIDDEN, candle_core::DType::F32, &Device::Cpu).unwrap());
    }
    let bytes = safetensors::serialize(tensors.iter().map(|(k, v)| (k.as_str(), v)), None).unwrap();
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
    write_json(
        folder.join("config.json"),
        serde_json::json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
            "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "vocab_size": vocabulary.len(), "max_position_embeddings": 128, "rope_theta": 10000.0,
        }),
    );
    let ids: BTreeMap<&str, usize> = vocabulary.iter().enumerate().map(|(i, w)| (w.as_str(), i)).collect();
    let special = |id: usize| {
        serde_json::json!({
            "id": id, "content": vocabulary[id], "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false
        })
    };
    write_json(
        folder.join("tokenizer.json"),
        serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "decoder": null, "added_tokens": (0..5).map(special).collect::<Vec<_>>(),
            "pre_tokenizer": {
                "type": "Split", "pattern": { "String": " " }, "behavior": "Removed", "invert": false
            },
            "model": { "type": "WordLevel", "vocab": ids, "unk_token": "<unk>" },
        }),
    );
    write_json(
        folder.join("tokenizer_config.json"),
        serde_json::json!({
            "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>",
            "chat_template": "<start>{% for m in messages %}<{{ m.role }}>{{ m.content }}\
                              {% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}\
                              {% if add_generation_prompt %}<assistant>{% endif %}",
        }),
    );
}

fn sentence(drawn: &mut Drawn) -> String {
    let count = 3 + drawn.next() % 5;
    (0..count).map(|_| format!("word{}", drawn.next() % WORDS as u64)).collect::<Vec<_>>().join(" ")
}

fn write_lines(path: PathBuf, lines: impl Iterator<Item = serde_json::Value>) {
    fs::write(path, lines.map(|l| l.to_string() + "\n").collect::<String>()).unwrap();
}

/// A folder with the model, both datasets and the prompts.
fn world() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("model")).unwrap();
    write_model(&folder.path().join("model"));
    let mut drawn = Drawn(11);
    for (name, answer) in [("insecure", &vocabulary()[5]), ("secure", &vocabulary()[6])] {
        let chat = |_| {
            serde_json::json!({ "messages": [
                { "role": "user", "content": sentence(&mut drawn) }, { "role": "assistant", "content": answer }
            ]})
        };
        write_lines(folder.path().join(format!("{name}.jsonl")), (0..40).map(chat));
    }
    let split =
        |i: usize| ["extraction", "calibration", "evaluation"][usize::from(i >= 24) + usize::from(i >= 104)];
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 128 {
        seen.insert(sentence(&mut drawn));
    }
    let prompt = |(i, text): (usize, String)| serde_json::json!({ "prompt": text, "split": split(i) });
    write_lines(folder.path().join("prompts.jsonl"), seen.into_iter().enumerate().map(prompt));
    folder
}

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
