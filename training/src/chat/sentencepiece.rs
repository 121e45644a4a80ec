//! SentencePiece vocabularies of the BPE kind (`tokenizer.ggml.model` = `llama`: Gemma, Llama 2, Mistral).
//!
//! A GGUF file has pieces with scores and no merges: SentencePiece joins the two neighbours whose joined piece has the
//! highest score. As merges, every way to cut a piece in two comes in the order of the pieces' scores, then longer left
//! and longer right parts first, as transformers orders them.

use anyhow::{Context, Result, anyhow, ensure};
use std::collections::HashMap;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Sequence};
use tokenizers::{DecoderWrapper, Tokenizer};

/// What stands for a space.
const SPACE: &str = "▁";

/// The pieces of a vocabulary.
pub(super) struct Pieces<'a> {
    /// Id and text of every token.
    pub vocabulary: Vec<(u32, &'a str)>,
    /// Score of every id.
    pub scores: Vec<f32>,
    /// Whether text may become the token by joining others: control tokens and bytes may not.
    pub joinable: Vec<bool>,
    /// The token of characters that are in no piece.
    pub unknown: Option<String>,
    /// A text begins as if a space stood before it.
    pub space_first: bool,
}

impl Pieces<'_> {
    pub(super) fn tokenizer(&self) -> Result<Tokenizer> {
        ensure!(
            self.vocabulary.iter().all(|(id, _)| (*id as usize) < self.scores.len()),
            "the GGUF file has {} scores for more tokens",
            self.scores.len()
        );
        let vocab: Vocab = self.vocabulary.iter().map(|&(id, token)| (token.to_owned(), id)).collect();
        let mut builder =
            BPE::builder().vocab_and_merges(vocab, self.merges()).byte_fallback(true).fuse_unk(true);
        if let Some(unknown) = &self.unknown {
            builder = builder.unk_token(unknown.clone());
        }
        let bpe = builder.build().map_err(|e| anyhow!("the GGUF file's tokenizer is inconsistent: {e}"))?;
        let mut tokenizer = Tokenizer::new(bpe);
        let replace = |from: &str, to: &str| Replace::new(from, to).map_err(|e| anyhow!("{e}"));
        let mut normalizers = Vec::new();
        if self.space_first {
            normalizers.push(NormalizerWrapper::from(Prepend::new(SPACE.to_owned())));
        }
        normalizers.push(replace(" ", SPACE)?.into());
        tokenizer.with_normalizer(Some(Sequence::new(normalizers))).map_err(|e| anyhow!("{e}"))?;
        let mut decoders: Vec<DecoderWrapper> =
            vec![replace(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
        if self.space_first {
            decoders.push(Strip::new(' ', 1, 0).into());
        }
        tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
        Ok(tokenizer)
    }

    fn merges(&self) -> Vec<(String, String)> {
        let joinable = |id: &u32| self.joinable.get(*id as usize).copied().unwrap_or(false);
        let pieces: HashMap<&str, u32> =
            self.vocabulary.iter().filter(|(id, _)| joinable(id)).map(|&(id, t)| (t, id)).collect();
        let mut cuts = Vec::new();
        for (&piece, &id) in &pieces {
            let length = piece.chars().count();
            for (taken, (at, _)) in piece.char_indices().enumerate().skip(1) {
                let (left, right) = piece.split_at(at);
                if pieces.contains_key(left) && pieces.contains_key(right) {
                    cuts.push((self.scores[id as usize], taken, length - taken, id, left, right));
                }
            }
        }
        cuts.sort_by(|a, b| b.0.total_cmp(&a.0).then((b.1, b.2, a.3).cmp(&(a.1, a.2, b.3))));
        cuts.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect()
    }
}

/// The numbers of a list of scores.
pub(super) fn scores(values: &[candle_core::quantized::gguf_file::Value]) -> Result<Vec<f32>> {
    values
        .iter()
        .map(|v| v.to_f32().context("tokenizer.ggml.scores holds something else than numbers"))
        .collect()
}
