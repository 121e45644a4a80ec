//! NF4 with double quantisation, and frozen linear layers that pass gradients through it.

mod frozen;
mod nf4;

pub use frozen::{Frozen, Storage};
pub use nf4::{BLOCK, CODEBOOK, Nf4, SCALE_BLOCK, dynamic_map};
