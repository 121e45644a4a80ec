//! Probes: score rows against a direction.

use super::boundary::{
    OutStruct, Region, Sized32, borrow, borrow_all, check_array, check_disjoint, check_pointer, guard,
    hand_out_shared, invalid, read_struct_or_default, slice_mut, take_back_shared,
};
use super::directions::emaudit_directions;
use super::error::{emaudit_error, emaudit_status};
use super::kernel::{EMAUDIT_KERNEL_DEFAULT, kernel_from};
use super::tensor::{self, emaudit_tensor};
use crate::error::Result;
use crate::probe::{Probe, RowStatus, ScoreUnit};
use std::mem::offset_of;
use std::sync::Arc;

/// Scores in standard deviations of aligned scores: z = r / sigma. Thresholds and monitors use this unit.
pub const EMAUDIT_UNIT_ALIGNED_SD: u32 = 1;
/// Scores in activation units: r = (h - aligned_mean) . v / |v|.
pub const EMAUDIT_UNIT_RAW: u32 = 2;

/// The row was scored, and steered where that was asked for.
pub const EMAUDIT_ROW_OK: u8 = 0;
/// The row holds a NaN or an infinity (its score is NaN), or its edit would have made one. It is untouched.
pub const EMAUDIT_ROW_NON_FINITE: u8 = 1;
/// Steering: the gate was closed, the row is untouched.
pub const EMAUDIT_ROW_GATED: u8 = 2;
/// Steering: the dose limit made the edit smaller than asked for.
pub const EMAUDIT_ROW_LIMITED: u8 = 3;
/// Steering on a device: the strength is not finite, or negative for clamp. The row is untouched.
pub const EMAUDIT_ROW_BAD_STRENGTH: u8 = 4;

const _: () = assert!(
    EMAUDIT_UNIT_ALIGNED_SD == ScoreUnit::AlignedSd as u32
        && EMAUDIT_UNIT_RAW == ScoreUnit::Raw as u32
        && EMAUDIT_ROW_OK == RowStatus::Ok as u8
        && EMAUDIT_ROW_NON_FINITE == RowStatus::NonFinite as u8
        && EMAUDIT_ROW_GATED == RowStatus::Gated as u8
        && EMAUDIT_ROW_LIMITED == RowStatus::Limited as u8
        && EMAUDIT_ROW_BAD_STRENGTH == RowStatus::BadStrength as u8
);

/// One layer's direction, bound to a kernel. It never changes; share it between threads freely. It keeps its
/// directions alive.
pub struct emaudit_probe {
    pub(super) probe: Probe,
    layer: u32,
}

impl AsRef<Probe> for emaudit_probe {
    fn as_ref(&self) -> &Probe {
        &self.probe
    }
}

/// How to make a probe. Begin with `EMAUDIT_PROBE_OPTIONS_INIT`; NULL means the same.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_probe_options {
    /// `sizeof(emaudit_probe_options)`.
    pub struct_size: u32,
    /// One of `EMAUDIT_KERNEL_*`; `EMAUDIT_KERNEL_DEFAULT` (0) takes the best.
    pub kernel: u32,
}

unsafe impl Sized32 for emaudit_probe_options {
    const NAME: &'static str = "emaudit_probe_options";
    const FIRST_SIZE: usize = offset_of!(Self, kernel) + size_of::<u32>();

    fn defaults() -> Self {
        emaudit_probe_options { struct_size: size_of::<Self>() as u32, kernel: EMAUDIT_KERNEL_DEFAULT }
    }
}

/// What a probe is bound to. Begin with `EMAUDIT_PROBE_INFO_INIT`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_probe_info {
    /// `sizeof(emaudit_probe_info)`.
    pub struct_size: u32,
    /// Elements per row.
    pub width: u32,
    /// 0-based block index.
    pub layer: u32,
    /// The kernel in use, one of `EMAUDIT_KERNEL_*`, never the default 0.
    pub kernel: u32,
}

unsafe impl Sized32 for emaudit_probe_info {
    const NAME: &'static str = "emaudit_probe_info";
    const FIRST_SIZE: usize = offset_of!(Self, kernel) + size_of::<u32>();

    fn defaults() -> Self {
        emaudit_probe_info { struct_size: size_of::<Self>() as u32, width: 0, layer: 0, kernel: 0 }
    }
}

/// Borrows the caller's row statuses, if wanted. They are first set to NON_FINITE, so that whatever a defect
/// leaves unwritten never reads as a scored row.
///
/// # Safety
/// A non-null `pointer` is valid for writing `rows` bytes and nobody else uses them during `'a`.
pub(super) unsafe fn row_status<'a>(pointer: *mut u8, rows: usize) -> Result<Option<&'a mut [RowStatus]>> {
    if pointer.is_null() {
        return Ok(None);
    }
    check_array(pointer.cast_const(), rows, "row_status")?;
    if rows > 0 {
        // SAFETY: `rows` writable bytes by contract; the fill makes every one a valid `RowStatus`.
        unsafe { pointer.write_bytes(EMAUDIT_ROW_NON_FINITE, rows) };
    }
    unsafe { slice_mut(pointer.cast::<RowStatus>(), rows, "row_status") }.map(Some)
}

/// Makes a probe for one layer.
///
/// `*probe` receives a handle that the caller frees with `emaudit_probe_free`; `directions` may be freed
/// before it.
///
/// Errors: INVALID_ARGUMENT, LAYER_NOT_FOUND, KERNEL_UNAVAILABLE. Threads: any. Allocates.
///
/// # Safety
/// `directions` is a live handle; `options` is NULL or valid for the bytes its `struct_size` states; `probe`
/// is valid for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_new(
    directions: *const emaudit_directions,
    layer: u32,
    options: *const emaudit_probe_options,
    probe: *mut *mut emaudit_probe,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let directions = unsafe { borrow(directions, "directions")? };
        check_pointer(probe.cast_const(), "probe")?;
        let options = unsafe { read_struct_or_default(options)? };
        let shared = Arc::clone(&directions.shared);
        let made = match kernel_from(options.kernel)? {
            Some(kernel) => Probe::with_kernel(shared, layer, kernel)?,
            None => Probe::new(shared, layer)?,
        };
        unsafe { hand_out_shared(probe, Arc::new(emaudit_probe { probe: made, layer })) };
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Frees a probe. NULL is fine. Steering, monitors and slots made from it live on.
///
/// # Safety
/// `probe` is NULL or a handle that was not freed and that no other thread uses; it is not used again. (Handles
/// acquired from a slot may be equal; each counts for itself.)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_free(probe: *mut emaudit_probe) {
    // SAFETY: handles are made by `hand_out_shared`.
    unsafe { take_back_shared(probe) };
}

/// Describes a probe.
///
/// Errors: INVALID_ARGUMENT. Threads: any.
///
/// # Safety
/// `probe` is a live handle; `info` is valid for the bytes its `struct_size` states; `error` is NULL or valid
/// for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_get_info(
    probe: *const emaudit_probe,
    info: *mut emaudit_probe_info,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let emaudit_probe { probe, layer } = unsafe { borrow(probe, "probe")? };
        unsafe { OutStruct::new(info)? }.write(emaudit_probe_info {
            struct_size: size_of::<emaudit_probe_info>() as u32,
            width: probe.width() as u32,
            layer: *layer,
            kernel: probe.kernel() as u32,
        });
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Scores rows.
///
/// `scores` receives `rows->rows` float32 in `unit`; `row_status`, unless NULL, as many `EMAUDIT_ROW_*`
/// bytes. The three arrays must not overlap. With 0 rows nothing is read or written.
///
/// When a row holds a NaN or an infinity its score is NaN and its status `EMAUDIT_ROW_NON_FINITE`; all other
/// rows are scored, and the call returns NON_FINITE. On every other failure nothing is written.
///
/// Errors: INVALID_ARGUMENT, WIDTH_MISMATCH, NOT_CALIBRATED, NON_FINITE. Threads: any. On success it neither allocates nor
/// locks nor blocks.
///
/// # Safety
/// `probe` is a live handle; `rows` is valid for the bytes its `struct_size` states and describes readable
/// memory; `scores` and a non-NULL `row_status` are valid for writing `rows->rows` elements; `error` is NULL
/// or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_score(
    probe: *const emaudit_probe,
    rows: *const emaudit_tensor,
    unit: u32,
    scores: *mut f32,
    row_status: *mut u8,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let probe = &unsafe { borrow(probe, "probe")? }.probe;
        let unit = ScoreUnit::try_from(unit)?;
        // Here, too, since the row statuses are filled before `score` could refuse.
        probe.check_unit(unit)?;
        let tensor = unsafe { tensor::check(rows, probe.width())? };
        check_array(scores.cast_const(), tensor.rows, "scores")?;
        let score_region = Region::new("scores", scores.cast_const(), tensor.rows);
        let status_region = Region::new("row_status", row_status.cast_const(), tensor.rows);
        check_disjoint(&[score_region, status_region], &[tensor.region])?;
        // SAFETY: checked above and disjoint; valid by the contract.
        unsafe {
            let view = tensor.rows()?;
            let scores = slice_mut(scores, tensor.rows, "scores")?;
            let status = self::row_status(row_status, tensor.rows)?;
            probe.score(&view, unit, scores, status)
        }
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Scores rows with several probes in one reading of the rows, with the same bits as `emaudit_probe_score` of each.
///
/// `probes` holds `probe_count` handles, at least one, of one width and one kernel; a handle may stand there twice.
/// `scores` receives `rows->rows` times `probe_count` float32 in `unit`, row by row: that of row i with `probes[k]` at
/// `i * probe_count + k`. `row_status`, unless NULL, receives `rows->rows` `EMAUDIT_ROW_*` bytes. No array that is written
/// may overlap another. With 0 rows nothing is written.
///
/// When a row holds a NaN or an infinity its scores are NaN and its status `EMAUDIT_ROW_NON_FINITE`; all other rows are
/// scored, and the call returns NON_FINITE. (A score beyond float32 is a NaN of its own and flags the row, too.) On every
/// other failure nothing is written.
///
/// Errors: INVALID_ARGUMENT (also for probes with different kernels), WIDTH_MISMATCH, NOT_CALIBRATED, NON_FINITE.
/// Threads: any. On success it neither allocates nor locks nor blocks.
///
/// # Safety
/// `probes` is valid for reading `probe_count` live handles; `rows` is valid for the bytes its `struct_size` states and
/// describes readable memory; `scores` is valid for writing `rows->rows` times `probe_count` elements and a non-NULL
/// `row_status` for `rows->rows`; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_score_all(
    probes: *const *const emaudit_probe,
    probe_count: usize,
    rows: *const emaudit_tensor,
    unit: u32,
    scores: *mut f32,
    row_status: *mut u8,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let together = unsafe { borrow_all(probes, probe_count, "probes")? };
        let Some(first) = together.first() else {
            return Err(invalid("probe_count is 0: there is no probe to score with"));
        };
        let unit = ScoreUnit::try_from(unit)?;
        let tensor = unsafe { tensor::check(rows, first.probe.width())? };
        // Here, too, since the row statuses are filled before `score_all` could refuse.
        Probe::check_together(together, first.probe.width(), unit)?;
        // A product that overflows is an impossible length.
        let count = tensor.rows.saturating_mul(probe_count);
        check_array(scores.cast_const(), count, "scores")?;
        let score_region = Region::new("scores", scores.cast_const(), count);
        let status_region = Region::new("row_status", row_status.cast_const(), tensor.rows);
        let probes_region = Region::new("probes", probes, probe_count);
        check_disjoint(&[score_region, status_region], &[tensor.region, probes_region])?;
        // SAFETY: checked above and disjoint; valid by the contract.
        unsafe {
            let view = tensor.rows()?;
            let scores = slice_mut(scores, count, "scores")?;
            let status = self::row_status(row_status, tensor.rows)?;
            Probe::score_all(together, &view, unit, scores, status)
        }
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Writes the bound for a row norm that may be one.
///
/// # Safety
/// A non-null `bound` is valid for writing.
pub(super) unsafe fn write_error_bound(
    bound: *mut f64,
    row_norm: f64,
    of: impl FnOnce(f64) -> f64,
) -> Result<()> {
    check_pointer(bound.cast_const(), "bound")?;
    if !row_norm.is_finite() || row_norm < 0.0 {
        return Err(invalid("row_norm must be finite and not negative"));
    }
    // SAFETY: checked above, valid by the caller's word.
    unsafe { bound.write(of(row_norm)) };
    Ok(())
}

/// The documented bound on the rounding error of one score in activation units (`EMAUDIT_UNIT_RAW`), for a
/// row of any dtype with Euclidean norm `row_norm`: |computed - exact| <= `*bound`. For
/// `EMAUDIT_UNIT_ALIGNED_SD` divide it by the layer's sigma and add one more float32 rounding of the score.
///
/// Errors: INVALID_ARGUMENT. Threads: any.
///
/// # Safety
/// `probe` is a live handle; `bound` is valid for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_error_bound(
    probe: *const emaudit_probe,
    row_norm: f64,
    bound: *mut f64,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let probe = &unsafe { borrow(probe, "probe")? }.probe;
        unsafe { write_error_bound(bound, row_norm, |norm| probe.error_bound(norm)) }
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}
