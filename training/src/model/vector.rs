//! Loops over f32 values, compiled for the widest vectors that the processor has.
//!
//! Nothing here is written for one processor: the same plain loops are compiled several times, and because sums have a
//! fixed number of lanes and nothing is contracted to multiply-adds, every copy gives the same bits.

use half::bf16;

/// Partial sums that a reduction keeps; a vector of AVX-512 holds as many.
const LANES: usize = 16;

/// Defines functions that are compiled once for every set of vectors below, and run the widest that the processor has.
macro_rules! wide {
    ($($(#[$about:meta])* pub fn $name:ident($($arg:ident: $kind:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {
        $($(#[$about])*
        pub fn $name($($arg: $kind),*) $(-> $ret)? {
            #[inline(always)]
            fn plain($($arg: $kind),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512($($arg: $kind),*) $(-> $ret)? {
                plain($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2($($arg: $kind),*) $(-> $ret)? {
                plain($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            match $crate::model::vector::widest() {
                // SAFETY: `widest` has found every feature that the function enables.
                $crate::model::vector::Widest::Avx512 => return unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                $crate::model::vector::Widest::Avx2 => return unsafe { avx2($($arg),*) },
                $crate::model::vector::Widest::Plain => {}
            }
            plain($($arg),*)
        })*
    };
}
pub(crate) use wide;

/// The vectors of this processor.
#[cfg(target_arch = "x86_64")]
pub enum Widest {
    Avx512,
    Avx2,
    Plain,
}

/// What [`wide`] runs here.
#[cfg(target_arch = "x86_64")]
#[inline]
pub fn widest() -> Widest {
    if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
    {
        Widest::Avx512
    } else if is_x86_feature_detected!("avx2") {
        Widest::Avx2
    } else {
        Widest::Plain
    }
}

wide! {
    /// Rounds to bf16.
    pub fn narrow(from: &[f32], to: &mut [bf16]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t = to_bf16(*f);
        }
    }

    /// The f32 of each bf16.
    pub fn widen(from: &[bf16], to: &mut [f32]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t = f32::from_bits(u32::from(f.to_bits()) << 16);
        }
    }

    /// `to += from`
    pub fn add(from: &[f32], to: &mut [f32]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t += f;
        }
    }
}

/// e^x within two units in the last place; below the smallest normal number it is zero. (Cephes' polynomial.)
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2E: f32 = std::f32::consts::LOG2_E;
    /// Added and taken away again, it rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, of which the first has few enough bits for an exact product.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let bounded = if x < -87.3 { -87.3 } else { x };
    let bounded = if bounded > 88.8 { 88.8 } else { bounded };
    let shifted = bounded * LOG2E + ROUND;
    let n = shifted - ROUND;
    let r = bounded - n * LN2[0] - n * LN2[1];
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * (r * r) + r + 1.0;
    // The integer stands in the low bits. In two halves: 2^128, which the largest results need, is no f32.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
    let y = y * power(half) * power(n - half);
    let y = if x < -87.3 { 0.0 } else { y };
    let y = if x > 88.722_84 { f32::INFINITY } else { y };
    if x.is_nan() { x } else { y }
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn total(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of `f` over pairs of elements.
#[inline(always)]
pub fn sum_by(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in a.by_ref().zip(b.by_ref()) {
        for i in 0..LANES {
            lanes[i] += f(a[i], b[i]);
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a.remainder().iter().zip(b.remainder())) {
        *lane += f(*a, *b);
    }
    total(lanes)
}

/// The largest element; -infinity of none.
#[inline(always)]
pub fn largest(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = a.chunks_exact(LANES);
    for chunk in chunks.by_ref() {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(chunks.remainder()).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

/// The nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub fn to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if x.is_nan() { (bits >> 16 | 0x40) as u16 } else { rounded as u16 })
}

#[cfg(test)]
mod tests {
    use super::*;

    wide! {
        /// What the test below looks at.
        pub fn reduced(a: &[f32]) -> (f32, f32) {
            (sum_by(a, a, |x, y| x * exp(y)), largest(a))
        }
    }

    #[test]
    fn exponential_is_right_to_two_units() {
        let mut worst = 0f64;
        for i in -873_000..=887_200 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            // The unit in the last place of the f32 nearest to the exact value.
            let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            worst = worst.max((f64::from(exp(x)) - exact).abs() / unit);
        }
        assert!(worst <= 2.0, "off by {worst} units");
        assert_eq!([exp(f32::NEG_INFINITY), exp(-88.0), exp(0.0)], [0.0, 0.0, 1.0]);
        assert_eq!([exp(88.8), exp(f32::INFINITY)], [f32::INFINITY; 2]);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn every_copy_of_a_loop_gives_the_same_bits() {
        for n in [0, 1, 15, 16, 17, 251] {
            let a: Vec<f32> = (0..n).map(|i| ((i * 7919 % 251) as f32 - 125.0) / 40.0).collect();
            let plain = (sum_by(&a, &a, |x, y| x * exp(y)), largest(&a));
            let vectors = reduced(&a);
            assert_eq!((plain.0.to_bits(), plain.1.to_bits()), (vectors.0.to_bits(), vectors.1.to_bits()));
            let exact: f64 = a.iter().map(|&v| f64::from(v) * f64::from(v).exp()).sum();
            let size: f64 = a.iter().map(|&v| (f64::from(v) * f64::from(v).exp()).abs()).sum();
            assert!((f64::from(plain.0) - exact).abs() <= 32.0 * f64::from(f32::EPSILON) * size);
            assert_eq!(plain.1, a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }

    #[test]
    fn bf16_is_rounded_as_half_does() {
        let mut bits = 1u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = f32::from_bits(bits);
            let (ours, theirs) = (to_bf16(x), bf16::from_f32(x));
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{x}");
        }
    }
}
