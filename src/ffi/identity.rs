//! Is the caller's model the one the directions were made for?

use super::boundary::{OutStruct, Sized32, borrow, check_pointer, guard, invalid, read_struct, text};
use super::directions::{EMAUDIT_SITE_FINAL_NORM, EMAUDIT_SITE_RESID_POST, emaudit_directions, site_number};
use super::error::{emaudit_error, emaudit_status};
use crate::directions::schema::{IdentityMatch, Manifest, ModelIdentity, Site};
use crate::error::{Error, Result};
use std::ffi::{CString, c_char};
use std::mem::offset_of;
use std::ptr::null;

/// Same model, same weights, same quantisation.
pub const EMAUDIT_IDENTITY_EXACT: u32 = 1;
/// Same architecture, sizes and tokenizer, other weights or quantisation: a finetune or requantisation.
/// Calibration was done on another variant; treat stated rates as indicative.
pub const EMAUDIT_IDENTITY_VARIANT: u32 = 2;

/// A model in two tiers, and the site. All strings are NUL-terminated UTF-8. Begin with
/// `EMAUDIT_MODEL_IDENTITY_INIT` and fill in what the caller knows about its own model; the members marked
/// "hard" must all be given and equal.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct emaudit_model_identity {
    /// `sizeof(emaudit_model_identity)`.
    pub struct_size: u32,
    /// Hard. Width of the residual stream.
    pub hidden_size: u32,
    /// Hard. Number of decoder blocks.
    pub n_layers: u32,
    /// Hard. Rows of the token embedding.
    pub vocab_size: u32,
    /// Hard. Where the caller reads and writes rows, one of `EMAUDIT_SITE_*`; 0 is refused.
    pub site: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Hard. Architecture as transformers and GGUF name it, such as "llama".
    pub architecture: *const c_char,
    /// Hard. SHA-256 (lower-case hex) of the vocabulary: each token's UTF-8 bytes in id order, each followed
    /// by 0x0A.
    pub tokenizer_digest: *const c_char,
    /// Provenance. SHA-256 (lower-case hex) of the base weights file; NULL when unknown, which is a variant.
    pub weights_digest: *const c_char,
    /// Provenance. Storage type of the base weights, such as "gguf-q4_1"; NULL when unknown.
    pub quantization: *const c_char,
    /// A name for people. Not compared; may be NULL.
    pub name: *const c_char,
}

unsafe impl Sized32 for emaudit_model_identity {
    const NAME: &'static str = "emaudit_model_identity";
    const FIRST_SIZE: usize = offset_of!(Self, name) + size_of::<*const c_char>();

    fn defaults() -> Self {
        emaudit_model_identity {
            struct_size: size_of::<Self>() as u32,
            hidden_size: 0,
            n_layers: 0,
            vocab_size: 0,
            site: 0,
            reserved: 0,
            architecture: null(),
            tokenizer_digest: null(),
            weights_digest: null(),
            quantization: null(),
            name: null(),
        }
    }
}

/// The strings of a file's model identity, NUL-terminated.
pub(super) struct IdentityText {
    architecture: CString,
    tokenizer_digest: CString,
    weights_digest: CString,
    quantization: CString,
    name: CString,
}

impl IdentityText {
    /// Copies the strings; one with a NUL inside cannot be shown to C and is refused.
    pub(super) fn new(manifest: &Manifest) -> Result<Self> {
        let terminated = |text: &str| {
            CString::new(text).map_err(|_| Error::Schema("a string of the model identity holds a NUL".into()))
        };
        let model = &manifest.model;
        Ok(IdentityText {
            architecture: terminated(&model.architecture)?,
            tokenizer_digest: terminated(&model.tokenizer_digest)?,
            weights_digest: terminated(&model.weights_digest)?,
            quantization: terminated(&model.quantization)?,
            name: terminated(&model.name)?,
        })
    }
}

/// Reads which model the directions were made for. The strings belong to `directions` and live as long as
/// that handle.
///
/// Errors: INVALID_ARGUMENT. Threads: any.
///
/// # Safety
/// `directions` is a live handle; `identity` is valid for the bytes its `struct_size` states; `error` is NULL
/// or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_directions_get_identity(
    directions: *const emaudit_directions,
    identity: *mut emaudit_model_identity,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let directions = unsafe { borrow(directions, "directions")? };
        let out = unsafe { OutStruct::new(identity)? };
        let manifest = directions.shared.manifest();
        let strings = &directions.identity;
        out.write(emaudit_model_identity {
            hidden_size: manifest.model.hidden_size,
            n_layers: manifest.model.n_layers,
            vocab_size: manifest.model.vocab_size,
            site: site_number(manifest.site),
            architecture: strings.architecture.as_ptr(),
            tokenizer_digest: strings.tokenizer_digest.as_ptr(),
            weights_digest: strings.weights_digest.as_ptr(),
            quantization: strings.quantization.as_ptr(),
            name: strings.name.as_ptr(),
            ..emaudit_model_identity::defaults()
        });
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// # Safety
/// Non-null strings of `given` are NUL-terminated.
unsafe fn model_from(given: &emaudit_model_identity) -> Result<ModelIdentity> {
    let required = |pointer, name| unsafe { text(pointer, name) }.map(str::to_owned);
    // An unknown digest or quantisation must never equal the file's, not even an empty one.
    let optional = |pointer: *const c_char, name| match pointer.is_null() {
        true => Ok("\0unknown".to_owned()),
        false => required(pointer, name),
    };
    Ok(ModelIdentity {
        architecture: required(given.architecture, "architecture")?,
        hidden_size: given.hidden_size,
        n_layers: given.n_layers,
        vocab_size: given.vocab_size,
        tokenizer_digest: required(given.tokenizer_digest, "tokenizer_digest")?,
        weights_digest: optional(given.weights_digest, "weights_digest")?,
        quantization: optional(given.quantization, "quantization")?,
        name: String::new(),
    })
}

fn site_from(number: u32) -> Result<Site> {
    match number {
        EMAUDIT_SITE_RESID_POST => Ok(Site::ResidPost),
        EMAUDIT_SITE_FINAL_NORM => Ok(Site::FinalNorm),
        other => Err(invalid(format!("{other} is no EMAUDIT_SITE_*"))),
    }
}

/// Compares the caller's model with the one the directions were made for. Do this before the first probe:
/// a direction means nothing in another model.
///
/// `*identity_match` receives `EMAUDIT_IDENTITY_EXACT` or `EMAUDIT_IDENTITY_VARIANT`.
///
/// Errors: INVALID_ARGUMENT, MODEL_MISMATCH when a hard member differs (the error names it). Threads: any.
///
/// # Safety
/// `directions` is a live handle; `model` is valid for the bytes its `struct_size` states and its non-NULL
/// strings are NUL-terminated; `identity_match` is valid for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_directions_check_model(
    directions: *const emaudit_directions,
    model: *const emaudit_model_identity,
    identity_match: *mut u32,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let directions = unsafe { borrow(directions, "directions")? };
        check_pointer(identity_match.cast_const(), "identity_match")?;
        let given = unsafe { read_struct(model)? };
        if given.reserved != 0 {
            return Err(invalid("emaudit_model_identity.reserved is not 0"));
        }
        let site = site_from(given.site)?;
        let found = unsafe { model_from(&given)? };
        let manifest = directions.shared.manifest();
        let outcome = match manifest.model.check(&found)? {
            IdentityMatch::Exact => EMAUDIT_IDENTITY_EXACT,
            IdentityMatch::Variant => EMAUDIT_IDENTITY_VARIANT,
        };
        manifest.site.check(site)?;
        unsafe { identity_match.write(outcome) };
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}
