//! One decoder for all families, which differ in data only: configuration, weights, blocks, residual hooks, cache.

mod attention;
mod cache;
mod config;
mod decoder;
mod kernels;
pub mod ops;
pub mod pass;
mod prefix;
pub mod product;
pub mod rope;
mod source;
pub(crate) mod vector;
mod weights;

pub use cache::Cache;
pub use config::{Activation, Config, Layer, QueryGrowth};
pub use decoder::{Batch, Block, Decoder, Module, no_edit};
pub use prefix::Prefix;
pub use weights::{LoadOptions, load};

/// The configuration of the model at `path`, a `.gguf` file or a folder, without its weights.
pub fn config(path: &std::path::Path) -> anyhow::Result<Config> {
    Ok(source::Source::open(path)?.config)
}
