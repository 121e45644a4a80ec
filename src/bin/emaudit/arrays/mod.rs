//! Arrays in files of other programs, `.npy` and safetensors: the header first, the numbers block by block.

mod layers;
mod npy;
mod tensors;

pub use layers::{Layout, layout};

use emaudit::activations::Dtype;
use emaudit::directions::open_regular;
use emaudit::{Error, Result, Rows};
use half::{bf16, f16};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// An opened array; its numbers are read in C order.
pub struct Array {
    path: PathBuf,
    file: File,
    dtype: Dtype,
    big_endian: bool,
    shape: Vec<usize>,
    /// Elements not yet read.
    left: usize,
}

/// How one number is stored.
#[derive(Clone, Copy)]
struct Kind {
    number: Number,
    big_endian: bool,
}

/// What one number is.
#[derive(Clone, Copy)]
enum Number {
    Float(Dtype),
    Integer { bytes: usize, signed: bool },
}

impl Number {
    fn size(self) -> usize {
        match self {
            Number::Float(dtype) => dtype.size(),
            Number::Integer { bytes, .. } => bytes,
        }
    }
}

/// What a header says of its array.
struct Header {
    kind: Kind,
    shape: Vec<usize>,
    /// Bytes of the file before the first number, and of all numbers.
    begin: u64,
    len: u64,
}

/// Numbers in memory, as they were stored.
pub enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// A refusal that names the file.
fn refuse(path: &Path, sentence: impl std::fmt::Display) -> Error {
    Error::InvalidArgument(format!("{}: {sentence}", path.display()))
}

/// Opens a file at the first number of its array, with the number of them.
fn open(path: &Path, tensor: Option<&str>) -> Result<(File, Header, usize)> {
    let io = |action| move |source| Error::Io { action, path: path.to_owned(), source };
    let (mut file, size) = open_regular(path)?;
    let mut start = Vec::new();
    file.by_ref().take(9).read_to_end(&mut start).map_err(io("read"))?;
    file.rewind().map_err(io("read"))?;
    let header = if start.starts_with(npy::MAGIC) {
        if let Some(name) = tensor {
            return Err(refuse(path, format_args!("a .npy file has no tensor names; leave out {name:?}")));
        }
        npy::header(&mut file)
    } else if start.get(8) == Some(&b'{') {
        tensors::header(&mut file, tensor)
    } else {
        Err("this is neither a .npy nor a safetensors file".into())
    };
    let header = header.map_err(|sentence| refuse(path, sentence))?;
    let end = header.begin.saturating_add(header.len);
    if start.starts_with(npy::MAGIC) && end < size {
        let sentence = format_args!(
            "{} bytes follow the array that is announced; a .npy file holds one, save each in its own",
            size - end
        );
        return Err(refuse(path, sentence));
    }
    let elements = header.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let bytes = elements.and_then(|n| n.checked_mul(header.kind.number.size()));
    let holds = bytes.is_some_and(|n| n as u64 == header.len) && end <= size;
    if !holds {
        let sentence = format_args!(
            "an array of shape {:?} is announced, {} bytes of numbers are there; write the file again",
            header.shape,
            size.saturating_sub(header.begin).min(header.len)
        );
        return Err(refuse(path, sentence));
    }
    file.seek(SeekFrom::Start(header.begin)).map_err(io("read"))?;
    Ok((file, header, elements.unwrap_or(0)))
}

/// `count` integers, none below 0: the array of a `.npy` file, or the tensor of a safetensors file.
pub fn integers(path: &Path, tensor: Option<&str>, count: usize) -> Result<Vec<u64>> {
    let (mut file, header, elements) = open(path, tensor)?;
    let Number::Integer { bytes: size, signed } = header.kind.number else {
        return Err(refuse(path, "its numbers are not integers; lengths are"));
    };
    if header.shape != [count] {
        let sentence = format_args!("{count} lengths are needed, its shape is {:?}", header.shape);
        return Err(refuse(path, sentence));
    }
    let mut bytes = room(elements * size).map_err(|sentence| refuse(path, sentence))?;
    bytes.resize(elements * size, 0);
    let io = |source| Error::Io { action: "read", path: path.to_owned(), source };
    file.read_exact(&mut bytes).map_err(io)?;
    let number = |bytes: &[u8]| {
        let shift = |n: u64, b: &u8| n << 8 | u64::from(*b);
        let number = if header.kind.big_endian {
            bytes.iter().fold(0, shift)
        } else {
            bytes.iter().rev().fold(0, shift)
        };
        let negative = signed && number >> (8 * size - 1) == 1;
        if negative { Err(refuse(path, "a length is below 0")) } else { Ok(number) }
    };
    bytes.chunks_exact(size).map(number).collect()
}

impl Array {
    /// Opens the array of a `.npy` file, or the tensor of a safetensors file; `tensor` may be left out where there is one.
    pub fn open(path: &Path, tensor: Option<&str>) -> Result<Array> {
        let (file, header, elements) = open(path, tensor)?;
        let Header { kind: Kind { number, big_endian }, shape, .. } = header;
        let Number::Float(dtype) = number else {
            return Err(refuse(path, "its numbers are integers; activations are floating-point numbers"));
        };
        Ok(Array { path: path.to_owned(), file, dtype, big_endian, shape, left: elements })
    }

    /// Lengths of the dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How the numbers are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// A refusal that names this file.
    pub fn refuse(&self, sentence: impl std::fmt::Display) -> Error {
        refuse(&self.path, sentence)
    }

    /// The next `elements` numbers, or as many as are left.
    pub fn read(&mut self, elements: usize) -> Result<Values> {
        let elements = elements.min(self.left);
        let mut bytes = self.room(elements * self.dtype.size())?;
        bytes.resize(elements * self.dtype.size(), 0);
        let io = |source| Error::Io { action: "read", path: self.path.clone(), source };
        self.file.read_exact(&mut bytes).map_err(io)?;
        self.left -= elements;
        self.decode(&bytes)
    }

    /// The next `elements` numbers, or as many as are left, widened to f32, which is exact.
    pub fn read_f32(&mut self, elements: usize) -> Result<Vec<f32>> {
        match self.read(elements)? {
            Values::F32(values) => Ok(values),
            Values::F16(values) => self.collected(values.into_iter().map(f16::to_f32)),
            Values::Bf16(values) => self.collected(values.into_iter().map(bf16::to_f32)),
        }
    }

    fn decode(&self, bytes: &[u8]) -> Result<Values> {
        let (dtype, big_endian) = (self.dtype, self.big_endian);
        let halves = || {
            let pairs = bytes.as_chunks::<2>().0.iter();
            pairs.map(|b| if big_endian { u16::from_be_bytes(*b) } else { u16::from_le_bytes(*b) })
        };
        Ok(match dtype {
            Dtype::F32 => {
                let words = bytes.as_chunks::<4>().0.iter();
                let number =
                    |b: &[u8; 4]| if big_endian { f32::from_be_bytes(*b) } else { f32::from_le_bytes(*b) };
                Values::F32(self.collected(words.map(number))?)
            }
            Dtype::F16 => Values::F16(self.collected(halves().map(f16::from_bits))?),
            Dtype::Bf16 => Values::Bf16(self.collected(halves().map(bf16::from_bits))?),
        })
    }

    fn collected<T>(&self, values: impl ExactSizeIterator<Item = T>) -> Result<Vec<T>> {
        let mut collected = self.room(values.len())?;
        collected.extend(values);
        Ok(collected)
    }

    /// Room for `n` elements. A sparse file may announce any number of them.
    fn room<T>(&self, n: usize) -> Result<Vec<T>> {
        room(n).map_err(|sentence| self.refuse(sentence))
    }
}

/// Room for `n` elements, or a sentence where a plain allocation would end the process.
pub fn room<T>(n: usize) -> Result<Vec<T>, String> {
    let mut room = Vec::new();
    let reserved = room.try_reserve_exact(n);
    reserved.map_err(|_| format!("there is no memory for {n} elements of {} bytes", size_of::<T>()))?;
    Ok(room)
}

impl Values {
    /// `rows` rows of `cols` numbers, `stride` apart, the first one after `offset` numbers.
    pub fn rows(&self, offset: usize, rows: usize, cols: usize, stride: usize) -> Result<Rows<'_>> {
        match self {
            Values::F32(v) => Rows::new(&v[offset.min(v.len())..], rows, cols, stride),
            Values::F16(v) => Rows::new(&v[offset.min(v.len())..], rows, cols, stride),
            Values::Bf16(v) => Rows::new(&v[offset.min(v.len())..], rows, cols, stride),
        }
    }
}
