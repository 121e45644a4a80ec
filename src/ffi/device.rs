//! Rows that live on an NVIDIA GPU: score and steer them there, on the caller's stream.

use super::boundary::{
    Region, borrow, check_array, check_disjoint, check_pointer, guard, hand_out, take_back,
};
use super::error::{emaudit_error, emaudit_status};
use super::probe::{emaudit_probe, write_error_bound};
use super::steering::emaudit_steering;
use super::tensor::{self, Checked, emaudit_tensor};
use crate::device::{DeviceProbe, DeviceSlice, DeviceStream};
use crate::error::Result;
use crate::probe::{RowStatus, ScoreUnit};
use std::ffi::c_void;

/// A probe whose direction was copied to a GPU. It never changes; share it between threads freely. It keeps what
/// it needs of its probe.
///
/// The functions that take one score and steer rows in device memory: the `data` of a tensor and every array are
/// device addresses. They check their arguments and enqueue one kernel on the caller's stream, and neither wait for
/// the GPU nor copy to the host, allocate or lock, beyond what the driver does to enqueue; so they may be called while the stream is being captured into a
/// graph. The CUDA context of the probe must be current in the calling thread, and everything that is passed must
/// live until the stream has run the kernel; what a graph holds, as long as it may be launched.
///
/// What only the GPU sees cannot be a returned status. A row that holds a NaN or an infinity scores NaN, and its row
/// status is `EMAUDIT_ROW_NON_FINITE`: whoever copies scores or statuses to the host must look. OK means that the
/// kernel was enqueued; where it fails later, the driver says so at the next synchronisation.
///
/// A card from compute capability 7.5 and a driver from CUDA 12.0 on are needed, nothing else: neither toolkit nor
/// runtime. The library looks for the driver (`libcuda.so.1`, `nvcuda.dll`) at the first call.
pub struct emaudit_device_probe {
    device: DeviceProbe,
}

/// Copies a probe's direction to the GPU whose context is current in this thread, and loads the kernels there the
/// first time, when the driver compiles them.
///
/// `*device_probe` receives a handle that the caller frees with `emaudit_device_probe_free`; `probe` may be freed
/// before it. Waits for the GPU: not while a stream of the context is being captured.
///
/// Errors: INVALID_ARGUMENT (also without a current context), DEVICE_UNAVAILABLE, DEVICE. Threads: any. Allocates, on
/// the device too.
///
/// # Safety
/// `probe` is a live handle; `device_probe` is valid for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_to_device(
    probe: *const emaudit_probe,
    device_probe: *mut *mut emaudit_device_probe,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let probe = &unsafe { borrow(probe, "probe")? }.probe;
        check_pointer(device_probe.cast_const(), "device_probe")?;
        let device = DeviceProbe::new(probe)?;
        unsafe { hand_out(device_probe, emaudit_device_probe { device }) };
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Frees a device probe and its device memory. NULL is fine. Its context need not be current; of a primary context that
/// was reset nothing is touched. May wait for the GPU: not while a stream of the context is being captured.
///
/// # Safety
/// `device_probe` is NULL or a handle that was not freed and that no other thread uses; every stream has run what was
/// enqueued with it, and no graph that holds such a call is launched again; it is not used again; its context was not
/// destroyed by cuCtxDestroy.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_device_probe_free(device_probe: *mut emaudit_device_probe) {
    // SAFETY: handles are made by `hand_out`.
    unsafe { take_back(device_probe) };
}

/// As `emaudit_probe_error_bound`, for scores from the GPU.
///
/// Errors: INVALID_ARGUMENT. Threads: any.
///
/// # Safety
/// `device_probe` is a live handle; `bound` is valid for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_device_probe_error_bound(
    device_probe: *const emaudit_device_probe,
    row_norm: f64,
    bound: *mut f64,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let device = &unsafe { borrow(device_probe, "device_probe")? }.device;
        unsafe { write_error_bound(bound, row_norm, |norm| device.error_bound(norm)) }
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// One float32 or one status a row, on the device.
///
/// # Safety
/// As [`DeviceSlice::from_raw`], for `rows` elements at `pointer`.
unsafe fn array<T, U>(pointer: *const T, rows: usize, name: &str) -> Result<DeviceSlice<U>> {
    check_array(pointer, rows, name)?;
    unsafe { DeviceSlice::from_raw(pointer.addr() as u64, rows) }
}

/// The same where NULL means that it is not given.
///
/// # Safety
/// As [`array`].
unsafe fn optional<T, U>(pointer: *const T, rows: usize, name: &str) -> Result<Option<DeviceSlice<U>>> {
    if pointer.is_null() { Ok(None) } else { unsafe { array(pointer, rows, name) }.map(Some) }
}

/// The arguments of one call on device memory.
struct Call {
    rows: *const emaudit_tensor,
    scores: Option<(u32, *mut f32)>,
    strengths: *const f32,
    row_status: *mut u8,
    stream: *mut c_void,
}

impl Call {
    /// The rows, once no two arrays overlap.
    ///
    /// # Safety
    /// `self.rows` is null or valid for the bytes its `struct_size` states.
    unsafe fn checked(&self, width: usize) -> Result<Checked> {
        let tensor = unsafe { tensor::check(self.rows, width)? };
        let scores = self.scores.map_or(std::ptr::null(), |(_, scores)| scores.cast_const());
        let scores = Region::new("scores", scores, tensor.rows);
        let status = Region::new("row_status", self.row_status.cast_const(), tensor.rows);
        check_disjoint(&[scores, status], &[tensor.region])?;
        let strengths = Region::new("strengths", self.strengths, tensor.rows);
        check_disjoint(&[tensor.region, scores, status], &[strengths])?;
        Ok(tensor)
    }
}

/// Enqueues the scoring of rows in device memory; see `emaudit_device_probe`.
///
/// `scores` receives `rows->rows` float32 in `unit` (`EMAUDIT_UNIT_*`); `row_status`, unless NULL, as many
/// `EMAUDIT_ROW_*` bytes. All are device addresses; the arrays must not overlap. `stream` is a `CUstream` or
/// `cudaStream_t`; NULL is the default stream. With 0 rows nothing is enqueued.
///
/// Scores agree with those of `emaudit_probe_score` within both bounds; see `emaudit_device_probe_error_bound`.
///
/// Errors: INVALID_ARGUMENT, WIDTH_MISMATCH, NOT_CALIBRATED, DEVICE; nothing is enqueued then. Threads: any. On success it
/// neither allocates nor locks nor blocks.
///
/// # Safety
/// `device_probe` is a live handle; `rows` is valid for the bytes its `struct_size` states and describes device memory of
/// the probe's context; `scores` and a non-NULL `row_status` are such memory of `rows->rows` elements; none of it is
/// freed, nor written or, where this call writes, read by others until `stream` has run the kernel; `stream` is NULL or
/// a live stream of that context; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_score_device(
    device_probe: *const emaudit_device_probe,
    rows: *const emaudit_tensor,
    unit: u32,
    scores: *mut f32,
    row_status: *mut u8,
    stream: *mut c_void,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let call = Call { rows, scores: Some((unit, scores)), strengths: std::ptr::null(), row_status, stream };
    let body = || {
        let device = &unsafe { borrow(device_probe, "device_probe")? }.device;
        let unit = ScoreUnit::try_from(unit)?;
        let tensor = unsafe { call.checked(device.probe().width())? };
        // SAFETY: checked above and disjoint; valid by the contract.
        unsafe {
            let scores = array(scores.cast_const(), tensor.rows, "scores")?;
            let status = optional::<_, RowStatus>(row_status.cast_const(), tensor.rows, "row_status")?;
            device.score(&tensor.device_rows()?, unit, scores, status, DeviceStream::from_raw(call.stream))
        }
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// # Safety
/// As the two functions below.
unsafe fn steer(
    device_probe: *const emaudit_device_probe,
    steering: *const emaudit_steering,
    call: &Call,
) -> Result<()> {
    let device = &unsafe { borrow(device_probe, "device_probe")? }.device;
    let steering = &unsafe { borrow(steering, "steering")? }.steering;
    let unit = call.scores.map(|(unit, _)| ScoreUnit::try_from(unit)).transpose()?;
    let tensor = unsafe { call.checked(device.probe().width())? };
    // SAFETY: checked above and disjoint; valid by the contract of the callers.
    unsafe {
        let scores = match unit.zip(call.scores) {
            Some((unit, (_, scores))) => Some((unit, array(scores.cast_const(), tensor.rows, "scores")?)),
            None => None,
        };
        let strengths = optional(call.strengths, tensor.rows, "strengths")?;
        let status = array::<_, RowStatus>(call.row_status.cast_const(), tensor.rows, "row_status")?;
        let stream = DeviceStream::from_raw(call.stream);
        device.steer(steering, &tensor.device_rows()?, scores, strengths, status, stream)
    }
}

/// Enqueues the editing of rows in device memory, in place; see `emaudit_device_probe`.
///
/// `steering` was made from the probe that `device_probe` was made from. `strengths`, unless NULL, holds `rows->rows`
/// float32 multipliers of the edit; NULL means 1. `row_status` receives as many `EMAUDIT_ROW_*` bytes and is not
/// optional: nothing else tells what was done. All are device addresses; the arrays must not overlap. `stream` is a
/// `CUstream` or `cudaStream_t`; NULL is the default stream. With 0 rows nothing is enqueued.
///
/// Gate, ceiling, dose limit and the rest as in `emaudit_steering_apply`, which would refuse a strength that is not
/// finite, or negative for clamp: here its row is left alone as `EMAUDIT_ROW_BAD_STRENGTH`.
///
/// Errors: INVALID_ARGUMENT (also for steering made from another probe), WIDTH_MISMATCH, DEVICE; nothing is enqueued
/// then. Threads: any. On success it neither allocates nor locks nor blocks.
///
/// # Safety
/// As `emaudit_probe_score_device`; `steering` is a live handle; `row_status` and a non-NULL `strengths` are device memory
/// of `rows->rows` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_steer_device(
    device_probe: *const emaudit_device_probe,
    steering: *const emaudit_steering,
    rows: *const emaudit_tensor,
    strengths: *const f32,
    row_status: *mut u8,
    stream: *mut c_void,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let call = Call { rows, scores: None, strengths, row_status, stream };
    // SAFETY: by the contract above.
    unsafe { guard(error, || steer(device_probe, steering, &call)) }
}

/// Enqueues one kernel that scores every row as it is and then edits it, without reading most rows again. It gives what
/// `emaudit_probe_score_device` followed by `emaudit_steer_device` gives, to the bit.
///
/// `scores` receives `rows->rows` float32 in `unit` (`EMAUDIT_UNIT_*`), of the rows before the edit, NaN for a row that
/// holds a NaN or an infinity. The rest as `emaudit_steer_device`.
///
/// Errors and threads: as `emaudit_steer_device`, and NOT_CALIBRATED for calibrated scores.
///
/// # Safety
/// As `emaudit_steer_device`; `scores` is device memory of `rows->rows` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_score_and_steer_device(
    device_probe: *const emaudit_device_probe,
    steering: *const emaudit_steering,
    rows: *const emaudit_tensor,
    unit: u32,
    scores: *mut f32,
    strengths: *const f32,
    row_status: *mut u8,
    stream: *mut c_void,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let call = Call { rows, scores: Some((unit, scores)), strengths, row_status, stream };
    // SAFETY: by the contract above.
    unsafe { guard(error, || steer(device_probe, steering, &call)) }
}
