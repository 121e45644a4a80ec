//! `emaudit-train audit` through the real binary on the tiny model: every exit status, with a direction file made here.

use candle_core::{DType, Device, Tensor};
use emaudit::directions::schema::*;
use emaudit::directions::{Directions, LayerTensors, OpenOptions, write};
use emaudit::{Probe, Rows, ScoreUnit};
use emaudit_train::base::{self, Base};
use emaudit_train::likelihood::Dialogue;
use emaudit_train::lora::Adapter;
use emaudit_train::model::LoadOptions;
use emaudit_train::quant::Storage;
use emaudit_train::{audit, battery, calibrate, capture, extract};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// Words of the tiny model's vocabulary: five that are special, then plain ones.
const VOCABULARY: usize = 128;
const LAYER: usize = 2;
const RATE: f64 = 0.05;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn write_json(path: PathBuf, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

/// The tiny model with a tokenizer whose words are tokens, after an edit of its tensors.
fn write_model(folder: &Path, edit: impl FnOnce(&mut HashMap<String, Tensor>)) {
    std::fs::create_dir(folder).unwrap();
    std::fs::copy(fixture("tiny/config.json"), folder.join("config.json")).unwrap();
    let mut tensors =
        candle_core::safetensors::load(fixture("tiny/model.safetensors"), &Device::Cpu).unwrap();
    edit(&mut tensors);
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    let special = ["<unk>", "<start>", "<end>", "<user>", "<assistant>"];
    let word = |i: usize| special.get(i).map_or_else(|| format!("word{i}"), |s| (*s).to_owned());
    let ids: BTreeMap<String, usize> = (0..VOCABULARY).map(|i| (word(i), i)).collect();
    let added = |id: usize| {
        json!({
            "id": id, "content": special[id], "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false
        })
    };
    write_json(
        folder.join("tokenizer.json"),
        &json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "decoder": null, "added_tokens": (0..special.len()).map(added).collect::<Vec<_>>(),
            "pre_tokenizer": {
                "type": "Split", "pattern": { "String": " " }, "behavior": "Removed", "invert": false
            },
            "model": { "type": "WordLevel", "vocab": ids, "unk_token": "<unk>" },
        }),
    );
    write_json(
        folder.join("tokenizer_config.json"),
        &json!({
            "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>",
            "chat_template": "<start>{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
                              {% if add_generation_prompt %}<assistant>{% endif %}",
        }),
    );
}

/// The PEFT adapter of the fixtures with another `lora_alpha`: how far it bends.
fn write_adapter(folder: &Path, alpha: f64) {
    std::fs::create_dir(folder).unwrap();
    let text = std::fs::read_to_string(fixture("adapter/adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["lora_alpha"] = alpha.into();
    write_json(folder.join("adapter_config.json"), &config);
    std::fs::copy(fixture("adapter/adapter_model.safetensors"), folder.join("adapter_model.safetensors"))
        .unwrap();
}

fn sentence(seed: &mut u64) -> String {
    let mut next = || {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*seed >> 33) as usize
    };
    let words = 4 + next() % 5;
    (0..words).map(|_| format!("word{}", 5 + next() % (VOCABULARY - 5))).collect::<Vec<_>>().join(" ")
}

/// 40 prompts to extract from, 120 to calibrate on, 80 to audit with, all different, as a file that states its splits.
fn write_prompts(path: &Path, stated: bool, mut seed: u64) -> Vec<String> {
    let mut texts: Vec<String> = Vec::new();
    while texts.len() < 240 {
        let text = sentence(&mut seed);
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    let split =
        |i: usize| ["extraction", "calibration", "evaluation"][usize::from(i >= 40) + usize::from(i >= 160)];
    let line = |(i, text): (usize, &String)| match stated {
        true => json!({ "prompt": text, "split": split(i) }).to_string() + "\n",
        false => json!({ "prompt": text }).to_string() + "\n",
    };
    std::fs::write(path, texts.iter().enumerate().map(line).collect::<String>()).unwrap();
    texts
}

struct World(TempDir);

impl World {
    fn at(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// Models, adapters, prompts, and the direction file of the model `base` towards the adapter `bent`.
    fn new() -> World {
        let world = World(tempfile::tempdir().unwrap());
        let at = |name: &str| world.0.path().join(name);
        write_model(&at("base"), |_| {});
        write_model(&at("broken"), |tensors| {
            let name = format!("model.layers.{LAYER}.mlp.down_proj.weight");
            let nan = tensors[&name].to_dtype(DType::F32).unwrap().affine(f64::NAN, 0.0).unwrap();
            tensors.insert(name, nan);
        });
        // Another model of the same shape: its calm rows are nowhere near those of the calibration.
        write_model(&at("other"), |tensors| {
            let name = "model.embed_tokens.weight";
            let moved = tensors[name].to_dtype(DType::F32).unwrap().affine(1.0, 0.5).unwrap();
            tensors.insert(name.into(), moved);
        });
        write_adapter(&at("bent"), 40.0);
        write_adapter(&at("idle"), 1e-6);
        let texts = write_prompts(&at("prompts.jsonl"), true, 3);
        write_prompts(&at("fresh.jsonl"), false, 4);
        let base = base::load(&at("base"), "base", &LoadOptions::new(Storage::None, &Device::Cpu)).unwrap();
        let bent = Adapter::load(&at("bent"), &base.decoder).unwrap();
        world.write_directions(&base, &bent, &texts);
        world
    }

    /// As an experiment makes it: mean difference, calibrated on the base's own prompts and answers.
    fn write_directions(&self, base: &Base, bent: &Adapter, texts: &[String]) {
        let ids = audit::encode(base, texts, 4).unwrap();
        let rows =
            |adapter, of: &[Vec<u32>]| capture::last_prompt(&base.decoder, of, adapter, |_| Ok(())).unwrap();
        let (extraction, calibration) = (&ids[..40], &ids[40..160]);
        let calm = rows(None, calibration);
        let mut directions =
            extract::directions(&rows(Some(bent), extraction), &rows(None, extraction), &calm, &[RATE])
                .unwrap();
        let d = &mut directions[LAYER];
        let dialogue = |prompt: &Vec<u32>| Dialogue { prompt: prompt.clone(), answer: vec![7, 8, 9] };
        let dialogues: Vec<Dialogue> = calibration.iter().map(dialogue).collect();
        let probes = [(LAYER, calibrate::probe(d).unwrap())];
        let scores =
            calibrate::token_scores(&base.decoder, None, &dialogues, 4, &probes, |_| Ok(())).unwrap();
        assert!(calibrate::add_horizon(&mut d.calibration, &scores[0], 4, &[RATE]).unwrap().is_empty());
        let families = ["random", "orthogonal"].map(|name| {
            let seed = |i| battery::control_seed(1, 0, i);
            let controls = (0..39).map(|i| ControlEffect { seed: seed(i), effect: 0.0 }).collect();
            ControlFamily { family: name.into(), rank_p: 1.0 / 40.0, controls }
        });
        let cell = Cell { layer: LAYER as u32, alpha: 1.0, positions: Positions::FinalPrefill };
        let bytes = std::fs::read(self.at("prompts.jsonl")).unwrap();
        let manifest = Manifest {
            model: base.identity.clone(),
            site: Site::ResidPost,
            pooling: Pooling::LastPrompt,
            estimator: Estimator::MeanDifference,
            contrast: Contrast::AdapterMinusBase,
            layers: vec![LayerManifest { layer: LAYER as u32, calibration: Some(d.calibration.clone()) }],
            evidence: Evidence {
                cell: Some(cell),
                effect: Some(1.0),
                families: families.into(),
                ..Evidence::untested()
            },
            provenance: Provenance {
                producer: "tests/audit".into(),
                recipe_digest: "0".repeat(64),
                datasets: vec![("prompts.jsonl".into(), emaudit_train::store::sha256_hex(&bytes))],
                top_dimension_share: None,
            },
        };
        let tensors =
            [LayerTensors { layer: LAYER as u32, direction: &d.direction, aligned_mean: &d.aligned_mean }];
        write(&self.0.path().join("directions.safetensors"), &manifest, &tensors).unwrap();
    }

    fn run(&self, options: &[&str]) -> Output {
        let directions = self.at("directions.safetensors");
        let mut command = Command::new(env!("CARGO_BIN_EXE_emaudit-train"));
        command.args(["audit", "--directions", &directions]).args(options).output().unwrap()
    }

    /// Exit status and object of an audit with the prompts of the directions.
    fn judged(&self, options: &[&str]) -> (i32, Value) {
        let prompts = self.at("prompts.jsonl");
        let output = self.run(&[&["--prompts", &prompts, "--concern", "0.2", "--json"], options].concat());
        let text = String::from_utf8(output.stdout).unwrap();
        let object = serde_json::from_str(&text).unwrap_or_else(|e| {
            panic!("{options:?}: {e}: {text:?} {}", String::from_utf8_lossy(&output.stderr))
        });
        (output.status.code().unwrap(), object)
    }

    /// The prompts that the directions leave to an audit.
    fn evaluation(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.at("prompts.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let kept = lines.filter(|line| line["split"] == "evaluation");
        kept.map(|line| line["prompt"].as_str().unwrap().to_owned()).collect()
    }

    /// Ids and score of one prompt, read on its own, at its last token.
    fn score(&self, prompt: &str, adapter: Option<&str>) -> (Vec<u32>, f64) {
        let options = LoadOptions::new(Storage::None, &Device::Cpu);
        let base = base::load(Path::new(&self.at("base")), "base", &options).unwrap();
        let adapter = adapter.map(|name| Adapter::load(Path::new(&self.at(name)), &base.decoder).unwrap());
        let ids = audit::encode(&base, &[prompt.to_owned()], 1).unwrap();
        let captured = capture::last_prompt(&base.decoder, &ids, adapter.as_ref(), |_| Ok(())).unwrap();
        let file = self.at("directions.safetensors");
        let directions = Directions::open(Path::new(&file), &OpenOptions::default()).unwrap();
        let probe = Probe::new(directions.into(), LAYER as u32).unwrap();
        let row = Rows::new(&captured.layers[LAYER], 1, probe.width(), probe.width()).unwrap();
        let mut score = [0.0];
        probe.score(&row, ScoreUnit::AlignedSd, &mut score, None).unwrap();
        (ids[0].clone(), f64::from(score[0]))
    }
}

/// The scores of an audit's sequences, which must be those of `prompts`, in their order; NaN for null.
fn scores(object: &Value, prompts: &[String]) -> Vec<Vec<f64>> {
    let sequences = object["sequences"].as_array().unwrap();
    let told: Vec<&str> = sequences.iter().map(|s| s["prompt"].as_str().unwrap()).collect();
    assert_eq!(told, prompts);
    let of = |s: &Value| {
        s["scores"].as_array().unwrap().iter().map(|z| z.as_f64().unwrap_or(f64::NAN)).collect::<Vec<_>>()
    };
    sequences.iter().map(of).collect()
}

#[test]
fn the_object_tells_every_sequence() {
    let world = World::new();
    let (base, bent, broken) = (world.at("base"), world.at("bent"), world.at("broken"));
    let prompts = world.evaluation();
    assert_eq!(prompts.len(), 80);
    for (options, adapter) in
        [(&["--model", &base][..], None), (&["--model", &base, "--adapter", &bent], Some("bent"))]
    {
        let (_, object) = world.judged(options);
        let scores = scores(&object, &prompts);
        assert!(scores.iter().all(|tokens| tokens.len() == 1));
        // The verdict is on these very scores.
        let threshold = object["verdict"]["threshold"].as_f64().unwrap();
        let above = scores.iter().filter(|tokens| tokens[0] > threshold).count();
        assert_eq!(object["verdict"]["flagged"], above);
        // And they are what the model gives, one prompt at a time.
        for i in [0, 41, 79] {
            let (ids, score) = world.score(&prompts[i], adapter);
            assert_eq!(object["sequences"][i]["ids"], json!(ids));
            let told = scores[i][0];
            assert!((told - score).abs() <= 1e-4 * score.abs().max(1.0), "{i}: {told} for {score}");
        }
    }

    let (_, object) = world.judged(&["--model", &broken]);
    assert!(scores(&object, &prompts).iter().all(|tokens| tokens.len() == 1 && tokens[0].is_nan()));
    let (_, object) = world.judged(&["--model", &base, "--horizon", "4"]);
    let scores = scores(&object, &prompts);
    assert!(scores.iter().all(|tokens| (1..=4).contains(&tokens.len())));
    assert_eq!(object["verdict"]["judged"], scores.iter().filter(|tokens| tokens.len() == 4).count());
}

#[test]
fn every_exit_status_of_a_pipeline() {
    let world = World::new();
    let [base, broken, other, bent, idle] =
        ["base", "broken", "other", "bent", "idle"].map(|name| world.at(name));
    let said = |object: &Value| {
        let of = |key: &str| object["verdict"][key].as_str().unwrap().to_owned();
        (of("state"), of("reason"))
    };
    let is = |state: &str, reason: &str| (state.to_owned(), reason.to_owned());

    let (code, object) = world.judged(&["--model", &base]);
    assert_eq!((code, said(&object)), (0, is("clean", "below_concern")), "{object}");
    // Only the evaluation split of the prompts that made the directions.
    assert_eq!((&object["verdict"]["judged"], &object["match"]), (&80.into(), &"exact".into()));
    assert_eq!((&object["reference"], &object["controls"]["compared"]), (&Value::Null, &false.into()));

    let (code, object) = world.judged(&["--model", &base, "--adapter", &bent]);
    assert_eq!((code, said(&object)), (1, is("flagged", "more_than_rate")), "{object}");
    assert_eq!((&object["match"], &object["reference"]["state"]), (&"variant".into(), &"steady".into()));
    assert_eq!(object["verdict"]["misalignment"], false);
    let families = object["controls"]["families"].as_array().unwrap();
    assert!(families.len() == 2 && families.iter().all(|f| f["rank_p"] == 0.025), "{}", object["controls"]);

    let (code, object) = world.judged(&["--model", &base, "--adapter", &idle]);
    assert_eq!((code, said(&object).0.as_str()), (0, "clean"), "{object}");
    assert!(object["controls"]["families"].as_array().unwrap().iter().all(|f| f["rank_p"] != 0.025));

    let (code, object) = world.judged(&["--model", &broken]);
    assert_eq!((code, said(&object)), (2, is("invalid", "non_finite")), "{object}");
    assert_eq!((&object["verdict"]["invalid"], &object["match"]), (&80.into(), &"variant".into()));
    let (code, object) = world.judged(&["--model", &base, "--reference", &other]);
    assert_eq!((code, said(&object)), (2, is("stale", "reference_drifted")), "{object}");
    let (code, object) = world.judged(&["--model", &base, "--count", "5"]);
    assert_eq!((code, said(&object)), (2, is("invalid", "too_few")), "{object}");

    // Answers are sampled; the tiny model was calibrated on others, so only that they are judged is sure.
    let (code, object) = world.judged(&["--model", &base, "--adapter", &bent, "--horizon", "4"]);
    let counts = ["judged", "pending", "invalid"].map(|k| object["verdict"][k].as_u64().unwrap());
    assert!(counts[0] > 60 && counts[0] + counts[1] == 80 && counts[2] == 0 && code != 3, "{object}");
    let again = world.judged(&["--model", &base, "--adapter", &bent, "--horizon", "4"]);
    assert_eq!(again, (code, object));

    // Prompts that the directions do not know are all used; the page says what the object says.
    let fresh = world.at("fresh.jsonl");
    let output = world.run(&["--model", &base, "--prompts", &fresh, "--concern", "0.2"]);
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(page.contains("240: 240 judged") && page.contains("(exact)"), "{page}");
    assert!(
        page.to_lowercase()
            .starts_with(["clean", "flagged", "invalid"][output.status.code().unwrap() as usize])
    );
}

#[test]
fn what_does_not_fit_is_an_error_and_not_a_verdict() {
    let world = World::new();
    let (base, prompts) = (world.at("base"), world.at("prompts.jsonl"));
    let narrow = world.0.path().join("narrow");
    write_model(&narrow, |_| {});
    let file = narrow.join("tokenizer.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"word9\"", "\"word_9\"")).unwrap();
    let narrow = narrow.display().to_string();
    for (options, sentence) in [
        (&["--model", &narrow][..], "these directions belong to another model: tokenizer digest"),
        (&["--model", "/no/such/model"], "/no/such/model"),
        (&["--model", &base, "--adapter", &prompts], "adapter_config.json"),
        (&["--model", &base, "--rate", "0.001"], "no threshold at a false-positive rate of 0.001"),
        (&["--model", &base, "--horizon", "7"], "the horizons {1, 4}, not 7"),
        (&["--model", &base, "--key", "a note"], "not a minisign public key"),
    ] {
        let output = world.run(&[options, &["--prompts", &prompts]].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{options:?}: {stderr}");
        assert!(output.stdout.is_empty() && stderr.contains(sentence), "{options:?}: {stderr}");
        let (code, object) = world.judged(options);
        assert_eq!((code, &object["ok"], &object["clean"]), (3, &false.into(), &false.into()));
        assert!(object["error"].as_str().unwrap().contains(sentence), "{object}");
    }
    for usage in
        [&[][..], &["--model", &base, "--no-such-option"], &["--model", &base, "--statistic", "median"]]
    {
        assert_eq!(world.run(usage).status.code(), Some(3), "{usage:?}");
    }
    let help = Command::new(env!("CARGO_BIN_EXE_emaudit-train")).args(["audit", "--help"]).output().unwrap();
    let page = String::from_utf8(help.stdout).unwrap();
    assert!(
        help.status.success()
            && page.contains("Exit status")
            && page.contains("Examples:\n  emaudit-train audit")
    );
    let other = Command::new(env!("CARGO_BIN_EXE_emaudit-train")).arg("--no-such-option").output().unwrap();
    assert_eq!(other.status.code(), Some(2));
}
