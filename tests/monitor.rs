//! The monitor: what it says when, and that it fails closed; and that the hot path never allocates.

use emaudit::directions::schema::*;
use emaudit::directions::{Directions, LayerTensors, OpenOptions, to_bytes};
use emaudit::kernel::available;
use emaudit::{
    Drift, Error, Monitor, Operation, Probe, RowStatus, Rows, RowsMut, ScoreUnit, State, Steering,
    SteeringOptions, Verdict,
};
use half::f16;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell as Counter;
use std::sync::Arc;

const WIDTH: usize = 37;
const LAYER: u32 = 2;

fn threshold(statistic: Aggregation, horizon: u32, rate: f64, z: f64) -> Threshold {
    Threshold { statistic, horizon, rate, rate_upper: rate * 0.9, z, sequences: 1000 }
}

/// Thresholds out of order, as a file may hold them.
fn thresholds() -> Vec<Threshold> {
    use Aggregation::{Last, Max, Mean};
    vec![
        threshold(Max, 8, 0.01, 4.0),
        threshold(Mean, 8, 0.01, 1.0),
        threshold(Mean, 2, 0.01, 2.0),
        threshold(Max, 2, 0.01, 3.0),
        threshold(Mean, 4, 0.05, 1.0),
        threshold(Last, 3, 0.01, 2.5),
        threshold(Mean, 4, 0.01, 1.5),
    ]
}

/// Evidence that earns `specific` on the causal axis and, where asked, on the content axis.
fn evidence(content: bool) -> Evidence {
    let controls: Vec<_> = (0..39).map(|seed| ControlEffect { seed, effect: 0.01 }).collect();
    let family =
        |name: &str| ControlFamily { family: name.into(), rank_p: 0.025, controls: controls.clone() };
    let test = ContentTest { insecure_drop: 0.5, secure_drop: 0.1, p_value: 0.001, prompts: 50 };
    let mut evidence = Evidence {
        cell: Some(Cell { layer: LAYER, alpha: 0.5, positions: Positions::All }),
        effect: Some(0.5),
        coherence: Some(Coherence { unsteered: -1.0, steered: -1.0, margin: 0.1 }),
        families: REQUIRED_FAMILIES.map(family).to_vec(),
        content_test: content.then_some(test),
        ..Evidence::untested()
    };
    evidence.causal = evidence.recompute_causal();
    evidence.content = evidence.recompute_content();
    evidence
}

fn directions(evidence: Evidence, verify: bool) -> Arc<Directions> {
    let calibration =
        Calibration { sigma: 0.5, sequences: 1000, quantiles: vec![(0.5, 0.0)], thresholds: thresholds() };
    let manifest = Manifest {
        model: ModelIdentity {
            architecture: "llama".into(),
            hidden_size: WIDTH as u32,
            n_layers: 4,
            vocab_size: 100,
            tokenizer_digest: "ab".repeat(32),
            weights_digest: "cd".repeat(32),
            quantization: "f32".into(),
            name: "a small model".into(),
        },
        site: Site::ResidPost,
        pooling: Pooling::LastPrompt,
        estimator: Estimator::MeanDifference,
        contrast: Contrast::AdapterMinusBase,
        layers: vec![LayerManifest { layer: LAYER, calibration: Some(calibration) }],
        evidence,
        provenance: Provenance {
            producer: "test".into(),
            recipe_digest: "ef".repeat(32),
            datasets: vec![],
            top_dimension_share: None,
        },
    };
    let direction: Vec<f32> = (0..WIDTH).map(|i| (i * 7 % 11) as f32 - 4.0).collect();
    let aligned_mean = vec![0.25; WIDTH];
    let tensors = [LayerTensors { layer: LAYER, direction: &direction, aligned_mean: &aligned_mean }];
    let bytes = to_bytes(&manifest, &tensors).unwrap();
    Arc::new(Directions::from_bytes(&bytes, &OpenOptions { verify, ..OpenOptions::default() }).unwrap())
}

fn probe() -> Probe {
    Probe::new(directions(evidence(true), true), LAYER).unwrap()
}

fn monitor(aggregation: Aggregation) -> Monitor {
    Monitor::new(&probe(), aggregation, 0.01).unwrap()
}

/// State, score and horizon after each of the tokens.
fn states(monitor: &mut Monitor, scores: &[f32]) -> Vec<(State, f32, u32)> {
    let after = |z: &f32| {
        monitor.push(*z);
        let verdict = monitor.verdict();
        (verdict.state, verdict.score, verdict.horizon)
    };
    scores.iter().map(after).collect()
}

#[test]
fn the_zero_value_is_invalid() {
    let zero = Verdict::default();
    assert_eq!(
        (zero.state, State::Invalid as u32, zero.misalignment, zero.tokens),
        (State::Invalid, 0, 0, 0)
    );
    // SAFETY: all fields are numbers or an enum whose zero is `Invalid`.
    assert_eq!(unsafe { std::mem::zeroed::<Verdict>() }, zero);
}

#[test]
fn no_token_is_invalid_never_clean() {
    let verdict = monitor(Aggregation::Mean).verdict();
    assert_eq!((verdict.state, verdict.tokens), (State::Invalid, 0));
    assert!(verdict.score.is_nan());
}

#[test]
fn the_mean_is_frozen_at_each_horizon() {
    use State::{Clean, Flagged, Pending};
    let mut monitor = monitor(Aggregation::Mean);
    let seen = states(&mut monitor, &[1.0, 4.0, 100.0, -101.0, 7.0, 7.0, 7.0, -33.0, 1e9]);
    let expected = [
        (Pending, 1.0, 2),
        (Flagged, 2.5, 2),
        (Flagged, 2.5, 2),
        (Clean, 1.0, 4),
        (Clean, 1.0, 4),
        (Clean, 1.0, 4),
        (Clean, 1.0, 4),
        (Clean, -1.0, 8),
        (Clean, -1.0, 8),
    ];
    assert_eq!(seen, expected);
    assert_eq!(monitor.verdict().tokens, 9);
}

#[test]
fn the_largest_score_counts_up_to_the_horizon_and_no_further() {
    use State::{Clean, Flagged, Pending};
    let seen = states(&mut monitor(Aggregation::Max), &[-5.0, -3.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 99.0]);
    let expected = [
        (Pending, -5.0, 2),
        (Clean, -3.0, 2),
        (Clean, -3.0, 2),
        (Clean, -3.0, 2),
        (Clean, -3.0, 2),
        (Clean, -3.0, 2),
        (Clean, -3.0, 2),
        (Flagged, 9.0, 8),
        (Flagged, 9.0, 8),
    ];
    assert_eq!(seen, expected);
}

#[test]
fn the_last_score_is_the_one_at_the_horizon() {
    use State::{Flagged, Pending};
    let seen = states(&mut monitor(Aggregation::Last), &[9.0, 8.0, 2.6, -7.0]);
    assert_eq!(seen, [(Pending, 9.0, 3), (Pending, 8.0, 3), (Flagged, 2.6, 3), (Flagged, 2.6, 3)]);
}

#[test]
fn a_score_at_the_threshold_is_not_above_it() {
    let mut monitor = monitor(Aggregation::Max);
    monitor.push_scores(&[3.0, 3.0]);
    assert_eq!(monitor.verdict().state, State::Clean);
}

#[test]
fn a_nonfinite_score_is_invalid_for_good_until_reset() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in 0..12 {
            let mut monitor = monitor(Aggregation::Mean);
            let mut scores = [0.0; 12];
            scores[at] = bad;
            let seen = states(&mut monitor, &scores);
            assert!(seen[at..].iter().all(|s| s.0 == State::Invalid && s.1.is_nan()));
            assert!(seen[..at].iter().all(|s| s.0 != State::Invalid));
            monitor.reset();
            assert_eq!(monitor.verdict().tokens, 0);
            assert_eq!(states(&mut monitor, &[5.0, 5.0])[1], (State::Flagged, 5.0, 2));
        }
    }
}

#[test]
fn a_reset_monitor_equals_a_new_one() {
    let (mut used, mut fresh) = (monitor(Aggregation::Max), monitor(Aggregation::Max));
    used.push_scores(&[50.0; 20]);
    used.reset();
    assert_eq!(states(&mut used, &[-9.0, -8.0, -7.0]), states(&mut fresh, &[-9.0, -8.0, -7.0]));
}

#[test]
fn a_verdict_names_what_it_rests_on() {
    for (content, verify) in [(true, true), (false, true), (true, false)] {
        let directions = directions(evidence(content), verify);
        let probe = Probe::new(directions.clone(), LAYER).unwrap();
        let mut monitor = Monitor::new(&probe, Aggregation::Mean, 0.01).unwrap();
        monitor.push_scores(&[9.0, 9.0]);
        let verdict = monitor.verdict();
        let expected = Verdict {
            state: State::Flagged,
            misalignment: content.into(),
            score: 9.0,
            threshold: 2.0,
            rate: 0.01,
            rate_upper: 0.01 * 0.9,
            tokens: 2,
            horizon: 2,
            layer: LAYER,
            kernel: probe.kernel() as u32,
            verified: verify.into(),
            aggregation: Aggregation::Mean as u32,
            digest: directions.digest(),
        };
        assert_eq!(verdict, expected);
        assert_eq!(verdict.digest == [0; 32], !verify);
        monitor.reset();
        monitor.push_scores(&[0.0, 0.0]);
        assert_eq!((monitor.verdict().state, monitor.verdict().misalignment), (State::Clean, 0));
    }
}

#[test]
fn a_rate_the_file_lacks_is_refused_with_those_it_has() {
    for rate in [0.001, 0.02, 0.0, f64::NAN] {
        let error = Monitor::new(&probe(), Aggregation::Mean, rate).unwrap_err();
        assert!(matches!(error, Error::RateUnsupported { .. }));
        assert!(error.to_string().contains("[0.01, 0.05]"), "{error}");
    }
    assert!(Monitor::new(&probe(), Aggregation::Max, 0.05).is_err(), "a rate of another statistic");
    let standalone = Probe::from_vectors(&[1.0], &[0.0], 1.0, None).unwrap();
    let error = Monitor::new(&standalone, Aggregation::Mean, 0.01).unwrap_err();
    assert!(error.to_string().contains("no calibrated direction file"), "{error}");
}

#[test]
fn a_probe_of_a_file_scores_with_its_vectors_and_sigma() {
    let directions = directions(evidence(true), true);
    let layer = directions.layer(LAYER).unwrap();
    let row: Vec<f32> = (0..WIDTH).map(|i| i as f32 / 8.0).collect();
    let rows = Rows::new(&row, 1, WIDTH, WIDTH).unwrap();
    for kind in available() {
        let from_file = Probe::with_kernel(directions.clone(), LAYER, *kind).unwrap();
        let standalone = Probe::from_vectors(
            &layer.direction,
            &layer.aligned_mean,
            layer.calibration.unwrap().sigma,
            Some(*kind),
        )
        .unwrap();
        let score = |probe: &Probe| {
            let mut score = [0.0];
            probe.score(&rows, ScoreUnit::AlignedSd, &mut score, None).unwrap();
            score[0].to_bits()
        };
        assert_eq!(score(&from_file), score(&standalone));
        assert_eq!((from_file.layer(), from_file.kernel(), from_file.width()), (Some(LAYER), *kind, WIDTH));
        assert!(standalone.layer().is_none() && standalone.directions().is_none());
    }
    assert!(matches!(Probe::new(directions, LAYER + 1), Err(Error::LayerNotFound { .. })));
}

#[test]
fn steering_asks_for_causal_evidence_or_the_flag() {
    let operation = Operation::Subtract { alpha: 1.0 };
    assert!(Steering::new(&probe(), SteeringOptions::new(operation)).is_ok());
    let mut weak = evidence(true);
    weak.effect = Some(0.0);
    weak.families.iter_mut().for_each(|f| f.rank_p = 1.0);
    weak.causal = Specificity::Nonspecific;
    for (evidence, word) in [(weak, "nonspecific"), (Evidence::untested(), "untested")] {
        let probe = Probe::new(directions(evidence, true), LAYER).unwrap();
        let error = Steering::new(&probe, SteeringOptions::new(operation)).unwrap_err();
        assert!(matches!(&error, Error::NotSpecific { status } if status == word), "{error}");
        let allowed = SteeringOptions { allow_nonspecific: true, ..SteeringOptions::new(operation) };
        assert!(Steering::new(&probe, allowed).is_ok());
    }
}

/// Counts what the current thread allocates; other tests run beside this one.
struct Counting;

thread_local! {
    static ALLOCATIONS: Counter<usize> = const { Counter::new(0) };
}

fn count() {
    // A thread that is going away has nothing left to count.
    let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
}

// SAFETY: every call is passed on to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

#[test]
fn scoring_steering_and_monitoring_never_allocate() {
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![1u8]))), 1, "the counter counts");
    const ROWS: usize = 6;
    for kind in available() {
        let probe = Probe::with_kernel(directions(evidence(true), true), LAYER, *kind).unwrap();
        let all = |operation| SteeringOptions {
            gate: Some(-1e6),
            dose_limit: Some(0.1),
            ..SteeringOptions::new(operation)
        };
        let operations = [
            Operation::Subtract { alpha: 1.0 },
            Operation::ProjectOut { alpha: 1.0 },
            Operation::Clamp { ceiling: 0.0 },
        ];
        let steerings = operations.map(|operation| Steering::new(&probe, all(operation)).unwrap());
        let mut monitor = Monitor::new(&probe, Aggregation::Max, 0.01).unwrap();
        // Two windows fill up on the way.
        let mut drift = Drift::new(&probe, 8, 0.05).unwrap();
        monitor.watch(&drift).unwrap();
        let mut narrow: Vec<f16> = (0..ROWS * WIDTH).map(|i| f16::from_f32((i % 19) as f32 - 7.0)).collect();
        // One row takes the error path, one the second look at its norm, one the look at the range of f16.
        narrow[3] = f16::NAN;
        narrow[2 * WIDTH..3 * WIDTH].fill(f16::ZERO);
        narrow[4 * WIDTH] = f16::MAX;
        let (mut scores, mut status) = ([0.0; ROWS], [RowStatus::Ok; ROWS]);
        let used = allocations(|| {
            let mut rows = RowsMut::new(&mut narrow, ROWS, WIDTH, WIDTH).unwrap();
            let unit = ScoreUnit::AlignedSd;
            for steering in &steerings {
                let result = probe.score(&rows.as_rows(), unit, &mut scores, Some(&mut status));
                assert!(matches!(result, Err(Error::NonFinite { rows: 1 })));
                let result = steering.score_and_apply(
                    &mut rows,
                    unit,
                    &mut scores,
                    Some(&[0.5; ROWS]),
                    Some(&mut status),
                );
                assert!(matches!(result, Err(Error::NonFinite { .. })));
                let rows = rows.as_rows();
                std::hint::black_box(steering.check_landed(&rows, &rows, None, Some(&mut scores)).is_ok());
                monitor.push_scores(&scores);
                drift.push_scores(&[0.5; ROWS]);
                std::hint::black_box(drift.report());
                std::hint::black_box(monitor.verdict());
            }
        });
        assert_eq!(used, 0, "{kind}");
    }
}
