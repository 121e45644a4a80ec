//! The direction files the programs open, good and bad. Numbers are shared with tests/c/check.h.

use emaudit::directions::schema::*;
use emaudit::directions::{LayerTensors, to_bytes};
use std::path::Path;

pub const WIDTH: usize = 67;
pub const LAYER: u32 = 3;
const OTHER_LAYER: u32 = 1;
const SEQUENCES: u32 = 400;

/// Writes every fixture into `directory`.
pub fn write_all(directory: &Path) {
    let good = file(Evidence::untested());
    let write = |name: &str, bytes: &[u8]| std::fs::write(directory.join(name), bytes).unwrap();
    write("good.safetensors", &good);
    write("signed.safetensors", &good);
    let [key, stranger] = [(); 2].map(|()| minisign::KeyPair::generate_unencrypted_keypair().unwrap());
    let signature = minisign::sign(Some(&key.pk), &key.sk, &good[..], Some("version 7"), None).unwrap();
    write("signed.safetensors.minisig", signature.into_string().as_bytes());
    write("key.pub", key.pk.to_box().unwrap().to_string().as_bytes());
    write("stranger.pub", stranger.pk.to_base64().as_bytes());
    write("specific.safetensors", &file(specific()));
    write("replacement.safetensors", &file_of(manifest(Evidence::untested()), 11));
    let mut uncalibrated = manifest(Evidence::untested());
    uncalibrated.layers.iter_mut().for_each(|layer| layer.calibration = None);
    write("uncalibrated.safetensors", &file_of(uncalibrated, 1));
    let mut narrow = manifest(Evidence::untested());
    narrow.model.hidden_size -= 1;
    write("narrow.safetensors", &file_of(narrow, 1));
    write("truncated.safetensors", &good[..good.len() - 7]);
    let mut flipped = good;
    let place = flipped.len() - 4; // the low byte of the last value
    flipped[place] ^= 1;
    write("flipped.safetensors", &flipped);
    write("text.safetensors", b"This is a note, and not a direction file at all.\n");
    write("empty.safetensors", b"");
}

/// Deterministic values in -1..1.
pub fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

/// A direction file with two layers.
pub fn file(evidence: Evidence) -> Vec<u8> {
    file_of(manifest(evidence), 1)
}

/// Other vectors for another `seed`.
fn file_of(manifest: Manifest, seed: u64) -> Vec<u8> {
    let width = manifest.model.hidden_size as usize;
    let [v1, m1, v3, m3] = [0, 1, 2, 3].map(|n| values(width, seed + n));
    let layers = [
        LayerTensors { layer: OTHER_LAYER, direction: &v1, aligned_mean: &m1 },
        LayerTensors { layer: LAYER, direction: &v3, aligned_mean: &m3 },
    ];
    to_bytes(&manifest, &layers).unwrap()
}

fn manifest(evidence: Evidence) -> Manifest {
    Manifest {
        model: ModelIdentity {
            architecture: "llama".into(),
            hidden_size: WIDTH as u32,
            n_layers: 6,
            vocab_size: 1000,
            tokenizer_digest: "1".repeat(64),
            weights_digest: "2".repeat(64),
            quantization: "f32".into(),
            name: "a model of the tests".into(),
        },
        site: Site::ResidPost,
        pooling: Pooling::LastPrompt,
        estimator: Estimator::MeanDifference,
        contrast: Contrast::AdapterMinusBase,
        layers: vec![layer(OTHER_LAYER, 0.5), layer(LAYER, 0.25)],
        evidence,
        provenance: Provenance {
            producer: "tests/c_abi".into(),
            recipe_digest: "3".repeat(64),
            datasets: vec![("prompts".into(), "4".repeat(64))],
            top_dimension_share: Some(0.1),
        },
    }
}

fn layer(layer: u32, sigma: f64) -> LayerManifest {
    let threshold = |horizon, rate, z| Threshold {
        statistic: Aggregation::Mean,
        horizon,
        rate,
        rate_upper: 0.9 * rate,
        z,
        sequences: SEQUENCES,
    };
    let calibration = Calibration {
        sigma,
        sequences: SEQUENCES,
        quantiles: vec![(0.05, -1.6), (0.5, 0.0), (0.95, 1.6)],
        thresholds: vec![threshold(1, 0.01, 3.0), threshold(4, 0.01, 2.0), threshold(4, 0.05, 1.5)],
    };
    LayerManifest { layer, calibration: Some(calibration) }
}

/// Evidence whose numbers earn `specific` on both axes.
pub fn specific() -> Evidence {
    let family = |name: &&str| {
        let controls = (0..MIN_CONTROLS as u64).map(|seed| ControlEffect { seed, effect: 0.0 }).collect();
        let mut family = ControlFamily { family: (*name).into(), rank_p: 0.0, controls };
        family.rank_p = family.rank_p_of(1.0);
        family
    };
    Evidence {
        causal: Specificity::Specific,
        content: Specificity::Specific,
        cell: Some(Cell { layer: LAYER, alpha: 1.0, positions: Positions::All }),
        effect: Some(1.0),
        coherence: Some(Coherence { unsteered: -1.0, steered: -1.0, margin: 0.1 }),
        families: REQUIRED_FAMILIES.iter().map(family).collect(),
        content_test: Some(ContentTest { insecure_drop: 1.0, secure_drop: 0.1, p_value: 0.001, prompts: 40 }),
    }
}
