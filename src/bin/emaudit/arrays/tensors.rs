//! The header of a safetensors file, and one tensor of it.

use super::{Header, Kind, Number};
use emaudit::activations::Dtype;
use safetensors::tensor::{Dtype as Stored, Metadata};
use std::io::Read;

/// The safetensors crate's own limit.
const HEADER_CAP: u64 = 100_000_000;

/// Reads the header from the start of the file; an error is a sentence about the file.
pub fn header(file: &mut impl Read, tensor: Option<&str>) -> Result<Header, String> {
    let mut bytes = vec![0; 8];
    let short = |_| "the file ends within its safetensors header; copy it again".to_string();
    file.read_exact(&mut bytes).map_err(short)?;
    let length = bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    if length > HEADER_CAP {
        return Err(format!(
            "the safetensors header claims {length} bytes, the most allowed is {HEADER_CAP}"
        ));
    }
    // `take` grows with what is there, not with what is claimed.
    file.take(length).read_to_end(&mut bytes).map_err(|e| format!("it cannot be read: {e}"))?;
    // The crate's own reader wants the numbers in memory as well.
    let metadata: Metadata = serde_json::from_slice(&bytes[8..])
        .map_err(|e| format!("its safetensors header does not hold: {e}"))?;
    let names = metadata.offset_keys();
    let name = match (tensor, names.as_slice()) {
        (Some(name), _) => name,
        (None, [only]) => only,
        (None, _) => return Err(format!("choose one of its tensors with --tensor: {}", listed(&names))),
    };
    let info = metadata
        .info(name)
        .ok_or_else(|| format!("it has no tensor {name:?}; there are: {}", listed(&names)))?;
    let integer = |bytes, signed| Number::Integer { bytes, signed };
    let number = match info.dtype {
        Stored::F32 => Number::Float(Dtype::F32),
        Stored::F16 => Number::Float(Dtype::F16),
        Stored::BF16 => Number::Float(Dtype::Bf16),
        Stored::I8 => integer(1, true),
        Stored::U8 => integer(1, false),
        Stored::I16 => integer(2, true),
        Stored::U16 => integer(2, false),
        Stored::I32 => integer(4, true),
        Stored::U32 => integer(4, false),
        Stored::I64 => integer(8, true),
        Stored::U64 => integer(8, false),
        other => {
            return Err(format!("tensor {name:?} is {other:?}; F32, F16 and BF16 can be read"));
        }
    };
    let (begin, end) = info.data_offsets;
    let kind = Kind { number, big_endian: false };
    let begin_in_file = bytes.len() as u64 + begin as u64;
    Ok(Header { kind, shape: info.shape.clone(), begin: begin_in_file, len: (end - begin) as u64 })
}

fn listed(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(20).map(|n| format!("{n:?}")).collect();
    let more = names.len() - shown.len();
    if more > 0 { format!("{} and {more} more", shown.join(", ")) } else { shown.join(", ") }
}
