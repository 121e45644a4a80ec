//! `emaudit audit --onnx`: prompts through a model behind ONNX Runtime, the row of each last token to the audit.

use clap::Args;
use emaudit::directions::Directions;
use emaudit::directions::digest;
use emaudit::directions::schema::Site;
use emaudit::onnx::Model;
use emaudit::{Error, Probe, Result, Rows};
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

#[derive(Args)]
pub struct Onnx {
    /// Instead of saved activations: a model for ONNX Runtime with the rows as an output (`insert.py expose` adds it). The runtime is
    /// the library that ORT_DYLIB_PATH names, or the system's.
    #[arg(long, value_name = "MODEL", requires = "tokenizer", requires = "prompts", conflicts_with_all = ["activations", "lengths", "middle"])]
    onnx: Option<PathBuf>,
    /// The model's tokenizer.json.
    #[arg(long, value_name = "FILE", requires = "onnx")]
    tokenizer: Option<PathBuf>,
    /// Prompts that made none of the directions, one JSON object with `prompt` a line.
    #[arg(long, value_name = "FILE", requires = "onnx")]
    prompts: Option<PathBuf>,
    /// What is put around each prompt, which stands where {prompt} is: the model's chat format, as in the calibration. `\n` is a
    /// line feed.
    #[arg(long, value_name = "TEXT", requires = "onnx", default_value = "{prompt}")]
    template: String,
    /// The output that holds the residual stream after the block, [batch, tokens, width]; without it, `emaudit.resid_post.L` of the
    /// layer. The output `hidden_states` of onnxruntime-genai lies behind the final norm and is another site.
    #[arg(long, value_name = "NAME", requires = "onnx")]
    output: Option<String>,
    /// Use so many of the prompts, the first ones.
    #[arg(long, value_name = "N", requires = "onnx")]
    count: Option<usize>,
}

/// A model that was found to be the one the directions are for, and what it is asked.
pub struct Suspect {
    model: Model,
    prompts: Vec<Vec<u32>>,
}

impl Onnx {
    /// The suspect; `None` without `--onnx`.
    pub fn suspect(&self, directions: &Directions, layer: u32) -> Result<Option<Suspect>> {
        let (Some(onnx), Some(tokenizer), Some(prompts)) = (&self.onnx, &self.tokenizer, &self.prompts)
        else {
            return Ok(None);
        };
        directions.manifest().site.check(Site::ResidPost)?;
        let words = Tokenizer::from_file(tokenizer).map_err(|error| unreadable(tokenizer, &error))?;
        // All that can be refused without the weights comes before them.
        let prompts = self.encode(&words, prompts)?;
        let output = self.output.clone().unwrap_or_else(|| format!("emaudit.resid_post.{layer}"));
        let model = Model::open(onnx, &output)?;
        let stated = &directions.manifest().model;
        // What a graph does not say is not held against it.
        let found = emaudit::directions::schema::ModelIdentity {
            vocab_size: model.vocab_size().unwrap_or(stated.vocab_size),
            n_layers: model.n_layers().unwrap_or(stated.n_layers),
            tokenizer_digest: vocabulary_digest(&words),
            ..stated.clone()
        };
        stated.check(&found)?;
        Ok(Some(Suspect { model, prompts }))
    }

    fn encode(&self, tokenizer: &Tokenizer, path: &Path) -> Result<Vec<Vec<u32>>> {
        if !self.template.contains("{prompt}") {
            return Err(Error::InvalidArgument("the template has no place for a prompt: {prompt}".into()));
        }
        let template = self.template.replace("\\n", "\n");
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        let refuse = |line: usize, reason: String| {
            Error::InvalidArgument(format!("{}, line {}: {reason}", path.display(), line + 1))
        };
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let encode = |(number, line): (usize, &str)| {
            let object: serde_json::Value =
                serde_json::from_str(line).map_err(|error| refuse(number, error.to_string()))?;
            let prompt =
                object["prompt"].as_str().ok_or_else(|| refuse(number, "it has no `prompt`".into()))?;
            // The template names the special tokens that there are to be.
            let encoded = tokenizer
                .encode(template.replace("{prompt}", prompt), false)
                .map_err(|error| refuse(number, error.to_string()))?;
            Ok(encoded.get_ids().to_vec())
        };
        let prompts: Vec<Vec<u32>> =
            lines.take(self.count.unwrap_or(usize::MAX)).map(encode).collect::<Result<_>>()?;
        if prompts.is_empty() {
            return Err(Error::InvalidArgument(format!("{}: there are no prompts in it", path.display())));
        }
        Ok(prompts)
    }
}

impl Suspect {
    /// Hands over the row of every prompt's last token, in order.
    pub fn each(&mut self, probe: &Probe, mut take: impl FnMut(&Rows<'_>) -> Result<()>) -> Result<()> {
        for ids in &self.prompts {
            self.model.last_row(ids, |row| {
                if row.cols() != probe.width() {
                    return Err(Error::WidthMismatch { expected: probe.width(), found: row.cols() });
                }
                take(row)
            })?;
        }
        Ok(())
    }
}

fn vocabulary_digest(tokenizer: &Tokenizer) -> String {
    let mut tokens: Vec<(u32, String)> =
        tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
    tokens.sort_unstable();
    digest::to_hex(&digest::of_tokens(tokens.iter().map(|(_, token)| token.as_str())))
}

fn unreadable(path: &Path, error: &tokenizers::Error) -> Error {
    let source = std::io::Error::other(error.to_string());
    Error::Io { action: "read the tokenizer", path: path.to_owned(), source }
}
