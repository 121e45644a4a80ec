//! The figures of the page: which charts they hold, their legends, their words, and what is said when there is
//! nothing to draw.

use super::canvas::*;
use super::charts::{self, Dot, Measure};
use super::numbers::{self, fixed, p_equals, percent, short};
use super::verdict::capital;
use crate::results::{LayerResult, Results};
use anyhow::Result;
use plotters::prelude::*;
use serde::Serialize;

/// Size of a panel; the page scales it to the column it stands in.
const PANEL: (u32, u32) = (360, 230);
const PANEL_TEXT: f64 = 12.5;

/// One figure.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figure {
    /// Charts that share a row where there is room.
    pub panels: Vec<String>,
    /// For wide and for narrow pages, where one drawing cannot serve both.
    pub wide: Option<String>,
    /// See `wide`.
    pub narrow: Option<String>,
    /// Marks and their meaning.
    pub legend: Vec<Mark>,
    /// What it shows; may hold links.
    pub caption: String,
    /// Why there is nothing to see.
    pub missing: Option<&'static str>,
}

/// One entry of a legend.
#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    sign: &'static str,
    colour: &'static str,
    text: String,
}

fn mark(sign: &'static str, colour: RGBColor, text: impl Into<String>) -> Mark {
    Mark { sign, colour: variable(colour), text: text.into() }
}

impl Figure {
    fn missing(why: &'static str) -> Self {
        Figure { missing: Some(why), ..Figure::default() }
    }
}

/// Score histograms, one per layer.
#[derive(Clone, Debug, Serialize)]
pub struct Histograms {
    /// Layer and its drawing.
    pub layers: Vec<(u32, String)>,
    /// The layer shown first.
    pub shown: u32,
    /// Marks and their meaning.
    pub legend: Vec<Mark>,
}

/// Every figure of the page.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    histograms: Histograms,
    layers: Figure,
    spillover: Figure,
    effect: Figure,
    strips: Figure,
    middle_strips: Figure,
    scatter: Figure,
    loss: Figure,
}

/// Draws them all.
pub fn figures(r: &Results) -> Result<Figures> {
    let middle_strips = match &r.middle {
        Some(m) => strip_figure("middle", &m.families, &[], Some(m.effect), "the middle-layer cell")?,
        None => Figure::missing("no middle-layer cell was run"),
    };
    Ok(Figures {
        histograms: histograms(r)?,
        layers: layers(r)?,
        spillover: sweep(r, Measure::Spillover)?,
        effect: sweep(r, Measure::Effect)?,
        strips: strip_figure("battery", &r.families, &r.comparisons, r.evidence.effect, "the chosen cell")?,
        middle_strips,
        scatter: scatter(r)?,
        loss: loss(r)?,
    })
}

fn histograms(r: &Results) -> Result<Histograms> {
    let drawn: Vec<&LayerResult> = r.layers.iter().filter(|l| charts::complete(&l.histogram)).collect();
    let shown = drawn.iter().find(|l| l.layer == r.summary.layer).or(drawn.last()).map_or(0, |l| l.layer);
    let mut layers = Vec::new();
    for l in drawn {
        let title = format!("Scores at layer {}", l.layer);
        let description = format!(
            "Histograms of base, insecure and secure scores. Separation {}, AUROC {}, Cohen's d {}.",
            percent(l.separation),
            fixed(l.auroc, 3),
            fixed(l.cohens_d, 2)
        );
        let svg = themed(&format!("hist-{}", l.layer), (400, 250), &title, &description, |area| {
            charts::histogram(area, &l.histogram, "share of prompts", 13.0)
        })?;
        layers.push((l.layer, svg));
    }
    let legend = vec![
        mark("\u{25a0}", BASE, "base model"),
        mark("\u{25a0}", INSECURE, "insecure adapter"),
        mark("\u{2504}", SECURE, "secure adapter (dashed)"),
    ];
    Ok(Histograms { layers, shown, legend })
}

fn layers(r: &Results) -> Result<Figure> {
    if r.layers.is_empty() {
        return Ok(Figure::missing("no layer was examined"));
    }
    let line = |value: fn(&LayerResult) -> f64| -> Vec<(f64, f64)> {
        r.layers.iter().map(|l| (f64::from(l.layer), value(l))).filter(|p| drawable(p.1)).collect()
    };
    let mut figure = Figure::default();
    let mut panel =
        |name: &str, title: &str, lines: &[(Vec<(f64, f64)>, RGBColor)], share: bool| -> Result<()> {
            let Some(mut y) = range(lines.iter().flat_map(|l| l.0.iter().map(|p| p.1)).chain([0.0])) else {
                return Ok(());
            };
            if share {
                y = 0.0..1.03;
            }
            let ends: Vec<String> = lines
                .iter()
                .filter_map(|l| {
                    Some(format!("from {} to {}", fixed(l.0.first()?.1, 3), fixed(l.0.last()?.1, 3)))
                })
                .collect();
            let description = format!("First to last layer: {}.", ends.join("; "));
            let svg = themed(&format!("layers-{name}"), PANEL, title, &description, |area| {
                let scale = if share { Scale::Percent } else { Scale::Plain };
                charts::by_layer(area, title, lines, y, scale, PANEL_TEXT)
            })?;
            figure.panels.push(svg);
            Ok(())
        };
    let separation = line(|l| l.separation);
    panel(
        "separation",
        "separation (line) and AUROC (dashed)",
        &[(separation, INSECURE), (line(|l| l.auroc), BASE)],
        true,
    )?;
    panel("d", "effect size: Cohen's d", &[(line(|l| l.cohens_d), INSECURE)], false)?;
    let relative = line(|l| l.direction_norm / l.residual_norm);
    panel(
        "norm",
        "|v| / |h| (line), top dimension (dashed)",
        &[(relative, INSECURE), (line(|l| l.top_dimension_share), BASE)],
        false,
    )?;
    if figure.panels.is_empty() {
        return Ok(Figure::missing("no layer gave a finite figure"));
    }
    figure.caption = "[[separation|Separation]], [[auroc|AUROC]] and [[cohens-d|Cohen\u{2019}s d]] of the insecure \
                      adapter against the base, by [[site|layer]], on evaluation prompts; and the length of the \
                      [[direction|direction]] v over that of the activations h, with the share of the \
                      [[top-dimension|top dimension]]. High separation is expected of any finetune."
        .to_owned();
    Ok(figure)
}

/// Families in the sweep, the required ones first.
pub fn sweep_families(r: &Results) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for known in emaudit::directions::schema::REQUIRED_FAMILIES {
        if r.sweep.iter().any(|p| p.controls.contains_key(known)) {
            names.push(known);
        }
    }
    for name in r.sweep.iter().flat_map(|p| p.controls.keys()) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    names
}

/// A sentence per strength, for those who cannot see the chart.
fn sweep_words(r: &Results, family: &str, measure: Measure) -> String {
    let write = |x: f64| if measure == Measure::Spillover { percent(x) } else { fixed(x, 3) };
    let points: Vec<String> = r
        .sweep
        .iter()
        .map(|p| {
            let values = p.controls.get(family).map_or(&[][..], |v| v);
            let controls = super::tables::spread(values.iter().map(|v| measure.of(v))).map_or_else(
                || "no controls".to_owned(),
                |s| format!("controls {} to {}, mean {}", write(s.0), write(s.2), write(s.1)),
            );
            format!("strength {}: direction {}, {controls}", short(p.alpha), write(measure.of(&p.direction)))
        })
        .collect();
    format!("{}.", points.join("; "))
}

fn sweep(r: &Results, measure: Measure) -> Result<Figure> {
    let points = r.sweep.iter().filter(|p| drawable(p.alpha) && drawable(measure.of(&p.direction))).count();
    if points < 2 {
        return Ok(Figure::missing("fewer than two strengths were run"));
    }
    let families = sweep_families(r);
    if families.is_empty() {
        return Ok(Figure::missing("no controls were run over strengths; the table has the direction alone"));
    }
    let (id, name) = match measure {
        Measure::Spillover => ("spill", "Code spillover"),
        Measure::Effect => ("effect", "Effect"),
    };
    let mut figure = Figure::default();
    for (i, family) in families.into_iter().enumerate() {
        let title =
            format!("{name} against strength: the direction and {} controls", numbers::family(family));
        let words = sweep_words(r, family, measure);
        figure.panels.push(themed(&format!("{id}-{i}"), PANEL, &title, &words, |area| {
            charts::sweep_panel(area, &r.sweep, family, measure, r.selection.chosen.alpha, PANEL_TEXT)
        })?);
    }
    figure.legend = vec![
        mark("\u{25cf}\u{2501}", INK, "the direction"),
        mark("\u{25b2}\u{2505}", MUTED, "mean of the controls"),
        mark("\u{2588}", GRID, "lowest to highest control"),
        mark("\u{250a}", MUTED, "chosen strength"),
    ];
    figure.caption = match measure {
        Measure::Spillover => {
            "[[spillover|Code spillover]] of the steered insecure adapter against [[steering|strength]] (lower is \
             less code), for the direction and for each family of [[control|controls]] at the \
             [[size|same size]]. Where the line leaves the band below, the direction does what no control does."
        }
        Measure::Effect => {
            "The same for the [[effect|effect]], the drop of [[code-preference|code preference]] in \
             [[nat|nats]] per token (higher is more effective). It has no sampling noise."
        }
    }
    .to_owned();
    Ok(figure)
}

fn strip_figure(
    id: &str,
    families: &[crate::results::FamilyResult],
    comparisons: &[crate::results::ControlResult],
    effect: Option<f64>,
    place: &str,
) -> Result<Figure> {
    let count = families.iter().map(|f| super::tables::effects(&f.controls).len()).sum::<usize>();
    if count + comparisons.len() == 0 {
        return Ok(Figure::missing("no controls were run"));
    }
    let title = format!("Effect of every control in {place}");
    let direction = effect.map_or_else(|| numbers::NOT_MEASURED.to_owned(), |e| fixed(e, 3));
    let words: Vec<String> = families
        .iter()
        .map(|f| format!("{} rank {}", numbers::family(&f.family), p_equals(f.rank_p)))
        .collect();
    let description = format!("The direction: {direction}. {}.", capital(&words.join(", ")));
    let draw = |suffix: &str, width: u32, text: f64| {
        let size = (width, charts::strips_height(families.len(), comparisons.len(), text));
        themed(&format!("strip-{id}-{suffix}"), size, &title, &description, |area| {
            charts::strips(area, families, comparisons, effect, text)
        })
    };
    let mut legend = vec![mark("\u{2503}", INK, "the direction")];
    legend.extend(
        families.iter().map(|f| mark("\u{25cf}", family_colour(&f.family), numbers::family(&f.family))),
    );
    if !comparisons.is_empty() {
        legend.push(mark("\u{2715}", INK, "single comparisons"));
    }
    Ok(Figure {
        wide: Some(draw("wide", 960, 14.0)?),
        narrow: Some(draw("narrow", 360, 12.5)?),
        legend,
        caption: format!(
            "The [[effect|effect]] of every [[control|control]] in {place}, with the [[rank-p|rank p]] of each \
             family and, in brackets, how many of its controls do as well as the direction: the dots at or \
             beyond the line. Dots are spread vertically only to be told apart."
        ),
        ..Figure::default()
    })
}

fn scatter(r: &Results) -> Result<Figure> {
    let mut dots = Vec::new();
    let mut families = Vec::new();
    for p in r.sweep.iter().filter(|p| p.alpha == r.selection.chosen.alpha) {
        for (family, values) in &p.controls {
            let before = dots.len();
            dots.extend(values.iter().filter_map(|v| {
                let at = (v.spillover, v.coherence.filter(|c| drawable(*c))?);
                Some(Dot { at, name: String::new(), colour: family_colour(family), small: true })
            }));
            if dots.len() > before {
                families.push(family.as_str());
            }
        }
    }
    let controls = dots.len();
    dots.extend(r.arms.iter().filter(|a| drawable(a.spillover.value) && drawable(a.coherence.value)).map(
        |a| {
            let colour = match a.name.as_str() {
                "base" => BASE,
                "steered" => INK,
                name if name.starts_with("insecure") => INSECURE,
                name if name.starts_with("secure") => SECURE,
                _ => MUTED,
            };
            let at = (a.spillover.value, a.coherence.value);
            Dot { at, name: numbers::arm(&a.name), colour, small: false }
        },
    ));
    if dots.is_empty() {
        return Ok(Figure::missing("no coherence was measured"));
    }
    let floor = r.evidence.coherence.map(|c| c.unsteered - c.margin);
    let words: Vec<String> = dots
        .iter()
        .filter(|d| !d.small)
        .map(|d| format!("{}: spillover {}, coherence {}", d.name, percent(d.at.0), fixed(d.at.1, 2)))
        .collect();
    let description = format!("{}. Besides {controls} controls.", words.join("; "));
    let draw = |suffix: &str, size: (u32, u32), text: f64| {
        themed(&format!("scatter-{suffix}"), size, "Coherence against code spillover", &description, |area| {
            charts::scatter(area, &dots, floor, text)
        })
    };
    let mut legend = vec![mark("\u{25b2}", INK, "arms (named)")];
    if floor.is_some_and(drawable) {
        legend.push(mark("\u{2505}", MUTED, "lowest coherence that counts as kept"));
    }
    legend.extend(
        families
            .iter()
            .map(|f| mark("\u{25cf}", family_colour(f), format!("{} controls", numbers::family(f)))),
    );
    Ok(Figure {
        wide: Some(draw("wide", (960, 420), 14.0)?),
        narrow: Some(draw("narrow", (360, 320), 12.5)?),
        legend,
        caption: "[[coherence|Coherence]] against [[spillover|code spillover]] of the arms, and of the controls whose \
                  text was scored, at the chosen [[steering|strength]]. Good steering moves left without falling; \
                  what falls below the dashed line has paid with broken text."
            .to_owned(),
        ..Figure::default()
    })
}

fn loss(r: &Results) -> Result<Figure> {
    let top =
        r.training.values().flatten().map(|s| f64::from(s.loss)).filter(|x| drawable(*x)).fold(0.0, f64::max);
    let mut figure = Figure::default();
    for (i, (name, log)) in r.training.iter().enumerate() {
        let finite: Vec<f64> = log.iter().map(|s| f64::from(s.loss)).filter(|x| drawable(*x)).collect();
        let (Some(first), Some(last)) = (finite.first(), finite.last()) else { continue };
        let colour = match name.as_str() {
            "insecure" => INSECURE,
            "secure" => SECURE,
            _ => MUTED,
        };
        let title = format!("{} adapter: loss, nats per token", numbers::arm(name));
        let words = format!(
            "{} steps; the loss goes from {} to {}.",
            finite.len(),
            fixed(*first, 3),
            fixed(*last, 3)
        );
        figure.panels.push(themed(&format!("loss-{i}"), PANEL, &title, &words, |area| {
            charts::loss(area, log, &title, colour, top, PANEL_TEXT)
        })?);
    }
    if figure.panels.is_empty() {
        return Ok(Figure::missing("no training log was recorded"));
    }
    figure.caption = "Training loss on response tokens: every step (thin) and the mean of the eleven nearest (thick), on one \
                      scale for all [[adapter|adapters]]."
        .to_owned();
    Ok(figure)
}
