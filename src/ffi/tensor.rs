//! Rows of activations as C describes them.

use super::boundary::{Region, Sized32, invalid, read_struct};
use crate::activations::{Dtype, Rows, RowsMut};
use crate::device::DeviceRows;
use crate::error::{Error, Result};
use std::ffi::c_void;
use std::mem::offset_of;

/// IEEE 754 binary32.
pub const EMAUDIT_DTYPE_F32: u32 = 1;
/// IEEE 754 binary16.
pub const EMAUDIT_DTYPE_F16: u32 = 2;
/// bfloat16: the upper half of a binary32.
pub const EMAUDIT_DTYPE_BF16: u32 = 3;

const _: () = assert!(
    EMAUDIT_DTYPE_F32 == Dtype::F32 as u32
        && EMAUDIT_DTYPE_F16 == Dtype::F16 as u32
        && EMAUDIT_DTYPE_BF16 == Dtype::Bf16 as u32
);

/// A borrowed matrix of activations, in host memory where a function does not say otherwise: `rows` rows of `cols` elements in native byte order,
/// contiguous within a row. Row i begins at element `i * row_stride`. The library keeps no pointer to it
/// after the call.
///
/// Begin with `EMAUDIT_TENSOR_INIT`. A call that only scores never writes through `data`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_tensor {
    /// `sizeof(emaudit_tensor)`.
    pub struct_size: u32,
    /// Element type, one of `EMAUDIT_DTYPE_*`.
    pub dtype: u32,
    /// First element of the first row, aligned to the element size. Ignored when `rows` is 0.
    pub data: *mut c_void,
    /// Number of rows; 0 is allowed and does nothing.
    pub rows: usize,
    /// Elements per row; must equal the width of the direction.
    pub cols: usize,
    /// Elements from the start of one row to the start of the next, at least `cols`; 0 means `cols`.
    pub row_stride: usize,
}

unsafe impl Sized32 for emaudit_tensor {
    const NAME: &'static str = "emaudit_tensor";
    const FIRST_SIZE: usize = offset_of!(Self, row_stride) + size_of::<usize>();

    fn defaults() -> Self {
        let struct_size = size_of::<Self>() as u32;
        emaudit_tensor { struct_size, dtype: 0, data: std::ptr::null_mut(), rows: 0, cols: 0, row_stride: 0 }
    }
}

/// A tensor whose dtype, width and stride were checked. Pointer and extent are checked with the view.
pub(super) struct Checked {
    data: *mut c_void,
    dtype: Dtype,
    pub(super) rows: usize,
    cols: usize,
    stride: usize,
    pub(super) region: Region,
}

/// Reads and checks a tensor against the width of the direction.
///
/// # Safety
/// A non-null `tensor` is valid for reading the number of bytes its `struct_size` states.
pub(super) unsafe fn check(tensor: *const emaudit_tensor, width: usize) -> Result<Checked> {
    let tensor = unsafe { read_struct(tensor)? };
    let dtype = Dtype::try_from(tensor.dtype)?;
    if tensor.cols != width {
        return Err(Error::WidthMismatch { expected: width, found: tensor.cols });
    }
    let stride = if tensor.row_stride == 0 { tensor.cols } else { tensor.row_stride };
    if stride < tensor.cols {
        return Err(invalid(format!("row_stride {stride} is below cols {}", tensor.cols)));
    }
    // An impossible extent saturates here and is refused when the view is made.
    let whole = tensor.rows.saturating_sub(1).saturating_mul(stride).saturating_add(tensor.cols);
    let elements = if tensor.rows == 0 { 0 } else { whole };
    let bytes = elements.saturating_mul(dtype.size());
    let region = Region::new("emaudit_tensor.data", tensor.data.cast::<u8>().cast_const(), bytes);
    Ok(Checked { data: tensor.data, dtype, rows: tensor.rows, cols: tensor.cols, stride, region })
}

impl Checked {
    /// The rows for reading.
    ///
    /// # Safety
    /// The memory the tensor describes is readable and nobody writes it during `'a`.
    pub(super) unsafe fn rows<'a>(&self) -> Result<Rows<'a>> {
        unsafe {
            Rows::from_raw(self.data.cast_const().cast(), self.dtype, self.rows, self.cols, self.stride)
        }
    }

    /// The rows on a device.
    ///
    /// # Safety
    /// As [`DeviceRows::from_raw`].
    pub(super) unsafe fn device_rows(&self) -> Result<DeviceRows> {
        let address = self.data.addr() as u64;
        unsafe { DeviceRows::from_raw(address, self.dtype, self.rows, self.cols, self.stride) }
    }

    /// The rows for editing.
    ///
    /// # Safety
    /// The memory the tensor describes is writable and nobody else uses it during `'a`.
    pub(super) unsafe fn rows_mut<'a>(&self) -> Result<RowsMut<'a>> {
        unsafe { RowsMut::from_raw(self.data.cast(), self.dtype, self.rows, self.cols, self.stride) }
    }
}
