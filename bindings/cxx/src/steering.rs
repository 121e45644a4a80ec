//! Steering.

use crate::bridge::{Operation, SteerReport, SteeringOptions};
use crate::probe::{Probe, Statuses};
use crate::{Failure, invalid};
use emaudit::activations::{Element, RowsMut};
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
}
