//! The direction file: reading, checking, writing. The specification is [`mod@format`].
//!
//! The way of the bytes: `mapping` (file to bytes) -> `container` (bounds, names, strict JSON) -> `digest`
//! -> [`schema`] (meaning, checked once) -> [`Directions`]. Nothing behind this door checks again.
//!
//! ```no_run
//! use emaudit::directions::{Directions, OpenOptions, digest};
//!
//! // The digest comes from where you trust it, not from next to the file.
//! let pinned = digest::from_hex("c3e13f22d71cebad28b4e06b9d3b0a3db2b3778ca76fadda97b32afcc33d9178")?;
//! let options = OpenOptions { expected_digest: Some(pinned), ..OpenOptions::default() };
//! let directions = Directions::open("model.directions.safetensors", &options)?;
//! for layer in directions.layers() {
//!     let found = directions.layer(layer)?;
//!     let sigma = found.calibration.map(|c| c.sigma); // None: not calibrated
//!     println!("layer {layer}: {} values, sigma {sigma:?}", found.direction.len());
//! }
//! # Ok::<(), emaudit::Error>(())
//! ```

mod container;
pub mod digest;
mod json;
mod mapping;
mod reading;
mod rules;
pub mod schema;
mod signature;
mod writer;

#[doc = include_str!("FORMAT.md")]
pub mod format {}

pub use container::FILE_CAP;
pub use mapping::open_regular;
pub use signature::{Signed, TrustedKey};
pub use writer::{LayerTensors, replace, to_bytes, write};

use crate::error::{Error, Result};
use container::Span;
use mapping::Bytes;
use schema::{Calibration, Manifest};
use std::borrow::Cow;
use std::path::Path;

/// How the bytes of a file are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Read into memory once. What was verified stays what is used, whatever happens to the file afterwards.
    #[default]
    Copied,
    /// Mapped into memory: nothing is copied, and processes that open the same file share its pages.
    ///
    /// For files that are trusted to stay as they are. The promise that nobody writes to the file while it is
    /// open is the caller's:
    ///
    /// - Replaced by rename, as [`write()`] does, or removed: harmless; the old file lives on until it is closed.
    /// - Truncated: whatever was made before, a [`Probe`](crate::Probe), a steering, a monitor, works on unharmed,
    ///   for it holds copies; the manifest and the digest do too. [`Directions::layer`] and new probes read the
    ///   file and raise SIGBUS, which ends the process. So does opening, if it happens meanwhile.
    /// - Written to: the values change after they were verified, for those who read them afterwards.
    Mapped,
}

/// What [`Directions::open`] checks and how it holds the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Copied (the default) or mapped.
    pub mode: Mode,
    /// Check the content digest that the file states about itself (default). It finds damage, not forgery.
    pub verify: bool,
    /// The SHA-256 the whole file must have, from a place you trust; checked whatever `verify` says.
    pub expected_digest: Option<[u8; 32]>,
    /// The file must be signed with this key (minisign); checked whatever `verify` says, over the very bytes that
    /// are then used, before anything in them is read.
    ///
    /// A signature says who, not which: an older file by the same key passes. Where that matters pin the digest,
    /// or look at [`Signed::trusted_comment`].
    pub trusted_key: Option<TrustedKey>,
    /// The text of the signature; without it, it is read from the file's path with `.minisig` added. Only together
    /// with a `trusted_key`.
    pub signature: Option<Vec<u8>>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            mode: Mode::Copied,
            verify: true,
            expected_digest: None,
            trusted_key: None,
            signature: None,
        }
    }
}

/// An opened direction file. Immutable, so it may be shared between threads through an `Arc`.
/// ```
/// use emaudit::directions::schema::{IdentityMatch, ModelIdentity};
///
/// # let directions = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/directions/example.rs"));
/// // `directions` was opened with `Directions::open`.
/// assert_eq!(directions.width(), 3);
/// assert!(directions.layers().eq([1]));
/// let layer = directions.layer(1)?;
/// assert_eq!((layer.direction[2], layer.calibration.unwrap().sigma), (4.0, 0.5));
///
/// // Before the first probe: is this the model the directions were made for?
/// let model = &directions.manifest().model;
/// assert_eq!(model.check(model)?, IdentityMatch::Exact);
/// let requantised = ModelIdentity { quantization: "gguf-q4_1".into(), ..model.clone() };
/// assert_eq!(model.check(&requantised)?, IdentityMatch::Variant);
/// let other = ModelIdentity { architecture: "qwen2".into(), ..model.clone() };
/// assert!(model.check(&other).is_err());
/// # Ok::<(), emaudit::Error>(())
/// ```
#[derive(Debug)]
pub struct Directions {
    manifest: Manifest,
    /// Parallel to `manifest.layers`.
    spans: Vec<Span>,
    storage: Storage,
    digest: [u8; 32],
    verified: bool,
    signed: Option<Signed>,
}

/// Where the tensor values live.
#[derive(Debug)]
enum Storage {
    /// All values of the file in file order.
    Copied(Vec<f32>),
    /// The mapped file, and where its tensor data begins.
    Mapped { bytes: Bytes, data_start: usize },
}

/// One layer of a direction file.
#[derive(Clone, Debug)]
pub struct Layer<'a> {
    /// The direction v, `width` values, as extracted (not normalised), in activation units.
    pub direction: Cow<'a, [f32]>,
    /// Mean of the aligned activations, `width` values, in activation units.
    pub aligned_mean: Cow<'a, [f32]>,
    /// The aligned score distribution and the thresholds; `None` where nobody calibrated.
    pub calibration: Option<&'a Calibration>,
}

/// Everything known about a file once all checks have passed.
struct Checked {
    manifest: Manifest,
    spans: Vec<Span>,
    data: std::ops::Range<usize>,
    digest: [u8; 32],
    verified: bool,
    signed: Option<Signed>,
}

impl Directions {
    /// Opens a direction file and checks all of it: signature if asked for, container, digest, manifest, values.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::NotADirectionFile`], [`Error::Unsigned`], [`Error::BadSignature`],
    /// [`Error::UntrustedKey`], [`Error::Truncated`], [`Error::Malformed`], [`Error::UnsupportedVersion`],
    /// [`Error::DigestMismatch`], [`Error::Schema`]: the first rule broken, in the order of the [`mod@format`].
    /// [`Error::InvalidArgument`] for a signature without a key.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Directions> {
        let bytes = Bytes::open(path.as_ref(), options.mode)?;
        let beside = match (&options.trusted_key, &options.signature) {
            (Some(_), None) => Some(signature::read_beside(path.as_ref())?),
            _ => None,
        };
        let checked = check(&bytes, options, beside.as_deref().or(options.signature.as_deref()))?;
        let data_start = checked.data.start;
        let storage = match bytes {
            Bytes::Owned(ref owned) => Storage::Copied(values(&owned[checked.data.clone()]).into_owned()),
            Bytes::Mapped(_) => Storage::Mapped { bytes, data_start },
        };
        Ok(Directions::from_checked(checked, storage))
    }

    /// Opens a direction file that is already in memory. The values are copied, whatever `options.mode` says.
    ///
    /// # Errors
    /// As [`Directions::open`], without the file operations.
    pub fn from_bytes(bytes: &[u8], options: &OpenOptions) -> Result<Directions> {
        let checked = check(bytes, options, options.signature.as_deref())?;
        let storage = Storage::Copied(values(&bytes[checked.data.clone()]).into_owned());
        Ok(Directions::from_checked(checked, storage))
    }

    fn from_checked(checked: Checked, storage: Storage) -> Directions {
        let Checked { manifest, spans, digest, verified, signed, .. } = checked;
        Directions { manifest, spans, storage, digest, verified, signed }
    }

    /// The metadata: identity, site, calibration, evidence, provenance.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// SHA-256 of the whole file; all zero when nothing vouched for the bytes ([`Directions::verified`]).
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Whether the bytes were checked: against the digest in the file (`verify`), the caller's digest
    /// (`expected_digest`) or a signature (`trusted_key`).
    pub fn verified(&self) -> bool {
        self.verified
    }

    /// What the signature says; `None` when opened without a trusted key.
    pub fn signed(&self) -> Option<&Signed> {
        self.signed.as_ref()
    }

    /// Elements of a direction: the hidden size of the model.
    pub fn width(&self) -> usize {
        self.manifest.model.hidden_size as usize
    }

    /// The layers that have a direction, ascending.
    pub fn layers(&self) -> impl Iterator<Item = u32> {
        self.manifest.layers.iter().map(|l| l.layer)
    }

    /// The direction, aligned mean and calibration of one layer; borrowed unless the machine is big-endian.
    ///
    /// # Errors
    /// [`Error::LayerNotFound`], which lists the layers there are.
    pub fn layer(&self, layer: u32) -> Result<Layer<'_>> {
        let Ok(at) = self.manifest.layers.binary_search_by_key(&layer, |l| l.layer) else {
            return Err(Error::LayerNotFound { layer, available: self.layers().collect() });
        };
        let part = |span: &std::ops::Range<usize>| match &self.storage {
            Storage::Copied(all) => Cow::Borrowed(&all[span.clone()]),
            Storage::Mapped { bytes, data_start } => {
                values(&bytes[data_start + 4 * span.start..data_start + 4 * span.end])
            }
        };
        Ok(Layer {
            direction: part(&self.spans[at].direction),
            aligned_mean: part(&self.spans[at].aligned_mean),
            calibration: self.manifest.layers[at].calibration.as_ref(),
        })
    }
}

/// All checks, in the order of FORMAT.md: signature, structure, digests, manifest, values.
fn check(bytes: &[u8], options: &OpenOptions, signature: Option<&[u8]>) -> Result<Checked> {
    container::check_size(bytes.len() as u64)?;
    let signed = check_signature(bytes, options, signature)?;
    let file = container::parse(bytes)?;
    let verified = options.verify || options.expected_digest.is_some() || signed.is_some();
    let mut digest = [0; 32];
    if options.verify {
        digest::compare(&file.stated, &digest::of_content(bytes, file.stated_at))?;
    }
    if verified {
        digest = digest::of_file(bytes);
    }
    if let Some(expected) = &options.expected_digest {
        digest::compare(expected, &digest)?;
    }
    let manifest = Manifest::from_json(&file.manifest)?;
    manifest.validate()?;
    let named: Vec<u32> = manifest.layers.iter().map(|l| l.layer).collect();
    if !file.layers.keys().eq(&named) {
        let stored: Vec<u32> = file.layers.keys().copied().collect();
        let sentence =
            format!("the manifest has the layers {named:?}, the tensors are of the layers {stored:?}");
        return Err(Error::Schema(sentence));
    }
    let all = values(&bytes[file.data.clone()]);
    for (layer, span) in &file.layers {
        check_values(*layer, span, &all, manifest.model.hidden_size as usize)?;
    }
    let spans = file.layers.into_values().collect();
    Ok(Checked { manifest, spans, data: file.data, digest, verified, signed })
}

/// The signature over the very bytes that are used, where the caller trusts a key.
fn check_signature(bytes: &[u8], options: &OpenOptions, signature: Option<&[u8]>) -> Result<Option<Signed>> {
    match (&options.trusted_key, signature) {
        (Some(key), Some(signature)) => key.check(bytes, signature).map(Some),
        (Some(_), None) => Err(Error::Unsigned("no signature was given with the bytes".into())),
        (None, Some(_)) => {
            Err(Error::InvalidArgument("a signature says nothing without a trusted key; give both".into()))
        }
        (None, None) => Ok(None),
    }
}

/// The width of both tensors, finite values, and a direction that points somewhere.
fn check_values(layer: u32, span: &Span, all: &[f32], width: usize) -> Result<()> {
    let refuse = |sentence: String| Err(Error::Schema(format!("layer {layer}: {sentence}")));
    for (name, span) in [("direction", &span.direction), ("aligned_mean", &span.aligned_mean)] {
        if span.len() != width {
            return refuse(format!("`{name}` has {} elements, model.hidden_size is {width}", span.len()));
        }
        // Without an early exit the compiler checks a register at a time; where, matters to the error only. Times 0, what is
        // finite is 0 with a sign, and anything else NaN.
        let seen = all[span.clone()].iter().fold(0, |seen, x| seen | (x * 0.0).to_bits());
        let place = || all[span.clone()].iter().position(|x| !x.is_finite());
        if let Some(at) = (seen << 1 != 0).then(place).flatten() {
            return refuse(format!(
                "element {at} of `{name}` is {}, it must be finite",
                all[span.start + at]
            ));
        }
    }
    // The squares of finite f32 neither overflow nor vanish in f64, so this is exactly "norm > 0".
    if all[span.direction.clone()].iter().all(|x| *x == 0.0) {
        return refuse("`direction` is zero everywhere; extract it again".into());
    }
    Ok(())
}

/// Little-endian f32 values: viewed in place where the machine allows it, decoded where it does not.
fn values(bytes: &[u8]) -> Cow<'_, [f32]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(view) if cfg!(target_endian = "little") => Cow::Borrowed(view),
        _ => {
            Cow::Owned(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
    }
}
