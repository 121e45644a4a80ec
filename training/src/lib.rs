//! Finetunes with QLoRA, extracts directions, evaluates them against controls, writes direction files.

pub mod base;
pub mod capture;
pub mod chat;
pub mod dataset;
pub mod fetch;
pub mod finetune;
pub mod generate;
pub mod lora;
pub mod model;
pub mod progress;
pub mod quant;
pub mod random;
pub mod recipe;
pub mod results;
pub mod spillover;
pub mod statistics;
pub mod store;
