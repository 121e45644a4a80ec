//! One decoder for the Llama family: configuration, weights, blocks, residual hooks, cache.

mod attention;
mod cache;
mod config;
mod decoder;
pub mod ops;
mod prefix;
pub mod product;
mod weights;

pub use cache::Cache;
pub use config::Config;
pub use decoder::{Batch, Block, Decoder, Module, no_edit};
pub use prefix::Prefix;
pub use weights::{LoadOptions, load};
