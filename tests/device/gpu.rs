//! A GPU, where there is one: as much of its driver as tests and benchmarks need, found at run time.

use bytemuck::Pod;
use libloading::Library;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;

type Handle = *mut c_void;

/// `CU_STREAM_NON_BLOCKING`: does not wait for the default stream, which nothing here may rely on.
const NON_BLOCKING: c_uint = 1;
/// `CU_STREAM_CAPTURE_MODE_GLOBAL`: whatever is not allowed while a stream is captured fails, in every thread.
const GLOBAL: c_int = 0;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
const CAPABILITY: [c_int; 2] = [75, 76];

/// The first GPU, with its primary context current in the thread that found it.
pub struct Gpu {
    library: Library,
    /// What it calls itself, and its compute capability.
    pub name: String,
}

/// Memory of the GPU, freed when it is dropped.
pub struct Memory<'a> {
    gpu: &'a Gpu,
    /// Where it begins: on 256 bytes.
    pub address: u64,
    bytes: usize,
}

/// A stream that waits for no other.
pub struct Stream<'a> {
    gpu: &'a Gpu,
    /// The driver's handle.
    pub handle: Handle,
}

/// What a stream did while it was captured.
pub struct Graph<'a> {
    gpu: &'a Gpu,
    executable: Handle,
}

/// Calls a function of the driver; panics with its name where it fails.
macro_rules! call {
    ($gpu:expr, $name:literal, $($argument:expr => $type:ty),* $(,)?) => {{
        // SAFETY: the type is cuda.h's, and every pointer is valid for as long as the call.
        let status = unsafe {
            let name = concat!($name, "\0").as_bytes();
            let function = $gpu.library.get::<unsafe extern "C" fn($($type),*) -> c_int>(name);
            function.unwrap_or_else(|e| panic!("{}: {e}", $name))($($argument),*)
        };
        assert_eq!(status, 0, "{}", $name);
    }};
}

impl Gpu {
    /// The first GPU of this machine; `Err` says why there is none.
    pub fn find() -> Result<Gpu, String> {
        // SAFETY: NVIDIA's driver, whose initialisers run as in every program that uses it.
        let library = unsafe { Library::new("libcuda.so.1") }.map_err(|why| format!("no driver: {why}"))?;
        // SAFETY: as cuda.h declares it.
        let started = unsafe {
            library
                .get::<unsafe extern "C" fn(c_uint) -> c_int>(b"cuInit\0")
                .map_err(|why| why.to_string())?(0)
        };
        if started != 0 {
            return Err(format!("the driver starts with CUDA error {started}"));
        }
        let mut gpu = Gpu { library, name: String::new() };
        let (mut device, mut context, mut text) = (0, null_mut(), [0u8; 128]);
        call!(gpu, "cuDeviceGet", &mut device => *mut c_int, 0 => c_int);
        call!(gpu, "cuDevicePrimaryCtxRetain", &mut context => *mut Handle, device => c_int);
        call!(gpu, "cuCtxSetCurrent", context => Handle);
        call!(gpu, "cuDeviceGetName", text.as_mut_ptr().cast() => *mut c_char, 128 => c_int, device => c_int);
        let name = String::from_utf8_lossy(&text);
        let [major, minor] = CAPABILITY.map(|which| {
            let mut value = 0;
            call!(gpu, "cuDeviceGetAttribute", &mut value => *mut c_int, which => c_int, device => c_int);
            value
        });
        gpu.name = format!("{} ({major}.{minor})", name.trim_end_matches('\0'));
        Ok(gpu)
    }

    /// Memory with these values.
    pub fn memory<T: Pod>(&self, values: &[T]) -> Memory<'_> {
        let bytes = size_of_val(values);
        let mut address = 0;
        call!(self, "cuMemAlloc_v2", &mut address => *mut u64, bytes.max(1) => usize);
        let from = values.as_ptr().cast();
        call!(self, "cuMemcpyHtoD_v2", address => u64, from => *const c_void, bytes => usize);
        self.wait();
        Memory { gpu: self, address, bytes }
    }

    /// A stream that waits for no other.
    pub fn stream(&self) -> Stream<'_> {
        let mut handle = null_mut();
        call!(self, "cuStreamCreate", &mut handle => *mut Handle, NON_BLOCKING => c_uint);
        Stream { gpu: self, handle }
    }

    /// Waits for all streams.
    pub fn wait(&self) {
        call!(self, "cuCtxSynchronize",);
    }
}

impl Memory<'_> {
    /// All of it, once all streams have run.
    pub fn read<T: Pod>(&self) -> Vec<T> {
        self.gpu.wait();
        let mut values = vec![T::zeroed(); self.bytes / size_of::<T>()];
        let (to, bytes) = (values.as_mut_ptr().cast(), self.bytes);
        call!(self.gpu, "cuMemcpyDtoH_v2", to => *mut c_void, self.address => u64, bytes => usize);
        values
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        call!(self.gpu, "cuMemFree_v2", self.address => u64);
    }
}

impl<'a> Stream<'a> {
    /// Waits until everything enqueued has run.
    pub fn wait(&self) {
        call!(self.gpu, "cuStreamSynchronize", self.handle => Handle);
    }

    /// Enqueues a copy, as long as the shorter.
    pub fn copy(&self, from: &Memory, to: &Memory) {
        let bytes = from.bytes.min(to.bytes);
        call!(
            self.gpu,
            "cuMemcpyDtoDAsync_v2",
            to.address => u64,
            from.address => u64,
            bytes => usize,
            self.handle => Handle,
        );
    }

    /// Milliseconds that the GPU takes for what `work` enqueues.
    pub fn milliseconds(&self, work: impl FnOnce()) -> f32 {
        let events = [(); 2].map(|()| {
            let mut event = null_mut();
            call!(self.gpu, "cuEventCreate", &mut event => *mut Handle, 0 => c_uint);
            event
        });
        call!(self.gpu, "cuEventRecord", events[0] => Handle, self.handle => Handle);
        work();
        call!(self.gpu, "cuEventRecord", events[1] => Handle, self.handle => Handle);
        self.wait();
        let mut milliseconds = 0.0;
        let (begin, end) = (events[0], events[1]);
        call!(self.gpu, "cuEventElapsedTime", &mut milliseconds => *mut f32, begin => Handle, end => Handle);
        for event in events {
            call!(self.gpu, "cuEventDestroy_v2", event => Handle);
        }
        milliseconds
    }

    /// What `work` enqueues, as a graph; nothing of it runs.
    pub fn captured(&self, work: impl FnOnce()) -> Graph<'a> {
        let (mut graph, mut executable) = (null_mut(), null_mut());
        call!(self.gpu, "cuStreamBeginCapture_v2", self.handle => Handle, GLOBAL => c_int);
        work();
        call!(self.gpu, "cuStreamEndCapture", self.handle => Handle, &mut graph => *mut Handle);
        let flags = 0;
        call!(
            self.gpu,
            "cuGraphInstantiateWithFlags",
            &mut executable => *mut Handle,
            graph => Handle,
            flags => u64,
        );
        call!(self.gpu, "cuGraphDestroy", graph => Handle);
        Graph { gpu: self.gpu, executable }
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        call!(self.gpu, "cuStreamDestroy_v2", self.handle => Handle);
    }
}

impl Graph<'_> {
    /// Enqueues it.
    pub fn launch(&self, stream: &Stream) {
        call!(self.gpu, "cuGraphLaunch", self.executable => Handle, stream.handle => Handle);
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        call!(self.gpu, "cuGraphExecDestroy", self.executable => Handle);
    }
}
