//! Controls: pinned bytes, matched norms, and the property each family exists for.

use emaudit::controls::{SplitMix64, covariance_matched, label_shuffled, orthogonal, random};
use sha2::{Digest, Sha256};

const WIDTHS: [usize; 5] = [2, 3, 64, 576, 2305];

/// Small integers over a power of two: the same f32 on every platform, no rounding on the way.
fn vector(width: usize, period: usize) -> Vec<f32> {
    (0..width).map(|i| ((i * 37 + 11) % period) as f32 / 64.0 - 0.375).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

fn norm(v: &[f32]) -> f64 {
    dot(v, v).sqrt()
}

/// Every element is rounded to f32 once, so the norm is off by at most that share (and subnormals do not occur here).
fn assert_same_norm(control: &[f32], v: &[f32]) {
    let (found, expected) = (norm(control), norm(v));
    assert!((found - expected).abs() <= expected * (0.5f64.powi(24) + 1e-12), "{found} vs {expected}");
}

fn sha256(v: &[f32]) -> String {
    let bytes: Vec<u8> = v.iter().flat_map(|x| x.to_le_bytes()).collect();
    Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn splitmix64_gives_the_published_numbers() {
    let mut zero = SplitMix64::new(0);
    let expected =
        [0xE220_A839_7B1D_CDAF, 0x6E78_9E6A_A1B9_65F4, 0x06C4_5D18_8009_454F, 0xF88B_B8A8_724C_81EC];
    assert_eq!([(); 4].map(|()| zero.next_u64()), expected);
    let mut other = SplitMix64::new(1_234_567);
    assert_eq!(other.next_u64(), 6_457_827_717_110_365_317);
    assert_eq!(other.next_u64(), 3_203_168_211_198_807_973);
    let mut zero = SplitMix64::new(0);
    assert_eq!([(); 4].map(|()| zero.sign()), [-1.0, 1.0, 1.0, -1.0]);
}

#[test]
fn bounded_numbers_stay_below_and_reach_everything() {
    let mut generator = SplitMix64::new(5);
    let mut seen = [0; 7];
    (0..7000).for_each(|_| seen[generator.below(7) as usize] += 1);
    assert!(seen.iter().all(|n| (800..1200).contains(n)), "{seen:?}");
    assert_eq!(generator.below(0), 0);
}

/// The digests were also found by a second program, written in another language from the documentation.
#[test]
fn the_bytes_of_every_family_are_pinned() {
    let (v, rows) = (vector(64, 61), vector(64 * 12, 251));
    let pinned = |family: &dyn Fn(u64) -> Vec<f32>| sha256(&(0..16).flat_map(family).collect::<Vec<_>>());
    assert_eq!(
        pinned(&|seed| random(&v, seed)),
        "d16a3986bebeeed1f0bc90b6ce6e34fae54be73565d20cbaaf3ab40f25210c29"
    );
    assert_eq!(
        pinned(&|seed| orthogonal(&v, seed)),
        "89f546573d965f3dee49b6ef42741aa6a9bf823f18e1a4b30c79937abbc86995"
    );
    assert_eq!(
        pinned(&|seed| covariance_matched(&v, &rows, seed).unwrap()),
        "1c131b3f4871db45a17b2c138837da206890be8eb9d477463d01fd5187e1cbeb"
    );
    assert_eq!(
        pinned(&|seed| label_shuffled(&v, &rows, seed).unwrap()),
        "67950a1cb3b4708fbfc4545b33a4eb2e226efcc33aedb957e8b4acee69dbb900"
    );
}

#[test]
fn every_family_has_the_norm_of_the_direction_and_depends_on_the_seed() {
    for width in WIDTHS {
        let (v, rows) = (vector(width, 61), vector(width * 20, 251));
        for seed in 0..8 {
            let families = |seed| {
                [
                    random(&v, seed),
                    orthogonal(&v, seed),
                    covariance_matched(&v, &rows, seed).unwrap(),
                    label_shuffled(&v, &rows, seed).unwrap(),
                ]
            };
            families(seed).iter().for_each(|control| assert_same_norm(control, &v));
            assert_eq!(families(seed), families(seed));
            if width > 3 {
                families(seed).iter().zip(families(seed + 1)).for_each(|(a, b)| assert_ne!(*a, b));
            }
        }
    }
}

#[test]
fn random_is_signs() {
    let v = vector(576, 61);
    let control = random(&v, 3);
    let size = control[0].abs();
    assert!(control.iter().all(|x| x.abs() == size));
    let minus = control.iter().filter(|x| **x < 0.0).count();
    assert!((220..356).contains(&minus), "{minus} of 576");
}

#[test]
fn orthogonal_is_perpendicular_within_its_rounding() {
    for width in WIDTHS {
        let v = vector(width, 61);
        for seed in 0..32 {
            let control = orthogonal(&v, seed);
            let reach: f64 = control.iter().zip(&v).map(|(x, y)| (f64::from(*x) * f64::from(*y)).abs()).sum();
            // Rounding each element to f32, plus what two f64 projections leave.
            let bound = reach * (0.5f64.powi(24) + 4.0 * width as f64 * 0.5f64.powi(53)) + 1e-12 * norm(&v);
            assert!(dot(&control, &v).abs() <= bound, "{width} {seed}: {} > {bound}", dot(&control, &v));
        }
    }
}

#[test]
fn orthogonal_gives_zeros_where_nothing_is_perpendicular() {
    assert_eq!(orthogonal(&[2.0], 1), [0.0]);
    assert_eq!(orthogonal(&[0.0, 0.0], 1), [0.0, 0.0]);
    assert!(orthogonal(&[], 1).is_empty());
    // Half of the draws are parallel to this one; another is taken then.
    for seed in 0..16 {
        assert_same_norm(&orthogonal(&[1.0, 1.0], seed), &[1.0, 1.0]);
    }
}

#[test]
fn covariance_matched_follows_the_covariance_and_not_the_mean() {
    // The mean is far out along axis 0, the rows vary along axis 1 ten times as much as along axis 2.
    let mut generator = SplitMix64::new(9);
    let rows: Vec<f32> = (0..400)
        .flat_map(|_| [1000.0, 10.0 * generator.sign() as f32, generator.sign() as f32, 0.0])
        .collect();
    let v = [1.0f32, 1.0, 1.0, 1.0];
    let mut squares = [0.0f64; 4];
    for seed in 0..300 {
        let control = covariance_matched(&v, &rows, seed).unwrap();
        control.iter().zip(&mut squares).for_each(|(x, s)| *s += f64::from(*x).powi(2));
    }
    assert_eq!(
        (squares[0], squares[3]),
        (0.0, 0.0),
        "the mean was removed, and nothing varies along the last axis"
    );
    // With deviations 10 to 1, a normalised draw puts 1/11 of its square on the smaller axis in the mean.
    let share = squares[2] / (squares[1] + squares[2]);
    assert!((0.05..0.15).contains(&share), "{squares:?}");
}

#[test]
fn label_shuffled_cancels_what_all_differences_share() {
    for n in [10usize, 11] {
        let width = 32;
        let noise: Vec<f32> = vector(width * n, 251);
        // Integers over 64, so adding the common part is exact and only the shuffle can cancel it.
        let common: Vec<f32> = (0..width).map(|i| 4096.0 + i as f32).collect();
        let noise: Vec<f32> = noise.iter().map(|x| (x * 64.0).round() / 64.0).collect();
        let moved: Vec<f32> = noise.iter().enumerate().map(|(i, x)| x + common[i % width]).collect();
        let v = vector(width, 61);
        for seed in 0..16 {
            assert_eq!(label_shuffled(&v, &moved, seed).unwrap(), label_shuffled(&v, &noise, seed).unwrap());
        }
        let alike = common.repeat(n);
        assert!(label_shuffled(&v, &alike, 1).is_err(), "nothing is left when all differences are alike");
    }
}

#[test]
fn wrong_shapes_and_values_are_refused() {
    let v = [1.0f32, 2.0];
    for rows in [vec![], vec![1.0, 2.0], vec![1.0, 2.0, 3.0], vec![1.0, f32::NAN, 3.0, 4.0]] {
        assert!(covariance_matched(&v, &rows, 1).is_err());
        assert!(label_shuffled(&v, &rows, 1).is_err());
    }
    assert!(covariance_matched(&[], &[], 1).is_err());
    assert!(covariance_matched(&v, &[1.0, 2.0, 1.0, 2.0], 1).is_err(), "rows that do not vary");
}
