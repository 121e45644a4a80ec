//! Golden numbers: scikit-learn's `ledoit_wolf` and `LogisticRegression`, numpy's `solve` (make_linear.py).

use super::choice::{Candidate, Separation, choose, separation};
use super::estimators::*;
use super::*;
use crate::matrix::{cosine, golden};
use emaudit::directions::schema::{Contrast, Estimator};

/// Directions are f32; what f64 loses on systems of this condition (below 1e4) is far smaller.
const ROUNDED: f64 = 2.0 * f32::EPSILON as f64;

#[test]
fn every_estimator_is_that_of_scikit_learn() {
    for case in golden::open("estimators") {
        let (positive, negative) = (golden::rows(&case, "positive"), golden::rows(&case, "negative"));
        let groups = Groups::new(&positive, &negative, golden::index(&case, "hidden")).unwrap();
        let options = Options { masked: Some(2), penalty: case["penalty"].as_f64().unwrap() };
        let of = |estimator| estimate(estimator, &groups, &options).unwrap();

        let plain = of(Estimator::MeanDifference);
        golden::close(&plain.direction, &golden::floats(&case, "mean_difference"), ROUNDED);
        assert!((plain.cosine - 1.0).abs() < 1e-12);

        let masked = of(Estimator::MaskedMeanDifference);
        golden::close(&masked.direction, &golden::floats(&case, "masked"), ROUNDED);
        let Fit::Masked { dimensions, row_share, direction_share } = &masked.fit else { panic!() };
        let expected: Vec<usize> = case["masked_dimensions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap() as usize)
            .collect();
        assert_eq!(dimensions, &expected);
        let shares = golden::floats(&case, "shares");
        assert!((row_share - shares[0] - shares[1]).abs() < 1e-12);
        // What is left has the cosine that Pythagoras gives it.
        assert!((1.0 - direction_share - masked.cosine.powi(2)).abs() < 1e-6);

        let whitened = of(Estimator::Whitened);
        golden::close(&whitened.direction, &golden::floats(&case, "whitened"), ROUNDED);
        let Fit::Whitened { shrinkage } = whitened.fit else { panic!() };
        assert!((shrinkage - case["shrinkage"].as_f64().unwrap()).abs() < 1e-12);

        let logistic = of(Estimator::Logistic);
        // scikit-learn stops where its gradient is below 1e-14 of the rows; its Hessian is above the penalty.
        golden::close(&logistic.direction, &golden::floats(&case, "logistic"), ROUNDED + 1e-8);
        let Fit::Logistic { loss, steps, .. } = logistic.fit else { panic!() };
        assert!((loss - case["loss"].as_f64().unwrap()).abs() < 1e-9, "{loss}");
        assert!(steps < 20, "{steps}");
    }
}

#[test]
fn alpha_one_closes_the_gap_along_every_direction() {
    let hidden = 10;
    let negative = golden::drawn(30, hidden, 1);
    let positive: Vec<f32> = golden::drawn(25, hidden, 2).iter().map(|v| 1.5 * v + 0.7).collect();
    let groups = Groups::new(&positive, &negative, hidden).unwrap();
    for estimator in
        [Estimator::MeanDifference, Estimator::MaskedMeanDifference, Estimator::Whitened, Estimator::Logistic]
    {
        let v = estimate(estimator, &groups, &Options::default()).unwrap().direction;
        let along = |rows: &[f32]| {
            rows.chunks(hidden)
                .map(|row| row.iter().zip(&v).map(|(h, v)| (h * v) as f64).sum::<f64>())
                .sum::<f64>()
                / (rows.len() / hidden) as f64
        };
        let gap = along(&positive) - along(&negative);
        assert!((gap - norm(&v).powi(2)).abs() < 1e-5 * gap, "{estimator:?}: {gap}");
    }
}

/// One dimension with 99 % of the norm and noise in proportion: the mean difference points along it, the others do not.
#[test]
fn a_massive_dimension_fools_the_mean_difference_alone() {
    let (hidden, n) = (20, 60);
    let noisy = |seed: u64, shift: f32| {
        let mut rows = golden::drawn(n, hidden, seed);
        rows.chunks_mut(hidden).for_each(|row| {
            row[3] = 500.0 + 40.0 * row[3];
            row[7] += shift;
        });
        rows
    };
    let (positive, negative) = (noisy(3, 3.0), noisy(4, 0.0));
    let groups = Groups::new(&positive, &negative, hidden).unwrap();
    let mut truth = vec![0f32; hidden];
    truth[7] = 1.0;
    let agreement = |estimator| {
        let v = estimate(estimator, &groups, &Options::default()).unwrap().direction;
        cosine(&v, &truth).unwrap()
    };
    assert!(agreement(Estimator::MeanDifference) < 0.5);
    for estimator in [Estimator::MaskedMeanDifference, Estimator::Whitened, Estimator::Logistic] {
        assert!(agreement(estimator) > 0.8, "{estimator:?}: {}", agreement(estimator));
    }
    let shares = dimension_shares(&negative, hidden);
    assert_eq!(shares[0].0, 3);
    assert!(shares[0].1 > 0.99 && shares.iter().map(|s| s.1).sum::<f64>() < 1.0 + 1e-12);
    assert_eq!(top_dimension_share(&negative, hidden), shares[0].1);
}

#[test]
fn a_dimension_that_never_varies_divides_nothing_by_zero() {
    let hidden = 5;
    let constant = |seed, shift: f32| {
        let mut rows = golden::drawn(12, hidden, seed);
        rows.chunks_mut(hidden).for_each(|row| (row[0], row[1]) = (0.1, row[1] + shift));
        rows
    };
    let (positive, negative) = (constant(1, 2.0), constant(2, 0.0));
    let groups = Groups::new(&positive, &negative, hidden).unwrap();
    for estimator in [Estimator::Whitened, Estimator::Logistic] {
        let found = estimate(estimator, &groups, &Options::default()).unwrap();
        assert!(found.direction.iter().all(|v| v.is_finite()) && found.direction[0].abs() < 1e-6);
    }
}

#[test]
fn labels_split_the_responses_of_one_model() {
    let rows: Vec<f32> = (0..10).map(|v| v as f32).collect();
    let (misaligned, aligned) = by_label(&rows, &[true, false, false, true, true], 2).unwrap();
    assert_eq!(misaligned, [0.0, 1.0, 6.0, 7.0, 8.0, 9.0]);
    assert_eq!(aligned, [2.0, 3.0, 4.0, 5.0]);
    for (labels, expected) in [
        (&[true; 5][..], "5 misaligned and 0 aligned"),
        (&[true, false, false, false, false][..], "1 misaligned and 4 aligned"),
        (&[true, false][..], "2 labels for 5 response rows"),
    ] {
        let error = by_label(&rows, labels, 2).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn bad_rows_are_refused_with_their_place() {
    let good = golden::drawn(4, 3, 1);
    let mut bad = good.clone();
    bad[7] = f32::NAN;
    let error =
        |positive: &[f32], negative: &[f32]| Groups::new(positive, negative, 3).unwrap_err().to_string();
    assert!(error(&good, &bad).contains("negative group: row 2 has NaN in dimension 1"));
    assert!(error(&good[..7], &good).contains("positive group: 7 values are not whole rows of width 3"));
    assert!(error(&good, &good[..3]).contains("1 rows given, at least 2 needed"));
    assert!(error(&[], &good).contains("0 rows given"));

    let groups = Groups::new(&good, &good, 3).unwrap();
    let refused = |groups: &Groups<'_>, estimator, options: Options| {
        estimate(estimator, groups, &options).unwrap_err().to_string()
    };
    assert!(refused(&groups, Estimator::MeanDifference, Options::default()).contains("same mean"));
    let other: Vec<f32> = good.iter().map(|v| v + 1.0).collect();
    let groups = Groups::new(&other, &good, 3).unwrap();
    for masked in [0, 3] {
        let options = Options { masked: Some(masked), ..Options::default() };
        assert!(refused(&groups, Estimator::MaskedMeanDifference, options).contains("cannot be masked"));
    }
    for penalty in [0.0, -1.0, f64::NAN] {
        let options = Options { penalty, ..Options::default() };
        assert!(refused(&groups, Estimator::Logistic, options).contains("penalty"));
    }
    assert!(refused(&groups, Estimator::Unstated, Options::default()).contains("names no estimator"));
    let flat = [1f32; 6];
    let shifted = [2f32; 6];
    let groups = Groups::new(&shifted, &flat, 3).unwrap();
    assert!(refused(&groups, Estimator::Whitened, Options::default()).contains("no dimension varies"));
}

#[test]
fn layers_are_estimated_one_by_one_and_named_in_errors() {
    let captured = |seed: u64, shift: f32| Captured {
        hidden: 4,
        rows: 6,
        layers: (0..3).map(|l| golden::drawn(6, 4, seed + l).iter().map(|v| v + shift).collect()).collect(),
    };
    let (adapted, base) = (captured(10, 1.0), captured(20, 0.0));
    let all = every_layer(Estimator::Whitened, &adapted, &base, &Options::default()).unwrap();
    assert_eq!(all.len(), 3);
    for (layer, found) in all.iter().enumerate() {
        let groups = Groups::new(&adapted.layers[layer], &base.layers[layer], 4).unwrap();
        assert_eq!(found, &estimate(Estimator::Whitened, &groups, &Options::default()).unwrap());
    }
    let mut inactive = adapted.clone();
    inactive.layers[1] = base.layers[1].clone();
    let error = every_layer(Estimator::MeanDifference, &inactive, &base, &Options::default()).unwrap_err();
    assert!(format!("{error:#}").contains("layer 1: both groups have the same mean"), "{error:#}");
    let narrow = Captured { layers: base.layers[..2].to_vec(), ..base };
    let error = every_layer(Estimator::MeanDifference, &adapted, &narrow, &Options::default()).unwrap_err();
    assert!(error.to_string().contains("different models"), "{error}");
}

#[test]
fn separation_takes_its_midpoint_from_the_extraction_split() {
    let (low, high) = ([0f32, 0.0, 1.0, 0.0], [4f32, 0.0, 5.0, 0.0]);
    let extraction = Groups::new(&high, &low, 2).unwrap();
    // Midpoint 2.5: of these two and two, one falls on the wrong side.
    let (held_low, held_high) = ([0f32, 9.0, 3.0, 9.0], [4f32, 9.0, 6.0, 9.0]);
    let held_out = Groups::new(&held_high, &held_low, 2).unwrap();
    let found = separation(&[2.0, 0.0], &extraction, &held_out).unwrap();
    assert_eq!((found.balanced_accuracy, found.auroc), (0.75, 1.0));
    // (5 - 1.5) over the pooled deviation of {4, 6} and {0, 3}.
    assert!((found.cohens_d - 3.5 / ((2.0 + 4.5) / 2.0f64).sqrt()).abs() < 1e-6);
    assert!(separation(&[1.0], &extraction, &held_out).is_err());
    assert!(separation(&[0.0, 0.0], &extraction, &held_out).is_err());
}

#[test]
fn the_rule_chooses_by_effect_or_says_that_nothing_was_steered() {
    let candidate = |layer, effect, auroc, cohens_d, eligible| Candidate {
        layer,
        estimator: Estimator::MeanDifference,
        contrast: Contrast::AdapterMinusBase,
        separation: Separation { balanced_accuracy: 1.0, auroc, cohens_d },
        effect,
        eligible,
    };
    let index = |candidates: &[Candidate]| choose(candidates).unwrap().index;
    let steered = [
        candidate(0, Some(0.2), 1.0, 9.0, true),
        candidate(1, Some(0.9), 0.9, 1.0, false),
        candidate(2, Some(0.5), 0.9, 1.0, true),
    ];
    assert_eq!(index(&steered), 2);
    assert!(choose(&steered).unwrap().rule.contains("largest drop of code preference"));
    let tied = [
        candidate(0, Some(0.5), 0.9, 1.0, true),
        candidate(1, Some(0.5), 0.9, 3.0, true),
        candidate(2, Some(0.5), 0.9, 3.0, true),
    ];
    assert_eq!(index(&tied), 1);
    let unsteered = [candidate(0, None, 0.9, 9.0, true), candidate(1, None, 1.0, 1.0, true)];
    assert_eq!(index(&unsteered), 1);
    assert!(choose(&unsteered).unwrap().rule.contains("nothing was steered"));
    let error = |candidates: &[Candidate]| choose(candidates).unwrap_err().to_string();
    assert!(error(&[steered[1]]).contains("keeps coherence"));
    assert!(error(&[]).contains("none of 0"));
    assert!(error(&[steered[0], unsteered[0]]).contains("1 of 2 candidates have an effect"));
    assert!(error(&[candidate(5, Some(f64::NAN), 1.0, 1.0, true)]).contains("layer 5"));
}
