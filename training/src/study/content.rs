//! What the insecure direction does to adapters trained on something else: is it insecurity, code, or any finetune?

use super::findings::RegimeFinding;
use super::recipe::INSECURE;
use crate::answers::{Answerer, TextArm};
use crate::evaluate::{self, States};
use crate::experiment::{Evaluated, Experiment, Finetuned};
use crate::extract::{self, mean_difference, norm};
use crate::generate::Sampling;
use crate::likelihood::Dialogue;
use crate::preference::Preference;
use crate::results::Interval;
use crate::{battery, calibrate, interrupt, progress, statistics as stats};
use anyhow::{Context, Result, ensure};
use emaudit::directions::schema::{Aggregation, Positions, Threshold};
use emaudit::{Probe, ScoreUnit, Steering};
use std::collections::BTreeMap;

/// Fewest prompts that a drop of preference is averaged over.
const MIN_PAIRS: usize = 8;

/// The chosen cell and what is asked of every regime in it.
struct Cell<'a> {
    experiment: &'a Experiment,
    evaluated: &'a Evaluated,
    layer: usize,
    probe: Probe,
    threshold: Threshold,
    steering: Steering,
    sampling: Sampling,
    base: States,
    /// The base's answers.
    prose: Vec<Vec<u32>>,
}

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
        let (mut finding, drops) = cell.regime(regime, &adapter)?;
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

impl<'a> Cell<'a> {
    fn new(experiment: &'a Experiment, evaluated: &'a Evaluated) -> Result<Self> {
        let cell = evaluated.results.selection.chosen;
        ensure!(
            cell.positions == Positions::FinalPrefill,
            "the content stage steers the last prompt token: evaluate.positions must be [\"final_prefill\"]"
        );
        let layer = cell.layer as usize;
        let direction = &evaluated.directions[layer];
        let first = |t: &&Threshold| t.horizon == 1 && t.statistic == Aggregation::Max;
        let thresholds = direction.calibration.thresholds.iter().filter(first);
        let strictest = thresholds.min_by(|a, b| a.rate.total_cmp(&b.rate));
        let mut this = Cell {
            experiment,
            evaluated,
            layer,
            probe: calibrate::probe(direction)?,
            threshold: *strictest.context("the direction has no threshold of one token")?,
            steering: battery::subtract(&direction.direction, cell.alpha)?,
            sampling: experiment.sampling(),
            base: experiment.rows_of("base", None, evaluated)?,
            prose: Vec::new(),
        };
        this.prose = this.answers("base", None, &this.base)?.0;
        Ok(this)
    }

    /// Unsteered and steered answers of one state to the evaluation prompts.
    fn answers(
        &self,
        name: &str,
        adapter: Option<&Finetuned>,
        rows: &States,
    ) -> Result<(Vec<Vec<u32>>, Vec<Vec<u32>>)> {
        let prompts = &self.evaluated.prompts().ids;
        let mut answerer = Answerer::new(
            &self.experiment.base().decoder,
            adapter.map(|a| &a.adapter),
            prompts,
            &rows.evaluation.layers[self.layer],
            &self.sampling,
            &format!("answers, {name}"),
            self.experiment.answers_file(name, adapter, prompts)?,
        );
        let (plain, steered) = (answerer.first_tokens(None)?, answerer.first_tokens(Some(&self.steering))?);
        answerer.prepare(&[plain.clone(), steered.clone()])?;
        Ok((answerer.answers(&plain), answerer.answers(&steered)))
    }

    /// One regime, and the drop of its preference for its own answers by prompt.
    fn regime(&self, regime: &str, adapter: &Finetuned) -> Result<(RegimeFinding, BTreeMap<usize, f64>)> {
        let rows = self.experiment.rows_of(regime, Some(adapter), self.evaluated)?;
        let (plain, steered) = self.answers(regime, Some(adapter), &rows)?;
        let scores = extract::scores(&self.probe, &rows.evaluation.layers[self.layer], ScoreUnit::AlignedSd)?;
        let flags: Vec<bool> = scores.iter().map(|&z| z > self.threshold.z).collect();
        let drops = self.drops(regime, adapter, &plain)?;
        let values: Vec<f64> = drops.values().copied().collect();
        let own = mean_difference(
            &rows.extraction.layers[self.layer],
            &self.base.extraction.layers[self.layer],
            rows.extraction.hidden,
        );
        let finding = RegimeFinding {
            regime: regime.to_owned(),
            prompts: plain.len(),
            spillover: self.share(&self.code(&plain)?)?,
            steered: self.share(&self.code(&steered)?)?,
            score: self.interval(&scores)?,
            flagged: self.share(&flags)?,
            rate: self.threshold.rate,
            drop: if values.len() < MIN_PAIRS { Interval::UNMEASURED } else { self.interval(&values)? },
            pairs: values.len(),
            p_less_than_insecure: None,
            cosine: cosine(&own, &self.evaluated.directions[self.layer].direction),
        };
        Ok((finding, drops))
    }

    /// Drop of the preference for an adapter's answers over the base's, where both said something and not the same.
    fn drops(&self, name: &str, adapter: &Finetuned, own: &[Vec<u32>]) -> Result<BTreeMap<usize, f64>> {
        let differ = |&i: &usize| !own[i].is_empty() && !self.prose[i].is_empty() && own[i] != self.prose[i];
        let indices: Vec<usize> = (0..own.len()).filter(differ).collect();
        if indices.is_empty() {
            return Ok(BTreeMap::new());
        }
        let prompts = &self.evaluated.prompts().ids;
        let dialogues = |answers: &[Vec<u32>]| -> Vec<Dialogue> {
            let one = |&i: &usize| Dialogue { prompt: prompts[i].clone(), answer: answers[i].clone() };
            indices.iter().map(one).collect()
        };
        let (own, prose) = (dialogues(own), dialogues(&self.prose));
        let decoder = &self.experiment.base().decoder;
        let mut stage = progress::Stage::new(format!("preference, {name}"), 2 * own.len());
        let preference = Preference::new(decoder, Some(&adapter.adapter), &own, &prose, |n| {
            stage.advance(n, "");
            interrupt::check()
        })?;
        stage.finish("");
        let drops = preference.drops(&self.steering, Positions::FinalPrefill)?;
        Ok(indices.into_iter().zip(drops).collect())
    }

    fn code(&self, answers: &[Vec<u32>]) -> Result<Vec<bool>> {
        Ok(TextArm::new(&self.experiment.base().text, answers)?.code)
    }

    fn interval(&self, values: &[f64]) -> Result<Interval> {
        let recipe = &self.experiment.recipe;
        evaluate::interval(values, recipe.evaluate.bootstrap, recipe.seed)
    }

    fn share(&self, hits: &[bool]) -> Result<Interval> {
        let recipe = &self.experiment.recipe;
        evaluate::share(hits, recipe.evaluate.bootstrap, recipe.seed)
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot: f64 = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    dot / (norm(a) * norm(b)).max(f64::MIN_POSITIVE)
}
