//! A logistic probe: L2-penalised logistic regression by Newton's method in f64.

use super::column_means;
use super::estimators::Groups;
use super::whitened::Standardised;
use crate::matrix::{Svd, dot, times, transposed_times};
use anyhow::{Result, anyhow, ensure};
use faer::prelude::Solve;
use faer::{Mat, MatRef, Side};

/// Newton steps before giving up; with a penalty a dozen suffice.
const MAX_STEPS: usize = 100;
const MAX_HALVINGS: usize = 40;

/// The fitted probe.
pub(super) struct Probe {
    /// Its normal in raw dimensions.
    pub axis: Vec<f64>,
    pub steps: usize,
    /// Mean loss per row, nats, without the penalty.
    pub loss: f64,
}

/// Fits `sum log(1 + exp(-+(x.w + b))) + penalty/2 |w|^2` on dimensions in units of `standardised.scale`; the
/// intercept is not penalised.
///
/// The optimum lies in the span of the rows, so Newton's system has one unknown per row or per dimension, whichever is
/// fewer.
pub(super) fn axis(standardised: &Standardised, groups: &Groups<'_>, penalty: f64) -> Result<Probe> {
    ensure!(penalty > 0.0 && penalty.is_finite(), "the logistic penalty is {penalty}; it must be above 0");
    let hidden = groups.hidden;
    let rows = [groups.positive, groups.negative].concat();
    let mean = column_means(&rows, hidden);
    let x = Mat::from_fn(rows.len() / hidden, hidden, |i, j| {
        (f64::from(rows[i * hidden + j]) - mean[j]) / standardised.scale[j]
    });
    let svd = Svd::new(x.as_ref())?;
    let z = Mat::from_fn(x.nrows(), svd.s.len(), |i, j| svd.u[(i, j)] * svd.s[j]);
    let positive = groups.positive.len() / hidden;
    let labels: Vec<f64> = (0..x.nrows()).map(|i| if i < positive { 1.0 } else { 0.0 }).collect();
    let fitted = fit(z.as_ref(), &labels, penalty)?;
    let mut axis = times(svd.v.as_ref(), &fitted.weights);
    axis.iter_mut().zip(&standardised.scale).for_each(|(a, s)| *a /= s);
    Ok(Probe { axis, steps: fitted.steps, loss: fitted.loss })
}

/// Weights, intercept, and how they were found.
pub(crate) struct Fitted {
    pub weights: Vec<f64>,
    pub intercept: f64,
    pub steps: usize,
    pub loss: f64,
}

/// Newton's method with step halving; `labels` are 0 or 1 and both must occur.
pub(crate) fn fit(x: MatRef<'_, f64>, labels: &[f64], penalty: f64) -> Result<Fitted> {
    let (n, r) = (x.nrows(), x.ncols());
    let ones = labels.iter().filter(|&&y| y == 1.0).count();
    ensure!(0 < ones && ones < n, "all {n} labels are alike: there is nothing to tell apart");
    let mut weights = vec![0.0; r];
    let mut intercept = (ones as f64 / (n - ones) as f64).ln();
    let objective = |w: &[f64], b: f64| loss(x, labels, w, b) + 0.5 * penalty * dot(w, w);
    let mut value = objective(&weights, intercept);
    for steps in 1..=MAX_STEPS {
        let (step, decrement) = newton_step(x, labels, &weights, intercept, penalty)?;
        let mut size = 1.0;
        let mut moved = (weights.clone(), intercept, value);
        for _ in 0..MAX_HALVINGS {
            let w: Vec<f64> = weights.iter().zip(&step).map(|(w, s)| w - size * s).collect();
            let b = intercept - size * step[r];
            let reached = objective(&w, b);
            if reached <= value {
                moved = (w, b, reached);
                break;
            }
            size /= 2.0;
        }
        (weights, intercept, value) = moved;
        // Newton converges quadratically: after this step the error is of the order of the rounding.
        if decrement <= 1e-14 * (1.0 + value) {
            let loss = loss(x, labels, &weights, intercept) / n as f64;
            return Ok(Fitted { weights, intercept, steps, loss });
        }
    }
    Err(anyhow!(
        "the logistic probe did not converge in {MAX_STEPS} Newton steps; raise the penalty ({penalty})"
    ))
}

fn loss(x: MatRef<'_, f64>, labels: &[f64], weights: &[f64], intercept: f64) -> f64 {
    let margins = times(x, weights);
    // log(1 + e^-m) without overflow, m positive where the label is right.
    let one = |(margin, label): (&f64, &f64)| {
        let m = (margin + intercept) * (2.0 * label - 1.0);
        (-m.abs()).exp().ln_1p() + (-m).max(0.0)
    };
    margins.iter().zip(labels).map(one).sum()
}

/// `H^-1 g`, the intercept last, and `g' H^-1 g`.
fn newton_step(
    x: MatRef<'_, f64>,
    labels: &[f64],
    weights: &[f64],
    intercept: f64,
    penalty: f64,
) -> Result<(Vec<f64>, f64)> {
    let (n, r) = (x.nrows(), x.ncols());
    let p: Vec<f64> = times(x, weights).iter().map(|m| 1.0 / (1.0 + (-(m + intercept)).exp())).collect();
    let errors: Vec<f64> = p.iter().zip(labels).map(|(p, y)| p - y).collect();
    let mut gradient = transposed_times(x, &errors);
    gradient.iter_mut().zip(weights).for_each(|(g, w)| *g += penalty * w);
    gradient.push(errors.iter().sum());
    let root: Vec<f64> = p.iter().map(|p| (p * (1.0 - p)).sqrt()).collect();
    let weighted = Mat::from_fn(n, r + 1, |i, j| root[i] * if j < r { x[(i, j)] } else { 1.0 });
    let mut hessian = weighted.transpose() * &weighted;
    (0..r).for_each(|j| hessian[(j, j)] += penalty);
    // Rows that are all decided leave the intercept flat; this keeps its step finite and changes no optimum.
    hessian[(r, r)] += 1e-12;
    let solver =
        hessian.llt(Side::Lower).map_err(|_| anyhow!("Newton's system of the logistic probe is singular"))?;
    let right = Mat::from_fn(r + 1, 1, |i, _| gradient[i]);
    let solved = solver.solve(&right);
    let step: Vec<f64> = (0..=r).map(|i| solved[(i, 0)]).collect();
    let decrement = dot(&step, &gradient);
    Ok((step, decrement))
}
