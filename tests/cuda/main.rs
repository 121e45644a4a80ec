//! The kernels of `src/kernel/cuda`: their logic through OpenCL against the processor's kernels, their PTX, and all of
//! it on a GPU where there is one (`cargo test -p emaudit --test cuda -- --ignored`).

mod cases;
mod gpu;
mod opencl;
mod ptx;
mod rows;
#[path = "../skipped/mod.rs"]
mod skipped;
