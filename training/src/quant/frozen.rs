//! A frozen linear layer: the weight never changes, the gradient passes through it to its input.

use super::Nf4;
use anyhow::Result;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, Device, Layout, Shape, Tensor, backend::BackendStorage,
};
use std::sync::Arc;

/// How a frozen weight is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// f32 as loaded.
    None,
    /// NF4 with double quantisation.
    Nf4,
}

/// A frozen weight `[out, in]` with an optional bias.
#[derive(Clone)]
pub struct Frozen {
    weight: Arc<Weight>,
    bias: Option<Tensor>,
}

enum Weight {
    Full(Tensor),
    /// `decoded` is kept where memory allows: small models decode once instead of for every use.
    Quantized {
        nf4: Nf4,
        decoded: Option<Tensor>,
        device: Device,
    },
}

impl Frozen {
    /// Takes an f32 weight `[out, in]`; with [`Storage::Nf4`] only its quantised form is used from here on.
    pub fn new(weight: Tensor, bias: Option<Tensor>, storage: Storage, keep_decoded: bool) -> Result<Self> {
        let weight = match storage {
            Storage::None => Weight::Full(weight),
            Storage::Nf4 => {
                let (rows, cols) = weight.dims2()?;
                let nf4 = Nf4::quantize(&weight.flatten_all()?.to_vec1::<f32>()?, rows, cols)?;
                let device = weight.device().clone();
                let decoded = keep_decoded.then(|| decode(&nf4, &device)).transpose()?;
                Weight::Quantized { nf4, decoded, device }
            }
        };
        Ok(Frozen { weight: Arc::new(weight), bias })
    }

    /// Output and input features.
    pub fn dims(&self) -> (usize, usize) {
        match &*self.weight {
            Weight::Full(w) => (w.dims()[0], w.dims()[1]),
            Weight::Quantized { nf4, .. } => (nf4.rows, nf4.cols),
        }
    }

    /// The weight as f32 `[out, in]`, decoded if need be.
    pub fn weight(&self) -> candle_core::Result<Tensor> {
        match &*self.weight {
            Weight::Full(w) => Ok(w.clone()),
            Weight::Quantized { decoded: Some(w), .. } => Ok(w.clone()),
            Weight::Quantized { nf4, device, .. } => decode(nf4, device),
        }
    }

    /// `x W^T + b`; `x`: `[rows, in]`, result `[rows, out]`. Differentiable in `x` only.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = x.detach().matmul(&self.weight()?.t()?)?;
        let y = if x.track_op() { x.apply_op2(&y, PassThrough { layer: self.clone() })? } else { y };
        match &self.bias {
            Some(b) => y.broadcast_add(b),
            None => Ok(y),
        }
    }
}

fn decode(nf4: &Nf4, device: &Device) -> candle_core::Result<Tensor> {
    Tensor::from_vec(nf4.dequantize(), (nf4.rows, nf4.cols), device)
}

/// Forward is the product computed outside the graph; backward decodes the weight again instead of
/// keeping it, so the graph holds activations only.
struct PassThrough {
    layer: Frozen,
}

impl CustomOp2 for PassThrough {
    fn name(&self) -> &'static str {
        "emaudit-frozen-linear"
    }

    fn cpu_fwd(
        &self,
        _x: &CpuStorage,
        _: &Layout,
        y: &CpuStorage,
        l: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((y.try_clone(l)?, l.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        _x: &CudaStorage,
        _: &Layout,
        y: &CudaStorage,
        l: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((y.try_clone(l)?, l.shape().clone()))
    }

    fn bwd(
        &self,
        _x: &Tensor,
        _y: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.contiguous()?.matmul(&self.layer.weight()?)?), None))
    }
}
