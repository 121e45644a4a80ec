//! A direction, its calibration and one kernel, bound once: rows in, scores out.

use crate::activations::{Dtype, Rows};
use crate::directions::Directions;
use crate::error::{Error, Result};
use crate::kernel::cuda::launch::Scale;
use crate::kernel::{Kernel, KernelKind, Scored, error_bound};
use half::{bf16, f16};
use std::sync::Arc;

mod aligned;
mod batch;
mod projection;
use aligned::Aligned;
pub(crate) use batch::Batch;
use projection::Divisor;
pub(crate) use projection::Projection;

/// Unit of a score. The numbers are pinned for C.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScoreUnit {
    /// `z = r / sigma`: standard deviations of aligned rows.
    AlignedSd = 1,
    /// `r = (h - aligned_mean) . v/|v|`: activation units.
    Raw = 2,
}

impl TryFrom<u32> for ScoreUnit {
    type Error = Error;

    /// Reads the pinned number; anything else is [`Error::InvalidArgument`].
    fn try_from(number: u32) -> Result<Self> {
        match number {
            1 => Ok(ScoreUnit::AlignedSd),
            2 => Ok(ScoreUnit::Raw),
            _ => Err(Error::InvalidArgument(format!("{number} is no score unit"))),
        }
    }
}

/// What became of one row. The numbers are pinned for C.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RowStatus {
    /// Scored, or steered as asked.
    #[default]
    Ok = 0,
    /// The row holds a NaN or an infinity, or its score or edit would; untouched.
    NonFinite = 1,
    /// Steering only: the gate was closed; untouched.
    Gated = 2,
    /// Steering only: the dose limit made the edit smaller.
    Limited = 3,
    /// Steering on a GPU only, where strengths are not seen before: it is not finite, or negative for a clamp; untouched.
    BadStrength = 4,
}

impl RowStatus {
    /// Of a row that was only scored: [`RowStatus::Ok`] where it has a score.
    #[inline]
    pub(crate) fn scored(has_score: bool) -> RowStatus {
        if has_score { RowStatus::Ok } else { RowStatus::NonFinite }
    }
}

/// Scores rows against one layer's direction.
///
/// Immutable, `Send` and `Sync`; a clone shares everything. Keeps its directions alive.
/// Scoring never allocates, locks or blocks.
/// ```
/// use emaudit::{Probe, Rows, RowStatus, ScoreUnit};
/// use std::sync::Arc;
///
/// # let directions = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/directions/example.rs"));
/// // `directions` was opened with `Directions::open`; its layer 1 has v = [0, 3, 4] and sigma 0.5.
/// let probe = Probe::new(Arc::new(directions), 1)?;
/// let activations = [1.0f32, 1.0, 1.0, /* row 1: */ 1.0, 4.0, 5.0, /* row 2: */ 1.0, f32::NAN, 1.0];
/// let rows = Rows::new(&activations, 3, probe.width(), 3)?;
/// let (mut scores, mut status) = ([0.0f32; 3], [RowStatus::Ok; 3]);
/// let result = probe.score(&rows, ScoreUnit::AlignedSd, &mut scores, Some(&mut status));
///
/// // The bad row is flagged and has no score; the others were scored all the same.
/// assert_eq!(result.unwrap_err().status(), emaudit::Status::NonFinite);
/// assert_eq!(status, [RowStatus::Ok, RowStatus::Ok, RowStatus::NonFinite]);
/// // Row 0 is the aligned mean, row 1 lies 5 units further along v. Rounding: `Probe::error_bound`.
/// let tolerance = (probe.error_bound(6.5) / probe.sigma().unwrap()) as f32 + 10.0 * f32::EPSILON;
/// assert!(scores[0].abs() <= tolerance && (scores[1] - 10.0).abs() <= tolerance && scores[2].is_nan());
/// # Ok::<(), emaudit::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Probe {
    inner: Arc<Inner>,
}

/// On cache lines of its own: the counts of the `Arc` lie before it, and a clone in another thread writes to them.
#[derive(Debug)]
#[repr(align(64))]
struct Inner {
    source: Option<(Arc<Directions>, u32)>,
    kernel: Kernel,
    direction: Aligned,
    direction_norm: f64,
    unit: Aligned,
    unit_norm: f64,
    offset: f64,
    /// `None` without calibration.
    sigma: Option<f64>,
    /// Sigma; 1 without calibration.
    divisor: Divisor,
}

impl Probe {
    /// A probe for one layer of a direction file, with the fastest kernel or the one `EMAUDIT_KERNEL` names.
    ///
    /// Errors: [`Error::LayerNotFound`]; [`Error::KernelUnavailable`].
    pub fn new(directions: Arc<Directions>, layer: u32) -> Result<Probe> {
        Probe::from_file(directions, layer, Kernel::from_environment()?)
    }

    /// The same with a forced kernel.
    ///
    /// Errors: [`Error::LayerNotFound`]; [`Error::KernelUnavailable`] where the CPU lacks it.
    pub fn with_kernel(directions: Arc<Directions>, layer: u32, kernel: KernelKind) -> Result<Probe> {
        Probe::from_file(directions, layer, Kernel::of(kernel)?)
    }

    /// A probe without a file: no thresholds, no evidence. `direction` is raw `v`, `aligned_mean` has its width,
    /// both in activation units; `sigma` is the standard deviation of aligned raw scores.
    ///
    /// Errors: [`Error::InvalidArgument`] for an empty, zero or non-finite vector or a `sigma` that is not above 0;
    /// [`Error::WidthMismatch`]; [`Error::KernelUnavailable`].
    pub fn from_vectors(
        direction: &[f32],
        aligned_mean: &[f32],
        sigma: f64,
        kernel: Option<KernelKind>,
    ) -> Result<Probe> {
        let kernel = kernel.map_or_else(Kernel::from_environment, Kernel::of)?;
        Probe::build(None, kernel, direction, aligned_mean, Some(sigma))
    }

    fn from_file(directions: Arc<Directions>, layer: u32, kernel: Kernel) -> Result<Probe> {
        let source = directions.clone();
        let found = directions.layer(layer)?;
        let sigma = found.calibration.map(|c| c.sigma);
        Probe::build(Some((source, layer)), kernel, &found.direction, &found.aligned_mean, sigma)
    }

    fn build(
        source: Option<(Arc<Directions>, u32)>,
        kernel: Kernel,
        direction: &[f32],
        aligned_mean: &[f32],
        sigma: Option<f64>,
    ) -> Result<Probe> {
        check_vectors(direction, aligned_mean, sigma.unwrap_or(1.0))?;
        let direction_norm = norm(direction);
        let unit: Vec<f32> = direction.iter().map(|x| (f64::from(*x) / direction_norm) as f32).collect();
        let offset = aligned_mean.iter().zip(&unit).map(|(m, u)| f64::from(*m) * f64::from(*u)).sum();
        let unit_norm = norm(&unit);
        let (direction, unit) = (Aligned::new(direction), Aligned::new(&unit));
        let divisor = Divisor::new(sigma.unwrap_or(1.0));
        let inner =
            Inner { source, kernel, direction, direction_norm, unit, unit_norm, offset, sigma, divisor };
        Ok(Probe { inner: Arc::new(inner) })
    }

    /// Scores every row: `scores[i]` for row `i`, and its status where asked for.
    ///
    /// `rows` is `n x width` of any dtype; `scores` and `status` have `n` elements. A row that cannot be scored (a NaN, an
    /// infinity, or a score beyond f32) gets a NaN and [`RowStatus::NonFinite`]; the others are scored all the same.
    ///
    /// Errors: [`Error::WidthMismatch`], [`Error::InvalidArgument`] (lengths) and [`Error::NotCalibrated`] before anything
    /// is written; [`Error::NonFinite`] after all rows.
    pub fn score(
        &self,
        rows: &Rows<'_>,
        unit: ScoreUnit,
        scores: &mut [f32],
        mut status: Option<&mut [RowStatus]>,
    ) -> Result<()> {
        self.check_width(rows.cols())?;
        self.check_unit(unit)?;
        check_length("scores", scores.len(), rows.rows())?;
        if let Some(status) = &status {
            check_length("row statuses", status.len(), rows.rows())?;
        }
        let nonfinite = match rows.dtype() {
            Dtype::F32 => self.score_as::<f32>(rows, unit, scores, &mut status),
            Dtype::F16 => self.score_as::<f16>(rows, unit, scores, &mut status),
            Dtype::Bf16 => self.score_as::<bf16>(rows, unit, scores, &mut status),
        };
        if nonfinite > 0 { Err(Error::NonFinite { rows: nonfinite }) } else { Ok(()) }
    }

    fn score_as<T: Scored>(
        &self,
        rows: &Rows<'_>,
        unit: ScoreUnit,
        scores: &mut [f32],
        status: &mut Option<&mut [RowStatus]>,
    ) -> usize {
        if let [score] = scores {
            let projection = self.projection(self.inner.kernel.dot(rows.row::<T>(0), &self.inner.unit));
            *score = projection.map_or(f32::NAN, |p| p.score(unit));
            if let Some(status) = status {
                status[0] = RowStatus::scored(projection.is_some());
            }
            return usize::from(projection.is_none());
        }
        // All dot products first: what is made of them would keep memory waiting between two rows.
        self.dots::<T>(rows, scores);
        for score in &mut *scores {
            *score = self.projection(*score).map_or(f32::NAN, |p| p.score(unit));
        }
        // A row that has a score has a finite one.
        if let Some(status) = status {
            for (status, score) in status.iter_mut().zip(&*scores) {
                *status = RowStatus::scored(!score.is_nan());
            }
        }
        scores.iter().filter(|score| score.is_nan()).count()
    }

    /// The dot product of every row.
    pub(crate) fn dots<T: Scored>(&self, rows: &Rows<'_>, out: &mut [f32]) {
        let (kernel, unit) = (&self.inner.kernel, &*self.inner.unit);
        if !kernel.reads_side_by_side() {
            return out.iter_mut().enumerate().for_each(|(i, out)| *out = kernel.dot(rows.row::<T>(i), unit));
        }
        for batch in Batch::all::<{ Kernel::SIDE_BY_SIDE }>(rows.rows()) {
            let (mut some, mut dots) = ([&[][..]; Kernel::SIDE_BY_SIDE], [0.0; Kernel::SIDE_BY_SIDE]);
            batch.rows().zip(&mut some).for_each(|(i, row)| *row = rows.row::<T>(i));
            let count = batch.len();
            kernel.dots(&some[..count], &[unit], &[], &mut dots[..count]);
            batch.rows().zip(dots).for_each(|(i, dot)| out[i] = dot);
        }
    }

    /// Scores every row with several probes in one reading of the rows: `scores[i * probes.len() + k]` for row `i` and
    /// `probes[k]`, with the same bits as [`Probe::score`] of each probe alone. The probes may be borrowed or shared
    /// (`&[&Probe]`, `&[Arc<Probe>]`), and one may stand there twice.
    ///
    /// `rows` is `n x width`; `scores` has `n * probes.len()` elements, `status` has `n`. A row is
    /// [`RowStatus::NonFinite`] where any of its scores is not finite; that score is a NaN.
    ///
    /// Errors: [`Error::WidthMismatch`], [`Error::NotCalibrated`] and [`Error::InvalidArgument`] (lengths; no probe; probes with
    /// different kernels) before anything is written; [`Error::NonFinite`] after all rows.
    pub fn score_all<P: AsRef<Probe>>(
        probes: &[P],
        rows: &Rows<'_>,
        unit: ScoreUnit,
        scores: &mut [f32],
        mut status: Option<&mut [RowStatus]>,
    ) -> Result<()> {
        Probe::check_together(probes, rows.cols(), unit)?;
        if rows.rows().checked_mul(probes.len()) != Some(scores.len()) {
            let (scores, rows, probes) = (scores.len(), rows.rows(), probes.len());
            let text = format!("{scores} scores for {rows} rows and {probes} probes");
            return Err(Error::InvalidArgument(text));
        }
        if let Some(status) = &status {
            check_length("row statuses", status.len(), rows.rows())?;
        }
        let nonfinite = match rows.dtype() {
            Dtype::F32 => score_all_as::<f32, P>(probes, rows, unit, scores, &mut status),
            Dtype::F16 => score_all_as::<f16, P>(probes, rows, unit, scores, &mut status),
            Dtype::Bf16 => score_all_as::<bf16, P>(probes, rows, unit, scores, &mut status),
        };
        if nonfinite > 0 { Err(Error::NonFinite { rows: nonfinite }) } else { Ok(()) }
    }

    /// Refuses probes that cannot score rows of `cols` elements together.
    pub(crate) fn check_together<P: AsRef<Probe>>(probes: &[P], cols: usize, unit: ScoreUnit) -> Result<()> {
        let Some(first) = probes.first().map(AsRef::as_ref) else {
            return Err(Error::InvalidArgument("there is no probe to score with".into()));
        };
        for (k, probe) in probes.iter().map(AsRef::as_ref).enumerate() {
            probe.check_width(cols)?;
            probe.check_unit(unit)?;
            if probe.kernel() != first.kernel() {
                let (one, other) = (first.kernel(), probe.kernel());
                let text = format!(
                    "the probes are bound to different kernels: probe 0 to {one}, probe {k} to {other}; make all \
                     of them with one"
                );
                return Err(Error::InvalidArgument(text));
            }
        }
        Ok(())
    }

    /// Both scores from the dot product with the unit direction; `None` when one is not finite.
    #[inline]
    pub(crate) fn projection(&self, dot: f32) -> Option<Projection> {
        let raw = f64::from(dot) - self.inner.offset;
        // Without calibration nobody sees z: `check_unit` and `Steering::new` have refused.
        let projection = Projection { dot, raw, z: self.inner.divisor.quotient(raw) };
        let finite = projection.z.is_finite() & (raw as f32).is_finite();
        finite.then_some(projection)
    }

    #[inline]
    pub(crate) fn check_width(&self, cols: usize) -> Result<()> {
        if cols == self.width() {
            return Ok(());
        }
        Err(Error::WidthMismatch { expected: self.width(), found: cols })
    }

    /// Refuses calibrated scores without calibration.
    #[inline]
    pub(crate) fn check_unit(&self, unit: ScoreUnit) -> Result<()> {
        match unit {
            ScoreUnit::Raw => Ok(()),
            ScoreUnit::AlignedSd => self.check_calibrated("a score in aligned standard deviations"),
        }
    }

    #[inline]
    pub(crate) fn check_calibrated(&self, what: &'static str) -> Result<()> {
        match self.inner.sigma {
            Some(_) => Ok(()),
            None => Err(Error::NotCalibrated { layer: self.layer().unwrap_or_default(), what }),
        }
    }

    /// Elements of the direction, and columns of every row.
    #[inline]
    pub fn width(&self) -> usize {
        self.inner.unit.len()
    }

    /// 0-based layer in the direction file; `None` for a probe from vectors.
    pub fn layer(&self) -> Option<u32> {
        self.inner.source.as_ref().map(|(_, layer)| *layer)
    }

    /// The kernel in use.
    pub fn kernel(&self) -> KernelKind {
        self.inner.kernel.kind()
    }

    /// The direction file; `None` for a probe from vectors.
    pub fn directions(&self) -> Option<&Arc<Directions>> {
        self.inner.source.as_ref().map(|(directions, _)| directions)
    }

    /// The raw direction `v`, in activation units.
    pub fn direction(&self) -> &[f32] {
        &self.inner.direction
    }

    /// `|v|`, in activation units.
    pub fn direction_norm(&self) -> f64 {
        self.inner.direction_norm
    }

    /// `u = v/|v|`, divided in f64 and rounded to f32. Its own norm is 1 up to that rounding.
    pub fn unit_direction(&self) -> &[f32] {
        &self.inner.unit
    }

    /// `aligned_mean . u`: what a raw score is measured from.
    pub fn offset(&self) -> f64 {
        self.inner.offset
    }

    /// Standard deviation of aligned raw scores; `None` for a layer without calibration.
    pub fn sigma(&self) -> Option<f64> {
        self.inner.sigma
    }

    /// How far a raw score can be from the exact one, for a row of norm `row_norm`, whatever its dtype: the bound of
    /// contract.md with `sum|h_i u_i| <= |h| |u|`, plus the rounding of the score to f32. Divide by `sigma` for `z`
    /// and add one more rounding.
    pub fn error_bound(&self, row_norm: f64) -> f64 {
        self.error_bound_with(row_norm, |reach| error_bound(self.kernel(), self.width(), reach))
    }

    /// The same, where `dot_bound` is the bound of a dot product whose terms' absolute values have this sum.
    pub(crate) fn error_bound_with(&self, row_norm: f64, dot_bound: impl FnOnce(f64) -> f64) -> f64 {
        let reach = row_norm * self.inner.unit_norm;
        let rounding = (reach + self.inner.offset.abs()) * f64::from(f32::EPSILON) / 2.0;
        dot_bound(reach) * (1.0 + f64::from(f32::EPSILON)) + rounding
    }

    /// What a kernel on a GPU makes scores of this unit with.
    pub fn scale(&self, unit: ScoreUnit) -> Scale {
        let (offset, sigma) = (self.inner.offset, self.inner.sigma.unwrap_or(1.0));
        Scale { offset, sigma, raw: unit == ScoreUnit::Raw }
    }

    /// Whether the other is this probe or a clone of it.
    pub(crate) fn is_same(&self, other: &Probe) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    pub(crate) fn bound_kernel(&self) -> Kernel {
        self.inner.kernel
    }

    pub(crate) fn unit_norm(&self) -> f64 {
        self.inner.unit_norm
    }
}

/// So that [`Probe::score_all`] takes probes, references to them and shared ones alike.
impl AsRef<Probe> for Probe {
    fn as_ref(&self) -> &Probe {
        self
    }
}

/// Directions that are scored together, and the scores of as many rows as the kernel takes together.
const TOGETHER: usize = 8;

fn score_all_as<T: Scored, P: AsRef<Probe>>(
    probes: &[P],
    rows: &Rows<'_>,
    unit: ScoreUnit,
    scores: &mut [f32],
    status: &mut Option<&mut [RowStatus]>,
) -> usize {
    let kernel = probes[0].as_ref().inner.kernel;
    let (count, mut nonfinite) = (rows.rows(), 0);
    if count == 1 {
        let finite = score_row::<T, P>(kernel, probes, rows.row(0), unit, scores);
        if let Some(status) = status {
            status[0] = RowStatus::scored(finite);
        }
        return usize::from(!finite);
    }
    let row = |i: usize| if i < count { rows.row::<T>(i) } else { &[] };
    for first in (0..count).step_by(Kernel::ROWS) {
        let (mut block, mut next, mut finite) =
            ([&[][..]; Kernel::ROWS], [&[][..]; Kernel::ROWS], [true; Kernel::ROWS]);
        let present = Kernel::ROWS.min(count - first);
        for r in 0..present {
            (block[r], next[r]) = (row(first + r), row(first + Kernel::ROWS + r));
        }
        for (at, together) in probes.chunks(TOGETHER).enumerate() {
            let directions = directions_of(together);
            let mut dots = [0.0; Kernel::ROWS * TOGETHER];
            let dots = &mut dots[..present * together.len()];
            let next = if at == 0 { &next[..] } else { &[] };
            kernel.dots(&block[..present], &directions[..together.len()], next, dots);
            for ((i, dots), finite) in (first..).zip(dots.chunks_exact(together.len())).zip(&mut finite) {
                let scores = &mut scores[i * probes.len() + at * TOGETHER..];
                for ((probe, dot), score) in together.iter().zip(dots).zip(scores) {
                    let projection = probe.as_ref().projection(*dot);
                    *score = projection.map_or(f32::NAN, |p| p.score(unit));
                    *finite &= projection.is_some();
                }
            }
        }
        for (i, finite) in (first..).zip(finite).take(present) {
            nonfinite += usize::from(!finite);
            if let Some(status) = status {
                status[i] = RowStatus::scored(finite);
            }
        }
    }
    nonfinite
}

/// One row with every probe; whether all scores are finite.
fn score_row<T: Scored, P: AsRef<Probe>>(
    kernel: Kernel,
    probes: &[P],
    row: &[T],
    unit: ScoreUnit,
    scores: &mut [f32],
) -> bool {
    let mut finite = true;
    for (together, scores) in probes.chunks(TOGETHER).zip(scores.chunks_mut(TOGETHER)) {
        let directions = directions_of(together);
        kernel.dots_of_row(row, &directions[..together.len()], scores);
        for (probe, score) in together.iter().zip(scores) {
            let projection = probe.as_ref().projection(*score);
            *score = projection.map_or(f32::NAN, |p| p.score(unit));
            finite &= projection.is_some();
        }
    }
    finite
}

/// The unit directions of up to [`TOGETHER`] probes, then empty ones.
#[inline]
fn directions_of<P: AsRef<Probe>>(together: &[P]) -> [&[f32]; TOGETHER] {
    let mut directions: [&[f32]; TOGETHER] = [&[]; TOGETHER];
    directions.iter_mut().zip(together).for_each(|(d, probe)| *d = &probe.as_ref().inner.unit);
    directions
}

#[inline]
pub(crate) fn check_length(what: &str, found: usize, rows: usize) -> Result<()> {
    if found == rows { Ok(()) } else { Err(other_length(what, found, rows)) }
}

// Apart, so that the text is made nowhere near the way of a good call.
#[cold]
#[inline(never)]
fn other_length(what: &str, found: usize, rows: usize) -> Error {
    Error::InvalidArgument(format!("{found} {what} for {rows} rows"))
}

fn check_vectors(direction: &[f32], aligned_mean: &[f32], sigma: f64) -> Result<()> {
    let refuse = |reason: &str| Err(Error::InvalidArgument(reason.into()));
    if direction.len() != aligned_mean.len() {
        return Err(Error::WidthMismatch { expected: direction.len(), found: aligned_mean.len() });
    }
    if !direction.iter().chain(aligned_mean).all(|x| x.is_finite()) {
        return refuse("the direction or the aligned mean holds a NaN or an infinity");
    }
    if direction.iter().all(|x| *x == 0.0) {
        return refuse("the direction is empty or zero");
    }
    if !(sigma > 0.0 && sigma.is_finite()) {
        return refuse("sigma must be finite and above 0");
    }
    Ok(())
}

fn norm(vector: &[f32]) -> f64 {
    vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What nobody can write to through a shared reference. Whoever adds a type here says so of it; there are no cells,
    /// atomics or locks among them, so threads that score with one probe share nothing that any of them writes.
    trait Unwritten {}
    impl Unwritten for f64 {}
    impl Unwritten for Option<f64> {}
    impl Unwritten for u32 {}
    impl Unwritten for usize {}
    impl Unwritten for Vec<f32> {}
    impl Unwritten for Kernel {}
    impl Unwritten for Divisor {}
    /// Its counts are written by clones and drops, of which scoring does none: see below.
    impl Unwritten for Option<(Arc<Directions>, u32)> {}

    fn unwritten<T: Unwritten>(_: &T) {}

    #[test]
    fn scoring_writes_to_nothing_that_threads_share() {
        let width = 96;
        let direction: Vec<f32> = (0..width).map(|i| (i % 7) as f32 - 2.5).collect();
        let probe = Probe::from_vectors(&direction, &vec![0.25; width], 0.5, None).unwrap();
        // Without `..`: a new field is a new line here.
        let Inner { source, kernel, direction, direction_norm, unit, unit_norm, offset, sigma, divisor } =
            &*probe.inner;
        for vector in [direction, unit] {
            let Aligned { storage, start, length } = vector;
            unwritten(storage);
            unwritten(start);
            unwritten(length);
            assert!(vector.as_ptr().addr().is_multiple_of(Aligned::LINE));
        }
        unwritten(source);
        unwritten(kernel);
        [direction_norm, unit_norm, offset].into_iter().for_each(unwritten);
        unwritten(sigma);
        unwritten(divisor);
        assert!(std::ptr::from_ref(&*probe.inner).addr().is_multiple_of(Aligned::LINE));

        let rows: Vec<f32> = (0..4 * width).map(|i| (i % 11) as f32).collect();
        let rows = Rows::new(&rows, 4, width, width).unwrap();
        let score = || {
            let mut scores = [0.0; 4];
            probe.score(&rows, ScoreUnit::Raw, &mut scores, None).unwrap();
            (scores.map(f32::to_bits), Arc::strong_count(&probe.inner))
        };
        let alone = score();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| [(); 100].map(|()| score()))).collect();
            for thread in threads {
                assert!(thread.join().unwrap().iter().all(|seen| *seen == (alone.0, 1)));
            }
        });
    }
}
