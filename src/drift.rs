//! Are calm sequences still calm in the way the thresholds were calibrated on? If not, verdicts are stale.

use crate::directions::Directions;
use crate::directions::schema::Calibration;
use crate::error::{Error, Result};
use crate::monitor::calibrated;
use crate::probe::Probe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Larger windows are refused: the first verdict on drift would come too late to be of use.
const LARGEST_WINDOW: u32 = 1 << 20;

/// What a [`Drift`] knows. The numbers are pinned for C.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DriftState {
    /// A reference score was not finite: nothing may be concluded until [`Drift::reset`].
    #[default]
    Invalid = 0,
    /// No window is full yet.
    Pending = 1,
    /// The last full window lies where the calibration says. Not a proof that nothing changed.
    Steady = 2,
    /// The last full window does not: the thresholds no longer keep their rate.
    Drifted = 3,
}

/// The state as monitors see it: one writer, any number of readers, no lock.
#[derive(Debug)]
pub(crate) struct Shared(AtomicU32);

impl Shared {
    pub(crate) fn get(&self) -> DriftState {
        match self.0.load(Ordering::Acquire) {
            1 => DriftState::Pending,
            2 => DriftState::Steady,
            3 => DriftState::Drifted,
            _ => DriftState::Invalid,
        }
    }

    fn set(&self, state: DriftState) {
        self.0.store(state as u32, Ordering::Release);
    }
}

/// What is known after the last full window, and where it stood out most. The five numbers about that quantile are NaN
/// before the first full window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DriftReport {
    /// What may be concluded.
    pub state: DriftState,
    /// Reference sequences per window.
    pub window: u32,
    /// Sequences in the window that is being filled.
    pub sequences: u32,
    /// Full windows so far.
    pub windows: u64,
    /// Stated false-alarm rate per window.
    pub rate: f64,
    /// The quantile of the file at which the last full window stood out most: its probability,
    pub probability: f64,
    /// its score in aligned standard deviations,
    pub z: f64,
    /// the share of the window at or below that score,
    pub share: f64,
    /// and the lowest
    pub lowest: f64,
    /// and the highest share that is steady.
    pub highest: f64,
}

/// Watches the aligned distribution itself, on sequences that the caller vouches for as calm: canary prompts, or traffic
/// of the approved model. One score per sequence, that of the last prompt token, as the file's quantiles are.
///
/// After every `window` sequences the scores are compared with the quantiles of the file. If a quantile is the `k`-th
/// smallest of `m` calibration scores, the number of `n` new scores up to it is beta-binomial with `n`, `k`, `m + 1 - k`,
/// whatever the distribution of the scores: this is exact, and holds the uncertainty of the window and that of the
/// calibration. A window has drifted when at any of the file's `q` quantiles that number is so small or so large that its
/// tail is at most `rate / 2q`; so a window of sequences like those of the calibration alarms with a probability of at most
/// `rate`. (Windows share the calibration: after an unlucky calibration false alarms come together.) Sequences are alike when
/// model *and* prompts are: a drift is also reported where the prompts changed, and then the thresholds do not hold either.
///
/// What it can see: the smallest shift of the mean, in aligned standard deviations, and the smallest factor on the
/// standard deviation that a window detects in 9 of 10 cases; normal scores, 400 calibration sequences, the nine
/// quantiles 1, 5, 10, 25, 50, 75, 90, 95 and 99 %, rate 0.01.
///
/// | window | shift | factor |
/// |---|---|---|
/// | 25 | 1.20 | 4.31 |
/// | 50 | 0.88 | 2.52 |
/// | 100 | 0.65 | 1.94 |
/// | 200 | 0.49 | 1.70 |
/// | 400 | 0.38 | 1.52 |
/// | 1000 | 0.30 | 1.39 |
///
/// ```
/// use emaudit::directions::schema::Aggregation;
/// use emaudit::{Drift, DriftState, Monitor, Probe, State};
/// use std::sync::Arc;
///
/// # let directions = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/directions/example.rs"));
/// // `directions` was opened with `Directions::open`.
/// let probe = Probe::new(Arc::new(directions), 1)?;
/// let mut drift = Drift::new(&probe, 50, 0.01)?;
/// let mut monitor = Monitor::new(&probe, Aggregation::Mean, 0.01)?;
/// monitor.watch(&drift)?;
/// monitor.push_scores(&[0.5, 0.5]);
/// assert_eq!(monitor.verdict().state, State::Clean);
///
/// drift.push_scores(&[2.0; 50]); // fifty canary prompts, all far above the median of the file
/// assert_eq!(drift.state(), DriftState::Drifted);
/// assert_eq!(monitor.verdict().state, State::Stale);
/// // A window that could never alarm is refused.
/// assert!(Drift::new(&probe, 1, 0.01).is_err());
/// # Ok::<(), emaudit::Error>(())
/// ```
///
/// `Send`; one thread at a time writes it, and any number of monitors on any threads watch it
/// ([`Monitor::watch`](crate::Monitor::watch)). Nothing allocates, locks or blocks after [`Drift::new`].
#[derive(Debug)]
pub struct Drift {
    directions: Arc<Directions>,
    layer: u32,
    window: u32,
    rate: f64,
    quantiles: Vec<Quantile>,
    sequences: u32,
    windows: u64,
    /// The quantile that stood out in the last full window, with its counts.
    worst: Option<Quantile>,
    shared: Arc<Shared>,
}

/// A quantile of the file, the counts up to it that are steady, and the counts of the window being filled.
#[derive(Clone, Copy, Debug)]
struct Quantile {
    probability: f64,
    z: f64,
    lowest: u32,
    highest: u32,
    below: u32,
    up_to: u32,
}

impl Quantile {
    /// Files interpolate quantiles in several ways; in all of them `z` lies between the order statistics of the ranks
    /// `floor(p m)` and `ceil(p m) + 1`, so the lower limit rests on the one and the upper limit on the other.
    fn new((probability, z): (f64, f64), calibration: u32, window: u32, tail: f64) -> Quantile {
        let m = f64::from(calibration);
        let (lower, upper) = ((probability * m).floor(), (probability * m).ceil() + 1.0);
        let lowest = if lower >= 1.0 { rare_counts(window, lower, m + 1.0 - lower, tail) } else { 0 };
        // Seen from above, the counts over the quantile are the small ones.
        let over = if upper <= m { rare_counts(window, m + 1.0 - upper, upper, tail) } else { 0 };
        Quantile { probability, z, lowest, highest: window - over, below: 0, up_to: 0 }
    }

    fn push(&mut self, z: f64) {
        self.below += u32::from(z < self.z);
        self.up_to += u32::from(z <= self.z);
    }

    /// How far the counts lie from the expected one, in units of what is steady; above 1 is drift. Scores equal to the
    /// quantile count on whichever side is calmer.
    fn strain(&self, window: u32) -> f64 {
        let expected = self.probability * f64::from(window);
        let side =
            |excess: f64, room: f64| if excess > 0.0 { excess / room.max(f64::MIN_POSITIVE) } else { 0.0 };
        let many = side(f64::from(self.below) - expected, f64::from(self.highest) - expected);
        let few = side(expected - f64::from(self.up_to), expected - f64::from(self.lowest));
        many.max(few)
    }

    fn drifted(&self) -> bool {
        self.below > self.highest || self.up_to < self.lowest
    }
}

/// How many of the smallest counts have, together, a probability of at most `tail`: the count is beta-binomial, that of
/// the successes in `n` trials whose probability is drawn from Beta(`a`, `b`).
fn rare_counts(n: u32, a: f64, b: f64, tail: f64) -> u32 {
    let trials = f64::from(n);
    let mut log_probability: f64 = (0..n).map(|i| ((b + f64::from(i)) / (a + b + f64::from(i))).ln()).sum();
    let mut sum = 0.0;
    for count in 0..n {
        sum += log_probability.exp();
        if sum > tail {
            return count;
        }
        let x = f64::from(count);
        log_probability += ((trials - x) * (a + x) / ((x + 1.0) * (b + trials - x - 1.0))).ln();
    }
    n
}

fn limits(calibration: &Calibration, window: u32, rate: f64) -> Vec<Quantile> {
    let tail = rate / (2.0 * calibration.quantiles.len() as f64);
    let limit = |pair: &(f64, f64)| Quantile::new(*pair, calibration.sequences, window, tail);
    calibration.quantiles.iter().map(limit).collect()
}

/// Whether some window of that size would alarm for scores that are too high, and another for too low ones.
fn sees(quantiles: &[Quantile], window: u32) -> bool {
    quantiles.iter().any(|q| q.lowest > 0) && quantiles.iter().any(|q| q.highest < window)
}

impl Drift {
    /// Watches the aligned distribution of the probe's layer in windows of `window` sequences, at a stated false-alarm
    /// rate per window.
    ///
    /// Errors: [`Error::InvalidArgument`] for a rate outside (0, 1) or a window of 0 or above 2^20;
    /// [`Error::RateUnsupported`] when the probe has no file, the file no quantiles, or the window is too small to ever
    /// alarm at that rate.
    pub fn new(probe: &Probe, window: u32, rate: f64) -> Result<Drift> {
        if !(rate > 0.0 && rate < 1.0) {
            return Err(Error::InvalidArgument(format!("a rate of {rate}; it must be above 0 and below 1")));
        }
        if window == 0 || window > LARGEST_WINDOW {
            let sentence = format!("a window of {window} sequences; it must be from 1 to {LARGEST_WINDOW}");
            return Err(Error::InvalidArgument(sentence));
        }
        let (directions, layer, calibration) = calibrated(probe, rate)?;
        let quantiles = limits(calibration, window, rate);
        if !sees(&quantiles, window) {
            return Err(Error::RateUnsupported { rate, reason: unseeing(calibration, window, rate) });
        }
        let shared = Arc::new(Shared(AtomicU32::new(DriftState::Pending as u32)));
        let directions = directions.clone();
        Ok(Drift {
            directions,
            layer,
            window,
            rate,
            quantiles,
            sequences: 0,
            windows: 0,
            worst: None,
            shared,
        })
    }

    /// Takes the score of the next calm sequence: its last prompt token, in aligned standard deviations. A score that is
    /// not finite makes the state invalid until [`Drift::reset`].
    pub fn push(&mut self, z: f32) {
        if !z.is_finite() {
            self.shared.set(DriftState::Invalid);
        }
        if self.state() == DriftState::Invalid {
            return;
        }
        self.quantiles.iter_mut().for_each(|q| q.push(f64::from(z)));
        self.sequences += 1;
        if self.sequences == self.window {
            self.close_window();
        }
    }

    /// Takes the scores of the next calm sequences.
    pub fn push_scores(&mut self, scores: &[f32]) {
        scores.iter().for_each(|z| self.push(*z));
    }

    fn close_window(&mut self) {
        let drifted = self.quantiles.iter().any(Quantile::drifted);
        let strain = |q: &Quantile| q.strain(self.window);
        self.worst = self.quantiles.iter().max_by(|a, b| strain(a).total_cmp(&strain(b))).copied();
        self.empty_window();
        self.windows += 1;
        self.shared.set(if drifted { DriftState::Drifted } else { DriftState::Steady });
    }

    fn empty_window(&mut self) {
        self.sequences = 0;
        for quantile in &mut self.quantiles {
            (quantile.below, quantile.up_to) = (0, 0);
        }
    }

    /// What is known now.
    pub fn state(&self) -> DriftState {
        self.shared.get()
    }

    /// The state with the numbers behind it.
    pub fn report(&self) -> DriftReport {
        let share = |count: u32| f64::from(count) / f64::from(self.window);
        let of = |value: fn(&Quantile) -> f64| self.worst.as_ref().map_or(f64::NAN, value);
        let count = |value: fn(&Quantile) -> u32| self.worst.as_ref().map_or(f64::NAN, |q| share(value(q)));
        DriftReport {
            state: self.state(),
            window: self.window,
            sequences: self.sequences,
            windows: self.windows,
            rate: self.rate,
            probability: of(|q| q.probability),
            z: of(|q| q.z),
            share: count(|q| q.up_to),
            lowest: count(|q| q.lowest),
            highest: count(|q| q.highest),
        }
    }

    /// Forgets all windows; the monitors that watch it see it pending.
    pub fn reset(&mut self) {
        self.empty_window();
        self.windows = 0;
        self.worst = None;
        self.shared.set(DriftState::Pending);
    }

    /// The state for a monitor of that layer of those directions.
    pub(crate) fn shared_with(&self, directions: &Arc<Directions>, layer: u32) -> Result<Arc<Shared>> {
        let same_file = Arc::ptr_eq(&self.directions, directions)
            || (directions.digest() != [0; 32] && directions.digest() == self.directions.digest());
        if same_file && layer == self.layer {
            return Ok(Arc::clone(&self.shared));
        }
        let sentence = "the monitor and the drift it should watch are of different layers or direction files";
        Err(Error::InvalidArgument(sentence.into()))
    }
}

/// Why this window could never alarm, and one that could.
fn unseeing(calibration: &Calibration, window: u32, rate: f64) -> String {
    if calibration.quantiles.is_empty() {
        return "the file has no quantiles of the aligned distribution to compare with".into();
    }
    let doubled = std::iter::successors(Some(window), |n| Some(n * 2).filter(|n| *n <= LARGEST_WINDOW));
    let enough = doubled.skip(1).find(|n| sees(&limits(calibration, *n, rate), *n));
    let mend = enough.map_or("calibrate on more sequences, or state a higher rate".to_owned(), |n| {
        format!("{n} are enough")
    });
    format!("a window of {window} sequences could never show a drift; {mend}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rare_counts_are_those_of_the_definition() {
        // With a = b = 1 all counts from 0 to n are equally likely.
        let uniform = |tail| rare_counts(3, 1.0, 1.0, tail);
        assert_eq!([0.1, 0.26, 0.51, 0.76].map(uniform), [0, 1, 2, 3]);
        // The k-th smallest of m, and n more: C(x + k - 1, x) C(n - x + m - k, n - x) / C(n + m, n) have x below it.
        let choose = |n: u32, k: u32| (0..k).fold(1.0, |c, i| c * f64::from(n - i) / f64::from(i + 1));
        let mut compared = 0;
        for (n, m, k) in [(5, 7, 1), (20, 12, 6), (30, 40, 39), (1, 2, 1), (12, 3, 3)] {
            let probability = |x| choose(x + k - 1, x) * choose(n - x + m - k, n - x) / choose(n + m, n);
            let mut cumulative = 0.0;
            for count in 0..n {
                // A tail a little above what these counts have together reaches to the next one, no further.
                cumulative += probability(count);
                let found = rare_counts(n, f64::from(k), f64::from(m + 1 - k), cumulative * (1.0 + 1e-9));
                assert_eq!(found, count + 1, "n {n}, m {m}, k {k}");
                compared += 1;
            }
        }
        assert!(compared > 60);
    }

    /// The normal distribution function: a series that converges everywhere.
    fn phi(x: f64) -> f64 {
        let (mut term, mut sum, mut odd) = (x, x, 1.0);
        while f64::abs(term) > 1e-17 {
            odd += 2.0;
            term *= x * x / odd;
            sum += term;
        }
        0.5 + sum * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
    }

    /// The score below which a normal one lies with that probability.
    fn normal_quantile(p: f64) -> f64 {
        let (mut low, mut high) = (-6.0, 6.0);
        while high - low > 1e-12 {
            let middle = (low + high) / 2.0;
            if phi(middle) < p { low = middle } else { high = middle }
        }
        low
    }

    /// How likely a binomial count leaves the range.
    fn leaves(quantile: &Quantile, n: u32, p: f64) -> f64 {
        if p <= 0.0 || p >= 1.0 {
            let count = if p <= 0.0 { 0 } else { n };
            return f64::from(u8::from(count < quantile.lowest || count > quantile.highest));
        }
        let mut log_probability = f64::from(n) * (1.0 - p).ln();
        let mut sum = 0.0;
        for x in 0..=n {
            if x < quantile.lowest || x > quantile.highest {
                sum += log_probability.exp();
            }
            log_probability += (f64::from(n - x) / f64::from(x + 1) * p / (1.0 - p)).ln();
        }
        sum
    }

    /// The smallest change, in steps of 0.01 and from `start`, that the best single quantile notices in 9 of 10 windows.
    fn smallest(quantiles: &[Quantile], n: u32, start: f64, share: impl Fn(f64, f64) -> f64) -> f64 {
        let seen = |change: f64| {
            let power = |q: &Quantile| leaves(q, n, share(q.z, change));
            quantiles.iter().map(power).fold(0.0, f64::max) >= 0.9
        };
        let mut steps = 1;
        while !seen(start + f64::from(steps) / 100.0) {
            steps += 1;
        }
        start + f64::from(steps) / 100.0
    }

    #[test]
    fn the_table_in_the_documentation_is_what_the_test_can_see() {
        let probabilities = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99];
        let quantiles = probabilities.map(|p| (p, normal_quantile(p))).to_vec();
        assert!((quantiles[7].1 - 1.644854).abs() < 1e-6);
        let calibration = Calibration { sigma: 1.0, sequences: 400, quantiles, thresholds: vec![] };
        let mut rows = String::new();
        for window in [25, 50, 100, 200, 400, 1000] {
            let limits = limits(&calibration, window, 0.01);
            let shift = smallest(&limits, window, 0.0, |z, shift| phi(z - shift));
            let factor = smallest(&limits, window, 1.0, |z, factor| phi(z / factor));
            rows += &format!("/// | {window} | {shift:.2} | {factor:.2} |\n");
        }
        assert!(include_str!("drift.rs").contains(&rows), "the table should be:\n{rows}");
    }
}
