//! Edits rows in place along a direction: subtract, project out, clamp; per-row strength, gate, dose limit.

use crate::activations::{Dtype, Element, Rows, RowsMut};
use crate::directions::schema::Specificity;
use crate::error::{Error, Result};
use crate::kernel::cuda::launch::Edit;
use crate::kernel::{Kernel, Scored};
use crate::probe::{Probe, Projection, RowStatus, ScoreUnit, check_length};
use half::{bf16, f16};
use std::ops::Range;

mod landing;
pub use landing::LandingReport;

/// What is done to a row `h`; `v` is the raw direction, `u = v/|v|`, `s` the row's strength (1 where none is given).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operation {
    /// `h -= s alpha v`.
    Subtract {
        /// Multiple of the raw direction.
        alpha: f32,
    },
    /// `h -= s alpha (h.u) u`; with `s alpha = 1` nothing is left along `u`.
    ProjectOut {
        /// Share that is removed.
        alpha: f32,
    },
    /// Where `z > ceiling`: `h -= s (r - ceiling sigma) u`. Never raises a score; takes no negative strength.
    Clamp {
        /// The highest score left alone, in aligned standard deviations.
        ceiling: f32,
    },
}

/// How to steer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SteeringOptions {
    /// The edit.
    pub operation: Operation,
    /// Only rows scoring above this many aligned standard deviations are edited.
    pub gate: Option<f32>,
    /// Largest `|dh|/|h|`, above 0. A larger edit is scaled down to it. Holds for the edit as computed, up to the error
    /// of the row's norm; rounding to f16 or bf16 comes on top.
    pub dose_limit: Option<f32>,
    /// Steer although the causal evidence is not `specific`.
    pub allow_nonspecific: bool,
}

impl SteeringOptions {
    /// The operation alone: no gate, no dose limit, specific directions only.
    pub fn new(operation: Operation) -> Self {
        SteeringOptions { operation, gate: None, dose_limit: None, allow_nonspecific: false }
    }
}

/// What a call did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SteerReport {
    /// Rows given.
    pub rows: usize,
    /// Rows written to.
    pub touched: usize,
    /// Rows the gate kept out.
    pub gated: usize,
    /// Rows whose edit the dose limit made smaller.
    pub limited: usize,
    /// Rows left alone because they, or their edit, are not finite.
    pub nonfinite: usize,
    /// Largest `|dh|/|h|` among the rows written to.
    pub largest_dose: f32,
}

/// Steers rows with one probe's direction. Immutable, `Send` and `Sync`; a clone shares the vectors.
/// Steering never allocates, locks or blocks.
/// ```
/// use emaudit::{Operation, Probe, RowsMut, ScoreUnit, Steering, SteeringOptions};
/// use std::sync::Arc;
///
/// # let directions = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/directions/example.rs"));
/// // `directions` was opened with `Directions::open`; its evidence is untested, so steering needs the flag.
/// let probe = Probe::new(Arc::new(directions), 1)?;
/// let clamp = Operation::Clamp { ceiling: 2.0 };
/// assert!(Steering::new(&probe, SteeringOptions::new(clamp)).is_err());
/// let options = SteeringOptions { allow_nonspecific: true, ..SteeringOptions::new(clamp) };
/// let steering = Steering::new(&probe, options)?;
///
/// let mut activations = [1.0f32, 1.0, 1.0, /* row 1: */ 1.0, 4.0, 5.0];
/// let mut rows = RowsMut::new(&mut activations, 2, 3, 3)?;
/// let mut scores = [0.0f32; 2]; // of the rows as they were
/// let report = steering.score_and_apply(&mut rows, ScoreUnit::AlignedSd, &mut scores, None, None)?;
/// assert_eq!((report.rows, report.touched), (2, 1)); // only row 1 was above the ceiling
/// assert_eq!(&activations[..3], [1.0, 1.0, 1.0]);
///
/// let mut after = [0.0f32; 2];
/// probe.score(&emaudit::Rows::new(&activations, 2, 3, 3)?, ScoreUnit::AlignedSd, &mut after, None)?;
/// assert!((after[1] - 2.0).abs() < 1e-5);
/// # Ok::<(), emaudit::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Steering {
    probe: Probe,
    kernel: Kernel,
    options: SteeringOptions,
    /// Norm, largest and smallest |element| of the vector that is subtracted.
    edit_norm: f64,
    edit_peak: f64,
    edit_least: f32,
    /// The edit needs no score: it is the same for every row, and a row whose norm is no extreme has one.
    blind: bool,
}

/// How far ahead of the rows in work memory is fetched: at least to the next group of rows, and this many bytes.
const AHEAD: usize = 16 << 10;

/// Rows behind a gate that are scored before any of them is edited.
const SCORED_AHEAD: usize = 256;

/// What is to be done to one row: `h -= c * vector`, and nothing when `c` is 0.
struct Decision {
    status: RowStatus,
    c: f32,
    dose: f64,
}

impl Decision {
    fn leave(status: RowStatus) -> Self {
        Decision { status, c: 0.0, dose: 0.0 }
    }
}

/// A norm squared within this range lost nothing to overflow or underflow in f32.
const SAFE_SQUARES: Range<f32> = 1e-30..1e30;

impl Steering {
    /// Binds a probe and options.
    ///
    /// Errors: [`Error::InvalidArgument`] for a non-finite parameter or a dose limit that is not above 0;
    /// [`Error::NotSpecific`] unless the file's causal evidence for the probe's layer is `specific` or `allow_nonspecific` is set (a probe from
    /// vectors has no evidence); [`Error::NotCalibrated`] for a gate or a clamp in a layer without calibration.
    pub fn new(probe: &Probe, options: SteeringOptions) -> Result<Steering> {
        check_options(&options)?;
        if options.gate.is_some() {
            probe.check_calibrated("a gate")?;
        }
        if let Operation::Clamp { .. } = options.operation {
            probe.check_calibrated("a clamp")?;
        }
        let untested = Specificity::Untested;
        let causal = probe
            .directions()
            .zip(probe.layer())
            .map_or(untested, |(d, layer)| d.manifest().evidence.causal_at(layer));
        if causal != Specificity::Specific && !options.allow_nonspecific {
            return Err(Error::NotSpecific { status: causal.as_str().into() });
        }
        let (vector, edit_norm) = match options.operation {
            Operation::Subtract { .. } => (probe.direction(), probe.direction_norm()),
            _ => (probe.unit_direction(), probe.unit_norm()),
        };
        let edit_peak = vector.iter().fold(0.0f64, |peak, x| peak.max(f64::from(x.abs())));
        let edit_least = vector.iter().fold(f32::INFINITY, |least, x| least.min(x.abs()));
        let constant = matches!(options.operation, Operation::Subtract { .. });
        let blind = constant && options.gate.is_none() && every_row_has_a_score(probe);
        let (probe, kernel) = (probe.clone(), probe.bound_kernel());
        Ok(Steering { probe, kernel, options, edit_norm, edit_peak, edit_least, blind })
    }

    /// Edits every row in place. `strengths` and `status` have one element per row.
    ///
    /// `rows` is `n x width` of any dtype. A row that holds, or whose edit would make, a NaN or an infinity stays untouched and
    /// is flagged [`RowStatus::NonFinite`]; the others are edited all the same.
    ///
    /// Errors: [`Error::WidthMismatch`] and [`Error::InvalidArgument`] (lengths; a non-finite strength; a negative one for
    /// [`Operation::Clamp`]) before anything is written; [`Error::NonFinite`] after all rows.
    pub fn apply(
        &self,
        rows: &mut RowsMut<'_>,
        strengths: Option<&[f32]>,
        status: Option<&mut [RowStatus]>,
    ) -> Result<SteerReport> {
        self.run(rows, None, strengths, status)?.into_result()
    }

    /// Scores every row and then edits it, in one pass: the same bits as [`Probe::score`] followed by
    /// [`Steering::apply`]. `scores` has one element per row and holds the scores **before** the edit.
    ///
    /// Errors: as [`Steering::apply`], and [`Error::NotCalibrated`] for calibrated scores.
    pub fn score_and_apply(
        &self,
        rows: &mut RowsMut<'_>,
        unit: ScoreUnit,
        scores: &mut [f32],
        strengths: Option<&[f32]>,
        status: Option<&mut [RowStatus]>,
    ) -> Result<SteerReport> {
        check_length("scores", scores.len(), rows.rows())?;
        self.run(rows, Some((unit, scores)), strengths, status)?.into_result()
    }

    /// The probe whose direction this steers with.
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// The options it was made with.
    pub fn options(&self) -> &SteeringOptions {
        &self.options
    }

    /// What a kernel on a GPU edits rows with.
    pub fn edit_on_device(&self) -> Edit {
        let (operation, parameter) = match self.options.operation {
            Operation::Subtract { alpha } => (1, alpha),
            Operation::ProjectOut { alpha } => (2, alpha),
            Operation::Clamp { ceiling } => (3, ceiling),
        };
        let SteeringOptions { gate, dose_limit, .. } = self.options;
        Edit { operation, parameter, gate, dose_limit, norm: self.edit_norm, peak: self.edit_peak }
    }

    /// Whether the raw direction is taken off, and not the unit one.
    pub(crate) fn takes_raw_direction(&self) -> bool {
        matches!(self.options.operation, Operation::Subtract { .. })
    }

    /// Checks and steers; rows that are not finite are counted in the report, not an error.
    pub(crate) fn run(
        &self,
        rows: &mut RowsMut<'_>,
        scores: Option<(ScoreUnit, &mut [f32])>,
        strengths: Option<&[f32]>,
        status: Option<&mut [RowStatus]>,
    ) -> Result<SteerReport> {
        self.check(&rows.as_rows(), scores.as_ref().map(|(unit, _)| *unit), strengths, status.as_deref())?;
        Ok(match rows.dtype() {
            Dtype::F32 => self.run_as::<f32>(rows, scores, strengths, status),
            Dtype::F16 => self.run_as::<f16>(rows, scores, strengths, status),
            Dtype::Bf16 => self.run_as::<bf16>(rows, scores, strengths, status),
        })
    }

    /// Everything that can be refused is refused here, before the first write.
    pub(crate) fn check(
        &self,
        rows: &Rows<'_>,
        unit: Option<ScoreUnit>,
        strengths: Option<&[f32]>,
        status: Option<&[RowStatus]>,
    ) -> Result<()> {
        self.probe.check_width(rows.cols())?;
        unit.map_or(Ok(()), |unit| self.probe.check_unit(unit))?;
        if let Some(status) = status {
            check_length("row statuses", status.len(), rows.rows())?;
        }
        let Some(strengths) = strengths else { return Ok(()) };
        check_length("strengths", strengths.len(), rows.rows())?;
        if !strengths.iter().all(|s| s.is_finite()) {
            return Err(Error::InvalidArgument("a strength is not finite".into()));
        }
        let clamps = matches!(self.options.operation, Operation::Clamp { .. });
        if clamps && strengths.iter().any(|s| *s < 0.0) {
            return Err(Error::InvalidArgument("a negative strength would make a clamp raise scores".into()));
        }
        Ok(())
    }

    fn run_as<T: Scored>(
        &self,
        rows: &mut RowsMut<'_>,
        mut scores: Option<(ScoreUnit, &mut [f32])>,
        strengths: Option<&[f32]>,
        mut status: Option<&mut [RowStatus]>,
    ) -> SteerReport {
        let mut report = SteerReport { rows: rows.rows(), ..SteerReport::default() };
        let (count, blind) = (rows.rows(), self.blind && scores.is_none());
        let mut decide = |i: usize, row: &[T], dot: f32, squares: Option<f32>| {
            let strength = strengths.map_or(1.0, |s| s[i]);
            let decision = match squares {
                // The norm alone says that the row has a score.
                Some(squares) if blind && SAFE_SQUARES.contains(&squares) => {
                    self.decide(row, self.constant(strength), squares)
                }
                _ => {
                    let dot = if blind { self.kernel.dot(row, self.probe.unit_direction()) } else { dot };
                    let projection = self.probe.projection(dot);
                    if let Some((unit, scores)) = &mut scores {
                        scores[i] = projection.map_or(f32::NAN, |p| p.score(*unit));
                    }
                    self.decide_scored(row, projection, squares, strength)
                }
            };
            report.add(&decision);
            if let Some(status) = &mut status {
                status[i] = decision.status;
            }
            decision.c
        };
        if self.options.gate.is_some() {
            self.gated::<T>(rows, &mut decide);
        } else {
            self.grouped::<T>(rows, 0..count, blind, &mut decide);
        }
        report
    }

    /// Behind a gate most rows are only scored, and as fast as a probe does it; where it let most of the last ones through,
    /// they are taken as without a gate. `decide` says how much of the vector to take off a row, from its dot product.
    fn gated<T: Scored>(
        &self,
        rows: &mut RowsMut<'_>,
        decide: &mut impl FnMut(usize, &[T], f32, Option<f32>) -> f32,
    ) {
        let (mut dots, mut open) = ([0.0; SCORED_AHEAD], 0);
        for first in (0..rows.rows()).step_by(SCORED_AHEAD) {
            let count = SCORED_AHEAD.min(rows.rows() - first);
            let mostly_open = 2 * std::mem::take(&mut open) > SCORED_AHEAD;
            let mut decide = |i: usize, row: &[T], dot: f32, squares: Option<f32>| {
                let c = decide(i, row, dot, squares);
                open += usize::from(c != 0.0);
                c
            };
            if mostly_open {
                self.grouped::<T>(rows, first..first + count, false, &mut decide);
                continue;
            }
            let dots = &mut dots[..count];
            self.probe.dots::<T>(&rows.as_rows().part(first, count), dots);
            for (i, dot) in (first..).zip(dots) {
                let c = decide(i, rows.as_rows().row(i), *dot, None);
                self.edit::<T>(rows, i, c);
            }
        }
    }

    /// Rows of a range, some at a time: measured side by side, then edited while they are still in the second cache;
    /// meanwhile the rows to come are fetched into it, the first halves and then the second. `decide` as above, from
    /// the dot product, where it is not `blind`, and the sum of squares.
    fn grouped<T: Scored>(
        &self,
        rows: &mut RowsMut<'_>,
        range: Range<usize>,
        blind: bool,
        decide: &mut impl FnMut(usize, &[T], f32, Option<f32>) -> f32,
    ) {
        const GROUP: usize = Kernel::GROUP;
        let (count, kernel, unit) = (rows.rows(), &self.kernel, self.probe.unit_direction());
        let ahead = GROUP * (AHEAD / (GROUP * rows.cols() * size_of::<T>()).max(1)).max(1);
        let whole = range.end - range.len() % GROUP;
        for first in (range.start..whole).step_by(GROUP) {
            let view = rows.as_rows();
            let row = |i: usize| if i < count { view.row::<T>(i) } else { &[] };
            let (now, next) =
                ([0, 1, 2, 3].map(|k| row(first + k)), [0, 1, 2, 3].map(|k| row(first + k + ahead)));
            let seen = kernel.measure(now, (!blind).then_some(unit), next);
            let mut c = [0.0; GROUP];
            for k in 0..GROUP {
                c[k] = decide(first + k, now[k], seen[k].0, Some(seen[k].1));
            }
            if c.iter().all(|c| *c != 0.0) {
                let (group, next) = rows.rows_and_later::<T, GROUP>(first, first + ahead);
                kernel.edit_group(group, self.vector(), self.edit_least, c, next);
            } else {
                (first..).zip(c).for_each(|(i, c)| self.edit::<T>(rows, i, c));
            }
        }
        for i in whole..range.end {
            let view = rows.as_rows();
            let row = view.row::<T>(i);
            let dot = if blind { 0.0 } else { kernel.dot(row, unit) };
            let c = decide(i, row, dot, Some(kernel.squares(row)));
            self.edit::<T>(rows, i, c);
        }
    }

    /// Takes `c` times the vector off a row, which stays untouched where `c` is 0.
    fn edit<T: Scored>(&self, rows: &mut RowsMut<'_>, i: usize, c: f32) {
        if c != 0.0 {
            self.kernel.edit(rows.row_mut::<T>(i), self.vector(), c);
        }
    }

    fn decide_scored<T: Scored>(
        &self,
        row: &[T],
        seen: Option<Projection>,
        squares: Option<f32>,
        strength: f32,
    ) -> Decision {
        match seen {
            None => Decision::leave(RowStatus::NonFinite),
            Some(seen) if self.options.gate.is_some_and(|gate| seen.z <= gate) => {
                Decision::leave(RowStatus::Gated)
            }
            Some(seen) => {
                let squares = squares.unwrap_or_else(|| self.kernel.squares(row));
                self.decide(row, self.coefficient(seen, strength), squares)
            }
        }
    }

    /// What an open gate lets happen to the row.
    fn decide<T: Scored>(&self, row: &[T], asked: f64, squares: f32) -> Decision {
        if asked == 0.0 {
            return Decision::leave(RowStatus::Ok);
        }
        let norm = row_norm(row, squares);
        let (wide, dose, status) = self.limit(asked, norm);
        let c = wide as f32;
        if c != 0.0 && !self.stays_finite(row, self.vector(), c, norm) {
            return Decision::leave(RowStatus::NonFinite);
        }
        Decision { status, c, dose }
    }

    /// The vector that is taken off, times what each row needs: the raw direction for [`Operation::Subtract`], else the unit one.
    pub fn vector(&self) -> &[f32] {
        if self.takes_raw_direction() { self.probe.direction() } else { self.probe.unit_direction() }
    }

    /// How much of it: `h -= c * vector`.
    fn coefficient(&self, seen: Projection, strength: f32) -> f64 {
        match self.options.operation {
            Operation::Subtract { .. } => self.constant(strength),
            Operation::ProjectOut { .. } => self.constant(strength) * f64::from(seen.dot),
            Operation::Clamp { ceiling } if seen.z > ceiling => {
                // Above 0: `z`, rounded to f32, lies above an f32, so unrounded it lies half a step above at least.
                let excess = seen.raw - f64::from(ceiling) * self.probe.sigma().unwrap_or(f64::NAN);
                self.constant(strength) * excess
            }
            Operation::Clamp { .. } => 0.0,
        }
    }

    /// The part of the coefficient that does not depend on the row.
    fn constant(&self, strength: f32) -> f64 {
        let alpha = match self.options.operation {
            Operation::Subtract { alpha } | Operation::ProjectOut { alpha } => alpha,
            Operation::Clamp { .. } => 1.0,
        };
        f64::from(strength) * f64::from(alpha)
    }

    /// Coefficient, dose and status after the dose limit.
    fn limit(&self, asked: f64, norm: f64) -> (f64, f64, RowStatus) {
        let dose = asked.abs() * self.edit_norm / norm;
        match self.options.dose_limit.map(f64::from) {
            Some(limit) if dose > limit => (asked * (limit / dose), limit, RowStatus::Limited),
            _ => (asked, dose, RowStatus::Ok),
        }
    }

    /// Whether every edited element is finite in the row's dtype; the exact pass is needed near its range only.
    fn stays_finite<T: Scored>(&self, row: &[T], vector: &[f32], c: f32, norm: f64) -> bool {
        let largest = norm * 1.001 + f64::from(c.abs()) * self.edit_peak;
        if largest < f64::from(T::OVERFLOW.min(f32::MAX)) * 0.99 {
            return true;
        }
        c.is_finite() && self.kernel.edit_peak(row, vector, c) < T::OVERFLOW
    }
}

impl SteerReport {
    /// [`Error::NonFinite`] when a row was not finite.
    pub(crate) fn into_result(self) -> Result<SteerReport> {
        if self.nonfinite > 0 { Err(Error::NonFinite { rows: self.nonfinite }) } else { Ok(self) }
    }

    fn add(&mut self, decision: &Decision) {
        if decision.c != 0.0 {
            self.touched += 1;
            self.largest_dose = self.largest_dose.max(decision.dose as f32);
        }
        match decision.status {
            RowStatus::Ok | RowStatus::BadStrength => {}
            RowStatus::NonFinite => self.nonfinite += 1,
            RowStatus::Gated => self.gated += 1,
            RowStatus::Limited => self.limited += 1,
        }
    }
}

/// Whether a sum of squares in the safe range alone says that the row has a score. Then `|h| < 1e15`, so neither a term
/// nor a partial sum of `h.u` exceeds `1e15 |u|` by more than rounding, for which the factor 2 leaves room.
fn every_row_has_a_score(probe: &Probe) -> bool {
    let reach = 2.0 * f64::from(SAFE_SQUARES.end).sqrt() * probe.unit_norm() + probe.offset().abs();
    reach / probe.sigma().unwrap_or(1.0).min(1.0) < f64::from(f32::MAX)
}

/// The row's norm from its f32 sum of squares, summed again in f64 where f32 is too narrow.
fn row_norm<T: Element>(row: &[T], squares: f32) -> f64 {
    if SAFE_SQUARES.contains(&squares) {
        return f64::from(squares).sqrt();
    }
    row.iter().map(|h| f64::from(h.to_f32()).powi(2)).sum::<f64>().sqrt()
}

fn check_options(options: &SteeringOptions) -> Result<()> {
    let parameter = match options.operation {
        Operation::Subtract { alpha } | Operation::ProjectOut { alpha } => alpha,
        Operation::Clamp { ceiling } => ceiling,
    };
    if !parameter.is_finite() || options.gate.is_some_and(|gate| !gate.is_finite()) {
        return Err(Error::InvalidArgument("a steering parameter is not finite".into()));
    }
    if options.dose_limit.is_some_and(|limit| !(limit > 0.0 && limit.is_finite())) {
        return Err(Error::InvalidArgument("a dose limit must be finite and above 0".into()));
    }
    Ok(())
}
