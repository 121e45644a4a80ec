//! `emaudit verify`: one answer, as exit status, sentence or JSON.

use crate::output::{Answer, finish};
use clap::Args;
use emaudit::directions::schema::{ModelIdentity, Site};
use emaudit::directions::{Directions, OpenOptions, Signed, TrustedKey, digest, open_regular};
use emaudit::{Error, Result};
use serde_json::json;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Check a direction file: structure, digests, every rule of the format; the signature and the model if you name them.
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Verify {
    /// The direction file.
    file: PathBuf,
    #[command(flatten)]
    trust: Trust,
    /// Print one JSON object on standard output, good or bad.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: Model,
}

// What the caller trusts, and so wants checked. (A documentation comment would become that of the command.)
#[derive(Args)]
pub struct Trust {
    /// SHA-256 the file must have (64 hex characters, as sha256sum prints them).
    ///
    /// Without it, only the digest inside the file is checked: that finds damage, not forgery.
    #[arg(long, value_name = "HEX")]
    digest: Option<String>,
    /// Minisign public key that must have signed the file: its line (RW...) or its .pub file.
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// The signature; without it, the direction file's path with .minisig added.
    #[arg(long, value_name = "FILE", requires = "key")]
    signature: Option<PathBuf>,
}

/// What the caller knows about the model that will be served.
#[derive(Args)]
#[command(next_help_heading = "The model the directions must be for")]
struct Model {
    /// Architecture, as in `general.architecture` of a GGUF file or `model_type` of config.json.
    #[arg(long, value_name = "NAME")]
    architecture: Option<String>,
    /// Width of the residual stream (hidden_size).
    #[arg(long, value_name = "N")]
    model_width: Option<u32>,
    /// Number of decoder blocks.
    #[arg(long, value_name = "N")]
    model_layers: Option<u32>,
    /// Rows of the token embedding.
    #[arg(long, value_name = "N")]
    vocab_size: Option<u32>,
    /// SHA-256 of the vocabulary (each token followed by a line feed, in the order of ids).
    #[arg(long, value_name = "HEX")]
    tokenizer_digest: Option<String>,
    /// Where the server reads and writes rows: resid_post or final_norm.
    #[arg(long, value_name = "SITE", value_parser = site)]
    site: Option<Site>,
}

fn site(name: &str) -> Result<Site, String> {
    [Site::ResidPost, Site::FinalNorm]
        .into_iter()
        .find(|site| site.as_str() == name)
        .ok_or_else(|| "it is resid_post or final_norm".into())
}

const HELP: &str = "\
Examples:
  emaudit verify model.directions.safetensors
      undamaged and consistent?
  emaudit verify model.directions.safetensors --digest \"$PINNED\" --model-width 896 --model-layers 24
      the very file that was pinned, and for a model of that shape?
  emaudit verify model.directions.safetensors --key emaudit.pub
      signed by the holder of that key? (minisign -S -m model.directions.safetensors signs)
  if emaudit verify \"$FILE\" 2>/dev/null; then start-server; fi
      refuse to serve without";

impl Verify {
    pub fn run(&self) -> ExitCode {
        finish(self.answer(), self.json, 1)
    }

    fn answer(&self) -> Result<Answer> {
        let directions = Directions::open(&self.file, &self.trust.open_options()?)?;
        let manifest = directions.manifest();
        manifest.model.check(&self.model.applied_to(&manifest.model))?;
        manifest.site.check(self.model.site.unwrap_or(manifest.site))?;
        let file_digest = digest::to_hex(&directions.digest());
        let by = if self.trust.digest.is_some() { "the digest you gave" } else { "its own digest" };
        let layers: Vec<u32> = directions.layers().collect();
        let (causal, content) = (manifest.evidence.causal.as_str(), manifest.evidence.content.as_str());
        let signed = directions.signed();
        let signature = signed.map(sentence).unwrap_or_default();
        let page =
            format!("good: {file_digest} matches {by}{signature}; causal {causal}, content {content}\n");
        let object = json!({
            "digest": file_digest,
            "digest_expected": self.trust.digest.is_some(),
            "signed": signed.map(|s| json!({"key": s.key_id, "trusted_comment": s.trusted_comment})),
            "width": directions.width(),
            "layers": layers,
            "causal": causal,
            "content": content,
        });
        Ok(Answer::good(page, object))
    }
}

impl Trust {
    pub fn open_options(&self) -> Result<OpenOptions> {
        Ok(OpenOptions {
            expected_digest: self.digest.as_deref().map(digest::from_hex).transpose()?,
            trusted_key: self.key.as_deref().map(key).transpose()?,
            signature: self.signature.as_deref().map(|path| read(path, SIGNATURE_CAP)).transpose()?,
            ..OpenOptions::default()
        })
    }
}

/// Bytes that a key file or a signature file can have at most; more is some other file.
const SIGNATURE_CAP: u64 = 16 << 10;

/// The key itself, or the file it is in.
fn key(text: &str) -> Result<TrustedKey> {
    TrustedKey::parse(text).or_else(|refusal| match Path::new(text).exists() {
        true => TrustedKey::parse(&String::from_utf8_lossy(&read(Path::new(text), SIGNATURE_CAP)?)),
        false => Err(refusal),
    })
}

fn read(path: &Path, cap: u64) -> Result<Vec<u8>> {
    let io = |source| Error::Io { action: "read", path: path.to_owned(), source };
    let mut bytes = Vec::new();
    open_regular(path)?.0.take(cap).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// The maker's words are on a terminal now: one line, nothing that moves the cursor.
fn sentence(signed: &Signed) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let comment: String = signed.trusted_comment.chars().map(plain).collect();
    format!(", signed by {} ({comment})", signed.key_id)
}

impl Model {
    /// The file's own identity, changed to what the caller said: what was not said cannot differ.
    fn applied_to(&self, file: &ModelIdentity) -> ModelIdentity {
        ModelIdentity {
            architecture: self.architecture.clone().unwrap_or_else(|| file.architecture.clone()),
            hidden_size: self.model_width.unwrap_or(file.hidden_size),
            n_layers: self.model_layers.unwrap_or(file.n_layers),
            vocab_size: self.vocab_size.unwrap_or(file.vocab_size),
            tokenizer_digest: self
                .tokenizer_digest
                .as_ref()
                .map_or(file.tokenizer_digest.clone(), |d| d.to_lowercase()),
            ..file.clone()
        }
    }
}
