//! Keys and values of the tokens seen so far, in buffers allocated once.

use super::Config;
use candle_core::{DType, Device, Result, Tensor};

/// KV cache of one batch: `[batch, kv_heads, capacity, head_dim]` per block, twice.
pub struct Cache {
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    capacity: usize,
    /// Columns filled, padding included.
    pub filled: usize,
    /// Columns at the front that all rows share; padding comes after them.
    pub shared: usize,
}

impl Cache {
    /// An empty cache for `batch` rows of at most `capacity` tokens.
    pub fn new(config: &Config, batch: usize, capacity: usize, device: &Device) -> Result<Self> {
        let shape = (batch, config.n_kv_heads, capacity, config.head_dim);
        let buffers =
            || (0..config.n_layers).map(|_| Tensor::zeros(shape, DType::F32, device)).collect::<Result<_>>();
        Ok(Cache { keys: buffers()?, values: buffers()?, capacity, filled: 0, shared: 0 })
    }

    /// Appends the block's new keys and values `[batch, kv_heads, tokens, head_dim]`; returns all so far.
    /// `filled` moves on only when the last block of a pass is done (see [`Cache::advance`]).
    pub fn append(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let tokens = k.dim(2)?;
        if self.filled + tokens > self.capacity {
            candle_core::bail!(
                "the cache holds {} tokens, {} are needed",
                self.capacity,
                self.filled + tokens
            );
        }
        self.keys[layer].slice_set(&k.contiguous()?, 2, self.filled)?;
        self.values[layer].slice_set(&v.contiguous()?, 2, self.filled)?;
        let total = self.filled + tokens;
        Ok((self.keys[layer].narrow(2, 0, total)?, self.values[layer].narrow(2, 0, total)?))
    }

    /// Marks `tokens` more columns as filled.
    pub fn advance(&mut self, tokens: usize) {
        self.filled += tokens;
    }

    /// A cache whose row i is this one's row `rows[i]`; rows may repeat.
    pub fn select(&self, rows: &[u32]) -> Result<Self> {
        let index = Tensor::new(rows, self.keys[0].device())?;
        let pick = |all: &[Tensor]| all.iter().map(|t| t.index_select(&index, 0)).collect::<Result<Vec<_>>>();
        Ok(Cache {
            keys: pick(&self.keys)?,
            values: pick(&self.values)?,
            capacity: self.capacity,
            filled: self.filled,
            shared: self.shared,
        })
    }
}
