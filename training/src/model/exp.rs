//! e^x in f32 as arithmetic alone, which compilers turn into vector code; the C library's is one call a value.

/// n ln 2 in two parts: the first has ten bits, so that its multiples by exponents are exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// Adding it rounds to the nearest whole number and leaves that in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Below the first the result is 0, above the second infinite.
const RANGE: [f32; 2] = [-87.33, 88.37];
/// 1 / k! for k from 7 down to 1: what is left out is below 2^-27 where |r| <= ln 2 / 2.
const TAYLOR: [f32; 7] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];

/// e^x, off by at most 2^-22 of itself.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let mut sum = TAYLOR[0];
    for c in &TAYLOR[1..] {
        sum = sum * r + c;
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    let value = (sum * r + 1.0) * power;
    let value = if x < RANGE[0] { 0.0 } else { value };
    if x > RANGE[1] { f32::INFINITY } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounding: r is off by 0.4 units of 2^-24, the last sum by 1, the product in it by 0.35 and the sum before by half
    /// of 1.4; divided by the least e^r, 0.707, that is below 4 units.
    #[test]
    fn it_is_within_its_bound_everywhere() {
        let mut checked = 0;
        for i in 0..2_000_000u32 {
            let x = RANGE[0] + (RANGE[1] - RANGE[0]) * (i as f32 / 2e6);
            let (own, exact) = (exp(x) as f64, (x as f64).exp());
            assert!((own - exact).abs() <= exact * 2f64.powi(-22), "e^{x} is {exact}, not {own}");
            checked += 1;
        }
        assert_eq!(checked, 2_000_000);
        for (x, expected) in [(0.0, 1.0), (-0.0, 1.0), (-88.0, 0.0), (-1e30, 0.0), (f32::NEG_INFINITY, 0.0)] {
            assert_eq!(exp(x), expected);
        }
        assert_eq!([exp(89.0), exp(1e30), exp(f32::INFINITY)], [f32::INFINITY; 3]);
        assert!(exp(f32::NAN).is_nan());
        for tiny in [1e-45, 1e-30, 1e-10] {
            assert_eq!((exp(tiny), exp(-tiny)), (1.0, 1.0));
        }
    }
}
