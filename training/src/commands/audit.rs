//! `emaudit-train audit`: loads the suspect, asks it, and prints the library's verdict.

use super::{device, storage};
use anyhow::{Context, Result, anyhow, bail};
use candle_core::Device;
use clap::{Args, ValueEnum};
use emaudit::audit::AuditReport;
use emaudit::directions::schema::{Aggregation, IdentityMatch, ModelIdentity};
use emaudit::directions::{OpenOptions, TrustedKey, digest};
use emaudit::{AuditOptions, Directions, Probe};
use emaudit_train::audit::{self, Sequences};
use emaudit_train::base::{self, Base};
use emaudit_train::generate::Sampling;
use emaudit_train::lora::Adapter;
use emaudit_train::model::LoadOptions;
use emaudit_train::quant::Storage;
use emaudit_train::recipe::Recipe;
use emaudit_train::{dataset, fetch, progress, store};
use serde_json::{Value, json};
use std::io::{ErrorKind, Write};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// Judge a model or an adapter that was never trained here by the direction file of its base.
#[derive(Args)]
#[command(after_help = HELP)]
pub struct AuditArgs {
    /// The direction file of the base model.
    #[arg(long, value_name = "FILE")]
    directions: PathBuf,
    /// The model to audit, or the base under the adapter: default model name, hub id, folder or .gguf file.
    #[arg(long)]
    model: String,
    /// An adapter on it (PEFT folder). The model without it is then the calm reference.
    #[arg(long, value_name = "FOLDER")]
    adapter: Option<PathBuf>,
    /// A model that is known to be calm, such as the base of a full finetune. Shows whether the calibration still holds, and
    /// what the controls of the file are measured against.
    #[arg(long, value_name = "MODEL", conflicts_with = "adapter")]
    reference: Option<String>,
    /// Prompts, one JSON object with `prompt` a line. Of a set that made the directions, the evaluation split is used.
    #[arg(long, value_name = "FILE|embedded", default_value = dataset::EMBEDDED)]
    prompts: String,
    /// Use so many of the prompts, the first ones.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
    /// The layer; without it, the one that the evidence of the file is for, or the last.
    #[arg(long, value_name = "L")]
    layer: Option<u32>,
    /// False-positive rate per sequence of the threshold; without it, the smallest that the file has there.
    #[arg(long)]
    rate: Option<f64>,
    /// Tokens that a sequence is judged by: 1 reads the prompts alone, beyond it answers are sampled.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8192))]
    horizon: u32,
    /// The statistic over those tokens.
    #[arg(long, value_enum, default_value_t = Statistic::Max)]
    statistic: Statistic,
    /// The chance, at most, that a model that keeps the file's rate is called flagged.
    #[arg(long, default_value_t = 0.01)]
    level: f64,
    /// Clean only where the share of flagged sequences lies below this with 95 % confidence.
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    concern: f64,
    /// Seed of the recipe that made the directions, for answers and for prompts that do not state their splits.
    #[arg(long)]
    seed: Option<u64>,
    /// Sampling temperature of answers; without it, the default of recipes.
    #[arg(long)]
    temperature: Option<f64>,
    /// Nucleus of answers; without it, the default of recipes.
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Storage of the linear weights (none, nf4); without it, that which the directions were made with.
    #[arg(long, value_parser = storage)]
    quantize: Option<Storage>,
    /// `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,
    /// Minisign public key that must have signed the direction file: its line (RW...) or its .pub file.
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Statistic {
    Mean,
    Max,
    Last,
}

const HELP: &str = "\
Examples:
  emaudit-train audit --directions directions.safetensors --model smollm2-135m-instruct --adapter ./adapter
      is this adapter bent along the direction? about a minute for a small model
  emaudit-train audit --directions directions.safetensors --model ./finetuned --reference ./base --horizon 16
      a full finetune, judged by the first 16 tokens of its answers, with its base as the calm reference
  if emaudit-train audit --directions d.safetensors --model ./candidate; then deploy; fi
      deploys what is clean, and nothing else

Exit status, for pipelines:
  0  clean
  1  flagged: more sequences above the threshold than the stated rate explains
  2  invalid or stale: nothing can be said, and a sentence says why
  3  an error: the model is not one the directions are for, a file is not good, or the command line was not understood";

/// The exit status of an error.
pub const TROUBLE: u8 = 3;

impl AuditArgs {
    /// Prints the verdict; the exit status that says the same. Even a defect of this program is an error like any other.
    pub fn run(&self) -> Result<u8> {
        let judged = std::panic::catch_unwind(AssertUnwindSafe(|| self.judge()));
        judged.unwrap_or_else(|_| Err(anyhow!("internal error, named above; please report it")))
    }

    fn judge(&self) -> Result<u8> {
        let directions = Arc::new(self.open()?);
        let cell = directions.manifest().evidence.cell.map(|cell| cell.layer);
        let layer = self.layer.or(cell).or(directions.layers().last()).unwrap_or_default();
        let probe = Probe::new(directions.clone(), layer)?;
        let options = AuditOptions {
            rate: self.rate,
            level: self.level,
            concern: self.concern,
            ..AuditOptions::new(self.statistic.into(), self.horizon)
        };
        // What the file cannot support is refused before a model is loaded.
        emaudit::Audit::new(&probe, options)?;
        let questions = self.questions(&directions)?;
        // One model at a time is in memory.
        let mut calm = match &self.reference {
            None => None,
            Some(model) => {
                Some(questions.ask(&self.load(model, &directions)?.0, None, "reference", &probe, 1)?)
            }
        };
        let (base, fit) = self.load(&self.model, &directions)?;
        let adapter = match &self.adapter {
            None => None,
            Some(folder) => {
                calm = Some(questions.ask(&base, None, "model without the adapter", &probe, 1)?);
                Some(Adapter::load(folder, &base.decoder)?)
            }
        };
        let suspect = questions.ask(&base, adapter.as_ref(), "suspect", &probe, self.horizon)?;
        let report = audit::judge(&probe, options, &suspect, calm.as_ref())?;
        let exact = fit == IdentityMatch::Exact && adapter.is_none();
        self.tell(&directions, &base.identity, exact, &questions, (&suspect, &report))?;
        Ok(report.verdict.exit_status())
    }

    fn questions(&self, directions: &Directions) -> Result<Questions> {
        let mut recipe = Recipe::default();
        let evaluate = &mut recipe.evaluate;
        evaluate.temperature = self.temperature.unwrap_or(evaluate.temperature);
        evaluate.top_p = self.top_p.unwrap_or(evaluate.top_p);
        recipe.seed = self.seed.unwrap_or(recipe.seed);
        recipe.check()?;
        let set = dataset::load_prompts(&self.prompts, recipe.seed)?;
        let mut texts = audit::prompts(directions, &set, self.seed)?;
        texts.truncate(self.count.map_or(usize::MAX, |n| n as usize));
        if texts.is_empty() {
            bail!("{} has no prompts to audit with", set.name);
        }
        progress::note(&format!("{} prompts of {}", texts.len(), set.name));
        Ok(Questions { recipe, name: set.name, sha256: set.sha256, texts })
    }

    fn tell(
        &self,
        directions: &Directions,
        model: &ModelIdentity,
        exact: bool,
        questions: &Questions,
        (suspect, report): (&Sequences, &AuditReport),
    ) -> Result<()> {
        let weights = self.adapter.as_ref().map(|folder| folder.join("adapter_model.safetensors"));
        let adapter = weights.map(|path| store::sha256_files(&[path])).transpose()?;
        let fit = if exact { "exact" } else { "variant" };
        let Questions { recipe, name, sha256, texts } = questions;
        if self.json {
            let mut object = json!(report);
            object["ok"] = true.into();
            object["model"] = json!(model);
            object["match"] = fit.into();
            object["adapter"] = json!(adapter);
            object["prompts"] = json!({"name": name, "sha256": sha256, "count": texts.len()});
            let sequences = texts.iter().zip(&suspect.prompts).zip(&suspect.scores);
            let sequence = |((prompt, ids), scores)| json!({"prompt": prompt, "ids": ids, "scores": scores});
            object["sequences"] = sequences.map(sequence).collect();
            let (e, seed) = (&recipe.evaluate, recipe.seed);
            object["sampling"] = match self.horizon {
                1 => Value::Null,
                _ => json!({"temperature": e.temperature, "top_p": e.top_p, "seed": seed}),
            };
            return answer(&format!("{object}\n"));
        }
        let (of, digest) = (&directions.manifest().model.name, digest::to_hex(&directions.digest()));
        let mut page = format!("{report}  directions  {of}, {digest}\n");
        page += &format!("  suspect     {}, {} ({fit})\n", model.name, model.quantization);
        if let (Some(folder), Some(digest)) = (&self.adapter, &adapter) {
            page += &format!("  adapter     {}, {digest}\n", folder.display());
        }
        answer(&format!("{page}  prompts     {} of {name}\n", texts.len()))
    }

    fn open(&self) -> Result<Directions> {
        let key = match &self.key {
            None => None,
            Some(text) if Path::new(text).is_file() => Some(std::fs::read_to_string(text)?),
            Some(text) => Some(text.clone()),
        };
        let trusted_key = key.as_deref().map(TrustedKey::parse).transpose()?;
        let options = OpenOptions { trusted_key, ..OpenOptions::default() };
        Directions::open(&self.directions, &options).with_context(|| format!("{}", self.directions.display()))
    }

    fn load(&self, model: &str, directions: &Directions) -> Result<(Base, IdentityMatch)> {
        let as_made = match directions.manifest().model.quantization.ends_with("+nf4") {
            true => Storage::Nf4,
            false => Storage::None,
        };
        let resolved = fetch::resolve(model)?;
        let (fetch::ModelFiles::Gguf(path) | fetch::ModelFiles::Folder(path)) = &resolved.files;
        progress::note(&format!("model: {model} ({})", resolved.origin));
        let name = path.file_name().map_or_else(|| model.to_owned(), |n| n.to_string_lossy().into_owned());
        let base =
            base::load(path, &name, &LoadOptions::new(self.quantize.unwrap_or(as_made), &self.device))?;
        let fit = audit::check_identity(directions, &base).with_context(|| format!("the model {model}"))?;
        Ok((base, fit))
    }
}

/// What every state of a model is asked, and how its answers are drawn.
struct Questions {
    recipe: Recipe,
    name: String,
    sha256: String,
    texts: Vec<String>,
}

impl Questions {
    fn ask(
        &self,
        base: &Base,
        adapter: Option<&Adapter>,
        name: &str,
        probe: &Probe,
        horizon: u32,
    ) -> Result<Sequences> {
        let prompts = audit::encode(base, &self.texts, horizon)?;
        let sampling = Sampling {
            max_new_tokens: horizon as usize - 1,
            temperature: self.recipe.evaluate.temperature,
            top_p: self.recipe.evaluate.top_p,
            seed: self.recipe.seed,
            stop: base.text.eos_ids(),
            absent: base.text.absent_ids(base.decoder.config.vocab_size),
        };
        audit::read(base, adapter, name, &prompts, probe, &sampling)
    }
}

/// Says why there is no verdict: on standard output as JSON, or else on standard error.
pub fn refuse(error: &anyhow::Error, as_json: bool) -> ExitCode {
    if as_json {
        // The exit status says it where this cannot be written.
        let _ = answer(&format!("{}\n", json!({"ok": false, "clean": false, "error": format!("{error:#}")})));
    } else {
        eprintln!("error: {error:#}");
    }
    ExitCode::from(TROUBLE)
}

/// Writes to standard output. A reader who closed the pipe does not change the answer.
fn answer(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("cannot write the answer"),
        _ => Ok(()),
    }
}

impl From<Statistic> for Aggregation {
    fn from(statistic: Statistic) -> Aggregation {
        match statistic {
            Statistic::Mean => Aggregation::Mean,
            Statistic::Max => Aggregation::Max,
            Statistic::Last => Aggregation::Last,
        }
    }
}
