//! Rows on a GPU: tensors of other libraries, scored and steered there, on the caller's stream.

use crate::error::OrRaise;
use crate::probe::{Probe, Steering, unit};
use crate::tensor::DeviceCall;
use pyo3::prelude::*;

/// A probe whose direction was copied to a GPU. Immutable; may be shared between threads.
#[pyclass(frozen, module = "emaudit")]
pub struct DeviceProbe(emaudit::device::DeviceProbe);

impl DeviceProbe {
    pub fn new(py: Python<'_>, probe: &Probe) -> PyResult<DeviceProbe> {
        // The driver may be compiling meanwhile.
        py.detach(|| emaudit::device::DeviceProbe::new(&probe.0)).or_raise(py).map(DeviceProbe)
    }
}

#[pymethods]
impl DeviceProbe {
    /// Enqueues the scoring of every row.
    #[pyo3(signature = (rows, scores, *, unit="aligned_sd", status=None, stream=0))]
    fn score<'py>(
        &self,
        rows: &Bound<'py, PyAny>,
        scores: &Bound<'py, PyAny>,
        unit: &str,
        status: Option<&Bound<'py, PyAny>>,
        stream: usize,
    ) -> PyResult<()> {
        let (unit, mut call) = (self::unit(rows.py(), unit)?, DeviceCall::new(rows, false, stream)?);
        let scores = call.array(scores, "scores", true)?;
        let status = status.map(|status| call.array(status, "status", true)).transpose()?;
        call.enqueue(|rows, stream| self.0.score(rows, unit, scores, status, stream))
    }

    /// Enqueues the editing of every row.
    #[pyo3(signature = (steering, rows, status, *, strengths=None, stream=0))]
    fn steer<'py>(
        &self,
        steering: &Steering,
        rows: &Bound<'py, PyAny>,
        status: &Bound<'py, PyAny>,
        strengths: Option<&Bound<'py, PyAny>>,
        stream: usize,
    ) -> PyResult<()> {
        let mut call = DeviceCall::new(rows, true, stream)?;
        let status = call.array(status, "status", true)?;
        let strengths = strengths.map(|given| call.array(given, "strengths", false)).transpose()?;
        call.enqueue(|rows, stream| self.0.steer(&steering.0, rows, None, strengths, status, stream))
    }

    /// Enqueues one kernel that scores every row as it is and then edits it.
    #[pyo3(signature = (steering, rows, scores, status, *, unit="aligned_sd", strengths=None, stream=0))]
    #[allow(clippy::too_many_arguments)]
    fn score_and_steer<'py>(
        &self,
        steering: &Steering,
        rows: &Bound<'py, PyAny>,
        scores: &Bound<'py, PyAny>,
        status: &Bound<'py, PyAny>,
        unit: &str,
        strengths: Option<&Bound<'py, PyAny>>,
        stream: usize,
    ) -> PyResult<()> {
        let (unit, mut call) = (self::unit(rows.py(), unit)?, DeviceCall::new(rows, true, stream)?);
        let scores = Some((unit, call.array(scores, "scores", true)?));
        let status = call.array(status, "status", true)?;
        let strengths = strengths.map(|given| call.array(given, "strengths", false)).transpose()?;
        call.enqueue(|rows, stream| self.0.steer(&steering.0, rows, scores, strengths, status, stream))
    }

    /// How far a raw score of a row of that norm can be from the exact one.
    fn error_bound(&self, row_norm: f64) -> f64 {
        self.0.error_bound(row_norm)
    }

    fn __repr__(&self) -> String {
        let probe = self.0.probe();
        let layer = probe.layer().map_or("vectors".into(), |layer| format!("layer {layer}"));
        format!("<DeviceProbe of {layer}, width {}>", probe.width())
    }
}
