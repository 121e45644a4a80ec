//! Frozen linear layers that read the same rows, with their adapters, forward and backward.
//!
//! In bf16 they are one product: of rows with what the adapters make of them in their room, `[x | s x A^T]`, and of
//! weights with the other halves of the adapters behind them, `[W | B]`; backward of the pieces of `[dy | s dy B]` and of
//! the weights with A below them.

use super::bench::{Place, Rows, Side, Workbench, by_rows, plain, transpose};
use super::pieces::{PIECE, Pieces, Pooled, WIDE, split};
use crate::lora::{Dropout, Lora};
use crate::model::product::Threads;
use crate::model::vector::{add, narrow};
use crate::quant::Frozen;
use anyhow::Result;
use candle_core::Tensor;
use half::bf16;
use std::ops::Range;

/// The gradients of A and B, row-major.
pub type LoraGradient = (Vec<f32>, Vec<f32>);

/// Layers that read the same rows. What they give stands side by side.
pub struct Linear<'a> {
    bench: &'a Workbench,
    parts: Vec<Part<'a>>,
    inputs: usize,
    outputs: usize,
    rank: usize,
}

struct Part<'a> {
    layer: &'a Frozen,
    lora: Option<&'a Lora>,
    /// Its columns among those of all layers.
    outs: Range<usize>,
    /// Its columns among those of all adapters.
    low: Range<usize>,
}

/// Runs `f` on the f32 values of a CPU tensor.
fn values<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else { anyhow::bail!("a CPU tensor is needed") };
    let Some((start, end)) = layout.contiguous_offsets() else {
        anyhow::bail!("a contiguous tensor is needed")
    };
    Ok(f(&storage.as_slice::<f32>()?[start..end]))
}

/// `x` as the adapter reads it, where that is not `x` itself.
fn seen(bench: &Workbench, x: &Rows, dropout: Option<Dropout>) -> Option<Rows> {
    let width = x.width();
    let factors = dropout?.factors(x.count(), width);
    Some(bench.fill(x.count(), (width, 0), |row, to| dropped(x, row, &factors[row * width..], to)))
}

/// A row times its factors.
fn dropped(x: &Rows, row: usize, factors: &[f32], to: &mut [f32]) {
    let mut scratch = Vec::new();
    let x = x.read(row, &mut scratch);
    to.iter_mut().zip(x).zip(factors).for_each(|((to, x), f)| *to = x * f);
}

impl<'a> Linear<'a> {
    /// Layers of one width of input.
    pub fn new(
        bench: &'a Workbench,
        layers: impl IntoIterator<Item = (&'a Frozen, Option<&'a Lora>)>,
    ) -> Result<Self> {
        let mut linear = Linear { bench, parts: Vec::new(), inputs: 0, outputs: 0, rank: 0 };
        for (layer, lora) in layers {
            let (out, inp) = layer.dims();
            let rank = lora.map_or(Ok(0), |l| l.a.dim(0))?;
            let (outs, low) = (linear.outputs..linear.outputs + out, linear.rank..linear.rank + rank);
            (linear.inputs, linear.outputs, linear.rank) = (inp, outs.end, low.end);
            linear.parts.push(Part { layer, lora, outs, low });
        }
        Ok(linear)
    }

    /// The room that is needed behind the rows they read.
    pub fn rank(&self) -> usize {
        self.rank
    }

    fn adapters(&self) -> impl Iterator<Item = (&Part<'a>, &'a Lora)> {
        self.parts.iter().filter_map(|part| part.lora.map(|lora| (part, lora)))
    }

    fn dropout(&self) -> bool {
        self.adapters().any(|(_, lora)| lora.dropout.is_some())
    }

    /// What all layers give, in f32; and s (x A^T) of all adapters, which backward reads. The room behind `x` is used.
    pub fn forward(&self, x: &mut Rows) -> Result<(Vec<f32>, Option<Rows>)> {
        let low = self.low(x)?;
        let mut y = self.bench.floats(x.count() * self.outputs);
        match self.bench.accelerator() {
            None => self.full(x, low.as_ref(), &mut y)?,
            Some(_) => self.halves(x, &mut y)?,
        }
        for part in &self.parts {
            let Some(bias) = part.layer.bias() else { continue };
            let bias = bias.to_vec1::<f32>()?;
            by_rows(&mut y, self.outputs, |_, row| add(&bias, &mut row[part.outs.clone()]));
        }
        Ok((y, low))
    }

    /// The same as products read it.
    pub fn forward_rows(&self, x: &mut Rows) -> Result<(Rows, Option<Rows>)> {
        let biased = self.parts.iter().any(|part| part.layer.bias().is_some());
        if self.bench.accelerator().is_none() || biased {
            let (y, low) = self.forward(x)?;
            return Ok((self.bench.rows(y, self.outputs), low));
        }
        let low = self.low(x)?;
        let y = self.bench.halves_by(x.count(), self.outputs, |y| self.halves(x, y))?;
        Ok((y, low))
    }

    /// s (x A^T) of all adapters, and in the room behind `x`.
    fn low(&self, x: &mut Rows) -> Result<Option<Rows>> {
        if self.rank == 0 {
            return Ok(None);
        }
        let (bench, stride) = (self.bench, self.rank);
        let mut low = bench.floats(x.count() * stride);
        if self.dropout() {
            for (part, lora) in self.adapters() {
                let a = values(&lora.a, |a| bench.rows_of(a, self.inputs))?;
                let dropped = seen(bench, x, lora.dropout);
                let to = Place { to: &mut low[part.low.start..], stride };
                let seen = plain(dropped.as_ref().unwrap_or(x));
                bench.multiply(to, false, &seen, &plain(&a).t(), Threads::All)?;
                [Some(a), dropped].into_iter().flatten().for_each(|rows| bench.release(rows));
            }
        } else {
            // With zeros in the room of A, what stands in that of `x` does not matter.
            let a = self.downward(x)?;
            let (to, lhs, rhs) = (Place { to: &mut low, stride }, Side::whole(x), Side::whole(&a).t());
            bench.multiply(to, false, &lhs, &rhs, Threads::All)?;
            bench.release(a);
        }
        let low = self.scaled(low);
        bench.put(x, &low);
        Ok(Some(low))
    }

    /// The A of all adapters, one below the other, with the room that `x` has.
    fn downward(&self, x: &Rows) -> Result<Rows> {
        let mut all = self.bench.floats(self.rank * self.inputs);
        for (part, lora) in self.adapters() {
            let to = &mut all[part.low.start * self.inputs..part.low.end * self.inputs];
            values(&lora.a, |a| to.copy_from_slice(a))?;
        }
        let inputs = self.inputs;
        let rows = self.bench.fill(self.rank, (inputs, x.room()), |row, to| {
            to.copy_from_slice(&all[row * inputs..][..inputs]);
        });
        self.bench.done(all);
        Ok(rows)
    }

    /// Columns of all adapters times their scaling.
    fn scaled(&self, low: Vec<f32>) -> Rows {
        let rank = self.rank;
        let rows = self.bench.fill(low.len() / rank, (rank, 0), |row, to| {
            to.copy_from_slice(&low[row * rank..][..rank]);
            for (part, lora) in self.adapters() {
                to[part.low.clone()].iter_mut().for_each(|v| *v *= lora.scaling as f32);
            }
        });
        self.bench.done(low);
        rows
    }

    /// `y = x W^T + low B^T` in f32, layer by layer.
    fn full(&self, x: &Rows, low: Option<&Rows>, y: &mut [f32]) -> Result<()> {
        let (bench, stride) = (self.bench, self.outputs);
        for part in &self.parts {
            let to = Place { to: &mut y[part.outs.start..], stride };
            part.layer.with_full(bench, |w| bench.multiply_f32(to, false, &plain(x), w.t()))?;
            if let Some((lora, low)) = part.lora.zip(low) {
                let b = values(&lora.b, |b| bench.rows_of(b, part.low.len()))?;
                let to = Place { to: &mut y[part.outs.start..], stride };
                let low = plain(low).columns(part.low.clone());
                bench.multiply(to, true, &low, &plain(&b).t(), Threads::All)?;
                bench.release(b);
            }
        }
        Ok(())
    }

    /// The same in bf16, where `x` has what its adapters made of it in its room.
    fn halves<T: Pooled>(&self, x: &Rows, y: &mut [T]) -> Result<()> {
        let (inputs, stride) = (self.inputs, self.inputs + self.rank);
        let to = Place { to: y, stride: self.outputs };
        self.bench.multiply_turned(to, &Side::whole(x), |outs, weight| {
            weight.chunks_mut(stride).for_each(|row| row[inputs..].fill(bf16::ZERO));
            for (part, own, there) in self.within(&outs) {
                let rows = &mut weight[there.start * stride..there.end * stride];
                part.layer.write(own.clone(), 0..inputs, rows, stride)?;
                let Some(lora) = part.lora else { continue };
                values(&lora.b, |b| {
                    let rank = part.low.len();
                    for (row, b) in rows.chunks_mut(stride).zip(b[own.start * rank..].chunks(rank)) {
                        narrow(b, &mut row[inputs + part.low.start..][..rank]);
                    }
                })?;
            }
            Ok(())
        })
    }

    /// Layers of which `outs` has rows: which of their own, and where they stand in it.
    fn within(&self, outs: &Range<usize>) -> impl Iterator<Item = (&Part<'a>, Range<usize>, Range<usize>)> {
        self.parts.iter().filter_map(move |part| {
            let (start, end) = (part.outs.start.max(outs.start), part.outs.end.min(outs.end));
            let from = |origin: usize| start - origin..end - origin;
            (start < end).then(|| (part, from(part.outs.start), from(outs.start)))
        })
    }

    /// How the gradient of what they give is divided: each layer by itself, with as many lines of its weight as are decoded
    /// at a time.
    pub fn pieces(&self) -> Vec<Range<usize>> {
        let wide = split(self.inputs, WIDE, rayon::current_num_threads()).first().map_or(1, Range::len);
        let of = |part: &Part<'_>| {
            let start = part.outs.start;
            split(part.outs.len(), PIECE / wide, 1).into_iter().map(move |p| start + p.start..start + p.end)
        };
        self.parts.iter().flat_map(of).collect()
    }

    /// The gradient in the rows they read, and those of the adapters, from the gradient in what they gave; with the rows
    /// themselves and what forward kept of the adapters, where there are any.
    pub fn backward(
        &self,
        adapted: Option<(&Pieces, &Rows)>,
        dy: &Pieces,
    ) -> Result<(Vec<f32>, Vec<Option<LoraGradient>>)> {
        let (bench, count) = (self.bench, dy.count());
        let dlow = adapted.map(|_| self.low_back(dy)).transpose()?;
        let through = dlow.as_ref().filter(|_| !self.dropout());
        let mut dx = bench.floats(count * self.inputs);
        match bench.accelerator() {
            None => self.full_back(dy, through, &mut dx)?,
            Some(_) => self.halves_back(dy, through, &mut dx)?,
        }
        let gradients = match adapted.zip(dlow) {
            None => self.parts.iter().map(|_| None).collect(),
            Some(((x, low), dlow)) => {
                if self.dropout() {
                    self.through_dropout(&dlow, &mut dx)?;
                }
                let gradients = self.gradients(x, low, &dlow, dy)?;
                bench.release(dlow);
                gradients
            }
        };
        Ok((dx, gradients))
    }

    /// s (dy B) of all adapters.
    fn low_back(&self, dy: &Pieces) -> Result<Rows> {
        let (bench, count) = (self.bench, dy.count());
        let mut all = bench.floats(count * self.rank);
        for (part, lora) in self.adapters() {
            let rank = part.low.len();
            let b = values(&lora.b, |b| bench.rows_of(b, rank))?;
            let mut own = bench.floats(count * rank);
            for (outs, dy) in dy.within(&part.outs) {
                let (to, b) = (Place { to: &mut own, stride: rank }, plain(&b).lines(outs.clone()));
                bench.multiply(to, outs.start > 0, &dy, &b, Threads::All)?;
            }
            for (to, own) in all.chunks_mut(self.rank).zip(own.chunks(rank)) {
                to[part.low.clone()].copy_from_slice(own);
            }
            bench.done(own);
            bench.release(b);
        }
        Ok(self.scaled(all))
    }

    /// `dx = dy W + dlow A` in f32, layer by layer.
    fn full_back(&self, dy: &Pieces, dlow: Option<&Rows>, dx: &mut [f32]) -> Result<()> {
        let (bench, stride) = (self.bench, self.inputs);
        for part in &self.parts {
            for (outs, dy) in dy.within(&part.outs) {
                let add = part.outs.start + outs.start > 0;
                let to = Place { to: &mut *dx, stride };
                part.layer
                    .with_full(bench, |w| bench.multiply_f32(to, add, &dy, w.rows(outs.start, outs.len())))?;
            }
            if let Some((lora, dlow)) = part.lora.zip(dlow) {
                let a = values(&lora.a, |a| bench.rows_of(a, stride))?;
                let dlow = plain(dlow).columns(part.low.clone());
                bench.multiply(Place { to: &mut *dx, stride }, true, &dlow, &plain(&a), Threads::All)?;
                bench.release(a);
            }
        }
        Ok(())
    }

    /// The same in bf16, the adapters' A below the layers' weights.
    fn halves_back(&self, dy: &Pieces, dlow: Option<&Rows>, dx: &mut [f32]) -> Result<()> {
        let (inputs, outputs) = (self.inputs, self.outputs);
        let to = Place { to: dx, stride: inputs };
        let lhs: Vec<_> = dy.iter().map(|(columns, rows)| (columns.clone(), rows)).collect();
        let lhs = [lhs, dlow.map(|dlow| (outputs..outputs + self.rank, dlow)).into_iter().collect()].concat();
        self.bench.multiply_plain(to, &lhs, |lines, columns, weight| {
            let wide = columns.len();
            for (part, own, there) in self.within(&lines) {
                let rows = &mut weight[there.start * wide..there.end * wide];
                part.layer.write(own, columns.clone(), rows, wide)?;
            }
            for (part, lora) in self.adapters().filter(|_| lines.start == outputs) {
                let rows = weight[part.low.start * wide..].chunks_mut(wide);
                values(&lora.a, |a| {
                    rows.zip(a.chunks(inputs)).for_each(|(to, a)| narrow(&a[columns.clone()], to));
                })?;
            }
            Ok(())
        })
    }

    /// Adds what the adapters' gradients are behind their dropout.
    fn through_dropout(&self, dlow: &Rows, dx: &mut [f32]) -> Result<()> {
        let (bench, stride) = (self.bench, self.inputs);
        for (part, lora) in self.adapters() {
            let a = values(&lora.a, |a| bench.rows_of(a, stride))?;
            let mut through = bench.floats(dx.len());
            let low = plain(dlow).columns(part.low.clone());
            bench.multiply(Place { to: &mut through, stride }, false, &low, &plain(&a), Threads::All)?;
            let factors = lora.dropout.map(|d| d.factors(dlow.count(), stride));
            by_rows(dx, stride, |row, dx| {
                let through = &through[row * stride..][..stride];
                match &factors {
                    None => add(through, dx),
                    Some(f) => dx
                        .iter_mut()
                        .zip(through)
                        .zip(&f[row * stride..])
                        .for_each(|((dx, t), f)| *dx += t * f),
                }
            });
            bench.done(through);
            bench.release(a);
        }
        Ok(())
    }

    /// Those of A and B. By their few rows: the transposes of `x` and `dy`, which are large, are never formed.
    fn gradients(
        &self,
        x: &Pieces,
        low: &Rows,
        dlow: &Rows,
        dy: &Pieces,
    ) -> Result<Vec<Option<LoraGradient>>> {
        let bench = self.bench;
        let [low, dlow] = [low, dlow].map(|rows| bench.transposed(rows));
        let mut of_a = self.gradients_of_a(x, &dlow)?.into_iter();
        let mut found = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            found.push(match part.lora {
                None => None,
                Some(_) => of_a.next().zip(Some(self.gradient_of_b(part, &low, dy)?)),
            });
        }
        [low, dlow].into_iter().for_each(|rows| bench.release(rows));
        Ok(found)
    }

    /// `dlow^T x` of each adapter, from the transpose of `dlow`.
    fn gradients_of_a(&self, x: &Pieces, dlow: &Rows) -> Result<Vec<Vec<f32>>> {
        let (bench, inputs) = (self.bench, self.inputs);
        let mut found: Vec<_> =
            self.adapters().map(|(part, _)| vec![0f32; part.low.len() * inputs]).collect();
        // Without dropout all adapters read the same rows, and their gradients are one product.
        let groups: Vec<(Range<usize>, Option<Dropout>)> = match self.dropout() {
            false => vec![(0..self.rank, None)],
            true => self.adapters().map(|(part, lora)| (part.low.clone(), lora.dropout)).collect(),
        };
        for (low, dropout) in groups {
            let factors = dropout.map(|d| d.factors(x.count(), inputs));
            let products = bench.on_threads(x.iter().collect(), |(columns, rows), threads| {
                let dropped = factors.as_ref().map(|f| {
                    bench.fill(rows.count(), (columns.len(), 0), |row, to| {
                        dropped(rows, row, &f[row * inputs + columns.start..], to);
                    })
                });
                let mut product = bench.floats(low.len() * columns.len());
                let to = Place { to: &mut product, stride: columns.len() };
                let seen = plain(dropped.as_ref().unwrap_or(rows));
                bench.multiply(to, false, &plain(dlow).lines(low.clone()), &seen, threads)?;
                dropped.into_iter().for_each(|rows| bench.release(rows));
                Ok(product)
            })?;
            for ((part, _), to) in self.adapters().zip(&mut found) {
                if !(low.start..low.end).contains(&part.low.start) {
                    continue;
                }
                by_rows(to, inputs, |row, to| {
                    let row = part.low.start - low.start + row;
                    for ((columns, _), product) in x.iter().zip(&products) {
                        to[columns.clone()].copy_from_slice(&product[row * columns.len()..][..columns.len()]);
                    }
                });
            }
            products.into_iter().for_each(|buffer| bench.done(buffer));
        }
        Ok(found)
    }

    /// `dy^T low` of one adapter, from the transpose of `low`.
    fn gradient_of_b(&self, part: &Part<'_>, low: &Rows, dy: &Pieces) -> Result<Vec<f32>> {
        let (bench, rank) = (self.bench, part.low.len());
        let low = plain(low).lines(part.low.clone());
        let mut db = vec![0f32; part.outs.len() * rank];
        let mut left = db.as_mut_slice();
        let mut work = Vec::new();
        for (outs, dy) in dy.within(&part.outs) {
            let (own, others) = left.split_at_mut(outs.len() * rank);
            left = others;
            work.push((dy, outs.len(), own));
        }
        bench.on_threads(work, |(dy, outs, own), threads| {
            let mut turned = bench.floats(rank * outs);
            bench.multiply(Place { to: &mut turned, stride: outs }, false, &low, &dy, threads)?;
            transpose(&turned, outs, own);
            bench.done(turned);
            Ok(())
        })?;
        Ok(db)
    }
}
