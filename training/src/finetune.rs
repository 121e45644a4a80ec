//! QLoRA finetuning: frozen (NF4) base, LoRA on the target modules, loss on responses only.
//!
//! The order of examples and every random number are functions of the seed and the step, so a run that
//! was cut off and resumed from its checkpoint gives the same adapter, bit for bit, on the same machine.

mod checkpoint;
mod gradient;
mod metrics;
pub mod optimizer;
mod rows;

pub use crate::model::pass::{PIECE_BYTES, Workbench, head_rows};
pub use checkpoint::Checkpoint;
pub use gradient::{
    Gradients, HEAD_ROWS, checkpointed_gradients, direct_gradients, direct_loss, gradients, response_loss,
};
pub use metrics::Metrics;
pub use rows::{Example, GROUPED_STEPS, RowCounts, Rows};

use crate::lora::{Adapter, LoraConfig};
use crate::model::Decoder;
use crate::recipe::{Compute, Finetune, Schedule};
use crate::{progress, random};
use anyhow::{Context, Result, bail};
use candle_core::{Tensor, Var};
use optimizer::AdamW;
use std::fmt;
use std::time::{Duration, Instant};

/// One step of the log, and one line of `metrics.jsonl`.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct StepLog {
    /// 1-based step.
    pub step: usize,
    /// Mean loss over response tokens, nats.
    pub loss: f32,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Global gradient norm before clipping.
    pub gradient_norm: f32,
    /// Tokens of the step's rows.
    #[serde(default)]
    pub tokens: usize,
    /// Padding computed beside them.
    #[serde(default)]
    pub padding: usize,
    /// Mean loss over the response tokens of the rows held out, after this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation_loss: Option<f32>,
    /// How long the step took, its evaluation left out; absent where the step was done by an earlier process. It
    /// differs from run to run, so it is never stored with the rest.
    #[serde(skip)]
    pub took: Option<Duration>,
}

impl fmt::Display for StepLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "loss {:.3}", self.loss)?;
        if let Some(loss) = self.evaluation_loss {
            write!(f, ", held out {loss:.3}")?;
        }
        match self.took {
            Some(took) => write!(f, ", {:.0} tokens/s", self.tokens as f64 / took.as_secs_f64()),
            None => Ok(()),
        }
    }
}

/// The step whose adapter is kept, where rows are held out and `patience` asks for the best.
pub fn best(log: &[StepLog]) -> Option<&StepLog> {
    let evaluated = log.iter().filter_map(|l| l.evaluation_loss.map(|loss| (loss, l)));
    // The first of equals: a later one has learned nothing more.
    evaluated.reduce(|best, other| if other.0 < best.0 { other } else { best }).map(|(_, l)| l)
}

struct Trainer<'a> {
    decoder: &'a Decoder,
    recipe: &'a Finetune,
    rows: &'a Rows,
    seed: u64,
    adapter: Adapter,
    vars: Vec<Var>,
    optimizer: AdamW,
    /// The variables after the step of the lowest evaluation loss, where `patience` asks for them.
    best: Option<Vec<Tensor>>,
    log: Vec<StepLog>,
    bench: Workbench,
}

/// Trains an adapter on `rows`, and keeps the last one, or with `patience` the one of the lowest evaluation loss.
///
/// `checkpoint` is a file that is written now and then, resumed from when it belongs to the same work, and removed by
/// the caller once the adapter is saved; when one cannot be written, the old one stays and training goes on. `on_step`
/// sees every step, those of the checkpoint first. `stop` is asked between steps. A loss that is no number ends the
/// run with an error, after the state before that step has been kept.
pub fn finetune(
    decoder: &Decoder,
    rows: &Rows,
    recipe: &Finetune,
    seed: u64,
    checkpoint: Option<Checkpoint<'_>>,
    mut on_step: impl FnMut(&StepLog),
    stop: impl Fn() -> bool,
) -> Result<(Adapter, Vec<StepLog>)> {
    let mut trainer = Trainer::new(decoder, rows, recipe, seed)?;
    if let Some(checkpoint) = checkpoint {
        checkpoint.resume(&mut trainer)?;
        trainer.log.iter().for_each(&mut on_step);
    }
    let mut saved = Instant::now();
    while !trainer.finished() {
        if let Err(error) = trainer.step() {
            return Err(trainer.keep_last_good(checkpoint, error));
        }
        let entry = trainer.evaluate()?;
        on_step(&entry);
        let stopped = stop();
        if let Some(checkpoint) = checkpoint
            && (stopped || saved.elapsed() >= checkpoint.every)
        {
            match checkpoint.save(&trainer) {
                Err(error) if !stopped => {
                    progress::note(&format!("{error:#}; training goes on, and an older checkpoint stays"));
                }
                result => result?,
            }
            saved = Instant::now();
        }
        if stopped {
            bail!(
                "interrupted after step {} of {}; run the same command again to continue",
                entry.step,
                recipe.steps
            );
        }
    }
    if let Some(best) = &trainer.best {
        for (var, best) in trainer.vars.iter().zip(best) {
            var.set(best)?;
        }
    }
    Ok((trainer.adapter.detached()?, trainer.log))
}

impl<'a> Trainer<'a> {
    fn new(decoder: &'a Decoder, rows: &'a Rows, recipe: &'a Finetune, seed: u64) -> Result<Self> {
        let config =
            LoraConfig { r: recipe.rank, lora_alpha: recipe.alpha, use_rslora: recipe.rank_stabilised };
        let mut drawn = 0;
        let uniform = || {
            drawn += 1;
            random::uniform(&[seed, 0x10ba, drawn]) as f32
        };
        let (adapter, vars) =
            Adapter::trainable_on(decoder, &config, &recipe.target_modules, recipe.dropout, uniform)?;
        let optimizer = AdamW::new(&vars, recipe.optimizer, recipe.weight_decay)?;
        // A GPU has no use for the CPU's accelerator.
        let compute = if decoder.device.is_cpu() { recipe.compute } else { Compute::F32 };
        let bench = Workbench::new(compute)?;
        Ok(Trainer {
            decoder,
            recipe,
            rows,
            seed,
            adapter,
            vars,
            optimizer,
            best: None,
            log: Vec::new(),
            bench,
        })
    }

    /// All steps are done, or `patience` evaluations in a row brought nothing better.
    fn finished(&self) -> bool {
        let patience = self.recipe.patience;
        let stalled = patience > 0
            && best(&self.log).is_some_and(|best| {
                let later = self.log[best.step..].iter().filter(|l| l.evaluation_loss.is_some());
                later.count() >= patience
            });
        stalled || self.log.len() >= self.recipe.steps
    }

    /// One step of the optimizer over all its micro-batches; on an error the state is that before it.
    fn step(&mut self) -> Result<()> {
        let (begun, step, recipe) = (Instant::now(), self.log.len(), self.recipe);
        let batches = self.rows.step(recipe, step, self.seed);
        let (loss, gradients) = self.gradients(step, &batches)?;
        let norm = gradient::norm(&gradients)?;
        if !norm.is_finite() {
            return Err(not_finite("gradient norm", norm, step + 1, recipe));
        }
        let learning_rate = self.learning_rate(step);
        let clip = (recipe.max_grad_norm / norm.max(f64::MIN_POSITIVE)).min(1.0);
        self.optimizer.step(&self.vars, &gradients, step, learning_rate, clip)?;
        let counts = batches.iter().map(|b| rows::token_counts(b));
        let (tokens, padding) = counts.fold((0, 0), |(t, p), (tokens, padded)| (t + tokens, p + padded));
        self.log.push(StepLog {
            step: step + 1,
            loss,
            learning_rate,
            gradient_norm: norm as f32,
            tokens,
            padding,
            evaluation_loss: None,
            took: Some(begun.elapsed()),
        });
        Ok(())
    }

    /// Adds the evaluation loss to the log's last step, where the recipe asks for it there.
    fn evaluate(&mut self) -> Result<StepLog> {
        let entry = self.log.last().context("no step to evaluate")?;
        let step = entry.step;
        let due = step.is_multiple_of(self.recipe.evaluation_every.max(1)) || step == self.recipe.steps;
        if self.rows.held_out.is_empty() || !due {
            return Ok(*entry);
        }
        let loss = self.evaluation_loss()?;
        if !loss.is_finite() {
            return Err(not_finite("evaluation loss", loss, step, self.recipe));
        }
        let entry = &mut self.log[step - 1];
        entry.evaluation_loss = Some(loss as f32);
        let entry = *entry;
        if self.recipe.patience > 0 && best(&self.log).is_some_and(|best| best.step == step) {
            self.best = Some(self.vars.iter().map(|v| v.as_tensor().copy()).collect::<Result<_, _>>()?);
        }
        Ok(entry)
    }

    /// Mean loss over all response tokens of the micro-batches together, and its gradient.
    fn gradients(&self, step: usize, batches: &[Vec<&Example>]) -> Result<(f32, Gradients)> {
        let targets = |batch: &[&Example]| batch.iter().map(|e| e.targets()).sum::<usize>() as f64;
        let total: f64 = batches.iter().map(|b| targets(b)).sum();
        let (mut loss, mut sum) = (0f64, vec![None; self.vars.len()]);
        for (i, batch) in batches.iter().enumerate() {
            let share = targets(batch) / total;
            let dropped;
            let adapter = match self.recipe.dropout > 0.0 {
                true => {
                    dropped = self.adapter.with_dropout(&[self.seed, 0xd409, step as u64, i as u64]);
                    &dropped
                }
                false => &self.adapter,
            };
            let (decoder, vars, checkpointing) =
                (self.decoder, &self.vars, self.recipe.gradient_checkpointing);
            let (value, gradients) = match (decoder.device.is_cpu(), checkpointing) {
                (true, _) => {
                    direct_gradients(&self.bench, decoder, adapter, vars, batch, share, checkpointing)?
                }
                (false, true) => checkpointed_gradients(decoder, adapter, vars, batch, share)?,
                (false, false) => gradient::gradients(decoder, adapter, vars, batch, share)?,
            };
            if !value.is_finite() {
                return Err(not_finite("loss", f64::from(value), step + 1, self.recipe));
            }
            loss += share * f64::from(value);
            gradient::add(&mut sum, gradients)?;
        }
        Ok((loss as f32, sum))
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

    /// Mean loss over the response tokens of the rows held out, without dropout.
    fn evaluation_loss(&self) -> Result<f64> {
        let mut rows: Vec<&Example> = self.rows.held_out.iter().collect();
        rows.sort_by_key(|e| e.ids.len());
        let adapter = self.adapter.untracked();
        let (mut sum, mut total) = (0f64, 0usize);
        for batch in rows.chunks(self.recipe.batch) {
            let targets = batch.iter().map(|e| e.targets()).sum::<usize>();
            let loss = match self.decoder.device.is_cpu() {
                true => direct_loss(&self.bench, self.decoder, Some(&adapter), batch)?,
                false => f64::from(response_loss(self.decoder, Some(&adapter), batch)?.to_scalar::<f32>()?),
            };
            sum += loss * targets as f64;
            total += targets;
        }
        Ok(sum / total as f64)
    }

    /// Keeps the state before a step that failed, and says so in the error.
    fn keep_last_good(&self, checkpoint: Option<Checkpoint<'_>>, error: anyhow::Error) -> anyhow::Error {
        match checkpoint.map(|c| (c.save(self), c.path)) {
            Some((Ok(()), path)) if !self.log.is_empty() => error.context(format!(
                "training stopped; its state after step {} is kept in {}",
                self.log.len(),
                path.display()
            )),
            Some((Err(unsaved), _)) => error.context(format!("training stopped, and {unsaved:#}")),
            _ => error,
        }
    }
}

fn not_finite(what: &str, value: f64, step: usize, recipe: &Finetune) -> anyhow::Error {
    anyhow::anyhow!(
        "the {what} is {value} at step {step} of {}: lower finetune.learning_rate (now {}), warm up for longer \
         (warmup_steps is {}) or clip harder (max_grad_norm is {})",
        recipe.steps,
        recipe.learning_rate,
        recipe.warmup_steps,
        recipe.max_grad_norm
    )
}
