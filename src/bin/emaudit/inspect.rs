//! `emaudit inspect`: a direction file as a page for people, or as JSON for programs.

use crate::output::{Answer, finish};
use clap::Args;
use emaudit::directions::schema::{CAUSAL_P, Evidence, MIN_CONTROLS, Manifest, Specificity};
use emaudit::directions::{Directions, Layer, OpenOptions, digest};
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
}

const HELP: &str = "\
Examples:
  emaudit inspect model.directions.safetensors
  emaudit inspect model.directions.safetensors --json | jq '.manifest.layers[].layer'

How to read the page:
  sigma      standard deviation of aligned scores; a score of 2 sd is two of these
  flagged    the alarm: a statistic of the first tokens above a score, and how often calm text does that
  causal     does the direction do more than random ones of the same size? (controls, rank p)
  content    does it act on the insecure adapter more than on the secure one?";

impl Inspect {
    pub fn run(&self) -> ExitCode {
        finish(self.answer(), self.json)
    }

    fn answer(&self) -> emaudit::Result<Answer> {
        let directions = Directions::open(&self.file, &OpenOptions::default())?;
        let page = page(&directions)?;
        let norms = norms(&directions)?;
        let layers: Vec<Value> =
            norms.iter().map(|(layer, norm)| json!({"layer": layer, "direction_norm": norm})).collect();
        let object = json!({
            "ok": true,
            "status": emaudit::Status::Ok as i32,
            "status_name": "Ok",
            "digest": digest::to_hex(&directions.digest()),
            "width": directions.width(),
            "layers": layers,
            "manifest": to_value(directions.manifest())?,
        });
        Ok(Answer { page, object })
    }
}

/// The length |v| of each layer's direction, in activation units.
fn norms(directions: &Directions) -> emaudit::Result<Vec<(u32, f64)>> {
    directions.layers().map(|l| Ok((l, norm(&directions.layer(l)?)))).collect()
}

fn norm(layer: &Layer<'_>) -> f64 {
    layer.direction.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}

fn to_value(value: impl Serialize) -> emaudit::Result<Value> {
    serde_json::to_value(value).map_err(|e| emaudit::Error::Panic(e.to_string()))
}

/// The word a value has in the file, e.g. `resid_post`.
fn word(value: impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

fn page(directions: &Directions) -> emaudit::Result<String> {
    let mut page = String::new();
    let written = identity(&mut page, directions)
        .and_then(|()| layers(&mut page, directions))
        .and_then(|()| evidence(&mut page, &directions.manifest().evidence));
    // Writing to a string fails only where a value cannot be formatted.
    written.map_err(|_| emaudit::Error::Panic("the page could not be formatted".into()))?;
    Ok(page)
}

fn identity(page: &mut String, directions: &Directions) -> Result<(), Error> {
    let Manifest { model, site, pooling, estimator, contrast, provenance, .. } = directions.manifest();
    writeln!(page, "Directions for {}", model.name)?;
    writeln!(page, "  digest      {} (verified)", digest::to_hex(&directions.digest()))?;
    writeln!(
        page,
        "  model       {}, width {}, {} blocks, {} tokens",
        model.architecture, model.hidden_size, model.n_layers, model.vocab_size
    )?;
    writeln!(page, "  tokenizer   {}", model.tokenizer_digest)?;
    writeln!(page, "  weights     {} ({})", model.weights_digest, model.quantization)?;
    writeln!(page, "  site        {}, pooled over {}", word(site), word(pooling))?;
    writeln!(page, "  direction   {} of {}", word(estimator), word(contrast))?;
    writeln!(page, "  producer    {}, recipe {}", provenance.producer, provenance.recipe_digest)?;
    for (name, digest) in &provenance.datasets {
        writeln!(page, "  dataset     {name}, {digest}")?;
    }
    if let Some(share) = provenance.top_dimension_share {
        writeln!(
            page,
            "  norm        {:.1} % of the squared activation norm is in one dimension",
            100.0 * share
        )?;
    }
    Ok(())
}

fn layers(page: &mut String, directions: &Directions) -> Result<(), Error> {
    for entry in &directions.manifest().layers {
        let length = directions.layer(entry.layer).map(|l| norm(&l)).map_err(|_| Error)?;
        let calibration = &entry.calibration;
        writeln!(
            page,
            "\nLayer {}: sigma {:.4}, |v| {:.4}, {} aligned sequences",
            entry.layer, calibration.sigma, length, calibration.sequences
        )?;
        for t in &calibration.thresholds {
            writeln!(
                page,
                "  flagged: {} of the first {} token(s) above {:.3} sd; calm sequences: {} (95 % bound {}, n = {})",
                t.statistic.as_str(),
                t.horizon,
                t.z,
                percent(t.rate),
                percent(t.rate_upper),
                t.sequences
            )?;
        }
        if calibration.thresholds.is_empty() {
            writeln!(page, "  no thresholds: scores can be read, nothing can be flagged")?;
        }
    }
    Ok(())
}

fn evidence(page: &mut String, evidence: &Evidence) -> Result<(), Error> {
    writeln!(page, "\nEvidence")?;
    writeln!(page, "  causal      {}: {}", evidence.causal.as_str(), causal_meaning(evidence.causal))?;
    writeln!(page, "  content     {}: {}", evidence.content.as_str(), content_meaning(evidence.content))?;
    if let Some(cell) = &evidence.cell {
        writeln!(
            page,
            "  measured    layer {}, alpha {}, positions {}",
            cell.layer,
            cell.alpha,
            word(cell.positions)
        )?;
    }
    if let Some(effect) = evidence.effect {
        writeln!(page, "  effect      {effect:.4} nats per token less code preference")?;
    }
    if let Some(c) = &evidence.coherence {
        let kept = if c.steered >= c.unsteered - c.margin { "kept" } else { "lost" };
        writeln!(
            page,
            "  coherence   {kept}: {:.4} -> {:.4} nats per token (margin {})",
            c.unsteered, c.steered, c.margin
        )?;
    }
    if let Some(t) = &evidence.content_test {
        writeln!(
            page,
            "  paired      insecure {:.4}, secure {:.4}, p = {:.4} over {} prompts",
            t.insecure_drop, t.secure_drop, t.p_value, t.prompts
        )?;
    }
    let widest = evidence.families.iter().map(|f| f.family.chars().count()).max().unwrap_or(0);
    for f in &evidence.families {
        let n = f.controls.len();
        let says = match (n < MIN_CONTROLS, f.rank_p < CAUSAL_P) {
            (true, _) => "too few to say",
            (false, true) => "beaten",
            (false, false) => "not beaten",
        };
        writeln!(page, "  controls    {:widest$}  {n:>5}   rank p {:.4}   {says}", f.family, f.rank_p)?;
    }
    Ok(())
}

fn causal_meaning(status: Specificity) -> &'static str {
    match status {
        Specificity::Untested => "not measured against enough controls",
        Specificity::Nonspecific => "controls of the same size do as well, or coherence is lost",
        Specificity::Specific => "it does more than controls of the same size, and coherence is kept",
    }
}

fn content_meaning(status: Specificity) -> &'static str {
    match status {
        Specificity::Untested => "insecure and secure adapters were not compared",
        Specificity::Nonspecific => "not shown to act on the insecure adapter more than on the secure one",
        Specificity::Specific => "it acts on the insecure adapter more than on the secure one",
    }
}

/// A share as percent, without zeros that say nothing; a share too small for that is not shown as none.
fn percent(share: f64) -> String {
    if share < 1e-5 {
        return format!("{:.2e} %", 100.0 * share);
    }
    let text = format!("{:.3}", 100.0 * share);
    format!("{} %", text.trim_end_matches('0').trim_end_matches('.'))
}
