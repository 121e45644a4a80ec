//! The command line: what each subcommand reads, does and prints.

use anyhow::{Context, Result, bail};
use candle_core::Device;
use clap::{Args, Parser, Subcommand};
use emaudit_train::dataset::Side;
use emaudit_train::experiment::Experiment;
use emaudit_train::model::{Batch, LoadOptions, no_edit};
use emaudit_train::quant::Storage;
use emaudit_train::recipe::{Compute, Recipe};
use emaudit_train::results::Results;
use emaudit_train::{base, fetch, interrupt, report, store};
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  emaudit-train demo                        the whole pipeline on SmolLM2-135M-Instruct
  emaudit-train demo --quick                the same in a few minutes; evidence stays `untested`
  emaudit-train finetune --recipe my.toml   only the two adapters
  emaudit-train evaluate --recipe my.toml   everything up to results.json and the direction file
  emaudit-train report emaudit-out/results.json
  emaudit-train logits smollm2-135m-instruct --text 'The capital of France is'

A recipe is one TOML file; a key left out has the demo's value. `emaudit-train recipe demo` prints one to start
from. Work already done is reused: run the same command again after an interruption.";

/// Finetune with QLoRA, extract the direction, test it against controls, write a direction file and a report.
#[derive(Parser)]
#[command(name = "emaudit-train", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The whole pipeline with the embedded data, and a short summary.
    Demo(DemoArgs),
    /// Finetune the insecure and the secure adapter (PEFT format).
    Finetune(RunArgs),
    /// Finetune if needed, capture residual rows of all states.
    Extract(RunArgs),
    /// Everything: adapters, directions, controls, results.json, direction file, report.
    Evaluate(RunArgs),
    /// Render report.html from a results.json.
    Report {
        /// The results file.
        results: PathBuf,
        /// Where to write the page [default: report.html beside it].
        #[arg(long)]
        out: Option<PathBuf>,
        /// Also write the README picture (SVG) here.
        #[arg(long)]
        picture: Option<PathBuf>,
    },
    /// Print a preset recipe (demo, quick, thorough) or check a recipe file.
    Recipe {
        /// Preset name or TOML file.
        #[arg(default_value = "demo")]
        recipe: String,
    },
    /// Token ids, top logits and residual norms of a text: the first sanity check of a model.
    Logits {
        /// Default model name, hub id, folder or .gguf file.
        model: String,
        /// The text, without a chat template; special tokens are those written in it (Gemma wants `<bos>` first).
        #[arg(long)]
        text: String,
        /// How many logits to show.
        #[arg(long, default_value_t = 5)]
        top: usize,
        /// Storage of the linear weights.
        #[arg(long, value_parser = storage, default_value = "none")]
        quantize: Storage,
        /// `cpu`, `cuda` or `cuda:N`.
        #[arg(long, default_value = "cpu", value_parser = device)]
        device: Device,
        /// JSON instead of text.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct DemoArgs {
    /// Fewer prompts, steps and controls: about four minutes; the evidence stays `untested`.
    #[arg(long, conflicts_with = "thorough")]
    quick: bool,
    /// The full grid of strengths and positions with 199 controls per family: hours.
    #[arg(long)]
    thorough: bool,
    /// Another model: hub id, folder or .gguf file.
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Args)]
struct RunArgs {
    /// Recipe file, or a preset (demo, quick, thorough).
    #[arg(long, default_value = "demo")]
    recipe: String,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Args)]
struct CommonArgs {
    /// Folder for everything that is written.
    #[arg(long, default_value = "emaudit-out")]
    out: PathBuf,
    /// Throw finished stages away and start over.
    #[arg(long)]
    fresh: bool,
    /// `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,
    /// Finetune even where the memory will not do by the estimate.
    #[arg(long)]
    ignore_memory: bool,
    /// Print the summary as JSON on stdout.
    #[arg(long)]
    json: bool,
}

fn storage(text: &str) -> Result<Storage, String> {
    match text {
        "none" => Ok(Storage::None),
        "nf4" => Ok(Storage::Nf4),
        other => Err(format!("`{other}` is neither `none` nor `nf4`")),
    }
}

fn device(text: &str) -> Result<Device, String> {
    let ordinal = match text {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => 0,
        other => other
            .strip_prefix("cuda:")
            .and_then(|n| n.parse().ok())
            .ok_or_else(|| format!("`{other}` is none of cpu, cuda, cuda:N"))?,
    };
    Device::new_cuda(ordinal)
        .map_err(|e| format!("no CUDA device {ordinal}: {e}; build with --features cuda, or use cpu"))
}

/// Runs one command.
pub fn run(cli: Cli) -> Result<()> {
    interrupt::listen()?;
    match cli.command {
        Command::Demo(args) => demo(args),
        Command::Finetune(args) => {
            let experiment = args.open()?;
            for side in [Side::Insecure, Side::Secure] {
                println!("{side}: {}", experiment.finetune(side)?.0.folder.display());
            }
            Ok(())
        }
        Command::Extract(args) => {
            let experiment = args.open()?;
            let path = experiment.extract()?;
            println!("directions (untested): {}", path.display());
            Ok(())
        }
        Command::Evaluate(args) => {
            let experiment = args.open()?;
            finish(&experiment, args.common.json)
        }
        Command::Report { results, out, picture } => render(&results, out, picture),
        Command::Recipe { recipe } => {
            print!("{}", Recipe::load(&recipe)?.to_toml()?);
            Ok(())
        }
        Command::Logits { model, text, top, quantize, device, json } => {
            logits(&model, &text, top, LoadOptions { storage: quantize, device, compute: Compute::F32 }, json)
        }
    }
}

impl RunArgs {
    fn open(&self) -> Result<Experiment> {
        self.common.open(Recipe::load(&self.recipe)?)
    }
}

impl CommonArgs {
    fn open(&self, recipe: Recipe) -> Result<Experiment> {
        let mut experiment = Experiment::open(recipe, &self.out, self.fresh, self.device.clone())?;
        experiment.ignore_memory = self.ignore_memory;
        Ok(experiment)
    }
}

fn demo(args: DemoArgs) -> Result<()> {
    let mut recipe = match (args.quick, args.thorough) {
        (true, _) => Recipe::quick()?,
        (_, true) => Recipe::thorough()?,
        _ => Recipe::demo()?,
    };
    if let Some(model) = args.model {
        recipe.model.id = model;
    }
    finish(&args.common.open(recipe)?, args.common.json)
}

fn finish(experiment: &Experiment, json: bool) -> Result<()> {
    let (results, outputs) = experiment.run()?;
    if json {
        println!(
            "{}",
            serde_json::to_string_pretty(
                &serde_json::json!({ "summary": results.summary, "outputs": outputs })
            )?
        );
        return Ok(());
    }
    print!("{}", report::terminal(&results));
    println!("\nreport      {}", outputs.report.display());
    println!("directions  {}", outputs.directions.display());
    println!("results     {}", outputs.results.display());
    Ok(())
}

fn render(results: &Path, out: Option<PathBuf>, picture: Option<PathBuf>) -> Result<()> {
    let text =
        std::fs::read_to_string(results).with_context(|| format!("cannot read {}", results.display()))?;
    let parsed: Results = serde_json::from_str(&text)
        .with_context(|| format!("{} is not a results file of this version", results.display()))?;
    let run = std::fs::read_to_string(results.with_file_name("run.json")).ok();
    let run: Option<serde_json::Value> = run.and_then(|t| serde_json::from_str(&t).ok());
    let out = out.unwrap_or_else(|| results.with_file_name("report.html"));
    store::write_file(&out, report::render(&parsed, run.as_ref())?.as_bytes())?;
    println!("{}", out.display());
    if let Some(picture) = picture {
        store::write_file(&picture, report::readme_picture(&parsed)?.as_bytes())?;
        println!("{}", picture.display());
    }
    Ok(())
}

fn logits(model: &str, text: &str, top: usize, options: LoadOptions, json: bool) -> Result<()> {
    let resolved = fetch::resolve(model)?;
    let (fetch::ModelFiles::Gguf(path) | fetch::ModelFiles::Folder(path)) = &resolved.files;
    let base = base::load(path, model, &options)?;
    let ids = base.text.encode(text)?;
    if ids.is_empty() {
        bail!("the text has no tokens");
    }
    let mut norms = Vec::new();
    let batch = Batch::new(&[&ids], &base.decoder.device)?;
    let mut measure = |_: usize, x: candle_core::Tensor| {
        let last = x.narrow(1, x.dim(1)? - 1, 1)?;
        norms.push(last.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt());
        no_edit(0, x)
    };
    let x = base.decoder.forward(&batch, None, None, &mut measure)?;
    let row =
        base.decoder.logits(&x.narrow(1, ids.len() - 1, 1)?.squeeze(0)?)?.squeeze(0)?.to_vec1::<f32>()?;
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    let mut best = Vec::new();
    for &id in order.iter().take(top) {
        // The head of some models has rows for ids that are no tokens.
        let token = base.text.decode(&[id as u32], false).unwrap_or_else(|_| "no token".to_owned());
        best.push((id, row[id], token));
    }
    if json {
        let top: Vec<_> =
            best.iter().map(|(id, l, t)| serde_json::json!({"id": id, "logit": l, "token": t})).collect();
        println!("{}", serde_json::json!({"ids": ids, "top": top, "residual_norms": norms}));
        return Ok(());
    }
    println!("ids             {ids:?}");
    println!("residual norms  {norms:?}");
    for (id, logit, token) in best {
        println!("{logit:>9.4}  {id:>6}  {token:?}");
    }
    Ok(())
}
