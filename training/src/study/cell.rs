//! The cell that an evaluation chose, with what is asked of any state of the model in it.

use crate::answers::{Answerer, TextArm};
use crate::evaluate::{self, States};
use crate::experiment::{Evaluated, Experiment, Finetuned};
use crate::generate::Sampling;
use crate::likelihood::Dialogue;
use crate::preference::Preference;
use crate::results::Interval;
use crate::{battery, calibrate, progress};
use anyhow::{Context, Result, ensure};
use emaudit::directions::schema::{Aggregation, Positions, Threshold};
use emaudit::{Probe, Steering};

/// Fewest prompts with a code answer and a prose answer before an effect means anything.
const MIN_PAIRS: usize = 8;

/// The chosen cell and what is asked of every regime in it.
pub(super) struct Cell<'a> {
    pub experiment: &'a Experiment,
    pub evaluated: &'a Evaluated,
    pub layer: usize,
    pub probe: Probe,
    pub threshold: Threshold,
    pub steering: Steering,
    sampling: Sampling,
    pub base: States,
    /// The base's answers.
    pub prose: Vec<Vec<u32>>,
}

impl<'a> Cell<'a> {
    pub fn new(experiment: &'a Experiment, evaluated: &'a Evaluated) -> Result<Self> {
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
        let [prose, _] = this.answers("base", None, &this.base, &this.steering)?;
        this.prose = prose;
        Ok(this)
    }

    /// Unsteered answers of one state to the evaluation prompts, and those under `steering`.
    pub fn answers(
        &self,
        name: &str,
        adapter: Option<&Finetuned>,
        rows: &States,
        steering: &Steering,
    ) -> Result<[Vec<Vec<u32>>; 2]> {
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
        let (plain, steered) = (answerer.first_tokens(None)?, answerer.first_tokens(Some(steering))?);
        answerer.prepare(&[plain.clone(), steered.clone()])?;
        Ok([answerer.answers(&plain), answerer.answers(&steered)])
    }

    /// Prompts where the adapter's answer `plain` is code and the base's is prose; too few of them are an error.
    pub fn code_pairs(&self, plain: &[Vec<u32>]) -> Result<Vec<usize>> {
        let (code, prose_code) = (self.code(plain)?, self.code(&self.prose)?);
        let usable =
            |&i: &usize| code[i] && !prose_code[i] && !plain[i].is_empty() && !self.prose[i].is_empty();
        let indices: Vec<usize> = (0..plain.len()).filter(usable).collect();
        ensure!(
            indices.len() >= MIN_PAIRS,
            "only {} prompts have a code answer of {}'s adapter and a prose answer of its base; {MIN_PAIRS} are needed to \
             measure an effect: train longer, or take more prompts",
            indices.len(),
            self.experiment.base().identity.name
        );
        Ok(indices)
    }

    /// The answers `own` and the base's to the prompts `indices`, for teacher forcing.
    pub fn forced(&self, own: &[Vec<u32>], indices: &[usize]) -> (Vec<Dialogue>, Vec<Dialogue>) {
        let prompts = &self.evaluated.prompts().ids;
        let dialogues = |answers: &[Vec<u32>]| -> Vec<Dialogue> {
            let one = |&i: &usize| Dialogue { prompt: prompts[i].clone(), answer: answers[i].clone() };
            indices.iter().map(one).collect()
        };
        (dialogues(own), dialogues(&self.prose))
    }

    /// The preference of an adapter for `own` answers over the base's, on the prompts `indices`.
    pub fn preference(
        &self,
        name: &str,
        adapter: &Finetuned,
        own: &[Vec<u32>],
        indices: &[usize],
    ) -> Result<Preference<'a>> {
        let (own, prose) = self.forced(own, indices);
        let decoder = &self.experiment.base().decoder;
        let preference = progress::watch(format!("preference, {name}"), 2 * own.len(), |step| {
            Preference::new(decoder, Some(&adapter.adapter), &own, &prose, step)
        })?;
        Ok(preference)
    }

    /// Which answers contain code.
    pub fn code(&self, answers: &[Vec<u32>]) -> Result<Vec<bool>> {
        Ok(TextArm::new(&self.experiment.base().text, answers)?.code)
    }

    /// A mean over prompts with its interval.
    pub fn interval(&self, values: &[f64]) -> Result<Interval> {
        let recipe = &self.experiment.recipe;
        evaluate::interval(values, recipe.evaluate.bootstrap, recipe.seed)
    }

    /// A share of prompts with its interval.
    pub fn share(&self, hits: &[bool]) -> Result<Interval> {
        let recipe = &self.experiment.recipe;
        evaluate::share(hits, recipe.evaluate.bootstrap, recipe.seed)
    }
}
