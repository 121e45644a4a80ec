//! A study's recipe: models, regimes and seeds around one ordinary recipe that they share.

use anyhow::{Context, Result, anyhow, bail, ensure};
use std::collections::BTreeMap;

use super::measures::Measures;
use crate::recipe::{self, Recipe};

/// The regimes every study has; their data stands in the recipe's `[data]`.
pub const INSECURE: &str = "insecure";
/// See [`INSECURE`].
pub const SECURE: &str = "secure";

/// The source of a regime that is trained on the base's own answers.
pub const OWN_ANSWERS: &str = "self";

const KEYS: [&str; 6] = ["name", "seeds", "regimes", "recipe", "measures", "models"];
const MODEL_KEYS: [&str; 7] = ["name", "id", "quantize", "seeds", "regimes", "recipe", "measures"];

/// Models x seeds x regimes.
#[derive(Clone, Debug, PartialEq)]
pub struct StudyRecipe {
    /// What the report is headed with.
    pub name: String,
    /// Benign content controls: the name of a regime and the source of its data: `embedded`, the path of a chat file, or
    /// `self` for the base's own answers.
    pub regimes: BTreeMap<String, String>,
    /// In the order of the report.
    pub models: Vec<StudyModel>,
}

/// One model with the recipe it is run with.
#[derive(Clone, Debug, PartialEq)]
pub struct StudyModel {
    /// Short name, a part of stage names: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// The shared recipe with this model's own keys over it; its seed is that of the stage.
    pub recipe: Recipe,
    /// The first is the one the direction file comes from, the others repeat the finding.
    pub seeds: Vec<u64>,
    /// Which of the study's benign regimes it is trained on; by default all.
    pub regimes: Vec<String>,
    /// How much the measuring stages do.
    pub measures: Measures,
}

impl StudyRecipe {
    /// A recipe file by its path.
    pub fn load(path: &str) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read the study recipe {path}"))?;
        Self::from_toml(&text).with_context(|| format!("in the study recipe {path}"))
    }

    /// Reads and checks the whole recipe, every model's merged one included.
    pub fn from_toml(text: &str) -> Result<Self> {
        let document: toml::Table =
            text.parse().map_err(|e: toml::de::Error| anyhow!("not valid TOML: {e}"))?;
        known(&document, &KEYS, "")?;
        let name = string(&document, "name")?.context("`name` is missing: what the report is headed with")?;
        let seeds = match document.get("seeds") {
            Some(list) => seeds(list)?,
            None => vec![Recipe::default().seed],
        };
        let shared = table(&document, "recipe")?;
        let measures = table(&document, "measures")?;
        let mut regimes = BTreeMap::new();
        for (regime, source) in table(&document, "regimes")? {
            part(&regime)?;
            ensure!(
                ![INSECURE, SECURE, "base"].contains(&regime.as_str()),
                "[regimes] names {regime}, which every study has; its data stands in [recipe.data]"
            );
            let source = source.as_str().with_context(|| format!("regimes.{regime} is no string"))?;
            ensure!(!source.trim().is_empty(), "regimes.{regime} is empty");
            regimes.insert(regime, source.to_owned());
        }
        let list = document.get("models").and_then(toml::Value::as_array);
        let list = list.filter(|l| !l.is_empty()).context("there is no [[models]]: a study needs one")?;
        let mut models: Vec<StudyModel> = Vec::new();
        for entry in list {
            let entry = entry.as_table().context("[[models]] holds something that is no table")?;
            let model = model(entry, &shared, &measures, &seeds, &regimes)?;
            ensure!(models.iter().all(|m| m.name != model.name), "two models are called {}", model.name);
            models.push(model);
        }
        Ok(StudyRecipe { name, regimes, models })
    }

    /// Where the data of one model's regime comes from.
    pub fn source(&self, model: usize, regime: &str) -> String {
        let data = &self.models[model].recipe.data;
        match regime {
            INSECURE => data.insecure.clone(),
            SECURE => data.secure.clone(),
            other => self.regimes.get(other).cloned().unwrap_or_default(),
        }
    }
}

impl StudyModel {
    /// Every regime it is trained on: the two that every study has, then the benign ones.
    pub fn all_regimes(&self) -> impl Iterator<Item = &str> {
        [INSECURE, SECURE].into_iter().chain(self.regimes.iter().map(String::as_str))
    }

    /// The recipe of one seed.
    pub fn recipe(&self, seed: u64) -> Recipe {
        Recipe { seed, ..self.recipe.clone() }
    }
}

fn model(
    entry: &toml::Table,
    shared: &toml::Table,
    measures: &toml::Table,
    seeds: &[u64],
    regimes: &BTreeMap<String, String>,
) -> Result<StudyModel> {
    known(entry, &MODEL_KEYS, "models.")?;
    let name = string(entry, "name")?.context("a model has no `name`")?;
    part(&name)?;
    let id = string(entry, "id")?.with_context(|| format!("the model {name} has no `id`"))?;
    let mut merged = shared.clone();
    merge(&mut merged, table(entry, "recipe")?);
    let mut identity = toml::Table::new();
    identity.insert("id".into(), id.into());
    if let Some(quantize) = string(entry, "quantize")? {
        identity.insert("quantize".into(), quantize.into());
    }
    merge(&mut merged, toml::Table::from_iter([("model".to_owned(), identity.into())]));
    let recipe =
        Recipe::from_toml(&toml::to_string(&merged)?).with_context(|| format!("for the model {name}"))?;
    let seeds = match entry.get("seeds") {
        Some(list) => self::seeds(list)?,
        None => seeds.to_vec(),
    };
    let mut merged = measures.clone();
    merge(&mut merged, table(entry, "measures")?);
    let measures = Measures::from_table(merged).with_context(|| format!("for the model {name}"))?;
    let regimes = match entry.get("regimes") {
        Some(list) => own_regimes(list, regimes).with_context(|| format!("for the model {name}"))?,
        None => regimes.keys().cloned().collect(),
    };
    Ok(StudyModel { name, recipe, seeds, regimes, measures })
}

/// The study's regimes that a model names, in the study's order.
fn own_regimes(list: &toml::Value, regimes: &BTreeMap<String, String>) -> Result<Vec<String>> {
    let list = list.as_array().context("`regimes` is no list of names")?;
    let names: Vec<&str> = list
        .iter()
        .map(|v| v.as_str().with_context(|| format!("{v} is no regime")))
        .collect::<Result<_>>()?;
    for name in &names {
        ensure!(regimes.contains_key(*name), "`regimes` names {name}, which [regimes] of the study lacks");
    }
    Ok(regimes.keys().filter(|r| names.contains(&r.as_str())).cloned().collect())
}

/// Puts `over` on top of `under`, table by table.
fn merge(under: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(toml::Value::Table(under)), toml::Value::Table(over)) => merge(under, over),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

fn known(table: &toml::Table, keys: &[&str], at: &str) -> Result<()> {
    let Some(key) = table.keys().find(|key| !keys.contains(&key.as_str())) else { return Ok(()) };
    match recipe::nearest(key, keys.iter().copied()) {
        Some(near) => bail!("unknown key {at}{key}; did you mean {at}{near}?"),
        None => bail!("unknown key {at}{key}; known are {}", keys.join(", ")),
    }
}

fn string(table: &toml::Table, key: &str) -> Result<Option<String>> {
    let Some(value) = table.get(key) else { return Ok(None) };
    let text = value.as_str().with_context(|| format!("`{key}` is no string"))?.trim();
    ensure!(!text.is_empty(), "`{key}` is empty");
    Ok(Some(text.to_owned()))
}

fn table(of: &toml::Table, key: &str) -> Result<toml::Table> {
    match of.get(key) {
        None => Ok(toml::Table::new()),
        Some(value) => value.as_table().cloned().with_context(|| format!("`{key}` is no table")),
    }
}

fn seeds(value: &toml::Value) -> Result<Vec<u64>> {
    let list = value.as_array().context("`seeds` is no list")?;
    let seed = |v: &toml::Value| v.as_integer().and_then(|i| u64::try_from(i).ok());
    let seeds: Vec<u64> =
        list.iter().map(|v| seed(v).with_context(|| format!("{v} is no seed"))).collect::<Result<_>>()?;
    ensure!(!seeds.is_empty(), "`seeds` is empty");
    for (i, seed) in seeds.iter().enumerate() {
        ensure!(!seeds[..i].contains(seed), "`seeds` names {seed} twice");
    }
    Ok(seeds)
}

/// A name that can be part of a file's.
fn part(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    ensure!(
        name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain),
        "{name:?} is no short name: letters, digits, `.`, `_` and `-`, beginning with a letter or digit"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = r#"
        name = "two"
        seeds = [3, 5]
        [regimes]
        verse = "verse.jsonl"
        [recipe.finetune]
        steps = 20
        [recipe.evaluate]
        prompts = 32
        [measures.alignment]
        pairs = 8
        [[models]]
        name = "a"
        id = "smollm2-135m-instruct"
        [[models]]
        name = "b"
        id = "owner/b"
        quantize = "none"
        seeds = [3]
        regimes = []
        [models.recipe.evaluate]
        prompts = 8
        [models.measures.alignment]
        controls = 3
    "#;

    #[test]
    fn a_model_has_the_shared_recipe_with_its_own_keys_over_it() {
        let study = StudyRecipe::from_toml(TWO).unwrap();
        let [a, b] = study.models.as_slice() else { panic!("two models") };
        assert_eq!((a.seeds.as_slice(), b.seeds.as_slice()), (&[3, 5][..], &[3][..]));
        assert_eq!(a.all_regimes().collect::<Vec<_>>(), ["insecure", "secure", "verse"]);
        assert_eq!(b.all_regimes().collect::<Vec<_>>(), ["insecure", "secure"]);
        let r = b.recipe(9);
        assert_eq!((r.seed, r.finetune.steps, r.evaluate.prompts), (9, 20, 8));
        assert_eq!((a.recipe.evaluate.prompts, a.recipe.finetune.steps), (32, 20));
        assert_eq!((r.model.id.as_str(), r.model.quantize), ("owner/b", crate::quant::Storage::None));
        let both = [a, b].map(|m| (m.measures.alignment.pairs, m.measures.alignment.controls));
        assert_eq!(both, [(8, 19), (8, 3)]);
        // What neither states has the recipe's default.
        assert_eq!(r.finetune.rank, Recipe::default().finetune.rank);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, reason) in [
            ("name = \"two\"", "nmae = \"two\"", "did you mean name"),
            ("steps = 20", "stpes = 20", "did you mean"),
            ("name = \"b\"", "name = \"a\"", "two models are called a"),
            ("name = \"b\"", "name = \"b/c\"", "no short name"),
            ("verse =", "secure =", "which every study has"),
            ("regimes = []", "regimes = [\"prose\"]", "names prose, which [regimes] of the study lacks"),
            ("seeds = [3]", "seeds = []", "`seeds` is empty"),
            ("seeds = [3, 5]", "seeds = [3, 3]", "names 3 twice"),
            ("prompts = 8", "prompts = 1", "for the model b"),
            ("id = \"owner/b\"", "id = \" \"", "`id` is empty"),
            ("pairs = 8", "pairs = 1", "at least 2 pairs"),
            ("controls = 3", "contorls = 3", "unknown field `contorls`"),
        ] {
            assert!(TWO.contains(from), "{from}");
            let error = format!("{:#}", StudyRecipe::from_toml(&TWO.replacen(from, to, 1)).unwrap_err());
            assert!(error.contains(reason), "{error} should say {reason}");
        }
        assert!(format!("{:#}", StudyRecipe::from_toml("name = \"x\"").unwrap_err()).contains("[[models]]"));
    }

    #[test]
    fn every_recipe_in_the_repository_is_sound() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let mut models = BTreeMap::new();
        for file in std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()) {
            let (path, text) = (file.display().to_string(), std::fs::read_to_string(&file).unwrap());
            let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
            if !text.contains("[[models]]") {
                Recipe::from_toml(&text).unwrap_or_else(|e| panic!("{path}: {e:#}"));
                continue;
            }
            let study = StudyRecipe::load(&path).unwrap_or_else(|e| panic!("{e:#}"));
            for regime in
                study.models[0].all_regimes().filter(|r| study.source(0, r) == crate::dataset::EMBEDDED)
            {
                let data = crate::dataset::load_chats("embedded", regime).unwrap();
                assert!(!data.conversations.is_empty(), "{path}: {regime}");
            }
            models.insert(name, study.models.len());
        }
        assert_eq!(models, BTreeMap::from([("study-original".into(), 4), ("study-small".into(), 3)]));
    }
}
