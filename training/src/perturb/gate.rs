//! A small learned gate: how far it opens is a smooth function of a few projections of the row, and the row is moved by
//! that share of alpha v: `h -= g(h) alpha v`.
//!
//! `g = logistic(b + w.z + sum_u c_u tanh(a_u.z + d_u))`, z the row's projections on k unit directions, standardised on
//! the training rows. Without units it is a logistic gate on the probe scores, by Newton's method; with units training
//! begins there and goes on by Adam. It is trained on the extraction split to
//! tell the two groups apart; the same rows, options and seed give the same bits.

use super::RowEdit;
use crate::extract::estimators::Groups;
use crate::extract::logistic;
use crate::matrix::{check_rows, dot, widened};
use crate::random;
use anyhow::{Result, ensure};
use faer::Mat;
use serde::{Deserialize, Serialize};

/// How the gate is trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Hyperbolic units; 0 for a logistic gate.
    pub units: usize,
    /// L2 penalty on every weight but the offsets, against the summed loss.
    pub penalty: f64,
    /// Steps of full-batch Adam, its rate falling to zero along a cosine.
    pub steps: usize,
    /// First rate.
    pub rate: f64,
    /// Draws the first weights of the units.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options { units: 4, penalty: 0.1, steps: 2_000, rate: 0.1, seed: 0 }
    }
}

/// What training reached, on the training rows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Mean logistic loss, nats per row, without the penalty.
    pub loss: f64,
    /// Mean opening on the positive rows.
    pub open_positive: f64,
    /// Mean opening on the negative rows.
    pub open_negative: f64,
}

/// The gate.
#[derive(Clone, Debug, PartialEq)]
pub struct LearnedGate {
    axes: Vec<Vec<f64>>,
    mean: Vec<f64>,
    sd: Vec<f64>,
    units: usize,
    parameters: Vec<f64>,
}

impl LearnedGate {
    /// `directions`: what rows are projected on, `hidden` values each.
    ///
    /// Errors: no direction, one of another width or without a length, rows that do not vary along one, options out of
    /// range, training that diverges.
    pub fn train(
        directions: &[Vec<f32>],
        groups: &Groups<'_>,
        options: &Options,
    ) -> Result<(Self, Training)> {
        let (positive, negative, hidden) = groups.parts();
        ensure!(!directions.is_empty(), "a gate needs at least one direction to look along");
        ensure!(
            options.penalty > 0.0 && options.rate > 0.0 && options.steps > 0,
            "penalty, rate and steps of a gate must be above 0"
        );
        let mut gate = LearnedGate {
            axes: Vec::new(),
            mean: Vec::new(),
            sd: Vec::new(),
            units: options.units,
            parameters: Vec::new(),
        };
        for (i, direction) in directions.iter().enumerate() {
            let wide = widened(direction);
            let size = dot(&wide, &wide).sqrt();
            ensure!(wide.len() == hidden, "direction {i} has {} dimensions, not {hidden}", wide.len());
            ensure!(size > 0.0 && size.is_finite(), "direction {i} has norm {size}");
            let axis: Vec<f64> = wide.iter().map(|x| x / size).collect();
            let rows = positive.chunks(hidden).chain(negative.chunks(hidden));
            let along: Vec<f64> = rows.map(|row| dot(&axis, &widened(row))).collect();
            let sd = crate::statistics::sd(&along)?;
            ensure!(sd > 0.0, "the rows do not vary along direction {i}");
            gate.mean.push(crate::statistics::mean(&along)?);
            gate.sd.push(sd);
            gate.axes.push(axis);
        }
        let first = positive.len() / hidden;
        let seen: Vec<Vec<f64>> =
            positive.chunks(hidden).chain(negative.chunks(hidden)).map(|row| gate.seen(row)).collect();
        let labels: Vec<f64> = (0..seen.len()).map(|i| if i < first { 1.0 } else { 0.0 }).collect();
        let z = Mat::from_fn(seen.len(), directions.len(), |i, j| seen[i][j]);
        let linear = logistic::fit(z.as_ref(), &labels, options.penalty)?;
        gate.parameters =
            [vec![linear.intercept], linear.weights, first_units(directions.len(), options)].concat();
        if options.units > 0 {
            gate.descend(&seen, &labels, options);
        }
        let loss = gate.objective(&gate.parameters, &seen, &labels, 0.0).0 / seen.len() as f64;
        ensure!(
            loss.is_finite() && gate.parameters.iter().all(|p| p.is_finite()),
            "training the gate diverged: lower its rate ({})",
            options.rate
        );
        let opening = |rows: &[Vec<f64>]| {
            rows.iter().map(|z| opened(gate.logit(&gate.parameters, z))).sum::<f64>() / rows.len() as f64
        };
        let training =
            Training { loss, open_positive: opening(&seen[..first]), open_negative: opening(&seen[first..]) };
        Ok((gate, training))
    }

    /// How far the gate opens for a row, in (0, 1).
    pub fn opening(&self, row: &[f32]) -> f64 {
        opened(self.logit(&self.parameters, &self.seen(row)))
    }

    /// Standardised projections of a row.
    fn seen(&self, row: &[f32]) -> Vec<f64> {
        let row = widened(row);
        let one = |((axis, mean), sd): ((&Vec<f64>, &f64), &f64)| (dot(axis, &row) - mean) / sd;
        self.axes.iter().zip(&self.mean).zip(&self.sd).map(one).collect()
    }

    /// Offset, k linear weights, then per unit: its weight, its offset, k inner weights.
    fn logit(&self, parameters: &[f64], z: &[f64]) -> f64 {
        let (linear, units) = parameters.split_at(1 + z.len());
        let bent = units.chunks(2 + z.len()).map(|u| u[0] * (u[1] + dot(&u[2..], z)).tanh());
        linear[0] + dot(&linear[1..], z) + bent.sum::<f64>()
    }

    /// Summed loss with the penalty, and its gradient.
    fn objective(
        &self,
        parameters: &[f64],
        seen: &[Vec<f64>],
        labels: &[f64],
        penalty: f64,
    ) -> (f64, Vec<f64>) {
        let k = self.axes.len();
        let mut gradient = vec![0.0; parameters.len()];
        let mut loss = 0.0;
        for (z, label) in seen.iter().zip(labels) {
            let logit = self.logit(parameters, z);
            loss += (-logit.abs()).exp().ln_1p() + logit.max(0.0) - label * logit;
            let error = opened(logit) - label;
            gradient[0] += error;
            gradient[1..=k].iter_mut().zip(z).for_each(|(g, z)| *g += error * z);
            for (g, u) in gradient[1 + k..].chunks_mut(2 + k).zip(parameters[1 + k..].chunks(2 + k)) {
                let bent = (u[1] + dot(&u[2..], z)).tanh();
                let inner = error * u[0] * (1.0 - bent * bent);
                g[0] += error * bent;
                g[1] += inner;
                g[2..].iter_mut().zip(z).for_each(|(g, z)| *g += inner * z);
            }
        }
        for (i, (g, p)) in gradient.iter_mut().zip(parameters).enumerate() {
            let offset = i == 0 || (i > k && (i - 1 - k) % (2 + k) == 1);
            if !offset {
                *g += penalty * p;
                loss += 0.5 * penalty * p * p;
            }
        }
        (loss, gradient)
    }

    /// Adam over all rows at once.
    fn descend(&mut self, seen: &[Vec<f64>], labels: &[f64], options: &Options) {
        let (keep, keep_square) = (0.9f64, 0.999f64);
        let mut parameters = self.parameters.clone();
        let (mut mean, mut square) = (vec![0.0; parameters.len()], vec![0.0; parameters.len()]);
        for step in 0..options.steps {
            let (_, gradient) = self.objective(&parameters, seen, labels, options.penalty);
            let done = step as f64 / options.steps as f64;
            let rate = options.rate * 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
            let at = (step + 1) as i32;
            for (i, g) in gradient.iter().enumerate() {
                mean[i] = keep * mean[i] + (1.0 - keep) * g;
                square[i] = keep_square * square[i] + (1.0 - keep_square) * g * g;
                let (m, s) = (mean[i] / (1.0 - keep.powi(at)), square[i] / (1.0 - keep_square.powi(at)));
                parameters[i] -= rate * m / (s.sqrt() + 1e-12);
            }
        }
        self.parameters = parameters;
    }
}

/// Small enough that the units begin in their linear part, different so that they part.
fn first_units(k: usize, options: &Options) -> Vec<f64> {
    let count = options.units * (2 + k);
    (0..count as u64).map(|i| random::uniform(&[options.seed, i]) - 0.5).collect()
}

/// The logistic function.
fn opened(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `h -= g(h) alpha v`.
#[derive(Clone, Debug)]
pub struct GatedShift {
    gate: LearnedGate,
    vector: Vec<f64>,
    alpha: f64,
}

impl GatedShift {
    /// Errors: a vector of another width than the gate's rows, or not finite; alpha not finite.
    pub fn new(gate: LearnedGate, vector: &[f32], alpha: f64) -> Result<Self> {
        let width = gate.axes[0].len();
        ensure!(vector.len() == width, "a vector of {} dimensions behind a gate for {width}", vector.len());
        ensure!(alpha.is_finite() && vector.iter().all(|v| v.is_finite()), "the gated shift is not finite");
        Ok(GatedShift { gate, vector: widened(vector), alpha })
    }
}

impl RowEdit for GatedShift {
    fn edit(&self, rows: &mut [f32], hidden: usize) -> Result<()> {
        ensure!(
            hidden == self.vector.len(),
            "a gate for width {} and rows of width {hidden}",
            self.vector.len()
        );
        check_rows("rows behind a gate", rows, hidden, 0)?;
        for row in rows.chunks_mut(hidden) {
            let share = self.alpha * self.gate.opening(row);
            row.iter_mut().zip(&self.vector).for_each(|(h, v)| *h = (f64::from(*h) - share * v) as f32);
        }
        Ok(())
    }
}

/// The control of a gate: the same openings, dealt to other rows by a seed. The same vector and the same perturbations
/// taken together, so what it does less than the true gate is what the gate's choice of rows is worth.
///
/// Rows given in one call are dealt among themselves: all rows of an arm under teacher forcing, where this belongs. In
/// a sampling loop a call is one step, so openings are dealt among the sequences of that step only.
#[derive(Clone, Debug)]
pub struct Reassigned {
    truth: GatedShift,
    seed: u64,
}

impl Reassigned {
    /// A control of `truth`.
    pub fn new(truth: GatedShift, seed: u64) -> Self {
        Reassigned { truth, seed }
    }
}

impl RowEdit for Reassigned {
    fn edit(&self, rows: &mut [f32], hidden: usize) -> Result<()> {
        let truth = &self.truth;
        ensure!(
            hidden == truth.vector.len(),
            "a gate for width {} and rows of width {hidden}",
            truth.vector.len()
        );
        let n = check_rows("rows behind a gate", rows, hidden, 0)?;
        let openings: Vec<f64> = rows.chunks(hidden).map(|row| truth.gate.opening(row)).collect();
        for (row, from) in rows.chunks_mut(hidden).zip(random::permutation(n, &[self.seed])) {
            let share = truth.alpha * openings[from];
            row.iter_mut().zip(&truth.vector).for_each(|(h, v)| *h = (f64::from(*h) - share * v) as f32);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
