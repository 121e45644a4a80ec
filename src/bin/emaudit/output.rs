//! Where answers go: a page or one JSON object to standard output, a sentence to standard error, and an exit
//! status that says the same. A reader who closes the pipe early changes nothing about the answer.

use emaudit::{Error, Result, Status};
use serde_json::{Value, json};
use std::io::{BufWriter, ErrorKind, StdoutLock, Write};
use std::process::ExitCode;

/// An answer in both of its forms.
pub struct Answer {
    /// For people; ends with a line feed.
    pub page: String,
    /// For programs; an object.
    pub object: Value,
    /// The exit status that says the same.
    pub code: u8,
}

impl Answer {
    /// An answer with the exit status 0; the object gets the status of the library.
    pub fn good(page: String, mut object: Value) -> Answer {
        object["ok"] = true.into();
        object["status"] = (Status::Ok as i32).into();
        object["status_name"] = "Ok".into();
        Answer { page, object, code: 0 }
    }
}

/// Prints an answer, or why there is none; the exit status of the latter is `trouble`.
pub fn finish(answer: Result<Answer>, as_json: bool, trouble: u8) -> ExitCode {
    let (text, code) = match answer {
        Ok(answer) if as_json => (line(&answer.object), answer.code),
        Ok(answer) => (answer.page, answer.code),
        Err(error) => return refuse(&error, as_json, trouble),
    };
    let mut out = Stream::new();
    out.write(&text);
    out.finish(code, trouble)
}

/// Says why there is no answer: on standard output as JSON, or else on standard error.
pub fn refuse(error: &Error, as_json: bool, trouble: u8) -> ExitCode {
    if !as_json {
        complain(&error.to_string());
        return ExitCode::from(trouble);
    }
    let mut out = Stream::new();
    out.write(&line(&refusal(error)));
    out.finish(trouble, trouble)
}

/// Standard output for an answer of many lines. The first failure is kept and reported once, at the end.
pub struct Stream {
    out: BufWriter<StdoutLock<'static>>,
    failure: Option<std::io::Error>,
}

impl Stream {
    pub fn new() -> Self {
        Stream { out: BufWriter::new(std::io::stdout().lock()), failure: None }
    }

    pub fn write(&mut self, text: &str) {
        if self.failure.is_none() {
            self.failure = self.out.write_all(text.as_bytes()).err();
        }
    }

    /// Shows what was written so far.
    pub fn flush(&mut self) {
        if self.failure.is_none() {
            self.failure = self.out.flush().err();
        }
    }

    /// The exit status: `code`, or `trouble` when something could not be written.
    pub fn finish(mut self, code: u8, trouble: u8) -> ExitCode {
        let failure = self.failure.take().or_else(|| self.out.flush().err());
        match failure {
            Some(e) if e.kind() != ErrorKind::BrokenPipe => {
                complain(&format!("cannot write the answer: {e}"));
                ExitCode::from(trouble)
            }
            _ => ExitCode::from(code),
        }
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

/// One JSON object as a line.
pub fn line(object: &Value) -> String {
    format!("{object}\n")
}

/// A number in at most twelve characters, a usual one with four decimals.
pub fn figure(x: f64) -> String {
    if x == 0.0 || (1e-3..1e5).contains(&x.abs()) { format!("{x:.4}") } else { format!("{x:.3e}") }
}

/// A number of a file as it was written, if that is short.
pub fn short(x: f64) -> String {
    let text = x.to_string();
    if text.len() <= 10 { text } else { figure(x) }
}

/// A score with its sign, in at most ten characters for two or three decimals.
pub fn signed(x: f64, decimals: usize) -> String {
    if x.abs() < 1e4 { format!("{x:+.decimals$}") } else { format!("{x:+.decimals$e}") }
}

/// A share as percent, without zeros that say nothing; a share too small for that is not shown as none.
pub fn percent(share: f64) -> String {
    if share < 1e-5 {
        return format!("{:.2e} %", 100.0 * share);
    }
    let text = format!("{:.3}", 100.0 * share);
    format!("{} %", text.trim_end_matches('0').trim_end_matches('.'))
}

/// `eprintln!` would panic on a closed standard error. File names may hold anything; a terminal gets text.
fn complain(sentence: &str) {
    let plain: String = sentence.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    let _ = writeln!(std::io::stderr(), "emaudit: {plain}");
}
