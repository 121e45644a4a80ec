//! Per-sequence state: token scores in, a verdict out.

use crate::directions::Directions;
use crate::directions::schema::{Aggregation, Calibration, Specificity, Threshold};
use crate::drift::{Drift, DriftState, Shared};
use crate::error::{Error, Result};
use crate::probe::Probe;
use crate::verdict::{State, Verdict};
use std::sync::Arc;

/// Two rates are the same rate when they differ by less than this share.
const SAME_RATE: f64 = 1e-9;

/// Watches one sequence. Token 1 is the last prompt token; every later token is a generated one.
///
/// The statistic over the first `H` tokens is frozen at each horizon `H` of the file, and a verdict speaks for the largest
/// horizon reached: each holds its own false-positive rate, a later one does not inherit an earlier flag.
/// Fails closed: no token, or a score that is not finite, is [`State::Invalid`], until [`Monitor::reset`].
/// While a [`Drift`] that it watches stands, the calibration does not hold and every other verdict is [`State::Stale`].
///
/// `Send`; belongs to one thread at a time. Nothing allocates after [`Monitor::new`].
/// ```
/// use emaudit::directions::schema::Aggregation;
/// use emaudit::{Monitor, Probe, State};
/// use std::sync::Arc;
///
/// # let directions = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/directions/example.rs"));
/// // `directions` was opened with `Directions::open`; it has thresholds for 2 and 4 tokens at a rate of 1 %.
/// let probe = Probe::new(Arc::new(directions), 1)?;
/// let mut monitor = Monitor::new(&probe, Aggregation::Mean, 0.01)?;
/// assert_eq!(monitor.verdict().state, State::Invalid); // nothing seen is not "clean"
/// monitor.push(0.5);
/// assert_eq!(monitor.verdict().state, State::Pending); // the first threshold is for 2 tokens
/// monitor.push_scores(&[0.5, 8.0, 8.0]);
/// let verdict = monitor.verdict();
/// assert_eq!((verdict.state, verdict.tokens, verdict.horizon), (State::Flagged, 4, 4));
/// assert_eq!(verdict.misalignment, 0u32); // the content evidence of this file is untested
/// // Rates without a threshold are refused.
/// assert!(Monitor::new(&probe, Aggregation::Mean, 0.001).is_err());
/// # Ok::<(), emaudit::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Monitor {
    directions: Arc<Directions>,
    aggregation: Aggregation,
    thresholds: Vec<Threshold>,
    watched: Option<Arc<Shared>>,
    /// The part of every verdict that does not change.
    identity: Verdict,
    content_specific: bool,
    running: Running,
    /// Index into `thresholds` of the next horizon, and the statistic at the one before.
    next: usize,
    frozen: f64,
    invalid: bool,
}

/// The statistic over the tokens so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Running {
    tokens: u32,
    sum: f64,
    largest: f64,
    last: f64,
}

impl Running {
    pub(crate) fn push(&mut self, z: f64) {
        self.largest = if self.tokens == 0 { z } else { self.largest.max(z) };
        self.tokens = self.tokens.saturating_add(1);
        self.sum += z;
        self.last = z;
    }

    pub(crate) fn statistic(&self, aggregation: Aggregation) -> f64 {
        match aggregation {
            Aggregation::Mean => self.sum / f64::from(self.tokens),
            Aggregation::Max => self.largest,
            Aggregation::Last => self.last,
        }
    }
}

impl Monitor {
    /// A monitor with the probe's thresholds of that aggregation and false-positive rate per sequence.
    ///
    /// Errors: [`Error::RateUnsupported`] when the file has none (it says which it has), or the probe has no file.
    pub fn new(probe: &Probe, aggregation: Aggregation, rate: f64) -> Result<Monitor> {
        let (directions, layer, calibration) = calibrated(probe, rate)?;
        let thresholds = select(calibration, aggregation, rate)?;
        let identity = Verdict {
            layer,
            kernel: probe.kernel() as u32,
            verified: directions.verified().into(),
            aggregation: aggregation as u32,
            digest: directions.digest(),
            ..Verdict::default()
        };
        Ok(Monitor {
            directions: directions.clone(),
            aggregation,
            thresholds,
            watched: None,
            identity,
            content_specific: directions.manifest().evidence.content_at(layer) == Specificity::Specific,
            running: Running::default(),
            next: 0,
            frozen: f64::NAN,
            invalid: false,
        })
    }

    /// From now on verdicts follow that drift: [`State::Stale`] while it stands, [`State::Invalid`] while it is invalid, as
    /// without it otherwise. A reset does not end this; another drift replaces it; a dropped one keeps its last state.
    ///
    /// Errors: [`Error::InvalidArgument`] for a drift of another layer or direction file.
    pub fn watch(&mut self, drift: &Drift) -> Result<()> {
        self.watched = Some(drift.shared_with(&self.directions, self.identity.layer)?);
        Ok(())
    }

    /// Takes the score of the next token, in aligned standard deviations.
    pub fn push(&mut self, z: f32) {
        if !z.is_finite() {
            self.invalid = true;
        }
        self.running.push(f64::from(z));
        if self.thresholds.get(self.next).is_some_and(|t| t.horizon == self.running.tokens) {
            self.frozen = self.running.statistic(self.aggregation);
            self.next += 1;
        }
    }

    /// Takes the scores of the next tokens, in order.
    pub fn push_scores(&mut self, scores: &[f32]) {
        scores.iter().for_each(|z| self.push(*z));
    }

    /// What may be said now.
    pub fn verdict(&self) -> Verdict {
        let seen = Verdict { tokens: self.running.tokens, score: f32::NAN, ..self.identity };
        // A drift that is not watched, or has no full window yet, says nothing against the calibration.
        let drift = self.watched.as_ref().map_or(DriftState::Pending, |watched| watched.get());
        if self.invalid || self.running.tokens == 0 || drift == DriftState::Invalid {
            return seen;
        }
        let (threshold, statistic) = match self.next.checked_sub(1) {
            None => (&self.thresholds[0], self.running.statistic(self.aggregation)),
            Some(reached) => (&self.thresholds[reached], self.frozen),
        };
        let state = match self.next {
            _ if drift == DriftState::Drifted => State::Stale,
            0 => State::Pending,
            _ if statistic > threshold.z => State::Flagged,
            _ => State::Clean,
        };
        Verdict {
            state,
            misalignment: (state == State::Flagged && self.content_specific).into(),
            score: statistic as f32,
            threshold: threshold.z as f32,
            rate: threshold.rate,
            rate_upper: threshold.rate_upper,
            horizon: threshold.horizon,
            ..seen
        }
    }

    /// Forgets the sequence, to start another.
    pub fn reset(&mut self) {
        self.running = Running::default();
        self.next = 0;
        self.frozen = f64::NAN;
        self.invalid = false;
    }
}

/// The direction file and layer of a probe; a rate needs a calibration.
pub(crate) fn calibrated(probe: &Probe, rate: f64) -> Result<(&Arc<Directions>, u32, &Calibration)> {
    let unsupported =
        || Error::RateUnsupported { rate, reason: "the probe has no calibrated direction file".into() };
    let (directions, layer) = probe.directions().zip(probe.layer()).ok_or_else(unsupported)?;
    let calibration = directions.layer(layer)?.calibration.ok_or_else(unsupported)?;
    Ok((directions, layer, calibration))
}

/// The thresholds of one aggregation and rate, by horizon; never empty.
fn select(calibration: &Calibration, aggregation: Aggregation, rate: f64) -> Result<Vec<Threshold>> {
    let same = |t: &&Threshold| t.statistic == aggregation && same_rate(t.rate, rate);
    let mut found: Vec<_> = calibration.thresholds.iter().filter(same).copied().collect();
    found.sort_by_key(|t| t.horizon);
    if found.is_empty() {
        return Err(Error::RateUnsupported { rate, reason: offered(calibration, aggregation) });
    }
    if found[0].horizon == 0 || found.windows(2).any(|pair| pair[0].horizon == pair[1].horizon) {
        return Err(Error::Schema("a threshold has horizon 0 or repeats another".into()));
    }
    Ok(found)
}

pub(crate) fn same_rate(a: f64, b: f64) -> bool {
    (a - b).abs() <= SAME_RATE * b.abs()
}

/// A sentence that names the rates there are.
pub(crate) fn offered(calibration: &Calibration, aggregation: Aggregation) -> String {
    let mut rates: Vec<_> =
        calibration.thresholds.iter().filter(|t| t.statistic == aggregation).map(|t| t.rate).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    if rates.is_empty() {
        return format!("the file has none for the {} over tokens", aggregation.as_str());
    }
    format!("for the {} over tokens the file has the rates {rates:?}", aggregation.as_str())
}
