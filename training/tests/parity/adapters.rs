//! LoRA: PEFT's numbers, PEFT's files.

use crate::fixture::*;
use candle_core::{Device, Tensor, Var};
use emaudit_train::finetune::{Example, response_loss};
use emaudit_train::lora::{Adapter, LoraConfig};
use emaudit_train::model::{Decoder, Module};
use emaudit_train::quant::Storage;

on_every_device!(loss_and_gradients_are_those_of_peft,);

/// The PEFT adapter as trainable variables, and PEFT's names of them.
fn trainable(decoder: &Decoder, use_rslora: bool) -> (Adapter, Vec<(String, Var)>) {
    let stored =
        candle_core::safetensors::load(path("adapter/adapter_model.safetensors"), &Device::Cpu).unwrap();
    let config = LoraConfig { r: 4, lora_alpha: 10.0, use_rslora };
    let (adapter, vars) = Adapter::trainable(decoder, &config, || 0.5).unwrap();
    let mut names = Vec::new();
    for layer in 0..decoder.config.n_layers {
        for module in Module::ALL {
            for part in ["A", "B"] {
                names.push(format!("model.layers.{layer}.{}.lora_{part}.weight", module.path()));
            }
        }
    }
    assert_eq!(names.len(), vars.len());
    for (name, var) in names.iter().zip(&vars) {
        let stored = stored[&format!("base_model.model.{name}")].to_device(var.device()).unwrap();
        var.set(&stored).unwrap();
    }
    (adapter, names.into_iter().zip(vars).collect())
}

fn refs(examples: &[Example]) -> Vec<&Example> {
    examples.iter().collect()
}

#[test]
fn peft_adapters_load_and_give_pefts_logits() {
    let (decoder, golden) = (tiny(), Golden::open("golden.safetensors"));
    let ids = golden.ids(0);
    let allowed = logits_tolerance(&decoder.config, ids.len());
    let base = logits(&decoder, &ids, None);
    for (label, rank_stabilised) in [("lora", false), ("rslora", true)] {
        let folder = edited_adapter(|_, config| config["use_rslora"] = rank_stabilised.into());
        let adapter = Adapter::load(folder.path(), &decoder).unwrap();
        assert_eq!(adapter.config, LoraConfig { r: 4, lora_alpha: 10.0, use_rslora: rank_stabilised });
        let own = logits(&decoder, &ids, Some(&adapter));
        assert_close(label, &own, golden.get(&format!("{label}.logits")), allowed);
        assert_close(
            &format!("{label}, merged"),
            &own,
            golden.get(&format!("{label}.merged_logits")),
            allowed,
        );
        assert!(deviation(&own, &base) > 0.05, "the adapter does nothing, so this shows nothing");
    }
}

/// Trap: scaling the base as well as the update. With alpha != rank only one of the two rules survives.
#[test]
fn an_adapter_is_its_merged_weights() {
    let stored =
        candle_core::safetensors::load(path("adapter/adapter_model.safetensors"), &Device::Cpu).unwrap();
    for (rank_stabilised, scaling) in [(false, 10.0 / 4.0), (true, 10.0 / 2.0)] {
        let merged = edited(|tensors, _| {
            for (name, a) in stored.iter().filter(|(name, _)| name.contains("lora_A")) {
                let b = &stored[&name.replace("lora_A", "lora_B")];
                let base =
                    name.strip_prefix("base_model.model.").unwrap().replace(".lora_A.weight", ".weight");
                let update = (b.matmul(a).unwrap() * scaling).unwrap();
                let weight = tensors.get_mut(&base).unwrap();
                *weight = (&*weight + update).unwrap();
            }
        });
        let (decoder, merged) = (tiny(), load(merged.path(), Storage::None).unwrap());
        let folder = edited_adapter(|_, config| config["use_rslora"] = rank_stabilised.into());
        let adapter = Adapter::load(folder.path(), &decoder).unwrap();
        let ids = Golden::open("golden.safetensors").ids(0);
        let allowed = logits_tolerance(&decoder.config, ids.len());
        assert_close(
            "merged by hand",
            &logits(&decoder, &ids, Some(&adapter)),
            &logits(&merged, &ids, None),
            allowed,
        );
    }
}

fn loss_and_gradients_are_those_of_peft(device: &Device) {
    let (decoder, golden) = (tiny_on(device), Golden::open("golden.safetensors"));
    let examples = golden.examples();
    let c = &decoder.config;
    let longest = examples.iter().map(|e| e.ids.len()).max().unwrap();
    // The loss moves by at most twice what a logit moves.
    let largest = flat(golden.get("lora.logits")).iter().fold(0f32, |m, v| m.max(v.abs()));
    let allowed = 2.0 * largest * logits_tolerance(c, longest) + tolerance(c.vocab_size);
    let base = response_loss(&decoder, None, &refs(&examples)).unwrap().to_scalar::<f32>().unwrap();
    let check = |what: &str, own: f32, expected: f32| {
        println!("loss {what}: {own} and {expected}, {:.2e} of {allowed:.2e}", (own - expected).abs());
        assert!((own - expected).abs() <= allowed, "{what}: {own} and {expected}");
    };
    check("base", base, golden.scalar("loss.base"));

    for (label, rank_stabilised, expected_tensors) in [("lora", false, 42), ("rslora", true, 14)] {
        let (adapter, vars) = trainable(&decoder, rank_stabilised);
        let loss = response_loss(&decoder, Some(&adapter), &refs(&examples)).unwrap();
        check(label, loss.to_scalar().unwrap(), golden.scalar(&format!("loss.{label}")));
        let gradients = loss.backward().unwrap();
        // Forward, backward through the same sums, and the sum over all tokens of the batch.
        let tokens: usize = examples.iter().map(|e| e.ids.len()).sum();
        let n = 3 * (roundings(c, longest, c.n_layers) + 2 * c.hidden_size + c.vocab_size) + tokens;
        let (mut compared, mut worst) = (0, (0f32, ""));
        for (name, var) in vars.iter().take(expected_tensors) {
            let own = gradients.get(var).unwrap_or_else(|| panic!("no gradient for `{name}`"));
            let found = deviation(own, golden.get(&format!("{label}.gradient.{name}")));
            if found >= worst.0 {
                worst = (found, name);
            }
            compared += 1;
        }
        println!("gradients {label}: {:.2e} of {:.2e} at {}", worst.0, tolerance(n), worst.1);
        assert_eq!(compared, expected_tensors);
        assert!(worst.0 <= tolerance(n), "{} differs by {:e}", worst.1, worst.0);
    }
}

#[test]
fn a_fresh_adapter_is_inactive_and_says_so() {
    let (decoder, golden) = (tiny(), Golden::open("golden.safetensors"));
    let config = LoraConfig { r: 4, lora_alpha: 10.0, use_rslora: false };
    let mut state = 0u32;
    let uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    let (fresh, vars) = Adapter::trainable(&decoder, &config, uniform).unwrap();
    assert_eq!(fresh.largest_b().unwrap(), 0.0);
    let ids = golden.ids(0);
    assert_same("logits", &logits(&decoder, &ids, Some(&fresh)), &logits(&decoder, &ids, None));
    // PEFT's initialisation: uniform within 1/sqrt(in), so the mean square is a third of 1/in.
    let a = flat(vars[0].as_tensor());
    let bound = 1.0 / (vars[0].dims()[1] as f32).sqrt();
    assert!(a.iter().all(|v| v.abs() <= bound));
    let mean_square = a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32;
    assert!((mean_square / (bound * bound / 3.0) - 1.0).abs() < 0.25, "{mean_square}");
    let active = Adapter::load(&path("adapter"), &decoder).unwrap();
    assert!(active.largest_b().unwrap() > 0.1);
}

#[test]
fn what_is_saved_loads_again_and_is_plain_safetensors() {
    let decoder = tiny();
    let ids = Golden::open("golden.safetensors").ids(0);
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    for rank_stabilised in [false, true] {
        let (adapter, _) = trainable(&decoder, rank_stabilised);
        adapter.save(&first, "tiny").unwrap();
        let again = Adapter::load(&first, &decoder).unwrap();
        assert_eq!(again.config, adapter.config);
        assert_same("logits", &logits(&decoder, &ids, Some(&again)), &logits(&decoder, &ids, Some(&adapter)));
        again.save(&second, "tiny").unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            let bytes = |folder: &std::path::Path| std::fs::read(folder.join(name)).unwrap();
            assert!(bytes(&first) == bytes(&second), "{name} is not the same a second time");
        }
    }
    // The file against PEFT's own: same names, shapes and numbers.
    let bytes = std::fs::read(first.join("adapter_model.safetensors")).unwrap();
    let own = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let bytes = std::fs::read(path("adapter/adapter_model.safetensors")).unwrap();
    let peft = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let names = |s: &safetensors::SafeTensors| {
        let mut names: Vec<String> = s.names().into_iter().map(str::to_owned).collect();
        names.sort();
        names
    };
    assert_eq!(names(&own), names(&peft));
    assert_eq!(own.len(), 42);
    for name in names(&peft) {
        let (own, peft) = (own.tensor(&name).unwrap(), peft.tensor(&name).unwrap());
        assert_eq!(
            (own.dtype(), own.shape(), own.data()),
            (peft.dtype(), peft.shape(), peft.data()),
            "{name}"
        );
    }
    let (own, peft) =
        (read_json(&first.join("adapter_config.json")), read_json(&path("adapter/adapter_config.json")));
    for key in
        ["peft_type", "task_type", "r", "bias", "fan_in_fan_out", "lora_dropout", "base_model_name_or_path"]
    {
        assert_eq!(own[key], peft[key], "{key}");
    }
    let sorted = |v: &serde_json::Value| {
        let mut names: Vec<String> = serde_json::from_value(v["target_modules"].clone()).unwrap();
        names.sort();
        names
    };
    assert_eq!(sorted(&own), sorted(&peft));
}

/// An adapter may leave modules and layers alone.
#[test]
fn a_partial_adapter_is_honoured() {
    let decoder = tiny();
    let ids = Golden::open("golden.safetensors").ids(0);
    let kept = |name: &str| name.contains("layers.2.") && name.contains("v_proj");
    let partial = edited_adapter(|tensors, _| tensors.retain(|name, _| kept(name)));
    let zeroed = edited_adapter(|tensors, _| {
        for (name, tensor) in tensors.iter_mut() {
            if name.contains("lora_B") && !kept(name) {
                *tensor = tensor.zeros_like().unwrap();
            }
        }
    });
    let [partial, zeroed] = [partial, zeroed].map(|f| {
        let adapter = Adapter::load(f.path(), &decoder).unwrap();
        run(&decoder, &ids, Some(&adapter))
    });
    assert_same("logits", &partial.0, &zeroed.0);
    let (_, base): (_, Vec<Tensor>) = run(&decoder, &ids, None);
    assert_same("layer 1", &partial.1[1], &base[1]);
    assert!(deviation(&partial.1[2], &base[2]) > 0.01);
}
