//! How a test says that it could not do all of its work.

use std::io::Write;

/// Makes a missing optional tool a failure, for machines that must run everything.
const NO_SKIP: &str = "EMAUDIT_NO_SKIP";

/// Says so in a line of its own, which `.ci/run` counts.
pub fn skipped(what: &str, why: &str) {
    // Past the test harness, which keeps what a passing test prints.
    let _ = writeln!(std::io::stderr(), "\nskipped: {what}: {why}");
}

/// The same for something that could be installed.
pub fn missing(what: &str, why: &str) {
    assert!(std::env::var_os(NO_SKIP).is_none(), "{what}: {why}, and {NO_SKIP} is set");
    skipped(what, why);
}
