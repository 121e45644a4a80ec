//! The fused operations on NVIDIA GPUs.
//!
//! `kernels.cu` holds the kernels, [`launch`] what each is launched with, [`PTX`] their code as it is embedded: every
//! driver from CUDA 12.0 on compiles it for its card, from compute capability 7.5 up. Where there is no GPU the same
//! source and the same launches run through OpenCL against the processor's operations (`tests/kernels`). See
//! `CONTRIBUTING.md`, "CUDA", for what has run where.

#[cfg(feature = "cuda")]
mod device;
pub mod launch;

#[cfg(feature = "cuda")]
pub(crate) use device::run;
#[cfg(feature = "cuda")]
pub use device::{allow_tf32, available, supports_bf16};
#[cfg(not(feature = "cuda"))]
pub(crate) use without::run;
#[cfg(not(feature = "cuda"))]
pub use without::{allow_tf32, available, supports_bf16};

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Result, Shape, Storage, Tensor};
use std::sync::Mutex;

/// The kernels, compiled by NVRTC 12.0.
pub const PTX: &str = include_str!("kernels.ptx");

/// A result that is computed from candle's operations before its node of the graph is made, and becomes the node's
/// output. Nothing of it is kept for backward.
#[derive(Default)]
pub struct Outside(Mutex<Option<Tensor>>);

impl Outside {
    /// Of this result.
    pub fn new(y: Tensor) -> Self {
        Outside(Mutex::new(Some(y)))
    }

    /// The node's output.
    pub fn output(&self) -> Result<(CudaStorage, Shape)> {
        let y = self.0.lock().ok().and_then(|mut y| y.take());
        let Some(y) = y else { candle_core::bail!("the result was not computed") };
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Cuda(s) => Ok((s.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("the result is on another device"),
        }
    }
}

#[cfg(not(feature = "cuda"))]
mod without {
    use super::launch::Launch;
    use candle_core::{CudaStorage, Device, Layout, Result, Shape};

    /// Launches nothing: no tensor lives on a GPU in this build.
    #[expect(clippy::extra_unused_type_parameters, reason = "the other build says what it puts out")]
    pub fn run<T, const N: usize>(
        _inputs: [(&CudaStorage, &Layout); N],
        _shape: &Shape,
        _plan: impl FnOnce([u64; N], u64) -> Result<Launch<u64>>,
    ) -> Result<(CudaStorage, Shape)> {
        candle_core::bail!("this program was built without the feature `cuda`")
    }

    /// Lets f32 products round their factors to TF32.
    pub fn allow_tf32() {}

    /// Free bytes of a GPU.
    pub fn available(_device: &Device) -> Option<usize> {
        None
    }

    /// Whether a GPU multiplies bf16.
    pub fn supports_bf16(_device: &Device) -> bool {
        false
    }
}
