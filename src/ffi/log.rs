//! Audit logs: verdicts in a file, as lines of JSON that are chained by their hashes.

use super::boundary::{
    OutStruct, Sized32, borrow, borrow_mut, check_pointer, flag, guard, hand_out, invalid, read_struct,
    take_back, text,
};
use super::directions::EMAUDIT_DIGEST_SIZE;
use super::error::{emaudit_error, emaudit_status};
use super::monitor::emaudit_verdict;
use crate::error::Result;
use crate::log::AuditLog;
use crate::verdict::{State, Verdict};
use std::ffi::c_char;
use std::mem::offset_of;
use std::path::Path;

/// A log that is open for appending; there is one writer to a file. It belongs to one thread at a time.
pub struct emaudit_log {
    log: AuditLog,
}

/// How far a log has come. Begin with `EMAUDIT_LOG_INFO_INIT`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_log_info {
    /// `sizeof(emaudit_log_info)`.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Lines in the log.
    pub records: u64,
    /// Hash of the last line, zeros in an empty log. Kept elsewhere, it shows a log that was cut or written anew
    /// (`emaudit log verify FILE --head HASH`).
    pub head: [u8; EMAUDIT_DIGEST_SIZE],
}

unsafe impl Sized32 for emaudit_log_info {
    const NAME: &'static str = "emaudit_log_info";
    const FIRST_SIZE: usize = offset_of!(Self, head) + EMAUDIT_DIGEST_SIZE;

    fn defaults() -> Self {
        let struct_size = size_of::<Self>() as u32;
        emaudit_log_info { struct_size, reserved: 0, records: 0, head: [0; EMAUDIT_DIGEST_SIZE] }
    }
}

fn verdict_from(raw: &emaudit_verdict) -> Result<Verdict> {
    let states = [State::Invalid, State::Pending, State::Clean, State::Flagged, State::Stale];
    let state = states.into_iter().find(|state| *state as u32 == raw.state);
    Ok(Verdict {
        state: state.ok_or_else(|| invalid(format!("{} is no state of a verdict", raw.state)))?,
        misalignment: raw.misalignment,
        score: raw.score,
        threshold: raw.threshold,
        rate: raw.rate,
        rate_upper: raw.rate_upper,
        tokens: raw.tokens,
        horizon: raw.horizon,
        layer: raw.layer,
        kernel: raw.kernel,
        verified: raw.verified,
        aggregation: raw.aggregation,
        digest: raw.digest,
    })
}

/// Opens an audit log to append to, and makes it where there is none. All of its chain is verified first.
///
/// `*log` receives a handle that the caller frees with `emaudit_log_free`. `path` is UTF-8.
///
/// Errors: INVALID_ARGUMENT, IO (also while another process has it open), BROKEN_LOG. Threads: any. Allocates and
/// reads the file.
///
/// # Safety
/// `path` is a NUL-terminated string; `log` is valid for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_log_open(
    path: *const c_char,
    log: *mut *mut emaudit_log,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let path = unsafe { text(path, "path")? };
        check_pointer(log.cast_const(), "log")?;
        let opened = AuditLog::open(Path::new(path))?;
        unsafe { hand_out(log, emaudit_log { log: opened }) };
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Frees a log and closes its file. NULL is fine.
///
/// # Safety
/// `log` is NULL or a handle that was not freed; it is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_log_free(log: *mut emaudit_log) {
    // SAFETY: handles are made by `hand_out`.
    unsafe { take_back(log) };
}

/// Adds the verdict on a sequence, whose name (UTF-8, at most 4096 bytes) is the caller's, with the time of this
/// moment. The line is handed to the operating system whole; `sync` 1 waits until the device has it.
///
/// Errors: INVALID_ARGUMENT, IO; after a failed write always BROKEN_LOG. Threads: one at a time per log. Allocates
/// and writes: not for the path of tokens.
///
/// # Safety
/// `log` is a live handle that no other thread uses; `sequence` is a NUL-terminated string; `verdict` is valid for
/// the bytes its `struct_size` states; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_log_append(
    log: *mut emaudit_log,
    sequence: *const c_char,
    verdict: *const emaudit_verdict,
    sync: u32,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let log = &mut unsafe { borrow_mut(log, "log")? }.log;
        let sequence = unsafe { text(sequence, "sequence")? };
        let verdict = verdict_from(&unsafe { read_struct(verdict)? })?;
        let sync = flag(sync, "sync")?;
        log.append(sequence, &verdict)?;
        if sync { log.sync() } else { Ok(()) }
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Reads how many lines there are and the hash of the last one.
///
/// Errors: INVALID_ARGUMENT. Threads: one at a time per log. On success it neither allocates nor locks nor blocks.
///
/// # Safety
/// `log` is a live handle that no other thread changes; `info` is valid for the bytes its `struct_size` states;
/// `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_log_get_info(
    log: *const emaudit_log,
    info: *mut emaudit_log_info,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let log = &unsafe { borrow(log, "log")? }.log;
        let found =
            emaudit_log_info { records: log.records(), head: log.head(), ..emaudit_log_info::defaults() };
        unsafe { OutStruct::new(info)? }.write(found);
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}
