//! One sequence to a verdict, and whether calm sequences still score as in calibration.

use crate::error::{OrRaise, invalid};
use crate::probe::Probe;
use crate::tensor::floats;
use emaudit::directions::digest;
use emaudit::directions::schema::Aggregation;
use emaudit::{DriftState, KernelKind};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

/// State of a sequence or a model. Only CLEAN is clean.
#[pyclass(frozen, eq, hash, module = "emaudit")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    #[pyo3(name = "INVALID")]
    Invalid,
    #[pyo3(name = "PENDING")]
    Pending,
    #[pyo3(name = "CLEAN")]
    Clean,
    #[pyo3(name = "FLAGGED")]
    Flagged,
    #[pyo3(name = "STALE")]
    Stale,
}

impl From<emaudit::State> for State {
    fn from(state: emaudit::State) -> State {
        match state {
            emaudit::State::Invalid => State::Invalid,
            emaudit::State::Pending => State::Pending,
            emaudit::State::Clean => State::Clean,
            emaudit::State::Flagged => State::Flagged,
            emaudit::State::Stale => State::Stale,
        }
    }
}

/// A verdict has five states: whoever asks for yes or no would take one of them for another.
pub fn no_truth() -> PyErr {
    PyTypeError::new_err("a verdict is not true or false; compare its state: verdict.state == State.CLEAN")
}

#[pymethods]
impl State {
    /// The word in lower case.
    #[getter]
    fn word(&self) -> String {
        self.name().to_lowercase()
    }

    fn __bool__(&self) -> PyResult<bool> {
        Err(no_truth())
    }

    fn __str__(&self) -> &'static str {
        self.name()
    }
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::Invalid => "INVALID",
            State::Pending => "PENDING",
            State::Clean => "CLEAN",
            State::Flagged => "FLAGGED",
            State::Stale => "STALE",
        }
    }
}

pub fn statistic(py: Python<'_>, name: &str) -> PyResult<Aggregation> {
    let all = [Aggregation::Mean, Aggregation::Max, Aggregation::Last];
    let found = all.into_iter().find(|statistic| statistic.as_str() == name);
    found.ok_or_else(|| invalid(py, format!("`{name}` is no statistic; there are mean, max and last")))
}

fn statistic_name(number: u32) -> &'static str {
    let all = [Aggregation::Mean, Aggregation::Max, Aggregation::Last];
    all.into_iter().find(|a| *a as u32 == number).map_or("", Aggregation::as_str)
}

/// What may be said of a sequence.
#[pyclass(frozen, module = "emaudit")]
pub struct Verdict(emaudit::Verdict);

#[pymethods]
impl Verdict {
    #[getter]
    fn state(&self) -> State {
        self.0.state.into()
    }

    #[getter]
    fn misalignment(&self) -> bool {
        self.0.misalignment == 1
    }

    #[getter]
    fn score(&self) -> f32 {
        self.0.score
    }

    #[getter]
    fn threshold(&self) -> f32 {
        self.0.threshold
    }

    #[getter]
    fn rate(&self) -> f64 {
        self.0.rate
    }

    #[getter]
    fn rate_upper(&self) -> f64 {
        self.0.rate_upper
    }

    #[getter]
    fn tokens(&self) -> u32 {
        self.0.tokens
    }

    #[getter]
    fn horizon(&self) -> u32 {
        self.0.horizon
    }

    #[getter]
    fn layer(&self) -> u32 {
        self.0.layer
    }

    #[getter]
    fn kernel(&self) -> &'static str {
        KernelKind::try_from(self.0.kernel).map_or("", KernelKind::as_str)
    }

    #[getter]
    fn verified(&self) -> bool {
        self.0.verified == 1
    }

    #[getter]
    fn statistic(&self) -> &'static str {
        statistic_name(self.0.aggregation)
    }

    #[getter]
    fn digest(&self) -> String {
        digest::to_hex(&self.0.digest)
    }

    fn __bool__(&self) -> PyResult<bool> {
        Err(no_truth())
    }

    fn __repr__(&self) -> String {
        let emaudit::Verdict { score, threshold, tokens, horizon, rate, .. } = self.0;
        let state = State::from(self.0.state).name();
        format!(
            "<Verdict {state}: score {score:.4}, threshold {threshold:.4} over {horizon} token(s) at rate {rate}, {tokens} seen>"
        )
    }
}

/// Watches one sequence; belongs to one thread at a time.
#[pyclass(module = "emaudit")]
pub struct Monitor(emaudit::Monitor);

#[pymethods]
impl Monitor {
    #[new]
    #[pyo3(signature = (probe, *, rate, statistic="max"))]
    fn new(py: Python<'_>, probe: &Probe, rate: f64, statistic: &str) -> PyResult<Monitor> {
        let statistic = self::statistic(py, statistic)?;
        emaudit::Monitor::new(&probe.0, statistic, rate).or_raise(py).map(Monitor)
    }

    /// Takes the scores of the next tokens, in aligned standard deviations: one number, or several in order.
    fn push(&mut self, scores: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.push_scores(&floats(scores)?.0);
        Ok(())
    }

    /// From now on verdicts follow that drift.
    fn watch(&mut self, py: Python<'_>, drift: &Drift) -> PyResult<()> {
        self.0.watch(&drift.0).or_raise(py)
    }

    fn verdict(&self) -> Verdict {
        Verdict(self.0.verdict())
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}

/// Watches calm sequences; one thread at a time writes it.
#[pyclass(module = "emaudit")]
pub struct Drift(pub emaudit::Drift);

pub fn drift_word(state: DriftState) -> &'static str {
    match state {
        DriftState::Invalid => "invalid",
        DriftState::Pending => "pending",
        DriftState::Steady => "steady",
        DriftState::Drifted => "drifted",
    }
}

#[pymethods]
impl Drift {
    #[new]
    #[pyo3(signature = (probe, *, window, rate))]
    fn new(py: Python<'_>, probe: &Probe, window: u32, rate: f64) -> PyResult<Drift> {
        emaudit::Drift::new(&probe.0, window, rate).or_raise(py).map(Drift)
    }

    /// Takes one score per calm sequence: that of its last prompt token.
    fn push(&mut self, scores: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.push_scores(&floats(scores)?.0);
        Ok(())
    }

    /// "invalid", "pending", "steady" or "drifted".
    #[getter]
    fn state(&self) -> &'static str {
        drift_word(self.0.state())
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}
