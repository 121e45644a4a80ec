//! `emaudit inspect`: a direction file as a page for people, or as JSON for programs.

use crate::diff::norm;
use crate::output::{Answer, figure, finish, percent, short, signed};
use crate::picture::{Paint, bar, quantiles, strip};
use clap::Args;
use emaudit::directions::schema::{
    CAUSAL_P, Calibration, ControlFamily, Evidence, LayerManifest, MIN_CONTROLS, Manifest, Specificity,
};
use emaudit::directions::{Directions, OpenOptions, digest};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt::{Error, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Show what is in a direction file: model, layers, thresholds, evidence.
///
/// The file is verified first; a damaged or inconsistent one is refused, not shown.
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Inspect {
    /// The direction file.
    file: PathBuf,
    /// Print one JSON object on standard output, good or bad.
    #[arg(long)]
    json: bool,
    /// Show the calibration of this layer; without it, of the layer that the evidence is about.
    #[arg(long, value_name = "L")]
    layer: Option<u32>,
    /// Show the calibration of every layer.
    #[arg(long, conflicts_with = "layer")]
    all: bool,
}

const HELP: &str = "\
Examples:
  emaudit inspect model.directions.safetensors
  emaudit inspect model.directions.safetensors --json | jq '.manifest.layers[].layer'

How to read the page:
  |v|        length of the direction in activation units, drawn as a bar
  sigma      standard deviation of aligned scores; |v|/sigma is what subtracting v takes off a score, in sd
  aligned    aligned scores: the line spans the quantiles, the box half of all, a thin bar is their middle; ! is an alarm
  alarm      a statistic of the first tokens above a score, and how often calm text does that
  causal     does the direction do more than controls of the same size? The strip shows the controls' effects,
             from low to high, and the direction's as a diamond
  content    does it act on the insecure adapter more than on the secure one?

Colour is used on a terminal, unless NO_COLOR is set.

Exit status:
  0  the file is good
  1  it is not, or could not be read; one sentence on standard error says why
  2  the command line was not understood";

impl Inspect {
    pub fn run(&self) -> ExitCode {
        finish(self.answer(), self.json, 1)
    }

    fn answer(&self) -> emaudit::Result<Answer> {
        let directions = Directions::open(&self.file, &OpenOptions::default())?;
        let shown = self.shown(&directions)?;
        let page = page(&directions, &shown, Paint::for_stdout())?;
        let layers: Vec<Value> = norms(&directions)?
            .iter()
            .map(|(layer, norm)| json!({"layer": layer, "direction_norm": norm}))
            .collect();
        let object = json!({
            "digest": digest::to_hex(&directions.digest()),
            "width": directions.width(),
            "layers": layers,
            "manifest": to_value(directions.manifest())?,
        });
        Ok(Answer::good(page, object))
    }

    /// The layers whose calibration is printed.
    fn shown(&self, directions: &Directions) -> emaudit::Result<Vec<u32>> {
        if let Some(layer) = self.layer {
            directions.layer(layer)?;
            return Ok(vec![layer]);
        }
        let measured = directions.manifest().evidence.cell.map(|c| c.layer);
        let all: Vec<u32> = directions.layers().collect();
        Ok(if self.all { all } else { measured.or(all.last().copied()).into_iter().collect() })
    }
}

/// The length |v| of each layer's direction, in activation units.
fn norms(directions: &Directions) -> emaudit::Result<Vec<(u32, f64)>> {
    directions.layers().map(|l| Ok((l, norm(&directions.layer(l)?.direction)))).collect()
}

fn to_value(value: impl Serialize) -> emaudit::Result<Value> {
    serde_json::to_value(value).map_err(|e| emaudit::Error::Panic(e.to_string()))
}

/// The word a value has in the file, e.g. `resid_post`.
fn word(value: impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// The page for people, at most 80 columns wide.
fn page(directions: &Directions, shown: &[u32], paint: Paint) -> emaudit::Result<String> {
    let mut page = Page { text: String::new(), paint };
    let norms = norms(directions)?;
    let manifest = directions.manifest();
    let written = page
        .identity(directions)
        .and_then(|()| page.layers(manifest, &norms))
        .and_then(|()| {
            let mut shown = manifest.layers.iter().filter(|l| shown.contains(&l.layer));
            shown.try_for_each(|l| page.calibration(l))
        })
        .and_then(|()| page.evidence(&manifest.evidence));
    // Writing to a string fails only where a value cannot be formatted.
    written.map_err(|_| emaudit::Error::Panic("the page could not be formatted".into()))?;
    Ok(page.text)
}

struct Page {
    text: String,
    paint: Paint,
}

impl Page {
    fn heading(&mut self, title: &str) -> Result<(), Error> {
        writeln!(self.text, "\n{}", self.paint.bold(title))
    }

    /// `  name        value`.
    fn entry(&mut self, name: &str, value: impl std::fmt::Display) -> Result<(), Error> {
        let name = if name.is_empty() { " ".repeat(12) } else { self.paint.dim(&format!("{name:<12}")) };
        writeln!(self.text, "  {name}{value}")
    }

    /// An entry of many parts, in as many lines as it takes.
    fn parts(&mut self, name: &str, parts: &[String], between: &str) -> Result<(), Error> {
        const ROOM: usize = 80 - 14;
        let (mut name, mut row) = (name, String::new());
        for part in parts {
            let length = row.chars().count() + between.len() + part.chars().count();
            if !row.is_empty() && length + between.trim_end().len() > ROOM {
                self.entry(name, format_args!("{row}{}", between.trim_end()))?;
                (name, row) = ("", String::new());
            }
            if !row.is_empty() {
                row += between;
            }
            row += part;
        }
        self.entry(name, row)
    }

    fn identity(&mut self, directions: &Directions) -> Result<(), Error> {
        let Manifest { model, site, pooling, estimator, contrast, provenance, .. } = directions.manifest();
        writeln!(self.text, "{}", self.paint.bold(&format!("Directions for {}", model.name)))?;
        self.entry("digest", digest::to_hex(&directions.digest()))?;
        self.entry("", self.paint.good("verified: the bytes are those that were written"))?;
        self.entry(
            "model",
            format_args!(
                "{}, width {}, {} blocks, {} tokens",
                model.architecture, model.hidden_size, model.n_layers, model.vocab_size
            ),
        )?;
        self.entry("tokenizer", &model.tokenizer_digest)?;
        self.entry("weights", &model.weights_digest)?;
        self.entry("stored as", &model.quantization)?;
        self.entry("site", format_args!("{}, pooled over {}", word(site), word(pooling)))?;
        self.entry("direction", format_args!("{} of {}", word(estimator), word(contrast)))?;
        self.entry("producer", &provenance.producer)?;
        self.entry("recipe", &provenance.recipe_digest)?;
        for (name, digest) in &provenance.datasets {
            self.entry("dataset", name)?;
            self.entry("", digest)?;
        }
        if let Some(share) = provenance.top_dimension_share {
            let sentence =
                format_args!("{:.1} % of the squared activation norm is in one dimension", 100.0 * share);
            self.entry("norm", sentence)?;
        }
        Ok(())
    }

    fn layers(&mut self, manifest: &Manifest, norms: &[(u32, f64)]) -> Result<(), Error> {
        const BAR: usize = 24;
        let longest = norms.iter().map(|(_, n)| *n).fold(0.0, f64::max);
        self.heading("Layers")?;
        let titles = format!("  {:>5}  {:>10}  {:BAR$}  {:>10}  {:>10}", "", "|v|", "", "sigma", "|v|/sigma");
        writeln!(self.text, "{}", self.paint.dim(&titles))?;
        for (entry, (layer, norm)) in manifest.layers.iter().zip(norms) {
            let sigma = entry.calibration.as_ref().map(|c| c.sigma);
            let here = manifest.evidence.cell.is_some_and(|c| c.layer == *layer);
            let note = if here { "  evidence" } else { "" };
            let bar = bar(norm / longest, BAR);
            let or_none = |x: Option<f64>| x.map_or("-".into(), figure);
            let (sigma, ratio, norm) = (or_none(sigma), or_none(sigma.map(|s| norm / s)), figure(*norm));
            writeln!(self.text, "  {layer:>5}  {norm:>10}  {bar}  {sigma:>10}  {ratio:>10}{note}")?;
        }
        Ok(())
    }

    fn calibration(&mut self, entry: &LayerManifest) -> Result<(), Error> {
        const CELLS: usize = 60;
        self.heading(&format!("Calibration of layer {}", entry.layer))?;
        let Some(calibration) = &entry.calibration else {
            return self
                .entry("scores", self.paint.open("not calibrated: raw scores only, nothing can be flagged"));
        };
        let Calibration { sigma, sequences, quantiles: pairs, thresholds } = calibration;
        self.entry("sigma", format_args!("{} from {sequences} aligned sequences", figure(*sigma)))?;
        let alarms: Vec<(f64, char)> = thresholds.iter().map(|t| (t.z, '!')).collect();
        if let Some((text, [low, high])) = quantiles(pairs, &alarms, CELLS) {
            self.entry("aligned", text)?;
            let high = format!("{} sd", signed(high, 2));
            let ends = format!("{:<10}{high:>width$}", signed(low, 2), width = CELLS - 10);
            self.entry("", ends)?;
        }
        let cells: Vec<String> =
            pairs.iter().map(|(p, z)| format!("{:>5} {:>6}", percent(*p), signed(*z, 2))).collect();
        for row in cells.chunks(5) {
            self.parts("", row, " ")?;
        }
        if thresholds.is_empty() {
            return self.entry("alarm", self.paint.open("none: scores can be read, nothing can be flagged"));
        }
        let titles = format!(
            "{:<10}{:>6}{:>10}{:>14}{:>14}{:>10}",
            "", "tokens", "above sd", "calm text", "at most", "n"
        );
        self.entry("alarm", self.paint.dim(titles.trim_end()))?;
        for t in thresholds {
            let (rate, upper) = (percent(t.rate), percent(t.rate_upper));
            let row = format!(
                "{:<6}{:>10}{:>10}{rate:>14}{upper:>14}{:>10}",
                t.statistic.as_str(),
                t.horizon,
                signed(t.z, 3),
                t.sequences
            );
            self.entry("", row)?;
        }
        Ok(())
    }

    fn evidence(&mut self, evidence: &Evidence) -> Result<(), Error> {
        self.heading("Evidence")?;
        self.axis("causal", evidence.causal, causal_meaning(evidence.causal))?;
        self.axis("content", evidence.content, content_meaning(evidence.content))?;
        if let Some(cell) = &evidence.cell {
            let at = format!(
                "layer {}, alpha {}, positions {}",
                cell.layer,
                short(cell.alpha),
                word(cell.positions)
            );
            self.entry("measured", at)?;
        }
        if let Some(effect) = evidence.effect {
            self.entry("effect", format_args!("{} nats per token less code preference", figure(effect)))?;
        }
        if let Some(c) = &evidence.coherence {
            let kept = c.steered >= c.unsteered - c.margin;
            let word = if kept { self.paint.good("kept") } else { self.paint.bad("lost") };
            let (before, after, margin) = (figure(c.unsteered), figure(c.steered), short(c.margin));
            let change = format!("{before} -> {after} nats per token, margin {margin}");
            self.entry("coherence", format_args!("{word}: {change}"))?;
        }
        if let Some(t) = &evidence.content_test {
            let parts = [
                format!("insecure {}", figure(t.insecure_drop)),
                format!("secure {}", figure(t.secure_drop)),
                format!("p = {}", figure(t.p_value)),
                format!("{} prompts", t.prompts),
            ];
            self.parts("paired", &parts, ", ")?;
        }
        if evidence.families.is_empty() {
            return Ok(());
        }
        let titles = format!("{:<16}{:>4}  {:>7}  {:<14}effects, low to high", "", "n", "rank p", "");
        self.entry("controls", self.paint.dim(&titles))?;
        evidence.families.iter().try_for_each(|f| self.family(f, evidence.effect.unwrap_or_default()))
    }

    fn axis(&mut self, name: &str, status: Specificity, meaning: &str) -> Result<(), Error> {
        let word = match status {
            Specificity::Untested => self.paint.open(status.as_str()),
            Specificity::Nonspecific => self.paint.bad(status.as_str()),
            Specificity::Specific => self.paint.good(status.as_str()),
        };
        self.entry(name, word)?;
        self.entry("", meaning)
    }

    fn family(&mut self, f: &ControlFamily, effect: f64) -> Result<(), Error> {
        let (word, paint): (_, fn(Paint, &str) -> String) =
            match (f.controls.len() < MIN_CONTROLS, f.rank_p < CAUSAL_P) {
                (true, _) => ("too few to say", Paint::open),
                (false, true) => ("beaten", Paint::good),
                (false, false) => ("not beaten", Paint::bad),
            };
        let effects: Vec<f64> = f.controls.iter().map(|c| c.effect).collect();
        let ends = |[low, high]: [f64; 2], e: &f64| [low.min(*e), high.max(*e)];
        let range = effects.iter().fold([effect, effect], ends);
        let word = paint(self.paint, &format!("{word:<14}"));
        let row = format!(
            "{:<16}{:>4}  {:>7.4}  {word}{}",
            f.family,
            effects.len(),
            f.rank_p,
            strip(&effects, effect, range, 18)
        );
        self.entry("", row)
    }
}

fn causal_meaning(status: Specificity) -> &'static str {
    match status {
        Specificity::Untested => "not measured against enough controls",
        Specificity::Nonspecific => "controls of the same size do as well, or coherence is lost",
        Specificity::Specific => "it does more than controls of the same size, coherence kept",
    }
}

fn content_meaning(status: Specificity) -> &'static str {
    match status {
        Specificity::Untested => "insecure and secure adapters were not compared",
        Specificity::Nonspecific => "not shown to act on the insecure adapter more than the secure",
        Specificity::Specific => "it acts on the insecure adapter more than on the secure one",
    }
}
