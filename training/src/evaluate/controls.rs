//! The control battery: what directions of the same size do in the chosen cell.

use super::{Evaluator, State, family_results, mean};
use crate::battery::{self, Control};
use crate::preference::Preference;
use crate::results::{ControlResult, FamilyResult};
use crate::{extract, interrupt, progress, statistics as stats};
use anyhow::Result;
use emaudit::directions::schema::{Cell, Positions};

/// Families whose answers are sampled as well.
const SAMPLED_FAMILIES: [&str; 2] = ["random", "orthogonal"];

impl Evaluator<'_> {
    pub(super) fn controls(&self, vector: &[f32]) -> Result<Vec<Control>> {
        let base = &self.inputs.states[0].extraction.layers[self.last];
        let adapted = &self.inputs.states[1].extraction.layers[self.last];
        let differences: Vec<f32> = adapted.iter().zip(base).map(|(a, b)| a - b).collect();
        battery::draw(
            vector,
            base,
            &differences,
            self.inputs.recipe.evaluate.controls,
            self.inputs.recipe.seed,
        )
    }

    pub(super) fn sampled_controls<'c>(&self, controls: &'c [Control]) -> Vec<&'c Control> {
        let of = |family: &'static str| {
            let count = self.inputs.recipe.evaluate.sampled_controls;
            controls.iter().filter(move |c| c.family == family).take(count)
        };
        SAMPLED_FAMILIES.into_iter().flat_map(of).collect()
    }

    /// Spillover of the insecure adapter's answers under each control; shared continuations are sampled together.
    pub(super) fn control_spillovers(
        &self,
        insecure: &mut State<'_>,
        controls: &[&Control],
        alpha: f64,
        positions: Positions,
    ) -> Result<Vec<f64>> {
        let steering = |c: &&Control| battery::subtract(&c.vector, alpha);
        if positions == Positions::FinalPrefill {
            let first = |c: &&Control| insecure.answerer.first_tokens(Some(&steering(c)?));
            let firsts: Vec<_> = controls.iter().map(first).collect::<Result<_>>()?;
            insecure.answerer.prepare(&firsts)?;
        }
        controls.iter().map(|c| Ok(self.steered(insecure, &steering(c)?, positions)?.1.spillover())).collect()
    }

    /// Every control in the chosen cell: drop of code preference; sampled spillover of the first few.
    pub(super) fn battery(
        &self,
        insecure: &mut State<'_>,
        preference: Option<&Preference<'_>>,
        controls: &[Control],
        cell: Cell,
        drops: Option<&[f64]>,
    ) -> Result<(Vec<FamilyResult>, Vec<ControlResult>)> {
        let mut stage = progress::Stage::new("controls in the cell", controls.len());
        let mut results = Vec::with_capacity(controls.len());
        for control in controls {
            let steering = battery::subtract(&control.vector, cell.alpha)?;
            let effect = match preference {
                Some(p) => mean(&p.drops(&steering, cell.positions)?),
                None => f64::NAN,
            };
            let name = control.family.to_owned();
            results.push(ControlResult { name, seed: control.seed, effect, spillover: None, paired_p: None });
            stage.advance(1, "");
            interrupt::check()?;
        }
        stage.finish("");
        let sampled = self.sampled_controls(controls);
        let spillovers = self.control_spillovers(insecure, &sampled, cell.alpha, cell.positions)?;
        for (control, spillover) in sampled.iter().zip(spillovers) {
            let same = |r: &&mut ControlResult| r.name == control.family && r.seed == control.seed;
            if let Some(result) = results.iter_mut().find(same) {
                result.spillover = Some(spillover);
            }
        }
        let families = drops.map_or_else(Vec::new, |d| family_results(&results, mean(d)));
        Ok((families, results))
    }

    /// Single directions at the same size: another layer's, and the secure adapter's own.
    pub(super) fn comparisons(
        &self,
        insecure: &mut State<'_>,
        preference: Option<&Preference<'_>>,
        vector: &[f32],
        cell: Cell,
        drops: Option<&[f64]>,
    ) -> Result<Vec<ControlResult>> {
        let middle = self.inputs.directions.len() / 2;
        let secure = extract::mean_difference(
            &self.inputs.states[2].extraction.layers[self.last],
            &self.inputs.states[0].extraction.layers[self.last],
            vector.len(),
        );
        let named = [
            ("wrong_layer", middle as u64, self.inputs.directions[middle].direction.clone()),
            ("secure_direction", self.last as u64, secure),
        ];
        let mut out = Vec::new();
        for (name, seed, other) in named {
            let steering = battery::subtract(&battery::rescaled(&other, vector), cell.alpha)?;
            let spillover = Some(self.steered(insecure, &steering, cell.positions)?.1.spillover());
            let (mut effect, mut paired_p) = (f64::NAN, None);
            if let (Some(preference), Some(drops)) = (preference, drops) {
                let theirs = preference.drops(&steering, cell.positions)?;
                let differences: Vec<f64> = drops.iter().zip(&theirs).map(|(d, t)| d - t).collect();
                effect = mean(&theirs);
                paired_p = Some(stats::sign_flip_p(&differences, self.inputs.recipe.seed)?);
            }
            out.push(ControlResult { name: name.to_owned(), seed, effect, spillover, paired_p });
        }
        Ok(out)
    }
}
