//! Causal grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023) as one differentiable operation.
//!
//! On the CPU one task handles one key-value head of one sequence: the scores stay in its core's cache, forward
//! keeps none of them, and backward forms them again. A GPU runs the same formula as [matrix products](products) with a
//! softmax between them.

mod products;

use super::kernels;
use super::pass::Workbench;
use super::product::{Elements, Matrix, Threads, product};
use crate::cuda::Outside;
use crate::quant::matvec::{self, Isa, Weight};
use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};
use products::Products;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Queries of one head that are worked on at a time: keys after the last of them are left out.
const QUERIES: usize = 64;

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

/// The sizes of one attention.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub batch: usize,
    pub kv_heads: usize,
    /// Query heads that share one key-value head.
    pub group: usize,
    pub tokens: usize,
    pub keys: usize,
    pub dim: usize,
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
    /// Softmax weights of one query head's queries from `first` on, row-major `queries x keys`, into `weights`; where
    /// `slopes` has room, also the derivative of each capped score, 1 - tanh^2.
    fn weights(
        &self,
        (b, first): (usize, usize),
        q: Matrix<'_>,
        k: Matrix<'_>,
        weights: &mut [f32],
        slopes: &mut [f32],
    ) {
        let keys = k.dims().0;
        product(weights, false, q, k.t(), Threads::One);
        for (i, row) in weights.chunks_mut(keys).enumerate() {
            self.softmax((b, first + i), row, slopes.get_mut(i * keys..));
        }
    }

    /// Products of query `i` of sequence `b` with all keys to softmax weights.
    fn softmax(&self, (b, i): (usize, usize), row: &mut [f32], slopes: Option<&mut [f32]>) {
        let (past, future) = row.split_at_mut(self.visible.offset + i + 1);
        let mut scale = self.scores.scale;
        if let Some(cap) = self.scores.cap {
            for v in past.iter_mut() {
                *v = cap * (*v * scale / cap).tanh();
            }
            if let Some(slopes) = slopes {
                slopes.iter_mut().zip(past.iter()).for_each(|(s, v)| *s = 1.0 - (v / cap) * (v / cap));
            }
            scale = 1.0;
        }
        for hidden in self.visible.hidden(b, i) {
            past[hidden].fill(f32::NEG_INFINITY);
        }
        kernels::softmax(past, scale);
        future.fill(0.0);
    }
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
        let given = [(q, lq), (k, lk), (v, lv)];
        let at = |which: usize, b, h| Matrix::of(given[which].0, given[which].1, &[b, h]);
        out.par_chunks_mut(s.group * s.tokens * s.dim)
            .enumerate()
            .try_for_each(|(task, out)| self.task_forward(&s, task, at, out))?;
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
            .try_for_each(|(task, ((dq, dk), dv))| {
                let given = [q, k, v, dy].map(Elements::of);
                self.task_gradient(&s, task, |which, b, h| given[which].matrix(&[b, h]), [dq, dk, dv])
            })?;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

/// Of queries (0), keys (1), values (2) or the result's gradient (3): one head of one sequence, `[tokens, head_dim]`.
trait Given<'a>: Fn(usize, usize, usize) -> Result<Matrix<'a>> {}
impl<'a, F: Fn(usize, usize, usize) -> Result<Matrix<'a>>> Given<'a> for F {}

impl Attention {
    /// The heads of one task into `out`: `[heads, tokens, head_dim]`.
    fn task_forward<'a>(&self, s: &Sizes, task: usize, at: impl Given<'a>, out: &mut [f32]) -> Result<()> {
        let (b, j, heads) = s.task(task);
        let (k, v) = (at(1, b, j)?, at(2, b, j)?);
        let mut weights = vec![0f32; s.tokens.min(QUERIES) * s.keys];
        if let (1, Some(keys)) = (s.tokens, k.row_major()) {
            // The heads of a group are the rows of one matrix, and the keys are used as they lie.
            let mut q = Vec::with_capacity(s.group * s.dim);
            for h in heads {
                q.extend_from_slice(at(0, b, h)?.line(0));
            }
            weights.resize(s.group * s.keys, 0.0);
            matvec::product_here(Isa::best(), &q, Weight::Dense(keys), (s.keys, s.dim), &mut weights);
            weights.chunks_mut(s.keys).for_each(|row| self.softmax((b, 0), row, None));
            let weights = Matrix::new(&weights, (s.group, s.keys), (s.keys, 1));
            product(out, false, weights, v, Threads::One);
            return Ok(());
        }
        for (h, out) in heads.zip(out.chunks_mut(s.tokens * s.dim)) {
            let q = at(0, b, h)?;
            for (queries, keys) in self.strips(s) {
                let (n, weights) = (queries.len(), &mut weights[..queries.len() * keys]);
                self.weights((b, queries.start), q.rows(queries.start, n), k.rows(0, keys), weights, &mut []);
                let weights = Matrix::new(weights, (n, keys), (keys, 1));
                let out = &mut out[queries.start * s.dim..queries.end * s.dim];
                product(out, false, weights, v.rows(0, keys), Threads::One);
            }
        }
        Ok(())
    }

    /// Queries that are worked on at a time, with the number of keys that the last of them may see.
    fn strips(&self, s: &Sizes) -> impl Iterator<Item = (Range<usize>, usize)> {
        let (tokens, keys, offset) = (s.tokens, s.keys, self.visible.offset);
        (0..tokens).step_by(QUERIES).map(move |first| {
            let end = (first + QUERIES).min(tokens);
            (first..end, (offset + end).min(keys))
        })
    }

    /// The gradients of one task, `dk` and `dv` being zero before.
    fn task_gradient<'a>(
        &self,
        s: &Sizes,
        task: usize,
        at: impl Given<'a>,
        [dq, dk, dv]: [&mut [f32]; 3],
    ) -> Result<()> {
        let (b, j, heads) = s.task(task);
        let (k, v) = (at(1, b, j)?, at(2, b, j)?);
        let room = s.tokens.min(QUERIES) * s.keys;
        let (mut weights, mut dscores) = (vec![0f32; room], vec![0f32; room]);
        let mut slopes = vec![0f32; self.scores.cap.map_or(0, |_| room)];
        for (h, dq) in heads.zip(dq.chunks_mut(s.tokens * s.dim)) {
            let (q, dy) = (at(0, b, h)?, at(3, b, h)?);
            for (queries, keys) in self.strips(s) {
                let (first, n) = (queries.start, queries.len());
                let (q, dy, k, v) = (q.rows(first, n), dy.rows(first, n), k.rows(0, keys), v.rows(0, keys));
                let (weights, dscores) = (&mut weights[..n * keys], &mut dscores[..n * keys]);
                self.weights((b, first), q, k, weights, &mut slopes);
                product(dscores, false, dy, v.t(), Threads::One);
                for (w, d) in weights.chunks(keys).zip(dscores.chunks_mut(keys)) {
                    kernels::softmax_gradient(w, self.scores.scale, d);
                }
                dscores.iter_mut().zip(&slopes).for_each(|(d, slope)| *d *= slope);
                let shape = ((n, keys), (keys, 1));
                let (weights, dscores) =
                    (Matrix::new(weights, shape.0, shape.1), Matrix::new(dscores, shape.0, shape.1));
                product(&mut dv[..keys * s.dim], true, weights.t(), dy, Threads::One);
                product(&mut dq[first * s.dim..queries.end * s.dim], false, dscores, k, Threads::One);
                product(&mut dk[..keys * s.dim], true, dscores.t(), q, Threads::One);
            }
        }
        Ok(())
    }
}

/// Attention over rows of the queries, keys and values of all heads side by side, `[batch * tokens, all heads * head_dim]`.
/// Results are by head: `[batch, heads, tokens, head_dim]`; [`Heads::gather`] puts them side by side again.
pub(super) struct Heads {
    pub sizes: Sizes,
    pub scores: Scores,
    pub visible: Visibility,
}

impl Heads {
    fn op(&self) -> Attention {
        Attention { scores: self.scores, visible: self.visible.clone(), outside: Outside::default() }
    }

    /// Values per row of queries and of keys.
    fn widths(&self) -> (usize, usize) {
        let s = &self.sizes;
        (s.kv_heads * s.group * s.dim, s.kv_heads * s.dim)
    }

    fn given<'a>(&self, (qkv, dy): (&'a [f32], &'a [f32]), which: usize, b: usize, h: usize) -> Matrix<'a> {
        let (s, (queries, keys)) = (&self.sizes, self.widths());
        let (values, width, column) = match which {
            3 => (dy, queries, 0),
            _ => (qkv, queries + 2 * keys, [0, queries, queries + keys][which]),
        };
        let first = b * s.tokens * width + column + h * s.dim;
        Matrix::new(&values[first..], (s.tokens, s.dim), (width, 1))
    }

    /// The result for queries, keys and values.
    pub fn forward(&self, bench: &Workbench, qkv: &[f32]) -> Result<Vec<f32>> {
        let (s, op) = (&self.sizes, self.op());
        let mut by_head = bench.floats(s.batch * s.tokens * self.widths().0);
        by_head.par_chunks_mut(s.group * s.tokens * s.dim).enumerate().try_for_each(|(task, out)| {
            op.task_forward(s, task, |w, b, h| Ok(self.given((qkv, &[]), w, b, h)), out)
        })?;
        Ok(by_head)
    }

    /// The gradients in queries, keys and values, from those three and the gradient in the result.
    pub fn backward(&self, bench: &Workbench, qkv: &[f32], dy: &[f32]) -> Result<[Vec<f32>; 3]> {
        let (s, op, (queries, keys)) = (&self.sizes, self.op(), self.widths());
        let [mut dq, mut dk, mut dv] = [queries, keys, keys].map(|n| bench.floats(s.batch * s.tokens * n));
        [&mut dk, &mut dv].into_iter().for_each(|d| d.fill(0.0));
        dq.par_chunks_mut(s.group * s.tokens * s.dim)
            .zip(dk.par_chunks_mut(s.keys * s.dim))
            .zip(dv.par_chunks_mut(s.keys * s.dim))
            .enumerate()
            .try_for_each(|(task, ((dq, dk), dv))| {
                op.task_gradient(s, task, |w, b, h| Ok(self.given((qkv, dy), w, b, h)), [dq, dk, dv])
            })?;
        Ok([dq, dk, dv])
    }

    /// One row of all heads from values by head.
    pub fn gather(&self, by_head: &[f32], row: usize, to: &mut [f32]) {
        let s = &self.sizes;
        let (b, t, heads) = (row / s.tokens, row % s.tokens, to.len() / s.dim);
        for (h, to) in to.chunks_mut(s.dim).enumerate() {
            let first = ((b * heads + h) * s.tokens + t) * s.dim;
            to.copy_from_slice(&by_head[first..first + s.dim]);
        }
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
