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
mod rules;
pub mod schema;
mod writer;

#[doc = include_str!("FORMAT.md")]
pub mod format {}

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
    /// Read into memory once. What was verified stays what is used.
    #[default]
    Copied,
    /// Mapped into memory: nothing is copied and processes share the pages.
    ///
    /// The caller promises that nobody changes the file while it is open. If somebody truncates it, the next
    /// access beyond the new end raises SIGBUS and ends the process; if somebody writes to it, the
    /// directions change after they were verified. Replacing the file by rename, as [`write()`] does, is safe.
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
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions { mode: Mode::Copied, verify: true, expected_digest: None }
    }
}

/// An opened direction file. Immutable, so it may be shared between threads through an `Arc`.
#[derive(Debug)]
pub struct Directions {
    manifest: Manifest,
    /// Parallel to `manifest.layers`.
    spans: Vec<Span>,
    storage: Storage,
    digest: [u8; 32],
    verified: bool,
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
}

impl Directions {
    /// Opens a direction file and checks all of it: container, digest, manifest, values.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::NotADirectionFile`], [`Error::Truncated`], [`Error::Malformed`],
    /// [`Error::UnsupportedVersion`], [`Error::DigestMismatch`], [`Error::Schema`]: the first rule broken, in
    /// the order of the [`mod@format`].
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Directions> {
        let bytes = Bytes::open(path.as_ref(), options.mode)?;
        let checked = check(&bytes, options)?;
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
        let checked = check(bytes, options)?;
        let storage = Storage::Copied(values(&bytes[checked.data.clone()]).into_owned());
        Ok(Directions::from_checked(checked, storage))
    }

    fn from_checked(checked: Checked, storage: Storage) -> Directions {
        let Checked { manifest, spans, digest, verified, .. } = checked;
        Directions { manifest, spans, storage, digest, verified }
    }

    /// The metadata: identity, site, calibration, evidence, provenance.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// SHA-256 of the whole file; all zero when opened with neither `verify` nor an expected digest.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Whether a digest was checked: the file's own (`verify`) or the caller's (`expected_digest`).
    pub fn verified(&self) -> bool {
        self.verified
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

/// All checks, in the order of FORMAT.md: structure, digests, manifest, values.
fn check(bytes: &[u8], options: &OpenOptions) -> Result<Checked> {
    let file = container::parse(bytes)?;
    let mut digest = [0; 32];
    if options.verify {
        digest::compare(&file.stated, &digest::of_content(bytes, file.stated_at))?;
    }
    if options.verify || options.expected_digest.is_some() {
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
    let verified = options.verify || options.expected_digest.is_some();
    Ok(Checked { manifest, spans: file.layers.into_values().collect(), data: file.data, digest, verified })
}

/// The width of both tensors, finite values, and a direction that points somewhere.
fn check_values(layer: u32, span: &Span, all: &[f32], width: usize) -> Result<()> {
    let refuse = |sentence: String| Err(Error::Schema(format!("layer {layer}: {sentence}")));
    for (name, span) in [("direction", &span.direction), ("aligned_mean", &span.aligned_mean)] {
        if span.len() != width {
            return refuse(format!("`{name}` has {} elements, model.hidden_size is {width}", span.len()));
        }
        if let Some(at) = all[span.clone()].iter().position(|x| !x.is_finite()) {
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
