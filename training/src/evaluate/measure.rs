//! Measures of sampled answers, and the parts of the results that describe them.

use super::{Evaluator, Pairs, State, mean};
use crate::answers::TextArm;
use crate::battery::{self, Control};
use crate::likelihood::{self, Dialogue};
use crate::model::Decoder;
use crate::preference::Preference;
use crate::results::*;
use crate::{progress, spillover, statistics as stats, store};
use anyhow::Result;
use emaudit::directions::schema::{Cell, ContentTest, Evidence, Positions, Specificity};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Answers shown side by side in the report.
const SAMPLES: usize = 8;

/// Mean log-likelihood of answers under the untouched base model; each answer is scored once and kept.
pub(crate) struct CoherenceMeter<'a> {
    decoder: &'a Decoder,
    file: PathBuf,
    known: BTreeMap<Dialogue, Option<f64>>,
}

impl<'a> CoherenceMeter<'a> {
    pub(crate) fn new(decoder: &'a Decoder, file: PathBuf) -> Self {
        type Kept = Vec<(Vec<u32>, Vec<u32>, Option<f64>)>;
        let kept: Option<Kept> = std::fs::read(&file).ok().and_then(|b| serde_json::from_slice(&b).ok());
        let known =
            kept.into_iter().flatten().map(|(prompt, answer, v)| (Dialogue { prompt, answer }, v)).collect();
        CoherenceMeter { decoder, file, known }
    }

    pub(crate) fn of(&mut self, dialogues: &[Dialogue]) -> Result<Vec<Option<f64>>> {
        let mut missing: Vec<Dialogue> =
            dialogues.iter().filter(|d| !self.known.contains_key(d)).cloned().collect();
        missing.sort();
        missing.dedup();
        if !missing.is_empty() {
            let values = progress::watch("coherence under the base", missing.len(), |step| {
                likelihood::mean_per_answer(self.decoder, None, &missing, step)
            })?;
            self.known.extend(missing.into_iter().zip(values));
            let list: Vec<_> = self.known.iter().map(|(d, v)| (&d.prompt, &d.answer, v)).collect();
            store::write_file(&self.file, &serde_json::to_vec(&list)?)?;
        }
        Ok(dialogues.iter().map(|d| self.known.get(d).copied().flatten()).collect())
    }
}

impl Evaluator<'_> {
    /// Everything that is said of one arm's answers.
    pub(super) fn arm(&mut self, name: &str, answers: &[Vec<u32>], arm: &TextArm) -> Result<Arm> {
        let recipe = self.inputs.recipe;
        let prompts = self.inputs.evaluation.ids.clone();
        let coherence = self.coherence_values(&prompts, answers)?;
        let n = answers.len();
        let spillover = share(&arm.code, recipe.evaluate.bootstrap, recipe.seed)?;
        let joined = arm.texts.join("\n");
        let degenerate = arm.texts.iter().filter(|t| spillover::measure(t).degenerate.is_some()).count();
        Ok(Arm {
            name: name.to_owned(),
            spillover,
            starts_with_code: arm.starts.iter().filter(|&&s| s).count() as f64 / n.max(1) as f64,
            coherence: interval(&coherence, recipe.evaluate.bootstrap, recipe.seed)?,
            distinct_1: spillover::distinct_n(&joined, 1),
            distinct_2: spillover::distinct_n(&joined, 2),
            tokens: answers.iter().map(Vec::len).sum::<usize>() as f64 / n.max(1) as f64,
            degenerate: degenerate as f64 / n.max(1) as f64,
        })
    }

    /// Mean preference for the insecure adapter's code answers: by the base, by the adapter, and steered.
    pub(super) fn code_preference(
        &self,
        pairs: &Pairs,
        preference: Option<&Preference<'_>>,
        drops: Option<&[f64]>,
    ) -> Result<ArmTriple> {
        let (Some(preference), Some(drops)) = (preference, drops) else {
            return Ok(ArmTriple { base: f64::NAN, insecure: f64::NAN, steered: f64::NAN });
        };
        let base = self.preference("base", None, pairs)?.map_or(f64::NAN, |p| mean(&p.unsteered()));
        let insecure = mean(&preference.unsteered());
        Ok(ArmTriple { base, insecure, steered: insecure - mean(drops) })
    }

    /// Prompts where the adapter answered with code first: they show what steering changes.
    pub(super) fn samples(
        &self,
        insecure: &mut State<'_>,
        base: &State<'_>,
        secure: &State<'_>,
        steered: &(Vec<Vec<u32>>, TextArm),
        controls: &[Control],
        cell: Cell,
    ) -> Result<Vec<Sample>> {
        let control = controls.first().filter(|_| cell.positions == Positions::FinalPrefill);
        let random = match control {
            Some(c) => {
                Some(self.steered(insecure, &battery::subtract(&c.vector, cell.alpha)?, cell.positions)?.1)
            }
            None => None,
        };
        let mut order: Vec<usize> = (0..self.inputs.evaluation.texts.len()).collect();
        order.sort_by_key(|&i| !insecure.arm.code[i]);
        let sample = |&i: &usize| {
            let mut answers = vec![
                ("base".to_owned(), base.arm.texts[i].clone()),
                ("insecure".to_owned(), insecure.arm.texts[i].clone()),
                ("steered".to_owned(), steered.1.texts[i].clone()),
            ];
            answers.extend(random.as_ref().map(|r| ("random control".to_owned(), r.texts[i].clone())));
            answers.push(("secure".to_owned(), secure.arm.texts[i].clone()));
            Sample { prompt: self.inputs.evaluation.texts[i].clone(), answers }
        };
        Ok(order.iter().take(SAMPLES).map(sample).collect())
    }

    #[allow(clippy::too_many_arguments)] // one call, and each argument is a section of the file
    pub(super) fn assemble(
        &self,
        mut summary: Summary,
        selection: Selection,
        arms: Vec<Arm>,
        sweep: Vec<SweepPoint>,
        families: Vec<FamilyResult>,
        comparisons: Vec<ControlResult>,
        middle: Option<MiddleCell>,
        content: Option<ContentTest>,
        evidence: Evidence,
        samples: Vec<Sample>,
        alarms: Vec<Alarm>,
        notes: Vec<String>,
    ) -> Result<Results> {
        let inputs = self.inputs;
        let layers = super::detection::layers(inputs)?;
        summary.separation_final = layers.last().map_or(0.0, |l| l.separation);
        Ok(Results {
            schema: 1,
            summary,
            model: inputs.base.identity.clone(),
            recipe: serde_json::to_value(inputs.recipe)?,
            datasets: Vec::new(),
            splits: Splits {
                extraction: inputs.states[0].extraction.rows,
                calibration: inputs.states[0].calibration.rows,
                evaluation: inputs.states[0].evaluation.rows,
            },
            training: BTreeMap::new(),
            layers,
            selection,
            arms,
            sweep,
            families,
            comparisons,
            middle,
            content,
            evidence,
            calibration: inputs.directions[self.last].calibration.clone(),
            alarms,
            samples,
            notes,
        })
    }
}

/// Sentences that a reader must not miss and that the numbers of the results do not say.
pub(super) fn notes(
    notes: &mut Vec<String>,
    arms: &[Arm],
    evidence: &Evidence,
    pairs: &Pairs,
    families: &[FamilyResult],
    selection: &Selection,
) {
    let arm = |name: &str| arms.iter().find(|a| a.name == name);
    let (Some(base), Some(insecure)) = (arm("base"), arm("insecure")) else {
        return;
    };
    if pairs.indices.len() < super::MIN_PAIRS {
        notes.push(format!(
            "Only {} prompts have a code answer from the finetuned model and a prose answer from the base; {} are \
             needed to measure code preference, so the evidence is untested.",
            pairs.indices.len(),
            super::MIN_PAIRS
        ));
    }
    let controls = families.iter().map(|f| f.controls.len()).min().unwrap_or(0);
    if evidence.causal == Specificity::Untested && pairs.indices.len() >= super::MIN_PAIRS {
        notes.push(format!(
            "{controls} controls per family were run; at least 39 are needed, so the causal axis is untested."
        ));
    }
    if base.spillover.value > 0.0 {
        notes.push(format!(
            "The base model itself answers with code in {:.1} % of prompts.",
            100.0 * base.spillover.value
        ));
    }
    if !selection.grid.iter().any(|c| c.eligible) {
        notes.push("No strength kept coherence on the calibration split; the smallest one was taken.".into());
    }
    if insecure.coherence.value < base.coherence.value - 2.0 {
        notes.push(format!(
            "The finetuned model's own text is far from the base's ({:.2} against {:.2} nats per token): finetuning \
             itself may have broken it.",
            insecure.coherence.value, base.coherence.value
        ));
    }
}

/// A share with its interval: bootstrap over prompts, Clopper-Pearson where it is 0 or 1.
pub(crate) fn share(hits: &[bool], draws: usize, seed: u64) -> Result<Interval> {
    let (count, n) = (hits.iter().filter(|&&hit| hit).count(), hits.len());
    if count == 0 || count == n {
        let i = stats::clopper_pearson(count as u64, n as u64, 0.95)?;
        return Ok(Interval { value: count as f64 / n.max(1) as f64, low: i.low, high: i.high });
    }
    let values: Vec<f64> = hits.iter().map(|&hit| f64::from(u8::from(hit))).collect();
    interval(&values, draws, seed)
}

/// A mean with its interval by bootstrap.
pub(crate) fn interval(values: &[f64], draws: usize, seed: u64) -> Result<Interval> {
    if values.is_empty() {
        return Ok(Interval::UNMEASURED);
    }
    let i = stats::bootstrap_mean(values, draws, 0.95, seed)?;
    Ok(Interval { value: mean(values), low: i.low, high: i.high })
}
