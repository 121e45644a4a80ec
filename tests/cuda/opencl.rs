//! The kernels' logic, through OpenCL on a processor, against the library's kernels for processors.

use crate::rows::{Batch, KERNELS, Outcome, WIDTHS, exact, exact_probe, random, scored, steered, steerings};
use crate::skipped::missing;
use bytemuck::Pod;
use emaudit::activations::Element;
use emaudit::kernel::cuda::error_bound;
use emaudit::kernel::cuda::launch::{self, Argument, Launch, Matrix, SteerMemory, THREADS};
use emaudit::{KernelKind, Operation, Probe, RowStatus, ScoreUnit, Steering, SteeringOptions};
use emaudit_device::opencl::{Argument as Value, Memory, OpenCl};
use half::{bf16, f16};
use std::sync::OnceLock;

/// Bytes behind all memory that no kernel may touch.
const GUARD: usize = 4096;

fn device() -> Option<&'static OpenCl> {
    static DEVICE: OnceLock<Result<OpenCl, String>> = OnceLock::new();
    assert_eq!(emaudit_device::threads(), THREADS);
    match DEVICE.get_or_init(|| OpenCl::build(&emaudit_device::source(KERNELS))) {
        Ok(device) => Some(device),
        Err(why) => {
            missing("scoring and steering through OpenCL", &format!("{why}; Debian has pocl-opencl-icd"));
            None
        }
    }
}

/// Memory of one call; where scores or strengths are not given, their place holds `None`.
struct Arrays {
    memory: Vec<Option<Memory>>,
}

impl Arrays {
    fn run<const N: usize>(&self, cl: &OpenCl, launch: &Launch<[Argument<usize>; N]>) {
        let value = |argument: Argument<usize>| match argument {
            Argument::Memory(at) => self.memory[at].as_ref().map_or(Value::Null, Value::Memory),
            Argument::U32(v) => Value::U32(v),
            Argument::U64(v) => Value::U64(v),
            Argument::F32(v) => Value::F32(v),
            Argument::F64(v) => Value::F64(v),
        };
        if launch.blocks > 0 {
            cl.run(launch.kernel, launch.blocks as usize, THREADS, &launch.arguments.map(value));
        }
    }

    /// The first `count` elements, and that nothing behind them was touched.
    fn read<T: Pod>(&self, cl: &OpenCl, at: usize, count: usize) -> Vec<T> {
        let bytes = cl.read(self.memory[at].as_ref().unwrap());
        let (own, guard) = bytes.split_at(count * size_of::<T>());
        assert!(guard.iter().all(|b| *b == 0xa5), "memory {at} was written behind its end");
        own.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }
}

fn padded(vector: &[f32]) -> Vec<f32> {
    let mut padded = vector.to_vec();
    padded.resize(vector.len().next_multiple_of(8), 0.0);
    padded
}

fn matrix<T: Element>(batch: &Batch<T>, aligned: bool) -> Matrix<usize> {
    let Batch { rows, width, stride, .. } = *batch;
    Matrix { data: 0, dtype: T::DTYPE, rows, width, stride, aligned }
}

fn row_status(bytes: &[u8]) -> Vec<RowStatus> {
    let all =
        [RowStatus::Ok, RowStatus::NonFinite, RowStatus::Gated, RowStatus::Limited, RowStatus::BadStrength];
    bytes.iter().map(|b| *all.iter().find(|s| **s as u8 == *b).expect("a status")).collect()
}

/// Scores in the kernels' way.
fn score<T: Element + Pod>(
    cl: &OpenCl,
    probe: &Probe,
    batch: &Batch<T>,
    unit: ScoreUnit,
    aligned: bool,
) -> Outcome<T> {
    let n = batch.rows;
    let direction = padded(probe.unit_direction());
    let memory = [
        cl.memory(&batch.data, GUARD),
        cl.memory(&direction, GUARD),
        cl.memory(&vec![0.0f32; n], GUARD),
        cl.memory(&vec![0x77u8; n], GUARD),
    ];
    let arrays = Arrays { memory: memory.map(Some).into() };
    arrays.run(cl, &launch::score(matrix(batch, aligned), 1, 2, 3, &probe.scale(unit)).unwrap());
    let rows = arrays.read(cl, 0, batch.data.len());
    assert!(bytemuck::cast_slice::<T, u8>(&rows) == bytemuck::cast_slice::<T, u8>(&batch.data));
    assert_eq!(arrays.read::<f32>(cl, 1, direction.len()), direction);
    Outcome { scores: arrays.read(cl, 2, n), status: row_status(&arrays.read::<u8>(cl, 3, n)), rows }
}

/// Steers in the kernels' way; with `unit` it scores too.
fn steer<T: Element + Pod>(
    cl: &OpenCl,
    steering: &Steering,
    batch: &Batch<T>,
    unit: Option<ScoreUnit>,
    strengths: Option<&[f32]>,
    aligned: bool,
) -> Outcome<T> {
    let n = batch.rows;
    let memory = vec![
        Some(cl.memory(&batch.data, GUARD)),
        Some(cl.memory(&padded(steering.probe().unit_direction()), GUARD)),
        Some(cl.memory(&padded(steering.vector()), GUARD)),
        strengths.map(|s| cl.memory(s, GUARD)),
        unit.map(|_| cl.memory(&vec![0.0f32; n], GUARD)),
        Some(cl.memory(&vec![0x77u8; n], GUARD)),
    ];
    let arrays = Arrays { memory };
    let places = SteerMemory { direction: 1, vector: 2, strengths: 3, scores: 4, status: 5 };
    let scale = steering.probe().scale(unit.unwrap_or(ScoreUnit::Raw));
    let launch = launch::steer(matrix(batch, aligned), places, &scale, &steering.edit_on_device());
    arrays.run(cl, &launch.unwrap());
    let scores = unit.map_or(Vec::new(), |_| arrays.read(cl, 4, n));
    Outcome {
        scores,
        status: row_status(&arrays.read::<u8>(cl, 5, n)),
        rows: arrays.read(cl, 0, batch.data.len()),
    }
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

fn exact_cases<T: Element + Pod>(cl: &OpenCl) -> usize {
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
                    let own = score(cl, &probe, &batch, unit, aligned);
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
                    let own = steer(cl, steering, &batch, unit, strengths, aligned);
                    assert_same(&what, &own, &steered(steering, &batch, ScoreUnit::AlignedSd, strengths));
                    compared += rows;
                }
            }
        }
    }
    compared
}

#[test]
fn where_nothing_is_rounded_the_bits_are_the_processors() {
    let Some(cl) = device() else { return };
    let compared = exact_cases::<f32>(cl) + exact_cases::<f16>(cl) + exact_cases::<bf16>(cl);
    println!("{compared} rows compared on {}", cl.device);
    assert!(compared > 30_000, "{compared}");
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

fn rounded_cases<T: Element + Pod>(cl: &OpenCl) {
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
            let own = score(cl, &probe, &batch, ScoreUnit::Raw, aligned);
            let exact = scored(&probe, &batch, ScoreUnit::Raw);
            for r in 0..batch.rows {
                let off = (f64::from(own.scores[r]) - f64::from(exact.scores[r])).abs();
                assert!(off <= bound(r), "{width}, row {r}: off by {off}, not {}", bound(r));
            }
            for steering in steerings(&probe) {
                let own = steer(cl, &steering, &batch, Some(ScoreUnit::Raw), None, aligned);
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

#[test]
fn elsewhere_scores_and_edits_are_within_the_contract() {
    let Some(cl) = device() else { return };
    rounded_cases::<f32>(cl);
    rounded_cases::<f16>(cl);
    rounded_cases::<bf16>(cl);
}

/// An edit that would leave the dtype's range by one element leaves its row alone; the largest that fits is made.
fn range_cases<T: Element + Pod>(cl: &OpenCl, largest: f32) {
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
            let own = steer(cl, &steering, &batch, None, None, aligned);
            assert_same(&format!("range, {width}"), &own, &steered(&steering, &batch, ScoreUnit::Raw, None));
        }
        let outcome = steered(&steering, &batch, ScoreUnit::Raw, None);
        assert_eq!(outcome.status[2], RowStatus::NonFinite);
        assert_eq!(outcome.status[1], RowStatus::Ok);
    }
}

#[test]
fn edits_stay_in_the_range_of_the_dtype() {
    let Some(cl) = device() else { return };
    range_cases::<f32>(cl, f32::MAX);
    range_cases::<f16>(cl, f16::MAX.to_f32());
    range_cases::<bf16>(cl, bf16::MAX.to_f32());
}

#[test]
fn every_half_is_read_and_written_as_the_processor_does() {
    let Some(cl) = device() else { return };
    // All 65536 values, in rows of eight; an edit of nothing but the last element tells whether reading lost something.
    for wide in [true, false] {
        halves::<f16>(cl, wide);
        halves::<bf16>(cl, wide);
    }
}

fn halves<T: Element + Pod>(cl: &OpenCl, aligned: bool) {
    let probe = Probe::from_vectors(&[1.0; 8], &[0.0; 8], 1.0, Some(KernelKind::Scalar)).unwrap();
    let operation = Operation::Subtract { alpha: 2f32.powi(-12) };
    let options = SteeringOptions { allow_nonspecific: true, ..SteeringOptions::new(operation) };
    let steering = Steering::new(&probe, options).unwrap();
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let data: Vec<T> = bytemuck::cast_slice(&all).to_vec();
    let batch = Batch { data, rows: 1 << 13, width: 8, stride: 8 };
    let own = steer(cl, &steering, &batch, None, None, aligned);
    assert_same("halves", &own, &steered(&steering, &batch, ScoreUnit::Raw, None));
}
