//! Timing two things against each other on a machine that others use too: in turns, and medians of their ratios.

use std::time::{Duration, Instant};

/// One line of the result. Times are nanoseconds for one unit of work: a row, an opening, a digest.
pub struct Line {
    pub name: String,
    pub width: usize,
    pub dtype: &'static str,
    pub ours: f64,
    pub peer: f64,
    pub peer_name: String,
    /// Median of ours / peer over the pairs: below 1 where ours is faster.
    pub ratio: f64,
}

/// Medians over pairs of samples.
pub struct Pair {
    pub ours: f64,
    pub peer: f64,
    pub ratio: f64,
}

/// A sample is repeated until it lasts this long, so that the clock's own cost does not show.
const SAMPLE: Duration = Duration::from_micros(40);
const PAIRS: usize = 401;
/// A pair of long samples is repeated until this much time has gone.
const BUDGET: Duration = Duration::from_millis(2500);
const FEWEST_PAIRS: usize = 9;

/// Seconds of `work`, done `times` times.
fn seconds(times: usize, work: &mut dyn FnMut()) -> f64 {
    let begin = Instant::now();
    for _ in 0..times {
        work();
    }
    begin.elapsed().as_secs_f64()
}

/// Repetitions that fill one sample, the fastest of some: one that was interrupted would seem filled by a single call, and the
/// clock be measured ever after.
fn repetitions(work: &mut dyn FnMut()) -> usize {
    let mut times = 1;
    let mut shortest = |times: usize| (0..5).map(|_| seconds(times, work)).fold(f64::INFINITY, f64::min);
    while shortest(times) < SAMPLE.as_secs_f64() {
        times *= 2;
    }
    times
}

/// Times both in turns, the first place changing hands; `units` is how many units of work one call does.
pub fn pair(units: usize, mut ours: impl FnMut(), mut peer: impl FnMut()) -> Pair {
    let (n, m) = (repetitions(&mut ours), repetitions(&mut peer));
    let (mut of_ours, mut of_peer, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let begin = Instant::now();
    while ratios.len() < FEWEST_PAIRS || (ratios.len() < PAIRS && begin.elapsed() < BUDGET) {
        let (a, b);
        if ratios.len() % 2 == 0 {
            a = seconds(n, &mut ours);
            b = seconds(m, &mut peer);
        } else {
            b = seconds(m, &mut peer);
            a = seconds(n, &mut ours);
        }
        let unit = |total: f64, times: usize| total * 1e9 / (times * units) as f64;
        let (a, b) = (unit(a, n), unit(b, m));
        of_ours.push(a);
        of_peer.push(b);
        ratios.push(a / b);
    }
    Pair { ours: median(of_ours), peer: median(of_peer), ratio: median(ratios) }
}

/// Which of several ways to do the same work is the fastest, by the median of samples in turns.
pub fn fastest(ways: usize, mut work: impl FnMut(usize)) -> usize {
    let mut taken = vec![Vec::new(); ways];
    for _ in 0..33 {
        for (at, taken) in taken.iter_mut().enumerate() {
            taken.push(seconds(1, &mut || work(at)));
        }
    }
    let medians: Vec<f64> = taken.into_iter().map(median).collect();
    (0..ways).min_by(|a, b| medians[*a].total_cmp(&medians[*b])).unwrap_or(0)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints lines as they come: a table, or one JSON object a line.
pub struct Report {
    json: bool,
    only: Option<String>,
    width: Option<usize>,
}

impl Report {
    pub fn new(json: bool, only: Option<String>, width: Option<usize>) -> Report {
        if !json {
            println!(
                "times in ns per row (per call for files); ratio = median of ours/peer, below 1 is faster\n"
            );
            println!(
                "{:<22} {:>6} {:<5} {:>12} {:>12} {:>7}  peer",
                "name", "width", "dtype", "ours", "peer", "ratio"
            );
        }
        Report { json, only, width }
    }

    /// Whether a line of this name was asked for.
    pub fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only.as_str()))
    }

    /// Whether lines of this width were asked for.
    pub fn wants_width(&self, width: usize) -> bool {
        self.width.is_none_or(|only| only == width)
    }

    pub fn line(&self, name: &str, width: usize, dtype: &'static str, peer_name: &str, pair: Pair) {
        let Pair { ours, peer, ratio } = pair;
        let line = Line { name: name.into(), width, dtype, ours, peer, peer_name: peer_name.into(), ratio };
        if self.json {
            println!(
                "{{\"name\":\"{}\",\"width\":{},\"dtype\":\"{}\",\"ours\":{:.3},\"peer\":{:.3},\
                 \"peer_name\":\"{}\",\"ratio\":{:.4}}}",
                line.name, line.width, line.dtype, line.ours, line.peer, line.peer_name, line.ratio
            );
        } else {
            println!(
                "{:<22} {:>6} {:<5} {:>12.1} {:>12.1} {:>7.3}  {}",
                line.name, line.width, line.dtype, line.ours, line.peer, line.ratio, line.peer_name
            );
        }
    }

    /// A remark beside the lines, where a machine lacks a peer: never silent, never among the JSON.
    pub fn note(&self, text: &str) {
        eprintln!("note: {text}");
    }
}
