//! Golden numbers: scikit-learn's `Ridge` and `r2_score` (make_linear.py).

use super::scores::Effects;
use super::verdict::{Finding, across, two_tiers, within};
use super::*;
use crate::matrix::golden;
use emaudit::directions::schema::{Coherence, ControlEffect, ControlFamily, Specificity};
use std::collections::BTreeMap;

/// Vectors are f32 and have been rescaled once there and once back.
const ROUNDED: f64 = 4.0 * f32::EPSILON as f64;

struct Case {
    value: serde_json::Value,
    source: Vec<f32>,
    target: Vec<f32>,
    ds: usize,
    dt: usize,
}

fn cases() -> Vec<Case> {
    let case = |value: serde_json::Value| Case {
        source: golden::rows(&value, "source"),
        target: golden::rows(&value, "target"),
        ds: golden::index(&value, "source_width"),
        dt: golden::index(&value, "target_width"),
        value,
    };
    golden::open("ridge").into_iter().map(case).collect()
}

#[test]
fn maps_are_those_of_scikit_learn() {
    for case in cases() {
        let lambda = case.value["penalty"].as_f64().unwrap();
        let map = RidgeMap::new(&case.source, case.ds, &case.target, case.dt, lambda).unwrap();
        let direction = golden::rows(&case.value, "direction");
        let native = golden::drawn(1, case.dt, 9);
        let unscaled = |c: &Carried| -> Vec<f32> {
            c.vector.iter().map(|v| (f64::from(*v) * c.raw_norm / norm(&native)) as f32).collect()
        };
        let carried = map.carry(&direction, &native).unwrap();
        golden::close(&unscaled(&carried), &golden::floats(&case.value, "mapped"), ROUNDED);
        assert!((norm(&carried.vector) - norm(&native)).abs() < 1e-6 * norm(&native));
        assert!((carried.cosine - cosine(&carried.vector, &native).unwrap()).abs() < 1e-6);

        let order: Vec<usize> =
            case.value["shuffle"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect();
        let shuffled = map.carried(&direction, &native, Some(&order)).unwrap();
        golden::close(&unscaled(&shuffled), &golden::floats(&case.value, "mapped_shuffled"), ROUNDED);

        let held = (golden::rows(&case.value, "held_source"), golden::rows(&case.value, "held_target"));
        let r2 = map.r2(&held.0, &held.1).unwrap();
        assert!((r2.weighted - case.value["r2"].as_f64().unwrap()).abs() < 1e-9, "{r2:?}");
        assert!((r2.median - case.value["r2_median"].as_f64().unwrap()).abs() < 1e-9, "{r2:?}");
        assert_eq!(r2.rows, 10);
    }
}

#[test]
fn leaving_a_fold_out_needs_no_new_fit() {
    for case in cases() {
        let map = RidgeMap::new(&case.source, case.ds, &case.target, case.dt, 1.0).unwrap();
        let folds: Vec<usize> =
            case.value["folds"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect();
        let found = map.cross_validated(&golden::floats(&case.value, "penalties"), &folds);
        for (found, expected) in found.iter().zip(golden::floats(&case.value, "cv_r2")) {
            assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
        }
    }
}

/// Target rows that are a rotation of the source's with noise: the map finds the rotation.
fn rotated(n: usize) -> (Vec<f32>, Vec<f32>) {
    let source = golden::drawn(n, 6, 40);
    let noise = golden::drawn(n, 6, 41);
    let target = |i: usize| {
        let (row, noise) = (&source[i * 6..][..6], &noise[i * 6..][..6]);
        (0..6)
            .map(|j| row[(j + 1) % 6] * if j == 2 { -1.0 } else { 1.0 } + 0.1 * noise[j] + 5.0)
            .collect::<Vec<f32>>()
    };
    let target = (0..n).flat_map(target).collect();
    (source, target)
}

#[test]
fn a_direction_arrives_where_the_map_says() {
    let (source, target) = rotated(120);
    let (map, cv) = fit(&source, 6, &target, 6, &Options::default()).unwrap();
    let (v, native) = ([0f32, 0.0, 0.0, 2.0, 0.0, 0.0], [0f32, 0.0, -3.0, 0.0, 0.0, 0.0]);
    let carried = map.carry(&v, &native).unwrap();
    assert!(carried.cosine > 0.99, "{}", carried.cosine);
    let best = cv.r2.iter().map(|r| r.1).fold(f64::NEG_INFINITY, f64::max);
    assert!(best > 0.98 && map.lambda() == cv.lambda);
    assert!(cv.r2.iter().any(|r| r.0 == cv.lambda && r.1 == best));
    assert!(cv.note().unwrap().contains("120 prompts; 500 are wanted"));
    let again = fit(&source, 6, &target, 6, &Options::default()).unwrap();
    assert_eq!(again.1, cv);
    assert_eq!(again.0.carry(&v, &native).unwrap(), carried);
    // A grid that ends too early says so.
    let short = Options { grid: vec![10.0, 100.0], ..Options::default() };
    let edge = fit(&source, 6, &target, 6, &short).unwrap().1;
    assert!(edge.at_edge && edge.note().unwrap().contains("end of the grid"));
}

#[test]
fn controls_have_the_native_norm_and_lose_the_way() {
    let (source, target) = rotated(120);
    let (map, _) = fit(&source, 6, &target, 6, &Options::default()).unwrap();
    let (v, native) = ([0f32, 0.0, 0.0, 2.0, 0.0, 0.0], [0f32, 0.0, -3.0, 0.0, 0.0, 0.0]);
    let all = map.controls(&v, &native, 40, 7).unwrap();
    assert_eq!(all.len(), 160);
    for family in FAMILIES {
        let of: Vec<&Control> = all.iter().filter(|c| c.family == family).collect();
        assert_eq!(of.len(), 40);
        for control in &of {
            assert!((norm(&control.vector) - 3.0).abs() < 1e-5, "{family}");
        }
        let cosines: Vec<f64> = of.iter().map(|c| cosine(&c.vector, &native).unwrap()).collect();
        let mean = stats::mean(&cosines).unwrap();
        // Random in six dimensions: 40 cosines of variance 1/6 each.
        assert!(mean.abs() < 4.0 / (6.0f64 * 40.0).sqrt(), "{family}: {mean}");
        assert!(of.windows(2).any(|w| w[0].vector != w[1].vector), "{family}");
        if family == "source_orthogonal" {
            // The map is nearly a rotation, so what was perpendicular stays so.
            assert!(cosines.iter().all(|c| c.abs() < 0.1), "{cosines:?}");
        }
    }
    let again = map.controls(&v, &native, 40, 7).unwrap();
    assert!(all.iter().zip(&again).all(|(a, b)| a.vector == b.vector && a.seed == b.seed));
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let (source, target) = rotated(20);
    let options = Options::default();
    let error = |s: &[f32], ds, t: &[f32], dt, o: &Options| fit(s, ds, t, dt, o).err().unwrap().to_string();
    assert!(error(&source, 6, &target[..60], 6, &options).contains("20 source rows and 10 target rows"));
    assert!(error(&source[..54], 6, &target[..54], 6, &options).contains("9 rows given, at least 10 needed"));
    assert!(error(&source, 7, &target, 6, &options).contains("whole rows of width 7"));
    let mut broken = target.clone();
    broken[13] = f32::INFINITY;
    assert!(error(&source, 6, &broken, 6, &options).contains("target rows: row 2 has inf in dimension 1"));
    assert!(error(&[0.3; 120], 6, &target, 6, &options).contains("source rows are all alike"));
    assert!(error(&source, 6, &[1.0; 120], 6, &options).contains("target rows are all alike"));
    for grid in [vec![], vec![1.0, 1.0], vec![0.0, 1.0], vec![1.0, f64::NAN]] {
        assert!(error(&source, 6, &target, 6, &Options { grid, ..options.clone() }).contains("grid"));
    }
    assert!(error(&source, 6, &target, 6, &Options { folds: 1, ..options }).contains("1 folds"));
    assert!(RidgeMap::new(&source, 6, &target, 6, 0.0).is_err());
    let map = RidgeMap::new(&source, 6, &target, 6, 1.0).unwrap();
    assert!(map.carry(&[1.0; 5], &[1.0; 6]).is_err());
    assert!(map.carry(&[0.0; 6], &[1.0; 6]).unwrap_err().to_string().contains("to zero"));
    assert!(map.r2(&source[..12], &target[..18]).is_err());
}

type Cells = BTreeMap<(usize, usize), BTreeMap<u32, f64>>;

/// Effects over `prompts` prompts: a mean for each ordered pair and noise of standard deviation 1.
fn effects(means: &[(usize, usize, f64)], prompts: u64, seed: u64, noise: f64) -> Cells {
    let cell = |&(i, j, mean): &(usize, usize, f64)| {
        let draw = |p: u64| -> f64 {
            (0..12).map(|k| random::uniform(&[seed, i as u64, j as u64, p, k])).sum::<f64>() - 6.0
        };
        ((i, j), (0..prompts).map(|p| (p as u32, mean + noise * draw(p))).collect())
    };
    means.iter().map(cell).collect()
}

fn names(k: usize) -> Vec<String> {
    (0..k).map(|i| format!("model{i}")).collect()
}

#[test]
fn scores_are_row_and_column_means_without_the_diagonal() {
    let means = [(0, 1, 4.0), (0, 2, 2.0), (1, 0, 1.0), (1, 2, 0.0), (2, 0, 1.0), (2, 1, -1.0)];
    let mut cells = effects(&means, 5, 1, 0.0);
    cells.insert((0, 0), BTreeMap::from([(0, 100.0)]));
    let topology = Effects::new(names(3), cells).unwrap().topology(200, 3).unwrap();
    let values: Vec<(f64, f64)> = topology.roles.iter().map(|r| (r.donor.value, r.receiver.value)).collect();
    assert_eq!(values, [(3.0, 1.0), (0.5, 1.5), (0.0, 1.0)]);
    // Without noise a bootstrap has nothing to spread.
    assert!(
        topology.roles.iter().all(|r| r.donor.low == r.donor.value && r.receiver.high == r.receiver.value)
    );
    assert_eq!(topology.roles[0].balance.unwrap().value, 2.0);
    assert_eq!(topology.pairs[0].difference.unwrap().value, 3.0);
    // Five prompts: two of 32 sign patterns; three pairs corrected together.
    let first = topology.pairs[0].difference.unwrap();
    assert_eq!((first.p, first.holm_p, first.prompts), (2.0 / 32.0, 6.0 / 32.0, 5));
}

#[test]
fn intervals_are_those_of_the_bootstrapped_mean() {
    let cells = effects(&[(0, 1, 1.0), (1, 0, 0.0)], 40, 5, 1.0);
    let values: Vec<f64> = cells[&(0, 1)].values().copied().collect();
    let expected = stats::bootstrap_mean(&values, 500, 0.95, 11).unwrap();
    let topology = Effects::new(names(2), cells).unwrap().topology(500, 11).unwrap();
    let donor = topology.roles[0].donor;
    assert!((donor.low - expected.low).abs() < 1e-12 && (donor.high - expected.high).abs() < 1e-12);
    assert_eq!(topology.roles[1].receiver, donor);
}

#[test]
fn asymmetry_is_found_where_it_is_and_not_elsewhere() {
    let means = |a: f64| [(0, 1, a), (0, 2, a), (1, 0, 0.0), (1, 2, 0.0), (2, 0, 0.0), (2, 1, 0.0)];
    let p = |means: &[(usize, usize, f64)], seed, noise| {
        let effects = Effects::new(names(3), effects(means, 12, seed, noise)).unwrap();
        effects.topology(100, seed).unwrap().asymmetry_p.unwrap()
    };
    assert!(p(&means(2.0), 1, 1.0) < 0.01);
    assert_eq!(p(&means(0.0), 1, 0.0), 1.0);
    let found = (0..60).filter(|&seed| p(&means(0.0), 100 + seed, 1.0) <= 0.05).count();
    // A valid test is wrong in 3 of 60; more than 10 has a chance of 2e-4.
    assert!(found <= 10, "{found} of 60");
}

#[test]
fn prompts_that_two_cells_do_not_share_test_nothing() {
    let mut cells = effects(&[(0, 1, 1.0), (1, 0, 0.0)], 6, 1, 1.0);
    let moved = cells[&(1, 0)].iter().map(|(p, e)| (p + 100, *e)).collect();
    cells.insert((1, 0), moved);
    let topology = Effects::new(names(2), cells).unwrap().topology(200, 3).unwrap();
    assert!(topology.asymmetry_p.is_none() && topology.pairs[0].difference.is_none());
    assert!(topology.roles.iter().all(|r| r.balance.is_none()));
    assert_eq!(topology.prompts, 12);
}

#[test]
fn a_matrix_with_holes_is_refused() {
    let whole = effects(&[(0, 1, 1.0), (1, 0, 0.0)], 4, 1, 1.0);
    let error = |models: Vec<String>, cells: Cells| Effects::new(models, cells).unwrap_err().to_string();
    assert!(error(names(1), whole.clone()).contains("at least 2"));
    assert!(error(names(3), whole.clone()).contains("the effect of model0 in model2 was not measured"));
    assert!(error(vec!["a".into(), "a".into()], whole.clone()).contains("twice"));
    let mut broken = whole.clone();
    broken.get_mut(&(1, 0)).unwrap().insert(2, f64::NAN);
    assert!(error(names(2), broken).contains("model1 in model0 is NaN at prompt 2"));
    let mut thin = whole;
    thin.insert((0, 1), BTreeMap::from([(0, 1.0)]));
    assert!(error(names(2), thin).contains("1 prompts, at least 2"));
}

fn families(best: f64, count: u64) -> Vec<ControlFamily> {
    let controls = || (0..count).map(|seed| ControlEffect { seed, effect: best - seed as f64 }).collect();
    FAMILIES.map(|family| ControlFamily { family: family.into(), rank_p: 1.0, controls: controls() }).into()
}

#[test]
fn a_carried_direction_is_nonspecific_until_all_four_families_lose() {
    let kept = Some(Coherence { unsteered: -1.0, steered: -1.1, margin: 0.2 });
    let status = |effect, families: &[ControlFamily], coherence| {
        let cell = across("a", "b", effect, families, coherence);
        (cell.status == Specificity::Specific, cell.tested)
    };
    assert_eq!(status(2.0, &families(1.0, 39), kept), (true, true));
    assert_eq!(status(1.0, &families(1.0, 39), kept), (false, true)); // one control does as well: 2/40
    assert_eq!(status(2.0, &families(1.0, 38), kept), (false, false));
    assert_eq!(status(2.0, &families(1.0, 39)[..3], kept), (false, false));
    assert_eq!(status(-0.5, &families(-1.0, 39), kept), (false, true));
    assert_eq!(status(2.0, &families(1.0, 39), None), (false, false));
    let broken = Some(Coherence { unsteered: -1.0, steered: -1.3, margin: 0.2 });
    assert_eq!(status(2.0, &families(1.0, 39), broken), (false, true));
    assert_eq!(status(f64::NAN, &families(1.0, 39), kept), (false, false));
    let mut nan = families(1.0, 39);
    nan[0].controls[0].effect = f64::NAN;
    assert_eq!(status(2.0, &nan, kept), (false, false));
    assert_eq!(across("a", "b", 2.0, &[], None).status, Specificity::Nonspecific);
}

#[test]
fn the_claim_of_two_tiers_needs_both() {
    let kept = Some(Coherence { unsteered: -1.0, steered: -1.0, margin: 0.2 });
    let own = within("a", Specificity::Specific);
    let weak = across("a", "b", 1.0, &families(1.0, 39), kept);
    let strong = across("b", "a", 2.0, &families(1.0, 39), kept);
    let untested = across("b", "c", 2.0, &[], None);
    let finding = |cells: &[_]| two_tiers(cells).unwrap().finding;
    assert_eq!(finding(&[own.clone(), weak.clone()]), Finding::Reproduced);
    assert_eq!(finding(&[own.clone(), weak.clone(), untested.clone()]), Finding::Reproduced);
    assert_eq!(finding(&[own.clone(), weak.clone(), strong.clone()]), Finding::NotReproduced);
    assert_eq!(finding(&[within("a", Specificity::Nonspecific), weak.clone()]), Finding::NotReproduced);
    assert_eq!(finding(&[within("a", Specificity::Untested), weak.clone()]), Finding::NotTestable);
    assert_eq!(finding(&[own.clone(), untested.clone()]), Finding::NotTestable);
    let tiers = two_tiers(&[own, weak, strong, untested]).unwrap();
    assert_eq!((tiers.across.specific, tiers.across.tested, tiers.across.untested), (1, 2, 1));
    let expected = stats::clopper_pearson(1, 2, 0.95).unwrap();
    assert_eq!(tiers.across.share, Some((expected.low, expected.high)));
    assert!(two_tiers(&[]).unwrap().within.share.is_none());
}
