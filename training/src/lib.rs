//! Training.

pub mod chat;
pub mod dataset;
pub mod fetch;
pub mod progress;
pub mod recipe;
pub mod spillover;
pub mod statistics;
