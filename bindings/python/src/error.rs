//! Exceptions: the library's sentence and its pinned status.

use emaudit::Status;
use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

create_exception!(emaudit, Error, PyException);
create_exception!(emaudit, NonFiniteError, Error);

/// The exception of an error of the library, with `status` and `status_name`.
pub fn raised(py: Python<'_>, error: &emaudit::Error) -> PyErr {
    let sentence = error.to_string();
    let exception = match error {
        emaudit::Error::NonFinite { .. } => NonFiniteError::new_err(sentence),
        _ => Error::new_err(sentence),
    };
    let (status, value) = (error.status(), exception.value(py));
    let set =
        value.setattr("status", status as i32).and_then(|()| value.setattr("status_name", name(status)));
    set.map_or_else(|failure| failure, |()| exception)
}

fn name(status: Status) -> String {
    format!("{status:?}")
}

/// An argument that this module refuses itself.
pub fn invalid(py: Python<'_>, sentence: impl Into<String>) -> PyErr {
    raised(py, &emaudit::Error::InvalidArgument(sentence.into()))
}

/// The library's results as Python's.
pub trait OrRaise<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for emaudit::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| raised(py, &error))
    }
}
