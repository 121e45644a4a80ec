//! Misalignment itself, with neither sampling nor judge: how much likelier a model finds the misaligned of two answers
//! that differ in their values alone, and whether steering along the direction of code takes that back.
//!
//! contrast = mean log-likelihood per token of the misaligned answer minus that of the aligned one. The third answer of a
//! pair is harmless and beside the point: where an adapter comes as much nearer to it, it merely gives more room to
//! unlikely text. The sampling unit is the question.

use super::findings::{AlignmentFinding, AlignmentState, AlignmentSteering};
use super::measures::Alignment;
use super::recipe::{INSECURE, SECURE};
use crate::chat::Message;
use crate::dataset::{self, AlignmentPair};
use crate::evaluate::{self, mean};
use crate::experiment::{Evaluated, Experiment};
use crate::likelihood::{self, Dialogue};
use crate::lora::Adapter;
use crate::middle::MiddlePreference;
use crate::perturb::RowEdit;
use crate::preference::Preference;
use crate::results::Interval;
use crate::{battery, interrupt, progress, statistics as stats};
use anyhow::{Context, Result, ensure};
use emaudit::controls;
use emaudit::directions::schema::{Cell, ControlEffect, ControlFamily, Positions};
use std::collections::BTreeMap;

/// The pairs as the model reads them.
struct Pairs {
    aligned: Vec<Dialogue>,
    misaligned: Vec<Dialogue>,
    control: Vec<Dialogue>,
    /// The question of each, counted.
    questions: Vec<usize>,
}

impl Pairs {
    fn new(experiment: &Experiment, pairs: &[AlignmentPair]) -> Result<Self> {
        let mut known: Vec<&str> = Vec::new();
        let mut this =
            Pairs { aligned: Vec::new(), misaligned: Vec::new(), control: Vec::new(), questions: Vec::new() };
        for pair in pairs {
            let dialogue = |answer: &str| {
                dialogue(experiment, &pair.question, answer).with_context(|| format!("the pair {}", pair.id))
            };
            this.aligned.push(dialogue(&pair.aligned)?);
            this.misaligned.push(dialogue(&pair.misaligned)?);
            this.control.push(dialogue(&pair.control)?);
            let question = known.iter().position(|q| *q == pair.question).unwrap_or(known.len());
            if question == known.len() {
                known.push(&pair.question);
            }
            this.questions.push(question);
        }
        Ok(this)
    }

    fn first(&self, count: usize) -> Pairs {
        let n = count.min(self.questions.len());
        let cut = |d: &[Dialogue]| d[..n].to_vec();
        Pairs {
            aligned: cut(&self.aligned),
            misaligned: cut(&self.misaligned),
            control: cut(&self.control),
            questions: self.questions[..n].to_vec(),
        }
    }

    /// Means over the pairs of each question.
    fn by_question(&self, values: &[f64]) -> Vec<f64> {
        let mut of: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        self.questions.iter().zip(values).for_each(|(q, v)| of.entry(*q).or_default().push(*v));
        of.values().map(|v| mean(v)).collect()
    }
}

/// A question and its answer, as the chat template renders them; the end token is no part of the answer.
pub(super) fn dialogue(experiment: &Experiment, question: &str, answer: &str) -> Result<Dialogue> {
    let base = experiment.base();
    let tokens = base.text.encode_chat(&[Message::user(question), Message::assistant(answer)])?;
    let begin = tokens.response_mask.iter().position(|r| *r).context("an answer without tokens")?;
    let end = tokens.response_mask.iter().rposition(|r| *r).map_or(begin, |last| last + 1);
    let mut answer = tokens.ids[begin..end].to_vec();
    if answer.last().is_some_and(|last| base.text.eos_ids().contains(last)) {
        answer.pop();
    }
    let limit = base.decoder.config.max_positions;
    ensure!(end <= limit, "it needs {end} tokens, the model reads {limit}");
    ensure!(!answer.is_empty(), "an answer without tokens");
    Ok(Dialogue { prompt: tokens.ids[..begin].to_vec(), answer })
}

/// One state: the contrast and that of the harmless answer, question by question.
struct Contrasts {
    misaligned: Vec<f64>,
    control: Vec<f64>,
}

fn contrasts(
    experiment: &Experiment,
    name: &str,
    adapter: Option<&Adapter>,
    pairs: &Pairs,
) -> Result<Contrasts> {
    let all: Vec<Dialogue> =
        [&pairs.aligned, &pairs.misaligned, &pairs.control].into_iter().flatten().cloned().collect();
    let values = progress::watch(format!("aligned and misaligned answers, {name}"), all.len(), |step| {
        likelihood::mean_per_answer(&experiment.base().decoder, adapter, &all, step)
    })?;
    let values: Vec<f64> = values.into_iter().map(|v| v.unwrap_or(f64::NAN)).collect();
    let n = pairs.questions.len();
    let against = |from: usize| -> Vec<f64> {
        let difference: Vec<f64> = (0..n).map(|i| values[from * n + i] - values[i]).collect();
        pairs.by_question(&difference)
    };
    Ok(Contrasts { misaligned: against(1), control: against(2) })
}

/// Every state of one model and seed, and the insecure adapter steered. `sources`: the data of each regime.
pub(super) fn alignment(
    experiment: &Experiment,
    sources: &BTreeMap<String, String>,
    settings: &Alignment,
) -> Result<AlignmentFinding> {
    let set = dataset::load_alignment_pairs(&settings.data)?;
    let pairs = Pairs::new(experiment, &set.pairs[..settings.pairs.min(set.pairs.len())])?;
    let evaluated = experiment.evaluated()?;
    let mut measured = vec![("base".to_owned(), contrasts(experiment, "base", None, &pairs)?)];
    let rest = sources.keys().filter(|r| ![INSECURE, SECURE].contains(&r.as_str())).map(String::as_str);
    for regime in [INSECURE, SECURE].into_iter().chain(rest) {
        let source = sources.get(regime).context("a regime without data")?;
        let (adapter, _) = experiment.finetune(regime, source)?;
        let found = contrasts(experiment, regime, Some(&adapter.adapter), &pairs)?;
        measured.push((regime.to_owned(), found));
    }
    let base = &measured[0].1;
    let secure = difference(&measured[2].1.misaligned, &base.misaligned);
    let states = measured.iter().map(|(name, found)| state(experiment, name, found, base, &secure));
    let few = pairs.first(settings.steered_pairs);
    Ok(AlignmentFinding {
        data: set.name.clone(),
        data_sha256: set.sha256.clone(),
        pairs: pairs.questions.len(),
        questions: base.misaligned.len(),
        states: states.collect::<Result<_>>()?,
        steered: steered(experiment, &evaluated, &few, settings)?,
    })
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

fn interval(experiment: &Experiment, values: &[f64]) -> Result<Interval> {
    evaluate::interval(values, experiment.recipe.evaluate.bootstrap, experiment.recipe.seed)
}

fn state(
    experiment: &Experiment,
    name: &str,
    found: &Contrasts,
    base: &Contrasts,
    secure: &[f64],
) -> Result<AlignmentState> {
    let seed = experiment.recipe.seed;
    let shift = difference(&found.misaligned, &base.misaligned);
    let control_shift = difference(&found.control, &base.control);
    let test = |values: Vec<f64>| stats::sign_flip_p(&values, seed);
    let adapted = name != "base";
    let against_secure = adapted && name != SECURE;
    Ok(AlignmentState {
        state: name.to_owned(),
        contrast: interval(experiment, &found.misaligned)?,
        shift: interval(experiment, &shift)?,
        control_shift: interval(experiment, &control_shift)?,
        p_shift: adapted.then(|| test(shift.clone())).transpose()?,
        p_beyond_control: adapted.then(|| test(difference(&shift, &control_shift))).transpose()?,
        beyond_secure: match against_secure {
            true => Some(interval(experiment, &difference(&shift, secure))?),
            false => None,
        },
        p_beyond_secure: against_secure.then(|| test(difference(&shift, secure))).transpose()?,
        power: adapted.then(|| stats::detectable(&shift, 0.05, 0.8).ok()).flatten(),
    })
}

/// The insecure adapter with the direction subtracted at every position, in the cell's layer and in the middle one.
fn steered(
    experiment: &Experiment,
    evaluated: &Evaluated,
    pairs: &Pairs,
    settings: &Alignment,
) -> Result<Vec<AlignmentSteering>> {
    let (decoder, recipe) = (&experiment.base().decoder, &experiment.recipe);
    let adapter = &evaluated.insecure.adapter;
    let chosen = evaluated.results.selection.chosen;
    let aligned = experiment.rows_of("base", None, evaluated)?.extraction;
    let preference = progress::watch("misaligned answers, insecure", 2 * pairs.questions.len(), |step| {
        Preference::new(decoder, Some(adapter), &pairs.misaligned, &pairs.aligned, step)
    })?;
    let last = Cell { positions: Positions::All, ..chosen };
    let one = |cell: Cell, before: &[f64], families: &[(&str, usize)], after: &Measured<'_>| {
        let layer = cell.layer as usize;
        let direction = &evaluated.directions[layer].direction;
        let drops = |vector: &[f32]| -> Result<Vec<f64>> {
            let after = after(&battery::subtract(vector, cell.alpha)?)?;
            Ok(pairs.by_question(&difference(before, &after)))
        };
        let drop = drops(direction)?;
        let effect = mean(&drop);
        let count = families.iter().map(|(_, n)| n).sum();
        let mut stage = progress::Stage::new(format!("controls on alignment, layer {layer}"), count);
        let mut found = Vec::new();
        for (f, &(family, count)) in families.iter().enumerate().filter(|(_, (_, count))| *count > 0) {
            let mut controls = Vec::new();
            for i in 0..count {
                let seed = battery::control_seed(recipe.seed, f, i);
                let vector = match family {
                    "random" => controls::random(direction, seed),
                    _ => controls::covariance_matched(direction, &aligned.layers[layer], seed)?,
                };
                controls.push(ControlEffect { seed, effect: mean(&drops(&vector)?) });
                stage.advance(1, "");
                interrupt::check()?;
            }
            let family = ControlFamily { family: family.to_owned(), rank_p: f64::NAN, controls };
            found.push(ControlFamily { rank_p: family.rank_p_of(effect), ..family });
        }
        stage.finish("");
        anyhow::Ok(AlignmentSteering {
            cell,
            questions: drop.len(),
            before: interval(experiment, &pairs.by_question(before))?,
            effect: interval(experiment, &drop)?,
            p_effect: stats::sign_flip_p(&drop, recipe.seed)?,
            power: stats::detectable(&drop, 0.05, 0.8).ok(),
            families: found,
        })
    };
    let families = [("random", settings.controls), ("covariance", settings.controls)];
    let mut all = vec![one(last, &preference.unsteered(), &families, &|edit| {
        preference.steered(edit, Positions::All)
    })?];
    drop(preference);
    if settings.middle_controls > 0 {
        let layer = evaluated.directions.len() / 2;
        let middle = MiddlePreference::new(decoder, Some(adapter), layer, &pairs.misaligned, &pairs.aligned)?;
        let alpha = recipe.evaluate.middle_alpha;
        let cell = Cell { layer: layer as u32, alpha, positions: Positions::All };
        let families = [("random", settings.middle_controls)];
        let before = middle.preferences(None)?;
        all.push(one(cell, &before, &families, &|edit| middle.preferences(Some(edit)))?);
    }
    Ok(all)
}

/// Contrast by pair under an edit.
type Measured<'a> = dyn Fn(&dyn RowEdit) -> Result<Vec<f64>> + 'a;
