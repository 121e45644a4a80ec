//! A study: several models, regimes of data and seeds, as stages that run once, in any order their needs allow, on one
//! machine or on many that share a folder.

mod cell;
mod claims;
mod content;
pub mod findings;
pub mod graph;
pub mod plan;
pub mod recipe;
pub mod record;
pub mod report;
mod transfer;

use crate::base::Base;
use crate::experiment::{self, Experiment};
use crate::fetch::{self, ModelFiles};
use crate::{base, dataset, interrupt, memory, model, progress, store};
use anyhow::{Context, Result, bail};
use candle_core::Device;
use graph::{Node, Stage, World};
use plan::{Planned, Size};
use recipe::StudyRecipe;
use record::{Record, Records};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks at stages that somebody else is running.
const WAIT: Duration = Duration::from_secs(2);

/// A study and the folder it fills.
pub struct Study {
    recipe: StudyRecipe,
    out: PathBuf,
    device: Device,
    ignore_memory: bool,
    nodes: Vec<Node>,
    sizes: Vec<Option<Size>>,
    records: Records,
    /// The model that was used last: stages of one model follow each other.
    loaded: Option<(usize, Arc<Base>)>,
}

/// What became of a stage that somebody wanted to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    Ran,
    /// Somebody else had finished it.
    Done,
    /// Somebody else runs it.
    Taken,
}

impl Study {
    /// Reads what the recipe names, so that nothing is found missing hours later. With `fetch`, models that are not on
    /// this machine are fetched; without, their stages can only be planned.
    pub fn open(
        recipe: StudyRecipe,
        out: &Path,
        device: Device,
        ignore_memory: bool,
        fetch: bool,
    ) -> Result<Self> {
        let (mut world, mut sizes) = (World::default(), Vec::new());
        for (m, entry) in recipe.models.iter().enumerate() {
            let id = &entry.recipe.model.id;
            let files = if fetch { Some(fetch::resolve(id)?) } else { fetch::on_this_machine(id)? };
            let path = files.map(|f| match f.files {
                ModelFiles::Gguf(path) | ModelFiles::Folder(path) => path,
            });
            world.weights.push(path.as_deref().map(base::weights_digest).transpose()?);
            let config = path.as_deref().map(model::config).transpose();
            sizes.push(config.with_context(|| format!("cannot read {id}"))?.as_ref().map(Size::of));
            for regime in recipe.all_regimes() {
                let source = recipe.source(m, regime);
                let data =
                    dataset::load_chats(&source, regime).with_context(|| format!("the regime {regime}"))?;
                world.data.insert((regime.to_owned(), source), data.sha256);
            }
            let prompts = &entry.recipe.data.prompts;
            let of = (graph::PROMPTS.to_owned(), prompts.clone());
            world.data.insert(of, dataset::load_prompts(prompts, 0)?.sha256);
        }
        let nodes = graph::nodes(&recipe, &world)?;
        let records = Records::new(out);
        Ok(Study { recipe, out: out.to_owned(), device, ignore_memory, nodes, sizes, records, loaded: None })
    }

    /// Every stage, whether it is done, and what it takes.
    pub fn plan(&self) -> Result<Vec<Planned>> {
        plan::plan(&self.recipe, &self.nodes, &self.sizes, &self.records)
    }

    /// Runs one stage, whose needs must be done.
    pub fn run_stage(&mut self, name: &str) -> Result<()> {
        let known = || self.nodes.iter().map(|n| n.name.as_str());
        let Some(node) = self.nodes.iter().find(|n| n.name == name).cloned() else {
            match crate::recipe::nearest(name, known()) {
                Some(near) => bail!("there is no stage {name}; did you mean {near}?"),
                None => bail!("there is no stage {name}; --plan lists them"),
            }
        };
        for need in &node.needs {
            if !self.done(need)? {
                bail!("{name} needs {need}, which is not done: run that first");
            }
        }
        if self.attempt(&node)? == Attempt::Taken {
            bail!("{name} is being run by another process");
        }
        Ok(())
    }

    /// Runs every stage that is not done, beside others who may do the same; returns the names of those it ran.
    pub fn run(&mut self) -> Result<Vec<String>> {
        let mut ran_here = Vec::new();
        loop {
            let (mut left, mut ran) = (Vec::new(), false);
            for node in self.nodes.clone() {
                if self.records.get(&node)?.is_some() {
                    continue;
                }
                let ready = node.needs.iter().map(|n| self.done(n)).collect::<Result<Vec<_>>>()?;
                match ready.iter().all(|done| *done).then(|| self.attempt(&node)).transpose()? {
                    Some(Attempt::Ran) => {
                        ran = true;
                        ran_here.push(node.name);
                    }
                    Some(Attempt::Done) => ran = true,
                    Some(Attempt::Taken) | None => left.push(node.name),
                }
            }
            if left.is_empty() {
                return Ok(ran_here);
            }
            if !ran {
                progress::note(&format!("waiting for {}, which another process is running", left[0]));
                std::thread::sleep(WAIT);
                interrupt::check()?;
            }
        }
    }

    /// What a finished stage left.
    pub fn record(&self, stage: &Stage) -> Result<Option<Record>> {
        match self.nodes.iter().find(|n| n.stage == *stage) {
            Some(node) => self.records.get(node),
            None => Ok(None),
        }
    }

    fn done(&self, name: &str) -> Result<bool> {
        let node = self.nodes.iter().find(|n| n.name == name).context("a stage that is in no study")?;
        Ok(self.records.get(node)?.is_some())
    }

    /// Runs a stage unless it is done or somebody else has it.
    fn attempt(&mut self, node: &Node) -> Result<Attempt> {
        let Some(_lock) = self.records.lock(node)? else { return Ok(Attempt::Taken) };
        // Somebody may have finished it since it was looked for.
        if self.records.get(node)?.is_some() {
            return Ok(Attempt::Done);
        }
        progress::note(&format!("== {}", node.name));
        let begun = Instant::now();
        let (found, files) = self.work(&node.stage).with_context(|| format!("the stage {}", node.name))?;
        let record = Record {
            stage: node.name.clone(),
            key: node.key.clone(),
            outputs: files.iter().map(|f| self.records.output(f)).collect::<Result<_>>()?,
            found,
            seconds: begun.elapsed().as_secs_f64(),
            peak_memory_bytes: memory::peak(),
        };
        self.records.put(node, &record)?;
        Ok(Attempt::Ran)
    }

    fn base(&mut self, model: usize) -> Result<Arc<Base>> {
        if let Some((loaded, base)) = &self.loaded
            && *loaded == model
        {
            return Ok(base.clone());
        }
        // Two models at once may not fit.
        self.loaded = None;
        let base = Arc::new(experiment::load(&self.recipe.models[model].recipe, &self.device)?);
        self.loaded = Some((model, base.clone()));
        Ok(base)
    }

    /// The experiment of one model and seed; its own stages lie beside those of all others.
    fn experiment(&mut self, model: usize, seed: u64) -> Result<Experiment> {
        let entry = &self.recipe.models[model];
        let (recipe, folder) = (entry.recipe(seed), format!("{}-{seed}", entry.name));
        let (stages, out) = (self.out.join("stages"), self.out.join(folder));
        for folder in [&stages, &out] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let base = self.base(model)?;
        let mut experiment = Experiment::within(recipe, base, stages, out, self.device.clone());
        experiment.ignore_memory = self.ignore_memory;
        Ok(experiment)
    }

    /// Does a stage's work: what it found, and the files it wrote.
    fn work(&mut self, stage: &Stage) -> Result<(serde_json::Value, Vec<PathBuf>)> {
        match *stage {
            Stage::Finetune { model, seed, ref regime } => {
                let source = self.recipe.source(model, regime);
                let (adapter, data) = self.experiment(model, seed)?.finetune(regime, &source)?;
                let found = findings::Finetuned::new(&adapter, &data);
                Ok((serde_json::to_value(found)?, store::files(&adapter.folder)?))
            }
            Stage::Capture { model, seed, ref state } => {
                let experiment = self.experiment(model, seed)?;
                let adapter = match state.as_str() {
                    graph::BASE => None,
                    regime => Some(experiment.finetune(regime, &self.recipe.source(model, regime))?.0),
                };
                let file = experiment.captured(state, adapter.as_ref())?;
                Ok((serde_json::Value::Null, vec![file]))
            }
            Stage::Calibrate { model, seed } => {
                let file = self.experiment(model, seed)?.extract()?;
                Ok((serde_json::Value::Null, vec![file]))
            }
            Stage::Evaluate { model, seed } => {
                let evaluated = self.experiment(model, seed)?.evaluated()?;
                Ok((serde_json::to_value(evaluated.results)?, Vec::new()))
            }
            Stage::Content { model, seed } => {
                let experiment = self.experiment(model, seed)?;
                let sources: BTreeMap<String, String> = self
                    .recipe
                    .all_regimes()
                    .map(|regime| (regime.to_owned(), self.recipe.source(model, regime)))
                    .collect();
                Ok((serde_json::to_value(content::content(&experiment, &sources)?)?, Vec::new()))
            }
            Stage::Pack { model, seed } => {
                let experiment = self.experiment(model, seed)?;
                let (results, o) = experiment.pack(experiment.evaluated()?)?;
                Ok((serde_json::to_value(&results.summary)?, vec![o.directions, o.results, o.report]))
            }
            Stage::Transfer { from, to } => {
                let seed = |model: usize| self.recipe.models[model].seeds[0];
                let (seed_from, seed_to) = (seed(from), seed(to));
                let name = |model: usize| self.recipe.models[model].name.clone();
                let (name_from, name_to) = (name(from), name(to));
                let experiment = self.experiment(from, seed_from)?;
                let source = transfer::Source::new(&name_from, &experiment, &experiment.evaluated()?)?;
                drop(experiment);
                let experiment = self.experiment(to, seed_to)?;
                let found = transfer::transfer(&source, &name_to, &experiment, &experiment.evaluated()?)?;
                Ok((serde_json::to_value(found)?, Vec::new()))
            }
            Stage::Report => report::report(self),
        }
    }
}
