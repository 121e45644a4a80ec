//! NF4 as tensors on a device, decoded there.

use super::nf4::{BLOCK, CODEBOOK, Nf4, SCALE_BLOCK, dynamic_map};
use crate::cuda::{self, launch};
use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor};
use half::bf16;

/// An [`Nf4`] matrix on a device.
#[derive(Clone)]
pub struct Placed {
    /// u8.
    packed: Tensor,
    /// u8.
    scale_codes: Tensor,
    /// f32: the 16 values of the codebook, the 256 of the map of scale codes, the second-level scales.
    tables: Tensor,
    decode: Decode,
}

/// Decoding, in (packed, scale codes, tables).
#[derive(Clone, Copy)]
struct Decode {
    offset: f32,
    rows: usize,
    cols: usize,
    /// f32, or bf16 rounded from it.
    dtype: DType,
}

impl Placed {
    /// Copies `nf4` to `device`; it is decoded to `dtype`, f32 or bf16.
    pub fn new(nf4: &Nf4, dtype: DType, device: &Device) -> Result<Self> {
        let bytes = |values: &[u8]| Tensor::from_slice(values, values.len(), device);
        let tables = [&CODEBOOK[..], &dynamic_map(), &nf4.scale_absmax].concat();
        Ok(Placed {
            packed: bytes(&nf4.packed)?,
            scale_codes: bytes(&nf4.scale_codes)?,
            tables: Tensor::new(tables, device)?,
            decode: Decode { offset: nf4.scale_offset, rows: nf4.rows, cols: nf4.cols, dtype },
        })
    }

    /// Output and input features.
    pub fn dims(&self) -> (usize, usize) {
        (self.decode.rows, self.decode.cols)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.packed.elem_count() + self.scale_codes.elem_count() + 4 * self.tables.elem_count()
    }

    /// The whole matrix, `[out, in]`.
    pub fn weight(&self) -> Result<Tensor> {
        self.packed.apply_op3_no_bwd(&self.scale_codes, &self.tables, &self.decode)
    }
}

impl CustomOp3 for Decode {
    fn name(&self) -> &'static str {
        "emaudit-nf4-decode"
    }

    fn cpu_fwd(
        &self,
        packed: &CpuStorage,
        _: &Layout,
        scale_codes: &CpuStorage,
        _: &Layout,
        tables: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (packed, codes) = (packed.as_slice::<u8>()?, scale_codes.as_slice::<u8>()?);
        let (codebook, rest) = tables.as_slice::<f32>()?.split_at(CODEBOOK.len());
        let (map, second) = rest.split_at(256);
        let mut out = vec![0f32; self.rows * self.cols];
        let blocks = out.chunks_mut(BLOCK).zip(packed.chunks(BLOCK / 2)).zip(codes);
        for (i, ((out, packed), &code)) in blocks.enumerate() {
            let scale = map[code as usize] * second[i / SCALE_BLOCK] + self.offset;
            for (pair, byte) in out.chunks_mut(2).zip(packed) {
                pair[0] = codebook[(byte >> 4) as usize] * scale;
                pair[1] = codebook[(byte & 15) as usize] * scale;
            }
        }
        let shape = Shape::from((self.rows, self.cols));
        match self.dtype {
            DType::F32 => Ok((CpuStorage::F32(out), shape)),
            DType::BF16 => Ok((CpuStorage::BF16(out.into_iter().map(bf16::from_f32).collect()), shape)),
            other => candle_core::bail!("NF4 is not decoded to {other:?}"),
        }
    }

    fn cuda_fwd(
        &self,
        packed: &CudaStorage,
        lp: &Layout,
        scale_codes: &CudaStorage,
        lc: &Layout,
        tables: &CudaStorage,
        lt: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (shape, values) = (Shape::from((self.rows, self.cols)), self.rows * self.cols);
        let inputs = [(packed, lp), (scale_codes, lc), (tables, lt)];
        let plan = |to| move |inputs, out| launch::nf4(inputs, out, values, self.offset, to);
        match self.dtype {
            DType::F32 => cuda::run::<f32, 3>(inputs, &shape, plan(launch::Decoded::F32)),
            DType::BF16 => cuda::run::<bf16, 3>(inputs, &shape, plan(launch::Decoded::Bf16)),
            other => candle_core::bail!("NF4 is not decoded to {other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placed_nf4_decodes_to_the_bits_of_nf4() {
        // 300 blocks have two second-level scales.
        let values: Vec<f32> = (0..64 * 300)
            .map(|i| ((i * 7919 % 2003) as f32 / 1001.5 - 1.0) * 0.1 * (1 + i % 7) as f32)
            .collect();
        let nf4 = Nf4::quantize(&values, 300, 64).unwrap();
        let decoded = nf4.dequantize();
        let placed = |dtype| Placed::new(&nf4, dtype, &Device::Cpu).unwrap();
        let weight = placed(DType::F32).weight().unwrap();
        assert_eq!((weight.dims(), placed(DType::F32).dims()), (&[300, 64][..], (300, 64)));
        assert_eq!(weight.flatten_all().unwrap().to_vec1::<f32>().unwrap(), decoded);
        let halves = placed(DType::BF16).weight().unwrap().flatten_all().unwrap().to_vec1::<bf16>().unwrap();
        assert!(halves.iter().zip(&decoded).all(|(h, v)| *h == bf16::from_f32(*v)));
        // A codebook and a map more than the host's form, and its offset less.
        assert_eq!(placed(DType::F32).bytes(), nf4.bytes() - 4 + 4 * (16 + 256));
        assert!(placed(DType::F64).weight().is_err());
    }
}
