//! Properties: what an edit leaves, and that controls are as large as what they stand against, row by row.

use super::gate::{GatedShift, LearnedGate, Options, Reassigned};
use super::*;
use crate::battery;
use crate::extract::{column_means, estimators::Groups, mean_difference, norm};
use crate::matrix::{cosine, golden};
use emaudit::ScoreUnit;

const HIDDEN: usize = 12;

fn groups() -> (Vec<f32>, Vec<f32>) {
    let base = golden::drawn(40, HIDDEN, 1);
    let mut adapted = golden::drawn(40, HIDDEN, 2);
    adapted.chunks_mut(HIDDEN).for_each(|row| (row[0], row[1]) = (row[0] + 4.0, row[1] - 3.0));
    (adapted, base)
}

fn edited(edit: &dyn RowEdit, rows: &[f32]) -> Vec<f32> {
    let mut rows = rows.to_vec();
    edit.edit(&mut rows, HIDDEN).unwrap();
    rows
}

/// Every edit of this module, on the same groups.
fn edits() -> Vec<(&'static str, Box<dyn RowEdit>)> {
    let (adapted, base) = groups();
    let v = mean_difference(&adapted, &base, HIDDEN);
    let aligned: Vec<f32> = column_means(&base, HIDDEN).iter().map(|&m| m as f32).collect();
    let other = golden::drawn(1, HIDDEN, 3);
    let subspace = Subspace::spanned(&[v.clone(), other], 2, &aligned, 1.0).unwrap();
    let training = Groups::new(&adapted, &base, HIDDEN).unwrap();
    let options = Options { steps: 200, ..Options::default() };
    let gate = LearnedGate::train(std::slice::from_ref(&v), &training, &options).unwrap().0;
    vec![
        ("subtract", Box::new(battery::subtract(&v, 0.5).unwrap())),
        ("gated clamp", Box::new(gated_clamp(&v, &aligned, 1.0, 1.0, 2.0).unwrap())),
        ("subspace", Box::new(subspace)),
        ("learned gate", Box::new(GatedShift::new(gate, &v, 0.5).unwrap())),
    ]
}

#[test]
fn a_control_moves_every_row_as_far_as_the_edit_would() {
    let rows = [groups().0, groups().1].concat();
    let (adapted, base) = groups();
    let differences: Vec<f32> = adapted.iter().zip(&base).map(|(a, b)| a - b).collect();
    let mut compared = 0;
    for (name, edit) in edits() {
        let expected = change_norms(edit.as_ref(), &rows, HIDDEN).unwrap();
        assert!(expected.iter().any(|n| *n > 0.0), "{name} edits nothing");
        let zeros = vec![0f32; HIDDEN];
        let plane =
            Subspace::spanned(&[rows[..HIDDEN].to_vec(), golden::drawn(1, HIDDEN, 8)], 2, &zeros, 1.0)
                .unwrap();
        let mut shapes = vec![Shape::Along(golden::drawn(1, HIDDEN, 7)), Shape::Within(plane.clone())];
        let drawn = plane.controls(&base, &differences, 2, 5).unwrap();
        assert_eq!(drawn.len(), 8);
        shapes.extend(drawn.into_iter().map(|c| Shape::Within(c.subspace)));
        for shape in shapes {
            let control = Matched::new(edit.as_ref(), shape).unwrap();
            let found = change_norms(&control, &rows, HIDDEN).unwrap();
            for (row, (f, e)) in rows.chunks(HIDDEN).zip(found.iter().zip(&expected)) {
                // Each element of the row and of the edited row is rounded once.
                let slack = 2.0 * f64::from(f32::EPSILON) * (norm(row) + e);
                assert!((f - e).abs() <= slack, "{name}: {f} is not {e}");
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 4 * 10 * 80);
}

#[test]
fn controls_move_rows_somewhere_else() {
    let (adapted, _) = groups();
    let v = mean_difference(&adapted, &groups().1, HIDDEN);
    let truth = battery::subtract(&v, 1.0).unwrap();
    let other = emaudit::controls::orthogonal(&v, 3);
    let control = Matched::new(&truth, Shape::Along(other.clone())).unwrap();
    for (before, after) in adapted.chunks(HIDDEN).zip(edited(&control, &adapted).chunks(HIDDEN)) {
        let moved: Vec<f32> = before.iter().zip(after).map(|(b, a)| b - a).collect();
        assert!(cosine(&moved, &other).unwrap() > 0.9999);
    }
    // The length of the control's vector does not matter.
    let long: Vec<f32> = other.iter().map(|o| 100.0 * o).collect();
    let again = edited(&Matched::new(&truth, Shape::Along(long)).unwrap(), &adapted);
    let first = edited(&control, &adapted);
    assert!(again.iter().zip(&first).all(|(a, b)| (a - b).abs() <= 1e-5));
}

#[test]
fn a_gated_clamp_leaves_low_rows_and_lowers_high_ones() {
    let (adapted, base) = groups();
    let v = mean_difference(&adapted, &base, HIDDEN);
    let aligned: Vec<f32> = column_means(&base, HIDDEN).iter().map(|&m| m as f32).collect();
    let clamp = gated_clamp(&v, &aligned, 1.0, 0.5, 2.0).unwrap();
    let probe = Probe::from_vectors(&v, &aligned, 1.0, None).unwrap();
    let rows = [adapted, base].concat();
    let z = |rows: &[f32]| crate::extract::scores(&probe, rows, ScoreUnit::AlignedSd).unwrap();
    let (mut open, mut closed) = (0, 0);
    for (before, after) in z(&rows).into_iter().zip(z(&edited(&clamp, &rows))) {
        if before > 2.0 {
            assert!((after - 0.5).abs() < 1e-4, "{before} to {after}");
            open += 1;
        } else {
            assert_eq!(before, after);
            closed += 1;
        }
    }
    assert!(open > 30 && closed > 30, "{open} {closed}");
}

#[test]
fn a_subspace_leaves_nothing_and_does_it_once() {
    let directions: Vec<Vec<f32>> = (0..3).map(|i| golden::drawn(1, HIDDEN, 20 + i)).collect();
    let around = golden::drawn(1, HIDDEN, 30);
    let full = Subspace::spanned(&directions, 3, &around, 1.0).unwrap();
    assert_eq!((full.rank(), full.width()), (3, HIDDEN));
    let rows = golden::drawn(9, HIDDEN, 31);
    let once = edited(&full, &rows);
    for row in once.chunks(HIDDEN) {
        for d in &directions {
            let along: f64 = row.iter().zip(d).zip(&around).map(|((h, d), m)| f64::from((h - m) * d)).sum();
            assert!(along.abs() < 1e-5 * norm(d) * norm(row), "{along}");
        }
    }
    assert!(edited(&full, &once).iter().zip(&once).all(|(a, b)| (a - b).abs() < 1e-5));
    // The point itself does not move; half of alpha removes half.
    assert_eq!(edited(&full, &around), around);
    let half = Subspace::spanned(&directions, 3, &around, 0.5).unwrap();
    for ((h, o), r) in edited(&half, &rows).iter().zip(&once).zip(&rows) {
        assert!((h - (o + r) / 2.0).abs() < 1e-5);
    }
    // Rank one of one direction is the library's projection.
    let zeros = vec![0f32; HIDDEN];
    let line = Subspace::spanned(&directions[..1], 1, &zeros, 1.0).unwrap();
    let probe = Probe::from_vectors(&directions[0], &zeros, 1.0, None).unwrap();
    let options = SteeringOptions {
        allow_nonspecific: true,
        ..SteeringOptions::new(Operation::ProjectOut { alpha: 1.0 })
    };
    let library = edited(&Steering::new(&probe, options).unwrap(), &rows);
    assert!(edited(&line, &rows).iter().zip(&library).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn rank_one_of_two_keeps_what_they_share() {
    let mut a = vec![0f32; HIDDEN];
    let mut b = a.clone();
    (a[0], a[1], b[0], b[1]) = (1.0, 0.2, 50.0, -10.0);
    let line = Subspace::spanned(&[a, b], 1, &[0.0; HIDDEN], 1.0).unwrap();
    let mut shared = vec![0f32; HIDDEN];
    shared[0] = 1.0;
    // Both count alike, although one is fifty times as long: the bisector is dimension 0.
    assert!(edited(&line, &shared).iter().all(|x| x.abs() < 1e-6));
}

#[test]
fn control_subspaces_are_of_the_same_rank_and_where_they_should_be() {
    let (adapted, base) = groups();
    let differences: Vec<f32> = adapted.iter().zip(&base).map(|(a, b)| a - b).collect();
    let directions: Vec<Vec<f32>> = (0..2).map(|i| golden::drawn(1, HIDDEN, 50 + i)).collect();
    let truth = Subspace::spanned(&directions, 2, &[0.0; HIDDEN], 1.0).unwrap();
    let all = truth.controls(&base, &differences, 3, 9).unwrap();
    let names: std::collections::BTreeSet<_> = all.iter().map(|c| c.family).collect();
    assert_eq!(names.len(), 4);
    for control in &all {
        assert_eq!(control.subspace.rank(), 2);
        let row = golden::drawn(1, HIDDEN, 77);
        let inside = crate::matrix::narrowed(&control.subspace.component(&row));
        // A projection: what is inside stays inside.
        let again = crate::matrix::narrowed(&control.subspace.component(&inside));
        assert!(inside.iter().zip(&again).all(|(a, b)| (a - b).abs() < 1e-5));
        if control.family == "orthogonal" {
            for d in &directions {
                assert!(norm(&crate::matrix::narrowed(&control.subspace.component(d))) < 1e-5 * norm(d));
            }
        }
    }
    let again = truth.controls(&base, &differences, 3, 9).unwrap();
    assert!(all.iter().zip(&again).all(|(a, b)| a.subspace == b.subspace && a.seed == b.seed));
}

#[test]
fn bad_edits_are_refused() {
    let v = golden::drawn(1, HIDDEN, 1);
    let zeros = vec![0f32; HIDDEN];
    let error = |directions: &[Vec<f32>], rank, around: &[f32], alpha| {
        Subspace::spanned(directions, rank, around, alpha).unwrap_err().to_string()
    };
    assert!(error(&[], 1, &zeros, 1.0).contains("rank 1 cannot be taken from 0"));
    assert!(error(std::slice::from_ref(&v), 0, &zeros, 1.0).contains("rank 0"));
    assert!(error(&[v.clone(), v.clone()], 2, &zeros, 1.0).contains("span 1 dimensions, not 2"));
    assert!(error(std::slice::from_ref(&zeros), 1, &zeros, 1.0).contains("direction 0 has norm 0"));
    assert!(error(&[v.clone(), v[1..].to_vec()], 1, &zeros, 1.0).contains("direction 1 has 11 dimensions"));
    assert!(error(std::slice::from_ref(&v), 1, &zeros, f64::NAN).contains("alpha is NaN"));
    let truth = battery::subtract(&v, 1.0).unwrap();
    assert!(Matched::new(&truth, Shape::Along(zeros.clone())).is_err());
    let mut broken = golden::drawn(3, HIDDEN, 2);
    broken[HIDDEN + 2] = f32::NAN;
    let subspace = Subspace::spanned(std::slice::from_ref(&v), 1, &zeros, 1.0).unwrap();
    let error = subspace.edit(&mut broken.clone(), HIDDEN).unwrap_err().to_string();
    assert!(error.contains("row 1 has NaN in dimension 2"), "{error}");
    assert!(truth.edit(&mut broken.clone(), HIDDEN).is_err());
    assert!(change_norms(&truth, &broken, HIDDEN).is_err());
    assert!(subspace.edit(&mut [0.0; 6], 6).is_err());
    let narrow = Matched::new(&truth, Shape::Along(vec![1.0; 6])).unwrap();
    assert!(
        narrow.edit(&mut golden::drawn(1, HIDDEN, 2), HIDDEN).unwrap_err().to_string().contains("width 6")
    );
    // Six dimensions have no three perpendicular to four.
    let wide =
        Subspace::spanned(&(0..4).map(|i| golden::drawn(1, 6, i)).collect::<Vec<_>>(), 4, &[0.0; 6], 1.0);
    assert!(wide.unwrap().controls(&golden::drawn(9, 6, 1), &golden::drawn(9, 6, 2), 1, 1).is_err());
}

#[test]
fn a_dealt_gate_spends_what_the_true_one_does() {
    let (adapted, base) = groups();
    let v = mean_difference(&adapted, &base, HIDDEN);
    let training = Groups::new(&adapted, &base, HIDDEN).unwrap();
    let gate = LearnedGate::train(std::slice::from_ref(&v), &training, &Options::default()).unwrap().0;
    let truth = GatedShift::new(gate, &v, 1.0).unwrap();
    let rows = [adapted, base].concat();
    let dealt = Reassigned::new(truth.clone(), 4);
    let (mut a, mut b) =
        (change_norms(&truth, &rows, HIDDEN).unwrap(), change_norms(&dealt, &rows, HIDDEN).unwrap());
    assert!(a.iter().zip(&b).filter(|(a, b)| (*a - *b).abs() > 0.1).count() > 20);
    a.sort_by(f64::total_cmp);
    b.sort_by(f64::total_cmp);
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-4));
}
