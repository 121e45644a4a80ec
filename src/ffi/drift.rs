//! Drifts: is the aligned distribution still the one of the calibration?

use super::boundary::{
    OutStruct, Sized32, borrow, borrow_mut, check_pointer, guard, hand_out, read_struct, slice, take_back,
};
use super::error::{emaudit_error, emaudit_status};
use super::probe::emaudit_probe;
use crate::drift::{Drift, DriftReport, DriftState};
use crate::error::Error;
use std::mem::offset_of;

/// A reference score was not finite: nothing can be said until the drift is reset.
pub const EMAUDIT_DRIFT_INVALID: u32 = 0;
/// No window is full yet.
pub const EMAUDIT_DRIFT_PENDING: u32 = 1;
/// The last full window lies where the calibration says. It is no proof that nothing changed.
pub const EMAUDIT_DRIFT_STEADY: u32 = 2;
/// The last full window does not: the thresholds no longer keep their rate. Calibrate again.
pub const EMAUDIT_DRIFT_DRIFTED: u32 = 3;

const _: () = assert!(
    EMAUDIT_DRIFT_INVALID == DriftState::Invalid as u32
        && EMAUDIT_DRIFT_PENDING == DriftState::Pending as u32
        && EMAUDIT_DRIFT_STEADY == DriftState::Steady as u32
        && EMAUDIT_DRIFT_DRIFTED == DriftState::Drifted as u32
);

/// Watches the aligned distribution itself, on sequences that the caller vouches for as calm: canary prompts,
/// or traffic of the approved model. One thread at a time uses it; monitors on any threads watch it.
///
/// After every `window` sequences the shares of scores up to the quantiles of the file are compared with what
/// the calibration allows: an exact test, whatever the distribution, that counts the uncertainty of the window
/// and that of the calibration: over calibrations and windows it alarms falsely with a probability of at most
/// `rate`. The windows of one file share its calibration, so after an unlucky one false alarms come together.
/// Sequences are alike when model and prompts are: where the prompts changed it reports a drift too, and the
/// thresholds do not hold either.
///
/// With 400 calibration sequences, rate 0.01 and normal scores, a window of 100 sees a shift of the mean by
/// 0.65 aligned standard deviations in 9 of 10 cases, one of 400 a shift by 0.38.
pub struct emaudit_drift {
    pub(super) drift: Drift,
}

/// What a drift decides by. Begin with `EMAUDIT_DRIFT_OPTIONS_INIT` and set both members.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_drift_options {
    /// `sizeof(emaudit_drift_options)`.
    pub struct_size: u32,
    /// Reference sequences per window, from 1 to 2^20; a window too small to ever alarm is refused.
    pub window: u32,
    /// False-alarm rate per window; above 0 and below 1.
    pub rate: f64,
}

unsafe impl Sized32 for emaudit_drift_options {
    const NAME: &'static str = "emaudit_drift_options";
    const FIRST_SIZE: usize = offset_of!(Self, rate) + size_of::<f64>();

    fn defaults() -> Self {
        emaudit_drift_options { struct_size: size_of::<Self>() as u32, window: 0, rate: 0.0 }
    }
}

/// What a drift found. Begin with `EMAUDIT_DRIFT_REPORT_INIT`, which reads as invalid. `probability` to
/// `highest` describe the quantile of the file at which the last full window stood out most; they are NaN
/// before the first full window.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_drift_report {
    /// `sizeof(emaudit_drift_report)`.
    pub struct_size: u32,
    /// One of `EMAUDIT_DRIFT_*`.
    pub state: u32,
    /// Reference sequences per window.
    pub window: u32,
    /// Sequences in the window that is being filled.
    pub sequences: u32,
    /// Full windows so far.
    pub windows: u64,
    /// Stated false-alarm rate per window.
    pub rate: f64,
    /// Probability of the quantile.
    pub probability: f64,
    /// Its score in aligned standard deviations.
    pub z: f64,
    /// Share of the window at or below that score.
    pub share: f64,
    /// Lowest steady share.
    pub lowest: f64,
    /// Highest steady share.
    pub highest: f64,
}

unsafe impl Sized32 for emaudit_drift_report {
    const NAME: &'static str = "emaudit_drift_report";
    const FIRST_SIZE: usize = offset_of!(Self, highest) + size_of::<f64>();

    fn defaults() -> Self {
        emaudit_drift_report {
            struct_size: size_of::<Self>() as u32,
            state: EMAUDIT_DRIFT_INVALID,
            window: 0,
            sequences: 0,
            windows: 0,
            rate: 0.0,
            probability: 0.0,
            z: 0.0,
            share: 0.0,
            lowest: 0.0,
            highest: 0.0,
        }
    }
}

impl From<DriftReport> for emaudit_drift_report {
    fn from(report: DriftReport) -> Self {
        emaudit_drift_report {
            struct_size: size_of::<Self>() as u32,
            state: report.state as u32,
            window: report.window,
            sequences: report.sequences,
            windows: report.windows,
            rate: report.rate,
            probability: report.probability,
            z: report.z,
            share: report.share,
            lowest: report.lowest,
            highest: report.highest,
        }
    }
}

/// Makes a drift for the layer of a probe.
///
/// `*drift` receives a handle that the caller frees with `emaudit_drift_free`; `probe` may be freed before it.
///
/// Errors: INVALID_ARGUMENT; RATE_UNSUPPORTED when the file has no quantiles, or the window is too small to
/// ever alarm at that rate (the error says which is not). Threads: any. Allocates.
///
/// # Safety
/// `probe` is a live handle; `options` is valid for the bytes its `struct_size` states; `drift` is valid for
/// writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_drift_new(
    probe: *const emaudit_probe,
    options: *const emaudit_drift_options,
    drift: *mut *mut emaudit_drift,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let probe = &unsafe { borrow(probe, "probe")? }.probe;
        check_pointer(drift.cast_const(), "drift")?;
        let options = unsafe { read_struct(options)? };
        let made = Drift::new(probe, options.window, options.rate)?;
        unsafe { hand_out(drift, emaudit_drift { drift: made }) };
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Frees a drift. NULL is fine. Monitors that watch it live on and keep its last state.
///
/// # Safety
/// `drift` is NULL or a handle that was not freed and that no other thread uses; it is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_drift_free(drift: *mut emaudit_drift) {
    // SAFETY: handles are made by `hand_out`.
    unsafe { take_back(drift) };
}

/// Adds the scores of the next `count` calm sequences: one score each, that of the last token of the prompt,
/// in `EMAUDIT_UNIT_ALIGNED_SD`. With `count` 0 the pointer is ignored.
///
/// A score that is not finite makes the drift, and every monitor that watches it, invalid until the drift is
/// reset, and the call returns NON_FINITE.
///
/// Errors: INVALID_ARGUMENT, NON_FINITE. Threads: one at a time per drift; monitors that watch it may be used
/// meanwhile. On success it neither allocates nor locks nor blocks.
///
/// # Safety
/// `drift` is a live handle that no other thread uses; `scores` is valid for reading `count` floats; `error`
/// is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_drift_push(
    drift: *mut emaudit_drift,
    scores: *const f32,
    count: usize,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let drift = unsafe { borrow_mut(drift, "drift")? };
        let scores = unsafe { slice(scores, count, "scores")? };
        drift.drift.push_scores(scores);
        match scores.iter().filter(|score| !score.is_finite()).count() {
            0 => Ok(()),
            rows => Err(Error::NonFinite { rows }),
        }
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Reads what the drift found so far.
///
/// Errors: INVALID_ARGUMENT. Threads: one at a time per drift. On success it neither allocates nor locks nor
/// blocks.
///
/// # Safety
/// `drift` is a live handle that no other thread changes; `report` is valid for the bytes its `struct_size`
/// states; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_drift_get_report(
    drift: *const emaudit_drift,
    report: *mut emaudit_drift_report,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let drift = unsafe { borrow(drift, "drift")? };
        unsafe { OutStruct::new(report)? }.write(drift.drift.report().into());
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Forgets all windows. The monitors that watch it see it pending again.
///
/// Errors: INVALID_ARGUMENT. Threads: one at a time per drift. Neither allocates nor locks nor blocks.
///
/// # Safety
/// `drift` is a live handle that no other thread uses; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_drift_reset(
    drift: *mut emaudit_drift,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        unsafe { borrow_mut(drift, "drift")? }.drift.reset();
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}
