//! Where answers go: a page or one JSON object to standard output, a sentence to standard error, and an exit
//! status that says the same. A reader who closes the pipe early changes nothing about the answer.

use emaudit::{Error, Result};
use serde_json::{Value, json};
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

/// An answer in both of its forms.
pub struct Answer {
    /// For people; ends with a line feed.
    pub page: String,
    /// For programs; an object.
    pub object: Value,
}

/// Prints a good answer, or why there is none.
pub fn finish(answer: Result<Answer>, as_json: bool) -> ExitCode {
    let (text, code) = match &answer {
        Ok(answer) if as_json => (line(&answer.object), ExitCode::SUCCESS),
        Ok(answer) => (answer.page.clone(), ExitCode::SUCCESS),
        Err(error) if as_json => (line(&refusal(error)), ExitCode::FAILURE),
        Err(error) => {
            complain(&error.to_string());
            return ExitCode::FAILURE;
        }
    };
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            complain(&format!("cannot write the answer: {e}"));
            ExitCode::FAILURE
        }
        _ => code,
    }
}

/// The JSON object of an error: the number is the library's status, which never moves.
fn refusal(error: &Error) -> Value {
    let status = error.status();
    json!({
        "ok": false,
        "status": status as i32,
        "status_name": format!("{status:?}"),
        "error": error.to_string(),
    })
}

fn line(object: &Value) -> String {
    format!("{object}\n")
}

/// `eprintln!` would panic on a closed standard error. File names may hold anything; a terminal gets text.
fn complain(sentence: &str) {
    let plain: String = sentence.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    let _ = writeln!(std::io::stderr(), "emaudit: {plain}");
}
