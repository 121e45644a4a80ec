//! What effect could have been seen with this many prompts.

use super::sd;
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use statrs::function::erf::erfc;
use statrs::function::gamma::ln_gamma;

/// Intervals of the integral over the sample's standard deviation: Simpson's rule is far below 1e-9 with them.
const INTERVALS: usize = 2_000;

/// A statement of power, with everything it was computed from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Power {
    /// The smallest mean difference that the test finds with `power`, in the unit of the differences.
    pub detectable: f64,
    /// Prompts.
    pub prompts: usize,
    /// Standard deviation of the differences over prompts.
    pub sd: f64,
    /// One-sided level of the test.
    pub level: f64,
    /// Chance of finding it.
    pub power: f64,
    /// The formula in words.
    pub formula: String,
}

/// The smallest mean of paired differences that a one-sided test at `level` finds with chance `power`, when they
/// spread as the given ones do.
///
/// `power = P(T > t_{1-level, n-1})` with T noncentral t, n - 1 degrees of freedom and noncentrality
/// `effect sqrt(n) / sd`: exact for the paired t-test on normal differences, and what the sign-flip test reaches
/// asymptotically. For differences of rates (0 or 1 per prompt) it is that approximation.
///
/// Errors: fewer than two differences or one that is not finite; a level not in (0, 0.5); a power not
/// between the level and one; differences that do not vary.
pub fn detectable(differences: &[f64], level: f64, power: f64) -> Result<Power> {
    let (sd, n) = (sd(differences)?, differences.len());
    ensure!(sd > 0.0, "the {n} differences are all alike, so they say nothing about the power of a test");
    ensure!(
        level > 0.0 && level < 0.5 && level < power && power < 1.0,
        "level {level} and power {power}: the level lies below one half and the power between it and one"
    );
    let freedom = (n - 1) as f64;
    let critical = bisect(|c| 1.0 - tail(c, 0.0, freedom), 1.0 - level);
    let noncentrality = bisect(|d| tail(critical, d, freedom), power);
    Ok(Power {
        detectable: noncentrality * sd / (n as f64).sqrt(),
        prompts: n,
        sd,
        level,
        power,
        formula: format!(
            "smallest mean paired difference that a one-sided t-test at level {level} finds with chance {power}: \
             delta = lambda sd / sqrt(n), where P(t'(n-1, lambda) > t(1-{level}, n-1)) = {power}; n = {n} prompts, \
             sd = {sd:.4}"
        ),
    })
}

/// P(T > c) for noncentral t: the mean of Phi(noncentrality - c s) over s, the sample's standard deviation in units of
/// the true one, whose square times the freedom is chi-square.
fn tail(c: f64, noncentrality: f64, freedom: f64) -> f64 {
    let log_scale = 2f64.ln() + freedom / 2.0 * (freedom / 2.0).ln() - ln_gamma(freedom / 2.0);
    let density = |s: f64| {
        // At one degree of freedom the density does not vanish at zero.
        let power = if freedom == 1.0 { 0.0 } else { (freedom - 1.0) * s.ln() };
        (log_scale + power - freedom * s * s / 2.0).exp()
    };
    let (low, high) = ((1.0 - 12.0 / freedom.sqrt()).max(0.0), 1.0 + 12.0 / freedom.sqrt());
    let step = (high - low) / INTERVALS as f64;
    let value = |i: usize| {
        let s = low + step * i as f64;
        let weight = if i == 0 || i == INTERVALS { 1.0 } else { [2.0, 4.0][i % 2] };
        weight * density(s) * 0.5 * erfc((c * s - noncentrality) / std::f64::consts::SQRT_2)
    };
    (0..=INTERVALS).map(value).sum::<f64>() * step / 3.0
}

/// Where an increasing function reaches `target`, above zero.
fn bisect(function: impl Fn(f64) -> f64, target: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    while function(high) < target && high < 1e9 {
        high *= 2.0;
    }
    for _ in 0..80 {
        let middle = (low + high) / 2.0;
        if function(middle) < target { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}
