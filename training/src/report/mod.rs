//! `results.json` as one self-contained HTML page, and as a picture.
//!
//! The page loads nothing from anywhere: style, drawings and the few radio buttons that choose a layer are inside
//! it. What it says is computed from the numbers ([`verdict`]); what was not measured is said to be so.

mod canvas;
mod charts;
mod numbers;
mod picture;
mod plots;
pub mod study;
mod tables;
mod terminal;
mod terms;
mod verdict;
pub use terminal::terminal;

use crate::results::{Interval, Results};
use anyhow::{Context, Result};
use minijinja::{Environment, Value, context};
use numbers::{NOT_MEASURED, fixed, fixed_interval, percent, percent_interval};
use serde::Serialize;

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");

/// One of the figures at the top of the page.
#[derive(Serialize)]
struct Key {
    name: String,
    value: String,
    range: String,
}

/// The report as one HTML page. `run` is what `run.json` holds, where there is one.
pub fn render(results: &Results, run: Option<&serde_json::Value>) -> Result<String> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.add_filter("linked", |text: String| Value::from_safe_string(terms::linked(&text)));
    env.add_template("page.html", PAGE).context("the page template")?;
    let samples: Vec<_> = results
        .samples
        .iter()
        .map(|s| {
            let answers: Vec<_> =
                s.answers.iter().map(|(name, answer)| (numbers::arm(name), answer.clone())).collect();
            (s.prompt.clone(), answers)
        })
        .collect();
    let page = context! {
        style => STYLE.replace("/* light */", &canvas::light_colours()),
        version => env!("CARGO_PKG_VERSION"),
        model => results.summary.model,
        cell => numbers::cell(results.selection.chosen),
        rule => results.selection.rule,
        verdict => verdict::verdict(results),
        notes => results.notes,
        keys => keys(results),
        figures => plots::figures(results)?,
        tables => tables::tables(results, run),
        samples => samples,
        terms => terms::TERMS,
    };
    env.get_template("page.html")?.render(page).context("the page template")
}

/// A standalone SVG, on white, of spillover against strength with control bands and of the control battery.
pub fn readme_picture(results: &Results) -> Result<String> {
    picture::picture(results)
}

fn share(results: &Results, arm: &str, fallback: f64) -> (String, String) {
    split(verdict::arm(results, arm).map(|a| a.spillover), fallback, percent, percent_interval)
}

/// Value and range apart, so that the page can set them in different sizes.
fn split(
    interval: Option<Interval>,
    fallback: f64,
    plain: impl Fn(f64) -> String,
    ranged: impl Fn(Interval) -> String,
) -> (String, String) {
    match interval.filter(|i| i.value.is_finite()) {
        Some(i) => match ranged(i).split_once(" [") {
            Some((value, range)) => (value.to_owned(), format!("[{range}")),
            None => (plain(i.value), String::new()),
        },
        None => (plain(fallback), String::new()),
    }
}

fn keys(r: &Results) -> Vec<Key> {
    let s = &r.summary.spillover;
    let mut out = Vec::new();
    let mut add = |name: &str, (value, range): (String, String)| {
        out.push(Key { name: name.to_owned(), value, range });
    };
    add("[[spillover|Spillover]], base", share(r, "base", s.base));
    add("Spillover, insecure adapter", share(r, "insecure", s.insecure));
    add("Spillover, secure adapter", share(r, "secure", s.secure));
    add("Spillover, insecure adapter steered", share(r, "steered", s.steered));
    for (name, mean, best) in [
        ("[[random|random]]", s.random_mean, s.random_best),
        ("[[orthogonal|orthogonal]]", s.orthogonal_mean, s.orthogonal_best),
    ] {
        let range = if best.is_finite() { format!("mean; lowest {}", percent(best)) } else { String::new() };
        add(&format!("Spillover, {name} controls"), (percent(mean), range));
    }
    add("Spillover, wrong layer\u{2019}s direction", (percent(s.wrong_layer), String::new()));
    let effect = r.evidence.effect.unwrap_or(f64::NAN);
    let best = r.families.iter().flat_map(|f| tables::effects(&f.controls)).reduce(f64::max);
    let range = best.map_or_else(String::new, |b| format!("nats/token; best control {}", fixed(b, 3)));
    add("[[effect|Effect]] of the direction", (fixed(effect, 3), range));
    let p = r.families.iter().map(|f| f.rank_p).filter(|p| p.is_finite()).reduce(f64::max);
    let range = if p.is_some() { format!("largest of {} families", r.families.len()) } else { String::new() };
    add("[[rank-p|Rank p]]", (p.map_or_else(|| NOT_MEASURED.to_owned(), numbers::p_value), range));
    for (name, arm, fallback) in [
        ("[[coherence|Coherence]], insecure adapter", "insecure", r.summary.coherence.insecure),
        ("Coherence, steered", "steered", r.summary.coherence.steered),
    ] {
        let interval = verdict::arm(r, arm).map(|a| a.coherence);
        add(name, split(interval, fallback, |x| fixed(x, 2), |i| fixed_interval(i, 2)));
    }
    add(
        "[[separation|Separation]], final layer",
        (percent(r.summary.separation_final), "a check, not evidence".to_owned()),
    );
    out
}
