//! Steering and scoring: matched properties, for every dtype and every kernel the CPU has.

use emaudit::controls::SplitMix64;
use emaudit::kernel::{Scored, available, error_bound};
use emaudit::{
    Dtype, Error, KernelKind, Operation, Probe, RowStatus, Rows, RowsMut, ScoreUnit, SteerReport, Steering,
    SteeringOptions,
};
use half::{bf16, f16};

const ROWS: usize = 24;
const WIDTH: usize = 149;
const STRIDE: usize = WIDTH + 6;
const SIGMA: f64 = 0.8;

/// Runs one generic test body for every dtype and kernel.
macro_rules! for_every_dtype_and_kernel {
    ($body:ident) => {{
        for kind in available() {
            $body::<f32>(*kind);
            $body::<f16>(*kind);
            $body::<bf16>(*kind);
        }
    }};
}

/// Roughly normal numbers: a sum of four uniform ones.
fn normal(length: usize, seed: u64, scale: f64) -> Vec<f32> {
    let mut generator = SplitMix64::new(seed);
    let mut uniform = || generator.next_u64() as f64 / u64::MAX as f64 - 0.5;
    (0..length).map(|_| ((uniform() + uniform() + uniform() + uniform()) * scale) as f32).collect()
}

fn data<T: Scored>(seed: u64) -> Vec<T> {
    normal(ROWS * STRIDE, seed, 3.0).into_iter().map(T::from_f32).collect()
}

fn probe(kind: KernelKind) -> Probe {
    Probe::from_vectors(&normal(WIDTH, 1, 0.5), &normal(WIDTH, 2, 0.2), SIGMA, Some(kind)).unwrap()
}

fn options(operation: Operation) -> SteeringOptions {
    SteeringOptions { allow_nonspecific: true, ..SteeringOptions::new(operation) }
}

fn steering(kind: KernelKind, operation: Operation) -> Steering {
    Steering::new(&probe(kind), options(operation)).unwrap()
}

fn view<T: Scored>(data: &[T]) -> Rows<'_> {
    Rows::new(data, ROWS, WIDTH, STRIDE).unwrap()
}

fn view_mut<T: Scored>(data: &mut [T]) -> RowsMut<'_> {
    RowsMut::new(data, ROWS, WIDTH, STRIDE).unwrap()
}

fn scores<T: Scored>(probe: &Probe, data: &[T], unit: ScoreUnit) -> Vec<f32> {
    let mut scores = vec![0.0; ROWS];
    probe.score(&view(data), unit, &mut scores, None).unwrap();
    scores
}

fn bits<T: Scored>(row: &[T]) -> Vec<u32> {
    row.iter().map(|h| h.to_f32().to_bits()).collect()
}

fn row<T: Scored>(data: &[T], i: usize) -> &[T] {
    &data[i * STRIDE..][..WIDTH]
}

fn norm<T: Scored>(row: &[T]) -> f64 {
    row.iter().map(|h| f64::from(h.to_f32()).powi(2)).sum::<f64>().sqrt()
}

fn dot<T: Scored>(row: &[T], u: &[f32]) -> f64 {
    row.iter().zip(u).map(|(h, u)| f64::from(h.to_f32()) * f64::from(*u)).sum()
}

/// Half a unit in the last place, relative: what rounding to the dtype costs (all values here are normal or zero-ish).
fn dtype_epsilon<T: Scored>() -> f64 {
    match T::DTYPE {
        Dtype::F32 => 0.5f64.powi(24),
        Dtype::F16 => 0.5f64.powi(11),
        Dtype::Bf16 => 0.5f64.powi(8),
    }
}

/// How far `sum_i e_i u_i` can go when every element is rounded once: to the dtype, and the f32 edit below it.
fn rounding_bound<T: Scored>(before: &[T], after: &[T], u: &[f32], c: f64) -> f64 {
    let one = |((h, a), u): ((&T, &T), &f32)| {
        let (h, a, u) = (f64::from(h.to_f32()), f64::from(a.to_f32()), f64::from(*u));
        let f32_part = (h.abs() + 2.0 * (c * u).abs()) * 0.5f64.powi(23);
        // |exact| <= |rounded| / (1 - e); f16 subnormals are off by at most 2^-25 instead.
        (f32_part + a.abs() * dtype_epsilon::<T>() * 1.01 + 0.5f64.powi(25)) * u.abs()
    };
    before.iter().zip(after).zip(u).map(one).sum()
}

#[test]
fn scores_follow_their_definition() {
    fn body<T: Scored>(kind: KernelKind) {
        let (probe, data) = (probe(kind), data::<T>(3));
        let u = probe.unit_direction();
        assert!((norm(u) - 1.0).abs() < 1e-7);
        let mean = normal(WIDTH, 2, 0.2);
        let (raw, z) = (scores(&probe, &data, ScoreUnit::Raw), scores(&probe, &data, ScoreUnit::AlignedSd));
        for i in 0..ROWS {
            let exact = dot(row(&data, i), u) - dot(&mean, u);
            let bound = probe.error_bound(norm(row(&data, i)));
            assert!((f64::from(raw[i]) - exact).abs() <= bound, "{kind} {:?}", T::DTYPE);
            let bound = bound / SIGMA + f64::from(z[i].abs()) * 0.5f64.powi(24);
            assert!((f64::from(z[i]) - exact / SIGMA).abs() <= bound);
        }
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn several_probes_score_as_each_does_alone() {
    fn body<T: Scored>(kind: KernelKind) {
        let one = |k: u64| {
            let (v, mean) = (normal(WIDTH, 100 + k, 0.5), normal(WIDTH, 200 + k, 0.2));
            Probe::from_vectors(&v, &mean, SIGMA, Some(kind)).unwrap()
        };
        let mut data = data::<T>(3);
        data[4 * STRIDE + WIDTH - 1] = T::from_f32(f32::NAN);
        // One, a tile and its remainder, and more than are taken together.
        for (count, rows) in [(1, ROWS), (5, ROWS), (8, ROWS - 1), (11, ROWS - 2), (3, 1)] {
            let probes: Vec<Probe> = (0..count as u64).map(one).collect();
            let view = Rows::new(&data, rows, WIDTH, STRIDE).unwrap();
            let (mut found, mut status) = (vec![0.0; rows * count], vec![RowStatus::Gated; rows]);
            let result = Probe::score_all(&probes, &view, ScoreUnit::Raw, &mut found, Some(&mut status));
            let (mut shared, references) = (found.clone(), probes.iter().collect::<Vec<_>>());
            shared.fill(0.0);
            let _ = Probe::score_all(&references, &view, ScoreUnit::Raw, &mut shared, None);
            assert_eq!(bits(&shared), bits(&found));
            let expected = if rows > 4 { Err(1) } else { Ok(()) };
            assert_eq!(result.map_err(|e| matches!(e, Error::NonFinite { rows: 1 }) as u32), expected);
            for (k, probe) in probes.iter().enumerate() {
                let (mut alone, mut alone_status) = (vec![0.0; rows], vec![RowStatus::Gated; rows]);
                let _ = probe.score(&view, ScoreUnit::Raw, &mut alone, Some(&mut alone_status));
                let column: Vec<u32> = (0..rows).map(|i| found[i * count + k].to_bits()).collect();
                assert_eq!(column, bits(&alone), "{kind} {:?} {count}", T::DTYPE);
                assert_eq!(status, alone_status);
            }
        }
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn several_probes_are_refused_before_anything_is_written() {
    let (data, kinds) = (data::<f32>(3), available());
    let probes = [probe(kinds[0]), probe(kinds[0])];
    let rows = view(&data);
    let mut scores = [7.0; 2 * ROWS];
    let mut refused = |probes: &[Probe], length: usize, statuses: usize| {
        let mut status = vec![RowStatus::Gated; statuses];
        let scores = &mut scores[..length];
        let error = Probe::score_all(probes, &rows, ScoreUnit::Raw, scores, Some(&mut status)).unwrap_err();
        assert!(scores.iter().all(|s| *s == 7.0) && status.iter().all(|s| *s == RowStatus::Gated));
        error.to_string()
    };
    assert!(refused(&[], 0, ROWS).contains("no probe"));
    let odd = format!("{} scores for {ROWS} rows and 2 probes", 2 * ROWS - 1);
    assert!(refused(&probes, 2 * ROWS - 1, ROWS).contains(&odd));
    assert!(refused(&probes, 2 * ROWS, ROWS - 1).contains("statuses"));
    let mixed = [probe(kinds[0]), probe(kinds[1])];
    assert!(refused(&mixed, 2 * ROWS, ROWS).contains("kernels"));
    let narrow = Probe::from_vectors(&[1.0], &[0.0], 1.0, Some(kinds[0])).unwrap();
    assert!(refused(&[probe(kinds[0]), narrow], 2 * ROWS, ROWS).contains("width"));
}

#[test]
fn subtract_is_the_contracts_edit_with_the_raw_direction() {
    fn body<T: Scored>(kind: KernelKind) {
        let steering = steering(kind, Operation::Subtract { alpha: 0.75 });
        let strengths: Vec<f32> = (0..ROWS).map(|i| i as f32 / 8.0 - 1.0).collect();
        let (before, mut after) = (data::<T>(4), data::<T>(4));
        let report = steering.apply(&mut view_mut(&mut after), Some(&strengths), None).unwrap();
        for (i, strength) in strengths.iter().enumerate() {
            let v = steering.probe().direction();
            let c = 0.75 * strength;
            let expected: Vec<T> =
                row(&before, i).iter().zip(v).map(|(h, v)| T::from_f32(h.to_f32() - c * v)).collect();
            assert_eq!(bits(row(&after, i)), bits(&expected), "{kind} {:?}", T::DTYPE);
        }
        // Strength 8/8 - 1 is zero: that row is not written to.
        assert_eq!((report.rows, report.touched, report.gated, report.nonfinite), (ROWS, ROWS - 1, 0, 0));
        let dose = |i: usize| {
            f64::from(0.75 * strengths[i].abs()) * steering.probe().direction_norm() / norm(row(&before, i))
        };
        let largest = (0..ROWS).map(dose).fold(0.0, f64::max);
        assert!((f64::from(report.largest_dose) / largest - 1.0).abs() < 1e-5);
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn project_out_leaves_nothing_along_the_direction() {
    fn body<T: Scored>(kind: KernelKind) {
        let steering = steering(kind, Operation::ProjectOut { alpha: 1.0 });
        let u = steering.probe().unit_direction();
        let (before, mut after) = (data::<T>(5), data::<T>(5));
        steering.apply(&mut view_mut(&mut after), None, None).unwrap();
        for i in 0..ROWS {
            let (h, left) = (row(&before, i), dot(row(&after, i), u));
            let along = dot(h, u);
            // The kernel's dot, then |u| that is not quite 1, then the roundings of the edit.
            let sum_abs: f64 = h.iter().zip(u).map(|(h, u)| f64::from((h.to_f32() * u).abs())).sum();
            let bound = error_bound(kind, WIDTH, sum_abs) * 1.01
                + along.abs() * (1.0 - norm(u).powi(2)).abs()
                + rounding_bound(h, row(&after, i), u, along);
            assert!(left.abs() <= bound, "{kind} {:?}: {left} of {along}, bound {bound}", T::DTYPE);
            assert!(bound < norm(h) * 0.02, "the bound means something");
        }
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn clamp_never_raises_a_score_and_leaves_low_rows_alone() {
    fn body<T: Scored>(kind: KernelKind) {
        for ceiling in [-2.0f32, 0.0, 0.5, 1.0] {
            let steering = steering(kind, Operation::Clamp { ceiling });
            let probe = steering.probe();
            let (before, mut after) = (data::<T>(6), data::<T>(6));
            let was = scores(probe, &before, ScoreUnit::AlignedSd);
            let report = steering.apply(&mut view_mut(&mut after), None, None).unwrap();
            let is = scores(probe, &after, ScoreUnit::AlignedSd);
            for i in 0..ROWS {
                assert!(is[i] <= was[i], "{kind} {:?}: {} -> {}", T::DTYPE, was[i], is[i]);
                if was[i] <= ceiling {
                    assert_eq!(bits(row(&after, i)), bits(row(&before, i)));
                    continue;
                }
                let u = probe.unit_direction();
                let excess = f64::from(was[i] - ceiling) * SIGMA;
                let bound = 2.0 * probe.error_bound(norm(row(&before, i)))
                    + rounding_bound(row(&before, i), row(&after, i), u, excess);
                assert!((f64::from(is[i] - ceiling) * SIGMA).abs() <= bound * 1.01);
            }
            let above = was.iter().filter(|z| **z > ceiling).count();
            assert!(above > 0 && above < ROWS, "the test sees both sides");
            assert_eq!(report.touched, above);
        }
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn clamp_never_raises_a_score_even_when_the_excess_is_tiny() {
    fn body<T: Scored>(kind: KernelKind) {
        let probe = probe(kind);
        let before = data::<T>(7);
        let was = scores(&probe, &before, ScoreUnit::AlignedSd);
        for (i, z) in was.iter().enumerate() {
            // One step of f32 below the score: most elements round back to what they were.
            let ceiling = z.next_down();
            let steering = Steering::new(&probe, options(Operation::Clamp { ceiling })).unwrap();
            let mut after = before.clone();
            steering.apply(&mut view_mut(&mut after), None, None).unwrap();
            assert!(scores(&probe, &after, ScoreUnit::AlignedSd)[i] <= *z);
        }
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn a_closed_gate_leaves_rows_alone() {
    fn body<T: Scored>(kind: KernelKind) {
        let probe = probe(kind);
        let gated = SteeringOptions { gate: Some(0.25), ..options(Operation::Subtract { alpha: 1.0 }) };
        let (before, mut after) = (data::<T>(8), data::<T>(8));
        let was = scores(&probe, &before, ScoreUnit::AlignedSd);
        let mut status = [RowStatus::NonFinite; ROWS];
        let report = Steering::new(&probe, gated)
            .unwrap()
            .apply(&mut view_mut(&mut after), None, Some(&mut status))
            .unwrap();
        for i in 0..ROWS {
            let open = was[i] > 0.25;
            assert_eq!(status[i], if open { RowStatus::Ok } else { RowStatus::Gated });
            assert_eq!(bits(row(&after, i)) == bits(row(&before, i)), !open);
        }
        assert_eq!(report.gated + report.touched, ROWS);
        assert!(report.gated > 0 && report.touched > 0, "the test sees both sides");
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn rows_behind_a_gate_are_edited_as_each_alone() {
    fn body<T: Scored>(kind: KernelKind) {
        // Rows enough for several turns, of which the first, the third and the fourth let most through, and the last few.
        let rows = 5 * 256 + 7;
        let shift = |i: usize| [2.0f32, -2.0, 2.0, 2.0, 0.0, 2.0][i / 256];
        let probe = probe(kind);
        let before: Vec<T> = normal(rows * WIDTH, 11, 3.0)
            .into_iter()
            .enumerate()
            .map(|(at, h)| match (at / WIDTH, at % WIDTH) {
                // Not finite, in turns that are taken each way.
                (200 | 300 | 700, 17) => f32::NAN,
                (row, column) => h + shift(row) * probe.unit_direction()[column],
            })
            .map(T::from_f32)
            .collect();
        let strengths: Vec<f32> = (0..rows).map(|i| [1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0][i / 9 % 7]).collect();
        let mut groups = 0;
        for operation in [Operation::Subtract { alpha: 1.0 }, Operation::Clamp { ceiling: 0.5 }] {
            for dose_limit in [None, Some(0.04)] {
                let gated = SteeringOptions { gate: Some(0.25), dose_limit, ..options(operation) };
                let steering = Steering::new(&probe, gated).unwrap();
                let (mut after, mut alone) = (before.clone(), before.clone());
                let (mut scores, mut status) = (vec![0.0; rows], vec![RowStatus::Ok; rows]);
                let mut view = RowsMut::new(&mut after, rows, WIDTH, WIDTH).unwrap();
                let (unit, each) = (ScoreUnit::AlignedSd, Some(&strengths[..]));
                let result = steering.score_and_apply(&mut view, unit, &mut scores, each, Some(&mut status));
                assert!(matches!(result, Err(Error::NonFinite { rows: 3 })));
                let mut touched = [0; 6];
                for (i, row) in alone.chunks_exact_mut(WIDTH).enumerate() {
                    let (mut score, mut found) = ([0.0], [RowStatus::Ok]);
                    let was = bits(row);
                    let mut view = RowsMut::new(row, 1, WIDTH, WIDTH).unwrap();
                    let each = Some(&strengths[i..][..1]);
                    let _ = steering.score_and_apply(&mut view, unit, &mut score, each, Some(&mut found));
                    assert_eq!(
                        (score[0].to_bits(), found[0]),
                        (scores[i].to_bits(), status[i]),
                        "{kind} {i}"
                    );
                    touched[i / 256] += usize::from(bits(row) != was);
                }
                assert_eq!(bits(&after), bits(&alone), "{kind}");
                groups += usize::from(touched[0] > 128 && touched[1] < 128 && touched[2] > 128);
            }
        }
        assert!(groups > 0, "rows were taken only one way");
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn the_dose_limit_holds() {
    fn body<T: Scored>(kind: KernelKind) {
        for operation in [Operation::Subtract { alpha: -3.0 }, Operation::ProjectOut { alpha: 1.0 }] {
            let limit = 0.05f32;
            let limited = SteeringOptions { dose_limit: Some(limit), ..options(operation) };
            let steering = Steering::new(&probe(kind), limited).unwrap();
            let (before, mut after) = (data::<T>(9), data::<T>(9));
            let mut status = [RowStatus::Ok; ROWS];
            let report = steering.apply(&mut view_mut(&mut after), None, Some(&mut status)).unwrap();
            for i in 0..ROWS {
                let (h, a) = (row(&before, i), row(&after, i));
                let change: Vec<f32> = h.iter().zip(a).map(|(h, a)| a.to_f32() - h.to_f32()).collect();
                // The norm is computed in f32; rounding to the dtype comes on top of the limit.
                let rounding =
                    norm(a) * dtype_epsilon::<T>() * 1.01 + (WIDTH as f64).sqrt() * 0.5f64.powi(25);
                let bound = f64::from(limit) * norm(h) * (1.0 + 1e-5) + rounding + norm(h) * 0.5f64.powi(23);
                assert!(norm(&change) <= bound, "{kind} {:?}", T::DTYPE);
            }
            assert_eq!(report.limited, status.iter().filter(|s| **s == RowStatus::Limited).count());
            assert!(report.limited > 0 && report.largest_dose <= limit);
            assert_eq!(report.touched, ROWS);
        }
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn a_zero_row_has_no_dose_to_spend() {
    let limited = SteeringOptions { dose_limit: Some(0.1), ..options(Operation::Subtract { alpha: 1.0 }) };
    let steering = Steering::new(&probe(KernelKind::Scalar), limited).unwrap();
    let (mut zeros, mut status) = (vec![0.0f32; WIDTH], [RowStatus::Ok]);
    let mut rows = RowsMut::new(&mut zeros, 1, WIDTH, WIDTH).unwrap();
    let report = steering.apply(&mut rows, None, Some(&mut status)).unwrap();
    assert_eq!((report.touched, status[0]), (0, RowStatus::Limited));
    assert!(zeros.iter().all(|h| h.to_bits() == 0));
}

#[test]
fn norms_beyond_f32_still_limit_the_dose() {
    // The squares of these rows overflow f32, or vanish in it; the limit is neither lost nor zero.
    for (kind, scale) in available().iter().flat_map(|kind| [(kind, 1e25f32), (kind, 1e-25)]) {
        let operation = Operation::Subtract { alpha: scale * 4.0 };
        let limited = SteeringOptions { dose_limit: Some(0.5), ..options(operation) };
        let steering = Steering::new(&probe(*kind), limited).unwrap();
        let before: Vec<f32> = normal(WIDTH, 10, 1.0).iter().map(|h| h * scale).collect();
        let mut after = before.clone();
        let mut rows = RowsMut::new(&mut after, 1, WIDTH, WIDTH).unwrap();
        assert_eq!(steering.apply(&mut rows, None, None).unwrap().limited, 1);
        let change: Vec<f32> = before.iter().zip(&after).map(|(h, a)| h - a).collect();
        let dose = norm(&change) / norm(&before);
        assert!((dose - 0.5).abs() < 1e-5, "{kind} {scale}: {dose}");
    }
}

#[test]
fn elements_between_rows_are_never_touched() {
    fn body<T: Scored>(kind: KernelKind) {
        let mut data = data::<T>(11);
        for i in 0..ROWS {
            // Not even read: a NaN there flags nothing.
            data[i * STRIDE + WIDTH..(i + 1) * STRIDE].fill(T::from_f32(f32::NAN));
        }
        let steering = steering(kind, Operation::Subtract { alpha: 1.0 });
        let between = |data: &[T]| -> Vec<u32> {
            (0..ROWS).flat_map(|i| bits(&data[i * STRIDE + WIDTH..(i + 1) * STRIDE])).collect()
        };
        let before = between(&data);
        assert_eq!(steering.apply(&mut view_mut(&mut data), None, None).unwrap().touched, ROWS);
        assert_eq!(between(&data), before);
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn one_pass_equals_score_then_apply_bit_for_bit() {
    fn body<T: Scored>(kind: KernelKind) {
        for operation in [
            Operation::Subtract { alpha: 0.5 },
            Operation::ProjectOut { alpha: 0.9 },
            Operation::Clamp { ceiling: 0.1 },
        ] {
            let all = SteeringOptions { gate: Some(-1.0), dose_limit: Some(0.1), ..options(operation) };
            let steering = Steering::new(&probe(kind), all).unwrap();
            let strengths: Vec<f32> = (0..ROWS).map(|i| i as f32 / 16.0).collect();
            let mut data = data::<T>(12);
            data[STRIDE * 3 + 7] = T::from_f32(f32::INFINITY);
            let (mut one, mut two) = (data.clone(), data);
            let (mut one_scores, mut two_scores) = ([0.0; ROWS], [0.0; ROWS]);
            let (mut one_status, mut two_status) = ([RowStatus::Ok; ROWS], [RowStatus::Ok; ROWS]);
            let unit = ScoreUnit::AlignedSd;
            let first = steering.score_and_apply(
                &mut view_mut(&mut one),
                unit,
                &mut one_scores,
                Some(&strengths),
                Some(&mut one_status),
            );
            let scored = steering.probe().score(&view(&two), unit, &mut two_scores, None);
            let applied = steering.apply(&mut view_mut(&mut two), Some(&strengths), Some(&mut two_status));
            for result in [first.map(|_| ()), scored, applied.map(|_| ())] {
                assert!(matches!(result, Err(Error::NonFinite { rows: 1 })));
            }
            assert_eq!(bits(&one), bits(&two), "{kind} {:?}", T::DTYPE);
            assert_eq!(one_scores.map(f32::to_bits), two_scores.map(f32::to_bits));
            assert_eq!(one_status, two_status);
            assert!(one_scores[3].is_nan());
        }
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn a_subtraction_decided_without_scores_is_the_one_decided_with_them() {
    fn body<T: Scored>(kind: KernelKind) {
        let mut start: Vec<T> = data(17);
        // Norms below, inside and above what f32 squares hold; nothing at all; and no number at every place of a block.
        let scales = [1.0, 0.0, 1e-20, 1e-38, 1e15, 1e18, 3e36];
        for i in 0..ROWS {
            let scale = scales[i % scales.len()];
            for x in &mut start[i * STRIDE..][..WIDTH] {
                *x = T::from_f32(x.to_f32() * scale);
            }
        }
        for (i, bad) in [(7, f32::NAN), (14, f32::INFINITY), (21, f32::NEG_INFINITY)] {
            start[i * STRIDE + 6 * i] = T::from_f32(bad);
        }
        let strengths: Vec<f32> = (0..ROWS).map(|i| [1.0, -0.5, 0.0, 1e30][i % 4]).collect();
        let mut statuses = std::collections::BTreeSet::new();
        for dose_limit in [None, Some(0.01)] {
            let options = SteeringOptions { dose_limit, ..options(Operation::Subtract { alpha: 0.7 }) };
            let steering = Steering::new(&probe(kind), options).unwrap();
            for strengths in [None, Some(&strengths[..])] {
                let (mut alone, mut scored) = (start.clone(), start.clone());
                let mut status = [[RowStatus::Ok; ROWS]; 2];
                let first = steering.apply(&mut view_mut(&mut alone), strengths, Some(&mut status[0]));
                let (mut rows, mut scores) = (view_mut(&mut scored), [0.0; ROWS]);
                let second = steering.score_and_apply(
                    &mut rows,
                    ScoreUnit::Raw,
                    &mut scores,
                    strengths,
                    Some(&mut status[1]),
                );
                assert_eq!(bits(&alone), bits(&scored), "{kind} {:?}", T::DTYPE);
                assert_eq!(status[0], status[1]);
                assert_eq!(first.unwrap_err().to_string(), second.unwrap_err().to_string());
                statuses.extend(status[0].map(|s| s as u8));
            }
        }
        assert!(statuses.len() >= 3, "{statuses:?}");
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn nonfinite_rows_stay_and_are_flagged_and_the_others_proceed() {
    fn body<T: Scored>(kind: KernelKind) {
        let steering = steering(kind, Operation::Subtract { alpha: 1.0 });
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut data = data::<T>(13);
            data[STRIDE * 2] = T::from_f32(bad);
            data[STRIDE * 5 + WIDTH - 1] = T::from_f32(bad);
            let before = data.clone();
            let (mut scored, mut status) = ([0.0; ROWS], [RowStatus::Gated; ROWS]);
            let result = steering.probe().score(&view(&data), ScoreUnit::Raw, &mut scored, Some(&mut status));
            assert!(matches!(result, Err(Error::NonFinite { rows: 2 })));
            let check = |status: &[RowStatus]| {
                let flagged = |s: &RowStatus| *s == RowStatus::NonFinite;
                assert!(status.iter().enumerate().all(|(i, s)| flagged(s) == (i == 2 || i == 5)));
            };
            check(&status);
            assert!(scored.iter().enumerate().all(|(i, s)| s.is_nan() == (i == 2 || i == 5)));
            let result = steering.apply(&mut view_mut(&mut data), None, Some(&mut status));
            assert!(matches!(result, Err(Error::NonFinite { rows: 2 })));
            check(&status);
            for i in 0..ROWS {
                assert_eq!(bits(row(&data, i)) == bits(row(&before, i)), i == 2 || i == 5);
            }
        }
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn an_edit_that_would_overflow_is_not_made() {
    fn body<T: Scored>(kind: KernelKind, highest: f32, fits: f32, breaks: f32) {
        let probe = Probe::from_vectors(&[0.0, -1.0, 0.0], &[0.0; 3], 1.0, Some(kind)).unwrap();
        let steering = Steering::new(&probe, options(Operation::Subtract { alpha: 1.0 })).unwrap();
        let mut data = [T::from_f32(1.0), T::from_f32(highest), T::from_f32(-2.0)].repeat(2);
        let before = data.clone();
        let mut status = [RowStatus::Ok; 2];
        let mut rows = RowsMut::new(&mut data, 2, 3, 3).unwrap();
        let result = steering.apply(&mut rows, Some(&[fits, breaks]), Some(&mut status));
        assert!(matches!(result, Err(Error::NonFinite { rows: 1 })), "{kind} {:?}", T::DTYPE);
        assert_eq!(status, [RowStatus::Ok, RowStatus::NonFinite]);
        assert_eq!(bits(&data[3..]), bits(&before[3..]));
        assert!(data[1].to_f32().is_finite());
    }
    for kind in available() {
        // 65504 + 15 rounds back down, + 16 ties to even and up to infinity.
        body::<f16>(*kind, 65504.0, 15.0, 16.0);
        body::<f32>(*kind, 1e38, 2e38, 3e38);
        body::<bf16>(*kind, 1e38, 2e38, 2.6e38);
    }
}

#[test]
fn arguments_are_refused_before_the_first_write() {
    let kind = KernelKind::Scalar;
    let steering = steering(kind, Operation::Clamp { ceiling: -100.0 });
    let mut data = data::<f32>(14);
    let before = bits(&data);
    let strengths =
        |last: f32| -> Vec<f32> { (0..ROWS).map(|i| if i == ROWS - 1 { last } else { 1.0 }).collect() };
    let mut refuse = |strengths: &[f32], statuses: usize, scores: usize| {
        let (mut status, mut scores) = (vec![RowStatus::Ok; statuses], vec![7.0; scores]);
        let mut rows = view_mut(&mut data);
        let result = steering.score_and_apply(
            &mut rows,
            ScoreUnit::Raw,
            &mut scores,
            Some(strengths),
            Some(&mut status),
        );
        assert!(matches!(result, Err(Error::InvalidArgument(_))));
        assert!(scores.iter().all(|s| *s == 7.0));
    };
    refuse(&strengths(f32::NAN), ROWS, ROWS);
    refuse(&strengths(f32::INFINITY), ROWS, ROWS);
    refuse(&strengths(-1.0), ROWS, ROWS);
    refuse(&strengths(1.0)[1..], ROWS, ROWS);
    refuse(&strengths(1.0), ROWS + 1, ROWS);
    refuse(&strengths(1.0), ROWS, ROWS - 1);
    assert_eq!(bits(&data), before);
    let mut narrow = RowsMut::new(&mut data, ROWS, WIDTH - 1, STRIDE).unwrap();
    assert!(matches!(steering.apply(&mut narrow, None, None), Err(Error::WidthMismatch { .. })));
    assert_eq!(bits(&data), before);
}

#[test]
fn no_rows_is_no_work() {
    let steering = steering(KernelKind::Portable, Operation::Subtract { alpha: 1.0 });
    let mut rows = RowsMut::new::<bf16>(&mut [], 0, WIDTH, 0).unwrap();
    assert_eq!(steering.apply(&mut rows, Some(&[]), Some(&mut [])).unwrap(), SteerReport::default());
}

#[test]
fn a_direction_without_evidence_needs_the_flag() {
    let operation = Operation::Subtract { alpha: 1.0 };
    let result = Steering::new(&probe(KernelKind::Scalar), SteeringOptions::new(operation));
    assert!(matches!(result, Err(Error::NotSpecific { .. })));
}

#[test]
fn parameters_that_mean_nothing_are_refused() {
    let probe = probe(KernelKind::Scalar);
    let good = options(Operation::Subtract { alpha: 1.0 });
    for bad in [
        options(Operation::Subtract { alpha: f32::NAN }),
        options(Operation::ProjectOut { alpha: f32::INFINITY }),
        options(Operation::Clamp { ceiling: f32::NAN }),
        SteeringOptions { gate: Some(f32::NAN), ..good },
        SteeringOptions { dose_limit: Some(0.0), ..good },
        SteeringOptions { dose_limit: Some(f32::NAN), ..good },
    ] {
        assert!(matches!(Steering::new(&probe, bad), Err(Error::InvalidArgument(_))), "{bad:?}");
    }
    let vectors = |v: &[f32], m: &[f32], sigma| Probe::from_vectors(v, m, sigma, None).map(|_| ());
    assert!(vectors(&[], &[], 1.0).is_err());
    assert!(vectors(&[0.0], &[0.0], 1.0).is_err());
    assert!(vectors(&[f32::NAN], &[0.0], 1.0).is_err());
    assert!(vectors(&[1.0], &[f32::INFINITY], 1.0).is_err());
    assert!(vectors(&[1.0], &[0.0, 0.0], 1.0).is_err());
    assert!(vectors(&[1.0], &[0.0], 0.0).is_err());
    assert!(vectors(&[1.0], &[0.0], f64::NAN).is_err());
}

#[test]
fn probes_and_steerings_are_shared_between_threads() {
    fn shared<T: Send + Sync>(_: &T) {}
    let steering = steering(KernelKind::Portable, Operation::ProjectOut { alpha: 1.0 });
    shared(&steering);
    let data = data::<f32>(15);
    let expected = scores(steering.probe(), &data, ScoreUnit::Raw);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(scores(steering.probe(), &data, ScoreUnit::Raw), expected));
        }
    });
}
