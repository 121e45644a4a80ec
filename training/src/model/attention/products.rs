//! Attention as matrix products with a softmax between them: the form in which a GPU runs it. Backward forms the
//! weights again.

use super::{Scores, Sizes, Visibility, kernels};
use crate::cuda::{self, launch};
use candle_core::{CpuStorage, CudaStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// One call of attention.
pub(super) struct Products<'a> {
    q: Tensor,
    k: Tensor,
    left_pad: Tensor,
    scores: Scores,
    visible: &'a Visibility,
    sizes: Sizes,
}

impl<'a> Products<'a> {
    /// Shapes as in [`super::attention`]; nothing is tracked from here on.
    pub(super) fn new(q: &Tensor, k: &Tensor, scores: Scores, visible: &'a Visibility) -> Result<Self> {
        let sizes = Sizes::new(q.dims(), k.dims())?;
        let left_pad: Vec<u32> = visible.left_pad.iter().map(|&pad| pad as u32).collect();
        if left_pad.len() != sizes.batch || sizes.keys != visible.offset + sizes.tokens {
            candle_core::bail!("{} sequences of {} keys do not fit {visible:?}", sizes.batch, sizes.keys);
        }
        Ok(Products {
            q: q.detach().contiguous()?.reshape(sizes.grouped())?,
            k: k.detach().contiguous()?,
            left_pad: Tensor::from_vec(left_pad, sizes.batch, q.device())?,
            scores,
            visible,
            sizes,
        })
    }

    /// The products of queries and keys, and the weights.
    fn weights(&self) -> Result<(Tensor, Tensor)> {
        let products = self.q.matmul(&self.k.t()?)?;
        let op = Weights { scores: self.scores, visible: self.visible.clone(), sizes: self.sizes };
        let weights = products.apply_op2_no_bwd(&self.left_pad, &op)?;
        Ok((products, weights))
    }

    /// The mixed values, in the shape of the queries.
    pub(super) fn forward(&self, v: &Tensor) -> Result<Tensor> {
        let (_, weights) = self.weights()?;
        weights.matmul(&v.detach().contiguous()?)?.reshape(self.sizes.queries())
    }

    /// Gradients in q, k and v.
    pub(super) fn backward(&self, v: &Tensor, dy: &Tensor) -> Result<[Tensor; 3]> {
        let (products, weights) = self.weights()?;
        let dy = dy.detach().contiguous()?.reshape(self.sizes.grouped())?;
        let dv = weights.t()?.matmul(&dy)?;
        let dweights = dy.matmul(&v.detach().contiguous()?.t()?)?;
        let op = WeightsGrad { scores: self.scores, keys: self.sizes.keys };
        let dproducts = products.apply_op3_no_bwd(&weights, &dweights, &op)?;
        let dq = dproducts.matmul(&self.k)?.reshape(self.sizes.queries())?;
        Ok([dq, dproducts.t()?.matmul(&self.q)?, dv])
    }
}

impl Sizes {
    fn queries(&self) -> (usize, usize, usize, usize) {
        (self.batch, self.kv_heads * self.group, self.tokens, self.dim)
    }

    /// The queries of all heads that share a key-value head, one below the other.
    fn grouped(&self) -> (usize, usize, usize, usize) {
        (self.batch, self.kv_heads, self.group * self.tokens, self.dim)
    }
}

/// Softmax over the visible keys, in (products, left_pad).
struct Weights {
    scores: Scores,
    visible: Visibility,
    sizes: Sizes,
}

/// Its gradient, in (products, weights, dweights).
struct WeightsGrad {
    scores: Scores,
    keys: usize,
}

fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("attention weights need contiguous tensors, got {layout:?}")
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

impl CustomOp2 for Weights {
    fn name(&self) -> &'static str {
        "emaudit-attention-weights"
    }

    fn cpu_fwd(
        &self,
        products: &CpuStorage,
        lp: &Layout,
        _left_pad: &CpuStorage,
        _ll: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut weights = values(products, lp)?.to_vec();
        let (s, Scores { scale, cap }) = (self.sizes, self.scores);
        weights.par_chunks_mut(s.keys.max(1)).enumerate().for_each(|(row, weights)| {
            let (b, i) = (row / (s.kv_heads * s.group * s.tokens), row % s.tokens);
            let (past, future) = weights.split_at_mut(self.visible.offset + i + 1);
            let capped = |v: f32| cap.map_or(v * scale, |cap| cap * (v * scale / cap).tanh());
            past.iter_mut().for_each(|v| *v = capped(*v));
            for hidden in self.visible.hidden(b, i) {
                past[hidden].fill(f32::NEG_INFINITY);
            }
            kernels::softmax(past, 1.0);
            future.fill(0.0);
        });
        Ok((CpuStorage::F32(weights), lp.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        products: &CudaStorage,
        lp: &Layout,
        left_pad: &CudaStorage,
        ll: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (s, visible) = (self.sizes, &self.visible);
        let rows = launch::Rows {
            keys: s.keys,
            queries: s.tokens,
            heads: s.kv_heads * s.group,
            batch: s.batch,
            offset: visible.offset,
            shared: visible.shared,
            window: visible.window,
        };
        cuda::run::<f32, 2>([(products, lp), (left_pad, ll)], lp.shape(), |inputs, weights| {
            launch::attention_weights(inputs, weights, &rows, self.scores.scale, self.scores.cap)
        })
    }
}

impl CustomOp3 for WeightsGrad {
    fn name(&self) -> &'static str {
        "emaudit-attention-weights-grad"
    }

    fn cpu_fwd(
        &self,
        products: &CpuStorage,
        lp: &Layout,
        weights: &CpuStorage,
        lw: &Layout,
        dweights: &CpuStorage,
        ld: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (products, weights) = (values(products, lp)?, values(weights, lw)?);
        let mut out = values(dweights, ld)?.to_vec();
        let (keys, Scores { scale, cap }) = (self.keys.max(1), self.scores);
        out.par_chunks_mut(keys).zip(weights.par_chunks(keys)).zip(products.par_chunks(keys)).for_each(
            |((d, w), products)| {
                let dot: f32 = w.iter().zip(d.iter()).map(|(w, d)| w * d).sum();
                for ((d, w), p) in d.iter_mut().zip(w).zip(products) {
                    let slope = cap.map_or(1.0, |cap| 1.0 - (p * scale / cap).tanh().powi(2));
                    *d = scale * w * (*d - dot) * slope;
                }
            },
        );
        Ok((CpuStorage::F32(out), lp.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        products: &CudaStorage,
        lp: &Layout,
        weights: &CudaStorage,
        lw: &Layout,
        dweights: &CudaStorage,
        ld: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let rows = lp.shape().elem_count().checked_div(self.keys).unwrap_or(0);
        let inputs = [(products, lp), (weights, lw), (dweights, ld)];
        cuda::run::<f32, 3>(inputs, lp.shape(), |inputs, dproducts| {
            let Scores { scale, cap } = self.scores;
            launch::attention_weights_grad(inputs, dproducts, (rows, self.keys), scale, cap)
        })
    }
}
