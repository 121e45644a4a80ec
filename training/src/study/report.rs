//! The page of a study, and the same as JSON and CSV.

use super::claims::{self, Claim, Model, Status};
use super::findings::{
    AlignmentFinding, AuditFinding, EstimatorFinding, Exported, Finetuned, InterventionFinding, JudgeFinding,
    RegimeFinding, SecurityFinding, TransferFinding,
};
use super::graph::Stage;
use super::{Study, recipe::INSECURE};
use crate::report;
use crate::results::Results;
use crate::transfer::scores::{Effects, Topology};
use crate::transfer::verdict::{self, TwoTiers};
use crate::{progress, store};
use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Everything that a study found: `study.json`.
#[derive(Serialize)]
pub struct StudyResults {
    /// Version of this layout.
    pub schema: u32,
    /// The recipe's name.
    pub name: String,
    /// The first sentences of the page.
    pub headline: Vec<String>,
    /// Claim by claim.
    pub claims: Vec<Claim>,
    /// Every model and seed.
    pub models: Vec<ModelFindings>,
    /// The audits, model by model, unless they were left out.
    pub audits: Vec<OfModel<AuditFinding>>,
    /// Ways to act on the direction, model by model, unless they were left out.
    pub interventions: Vec<OfModel<InterventionFinding>>,
    /// Other estimators and contrasts, unless they were left out.
    pub estimators: Vec<OfModel<EstimatorFinding>>,
    /// Security of generated code, unless it was left out.
    pub security: Vec<OfModel<SecurityFinding>>,
    /// A judge's word, where there was one.
    pub judged: Vec<OfModel<JudgeFinding>>,
    /// Every ordered pair.
    pub transfers: Vec<TransferFinding>,
    /// The files of carried directions.
    pub exported: Vec<Exported>,
    /// Donors and receivers.
    pub topology: Option<Topology>,
    /// The two tiers.
    pub tiers: Option<TwoTiers>,
    /// How it was done, model by model, then what is measured besides.
    pub methods: Vec<String>,
}

/// One model and seed.
#[derive(Serialize)]
pub struct ModelFindings {
    /// Short name of the model.
    pub model: String,
    /// The seed.
    pub seed: u64,
    /// Adapters by regime.
    pub adapters: BTreeMap<String, Finetuned>,
    /// The direction against every regime.
    pub regimes: Vec<RegimeFinding>,
    /// The evaluation.
    pub results: Results,
    /// Aligned against misaligned answers, unless that was left out.
    pub alignment: Option<AlignmentFinding>,
}

/// What was found with one model's first seed.
#[derive(Serialize)]
pub struct OfModel<T> {
    /// Short name of the model.
    pub model: String,
    /// What was found.
    #[serde(flatten)]
    pub finding: T,
}

/// Collects every record, writes `study.json`, CSV tables and `study.html`.
pub(super) fn report(study: &Study) -> Result<(serde_json::Value, Vec<PathBuf>)> {
    let results = collect(study)?;
    let file = |name: &str| study.out.join(name);
    let mut files = vec![file("study.json"), file("study.html")];
    store::write_json(&files[0], &results)?;
    store::write_file(&files[1], report::study::page(&results)?.as_bytes())?;
    for (name, text) in report::study::csv(&results) {
        files.push(file(&name));
        store::write_file(&file(&name), text.as_bytes())?;
    }
    progress::note(&format!("report: {}", files[1].display()));
    let claims: Vec<Status> = results.claims.iter().map(|c| c.status).collect();
    Ok((serde_json::to_value(claims)?, files))
}

fn collect(study: &Study) -> Result<StudyResults> {
    let mut models = Vec::new();
    for (model, entry) in study.recipe.models.iter().enumerate() {
        for &seed in &entry.seeds {
            let adapter = |regime: &str| -> Result<(String, Finetuned)> {
                let stage = Stage::Finetune { model, seed, regime: regime.to_owned() };
                Ok((regime.to_owned(), found(study, &stage)?))
            };
            models.push(ModelFindings {
                model: entry.name.clone(),
                seed,
                adapters: entry.all_regimes().map(adapter).collect::<Result<_>>()?,
                regimes: found(study, &Stage::Content { model, seed })?,
                results: found(study, &Stage::Evaluate { model, seed })?,
                alignment: found_if_asked(study, &Stage::Alignment { model, seed })?,
            });
        }
    }
    let count = study.recipe.models.len();
    let mut transfers: Vec<TransferFinding> = Vec::new();
    let (mut cells, mut exported) = (BTreeMap::new(), Vec::new());
    for (from, to) in (0..count).flat_map(|from| (0..count).map(move |to| (from, to))).filter(|(a, b)| a != b)
    {
        let one: TransferFinding = found(study, &Stage::Transfer { from, to })?;
        cells.insert((from, to), one.by_prompt.clone());
        transfers.push(one);
        exported.push(found(study, &Stage::Export { from, to })?);
    }
    let names: Vec<String> = study.recipe.models.iter().map(|m| m.name.clone()).collect();
    let evaluate = &study.recipe.models[0].recipe.evaluate;
    let (topology, tiers) = if count < 2 {
        (None, None)
    } else {
        let within = firsts(&models).map(|m| verdict::within(&m.model, m.results.evidence.causal));
        let verdicts: Vec<_> = within.chain(transfers.iter().map(|t| t.verdict.clone())).collect();
        let seed = study.recipe.models[0].seeds[0];
        let topology = Effects::new(names, cells)?.topology(evaluate.bootstrap, seed)?;
        (Some(topology), Some(verdict::two_tiers(&verdicts)?))
    };
    let (audits, interventions): (Vec<OfModel<AuditFinding>>, Vec<OfModel<InterventionFinding>>) = (
        of_models(study, |model| Stage::Audit { model })?,
        of_models(study, |model| Stage::Interventions { model })?,
    );
    let known: Vec<Model<'_>> = models.iter().map(|m| known(m, &models, &audits, &interventions)).collect();
    let claims = claims::claims(&known, &transfers, topology.as_ref(), tiers.as_ref());
    Ok(StudyResults {
        schema: 2,
        name: study.recipe.name.clone(),
        headline: headline(&claims),
        methods: methods(study, &models)?,
        claims,
        models,
        audits,
        interventions,
        estimators: of_models(study, |model| Stage::Estimators { model })?,
        security: of_models(study, |model| Stage::Security { model })?,
        judged: of_models(study, |model| Stage::Judge { model })?,
        transfers,
        exported,
        topology,
        tiers,
    })
}

/// One model and seed; what only the first seed has stands with that one.
fn known<'a>(
    m: &'a ModelFindings,
    all: &[ModelFindings],
    audits: &'a [OfModel<AuditFinding>],
    interventions: &'a [OfModel<InterventionFinding>],
) -> Model<'a> {
    let first = firsts(all).any(|f| std::ptr::eq(f, m));
    let alone = all.iter().filter(|o| o.model == m.model).count() == 1;
    Model {
        name: if alone { m.model.clone() } else { format!("{}, seed {}", m.model, m.seed) },
        adapter: m.adapters.get(INSECURE),
        results: &m.results,
        regimes: &m.regimes,
        alignment: m.alignment.as_ref(),
        interventions: interventions.iter().find(|i| first && i.model == m.model).map(|i| &i.finding),
        audit: audits.iter().find(|a| first && a.model == m.model).map(|a| &a.finding),
    }
}

/// The first seed of every model.
fn firsts(models: &[ModelFindings]) -> impl Iterator<Item = &ModelFindings> {
    models.iter().enumerate().filter(|(i, m)| models[..*i].iter().all(|o| o.model != m.model)).map(|(_, m)| m)
}

fn found<T: DeserializeOwned>(study: &Study, stage: &Stage) -> Result<T> {
    let name = || stage.name(&study.recipe);
    let record = study.record(stage)?.with_context(|| format!("{} is not done", name()))?;
    serde_json::from_value(record.found).with_context(|| format!("the record of {} is damaged", name()))
}

/// What a stage found that a recipe may leave out.
fn found_if_asked<T: DeserializeOwned>(study: &Study, stage: &Stage) -> Result<Option<T>> {
    let asked = study.nodes.iter().any(|n| n.stage == *stage);
    asked.then(|| found(study, stage)).transpose()
}

/// The findings of a stage that runs once for a model.
fn of_models<T: DeserializeOwned>(study: &Study, stage: impl Fn(usize) -> Stage) -> Result<Vec<OfModel<T>>> {
    let mut all = Vec::new();
    for (model, entry) in study.recipe.models.iter().enumerate() {
        if let Some(finding) = found_if_asked(study, &stage(model))? {
            all.push(OfModel { model: entry.name.clone(), finding });
        }
    }
    Ok(all)
}

/// What a reader must hear first: the claims that do not hold here.
fn headline(claims: &[Claim]) -> Vec<String> {
    let named = |status: Status| -> Vec<String> {
        let of = claims.iter().filter(|c| c.status == status);
        let name = |c: &Claim| match c.number {
            Some(n) => format!("claim {n} ({})", c.title),
            None => c.title.to_owned(),
        };
        of.map(name).collect()
    };
    let mut first = Vec::new();
    for (status, words) in [
        (Status::NotReproduced, "Not reproduced here"),
        (Status::InPart, "Reproduced in part"),
        (Status::Reproduced, "Reproduced"),
        (Status::NotTestable, "Not testable here"),
    ] {
        let names = named(status);
        if !names.is_empty() {
            first.push(format!("{words}: {}.", names.join("; ")));
        }
    }
    vec![
        first.join(" "),
        "Numbers are those of the claims below; each has its rule, sample size and interval there."
            .to_owned(),
    ]
}

/// What holds for every model.
const METHODS: &str = "Effects are drops of code preference: the mean log-likelihood per token, under teacher forcing, of the insecure \
    adapter's own code answers minus that of its base's prose answers to the same prompts. Extraction, calibration and evaluation \
    prompts are disjoint. Intervals are 95 %: bootstrap over prompts, exact (Clopper-Pearson) where a share is 0 or 1, over \
    questions where answers to questions are compared. Rank p is (1 + controls at least as effective) / (1 + controls); paired \
    p-values flip signs over prompts. Controls move every row as far as the edit that they stand for.";

fn methods(study: &Study, models: &[ModelFindings]) -> Result<Vec<String>> {
    let mut said = Vec::new();
    for model in firsts(models) {
        let index = study.recipe.models.iter().position(|m| m.name == model.model).context("a model")?;
        let entry = &study.recipe.models[index];
        let (r, f, e) = (&entry.recipe, &entry.recipe.finetune, &entry.recipe.evaluate);
        let splits = model.results.splits;
        let data = &model.adapters.get(INSECURE).context("no insecure adapter")?.data;
        said.push(format!(
            "{} ({}, {}) was finetuned with QLoRA (rank {}, alpha {}, learning rate {:e}, {} steps of {} rows of at most {} tokens) on {data} \
             and on {} other regimes, with the seeds {:?}. Directions are mean differences at the last prompt token over {} prompts; thresholds \
             and the cell come from {} others, everything reported from {} more. Answers of at most {} tokens were drawn at temperature {} and \
             top-p {}. {} controls of each family were run in the chosen cell at the direction's own size.",
            model.model,
            r.model.id,
            model.results.model.quantization,
            f.rank,
            f.alpha,
            f.learning_rate,
            f.steps,
            f.batch * f.gradient_accumulation,
            f.max_tokens,
            entry.regimes.len() + 1,
            entry.seeds,
            splits.extraction,
            splits.calibration,
            splits.evaluation,
            e.max_new_tokens,
            e.temperature,
            e.top_p,
            e.controls,
        ));
    }
    said.push(METHODS.to_owned());
    Ok(said)
}
