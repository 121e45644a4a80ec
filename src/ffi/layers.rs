//! The layers of a direction file: calibration, thresholds, vectors.

use super::boundary::{OutStruct, Region, Sized32, borrow, check_disjoint, guard, invalid, slice_mut};
use super::directions::emaudit_directions;
use super::error::{emaudit_error, emaudit_status};
use crate::directions::schema::{Aggregation, Threshold};
use crate::error::{Error, Result};
use std::mem::offset_of;

/// Mean of the token scores.
pub const EMAUDIT_AGGREGATION_MEAN: u32 = 1;
/// Largest token score.
pub const EMAUDIT_AGGREGATION_MAX: u32 = 2;
/// The last token's score.
pub const EMAUDIT_AGGREGATION_LAST: u32 = 3;

const _: () = assert!(
    EMAUDIT_AGGREGATION_MEAN == Aggregation::Mean as u32
        && EMAUDIT_AGGREGATION_MAX == Aggregation::Max as u32
        && EMAUDIT_AGGREGATION_LAST == Aggregation::Last as u32
);

/// The aggregation behind a number.
pub(super) fn aggregation_from(number: u32) -> Result<Aggregation> {
    match number {
        EMAUDIT_AGGREGATION_MEAN => Ok(Aggregation::Mean),
        EMAUDIT_AGGREGATION_MAX => Ok(Aggregation::Max),
        EMAUDIT_AGGREGATION_LAST => Ok(Aggregation::Last),
        other => Err(invalid(format!("{other} is no EMAUDIT_AGGREGATION_*"))),
    }
}

/// Calibration of one layer. Begin with `EMAUDIT_LAYER_INFO_INIT`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_layer_info {
    /// `sizeof(emaudit_layer_info)`.
    pub struct_size: u32,
    /// 0-based block index.
    pub layer: u32,
    /// Aligned sequences behind the calibration; 0 when the layer is not calibrated, and so are the two below.
    pub sequences: u32,
    /// Alarm thresholds; `emaudit_directions_get_threshold` reads them.
    pub threshold_count: u32,
    /// Standard deviation of aligned raw scores, in activation units.
    pub sigma: f64,
}

unsafe impl Sized32 for emaudit_layer_info {
    const NAME: &'static str = "emaudit_layer_info";
    const FIRST_SIZE: usize = offset_of!(Self, sigma) + size_of::<f64>();

    fn defaults() -> Self {
        let struct_size = size_of::<Self>() as u32;
        emaudit_layer_info { struct_size, layer: 0, sequences: 0, threshold_count: 0, sigma: 0.0 }
    }
}

/// An alarm threshold that the calibration sample supports. Begin with `EMAUDIT_THRESHOLD_INIT`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_threshold {
    /// `sizeof(emaudit_threshold)`.
    pub struct_size: u32,
    /// What is aggregated over the tokens of a sequence, one of `EMAUDIT_AGGREGATION_*`.
    pub aggregation: u32,
    /// Tokens aggregated, counted from the last prompt token, which is token 1.
    pub horizon: u32,
    /// Calm sequences it was derived from.
    pub sequences: u32,
    /// Stated false-positive rate per sequence.
    pub rate: f64,
    /// Upper 95 % Clopper-Pearson bound on the rate seen in the calibration sample.
    pub rate_upper: f64,
    /// The threshold, in aligned standard deviations.
    pub z: f64,
}

unsafe impl Sized32 for emaudit_threshold {
    const NAME: &'static str = "emaudit_threshold";
    const FIRST_SIZE: usize = offset_of!(Self, z) + size_of::<f64>();

    fn defaults() -> Self {
        emaudit_threshold {
            struct_size: size_of::<Self>() as u32,
            aggregation: 0,
            horizon: 0,
            sequences: 0,
            rate: 0.0,
            rate_upper: 0.0,
            z: 0.0,
        }
    }
}

impl From<&Threshold> for emaudit_threshold {
    fn from(threshold: &Threshold) -> Self {
        emaudit_threshold {
            struct_size: size_of::<Self>() as u32,
            aggregation: threshold.statistic as u32,
            horizon: threshold.horizon,
            sequences: threshold.sequences,
            rate: threshold.rate,
            rate_upper: threshold.rate_upper,
            z: threshold.z,
        }
    }
}

/// Describes the calibration of one layer.
///
/// Errors: INVALID_ARGUMENT, LAYER_NOT_FOUND. Threads: any.
///
/// # Safety
/// `directions` is a live handle; `info` is valid for the bytes its `struct_size` states; `error` is NULL or
/// valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_directions_get_layer_info(
    directions: *const emaudit_directions,
    layer: u32,
    info: *mut emaudit_layer_info,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let directions = unsafe { borrow(directions, "directions")? };
        let info = unsafe { OutStruct::new(info)? };
        let calibration = directions.shared.layer(layer)?.calibration;
        let mut described = emaudit_layer_info { layer, ..emaudit_layer_info::defaults() };
        if let Some(calibration) = calibration {
            described.sequences = calibration.sequences;
            described.threshold_count = calibration.thresholds.len() as u32;
            described.sigma = calibration.sigma;
        }
        info.write(described);
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Reads the alarm threshold number `index` (0-based, below `threshold_count`) of a layer.
///
/// Errors: INVALID_ARGUMENT, LAYER_NOT_FOUND. Threads: any.
///
/// # Safety
/// `directions` is a live handle; `threshold` is valid for the bytes its `struct_size` states; `error` is
/// NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_directions_get_threshold(
    directions: *const emaudit_directions,
    layer: u32,
    index: u32,
    threshold: *mut emaudit_threshold,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let directions = unsafe { borrow(directions, "directions")? };
        let out = unsafe { OutStruct::new(threshold)? };
        let calibration = directions.shared.layer(layer)?.calibration;
        let thresholds = calibration.map_or(&[][..], |c| &c.thresholds);
        let found = thresholds.get(index as usize);
        let found = found.ok_or_else(|| invalid(format!("there are {} thresholds", thresholds.len())))?;
        out.write(found.into());
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Copies the two vectors of a layer: `direction` (not normalised, misaligned minus aligned) and
/// `aligned_mean`, `width` float32 each, in activation units. Either may be NULL when it is not wanted.
///
/// Errors: INVALID_ARGUMENT, LAYER_NOT_FOUND, WIDTH_MISMATCH when `width` is not that of the file.
/// Threads: any.
///
/// # Safety
/// `directions` is a live handle; non-NULL vectors are valid for writing `width` floats and do not overlap;
/// `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_directions_copy_vectors(
    directions: *const emaudit_directions,
    layer: u32,
    direction: *mut f32,
    aligned_mean: *mut f32,
    width: usize,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let directions = unsafe { borrow(directions, "directions")? };
        let found = directions.shared.layer(layer)?;
        let expected = directions.shared.width();
        if width != expected {
            return Err(Error::WidthMismatch { expected, found: width });
        }
        let targets =
            [("direction", direction, &found.direction), ("aligned_mean", aligned_mean, &found.aligned_mean)];
        check_disjoint(&targets.each_ref().map(|t| Region::new(t.0, t.1.cast_const(), width)), &[])?;
        for (name, pointer, values) in targets.into_iter().filter(|target| !target.1.is_null()) {
            unsafe { slice_mut(pointer, width, name)? }.copy_from_slice(values);
        }
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}
