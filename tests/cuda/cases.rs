//! What every device must do: the bodies of the tests, for OpenCL on a processor and for a GPU.

use crate::rows::{Batch, Outcome, WIDTHS, exact, exact_probe, random, scored, steered, steerings};
use bytemuck::Pod;
use emaudit::activations::Element;
use emaudit::kernel::cuda::error_bound;
use emaudit::{KernelKind, Operation, Probe, RowStatus, ScoreUnit, Steering, SteeringOptions};
use half::{bf16, f16};

/// Where kernels run. Rows begin on 16 bytes where they are to be `aligned`. Whatever a kernel must not touch is checked.
pub trait Device {
    /// Scores.
    fn score<T: Element + Pod>(
        &self,
        probe: &Probe,
        batch: &Batch<T>,
        unit: ScoreUnit,
        aligned: bool,
    ) -> Outcome<T>;

    /// Steers; with `unit` it scores too.
    fn steer<T: Element + Pod>(
        &self,
        steering: &Steering,
        batch: &Batch<T>,
        unit: Option<ScoreUnit>,
        strengths: Option<&[f32]>,
        aligned: bool,
    ) -> Outcome<T>;
}

/// The statuses that a device wrote.
pub fn row_status(bytes: &[u8]) -> Vec<RowStatus> {
    let all =
        [RowStatus::Ok, RowStatus::NonFinite, RowStatus::Gated, RowStatus::Limited, RowStatus::BadStrength];
    bytes.iter().map(|b| *all.iter().find(|s| **s as u8 == *b).expect("a status")).collect()
}

fn bits(scores: &[f32]) -> Vec<u32> {
    // All NaN are one.
    scores.iter().map(|s| if s.is_nan() { u32::MAX } else { s.to_bits() }).collect()
}

#[track_caller]
fn assert_same<T: Element + Pod>(what: &str, own: &Outcome<T>, expected: &Outcome<T>) {
    assert_eq!(own.status, expected.status, "{what}: statuses");
    if !own.scores.is_empty() {
        assert_eq!(bits(&own.scores), bits(&expected.scores), "{what}: scores");
    }
    let (own, expected) =
        (bytemuck::cast_slice::<T, u8>(&own.rows), bytemuck::cast_slice::<T, u8>(&expected.rows));
    let first = own.iter().zip(expected).position(|(a, b)| a != b);
    assert!(first.is_none(), "{what}: byte {first:?} of the rows differs");
}

/// Rows with what is awkward among them, of small multiples of 1/8: nothing in them is rounded, so the order of sums
/// does not matter and every result has the processor's bits.
fn exact_batch<T: Element>(rows: usize, width: usize, gap: usize) -> Batch<T> {
    let mut batch = Batch::new(rows, width, gap, exact);
    let last = width - 1;
    for (r, value) in [(1, f32::NAN), (2, f32::INFINITY), (3, f32::NEG_INFINITY)] {
        if r < rows {
            batch.data[r * batch.stride + (r * 5) % width] = T::from_f32(value);
        }
    }
    if rows > 5 {
        batch.data[4 * batch.stride..][..width].fill(T::from_f32(0.0));
        // Only the first and the last element, the first a power of two whose square f32 may not hold.
        let row = &mut batch.data[5 * batch.stride..][..width];
        row.fill(T::from_f32(0.0));
        row[last] = T::from_f32(1.0);
        row[0] = T::from_f32(if T::OVERFLOW > 1e5 { 2f32.powi(70) } else { 2f32.powi(14) });
    }
    batch
}

fn exact_cases<T: Element + Pod>(device: &impl Device) -> usize {
    let mut compared = 0;
    for (turn, width) in WIDTHS.into_iter().enumerate() {
        let probe = exact_probe(width);
        // With one row the stride says nothing.
        for (rows, gap) in [(0, 0), (1, 3), (6, 0), (17, 8)] {
            let batch = exact_batch::<T>(rows, width, gap);
            let strengths: Vec<f32> = (0..rows)
                .map(|r| match r {
                    7 => f32::NAN,
                    8 => -1.0,
                    9 => f32::INFINITY,
                    10 => 0.0,
                    r => 0.5 + (r % 3) as f32 * 0.25,
                })
                .collect();
            for aligned in [true, false] {
                for unit in [ScoreUnit::Raw, ScoreUnit::AlignedSd] {
                    let what = format!(
                        "{} {rows} x {width} + {gap}, aligned {aligned}, {unit:?}",
                        T::DTYPE.as_str()
                    );
                    let own = device.score(&probe, &batch, unit, aligned);
                    assert_same(&what, &own, &scored(&probe, &batch, unit));
                    compared += rows;
                }
                for (k, steering) in steerings(&probe).iter().enumerate() {
                    // All combinations come in turn.
                    let (with, unit) = ((k + turn) % 2 == 0, (k / 2 + turn) % 2 == 0);
                    let strengths = with.then_some(&strengths[..]);
                    let unit = unit.then_some(ScoreUnit::AlignedSd);
                    let what = format!(
                        "{} {rows} x {width} + {gap}, aligned {aligned}, {:?}, strengths {with}",
                        T::DTYPE.as_str(),
                        steering.options()
                    );
                    let own = device.steer(steering, &batch, unit, strengths, aligned);
                    assert_same(&what, &own, &steered(steering, &batch, ScoreUnit::AlignedSd, strengths));
                    compared += rows;
                }
            }
        }
    }
    compared
}

/// How far an edited element may be from the processor's: what the coefficients differ by times the vector's element;
/// one rounding of the product and one of the difference on either side, each at most that of `before` and `after`
/// together; and, since both are rounded to the dtype at last, one step of it.
fn edit_bound<T: Element>(dc: f64, v: f32, before: T, after: T) -> f64 {
    let step = match T::OVERFLOW {
        x if x < 1e5 => 2f64.powi(-10),
        x if x.is_finite() => 2f64.powi(-7),
        _ => 0.0,
    };
    let (before, after) = (f64::from(before.to_f32()).abs(), f64::from(after.to_f32()).abs());
    let roundings = 4.0 * f64::from(f32::EPSILON) / 2.0 * (before + after);
    // The last term is the smallest step of f16.
    1.001 * (dc * f64::from(v.abs()) + roundings) + step * after + 2f64.powi(-24)
}

fn rounded_cases<T: Element + Pod>(device: &impl Device) {
    for width in WIDTHS {
        let direction: Vec<f32> = (0..width).map(|i| random(99, i) + 0.01).collect();
        let mean: Vec<f32> = (0..width).map(|i| random(98, i)).collect();
        let probe = Probe::from_vectors(&direction, &mean, 0.8, Some(KernelKind::Scalar)).unwrap();
        let batch = Batch::<T>::new(9, width, 8, random);
        let norm = |r: usize| batch.row(r).iter().map(|h| f64::from(h.to_f32()).powi(2)).sum::<f64>().sqrt();
        // What the two scores may differ by, each with its own bound; `error_bound` wants the sum of |h u|, at most
        // |h| |u|, with |u| = 1 up to a rounding.
        let bound = |r: usize| {
            let ours = probe.error_bound(norm(r)) + error_bound(width, 1.001 * norm(r));
            ours + f64::from(f32::EPSILON) * (norm(r) + probe.offset().abs())
        };
        // The same of two norms, which a dose limit is a share of: half the relative error of the sums of squares.
        let of_norm = error_bound(width, 1.0) + emaudit::kernel::error_bound(KernelKind::Scalar, width, 1.0);
        for aligned in [true, false] {
            let own = device.score(&probe, &batch, ScoreUnit::Raw, aligned);
            let exact = scored(&probe, &batch, ScoreUnit::Raw);
            for r in 0..batch.rows {
                let off = (f64::from(own.scores[r]) - f64::from(exact.scores[r])).abs();
                assert!(off <= bound(r), "{width}, row {r}: off by {off}, not {}", bound(r));
            }
            for steering in steerings(&probe) {
                let own = device.steer(&steering, &batch, Some(ScoreUnit::Raw), None, aligned);
                let expected = steered(&steering, &batch, ScoreUnit::Raw, None);
                for r in 0..batch.rows {
                    // No row here stands so near a gate, a ceiling or a limit that the two could decide differently.
                    assert_eq!(
                        own.status[r],
                        expected.status[r],
                        "{width}, row {r}: {:?}",
                        steering.options()
                    );
                    let dc = match (expected.status[r], steering.options().operation) {
                        (RowStatus::Limited, _) => 0.125 * norm(r) / steering.edit_on_device().norm * of_norm,
                        (_, Operation::Subtract { .. }) => 0.0,
                        _ => bound(r),
                    };
                    for i in 0..width {
                        let at = r * batch.stride + i;
                        let (a, b) = (own.rows[at], expected.rows[at]);
                        let off = (f64::from(a.to_f32()) - f64::from(b.to_f32())).abs();
                        let allowed = edit_bound(dc, steering.vector()[i], batch.data[at], b);
                        assert!(off <= allowed, "{width}, row {r}: {a:?} is not {b:?} within {allowed}");
                    }
                }
            }
        }
    }
}

/// An edit that would leave the dtype's range by one element leaves its row alone; the largest that fits is made.
fn range_cases<T: Element + Pod>(device: &impl Device, largest: f32) {
    for width in [1usize, 8, 64, 576, 4097, 8200] {
        let mut direction = vec![0.0; width];
        direction[width - 1] = -1.0;
        let probe =
            Probe::from_vectors(&direction, &vec![0.0; width], 1.0, Some(KernelKind::Scalar)).unwrap();
        let operation = Operation::Subtract { alpha: largest / 4.0 };
        let options = SteeringOptions { allow_nonspecific: true, ..SteeringOptions::new(operation) };
        let steering = Steering::new(&probe, options).unwrap();
        // From the last element's three quarters, half, all, and again half beside a row that is zero.
        let last = [0.75, 0.5, 1.0, 0.0, -0.5];
        let batch = Batch::<T>::new(5, width, 0, |r, i| if i == width - 1 { largest * last[r] } else { 0.0 });
        for aligned in [true, false] {
            let own = device.steer(&steering, &batch, None, None, aligned);
            assert_same(&format!("range, {width}"), &own, &steered(&steering, &batch, ScoreUnit::Raw, None));
        }
        let outcome = steered(&steering, &batch, ScoreUnit::Raw, None);
        assert_eq!(outcome.status[2], RowStatus::NonFinite);
        assert_eq!(outcome.status[1], RowStatus::Ok);
    }
}

/// All 65536 values of a 16-bit dtype, in rows of eight: read and written as the processor does.
fn halves<T: Element + Pod>(device: &impl Device, aligned: bool) {
    let probe = Probe::from_vectors(&[1.0; 8], &[0.0; 8], 1.0, Some(KernelKind::Scalar)).unwrap();
    let operation = Operation::Subtract { alpha: 2f32.powi(-12) };
    let options = SteeringOptions { allow_nonspecific: true, ..SteeringOptions::new(operation) };
    let steering = Steering::new(&probe, options).unwrap();
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let data: Vec<T> = bytemuck::cast_slice(&all).to_vec();
    let batch = Batch { data, rows: 1 << 13, width: 8, stride: 8 };
    let own = device.steer(&steering, &batch, None, None, aligned);
    assert_same("halves", &own, &steered(&steering, &batch, ScoreUnit::Raw, None));
}

/// Where nothing is rounded the bits are the processor's. How many rows were compared.
pub fn exact_rows(device: &impl Device) -> usize {
    exact_cases::<f32>(device) + exact_cases::<f16>(device) + exact_cases::<bf16>(device)
}

/// Elsewhere scores and edits are within the contract.
pub fn rounded_rows(device: &impl Device) {
    rounded_cases::<f32>(device);
    rounded_cases::<f16>(device);
    rounded_cases::<bf16>(device);
}

/// Edits stay in the range of the dtype.
pub fn range(device: &impl Device) {
    range_cases::<f32>(device, f32::MAX);
    range_cases::<f16>(device, f16::MAX.to_f32());
    range_cases::<bf16>(device, bf16::MAX.to_f32());
}

/// Every value of the 16-bit dtypes.
pub fn every_half(device: &impl Device) {
    for aligned in [true, false] {
        halves::<f16>(device, aligned);
        halves::<bf16>(device, aligned);
    }
}
