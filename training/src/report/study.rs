//! A study as one self-contained page, and its tables as CSV.

mod measured;
mod tables;

use super::canvas::{self, Area};
use super::numbers::fixed;
use super::tables::Table;
use super::terms;
use crate::study::report::{ModelFindings, StudyResults};
use anyhow::{Context, Result};
use minijinja::{Environment, Value, context};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};
use tables::sections;

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
        sections => sections(results),
        pages => results.models.iter().map(link).collect::<Vec<_>>(),
        methods => results.methods,
    };
    env.get_template("study.html")?.render(page).context("the page template of a study")
}

/// Folder, name and verdict of one model and seed.
fn link(m: &ModelFindings) -> [String; 3] {
    let evidence = &m.results.summary.evidence;
    [
        format!("{}-{}", m.model, m.seed),
        format!("{}, seed {}", m.model, m.seed),
        format!("causal {}, content {}", evidence.causal, evidence.content),
    ]
}

/// Every table as CSV with its file name.
pub fn csv(results: &StudyResults) -> Vec<(String, String)> {
    let quoted = |text: &String| format!("\"{}\"", text.replace('"', "\"\""));
    let line = |cells: Vec<String>| cells.iter().map(quoted).collect::<Vec<_>>().join(",") + "\n";
    let text = |table: &Table| {
        let head = line(table.head.iter().map(|h| terms::plain(&h.label)).collect());
        head + &table.rows.iter().map(|r| line(r.cells.clone())).collect::<String>()
    };
    let tables = sections(results).into_iter().flat_map(|s| s.tables);
    tables.map(|(name, table)| (format!("{name}.csv"), text(&table))).collect()
}

const CELL: i32 = 96;
const LEFT: i32 = 130;
const TOP: i32 = 60;
/// More than a letter of the labels takes.
const LETTER: i32 = 8;

/// Donors by receivers: the deeper the colour, the larger the effect; a ring marks what beats all its controls.
fn topology(results: &StudyResults) -> Result<String> {
    let mut names: Vec<&str> = Vec::new();
    for m in &results.models {
        if !names.contains(&m.model.as_str()) {
            names.push(&m.model);
        }
    }
    let n = names.len() as i32;
    let label = LETTER * names.iter().map(|name| name.len() as i32 + 1).max().unwrap_or(0);
    let (width, left) = (CELL.max(label), LEFT.max(label + LETTER));
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
    let size = ((left + n * width + 10) as u32, (TOP + n * CELL + 10) as u32);
    let draw = |area: &Area| -> Result<()> {
        let text = |text: &str, at, h| {
            canvas::write(area, text, at, canvas::font(13.0, canvas::INK, h, VPos::Center))
        };
        text("gives \u{2193}  receives \u{2192}", (4, TOP / 2), HPos::Left)?;
        for (i, from) in names.iter().enumerate() {
            let y = TOP + i as i32 * CELL;
            text(from, (left - LETTER, y + CELL / 2), HPos::Right)?;
            text(names[i], (left + i as i32 * width + width / 2, TOP - 14), HPos::Center)?;
            for (j, to) in names.iter().enumerate() {
                let x = left + j as i32 * width;
                let corners = [(x + 3, y + 3), (x + width - 3, y + CELL - 3)];
                let Some((effect, specific)) = cell(from, to) else {
                    text("\u{2013}", (x + width / 2, y + CELL / 2), HPos::Center)?;
                    continue;
                };
                let share = (effect / largest).clamp(0.0, 1.0);
                area.draw(&Rectangle::new(corners, canvas::INSECURE.mix(0.08 + 0.5 * share).filled()))?;
                if specific {
                    area.draw(&Rectangle::new(corners, canvas::INK.stroke_width(2)))?;
                }
                text(&fixed(effect, 2), (x + width / 2, y + CELL / 2), HPos::Center)?;
            }
        }
        Ok(())
    };
    let described = "Effect of each model's direction in each model, in nats per token.";
    canvas::themed("topology", size, "Donors and receivers", described, draw)
}
