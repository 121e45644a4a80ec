//! The header of a `.npy` file: a Python dictionary of three keys in a fixed spelling.

use super::{Header, Kind, Number};
use emaudit::activations::Dtype;
use serde::Deserialize;
use std::io::Read;

pub const MAGIC: &[u8] = b"\x93NUMPY";
/// numpy's own headers are 118 bytes or so; it refuses more than this itself.
const HEADER_CAP: usize = 10_000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Dictionary {
    descr: String,
    fortran_order: bool,
    shape: Vec<usize>,
}

/// Reads the header from the start of the file; an error is a sentence about the file.
pub fn header(file: &mut impl Read) -> Result<Header, String> {
    let short = |_| "the file ends within its .npy header; copy it again".to_string();
    let mut start = [0; 8];
    file.read_exact(&mut start).map_err(short)?;
    let mut length = [0; 4];
    let prefix = match start[6] {
        1 => 2,
        2 | 3 => 4,
        other => return Err(format!("version {other} of .npy is unknown; save it again with numpy.save")),
    };
    file.read_exact(&mut length[..prefix]).map_err(short)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > HEADER_CAP {
        return Err(format!("the .npy header claims {length} bytes, the most allowed is {HEADER_CAP}"));
    }
    let mut text = vec![0; length];
    file.read_exact(&mut text).map_err(short)?;
    let text = String::from_utf8(text).map_err(|_| "the .npy header is not text".to_string())?;
    let read: Dictionary = serde_json::from_str(&as_json(&text))
        .map_err(|e| format!("the .npy header is not that of one plain array: {e}"))?;
    if read.fortran_order && read.shape.len() > 1 {
        return Err("it is in Fortran order; save numpy.ascontiguousarray(a)".into());
    }
    let kind = kind(&read.descr)?;
    let elements = read.shape.iter().try_fold(kind.number.size() as u64, |n, d| n.checked_mul(*d as u64));
    let len = elements.ok_or_else(|| format!("its shape {:?} is impossible", read.shape))?;
    Ok(Header { kind, shape: read.shape, begin: (8 + prefix + length) as u64, len })
}

fn kind(descr: &str) -> Result<Kind, String> {
    let (order, stored) = descr.split_at_checked(1).unwrap_or_default();
    let number = match stored {
        "f4" => Number::Float(Dtype::F32),
        "f2" => Number::Float(Dtype::F16),
        "i1" | "i2" | "i4" | "i8" | "u1" | "u2" | "u4" | "u8" => Number::Integer {
            bytes: usize::from(stored.as_bytes()[1] - b'0'),
            signed: stored.starts_with('i'),
        },
        "f8" => {
            return Err(
                "its numbers are float64; save a.astype('float32'), so that the rounding is yours".into()
            );
        }
        "V2" => {
            return Err("numpy has no bfloat16, these are bytes; save as float32 or as safetensors".into());
        }
        _ => return Err(format!("its numbers are {descr:?}; float32 and float16 can be read")),
    };
    match order {
        "<" | ">" => {}
        "|" if number.size() == 1 => {}
        _ => {
            return Err(format!(
                "its numbers are {descr:?}, without an order of bytes; save them again with numpy"
            ));
        }
    }
    Ok(Kind { number, big_endian: order == ">" })
}

/// The dictionary as JSON. No string in a header that passes has quotes, brackets or commas in it.
fn as_json(python: &str) -> String {
    let mut json = String::with_capacity(python.len());
    for c in python.replace("True", "true").replace("False", "false").chars() {
        let c = match c {
            '\'' => '"',
            '(' => '[',
            ')' => ']',
            other => other,
        };
        if matches!(c, ']' | '}') {
            // Python allows a comma before the bracket, and writes one into `(5,)`.
            json.truncate(json.trim_end().len());
            if json.ends_with(',') {
                json.pop();
            }
        }
        json.push(c);
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(version: u8, dictionary: &str) -> Result<Header, String> {
        let mut file = [MAGIC, &[version, 0]].concat();
        match version {
            1 => file.extend((dictionary.len() as u16).to_le_bytes()),
            _ => file.extend((dictionary.len() as u32).to_le_bytes()),
        }
        file.extend(dictionary.as_bytes());
        header(&mut file.as_slice())
    }

    #[test]
    fn headers_as_numpy_writes_them() {
        let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 5), }      \n";
        let found = read(1, text).unwrap();
        assert_eq!((found.shape, found.begin, found.len), (vec![3, 5], 10 + text.len() as u64, 60));
        let found = read(2, "{'descr': '>f2', 'fortran_order': True, 'shape': (7,), }\n").unwrap();
        assert_eq!((found.shape, found.len, found.kind.big_endian), (vec![7], 14, true));
        assert_eq!(read(3, "{'descr': '<f2', 'fortran_order': False, 'shape': (), }").unwrap().len, 2);
    }

    #[test]
    fn what_is_no_plain_array_is_refused_with_a_mend() {
        let cases = [
            ("{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }", "float32"),
            ("{'descr': '|V2', 'fortran_order': False, 'shape': (3,), }", "bfloat16"),
            ("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", "\"|O\""),
            ("{'descr': '<f4', 'fortran_order': True, 'shape': (3, 5), }", "ascontiguousarray"),
            ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }", "one plain array"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }", "one plain array"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'more': 1}", "one plain array"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'shape': (4,)}", "duplicate field"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 9), }", "impossible"),
        ];
        for (dictionary, sentence) in cases {
            let error = read(1, dictionary).err().unwrap_or_default();
            assert!(error.contains(sentence), "{dictionary}: {error}");
        }
        assert!(read(4, "{}").err().unwrap().contains("version 4"));
        assert!(read(2, &" ".repeat(HEADER_CAP + 1)).err().unwrap().contains("claims"));
        assert!(header(&mut &MAGIC[..]).err().unwrap().contains("ends within"));
    }
}
