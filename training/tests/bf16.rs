//! Products in bf16, in a process of their own: TF32, which comes with them, is allowed or not for all of a process.

use candle_core::{Device, Tensor};
use emaudit_train::model::{self, Batch, Decoder, LoadOptions, no_edit};
use emaudit_train::quant::Storage;
use emaudit_train::recipe::Compute;
use std::path::Path;

fn tiny(compute: Compute, device: &Device) -> anyhow::Result<Decoder> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny");
    model::load(&path, &LoadOptions { storage: Storage::Nf4, device: device.clone(), compute })
}

fn logits(decoder: &Decoder) -> Tensor {
    let ids: Vec<u32> = (0..24).map(|i| i * 5 % 128).collect();
    let batch = Batch::new(&[ids], &decoder.device).unwrap();
    let x = decoder.forward(&batch, None, None, &mut no_edit).unwrap();
    decoder.logits(&x.squeeze(0).unwrap()).unwrap()
}

/// The CPU has bf16 while finetuning only.
#[test]
fn a_model_on_the_cpu_is_f32() {
    let on_cpu =
        |compute| logits(&tiny(compute, &Device::Cpu).unwrap()).flatten_all().unwrap().to_vec1::<f32>();
    assert_eq!(on_cpu(Compute::Bf16).unwrap(), on_cpu(Compute::F32).unwrap());
}

/// Each of the model's 22 products rounds its two factors and its result, by up to 2^-9 of each: 6 sqrt(66) 2^-9, as
/// `tolerance` of the parity tests has it for f32.
#[cfg(feature = "cuda")]
#[test]
fn the_model_moves_no_further_than_its_roundings_on_a_gpu() {
    let Ok(gpu) = Device::new_cuda(0) else { return skipped::missing("bf16 on a GPU", "there is none") };
    if !emaudit_train::cuda::supports_bf16(&gpu) {
        return skipped::skipped("bf16 on a GPU", "its compute capability is below 8.0");
    }
    let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let exact = flat(logits(&tiny(Compute::F32, &gpu).unwrap()));
    let rounded = flat(logits(&tiny(Compute::Bf16, &gpu).unwrap()));
    let largest = exact.iter().fold(0f32, |m, v| m.max(v.abs()));
    let off = exact.iter().zip(&rounded).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest;
    let allowed = 6.0 * 66f32.sqrt() * 2f32.powi(-9);
    assert!(off > 0.0 && off <= allowed, "{off:e} of {allowed:e}");
}

#[cfg(feature = "cuda")]
#[path = "../../tests/skipped/mod.rs"]
mod skipped;
