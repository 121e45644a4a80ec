//! Tensors of other libraries, viewed where they lie: DLPack on the CPU. The only `unsafe` of this crate.

use crate::error::{OrRaise, invalid};
use emaudit::{Dtype, Rows, RowsMut};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};
use std::ffi::{CStr, c_void};

const CPU: i32 = 1;
const CPU_PINNED: i32 = 3;
const READ_ONLY: u64 = 1;
const COPIED: u64 = 2;

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: *mut c_void,
    flags: u64,
    tensor: DlTensor,
}

/// A tensor as rows: the last dimension is the width, all others together count rows. Keeps its memory alive.
pub struct View<'py> {
    // Holds the capsule, and with it the tensor, until the view is dropped.
    capsule: Bound<'py, PyCapsule>,
    address: usize,
    dtype: Dtype,
    leading: Vec<usize>,
    rows: usize,
    cols: usize,
    stride: usize,
    writable: bool,
}

impl<'py> View<'py> {
    /// Views any object with `__dlpack__`: numpy, torch, jax and others, and numpy's bfloat16 of ml_dtypes.
    pub fn new(tensor: &Bound<'py, PyAny>) -> PyResult<View<'py>> {
        let py = tensor.py();
        let bits = as_bits(tensor)?;
        let exported = bits.as_ref().unwrap_or(tensor);
        let refuse = |error: PyErr| {
            let kind = tensor.get_type();
            let refused = invalid(py, format!("cannot view {kind} as rows: {}", error.value(py)));
            refused.set_cause(py, Some(error));
            refused
        };
        let device: (i32, i32) =
            exported.call_method0("__dlpack_device__").and_then(|pair| pair.extract()).map_err(refuse)?;
        if ![CPU, CPU_PINNED].contains(&device.0) {
            let sentence = format!(
                "the tensor is on DLPack device {}; rows are read on the CPU: move it there",
                device.0
            );
            return Err(invalid(py, sentence));
        }
        let capsule = export(exported).map_err(refuse)?;
        View::of_capsule(capsule, bits.is_some())
    }

    fn of_capsule(capsule: Bound<'py, PyCapsule>, bits: bool) -> PyResult<View<'py>> {
        let py = capsule.py();
        let (header, flags) = header(&capsule)?;
        let DlTensor { ndim, code, bits: size, lanes, .. } = *header;
        let dtype = match (bits, code, size, lanes) {
            (false, 2, 32, 1) => Dtype::F32,
            (false, 2, 16, 1) => Dtype::F16,
            (false, 4, 16, 1) | (true, 1, 16, 1) => Dtype::Bf16,
            _ => {
                let kinds = ["int", "uint", "float", "opaque", "bfloat", "complex", "bool"];
                let kind = kinds.get(usize::from(code)).unwrap_or(&"type ");
                return Err(invalid(py, format!("rows are float32, float16 or bfloat16, not {kind}{size}")));
            }
        };
        if ndim < 1 {
            return Err(invalid(py, "a single number is no row; the last dimension is the width"));
        }
        // SAFETY: DLPack: `shape` has `ndim` elements, and so has `strides` where it is not null.
        let (shape, strides) = unsafe {
            let shape = std::slice::from_raw_parts(header.shape, ndim as usize);
            let strides = (!header.strides.is_null())
                .then(|| std::slice::from_raw_parts(header.strides, ndim as usize));
            (shape, strides)
        };
        let shape: Vec<usize> = shape.iter().map(|n| usize::try_from(*n).unwrap_or(0)).collect();
        let strides = strides.map_or_else(|| compact(&shape), <[i64]>::to_vec);
        let (cols, leading) = (shape[shape.len() - 1], shape[..shape.len() - 1].to_vec());
        if cols > 1 && strides[leading.len()] != 1 {
            let step = strides[leading.len()];
            return Err(invalid(py, format!("the elements of a row lie {step} apart; make rows contiguous")));
        }
        let stride = row_stride(&leading, &strides).map_err(|sentence| invalid(py, sentence))?;
        Ok(View {
            address: (header.data as usize).wrapping_add(header.byte_offset as usize),
            dtype,
            rows: leading.iter().product(),
            leading,
            cols,
            stride,
            writable: flags & (READ_ONLY | COPIED) == 0,
            capsule,
        })
    }

    /// Shape without the width.
    pub fn leading(&self) -> &[usize] {
        &self.leading
    }

    /// The rows, to read. Python's side promises that nobody writes to them meanwhile.
    pub fn read(&self) -> PyResult<Rows<'_>> {
        let py = self.capsule.py();
        // SAFETY: the capsule keeps the memory alive; DLPack states its extent. Writers: see the documentation of the module.
        unsafe { Rows::from_raw(self.address as *const u8, self.dtype, self.rows, self.cols, self.stride) }
            .or_raise(py)
    }

    /// The rows, to edit in place.
    pub fn write(&mut self) -> PyResult<RowsMut<'_>> {
        let py = self.capsule.py();
        if !self.writable {
            return Err(invalid(
                py,
                "the tensor is read-only; rows are edited in place: give one that can be written to",
            ));
        }
        // SAFETY: as in `read`, and the exporter says that it may be written to.
        unsafe { RowsMut::from_raw(self.address as *mut u8, self.dtype, self.rows, self.cols, self.stride) }
            .or_raise(py)
    }
}

/// A new numpy array, and its elements.
pub struct Output<'py> {
    pub array: Bound<'py, PyAny>,
    view: View<'py>,
}

impl<'py> Output<'py> {
    /// float32 of that shape.
    pub fn new(py: Python<'py>, shape: &[usize]) -> PyResult<Output<'py>> {
        let array = numpy(py)?.call_method1("empty", (shape.to_vec(), "float32"))?;
        // As one row, whatever the shape.
        let view = View::new(&array.call_method1("reshape", (-1,))?)?;
        Ok(Output { array, view })
    }

    pub fn elements(&mut self) -> PyResult<&mut [f32]> {
        let (cols, py) = (self.view.cols, self.view.capsule.py());
        self.view.write()?;
        if cols == 0 {
            return Ok(&mut []);
        }
        if self.view.dtype != Dtype::F32 {
            return Err(invalid(py, "numpy made no float32 array"));
        }
        // SAFETY: `write` checked pointer and alignment; the array is new, contiguous, and nobody else has it yet.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.view.address as *mut f32, cols) })
    }
}

/// Bytes as a numpy array of uint8 in that shape.
pub fn bytes<'py>(py: Python<'py>, values: Vec<u8>, shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
    let flat =
        numpy(py)?.call_method1("frombuffer", (pyo3::types::PyByteArray::new(py, &values), "uint8"))?;
    flat.call_method1("reshape", (shape.to_vec(),))
}

/// Numbers as f32: a list, an array, a tensor of any kind; converted, hence copied.
pub fn floats(values: &Bound<'_, PyAny>) -> PyResult<(Vec<f32>, Vec<usize>)> {
    let py = values.py();
    let array = numpy(py)?
        .call_method1("asarray", (values, "float32"))
        .map_err(|error| invalid(py, format!("these are no numbers: {}", error.value(py))))?;
    let shape: Vec<usize> = array.getattr("shape")?.extract()?;
    Ok((array.call_method1("reshape", (-1,))?.call_method0("tolist")?.extract()?, shape))
}

fn numpy(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    py.import("numpy")
}

/// numpy has no bfloat16 of its own and does not export that of ml_dtypes: its bits, in the same memory.
fn as_bits<'py>(tensor: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = tensor.py();
    if !tensor.is_instance(&numpy(py)?.getattr("ndarray")?)? {
        return Ok(None);
    }
    let name: String = tensor.getattr("dtype")?.getattr("name")?.extract()?;
    (name == "bfloat16").then(|| tensor.call_method1("view", ("uint16",))).transpose()
}

/// The capsule, in the version that can say "read-only" where the exporter knows it.
fn export<'py>(tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyCapsule>> {
    let py = tensor.py();
    let options = PyDict::new(py);
    options.set_item("max_version", (1, 0))?;
    let capsule = match tensor.call_method("__dlpack__", (), Some(&options)) {
        Err(error) if error.is_instance_of::<pyo3::exceptions::PyTypeError>(py) => {
            tensor.call_method0("__dlpack__")?
        }
        answer => answer?,
    };
    Ok(capsule.cast_into::<PyCapsule>()?)
}

fn header<'a>(capsule: &'a Bound<'_, PyCapsule>) -> PyResult<(&'a DlTensor, u64)> {
    const PLAIN: &CStr = c"dltensor";
    const VERSIONED: &CStr = c"dltensor_versioned";
    if capsule.is_valid_checked(Some(VERSIONED)) {
        let pointer = capsule.pointer_checked(Some(VERSIONED))?.cast::<Versioned>();
        // SAFETY: the name says what lies there. Version and flags come before anything that a later major version may move.
        let managed = unsafe { pointer.as_ref() };
        if managed.major != 1 {
            return Err(invalid(capsule.py(), format!("DLPack version {} is not understood", managed.major)));
        }
        return Ok((&managed.tensor, managed.flags));
    }
    let pointer = capsule.pointer_checked(Some(PLAIN))?.cast::<DlTensor>();
    // SAFETY: the name says what lies there: a managed tensor, which begins with the tensor.
    Ok((unsafe { pointer.as_ref() }, 0))
}

fn compact(shape: &[usize]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * shape[i + 1] as i64;
    }
    strides
}

/// The one distance between rows, where the leading dimensions have one.
fn row_stride(leading: &[usize], strides: &[i64]) -> Result<usize, String> {
    let mut found: Option<(i64, i64)> = None;
    for (&count, &stride) in leading.iter().zip(strides).rev().filter(|(count, _)| **count != 1) {
        found = match found {
            None => Some((stride, count as i64)),
            Some((step, rows)) if stride == step * rows => Some((step, rows * count as i64)),
            Some(_) if leading.contains(&0) => Some((0, 0)),
            Some(_) => {
                return Err("the rows do not lie evenly; give a view with one stride between rows".into());
            }
        };
    }
    usize::try_from(found.map_or(0, |(step, _)| step)).map_err(|_| "the rows run backwards in memory".into())
}
