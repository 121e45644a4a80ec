//! Steering.

use crate::bridge::{LandingReport, Operation, SteerReport, SteeringOptions};
use crate::probe::{Probe, Statuses};
use crate::{Failure, invalid};
use emaudit::activations::{Element, Rows, RowsMut};
use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};

/// A checked way to edit rows.
pub struct Steering(emaudit::Steering);

fn operation(options: &SteeringOptions) -> Result<emaudit::Operation, Failure> {
    let SteeringOptions { alpha, ceiling, .. } = *options;
    match options.operation {
        Operation::Subtract => Ok(emaudit::Operation::Subtract { alpha }),
        Operation::ProjectOut => Ok(emaudit::Operation::ProjectOut { alpha }),
        Operation::Clamp => Ok(emaudit::Operation::Clamp { ceiling }),
        other => Err(invalid(format!("{} is no operation", other.repr))),
    }
}

pub fn make_steering(probe: &Probe, options: &SteeringOptions) -> Result<Box<Steering>, Failure> {
    let options = emaudit::SteeringOptions {
        operation: operation(options)?,
        gate: options.has_gate.then_some(options.gate),
        dose_limit: options.has_dose_limit.then_some(options.dose_limit),
        allow_nonspecific: options.allow_nonspecific,
    };
    Ok(Box::new(Steering(emaudit::Steering::new(&probe.probe, options)?)))
}

impl Steering {
    fn apply_as<T: Element>(
        &self,
        rows: &mut [T],
        strengths: &[f32],
        status: &mut [u8],
    ) -> Result<SteerReport, Failure> {
        let width = self.0.probe().width();
        if !rows.len().is_multiple_of(width) {
            return Err(invalid(format!("{} elements are no whole rows of {width}", rows.len())));
        }
        let count = rows.len() / width;
        let mut rows = RowsMut::new(rows, count, width, width)?;
        let strengths = (!strengths.is_empty()).then_some(strengths);
        let statuses = Statuses::new(status, count)?;
        let report = statuses.run(|status| self.0.apply(&mut rows, strengths, status))?;
        Ok(SteerReport {
            rows: report.rows,
            touched: report.touched,
            gated: report.gated,
            limited: report.limited,
            largest_dose: report.largest_dose,
        })
    }

    pub fn apply(
        &self,
        rows: &mut [f32],
        strengths: &[f32],
        status: &mut [u8],
    ) -> Result<SteerReport, Failure> {
        self.apply_as(rows, strengths, status)
    }

    pub fn apply_f16(
        &self,
        rows: &mut [u16],
        strengths: &[f32],
        status: &mut [u8],
    ) -> Result<SteerReport, Failure> {
        self.apply_as(rows.reinterpret_cast_mut::<f16>(), strengths, status)
    }

    pub fn apply_bf16(
        &self,
        rows: &mut [u16],
        strengths: &[f32],
        status: &mut [u8],
    ) -> Result<SteerReport, Failure> {
        self.apply_as(rows.reinterpret_cast_mut::<bf16>(), strengths, status)
    }

    fn check_landed_as<T: Element>(
        &self,
        before: &[T],
        after: &[T],
        strengths: &[f32],
        deviations: &mut [f32],
    ) -> Result<LandingReport, Failure> {
        let width = self.0.probe().width();
        if !before.len().is_multiple_of(width) || before.len() != after.len() {
            let lengths = format!("{} and {} elements", before.len(), after.len());
            return Err(invalid(format!("{lengths} are not the same number of whole rows of {width}")));
        }
        let rows = before.len() / width;
        let (before, after) = (Rows::new(before, rows, width, width)?, Rows::new(after, rows, width, width)?);
        let strengths = (!strengths.is_empty()).then_some(strengths);
        let deviations = (!deviations.is_empty()).then_some(deviations);
        let report = self.0.check_landed(&before, &after, strengths, deviations)?;
        Ok(LandingReport {
            rows: report.rows,
            landed: report.landed,
            lost: report.lost,
            untouched: report.untouched,
            missed: report.missed,
            nonfinite: report.nonfinite,
            largest_deviation: report.largest_deviation,
        })
    }

    pub fn check_landed(
        &self,
        before: &[f32],
        after: &[f32],
        strengths: &[f32],
        deviations: &mut [f32],
    ) -> Result<LandingReport, Failure> {
        self.check_landed_as(before, after, strengths, deviations)
    }

    pub fn check_landed_f16(
        &self,
        before: &[u16],
        after: &[u16],
        strengths: &[f32],
        deviations: &mut [f32],
    ) -> Result<LandingReport, Failure> {
        let (before, after) = (before.reinterpret_cast::<f16>(), after.reinterpret_cast::<f16>());
        self.check_landed_as(before, after, strengths, deviations)
    }

    pub fn check_landed_bf16(
        &self,
        before: &[u16],
        after: &[u16],
        strengths: &[f32],
        deviations: &mut [f32],
    ) -> Result<LandingReport, Failure> {
        let (before, after) = (before.reinterpret_cast::<bf16>(), after.reinterpret_cast::<bf16>());
        self.check_landed_as(before, after, strengths, deviations)
    }
}
