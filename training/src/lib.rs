//! Finetunes with QLoRA, extracts directions, evaluates them against controls, writes direction files.

pub mod answers;
pub mod base;
pub mod battery;
pub mod capture;
pub mod chat;
pub mod dataset;
pub mod evaluate;
pub mod experiment;
pub mod extract;
pub mod fetch;
pub mod finetune;
pub mod generate;
pub mod interrupt;
pub mod likelihood;
pub mod lora;
pub mod middle;
pub mod model;
pub mod preference;
pub mod progress;
pub mod quant;
pub mod random;
pub mod recipe;
pub mod results;
pub mod spillover;
pub mod statistics;
pub mod store;
