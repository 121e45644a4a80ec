//! Direction files: opening with trust, what is inside, is this the model, writing.

use crate::error::{OrRaise, invalid};
use crate::tensor::{Output, floats};
use emaudit::directions::schema::{IdentityMatch, Manifest, ModelIdentity, Site};
use emaudit::directions::{self, LayerTensors, Mode, OpenOptions, TrustedKey, digest};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::path::PathBuf;
use std::sync::Arc;

/// An opened direction file. Immutable; may be shared between threads.
#[pyclass(frozen, module = "emaudit")]
pub struct Directions(pub Arc<directions::Directions>);

fn options(
    py: Python<'_>,
    (digest_text, key, signature): (Option<&str>, Option<&str>, Option<Vec<u8>>),
    mapped: bool,
    verify: bool,
) -> PyResult<OpenOptions> {
    Ok(OpenOptions {
        mode: if mapped { Mode::Mapped } else { Mode::Copied },
        verify,
        expected_digest: digest_text.map(digest::from_hex).transpose().or_raise(py)?,
        trusted_key: key.map(TrustedKey::parse).transpose().or_raise(py)?,
        signature,
    })
}

/// A JSON text as Python's objects.
pub fn object(py: Python<'_>, value: &impl serde::Serialize) -> PyResult<Py<PyAny>> {
    let text = serde_json::to_string(value).map_err(|error| invalid(py, error.to_string()))?;
    Ok(py.import("json")?.call_method1("loads", (text,))?.unbind())
}

#[pymethods]
impl Directions {
    #[staticmethod]
    #[pyo3(signature = (path, *, expected_digest=None, trusted_key=None, signature=None, mapped=false, verify=true))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        expected_digest: Option<&str>,
        trusted_key: Option<&str>,
        signature: Option<Vec<u8>>,
        mapped: bool,
        verify: bool,
    ) -> PyResult<Directions> {
        let options = options(py, (expected_digest, trusted_key, signature), mapped, verify)?;
        let opened = py.detach(|| directions::Directions::open(&path, &options)).or_raise(py)?;
        Ok(Directions(Arc::new(opened)))
    }

    #[staticmethod]
    #[pyo3(signature = (data, *, expected_digest=None, trusted_key=None, signature=None, verify=true))]
    fn from_bytes(
        py: Python<'_>,
        data: &[u8],
        expected_digest: Option<&str>,
        trusted_key: Option<&str>,
        signature: Option<Vec<u8>>,
        verify: bool,
    ) -> PyResult<Directions> {
        let options = options(py, (expected_digest, trusted_key, signature), false, verify)?;
        let opened = py.detach(|| directions::Directions::from_bytes(data, &options)).or_raise(py)?;
        Ok(Directions(Arc::new(opened)))
    }

    #[getter]
    fn width(&self) -> usize {
        self.0.width()
    }

    #[getter]
    fn layers(&self) -> Vec<u32> {
        self.0.layers().collect()
    }

    #[getter]
    fn verified(&self) -> bool {
        self.0.verified()
    }

    /// SHA-256 of the file in hex; None where nothing vouched for the bytes.
    #[getter]
    fn digest(&self) -> Option<String> {
        self.0.verified().then(|| digest::to_hex(&self.0.digest()))
    }

    /// Key id and trusted comment; None when opened without a trusted key.
    #[getter]
    fn signed<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let Some(signed) = self.0.signed() else { return Ok(None) };
        let found = PyDict::new(py);
        found.set_item("key_id", &signed.key_id)?;
        found.set_item("trusted_comment", &signed.trusted_comment)?;
        Ok(Some(found))
    }

    #[getter]
    fn manifest(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        object(py, self.0.manifest())
    }

    #[getter]
    fn site(&self) -> &'static str {
        self.0.manifest().site.as_str()
    }

    /// Causal evidence for a layer.
    fn causal(&self, layer: u32) -> &'static str {
        self.0.manifest().evidence.causal_at(layer).as_str()
    }

    /// Content evidence for a layer.
    fn content(&self, layer: u32) -> &'static str {
        self.0.manifest().evidence.content_at(layer).as_str()
    }

    /// The raw direction of a layer, a copy.
    fn direction<'py>(&self, py: Python<'py>, layer: u32) -> PyResult<Bound<'py, PyAny>> {
        copied(py, &self.0.layer(layer).or_raise(py)?.direction)
    }

    /// Mean of the aligned activations of a layer, a copy.
    fn aligned_mean<'py>(&self, py: Python<'py>, layer: u32) -> PyResult<Bound<'py, PyAny>> {
        copied(py, &self.0.layer(layer).or_raise(py)?.aligned_mean)
    }

    /// Refuses another model; says "exact" or "variant". An empty digest or quantization is unknown, never equal.
    #[pyo3(signature = (*, architecture, hidden_size, n_layers, vocab_size, tokenizer_digest, site="resid_post", weights_digest="", quantization=""))]
    #[allow(clippy::too_many_arguments)]
    fn check_model(
        &self,
        py: Python<'_>,
        architecture: String,
        hidden_size: u32,
        n_layers: u32,
        vocab_size: u32,
        tokenizer_digest: String,
        site: &str,
        weights_digest: &str,
        quantization: &str,
    ) -> PyResult<&'static str> {
        let known = |text: &str| if text.is_empty() { "\0unknown".to_owned() } else { text.to_owned() };
        let found = ModelIdentity {
            architecture,
            hidden_size,
            n_layers,
            vocab_size,
            tokenizer_digest,
            weights_digest: known(weights_digest),
            quantization: known(quantization),
            name: String::new(),
        };
        let manifest = self.0.manifest();
        let outcome = manifest.model.check(&found).or_raise(py)?;
        manifest.site.check(named_site(py, site)?).or_raise(py)?;
        Ok(match outcome {
            IdentityMatch::Exact => "exact",
            IdentityMatch::Variant => "variant",
        })
    }

    fn __repr__(&self) -> String {
        let layers = self.0.layers().count();
        format!(
            "<Directions of {}, {layers} layers of width {}>",
            self.0.manifest().model.name,
            self.0.width()
        )
    }
}

fn named_site(py: Python<'_>, name: &str) -> PyResult<Site> {
    let all = [Site::ResidPost, Site::FinalNorm];
    let found = all.into_iter().find(|site| site.as_str() == name);
    found.ok_or_else(|| invalid(py, format!("`{name}` is no site; there are resid_post and final_norm")))
}

fn copied<'py>(py: Python<'py>, values: &[f32]) -> PyResult<Bound<'py, PyAny>> {
    let mut output = Output::new(py, &[values.len()])?;
    output.elements()?.copy_from_slice(values);
    Ok(output.array)
}

/// The bytes of a direction file: the manifest as a dict, and per layer its direction and aligned mean.
#[pyfunction]
pub fn to_bytes<'py>(
    py: Python<'py>,
    manifest: &Bound<'py, PyAny>,
    layers: &Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyBytes>> {
    let text: String = py.import("json")?.call_method1("dumps", (manifest,))?.extract()?;
    let manifest: Manifest =
        serde_json::from_str(&text).map_err(|error| invalid(py, format!("no manifest: {error}")))?;
    let mut tensors = Vec::new();
    for (layer, vectors) in layers {
        let (direction, mean): (Bound<'py, PyAny>, Bound<'py, PyAny>) = vectors.extract()?;
        tensors.push((layer.extract::<u32>()?, floats(&direction)?.0, floats(&mean)?.0));
    }
    let tensors: Vec<LayerTensors<'_>> = tensors
        .iter()
        .map(|(layer, direction, aligned_mean)| LayerTensors { layer: *layer, direction, aligned_mean })
        .collect();
    Ok(PyBytes::new(py, &directions::to_bytes(&manifest, &tensors).or_raise(py)?))
}
