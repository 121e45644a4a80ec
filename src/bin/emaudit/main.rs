//! The `emaudit` command: looks into direction files and says whether they are good.

mod inspect;
mod output;
mod verify;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Direction files of emaudit: what is in them, and are they good?
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
}

const HELP: &str = "\
Examples:
  emaudit inspect model.directions.safetensors
      what model, which layers, which thresholds, and what speaks for the directions
  emaudit verify model.directions.safetensors --digest \"$PINNED\"
      exit status 0 only if the file is the one you pinned and keeps every rule
  emaudit verify model.directions.safetensors --json | jq .digest
      the same for programs: one JSON object on standard output, good or bad

Exit status:
  0  the file is good
  1  it is not, or could not be read; one sentence on standard error says why
  2  the command line was not understood";

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Inspect(inspect) => inspect.run(),
        Command::Verify(verify) => verify.run(),
    }
}
