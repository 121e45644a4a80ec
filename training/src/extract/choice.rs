//! How well a direction separates, and which of several is taken: by a stated rule, on the calibration split.
//!
//! Whatever is chosen here is reported on prompts that took part in neither extraction nor choice.

use super::estimators::Groups;
use super::scores;
use crate::statistics as stats;
use anyhow::{Result, bail, ensure};
use emaudit::directions::schema::{Contrast, Estimator};
use emaudit::{Probe, ScoreUnit};
use serde::{Deserialize, Serialize};

/// Separation of two groups of held-out rows by `h.v/|v|` (method: a check, never evidence).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Separation {
    /// At the midpoint of the group means of the extraction split.
    pub balanced_accuracy: f64,
    /// Chance that a positive row scores above a negative one.
    pub auroc: f64,
    /// Difference of the means over the pooled standard deviation.
    pub cohens_d: f64,
}

/// Separation of `held_out`, with the midpoint taken from `extraction`.
///
/// Errors: a direction of another width, zero or not finite.
pub fn separation(direction: &[f32], extraction: &Groups<'_>, held_out: &Groups<'_>) -> Result<Separation> {
    ensure!(
        direction.len() == extraction.hidden && direction.len() == held_out.hidden,
        "a direction of {} dimensions against rows of {} and {}",
        direction.len(),
        extraction.hidden,
        held_out.hidden
    );
    let projection = Probe::from_vectors(direction, &vec![0.0; direction.len()], 1.0, None)?;
    let project = |rows: &[f32]| scores(&projection, rows, ScoreUnit::Raw);
    let mean = |rows: &[f32]| stats::mean(&project(rows)?);
    let midpoint = (mean(extraction.positive)? + mean(extraction.negative)?) / 2.0;
    let (positive, negative) = (project(held_out.positive)?, project(held_out.negative)?);
    Ok(Separation {
        balanced_accuracy: stats::balanced_accuracy(&positive, &negative, midpoint)?,
        auroc: stats::auroc(&positive, &negative)?,
        cohens_d: stats::cohens_d(&positive, &negative)?,
    })
}

/// One layer, contrast and estimator, measured on the calibration split.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// 0-based block.
    pub layer: u32,
    /// How it was estimated.
    pub estimator: Estimator,
    /// Between which groups.
    pub contrast: Contrast,
    /// On calibration prompts.
    pub separation: Separation,
    /// Drop of code preference (nats per token) at the alpha all candidates share, on calibration prompts.
    pub effect: Option<f64>,
    /// Steered answers kept coherence within the margin, on calibration prompts; true where nothing was steered.
    pub eligible: bool,
}

/// The winner and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Index among the candidates.
    pub index: usize,
    /// The rule in words, for the report.
    pub rule: String,
}

const BY_EFFECT: &str = "the candidate with the largest drop of code preference on the calibration split, among those \
    whose steered answers keep coherence; ties go to the larger AUROC there, then to the larger Cohen's d, then to \
    the candidate listed first";
const BY_SEPARATION: &str = "nothing was steered, so the candidate with the largest AUROC on the calibration split; \
    ties go to the larger Cohen's d there, then to the candidate listed first. Separation does not show that a \
    direction acts";

/// Chooses by effect where every eligible candidate has one, by separation where none has.
///
/// Errors: no eligible candidate; effects measured for some of them only; a measure that is NaN.
pub fn choose(candidates: &[Candidate]) -> Result<Choice> {
    let eligible: Vec<(usize, &Candidate)> =
        candidates.iter().enumerate().filter(|(_, c)| c.eligible).collect();
    if eligible.is_empty() {
        bail!(
            "none of {} candidates keeps coherence: lower alpha, or finetune with a lower rate",
            candidates.len()
        );
    }
    let measured = eligible.iter().filter(|(_, c)| c.effect.is_some()).count();
    ensure!(
        measured == 0 || measured == eligible.len(),
        "{measured} of {} candidates have an effect: measure all of them in one cell, or none",
        eligible.len()
    );
    for (i, c) in &eligible {
        let measures = [c.effect.unwrap_or(0.0), c.separation.auroc, c.separation.cohens_d];
        ensure!(
            !measures.iter().any(|m| m.is_nan()),
            "candidate {i} (layer {}) has a measure that is NaN",
            c.layer
        );
    }
    let better = |a: &Candidate, b: &Candidate| {
        let effect = a.effect.unwrap_or(0.0).total_cmp(&b.effect.unwrap_or(0.0));
        let auroc = a.separation.auroc.total_cmp(&b.separation.auroc);
        effect.then(auroc).then(a.separation.cohens_d.total_cmp(&b.separation.cohens_d)).is_gt()
    };
    let mut best = eligible[0];
    for &candidate in &eligible[1..] {
        if better(candidate.1, best.1) {
            best = candidate;
        }
    }
    let rule = if measured > 0 { BY_EFFECT } else { BY_SEPARATION };
    Ok(Choice { index: best.0, rule: rule.to_owned() })
}
