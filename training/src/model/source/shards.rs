//! Tensors of a folder of safetensors.

use super::fp8;
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The safetensors files of one model.
pub struct Folder {
    path: PathBuf,
    files: Vec<Shard>,
    /// What stands before `model.` or `lm_head.` when the text model is a part of a multimodal one.
    nesting: Nesting,
}

/// How the names of a text model are written.
#[derive(Clone, Copy, PartialEq)]
enum Nesting {
    /// `model.layers.0`, `lm_head`.
    Plain,
    /// `language_model.model.layers.0`, `language_model.lm_head`: multimodal checkpoints.
    Outside,
    /// `model.language_model.layers.0`, `lm_head`: the same, saved by transformers 5.
    Inside,
}

impl Nesting {
    fn stored(self, name: &str) -> String {
        match (self, name.strip_prefix("model.")) {
            (Nesting::Plain, _) | (Nesting::Inside, None) => name.to_owned(),
            (Nesting::Outside, _) => format!("language_model.{name}"),
            (Nesting::Inside, Some(rest)) => format!("model.language_model.{rest}"),
        }
    }
}

/// One safetensors file, of which only the header is held.
struct Shard {
    path: PathBuf,
    header: safetensors::tensor::Metadata,
    /// Where the tensors' bytes begin.
    start: u64,
}

impl Folder {
    /// Reads the headers of all files, those that the index names where there is one.
    pub fn open(path: &Path) -> Result<Self> {
        let mut found = BTreeSet::new();
        for entry in std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))? {
            let file = entry?.path();
            if file.extension().is_some_and(|e| e == "safetensors")
                && file.file_name().is_some_and(|n| n.to_string_lossy().starts_with("model"))
            {
                found.insert(file);
            }
        }
        if let Some(indexed) = indexed(path)? {
            found = indexed;
        }
        if found.is_empty() {
            bail!("{} holds no model*.safetensors", path.display());
        }
        let files = found.into_iter().map(Shard::open).collect::<Result<Vec<_>>>()?;
        let holds = |n: &Nesting| {
            let name = n.stored("model.embed_tokens.weight");
            files.iter().any(|f| f.header.info(&name).is_some())
        };
        let nesting = [Nesting::Plain, Nesting::Outside, Nesting::Inside].into_iter().find(holds);
        Ok(Folder { path: path.to_owned(), files, nesting: nesting.unwrap_or(Nesting::Plain) })
    }

    fn shard(&self, stored: &str) -> Option<&Shard> {
        self.files.iter().find(|f| f.header.info(stored).is_some())
    }

    /// The tensor as f32, and the names in the files of all that went into it.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<(Vec<String>, Tensor)> {
        let stored = self.nesting.stored(name);
        let Some(shard) = self.shard(&stored) else {
            bail!("{} holds no tensor `{stored}`", self.path.display());
        };
        let tensor = shard.tensor(&stored, device)?;
        if tensor.dtype() != DType::F8E4M3 {
            return Ok((vec![stored], tensor.to_dtype(DType::F32)?));
        }
        // `weight_scale_inv` multiplies in spite of its name (fp8 in transformers); so does `weight_scale`.
        let scale = ["_scale_inv", "_scale"].iter().map(|end| format!("{stored}{end}"));
        let Some((shard, scale)) = scale.filter_map(|n| Some((self.shard(&n)?, n))).next() else {
            bail!("tensor `{stored}` is FP8 and has no `{stored}_scale_inv`");
        };
        let decoded = fp8::decode(&tensor, &shard.tensor(&scale, device)?.to_dtype(DType::F32)?)
            .with_context(|| format!("cannot decode `{stored}`"))?;
        Ok((vec![stored, scale], decoded))
    }

    /// Names of the tensors of the text model, without what transformers itself does not read: a head that is tied,
    /// rotary frequencies that are computed, scales of activations and caches, which a model decoded on load does without.
    pub fn names(&self) -> Vec<String> {
        let (blocks, head) = (self.nesting.stored("model.x"), self.nesting.stored("lm_head.weight"));
        let blocks = blocks.trim_end_matches('x');
        let unread = ["rotary_emb.inv_freq", ".activation_scale", ".input_scale", ".k_scale", ".v_scale"];
        let of_text = |name: &String| {
            name.starts_with(blocks)
                && *name != head
                && !unread.iter().any(|end| name.ends_with(end))
                && (self.nesting != Nesting::Plain
                    || !["model.vision", "model.multi_modal"].iter().any(|p| name.starts_with(p)))
        };
        let names = self.files.iter().flat_map(|f| f.header.tensors().into_keys());
        names.filter(of_text).collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// The files that `model.safetensors.index.json` names.
fn indexed(folder: &Path) -> Result<Option<BTreeSet<PathBuf>>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let path = folder.join("model.safetensors.index.json");
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let index: Index = serde_json::from_str(&text)
        .with_context(|| format!("{} is not an index of safetensors", path.display()))?;
    let mut files = BTreeSet::new();
    for name in index.weight_map.values().collect::<BTreeSet<_>>() {
        // An index names files beside it; anything else would read where it should not.
        if Path::new(name).components().count() != 1 || !folder.join(name).is_file() {
            bail!("{} names `{name}`, which is not in the folder", path.display());
        }
        files.insert(folder.join(name));
    }
    Ok(Some(files))
}

/// Longest header the format allows.
const MAX_HEADER: u64 = 100_000_000;

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let read = || -> Result<(safetensors::tensor::Metadata, u64)> {
            let mut file = File::open(&path)?;
            let mut length = [0u8; 8];
            file.read_exact(&mut length)?;
            let length = u64::from_le_bytes(length);
            if length > MAX_HEADER {
                bail!("its header claims {length} bytes");
            }
            let mut header = vec![0u8; length as usize];
            file.read_exact(&mut header)?;
            let header: safetensors::tensor::Metadata = serde_json::from_slice(&header)?;
            let (expected, found) = (8 + length + header.data_len() as u64, file.metadata()?.len());
            if expected != found {
                bail!("it has {found} bytes, its header says {expected}");
            }
            Ok((header, 8 + length))
        };
        let (header, start) =
            read().with_context(|| format!("{} is not a safetensors file", path.display()))?;
        Ok(Shard { path, header, start })
    }

    /// Reads this tensor's bytes and no others: a checkpoint may be larger than the memory.
    fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let info = self.header.info(name).with_context(|| format!("no tensor `{name}`"))?;
        let dtype = match info.dtype {
            safetensors::Dtype::F32 => DType::F32,
            safetensors::Dtype::F16 => DType::F16,
            safetensors::Dtype::BF16 => DType::BF16,
            safetensors::Dtype::F8_E4M3 => DType::F8E4M3,
            other => bail!("tensor `{name}` is stored as {other:?}, which is not supported"),
        };
        let (from, to) = info.data_offsets;
        let mut bytes = vec![0u8; to - from];
        let read = |bytes: &mut [u8]| -> std::io::Result<()> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.start + from as u64))?;
            file.read_exact(bytes)
        };
        read(&mut bytes).with_context(|| format!("cannot read `{name}` from {}", self.path.display()))?;
        Ok(Tensor::from_raw_buffer(&bytes, dtype, &info.shape, device)?)
    }
}
