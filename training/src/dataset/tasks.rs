//! Coding tasks that no adapter here is trained on: what generated Python is judged for security by.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Result, ensure};
use serde::Deserialize;

use super::{EMBEDDED, file_name, read_content, rows};
use crate::store::sha256_hex;

const CODING_TASKS: &str = include_str!("../../data/coding_tasks.jsonl");

/// Requests for Python, in order.
#[derive(Debug, Clone)]
pub struct CodingTasks {
    pub name: String,
    pub prompts: Vec<String>,
    /// SHA-256 of the uncompressed content, in hex.
    pub sha256: String,
}

#[derive(Deserialize)]
struct Row {
    prompt: String,
}

/// The tasks that `source` names: `embedded`, or the path of a file with one JSON object with `prompt` a line.
pub fn load_coding_tasks(source: &str) -> Result<CodingTasks> {
    if source == EMBEDDED {
        return parse("the embedded coding tasks", EMBEDDED.to_owned(), CODING_TASKS.as_bytes());
    }
    let path = Path::new(source);
    parse(source, file_name(path), &read_content(path)?)
}

fn parse(label: &str, name: String, bytes: &[u8]) -> Result<CodingTasks> {
    let mut prompts = Vec::new();
    let mut seen = HashSet::new();
    for row in rows(label, bytes) {
        let row = row?;
        let Row { prompt } = row.parse()?;
        if prompt.trim().is_empty() {
            return Err(row.error("the prompt is empty".to_owned()));
        }
        if !seen.insert(prompt.clone()) {
            return Err(row.error("the prompt is that of an earlier row".to_owned()));
        }
        prompts.push(prompt);
    }
    ensure!(!prompts.is_empty(), "{label} holds no coding tasks");
    Ok(CodingTasks { name, prompts, sha256: sha256_hex(bytes) })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::embedded_pairs;
    use super::super::tests::normalised;
    use super::*;

    #[test]
    fn the_embedded_tasks_ask_for_python_that_no_adapter_was_trained_on() {
        let tasks = load_coding_tasks("embedded").unwrap();
        assert_eq!(tasks.prompts.len(), 32);
        let trained: HashSet<_> = embedded_pairs().unwrap().iter().map(|p| normalised(&p.prompt)).collect();
        for prompt in &tasks.prompts {
            assert!(prompt.contains("Python") && !trained.contains(&normalised(prompt)), "{prompt}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let load = |text: &str| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            load_coding_tasks(file.path().to_str().unwrap())
        };
        let one = "{\"prompt\": \"a\"}\n";
        assert_eq!(load(&(one.to_owned() + "{\"id\": 1, \"prompt\": \"b\"}")).unwrap().prompts, ["a", "b"]);
        for (second, reason) in
            [(one, "that of an earlier row"), ("{\"prompt\": \" \"}", "is empty"), ("{}", "prompt")]
        {
            let error = format!("{:#}", load(&(one.to_owned() + second)).unwrap_err());
            assert!(error.contains("line 2") && error.contains(reason), "{error} should say {reason}");
        }
    }
}
