//! A carried direction as a file of its own, with its status in it.
//!
//! Its evidence holds two sets of controls: the four families that every direction file is measured by, drawn in the
//! target, and the four that went the direction's own way. All of them must speak for it before it is `specific`.

use super::findings::{Exported, TransferFinding};
use super::transfer::{Link, Source};
use crate::evaluate::mean;
use crate::experiment::{Evaluated, Experiment};
use crate::{battery, extract, interrupt, progress, store};
use anyhow::Result;
use emaudit::directions::schema::{ControlEffect, ControlFamily, Evidence, Positions};
use std::path::Path;

/// Writes the file. `found`: what was found of the pair; `datasets`: of the source's direction.
pub(super) fn export(
    source: &Source,
    found: &TransferFinding,
    datasets: Vec<(String, String)>,
    experiment: &Experiment,
    evaluated: &Evaluated,
    path: &Path,
) -> Result<Exported> {
    let link = Link::new(source, &found.to, experiment, evaluated)?;
    let (cell, vector) = (&link.cell, &link.carried.vector);
    let (layer, recipe) = (cell.layer, &experiment.recipe);
    let insecure = &evaluated.insecure;
    let rows = experiment.rows_of("insecure", Some(insecure), evaluated)?;
    let [plain, _] = cell.answers("insecure", Some(insecure), &rows, &cell.steering)?;
    let preference = cell.preference("insecure", insecure, &plain, &cell.code_pairs(&plain)?)?;
    let aligned = &cell.base.extraction.layers[layer];
    let differences: Vec<f32> =
        rows.extraction.layers[layer].iter().zip(aligned).map(|(a, b)| a - b).collect();
    let drawn = battery::draw(vector, aligned, &differences, recipe.evaluate.controls, recipe.seed)?;
    let alpha = evaluated.results.selection.chosen.alpha;
    let effect = found.effect.value;
    let mut stage = progress::Stage::new(format!("controls of {} for its file", found.from), drawn.len());
    let mut families: Vec<ControlFamily> = Vec::new();
    for control in &drawn {
        let steering = battery::subtract(&control.vector, alpha)?;
        let drops = preference.drops(&steering, Positions::FinalPrefill)?;
        let one = ControlEffect { seed: control.seed, effect: mean(&drops) };
        match families.iter_mut().find(|f| f.family == control.family) {
            Some(family) => family.controls.push(one),
            None => {
                let family = control.family.to_owned();
                families.push(ControlFamily { family, rank_p: f64::NAN, controls: vec![one] });
            }
        }
        stage.advance(1, "");
        interrupt::check()?;
    }
    stage.finish("");
    families.iter_mut().for_each(|f| f.rank_p = f.rank_p_of(effect));
    families.extend(found.families.iter().cloned());
    let mut evidence = Evidence {
        cell: Some(evaluated.results.selection.chosen),
        effect: Some(effect),
        coherence: Some(found.coherence),
        families: families.clone(),
        ..Evidence::untested()
    };
    evidence.causal = evidence.recompute_causal();
    let causal = evidence.causal;
    let calm = &cell.base.calibration.layers[layer];
    let direction = extract::calibrated(layer, vector.clone(), aligned, calm, &recipe.calibrate.rates)?;
    experiment.write_carried(path, &found.from, &direction, evidence, datasets)?;
    let sha256 = store::sha256_files(&[path.to_owned()])?;
    let (from, to) = (found.from.clone(), found.to.clone());
    Ok(Exported { from, to, file: path.to_owned(), sha256, causal, families })
}
