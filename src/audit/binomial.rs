//! The binomial distribution, exactly: tails, the interval of a share, what a number of trials can show.

/// Halvings of [0, 1] after which nothing changes any more in f64.
const HALVINGS: u32 = 1100;

/// `P(X >= count)` of `trials` with the probability `p` each.
pub(super) fn at_least(count: u64, trials: u64, p: f64) -> f64 {
    if count == 0 || p >= 1.0 {
        return f64::from(u8::from(count <= trials));
    }
    if count > trials || p <= 0.0 {
        return 0.0;
    }
    let n = trials as f64;
    // The side away from the mean is summed, so that what is added only gets smaller.
    if count as f64 > n * p {
        let odds = p / (1.0 - p);
        return series(
            probability(count, trials, p),
            (count..trials).map(|k| (n - k as f64) / (k + 1) as f64 * odds),
        );
    }
    let odds = (1.0 - p) / p;
    let below = count - 1;
    1.0 - series(
        probability(below, trials, p),
        (1..=below).rev().map(|k| k as f64 / (n - k as f64 + 1.0) * odds),
    )
}

/// `first (1 + r1 + r1 r2 + ...)` until nothing is added any more.
fn series(first: f64, ratios: impl Iterator<Item = f64>) -> f64 {
    let (mut term, mut sum) = (first, first);
    for ratio in ratios {
        term *= ratio;
        if sum + term == sum {
            break;
        }
        sum += term;
    }
    sum.min(1.0)
}

/// `P(X = count)` for `0 < p < 1`, by Loader's saddle point (2000): no factorial overflows and nothing cancels.
fn probability(count: u64, trials: u64, p: f64) -> f64 {
    let (k, n) = (count as f64, trials as f64);
    if count == 0 {
        return (n * (-p).ln_1p()).exp();
    }
    if count == trials {
        return (n * p.ln()).exp();
    }
    let exponent = stirling_error(count) + stirling_error(trials - count) - stirling_error(trials)
        + deviance(k, n * p)
        + deviance(n - k, n * (1.0 - p));
    (n / (std::f64::consts::TAU * k * (n - k))).sqrt() * (-exponent).exp()
}

/// `ln n!` minus Stirling's formula for it.
fn stirling_error(n: u64) -> f64 {
    let x = n as f64;
    if n < 16 {
        let factorial: f64 = (1..=n).map(|k| k as f64).product();
        return factorial.ln() - ((x + 0.5) * x.ln() - x + std::f64::consts::TAU.ln() / 2.0);
    }
    let s = 1.0 / (x * x);
    (1.0 / 12.0 - s * (1.0 / 360.0 - s * (1.0 / 1260.0 - s * (1.0 / 1680.0 - s / 1188.0)))) / x
}

/// `x ln(x / mean) + mean - x`, at least 0.
fn deviance(x: f64, mean: f64) -> f64 {
    let off = (mean - x) / x;
    x * (off - off.ln_1p())
}

/// The probability at which `rising` reaches `level`.
fn solve(level: f64, rising: impl Fn(f64) -> f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..HALVINGS {
        let middle = low + (high - low) / 2.0;
        if middle <= low || middle >= high {
            break;
        }
        if rising(middle) < level { low = middle } else { high = middle }
    }
    low
}

/// The smallest probability of a trial with which at least `count` of `trials` come with the probability `power`; NaN
/// where `count` is out of reach.
pub(super) fn smallest_shown(count: u64, trials: u64, power: f64) -> f64 {
    if count > trials { f64::NAN } else { solve(power, |p| at_least(count, trials, p)) }
}

/// The exact interval of Clopper and Pearson, with each limit missed with a probability of at most `tail`: its lower limit
/// for `least`, its upper one for `most` successes.
pub(super) fn interval(least: u64, most: u64, trials: u64, tail: f64) -> (f64, f64) {
    let low = if least == 0 { 0.0 } else { solve(tail, |p| at_least(least, trials, p)) };
    let high = if most >= trials { 1.0 } else { solve(1.0 - tail, |p| at_least(most + 1, trials, p)) };
    (low, high)
}

/// The fewest successes of `trials` that come with a probability of at most `level` where `p` is the highest probability of
/// each; `trials + 1` where all of them would come too often.
pub(super) fn critical(trials: u64, p: f64, level: f64) -> u64 {
    let (mut low, mut high) = (0, trials + 1);
    while low < high {
        let middle = low + (high - low) / 2;
        if at_least(middle, trials, p) <= level { high = middle } else { low = middle + 1 }
    }
    low
}

/// The fewest trials that, without a single success, have an upper limit below `share`.
pub(super) fn trials_needed(share: f64, tail: f64) -> u64 {
    let holds = |n: u64| interval(0, 0, n, tail).1 < share;
    let about = (tail.ln() / (-share).ln_1p()).floor().max(1.0) as u64;
    // Rounding may go either way at the limit; the condition is the definition.
    let first = (about.saturating_sub(1).max(1)..=about + 2).find(|n| holds(*n));
    first.unwrap_or(about + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scipy 1.17 is good to some 1e-13; here up to a thousand terms are added and an exponent is off by a few roundings of
    /// how far the count lies from its mean.
    fn close(found: f64, expected: f64) -> bool {
        (found - expected).abs() <= 1e-11 * expected
    }

    #[test]
    fn tails_are_those_of_scipy() {
        // scipy.stats.binom.sf(count - 1, trials, p)
        let golden = [
            (1, 1, 0.01, 0.01),
            (5, 98, 0.009, 0.0020056881230571663),
            (3, 98, 0.009, 0.059109589101758224),
            (1, 64, 0.00904, 0.4407680525807255),
            (20, 64, 0.05, 2.1990782105807262e-11),
            (64, 64, 0.05, 5.421010862427541e-84),
            (0, 7, 0.3, 1.0),
            (7, 7, 0.3, 0.00021869999999999995),
            (30, 100, 0.25, 0.14954104656657338),
            (20, 100, 0.25, 0.900469589894686),
            (600, 50000, 0.01, 7.012055191794044e-06),
            (401, 50000, 0.01, 0.9999981283484798),
            (999997, 1000000, 0.999999, 0.9810119044353335),
            (12, 1000000, 1e-06, 8.315646629806602e-10),
            (200, 400, 0.01, 1.3933571315479857e-282),
            (17, 17, 0.5, 7.62939453125e-06),
            (15, 31, 0.5, 0.639949934091419),
        ];
        for (count, trials, p, expected) in golden {
            let found = at_least(count, trials, p);
            assert!(close(found, expected), "{count} of {trials} at {p}: {found}, scipy {expected}");
        }
        assert_eq!([at_least(3, 2, 0.5), at_least(3, 2, 1.0), at_least(1, 2, 0.0)], [0.0; 3]);
        assert_eq!([at_least(2, 2, 1.0), at_least(0, 0, 0.5), at_least(0, 5, 0.0)], [1.0; 3]);
    }

    #[test]
    fn small_tails_are_those_of_the_definition() {
        let choose = |n: u64, k: u64| (0..k).fold(1.0, |c, i| c * (n - i) as f64 / (i + 1) as f64);
        let mut compared = 0;
        for trials in 1..=24 {
            for p in [0.003, 0.05, 0.31, 0.5, 0.77, 0.999] {
                let pmf = |k: u64| {
                    choose(trials, k) * f64::powi(p, k as i32) * f64::powi(1.0 - p, (trials - k) as i32)
                };
                for count in 0..=trials {
                    let expected: f64 = (count..=trials).rev().map(pmf).sum();
                    let found = at_least(count, trials, p);
                    assert!(
                        (found - expected).abs() <= 1e-13 * expected.max(1e-3),
                        "{count} of {trials} at {p}"
                    );
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 6 * (2..=25).sum::<u64>());
    }

    #[test]
    fn intervals_are_those_of_scipy() {
        // scipy.stats.binomtest(count, trials).proportion_ci(method="exact"), by scipy.stats.beta.ppf
        let golden = [
            (0, 36, 0.0, 0.09739375591449193),
            (0, 98, 0.0, 0.03694198703519287),
            (3, 98, 0.006358025717460409, 0.08686300887783266),
            (98, 98, 0.9630580129648071, 1.0),
            (1, 2, 0.01257911709342505, 0.9874208829065749),
            (50, 100, 0.39832112950330095, 0.601678870496699),
            (10, 299, 0.016152393806484984, 0.06064461290616223),
            (7, 1000, 0.002818858759620524, 0.014369194978918632),
            (12345, 100000, 0.12141710670798131, 0.12550476084867196),
            (1, 1000000, 2.5317807663794178e-08, 5.571630655166939e-06),
        ];
        for (count, trials, low, high) in golden {
            let found = interval(count, count, trials, 0.025);
            assert!(
                close(found.0, low) && close(found.1, high),
                "{count} of {trials}: {found:?}, scipy {low} {high}"
            );
        }
        // Ten trials of which nobody knows two: from 3 that are sure to 5 that may be.
        assert_eq!(interval(3, 5, 10, 0.025), (interval(3, 3, 10, 0.025).0, interval(5, 5, 10, 0.025).1));
    }

    #[test]
    fn what_can_be_shown_is_as_in_scipy() {
        // The first k with binom.sf(k - 1, n, p) <= level, and beta.ppf(0.8, k, n - k + 1).
        let golden = [
            (98, 0.009, 0.01, 5, 0.06763070899787367),
            (24, 0.045, 0.01, 5, 0.2642368100502658),
            (1, 0.05, 0.01, 2, f64::NAN),
            (1, 0.009, 0.01, 1, 0.8),
            (400, 0.01, 0.001, 12, 0.03676680116890889),
            (64, 0.0095, 0.05, 3, 0.06567685266998387),
            (100000, 0.01, 0.01, 1075, 0.011023352335225755),
        ];
        for (trials, p, level, count, share) in golden {
            let found = critical(trials, p, level);
            assert_eq!(found, count, "{trials} at {p}");
            let shown = smallest_shown(found, trials, 0.8);
            assert!(
                close(shown, share) || (shown.is_nan() && share.is_nan()),
                "{trials} at {p}: {shown}, {share}"
            );
        }
        for (share, needed) in [(0.1, 36), (0.05, 72), (0.25, 13), (0.5, 6), (0.02, 183), (0.9, 2)] {
            assert_eq!(trials_needed(share, 0.025), needed, "{share}");
        }
    }
}
