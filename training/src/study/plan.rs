//! What a study would run, and about what it would take.

use super::graph::{Node, Stage};
use super::measures::Audit;
use super::recipe::StudyRecipe;
use super::record::{Record, Records};
use crate::memory;
use crate::model::Config;
use crate::recipe::Recipe;
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;

/// Tokens of a rendered prompt behind the beginning that all share, about.
const PROMPT_TOKENS: f64 = 32.0;

/// Tokens of a question with its answer; about half of them are the answer.
const ALIGNMENT_TOKENS: f64 = 110.0;

/// Floating-point operations a second of each kind of work where no finished stage tells: two cores with AVX-512, f32.
const DEFAULT_RATE: f64 = 60e9;

/// One line of the plan.
#[derive(Clone, Debug, Serialize)]
pub struct Planned {
    /// The stage.
    #[serde(flatten)]
    pub node: Node,
    /// Finished, with its files.
    pub done: bool,
    /// Taken, where it is done; otherwise an estimate; `None` where the model is not on this machine.
    pub seconds: Option<f64>,
    /// As for the seconds: the largest memory.
    pub memory_bytes: Option<f64>,
}

/// A model's size as its configuration has it.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    linear: f64,
    head: f64,
    hidden: f64,
    layers: f64,
}

impl Size {
    /// Parameters by what they cost.
    pub fn of(config: &Config) -> Size {
        let (hidden, heads) = (config.hidden_size as f64, config.head_dim as f64);
        let (q, kv) = (config.n_heads as f64 * heads, config.n_kv_heads as f64 * heads);
        let block = hidden * (2.0 * q + 2.0 * kv) + 3.0 * hidden * config.intermediate_size as f64;
        let layers = config.n_layers as f64;
        Size { linear: layers * block, head: hidden * config.vocab_size as f64, hidden, layers }
    }

    /// Operations of one token's forward pass without the head.
    fn token(&self) -> f64 {
        2.0 * self.linear
    }
}

/// Every stage with what it took or is estimated to take. `sizes`: one for each model, where it is known.
pub fn plan(
    study: &StudyRecipe,
    nodes: &[Node],
    sizes: &[Option<Size>],
    records: &Records,
) -> Result<Vec<Planned>> {
    let work = |node: &Node| work(study, &node.stage, sizes);
    let mut rates: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let every = records.every();
    for node in nodes {
        let took = every.iter().filter(|r| r.stage == node.name && r.seconds > 1.0);
        let rate = |r: &Record| work(node).map(|w| w.operations / r.seconds);
        rates.entry(node.kind).or_default().extend(took.filter_map(rate));
    }
    let rate = |kind: &str| {
        let mut seen = rates.get(kind).cloned().unwrap_or_default();
        seen.sort_by(f64::total_cmp);
        seen.get(seen.len() / 2).copied().unwrap_or(DEFAULT_RATE)
    };
    let mut planned = Vec::new();
    for node in nodes {
        let record = records.get(node)?;
        let estimate = work(node);
        planned.push(Planned {
            done: record.is_some(),
            seconds: match &record {
                Some(r) => Some(r.seconds),
                None => estimate.map(|w| w.operations / rate(node.kind)),
            },
            memory_bytes: match record.and_then(|r| r.peak_memory_bytes) {
                Some(bytes) => Some(bytes as f64),
                None => estimate.map(|w| w.bytes),
            },
            node: node.clone(),
        });
    }
    Ok(planned)
}

/// Operations and bytes of a stage.
#[derive(Clone, Copy, Debug)]
struct Work {
    operations: f64,
    bytes: f64,
}

/// `None` where the model's size is not known.
fn work(study: &StudyRecipe, stage: &Stage, sizes: &[Option<Size>]) -> Option<Work> {
    let Some((model, seed)) = stage.model(study) else {
        return Some(Work { operations: 0.0, bytes: 0.0 });
    };
    let (size, recipe) = (sizes[model]?, study.models[model].recipe(seed));
    let (e, f) = (&recipe.evaluate, &recipe.finetune);
    // Weights as they are held for speed, decoded to f32 beside half a byte each; the embedding.
    let weights = 4.5 * size.linear + 4.0 * size.head;
    let (prompts, answer) = (e.prompts as f64, e.max_new_tokens as f64);
    let captured = (112.0 + 330.0 + prompts) * PROMPT_TOKENS;
    let sampled = |answers: f64| answers * answer * (size.token() + 2.0 * size.head);
    let regimes = 2.0 + study.models[model].regimes.len() as f64;
    let controls = 4.0 * e.controls as f64;
    let operations = match stage {
        Stage::Sample { .. } => 96.0 * f.max_tokens as f64 * (size.token() + 2.0 * size.head),
        Stage::Finetune { .. } => {
            let tokens = (f.steps * f.batch * f.gradient_accumulation * f.max_tokens) as f64;
            let passes = if f.gradient_checkpointing { 3.0 } else { 2.0 };
            tokens * passes * (size.token() + 2.0 * size.head)
        }
        Stage::Capture { .. } => captured * size.token(),
        Stage::Calibrate { .. } => {
            let horizon = recipe.calibrate.horizons.last().copied().unwrap_or(1) as f64 - 1.0;
            330.0 * horizon * (2.0 * size.token() + 2.0 * size.head)
        }
        Stage::Evaluate { .. } => {
            let arms = 8.0 + 2.0 * e.alphas.len() as f64;
            sampled(arms * (prompts + e.selection_prompts as f64))
                + controls * 2.0 * prompts * 2.0 * size.head
                + 2.0 * e.middle_controls as f64 * 32.0 * (PROMPT_TOKENS + answer) * size.token() / 2.0
        }
        Stage::Content { .. } => regimes * (sampled(2.0 * prompts) + 2.0 * prompts * answer * size.token()),
        Stage::Pack { .. } => 0.0,
        Stage::Alignment { .. } => {
            let a = &study.models[model].measures.alignment;
            let (all, few) = (3.0 * a.pairs as f64, 2.0 * a.steered_pairs as f64);
            let (read, answer) = (ALIGNMENT_TOKENS, ALIGNMENT_TOKENS / 2.0);
            let head = 2.0 * answer * size.head;
            (1.0 + regimes) * all * (read * size.token() + head)
                + 2.0 * a.controls as f64 * few * head
                + a.middle_controls as f64 * few * (read * size.token() / 2.0 + head)
        }
        Stage::Interventions { .. } => {
            let i = &study.models[model].measures.interventions;
            let deep = 7.0 * 2.0 * i.deep_pairs as f64 * (PROMPT_TOKENS + answer) * size.token() / 2.0;
            12.0 * 4.0 * i.controls as f64 * prompts * 2.0 * size.head + (1.0 + i.deep_controls as f64) * deep
        }
        Stage::Estimators { .. } => {
            let m = &study.models[model].measures.estimators;
            let read = |pairs: usize| 2.0 * pairs as f64 * (PROMPT_TOKENS + answer) * size.token() / 2.0;
            let responses = 2.0 * m.response_pairs as f64 * ALIGNMENT_TOKENS * size.token();
            responses
                + m.layers as f64 * 13.0 * read(m.pairs)
                + 3.0 * (1.0 + 2.0 * m.controls as f64) * read(m.report_pairs)
        }
        Stage::Security { .. } => {
            let s = &study.models[model].measures.security;
            5.0 * (s.tasks * s.max_new_tokens) as f64 * (size.token() + 2.0 * size.head)
        }
        Stage::Judge { .. } => {
            let j = &study.models[model].measures.judge;
            4.0 * (j.questions * j.samples * j.max_new_tokens) as f64 * (size.token() + 2.0 * size.head)
        }
        // Adapters were captured; the base in its other storage is read.
        Stage::Audit { .. } => match study.models[model].measures.audit {
            Audit { requantised: true, prompts } => prompts as f64 * PROMPT_TOKENS * size.token(),
            Audit { requantised: false, .. } => 0.0,
        },
        Stage::Transfer { .. } | Stage::Export { .. } => {
            540.0 * 540.0 * (540.0 + size.hidden) * 8.0 + controls * 2.0 * prompts * 2.0 * size.head
        }
        Stage::Report => 0.0,
    };
    let activations = match stage {
        Stage::Finetune { .. } => finetune_bytes(&size, &recipe),
        _ => 64.0 * (PROMPT_TOKENS + answer) * size.hidden * 4.0 * 8.0,
    };
    Some(Work { operations, bytes: weights + activations })
}

/// What a batch keeps for backward, about; finetuning itself says it exactly before it starts.
fn finetune_bytes(size: &Size, recipe: &Recipe) -> f64 {
    let f = &recipe.finetune;
    let tokens = (f.batch * f.max_tokens) as f64;
    let block = if f.gradient_checkpointing { 2.0 } else { 24.0 };
    tokens * (size.layers * size.hidden * block + size.head / size.hidden) * 4.0
}

/// The plan as a table for people.
pub fn table(planned: &[Planned], command: impl Fn(&Planned) -> String) -> String {
    let mut text = format!("{:<44} {:<8} {:>9} {:>9}\n", "stage", "state", "time", "memory");
    for p in planned {
        let state = if p.done { "done" } else { "to do" };
        let time = p.seconds.map_or("unknown".into(), duration);
        let memory = p.memory_bytes.filter(|b| *b > 0.0).map_or("-".into(), |b| memory::size(b as usize));
        text += &format!("{:<44} {state:<8} {time:>9} {memory:>9}\n", p.node.name);
    }
    let left: Vec<&Planned> = planned.iter().filter(|p| !p.done).collect();
    let seconds: f64 = left.iter().filter_map(|p| p.seconds).sum();
    let unknown = left.iter().filter(|p| p.seconds.is_none()).count();
    text += &format!("\n{} of {} stages to do, about {}", left.len(), planned.len(), duration(seconds));
    if unknown > 0 {
        text += &format!(" and {unknown} stages of models that are not on this machine yet");
    }
    if let Some(next) = left.first() {
        text += &format!("\none stage alone: {}", command(next));
    }
    text + "\n"
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
