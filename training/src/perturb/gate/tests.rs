//! The gradient against differences, the optimum, and what units are for. Newton's method has its golden numbers in
//! extract/tests.rs.

use super::*;
use crate::matrix::golden;

fn clusters() -> (Vec<f32>, Vec<f32>) {
    let near = golden::drawn(30, 3, 1);
    let far = golden::drawn(35, 3, 2).chunks(3).flat_map(|r| [r[0] + 1.5, r[1] - 1.0, r[2]]).collect();
    (far, near)
}

fn axes() -> Vec<Vec<f32>> {
    vec![vec![3.0, 0.0, 0.0], vec![0.0, 0.5, 0.5]]
}

#[test]
fn the_gradient_is_that_of_differences() {
    let (positive, negative) = clusters();
    let groups = Groups::new(&positive, &negative, 3).unwrap();
    let options = Options { units: 3, steps: 5, ..Options::default() };
    let gate = LearnedGate::train(&axes(), &groups, &options).unwrap().0;
    let seen: Vec<Vec<f64>> = positive.chunks(3).chain(negative.chunks(3)).map(|r| gate.seen(r)).collect();
    let labels: Vec<f64> = (0..seen.len()).map(|i| if i < 35 { 1.0 } else { 0.0 }).collect();
    let objective = |p: &[f64]| gate.objective(p, &seen, &labels, 0.7);
    let (_, gradient) = objective(&gate.parameters);
    assert_eq!(gradient.len(), 1 + 2 + 3 * 4);
    for (i, g) in gradient.iter().enumerate() {
        let (mut above, mut below) = (gate.parameters.clone(), gate.parameters.clone());
        let step = 1e-5;
        (above[i], below[i]) = (above[i] + step, below[i] - step);
        let numeric = (objective(&above).0 - objective(&below).0) / (2.0 * step);
        // Central differences: third derivatives of some sixty rows times step^2, and rounding over step.
        assert!((g - numeric).abs() < 1e-6, "parameter {i}: {g} is not {numeric}");
    }
}

#[test]
fn units_begin_at_the_logistic_optimum_and_improve_on_it() {
    let (positive, negative) = clusters();
    let groups = Groups::new(&positive, &negative, 3).unwrap();
    let labels: Vec<f64> = (0..65).map(|i| if i < 35 { 1.0 } else { 0.0 }).collect();
    let trained = |units| {
        let options = Options { units, penalty: 0.5, ..Options::default() };
        let (gate, training) = LearnedGate::train(&axes(), &groups, &options).unwrap();
        let seen: Vec<Vec<f64>> =
            positive.chunks(3).chain(negative.chunks(3)).map(|r| gate.seen(r)).collect();
        let (value, gradient) = gate.objective(&gate.parameters, &seen, &labels, 0.5);
        (value, gradient.iter().fold(0f64, |m, g| m.max(g.abs())), training)
    };
    let (line, steepest, training) = trained(0);
    // Newton ends where g' H^-1 g falls below 1e-14 of a loss of some ten nats; H is below the 65 rows.
    assert!(steepest < 3e-6, "{steepest}");
    assert!(training.open_positive > 0.6 && training.open_negative < 0.4, "{training:?}");
    let (bent, steepest, _) = trained(3);
    assert!(bent < line && steepest < 0.1, "{bent} against {line}, slope {steepest}");
}

/// Positive rows on both sides of the negative ones: no line tells them apart, two units do.
#[test]
fn units_open_where_no_line_could() {
    let negative: Vec<f32> = golden::drawn(40, 2, 5).iter().map(|v| 0.3 * v).collect();
    let side = |seed, shift: f32| {
        golden::drawn(20, 2, seed)
            .chunks(2)
            .flat_map(|r| [0.3 * r[0] + shift, 0.3 * r[1]])
            .collect::<Vec<_>>()
    };
    let positive = [side(6, 2.0), side(7, -2.0)].concat();
    let groups = Groups::new(&positive, &negative, 2).unwrap();
    let axes = vec![vec![1.0, 0.0], vec![0.0, 1.0]];
    let train = |units| {
        let options = Options { units, penalty: 0.01, ..Options::default() };
        LearnedGate::train(&axes, &groups, &options).unwrap()
    };
    let (line, bent) = (train(0).1, train(4).1);
    assert!(line.open_positive - line.open_negative < 0.2, "{line:?}");
    assert!(bent.open_positive > 0.95 && bent.open_negative < 0.05, "{bent:?}");
    let gate = train(4).0;
    assert!(gate.opening(&[2.0, 0.0]) > 0.9 && gate.opening(&[-2.0, 0.0]) > 0.9);
    assert!(gate.opening(&[0.0, 0.0]) < 0.1);
    assert_eq!(train(4).0, gate);
}

#[test]
fn bad_gates_are_refused() {
    let (positive, negative) = clusters();
    let groups = Groups::new(&positive, &negative, 3).unwrap();
    let error = |axes: &[Vec<f32>], options: Options| {
        LearnedGate::train(axes, &groups, &options).unwrap_err().to_string()
    };
    let options = Options { steps: 3, ..Options::default() };
    assert!(error(&[], options).contains("at least one direction"));
    assert!(error(&[vec![0.0; 3]], options).contains("direction 0 has norm 0"));
    assert!(error(&[vec![1.0; 4]], options).contains("4 dimensions, not 3"));
    for bad in [
        Options { penalty: 0.0, ..options },
        Options { rate: -1.0, ..options },
        Options { steps: 0, ..options },
    ] {
        assert!(error(&axes(), bad).contains("must be above 0"));
    }
    assert!(error(&axes(), Options { rate: 1e308, ..options }).contains("diverged"));
    let flat: Vec<f32> = negative.chunks(3).flat_map(|r| [1.0, r[1], r[2]]).collect();
    let groups = Groups::new(&flat, &flat, 3).unwrap();
    let refused = LearnedGate::train(&[vec![1.0, 0.0, 0.0]], &groups, &options).unwrap_err().to_string();
    assert!(refused.contains("do not vary along direction 0"), "{refused}");
    let gate =
        LearnedGate::train(&axes(), &Groups::new(&positive, &negative, 3).unwrap(), &options).unwrap().0;
    assert!(GatedShift::new(gate.clone(), &[1.0; 2], 1.0).is_err());
    assert!(GatedShift::new(gate, &[1.0; 3], f64::NAN).is_err());
}
