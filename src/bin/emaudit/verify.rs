//! `emaudit verify`: one answer, as exit status, sentence or JSON.

use crate::output::{Answer, finish};
use clap::Args;
use emaudit::directions::schema::ModelIdentity;
use emaudit::directions::{Directions, OpenOptions, digest};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

/// Check a direction file: structure, digests, every rule of the format, and the model if you name it.
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Verify {
    /// The direction file.
    file: PathBuf,
    /// SHA-256 the file must have (64 hex characters, as sha256sum prints them).
    ///
    /// Without it, only the digest inside the file is checked: that finds damage, not forgery.
    #[arg(long, value_name = "HEX")]
    digest: Option<String>,
    /// Print one JSON object on standard output, good or bad.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: Model,
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
}

const HELP: &str = "\
Examples:
  emaudit verify model.directions.safetensors
      undamaged and consistent?
  emaudit verify model.directions.safetensors --digest \"$PINNED\" --model-width 896 --model-layers 24
      the very file that was pinned, and for a model of that shape?
  if emaudit verify \"$FILE\" 2>/dev/null; then start-server; fi
      refuse to serve without";

impl Verify {
    pub fn run(&self) -> ExitCode {
        finish(self.answer(), self.json, 1)
    }

    fn answer(&self) -> emaudit::Result<Answer> {
        let expected_digest = self.digest.as_deref().map(digest::from_hex).transpose()?;
        let directions =
            Directions::open(&self.file, &OpenOptions { expected_digest, ..OpenOptions::default() })?;
        let manifest = directions.manifest();
        manifest.model.check(&self.model.applied_to(&manifest.model))?;
        let file_digest = digest::to_hex(&directions.digest());
        let by = if self.digest.is_some() { "the digest you gave" } else { "its own digest" };
        let layers: Vec<u32> = directions.layers().collect();
        let (causal, content) = (manifest.evidence.causal.as_str(), manifest.evidence.content.as_str());
        Ok(Answer {
            code: 0,
            page: format!("good: {file_digest} matches {by}; causal {causal}, content {content}\n"),
            object: json!({
                "ok": true,
                "status": emaudit::Status::Ok as i32,
                "status_name": "Ok",
                "digest": file_digest,
                "digest_expected": self.digest.is_some(),
                "width": directions.width(),
                "layers": layers,
                "causal": causal,
                "content": content,
            }),
        })
    }
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
