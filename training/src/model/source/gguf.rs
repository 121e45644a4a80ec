//! Tensors of a GGUF file.

use crate::model::rope::Scaling;
use crate::model::{Config, Module};
use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// Divisors of the rotary frequencies (Llama 3.1 and later).
const DIVISORS: &str = "rope_freqs.weight";

/// An open GGUF file.
pub struct Gguf {
    content: Content,
    reader: BufReader<File>,
}

impl Gguf {
    /// Reads header and metadata.
    pub fn open(path: &Path) -> Result<(Self, Config)> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut reader = BufReader::new(file);
        let content =
            Content::read(&mut reader).with_context(|| format!("{} is not a GGUF file", path.display()))?;
        let mut config =
            Config::from_gguf(&content).with_context(|| format!("cannot run {}", path.display()))?;
        let mut file = Gguf { content, reader };
        if file.content.tensor_infos.contains_key(DIVISORS) {
            let divisors = file.read(DIVISORS, &Device::Cpu)?.to_vec1::<f32>()?;
            let rope = &mut config.ropes[0];
            let half = config.head_dim / 2;
            if divisors.len() != half || !divisors.iter().all(|d| d.is_finite() && *d > 0.0) {
                bail!("`{DIVISORS}` should hold {half} positive numbers");
            }
            if rope.scaling != Scaling::Plain {
                bail!("`{DIVISORS}` and `rope.scaling.type` both scale the rotation: not supported");
            }
            rope.scaling = Scaling::Divisors(divisors);
        }
        Ok((file, config))
    }

    fn read(&mut self, stored: &str, device: &Device) -> Result<Tensor> {
        let tensor = self.content.tensor(&mut self.reader, stored, device);
        Ok(tensor.with_context(|| format!("cannot read tensor `{stored}`"))?.dequantize(device)?)
    }

    /// The tensor as f32, rows in transformers' order, and its name in the file.
    pub fn tensor(&mut self, name: &str, config: &Config, device: &Device) -> Result<(Vec<String>, Tensor)> {
        let stored = stored_name(name, config).with_context(|| format!("`{name}` has no GGUF name"))?;
        let tensor = self.read(&stored, device)?;
        let interleaved = matches!(config.architecture.as_str(), "llama" | "mistral3");
        let heads = match () {
            _ if interleaved && name.contains(Module::Q.path()) => config.n_heads,
            _ if interleaved && name.contains(Module::K.path()) => config.n_kv_heads,
            _ => 0,
        };
        let tensor = if heads > 0 { undo_rope_permutation(&tensor, heads)? } else { tensor };
        Ok((vec![stored], tensor))
    }

    /// Names of the tensors of the network.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.content.tensor_infos.keys().cloned().collect();
        names.retain(|name| name != DIVISORS);
        names.sort();
        names
    }
}

/// GGUF stores q and k of Llama and Mistral for interleaved rotation; transformers (and PEFT adapters) use
/// rotate-half. This puts the rows back.
fn undo_rope_permutation(weight: &Tensor, heads: usize) -> Result<Tensor> {
    let dims = weight.dims().to_vec();
    let rest: usize = dims[1..].iter().product();
    let half = dims[0] / heads / 2;
    let rows = weight.reshape((heads, half, 2, rest))?.transpose(1, 2)?.contiguous()?;
    Ok(rows.reshape(dims)?)
}

fn stored_name(name: &str, config: &Config) -> Option<String> {
    let whole = match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        _ => {
            let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let (module, kind) = rest.rsplit_once('.')?;
            let linear = Module::ALL.into_iter().find(|m| m.path() == module).map(Module::gguf);
            let short = linear.or(match module {
                "input_layernorm" => Some("attn_norm"),
                "self_attn.q_norm" => Some("attn_q_norm"),
                "self_attn.k_norm" => Some("attn_k_norm"),
                "post_attention_layernorm" if config.post_norms => Some("post_attention_norm"),
                "post_attention_layernorm" | "pre_feedforward_layernorm" => Some("ffn_norm"),
                "post_feedforward_layernorm" => Some("post_ffw_norm"),
                _ => None,
            })?;
            return Some(format!("blk.{layer}.{short}.{kind}"));
        }
    };
    Some(whole.to_owned())
}
