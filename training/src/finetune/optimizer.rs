//! AdamW (Loshchilov & Hutter 2019): decoupled weight decay, bias-corrected moments, in f32 or in 8 bits.

use crate::quant::{DYNAMIC_BLOCK, Dynamic8, Sign};
use crate::recipe::Optimizer;
use anyhow::{Context, Result};
use candle_core::{CpuStorage, Device, InplaceOp2, InplaceOp3, Layout, Tensor, Var};
use rayon::prelude::*;
use std::collections::BTreeMap;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;
/// Elements per parallel task.
const GRAIN: usize = 16 * 1024;
/// Smaller variables keep f32 moments, as in bitsandbytes: nothing is saved there.
pub const LEAST_8BIT: usize = 4096;

/// The moments of every variable.
pub struct AdamW {
    moments: Vec<Moments>,
    weight_decay: f64,
}

/// First and second moments of one variable.
enum Moments {
    Full(Tensor, Tensor),
    /// On the host, wherever the variable lives.
    Eight(Dynamic8, Dynamic8),
}

/// What one step multiplies by.
struct Factors {
    rate: f64,
    clip: f64,
    decay: f64,
    /// Bias corrections of the moments.
    fix1: f64,
    fix2: f64,
}

impl AdamW {
    /// Zero moments for `vars`.
    pub fn new(vars: &[Var], kind: Optimizer, weight_decay: f64) -> Result<Self> {
        let zeros = |v: &Var| -> Result<Moments> {
            let n = v.elem_count();
            Ok(if kind == Optimizer::Adamw8bit && n >= LEAST_8BIT {
                Moments::Eight(Dynamic8::zeros(n, Sign::Signed), Dynamic8::zeros(n, Sign::Unsigned))
            } else {
                Moments::Full(v.zeros_like()?, v.zeros_like()?)
            })
        };
        Ok(AdamW { moments: vars.iter().map(zeros).collect::<Result<_>>()?, weight_decay })
    }

    /// Step `step`, counted from 0, with the gradients multiplied by `clip`.
    pub fn step(
        &mut self,
        vars: &[Var],
        gradients: &[Option<Tensor>],
        step: usize,
        rate: f64,
        clip: f64,
    ) -> Result<()> {
        let t = step as i32 + 1;
        let decay = 1.0 - rate * self.weight_decay;
        let f = Factors { rate, clip, decay, fix1: 1.0 - BETA1.powi(t), fix2: 1.0 - BETA2.powi(t) };
        for ((var, gradient), moments) in vars.iter().zip(gradients).zip(&mut self.moments) {
            let Some(gradient) = gradient else { continue };
            match moments {
                Moments::Full(m, v) => full(var, gradient, m, v, &f)?,
                Moments::Eight(m, v) => eight(var, gradient, m, v, &f)?,
            }
        }
        Ok(())
    }

    /// Everything a checkpoint must hold, by name. On the CPU it shares the moments' memory: the next step changes it.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for (i, moments) in self.moments.iter().enumerate() {
            match moments {
                Moments::Full(m, v) => {
                    for (name, t) in [("m", m), ("v", v)] {
                        state.insert(format!("{name}.{i}"), t.detach().to_device(&Device::Cpu)?);
                    }
                }
                Moments::Eight(m, v) => {
                    for (name, q) in [("m", m), ("v", v)] {
                        let absmax = q.absmax();
                        state.insert(
                            format!("{name}.{i}"),
                            Tensor::from_slice(q.codes(), q.codes().len(), &Device::Cpu)?,
                        );
                        state.insert(
                            format!("{name}_absmax.{i}"),
                            Tensor::from_slice(absmax, absmax.len(), &Device::Cpu)?,
                        );
                    }
                }
            }
        }
        Ok(state)
    }

    /// Takes back what [`state`](Self::state) gave.
    pub fn restore(&mut self, state: &impl Fn(String) -> Result<Tensor>) -> Result<()> {
        for (i, moments) in self.moments.iter_mut().enumerate() {
            let get = |name: &str| state(format!("{name}.{i}"));
            let eight = |name: &str, sign: Sign| -> Result<Dynamic8> {
                let codes = get(name)?.to_vec1::<u8>()?;
                let absmax = get(&format!("{name}_absmax"))?.to_vec1::<f32>()?;
                Dynamic8::from_parts(codes, absmax, sign).context("moments of the checkpoint")
            };
            *moments = match moments {
                Moments::Full(m, _) => {
                    let place = |t: Tensor| t.copy()?.to_device(m.device());
                    Moments::Full(place(get("m")?)?, place(get("v")?)?)
                }
                Moments::Eight(..) => Moments::Eight(eight("m", Sign::Signed)?, eight("v", Sign::Unsigned)?),
            };
        }
        Ok(())
    }
}

/// On the CPU in one pass: composed of candle's operations it took a dozen, each on one thread.
fn full(var: &Var, gradient: &Tensor, m: &mut Tensor, v: &mut Tensor, f: &Factors) -> Result<()> {
    if !gradient.device().is_cpu() {
        let g = (gradient * f.clip)?;
        *m = ((&*m * BETA1)? + (&g * (1.0 - BETA1))?)?;
        *v = ((&*v * BETA2)? + (g.sqr()? * (1.0 - BETA2))?)?;
        let update = ((&*m / f.fix1)? / ((&*v / f.fix2)?.sqrt()? + EPSILON)?)?;
        let decayed = (var.as_tensor().detach() * f.decay)?;
        return Ok(var.set(&(decayed - (update * f.rate)?)?)?);
    }
    let given = gradient.contiguous()?;
    m.inplace_op2(&given, &Moment { keep: BETA1 as f32, clip: f.clip as f32, square: false })?;
    v.inplace_op2(&given, &Moment { keep: BETA2 as f32, clip: f.clip as f32, square: true })?;
    Ok(var.as_tensor().inplace_op3(m, v, &Update::new(f))?)
}

/// `m = keep m + (1 - keep) g`, where g is the clipped gradient or its square.
struct Moment {
    keep: f32,
    clip: f32,
    square: bool,
}

/// `p = decay p - rate (m / fix1) / (sqrt(v / fix2) + eps)`
struct Update {
    decay: f32,
    rate: f32,
    fix1: f32,
    fix2: f32,
}

impl Update {
    fn new(f: &Factors) -> Self {
        Update { decay: f.decay as f32, rate: f.rate as f32, fix1: f.fix1 as f32, fix2: f.fix2 as f32 }
    }
}

fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a moment is not contiguous")
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

fn changed<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<&'a mut [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((start, end)), CpuStorage::F32(values)) => Ok(&mut values[start..end]),
        _ => candle_core::bail!("a contiguous f32 tensor is needed"),
    }
}

impl InplaceOp2 for Moment {
    fn name(&self) -> &'static str {
        "emaudit-adam-moment"
    }

    fn cpu_fwd(
        &self,
        m: &mut CpuStorage,
        lm: &Layout,
        g: &CpuStorage,
        lg: &Layout,
    ) -> candle_core::Result<()> {
        let (m, g, new) = (changed(m, lm)?, values(g, lg)?, 1.0 - self.keep);
        m.par_chunks_mut(GRAIN).zip(g.par_chunks(GRAIN)).for_each(|(m, g)| {
            for (m, g) in m.iter_mut().zip(g) {
                let g = g * self.clip;
                *m = *m * self.keep + if self.square { g * g } else { g } * new;
            }
        });
        Ok(())
    }
}

impl InplaceOp3 for Update {
    fn name(&self) -> &'static str {
        "emaudit-adam-update"
    }

    fn cpu_fwd(
        &self,
        p: &mut CpuStorage,
        lp: &Layout,
        m: &CpuStorage,
        lm: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> candle_core::Result<()> {
        let (p, m, v) = (changed(p, lp)?, values(m, lm)?, values(v, lv)?);
        let parts = p.par_chunks_mut(GRAIN).zip(m.par_chunks(GRAIN)).zip(v.par_chunks(GRAIN));
        parts.for_each(|((p, m), v)| {
            for ((p, m), v) in p.iter_mut().zip(m).zip(v) {
                let update = m / self.fix1 / ((v / self.fix2).sqrt() + EPSILON as f32);
                *p = *p * self.decay - update * self.rate;
            }
        });
        Ok(())
    }
}

/// The update uses the moments before they are quantised again, as bitsandbytes does.
fn eight(var: &Var, gradient: &Tensor, m: &mut Dynamic8, v: &mut Dynamic8, f: &Factors) -> Result<()> {
    let mut values = var.as_tensor().detach().flatten_all()?.to_vec1::<f32>()?;
    let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
    let (beta1, beta2) = (BETA1 as f32, BETA2 as f32);
    let (new1, new2) = ((1.0 - BETA1) as f32, (1.0 - BETA2) as f32);
    let (clip, decay) = (f.clip as f32, f.decay as f32);
    let (step, root) = ((f.rate / f.fix1) as f32, f.fix2.sqrt() as f32);
    let blocks = values.par_chunks_mut(DYNAMIC_BLOCK).zip(gradient.par_chunks(DYNAMIC_BLOCK));
    blocks.zip(m.blocks()).zip(v.blocks()).for_each(|(((values, gradient), mut m), mut v)| {
        let (mut first, mut second) = ([0f32; DYNAMIC_BLOCK], [0f32; DYNAMIC_BLOCK]);
        let (first, second) = (&mut first[..values.len()], &mut second[..values.len()]);
        m.read(first);
        v.read(second);
        for (((p, g), m), v) in values.iter_mut().zip(gradient).zip(&mut *first).zip(&mut *second) {
            let g = g * clip;
            *m = *m * beta1 + g * new1;
            *v = *v * beta2 + g * g * new2;
            *p = *p * decay - step * (*m / (v.sqrt() / root + EPSILON as f32));
        }
        m.write(first);
        v.write(second);
    });
    let shape = var.shape().clone();
    Ok(var.set(&Tensor::from_vec(values, shape, var.device())?)?)
}
