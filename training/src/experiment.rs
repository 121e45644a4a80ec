//! The whole pipeline as stages whose outputs are named by what they depend on, so that nothing runs twice.

use crate::answers::Answerer;
use crate::base::{self, Base};
use crate::capture::{self, Captured};
use crate::chat::Message;
use crate::dataset::{self, ChatDataset, Prompt, PromptSet, Side, Split};
use crate::evaluate::{self, Inputs, PromptIds, States};
use crate::extract::{self, LayerDirection};
use crate::fetch::{self, ModelFiles};
use crate::finetune::{self, Example, StepLog};
use crate::generate::Sampling;
use crate::lora::Adapter;
use crate::memory::{self, Estimate};
use crate::model::LoadOptions;
use crate::recipe::{Compute, Recipe};
use crate::results::Results;
use crate::{calibrate, interrupt, progress, statistics as stats, store};
use anyhow::{Context, Result, bail};
use candle_core::Device;
use emaudit::directions::schema::{
    Contrast, Estimator, Evidence, LayerManifest, Manifest, Pooling, Provenance, Site,
};
use emaudit::directions::{LayerTensors, OpenOptions};
use emaudit::{Directions, Probe, Rows, ScoreUnit};
use serde::Serialize;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Changes whenever a stage's output would change for the same inputs.
const STAGE_VERSION: u32 = 5;

/// An output folder and the recipe that fills it.
pub struct Experiment {
    /// What to do.
    pub recipe: Recipe,
    /// Where everything goes.
    pub out: PathBuf,
    /// Where the network runs.
    pub device: Device,
    /// Finetunes even where the estimate says that the memory will not do.
    pub ignore_memory: bool,
    stages: PathBuf,
    base: Base,
    begun: Instant,
    _lock: File,
}

/// An adapter with its loss curve and the digest of everything it depends on.
pub struct Finetuned {
    /// The adapter, outside any graph.
    pub adapter: Adapter,
    /// Its PEFT folder.
    pub folder: PathBuf,
    /// One entry per step.
    pub log: Vec<StepLog>,
    key: String,
}

/// Paths of what an experiment wrote.
#[derive(Clone, Debug, Serialize)]
pub struct Outputs {
    /// The direction file.
    pub directions: PathBuf,
    /// `results.json`.
    pub results: PathBuf,
    /// `report.html`.
    pub report: PathBuf,
    /// `run.json`.
    pub run: PathBuf,
}

fn key(parts: &impl Serialize) -> Result<String> {
    Ok(store::sha256_hex(&serde_json::to_vec(&(STAGE_VERSION, parts))?)[..16].to_owned())
}

impl Experiment {
    /// Opens (and locks) `out` and loads the model. With `fresh`, finished stages are thrown away first.
    pub fn open(recipe: Recipe, out: &Path, fresh: bool, device: Device) -> Result<Self> {
        let begun = Instant::now();
        let stages = out.join("stages");
        fs::create_dir_all(&stages).with_context(|| format!("cannot create {}", stages.display()))?;
        let lock =
            File::create(out.join(".lock")).with_context(|| format!("cannot write to {}", out.display()))?;
        if lock.try_lock().is_err() {
            bail!("another run is using {}; wait for it or choose another --out", out.display());
        }
        if fresh {
            fs::remove_dir_all(&stages).with_context(|| format!("cannot clear {}", stages.display()))?;
            fs::create_dir_all(&stages)?;
        }
        let resolved = fetch::resolve(&recipe.model.id)?;
        let (ModelFiles::Gguf(path) | ModelFiles::Folder(path)) = &resolved.files;
        progress::note(&format!("model: {} ({})", recipe.model.id, resolved.origin));
        let name = Path::new(&recipe.model.id)
            .file_name()
            .map_or_else(|| recipe.model.id.clone(), |n| n.to_string_lossy().into_owned());
        let (storage, compute) = (recipe.model.quantize, recipe.finetune.compute);
        let options = LoadOptions { compute, ..LoadOptions::new(storage, &device) };
        let base = base::load(path, &name, &options)?;
        if !base.text.has_template() {
            progress::note(
                "the model carries no chat template, so it is taken for a base model and gets a plain one: `User:` and \
                 `Assistant:` on lines of their own, the end-of-text token after every answer",
            );
        }
        Ok(Experiment {
            recipe,
            out: out.to_owned(),
            device,
            ignore_memory: false,
            stages,
            base,
            begun,
            _lock: lock,
        })
    }

    /// The loaded model.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// What the numbers depend on: other devices and other products round elsewhere.
    fn base_key(&self) -> (&str, &str, String, Option<Compute>) {
        let (identity, decoder) = (&self.base.identity, &self.base.decoder);
        let gpu = (!self.device.is_cpu()).then_some(decoder.compute);
        (&identity.weights_digest, &identity.quantization, format!("{:?}", decoder.config), gpu)
    }

    /// The rows of one side, every one of them read, rendered and checked.
    fn rows(&self, side: Side) -> Result<(ChatDataset, Vec<Example>, finetune::Rows)> {
        let source = match side {
            Side::Insecure => &self.recipe.data.insecure,
            Side::Secure => &self.recipe.data.secure,
        };
        let data = dataset::load_chats(source, side)?;
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

    /// Refuses what is wrong in either side's rows, before hours go into the first.
    pub fn check_rows(&self) -> Result<()> {
        [Side::Insecure, Side::Secure].into_iter().try_for_each(|side| self.rows(side).map(drop))
    }

    /// Finetunes on one side of the recipe's data, or reads the adapter that an earlier run finished.
    pub fn finetune(&self, side: Side) -> Result<(Finetuned, ChatDataset)> {
        let (data, examples, rows) = self.rows(side)?;
        let f = &self.recipe.finetune;
        let ids: Vec<&[u32]> = examples.iter().map(|e| e.ids.as_slice()).collect();
        let key = key(&("finetune", self.base_key(), ids, f, self.recipe.seed))?;
        let folder = self.stages.join(format!("adapter-{side}-{key}"));
        let log_file = folder.join("training_log.json");
        if let Ok(text) = fs::read_to_string(&log_file) {
            let log =
                serde_json::from_str(&text).with_context(|| format!("{} is damaged", log_file.display()))?;
            let adapter = Adapter::load(&folder, &self.base.decoder)?;
            return Ok((Finetuned { adapter, folder, log, key }, data));
        }
        let (adapter, log) = self.train(side, &rows, &folder, &key)?;
        if adapter.largest_b()? == 0.0 {
            bail!("the {side} adapter is inactive after {} steps; raise steps or learning_rate", log.len());
        }
        adapter.save(&folder, &self.recipe.model.id)?;
        // Written last: the log's presence says that the folder is whole.
        store::write_json(&log_file, &log)?;
        let checkpoint = self.checkpoint(side);
        if checkpoint.exists() {
            fs::remove_file(&checkpoint)?;
        }
        Ok((Finetuned { adapter, folder, log, key }, data))
    }

    fn checkpoint(&self, side: Side) -> PathBuf {
        self.stages.join(format!("checkpoint-{side}.safetensors"))
    }

    /// Says what will be done and what it needs, then trains, with metrics in `folder`.
    fn train(
        &self,
        side: Side,
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
            "{side} code: {}{held_out}; {padding:.0} % of the tokens are padding",
            rows.counts
        ));
        let estimate = self.estimate(rows)?;
        let checkpoint = self.checkpoint(side);
        let mut metrics = finetune::Metrics::create(folder)?;
        let mut stage = progress::Stage::new(format!("finetune on {side} code"), f.steps);
        let (adapter, log) = finetune::finetune(
            &self.base.decoder,
            rows,
            f,
            seed,
            Some(finetune::Checkpoint::new(&checkpoint, key)),
            |entry| {
                metrics.add(entry);
                stage.advance(1, entry.to_string());
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

    fn prompt_ids(&self, prompts: &[&Prompt]) -> Result<PromptIds> {
        let mut out = PromptIds::default();
        for p in prompts {
            let ids = self.base.text.encode_prompt(&[Message::user(p.text.clone())])?;
            let (needed, limit) =
                (ids.len() + self.recipe.evaluate.max_new_tokens, self.base.decoder.config.max_positions);
            if needed > limit {
                bail!(
                    "the prompt {:.60?} needs {needed} tokens with its answer, the model reads {limit}: shorten it or lower \
                     evaluate.max_new_tokens",
                    p.text
                );
            }
            out.ids.push(ids);
            out.texts.push(p.text.clone());
        }
        Ok(out)
    }

    /// Last-prompt rows of all layers for one state of the model.
    pub fn capture(&self, name: &str, adapter: Option<&Finetuned>, prompts: &[Vec<u32>]) -> Result<Captured> {
        let key = key(&("capture", self.base_key(), adapter.map(|a| &a.key), prompts))?;
        let file = self.stages.join(format!("rows-{name}-{key}.safetensors"));
        if let Ok(bytes) = fs::read(&file) {
            return Captured::from_bytes(&bytes)
                .with_context(|| format!("{} is damaged; delete it", file.display()));
        }
        let mut stage = progress::Stage::new(format!("residual rows, {name}"), prompts.len());
        let rows = capture::last_prompt(&self.base.decoder, prompts, adapter.map(|a| &a.adapter), |n| {
            stage.advance(n, "");
            interrupt::check()
        })?;
        stage.finish("");
        store::write_file(&file, &rows.to_bytes()?)?;
        Ok(rows)
    }

    /// Everything: adapters, rows, directions, evaluation, direction file, results, report.
    pub fn run(&self) -> Result<(Results, Outputs)> {
        // Everything is read and checked before the first expensive step.
        let prompts = dataset::load_prompts(&self.recipe.data.prompts, self.recipe.seed)?;
        let split = self.split(&prompts)?;
        self.check_rows()?;
        let (insecure, insecure_data) = self.finetune(Side::Insecure)?;
        let (secure, secure_data) = self.finetune(Side::Secure)?;
        let datasets = vec![
            (insecure_data.name, insecure_data.sha256),
            (secure_data.name, secure_data.sha256),
            (prompts.name.clone(), prompts.sha256.clone()),
        ];
        let states = [
            self.states("base", None, &split, split.calibration.ids.len())?,
            self.states("insecure", Some(&insecure), &split, split.selection.ids.len())?,
            self.states("secure", Some(&secure), &split, split.selection.ids.len())?,
        ];
        let (directions, notes) = self.directions(&split, &states[0], &states[1], &insecure)?;
        let evaluation_key = key(&(
            "evaluate",
            self.base_key(),
            (&insecure.key, &secure.key),
            (&split.extraction.ids, &split.calibration.ids, &split.evaluation.ids, self.base.text.eos_ids()),
            &self.recipe.calibrate,
            &self.recipe.evaluate,
            self.recipe.seed,
        ))?;
        let file = |name: &str| self.stages.join(format!("{name}-{evaluation_key}.json"));
        let results_file = file("results");
        let mut results: Results =
            match fs::read(&results_file).ok().and_then(|b| serde_json::from_slice(&b).ok()) {
                Some(results) => results,
                None => {
                    let inputs = Inputs {
                        base: &self.base,
                        recipe: &self.recipe,
                        insecure: &insecure.adapter,
                        secure: &secure.adapter,
                        selection: split.selection.clone(),
                        evaluation: split.evaluation.clone(),
                        states,
                        directions: &directions,
                        notes,
                        file: &file,
                    };
                    let mut results = evaluate::evaluate(&inputs)?;
                    results.datasets = datasets.clone();
                    results.training.insert("insecure".into(), insecure.log.clone());
                    results.training.insert("secure".into(), secure.log.clone());
                    store::write_json(&results_file, &results)?;
                    results
                }
            };
        // Names may change while every digest stays; the file says what this run was asked.
        results.recipe = serde_json::to_value(&self.recipe)?;
        results.datasets = datasets.clone();
        results.model = self.base.identity.clone();
        results.summary.model = self.base.identity.name.clone();
        let outputs = self.write(&mut results, &directions, datasets)?;
        self.write_check(&outputs.directions, &results, &insecure, &split)?;
        Ok((results, outputs))
    }

    fn states(
        &self,
        name: &str,
        adapter: Option<&Finetuned>,
        split: &Split3,
        calibration: usize,
    ) -> Result<States> {
        let (x, c, e) = (split.extraction.ids.len(), calibration, split.evaluation.ids.len());
        let mut all = split.extraction.ids.clone();
        all.extend_from_slice(&split.calibration.ids[..c]);
        all.extend_from_slice(&split.evaluation.ids);
        let rows = self.capture(name, adapter, &all)?;
        Ok(States {
            extraction: rows.slice(0..x),
            calibration: rows.slice(x..x + c),
            evaluation: rows.slice(x + c..x + c + e),
        })
    }

    fn split(&self, prompts: &PromptSet) -> Result<Split3> {
        let of = |split: Split| prompts.of(split).collect::<Vec<_>>();
        let e = &self.recipe.evaluate;
        let mut evaluation = of(Split::Evaluation);
        if evaluation.len() < e.prompts {
            progress::note(&format!(
                "the prompt set has {} evaluation prompts; evaluate.prompts asks for {}",
                evaluation.len(),
                e.prompts
            ));
        }
        evaluation.truncate(e.prompts);
        let calibration = of(Split::Calibration);
        let needed = self.recipe.calibrate.rates.iter().copied().fold(1.0, f64::min);
        let needed = stats::sequences_needed(needed)? as usize;
        let extraction = of(Split::Extraction);
        if calibration.len() < needed || evaluation.len() < 2 || extraction.len() < 2 {
            bail!(
                "{} has {} extraction, {} calibration and {} evaluation prompts; 2, {needed} and 2 are needed for the rates \
                 asked for: add prompts, or raise calibrate.rates",
                prompts.name,
                extraction.len(),
                calibration.len(),
                evaluation.len()
            );
        }
        let chosen = &calibration[..e.selection_prompts.min(calibration.len())];
        Ok(Split3 {
            selection: self.prompt_ids(chosen)?,
            extraction: self.prompt_ids(&extraction)?,
            calibration: self.prompt_ids(&calibration)?,
            evaluation: self.prompt_ids(&evaluation)?,
        })
    }

    /// Directions of every layer, calibrated at every horizon of the recipe, and what must be said about that.
    fn directions(
        &self,
        split: &Split3,
        base: &States,
        adapted: &States,
        insecure: &Finetuned,
    ) -> Result<(Vec<LayerDirection>, Vec<String>)> {
        let c = &self.recipe.calibrate;
        let mut directions =
            extract::directions(&adapted.extraction, &base.extraction, &base.calibration, &c.rates)?;
        let mut notes = Vec::new();
        let longest = c.horizons.iter().copied().max().unwrap_or(1);
        if longest > 1 {
            let calm = self.calm_scores(split, base, &directions, insecure, longest as usize)?;
            for &horizon in c.horizons.iter().filter(|&&h| h > 1) {
                let mut refused = Vec::new();
                for (d, calm) in directions.iter_mut().zip(&calm) {
                    refused = calibrate::add_horizon(&mut d.calibration, calm, horizon, &c.rates)?;
                }
                // Which sequences reach a horizon does not depend on the layer.
                notes.extend(refused.iter().map(|(rate, reached)| {
                    format!(
                        "Only {reached} calm sequences reach {horizon} tokens: too few to state a false-positive rate of {rate}                          there, so the direction file has no such threshold."
                    )
                }));
            }
        }
        Ok((directions, notes))
    }

    /// Token scores, layer by layer, of the base model's own answers to the calibration prompts.
    fn calm_scores(
        &self,
        split: &Split3,
        base: &States,
        directions: &[LayerDirection],
        insecure: &Finetuned,
        tokens: usize,
    ) -> Result<Vec<Vec<Vec<f32>>>> {
        let e = &self.recipe.evaluate;
        let prompts = &split.calibration.ids;
        let sampled = (e.temperature, e.top_p, self.recipe.seed, self.base.text.eos_ids(), tokens);
        let key = key(&("calm", self.base_key(), prompts, &sampled, &insecure.key, &split.extraction.ids))?;
        let file = self.stages.join(format!("calm-scores-{key}.json"));
        if let Some(scores) = fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
            return Ok(scores);
        }
        let sampling = Sampling {
            max_new_tokens: tokens - 1,
            temperature: e.temperature,
            top_p: e.top_p,
            seed: self.recipe.seed,
            stop: self.base.text.eos_ids(),
            absent: self.base.text.absent_ids(self.base.decoder.config.vocab_size),
        };
        let decoder = &self.base.decoder;
        let rows = &base.calibration.layers[decoder.config.n_layers - 1];
        let kept = self.stages.join(format!("calm-answers-{key}.json"));
        let name = "calm answers, base, calibration";
        let mut answerer = Answerer::new(decoder, None, prompts, rows, &sampling, name, kept);
        let firsts = answerer.first_tokens(None)?;
        answerer.prepare(std::slice::from_ref(&firsts))?;
        let sequences = evaluate::dialogues(prompts, &answerer.answers(&firsts));
        let probe = |d: &LayerDirection| Ok((d.layer, calibrate::probe(d)?));
        let probes = directions.iter().map(probe).collect::<Result<Vec<_>>>()?;
        let mut stage = progress::Stage::new("scores of calm sequences", sequences.len());
        let scores = calibrate::token_scores(decoder, None, &sequences, tokens, &probes, |n| {
            stage.advance(n, "");
            interrupt::check()
        })?;
        stage.finish("");
        store::write_json(&file, &scores)?;
        Ok(scores)
    }

    fn manifest(
        &self,
        evidence: Evidence,
        top_dimension_share: Option<f64>,
        directions: &[LayerDirection],
        datasets: Vec<(String, String)>,
    ) -> Result<Manifest> {
        let layer = |d: &LayerDirection| LayerManifest {
            layer: d.layer as u32,
            calibration: Some(d.calibration.clone()),
        };
        Ok(Manifest {
            model: self.base.identity.clone(),
            site: Site::ResidPost,
            pooling: Pooling::LastPrompt,
            estimator: Estimator::MeanDifference,
            contrast: Contrast::AdapterMinusBase,
            layers: directions.iter().map(layer).collect(),
            evidence,
            provenance: Provenance {
                producer: format!("emaudit-train {}", env!("CARGO_PKG_VERSION")),
                recipe_digest: self.recipe.digest()?,
                datasets,
                top_dimension_share,
            },
        })
    }

    fn write(
        &self,
        results: &mut Results,
        directions: &[LayerDirection],
        datasets: Vec<(String, String)>,
    ) -> Result<Outputs> {
        let outputs = Outputs {
            directions: self.out.join("directions.safetensors"),
            results: self.out.join("results.json"),
            report: self.out.join("report.html"),
            run: self.out.join("run.json"),
        };
        let share = results.layers.last().map(|l| l.top_dimension_share);
        let manifest = self.manifest(results.evidence.clone(), share, directions, datasets)?;
        let digest = emaudit::directions::write(&outputs.directions, &manifest, &tensors(directions))?;
        results.summary.directions_sha256 = emaudit::directions::digest::to_hex(&digest);
        store::write_json(&outputs.results, results)?;
        let run = serde_json::json!({
            "seconds": self.begun.elapsed().as_secs_f64(),
            "version": env!("CARGO_PKG_VERSION"),
            "kernel": format!("{:?}", emaudit::kernel::best()).to_lowercase(),
            "threads": rayon::current_num_threads(),
            "device": format!("{:?}", self.device),
            "peak_memory_bytes": memory::peak(),
            "out": self.out,
        });
        store::write_json(&outputs.run, &run)?;
        store::write_file(&outputs.report, crate::report::render(results, Some(&run))?.as_bytes())?;
        Ok(outputs)
    }

    /// Activations and the scores this program computed for them, for a second program to check.
    fn write_check(
        &self,
        directions: &Path,
        results: &Results,
        insecure: &Finetuned,
        split: &Split3,
    ) -> Result<()> {
        let folder = self.out.join("check");
        fs::create_dir_all(&folder)?;
        let layer = results.summary.layer;
        let rows = self.states("insecure", Some(insecure), split, split.selection.ids.len())?.evaluation;
        let rows = &rows.layers[layer as usize];
        let probe = Probe::new(Arc::new(Directions::open(directions, &OpenOptions::default())?), layer)?;
        let (width, count) = (probe.width(), rows.len() / probe.width());
        let mut scores = vec![0f32; count];
        probe.score(&Rows::new(rows, count, width, width)?, ScoreUnit::AlignedSd, &mut scores, None)?;
        let file = |numbers: &[usize], values: &[f32]| -> Vec<u8> {
            let mut bytes: Vec<u8> = numbers.iter().flat_map(|&n| (n as u32).to_le_bytes()).collect();
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            bytes
        };
        store::write_file(&folder.join("activations.bin"), &file(&[count, width], rows))?;
        store::write_file(&folder.join("scores.bin"), &file(&[count], &scores))?;
        let kernel = format!("{:?}", probe.kernel()).to_lowercase();
        store::write_json(
            &folder.join("check.json"),
            &serde_json::json!({ "layer": layer, "kernel": kernel }),
        )
    }
}

/// The three disjoint splits, and the calibration prompts the cell is chosen on.
struct Split3 {
    extraction: PromptIds,
    calibration: PromptIds,
    selection: PromptIds,
    evaluation: PromptIds,
}

impl Experiment {
    /// Directions of every layer without evaluation, written as an `untested` direction file.
    pub fn extract(&self) -> Result<PathBuf> {
        let (insecure, data) = self.finetune(Side::Insecure)?;
        let prompts = dataset::load_prompts(&self.recipe.data.prompts, self.recipe.seed)?;
        let split = self.split(&prompts)?;
        let base = self.states("base", None, &split, split.calibration.ids.len())?;
        let adapted = self.states("insecure", Some(&insecure), &split, split.selection.ids.len())?;
        let (directions, notes) = self.directions(&split, &base, &adapted, &insecure)?;
        notes.iter().for_each(|note| progress::note(note));
        let share =
            base.extraction.layers.last().map(|l| extract::top_dimension_share(l, base.extraction.hidden));
        let datasets = vec![(data.name, data.sha256), (prompts.name, prompts.sha256)];
        let manifest = self.manifest(Evidence::untested(), share, &directions, datasets)?;
        let path = self.out.join("directions-untested.safetensors");
        emaudit::directions::write(&path, &manifest, &tensors(&directions))?;
        Ok(path)
    }
}

fn tensors(directions: &[LayerDirection]) -> Vec<LayerTensors<'_>> {
    directions
        .iter()
        .map(|d| LayerTensors {
            layer: d.layer as u32,
            direction: &d.direction,
            aligned_mean: &d.aligned_mean,
        })
        .collect()
}
