//! The few functions of NVIDIA's driver that scoring and steering need, found at run time: a program that has them
//! starts where there is no driver.

use super::PTX;
use super::launch::{Argument, KERNELS, Launch, THREADS};
use crate::error::{Error, Result};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

#[cfg(feature = "cuda")]
use libloading::Library;
/// Never loaded in a build without the feature.
#[cfg(not(feature = "cuda"))]
type Library = std::convert::Infallible;

/// A pointer of the driver: a context, a module, a function or a stream.
pub(crate) type Handle = *mut c_void;
type Status = c_int;

/// `CUfunction_attribute`: the largest block the function can run in.
const MAX_THREADS_PER_BLOCK: c_int = 0;

/// Where the driver's library is; its name carries no version of the toolkit.
#[cfg(feature = "cuda")]
const LIBRARY: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*);)*) => {
        /// The functions, as cuda.h declares them.
        #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "nothing initialises a driver then"))]
        pub(crate) struct Driver {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> Status,)*
            /// What keeps them in memory.
            pub(crate) _library: Option<Library>,
        }

        #[cfg(feature = "cuda")]
        impl Driver {
            /// # Safety
            /// `library` is NVIDIA's driver, or has functions of the same names and types.
            unsafe fn of(library: Library) -> Result<Driver, libloading::Error> {
                // SAFETY: the types are cuda.h's; the pointers live as long as the library, which stays.
                unsafe { Ok(Driver { $($field: *library.get($name)?,)* _library: Some(library) }) }
            }
        }
    };
}

functions! {
    init = "cuInit": fn(c_uint);
    current = "cuCtxGetCurrent": fn(*mut Handle);
    context_id = "cuCtxGetId": fn(Handle, *mut u64);
    push = "cuCtxPushCurrent_v2": fn(Handle);
    pop = "cuCtxPopCurrent_v2": fn(*mut Handle);
    synchronize = "cuCtxSynchronize": fn();
    load = "cuModuleLoadData": fn(*mut Handle, *const c_void);
    unload = "cuModuleUnload": fn(Handle);
    function = "cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char);
    attribute = "cuFuncGetAttribute": fn(*mut c_int, c_int, Handle);
    allocate = "cuMemAlloc_v2": fn(*mut u64, usize);
    free = "cuMemFree_v2": fn(u64);
    upload = "cuMemcpyHtoD_v2": fn(u64, *const c_void, usize);
    launch = "cuLaunchKernel": fn(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
    );
    name = "cuGetErrorName": fn(Status, *mut *const c_char);
}

impl Driver {
    /// The driver of this machine, looked for once.
    ///
    /// Errors: [`Error::DeviceUnavailable`] with the reason.
    pub(crate) fn of_this_machine() -> Result<&'static Driver> {
        static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
        DRIVER.get_or_init(Driver::find).as_ref().map_err(|why| Error::DeviceUnavailable(why.clone()))
    }

    #[cfg(feature = "cuda")]
    fn find() -> Result<Driver, String> {
        // SAFETY: of the system's own driver: its initialisers run, as in every program that uses CUDA.
        let driver = unsafe { Library::new(LIBRARY).and_then(|library| Driver::of(library)) };
        let driver = driver.map_err(|why| format!("no NVIDIA driver from CUDA 12.0 on: {why}"))?;
        // SAFETY: its argument must be 0.
        match unsafe { (driver.init)(0) } {
            0 => Ok(driver),
            status => Err(format!("the driver starts with {}", driver.name_of(status))),
        }
    }

    #[cfg(not(feature = "cuda"))]
    fn find() -> Result<Driver, String> {
        Err("this library was built without the feature `cuda`".into())
    }

    /// What the driver calls a status.
    fn name_of(&self, status: Status) -> String {
        let mut name = null();
        // SAFETY: it writes a pointer to a constant text, or leaves it null for a status it does not know.
        unsafe {
            (self.name)(status, &mut name);
            if name.is_null() {
                return format!("CUDA error {status}");
            }
            CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    }

    fn check(&self, doing: &'static str, status: Status) -> Result<()> {
        match status {
            0 => Ok(()),
            status => Err(Error::Device { doing, name: self.name_of(status) }),
        }
    }
}

/// A context of the driver, by its address and by the number that no other ever has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    handle: Handle,
    id: u64,
}

impl Context {
    /// The one that is current in this thread.
    ///
    /// Errors: [`Error::InvalidArgument`] where there is none; [`Error::Device`].
    pub(crate) fn current(driver: &Driver) -> Result<Context> {
        let (mut handle, mut id) = (null_mut(), 0);
        // SAFETY: both write where they are told to.
        unsafe {
            driver.check("ask for the current context", (driver.current)(&mut handle))?;
            if handle.is_null() {
                let text = "no CUDA context is current in this thread; call cudaSetDevice (or cuCtxSetCurrent) first";
                return Err(Error::InvalidArgument(text.into()));
            }
            driver.check("ask for the number of a context", (driver.context_id)(handle, &mut id))?;
        }
        Ok(Context { handle, id })
    }

    /// Runs `work` with this context current, whatever was before; not at all where it is gone, be it that another one
    /// has its address now.
    fn during(&self, driver: &Driver, work: impl FnOnce() -> Status) {
        let mut id = 0;
        // SAFETY: `id` can be written; the driver refuses a handle that is no context; what is pushed is popped again.
        unsafe {
            if (driver.push)(self.handle) == 0 {
                if (driver.context_id)(self.handle, &mut id) == 0 && id == self.id {
                    work();
                }
                (driver.pop)(&mut null_mut());
            }
        }
    }
}

/// The kernels, loaded into one context. Dropping the last share unloads them.
pub(crate) struct Module {
    driver: &'static Driver,
    pub(crate) context: Context,
    handle: Handle,
    functions: [(&'static str, Handle); KERNELS.len()],
}

// SAFETY: handles of the driver, whose functions may be called from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// The kernels in the current context, shared with everyone who has them there.
    ///
    /// Errors: as [`Context::current`].
    pub(crate) fn of_current_context(driver: &'static Driver) -> Result<Arc<Module>> {
        static LOADED: Mutex<Vec<Weak<Module>>> = Mutex::new(Vec::new());
        let context = Context::current(driver)?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.retain(|module| module.strong_count() > 0);
        // A context has its number alone, but only within one driver.
        let same = |m: &Arc<Module>| m.context.id == context.id && std::ptr::eq(m.driver, driver);
        if let Some(module) = loaded.iter().filter_map(Weak::upgrade).find(same) {
            return Ok(module);
        }
        let module = Arc::new(Module::load(driver, context)?);
        loaded.push(Arc::downgrade(&module));
        Ok(module)
    }

    fn load(driver: &'static Driver, context: Context) -> Result<Module> {
        let text =
            CString::new(PTX).map_err(|_| Error::InvalidArgument("the kernels hold a zero byte".into()))?;
        let mut handle = null_mut();
        // SAFETY: `text` ends with a zero, and the driver has read it when it returns.
        let status = unsafe { (driver.load)(&mut handle, text.as_ptr().cast()) };
        driver.check("load the kernels (cards from compute capability 7.5 on)", status)?;
        // From here on dropping it unloads them.
        let mut module =
            Module { driver, context, handle, functions: KERNELS.map(|name| (name, null_mut())) };
        for (name, function) in &mut module.functions {
            let name =
                CString::new(*name).map_err(|_| Error::InvalidArgument("a kernel without a name".into()))?;
            let mut threads = 0;
            // SAFETY: the module was loaded; both write where they are told to. Asking for an attribute makes a driver that
            // loads lazily load now, and not while somebody records a graph.
            unsafe {
                driver.check("find a kernel", (driver.function)(function, handle, name.as_ptr()))?;
                let status = (driver.attribute)(&mut threads, MAX_THREADS_PER_BLOCK, *function);
                driver.check("ask for a kernel's attribute", status)?;
            }
            if (threads as usize) < THREADS {
                return Err(Error::DeviceUnavailable(format!(
                    "the card runs blocks of {threads} threads only"
                )));
            }
        }
        Ok(module)
    }

    /// Enqueues a launch, and does nothing else.
    ///
    /// Errors: [`Error::Device`] where the driver refuses.
    ///
    /// # Safety
    /// - The launch is one of [`super::launch`], with addresses of this context's memory, each as large as the launch
    ///   takes it to be, disjoint where they are written, that lives until the stream has run it, with a graph for the
    ///   last time, and that nothing else uses meanwhile. The module lives as long.
    /// - `stream` is null or a stream of this context.
    pub(crate) unsafe fn launch<const N: usize>(
        &self,
        launch: &Launch<[Argument<u64>; N]>,
        stream: Handle,
    ) -> Result<()> {
        if launch.blocks == 0 {
            return Ok(());
        }
        let Some((_, function)) = self.functions.iter().find(|(name, _)| *name == launch.kernel) else {
            return Err(Error::InvalidArgument(format!("no kernel `{}`", launch.kernel)));
        };
        // The driver copies each parameter, with the size that the kernel has it in.
        let mut parameters = launch.arguments.each_ref().map(|argument| match argument {
            Argument::Memory(v) | Argument::U64(v) => std::ptr::from_ref(v).cast_mut().cast::<c_void>(),
            Argument::U32(v) => std::ptr::from_ref(v).cast_mut().cast(),
            Argument::F32(v) => std::ptr::from_ref(v).cast_mut().cast(),
            Argument::F64(v) => std::ptr::from_ref(v).cast_mut().cast(),
        });
        let (threads, shared) = (THREADS as c_uint, 0);
        // SAFETY: number and sizes of the parameters are the kernel's: a test compares every launch with the embedded PTX;
        // that a kernel given these sizes stays inside its memory is what the tests with guards around it show. The rest
        // is the caller's word.
        let status = unsafe {
            let (parameters, extra) = (parameters.as_mut_ptr(), null_mut());
            (self.driver.launch)(
                *function,
                launch.blocks,
                1,
                1,
                threads,
                1,
                1,
                shared,
                stream,
                parameters,
                extra,
            )
        };
        self.driver.check("launch a kernel", status)
    }
}

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Module").field("context", &self.context).finish_non_exhaustive()
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: it was loaded into this context, and nobody has it any more.
        self.context.during(self.driver, || unsafe { (self.driver.unload)(self.handle) });
    }
}

/// Memory of a context, freed when it is dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    module: Arc<Module>,
    pub(crate) address: u64,
}

impl Memory {
    /// A copy of `values` in the current context, which is the module's. Waits until it is there.
    ///
    /// Errors: [`Error::Device`].
    pub(crate) fn of(module: &Arc<Module>, values: &[f32]) -> Result<Memory> {
        let (driver, bytes) = (module.driver, size_of_val(values));
        let mut address = 0;
        // SAFETY: as many bytes are allocated as are copied, from memory that lives until the copy is made.
        unsafe {
            driver.check("allocate memory", (driver.allocate)(&mut address, bytes))?;
            let memory = Memory { module: module.clone(), address };
            driver.check("copy a direction", (driver.upload)(address, values.as_ptr().cast(), bytes))?;
            // From pageable memory the copy may still be on its way, and other streams do not wait for it.
            driver.check("wait for a copy", (driver.synchronize)())?;
            Ok(memory)
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let driver = self.module.driver;
        // SAFETY: it was allocated in this context, and nobody has it any more.
        self.module.context.during(driver, || unsafe { (driver.free)(self.address) });
    }
}
