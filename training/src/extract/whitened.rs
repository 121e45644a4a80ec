//! Linear discriminant analysis with a shrunk covariance (Fisher; Ledoit and Wolf 2004).
//!
//! Dimensions are divided by their pooled within-group standard deviation first, as scikit-learn's LDA does: with one
//! massive dimension the shrinkage target, a multiple of the identity, would otherwise be that dimension's.

use super::column_means;
use super::estimators::Groups;
use crate::matrix::{Svd, dot, times, transposed_times};
use anyhow::{Result, ensure};
use faer::Mat;

/// Rows minus their own group's mean, every dimension in units of its pooled standard deviation.
pub(super) struct Standardised {
    /// `n x hidden`: positive rows first.
    pub residuals: Mat<f64>,
    /// Per dimension; 1 where the dimension does not vary within the groups.
    pub scale: Vec<f64>,
}

impl Standardised {
    pub(super) fn new(groups: &Groups<'_>) -> Result<Self> {
        let hidden = groups.hidden;
        let means = [column_means(groups.positive, hidden), column_means(groups.negative, hidden)];
        let rows = [groups.positive, groups.negative].concat();
        let (n, first) = (rows.len() / hidden, groups.positive.len() / hidden);
        let mut residuals = Mat::from_fn(n, hidden, |i, j| {
            f64::from(rows[i * hidden + j]) - means[usize::from(i >= first)][j]
        });
        let mut scale = vec![1.0; hidden];
        let mut varies = false;
        for (j, scale) in scale.iter_mut().enumerate() {
            let sd = (residuals.col(j).iter().map(|x| x * x).sum::<f64>() / n as f64).sqrt();
            // What is left of a constant after its mean was rounded is no spread.
            let size = means[0][j].abs().max(means[1][j].abs());
            if sd > 8.0 * f64::EPSILON * size {
                *scale = sd;
                varies = true;
                residuals.col_mut(j).iter_mut().for_each(|x| *x /= sd);
            } else {
                residuals.col_mut(j).fill(0.0);
            }
        }
        ensure!(varies, "no dimension varies within the groups, so there is no covariance to whiten with");
        Ok(Standardised { residuals, scale })
    }
}

/// `S^-1 delta` in raw dimensions, and the shrinkage: with R the standardised residuals,
/// `S = D ((1 - rho) R'R/n + rho mu I) D`, `mu = tr(R'R/n)/d`, `D` the scales.
pub(super) fn axis(standardised: &Standardised, delta: &[f64]) -> Result<(Vec<f64>, f64)> {
    let (n, d) = (standardised.residuals.nrows(), standardised.residuals.ncols());
    let svd = Svd::new(standardised.residuals.as_ref())?;
    let shrinkage = ledoit_wolf(standardised.residuals.as_ref(), &svd.s);
    let mu = svd.s.iter().map(|s| s * s).sum::<f64>() / (n * d) as f64;
    let (floor, weight) = (shrinkage * mu, (1.0 - shrinkage) / n as f64);
    let scaled: Vec<f64> = delta.iter().zip(&standardised.scale).map(|(x, s)| x / s).collect();
    let inside = transposed_times(svd.v.as_ref(), &scaled);
    let smallest = svd.s.last().map_or(0.0, |s| s * s * weight);
    let spanned = svd.s.len() == d && smallest > 0.0;
    ensure!(
        floor > 0.0 || spanned,
        "Ledoit-Wolf does not shrink a covariance that has no inverse: give more rows"
    );
    let divided: Vec<f64> = inside.iter().zip(&svd.s).map(|(x, s)| x / (floor + weight * s * s)).collect();
    let mut axis = times(svd.v.as_ref(), &divided);
    if svd.s.len() < d {
        let projected = times(svd.v.as_ref(), &inside);
        axis.iter_mut().zip(scaled.iter().zip(&projected)).for_each(|(a, (x, p))| *a += (x - p) / floor);
    }
    axis.iter_mut().zip(&standardised.scale).for_each(|(a, s)| *a /= s);
    Ok((axis, shrinkage))
}

/// The intensity that minimises the expected squared error of the shrunk covariance, for rows of mean zero
/// (Ledoit and Wolf 2004, lemma 3.3): `min(b, delta) / delta`, from the singular values and the row norms.
fn ledoit_wolf(rows: faer::MatRef<'_, f64>, singular: &[f64]) -> f64 {
    let (n, d) = (rows.nrows() as f64, rows.ncols() as f64);
    let squared: Vec<f64> = singular.iter().map(|s| s * s / n).collect();
    let (trace, frobenius) = (squared.iter().sum::<f64>(), dot(&squared, &squared));
    let fourth: f64 =
        rows.row_iter().map(|row| row.iter().map(|x| x * x).sum::<f64>().powi(2)).sum::<f64>() / n;
    let spread = (fourth - frobenius) / n;
    let distance = frobenius - trace * trace / d;
    // One dimension, or a covariance that already is a multiple of the identity: the target is the estimate.
    if distance <= 0.0 { 1.0 } else { (spread.min(distance) / distance).max(0.0) }
}
