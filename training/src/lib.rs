//! Training.

pub mod chat;
pub mod dataset;
pub mod statistics;
