//! The self-test of steering: right engines pass whatever their kernel and dtype, wrong ones are caught.

use emaudit::controls::SplitMix64;
use emaudit::kernel::{Scored, available};
use emaudit::{
    Error, KernelKind, LandingReport, Operation, Probe, Rows, RowsMut, ScoreUnit, Steering, SteeringOptions,
};
use half::{bf16, f16};

const ROWS: usize = 32;
const WIDTH: usize = 149;
const STRIDE: usize = WIDTH + 3;

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
    Probe::from_vectors(&normal(WIDTH, 1, 1.0), &normal(WIDTH, 2, 0.2), 0.8, Some(kind)).unwrap()
}

fn steering(kind: KernelKind, options: SteeringOptions) -> Steering {
    Steering::new(&probe(kind), SteeringOptions { allow_nonspecific: true, ..options }).unwrap()
}

fn view<T: Scored>(data: &[T]) -> Rows<'_> {
    Rows::new(data, ROWS, WIDTH, STRIDE).unwrap()
}

fn view_mut<T: Scored>(data: &mut [T]) -> RowsMut<'_> {
    RowsMut::new(data, ROWS, WIDTH, STRIDE).unwrap()
}

/// Every operation, bare and with gate and dose limit.
fn all_options() -> Vec<SteeringOptions> {
    let operations = [
        Operation::Subtract { alpha: 0.75 },
        Operation::ProjectOut { alpha: 0.5 },
        Operation::Clamp { ceiling: -1.0 },
    ];
    let bare = operations.map(SteeringOptions::new);
    let bound = bare.map(|o| SteeringOptions { gate: Some(0.3), dose_limit: Some(0.15), ..o });
    bare.into_iter().chain(bound).collect()
}

fn strengths() -> Vec<f32> {
    (0..ROWS).map(|i| (i % 4) as f32 * 0.5).collect()
}

fn check<B: Scored, A: Scored>(
    steering: &Steering,
    before: &[B],
    after: &[A],
) -> emaudit::Result<LandingReport> {
    steering.check_landed(&view(before), &view(after), Some(&strengths()), None)
}

#[test]
fn what_was_steered_as_asked_landed_on_every_kernel() {
    fn body<T: Scored>(kind: KernelKind) {
        for options in all_options() {
            let before = data::<T>(3);
            let mut after = before.clone();
            let applied = steering(kind, options).apply(&mut view_mut(&mut after), Some(&strengths()), None);
            let applied = applied.unwrap();
            // An engine on one kernel, a self-test on another.
            for judge in available() {
                let report = check(&steering(*judge, options), &before, &after).unwrap();
                let what = format!("{kind} judged by {judge}, {:?}, {options:?}: {report:?}", T::DTYPE);
                assert!(report.landed > 0 && report.untouched > 0, "{what}");
                assert_eq!(report.landed + report.lost, applied.touched, "{what}");
                assert_eq!(report.landed + report.lost + report.untouched, ROWS, "{what}");
                // The smallest clamps may vanish in 8 bits; most edits must not.
                assert!(report.lost * 4 <= report.landed, "{what}");
                assert!(report.largest_deviation > 0.0 && report.largest_deviation <= 1.0, "{what}");
            }
        }
    }
    for_every_dtype_and_kernel!(body);
}

/// Must be caught, with at least `most` rows missed.
fn caught(found: emaudit::Result<LandingReport>, least: usize, what: &str) {
    match found {
        Err(Error::NotLanded { rows: ROWS, missed, largest_deviation, .. }) if missed >= least => {
            assert!(largest_deviation > 1.0, "{what}");
        }
        other => panic!("{what}: {other:?}, wanted {least} missed"),
    }
}

#[test]
fn an_edit_dropped_doubled_or_made_elsewhere_is_caught() {
    fn body<T: Scored>(kind: KernelKind) {
        for options in all_options() {
            let engine = steering(kind, options);
            let what = format!("{kind} {:?} {options:?}", T::DTYPE);
            let before = data::<T>(4);
            let mut once = before.clone();
            engine.apply(&mut view_mut(&mut once), Some(&strengths()), None).unwrap();
            let good = check(&engine, &before, &once).unwrap();

            caught(check(&engine, &before, &before), good.landed, &format!("dropped: {what}"));

            // What a second pass does not move by itself is no second edit: a clamped row lies at the ceiling.
            let mut twice = once.clone();
            engine.apply(&mut view_mut(&mut twice), Some(&strengths()), None).unwrap();
            let mut moved = [false; ROWS];
            let (mut was, mut is) = ([0.0; ROWS], [0.0; ROWS]);
            engine.probe().score(&view(&once), ScoreUnit::AlignedSd, &mut was, None).unwrap();
            engine.probe().score(&view(&twice), ScoreUnit::AlignedSd, &mut is, None).unwrap();
            for i in 0..ROWS {
                moved[i] = (was[i] - is[i]).abs() > 0.3;
            }
            let expected = moved.iter().filter(|m| **m).count();
            assert!(expected > 0, "{what}");
            caught(check(&engine, &before, &twice), expected, &format!("twice: {what}"));

            // One row late, as an engine does that steers by another batch's order.
            let late: Vec<f32> = (0..ROWS).map(|i| strengths()[(i + ROWS - 1) % ROWS]).collect();
            let mut elsewhere = before.clone();
            engine.apply(&mut view_mut(&mut elsewhere), Some(&late), None).unwrap();
            caught(check(&engine, &before, &elsewhere), good.landed / 4, &format!("another row: {what}"));

            // Another direction of the same norm, as a layer off by one gives.
            let other = Probe::from_vectors(&normal(WIDTH, 9, 1.0), &normal(WIDTH, 2, 0.2), 0.8, Some(kind));
            let other = Steering::new(&other.unwrap(), *engine.options()).unwrap();
            let mut wrong = before.clone();
            other.apply(&mut view_mut(&mut wrong), Some(&strengths()), None).unwrap();
            caught(check(&engine, &before, &wrong), 1, &format!("another direction: {what}"));
        }
    }
    for_every_dtype_and_kernel!(body);
}

#[test]
fn an_edit_lost_to_rounding_is_no_landing() {
    // Every element is 1 and half a step of it is 2^-8 in bf16 and 2^-11 in f16; the edits stay below.
    fn body<T: Scored>(alpha: f32) {
        let direction = vec![1.0f32; WIDTH];
        let probe = Probe::from_vectors(&direction, &vec![0.0; WIDTH], 1.0, None).unwrap();
        let options = SteeringOptions::new(Operation::Subtract { alpha });
        let engine = Steering::new(&probe, SteeringOptions { allow_nonspecific: true, ..options }).unwrap();
        let before = vec![T::from_f32(1.0); WIDTH];
        let mut after = before.clone();
        engine.apply(&mut RowsMut::new(&mut after, 1, WIDTH, WIDTH).unwrap(), None, None).unwrap();
        assert!(after.iter().all(|x| x.to_f32() == 1.0), "the edit is lost");
        let rows = |data| Rows::new(data, 1, WIDTH, WIDTH).unwrap();
        let mut deviation = [0.0];
        let found = engine.check_landed(&rows(&before), &rows(&after), None, Some(&mut deviation));
        assert!(matches!(found, Err(Error::NotLanded { rows: 1, missed: 0, lost: 1, .. })), "{found:?}");
        assert!(deviation[0] <= 1.0);
    }
    body::<bf16>(0.5f32.powi(10));
    body::<f16>(0.5f32.powi(13));
}

#[test]
fn rows_that_an_engine_rounds_on_the_way_are_judged_by_the_coarser_dtype() {
    // Kept in bf16, given and read back as f32 on one side.
    for options in all_options() {
        for kind in available() {
            let engine = steering(*kind, options);
            let narrow = data::<bf16>(5);
            let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
            let mut steered = narrow.clone();
            engine.apply(&mut view_mut(&mut steered), Some(&strengths()), None).unwrap();
            let read_back: Vec<f32> = steered.iter().map(|x| x.to_f32()).collect();
            check(&engine, &narrow, &read_back).unwrap();
            check(&engine, &wide, &steered).unwrap();
            // Two f32 views hide that: then the rounding of bf16 shows as what it would be in f32, a miss.
            caught(check(&engine, &wide, &read_back), 1, "hidden rounding");
            caught(check(&engine, &narrow, &wide), 1, "dropped");
        }
    }
}

#[test]
fn rows_that_were_rounded_before_they_were_looked_at_have_landed_all_the_same() {
    // Rows that the edit all but cancels, so that the rounding of what was there is large beside what is left.
    let (direction, rest) = (normal(WIDTH, 1, 1.0), normal(ROWS * STRIDE, 9, 0.003));
    let wide: Vec<f32> =
        rest.iter().enumerate().map(|(i, x)| direction.get(i % STRIDE).unwrap_or(&0.0) + x).collect();
    let narrow: Vec<bf16> = wide.iter().map(|x| bf16::from_f32(*x)).collect();
    for operation in [Operation::Subtract { alpha: 1.0 }, Operation::ProjectOut { alpha: 1.0 }] {
        for kind in available() {
            let engine = steering(*kind, SteeringOptions::new(operation));
            let landed = |before: &Rows<'_>, after: &Rows<'_>| {
                let found = engine.check_landed(before, after, None, None).unwrap();
                assert_eq!(found.landed, ROWS, "{found:?}");
            };
            // Kept in bf16, and seen in f32 before they went there.
            let mut kept = narrow.clone();
            engine.apply(&mut view_mut(&mut kept), None, None).unwrap();
            landed(&view(&wide), &view(&kept));
            // Kept in f32, and seen through bf16 before the edit, then after it.
            let mut kept = wide.clone();
            engine.apply(&mut view_mut(&mut kept), None, None).unwrap();
            landed(&view(&narrow), &view(&kept));
            let seen: Vec<bf16> = kept.iter().map(|x| bf16::from_f32(*x)).collect();
            landed(&view(&wide), &view(&seen));
            caught(engine.check_landed(&view(&narrow), &view(&wide), None, None), ROWS, "dropped");
        }
    }
}

#[test]
fn either_side_of_a_gate_that_rounding_decides_is_right() {
    for kind in available() {
        let options = SteeringOptions::new(Operation::Subtract { alpha: 0.5 });
        let (before, open) = (data::<f32>(6), steering(*kind, options));
        let mut scores = [0.0; ROWS];
        open.probe().score(&view(&before), ScoreUnit::AlignedSd, &mut scores, None).unwrap();
        let gated = steering(*kind, SteeringOptions { gate: Some(scores[7]), ..options });
        let mut after = before.clone();
        gated.apply(&mut view_mut(&mut after), None, None).unwrap();
        let row = 7 * STRIDE..7 * STRIDE + WIDTH;
        assert_eq!(after[row.clone()], before[row.clone()], "at the gate it is closed");
        let found = gated.check_landed(&view(&before), &view(&after), None, None).unwrap();
        // Another kernel may see that one score a little higher.
        let mut edited = before.clone();
        open.apply(&mut view_mut(&mut edited), None, None).unwrap();
        after[row.clone()].copy_from_slice(&edited[row]);
        let other = gated.check_landed(&view(&before), &view(&after), None, None).unwrap();
        assert_eq!((other.landed, other.untouched), (found.landed + 1, found.untouched - 1));
    }
}

#[test]
fn rows_that_are_not_finite_are_counted_and_never_landed() {
    let engine = steering(KernelKind::Scalar, SteeringOptions::new(Operation::Subtract { alpha: 1.0 }));
    let mut before = data::<f32>(7);
    before[STRIDE * 2] = f32::NAN;
    let mut after = before.clone();
    assert!(engine.apply(&mut view_mut(&mut after), None, None).is_err());
    let mut deviations = [0.0; ROWS];
    let found = engine.check_landed(&view(&before), &view(&after), None, Some(&mut deviations));
    assert!(matches!(found, Err(Error::NonFinite { rows: 1 })), "{found:?}");
    assert!(deviations.iter().enumerate().all(|(i, d)| d.is_nan() == (i == 2)));
    // A row that only became bad missed, by no finite amount.
    after[STRIDE * 5] = f32::NAN;
    let found = engine.check_landed(&view(&before), &view(&after), None, Some(&mut deviations));
    assert!(matches!(found, Err(Error::NotLanded { missed: 1, .. })), "{found:?}");
    assert_eq!(deviations[5], f32::INFINITY);
}

#[test]
fn a_row_left_alone_because_its_edit_would_overflow_must_have_stayed() {
    let probe = Probe::from_vectors(&[0.0, -1.0, 0.0], &[0.0; 3], 1.0, None).unwrap();
    let options = SteeringOptions::new(Operation::Subtract { alpha: 16.0 });
    let engine = Steering::new(&probe, SteeringOptions { allow_nonspecific: true, ..options }).unwrap();
    let row = |middle: f32| [1.0, middle, -2.0].map(f16::from_f32);
    let compare = |before: &[f16], after: &[f16]| {
        let rows = |data| Rows::new(data, 1, 3, 3).unwrap();
        engine.check_landed(&rows(before), &rows(after), None, None)
    };
    let found = compare(&row(65504.0), &row(65504.0));
    assert!(matches!(found, Err(Error::NonFinite { rows: 1 })), "{found:?}");
    let found = compare(&row(65504.0), &row(f32::INFINITY));
    assert!(matches!(found, Err(Error::NotLanded { missed: 1, .. })), "{found:?}");
}

#[test]
fn arguments_are_refused_and_no_rows_are_no_failure() {
    let engine = steering(KernelKind::Scalar, SteeringOptions::new(Operation::Clamp { ceiling: 0.0 }));
    let rows = data::<f32>(8);
    let all = view(&rows);
    let fewer = Rows::new(&rows, ROWS - 1, WIDTH, STRIDE).unwrap();
    let narrow = Rows::new(&rows, ROWS, WIDTH - 1, STRIDE).unwrap();
    let refused = |found: emaudit::Result<LandingReport>| matches!(found, Err(Error::InvalidArgument(_)));
    assert!(refused(engine.check_landed(&all, &fewer, None, None)));
    assert!(refused(engine.check_landed(&all, &all, Some(&[1.0]), None)));
    assert!(refused(engine.check_landed(&all, &all, Some(&[-1.0; ROWS]), None)));
    assert!(refused(engine.check_landed(&all, &all, None, Some(&mut [0.0]))));
    for (one, other) in [(&all, &narrow), (&narrow, &all)] {
        let found = engine.check_landed(one, other, None, None);
        assert!(matches!(found, Err(Error::WidthMismatch { .. })));
    }
    let none = Rows::new::<f32>(&[], 0, WIDTH, WIDTH).unwrap();
    assert_eq!(engine.check_landed(&none, &none, Some(&[]), None).unwrap(), LandingReport::default());
}
