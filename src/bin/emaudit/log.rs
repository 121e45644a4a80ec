//! `emaudit log verify`: does the chain of an audit log hold?

use crate::output::{Answer, finish};
use clap::{Args, Subcommand};
use emaudit::directions::digest::{from_hex, to_hex};
use emaudit::{Result, log};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

/// Audit logs: verdicts as lines of JSON, each with the hash of the line before.
#[derive(Args)]
pub struct Log {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    Verify(Verify),
}

/// Check a log from its first line to its last, and print the hash of the last one.
#[derive(Args)]
#[command(after_help = HELP)]
struct Verify {
    /// The log.
    file: PathBuf,
    /// Hash that a line must have: the head of the log at an earlier time, kept elsewhere.
    ///
    /// Without it, a log whose end was cut off, or that was written anew, looks whole.
    #[arg(long, value_name = "HEX")]
    head: Option<String>,
    /// Print one JSON object on standard output, good or bad.
    #[arg(long)]
    json: bool,
}

const HELP: &str = "\
Examples:
  emaudit log verify audit.jsonl
      exit status 0 only if no line was changed, taken out, put in or moved
  emaudit log verify audit.jsonl --head \"$KEPT\"
      and if the log still holds all that it held when that hash was its head

Exit status:
  0  the chain holds
  1  it does not, or the file could not be read; the sentence names the first bad line
  2  the command line was not understood";

impl Log {
    pub fn run(&self) -> ExitCode {
        let Action::Verify(verify) = &self.action;
        finish(verify.answer(), verify.json, 1)
    }
}

impl Verify {
    fn answer(&self) -> Result<Answer> {
        let head = self.head.as_deref().map(from_hex).transpose()?;
        let chain = log::verify(&self.file, head)?;
        let head = to_hex(&chain.head);
        let page =
            format!("{}: {} records, the chain holds\nhead {head}\n", self.file.display(), chain.records);
        Ok(Answer::good(page, json!({ "records": chain.records, "head": head })))
    }
}
