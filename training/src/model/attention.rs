//! Causal grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023) as one differentiable operation.
//!
//! On the CPU one task handles one key-value head of one sequence: the scores stay in its core's cache, forward
//! keeps none of them, and backward forms them again. A GPU runs the same formula as [matrix products](products) with a
//! softmax between them.

mod products;

use super::product::{Elements, Matrix, Threads, product};
use crate::cuda::Outside;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};
use products::Products;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// What becomes of the products of queries and keys before the softmax.
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    /// Factor.
    pub scale: f32,
    /// Scaled products s become `cap * tanh(s / cap)` (Gemma 2).
    pub cap: Option<f32>,
}

/// Which keys a query may see: causal, within the window, and never a row's padding.
#[derive(Clone, Debug)]
pub struct Visibility {
    /// Columns before the padding, the same tokens in every row.
    pub shared: usize,
    /// Padding tokens of each row of the batch, to the right of the shared columns.
    pub left_pad: Arc<[usize]>,
    /// Tokens already in the cache: query i stands at column `offset + i`.
    pub offset: usize,
    /// A query sees its own and the `window - 1` positions before (padding has none).
    pub window: Option<usize>,
}

impl Visibility {
    /// The columns up to its own that query `i` of sequence `b` does not see: those before the window, and padding.
    fn hidden(&self, b: usize, i: usize) -> [Range<usize>; 2] {
        let (own, pad) = (self.offset + i, self.left_pad[b]);
        // A padding query sees itself, so that its softmax is defined; nobody reads it.
        let end = (self.shared + pad).min(own);
        let padding = self.shared.min(end)..end;
        let before = match self.window {
            Some(window) if own < self.shared => (own + 1).saturating_sub(window),
            Some(window) if own >= self.shared + pad => {
                let first = (own - pad + 1).saturating_sub(window);
                if first > self.shared { first + pad } else { first }
            }
            _ => 0,
        };
        [0..before, padding]
    }
}

/// softmax(scores of q k^T) v over the visible keys, all f32. `q`: `[batch, heads, tokens, head_dim]`; `k` and `v`:
/// `[batch, kv_heads, keys, head_dim]`; result as `q`. Strides are free.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scores: Scores, visible: &Visibility) -> Result<Tensor> {
    if q.device().is_cpu() {
        return q.apply_op3(
            k,
            v,
            Attention { scores, visible: visible.clone(), outside: Outside::default() },
        );
    }
    let y = Products::new(q, k, scores, visible)?.forward(v)?;
    if ![q, k, v].into_iter().any(Tensor::track_op) {
        return Ok(y);
    }
    q.apply_op3(k, v, Attention { scores, visible: visible.clone(), outside: Outside::new(y) })
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    kv_heads: usize,
    /// Query heads that share one key-value head.
    group: usize,
    tokens: usize,
    keys: usize,
    dim: usize,
}

impl Sizes {
    fn new(q: &[usize], k: &[usize]) -> Result<Self> {
        match (q, k) {
            (&[batch, heads, tokens, dim], &[b, kv_heads, keys, d])
                if (batch, dim) == (b, d) && kv_heads > 0 && heads % kv_heads == 0 =>
            {
                Ok(Sizes { batch, kv_heads, group: heads / kv_heads, tokens, keys, dim })
            }
            _ => candle_core::bail!("attention of queries {q:?} over keys {k:?}"),
        }
    }

    /// Sequence, key-value head and query heads of one task.
    fn task(&self, i: usize) -> (usize, usize, std::ops::Range<usize>) {
        let (b, j) = (i / self.kv_heads, i % self.kv_heads);
        (b, j, j * self.group..(j + 1) * self.group)
    }
}

struct Attention {
    scores: Scores,
    visible: Visibility,
    /// The result, where it was computed before: on a GPU.
    outside: Outside,
}

impl Attention {
    /// Softmax weights of one query head, row-major `tokens x keys`, into `weights`; where `slopes` has room, also the
    /// derivative of each capped score, 1 - tanh^2.
    fn weights(&self, b: usize, q: Matrix<'_>, k: Matrix<'_>, weights: &mut [f32], slopes: &mut [f32]) {
        let keys = k.dims().0;
        product(weights, false, q, k.t(), Threads::One);
        for (i, row) in weights.chunks_mut(keys).enumerate() {
            let (past, future) = row.split_at_mut(self.visible.offset + i + 1);
            let mut scale = self.scores.scale;
            if let Some(cap) = self.scores.cap {
                for v in past.iter_mut() {
                    *v = cap * (*v * scale / cap).tanh();
                }
                if let Some(slopes) = slopes.get_mut(i * keys..) {
                    slopes.iter_mut().zip(past.iter()).for_each(|(s, v)| *s = 1.0 - (v / cap) * (v / cap));
                }
                scale = 1.0;
            }
            for hidden in self.visible.hidden(b, i) {
                past[hidden].fill(f32::NEG_INFINITY);
            }
            softmax(past, scale);
            future.fill(0.0);
        }
    }
}

fn softmax(row: &mut [f32], scale: f32) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0f32;
    for v in row.iter_mut() {
        *v = ((*v - max) * scale).exp();
        sum += *v;
    }
    let inverse = 1.0 / sum;
    row.iter_mut().for_each(|v| *v *= inverse);
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "emaudit-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let s = Sizes::new(lq.dims(), lk.dims())?;
        let mut out = vec![0f32; lq.shape().elem_count()];
        out.par_chunks_mut(s.group * s.tokens * s.dim).enumerate().try_for_each(|(task, out)| {
            let (b, j, heads) = s.task(task);
            let (k, v) = (Matrix::of(k, lk, &[b, j])?, Matrix::of(v, lv, &[b, j])?);
            let mut weights = vec![0f32; s.tokens * s.keys];
            for (h, out) in heads.zip(out.chunks_mut(s.tokens * s.dim)) {
                self.weights(b, Matrix::of(q, lq, &[b, h])?, k, &mut weights, &mut []);
                let weights = Matrix::new(&weights, (s.tokens, s.keys), (s.keys, 1));
                product(out, false, weights, v, Threads::One);
            }
            Ok::<_, candle_core::Error>(())
        })?;
        Ok((CpuStorage::F32(out), lq.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.outside.output()
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        if !q.device().is_cpu() {
            let gradients = Products::new(q, k, self.scores, &self.visible)?.backward(v, dy)?;
            return Ok(gradients.map(Some).into());
        }
        let s = Sizes::new(q.dims(), k.dims())?;
        let mut dq = vec![0f32; q.elem_count()];
        let (mut dk, mut dv) = (vec![0f32; k.elem_count()], vec![0f32; v.elem_count()]);
        dq.par_chunks_mut(s.group * s.tokens * s.dim)
            .zip(dk.par_chunks_mut(s.keys * s.dim))
            .zip(dv.par_chunks_mut(s.keys * s.dim))
            .enumerate()
            .try_for_each(|(task, ((dq, dk), dv))| self.task_gradient(&s, task, [q, k, v, dy], dq, dk, dv))?;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

impl Attention {
    fn task_gradient(
        &self,
        s: &Sizes,
        task: usize,
        tensors: [&Tensor; 4],
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
    ) -> Result<()> {
        let (b, j, heads) = s.task(task);
        let [q, k, v, dy] = tensors.map(Elements::of);
        let (k, v) = (k.matrix(&[b, j])?, v.matrix(&[b, j])?);
        let mut weights = vec![0f32; s.tokens * s.keys];
        let mut dscores = vec![0f32; s.tokens * s.keys];
        let mut slopes = vec![0f32; self.scores.cap.map_or(0, |_| s.tokens * s.keys)];
        for (h, dq) in heads.zip(dq.chunks_mut(s.tokens * s.dim)) {
            let (q, dy) = (q.matrix(&[b, h])?, dy.matrix(&[b, h])?);
            self.weights(b, q, k, &mut weights, &mut slopes);
            product(&mut dscores, false, dy, v.t(), Threads::One);
            for (w, d) in weights.chunks(s.keys).zip(dscores.chunks_mut(s.keys)) {
                let dot: f32 = w.iter().zip(d.iter()).map(|(w, d)| w * d).sum();
                d.iter_mut().zip(w).for_each(|(d, w)| *d = self.scores.scale * w * (*d - dot));
            }
            dscores.iter_mut().zip(&slopes).for_each(|(d, slope)| *d *= slope);
            let shape = ((s.tokens, s.keys), (s.keys, 1));
            let dscores = Matrix::new(&dscores, shape.0, shape.1);
            product(dv, true, Matrix::new(&weights, shape.0, shape.1).t(), dy, Threads::One);
            product(dq, false, dscores, k, Threads::One);
            product(dk, true, dscores.t(), q, Threads::One);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;
    use candle_core::{Device, Var};

    fn tensor(seed: u64, shape: (usize, usize, usize, usize)) -> Tensor {
        let n = shape.0 * shape.1 * shape.2 * shape.3;
        let values: Vec<f32> =
            (0..n as u64).map(|i| 4.0 * random::uniform(&[seed, i]) as f32 - 2.0).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Largest difference, in units of the largest value.
    fn off(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (a, b) = (flat(a), flat(b));
        let largest = b.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(largest > 0.0);
        a.iter().zip(&b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
    }

    /// What a GPU runs, run here: the same results and gradients as the fused form.
    #[test]
    fn attention_as_products_is_the_fused_one() {
        let (batch, heads, kv_heads, dim) = (2, 6, 2, 16);
        let mut cases = 0;
        for (tokens, offset, shared) in [(7, 0, 0), (1, 9, 3), (5, 4, 4), (33, 0, 0)] {
            for window in [None, Some(3)] {
                for cap in [None, Some(2.0)] {
                    let visible = Visibility { shared, left_pad: [0, 2].into(), offset, window };
                    let scores = Scores { scale: 0.25, cap };
                    let keys = offset + tokens;
                    let q = Var::from_tensor(&tensor(1, (batch, heads, tokens, dim))).unwrap();
                    let [k, v] =
                        [2, 3].map(|s| Var::from_tensor(&tensor(s, (batch, kv_heads, keys, dim))).unwrap());
                    let dy = tensor(4, (batch, heads, tokens, dim));
                    let y = attention(&q, &k, &v, scores, &visible).unwrap();
                    let store = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
                    let products = Products::new(&q, &k, scores, &visible).unwrap();
                    // 12 sqrt(n) u for sums of at most n = 2 keys + 2 dim terms, as in the parity tests.
                    let allowed = 12.0 * ((2 * keys + 2 * dim) as f32).sqrt() * 2f32.powi(-24);
                    let own = products.forward(&v).unwrap();
                    assert!(off(&own, &y) <= allowed, "{} of {allowed}", off(&own, &y));
                    for (own, var) in products.backward(&v, &dy).unwrap().iter().zip([&q, &k, &v]) {
                        let found = off(own, store.get(var).unwrap());
                        assert!(
                            found <= allowed,
                            "{tokens} {offset} {window:?} {cap:?}: {found} of {allowed}"
                        );
                    }
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, 16);
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let (q, k) = (tensor(1, (1, 4, 3, 8)), tensor(2, (1, 2, 5, 8)));
        let visible = Visibility { shared: 0, left_pad: [0].into(), offset: 1, window: None };
        let scores = Scores { scale: 1.0, cap: None };
        let error = Products::new(&q, &k, scores, &visible).err().unwrap().to_string();
        assert!(error.contains("1 sequences of 5 keys"), "{error}");
    }
}
