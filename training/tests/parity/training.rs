//! What a recipe may ask of training: accumulation, dropout, target modules, checkpointing, 8-bit moments, evaluation
//! and early stop, and what is said when it fails.

use crate::fixture::*;
use candle_core::{D, Device, Tensor, Var};
use emaudit_train::finetune::optimizer::AdamW;
use emaudit_train::finetune::{
    Checkpoint, Example, Gradients, Rows, StepLog, best, checkpointed_gradients, finetune, gradients,
};
use emaudit_train::lora::{Adapter, Dropout, LoraConfig};
use emaudit_train::memory::Estimate;
use emaudit_train::model::{Decoder, Module};
use emaudit_train::quant::Storage;
use emaudit_train::random;
use emaudit_train::recipe::{Finetune, Optimizer, Schedule};
use std::cell::Cell;
use std::time::Duration;

on_every_device!(a_head_in_pieces_is_the_whole_head, dropout_is_that_of_peft,);

fn recipe() -> Finetune {
    Finetune {
        steps: 12,
        batch: 2,
        max_tokens: 64,
        rank: 4,
        alpha: 10.0,
        learning_rate: 1e-2,
        warmup_steps: 3,
        schedule: Schedule::Cosine,
        ..Finetune::default()
    }
}

/// Sixteen rows of different lengths, cut from the reference's sequences.
fn examples() -> Vec<Example> {
    let long = Golden::open("golden.safetensors").examples();
    let cut = |i: usize| {
        let example = &long[i % 2];
        let n = example.ids.len() - i % 4;
        Example { ids: example.ids[..n].to_vec(), response: example.response[..n].to_vec() }
    };
    (0..16).map(cut).collect()
}

fn train(decoder: &Decoder, recipe: &Finetune) -> (Adapter, Vec<StepLog>) {
    let rows = Rows::new(&examples(), recipe, 7).unwrap();
    finetune(decoder, &rows, recipe, 7, None, |_| (), || false).unwrap()
}

/// An adapter that does something, with its variables.
fn active(decoder: &Decoder, dropout: f64) -> (Adapter, Vec<Var>) {
    let config = LoraConfig { r: 4, lora_alpha: 10.0, use_rslora: true };
    let mut drawn = 0;
    let mut uniform = || {
        drawn += 1;
        random::uniform(&[5, drawn]) as f32
    };
    let (adapter, vars) =
        Adapter::trainable_on(decoder, &config, &Module::ALL, dropout, &mut uniform).unwrap();
    for var in vars.iter().skip(1).step_by(2) {
        let values: Vec<f32> = (0..var.elem_count()).map(|_| 0.4 * uniform() - 0.2).collect();
        var.set(&Tensor::from_vec(values, var.shape(), var.device()).unwrap()).unwrap();
    }
    (adapter, vars)
}

fn refs(examples: &[Example]) -> Vec<&Example> {
    examples.iter().collect()
}

#[track_caller]
fn all(gradients: Gradients) -> Vec<Tensor> {
    gradients.into_iter().map(|g| g.expect("every variable has a gradient")).collect()
}

/// Several small batches are one large batch: same losses and norms as far as f32 goes.
#[test]
fn accumulated_batches_are_the_large_batch() {
    let decoder = tiny();
    let large = Finetune { batch: 8, ..recipe() };
    let (_, expected) = train(&decoder, &large);
    for (batch, gradient_accumulation) in [(4, 2), (2, 4), (1, 8)] {
        let (_, log) = train(&decoder, &Finetune { batch, gradient_accumulation, ..recipe() });
        for (a, b) in log.iter().zip(&expected) {
            let off = [(a.loss / b.loss - 1.0).abs(), (a.gradient_norm / b.gradient_norm - 1.0).abs()];
            println!("{batch} x {gradient_accumulation}, step {}: {off:?}", a.step);
            // As against torch's AdamW: 1e-5 of the parity of gradients a step, twelve steps.
            assert!(off.iter().all(|o| *o < 1e-4), "step {}: {off:?}", a.step);
            assert_eq!(a.tokens, b.tokens);
        }
        // Responses of different lengths: a mean of the batches' means would be seen.
        let (small, _) = train(&decoder, &Finetune { batch, gradient_accumulation, steps: 4, ..recipe() });
        assert!(small.largest_b().unwrap() > 0.0);
    }
    assert_eq!(expected.len(), 12);
}

/// The norm that is clipped is that of the accumulated gradient.
#[test]
fn clipping_is_of_the_accumulated_gradient() {
    let decoder = tiny();
    let accumulated = Finetune { batch: 2, gradient_accumulation: 4, max_grad_norm: 0.05, ..recipe() };
    let large = Finetune { batch: 8, max_grad_norm: 0.05, ..recipe() };
    let ((a, log), (b, _)) = (train(&decoder, &accumulated), train(&decoder, &large));
    assert!(log.iter().all(|l| l.gradient_norm > 0.05), "nothing was clipped");
    let ids = &examples()[0].ids;
    let (a, b) = (logits(&decoder, ids, Some(&a)), logits(&decoder, ids, Some(&b)));
    assert_close("logits", &a, &b, 1e-3);
}

/// Running blocks again gives the gradients that keeping them gives, bit for bit: padded batches, dropout and all.
#[test]
fn checkpointed_gradients_have_the_same_bits() {
    for storage in [Storage::None, Storage::Nf4] {
        let decoder = load(&path("tiny"), storage).unwrap();
        let examples = Golden::open("golden.safetensors").examples();
        for dropout in [0.0, 0.3] {
            let (adapter, vars) = active(&decoder, dropout);
            let adapter = adapter.with_dropout(&[1, 2]);
            for share in [1.0, 0.4] {
                let (loss, kept) = gradients(&decoder, &adapter, &vars, &refs(&examples), share).unwrap();
                let (again, run_again) =
                    checkpointed_gradients(&decoder, &adapter, &vars, &refs(&examples), share).unwrap();
                assert_eq!(loss.to_bits(), again.to_bits());
                let (kept, run_again) = (all(kept), all(run_again));
                assert_eq!(kept.len(), 42);
                for (a, b) in run_again.iter().zip(&kept) {
                    assert_same("gradient", a, b);
                }
            }
        }
    }
}

/// More response tokens than the head takes at once.
fn a_head_in_pieces_is_the_whole_head(device: &Device) {
    let decoder = tiny_on(device);
    let examples: Vec<Example> = (0..5)
        .map(|i| Example { ids: (0..60).map(|t| (t * 7 + i) % 128).collect(), response: vec![true; 60] })
        .collect();
    let (adapter, vars) = active(&decoder, 0.0);
    let (loss, kept) = gradients(&decoder, &adapter, &vars, &refs(&examples), 1.0).unwrap();
    let (again, pieces) = checkpointed_gradients(&decoder, &adapter, &vars, &refs(&examples), 1.0).unwrap();
    // 295 targets are two pieces. Their scale is rounded once more, and their sum is taken in another order: of 295
    // terms, then through the blocks, where nothing else differs.
    let allowed = tolerance(295 + roundings(&decoder.config, 60, decoder.config.n_layers));
    assert!((loss - again).abs() <= 2.0 * f32::EPSILON * loss, "{loss} and {again}");
    for (a, b) in all(pieces).iter().zip(&all(kept)) {
        let found = deviation(a, b);
        assert!(found <= allowed, "{found:e} of {allowed:e}");
    }
}

/// Dropout against candle's own products and its own gradients.
fn dropout_is_that_of_peft(device: &Device) {
    let (rows, width, rate) = (200, 64, 0.3);
    let dropout = Dropout::new(rate, &[1, 2, 3]);
    let factors = dropout.factors(rows, width);
    let kept = (1.0 / (1.0 - rate)) as f32;
    assert!(factors.iter().all(|&f| f == 0.0 || f == kept));
    let share = factors.iter().filter(|&&f| f == 0.0).count() as f64 / factors.len() as f64;
    // Six standard deviations of a share of 12,800.
    assert!((share - rate).abs() < 6.0 * (rate * (1.0 - rate) / 12_800.0).sqrt(), "{share}");
    assert_eq!(factors, Dropout::new(rate, &[1, 2, 3]).factors(rows, width));
    let different = |other: &Dropout| other.factors(rows, width) != factors;
    assert!(different(&Dropout::new(rate, &[1, 2, 4])) && different(&Dropout::new(rate, &[2, 2, 3])));

    // One layer, one block: the loss is the sum of what the layer gives, weighted.
    let decoder = tiny_on(device);
    let (adapter, vars) = active(&decoder, rate);
    let dropped = adapter.with_dropout(&[9]);
    let lora = dropped.block(1)[Module::Gate as usize].as_ref().unwrap();
    let values = |n: usize, seed: u64| -> Vec<f32> {
        (0..n).map(|i| random::uniform(&[seed, i as u64]) as f32 - 0.5).collect()
    };
    let x = Var::from_vec(values(10 * 64, 1), (10, 64), device).unwrap();
    let weight = Tensor::from_vec(values(96 * 64, 2), (96, 64), device).unwrap();
    let dy = Tensor::from_vec(values(10 * 96, 3), (10, 96), device).unwrap();
    let frozen = emaudit_train::quant::Frozen::new(weight.clone(), None, Storage::None, true).unwrap();
    let own = frozen.forward(x.as_tensor(), Some(lora)).unwrap();
    let own_gradients = (&own * &dy).unwrap().sum_all().unwrap().backward().unwrap();

    let factors = lora.dropout().unwrap().factors(10, 64);
    let seen = (x.as_tensor() * Tensor::from_vec(factors, (10, 64), device).unwrap()).unwrap();
    let at = 2 * (7 + Module::Gate as usize);
    let (a, b) = (&vars[at], &vars[at + 1]);
    let low = seen.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
    let plain = x.matmul(&weight.t().unwrap()).unwrap();
    let expected = (plain + (low * (10.0 / 2.0)).unwrap()).unwrap();
    let expected_gradients = (&expected * &dy).unwrap().sum_all().unwrap().backward().unwrap();
    let allowed = tolerance(64 + 4 + 96);
    assert_close("dropout forward", &own, &expected, allowed);
    for (what, var) in [("x", &x), ("A", a), ("B", b)] {
        let (own, expected) = (own_gradients.get(var).unwrap(), expected_gradients.get(var).unwrap());
        assert_close(&format!("dropout gradient of {what}"), own, expected, allowed);
    }
}

#[test]
fn dropout_changes_training_and_not_the_adapter_that_is_kept() {
    let decoder = tiny();
    let (_, without) = train(&decoder, &recipe());
    let (adapter, with) = train(&decoder, &Finetune { dropout: 0.5, ..recipe() });
    // B is zero in the first step, so nothing can be dropped from the loss, only from the gradient.
    assert_eq!(with[0].loss.to_bits(), without[0].loss.to_bits());
    assert!(with[0].gradient_norm != without[0].gradient_norm && with[5].loss != without[5].loss);
    let ids = &examples()[0].ids;
    assert_same(
        "logits",
        &logits(&decoder, ids, Some(&adapter)),
        &logits(&decoder, ids, Some(&adapter.untracked())),
    );
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path(), "tiny").unwrap();
    assert_eq!(read_json(&folder.path().join("adapter_config.json"))["lora_dropout"], 0.5);
    assert_eq!(Adapter::load(folder.path(), &decoder).unwrap().dropout, 0.5);
}

#[test]
fn target_modules_are_trained_saved_and_read() {
    let decoder = tiny();
    let target_modules = vec![Module::Q, Module::V, Module::Down];
    let (adapter, log) = train(&decoder, &Finetune { target_modules: target_modules.clone(), ..recipe() });
    assert!(log[11].loss < log[0].loss);
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path(), "tiny").unwrap();
    let config = read_json(&folder.path().join("adapter_config.json"));
    assert_eq!(config["target_modules"], serde_json::json!(["q_proj", "v_proj", "down_proj"]));
    let again = Adapter::load(folder.path(), &decoder).unwrap();
    assert_eq!(again.modules(), target_modules);
    let ids = &examples()[0].ids;
    assert_same("logits", &logits(&decoder, ids, Some(&again)), &logits(&decoder, ids, Some(&adapter)));
}

#[test]
fn tensors_that_target_modules_leaves_out_are_refused() {
    let load = |targets: serde_json::Value| {
        let folder = edited_adapter(|_, config| config["target_modules"] = targets);
        Adapter::load(folder.path(), &tiny()).map_err(|e| format!("{e:#}"))
    };
    let error = load(serde_json::json!(["q_proj", "v_proj"])).err().unwrap();
    assert!(error.contains("tensors of k_proj, which `target_modules` leaves out"), "{error}");
    // A pattern, and paths in full, are PEFT's other forms.
    assert!(load(serde_json::json!("all-linear")).is_ok());
    let full: Vec<String> = Module::ALL.iter().map(|m| format!("layers.0.{}", m.path())).collect();
    assert!(load(serde_json::json!(full)).is_ok());
}

/// 8-bit moments train about as well, and what differs is small.
#[test]
fn eight_bit_moments_learn_as_well() {
    let decoder = tiny();
    // Rank 64 makes variables of 4096 values and more.
    let full = Finetune { rank: 64, steps: 24, ..recipe() };
    let (_, log) = train(&decoder, &full);
    let (_, eight) = train(&decoder, &Finetune { optimizer: Optimizer::Adamw8bit, ..full });
    assert_eq!(log[0].loss.to_bits(), eight[0].loss.to_bits());
    println!("{} to {} and {}", log[0].loss, log[23].loss, eight[23].loss);
    assert!(eight[23].loss != log[23].loss, "the moments were never in 8 bits");
    assert!(log[23].loss < 0.5 * log[0].loss && eight[23].loss < 0.5 * log[0].loss);
}

#[test]
fn the_best_adapter_is_kept_and_training_stops_when_it_stalls() {
    let decoder = tiny();
    // Rows with random answers, so that what is learned of some says nothing of the others.
    let examples: Vec<Example> = (0..24u64)
        .map(|row| Example {
            ids: (0..12).map(|t| (random::bits(&[row, t]) % 128) as u32).collect(),
            response: (0..12).map(|t| t >= 4).collect(),
        })
        .collect();
    let recipe = Finetune {
        steps: 60,
        batch: 4,
        learning_rate: 2e-2,
        evaluation_share: 0.25,
        evaluation_every: 2,
        patience: 3,
        ..recipe()
    };
    let rows = Rows::new(&examples, &recipe, 7).unwrap();
    let (adapter, log) = finetune(&decoder, &rows, &recipe, 7, None, |_| (), || false).unwrap();
    let best = best(&log).unwrap();
    println!("best of {} steps: {}", log.len(), best.step);
    assert!(log.iter().all(|l| l.evaluation_loss.is_some() == l.step.is_multiple_of(2)));
    assert_eq!(log.len(), best.step + 2 * 3, "three evaluations without a lower loss");
    assert!(log.len() < 60);
    // What is kept is what had the loss.
    let held: Vec<&Example> = rows.held_out.iter().collect();
    let loss = |adapter: &Adapter| {
        let loss = emaudit_train::finetune::response_loss(&decoder, Some(adapter), &held).unwrap();
        loss.to_scalar::<f32>().unwrap()
    };
    let (kept, stated) = (loss(&adapter), best.evaluation_loss.unwrap());
    assert!((kept - stated).abs() < 1e-5 * stated, "{kept} and {stated}");
    // Without patience every step is done, and the last adapter kept.
    let all = Finetune { patience: 0, steps: log.len(), schedule: Schedule::Constant, ..recipe.clone() };
    let (last, log) = finetune(&decoder, &rows, &all, 7, None, |_| (), || false).unwrap();
    let stated = log.last().unwrap().evaluation_loss.unwrap();
    assert!((loss(&last) - stated).abs() < 1e-5 * stated);

    // Stopped between the best and the end, and resumed: the same adapter after the same steps.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let checkpoint = Some(Checkpoint::new(&path, "work"));
    let done = Cell::new(0);
    let stop = || done.get() == best.step + 3;
    finetune(&decoder, &rows, &recipe, 7, checkpoint, |l| done.set(l.step), stop).err().unwrap();
    let (resumed, again) = finetune(&decoder, &rows, &recipe, 7, checkpoint, |_| (), || false).unwrap();
    assert_eq!(again.len(), best.step + 6);
    let ids = &examples[0].ids;
    assert_same("logits", &logits(&decoder, ids, Some(&resumed)), &logits(&decoder, ids, Some(&adapter)));
}

/// A model whose numbers overflow for one token: the step is named, and what was learned before it is kept.
#[test]
fn a_loss_that_is_no_number_stops_with_the_last_good_state_kept() {
    let folder = edited(|tensors, _| {
        let rows = tensors["model.embed_tokens.weight"].clone();
        let mut values: Vec<f32> = rows.flatten_all().unwrap().to_vec1().unwrap();
        values[127 * 64..].fill(f32::NAN);
        let poisoned = Tensor::from_vec(values, rows.shape(), rows.device()).unwrap();
        tensors.insert("model.embed_tokens.weight".into(), poisoned);
    });
    let decoder = load(folder.path(), Storage::None).unwrap();
    let recipe = Finetune { batch: 1, ..recipe() };
    let plain = |ids: Vec<u32>| Example { response: vec![true; ids.len()], ids };
    let mut examples: Vec<Example> = (0..6).map(|i| plain(vec![i, 5, 9, 12])).collect();
    examples.push(plain(vec![3, 127, 4]));
    let rows = Rows::new(&examples, &recipe, 7).unwrap();
    let bad = (0..7).find(|&s| rows.step(&recipe, s, 7)[0][0].ids.contains(&127)).unwrap();
    assert!(bad > 0, "choose a seed where the bad row does not come first");
    let kept = tempfile::tempdir().unwrap();
    let path = kept.path().join("checkpoint.safetensors");
    let checkpoint = Some(Checkpoint::new(&path, "work"));
    for _ in 0..2 {
        let steps = Cell::new(0);
        let result = finetune(&decoder, &rows, &recipe, 7, checkpoint, |l| steps.set(l.step), || false);
        let error = format!("{:#}", result.err().unwrap());
        for says in [
            format!("its state after step {bad} is kept in {}", path.display()),
            format!("the loss is NaN at step {} of 12: lower finetune.learning_rate (now 0.01)", bad + 1),
        ] {
            assert!(error.contains(&says), "{error} should say {says}");
        }
        // The second time it continues from there, and comes to the same end.
        assert_eq!(steps.get(), bad);
    }
}

/// The child of the test below; alone it does nothing.
#[test]
fn full_disk_child() {
    let Ok(path) = std::env::var("EMAUDIT_TEST_FULL_DISK") else { return };
    let decoder = tiny();
    let recipe = Finetune { rank: 16, ..recipe() };
    let rows = Rows::new(&examples(), &recipe, 7).unwrap();
    let mut checkpoint = Checkpoint::new(path.as_ref(), "work");
    checkpoint.every = Duration::ZERO;
    let done = Cell::new(0);
    // Every step tries and fails to keep a checkpoint; training goes on until it is stopped.
    let result =
        finetune(&decoder, &rows, &recipe, 7, Some(checkpoint), |l| done.set(l.step), || done.get() >= 8);
    let error = format!("{:#}", result.err().unwrap());
    assert!(done.get() == 8 && error.contains("the checkpoint could not be kept"), "{error}");
}

/// A limit on file sizes stands for a full disk: writing fails half-way.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_checkpoint() {
    let decoder = tiny();
    let recipe = Finetune { rank: 16, ..recipe() };
    let rows = Rows::new(&examples(), &recipe, 7).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let done = Cell::new(0);
    let checkpoint = Some(Checkpoint::new(&path, "work"));
    finetune(&decoder, &rows, &recipe, 7, checkpoint, |l| done.set(l.step), || done.get() == 5)
        .err()
        .unwrap();
    let old = std::fs::read(&path).unwrap();
    assert!(old.len() > 64 * 1024);
    // dash counts blocks of 512 bytes, bash of 1024: 16 or 32 KiB.
    let child = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 32; exec \"$0\" --exact training::full_disk_child --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .env("EMAUDIT_TEST_FULL_DISK", &path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stderr).into_owned() + &String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("1 passed"), "{said}");
    assert!(said.contains("training goes on, and an older checkpoint stays"), "{said}");
    assert!(std::fs::read(&path).unwrap() == old, "the old checkpoint was touched");
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "a half-written file was left behind");
    // With room again the run ends as if nothing had happened.
    let (resumed, _) = finetune(&decoder, &rows, &recipe, 7, checkpoint, |_| (), || false).unwrap();
    let (whole, _) = train(&decoder, &recipe);
    let ids = &examples()[0].ids;
    let (a, b) = (logits(&decoder, ids, Some(&resumed)), logits(&decoder, ids, Some(&whole)));
    assert_same("logits", &a, &b);
    assert_eq!(a.dim(D::Minus1).unwrap(), 128);
}

/// What can be counted is counted: weights, adapter and moments are what is held, byte for byte.
#[test]
fn the_memory_estimate_is_what_is_held() {
    let decoder = load(&path("tiny"), Storage::Nf4).unwrap();
    let estimate = |recipe: &Finetune| {
        let rows = Rows::new(&examples(), recipe, 7).unwrap();
        Estimate::new(&decoder, &rows, recipe)
    };
    for optimizer in [Optimizer::Adamw, Optimizer::Adamw8bit] {
        let recipe =
            Finetune { rank: 64, optimizer, target_modules: vec![Module::Q, Module::Up], ..recipe() };
        let config = LoraConfig { r: 64, lora_alpha: 10.0, use_rslora: true };
        let modules = &recipe.target_modules;
        let (_, vars) = Adapter::trainable_on(&decoder, &config, modules, 0.0, || 0.5).unwrap();
        let moments = AdamW::new(&vars, optimizer, 0.0).unwrap().state().unwrap();
        let e = estimate(&recipe);
        assert_eq!(e.adapter, vars.iter().map(|v| 4 * v.elem_count()).sum::<usize>());
        let bytes = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        assert_eq!(e.optimizer, moments.values().map(bytes).sum::<usize>());
        assert_eq!(e.weights, decoder.bytes());
    }
    let plain = estimate(&recipe());
    assert!(estimate(&Finetune { gradient_checkpointing: true, ..recipe() }).activations < plain.activations);
    assert!(estimate(&Finetune { batch: 8, ..recipe() }).activations > 3 * plain.activations);
    let best = Finetune { patience: 1, evaluation_share: 0.1, gradient_accumulation: 2, ..recipe() };
    assert_eq!(estimate(&best).adapter, 3 * plain.adapter);
}

/// Families of one shape differ by what only they keep for backward: on the CPU what attention and feed-forward return,
/// where a norm follows. Norms of queries and keys and biased layers leave nothing that is not formed again.
#[test]
fn the_memory_estimate_knows_what_a_family_keeps() {
    let recipe = recipe();
    let rows = Rows::new(&examples(), &recipe, 7).unwrap();
    let activations = |name: &str| {
        let decoder = load(&path(&format!("families/{name}")), Storage::None).unwrap();
        Estimate::new(&decoder, &rows, &recipe).activations
    };
    let mut longest: Vec<&Example> = rows.train.iter().collect();
    longest.sort_by_key(|e| std::cmp::Reverse(e.ids.len()));
    let tokens = recipe.batch * longest[0].ids.len();
    let (hidden, layers) = (32, 3);
    for (name, per_token) in [("qwen3", 0), ("llama3", 0), ("gemma2", 2 * hidden)] {
        let more = 4 * layers * tokens * per_token;
        assert_eq!(activations(name) - activations("mistral"), more, "{name}");
    }
}
