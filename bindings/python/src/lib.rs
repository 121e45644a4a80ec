//! The Python module `emaudit._native`: the library over tensors that others own. `python/emaudit` is what users import.

mod audit;
mod device;
mod directions;
mod error;
mod monitor;
mod probe;
mod tensor;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("Error", py.get_type::<error::Error>())?;
    module.add("NonFiniteError", py.get_type::<error::NonFiniteError>())?;
    module.add_class::<directions::Directions>()?;
    module.add_class::<probe::Probe>()?;
    module.add_class::<probe::Steering>()?;
    module.add_class::<probe::SteerReport>()?;
    module.add_class::<device::DeviceProbe>()?;
    module.add_class::<monitor::State>()?;
    module.add_class::<monitor::Verdict>()?;
    module.add_class::<monitor::Monitor>()?;
    module.add_class::<monitor::Drift>()?;
    module.add_class::<audit::Audit>()?;
    module.add_class::<audit::AuditVerdict>()?;
    module.add_class::<audit::ControlBattery>()?;
    module.add_function(wrap_pyfunction!(directions::to_bytes, module)?)?;
    module.add_function(wrap_pyfunction!(probe::kernels, module)?)?;
    Ok(())
}
