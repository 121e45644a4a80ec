//! Ways to act on a direction beside subtracting it, each against controls that move every row by the same amount.
//! Teacher-forced throughout: a drop of code preference, nats per token, on evaluation prompts.
//!
//! At the final layer an edit costs one product with the output head. In earlier blocks it costs the blocks behind it, so
//! fewer prompts and controls are taken there.

use super::cell::Cell;
use super::findings::{Intervened, InterventionFinding};
use super::measures::Interventions;
use super::recipe::SECURE;
use crate::battery::{self, Control};
use crate::evaluate::{States, mean};
use crate::experiment::{Evaluated, Experiment};
use crate::extract::estimators::Groups;
use crate::extract::{LayerDirection, mean_difference, norm};
use crate::middle::MiddlePreference;
use crate::perturb::gate::{self, GatedShift, LearnedGate, Reassigned};
use crate::perturb::subspace::Subspace;
use crate::perturb::{Matched, RowEdit, Shape, change_norms, gated_clamp};
use crate::preference::{Preference, contrast, prose};
use crate::{calibrate, interrupt, progress, random, statistics as stats};
use anyhow::{Result, ensure};
use emaudit::controls;
use emaudit::directions::schema::{ControlEffect, ControlFamily, Positions};
use emaudit::{Operation, Steering, SteeringOptions};

/// An edit with its name and what controls it.
struct Arm {
    name: String,
    positions: Positions,
    edit: Box<dyn RowEdit>,
    /// `None`: single vectors.
    subspace: Option<Subspace>,
    /// Of a learned gate: the same openings on other rows.
    gated: Option<GatedShift>,
}

impl Arm {
    fn new(name: impl Into<String>, edit: impl RowEdit + 'static) -> Self {
        let positions = Positions::FinalPrefill;
        Arm { name: name.into(), positions, edit: Box::new(edit), subspace: None, gated: None }
    }
}

/// The library's own operation along one direction.
fn operation(d: &LayerDirection, operation: Operation, gate: Option<f32>) -> Result<Steering> {
    // Offline evaluation is what makes the evidence, so it cannot ask for it.
    let options = SteeringOptions { gate, allow_nonspecific: true, ..SteeringOptions::new(operation) };
    Ok(Steering::new(&calibrate::probe(d)?, options)?)
}

/// Every intervention of one model's first seed. `secure`: the source of the secure data.
pub(super) fn interventions(
    experiment: &Experiment,
    secure: &str,
    settings: &Interventions,
) -> Result<InterventionFinding> {
    let evaluated = experiment.evaluated()?;
    let cell = Cell::new(experiment, &evaluated)?;
    let rows = experiment.rows_of("insecure", Some(&evaluated.insecure), &evaluated)?;
    let [plain, _] = cell.answers("insecure", Some(&evaluated.insecure), &rows, &cell.steering)?;
    let indices = cell.code_pairs(&plain)?;
    let preference = cell.preference("insecure", &evaluated.insecure, &plain, &indices)?;
    let (secure, _) = experiment.finetune(SECURE, secure)?;
    let secure = experiment.rows_of(SECURE, Some(&secure), &evaluated)?;

    let mut final_layer = Vec::new();
    let lab = Lab { experiment, evaluated: &evaluated, cell: &cell, rows: &rows, indices: &indices };
    let arms = lab.final_arms(&secure)?;
    let vectors = lab.vectors(settings.controls)?;
    let mut stage = progress::Stage::new("interventions, final layer", arms.len());
    for arm in &arms {
        final_layer.push(lab.at_final_layer(arm, &preference, &vectors, settings)?);
        stage.advance(1, "");
        interrupt::check()?;
    }
    stage.finish("");
    drop(preference);
    let deep = match settings.deep_controls {
        0 => Vec::new(),
        _ => lab.deep(&plain, settings)?,
    };
    Ok(InterventionFinding { pairs: indices.len(), layer: cell.layer as u32, final_layer, deep })
}

struct Lab<'a> {
    experiment: &'a Experiment,
    evaluated: &'a Evaluated,
    cell: &'a Cell<'a>,
    rows: &'a States,
    indices: &'a [usize],
}

impl Lab<'_> {
    fn direction(&self) -> &LayerDirection {
        &self.evaluated.directions[self.cell.layer]
    }

    /// Base and insecure rows of the extraction split, one after the other in pairs.
    fn differences(&self) -> Vec<f32> {
        let (base, adapted) = (&self.cell.base.extraction, &self.rows.extraction);
        let layer = self.cell.layer;
        adapted.layers[layer].iter().zip(&base.layers[layer]).map(|(a, b)| a - b).collect()
    }

    fn vectors(&self, count: usize) -> Result<Vec<Control>> {
        let aligned = &self.cell.base.extraction.layers[self.cell.layer];
        let seed = self.experiment.recipe.seed;
        battery::draw(&self.direction().direction, aligned, &self.differences(), count, seed)
    }

    fn final_arms(&self, secure: &States) -> Result<Vec<Arm>> {
        let (d, layer, hidden) = (self.direction(), self.cell.layer, self.rows.extraction.hidden);
        let alpha = self.evaluated.results.selection.chosen.alpha;
        let threshold = self.cell.threshold.z as f32;
        let mut strengths = vec![0.25, 0.5, 1.0, 1.5];
        strengths.extend(&self.experiment.recipe.evaluate.alphas);
        strengths.sort_by(f64::total_cmp);
        strengths.dedup();
        let mut arms = Vec::new();
        for strength in strengths {
            arms.push(Arm::new(
                format!("subtract, alpha {strength}"),
                battery::subtract(&d.direction, strength)?,
            ));
        }
        for positions in [Positions::Generated, Positions::All] {
            let edit = battery::subtract(&d.direction, alpha)?;
            arms.push(Arm { positions, ..Arm::new(format!("subtract, alpha {alpha}"), edit) });
        }
        let gate = Some(threshold);
        let named = [
            ("project out", Operation::ProjectOut { alpha: 1.0 }, None),
            ("clamp to the aligned mean", Operation::Clamp { ceiling: 0.0 }, None),
            ("clamp to the alarm threshold", Operation::Clamp { ceiling: threshold }, None),
            ("gated by the alarm: subtract", Operation::Subtract { alpha: alpha as f32 }, gate),
            ("gated by the alarm: project out", Operation::ProjectOut { alpha: 1.0 }, gate),
        ];
        for (name, op, gate) in named {
            arms.push(Arm::new(name, operation(d, op, gate)?));
        }
        let clamp = gated_clamp(&d.direction, &d.aligned_mean, d.calibration.sigma, 0.0, threshold)?;
        arms.push(Arm::new("gated by the alarm: clamp to the aligned mean", clamp));

        let base = &self.cell.base.extraction.layers[layer];
        let of_secure = mean_difference(&secure.extraction.layers[layer], base, hidden);
        let both = [d.direction.clone(), of_secure];
        let subspace = Subspace::spanned(&both, 2, &d.aligned_mean, 1.0)?;
        let arm = Arm::new("project out two directions: insecure, secure", subspace.clone());
        arms.push(Arm { subspace: Some(subspace), ..arm });

        let groups = Groups::new(&self.rows.extraction.layers[layer], base, hidden)?;
        let options = gate::Options { seed: self.experiment.recipe.seed, ..gate::Options::default() };
        let (learned, training) = LearnedGate::train(&both, &groups, &options)?;
        let shift = GatedShift::new(learned, &d.direction, alpha)?;
        let name = format!(
            "learned gate ({} units; opens {:.2} on insecure, {:.2} on base rows): subtract",
            options.units, training.open_positive, training.open_negative
        );
        arms.push(Arm { gated: Some(shift.clone()), ..Arm::new(name, shift) });
        Ok(arms)
    }

    fn at_final_layer(
        &self,
        arm: &Arm,
        preference: &Preference<'_>,
        vectors: &[Control],
        settings: &Interventions,
    ) -> Result<Intervened> {
        let prefill = arm.positions == Positions::FinalPrefill;
        // Every later token is edited: as dear as an edit of an earlier block.
        let count = if prefill { settings.controls } else { settings.deep_controls.min(settings.controls) };
        let truth = arm.edit.as_ref();
        let (aligned, seed) =
            (&self.cell.base.extraction.layers[self.cell.layer], self.experiment.recipe.seed);
        let mut controls: Vec<(&str, u64, Box<dyn RowEdit + '_>)> = Vec::new();
        let shapes: Vec<(&str, u64, Shape)> = match &arm.subspace {
            Some(subspace) => {
                let drawn = subspace.controls(aligned, &self.differences(), count, seed)?;
                drawn.into_iter().map(|c| (c.family, c.seed, Shape::Within(c.subspace))).collect()
            }
            None => {
                let drawn = vectors.iter().filter(|c| prefill || c.family == "random");
                let drawn = drawn.take(if prefill { vectors.len() } else { count });
                drawn.map(|c| (c.family, c.seed, Shape::Along(c.vector.clone()))).collect()
            }
        };
        for (family, seed, shape) in shapes {
            controls.push((family, seed, Box::new(Matched::new(truth, shape)?)));
        }
        if let Some(gated) = &arm.gated {
            for i in 0..count {
                let seed = battery::control_seed(seed, 4, i);
                controls.push(("reassigned", seed, Box::new(Reassigned::new(gated.clone(), seed))));
            }
        }
        let hidden = self.rows.evaluation.hidden;
        let all = &self.rows.evaluation.layers[self.cell.layer];
        let last: Vec<f32> =
            self.indices.iter().flat_map(|i| all[i * hidden..(i + 1) * hidden].iter().copied()).collect();
        let norms = change_norms(truth, &last, hidden)?;
        let dose: Vec<f64> = norms.iter().zip(last.chunks(hidden)).map(|(n, h)| n / norm(h)).collect();

        let before = preference.log_probabilities(None, arm.positions)?;
        let measure = |edit: &dyn RowEdit| preference.log_probabilities(Some(edit), arm.positions);
        let after = measure(truth)?;
        let mut effects = Vec::new();
        for (family, seed, edit) in &controls {
            effects.push((*family, *seed, mean(&drops(&before, &measure(edit.as_ref())?))));
            interrupt::check()?;
        }
        let found = self.compared(arm.name.clone(), arm.positions, &before, &after, effects)?;
        Ok(Intervened { dose: Some(mean(&dose)), ..found })
    }

    /// An edit's effect among those of its controls: family, seed, effect.
    fn compared(
        &self,
        name: String,
        positions: Positions,
        before: &[Vec<f64>],
        after: &[Vec<f64>],
        controls: Vec<(&str, u64, f64)>,
    ) -> Result<Intervened> {
        let drop = drops(before, after);
        let mut families: Vec<ControlFamily> = Vec::new();
        for (family, seed, effect) in controls {
            let one = ControlEffect { seed, effect };
            match families.iter_mut().find(|f| f.family == family) {
                Some(f) => f.controls.push(one),
                None => families.push(ControlFamily {
                    family: family.to_owned(),
                    rank_p: f64::NAN,
                    controls: vec![one],
                }),
            }
        }
        families.iter_mut().for_each(|f| f.rank_p = f.rank_p_of(mean(&drop)));
        Ok(Intervened {
            name,
            positions,
            dose: None,
            effect: self.cell.interval(&drop)?,
            p_effect: stats::sign_flip_p(&drop, self.experiment.recipe.seed)?,
            prose: mean(&prose(after)) - mean(&prose(before)),
            pairs: drop.len(),
            families,
        })
    }

    /// Edits of one middle block and of several blocks at once.
    fn deep(&self, plain: &[Vec<u32>], settings: &Interventions) -> Result<Vec<Intervened>> {
        let indices = &self.indices[..settings.deep_pairs.min(self.indices.len())];
        let (own, prose) = self.cell.forced(plain, indices);
        let count = self.evaluated.directions.len();
        ensure!(count > 1, "a model of one block has no earlier one to edit");
        let alpha = self.experiment.recipe.evaluate.middle_alpha;
        let middle = count / 2;
        let several: Vec<usize> = (0..count).filter(|l| *l >= middle).step_by((count / 6).max(1)).collect();
        let subtract = |layers: &[usize], alpha: f64| -> Result<Vec<(usize, Steering)>> {
            let one =
                |&l: &usize| Ok((l, battery::subtract(&self.evaluated.directions[l].direction, alpha)?));
            layers.iter().map(one).collect()
        };
        let along = |layers: &[usize], op: Operation| -> Result<Vec<(usize, Steering)>> {
            layers.iter().map(|&l| Ok((l, operation(&self.evaluated.directions[l], op, None)?))).collect()
        };
        let (one, p) = ([middle], Positions::All);
        let (out, clamp) = (Operation::ProjectOut { alpha: 1.0 }, Operation::Clamp { ceiling: 0.0 });
        let named = [
            (
                format!("layer {middle}: subtract, alpha {alpha}"),
                Positions::FinalPrefill,
                subtract(&one, alpha)?,
            ),
            (
                format!("layer {middle}: subtract, alpha {alpha}"),
                Positions::Generated,
                subtract(&one, alpha)?,
            ),
            (format!("layer {middle}: subtract, alpha {alpha}"), p, subtract(&one, alpha)?),
            (format!("layer {middle}: project out"), p, along(&one, out)?),
            (format!("layer {middle}: clamp to the aligned mean"), p, along(&one, clamp)?),
            (
                format!("layers {several:?}: subtract, alpha {}", alpha / 2.0),
                p,
                subtract(&several, alpha / 2.0)?,
            ),
            (format!("layers {several:?}: clamp to the aligned mean"), p, along(&several, clamp)?),
        ];
        let adapter = Some(&self.evaluated.insecure.adapter);
        let decoder = &self.experiment.base().decoder;
        let forced = MiddlePreference::new(decoder, adapter, middle, &own, &prose)?;
        let before = forced.log_probabilities(&[], Positions::All)?;
        let mut stage = progress::Stage::new("interventions, earlier layers", named.len());
        let mut found = Vec::new();
        for (name, positions, edits) in named {
            let truth: Vec<(usize, &dyn RowEdit)> =
                edits.iter().map(|(l, e)| (*l, e as &dyn RowEdit)).collect();
            let after = forced.log_probabilities(&truth, positions)?;
            let mut effects = Vec::new();
            for i in 0..settings.deep_controls {
                let seed = battery::control_seed(self.experiment.recipe.seed, 0, i);
                let mut controls = Vec::new();
                for (layer, edit) in &edits {
                    let direction = &self.evaluated.directions[*layer].direction;
                    // Another vector in every block.
                    let vector = controls::random(direction, random::bits(&[seed, *layer as u64]));
                    controls.push((*layer, Matched::new(edit, Shape::Along(vector))?));
                }
                let edits: Vec<(usize, &dyn RowEdit)> =
                    controls.iter().map(|(l, e)| (*l, e as &dyn RowEdit)).collect();
                let after = forced.log_probabilities(&edits, positions)?;
                effects.push(("random", seed, mean(&drops(&before, &after))));
                interrupt::check()?;
            }
            found.push(self.compared(name, positions, &before, &after, effects)?);
            stage.advance(1, "");
        }
        stage.finish("");
        Ok(found)
    }
}

/// Drop of each prompt's preference.
fn drops(before: &[Vec<f64>], after: &[Vec<f64>]) -> Vec<f64> {
    contrast(before).iter().zip(contrast(after)).map(|(b, a)| b - a).collect()
}
