//! Proves that an edit landed: rows before, rows read back after, and where the edit should have put them.

use super::{Decision, Operation, Steering};
use crate::activations::{Dtype, Element, Rows};
use crate::error::{Error, Result};
use crate::kernel::{KernelKind, Scored, error_bound};
use crate::probe::{RowStatus, check_length};
use half::{bf16, f16};

/// What [`Steering::check_landed`] found. Every row is counted once below `rows`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LandingReport {
    /// Rows given.
    pub rows: usize,
    /// Edited rows whose projection is where it should be, by a bound smaller than the edit: neither no edit at all nor a
    /// second one passes.
    pub landed: usize,
    /// Edited rows whose projection changes by no more than rounding may: nothing can be told from them.
    pub lost: usize,
    /// Rows that were to stay (gate closed, strength 0, below the ceiling) and stayed.
    pub untouched: usize,
    /// Rows whose projection is not where it should be.
    pub missed: usize,
    /// Rows that steering leaves alone because they, or their edit, are not finite.
    pub nonfinite: usize,
    /// Largest |projection measured - expected|, in units of its bound; above 1 when a row missed.
    pub largest_deviation: f32,
}

/// One row against one expectation.
struct Comparison {
    /// |measured - expected|, in units of the bound.
    deviation: f64,
    /// Whether rounding may be as large as the edit.
    lost: bool,
    /// Whether an edit was expected, and the status that goes with it.
    edited: bool,
    status: RowStatus,
}

impl Steering {
    /// The self-test of a serving stack: proves on rows read back from it that the edit landed. `before` holds rows as they
    /// were, `after` the same rows as the stack has them after steering with these strengths; both `n x width`, each in
    /// any dtype, one of them in the dtype in which the stack keeps the rows. `deviations`, where asked for, receives what
    /// [`LandingReport::largest_deviation`] is the largest of, per row; NaN for a row that cannot be scored.
    ///
    /// For every row the projection on the unit direction is compared, in f64, with the one that the edit should leave: gate,
    /// ceiling, strength and dose limit included. They may differ by what contract.md allows any kernel (the dot product that
    /// gate, coefficient and norm rest on; the f32 arithmetic of the edit) and by the rounding of every element to the dtypes;
    /// no more. A row that was to stay must have stayed. It notices an edit that was dropped, made twice (where that is not the
    /// same: projecting out and clamping fully are), made to another row or with another direction, or lost to rounding.
    /// Changes at right angles to the direction are not looked at.
    ///
    /// ```
    /// use emaudit::{Error, Operation, Probe, Rows, RowsMut, Steering, SteeringOptions};
    ///
    /// let probe = Probe::from_vectors(&[3.0, 4.0], &[0.0, 0.0], 1.0, None)?;
    /// let options = SteeringOptions { allow_nonspecific: true, ..SteeringOptions::new(Operation::ProjectOut { alpha: 1.0 }) };
    /// let steering = Steering::new(&probe, options)?;
    /// let before = [4.0f32, 5.0];
    /// let mut after = before; // what the serving stack has after steering
    /// fn view(row: &[f32; 2]) -> emaudit::Result<Rows<'_>> {
    ///     Rows::new(row, 1, 2, 2)
    /// }
    /// let dropped = steering.check_landed(&view(&before)?, &view(&after)?, None, None);
    /// assert!(matches!(dropped, Err(Error::NotLanded { missed: 1, .. })));
    ///
    /// steering.apply(&mut RowsMut::new(&mut after, 1, 2, 2)?, None, None)?;
    /// let report = steering.check_landed(&view(&before)?, &view(&after)?, None, None)?;
    /// assert!(report.landed == 1 && report.largest_deviation <= 1.0);
    /// # Ok::<(), emaudit::Error>(())
    /// ```
    ///
    /// Never allocates, locks or blocks; takes a few times as long as steering.
    ///
    /// Where no row was to be edited, and with no rows at all, nothing was shown and nothing is wrong: the report says so. What
    /// follows a row that was not finite before is not looked at.
    ///
    /// Errors: [`Error::WidthMismatch`] and [`Error::InvalidArgument`] (as [`Steering::apply`]; another number of rows after
    /// than before) before anything is written. After all rows [`Error::NotLanded`] when a row missed, or when rows were to be
    /// edited and not one can be shown to be; else [`Error::NonFinite`] when a row was left alone for that.
    pub fn check_landed(
        &self,
        before: &Rows<'_>,
        after: &Rows<'_>,
        strengths: Option<&[f32]>,
        deviations: Option<&mut [f32]>,
    ) -> Result<LandingReport> {
        self.compare_landed(before, after, strengths, deviations)?.into_result()
    }

    /// The comparison; what did not land is in the report, not an error.
    pub(crate) fn compare_landed(
        &self,
        before: &Rows<'_>,
        after: &Rows<'_>,
        strengths: Option<&[f32]>,
        mut deviations: Option<&mut [f32]>,
    ) -> Result<LandingReport> {
        self.check(before, None, strengths, None)?;
        self.probe.check_width(after.cols())?;
        check_length("rows after steering", after.rows(), before.rows())?;
        if let Some(deviations) = &deviations {
            check_length("deviations", deviations.len(), before.rows())?;
        }
        let mut report = LandingReport { rows: before.rows(), ..LandingReport::default() };
        for i in 0..before.rows() {
            let strength = strengths.map_or(1.0, |s| s[i]);
            let found = match before.dtype() {
                Dtype::F32 => self.compare_row(before.row::<f32>(i), after, i, strength),
                Dtype::F16 => self.compare_row(before.row::<f16>(i), after, i, strength),
                Dtype::Bf16 => self.compare_row(before.row::<bf16>(i), after, i, strength),
            };
            report.add(&found);
            if let Some(deviations) = &mut deviations {
                deviations[i] = found.map_or(f32::NAN, |f| f.deviation as f32);
            }
        }
        Ok(report)
    }

    fn compare_row<B: Scored>(
        &self,
        before: &[B],
        after: &Rows<'_>,
        i: usize,
        strength: f32,
    ) -> Option<Comparison> {
        match after.dtype() {
            Dtype::F32 => self.compare_best(before, after.row::<f32>(i), strength),
            Dtype::F16 => self.compare_best(before, after.row::<f16>(i), strength),
            Dtype::Bf16 => self.compare_best(before, after.row::<bf16>(i), strength),
        }
    }

    /// Against the gate's two outcomes where rounding decides between them, else against one. `None` for a row that
    /// cannot be scored.
    fn compare_best<B: Scored, A: Element>(
        &self,
        before: &[B],
        after: &[A],
        strength: f32,
    ) -> Option<Comparison> {
        let unit = self.probe.unit_direction();
        let (dot, squares) = (self.kernel.dot(before, unit), self.kernel.squares(before));
        let seen = self.probe.projection(dot)?;
        let reach = before.iter().zip(unit).map(|(h, u)| (f64::from(h.to_f32()) * f64::from(*u)).abs()).sum();
        let (relative, absolute) = reading(B::DTYPE, A::DTYPE);
        let small = absolute * unit.iter().map(|u| f64::from(u.abs())).sum::<f64>();
        let doubt = between_kernels(unit.len(), reach) + relative * reach + small;
        let open = || {
            let decision = self.decide(before, self.coefficient(seen, strength), squares);
            let slack = self.coefficient_slack(&decision, strength, doubt, before.len(), relative);
            self.compare(before, after, &decision, slack)
        };
        let closed = || self.compare(before, after, &Decision::leave(RowStatus::Gated), 0.0);
        // A gate was refused where there is no sigma.
        let Some((gate, sigma)) = self.options.gate.zip(self.probe.sigma()) else { return Some(open()) };
        let distance = (seen.raw - f64::from(gate) * sigma).abs();
        if distance > doubt + seen.raw.abs() * f64::from(f32::EPSILON) {
            return Some(if seen.z > gate { open() } else { closed() });
        }
        let (open, closed) = (open(), closed());
        Some(if open.deviation <= closed.deviation { open } else { closed })
    }

    /// How far the coefficient of another kernel, for the row as the other dtype has it, may lie from ours.
    fn coefficient_slack(
        &self,
        decision: &Decision,
        strength: f32,
        doubt: f64,
        width: usize,
        relative: f64,
    ) -> f64 {
        let per_dot = match self.options.operation {
            Operation::Subtract { .. } => 0.0,
            Operation::ProjectOut { alpha } => (f64::from(strength) * f64::from(alpha)).abs(),
            Operation::Clamp { .. } => f64::from(strength),
        };
        // The relative error of a norm is half that of its square, twice for two kernels.
        let per_norm = self.options.dose_limit.map_or(0.0, |_| between_kernels(width, 1.0) / 2.0 + relative);
        per_dot * doubt + per_norm * f64::from(decision.c.abs())
    }

    fn compare<B: Element, A: Element>(
        &self,
        before: &[B],
        after: &[A],
        decision: &Decision,
        slack: f64,
    ) -> Comparison {
        let (edited, c) = (decision.c != 0.0, f64::from(decision.c));
        let (relative, absolute) = rounding(B::DTYPE, A::DTYPE, edited);
        let (read_relative, read_absolute) = reading(B::DTYPE, A::DTYPE);
        let (mut off, mut bound, mut along, mut sum) = (0.0, 0.0, 0.0, 0.0);
        for (((h, a), v), u) in before.iter().zip(after).zip(self.vector()).zip(self.probe.unit_direction()) {
            let [h, a, v, u] = [h.to_f32(), a.to_f32(), *v, *u].map(f64::from);
            let edit = c * v;
            let expected = h - edit;
            // Roundings to f32: of the coefficient, of the product, of the difference.
            let arithmetic = if edited { (h.abs() + 3.0 * edit.abs()) * EPS32 * 1.01 + TINY32 } else { 0.0 };
            off += (a - expected) * u;
            let read = read_relative * h.abs() + read_absolute;
            bound +=
                (arithmetic + relative * (expected.abs() + arithmetic + read) + absolute + read) * u.abs();
            along += v * u;
            sum += (h.abs() + a.abs() + edit.abs()) * u.abs();
        }
        // The last part is what these sums in f64 may be off themselves.
        bound += slack * along.abs() + sum * before.len() as f64 * f64::EPSILON;
        let deviation = if off == 0.0 { 0.0 } else { off.abs() / bound };
        // A row after that is not finite is off by a NaN.
        let deviation = if deviation.is_nan() { f64::INFINITY } else { deviation };
        let lost = edited && (c * along).abs() <= bound;
        Comparison { deviation, lost, edited, status: decision.status }
    }
}

/// Half a step in the last place of 1, and half the smallest step, of f32.
const EPS32: f64 = 1.0 / (1u64 << 24) as f64;
const TINY32: f64 = f32::from_bits(1) as f64 / 2.0;

/// How far the dot products of two kernels may lie apart where the absolute values of the terms sum to `sum_abs`.
fn between_kernels(width: usize, sum_abs: f64) -> f64 {
    let of = |kind: KernelKind| error_bound(kind, width, sum_abs);
    2.0 * KernelKind::ALL.into_iter().map(of).fold(0.0, f64::max)
}

/// How far an element before lies from the one that the stack edited, relative to it and absolute: where the dtypes
/// differ, one of the two is not that of the stack.
fn reading(before: Dtype, after: Dtype) -> (f64, f64) {
    if before == after {
        return (0.0, 0.0);
    }
    let (relative, absolute) = rounding(before, after, true);
    // Of what was read, not of what was rounded.
    (relative / (1.0 - relative), absolute)
}

/// Rounding of an element, relative and absolute: once to the dtype that both have, and only where an edit was made; once to
/// each where they differ. That to f32 is part of the arithmetic, and reading f32 rounds nothing.
fn rounding(before: Dtype, after: Dtype, edited: bool) -> (f64, f64) {
    let one = |dtype| match dtype {
        Dtype::F32 => (0.0, 0.0),
        Dtype::F16 => (0.5f64.powi(11), 0.5f64.powi(25)),
        Dtype::Bf16 => (0.5f64.powi(8), TINY32 * 65536.0),
    };
    if before == after {
        return if edited { one(before) } else { (0.0, 0.0) };
    }
    let (one, other) = (one(before), one(after));
    // The second rounding is of what the first one left.
    (one.0 + other.0 + one.0 * other.0, one.1 + other.1 * (1.0 + one.0) + one.1 * other.0)
}

impl LandingReport {
    /// [`Error::NotLanded`] or [`Error::NonFinite`] as [`Steering::check_landed`] says.
    pub(crate) fn into_result(self) -> Result<LandingReport> {
        let LandingReport { rows, missed, lost, largest_deviation, .. } = self;
        if missed > 0 || (lost > 0 && self.landed == 0) {
            return Err(Error::NotLanded { rows, missed, lost, largest_deviation });
        }
        if self.nonfinite > 0 { Err(Error::NonFinite { rows: self.nonfinite }) } else { Ok(self) }
    }

    fn add(&mut self, found: &Option<Comparison>) {
        let Some(found) = found else {
            self.nonfinite += 1;
            return;
        };
        self.largest_deviation = self.largest_deviation.max(found.deviation as f32);
        let count = match found {
            f if f.deviation > 1.0 => &mut self.missed,
            f if f.lost => &mut self.lost,
            f if f.edited => &mut self.landed,
            f if f.status == RowStatus::NonFinite => &mut self.nonfinite,
            _ => &mut self.untouched,
        };
        *count += 1;
    }
}
