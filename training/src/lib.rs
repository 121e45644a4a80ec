//! Training.

pub mod chat;
