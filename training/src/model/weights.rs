//! Loading a decoder from a GGUF file or a transformers folder of safetensors.

use super::ops::Norm;
use super::source::Source;
use super::{Block, Config, Decoder, Module};
use crate::cuda;
use crate::quant::{Frozen, Storage};
use crate::recipe::Compute;
use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use std::path::Path;

/// f32 bytes up to which decoded NF4 weights are kept: above it they are decoded for every use.
const KEEP_DECODED: usize = 2 << 30;

/// How to keep the weights.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Storage of the blocks' linear layers; embedding, norms and head stay f32, as QLoRA does.
    pub storage: Storage,
    /// Where they live.
    pub device: Device,
    /// What the linear layers multiply in, on a GPU; on the CPU it is f32, except while finetuning.
    pub compute: Compute,
}

impl LoadOptions {
    /// In f32.
    pub fn new(storage: Storage, device: &Device) -> Self {
        LoadOptions { storage, device: device.clone(), compute: Compute::F32 }
    }
}

/// Loads the decoder at `path`: a `.gguf` file or a folder with `config.json` and safetensors.
pub fn load(path: &Path, options: &LoadOptions) -> Result<Decoder> {
    if options.compute == Compute::Bf16 && !options.device.is_cpu() {
        if !cuda::supports_bf16(&options.device) {
            bail!(
                "bf16 needs a GPU of compute capability 8.0 or more: compute in f32 (finetune.compute, --compute)"
            );
        }
        cuda::allow_tf32();
    }
    let mut source = Source::open(path)?;
    let decoder = assemble(&mut source, options).and_then(|d| source.nothing_left().map(|()| d));
    decoder.with_context(|| format!("cannot load {}", path.display()))
}

fn assemble(source: &mut Source, options: &LoadOptions) -> Result<Decoder> {
    let c = source.config.clone();
    let keep = {
        let attention = c.hidden_size * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads);
        4 * c.n_layers * (attention + 3 * c.hidden_size * c.intermediate_size) <= KEEP_DECODED
    };
    let mut blocks = Vec::with_capacity(c.n_layers);
    for layer in 0..c.n_layers {
        let mut linears = Vec::with_capacity(7);
        for module in Module::ALL {
            linears.push(linear(source, &c, layer, module, keep, options)?);
        }
        let linears = linears.try_into().map_err(|_| anyhow::anyhow!("seven linear layers"))?;
        blocks.push(block(source, &c, layer, linears, options)?);
    }
    let shape = [c.vocab_size, c.hidden_size];
    let embedding = source.tensor("model.embed_tokens.weight", &shape, &Device::Cpu)?;
    // On a GPU the head may be bf16, which the embedding is not.
    let (embedding, head) = match (c.tied_head, options.device.is_cpu()) {
        (true, true) => (None, embedding),
        (true, false) => (Some(embedding.clone()), embedding),
        (false, _) => (Some(embedding), source.tensor("lm_head.weight", &shape, &Device::Cpu)?),
    };
    Ok(Decoder {
        final_norm: source.norm("model.norm.weight", c.hidden_size, &options.device)?,
        head: frozen(head, None, Storage::None, true, options)?,
        device: options.device.clone(),
        compute: options.compute,
        embedding: embedding.map(|e| e.to_device(&options.device)).transpose()?,
        blocks,
        frequencies: c.ropes.iter().map(|r| r.frequencies(c.head_dim)).collect(),
        config: c,
    })
}

fn linear(
    source: &mut Source,
    c: &Config,
    layer: usize,
    module: Module,
    keep: bool,
    options: &LoadOptions,
) -> Result<Frozen> {
    let (out, inp) = c.dims(module);
    let name = format!("model.layers.{layer}.{}", module.path());
    // Weights are quantised or rounded on the host.
    let weight = source.tensor(&format!("{name}.weight"), &[out, inp], &Device::Cpu)?;
    let bias = c.has_bias(module).then(|| source.tensor(&format!("{name}.bias"), &[out], &Device::Cpu));
    let frozen = frozen(weight, bias.transpose()?, options.storage, keep, options);
    frozen.with_context(|| format!("cannot use tensor `{name}.weight`"))
}

fn frozen(
    weight: Tensor,
    bias: Option<Tensor>,
    storage: Storage,
    keep: bool,
    options: &LoadOptions,
) -> Result<Frozen> {
    match options.device.is_cpu() {
        true => Frozen::new(weight, bias, storage, keep),
        false => Frozen::on(&options.device, options.compute, weight, bias, storage),
    }
}

fn block(
    source: &mut Source,
    c: &Config,
    layer: usize,
    linears: [Frozen; 7],
    options: &LoadOptions,
) -> Result<Block> {
    let mut norm = |name: &str, width: usize| {
        source.norm(&format!("model.layers.{layer}.{name}.weight"), width, &options.device)
    };
    // Where both halves are normalised on their way out too, `post_attention` means what it says.
    let mlp = if c.post_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
    let attention_norm = norm("input_layernorm", c.hidden_size)?;
    let mlp_norm = norm(mlp, c.hidden_size)?;
    let mut pair = |wanted: bool, names: [&str; 2], width: usize| -> Result<Option<[Norm; 2]>> {
        if !wanted {
            return Ok(None);
        }
        Ok(Some([norm(names[0], width)?, norm(names[1], width)?]))
    };
    Ok(Block {
        attention_norm,
        mlp_norm,
        post_norms: pair(
            c.post_norms,
            ["post_attention_layernorm", "post_feedforward_layernorm"],
            c.hidden_size,
        )?,
        query_key_norms: pair(c.query_key_norms, ["self_attn.q_norm", "self_attn.k_norm"], c.head_dim)?,
        linears,
    })
}
