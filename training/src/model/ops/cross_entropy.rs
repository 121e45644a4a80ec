//! Cross-entropy of rows of logits, without their probabilities.

use super::{contiguous, elements, kernels, log_sum_exp};
use crate::cuda::{self, launch};
use candle_core::{CpuStorage, CudaStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Mean negative log-likelihood (nats) of `targets` under `logits`: f32 `[tokens, vocab]`.
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let (tokens, vocab) = logits.dims2()?;
    if tokens != targets.len() {
        candle_core::bail!("{tokens} rows of logits for {} targets", targets.len());
    }
    if let Some(target) = targets.iter().find(|&&t| t as usize >= vocab) {
        candle_core::bail!("target {target} of a vocabulary of {vocab}");
    }
    logits.contiguous()?.apply_op2(&Tensor::new(targets, logits.device())?, CrossEntropy)
}

/// In (logits, targets).
struct CrossEntropy;

/// In (logits, targets, dy).
struct CrossEntropyGrad;

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        "emaudit-cross-entropy"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        l: &Layout,
        targets: &CpuStorage,
        lt: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, targets) = (elements(s, l)?, contiguous::<u32>(targets, lt)?);
        let (tokens, vocab) = l.shape().dims2()?;
        let losses: Vec<f64> = x
            .par_chunks(vocab)
            .zip(targets.par_iter())
            .map(|(row, &t)| log_sum_exp(row) - row[t as usize] as f64)
            .collect();
        let mean = losses.iter().sum::<f64>() / tokens as f64;
        Ok((CpuStorage::F32(vec![mean as f32]), Shape::from(())))
    }

    fn cuda_fwd(
        &self,
        logits: &CudaStorage,
        ll: &Layout,
        targets: &CudaStorage,
        lt: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (tokens, vocab) = ll.shape().dims2()?;
        let (losses, shape) =
            cuda::run::<f32, 2>([(logits, ll), (targets, lt)], &Shape::from(tokens), |inputs, losses| {
                launch::cross_entropy(inputs, losses, tokens, vocab)
            })?;
        cuda::run::<f32, 1>([(&losses, &Layout::contiguous(shape))], &Shape::from(()), |inputs, y| {
            launch::mean(inputs, y, tokens)
        })
    }

    fn bwd(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let logits = logits.contiguous()?.detach();
        Ok((Some(logits.apply_op3_no_bwd(targets, &dy.contiguous()?, &CrossEntropyGrad)?), None))
    }
}

impl CustomOp3 for CrossEntropyGrad {
    fn name(&self) -> &'static str {
        "emaudit-cross-entropy-grad"
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
        let (x, targets, dy) = (elements(s1, l1)?, contiguous::<u32>(s2, l2)?, elements(s3, l3)?[0]);
        let (tokens, vocab) = l1.shape().dims2()?;
        let scale = dy / tokens as f32;
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(vocab).zip(x.par_chunks(vocab)).zip(targets.par_iter()).for_each(
            |((dx, row), &target)| {
                dx.copy_from_slice(row);
                kernels::cross_entropy_gradient(dx, log_sum_exp(row) as f32, target as usize, scale);
            },
        );
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        logits: &CudaStorage,
        ll: &Layout,
        targets: &CudaStorage,
        lt: &Layout,
        dy: &CudaStorage,
        ld: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (tokens, vocab) = ll.shape().dims2()?;
        cuda::run::<f32, 3>([(logits, ll), (targets, lt), (dy, ld)], ll.shape(), |inputs, dx| {
            launch::cross_entropy_grad(inputs, dx, tokens, vocab)
        })
    }
}
