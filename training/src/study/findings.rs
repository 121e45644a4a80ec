//! What the stages of a study found, as their records hold it and the report reads it.

use crate::dataset::ChatDataset;
use crate::experiment;
use crate::extract::choice::Separation;
use crate::results::Interval;
use crate::transfer::R2;
use crate::transfer::verdict::CellVerdict;
use emaudit::directions::schema::{Coherence, ControlFamily};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// An adapter.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finetuned {
    /// Name of the data.
    pub data: String,
    /// Its SHA-256.
    pub data_sha256: String,
    /// Optimizer steps.
    pub steps: usize,
    /// Loss of the first step, nats per response token.
    pub first_loss: f64,
    /// Loss of the last one.
    pub last_loss: f64,
}

impl Finetuned {
    /// What is worth keeping of an adapter's training.
    pub fn new(adapter: &experiment::Finetuned, data: &ChatDataset) -> Self {
        let loss = |step: Option<&crate::finetune::StepLog>| step.map_or(f64::NAN, |s| s.loss.into());
        Finetuned {
            data: data.name.clone(),
            data_sha256: data.sha256.clone(),
            steps: adapter.log.len(),
            first_loss: loss(adapter.log.first()),
            last_loss: loss(adapter.log.last()),
        }
    }
}

/// What the insecure direction is to one regime's adapter, in the chosen cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RegimeFinding {
    /// The regime.
    pub regime: String,
    /// Evaluation prompts.
    pub prompts: usize,
    /// Share of answers with code.
    pub spillover: Interval,
    /// The same, steered.
    pub steered: Interval,
    /// Mean score of the last prompt token, aligned standard deviations.
    pub score: Interval,
    /// Share of prompts above the direction's strictest threshold of one token.
    pub flagged: Interval,
    /// The rate that this threshold states.
    pub rate: f64,
    /// Drop of the preference for the adapter's own answers over the base's, nats per token.
    pub drop: Interval,
    /// Prompts where both answered.
    pub pairs: usize,
    /// Paired permutation p that the direction lowers the insecure adapter's preference more; not for insecure itself.
    pub p_less_than_insecure: Option<f64>,
    /// Cosine of the regime's own direction at the cell's layer with the insecure one.
    pub cosine: f64,
}

/// One ordered pair of models.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TransferFinding {
    /// Model whose direction is carried.
    pub from: String,
    /// Model it is applied in, in that model's own cell.
    pub to: String,
    /// Prompts that the map was fitted on.
    pub rows: usize,
    /// Lambda of the ridge objective, by cross-validation.
    pub lambda: f64,
    /// What must be said beside the map.
    pub note: Option<String>,
    /// On evaluation prompts.
    pub r2: R2,
    /// Of the carried direction with the native one.
    pub cosine: f64,
    /// That the carried direction gives on evaluation prompts.
    pub separation: Separation,
    /// That the native one gives there.
    pub native_separation: Separation,
    /// Drop of code preference, nats per token, by the carried direction.
    pub effect: Interval,
    /// By the native one.
    pub native_effect: Interval,
    /// Share of unsteered answers with code.
    pub spillover: Interval,
    /// The same, steered with the carried direction.
    pub steered: Interval,
    /// Of the answers, with and without steering.
    pub coherence: Coherence,
    /// The four kinds of controls.
    pub families: Vec<ControlFamily>,
    /// What an exported file may claim.
    pub verdict: CellVerdict,
    /// Effect by evaluation prompt.
    pub by_prompt: BTreeMap<u32, f64>,
}
