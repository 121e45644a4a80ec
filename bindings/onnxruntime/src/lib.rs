//! Custom operators of ONNX Runtime in the domain `emaudit`: `Probe` scores rows, `Steer` scores and edits them.
//!
//! Both take rows `[.., width]` of float32, float16 or bfloat16 and open a direction file by their attributes, when the session is
//! made: a file, a digest or a layer that is not good is an error then, with the library's sentence. See README.md.

mod operators;

use operators::{Probe, Steer};
use ort::AsPointer;
use ort::operator::OperatorDomain;
use std::ffi::CString;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

/// The domain, made once and kept as long as the process, since sessions refer to it.
struct Domain(OperatorDomain);

// SAFETY: it is never changed after it was made, and ONNX Runtime reads it from any thread.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

fn domain() -> Result<&'static Domain, String> {
    static DOMAIN: OnceLock<Result<Domain, String>> = OnceLock::new();
    let make = || -> ort::Result<Domain> {
        let domain = OperatorDomain::new("emaudit")?
            .add(Probe::<f32>(PhantomData))?
            .add(Probe::<half::f16>(PhantomData))?
            .add(Probe::<half::bf16>(PhantomData))?
            .add(Steer::<f32>(PhantomData))?
            .add(Steer::<half::f16>(PhantomData))?
            .add(Steer::<half::bf16>(PhantomData))?;
        Ok(Domain(domain))
    };
    DOMAIN.get_or_init(|| make().map_err(|error| error.to_string())).as_ref().map_err(Clone::clone)
}

/// What a status can be made with where the interface that this library needs is missing: the oldest that ort knows.
const OLDEST_API: u32 = 17;

/// Called by ONNX Runtime when this library is registered (`RegisterCustomOpsLibrary`, `register_custom_ops_library`).
///
/// # Safety
/// - `options` and `base` are those that ONNX Runtime hands over.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn RegisterCustomOps(
    options: *mut ort::sys::OrtSessionOptions,
    base: *const ort::sys::OrtApiBase,
) -> ort::sys::OrtStatusPtr {
    let register = || -> Result<(), String> {
        // SAFETY: the caller's promise.
        let api = unsafe { ((*base).GetApi)(ort::sys::ORT_API_VERSION) };
        if api.is_null() {
            let needed = ort::sys::ORT_API_VERSION;
            return Err(format!("the operators of emaudit need ONNX Runtime 1.{needed} or newer"));
        }
        // SAFETY: not null, and of the version asked for.
        ort::set_api(unsafe { std::ptr::read(api) });
        let domain = domain()?;
        // SAFETY: as above; the domain lives as long as the process.
        let status = unsafe { ((*api).AddCustomOpDomain)(options, domain.0.ptr().cast_mut()) };
        if status.0.is_null() { Ok(()) } else { Err("ONNX Runtime refused the domain `emaudit`".into()) }
    };
    let sentence = match catch_unwind(AssertUnwindSafe(register)) {
        Ok(Ok(())) => return ort::sys::OrtStatusPtr::default(),
        Ok(Err(sentence)) => sentence,
        Err(_) => "internal error (caught panic) in emaudit; please report it".into(),
    };
    let sentence = CString::new(sentence).unwrap_or_default();
    // SAFETY: the caller's promise; every version since the oldest begins alike.
    unsafe {
        let api = ((*base).GetApi)(OLDEST_API);
        ((*api).CreateStatus)(ort::sys::OrtErrorCode::ORT_FAIL, sentence.as_ptr())
    }
}
