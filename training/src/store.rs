//! Atomic files: what exists is whole.

use anyhow::{Context, Result, anyhow};
use candle_core::Tensor;
use safetensors::SafeTensorError;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Writes through a temporary file in the same folder, so a crash or a full disk leaves the old file.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |file| file.write_all(bytes))
}

/// The same of tensors in the safetensors format, one after the other: their bytes are never held together.
pub fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    replace(path, |file| match safetensors::serialize_to_file(tensors, metadata, file.path()) {
        Err(SafeTensorError::IoError(error)) => Err(error),
        written => written.map_err(std::io::Error::other),
    })
}

fn replace(path: &Path, write: impl FnOnce(&mut NamedTempFile) -> std::io::Result<()>) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let replaced = || -> std::io::Result<()> {
        let mut file = NamedTempFile::new_in(folder)?;
        write(&mut file)?;
        // By its name: whoever wrote it may have put another file there.
        File::open(file.path())?.sync_all()?;
        file.persist(path).map_err(|e| e.error)?;
        Ok(())
    };
    replaced().map_err(with_mend).with_context(|| format!("cannot write {}", path.display()))
}

/// A full disk in words of our own: the system's name a temporary file that nobody knows.
fn with_mend(error: std::io::Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::StorageFull => anyhow!("the disk is full; free some space and run the same command again"),
        _ => error.into(),
    }
}

/// Pretty JSON with a final newline.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    write_file(path, text.as_bytes())
}

/// SHA-256 in hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 in hex of the files' bytes, one after the other, read piece by piece.
pub fn sha256_files(files: &[PathBuf]) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    for path in files {
        let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        loop {
            match file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))? {
                0 => break,
                n => hasher.update(&buffer[..n]),
            }
        }
    }
    Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// The files of a folder, in name order; what lies in folders below is left out.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut files: Vec<PathBuf> = list.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.is_file());
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_says_what_to_do() {
        // ENOSPC, as writing to a disk without room gives it.
        let error = with_mend(std::io::Error::from(ErrorKind::StorageFull)).to_string();
        assert!(error.contains("free some space and run the same command again"), "{error}");
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("nowhere").join("file");
        let error = format!("{:#}", write_file(&missing, b"x").unwrap_err());
        assert!(error.contains("cannot write") && error.contains("nowhere"), "{error}");
    }
}
