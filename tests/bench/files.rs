//! Opening a direction file, and its digest.

use crate::measure::{Report, pair};
use crate::peers::Crypto;
use crate::values;
use emaudit::directions::schema::*;
use emaudit::directions::{Directions, LayerTensors, Mode, OpenOptions, write};
use std::hint::black_box;

const LAYERS: u32 = 30;

pub fn run(report: &Report) {
    let crypto = Crypto::load();
    if crypto.is_none() {
        report.note("no libcrypto.so.3 on this machine: the lines against OpenSSL's SHA-256 are missing");
    }
    for width in [576, 4096] {
        open(report, width, crypto.as_ref());
    }
}

/// A file of 30 layers, opened in all ways. Peers: the plain reading of its bytes, and OpenSSL's SHA-256 of them.
fn open(report: &Report, width: usize, crypto: Option<&Crypto>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("bench.safetensors");
    let tensors: Vec<Vec<f32>> = (0..2 * u64::from(LAYERS)).map(|seed| values(width, seed)).collect();
    let layer = |l: u32| {
        let at = 2 * l as usize;
        LayerTensors { layer: l, direction: &tensors[at], aligned_mean: &tensors[at + 1] }
    };
    let layers: Vec<_> = (0..LAYERS).map(layer).collect();
    write(&path, &manifest(width as u32), &layers).expect("a sound file");

    let open = |mode, verify| {
        let options = OpenOptions { mode, verify, ..OpenOptions::default() };
        black_box(Directions::open(black_box(&path), &options).expect("it opens"));
    };
    let read = || drop(black_box(std::fs::read(black_box(&path)).expect("readable")));
    for (name, mode, verify) in [
        ("file_mapped", Mode::Mapped, false),
        ("file_copied", Mode::Copied, false),
        ("file_mapped_verified", Mode::Mapped, true),
    ] {
        if report.wants(name) {
            report.line(name, width, "f32", "fs::read", pair(1, || open(mode, verify), read));
        }
    }
    let Some(crypto) = crypto.filter(|_| report.wants("file_digest")) else { return };
    // Opening by expected digest is one SHA-256 of the file and the opening, which is small beside it.
    let bytes = std::fs::read(&path).expect("readable");
    let expected_digest = Some(crypto.sha256(&bytes));
    let options =
        OpenOptions { mode: Mode::Mapped, verify: false, expected_digest, ..OpenOptions::default() };
    let ours = || drop(black_box(Directions::open(black_box(&path), &options).expect("it opens")));
    let peer = || {
        black_box(crypto.sha256(black_box(&bytes)));
    };
    report.line("file_digest", width, "u8", "OpenSSL SHA256", pair(1, ours, peer));
}

/// As much as training writes for a small model: nine quantiles and twelve thresholds a layer, four families of 39
/// controls, every measured number with all its digits.
fn manifest(width: u32) -> Manifest {
    let mut state = 1u64;
    let mut measured = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut layers = Vec::new();
    for layer in 0..LAYERS {
        let quantiles = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99];
        let quantiles =
            quantiles.into_iter().enumerate().map(|(i, p)| (p, i as f64 - 4.0 + measured())).collect();
        let mut thresholds = Vec::new();
        for horizon in [1, 16] {
            for (rate, z) in [(0.05, 2.0), (0.01, 3.0)] {
                for statistic in [Aggregation::Mean, Aggregation::Max, Aggregation::Last] {
                    let (rate_upper, z) = (rate * (0.91 + 0.08 * measured()), z + measured());
                    thresholds.push(Threshold { statistic, horizon, rate, rate_upper, z, sequences: 330 });
                }
            }
        }
        let sigma = 0.1 + measured();
        let calibration = Calibration { sigma, sequences: 330, quantiles, thresholds };
        layers.push(LayerManifest { layer, calibration: Some(calibration) });
    }
    Manifest {
        model: ModelIdentity {
            architecture: "llama".into(),
            hidden_size: width,
            n_layers: LAYERS,
            vocab_size: 1000,
            tokenizer_digest: "1".repeat(64),
            weights_digest: "2".repeat(64),
            quantization: "f32".into(),
            name: "a model of the benchmark".into(),
        },
        site: Site::ResidPost,
        pooling: Pooling::LastPrompt,
        estimator: Estimator::MeanDifference,
        contrast: Contrast::AdapterMinusBase,
        layers,
        evidence: evidence(measured),
        provenance: Provenance {
            producer: "benchmark".into(),
            recipe_digest: "3".repeat(64),
            datasets: vec![("prompts".into(), "4".repeat(64))],
            top_dimension_share: None,
        },
    }
}

/// A full battery of controls, none as effective as the direction.
fn evidence(mut measured: impl FnMut() -> f64) -> Evidence {
    let mut families = Vec::new();
    for family in REQUIRED_FAMILIES {
        let control = |seed| ControlEffect { seed: 4976846244582794414 + seed, effect: measured() / 10.0 };
        let controls = (0..MIN_CONTROLS as u64).map(control).collect();
        families.push(ControlFamily { family: family.into(), rank_p: 0.025, controls });
    }
    Evidence {
        causal: Specificity::Specific,
        content: Specificity::Untested,
        cell: Some(Cell { layer: LAYERS - 1, alpha: 1.0, positions: Positions::FinalPrefill }),
        effect: Some(0.1 + measured()),
        coherence: Some(Coherence { unsteered: -2.25, steered: -2.5, margin: 0.5 }),
        families,
        content_test: None,
    }
}
