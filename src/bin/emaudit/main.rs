//! The `emaudit` command: looks into direction files, says whether they are good, and puts them to use by hand.

mod arrays;
mod bench;
mod convert;
mod diff;
mod inspect;
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
    Diff(diff::Diff),
    Bench(bench::Bench),
    Convert(convert::Convert),
}

const HELP: &str = "\
Examples:
  emaudit inspect model.directions.safetensors
      what model, which layers, which thresholds, and what speaks for the directions
  emaudit verify model.directions.safetensors --digest \"$PINNED\"
      exit status 0 only if the file is the one you pinned and keeps every rule
  emaudit score model.directions.safetensors --layer 12 --rate 0.01 rows.npy
      saved activations to scores, clean or flagged
  emaudit diff old.directions.safetensors new.directions.safetensors
      what changed, layer by layer
  emaudit convert export model.directions.safetensors --layers 29 --to away.gguf
      a control vector for llama.cpp; import brings vectors of other tools in
  emaudit bench model.directions.safetensors
      how fast that is here

Every command prints JSON with --json. The help of each says more, with examples: emaudit score --help

Exit status:
  0  good
  1  not good, or it could not be read; one sentence on standard error says why
  2  the command line was not understood
  diff and score have more, see their help";

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Inspect(inspect) => inspect.run(),
        Command::Verify(verify) => verify.run(),
        Command::Score(score) => score.run(),
        Command::Diff(diff) => diff.run(),
        Command::Bench(bench) => bench.run(),
        Command::Convert(convert) => convert.run(),
    }
}
