//! Loading a decoder from a GGUF file or a transformers folder of safetensors.

use super::ops::Norm;
use super::{Block, Config, Decoder, Module};
use crate::quant::{Frozen, Storage};
use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Tensor};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
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
            let bias =
                source.has(&bias).then(|| source.tensor(&bias, &[out], &options.device)).transpose()?;
            let frozen = Frozen::new(weight, bias, options.storage, keep);
            linears.push(frozen.with_context(|| format!("cannot use tensor `{name}.weight`"))?);
        }
        blocks.push(Block {
            attention_norm: norm(source, &format!("model.layers.{layer}.input_layernorm.weight"))?,
            mlp_norm: norm(source, &format!("model.layers.{layer}.post_attention_layernorm.weight"))?,
            linears: linears.try_into().map_err(|_| anyhow::anyhow!("seven linear layers"))?,
        });
    }
    let shape = [c.vocab_size, c.hidden_size];
    let embedding = source.tensor("model.embed_tokens.weight", &shape, &options.device)?;
    let head = match c.tied_head {
        true => embedding.clone(),
        false => source.tensor("lm_head.weight", &shape, &options.device)?,
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
    Gguf { content: Content, reader: BufReader<File>, config: Box<Config> },
    Folder { path: PathBuf, files: Vec<Shard> },
}

/// One safetensors file, of which only the header is held.
struct Shard {
    path: PathBuf,
    header: safetensors::tensor::Metadata,
    /// Where the tensors' bytes begin.
    start: u64,
}

impl Source {
    fn gguf(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut reader = BufReader::new(file);
        let content =
            Content::read(&mut reader).with_context(|| format!("{} is not a GGUF file", path.display()))?;
        if content.tensor_infos.contains_key("rope_freqs.weight") {
            bail!("{} scales its rotary frequencies, which is not supported yet", path.display());
        }
        let config = Box::new(Config::from_gguf(&content)?);
        Ok(Source::Gguf { content, reader, config })
    }

    fn folder(path: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))? {
            let file = entry?.path();
            if file.extension().is_some_and(|e| e == "safetensors")
                && file.file_name().is_some_and(|n| n.to_string_lossy().starts_with("model"))
            {
                files.push(Shard::open(file)?);
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
            Source::Gguf { config, .. } => Ok(Config::clone(config)),
            Source::Folder { path, .. } => Config::from_folder(path),
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Source::Gguf { content, .. } => {
                gguf_name(name).is_some_and(|n| content.tensor_infos.contains_key(&n))
            }
            Source::Folder { files, .. } => files.iter().any(|f| f.header.info(name).is_some()),
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
                let Some(shard) = files.iter().find(|f| f.header.info(name).is_some()) else {
                    bail!("{} holds no tensor `{name}`", path.display());
                };
                shard.tensor(name, device)?
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

/// Longest header the format allows.
const MAX_HEADER: u64 = 100_000_000;

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let read = || -> Result<(safetensors::tensor::Metadata, u64)> {
            let mut file = File::open(&path)?;
            let mut length = [0u8; 8];
            file.read_exact(&mut length)?;
            let length = u64::from_le_bytes(length);
            if length > MAX_HEADER {
                bail!("its header claims {length} bytes");
            }
            let mut header = vec![0u8; length as usize];
            file.read_exact(&mut header)?;
            let header: safetensors::tensor::Metadata = serde_json::from_slice(&header)?;
            let (expected, found) = (8 + length + header.data_len() as u64, file.metadata()?.len());
            if expected != found {
                bail!("it has {found} bytes, its header says {expected}");
            }
            Ok((header, 8 + length))
        };
        let (header, start) =
            read().with_context(|| format!("{} is not a safetensors file", path.display()))?;
        Ok(Shard { path, header, start })
    }

    /// Reads this tensor's bytes and no others: a checkpoint may be larger than the memory.
    fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let info = self.header.info(name).with_context(|| format!("no tensor `{name}`"))?;
        let dtype = match info.dtype {
            safetensors::Dtype::F32 => DType::F32,
            safetensors::Dtype::F16 => DType::F16,
            safetensors::Dtype::BF16 => DType::BF16,
            other => bail!("tensor `{name}` is stored as {other:?}, which is not supported"),
        };
        let (from, to) = info.data_offsets;
        let mut bytes = vec![0u8; to - from];
        let read = |bytes: &mut [u8]| -> std::io::Result<()> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.start + from as u64))?;
            file.read_exact(bytes)
        };
        read(&mut bytes).with_context(|| format!("cannot read `{name}` from {}", self.path.display()))?;
        Ok(Tensor::from_raw_buffer(&bytes, dtype, &info.shape, device)?.to_dtype(DType::F32)?)
    }
}
