//! Where tensors come from, asked for by the names that transformers gives them.

mod fp8;
mod gguf;
mod shards;

use super::Config;
use super::ops::Norm;
use anyhow::{Result, bail};
use candle_core::{Device, Tensor};
use std::collections::BTreeSet;
use std::path::Path;

pub(super) use gguf::Gguf;
pub(super) use shards::Folder;

/// An open model. It remembers what was asked for: a tensor of a block that nobody asked for is a part of the
/// network that would be left out in silence.
pub(super) struct Source {
    files: Files,
    used: BTreeSet<String>,
    pub config: Config,
}

enum Files {
    Gguf(Box<Gguf>),
    Folder(Folder),
}

impl Source {
    /// Opens a `.gguf` file or a folder with `config.json` and safetensors.
    pub fn open(path: &Path) -> Result<Self> {
        let (files, config) = if path.is_dir() {
            (Files::Folder(Folder::open(path)?), Config::from_folder(path)?)
        } else {
            let (file, config) = Gguf::open(path)?;
            (Files::Gguf(Box::new(file)), config)
        };
        Ok(Source { files, used: BTreeSet::new(), config })
    }

    /// The tensor as f32, its shape checked.
    pub fn tensor(&mut self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        let (stored, tensor) = match &mut self.files {
            Files::Gguf(file) => file.tensor(name, &self.config, device)?,
            Files::Folder(folder) => folder.tensor(name, device)?,
        };
        if tensor.dims() != shape {
            bail!("tensor `{name}` has shape {:?}, the configuration says {shape:?}", tensor.dims());
        }
        self.used.extend(stored);
        Ok(tensor)
    }

    /// RMSNorm with the named weight of `width` elements.
    pub fn norm(&mut self, name: &str, width: usize, device: &Device) -> Result<Norm> {
        let weight = self.tensor(name, &[width], device)?;
        let less_one = self.config.norms_less_one && matches!(self.files, Files::Folder(_));
        let weight = if less_one { (weight + 1.0)? } else { weight };
        Ok(Norm::new(weight, self.config.norm_eps)?)
    }

    /// Refuses tensors of the network that were never asked for.
    pub fn nothing_left(&self) -> Result<()> {
        let mut left = match &self.files {
            Files::Gguf(file) => file.names(),
            Files::Folder(folder) => folder.names(),
        };
        left.retain(|name| !self.used.contains(name));
        match left.as_slice() {
            [] => Ok(()),
            [one] => {
                bail!("tensor `{one}` belongs to no part of this decoder, so its numbers would be wrong")
            }
            [first, more @ ..] => bail!(
                "`{first}` and {} more tensors belong to no part of this decoder, so its numbers would be wrong",
                more.len()
            ),
        }
    }
}
