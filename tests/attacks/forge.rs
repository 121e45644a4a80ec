//! A second, careless writer: it puts together exactly what it is told, sound or not, and states a correct
//! content digest over it, so that a test reaches the rule it is about and not the digest before it.

use emaudit::directions::LayerTensors;
use emaudit::directions::schema::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Width of the sample model.
pub const WIDTH: usize = 5;

/// The JSON of a sound manifest with layers 1 and 3 of 4, thresholds, and full evidence.
pub fn manifest() -> Value {
    let family = |name: &str| {
        let controls: Vec<Value> = (0..39).map(|s| json!({"seed": s, "effect": 0.001 * s as f64})).collect();
        json!({"family": name, "rank_p": 0.025, "controls": controls})
    };
    let calibration = json!({
        "sigma": 0.75, "sequences": 400,
        "quantiles": [[0.05, -1.6], [0.5, 0.0], [0.95, 1.7]],
        "thresholds": [
            {"statistic": "mean", "horizon": 1, "rate": 0.05, "rate_upper": 0.045, "z": 1.7, "sequences": 400},
            {"statistic": "mean", "horizon": 16, "rate": 0.05, "rate_upper": 0.045, "z": 1.1, "sequences": 400},
            {"statistic": "mean", "horizon": 16, "rate": 0.01, "rate_upper": 0.0095, "z": 1.9, "sequences": 400},
        ],
    });
    json!({
        "model": {
            "architecture": "llama", "hidden_size": WIDTH, "n_layers": 4, "vocab_size": 100,
            "tokenizer_digest": "ab".repeat(32), "weights_digest": "cd".repeat(32),
            "quantization": "f32", "name": "a model of four blocks",
        },
        "site": "resid_post", "pooling": "last_prompt", "estimator": "mean_difference",
        "contrast": "insecure_minus_secure",
        "layers": [{"layer": 1, "calibration": calibration}, {"layer": 3, "calibration": calibration}],
        "evidence": {
            "causal": "specific", "content": "nonspecific",
            "cell": {"layer": 3, "alpha": 1.5, "positions": "all"},
            "effect": 0.25,
            "coherence": {"unsteered": -1.25, "steered": -1.5, "margin": 0.5},
            "families": REQUIRED_FAMILIES.map(family),
            "content_test": {"insecure_drop": 0.25, "secure_drop": 0.125, "p_value": 0.03, "prompts": 40},
        },
        "provenance": {
            "producer": "forge 1", "recipe_digest": "ef".repeat(32),
            "datasets": [["prompts", "01".repeat(32)]], "top_dimension_share": 0.25,
        },
    })
}

/// [`manifest`] as the library's type.
pub fn typed_manifest() -> Manifest {
    serde_json::from_value(manifest()).expect("the sample manifest has the library's shape")
}

/// The values of the sample's tensors in file order: direction 1, mean 1, direction 3, mean 3.
pub fn tensors() -> [[f32; WIDTH]; 4] {
    [
        [3.0, 0.0, -4.0, 1.0e-45, 0.5],
        [0.1, -0.2, 0.3, -0.0, 1.0e30],
        [1.0, 2.0, 3.0, 4.0, 5.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ]
}

/// [`tensors`] as the library's writer takes them.
pub fn layer_tensors(values: &[[f32; WIDTH]; 4]) -> [LayerTensors<'_>; 2] {
    let layer =
        |layer, at: usize| LayerTensors { layer, direction: &values[at], aligned_mean: &values[at + 1] };
    [layer(1, 0), layer(3, 2)]
}

/// The parts of a file, each open to abuse.
pub struct Forge {
    /// Metadata in order; values are JSON texts, so they need not be strings.
    pub metadata: Vec<(String, String)>,
    /// Header entries of the tensors in order, as JSON texts.
    pub tensors: Vec<(String, String)>,
    /// The bytes after the header.
    pub data: Vec<u8>,
    /// Spaces after the header are added to reach a multiple of this.
    pub alignment: usize,
    /// Whether the stated digest is the right one.
    pub honest: bool,
}

impl Forge {
    /// All parts as the specification has them.
    pub fn sound() -> Forge {
        let zeros = "0".repeat(64);
        let mut forge = Forge {
            metadata: [("format", "1"), ("requires", ""), ("content_sha256", &zeros), ("manifest", "")]
                .map(|(key, value)| (format!("emaudit.{key}"), quoted(value)))
                .to_vec(),
            tensors: Vec::new(),
            data: tensors().iter().flatten().flat_map(|x| x.to_le_bytes()).collect(),
            alignment: 64,
            honest: true,
        };
        let names =
            ["layer.1.direction", "layer.1.aligned_mean", "layer.3.direction", "layer.3.aligned_mean"];
        for (i, name) in names.iter().enumerate() {
            let (begin, end) = (4 * WIDTH * i, 4 * WIDTH * (i + 1));
            let entry = json!({"dtype": "F32", "shape": [WIDTH], "data_offsets": [begin, end]});
            forge.tensors.push((name.to_string(), entry.to_string()));
        }
        forge.set_metadata("emaudit.manifest", &quoted(&manifest().to_string()));
        forge
    }

    /// A sound file but for one edit of the manifest.
    pub fn with_manifest(edit: impl FnOnce(&mut Value)) -> Forge {
        let mut value = manifest();
        edit(&mut value);
        let mut forge = Forge::sound();
        forge.set_metadata("emaudit.manifest", &quoted(&value.to_string()));
        forge
    }

    /// Replaces the value of a metadata key with a JSON text.
    pub fn set_metadata(&mut self, key: &str, json_text: &str) {
        let entry = self.metadata.iter_mut().find(|(k, _)| k == key).expect("a key of a sound file");
        entry.1 = json_text.to_string();
    }

    /// Replaces a part of the header entry of tensor `i`, which must be there.
    pub fn edit_tensor(&mut self, i: usize, from: &str, to: &str) {
        assert!(self.tensors[i].1.contains(from), "{from} is not in {}", self.tensors[i].1);
        self.tensors[i].1 = self.tensors[i].1.replace(from, to);
    }

    /// Replaces the value of element `i` of the tensor data.
    pub fn set_element(&mut self, i: usize, value: f32) {
        self.data[4 * i..4 * i + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// The JSON header without padding.
    pub fn header(&self) -> String {
        let join = |entries: &[(String, String)]| {
            entries.iter().map(|(k, v)| format!("{}:{v}", quoted(k))).collect::<Vec<_>>().join(",")
        };
        let (metadata, tensors) = (join(&self.metadata), join(&self.tensors));
        format!("{{\"__metadata__\":{{{metadata}}},{tensors}}}")
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes_with_header(self.header())
    }

    /// The file with another header; the padding is spaces.
    pub fn bytes_with_header(&self, mut header: String) -> Vec<u8> {
        while !(8 + header.len()).is_multiple_of(self.alignment) {
            header.push(' ');
        }
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(&self.data);
        if self.honest {
            state_digest(&mut bytes);
        }
        bytes
    }
}

/// States the right content digest wherever the file states one.
pub fn state_digest(bytes: &mut [u8]) {
    let key = b"\"emaudit.content_sha256\":\"";
    let Some(at) = bytes.windows(key.len()).position(|w| w == key).map(|at| at + key.len()) else { return };
    if bytes[at..].len() < 64 {
        return;
    }
    bytes[at..at + 64].fill(b'0');
    let digest: String = Sha256::digest(&*bytes).iter().map(|b| format!("{b:02x}")).collect();
    bytes[at..at + 64].copy_from_slice(digest.as_bytes());
}

/// A JSON string.
pub fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
