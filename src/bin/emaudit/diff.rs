//! `emaudit diff`: what two direction files have in common, and what not.

use crate::output::{Answer, figure, finish};
use clap::Args;
use emaudit::directions::schema::{Calibration, Manifest};
use emaudit::directions::{Directions, OpenOptions, digest};
use emaudit::{Error, Result};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Compare two direction files: identity, vectors, calibration, evidence.
///
/// Directions are compared by the cosine between them and the ratio of their lengths, layer by layer.
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Diff {
    /// One direction file.
    a: PathBuf,
    /// Another.
    b: PathBuf,
    /// Print one JSON object on standard output, good or bad.
    #[arg(long)]
    json: bool,
}

const HELP: &str = "\
Examples:
  emaudit diff monday.directions.safetensors tuesday.directions.safetensors
      did the direction turn? cosine 1 means no; 0 means that the two have nothing in common
  emaudit diff a.safetensors b.safetensors --json | jq '.layers[] | {layer, cosine}'
  if emaudit diff a.safetensors b.safetensors >/dev/null; then echo same; fi

Exit status, as diff has it:
  0  the same: model, site, vectors to the last bit, calibration, evidence, provenance
  1  different
  2  a file could not be read or is not good, or the command line was not understood
What a reader of this version passes over (keys of a manifest that it does not know, other metadata, the order of a
header) is not compared; files that may differ in it have different digests, and `same_bytes` is false.";

/// What the same means where the digests are not.
const OTHER_BYTES: &str = "\
model, site, vectors, calibration, evidence and provenance;
  the bytes differ in what is not compared (order, spacing, unknown keys)";

const DIFFERENT: u8 = 1;
const TROUBLE: u8 = 2;

impl Diff {
    pub fn run(&self) -> ExitCode {
        finish(self.answer(), self.json, TROUBLE)
    }

    fn answer(&self) -> Result<Answer> {
        let open = |path| Directions::open(path, &OpenOptions::default());
        let comparison = Comparison::new(&open(&self.a)?, &open(&self.b)?)?;
        let code = if comparison.same { 0 } else { DIFFERENT };
        Ok(Answer { code, ..Answer::good(comparison.page()?, comparison.object()) })
    }
}

/// One value that differs, by its name in the manifest.
#[derive(Serialize)]
struct Change {
    field: String,
    a: Value,
    b: Value,
}

/// A layer that both files have, of the same width.
#[derive(Serialize)]
struct LayerPair {
    layer: u32,
    /// Of the directions; 1 when they point the same way.
    cosine: f64,
    norms: [f64; 2],
    /// |difference| of the aligned means, in activation units.
    mean_distance: f64,
    /// Both vectors are the same to the last bit.
    same_vectors: bool,
    calibration: Vec<Change>,
}

struct Comparison {
    digests: [String; 2],
    fields: Vec<Change>,
    layers: Vec<LayerPair>,
    only: [Vec<u32>; 2],
    same: bool,
}

impl Comparison {
    fn new(a: &Directions, b: &Directions) -> Result<Comparison> {
        let fields = fields(a.manifest(), b.manifest())?;
        let (ours, theirs): (Vec<u32>, Vec<u32>) = (a.layers().collect(), b.layers().collect());
        let without =
            |all: &[u32], other: &[u32]| all.iter().copied().filter(|l| !other.contains(l)).collect();
        let only = [without(&ours, &theirs), without(&theirs, &ours)];
        let mut layers = Vec::new();
        // Vectors of different widths have no cosine; the width is then among the fields.
        if a.width() == b.width() {
            for layer in ours.into_iter().filter(|l| theirs.contains(l)) {
                layers.push(LayerPair::new(layer, a, b)?);
            }
        }
        let same = fields.is_empty()
            && only.iter().all(Vec::is_empty)
            && layers.iter().all(|l| l.same_vectors && l.calibration.is_empty());
        let digests = [a, b].map(|d| digest::to_hex(&d.digest()));
        Ok(Comparison { digests, fields, layers, only, same })
    }

    fn object(&self) -> Value {
        json!({
            "same": self.same,
            "same_bytes": self.digests[0] == self.digests[1],
            "digests": self.digests,
            "fields": self.fields,
            "layers": self.layers,
            "only_in_a": self.only[0],
            "only_in_b": self.only[1],
        })
    }

    fn page(&self) -> Result<String> {
        let mut page = String::new();
        self.write(&mut page).map_err(|_| Error::Panic("the page could not be formatted".into()))?;
        Ok(page)
    }

    fn write(&self, page: &mut String) -> std::fmt::Result {
        let [a, b] = &self.digests;
        if self.same {
            let what = if a == b { "the same bytes" } else { OTHER_BYTES };
            return writeln!(page, "same: {what}\n  a  {a}\n  b  {b}");
        }
        writeln!(page, "different\n  a  {a}\n  b  {b}")?;
        if !self.fields.is_empty() {
            writeln!(page, "\nFields")?;
            self.fields.iter().try_for_each(|change| change.write(page))?;
        }
        for (name, layers) in ["a", "b"].iter().zip(&self.only) {
            if !layers.is_empty() {
                writeln!(page, "\nLayers only in {name}: {layers:?}")?;
            }
        }
        if self.layers.is_empty() {
            return Ok(());
        }
        writeln!(
            page,
            "\nLayers\n  {:>5}  {:>9}  {:>11}  {:>11}  {:>13}",
            "", "cosine", "|v| a", "|v| b", "mean distance"
        )?;
        for l in &self.layers {
            let [a, b] = l.norms;
            let note = if l.same_vectors { "  same" } else { "" };
            writeln!(
                page,
                "  {:>5}  {:>9.6}  {:>11}  {:>11}  {:>13}{note}",
                l.layer,
                l.cosine,
                figure(a),
                figure(b),
                figure(l.mean_distance)
            )?;
        }
        if self.layers.iter().any(|l| !l.calibration.is_empty()) {
            writeln!(page, "\nCalibration")?;
        }
        self.layers.iter().flat_map(|l| &l.calibration).try_for_each(|change| change.write(page))
    }
}

impl Change {
    fn write(&self, page: &mut String) -> std::fmt::Result {
        writeln!(page, "  {}\n    a  {}\n    b  {}", self.field, shown(&self.a), shown(&self.b))
    }
}

/// A value in at most a line; the JSON form has all of it.
fn shown(value: &Value) -> String {
    const MOST: usize = 68;
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if text.chars().count() <= MOST {
        return text;
    }
    text.chars().take(MOST - 3).chain("...".chars()).collect()
}

impl LayerPair {
    fn new(layer: u32, a: &Directions, b: &Directions) -> Result<LayerPair> {
        let (x, y) = (a.layer(layer)?, b.layer(layer)?);
        let norms = [norm(&x.direction), norm(&y.direction)];
        let dot: f64 =
            x.direction.iter().zip(&*y.direction).map(|(p, q)| f64::from(*p) * f64::from(*q)).sum();
        let gap =
            x.aligned_mean.iter().zip(&*y.aligned_mean).map(|(p, q)| (f64::from(*p) - f64::from(*q)).powi(2));
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        Ok(LayerPair {
            layer,
            cosine: dot / norms[0] / norms[1],
            norms,
            mean_distance: gap.sum::<f64>().sqrt(),
            same_vectors: bits(&x.direction) == bits(&y.direction)
                && bits(&x.aligned_mean) == bits(&y.aligned_mean),
            calibration: calibration(layer, x.calibration, y.calibration)?,
        })
    }
}

pub fn norm(vector: &[f32]) -> f64 {
    vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}

/// The parts of two manifests that differ, layers aside.
fn fields(a: &Manifest, b: &Manifest) -> Result<Vec<Change>> {
    let value = |manifest: &Manifest| -> Result<Value> {
        let bare = Manifest { layers: Vec::new(), ..manifest.clone() };
        serde_json::to_value(bare).map_err(|e| Error::Panic(e.to_string()))
    };
    let mut changes = Vec::new();
    compare(String::new(), &value(a)?, &value(b)?, &mut changes);
    Ok(changes)
}

fn calibration(layer: u32, a: Option<&Calibration>, b: Option<&Calibration>) -> Result<Vec<Change>> {
    let value = |c: Option<&Calibration>| serde_json::to_value(c).map_err(|e| Error::Panic(e.to_string()));
    let mut changes = Vec::new();
    compare(format!("layer {layer}"), &value(a)?, &value(b)?, &mut changes);
    Ok(changes)
}

/// Walks two JSON values; arrays are compared whole.
fn compare(at: String, a: &Value, b: &Value, changes: &mut Vec<Change>) {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let name = |key: &str| if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
            for (key, value) in x {
                compare(name(key), value, y.get(key).unwrap_or(&Value::Null), changes);
            }
            for (key, value) in y.iter().filter(|(key, _)| !x.contains_key(*key)) {
                changes.push(Change { field: name(key), a: Value::Null, b: value.clone() });
            }
        }
        _ if a == b => {}
        _ => changes.push(Change { field: at, a: a.clone(), b: b.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_has_its_name_on_whichever_side_it_is() {
        let (a, b) = (json!({"x": {"p": 1}}), json!({"x": {"p": 1, "q": 2}, "y": 3}));
        let mut changes = Vec::new();
        compare(String::new(), &a, &b, &mut changes);
        compare(String::new(), &b, &a, &mut changes);
        let fields: Vec<&str> = changes.iter().map(|c| c.field.as_str()).collect();
        assert_eq!(fields, ["x.q", "y", "x.q", "y"]);
        assert_eq!((&changes[1].a, &changes[1].b), (&Value::Null, &json!(3)));
    }
}
