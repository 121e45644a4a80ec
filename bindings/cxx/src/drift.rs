//! Drifts.

use crate::Failure;
use crate::bridge::{DriftReport, DriftState};
use crate::probe::Probe;

/// Is the aligned distribution still the one of the calibration?
pub struct Drift(pub(crate) emaudit::Drift);

pub fn make_drift(probe: &Probe, window: u32, rate: f64) -> Result<Box<Drift>, Failure> {
    Ok(Box::new(Drift(emaudit::Drift::new(&probe.probe, window, rate)?)))
}

impl Drift {
    pub fn push(&mut self, scores: &[f32]) {
        self.0.push_scores(scores);
    }

    pub fn report(&self) -> DriftReport {
        let report = self.0.report();
        DriftReport {
            state: DriftState { repr: report.state as u32 },
            window: report.window,
            sequences: report.sequences,
            windows: report.windows,
            rate: report.rate,
            probability: report.probability,
            z: report.z,
            share: report.share,
            lowest: report.lowest,
            highest: report.highest,
        }
    }

    pub fn reset(&mut self) {
        self.0.reset();
    }
}
