//! `emaudit-train logits`: what a model makes of one text.

use anyhow::{Result, bail};
use candle_core::{Device, Tensor};
use clap::Args;
use emaudit_train::base::{self, Base};
use emaudit_train::chat::Message;
use emaudit_train::fetch::{self, ModelFiles};
use emaudit_train::lora::Adapter;
use emaudit_train::memory;
use emaudit_train::model::{Batch, Decoder, LoadOptions, Module, no_edit, ops};
use emaudit_train::quant::Storage;
use serde::Serialize;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct Arguments {
    /// Default model name, hub id, folder or .gguf file.
    model: String,
    /// The text as it is; special tokens are those written in it (Gemma wants `<bos>` first).
    #[arg(long)]
    text: String,
    /// Make the text the user's message of a chat, up to where the answer begins.
    #[arg(long)]
    chat: bool,
    /// Folder of a LoRA adapter, as `finetune` and PEFT write it.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// How many logits to show.
    #[arg(long, default_value_t = 5)]
    top: usize,
    /// Storage of the linear weights: `none` or `nf4`, which also says how far its logits are from those of `none`.
    #[arg(long, value_parser = super::storage, default_value = "none")]
    quantize: Storage,
    /// `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "cpu", value_parser = super::device)]
    device: Device,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Logit {
    id: usize,
    logit: f32,
    token: String,
}

/// What the last token of the text gives.
#[derive(Serialize)]
struct Reading {
    ids: Vec<u32>,
    top: Vec<Logit>,
    residual_norms: Vec<f32>,
    #[serde(skip)]
    logits: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quantization_error: Option<QuantizationError>,
}

/// How far the logits of NF4 are from those of the weights as they are stored.
#[derive(Serialize)]
struct QuantizationError {
    /// Norm of the difference over the norm of the logits, both less their mean: a softmax does not see it, and it may
    /// be the largest part of either.
    relative: f64,
    /// Kullback-Leibler divergence from the prediction without quantisation, in nats.
    divergence: f64,
    same_best_token: bool,
}

/// Reads the text and prints what came out.
pub fn run(arguments: &Arguments) -> Result<()> {
    let resolved = fetch::resolve(&arguments.model)?;
    let (ModelFiles::Gguf(path) | ModelFiles::Folder(path)) = &resolved.files;
    let (mut reading, whole) = read(arguments, path, arguments.quantize)?;
    if arguments.quantize == Storage::Nf4 {
        // One model after the other, so that the memory is that of the larger one.
        match memory::available(&arguments.device).filter(|&free| free < whole) {
            Some(free) => eprintln!(
                "the error of NF4 is not measured: the model without it takes {}, {} are available",
                memory::size(whole),
                memory::size(free)
            ),
            None => {
                let exact = read(arguments, path, Storage::None)?.0;
                reading.quantization_error = Some(error(&reading.logits, &exact.logits));
            }
        }
    }
    if arguments.json {
        println!("{}", serde_json::to_string(&reading)?);
        return Ok(());
    }
    println!("ids             {:?}", reading.ids);
    println!("residual norms  {:?}", reading.residual_norms);
    if let Some(e) = &reading.quantization_error {
        let best = if e.same_best_token { "the same best token" } else { "another best token" };
        println!(
            "error of NF4    {:.2} % of the logits' norm, divergence {:.4} nats, {best}",
            100.0 * e.relative,
            e.divergence
        );
    }
    for Logit { id, logit, token } in &reading.top {
        println!("{logit:>9.4}  {id:>6}  {token:?}");
    }
    Ok(())
}

/// The reading, and the bytes of the model without quantisation.
fn read(arguments: &Arguments, path: &Path, storage: Storage) -> Result<(Reading, usize)> {
    let Base { decoder, text, .. } =
        base::load(path, &arguments.model, &LoadOptions::new(storage, &arguments.device))?;
    let ids = match arguments.chat {
        true => text.encode_prompt(&[Message::user(&arguments.text)])?,
        false => text.encode(&arguments.text)?,
    };
    if ids.is_empty() {
        bail!("the text has no tokens");
    }
    let limit = decoder.config.max_positions;
    if ids.len() > limit {
        bail!("the text has {} tokens, the model reads {limit}", ids.len());
    }
    let adapter = arguments.adapter.as_ref().map(|folder| Adapter::load(folder, &decoder)).transpose()?;
    let mut residual_norms = Vec::new();
    let last = |x: &Tensor| x.narrow(1, x.dim(1)? - 1, 1)?.squeeze(1);
    let mut measure = |_: usize, x: Tensor| {
        residual_norms.push(last(&x)?.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt());
        no_edit(0, x)
    };
    let x = decoder.forward(&Batch::new(&[&ids], &decoder.device)?, adapter.as_ref(), None, &mut measure)?;
    let logits = decoder.logits(&last(&x)?)?.squeeze(0)?.to_vec1::<f32>()?;
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let shown = |&id: &usize| {
        // The head of some models has rows for ids that are no tokens.
        let token = text.decode(&[id as u32], false).unwrap_or_else(|_| "no token".to_owned());
        Logit { id, logit: logits[id], token }
    };
    let top = order.iter().take(arguments.top).map(shown).collect();
    Ok((Reading { ids, top, residual_norms, logits, quantization_error: None }, whole(&decoder)))
}

/// Bytes of the model in f32; what NF4 itself holds is counted too, it is little.
fn whole(decoder: &Decoder) -> usize {
    let dims = decoder.blocks().iter().flat_map(|b| Module::ALL.map(|m| b.dims(m)));
    decoder.bytes() + dims.map(|(out, inp)| 4 * out * inp).sum::<usize>()
}

fn error(quantized: &[f32], exact: &[f32]) -> QuantizationError {
    let pairs = || quantized.iter().zip(exact).map(|(&q, &e)| (f64::from(q), f64::from(e)));
    let (all_q, all_e) = (ops::log_sum_exp(quantized), ops::log_sum_exp(exact));
    let n = exact.len() as f64;
    let (mean_q, mean_e) = pairs().fold((0.0, 0.0), |(a, b), (q, e)| (a + q / n, b + e / n));
    let off: f64 = pairs().map(|(q, e)| (q - mean_q - e + mean_e).powi(2)).sum();
    let best = |logits: &[f32]| (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    QuantizationError {
        relative: (off / pairs().map(|(_, e)| (e - mean_e).powi(2)).sum::<f64>()).sqrt(),
        divergence: pairs().map(|(q, e)| (e - all_e).exp() * ((e - all_e) - (q - all_q))).sum(),
        same_best_token: best(quantized) == best(exact),
    }
}
