//! The container: safetensors, read strictly. Offsets, sizes and names are proven here, meaning is not
//! (that is `schema.rs`). The rules and their order are FORMAT.md's.

use super::digest;
use super::json::{self, Read, Reader, Refusal, Text, object};
use crate::error::{Error, Result};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

/// The one version of the format this reader knows.
pub(super) const VERSION: &str = "1";
/// Mandatory features this reader knows: version 1 has none.
const FEATURES: [&str; 0] = [];
/// Largest JSON header, in bytes.
pub(super) const HEADER_CAP: u64 = 16 << 20;
/// Largest file, in bytes: hundreds of layers of any width fit; a model's weights, given by mistake, do not.
pub const FILE_CAP: u64 = 1 << 30;
/// The tensor data begins at a multiple of this many bytes.
pub(super) const ALIGNMENT: usize = 64;
/// The bytes just before the stated content digest.
pub(super) const DIGEST_KEY: &str = "\"emaudit.content_sha256\":\"";

/// A container whose structure holds.
#[derive(Debug)]
pub(super) struct Container<'a> {
    /// The manifest, still as JSON text.
    pub manifest: Text<'a>,
    /// The digest the file states about its content.
    pub stated: [u8; 32],
    /// Where in the file it states it.
    pub stated_at: usize,
    /// The tensors of every layer.
    pub layers: BTreeMap<u32, Span>,
    /// Where in the file the tensor data lies, in bytes.
    pub data: Range<usize>,
}

/// The two tensors of one layer, each as a range of f32 elements of the tensor data.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Span {
    pub direction: Range<usize>,
    pub aligned_mean: Range<usize>,
}

/// The header: the members of `__metadata__` and the tensors, both as they come.
#[derive(Default)]
struct Header<'a> {
    metadata: Metadata<'a>,
    tensors: Vec<(Cow<'a, str>, Tensor<'a>)>,
}

/// The members of `__metadata__`; no key is there twice.
#[derive(Default)]
struct Metadata<'a>(Vec<(Cow<'a, str>, Text<'a>)>);

impl<'a> Metadata<'a> {
    fn get(&self, key: &str) -> Option<&Text<'a>> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }
}

struct Tensor<'a> {
    dtype: Cow<'a, str>,
    shape: Shape,
    data_offsets: [u64; 2],
}

/// The only dimension of a tensor, or how many there are.
enum Shape {
    Elements(u64),
    Dimensions(usize),
}

impl<'de> Read<'de> for Shape {
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> std::result::Result<Shape, Refusal> {
        let (mut last, mut count) = (0, 0);
        reader.elements(|reader| {
            count += 1;
            u64::read(reader).map(|dimension| last = dimension)
        })?;
        Ok(if count == 1 { Shape::Elements(last) } else { Shape::Dimensions(count) })
    }
}

object!(refuse Tensor<'de> { dtype, shape, data_offsets });

fn malformed<T>(sentence: impl Into<String>) -> Result<T> {
    Err(Error::Malformed(sentence.into()))
}

/// Reads everything but the tensor data and the meaning of the manifest. The size was checked.
pub(super) fn parse(bytes: &[u8]) -> Result<Container<'_>> {
    let text = header_text(bytes)?;
    let Header { metadata, tensors } = header(text)?;
    check_version(&metadata)?;
    let data = check_data_start(8 + text.len())?..bytes.len();
    let layers = tensor_spans(&tensors, &data)?;
    let (stated, at) = stated_digest(text, &metadata)?;
    let Some(manifest) = metadata.get("emaudit.manifest") else {
        return malformed("the metadata has no `emaudit.manifest`");
    };
    Ok(Container { manifest: manifest.clone(), stated, stated_at: 8 + at, layers, data })
}

/// Refuses a size that no direction file has, before anything of that size is read.
pub(super) fn check_size(len: u64) -> Result<()> {
    let sentence = match len {
        0 => "it is empty".to_string(),
        1..=FILE_CAP => return Ok(()),
        _ => format!("it has {len} bytes, more than the {FILE_CAP} a direction file may have"),
    };
    Err(Error::NotADirectionFile(sentence))
}

/// The JSON header with its padding: the length field, the first byte and the bounds are checked here.
fn header_text(bytes: &[u8]) -> Result<&str> {
    let found = bytes.len() as u64;
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(Error::Truncated { needed: 8, found });
    };
    let length = u64::from_le_bytes(*length);
    if rest.first().is_some_and(|b| *b != b'{') {
        let sentence = "there is no safetensors header (a `{` as the ninth byte)";
        return Err(Error::NotADirectionFile(sentence.into()));
    }
    if length > HEADER_CAP {
        return malformed(format!("the header claims {length} bytes, the most allowed is {HEADER_CAP}"));
    }
    let Some(header) = rest.get(..length as usize) else {
        return Err(Error::Truncated { needed: 8 + length, found });
    };
    std::str::from_utf8(header)
        .or_else(|e| malformed(format!("the header is not UTF-8 at its byte {}", e.valid_up_to())))
}

/// The JSON of the header as metadata and tensors; nothing else may be in it.
fn header(text: &str) -> Result<Header<'_>> {
    let mut header = Header::default();
    let read = json::read(text, |reader| {
        reader.members(&"an object", |name, reader| {
            let member = match &*name {
                "__metadata__" => metadata(reader).map(|metadata| header.metadata = metadata),
                _ => Tensor::read(reader).map(|tensor| header.tensors.push((name.clone(), tensor))),
            };
            member.map_err(|refusal| refusal.inside(&name))
        })
    });
    match read {
        Ok(()) => Ok(header),
        Err(refusal) if refusal.rule() == json::Rule::Shape => {
            malformed(format!("the header is not a safetensors header: {refusal}"))
        }
        Err(refusal) => malformed(format!("the header is not strict JSON: {refusal}")),
    }
}

fn metadata<'a>(reader: &mut Reader<'a>) -> std::result::Result<Metadata<'a>, Refusal> {
    let mut metadata = Metadata::default();
    reader.members(&"an object", |key, reader| reader.text().map(|value| metadata.0.push((key, value))))?;
    Ok(metadata)
}

fn check_version(metadata: &Metadata<'_>) -> Result<()> {
    match metadata.get("emaudit.format").map(Text::plain).as_deref() {
        None => {
            let sentence = "it is a safetensors file without the metadata `emaudit.format`";
            return Err(Error::NotADirectionFile(sentence.into()));
        }
        Some(VERSION) => {}
        Some(other) => {
            let sentence =
                format!("format version is {:?}, this reader knows {VERSION:?}", json::plain(other));
            return Err(Error::UnsupportedVersion(sentence));
        }
    }
    let Some(requires) = metadata.get("emaudit.requires") else {
        return malformed(
            "the metadata has no `emaudit.requires`; a file that requires nothing has it empty",
        );
    };
    let unknown = |f: &&str| !f.is_empty() && !FEATURES.contains(f);
    match requires.plain().split(',').map(|word| word.trim_matches(' ')).find(unknown) {
        None => Ok(()),
        Some(feature) => {
            let sentence =
                format!("it requires the feature {:?}, unknown to this reader", json::plain(feature));
            Err(Error::UnsupportedVersion(sentence))
        }
    }
}

fn check_data_start(start: usize) -> Result<usize> {
    if start.is_multiple_of(ALIGNMENT) {
        return Ok(start);
    }
    malformed(format!("the tensor data starts at byte {start}, it must start at a multiple of {ALIGNMENT}"))
}

/// Proves that the tensors fill `data` without hole or overlap, and sorts them by layer.
fn tensor_spans(tensors: &[(Cow<'_, str>, Tensor<'_>)], data: &Range<usize>) -> Result<BTreeMap<u32, Span>> {
    let mut in_file_order = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let Some((layer, part)) = layer_and_part(name) else {
            let name = json::plain(name);
            return malformed(format!(
                "tensor {name:?} is not `layer.N.direction` or `layer.N.aligned_mean`"
            ));
        };
        check_extent(name, tensor)?;
        in_file_order.push((tensor.data_offsets, layer, part, name));
    }
    in_file_order.sort_unstable();
    let mut layers: BTreeMap<u32, Span> = BTreeMap::new();
    let mut end_before = 0;
    let available = data.len() as u64;
    for ([begin, end], layer, part, name) in in_file_order {
        if begin != end_before {
            let what =
                if begin < end_before { "overlaps the one before it" } else { "leaves a hole before it" };
            return malformed(format!(
                "tensor {name:?} begins at {begin} and {what}, which ends at {end_before}"
            ));
        }
        if end > available {
            let start = data.start as u64;
            return Err(Error::Truncated { needed: start.saturating_add(end), found: start + available });
        }
        end_before = end;
        // Both fit a usize, being no larger than the file in memory.
        let span = begin as usize / 4..end as usize / 4;
        let entry = layers.entry(layer).or_default();
        *(if part == Part::Direction { &mut entry.direction } else { &mut entry.aligned_mean }) = span;
    }
    if end_before != available {
        return malformed(format!("{} bytes follow the last tensor", available - end_before));
    }
    for (layer, span) in &layers {
        if span.direction.is_empty() || span.aligned_mean.is_empty() {
            return malformed(format!(
                "layer {layer} lacks one of its tensors `direction` and `aligned_mean`"
            ));
        }
    }
    Ok(layers)
}

/// One tensor by itself: type, rank, and a length that is what the shape says.
fn check_extent(name: &str, tensor: &Tensor<'_>) -> Result<()> {
    if tensor.dtype != "F32" {
        return malformed(format!(
            "tensor {name:?} has dtype {:?}, it must be F32",
            json::plain(&tensor.dtype)
        ));
    }
    let elements = match tensor.shape {
        Shape::Elements(elements) => elements,
        Shape::Dimensions(count) => {
            return malformed(format!("tensor {name:?} has {count} dimensions, it must have one"));
        }
    };
    let [begin, end] = tensor.data_offsets;
    // A length that overflows is no length: as `None` it would equal that of offsets that run backwards.
    let length = elements.checked_mul(4);
    if elements == 0 || length.is_none() || end.checked_sub(begin) != length {
        return malformed(format!("tensor {name:?} of {elements} elements has the offsets {begin} to {end}"));
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Direction,
    AlignedMean,
}

/// The name of a layer's tensor, as written: `layer.` , the layer in decimal without leading zeros, the part.
pub(super) fn tensor_name(layer: u32, part: &str) -> String {
    format!("layer.{layer}.{part}")
}

fn layer_and_part(name: &str) -> Option<(u32, Part)> {
    let (number, part) = name.strip_prefix("layer.")?.split_once('.')?;
    // One spelling per layer: `layer.07` and `layer.+7` are not names.
    let digits = number.bytes().all(|b| b.is_ascii_digit()) && (number == "0" || !number.starts_with('0'));
    let layer = number.parse().ok().filter(|_| digits)?;
    match part {
        "direction" => Some((layer, Part::Direction)),
        "aligned_mean" => Some((layer, Part::AlignedMean)),
        _ => None,
    }
}

/// The stated content digest and where in the header its characters stand.
fn stated_digest(header: &str, metadata: &Metadata<'_>) -> Result<([u8; 32], usize)> {
    let Some(stated) = metadata.get("emaudit.content_sha256") else {
        return malformed("the metadata has no `emaudit.content_sha256`");
    };
    let stated = stated.plain();
    if !digest::is_canonical_hex(&stated) {
        return malformed("`emaudit.content_sha256` must be 64 lower-case hex characters");
    }
    let key = DIGEST_KEY.as_bytes();
    // Most of the header is the quoted manifest, where each quote has a backslash before it, and the last two of these
    // bytes' three quotes have none.
    let quoted = match metadata.get("emaudit.manifest") {
        Some(Text::Quoted(raw)) => {
            let start = raw.as_ptr().addr() - header.as_ptr().addr();
            start..start + raw.len()
        }
        _ => 0..0,
    };
    let parts = [0..quoted.start, quoted.end..header.len()];
    let mut places = parts.into_iter().flat_map(|part| {
        memchr::memmem::find_iter(&header.as_bytes()[part.clone()], key)
            .map(move |at| part.start + at + key.len())
    });
    let (Some(at), None) = (places.next(), places.next()) else {
        return malformed(format!("the header must have the bytes {DIGEST_KEY} exactly once"));
    };
    if !header[at..].starts_with(&*stated) {
        return malformed("`emaudit.content_sha256` must be written without escapes");
    }
    Ok((digest::from_hex(&stated)?, at))
}
