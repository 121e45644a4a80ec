//! Vectors of other tools to a direction file: untested, uncalibrated, and saying so.

use super::gguf::{self, Gguf};
use super::{Layers, answer, chosen, identity, spare_inputs};
use crate::arrays::Array;
use crate::diff::norm;
use crate::output::{Answer, figure, finish};
use clap::{Args, ValueEnum};
use emaudit::Result;
use emaudit::directions::schema::{
    Contrast, Estimator, Evidence, LayerManifest, Manifest, ModelIdentity, Pooling, Provenance, Site,
};
use emaudit::directions::{FILE_CAP, LayerTensors, digest, write};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

/// Make a direction file of a GGUF control vector, a .npy array or a safetensors tensor.
///
/// The vectors are kept to the last bit. They carry no evidence and no calibration: scores can be read in activation
/// units only (emaudit score --raw), nothing can be flagged, and steering needs the explicit flag.
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Import {
    /// GGUF control vector (tensors direction.N), .npy or safetensors: [width], or [layers, width].
    source: PathBuf,
    /// The direction file to write. A regular file that is there is replaced in one step, unless it is read here.
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// The tool that made the vectors, e.g. repeng or cvector-generator.
    #[arg(long, value_name = "NAME")]
    producer: String,
    /// Where in the network the vectors were taken.
    #[arg(long, value_enum)]
    site: SiteName,
    /// Whose vectors: the model as GGUF, a direction file of it, or JSON with the keys of `model` in a manifest.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Layers of the rows of an array, in order (0-based blocks), such as 12 or 0-29; of a GGUF file, those to take.
    #[arg(long, value_name = "LIST")]
    layers: Option<Layers>,
    /// The tensor, where a safetensors file has several.
    #[arg(long, value_name = "NAME")]
    tensor: Option<String>,
    /// What direction.N means; known for repeng, cvector-generator and emaudit.
    #[arg(long, value_enum)]
    numbering: Option<Numbering>,
    /// The vectors point to what is wanted (honest, aligned): turn them round, since a direction points to misaligned.
    #[arg(long)]
    negate: bool,
    /// Tokens the activations were pooled over.
    #[arg(long, value_enum, default_value_t = PoolingName::Unstated)]
    pooling: PoolingName,
    /// How the vectors were computed.
    #[arg(long, value_enum, default_value_t = EstimatorName::Unstated)]
    estimator: EstimatorName,
    /// Print one JSON object on standard output, good or bad.
    #[arg(long)]
    json: bool,
}

const HELP: &str = "\
Examples:
  emaudit convert import happy.gguf --producer repeng --site resid-post --model model.gguf --to happy.safetensors
      a control vector as repeng writes it: direction.N belongs to block N
  emaudit convert import cv.gguf --producer cvector-generator --site resid-post --model model.gguf --to cv.safetensors
      llama.cpp's generator writes the output of block N as direction.N+1: put back where it was taken
  emaudit convert import probe.npy --producer 'my notebook' --site resid-post --layers 12 --model model.gguf --to p.safetensors
      one vector, taken after block 12 (transformers: hidden_states[13])
  emaudit score p.safetensors --layer 12 --raw rows.npy

Layers are 0-based blocks, and site resid-post is the residual stream after one, before any norm. The last entry of
transformers' hidden_states is after the final norm: that is site final-norm, layer n_layers - 1, and nothing else.

Refused: control vectors at site final-norm, tensors in a GGUF file that are not direction.N (projections, low-rank
edits), widths and layers that the model does not have, vectors that are zero or not finite.

Exit status: 0 written, 1 refused or not readable, 2 the command line was not understood";

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum SiteName {
    /// After block L, before any norm.
    ResidPost,
    /// After the final norm.
    FinalNorm,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Numbering {
    /// direction.N was taken after block N.
    Block,
    /// direction.N was taken after block N - 1.
    NextBlock,
}

#[derive(Clone, Copy, ValueEnum)]
enum PoolingName {
    Unstated,
    LastPrompt,
    MeanResponse,
    All,
}

#[derive(Clone, Copy, ValueEnum)]
enum EstimatorName {
    Unstated,
    MeanDifference,
    MaskedMeanDifference,
    Whitened,
    Logistic,
}

/// Vectors by layer.
type Vectors = BTreeMap<u32, Vec<f32>>;

impl Import {
    pub fn run(&self) -> ExitCode {
        finish(self.answer(), self.json, 1)
    }

    fn answer(&self) -> Result<Answer> {
        spare_inputs(&self.to, &[&self.source, &self.model])?;
        let model = identity::of(&self.model)?;
        let mut notes = Vec::new();
        let mut vectors = if identity::first(&self.source, 4)? == gguf::MAGIC {
            self.control_vectors(&model, &mut notes)?
        } else {
            self.array_rows(&model)?
        };
        if self.negate {
            vectors.values_mut().flatten().for_each(|x| *x = -*x);
        }
        let manifest = self.manifest(&model, &vectors)?;
        let mean = vec![0.0; model.hidden_size as usize];
        let tensors: Vec<LayerTensors<'_>> = vectors
            .iter()
            .map(|(layer, v)| LayerTensors { layer: *layer, direction: v, aligned_mean: &mean })
            .collect();
        let digest = digest::to_hex(&write(&self.to, &manifest, &tensors)?);
        Ok(self.report(&model, &vectors, &digest, &notes))
    }

    fn control_vectors(&self, model: &ModelIdentity, notes: &mut Vec<String>) -> Result<Vectors> {
        let mut file = Gguf::open(&self.source)?;
        match file.text("general.architecture") {
            Some("controlvector") => {}
            Some(other) => {
                let sentence =
                    format!("this is a {other:?} file, not a control vector; a model goes to --model");
                return Err(file.refuse(sentence));
            }
            None => return Err(file.refuse("it has no general.architecture, so it is not a control vector")),
        }
        if let Some(tensor) = &self.tensor {
            return Err(
                file.refuse(format_args!("--tensor {tensor} is for safetensors; choose with --layers"))
            );
        }
        if self.site == SiteName::FinalNorm {
            return Err(
                file.refuse("a control vector is added to the output of a block: its site is resid-post")
            );
        }
        match file.text("controlvector.model_hint") {
            Some(hint) if hint != model.architecture => notes.push(format!(
                "the file hints at the architecture {hint:?}, the model has {:?}",
                model.architecture
            )),
            _ => {}
        }
        let numbering = self.numbering(&file)?;
        let mut all = BTreeMap::new();
        for at in 0..file.tensors.len() {
            let name = file.tensors[at].name.clone();
            let layer = layer_of(&name, numbering).map_err(|sentence| file.refuse(sentence))?;
            if layer >= model.n_layers {
                let sentence =
                    format!("{name:?} would be block {layer}, the model has {} blocks", model.n_layers);
                return Err(file.refuse(sentence));
            }
            if all.insert(layer, at).is_some() {
                return Err(file.refuse(format_args!("{name:?} is there twice")));
            }
        }
        file.check_vectors(model.hidden_size)?;
        let available: Vec<u32> = all.keys().copied().collect();
        let layers = chosen(self.layers.as_ref(), &available)?;
        check_size(layers.len(), model).map_err(|sentence| file.refuse(sentence))?;
        let mut vectors = Vectors::new();
        for layer in layers {
            vectors.insert(layer, file.vector(all[&layer])?);
        }
        if vectors.is_empty() {
            return Err(file.refuse("it has no tensors direction.N"));
        }
        Ok(vectors)
    }

    /// Producers number differently; guessing would shift every layer by one.
    fn numbering(&self, file: &Gguf) -> Result<Numbering> {
        let known = match self.producer.as_str() {
            "repeng" | "emaudit" => Some(Numbering::Block),
            "cvector-generator" => Some(Numbering::NextBlock),
            _ => None,
        };
        match (known, self.numbering) {
            (Some(known), Some(given)) if known != given => Err(file.refuse(format_args!(
                "{} numbers by {}; name another producer if this file does not",
                self.producer,
                word(known)
            ))),
            (Some(numbering), _) | (None, Some(numbering)) => Ok(numbering),
            (None, None) => Err(file.refuse(format_args!(
                "how {:?} numbers its tensors is not known: give --numbering block if direction.N was taken after block N \
                 (0-based), --numbering next-block if it was taken after block N - 1",
                self.producer
            ))),
        }
    }

    fn array_rows(&self, model: &ModelIdentity) -> Result<Vectors> {
        let mut array = Array::open(&self.source, self.tensor.as_deref())?;
        if self.numbering.is_some() {
            return Err(array.refuse("--numbering is for control vectors; the rows of an array are --layers"));
        }
        let Some(Layers(layers)) = &self.layers else {
            return Err(array.refuse("say which layers its rows are, with --layers (0-based blocks)"));
        };
        let (rows, width) = match *array.shape() {
            [width] => (1, width),
            [rows, width] => (rows, width),
            ref other => {
                let sentence = format_args!("its shape is {other:?}, give [width] or [layers, width]");
                return Err(array.refuse(sentence));
            }
        };
        if rows != layers.len() {
            return Err(array.refuse(format_args!("it has {rows} row(s), --layers names {}", layers.len())));
        }
        let expected = model.hidden_size as usize;
        if width != expected {
            return Err(array.refuse(format_args!(
                "its vectors have {width} elements, the residual stream of the model {expected}"
            )));
        }
        check_size(rows, model).map_err(|sentence| array.refuse(sentence))?;
        layers.iter().map(|layer| Ok((*layer, array.read_f32(width)?))).collect()
    }

    fn manifest(&self, model: &ModelIdentity, vectors: &Vectors) -> Result<Manifest> {
        let source = identity::sha256(&self.source)?;
        let name = self.source.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Manifest {
            model: model.clone(),
            site: match self.site {
                SiteName::ResidPost => Site::ResidPost,
                SiteName::FinalNorm => Site::FinalNorm,
            },
            pooling: self.pooling.into(),
            estimator: self.estimator.into(),
            contrast: Contrast::Unstated,
            layers: vectors.keys().map(|l| LayerManifest { layer: *l, calibration: None }).collect(),
            evidence: Evidence::untested(),
            provenance: Provenance {
                producer: format!("{}, imported by emaudit {}", self.producer, env!("CARGO_PKG_VERSION")),
                recipe_digest: self.recipe_digest(&source),
                datasets: vec![(name, source)],
                top_dimension_share: None,
            },
        })
    }

    /// The recipe of an import is the import: SHA-256 of what was asked for, as JSON.
    fn recipe_digest(&self, source: &str) -> String {
        let recipe = json!({
            "source": source,
            "producer": self.producer,
            "numbering": self.numbering.map(word),
            "layers": self.layers.as_ref().map(|l| &l.0),
            "tensor": self.tensor,
            "negate": self.negate,
        });
        digest::to_hex(&Sha256::digest(recipe.to_string()).into())
    }

    fn report(&self, model: &ModelIdentity, vectors: &Vectors, digest: &str, notes: &[String]) -> Answer {
        let layers: Vec<u32> = vectors.keys().copied().collect();
        let norms: Vec<Value> =
            vectors.iter().map(|(l, v)| json!({"layer": l, "direction_norm": norm(v)})).collect();
        let mut page = format!(
            "wrote {}: layers {layers:?} for {}\n  digest    {digest}\n  evidence  untested; steering needs the explicit \
             flag\n  scores    not calibrated: emaudit score --raw, no thresholds\n",
            self.to.display(),
            model.name
        );
        for (layer, vector) in vectors {
            page += &format!("  layer {layer:>3}  |v| {}\n", figure(norm(vector)));
        }
        answer(page, json!({"to": self.to.to_string_lossy(), "digest": digest, "layers": norms}), notes)
    }
}

/// Refuses, before they are read, more vectors than a direction file holds with their means.
fn check_size(layers: usize, model: &ModelIdentity) -> Result<(), String> {
    let bytes = 8 * layers as u64 * u64::from(model.hidden_size);
    if bytes <= FILE_CAP {
        return Ok(());
    }
    Err(format!(
        "{layers} vectors of {} elements make {bytes} bytes of a direction file, which may have {FILE_CAP}; take fewer \
         with --layers",
        model.hidden_size
    ))
}

/// The block a tensor was taken after. Only what is written `direction.N`, without sign or leading zeros, is a name.
fn layer_of(name: &str, numbering: Numbering) -> Result<u32, String> {
    let number = name.strip_prefix("direction.").and_then(|n| n.parse::<u32>().ok());
    let number = number.filter(|n| format!("direction.{n}") == name).ok_or_else(|| {
        format!(
            "tensor {name:?} is not direction.N: this file does more than add vectors (a projection, a low-rank edit), \
             and a direction file would hide that"
        )
    })?;
    match number {
        0 => Err(
            "direction.0 does not exist: control vectors begin with 1, so who wrote this numbers otherwise"
                .into(),
        ),
        n if numbering == Numbering::Block => Ok(n),
        n => Ok(n - 1),
    }
}

fn word(numbering: Numbering) -> &'static str {
    match numbering {
        Numbering::Block => "block",
        Numbering::NextBlock => "next-block",
    }
}

impl From<PoolingName> for Pooling {
    fn from(name: PoolingName) -> Pooling {
        match name {
            PoolingName::Unstated => Pooling::Unstated,
            PoolingName::LastPrompt => Pooling::LastPrompt,
            PoolingName::MeanResponse => Pooling::MeanResponse,
            PoolingName::All => Pooling::All,
        }
    }
}

impl From<EstimatorName> for Estimator {
    fn from(name: EstimatorName) -> Estimator {
        match name {
            EstimatorName::Unstated => Estimator::Unstated,
            EstimatorName::MeanDifference => Estimator::MeanDifference,
            EstimatorName::MaskedMeanDifference => Estimator::MaskedMeanDifference,
            EstimatorName::Whitened => Estimator::Whitened,
            EstimatorName::Logistic => Estimator::Logistic,
        }
    }
}
