//! Golden values come from scipy 1.x and numpy 2.x (the call is named beside each), unless the comment says otherwise.

use super::*;

const X: [f64; 8] = [2.5, -1.0, 4.0, 0.5, 3.0, 1.25, 7.0, -2.0];

/// numpy default_rng(0).normal(0.35, 1, 40).round(2)
const D40: [f64; 40] = [
    0.48, 0.22, 0.99, 0.45, -0.19, 0.71, 1.65, 1.3, -0.35, -0.92, -0.27, 0.39, -1.98, 0.13, -0.9, -0.38,
    -0.19, 0.03, 0.76, 1.39, 0.22, 1.72, -0.32, 0.7, 1.25, 0.44, -0.39, -0.57, -0.11, 0.57, -0.66, 0.14,
    0.19, 0.89, 0.56, 0.71, -0.3, 0.22, 1.13, 1.84,
];

#[track_caller]
fn near(found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance, "{found} is not {expected}");
}

#[test]
fn splitmix64_matches_its_reference() {
    // Vigna's splitmix64.c, seed 1234567.
    let mut random = SplitMix64::new(1234567);
    let first: Vec<u64> = (0..3).map(|_| random.next_u64()).collect();
    assert_eq!(first, [6457827717110365317, 3203168211198807973, 9817491932198370423]);
    assert_eq!(random.below(0), 0);
    let mut items: Vec<u32> = (0..100).collect();
    random.shuffle(&mut items);
    assert_ne!(items, (0..100).collect::<Vec<_>>());
    items.sort_unstable();
    assert_eq!(items, (0..100).collect::<Vec<_>>());
}

#[test]
fn mean_sd_and_quantiles_are_numpys() {
    near(mean(&X).unwrap(), 1.90625, 1e-15);
    near(sd(&X).unwrap(), 2.8782977980545574, 1e-14);
    // np.quantile, whose default method is type 7.
    for (p, expected) in [(0.0, -2.0), (0.05, -1.65), (0.25, 0.125), (0.5, 1.875), (0.9, 4.9), (1.0, 7.0)] {
        near(quantile(&X, p).unwrap(), expected, 1e-14);
    }
    assert_eq!(quantile(&[3.0], 0.7).unwrap(), 3.0);
}

#[test]
fn clopper_pearson_is_scipys() {
    // stats.binomtest(k, n).proportion_ci(confidence, method="exact")
    for (k, n, confidence, low, high) in [
        (0, 299, 0.95, 0.0, 0.012261595907536983),
        (0, 10, 0.95, 0.0, 0.30849710781876294),
        (3, 40, 0.95, 0.015742179851041527, 0.20386474873289898),
        (10, 10, 0.95, 0.6915028921812371, 1.0),
        (7, 1000, 0.95, 0.0028188587596180135, 0.014369194979269567),
        (40, 80, 0.99, 0.35348744484309935, 0.6465125551569008),
    ] {
        let found = clopper_pearson(k, n, confidence).unwrap();
        near(found.low, low, 1e-12);
        near(found.high, high, 1e-12);
    }
    // stats.beta.ppf(0.95, k + 1, n - k)
    for (k, n, upper) in [
        (0, 299, 0.009969146792899269),
        (0, 298, 0.010002432437677691),
        (2, 628, 0.00999091592989448),
        (3, 773, 0.00999979877180713),
        (4, 93, 0.09572233427809096),
    ] {
        near(clopper_pearson_upper(k, n, 0.95).unwrap(), upper, 1e-12);
    }
    assert_eq!(clopper_pearson_upper(5, 5, 0.95).unwrap(), 1.0);
}

#[test]
fn bootstrap_agrees_with_scipy_and_with_itself() {
    // stats.bootstrap((x,), np.mean, n_resamples=200000, method="percentile"); ours is another stream of draws.
    for (values, low, high) in [(&X[..], 0.09375, 3.8125), (&D40[..], 0.04225, 0.53025)] {
        let found = bootstrap_mean(values, 20_000, 0.95, 17).unwrap();
        let slack = (high - low) * 0.03;
        near(found.low, low, slack);
        near(found.high, high, slack);
        assert_eq!(found, bootstrap_mean(values, 20_000, 0.95, 17).unwrap());
        assert_ne!(found, bootstrap_mean(values, 20_000, 0.95, 18).unwrap());
    }
    let constant = bootstrap_mean(&[2.0; 5], 100, 0.95, 1).unwrap();
    assert_eq!((constant.low, constant.high), (2.0, 2.0));
}

#[test]
fn sign_flips_are_scipys_permutation_test() {
    // stats.permutation_test((d,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf)
    assert_eq!(sign_flip_p(&[0.5, 1.2, -0.3, 0.8, 0.1, 0.9, -0.2, 0.4], 1).unwrap(), 10.0 / 256.0);
    assert_eq!(sign_flip_p(&[1.0, 1.0, 1.0, -1.0, 2.0], 1).unwrap(), 0.15625);
    // With 200,000 draws scipy finds 0.0147.
    near(sign_flip_p(&D40, 3).unwrap(), 0.0147, 0.004);
    assert_eq!(sign_flip_p(&D40, 3).unwrap(), sign_flip_p(&D40, 3).unwrap());
}

#[test]
fn sign_flip_properties() {
    // All of one sign: only the identity (and its ties) reaches the observed sum.
    assert_eq!(sign_flip_p(&[1.0; 10], 1).unwrap(), 1.0 / 1024.0);
    assert_eq!(sign_flip_p(&[0.0; 10], 1).unwrap(), 1.0);
    assert_eq!(sign_flip_p(&[0.0; 50], 1).unwrap(), 1.0);
    assert_eq!(sign_flip_p(&[1.0; 100], 1).unwrap(), 1.0 / 10_001.0);
    let negated = D40.map(|d| -d);
    assert!(sign_flip_p(&negated, 1).unwrap() > 0.97);
    // Scale does not matter, even where the sums cannot be exact.
    let small = D40[..16].iter().map(|d| d * 1e-9).collect::<Vec<_>>();
    assert_eq!(sign_flip_p(&small, 1).unwrap(), sign_flip_p(&D40[..16], 1).unwrap());
}

#[test]
fn two_sided_sign_flips_are_scipys() {
    // stats.permutation_test((d,), np.mean, permutation_type="samples", alternative="two-sided", n_resamples=np.inf)
    let d = [0.5, 1.2, -0.3, 0.8, 0.1, 0.9, -0.2, 0.4];
    assert_eq!(sign_flip_p_two_sided(&d, 1).unwrap(), 20.0 / 256.0);
    assert_eq!(sign_flip_p_two_sided(&d.map(|d| -d), 1).unwrap(), 20.0 / 256.0);
    assert_eq!(sign_flip_p_two_sided(&[0.0; 9], 1).unwrap(), 1.0);
    assert!(sign_flip_p_two_sided(&[], 1).is_err());
}

#[test]
fn holm_is_that_of_statsmodels() {
    // statsmodels.stats.multitest.multipletests(p, method="holm")[1]
    let found = holm(&[0.01, 0.04, 0.03, 0.005, 0.8]).unwrap();
    for (found, expected) in found.iter().zip([0.04, 0.09, 0.09, 0.025, 0.8]) {
        near(*found, expected, 1e-15);
    }
    assert_eq!(holm(&[0.6, 0.5]).unwrap(), [1.0, 1.0]);
    assert_eq!(holm(&[0.02]).unwrap(), [0.02]);
    assert!(holm(&[]).unwrap().is_empty());
    assert!(holm(&[0.5, 1.5]).is_err() && holm(&[f64::NAN]).is_err());
}

#[test]
fn a_bootstrap_of_several_statistics_redraws_what_has_no_value() {
    let both = |drawn: &[usize]| {
        let mean = drawn.iter().map(|&i| X[i]).sum::<f64>() / drawn.len() as f64;
        Some(vec![mean, -mean])
    };
    let found = bootstrap(X.len(), 500, 0.95, 17, both).unwrap();
    assert_eq!(found[0], bootstrap_mean(&X, 500, 0.95, 17).unwrap());
    near(found[1].low, -found[0].high, 1e-14);
    // Only draws with the first unit count: the share of such draws of two is 3/4.
    let with_first = |drawn: &[usize]| drawn.contains(&0).then(|| vec![drawn[0] as f64]);
    assert_eq!(bootstrap(2, 400, 0.95, 1, with_first).unwrap()[0], Interval { low: 0.0, high: 1.0 });
    let error = bootstrap(2, 100, 0.95, 1, |_| None).unwrap_err().to_string();
    assert!(error.contains("more than half"), "{error}");
    assert!(bootstrap(2, 100, 0.95, 1, |_| Some(vec![f64::NAN])).is_err());
    assert!(bootstrap(1, 100, 0.95, 1, both).is_err());
}

#[test]
fn the_detectable_effect_is_that_of_the_noncentral_t() {
    // make_linear.py: scipy's stats.nct.
    let cases = crate::matrix::golden::open("power");
    for case in &cases {
        let (n, float) = (crate::matrix::golden::index(case, "n"), |name: &str| case[name].as_f64().unwrap());
        // Two values whose sample deviation is one, and pairs of them with a middle: any n.
        let size = ((n - 1) as f64 / (2 * (n / 2)) as f64).sqrt();
        let differences: Vec<f64> = (0..n).map(|i| if i % 2 == 0 { size } else { -size }).collect();
        let found = detectable(&differences, float("alpha"), float("power")).unwrap();
        near(found.sd, 1.0, 1e-12);
        near(found.detectable, float("exact"), 1e-6);
        assert_eq!(found.prompts, n);
        assert!(found.formula.contains(&format!("n = {n} prompts")), "{}", found.formula);
    }
    let (near_zero, twice) =
        (detectable(&X, 0.05, 0.8).unwrap(), detectable(&X.map(|x| 2.0 * x), 0.05, 0.8).unwrap());
    near(twice.detectable, 2.0 * near_zero.detectable, 1e-9);
}

/// The statement of power is about the t-test; the reports use sign flips.
#[test]
fn the_sign_flip_test_finds_the_detectable_effect_four_times_in_five() {
    let (n, samples) = (14, 400);
    let mut random = SplitMix64::new(21);
    let mut normal = || (0..12).map(|_| random.next_u64() as f64 / u64::MAX as f64).sum::<f64>() - 6.0;
    let standard: Vec<f64> = (0..n).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let per_sd = detectable(&standard, 0.05, 0.8).unwrap();
    let effect = per_sd.detectable / per_sd.sd;
    let found = (0..samples)
        .filter(|&seed| {
            let differences: Vec<f64> = (0..n).map(|_| effect + normal()).collect();
            sign_flip_p(&differences, seed).unwrap() <= 0.05
        })
        .count();
    // 0.8 within three standard errors, and two points for a distribution that is not quite normal.
    near(found as f64 / samples as f64, 0.8, 3.0 * (0.16 / samples as f64).sqrt() + 0.02);
}

#[test]
fn power_that_means_nothing_is_refused() {
    for (differences, level, power) in [
        (&X[..1], 0.05, 0.8),
        (&[1.0, 1.0, 1.0], 0.05, 0.8),
        (&[1.0, f64::NAN], 0.05, 0.8),
        (&X[..], 0.0, 0.8),
        (&X[..], 0.05, 1.0),
        (&X[..], 0.6, 0.8),
        (&X[..], 0.05, 0.04),
    ] {
        assert!(detectable(differences, level, power).is_err(), "{differences:?} {level} {power}");
    }
}

#[test]
fn rank_p_counts_ties_against_the_claim() {
    let controls: Vec<f64> = (0..39).map(f64::from).collect();
    assert_eq!(rank_p(100.0, &controls).unwrap(), 1.0 / 40.0);
    assert_eq!(rank_p(38.0, &controls).unwrap(), 2.0 / 40.0);
    assert_eq!(rank_p(-1.0, &controls).unwrap(), 1.0);
}

#[test]
fn auroc_cohens_d_and_balanced_accuracy() {
    let (a, b) = ([3.0, 1.5, 2.0, 5.0, 4.0, 2.0], [1.0, 2.0, 0.5, 2.0, 1.5]);
    // stats.mannwhitneyu(a, b).statistic / (6 * 5)
    near(auroc(&a, &b).unwrap(), 0.85, 1e-15);
    near(auroc(&a, &b).unwrap() + auroc(&b, &a).unwrap(), 1.0, 1e-15);
    assert_eq!(auroc(&[1.0; 3], &[1.0; 4]).unwrap(), 0.5);
    // Pooled by hand in numpy with ddof=1.
    near(cohens_d(&a, &b).unwrap(), 1.3776287462763128, 1e-14);
    assert_eq!(cohens_d(&[1.0; 3], &[1.0; 3]).unwrap(), 0.0);
    assert_eq!(cohens_d(&[2.0; 3], &[1.0; 3]).unwrap(), f64::INFINITY);
    // sklearn.metrics.balanced_accuracy_score
    near(balanced_accuracy(&a, &b, 1.75).unwrap(), 0.7166666666666667, 1e-15);
    assert_eq!(balanced_accuracy(&[2.0], &[1.0], 2.0).unwrap(), 0.5);
}

#[test]
fn a_rate_needs_enough_sequences() {
    for (rate, needed) in [(0.01, 299), (0.05, 59), (0.1, 29), (0.5, 5), (0.001, 2995)] {
        assert_eq!(sequences_needed(rate).unwrap(), needed, "{rate}");
    }
    let calm: Vec<f64> = (0..298).map(f64::from).collect();
    let error = threshold_at_rate(&calm, 0.01).unwrap_err().to_string();
    assert!(error.contains("298") && error.contains("at least 299"), "{error}");
    for rate in [0.0, 1.0, -0.1, f64::NAN] {
        assert!(threshold_at_rate(&calm, rate).is_err());
    }
}

#[test]
fn thresholds_keep_their_stated_rate() {
    let calm: Vec<f64> = (0..299).map(f64::from).collect();
    let found = threshold_at_rate(&calm, 0.01).unwrap();
    assert_eq!((found.threshold, found.exceeded, found.sequences), (298.0, 0, 299));
    near(found.rate_upper, 0.009969146792899269, 1e-12);
    // 773 sequences allow three alarms at 1 %: the fourth-largest score.
    let calm: Vec<f64> = (0..773).rev().map(f64::from).collect();
    let found = threshold_at_rate(&calm, 0.01).unwrap();
    assert_eq!((found.threshold, found.exceeded), (769.0, 3));
    near(found.rate_upper, 0.00999979877180713, 1e-12);
    // Ties at the threshold are no alarms, so the rate seen can only be lower.
    let mut tied = vec![0.0; 700];
    tied.extend([1.0; 73]);
    let found = threshold_at_rate(&tied, 0.01).unwrap();
    assert_eq!((found.threshold, found.exceeded), (1.0, 0));
}

#[test]
fn the_true_rate_stays_within_the_stated_one_in_95_of_100_samples() {
    let (rate, samples) = (0.05, 2_000);
    let mut random = SplitMix64::new(5);
    let broken = (0..samples)
        .filter(|_| {
            let calm: Vec<f64> = (0..200).map(|_| random.next_u64() as f64 / u64::MAX as f64).collect();
            // Uniform scores: the true rate above a threshold is what remains of the unit interval.
            1.0 - threshold_at_rate(&calm, rate).unwrap().threshold > rate
        })
        .count();
    let share = broken as f64 / f64::from(samples);
    assert!(share <= 0.06, "{share}");
}

#[test]
fn bad_samples_are_refused_with_a_reason() {
    let nan = [1.0, f64::NAN];
    for error in [
        mean(&[]).unwrap_err(),
        sd(&[1.0]).unwrap_err(),
        bootstrap_mean(&[1.0], 1000, 0.95, 1).unwrap_err(),
        sign_flip_p(&[], 1).unwrap_err(),
        rank_p(1.0, &[]).unwrap_err(),
        auroc(&[], &[1.0]).unwrap_err(),
    ] {
        assert!(error.to_string().contains("needed"), "{error}");
    }
    for error in [
        mean(&nan).unwrap_err(),
        quantile(&nan, 0.5).unwrap_err(),
        auroc(&[1.0], &nan).unwrap_err(),
        threshold_at_rate(&nan, 0.5).unwrap_err(),
        balanced_accuracy(&nan, &[1.0], 0.0).unwrap_err(),
        sign_flip_p(&nan, 1).unwrap_err(),
    ] {
        assert!(error.to_string().contains("value 1 is NaN"), "{error}");
    }
    assert!(rank_p(f64::NAN, &[1.0]).is_err());
    assert!(clopper_pearson(2, 1, 0.95).is_err());
    assert!(clopper_pearson(0, 0, 0.95).is_err());
    assert!(clopper_pearson(0, 1, 1.0).is_err());
    assert!(quantile(&[1.0], 1.5).is_err());
    assert!(bootstrap_mean(&X, 10, 0.95, 1).is_err());
}
