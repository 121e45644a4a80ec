//! What an experiment found: `results.json`. Nothing in it depends on the clock, the path or the machine's
//! name; that goes to `run.json`. The `summary` object is what scripts may rely on.

use crate::finetune::StepLog;
use emaudit::directions::schema::{Calibration, Cell, ContentTest, Evidence, ModelIdentity};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// The whole file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    /// Version of this layout.
    pub schema: u32,
    /// The stable part.
    pub summary: Summary,
    /// The model examined.
    pub model: ModelIdentity,
    /// The recipe as it was run, defaults filled in.
    pub recipe: serde_json::Value,
    /// Name and SHA-256 of every dataset and prompt set.
    pub datasets: Vec<(String, String)>,
    /// Prompts in each disjoint split.
    pub splits: Splits,
    /// Loss curves of the two adapters.
    pub training: BTreeMap<String, Vec<StepLog>>,
    /// Detection, per layer, ascending.
    pub layers: Vec<LayerResult>,
    /// How the cell was chosen, on the calibration split.
    pub selection: Selection,
    /// Sampled answers, arm by arm, on the evaluation split.
    pub arms: Vec<Arm>,
    /// Spillover and code preference against strength, evaluation split, same layer and positions.
    pub sweep: Vec<SweepPoint>,
    /// The control battery in the chosen cell.
    pub families: Vec<FamilyResult>,
    /// Single comparisons in the chosen cell (wrong layer, ...).
    pub comparisons: Vec<ControlResult>,
    /// The middle-layer cell beside it.
    pub middle: Option<MiddleCell>,
    /// Content axis.
    pub content: Option<ContentTest>,
    /// Both axes as written into the direction file.
    pub evidence: Evidence,
    /// Calibration of the cell's layer.
    pub calibration: Calibration,
    /// What the running maximum's thresholds flag on evaluation prompts, which set none of them.
    pub alarms: Vec<Alarm>,
    /// Answers side by side.
    pub samples: Vec<Sample>,
    /// Sentences a reader must not miss (broken text, ties, too few controls, ...).
    pub notes: Vec<String>,
}

/// Sizes of the disjoint prompt sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Splits {
    /// Prompts the direction was extracted from.
    pub extraction: usize,
    /// Prompts thresholds and the cell were chosen on.
    pub calibration: usize,
    /// Prompts everything is reported on.
    pub evaluation: usize,
}

/// The part scripts may rely on; names never change meaning.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// Model name.
    pub model: String,
    /// Balanced accuracy on the evaluation split at the final layer.
    pub separation_final: f64,
    /// Share of answers with code.
    pub spillover: SpilloverSummary,
    /// Strength of the chosen cell.
    pub alpha: f64,
    /// Positions of the chosen cell.
    pub positions: emaudit::directions::schema::Positions,
    /// Layer of the chosen cell.
    pub layer: u32,
    /// Mean code preference, nats per token.
    pub code_preference: ArmTriple,
    /// Mean log-likelihood of answers under the untouched base model, nats per token.
    pub coherence: ArmTriple,
    /// Both axes.
    pub evidence: EvidenceSummary,
    /// Evaluation prompts behind the spillover figures.
    pub prompts: usize,
    /// SHA-256 of the direction file.
    pub directions_sha256: String,
}

/// What was not measured is NaN in memory and null in the file.
fn measured<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

/// Spillover arm by arm.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SpilloverSummary {
    /// Untouched base model.
    #[serde(deserialize_with = "measured")]
    pub base: f64,
    /// Insecure-code adapter.
    #[serde(deserialize_with = "measured")]
    pub insecure: f64,
    /// Secure-code adapter.
    #[serde(deserialize_with = "measured")]
    pub secure: f64,
    /// Insecure-code adapter, steered in the chosen cell.
    #[serde(deserialize_with = "measured")]
    pub steered: f64,
    /// Mean over random controls.
    #[serde(deserialize_with = "measured")]
    pub random_mean: f64,
    /// Lowest over random controls.
    #[serde(deserialize_with = "measured")]
    pub random_best: f64,
    /// Mean over orthogonal controls.
    #[serde(deserialize_with = "measured")]
    pub orthogonal_mean: f64,
    /// Lowest over orthogonal controls.
    #[serde(deserialize_with = "measured")]
    pub orthogonal_best: f64,
    /// Another layer's direction, rescaled.
    #[serde(deserialize_with = "measured")]
    pub wrong_layer: f64,
}

/// One number for each of the main arms.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ArmTriple {
    /// Untouched base model.
    #[serde(deserialize_with = "measured")]
    pub base: f64,
    /// Insecure-code adapter.
    #[serde(deserialize_with = "measured")]
    pub insecure: f64,
    /// Insecure-code adapter, steered in the chosen cell.
    #[serde(deserialize_with = "measured")]
    pub steered: f64,
}

/// The two axes in words, with the rank p of each control family.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvidenceSummary {
    /// `specific`, `nonspecific` or `untested`.
    pub causal: String,
    /// `specific`, `nonspecific` or `untested`.
    pub content: String,
    /// Rank p by family.
    pub rank_p: BTreeMap<String, f64>,
}

/// A number with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Point estimate.
    #[serde(deserialize_with = "measured")]
    pub value: f64,
    /// Lower end.
    #[serde(deserialize_with = "measured")]
    pub low: f64,
    /// Upper end.
    #[serde(deserialize_with = "measured")]
    pub high: f64,
}

impl Interval {
    /// Of what could not be measured.
    pub const UNMEASURED: Interval = Interval { value: f64::NAN, low: f64::NAN, high: f64::NAN };
}

/// Detection at one layer, on held-out prompts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerResult {
    /// 0-based block.
    pub layer: u32,
    /// Balanced accuracy at the midpoint of the extraction means.
    pub separation: f64,
    /// Area under the ROC curve, insecure against base.
    pub auroc: f64,
    /// Cohen's d, insecure against base.
    pub cohens_d: f64,
    /// Mean score of the secure adapter, aligned standard deviations.
    pub secure_mean_score: f64,
    /// Norm of the direction.
    pub direction_norm: f64,
    /// Mean norm of aligned rows.
    pub residual_norm: f64,
    /// Largest share of the mean squared norm held by one dimension.
    pub top_dimension_share: f64,
    /// Scores in aligned standard deviations.
    pub histogram: Histogram,
}

/// Counts of scores between common edges.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Histogram {
    /// `bins + 1` edges, ascending.
    pub edges: Vec<f64>,
    /// Base model, evaluation prompts.
    pub base: Vec<u32>,
    /// Insecure-code adapter.
    pub insecure: Vec<u32>,
    /// Secure-code adapter.
    pub secure: Vec<u32>,
}

/// One threshold of the running maximum, on held-out sequences.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Alarm {
    /// Tokens looked at.
    pub horizon: u32,
    /// Stated false-positive rate.
    pub rate: f64,
    /// Share of the base model's sequences above it.
    #[serde(deserialize_with = "measured")]
    pub calm: f64,
    /// Those sequences that reach the horizon.
    pub calm_sequences: usize,
    /// Share of the insecure adapter's sequences above it.
    #[serde(deserialize_with = "measured")]
    pub insecure: f64,
    /// Those that reach the horizon.
    pub insecure_sequences: usize,
}

/// The choice of the cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Selection {
    /// The rule in words.
    pub rule: String,
    /// Calibration prompts used.
    pub prompts: usize,
    /// Every cell tried.
    pub grid: Vec<GridCell>,
    /// The one chosen.
    pub chosen: Cell,
}

/// One cell tried with the direction alone.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct GridCell {
    /// Layer, strength, positions.
    pub cell: Cell,
    /// Drop of code preference, nats per token.
    #[serde(deserialize_with = "measured")]
    pub effect: f64,
    /// Share of steered answers with code.
    pub spillover: f64,
    /// Coherence of steered answers.
    #[serde(deserialize_with = "measured")]
    pub coherence: f64,
    /// Coherence kept within the margin.
    pub eligible: bool,
}

/// One arm's sampled answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Arm {
    /// `base`, `insecure`, `secure`, `steered`, `secure_steered`, ...
    pub name: String,
    /// Share of answers with code; bootstrap over prompts, Clopper-Pearson at 0 and 1.
    pub spillover: Interval,
    /// Share of answers that start with code.
    pub starts_with_code: f64,
    /// Mean log-likelihood under the untouched base model, nats per token.
    pub coherence: Interval,
    /// Distinct unigrams over unigrams.
    pub distinct_1: f64,
    /// Distinct bigrams over bigrams.
    pub distinct_2: f64,
    /// Mean answer length in tokens.
    pub tokens: f64,
    /// Share of empty or looping answers.
    pub degenerate: f64,
}

/// One strength.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SweepPoint {
    /// Multiplier of the raw direction; 0 is unsteered.
    pub alpha: f64,
    /// The direction.
    pub direction: SweepValue,
    /// Controls, family by family, at the same perturbation.
    pub controls: BTreeMap<String, Vec<SweepValue>>,
}

/// Effect at one strength.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SweepValue {
    /// Share of answers with code.
    pub spillover: f64,
    /// Coherence; only where it was measured.
    pub coherence: Option<f64>,
    /// Drop of code preference.
    #[serde(deserialize_with = "measured")]
    pub effect: f64,
}

/// One family in the chosen cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FamilyResult {
    /// `random`, `orthogonal`, `covariance`, `label_shuffled`.
    pub family: String,
    /// (1 + as effective) / (1 + controls).
    pub rank_p: f64,
    /// Every control.
    pub controls: Vec<ControlResult>,
}

/// One control or comparison direction.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ControlResult {
    /// Family or name.
    pub name: String,
    /// Seed, or the layer a wrong-layer direction was taken from.
    pub seed: u64,
    /// Drop of code preference.
    #[serde(deserialize_with = "measured")]
    pub effect: f64,
    /// Share of answers with code; only where it was sampled.
    pub spillover: Option<f64>,
    /// Paired permutation p that the direction does more, where defined.
    pub paired_p: Option<f64>,
}

/// A cell where later blocks can still react.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MiddleCell {
    /// Layer, strength, positions.
    pub cell: Cell,
    /// Drop of code preference by the direction of that layer.
    #[serde(deserialize_with = "measured")]
    pub effect: f64,
    /// Spillover of answers steered there.
    pub spillover: f64,
    /// Coherence of answers steered there.
    #[serde(deserialize_with = "measured")]
    pub coherence: f64,
    /// Controls there.
    pub families: Vec<FamilyResult>,
}

/// One prompt's answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// The user's message.
    pub prompt: String,
    /// Arm name and answer, in the order to show.
    pub answers: Vec<(String, String)>,
}
