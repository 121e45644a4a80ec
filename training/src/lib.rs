//! Training.

pub mod chat;
pub mod dataset;
pub mod spillover;
pub mod statistics;
