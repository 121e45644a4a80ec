//! Teacher-forced log-likelihood of answers, and the residual rows that predict them.

use crate::capture::by_length;
use crate::lora::Adapter;
use crate::model::{Decoder, Prefix, no_edit, ops};
use anyhow::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// Sequences per forward pass.
const BATCH: usize = 16;
/// Rows per product with the output head: 256 x 49,152 logits are 50 MB.
const HEAD_ROWS: usize = 256;

/// A prompt and an answer to it, as token ids; the answer may be empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dialogue {
    /// Rendered prompt.
    pub prompt: Vec<u32>,
    /// Answer without its end token.
    pub answer: Vec<u32>,
}

impl Dialogue {
    /// What the network reads to predict the answer: everything but the last token.
    pub fn input(&self) -> Vec<u32> {
        let mut ids = self.prompt.clone();
        ids.extend(&self.answer[..self.answer.len().saturating_sub(1)]);
        ids
    }
}

/// Final residual rows (before the final norm) that predict the answer tokens: per dialogue
/// `answer.len() x hidden`, row-major.
pub fn predicting_rows(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    dialogues: &[Dialogue],
    mut done: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Vec<f32>>> {
    let mut rows = vec![Vec::new(); dialogues.len()];
    let prompts: Vec<&[u32]> = dialogues.iter().map(|d| d.prompt.as_slice()).collect();
    let longest = dialogues.iter().map(|d| d.prompt.len() + d.answer.len()).max().unwrap_or(0);
    let prefix = Prefix::read(decoder, &prompts, adapter, longest, &mut no_edit)?;
    for chunk in by_length(dialogues, |d| d.prompt.len() + d.answer.len()).chunks(BATCH) {
        let inputs: Vec<Vec<u32>> = chunk.iter().map(|&i| dialogues[i].input()).collect();
        let (batch, mut cache) = prefix.continued(decoder, &inputs)?;
        let x = decoder.forward(&batch, adapter, Some(&mut cache), &mut no_edit)?;
        for (b, &i) in chunk.iter().enumerate() {
            rows[i] = last_rows(&x, b, dialogues[i].answer.len())?;
        }
        done(chunk.len())?;
    }
    Ok(rows)
}

/// The last `count` rows of one sequence of a left-padded batch.
pub fn last_rows(x: &Tensor, sequence: usize, count: usize) -> Result<Vec<f32>> {
    let tokens = x.dim(1)?;
    Ok(x.get(sequence)?.narrow(0, tokens - count, count)?.flatten_all()?.to_vec1::<f32>()?)
}

/// Log-probability (nats) of each target under the final norm and output head applied to its row.
pub fn of_rows(decoder: &Decoder, rows: &[f32], targets: &[u32]) -> Result<Vec<f64>> {
    let hidden = decoder.config.hidden_size;
    let mut all = Vec::with_capacity(targets.len());
    for (rows, targets) in rows.chunks(HEAD_ROWS * hidden).zip(targets.chunks(HEAD_ROWS)) {
        let rows = Tensor::from_slice(rows, (targets.len(), hidden), &decoder.device)?;
        let logits = decoder.logits(&rows)?.flatten_all()?.to_vec1::<f32>()?;
        let vocab = decoder.config.vocab_size;
        let one = |(row, &t): (&[f32], &u32)| row[t as usize] as f64 - ops::log_sum_exp(row);
        all.par_extend(logits.par_chunks(vocab).zip(targets).map(one));
    }
    Ok(all)
}

/// Mean log-likelihood per token of each answer; `None` for an empty answer.
pub fn mean_per_answer(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    dialogues: &[Dialogue],
    done: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Option<f64>>> {
    let rows = predicting_rows(decoder, adapter, dialogues, done)?;
    let targets: Vec<u32> = dialogues.iter().flat_map(|d| d.answer.iter().copied()).collect();
    let all = of_rows(decoder, &rows.concat(), &targets)?;
    let mut at = 0;
    let mean = |d: &Dialogue| {
        let tokens = &all[at..at + d.answer.len()];
        at += d.answer.len();
        (!tokens.is_empty()).then(|| tokens.iter().sum::<f64>() / tokens.len() as f64)
    };
    Ok(dialogues.iter().map(mean).collect())
}
