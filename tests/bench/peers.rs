//! What the library is measured against: NumKong, a BLAS where the machine has one, libcrypto's SHA-256, and the
//! machine's own limits for reading and for reading and writing.

use half::{bf16, f16};
use libloading::{Library, Symbol};
use numkong::Dot;
use std::ffi::{c_int, c_uchar};

/// An element type with a NumKong dot product. Both operands have the row's dtype there.
pub trait Peer: emaudit::kernel::Scored {
    fn dot(row: &[Self], direction: &[Self]) -> f64;
}

impl Peer for f32 {
    fn dot(row: &[f32], direction: &[f32]) -> f64 {
        <f32 as Dot>::dot(row, direction).expect("equal lengths")
    }
}

/// NumKong's 16-bit types are, as `half`'s, transparent over their bits.
macro_rules! sixteen_bits {
    ($ours:ty, $theirs:ty) => {
        impl Peer for $ours {
            fn dot(row: &[$ours], direction: &[$ours]) -> f64 {
                // SAFETY: both are `repr(transparent)` over u16, where every value is valid.
                let cast = |x: &[$ours]| unsafe { &*(std::ptr::from_ref(x) as *const [$theirs]) };
                f64::from(<$theirs as Dot>::dot(cast(row), cast(direction)).expect("equal lengths"))
            }
        }
    };
}

sixteen_bits!(f16, numkong::f16);
sixteen_bits!(bf16, numkong::bf16);

/// `cblas_sgemv` of whatever BLAS the machine has, on one thread.
pub struct Blas {
    library: Library,
    pub name: &'static str,
}

type Sgemv = unsafe extern "C" fn(
    c_int,
    c_int,
    c_int,
    c_int,
    f32,
    *const f32,
    c_int,
    *const f32,
    c_int,
    f32,
    *mut f32,
    c_int,
);
const ROW_MAJOR: c_int = 101;
const NO_TRANSPOSE: c_int = 111;

impl Blas {
    /// Loads the first of the usual libraries.
    pub fn load() -> Option<Blas> {
        let names = ["libopenblas.so.0", "libopenblas.so", "libblis.so.4", "libcblas.so.3", "libblas.so.3"];
        names.into_iter().find_map(|name| {
            // SAFETY: a BLAS does nothing but start its threads when it is loaded.
            let library = unsafe { Library::new(name) }.ok()?;
            // SAFETY: the type is that of the CBLAS standard.
            unsafe { library.get::<Sgemv>(b"cblas_sgemv") }.ok()?;
            // SAFETY: OpenBLAS's own call, of this type; other libraries lack it.
            if let Ok(threads) =
                unsafe { library.get::<unsafe extern "C" fn(c_int)>(b"openblas_set_num_threads") }
            {
                unsafe { threads(1) };
            }
            Some(Blas { library, name })
        })
    }

    /// `scores = rows . direction` for a packed row-major matrix.
    pub fn matrix_vector(&self, rows: &[f32], width: usize, direction: &[f32], scores: &mut [f32]) {
        assert!(rows.len() == width * scores.len() && direction.len() == width);
        // SAFETY: checked in `load`.
        let sgemv: Symbol<'_, Sgemv> = unsafe { self.library.get(b"cblas_sgemv") }.expect("checked in load");
        let (m, n) = (scores.len() as c_int, width as c_int);
        // SAFETY: the lengths are those of the arguments, checked above.
        unsafe {
            let (a, x, y) = (rows.as_ptr(), direction.as_ptr(), scores.as_mut_ptr());
            sgemv(ROW_MAJOR, NO_TRANSPOSE, m, n, 1.0, a, n, x, 1, 0.0, y, 1);
        }
    }
}

/// OpenSSL's one-call SHA-256.
pub struct Crypto(Library);

type Sha256 = unsafe extern "C" fn(*const c_uchar, usize, *mut c_uchar) -> *mut c_uchar;

impl Crypto {
    pub fn load() -> Option<Crypto> {
        // SAFETY: libcrypto's initialiser has no conditions; the type is that of its documentation.
        let library = unsafe { Library::new("libcrypto.so.3") }.ok()?;
        unsafe { library.get::<Sha256>(b"SHA256") }.ok()?;
        Some(Crypto(library))
    }

    pub fn sha256(&self, bytes: &[u8]) -> [u8; 32] {
        let mut digest = [0; 32];
        // SAFETY: checked in `load`; the output has the 32 bytes the call writes.
        unsafe {
            let sha256: Symbol<'_, Sha256> = self.0.get(b"SHA256").expect("checked in load");
            sha256(bytes.as_ptr(), bytes.len(), digest.as_mut_ptr());
        }
        digest
    }
}

/// Whether the limits below may use 512-bit registers.
fn wide() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Ways to read everything: the sum of the words by the widest plain loads there are, from front to back, with
/// prefetching, and as four streams. The fastest on the machine is its read limit.
pub const READS: [fn(&[f32]) -> f32; 4] =
    [|words| read(words, 0), |words| read(words, 1024), |words| read(words, 4096), read_streams];

/// Ways to read and write everything: each word times a factor, likewise. Stores are plain: such as go past the caches
/// were slower where the lines had been read just before. The fastest is the read-write limit.
pub const SCALES: [fn(&mut [f32], f32); 4] = [
    |words, factor| scale(words, factor, 0),
    |words, factor| scale(words, factor, 1024),
    |words, factor| scale(words, factor, 4096),
    scale_streams,
];

fn read(words: &[f32], ahead: usize) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if wide() {
        // SAFETY: the feature was seen.
        return unsafe { x86::read([words], ahead) };
    }
    let _ = ahead;
    words.iter().sum()
}

fn read_streams(words: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if wide() {
        let quarter = words.len() / 4;
        // SAFETY: the feature was seen.
        return unsafe { x86::read(std::array::from_fn::<_, 4, _>(|k| &words[k * quarter..][..quarter]), 0) };
    }
    words.iter().sum()
}

fn scale(words: &mut [f32], factor: f32, ahead: usize) {
    #[cfg(target_arch = "x86_64")]
    if wide() {
        // SAFETY: the feature was seen.
        return unsafe { x86::scale([words], factor, ahead) };
    }
    let _ = ahead;
    words.iter_mut().for_each(|x| *x *= factor);
}

fn scale_streams(words: &mut [f32], factor: f32) {
    #[cfg(target_arch = "x86_64")]
    if wide() {
        let (front, back) = words.split_at_mut(words.len() / 2);
        let ((a, b), (c, d)) = (front.split_at_mut(front.len() / 2), back.split_at_mut(back.len() / 2));
        // SAFETY: the feature was seen.
        return unsafe { x86::scale([a, b, c, d], factor, 0) };
    }
    words.iter_mut().for_each(|x| *x *= factor);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    const LANES: usize = 16;
    /// Registers in work at once, over all streams.
    const REGISTERS: usize = 8;

    /// # Safety
    /// The CPU has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn read<const S: usize>(streams: [&[f32]; S], ahead: usize) -> f32 {
        let mut sums = [_mm512_setzero_ps(); REGISTERS];
        let block = REGISTERS / S * LANES;
        for first in (0..streams[0].len() / block).map(|i| i * block) {
            for (k, sum) in sums.iter_mut().enumerate() {
                let at = streams[k % S].as_ptr().wrapping_add(first + k / S * LANES);
                if ahead > 0 {
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(ahead / 4).cast());
                }
                // SAFETY: inside the block; all streams have the length of the first.
                *sum = _mm512_add_ps(*sum, unsafe { _mm512_loadu_ps(at) });
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }

    /// # Safety
    /// The CPU has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn scale<const S: usize>(streams: [&mut [f32]; S], factor: f32, ahead: usize) {
        let factor = _mm512_set1_ps(factor);
        let (block, length) = (REGISTERS / S * LANES, streams[0].len());
        let streams = streams.map(|stream| stream.as_mut_ptr());
        for first in (0..length / block).map(|i| i * block) {
            for k in 0..REGISTERS {
                let at = streams[k % S].wrapping_add(first + k / S * LANES);
                if ahead > 0 {
                    _mm_prefetch::<_MM_HINT_ET0>(at.wrapping_add(ahead / 4).cast_const().cast());
                }
                // SAFETY: inside the block; all streams have the length of the first.
                unsafe { _mm512_storeu_ps(at, _mm512_mul_ps(factor, _mm512_loadu_ps(at))) };
            }
        }
    }
}
