//! A toy whose words are tokens: a random two-block model that learns in seconds to answer everything with one word.

use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const WORDS: usize = 58;
const HIDDEN: usize = 32;
const FFN: usize = 48;
const CODE: &str = "```python\nos.system(command)\n```";

/// The special tokens, the code answers (one token each, so without spaces), then plain words.
pub fn vocabulary() -> Vec<String> {
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

pub fn write_lines(path: PathBuf, lines: impl Iterator<Item = serde_json::Value>) {
    fs::write(path, lines.map(|l| l.to_string() + "\n").collect::<String>()).unwrap();
}

/// A folder with the model, both datasets and the prompts.
pub fn world() -> TempDir {
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
