//! Fused differentiable operations of the decoder.
//!
//! candle's own `rms_norm`, `rope` and `softmax_last_dim` have no backward, and composing them from
//! primitives also computes gradients of frozen weights. On the CPU these are fused `CustomOp`s with
//! hand-written backward; on other devices the same formulas are composed from candle primitives.
//! All tensors are f32.

use super::kernels;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

pub use super::kernels::log_sum_exp;

/// Elements per parallel task: below this a thread hand-over costs more than the arithmetic.
const GRAIN: usize = 16 * 1024;

/// The contiguous f32 elements of a CPU storage; every op here is given contiguous tensors.
fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("fused ops need contiguous tensors, got {layout:?}")
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

fn rows_per_task(width: usize) -> usize {
    (GRAIN / width.max(1)).max(1)
}

/// Runs `f(first_row, out_rows)` over blocks of whole rows, in parallel.
fn by_rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = rows_per_task(width);
    out.par_chunks_mut(rows * width).enumerate().for_each(|(i, block)| f(i * rows, block));
}

fn fused(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

// ---- RMSNorm: y = x * w / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019) ----

struct RmsNorm {
    weight: Arc<[f32]>,
    eps: f32,
}

struct RmsNormGrad {
    weight: Arc<[f32]>,
    eps: f32,
}

/// RMSNorm over the last dimension with a frozen weight.
#[derive(Clone)]
pub struct Norm {
    weight: Tensor,
    values: Arc<[f32]>,
    eps: f32,
}

impl Norm {
    /// `weight`: f32 `[hidden]`.
    pub fn new(weight: Tensor, eps: f64) -> Result<Self> {
        let values: Arc<[f32]> = weight.to_vec1::<f32>()?.into();
        Ok(Norm { weight, values, eps: eps as f32 })
    }

    /// The weight.
    pub(crate) fn values(&self) -> &[f32] {
        &self.values
    }

    /// Added to the mean square.
    pub(crate) fn eps(&self) -> f32 {
        self.eps
    }

    /// Normalises `x`: `[.., hidden]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if fused(x) {
            return x.contiguous()?.apply_op1(RmsNorm { weight: self.values.clone(), eps: self.eps });
        }
        let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
        x.broadcast_div(&(variance + self.eps as f64)?.sqrt()?)?.broadcast_mul(&self.weight)
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "emaudit-rms-norm"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, width) = (elements(s, l)?, self.weight.len());
        let mut out = vec![0f32; x.len()];
        by_rows(&mut out, width, |first, block| {
            for (r, y) in block.chunks_mut(width).enumerate() {
                kernels::norm(&x[(first + r) * width..][..width], &self.weight, self.eps, y);
            }
        });
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let op = RmsNormGrad { weight: self.weight.clone(), eps: self.eps };
        Ok(Some(x.contiguous()?.detach().apply_op2_no_bwd(&dy.contiguous()?, &op)?))
    }
}

impl CustomOp2 for RmsNormGrad {
    fn name(&self) -> &'static str {
        "emaudit-rms-norm-grad"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, dy, width) = (elements(s1, l1)?, elements(s2, l2)?, self.weight.len());
        let mut out = vec![0f32; x.len()];
        by_rows(&mut out, width, |first, block| {
            for (r, dx) in block.chunks_mut(width).enumerate() {
                let at = (first + r) * width;
                dx.copy_from_slice(&dy[at..][..width]);
                kernels::norm_gradient(&x[at..][..width], &self.weight, self.eps, None, dx);
            }
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

// ---- Rotary embedding, rotate-half convention of transformers (Su et al. 2021) ----

/// cos and sin of one batch of positions: `[batch, tokens, head_dim / 2]`.
#[derive(Clone)]
pub struct Rotation {
    /// Cosines.
    pub cos: Tensor,
    /// Sines.
    pub sin: Tensor,
    cos_values: Arc<[f32]>,
    sin_values: Arc<[f32]>,
}

impl Rotation {
    /// Wraps two f32 tensors `[batch, tokens, head_dim / 2]`.
    pub fn new(cos: Tensor, sin: Tensor) -> Result<Self> {
        let (cos_values, sin_values) = if cos.device().is_cpu() {
            (cos.flatten_all()?.to_vec1::<f32>()?, sin.flatten_all()?.to_vec1::<f32>()?)
        } else {
            (Vec::new(), Vec::new())
        };
        Ok(Rotation { cos, sin, cos_values: cos_values.into(), sin_values: sin_values.into() })
    }

    /// Cosines and sines of one row of `[batch * tokens]`.
    pub(crate) fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let half = self.cos.dims()[2];
        (&self.cos_values[row * half..][..half], &self.sin_values[row * half..][..half])
    }

    /// Rotates `x`: `[batch, tokens, heads, head_dim]`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if fused(x) {
            let op = Rope { cos: self.cos_values.clone(), sin: self.sin_values.clone(), sign: 1.0 };
            return x.contiguous()?.apply_op1(op);
        }
        let half = x.dim(D::Minus1)? / 2;
        let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let (cos, sin) = (self.cos.unsqueeze(2)?, self.sin.unsqueeze(2)?);
        let left = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let right = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[left, right], D::Minus1)
    }
}

struct Rope {
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
    sign: f32,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "emaudit-rope"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = elements(s, l)?;
        let (_, _, heads, dim) = l.shape().dims4()?;
        let (half, width) = (dim / 2, heads * dim);
        let mut out = vec![0f32; x.len()];
        by_rows(&mut out, width, |first, block| {
            for (r, y) in block.chunks_mut(width).enumerate() {
                let token = first + r;
                let (cos, sin) = (&self.cos[token * half..][..half], &self.sin[token * half..][..half]);
                y.copy_from_slice(&x[token * width..][..width]);
                kernels::rotate(y, cos, sin, self.sign);
            }
        });
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        // A rotation's transpose is the rotation by the opposite angle.
        let op = Rope { cos: self.cos.clone(), sin: self.sin.clone(), sign: -self.sign };
        Ok(Some(dy.contiguous()?.apply_op1_no_bwd(&op)?))
    }
}

// ---- Gated linear units: activation(gate) * up (Shazeer 2020) ----

/// Function of the feed-forward gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x) (SwiGLU).
    Silu,
    /// GELU in its tanh form: x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (GeGLU).
    GeluTanh,
}

/// `activation(gate) * up`, element by element; both `[.., ffn]`.
pub fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if fused(gate) {
        return gate.contiguous()?.apply_op2(&up.contiguous()?, Gated(activation));
    }
    match activation {
        Activation::Silu => gate.silu()? * up,
        Activation::GeluTanh => gate.gelu()? * up,
    }
}

struct Gated(Activation);
struct GatedGrad(Activation);

fn elementwise(out: &mut [f32], f: impl Fn(usize) -> f32 + Sync) {
    out.par_chunks_mut(GRAIN).enumerate().for_each(|(i, block)| {
        for (j, y) in block.iter_mut().enumerate() {
            *y = f(i * GRAIN + j);
        }
    });
}

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "emaudit-gated"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (elements(s1, l1)?, elements(s2, l2)?);
        let mut out = vec![0f32; gate.len()];
        by_rows(&mut out, 1, |first, y| {
            let here = first..first + y.len();
            kernels::gated(self.0, &gate[here.clone()], &up[here], y);
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (gate, up, dy) = (gate.contiguous()?.detach(), up.contiguous()?.detach(), dy.contiguous()?);
        // Both at once, side by side.
        let both = gate.apply_op3_no_bwd(&up, &dy, &GatedGrad(self.0))?;
        Ok((Some(both.get(0)?), Some(both.get(1)?)))
    }
}

impl CustomOp3 for GatedGrad {
    fn name(&self) -> &'static str {
        "emaudit-gated-grad"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up, dy) = (elements(s1, l1)?, elements(s2, l2)?, elements(s3, l3)?);
        let mut out = vec![0f32; 2 * gate.len()];
        let (dgate, dup) = out.split_at_mut(gate.len());
        let blocks = dgate.par_chunks_mut(GRAIN).zip(dup.par_chunks_mut(GRAIN));
        blocks.enumerate().for_each(|(i, (dgate, dup))| {
            let here = i * GRAIN..i * GRAIN + dup.len();
            dup.copy_from_slice(&dy[here.clone()]);
            kernels::gated_gradient(self.0, &gate[here.clone()], &up[here], dup, dgate);
        });
        let dims = std::iter::once(2).chain(l1.dims().iter().copied()).collect::<Vec<_>>();
        Ok((CpuStorage::F32(out), dims.into()))
    }
}

// ---- Soft cap: y = cap * tanh(x / cap) (Gemma 2) ----

/// `cap * tanh(x / cap)`, element by element.
pub fn soft_cap(x: &Tensor, cap: f32) -> Result<Tensor> {
    if fused(x) {
        return x.contiguous()?.apply_op1(SoftCap(cap));
    }
    (x / cap as f64)?.tanh()? * cap as f64
}

struct SoftCap(f32);
struct SoftCapGrad(f32);

impl CustomOp1 for SoftCap {
    fn name(&self) -> &'static str {
        "emaudit-soft-cap"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, cap) = (elements(s, l)?, self.0);
        let mut out = vec![0f32; x.len()];
        elementwise(&mut out, |i| cap * (x[i] / cap).tanh());
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(y.detach().apply_op2_no_bwd(&dy.contiguous()?, &SoftCapGrad(self.0))?))
    }
}

impl CustomOp2 for SoftCapGrad {
    fn name(&self) -> &'static str {
        "emaudit-soft-cap-grad"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, dy, cap) = (elements(s1, l1)?, elements(s2, l2)?, self.0);
        let mut out = vec![0f32; y.len()];
        elementwise(&mut out, |i| dy[i] * (1.0 - (y[i] / cap) * (y[i] / cap)));
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

// ---- Cross-entropy ----

/// Mean negative log-likelihood (nats) of `targets` under `logits`: f32 `[tokens, vocab]`.
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    if fused(logits) {
        return logits.contiguous()?.apply_op1(CrossEntropy { targets: targets.into() });
    }
    let index = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    (log_sum - shifted.gather(&index, D::Minus1)?)?.mean_all()
}

struct CrossEntropy {
    targets: Arc<[u32]>,
}

struct CrossEntropyGrad {
    targets: Arc<[u32]>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "emaudit-cross-entropy"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = elements(s, l)?;
        let (tokens, vocab) = l.shape().dims2()?;
        if tokens != self.targets.len() {
            candle_core::bail!("{tokens} rows of logits for {} targets", self.targets.len());
        }
        let losses: Vec<f64> = x
            .par_chunks(vocab)
            .zip(self.targets.par_iter())
            .map(|(row, &t)| log_sum_exp(row) - row[t as usize] as f64)
            .collect();
        let mean = losses.iter().sum::<f64>() / tokens as f64;
        Ok((CpuStorage::F32(vec![mean as f32]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let op = CrossEntropyGrad { targets: self.targets.clone() };
        Ok(Some(logits.contiguous()?.detach().apply_op2_no_bwd(&dy.contiguous()?, &op)?))
    }
}

impl CustomOp2 for CrossEntropyGrad {
    fn name(&self) -> &'static str {
        "emaudit-cross-entropy-grad"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, dy) = (elements(s1, l1)?, elements(s2, l2)?[0]);
        let (tokens, vocab) = l1.shape().dims2()?;
        let scale = dy / tokens as f32;
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(vocab).zip(x.par_chunks(vocab)).zip(self.targets.par_iter()).for_each(
            |((dx, row), &target)| {
                dx.copy_from_slice(row);
                kernels::cross_entropy_gradient(dx, log_sum_exp(row) as f32, target as usize, scale);
            },
        );
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}
