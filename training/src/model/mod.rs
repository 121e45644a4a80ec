//! One decoder for the Llama family: configuration, weights, blocks, residual hooks, cache.

mod cache;
mod config;
mod decoder;
pub mod ops;
mod weights;

pub use cache::Cache;
pub use config::Config;
pub use decoder::{Batch, Block, Decoder, Module, no_edit};
pub use weights::{LoadOptions, load};
