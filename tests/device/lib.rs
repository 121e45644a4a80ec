//! GPU kernels where there is no GPU: their source runs through OpenCL on a processor, and is compiled to PTX.
//!
//! Kernels are CUDA C in the dialect of `src/kernel/cuda/portable.h`, which is OpenCL C as well. What runs here is their
//! logic, not the machine code a GPU would run.

pub mod gpu;
pub mod nvrtc;
pub mod opencl;
pub mod ptx;

/// Where every kernel source takes its dialect from.
pub const PORTABLE: &str = include_str!("../../src/kernel/cuda/portable.h");

/// `kernels` with the dialect in the place of its `#include`.
///
/// # Panics
/// If `kernels` does not include it exactly once.
pub fn source(kernels: &str) -> String {
    let include = "#include \"portable.h\"\n";
    assert_eq!(kernels.matches(include).count(), 1, "kernels include portable.h once");
    kernels.replace(include, PORTABLE)
}

/// Threads of every block, as the dialect says.
pub fn threads() -> usize {
    let line = PORTABLE.lines().find_map(|l| l.strip_prefix("#define THREADS ")).expect("THREADS is defined");
    line.trim().parse().expect("THREADS is a number")
}
