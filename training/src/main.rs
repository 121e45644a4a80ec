//! `emaudit-train`: finetune, extract, evaluate, report, demo.

mod commands;

use clap::Parser;

/// candle walks the graph of a backward pass recursively.
const STACK: usize = 16 << 20;

fn main() -> std::process::ExitCode {
    let command = commands::Cli::parse();
    // Inside the pool a small matrix product starts without waking another thread first.
    let pool = rayon::ThreadPoolBuilder::new().stack_size(STACK).build();
    match pool.map_err(anyhow::Error::from).and_then(|pool| pool.install(|| commands::run(command))) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
