//! Residual-stream rows of prompts at the named site `resid_post[l]`, every layer at once.

use crate::lora::Adapter;
use crate::model::{Decoder, Prefix, no_edit};
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

/// Prompts per forward pass: enough to feed the matrix products, small enough for the cache.
const BATCH: usize = 32;

/// One residual row per prompt and layer (last prompt token).
#[derive(Clone, Debug, PartialEq)]
pub struct Captured {
    /// Width of a row.
    pub hidden: usize,
    /// Prompts.
    pub rows: usize,
    /// Per layer: `rows x hidden`, row-major, f32.
    pub layers: Vec<Vec<f32>>,
}

impl Captured {
    /// The row of one prompt at one layer.
    pub fn row(&self, layer: usize, i: usize) -> &[f32] {
        &self.layers[layer][i * self.hidden..][..self.hidden]
    }

    /// As safetensors: one tensor `[layers, rows, hidden]`.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let shape = (self.layers.len(), self.rows, self.hidden);
        let tensor = Tensor::from_vec(self.layers.concat(), shape, &Device::Cpu)?;
        Ok(safetensors::serialize([("rows", &tensor)], None)?)
    }

    /// Reads what [`Captured::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let tensors = candle_core::safetensors::load_buffer(bytes, &Device::Cpu)?;
        let tensor = tensors.get("rows").context("no tensor `rows`")?;
        let (_, rows, hidden) = tensor.dims3()?;
        let layers = tensor.flatten(1, 2)?.to_vec2::<f32>()?;
        Ok(Captured { hidden, rows, layers })
    }

    /// The prompts `range`, all layers.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Captured {
        let cut = |l: &Vec<f32>| l[range.start * self.hidden..range.end * self.hidden].to_vec();
        Captured { hidden: self.hidden, rows: range.len(), layers: self.layers.iter().map(cut).collect() }
    }
}

/// Order of indices by length, so that batches waste little on padding; ties keep their order.
pub fn by_length<T>(items: &[T], length: impl Fn(&T) -> usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&i| length(&items[i]));
    order
}

/// Captures the last token of every prompt at every block's output.
///
/// Chat prompts begin alike (system message): the common beginning is read once, and each batch holds prompts
/// of one length, so that nothing is padded.
pub fn last_prompt(
    decoder: &Decoder,
    prompts: &[Vec<u32>],
    adapter: Option<&Adapter>,
    mut done: impl FnMut(usize) -> Result<()>,
) -> Result<Captured> {
    let hidden = decoder.config.hidden_size;
    let mut layers = vec![vec![0f32; prompts.len() * hidden]; decoder.config.n_layers];
    let order = by_length(prompts, Vec::len);
    let longest = order.last().map_or(0, |&i| prompts[i].len());
    let prefix = Prefix::read(decoder, prompts, adapter, longest, &mut no_edit)?;
    for group in order.chunk_by(|&a, &b| prompts[a].len() == prompts[b].len()) {
        for chunk in group.chunks(BATCH) {
            let ids: Vec<&[u32]> = chunk.iter().map(|&i| prompts[i].as_slice()).collect();
            let (batch, mut cache) = prefix.continued(decoder, &ids)?;
            let mut keep = |layer: usize, x: Tensor| {
                let last = x.narrow(1, x.dim(1)? - 1, 1)?.squeeze(1)?.to_vec2::<f32>()?;
                for (row, &i) in last.iter().zip(chunk) {
                    layers[layer][i * hidden..][..hidden].copy_from_slice(row);
                }
                Ok(x)
            };
            decoder.forward(&batch, adapter, Some(&mut cache), &mut keep)?;
            done(chunk.len())?;
        }
    }
    Ok(Captured { hidden, rows: prompts.len(), layers })
}
