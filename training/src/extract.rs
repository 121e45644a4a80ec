//! Directions and their calibration, layer by layer: the difference of means here, the other estimators in
//! [`estimators`], the choice among them in [`choice`].

pub mod choice;
pub mod estimators;
pub(crate) mod logistic;
mod whitened;

use crate::calibrate;
use crate::capture::Captured;
use anyhow::{Context, Result, ensure};
use emaudit::directions::schema::Calibration;
use emaudit::{Probe, Rows, ScoreUnit};

/// One layer's direction with what it was measured on.
#[derive(Clone, Debug)]
pub struct LayerDirection {
    /// 0-based block.
    pub layer: usize,
    /// Raw difference of means, not normalised.
    pub direction: Vec<f32>,
    /// Mean aligned (base) row of the extraction split.
    pub aligned_mean: Vec<f32>,
    /// Distribution of aligned scores on the calibration split.
    pub calibration: Calibration,
}

/// Column means of `rows x hidden` values, summed in f64.
pub fn column_means(rows: &[f32], hidden: usize) -> Vec<f64> {
    let mut mean = vec![0f64; hidden];
    for row in rows.chunks(hidden) {
        mean.iter_mut().zip(row).for_each(|(m, &v)| *m += v as f64);
    }
    let n = (rows.len() / hidden).max(1) as f64;
    mean.iter_mut().for_each(|m| *m /= n);
    mean
}

/// mean(adapted) - mean(base), raw (method: difference in means).
pub fn mean_difference(adapted: &[f32], base: &[f32], hidden: usize) -> Vec<f32> {
    let (a, b) = (column_means(adapted, hidden), column_means(base, hidden));
    a.iter().zip(&b).map(|(a, b)| (a - b) as f32).collect()
}

/// Euclidean norm in f64.
pub fn norm(v: &[f32]) -> f64 {
    v.iter().map(|&x| x as f64 * x as f64).sum::<f64>().sqrt()
}

/// Largest share of the mean squared norm that one dimension holds (massive activations).
pub fn top_dimension_share(rows: &[f32], hidden: usize) -> f64 {
    estimators::dimension_shares(rows, hidden).first().map_or(0.0, |(_, share)| *share)
}

/// Directions of every layer from the extraction split, calibrated on the calibration split.
pub fn directions(
    adapted: &Captured,
    base: &Captured,
    calm: &Captured,
    rates: &[f64],
) -> Result<Vec<LayerDirection>> {
    let hidden = base.hidden;
    let mut out = Vec::with_capacity(base.layers.len());
    for layer in 0..base.layers.len() {
        let direction = mean_difference(&adapted.layers[layer], &base.layers[layer], hidden);
        ensure!(
            norm(&direction) > 0.0,
            "the adapter changes nothing at layer {layer}: it is inactive, so there is no direction to extract"
        );
        out.push(calibrated(layer, direction, &base.layers[layer], &calm.layers[layer], rates)?);
    }
    Ok(out)
}

/// A direction of any estimator, calibrated at horizon 1. `aligned`: base rows of the extraction split, `calm`: of the
/// calibration split, `n x hidden` each.
pub fn calibrated(
    layer: usize,
    direction: Vec<f32>,
    aligned: &[f32],
    calm: &[f32],
    rates: &[f64],
) -> Result<LayerDirection> {
    let aligned_mean: Vec<f32> = column_means(aligned, direction.len()).iter().map(|&m| m as f32).collect();
    let calibration = calibrate::first_token(&direction, &aligned_mean, calm, rates)
        .with_context(|| format!("calibrating layer {layer}"))?;
    Ok(LayerDirection { layer, direction, aligned_mean, calibration })
}

/// Scores of rows in the given unit, computed by the library that will serve them.
pub fn scores(probe: &Probe, rows: &[f32], unit: ScoreUnit) -> Result<Vec<f64>> {
    let width = probe.width();
    let mut out = vec![0f32; rows.len() / width];
    probe.score(&Rows::new(rows, out.len(), width, width)?, unit, &mut out, None)?;
    Ok(out.iter().map(|&s| s as f64).collect())
}

#[cfg(test)]
mod tests;
