//! Batched sampling with a KV cache, with the library's own steering in the loop.

mod draw;

use crate::capture::by_length;
use crate::lora::Adapter;
use crate::model::product::Elements;
use crate::model::{Batch, Cache, Decoder, Prefix};
use crate::perturb::RowEdit;
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use emaudit::directions::schema::Positions;
use emaudit::{RowsMut, Steering};
use rayon::prelude::*;
use std::sync::Arc;

/// Sequences decoded together.
const BATCH: usize = 128;

/// How tokens are drawn.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// Longest answer.
    pub max_new_tokens: usize,
    /// Softmax temperature; 0 takes the most likely token.
    pub temperature: f64,
    /// Nucleus: the smallest set of tokens with at least this probability.
    pub top_p: f64,
    /// Seed of all draws.
    pub seed: u64,
    /// Tokens that end an answer; they are not part of it.
    pub stop: Vec<u32>,
    /// Tokens that are never drawn: rows of the output head for which the tokenizer has no text.
    pub absent: Vec<u32>,
}

/// One answer to draw.
#[derive(Clone, Debug)]
pub struct Request {
    /// Rendered prompt.
    pub prompt: Vec<u32>,
    /// Names the random numbers: arms that share it share their draws.
    pub stream: u64,
    /// First answer token, where it is already known.
    pub first: Option<u32>,
}

/// Steering inside the loop.
pub struct Intervention<'a> {
    /// Block whose output is edited.
    pub layer: usize,
    /// The edit.
    pub steering: &'a dyn RowEdit,
    /// Which tokens.
    pub positions: Positions,
}

/// Draws an answer for every request; the result is in their order.
pub fn generate(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    requests: &[Request],
    sampling: &Sampling,
    intervention: Option<&Intervention<'_>>,
    mut done: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Vec<u32>>> {
    let mut answers = vec![Vec::new(); requests.len()];
    for chunk in by_length(requests, |r| r.prompt.len()).chunks(BATCH) {
        let mut batch = Decoding::start(decoder, adapter, requests, chunk, sampling, intervention)?;
        while !batch.finished() {
            batch.step()?;
        }
        for (&i, answer) in chunk.iter().zip(batch.answers) {
            answers[i] = answer;
        }
        done(chunk.len())?;
    }
    Ok(answers)
}

/// A batch on its way.
struct Decoding<'a> {
    decoder: &'a Decoder,
    adapter: Option<&'a Adapter>,
    sampling: &'a Sampling,
    intervention: Option<&'a Intervention<'a>>,
    cache: Cache,
    left_pad: Arc<[usize]>,
    /// For each row of the cache: index into `answers`, random stream; `None` once its answer has ended.
    rows: Vec<Option<(usize, u64)>>,
    answers: Vec<Vec<u32>>,
}

impl<'a> Decoding<'a> {
    fn start(
        decoder: &'a Decoder,
        adapter: Option<&'a Adapter>,
        requests: &[Request],
        chunk: &[usize],
        sampling: &'a Sampling,
        intervention: Option<&'a Intervention<'a>>,
    ) -> Result<Self> {
        // Equal prompts are read once and their rows of the cache repeated.
        let mut prompts: Vec<&[u32]> = Vec::new();
        let mut rows = Vec::with_capacity(chunk.len());
        for prompt in chunk.iter().map(|&i| requests[i].prompt.as_slice()) {
            let known = prompts.iter().position(|p| *p == prompt);
            rows.push(known.unwrap_or(prompts.len()) as u32);
            if known.is_none() {
                prompts.push(prompt);
            }
        }
        let columns = prompts.iter().map(|p| p.len()).max().unwrap_or(0) + sampling.max_new_tokens;
        let mut hook = |layer, x| edit(intervention, Phase::Shared, layer, x);
        let prefix = Prefix::read(decoder, &prompts, adapter, columns, &mut hook)?;
        let (mut batch, mut cache) = prefix.continued(decoder, &prompts)?;
        let mut hook = |layer, x| edit(intervention, Phase::Prompt, layer, x);
        let mut x = decoder.forward(&batch, adapter, Some(&mut cache), &mut hook)?;
        if prompts.len() < chunk.len() {
            cache = cache.select(&rows)?;
            x = x
                .narrow(1, x.dim(1)? - 1, 1)?
                .contiguous()?
                .index_select(&Tensor::new(rows.as_slice(), &decoder.device)?, 0)?;
            batch.left_pad = rows.iter().map(|&r| batch.left_pad[r as usize]).collect();
        }
        let mut this = Decoding {
            decoder,
            adapter,
            sampling,
            intervention,
            cache,
            left_pad: batch.left_pad,
            rows: chunk.iter().enumerate().map(|(row, &i)| Some((row, requests[i].stream))).collect(),
            answers: vec![Vec::new(); chunk.len()],
        };
        let first: Vec<Option<u32>> = chunk.iter().map(|&i| requests[i].first).collect();
        this.take_tokens(&x, &first)?;
        Ok(this)
    }

    fn finished(&self) -> bool {
        self.rows.iter().all(Option::is_none)
    }

    fn step(&mut self) -> Result<()> {
        // Whatever an ended row reads, nobody looks at what comes of it.
        let last =
            |row: &Option<(usize, u64)>| row.and_then(|(i, _)| self.answers[i].last().copied()).unwrap_or(0);
        let last: Vec<u32> = self.rows.iter().map(last).collect();
        let ids = Tensor::from_vec(last, (self.rows.len(), 1), &self.decoder.device)?;
        let batch = Batch { ids, left_pad: self.left_pad.clone() };
        let intervention = self.intervention;
        let mut hook = |layer, x| edit(intervention, Phase::Answer, layer, x);
        let x = self.decoder.forward(&batch, self.adapter, Some(&mut self.cache), &mut hook)?;
        self.take_tokens(&x, &[])
    }

    /// Draws the next token of every row from its last residual row. Rows that ended stay in the cache until they are a
    /// quarter of it: leaving them out copies the others.
    fn take_tokens(&mut self, x: &Tensor, forced: &[Option<u32>]) -> Result<()> {
        let last = x.narrow(1, x.dim(1)? - 1, 1)?.squeeze(1)?;
        let logits = self.decoder.logits(&last)?.to_device(&Device::Cpu)?;
        let logits = Elements::of(&logits);
        let logits = logits.matrix(&[])?;
        let draw = |(row, logits): (usize, &[f32])| {
            let (answer, stream) = self.rows[row]?;
            let known = forced.get(row).copied().flatten();
            Some(known.unwrap_or_else(|| self.sampling.draw(logits, stream, self.answers[answer].len())))
        };
        let values = logits.row_major().context("logits are row-major")?;
        let tokens: Vec<Option<u32>> = values.par_chunks(logits.dims().1).enumerate().map(draw).collect();
        for (row, token) in self.rows.iter_mut().zip(tokens) {
            let (Some((answer, _)), Some(token)) = (*row, token) else { continue };
            let answer = &mut self.answers[answer];
            let ended = self.sampling.stop.contains(&token);
            if !ended {
                answer.push(token);
            }
            if ended || answer.len() >= self.sampling.max_new_tokens {
                *row = None;
            }
        }
        let kept: Vec<u32> =
            (0..self.rows.len() as u32).filter(|&r| self.rows[r as usize].is_some()).collect();
        if !kept.is_empty() && kept.len() * 4 <= self.rows.len() * 3 {
            self.rows = kept.iter().map(|&r| self.rows[r as usize]).collect();
            self.left_pad = kept.iter().map(|&r| self.left_pad[r as usize]).collect();
            self.cache = self.cache.select(&kept)?;
        }
        Ok(())
    }
}

/// What a pass reads.
enum Phase {
    /// The beginning of all prompts of a batch.
    Shared,
    /// The rest of each prompt.
    Prompt,
    /// One answer token per row.
    Answer,
}

/// Applies the intervention to the rows it is meant for.
fn edit(
    intervention: Option<&Intervention<'_>>,
    phase: Phase,
    layer: usize,
    x: Tensor,
) -> candle_core::Result<Tensor> {
    let Some(i) = intervention.filter(|i| i.layer == layer) else { return Ok(x) };
    match (phase, i.positions) {
        (Phase::Shared | Phase::Prompt, Positions::Generated) => Ok(x),
        (Phase::Shared | Phase::Answer, Positions::FinalPrefill) => Ok(x),
        (Phase::Prompt, Positions::FinalPrefill) => {
            let tokens = x.dim(1)?;
            let last = steer(&x.narrow(1, tokens - 1, 1)?, i.steering)?;
            if tokens == 1 {
                return Ok(last);
            }
            Tensor::cat(&[&x.narrow(1, 0, tokens - 1)?, &last], 1)
        }
        _ => steer(&x, i.steering),
    }
}

/// Edits all rows of `x`: `[.., hidden]`.
pub fn steer(x: &Tensor, edit: &dyn RowEdit) -> candle_core::Result<Tensor> {
    let hidden = x.dim(candle_core::D::Minus1)?;
    let mut values = x.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
    edit.edit(&mut values, hidden).map_err(candle_core::Error::wrap)?;
    Tensor::from_vec(values, x.shape(), x.device())
}

/// Steers `rows x hidden` values in place.
pub fn steer_rows(values: &mut [f32], hidden: usize, steering: &Steering) -> emaudit::Result<()> {
    let count = values.len() / hidden;
    let mut rows = RowsMut::new(values, count, hidden, hidden)?;
    // A row that is not finite is an error here: an unedited row must not pass for a steered one.
    steering.apply(&mut rows, None, None).map(|_| ())
}
