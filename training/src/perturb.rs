//! Edits of rows beyond one subtracted vector, and their controls at matched perturbation.
//!
//! The library serves subtracting, projecting out and clamping, each gated or not; a gated clamp is [`gated_clamp`]. What
//! the study names as future work and the library does not serve is evaluated offline here, on f32 rows: projecting out
//! a subspace ([`subspace`]) and a learned gate ([`gate`]).
//!
//! A control replaces where a row is moved to and nothing else. The true edit, its gate included, is computed on the
//! control's own row, and the row is moved by the norm of that along the control: so what is closed to the true edit is
//! closed to its controls. A single vector is controlled by single vectors, a subspace of rank k by subspaces of rank k
//! (every row along its own component in them). What a gate adds is not a matter of these controls, which share it: for
//! that, compare the gated edit with the ungated one and with [`gate::Reassigned`].

pub mod gate;
pub mod subspace;

use crate::generate::steer_rows;
use crate::matrix::{dot, widened};
use anyhow::{Result, ensure};
use emaudit::{Operation, Probe, Steering, SteeringOptions};
use subspace::Subspace;

/// Something that edits rows of the residual stream.
pub trait RowEdit: Send + Sync {
    /// Edits `rows` (`n x hidden`, row-major, activation units) in place; on an error they are unspecified.
    ///
    /// Errors: rows of another width, or with a value that is not finite.
    fn edit(&self, rows: &mut [f32], hidden: usize) -> Result<()>;
}

impl RowEdit for Steering {
    fn edit(&self, rows: &mut [f32], hidden: usize) -> Result<()> {
        Ok(steer_rows(rows, hidden, self)?)
    }
}

/// The library's clamp behind its gate: rows scoring above `gate` are lowered to `ceiling`, both in aligned standard
/// deviations (`sigma`, activation units). A gate at or below the ceiling changes nothing that the clamp does not.
pub fn gated_clamp(
    direction: &[f32],
    aligned_mean: &[f32],
    sigma: f64,
    ceiling: f32,
    gate: f32,
) -> Result<Steering> {
    let probe = Probe::from_vectors(direction, aligned_mean, sigma, None)?;
    let operation = Operation::Clamp { ceiling };
    // Offline evaluation is what makes the evidence, so it cannot ask for it.
    let options =
        SteeringOptions { gate: Some(gate), allow_nonspecific: true, ..SteeringOptions::new(operation) };
    Ok(Steering::new(&probe, options)?)
}

/// `|dh|` of every row under an edit, from the rows it leaves: within half an ulp of `h` per element.
pub fn change_norms(edit: &dyn RowEdit, rows: &[f32], hidden: usize) -> Result<Vec<f64>> {
    let mut after = rows.to_vec();
    edit.edit(&mut after, hidden)?;
    let change = |(a, b): (&[f32], &[f32])| {
        a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
    };
    Ok(after.chunks(hidden).zip(rows.chunks(hidden)).map(change).collect())
}

/// Where a control moves a row.
#[derive(Clone, Debug)]
pub enum Shape {
    /// Against one vector, whatever its length.
    Along(Vec<f32>),
    /// Against the row's own component in a subspace.
    Within(Subspace),
}

/// A control at matched perturbation: every row is moved by the norm that `truth` would move it.
pub struct Matched<'a> {
    truth: &'a dyn RowEdit,
    shape: Shape,
}

impl<'a> Matched<'a> {
    /// Errors: a control vector that is zero or not finite.
    pub fn new(truth: &'a dyn RowEdit, shape: Shape) -> Result<Self> {
        if let Shape::Along(vector) = &shape {
            let size = crate::extract::norm(vector);
            ensure!(size > 0.0 && size.is_finite(), "a control vector of norm {size} points nowhere");
        }
        Ok(Matched { truth, shape })
    }

    /// The unit vector a row is moved against.
    fn axis(&self, row: &[f32]) -> Vec<f64> {
        let axis = match &self.shape {
            Shape::Along(vector) => widened(vector),
            Shape::Within(subspace) => subspace.component(row),
        };
        let size = dot(&axis, &axis).sqrt();
        axis.iter().map(|a| a / size).collect()
    }
}

impl RowEdit for Matched<'_> {
    fn edit(&self, rows: &mut [f32], hidden: usize) -> Result<()> {
        let width = match &self.shape {
            Shape::Along(vector) => vector.len(),
            Shape::Within(subspace) => subspace.width(),
        };
        ensure!(width == hidden, "a control of width {width} for rows of width {hidden}");
        let norms = change_norms(self.truth, rows, hidden)?;
        for (i, (row, norm)) in rows.chunks_mut(hidden).zip(norms).enumerate().filter(|(_, (_, n))| *n > 0.0)
        {
            let axis = self.axis(row);
            ensure!(axis.iter().all(|a| a.is_finite()), "row {i} has no component in the control's subspace");
            row.iter_mut().zip(&axis).for_each(|(h, a)| *h = (f64::from(*h) - norm * a) as f32);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
