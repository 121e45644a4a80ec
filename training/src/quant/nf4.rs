//! 4-bit NormalFloat with double-quantised scales (Dettmers et al. 2023, QLoRA).
//!
//! Layout and rounding follow bitsandbytes: blocks of 64 values over the flattened row-major matrix, the
//! first value of a pair in the high nibble; each block's absolute maximum, less their common mean, is
//! itself quantised to 8 bits in blocks of 256 with the signed dynamic map.

use super::Sign;
use anyhow::{Result, bail};
use rayon::prelude::*;

/// Values that share one scale.
pub const BLOCK: usize = 64;
/// Scales that share one second-level scale.
pub const SCALE_BLOCK: usize = 256;

/// The 16 values of NF4 (QLoRA, appendix E).
pub const CODEBOOK: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A matrix in NF4: 4 bits a value, 8 bits a block of 64, 32 bits a block of 16,384.
#[derive(Clone, Debug, PartialEq)]
pub struct Nf4 {
    /// Two values a byte, first in the high nibble.
    pub packed: Vec<u8>,
    /// One dynamic-map code a block.
    pub scale_codes: Vec<u8>,
    /// Second-level scales.
    pub scale_absmax: Vec<f32>,
    /// Mean of the first-level scales, added back after decoding.
    pub scale_offset: f32,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

/// The signed 8-bit dynamic map of bitsandbytes, ascending, to the last bit.
pub fn dynamic_map() -> [f32; 256] {
    let means = (0..7).flat_map(|exponent| decade(exponent, 1 << exponent));
    sorted(means.flat_map(|mean| [mean, -mean]))
}

/// The unsigned one: twice as many steps a decade.
pub fn unsigned_dynamic_map() -> [f32; 256] {
    sorted((0..7).flat_map(|exponent| decade(exponent, 2 << exponent)))
}

/// Midpoints of the `items` equal parts of one decade.
///
/// It is divided as `torch.linspace` does it: from both ends to the middle, multiply-add rounded once.
fn decade(exponent: i32, items: usize) -> impl Iterator<Item = f32> {
    let scale = 10f64.powi(exponent - 6) as f32;
    let step = (1.0 - 0.1f32) / items as f32;
    let boundary = move |i: usize| match i < items.div_ceil(2) {
        true => step.mul_add(i as f32, 0.1),
        false => step.mul_add(-((items - i) as f32), 1.0),
    };
    (0..items).map(move |i| scale * ((boundary(i) + boundary(i + 1)) / 2.0))
}

fn sorted(means: impl Iterator<Item = f32>) -> [f32; 256] {
    let mut values: Vec<f32> = means.chain([0.0, 1.0]).collect();
    values.sort_by(f32::total_cmp);
    values.try_into().expect("254 means, zero and one make 256")
}

/// What values are multiplied by to lie within [-1, 1]. Like bitsandbytes it takes a largest value below 1e-38
/// for 1e-38: the reciprocal of a subnormal number overflows, and zero times infinity is no number.
fn inverse(largest: f32) -> f32 {
    1.0 / largest.max(1e-38)
}

/// Index of the codebook value nearest to `x`; ties go down, as a search over midpoints does.
pub(super) fn nearest(sorted: &[f32], x: f32) -> u8 {
    let above = sorted.partition_point(|&v| v < x);
    if above == 0 {
        return 0;
    }
    if above == sorted.len() {
        return (sorted.len() - 1) as u8;
    }
    let midpoint = (sorted[above - 1] + sorted[above]) / 2.0;
    if x > midpoint { above as u8 } else { (above - 1) as u8 }
}

impl Nf4 {
    /// Quantises a row-major `rows x cols` matrix; its size must be a multiple of 64 and its values finite.
    pub fn quantize(values: &[f32], rows: usize, cols: usize) -> Result<Self> {
        if values.len() != rows * cols || values.is_empty() || !values.len().is_multiple_of(BLOCK) {
            bail!(
                "NF4 needs rows x cols values in multiples of {BLOCK}, got {rows} x {cols} and {}",
                values.len()
            );
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            bail!("weight {at} is not finite; the checkpoint is damaged");
        }
        let absmax: Vec<f32> =
            values.par_chunks(BLOCK).map(|b| b.iter().fold(0f32, |m, v| m.max(v.abs()))).collect();
        let packed = values
            .par_chunks(BLOCK)
            .zip(absmax.par_iter())
            .flat_map_iter(|(block, &scale)| {
                let inverse = inverse(scale);
                let code = move |v: f32| nearest(&CODEBOOK, v * inverse);
                block.chunks_exact(2).map(move |p| code(p[0]) << 4 | code(p[1]))
            })
            .collect();
        let (scale_codes, scale_absmax, scale_offset) = quantize_scales(&absmax);
        Ok(Nf4 { packed, scale_codes, scale_absmax, scale_offset, rows, cols })
    }

    /// Block scales after decoding.
    pub fn scales(&self) -> Vec<f32> {
        let map = Sign::Signed.map();
        (0..self.scale_codes.len()).map(|block| self.scale(map, block)).collect()
    }

    /// The scale of one block; `map` is the signed dynamic one.
    pub(super) fn scale(&self, map: &[f32; 256], block: usize) -> f32 {
        let code = self.scale_codes[block] as usize;
        map[code] * self.scale_absmax[block / SCALE_BLOCK] + self.scale_offset
    }

    /// Value `i` of the flattened matrix, in units of its block's scale.
    pub(super) fn code(&self, i: usize) -> f32 {
        let byte = self.packed[i / 2];
        CODEBOOK[(if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 }) as usize]
    }

    /// Decodes the whole matrix, row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.rows * self.cols];
        self.decode(&mut out);
        out
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.packed.len() + self.scale_codes.len() + 4 * self.scale_absmax.len() + 4
    }
}

fn quantize_scales(absmax: &[f32]) -> (Vec<u8>, Vec<f32>, f32) {
    let map = dynamic_map();
    let offset = (absmax.iter().map(|&v| v as f64).sum::<f64>() / absmax.len() as f64) as f32;
    let mut codes = Vec::with_capacity(absmax.len());
    let mut second = Vec::with_capacity(absmax.len().div_ceil(SCALE_BLOCK));
    for block in absmax.chunks(SCALE_BLOCK) {
        let largest = block.iter().fold(0f32, |m, v| m.max((v - offset).abs()));
        let inverse = inverse(largest);
        codes.extend(block.iter().map(|v| nearest(&map, (v - offset) * inverse)));
        second.push(largest);
    }
    (codes, second, offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_map_is_the_published_one() {
        let map = dynamic_map();
        assert_eq!((map[0], map[127], map[255]), (-0.992_968_74, 0.0, 1.0));
        assert!(map.windows(2).all(|w| w[0] < w[1]), "strictly ascending");
        let map = unsigned_dynamic_map();
        assert_eq!((map[0], map[255]), (0.0, 1.0));
        assert!(map.windows(2).all(|w| w[0] < w[1]), "strictly ascending");
    }

    #[test]
    fn every_value_decodes_to_the_nearest_code_times_its_scale() {
        let values: Vec<f32> =
            (0..64 * 300).map(|i| ((i * 7919 % 2003) as f32 / 1001.5 - 1.0) * 0.1).collect();
        let q = Nf4::quantize(&values, 300, 64).unwrap();
        // The widest gap of the codebook is 0.3038, so half of it bounds the error in units of the scale;
        // the scale itself is off by at most half the widest step of its map times its second-level scale.
        for (i, (block, decoded)) in values.chunks(BLOCK).zip(q.dequantize().chunks(BLOCK)).enumerate() {
            let absmax = block.iter().fold(0f32, |m, v| m.max(v.abs()));
            let slack = q.scale_absmax[i / SCALE_BLOCK] * 0.0075;
            for (v, d) in block.iter().zip(decoded) {
                assert!((v - d).abs() <= absmax * 0.152 + slack, "block {i}: {v} became {d}");
            }
        }
    }

    #[test]
    fn zeros_constants_and_bad_input() {
        let zeros = Nf4::quantize(&[0.0; 128], 2, 64).unwrap();
        assert_eq!(zeros.dequantize(), vec![0.0; 128]);
        let same = Nf4::quantize(&[0.25; 128], 2, 64).unwrap();
        assert_eq!(same.dequantize(), vec![0.25; 128]);
        assert!(Nf4::quantize(&[0.0; 65], 1, 65).is_err());
        assert!(Nf4::quantize(&[f32::NAN; 64], 1, 64).is_err());
    }
}
