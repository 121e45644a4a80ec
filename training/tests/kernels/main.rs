//! The GPU kernels without a GPU: their source runs through OpenCL against the processor's operations, with the very
//! launches that a GPU gets, and the embedded PTX is what that source compiles to.

mod attention;
mod device;
mod elements;
mod ptx;
mod rows;
#[path = "../../../tests/skipped/mod.rs"]
mod skipped;
