//! One error type. Every variant has a numeric status that never moves, so C callers can rely on it.
//!
//! ```
//! use emaudit::directions::{Directions, OpenOptions};
//! use emaudit::{Error, Status};
//!
//! let error = Directions::from_bytes(b"This is a note, and not a direction file.", &OpenOptions::default()).unwrap_err();
//! assert!(matches!(error, Error::NotADirectionFile(_)));
//! assert_eq!(error.status(), Status::NotADirectionFile);
//! assert_eq!(error.status() as i32, 3);
//! println!("{error}"); // the cause and, where there is one, the mend
//! ```

use std::path::PathBuf;

/// Numeric status of every outcome, as the C ABI returns it. Numbers are append-only.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// The call did what it says.
    Ok = 0,
    /// A null pointer, an out-of-range enum, an overlapping or inconsistent argument.
    InvalidArgument = 1,
    /// The operating system refused a file operation.
    Io = 2,
    /// The bytes are not an emaudit direction file at all.
    NotADirectionFile = 3,
    /// The file ends before its header says it does.
    Truncated = 4,
    /// The container breaks a rule of FORMAT.md (duplicate key, overlap, hole, misalignment, ...).
    Malformed = 5,
    /// The file needs a newer reader.
    UnsupportedVersion = 6,
    /// The bytes do not have the digest they state, or the digest the caller expects.
    DigestMismatch = 7,
    /// The metadata contradicts itself or the tensors.
    Schema = 8,
    /// The directions were made for another model (hard identity).
    ModelMismatch = 9,
    /// The rows do not have the width of the direction.
    WidthMismatch = 10,
    /// The file holds no direction for that layer.
    LayerNotFound = 11,
    /// At least one row held a NaN or an infinity; those rows are flagged and untouched.
    NonFinite = 12,
    /// Steering with a direction whose causal evidence is not `specific`, without the explicit flag.
    NotSpecific = 13,
    /// The calibration sample cannot support the false-positive rate asked for.
    RateUnsupported = 14,
    /// This CPU (or build) does not have the kernel asked for.
    KernelUnavailable = 15,
    /// A caught panic: a defect of the library, never the caller's fault. Nothing may be concluded.
    Panic = 16,
    /// A trusted key was given and the file has no signature.
    Unsigned = 17,
    /// The signature does not fit the file, or is none.
    BadSignature = 18,
    /// The file is signed, but not with the trusted key.
    UntrustedKey = 19,
    /// Rows read back after steering are not where the edit should have put them.
    NotLanded = 20,
    /// A score in aligned standard deviations from a layer without calibration.
    NotCalibrated = 21,
    /// An audit log whose chain does not hold, or that a failed write left incomplete.
    BrokenLog = 22,
    /// No GPU can be used: no driver, no card, or a library that was built without the feature `cuda`.
    DeviceUnavailable = 23,
    /// The GPU's driver refused what it was asked for.
    Device = 24,
}

/// Result of every fallible call of the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with the cause and, where there is one, the mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// See [`Status::InvalidArgument`].
    #[error("invalid argument: {0}")]
    InvalidArgument(String),
    /// See [`Status::Io`].
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted ("open", "map", "write", ...).
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// See [`Status::NotADirectionFile`].
    #[error("not an emaudit direction file: {0}")]
    NotADirectionFile(String),
    /// See [`Status::Truncated`].
    #[error("truncated direction file: {needed} bytes are needed, {found} are there; copy the file again")]
    Truncated {
        /// Bytes the header promises.
        needed: u64,
        /// Bytes found.
        found: u64,
    },
    /// See [`Status::Malformed`].
    #[error("malformed direction file: {0}")]
    Malformed(String),
    /// See [`Status::UnsupportedVersion`].
    #[error("unsupported direction file: {0}; use a newer emaudit")]
    UnsupportedVersion(String),
    /// See [`Status::DigestMismatch`].
    #[error("digest mismatch: expected {expected}, the bytes give {found}; the file was altered or damaged")]
    DigestMismatch {
        /// The digest stated by the file or the caller, in hex.
        expected: String,
        /// The digest of the bytes, in hex.
        found: String,
    },
    /// See [`Status::Schema`].
    #[error("inconsistent direction file: {0}")]
    Schema(String),
    /// See [`Status::ModelMismatch`].
    #[error("these directions belong to another model: {field} is {found}, the directions need {expected}")]
    ModelMismatch {
        /// The field that differs.
        field: &'static str,
        /// What the directions were made for.
        expected: String,
        /// What the caller's model has.
        found: String,
    },
    /// See [`Status::WidthMismatch`].
    #[error("width mismatch: the direction has {expected} elements, the rows have {found}")]
    WidthMismatch {
        /// Hidden size of the direction.
        expected: usize,
        /// Columns given.
        found: usize,
    },
    /// See [`Status::LayerNotFound`].
    #[error("no direction for layer {layer}; the file has layers {available:?}")]
    LayerNotFound {
        /// The layer asked for.
        layer: u32,
        /// The layers in the file.
        available: Vec<u32>,
    },
    /// See [`Status::NonFinite`].
    #[error("{rows} row(s) hold a NaN or an infinity; they were left untouched and are flagged")]
    NonFinite {
        /// How many rows.
        rows: usize,
    },
    /// See [`Status::NotSpecific`].
    #[error(
        "causal evidence of this direction is `{status}`, not `specific`: steering with it needs the explicit flag"
    )]
    NotSpecific {
        /// The causal status in the file.
        status: String,
    },
    /// See [`Status::RateUnsupported`].
    #[error("no threshold at a false-positive rate of {rate}: {reason}")]
    RateUnsupported {
        /// The rate asked for.
        rate: f64,
        /// Why the file has none.
        reason: String,
    },
    /// See [`Status::KernelUnavailable`].
    #[error("kernel `{name}` is not available here; available: {available}")]
    KernelUnavailable {
        /// The kernel asked for.
        name: String,
        /// The kernels this process can run.
        available: String,
    },
    /// See [`Status::Panic`].
    #[error("internal error (caught panic): {0}; please report it")]
    Panic(String),
    /// See [`Status::Unsigned`].
    #[error("unsigned direction file: {0}; sign it with minisign, or open it without a trusted key")]
    Unsigned(String),
    /// See [`Status::BadSignature`].
    #[error("bad signature: {0}")]
    BadSignature(String),
    /// See [`Status::UntrustedKey`].
    #[error("untrusted signature: it is by the key {found}, the trusted key is {expected}")]
    UntrustedKey {
        /// Id of the trusted key.
        expected: String,
        /// Id of the key in the signature.
        found: String,
    },
    /// See [`Status::NotLanded`].
    #[error(
        "the edit did not land: of {rows} row(s), {missed} are not where it should have put them (by up to \
         {largest_deviation} times what rounding allows) and in {lost} it is too small for the dtype to show"
    )]
    NotLanded {
        /// Rows given.
        rows: usize,
        /// Rows that are elsewhere.
        missed: usize,
        /// Rows whose edit rounding can swallow.
        lost: usize,
        /// Largest deviation of a projection, in units of its bound.
        largest_deviation: f32,
    },
    /// See [`Status::BrokenLog`].
    #[error("broken audit log: {0}")]
    BrokenLog(String),
    /// See [`Status::DeviceUnavailable`].
    #[error("no GPU can be used: {0}; score and steer in host memory instead")]
    DeviceUnavailable(String),
    /// See [`Status::Device`].
    #[error("the GPU's driver answers {name} when asked to {doing}")]
    Device {
        /// What was attempted.
        doing: &'static str,
        /// The driver's name for the error.
        name: String,
    },
    /// See [`Status::NotCalibrated`].
    #[error(
        "layer {layer} is not calibrated, so {what} has no meaning there; use raw scores, or calibrate the layer"
    )]
    NotCalibrated {
        /// 0-based block index.
        layer: u32,
        /// What needs a calibration.
        what: &'static str,
    },
}

impl Error {
    /// The pinned status number of this error.
    pub fn status(&self) -> Status {
        match self {
            Error::InvalidArgument(_) => Status::InvalidArgument,
            Error::Io { .. } => Status::Io,
            Error::NotADirectionFile(_) => Status::NotADirectionFile,
            Error::Truncated { .. } => Status::Truncated,
            Error::Malformed(_) => Status::Malformed,
            Error::UnsupportedVersion(_) => Status::UnsupportedVersion,
            Error::DigestMismatch { .. } => Status::DigestMismatch,
            Error::Schema(_) => Status::Schema,
            Error::ModelMismatch { .. } => Status::ModelMismatch,
            Error::WidthMismatch { .. } => Status::WidthMismatch,
            Error::LayerNotFound { .. } => Status::LayerNotFound,
            Error::NonFinite { .. } => Status::NonFinite,
            Error::NotSpecific { .. } => Status::NotSpecific,
            Error::RateUnsupported { .. } => Status::RateUnsupported,
            Error::KernelUnavailable { .. } => Status::KernelUnavailable,
            Error::Panic(_) => Status::Panic,
            Error::Unsigned(_) => Status::Unsigned,
            Error::BadSignature(_) => Status::BadSignature,
            Error::UntrustedKey { .. } => Status::UntrustedKey,
            Error::NotLanded { .. } => Status::NotLanded,
            Error::NotCalibrated { .. } => Status::NotCalibrated,
            Error::BrokenLog(_) => Status::BrokenLog,
            Error::DeviceUnavailable(_) => Status::DeviceUnavailable,
            Error::Device { .. } => Status::Device,
        }
    }
}
