//! The middle-layer cell: an edit that later blocks can still react to.
//!
//! The network is run once up to the edited block; each vector costs only the blocks behind it.

use crate::generate::steer;
use crate::likelihood::{Dialogue, last_rows, of_rows};
use crate::lora::Adapter;
use crate::model::{Batch, Decoder, no_edit};
use crate::perturb::RowEdit;
use crate::preference::contrast;
use anyhow::Result;
use candle_core::Tensor;
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
        let mut all = vec![Vec::new(); self.dialogues.len()];
        for (indices, left_pad, x) in &self.batches {
            let x = match edit {
                Some(edit) => steer(x, edit)?,
                None => x.clone(),
            };
            let x =
                self.decoder.forward_from(self.layer + 1, x, left_pad, self.adapter, None, &mut no_edit)?;
            for (b, &i) in indices.iter().enumerate() {
                let answer = &self.dialogues[i].answer;
                all[i] = of_rows(self.decoder, &last_rows(&x, b, answer.len())?, answer)?;
            }
        }
        Ok(contrast(&all))
    }
}
