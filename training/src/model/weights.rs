//! Loading a decoder from a GGUF file or a transformers folder of safetensors.

use super::ops::Norm;
use super::{Block, Config, Decoder, Module};
use crate::quant::{Frozen, Storage};
use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Tensor};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// f32 bytes up to which decoded NF4 weights are kept: above it they are decoded for every use.
const KEEP_DECODED: usize = 2 << 30;

/// How to keep the weights.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Storage of the blocks' linear layers; embedding, norms and head stay f32, as QLoRA does.
    pub storage: Storage,
    /// Where they live.
    pub device: Device,
}

/// Loads the decoder at `path`: a `.gguf` file or a folder with `config.json` and safetensors.
pub fn load(path: &Path, options: &LoadOptions) -> Result<Decoder> {
    let mut source = if path.is_dir() { Source::folder(path)? } else { Source::gguf(path)? };
    let config = source.config()?;
    assemble(config, &mut source, options).with_context(|| format!("cannot load {}", path.display()))
}

fn assemble(config: Config, source: &mut Source, options: &LoadOptions) -> Result<Decoder> {
    let c = &config;
    let keep = {
        let attention = c.hidden_size * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads);
        4 * c.n_layers * (attention + 3 * c.hidden_size * c.intermediate_size) <= KEEP_DECODED
    };
    let norm = |source: &mut Source, name: &str| -> Result<Norm> {
        Ok(Norm::new(source.tensor(name, &[c.hidden_size], &options.device)?, c.norm_eps)?)
    };
    let mut blocks = Vec::with_capacity(c.n_layers);
    for layer in 0..c.n_layers {
        let mut linears = Vec::with_capacity(7);
        for module in Module::ALL {
            let (out, inp) = dims(c, module);
            let name = format!("model.layers.{layer}.{}", module.path());
            let weight = source.tensor(&format!("{name}.weight"), &[out, inp], &options.device)?;
            let bias = format!("{name}.bias");
            let bias = source.has(&bias).then(|| source.tensor(&bias, &[out], &options.device)).transpose()?;
            linears.push(Frozen::new(weight, bias, options.storage, keep)?);
        }
        blocks.push(Block {
            attention_norm: norm(source, &format!("model.layers.{layer}.input_layernorm.weight"))?,
            mlp_norm: norm(source, &format!("model.layers.{layer}.post_attention_layernorm.weight"))?,
            linears: linears.try_into().map_err(|_| anyhow::anyhow!("seven linear layers"))?,
        });
    }
    let shape = [c.vocab_size, c.hidden_size];
    let embedding = source.tensor("model.embed_tokens.weight", &shape, &options.device)?;
    let head = match source.has("lm_head.weight") {
        true => source.tensor("lm_head.weight", &shape, &options.device)?,
        false => embedding.clone(),
    };
    let half = c.head_dim / 2;
    let inverse_frequencies = (0..half).map(|i| c.rope_theta.powf(-(i as f64) / half as f64)).collect();
    Ok(Decoder {
        final_norm: norm(source, "model.norm.weight")?,
        head: Frozen::new(head, None, Storage::None, true)?,
        device: options.device.clone(),
        embedding,
        blocks,
        inverse_frequencies,
        config,
    })
}

/// Output and input features of a block's linear layer.
fn dims(c: &Config, module: Module) -> (usize, usize) {
    let (q, kv) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
    match module {
        Module::Q => (q, c.hidden_size),
        Module::K | Module::V => (kv, c.hidden_size),
        Module::O => (c.hidden_size, q),
        Module::Gate | Module::Up => (c.intermediate_size, c.hidden_size),
        Module::Down => (c.hidden_size, c.intermediate_size),
    }
}

/// Where tensors come from, asked for by their transformers name.
enum Source {
    Gguf { content: Content, reader: BufReader<File>, config: Config },
    Folder { path: PathBuf, files: Vec<Shard> },
}

struct Shard {
    path: PathBuf,
    names: Vec<String>,
}

impl Source {
    fn gguf(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut reader = BufReader::new(file);
        let content = Content::read(&mut reader).with_context(|| format!("{} is not a GGUF file", path.display()))?;
        if content.tensor_infos.contains_key("rope_freqs.weight") {
            bail!("{} scales its rotary frequencies, which is not supported yet", path.display());
        }
        let config = Config::from_gguf(&content)?;
        Ok(Source::Gguf { content, reader, config })
    }

    fn folder(path: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))? {
            let file = entry?.path();
            if file.extension().is_some_and(|e| e == "safetensors")
                && file.file_name().is_some_and(|n| n.to_string_lossy().starts_with("model"))
            {
                files.push(Shard { names: tensor_names(&file)?, path: file });
            }
        }
        if files.is_empty() {
            bail!("{} holds no model*.safetensors", path.display());
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Source::Folder { path: path.to_owned(), files })
    }

    fn config(&self) -> Result<Config> {
        match self {
            Source::Gguf { config, .. } => Ok(config.clone()),
            Source::Folder { path, .. } => Config::from_folder(path),
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Source::Gguf { content, .. } => gguf_name(name).is_some_and(|n| content.tensor_infos.contains_key(&n)),
            Source::Folder { files, .. } => files.iter().any(|f| f.names.iter().any(|n| n == name)),
        }
    }

    /// The tensor as f32, its shape checked.
    fn tensor(&mut self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        let tensor = match self {
            Source::Gguf { content, reader, config } => {
                let stored = gguf_name(name).with_context(|| format!("`{name}` has no GGUF name"))?;
                let tensor = content
                    .tensor(reader, &stored, device)
                    .with_context(|| format!("cannot read tensor `{stored}`"))?
                    .dequantize(device)?;
                let heads = match () {
                    _ if name.contains("q_proj") => config.n_heads,
                    _ if name.contains("k_proj") => config.n_kv_heads,
                    _ => 0,
                };
                if heads > 0 { undo_rope_permutation(&tensor, heads)? } else { tensor }
            }
            Source::Folder { path, files } => {
                let Some(shard) = files.iter().find(|f| f.names.iter().any(|n| n == name)) else {
                    bail!("{} holds no tensor `{name}`", path.display());
                };
                read_tensor(&shard.path, name, device)?
            }
        };
        if tensor.dims() != shape {
            bail!("tensor `{name}` has shape {:?}, the configuration says {shape:?}", tensor.dims());
        }
        Ok(tensor)
    }
}

/// GGUF stores q and k of the llama architecture for interleaved rotation; transformers (and PEFT
/// adapters) use rotate-half. This puts the rows back.
fn undo_rope_permutation(weight: &Tensor, heads: usize) -> Result<Tensor> {
    let dims = weight.dims().to_vec();
    let rest: usize = dims[1..].iter().product();
    let half = dims[0] / heads / 2;
    let rows = weight.reshape((heads, half, 2, rest))?.transpose(1, 2)?.contiguous()?;
    Ok(rows.reshape(dims)?)
}

fn gguf_name(name: &str) -> Option<String> {
    let whole = match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        _ => {
            let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let (module, kind) = rest.rsplit_once('.')?;
            let short = match module {
                "input_layernorm" => "attn_norm",
                "post_attention_layernorm" => "ffn_norm",
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                "mlp.down_proj" => "ffn_down",
                _ => return None,
            };
            return Some(format!("blk.{layer}.{short}.{kind}"));
        }
    };
    Some(whole.to_owned())
}

fn tensor_names(file: &Path) -> Result<Vec<String>> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)
        .with_context(|| format!("{} is not a safetensors file", file.display()))?;
    Ok(header.tensors().keys().cloned().collect())
}

fn read_tensor(file: &Path, name: &str, device: &Device) -> Result<Tensor> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let tensors = safetensors::SafeTensors::deserialize(&bytes)?;
    let view = tensors.tensor(name)?;
    let dtype = match view.dtype() {
        safetensors::Dtype::F32 => DType::F32,
        safetensors::Dtype::F16 => DType::F16,
        safetensors::Dtype::BF16 => DType::BF16,
        other => bail!("tensor `{name}` is stored as {other:?}, which is not supported"),
    };
    Ok(Tensor::from_raw_buffer(view.data(), dtype, view.shape(), device)?.to_dtype(DType::F32)?)
}
