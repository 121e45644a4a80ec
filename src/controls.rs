//! Control directions: what an intervention of the same size does without the meaning.
//!
//! Every control has the norm of the direction `v` it stands against. The arithmetic is f64 in a fixed order without
//! fused operations, and randomness is [`SplitMix64`], so a seed gives the same bytes on every platform.
//! All functions are pure; vectors are f32 of the width of `v`, in activation units.
//!
//! ```
//! use emaudit::controls;
//!
//! let v = [3.0f32, 0.0, 4.0, 0.0];
//! let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
//! let random = controls::random(&v, 7);
//! assert_eq!(random, controls::random(&v, 7)); // the same on every machine
//! assert!((norm(&random) - norm(&v)).abs() < 1e-5);
//! let orthogonal = controls::orthogonal(&v, 7);
//! let along: f32 = orthogonal.iter().zip(&v).map(|(a, b)| a * b).sum();
//! assert!(along.abs() < 1e-4);
//! ```

use crate::error::{Error, Result};

/// The generator of Steele, Lea and Flood (2014): state += 0x9E3779B97F4A7C15, then two xor-shift multiplications.
///
/// From seed 0 the first outputs are `E220A8397B1DCDAF`, `6E789E6AA1B965F4`, `06C45D188009454F`.
#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// A generator; every seed is good.
    pub fn new(seed: u64) -> Self {
        SplitMix64(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// -1 when the top bit of the next output is set, else +1.
    pub fn sign(&mut self) -> f64 {
        if self.next_u64() >> 63 == 1 { -1.0 } else { 1.0 }
    }

    /// A number in `0..bound` (0 for bound 0), by the upper half of a 128-bit product; the bias is below `bound / 2^64`.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }
}

/// Draws tried before an orthogonal control is given up (possible only in one or two dimensions).
const ORTHOGONAL_DRAWS: usize = 64;

/// Rademacher signs, one draw per element.
pub fn random(v: &[f32], seed: u64) -> Vec<f32> {
    let mut generator = SplitMix64::new(seed);
    rescaled(&signs(v.len(), &mut generator), norm(v))
}

/// Rademacher signs made perpendicular to `v` (up to the rounding of its elements to f32).
///
/// All zeros where nothing is perpendicular: one dimension, or `v` zero.
pub fn orthogonal(v: &[f32], seed: u64) -> Vec<f32> {
    let mut generator = SplitMix64::new(seed);
    let wide: Vec<f64> = v.iter().map(|x| f64::from(*x)).collect();
    let square = dot(&wide, &wide);
    for _ in 0..ORTHOGONAL_DRAWS {
        let mut drawn = signs(v.len(), &mut generator);
        // The second pass removes what cancellation left of the first.
        for _ in 0..2 {
            let share = dot(&drawn, &wide) / square;
            for (x, w) in drawn.iter_mut().zip(&wide) {
                *x -= share * w;
            }
        }
        // A draw (nearly) parallel to `v` leaves only rounding noise.
        if dot(&drawn, &drawn) > 1e-12 * v.len() as f64 {
            return rescaled(&drawn, norm(v));
        }
    }
    vec![0.0; v.len()]
}

/// `sum_i g_i (row_i - mean)` with Rademacher `g`: random, with the sample covariance of the rows.
///
/// `rows` is `n x d`, row-major, `d = v.len()`, `n >= 2`. Draws one sign per row.
///
/// Errors: [`Error::InvalidArgument`] for a wrong shape, a non-finite value, or rows that do not vary.
pub fn covariance_matched(v: &[f32], rows: &[f32], seed: u64) -> Result<Vec<f32>> {
    let n = count_rows(v, rows)?;
    let mut mean = vec![0.0f64; v.len()];
    for row in rows.chunks_exact(v.len()) {
        accumulate(&mut mean, 1.0, row);
    }
    mean.iter_mut().for_each(|m| *m /= n as f64);

    let mut generator = SplitMix64::new(seed);
    let mut sum = vec![0.0f64; v.len()];
    for row in rows.chunks_exact(v.len()) {
        let sign = generator.sign();
        for ((s, x), m) in sum.iter_mut().zip(row).zip(&mean) {
            *s += sign * (f64::from(*x) - m);
        }
    }
    rescaled_or_refused(&sum, v, "the rows do not vary")
}

/// `sum_i s_i d_i` with balanced signs: the direction that extraction finds when the labels are shuffled.
///
/// `differences` is `n x d`, row-major: `h_i(adapter) - h_i(base)`; `n >= 2`. Half of the signs are minus, half plus, placed
/// by a Fisher-Yates shuffle; for odd `n` one is zero, so what all differences share always cancels.
///
/// Errors: [`Error::InvalidArgument`] for a wrong shape, a non-finite value, or differences that are all alike.
pub fn label_shuffled(v: &[f32], differences: &[f32], seed: u64) -> Result<Vec<f32>> {
    let n = count_rows(v, differences)?;
    let mut sum = vec![0.0f64; v.len()];
    for (sign, row) in balanced_signs(n, seed).into_iter().zip(differences.chunks_exact(v.len())) {
        accumulate(&mut sum, sign, row);
    }
    rescaled_or_refused(&sum, v, "the differences are all alike")
}

/// Half minus, a zero where `n` is odd, half plus; then shuffled from the end down.
fn balanced_signs(n: usize, seed: u64) -> Vec<f64> {
    let mut signs = vec![0.0; n];
    signs[..n / 2].fill(-1.0);
    signs[n - n / 2..].fill(1.0);
    let mut generator = SplitMix64::new(seed);
    for last in (1..n).rev() {
        signs.swap(last, generator.below(last as u64 + 1) as usize);
    }
    signs
}

fn signs(n: usize, generator: &mut SplitMix64) -> Vec<f64> {
    (0..n).map(|_| generator.sign()).collect()
}

fn count_rows(v: &[f32], rows: &[f32]) -> Result<usize> {
    let (width, length) = (v.len(), rows.len());
    if width == 0 || !length.is_multiple_of(width) || length / width < 2 {
        let reason = format!("{length} values are not two or more rows of {width}");
        return Err(Error::InvalidArgument(reason));
    }
    if !v.iter().chain(rows).all(|x| x.is_finite()) {
        return Err(Error::InvalidArgument("the direction or the rows hold a NaN or an infinity".into()));
    }
    Ok(length / width)
}

fn accumulate(sum: &mut [f64], sign: f64, row: &[f32]) {
    for (s, x) in sum.iter_mut().zip(row) {
        *s += sign * f64::from(*x);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Not `Iterator::sum`: the order is part of the definition.
    let mut sum = 0.0;
    for (x, y) in a.iter().zip(b) {
        sum += x * y;
    }
    sum
}

fn norm(v: &[f32]) -> f64 {
    let mut sum = 0.0f64;
    for x in v {
        sum += f64::from(*x) * f64::from(*x);
    }
    sum.sqrt()
}

fn rescaled(vector: &[f64], target: f64) -> Vec<f32> {
    let scale = target / dot(vector, vector).sqrt();
    vector.iter().map(|x| (x * scale) as f32).collect()
}

fn rescaled_or_refused(vector: &[f64], v: &[f32], reason: &str) -> Result<Vec<f32>> {
    let length = dot(vector, vector).sqrt();
    if !(length > 0.0 && length.is_finite()) {
        return Err(Error::InvalidArgument(reason.into()));
    }
    Ok(rescaled(vector, norm(v)))
}
