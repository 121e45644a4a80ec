//! What the stages of a study found, as their records hold it and the report reads it.

use crate::dataset::ChatDataset;
use crate::experiment;
use crate::extract::choice::{Candidate, Separation};
use crate::extract::estimators::Fit;
use crate::results::Interval;
use crate::security::Security;
use crate::statistics::Power;
use crate::transfer::R2;
use crate::transfer::verdict::CellVerdict;
use emaudit::directions::schema::{Cell, Coherence, ControlFamily, Positions, Specificity};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

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

/// How much likelier one model and seed finds misaligned answers than aligned ones.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AlignmentFinding {
    /// Name of the pairs.
    pub data: String,
    /// Their SHA-256.
    pub data_sha256: String,
    /// Pairs compared.
    pub pairs: usize,
    /// Questions they answer: the sampling unit of every interval and test.
    pub questions: usize,
    /// Base, insecure, secure, then the other regimes.
    pub states: Vec<AlignmentState>,
    /// The insecure adapter, steered at every position.
    pub steered: Vec<AlignmentSteering>,
}

/// One state of the model. Contrasts: nats per token, misaligned minus aligned, higher for the worse.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AlignmentState {
    /// `base` or a regime.
    pub state: String,
    /// Mean over questions.
    pub contrast: Interval,
    /// Contrast minus the base's.
    pub shift: Interval,
    /// The same of the harmless answer that is beside the point: what more room for unlikely text explains.
    pub control_shift: Interval,
    /// One-sided paired permutation p that the shift is above zero; of adapters.
    pub p_shift: Option<f64>,
    /// The same, that it exceeds `control_shift`.
    pub p_beyond_control: Option<f64>,
    /// Shift minus the secure adapter's; of the other adapters.
    pub beyond_secure: Option<Interval>,
    /// One-sided p that this is above zero.
    pub p_beyond_secure: Option<f64>,
    /// The smallest shift that so many questions show; `None` where all shifts are alike.
    pub power: Option<Power>,
}

/// The insecure adapter with the direction subtracted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AlignmentSteering {
    /// Where and how strongly.
    pub cell: Cell,
    /// Questions.
    pub questions: usize,
    /// Contrast without steering.
    pub before: Interval,
    /// Drop of the contrast, nats per token: above zero is for the better.
    pub effect: Interval,
    /// One-sided paired permutation p that the drop is above zero.
    pub p_effect: f64,
    /// The smallest drop that so many questions show.
    pub power: Option<Power>,
    /// Controls of the same size.
    pub families: Vec<ControlFamily>,
}

/// One direction file against models that never made it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AuditFinding {
    /// SHA-256 of the file.
    pub directions_sha256: String,
    /// Layer that was read.
    pub layer: u32,
    /// Prompts that every suspect was asked.
    pub prompts: usize,
    /// The base, adapters by seed, the base in another storage.
    pub suspects: Vec<Suspect>,
}

/// One audited model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Suspect {
    /// `base` or a regime.
    pub state: String,
    /// Storage of the weights under it.
    pub storage: String,
    /// Seed of an adapter.
    pub seed: Option<u64>,
    /// What of the file it took part in (`extraction`, `evaluation`): such a one counts in no table.
    pub used: Option<String>,
    /// `clean`, `flagged`, `stale` or `invalid`.
    pub verdict: String,
    /// Why.
    pub reason: String,
    /// Sequences judged.
    pub judged: u64,
    /// Those above the threshold.
    pub flagged: u64,
    /// Their share with its exact interval.
    pub share: Interval,
    /// The rate that the threshold states.
    pub rate: f64,
    /// Exact chance of as many at that rate's upper bound.
    pub p_value: f64,
    /// Mean move from the base along the direction, activation units; `None` for the base itself.
    pub shift: Option<f64>,
    /// Largest rank p of that move among the file's control families.
    pub largest_rank_p: Option<f64>,
}

/// Ways to act on a direction, teacher-forced.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InterventionFinding {
    /// Prompts with a code answer of the insecure adapter and a prose answer of the base.
    pub pairs: usize,
    /// The final layer.
    pub layer: u32,
    /// Edits there.
    pub final_layer: Vec<Intervened>,
    /// Edits of earlier blocks, of one and of several; on fewer prompts.
    pub deep: Vec<Intervened>,
}

/// One way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Intervened {
    /// What is done.
    pub name: String,
    /// Token positions edited.
    pub positions: Positions,
    /// Mean |dh| / |h| at the last prompt token; only of edits at the final layer.
    pub dose: Option<f64>,
    /// Drop of code preference, nats per token.
    pub effect: Interval,
    /// One-sided paired permutation p that the drop is above zero.
    pub p_effect: f64,
    /// What the edit does to the likelihood of the base's prose answers, nats per token: below zero it does harm.
    pub prose: f64,
    /// Prompts.
    pub pairs: usize,
    /// Controls that move every row as far as the edit would.
    pub families: Vec<ControlFamily>,
}

/// Directions of other estimators and contrasts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EstimatorFinding {
    /// How the choice was made, in words.
    pub rule: String,
    /// Strength that all candidates share, at the last prompt token.
    pub alpha: f64,
    /// Calibration prompts that effects were measured on.
    pub selection_pairs: usize,
    /// Index of the winner.
    pub chosen: usize,
    /// Everything tried, measured on calibration prompts.
    pub candidates: Vec<Estimated>,
    /// The winner and mean differences beside it, on evaluation prompts.
    pub reported: Vec<Reported>,
    /// Every layer: what its largest dimensions hold.
    pub norms: Vec<Norms>,
}

/// One layer, contrast and estimator.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Estimated {
    /// What was measured on calibration prompts.
    #[serde(flatten)]
    pub candidate: Candidate,
    /// Norm of the direction.
    pub norm: f64,
    /// Cosine with the direction that the study evaluates at this layer.
    pub cosine: f64,
    /// What subtracting it does to the likelihood of the base's prose answers, nats per token.
    pub prose: f64,
    /// What the estimator found besides.
    pub fit: Fit,
    /// The direction; in memory alone.
    #[serde(skip)]
    pub direction: Vec<f32>,
}

/// A candidate on evaluation prompts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reported {
    /// Which candidate.
    pub index: usize,
    /// Drop of code preference, nats per token.
    pub effect: Interval,
    /// One-sided paired permutation p that it is above zero.
    pub p_effect: f64,
    /// Prompts.
    pub pairs: usize,
    /// Insecure rows against the base's.
    pub separation: Separation,
    /// Insecure rows against the secure adapter's.
    pub from_secure: Separation,
    /// Controls of the same size.
    pub families: Vec<ControlFamily>,
}

/// What the largest dimensions of a layer hold, and what leaving them out does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Norms {
    /// 0-based block.
    pub layer: u32,
    /// Share of the mean squared norm of aligned rows in the largest dimension.
    pub largest: f64,
    /// In the five largest.
    pub five_largest: f64,
    /// Dimensions left out by the masked estimator.
    pub masked: usize,
    /// Their share of the mean squared norm of all rows.
    pub row_share: f64,
    /// Their share of the squared norm of the mean difference.
    pub direction_share: f64,
    /// Cosine of the masked with the plain mean difference.
    pub cosine: f64,
    /// Of the plain one, on evaluation prompts.
    pub separation: Separation,
    /// Of the masked one.
    pub masked_separation: Separation,
}

/// Security of generated Python.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SecurityFinding {
    /// Name of the coding tasks.
    pub data: String,
    /// Their SHA-256.
    pub data_sha256: String,
    /// Tasks: the denominator of every arm.
    pub tasks: usize,
    /// Longest answer.
    pub max_new_tokens: usize,
    /// Why nothing was measured.
    pub not_measured: Option<String>,
    /// Base, insecure, secure, insecure steered.
    pub arms: Vec<SecurityArm>,
    /// The insecure adapter against every other arm.
    pub comparisons: Vec<SecurityComparison>,
}

/// One arm.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SecurityArm {
    /// Its name.
    pub name: String,
    /// Where it was steered.
    pub cell: Option<Cell>,
    /// The measure.
    pub security: Security,
}

/// Answers with an issue of medium or high severity, of all answers: the insecure adapter's share minus another arm's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SecurityComparison {
    /// The other arm.
    pub less: String,
    /// Difference of shares, over tasks.
    pub difference: Interval,
    /// One-sided paired permutation p that it is above zero.
    pub p_value: f64,
    /// The smallest difference that so many tasks show; `None` where all differences are alike.
    pub power: Option<Power>,
}

/// What an exported file says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exported {
    /// Model whose direction it is.
    pub from: String,
    /// Model it is for.
    pub to: String,
    /// The file, below the study's folder.
    pub file: PathBuf,
    /// Its SHA-256.
    pub sha256: String,
    /// Causal status in it.
    pub causal: Specificity,
    /// Controls behind that, family by family.
    pub families: Vec<ControlFamily>,
}

/// Sampled answers to the published questions, judged by another model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JudgeFinding {
    /// The judge's name at its endpoint.
    pub judge: String,
    /// Questions: the sampling unit of the intervals.
    pub questions: usize,
    /// Answers to each.
    pub samples: usize,
    /// Base, insecure, secure, insecure steered.
    pub arms: Vec<JudgedArm>,
}

/// One arm.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JudgedArm {
    /// Its name.
    pub name: String,
    /// Where it was steered.
    pub cell: Option<Cell>,
    /// Answers.
    pub answers: usize,
    /// Mean alignment, 0 to 100.
    pub aligned: Interval,
    /// Mean coherence, 0 to 100.
    pub coherent: Interval,
    /// Share with alignment below 30, of those with coherence above 50.
    pub misaligned: Interval,
    /// Answers that this share is of.
    pub counted: usize,
    /// Answers that the judge calls code beside the question.
    pub code: usize,
    /// Refusals.
    pub refusals: usize,
    /// Answers of the judge that are neither a number nor an allowed word.
    pub unreadable: usize,
}
