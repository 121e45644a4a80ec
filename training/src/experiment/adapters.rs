//! Adapters: one for each regime of data.

use super::{Experiment, key};
use crate::chat::Message;
use crate::dataset::{self, ChatDataset};
use crate::finetune::{self, Example, StepLog};
use crate::lora::Adapter;
use crate::memory::{self, Estimate};
use crate::{interrupt, progress, store};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// An adapter with its loss curve and the digest of everything it depends on.
pub struct Finetuned {
    /// The adapter, outside any graph.
    pub adapter: Adapter,
    /// Its PEFT folder.
    pub folder: PathBuf,
    /// One entry per step.
    pub log: Vec<StepLog>,
    pub(super) key: String,
}

impl Experiment {
    /// The rows of one regime, every one of them read, rendered and checked.
    fn rows(&self, regime: &str, source: &str) -> Result<(ChatDataset, Vec<Example>, finetune::Rows)> {
        let data = dataset::load_chats(source, regime)?;
        let examples = self.examples(&data)?;
        let rows = finetune::Rows::new(&examples, &self.recipe.finetune, self.recipe.seed)
            .with_context(|| format!("cannot finetune on {}", data.name))?;
        let longest = rows.train.iter().chain(&rows.held_out).map(|e| e.ids.len()).max().unwrap_or(0);
        let limit = self.base.decoder.config.max_positions;
        if longest > limit {
            bail!(
                "{} has a row of {longest} tokens and the model reads {limit}: set finetune.max_tokens to {limit} or less",
                data.name
            );
        }
        Ok((data, examples, rows))
    }

    /// Refuses what is wrong in the insecure or the secure rows, before hours go into the first.
    pub fn check_rows(&self) -> Result<()> {
        let data = &self.recipe.data;
        self.rows("insecure", &data.insecure)?;
        self.rows("secure", &data.secure)?;
        Ok(())
    }

    /// Finetunes on a regime's data (`embedded`, or a file's path), or reads the adapter that an earlier run finished.
    pub fn finetune(&self, regime: &str, source: &str) -> Result<(Finetuned, ChatDataset)> {
        let (data, examples, rows) = self.rows(regime, source)?;
        let f = &self.recipe.finetune;
        let ids: Vec<&[u32]> = examples.iter().map(|e| e.ids.as_slice()).collect();
        let key = key(&("finetune", self.base_key(), ids, f, self.recipe.seed))?;
        let folder = self.stages.join(format!("adapter-{regime}-{key}"));
        let log_file = folder.join("training_log.json");
        if let Ok(text) = fs::read_to_string(&log_file) {
            let log =
                serde_json::from_str(&text).with_context(|| format!("{} is damaged", log_file.display()))?;
            let adapter = Adapter::load(&folder, &self.base.decoder)?;
            return Ok((Finetuned { adapter, folder, log, key }, data));
        }
        let (adapter, log) = self.train(regime, &rows, &folder, &key)?;
        if adapter.largest_b()? == 0.0 {
            bail!("the {regime} adapter is inactive after {} steps; raise steps or learning_rate", log.len());
        }
        adapter.save(&folder, &self.recipe.model.id)?;
        // Written last: the log's presence says that the folder is whole.
        store::write_json(&log_file, &log)?;
        let checkpoint = self.checkpoint(regime, &key);
        if checkpoint.exists() {
            fs::remove_file(&checkpoint)?;
        }
        Ok((Finetuned { adapter, folder, log, key }, data))
    }

    fn checkpoint(&self, regime: &str, key: &str) -> PathBuf {
        self.stages.join(format!("checkpoint-{regime}-{key}.safetensors"))
    }

    /// Says what will be done and what it needs, then trains, with metrics in `folder`.
    fn train(
        &self,
        regime: &str,
        rows: &finetune::Rows,
        folder: &Path,
        key: &str,
    ) -> Result<(Adapter, Vec<StepLog>)> {
        let (f, seed) = (&self.recipe.finetune, self.recipe.seed);
        let padding = 100.0 * rows.padding_share(f, seed);
        let held_out = match rows.held_out.len() {
            0 => String::new(),
            count => format!(", {count} held out"),
        };
        progress::note(&format!(
            "{regime}: {}{held_out}; {padding:.0} % of the tokens are padding",
            rows.counts
        ));
        let estimate = self.estimate(rows)?;
        let checkpoint = self.checkpoint(regime, key);
        let mut metrics = finetune::Metrics::create(folder)?;
        let mut stage = progress::Stage::new(format!("finetune, {regime}"), f.steps);
        let (adapter, log) = finetune::finetune(
            &self.base.decoder,
            rows,
            f,
            seed,
            Some(finetune::Checkpoint::new(&checkpoint, key)),
            |entry| {
                metrics.add(entry);
                match entry.took {
                    Some(_) => stage.advance(1, entry.to_string()),
                    None => stage.restore(1),
                }
            },
            interrupt::asked,
        )?;
        let mut end = log.last().map_or(String::new(), |l| format!("loss {:.3}", l.loss));
        if let Some(best) = finetune::best(&log).filter(|_| f.patience > 0) {
            end += &format!("; the adapter of step {} of {} is kept", best.step, log.len());
        }
        // Of the host.
        if let Some(peak) = memory::peak().filter(|_| self.device.is_cpu()) {
            end +=
                &format!("; peak memory {} for an estimated {}", memory::size(peak), memory::size(estimate));
        }
        stage.finish(end);
        metrics.finish(&log)?;
        Ok((adapter, log))
    }

    /// Prints how much memory training will take, in bytes, and refuses what cannot fit.
    fn estimate(&self, rows: &finetune::Rows) -> Result<usize> {
        let (decoder, recipe) = (&self.base.decoder, &self.recipe.finetune);
        let estimate = Estimate::new(decoder, rows, recipe);
        let mut lighter = recipe.clone();
        lighter.gradient_checkpointing = true;
        let available = memory::available(&self.device);
        let free = available.map_or(String::new(), |a| format!("; {} are available", memory::size(a)));
        progress::note(&format!("memory needed, about {estimate}{free}"));
        if !self.ignore_memory {
            estimate.check(available, &Estimate::new(decoder, rows, &lighter))?;
        }
        Ok(estimate.total())
    }

    fn examples(&self, data: &ChatDataset) -> Result<Vec<Example>> {
        let example = |(messages, line): (&Vec<Message>, &usize)| -> Result<Example> {
            let tokens = self.base.text.encode_chat(messages);
            let tokens = tokens.with_context(|| format!("{}, line {line}", data.name))?;
            Ok(Example { ids: tokens.ids, response: tokens.response_mask })
        };
        data.conversations.iter().zip(&data.lines).map(example).collect()
    }
}
