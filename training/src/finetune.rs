//! QLoRA finetuning: frozen (NF4) base, LoRA on all linear layers, loss on responses only.
//!
//! The order of examples and every random number are functions of the seed and the step, so a run that
//! was cut off and resumed from its checkpoint gives the same adapter, bit for bit, on the same machine.

use crate::lora::{Adapter, LoraConfig};
use crate::model::{Batch, Decoder, no_edit, ops};
use crate::recipe::{Finetune, Schedule};
use crate::{random, store};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// A rendered conversation and which of its tokens the loss is taken on.
#[derive(Clone, Debug)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// True on response tokens.
    pub response: Vec<bool>,
}

/// One step of the log.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct StepLog {
    /// 1-based step.
    pub step: usize,
    /// Mean loss over response tokens, nats.
    pub loss: f32,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Global gradient norm before clipping.
    pub gradient_norm: f32,
}

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;
const CHECKPOINT_EVERY: Duration = Duration::from_secs(20);

struct Trainer<'a> {
    decoder: &'a Decoder,
    recipe: &'a Finetune,
    adapter: Adapter,
    vars: Vec<Var>,
    /// First and second moments of AdamW, in the order of `vars`.
    moments: Vec<(Tensor, Tensor)>,
    log: Vec<StepLog>,
}

/// Trains an adapter. `checkpoint` is a file that is written now and then, resumed from when it belongs to
/// the same `key`, and removed by the caller once the adapter is saved. `stop` is asked between steps.
pub fn finetune(
    decoder: &Decoder,
    examples: &[Example],
    recipe: &Finetune,
    seed: u64,
    checkpoint: Option<(&Path, &str)>,
    mut on_step: impl FnMut(&StepLog),
    stop: impl Fn() -> bool,
) -> Result<(Adapter, Vec<StepLog>)> {
    let examples = truncate(examples, recipe.max_tokens)?;
    let mut trainer = Trainer::new(decoder, recipe, seed)?;
    if let Some((path, key)) = checkpoint {
        trainer.resume(path, key)?;
        trainer.log.iter().for_each(&mut on_step);
    }
    let mut saved = Instant::now();
    while trainer.log.len() < recipe.steps {
        let step = trainer.log.len();
        let batch = pick(&examples, recipe.batch, step, seed);
        let entry = trainer.step(step, &batch)?;
        on_step(&entry);
        trainer.log.push(entry);
        let stopped = stop();
        if let Some((path, key)) = checkpoint
            && (stopped || saved.elapsed() > CHECKPOINT_EVERY)
        {
            trainer.save(path, key)?;
            saved = Instant::now();
        }
        if stopped {
            bail!(
                "interrupted after step {} of {}; run the same command again to continue",
                step + 1,
                recipe.steps
            );
        }
    }
    Ok((trainer.adapter.detached()?, trainer.log))
}

fn truncate(examples: &[Example], max_tokens: usize) -> Result<Vec<Example>> {
    let cut = |e: &Example| {
        let n = e.ids.len().min(max_tokens);
        Example { ids: e.ids[..n].to_vec(), response: e.response[..n].to_vec() }
    };
    let kept: Vec<Example> =
        examples.iter().map(cut).filter(|e| e.response.iter().skip(1).any(|&r| r)).collect();
    if kept.is_empty() {
        bail!(
            "no example has a response token within max_tokens = {max_tokens}; raise it or shorten the prompts"
        );
    }
    Ok(kept)
}

/// The examples of one step: each epoch is its own permutation.
fn pick(examples: &[Example], batch: usize, step: usize, seed: u64) -> Vec<&Example> {
    let at = |i: usize| {
        let order = random::permutation(examples.len(), &[seed, 0xe90c, (i / examples.len()) as u64]);
        &examples[order[i % examples.len()]]
    };
    (step * batch..(step + 1) * batch).map(at).collect()
}

impl<'a> Trainer<'a> {
    fn new(decoder: &'a Decoder, recipe: &'a Finetune, seed: u64) -> Result<Self> {
        let config =
            LoraConfig { r: recipe.rank, lora_alpha: recipe.alpha, use_rslora: recipe.rank_stabilised };
        let mut drawn = 0;
        let uniform = || {
            drawn += 1;
            random::uniform(&[seed, 0x10ba, drawn]) as f32
        };
        let (adapter, vars) = Adapter::trainable(decoder, &config, uniform)?;
        let zeros = |v: &Var| Ok((v.zeros_like()?, v.zeros_like()?));
        let moments = vars.iter().map(zeros).collect::<Result<_>>()?;
        Ok(Trainer { decoder, recipe, adapter, vars, moments, log: Vec::new() })
    }

    fn step(&mut self, step: usize, batch: &[&Example]) -> Result<StepLog> {
        let loss = response_loss(self.decoder, Some(&self.adapter), batch)?;
        let value = loss.to_scalar::<f32>()?;
        if !value.is_finite() {
            bail!("the loss is {value} at step {}; lower the learning rate", step + 1);
        }
        let gradients = loss.backward()?;
        let norm = gradient_norm(&self.vars, &gradients)?;
        if !norm.is_finite() {
            bail!("the gradient norm is {norm} at step {}; lower the learning rate", step + 1);
        }
        let learning_rate = self.learning_rate(step);
        let clip = (self.recipe.max_grad_norm / norm.max(f64::MIN_POSITIVE)).min(1.0);
        self.adamw(step, learning_rate, clip, &gradients)?;
        Ok(StepLog { step: step + 1, loss: value, learning_rate, gradient_norm: norm as f32 })
    }

    /// Linear warm-up, then the schedule down to zero after the last step.
    fn learning_rate(&self, step: usize) -> f64 {
        let (r, done) = (self.recipe, step as f64);
        let warmup = r.warmup_steps as f64;
        if done < warmup {
            return r.learning_rate * (done + 1.0) / warmup;
        }
        let progress = (done - warmup) / (r.steps as f64 - warmup).max(1.0);
        r.learning_rate
            * match r.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => 1.0 - progress,
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            }
    }

    /// AdamW (Loshchilov & Hutter 2019): decoupled weight decay, bias-corrected moments.
    fn adamw(&mut self, step: usize, rate: f64, clip: f64, gradients: &GradStore) -> Result<()> {
        let t = step as i32 + 1;
        let (fix1, fix2) = (1.0 - BETA1.powi(t), 1.0 - BETA2.powi(t));
        for (var, (m, v)) in self.vars.iter().zip(&mut self.moments) {
            let Some(g) = gradients.get(var) else { continue };
            let g = (g * clip)?;
            *m = ((&*m * BETA1)? + (&g * (1.0 - BETA1))?)?;
            *v = ((&*v * BETA2)? + (g.sqr()? * (1.0 - BETA2))?)?;
            let update = ((&*m / fix1)? / ((&*v / fix2)?.sqrt()? + EPSILON)?)?;
            let decayed = (var.as_tensor().detach() * (1.0 - rate * self.recipe.weight_decay))?;
            var.set(&(decayed - (update * rate)?)?)?;
        }
        Ok(())
    }

    fn save(&self, path: &Path, key: &str) -> Result<()> {
        let mut tensors = std::collections::BTreeMap::new();
        for (i, (var, (m, v))) in self.vars.iter().zip(&self.moments).enumerate() {
            for (name, t) in [("var", var.as_tensor()), ("m", m), ("v", v)] {
                tensors.insert(format!("{name}.{i}"), t.detach().to_device(&Device::Cpu)?);
            }
        }
        let log = serde_json::to_string(&self.log)?;
        let metadata = HashMap::from([("key".to_owned(), key.to_owned()), ("log".to_owned(), log)]);
        let bytes = safetensors::serialize(tensors.iter().map(|(k, v)| (k.as_str(), v)), Some(metadata))?;
        store::write_file(path, &bytes).context("the checkpoint could not be kept")
    }

    /// Continues from `path` when it is a checkpoint of the same work; anything else is started over.
    fn resume(&mut self, path: &Path, key: &str) -> Result<()> {
        let Ok(bytes) = std::fs::read(path) else { return Ok(()) };
        let Ok((_, header)) = safetensors::SafeTensors::read_metadata(&bytes) else { return Ok(()) };
        let Some(metadata) = header.metadata().as_ref().filter(|m| m.get("key").is_some_and(|k| k == key))
        else {
            return Ok(());
        };
        let log: Vec<StepLog> = serde_json::from_str(metadata.get("log").context("checkpoint without log")?)?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &self.decoder.device)?;
        let get = |name: String| tensors.get(&name).with_context(|| format!("the checkpoint lacks `{name}`"));
        for (i, (var, moments)) in self.vars.iter().zip(&mut self.moments).enumerate() {
            var.set(get(format!("var.{i}"))?)?;
            *moments = (get(format!("m.{i}"))?.clone(), get(format!("v.{i}"))?.clone());
        }
        self.log = log;
        Ok(())
    }
}

/// Mean cross-entropy (nats) over the response tokens of a batch.
pub fn response_loss(decoder: &Decoder, adapter: Option<&Adapter>, batch: &[&Example]) -> Result<Tensor> {
    let ids: Vec<&[u32]> = batch.iter().map(|e| e.ids.as_slice()).collect();
    let padded = Batch::new(&ids, &decoder.device)?;
    let tokens = padded.ids.dim(1)?;
    let (mut rows, mut targets) = (Vec::new(), Vec::new());
    for (b, example) in batch.iter().enumerate() {
        for t in 1..example.ids.len() {
            if example.response[t] {
                rows.push((b * tokens + padded.left_pad[b] + t - 1) as u32);
                targets.push(example.ids[t]);
            }
        }
    }
    let hidden = decoder.forward(&padded, adapter, None, &mut no_edit)?;
    let hidden = hidden.reshape((batch.len() * tokens, decoder.config.hidden_size))?;
    let hidden = hidden.index_select(&Tensor::new(rows, &decoder.device)?, 0)?;
    Ok(ops::cross_entropy(&decoder.logits(&hidden)?, &targets)?)
}

fn gradient_norm(vars: &[Var], gradients: &GradStore) -> Result<f64> {
    let mut sum = 0f64;
    for g in vars.iter().filter_map(|v| gradients.get(v)) {
        sum += g.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    }
    Ok(sum.sqrt())
}
