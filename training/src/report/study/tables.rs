//! The tables of a study's page, as rows of text. The page escapes every cell.

use super::super::numbers::{self, fixed, fixed_interval, p_value, percent, percent_interval};
use super::super::tables::Table;
use super::measured;
use crate::study::report::{ModelFindings, StudyResults};
use serde::Serialize;

/// A part of the page.
#[derive(Serialize)]
pub(super) struct Section {
    pub id: &'static str,
    pub heading: &'static str,
    pub tables: Vec<(&'static str, Table)>,
}

/// Every table with the name of its CSV file, part by part.
pub(super) fn sections(results: &StudyResults) -> Vec<Section> {
    let section = |id, heading, tables| Section { id, heading, tables };
    vec![
        section(
            "within",
            "Within each model",
            vec![("models", models(&results.models)), ("regimes", regimes(&results.models))],
        ),
        section(
            "across",
            "Across models",
            vec![
                ("transfer", transfers(results)),
                ("controls", controls(results)),
                ("roles", roles(results)),
                ("exported", exported(results)),
            ],
        ),
        section(
            "misalignment",
            "Misalignment itself",
            vec![
                ("alignment", measured::alignment(results)),
                ("alignment_steering", measured::alignment_steering(results)),
                ("judge", measured::judge(results)),
            ],
        ),
        section("acting", "Ways to act on it", vec![("interventions", measured::interventions(results))]),
        section(
            "audits",
            "Audits",
            vec![("confusion", measured::confusion(results)), ("audit", measured::audit(results))],
        ),
        section(
            "estimators",
            "Estimators",
            vec![
                ("estimators", measured::estimators(results)),
                ("candidates", measured::candidates(results)),
                ("norms", measured::norms(results)),
            ],
        ),
        section("code", "Security of the code", vec![("security", measured::security(results))]),
    ]
}

fn models(models: &[ModelFindings]) -> Table {
    let columns = [
        "model, seed",
        "#separation, final layer",
        "#spillover, base",
        "#insecure",
        "#secure",
        "#insecure steered",
        "#effect, nats/token",
        "#largest rank p",
        "causal",
        "content",
    ];
    let mut table = Table::new(
        "Every model and seed in its own cell. A direction is worth something where causal is specific.",
        &columns,
        "no model was evaluated",
    );
    for m in models {
        let (r, s) = (&m.results, &m.results.summary);
        let rank = r.families.iter().map(|f| f.rank_p).fold(f64::NAN, f64::max);
        table.row(vec![
            format!("{}, {}", m.model, m.seed),
            percent(s.separation_final),
            percent(s.spillover.base),
            percent(s.spillover.insecure),
            percent(s.spillover.secure),
            percent(s.spillover.steered),
            fixed(r.evidence.effect.unwrap_or(f64::NAN), 3),
            p_value(rank),
            s.evidence.causal.clone(),
            s.evidence.content.clone(),
        ]);
    }
    table
}

fn regimes(models: &[ModelFindings]) -> Table {
    let columns = [
        "model, seed, regime",
        "#spillover",
        "#steered",
        "#score, aligned sd",
        "#flagged",
        "#drop of its own preference",
        "#p, less than insecure",
        "#cosine with the direction",
    ];
    let mut table = Table::new(
        "The insecure direction against adapters trained on something else. Where a harmless regime is flagged and falls as much, the direction says \u{201c}finetuned\u{201d}, not \u{201c}insecure\u{201d}.",
        &columns,
        "no regime was compared",
    );
    for m in models {
        for f in &m.regimes {
            table.row(vec![
                format!("{}, {}, {}", m.model, m.seed, f.regime),
                percent_interval(f.spillover),
                percent_interval(f.steered),
                fixed_interval(f.score, 2),
                percent_interval(f.flagged),
                fixed_interval(f.drop, 3),
                f.p_less_than_insecure.map_or_else(|| "\u{2013}".to_owned(), p_value),
                fixed(f.cosine, 2),
            ]);
        }
    }
    table
}

fn transfers(results: &StudyResults) -> Table {
    let columns = [
        "from, to",
        "#effect, nats/token",
        "#native effect",
        "#spillover",
        "#steered",
        "#cosine",
        "#separation",
        "#held-out R²",
        "#prompts of the map",
        "causal",
    ];
    let mut table = Table::new(
        "Directions carried from model to model by a ridge map, each in the receiver\u{2019}s own cell.",
        &columns,
        "a single model carries nothing",
    );
    for t in &results.transfers {
        table.row(vec![
            format!("{} to {}", t.from, t.to),
            fixed_interval(t.effect, 3),
            fixed_interval(t.native_effect, 3),
            percent(t.spillover.value),
            percent(t.steered.value),
            fixed(t.cosine, 2),
            percent(t.separation.balanced_accuracy),
            fixed(t.r2.weighted, 2),
            t.rows.to_string(),
            if t.verdict.tested { t.verdict.status.as_str().to_owned() } else { "not tested".to_owned() },
        ]);
    }
    table
}

fn controls(results: &StudyResults) -> Table {
    let columns = ["from, to, family", "#controls", "#mean effect", "#best", "#rank p"];
    let mut table =
        Table::new("Controls of the carried directions, at the same size.", &columns, "no control was run");
    for t in &results.transfers {
        for f in &t.families {
            let effects: Vec<f64> = f.controls.iter().map(|c| c.effect).collect();
            table.row(vec![
                format!("{} to {}, {}", t.from, t.to, numbers::family(&f.family)),
                effects.len().to_string(),
                fixed(effects.iter().sum::<f64>() / effects.len() as f64, 3),
                fixed(effects.iter().copied().fold(f64::NAN, f64::max), 3),
                p_value(f.rank_p),
            ]);
        }
    }
    table
}

fn exported(results: &StudyResults) -> Table {
    let columns = ["from, to", "file", "causal", "#controls", "#largest rank p", "SHA-256"];
    let mut table = Table::new(
        "Carried directions as files of their own. Causal evidence there counts the controls that every direction file has, \
         and those that went the direction\u{2019}s own way.",
        &columns,
        "a single model carries nothing",
    );
    for e in &results.exported {
        table.row(vec![
            format!("{} to {}", e.from, e.to),
            e.file.display().to_string(),
            e.causal.as_str().to_owned(),
            e.families.iter().map(|f| f.controls.len()).sum::<usize>().to_string(),
            p_value(e.families.iter().map(|f| f.rank_p).fold(f64::NAN, f64::max)),
            e.sha256[..16].to_owned(),
        ]);
    }
    table
}

fn roles(results: &StudyResults) -> Table {
    let columns =
        ["model", "#donor score", "#receiver score", "#gives less what it receives", "#p, corrected"];
    let mut table = Table::new(
        "Who gives and who receives: mean effect over the other models, nats per token.",
        &columns,
        "a single model has no role",
    );
    for r in results.topology.iter().flat_map(|t| &t.roles) {
        let score = |s: crate::transfer::scores::Score| {
            fixed_interval(crate::results::Interval { value: s.value, low: s.low, high: s.high }, 3)
        };
        table.row(vec![
            r.model.clone(),
            score(r.donor),
            score(r.receiver),
            r.balance.map_or_else(|| "\u{2013}".to_owned(), |b| fixed(b.value, 3)),
            r.balance.map_or_else(|| "\u{2013}".to_owned(), |b| p_value(b.holm_p)),
        ]);
    }
    table
}
