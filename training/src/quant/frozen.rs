//! A frozen linear layer: the weight never changes, the gradient passes through it to its input.

use super::{Nf4, Placed, matvec};
use crate::cuda::Outside;
use crate::lora::{Dropout, Lora};
use crate::model::pass::{Workbench, narrow_all};
use crate::model::product::{Elements, Matrix, Threads, product, sum_of_products};
use crate::recipe::Compute;
use anyhow::Result;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Device, Layout, Shape, Tensor};
use half::bf16;
use std::sync::{Arc, OnceLock};

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
    /// The weight in bf16, once [`Frozen::keep_halves`] was asked for it.
    halves: Arc<OnceLock<Vec<bf16>>>,
    /// Where `x W^T` is computed in bf16, on the CPU.
    bench: Arc<OnceLock<Arc<Workbench>>>,
}

/// All are row-major, `[out, in]`: a tied head then shares the embedding's memory, and [`matvec`] reads rows as they lie.
pub(super) enum Weight {
    Full(Tensor),
    /// `decoded` is kept from its first use by many rows where memory allows: small models decode once instead of for
    /// every use.
    Quantized {
        nf4: Nf4,
        decoded: Option<OnceLock<Tensor>>,
    },
    /// NF4 on a GPU, decoded for every use.
    Placed(Placed),
}

impl Frozen {
    /// Takes an f32 weight `[out, in]`; with [`Storage::Nf4`] only its quantised form is used from here on.
    pub fn new(weight: Tensor, bias: Option<Tensor>, storage: Storage, keep_decoded: bool) -> Result<Self> {
        if !weight.device().is_cpu() {
            let device = weight.device().clone();
            return Self::on(&device, Compute::F32, weight, bias, storage);
        }
        let weight = match storage {
            Storage::None => Weight::Full(weight.contiguous()?),
            Storage::Nf4 => {
                let (rows, cols) = weight.dims2()?;
                let nf4 = Nf4::quantize(&weight.flatten_all()?.to_vec1::<f32>()?, rows, cols)?;
                Weight::Quantized { nf4, decoded: keep_decoded.then(OnceLock::new) }
            }
        };
        Ok(Frozen { weight: Arc::new(weight), bias, halves: Arc::default(), bench: Arc::default() })
    }

    /// The same on a GPU, for products in f32 or bf16. The weight may be anywhere, and is best on the host.
    pub fn on(
        device: &Device,
        compute: Compute,
        weight: Tensor,
        bias: Option<Tensor>,
        storage: Storage,
    ) -> Result<Self> {
        let weight = match storage {
            Storage::None => Weight::Full(weight.to_dtype(dtype(compute))?.to_device(device)?),
            Storage::Nf4 => {
                let (rows, cols) = weight.dims2()?;
                let nf4 = Nf4::quantize(&weight.flatten_all()?.to_vec1::<f32>()?, rows, cols)?;
                Weight::Placed(Placed::new(&nf4, dtype(compute), device)?)
            }
        };
        let bias = bias.map(|b| b.to_device(device)).transpose()?;
        Ok(Frozen { weight: Arc::new(weight), bias, halves: Arc::default(), bench: Arc::default() })
    }

    /// Output and input features.
    pub fn dims(&self) -> (usize, usize) {
        match &*self.weight {
            Weight::Full(w) => (w.dims()[0], w.dims()[1]),
            Weight::Quantized { nf4, .. } => (nf4.rows, nf4.cols),
            Weight::Placed(nf4) => nf4.dims(),
        }
    }

    /// The weight as `[out, in]`, decoded if need be: f32, or on a GPU what it multiplies in.
    pub fn weight(&self) -> candle_core::Result<Tensor> {
        match &*self.weight {
            Weight::Full(w) => Ok(w.clone()),
            Weight::Quantized { nf4, decoded: Some(kept) } => {
                if let Some(w) = kept.get() {
                    return Ok(w.clone());
                }
                let w = decode(nf4)?;
                // Another thread may have been first; its values are the same.
                Ok(kept.get_or_init(|| w).clone())
            }
            Weight::Quantized { nf4, decoded: None } => decode(nf4),
            Weight::Placed(nf4) => nf4.weight(),
        }
    }

    /// Keeps a copy in bf16 of a weight that is stored in f32: rounding it for every product takes as long as reading it.
    pub fn keep_halves(&self) -> candle_core::Result<()> {
        let Weight::Full(weight) = &*self.weight else { return Ok(()) };
        if self.halves.get().is_none() {
            let weight = Elements::of(weight);
            let Some(values) = weight.matrix(&[])?.row_major() else {
                candle_core::bail!("a frozen weight is row-major")
            };
            let mut halves = vec![bf16::ZERO; values.len()];
            narrow_all(values, &mut halves);
            self.halves.get_or_init(|| halves);
        }
        Ok(())
    }

    /// From here on `x W^T` on the CPU is computed in bf16, from a copy of what is stored in f32.
    pub(crate) fn multiply_in(&self, bench: &Arc<Workbench>) -> candle_core::Result<()> {
        self.keep_halves()?;
        self.bench.get_or_init(|| bench.clone());
        Ok(())
    }

    /// Bytes that it would take beyond what is held.
    pub fn halves_to_make(&self) -> usize {
        match &*self.weight {
            Weight::Full(w) if self.halves.get().is_none() => 2 * w.elem_count(),
            _ => 0,
        }
    }

    /// The copy, where it is kept.
    pub(super) fn halves(&self) -> Option<&[bf16]> {
        self.halves.get().map(Vec::as_slice)
    }

    /// The weight as it is stored.
    pub(super) fn stored(&self) -> &Weight {
        &self.weight
    }

    /// The bias.
    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Bytes of the weight as it is held, copies included once there are any.
    pub fn bytes(&self) -> usize {
        let halves = self.halves.get().map_or(0, |halves| 2 * halves.len());
        halves
            + match &*self.weight {
                Weight::Full(w) => w.dtype().size_in_bytes() * w.elem_count(),
                Weight::Quantized { nf4, decoded } => {
                    nf4.bytes() + decoded.as_ref().and_then(OnceLock::get).map_or(0, |w| 4 * w.elem_count())
                }
                Weight::Placed(nf4) => nf4.bytes(),
            }
    }

    /// Values that are decoded to f32 once, at the first use yet to come, and those that are for every use.
    pub fn to_decode(&self) -> (usize, usize) {
        match &*self.weight {
            Weight::Quantized { nf4, decoded: Some(kept), .. } if kept.get().is_none() => {
                (nf4.rows * nf4.cols, 0)
            }
            Weight::Quantized { nf4, decoded: None, .. } => (0, nf4.rows * nf4.cols),
            _ => (0, 0),
        }
    }

    /// `x W^T + b`, and with an adapter `+ s (x A^T) B^T`; `x`: f32 `[rows, in]`, result `[rows, out]`.
    /// Differentiable in `x`, A and B, never in the weight.
    pub fn forward(&self, x: &Tensor, lora: Option<&Lora>) -> candle_core::Result<Tensor> {
        let layer = self.clone();
        let y = match (lora, x.device().is_cpu()) {
            (None, true) => x.apply_op1(Linear { layer, outside: Outside::default() })?,
            (None, false) => {
                let y = sum_of_products(&[(&x.detach(), &self.weight()?.t()?)])?;
                match x.track_op() {
                    true => x.apply_op1(Linear { layer, outside: Outside::new(y) })?,
                    false => y,
                }
            }
            (Some(l), true) => x.apply_op3(&l.a, &l.b, LoraLinear::new(layer, l, Outside::default()))?,
            (Some(l), false) => {
                let (x_, a, b) = (x.detach(), l.a.detach(), l.b.detach());
                let seen = l.dropout.map_or_else(|| Ok(x_.clone()), |d| d.of(&x_))?;
                let low = (seen.matmul(&a.t()?)? * l.scaling)?;
                let y = sum_of_products(&[(&x_, &self.weight()?.t()?), (&low, &b.t()?)])?;
                match [x, &l.a, &l.b].into_iter().any(Tensor::track_op) {
                    true => x.apply_op3(&l.a, &l.b, LoraLinear::new(layer, l, Outside::new(y)))?,
                    false => y,
                }
            }
        };
        match &self.bias {
            Some(b) => y.broadcast_add(b),
            None => Ok(y),
        }
    }

    /// `x W^T` on the CPU.
    fn product(&self, x: Matrix<'_>) -> candle_core::Result<Vec<f32>> {
        if let Some((bench, x)) = self.bench.get().zip(x.row_major()) {
            return self.product_in_bf16(bench, x).map_err(candle_core::Error::wrap);
        }
        if let Some(few) = x.row_major().filter(|_| x.dims().0 <= matvec::FEW) {
            return self.few(few);
        }
        let weight = self.weight()?;
        let weight = Elements::of(&weight);
        let weight = weight.matrix(&[])?.t();
        let mut y = vec![0f32; x.dims().0 * weight.dims().1];
        product(&mut y, false, x, weight, Threads::All);
        Ok(y)
    }
}

impl Frozen {
    /// As `product`, for few rows: the weight is used as it is held.
    fn few(&self, x: &[f32]) -> candle_core::Result<Vec<f32>> {
        let (isa, dims) = (matvec::Isa::best(), self.dims());
        match &*self.weight {
            Weight::Full(w) => {
                let w = Elements::of(w);
                let Some(w) = w.matrix(&[])?.row_major() else {
                    candle_core::bail!("a frozen weight is row-major")
                };
                Ok(matvec::product(isa, x, matvec::Weight::Dense(w), dims))
            }
            Weight::Quantized { nf4, .. } => Ok(matvec::product(isa, x, matvec::Weight::Nf4(nf4), dims)),
            Weight::Placed(_) => candle_core::bail!("the weight is on a GPU"),
        }
    }
}

fn decode(nf4: &Nf4) -> candle_core::Result<Tensor> {
    Tensor::from_vec(nf4.dequantize(), (nf4.rows, nf4.cols), &Device::Cpu)
}

/// Of weights on a GPU.
fn dtype(compute: Compute) -> DType {
    match compute {
        Compute::F32 => DType::F32,
        Compute::Bf16 => DType::BF16,
    }
}

/// The bare layer as one node of the graph. Backward decodes the weight again instead of keeping it, so that the
/// graph holds activations only.
struct Linear {
    layer: Frozen,
    /// The result, where it was computed before: on a GPU.
    outside: Outside,
}

/// The layer and its adapter as one node of the graph, in (x, A, B).
struct LoraLinear {
    layer: Frozen,
    scaling: f64,
    dropout: Option<Dropout>,
    /// As in [`Linear`].
    outside: Outside,
}

impl LoraLinear {
    fn new(layer: Frozen, lora: &Lora, outside: Outside) -> Self {
        LoraLinear { layer, scaling: lora.scaling, dropout: lora.dropout, outside }
    }
}

impl LoraLinear {
    /// As `cpu_fwd`, for few rows and no dropout.
    fn few(&self, x: &[f32], a: &[f32], b: &[f32]) -> candle_core::Result<Vec<f32>> {
        let (isa, (out, inp)) = (matvec::Isa::best(), self.layer.dims());
        let rank = a.len() / inp;
        let mut low = matvec::product(isa, x, matvec::Weight::Dense(a), (rank, inp));
        low.iter_mut().for_each(|v| *v *= self.scaling as f32);
        let mut y = self.layer.product(Matrix::new(x, (x.len() / inp, inp), (inp, 1)))?;
        let update = matvec::product(isa, &low, matvec::Weight::Dense(b), (out, rank));
        y.iter_mut().zip(update).for_each(|(y, u)| *y += u);
        Ok(y)
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "emaudit-frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = Matrix::of(x, l, &[])?;
        Ok((CpuStorage::F32(self.layer.product(x)?), (x.dims().0, self.layer.dims().0).into()))
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        self.outside.output()
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(sum_of_products(&[(&dy.contiguous()?, &self.layer.weight()?)])?))
    }
}

impl CustomOp3 for LoraLinear {
    fn name(&self) -> &'static str {
        "emaudit-lora-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, a, b) = (Matrix::of(x, lx, &[])?, Matrix::of(a, la, &[])?, Matrix::of(b, lb, &[])?);
        let (rows, rank) = (x.dims().0, a.dims().0);
        if let (Some(x), Some(a), Some(b)) = (x.row_major(), a.row_major(), b.row_major())
            && rows <= matvec::FEW
            && self.dropout.is_none()
        {
            return Ok((CpuStorage::F32(self.few(x, a, b)?), (rows, self.layer.dims().0).into()));
        }
        let mut low = vec![0f32; rows * rank];
        match self.dropout {
            None => product(&mut low, false, x, a.t(), Threads::All),
            Some(dropout) => {
                let width = x.dims().1;
                let mut seen = dropout.factors(rows, width);
                x.scale_into(&mut seen);
                product(&mut low, false, Matrix::new(&seen, (rows, width), (width, 1)), a.t(), Threads::All);
            }
        }
        low.iter_mut().for_each(|v| *v *= self.scaling as f32);
        let mut y = self.layer.product(x)?;
        product(&mut y, true, Matrix::new(&low, (rows, rank), (rank, 1)), b.t(), Threads::All);
        Ok((CpuStorage::F32(y), (rows, b.dims().0).into()))
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.outside.output()
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (x, a, b, dy) = (x.detach(), a.detach(), b.detach(), dy.contiguous()?);
        let seen = self.dropout.map_or_else(|| Ok(x.clone()), |d| d.of(&x))?;
        // s (x A^T), formed again, and its gradient s (dy B): both have the rank's few columns.
        let low = (sum_of_products(&[(&seen, &a.t()?)])? * self.scaling)?;
        let dlow = (sum_of_products(&[(&dy, &b)])? * self.scaling)?;
        let weight = self.layer.weight()?;
        let dx = match self.dropout {
            None => sum_of_products(&[(&dy, &weight), (&dlow, &a)])?,
            Some(d) => (sum_of_products(&[(&dy, &weight)])? + d.of(&sum_of_products(&[(&dlow, &a)])?)?)?,
        };
        let da = sum_of_products(&[(&dlow.t()?, &seen)])?;
        let db = sum_of_products(&[(&dy.t()?, &low)])?;
        Ok((Some(dx), Some(da), Some(db)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    fn tensor(seed: u64, shape: (usize, usize)) -> Tensor {
        let values = (0..shape.0 * shape.1).map(|i| (uniform(&[seed, i as u64]) * 2.0 - 1.0) as f32);
        Tensor::from_vec(values.collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
    }

    /// Few rows go another way than many. Both are off by at most one rounding a term and a few for the scaling and the
    /// sum of both parts, in units of the sum of the terms' sizes.
    #[test]
    fn few_rows_give_what_many_rows_give() {
        let (out, inp, rank, rows) = (40, 96, 8, matvec::FEW + 40);
        let x = tensor(1, (rows, inp));
        let lora = |a, b| Lora { a, b, scaling: 0.7, dropout: None };
        let (a, b) = (tensor(3, (rank, inp)), tensor(4, (out, rank)));
        let sized = lora(a.abs().unwrap(), b.abs().unwrap());
        let lora = lora(a, b);
        let mut compared = 0;
        for (storage, keep) in [(Storage::None, false), (Storage::Nf4, true), (Storage::Nf4, false)] {
            let layer = Frozen::new(tensor(2, (out, inp)), None, storage, keep).unwrap();
            let size =
                Frozen::new(layer.weight().unwrap().abs().unwrap(), None, Storage::None, false).unwrap();
            for (lora, sized) in [(None, None), (Some(&lora), Some(&sized))] {
                let many = layer.forward(&x, lora).unwrap();
                let parts = [(0, matvec::FEW), (matvec::FEW, 40)];
                let few =
                    parts.map(|(first, n)| layer.forward(&x.narrow(0, first, n).unwrap(), lora).unwrap());
                let few = Tensor::cat(&few, 0).unwrap();
                let sizes = size.forward(&x.abs().unwrap(), sized).unwrap();
                let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let unit = (inp + rank + 4) as f32 * 2f32.powi(-24);
                for ((many, few), size) in flat(&many).iter().zip(flat(&few)).zip(flat(&sizes)) {
                    assert!((many - few).abs() <= 2.0 * unit * size, "{storage:?}: {many} and {few}");
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 6 * rows * out);
    }
}
