//! The scores of llama.cpp beside those of emaudit-train, for the same directions and chat prompts.

use super::ready;
use super::toolchain::run;
use serde::Deserialize;
use std::path::Path;
use std::process::Command;

/// Made of emaudit-train's residual rows by make_golden.py, which computes the scores itself.
const GOLDEN: &str = include_str!("golden.json");

#[derive(Debug, Deserialize)]
struct Golden {
    prompt: String,
    ids: Vec<u32>,
    layers: Vec<Layer>,
}

/// Of the last token: the raw score, and the norm of the residual row.
#[derive(Debug, Deserialize)]
struct Layer {
    layer: u32,
    score: f64,
    norm: f64,
}

/// Largest difference of the scores, in shares of the row's norm: a score is that norm times a cosine, so rounding that is
/// a share of the row moves it by at most this share of the norm.
///
/// With the weights in float32 both engines do the same sums in another order. A row passes some 30 blocks of 7 products with
/// at most 1536 terms; each sum is off by at most `1536 * 2^-24` of its terms' size (9.2e-5), in practice by its root.
/// Taken as random over 210 products, `sqrt(1536 * 210) * 2^-24 = 3.4e-5`.
const EXACT: f64 = 3.4e-5;

/// llama.cpp rounds the activations of a Q4_1 product to blocks of 32 whole numbers up to 127, so by at most half a step of
/// `peak / 127`. The peak of 32 numbers is at most sqrt(32) times their root mean square: a share of `sqrt(32) / 127 /
/// sqrt(12) = 1.3 %` of the block's size at most. The products' results add to the row at random, so the row keeps that share.
const QUANTISED: f64 = 0.013;

/// The score of the last token at each layer.
fn scores(programs: &Path, model: &Path, directions: &Path, golden: &Golden, cache: &str) -> Vec<f64> {
    let ids: Vec<String> = golden.ids.iter().map(u32::to_string).collect();
    let mut command = Command::new(programs.join("scores"));
    let output = run(command.arg(model).arg(directions).args(["--cache", cache, "--ids", &ids.join(" ")]));
    let last = (golden.ids.len() - 1).to_string();
    let of_layer = |layer: &Layer| {
        let start = format!("{} {last} ", layer.layer);
        let line = output.lines().find_map(|line| line.strip_prefix(&start));
        line.unwrap_or_else(|| panic!("no {start:?} in\n{output}")).parse().unwrap()
    };
    golden.layers.iter().map(of_layer).collect()
}

#[test]
fn scores_are_those_of_emaudit_train() {
    let Some((programs, model, directory)) = ready() else { return };
    let directions = directory.path().join("calm.safetensors");
    let whole = directory.path().join("f32.gguf");
    run(Command::new(programs.join("dequantize")).arg(model).arg(&whole));
    let golden: Vec<Golden> = serde_json::from_str(GOLDEN).unwrap();
    assert!(golden.len() >= 8 && golden.iter().all(|g| g.layers.len() == 2 && g.ids.len() > 20));
    for (file, cache, bound) in [(model, "f16", QUANTISED), (&whole, "f32", EXACT)] {
        let mut largest = 0.0f64;
        for golden in &golden {
            let ours = scores(programs, file, &directions, golden, cache);
            for (ours, theirs) in ours.iter().zip(&golden.layers) {
                let apart = (ours - theirs.score).abs() / theirs.norm;
                largest = largest.max(apart);
                let place = format!("{:?}, layer {}, cache {cache}", golden.prompt, theirs.layer);
                assert!(
                    apart <= bound,
                    "{place}: {ours} and {}, apart by {apart:.2e} of the norm",
                    theirs.score
                );
            }
        }
        eprintln!(
            "scores of llama.cpp and emaudit-train, cache {cache}: at most {largest:.2e} of the norm apart"
        );
    }
}
