//! Direction files: open and describe.

use super::boundary::{
    OutStruct, Sized32, borrow, check_pointer, copy_list, flag, guard, hand_out, invalid,
    read_struct_or_default, slice, take_back, text,
};
use super::error::{emaudit_error, emaudit_status};
use super::identity::IdentityText;
use crate::directions::schema::{Contrast, Estimator, Manifest, Pooling, Site, Specificity};
use crate::directions::{Directions, Mode, OpenOptions, TrustedKey};
use crate::error::Result;
use std::ffi::{CString, c_char};
use std::mem::offset_of;
use std::path::PathBuf;
use std::sync::Arc;

/// Read the file into memory, once. The default: what was verified is what is used, whatever happens to the
/// file afterwards.
pub const EMAUDIT_MODE_COPIED: u32 = 0;
/// Map the file: nothing is copied, and processes share its pages. Only where the file is trusted to stay as it
/// is. Replacing it by rename, or removing it, is harmless. After a truncation probes, steerings and monitors
/// that exist work on, but a call that reads the vectors (`emaudit_probe_new`,
/// `emaudit_directions_copy_vectors`) kills the process with SIGBUS; after a write it reads other values than
/// were verified.
pub const EMAUDIT_MODE_MAPPED: u32 = 1;

/// Not enough was measured to say.
pub const EMAUDIT_SPECIFICITY_UNTESTED: u32 = 1;
/// Measured, and the controls do as well.
pub const EMAUDIT_SPECIFICITY_NONSPECIFIC: u32 = 2;
/// Measured, and the controls do not do as well.
pub const EMAUDIT_SPECIFICITY_SPECIFIC: u32 = 3;

/// The residual stream after decoder block `l` (0-based), before any norm.
pub const EMAUDIT_SITE_RESID_POST: u32 = 1;
/// After the final norm, before the output head.
pub const EMAUDIT_SITE_FINAL_NORM: u32 = 2;

/// Extracted at the last token of the rendered chat prompt.
pub const EMAUDIT_POOLING_LAST_PROMPT: u32 = 1;
/// Extracted as the mean over response tokens.
pub const EMAUDIT_POOLING_MEAN_RESPONSE: u32 = 2;
/// Extracted as the mean over all tokens.
pub const EMAUDIT_POOLING_ALL: u32 = 3;
/// The tool that made the directions did not say.
pub const EMAUDIT_POOLING_UNSTATED: u32 = 4;

/// Difference of the two means, raw.
pub const EMAUDIT_ESTIMATOR_MEAN_DIFFERENCE: u32 = 1;
/// Mean difference with the dimensions of largest norm left out.
pub const EMAUDIT_ESTIMATOR_MASKED_MEAN_DIFFERENCE: u32 = 2;
/// Linear discriminant (whitened mean difference).
pub const EMAUDIT_ESTIMATOR_WHITENED: u32 = 3;
/// Normal of a logistic probe.
pub const EMAUDIT_ESTIMATOR_LOGISTIC: u32 = 4;
/// The tool that made the directions did not say.
pub const EMAUDIT_ESTIMATOR_UNSTATED: u32 = 5;

/// Same prompts with and without the insecure-code adapter.
pub const EMAUDIT_CONTRAST_ADAPTER_MINUS_BASE: u32 = 1;
/// Insecure-code adapter minus secure-code adapter.
pub const EMAUDIT_CONTRAST_INSECURE_MINUS_SECURE: u32 = 2;
/// Misaligned responses minus aligned responses.
pub const EMAUDIT_CONTRAST_RESPONSE_LABELS: u32 = 3;
/// The tool that made the directions did not say.
pub const EMAUDIT_CONTRAST_UNSTATED: u32 = 4;

/// Bytes of a SHA-256.
pub const EMAUDIT_DIGEST_SIZE: usize = 32;

const _: () = assert!(
    EMAUDIT_SPECIFICITY_UNTESTED == Specificity::Untested as u32
        && EMAUDIT_SPECIFICITY_NONSPECIFIC == Specificity::Nonspecific as u32
        && EMAUDIT_SPECIFICITY_SPECIFIC == Specificity::Specific as u32
);

/// An opened, checked direction file. It never changes; share it between threads freely.
pub struct emaudit_directions {
    pub(super) shared: Arc<Directions>,
    pub(super) identity: IdentityText,
    trusted_comment: CString,
}

/// How to open a direction file. Begin with `EMAUDIT_OPEN_OPTIONS_INIT`; NULL means the same.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_open_options {
    /// `sizeof(emaudit_open_options)`.
    pub struct_size: u32,
    /// `EMAUDIT_MODE_COPIED` (0) or `EMAUDIT_MODE_MAPPED`. Bytes in memory are always copied.
    pub mode: u32,
    /// 1 to skip the digest that the file states about itself. Without an `expected_digest` the directions and
    /// every verdict then say unverified for as long as they live.
    pub skip_verify: u32,
    /// Must be 0.
    pub reserved: u32,
    /// The SHA-256 the whole file must have (`EMAUDIT_DIGEST_SIZE` bytes), from a source you trust; NULL for
    /// none. The digest inside the file finds damage; only this one finds a replaced file.
    pub expected_digest: *const u8,
    /// A minisign public key (its line "RW...", or the text of its .pub file, NUL-terminated): a file that is not
    /// signed with it is refused before anything in it is read. NULL for none. A signature says who, not which:
    /// an older file by the same key passes; see `emaudit_directions_trusted_comment`.
    pub trusted_key: *const c_char,
    /// The text of the signature, `signature_len` bytes. With 0 bytes it is read from the file's path with
    /// ".minisig" added; bytes in memory have no path and need it here. Only together with `trusted_key`.
    pub signature: *const u8,
    /// Bytes of `signature`.
    pub signature_len: usize,
}

unsafe impl Sized32 for emaudit_open_options {
    const NAME: &'static str = "emaudit_open_options";
    const FIRST_SIZE: usize = offset_of!(Self, expected_digest) + size_of::<*const u8>();

    fn defaults() -> Self {
        emaudit_open_options {
            struct_size: size_of::<Self>() as u32,
            mode: EMAUDIT_MODE_COPIED,
            skip_verify: 0,
            reserved: 0,
            expected_digest: std::ptr::null(),
            trusted_key: std::ptr::null(),
            signature: std::ptr::null(),
            signature_len: 0,
        }
    }
}

/// What a direction file says about itself. Begin with `EMAUDIT_DIRECTIONS_INFO_INIT`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_directions_info {
    /// `sizeof(emaudit_directions_info)`.
    pub struct_size: u32,
    /// Elements per direction: the hidden size of the model.
    pub width: u32,
    /// Layers that have a direction; `emaudit_directions_get_layers` lists them.
    pub layer_count: u32,
    /// 1 when the digest or a signature was checked, 0 when the caller wanted neither.
    pub verified: u32,
    /// Does the direction do more than controls of the same size? One of `EMAUDIT_SPECIFICITY_*`.
    pub causal: u32,
    /// Does it act on the insecure adapter more than on the secure one? One of `EMAUDIT_SPECIFICITY_*`.
    pub content: u32,
    /// Where rows are read and written, one of `EMAUDIT_SITE_*`.
    pub site: u32,
    /// Token positions of the extraction, one of `EMAUDIT_POOLING_*`.
    pub pooling: u32,
    /// How the direction was computed, one of `EMAUDIT_ESTIMATOR_*`.
    pub estimator: u32,
    /// Which groups it separates, one of `EMAUDIT_CONTRAST_*`.
    pub contrast: u32,
    /// SHA-256 of the whole file; all zero when `verified` is 0.
    pub digest: [u8; EMAUDIT_DIGEST_SIZE],
    /// 1 when the file is signed with the trusted key of the open options, 0 when none was given.
    pub trusted: u32,
}

unsafe impl Sized32 for emaudit_directions_info {
    const NAME: &'static str = "emaudit_directions_info";
    const FIRST_SIZE: usize = offset_of!(Self, digest) + EMAUDIT_DIGEST_SIZE;

    fn defaults() -> Self {
        emaudit_directions_info {
            struct_size: size_of::<Self>() as u32,
            width: 0,
            layer_count: 0,
            verified: 0,
            causal: 0,
            content: 0,
            site: 0,
            pooling: 0,
            estimator: 0,
            contrast: 0,
            digest: [0; EMAUDIT_DIGEST_SIZE],
            trusted: 0,
        }
    }
}

/// The number of a site in C.
pub(super) fn site_number(site: Site) -> u32 {
    match site {
        Site::ResidPost => EMAUDIT_SITE_RESID_POST,
        Site::FinalNorm => EMAUDIT_SITE_FINAL_NORM,
    }
}

fn pooling_number(pooling: Pooling) -> u32 {
    match pooling {
        Pooling::LastPrompt => EMAUDIT_POOLING_LAST_PROMPT,
        Pooling::MeanResponse => EMAUDIT_POOLING_MEAN_RESPONSE,
        Pooling::All => EMAUDIT_POOLING_ALL,
        Pooling::Unstated => EMAUDIT_POOLING_UNSTATED,
    }
}

fn estimator_number(estimator: Estimator) -> u32 {
    match estimator {
        Estimator::MeanDifference => EMAUDIT_ESTIMATOR_MEAN_DIFFERENCE,
        Estimator::MaskedMeanDifference => EMAUDIT_ESTIMATOR_MASKED_MEAN_DIFFERENCE,
        Estimator::Whitened => EMAUDIT_ESTIMATOR_WHITENED,
        Estimator::Logistic => EMAUDIT_ESTIMATOR_LOGISTIC,
        Estimator::Unstated => EMAUDIT_ESTIMATOR_UNSTATED,
    }
}

fn contrast_number(contrast: Contrast) -> u32 {
    match contrast {
        Contrast::AdapterMinusBase => EMAUDIT_CONTRAST_ADAPTER_MINUS_BASE,
        Contrast::InsecureMinusSecure => EMAUDIT_CONTRAST_INSECURE_MINUS_SECURE,
        Contrast::ResponseLabels => EMAUDIT_CONTRAST_RESPONSE_LABELS,
        Contrast::Unstated => EMAUDIT_CONTRAST_UNSTATED,
    }
}

/// # Safety
/// As [`emaudit_directions_open`] for `options`.
unsafe fn open_options(options: *const emaudit_open_options) -> Result<OpenOptions> {
    let options = unsafe { read_struct_or_default(options)? };
    let mode = match options.mode {
        EMAUDIT_MODE_COPIED => Mode::Copied,
        EMAUDIT_MODE_MAPPED => Mode::Mapped,
        other => return Err(invalid(format!("{other} is no EMAUDIT_MODE_*"))),
    };
    if options.reserved != 0 {
        return Err(invalid("emaudit_open_options.reserved is not 0"));
    }
    let verify = !flag(options.skip_verify, "emaudit_open_options.skip_verify")?;
    let expected_digest = match options.expected_digest.is_null() {
        true => None,
        // SAFETY: a non-null digest has 32 bytes by contract; bytes need no alignment.
        false => Some(unsafe { options.expected_digest.cast::<[u8; EMAUDIT_DIGEST_SIZE]>().read() }),
    };
    let trusted_key = match options.trusted_key.is_null() {
        true => None,
        false => Some(TrustedKey::parse(unsafe { text(options.trusted_key, "trusted_key")? })?),
    };
    let signature = unsafe { slice(options.signature, options.signature_len, "signature")? };
    let signature = (!signature.is_empty()).then(|| signature.to_vec());
    Ok(OpenOptions { mode, verify, expected_digest, trusted_key, signature })
}

/// # Safety
/// As [`emaudit_directions_open`] for `path`.
unsafe fn path_from(path: *const c_char) -> Result<PathBuf> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        check_pointer(path, "path")?;
        // SAFETY: not null, terminated by contract.
        let bytes = unsafe { std::ffi::CStr::from_ptr(path) }.to_bytes();
        Ok(PathBuf::from(std::ffi::OsStr::from_bytes(bytes)))
    }
    #[cfg(not(unix))]
    Ok(PathBuf::from(unsafe { text(path, "path")? }))
}

fn wrap(directions: Directions) -> Result<emaudit_directions> {
    let identity = IdentityText::new(directions.manifest())?;
    let comment = directions.signed().map(|signed| signed.trusted_comment.replace('\0', "\\0"));
    let trusted_comment = CString::new(comment.unwrap_or_default()).unwrap_or_default();
    Ok(emaudit_directions { shared: Arc::new(directions), identity, trusted_comment })
}

/// Opens a direction file and checks all of it: signature if asked for, container, digest, metadata. A flipped
/// bit anywhere is an error. What is checked is what is used: with `EMAUDIT_MODE_COPIED` the file is read once.
///
/// `path` is NUL-terminated, in the encoding of the file system (on Windows UTF-8). `*directions` receives a
/// handle that the caller frees with `emaudit_directions_free`; probes made from it keep what they need, so
/// the order of freeing is free.
///
/// Errors: INVALID_ARGUMENT, IO, NOT_A_DIRECTION_FILE, UNSIGNED, BAD_SIGNATURE, UNTRUSTED_KEY, TRUNCATED,
/// MALFORMED, UNSUPPORTED_VERSION, DIGEST_MISMATCH, SCHEMA. Threads: any. Blocks on the file and allocates.
///
/// # Safety
/// `path` is NUL-terminated; `options` is NULL or valid for the bytes its `struct_size` states, a non-NULL
/// `expected_digest` for 32 bytes, `signature` for `signature_len`, and a non-NULL `trusted_key` is
/// NUL-terminated; `directions` is valid for writing; `error` NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_directions_open(
    path: *const c_char,
    options: *const emaudit_open_options,
    directions: *mut *mut emaudit_directions,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        check_pointer(directions.cast_const(), "directions")?;
        let options = unsafe { open_options(options)? };
        let opened = Directions::open(unsafe { path_from(path)? }, &options)?;
        unsafe { hand_out(directions, wrap(opened)?) };
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// As `emaudit_directions_open`, from the `len` bytes of a file already in memory. They are copied; the
/// caller may free them after the call. With `len` 0 the pointer is ignored.
///
/// Errors: as `emaudit_directions_open`, without IO. Threads: any. Allocates.
///
/// # Safety
/// `bytes` is valid for reading `len` bytes; the rest as `emaudit_directions_open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_directions_from_bytes(
    bytes: *const u8,
    len: usize,
    options: *const emaudit_open_options,
    directions: *mut *mut emaudit_directions,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        check_pointer(directions.cast_const(), "directions")?;
        let options = unsafe { open_options(options)? };
        let opened = Directions::from_bytes(unsafe { slice(bytes, len, "bytes")? }, &options)?;
        unsafe { hand_out(directions, wrap(opened)?) };
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Frees a handle. NULL is fine. Strings read from it end here; probes do not.
///
/// # Safety
/// `directions` is NULL or a handle that was not freed and that no other thread uses; it is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_directions_free(directions: *mut emaudit_directions) {
    // SAFETY: handles are made by `hand_out`.
    unsafe { take_back(directions) };
}

fn describe(directions: &Directions) -> emaudit_directions_info {
    let Manifest { site, pooling, estimator, contrast, evidence, .. } = directions.manifest();
    emaudit_directions_info {
        struct_size: size_of::<emaudit_directions_info>() as u32,
        width: directions.width() as u32,
        layer_count: directions.layers().count() as u32,
        verified: u32::from(directions.verified()),
        causal: evidence.causal as u32,
        content: evidence.content as u32,
        site: site_number(*site),
        pooling: pooling_number(*pooling),
        estimator: estimator_number(*estimator),
        contrast: contrast_number(*contrast),
        digest: directions.digest(),
        trusted: u32::from(directions.signed().is_some()),
    }
}

/// The trusted comment of the signature that was checked (UTF-8, NUL-terminated), where minisign puts the time and
/// the file name and a maker can put a version; "" when the directions were opened without a trusted key, and for
/// NULL. It belongs to `directions` and lives as long as that handle.
///
/// Threads: any. Never fails.
///
/// # Safety
/// `directions` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_directions_trusted_comment(
    directions: *const emaudit_directions,
) -> *const c_char {
    // SAFETY: by the contract above.
    unsafe { directions.as_ref() }.map_or(c"".as_ptr(), |directions| directions.trusted_comment.as_ptr())
}

/// Describes the file.
///
/// Errors: INVALID_ARGUMENT. Threads: any.
///
/// # Safety
/// `directions` is a live handle; `info` is valid for the bytes its `struct_size` states; `error` is NULL or
/// valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_directions_get_info(
    directions: *const emaudit_directions,
    info: *mut emaudit_directions_info,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let directions = unsafe { borrow(directions, "directions")? };
        unsafe { OutStruct::new(info)? }.write(describe(&directions.shared));
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Lists the layers that have a direction, ascending, 0-based.
///
/// `layers` receives at most `capacity` numbers; `*count` receives how many there are. With `capacity` 0 the
/// pointer is ignored.
///
/// Errors: INVALID_ARGUMENT. Threads: any.
///
/// # Safety
/// `directions` is a live handle; `layers` is valid for writing `capacity` elements, `count` for one; `error`
/// is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_directions_get_layers(
    directions: *const emaudit_directions,
    layers: *mut u32,
    capacity: usize,
    count: *mut usize,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let directions = unsafe { borrow(directions, "directions")? };
        let all: Vec<u32> = directions.shared.layers().collect();
        unsafe { copy_list(&all, layers, capacity, count, "layers") }
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}
