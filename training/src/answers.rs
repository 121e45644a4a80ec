//! Sampled answers, arm by arm, with common random numbers and shared continuations.
//!
//! An edit of the last prompt token after the last block changes the first answer token and nothing else.
//! So the first token is drawn from the (steered) residual row, and the continuation of each
//! (prompt, first token) is sampled once, unsteered, whoever asks for it.

use crate::generate::{self, Request, Sampling};
use crate::lora::Adapter;
use crate::model::Decoder;
use crate::perturb::RowEdit;
use crate::{progress, spillover, store};
use anyhow::Result;
use candle_core::Tensor;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Answers the model in one state (adapter on or off) gives to a fixed list of prompts.
pub struct Answerer<'a> {
    /// The model.
    pub decoder: &'a Decoder,
    /// Its adapter, if any.
    pub adapter: Option<&'a Adapter>,
    /// Rendered prompts.
    pub prompts: &'a [Vec<u32>],
    /// `resid_post` of the final layer at the last prompt token: `prompts x hidden`.
    pub final_rows: &'a [f32],
    /// How tokens are drawn.
    pub sampling: &'a Sampling,
    /// For progress lines.
    pub name: String,
    /// Where continuations are kept between runs.
    pub file: PathBuf,
    continuations: BTreeMap<(usize, u32), Vec<u32>>,
}

/// Pairs between two writes of the continuations to disk.
const SAVE_EVERY: usize = 128;

impl<'a> Answerer<'a> {
    /// Continues from `file` when it exists; the caller names the file by everything the answers depend on.
    pub fn new(
        decoder: &'a Decoder,
        adapter: Option<&'a Adapter>,
        prompts: &'a [Vec<u32>],
        final_rows: &'a [f32],
        sampling: &'a Sampling,
        name: &str,
        file: PathBuf,
    ) -> Self {
        let kept: Option<Vec<(usize, u32, Vec<u32>)>> =
            std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let continuations =
            kept.into_iter().flatten().map(|(prompt, first, answer)| ((prompt, first), answer)).collect();
        Answerer {
            decoder,
            adapter,
            prompts,
            final_rows,
            sampling,
            name: name.to_owned(),
            file,
            continuations,
        }
    }

    /// First answer tokens, one per prompt, from the final residual rows after `edit`.
    pub fn first_tokens(&self, edit: Option<&dyn RowEdit>) -> Result<Vec<u32>> {
        let hidden = self.decoder.config.hidden_size;
        let mut rows = self.final_rows.to_vec();
        if let Some(edit) = edit {
            edit.edit(&mut rows, hidden)?;
        }
        let rows = Tensor::from_vec(rows, (self.prompts.len(), hidden), &self.decoder.device)?;
        let logits = self.decoder.logits(&rows)?.flatten_all()?.to_vec1::<f32>()?;
        let draw = |(i, row): (usize, &[f32])| self.sampling.draw(row, i as u64, 0);
        Ok(logits.par_chunks(self.decoder.config.vocab_size).enumerate().map(draw).collect())
    }

    /// Samples every missing continuation of the given first tokens (one list per arm).
    pub fn prepare(&mut self, arms: &[Vec<u32>]) -> Result<()> {
        let wanted: BTreeSet<(usize, u32)> =
            arms.iter().flat_map(|firsts| firsts.iter().copied().enumerate()).collect();
        let (stops, missing): (Vec<_>, Vec<_>) = wanted
            .into_iter()
            .filter(|key| !self.continuations.contains_key(key))
            .partition(|(_, first)| self.sampling.stop.contains(first));
        self.continuations.extend(stops.into_iter().map(|key| (key, Vec::new())));
        if missing.is_empty() {
            return Ok(());
        }
        let mut stage = progress::Stage::new(self.name.clone(), missing.len());
        for part in missing.chunks(SAVE_EVERY) {
            let request = |&(i, first): &(usize, u32)| Request {
                prompt: self.prompts[i].clone(),
                stream: i as u64,
                first: Some(first),
            };
            let requests: Vec<Request> = part.iter().map(request).collect();
            let answers =
                generate::generate(self.decoder, self.adapter, &requests, self.sampling, None, |n| {
                    stage.advance(n, "");
                    crate::interrupt::check()
                })?;
            self.continuations.extend(part.iter().copied().zip(answers));
            self.save()?;
        }
        stage.finish("");
        Ok(())
    }

    /// The answers that begin with the given first tokens; [`Answerer::prepare`] must have seen them.
    pub fn answers(&self, firsts: &[u32]) -> Vec<Vec<u32>> {
        let one =
            |(i, &first): (usize, &u32)| self.continuations.get(&(i, first)).cloned().unwrap_or_default();
        firsts.iter().enumerate().map(one).collect()
    }

    fn save(&self) -> Result<()> {
        let list: Vec<_> = self.continuations.iter().map(|((i, f), a)| (i, f, a)).collect();
        store::write_file(&self.file, &serde_json::to_vec(&list)?)
    }
}

/// Text measures of one arm.
#[derive(Clone, Debug)]
pub struct TextArm {
    /// Answers as text.
    pub texts: Vec<String>,
    /// Contains code, answer by answer.
    pub code: Vec<bool>,
    /// Starts with code, answer by answer.
    pub starts: Vec<bool>,
}

impl TextArm {
    /// Decodes and measures.
    pub fn new(text: &crate::chat::TextFrontend, answers: &[Vec<u32>]) -> Result<Self> {
        let texts: Vec<String> = answers.iter().map(|a| text.decode(a, true)).collect::<Result<_>>()?;
        let code = texts.par_iter().map(|t| spillover::contains_code(t)).collect();
        let starts = texts.par_iter().map(|t| spillover::starts_with_code(t)).collect();
        Ok(TextArm { texts, code, starts })
    }

    /// Empty answers have no likelihood and loops a high one, so coherence alone cannot see them: at most a tenth
    /// more of the answers may be empty or loops than in `other`.
    pub fn no_worse_text_than(&self, other: &TextArm) -> bool {
        let broken = |arm: &TextArm| {
            let count = arm.texts.iter().filter(|t| spillover::measure(t).degenerate.is_some()).count();
            count as f64 / arm.texts.len().max(1) as f64
        };
        broken(self) <= broken(other) + 0.1
    }

    /// Share of answers with code.
    pub fn spillover(&self) -> f64 {
        self.code.iter().filter(|&&c| c).count() as f64 / self.code.len().max(1) as f64
    }
}
