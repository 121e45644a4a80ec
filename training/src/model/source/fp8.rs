//! Weights in 8-bit floats (E4M3) with scales: one, one per row, or one per block.

use anyhow::{Result, bail};
use candle_core::{DType, Tensor};

/// `weight` `[rows, cols]` times its scales: a single number, or f32 `[r, c]` of which each holds for a block of
/// values: 128 by 128 where that many cover the matrix, the last ones smaller if need be, else equal parts.
pub fn decode(weight: &Tensor, scales: &Tensor) -> Result<Tensor> {
    let values = weight.to_dtype(DType::F32)?;
    if scales.elem_count() == 1 {
        return Ok(values.broadcast_mul(&scales.reshape(())?)?);
    }
    let ((rows, cols), grid) = (values.dims2()?, scales.dims());
    let &[r, c] = (match grid.len() {
        1 => &[grid[0], 1][..],
        _ => grid,
    }) else {
        bail!("its scales have shape {grid:?}, two dimensions at most are expected")
    };
    let (Some(height), Some(width)) = (block(rows, r), block(cols, c)) else {
        bail!("its scales have shape {grid:?}, which divides no weight of {rows} x {cols} into blocks")
    };
    let scales = scales.flatten_all()?.to_vec1::<f32>()?;
    let mut values = values.flatten_all()?.to_vec1::<f32>()?;
    for (i, row) in values.chunks_mut(cols).enumerate() {
        for (block, scale) in row.chunks_mut(width).zip(&scales[i / height * c..]) {
            block.iter_mut().for_each(|v| *v *= scale);
        }
    }
    Ok(Tensor::from_vec(values, (rows, cols), weight.device())?)
}

/// Values per block when `blocks` cover `n`.
fn block(n: usize, blocks: usize) -> Option<usize> {
    match () {
        _ if blocks == 0 => None,
        _ if n.div_ceil(128) == blocks => Some(128),
        _ if n.is_multiple_of(blocks) => Some(n / blocks),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Bytes of E4M3: 1.0, -2.0, 448 (the largest), 2^-9 (the smallest).
    const BYTES: [u8; 4] = [0x38, 0xc0, 0x7e, 0x01];
    const VALUES: [f32; 4] = [1.0, -2.0, 448.0, 0.001_953_125];

    fn stored(rows: usize, cols: usize) -> (Tensor, Vec<f32>) {
        let bytes: Vec<u8> = (0..rows * cols).map(|i| BYTES[i % 4]).collect();
        let tensor = Tensor::from_raw_buffer(&bytes, DType::F8E4M3, &[rows, cols], &Device::Cpu).unwrap();
        (tensor, (0..rows * cols).map(|i| VALUES[i % 4]).collect())
    }

    #[test]
    fn each_value_is_multiplied_by_its_blocks_scale() {
        // (rows, cols), shape of the scales, height and width of a block.
        for ((rows, cols), shape, height, width) in [
            ((3, 4), vec![], 3, 4),
            ((3, 4), vec![1], 3, 4),
            ((3, 4), vec![3], 1, 4),
            ((3, 4), vec![3, 1], 1, 4),
            ((4, 6), vec![2, 3], 2, 2),
            ((256, 128), vec![2, 1], 128, 128),
            ((200, 300), vec![2, 3], 128, 128),
            ((130, 258), vec![2, 2], 128, 129),
        ] {
            let (weight, values) = stored(rows, cols);
            let n = shape.iter().product::<usize>();
            let scales: Vec<f32> = (0..n).map(|i| 0.5 + i as f32).collect();
            let across = cols.div_ceil(width);
            let found =
                decode(&weight, &Tensor::from_vec(scales.clone(), shape.clone(), &Device::Cpu).unwrap());
            let found = found.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (i, (f, v)) in found.iter().zip(&values).enumerate() {
                let (row, col) = (i / cols, i % cols);
                assert_eq!(*f, v * scales[row / height * across + col / width], "{shape:?} {row} {col}");
            }
        }
    }

    #[test]
    fn scales_that_fit_nothing_are_refused() {
        let (weight, _) = stored(4, 6);
        for shape in [vec![5, 1], vec![2, 4], vec![7], vec![1, 2, 3]] {
            let scales = Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
            assert!(decode(&weight, &scales).unwrap_err().to_string().contains("its scales"));
        }
    }
}
