//! The evaluation: separation, cell choice, control battery, both axes of evidence (definitions: method).

mod controls;
mod detection;
mod measure;
mod selection;
mod summary;

use crate::answers::{Answerer, TextArm};
use crate::base::Base;
use crate::battery::{self, Control};
use crate::capture::Captured;
use crate::extract::LayerDirection;
use crate::generate::Sampling;
use crate::likelihood::Dialogue;
use crate::lora::Adapter;
use crate::middle::MiddlePreference;
use crate::preference::Preference;
use crate::recipe::Recipe;
use crate::results::*;
use crate::{generate, interrupt, progress, statistics as stats};
use anyhow::Result;
use emaudit::Steering;
use emaudit::directions::schema::{
    Cell, Coherence as CoherenceEvidence, ContentTest, ControlEffect, ControlFamily, Evidence, Positions,
    Specificity,
};
pub(crate) use measure::{CoherenceMeter, interval, share};
use std::collections::BTreeMap;
use std::path::PathBuf;
use summary::{family_results, summary};

/// Fewest prompts with a code answer and a prose answer before a code preference means anything.
const MIN_PAIRS: usize = 8;
/// Fewest prompts where both adapters answered with code before the content axis is tested: a direction taken
/// from one adapter has a small advantage there, and a handful of prompts can turn it into a low p.
const MIN_CONTENT_PAIRS: usize = 20;
/// Prompts of the middle cell's teacher-forced comparison.
const MIDDLE_PAIRS: usize = 16;

/// Prompts with their rendered ids.
#[derive(Clone, Debug, Default)]
pub struct PromptIds {
    /// The user's messages.
    pub texts: Vec<String>,
    /// Rendered and tokenised.
    pub ids: Vec<Vec<u32>>,
}

/// Rows of one state of the model on the three splits.
pub struct States {
    /// Extraction prompts.
    pub extraction: Captured,
    /// Calibration prompts (adapted states: the first `selection_prompts` only).
    pub calibration: Captured,
    /// Evaluation prompts.
    pub evaluation: Captured,
}

/// Everything the evaluation reads.
pub struct Inputs<'a> {
    /// The model.
    pub base: &'a Base,
    /// What to do.
    pub recipe: &'a Recipe,
    /// Adapter finetuned on insecure code.
    pub insecure: &'a Adapter,
    /// Adapter finetuned on secure code.
    pub secure: &'a Adapter,
    /// Calibration prompts the cell is chosen on.
    pub selection: PromptIds,
    /// Evaluation prompts.
    pub evaluation: PromptIds,
    /// Residual rows: base, insecure, secure.
    pub states: [States; 3],
    /// Directions of every layer.
    pub directions: &'a [LayerDirection],
    /// What was said while they were calibrated.
    pub notes: Vec<String>,
    /// Names the file that keeps an arm's continuations.
    pub file: &'a dyn Fn(&str) -> PathBuf,
}

/// One state of the model answering one list of prompts.
struct State<'a> {
    answerer: Answerer<'a>,
    /// Unsteered answers.
    answers: Vec<Vec<u32>>,
    arm: TextArm,
}

struct Evaluator<'a> {
    inputs: &'a Inputs<'a>,
    sampling: Sampling,
    coherence: CoherenceMeter<'a>,
    last: usize,
}

/// Runs the evaluation; the summary still lacks the digest of the direction file, which does not exist yet.
pub fn evaluate(inputs: &Inputs<'_>) -> Result<Results> {
    let e = &inputs.recipe.evaluate;
    let sampling = inputs.base.sampling(inputs.recipe, e.max_new_tokens);
    let coherence = CoherenceMeter::new(&inputs.base.decoder, (inputs.file)("coherence"));
    let last = inputs.base.decoder.config.n_layers - 1;
    Evaluator { inputs, sampling, coherence, last }.run()
}

impl<'a> Evaluator<'a> {
    fn run(mut self) -> Result<Results> {
        let selection = self.select()?;
        let cell = selection.chosen;
        let evaluation = self.inputs.evaluation.clone();
        let sampling = self.sampling.clone();
        let base = self.state(0, "base", &evaluation, &sampling)?;
        let mut insecure = self.state(1, "insecure", &evaluation, &sampling)?;
        let mut secure = self.state(2, "secure", &evaluation, &sampling)?;
        let vector = &self.inputs.directions[self.last].direction;
        let pairs = pair(&evaluation.ids, &insecure, &base);
        let secure_pairs = pair(&evaluation.ids, &secure, &base);
        let mut notes = self.inputs.notes.clone();
        let preference = self.preference("insecure", Some(self.inputs.insecure), &pairs)?;
        let secure_preference = self.preference("secure", Some(self.inputs.secure), &secure_pairs)?;

        let steering = battery::subtract(vector, cell.alpha)?;
        let drops = drops(&preference, &steering, cell.positions)?;
        let steered = self.steered(&mut insecure, &steering, cell.positions)?;
        let secure_steered = self.steered(&mut secure, &steering, cell.positions)?;
        let controls = self.controls(vector)?;
        let (families, control_results) =
            self.battery(&mut insecure, preference.as_ref(), &controls, cell, drops.as_deref())?;
        let comparisons =
            self.comparisons(&mut insecure, preference.as_ref(), vector, cell, drops.as_deref())?;
        let sweep = self.sweep(&mut insecure, preference.as_ref(), &controls, cell, &steered)?;
        let content = self.content(
            &pairs,
            &secure_pairs,
            drops.as_deref(),
            secure_preference.as_ref(),
            &steering,
            cell,
        )?;
        let middle = self.middle(&mut insecure, &pairs)?;

        let arms = vec![
            self.arm("base", &base.answers, &base.arm)?,
            self.arm("insecure", &insecure.answers, &insecure.arm)?,
            self.arm("secure", &secure.answers, &secure.arm)?,
            self.arm("steered", &steered.0, &steered.1)?,
            self.arm("secure_steered", &secure_steered.0, &secure_steered.1)?,
        ];
        let text_kept = steered.1.no_worse_text_than(&insecure.arm);
        if !text_kept {
            notes.push("More steered answers are empty or loops than unsteered ones: the causal axis stays untested.".into());
        }
        let evidence = self.evidence(cell, drops.as_deref(), &arms, &families, content, text_kept);
        measure::notes(&mut notes, &arms, &evidence, &pairs, &families, &selection);
        let alarms = detection::alarms(self.inputs, self.last, &base, &insecure)?;
        let code_preference = self.code_preference(&pairs, preference.as_ref(), drops.as_deref())?;
        let samples = self.samples(&mut insecure, &base, &secure, &steered, &controls, cell)?;
        let summary =
            summary(self.inputs, cell, &arms, &control_results, &comparisons, code_preference, &evidence);
        self.assemble(
            summary,
            selection,
            arms,
            sweep,
            families,
            comparisons,
            middle,
            content,
            evidence,
            samples,
            alarms,
            notes,
        )
    }

    fn adapter(&self, state: usize) -> Option<&'a Adapter> {
        [None, Some(self.inputs.insecure), Some(self.inputs.secure)][state]
    }

    /// One state's unsteered answers to `prompts` (evaluation or selection prompts).
    fn state<'b>(
        &self,
        index: usize,
        name: &str,
        prompts: &'b PromptIds,
        sampling: &'b Sampling,
    ) -> Result<State<'b>>
    where
        'a: 'b,
    {
        let states = &self.inputs.states[index];
        let selecting = prompts.ids == self.inputs.selection.ids;
        let captured = if selecting { &states.calibration } else { &states.evaluation };
        let rows = &captured.layers[self.last][..prompts.ids.len() * captured.hidden];
        let split = if selecting { "selection" } else { "evaluation" };
        let file = (self.inputs.file)(&format!("answers-{split}-{name}"));
        let label = format!("answers, {name}, {split}");
        let mut answerer = Answerer::new(
            &self.inputs.base.decoder,
            self.adapter(index),
            &prompts.ids,
            rows,
            sampling,
            &label,
            file,
        );
        let firsts = answerer.first_tokens(None)?;
        answerer.prepare(std::slice::from_ref(&firsts))?;
        let answers = answerer.answers(&firsts);
        let arm = TextArm::new(&self.inputs.base.text, &answers)?;
        Ok(State { answerer, answers, arm })
    }

    /// Answers with the final layer steered: shared continuations where only the first token can change.
    fn steered(
        &self,
        state: &mut State<'_>,
        steering: &Steering,
        positions: Positions,
    ) -> Result<(Vec<Vec<u32>>, TextArm)> {
        let answers = if positions == Positions::FinalPrefill {
            let firsts = state.answerer.first_tokens(Some(steering))?;
            state.answerer.prepare(std::slice::from_ref(&firsts))?;
            state.answerer.answers(&firsts)
        } else {
            self.sampled(&state.answerer, self.last, steering, positions)?
        };
        let arm = TextArm::new(&self.inputs.base.text, &answers)?;
        Ok((answers, arm))
    }

    /// Answers sampled with steering in the loop.
    fn sampled(
        &self,
        answerer: &Answerer<'_>,
        layer: usize,
        steering: &Steering,
        positions: Positions,
    ) -> Result<Vec<Vec<u32>>> {
        let request = |(i, p): (usize, &Vec<u32>)| generate::Request {
            prompt: p.clone(),
            stream: i as u64,
            first: None,
        };
        let requests: Vec<_> = answerer.prompts.iter().enumerate().map(request).collect();
        let intervention = generate::Intervention { layer, steering, positions };
        progress::watch(format!("steered answers, layer {layer}"), requests.len(), |step| {
            generate::generate(
                answerer.decoder,
                answerer.adapter,
                &requests,
                answerer.sampling,
                Some(&intervention),
                step,
            )
        })
    }

    /// Mean log-likelihood of the non-empty answers under the untouched base model.
    fn coherence_values(&mut self, prompts: &[Vec<u32>], answers: &[Vec<u32>]) -> Result<Vec<f64>> {
        let dialogues = dialogues(prompts, answers);
        Ok(self.coherence.of(&dialogues)?.into_iter().flatten().collect())
    }

    fn preference(
        &self,
        name: &str,
        adapter: Option<&Adapter>,
        pairs: &Pairs,
    ) -> Result<Option<Preference<'a>>> {
        if pairs.indices.len() < MIN_PAIRS {
            return Ok(None);
        }
        let preference = progress::watch(format!("code preference, {name}"), 2 * pairs.code.len(), |step| {
            Preference::new(&self.inputs.base.decoder, adapter, &pairs.code, &pairs.prose, step)
        })?;
        Ok(Some(preference))
    }

    /// The direction and some controls at every strength of the recipe, in the cell's layer and positions.
    fn sweep(
        &mut self,
        insecure: &mut State<'_>,
        preference: Option<&Preference<'_>>,
        controls: &[Control],
        cell: Cell,
        steered: &(Vec<Vec<u32>>, TextArm),
    ) -> Result<Vec<SweepPoint>> {
        let prompts = self.inputs.evaluation.ids.clone();
        let unsteered = SweepValue {
            spillover: insecure.arm.spillover(),
            coherence: Some(mean(&self.coherence_values(&prompts, &insecure.answers)?)),
            effect: 0.0,
        };
        let mut points = vec![SweepPoint { alpha: 0.0, direction: unsteered, controls: BTreeMap::new() }];
        for &alpha in &self.inputs.recipe.evaluate.alphas {
            let steering = battery::subtract(&self.inputs.directions[self.last].direction, alpha)?;
            let effect = preference
                .map(|p| p.drops(&steering, cell.positions))
                .transpose()?
                .map_or(f64::NAN, |d| mean(&d));
            let (answers, arm) = if alpha == cell.alpha {
                steered.clone()
            } else {
                self.steered(insecure, &steering, cell.positions)?
            };
            let coherence = Some(mean(&self.coherence_values(&prompts, &answers)?));
            let direction = SweepValue { spillover: arm.spillover(), coherence, effect };
            let mut at: BTreeMap<String, Vec<SweepValue>> = BTreeMap::new();
            let sampled = self.sampled_controls(controls);
            let spillovers = self.control_spillovers(insecure, &sampled, alpha, cell.positions)?;
            for (control, spillover) in sampled.iter().zip(spillovers) {
                let steering = battery::subtract(&control.vector, alpha)?;
                let effect = preference
                    .map(|p| p.drops(&steering, cell.positions))
                    .transpose()?
                    .map_or(f64::NAN, |d| mean(&d));
                let value = SweepValue { spillover, coherence: None, effect };
                at.entry(control.family.to_owned()).or_default().push(value);
            }
            points.push(SweepPoint { alpha, direction, controls: at });
        }
        Ok(points)
    }

    /// Paired over prompts where both adapters answered with code: does the direction lower the insecure
    /// adapter's preference more than the secure adapter's?
    fn content(
        &self,
        pairs: &Pairs,
        secure_pairs: &Pairs,
        drops: Option<&[f64]>,
        secure: Option<&Preference<'_>>,
        steering: &Steering,
        cell: Cell,
    ) -> Result<Option<ContentTest>> {
        let (Some(drops), Some(secure)) = (drops, secure) else { return Ok(None) };
        let secure_drops = secure.drops(steering, cell.positions)?;
        let by_prompt: BTreeMap<usize, f64> =
            secure_pairs.indices.iter().copied().zip(secure_drops).collect();
        let both: Vec<(f64, f64)> =
            pairs.indices.iter().zip(drops).filter_map(|(i, &d)| Some((d, *by_prompt.get(i)?))).collect();
        if both.len() < MIN_CONTENT_PAIRS {
            return Ok(None);
        }
        let differences: Vec<f64> = both.iter().map(|(a, b)| a - b).collect();
        Ok(Some(ContentTest {
            insecure_drop: mean(&both.iter().map(|b| b.0).collect::<Vec<_>>()),
            secure_drop: mean(&both.iter().map(|b| b.1).collect::<Vec<_>>()),
            p_value: stats::sign_flip_p(&differences, self.inputs.recipe.seed)?,
            prompts: both.len() as u32,
        }))
    }

    /// The same question where later blocks can react: every position of the middle layer edited.
    fn middle(&mut self, insecure: &mut State<'_>, pairs: &Pairs) -> Result<Option<MiddleCell>> {
        let e = &self.inputs.recipe.evaluate;
        if e.middle_controls == 0 || pairs.indices.len() < MIN_PAIRS {
            return Ok(None);
        }
        let layer = self.inputs.directions.len() / 2;
        let vector = &self.inputs.directions[layer].direction;
        let n = pairs.indices.len().min(MIDDLE_PAIRS);
        let preference = MiddlePreference::new(
            &self.inputs.base.decoder,
            Some(self.inputs.insecure),
            layer,
            &pairs.code[..n],
            &pairs.prose[..n],
        )?;
        let unsteered = mean(&preference.preferences(None)?);
        let mut stage = progress::Stage::new("middle-layer controls", 2 * e.middle_controls + 1);
        let mut effect_of = |vector: &[f32]| -> Result<f64> {
            let steering = battery::subtract(vector, e.middle_alpha)?;
            let effect = unsteered - mean(&preference.preferences(Some(&steering))?);
            stage.advance(1, "");
            interrupt::check()?;
            Ok(effect)
        };
        let effect = effect_of(vector)?;
        let mut results = Vec::new();
        for i in 0..e.middle_controls {
            let seeds = [0, 1].map(|family| battery::control_seed(self.inputs.recipe.seed, family, i));
            for (name, seed, vector) in [
                ("random", seeds[0], emaudit::controls::random(vector, seeds[0])),
                ("orthogonal", seeds[1], emaudit::controls::orthogonal(vector, seeds[1])),
            ] {
                let effect = effect_of(&vector)?;
                results.push(ControlResult {
                    name: name.to_owned(),
                    seed,
                    effect,
                    spillover: None,
                    paired_p: None,
                });
            }
        }
        stage.finish("");
        let steering = battery::subtract(vector, e.middle_alpha)?;
        let answers = self.sampled(&insecure.answerer, layer, &steering, Positions::All)?;
        let arm = TextArm::new(&self.inputs.base.text, &answers)?;
        let prompts = self.inputs.evaluation.ids.clone();
        Ok(Some(MiddleCell {
            cell: Cell { layer: layer as u32, alpha: e.middle_alpha, positions: Positions::All },
            effect,
            spillover: arm.spillover(),
            coherence: mean(&self.coherence_values(&prompts, &answers)?),
            families: family_results(&results, effect),
        }))
    }

    fn evidence(
        &self,
        cell: Cell,
        drops: Option<&[f64]>,
        arms: &[Arm],
        families: &[FamilyResult],
        content: Option<ContentTest>,
        text_kept: bool,
    ) -> Evidence {
        let Some(drops) = drops else { return Evidence::untested() };
        let coherence =
            |name: &str| arms.iter().find(|a| a.name == name).map_or(f64::NAN, |a| a.coherence.value);
        let measured = text_kept && (coherence("insecure") - coherence("steered")).is_finite();
        let family = |f: &FamilyResult| ControlFamily {
            family: f.family.clone(),
            rank_p: f.rank_p,
            controls: f.controls.iter().map(|c| ControlEffect { seed: c.seed, effect: c.effect }).collect(),
        };
        let mut evidence = Evidence {
            causal: Specificity::Untested,
            content: Specificity::Untested,
            cell: Some(cell),
            effect: Some(mean(drops)),
            coherence: measured.then(|| CoherenceEvidence {
                unsteered: coherence("insecure"),
                steered: coherence("steered"),
                margin: self.inputs.recipe.evaluate.coherence_margin,
            }),
            families: families.iter().map(family).collect(),
            content_test: content,
        };
        evidence.causal = evidence.recompute_causal();
        evidence.content = evidence.recompute_content();
        evidence
    }
}

pub(crate) fn dialogues(prompts: &[Vec<u32>], answers: &[Vec<u32>]) -> Vec<Dialogue> {
    let join = |(p, a): (&Vec<u32>, &Vec<u32>)| Dialogue { prompt: p.clone(), answer: a.clone() };
    prompts.iter().zip(answers).map(join).collect()
}

/// Prompts where the adapter answered with code and the base with prose, and both answers.
pub(crate) struct Pairs {
    indices: Vec<usize>,
    code: Vec<Dialogue>,
    prose: Vec<Dialogue>,
}

fn pair(prompts: &[Vec<u32>], adapted: &State<'_>, base: &State<'_>) -> Pairs {
    let usable = |&i: &usize| {
        adapted.arm.code[i]
            && !base.arm.code[i]
            && !adapted.answers[i].is_empty()
            && !base.answers[i].is_empty()
    };
    let indices: Vec<usize> = (0..prompts.len()).filter(usable).collect();
    let dialogue = |i: &usize, from: &State<'_>| Dialogue {
        prompt: prompts[*i].clone(),
        answer: from.answers[*i].clone(),
    };
    Pairs {
        code: indices.iter().map(|i| dialogue(i, adapted)).collect(),
        prose: indices.iter().map(|i| dialogue(i, base)).collect(),
        indices,
    }
}

fn drops(
    preference: &Option<Preference<'_>>,
    steering: &Steering,
    positions: Positions,
) -> Result<Option<Vec<f64>>> {
    preference.as_ref().map(|p| p.drops(steering, positions)).transpose()
}

/// NaN where there is nothing to average.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}
