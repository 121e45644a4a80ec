//! Sound files of many kinds: widths, layers, sites, calibrations, evidence, and other writers' habits.

use super::attacks::forge::{self, Forge, quoted};
use super::random::Random;
use emaudit::directions::schema::*;
use emaudit::directions::{LayerTensors, to_bytes};
use serde_json::json;

/// Named files, each sound.
pub fn all() -> Vec<(String, Vec<u8>)> {
    let mut files = written();
    files.extend(forged());
    files
}

/// By the library's writer.
fn written() -> Vec<(String, Vec<u8>)> {
    let mut random = Random(11);
    let mut files = Vec::new();
    for (width, layers) in [
        (1, vec![0]),
        (2, vec![1, 4]),
        (3, vec![0, 1, 2]),
        (17, vec![3]),
        (67, vec![1, 3]),
        (576, vec![29]),
        (1537, vec![0, 14]),
    ] {
        for evidence in evidences(*layers.last().expect("a layer")) {
            let name = format!(
                "width {width}, layers {layers:?}, causal {:?}, content {:?}",
                evidence.causal, evidence.content
            );
            files.push((name, file(&mut random, width, &layers, evidence, Site::ResidPost)));
        }
    }
    let untested = Evidence::untested();
    files.push(("the final norm".into(), file(&mut random, 5, &[29], untested, Site::FinalNorm)));
    files
}

fn file(random: &mut Random, width: usize, layers: &[u32], evidence: Evidence, site: Site) -> Vec<u8> {
    let mut manifest = forge::typed_manifest();
    manifest.model.hidden_size = width as u32;
    manifest.model.n_layers = 30;
    manifest.site = site;
    manifest.evidence = evidence;
    manifest.layers = layers
        .iter()
        .map(|layer| LayerManifest { layer: *layer, calibration: calibration(random) })
        .collect();
    let scale = [1e-3, 1.0, 1e3][random.below(3)];
    let mut values = |scale: f32| -> Vec<f32> { (0..width).map(|_| random.signed() * scale).collect() };
    let tensors: Vec<(Vec<f32>, Vec<f32>)> = layers.iter().map(|_| (values(scale), values(10.0))).collect();
    let tensors: Vec<LayerTensors<'_>> = layers
        .iter()
        .zip(&tensors)
        .map(|(layer, (direction, aligned_mean))| LayerTensors { layer: *layer, direction, aligned_mean })
        .collect();
    to_bytes(&manifest, &tensors).expect("a sound file")
}

/// Thresholds for all statistics at several horizons and rates, or none; now and then no calibration at all.
fn calibration(random: &mut Random) -> Option<Calibration> {
    let mut thresholds = Vec::new();
    let statistics = [Aggregation::Mean, Aggregation::Max, Aggregation::Last];
    for statistic in statistics.into_iter().take(random.below(4)) {
        for horizon in [7, 1, 3] {
            for rate in [0.05, 0.01] {
                // An f32, so that a score can equal it.
                let z = f64::from(random.signed() * 0.5 + if rate < 0.02 { 2.0 } else { 1.0 });
                let (rate_upper, sequences) = (rate * 2.0, 500);
                thresholds.push(Threshold { statistic, horizon, rate, rate_upper, z, sequences });
            }
        }
    }
    let quantiles = [(0.05, -1.6), (0.5, 0.1), (0.9, 0.1)].into_iter().take(random.below(4)).collect();
    let sigma = f64::from(random.signed().abs() + 0.01) * [1e-3, 1.0, 1e3][random.below(3)];
    (random.below(6) > 0).then_some(Calibration { sigma, sequences: 500, quantiles, thresholds })
}

/// Untested, nonspecific and specific on both axes.
fn evidences(layer: u32) -> Vec<Evidence> {
    let evidence = |causal: Specificity, content: Specificity| {
        let effect = if causal == Specificity::Specific { 1.0 } else { 0.25 };
        let family = |name: &&str| {
            let controls = (0..40).map(|seed| ControlEffect { seed: u64::MAX - seed, effect: 0.5 }).collect();
            let mut family = ControlFamily { family: name.to_string(), rank_p: 0.0, controls };
            family.rank_p = family.rank_p_of(effect);
            family
        };
        let p_value = if content == Specificity::Specific { 0.001 } else { 0.5 };
        Evidence {
            causal,
            content,
            cell: Some(Cell { layer, alpha: -2.0, positions: Positions::FinalPrefill }),
            effect: Some(effect),
            coherence: Some(Coherence { unsteered: -1.0, steered: -1.2, margin: 0.25 }),
            families: REQUIRED_FAMILIES.iter().map(family).collect(),
            content_test: Some(ContentTest { insecure_drop: 1.0, secure_drop: 0.1, p_value, prompts: 40 }),
        }
    };
    use Specificity::{Nonspecific, Specific};
    vec![
        Evidence::untested(),
        evidence(Specific, Specific),
        evidence(Nonspecific, Specific),
        evidence(Specific, Nonspecific),
    ]
}

/// By other writers: every freedom that the format leaves.
fn forged() -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut add = |name: &str, forge: Forge| files.push((format!("forged: {name}"), forge.bytes()));
    add("plain", Forge::sound());
    let mut reversed = Forge::with_manifest(|m| m["later"] = json!({"n": [1, {"m": null}]}));
    reversed.metadata.push(("somebody.else".into(), quoted("said \" this")));
    reversed.set_metadata("emaudit.requires", "\" ,, \"");
    reversed.metadata.reverse();
    reversed.tensors.reverse();
    add("reversed, with unknown keys", reversed);
    let text = |name: &str, manifest: String, add: &mut dyn FnMut(&str, Forge)| {
        let mut forge = Forge::sound();
        forge.set_metadata("emaudit.manifest", &quoted(&manifest));
        add(name, forge);
    };
    let plain = forge::manifest().to_string();
    let deep = format!("{{\"a\":{}1{},", "[".repeat(99), "]".repeat(99));
    text("a hundred levels", plain.replacen('{', &deep, 1), &mut add);
    text("white space and padding", plain.replace(':', "\t:\r\n ").replace(',', " ,") + "   ", &mut add);
    text("whole numbers", plain.replace("\"sigma\":0.75", "\"sigma\":1").replace("-1.6", "-2e0"), &mut add);
    let escapes = "\"\\u0061 \\ud83d\\ude00 \\u00e9\\/\\\"\\\\ \u{1f600}\u{3000}.\"";
    text("escapes", plain.replace("\"a model of four blocks\"", escapes), &mut add);
    text("nothing optional", minimal().to_string(), &mut add);
    let edges = plain.replace("\"vocab_size\":100", "\"vocab_size\":4294967295");
    let edges = edges.replace("\"rate\":0.01,", "\"rate\":0.007461354628799563,");
    text(
        "numbers at the edge of their ranges",
        edges.replace("\"seed\":38", "\"seed\":18446744073709551615"),
        &mut add,
    );
    text("nulls", plain.replace("\"top_dimension_share\":0.25", "\"top_dimension_share\":null"), &mut add);
    files
}

/// A small file with that name for its model, sound or not.
pub fn named(name: &str) -> Vec<u8> {
    let mut manifest = minimal();
    manifest["model"]["name"] = name.into();
    let mut forge = Forge::sound();
    forge.set_metadata("emaudit.manifest", &quoted(&manifest.to_string()));
    forge.bytes()
}

/// The sample with all that may be absent left out.
fn minimal() -> serde_json::Value {
    let mut manifest = forge::manifest();
    manifest["evidence"] = json!({"causal": "untested", "content": "untested", "families": []});
    manifest["provenance"] = json!({"producer": "x", "recipe_digest": "0".repeat(64), "datasets": []});
    for layer in manifest["layers"].as_array_mut().expect("layers") {
        layer["calibration"]["quantiles"] = json!([]);
        layer["calibration"]["thresholds"] = json!([]);
    }
    manifest
}
