//! The tables of the report, as rows of text. The page escapes every cell.

use super::numbers::{
    self, NOT_MEASURED, fixed, fixed_interval, p_value, percent, percent_interval, rate, short,
};
use crate::results::{ControlResult, FamilyResult, Results};
use emaudit::directions::schema::{Aggregation, Cell, MIN_CONTROLS, REQUIRED_FAMILIES};
use serde::Serialize;
use serde_json::Value;

/// One table.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Table {
    /// What it shows; may hold links.
    pub caption: String,
    /// Column headings; may hold links.
    pub head: Vec<Head>,
    /// Body.
    pub rows: Vec<Row>,
    /// Said in place of an empty table.
    pub missing: &'static str,
}

/// One column heading.
#[derive(Clone, Debug, Serialize)]
pub struct Head {
    pub(super) label: String,
    numeric: bool,
}

/// One row; the first cell names it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// Marked as the one that counts.
    pub chosen: bool,
    /// Text, with links where a term is meant.
    pub cells: Vec<String>,
}

impl Table {
    /// `columns` are headings; a leading `#` marks numbers.
    pub(super) fn new(caption: &str, columns: &[&str], missing: &'static str) -> Self {
        let head = columns
            .iter()
            .map(|c| Head { label: c.trim_start_matches('#').to_owned(), numeric: c.starts_with('#') })
            .collect();
        Table { caption: caption.to_owned(), head, rows: Vec::new(), missing }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.marked(false, cells);
    }

    fn marked(&mut self, chosen: bool, cells: Vec<String>) {
        self.rows.push(Row { chosen, cells });
    }
}

/// Every table of the page.
#[derive(Clone, Debug, Serialize)]
pub struct Tables {
    arms: Table,
    layers: Table,
    selection: Table,
    families: Table,
    comparisons: Table,
    middle: Table,
    middle_families: Table,
    content: Table,
    thresholds: Table,
    alarms: Table,
    sweep: Table,
    splits: Table,
    datasets: Table,
    model: Table,
    recipe: Table,
    run: Table,
}

/// Builds them all.
pub fn tables(r: &Results, run: Option<&Value>) -> Tables {
    let effect = r.evidence.effect.unwrap_or(f64::NAN);
    let mut recipe =
        Table::new("The recipe as it was run, defaults filled in.", &["Setting", "Value"], "no recipe");
    flatten("", &r.recipe, &mut recipe);
    let mut this_run = Table::new(
        "Circumstances of this run; nothing above depends on them.",
        &["Item", "Value"],
        "no run file was given",
    );
    if let Some(value) = run {
        flatten("", value, &mut this_run);
    }
    let middle_families = r.middle.as_ref().map_or(&[][..], |m| &m.families);
    let middle_effect = r.middle.as_ref().map_or(f64::NAN, |m| m.effect);
    Tables {
        arms: arms(r),
        layers: layers(r),
        selection: selection(r),
        families: families(
            "Control families in the chosen [[cell|cell]]. [[causal|Causal]] evidence needs rank p below 0.05 in \
             each of the four.",
            &r.families,
            effect,
            true,
        ),
        comparisons: comparisons(&r.comparisons, effect),
        middle: middle(r),
        middle_families: families(
            "Controls in the [[middle|middle-layer cell]].",
            middle_families,
            middle_effect,
            false,
        ),
        content: content(r),
        thresholds: thresholds(r),
        alarms: alarms(r),
        sweep: sweep(r),
        splits: splits(r),
        datasets: datasets(r),
        model: model(r),
        recipe,
        run: this_run,
    }
}

/// The definition a family's name links to.
pub fn family_term(name: &str) -> &'static str {
    match name {
        "random" => "random",
        "orthogonal" => "orthogonal",
        "covariance" => "covariance",
        "label_shuffled" => "label-shuffled",
        _ => "control",
    }
}

fn arms(r: &Results) -> Table {
    let mut t = Table::new(
        "Sampled answers to the evaluation prompts, arm by arm, with 95 % [[interval|intervals]].",
        &[
            "Arm",
            "#[[spillover|Code spillover]]",
            "#[[starts-with-code|Starts with code]]",
            "#[[coherence|Coherence]]",
            "#[[distinct|Distinct\u{2011}1]]",
            "#[[distinct|Distinct\u{2011}2]]",
            "#Tokens",
            "#[[degenerate|Degenerate]]",
        ],
        "no answers were sampled",
    );
    for a in &r.arms {
        t.marked(
            a.name == "steered",
            vec![
                numbers::arm(&a.name),
                percent_interval(a.spillover),
                percent(a.starts_with_code),
                fixed_interval(a.coherence, 2),
                fixed(a.distinct_1, 2),
                fixed(a.distinct_2, 2),
                fixed(a.tokens, 0),
                percent(a.degenerate),
            ],
        );
    }
    t
}

fn layers(r: &Results) -> Table {
    let mut t = Table::new(
        "Detection by layer, on the evaluation prompts.",
        &[
            "[[site|Layer]]",
            "#[[separation|Separation]]",
            "#[[auroc|AUROC]]",
            "#[[cohens-d|Cohen\u{2019}s d]]",
            "#Secure adapter\u{2019}s mean [[score|score]]",
            "#Norm of the [[direction|direction]]",
            "#Mean norm of activations",
            "#[[top-dimension|Top dimension]]",
        ],
        "no layer was examined",
    );
    for l in &r.layers {
        t.marked(
            l.layer == r.summary.layer,
            vec![
                l.layer.to_string(),
                percent(l.separation),
                fixed(l.auroc, 3),
                fixed(l.cohens_d, 2),
                fixed(l.secure_mean_score, 2),
                fixed(l.direction_norm, 2),
                fixed(l.residual_norm, 2),
                percent(l.top_dimension_share),
            ],
        );
    }
    t
}

fn same(a: Cell, b: Cell) -> bool {
    a.layer == b.layer && a.alpha == b.alpha && a.positions == b.positions
}

fn selection(r: &Results) -> Table {
    let mut t = Table::new(
        &format!(
            "Cells tried with the direction alone, on {} calibration prompts. The marked row was chosen.",
            r.selection.prompts
        ),
        &[
            "[[site|Layer]]",
            "#[[steering|Strength]]",
            "[[positions|Positions]]",
            "#[[effect|Effect]]",
            "#[[spillover|Spillover]]",
            "#[[coherence|Coherence]]",
            "Text kept",
        ],
        "no grid of cells was tried",
    );
    for g in &r.selection.grid {
        let chosen = same(g.cell, r.selection.chosen);
        t.marked(
            chosen,
            vec![
                g.cell.layer.to_string(),
                short(g.cell.alpha),
                numbers::positions(g.cell.positions).to_owned(),
                fixed(g.effect, 3),
                percent(g.spillover),
                fixed(g.coherence, 2),
                format!("{}{}", if g.eligible { "yes" } else { "no" }, if chosen { ", chosen" } else { "" }),
            ],
        );
    }
    t
}

/// Finite effects of a family.
pub fn effects(controls: &[ControlResult]) -> Vec<f64> {
    controls.iter().map(|c| c.effect).filter(|x| x.is_finite()).collect()
}

fn families(caption: &str, families: &[FamilyResult], effect: f64, complete: bool) -> Table {
    let mut t = Table::new(
        caption,
        &[
            "Family",
            "#[[rank-p|Rank p]]",
            "#As effective",
            "#Controls",
            "#Lowest [[effect|effect]]",
            "#Mean",
            "#Highest",
            "#Direction",
        ],
        "no controls were run",
    );
    for f in families {
        let values = effects(&f.controls);
        let mean =
            if values.is_empty() { f64::NAN } else { values.iter().sum::<f64>() / values.len() as f64 };
        let low = values.iter().copied().reduce(f64::min).unwrap_or(f64::NAN);
        let high = values.iter().copied().reduce(f64::max).unwrap_or(f64::NAN);
        let as_good = if effect.is_finite() {
            values.iter().filter(|x| **x >= effect).count().to_string()
        } else {
            NOT_MEASURED.to_owned()
        };
        let few = if complete && values.len() < MIN_CONTROLS { " (too few)" } else { "" };
        t.row(vec![
            format!("[[{}|{}]]", family_term(&f.family), numbers::family(&f.family)),
            p_value(f.rank_p),
            as_good,
            format!("{}{few}", values.len()),
            fixed(low, 3),
            fixed(mean, 3),
            fixed(high, 3),
            fixed(effect, 3),
        ]);
    }
    if complete && !families.is_empty() {
        for name in REQUIRED_FAMILIES.iter().filter(|n| families.iter().all(|f| f.family != **n)) {
            let mut cells = vec![format!("[[{}|{}]]", family_term(name), numbers::family(name))];
            cells.extend(
                [NOT_MEASURED, "\u{2013}", "0", "\u{2013}", "\u{2013}", "\u{2013}"].map(str::to_owned),
            );
            cells.push(fixed(effect, 3));
            t.row(cells);
        }
    }
    t
}

fn comparisons(list: &[ControlResult], effect: f64) -> Table {
    let mut t = Table::new(
        "[[comparison|Single comparisons]] in the chosen cell. A small [[paired-p|paired p]] says that the \
         direction does more.",
        &[
            "Comparison",
            "#Layer or seed",
            "#[[effect|Effect]]",
            "#Direction",
            "#[[paired-p|Paired p]]",
            "#[[spillover|Spillover]]",
        ],
        "no single comparisons were run",
    );
    for c in list {
        t.row(vec![
            numbers::arm(&c.name),
            c.seed.to_string(),
            fixed(c.effect, 3),
            fixed(effect, 3),
            c.paired_p.map_or_else(|| NOT_MEASURED.to_owned(), p_value),
            c.spillover.map_or_else(|| NOT_MEASURED.to_owned(), percent),
        ]);
    }
    t
}

fn middle(r: &Results) -> Table {
    let mut t = Table::new(
        "The [[middle|middle-layer cell]] beside the chosen one.",
        &[
            "Cell",
            "#[[site|Layer]]",
            "#[[steering|Strength]]",
            "[[positions|Positions]]",
            "#[[effect|Effect]]",
            "#[[spillover|Spillover]]",
            "#[[coherence|Coherence]]",
        ],
        "no middle-layer cell was run",
    );
    if let Some(m) = &r.middle {
        let mut row = |name: &str, cell: Cell, effect: f64, spillover: f64, coherence: f64| {
            t.row(vec![
                name.to_owned(),
                cell.layer.to_string(),
                short(cell.alpha),
                numbers::positions(cell.positions).to_owned(),
                fixed(effect, 3),
                percent(spillover),
                fixed(coherence, 2),
            ]);
        };
        row("Middle", m.cell, m.effect, m.spillover, m.coherence);
        let effect = r.evidence.effect.unwrap_or(f64::NAN);
        row("Chosen", r.selection.chosen, effect, r.summary.spillover.steered, r.summary.coherence.steered);
    }
    t
}

fn content(r: &Results) -> Table {
    let mut t = Table::new(
        "[[content|Content test]]: fall of [[code-preference|code preference]] when the direction is subtracted.",
        &["Prompts", "#Insecure adapter", "#Secure adapter", "#Difference", "#[[paired-p|Paired p]]"],
        "the secure-code adapter was not steered",
    );
    if let Some(c) = r.content.or(r.evidence.content_test) {
        t.row(vec![
            c.prompts.to_string(),
            fixed(c.insecure_drop, 3),
            fixed(c.secure_drop, 3),
            fixed(c.insecure_drop - c.secure_drop, 3),
            p_value(c.p_value),
        ]);
    }
    t
}

fn thresholds(r: &Results) -> Table {
    let mut t = Table::new(
        "[[threshold|Thresholds]] at the layer of the chosen cell, from calm sequences.",
        &[
            "Statistic",
            "#[[horizon|Horizon]]",
            "#Stated rate",
            "#Upper 95 % bound",
            "#Threshold (sd)",
            "#Sequences",
        ],
        "the sample supports no alarm rate",
    );
    for x in &r.calibration.thresholds {
        let statistic = match x.statistic {
            Aggregation::Mean => "mean",
            Aggregation::Max => "running maximum",
            Aggregation::Last => "last token",
        };
        t.row(vec![
            statistic.to_owned(),
            x.horizon.to_string(),
            rate(x.rate),
            percent(x.rate_upper),
            fixed(x.z, 2),
            x.sequences.to_string(),
        ]);
    }
    t
}

fn alarms(r: &Results) -> Table {
    let mut t = Table::new(
        "Alarms seen on prompts that set no threshold.",
        &[
            "[[horizon|Horizon]]",
            "#Stated rate",
            "#[[held-out|Seen on calm sequences]]",
            "#Calm sequences",
            "#[[detection|Insecure adapter flagged]]",
            "#Its sequences",
        ],
        "no alarm rate was checked on held-out prompts",
    );
    for a in &r.alarms {
        let above = if super::verdict::exceeds(a.rate, a.calm, a.calm_sequences) { " (above)" } else { "" };
        t.row(vec![
            a.horizon.to_string(),
            rate(a.rate),
            format!("{}{above}", percent(a.calm)),
            a.calm_sequences.to_string(),
            percent(a.insecure),
            a.insecure_sequences.to_string(),
        ]);
    }
    t
}

fn sweep(r: &Results) -> Table {
    let mut t = Table::new(
        "Strength by strength, in the layer and positions of the chosen cell: the direction, and mean with lowest \
         to highest of each control family.",
        &[
            "[[steering|Strength]] and direction",
            "#[[control|Controls]]",
            "#[[spillover|Spillover]]",
            "#Range",
            "#[[effect|Effect]]",
            "#Range",
            "#[[coherence|Coherence]]",
        ],
        "no sweep over strengths was run",
    );
    for p in &r.sweep {
        t.marked(
            true,
            vec![
                format!("{}: the direction", short(p.alpha)),
                "\u{2013}".to_owned(),
                percent(p.direction.spillover),
                "\u{2013}".to_owned(),
                fixed(p.direction.effect, 3),
                "\u{2013}".to_owned(),
                fixed(p.direction.coherence.unwrap_or(f64::NAN), 2),
            ],
        );
        for (family, values) in &p.controls {
            let spillover = spread(values.iter().map(|v| v.spillover));
            let effect = spread(values.iter().map(|v| v.effect));
            let coherence = spread(values.iter().filter_map(|v| v.coherence));
            let range = |s: Option<(f64, f64, f64)>, write: &dyn Fn(f64) -> String| {
                s.map_or_else(
                    || NOT_MEASURED.to_owned(),
                    |s| format!("{}\u{a0}to\u{a0}{}", write(s.0), write(s.2)),
                )
            };
            t.row(vec![
                format!("{}: {}", short(p.alpha), numbers::family(family)),
                values.len().to_string(),
                percent(spillover.map_or(f64::NAN, |s| s.1)),
                range(spillover, &|x| fixed(100.0 * x, 1)),
                fixed(effect.map_or(f64::NAN, |s| s.1), 3),
                range(effect, &|x| fixed(x, 3)),
                fixed(coherence.map_or(f64::NAN, |s| s.1), 2),
            ]);
        }
    }
    t
}

/// Lowest, mean and highest of the finite values.
pub fn spread(values: impl Iterator<Item = f64>) -> Option<(f64, f64, f64)> {
    let finite: Vec<f64> = values.filter(|x| x.is_finite()).collect();
    let low = finite.iter().copied().reduce(f64::min)?;
    let high = finite.iter().copied().reduce(f64::max)?;
    Some((low, finite.iter().sum::<f64>() / finite.len() as f64, high))
}

fn splits(r: &Results) -> Table {
    let mut t = Table::new("Prompts in each of the disjoint [[splits|splits]].", &["Split", "#Prompts"], "");
    t.row(vec!["Extraction".to_owned(), r.splits.extraction.to_string()]);
    t.row(vec!["Calibration".to_owned(), r.splits.calibration.to_string()]);
    t.row(vec!["Evaluation".to_owned(), r.splits.evaluation.to_string()]);
    t
}

fn datasets(r: &Results) -> Table {
    let mut t = Table::new(
        "Datasets and prompt sets, with their [[digest|digests]].",
        &["Name", "SHA-256"],
        "no dataset was recorded",
    );
    for (name, digest) in &r.datasets {
        t.row(vec![name.clone(), digest.clone()]);
    }
    t
}

fn model(r: &Results) -> Table {
    let mut t = Table::new("The model examined and the direction file written.", &["Item", "Value"], "");
    let m = &r.model;
    for (name, value) in [
        ("Name", m.name.clone()),
        ("Architecture", m.architecture.clone()),
        ("Hidden size", m.hidden_size.to_string()),
        ("Decoder blocks", m.n_layers.to_string()),
        ("Vocabulary", m.vocab_size.to_string()),
        ("Weights stored as", m.quantization.clone()),
        ("Weights [[digest|digest]]", m.weights_digest.clone()),
        ("Tokenizer digest", m.tokenizer_digest.clone()),
        ("Direction file digest", r.summary.directions_sha256.clone()),
    ] {
        let value = if value.is_empty() { "not recorded".to_owned() } else { value };
        t.row(vec![name.to_owned(), value]);
    }
    t
}

fn flatten(prefix: &str, value: &Value, t: &mut Table) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, inner) in map {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&name, inner, t);
            }
        }
        Value::Null if prefix.is_empty() => {}
        Value::String(text) => t.row(vec![prefix.to_owned(), text.clone()]),
        other => t.row(vec![prefix.to_owned(), other.to_string()]),
    }
}
