//! From a row's place along the direction to both of its scores.

use super::ScoreUnit;

/// A row seen along the direction.
#[derive(Clone, Copy)]
pub(crate) struct Projection {
    pub dot: f32,
    pub raw: f64,
    pub z: f32,
}

impl Projection {
    #[inline]
    pub fn score(&self, unit: ScoreUnit) -> f32 {
        match unit {
            ScoreUnit::AlignedSd => self.z,
            ScoreUnit::Raw => self.raw as f32,
        }
    }
}

/// A sigma that scores are divided by without waiting for a division.
#[derive(Clone, Copy, Debug)]
pub(super) struct Divisor {
    value: f64,
    reciprocal: f64,
}

impl Divisor {
    pub fn new(value: f64) -> Divisor {
        Divisor { value, reciprocal: 1.0 / value }
    }

    /// `(dividend / value) as f32`, with the same bits.
    ///
    /// The product with the reciprocal is rounded twice and the quotient once, each by less than a unit in the last place
    /// of f64: fewer than four lie between them. Farther than that from the middle of two f32 both become the same one. Nearer,
    /// and outside the exponents of normal f32, it is the division.
    #[inline]
    pub fn quotient(&self, dividend: f64) -> f32 {
        const DROPPED: u32 = f64::MANTISSA_DIGITS - f32::MANTISSA_DIGITS;
        const FIRST_NEAR: u64 = (1 << (DROPPED - 1)) - 4;
        let near = dividend * self.reciprocal;
        let (exponent, dropped) =
            ((near.to_bits() << 1) >> f64::MANTISSA_DIGITS, near.to_bits() % (1 << DROPPED));
        // Unsigned: what lies below wraps to what lies above.
        let normal = exponent.wrapping_sub(1023 - 126) < 254;
        let apart = dropped.wrapping_sub(FIRST_NEAR) > 8;
        if normal && apart { near as f32 } else { self.divide(dividend) }
    }

    #[cold]
    fn divide(&self, dividend: f64) -> f32 {
        (dividend / self.value) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controls::SplitMix64;

    #[test]
    fn the_quotient_is_that_of_the_division() {
        let agree = |dividend: f64, value: f64| {
            let (found, exact) = (Divisor::new(value).quotient(dividend), (dividend / value) as f32);
            assert!(
                found.to_bits() == exact.to_bits() || found.is_nan() && exact.is_nan(),
                "{dividend:e} / {value:e}"
            );
        };
        let ends = [
            5e-324,
            f64::MIN_POSITIVE,
            1e-45,
            1e-38,
            0.1,
            1.0,
            3.0,
            1e38,
            f64::from(f32::MAX),
            1e76,
            f64::MAX,
        ];
        for dividend in ends.into_iter().chain([0.0, f64::INFINITY, f64::NAN]).flat_map(|x| [x, -x]) {
            ends.into_iter().for_each(|value| agree(dividend, value));
        }
        let mut generator = SplitMix64::new(7);
        for _ in 0..100_000 {
            let (bits, any) = (generator.next_u64(), generator.next_u64());
            let value = f64::from_bits(bits >> 12 | (993 + bits % 60) << 52);
            agree(f64::from_bits(any), value);
            // Quotients at the middle of two normal f32 and around it, where the two ways could part.
            let one = f32::from_bits(0x0080_0000 + (any as u32) % 0x7e00_0000);
            let middle = (f64::from(one) + f64::from(one.next_up())) / 2.0;
            let dividend = (middle * value).to_bits();
            (0..19).for_each(|step| agree(f64::from_bits(dividend - 9 + step), value));
        }
    }
}
