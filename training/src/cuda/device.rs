//! Launches on a GPU, through candle's device.

use super::PTX;
use super::launch::{Argument, Launch, THREADS};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg, SyncOnDrop,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaStorage, DType, Device, Layout, Result, Shape};
use half::bf16;

/// Runs what `plan` makes of the inputs' addresses and that of the new output, which has `shape` and elements of `T`.
/// Inputs must be contiguous. The launch must be one of [`super::launch`], with the sizes of these tensors: only the
/// operations of this crate, which have compared their shapes, make one.
pub fn run<T: CudaDType + DeviceRepr, const N: usize>(
    inputs: [(&CudaStorage, &Layout); N],
    shape: &Shape,
    plan: impl FnOnce([u64; N], u64) -> Result<Launch<u64>>,
) -> Result<(CudaStorage, Shape)> {
    let device = inputs[0].0.device().clone();
    let stream = device.cuda_stream();
    // SAFETY: every kernel writes all of its output, which has the size of `shape`; the driver gives no empty memory.
    let mut out = unsafe { device.alloc::<T>(shape.elem_count().max(1))? };
    let mut addresses = [0u64; N];
    // Each records, when dropped, that the stream has used its memory up to here.
    let mut uses = Vec::with_capacity(N + 1);
    for (at, (storage, layout)) in addresses.iter_mut().zip(inputs) {
        let (address, used) = address(storage, layout, &stream)?;
        *at = address;
        uses.push(used);
    }
    let (to, written) = out.device_ptr_mut(&stream);
    uses.push(written);
    let launch = plan(addresses, to)?;
    if launch.blocks > 0 {
        let function = device.get_or_load_custom_func(launch.kernel, "emaudit", PTX)?;
        let mut builder = function.builder();
        for argument in &launch.arguments {
            match argument {
                Argument::Memory(address) => builder.arg(address),
                Argument::U32(v) => builder.arg(v),
                Argument::U64(v) => builder.arg(v),
                Argument::F32(v) => builder.arg(v),
                Argument::F64(v) => builder.arg(v),
            };
        }
        let (grid_dim, block_dim) = ((launch.blocks, 1, 1), (THREADS as u32, 1, 1));
        // SAFETY:
        // - the arguments have the number and sizes of the kernel's parameters: a test compares every launch with the
        //   embedded PTX;
        // - addresses are those of memory on this device that lives until the stream has run the kernel: dropping it
        //   frees it in the stream's order;
        // - that a kernel given these sizes stays inside is what the tests with guards around all memory show.
        unsafe { builder.launch(LaunchConfig { grid_dim, block_dim, shared_mem_bytes: 0 }) }.w()?;
    }
    drop(uses);
    Ok((CudaStorage::wrap_cuda_slice(out, device), shape.clone()))
}

/// The address of a contiguous tensor's first element, and the record of its use.
fn address<'a>(
    storage: &'a CudaStorage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> Result<(u64, SyncOnDrop<'a>)> {
    let Some((start, _)) = layout.contiguous_offsets() else {
        candle_core::bail!("kernels need contiguous tensors, got {layout:?}")
    };
    let of = |(base, used): (u64, SyncOnDrop<'a>), size: usize| (base + (start * size) as u64, used);
    Ok(match storage.dtype() {
        DType::F32 => of(storage.as_cuda_slice::<f32>()?.device_ptr(stream), 4),
        DType::BF16 => of(storage.as_cuda_slice::<bf16>()?.device_ptr(stream), 2),
        DType::U32 => of(storage.as_cuda_slice::<u32>()?.device_ptr(stream), 4),
        DType::U8 => of(storage.as_cuda_slice::<u8>()?.device_ptr(stream), 1),
        other => candle_core::bail!("no kernel takes {other:?}"),
    })
}

/// Lets f32 products round their factors to TF32, in the whole process.
pub fn allow_tf32() {
    candle_core::cuda::set_gemm_reduced_precision_f32(true);
}

/// Free bytes of a GPU, where it says.
pub fn available(device: &Device) -> Option<usize> {
    let device = device.as_cuda_device().ok()?;
    let (free, _) = device.cuda_stream().context().mem_get_info().ok()?;
    Some(free)
}

/// Whether a GPU multiplies bf16: from compute capability 8.0 on.
pub fn supports_bf16(device: &Device) -> bool {
    let capability = |d: &candle_core::CudaDevice| d.cuda_stream().context().compute_capability();
    device.as_cuda_device().ok().and_then(|d| capability(d).ok()).is_some_and(|(major, _)| major >= 8)
}
