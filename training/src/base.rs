//! A base model ready for work: decoder, tokenizer and template, identity.

use crate::chat::TextFrontend;
use crate::generate::Sampling;
use crate::model::{self, Decoder, LoadOptions};
use crate::quant::Storage;
use crate::recipe::Recipe;
use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::Content;
use emaudit::directions::schema::ModelIdentity;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// Decoder, text and identity of one model.
pub struct Base {
    /// The network.
    pub decoder: Decoder,
    /// Tokenizer and chat template.
    pub text: TextFrontend,
    /// What a direction file says of it.
    pub identity: ModelIdentity,
}

impl Base {
    /// How a recipe draws answers of at most `max_new_tokens` from this model.
    pub fn sampling(&self, recipe: &Recipe, max_new_tokens: usize) -> Sampling {
        Sampling {
            max_new_tokens,
            temperature: recipe.evaluate.temperature,
            top_p: recipe.evaluate.top_p,
            seed: recipe.seed,
            stop: self.text.eos_ids(),
            absent: self.text.absent_ids(self.decoder.config.vocab_size),
        }
    }
}

/// Loads the model at `path` (a `.gguf` file or a transformers folder); `name` is for people.
pub fn load(path: &Path, name: &str, options: &LoadOptions) -> Result<Base> {
    let decoder = model::load(path, options)?;
    let (text, stored) = if path.is_dir() {
        (TextFrontend::from_folder(path)?, "safetensors".to_owned())
    } else {
        let mut reader =
            BufReader::new(File::open(path).with_context(|| format!("cannot open {}", path.display()))?);
        let content = Content::read(&mut reader)?;
        (TextFrontend::from_gguf(&content)?, format!("gguf-{}", most_common_type(&content)))
    };
    let quantization = match options.storage {
        Storage::None => stored,
        Storage::Nf4 => format!("{stored}+nf4"),
    };
    let c = &decoder.config;
    let identity = ModelIdentity {
        architecture: c.architecture.clone(),
        hidden_size: c.hidden_size as u32,
        n_layers: c.n_layers as u32,
        vocab_size: c.vocab_size as u32,
        tokenizer_digest: text.vocab_digest(),
        weights_digest: weights_digest(path)?,
        quantization,
        name: name.to_owned(),
    };
    Ok(Base { decoder, text, identity })
}

fn most_common_type(content: &Content) -> String {
    let mut counts = std::collections::BTreeMap::new();
    for info in content.tensor_infos.values() {
        *counts.entry(format!("{:?}", info.ggml_dtype).to_lowercase()).or_insert(0usize) += 1;
    }
    counts.into_iter().max_by_key(|(_, n)| *n).map_or_else(|| "empty".into(), |(name, _)| name)
}

/// SHA-256 of the weights file, or of all weight files of a folder in name order.
pub fn weights_digest(path: &Path) -> Result<String> {
    let mut files: Vec<PathBuf> = vec![path.to_owned()];
    if path.is_dir() {
        files = std::fs::read_dir(path)?.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
        files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
        files.sort();
    }
    crate::store::sha256_files(&files)
}
