//! One row in cache against one and against eight directions.
//!
//! Where a CPU loads one 64-byte register a cycle (Zen 4), a bf16 row of 576 takes at least 18 + 36 of them with our f32
//! direction and 18 + 18 with NumKong's bf16 one: no instruction makes up for that, only rounding the direction would.

use crate::measure::{Report, pair};
use crate::peers::{Blas, Peer};
use crate::{Line, probe, values};
use emaudit::kernel::Kernel;
use emaudit::{Probe, Rows, ScoreUnit};
use half::{bf16, f16};
use std::hint::black_box;

const WIDTHS: [usize; 7] = [576, 1536, 2048, 2304, 3072, 4096, 8192];
const DIRECTIONS: usize = 8;

pub fn run(report: &Report, blas: Option<&Blas>) {
    for width in WIDTHS.into_iter().filter(|w| report.wants_width(*w)) {
        one::<f32>(report, width);
        one::<f16>(report, width);
        one::<bf16>(report, width);
        eight::<f32>(report, width);
        eight::<f16>(report, width);
        eight::<bf16>(report, width);
        if let Some(blas) = blas {
            against_blas(report, width, blas);
        }
    }
}

/// A probe's direction in the row's dtype, as NumKong takes it.
fn narrow<T: Peer>(probe: &Probe) -> Line<T> {
    Line::of(&probe.unit_direction().iter().map(|u| T::from_f32(*u)).collect::<Vec<T>>())
}

/// The kernel alone, and the whole public call, against NumKong's dot product.
fn one<T: Peer>(report: &Report, width: usize) {
    let probe = probe(width, 1);
    let row = Line::<T>::of(&values(width, 2));
    let direction = narrow::<T>(&probe);
    let kernel = Kernel::from_environment().expect("a kernel");
    let mut peer = || {
        black_box(T::dot(black_box(&row), black_box(&direction)));
    };
    let dtype = T::DTYPE.as_str();
    if report.wants("dot") {
        let ours = || {
            black_box(kernel.dot(black_box(&*row), black_box(probe.unit_direction())));
        };
        report.line("dot", width, dtype, "NumKong", pair(1, ours, &mut peer));
    }
    if report.wants("score_row") {
        let ours = || score_row(black_box(&probe), black_box(&row));
        report.line("score_row", width, dtype, "NumKong", pair(1, ours, &mut peer));
    }
}

/// What a caller does for one row: a view, a score, a status.
fn score_row<T: Peer>(probe: &Probe, row: &[T]) {
    let (mut score, mut status) = ([0.0], [emaudit::RowStatus::Ok]);
    let view = Rows::new(row, 1, row.len(), row.len()).expect("one row");
    probe.score(&view, ScoreUnit::AlignedSd, &mut score, Some(&mut status)).expect("finite rows");
    black_box((&score, &status));
}

fn eight<T: Peer>(report: &Report, width: usize) {
    if !report.wants("score_row_8") {
        return;
    }
    let probes: Vec<Probe> = (0..DIRECTIONS as u64).map(|k| probe(width, 10 + k)).collect();
    let row = Line::<T>::of(&values(width, 2));
    let directions: Vec<Line<T>> = probes.iter().map(narrow).collect();
    let ours = || {
        let mut scores = [0.0; DIRECTIONS];
        let view = Rows::new(black_box(&row), 1, width, width).expect("one row");
        Probe::score_all(black_box(&probes), &view, ScoreUnit::AlignedSd, &mut scores, None).expect("finite");
        black_box(&scores);
    };
    let peer = || {
        for direction in black_box(&directions) {
            black_box(T::dot(black_box(&row), direction));
        }
    };
    report.line("score_row_8", width, T::DTYPE.as_str(), "NumKong", pair(1, ours, peer));
}

/// A BLAS multiplies f32 only; the eight directions are its matrix.
fn against_blas(report: &Report, width: usize, blas: &Blas) {
    let probes: Vec<Probe> = (0..DIRECTIONS as u64).map(|k| probe(width, 10 + k)).collect();
    let row = Line::<f32>::of(&values(width, 2));
    let matrix: Vec<f32> = probes.iter().flat_map(|p| p.unit_direction()).copied().collect();
    let matrix = Line::of(&matrix);
    if report.wants("score_row") {
        let peer = || {
            let mut score = [0.0];
            blas.matrix_vector(black_box(&row), width, &matrix[..width], &mut score);
            black_box(&score);
        };
        let ours = || score_row(black_box(&probes[0]), black_box(&row));
        report.line("score_row", width, "f32", "BLAS sgemv", pair(1, ours, peer));
    }
    if report.wants("score_row_8") {
        let ours = || {
            let mut scores = [0.0; DIRECTIONS];
            let view = Rows::new(black_box(&row), 1, width, width).expect("one row");
            Probe::score_all(black_box(&probes), &view, ScoreUnit::AlignedSd, &mut scores, None)
                .expect("finite");
            black_box(&scores);
        };
        let peer = || {
            let mut scores = [0.0; DIRECTIONS];
            blas.matrix_vector(black_box(&matrix), width, &row, &mut scores);
            black_box(&scores);
        };
        report.line("score_row_8", width, "f32", "BLAS sgemv", pair(1, ours, peer));
    }
}
