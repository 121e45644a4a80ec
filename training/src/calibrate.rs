//! Calibration: the spread of aligned scores, and the alarm threshold of every statistic, horizon and rate.
//!
//! The sequence is the unit. Token 1 is the last prompt token, every later one a token of the answer; a horizon of
//! H looks at the first H, so it is calibrated on the calm sequences that reach it.

use crate::extract::{LayerDirection, scores};
use crate::likelihood::{Dialogue, last_rows};
use crate::lora::Adapter;
use crate::model::{Decoder, Prefix, no_edit};
use crate::{capture, statistics as stats};
use anyhow::Result;
use emaudit::directions::schema::{Aggregation, Calibration, Threshold};
use emaudit::{Probe, Rows, ScoreUnit};

/// Probabilities at which the aligned score distribution is written down.
const QUANTILES: [f64; 9] = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99];
const STATISTICS: [Aggregation; 3] = [Aggregation::Mean, Aggregation::Max, Aggregation::Last];
/// Sequences per forward pass.
const BATCH: usize = 16;

/// Spread, quantiles and the thresholds of horizon 1, from one aligned row per sequence. A rate that the sample
/// cannot support is an error.
pub fn first_token(
    direction: &[f32],
    aligned_mean: &[f32],
    calm: &[f32],
    rates: &[f64],
) -> Result<Calibration> {
    let raw_probe = Probe::from_vectors(direction, aligned_mean, 1.0, None)?;
    let sigma = stats::sd(&scores(&raw_probe, calm, ScoreUnit::Raw)?)?;
    let probe = Probe::from_vectors(direction, aligned_mean, sigma, None)?;
    let z = scores(&probe, calm, ScoreUnit::AlignedSd)?;
    let quantiles = QUANTILES.iter().map(|&p| Ok((p, stats::quantile(&z, p)?))).collect::<Result<_>>()?;
    let mut calibration = Calibration { sigma, sequences: z.len() as u32, quantiles, thresholds: Vec::new() };
    // Of one token, mean, maximum and last are the same number.
    for &rate in rates {
        for statistic in STATISTICS {
            calibration.thresholds.push(threshold(&z, statistic, 1, rate)?);
        }
    }
    Ok(calibration)
}

fn threshold(calm: &[f64], statistic: Aggregation, horizon: u32, rate: f64) -> Result<Threshold> {
    let t = stats::threshold_at_rate(calm, rate)?;
    let (z, sequences) = (t.threshold, t.sequences as u32);
    Ok(Threshold { statistic, horizon, rate, rate_upper: t.rate_upper, z, sequences })
}

/// The statistic over the first `horizon` of a sequence's token scores; `None` for a sequence that ends before.
pub fn statistic(tokens: &[f32], aggregation: Aggregation, horizon: u32) -> Option<f64> {
    let seen = tokens.get(..horizon as usize)?.iter().map(|&z| f64::from(z));
    match aggregation {
        Aggregation::Mean => Some(seen.sum::<f64>() / f64::from(horizon)),
        Aggregation::Max => seen.reduce(f64::max),
        Aggregation::Last => seen.reduce(|_, z| z),
    }
}

/// Adds the thresholds of a horizon beyond the first token, from the token scores of calm sequences. Returns the rates
/// that the sequences reaching it are too few for, with their number.
pub fn add_horizon(
    calibration: &mut Calibration,
    calm: &[Vec<f32>],
    horizon: u32,
    rates: &[f64],
) -> Result<Vec<(f64, usize)>> {
    let reached = calm.iter().filter(|tokens| tokens.len() >= horizon as usize).count();
    let mut refused = Vec::new();
    for &rate in rates {
        if (reached as u64) < stats::sequences_needed(rate)? {
            refused.push((rate, reached));
            continue;
        }
        for aggregation in STATISTICS {
            let calm: Vec<f64> = calm.iter().filter_map(|t| statistic(t, aggregation, horizon)).collect();
            calibration.thresholds.push(threshold(&calm, aggregation, horizon, rate)?);
        }
    }
    Ok(refused)
}

/// The probe of one layer's direction, in its own aligned standard deviations.
pub fn probe(d: &LayerDirection) -> Result<Probe> {
    Ok(Probe::from_vectors(&d.direction, &d.aligned_mean, d.calibration.sigma, None)?)
}

/// Scores of rows in aligned standard deviations; a NaN for a row that has none.
pub fn scores_or_nan(probe: &Probe, rows: &[f32]) -> Result<Vec<f32>> {
    let width = probe.width();
    let mut out = vec![0f32; rows.len() / width];
    match probe.score(&Rows::new(rows, out.len(), width, width)?, ScoreUnit::AlignedSd, &mut out, None) {
        Ok(()) | Err(emaudit::Error::NonFinite { .. }) => Ok(out),
        Err(error) => Err(error.into()),
    }
}

/// Scores of the first `tokens` tokens of every sequence, teacher-forced: one list of sequences per probe; each probe
/// comes with the layer it reads. A token without a score has a NaN, which no threshold is taken from.
pub fn token_scores(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    sequences: &[Dialogue],
    tokens: usize,
    probes: &[(usize, Probe)],
    mut done: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Vec<Vec<f32>>>> {
    let mut out = vec![vec![Vec::new(); sequences.len()]; probes.len()];
    let ids: Vec<Vec<u32>> = sequences
        .iter()
        .map(|s| s.prompt.iter().chain(s.answer.iter().take(tokens - 1)).copied().collect())
        .collect();
    let prompts: Vec<&[u32]> = sequences.iter().map(|s| s.prompt.as_slice()).collect();
    let longest = ids.iter().map(Vec::len).max().unwrap_or(0);
    let prefix = Prefix::read(decoder, &prompts, adapter, longest, &mut no_edit)?;
    for chunk in capture::by_length(&ids, Vec::len).chunks(BATCH) {
        let batch: Vec<&[u32]> = chunk.iter().map(|&i| ids[i].as_slice()).collect();
        let (batch, mut cache) = prefix.continued(decoder, &batch)?;
        let mut score = |layer: usize, x: candle_core::Tensor| {
            for (p, (_, probe)) in probes.iter().enumerate().filter(|(_, (at, _))| *at == layer) {
                for (b, &i) in chunk.iter().enumerate() {
                    let seen = ids[i].len() + 1 - prompts[i].len();
                    let rows = last_rows(&x, b, seen).map_err(candle_core::Error::wrap)?;
                    out[p][i] = scores_or_nan(probe, &rows).map_err(candle_core::Error::wrap)?;
                }
            }
            Ok(x)
        };
        decoder.forward(&batch, adapter, Some(&mut cache), &mut score)?;
        done(chunk.len())?;
    }
    Ok(out)
}
