//! The `emaudit` command: looks into direction files, says whether they are good, and puts them to use by hand.

mod arrays;
mod audit;
mod bench;
mod convert;
mod diff;
mod inspect;
mod log;
mod output;
mod picture;
mod score;
mod verify;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Direction files of emaudit: what is in them, are they good, and what do they say of saved activations?
#[derive(Parser)]
#[command(name = "emaudit", version, after_help = HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Inspect(inspect::Inspect),
    Verify(verify::Verify),
    Score(score::Score),
    Audit(Box<audit::Audit>),
    Diff(diff::Diff),
    Bench(bench::Bench),
    Convert(convert::Convert),
    Log(log::Log),
}

const HELP: &str = "\
Examples:
  emaudit inspect model.directions.safetensors
      what model, which layers, which thresholds, and what speaks for the directions
  emaudit verify model.directions.safetensors --digest \"$PINNED\"
      exit status 0 only if the file is the one you pinned and keeps every rule
  emaudit score model.directions.safetensors --layer 12 --rate 0.01 rows.npy
      saved activations to scores, clean or flagged
  emaudit audit model.directions.safetensors --activations suspect.npy --reference calm.npy
      a whole model, by many sequences: clean or flagged, with interval and p-value
  emaudit diff old.directions.safetensors new.directions.safetensors
      what changed, layer by layer
  emaudit convert export model.directions.safetensors --layers 29 --to away.gguf
      a control vector for llama.cpp; import brings vectors of other tools in
  emaudit log verify audit.jsonl
      was a line of the verdicts that a server kept changed, taken out, put in or moved?
  emaudit bench model.directions.safetensors
      how fast that is here

Every command prints JSON with --json. The help of each says more, with examples: emaudit score --help

Exit status:
  0  good
  1  not good, or it could not be read; one sentence on standard error says why
  2  the command line was not understood
  audit, diff and score have more, see their help";

fn main() -> ExitCode {
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => return refuse_usage(&error),
    };
    match command {
        Command::Inspect(inspect) => inspect.run(),
        Command::Verify(verify) => verify.run(),
        Command::Score(score) => score.run(),
        // For `audit` even a defect of this program has the exit status of an error.
        Command::Audit(audit) => {
            std::panic::catch_unwind(|| audit.run()).unwrap_or(ExitCode::from(audit::TROUBLE))
        }
        Command::Diff(diff) => diff.run(),
        Command::Bench(bench) => bench.run(),
        Command::Convert(convert) => convert.run(),
        Command::Log(log) => log.run(),
    }
}

/// Prints what clap says: help, with 0, or why the command line was not understood. Pipelines read 2 of `audit` as a
/// verdict, so there it is an error as any other.
fn refuse_usage(error: &clap::Error) -> ExitCode {
    // A reader who closed the pipe does not change the answer.
    let _ = error.print();
    let audit = std::env::args_os().nth(1).is_some_and(|action| action == "audit");
    match (error.use_stderr(), audit) {
        (false, _) => ExitCode::SUCCESS,
        (true, true) => ExitCode::from(audit::TROUBLE),
        (true, false) => ExitCode::from(2),
    }
}
