//! Many sequences of one model to one verdict.

use crate::directions::object;
use crate::error::OrRaise;
use crate::monitor::{Drift, State, no_truth, statistic};
use crate::probe::Probe;
use crate::tensor::{View, floats};
use emaudit::AuditOptions;
use emaudit::audit::AuditReport;
use pyo3::prelude::*;

/// Judges a model by many sequences; belongs to one thread at a time.
#[pyclass(module = "emaudit")]
pub struct Audit {
    audit: emaudit::Audit,
    probe: emaudit::Probe,
}

#[pymethods]
impl Audit {
    #[new]
    #[pyo3(signature = (probe, *, statistic="max", horizon=1, rate=None, level=0.01, concern=0.1))]
    fn new(
        py: Python<'_>,
        probe: &Probe,
        statistic: &str,
        horizon: u32,
        rate: Option<f64>,
        level: f64,
        concern: f64,
    ) -> PyResult<Audit> {
        let statistic = self::statistic(py, statistic)?;
        let options = AuditOptions { rate, level, concern, ..AuditOptions::new(statistic, horizon) };
        let audit = emaudit::Audit::new(&probe.0, options).or_raise(py)?;
        Ok(Audit { audit, probe: probe.0.clone() })
    }

    /// Takes one whole sequence, the last prompt token's score first; says what it was counted as.
    fn push(&mut self, scores: &Bound<'_, PyAny>) -> PyResult<State> {
        Ok(self.audit.push(&floats(scores)?.0).into())
    }

    /// From now on the verdict follows that drift of calm reference sequences.
    fn watch(&mut self, py: Python<'_>, drift: &Drift) -> PyResult<()> {
        self.audit.watch(&drift.0).or_raise(py)
    }

    /// What may be said of the model now, with the reference and the controls where they are given.
    #[pyo3(signature = (*, reference=None, controls=None))]
    fn verdict(&self, reference: Option<&Drift>, controls: Option<&ControlBattery>) -> AuditVerdict {
        let mut report = AuditReport::new(&self.probe, self.audit.verdict());
        report.reference = reference.map(|drift| drift.0.report());
        if let Some(controls) = controls {
            report.compare(controls.0.ranks());
        }
        AuditVerdict(report)
    }
}

/// What may be said of a model. `str()` is a page.
#[pyclass(frozen, module = "emaudit")]
pub struct AuditVerdict(AuditReport);

#[pymethods]
impl AuditVerdict {
    #[getter]
    fn state(&self) -> State {
        self.0.verdict.state.into()
    }

    #[getter]
    fn sentence(&self) -> String {
        self.0.verdict.sentence()
    }

    #[getter]
    fn misalignment(&self) -> bool {
        self.0.verdict.misalignment == 1
    }

    #[getter]
    fn flagged(&self) -> u64 {
        self.0.verdict.flagged
    }

    #[getter]
    fn judged(&self) -> u64 {
        self.0.verdict.judged
    }

    #[getter]
    fn p_value(&self) -> f64 {
        self.0.verdict.p_value
    }

    /// 0 clean, 1 flagged, 2 anything else.
    #[getter]
    fn exit_status(&self) -> u8 {
        self.0.verdict.exit_status()
    }

    /// All of it, as `emaudit audit --json` prints it.
    fn to_dict(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        object(py, &self.0)
    }

    fn __bool__(&self) -> PyResult<bool> {
        Err(no_truth())
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        format!("<AuditVerdict {}: {}>", self.state().name(), self.sentence())
    }
}

/// Ranks the model's move along the direction among its moves along the controls of the file.
#[pyclass(module = "emaudit")]
pub struct ControlBattery(emaudit::audit::ControlBattery);

#[pymethods]
impl ControlBattery {
    #[new]
    fn new(py: Python<'_>, probe: &Probe) -> PyResult<ControlBattery> {
        emaudit::audit::ControlBattery::new(&probe.0).or_raise(py).map(ControlBattery)
    }

    /// Takes calm rows, one per sequence: the last prompt token's.
    fn push_calm(&mut self, rows: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.push_calm(&View::new(rows)?.read()?).or_raise(rows.py())
    }

    /// Takes rows of the suspect.
    fn push_suspect(&mut self, rows: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.push_suspect(&View::new(rows)?.read()?).or_raise(rows.py())
    }
}
