//! Tensors of other libraries, viewed where they lie: DLPack on the CPU and on NVIDIA GPUs. The only `unsafe` of this crate.

use crate::error::{OrRaise, invalid};
use emaudit::device::{DeviceRows, DeviceSlice, DeviceStream};
use emaudit::{Dtype, RowStatus, Rows, RowsMut};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};
use std::ffi::{CStr, c_void};
use std::ops::Range;

const CPU: i32 = 1;
const CUDA: i32 = 2;
const CPU_PINNED: i32 = 3;
const CUDA_MANAGED: i32 = 13;
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
        let refuse = |error| cannot_view(tensor, "rows", error);
        let device = device_of(exported).map_err(refuse)?;
        if ![CPU, CPU_PINNED].contains(&device.0) {
            let mut sentence =
                format!("the tensor is on {}; rows are read on the CPU: move it there", place(device));
            if on_gpu(device) {
                sentence.push_str(", or use probe.to_device()");
            }
            return Err(invalid(py, sentence));
        }
        let capsule = export(exported, None).map_err(refuse)?;
        View::of(Exported::new(capsule)?, bits.is_some())
    }

    fn of(exported: Exported<'py>, bits: bool) -> PyResult<View<'py>> {
        let py = exported.capsule.py();
        let dtype = match (bits, exported.element) {
            (false, (2, 32, 1)) => Dtype::F32,
            (false, (2, 16, 1)) => Dtype::F16,
            (false, (4, 16, 1)) | (true, (1, 16, 1)) => Dtype::Bf16,
            _ => {
                let sentence = format!("rows are float32, float16 or bfloat16, not {}", exported.kind());
                return Err(invalid(py, sentence));
            }
        };
        let Exported { capsule, address, shape, strides, writable, .. } = exported;
        let Some((&cols, leading)) = shape.split_last() else {
            return Err(invalid(py, "a single number is no row; the last dimension is the width"));
        };
        if cols > 1 && strides[leading.len()] != 1 {
            let step = strides[leading.len()];
            return Err(invalid(py, format!("the elements of a row lie {step} apart; make rows contiguous")));
        }
        let stride = row_stride(leading, &strides).map_err(|sentence| invalid(py, sentence))?;
        let (rows, leading) = (leading.iter().product(), leading.to_vec());
        Ok(View { address, dtype, rows, leading, cols, stride, writable, capsule })
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

    fn check_writable(&self) -> PyResult<()> {
        if self.writable {
            return Ok(());
        }
        let sentence = "the tensor is read-only; rows are edited in place: give one that can be written to";
        Err(invalid(self.capsule.py(), sentence))
    }

    /// The rows, to edit in place.
    pub fn write(&mut self) -> PyResult<RowsMut<'_>> {
        let py = self.capsule.py();
        self.check_writable()?;
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

/// What an array with one element per row holds.
pub trait Element {
    /// DLPack's code, bits and lanes.
    const ELEMENT: (u8, u8, u16);
    const NAME: &str;
}

impl Element for f32 {
    const ELEMENT: (u8, u8, u16) = (2, 32, 1);
    const NAME: &str = "float32";
}

impl Element for RowStatus {
    const ELEMENT: (u8, u8, u16) = (1, 8, 1);
    const NAME: &str = "uint8";
}

/// The tensors of one call on a GPU. Holds all of them until it is dropped, after the launch; from then on the caller does.
pub struct DeviceCall<'py> {
    stream: usize,
    device: (i32, i32),
    rows: View<'py>,
    arrays: Vec<Bound<'py, PyCapsule>>,
    taken: Vec<(&'static str, Range<usize>)>,
}

impl<'py> DeviceCall<'py> {
    /// Begins with the rows, which may be edited where `edited`. Whoever made them lets `stream` wait for its own work.
    pub fn new(rows: &Bound<'py, PyAny>, edited: bool, stream: usize) -> PyResult<DeviceCall<'py>> {
        let (exported, device) = on_device(rows, "rows", stream)?;
        let view = View::of(exported, false)?;
        if edited {
            view.check_writable()?;
        }
        let mut call = DeviceCall { stream, device, arrays: Vec::new(), taken: Vec::new(), rows: view };
        let View { rows, cols, stride, dtype, address, .. } = call.rows;
        let elements = rows.saturating_sub(1).saturating_mul(stride).saturating_add(cols);
        let elements = if rows == 0 || cols == 0 { 0 } else { elements };
        call.take("rows", address, elements.saturating_mul(dtype.size()))?;
        Ok(call)
    }

    /// An array with one element per row, in the shape of the rows or flat.
    pub fn array<T: Element>(
        &mut self,
        array: &Bound<'py, PyAny>,
        name: &'static str,
        written: bool,
    ) -> PyResult<DeviceSlice<T>> {
        let (py, rows) = (array.py(), self.rows.rows);
        let (exported, device) = on_device(array, name, self.stream)?;
        let refuse = |sentence: String| Err(invalid(py, sentence));
        if device.1 != self.device.1 {
            return refuse(format!(
                "`{name}` is on {}, the rows are on {}",
                place(device),
                place(self.device)
            ));
        }
        if exported.element != T::ELEMENT {
            return refuse(format!("`{name}` is {}, not {}", exported.kind(), T::NAME));
        }
        let (shape, leading) = (&exported.shape, &self.rows.leading);
        if shape != leading && *shape != [rows] {
            return refuse(format!("`{name}` of shape {shape:?} for rows of shape {leading:?}"));
        }
        if rows > 0 && row_stride(shape, &exported.strides) != Ok(usize::from(rows > 1)) {
            return refuse(format!("the elements of `{name}` lie apart; make it contiguous"));
        }
        if written && !exported.writable {
            return refuse(format!("`{name}` is read-only; it is written to"));
        }
        self.take(name, exported.address, rows.saturating_mul(size_of::<T>()))?;
        self.arrays.push(exported.capsule);
        // SAFETY: device memory of that extent, as DLPack says, that overlaps no other of this call. That it lives and that
        // nobody else uses it until the stream has run the kernel: see the documentation of the module.
        unsafe { DeviceSlice::from_raw(exported.address as u64, rows) }.or_raise(py)
    }

    /// Runs what enqueues, with the GIL released: a full queue makes the driver wait.
    pub fn enqueue(
        &self,
        work: impl FnOnce(&DeviceRows, DeviceStream) -> emaudit::Result<()> + Send,
    ) -> PyResult<()> {
        let (py, stream) = (self.rows.capsule.py(), self.stream);
        let View { address, dtype, rows, cols, stride, .. } = self.rows;
        // SAFETY: as in `array`.
        let rows = unsafe { DeviceRows::from_raw(address as u64, dtype, rows, cols, stride) }.or_raise(py)?;
        py.detach(|| {
            // SAFETY: a stream's handle by the caller's word, as the documentation of the module asks.
            let stream = unsafe { DeviceStream::from_raw(std::ptr::without_provenance_mut(stream)) };
            work(&rows, stream)
        })
        .or_raise(py)
    }

    /// Refuses what overlaps: nearly all that is passed is written to.
    fn take(&mut self, name: &'static str, address: usize, bytes: usize) -> PyResult<()> {
        let region = address..address.saturating_add(bytes);
        let meets = |other: &Range<usize>| region.start < other.end && other.start < region.end;
        if let Some((other, _)) = self.taken.iter().find(|(_, other)| meets(other)) {
            let py = self.rows.capsule.py();
            return Err(invalid(py, format!("`{name}` and `{other}` overlap in memory")));
        }
        self.taken.push((name, region));
        Ok(())
    }
}

/// Exports a tensor on an NVIDIA GPU, ready for `stream` to use it.
fn on_device<'py>(
    tensor: &Bound<'py, PyAny>,
    name: &str,
    stream: usize,
) -> PyResult<(Exported<'py>, (i32, i32))> {
    let py = tensor.py();
    let refuse = |error| cannot_view(tensor, name, error);
    let check = |device| match on_gpu(device) {
        true => Ok(()),
        false => Err(invalid(py, format!("`{name}` is on {}, not on a CUDA device", place(device)))),
    };
    // Asked first: no other device takes a stream.
    let device = device_of(tensor).map_err(refuse)?;
    check(device)?;
    let exported = Exported::new(export(tensor, Some(stream)).map_err(refuse)?)?;
    check(exported.device)?;
    if exported.copied {
        let sentence = format!("`{name}` exports a copy, which would be gone before the kernel runs");
        return Err(invalid(py, sentence));
    }
    Ok((exported, device))
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

fn cannot_view(tensor: &Bound<'_, PyAny>, name: &str, error: PyErr) -> PyErr {
    let (py, kind) = (tensor.py(), tensor.get_type());
    let refused = invalid(py, format!("cannot view {kind} as {name}: {}", error.value(py)));
    refused.set_cause(py, Some(error));
    refused
}

fn device_of(tensor: &Bound<'_, PyAny>) -> PyResult<(i32, i32)> {
    tensor.call_method0("__dlpack_device__")?.extract()
}

fn on_gpu(device: (i32, i32)) -> bool {
    [CUDA, CUDA_MANAGED].contains(&device.0)
}

/// A device in words.
fn place((kind, number): (i32, i32)) -> String {
    match kind {
        CPU => "the CPU".into(),
        CUDA => format!("CUDA device {number}"),
        CPU_PINNED => "the CPU (pinned memory)".into(),
        CUDA_MANAGED => format!("CUDA device {number} (managed memory)"),
        _ => format!("DLPack device {kind}, number {number}"),
    }
}

/// The capsule, in the version that can say "read-only" where the exporter knows it. On a GPU its exporter makes `stream`
/// wait for what it has not finished yet.
fn export<'py>(tensor: &Bound<'py, PyAny>, stream: Option<usize>) -> PyResult<Bound<'py, PyCapsule>> {
    let py = tensor.py();
    let options = PyDict::new(py);
    if let Some(stream) = stream {
        // Null is ambiguous in DLPack: the legacy default stream is 1 there.
        options.set_item("stream", stream.max(1))?;
    }
    options.set_item("max_version", (1, 0))?;
    let capsule = match tensor.call_method("__dlpack__", (), Some(&options)) {
        Err(error) if error.is_instance_of::<pyo3::exceptions::PyTypeError>(py) => {
            options.del_item("max_version")?;
            tensor.call_method("__dlpack__", (), Some(&options))?
        }
        answer => answer?,
    };
    Ok(capsule.cast_into::<PyCapsule>()?)
}

/// What a capsule says of its tensor.
struct Exported<'py> {
    // Holds the tensor.
    capsule: Bound<'py, PyCapsule>,
    address: usize,
    device: (i32, i32),
    /// DLPack's code, bits and lanes.
    element: (u8, u8, u16),
    shape: Vec<usize>,
    strides: Vec<i64>,
    writable: bool,
    copied: bool,
}

impl<'py> Exported<'py> {
    fn new(capsule: Bound<'py, PyCapsule>) -> PyResult<Exported<'py>> {
        let (header, flags) = header(&capsule)?;
        let ndim = usize::try_from(header.ndim).unwrap_or(0);
        // SAFETY: DLPack: `shape` has `ndim` elements, and so has `strides` where it is not null.
        let (shape, strides) = unsafe { (numbers(header.shape, ndim), numbers(header.strides, ndim)) };
        let shape: Vec<usize> = shape.iter().map(|n| usize::try_from(*n).unwrap_or(0)).collect();
        Ok(Exported {
            address: (header.data as usize).wrapping_add(header.byte_offset as usize),
            device: (header.device_type, header.device_id),
            element: (header.code, header.bits, header.lanes),
            strides: if header.strides.is_null() { compact(&shape) } else { strides.to_vec() },
            shape,
            writable: flags & (READ_ONLY | COPIED) == 0,
            copied: flags & COPIED != 0,
            capsule,
        })
    }

    fn kind(&self) -> String {
        let kinds = ["int", "uint", "float", "opaque", "bfloat", "complex", "bool"];
        let (code, bits, _) = self.element;
        format!("{}{bits}", kinds.get(usize::from(code)).unwrap_or(&"type "))
    }
}

/// # Safety
/// `first` is null or points to `count` numbers that outlive the slice.
unsafe fn numbers<'a>(first: *const i64, count: usize) -> &'a [i64] {
    if first.is_null() {
        return &[];
    }
    // SAFETY: by the contract above.
    unsafe { std::slice::from_raw_parts(first, count) }
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
