//! LoRA adapters (Hu et al. 2021) and their PEFT file format.

use crate::cuda::{self, launch};
use crate::model::product::Matrix;
use crate::model::{Decoder, Module};
use crate::random;
use anyhow::{Context, Result, bail};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// What a PEFT `adapter_config.json` says about a LoRA; other keys are kept out of the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rank of the update.
    pub r: usize,
    /// Numerator of the scaling.
    pub lora_alpha: f64,
    /// Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023).
    #[serde(default)]
    pub use_rslora: bool,
}

impl LoraConfig {
    /// Factor on `x A^T B^T`.
    pub fn scaling(&self) -> f64 {
        if self.use_rslora {
            self.lora_alpha / (self.r as f64).sqrt()
        } else {
            self.lora_alpha / self.r as f64
        }
    }
}

/// One low-rank update: `y += scaling * (x A^T) B^T` with A `[r, in]`, B `[out, r]`.
#[derive(Clone)]
pub struct Lora {
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
    pub(crate) scaling: f64,
    /// While training: what the update reads of `x`.
    pub(crate) dropout: Option<Dropout>,
}

impl Lora {
    /// What it drops, where it does.
    pub fn dropout(&self) -> Option<Dropout> {
        self.dropout
    }
}

/// LoRA dropout: each input of the update is zero with probability `rate`, else divided by `1 - rate`. Which ones
/// follows from the seed alone, so that backward and a resumed run draw them again instead of keeping them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    rate: f64,
    seed: u64,
}

impl Dropout {
    /// `rate` in [0, 1).
    pub fn new(rate: f64, address: &[u64]) -> Self {
        Dropout { rate, seed: random::bits(address) }
    }

    /// The factors of a `[rows, width]` input: 0 or `1 / (1 - rate)`.
    pub fn factors(&self, rows: usize, width: usize) -> Vec<f32> {
        let kept = (1.0 / (1.0 - self.rate)) as f32;
        let mut factors = vec![kept; rows * width];
        factors.par_chunks_mut(width).enumerate().for_each(|(row, factors)| {
            let row = random::bits(&[self.seed, row as u64]);
            for (column, factor) in factors.iter_mut().enumerate() {
                if random::uniform_at(row, column as u64) < self.rate {
                    *factor = 0.0;
                }
            }
        });
        factors
    }

    /// `x` times the factors; the same for its gradient.
    pub fn of(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.contiguous()?.apply_op1_no_bwd(self)
    }

    /// What decides in integers: the hash of the seed, and the number that the 53 random bits of a dropped element are
    /// below; then the factor of those that are kept.
    pub fn kernel(&self) -> (u64, u64, f32) {
        let below = (self.rate * (1u64 << 53) as f64).ceil() as u64;
        (random::bits(&[self.seed]), below, (1.0 / (1.0 - self.rate)) as f32)
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "emaudit-dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, width) = l.shape().dims2()?;
        let mut seen = self.factors(rows, width);
        Matrix::of(x, l, &[])?.scale_into(&mut seen);
        Ok((CpuStorage::F32(seen), l.shape().clone()))
    }

    fn cuda_fwd(&self, x: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let (sizes, (state, below, kept)) = (l.shape().dims2()?, self.kernel());
        cuda::run::<f32, 1>([(x, l)], l.shape(), |inputs, y| {
            launch::dropout(inputs, y, sizes, state, below, kept)
        })
    }
}

/// Low-rank updates for any of the seven linear layers of every block.
#[derive(Clone)]
pub struct Adapter {
    /// Rank and scaling.
    pub config: LoraConfig,
    /// Dropout it was trained with; nothing is dropped unless a copy was made with [`Adapter::with_dropout`].
    pub dropout: f64,
    blocks: Vec<[Option<Lora>; 7]>,
}

impl Adapter {
    /// The updates of one block, indexed by [`Module`].
    pub fn block(&self, layer: usize) -> &[Option<Lora>; 7] {
        &self.blocks[layer]
    }

    /// A fresh adapter on all linear layers, with its trainable variables, as [`Adapter::trainable_on`].
    pub fn trainable(
        decoder: &Decoder,
        config: &LoraConfig,
        uniform: impl FnMut() -> f32,
    ) -> Result<(Self, Vec<Var>)> {
        Self::trainable_on(decoder, config, &Module::ALL, 0.0, uniform)
    }

    /// A fresh adapter on the given linear layers of every block, with its trainable variables: A Kaiming-uniform with
    /// a = sqrt(5) as PEFT does (bound 1/sqrt(in)), B zero. `uniform` yields numbers in [0, 1).
    pub fn trainable_on(
        decoder: &Decoder,
        config: &LoraConfig,
        modules: &[Module],
        dropout: f64,
        mut uniform: impl FnMut() -> f32,
    ) -> Result<(Self, Vec<Var>)> {
        let mut vars = Vec::new();
        let mut blocks = Vec::with_capacity(decoder.blocks().len());
        for block in decoder.blocks() {
            let mut loras = [const { None }; 7];
            for module in Module::ALL.into_iter().filter(|m| modules.contains(m)) {
                let (out, inp) = block.dims(module);
                let bound = 1.0 / (inp as f32).sqrt();
                let a: Vec<f32> = (0..config.r * inp).map(|_| (2.0 * uniform() - 1.0) * bound).collect();
                let a = Var::from_tensor(&Tensor::from_vec(a, (config.r, inp), &decoder.device)?)?;
                let b = Var::zeros((out, config.r), DType::F32, &decoder.device)?;
                loras[module as usize] = Some(Lora {
                    a: a.as_tensor().clone(),
                    b: b.as_tensor().clone(),
                    scaling: config.scaling(),
                    dropout: None,
                });
                vars.extend([a, b]);
            }
            blocks.push(loras);
        }
        Ok((Adapter { config: config.clone(), dropout, blocks }, vars))
    }

    /// The same numbers, outside any graph: for capture, sampling and saving.
    pub fn detached(&self) -> Result<Self> {
        let mut other = self.clone();
        for lora in other.blocks.iter_mut().flatten().flatten() {
            (lora.a, lora.b) = (lora.a.detach().copy()?, lora.b.detach().copy()?);
            lora.dropout = None;
        }
        Ok(other)
    }

    /// The same variables' numbers as they are, for a pass that needs no gradient; dropout stays.
    pub fn untracked(&self) -> Self {
        let mut other = self.clone();
        for lora in other.blocks.iter_mut().flatten().flatten() {
            (lora.a, lora.b) = (lora.a.detach(), lora.b.detach());
        }
        other
    }

    /// The same variables with dropout at the adapter's rate, drawn anew for every address.
    pub fn with_dropout(&self, address: &[u64]) -> Self {
        let mut other = self.clone();
        for (layer, block) in other.blocks.iter_mut().enumerate() {
            for (module, lora) in block.iter_mut().enumerate() {
                if let Some(lora) = lora {
                    let own = [address, &[layer as u64, module as u64]].concat();
                    lora.dropout = (self.dropout > 0.0).then(|| Dropout::new(self.dropout, &own));
                }
            }
        }
        other
    }

    /// The layers that it changes, in the order of [`Module::ALL`].
    pub fn modules(&self) -> Vec<Module> {
        let has = |m: &Module| self.blocks.iter().any(|b| b[*m as usize].is_some());
        Module::ALL.into_iter().filter(has).collect()
    }

    /// Largest absolute value of any B: zero means the adapter is inactive.
    pub fn largest_b(&self) -> Result<f32> {
        let mut largest = 0f32;
        for lora in self.blocks.iter().flatten().flatten() {
            largest = largest.max(lora.b.abs()?.max_all()?.to_scalar::<f32>()?);
        }
        Ok(largest)
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors` as PEFT does.
    pub fn save(&self, folder: &Path, base_model: &str) -> Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let mut tensors = HashMap::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            for (module, lora) in Module::ALL.iter().zip(block) {
                let Some(lora) = lora else { continue };
                let name = format!("base_model.model.model.layers.{layer}.{}", module.path());
                tensors.insert(format!("{name}.lora_A.weight"), lora.a.detach());
                tensors.insert(format!("{name}.lora_B.weight"), lora.b.detach());
            }
        }
        let targets: Vec<&str> = self.modules().into_iter().map(Module::name).collect();
        let config = serde_json::json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
            "r": self.config.r, "lora_alpha": self.config.lora_alpha, "use_rslora": self.config.use_rslora,
            "lora_dropout": self.dropout, "bias": "none", "fan_in_fan_out": false, "inference_mode": true,
            "target_modules": targets,
        });
        crate::store::write_json(&folder.join("adapter_config.json"), &config)?;
        // Sorted names give the same bytes for the same adapter.
        let sorted = tensors.into_iter().collect();
        crate::store::write_tensors(&folder.join("adapter_model.safetensors"), &sorted, None)
    }

    /// Reads a PEFT LoRA folder for this decoder; anything it cannot honour is refused by name.
    pub fn load(folder: &Path, decoder: &Decoder) -> Result<Self> {
        let path = folder.join("adapter_config.json");
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let value: serde_json::Value =
            serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?;
        refuse_unsupported(&value).with_context(|| format!("{}", path.display()))?;
        let dropout = value.get("lora_dropout").and_then(|v| v.as_f64()).unwrap_or(0.0);
        let targets = value.get("target_modules").cloned().unwrap_or_default();
        let config: LoraConfig =
            serde_json::from_value(value).with_context(|| format!("{}", path.display()))?;
        if config.r == 0 {
            bail!("{}: `r` is 0, a LoRA has at least rank 1", path.display());
        }
        let path = folder.join("adapter_model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let mut blocks = Vec::with_capacity(decoder.blocks().len());
        for (layer, block) in decoder.blocks().iter().enumerate() {
            let mut loras = [const { None }; 7];
            for module in Module::ALL {
                let name = format!("base_model.model.model.layers.{layer}.{}", module.path());
                let mut take = |part: &str| tensors.remove(&format!("{name}.lora_{part}.weight"));
                let (a, b) = match (take("A"), take("B")) {
                    (Some(a), Some(b)) => (a, b),
                    (None, None) => continue,
                    (a, _) => {
                        let (there, lacking) = if a.is_some() { ("A", "B") } else { ("B", "A") };
                        bail!("`{name}` has a lora_{there} without a lora_{lacking}: the adapter is damaged");
                    }
                };
                let (out, inp) = block.dims(module);
                if a.dims() != [config.r, inp] || b.dims() != [out, config.r] {
                    bail!(
                        "`{name}` has A {:?} and B {:?}, this model needs [{}, {inp}] and [{out}, {}]",
                        a.dims(),
                        b.dims(),
                        config.r,
                        config.r
                    );
                }
                let place = |t: Tensor| t.to_dtype(DType::F32)?.to_device(&decoder.device);
                let scaling = config.scaling();
                loras[module as usize] = Some(Lora { a: place(a)?, b: place(b)?, scaling, dropout: None });
            }
            blocks.push(loras);
        }
        if let Some(name) = tensors.keys().min() {
            bail!("{} tensors of the adapter belong to nothing in this model, e.g. `{name}`", tensors.len());
        }
        if blocks.iter().flatten().flatten().next().is_none() {
            bail!("{} holds no LoRA tensors", path.display());
        }
        let adapter = Adapter { config, dropout, blocks };
        adapter.check_targets(&targets).with_context(|| format!("{}", folder.display()))?;
        Ok(adapter)
    }

    /// PEFT ignores tensors of a layer that a list of `target_modules` leaves out; they are refused here, so that one
    /// folder is one adapter in both. A pattern (a string) is not read.
    fn check_targets(&self, targets: &serde_json::Value) -> Result<()> {
        let Some(targets) = targets.as_array() else { return Ok(()) };
        let targets: Vec<&str> = targets.iter().filter_map(|t| t.as_str()).collect();
        for module in self.modules() {
            let named = |t: &&str| module.path() == *t || module.path().ends_with(&format!(".{t}"));
            let full = |t: &&str| t.ends_with(&format!(".{}", module.path()));
            if !targets.iter().any(|t| named(t) || full(t)) {
                bail!(
                    "it holds tensors of {}, which `target_modules` leaves out: {targets:?}",
                    module.name()
                );
            }
        }
        Ok(())
    }
}

fn refuse_unsupported(config: &serde_json::Value) -> Result<()> {
    let kind = config.get("peft_type").and_then(|v| v.as_str()).unwrap_or("missing");
    if kind != "LORA" {
        bail!("peft_type is {kind}; only LORA is supported");
    }
    // Whatever makes a layer compute something else than `W x + scaling B A x`.
    for key in [
        "use_dora",
        "fan_in_fan_out",
        "lora_bias",
        "use_qalora",
        "use_bdlora",
        "alora_invocation_tokens",
        "layer_replication",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        "velora_config",
    ] {
        if config.get(key).is_some_and(|v| !v.is_null() && v != &serde_json::Value::Bool(false)) {
            bail!("`{key}` is not supported");
        }
    }
    // PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base weights when they start, so their A and B belong
    // to another base. PEFT can convert them: save_pretrained(path_initial_model_for_weight_conversion=...).
    if let Some(start) = config.get("init_lora_weights").and_then(|v| v.as_str())
        && !["gaussian", "orthogonal", "eva"].contains(&start)
    {
        bail!(
            "`init_lora_weights` is {start}, which changes the base weights; convert the adapter with PEFT first"
        );
    }
    for key in ["rank_pattern", "alpha_pattern"] {
        if config.get(key).and_then(|v| v.as_object()).is_some_and(|m| !m.is_empty()) {
            bail!("`{key}` is not supported: one rank and alpha for all layers");
        }
    }
    if config.get("modules_to_save").and_then(|v| v.as_array()).is_some_and(|a| !a.is_empty()) {
        bail!("`modules_to_save` is not supported");
    }
    Ok(())
}
