//! The tiny model, its reference numbers, and what may differ from them.

use candle_core::{D, Device, Tensor};
use emaudit_train::finetune::Example;
use emaudit_train::lora::Adapter;
use emaudit_train::model::{self, Batch, Config, Decoder, LoadOptions, no_edit};
use emaudit_train::quant::Storage;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Sequences of the reference.
pub const SEQUENCES: usize = 3;

pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Tensors of a reference file.
pub struct Golden(HashMap<String, Tensor>);

impl Golden {
    pub fn open(name: &str) -> Self {
        Golden(candle_core::safetensors::load(path(name), &Device::Cpu).unwrap())
    }

    pub fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("the reference has no `{name}`"))
    }

    pub fn scalar(&self, name: &str) -> f32 {
        self.get(name).to_scalar().unwrap()
    }

    pub fn ids(&self, i: usize) -> Vec<u32> {
        self.get(&format!("ids.{i}")).to_vec1().unwrap()
    }

    /// The three sequences with their response masks.
    pub fn examples(&self) -> Vec<Example> {
        let mask = |i| self.get(&format!("response.{i}")).to_vec1::<u8>().unwrap();
        let example = |i| Example { ids: self.ids(i), response: mask(i).iter().map(|&m| m == 1).collect() };
        (0..SEQUENCES).map(example).collect()
    }
}

pub fn load(folder: &Path, storage: Storage) -> anyhow::Result<Decoder> {
    model::load(folder, &LoadOptions::new(storage, &Device::Cpu))
}

pub fn tiny() -> Decoder {
    tiny_on(&Device::Cpu)
}

pub fn tiny_on(device: &Device) -> Decoder {
    model::load(&path("tiny"), &LoadOptions::new(Storage::None, device)).unwrap()
}

/// The first GPU; where there is none, that is said.
#[cfg(feature = "cuda")]
pub fn gpu() -> Option<Device> {
    // The rest of the message is a backtrace.
    let say = |e: candle_core::Error| e.to_string().lines().next().unwrap_or_default().to_owned();
    Device::new_cuda(0).map_err(|e| crate::skipped::missing("a test on a GPU", &say(e))).ok()
}

/// Makes each body, a function of a device, a test on the CPU, and in a build with the feature `cuda` one on a GPU.
macro_rules! on_every_device {
    ($($body:ident),+ $(,)?) => {$(
        mod $body {
            #[test]
            fn on_the_cpu() {
                super::$body(&candle_core::Device::Cpu);
            }

            #[cfg(feature = "cuda")]
            #[test]
            fn on_a_gpu() {
                if let Some(gpu) = crate::fixture::gpu() {
                    super::$body(&gpu);
                }
            }
        }
    )+};
}
pub(crate) use on_every_device;

/// The tiny model's folder with its tensors and configuration changed by `edit`, in f32.
pub fn edited(edit: impl FnOnce(&mut BTreeMap<String, Tensor>, &mut serde_json::Value)) -> tempfile::TempDir {
    let stored = candle_core::safetensors::load(path("tiny/model.safetensors"), &Device::Cpu).unwrap();
    let as_f32 = |(k, v): (String, Tensor)| (k, v.to_dtype(candle_core::DType::F32).unwrap());
    let mut tensors: BTreeMap<String, Tensor> = stored.into_iter().map(as_f32).collect();
    let mut config = read_json(&path("tiny/config.json"));
    edit(&mut tensors, &mut config);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    write_tensors(&folder.path().join("model.safetensors"), &tensors);
    folder
}

/// PEFT's adapter folder with its tensors and configuration changed by `edit`.
pub fn edited_adapter(
    edit: impl FnOnce(&mut BTreeMap<String, Tensor>, &mut serde_json::Value),
) -> tempfile::TempDir {
    let stored =
        candle_core::safetensors::load(path("adapter/adapter_model.safetensors"), &Device::Cpu).unwrap();
    let mut tensors = stored.into_iter().collect();
    let mut config = read_json(&path("adapter/adapter_config.json"));
    edit(&mut tensors, &mut config);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    write_tensors(&folder.path().join("adapter_model.safetensors"), &tensors);
    folder
}

pub fn read_json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let bytes = safetensors::serialize(tensors.iter().map(|(k, v)| (k.as_str(), v)), None).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Logits `[tokens, vocab]` of one sequence, and the residual after every block, `[tokens, hidden]`.
pub fn run(decoder: &Decoder, ids: &[u32], adapter: Option<&Adapter>) -> (Tensor, Vec<Tensor>) {
    let mut residuals = Vec::new();
    let mut keep = |_: usize, x: Tensor| {
        residuals.push(x.squeeze(0)?);
        Ok(x)
    };
    let batch = Batch::new(&[ids], &decoder.device).unwrap();
    let x = decoder.forward(&batch, adapter, None, &mut keep).unwrap();
    (decoder.logits(&x.squeeze(0).unwrap()).unwrap(), residuals)
}

pub fn logits(decoder: &Decoder, ids: &[u32], adapter: Option<&Adapter>) -> Tensor {
    run(decoder, ids, adapter).0
}

/// Logits `[batch, tokens, vocab]` of a padded batch.
pub fn batch_logits(decoder: &Decoder, batch: &Batch) -> Tensor {
    let x = decoder.forward(batch, None, None, &mut no_edit).unwrap();
    all_logits(decoder, &x)
}

/// Logits of every row of `x`: `[batch, tokens, hidden]`.
pub fn all_logits(decoder: &Decoder, x: &Tensor) -> Tensor {
    let (batch, tokens, hidden) = x.dims3().unwrap();
    let rows = decoder.logits(&x.reshape((batch * tokens, hidden)).unwrap()).unwrap();
    rows.reshape((batch, tokens, rows.dim(D::Minus1).unwrap())).unwrap()
}

pub fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference, in units of the largest absolute value of `expected`.
pub fn deviation(ours: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(ours.dims(), expected.dims());
    let (a, b) = (flat(ours), flat(expected));
    assert!(!a.is_empty() && a.iter().chain(&b).all(|v| v.is_finite()));
    let scale = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    a.iter().zip(&b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / scale
}

/// Asserts that two tensors agree within `tolerance` of the largest value, and says by how much.
#[track_caller]
pub fn assert_close(what: &str, ours: &Tensor, expected: &Tensor, tolerance: f32) {
    let found = deviation(ours, expected);
    println!("{what}: {found:.2e} of {tolerance:.2e}");
    assert!(found <= tolerance, "{what} differs by {found:e} of the largest value, allowed {tolerance:e}");
}

/// Asserts the same bits.
#[track_caller]
pub fn assert_same(what: &str, ours: &Tensor, expected: &Tensor) {
    let bits = |t: &Tensor| flat(t).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(ours.dims(), expected.dims(), "{what}");
    assert!(bits(ours) == bits(expected), "{what} differs by {:e}", deviation(ours, expected));
}

/// What two correct f32 computations of the same `n` chained roundings may differ by, relative to the
/// largest value: 2 * 6 * sqrt(n) * u with u = 2^-24.
///
/// Rounding errors of n operations add up to at most lambda * sqrt(n) * u, except with a probability of
/// 2 n exp(-lambda^2 / 2) (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis");
/// lambda = 6 makes that 3e-5 for n = 1000. The factor 2 is there because the reference rounds too. It
/// presumes that values keep their magnitude on the way, as they do here: unit-variance weights
/// between norms.
pub fn tolerance(n: usize) -> f32 {
    2.0 * 6.0 * (n as f32).sqrt() * 2f32.powi(-24)
}

/// Roundings on the longest way through `blocks` blocks: each sum counts its terms.
///
/// The tokens squared stand for the rotary angles: transformers rounds them to f32, which moves position p
/// by p roundings at once, not by a random walk of p.
pub fn roundings(c: &Config, tokens: usize, blocks: usize) -> usize {
    let attention = c.hidden_size + c.hidden_size + c.head_dim + 2 * tokens + c.n_heads * c.head_dim;
    let feed_forward = c.hidden_size + c.hidden_size + c.intermediate_size;
    let norms =
        if c.query_key_norms { 2 * c.head_dim } else { 0 } + if c.post_norms { 2 * c.hidden_size } else { 0 };
    blocks * (attention + feed_forward + norms) + tokens * tokens
}

/// Tolerance of the logits: all blocks, the final norm and the head.
pub fn logits_tolerance(c: &Config, tokens: usize) -> f32 {
    tolerance(roundings(c, tokens, c.n_layers) + 2 * c.hidden_size)
}
