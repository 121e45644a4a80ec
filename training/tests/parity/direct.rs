//! Forward and backward without a graph, in f32 and in bf16, against PEFT's numbers and against candle's gradients.

use crate::families::{adapter, each};
use crate::fixture::*;
use crate::skipped::{missing, skipped};
use candle_core::{Tensor, Var};
use emaudit_train::accelerator::Accelerator;
use emaudit_train::finetune::{
    Example, Gradients, Rows, Workbench, direct_gradients, direct_loss, finetune, gradients, response_loss,
};
use emaudit_train::lora::{Adapter, LoraConfig};
use emaudit_train::model::{Config, Decoder, Module};
use emaudit_train::quant::Storage;
use emaudit_train::random;
use emaudit_train::recipe::{Compute, Finetune};
use std::ffi::OsStr;

fn in_f32() -> Workbench {
    Workbench::new(Compute::F32).unwrap()
}

/// `None`, said and counted, where there is no oneDNN (which could be installed) or the processor has no bf16.
fn in_bf16(test: &str) -> Option<Workbench> {
    let error = match Workbench::new(Compute::Bf16) {
        Ok(bench) => return Some(bench),
        Err(error) => format!("{error:#}"),
    };
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512bf16") {
        missing(test, &error);
        return None;
    }
    skipped(test, &error);
    None
}

fn all(gradients: Gradients) -> Vec<Tensor> {
    gradients.into_iter().map(|g| g.expect("every variable has a gradient")).collect()
}

fn largest_deviation(ours: &[Tensor], expected: &[Tensor]) -> f32 {
    assert_eq!(ours.len(), expected.len());
    ours.iter().zip(expected).fold(0f32, |m, (a, b)| m.max(deviation(a, b)))
}

/// What two orders of the same f32 sums may differ by in a gradient, as in `loss_and_gradients_are_those_of_peft`.
fn gradient_tolerance(c: &Config, examples: &[Example]) -> f32 {
    let longest = examples.iter().map(|e| e.ids.len()).max().unwrap();
    let tokens: usize = examples.iter().map(|e| e.ids.len()).sum();
    tolerance(3 * (roundings(c, longest, c.n_layers) + 2 * c.hidden_size + c.vocab_size) + tokens)
}

/// What rounding factors to bf16 may move a loss or a gradient by, relative to the largest: 6 sqrt(n) u as in
/// [`tolerance`], but u = 2^-9, and only one side rounds.
///
/// A sum of products whose factors are each rounded is off by about as much as one of them, so a product counts two
/// roundings, with its adapter's two six. On the longest way through a block lie four such layers and three values that
/// are kept in bf16; backward goes the same way, and reads what forward computed: three ways in all. The head adds one
/// product to each.
fn bf16_tolerance(c: &Config) -> f32 {
    let n = 3 * (c.n_layers * (4 * 6 + 3) + 2);
    6.0 * (n as f32).sqrt() * 2f32.powi(-9)
}

/// An adapter that does something, with dropout.
fn dropping(decoder: &Decoder, dropout: f64) -> (Adapter, Vec<Var>) {
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
    (adapter.with_dropout(&[1, 2]), vars)
}

#[test]
fn every_familys_loss_and_gradients_are_those_of_peft_and_of_candle() {
    each(&candle_core::Device::Cpu, |name, decoder, golden| {
        let (c, bench, examples) = (&decoder.config, in_f32(), golden.examples());
        let batch: Vec<&Example> = examples.iter().collect();
        let (adapter, named) = adapter(&decoder);
        let vars: Vec<Var> = named.iter().map(|(_, var)| var.clone()).collect();
        let (loss, own) = direct_gradients(&bench, &decoder, &adapter, &vars, &batch, 1.0, false).unwrap();
        let (expected, candle) = gradients(&decoder, &adapter, &vars, &batch, 1.0).unwrap();
        let allowed = gradient_tolerance(c, &examples);
        assert!((loss - expected).abs() <= allowed * expected, "{name}: loss {loss}, candle has {expected}");
        let (own, candle) = (all(own), all(candle));
        let peft: Vec<Tensor> =
            named.iter().map(|(parameter, _)| golden.get(&format!("gradient.{parameter}")).clone()).collect();
        let found = [largest_deviation(&own, &candle), largest_deviation(&own, &peft)];
        println!("{name}: {found:?} of {allowed:e}");
        assert!(found.iter().all(|f| *f <= allowed), "{name}: {found:?} of {allowed:e}");

        // On the same buffers again, and with the blocks run again: the same bits.
        for checkpointing in [false, true] {
            let (again, other) =
                direct_gradients(&bench, &decoder, &adapter, &vars, &batch, 1.0, checkpointing).unwrap();
            assert_eq!(loss.to_bits(), again.to_bits(), "{name}");
            all(other).iter().zip(&own).for_each(|(a, b)| assert_same(name, a, b));
        }
        let alone = direct_loss(&bench, &decoder, Some(&adapter), &batch).unwrap();
        assert_eq!(loss.to_bits(), (alone as f32).to_bits(), "{name}");
    });
}

/// NF4, dropout, a share of the loss, batches of other sizes on the same buffers, more targets than the head takes at
/// once.
#[test]
fn what_recipes_ask_for_changes_nothing() {
    let long: Vec<Example> = (0..5)
        .map(|i| Example { ids: (0..60).map(|t| (t * 7 + i) % 128).collect(), response: vec![true; 60] })
        .collect();
    for storage in [Storage::None, Storage::Nf4] {
        let (decoder, bench) = (load(&path("tiny"), storage).unwrap(), in_f32());
        for examples in [Golden::open("golden.safetensors").examples(), long.clone()] {
            let batch: Vec<&Example> = examples.iter().collect();
            for (dropout, share) in [(0.0, 1.0), (0.3, 0.4)] {
                let (adapter, vars) = dropping(&decoder, dropout);
                let allowed = gradient_tolerance(&decoder.config, &examples);
                let (expected, candle) = gradients(&decoder, &adapter, &vars, &batch, share).unwrap();
                let (loss, own) =
                    direct_gradients(&bench, &decoder, &adapter, &vars, &batch, share, true).unwrap();
                assert!((loss - expected).abs() <= allowed * expected, "{loss}, candle has {expected}");
                let found = largest_deviation(&all(own), &all(candle));
                println!(
                    "{storage:?}, {} tokens, dropout {dropout}: {found:e} of {allowed:e}",
                    batch[0].ids.len()
                );
                assert!(found <= allowed, "{found:e} of {allowed:e}");
            }
        }
    }
}

#[test]
fn bf16_is_f32_within_its_rounding_for_every_family() {
    let Some(bench) = in_bf16("bf16 gradients of every family") else { return };
    each(&candle_core::Device::Cpu, |name, decoder, golden| {
        for storage in [Storage::None, Storage::Nf4] {
            let decoder = match storage {
                Storage::None => &decoder,
                Storage::Nf4 => &load(&path(&format!("families/{name}")), storage).unwrap(),
            };
            let examples = golden.examples();
            let batch: Vec<&Example> = examples.iter().collect();
            let (adapter, vars) = adapter(decoder);
            let vars: Vec<Var> = vars.into_iter().map(|(_, var)| var).collect();
            let of = |bench: &Workbench, checkpointing| {
                let (loss, g) =
                    direct_gradients(bench, decoder, &adapter, &vars, &batch, 1.0, checkpointing).unwrap();
                (loss, all(g))
            };
            let ((loss, own), (expected, full)) = (of(&bench, false), of(&in_f32(), false));
            let allowed = bf16_tolerance(&decoder.config);
            let found = largest_deviation(&own, &full);
            println!("{name}, {storage:?}: loss {loss} for {expected}, gradients {found:e} of {allowed:e}");
            assert!((loss - expected).abs() <= allowed * expected, "{name}: loss {loss} for {expected}");
            assert!(found <= allowed, "{name}: {found:e} of {allowed:e}");
            // Closer than bf16 can be would mean that nothing was computed in it.
            assert!(found > 2f32.powi(-12), "{name}: {found:e} is not bf16");
            let (again, other) = of(&bench, true);
            assert_eq!(loss.to_bits(), again.to_bits(), "{name}");
            other.iter().zip(&own).for_each(|(a, b)| assert_same(name, a, b));
        }
    });
}

/// Forward alone is less than what [`bf16_tolerance`] counts.
#[test]
fn logits_in_bf16_follow_those_in_f32() {
    let Some(_) = in_bf16("logits of every family in bf16") else { return };
    each(&candle_core::Device::Cpu, |name, _, golden| {
        for storage in [Storage::None, Storage::Nf4] {
            let decoder = load(&path(&format!("families/{name}")), storage).unwrap();
            let (adapter, _) = adapter(&decoder);
            let ids = &golden.examples()[0].ids;
            for few in [2, ids.len()] {
                let [plain, adapted] = [None, Some(&adapter)].map(|a| logits(&decoder, &ids[..few], a));
                let rounded = load(&path(&format!("families/{name}")), storage).unwrap();
                rounded.multiply_in_bf16().unwrap();
                for (adapter, expected) in [(None, plain), (Some(&adapter), adapted)] {
                    let found = deviation(&logits(&rounded, &ids[..few], adapter), &expected);
                    let allowed = bf16_tolerance(&decoder.config);
                    println!("{name}, {storage:?}, {few} tokens: {found:e} of {allowed:e}");
                    assert!(found <= allowed, "{name}: {found:e} of {allowed:e}");
                    assert!(found > 2f32.powi(-12), "{name}: {found:e} is not bf16");
                }
            }
        }
    });
}

#[test]
fn losses_in_bf16_follow_those_in_f32() {
    let Some(_) = in_bf16("a run in bf16") else { return };
    let decoder = load(&path("tiny"), Storage::Nf4).unwrap();
    let recipe = |compute| Finetune {
        steps: 8,
        batch: 2,
        max_tokens: 64,
        rank: 4,
        alpha: 10.0,
        learning_rate: 1e-2,
        warmup_steps: 3,
        compute,
        ..Finetune::default()
    };
    let run = |compute| {
        let (recipe, examples) = (recipe(compute), Golden::open("golden.safetensors").examples());
        let rows = Rows::new(&examples, &recipe, 7).unwrap();
        let (_, log) = finetune(&decoder, &rows, &recipe, 7, None, |_| (), || false).unwrap();
        log.iter().map(|l| l.loss).collect::<Vec<f32>>()
    };
    let (full, short) = (run(Compute::F32), run(Compute::Bf16));
    assert_eq!(short, run(Compute::Bf16), "one seed, two runs");
    let allowed = bf16_tolerance(&decoder.config);
    for (a, b) in short.iter().zip(&full) {
        println!("{a} for {b}");
        assert!((a - b).abs() <= allowed * b, "loss {a} in bf16, {b} in f32");
    }
    assert!(full[7] < full[0] && short != full);
}

#[test]
fn what_is_not_onednn_is_refused() {
    let refused = |file: &str| format!("{:#}", Accelerator::open(Some(OsStr::new(file))).unwrap_err());
    let missing = refused("nowhere/libdnnl.so");
    assert!(missing.contains("cannot load oneDNN from nowhere/libdnnl.so"), "{missing}");
    // The C library is loaded already, wherever it lies.
    #[cfg(target_os = "linux")]
    {
        let other = refused("libc.so.6");
        assert!(other.contains("is not oneDNN"), "{other}");
    }
}

#[test]
fn a_loss_without_an_adapter_is_that_of_the_base() {
    let (decoder, examples) = (tiny(), Golden::open("golden.safetensors").examples());
    let batch: Vec<&Example> = examples.iter().collect();
    let own = direct_loss(&in_f32(), &decoder, None, &batch).unwrap();
    let expected = f64::from(response_loss(&decoder, None, &batch).unwrap().to_scalar::<f32>().unwrap());
    assert!((own / expected - 1.0).abs() < f64::from(gradient_tolerance(&decoder.config, &examples)));
}
