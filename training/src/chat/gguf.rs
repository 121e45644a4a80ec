//! The tokenizer inside a GGUF file.
//!
//! candle builds one too, but falls back to plain GPT-2 splitting for names it does not know (SmolLM2 splits digits)
//! and reads the padding and unknown ids under keys no GGUF file has. A wrong split changes ids in silence, so here
//! an unknown name is an error.

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

use super::SpecialTokens;
use super::sentencepiece::{self, Pieces};

const MEND: &str = "name a Hugging Face folder with a tokenizer.json instead";

/// llama.cpp's `llama_token_type`.
const UNKNOWN: u32 = 2;
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;
const UNUSED: u32 = 5;
const BYTE: u32 = 6;

const GPT2_LIKE_QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2_LIKE_LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2_LIKE_TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Tokenizer, special tokens and chat template of a GGUF file.
pub(super) fn read(content: &Content) -> Result<(Tokenizer, SpecialTokens, Option<String>)> {
    let model = text(content, "tokenizer.ggml.model")?
        .ok_or_else(|| anyhow!("the GGUF file carries no tokenizer (no key tokenizer.ggml.model): {MEND}"))?;
    let tokens = token_texts(content)?;
    let types = token_types(content, tokens.len())?;
    let mut tokenizer = match model.as_str() {
        "gpt2" => byte_level_bpe(content, &tokens, &types)?,
        "llama" => sentencepiece(content, &tokens, &types)?,
        other => bail!(
            "the GGUF file's tokenizer is of the kind {other:?}; this build reads gpt2 (byte-level BPE) and llama \
             (SentencePiece): {MEND}"
        ),
    };
    add_special(&mut tokenizer, &tokens, &types)?;

    let named = |keys: &[&str]| -> Result<Option<String>> {
        for key in keys {
            if let Some(id) = number(content, key)? {
                let token = tokens.get(id as usize).ok_or_else(|| {
                    anyhow!(
                        "the GGUF key {key} names token {id}, but the vocabulary has {} tokens",
                        tokens.len()
                    )
                })?;
                return Ok(Some(token.clone()));
            }
        }
        Ok(None)
    };
    let special = SpecialTokens {
        bos: named(&["tokenizer.ggml.bos_token_id"])?,
        eos: named(&["tokenizer.ggml.eos_token_id"])?,
        unk: named(&["tokenizer.ggml.unknown_token_id"])?,
        pad: named(&["tokenizer.ggml.padding_token_id"])?,
        end_ids: ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"]
            .iter()
            .filter_map(|key| number(content, key).transpose())
            .collect::<Result<_>>()?,
        adds_bos: match content.metadata.get("tokenizer.ggml.add_bos_token") {
            Some(flag) => flag.to_bool().context("tokenizer.ggml.add_bos_token is not true or false")?,
            // llama.cpp's defaults.
            None => {
                let pre = text(content, "tokenizer.ggml.pre")?.unwrap_or_default();
                model == "llama" || ["llama3", "llama-v3", "llama-bpe"].contains(&pre.as_str())
            }
        },
    };
    Ok((tokenizer, special, text(content, "tokenizer.chat_template")?))
}

fn byte_level_bpe(content: &Content, tokens: &[String], types: &[u32]) -> Result<Tokenizer> {
    let merges = content
        .metadata
        .get("tokenizer.ggml.merges")
        .ok_or_else(|| {
            anyhow!("the GGUF file's tokenizer has no merges (key tokenizer.ggml.merges): {MEND}")
        })?
        .to_vec()
        .context("tokenizer.ggml.merges is not a list")?
        .iter()
        .enumerate()
        .map(|(i, merge)| {
            let merge =
                merge.to_string().with_context(|| format!("merge {i} of the tokenizer is not text"))?;
            let (left, right) = merge
                .split_once(' ')
                .ok_or_else(|| anyhow!("merge {i} of the tokenizer is not a pair: {merge:?}"))?;
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect::<Result<Vec<_>>>()?;

    let pre = text(content, "tokenizer.ggml.pre")?.unwrap_or_else(|| "default".to_owned());
    // Llama 3 and Tekken look a whole word up before merging; their tokenizer.json says so, GGUF implies it by name.
    let mut ignore_merges = false;
    let mut normalize = false;
    let split = match pre.as_str() {
        "default" | "gpt-2" | "gpt2" => None,
        "smollm" | "starcoder" | "refact" | "codeshell" | "command-r" => {
            Some(Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()]))
        }
        "qwen2" | "deepseek-r1-qwen" => {
            normalize = true;
            Some(regex_split(GPT2_LIKE_QWEN2)?)
        }
        "llama3" | "llama-v3" | "llama-bpe" | "smaug-bpe" => {
            ignore_merges = true;
            Some(regex_split(GPT2_LIKE_LLAMA3)?)
        }
        "tekken" => {
            ignore_merges = true;
            Some(regex_split(GPT2_LIKE_TEKKEN)?)
        }
        other => bail!(
            "the GGUF file's tokenizer splits text the {other:?} way, which this build does not know: {MEND}"
        ),
    };

    let vocab: tokenizers::models::bpe::Vocab =
        vocabulary(tokens, types).map(|(id, token)| (token.to_owned(), id)).collect();
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(ignore_merges)
        .build()
        .map_err(|e| anyhow!("the GGUF file's tokenizer is inconsistent: {e}"))?;
    let mut tokenizer = Tokenizer::new(bpe);
    if normalize {
        tokenizer.with_normalizer(Some(NFC)).map_err(|e| anyhow!("{e}"))?;
    }
    match split {
        Some(sequence) => tokenizer.with_pre_tokenizer(Some(sequence)),
        None => tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true))),
    };
    tokenizer.with_decoder(Some(ByteLevelDecoder::new(false, true, true)));
    Ok(tokenizer)
}

fn sentencepiece(content: &Content, tokens: &[String], types: &[u32]) -> Result<Tokenizer> {
    let scores = content.metadata.get("tokenizer.ggml.scores").ok_or_else(|| {
        anyhow!("the GGUF file's tokenizer has no scores (key tokenizer.ggml.scores): {MEND}")
    })?;
    let unknown = number(content, "tokenizer.ggml.unknown_token_id")?;
    let space_first = match content.metadata.get("tokenizer.ggml.add_space_prefix") {
        Some(flag) => flag.to_bool().context("tokenizer.ggml.add_space_prefix is not true or false")?,
        None => true,
    };
    let pieces = Pieces {
        vocabulary: vocabulary(tokens, types).collect(),
        scores: sentencepiece::scores(scores.to_vec().context("tokenizer.ggml.scores is not a list")?)?,
        joinable: types.iter().map(|t| ![UNKNOWN, CONTROL, BYTE].contains(t)).collect(),
        unknown: unknown.and_then(|id| tokens.get(id as usize).cloned()),
        space_first,
    };
    pieces.tokenizer()
}

fn regex_split(pattern: &str) -> Result<Sequence> {
    let split = Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false)
        .map_err(|e| anyhow!("cannot compile the tokenizer's splitting pattern: {e}"))?;
    Ok(Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]))
}

/// The tokens that are real: converters fill the embedding's spare rows with unused tokens `[PAD123]`, which the
/// model's own tokenizer.json does not have, and a digest over them would differ between two copies of one model.
fn vocabulary<'a>(tokens: &'a [String], types: &'a [u32]) -> impl Iterator<Item = (u32, &'a str)> {
    tokens.iter().zip(types).enumerate().filter_map(|(id, (token, kind))| {
        let padding = *kind == UNUSED && *token == format!("[PAD{id}]");
        (!padding).then_some((id as u32, token.as_str()))
    })
}

fn add_special(tokenizer: &mut Tokenizer, tokens: &[String], types: &[u32]) -> Result<()> {
    let of = |kind: u32, special: bool| {
        tokens
            .iter()
            .zip(types)
            .filter(move |(_, t)| **t == kind)
            .map(move |(token, _)| AddedToken::from(token.clone(), special).normalized(false))
    };
    tokenizer
        .add_special_tokens(of(CONTROL, true))
        .map_err(|e| anyhow!("cannot add the special tokens: {e}"))?;
    tokenizer
        .add_tokens(of(USER_DEFINED, false))
        .map_err(|e| anyhow!("cannot add the user-defined tokens: {e}"))?;
    Ok(())
}

fn token_texts(content: &Content) -> Result<Vec<String>> {
    let tokens = content
        .metadata
        .get("tokenizer.ggml.tokens")
        .ok_or_else(|| {
            anyhow!("the GGUF file's tokenizer has no tokens (key tokenizer.ggml.tokens): {MEND}")
        })?
        .to_vec()
        .context("tokenizer.ggml.tokens is not a list")?
        .iter()
        .enumerate()
        .map(|(i, t)| {
            t.to_string().cloned().with_context(|| format!("token {i} of the tokenizer is not text"))
        })
        .collect::<Result<Vec<_>>>()?;
    ensure!(!tokens.is_empty(), "the GGUF file's tokenizer has no tokens: {MEND}");
    Ok(tokens)
}

fn token_types(content: &Content, count: usize) -> Result<Vec<u32>> {
    let types = content
        .metadata
        .get("tokenizer.ggml.token_type")
        .ok_or_else(|| {
            anyhow!(
                "the GGUF file does not say which tokens are special (key tokenizer.ggml.token_type): {MEND}"
            )
        })?
        .to_vec()
        .context("tokenizer.ggml.token_type is not a list")?
        .iter()
        .map(|v| {
            as_u32(v).ok_or_else(|| anyhow!("tokenizer.ggml.token_type holds {v:?}, which is no token type"))
        })
        .collect::<Result<Vec<_>>>()?;
    ensure!(types.len() == count, "the GGUF file has {count} tokens but {} token types", types.len());
    Ok(types)
}

fn text(content: &Content, key: &str) -> Result<Option<String>> {
    content
        .metadata
        .get(key)
        .map(|v| v.to_string().cloned().with_context(|| format!("the GGUF key {key} is not text")))
        .transpose()
}

fn number(content: &Content, key: &str) -> Result<Option<u32>> {
    content
        .metadata
        .get(key)
        .map(|v| as_u32(v).ok_or_else(|| anyhow!("the GGUF key {key} is {v:?}, not a token id")))
        .transpose()
}

fn as_u32(value: &Value) -> Option<u32> {
    match *value {
        Value::U8(v) => Some(v.into()),
        Value::U16(v) => Some(v.into()),
        Value::U32(v) => Some(v),
        Value::U64(v) => v.try_into().ok(),
        Value::I8(v) => v.try_into().ok(),
        Value::I16(v) => v.try_into().ok(),
        Value::I32(v) => v.try_into().ok(),
        Value::I64(v) => v.try_into().ok(),
        _ => None,
    }
}
