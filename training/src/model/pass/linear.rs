//! A frozen linear layer with its adapter, forward and backward.

use super::bench::{Rows, Workbench, by_rows, plain, transpose, turned};
use crate::lora::{Dropout, Lora};
use crate::model::vector;
use crate::quant::Frozen;
use anyhow::Result;
use candle_core::Tensor;

/// The gradients of A and B, row-major.
pub type LoraGradient = (Vec<f32>, Vec<f32>);

fn values(bench: &Workbench, tensor: &Tensor) -> Result<Rows> {
    let (_, width) = tensor.dims2()?;
    let mut buffer = bench.floats(tensor.elem_count());
    let (storage, layout) = tensor.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else { anyhow::bail!("a CPU tensor is needed") };
    let Some((start, end)) = layout.contiguous_offsets() else {
        anyhow::bail!("a contiguous tensor is needed")
    };
    buffer.copy_from_slice(&storage.as_slice::<f32>()?[start..end]);
    Ok(bench.rows(buffer, width))
}

/// `x` as the adapter reads it, where that is not `x` itself.
fn seen(bench: &Workbench, x: &Rows, dropout: Option<Dropout>) -> Option<Rows> {
    let factors = dropout?.factors(x.count(), x.width());
    let width = x.width();
    Some(bench.fill(x.count(), width, |row, to| {
        let mut scratch = Vec::new();
        let x = x.read(row, 1, &mut scratch);
        to.iter_mut().zip(x).zip(&factors[row * width..]).for_each(|((to, x), f)| *to = x * f);
    }))
}

fn scale(values: &mut [f32], factor: f64) {
    values.iter_mut().for_each(|v| *v *= factor as f32);
}

/// `x W^T + b`, and with an adapter `+ s (x A^T) B^T`; also s (x A^T), which backward reads.
pub fn forward(
    bench: &Workbench,
    layer: &Frozen,
    lora: Option<&Lora>,
    x: &Rows,
) -> Result<(Vec<f32>, Option<Rows>)> {
    let (out, _) = layer.dims();
    let mut y = bench.floats(x.count() * out);
    layer.multiply(bench, x, &mut y)?;
    let mut kept = None;
    if let Some(lora) = lora {
        let (a, b) = (values(bench, &lora.a)?, values(bench, &lora.b)?);
        let dropped = seen(bench, x, lora.dropout);
        let mut low = bench.floats(x.count() * a.count());
        bench.multiply(&mut low, false, plain(dropped.as_ref().unwrap_or(x)), turned(&a))?;
        scale(&mut low, lora.scaling);
        let low = bench.rows(low, a.count());
        bench.multiply(&mut y, true, plain(&low), turned(&b))?;
        kept = Some(low);
        [Some(a), Some(b), dropped].into_iter().flatten().for_each(|rows| bench.release(rows));
    }
    if let Some(bias) = layer.bias() {
        let bias = bias.to_vec1::<f32>()?;
        by_rows(&mut y, out, |_, row| vector::add(&bias, row));
    }
    Ok((y, kept))
}

/// Writes the gradient in `x` to `dx`, or adds it; returns those of the adapter. `x` and `low` are those of forward.
pub fn backward(
    bench: &Workbench,
    layer: &Frozen,
    lora: Option<(&Lora, &Rows)>,
    x: &Rows,
    dy: &Rows,
    (dx, add): (&mut [f32], bool),
) -> Result<Option<LoraGradient>> {
    layer.multiply_back(bench, dy, dx, add)?;
    let Some((lora, low)) = lora else { return Ok(None) };
    let (a, b) = (values(bench, &lora.a)?, values(bench, &lora.b)?);
    let (rank, out) = (a.count(), b.count());
    let mut dlow = bench.floats(x.count() * rank);
    bench.multiply(&mut dlow, false, plain(dy), plain(&b))?;
    scale(&mut dlow, lora.scaling);
    let dlow = bench.rows(dlow, rank);
    let dropped = seen(bench, x, lora.dropout);
    match lora.dropout {
        None => bench.multiply(dx, true, plain(&dlow), plain(&a))?,
        Some(dropout) => {
            let mut through = bench.floats(dx.len());
            bench.multiply(&mut through, false, plain(&dlow), plain(&a))?;
            let factors = dropout.factors(x.count(), x.width());
            dx.iter_mut().zip(&through).zip(&factors).for_each(|((dx, t), f)| *dx += t * f);
            bench.done(through);
        }
    }
    let mut da = vec![0f32; rank * x.width()];
    bench.multiply(&mut da, false, turned(&dlow), plain(dropped.as_ref().unwrap_or(x)))?;
    // By its few rows: the transpose of `dy`, which is large, is never formed.
    let mut db_turned = bench.floats(rank * out);
    bench.multiply(&mut db_turned, false, turned(low), plain(dy))?;
    let mut db = vec![0f32; out * rank];
    transpose(&db_turned, out, &mut db);
    bench.done(db_turned);
    [Some(a), Some(b), Some(dlow), dropped].into_iter().flatten().for_each(|rows| bench.release(rows));
    Ok(Some((da, db)))
}
