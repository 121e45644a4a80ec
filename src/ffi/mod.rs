//! The C ABI, one file per noun. Rust callers use the rest of the crate; this module exists for the header
//! `include/emaudit.h`, which cbindgen generates from these files, and for the two libraries.
//!
//! All `unsafe` of the boundary is here. Every function that can fail runs inside `boundary::guard`, so a
//! panic becomes a status and never crosses into C.
#![allow(non_camel_case_types)]

pub mod audit;
mod boundary;
pub mod device;
pub mod directions;
pub mod drift;
pub mod error;
pub mod identity;
pub mod kernel;
pub mod layers;
pub mod log;
pub mod monitor;
pub mod probe;
pub mod slot;
pub mod steering;
pub mod tensor;
pub mod version;
