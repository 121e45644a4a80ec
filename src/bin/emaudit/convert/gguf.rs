//! GGUF, as much of it as control vectors and a model's identity need: little-endian, versions 2 and 3.
//!
//! Everything that a header claims is held against the size of the file before memory is asked for.

use crate::arrays::room;
use emaudit::directions::open_regular;
use emaudit::{Error, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

pub const MAGIC: &[u8] = b"GGUF";
const VERSION: u32 = 3;
const ALIGNMENT: u64 = 32;
/// Bytes of one text, and how many tensors and keys there can be: the largest models stay far below.
const TEXT_CAP: u64 = 16 << 20;
const COUNT_CAP: u64 = 1 << 16;
/// Bytes of the whole header.
const HEADER_CAP: u64 = 256 << 20;
/// Type number of a 32-bit float tensor.
const F32: u32 = 0;
/// The key whose strings are hashed as they are read.
const TOKENS: &str = "tokenizer.ggml.tokens";

/// A value of the metadata, as far as anything here asks for it.
pub enum Value {
    Integer(i128),
    Text(String),
    /// The strings of [`TOKENS`]: how many, and the SHA-256 of each followed by a line feed.
    Tokens(u64, [u8; 32]),
    Other,
}

pub struct Tensor {
    pub name: String,
    /// Innermost first.
    pub dims: Vec<u64>,
    pub kind: u32,
    offset: u64,
}

/// An opened file: its header, and where the numbers are.
pub struct Gguf {
    path: PathBuf,
    reader: BufReader<File>,
    /// Bytes between the reader and the end of the file.
    left: u64,
    pub values: BTreeMap<String, Value>,
    pub tensors: Vec<Tensor>,
    alignment: u64,
    data: u64,
    size: u64,
}

impl Gguf {
    pub fn open(path: &Path) -> Result<Gguf> {
        let (file, size) = open_regular(path)?;
        let mut gguf = Gguf {
            path: path.to_owned(),
            reader: BufReader::new(file),
            left: size,
            values: BTreeMap::new(),
            tensors: Vec::new(),
            alignment: ALIGNMENT,
            data: 0,
            size,
        };
        gguf.read_header()?;
        Ok(gguf)
    }

    /// A refusal that names the file.
    pub fn refuse(&self, sentence: impl std::fmt::Display) -> Error {
        Error::InvalidArgument(format!("{}: {sentence}", self.path.display()))
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        match self.values.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    pub fn integer(&self, key: &str) -> Option<i128> {
        match self.values.get(key) {
            Some(Value::Integer(n)) => Some(*n),
            _ => None,
        }
    }

    /// Proves that every tensor is a vector of `width` 32-bit floats in a place of its own, as control vectors must be.
    pub fn check_vectors(&self, width: u32) -> Result<()> {
        let mut in_file_order: Vec<&Tensor> = self.tensors.iter().collect();
        in_file_order.sort_by_key(|t| t.offset);
        let mut end_before = 0;
        for Tensor { name, dims, kind, offset } in in_file_order {
            // llama.cpp counts trailing dimensions of 1 as none.
            let (elements, rest) = dims.split_first().map_or((0, &[][..]), |(first, rest)| (*first, rest));
            let refuse = |sentence: String| Err(self.refuse(format_args!("tensor {name:?} {sentence}")));
            if *kind != F32 || rest.iter().any(|d| *d != 1) {
                return refuse("is not one vector of 32-bit floats, as a control vector must be".into());
            }
            if elements != u64::from(width) {
                return refuse(format!("has {elements} elements, the residual stream of the model {width}"));
            }
            if !offset.is_multiple_of(self.alignment) {
                return refuse(format!(
                    "begins at {offset}, which is no multiple of the alignment {}; write the file again",
                    self.alignment
                ));
            }
            let end = offset.checked_add(4 * elements);
            let Some(end) = end.filter(|end| self.data.checked_add(*end).is_some_and(|e| e <= self.size))
            else {
                return refuse("lies beyond the end of the file; copy it again".into());
            };
            if *offset < end_before {
                return refuse("overlaps the one before it; write the file again".into());
            }
            end_before = end;
        }
        Ok(())
    }

    /// The numbers of a tensor, after [`Gguf::check_vectors`].
    pub fn vector(&mut self, at: usize) -> Result<Vec<f32>> {
        let Tensor { dims, offset, .. } = &self.tensors[at];
        let (begin, elements) = (self.data + offset, dims.first().map_or(0, |n| *n as usize));
        let mut vector = room(elements).map_err(|sentence| self.refuse(sentence))?;
        let io = |source| Error::Io { action: "read", path: self.path.clone(), source };
        self.reader.seek(SeekFrom::Start(begin)).map_err(io)?;
        for _ in 0..elements {
            let mut bytes = [0; 4];
            self.reader.read_exact(&mut bytes).map_err(io)?;
            vector.push(f32::from_le_bytes(bytes));
        }
        Ok(vector)
    }

    fn read_header(&mut self) -> Result<()> {
        if self.bytes::<4>()? != *MAGIC {
            return Err(self.refuse("this is not a GGUF file"));
        }
        let version = self.u32()?;
        if !(2..=VERSION).contains(&version) {
            return Err(self.refuse(format_args!(
                "GGUF version {version} cannot be read, versions 2 and 3 in little-endian can"
            )));
        }
        let (tensors, values) = (self.u64()?, self.u64()?);
        if tensors.max(values) > COUNT_CAP {
            return Err(self.refuse(format_args!(
                "its header claims {tensors} tensors and {values} keys, at most {COUNT_CAP} of each are possible"
            )));
        }
        for _ in 0..values {
            let key = self.string()?;
            let kind = self.u32()?;
            let value = if key == TOKENS { self.tokens(kind)? } else { self.value(kind, 0)? };
            if self.values.insert(key.clone(), value).is_some() {
                return Err(self.refuse(format_args!("the key {key:?} is there twice")));
            }
        }
        for _ in 0..tensors {
            let name = self.string()?;
            let rank = self.u32()?;
            if rank > 4 {
                return Err(self
                    .refuse(format_args!("tensor {name:?} has {rank} dimensions, at most 4 are possible")));
            }
            let dims = (0..rank).map(|_| self.u64()).collect::<Result<_>>()?;
            let (kind, offset) = (self.u32()?, self.u64()?);
            self.tensors.push(Tensor { name, dims, kind, offset });
        }
        self.alignment = match self.integer("general.alignment") {
            None => ALIGNMENT,
            Some(n) => u64::try_from(n)
                .ok()
                .filter(|n| n.is_power_of_two() && *n <= 1 << 20)
                .ok_or_else(|| self.refuse(format_args!("an alignment of {n} is impossible")))?,
        };
        self.data = (self.size - self.left).next_multiple_of(self.alignment);
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.claim(bytes.len() as u64)?;
        let io = |source| Error::Io { action: "read", path: self.path.clone(), source };
        self.reader.read_exact(bytes).map_err(io)
    }

    /// Takes `n` bytes off what is left of the file, before any memory is.
    fn claim(&mut self, n: u64) -> Result<()> {
        self.left = self
            .left
            .checked_sub(n)
            .ok_or_else(|| self.refuse("the file ends within its GGUF header; copy it again"))?;
        if self.size - self.left > HEADER_CAP {
            return Err(self.refuse(format_args!("its header has more than the {HEADER_CAP} bytes allowed")));
        }
        Ok(())
    }

    fn u32(&mut self) -> Result<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn raw_string(&mut self) -> Result<Vec<u8>> {
        let length = self.u64()?;
        if length > self.left {
            self.claim(length)?;
        }
        if length > TEXT_CAP {
            return Err(self.refuse(format_args!(
                "its header claims a text of {length} bytes, the most allowed is {TEXT_CAP}"
            )));
        }
        let mut bytes = room(length as usize).map_err(|sentence| self.refuse(sentence))?;
        bytes.resize(length as usize, 0);
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn string(&mut self) -> Result<String> {
        let bytes = self.raw_string()?;
        String::from_utf8(bytes).map_err(|_| self.refuse("a text in its header is not UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Integer(self.bytes::<1>()?[0].into()),
            1 => Value::Integer((self.bytes::<1>()?[0] as i8).into()),
            2 => Value::Integer(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer((self.u32()? as i32).into()),
            10 => Value::Integer(self.u64()?.into()),
            11 => Value::Integer((self.u64()? as i64).into()),
            8 => Value::Text(self.string()?),
            // 32-bit float, bool, 64-bit float: nobody here asks for one.
            6 => self.bytes::<4>().map(|_| Value::Other)?,
            7 => self.bytes::<1>().map(|_| Value::Other)?,
            12 => self.bytes::<8>().map(|_| Value::Other)?,
            9 if depth < 4 => {
                let (kind, length) = (self.u32()?, self.u64()?);
                for _ in 0..length {
                    self.value(kind, depth + 1)?;
                }
                Value::Other
            }
            other => {
                return Err(self.refuse(format_args!("its header has a value of the unknown type {other}")));
            }
        })
    }

    fn tokens(&mut self, kind: u32) -> Result<Value> {
        if kind != 9 || self.u32()? != 8 {
            return Err(self.refuse(format_args!("{TOKENS:?} is not a list of texts")));
        }
        let count = self.u64()?;
        let mut hash = Sha256::new();
        for _ in 0..count {
            hash.update(self.raw_string()?);
            hash.update(b"\n");
        }
        Ok(Value::Tokens(count, hash.finalize().into()))
    }
}

/// A value that is written.
pub enum Written<'a> {
    U32(u32),
    Text(&'a str),
}

/// The bytes of a file with these keys and these vectors, in this order.
pub fn bytes(values: &[(&str, Written<'_>)], vectors: &[(String, &[f32])]) -> Vec<u8> {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }
    let align = ALIGNMENT as usize;
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((vectors.len() as u64).to_le_bytes());
    out.extend((values.len() as u64).to_le_bytes());
    for (key, value) in values {
        text(&mut out, key);
        match value {
            Written::U32(n) => {
                out.extend(4u32.to_le_bytes());
                out.extend(n.to_le_bytes());
            }
            Written::Text(value) => {
                out.extend(8u32.to_le_bytes());
                text(&mut out, value);
            }
        }
    }
    let mut offset = 0u64;
    for (name, vector) in vectors {
        text(&mut out, name);
        out.extend(1u32.to_le_bytes());
        out.extend((vector.len() as u64).to_le_bytes());
        out.extend(F32.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (4 * vector.len()).next_multiple_of(align) as u64;
    }
    for (_, vector) in vectors {
        out.resize(out.len().next_multiple_of(align), 0);
        out.extend(vector.iter().flat_map(|x| x.to_le_bytes()));
    }
    // Readers expect the padding after the last tensor too.
    out.resize(out.len().next_multiple_of(align), 0);
    out
}
