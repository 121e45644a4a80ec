//! Rotary frequencies (Su et al. 2021) and the ways to stretch them to longer contexts.

use std::f64::consts::PI;

/// How positions turn queries and keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: Scaling,
}

/// A change to the frequencies `theta^(-2i / head_dim)`.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// None.
    Plain,
    /// All frequencies divided by the factor (Chen et al. 2023, position interpolation).
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Long waves divided by the factor, short ones kept, those between mixed (Llama 3.1).
    Llama3 {
        /// Divisor of the long waves.
        factor: f64,
        /// Waves longer than `original / low` tokens are long.
        low: f64,
        /// Waves shorter than `original / high` tokens are short.
        high: f64,
        /// Context length of the pretraining.
        original: f64,
    },
    /// As `Llama3`, mixed by dimension, with all angles' cosines and sines scaled (Peng et al. 2023, YaRN).
    Yarn {
        /// Divisor of the long waves.
        factor: f64,
        /// Turns within the pretraining context from which a wave is short.
        beta_fast: f64,
        /// Turns below which it is long.
        beta_slow: f64,
        /// Context length of the pretraining.
        original: f64,
        /// Factor on cosines and sines.
        magnitude: f64,
        /// Round the two limits outwards to whole dimensions.
        truncate: bool,
    },
    /// A divisor for every frequency, as GGUF files carry Llama 3's (`rope_freqs.weight`).
    Divisors(Vec<f32>),
}

impl Rope {
    /// Angle per position of each of the `head_dim / 2` pairs.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        let half = head_dim / 2;
        let plain = |i: usize| self.theta.powf(-(i as f64) / half as f64);
        let scaled = |i: usize| match &self.scaling {
            Scaling::Plain => plain(i),
            Scaling::Linear { factor } => plain(i) / factor,
            Scaling::Llama3 { factor, low, high, original } => {
                // How many turns the wave makes within the original context.
                let turns = original * plain(i) / (2.0 * PI);
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                plain(i) * (kept + (1.0 - kept) / factor)
            }
            Scaling::Yarn { factor, beta_fast, beta_slow, original, truncate, .. } => {
                let dimension =
                    |turns: f64| half as f64 * (original / (turns * 2.0 * PI)).ln() / self.theta.ln();
                let (mut from, mut to) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (from, to) = (from.floor(), to.ceil());
                }
                (from, to) = (from.max(0.0), to.min(head_dim as f64 - 1.0));
                let width = if from == to { 0.001 } else { to - from };
                let divided = ((i as f64 - from) / width).clamp(0.0, 1.0);
                plain(i) * (1.0 - divided + divided / factor)
            }
            Scaling::Divisors(divisors) => plain(i) / divisors[i] as f64,
        };
        (0..half).map(scaled).collect()
    }

    /// Factor on all cosines and sines.
    pub fn magnitude(&self) -> f64 {
        match self.scaling {
            Scaling::Yarn { magnitude, .. } => magnitude,
            _ => 1.0,
        }
    }
}

/// YaRN's growth of the attention with the context: 0.1 m ln(factor) + 1.
pub fn yarn_magnitude(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}
