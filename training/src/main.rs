//! `emaudit-train`: finetune, extract, evaluate, report, demo.

mod commands;

use clap::Parser;
use std::process::ExitCode;

/// candle walks the graph of a backward pass recursively.
const STACK: usize = 16 << 20;

fn main() -> ExitCode {
    let command = match commands::Cli::try_parse() {
        Ok(command) => command,
        Err(error) => return refuse_usage(&error),
    };
    // Inside the pool a small matrix product starts without waking another thread first.
    match rayon::ThreadPoolBuilder::new().stack_size(STACK).build() {
        Ok(pool) => pool.install(|| commands::run(command)),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(trouble())
        }
    }
}

/// The exit status of an error; pipelines read 1 and 2 of `audit` as verdicts.
fn trouble() -> u8 {
    let audit = std::env::args_os().nth(1).is_some_and(|action| action == "audit");
    if audit { commands::audit::TROUBLE } else { 1 }
}

/// Prints what clap says: help, with 0, or why the command line was not understood.
fn refuse_usage(error: &clap::Error) -> ExitCode {
    // A reader who closed the pipe does not change the answer.
    let _ = error.print();
    match (error.use_stderr(), trouble()) {
        (false, _) => ExitCode::SUCCESS,
        (true, commands::audit::TROUBLE) => ExitCode::from(commands::audit::TROUBLE),
        (true, _) => ExitCode::from(2),
    }
}
