//! Scoring and steering rows that live on an NVIDIA GPU, on the caller's stream.
//!
//! Nothing here waits for the GPU, copies to the host, allocates or locks once a [`DeviceProbe`] is made, beyond what the
//! driver does to enqueue: a call checks its arguments and enqueues one kernel, also while the stream is being captured
//! into a graph. So what only the GPU sees cannot be a returned error: a row that is not finite has a NaN for a score and
//! [`RowStatus::NonFinite`], and a strength that steering refuses leaves its row alone with [`RowStatus::BadStrength`].
//! Whoever steers without looking at the statuses does not know what was done.
//!
//! Each call reads every activation once, and writes it once where it is edited: rows of up to 8192 elements stay in
//! registers between scoring and editing, where address and row stride are multiples of 16 bytes and the width is one of
//! 8. Other rows are read twice, and so are those in a block with one whose sum of squares f32 cannot hold (a row of
//! zeros, one that is not finite) or whose edit comes near the end of the dtype's range. Scores, statuses and strengths
//! are 9 bytes a row; directions come from the cache.

use crate::activations::{Dtype, Layout};
use crate::error::{Error, Result};
use crate::kernel::cuda::driver::{Driver, Handle, Memory, Module};
use crate::kernel::cuda::launch::{self, Matrix, SteerMemory, VECTOR};
use crate::probe::{Probe, RowStatus, ScoreUnit, check_length};
use crate::steering::Steering;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::Arc;

/// A stream of the driver (`CUstream`, `cudaStream_t`); null is the default stream of the context.
#[derive(Clone, Copy, Debug)]
pub struct DeviceStream(Handle);

impl DeviceStream {
    /// The stream with this handle.
    ///
    /// # Safety
    /// - It is null, one of the driver's special handles, or a stream that lives as long as the value, of the context in
    ///   which every [`DeviceProbe`] used with it was made.
    /// - Each of those lives until the stream has run what was enqueued with it, and as long as a graph captured from the
    ///   stream may be launched.
    pub unsafe fn from_raw(stream: *mut c_void) -> Self {
        DeviceStream(stream)
    }
}

/// Elements in memory of a GPU, by address.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSlice<T> {
    address: u64,
    len: usize,
    of: PhantomData<T>,
}

impl<T> DeviceSlice<T> {
    /// `len` elements at `address`, which is ignored where there are none.
    ///
    /// Errors: [`Error::InvalidArgument`] for a null or misaligned address or an impossible length.
    ///
    /// # Safety
    /// Until the stream has run what is enqueued with it, with a graph every time, the elements are memory that the
    /// context can reach, nothing else writes to them, nor reads what the call writes, and no other argument of the call
    /// overlaps with them where either is written.
    pub unsafe fn from_raw(address: u64, len: usize) -> Result<Self> {
        let size = size_of::<T>();
        let refuse = |reason: &str| Err(Error::InvalidArgument(format!("an array on the device {reason}")));
        if len > 0 && len.checked_mul(size).is_none_or(|bytes| bytes > isize::MAX as usize) {
            return refuse("exceeds the address space");
        }
        if len > 0 && (address == 0 || !address.is_multiple_of(size as u64)) {
            return refuse("is at a null address or not aligned to its elements");
        }
        Ok(DeviceSlice { address, len, of: PhantomData })
    }
}

/// Rows in memory of a GPU, by address: `rows x cols`, contiguous within a row.
#[derive(Clone, Copy, Debug)]
pub struct DeviceRows {
    address: u64,
    layout: Layout,
}

impl DeviceRows {
    /// Rows at `address`, `row_stride` elements apart. The address is ignored where there is no row or no column.
    ///
    /// Errors: [`Error::InvalidArgument`] for a null or misaligned address, overlapping rows, or an impossible extent.
    ///
    /// # Safety
    /// As [`DeviceSlice::from_raw`], for every row.
    pub unsafe fn from_raw(
        address: u64,
        dtype: Dtype,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self> {
        let layout = Layout { dtype, rows, cols, stride: row_stride };
        layout.check_pointer(address as usize)?;
        layout.check_disjoint()?;
        Ok(DeviceRows { address, layout })
    }

    fn matrix(&self) -> Matrix<u64> {
        let DeviceRows { address: data, layout: Layout { dtype, rows, cols: width, stride } } = *self;
        Matrix { data, dtype, rows, width, stride, aligned: data.is_multiple_of(16) }
    }
}

/// A probe whose direction is in memory of a GPU.
///
/// Immutable, `Send` and `Sync`; a clone shares everything. Drop it only when every stream has run what was enqueued
/// with it, and no graph that holds such a call will be launched again. Calls need its context to be current, as all work
/// on a stream does.
#[derive(Clone, Debug)]
pub struct DeviceProbe {
    probe: Probe,
    module: Arc<Module>,
    /// The unit direction and behind it the raw one, each filled up with zeros to whole vectors.
    vectors: Arc<Memory>,
}

impl DeviceProbe {
    /// Copies a probe's direction into the context that is current in this thread, and loads the kernels there if
    /// nobody has: the first time the driver compiles them, which takes a moment. It waits for the GPU: neither this nor
    /// dropping the last clone may be done while a stream of the context is being captured.
    ///
    /// Errors: [`Error::DeviceUnavailable`] without a driver or a card; [`Error::InvalidArgument`] without a current
    /// context; [`Error::Device`] for what the driver refuses.
    pub fn new(probe: &Probe) -> Result<DeviceProbe> {
        DeviceProbe::with_driver(probe, Driver::of_this_machine()?)
    }

    pub(crate) fn with_driver(probe: &Probe, driver: &'static Driver) -> Result<DeviceProbe> {
        let module = Module::of_current_context(driver)?;
        let mut vectors = Vec::with_capacity(2 * padded(probe.width()));
        for vector in [probe.unit_direction(), probe.direction()] {
            vectors.extend_from_slice(vector);
            vectors.resize(vectors.len().next_multiple_of(VECTOR), 0.0);
        }
        let vectors = Arc::new(Memory::of(&module, &vectors)?);
        Ok(DeviceProbe { probe: probe.clone(), module, vectors })
    }

    /// The probe it was made from.
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// How far a raw score can be from the exact one, for a row of norm `row_norm`; see [`Probe::error_bound`].
    pub fn error_bound(&self, row_norm: f64) -> f64 {
        self.probe
            .error_bound_with(row_norm, |reach| crate::kernel::cuda::error_bound(self.probe.width(), reach))
    }

    /// Enqueues the scoring of every row: `scores[i]` for row `i`, a NaN where it cannot be scored, and its status
    /// where asked for.
    ///
    /// Errors: [`Error::WidthMismatch`], [`Error::InvalidArgument`] (lengths), [`Error::NotCalibrated`], [`Error::Device`];
    /// nothing is enqueued then.
    pub fn score(
        &self,
        rows: &DeviceRows,
        unit: ScoreUnit,
        scores: DeviceSlice<f32>,
        status: Option<DeviceSlice<RowStatus>>,
        stream: DeviceStream,
    ) -> Result<()> {
        self.probe.check_width(rows.layout.cols)?;
        self.probe.check_unit(unit)?;
        check_length("scores", scores.len, rows.layout.rows)?;
        check_optional("row statuses", &status, rows)?;
        let scale = self.probe.scale(unit);
        let launch = launch::score(rows.matrix(), self.unit(), scores.address, address_of(status), &scale)?;
        // SAFETY: the launch was made of checked shapes; the memory is good by the word of those who made the views.
        unsafe { self.module.launch(&launch, stream.0) }
    }

    /// Enqueues the steering of every row, and before it, where `scores` is given, its scoring: those are of the rows
    /// **before** the edit. `steering` must have been made from this probe, or a clone of it.
    ///
    /// Gate, dose limit and strengths as in [`Steering::apply`]; a row whose strength is not finite, or negative for a
    /// clamp, is left alone with [`RowStatus::BadStrength`].
    ///
    /// Errors: as [`DeviceProbe::score`], and [`Error::InvalidArgument`] for steering with another probe.
    pub fn steer(
        &self,
        steering: &Steering,
        rows: &DeviceRows,
        scores: Option<(ScoreUnit, DeviceSlice<f32>)>,
        strengths: Option<DeviceSlice<f32>>,
        status: DeviceSlice<RowStatus>,
        stream: DeviceStream,
    ) -> Result<()> {
        if !steering.probe().is_same(&self.probe) {
            return Err(Error::InvalidArgument("the steering was made from another probe".into()));
        }
        self.probe.check_width(rows.layout.cols)?;
        let (unit, scores) = scores.unzip();
        let unit = unit.unwrap_or(ScoreUnit::Raw);
        self.probe.check_unit(unit)?;
        check_optional("scores", &scores, rows)?;
        check_optional("strengths", &strengths, rows)?;
        check_length("row statuses", status.len, rows.layout.rows)?;
        let memory = SteerMemory {
            direction: self.unit(),
            vector: if steering.takes_raw_direction() { self.direction() } else { self.unit() },
            strengths: address_of(strengths),
            scores: address_of(scores),
            status: status.address,
        };
        let launch =
            launch::steer(rows.matrix(), memory, &self.probe.scale(unit), &steering.edit_on_device())?;
        // SAFETY: as above.
        unsafe { self.module.launch(&launch, stream.0) }
    }

    fn unit(&self) -> u64 {
        self.vectors.address
    }

    fn direction(&self) -> u64 {
        self.vectors.address + (padded(self.probe.width()) * size_of::<f32>()) as u64
    }
}

fn padded(width: usize) -> usize {
    width.next_multiple_of(VECTOR)
}

fn check_optional<T>(what: &str, array: &Option<DeviceSlice<T>>, rows: &DeviceRows) -> Result<()> {
    array.as_ref().map_or(Ok(()), |array| check_length(what, array.len, rows.layout.rows))
}

fn address_of<T>(array: Option<DeviceSlice<T>>) -> u64 {
    array.map_or(0, |array| array.address)
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
