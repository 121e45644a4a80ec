//! The final norm, the output head and the cross-entropy at once: logits of a few rows at a time, never of all.

use super::bench::{Workbench, by_rows};
use super::linear::Linear;
use crate::model::{Decoder, kernels};
use anyhow::{Result, ensure};
use rayon::prelude::*;

/// Logits that are held at once, about: 128 MiB in f32.
const LOGITS: usize = 32 << 20;
/// Fewest and most rows of them: few rows waste the reading of the weight, and many gain nothing.
const LEAST: usize = 256;
const MOST: usize = 512;

/// Rows whose logits are held at once.
pub fn head_rows(vocabulary: usize) -> usize {
    (LOGITS / vocabulary).clamp(LEAST, MOST)
}

/// Mean cross-entropy (nats) of `targets` under the logits of the residual rows `x`: `[targets, hidden]`. Where
/// `share` is given, `x` becomes the gradient of `share` times it.
pub fn loss(
    bench: &Workbench,
    decoder: &Decoder,
    x: &mut [f32],
    targets: &[u32],
    share: Option<f64>,
) -> Result<f64> {
    let (hidden, vocab) = (decoder.config.hidden_size, decoder.config.vocab_size);
    ensure!(
        x.len() == targets.len() * hidden && targets.iter().all(|&t| (t as usize) < vocab),
        "{} values of the residual stream for {} targets",
        x.len(),
        targets.len()
    );
    let scale = share.map(|share| (share / targets.len() as f64) as f32);
    let norm = &decoder.final_norm;
    let mut sum = 0f64;
    let rows = head_rows(vocab);
    if bench.accelerator().is_some() {
        decoder.head.keep_halves()?;
    }
    let head = Linear::new(bench, [(&decoder.head, None)])?;
    for (x, targets) in x.chunks_mut(rows * hidden).zip(targets.chunks(rows)) {
        let mut h = bench.fill(targets.len(), (hidden, 0), |row, y| {
            kernels::norm(&x[row * hidden..][..hidden], norm.values(), norm.eps(), y);
        });
        let (mut logits, _) = head.forward(&mut h)?;
        let cap = decoder.config.logit_cap;
        let rows = logits.par_chunks_mut(vocab).zip(targets);
        let (log_sums, losses): (Vec<f64>, Vec<f64>) =
            rows.map(|(row, &t)| cross_entropy(row, t as usize, cap)).unzip();
        sum += losses.iter().sum::<f64>();
        bench.release(h);
        let Some(scale) = scale else {
            bench.done(logits);
            continue;
        };
        let dlogits = bench.pieces(logits, head.pieces(), |row, logits| {
            cross_entropy_gradient(logits, log_sums[row], targets[row] as usize, cap, scale);
        });
        let (mut dh, _) = head.backward(None, &dlogits)?;
        bench.release_pieces(dlogits);
        by_rows(&mut dh, hidden, |row, dx| {
            kernels::norm_gradient(&x[row * hidden..][..hidden], norm.values(), norm.eps(), None, dx);
        });
        x.copy_from_slice(&dh);
        bench.done(dh);
    }
    Ok(sum / targets.len() as f64)
}

/// The logarithm of the sum of a row's exponentials, and its loss; the logits become those after the cap.
fn cross_entropy(row: &mut [f32], target: usize, cap: Option<f32>) -> (f64, f64) {
    if let Some(cap) = cap {
        row.iter_mut().for_each(|v| *v = cap * (*v / cap).tanh());
    }
    let log_sum = kernels::log_sum_exp(row);
    (log_sum, log_sum - f64::from(row[target]))
}

/// Logits after the cap become `scale` times the gradient of their loss in those before it.
fn cross_entropy_gradient(row: &mut [f32], log_sum: f64, target: usize, cap: Option<f32>, scale: f32) {
    let capped = cap.map(|cap| (cap, row.to_vec()));
    kernels::cross_entropy_gradient(row, log_sum as f32, target, scale);
    if let Some((cap, capped)) = capped {
        row.iter_mut().zip(&capped).for_each(|(d, v)| *d *= 1.0 - (v / cap) * (v / cap));
    }
}
