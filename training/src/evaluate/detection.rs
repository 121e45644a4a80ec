//! Detection on held-out prompts: separation, effect size, alarms at the calibrated thresholds.

use super::{Inputs, State, States};
use crate::capture::Captured;
use crate::extract::choice::separation;
use crate::extract::estimators::Groups;
use crate::extract::{self, LayerDirection, norm, scores};
use crate::results::{Alarm, Histogram, LayerResult};
use crate::{calibrate, interrupt};
use anyhow::Result;
use emaudit::directions::schema::{Aggregation, Threshold};
use emaudit::{Probe, ScoreUnit};

const BINS: usize = 24;

/// Separation, AUROC and effect size at every layer, on the evaluation split.
pub(super) fn layers(inputs: &Inputs<'_>) -> Result<Vec<LayerResult>> {
    inputs.directions.iter().map(|d| layer(inputs, d)).collect()
}

fn layer(inputs: &Inputs<'_>, d: &LayerDirection) -> Result<LayerResult> {
    let [base, insecure, secure] = &inputs.states;
    let hidden = d.direction.len();
    let groups = |of: fn(&States) -> &Captured| {
        Groups::new(&of(insecure).layers[d.layer], &of(base).layers[d.layer], hidden)
    };
    let separation = separation(&d.direction, &groups(|s| &s.extraction)?, &groups(|s| &s.evaluation)?)?;
    let probe = Probe::from_vectors(&d.direction, &d.aligned_mean, d.calibration.sigma, None)?;
    let z = |rows: &[f32]| scores(&probe, rows, ScoreUnit::AlignedSd);
    let (z_base, z_insecure, z_secure) = (
        z(&base.evaluation.layers[d.layer])?,
        z(&insecure.evaluation.layers[d.layer])?,
        z(&secure.evaluation.layers[d.layer])?,
    );
    let rows = &base.extraction.layers[d.layer];
    let norms: Vec<f64> = rows.chunks(hidden).map(norm).collect();
    Ok(LayerResult {
        layer: d.layer as u32,
        separation: separation.balanced_accuracy,
        auroc: separation.auroc,
        cohens_d: separation.cohens_d,
        secure_mean_score: super::mean(&z_secure),
        direction_norm: norm(&d.direction),
        residual_norm: super::mean(&norms),
        top_dimension_share: extract::top_dimension_share(rows, hidden),
        histogram: histogram(&z_base, &z_insecure, &z_secure),
    })
}

fn histogram(base: &[f64], insecure: &[f64], secure: &[f64]) -> Histogram {
    let all = || base.iter().chain(insecure).chain(secure).copied();
    let (low, high) = (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
    let width = ((high - low) / BINS as f64).max(1e-9);
    let count = |values: &[f64]| {
        let mut bins = vec![0u32; BINS];
        for v in values {
            bins[(((v - low) / width) as usize).min(BINS - 1)] += 1;
        }
        bins
    };
    Histogram {
        edges: (0..=BINS).map(|i| low + width * i as f64).collect(),
        base: count(base),
        insecure: count(insecure),
        secure: count(secure),
    }
}

/// What each threshold of the running maximum flags on held-out sequences: of the base and of the insecure adapter.
pub(super) fn alarms(
    inputs: &Inputs<'_>,
    layer: usize,
    base: &State<'_>,
    insecure: &State<'_>,
) -> Result<Vec<Alarm>> {
    let d = &inputs.directions[layer];
    let max = |t: &&Threshold| t.statistic == Aggregation::Max;
    let thresholds: Vec<&Threshold> = d.calibration.thresholds.iter().filter(max).collect();
    let tokens = thresholds.iter().map(|t| t.horizon).max().unwrap_or(1) as usize;
    let probes = [(layer, calibrate::probe(d)?)];
    let scores = |state: &State<'_>| -> Result<Vec<Vec<f32>>> {
        let sequences = super::dialogues(&inputs.evaluation.ids, &state.answers);
        let (decoder, adapter) = (state.answerer.decoder, state.answerer.adapter);
        let mut of_layers =
            calibrate::token_scores(decoder, adapter, &sequences, tokens, &probes, |_| interrupt::check())?;
        Ok(of_layers.swap_remove(0))
    };
    let (calm, bent) = (scores(base)?, scores(insecure)?);
    let above = |sequences: &[Vec<f32>], t: &Threshold| {
        let seen: Vec<f64> =
            sequences.iter().filter_map(|s| calibrate::statistic(s, Aggregation::Max, t.horizon)).collect();
        (seen.iter().filter(|v| **v > t.z).count() as f64 / seen.len() as f64, seen.len())
    };
    let alarm = |t: &&Threshold| {
        let ((calm, calm_sequences), (insecure, insecure_sequences)) = (above(&calm, t), above(&bent, t));
        Alarm { horizon: t.horizon, rate: t.rate, calm, calm_sequences, insecure, insecure_sequences }
    };
    Ok(thresholds.iter().map(alarm).collect())
}
