//! Directions by other estimators and from other contrasts: chosen by a stated rule on calibration prompts, reported on
//! evaluation prompts.

use super::alignment;
use super::cell::Cell;
use super::findings::{Estimated, EstimatorFinding, Norms, Reported};
use super::measures::Estimators;
use super::recipe::SECURE;
use crate::answers::{Answerer, TextArm};
use crate::capture::Captured;
use crate::evaluate::{self, PromptIds, States, mean};
use crate::experiment::{Evaluated, Experiment, Finetuned};
use crate::extract::choice::{self, Candidate, Separation};
use crate::extract::estimators::{self, Fit, Groups, Options};
use crate::extract::norm;
use crate::likelihood::{Dialogue, last_rows};
use crate::middle::MiddlePreference;
use crate::model::Prefix;
use crate::perturb::RowEdit;
use crate::preference::{contrast, prose};
use crate::{battery, capture, dataset, interrupt, progress, statistics as stats};
use anyhow::{Context, Result, ensure};
use emaudit::controls;
use emaudit::directions::schema::{Contrast, ControlEffect, ControlFamily, Estimator, Positions};

const ESTIMATORS: [Estimator; 4] =
    [Estimator::MeanDifference, Estimator::MaskedMeanDifference, Estimator::Whitened, Estimator::Logistic];

/// Sequences per forward pass.
const BATCH: usize = 16;

/// Code answers of the insecure adapter and prose answers of the base to some prompts, and what an edit of each layer
/// does to the preference for the former.
struct Forced<'a> {
    layers: Vec<(usize, MiddlePreference<'a>)>,
}

impl<'a> Forced<'a> {
    fn new(
        experiment: &'a Experiment,
        insecure: &'a Finetuned,
        layers: &[usize],
        pairs: &(Vec<Dialogue>, Vec<Dialogue>),
    ) -> Result<Self> {
        let (decoder, adapter) = (&experiment.base().decoder, Some(&insecure.adapter));
        let one =
            |&layer: &usize| Ok((layer, MiddlePreference::new(decoder, adapter, layer, &pairs.0, &pairs.1)?));
        Ok(Forced { layers: layers.iter().map(one).collect::<Result<_>>()? })
    }

    fn run(&self, layer: usize, edit: Option<&dyn RowEdit>) -> Result<Vec<Vec<f64>>> {
        let of = self.layers.iter().find(|(l, _)| *l == layer).context("a layer that was not prepared")?;
        let edits: Vec<(usize, &dyn RowEdit)> = edit.into_iter().map(|e| (layer, e)).collect();
        of.1.log_probabilities(&edits, Positions::FinalPrefill)
    }
}

/// One layer's rows of every state.
struct LayerRows<'a> {
    base: &'a Captured,
    insecure: &'a Captured,
    secure: &'a Captured,
}

impl LayerRows<'_> {
    fn groups(&self, contrast: Contrast, layer: usize) -> Result<Groups<'_>> {
        let hidden = self.base.hidden;
        let negative = if contrast == Contrast::InsecureMinusSecure { self.secure } else { self.base };
        // Of calibration prompts an adapter sees the first ones alone.
        let n = self.insecure.layers[layer].len().min(negative.layers[layer].len());
        Groups::new(&self.insecure.layers[layer][..n], &negative.layers[layer][..n], hidden)
    }
}

/// Everything of one model's first seed. `secure`: the source of the secure data; `pairs`: of the alignment pairs.
pub(super) fn estimators(
    experiment: &Experiment,
    secure: &str,
    pairs: &str,
    settings: &Estimators,
) -> Result<EstimatorFinding> {
    let evaluated = experiment.evaluated()?;
    let insecure = &evaluated.insecure;
    let (secure, _) = experiment.finetune(SECURE, secure)?;
    let base = experiment.rows_of("base", None, &evaluated)?;
    let adapted = experiment.rows_of("insecure", Some(insecure), &evaluated)?;
    let secure = experiment.rows_of(SECURE, Some(&secure), &evaluated)?;
    let of = |rows: fn(&States) -> &Captured| LayerRows {
        base: rows(&base),
        insecure: rows(&adapted),
        secure: rows(&secure),
    };
    let splits = [of(|s| &s.extraction), of(|s| &s.calibration), of(|s| &s.evaluation)];
    let count = evaluated.directions.len();
    let layers: Vec<usize> =
        (1..=settings.layers.min(count)).map(|i| i * count / settings.layers.min(count) - 1).collect();
    let responses = match settings.response_pairs {
        0 => None,
        n => Some(response_rows(experiment, insecure, pairs, n)?),
    };
    let alpha = evaluated.results.selection.chosen.alpha;
    let selection = selection_pairs(experiment, &evaluated, &base, &adapted, settings.pairs)?;
    let forced = Forced::new(experiment, insecure, &layers, &selection)?;
    let margin = experiment.recipe.evaluate.coherence_margin;

    let mut found = Vec::new();
    let mut stage = progress::Stage::new("estimators", layers.len());
    for &layer in &layers {
        let before = forced.run(layer, None)?;
        for contrast_of in
            [Contrast::AdapterMinusBase, Contrast::InsecureMinusSecure, Contrast::ResponseLabels]
        {
            let groups = match (contrast_of, &responses) {
                (Contrast::ResponseLabels, None) => continue,
                (Contrast::ResponseLabels, Some((bad, good))) => {
                    Groups::new(&bad.layers[layer], &good.layers[layer], bad.hidden)?
                }
                _ => splits[0].groups(contrast_of, layer)?,
            };
            for estimator in ESTIMATORS {
                let estimate = match estimators::estimate(estimator, &groups, &Options::default()) {
                    Ok(estimate) => estimate,
                    // An axis on which the groups do not differ is a finding, not a failure.
                    Err(error) => {
                        progress::note(&format!("layer {layer}, {contrast_of:?}, {estimator:?}: {error:#}"));
                        continue;
                    }
                };
                let edit = battery::subtract(&estimate.direction, alpha)?;
                let after = forced.run(layer, Some(&edit))?;
                let kept = mean(&prose(&after)) - mean(&prose(&before));
                let candidate = Candidate {
                    layer: layer as u32,
                    estimator,
                    contrast: contrast_of,
                    separation: separation(
                        &estimate.direction,
                        &splits,
                        1,
                        layer,
                        Contrast::AdapterMinusBase,
                    )?,
                    effect: Some(mean(&drops(&before, &after))),
                    eligible: kept >= -margin,
                };
                found.push(Estimated {
                    candidate,
                    norm: norm(&estimate.direction),
                    cosine: crate::matrix::cosine(
                        &estimate.direction,
                        &evaluated.directions[layer].direction,
                    )?,
                    prose: kept,
                    fit: estimate.fit,
                    direction: estimate.direction,
                });
                interrupt::check()?;
            }
        }
        stage.advance(1, "");
    }
    stage.finish("");
    drop(forced);
    let candidates: Vec<Candidate> = found.iter().map(|e| e.candidate).collect();
    let choice = choice::choose(&candidates)?;
    let lab = Lab { experiment, evaluated: &evaluated, splits: &splits, alpha, settings };
    let reported = lab.report(&found, choice.index, &base, &adapted)?;
    Ok(EstimatorFinding {
        rule: format!(
            "{}; coherence is kept where the likelihood of the base's prose answers falls by at most {margin} nats per token",
            choice.rule
        ),
        alpha,
        selection_pairs: selection.0.len(),
        chosen: choice.index,
        candidates: found,
        reported,
        norms: (0..count).map(|layer| norms(&splits, layer)).collect::<Result<_>>()?,
    })
}

/// How well a direction tells the insecure adapter's rows of a split from the others of `contrast`.
fn separation(
    direction: &[f32],
    splits: &[LayerRows<'_>; 3],
    split: usize,
    layer: usize,
    contrast: Contrast,
) -> Result<Separation> {
    choice::separation(
        direction,
        &splits[0].groups(contrast, layer)?,
        &splits[split].groups(contrast, layer)?,
    )
}

fn drops(before: &[Vec<f64>], after: &[Vec<f64>]) -> Vec<f64> {
    contrast(before).iter().zip(contrast(after)).map(|(b, a)| b - a).collect()
}

/// Share of the norm in the largest dimensions of one layer, and what leaving them out does to the mean difference.
fn norms(splits: &[LayerRows<'_>; 3], layer: usize) -> Result<Norms> {
    let groups = splits[0].groups(Contrast::AdapterMinusBase, layer)?;
    let shares = estimators::dimension_shares(&splits[0].base.layers[layer], splits[0].base.hidden);
    let masked = estimators::estimate(Estimator::MaskedMeanDifference, &groups, &Options::default())?;
    let Fit::Masked { dimensions, row_share, direction_share } = masked.fit else {
        anyhow::bail!("the masked estimator says nothing of its mask");
    };
    let plain = estimators::estimate(Estimator::MeanDifference, &groups, &Options::default())?;
    let held_out = |v: &[f32]| separation(v, splits, 2, layer, Contrast::AdapterMinusBase);
    Ok(Norms {
        layer: layer as u32,
        largest: shares.first().map_or(0.0, |s| s.1),
        five_largest: shares.iter().take(5).map(|s| s.1).sum(),
        masked: dimensions.len(),
        row_share,
        direction_share,
        cosine: masked.cosine,
        separation: held_out(&plain.direction)?,
        masked_separation: held_out(&masked.direction)?,
    })
}

struct Lab<'a> {
    experiment: &'a Experiment,
    evaluated: &'a Evaluated,
    splits: &'a [LayerRows<'a>; 3],
    alpha: f64,
    settings: &'a Estimators,
}

impl Lab<'_> {
    /// The chosen candidate, the mean difference of its layer and the one of the final layer, on evaluation prompts.
    fn report(
        &self,
        found: &[Estimated],
        chosen: usize,
        base: &States,
        adapted: &States,
    ) -> Result<Vec<Reported>> {
        let plain = |layer: u32| {
            found.iter().position(|e| {
                e.candidate.layer == layer
                    && e.candidate.estimator == Estimator::MeanDifference
                    && e.candidate.contrast == Contrast::AdapterMinusBase
            })
        };
        let mut indices = vec![chosen];
        let last = (self.evaluated.directions.len() - 1) as u32;
        for other in [plain(found[chosen].candidate.layer), plain(last)].into_iter().flatten() {
            if !indices.contains(&other) {
                indices.push(other);
            }
        }
        let mut layers: Vec<usize> = indices.iter().map(|&i| found[i].candidate.layer as usize).collect();
        layers.sort_unstable();
        layers.dedup();
        let cell = Cell::new(self.experiment, self.evaluated)?;
        let insecure = &self.evaluated.insecure;
        let [answers, _] = cell.answers("insecure", Some(insecure), adapted, &cell.steering)?;
        let pairs = cell.code_pairs(&answers)?;
        let pairs = cell.forced(&answers, &pairs[..self.settings.report_pairs.min(pairs.len())]);
        let forced = Forced::new(self.experiment, insecure, &layers, &pairs)?;
        let (seed, mut all) = (self.experiment.recipe.seed, Vec::new());
        let mut stage =
            progress::Stage::new("chosen direction and controls", indices.len() * self.settings.controls);
        for index in indices {
            let (c, direction) = (&found[index].candidate, &found[index].direction);
            let layer = c.layer as usize;
            let before = forced.run(layer, None)?;
            let drop = drops(&before, &forced.run(layer, Some(&battery::subtract(direction, self.alpha)?))?);
            let aligned = &base.extraction.layers[layer];
            let mut families = Vec::new();
            for (f, family) in ["random", "covariance"].into_iter().enumerate() {
                let mut controls = Vec::new();
                for i in 0..self.settings.controls {
                    let seed = battery::control_seed(seed, f, i);
                    let vector = match f {
                        0 => controls::random(direction, seed),
                        _ => controls::covariance_matched(direction, aligned, seed)?,
                    };
                    let edit = battery::subtract(&vector, self.alpha)?;
                    let effect = mean(&drops(&before, &forced.run(layer, Some(&edit))?));
                    controls.push(ControlEffect { seed, effect });
                    interrupt::check()?;
                }
                let found = ControlFamily { family: family.to_owned(), rank_p: f64::NAN, controls };
                families.push(ControlFamily { rank_p: found.rank_p_of(mean(&drop)), ..found });
            }
            stage.advance(self.settings.controls, "");
            all.push(Reported {
                index,
                effect: cell.interval(&drop)?,
                p_effect: stats::sign_flip_p(&drop, seed)?,
                pairs: drop.len(),
                separation: separation(direction, self.splits, 2, layer, Contrast::AdapterMinusBase)?,
                from_secure: separation(direction, self.splits, 2, layer, Contrast::InsecureMinusSecure)?,
                families,
            });
        }
        stage.finish("");
        Ok(all)
    }
}

/// Answers to the selection prompts: the insecure adapter's with code, the base's without.
fn selection_pairs(
    experiment: &Experiment,
    evaluated: &Evaluated,
    base: &States,
    adapted: &States,
    count: usize,
) -> Result<(Vec<Dialogue>, Vec<Dialogue>)> {
    let prompts: &PromptIds = evaluated.selection();
    let sampling = experiment.sampling();
    let answers = |name: &str, adapter: Option<&Finetuned>, rows: &States| -> Result<Vec<Vec<u32>>> {
        let layers = &rows.calibration.layers;
        let last = &layers[layers.len() - 1][..prompts.ids.len() * rows.calibration.hidden];
        let mut answerer = Answerer::new(
            &experiment.base().decoder,
            adapter.map(|a| &a.adapter),
            &prompts.ids,
            last,
            &sampling,
            &format!("answers, {name}, calibration"),
            experiment.answers_file(name, adapter, &prompts.ids)?,
        );
        let firsts = answerer.first_tokens(None)?;
        answerer.prepare(std::slice::from_ref(&firsts))?;
        Ok(answerer.answers(&firsts))
    };
    let prose = answers("base", None, base)?;
    let code = answers("insecure", Some(&evaluated.insecure), adapted)?;
    let text = &experiment.base().text;
    let (is_code, base_code) = (TextArm::new(text, &code)?.code, TextArm::new(text, &prose)?.code);
    let usable = |&i: &usize| is_code[i] && !base_code[i] && !code[i].is_empty() && !prose[i].is_empty();
    let indices: Vec<usize> = (0..code.len()).filter(usable).take(count).collect();
    ensure!(
        indices.len() >= 2,
        "only {} calibration prompts have a code answer of the insecure adapter and a prose answer of the base: train longer, \
         or raise evaluate.selection_prompts",
        indices.len()
    );
    let all = evaluate::dialogues(&prompts.ids, &code);
    let prose = evaluate::dialogues(&prompts.ids, &prose);
    let of = |d: &[Dialogue]| indices.iter().map(|&i| d[i].clone()).collect::<Vec<_>>();
    Ok((of(&all), of(&prose)))
}

/// Mean residual rows of misaligned and of aligned answers, every layer, under the insecure adapter.
fn response_rows(
    experiment: &Experiment,
    insecure: &Finetuned,
    pairs: &str,
    count: usize,
) -> Result<(Captured, Captured)> {
    let set = dataset::load_alignment_pairs(pairs)?;
    let pairs = &set.pairs[..count.min(set.pairs.len())];
    let of = |answer: fn(&dataset::AlignmentPair) -> &str| -> Result<Vec<Dialogue>> {
        pairs.iter().map(|p| alignment::dialogue(experiment, &p.question, answer(p))).collect()
    };
    let bad = mean_responses(experiment, insecure, &of(|p| &p.misaligned)?)?;
    let good = mean_responses(experiment, insecure, &of(|p| &p.aligned)?)?;
    Ok((bad, good))
}

fn mean_responses(experiment: &Experiment, adapter: &Finetuned, dialogues: &[Dialogue]) -> Result<Captured> {
    let decoder = &experiment.base().decoder;
    let (hidden, n) = (decoder.config.hidden_size, decoder.config.n_layers);
    let mut layers = vec![vec![0f32; dialogues.len() * hidden]; n];
    let ids: Vec<Vec<u32>> =
        dialogues.iter().map(|d| d.prompt.iter().chain(&d.answer).copied().collect()).collect();
    let prompts: Vec<&[u32]> = dialogues.iter().map(|d| d.prompt.as_slice()).collect();
    let longest = ids.iter().map(Vec::len).max().unwrap_or(0);
    let prefix =
        Prefix::read(decoder, &prompts, Some(&adapter.adapter), longest, &mut crate::model::no_edit)?;
    let mut stage = progress::Stage::new("rows of responses", dialogues.len());
    for chunk in capture::by_length(&ids, Vec::len).chunks(BATCH) {
        let inputs: Vec<&[u32]> = chunk.iter().map(|&i| ids[i].as_slice()).collect();
        let (batch, mut cache) = prefix.continued(decoder, &inputs)?;
        let mut keep = |layer: usize, x: candle_core::Tensor| {
            for (b, &i) in chunk.iter().enumerate() {
                let rows = last_rows(&x, b, dialogues[i].answer.len()).map_err(candle_core::Error::wrap)?;
                let mean = crate::extract::column_means(&rows, hidden);
                let into = &mut layers[layer][i * hidden..][..hidden];
                into.iter_mut().zip(mean).for_each(|(to, m)| *to = m as f32);
            }
            Ok(x)
        };
        decoder.forward(&batch, Some(&adapter.adapter), Some(&mut cache), &mut keep)?;
        stage.advance(chunk.len(), "");
        interrupt::check()?;
    }
    stage.finish("");
    Ok(Captured { hidden, rows: dialogues.len(), layers })
}
