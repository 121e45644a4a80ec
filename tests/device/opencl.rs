//! Kernels on an OpenCL device, a processor will do.

use bytemuck::Pod;
use opencl3::command_queue::CommandQueue;
use opencl3::context::Context;
use opencl3::device::{CL_DEVICE_TYPE_ALL, Device, get_all_devices};
use opencl3::kernel::Kernel;
use opencl3::memory::{Buffer, CL_MEM_READ_WRITE, ClMem};
use opencl3::program::Program;
use opencl3::types::CL_BLOCKING;
use std::ffi::c_void;
use std::ptr::{null, null_mut};

/// A device with the kernels of one source.
pub struct OpenCl {
    context: Context,
    queue: CommandQueue,
    program: Program,
    /// What the device calls itself.
    pub device: String,
}

/// Bytes on the device.
pub struct Memory {
    buffer: Buffer<u8>,
    len: usize,
}

/// One argument of a kernel.
pub enum Argument<'a> {
    /// A pointer to the beginning of these bytes.
    Memory(&'a Memory),
    /// A null pointer.
    Null,
    /// A 32-bit number.
    U32(u32),
    /// A 64-bit number.
    U64(u64),
    /// A float.
    F32(f32),
    /// A double.
    F64(f64),
}

impl OpenCl {
    /// Builds `source` for the first device there is; `Err` says why there is none.
    ///
    /// # Panics
    /// If the device's compiler refuses the source.
    pub fn build(source: &str) -> Result<Self, String> {
        let devices = get_all_devices(CL_DEVICE_TYPE_ALL).map_err(|e| format!("no OpenCL: {e}"))?;
        let device = Device::new(*devices.first().ok_or("no OpenCL device")?);
        let context = Context::from_device(&device).map_err(|e| e.to_string())?;
        let queue = CommandQueue::create_default(&context, 0).map_err(|e| e.to_string())?;
        let program = Program::create_and_build_from_source(&context, source, "-cl-std=CL1.2");
        let program = program.unwrap_or_else(|log| panic!("the kernels are no OpenCL C:\n{log}"));
        Ok(OpenCl { context, queue, program, device: device.name().unwrap_or_default() })
    }

    /// Memory with these values, followed by `guard` bytes of 0xa5 that no kernel may touch.
    pub fn memory<T: Pod>(&self, values: &[T], guard: usize) -> Memory {
        let mut bytes = bytemuck::cast_slice::<T, u8>(values).to_vec();
        bytes.resize(bytes.len() + guard.max(1), 0xa5);
        // SAFETY: no host memory is handed over, so the device allocates.
        let buffer = unsafe { Buffer::create(&self.context, CL_MEM_READ_WRITE, bytes.len(), null_mut()) };
        let mut buffer = buffer.expect("device memory");
        // SAFETY: blocking, so `bytes` outlives the transfer; the buffer has as many bytes.
        unsafe { self.queue.enqueue_write_buffer(&mut buffer, CL_BLOCKING, 0, &bytes, &[]) }
            .expect("a write");
        Memory { buffer, len: bytes.len() }
    }

    /// All bytes of `memory`, the guard included.
    pub fn read(&self, memory: &Memory) -> Vec<u8> {
        let mut bytes = vec![0u8; memory.len];
        // SAFETY: blocking, so `bytes` outlives the transfer and has as many bytes as the buffer.
        unsafe { self.queue.enqueue_read_buffer(&memory.buffer, CL_BLOCKING, 0, &mut bytes, &[]) }
            .expect("a read");
        bytes
    }

    /// Runs `kernel` in `blocks` blocks of `threads` threads and waits for it.
    ///
    /// # Panics
    /// If there is no such kernel, or its parameters have other sizes or another number.
    pub fn run(&self, kernel: &str, blocks: usize, threads: usize, arguments: &[Argument]) {
        let name = kernel;
        let kernel = Kernel::create(&self.program, name).unwrap_or_else(|e| panic!("kernel `{name}`: {e}"));
        assert_eq!(kernel.num_args().unwrap() as usize, arguments.len(), "arguments of `{name}`");
        for (i, argument) in (0..).zip(arguments) {
            // SAFETY: OpenCL copies the value at once and refuses one of another size than the parameter's.
            let set = unsafe {
                match argument {
                    Argument::Memory(m) => kernel.set_arg(i, &m.buffer.get()),
                    Argument::Null => kernel.set_arg(i, &null_mut::<c_void>()),
                    Argument::U32(v) => kernel.set_arg(i, v),
                    Argument::U64(v) => kernel.set_arg(i, v),
                    Argument::F32(v) => kernel.set_arg(i, v),
                    Argument::F64(v) => kernel.set_arg(i, v),
                }
            };
            set.unwrap_or_else(|e| panic!("argument {i} of `{name}`: {e}"));
        }
        let (global, local) = ([blocks * threads], [threads]);
        // SAFETY: every argument was set above, and all memory outlives the wait below; that the kernel stays inside
        // it is what the tests check with guards.
        let event = unsafe {
            let (global, local) = (global.as_ptr(), local.as_ptr());
            self.queue.enqueue_nd_range_kernel(kernel.get(), 1, null(), global, local, &[])
        };
        event.and_then(|e| e.wait()).unwrap_or_else(|e| panic!("kernel `{name}`: {e}"));
    }
}
