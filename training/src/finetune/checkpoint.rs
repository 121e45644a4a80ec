//! What an interrupted run continues from: variables, moments, the best adapter so far, the log.

use super::{StepLog, Trainer};
use crate::store;
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

/// Where a run keeps its state.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoint<'a> {
    /// The file; it is replaced whole or not at all.
    pub path: &'a Path,
    /// What the work depends on: a checkpoint with another key is started over.
    pub key: &'a str,
    /// Time between two checkpoints.
    pub every: Duration,
}

impl<'a> Checkpoint<'a> {
    /// A checkpoint every twenty seconds.
    pub fn new(path: &'a Path, key: &'a str) -> Self {
        Checkpoint { path, key, every: Duration::from_secs(20) }
    }

    pub(super) fn save(&self, trainer: &Trainer<'_>) -> Result<()> {
        let mut tensors = trainer.optimizer.state()?;
        let cpu = |t: &Tensor| t.detach().to_device(&Device::Cpu);
        for (i, var) in trainer.vars.iter().enumerate() {
            tensors.insert(format!("var.{i}"), cpu(var.as_tensor())?);
        }
        for (i, best) in trainer.best.iter().flatten().enumerate() {
            tensors.insert(format!("best.{i}"), cpu(best)?);
        }
        let log = serde_json::to_string(&trainer.log)?;
        let metadata = HashMap::from([("key".to_owned(), self.key.to_owned()), ("log".to_owned(), log)]);
        let sorted = tensors.into_iter().collect();
        store::write_tensors(self.path, &sorted, Some(metadata)).context("the checkpoint could not be kept")
    }

    /// Puts the state back when the file is a checkpoint of the same work; anything else is started over.
    pub(super) fn resume(&self, trainer: &mut Trainer<'_>) -> Result<()> {
        let Ok(bytes) = std::fs::read(self.path) else { return Ok(()) };
        let Ok((_, header)) = safetensors::SafeTensors::read_metadata(&bytes) else { return Ok(()) };
        let Some(metadata) =
            header.metadata().as_ref().filter(|m| m.get("key").is_some_and(|k| k == self.key))
        else {
            return Ok(());
        };
        let log: Vec<StepLog> = serde_json::from_str(metadata.get("log").context("checkpoint without log")?)?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        let get = |name: String| -> Result<Tensor> {
            tensors.get(&name).cloned().with_context(|| format!("the checkpoint lacks `{name}`"))
        };
        for (i, var) in trainer.vars.iter().enumerate() {
            var.set(&get(format!("var.{i}"))?.to_device(var.device())?)?;
        }
        trainer.optimizer.restore(&get)?;
        if tensors.contains_key("best.0") {
            let best = |i: usize| -> Result<Tensor> {
                Ok(get(format!("best.{i}"))?.to_device(trainer.vars[i].device())?)
            };
            trainer.best = Some((0..trainer.vars.len()).map(best).collect::<Result<_>>()?);
        }
        trainer.log = log;
        Ok(())
    }
}
