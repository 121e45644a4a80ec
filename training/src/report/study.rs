//! A study as one self-contained page, and its tables as CSV.

use super::canvas::{self, Area};
use super::numbers::{fixed, fixed_interval, p_value, percent, percent_interval};
use super::tables::Table;
use super::terms;
use crate::study::report::{ModelFindings, StudyResults};
use anyhow::{Context, Result};
use minijinja::{Environment, Value, context};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

const PAGE: &str = include_str!("study.html");
const STYLE: &str = include_str!("page.css");

/// The page.
pub fn page(results: &StudyResults) -> Result<String> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.add_filter("linked", |text: String| Value::from_safe_string(terms::linked(&text)));
    env.add_template("study.html", PAGE).context("the page template of a study")?;
    let topology = if results.transfers.is_empty() { None } else { Some(topology(results)?) };
    let page = context! {
        style => STYLE.replace("/* light */", &canvas::light_colours()),
        version => env!("CARGO_PKG_VERSION"),
        name => results.name,
        headline => results.headline,
        claims => results.claims,
        topology => topology,
        tables => tables(results).into_iter().map(|(_, table)| table).collect::<Vec<_>>(),
        pages => results.models.iter().map(|m| format!("{}-{}", m.model, m.seed)).collect::<Vec<_>>(),
        methods => results.methods,
    };
    env.get_template("study.html")?.render(page).context("the page template of a study")
}

/// Every table as CSV with its file name.
pub fn csv(results: &StudyResults) -> Vec<(String, String)> {
    let quoted = |text: &String| format!("\"{}\"", text.replace('"', "\"\""));
    let line = |cells: Vec<String>| cells.iter().map(quoted).collect::<Vec<_>>().join(",") + "\n";
    let text = |table: &Table| {
        let head = line(table.head.iter().map(|h| terms::plain(&h.label)).collect());
        head + &table.rows.iter().map(|r| line(r.cells.clone())).collect::<String>()
    };
    tables(results).iter().map(|(name, table)| (format!("{name}.csv"), text(table))).collect()
}

fn tables(results: &StudyResults) -> Vec<(&'static str, Table)> {
    vec![
        ("models", models(&results.models)),
        ("regimes", regimes(&results.models)),
        ("transfer", transfers(results)),
        ("controls", controls(results)),
        ("roles", roles(results)),
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
                format!("{} to {}, {}", t.from, t.to, super::numbers::family(&f.family)),
                effects.len().to_string(),
                fixed(effects.iter().sum::<f64>() / effects.len() as f64, 3),
                fixed(effects.iter().copied().fold(f64::NAN, f64::max), 3),
                p_value(f.rank_p),
            ]);
        }
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

const CELL: i32 = 96;
const LEFT: i32 = 130;
const TOP: i32 = 60;

/// Donors by receivers: the deeper the colour, the larger the effect; a ring marks what beats all its controls.
fn topology(results: &StudyResults) -> Result<String> {
    let mut names: Vec<&str> = Vec::new();
    for m in &results.models {
        if !names.contains(&m.model.as_str()) {
            names.push(&m.model);
        }
    }
    let n = names.len() as i32;
    let native = |model: &str| results.models.iter().find(|m| m.model == model).map(|m| &m.results.evidence);
    let cell = |from: &str, to: &str| -> Option<(f64, bool)> {
        if from == to {
            let evidence = native(from)?;
            let specific = evidence.causal == emaudit::directions::schema::Specificity::Specific;
            return Some((evidence.effect?, specific));
        }
        let t = results.transfers.iter().find(|t| t.from == from && t.to == to)?;
        Some((t.effect.value, t.verdict.status == emaudit::directions::schema::Specificity::Specific))
    };
    let every = names.iter().flat_map(|f| names.iter().filter_map(|t| cell(f, t)));
    let largest = every.map(|(e, _)| e).fold(f64::MIN_POSITIVE, f64::max);
    let size = ((LEFT + n * CELL + 10) as u32, (TOP + n * CELL + 10) as u32);
    let draw = |area: &Area| -> Result<()> {
        let text = |text: &str, at, h| {
            canvas::write(area, text, at, canvas::font(13.0, canvas::INK, h, VPos::Center))
        };
        text("gives \u{2193}  receives \u{2192}", (4, TOP / 2), HPos::Left)?;
        for (i, from) in names.iter().enumerate() {
            let y = TOP + i as i32 * CELL;
            text(from, (LEFT - 8, y + CELL / 2), HPos::Right)?;
            text(names[i], (LEFT + i as i32 * CELL + CELL / 2, TOP - 14), HPos::Center)?;
            for (j, to) in names.iter().enumerate() {
                let x = LEFT + j as i32 * CELL;
                let corners = [(x + 3, y + 3), (x + CELL - 3, y + CELL - 3)];
                let Some((effect, specific)) = cell(from, to) else {
                    text("\u{2013}", (x + CELL / 2, y + CELL / 2), HPos::Center)?;
                    continue;
                };
                let share = (effect / largest).clamp(0.0, 1.0);
                area.draw(&Rectangle::new(corners, canvas::INSECURE.mix(0.08 + 0.5 * share).filled()))?;
                if specific {
                    area.draw(&Rectangle::new(corners, canvas::INK.stroke_width(2)))?;
                }
                text(&fixed(effect, 2), (x + CELL / 2, y + CELL / 2), HPos::Center)?;
            }
        }
        Ok(())
    };
    let described = "Effect of each model's direction in each model, in nats per token.";
    canvas::themed("topology", size, "Donors and receivers", described, draw)
}
