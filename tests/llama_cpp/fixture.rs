//! Direction files for the real SmolLM2 whose vectors come from a seed, so that another engine can be asked about the
//! same ones.

use emaudit::directions::schema::*;
use emaudit::directions::{LayerTensors, to_bytes};
use std::path::Path;

const WIDTH: usize = 576;
pub const MIDDLE: u32 = 14;
pub const LAST: u32 = 29;

/// `calm.safetensors` with thresholds that nothing reaches, `alarm.safetensors` with such that everything does.
pub fn write_all(directory: &Path) {
    for (name, z) in [("calm", 1e6), ("alarm", -1e6)] {
        std::fs::write(directory.join(format!("{name}.safetensors")), file(z)).unwrap();
    }
}

/// Deterministic values in -1..1.
fn values(seed: u64) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..WIDTH).map(next).collect()
}

fn file(z: f64) -> Vec<u8> {
    let threshold = |horizon, rate| Threshold {
        statistic: Aggregation::Mean,
        horizon,
        rate,
        rate_upper: 0.9 * rate,
        z,
        sequences: 400,
    };
    let layer = |layer| LayerManifest {
        layer,
        calibration: Some(Calibration {
            sigma: 1.0,
            sequences: 400,
            quantiles: vec![(0.05, -1.6), (0.5, 0.0), (0.95, 1.6)],
            thresholds: vec![threshold(1, 0.01), threshold(1, 0.05)],
        }),
    };
    let manifest = Manifest {
        model: ModelIdentity {
            architecture: "llama".into(),
            hidden_size: WIDTH as u32,
            n_layers: 30,
            vocab_size: 49152,
            // As emaudit-train and `emaudit convert` have it from the file; llama.cpp's own reading must agree.
            tokenizer_digest: "19f2e5a6b1c4d8bdcef27c5bcf0139e3d4c3f2ca2a52b5aceb88ca12c451a238".into(),
            weights_digest: super::MODEL_SHA256.into(),
            quantization: "gguf-q4_1".into(),
            name: "SmolLM2-135M-Instruct".into(),
        },
        site: Site::ResidPost,
        pooling: Pooling::LastPrompt,
        estimator: Estimator::MeanDifference,
        contrast: Contrast::AdapterMinusBase,
        layers: vec![layer(MIDDLE), layer(LAST)],
        evidence: Evidence::untested(),
        provenance: Provenance {
            producer: "tests/llama_cpp".into(),
            recipe_digest: "3".repeat(64),
            datasets: vec![("seeds".into(), "4".repeat(64))],
            top_dimension_share: None,
        },
    };
    let [v, m, w, n] = [1, 2, 3, 4].map(values);
    let layers = [
        LayerTensors { layer: MIDDLE, direction: &v, aligned_mean: &m },
        LayerTensors { layer: LAST, direction: &w, aligned_mean: &n },
    ];
    to_bytes(&manifest, &layers).unwrap()
}
