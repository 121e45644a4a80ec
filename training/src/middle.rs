//! Edits that later blocks can still react to, in one block or in several.
//!
//! The network is run once up to the edited block; each vector costs only the blocks behind it.

use crate::generate::steer;
use crate::likelihood::{Dialogue, last_rows, of_rows};
use crate::lora::Adapter;
use crate::model::{Batch, Decoder};
use crate::perturb::RowEdit;
use crate::preference::contrast;
use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use emaudit::directions::schema::Positions;
use std::sync::Arc;

const BATCH: usize = 16;

/// Code and prose answers, computed up to and including block `layer`.
pub struct MiddlePreference<'a> {
    decoder: &'a Decoder,
    adapter: Option<&'a Adapter>,
    layer: usize,
    dialogues: Vec<Dialogue>,
    /// Per batch: indices of its dialogues, padding, residual stream after the block.
    batches: Vec<(Vec<usize>, Arc<[usize]>, Tensor)>,
}

impl<'a> MiddlePreference<'a> {
    /// `code[i]` and `prose[i]` answer the same prompt i; none may be empty.
    pub fn new(
        decoder: &'a Decoder,
        adapter: Option<&'a Adapter>,
        layer: usize,
        code: &[Dialogue],
        prose: &[Dialogue],
    ) -> Result<Self> {
        let dialogues: Vec<Dialogue> = code.iter().chain(prose).cloned().collect();
        let order: Vec<usize> = (0..dialogues.len()).collect();
        let mut batches = Vec::new();
        for chunk in order.chunks(BATCH) {
            let inputs: Vec<Vec<u32>> = chunk.iter().map(|&i| dialogues[i].input()).collect();
            let batch = Batch::new(&inputs, &decoder.device)?;
            let mut kept = None;
            decoder.forward(&batch, adapter, None, &mut |l, x| {
                if l == layer {
                    kept = Some(x.clone());
                }
                Ok(x)
            })?;
            let x = kept.ok_or_else(|| anyhow::anyhow!("there is no layer {layer}"))?;
            batches.push((chunk.to_vec(), batch.left_pad, x));
        }
        Ok(MiddlePreference { decoder, adapter, layer, dialogues, batches })
    }

    /// Preference of each prompt, every position of block `layer`'s output edited; `None`: as it is.
    pub fn preferences(&self, edit: Option<&dyn RowEdit>) -> Result<Vec<f64>> {
        let edits: Vec<(usize, &dyn RowEdit)> = edit.into_iter().map(|edit| (self.layer, edit)).collect();
        Ok(contrast(&self.log_probabilities(&edits, Positions::All)?))
    }

    /// Log-probabilities (nats) of every answer token, code answers first, with the outputs of some blocks edited, none
    /// of them before `layer`, at some positions of the sequence.
    pub fn log_probabilities(
        &self,
        edits: &[(usize, &dyn RowEdit)],
        positions: Positions,
    ) -> Result<Vec<Vec<f64>>> {
        ensure!(
            edits.iter().all(|(layer, _)| *layer >= self.layer),
            "the network was run up to block {}: earlier ones cannot be edited any more",
            self.layer
        );
        let mut all = vec![Vec::new(); self.dialogues.len()];
        for (indices, left_pad, x) in &self.batches {
            let answers: Vec<usize> = indices.iter().map(|&i| self.dialogues[i].answer.len()).collect();
            let mut hook = |layer: usize, x: Tensor| {
                let mut here = edits.iter().filter(|(at, _)| *at == layer);
                here.try_fold(x, |x, (_, edit)| edited(x, *edit, positions, &answers))
            };
            let x = hook(self.layer, x.clone())?;
            let x = self.decoder.forward_from(self.layer + 1, x, left_pad, self.adapter, None, &mut hook)?;
            for (b, &i) in indices.iter().enumerate() {
                let answer = &self.dialogues[i].answer;
                all[i] = of_rows(self.decoder, &last_rows(&x, b, answer.len())?, answer)?;
            }
        }
        Ok(all)
    }
}

/// `x` (`[batch, tokens, hidden]`, padded on the left) with the rows of some positions edited. `answers`: tokens of each
/// answer, whose predicting rows stand last; the first of them is the last prompt token.
fn edited(
    x: Tensor,
    edit: &dyn RowEdit,
    positions: Positions,
    answers: &[usize],
) -> candle_core::Result<Tensor> {
    if positions == Positions::All {
        return steer(&x, edit);
    }
    let (_, tokens, hidden) = x.dims3()?;
    let mut values = x.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
    let range = |(b, answer): (usize, &usize)| {
        let first = (b + 1) * tokens - answer;
        match positions {
            Positions::FinalPrefill => first..first + 1,
            _ => first + 1..(b + 1) * tokens,
        }
    };
    let ranges: Vec<_> = answers.iter().enumerate().map(range).collect();
    let mut rows: Vec<f32> =
        ranges.iter().flat_map(|r| values[r.start * hidden..r.end * hidden].iter().copied()).collect();
    edit.edit(&mut rows, hidden).map_err(candle_core::Error::wrap)?;
    let mut at = 0;
    for r in ranges {
        let into = &mut values[r.start * hidden..r.end * hidden];
        into.copy_from_slice(&rows[at..at + into.len()]);
        at += into.len();
    }
    Tensor::from_vec(values, x.shape(), x.device())
}
