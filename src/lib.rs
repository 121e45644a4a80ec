//! emaudit: tells a serving stack while it runs whether a language model has drifted, and can steer it back.

pub mod activations;
pub mod controls;
pub mod directions;
pub mod error;
pub mod ffi;
pub mod kernel;
pub mod monitor;
pub mod probe;
pub mod steering;
pub mod verdict;

pub use activations::{Dtype, Rows, RowsMut};
pub use directions::Directions;
pub use error::{Error, Result, Status};
pub use kernel::KernelKind;
pub use monitor::Monitor;
pub use probe::{Probe, RowStatus, ScoreUnit};
pub use steering::{Operation, SteerReport, Steering, SteeringOptions};
pub use verdict::{State, Verdict};
