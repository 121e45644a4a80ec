//! The rules a manifest keeps: each number sensible by itself, none against another, and every word of
//! evidence earned by the numbers beside it. FORMAT.md lists the same rules in the same order.

use super::digest::is_canonical_hex;
use super::json;
use super::schema::{
    Aggregation, Calibration, Cell, Coherence, ContentTest, ControlFamily, Evidence, Manifest, ModelIdentity,
    Provenance, Site, Threshold,
};
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::fmt::{Arguments, Debug, Display};

/// How far a stored rank p may lie from the recomputed one: other writers round differently.
const RANK_P_TOLERANCE: f64 = 1e-9;
/// Each costs a watched sequence a comparison.
const MAX_QUANTILES: usize = 256;

/// The one way a rule speaks: the field, its value, what it must be.
#[inline(always)]
fn rule(holds: bool, field: impl Display, value: impl Debug, must: impl Display) -> Result<()> {
    if holds { Ok(()) } else { Err(broken(field, value, must)) }
}

// Apart, so that a rule that holds costs a comparison.
#[cold]
#[inline(never)]
fn broken(field: impl Display, value: impl Debug, must: impl Display) -> Error {
    let value = json::plain(&format!("{value:?}"));
    Error::Schema(format!("{field} is {value}, it must be {must}"))
}

impl Manifest {
    /// Reads the JSON text under `emaudit.manifest`; the values are not yet checked against each other.
    pub(super) fn from_json(text: &json::Text<'_>) -> Result<Manifest> {
        text.read().map_err(|refusal| match refusal.rule() {
            json::Rule::Strict => {
                Error::Malformed(format!("`emaudit.manifest` is not strict JSON: {refusal}"))
            }
            json::Rule::Shape => Error::Schema(format!("`emaudit.manifest`: {refusal}")),
        })
    }

    /// Checks every rule of the format that concerns the metadata alone.
    ///
    /// # Errors
    /// [`Error::Schema`] with the field, its value and what it must be; the first rule broken.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.validate_layers()?;
        let mut floor = Floor::default();
        for entry in &self.layers {
            let calibration = entry.calibration.as_ref();
            calibration.map_or(Ok(()), |calibration| calibration.validate(entry.layer, &mut floor))?;
        }
        self.evidence.validate()?;
        if let Some(cell) = &self.evidence.cell {
            let known = self.layers.iter().any(|l| l.layer == cell.layer);
            rule(known, "evidence.cell.layer", cell.layer, "a layer of this file")?;
        }
        self.provenance.validate()
    }

    fn validate_layers(&self) -> Result<()> {
        let layers: Vec<u32> = self.layers.iter().map(|l| l.layer).collect();
        let n_layers = self.model.n_layers;
        let ascending = !layers.is_empty() && layers.is_sorted_by(|a, b| a < b);
        rule(ascending, "the list of layers", &layers, "ascending without repetition, and not empty")?;
        let last = layers[layers.len() - 1];
        rule(last < n_layers, "layer", last, format_args!("below model.n_layers, which is {n_layers}"))?;
        let site_holds = self.site != Site::FinalNorm || layers == [n_layers - 1];
        let must = format_args!("[{}] alone, since the final norm follows the last block", n_layers - 1);
        rule(site_holds, "the list of layers at site final_norm", &layers, must)
    }
}

/// Text that people read: there, and without characters that move a terminal's cursor.
fn text(field: impl Display, value: &str) -> Result<()> {
    let holds = !value.trim().is_empty() && !value.chars().any(char::is_control);
    rule(holds, field, value, "text without control characters, and not empty")
}

fn hex_digest(field: impl Display, value: &str) -> Result<()> {
    rule(is_canonical_hex(value), field, value, "a SHA-256 as 64 lower-case hex characters")
}

fn finite(field: impl Display, value: f64) -> Result<()> {
    rule(value.is_finite(), field, value, "a finite number")
}

/// `low <= value <= high`; false for a NaN.
fn between(field: impl Display, value: f64, low: f64, high: f64) -> Result<()> {
    rule((low..=high).contains(&value), field, value, format_args!("between {low} and {high}"))
}

/// Strictly between 0 and 1.
fn probability(field: impl Display, value: f64) -> Result<()> {
    rule(value > 0.0 && value < 1.0, field, value, "above 0 and below 1")
}

/// A score in units of sigma, which kernels hold as f32.
fn score(field: impl Display, value: f64) -> Result<()> {
    let limit = f64::from(f32::MAX);
    rule(value.abs() <= limit, field, value, "a finite number within the range of f32")
}

fn at_least(field: impl Display, value: u32, low: u32) -> Result<()> {
    rule(value >= low, field, value, format_args!("at least {low}"))
}

impl ModelIdentity {
    fn validate(&self) -> Result<()> {
        text("model.architecture", &self.architecture)?;
        at_least("model.hidden_size", self.hidden_size, 1)?;
        at_least("model.n_layers", self.n_layers, 1)?;
        at_least("model.vocab_size", self.vocab_size, 1)?;
        hex_digest("model.tokenizer_digest", &self.tokenizer_digest)?;
        hex_digest("model.weights_digest", &self.weights_digest)?;
        text("model.quantization", &self.quantization)?;
        text("model.name", &self.name)
    }
}

impl Calibration {
    fn validate(&self, layer: u32, floor: &mut Floor) -> Result<()> {
        let at = format_args!("layer {layer}: calibration");
        // Smaller or larger, and 1 / sigma leaves the range of f32.
        let sigma_holds = (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&self.sigma);
        rule(sigma_holds, format_args!("{at}.sigma"), self.sigma, "positive and within the range of f32")?;
        at_least(format_args!("{at}.sequences"), self.sequences, 2)?;
        let few = self.quantiles.len() <= MAX_QUANTILES;
        rule(
            few,
            format_args!("{at}.quantiles"),
            self.quantiles.len(),
            format_args!("at most {MAX_QUANTILES}"),
        )?;
        for (i, (p, z)) in self.quantiles.iter().enumerate() {
            probability(format_args!("{at}.quantiles[{i}] probability"), *p)?;
            score(format_args!("{at}.quantiles[{i}] z"), *z)?;
        }
        for (i, pair) in self.quantiles.windows(2).enumerate() {
            let ascending = pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1;
            let must = "ascending in both: a larger probability has no smaller z";
            rule(ascending, format_args!("{at}.quantiles[{i}..={}]", i + 1), pair, must)?;
        }
        for (i, threshold) in self.thresholds.iter().enumerate() {
            threshold.validate(format_args!("{at}.thresholds[{i}]"), floor.of(threshold.sequences))?;
        }
        self.validate_order_of_thresholds(at)
    }

    /// Of two thresholds on the same statistic and horizon the rarer alarm needs the larger score.
    fn validate_order_of_thresholds(&self, at: Arguments<'_>) -> Result<()> {
        let place = |t: &Threshold| (t.statistic as u32, t.horizon);
        let mut sorted: Vec<&Threshold> = self.thresholds.iter().collect();
        // The bits of positive numbers are in their order.
        sorted.sort_unstable_by_key(|t| (place(t), t.rate.to_bits()));
        for pair in sorted.windows(2).filter(|pair| place(pair[0]) == place(pair[1])) {
            let (rare, common) = (pair[0], pair[1]);
            let name = Aggregation::as_str(rare.statistic);
            let place = format_args!("{at}.thresholds for the {name} over {} tokens", rare.horizon);
            let distinct = rare.rate < common.rate;
            rule(distinct, format_args!("{place}: rate"), rare.rate, "stated once")?;
            let must = format_args!("at least {}, the one at the larger rate {}", common.z, common.rate);
            rule(rare.z >= common.z, format_args!("{place}: z at rate {}", rare.rate), rare.z, must)?;
        }
        Ok(())
    }
}

/// The lowest rate that a sample supports, kept from one threshold to the next: they share a sample as a rule.
#[derive(Default)]
struct Floor {
    sequences: u32,
    floor: f64,
}

impl Floor {
    /// Not one alarm in n sequences still leaves this much open at 95 %: about 3 / n.
    fn of(&mut self, sequences: u32) -> f64 {
        if sequences != self.sequences {
            *self = Floor { sequences, floor: 1.0 - 0.05f64.powf(1.0 / f64::from(sequences)) };
        }
        self.floor
    }
}

impl Threshold {
    fn validate(&self, at: Arguments<'_>, floor: f64) -> Result<()> {
        at_least(format_args!("{at}.horizon"), self.horizon, 1)?;
        at_least(format_args!("{at}.sequences"), self.sequences, 1)?;
        probability(format_args!("{at}.rate"), self.rate)?;
        score(format_args!("{at}.z"), self.z)?;
        let must =
            format_args!("at least 1 - 0.05^(1 / sequences) = {floor:.6}; calibrate on more sequences");
        rule(self.rate >= floor - 1e-9, format_args!("{at}.rate"), self.rate, must)?;
        let held = (floor - 1e-9..=self.rate + 1e-9).contains(&self.rate_upper);
        let must = format_args!("between {floor:.6} and the rate it holds, {}", self.rate);
        rule(held, format_args!("{at}.rate_upper"), self.rate_upper, must)
    }
}

impl Aggregation {
    /// The word used in files, reports and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Aggregation::Mean => "mean",
            Aggregation::Max => "max",
            Aggregation::Last => "last",
        }
    }
}

impl Evidence {
    fn validate(&self) -> Result<()> {
        self.cell.map_or(Ok(()), |cell| cell.validate())?;
        self.effect.map_or(Ok(()), |effect| finite("evidence.effect", effect))?;
        self.coherence.map_or(Ok(()), |coherence| coherence.validate())?;
        let measured = self.effect.is_some() || self.coherence.is_some() || self.content_test.is_some();
        let cell_holds = self.cell.is_some() || !measured;
        rule(cell_holds, "evidence.cell", self.cell, "there, since something was measured in it")?;
        let effect_holds = self.effect.is_some() || self.families.is_empty();
        rule(
            effect_holds,
            "evidence.effect",
            self.effect,
            "there, since control families are compared with it",
        )?;
        let mut names = BTreeSet::new();
        for family in &self.families {
            family.validate(self.effect.unwrap_or_default())?;
            let fresh = names.insert(family.family.as_str());
            rule(fresh, "evidence.families: family", &family.family, "listed once")?;
        }
        self.content_test.map_or(Ok(()), |test| test.validate())?;
        for (axis, stored, earned) in [
            ("evidence.causal", self.causal, self.recompute_causal()),
            ("evidence.content", self.content, self.recompute_content()),
        ] {
            let (stored, must) = (stored.as_str(), earned.as_str());
            rule(stored == must, axis, stored, format_args!("`{must}`, as the numbers beside it say"))?;
        }
        Ok(())
    }
}

impl Cell {
    fn validate(&self) -> Result<()> {
        let holds = self.alpha != 0.0 && self.alpha.abs() <= f64::from(f32::MAX);
        rule(holds, "evidence.cell.alpha", self.alpha, "finite within the range of f32, and not 0")
    }
}

impl Coherence {
    fn validate(&self) -> Result<()> {
        finite("evidence.coherence.unsteered", self.unsteered)?;
        finite("evidence.coherence.steered", self.steered)?;
        let holds = self.margin.is_finite() && self.margin >= 0.0;
        rule(holds, "evidence.coherence.margin", self.margin, "finite and not negative")
    }
}

impl ControlFamily {
    fn validate(&self, effect: f64) -> Result<()> {
        text("evidence.families: family", &self.family)?;
        let at = format_args!("evidence.families `{}`", self.family);
        for control in &self.controls {
            finite(format_args!("{at}: effect of seed {}", control.seed), control.effect)?;
        }
        let mut seeds: Vec<u64> = self.controls.iter().map(|control| control.seed).collect();
        seeds.sort_unstable();
        // One control listed twice would buy a smaller p.
        for pair in seeds.windows(2) {
            rule(pair[0] != pair[1], format_args!("{at}: seed"), pair[0], "listed once")?;
        }
        let earned = self.rank_p_of(effect);
        let holds = (self.rank_p - earned).abs() <= RANK_P_TOLERANCE;
        let must = format_args!("{earned}, as its {} controls say", self.controls.len());
        rule(holds, format_args!("{at}: rank_p"), self.rank_p, must)
    }
}

impl ContentTest {
    fn validate(&self) -> Result<()> {
        finite("evidence.content_test.insecure_drop", self.insecure_drop)?;
        finite("evidence.content_test.secure_drop", self.secure_drop)?;
        let holds = self.p_value > 0.0 && self.p_value <= 1.0;
        rule(holds, "evidence.content_test.p_value", self.p_value, "above 0 and at most 1")?;
        at_least("evidence.content_test.prompts", self.prompts, 1)
    }
}

impl Provenance {
    fn validate(&self) -> Result<()> {
        text("provenance.producer", &self.producer)?;
        hex_digest("provenance.recipe_digest", &self.recipe_digest)?;
        for (i, (name, digest)) in self.datasets.iter().enumerate() {
            text(format_args!("provenance.datasets[{i}] name"), name)?;
            hex_digest(format_args!("provenance.datasets[{i}] digest"), digest)?;
        }
        let share = self.top_dimension_share.unwrap_or(0.0);
        between("provenance.top_dimension_share", share, 0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_specification_keeps_the_rules() {
        let specification = include_str!("FORMAT.md");
        let (_, rest) = specification.split_once("```json\n").expect("an example");
        let (example, _) = rest.split_once("\n```").expect("its end");
        let manifest = Manifest::from_json(&example.into()).unwrap();
        manifest.validate().unwrap();
        // Nothing in the example is ignored, and nothing is missing from it.
        let read: serde_json::Value = serde_json::from_str(example).unwrap();
        assert_eq!(serde_json::to_value(&manifest).unwrap(), read);
    }

    #[test]
    fn a_sentence_names_the_field_the_value_and_the_mend() {
        let (_, rest) = include_str!("FORMAT.md").split_once("```json\n").unwrap();
        let mut manifest = Manifest::from_json(&rest.split_once("\n```").unwrap().0.into()).unwrap();
        manifest.layers[0].calibration.as_mut().unwrap().thresholds[0].rate = 0.001;
        let sentence = manifest.validate().unwrap_err().to_string();
        assert_eq!(
            sentence,
            "inconsistent direction file: layer 12: calibration.thresholds[0].rate is 0.001, it must be at least \
             1 - 0.05^(1 / sequences) = 0.007461; calibrate on more sequences"
        );
    }
}
