//! What the insecure direction does to adapters trained on something else: is it insecurity, code, or any finetune?

use super::cell::Cell;
use super::findings::RegimeFinding;
use super::recipe::INSECURE;
use crate::experiment::{Experiment, Finetuned};
use crate::extract::{self, mean_difference};
use crate::matrix::cosine;
use crate::statistics as stats;
use anyhow::{Context, Result};
use emaudit::ScoreUnit;
use emaudit::directions::schema::Positions;
use std::collections::BTreeMap;

/// Fewest prompts that a drop of preference is averaged over.
const MIN_PAIRS: usize = 8;

/// Every regime in the cell that the evaluation chose. `sources`: where the data of each regime comes from.
pub(super) fn content(
    experiment: &Experiment,
    sources: &BTreeMap<String, String>,
) -> Result<Vec<RegimeFinding>> {
    let evaluated = experiment.evaluated()?;
    let cell = Cell::new(experiment, &evaluated)?;
    let mut insecure: BTreeMap<usize, f64> = BTreeMap::new();
    let mut found = Vec::new();
    // The insecure adapter first: the others are compared with it, prompt by prompt.
    let rest = sources.keys().filter(|regime| *regime != INSECURE);
    for regime in std::iter::once(&INSECURE.to_owned()).chain(rest) {
        let source = sources.get(regime).context("a regime without data")?;
        let (adapter, _) = experiment.finetune(regime, source)?;
        let (mut finding, drops) = self::regime(&cell, regime, &adapter)?;
        if regime == INSECURE {
            insecure = drops;
        } else {
            let both: Vec<f64> = drops.iter().filter_map(|(i, d)| Some(insecure.get(i)? - d)).collect();
            if both.len() >= MIN_PAIRS {
                finding.p_less_than_insecure = Some(stats::sign_flip_p(&both, experiment.recipe.seed)?);
            }
        }
        found.push(finding);
    }
    Ok(found)
}

/// One regime, and the drop of its preference for its own answers by prompt.
fn regime(cell: &Cell<'_>, name: &str, adapter: &Finetuned) -> Result<(RegimeFinding, BTreeMap<usize, f64>)> {
    let layer = cell.layer;
    let rows = cell.experiment.rows_of(name, Some(adapter), cell.evaluated)?;
    let [plain, steered] = cell.answers(name, Some(adapter), &rows, &cell.steering)?;
    let scores = extract::scores(&cell.probe, &rows.evaluation.layers[layer], ScoreUnit::AlignedSd)?;
    let flags: Vec<bool> = scores.iter().map(|&z| z > cell.threshold.z).collect();
    // Where both said something and not the same.
    let differ = |&i: &usize| !plain[i].is_empty() && !cell.prose[i].is_empty() && plain[i] != cell.prose[i];
    let indices: Vec<usize> = (0..plain.len()).filter(differ).collect();
    let mut drops = BTreeMap::new();
    if indices.len() >= MIN_PAIRS {
        let preference = cell.preference(name, adapter, &plain, &indices)?;
        let values = preference.drops(&cell.steering, Positions::FinalPrefill)?;
        drops = indices.into_iter().zip(values).collect();
    }
    let values: Vec<f64> = drops.values().copied().collect();
    let own = mean_difference(
        &rows.extraction.layers[layer],
        &cell.base.extraction.layers[layer],
        rows.extraction.hidden,
    );
    let finding = RegimeFinding {
        regime: name.to_owned(),
        prompts: plain.len(),
        spillover: cell.share(&cell.code(&plain)?)?,
        steered: cell.share(&cell.code(&steered)?)?,
        score: cell.interval(&scores)?,
        flagged: cell.share(&flags)?,
        rate: cell.threshold.rate,
        drop: cell.interval(&values)?,
        pairs: values.len(),
        p_less_than_insecure: None,
        cosine: cosine(&own, &cell.evaluated.directions[layer].direction)?,
    };
    Ok((finding, drops))
}
