//! Block-wise dynamic 8-bit quantisation of optimizer state (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
//! Quantization"), with the maps and the blocks of bitsandbytes.

use super::nf4::{dynamic_map, nearest, unsigned_dynamic_map};
use anyhow::{Result, ensure};
use rayon::prelude::*;
use std::sync::LazyLock;

/// Values that share one scale.
pub const DYNAMIC_BLOCK: usize = 256;

/// Whether values may be negative: squares are not, and have finer steps for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// The map of first moments.
    Signed,
    /// The map of second moments.
    Unsigned,
}

impl Sign {
    /// The 256 values between which codes choose, ascending.
    pub fn map(self) -> &'static [f32; 256] {
        static SIGNED: LazyLock<[f32; 256]> = LazyLock::new(dynamic_map);
        static UNSIGNED: LazyLock<[f32; 256]> = LazyLock::new(unsigned_dynamic_map);
        match self {
            Sign::Signed => &SIGNED,
            Sign::Unsigned => &UNSIGNED,
        }
    }
}

/// Values as one byte each and one f32 a block of [`DYNAMIC_BLOCK`].
#[derive(Clone, Debug, PartialEq)]
pub struct Dynamic8 {
    /// One code a value.
    codes: Vec<u8>,
    /// The largest absolute value of each block.
    absmax: Vec<f32>,
    sign: Sign,
}

impl Dynamic8 {
    /// `count` zeros.
    pub fn zeros(count: usize, sign: Sign) -> Self {
        Dynamic8 { codes: vec![0; count], absmax: vec![0.0; count.div_ceil(DYNAMIC_BLOCK)], sign }
    }

    /// What [`codes`](Self::codes) and [`absmax`](Self::absmax) gave.
    pub fn from_parts(codes: Vec<u8>, absmax: Vec<f32>, sign: Sign) -> Result<Self> {
        ensure!(
            absmax.len() == codes.len().div_ceil(DYNAMIC_BLOCK),
            "{} values have {} scales",
            codes.len(),
            absmax.len()
        );
        Ok(Dynamic8 { codes, absmax, sign })
    }

    /// One code a value.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The largest absolute value of each block.
    pub fn absmax(&self) -> &[f32] {
        &self.absmax
    }

    /// The values.
    pub fn decode(&self) -> Vec<f32> {
        let map = self.sign.map();
        let blocks = self.codes.chunks(DYNAMIC_BLOCK).zip(&self.absmax);
        blocks.flat_map(|(codes, scale)| codes.iter().map(move |&c| map[c as usize] * scale)).collect()
    }

    /// The blocks, to be read and written one by one in parallel.
    pub fn blocks(&mut self) -> impl IndexedParallelIterator<Item = Block<'_>> {
        let map = self.sign.map();
        self.codes.par_chunks_mut(DYNAMIC_BLOCK).zip(&mut self.absmax).map(move |(codes, absmax)| Block {
            codes,
            absmax,
            map,
        })
    }
}

/// One block of a [`Dynamic8`].
pub struct Block<'a> {
    codes: &'a mut [u8],
    absmax: &'a mut f32,
    map: &'static [f32; 256],
}

impl Block<'_> {
    /// Decodes into as many values as the block has.
    pub fn read(&self, values: &mut [f32]) {
        for (value, &code) in values.iter_mut().zip(&*self.codes) {
            *value = self.map[code as usize] * *self.absmax;
        }
    }

    /// Replaces the values: each becomes the nearest value of the map, in units of the block's largest.
    pub fn write(&mut self, values: &[f32]) {
        let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        *self.absmax = largest;
        if largest == 0.0 {
            self.codes.fill(0);
            return;
        }
        for (code, &value) in self.codes.iter_mut().zip(values) {
            *code = nearest(self.map, value / largest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_within_half_a_step_of_the_map() {
        for sign in [Sign::Signed, Sign::Unsigned] {
            let least = if sign == Sign::Signed { -1.0 } else { 0.0 };
            // 700 values make two whole blocks and a short one.
            let values: Vec<f32> = (0..700i32)
                .map(|i| ((i * 7919 % 2003) as f32 / 1001.5 - 1.0).max(least) * 10f32.powi(-(i % 5)))
                .collect();
            let mut q = Dynamic8::zeros(700, sign);
            assert_eq!((q.decode(), q.absmax().len()), (vec![0.0; 700], 3));
            q.blocks().zip(values.par_chunks(DYNAMIC_BLOCK)).for_each(|(mut b, v)| b.write(v));
            for (block, decoded) in values.chunks(DYNAMIC_BLOCK).zip(q.decode().chunks(DYNAMIC_BLOCK)) {
                let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                for (v, d) in block.iter().zip(decoded) {
                    let near = |x: f32| sign.map().partition_point(|&m| m < x).clamp(1, 255);
                    let i = near(v / largest);
                    let step = sign.map()[i] - sign.map()[i - 1];
                    assert!((v - d).abs() <= largest * (0.5 * step + 1e-6), "{v} became {d}");
                }
            }
            let again = Dynamic8::from_parts(q.codes().to_vec(), q.absmax().to_vec(), sign).unwrap();
            assert_eq!(again, q);
        }
        assert!(Dynamic8::from_parts(vec![0; 257], vec![0.0], Sign::Signed).is_err());
    }
}
