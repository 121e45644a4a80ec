//! Direction files.

use crate::bridge::{Identity, ModelIdentity, OpenOptions, Site, Specificity};
use crate::{Failure, invalid};
use emaudit::directions::{self, Mode, schema};
use std::sync::Arc;

/// An opened direction file.
pub struct Directions(pub(crate) Arc<directions::Directions>);

fn options(options: &OpenOptions<'_>) -> Result<directions::OpenOptions, Failure> {
    let digest = options.expected_digest;
    let expected_digest = match (options.has_expected_digest, digest.is_empty()) {
        (false, true) => None,
        (false, false) => return Err(invalid("expected_digest is set, has_expected_digest is not")),
        (true, _) => Some(digest.try_into().map_err(|_| invalid("an expected digest has 32 bytes"))?),
    };
    let mode = if options.mapped { Mode::Mapped } else { Mode::Copied };
    let trusted_key = match (options.has_trusted_key, options.trusted_key.is_empty()) {
        (false, true) => None,
        (false, false) => return Err(invalid("trusted_key is set, has_trusted_key is not")),
        (true, _) => Some(directions::TrustedKey::parse(options.trusted_key)?),
    };
    let signature = (!options.signature.is_empty()).then(|| options.signature.to_vec());
    Ok(directions::OpenOptions {
        mode,
        verify: !options.skip_verify,
        expected_digest,
        trusted_key,
        signature,
    })
}

fn boxed(directions: directions::Directions) -> Box<Directions> {
    Box::new(Directions(Arc::new(directions)))
}

pub fn open_directions(path: &str, given: &OpenOptions<'_>) -> Result<Box<Directions>, Failure> {
    Ok(boxed(directions::Directions::open(path, &options(given)?)?))
}

pub fn directions_from_bytes(bytes: &[u8], given: &OpenOptions<'_>) -> Result<Box<Directions>, Failure> {
    Ok(boxed(directions::Directions::from_bytes(bytes, &options(given)?)?))
}

fn specificity(specificity: schema::Specificity) -> Specificity {
    Specificity { repr: specificity as u32 }
}

/// Empty means unknown, and an unknown value must never equal the file's.
fn known(text: &str) -> String {
    if text.is_empty() { "\0unknown".to_owned() } else { text.to_owned() }
}

impl Directions {
    pub fn width(&self) -> usize {
        self.0.width()
    }

    pub fn layers(&self) -> Vec<u32> {
        self.0.layers().collect()
    }

    pub fn verified(&self) -> bool {
        self.0.verified()
    }

    pub fn digest(&self) -> [u8; 32] {
        self.0.digest()
    }

    pub fn causal(&self) -> Specificity {
        specificity(self.0.manifest().evidence.causal)
    }

    pub fn content(&self) -> Specificity {
        specificity(self.0.manifest().evidence.content)
    }

    fn site(&self) -> Site {
        match self.0.manifest().site {
            schema::Site::ResidPost => Site::ResidPost,
            schema::Site::FinalNorm => Site::FinalNorm,
        }
    }

    pub fn model(&self) -> ModelIdentity {
        let model = self.0.manifest().model.clone();
        ModelIdentity {
            architecture: model.architecture,
            hidden_size: model.hidden_size,
            n_layers: model.n_layers,
            vocab_size: model.vocab_size,
            site: self.site(),
            tokenizer_digest: model.tokenizer_digest,
            weights_digest: model.weights_digest,
            quantization: model.quantization,
        }
    }

    pub fn check_model(&self, model: &ModelIdentity) -> Result<Identity, Failure> {
        let found = schema::ModelIdentity {
            architecture: model.architecture.clone(),
            hidden_size: model.hidden_size,
            n_layers: model.n_layers,
            vocab_size: model.vocab_size,
            tokenizer_digest: model.tokenizer_digest.clone(),
            weights_digest: known(&model.weights_digest),
            quantization: known(&model.quantization),
            name: String::new(),
        };
        let outcome = self.0.manifest().model.check(&found)?;
        self.0.manifest().site.check(match model.site {
            Site::ResidPost => schema::Site::ResidPost,
            Site::FinalNorm => schema::Site::FinalNorm,
            _ => return Err(invalid("the model's site is no member of Site")),
        })?;
        Ok(match outcome {
            schema::IdentityMatch::Exact => Identity::Exact,
            schema::IdentityMatch::Variant => Identity::Variant,
        })
    }
}
