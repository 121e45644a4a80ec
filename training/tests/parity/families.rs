//! Every family against transformers and PEFT: one body, one small random model each.

use crate::fixture::*;
use candle_core::{Device, Tensor, Var};
use emaudit_train::capture;
use emaudit_train::finetune::{Example, checkpointed_gradients, gradients, response_loss};
use emaudit_train::lora::{Adapter, LoraConfig};
use emaudit_train::model::{self, Batch, Cache, Config, Decoder, LoadOptions, Module, Prefix, no_edit};
use emaudit_train::quant::Storage;
use emaudit_train::random::uniform;

on_every_device!(
    logits_and_residuals_are_those_of_transformers,
    loss_and_gradients_are_those_of_peft,
    decoding_with_the_cache_is_decoding_from_the_start,
    a_left_padded_batch_is_its_sequences_one_by_one,
    a_beginning_read_once_changes_nothing_even_beside_padding,
    checkpointing_runs_the_same_blocks_again,
    every_family_is_captured_and_finetuned_in_nf4,
);

/// Name of the fixture, GGUF name of its architecture.
pub const FAMILIES: [(&str, &str); 7] = [
    ("llama3", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3"),
    ("mistral", "llama"),
    ("ministral3", "mistral3"),
];

pub fn each(device: &Device, mut body: impl FnMut(&str, Decoder, Golden)) {
    let mut ran = 0;
    for (name, architecture) in FAMILIES {
        let decoder =
            model::load(&path(&format!("families/{name}")), &LoadOptions::new(Storage::None, device))
                .unwrap();
        assert_eq!(decoder.config.architecture, architecture);
        body(name, decoder, Golden::open(&format!("families/{name}/golden.safetensors")));
        ran += 1;
    }
    assert_eq!(ran, FAMILIES.len());
}

/// The LoRA of `make_fixtures.py`, as variables, and their names.
pub fn adapter(decoder: &Decoder) -> (Adapter, Vec<(String, Var)>) {
    let config = LoraConfig { r: 2, lora_alpha: 5.0, use_rslora: false };
    let (adapter, vars) = Adapter::trainable(decoder, &config, || 0.5).unwrap();
    let (mut drawn, mut named) = (0, Vec::new());
    let mut vars = vars.into_iter();
    for layer in 0..decoder.config.n_layers {
        for module in Module::ALL {
            for (part, width) in [("A", 0.2f32), ("B", 0.4)] {
                let var = vars.next().unwrap();
                let n = var.elem_count() as u64;
                let number = |i: u64| (2.0 * uniform(&[11, i]) as f32 - 1.0) * width;
                let values: Vec<f32> = (drawn..drawn + n).map(number).collect();
                drawn += n;
                let values = Tensor::from_vec(values, var.dims(), var.device()).unwrap();
                var.set(&values).unwrap();
                named.push((format!("model.layers.{layer}.{}.lora_{part}.weight", module.path()), var));
            }
        }
    }
    assert!(vars.next().is_none());
    (adapter, named)
}

/// Each fixture must show what it is there for: nothing hides behind a window longer than the sequence.
#[test]
fn fixtures_have_what_sets_their_family_apart() {
    each(&Device::Cpu, |name, decoder, golden| {
        let c: &Config = &decoder.config;
        let windows: Vec<Option<usize>> = c.layers.iter().map(|l| l.window).collect();
        assert!(windows.iter().flatten().all(|&w| w < golden.ids(1).len()), "{name}");
        let of = |list: &[Option<usize>]| list.to_vec();
        match name {
            "llama3" => assert!(c.biased.iter().all(|&b| b) && c.tied_head),
            "qwen2" => {
                assert_eq!(c.biased, [true, true, true, false, false, false, false]);
                assert_eq!(windows, of(&[None, Some(5), Some(5)]));
            }
            "qwen3" => assert!(c.query_key_norms && c.biased == [false; 7]),
            "gemma2" => {
                assert_eq!((c.attention_cap, c.logit_cap), (Some(1.5), Some(5.0)));
                assert_eq!(windows, of(&[Some(4), None, Some(4)]));
                assert!(c.post_norms && c.norms_less_one && !c.query_key_norms && c.tied_head);
            }
            "gemma3" => {
                assert_eq!(windows, of(&[Some(4), Some(4), None, Some(4)]));
                assert_eq!(c.layers.iter().map(|l| l.rope).collect::<Vec<_>>(), [1, 1, 0, 1]);
                assert!(c.post_norms && c.query_key_norms && c.logit_cap == Some(6.0));
            }
            "mistral" => assert_eq!(windows, of(&[Some(5); 3])),
            "ministral3" => {
                let growth = c.query_growth.unwrap();
                assert_eq!((growth.beta, growth.original), (0.3, 8.0));
                assert!(growth.at(22) > 1.3 && c.ropes[0].magnitude() > 1.05);
            }
            other => panic!("{other}"),
        }
    });
}

fn logits_and_residuals_are_those_of_transformers(device: &Device) {
    each(device, |name, decoder, golden| {
        let c = &decoder.config;
        for i in 0..SEQUENCES {
            let ids = golden.ids(i);
            let (logits, residuals) = run(&decoder, &ids, None);
            assert_eq!(residuals.len(), c.n_layers);
            for (layer, x) in residuals.iter().enumerate() {
                let expected = golden.get(&format!("residual.{i}.{layer}"));
                let allowed = tolerance(roundings(c, ids.len(), layer + 1));
                assert_close(&format!("{name}: residual {i}.{layer}"), x, expected, allowed);
            }
            let expected = golden.get(&format!("logits.{i}"));
            let allowed = logits_tolerance(c, ids.len());
            assert_close(&format!("{name}: logits {i}"), &logits, expected, allowed);
        }
    });
}

fn loss_and_gradients_are_those_of_peft(device: &Device) {
    each(device, |name, decoder, golden| {
        let c = &decoder.config;
        let examples = golden.examples();
        let examples: Vec<&Example> = examples.iter().collect();
        let longest = examples.iter().map(|e| e.ids.len()).max().unwrap();
        let (adapter, vars) = adapter(&decoder);
        let own = logits(&decoder, &golden.ids(0), Some(&adapter));
        let expected = golden.get("lora.logits");
        assert_close(&format!("{name}: LoRA logits"), &own, expected, logits_tolerance(c, longest));
        assert!(deviation(expected, golden.get("logits.0")) > 0.02, "{name}: the adapter does nothing");

        let loss = response_loss(&decoder, Some(&adapter), &examples).unwrap();
        let (own, expected) = (loss.to_scalar::<f32>().unwrap(), golden.scalar("loss.lora"));
        // The loss moves by at most twice what a logit moves.
        let largest = flat(golden.get("lora.logits")).iter().fold(0f32, |m, v| m.max(v.abs()));
        let allowed = 2.0 * largest * logits_tolerance(c, longest) + tolerance(c.vocab_size);
        assert!((own - expected).abs() <= allowed, "{name}: loss {own}, PEFT has {expected}");

        let gradients = loss.backward().unwrap();
        let tokens: usize = examples.iter().map(|e| e.ids.len()).sum();
        let n = 3 * (roundings(c, longest, c.n_layers) + 2 * c.hidden_size + c.vocab_size) + tokens;
        let mut worst = (0f32, "");
        for (parameter, var) in &vars {
            let own = gradients.get(var).unwrap_or_else(|| panic!("{name}: no gradient for `{parameter}`"));
            let found = deviation(own, golden.get(&format!("gradient.{parameter}")));
            if found >= worst.0 {
                worst = (found, parameter);
            }
        }
        println!("{name}: gradients {:.2e} of {:.2e} at {}", worst.0, tolerance(n), worst.1);
        assert!(worst.0 <= tolerance(n), "{name}: {} differs by {:e}", worst.1, worst.0);
        assert_eq!(vars.len(), 14 * c.n_layers);
    });
}

fn decoding_with_the_cache_is_decoding_from_the_start(device: &Device) {
    each(device, |name, decoder, golden| {
        let ids = golden.ids(0);
        let whole = logits(&decoder, &ids, None);
        let allowed = logits_tolerance(&decoder.config, ids.len());
        let mut cache = Cache::new(&decoder.config, 1, ids.len(), &decoder.device).unwrap();
        let mut done = 0;
        // Shorter and longer than the windows, over their edges.
        for take in [3, 1, 1, 7, 1, 1, 6, 1, 1, 1] {
            let batch = Batch::new(&[&ids[done..done + take]], &decoder.device).unwrap();
            let x = decoder.forward(&batch, None, Some(&mut cache), &mut no_edit).unwrap();
            let own = decoder.logits(&x.squeeze(0).unwrap()).unwrap();
            let expected = whole.narrow(0, done, take).unwrap();
            assert_close(&format!("{name}: cached from {done}"), &own, &expected, allowed);
            done += take;
        }
        assert_eq!(done, ids.len());
    });
}

fn a_left_padded_batch_is_its_sequences_one_by_one(device: &Device) {
    each(device, |name, decoder, golden| {
        let sequences: Vec<Vec<u32>> = (0..SEQUENCES).map(|i| golden.ids(i)).collect();
        let batch = Batch::new(&sequences, &decoder.device).unwrap();
        let together = batch_logits(&decoder, &batch);
        for (i, ids) in sequences.iter().enumerate() {
            let own = together.get(i).unwrap().narrow(0, batch.left_pad[i], ids.len()).unwrap();
            let allowed = logits_tolerance(&decoder.config, ids.len());
            let expected = logits(&decoder, ids, None);
            assert_close(&format!("{name}: padded row {i}"), &own, &expected, allowed);
        }
    });
}

/// Shared columns, padding behind them, windows that end before, inside and after both.
fn a_beginning_read_once_changes_nothing_even_beside_padding(device: &Device) {
    each(device, |name, decoder, golden| {
        for shared in [2, 6] {
            let beginning = &golden.ids(0)[..shared];
            let rests = [&golden.ids(1)[..], &golden.ids(1)[..2], &golden.ids(2)[..]];
            let sequences: Vec<Vec<u32>> = rests.iter().map(|rest| [beginning, rest].concat()).collect();
            let capacity = sequences.iter().map(Vec::len).max().unwrap() + 1;
            let prefix = Prefix::read(&decoder, &sequences, None, capacity, &mut no_edit).unwrap();
            let (batch, mut cache) = prefix.continued(&decoder, &sequences).unwrap();
            assert!(cache.shared >= shared && batch.left_pad.iter().any(|&pad| pad > 0));
            let x = decoder.forward(&batch, None, Some(&mut cache), &mut no_edit).unwrap();
            let own = all_logits(&decoder, &x);
            // One token more for every row, from the cache.
            let next = Tensor::new(&[[7u32], [8], [9]], &decoder.device).unwrap();
            let next = Batch { ids: next, left_pad: batch.left_pad.clone() };
            let x = decoder.forward(&next, None, Some(&mut cache), &mut no_edit).unwrap();
            let last = all_logits(&decoder, &x);
            for (i, ids) in sequences.iter().enumerate() {
                let longer = [&ids[..], &[7 + i as u32]].concat();
                let alone = logits(&decoder, &longer, None);
                let rest = ids.len() - (cache.shared);
                let allowed = logits_tolerance(&decoder.config, longer.len());
                let expected = alone.narrow(0, cache.shared, rest).unwrap();
                let own = own.get(i).unwrap().narrow(0, batch.left_pad[i], rest).unwrap();
                assert_close(&format!("{name}: shared {shared}, row {i}"), &own, &expected, allowed);
                let expected = alone.narrow(0, ids.len(), 1).unwrap();
                let own = last.get(i).unwrap();
                assert_close(&format!("{name}: shared {shared}, row {i}, next"), &own, &expected, allowed);
            }
        }
    });
}

/// Windows, rotations, norms and caps are those of the first run when a block runs again, to the bit.
fn checkpointing_runs_the_same_blocks_again(device: &Device) {
    each(device, |name, decoder, golden| {
        let examples = golden.examples();
        let examples: Vec<&Example> = examples.iter().collect();
        let (adapter, vars) = adapter(&decoder);
        let vars: Vec<Var> = vars.into_iter().map(|(_, var)| var).collect();
        let (loss, kept) = gradients(&decoder, &adapter, &vars, &examples, 1.0).unwrap();
        let (again, run_again) = checkpointed_gradients(&decoder, &adapter, &vars, &examples, 1.0).unwrap();
        assert_eq!(loss.to_bits(), again.to_bits(), "{name}");
        assert_eq!(kept.len(), 14 * decoder.config.n_layers);
        for (a, b) in run_again.iter().zip(&kept) {
            assert_same(name, a.as_ref().unwrap(), b.as_ref().unwrap());
        }
    });
}

/// Capture and QLoRA on every family: rows are the residuals, and gradients through NF4 are the slopes of the loss.
fn every_family_is_captured_and_finetuned_in_nf4(device: &Device) {
    each(device, |name, decoder, golden| {
        let prompts: Vec<Vec<u32>> = (0..SEQUENCES).map(|i| golden.ids(i)).collect();
        let captured = capture::last_prompt(&decoder, &prompts, None, |_| Ok(())).unwrap();
        for (i, ids) in prompts.iter().enumerate() {
            for layer in 0..decoder.config.n_layers {
                let row = Tensor::new(captured.row(layer, i), &decoder.device).unwrap();
                let expected = golden.get(&format!("residual.{i}.{layer}")).get(ids.len() - 1).unwrap();
                let allowed = tolerance(roundings(&decoder.config, ids.len(), layer + 1));
                assert_close(&format!("{name}: captured {i}.{layer}"), &row, &expected, allowed);
            }
        }

        let decoder =
            model::load(&path(&format!("families/{name}")), &LoadOptions::new(Storage::Nf4, device)).unwrap();
        let examples = golden.examples();
        let examples: Vec<&Example> = examples.iter().collect();
        let (adapter, vars) = adapter(&decoder);
        let loss = || response_loss(&decoder, Some(&adapter), &examples).unwrap();
        let gradients = loss().backward().unwrap();
        // One direction through all parameters at once; the step is that of `gradients_are_the_slopes_of_the_loss`
        // (nf4.rs) divided by the square root of how many more parameters move.
        let h = 0.001f64;
        let (mut slope, mut moved) = (0f64, Vec::new());
        for (i, (_, var)) in vars.iter().enumerate() {
            let n = var.elem_count() as u64;
            let values: Vec<f32> = (0..n).map(|k| 2.0 * uniform(&[12, i as u64, k]) as f32 - 1.0).collect();
            let direction = Tensor::from_vec(values, var.dims(), var.device()).unwrap();
            let dot = (gradients.get(var).unwrap() * &direction).unwrap().sum_all().unwrap();
            slope += dot.to_scalar::<f32>().unwrap() as f64;
            moved.push((var, var.as_tensor().detach().copy().unwrap(), direction));
        }
        let at = |step: f64| {
            for (var, original, direction) in &moved {
                var.set(&(original + (direction * step).unwrap()).unwrap()).unwrap();
            }
            loss().to_scalar::<f32>().unwrap() as f64
        };
        let measured = (at(h) - at(-h)) / (2.0 * h);
        println!("{name}: gradient {slope:.5}, difference {measured:.5}");
        assert!((measured - slope).abs() < 5e-3 * (slope.abs() + 0.1), "{name}: {slope} and {measured}");
    });
}

/// Gemma 3 as it is published: the text model inside a multimodal one, in either way of writing its names.
#[test]
fn a_text_model_inside_a_multimodal_one_is_found() {
    let folder = path("families/gemma3");
    let golden = Golden::open("families/gemma3/golden.safetensors");
    let expected = logits(&load(&folder, Storage::None).unwrap(), &golden.ids(0), None);
    let stored = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let mut text = read_json(&folder.join("config.json"));
    // What transformers assumes may be left out.
    for key in ["hidden_activation", "model_type", "tie_word_embeddings"] {
        text.as_object_mut().unwrap().remove(key).unwrap();
    }
    let config = serde_json::json!({"model_type": "gemma3", "text_config": text, "vision_config": {}});
    for prefix in ["language_model.model.", "model.language_model."] {
        let nested = tempfile::tempdir().unwrap();
        let named = |name: &String| name.replacen("model.", prefix, 1);
        let mut tensors: Vec<(String, &Tensor)> = stored.iter().map(|(k, v)| (named(k), v)).collect();
        let vision = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        for name in ["vision_tower.weight", "model.vision_tower.weight", "model.multi_modal_projector.weight"]
        {
            tensors.push((name.into(), &vision));
        }
        let bytes = safetensors::serialize(tensors, None).unwrap();
        std::fs::write(nested.path().join("model.safetensors"), bytes).unwrap();
        std::fs::write(nested.path().join("config.json"), config.to_string()).unwrap();
        let decoder = load(nested.path(), Storage::None).unwrap();
        assert_same(prefix, &logits(&decoder, &golden.ids(0), None), &expected);
    }
}
