//! One token from one row of logits.

use super::Sampling;
use crate::model::vector::exp;
use crate::random;

/// Weights that are added up apart, so that compilers can do it in vectors and a draw can skip whole runs.
const RUN: usize = 256;

impl Sampling {
    /// Draws the token at `position` of `stream` from one row of logits.
    pub fn draw(&self, logits: &[f32], stream: u64, position: usize) -> u32 {
        if self.absent.is_empty() {
            return self.draw_any(logits, stream, position);
        }
        let mut present = logits.to_vec();
        for &id in &self.absent {
            present[id as usize] = f32::NEG_INFINITY;
        }
        self.draw_any(&present, stream, position)
    }

    fn draw_any(&self, logits: &[f32], stream: u64, position: usize) -> u32 {
        let max = largest(logits);
        if self.temperature == 0.0 {
            return first_at(logits, max);
        }
        let inverse = 1.0 / self.temperature as f32;
        let mut weights: Vec<f32> = logits.to_vec();
        weights.iter_mut().for_each(|w| *w = exp((*w - max) * inverse));
        if self.top_p < 1.0 {
            keep_nucleus(&mut weights, self.top_p);
        }
        let runs: Vec<f64> = weights.chunks(RUN).map(sum).collect();
        let mut left = random::uniform(&[self.seed, stream, position as u64]) * runs.iter().sum::<f64>();
        for (run, total) in runs.iter().enumerate() {
            if left >= *total {
                left -= total;
                continue;
            }
            for (i, &w) in weights[run * RUN..].iter().take(RUN).enumerate() {
                left -= w as f64;
                if left < 0.0 {
                    return (run * RUN + i) as u32;
                }
            }
        }
        first_at(logits, max)
    }
}

fn first_at(row: &[f32], value: f32) -> u32 {
    row.iter().position(|&v| v == value).unwrap_or(0) as u32
}

fn largest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let runs = row.chunks_exact(16);
    let rest = runs.remainder().iter().copied();
    for run in runs {
        for (lane, &v) in lanes.iter_mut().zip(run) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes.into_iter().chain(rest).fold(f32::NEG_INFINITY, f32::max)
}

fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    for run in weights.chunks(8) {
        for (lane, &w) in lanes.iter_mut().zip(run) {
            *lane += w as f64;
        }
    }
    lanes.iter().sum()
}

/// Sets to zero what lies outside the smallest set of most likely tokens with at least `top_p` of the mass; of equal
/// ones the first go in.
fn keep_nucleus(weights: &mut [f32], top_p: f64) {
    let total: f64 = weights.chunks(RUN).map(sum).sum();
    // Tokens below this cannot hold 1 - top_p together, so none of them is in the nucleus.
    let floor = (1.0 - top_p) * total / weights.len() as f64;
    let mut left: Vec<(f32, u32)> =
        (0u32..).zip(&*weights).map(|(i, &w)| (w, i)).filter(|&(w, _)| w as f64 >= floor).collect();
    let mut left = left.as_mut_slice();
    // The last token inside is found by halves, without sorting: the more likely half is inside whole or holds it.
    let mut needed = top_p * total;
    while left.len() > 1 {
        let middle = left.len() / 2;
        left.select_nth_unstable_by(middle, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let (likelier, others) = left.split_at_mut(middle);
        let mass: f64 = likelier.iter().map(|&(w, _)| w as f64).sum();
        if mass >= needed {
            left = likelier;
        } else {
            needed -= mass;
            left = others;
        }
    }
    let Some(&mut (last, at)) = left.first_mut() else { return };
    for (i, w) in (0u32..).zip(weights) {
        if *w < last || (*w == last && i > at) {
            *w = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    /// The definition, by sorting.
    fn nucleus(weights: &[f32], top_p: f64) -> Vec<f32> {
        let total: f64 = weights.iter().map(|&w| w as f64).sum();
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
        let (mut kept, mut seen) = (vec![0f32; weights.len()], 0.0);
        for i in order {
            kept[i] = weights[i];
            seen += weights[i] as f64;
            if seen >= top_p * total {
                break;
            }
        }
        kept
    }

    #[test]
    fn the_nucleus_is_that_of_the_definition() {
        let mut checked = 0;
        for seed in 0..40 {
            let count = 1 + (uniform(&[seed]) * 3000.0) as usize;
            // Coarse steps make ties; powers of two add up exactly in any order.
            let weight = |i: usize| 2f32.powi((uniform(&[seed, i as u64]) * -12.0) as i32);
            let weights: Vec<f32> = (0..count).map(weight).collect();
            for top_p in [0.01, 0.5, 0.9, 0.95, 0.9999] {
                let mut own = weights.clone();
                keep_nucleus(&mut own, top_p);
                assert_eq!(own, nucleus(&weights, top_p), "seed {seed}, top_p {top_p}");
                checked += 1;
            }
        }
        assert_eq!(checked, 200);
    }

    #[test]
    fn tokens_are_drawn_as_often_as_their_probability_says() {
        // Tokens in three runs; the shares of 20,000 draws lie within 5 standard errors.
        let mut logits = vec![-30f32; 3 * RUN];
        let likely = [(3, 0.5f32), (RUN, 0.3), (3 * RUN - 1, 0.2)];
        likely.iter().for_each(|&(id, p)| logits[id] = p.ln());
        for (top_p, expected) in [(1.0, [0.5, 0.3, 0.2]), (0.7, [0.625, 0.375, 0.0])] {
            let sampling = Sampling {
                max_new_tokens: 1,
                temperature: 1.0,
                top_p,
                seed: 5,
                stop: vec![],
                absent: vec![],
            };
            let mut seen = [0u32; 3];
            for stream in 0..20_000 {
                let id = sampling.draw(&logits, stream, 0) as usize;
                seen[likely.iter().position(|l| l.0 == id).expect("no other token")] += 1;
            }
            for (count, p) in seen.into_iter().zip(expected) {
                let (share, p): (f64, f64) = (count as f64 / 20_000.0, p);
                assert!((share - p).abs() <= 5.0 * (p * (1.0 - p) / 20_000.0).sqrt(), "{share} for {p}");
            }
        }
    }

    #[test]
    fn without_temperature_the_first_of_the_most_likely_is_taken() {
        let sampling = Sampling {
            max_new_tokens: 1,
            temperature: 0.0,
            top_p: 0.5,
            seed: 5,
            stop: vec![],
            absent: vec![37],
        };
        let mut logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32).collect();
        logits[37] = 100.0;
        assert_eq!(sampling.draw(&logits, 0, 0), 6);
        logits[44] = 6.5;
        assert_eq!(sampling.draw(&logits, 0, 0), 44);
    }
}
