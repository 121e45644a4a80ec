//! Many rows, far larger than any cache: scoring, steering, gating, and threads that share one probe.

use crate::measure::{Report, fastest, pair};
use crate::peers::{self, Blas, Peer};
use crate::{Line, probe, values};
use emaudit::{Operation, Probe, RowStatus, Rows, RowsMut, ScoreUnit, Steering, SteeringOptions};
use half::{bf16, f16};
use std::cell::{Cell, RefCell};
use std::hint::black_box;

const ROWS: usize = 16384;
const WIDTH: usize = 4096;
/// One sample takes a block of rows, the next sample the next block: short enough to fall between two preemptions,
/// and back at the same rows only after all others.
const BLOCK: usize = 1024;
const DIRECTIONS: u64 = 8;
/// Small enough that hundreds of repetitions leave the rows finite and of their size.
const ALPHA: f32 = 1e-6;

const NAMES: [&str; 8] = [
    "score_stream",
    "score_stream_8",
    "steer",
    "steer_strengths",
    "score_steer",
    "gate_0",
    "gate_1",
    "gate_100",
];
/// Rows of one thread that stay in its second cache.
const CACHED: usize = 8;

pub fn run(report: &Report, blas: Option<&Blas>) {
    if let Some(blas) = blas {
        against_blas(report, blas);
    }
    every::<f32>(report);
    every::<f16>(report);
    every::<bf16>(report);
}

fn every<T: Peer>(report: &Report) {
    threads::<T>(report);
    if !NAMES.iter().any(|name| report.wants(name)) {
        return;
    }
    let stream = Stream::<T>::new();
    score(report, &stream);
    steer(report, &stream);
    gates(report, &stream);
}

/// All rows, given out block by block.
struct Stream<T> {
    data: RefCell<Line<T>>,
    at: Cell<usize>,
}

impl<T: Peer> Stream<T> {
    fn new() -> Self {
        Stream { data: RefCell::new(Line::of(&values(ROWS * WIDTH, 3))), at: Cell::new(0) }
    }

    fn next<R>(&self, work: impl FnOnce(&mut [T]) -> R) -> R {
        let at = self.at.replace((self.at.get() + 1) % (ROWS / BLOCK));
        black_box(work(black_box(&mut self.data.borrow_mut()[at * BLOCK * WIDTH..][..BLOCK * WIDTH])))
    }

    fn read(&self, limit: fn(&[f32]) -> f32) {
        self.next(|block| limit(words(block)));
    }

    fn write(&self, limit: fn(&mut [f32], f32)) {
        self.next(|block| limit(words(block), black_box(1.0)));
    }

    /// The fastest way to read.
    fn read_limit(&self) -> fn(&[f32]) -> f32 {
        peers::READS[fastest(peers::READS.len(), |at| self.read(peers::READS[at]))]
    }

    /// The fastest way to read and write back.
    fn write_limit(&self) -> fn(&mut [f32], f32) {
        peers::SCALES[fastest(peers::SCALES.len(), |at| self.write(peers::SCALES[at]))]
    }
}

/// The same bytes as f32 words, for the limits. They are read, and written back times 1.
fn words<T: Peer>(block: &mut [T]) -> &mut [f32] {
    // SAFETY: plain numbers, where every bit pattern is an f32. Two finite 16-bit numbers of the size used here never
    // form a NaN, whose pattern a product could change.
    let (before, words, after) = unsafe { block.align_to_mut::<f32>() };
    assert!(before.len() + after.len() < 4);
    words
}

fn view<T: Peer>(data: &[T]) -> Rows<'_> {
    Rows::new(data, data.len() / WIDTH, WIDTH, WIDTH).expect("whole rows")
}

fn view_mut<T: Peer>(data: &mut [T]) -> RowsMut<'_> {
    let rows = data.len() / WIDTH;
    RowsMut::new(data, rows, WIDTH, WIDTH).expect("whole rows")
}

fn score<T: Peer>(report: &Report, stream: &Stream<T>) {
    let dtype = T::DTYPE.as_str();
    let probes: Vec<Probe> = (0..DIRECTIONS).map(|k| probe(WIDTH, 10 + k)).collect();
    let (mut scores, mut all) = (vec![0.0; BLOCK], vec![0.0; BLOCK * DIRECTIONS as usize]);
    let mut status = vec![RowStatus::Ok; BLOCK];
    let mut one = || {
        stream.next(|block| {
            probes[0]
                .score(&view(block), ScoreUnit::AlignedSd, &mut scores, Some(&mut status))
                .expect("finite");
        });
    };
    if report.wants("score_stream") {
        let limit = stream.read_limit();
        report.line("score_stream", WIDTH, dtype, "read limit", pair(BLOCK, &mut one, || stream.read(limit)));
        let direction: Vec<T> = probes[0].unit_direction().iter().map(|u| T::from_f32(*u)).collect();
        let dots = |block: &mut [T]| {
            for row in block.chunks_exact(WIDTH) {
                black_box(T::dot(row, &direction));
            }
        };
        report.line("score_stream", WIDTH, dtype, "NumKong", pair(BLOCK, &mut one, || stream.next(dots)));
    }
    if report.wants("score_stream_8") {
        let eight = || {
            stream.next(|block| {
                Probe::score_all(&probes, &view(block), ScoreUnit::AlignedSd, &mut all, None)
                    .expect("finite");
            });
        };
        report.line("score_stream_8", WIDTH, dtype, "one direction", pair(BLOCK, eight, &mut one));
    }
}

fn against_blas(report: &Report, blas: &Blas) {
    if !report.wants("score_stream") {
        return;
    }
    let (stream, probe) = (Stream::<f32>::new(), probe(WIDTH, 10));
    let (mut scores, mut products) = (vec![0.0; BLOCK], vec![0.0; BLOCK]);
    let ours = || {
        stream.next(|block| {
            probe.score(&view(block), ScoreUnit::AlignedSd, &mut scores, None).expect("finite")
        });
    };
    let peer =
        || stream.next(|block| blas.matrix_vector(block, WIDTH, probe.unit_direction(), &mut products));
    report.line("score_stream", WIDTH, "f32", "BLAS sgemv", pair(BLOCK, ours, peer));
}

/// Threads that share one probe, each with rows of its own in its own cache: two, three and so on to one for each core, against
/// one thread with all the work. `1 / threads` is what threads give that do not get in each other's way.
fn threads<T: Peer>(report: &Report) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores == 1 {
        report.note("one core on this machine: the lines with threads are missing");
    }
    let probe = probe(WIDTH, 10);
    for count in 2..=cores {
        let name = format!("threads_{count}");
        if !report.wants(&name) {
            continue;
        }
        let data = Line::of(&values::<T>(count * CACHED * WIDTH, 3));
        let scores = RefCell::new(vec![0.0; count * CACHED]);
        let many = || on_threads(count, &probe, &data, &mut scores.borrow_mut(), REPEAT);
        let one = || {
            let (data, mut scores) = (&data[..CACHED * WIDTH], scores.borrow_mut());
            on_threads(1, &probe, data, &mut scores[..CACHED], count * REPEAT);
        };
        let rows = count * CACHED * REPEAT;
        report.line(&name, WIDTH, T::DTYPE.as_str(), "one thread", pair(rows, many, one));
    }
}

/// Times each thread scores its rows: long beside the start of a thread.
const REPEAT: usize = 2000;

fn on_threads<T: Peer>(count: usize, probe: &Probe, data: &[T], scores: &mut [f32], repeat: usize) {
    let share = scores.len() / count;
    std::thread::scope(|scope| {
        for (data, scores) in data.chunks(share * WIDTH).zip(scores.chunks_mut(share)) {
            scope.spawn(move || {
                // Its own line of the cache: scores of two threads side by side would make them wait for each other.
                let mut own = vec![0.0; share.max(32)];
                for _ in 0..repeat {
                    let scores = black_box(&mut own[..share]);
                    probe.score(&view(data), ScoreUnit::AlignedSd, scores, None).expect("finite");
                }
                scores.copy_from_slice(&own[..share]);
            });
        }
    });
}

fn steering(gate: Option<f32>) -> Steering {
    let operation = Operation::Subtract { alpha: ALPHA };
    let options = SteeringOptions { gate, allow_nonspecific: true, ..SteeringOptions::new(operation) };
    Steering::new(&probe(WIDTH, 10), options).expect("sound options")
}

fn steer<T: Peer>(report: &Report, stream: &Stream<T>) {
    let dtype = T::DTYPE.as_str();
    let steering = steering(None);
    let (mut status, mut after) = (vec![RowStatus::Ok; BLOCK], vec![RowStatus::Ok; BLOCK]);
    let mut scores = vec![0.0; BLOCK];
    let strengths: Vec<f32> = (0..BLOCK).map(|i| if i % 2 == 0 { 1.0 } else { -0.5 }).collect();
    let mut alone = || {
        stream.next(|block| steering.apply(&mut view_mut(block), None, Some(&mut status)).expect("finite"));
    };
    if report.wants("steer") {
        let limit = stream.write_limit();
        let write = || stream.write(limit);
        report.line("steer", WIDTH, dtype, "read-write limit", pair(BLOCK, &mut alone, write));
    }
    if report.wants("steer_strengths") {
        let each = || {
            stream.next(|block| {
                let strengths = Some(&strengths[..]);
                steering.apply(&mut view_mut(block), strengths, Some(&mut after)).expect("finite")
            });
        };
        report.line("steer_strengths", WIDTH, dtype, "steer", pair(BLOCK, each, &mut alone));
    }
    if report.wants("score_steer") {
        let both = || {
            stream.next(|block| {
                let (mut rows, unit) = (view_mut(block), ScoreUnit::AlignedSd);
                steering
                    .score_and_apply(&mut rows, unit, &mut scores, None, Some(&mut after))
                    .expect("finite")
            });
        };
        report.line("score_steer", WIDTH, dtype, "steer", pair(BLOCK, both, &mut alone));
    }
}

/// A gate that opens for no row, for one in a hundred, and for all.
fn gates<T: Peer>(report: &Report, stream: &Stream<T>) {
    let mut scores = vec![0.0; ROWS];
    probe(WIDTH, 10)
        .score(&view(&stream.data.borrow()), ScoreUnit::AlignedSd, &mut scores, None)
        .expect("finite");
    scores.sort_by(f32::total_cmp);
    let one_percent = scores[ROWS - 1 - ROWS / 100];
    let (read, write) = (stream.read_limit(), stream.write_limit());
    let mut status = vec![RowStatus::Ok; BLOCK];
    for (name, gate) in [("gate_0", f32::MAX), ("gate_1", one_percent), ("gate_100", f32::MIN)] {
        if !report.wants(name) {
            continue;
        }
        let steering = steering(Some(gate));
        let ours = || {
            stream
                .next(|block| steering.apply(&mut view_mut(block), None, Some(&mut status)).expect("finite"));
        };
        let dtype = T::DTYPE.as_str();
        if name == "gate_100" {
            report.line(name, WIDTH, dtype, "read-write limit", pair(BLOCK, ours, || stream.write(write)));
        } else {
            report.line(name, WIDTH, dtype, "read limit", pair(BLOCK, ours, || stream.read(read)));
        }
    }
}
