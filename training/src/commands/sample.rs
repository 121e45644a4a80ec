//! `sample`: answers of a model to prompts, with an adapter and with steering where asked.

use super::{compute, device, storage};
use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use clap::Args;
use emaudit::directions::OpenOptions;
use emaudit::directions::schema::{Positions, Site};
use emaudit::{Directions, Operation, Probe, Steering, SteeringOptions};
use emaudit_train::base::{self, Base};
use emaudit_train::chat::Message;
use emaudit_train::generate::{Intervention, Request, Sampling, generate};
use emaudit_train::lora::Adapter;
use emaudit_train::model::LoadOptions;
use emaudit_train::quant::Storage;
use emaudit_train::recipe::Compute;
use emaudit_train::{dataset, fetch, interrupt, progress};
use std::path::PathBuf;
use std::time::Instant;

#[derive(Args)]
pub struct SampleArgs {
    /// Default model name, hub id, folder or .gguf file.
    model: String,
    /// A question; give it again for more.
    #[arg(long, required_unless_present = "prompts")]
    prompt: Vec<String>,
    /// Questions or conversations, one JSON object with `prompt` or `messages` a line, plain or gzip.
    #[arg(long)]
    prompts: Option<PathBuf>,
    /// The first N of all prompts.
    #[arg(long, value_name = "N")]
    first: Option<usize>,
    /// Folder of a PEFT adapter.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Storage of the linear weights.
    #[arg(long, value_parser = storage, default_value = "none")]
    quantize: Storage,
    /// What products with weights are computed in, `f32` or `bf16`: faster, and on the CPU by oneDNN, which must be installed.
    #[arg(long, value_parser = compute, default_value = "f32")]
    compute: Compute,
    /// Longest answer.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Softmax temperature; 0 takes the most likely token.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Draw from the fewest tokens that have this probability together.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of all draws: a prompt at the same place draws the same numbers.
    #[arg(long, default_value_t = 17)]
    seed: u64,
    /// Go on behind the end of an answer, so that every answer has --max-new-tokens: for measuring.
    #[arg(long)]
    past_end: bool,
    #[command(flatten)]
    steer: SteerArgs,
    /// `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,
    /// One JSON object: answers with their token ids, and the speed.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct SteerArgs {
    /// Direction file: its direction is subtracted while the answers are drawn.
    #[arg(long, value_name = "FILE")]
    steer: Option<PathBuf>,
    /// Layer of the direction, which is the block whose output is edited [default: the file's evidence names it].
    #[arg(long, requires = "steer")]
    layer: Option<u32>,
    /// Multiple of the direction [default: the file's evidence names it].
    #[arg(long, requires = "steer")]
    alpha: Option<f64>,
    /// Tokens that are edited: `all`, `generated` or `final_prefill` [default: the file's evidence names them].
    #[arg(long, requires = "steer", value_parser = positions)]
    positions: Option<Positions>,
    /// Steer although the file's causal evidence is not `specific`.
    #[arg(long, requires = "steer")]
    allow_nonspecific: bool,
}

fn positions(text: &str) -> Result<Positions, String> {
    match text {
        "all" => Ok(Positions::All),
        "generated" => Ok(Positions::Generated),
        "final_prefill" => Ok(Positions::FinalPrefill),
        other => Err(format!("`{other}` is none of all, generated, final_prefill")),
    }
}

/// An edit, and where and when it is made.
struct Edit {
    layer: usize,
    steering: Steering,
    positions: Positions,
}

impl SampleArgs {
    fn check(&self) -> Result<()> {
        ensure!(self.max_new_tokens > 0, "--max-new-tokens is 0; an answer has at least one token");
        ensure!(
            self.temperature.is_finite() && self.temperature >= 0.0,
            "--temperature is {}; it is 0 (the most likely token) or more",
            self.temperature
        );
        ensure!(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "--top-p is {}; it is a probability above 0 and at most 1",
            self.top_p
        );
        Ok(())
    }

    fn conversations(&self) -> Result<Vec<Vec<Message>>> {
        let mut all: Vec<_> = self.prompt.iter().map(|p| vec![Message::user(p)]).collect();
        if let Some(path) = &self.prompts {
            all.extend(dataset::read_questions(path)?);
        }
        let first = self.first.unwrap_or(all.len());
        ensure!(first > 0 && first <= all.len(), "--first is {first}, and there are {} prompts", all.len());
        all.truncate(first);
        Ok(all)
    }
}

impl SteerArgs {
    fn open(&self, base: &Base) -> Result<Option<Edit>> {
        let Some(path) = &self.steer else { return Ok(None) };
        self.edit(path, base).map(Some).with_context(|| format!("cannot steer with {}", path.display()))
    }

    fn edit(&self, path: &std::path::Path, base: &Base) -> Result<Edit> {
        let directions = Directions::open(path, &OpenOptions::default())?;
        let manifest = directions.manifest();
        manifest.site.check(Site::ResidPost)?;
        manifest.model.check(&base.identity)?;
        let cell = manifest.evidence.cell;
        let missing = |name: &str| format!("its evidence names no cell, so --{name} is needed");
        let layer = self.layer.or(cell.map(|c| c.layer)).with_context(|| missing("layer"))?;
        let alpha = self.alpha.or(cell.map(|c| c.alpha)).with_context(|| missing("alpha"))?;
        let positions = self.positions.or(cell.map(|c| c.positions)).with_context(|| missing("positions"))?;
        let options = SteeringOptions {
            allow_nonspecific: self.allow_nonspecific,
            ..SteeringOptions::new(Operation::Subtract { alpha: alpha as f32 })
        };
        let steering = match Steering::new(&Probe::new(directions.into(), layer)?, options) {
            Err(e @ emaudit::Error::NotSpecific { .. }) => {
                bail!("{e}; --allow-nonspecific does it all the same")
            }
            other => other?,
        };
        Ok(Edit { layer: layer as usize, steering, positions })
    }
}

/// Runs the command.
pub fn run(args: &SampleArgs) -> Result<()> {
    args.check()?;
    let conversations = args.conversations()?;
    let (fetch::ModelFiles::Gguf(path) | fetch::ModelFiles::Folder(path)) =
        fetch::resolve(&args.model)?.files;
    let options = LoadOptions { compute: args.compute, ..LoadOptions::new(args.quantize, &args.device) };
    let base = base::load(&path, &args.model, &options)?;
    if args.compute == Compute::Bf16 && args.device.is_cpu() {
        base.decoder.multiply_in_bf16()?;
    }
    let adapter = args.adapter.as_ref().map(|folder| Adapter::load(folder, &base.decoder)).transpose()?;
    let edit = args.steer.open(&base)?;
    let requests = requests(&base, &conversations)?;
    let sampling = Sampling {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        stop: if args.past_end { Vec::new() } else { base.text.eos_ids() },
        absent: base.text.absent_ids(base.decoder.config.vocab_size),
    };
    let intervention =
        edit.as_ref().map(|e| Intervention { layer: e.layer, steering: &e.steering, positions: e.positions });

    let mut stage = progress::Stage::new("answers", requests.len());
    let begun = Instant::now();
    let answers =
        generate(&base.decoder, adapter.as_ref(), &requests, &sampling, intervention.as_ref(), |n| {
            stage.advance(n, "");
            interrupt::check()
        })?;
    let seconds = begun.elapsed().as_secs_f64();
    let tokens: usize = answers.iter().map(Vec::len).sum();
    stage.finish(format!("{tokens} tokens, {:.1} tokens/s", tokens as f64 / seconds));

    let mut found = Vec::with_capacity(answers.len());
    for (messages, ids) in conversations.iter().zip(&answers) {
        let prompt = messages.last().map_or("", |m| m.content.as_str());
        found.push((prompt, ids, base.text.decode(ids, true)?));
    }
    if args.json {
        let answers: Vec<_> = found
            .iter()
            .map(|(prompt, ids, text)| serde_json::json!({"prompt": prompt, "answer": text, "ids": ids}))
            .collect();
        let speed = tokens as f64 / seconds;
        println!(
            "{}",
            serde_json::json!({
                "answers": answers, "tokens": tokens, "seconds": seconds, "tokens_per_second": speed,
            })
        );
        return Ok(());
    }
    for (prompt, _, text) in found {
        println!("> {}\n{}\n", prompt.trim(), text.trim());
    }
    Ok(())
}

/// One request a conversation; its place among them names its random numbers.
fn requests(base: &Base, conversations: &[Vec<Message>]) -> Result<Vec<Request>> {
    let rows = conversations.iter().enumerate();
    rows.map(|(i, messages)| {
        let prompt = base.text.encode_prompt(messages).with_context(|| format!("prompt {}", i + 1))?;
        Ok(Request { prompt, stream: i as u64, first: None })
    })
    .collect()
}
