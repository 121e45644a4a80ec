//! Carrying a direction from one model to another: a ridge map between their rows on the same prompts, what comes out at
//! the other end, and the controls it must beat.
//!
//! With `Xs` (`n x ds`) and `Xt` (`n x dt`) centred, `W = argmin |Xs W - Xt|^2 + lambda |W|^2`. From the thin
//! decomposition `Xs = U diag(s) V'`, `W = V diag(s/(s^2 + lambda)) U' Xt`; `W` itself is never formed, so a control
//! costs two thin products. With fewer rows than dimensions this is the dual form.

pub mod scores;
pub mod verdict;

use crate::battery::{Control, control_seed, rescaled};
use crate::extract::{column_means, norm};
use crate::matrix::{Svd, centred, check_rows, cosine, narrowed, times, transposed_times, widened};
use crate::{random, statistics as stats};
use anyhow::{Context, Result, ensure};
use emaudit::controls;
use faer::prelude::Solve;
use faer::{Mat, MatRef};
use serde::{Deserialize, Serialize};

/// Prompts that a map should be fitted on (method).
pub const WANTED_ROWS: usize = 500;

/// The four kinds of controls of a carried direction.
pub const FAMILIES: [&str; 4] = ["source_random", "source_orthogonal", "target_random", "shuffled_pairs"];

/// How lambda is chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Folds of the cross-validation.
    pub folds: usize,
    /// Lambdas tried, in units of the mean squared singular value of `Xs`, ascending.
    pub grid: Vec<f64>,
    /// Deals the prompts to the folds.
    pub seed: u64,
}

impl Default for Options {
    /// Five folds; half decades from 1e-4 to 1e4.
    fn default() -> Self {
        Options { folds: 5, grid: (-8..=8).map(|k| 10f64.powf(f64::from(k) / 2.0)).collect(), seed: 0 }
    }
}

/// What the cross-validation saw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CrossValidation {
    /// Lambda of the ridge objective and the share of the left-out rows' variance that its map explains, all
    /// dimensions together, against the mean of the rows kept; one pair per grid point.
    pub r2: Vec<(f64, f64)>,
    /// The lambda with the largest share; the larger one on a tie.
    pub lambda: f64,
    /// It lies at an end of the grid, so the best one may lie outside.
    pub at_edge: bool,
    /// Prompts.
    pub rows: usize,
}

impl CrossValidation {
    /// What must be said beside the map, if anything.
    pub fn note(&self) -> Option<String> {
        let mut said = Vec::new();
        if self.rows < WANTED_ROWS {
            said.push(format!("the map was fitted on {} prompts; {WANTED_ROWS} are wanted", self.rows));
        }
        if self.at_edge {
            said.push(format!("the best lambda, {:e}, lies at an end of the grid", self.lambda));
        }
        (!said.is_empty()).then(|| said.join("; "))
    }
}

/// Share of held-out variance that a map explains.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct R2 {
    /// All dimensions together: massive ones weigh most.
    pub weighted: f64,
    /// Median over the dimensions that vary.
    pub median: f64,
    /// Held-out prompts.
    pub rows: usize,
}

/// A ridge map from a source layer's rows to a target layer's.
pub struct RidgeMap {
    svd: Svd,
    /// Centred target rows.
    target: Mat<f64>,
    source_mean: Vec<f64>,
    target_mean: Vec<f64>,
    lambda: f64,
}

/// A direction at the other end of a map.
#[derive(Clone, Debug, PartialEq)]
pub struct Carried {
    /// At the norm of the native direction.
    pub vector: Vec<f32>,
    /// Norm of `W' v_s` before that.
    pub raw_norm: f64,
    /// Cosine with the native direction.
    pub cosine: f64,
}

/// Chooses lambda and fits, on the same prompts' rows of both models: `n x source_width` and `n x target_width`, one
/// prompt per row in the same order.
///
/// Errors: rows that do not match or are not finite, fewer than two rows a fold, a source that does not vary, a grid
/// that is not ascending and positive.
pub fn fit(
    source: &[f32],
    source_width: usize,
    target: &[f32],
    target_width: usize,
    options: &Options,
) -> Result<(RidgeMap, CrossValidation)> {
    ensure!(options.folds >= 2, "{} folds leave nothing out; at least 2 are needed", options.folds);
    let n = check_rows("source rows", source, source_width, 2 * options.folds)?;
    let ascending = options.grid.windows(2).all(|w| w[0] < w[1]);
    ensure!(
        !options.grid.is_empty() && ascending && options.grid.iter().all(|g| *g > 0.0 && g.is_finite()),
        "the grid of lambdas must hold positive numbers, ascending"
    );
    let mut folds = vec![0; n];
    for (i, row) in random::permutation(n, &[options.seed]).into_iter().enumerate() {
        folds[row] = i % options.folds;
    }
    let map = RidgeMap::new(source, source_width, target, target_width, 1.0)?;
    let unit = map.svd.s.iter().map(|s| s * s).sum::<f64>() / map.svd.s.len() as f64;
    let lambdas: Vec<f64> = options.grid.iter().map(|g| g * unit).collect();
    let shares = map.cross_validated(&lambdas, &folds);
    let best = (0..shares.len()).max_by(|&a, &b| shares[a].total_cmp(&shares[b])).context("an empty grid")?;
    let cross_validation = CrossValidation {
        r2: lambdas.iter().copied().zip(shares).collect(),
        lambda: lambdas[best],
        at_edge: best == 0 || best + 1 == lambdas.len(),
        rows: n,
    };
    Ok((RidgeMap { lambda: lambdas[best], ..map }, cross_validation))
}

impl RidgeMap {
    /// Fits with a given lambda.
    ///
    /// Errors: as [`fit`].
    pub fn new(
        source: &[f32],
        source_width: usize,
        target: &[f32],
        target_width: usize,
        lambda: f64,
    ) -> Result<Self> {
        let n = check_rows("source rows", source, source_width, 2)?;
        let found = check_rows("target rows", target, target_width, 2)?;
        ensure!(n == found, "{n} source rows and {found} target rows: both models must see the same prompts");
        ensure!(lambda > 0.0 && lambda.is_finite(), "lambda is {lambda}; it must be above 0");
        let source_mean = column_means(source, source_width);
        let target_mean = column_means(target, target_width);
        let svd = Svd::new(centred(source, &source_mean).as_ref())?;
        let target_rows = target;
        let target = centred(target_rows, &target_mean);
        // What rounding leaves of rows that are all alike.
        let dust = |rows: &[f32]| norm(rows) * n as f64 * f64::EPSILON;
        ensure!(svd.s[0] > dust(source), "the source rows are all alike: nothing can be mapped from them");
        ensure!(
            target.norm_l2() > dust(target_rows),
            "the target rows are all alike: there is nothing to predict"
        );
        Ok(RidgeMap { svd, target, source_mean, target_mean, lambda })
    }

    /// Lambda of the objective.
    pub fn lambda(&self) -> f64 {
        self.lambda
    }

    /// Held-out share explained, lambda by lambda, every fold left out once.
    ///
    /// Leaving a fold out needs no new fit: with the smoother `H` (intercept included), its residuals without the
    /// fold are `(I - H_gg)^-1 (Y - HY)_g`, exactly.
    fn cross_validated(&self, lambdas: &[f64], folds: &[usize]) -> Vec<f64> {
        let n = self.target.nrows();
        let count = folds.iter().max().map_or(0, |f| f + 1);
        let members: Vec<Vec<usize>> =
            (0..count).map(|fold| (0..n).filter(|&i| folds[i] == fold).collect()).collect();
        let total: f64 = members.iter().map(|rows| self.spread_without(rows)).sum();
        let projected = self.svd.u.transpose() * &self.target;
        let mut shares = Vec::with_capacity(lambdas.len());
        for &lambda in lambdas {
            let keep: Vec<f64> = self.svd.s.iter().map(|s| s * s / (s * s + lambda)).collect();
            let scaled =
                Mat::from_fn(projected.nrows(), projected.ncols(), |i, j| keep[i] * projected[(i, j)]);
            let residuals = &self.target - &self.svd.u * scaled;
            let left: f64 = members.iter().map(|rows| self.left_out(rows, &keep, residuals.as_ref())).sum();
            shares.push(1.0 - left / total);
        }
        shares
    }

    /// Squared distance of a fold's target rows from the mean of all others.
    fn spread_without(&self, rows: &[usize]) -> f64 {
        let (n, m) = (self.target.nrows() as f64, rows.len() as f64);
        let column = |column: faer::ColRef<'_, f64>| {
            // The columns sum to zero, so the others' mean follows from the fold's sum.
            let others = -rows.iter().map(|&i| column[i]).sum::<f64>() / (n - m);
            rows.iter().map(|&i| (column[i] - others).powi(2)).sum::<f64>()
        };
        self.target.col_iter().map(column).sum()
    }

    /// Squared residuals of a fold's rows under the map fitted without them.
    fn left_out(&self, rows: &[usize], keep: &[f64], residuals: MatRef<'_, f64>) -> f64 {
        let (n, m, r) = (self.target.nrows(), rows.len(), keep.len());
        let u = Mat::from_fn(m, r, |i, j| self.svd.u[(rows[i], j)]);
        let weighted = Mat::from_fn(m, r, |i, j| keep[j] * u[(i, j)]);
        let smoother = weighted * u.transpose();
        let system =
            Mat::from_fn(m, m, |i, j| f64::from(u8::from(i == j)) - smoother[(i, j)] - 1.0 / n as f64);
        let right = Mat::from_fn(m, residuals.ncols(), |i, j| residuals[(rows[i], j)]);
        let solved = system.partial_piv_lu().solve(&right);
        solved.col_iter().map(|c| c.iter().map(|x| x * x).sum::<f64>()).sum()
    }

    /// Share explained on prompts that took no part in the fit.
    ///
    /// Errors: rows that do not match, or target rows that do not vary.
    pub fn r2(&self, source: &[f32], target: &[f32]) -> Result<R2> {
        let n = check_rows("held-out source rows", source, self.source_mean.len(), 2)?;
        let found = check_rows("held-out target rows", target, self.target_mean.len(), 2)?;
        ensure!(n == found, "{n} source rows and {found} target rows are held out: prompts must match");
        let x = centred(source, &self.source_mean);
        let y = centred(target, &self.target_mean);
        let mut inner = &x * &self.svd.v;
        for (j, column) in inner.col_iter_mut().enumerate() {
            let factor = self.factor(j);
            column.iter_mut().for_each(|v| *v *= factor);
        }
        let predicted = inner * (self.svd.u.transpose() * &self.target);
        let (mut left, mut total, mut shares) = (0.0, 0.0, Vec::new());
        for (y, p) in y.col_iter().zip(predicted.col_iter()) {
            let mean = y.iter().sum::<f64>() / n as f64;
            let spread: f64 = y.iter().map(|v| (v - mean).powi(2)).sum();
            let error: f64 = y.iter().zip(p.iter()).map(|(y, p)| (y - p).powi(2)).sum();
            (left, total) = (left + error, total + spread);
            if spread > 0.0 {
                shares.push(1.0 - error / spread);
            }
        }
        ensure!(total > 0.0, "the held-out target rows are all alike: there is nothing to predict");
        Ok(R2 { weighted: 1.0 - left / total, median: stats::quantile(&shares, 0.5)?, rows: n })
    }

    /// `W' v_s` at the norm of `native`, the direction found in the target itself; alpha multiplies either alike.
    ///
    /// Errors: widths that do not fit; a direction that the map sends to zero.
    pub fn carry(&self, direction: &[f32], native: &[f32]) -> Result<Carried> {
        self.carried(direction, native, None)
    }

    fn carried(&self, direction: &[f32], native: &[f32], shuffle: Option<&[usize]>) -> Result<Carried> {
        let (ds, dt) = (self.source_mean.len(), self.target_mean.len());
        ensure!(
            direction.len() == ds && native.len() == dt,
            "a map from width {ds} to {dt} cannot carry a direction of {} beside a native one of {}",
            direction.len(),
            native.len()
        );
        let mut inner = transposed_times(self.svd.v.as_ref(), &widened(direction));
        inner.iter_mut().enumerate().for_each(|(j, x)| *x *= self.factor(j));
        let mut per_row = times(self.svd.u.as_ref(), &inner);
        if let Some(order) = shuffle {
            // Row i of the source now stands beside row order[i] of the target.
            let mut moved = vec![0.0; per_row.len()];
            order.iter().zip(&per_row).for_each(|(&to, &x)| moved[to] = x);
            per_row = moved;
        }
        let raw = narrowed(&transposed_times(self.target.as_ref(), &per_row));
        let raw_norm = norm(&raw);
        ensure!(raw_norm > 0.0 && raw_norm.is_finite(), "the map sends this direction to zero");
        Ok(Carried { vector: rescaled(&raw, native), raw_norm, cosine: cosine(&raw, native)? })
    }

    /// Singular value j of the source to that of the map.
    fn factor(&self, j: usize) -> f64 {
        let s = self.svd.s[j];
        s / (s * s + self.lambda)
    }

    /// `count` controls of each of [`FAMILIES`], at the norm of `native`: random and orthogonal to `direction` in the
    /// source, pushed through this map; random in the target; `direction` through a map fitted, with this lambda, on
    /// pairs of different prompts.
    pub fn controls(
        &self,
        direction: &[f32],
        native: &[f32],
        count: usize,
        seed: u64,
    ) -> Result<Vec<Control>> {
        let mut all = Vec::with_capacity(FAMILIES.len() * count);
        for i in 0..count {
            let seeds: [u64; 4] = std::array::from_fn(|family| control_seed(seed, family, i));
            let order = random::permutation(self.target.nrows(), &[seeds[3]]);
            let vectors = [
                self.carry(&controls::random(direction, seeds[0]), native)?.vector,
                self.carry(&controls::orthogonal(direction, seeds[1]), native)?.vector,
                controls::random(native, seeds[2]),
                self.carried(direction, native, Some(&order))?.vector,
            ];
            let drawn = FAMILIES.into_iter().zip(seeds).zip(vectors);
            all.extend(drawn.map(|((family, seed), vector)| Control { family, seed, vector }));
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests;
