//! Probes and steering: rows of other libraries in, numpy arrays out, the GIL released while it works.

use crate::device::DeviceProbe;
use crate::directions::Directions;
use crate::error::{OrRaise, invalid, raised};
use crate::tensor::{Output, View, bytes, floats};
use emaudit::{Error, KernelKind, Operation, RowStatus, ScoreUnit, SteeringOptions};
use pyo3::prelude::*;
use std::sync::Arc;

/// One layer's direction bound to a kernel. Immutable; may be shared between threads.
#[pyclass(frozen, module = "emaudit")]
pub struct Probe(pub emaudit::Probe);

pub fn unit(py: Python<'_>, name: &str) -> PyResult<ScoreUnit> {
    match name {
        "aligned_sd" => Ok(ScoreUnit::AlignedSd),
        "raw" => Ok(ScoreUnit::Raw),
        other => Err(invalid(py, format!("`{other}` is no score unit; there are aligned_sd and raw"))),
    }
}

fn kernel(py: Python<'_>, name: Option<&str>) -> PyResult<Option<KernelKind>> {
    name.map(str::parse).transpose().or_raise(py)
}

/// Runs a call that gives every row a status. A row that is not finite makes a `NonFiniteError` that carries the scores and
/// statuses of all rows.
fn with_status<'py, T: Send>(
    py: Python<'py>,
    leading: &[usize],
    scores: Option<&Bound<'py, PyAny>>,
    call: impl FnOnce(&mut [RowStatus]) -> emaudit::Result<T> + Send,
) -> PyResult<(T, Bound<'py, PyAny>)> {
    let mut status = vec![RowStatus::NonFinite; leading.iter().product()];
    let outcome = py.detach(|| call(&mut status));
    let array = || bytes(py, status.iter().map(|s| *s as u8).collect(), leading);
    match outcome {
        Ok(value) => Ok((value, array()?)),
        Err(error @ Error::NonFinite { .. }) => {
            let raised = raised(py, &error);
            raised.value(py).setattr("scores", scores)?;
            raised.value(py).setattr("row_status", array()?)?;
            Err(raised)
        }
        Err(error) => Err(raised(py, &error)),
    }
}

#[pymethods]
impl Probe {
    #[new]
    #[pyo3(signature = (directions, layer, *, kernel=None))]
    fn new(py: Python<'_>, directions: &Directions, layer: u32, kernel: Option<&str>) -> PyResult<Probe> {
        let shared = Arc::clone(&directions.0);
        let probe = match self::kernel(py, kernel)? {
            None => emaudit::Probe::new(shared, layer),
            Some(kernel) => emaudit::Probe::with_kernel(shared, layer, kernel),
        };
        probe.or_raise(py).map(Probe)
    }

    #[staticmethod]
    #[pyo3(signature = (direction, aligned_mean, sigma, *, kernel=None))]
    fn from_vectors(
        direction: &Bound<'_, PyAny>,
        aligned_mean: &Bound<'_, PyAny>,
        sigma: f64,
        kernel: Option<&str>,
    ) -> PyResult<Probe> {
        let py = direction.py();
        let (direction, mean) = (floats(direction)?.0, floats(aligned_mean)?.0);
        emaudit::Probe::from_vectors(&direction, &mean, sigma, self::kernel(py, kernel)?)
            .or_raise(py)
            .map(Probe)
    }

    /// The score of every row: float32 of the shape of `rows` without its last dimension.
    #[pyo3(signature = (rows, *, unit="aligned_sd"))]
    fn score<'py>(&self, rows: &Bound<'py, PyAny>, unit: &str) -> PyResult<Bound<'py, PyAny>> {
        let py = rows.py();
        let (unit, view) = (self::unit(py, unit)?, View::new(rows)?);
        let mut output = Output::new(py, view.leading())?;
        let (array, rows, scores) = (output.array.clone(), view.read()?, output.elements()?);
        with_status(py, view.leading(), Some(&array), |status| {
            self.0.score(&rows, unit, scores, Some(status))
        })?;
        Ok(array)
    }

    /// Several probes in one reading of the rows: the shape gets their number as its last dimension.
    #[staticmethod]
    #[pyo3(signature = (probes, rows, *, unit="aligned_sd"))]
    fn score_all<'py>(
        probes: Vec<PyRef<'py, Probe>>,
        rows: &Bound<'py, PyAny>,
        unit: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = rows.py();
        let (unit, view) = (self::unit(py, unit)?, View::new(rows)?);
        let probes: Vec<emaudit::Probe> = probes.iter().map(|probe| probe.0.clone()).collect();
        let shape: Vec<usize> = view.leading().iter().copied().chain([probes.len()]).collect();
        let mut output = Output::new(py, &shape)?;
        let (array, rows, scores) = (output.array.clone(), view.read()?, output.elements()?);
        with_status(py, view.leading(), Some(&array), |status| {
            emaudit::Probe::score_all(&probes, &rows, unit, scores, Some(status))
        })?;
        Ok(array)
    }

    #[getter]
    fn width(&self) -> usize {
        self.0.width()
    }

    #[getter]
    fn layer(&self) -> Option<u32> {
        self.0.layer()
    }

    #[getter]
    fn kernel(&self) -> &'static str {
        self.0.kernel().as_str()
    }

    #[getter]
    fn sigma(&self) -> Option<f64> {
        self.0.sigma()
    }

    #[getter]
    fn offset(&self) -> f64 {
        self.0.offset()
    }

    #[getter]
    fn direction_norm(&self) -> f64 {
        self.0.direction_norm()
    }

    /// How far a raw score of a row of that norm can be from the exact one.
    fn error_bound(&self, row_norm: f64) -> f64 {
        self.0.error_bound(row_norm)
    }

    /// A copy of it on the GPU whose CUDA context is current in this thread.
    fn to_device(&self, py: Python<'_>) -> PyResult<DeviceProbe> {
        DeviceProbe::new(py, self)
    }

    fn __repr__(&self) -> String {
        let layer = self.0.layer().map_or("vectors".into(), |layer| format!("layer {layer}"));
        format!("<Probe of {layer}, width {}, kernel {}>", self.0.width(), self.0.kernel())
    }
}

/// Edits rows in place along a probe's direction. Immutable; may be shared between threads.
#[pyclass(frozen, module = "emaudit")]
pub struct Steering(pub emaudit::Steering);

/// What a call did.
#[pyclass(frozen, get_all, module = "emaudit")]
pub struct SteerReport {
    rows: usize,
    touched: usize,
    gated: usize,
    limited: usize,
    largest_dose: f32,
    row_status: Py<PyAny>,
}

#[pymethods]
impl SteerReport {
    fn __repr__(&self) -> String {
        let SteerReport { rows, touched, gated, limited, largest_dose, .. } = self;
        format!(
            "SteerReport(rows={rows}, touched={touched}, gated={gated}, limited={limited}, largest_dose={largest_dose})"
        )
    }
}

fn report(report: emaudit::SteerReport, row_status: Bound<'_, PyAny>) -> SteerReport {
    SteerReport {
        rows: report.rows,
        touched: report.touched,
        gated: report.gated,
        limited: report.limited,
        largest_dose: report.largest_dose,
        row_status: row_status.unbind(),
    }
}

/// One strength for all rows, or one per row in the shape of the rows.
fn strengths(given: Option<&Bound<'_, PyAny>>, leading: &[usize]) -> PyResult<Option<Vec<f32>>> {
    let Some(given) = given else { return Ok(None) };
    let (values, shape) = floats(given)?;
    match values.as_slice() {
        [one] if shape.is_empty() => Ok(Some(vec![*one; leading.iter().product()])),
        _ if shape == leading => Ok(Some(values)),
        _ => Err(invalid(given.py(), format!("strengths of shape {shape:?} for rows of shape {leading:?}"))),
    }
}

#[pymethods]
impl Steering {
    #[new]
    #[pyo3(signature = (probe, *, subtract=None, project_out=None, clamp=None, gate=None, dose_limit=None, allow_nonspecific=false))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        probe: &Probe,
        subtract: Option<f32>,
        project_out: Option<f32>,
        clamp: Option<f32>,
        gate: Option<f32>,
        dose_limit: Option<f32>,
        allow_nonspecific: bool,
    ) -> PyResult<Steering> {
        let operation = match (subtract, project_out, clamp) {
            (Some(alpha), None, None) => Operation::Subtract { alpha },
            (None, Some(alpha), None) => Operation::ProjectOut { alpha },
            (None, None, Some(ceiling)) => Operation::Clamp { ceiling },
            _ => return Err(invalid(py, "give exactly one of subtract, project_out and clamp")),
        };
        let options = SteeringOptions { operation, gate, dose_limit, allow_nonspecific };
        emaudit::Steering::new(&probe.0, options).or_raise(py).map(Steering)
    }

    /// Edits every row in place.
    #[pyo3(signature = (rows, *, strengths=None))]
    fn apply<'py>(
        &self,
        rows: &Bound<'py, PyAny>,
        strengths: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<SteerReport> {
        let (py, mut view) = (rows.py(), View::new(rows)?);
        let leading = view.leading().to_vec();
        let strengths = self::strengths(strengths, &leading)?;
        let mut rows = view.write()?;
        let (done, status) = with_status(py, &leading, None, |status| {
            self.0.apply(&mut rows, strengths.as_deref(), Some(status))
        })?;
        Ok(report(done, status))
    }

    /// Scores every row as it is and then edits it, in one pass.
    #[pyo3(signature = (rows, *, strengths=None, unit="aligned_sd"))]
    fn score_and_apply<'py>(
        &self,
        rows: &Bound<'py, PyAny>,
        strengths: Option<&Bound<'py, PyAny>>,
        unit: &str,
    ) -> PyResult<(Bound<'py, PyAny>, SteerReport)> {
        let (py, mut view) = (rows.py(), View::new(rows)?);
        let (unit, leading) = (self::unit(py, unit)?, view.leading().to_vec());
        let strengths = self::strengths(strengths, &leading)?;
        let mut output = Output::new(py, &leading)?;
        let (array, mut rows, scores) = (output.array.clone(), view.write()?, output.elements()?);
        let (done, status) = with_status(py, &leading, Some(&array), |status| {
            self.0.score_and_apply(&mut rows, unit, scores, strengths.as_deref(), Some(status))
        })?;
        Ok((array, report(done, status)))
    }

    /// Compares rows read back after steering with where the edit should have put them; an edit that did not land raises.
    #[pyo3(signature = (before, after, *, strengths=None))]
    fn check_landed<'py>(
        &self,
        before: &Bound<'py, PyAny>,
        after: &Bound<'py, PyAny>,
        strengths: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let (py, before, after) = (before.py(), View::new(before)?, View::new(after)?);
        let strengths = self::strengths(strengths, before.leading())?;
        let (before, after) = (before.read()?, after.read()?);
        let checked = py.detach(|| self.0.check_landed(&before, &after, strengths.as_deref(), None));
        checked.or_raise(py).map(|_| ())
    }
}

/// The kernels of this machine, slowest first.
#[pyfunction]
pub fn kernels() -> Vec<&'static str> {
    emaudit::kernel::available().iter().map(|kernel| kernel.as_str()).collect()
}
