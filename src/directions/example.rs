// A block that makes small directions (width 3, layer 1, file order of the values) for the examples in the docs,
// which include it; no module of the library.
{
    use emaudit::directions::{Directions, LayerTensors, OpenOptions, schema::*, to_bytes};
    let threshold = |horizon, z| Threshold {
        statistic: Aggregation::Mean,
        horizon,
        rate: 0.01,
        rate_upper: 0.0075,
        z,
        sequences: 400,
    };
    let calibration = Calibration {
        sigma: 0.5,
        sequences: 400,
        quantiles: vec![(0.05, -1.6), (0.5, 0.0), (0.95, 1.6)],
        thresholds: vec![threshold(2, 3.0), threshold(4, 2.0)],
    };
    let manifest = Manifest {
        model: ModelIdentity {
            architecture: "llama".into(),
            hidden_size: 3,
            n_layers: 4,
            vocab_size: 1000,
            tokenizer_digest: "1".repeat(64),
            weights_digest: "2".repeat(64),
            quantization: "f32".into(),
            name: "an example".into(),
        },
        site: Site::ResidPost,
        pooling: Pooling::LastPrompt,
        estimator: Estimator::MeanDifference,
        contrast: Contrast::AdapterMinusBase,
        layers: vec![LayerManifest { layer: 1, calibration: Some(calibration) }],
        evidence: Evidence::untested(),
        provenance: Provenance {
            producer: "the documentation".into(),
            recipe_digest: "3".repeat(64),
            datasets: vec![("prompts".into(), "4".repeat(64))],
            top_dimension_share: None,
        },
    };
    let layer = LayerTensors { layer: 1, direction: &[0.0, 3.0, 4.0], aligned_mean: &[1.0, 1.0, 1.0] };
    let bytes = to_bytes(&manifest, &[layer]).expect("a valid example");
    Directions::from_bytes(&bytes, &OpenOptions::default()).expect("what the writer gives opens")
}
