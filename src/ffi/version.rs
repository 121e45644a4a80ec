//! Which library this is.

use std::ffi::c_char;

/// The ABI major this header describes. Within one major, structs and enums only grow at their ends and
/// functions are only added. The shared library's SONAME ends in it.
pub const EMAUDIT_ABI_VERSION: u32 = 1;

/// The ABI major of the library that was loaded. Compare it with `EMAUDIT_ABI_VERSION` of the header that
/// was compiled against before any other call when the library is loaded at run time.
///
/// Threads: any. Never fails.
#[unsafe(no_mangle)]
pub extern "C" fn emaudit_abi_version() -> u32 {
    EMAUDIT_ABI_VERSION
}

/// The library's version, such as "0.1.0". Static, NUL-terminated, never NULL, never freed.
///
/// Threads: any. Never fails.
#[unsafe(no_mangle)]
pub extern "C" fn emaudit_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
