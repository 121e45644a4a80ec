//! emaudit: tells a serving stack while it runs whether a language model has drifted, and can steer it back.

pub mod directions;
pub mod error;

pub use error::{Error, Result, Status};
