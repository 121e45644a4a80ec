//! Fused differentiable operations of the decoder.
//!
//! candle's own `rms_norm`, `rope` and `softmax_last_dim` have no backward, and composing them from
//! primitives also computes gradients of frozen weights. These are fused `CustomOp`s with hand-written backward, on
//! the CPU here and on NVIDIA GPUs with the kernels of [`crate::cuda`]. All tensors are f32.

mod cross_entropy;

pub use super::kernels::log_sum_exp;
pub use cross_entropy::cross_entropy;

use super::kernels;
use crate::cuda::{self, launch};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor, WithDType,
};
use rayon::prelude::*;
use std::sync::Arc;

/// Elements per parallel task: below this a thread hand-over costs more than the arithmetic.
const GRAIN: usize = 16 * 1024;

/// The contiguous elements of a CPU storage; every op here is given contiguous tensors.
fn contiguous<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("fused ops need contiguous tensors, got {layout:?}")
    };
    Ok(&storage.as_slice::<T>()?[start..end])
}

fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    contiguous(storage, layout)
}

fn rows_per_task(width: usize) -> usize {
    (GRAIN / width.max(1)).max(1)
}

/// Runs `f(first_row, out_rows)` over blocks of whole rows, in parallel.
fn by_rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = rows_per_task(width);
    out.par_chunks_mut(rows * width).enumerate().for_each(|(i, block)| f(i * rows, block));
}

/// Rows and width of a tensor whose last dimension is a row.
fn rows_and_width(layout: &Layout) -> (usize, usize) {
    let width = layout.dims().last().copied().unwrap_or(1);
    (layout.shape().elem_count().checked_div(width).unwrap_or(0), width)
}

// ---- RMSNorm: y = x * w / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019) ----

/// In (x, weight), the weight frozen.
struct RmsNorm {
    eps: f32,
}

/// In (x, weight, dy).
struct RmsNormGrad {
    eps: f32,
}

/// RMSNorm over the last dimension with a frozen weight.
#[derive(Clone)]
pub struct Norm {
    weight: Tensor,
    /// The same, for passes without a graph.
    values: Arc<[f32]>,
    eps: f32,
}

impl Norm {
    /// `weight`: f32 `[hidden]`.
    pub fn new(weight: Tensor, eps: f64) -> Result<Self> {
        let values: Arc<[f32]> = weight.to_vec1::<f32>()?.into();
        Ok(Norm { weight: weight.contiguous()?, values, eps: eps as f32 })
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
        if x.dim(D::Minus1)? != self.weight.elem_count() {
            candle_core::bail!("a norm of width {} on {:?}", self.weight.elem_count(), x.shape());
        }
        x.contiguous()?.apply_op2(&self.weight, RmsNorm { eps: self.eps })
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "emaudit-rms-norm"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        l: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (elements(s, l)?, elements(weight, lw)?);
        let width = weight.len();
        let mut out = vec![0f32; x.len()];
        by_rows(&mut out, width, |first, block| {
            for (r, y) in block.chunks_mut(width).enumerate() {
                kernels::norm(&x[(first + r) * width..][..width], weight, self.eps, y);
            }
        });
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        weight: &CudaStorage,
        lw: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (rows, width) = rows_and_width(lx);
        cuda::run::<f32, 2>([(x, lx), (weight, lw)], lx.shape(), |inputs, y| {
            launch::rms_norm(inputs, y, rows, width, self.eps)
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, w) = (x.contiguous()?.detach(), w.detach());
        Ok((Some(x.apply_op3_no_bwd(&w, &dy.contiguous()?, &RmsNormGrad { eps: self.eps })?), None))
    }
}

impl CustomOp3 for RmsNormGrad {
    fn name(&self) -> &'static str {
        "emaudit-rms-norm-grad"
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
        let (x, weight, dy) = (elements(s1, l1)?, elements(s2, l2)?, elements(s3, l3)?);
        let width = weight.len();
        let mut out = vec![0f32; x.len()];
        by_rows(&mut out, width, |first, block| {
            for (r, dx) in block.chunks_mut(width).enumerate() {
                let at = (first + r) * width;
                dx.copy_from_slice(&dy[at..][..width]);
                kernels::norm_gradient(&x[at..][..width], weight, self.eps, None, dx);
            }
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        weight: &CudaStorage,
        lw: &Layout,
        dy: &CudaStorage,
        ld: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (rows, width) = rows_and_width(lx);
        cuda::run::<f32, 3>([(x, lx), (weight, lw), (dy, ld)], lx.shape(), |inputs, dx| {
            launch::rms_norm_grad(inputs, dx, rows, width, self.eps)
        })
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
    /// The same on the CPU, for passes without a graph.
    values: [Arc<[f32]>; 2],
}

impl Rotation {
    /// Wraps two f32 tensors `[batch, tokens, head_dim / 2]`.
    pub fn new(cos: Tensor, sin: Tensor) -> Result<Self> {
        if cos.dims3()? != sin.dims3()? {
            candle_core::bail!("cosines {:?} and sines {:?}", cos.shape(), sin.shape());
        }
        let on_cpu = |t: &Tensor| -> Result<Arc<[f32]>> {
            let on_cpu = t.device().is_cpu();
            Ok(if on_cpu { t.flatten_all()?.to_vec1::<f32>()?.into() } else { Arc::from([]) })
        };
        let values = [on_cpu(&cos)?, on_cpu(&sin)?];
        Ok(Rotation { cos: cos.contiguous()?, sin: sin.contiguous()?, values })
    }

    /// Cosines and sines of one row of `[batch * tokens]`.
    pub(crate) fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let half = self.cos.dims()[2];
        (&self.values[0][row * half..][..half], &self.values[1][row * half..][..half])
    }

    /// Rotates `x`: `[batch, tokens, heads, head_dim]`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _, dim) = x.dims4()?;
        if self.cos.dims3()? != (batch, tokens, dim / 2) || dim % 2 != 0 {
            candle_core::bail!("a rotation of {:?} on {:?}", self.cos.shape(), x.shape());
        }
        x.contiguous()?.apply_op3(&self.cos, &self.sin, Rope { sign: 1.0 })
    }
}

/// In (x, cos, sin), the angles frozen.
struct Rope {
    sign: f32,
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "emaudit-rope"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        l: &Layout,
        cos: &CpuStorage,
        lc: &Layout,
        sin: &CpuStorage,
        ls: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, cos, sin) = (elements(s, l)?, elements(cos, lc)?, elements(sin, ls)?);
        let (_, _, heads, dim) = l.shape().dims4()?;
        let (half, width) = (dim / 2, heads * dim);
        let mut out = vec![0f32; x.len()];
        by_rows(&mut out, width, |first, block| {
            for (r, y) in block.chunks_mut(width).enumerate() {
                let token = first + r;
                let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
                y.copy_from_slice(&x[token * width..][..width]);
                kernels::rotate(y, cos, sin, self.sign);
            }
        });
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        cos: &CudaStorage,
        lc: &Layout,
        sin: &CudaStorage,
        ls: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (batch, tokens, heads, dim) = lx.shape().dims4()?;
        cuda::run::<f32, 3>([(x, lx), (cos, lc), (sin, ls)], lx.shape(), |inputs, y| {
            launch::rope(inputs, y, (batch * tokens, heads, dim), self.sign)
        })
    }

    fn bwd(
        &self,
        _x: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        // A rotation's transpose is the rotation by the opposite angle.
        let turned = dy.contiguous()?.apply_op3_no_bwd(cos, sin, &Rope { sign: -self.sign })?;
        Ok((Some(turned), None, None))
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
    if gate.dims() != up.dims() {
        candle_core::bail!("a gate {:?} for {:?}", gate.shape(), up.shape());
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, Gated(activation))
}

struct Gated(Activation);
/// In (gate, up, dy): both gradients, side by side.
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

    fn cuda_fwd(
        &self,
        gate: &CudaStorage,
        lg: &Layout,
        up: &CudaStorage,
        lu: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let count = lg.shape().elem_count();
        cuda::run::<f32, 2>([(gate, lg), (up, lu)], lg.shape(), |inputs, y| {
            launch::gated(inputs, y, count, self.0)
        })
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (gate, up, dy) = (gate.contiguous()?.detach(), up.contiguous()?.detach(), dy.contiguous()?);
        let both = gate.apply_op3_no_bwd(&up, &dy, &GatedGrad(self.0))?;
        Ok((Some(both.get(0)?), Some(both.get(1)?)))
    }
}

fn twice(shape: &Shape) -> Shape {
    std::iter::once(2).chain(shape.dims().iter().copied()).collect::<Vec<_>>().into()
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
        Ok((CpuStorage::F32(out), twice(l1.shape())))
    }

    fn cuda_fwd(
        &self,
        gate: &CudaStorage,
        lg: &Layout,
        up: &CudaStorage,
        lu: &Layout,
        dy: &CudaStorage,
        ld: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let count = lg.shape().elem_count();
        cuda::run::<f32, 3>([(gate, lg), (up, lu), (dy, ld)], &twice(lg.shape()), |inputs, both| {
            launch::gated_grad(inputs, both, count, self.0)
        })
    }
}

// ---- Soft cap: y = cap * tanh(x / cap) (Gemma 2) ----

/// `cap * tanh(x / cap)`, element by element.
pub fn soft_cap(x: &Tensor, cap: f32) -> Result<Tensor> {
    x.contiguous()?.apply_op1(SoftCap(cap))
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

    fn cuda_fwd(&self, x: &CudaStorage, lx: &Layout) -> Result<(CudaStorage, Shape)> {
        let count = lx.shape().elem_count();
        cuda::run::<f32, 1>([(x, lx)], lx.shape(), |inputs, y| launch::soft_cap(inputs, y, count, self.0))
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

    fn cuda_fwd(
        &self,
        y: &CudaStorage,
        ly: &Layout,
        dy: &CudaStorage,
        ld: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let count = ly.shape().elem_count();
        cuda::run::<f32, 2>([(y, ly), (dy, ld)], ly.shape(), |inputs, dx| {
            launch::soft_cap_grad(inputs, dx, count, self.0)
        })
    }
}
