//! Many rows, far larger than any cache: scoring, steering, gating, and threads that share one probe.

use crate::measure::{Report, fastest, pair};
use crate::peers::{self, Blas, Peer};
use crate::{probe, values};
use emaudit::{Operation, Probe, RowStatus, Rows, RowsMut, ScoreUnit, Steering, SteeringOptions};
use half::{bf16, f16};
use std::hint::black_box;

const ROWS: usize = 16384;
const WIDTH: usize = 4096;
const DIRECTIONS: u64 = 8;
/// Small enough that hundreds of repetitions leave the rows finite and of their size.
const ALPHA: f32 = 1e-6;

const NAMES: [&str; 10] = [
    "score_stream",
    "score_stream_8",
    "steer",
    "steer_strengths",
    "score_steer",
    "gate_0",
    "gate_1",
    "gate_100",
    "threads_2_stream",
    "threads_2_cache",
];

pub fn run(report: &Report, blas: Option<&Blas>) {
    if let Some(blas) = blas {
        against_blas(report, blas);
    }
    every::<f32>(report);
    every::<f16>(report);
    every::<bf16>(report);
}

fn every<T: Peer>(report: &Report) {
    if !NAMES.iter().any(|name| report.wants(name)) {
        return;
    }
    let mut data = values::<T>(ROWS * WIDTH, 3);
    score::<T>(report, &data);
    threads::<T>(report, &data);
    steer::<T>(report, &mut data);
    gates::<T>(report, &mut data);
}

fn view<T: Peer>(data: &[T]) -> Rows<'_> {
    Rows::new(data, data.len() / WIDTH, WIDTH, WIDTH).expect("whole rows")
}

/// The same bytes as f32 words, for the limits.
fn words<T: Peer>(data: &[T]) -> &[f32] {
    // SAFETY: plain numbers; every bit pattern is an f32, and only whole aligned words are taken.
    let (before, words, after) = unsafe { data.align_to::<f32>() };
    assert!(before.len() + after.len() < 4);
    words
}

/// As [`words`], to write.
fn words_mut<T: Peer>(data: &mut [T]) -> &mut [f32] {
    // SAFETY: as above; a factor of 1 writes back what was read, NaN patterns aside, which two finite
    // 16-bit halves of these sizes never form.
    let (_, words, _) = unsafe { data.align_to_mut::<f32>() };
    words
}

/// The faster way to read everything.
fn read_limit(words: &[f32]) -> fn(&[f32]) -> f32 {
    let best = fastest(&mut [
        ("plain", &mut || {
            black_box(peers::read(words));
        }),
        ("prefetch", &mut || {
            black_box(peers::read_ahead(words));
        }),
    ]);
    [peers::read as fn(&[f32]) -> f32, peers::read_ahead][best]
}

fn write_limit(words: &mut [f32]) -> fn(&mut [f32], f32) {
    let words = std::cell::RefCell::new(words);
    let best = fastest(&mut [
        ("plain", &mut || peers::scale(&mut words.borrow_mut(), black_box(1.0))),
        ("prefetch", &mut || peers::scale_ahead(&mut words.borrow_mut(), black_box(1.0))),
    ]);
    [peers::scale as fn(&mut [f32], f32), peers::scale_ahead][best]
}

fn score<T: Peer>(report: &Report, data: &[T]) {
    let dtype = T::DTYPE.as_str();
    let probes: Vec<Probe> = (0..DIRECTIONS).map(|k| probe(WIDTH, 10 + k)).collect();
    let (mut scores, mut all) = (vec![0.0; ROWS], vec![0.0; ROWS * DIRECTIONS as usize]);
    let mut status = vec![RowStatus::Ok; ROWS];
    let rows = view(data);
    let mut one = || {
        probes[0].score(&rows, ScoreUnit::AlignedSd, &mut scores, Some(&mut status)).expect("finite");
    };
    if report.wants("score_stream") {
        let limit = read_limit(words(data));
        let read = || {
            black_box(limit(black_box(words(data))));
        };
        report.line("score_stream", WIDTH, dtype, "read limit", pair(ROWS, &mut one, read));
        let direction: Vec<T> = probes[0].unit_direction().iter().map(|u| T::from_f32(*u)).collect();
        let peer = || {
            for row in data.chunks_exact(WIDTH) {
                black_box(T::dot(row, &direction));
            }
        };
        report.line("score_stream", WIDTH, dtype, "NumKong", pair(ROWS, &mut one, peer));
    }
    if report.wants("score_stream_8") {
        let eight = || {
            Probe::score_all(&probes, &rows, ScoreUnit::AlignedSd, &mut all, None).expect("finite");
        };
        report.line("score_stream_8", WIDTH, dtype, "one direction", pair(ROWS, eight, &mut one));
    }
}

fn against_blas(report: &Report, blas: &Blas) {
    if !report.wants("score_stream") {
        return;
    }
    let (data, probe) = (values::<f32>(ROWS * WIDTH, 3), probe(WIDTH, 10));
    let (mut scores, mut products) = (vec![0.0; ROWS], vec![0.0; ROWS]);
    let rows = view(&data);
    let ours = || {
        probe.score(&rows, ScoreUnit::AlignedSd, &mut scores, None).expect("finite");
    };
    let peer = || blas.matrix_vector(&data, WIDTH, probe.unit_direction(), &mut products);
    report.line("score_stream", WIDTH, "f32", "BLAS sgemv", pair(ROWS, ours, peer));
}

/// Threads that share one probe, each with rows of its own: the same work by one thread and by two.
fn threads<T: Peer>(report: &Report, data: &[T]) {
    let probe = probe(WIDTH, 10);
    let mut scores = vec![0.0; ROWS];
    let mut compare = |name: &str, data: &[T], repeat: usize| {
        if !report.wants(name) {
            return;
        }
        let rows = data.len() / WIDTH;
        let scores = std::cell::RefCell::new(&mut scores[..rows]);
        let two = || on_threads(2, &probe, data, &mut scores.borrow_mut(), repeat);
        let one = || on_threads(1, &probe, data, &mut scores.borrow_mut(), repeat);
        report.line(name, WIDTH, T::DTYPE.as_str(), "one thread", pair(rows * repeat, two, one));
    };
    compare("threads_2_stream", data, 1);
    compare("threads_2_cache", &data[..16 * WIDTH], 1000);
}

fn on_threads<T: Peer>(count: usize, probe: &Probe, data: &[T], scores: &mut [f32], repeat: usize) {
    let share = scores.len() / count;
    std::thread::scope(|scope| {
        for (data, scores) in data.chunks(share * WIDTH).zip(scores.chunks_mut(share)) {
            scope.spawn(move || {
                for _ in 0..repeat {
                    probe.score(&view(data), ScoreUnit::AlignedSd, scores, None).expect("finite");
                }
            });
        }
    });
}

fn steering(gate: Option<f32>) -> Steering {
    let operation = Operation::Subtract { alpha: ALPHA };
    let options = SteeringOptions { gate, allow_nonspecific: true, ..SteeringOptions::new(operation) };
    Steering::new(&probe(WIDTH, 10), options).expect("sound options")
}

fn apply<T: Peer>(steering: &Steering, data: &mut [T], strengths: Option<&[f32]>, status: &mut [RowStatus]) {
    let mut rows = RowsMut::new(data, ROWS, WIDTH, WIDTH).expect("whole rows");
    steering.apply(&mut rows, strengths, Some(status)).expect("finite");
}

fn steer<T: Peer>(report: &Report, data: &mut [T]) {
    let dtype = T::DTYPE.as_str();
    let steering = steering(None);
    let limit = write_limit(words_mut(data));
    let (mut status, mut after) = (vec![RowStatus::Ok; ROWS], vec![RowStatus::Ok; ROWS]);
    let mut scores = vec![0.0; ROWS];
    let strengths: Vec<f32> = (0..ROWS).map(|i| if i % 2 == 0 { 1.0 } else { -0.5 }).collect();
    let data = std::cell::RefCell::new(data);
    let mut alone = || apply(&steering, *data.borrow_mut(), None, &mut status);
    if report.wants("steer") {
        let write = || limit(words_mut(*data.borrow_mut()), black_box(1.0));
        report.line("steer", WIDTH, dtype, "read-write limit", pair(ROWS, &mut alone, write));
    }
    if report.wants("steer_strengths") {
        let each = || apply(&steering, *data.borrow_mut(), Some(&strengths), &mut after);
        report.line("steer_strengths", WIDTH, dtype, "steer", pair(ROWS, each, &mut alone));
    }
    if report.wants("score_steer") {
        let both = || {
            let mut data = data.borrow_mut();
            let mut rows = RowsMut::new(*data, ROWS, WIDTH, WIDTH).expect("whole rows");
            let unit = ScoreUnit::AlignedSd;
            steering.score_and_apply(&mut rows, unit, &mut scores, None, Some(&mut after)).expect("finite");
        };
        report.line("score_steer", WIDTH, dtype, "steer", pair(ROWS, both, &mut alone));
    }
}

/// A gate that opens for no row, for one in a hundred, and for all.
fn gates<T: Peer>(report: &Report, data: &mut [T]) {
    if !NAMES.iter().any(|name| name.starts_with("gate") && report.wants(name)) {
        return;
    }
    let mut scores = vec![0.0; ROWS];
    probe(WIDTH, 10).score(&view(data), ScoreUnit::AlignedSd, &mut scores, None).expect("finite");
    scores.sort_by(f32::total_cmp);
    let one_percent = scores[ROWS - 1 - ROWS / 100];
    let (read, write) = (read_limit(words(data)), write_limit(words_mut(data)));
    let mut status = vec![RowStatus::Ok; ROWS];
    let data = std::cell::RefCell::new(data);
    for (name, gate) in [("gate_0", f32::MAX), ("gate_1", one_percent), ("gate_100", f32::MIN)] {
        let steering = steering(Some(gate));
        let ours = || apply(&steering, *data.borrow_mut(), None, &mut status);
        let dtype = T::DTYPE.as_str();
        if name == "gate_100" {
            let limit = || write(words_mut(*data.borrow_mut()), black_box(1.0));
            report.line(name, WIDTH, dtype, "read-write limit", pair(ROWS, ours, limit));
        } else {
            let limit = || {
                black_box(read(words(*data.borrow())));
            };
            report.line(name, WIDTH, dtype, "read limit", pair(ROWS, ours, limit));
        }
    }
}
