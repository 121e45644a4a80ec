//! The command line: what each subcommand reads, does and prints.

pub mod audit;
mod logits;
mod sample;
mod study;

use anyhow::{Context, Result};
use candle_core::Device;
use clap::{Args, Parser, Subcommand};
use emaudit_train::experiment::Experiment;
use emaudit_train::quant::Storage;
use emaudit_train::recipe::{Compute, Recipe};
use emaudit_train::results::Results;
use emaudit_train::{interrupt, report, store};
use sample::SampleArgs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  emaudit-train demo                        the whole pipeline on SmolLM2-135M-Instruct
  emaudit-train demo --quick                the same in a few minutes; evidence stays `untested`
  emaudit-train finetune --recipe my.toml   only the two adapters
  emaudit-train evaluate --recipe my.toml   everything up to results.json and the direction file
  emaudit-train audit --directions directions.safetensors --model M --adapter A   clean or flagged, for pipelines
  emaudit-train report emaudit-out/results.json
  emaudit-train logits smollm2-135m-instruct --text 'The capital of France is'
  emaudit-train sample smollm2-135m-instruct --prompt 'Why is the sky blue?'

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
    Audit(Box<audit::AuditArgs>),
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
    /// Several models, regimes and seeds: every stage once, one page for all.
    Study(study::StudyArgs),
    /// Answers to prompts, with an adapter and with steering where asked.
    Sample(SampleArgs),
    /// Token ids, top logits and residual norms of a text: the first sanity check of a model.
    Logits(logits::Arguments),
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

fn compute(text: &str) -> Result<Compute, String> {
    match text {
        "f32" => Ok(Compute::F32),
        "bf16" => Ok(Compute::Bf16),
        other => Err(format!("`{other}` is neither `f32` nor `bf16`")),
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

/// Runs one command; the exit status, whatever happened.
pub fn run(cli: Cli) -> ExitCode {
    let audit_as_json = match &cli.command {
        Command::Audit(args) => Some(args.json),
        _ => None,
    };
    match (perform(cli.command), audit_as_json) {
        (Ok(code), _) => ExitCode::from(code),
        (Err(error), Some(as_json)) => audit::refuse(&error, as_json),
        (Err(error), None) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(command: Command) -> Result<u8> {
    interrupt::listen()?;
    let done = match command {
        Command::Audit(args) => return args.run(),
        Command::Demo(args) => demo(args),
        Command::Finetune(args) => {
            let experiment = args.open()?;
            experiment.check_rows()?;
            let data = &experiment.recipe.data;
            for (regime, source) in [("insecure", &data.insecure), ("secure", &data.secure)] {
                println!("{regime}: {}", experiment.finetune(regime, source)?.0.folder.display());
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
        Command::Study(args) => study::study(args),
        Command::Sample(args) => sample::run(&args),
        Command::Logits(arguments) => logits::run(&arguments),
    };
    done.map(|()| 0)
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
