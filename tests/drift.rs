//! Drift: the stated false-alarm rate holds whatever the distribution, real changes are seen, and a monitor that watches
//! says STALE.

#[path = "c_abi/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use emaudit::controls::SplitMix64;
use emaudit::directions::schema::{Aggregation, Calibration};
use emaudit::directions::{Directions, LayerTensors, OpenOptions, to_bytes};
use emaudit::{Drift, DriftState, Error, Monitor, Probe, State};
use std::sync::Arc;

const RATE: f64 = 0.01;
const PROBABILITIES: [f64; 9] = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99];

fn uniform(generator: &mut SplitMix64) -> f64 {
    (generator.next_u64() as f64 + 0.5) / 2f64.powi(64)
}

fn normal(generator: &mut SplitMix64) -> f64 {
    let (radius, angle) = (uniform(generator), uniform(generator));
    (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
}

fn draw(count: usize, mut one: impl FnMut() -> f64) -> Vec<f32> {
    (0..count).map(|_| one() as f32).collect()
}

/// Interpolated as numpy and the trainer do.
fn quantile(sorted: &[f32], p: f64) -> f64 {
    let place = p * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    f64::from(below) + (f64::from(above) - f64::from(below)) * place.fract()
}

/// A probe whose file was calibrated on these scores.
fn probe(mut scores: Vec<f32>, probabilities: &[f64]) -> Probe {
    let whole = Directions::from_bytes(&fixture::file(fixture::specific()), &OpenOptions::default()).unwrap();
    scores.sort_by(f32::total_cmp);
    let mut manifest = whole.manifest().clone();
    for entry in &mut manifest.layers {
        entry.calibration = Some(Calibration {
            sequences: scores.len() as u32,
            quantiles: probabilities.iter().map(|p| (*p, quantile(&scores, *p))).collect(),
            ..entry.calibration.clone().unwrap()
        });
    }
    let layers: Vec<_> = whole.layers().map(|layer| (layer, whole.layer(layer).unwrap())).collect();
    let tensors: Vec<_> = layers
        .iter()
        .map(|(layer, of)| LayerTensors {
            layer: *layer,
            direction: &of.direction,
            aligned_mean: &of.aligned_mean,
        })
        .collect();
    let bytes = to_bytes(&manifest, &tensors).unwrap();
    let directions = Arc::new(Directions::from_bytes(&bytes, &OpenOptions::default()).unwrap());
    Probe::new(directions, fixture::LAYER).unwrap()
}

fn calibrated() -> Probe {
    let mut generator = SplitMix64::new(1);
    probe(draw(400, || normal(&mut generator)), &PROBABILITIES)
}

#[test]
fn false_alarms_keep_the_stated_rate_for_any_distribution() {
    type Distribution = fn(&mut SplitMix64) -> f64;
    let distributions: [(&str, Distribution); 3] = [
        ("normal", normal),
        ("long tail", |g| 1.0 / uniform(g)),
        // Five values only: most quantiles are values that many scores share.
        ("atoms", |g| (uniform(g) * 5.0).floor()),
    ];
    const TRIALS: u32 = 600;
    let rate = 0.1;
    for (name, distribution) in distributions {
        let mut generator = SplitMix64::new(7);
        let mut alarms = 0;
        for _ in 0..TRIALS {
            let probe = probe(draw(150, || distribution(&mut generator)), &PROBABILITIES);
            let mut drift = Drift::new(&probe, 60, rate).unwrap();
            drift.push_scores(&draw(60, || distribution(&mut generator)));
            alarms += u32::from(drift.state() == DriftState::Drifted);
        }
        // At the stated rate itself, four standard deviations more than expected are one chance in 30,000.
        let expected = f64::from(TRIALS) * rate;
        let most = expected + 4.0 * (expected * (1.0 - rate)).sqrt();
        assert!(f64::from(alarms) <= most, "{name}: {alarms} alarms in {TRIALS} windows");
        // And the test is not asleep: on continuous scores it uses a good part of its rate.
        assert!(name == "atoms" || alarms > TRIALS / 100, "{name}: {alarms}");
    }
}

#[test]
fn shifts_and_changes_of_scale_are_seen() {
    let probe = calibrated();
    let mut generator = SplitMix64::new(3);
    for (shift, scale, wanted) in [
        (0.0, 1.0, DriftState::Steady),
        (1.0, 1.0, DriftState::Drifted),
        (-1.0, 1.0, DriftState::Drifted),
        (0.0, 2.0, DriftState::Drifted),
        (0.0, 0.5, DriftState::Drifted),
        (0.0, 0.0, DriftState::Drifted),
    ] {
        let mut drift = Drift::new(&probe, 200, RATE).unwrap();
        for _ in 0..20 {
            drift.push_scores(&draw(200, || shift + scale * normal(&mut generator)));
            assert_eq!(drift.state(), wanted, "shift {shift}, scale {scale}: {:?}", drift.report());
        }
        let report = drift.report();
        assert_eq!((report.windows, report.sequences, report.window, report.rate), (20, 0, 200, RATE));
        assert!(report.lowest <= report.highest && PROBABILITIES.contains(&report.probability));
        let outside = report.share < report.lowest || report.share > report.highest;
        assert_eq!(outside, wanted == DriftState::Drifted);
    }
}

#[test]
fn a_window_decides_when_it_is_full_and_the_next_one_may_recover() {
    let probe = calibrated();
    let mut drift = Drift::new(&probe, 50, RATE).unwrap();
    assert_eq!(drift.state(), DriftState::Pending);
    assert!(drift.report().share.is_nan() && drift.report().z.is_nan());
    drift.push_scores(&[5.0; 49]);
    assert_eq!((drift.state(), drift.report().sequences), (DriftState::Pending, 49));
    drift.push(5.0);
    assert_eq!(drift.state(), DriftState::Drifted);
    let mut generator = SplitMix64::new(5);
    let calm = draw(50, || normal(&mut generator));
    drift.push_scores(&calm[..49]);
    assert_eq!(drift.state(), DriftState::Drifted, "it stands until the next window is full");
    drift.push(calm[49]);
    assert_eq!((drift.state(), drift.report().windows), (DriftState::Steady, 2));
}

#[test]
fn a_nonfinite_reference_is_invalid_and_never_steady() {
    let probe = calibrated();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut drift = Drift::new(&probe, 50, RATE).unwrap();
        drift.push(bad);
        drift.push_scores(&[0.0; 500]);
        assert_eq!((drift.state(), drift.report().windows), (DriftState::Invalid, 0));
        drift.reset();
        assert_eq!(drift.state(), DriftState::Pending);
        drift.push_scores(&[5.0; 50]);
        assert_eq!(drift.state(), DriftState::Drifted);
    }
    assert_eq!(DriftState::default(), DriftState::Invalid);
}

#[test]
fn what_could_never_alarm_is_refused_with_the_mend() {
    let probe_of = |m: usize, probabilities: &[f64]| {
        let mut generator = SplitMix64::new(2);
        probe(draw(m, || normal(&mut generator)), probabilities)
    };
    let refused = |probe: &Probe, window, rate| {
        let error = Drift::new(probe, window, rate).unwrap_err();
        assert!(matches!(error, Error::RateUnsupported { .. }), "{error}");
        error.to_string()
    };
    let probe = calibrated();
    let sentence = refused(&probe, 1, RATE);
    assert!(
        sentence.contains("a window of 1 sequences could never show a drift; 2 are enough"),
        "{sentence}"
    );
    assert!(Drift::new(&probe, 2, RATE).is_ok());
    // One quantile in the middle: a window of n halves must be rarer than 0.005.
    let median = probe_of(400, &[0.5]);
    assert!(refused(&median, 7, RATE).contains("14 are enough"));
    assert!(Drift::new(&median, 8, RATE).is_ok());
    assert!(refused(&probe_of(400, &[]), 100, RATE).contains("no quantiles"));
    // Two calibration sequences: none of n new ones lies below the lower with probability 2 / (n + 2) ...
    assert!(refused(&probe_of(2, &[0.5]), 100, RATE).contains("400 are enough"));
    // ... and below a quantile that may lie below both there is nothing to compare with.
    assert!(refused(&probe_of(2, &[0.1]), 1000, RATE).contains("calibrate on more sequences"));
    let standalone = Probe::from_vectors(&[1.0], &[0.0], 1.0, None).unwrap();
    assert!(refused(&standalone, 100, RATE).contains("no calibrated direction file"));
    for (window, rate) in [(0, RATE), (u32::MAX, RATE), (100, 0.0), (100, 1.0), (100, f64::NAN)] {
        assert!(matches!(Drift::new(&probe, window, rate), Err(Error::InvalidArgument(_))));
    }
}

#[test]
fn a_watching_monitor_is_stale_while_drift_stands_whatever_it_would_say() {
    let probe = calibrated();
    let mut drift = Drift::new(&probe, 50, RATE).unwrap();
    // The fixture has thresholds for 1 and 4 tokens: clean, flagged, and with the larger horizon to come.
    let sequences: [(&[f32], State); 4] = [
        (&[], State::Invalid),
        (&[0.5], State::Clean),
        (&[50.0], State::Flagged),
        (&[0.5, f32::NAN], State::Invalid),
    ];
    let mut monitors = sequences.map(|(scores, _)| {
        let mut monitor = Monitor::new(&probe, Aggregation::Mean, RATE).unwrap();
        monitor.watch(&drift).unwrap();
        monitor.push_scores(scores);
        monitor
    });
    let plain = monitors[2].verdict();
    assert_eq!((plain.state, plain.misalignment), (State::Flagged, 1));
    let states = |monitors: &[Monitor; 4]| monitors.each_ref().map(|m| m.verdict().state);
    assert_eq!(states(&monitors), sequences.map(|(_, state)| state), "pending says nothing against them");

    drift.push_scores(&[5.0; 50]);
    let stale = sequences.map(|(_, state)| if state == State::Invalid { state } else { State::Stale });
    assert_eq!(states(&monitors), stale);
    let verdict = monitors[2].verdict();
    assert_eq!(verdict, emaudit::Verdict { state: State::Stale, misalignment: 0, ..plain });
    monitors[2].reset();
    monitors[2].push(50.0);
    assert_eq!(monitors[2].verdict().state, State::Stale, "a new sequence is watched too");

    drift.push(f32::NAN);
    assert_eq!(states(&monitors), [State::Invalid; 4]);
    drift.reset();
    assert_eq!(states(&monitors), sequences.map(|(_, state)| state));
    drift.push_scores(&[5.0; 50]);
    drop(drift);
    assert_eq!(states(&monitors), stale, "a dropped drift keeps its last state");
}

#[test]
fn a_pending_sequence_is_stale_too() {
    let whole = fixture::file(fixture::specific());
    let mut manifest = Directions::from_bytes(&whole, &OpenOptions::default()).unwrap().manifest().clone();
    manifest
        .layers
        .iter_mut()
        .for_each(|l| l.calibration.as_mut().unwrap().thresholds.retain(|t| t.horizon == 4));
    let vectors = fixture::values(fixture::WIDTH, 3);
    let layers: Vec<_> = manifest.layers.iter().map(|l| l.layer).collect();
    let tensors: Vec<_> = layers
        .iter()
        .map(|layer| LayerTensors { layer: *layer, direction: &vectors, aligned_mean: &vectors })
        .collect();
    let bytes = to_bytes(&manifest, &tensors).unwrap();
    let directions = Arc::new(Directions::from_bytes(&bytes, &OpenOptions::default()).unwrap());
    let probe = Probe::new(directions, fixture::LAYER).unwrap();
    let mut drift = Drift::new(&probe, 50, RATE).unwrap();
    let mut monitor = Monitor::new(&probe, Aggregation::Mean, RATE).unwrap();
    monitor.watch(&drift).unwrap();
    monitor.push(0.0);
    assert_eq!(monitor.verdict().state, State::Pending);
    drift.push_scores(&[5.0; 50]);
    assert_eq!((monitor.verdict().state, monitor.verdict().horizon), (State::Stale, 4));
}

#[test]
fn only_a_drift_of_the_same_layer_and_file_may_be_watched() {
    let bytes = fixture::file(fixture::specific());
    let open = |verify| {
        let options = OpenOptions { verify, ..OpenOptions::default() };
        Arc::new(Directions::from_bytes(&bytes, &options).unwrap())
    };
    let monitor_of = |directions: &Arc<Directions>| {
        let probe = Probe::new(directions.clone(), fixture::LAYER).unwrap();
        Monitor::new(&probe, Aggregation::Mean, RATE).unwrap()
    };
    let drift_of = |directions: &Arc<Directions>, layer| {
        Drift::new(&Probe::new(directions.clone(), layer).unwrap(), 50, RATE).unwrap()
    };
    let (first, second, unverified) = (open(true), open(true), open(false));
    let mut monitor = monitor_of(&first);
    assert!(monitor.watch(&drift_of(&first, fixture::LAYER)).is_ok());
    assert!(monitor.watch(&drift_of(&second, fixture::LAYER)).is_ok(), "the same bytes opened twice");
    let other_layer = first.layers().find(|layer| *layer != fixture::LAYER).unwrap();
    for drift in [drift_of(&first, other_layer), drift_of(&unverified, fixture::LAYER)] {
        assert!(matches!(monitor.watch(&drift), Err(Error::InvalidArgument(_))));
    }
    // Unverified files have no digest to compare; the very same opening will do.
    assert!(monitor_of(&unverified).watch(&drift_of(&unverified, fixture::LAYER)).is_ok());
    assert!(monitor_of(&unverified).watch(&drift_of(&open(false), fixture::LAYER)).is_err());
}

#[test]
fn monitors_on_several_threads_watch_one_drift() {
    fn sendable<T: Send>(_: &T) {}
    let probe = calibrated();
    let mut drift = Drift::new(&probe, 50, RATE).unwrap();
    sendable(&drift);
    let monitors: Vec<_> = (0..4)
        .map(|_| {
            let mut monitor = Monitor::new(&probe, Aggregation::Mean, RATE).unwrap();
            monitor.watch(&drift).unwrap();
            monitor.push(0.0);
            monitor
        })
        .collect();
    std::thread::scope(|scope| {
        for monitor in &monitors {
            // Clean, as long as nothing is known; stale from some moment on, and then for good.
            scope.spawn(move || {
                while monitor.verdict().state == State::Clean {
                    std::thread::yield_now();
                }
                assert_eq!(monitor.verdict().state, State::Stale);
            });
        }
        scope.spawn(move || drift.push_scores(&[5.0; 50]));
    });
}
