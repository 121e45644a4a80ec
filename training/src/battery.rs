//! The control battery: seeded families of directions at the true direction's size.

use crate::extract::norm;
use anyhow::Result;
use emaudit::{Operation, Probe, Steering, SteeringOptions, controls};

/// One vector that is steered with in place of the direction.
#[derive(Clone, Debug)]
pub struct Control {
    /// Family name as the direction file uses it.
    pub family: &'static str,
    /// Seed that regenerates it.
    pub seed: u64,
    /// The vector, of the direction's norm.
    pub vector: Vec<f32>,
}

/// `count` controls of each of the four families. `aligned`: `n x hidden` aligned rows (for the covariance);
/// `differences`: `n x hidden` paired differences (for the label shuffle).
pub fn draw(
    direction: &[f32],
    aligned: &[f32],
    differences: &[f32],
    count: usize,
    seed: u64,
) -> Result<Vec<Control>> {
    let mut all = Vec::with_capacity(4 * count);
    for i in 0..count {
        let seeds: [u64; 4] = std::array::from_fn(|family| control_seed(seed, family, i));
        let mut push = |family, seed, vector| all.push(Control { family, seed, vector });
        push("random", seeds[0], controls::random(direction, seeds[0]));
        push("orthogonal", seeds[1], controls::orthogonal(direction, seeds[1]));
        push("covariance", seeds[2], controls::covariance_matched(direction, aligned, seeds[2])?);
        push("label_shuffled", seeds[3], controls::label_shuffled(direction, differences, seeds[3])?);
    }
    Ok(all)
}

/// Every family has its own draws: an orthogonal control must not be a random one with a component removed.
pub fn control_seed(seed: u64, family: usize, index: usize) -> u64 {
    crate::random::bits(&[seed, family as u64, index as u64])
}

/// `vector` at the norm of `direction`.
pub fn rescaled(vector: &[f32], direction: &[f32]) -> Vec<f32> {
    let factor = norm(direction) / norm(vector).max(f64::MIN_POSITIVE);
    vector.iter().map(|&v| (v as f64 * factor) as f32).collect()
}

/// The library's own steering, subtracting `alpha` times `vector`. Controls and unproven directions need the
/// explicit flag; this is the one place that sets it.
pub fn subtract(vector: &[f32], alpha: f64) -> Result<Steering> {
    let zeros = vec![0f32; vector.len()];
    let probe = Probe::from_vectors(vector, &zeros, 1.0, None)?;
    let options = SteeringOptions {
        allow_nonspecific: true,
        ..SteeringOptions::new(Operation::Subtract { alpha: alpha as f32 })
    };
    Ok(Steering::new(&probe, options)?)
}
