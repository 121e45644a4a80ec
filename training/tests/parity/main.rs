//! The decoder, NF4, LoRA and finetuning against transformers, PEFT and bitsandbytes.
//!
//! The reference numbers are committed; `tests/fixtures/make_fixtures.py` says how they were made.

mod adapters;
mod decoder;
mod direct;
mod families;
mod finetuning;
mod fixture;
mod gguf;
mod nf4;
mod ops;
mod optimizer;
mod real;
mod refusals;
#[path = "../../../tests/skipped/mod.rs"]
mod skipped;
mod steering;
mod training;
