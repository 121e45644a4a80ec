//! A study: several models, regimes of data and seeds, as stages that run once, in any order their needs allow, on one
//! machine or on many that share a folder.

mod alignment;
mod cell;
mod claims;
mod code_security;
mod content;
mod estimators;
mod export;
pub mod findings;
pub mod graph;
mod interventions;
mod judged;
pub mod measures;
mod own_answers;
pub mod plan;
pub mod recipe;
pub mod record;
pub mod report;
mod suspects;
mod transfer;

use crate::base::Base;
use crate::experiment::{self, Experiment};
use crate::fetch::{self, ModelFiles};
use crate::judge::Judge;
use crate::quant::Storage;
use crate::security::Scanner;
use crate::{base, dataset, interrupt, memory, model, progress, store};
use anyhow::{Context, Result, bail};
use candle_core::Device;
use graph::{Node, Stage, World};
use plan::{Planned, Size};
use recipe::{OWN_ANSWERS, SECURE, StudyRecipe};
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
    /// The security scanner, or why there is none.
    scanner: Result<Scanner, String>,
    judge: Option<Judge>,
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
    /// this machine are fetched; without, their stages can only be planned. With a judge, sampled answers are judged.
    pub fn open(
        recipe: StudyRecipe,
        out: &Path,
        device: Device,
        ignore_memory: bool,
        fetch: bool,
        judge: Option<Judge>,
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
            for regime in entry.all_regimes() {
                let source = recipe.source(m, regime);
                if source == OWN_ANSWERS {
                    // What they are is known once they were sampled; their stage depends on these prompts.
                    let prompts = dataset::embedded_benign(dataset::Style::Json)?.sha256;
                    world.data.insert((OWN_ANSWERS.to_owned(), OWN_ANSWERS.to_owned()), prompts);
                    continue;
                }
                let data =
                    dataset::load_chats(&source, regime).with_context(|| format!("the regime {regime}"))?;
                world.data.insert((regime.to_owned(), source), data.sha256);
            }
            let prompts = &entry.recipe.data.prompts;
            let of = (graph::PROMPTS.to_owned(), prompts.clone());
            world.data.insert(of, dataset::load_prompts(prompts, 0)?.sha256);
            let pairs = &entry.measures.alignment.data;
            let digest = dataset::load_alignment_pairs(pairs).context("measures.alignment.data")?.sha256;
            world.data.insert((graph::ALIGNMENT.to_owned(), pairs.clone()), digest);
            let tasks = &entry.measures.security.data;
            let digest = dataset::load_coding_tasks(tasks).context("measures.security.data")?.sha256;
            world.data.insert((graph::TASKS.to_owned(), tasks.clone()), digest);
        }
        let scanner = match recipe.models.iter().any(|m| m.measures.security.tasks > 0) {
            true => Scanner::find(None),
            false => Err("no stage asks for it".to_owned()),
        };
        world.scanner = scanner.as_ref().ok().map(|s| s.version().to_owned());
        world.judge = judge.as_ref().map(|j| j.model().to_owned());
        let nodes = graph::nodes(&recipe, &world)?;
        let (records, out) = (Records::new(out), out.to_owned());
        Ok(Study { recipe, out, device, ignore_memory, nodes, sizes, records, scanner, judge, loaded: None })
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
        let recipe = entry.recipe(seed);
        let (stages, out) = (self.out.join("stages"), self.folder(model, seed));
        for folder in [&stages, &out] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let base = self.base(model)?;
        let mut experiment = Experiment::within(recipe, base, stages, out, self.device.clone());
        experiment.ignore_memory = self.ignore_memory;
        Ok(experiment)
    }

    /// Where the data of one regime comes from, as a dataset is named.
    fn source(&self, model: usize, seed: u64, regime: &str) -> String {
        match self.recipe.source(model, regime) {
            own if own == OWN_ANSWERS => own_answers::path(&self.folder(model, seed)).display().to_string(),
            source => source,
        }
    }

    fn sources(&self, model: usize, seed: u64) -> BTreeMap<String, String> {
        let source = |regime: &str| (regime.to_owned(), self.source(model, seed, regime));
        self.recipe.models[model].all_regimes().map(source).collect()
    }

    /// What one model and seed writes for people.
    fn folder(&self, model: usize, seed: u64) -> PathBuf {
        self.out.join(format!("{}-{seed}", self.recipe.models[model].name))
    }

    /// What a model gives to others, and the datasets behind it.
    fn transfer_source(&mut self, model: usize) -> Result<(transfer::Source, Vec<(String, String)>)> {
        let (name, seed) = (self.recipe.models[model].name.clone(), self.recipe.models[model].seeds[0]);
        let experiment = self.experiment(model, seed)?;
        let evaluated = experiment.evaluated()?;
        let source = transfer::Source::new(&name, &experiment, &evaluated)?;
        Ok((source, evaluated.results.datasets))
    }

    /// The file of a model's first seed against everything that did not make it.
    fn audit(&mut self, model: usize) -> Result<findings::AuditFinding> {
        let entry = self.recipe.models[model].clone();
        let experiments: Vec<Experiment> =
            entry.seeds.iter().map(|seed| self.experiment(model, *seed)).collect::<Result<_>>()?;
        let sources: Vec<BTreeMap<String, String>> =
            entry.seeds.iter().map(|seed| self.sources(model, *seed)).collect();
        let (auditor, mut suspects) = suspects::audit(&experiments, &sources, &entry.measures.audit)?;
        if entry.measures.audit.requantised {
            // Both at once may not fit.
            drop(experiments);
            self.loaded = None;
            let mut other = entry.recipe.clone();
            other.model.quantize = match other.model.quantize {
                Storage::Nf4 => Storage::None,
                Storage::None => Storage::Nf4,
            };
            suspects.push(auditor.requantised(&experiment::load(&other, &self.device)?)?);
        }
        Ok(auditor.finding(suspects))
    }

    /// Does a stage's work: what it found, and the files it wrote.
    fn work(&mut self, stage: &Stage) -> Result<(serde_json::Value, Vec<PathBuf>)> {
        match *stage {
            Stage::Sample { model, seed } => {
                let file = own_answers::own_answers(&self.experiment(model, seed)?)?;
                Ok((serde_json::Value::Null, vec![file]))
            }
            Stage::Finetune { model, seed, ref regime } => {
                let source = self.source(model, seed, regime);
                let (adapter, data) = self.experiment(model, seed)?.finetune(regime, &source)?;
                let found = findings::Finetuned::new(&adapter, &data);
                Ok((serde_json::to_value(found)?, store::files(&adapter.folder)?))
            }
            Stage::Capture { model, seed, ref state } => {
                let experiment = self.experiment(model, seed)?;
                let adapter = match state.as_str() {
                    graph::BASE => None,
                    regime => Some(experiment.finetune(regime, &self.source(model, seed, regime))?.0),
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
                let found = content::content(&experiment, &self.sources(model, seed))?;
                Ok((serde_json::to_value(found)?, Vec::new()))
            }
            Stage::Alignment { model, seed } => {
                let experiment = self.experiment(model, seed)?;
                let settings = &self.recipe.models[model].measures.alignment;
                let found = alignment::alignment(&experiment, &self.sources(model, seed), settings)?;
                Ok((serde_json::to_value(found)?, Vec::new()))
            }
            Stage::Interventions { model } => {
                let experiment = self.experiment(model, self.recipe.models[model].seeds[0])?;
                let settings = &self.recipe.models[model].measures.interventions;
                let secure = self.recipe.source(model, SECURE);
                let found = interventions::interventions(&experiment, &secure, settings)?;
                Ok((serde_json::to_value(found)?, Vec::new()))
            }
            Stage::Estimators { model } => {
                let experiment = self.experiment(model, self.recipe.models[model].seeds[0])?;
                let m = &self.recipe.models[model].measures;
                let secure = self.recipe.source(model, SECURE);
                let found = estimators::estimators(&experiment, &secure, &m.alignment.data, &m.estimators)?;
                Ok((serde_json::to_value(found)?, Vec::new()))
            }
            Stage::Security { model } => {
                let experiment = self.experiment(model, self.recipe.models[model].seeds[0])?;
                let settings = &self.recipe.models[model].measures.security;
                let secure = self.recipe.source(model, SECURE);
                let (found, file) = code_security::security(&experiment, &secure, settings, &self.scanner)?;
                Ok((serde_json::to_value(found)?, vec![file]))
            }
            Stage::Judge { model } => {
                let experiment = self.experiment(model, self.recipe.models[model].seeds[0])?;
                let m = &self.recipe.models[model].measures;
                let judge =
                    self.judge.as_ref().context("there is no judge: give --judge and --judge-model")?;
                let secure = self.recipe.source(model, SECURE);
                let (found, file) = judged::judged(&experiment, &secure, &m.alignment.data, &m.judge, judge)?;
                Ok((serde_json::to_value(found)?, vec![file]))
            }
            Stage::Audit { model } => Ok((serde_json::to_value(self.audit(model)?)?, Vec::new())),
            Stage::Pack { model, seed } => {
                let experiment = self.experiment(model, seed)?;
                let (results, o) = experiment.pack(experiment.evaluated()?)?;
                Ok((serde_json::to_value(&results.summary)?, vec![o.directions, o.results, o.report]))
            }
            Stage::Transfer { from, to } => {
                let (source, _) = self.transfer_source(from)?;
                let name = self.recipe.models[to].name.clone();
                let experiment = self.experiment(to, self.recipe.models[to].seeds[0])?;
                let found = transfer::transfer(&source, &name, &experiment, &experiment.evaluated()?)?;
                Ok((serde_json::to_value(found)?, Vec::new()))
            }
            Stage::Export { from, to } => {
                let record = self.record(&Stage::Transfer { from, to })?.context("the pair is not done")?;
                let found: findings::TransferFinding = serde_json::from_value(record.found)?;
                let (source, datasets) = self.transfer_source(from)?;
                let folder = self.out.join("carried");
                fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
                let file =
                    PathBuf::from("carried").join(format!("{}-to-{}.safetensors", found.from, found.to));
                let path = self.out.join(&file);
                let experiment = self.experiment(to, self.recipe.models[to].seeds[0])?;
                let evaluated = experiment.evaluated()?;
                let exported = export::export(&source, &found, datasets, &experiment, &evaluated, &path)?;
                Ok((serde_json::to_value(findings::Exported { file, ..exported })?, vec![path]))
            }
            Stage::Report => report::report(self),
        }
    }
}
