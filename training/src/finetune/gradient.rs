//! The loss on responses and its gradient in the adapter's variables.

use super::rows::Example;
use crate::lora::Adapter;
use crate::model::pass::{HEAD_ROWS, Task, Workbench};
use crate::model::{Batch, Decoder, no_edit, ops};
use anyhow::{Context, Result};
use candle_core::{DType, Tensor, Var};
use std::collections::HashMap;

/// Gradients in the order of the variables; `None` where the loss does not depend on one.
pub type Gradients = Vec<Option<Tensor>>;

/// A padded batch, and which of its rows predict which tokens.
struct Padded {
    batch: Batch,
    rows: Tensor,
    targets: Vec<u32>,
}

impl Padded {
    fn new(decoder: &Decoder, examples: &[&Example]) -> Result<Self> {
        let ids: Vec<&[u32]> = examples.iter().map(|e| e.ids.as_slice()).collect();
        let batch = Batch::new(&ids, &decoder.device)?;
        let tokens = batch.ids.dim(1)?;
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        for (b, example) in examples.iter().enumerate() {
            for t in 1..example.ids.len() {
                if example.response[t] {
                    rows.push((b * tokens + batch.left_pad[b] + t - 1) as u32);
                    targets.push(example.ids[t]);
                }
            }
        }
        Ok(Padded { batch, rows: Tensor::new(rows, &decoder.device)?, targets })
    }

    fn task<'a>(&'a self, rows: &'a [u32]) -> Task<'a> {
        Task { ids: &self.batch.ids, left_pad: &self.batch.left_pad, rows, targets: &self.targets }
    }

    /// The rows of `[batch, tokens, hidden]` that predict a target.
    fn predicting(&self, hidden: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = hidden.dims3()?;
        Ok(hidden.reshape((batch * tokens, width))?.index_select(&self.rows, 0)?)
    }
}

/// [`response_loss`] and its gradient on the CPU, without a graph; `checkpointing` as in [`checkpointed_gradients`].
pub fn direct_gradients(
    bench: &Workbench,
    decoder: &Decoder,
    adapter: &Adapter,
    vars: &[Var],
    batch: &[&Example],
    share: f64,
    checkpointing: bool,
) -> Result<(f32, Gradients)> {
    let padded = Padded::new(decoder, batch)?;
    let rows = padded.rows.to_vec1::<u32>()?;
    let (loss, found) =
        decoder.loss_and_gradients(bench, &padded.task(&rows), adapter, share, checkpointing)?;
    let places: HashMap<_, _> = vars.iter().enumerate().map(|(i, v)| (v.as_tensor().id(), i)).collect();
    let mut gradients: Gradients = vec![None; vars.len()];
    for (layer, found) in found.into_iter().enumerate() {
        for (lora, found) in adapter.block(layer).iter().zip(found) {
            let Some((lora, (a, b))) = lora.as_ref().zip(found) else { continue };
            for (tensor, values) in [(&lora.a, a), (&lora.b, b)] {
                if let Some(&place) = places.get(&tensor.id()) {
                    gradients[place] = Some(Tensor::from_vec(values, tensor.shape(), tensor.device())?);
                }
            }
        }
    }
    Ok((loss as f32, gradients))
}

/// [`response_loss`] on the CPU, without a graph and without the logits of all rows.
pub fn direct_loss(
    bench: &Workbench,
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    batch: &[&Example],
) -> Result<f64> {
    let padded = Padded::new(decoder, batch)?;
    let rows = padded.rows.to_vec1::<u32>()?;
    decoder.loss(bench, &padded.task(&rows), adapter)
}

/// Mean cross-entropy (nats) over the response tokens of a batch.
pub fn response_loss(decoder: &Decoder, adapter: Option<&Adapter>, batch: &[&Example]) -> Result<Tensor> {
    let padded = Padded::new(decoder, batch)?;
    let hidden = decoder.forward(&padded.batch, adapter, None, &mut no_edit)?;
    Ok(ops::cross_entropy(&decoder.logits(&padded.predicting(&hidden)?)?, &padded.targets)?)
}

/// [`response_loss`], and the gradient of `share` times it in `vars`. The graph of the whole pass is held.
pub fn gradients(
    decoder: &Decoder,
    adapter: &Adapter,
    vars: &[Var],
    batch: &[&Example],
    share: f64,
) -> Result<(f32, Gradients)> {
    let loss = response_loss(decoder, Some(adapter), batch)?;
    let value = loss.to_scalar::<f32>()?;
    let loss = if share == 1.0 { loss } else { (loss * share)? };
    let mut store = loss.backward()?;
    Ok((value, vars.iter().map(|v| store.remove(v)).collect()))
}

/// As [`gradients`], with gradient checkpointing (Chen et al. 2016): only the residual stream between blocks is
/// kept; each block runs again when backward comes to it, and the output head takes [`HEAD_ROWS`] rows at a time.
///
/// A block's gradient has the same bits as without. The head's has too when it fits one piece; else its scale is
/// rounded once more per piece.
pub fn checkpointed_gradients(
    decoder: &Decoder,
    adapter: &Adapter,
    vars: &[Var],
    batch: &[&Example],
    share: f64,
) -> Result<(f32, Gradients)> {
    let padded = Padded::new(decoder, batch)?;
    let first = decoder.embed(&padded.batch.ids)?;
    let mut inputs = vec![first.clone()];
    let mut keep = |_: usize, x: Tensor| {
        inputs.push(x.clone());
        Ok(x)
    };
    let left_pad = &padded.batch.left_pad;
    decoder.forward_from(0, first, left_pad, Some(&adapter.untracked()), None, &mut keep)?;
    let hidden = inputs.pop().context("a decoder without blocks")?;
    let (value, mut dy) = head_gradient(decoder, &padded, &hidden, share)?;
    drop(hidden);

    let mut gradients: Gradients = vec![None; vars.len()];
    for (layer, x) in inputs.into_iter().enumerate().rev() {
        let x = Var::from_tensor(&x)?;
        // Nothing trainable lies before the first block.
        let input = if layer == 0 { x.as_tensor().detach() } else { x.as_tensor().clone() };
        let y = decoder.forward_block(layer, input, left_pad, Some(adapter))?;
        // The gradient of sum(y * dy) in y is dy, to the bit.
        let mut store = (y * &dy)?.sum_all()?.backward()?;
        for (var, gradient) in vars.iter().zip(&mut gradients) {
            if let Some(found) = store.remove(var) {
                *gradient = Some(found);
            }
        }
        if let Some(dx) = store.remove(&x) {
            dy = dx;
        }
    }
    Ok((value, gradients))
}

/// The mean loss, and the gradient of `share` times it in the last block's output.
fn head_gradient(decoder: &Decoder, padded: &Padded, hidden: &Tensor, share: f64) -> Result<(f32, Tensor)> {
    let (batch, tokens, width) = hidden.dims3()?;
    let rows = padded.predicting(hidden)?;
    let total = padded.targets.len();
    let (mut loss, mut pieces) = (0f64, Vec::new());
    for (i, targets) in padded.targets.chunks(HEAD_ROWS).enumerate() {
        let x = Var::from_tensor(&rows.narrow(0, i * HEAD_ROWS, targets.len())?)?;
        let mean = ops::cross_entropy(&decoder.logits(x.as_tensor())?, targets)?;
        let part = targets.len() as f64 / total as f64;
        loss += part * f64::from(mean.to_scalar::<f32>()?);
        let scaled = if part * share == 1.0 { mean } else { (mean * (part * share))? };
        let mut store = scaled.backward()?;
        pieces.push(store.remove(&x).context("the loss does not depend on the residual stream")?);
    }
    let zeros = Tensor::zeros((batch * tokens, width), DType::F32, hidden.device())?;
    let dy = zeros.index_add(&padded.rows, &Tensor::cat(&pieces, 0)?, 0)?;
    Ok((loss as f32, dy.reshape((batch, tokens, width))?))
}

/// Adds `more` to `sum`, variable by variable.
pub fn add(sum: &mut [Option<Tensor>], more: Gradients) -> Result<()> {
    for (sum, more) in sum.iter_mut().zip(more) {
        *sum = match (sum.take(), more) {
            (Some(a), Some(b)) => Some((a + b)?),
            (a, b) => a.or(b),
        };
    }
    Ok(())
}

/// Euclidean norm over all variables.
pub fn norm(gradients: &[Option<Tensor>]) -> Result<f64> {
    let mut sum = 0f64;
    for g in gradients.iter().flatten() {
        sum += g.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    }
    Ok(sum.sqrt())
}
