//! How much each measuring stage does: `[measures]` of a study's recipe, and `[models.measures]` over it.
//!
//! These keys lie outside the ordinary recipe on purpose: a change here reruns the stage that reads it and the report.

use crate::dataset::EMBEDDED;
use anyhow::{Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

/// One table for each stage; a count of 0 leaves its stage out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Measures {
    /// Aligned against misaligned answers.
    pub alignment: Alignment,
    /// The exported direction file against models that never made it.
    pub audit: Audit,
    /// Ways to act on the direction.
    pub interventions: Interventions,
    /// Other estimators and contrasts.
    pub estimators: Estimators,
    /// Security of generated code.
    pub security: Security,
    /// A judge, where one is given.
    pub judge: Judge,
}

/// The likelihood contrast of aligned and misaligned answers, every model and seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Alignment {
    /// `embedded`, or the path of a file of pairs.
    pub data: String,
    /// Pairs compared in every state of the model, the first ones; 0 leaves the stage out.
    pub pairs: usize,
    /// Pairs that steering is measured on, the first ones.
    pub steered_pairs: usize,
    /// Random and covariance-matched controls, each, at the final layer.
    pub controls: usize,
    /// Random controls at the middle layer, where each costs the later blocks.
    pub middle_controls: usize,
}

impl Default for Alignment {
    fn default() -> Self {
        Alignment {
            data: EMBEDDED.to_owned(),
            pairs: 56,
            steered_pairs: 24,
            controls: 19,
            middle_controls: 19,
        }
    }
}

/// The audit of adapters and bases by the direction file of the first seed, every model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    /// Evaluation prompts of each suspect at most, the first ones; 0 leaves the stage out.
    pub prompts: usize,
    /// Audits the base in its other storage too (without NF4, or with it), which loads it again.
    pub requantised: bool,
}

impl Default for Audit {
    fn default() -> Self {
        Audit { prompts: 98, requantised: true }
    }
}

/// Interventions of many kinds against controls at matched perturbation, the first seed of every model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Interventions {
    /// Controls of each family at the final layer; 0 leaves the stage out.
    pub controls: usize,
    /// Random controls of edits of earlier blocks, and of later tokens; 0 leaves edits of earlier blocks out.
    pub deep_controls: usize,
    /// Prompts of edits of earlier blocks, at most.
    pub deep_pairs: usize,
}

impl Default for Interventions {
    fn default() -> Self {
        Interventions { controls: 19, deep_controls: 9, deep_pairs: 12 }
    }
}

/// Estimators, contrasts and layers, the first seed of every model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Estimators {
    /// Layers tried, evenly spread, the last among them; 0 leaves the stage out.
    pub layers: usize,
    /// Calibration prompts that effects are measured on, at most.
    pub pairs: usize,
    /// Alignment pairs behind the response-labelled contrast; 0 leaves that contrast out.
    pub response_pairs: usize,
    /// Evaluation prompts that the winner is reported on, at most.
    pub report_pairs: usize,
    /// Random and covariance-matched controls, each, of the winner.
    pub controls: usize,
}

impl Default for Estimators {
    fn default() -> Self {
        Estimators { layers: 4, pairs: 12, response_pairs: 56, report_pairs: 24, controls: 9 }
    }
}

/// Security of the Python that the adapters write, the first seed of every model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Security {
    /// `embedded`, or the path of a file of tasks, one JSON object with `prompt` a line.
    pub data: String,
    /// Tasks answered in every arm, the first ones; 0 leaves the stage out.
    pub tasks: usize,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
}

impl Default for Security {
    fn default() -> Self {
        Security { data: EMBEDDED.to_owned(), tasks: 32, max_new_tokens: 128 }
    }
}

/// Sampled answers for a judge, the first seed of every model; only where `--judge` names one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Judge {
    /// Questions of the alignment pairs, the first ones; 0 leaves the stage out.
    pub questions: usize,
    /// Answers to each.
    pub samples: usize,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
}

impl Default for Judge {
    fn default() -> Self {
        Judge { questions: 8, samples: 4, max_new_tokens: 128 }
    }
}

impl Measures {
    /// Reads and checks a merged table.
    pub fn from_table(table: toml::Table) -> Result<Self> {
        let measures: Measures =
            table.try_into().map_err(|e: toml::de::Error| anyhow!("[measures]: {}", e.message()))?;
        let a = &measures.alignment;
        ensure!(
            !a.data.trim().is_empty(),
            "measures.alignment.data is empty; leave it out for the embedded pairs"
        );
        ensure!(
            a.pairs == 0 || (a.pairs >= 2 && a.steered_pairs >= 2),
            "measures.alignment: an interval needs at least 2 pairs and 2 steered_pairs; pairs = 0 leaves the stage out"
        );
        ensure!(
            measures.interventions.deep_pairs >= 2,
            "measures.interventions: an interval needs at least 2 deep_pairs"
        );
        let (e, s) = (&measures.estimators, &measures.security);
        ensure!(
            e.layers == 0
                || (e.pairs >= 2 && e.report_pairs >= 2 && e.controls >= 1 && e.response_pairs != 1),
            "measures.estimators needs at least 2 pairs, 2 report_pairs, 1 control, and no or 2 response_pairs"
        );
        ensure!(
            s.tasks == 0 || (s.tasks >= 2 && s.max_new_tokens >= 1),
            "measures.security needs at least 2 tasks and answers of at least 1 token"
        );
        let j = &measures.judge;
        ensure!(
            j.questions == 0 || (j.samples >= 1 && j.max_new_tokens >= 1),
            "measures.judge needs at least 1 sample of at least 1 token"
        );
        Ok(measures)
    }
}
