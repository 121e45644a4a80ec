//! The one writer. The same manifest and tensors give the same bytes on every machine.

use super::container::{ALIGNMENT, DIGEST_KEY, VERSION, tensor_name};
use super::schema::Manifest;
use super::{Directions, OpenOptions, digest};
use crate::error::{Error, Result};
use std::io::{ErrorKind, Write};
use std::path::Path;

/// The tensors of one layer: what the writer takes and a [`Layer`](super::Layer) gives back.
#[derive(Clone, Copy, Debug)]
pub struct LayerTensors<'a> {
    /// 0-based block index; the manifest has an entry for it.
    pub layer: u32,
    /// The direction v, `hidden_size` values, finite, not all zero; its length is kept, not normalised.
    pub direction: &'a [f32],
    /// Mean of the aligned activations, `hidden_size` values, finite.
    pub aligned_mean: &'a [f32],
}

/// The bytes of a direction file.
///
/// `layers` has exactly the layers of the manifest, in any order. The result was read back with this
/// library's reader, so whatever this returns opens.
///
/// # Errors
/// [`Error::Schema`] where the manifest breaks a rule of [`Manifest::validate`] or a tensor is not finite or
/// zero; [`Error::InvalidArgument`] where the layers are not the manifest's; [`Error::WidthMismatch`].
/// # Examples
/// ```
/// use emaudit::directions::{Directions, LayerTensors, OpenOptions, to_bytes};
///
/// # let directions = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/directions/example.rs"));
/// // Another direction under the manifest of `directions`.
/// let layer = LayerTensors { layer: 1, direction: &[1.0, 0.0, 2.0], aligned_mean: &[0.0; 3] };
/// let bytes = to_bytes(directions.manifest(), &[layer])?;
/// let back = Directions::from_bytes(&bytes, &OpenOptions::default())?;
/// assert_eq!(back.layer(1)?.direction, [1.0, 0.0, 2.0].as_slice());
/// // The writer refuses what the reader would.
/// let zero = LayerTensors { direction: &[0.0; 3], ..layer };
/// assert!(to_bytes(directions.manifest(), &[zero]).is_err());
/// # Ok::<(), emaudit::Error>(())
/// ```
pub fn to_bytes(manifest: &Manifest, layers: &[LayerTensors<'_>]) -> Result<Vec<u8>> {
    manifest.validate()?;
    let layers = in_manifest_order(manifest, layers)?;
    let header = header(manifest)?;
    let data_len: usize = layers.iter().map(|l| 4 * (l.direction.len() + l.aligned_mean.len())).sum();
    let mut bytes = Vec::with_capacity(8 + header.len() + data_len);
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header.as_bytes());
    for layer in layers {
        let values = layer.direction.iter().chain(layer.aligned_mean);
        bytes.extend(values.flat_map(|x| x.to_le_bytes()));
    }
    // The key stands first in the header, so its first occurrence is the real one.
    let Some(at) = header.find(DIGEST_KEY).map(|at| 8 + at + DIGEST_KEY.len()) else {
        return Err(Error::Malformed("the writer lost the digest's place".into()));
    };
    let content = digest::to_hex(&digest::of_content(&bytes, at));
    bytes[at..at + digest::HEX].copy_from_slice(content.as_bytes());
    let back = Directions::from_bytes(&bytes, &OpenOptions::default())?;
    if back.manifest() != manifest {
        return Err(Error::Schema("a value of the manifest does not survive being written as JSON".into()));
    }
    Ok(bytes)
}

/// Writes a direction file and returns its digest (plain SHA-256 of the file).
///
/// Atomic: the bytes go to a temporary file in the same directory, which is flushed to the disk and renamed
/// onto `path`. A failure leaves whatever was at `path` untouched; a process that has the old file open keeps
/// the old file. Only a regular file is replaced: a device, a pipe or a folder would be lost for whoever uses it, and
/// of a symbolic link it is not plain whether it or the file that it names is meant; each is refused.
///
/// # Errors
/// As [`to_bytes`], and [`Error::Io`].
pub fn write(path: &Path, manifest: &Manifest, layers: &[LayerTensors<'_>]) -> Result<[u8; 32]> {
    let bytes = to_bytes(manifest, layers)?;
    replace(path, &bytes)?;
    Ok(digest::of_file(&bytes))
}

/// The tensors sorted as the manifest has them, each of the manifest's width.
fn in_manifest_order<'a>(manifest: &Manifest, layers: &[LayerTensors<'a>]) -> Result<Vec<LayerTensors<'a>>> {
    let mut sorted = layers.to_vec();
    sorted.sort_by_key(|l| l.layer);
    let found: Vec<u32> = sorted.iter().map(|l| l.layer).collect();
    let expected: Vec<u32> = manifest.layers.iter().map(|l| l.layer).collect();
    if found != expected {
        let sentence = format!("tensors are given for the layers {found:?}, the manifest has {expected:?}");
        return Err(Error::InvalidArgument(sentence));
    }
    let expected = manifest.model.hidden_size as usize;
    match sorted.iter().flat_map(|l| [l.direction.len(), l.aligned_mean.len()]).find(|n| *n != expected) {
        Some(found) => Err(Error::WidthMismatch { expected, found }),
        None => Ok(sorted),
    }
}

/// The JSON header with zeros in the place of the content digest, padded so that the data is aligned.
fn header(manifest: &Manifest) -> Result<String> {
    let json = |e: serde_json::Error| Error::Schema(format!("the manifest cannot be written as JSON: {e}"));
    // Twice: the manifest is a JSON text, and metadata values are JSON strings.
    let manifest_text = serde_json::to_string(manifest).map_err(json)?;
    let manifest_value = serde_json::to_string(&manifest_text).map_err(json)?;
    let zeros = "0".repeat(digest::HEX);
    let mut header = format!(
        "{{\"__metadata__\":{{{DIGEST_KEY}{zeros}\",\"emaudit.format\":\"{VERSION}\",\
         \"emaudit.manifest\":{manifest_value},\"emaudit.requires\":\"\"}}"
    );
    let tensor_len = 4 * u64::from(manifest.model.hidden_size);
    let mut begin = 0;
    for layer in &manifest.layers {
        for part in ["direction", "aligned_mean"] {
            let (name, width) = (tensor_name(layer.layer, part), manifest.model.hidden_size);
            let end = begin + tensor_len;
            header += &format!(
                ",\"{name}\":{{\"dtype\":\"F32\",\"shape\":[{width}],\"data_offsets\":[{begin},{end}]}}"
            );
            begin = end;
        }
    }
    header.push('}');
    let padded = (8 + header.len()).next_multiple_of(ALIGNMENT) - 8;
    header.extend(std::iter::repeat_n(' ', padded - header.len()));
    Ok(header)
}

/// Puts `bytes` at `path` in one step, or leaves it as it was: atomic as [`write()`] is, and refuses what it refuses.
///
/// # Errors
/// [`Error::Io`]; of the kind `InvalidInput` where something else than a regular file is at `path`.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    rename_onto(path, bytes).map_err(|source| Error::Io { action: "write", path: path.to_owned(), source })
}

fn rename_onto(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    check_replaceable(path)?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".emaudit-").suffix(".partial");
    // A temporary file is private by default; a direction file has the permissions the umask gives any file.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(directory)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    // The rename itself must reach the disk too; not every file system can flush a directory, and by now
    // the file is in place, so a refusal here is no failure of the write.
    #[cfg(unix)]
    let _ = std::fs::File::open(directory).and_then(|d| d.sync_all());
    Ok(())
}

/// Nothing, or a regular file: a rename would take the place of anything else as well.
fn check_replaceable(path: &Path) -> std::io::Result<()> {
    let found = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        found => found?.file_type(),
    };
    let sentence = match found {
        found if found.is_file() => return Ok(()),
        found if found.is_symlink() => {
            "it is a symbolic link; name the file that it stands for, or remove it"
        }
        _ => "there is something that is not a regular file; name another",
    };
    Err(std::io::Error::new(ErrorKind::InvalidInput, sentence))
}
