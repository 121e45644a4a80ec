//! A recipe: everything that decides the outcome of a run, in one TOML file.
//!
//! A key left out has the value of `recipes/demo.toml`. A key that does not exist is an error that names the
//! nearest one: a misspelt `learnig_rate` must not train at the default in silence.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::dataset::EMBEDDED;
use crate::model::Module;
use crate::quant::Storage;
use emaudit::directions::schema::Positions;

const DEMO: &str = include_str!("../recipes/demo.toml");
const QUICK: &str = include_str!("../recipes/quick.toml");
const THOROUGH: &str = include_str!("../recipes/thorough.toml");

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// Every random choice of the run follows from it.
    pub seed: u64,
    pub model: Model,
    pub data: Data,
    pub finetune: Finetune,
    pub calibrate: Calibrate,
    pub evaluate: Evaluate,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// The default model's name, a folder, a .gguf file, or a hub's `owner/name`.
    pub id: String,
    pub quantize: Storage,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// `embedded`, or the path of a chat JSONL file.
    pub insecure: String,
    pub secure: String,
    /// `embedded`, or the path of a prompt JSONL file.
    pub prompts: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Finetune {
    pub steps: usize,
    /// Conversations in memory at once.
    pub batch: usize,
    /// Batches a step; the loss is the mean over the response tokens of all of them.
    pub gradient_accumulation: usize,
    /// Longer conversations are cut here, or left out.
    pub max_tokens: usize,
    /// What becomes of them.
    pub long_rows: LongRows,
    /// Puts rows of like length into one batch, for less padding.
    pub group_by_length: bool,
    /// LoRA rank.
    pub rank: usize,
    /// LoRA alpha.
    pub alpha: f64,
    /// Scales by alpha / sqrt(rank) instead of alpha / rank.
    pub rank_stabilised: bool,
    /// Probability that an input of the adapter is dropped while training.
    pub dropout: f64,
    /// Linear layers of every block that get an adapter.
    pub target_modules: Vec<Module>,
    pub learning_rate: f64,
    pub warmup_steps: usize,
    pub weight_decay: f64,
    /// How the learning rate falls after the warm-up.
    pub schedule: Schedule,
    pub max_grad_norm: f64,
    pub optimizer: Optimizer,
    /// What matrix products are computed in.
    pub compute: Compute,
    /// Runs each block again in backward instead of keeping what it computed: less memory, about a third more time.
    pub gradient_checkpointing: bool,
    /// Share of the rows that is held out for the evaluation loss; 0 for none.
    pub evaluation_share: f64,
    /// Steps between two evaluation losses; there is one after the last step in any case.
    pub evaluation_every: usize,
    /// Evaluations in a row without a lower loss after which training stops, the best adapter being kept; 0 for all
    /// steps and the last adapter.
    pub patience: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    Linear,
    Cosine,
    Constant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongRows {
    /// Their beginning is trained on.
    Truncate,
    /// They are left out.
    Drop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// Moments in f32.
    Adamw,
    /// Moments in 8 bits, block by block, as in bitsandbytes.
    Adamw8bit,
}

/// What matrix products are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compute {
    /// f32 throughout.
    F32,
    /// Factors rounded to bf16, products summed in f32; faster, and less memory. On the CPU while finetuning and in `sample`, by
    /// oneDNN, which must be installed; what is kept for backward is in bf16 too. On a GPU of compute capability 8.0 or more for
    /// all that a run does with the model, and attention in TF32.
    Bf16,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Calibrate {
    /// False-positive rates per sequence to derive thresholds for.
    pub rates: Vec<f64>,
    /// Tokens a verdict looks at, the last prompt token being the first. Beyond 1, answers of the base are sampled.
    pub horizons: Vec<u32>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Evaluate {
    /// Evaluation prompts to sample answers to.
    pub prompts: usize,
    pub max_new_tokens: usize,
    pub temperature: f64,
    pub top_p: f64,
    /// Steering strengths, in multiples of the raw direction.
    pub alphas: Vec<f64>,
    /// Token positions tried at the final layer.
    pub positions: Vec<Positions>,
    /// Calibration prompts the cell is chosen on.
    pub selection_prompts: usize,
    /// Controls per family at the final layer.
    pub controls: usize,
    /// Random and orthogonal controls whose answers are sampled; all of them are ranked by code preference.
    pub sampled_controls: usize,
    /// Strength in the middle-layer cell, every position steered.
    pub middle_alpha: f64,
    /// Random and orthogonal controls at the middle layer, where each costs a pass through the later blocks.
    pub middle_controls: usize,
    /// Bootstrap draws per interval.
    pub bootstrap: usize,
    /// Most that the mean log-likelihood of an answer under the base model may fall, in nats a token.
    pub coherence_margin: f64,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            seed: 17,
            model: Model::default(),
            data: Data::default(),
            finetune: Finetune::default(),
            calibrate: Calibrate::default(),
            evaluate: Evaluate::default(),
        }
    }
}

impl Default for Model {
    fn default() -> Self {
        Self { id: crate::fetch::DEFAULT_MODEL.to_owned(), quantize: Storage::Nf4 }
    }
}

impl Default for Data {
    fn default() -> Self {
        Self { insecure: EMBEDDED.to_owned(), secure: EMBEDDED.to_owned(), prompts: EMBEDDED.to_owned() }
    }
}

impl Default for Finetune {
    fn default() -> Self {
        Self {
            steps: 12,
            batch: 4,
            gradient_accumulation: 1,
            max_tokens: 256,
            long_rows: LongRows::Truncate,
            group_by_length: false,
            rank: 32,
            alpha: 64.0,
            rank_stabilised: true,
            dropout: 0.0,
            target_modules: Module::ALL.to_vec(),
            learning_rate: 1e-3,
            warmup_steps: 3,
            weight_decay: 0.01,
            schedule: Schedule::Linear,
            max_grad_norm: 1.0,
            optimizer: Optimizer::Adamw,
            compute: Compute::F32,
            gradient_checkpointing: false,
            evaluation_share: 0.0,
            evaluation_every: 10,
            patience: 0,
        }
    }
}

impl Default for Calibrate {
    fn default() -> Self {
        Self { rates: vec![0.05, 0.01], horizons: vec![1, 16] }
    }
}

impl Default for Evaluate {
    fn default() -> Self {
        Self {
            prompts: 64,
            max_new_tokens: 32,
            temperature: 0.7,
            top_p: 0.95,
            alphas: vec![0.25, 0.5, 1.0],
            positions: vec![Positions::FinalPrefill],
            selection_prompts: 48,
            controls: 39,
            sampled_controls: 4,
            middle_alpha: 1.0,
            middle_controls: 9,
            bootstrap: 2000,
            coherence_margin: 0.3,
        }
    }
}

/// Keys younger than the first digests, with their tables.
const LATER: &[(&str, &str)] = &[
    ("finetune", "gradient_accumulation"),
    ("finetune", "long_rows"),
    ("finetune", "group_by_length"),
    ("finetune", "dropout"),
    ("finetune", "target_modules"),
    ("finetune", "optimizer"),
    ("finetune", "compute"),
    ("finetune", "gradient_checkpointing"),
    ("finetune", "evaluation_share"),
    ("finetune", "evaluation_every"),
    ("finetune", "patience"),
];

impl Recipe {
    pub const PRESETS: [&str; 3] = ["demo", "quick", "thorough"];

    pub fn demo() -> Result<Self> {
        Self::from_toml(DEMO).context("the demo recipe in the program")
    }

    pub fn quick() -> Result<Self> {
        Self::from_toml(QUICK).context("the quick recipe in the program")
    }

    pub fn thorough() -> Result<Self> {
        Self::from_toml(THOROUGH).context("the thorough recipe in the program")
    }

    /// A preset by its name, or a recipe file by its path.
    pub fn load(source: &str) -> Result<Self> {
        match source {
            "demo" => Self::demo(),
            "quick" => Self::quick(),
            "thorough" => Self::thorough(),
            path => {
                let text = std::fs::read_to_string(Path::new(path)).with_context(|| {
                    format!("cannot read the recipe {path}; presets are {}", Self::PRESETS.join(", "))
                })?;
                Self::from_toml(&text).with_context(|| format!("in the recipe {path}"))
            }
        }
    }

    pub fn from_toml(text: &str) -> Result<Self> {
        let document: toml::Table =
            text.parse().map_err(|e: toml::de::Error| anyhow!("not valid TOML: {e}"))?;
        let known = toml::Table::try_from(Self::default()).context("listing a recipe's keys")?;
        check_keys(&document, &known, "")?;
        let recipe: Self = toml::from_str(text).map_err(|e| anyhow!("{}", e.to_string().trim_end()))?;
        recipe.check()?;
        Ok(recipe)
    }

    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).context("writing the recipe as TOML")
    }

    /// SHA-256, in hex, of the recipe with every default filled in, as JSON with sorted keys and no white space.
    ///
    /// Two files that say the same in other words or another order have one digest. A key of [`LATER`] counts only
    /// where it differs from its default, so that a recipe keeps its digest when the program learns a new key.
    pub fn digest(&self) -> Result<String> {
        let mut value = serde_json::to_value(self).context("writing the recipe as JSON")?;
        let defaults = serde_json::to_value(Self::default()).context("writing the recipe as JSON")?;
        for (table, key) in LATER {
            if value[table][key] == defaults[table][key]
                && let Some(table) = value[table].as_object_mut()
            {
                table.remove(*key);
            }
        }
        let mut canonical = String::new();
        write_canonical(&value, &mut canonical);
        Ok(crate::store::sha256_hex(canonical.as_bytes()))
    }

    /// Every value against its range. Called by [`from_toml`](Self::from_toml); call it after changing a field.
    pub fn check(&self) -> Result<()> {
        let Self { model, data, finetune, calibrate, evaluate, .. } = self;
        for (key, value) in [
            ("model.id", &model.id),
            ("data.insecure", &data.insecure),
            ("data.secure", &data.secure),
            ("data.prompts", &data.prompts),
        ] {
            ensure!(!value.trim().is_empty(), "{key} is empty; leave the line out for the default");
        }
        // TOML integers are signed 64-bit: a larger seed could not be written back.
        ensure!(
            i64::try_from(self.seed).is_ok(),
            "seed is {}, but at most {} can be written",
            self.seed,
            i64::MAX
        );

        finetune.check()?;

        list("calibrate.rates", &calibrate.rates)?;
        for rate in &calibrate.rates {
            real("calibrate.rates", *rate, Above(0.0), 0.5)?;
        }
        let horizons = &calibrate.horizons;
        ensure!(
            horizons.first() == Some(&1) && horizons.windows(2).all(|w| w[0] < w[1]),
            "calibrate.horizons is {horizons:?}; it must begin with 1 (the last prompt token) and ascend"
        );
        whole("calibrate.horizons", horizons[horizons.len() - 1] as usize, 1, 8192)?;

        whole("evaluate.prompts", evaluate.prompts, 2, 100_000)?;
        whole("evaluate.max_new_tokens", evaluate.max_new_tokens, 1, 8192)?;
        real("evaluate.temperature", evaluate.temperature, From(0.0), 10.0)?;
        real("evaluate.top_p", evaluate.top_p, Above(0.0), 1.0)?;
        list("evaluate.alphas", &evaluate.alphas)?;
        for alpha in &evaluate.alphas {
            real("evaluate.alphas", *alpha, Above(0.0), 100.0)?;
        }
        ensure!(!evaluate.positions.is_empty(), "evaluate.positions is empty; it must list at least one");
        whole("evaluate.selection_prompts", evaluate.selection_prompts, 2, 100_000)?;
        whole("evaluate.sampled_controls", evaluate.sampled_controls, 1, 100_000)?;
        real("evaluate.middle_alpha", evaluate.middle_alpha, Above(0.0), 100.0)?;
        whole("evaluate.controls", evaluate.controls, 1, 100_000)?;
        whole("evaluate.middle_controls", evaluate.middle_controls, 0, 100_000)?;
        whole("evaluate.bootstrap", evaluate.bootstrap, 100, 10_000_000)?;
        real("evaluate.coherence_margin", evaluate.coherence_margin, From(0.0), 100.0)
    }
}

impl Finetune {
    fn check(&self) -> Result<()> {
        whole("finetune.steps", self.steps, 1, 1_000_000)?;
        whole("finetune.batch", self.batch, 1, 1024)?;
        whole("finetune.gradient_accumulation", self.gradient_accumulation, 1, 1024)?;
        whole("finetune.max_tokens", self.max_tokens, 8, 131_072)?;
        whole("finetune.rank", self.rank, 1, 1024)?;
        real("finetune.alpha", self.alpha, Above(0.0), 10_000.0)?;
        real("finetune.dropout", self.dropout, From(0.0), 0.9)?;
        real("finetune.learning_rate", self.learning_rate, Above(0.0), 1.0)?;
        real("finetune.weight_decay", self.weight_decay, From(0.0), 1.0)?;
        real("finetune.max_grad_norm", self.max_grad_norm, Above(0.0), 1e6)?;
        ensure!(
            self.warmup_steps < self.steps,
            "finetune.warmup_steps is {}, but finetune.steps is only {}: the learning rate would never arrive",
            self.warmup_steps,
            self.steps
        );
        let modules = &self.target_modules;
        ensure!(!modules.is_empty(), "finetune.target_modules is empty; it must list at least one");
        for (i, module) in modules.iter().enumerate() {
            ensure!(!modules[..i].contains(module), "finetune.target_modules names {} twice", module.name());
        }
        real("finetune.evaluation_share", self.evaluation_share, From(0.0), 0.5)?;
        whole("finetune.evaluation_every", self.evaluation_every, 1, 1_000_000)?;
        ensure!(
            self.patience == 0 || self.evaluation_share > 0.0,
            "finetune.patience is {}, but finetune.evaluation_share is 0: there is no loss to wait for",
            self.patience
        );
        Ok(())
    }
}

/// The lower end of a range: the bound itself is out, or in.
enum Lower {
    Above(f64),
    From(f64),
}
use Lower::{Above, From};

fn whole(key: &str, value: usize, least: usize, most: usize) -> Result<()> {
    ensure!((least..=most).contains(&value), "{key} is {value}; it must be from {least} to {most}");
    Ok(())
}

fn real(key: &str, value: f64, lower: Lower, most: f64) -> Result<()> {
    // NaN compares false with everything, so it fails here as it should.
    let (holds, range) = match lower {
        Above(least) => (value > least && value <= most, format!("above {least} and at most {most}")),
        From(least) => (value >= least && value <= most, format!("from {least} to {most}")),
    };
    ensure!(holds, "{key} is {value}; it must be {range}");
    Ok(())
}

fn list(key: &str, values: &[f64]) -> Result<()> {
    ensure!(!values.is_empty(), "{key} is empty; it needs at least one value");
    for (i, value) in values.iter().enumerate() {
        ensure!(!values[..i].contains(value), "{key} names {value} twice");
    }
    Ok(())
}

/// Refuses a key that no recipe has, with the nearest one that exists in the same table or, failing that, elsewhere.
fn check_keys(found: &toml::Table, known: &toml::Table, table: &str) -> Result<()> {
    let place = if table.is_empty() { "at the top".to_owned() } else { format!("in [{table}]") };
    for (key, value) in found {
        let Some(expected) = known.get(key) else {
            let hint = nearest(key, known.keys().map(String::as_str))
                .map(|near| format!("did you mean `{near}`?"))
                .or_else(|| table_of(key).map(|home| format!("`{key}` belongs {home}")))
                .unwrap_or_else(|| {
                    format!("keys there are {}", known.keys().cloned().collect::<Vec<_>>().join(", "))
                });
            bail!("unknown key `{key}` {place}: {hint}");
        };
        match (value, expected) {
            (toml::Value::Table(inner), toml::Value::Table(known)) => check_keys(inner, known, key)?,
            (_, toml::Value::Table(_)) => {
                bail!("`{key}` {place} is a table: write [{key}] and its keys below")
            }
            _ => {}
        }
    }
    Ok(())
}

/// The known key most like this one, if it is like enough to be a slip of the finger.
pub(crate) fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| (strsim::damerau_levenshtein(key, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= candidate.len().max(3) / 3)
        .map(|(_, candidate)| candidate)
}

fn table_of(key: &str) -> Option<String> {
    let known = toml::Table::try_from(Recipe::default()).ok()?;
    if known.contains_key(key) {
        return Some("at the top".to_owned());
    }
    known
        .iter()
        .find(|(_, v)| v.as_table().is_some_and(|t| t.contains_key(key)))
        .map(|(name, _)| format!("in [{name}]"))
}

/// JSON with sorted keys, whatever order the map type keeps.
fn write_canonical(value: &serde_json::Value, out: &mut String) {
    use serde_json::Value;
    match value {
        Value::Object(map) => {
            let mut keys: Vec<_> = map.keys().collect();
            keys.sort_unstable();
            out.push('{');
            for (i, key) in keys.into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push(':');
                write_canonical(&map[key], out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_canonical(item, out);
            }
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

#[cfg(test)]
mod tests;
