//! What the stages of a study found, as their records hold it and the report reads it.

use crate::dataset::ChatDataset;
use crate::experiment;
use crate::results::Interval;
use serde::{Deserialize, Serialize};

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
        let loss = |step: Option<&crate::finetune::StepLog>| step.map_or(f64::NAN, |s| s.loss);
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
