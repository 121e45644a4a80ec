//! Intervals, tests and thresholds.
//!
//! Every number the reports claim goes through here. Functions refuse empty samples and values that are not finite
//! instead of passing a NaN on, and everything random is drawn from a stated seed.

mod power;
pub use power::{Power, detectable};

use anyhow::{Result, bail, ensure};
use statrs::function::beta::checked_beta_reg;

/// Largest sample for which the sign-flip test enumerates every assignment of signs.
const EXACT_SIGN_FLIPS: usize = 16;
const SIGN_FLIP_DRAWS: u32 = 10_000;

/// Chance that a stated false-positive rate is too low although the calm sample supported it.
const RATE_RISK: f64 = 0.05;

/// SplitMix64: tiny, seeded by any number, and the same sequence on every platform.
#[derive(Debug, Clone)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An index below `bound`; zero for a bound of zero. Its bias, bound / 2^64, is below anything measured here.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next_u64()) * bound as u128) >> 64) as usize
    }

    /// Fisher-Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

pub fn mean(values: &[f64]) -> Result<f64> {
    check("mean", values, 1)?;
    Ok(values.iter().sum::<f64>() / values.len() as f64)
}

/// Sample standard deviation, with n - 1.
pub fn sd(values: &[f64]) -> Result<f64> {
    check("standard deviation", values, 2)?;
    let mean = mean(values)?;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    Ok((squares / (values.len() - 1) as f64).sqrt())
}

/// Quantile by linear interpolation between order statistics: type 7, the default of R and numpy.
pub fn quantile(values: &[f64], probability: f64) -> Result<f64> {
    check("quantile", values, 1)?;
    ensure!(
        (0.0..=1.0).contains(&probability),
        "a quantile's probability lies in [0, 1], not at {probability}"
    );
    Ok(quantile_of_sorted(&sorted(values), probability))
}

fn quantile_of_sorted(ascending: &[f64], probability: f64) -> f64 {
    let position = probability * (ascending.len() - 1) as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(ascending.len() - 1);
    ascending[below] + (position - below as f64) * (ascending[above] - ascending[below])
}

/// Percentile bootstrap interval of the mean; the values are the sampling units, so one per prompt.
pub fn bootstrap_mean(values: &[f64], draws: usize, confidence: f64, seed: u64) -> Result<Interval> {
    check("bootstrap interval", values, 2)?;
    let n = values.len() as f64;
    let mean = |drawn: &[usize]| Some(vec![drawn.iter().map(|&i| values[i]).sum::<f64>() / n]);
    Ok(bootstrap(values.len(), draws, confidence, seed, mean)?[0])
}

/// Percentile bootstrap intervals of several statistics at once. `statistics` gets the drawn units, as many as there
/// are, with repetition, and returns `None` for a draw that has no value (an empty cell), which is then drawn again.
pub fn bootstrap(
    units: usize,
    draws: usize,
    confidence: f64,
    seed: u64,
    mut statistics: impl FnMut(&[usize]) -> Option<Vec<f64>>,
) -> Result<Vec<Interval>> {
    check_confidence(confidence)?;
    ensure!(units >= 2, "bootstrap interval: {units} units given, at least 2 needed");
    ensure!(draws >= 100, "a bootstrap interval needs at least 100 draws, not {draws}");
    let mut random = SplitMix64::new(seed);
    let mut drawn = vec![0; units];
    let mut columns: Vec<Vec<f64>> = Vec::new();
    let mut redrawn = 0;
    while columns.first().map_or(0, Vec::len) < draws {
        drawn.iter_mut().for_each(|i| *i = random.below(units));
        let Some(values) = statistics(&drawn) else {
            redrawn += 1;
            ensure!(
                redrawn <= draws,
                "more than half of the bootstrap draws have no value: give more prompts"
            );
            continue;
        };
        check("bootstrap statistic", &values, 1)?;
        columns.resize_with(values.len(), Vec::new);
        columns.iter_mut().zip(values).for_each(|(column, value)| column.push(value));
    }
    let tail = (1.0 - confidence) / 2.0;
    let interval = |mut column: Vec<f64>| {
        column.sort_by(f64::total_cmp);
        Interval { low: quantile_of_sorted(&column, tail), high: quantile_of_sorted(&column, 1.0 - tail) }
    };
    Ok(columns.into_iter().map(interval).collect())
}

/// Exact two-sided interval of a rate.
pub fn clopper_pearson(successes: u64, trials: u64, confidence: f64) -> Result<Interval> {
    check_confidence(confidence)?;
    check_rate(successes, trials)?;
    let tail = (1.0 - confidence) / 2.0;
    let (k, n) = (successes as f64, trials as f64);
    let low = if successes == 0 { 0.0 } else { beta_quantile(tail, k, n - k + 1.0)? };
    let high = if successes == trials { 1.0 } else { beta_quantile(1.0 - tail, k + 1.0, n - k)? };
    Ok(Interval { low, high })
}

/// Exact one-sided upper bound of a rate: with no success in n trials, about 3 / n at 95 %.
pub fn clopper_pearson_upper(successes: u64, trials: u64, confidence: f64) -> Result<f64> {
    check_confidence(confidence)?;
    check_rate(successes, trials)?;
    if successes == trials {
        return Ok(1.0);
    }
    beta_quantile(confidence, successes as f64 + 1.0, (trials - successes) as f64)
}

/// By bisection: statrs' own inverse stops at a coarser tolerance than its (accurate) regularised beta function.
fn beta_quantile(probability: f64, a: f64, b: f64) -> Result<f64> {
    let (mut low, mut high) = (0.0_f64, 1.0_f64);
    for _ in 0..100 {
        let middle = (low + high) / 2.0;
        if checked_beta_reg(a, b, middle)? < probability { low = middle } else { high = middle }
    }
    Ok((low + high) / 2.0)
}

/// One-sided p-value that paired differences have a mean above zero, by flipping their signs.
///
/// Exact up to 16 pairs, else 10,000 seeded draws with one added to both counts, so never zero.
pub fn sign_flip_p(differences: &[f64], seed: u64) -> Result<f64> {
    check("paired permutation test", differences, 1)?;
    let observed: f64 = differences.iter().sum();
    // Sums of the same numbers in another order differ in the last bits; without slack a tie would not count.
    let reach = observed - 1e-12 * differences.iter().map(|d| d.abs()).sum::<f64>();
    let n = differences.len();
    if n <= EXACT_SIGN_FLIPS {
        let all = 1_u32 << n;
        let signed = |signs: u32| -> f64 {
            differences.iter().enumerate().map(|(i, d)| if signs >> i & 1 == 1 { -d } else { *d }).sum()
        };
        let extreme = (0..all).filter(|signs| signed(*signs) >= reach).count();
        return Ok(extreme as f64 / f64::from(all));
    }
    let mut random = SplitMix64::new(seed);
    let mut extreme = 0_u32;
    for _ in 0..SIGN_FLIP_DRAWS {
        let mut sum = 0.0;
        let mut bits = 0;
        for (i, d) in differences.iter().enumerate() {
            if i % 64 == 0 {
                bits = random.next_u64();
            }
            sum += if bits >> (i % 64) & 1 == 1 { -d } else { *d };
        }
        extreme += u32::from(sum >= reach);
    }
    Ok(f64::from(extreme + 1) / f64::from(SIGN_FLIP_DRAWS + 1))
}

/// Two-sided p-value that paired differences have a mean other than zero: twice the smaller of the one-sided ones.
pub fn sign_flip_p_two_sided(differences: &[f64], seed: u64) -> Result<f64> {
    let negated: Vec<f64> = differences.iter().map(|d| -d).collect();
    Ok((2.0 * sign_flip_p(differences, seed)?.min(sign_flip_p(&negated, seed)?)).min(1.0))
}

/// p-values corrected for their number by Holm's step-down procedure (1979), in the order given; none for none.
pub fn holm(p_values: &[f64]) -> Result<Vec<f64>> {
    check("p-values to correct", p_values, 0)?;
    ensure!(p_values.iter().all(|p| (0.0..=1.0).contains(p)), "a p-value lies in [0, 1]");
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|&a, &b| p_values[a].total_cmp(&p_values[b]));
    let mut corrected = vec![0.0; p_values.len()];
    let mut largest = 0.0f64;
    for (rank, &i) in order.iter().enumerate() {
        largest = largest.max(((p_values.len() - rank) as f64 * p_values[i]).min(1.0));
        corrected[i] = largest;
    }
    Ok(corrected)
}

/// Rank p-value: the share, itself included, of controls with at least the observed effect.
pub fn rank_p(observed: f64, controls: &[f64]) -> Result<f64> {
    ensure!(observed.is_finite(), "the observed effect is {observed}, so it has no rank among the controls");
    check("rank among controls", controls, 1)?;
    let reached = controls.iter().filter(|c| **c >= observed).count();
    Ok((1 + reached) as f64 / (1 + controls.len()) as f64)
}

/// Chance that a positive scores above a negative, ties counting half.
pub fn auroc(positives: &[f64], negatives: &[f64]) -> Result<f64> {
    check("AUROC of the positives", positives, 1)?;
    check("AUROC of the negatives", negatives, 1)?;
    let ascending = sorted(negatives);
    let won: f64 = positives
        .iter()
        .map(|p| {
            let below = ascending.partition_point(|n| n < p);
            let tied = ascending.partition_point(|n| n <= p) - below;
            below as f64 + tied as f64 / 2.0
        })
        .sum();
    Ok(won / (positives.len() as f64 * negatives.len() as f64))
}

/// Difference of the means over the pooled standard deviation; infinite where both samples are constant and differ.
pub fn cohens_d(a: &[f64], b: &[f64]) -> Result<f64> {
    let (na, nb) = (a.len() as f64, b.len() as f64);
    let pooled = (((na - 1.0) * sd(a)?.powi(2) + (nb - 1.0) * sd(b)?.powi(2)) / (na + nb - 2.0)).sqrt();
    let difference = mean(a)? - mean(b)?;
    // Identical constants are no effect, not 0 / 0.
    Ok(if difference == 0.0 { 0.0 } else { difference / pooled })
}

/// Mean of sensitivity and specificity when scores above the threshold are called positive.
pub fn balanced_accuracy(positives: &[f64], negatives: &[f64], threshold: f64) -> Result<f64> {
    check("balanced accuracy of the positives", positives, 1)?;
    check("balanced accuracy of the negatives", negatives, 1)?;
    ensure!(threshold.is_finite(), "a threshold of {threshold} separates nothing");
    let share =
        |values: &[f64]| values.iter().filter(|v| **v > threshold).count() as f64 / values.len() as f64;
    Ok((share(positives) + 1.0 - share(negatives)) / 2.0)
}

/// An alarm threshold for scores above it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateThreshold {
    pub threshold: f64,
    /// The stated rate.
    pub rate: f64,
    /// Calm scores above the threshold.
    pub exceeded: u64,
    /// Calm scores it was derived from.
    pub sequences: u64,
    /// Upper 95 % Clopper-Pearson bound on the rate seen; at most the stated rate.
    pub rate_upper: f64,
}

/// The fewest calm sequences that support a false-positive rate: the smallest n with (1 - rate)^n <= 0.05.
pub fn sequences_needed(rate: f64) -> Result<u64> {
    ensure!(rate > 0.0 && rate < 1.0, "a false-positive rate lies between 0 and 1, not at {rate}");
    let mut n = (RATE_RISK.ln() / (-rate).ln_1p()).floor().max(1.0) as u64;
    // The logarithms may round either way at the boundary; this condition is the definition.
    while (n as f64 * (-rate).ln_1p()).exp() > RATE_RISK {
        n += 1;
    }
    Ok(n)
}

/// The lowest threshold that, with 95 % confidence, calm sequences exceed at no more than the stated rate.
///
/// One score per calm sequence. With k the largest count whose 95 % Clopper-Pearson upper bound is within the rate,
/// the threshold is the (k + 1)-th largest score: the exceedance rate of that order statistic has the same Beta
/// distribution as the bound, whatever the scores' own distribution. Refused where even k = 0 is too many.
pub fn threshold_at_rate(scores: &[f64], rate: f64) -> Result<RateThreshold> {
    check("alarm threshold", scores, 1)?;
    let needed = sequences_needed(rate)?;
    let n = scores.len() as u64;
    if n < needed {
        bail!(
            "{n} calm sequences cannot support a false-positive rate of {rate}: even without a single alarm the true rate \
             may be {:.4} (95 %); give at least {needed}, or state a higher rate",
            clopper_pearson_upper(0, n, 1.0 - RATE_RISK)?
        );
    }
    let mut allowed = 0;
    while allowed + 1 < n && clopper_pearson_upper(allowed + 1, n, 1.0 - RATE_RISK)? <= rate {
        allowed += 1;
    }
    let ascending = sorted(scores);
    let threshold = ascending[(n - 1 - allowed) as usize];
    let exceeded = ascending.iter().filter(|s| **s > threshold).count() as u64;
    let rate_upper = clopper_pearson_upper(exceeded, n, 1.0 - RATE_RISK)?;
    Ok(RateThreshold { threshold, rate, exceeded, sequences: n, rate_upper })
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut ascending = values.to_vec();
    ascending.sort_by(f64::total_cmp);
    ascending
}

fn check(what: &str, values: &[f64], fewest: usize) -> Result<()> {
    ensure!(values.len() >= fewest, "{what}: {} values given, at least {fewest} needed", values.len());
    if let Some(i) = values.iter().position(|v| !v.is_finite()) {
        bail!("{what}: value {i} is {}, which is not a finite number", values[i]);
    }
    Ok(())
}

fn check_confidence(confidence: f64) -> Result<()> {
    ensure!(confidence > 0.0 && confidence < 1.0, "a confidence lies between 0 and 1, not at {confidence}");
    Ok(())
}

fn check_rate(successes: u64, trials: u64) -> Result<()> {
    ensure!(trials > 0, "a rate needs at least one trial");
    ensure!(successes <= trials, "{successes} successes in {trials} trials is no rate");
    Ok(())
}

#[cfg(test)]
mod tests;
