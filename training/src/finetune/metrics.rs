//! `metrics.jsonl` and `timing.jsonl` beside an adapter, one line a step while it trains.
//!
//! The first holds what a second run repeats bit for bit; what differs from run to run stands in the second. A step
//! that was lost to an interruption and done again stands in the second twice.

use super::StepLog;
use crate::{progress, store};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Writes the two files.
pub struct Metrics {
    folder: PathBuf,
    metrics: Option<File>,
    timing: Option<File>,
}

impl Metrics {
    /// Starts `metrics.jsonl` in `folder`, which is made where it is missing.
    pub fn create(folder: &Path) -> Result<Self> {
        let path = folder.join("metrics.jsonl");
        let create = || fs::create_dir_all(folder).and_then(|()| File::create(&path));
        let file = create().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Metrics { folder: folder.to_owned(), metrics: Some(file), timing: None })
    }

    /// Adds a step. A disk that is full does not end the training: the rest of the lines wait for [`finish`](Self::finish).
    pub fn add(&mut self, entry: &StepLog) {
        if let Err(error) = self.write(entry)
            && self.metrics.take().is_some()
        {
            progress::note(&format!(
                "{} cannot grow: {error:#}",
                self.folder.join("metrics.jsonl").display()
            ));
        }
    }

    fn write(&mut self, entry: &StepLog) -> Result<()> {
        let Some(metrics) = &mut self.metrics else { return Ok(()) };
        metrics.write_all(line(entry)?.as_bytes())?;
        let Some(took) = entry.took else { return Ok(()) };
        if self.timing.is_none() {
            let path = self.folder.join("timing.jsonl");
            let mut options = File::options();
            // A resumed run goes on below the lines of the one before it.
            let options =
                if entry.step == 1 { options.write(true).truncate(true) } else { options.append(true) };
            self.timing = Some(options.create(true).open(path)?);
        }
        let seconds = took.as_secs_f64();
        let timing = serde_json::json!({
            "step": entry.step, "seconds": seconds, "tokens_per_second": entry.tokens as f64 / seconds,
        });
        self.timing.as_mut().map_or(Ok(()), |file| writeln!(file, "{timing}"))?;
        Ok(())
    }

    /// Writes `metrics.jsonl` once more, whole.
    pub fn finish(self, log: &[StepLog]) -> Result<()> {
        let lines = log.iter().map(line).collect::<Result<String>>()?;
        store::write_file(&self.folder.join("metrics.jsonl"), lines.as_bytes())
    }
}

fn line(entry: &StepLog) -> Result<String> {
    Ok(serde_json::to_string(entry)? + "\n")
}
