//! Whose directions these are: the model identity, from the model itself, a direction file of it, or written down.

use super::gguf::{self, Gguf, Value};
use emaudit::directions::schema::ModelIdentity;
use emaudit::directions::{Directions, OpenOptions, digest, open_regular};
use emaudit::{Error, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// Bytes that the JSON of an identity can have at most; what is longer is cut off, and no JSON any more.
const JSON_CAP: u64 = 1 << 20;

/// Reads the identity from a GGUF model, a direction file, or JSON with the keys of `model` in a manifest.
pub fn of(path: &Path) -> Result<ModelIdentity> {
    let start = first(path, 4)?;
    if start == gguf::MAGIC {
        of_model(path)
    } else if start.first() == Some(&b'{') {
        serde_json::from_slice(&first(path, JSON_CAP)?).map_err(|e| {
            let sentence = format!("{}: not the identity of a model: {e}", path.display());
            Error::InvalidArgument(sentence)
        })
    } else {
        Ok(Directions::open(path, &OpenOptions::default())?.manifest().model.clone())
    }
}

fn of_model(path: &Path) -> Result<ModelIdentity> {
    let model = Gguf::open(path)?;
    let missing = |key: &str| model.refuse(format_args!("it has no {key:?}, so it is not a language model"));
    let architecture = model.text("general.architecture").ok_or_else(|| missing("general.architecture"))?;
    let count = |key: &str| {
        let key = format!("{architecture}.{key}");
        model.integer(&key).and_then(|n| u32::try_from(n).ok()).ok_or_else(|| missing(&key))
    };
    let Some(Value::Tokens(tokens, tokenizer)) = model.values.get("tokenizer.ggml.tokens") else {
        return Err(missing("tokenizer.ggml.tokens"));
    };
    let embedding = model.tensors.iter().find(|t| t.name == "token_embd.weight");
    let rows = embedding.and_then(|t| t.dims.get(1)).unwrap_or(tokens);
    let file_name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(ModelIdentity {
        architecture: architecture.to_owned(),
        hidden_size: count("embedding_length")?,
        n_layers: count("block_count")?,
        vocab_size: u32::try_from(*rows).map_err(|_| missing("a vocabulary of possible size"))?,
        tokenizer_digest: digest::to_hex(tokenizer),
        weights_digest: sha256(path)?,
        quantization: format!("gguf-{}", most_common_type(&model)),
        name: model.text("general.name").unwrap_or(&file_name).to_owned(),
    })
}

/// The file up to `most` bytes of it.
pub fn first(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut start = Vec::new();
    let read = open_regular(path)?.0.take(most).read_to_end(&mut start);
    read.map_err(|source| Error::Io { action: "read", path: path.to_owned(), source })?;
    Ok(start)
}

/// SHA-256 of a file of any size, in hex.
pub fn sha256(path: &Path) -> Result<String> {
    let io = |source| Error::Io { action: "read", path: path.to_owned(), source };
    let mut file = open_regular(path)?.0;
    let (mut hash, mut block) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut block).map_err(io)? {
            0 => return Ok(digest::to_hex(&hash.finalize().into())),
            n => hash.update(&block[..n]),
        }
    }
}

/// The storage type that most tensors have, in the spelling of the files that training writes.
fn most_common_type(model: &Gguf) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in &model.tensors {
        *counts.entry(type_name(tensor.kind)).or_default() += 1;
    }
    counts.into_iter().max_by_key(|(_, n)| *n).map_or_else(|| "empty".into(), |(name, _)| name)
}

fn type_name(kind: u32) -> String {
    let name = match kind {
        0 => "f32",
        1 => "f16",
        2 => "q4_0",
        3 => "q4_1",
        6 => "q5_0",
        7 => "q5_1",
        8 => "q8_0",
        9 => "q8_1",
        10 => "q2k",
        11 => "q3k",
        12 => "q4k",
        13 => "q5k",
        14 => "q6k",
        15 => "q8k",
        30 => "bf16",
        other => return format!("type{other}"),
    };
    name.to_owned()
}
