//! The stages of a study, what each needs, and the digest that names its output.

use super::recipe::{INSECURE, OWN_ANSWERS, SECURE, StudyRecipe};
use crate::store;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// Changes whenever a stage's output would change for the same inputs.
const VERSION: u32 = 1;

/// Changes whenever the page, its JSON or its tables would.
const REPORT_VERSION: u32 = 3;

/// The state of a model without an adapter.
pub const BASE: &str = "base";

/// What prompts are called among the regimes of a [`World`].
pub const PROMPTS: &str = "prompts";

/// What alignment pairs are called there.
pub const ALIGNMENT: &str = "alignment";

/// What coding tasks are called there.
pub const TASKS: &str = "tasks";

/// One command's work. `model` counts the recipe's models.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The base's own answers, where a regime is trained on them.
    Sample { model: usize, seed: u64 },
    /// An adapter.
    Finetune { model: usize, seed: u64, regime: String },
    /// Residual rows of one state: the base or an adapter.
    Capture { model: usize, seed: u64, state: String },
    /// The spread of aligned scores and the thresholds of the direction.
    Calibrate { model: usize, seed: u64 },
    /// The cell, the controls, both axes of evidence.
    Evaluate { model: usize, seed: u64 },
    /// What the direction does to every other regime.
    Content { model: usize, seed: u64 },
    /// The direction file with its evidence, and the page of this model and seed.
    Pack { model: usize, seed: u64 },
    /// One ordered pair of models.
    Transfer { from: usize, to: usize },
    /// The carried direction of a pair as a file.
    Export { from: usize, to: usize },
    /// Aligned against misaligned answers, in every state of the model.
    Alignment { model: usize, seed: u64 },
    /// The direction file of the first seed against models that never made it.
    Audit { model: usize },
    /// Ways to act on the direction of the first seed.
    Interventions { model: usize },
    /// Other estimators and contrasts, first seed.
    Estimators { model: usize },
    /// Security of generated code, first seed.
    Security { model: usize },
    /// A judge's word on sampled answers, first seed.
    Judge { model: usize },
    /// The page of the study.
    Report,
}

impl Stage {
    /// Every stage of a study, each behind what it needs; `judged`: there is a judge.
    pub fn all(study: &StudyRecipe, judged: bool) -> Vec<Stage> {
        let mut stages = Vec::new();
        for (model, entry) in study.models.iter().enumerate() {
            for &seed in &entry.seeds {
                let regimes = || entry.all_regimes().map(str::to_owned);
                if entry.all_regimes().any(|regime| study.source(model, regime) == OWN_ANSWERS) {
                    stages.push(Stage::Sample { model, seed });
                }
                stages.extend(regimes().map(|regime| Stage::Finetune { model, seed, regime }));
                let states = std::iter::once(BASE.to_owned()).chain(regimes());
                stages.extend(states.map(|state| Stage::Capture { model, seed, state }));
                stages.push(Stage::Calibrate { model, seed });
                stages.push(Stage::Evaluate { model, seed });
                stages.push(Stage::Content { model, seed });
                stages.push(Stage::Pack { model, seed });
                if entry.measures.alignment.pairs > 0 {
                    stages.push(Stage::Alignment { model, seed });
                }
            }
            if entry.measures.audit.prompts > 0 {
                stages.push(Stage::Audit { model });
            }
            if entry.measures.interventions.controls > 0 {
                stages.push(Stage::Interventions { model });
            }
            if entry.measures.estimators.layers > 0 {
                stages.push(Stage::Estimators { model });
            }
            if entry.measures.security.tasks > 0 {
                stages.push(Stage::Security { model });
            }
            if judged && entry.measures.judge.questions > 0 {
                stages.push(Stage::Judge { model });
            }
        }
        let models = 0..study.models.len();
        let pairs = models.clone().flat_map(|from| models.clone().map(move |to| (from, to)));
        for (from, to) in pairs.filter(|(from, to)| from != to) {
            stages.push(Stage::Transfer { from, to });
            stages.push(Stage::Export { from, to });
        }
        stages.push(Stage::Report);
        stages
    }

    /// What must be there before it can run.
    pub fn needs(&self, study: &StudyRecipe, judged: bool) -> Vec<Stage> {
        let state = |model, seed, state: &str| Stage::Capture { model, seed, state: state.to_owned() };
        let adapter = |model, seed, of: &str| Stage::Finetune { model, seed, regime: of.to_owned() };
        let first = |model: usize| study.models[model].seeds[0];
        match *self {
            Stage::Finetune { model, seed, ref regime } if study.source(model, regime) == OWN_ANSWERS => {
                vec![Stage::Sample { model, seed }]
            }
            Stage::Sample { .. } | Stage::Finetune { .. } => Vec::new(),
            Stage::Capture { model, seed, state: ref regime } if regime != BASE => {
                vec![adapter(model, seed, regime)]
            }
            Stage::Capture { .. } => Vec::new(),
            Stage::Calibrate { model, seed } => [BASE, INSECURE].map(|s| state(model, seed, s)).to_vec(),
            Stage::Evaluate { model, seed } => {
                vec![Stage::Calibrate { model, seed }, state(model, seed, SECURE)]
            }
            Stage::Content { model, seed } => {
                let regimes = study.models[model].all_regimes().map(|r| state(model, seed, r));
                std::iter::once(Stage::Evaluate { model, seed }).chain(regimes).collect()
            }
            Stage::Pack { model, seed } => vec![Stage::Evaluate { model, seed }],
            Stage::Alignment { model, seed } => {
                let adapters = study.models[model].all_regimes().map(|r| adapter(model, seed, r));
                std::iter::once(Stage::Evaluate { model, seed }).chain(adapters).collect()
            }
            Stage::Audit { model } => {
                let entry = &study.models[model];
                let captured =
                    entry.seeds.iter().flat_map(|s| entry.all_regimes().map(|r| state(model, *s, r)));
                std::iter::once(Stage::Pack { model, seed: first(model) }).chain(captured).collect()
            }
            Stage::Interventions { model }
            | Stage::Estimators { model }
            | Stage::Security { model }
            | Stage::Judge { model } => {
                vec![Stage::Evaluate { model, seed: first(model) }]
            }
            Stage::Transfer { from, to } => vec![
                Stage::Pack { model: from, seed: first(from) },
                Stage::Pack { model: to, seed: first(to) },
            ],
            Stage::Export { from, to } => vec![Stage::Transfer { from, to }],
            Stage::Report => Stage::all(study, judged).into_iter().filter(|s| *s != Stage::Report).collect(),
        }
    }

    /// The kind alone, e.g. `finetune`.
    pub fn kind(&self) -> &'static str {
        match self {
            Stage::Sample { .. } => "sample",
            Stage::Finetune { .. } => "finetune",
            Stage::Capture { .. } => "capture",
            Stage::Calibrate { .. } => "calibrate",
            Stage::Evaluate { .. } => "evaluate",
            Stage::Content { .. } => "content",
            Stage::Pack { .. } => "pack",
            Stage::Transfer { .. } => "transfer",
            Stage::Export { .. } => "export",
            Stage::Alignment { .. } => "alignment",
            Stage::Audit { .. } => "audit",
            Stage::Interventions { .. } => "interventions",
            Stage::Estimators { .. } => "estimators",
            Stage::Security { .. } => "security",
            Stage::Judge { .. } => "judge",
            Stage::Report => "report",
        }
    }

    /// Its name in commands and files, e.g. `smollm2-17-finetune-insecure`.
    pub fn name(&self, study: &StudyRecipe) -> String {
        let of = |model: usize| &study.models[model].name;
        let kind = self.kind();
        match self {
            Stage::Finetune { model, seed, regime: what } | Stage::Capture { model, seed, state: what } => {
                format!("{}-{seed}-{kind}-{what}", of(*model))
            }
            Stage::Sample { model, seed }
            | Stage::Calibrate { model, seed }
            | Stage::Evaluate { model, seed }
            | Stage::Content { model, seed }
            | Stage::Pack { model, seed }
            | Stage::Alignment { model, seed } => format!("{}-{seed}-{kind}", of(*model)),
            Stage::Audit { model }
            | Stage::Interventions { model }
            | Stage::Estimators { model }
            | Stage::Security { model }
            | Stage::Judge { model } => format!("{}-{kind}", of(*model)),
            Stage::Transfer { from, to } | Stage::Export { from, to } => {
                format!("{kind}-{}-to-{}", of(*from), of(*to))
            }
            Stage::Report => kind.to_owned(),
        }
    }

    /// The model and seed that it runs with, if any.
    pub fn model(&self, study: &StudyRecipe) -> Option<(usize, u64)> {
        match *self {
            Stage::Sample { model, seed }
            | Stage::Finetune { model, seed, .. }
            | Stage::Capture { model, seed, .. }
            | Stage::Calibrate { model, seed }
            | Stage::Evaluate { model, seed }
            | Stage::Content { model, seed }
            | Stage::Pack { model, seed }
            | Stage::Alignment { model, seed } => Some((model, seed)),
            Stage::Audit { model }
            | Stage::Interventions { model }
            | Stage::Estimators { model }
            | Stage::Security { model }
            | Stage::Judge { model } => Some((model, study.models[model].seeds[0])),
            Stage::Transfer { to, .. } | Stage::Export { to, .. } => Some((to, study.models[to].seeds[0])),
            Stage::Report => None,
        }
    }
}

/// What stands outside a recipe and decides an outcome all the same: digests of weights and data.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// For each model: the digest of its weights; `None` while they are not on this machine.
    pub weights: Vec<Option<String>>,
    /// For each regime, or [`PROMPTS`], and each source that a recipe names for it: the digest of its content.
    pub data: BTreeMap<(String, String), String>,
    /// Name and version of the security scanner, where there is one.
    pub scanner: Option<String>,
    /// Name of the judge, where there is one.
    pub judge: Option<String>,
}

/// A stage's place in the graph of one study.
#[derive(Clone, Debug, Serialize)]
pub struct Node {
    /// See [`Stage::name`].
    pub name: String,
    /// See [`Stage::kind`].
    pub kind: &'static str,
    /// Digest of everything its output depends on.
    pub key: String,
    /// Names of the stages it needs.
    pub needs: Vec<String>,
    #[serde(skip)]
    pub(super) stage: Stage,
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)
    }
}

/// Every stage with its key, each behind what it needs.
pub fn nodes(study: &StudyRecipe, world: &World) -> Result<Vec<Node>> {
    let mut nodes: Vec<Node> = Vec::new();
    let mut keys: BTreeMap<String, String> = BTreeMap::new();
    let judged = world.judge.is_some();
    for stage in Stage::all(study, judged) {
        let (name, needs) = (stage.name(study), stage.needs(study, judged));
        let needs: Vec<String> = needs.iter().map(|s| s.name(study)).collect();
        let mut inputs = Vec::new();
        for need in &needs {
            inputs.push(keys.get(need).with_context(|| format!("{name} stands before {need}"))?);
        }
        let own = own(&stage, study, world)?;
        let key =
            store::sha256_hex(&serde_json::to_vec(&(VERSION, stage.kind(), own, inputs))?)[..16].to_owned();
        if keys.insert(name.clone(), key.clone()).is_some() {
            bail!("two stages would be called {name}: rename a model or a regime");
        }
        nodes.push(Node { name, kind: stage.kind(), key, needs, stage });
    }
    Ok(nodes)
}

/// What a stage depends on beside its needs: so a changed key of the recipe reruns only what reads it.
fn own(stage: &Stage, study: &StudyRecipe, world: &World) -> Result<serde_json::Value> {
    let value = match stage.model(study) {
        Some((model, seed)) => {
            let recipe = study.models[model].recipe(seed);
            let weights = &world.weights[model];
            let data = |of: &str, source: &str| world.data.get(&(of.to_owned(), source.to_owned())).cloned();
            let prompts = data(PROMPTS, &recipe.data.prompts);
            match stage {
                Stage::Finetune { regime, .. } => {
                    let source = study.source(model, regime);
                    serde_json::to_value((
                        weights,
                        &recipe.model,
                        seed,
                        &recipe.finetune,
                        data(regime, &source),
                        regime,
                    ))?
                }
                Stage::Sample { .. } => {
                    let (e, prompts) = (&recipe.evaluate, data(OWN_ANSWERS, OWN_ANSWERS));
                    let drawn = (e.temperature, e.top_p, recipe.finetune.max_tokens);
                    serde_json::to_value((weights, &recipe.model, seed, drawn, prompts))?
                }
                Stage::Capture { .. } => {
                    // Which prompts there are depends on these as well.
                    let e = &recipe.evaluate;
                    serde_json::to_value((
                        weights,
                        &recipe.model,
                        seed,
                        prompts,
                        e.prompts,
                        e.selection_prompts,
                    ))?
                }
                Stage::Calibrate { .. } => {
                    let e = &recipe.evaluate;
                    serde_json::to_value((seed, &recipe.calibrate, e.temperature, e.top_p))?
                }
                Stage::Alignment { .. } => {
                    let a = &study.models[model].measures.alignment;
                    serde_json::to_value((seed, &recipe.evaluate, a, data(ALIGNMENT, &a.data)))?
                }
                Stage::Interventions { .. } => {
                    let i = &study.models[model].measures.interventions;
                    serde_json::to_value((seed, &recipe.evaluate, i))?
                }
                // Thresholds stand in the file.
                Stage::Export { .. } => serde_json::to_value((seed, &recipe.evaluate, &recipe.calibrate))?,
                Stage::Estimators { .. } => {
                    let m = &study.models[model].measures;
                    let pairs = data(ALIGNMENT, &m.alignment.data);
                    serde_json::to_value((seed, &recipe.evaluate, &m.estimators, pairs))?
                }
                Stage::Security { .. } => {
                    let s = &study.models[model].measures.security;
                    let e = &recipe.evaluate;
                    let drawn = (e.temperature, e.top_p, e.middle_alpha, e.bootstrap);
                    serde_json::to_value((seed, drawn, s, data(TASKS, &s.data), &world.scanner))?
                }
                Stage::Judge { .. } => {
                    let m = &study.models[model].measures;
                    let e = &recipe.evaluate;
                    let drawn = (e.temperature, e.top_p, e.bootstrap);
                    let pairs = data(ALIGNMENT, &m.alignment.data);
                    serde_json::to_value((seed, drawn, &m.judge, pairs, &world.judge))?
                }
                Stage::Audit { .. } => serde_json::to_value((seed, &study.models[model].measures.audit))?,
                _ => serde_json::to_value((seed, &recipe.evaluate))?,
            }
        }
        None => serde_json::to_value((&study.name, REPORT_VERSION))?,
    };
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STUDY: &str = r#"
        name = "t"
        seeds = [3, 5]
        [regimes]
        verse = "verse.jsonl"
        [[models]]
        name = "a"
        id = "owner/a"
        [[models]]
        name = "b"
        id = "owner/b"
        seeds = [3]
    "#;

    fn study(change: (&str, &str)) -> Vec<Node> {
        let text = STUDY.replacen(change.0, change.1, 1);
        let study = StudyRecipe::from_toml(&text).unwrap();
        let weights = vec![Some("wa".into()), Some("wb".into())];
        let mut world = World { weights, data: BTreeMap::new(), scanner: None, judge: None };
        for (model, regime) in (0..2).flat_map(|m| study.models[m].all_regimes().map(move |r| (m, r))) {
            let source = study.source(model, regime);
            world.data.insert((regime.to_owned(), source.clone()), format!("digest of {source}"));
        }
        nodes(&study, &world).unwrap()
    }

    fn changed(change: (&str, &str)) -> Vec<String> {
        let before: BTreeMap<String, String> = study(("", "")).into_iter().map(|n| (n.name, n.key)).collect();
        let after = study(change);
        after.into_iter().filter(|n| before.get(&n.name) != Some(&n.key)).map(|n| n.name).collect()
    }

    #[test]
    fn every_stage_stands_behind_what_it_needs() {
        let nodes = study(("", ""));
        for (i, node) in nodes.iter().enumerate() {
            for need in &node.needs {
                assert!(nodes[..i].iter().any(|n| n.name == *need), "{} needs {need}", node.name);
            }
        }
        // 3 seeds in all x (3 finetunes, 4 captures, calibrate, evaluate, content, pack, alignment), 2 x (audit,
        // interventions, estimators, security), 2 pairs x (transfer, export), report.
        assert_eq!(nodes.len(), 3 * 12 + 2 * 4 + 2 * 2 + 1);
        let keys: std::collections::BTreeSet<_> = nodes.iter().map(|n| &n.key).collect();
        assert_eq!(keys.len(), nodes.len());
    }

    #[test]
    fn a_change_reruns_what_depends_on_it_and_nothing_else() {
        assert_eq!(changed(("", "")), Vec::<String>::new());
        // One regime's data: its adapter and rows, what looks at all regimes, and the page.
        let verse = changed(("verse.jsonl", "lists.jsonl"));
        assert!(verse.contains(&"a-3-finetune-verse".into()) && verse.contains(&"a-3-content".into()));
        assert!(
            !verse.iter().any(|n| n.contains("insecure") || n.contains("evaluate") || n.contains("transfer"))
        );
        // A key of the evaluation: no adapter is trained again.
        let evaluate = changed(("[[models]]", "[recipe.evaluate]\nbootstrap = 500\n[[models]]"));
        assert!(evaluate.contains(&"b-3-evaluate".into()) && evaluate.contains(&"transfer-a-to-b".into()));
        assert!(
            !evaluate
                .iter()
                .any(|n| n.contains("finetune") || n.contains("capture") || n.contains("calibrate"))
        );
        // One model's own key leaves the other model alone, but for their transfer.
        let one = changed(("seeds = [3]", "seeds = [3]\n[models.recipe.finetune]\nsteps = 40"));
        assert!(one.contains(&"b-3-finetune-insecure".into()) && one.contains(&"transfer-a-to-b".into()));
        assert!(!one.iter().any(|n| n.starts_with("a-")));
    }
}
