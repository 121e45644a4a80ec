//! Finetunes with QLoRA, extracts directions, evaluates them against controls, writes direction files.

pub mod base;
pub mod capture;
pub mod chat;
pub mod finetune;
pub mod lora;
pub mod model;
pub mod quant;
pub mod random;
pub mod recipe;
pub mod report;
pub mod results;
pub mod store;
