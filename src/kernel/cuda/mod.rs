//! Kernels for NVIDIA GPUs: their launches, their code, and the few functions of the driver that they need.
//!
//! `kernels.cu` holds the kernels, [`launch`] what each is launched with, `kernels.ptx` their code as it is embedded:
//! every driver from CUDA 12.0 on compiles it for its card, from compute capability 7.5 up. Where there is no GPU the
//! same source and the same launches run through OpenCL against the processor's kernels (`tests/cuda`). See
//! `CONTRIBUTING.md`, "CUDA", for what has run where.

pub(crate) mod driver;
pub mod launch;

/// The kernels of `kernels.cu`, compiled by NVRTC 12.0.
#[cfg(feature = "cuda")]
pub const PTX: &str = include_str!("kernels.ptx");

#[cfg(not(feature = "cuda"))]
const PTX: &str = "";

/// The bound of contract.md on |computed - exact| of a dot product on a GPU, of `width` terms whose absolute values sum
/// to `sum_abs`.
pub fn error_bound(width: usize, sum_abs: f64) -> f64 {
    let team = launch::team(width);
    let turns = width.div_ceil(launch::VECTOR * team);
    super::dispatch::float_bound(launch::VECTOR * turns + 1 + team.ilog2() as usize, width, sum_abs)
}
