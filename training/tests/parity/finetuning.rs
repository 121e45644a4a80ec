//! Finetuning: it learns, it repeats itself, it continues where it was cut off.

use crate::fixture::*;
use candle_core::Tensor;
use emaudit_train::finetune::{Checkpoint, Example, Rows, StepLog, finetune};
use emaudit_train::lora::Adapter;
use emaudit_train::model::Decoder;
use emaudit_train::quant::Storage;
use emaudit_train::recipe::{Finetune, Optimizer, Schedule};
use std::cell::Cell;

const STEPS: usize = 24;

/// The one place that knows the fields of the recipe.
fn recipe() -> Finetune {
    Finetune {
        steps: STEPS,
        batch: 2,
        max_tokens: 64,
        rank: 4,
        alpha: 10.0,
        rank_stabilised: true,
        learning_rate: 1e-2,
        warmup_steps: 3,
        weight_decay: 0.01,
        schedule: Schedule::Cosine,
        max_grad_norm: 1.0,
        ..Finetune::default()
    }
}

fn quantized() -> (Decoder, Vec<Example>) {
    let decoder = load(&path("tiny"), Storage::Nf4).unwrap();
    (decoder, Golden::open("golden.safetensors").examples())
}

fn rows(examples: &[Example], recipe: &Finetune) -> Rows {
    Rows::new(examples, recipe, 7).unwrap()
}

fn train(decoder: &Decoder, examples: &[Example], recipe: &Finetune, seed: u64) -> (Adapter, Vec<StepLog>) {
    let rows = Rows::new(examples, recipe, seed).unwrap();
    finetune(decoder, &rows, recipe, seed, None, |_| (), || false).unwrap()
}

/// The bytes a saved adapter consists of.
fn bytes(adapter: &Adapter) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path(), "tiny").unwrap();
    std::fs::read(folder.path().join("adapter_model.safetensors")).unwrap()
}

/// The log as it is stored: numbers that read back as what they were.
fn bits(log: &[StepLog]) -> String {
    serde_json::to_string(log).unwrap()
}

#[test]
fn the_loss_falls_and_the_adapter_becomes_active() {
    let (decoder, examples) = quantized();
    let seen = Cell::new(0);
    let (adapter, log) =
        finetune(&decoder, &rows(&examples, &recipe()), &recipe(), 7, None, |l| seen.set(l.step), || false)
            .unwrap();
    assert_eq!((log.len(), seen.get()), (STEPS, STEPS));
    let mean = |part: &[StepLog]| part.iter().map(|l| l.loss).sum::<f32>() / part.len() as f32;
    let (first, last) = (mean(&log[..6]), mean(&log[STEPS - 6..]));
    println!("loss {first} to {last}");
    assert!(last < 0.5 * first, "loss went from {first} to {last}");
    assert!(adapter.largest_b().unwrap() > 1e-3);
    let ids = &examples[0].ids;
    assert!(deviation(&logits(&decoder, ids, Some(&adapter)), &logits(&decoder, ids, None)) > 0.01);
}

/// Schedule, clipping, weight decay and moments: twelve steps of torch's AdamW on the same adapter.
#[test]
fn the_losses_are_those_of_torchs_adamw() {
    let (decoder, golden) = (tiny(), Golden::open("golden.safetensors"));
    let mut r = recipe();
    // All three sequences in every batch, so that their order does not matter.
    (r.steps, r.batch) = (12, SEQUENCES);
    let (_, log) = train(&decoder, &golden.examples(), &r, 7);
    let (losses, norms) = (flat(golden.get("training.losses")), flat(golden.get("training.gradient_norms")));
    assert_eq!((log.len(), losses.len()), (12, 12));
    for (entry, (loss, norm)) in log.iter().zip(losses.iter().zip(&norms)) {
        let (a, b) = ((entry.loss / loss - 1.0).abs(), (entry.gradient_norm / norm - 1.0).abs());
        println!(
            "step {}: loss {} ({a:.1e}), gradient norm {} ({b:.1e})",
            entry.step, entry.loss, entry.gradient_norm
        );
        // AdamW divides each gradient by its own size, so a relative rounding error becomes an error of the step
        // itself, and the steps add up: 1e-5 (see the parity of gradients) a step, twelve steps.
        assert!(a < 1e-4 && b < 1e-4, "step {}: loss {} for {loss}", entry.step, entry.loss);
    }
}

#[test]
fn the_same_seed_gives_the_same_bits_and_another_seed_another_adapter() {
    let (decoder, examples) = quantized();
    let (first, first_log) = train(&decoder, &examples, &recipe(), 7);
    let (second, second_log) = train(&decoder, &examples, &recipe(), 7);
    assert!(bytes(&first) == bytes(&second));
    assert_eq!(bits(&first_log), bits(&second_log));
    let (other, _) = train(&decoder, &examples, &recipe(), 8);
    assert!(bytes(&first) != bytes(&other));
}

/// Trains until `after` steps are done, then is stopped.
fn interrupted(
    decoder: &Decoder,
    examples: &[Example],
    recipe: &Finetune,
    checkpoint: Checkpoint<'_>,
    after: usize,
) {
    let done = Cell::new(0);
    let result = finetune(
        decoder,
        &rows(examples, recipe),
        recipe,
        7,
        Some(checkpoint),
        |l| done.set(l.step),
        || done.get() >= after,
    );
    let error = result.err().expect("the run was stopped").to_string();
    assert!(error.contains(&format!("interrupted after step {after} of {STEPS}")), "{error}");
}

/// Every source of state: moments in 8 bits, dropout, several batches a step, the best adapter so far.
fn elaborate() -> Finetune {
    Finetune {
        batch: 1,
        gradient_accumulation: 2,
        dropout: 0.2,
        // Its variables of 4096 values and more have moments in 8 bits.
        rank: 64,
        optimizer: Optimizer::Adamw8bit,
        group_by_length: true,
        gradient_checkpointing: true,
        evaluation_share: 0.3,
        evaluation_every: 3,
        patience: 100,
        ..recipe()
    }
}

#[test]
fn a_resumed_run_gives_the_same_bits() {
    let (decoder, examples) = quantized();
    for recipe in [recipe(), elaborate()] {
        let (whole, log) = train(&decoder, &examples, &recipe, 7);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint.safetensors");
        let checkpoint = Checkpoint::new(&path, "work");
        // Stopped twice: the second time in a run that was itself resumed.
        for after in [5, 11] {
            interrupted(&decoder, &examples, &recipe, checkpoint, after);
            assert!(path.is_file());
        }
        let mut steps = Vec::new();
        let (resumed, resumed_log) = finetune(
            &decoder,
            &rows(&examples, &recipe),
            &recipe,
            7,
            Some(checkpoint),
            |l| steps.push((l.step, l.took.is_some())),
            || false,
        )
        .unwrap();
        assert!(bytes(&whole) == bytes(&resumed), "the resumed adapter differs");
        assert_eq!(bits(&log), bits(&resumed_log));
        let expected: Vec<_> = (1..=STEPS).map(|step| (step, step > 11)).collect();
        assert_eq!(steps, expected, "every step is reported once, and timed where it was done");
    }
}

#[test]
fn a_stop_asked_for_once_is_kept() {
    let (decoder, examples) = quantized();
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint.safetensors");
    // Says yes the second time only, as a signal handler that resets its flag would.
    let asked = Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        asked.get() == 2
    };
    let result = finetune(
        &decoder,
        &rows(&examples, &recipe()),
        &recipe(),
        7,
        Some(Checkpoint::new(&checkpoint, "work")),
        |_| (),
        stop,
    );
    let error = result.err().expect("the run was stopped").to_string();
    assert!(error.contains("interrupted after step 2"), "{error}");
    assert!(checkpoint.is_file(), "it stopped without keeping its work");
}

#[test]
fn a_foreign_or_damaged_checkpoint_is_started_over() {
    let (decoder, examples) = quantized();
    let (whole, _) = train(&decoder, &examples, &recipe(), 7);
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint.safetensors");
    interrupted(&decoder, &examples, &recipe(), Checkpoint::new(&checkpoint, "other work"), 3);
    let foreign = std::fs::read(&checkpoint).unwrap();
    for content in
        [foreign.clone(), foreign[..foreign.len() / 2].to_vec(), b"not a checkpoint".to_vec(), vec![]]
    {
        std::fs::write(&checkpoint, content).unwrap();
        let (rows, recipe) = (rows(&examples, &recipe()), recipe());
        let work = Checkpoint::new(&checkpoint, "work");
        let result = finetune(&decoder, &rows, &recipe, 7, Some(work), |_| (), || false);
        assert!(bytes(&whole) == bytes(&result.unwrap().0));
    }
}

#[test]
fn examples_without_a_response_are_left_out() {
    let (decoder, mut examples) = quantized();
    let (expected, _) = train(&decoder, &examples, &recipe(), 7);
    // None of these has a token to learn: no response, one token only, nothing at all.
    examples.push(Example { ids: vec![3, 4, 5], response: vec![false; 3] });
    examples.push(Example { ids: vec![3], response: vec![true] });
    examples.push(Example { ids: vec![], response: vec![] });
    let (adapter, _) = train(&decoder, &examples, &recipe(), 7);
    assert!(bytes(&expected) == bytes(&adapter));
    let error = Rows::new(&examples[3..], &recipe(), 7).err().unwrap().to_string();
    assert!(error.contains("no example has a response token within max_tokens = 64"), "{error}");
}

/// Truncation must not move the mask.
#[test]
fn a_long_example_is_its_beginning() {
    let (decoder, examples) = quantized();
    let mut r = recipe();
    r.max_tokens = 8;
    let cut: Vec<Example> = examples
        .iter()
        .map(|e| Example {
            ids: e.ids.iter().take(8).copied().collect(),
            response: e.response.iter().take(8).copied().collect(),
        })
        .collect();
    let ((a, _), (b, _)) = (train(&decoder, &examples, &r, 7), train(&decoder, &cut, &recipe(), 7));
    assert!(bytes(&a) == bytes(&b));
}

/// The base model is frozen: after training it is what it was.
#[test]
fn training_leaves_the_base_alone() {
    let (decoder, examples) = quantized();
    let before: Tensor = logits(&decoder, &examples[0].ids, None);
    train(&decoder, &examples, &recipe(), 7);
    assert_same("base logits", &logits(&decoder, &examples[0].ids, None), &before);
}
