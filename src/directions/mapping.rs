//! The bytes of a file: read into memory, or mapped. The only memory map of the project.

use super::Mode;
use super::container::FILE_CAP;
use crate::error::{Error, Result};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The whole file, in one piece.
#[derive(Debug)]
pub(super) enum Bytes {
    /// Read once; what happens to the file afterwards does not matter.
    Owned(Vec<u8>),
    /// The file itself, page by page.
    Mapped(memmap2::Mmap),
}

impl Bytes {
    /// Reads or maps a regular file of at most [`FILE_CAP`] bytes.
    pub(super) fn open(path: &Path, mode: Mode) -> Result<Bytes> {
        let (file, len) = open_regular(path)?;
        super::container::check_size(len)?;
        let io = |action| move |source| Error::Io { action, path: path.to_owned(), source };
        match mode {
            Mode::Copied => read(&file, len).map(Bytes::Owned).map_err(io("read")),
            Mode::Mapped => map(&file).map(Bytes::Mapped).map_err(io("map")),
        }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Owned(bytes) => bytes,
            Bytes::Mapped(map) => map,
        }
    }
}

/// Opens a regular file and gives its length at this moment. A pipe is refused, where opening it would wait for a writer.
///
/// # Errors
/// [`Error::Io`]; of the kind `InvalidInput` where it is not a regular file.
pub fn open_regular(path: &Path) -> Result<(File, u64)> {
    let io = |source| Error::Io { action: "open", path: path.to_owned(), source };
    // Asked before opening: to open a pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(io(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    Ok((file, len))
}

/// Reads to the end; a file that grows meanwhile is still cut off at the cap.
fn read(file: &File, len: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
    file.take(FILE_CAP + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Maps the file read-only.
///
/// # Safety argument
/// - The map is private to this module's [`Bytes`], never handed out mutably, and unmapped only on drop;
///   every `&[u8]` and `&[f32]` taken from it borrows from the owner.
/// - The address is page-aligned and the length is the file's at this moment, so each byte is readable.
/// - What remains is the file changing underneath: another process that writes to it changes values behind a
///   shared slice, and one that truncates it makes later reads raise SIGBUS. Neither can be excluded from
///   inside a process; [`Mode::Mapped`] hands this condition to the caller in words, and is not the default.
fn map(file: &File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: see above; the file is a regular file that is open for reading.
    unsafe { memmap2::MmapOptions::new().map(file) }
}
