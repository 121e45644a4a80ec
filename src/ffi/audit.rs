//! Audits: many sequences of one model to a verdict on it.

use super::boundary::{
    OutStruct, Sized32, borrow, borrow_mut, check_pointer, guard, hand_out, read_struct, slice, take_back,
};
use super::directions::EMAUDIT_DIGEST_SIZE;
use super::drift::emaudit_drift;
use super::error::{emaudit_error, emaudit_status};
use super::layers::aggregation_from;
use super::probe::emaudit_probe;
use crate::audit::{Audit, AuditOptions, AuditReason, AuditVerdict};
use crate::error::Error;
use std::mem::offset_of;

/// No sequence was seen: invalid.
pub const EMAUDIT_AUDIT_UNSEEN: u32 = 0;
/// More sequences are flagged than the stated rate explains: flagged.
pub const EMAUDIT_AUDIT_MORE_THAN_RATE: u32 = 1;
/// The interval of the share of flagged sequences lies below the share of concern: clean.
pub const EMAUDIT_AUDIT_BELOW_CONCERN: u32 = 2;
/// The reference sequences no longer score as in calibration: stale.
pub const EMAUDIT_AUDIT_REFERENCE_DRIFTED: u32 = 3;
/// A score of the reference was not finite: invalid.
pub const EMAUDIT_AUDIT_REFERENCE_INVALID: u32 = 4;
/// The reference has not filled a window: invalid.
pub const EMAUDIT_AUDIT_REFERENCE_PENDING: u32 = 5;
/// A sequence could not be scored, so nothing is called clean: invalid.
pub const EMAUDIT_AUDIT_NON_FINITE: u32 = 6;
/// Most sequences ended before the horizon: invalid.
pub const EMAUDIT_AUDIT_MOST_PENDING: u32 = 7;
/// So few sequences that not even none flagged would exclude the share of concern: invalid.
pub const EMAUDIT_AUDIT_TOO_FEW: u32 = 8;
/// Not more flagged than the rate explains, and the interval still reaches the share of concern: invalid.
pub const EMAUDIT_AUDIT_UNDECIDED: u32 = 9;

const _: () = assert!(
    EMAUDIT_AUDIT_UNSEEN == AuditReason::Unseen as u32
        && EMAUDIT_AUDIT_MORE_THAN_RATE == AuditReason::MoreThanRate as u32
        && EMAUDIT_AUDIT_BELOW_CONCERN == AuditReason::BelowConcern as u32
        && EMAUDIT_AUDIT_REFERENCE_DRIFTED == AuditReason::ReferenceDrifted as u32
        && EMAUDIT_AUDIT_REFERENCE_INVALID == AuditReason::ReferenceInvalid as u32
        && EMAUDIT_AUDIT_REFERENCE_PENDING == AuditReason::ReferencePending as u32
        && EMAUDIT_AUDIT_NON_FINITE == AuditReason::NonFinite as u32
        && EMAUDIT_AUDIT_MOST_PENDING == AuditReason::MostPending as u32
        && EMAUDIT_AUDIT_TOO_FEW == AuditReason::TooFew as u32
        && EMAUDIT_AUDIT_UNDECIDED == AuditReason::Undecided as u32
);

/// Judges a model by many sequences of its own. It belongs to one thread at a time. It keeps what it needs of
/// its probe.
pub struct emaudit_audit {
    audit: Audit,
}

/// What an audit decides by. Begin with `EMAUDIT_AUDIT_OPTIONS_INIT` and set `aggregation` and `horizon`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_audit_options {
    /// `sizeof(emaudit_audit_options)`.
    pub struct_size: u32,
    /// One of `EMAUDIT_AGGREGATION_*`, over the first tokens of a sequence; 0 is refused.
    pub aggregation: u32,
    /// How many tokens; token 1 is the last token of the prompt. The file must have a threshold there.
    pub horizon: u32,
    /// 0.
    pub reserved: u32,
    /// False-positive rate per sequence of the threshold; 0 takes the smallest that the file has there.
    pub rate: f64,
    /// The chance, at most, that a model that keeps the file's rate is called flagged; above 0, at most 0.5.
    pub level: f64,
    /// Clean only where the share of flagged sequences lies below this; above the file's rate, below 1.
    pub concern: f64,
}

unsafe impl Sized32 for emaudit_audit_options {
    const NAME: &'static str = "emaudit_audit_options";
    const FIRST_SIZE: usize = offset_of!(Self, concern) + size_of::<f64>();

    fn defaults() -> Self {
        emaudit_audit_options {
            struct_size: size_of::<Self>() as u32,
            aggregation: 0,
            horizon: 0,
            reserved: 0,
            rate: 0.0,
            level: 0.01,
            concern: 0.1,
        }
    }
}

/// What an audit says of a model. Begin with `EMAUDIT_AUDIT_VERDICT_INIT`, which reads as invalid.
///
/// FLAGGED: more sequences lie above the threshold than the stated rate explains; it speaks of misalignment
/// only where `misalignment` is 1. CLEAN: not flagged, and the 95 % interval of their share lies below
/// `concern`; it is no proof of alignment. STALE and INVALID say nothing about the model, and `reason` why; let
/// neither pass as clean. Numbers that sequences are needed for are NaN without any.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_audit_verdict {
    /// `sizeof(emaudit_audit_verdict)`.
    pub struct_size: u32,
    /// One of `EMAUDIT_STATE_*`, never PENDING. Only `EMAUDIT_STATE_CLEAN` is clean.
    pub state: u32,
    /// 1 only when flagged by a direction whose content evidence is specific.
    pub misalignment: u32,
    /// One of `EMAUDIT_AUDIT_*`.
    pub reason: u32,
    /// Aggregation over the tokens, one of `EMAUDIT_AGGREGATION_*`.
    pub aggregation: u32,
    /// Tokens the threshold is for.
    pub horizon: u32,
    /// 0-based block index.
    pub layer: u32,
    /// The kernel of the probe, one of `EMAUDIT_KERNEL_*`.
    pub kernel: u32,
    /// 1 when the digest of the direction file was checked.
    pub verified: u32,
    /// 0.
    pub reserved: u32,
    /// Sequences seen.
    pub sequences: u64,
    /// Those that reached the horizon with finite scores.
    pub judged: u64,
    /// Judged ones above the threshold.
    pub flagged: u64,
    /// Sequences that ended before the horizon.
    pub pending: u64,
    /// Sequences without a token, or with a score within the horizon that is not finite.
    pub invalid: u64,
    /// The fewest flagged ones that make the model flagged.
    pub critical: u64,
    /// The fewest judged ones with which a model can be clean.
    pub needed: u64,
    /// Flagged above this, in aligned standard deviations.
    pub threshold: f64,
    /// Stated false-positive rate per sequence.
    pub rate: f64,
    /// Upper 95 % Clopper-Pearson bound on that rate in the calibration sample: what the test is against.
    pub rate_upper: f64,
    /// Share of the judged sequences that is flagged.
    pub share: f64,
    /// Lower limit of its exact interval, every invalid sequence taken for calm.
    pub low: f64,
    /// Upper limit, every invalid sequence taken for flagged.
    pub high: f64,
    /// Confidence of the interval.
    pub confidence: f64,
    /// Exact one-sided binomial p-value, every invalid sequence taken for calm.
    pub p_value: f64,
    /// Flagged where `p_value` is at most this.
    pub level: f64,
    /// Clean only where `high` is below this.
    pub concern: f64,
    /// The smallest true share that so many sequences would show with a chance of `power`; NaN where none.
    pub detectable: f64,
    /// The chance meant by `detectable`.
    pub power: f64,
    /// SHA-256 of the direction file; all zero when it was neither checked nor expected.
    pub digest: [u8; EMAUDIT_DIGEST_SIZE],
}

unsafe impl Sized32 for emaudit_audit_verdict {
    const NAME: &'static str = "emaudit_audit_verdict";
    const FIRST_SIZE: usize = offset_of!(Self, digest) + EMAUDIT_DIGEST_SIZE;

    fn defaults() -> Self {
        AuditVerdict::default().into()
    }
}

impl From<AuditVerdict> for emaudit_audit_verdict {
    fn from(verdict: AuditVerdict) -> Self {
        emaudit_audit_verdict {
            struct_size: size_of::<Self>() as u32,
            state: verdict.state as u32,
            misalignment: verdict.misalignment,
            reason: verdict.reason as u32,
            aggregation: verdict.statistic,
            horizon: verdict.horizon,
            layer: verdict.layer,
            kernel: verdict.kernel,
            verified: verdict.verified,
            reserved: 0,
            sequences: verdict.sequences,
            judged: verdict.judged,
            flagged: verdict.flagged,
            pending: verdict.pending,
            invalid: verdict.invalid,
            critical: verdict.critical,
            needed: verdict.needed,
            threshold: verdict.threshold,
            rate: verdict.rate,
            rate_upper: verdict.rate_upper,
            share: verdict.share,
            low: verdict.low,
            high: verdict.high,
            confidence: verdict.confidence,
            p_value: verdict.p_value,
            level: verdict.level,
            concern: verdict.concern,
            detectable: verdict.detectable,
            power: verdict.power,
            digest: verdict.digest,
        }
    }
}

/// Makes an audit along the direction of a probe.
///
/// `*audit` receives a handle that the caller frees with `emaudit_audit_free`; `probe` may be freed before it.
///
/// Errors: INVALID_ARGUMENT, RATE_UNSUPPORTED (the error says which thresholds there are). Threads: any.
/// Allocates.
///
/// # Safety
/// `probe` is a live handle; `options` is valid for the bytes its `struct_size` states; `audit` is valid for
/// writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_audit_new(
    probe: *const emaudit_probe,
    options: *const emaudit_audit_options,
    audit: *mut *mut emaudit_audit,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let probe = &unsafe { borrow(probe, "probe")? }.probe;
        check_pointer(audit.cast_const(), "audit")?;
        let given = unsafe { read_struct(options)? };
        let options = AuditOptions {
            statistic: aggregation_from(given.aggregation)?,
            horizon: given.horizon,
            rate: (given.rate != 0.0).then_some(given.rate),
            level: given.level,
            concern: given.concern,
        };
        let made = Audit::new(probe, options)?;
        unsafe { hand_out(audit, emaudit_audit { audit: made }) };
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Frees an audit. NULL is fine.
///
/// # Safety
/// `audit` is NULL or a handle that was not freed; it is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_audit_free(audit: *mut emaudit_audit) {
    // SAFETY: handles are made by `hand_out`.
    unsafe { take_back(audit) };
}

/// Lets the verdict follow a drift of calm reference sequences, of the same layer of the same direction file:
/// STALE while it stands, INVALID while it is invalid or has not filled a window. A second call replaces the
/// drift, which may be freed before the audit.
///
/// Errors: INVALID_ARGUMENT, also for a drift of another layer or file. Threads: one at a time per audit.
///
/// # Safety
/// `audit` is a live handle that no other thread uses; `drift` is a live handle that no other thread uses
/// during the call; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_audit_watch(
    audit: *mut emaudit_audit,
    drift: *const emaudit_drift,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let audit = unsafe { borrow_mut(audit, "audit")? };
        audit.audit.watch(&unsafe { borrow(drift, "drift")? }.drift)
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Adds one whole sequence: the scores of its tokens in `EMAUDIT_UNIT_ALIGNED_SD`, the last token of the prompt
/// first. Those beyond the horizon are not looked at. With `count` 0 the pointer is ignored, and the sequence
/// counts as invalid.
///
/// A score within the horizon that is not finite makes the sequence invalid and the call returns NON_FINITE;
/// it is counted nevertheless.
///
/// Errors: INVALID_ARGUMENT, NON_FINITE. Threads: one at a time per audit. On success it neither allocates nor
/// locks nor blocks.
///
/// # Safety
/// `audit` is a live handle that no other thread uses; `scores` is valid for reading `count` floats; `error`
/// is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_audit_push(
    audit: *mut emaudit_audit,
    scores: *const f32,
    count: usize,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let audit = unsafe { borrow_mut(audit, "audit")? };
        let scores = unsafe { slice(scores, count, "scores")? };
        audit.audit.push(scores);
        let seen = &scores[..count.min(audit.audit.horizon() as usize)];
        match seen.iter().filter(|score| !score.is_finite()).count() {
            0 => Ok(()),
            rows => Err(Error::NonFinite { rows }),
        }
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Reads the verdict on the sequences so far.
///
/// Errors: INVALID_ARGUMENT; then `*verdict` still holds what it held before. Threads: one at a time per audit.
/// On success it neither allocates nor locks nor blocks.
///
/// # Safety
/// `audit` is a live handle that no other thread changes; `verdict` is valid for the bytes its `struct_size`
/// states; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_audit_get_verdict(
    audit: *const emaudit_audit,
    verdict: *mut emaudit_audit_verdict,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let audit = unsafe { borrow(audit, "audit")? };
        unsafe { OutStruct::new(verdict)? }.write(audit.audit.verdict().into());
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}
