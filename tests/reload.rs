//! Hot reload in Rust: a request sees one value, and no replaced value stays behind.

use emaudit::{Probe, Reloadable, Rows, ScoreUnit};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

const WIDTH: usize = 64;
const ROWS: usize = 16;

/// A probe whose direction is `sign` everywhere, so that the scores of the two signs are opposite.
fn probe(sign: f32) -> Probe {
    Probe::from_vectors(&[sign; WIDTH], &[0.0; WIDTH], 1.0, None).unwrap()
}

fn scores(probe: &Probe, data: &[f32]) -> [u32; ROWS] {
    let mut scores = [0.0; ROWS];
    let rows = Rows::new(data, ROWS, WIDTH, WIDTH).unwrap();
    probe.score(&rows, ScoreUnit::Raw, &mut scores, None).unwrap();
    scores.map(f32::to_bits)
}

#[test]
fn under_load_every_request_sees_one_probe() {
    const REPLACEMENTS: usize = 2000;
    let data: Vec<f32> = (0..ROWS * WIDTH).map(|i| (i * 31 % 251) as f32 / 64.0 + 0.5).collect();
    let expected = [1.0, -1.0].map(|sign| scores(&probe(sign), &data));
    assert!(expected[0].iter().zip(&expected[1]).all(|(a, b)| a != b));
    let served = Reloadable::new(probe(1.0));
    let (over, mixed) = (AtomicBool::new(false), AtomicUsize::new(0));
    let seen = [const { AtomicUsize::new(0) }; 2];
    let both = || seen.iter().all(|count| count.load(Ordering::Relaxed) > 100);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let found = scores(&served.load(), &data);
                    let which = expected.iter().position(|one| *one == found);
                    which.map_or(&mixed, |which| &seen[which]).fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let begin = Instant::now();
        let mut replaced = 0;
        while (replaced < REPLACEMENTS || !both()) && begin.elapsed() < Duration::from_secs(60) {
            served.replace(probe(if replaced % 2 == 0 { -1.0 } else { 1.0 }));
            replaced += 1;
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(mixed.into_inner(), 0, "scores of neither probe");
    assert!(both(), "not both probes were used: {seen:?}");
}

/// Counts how many of its kind are alive.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(alive: &Arc<AtomicUsize>) -> Self {
        alive.fetch_add(1, Ordering::SeqCst);
        Counted(Arc::clone(alive))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[test]
fn a_replaced_value_lives_as_long_as_its_users_and_no_longer() {
    let alive = Arc::new(AtomicUsize::new(0));
    let count = || alive.load(Ordering::SeqCst);
    let served = Reloadable::new(Counted::new(&alive));
    let user = served.load();
    let other = served.load().into_arc();
    drop(served.replace(Counted::new(&alive)));
    assert_eq!(count(), 2, "the old value is still in use");
    drop(user);
    assert_eq!(count(), 2);
    drop(other);
    assert_eq!(count(), 1, "the last user is gone");
    for _ in 0..100 {
        drop(served.replace(Counted::new(&alive)));
        assert_eq!(count(), 1);
    }
    drop(served);
    assert_eq!(count(), 0);
}

#[test]
fn nothing_is_left_of_many_values_used_by_many_threads() {
    let alive = Arc::new(AtomicUsize::new(0));
    let served = Reloadable::new(Counted::new(&alive));
    let (over, loads) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut replaced = 0;
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // More at a time than a thread can borrow, so that counted shares are in play too.
                    let held: Vec<_> = (0..12).map(|_| served.load()).collect();
                    loads.fetch_add(held.len(), Ordering::Relaxed);
                }
            });
        }
        while replaced < 5000 || loads.load(Ordering::Relaxed) < 1000 {
            served.replace(Counted::new(&alive));
            replaced += 1;
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(alive.load(Ordering::SeqCst), 1, "after {replaced} replacements");
}

#[test]
fn a_probe_goes_when_nobody_serves_or_uses_it() {
    let served = Reloadable::new(probe(1.0));
    let held = served.load().into_arc();
    let gone: Weak<Probe> = Arc::downgrade(&held);
    drop(held);
    assert!(gone.upgrade().is_some(), "it is being served");
    drop(served.replace(probe(-1.0)));
    assert!(gone.upgrade().is_none(), "nobody uses it");
}
