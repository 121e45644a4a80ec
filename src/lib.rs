//! emaudit: tells a serving stack while it runs whether a language model has drifted, and can steer it back.
//!
//! The way data takes, one module per step: [`directions`] (file, mapped or copied, checked whole) ->
//! [`probe`] (one layer bound to one kernel) -> scores -> [`monitor`] (one sequence) -> [`verdict`].
//! [`drift`] watches whether calm sequences still score as they did in calibration; while they do not, verdicts are
//! stale. [`log`] keeps verdicts in a chain. [`audit`] judges a model by many sequences, against the stated rate. [`steering`] edits rows in place; [`device`]
//! does both where rows live on a GPU; [`reload`]
//! replaces what is being served; [`controls`] makes the seeded directions that a claim must beat;
//! [`kernel`] is arithmetic only; [`ffi`] is the C ABI over all of it.
//!
//! ```
//! use emaudit::{Operation, Probe, Rows, RowsMut, ScoreUnit, Steering, SteeringOptions};
//!
//! // A probe is usually bound to a direction file (`Probe::new`); vectors do for a first look.
//! let (direction, aligned_mean) = ([3.0, 4.0], [1.0, 1.0]);
//! let probe = Probe::from_vectors(&direction, &aligned_mean, 0.5, None)?;
//! let mut row = [4.0f32, 5.0];
//! let mut z = [0.0f32];
//! probe.score(&Rows::new(&row, 1, 2, 2)?, ScoreUnit::AlignedSd, &mut z, None)?;
//! assert_eq!(z, [10.0]); // 5 units along the direction, sigma 0.5
//!
//! // Vectors carry no evidence, so steering with them needs the explicit flag.
//! let options = SteeringOptions { allow_nonspecific: true, ..SteeringOptions::new(Operation::Subtract { alpha: 1.0 }) };
//! Steering::new(&probe, options)?.apply(&mut RowsMut::new(&mut row, 1, 2, 2)?, None, None)?;
//! assert_eq!(row, [1.0, 1.0]);
//! # Ok::<(), emaudit::Error>(())
//! ```

#![deny(missing_docs)]

pub mod activations;
pub mod audit;
pub mod controls;
pub mod device;
pub mod directions;
pub mod drift;
pub mod error;
pub mod ffi;
pub mod kernel;
pub mod log;
pub mod monitor;
#[cfg(feature = "onnx")]
pub mod onnx;
pub mod probe;
pub mod reload;
pub mod steering;
pub mod verdict;

pub use activations::{Dtype, Rows, RowsMut};
pub use audit::{Audit, AuditOptions, AuditReason, AuditVerdict};
pub use directions::Directions;
pub use drift::{Drift, DriftReport, DriftState};
pub use error::{Error, Result, Status};
pub use kernel::KernelKind;
pub use monitor::Monitor;
pub use probe::{Probe, RowStatus, ScoreUnit};
pub use reload::Reloadable;
pub use steering::{LandingReport, Operation, SteerReport, Steering, SteeringOptions};
pub use verdict::{State, Verdict};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
