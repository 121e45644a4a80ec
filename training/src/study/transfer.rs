//! One ordered pair of models: the source's direction through a ridge map, in the target's own cell, against controls
//! that went the same way.

use super::cell::Cell;
use super::findings::TransferFinding;
use crate::evaluate::{CoherenceMeter, dialogues, mean};
use crate::experiment::{Evaluated, Experiment};
use crate::extract::choice;
use crate::extract::estimators::Groups;
use crate::transfer::{self, Carried, CrossValidation, Options, RidgeMap, verdict};
use crate::{battery, interrupt, progress};
use anyhow::{Result, ensure};
use emaudit::directions::schema::{Coherence, ControlEffect, ControlFamily, Positions};
use std::collections::BTreeMap;

/// What the source gives: its base's rows on the shared prompts, and its direction.
pub(super) struct Source {
    name: String,
    texts: [Vec<String>; 3],
    /// Fit rows (extraction and calibration), then held-out rows (evaluation).
    rows: [Vec<f32>; 2],
    width: usize,
    direction: Vec<f32>,
}

impl Source {
    /// Reads what an evaluated experiment left.
    pub fn new(name: &str, experiment: &Experiment, evaluated: &Evaluated) -> Result<Self> {
        let layer = evaluated.results.selection.chosen.layer as usize;
        let states = experiment.rows_of("base", None, evaluated)?;
        let fit = [states.extraction.layers[layer].as_slice(), &states.calibration.layers[layer]].concat();
        Ok(Source {
            name: name.to_owned(),
            texts: evaluated.texts(),
            rows: [fit, states.evaluation.layers[layer].clone()],
            width: states.extraction.hidden,
            direction: evaluated.directions[layer].direction.clone(),
        })
    }
}

/// The source's direction in the target.
pub(super) struct Link<'a> {
    pub cell: Cell<'a>,
    pub map: RidgeMap,
    pub chosen: CrossValidation,
    pub carried: Carried,
    /// Evaluation prompts that both were run on.
    common: usize,
}

impl<'a> Link<'a> {
    pub fn new(
        source: &Source,
        target: &str,
        experiment: &'a Experiment,
        evaluated: &'a Evaluated,
    ) -> Result<Self> {
        let cell = Cell::new(experiment, evaluated)?;
        let texts = evaluated.texts();
        // One of the two may have been evaluated on fewer prompts: the first ones.
        let common = source.texts[2].len().min(texts[2].len());
        ensure!(
            source.texts[..2] == texts[..2] && source.texts[2][..common] == texts[2][..common],
            "{} and {target} were not run on the same prompts: give both one prompt set, with splits in it, or one seed",
            source.name
        );
        let (layer, seed) = (cell.layer, experiment.recipe.seed);
        let base = &cell.base;
        let fit = [base.extraction.layers[layer].as_slice(), &base.calibration.layers[layer]].concat();
        let options = Options { seed, ..Options::default() };
        let (map, chosen) =
            transfer::fit(&source.rows[0], source.width, &fit, base.extraction.hidden, &options)?;
        let carried = map.carry(&source.direction, &evaluated.directions[layer].direction)?;
        Ok(Link { cell, map, chosen, carried, common })
    }
}

/// Carries the source's direction into the target and evaluates it there.
pub(super) fn transfer(
    source: &Source,
    target: &str,
    experiment: &Experiment,
    evaluated: &Evaluated,
) -> Result<TransferFinding> {
    let link = Link::new(source, target, experiment, evaluated)?;
    let Link { cell, map, chosen, carried, common } = &link;
    let (layer, recipe) = (cell.layer, &experiment.recipe);
    let width = cell.base.extraction.hidden;
    let r2 = map.r2(
        &source.rows[1][..common * source.width],
        &cell.base.evaluation.layers[layer][..common * width],
    )?;
    let native = &evaluated.directions[layer].direction;

    let insecure = &evaluated.insecure;
    let rows = experiment.rows_of("insecure", Some(insecure), evaluated)?;
    let (base, adapted) = (&cell.base, &rows);
    let extraction = Groups::new(&adapted.extraction.layers[layer], &base.extraction.layers[layer], width)?;
    let held_out = Groups::new(&adapted.evaluation.layers[layer], &base.evaluation.layers[layer], width)?;
    let separated = |vector: &[f32]| choice::separation(vector, &extraction, &held_out);

    let alpha = evaluated.results.selection.chosen.alpha;
    let steering = battery::subtract(&carried.vector, alpha)?;
    let [plain, steered] = cell.answers("insecure", Some(insecure), &rows, &steering)?;
    let indices = cell.code_pairs(&plain)?;
    let preference = cell.preference("insecure", insecure, &plain, &indices)?;
    let drops = |vector: &[f32]| -> Result<Vec<f64>> {
        preference.drops(&battery::subtract(vector, alpha)?, Positions::FinalPrefill)
    };
    let (effects, native_effects) = (drops(&carried.vector)?, drops(native)?);
    let effect = mean(&effects);
    let controls = map.controls(&source.direction, native, recipe.evaluate.controls, recipe.seed)?;
    let mut stage = progress::Stage::new(format!("controls of {} in {target}", source.name), controls.len());
    let mut families: Vec<ControlFamily> = Vec::new();
    for control in &controls {
        let one = ControlEffect { seed: control.seed, effect: mean(&drops(&control.vector)?) };
        match families.iter_mut().find(|f| f.family == control.family) {
            Some(family) => family.controls.push(one),
            None => families.push(ControlFamily {
                family: control.family.to_owned(),
                rank_p: f64::NAN,
                controls: vec![one],
            }),
        }
        stage.advance(1, "");
        interrupt::check()?;
    }
    stage.finish("");
    for family in &mut families {
        family.rank_p = family.rank_p_of(effect);
    }
    let mut meter = CoherenceMeter::new(&experiment.base().decoder, experiment.coherence_file()?);
    let mut coherence = |answers: &[Vec<u32>]| -> Result<f64> {
        let values = meter.of(&dialogues(&evaluated.prompts().ids, answers))?;
        Ok(mean(&values.into_iter().flatten().collect::<Vec<_>>()))
    };
    let coherence = Coherence {
        unsteered: coherence(&plain)?,
        steered: coherence(&steered)?,
        margin: recipe.evaluate.coherence_margin,
    };
    let by_prompt: BTreeMap<u32, f64> =
        indices.iter().map(|&i| i as u32).zip(effects.iter().copied()).collect();
    Ok(TransferFinding {
        from: source.name.clone(),
        to: target.to_owned(),
        rows: chosen.rows,
        lambda: chosen.lambda,
        note: chosen.note(),
        r2,
        cosine: carried.cosine,
        separation: separated(&carried.vector)?,
        native_separation: separated(native)?,
        effect: cell.interval(&effects)?,
        native_effect: cell.interval(&native_effects)?,
        spillover: cell.share(&cell.code(&plain)?)?,
        steered: cell.share(&cell.code(&steered)?)?,
        coherence,
        verdict: verdict::across(&source.name, target, effect, &families, Some(coherence)),
        families,
        by_prompt,
    })
}
