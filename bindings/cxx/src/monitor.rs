//! Monitors and verdicts.

use crate::bridge::{Aggregation, Kernel, State, Verdict};
use crate::drift::Drift;
use crate::probe::Probe;
use crate::{Failure, invalid};
use emaudit::directions::schema;

/// The state of one sequence.
pub struct Monitor(emaudit::Monitor);

pub fn make_monitor(probe: &Probe, aggregation: Aggregation, rate: f64) -> Result<Box<Monitor>, Failure> {
    let aggregation = match aggregation {
        Aggregation::Mean => schema::Aggregation::Mean,
        Aggregation::Max => schema::Aggregation::Max,
        Aggregation::Last => schema::Aggregation::Last,
        other => return Err(invalid(format!("{} is no aggregation", other.repr))),
    };
    Ok(Box::new(Monitor(emaudit::Monitor::new(&probe.probe, aggregation, rate)?)))
}

impl Monitor {
    pub fn push(&mut self, scores: &[f32]) {
        self.0.push_scores(scores);
    }

    pub fn watch(&mut self, drift: &Drift) -> Result<(), Failure> {
        Ok(self.0.watch(&drift.0)?)
    }

    pub fn verdict(&self) -> Verdict {
        let verdict = self.0.verdict();
        Verdict {
            state: State { repr: verdict.state as u32 },
            misalignment: verdict.misalignment == 1,
            aggregation: Aggregation { repr: verdict.aggregation },
            score: verdict.score,
            threshold: verdict.threshold,
            rate: verdict.rate,
            rate_upper: verdict.rate_upper,
            tokens: verdict.tokens,
            horizon: verdict.horizon,
            layer: verdict.layer,
            kernel: Kernel { repr: verdict.kernel },
            verified: verdict.verified == 1,
            digest: verdict.digest,
        }
    }

    pub fn reset(&mut self) {
        self.0.reset();
    }
}
