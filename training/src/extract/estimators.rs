//! The other estimators of a direction between two groups of rows: masked, whitened, logistic.
//!
//! Every estimator yields an axis `u`, and the direction is `v = (delta.u) u` with `delta` the difference of the group
//! means (positive minus negative). So alpha means the same for all of them: the share of the gap between the group
//! means along `u` that subtracting `alpha v` takes away. The mean difference is the case `u = delta/|delta|`.
//! At one alpha the perturbations therefore differ in size (`|v| = |delta| cosine`); `battery::rescaled` makes two
//! directions alike in size where that is the question.

use super::logistic;
use super::whitened::{self, Standardised};
use super::{column_means, norm};
use crate::capture::Captured;
use crate::matrix::{check_rows, cosine, dot, narrowed};
use anyhow::{Context, Result, ensure};
use emaudit::directions::schema::Estimator;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Two groups of rows of one layer, `n x hidden` each, in activation units; checked once.
///
/// Adapter minus base, insecure minus secure and misaligned minus aligned responses differ in what is put here.
#[derive(Clone, Copy, Debug)]
pub struct Groups<'a> {
    pub(super) positive: &'a [f32],
    pub(super) negative: &'a [f32],
    pub(super) hidden: usize,
}

impl<'a> Groups<'a> {
    /// `positive`: the group the direction points to (misaligned, adapted); `negative`: the one it comes from.
    ///
    /// Errors: fewer than two rows in a group, rows that are not of width `hidden`, a value that is not finite.
    pub fn new(positive: &'a [f32], negative: &'a [f32], hidden: usize) -> Result<Self> {
        check_rows("positive group", positive, hidden, 2)?;
        check_rows("negative group", negative, hidden, 2)?;
        Ok(Groups { positive, negative, hidden })
    }

    /// Positive rows, negative rows, width.
    pub fn parts(&self) -> (&'a [f32], &'a [f32], usize) {
        (self.positive, self.negative, self.hidden)
    }

    /// Difference of the group means, in f64.
    pub fn difference(&self) -> Vec<f64> {
        let (p, n) = (column_means(self.positive, self.hidden), column_means(self.negative, self.hidden));
        p.iter().zip(&n).map(|(p, n)| p - n).collect()
    }
}

/// Splits one model's response rows (`n x hidden`) by label: misaligned responses first, then aligned ones.
///
/// Errors: as many labels as rows are needed, and two rows of each label.
pub fn by_label(rows: &[f32], misaligned: &[bool], hidden: usize) -> Result<(Vec<f32>, Vec<f32>)> {
    let n = check_rows("response rows", rows, hidden, 1)?;
    ensure!(misaligned.len() == n, "{} labels for {n} response rows", misaligned.len());
    let count = misaligned.iter().filter(|&&m| m).count();
    ensure!(
        count >= 2 && n - count >= 2,
        "{count} misaligned and {} aligned responses: two of each are needed for a response-labelled direction",
        n - count
    );
    let of = |label: bool| {
        let rows = rows.chunks(hidden).zip(misaligned).filter(|(_, m)| **m == label);
        rows.flat_map(|(row, _)| row.iter().copied()).collect()
    };
    Ok((of(true), of(false)))
}

/// What the estimators leave to the recipe.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Dimensions the masked estimator leaves out: those with the largest mean square. `None`: one in a hundred, at
    /// least one.
    pub masked: Option<usize>,
    /// L2 penalty of the logistic probe, on standardised dimensions (scikit-learn's 1/C).
    pub penalty: f64,
}

impl Default for Options {
    fn default() -> Self {
        Options { masked: None, penalty: 1.0 }
    }
}

/// What an estimator found beside its direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "estimator", rename_all = "snake_case")]
pub enum Fit {
    /// Nothing is estimated but two means.
    MeanDifference,
    /// Top-norm dimensions set to zero.
    Masked {
        /// Those left out, largest first.
        dimensions: Vec<usize>,
        /// Their share of the mean squared norm of all rows.
        row_share: f64,
        /// Their share of the squared norm of the mean difference.
        direction_share: f64,
    },
    /// `S^-1 delta` with `S` the pooled within-group covariance, shrunk.
    Whitened {
        /// Ledoit-Wolf intensity, in [0, 1].
        shrinkage: f64,
    },
    /// Normal of an L2-penalised logistic regression.
    Logistic {
        /// The penalty.
        penalty: f64,
        /// Newton steps.
        steps: usize,
        /// Mean logistic loss at the optimum, nats per row, without the penalty.
        loss: f64,
    },
}

/// A direction with its size and what is known of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// `hidden` values in activation units, raw: alpha 1 closes the gap between the group means along it.
    pub direction: Vec<f32>,
    /// Cosine with the difference of means.
    pub cosine: f64,
    /// The rest.
    pub fit: Fit,
}

/// One estimator on one layer's groups.
///
/// Errors: an estimator that is none (`unstated`), groups with equal means, options out of range, an axis along which
/// the group means do not differ in the order of the labels.
pub fn estimate(estimator: Estimator, groups: &Groups<'_>, options: &Options) -> Result<Estimate> {
    let delta = groups.difference();
    ensure!(
        dot(&delta, &delta) > 0.0,
        "both groups have the same mean: the adapter is inactive, or the same rows were given twice"
    );
    let (axis, fit) = match estimator {
        Estimator::MeanDifference => (delta.clone(), Fit::MeanDifference),
        Estimator::MaskedMeanDifference => masked(groups, &delta, options.masked)?,
        Estimator::Whitened => {
            let (axis, shrinkage) = whitened::axis(&Standardised::new(groups)?, &delta)?;
            (axis, Fit::Whitened { shrinkage })
        }
        Estimator::Logistic => {
            let found = logistic::axis(&Standardised::new(groups)?, groups, options.penalty)?;
            let (penalty, steps, loss) = (options.penalty, found.steps, found.loss);
            (found.axis, Fit::Logistic { penalty, steps, loss })
        }
        Estimator::Unstated => anyhow::bail!("`unstated` names no estimator; choose one"),
    };
    let gap = dot(&delta, &axis) / dot(&axis, &axis);
    ensure!(
        gap.is_finite() && gap > 0.0,
        "along the {estimator:?} axis the group means do not differ in the order of their labels, so it has no raw length"
    );
    let direction = narrowed(&axis.iter().map(|a| gap * a).collect::<Vec<_>>());
    ensure!(norm(&direction) > 0.0, "the {estimator:?} direction vanishes in f32");
    let cosine = cosine(&direction, &narrowed(&delta))?;
    Ok(Estimate { direction, cosine, fit })
}

/// One estimator on every layer; the groups' layers, widths and split must match.
pub fn every_layer(
    estimator: Estimator,
    positive: &Captured,
    negative: &Captured,
    options: &Options,
) -> Result<Vec<Estimate>> {
    ensure!(
        positive.hidden == negative.hidden && positive.layers.len() == negative.layers.len(),
        "rows of {} layers of width {} against {} layers of width {}: they come from different models",
        positive.layers.len(),
        positive.hidden,
        negative.layers.len(),
        negative.hidden
    );
    let one = |layer: usize| {
        let groups = Groups::new(&positive.layers[layer], &negative.layers[layer], positive.hidden);
        groups.and_then(|g| estimate(estimator, &g, options)).with_context(|| format!("layer {layer}"))
    };
    (0..positive.layers.len()).into_par_iter().map(one).collect()
}

/// Every dimension with its share of the mean squared norm of `rows` (`n x hidden`), largest first.
pub fn dimension_shares(rows: &[f32], hidden: usize) -> Vec<(usize, f64)> {
    let mut shares: Vec<(usize, f64)> = (0..hidden).map(|j| (j, 0.0)).collect();
    for row in rows.chunks(hidden) {
        shares.iter_mut().zip(row).for_each(|(s, &v)| s.1 += f64::from(v).powi(2));
    }
    let all = shares.iter().map(|s| s.1).sum::<f64>().max(f64::MIN_POSITIVE);
    shares.iter_mut().for_each(|s| s.1 /= all);
    shares.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    shares
}

fn masked(groups: &Groups<'_>, delta: &[f64], asked: Option<usize>) -> Result<(Vec<f64>, Fit)> {
    let count = asked.unwrap_or(groups.hidden.div_ceil(100));
    ensure!(
        (1..groups.hidden).contains(&count),
        "{count} of {} dimensions cannot be masked: leave out at least one and keep at least one",
        groups.hidden
    );
    let rows = [groups.positive, groups.negative].concat();
    let left_out = &dimension_shares(&rows, groups.hidden)[..count];
    let mut axis = delta.to_vec();
    left_out.iter().for_each(|(j, _)| axis[*j] = 0.0);
    let (kept, all) = (dot(&axis, &axis), dot(delta, delta));
    ensure!(kept > 0.0, "the group means differ in the {count} masked dimensions only: mask fewer");
    let fit = Fit::Masked {
        dimensions: left_out.iter().map(|(j, _)| *j).collect(),
        row_share: left_out.iter().map(|(_, share)| share).sum(),
        direction_share: 1.0 - kept / all,
    };
    Ok((axis, fit))
}
