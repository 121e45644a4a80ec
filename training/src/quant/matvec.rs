//! Products of a few rows with a frozen weight, as decoding has them: one token of each sequence at a time.
//!
//! The weight is read once, where it lies; NF4 is decoded by tiles that stay in the cache of the core that uses them.
//! The algorithm is written once over a vector ([`lanes::Lanes`]); the processor's best one is chosen at run time.
//!
//! Every output is the same sum in the same order however many rows there are and whichever threads share the work, so
//! a row's result has the same bits in every batch that comes here. Against the exact value of the f32 operands it is off
//! by at most n 2^-24 (1 + n 2^-24) sum |x w| for n inputs, the bound of any order of summation.

mod lanes;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::{Nf4, Sign};
use lanes::{Lanes, Portable};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::LazyLock;

/// Rows up to which this is faster than decoding, packing and multiplying blocks of everything.
pub const FEW: usize = 128;
/// Output features of a tile: whole groups of every width that [`tile`] uses.
const TILE: usize = 24;
/// Input features of a tile, so that a group of rows stays in the first cache and a decoded tile in the second.
const CHUNK: usize = 1024;

/// An implementation, by the processor features that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Arrays that the compiler vectorises.
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F.
    Avx512,
}

impl Isa {
    /// All that run here, slowest first.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut, reason = "other processors add nothing")]
        let mut all = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(x86::has_avx2().then_some(Isa::Avx2));
            all.extend(x86::has_avx512().then_some(Isa::Avx512));
        }
        all
    }

    /// The fastest that runs here.
    pub fn best() -> Isa {
        static BEST: LazyLock<Isa> = LazyLock::new(|| *Isa::available().last().expect("one is portable"));
        *BEST
    }
}

/// A weight `[out, in]`.
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    /// Row-major f32.
    Dense(&'a [f32]),
    /// NF4.
    Nf4(&'a Nf4),
}

/// `x W^T`, row-major `rows x out`, of row-major `x`: `rows x inp`.
///
/// # Panics
/// If the sizes do not fit or `isa` does not run here.
pub fn product(isa: Isa, x: &[f32], weight: Weight<'_>, (out, inp): (usize, usize)) -> Vec<f32> {
    let mut y = vec![0f32; x.len() / inp.max(1) * out];
    let job = Job::new(isa, x, weight, (out, inp), &mut y);
    let tiles = out.div_ceil(TILE);
    // A few parts a thread even out what else the cores do.
    let parts = (4 * rayon::current_num_threads()).min(tiles);
    let part = |i: usize| i * tiles / parts * TILE..((i + 1) * tiles / parts * TILE).min(out);
    (0..parts).into_par_iter().for_each(|i| {
        // SAFETY: the parts are disjoint and lie within `0..out`; `y` is read when all threads are done.
        unsafe { job.run(part(i)) }
    });
    y
}

/// As [`product`], into `y` and on the thread that calls.
///
/// # Panics
/// As [`product`].
pub fn product_here(isa: Isa, x: &[f32], weight: Weight<'_>, (out, inp): (usize, usize), y: &mut [f32]) {
    // SAFETY: all columns, and `y` is borrowed for this call alone.
    unsafe { Job::new(isa, x, weight, (out, inp), y).run(0..out) }
}

struct Job<'a> {
    isa: Isa,
    x: &'a [f32],
    rows: usize,
    weight: Weight<'a>,
    out: usize,
    inp: usize,
    /// The row-major result, of which every thread writes columns of its own.
    y: *mut f32,
}

// SAFETY: threads share the pointer `y` alone, and `run` asks that they write different columns.
unsafe impl Sync for Job<'_> {}

impl<'a> Job<'a> {
    fn new(isa: Isa, x: &'a [f32], weight: Weight<'a>, (out, inp): (usize, usize), y: &'a mut [f32]) -> Self {
        assert!(
            isa == Isa::Portable || isa == Isa::best() || Isa::available().contains(&isa),
            "{isa:?} does not run here"
        );
        let held = match weight {
            Weight::Dense(w) => w.len(),
            Weight::Nf4(w) => w.rows * w.cols,
        };
        assert!(inp > 0 && x.len().is_multiple_of(inp) && held == out * inp, "sizes of a matrix product");
        let rows = x.len() / inp;
        assert_eq!(y.len(), rows * out, "size of the result");
        Job { isa, x, rows, weight, out, inp, y: y.as_mut_ptr() }
    }

    /// Writes the columns `part` of the result.
    ///
    /// # Safety
    /// `part` lies within `0..out`, and nobody else uses these columns of the result meanwhile.
    unsafe fn run(&self, part: Range<usize>) {
        // SAFETY: `new` has seen the features of `isa` and that the sizes fit; the rest is the caller's.
        unsafe {
            match self.isa {
                Isa::Portable => columns::<Portable, 4>(self, part),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => x86::avx2(self, part),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => x86::avx512(self, part),
                #[cfg(not(target_arch = "x86_64"))]
                Isa::Avx2 | Isa::Avx512 => unreachable!("`new` refuses them"),
            }
        }
    }
}

/// The columns `part` of the result.
///
/// # Safety
/// - The processor has the features of `V`.
/// - The sizes of `job` fit, `part` lies within `0..job.out`, and nobody else uses these columns of the result.
#[inline(always)]
unsafe fn columns<V: Lanes, const M: usize>(job: &Job<'_>, part: Range<usize>) {
    let chunks = job.inp.div_ceil(CHUNK);
    let chunk = job.inp.div_ceil(chunks).next_multiple_of(64);
    let mut decoded = match job.weight {
        Weight::Dense(_) => Vec::new(),
        Weight::Nf4(_) => vec![0f32; TILE * chunk],
    };
    for first in part.clone().step_by(TILE) {
        let features = first..(first + TILE).min(part.end);
        for begin in (0..job.inp).step_by(chunk) {
            let inputs = begin..(begin + chunk).min(job.inp);
            let (weight, stride) = match job.weight {
                Weight::Dense(w) => (&w[first * job.inp + begin..], job.inp),
                Weight::Nf4(w) => {
                    let map = Sign::Signed.map();
                    for (feature, row) in features.clone().zip(decoded.chunks_mut(chunk)) {
                        // SAFETY: the features of `V` are there.
                        unsafe { decode::<V>(w, map, feature * job.inp + begin, &mut row[..inputs.len()]) };
                    }
                    (&decoded[..], chunk)
                }
            };
            let far = matches!(job.weight, Weight::Dense(_));
            let tile = Tile { job, features: features.clone(), inputs, weight, stride, far };
            // SAFETY: passed on; `weight` holds row `features.len() - 1` up to `inputs.len()` in either case.
            unsafe { tile.multiply::<V, M>() };
        }
    }
}

/// Values `start..` of the flattened matrix.
///
/// # Safety
/// The processor has the features of `V`.
#[inline(always)]
unsafe fn decode<V: Lanes>(weight: &Nf4, map: &[f32; 256], start: usize, out: &mut [f32]) {
    let mut done = 0;
    while done < out.len() {
        let at = start + done;
        let (block, skip) = (at / super::BLOCK, at % super::BLOCK);
        let scale = weight.scale(map, block);
        let values = &mut out[done..];
        done += match values.first_chunk_mut() {
            Some(whole) if skip == 0 => {
                let packed = &weight.packed[block * super::BLOCK / 2..][..super::BLOCK / 2];
                // SAFETY: the features are there; `packed` was just cut to half a block of bytes.
                unsafe { V::decode(packed.as_ptr(), scale, whole) };
                super::BLOCK
            }
            _ => {
                let count = values.len().min(super::BLOCK - skip);
                values[..count].iter_mut().zip(at..).for_each(|(v, i)| *v = weight.code(i) * scale);
                count
            }
        };
    }
}

/// What part of the weight is multiplied at once.
struct Tile<'a> {
    job: &'a Job<'a>,
    features: Range<usize>,
    inputs: Range<usize>,
    /// Row i of the tile lies at `i * stride`.
    weight: &'a [f32],
    stride: usize,
    /// It comes out of memory, so the first group of rows fetches ahead; a single row reads enough streams at once.
    far: bool,
}

impl Tile<'_> {
    /// Multiplies all rows of `x`, in groups of M and then of fewer.
    ///
    /// # Safety
    /// As for [`columns`]; `weight` holds all of the tile.
    #[inline(always)]
    unsafe fn multiply<V: Lanes, const M: usize>(&self) {
        let (mut row, rows) = (0, self.job.rows);
        // SAFETY: passed on; every group ends at or before `rows`.
        unsafe {
            while row + M <= rows {
                self.group::<V, M, 3>(row);
                row += M;
            }
            while row + 4 <= rows {
                self.group::<V, 4, 3>(row);
                row += 4;
            }
            while row + 2 <= rows {
                self.group::<V, 2, 4>(row);
                row += 2;
            }
            if row < rows {
                self.group::<V, 1, 8>(row);
            }
        }
    }

    /// Rows `row..row + M` with all features of the tile, N at a time.
    ///
    /// # Safety
    /// As for [`Tile::multiply`]; these rows exist.
    #[inline(always)]
    unsafe fn group<V: Lanes, const M: usize, const N: usize>(&self, row: usize) {
        let (mut i, count) = (0, self.features.len());
        // SAFETY: passed on; every step ends at or before `count`.
        unsafe {
            while i + N <= count {
                self.corner::<V, M, N>(row, i);
                i += N;
            }
            while i < count {
                self.corner::<V, M, 1>(row, i);
                i += 1;
            }
        }
    }

    /// M rows with N features: M N sums, held in registers.
    ///
    /// # Safety
    /// As for [`Tile::group`]; features `i..i + N` of the tile exist.
    #[inline(always)]
    unsafe fn corner<V: Lanes, const M: usize, const N: usize>(&self, row: usize, i: usize) {
        let Tile { job, inputs, .. } = self;
        let count = inputs.len();
        let whole = count - count % V::WIDTH;
        // SAFETY:
        // - x holds `job.rows` rows of `job.inp` values and `inputs` lies within a row; the tile holds rows of at
        //   least `count` values at its stride; `at` stays below `count`, less a register's width where one is loaded;
        // - the result holds `job.rows` rows of `job.out` values; these features of it are ours alone;
        // - the features of `V` are there.
        unsafe {
            let x = job.x.as_ptr().add(row * job.inp + inputs.start);
            let w = self.weight.as_ptr().add(i * self.stride);
            let mut sums = [[V::zero(); N]; M];
            let ahead = self.far && M > 1 && row == 0;
            let mut at = 0;
            while at < whole {
                let mut ws = [V::zero(); N];
                for (n, w_n) in ws.iter_mut().enumerate() {
                    *w_n = V::load(w.add(n * self.stride + at));
                    if ahead {
                        V::fetch(w.wrapping_add((N + n) * self.stride + at));
                    }
                }
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x = V::load(x.add(m * job.inp + at));
                    for (sum, w) in sums.iter_mut().zip(ws) {
                        *sum = x.mul_add(w, *sum);
                    }
                }
                at += V::WIDTH;
            }
            if whole < count {
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x = V::load_first(x.add(m * job.inp + whole), count - whole);
                    for (n, sum) in sums.iter_mut().enumerate() {
                        let w = V::load_first(w.add(n * self.stride + whole), count - whole);
                        *sum = x.mul_add(w, *sum);
                    }
                }
            }
            let y = job.y.add(row * job.out + self.features.start + i);
            let mut four = [V::zero(); 4];
            for done in (0..M * N).step_by(4) {
                let group = (M * N - done).min(4);
                for (j, one) in four.iter_mut().enumerate().take(group) {
                    *one = sums[(done + j) / N][(done + j) % N];
                }
                for (j, sum) in V::sums(four).into_iter().enumerate().take(group) {
                    let to = y.add((done + j) / N * job.out + (done + j) % N);
                    *to = if inputs.start == 0 { sum } else { *to + sum };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
