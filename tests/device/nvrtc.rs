//! CUDA C to PTX through NVRTC, NVIDIA's compiler as a shared library.

use libloading::Library;
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};

/// The one version whose output is committed: PTX 8.0, which every driver from CUDA 12.0 (525) on understands. Another
/// version writes other text for the same kernels.
pub const VERSION: (c_int, c_int) = (12, 0);

/// Names a library file of [`VERSION`].
pub const VARIABLE: &str = "EMAUDIT_NVRTC";

type Handle = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Handle,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Handle) -> c_int;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;

/// The loaded compiler.
pub struct Nvrtc(Library);

impl Nvrtc {
    /// The compiler that [`VARIABLE`] names; `Err` says why there is none of the right version.
    pub fn find() -> Result<Self, String> {
        let path = std::env::var_os(VARIABLE).ok_or(format!("{VARIABLE} names no libnvrtc.so.12"))?;
        Self::open(Path::new(&path))
    }

    fn open(path: &Path) -> Result<Self, String> {
        // SAFETY: the initialisers of a library that the caller named run, as they would in any program that links it.
        let library = unsafe { Library::new(path) }.map_err(|e| format!("{}: {e}", path.display()))?;
        let nvrtc = Nvrtc(library);
        let (mut major, mut minor) = (0, 0);
        // SAFETY: nvrtcVersion writes two ints.
        let status = unsafe { nvrtc.function::<Version>("nvrtcVersion")(&mut major, &mut minor) };
        if (status, major, minor) != (0, VERSION.0, VERSION.1) {
            return Err(format!(
                "{} is NVRTC {major}.{minor}, not {}.{}",
                path.display(),
                VERSION.0,
                VERSION.1
            ));
        }
        Ok(nvrtc)
    }

    /// # Safety
    /// `T` is the type of the function of that name, as nvrtc.h declares it.
    unsafe fn function<T: Copy>(&self, name: &str) -> T {
        // SAFETY: as above.
        *unsafe { self.0.get::<T>(name) }.unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The PTX of `source` for compute capability `architecture` (75 for 7.5), or the compiler's log.
    pub fn ptx(&self, source: &str, architecture: u32) -> Result<String, String> {
        let (source, name) = (CString::new(source).expect("no zero byte"), c"kernels.cu");
        let options = [format!("--gpu-architecture=compute_{architecture}"), "--fmad=false".to_owned()];
        let options = options.map(|o| CString::new(o).expect("no zero byte"));
        let options = [options[0].as_ptr(), options[1].as_ptr()];
        let mut program = null_mut();
        // SAFETY: the signatures are nvrtc.h's; all strings live until the end of this function; the program is made
        // first, read only while it lives, and destroyed once.
        unsafe {
            let create = self.function::<Create>("nvrtcCreateProgram");
            let made = create(&mut program, source.as_ptr(), name.as_ptr(), 0, null(), null());
            assert_eq!(made, 0, "nvrtcCreateProgram");
            let compiled = self.function::<Compile>("nvrtcCompileProgram")(program, 2, options.as_ptr());
            let result = match compiled {
                0 => Ok(self.text(program, "nvrtcGetPTXSize", "nvrtcGetPTX")),
                _ => Err(self.text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")),
            };
            self.function::<Destroy>("nvrtcDestroyProgram")(&mut program);
            result
        }
    }

    /// # Safety
    /// `program` lives, and the two functions are a pair of nvrtc.h's: the size of a text with its zero, and the text.
    unsafe fn text(&self, program: Handle, size_of: &str, text_of: &str) -> String {
        let mut size = 0usize;
        // SAFETY: the first function writes the size that the second one fills.
        let bytes = unsafe {
            assert_eq!(self.function::<Size>(size_of)(program, &mut size), 0, "{size_of}");
            let mut bytes = vec![0u8; size];
            assert_eq!(self.function::<Text>(text_of)(program, bytes.as_mut_ptr().cast()), 0, "{text_of}");
            bytes
        };
        String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(&bytes)).into_owned()
    }
}
