//! Kernels by number and by name.

use super::boundary::{check_pointer, copy_list, guard, text};
use super::error::{emaudit_error, emaudit_status};
use crate::error::Result;
use crate::kernel::{self, KernelKind};
use std::ffi::{CStr, c_char};

/// In options: the best kernel this CPU has, or the one the environment variable `EMAUDIT_KERNEL` names.
pub const EMAUDIT_KERNEL_DEFAULT: u32 = 0;
/// The f64-accumulating reference, "scalar".
pub const EMAUDIT_KERNEL_SCALAR: u32 = 1;
/// Vectorised without CPU-specific instructions, "portable".
pub const EMAUDIT_KERNEL_PORTABLE: u32 = 2;
/// x86-64 with AVX2, FMA and F16C, "avx2".
pub const EMAUDIT_KERNEL_AVX2: u32 = 3;
/// x86-64 with AVX-512 F, BW, VL and DQ, "avx512".
pub const EMAUDIT_KERNEL_AVX512: u32 = 4;

/// Number in C and name, as the header states them.
const KERNELS: [(u32, &CStr); 4] = [
    (EMAUDIT_KERNEL_SCALAR, c"scalar"),
    (EMAUDIT_KERNEL_PORTABLE, c"portable"),
    (EMAUDIT_KERNEL_AVX2, c"avx2"),
    (EMAUDIT_KERNEL_AVX512, c"avx512"),
];

const _: () = {
    assert!(KERNELS.len() == KernelKind::ALL.len());
    let mut index = 0;
    while index < KERNELS.len() {
        assert!(KernelKind::ALL[index] as u32 == KERNELS[index].0);
        index += 1;
    }
};

/// The kernel behind a number; `None` for the default.
pub(super) fn kernel_from(number: u32) -> Result<Option<KernelKind>> {
    if number == EMAUDIT_KERNEL_DEFAULT { Ok(None) } else { KernelKind::try_from(number).map(Some) }
}

/// Lists the kernels this CPU can run, slowest first, so the best is the last.
///
/// `kernels` receives at most `capacity` numbers (`EMAUDIT_KERNEL_*`); `*count` receives how many there are.
/// With `capacity` 0 the pointer is ignored.
///
/// Errors: INVALID_ARGUMENT. Threads: any.
///
/// # Safety
/// `kernels` is valid for writing `capacity` elements, `count` for one; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_kernel_list(
    kernels: *mut u32,
    capacity: usize,
    count: *mut usize,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let numbers: Vec<u32> = kernel::available().iter().map(|kind| *kind as u32).collect();
        unsafe { copy_list(&numbers, kernels, capacity, count, "kernels") }
    };
    // SAFETY: `error` by the contract above, the arrays likewise.
    unsafe { guard(error, body) }
}

/// The name of a kernel, such as "avx2"; "unknown" for a number this version does not have.
/// Static, NUL-terminated, never NULL, never freed.
///
/// Threads: any. Never fails.
#[unsafe(no_mangle)]
pub extern "C" fn emaudit_kernel_name(kernel: u32) -> *const c_char {
    let known = KERNELS.iter().find(|entry| entry.0 == kernel);
    known.map_or(c"unknown", |entry| entry.1).as_ptr()
}

/// Finds the number of a kernel by its name, such as "avx2". The kernel may still be unavailable here.
///
/// Errors: INVALID_ARGUMENT, KERNEL_UNAVAILABLE for a name this version does not have. Threads: any.
///
/// # Safety
/// `name` is NUL-terminated, `kernel` valid for writing, `error` NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_kernel_from_name(
    name: *const c_char,
    kernel: *mut u32,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        check_pointer(kernel.cast_const(), "kernel")?;
        let kind: KernelKind = unsafe { text(name, "name")? }.parse()?;
        // SAFETY: checked above, writable by the contract.
        unsafe { kernel.write(kind as u32) };
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}
