//! A model behind ONNX Runtime as a source of residual rows (feature `onnx`).
//!
//! The runtime is a shared library found when it is needed: the file that `ORT_DYLIB_PATH` names, or `libonnxruntime.so` where
//! the system looks. The model must have the rows as an output of its graph: `bindings/onnxruntime/insert.py expose` adds it.
//!
//! ```no_run
//! use emaudit::directions::{Directions, OpenOptions};
//! use emaudit::onnx::Model;
//! use emaudit::{Probe, ScoreUnit};
//!
//! let directions = Directions::open("directions.safetensors", &OpenOptions::default())?;
//! let probe = Probe::new(directions.into(), 29)?;
//! let mut model = Model::open("exposed.onnx", "emaudit.resid_post.29")?;
//! let mut score = [0.0];
//! model.last_row(&[1, 4093, 198], |row| probe.score(row, ScoreUnit::AlignedSd, &mut score, None))?;
//! # Ok::<(), emaudit::Error>(())
//! ```

use crate::activations::{Element, Rows};
use crate::error::{Error, Result};
use half::{bf16, f16};
use ort::environment::Environment;
use ort::session::{OutputSelector, RunOptions, Session, SessionInputValue};
use ort::value::{DynValue, Outlet, PrimitiveTensorElementType, Tensor, TensorElementType, ValueType};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A model with its residual rows as one of its outputs. `Send`; belongs to one thread at a time.
#[derive(Debug)]
pub struct Model {
    session: Session,
    path: PathBuf,
    output: String,
    cache: CacheSize,
}

/// What `genai_config.json` beside the model says of its cache; the builder leaves such sizes out of the graph.
#[derive(Debug, Default)]
struct CacheSize {
    heads: Option<i64>,
    head_size: Option<i64>,
}

impl CacheSize {
    /// Nothing where there is no such file.
    fn beside(model: &Path) -> Result<CacheSize> {
        let path = model.with_file_name("genai_config.json");
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(CacheSize::default()),
            text => text.map_err(|source| Error::Io { action: "read", path: path.clone(), source })?,
        };
        let config: serde_json::Value = serde_json::from_str(&text)
            .map_err(|error| Error::InvalidArgument(format!("{}: {error}", path.display())))?;
        let number = |name: &str| config["model"]["decoder"][name].as_i64().filter(|size| *size > 0);
        Ok(CacheSize { heads: number("num_key_value_heads"), head_size: number("head_size") })
    }
}

/// The runtime, loaded once per process. A library that is missing or too old is the error that it was the first time.
fn runtime() -> Result<&'static Environment> {
    static RUNTIME: OnceLock<std::result::Result<Environment, String>> = OnceLock::new();
    let name = std::env::var_os("ORT_DYLIB_PATH").filter(|name| !name.is_empty());
    let default = format!("{}onnxruntime{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let path = PathBuf::from(name.unwrap_or_else(|| default.into()));
    let load = || {
        let builder = ort::init_from(&path).map_err(|error| error.to_string())?;
        builder.build().map_err(|error| error.to_string())
    };
    RUNTIME.get_or_init(load).as_ref().map_err(|reason| {
        let needed = ort::MINOR_VERSION;
        let mend = format!(
            "{reason}; install ONNX Runtime 1.{needed} or newer and let ORT_DYLIB_PATH name its library"
        );
        Error::Io { action: "load", path, source: std::io::Error::other(mend) }
    })
}

impl Model {
    /// Opens a model; `output` is the name of the output that holds the rows, `[batch, tokens, width]` in f32, f16 or bf16.
    ///
    /// Errors: [`Error::Io`] where the runtime or the model cannot be loaded; [`Error::InvalidArgument`] for a model without that
    /// output (it says which there are), or with inputs that no prompt can fill.
    pub fn open(path: impl AsRef<Path>, output: &str) -> Result<Model> {
        let path = path.as_ref().to_owned();
        let failed = |error: ort::Error| failure("open", &path, &error);
        let environment = runtime()?;
        let mut builder = Session::builder(environment).map_err(failed)?;
        let session = builder.commit_from_file(&path).map_err(failed)?;
        let cache = CacheSize::beside(&path)?;
        let model = Model { session, path, output: output.to_owned(), cache };
        let names: Vec<&str> = model.session.outputs().iter().map(|outlet| outlet.name()).collect();
        if !names.contains(&output) {
            let shown: Vec<&str> = names.into_iter().filter(|name| !name.starts_with("present")).collect();
            return Err(model.refuse(format_args!(
                "it has no output `{output}`, only {shown:?}; bindings/onnxruntime/insert.py expose adds the rows"
            )));
        }
        model.inputs(&[0])?;
        Ok(model)
    }

    /// Runs one prompt and hands over the row of its last token, `1 x width`.
    ///
    /// Errors: [`Error::InvalidArgument`] without a token or for an output that holds no such rows; [`Error::Io`] where the run
    /// fails; those of `take`.
    pub fn last_row<R>(&mut self, ids: &[u32], take: impl FnOnce(&Rows<'_>) -> Result<R>) -> Result<R> {
        if ids.is_empty() {
            return Err(Error::InvalidArgument("a prompt without a token has no last one".into()));
        }
        let inputs = self.inputs(ids)?;
        let (path, output) = (self.path.clone(), self.output.clone());
        let failed = |error: ort::Error| failure("run", &path, &error);
        let options = RunOptions::new().map_err(failed)?;
        let options = options.with_outputs(OutputSelector::no_default().with(output.as_str()));
        let outputs = self.session.run_with_options(inputs, &options).map_err(failed)?;
        let value = &outputs[output.as_str()];
        match value.dtype().tensor_type() {
            Some(TensorElementType::Float16) => last::<f16, R>(value, ids.len(), &path, take),
            Some(TensorElementType::Bfloat16) => last::<bf16, R>(value, ids.len(), &path, take),
            _ => last::<f32, R>(value, ids.len(), &path, take),
        }
    }

    /// Rows of the model's vocabulary, where its `logits` state them.
    pub fn vocab_size(&self) -> Option<u32> {
        let logits = self.session.outputs().iter().find(|outlet| outlet.name() == "logits")?;
        let last = *logits.dtype().tensor_shape()?.last()?;
        u32::try_from(last).ok().filter(|size| *size > 0)
    }

    /// Decoder blocks, where the model has a cache for each.
    pub fn n_layers(&self) -> Option<u32> {
        let caches = self.session.inputs().iter().filter(|outlet| is_cache(outlet.name()));
        let count = caches.filter(|outlet| outlet.name().ends_with("key")).count();
        u32::try_from(count).ok().filter(|count| *count > 0)
    }

    /// What a prompt on its own fills the inputs with: its ids, a mask of ones, positions from 0, an empty cache.
    fn inputs(&self, ids: &[u32]) -> Result<Vec<(String, SessionInputValue<'static>)>> {
        let count = ids.len() as i64;
        let filled = |outlet: &Outlet| {
            let numbers = |numbers: Vec<i64>| Ok(Tensor::from_array(([1, count], numbers))?.into_dyn());
            let value: ort::Result<DynValue> = match outlet.name() {
                "input_ids" => numbers(ids.iter().map(|id| i64::from(*id)).collect()),
                "attention_mask" => numbers(vec![1; ids.len()]),
                "position_ids" => numbers((0..count).collect()),
                name if is_cache(name) => empty_cache(outlet.dtype(), self.cache_shape(outlet)?),
                name => {
                    return Err(self.refuse(format_args!(
                        "its input `{name}` is not one that a prompt fills (input_ids, attention_mask, position_ids, past_key_values.*)"
                    )));
                }
            };
            let value = value.map_err(|error| failure("run", &self.path, &error))?;
            Ok((outlet.name().to_owned(), SessionInputValue::from(value)))
        };
        self.session.inputs().iter().map(filled).collect()
    }

    /// `[1, heads, 0, size]`.
    fn cache_shape(&self, outlet: &Outlet) -> Result<[i64; 4]> {
        let stated = outlet.dtype().tensor_shape().map(|shape| shape.to_vec()).unwrap_or_default();
        let [_, heads, _, size] = stated[..] else {
            let name = outlet.name();
            return Err(
                self.refuse(format_args!("its cache `{name}` has the shape {stated:?}, not four dimensions"))
            );
        };
        let known = |stated: i64, config: Option<i64>, name: &str| {
            if stated > 0 {
                return Ok(stated);
            }
            config.ok_or_else(|| self.refuse(format_args!(
                "the graph leaves the size of its cache open, and no genai_config.json beside it states {name}; put the builder's file there"
            )))
        };
        let heads = known(heads, self.cache.heads, "num_key_value_heads")?;
        Ok([1, heads, 0, known(size, self.cache.head_size, "head_size")?])
    }

    fn refuse(&self, reason: impl std::fmt::Display) -> Error {
        Error::InvalidArgument(format!("{}: {reason}", self.path.display()))
    }
}

fn is_cache(name: &str) -> bool {
    name.starts_with("past_key_values.")
}

/// A cache without a token in it.
fn empty_cache(of: &ValueType, shape: [i64; 4]) -> ort::Result<DynValue> {
    Ok(match of.tensor_type() {
        Some(TensorElementType::Float16) => Tensor::from_array((shape, Vec::<f16>::new()))?.into_dyn(),
        Some(TensorElementType::Bfloat16) => Tensor::from_array((shape, Vec::<bf16>::new()))?.into_dyn(),
        _ => Tensor::from_array((shape, Vec::<f32>::new()))?.into_dyn(),
    })
}

fn last<T: Element + PrimitiveTensorElementType, R>(
    value: &DynValue,
    tokens: usize,
    path: &Path,
    take: impl FnOnce(&Rows<'_>) -> Result<R>,
) -> Result<R> {
    let (shape, values) = value.try_extract_tensor::<T>().map_err(|error| failure("run", path, &error))?;
    match **shape {
        [1, rows, width] if rows == tokens as i64 && width > 0 => {
            let width = width as usize;
            take(&Rows::new(&values[(tokens - 1) * width..], 1, width, width)?)
        }
        ref other => {
            let sentence =
                format!("{}: the output has the shape {other:?}, not [1, {tokens}, width]", path.display());
            Err(Error::InvalidArgument(sentence))
        }
    }
}

fn failure(action: &'static str, path: &Path, error: &ort::Error) -> Error {
    Error::Io { action, path: path.to_owned(), source: std::io::Error::other(error.to_string()) }
}
