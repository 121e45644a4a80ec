//! Steering: edit rows in place along a probe's direction.

use super::boundary::{
    OutStruct, Region, Sized32, borrow, check_array, check_disjoint, check_pointer, flag, guard,
    hand_out_shared, invalid, read_struct, slice, slice_mut, take_back_shared,
};
use super::error::{emaudit_error, emaudit_status};
use super::probe::{emaudit_probe, row_status};
use super::tensor::{self, Checked, emaudit_tensor};
use crate::error::Result;
use crate::probe::ScoreUnit;
use crate::steering::{LandingReport, Operation, SteerReport, Steering, SteeringOptions};
use std::mem::offset_of;
use std::sync::Arc;

/// h -= strength * alpha * v, with v the direction as stored.
pub const EMAUDIT_OPERATION_SUBTRACT: u32 = 1;
/// h -= strength * alpha * (h . u) u, with u = v / |v|.
pub const EMAUDIT_OPERATION_PROJECT_OUT: u32 = 2;
/// Where z exceeds the ceiling: h -= strength * (z - ceiling) * sigma * u.
pub const EMAUDIT_OPERATION_CLAMP: u32 = 3;

/// A checked way to edit rows, bound to a probe. It never changes; share it between threads freely.
pub struct emaudit_steering {
    pub(super) steering: Steering,
}

/// How to steer. Begin with `EMAUDIT_STEERING_OPTIONS_INIT` and set at least `operation`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_steering_options {
    /// `sizeof(emaudit_steering_options)`.
    pub struct_size: u32,
    /// One of `EMAUDIT_OPERATION_*`; 0 is refused.
    pub operation: u32,
    /// Multiplier of subtract and project out; not used by clamp. The macro sets 1.
    pub alpha: f32,
    /// Largest allowed score of clamp, in aligned standard deviations; not used by the others.
    pub ceiling: f32,
    /// 1 to edit only rows that score above `gate`; 0 to edit every row.
    pub has_gate: u32,
    /// The gate, in aligned standard deviations.
    pub gate: f32,
    /// 1 to scale edits down to `dose_limit`; 0 for no limit.
    pub has_dose_limit: u32,
    /// Largest allowed |edit| / |row|; > 0.
    pub dose_limit: f32,
    /// 1 to steer although the causal evidence of the direction is not specific.
    pub allow_nonspecific: u32,
    /// Must be 0.
    pub reserved: u32,
}

unsafe impl Sized32 for emaudit_steering_options {
    const NAME: &'static str = "emaudit_steering_options";
    const FIRST_SIZE: usize = offset_of!(Self, reserved) + size_of::<u32>();

    fn defaults() -> Self {
        emaudit_steering_options {
            struct_size: size_of::<Self>() as u32,
            operation: 0,
            alpha: 1.0,
            ceiling: 0.0,
            has_gate: 0,
            gate: 0.0,
            has_dose_limit: 0,
            dose_limit: 0.0,
            allow_nonspecific: 0,
            reserved: 0,
        }
    }
}

/// What a steering call did. Begin with `EMAUDIT_STEER_REPORT_INIT`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_steer_report {
    /// `sizeof(emaudit_steer_report)`.
    pub struct_size: u32,
    /// Largest |edit| / |row| of the call.
    pub largest_dose: f32,
    /// Rows given.
    pub rows: u64,
    /// Rows that were edited.
    pub touched: u64,
    /// Rows left alone because the gate was closed.
    pub gated: u64,
    /// Rows whose edit the dose limit made smaller.
    pub limited: u64,
    /// Rows left alone because they hold a NaN or an infinity, or would after the edit.
    pub nonfinite: u64,
}

unsafe impl Sized32 for emaudit_steer_report {
    const NAME: &'static str = "emaudit_steer_report";
    const FIRST_SIZE: usize = offset_of!(Self, nonfinite) + size_of::<u64>();

    fn defaults() -> Self {
        SteerReport::default().into()
    }
}

impl From<SteerReport> for emaudit_steer_report {
    fn from(report: SteerReport) -> Self {
        emaudit_steer_report {
            struct_size: size_of::<Self>() as u32,
            largest_dose: report.largest_dose,
            rows: report.rows as u64,
            touched: report.touched as u64,
            gated: report.gated as u64,
            limited: report.limited as u64,
            nonfinite: report.nonfinite as u64,
        }
    }
}

fn options_from(options: &emaudit_steering_options) -> Result<SteeringOptions> {
    let alpha = options.alpha;
    let operation = match options.operation {
        EMAUDIT_OPERATION_SUBTRACT => Operation::Subtract { alpha },
        EMAUDIT_OPERATION_PROJECT_OUT => Operation::ProjectOut { alpha },
        EMAUDIT_OPERATION_CLAMP => Operation::Clamp { ceiling: options.ceiling },
        other => return Err(invalid(format!("{other} is no EMAUDIT_OPERATION_*"))),
    };
    if options.reserved != 0 {
        return Err(invalid("emaudit_steering_options.reserved is not 0"));
    }
    let gate = flag(options.has_gate, "emaudit_steering_options.has_gate")?.then_some(options.gate);
    let limited = flag(options.has_dose_limit, "emaudit_steering_options.has_dose_limit")?;
    Ok(SteeringOptions {
        operation,
        gate,
        dose_limit: limited.then_some(options.dose_limit),
        allow_nonspecific: flag(options.allow_nonspecific, "emaudit_steering_options.allow_nonspecific")?,
    })
}

/// Makes a steering handle from a probe.
///
/// `*steering` receives a handle that the caller frees with `emaudit_steering_free`; `probe` may be freed
/// before it. A direction whose causal evidence is not specific does no more than a random one of its size:
/// it is refused unless `allow_nonspecific` is 1.
///
/// Errors: INVALID_ARGUMENT, NOT_SPECIFIC, NOT_CALIBRATED (a gate or a clamp). Threads: any. Allocates.
///
/// # Safety
/// `probe` is a live handle; `options` is valid for the bytes its `struct_size` states; `steering` is valid
/// for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_steering_new(
    probe: *const emaudit_probe,
    options: *const emaudit_steering_options,
    steering: *mut *mut emaudit_steering,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let probe = &unsafe { borrow(probe, "probe")? }.probe;
        check_pointer(steering.cast_const(), "steering")?;
        let options = options_from(&unsafe { read_struct(options)? })?;
        let made = Steering::new(probe, options)?;
        unsafe { hand_out_shared(steering, Arc::new(emaudit_steering { steering: made })) };
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Frees a steering handle. NULL is fine. Slots made from it live on.
///
/// # Safety
/// `steering` is NULL or a handle that was not freed and that no other thread uses; it is not used again.
/// (Handles acquired from a slot may be equal; each counts for itself.)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_steering_free(steering: *mut emaudit_steering) {
    // SAFETY: handles are made by `hand_out_shared`.
    unsafe { take_back_shared(steering) };
}

/// The arguments that both steering calls share.
struct Call {
    rows: *const emaudit_tensor,
    strengths: *const f32,
    row_status: *mut u8,
    report: *mut emaudit_steer_report,
}

/// Checks everything, then edits, then writes the report.
///
/// # Safety
/// As the two functions below; `scores` holds the unit and the pointer where scores are wanted.
unsafe fn steer(
    steering: &emaudit_steering,
    scores: Option<(ScoreUnit, *mut f32)>,
    call: &Call,
) -> Result<()> {
    let tensor = unsafe { tensor::check(call.rows, steering.steering.probe().width())? };
    let report = unsafe { OutStruct::new_optional(call.report)? };
    check_arrays(&tensor, scores.map(|(_, pointer)| pointer), call, OutStruct::region("report", &report))?;
    let count = tensor.rows;
    // SAFETY: checked above and disjoint; valid by the contract of the callers.
    let outcome = unsafe {
        let mut rows = tensor.rows_mut()?;
        let strengths = match call.strengths.is_null() {
            true => None,
            false => Some(slice(call.strengths, count, "strengths")?),
        };
        steering.steering.check(&rows.as_rows(), scores.map(|(unit, _)| unit), strengths, None)?;
        let status = row_status(call.row_status, count)?;
        let scores = match scores {
            Some((unit, pointer)) => Some((unit, slice_mut(pointer, count, "scores")?)),
            None => None,
        };
        steering.steering.run(&mut rows, scores, strengths, status)?
    };
    if let Some(report) = report {
        report.write(outcome.into());
    }
    outcome.into_result().map(drop)
}

fn check_arrays(tensor: &Checked, scores: Option<*mut f32>, call: &Call, report: Region) -> Result<()> {
    if let Some(scores) = scores {
        check_array(scores.cast_const(), tensor.rows, "scores")?;
    }
    let scores = Region::new("scores", scores.map_or(std::ptr::null(), <*mut f32>::cast_const), tensor.rows);
    let status = Region::new("row_status", call.row_status.cast_const(), tensor.rows);
    let strengths = Region::new("strengths", call.strengths, tensor.rows);
    check_disjoint(&[tensor.region, scores, status, report], &[strengths])
}

/// Edits rows in place.
///
/// `strengths`, unless NULL, holds `rows->rows` float32 multipliers of the edit, one per row; NULL means 1.
/// `row_status`, unless NULL, receives as many `EMAUDIT_ROW_*` bytes; `report`, unless NULL, the totals. The
/// arrays must not overlap. With 0 rows only the report is written.
///
/// A row that holds a NaN or an infinity, or would after the edit in its own dtype, is left untouched and
/// flagged; all other rows are edited, and the call returns NON_FINITE. On every other failure nothing is
/// written: all arguments are checked before the first edit.
///
/// Errors: INVALID_ARGUMENT (also for a strength that is not finite, or negative for clamp), WIDTH_MISMATCH,
/// NON_FINITE. Threads: any, each with its own rows. On success it neither allocates nor locks nor blocks.
///
/// # Safety
/// `steering` is a live handle; `rows` is valid for the bytes its `struct_size` states and describes memory
/// that is writable and that no other thread uses; non-NULL arrays are valid for `rows->rows` elements and
/// `report` for the bytes its `struct_size` states; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_steering_apply(
    steering: *const emaudit_steering,
    rows: *const emaudit_tensor,
    strengths: *const f32,
    row_status: *mut u8,
    report: *mut emaudit_steer_report,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let call = Call { rows, strengths, row_status, report };
    let body = || unsafe { steer(borrow(steering, "steering")?, None, &call) };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Scores every row as it is and then edits it, in one pass over each row. It gives the same bits as
/// `emaudit_probe_score` followed by `emaudit_steering_apply`.
///
/// `scores` receives `rows->rows` float32 in `unit` (`EMAUDIT_UNIT_*`), of the rows before the edit. A row
/// that holds a NaN or an infinity scores NaN; one that only its edit would break keeps its score and is
/// flagged. The rest as `emaudit_steering_apply`.
///
/// Errors and threads: as `emaudit_steering_apply`, and NOT_CALIBRATED for calibrated scores.
///
/// # Safety
/// As `emaudit_steering_apply`; `scores` is valid for writing `rows->rows` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_steering_score_and_apply(
    steering: *const emaudit_steering,
    rows: *const emaudit_tensor,
    unit: u32,
    scores: *mut f32,
    strengths: *const f32,
    row_status: *mut u8,
    report: *mut emaudit_steer_report,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let call = Call { rows, strengths, row_status, report };
    let body = || {
        let unit = ScoreUnit::try_from(unit)?;
        unsafe { steer(borrow(steering, "steering")?, Some((unit, scores)), &call) }
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// What `emaudit_steering_check_landed` found. Every row is counted once below `rows`. Begin with
/// `EMAUDIT_LANDING_REPORT_INIT`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_landing_report {
    /// `sizeof(emaudit_landing_report)`.
    pub struct_size: u32,
    /// Largest |projection measured - expected|, in units of its bound; above 1 when a row missed.
    pub largest_deviation: f32,
    /// Rows given.
    pub rows: u64,
    /// Edited rows whose projection is where it should be, by a bound smaller than the edit.
    pub landed: u64,
    /// Edited rows whose projection changes by no more than rounding may: nothing can be told from them.
    pub lost: u64,
    /// Rows that were to stay and stayed.
    pub untouched: u64,
    /// Rows whose projection is not where it should be.
    pub missed: u64,
    /// Rows that steering leaves alone because they, or their edit, are not finite.
    pub nonfinite: u64,
}

unsafe impl Sized32 for emaudit_landing_report {
    const NAME: &'static str = "emaudit_landing_report";
    const FIRST_SIZE: usize = offset_of!(Self, nonfinite) + size_of::<u64>();

    fn defaults() -> Self {
        LandingReport::default().into()
    }
}

impl From<LandingReport> for emaudit_landing_report {
    fn from(report: LandingReport) -> Self {
        emaudit_landing_report {
            struct_size: size_of::<Self>() as u32,
            largest_deviation: report.largest_deviation,
            rows: report.rows as u64,
            landed: report.landed as u64,
            lost: report.lost as u64,
            untouched: report.untouched as u64,
            missed: report.missed as u64,
            nonfinite: report.nonfinite as u64,
        }
    }
}

/// The self-test of a serving stack: proves, on rows read back from it, that the edit landed.
///
/// `before` holds rows as they were, `after` the same rows as the stack has them after steering with
/// `strengths` (NULL means 1); each in any dtype, one of them in the dtype in which the stack keeps the rows.
/// `deviations`, unless NULL, receives `before->rows` float32: how far each row's projection lies from where
/// it should be, in units of its bound, above 1 for a row that missed, NaN for one that cannot be scored.
///
/// The projection on the unit direction that gate, ceiling, strength and dose limit should leave is compared
/// with the one measured. They may differ by the numeric contract of the kernels and by the rounding of the
/// dtypes, no more; rows that were to stay must have stayed. It notices an edit that was dropped, made twice
/// (where that is not the same), made to another row or with another direction, or lost to rounding. Changes
/// at right angles to the direction are not looked at. A report of OK with `landed` 0 means that no row was
/// to be edited: it proves nothing about edits.
///
/// Errors: INVALID_ARGUMENT, WIDTH_MISMATCH; NOT_LANDED when a row missed, or when rows were to be edited and
/// not one can be shown to be; NON_FINITE when only that was wrong. With the last two, report and deviations
/// are written. Threads: any. On success it neither allocates nor locks nor blocks.
///
/// # Safety
/// `steering` is a live handle; `before` and `after` are valid for the bytes their `struct_size` states and
/// describe readable memory; non-NULL arrays are valid for `before->rows` elements and `report` for the bytes
/// its `struct_size` states; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_steering_check_landed(
    steering: *const emaudit_steering,
    before: *const emaudit_tensor,
    after: *const emaudit_tensor,
    strengths: *const f32,
    deviations: *mut f32,
    report: *mut emaudit_landing_report,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let steering = &unsafe { borrow(steering, "steering")? }.steering;
        let width = steering.probe().width();
        let before = unsafe { tensor::check(before, width)? };
        let after = unsafe { tensor::check(after, width)? };
        let report_out = unsafe { OutStruct::new_optional(report)? };
        let written = [
            Region::new("deviations", deviations.cast_const(), before.rows),
            OutStruct::region("report", &report_out),
        ];
        let read = [before.region, after.region, Region::new("strengths", strengths, before.rows)];
        check_disjoint(&written, &read)?;
        // SAFETY: checked above and disjoint; valid by the contract.
        let found = unsafe {
            let strengths = match strengths.is_null() {
                true => None,
                false => Some(slice(strengths, before.rows, "strengths")?),
            };
            let deviations = match deviations.is_null() {
                true => None,
                false => Some(slice_mut(deviations, before.rows, "deviations")?),
            };
            steering.compare_landed(&before.rows()?, &after.rows()?, strengths, deviations)?
        };
        if let Some(report) = report_out {
            report.write(found.into());
        }
        found.into_result().map(drop)
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}
