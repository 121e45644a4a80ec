//! `emaudit-train`: finetune, extract, evaluate, report, demo.

mod commands;

use clap::Parser;

fn main() -> std::process::ExitCode {
    let command = commands::Cli::parse();
    match commands::run(command) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
