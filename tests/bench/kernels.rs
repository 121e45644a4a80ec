//! `cargo bench --bench kernels [-- [--json] [--only NAME] [--width N]]`: the library against its peers and the machine's limits.
//!
//! Ours and the peer's are timed in turns in one run and compared by the median of their ratios, since machines are
//! shared. Nothing is asserted here: a benchmark prints.

mod files;
mod measure;
mod peers;
mod rows;
mod streams;

use measure::Report;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let after = |name: &str| {
        let at = arguments.iter().position(|a| a == name)?;
        arguments.get(at + 1).cloned()
    };
    let width = after("--width").map(|w| w.parse().expect("--width takes a number"));
    let report = Report::new(arguments.iter().any(|a| a == "--json"), after("--only"), width);
    let blas = peers::Blas::load();
    match &blas {
        Some(blas) => report.note(&format!("BLAS: {}, one thread", blas.name)),
        None => report.note("no BLAS on this machine: its lines are missing (Debian: libopenblas0-pthread)"),
    }
    report.note(&format!("kernel: {}", emaudit::kernel::best()));
    rows::run(&report, blas.as_ref());
    streams::run(&report, blas.as_ref());
    files::run(&report);
}

/// Deterministic values of both signs and a normal size, in the dtype asked for.
fn values<T: emaudit::kernel::Scored>(count: usize, seed: u64) -> Vec<T> {
    let mut generator = emaudit::controls::SplitMix64::new(seed);
    let table: Vec<T> = (0..4096)
        .map(|_| T::from_f32((generator.next_u64() >> 40) as f32 / (1u64 << 22) as f32 - 2.0))
        .collect();
    let step = |i: usize| i.wrapping_mul(2654435761) >> 7;
    (0..count).map(|i| table[step(i) % table.len()]).collect()
}

/// A probe on a direction of some seed; every seed has the same norm, roughly.
fn probe(width: usize, seed: u64) -> emaudit::Probe {
    let (v, mean) = (values::<f32>(width, seed), values::<f32>(width, seed + 1000));
    emaudit::Probe::from_vectors(&v, &mean, 1.0, None).expect("sound vectors")
}

/// Values at the start of a cache line, as tensors lie in every engine.
pub struct Line<T> {
    storage: Vec<T>,
    start: usize,
}

impl<T: Copy + Default> Line<T> {
    pub fn of(values: &[T]) -> Line<T> {
        let mut storage = vec![T::default(); values.len() + 64];
        let start = storage.as_ptr().align_offset(64);
        storage.truncate(start + values.len());
        storage[start..].copy_from_slice(values);
        Line { storage, start }
    }
}

impl<T> std::ops::Deref for Line<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.storage[self.start..]
    }
}

impl<T> std::ops::DerefMut for Line<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.storage[self.start..]
    }
}
