//! Finetunes with QLoRA, extracts directions, evaluates them against controls, writes direction files.

pub mod lora;
pub mod model;
pub mod quant;
pub mod store;
