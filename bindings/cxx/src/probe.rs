//! Probes.

use crate::bridge::{Kernel, Unit};
use crate::directions::Directions;
use crate::{Failure, invalid};
use emaudit::activations::{Element, Rows};
use emaudit::{KernelKind, RowStatus, ScoreUnit};
use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use std::sync::Arc;

/// One layer's direction, bound to a kernel.
pub struct Probe {
    pub(crate) probe: emaudit::Probe,
    layer: u32,
}

pub fn make_probe(directions: &Directions, layer: u32, kernel: Kernel) -> Result<Box<Probe>, Failure> {
    let shared = Arc::clone(&directions.0);
    let probe = match kernel {
        Kernel::Best => emaudit::Probe::new(shared, layer)?,
        forced => emaudit::Probe::with_kernel(shared, layer, KernelKind::try_from(forced.repr)?)?,
    };
    Ok(Box::new(Probe { probe, layer }))
}

pub fn kernel_available(kernel: Kernel) -> bool {
    kernel == Kernel::Best || emaudit::kernel::available().iter().any(|kind| *kind as u32 == kernel.repr)
}

/// Row statuses on their way to C++, where they are plain bytes.
pub(crate) struct Statuses<'a> {
    bytes: &'a mut [u8],
    rows: Vec<RowStatus>,
}

impl<'a> Statuses<'a> {
    /// Room for one status per row, or none when the slice is empty.
    pub(crate) fn new(bytes: &'a mut [u8], rows: usize) -> Result<Self, Failure> {
        if !bytes.is_empty() && bytes.len() != rows {
            return Err(invalid(format!("{} row statuses for {rows} rows", bytes.len())));
        }
        let rows = vec![RowStatus::NonFinite; bytes.len()];
        Ok(Statuses { bytes, rows })
    }

    /// Runs a call and hands over what it wrote, unless it was refused.
    pub(crate) fn run<T>(
        self,
        call: impl FnOnce(Option<&mut [RowStatus]>) -> emaudit::Result<T>,
    ) -> Result<T, Failure> {
        let Statuses { bytes, mut rows } = self;
        let outcome = call((!rows.is_empty()).then_some(&mut rows[..]));
        if matches!(outcome, Ok(_) | Err(emaudit::Error::NonFinite { .. })) {
            bytes.iter_mut().zip(rows).for_each(|(byte, status)| *byte = status as u8);
        }
        Ok(outcome?)
    }
}

impl Probe {
    pub fn width(&self) -> usize {
        self.probe.width()
    }

    pub fn layer(&self) -> u32 {
        self.layer
    }

    pub fn kernel(&self) -> Kernel {
        Kernel { repr: self.probe.kernel() as u32 }
    }

    fn score_as<T: Element>(
        &self,
        rows: &[T],
        unit: Unit,
        scores: &mut [f32],
        status: &mut [u8],
    ) -> Result<(), Failure> {
        let (count, width) = (scores.len(), self.width());
        check_rows(rows.len(), count, width)?;
        let unit = ScoreUnit::try_from(unit.repr)?;
        let view = Rows::new(rows, count, width, width)?;
        Statuses::new(status, count)?.run(|status| self.probe.score(&view, unit, scores, status))
    }

    pub fn score(
        &self,
        rows: &[f32],
        unit: Unit,
        scores: &mut [f32],
        status: &mut [u8],
    ) -> Result<(), Failure> {
        self.score_as(rows, unit, scores, status)
    }

    pub fn score_f16(
        &self,
        rows: &[u16],
        unit: Unit,
        scores: &mut [f32],
        status: &mut [u8],
    ) -> Result<(), Failure> {
        self.score_as(rows.reinterpret_cast::<f16>(), unit, scores, status)
    }

    pub fn score_bf16(
        &self,
        rows: &[u16],
        unit: Unit,
        scores: &mut [f32],
        status: &mut [u8],
    ) -> Result<(), Failure> {
        self.score_as(rows.reinterpret_cast::<bf16>(), unit, scores, status)
    }
}

/// Whole rows, as many as there are scores.
fn check_rows(elements: usize, rows: usize, width: usize) -> Result<(), Failure> {
    if rows.checked_mul(width) == Some(elements) {
        return Ok(());
    }
    if rows > 0 && elements.is_multiple_of(rows) {
        return Err(Failure(emaudit::Error::WidthMismatch { expected: width, found: elements / rows }));
    }
    Err(invalid(format!("{elements} elements are not {rows} rows of {width}")))
}
