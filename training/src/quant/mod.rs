//! NF4 with double quantisation, frozen linear layers that pass gradients through it, 8-bit optimizer state.

mod decode;
mod dynamic;
mod frozen;
pub mod matvec;
mod nf4;
mod placed;
mod products;

pub use dynamic::{DYNAMIC_BLOCK, Dynamic8, Sign};
pub use frozen::{Frozen, Storage};
pub use nf4::{BLOCK, CODEBOOK, Nf4, SCALE_BLOCK, dynamic_map, unsigned_dynamic_map};
pub use placed::Placed;
