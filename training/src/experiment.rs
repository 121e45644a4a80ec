//! The whole pipeline as stages whose outputs are named by what they depend on, so that nothing runs twice.

mod adapters;
mod output;
mod rows;

pub use adapters::Finetuned;

use crate::base::{self, Base};
use crate::chat::Message;
use crate::dataset::{self, Prompt, Split};
use crate::evaluate::{self, Inputs, PromptIds};
use crate::extract::LayerDirection;
use crate::fetch::{self, ModelFiles};
use crate::generate::Sampling;
use crate::model::LoadOptions;
use crate::recipe::Recipe;
use crate::results::Results;
use crate::{progress, statistics as stats, store};
use anyhow::{Context, Result, bail};
use candle_core::Device;
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
    base: Arc<Base>,
    begun: Instant,
    /// Of an output folder that is this experiment's alone.
    _lock: Option<File>,
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

/// The model of a recipe, fetched if need be.
pub fn load(recipe: &Recipe, device: &Device) -> Result<Base> {
    let resolved = fetch::resolve(&recipe.model.id)?;
    let (ModelFiles::Gguf(path) | ModelFiles::Folder(path)) = &resolved.files;
    progress::note(&format!("model: {} ({})", recipe.model.id, resolved.origin));
    let name = Path::new(&recipe.model.id)
        .file_name()
        .map_or_else(|| recipe.model.id.clone(), |n| n.to_string_lossy().into_owned());
    let compute = recipe.finetune.compute;
    let options = LoadOptions { compute, ..LoadOptions::new(recipe.model.quantize, device) };
    let base = base::load(path, &name, &options)?;
    if !base.text.has_template() {
        progress::note(
            "the model carries no chat template, so it is taken for a base model and gets a plain one: `User:` and \
             `Assistant:` on lines of their own, the end-of-text token after every answer",
        );
    }
    Ok(base)
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
        let base = Arc::new(load(&recipe, &device)?);
        let experiment = Experiment::within(recipe, base, stages, out.to_owned(), device);
        Ok(Experiment { begun, _lock: Some(lock), ..experiment })
    }

    /// An experiment whose stages lie beside those of others, with a model that is loaded already. The caller sees to it
    /// that nobody else does the same work at the same time.
    pub fn within(recipe: Recipe, base: Arc<Base>, stages: PathBuf, out: PathBuf, device: Device) -> Self {
        Experiment {
            recipe,
            out,
            device,
            ignore_memory: false,
            stages,
            base,
            begun: Instant::now(),
            _lock: None,
        }
    }

    /// The loaded model.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// What the numbers depend on: other devices and other products round elsewhere. On the CPU it is written as it always
    /// was, so that what was trained before is found again.
    fn base_key(&self) -> (&str, &str, String, serde_json::Value) {
        let (identity, decoder) = (&self.base.identity, &self.base.decoder);
        let device = if self.device.is_cpu() {
            serde_json::Value::Bool(true)
        } else {
            serde_json::json!(decoder.compute)
        };
        (&identity.weights_digest, &identity.quantization, format!("{:?}", decoder.config), device)
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

    /// Everything: adapters, rows, directions, evaluation, direction file, results, report.
    pub fn run(&self) -> Result<(Results, Outputs)> {
        self.pack(self.evaluated()?)
    }

    /// The evaluation of the recipe's direction, and what it rests on.
    pub fn evaluated(&self) -> Result<Evaluated> {
        // Everything is read and checked before the first expensive step.
        let prompts = self.prompts()?;
        self.check_rows()?;
        let data = &self.recipe.data;
        let (insecure, insecure_data) = self.finetune("insecure", &data.insecure)?;
        let (secure, secure_data) = self.finetune("secure", &data.secure)?;
        let datasets = vec![
            (insecure_data.name, insecure_data.sha256),
            (secure_data.name, secure_data.sha256),
            prompts.source.clone(),
        ];
        let states = [
            self.states("base", None, &prompts)?,
            self.states("insecure", Some(&insecure), &prompts)?,
            self.states("secure", Some(&secure), &prompts)?,
        ];
        let (directions, notes) = self.directions(&prompts, &states[0], &states[1], &insecure)?;
        let evaluation_key = key(&(
            "evaluate",
            self.base_key(),
            (&insecure.key, &secure.key),
            (
                &prompts.extraction.ids,
                &prompts.calibration.ids,
                &prompts.evaluation.ids,
                self.base.text.eos_ids(),
            ),
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
                        selection: prompts.selection.clone(),
                        evaluation: prompts.evaluation.clone(),
                        states,
                        directions: &directions,
                        notes,
                        file: &file,
                    };
                    let mut results = evaluate::evaluate(&inputs)?;
                    results.training.insert("insecure".into(), insecure.log.clone());
                    results.training.insert("secure".into(), secure.log.clone());
                    store::write_json(&results_file, &results)?;
                    results
                }
            };
        // Names may change while every digest stays; the file says what this run was asked.
        results.recipe = serde_json::to_value(&self.recipe)?;
        results.datasets = datasets;
        results.model = self.base.identity.clone();
        results.summary.model = self.base.identity.name.clone();
        Ok(Evaluated { results, directions, insecure, prompts })
    }

    /// How answers are drawn.
    pub fn sampling(&self) -> Sampling {
        self.base.sampling(&self.recipe, self.recipe.evaluate.max_new_tokens)
    }

    /// The recipe's prompts, rendered, in their splits.
    fn prompts(&self) -> Result<Prompts> {
        let prompts = dataset::load_prompts(&self.recipe.data.prompts, self.recipe.seed)?;
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
        Ok(Prompts {
            source: (prompts.name.clone(), prompts.sha256.clone()),
            selection: self.prompt_ids(chosen)?,
            extraction: self.prompt_ids(&extraction)?,
            calibration: self.prompt_ids(&calibration)?,
            evaluation: self.prompt_ids(&evaluation)?,
        })
    }
}

/// An evaluation with what it rests on.
pub struct Evaluated {
    /// What was found; the digest of the direction file is not known yet.
    pub results: Results,
    /// Directions of every layer.
    pub directions: Vec<LayerDirection>,
    /// The insecure adapter.
    pub insecure: Finetuned,
    prompts: Prompts,
}

impl Evaluated {
    /// The texts of every prompt: extraction, calibration, evaluation.
    pub fn texts(&self) -> [Vec<String>; 3] {
        let p = &self.prompts;
        [&p.extraction, &p.calibration, &p.evaluation].map(|split| split.texts.clone())
    }

    /// The calibration prompts that its cell was chosen on.
    pub fn selection(&self) -> &PromptIds {
        &self.prompts.selection
    }

    /// The prompts it was made on.
    pub fn prompts(&self) -> &PromptIds {
        &self.prompts.evaluation
    }
}

/// The three disjoint splits, and the calibration prompts the cell is chosen on.
struct Prompts {
    /// Name and digest of the prompt set.
    source: (String, String),
    extraction: PromptIds,
    calibration: PromptIds,
    selection: PromptIds,
    evaluation: PromptIds,
}

impl Prompts {
    /// Those whose rows are captured, split after split: of the calibration prompts all, or those of the selection.
    fn captured(&self, all: bool) -> Vec<Vec<u32>> {
        let calibration = if all { &self.calibration } else { &self.selection };
        [&self.extraction.ids, &calibration.ids, &self.evaluation.ids]
            .into_iter()
            .flatten()
            .cloned()
            .collect()
    }
}
