use super::{Folder, emaudit, forge, lines, refused, text, utf8};
use emaudit::directions::schema::Evidence;
use serde_json::{Value, json};
use std::path::Path;

fn object(a: &Path, b: &Path, code: i32) -> Value {
    let output = emaudit(&["diff", utf8(a), utf8(b), "--json"]);
    assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
    assert_eq!(emaudit(&["diff", utf8(a), utf8(b)]).status.code(), Some(code));
    lines(&output).remove(0)
}

#[test]
fn a_file_is_the_same_as_itself_and_as_other_bytes_of_the_same_content() {
    let folder = Folder::new();
    let a = folder.sample();
    let found = object(&a, &a, 0);
    assert_eq!((&found["same"], &found["fields"]), (&true.into(), &json!([])));
    assert_eq!(found["layers"][1]["cosine"].as_f64().map(|c| (c * 1e9).round()), Some(1e9));
    // Another writer: other order of keys, other spacing.
    let b = folder.write("b.safetensors", forge::Forge::sound().bytes());
    let found = object(&a, &b, 0);
    assert_ne!(found["digests"][0], found["digests"][1]);
    let page = emaudit(&["diff", utf8(&a), utf8(&b)]);
    let page = text(&page.stdout);
    assert!(
        page.starts_with("same: model, site, vectors, calibration, evidence and provenance;\n"),
        "{page}"
    );
    assert_eq!(found["same_bytes"], false);
    assert_eq!(object(&a, &a, 0)["same_bytes"], true);
    // What this reader does not know it does not compare, and says so.
    let later = folder.write("c.safetensors", forge::Forge::with_manifest(|m| m["later"] = json!(1)).bytes());
    assert_eq!(object(&a, &later, 0)["same_bytes"], false);
    let page = emaudit(&["diff", utf8(&a), utf8(&later)]);
    assert!(text(&page.stdout).contains("the bytes differ in what is not compared"));
}

#[test]
fn turned_directions_show_as_cosines() {
    let folder = Folder::new();
    let a = folder.sample();
    let b = folder.directions("b.safetensors", |_, values| {
        values[0] = [4.0, 0.0, 3.0, 0.0, 0.0];
        values[2] = [-2.0, -4.0, -6.0, -8.0, -10.0];
        values[3] = [3.0, 4.0, 0.0, 0.0, 0.0];
    });
    let found = object(&a, &b, 1);
    assert_eq!((&found["same"], &found["fields"]), (&false.into(), &json!([])));
    let cosine = |i: usize| found["layers"][i]["cosine"].as_f64().unwrap();
    assert!(cosine(0).abs() < 1e-12 && (cosine(1) + 1.0).abs() < 1e-12, "{found}");
    assert_eq!(found["layers"][1]["norms"], json!([55f64.sqrt(), 220f64.sqrt()]));
    assert_eq!(found["layers"][1]["mean_distance"], 5.0);
    let page = emaudit(&["diff", utf8(&a), utf8(&b)]);
    let page = text(&page.stdout);
    assert!(page.contains("      3  -1.000000       7.4162      14.8324         5.0000\n"), "{page}");
}

#[test]
fn identity_evidence_and_calibration_are_compared() {
    let folder = Folder::new();
    let a = folder.sample();
    let b = folder.directions("b.safetensors", |manifest, _| {
        manifest.model.weights_digest = "9".repeat(64);
        manifest.evidence = Evidence::untested();
    });
    let found = object(&a, &b, 1);
    let fields: Vec<&str> =
        found["fields"].as_array().unwrap().iter().map(|c| c["field"].as_str().unwrap()).collect();
    assert!(fields.contains(&"model.weights_digest") && fields.contains(&"evidence.causal"), "{fields:?}");
    let page = emaudit(&["diff", utf8(&a), utf8(&b)]);
    let page = text(&page.stdout);
    assert!(page.contains("  evidence.causal\n    a  specific\n    b  untested\n"), "{page}");
    assert!(page.lines().all(|l| l.chars().count() <= 80), "{page}");

    let forged = forge::Forge::with_manifest(|m| m["layers"][1]["calibration"]["sigma"] = json!(1.5));
    let c = folder.write("c.safetensors", forged.bytes());
    let found = object(&a, &c, 1);
    let change = &found["layers"][1]["calibration"][0];
    assert_eq!(change, &json!({"field": "layer 3.sigma", "a": 0.75, "b": 1.5}));
}

#[test]
fn trouble_is_neither_same_nor_different() {
    let folder = Folder::new();
    let a = folder.sample();
    let missing = folder.path("missing");
    refused(&["diff", utf8(&a), utf8(&missing)], 2, 2, "cannot open");
    let prose = folder.write("prose", "the quick brown fox");
    refused(&["diff", utf8(&prose), utf8(&a)], 2, 3, "not an emaudit direction file");
    assert_eq!(emaudit(&["diff", utf8(&a)]).status.code(), Some(2));
}

#[test]
fn numbers_of_any_size_fit_the_page() {
    let folder = Folder::new();
    let a = folder.directions("a.safetensors", |_, values| values[2] = [3e38; forge::WIDTH]);
    let b = folder.directions("b.safetensors", |_, values| values[3] = [-3e38; forge::WIDTH]);
    let page = emaudit(&["diff", utf8(&a), utf8(&b)]);
    let page = text(&page.stdout);
    assert!(page.contains("  6.708e38       7.4162       6.708e38\n"), "{page}");
    assert!(page.lines().all(|l| l.chars().count() <= 80), "{page}");
}
