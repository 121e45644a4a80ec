//! `emaudit-train study`.

use super::device;
use anyhow::Result;
use candle_core::Device;
use clap::Args;
use emaudit_train::judge::Judge;
use emaudit_train::study::Study;
use emaudit_train::study::plan::{self, Planned};
use emaudit_train::study::recipe::StudyRecipe;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  emaudit-train study families.toml --plan             what would run, and about how long it takes
  emaudit-train study families.toml                    everything that is not done yet
  emaudit-train study families.toml --stage smollm2-17-finetune-verse
                                                       one stage, as a job scheduler would run it
  EMAUDIT_JUDGE_KEY=... emaudit-train study families.toml --judge https://host/v1 --judge-model NAME
                                                       the same, with sampled answers judged there

Every stage writes one small record into DIR/records, named by the digest of all it depends on: nothing runs twice, a
changed key of the recipe runs again only what depends on it, and several processes or machines that share DIR can
run the same study, each taking what nobody else has.";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct StudyArgs {
    /// The study's recipe (TOML): name, seeds, [recipe], [regimes], [[models]].
    recipe: String,
    /// Folder for everything that is written.
    #[arg(long, default_value = "emaudit-study", value_name = "DIR")]
    out: PathBuf,
    /// Print the stages, their state and what they take, and run nothing.
    #[arg(long)]
    plan: bool,
    /// Run this stage alone; what it needs must be done.
    #[arg(long, conflicts_with = "plan")]
    stage: Option<String>,
    /// `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,
    /// Finetune even where the memory will not do by the estimate.
    #[arg(long)]
    ignore_memory: bool,
    /// Where an OpenAI-compatible API begins, such as http://localhost:8000/v1: sampled answers to the published questions are
    /// judged there with the published prompts. The environment's EMAUDIT_JUDGE_KEY is sent as the key.
    #[arg(long, value_name = "URL", requires = "judge_model")]
    judge: Option<String>,
    /// The judge's name there.
    #[arg(long, value_name = "MODEL", requires = "judge")]
    judge_model: Option<String>,
    /// The plan as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn study(args: StudyArgs) -> Result<()> {
    let recipe = StudyRecipe::load(&args.recipe)?;
    let judge = match (&args.judge, &args.judge_model) {
        (Some(url), Some(model)) => Some(Judge::new(url, model)?),
        _ => None,
    };
    let mut study = Study::open(recipe, &args.out, args.device, args.ignore_memory, !args.plan, judge)?;
    if args.plan {
        let planned = study.plan()?;
        if args.json {
            println!("{}", serde_json::to_string_pretty(&planned)?);
            return Ok(());
        }
        let command = |p: &Planned| {
            format!(
                "emaudit-train study {} --out {} --stage {}",
                args.recipe,
                args.out.display(),
                p.node.name
            )
        };
        print!("{}", plan::table(&planned, command));
        return Ok(());
    }
    match args.stage {
        Some(stage) => study.run_stage(&stage),
        None => {
            let ran = study.run()?;
            println!("{} stages run here; {} holds everything", ran.len(), args.out.display());
            Ok(())
        }
    }
}
