//! What a finished stage leaves: one small JSON file, written last. Its presence says that the stage is done.

use super::graph::Node;
use crate::store;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// A file that a stage wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Below the study's folder.
    pub path: PathBuf,
    /// Of its content, in hex.
    pub sha256: String,
    /// Bytes.
    pub size: u64,
}

/// One finished stage.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Name of the stage.
    pub stage: String,
    /// Digest of everything it depended on.
    pub key: String,
    /// Files it wrote.
    pub outputs: Vec<Output>,
    /// What it found, by kind: see [`super::findings`].
    pub found: serde_json::Value,
    /// Time it took.
    pub seconds: f64,
    /// Largest memory of the process that ran it, while it ran.
    pub peak_memory_bytes: Option<usize>,
}

/// The folder of all records of a study.
pub struct Records {
    root: PathBuf,
}

impl Records {
    /// Records below `out`, which need not exist yet.
    pub fn new(out: &Path) -> Self {
        Records { root: out.to_owned() }
    }

    fn path(&self, node: &Node) -> PathBuf {
        self.root.join("records").join(format!("{}-{}.json", node.name, node.key))
    }

    /// By the key alone: the same work under another model's name would write the same files.
    fn lock_path(&self, node: &Node) -> PathBuf {
        self.root.join("records").join(format!("{}.lock", node.key))
    }

    /// The record of a stage that is done and whose files are all there; a damaged one is an error.
    pub fn get(&self, node: &Node) -> Result<Option<Record>> {
        let path = self.path(node);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        let record: Record = serde_json::from_str(&text).with_context(|| {
            format!("{} is damaged; delete it to run {} again", path.display(), node.name)
        })?;
        if record.key != node.key || record.stage != node.name {
            bail!("{} is the record of another stage; delete it", path.display());
        }
        let whole = |o: &Output| fs::metadata(self.root.join(&o.path)).is_ok_and(|m| m.len() == o.size);
        Ok(record.outputs.iter().all(whole).then_some(record))
    }

    /// Keeps others from a stage while it runs; `None` where somebody has it.
    pub fn lock(&self, node: &Node) -> Result<Option<File>> {
        let path = self.lock_path(node);
        let folder = self.root.join("records");
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(file.try_lock().is_ok().then_some(file))
    }

    /// Writes down that a stage is done.
    pub fn put(&self, node: &Node, record: &Record) -> Result<()> {
        store::write_json(&self.path(node), record)?;
        // Whoever waits for the lock looks for the record first, so the file is of no more use.
        fs::remove_file(self.lock_path(node)).ok();
        Ok(())
    }

    /// Size and digest of a file below the study's folder.
    pub fn output(&self, path: &Path) -> Result<Output> {
        let below = path.strip_prefix(&self.root).unwrap_or(path).to_owned();
        let size = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
        Ok(Output { path: below, sha256: store::sha256_files(&[path.to_owned()])?, size })
    }

    /// Every record in the folder, of this and of other recipes: what stages took before.
    pub fn every(&self) -> Vec<Record> {
        let files = fs::read_dir(self.root.join("records")).into_iter().flatten().flatten();
        let json = files.map(|f| f.path()).filter(|p| p.extension().is_some_and(|e| e == "json"));
        json.filter_map(|p| serde_json::from_str(&fs::read_to_string(p).ok()?).ok()).collect()
    }
}
