//! Statuses and the sentence behind a status.

use super::boundary::take_back;
use crate::error::{Error, Status};
use std::ffi::{CStr, CString, c_char};

/// Outcome of a call: one of the `EMAUDIT_STATUS_*` numbers. Numbers never move; new ones may be added, so
/// treat every non-zero status that you do not know as a failure.
pub type emaudit_status = i32;

/// The call did what it says.
pub const EMAUDIT_STATUS_OK: i32 = 0;
/// A NULL pointer, a number that is no member of its enum, a wrong `struct_size`, overlapping arguments.
/// Nothing was read or written beyond the check.
pub const EMAUDIT_STATUS_INVALID_ARGUMENT: i32 = 1;
/// The operating system refused a file operation.
pub const EMAUDIT_STATUS_IO: i32 = 2;
/// The bytes are not an emaudit direction file at all.
pub const EMAUDIT_STATUS_NOT_A_DIRECTION_FILE: i32 = 3;
/// The file ends before its header says it does.
pub const EMAUDIT_STATUS_TRUNCATED: i32 = 4;
/// The container breaks a rule of the format (duplicate key, overlap, hole, misalignment, ...).
pub const EMAUDIT_STATUS_MALFORMED: i32 = 5;
/// The file needs a newer reader.
pub const EMAUDIT_STATUS_UNSUPPORTED_VERSION: i32 = 6;
/// The bytes do not have the digest they state, or the digest the caller expects.
pub const EMAUDIT_STATUS_DIGEST_MISMATCH: i32 = 7;
/// The metadata contradicts itself or the tensors.
pub const EMAUDIT_STATUS_SCHEMA: i32 = 8;
/// The directions were made for another model.
pub const EMAUDIT_STATUS_MODEL_MISMATCH: i32 = 9;
/// The rows do not have the width of the direction.
pub const EMAUDIT_STATUS_WIDTH_MISMATCH: i32 = 10;
/// The file holds no direction for that layer.
pub const EMAUDIT_STATUS_LAYER_NOT_FOUND: i32 = 11;
/// At least one row held a NaN or an infinity. Those rows are flagged and untouched; all other rows were
/// scored and steered, and their results were written.
pub const EMAUDIT_STATUS_NON_FINITE: i32 = 12;
/// Steering with a direction whose causal evidence is not `specific`, without the explicit flag.
pub const EMAUDIT_STATUS_NOT_SPECIFIC: i32 = 13;
/// The calibration sample cannot support the false-positive rate asked for.
pub const EMAUDIT_STATUS_RATE_UNSUPPORTED: i32 = 14;
/// This CPU (or build) does not have the kernel asked for.
pub const EMAUDIT_STATUS_KERNEL_UNAVAILABLE: i32 = 15;
/// A caught panic: a defect of the library, never the caller's fault. Nothing may be concluded from any
/// output of the call; a handle it could have changed should be freed.
pub const EMAUDIT_STATUS_PANIC: i32 = 16;
/// A trusted key was given and the file has no signature.
pub const EMAUDIT_STATUS_UNSIGNED: i32 = 17;
/// The signature does not fit the file, or is none.
pub const EMAUDIT_STATUS_BAD_SIGNATURE: i32 = 18;
/// The file is signed, but not with the trusted key.
pub const EMAUDIT_STATUS_UNTRUSTED_KEY: i32 = 19;
/// Rows read back after steering are not where the edit should have put them, or the edit is too small for
/// their dtype to show. The report and the deviations were written.
pub const EMAUDIT_STATUS_NOT_LANDED: i32 = 20;
/// A score in aligned standard deviations, a gate or a clamp from a layer without calibration (imported
/// directions). Raw scores and ungated subtraction work.
pub const EMAUDIT_STATUS_NOT_CALIBRATED: i32 = 21;
/// An audit log whose chain of hashes does not hold, or that an earlier failed write left incomplete.
pub const EMAUDIT_STATUS_BROKEN_LOG: i32 = 22;
/// No GPU can be used: no driver, no card, or a library that was built without its support.
pub const EMAUDIT_STATUS_DEVICE_UNAVAILABLE: i32 = 23;
/// The GPU's driver refused what it was asked for; the sentence has its name for the error.
pub const EMAUDIT_STATUS_DEVICE: i32 = 24;

/// Rust status, its number in C, and its name.
const STATUSES: [(Status, i32, &CStr); 25] = [
    (Status::Ok, EMAUDIT_STATUS_OK, c"OK"),
    (Status::InvalidArgument, EMAUDIT_STATUS_INVALID_ARGUMENT, c"INVALID_ARGUMENT"),
    (Status::Io, EMAUDIT_STATUS_IO, c"IO"),
    (Status::NotADirectionFile, EMAUDIT_STATUS_NOT_A_DIRECTION_FILE, c"NOT_A_DIRECTION_FILE"),
    (Status::Truncated, EMAUDIT_STATUS_TRUNCATED, c"TRUNCATED"),
    (Status::Malformed, EMAUDIT_STATUS_MALFORMED, c"MALFORMED"),
    (Status::UnsupportedVersion, EMAUDIT_STATUS_UNSUPPORTED_VERSION, c"UNSUPPORTED_VERSION"),
    (Status::DigestMismatch, EMAUDIT_STATUS_DIGEST_MISMATCH, c"DIGEST_MISMATCH"),
    (Status::Schema, EMAUDIT_STATUS_SCHEMA, c"SCHEMA"),
    (Status::ModelMismatch, EMAUDIT_STATUS_MODEL_MISMATCH, c"MODEL_MISMATCH"),
    (Status::WidthMismatch, EMAUDIT_STATUS_WIDTH_MISMATCH, c"WIDTH_MISMATCH"),
    (Status::LayerNotFound, EMAUDIT_STATUS_LAYER_NOT_FOUND, c"LAYER_NOT_FOUND"),
    (Status::NonFinite, EMAUDIT_STATUS_NON_FINITE, c"NON_FINITE"),
    (Status::NotSpecific, EMAUDIT_STATUS_NOT_SPECIFIC, c"NOT_SPECIFIC"),
    (Status::RateUnsupported, EMAUDIT_STATUS_RATE_UNSUPPORTED, c"RATE_UNSUPPORTED"),
    (Status::KernelUnavailable, EMAUDIT_STATUS_KERNEL_UNAVAILABLE, c"KERNEL_UNAVAILABLE"),
    (Status::Panic, EMAUDIT_STATUS_PANIC, c"PANIC"),
    (Status::Unsigned, EMAUDIT_STATUS_UNSIGNED, c"UNSIGNED"),
    (Status::BadSignature, EMAUDIT_STATUS_BAD_SIGNATURE, c"BAD_SIGNATURE"),
    (Status::UntrustedKey, EMAUDIT_STATUS_UNTRUSTED_KEY, c"UNTRUSTED_KEY"),
    (Status::NotLanded, EMAUDIT_STATUS_NOT_LANDED, c"NOT_LANDED"),
    (Status::NotCalibrated, EMAUDIT_STATUS_NOT_CALIBRATED, c"NOT_CALIBRATED"),
    (Status::BrokenLog, EMAUDIT_STATUS_BROKEN_LOG, c"BROKEN_LOG"),
    (Status::DeviceUnavailable, EMAUDIT_STATUS_DEVICE_UNAVAILABLE, c"DEVICE_UNAVAILABLE"),
    (Status::Device, EMAUDIT_STATUS_DEVICE, c"DEVICE"),
];

// The numbers above and those of `Status` are one set, in order and without a gap.
const _: () = {
    let mut index = 0;
    while index < STATUSES.len() {
        assert!(STATUSES[index].0 as i32 == STATUSES[index].1 && STATUSES[index].1 == index as i32);
        index += 1;
    }
};

/// The sentence behind a failed call. Owned by the caller of the function that filled it.
///
/// Every function that takes `emaudit_error **error` accepts NULL there, because the status is always
/// sufficient. Otherwise `*error` is always written: NULL on success, on failure a new object that the
/// caller frees with `emaudit_error_free`. The old value is overwritten, not freed. Making the object
/// allocates, so pass NULL where a failing call must not.
///
/// Threads: an error belongs to nobody; use it from any one thread at a time.
pub struct emaudit_error {
    status: emaudit_status,
    message: CString,
}

impl emaudit_error {
    /// Heap-allocates the object for `error`.
    pub(super) fn boxed(error: Error) -> *mut emaudit_error {
        let text = error.to_string().replace('\0', "\\0");
        let message = CString::new(text).unwrap_or_default();
        Box::into_raw(Box::new(emaudit_error { status: error.status() as emaudit_status, message }))
    }
}

/// The name of a status, such as "TRUNCATED"; "UNKNOWN" for a number this version does not have.
/// Static, NUL-terminated, never NULL, never freed.
///
/// Threads: any. Never fails.
#[unsafe(no_mangle)]
pub extern "C" fn emaudit_status_name(status: emaudit_status) -> *const c_char {
    let known = STATUSES.iter().find(|entry| entry.1 == status);
    known.map_or(c"UNKNOWN", |entry| entry.2).as_ptr()
}

/// The status of the failed call; `EMAUDIT_STATUS_OK` for NULL.
///
/// # Safety
/// `error` is NULL or an error that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_error_status(error: *const emaudit_error) -> emaudit_status {
    // SAFETY: by the contract above.
    unsafe { error.as_ref() }.map_or(EMAUDIT_STATUS_OK, |error| error.status)
}

/// What went wrong, in one English sentence for people (UTF-8, NUL-terminated); "" for NULL. It lives until
/// the error is freed. The wording may change between versions: decide by the status.
///
/// # Safety
/// `error` is NULL or an error that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_error_message(error: *const emaudit_error) -> *const c_char {
    // SAFETY: by the contract above.
    unsafe { error.as_ref() }.map_or(c"".as_ptr(), |error| error.message.as_ptr())
}

/// Frees an error. NULL is fine.
///
/// # Safety
/// `error` is NULL or an error that was not freed; it is not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_error_free(error: *mut emaudit_error) {
    // SAFETY: errors are made by `Box::into_raw` in `boxed`.
    unsafe { take_back(error) };
}
