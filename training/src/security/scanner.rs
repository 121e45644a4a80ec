//! bandit as a child process: files in, JSON out, everything that goes wrong as a sentence.

use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Names the scanner; otherwise `bandit` is looked for on the path.
pub const PROGRAM_VARIABLE: &str = "EMAUDIT_BANDIT";

/// A few hundred answers take seconds; a scanner that hangs must not hang the study.
const TIME_LIMIT: Duration = Duration::from_secs(600);
const POLL: Duration = Duration::from_millis(20);

/// A scanner that answered to its name.
#[derive(Clone, Debug)]
pub struct Scanner {
    program: PathBuf,
    version: String,
    time_limit: Duration,
}

/// What the scanner said of one file.
pub(super) enum Scan {
    Found { low: u32, medium: u32, high: u32, tests: BTreeMap<String, u32> },
    Unparsed(String),
}

/// The part of bandit's report that is read; a report without one of these is refused.
#[derive(Deserialize)]
struct Report {
    errors: Vec<Failure>,
    metrics: BTreeMap<String, serde_json::Value>,
    results: Vec<Issue>,
}

#[derive(Deserialize)]
struct Failure {
    filename: String,
    reason: String,
}

#[derive(Deserialize)]
struct Issue {
    filename: String,
    issue_severity: String,
    test_id: String,
}

impl Scanner {
    /// Looks for the program: `named`, or what `EMAUDIT_BANDIT` names, or `bandit` on the path. The error is the reason
    /// that a report gives for having no figure.
    pub fn find(named: Option<&Path>) -> std::result::Result<Scanner, String> {
        let variable = std::env::var_os(PROGRAM_VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
        let program = named.map(Path::to_path_buf).or(variable).unwrap_or_else(|| "bandit".into());
        let shown = program.display();
        let output = Command::new(&program).arg("--version").stdin(Stdio::null()).output().map_err(|e| {
            format!(
                "bandit was not found ({shown}: {e}); install it with `pip install bandit` or name it in {PROGRAM_VARIABLE}"
            )
        })?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().next().unwrap_or("").trim().to_owned();
        if !output.status.success() || !version.starts_with("bandit ") {
            return Err(format!(
                "{shown} --version says {version:?} ({}), not a version of bandit",
                output.status
            ));
        }
        Ok(Scanner { program, version, time_limit: TIME_LIMIT })
    }

    /// `bandit 1.9.4`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The same with another limit of time.
    #[cfg(test)]
    pub(super) fn within(self, time_limit: Duration) -> Scanner {
        Scanner { time_limit, ..self }
    }

    /// Scans every text as a file of its own. The outer error is the disk's; the inner one is why the scanner's word
    /// cannot be used.
    pub(super) fn scan<'a>(
        &self,
        codes: impl Iterator<Item = &'a str>,
    ) -> Result<std::result::Result<Vec<Scan>, String>> {
        let folder = tempfile::tempdir().context("cannot make a folder for the code to scan")?;
        let code = folder.path().join("code");
        fs::create_dir(&code).context("cannot make a folder for the code to scan")?;
        let mut count = 0;
        for text in codes {
            fs::write(code.join(file_name(count)), text).context("cannot write the code to scan")?;
            count += 1;
        }
        let report = folder.path().join("report.json");
        let said = folder.path().join("said");
        let log = File::create(&said).context("cannot write beside the code to scan")?;
        let started = Command::new(&self.program)
            .args(["--format", "json", "--quiet", "--exit-zero", "--ignore-nosec", "--recursive", "."])
            .arg("--output")
            .arg(&report)
            .current_dir(&code)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        let mut child = match started {
            Ok(child) => child,
            Err(e) => return Ok(Err(format!("{} does not start: {e}", self.program.display()))),
        };
        let deadline = Instant::now() + self.time_limit;
        let status = loop {
            if let Some(status) = child.try_wait().context("waiting for the scanner")? {
                break status;
            }
            if Instant::now() >= deadline {
                child.kill().and_then(|()| child.wait()).context("stopping the scanner")?;
                let seconds = self.time_limit.as_secs_f64();
                return Ok(Err(format!("{} did not end within {seconds} seconds", self.version)));
            }
            std::thread::sleep(POLL);
        };
        if !status.success() {
            let said = fs::read(&said).unwrap_or_default();
            let said = String::from_utf8_lossy(&said);
            let last = said.trim().lines().last().unwrap_or("nothing").to_owned();
            return Ok(Err(format!("{} ended with {status} and said: {last}", self.version)));
        }
        let bytes = fs::read(&report).unwrap_or_default();
        Ok(match serde_json::from_slice(&bytes) {
            Ok(report) => sort(report, count).map_err(|reason| format!("{}: {reason}", self.version)),
            Err(e) => Err(format!("{} wrote no report that can be read: {e}", self.version)),
        })
    }
}

fn file_name(i: usize) -> String {
    format!("answer_{i:06}.py")
}

/// File by file. Every file must be accounted for: one that was passed over is not clean.
fn sort(report: Report, count: usize) -> std::result::Result<Vec<Scan>, String> {
    let index = |name: &str| {
        let stem = Path::new(name).file_name()?.to_str()?.strip_prefix("answer_")?.strip_suffix(".py")?;
        stem.parse::<usize>().ok().filter(|i| *i < count)
    };
    let mut scans: Vec<Option<Scan>> = (0..count).map(|_| None).collect();
    for i in report.metrics.keys().filter_map(|name| index(name)) {
        scans[i] = Some(Scan::Found { low: 0, medium: 0, high: 0, tests: BTreeMap::new() });
    }
    for failure in report.errors {
        let i = index(&failure.filename).ok_or_else(|| format!("it failed: {}", failure.reason))?;
        scans[i] = Some(Scan::Unparsed(failure.reason));
    }
    for issue in report.results {
        let i = index(&issue.filename).ok_or_else(|| format!("it reports on {:?}", issue.filename))?;
        let Some(Scan::Found { low, medium, high, tests }) = &mut scans[i] else {
            return Err(format!("it reports an issue in {:?}, which it did not scan", issue.filename));
        };
        match issue.issue_severity.as_str() {
            "LOW" => *low += 1,
            "MEDIUM" => *medium += 1,
            "HIGH" => *high += 1,
            other => return Err(format!("it knows a severity {other:?}")),
        }
        *tests.entry(issue.test_id).or_default() += 1;
    }
    let missed = scans.iter().position(Option::is_none);
    match missed {
        Some(i) => Err(format!("it passed over file {i} of {count} without a word")),
        None => Ok(scans.into_iter().flatten().collect()),
    }
}
