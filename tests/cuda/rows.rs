//! Rows to score and steer, and what the processor makes of them.

use emaudit::activations::Element;
use emaudit::{KernelKind, Operation, Probe, RowStatus, Rows, RowsMut, ScoreUnit, Steering, SteeringOptions};

pub const KERNELS: &str = include_str!("../../src/kernel/cuda/kernels.cu");

/// Widths on both sides of every boundary: of a vector, of a team's turn, of what is kept, of each size of team.
pub const WIDTHS: [usize; 19] =
    [1, 7, 8, 9, 64, 511, 512, 520, 576, 1000, 2040, 2048, 2056, 4096, 4104, 8192, 8200, 8209, 12_296];

/// A matrix with room between its rows.
#[derive(Clone)]
pub struct Batch<T> {
    pub data: Vec<T>,
    pub rows: usize,
    pub width: usize,
    pub stride: usize,
}

impl<T: Element> Batch<T> {
    pub fn new(rows: usize, width: usize, gap: usize, value: impl Fn(usize, usize) -> f32) -> Self {
        let stride = width + gap;
        let mut data = vec![T::from_f32(-7.0); rows * stride];
        for r in 0..rows {
            for i in 0..width {
                data[r * stride + i] = T::from_f32(value(r, i));
            }
        }
        Batch { data, rows, width, stride }
    }

    pub fn row(&self, r: usize) -> &[T] {
        &self.data[r * self.stride..][..self.width]
    }

    fn view(&self) -> Rows<'_> {
        Rows::new(&self.data, self.rows, self.width, self.stride).unwrap()
    }
}

/// What became of a batch.
pub struct Outcome<T> {
    pub scores: Vec<f32>,
    pub status: Vec<RowStatus>,
    pub rows: Vec<T>,
}

/// The processor's scores.
pub fn scored<T: Element>(probe: &Probe, batch: &Batch<T>, unit: ScoreUnit) -> Outcome<T> {
    let (mut scores, mut status) = (vec![0.0; batch.rows], vec![RowStatus::Ok; batch.rows]);
    let _ = probe.score(&batch.view(), unit, &mut scores, Some(&mut status));
    Outcome { scores, status, rows: batch.data.clone() }
}

/// The processor's scores and edits; a strength that it refuses leaves its row alone.
pub fn steered<T: Element>(
    steering: &Steering,
    batch: &Batch<T>,
    unit: ScoreUnit,
    strengths: Option<&[f32]>,
) -> Outcome<T> {
    let clamps = matches!(steering.options().operation, Operation::Clamp { .. });
    let is_bad = |s: f32| !s.is_finite() || (clamps && s < 0.0);
    let good: Option<Vec<f32>> =
        strengths.map(|all| all.iter().map(|&s| if is_bad(s) { 0.0 } else { s }).collect());
    let mut rows = batch.data.clone();
    let (mut scores, mut status) = (vec![0.0; batch.rows], vec![RowStatus::Ok; batch.rows]);
    let mut view = RowsMut::new(&mut rows, batch.rows, batch.width, batch.stride).unwrap();
    let _ = steering.score_and_apply(&mut view, unit, &mut scores, good.as_deref(), Some(&mut status));
    for (status, &s) in status.iter_mut().zip(strengths.unwrap_or_default()) {
        if is_bad(s) {
            *status = RowStatus::BadStrength;
        }
    }
    Outcome { scores, status, rows }
}

/// Every edit, with and without gate and dose limit.
pub fn steerings(probe: &Probe) -> Vec<Steering> {
    let operations = [
        Operation::Subtract { alpha: 1.5 },
        Operation::ProjectOut { alpha: 1.0 },
        Operation::Clamp { ceiling: 0.25 },
    ];
    let mut all = Vec::new();
    for operation in operations {
        for gate in [None, Some(0.5)] {
            for dose_limit in [None, Some(0.125)] {
                let options = SteeringOptions { operation, gate, dose_limit, allow_nonspecific: true };
                all.push(Steering::new(probe, options).unwrap());
            }
        }
    }
    all
}

/// A direction with four (two, one) elements of size 1, so that the unit direction and every sum of small multiples of
/// a power of two are exact in f32, in whatever order they are made.
pub fn exact_probe(width: usize) -> Probe {
    let mut direction = vec![0.0; width];
    let places = [0, width / 3, width / 2, width - 1];
    let distinct = places.windows(2).all(|w| w[0] < w[1]);
    for (k, &place) in places.iter().enumerate().take(if distinct { 4 } else { 1 }) {
        direction[place] = if k % 2 == 0 { 1.0 } else { -1.0 };
    }
    let mean: Vec<f32> = (0..width).map(|i| (i % 3) as f32 * 0.5).collect();
    Probe::from_vectors(&direction, &mean, 0.75, Some(KernelKind::Scalar)).unwrap()
}

/// A small multiple of 1/8 in [-2, 2), different in every row.
pub fn exact(r: usize, i: usize) -> f32 {
    ((r * 131 + i * 37 + (i * i) % 29) % 32) as f32 / 8.0 - 2.0
}

/// A number in [-1, 1), from a hash.
pub fn random(r: usize, i: usize) -> f32 {
    let mut z =
        (r as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (i as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 30)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z = (z ^ (z >> 27)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((z >> 40) as f32) / (1u32 << 23) as f32 - 1.0
}
