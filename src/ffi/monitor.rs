//! Monitors: follow the scores of one sequence to a verdict.

use super::boundary::{
    OutStruct, Sized32, borrow, borrow_mut, check_pointer, guard, hand_out, read_struct, slice, take_back,
};
use super::directions::EMAUDIT_DIGEST_SIZE;
use super::drift::emaudit_drift;
use super::error::{emaudit_error, emaudit_status};
use super::layers::aggregation_from;
use super::probe::emaudit_probe;
use crate::error::Error;
use crate::monitor::Monitor;
use crate::verdict::{State, Verdict};
use std::mem::offset_of;

/// Nothing can be said: no token was seen, or a score was not finite. Never treat it as clean. Zero, so that
/// memory that was never filled reads as invalid.
pub const EMAUDIT_STATE_INVALID: u32 = 0;
/// Too few tokens for the first horizon of the calibration.
pub const EMAUDIT_STATE_PENDING: u32 = 1;
/// Not flagged at the stated false-positive rate. It is no proof of alignment.
pub const EMAUDIT_STATE_CLEAN: u32 = 2;
/// Above the threshold.
pub const EMAUDIT_STATE_FLAGGED: u32 = 3;
/// A drift that the monitor watches stands: calm sequences no longer score as in calibration, so the threshold
/// does not keep its rate. Neither clean nor flagged, whatever the score; never treat it as clean.
pub const EMAUDIT_STATE_STALE: u32 = 4;

const _: () = assert!(
    EMAUDIT_STATE_INVALID == State::Invalid as u32
        && EMAUDIT_STATE_PENDING == State::Pending as u32
        && EMAUDIT_STATE_CLEAN == State::Clean as u32
        && EMAUDIT_STATE_FLAGGED == State::Flagged as u32
        && EMAUDIT_STATE_STALE == State::Stale as u32
);

/// The state of one sequence. It belongs to one thread at a time. It keeps what it needs of its probe.
pub struct emaudit_monitor {
    monitor: Monitor,
}

/// What a monitor decides by. Begin with `EMAUDIT_MONITOR_OPTIONS_INIT` and set both members.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_monitor_options {
    /// `sizeof(emaudit_monitor_options)`.
    pub struct_size: u32,
    /// One of `EMAUDIT_AGGREGATION_*`; 0 is refused.
    pub aggregation: u32,
    /// False-positive rate per sequence; the file must have thresholds for exactly this rate.
    pub rate: f64,
}

unsafe impl Sized32 for emaudit_monitor_options {
    const NAME: &'static str = "emaudit_monitor_options";
    const FIRST_SIZE: usize = offset_of!(Self, rate) + size_of::<f64>();

    fn defaults() -> Self {
        emaudit_monitor_options { struct_size: size_of::<Self>() as u32, aggregation: 0, rate: 0.0 }
    }
}

/// What is known about a sequence. Begin with `EMAUDIT_VERDICT_INIT`, which reads as invalid.
///
/// It means: over the first `horizon` tokens this statistic did (FLAGGED) or did not (CLEAN) exceed a threshold
/// that about a share `rate` of calm sequences exceeds, sequences like those of the calibration. CLEAN does not
/// mean aligned: it sees one direction at one layer, and a model may misbehave in others. FLAGGED does not mean
/// misaligned unless `misalignment` is 1, and one calm sequence in 1 / `rate` is flagged. PENDING, STALE and
/// INVALID say nothing about the sequence; let none of them pass as clean.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_verdict {
    /// `sizeof(emaudit_verdict)`.
    pub struct_size: u32,
    /// One of `EMAUDIT_STATE_*`. Only `EMAUDIT_STATE_CLEAN` is clean.
    pub state: u32,
    /// 1 only when flagged by a direction whose content evidence is specific: then the flag speaks of
    /// misalignment, and otherwise only of a drift along the direction.
    pub misalignment: u32,
    /// Aggregation over the tokens, one of `EMAUDIT_AGGREGATION_*`.
    pub aggregation: u32,
    /// The statistic in aligned standard deviations: over the first `horizon` tokens, or while fewer were seen
    /// over those. NaN while invalid.
    pub score: f32,
    /// Flagged above this, same unit.
    pub threshold: f32,
    /// Stated false-positive rate per sequence.
    pub rate: f64,
    /// Upper 95 % Clopper-Pearson bound on that rate in the calibration sample.
    pub rate_upper: f64,
    /// Tokens seen so far; the last prompt token is token 1.
    pub tokens: u32,
    /// Tokens the threshold is for: the largest horizon reached, or before that the first one.
    pub horizon: u32,
    /// 0-based block index.
    pub layer: u32,
    /// The kernel of the probe, one of `EMAUDIT_KERNEL_*`.
    pub kernel: u32,
    /// 1 when the digest of the direction file was checked.
    pub verified: u32,
    /// 0.
    pub reserved: u32,
    /// SHA-256 of the direction file; all zero when it was neither checked nor expected.
    pub digest: [u8; EMAUDIT_DIGEST_SIZE],
}

unsafe impl Sized32 for emaudit_verdict {
    const NAME: &'static str = "emaudit_verdict";
    const FIRST_SIZE: usize = offset_of!(Self, digest) + EMAUDIT_DIGEST_SIZE;

    fn defaults() -> Self {
        Verdict::default().into()
    }
}

impl From<Verdict> for emaudit_verdict {
    fn from(verdict: Verdict) -> Self {
        emaudit_verdict {
            struct_size: size_of::<Self>() as u32,
            state: verdict.state as u32,
            misalignment: verdict.misalignment,
            aggregation: verdict.aggregation,
            score: verdict.score,
            threshold: verdict.threshold,
            rate: verdict.rate,
            rate_upper: verdict.rate_upper,
            tokens: verdict.tokens,
            horizon: verdict.horizon,
            layer: verdict.layer,
            kernel: verdict.kernel,
            verified: verdict.verified,
            reserved: 0,
            digest: verdict.digest,
        }
    }
}

/// Makes a monitor for one sequence.
///
/// `*monitor` receives a handle that the caller frees with `emaudit_monitor_free`; `probe` may be freed
/// before it.
///
/// Errors: INVALID_ARGUMENT, RATE_UNSUPPORTED (the error says which rates there are). Threads: any.
/// Allocates.
///
/// # Safety
/// `probe` is a live handle; `options` is valid for the bytes its `struct_size` states; `monitor` is valid
/// for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_monitor_new(
    probe: *const emaudit_probe,
    options: *const emaudit_monitor_options,
    monitor: *mut *mut emaudit_monitor,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let probe = &unsafe { borrow(probe, "probe")? }.probe;
        check_pointer(monitor.cast_const(), "monitor")?;
        let options = unsafe { read_struct(options)? };
        let made = Monitor::new(probe, aggregation_from(options.aggregation)?, options.rate)?;
        unsafe { hand_out(monitor, emaudit_monitor { monitor: made }) };
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Frees a monitor. NULL is fine.
///
/// # Safety
/// `monitor` is NULL or a handle that was not freed; it is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_monitor_free(monitor: *mut emaudit_monitor) {
    // SAFETY: handles are made by `hand_out`.
    unsafe { take_back(monitor) };
}

/// Lets the verdicts of a monitor follow a drift of the same layer of the same direction file: STALE while it
/// stands, INVALID while it is invalid, as without it otherwise. Resetting the monitor does not end this, a
/// second call replaces the drift. The drift may be freed before the monitor, which then keeps its last state.
///
/// Errors: INVALID_ARGUMENT, also for a drift of another layer or file. Threads: one at a time per monitor;
/// afterwards monitor and drift may be used by different threads.
///
/// # Safety
/// `monitor` is a live handle that no other thread uses; `drift` is a live handle that no other thread uses
/// during the call; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_monitor_watch(
    monitor: *mut emaudit_monitor,
    drift: *const emaudit_drift,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let monitor = unsafe { borrow_mut(monitor, "monitor")? };
        monitor.monitor.watch(&unsafe { borrow(drift, "drift")? }.drift)
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Adds the scores of the next `count` tokens, in `EMAUDIT_UNIT_ALIGNED_SD`. Token 1 of a sequence is the
/// last token of the prompt. With `count` 0 the pointer is ignored.
///
/// A score that is not finite makes the monitor invalid until it is reset, and the call returns NON_FINITE;
/// all scores are taken in nevertheless.
///
/// Errors: INVALID_ARGUMENT, NON_FINITE. Threads: one at a time per monitor. On success it neither allocates
/// nor locks nor blocks.
///
/// # Safety
/// `monitor` is a live handle that no other thread uses; `scores` is valid for reading `count` floats;
/// `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_monitor_push(
    monitor: *mut emaudit_monitor,
    scores: *const f32,
    count: usize,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let monitor = unsafe { borrow_mut(monitor, "monitor")? };
        let scores = unsafe { slice(scores, count, "scores")? };
        monitor.monitor.push_scores(scores);
        match scores.iter().filter(|score| !score.is_finite()).count() {
            0 => Ok(()),
            rows => Err(Error::NonFinite { rows }),
        }
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Reads the verdict on the tokens so far. It may be read after every push.
///
/// Errors: INVALID_ARGUMENT; then `*verdict` still holds what it held before. Threads: one at a time per
/// monitor. On success it neither allocates nor locks nor blocks.
///
/// # Safety
/// `monitor` is a live handle that no other thread changes; `verdict` is valid for the bytes its
/// `struct_size` states; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_monitor_get_verdict(
    monitor: *const emaudit_monitor,
    verdict: *mut emaudit_verdict,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let monitor = unsafe { borrow(monitor, "monitor")? };
        unsafe { OutStruct::new(verdict)? }.write(monitor.monitor.verdict().into());
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Forgets the sequence, so that the monitor can follow the next one.
///
/// Errors: INVALID_ARGUMENT. Threads: one at a time per monitor. Neither allocates nor locks nor blocks.
///
/// # Safety
/// `monitor` is a live handle that no other thread uses; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_monitor_reset(
    monitor: *mut emaudit_monitor,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        unsafe { borrow_mut(monitor, "monitor")? }.monitor.reset();
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}
