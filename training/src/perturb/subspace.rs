//! Projecting out a subspace that several directions span: `h -= alpha Q Q' (h - m)`, Q orthonormal, `hidden x k`.

use super::RowEdit;
use crate::battery::control_seed;
use crate::matrix::{Svd, check_rows, dot, narrowed, widened};
use anyhow::{Result, bail, ensure};
use emaudit::controls::{self, SplitMix64};
use faer::Mat;

/// A direction counts for the rank when its singular value is above this share of the largest: directions are f32.
const DEPENDENT: f64 = 1e-5;

/// An orthonormal basis of rank k, what is removed along it, and around which point.
#[derive(Clone, Debug, PartialEq)]
pub struct Subspace {
    basis: Vec<Vec<f64>>,
    around: Vec<f64>,
    alpha: f64,
}

/// One control subspace.
#[derive(Clone, Debug)]
pub struct SubspaceControl {
    /// `random`, `orthogonal`, `covariance` or `label_shuffled`.
    pub family: &'static str,
    /// Seed that regenerates it.
    pub seed: u64,
    /// Of the same rank, around the same point.
    pub subspace: Subspace,
}

impl Subspace {
    /// The `rank` leading left singular vectors of the directions, each first brought to length one (so a long direction
    /// does not outvote a short one); `rank == directions.len()` is their whole span. `around` is the point `m` that
    /// is left in place: zeros for the plain projection, the aligned mean to keep what aligned rows have there.
    ///
    /// Errors: no direction, widths that differ, a zero or non-finite vector, a rank of zero or above what the
    /// directions span, alpha not finite.
    pub fn spanned(directions: &[Vec<f32>], rank: usize, around: &[f32], alpha: f64) -> Result<Self> {
        let hidden = around.len();
        ensure!(alpha.is_finite(), "alpha is {alpha}");
        ensure!(around.iter().all(|m| m.is_finite()), "the point to project around is not finite");
        ensure!(
            (1..=directions.len()).contains(&rank) && rank <= hidden,
            "a subspace of rank {rank} cannot be taken from {} directions of width {hidden}",
            directions.len()
        );
        let mut units = Vec::new();
        for (i, direction) in directions.iter().enumerate() {
            let wide = widened(direction);
            let size = dot(&wide, &wide).sqrt();
            ensure!(wide.len() == hidden, "direction {i} has {} dimensions, not {hidden}", wide.len());
            ensure!(size > 0.0 && size.is_finite(), "direction {i} has norm {size}");
            units.push(wide.iter().map(|x| x / size).collect::<Vec<f64>>());
        }
        let svd = Svd::new(Mat::from_fn(hidden, units.len(), |i, j| units[j][i]).as_ref())?;
        let independent = svd.s.iter().filter(|s| **s > DEPENDENT * svd.s[0]).count();
        ensure!(
            rank <= independent,
            "the {} directions span {independent} dimensions, not {rank}: some are combinations of others",
            directions.len()
        );
        let basis = svd.u.col_iter().take(rank).map(|column| column.iter().copied().collect()).collect();
        Ok(Subspace { basis, around: widened(around), alpha })
    }

    /// Dimensions of a row.
    pub fn width(&self) -> usize {
        self.around.len()
    }

    /// Dimensions removed.
    pub fn rank(&self) -> usize {
        self.basis.len()
    }

    /// `Q Q' (h - m)`.
    pub fn component(&self, row: &[f32]) -> Vec<f64> {
        let shifted: Vec<f64> = row.iter().zip(&self.around).map(|(h, m)| f64::from(*h) - m).collect();
        let mut component = vec![0.0; shifted.len()];
        for axis in &self.basis {
            let along = dot(axis, &shifted);
            component.iter_mut().zip(axis).for_each(|(c, q)| *c += along * q);
        }
        component
    }

    /// `count` controls of each family, of this rank: `k` vectors of the family each, drawn independently and
    /// orthonormalised. `orthogonal`: random vectors made perpendicular to all of this subspace. `aligned` (`n x
    /// hidden`) gives the covariance, `differences` (`n x hidden`) the label shuffle.
    pub fn controls(
        &self,
        aligned: &[f32],
        differences: &[f32],
        count: usize,
        seed: u64,
    ) -> Result<Vec<SubspaceControl>> {
        let (hidden, rank) = (self.width(), self.rank());
        ensure!(2 * rank <= hidden, "no {rank} dimensions are perpendicular to {rank} of {hidden}");
        let model = narrowed(&self.basis[0]);
        let mut all = Vec::new();
        for i in 0..count {
            for (family, name) in
                ["random", "orthogonal", "covariance", "label_shuffled"].into_iter().enumerate()
            {
                let seed = control_seed(seed, family, i);
                let draw = |axis: usize| -> Result<Vec<f64>> {
                    let seed = control_seed(seed, family, axis);
                    Ok(match family {
                        0 => signs(hidden, seed),
                        1 => self.perpendicular(signs(hidden, seed)),
                        2 => widened(&controls::covariance_matched(&model, aligned, seed)?),
                        _ => widened(&controls::label_shuffled(&model, differences, seed)?),
                    })
                };
                let vectors = (0..rank).map(draw).collect::<Result<Vec<_>>>()?;
                let subspace = Subspace { basis: orthonormal(vectors)?, ..self.clone() };
                all.push(SubspaceControl { family: name, seed, subspace });
            }
        }
        Ok(all)
    }

    fn perpendicular(&self, mut vector: Vec<f64>) -> Vec<f64> {
        remove(&mut vector, &self.basis);
        vector
    }
}

impl RowEdit for Subspace {
    fn edit(&self, rows: &mut [f32], hidden: usize) -> Result<()> {
        ensure!(hidden == self.width(), "a subspace of width {} for rows of width {hidden}", self.width());
        check_rows("rows to project", rows, hidden, 0)?;
        for row in rows.chunks_mut(hidden) {
            let component = self.component(row);
            row.iter_mut().zip(&component).for_each(|(h, c)| *h = (f64::from(*h) - self.alpha * c) as f32);
        }
        Ok(())
    }
}

fn signs(hidden: usize, seed: u64) -> Vec<f64> {
    let mut generator = SplitMix64::new(seed);
    (0..hidden).map(|_| generator.sign()).collect()
}

/// Twice: once is not enough where little is left.
fn remove(vector: &mut [f64], basis: &[Vec<f64>]) {
    for axis in basis.iter().chain(basis) {
        let along = dot(axis, vector);
        vector.iter_mut().zip(axis).for_each(|(v, q)| *v -= along * q);
    }
}

/// Gram-Schmidt; the vectors must be independent.
fn orthonormal(vectors: Vec<Vec<f64>>) -> Result<Vec<Vec<f64>>> {
    let mut basis: Vec<Vec<f64>> = Vec::new();
    for mut vector in vectors {
        let before = dot(&vector, &vector).sqrt();
        remove(&mut vector, &basis);
        let size = dot(&vector, &vector).sqrt();
        if size <= DEPENDENT * before || size == 0.0 {
            bail!(
                "the rows vary in too few dimensions for {} control directions: give more rows",
                basis.len() + 1
            );
        }
        basis.push(vector.iter().map(|v| v / size).collect());
    }
    Ok(basis)
}
