//! Hostile files, one per rejection: built here instead of stored, so that a reader sees what is wrong with
//! each. Every one breaks exactly one rule of FORMAT.md and is otherwise sound, its digest included.

pub mod forge;

use emaudit::Status;
use forge::{Forge, WIDTH, manifest, quoted};
use serde_json::{Value, json};

/// A file and the refusal it must meet.
pub struct Attack {
    /// The rule it breaks.
    pub name: &'static str,
    /// The file.
    pub bytes: Vec<u8>,
    /// The status of the refusal.
    pub status: Status,
    /// A part of the sentence.
    pub sentence: &'static str,
}

/// Every attack.
pub fn all() -> Vec<Attack> {
    [strangers(), structure(), metadata(), tensors(), values(), identity(), calibration(), evidence()]
        .into_iter()
        .flatten()
        .collect()
}

fn raw(name: &'static str, bytes: Vec<u8>, status: Status, sentence: &'static str) -> Attack {
    Attack { name, bytes, status, sentence }
}

fn forged(
    name: &'static str,
    status: Status,
    sentence: &'static str,
    edit: impl FnOnce(&mut Forge),
) -> Attack {
    let mut forge = Forge::sound();
    edit(&mut forge);
    raw(name, forge.bytes(), status, sentence)
}

/// A sound file with another value at a JSON pointer of its manifest.
fn stated(name: &'static str, pointer: &str, value: Value, sentence: &'static str) -> Attack {
    let forge = Forge::with_manifest(|m| *m.pointer_mut(pointer).expect("a place in the manifest") = value);
    raw(name, forge.bytes(), Status::Schema, sentence)
}

/// Files of another kind.
fn strangers() -> Vec<Attack> {
    use Status::*;
    let mut weights = Forge::sound();
    weights.metadata = vec![("format".into(), quoted("pt"))];
    let mut gguf = b"GGUF\x03\0\0\0".to_vec();
    gguf.extend([0; 100]);
    vec![
        raw("an empty file", vec![], NotADirectionFile, "it is empty"),
        raw("a text", b"the quick brown fox".to_vec(), NotADirectionFile, "no safetensors header"),
        raw("a short text", b"the quick".to_vec(), NotADirectionFile, "no safetensors header"),
        raw("another container", gguf, NotADirectionFile, "no safetensors header"),
        raw("a model's weights", weights.bytes(), NotADirectionFile, "without the metadata `emaudit.format`"),
    ]
}

/// The length field and the JSON of the header.
fn structure() -> Vec<Attack> {
    use Status::*;
    let sound = Forge::sound();
    let header = sound.header();
    let mut promise = sound.bytes();
    promise[..8].copy_from_slice(&(1u64 << 20).to_le_bytes());
    let mut huge = sound.bytes();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut not_utf8 = sound.bytes();
    not_utf8[20] = 0xff;
    // A value of the metadata that nobody reads, with these bytes in it.
    let beside = |bytes: &[u8]| {
        let mut forge = Forge::sound();
        forge.metadata.push(("somebody.else".into(), quoted("<here>")));
        let mut file = forge.bytes();
        let at = file.windows(6).position(|w| w == b"<here>").expect("the value just written");
        file[at..at + bytes.len()].copy_from_slice(bytes);
        forge::state_digest(&mut file);
        file
    };
    let with = |text: String| sound.bytes_with_header(text);
    let twice =
        header.replace("\"__metadata__\":", "\"__metadata__\":{\"emaudit.format\":\"1\"},\"__metadata__\":");
    let version_twice =
        header.replace("\"emaudit.format\":\"1\"", "\"emaudit.format\":\"1\",\"emaudit.format\":\"1\"");
    let tensor_twice = header.replace("\"layer.3.direction\"", "\"layer.1.direction\"");
    let escaped = header.replace("\"layer.3.direction\"", "\"layer.\\u0031.direction\"");
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(5000), "]".repeat(5000));
    let null = "{\"__metadata__\":null}".to_string();
    let in_tensor = header.replacen("\"dtype\":\"F32\"", "\"dtype\":\"F32\",\"dtype\":\"F32\"", 1);
    vec![
        raw(
            "cut in the length field",
            sound.bytes()[..5].to_vec(),
            Truncated,
            "8 bytes are needed, 5 are there",
        ),
        raw("cut in the header", sound.bytes()[..300].to_vec(), Truncated, "300 are there"),
        raw("a header longer than the file", promise, Truncated, "1048584 bytes are needed"),
        raw("a header of 2^64 - 1 bytes", huge, Malformed, "the most allowed is 16777216"),
        raw("a header that is not UTF-8", not_utf8, Malformed, "not UTF-8 at its byte 12"),
        raw("a surrogate in UTF-8", beside(b"\xed\xa0\x80"), Malformed, "not UTF-8 at its byte"),
        raw("a NUL in two bytes", beside(b"\xc0\x80"), Malformed, "not UTF-8 at its byte"),
        raw("a character beyond Unicode", beside(b"\xf4\x90\x80\x80"), Malformed, "not UTF-8 at its byte"),
        raw("a character cut short", beside(b"\xe2\x82"), Malformed, "not UTF-8 at its byte"),
        raw("half a character", beside(b"\\ud800"), Malformed, "not strict JSON"),
        raw("the other half", beside(b"\\udc00"), Malformed, "not strict JSON"),
        raw("a raw control character", beside(b"\x1f"), Malformed, "control character"),
        raw(
            "white space before the header",
            with(format!(" {header}")),
            NotADirectionFile,
            "no safetensors header",
        ),
        raw("a line feed after the header", with(format!("{header}\n")), Malformed, "only spaces may follow"),
        raw("two headers", with(format!("{header}{{}}")), Malformed, "trailing characters"),
        raw("JSON that ends early", with(header[..header.len() - 1].to_string()), Malformed, "strict JSON"),
        raw("nesting without end", with(deep), Malformed, "deeper than 100 levels"),
        raw("metadata that is null", with(null), Malformed, "invalid type: null"),
        raw("two metadata", with(twice), Malformed, "duplicate key `__metadata__`"),
        raw("two versions", with(version_twice), Malformed, "duplicate key `emaudit.format`"),
        raw("two tensors of one name", with(tensor_twice), Malformed, "duplicate key `layer.1.direction`"),
        raw("the same, hidden by an escape", with(escaped), Malformed, "duplicate key `layer.1.direction`"),
        raw("two dtypes", with(in_tensor), Malformed, "duplicate key `dtype`"),
    ]
}

/// The keys under `__metadata__`.
fn metadata() -> Vec<Attack> {
    use Status::*;
    let without = |key: &'static str| move |f: &mut Forge| f.metadata.retain(|(k, _)| k != key);
    let with = |key: &'static str, json: &str| {
        let json = json.to_string();
        move |f: &mut Forge| f.set_metadata(key, &json)
    };
    let escaped = Forge::sound().header().replace("emaudit.content_sha256", "emaudit.content\\u005fsha256");
    let key_twice = |f: &mut Forge| f.metadata.push(("x\"emaudit.content_sha256".into(), quoted("")));
    let twice_inside = manifest().to_string().replacen("{", "{\"site\":\"resid_post\",", 1);
    let deep = format!("{{\"future\":{}1{},", "[".repeat(100), "]".repeat(100));
    let nested = manifest().to_string().replacen('{', &deep, 1);
    let infinite = manifest().to_string().replacen('{', "{\"future\":[-1e999],", 1);
    let wrong_digest = quoted(&"7".repeat(64));
    let upper = quoted(&"A".repeat(64));
    let lying = |f: &mut Forge| f.honest = false;
    vec![
        forged("version 2", UnsupportedVersion, "format version is \"2\"", with("emaudit.format", "\"2\"")),
        forged("a version number", Malformed, "not a safetensors header", with("emaudit.format", "1")),
        forged("no requirements", Malformed, "no `emaudit.requires`", without("emaudit.requires")),
        forged(
            "a new feature",
            UnsupportedVersion,
            "feature \"f16\"",
            with("emaudit.requires", "\",f16, x\""),
        ),
        forged("a feature of white space", UnsupportedVersion, "feature \"\\\\t\"", {
            with("emaudit.requires", "\"\\t\"")
        }),
        forged("no digest", Malformed, "no `emaudit.content_sha256`", without("emaudit.content_sha256")),
        forged("a short digest", Malformed, "64 lower-case hex", with("emaudit.content_sha256", "\"00\"")),
        forged("a loud digest", Malformed, "64 lower-case hex", |f| {
            f.honest = false;
            f.set_metadata("emaudit.content_sha256", &upper);
        }),
        forged("a digest of zeros", DigestMismatch, "expected 0000", lying),
        forged("another digest", DigestMismatch, "expected 7777", |f| {
            f.honest = false;
            f.set_metadata("emaudit.content_sha256", &wrong_digest);
        }),
        raw("a hidden digest", Forge::sound().bytes_with_header(escaped), Malformed, "exactly once"),
        forged("two places for the digest", Malformed, "exactly once", key_twice),
        forged("no manifest", Malformed, "no `emaudit.manifest`", without("emaudit.manifest")),
        forged("a manifest that is no JSON", Malformed, "begin with `{`", with("emaudit.manifest", "\"x\"")),
        forged("a manifest with a key twice", Malformed, "duplicate key `site`", {
            with("emaudit.manifest", &quoted(&twice_inside))
        }),
        forged("one level too many", Malformed, "deeper than 100 levels", {
            with("emaudit.manifest", &quoted(&nested))
        }),
        forged("a manifest beyond binary64", Malformed, "number out of range", {
            with("emaudit.manifest", &quoted(&infinite))
        }),
        forged("an empty manifest", Schema, "missing field `model`", with("emaudit.manifest", "\"{}\"")),
    ]
}

/// The header entries of the tensors and the bytes they point at.
fn tensors() -> Vec<Attack> {
    use Status::*;
    let rename = |to: &'static str| move |f: &mut Forge| f.tensors[2].0 = to.to_string();
    let edit = |i, from: &'static str, to: &'static str| move |f: &mut Forge| f.edit_tensor(i, from, to);
    let name = "is not `layer.N.direction`";
    vec![
        forged("a foreign tensor", Malformed, name, rename("lm_head.weight")),
        forged("a zero before the layer", Malformed, name, rename("layer.03.direction")),
        forged("a sign before the layer", Malformed, name, rename("layer.+3.direction")),
        forged("a layer beyond u32", Malformed, name, rename("layer.4294967296.direction")),
        forged("half a layer", Malformed, "layer 2 lacks one of its tensors", rename("layer.2.direction")),
        forged("half floats", Malformed, "dtype \"F16\", it must be F32", edit(0, "F32", "F16")),
        forged("a matrix", Malformed, "has 2 dimensions", edit(0, "[5]", "[1,5]")),
        forged("a scalar", Malformed, "has 0 dimensions", edit(0, "[5]", "[]")),
        forged("a shape that is not the extent", Malformed, "of 6 elements has the offsets 0 to 20", {
            edit(0, "[5]", "[6]")
        }),
        forged(
            "a shape that overflows",
            Malformed,
            "elements has the offsets",
            edit(0, "[5]", "[4611686018427387909]"),
        ),
        forged("a length that overflows, backwards", Malformed, "has the offsets 40 to 20", |f| {
            f.edit_tensor(1, "[5]", "[4611686018427387904]");
            f.edit_tensor(1, "[20,40]", "[40,20]");
        }),
        forged("a tensor as a list", Malformed, "invalid type: sequence", |f| {
            f.tensors[0].1 = "[\"F32\",[5],[0,20]]".into();
        }),
        forged("three offsets", Malformed, "not a safetensors header", edit(0, "[0,20]", "[0,20,20]")),
        forged("nothing", Malformed, "of 0 elements", |f| {
            f.edit_tensor(0, "[5]", "[0]");
            f.edit_tensor(0, "[0,20]", "[0,0]");
        }),
        forged(
            "offsets that run backwards",
            Malformed,
            "has the offsets 20 to 0",
            edit(0, "[0,20]", "[20,0]"),
        ),
        forged("a negative offset", Malformed, "not a safetensors header", edit(0, "[0,20]", "[-20,0]")),
        forged("a fractional offset", Malformed, "not a safetensors header", edit(0, "[0,20]", "[0.0,20]")),
        forged("an unknown word", Malformed, "unknown field", edit(0, "{", "{\"scale\":2,")),
        forged("an overlap", Malformed, "overlaps the one before it", edit(1, "[20,40]", "[16,36]")),
        forged("twice the same bytes", Malformed, "overlaps the one before it", edit(1, "[20,40]", "[0,20]")),
        forged("a hole", Malformed, "leaves a hole before it", edit(3, "[60,80]", "[64,84]")),
        forged("a hole at the start", Malformed, "leaves a hole before it", |f| {
            f.edit_tensor(0, "[0,20]", "[4,24]")
        }),
        forged("bytes after the end", Malformed, "1 bytes follow the last tensor", |f| f.data.push(0)),
        forged("cut in the data", Truncated, "bytes are needed", |f| f.data.truncate(79)),
        forged("no data", Truncated, "bytes are needed", |f| f.data.clear()),
        forged("no tensors", Malformed, "follow the last tensor", |f| {
            f.tensors.truncate(1);
            f.edit_tensor(0, "[0,20]", "[0,20]");
        }),
        raw("data out of line", misaligned(), Malformed, "it must start at a multiple of 64"),
    ]
}

/// A sound file but for eight bytes too many of padding: aligned as safetensors asks, not as we do.
fn misaligned() -> Vec<u8> {
    let mut sound = Forge::sound();
    let mut header = sound.header();
    while (8 + header.len()) % 64 != 8 {
        header.push(' ');
    }
    sound.alignment = 1;
    sound.bytes_with_header(header)
}

/// The tensor values and the layers they are for.
fn values() -> Vec<Attack> {
    use Status::Schema;
    let element = |i: usize, value: f32| move |f: &mut Forge| f.set_element(i, value);
    let wider = |f: &mut Forge| {
        *f = Forge::with_manifest(|m| m["model"]["hidden_size"] = json!(6));
    };
    vec![
        forged("a NaN", Schema, "layer 1: element 2 of `direction` is NaN", element(2, f32::NAN)),
        forged(
            "an infinity",
            Schema,
            "layer 1: element 1 of `aligned_mean` is -inf",
            element(6, f32::NEG_INFINITY),
        ),
        forged("a direction to nowhere", Schema, "layer 1: `direction` is zero everywhere", |f| {
            (0..WIDTH).for_each(|i| f.set_element(i, -0.0));
        }),
        forged("another width", Schema, "`direction` has 5 elements, model.hidden_size is 6", wider),
        stated("a layer without tensors", "/layers/0/layer", json!(0), "manifest has the layers [0, 3]"),
        stated("layers out of order", "/layers/0/layer", json!(3), "ascending without repetition"),
        stated("no layers", "/layers", json!([]), "the list of layers is []"),
        stated(
            "a layer above the last",
            "/model/n_layers",
            json!(3),
            "layer is 3, it must be below model.n_layers",
        ),
        stated("two final norms", "/site", json!("final_norm"), "it must be [3] alone"),
    ]
}

/// The model and the origin.
fn identity() -> Vec<Attack> {
    let hex = "64 lower-case hex characters";
    vec![
        stated("no architecture", "/model/architecture", json!(" "), "model.architecture is \" \""),
        stated("a blank beyond ASCII", "/model/name", json!("\u{3000}\u{a0}"), "model.name is"),
        stated("a control beyond ASCII", "/model/name", json!("a\u{85}b"), "model.name is"),
        stated("a model as a list", "/model", json!(["llama", WIDTH, 4, 100]), "invalid type: sequence"),
        stated("a word in an object", "/site", json!({"resid_post": null}), "invalid type: map"),
        stated("a width with a point", "/model/hidden_size", json!(5.0), "invalid type: floating point"),
        stated("a width beyond u32", "/model/hidden_size", json!(1u64 << 32), "invalid value"),
        stated("a vocabulary beyond u32", "/model/vocab_size", json!((1u64 << 32) + 100), "invalid value"),
        stated("a terminal's escape", "/model/name", json!("\u{1b}[2J"), "model.name is \"\\u{1b}[2J\""),
        stated("no width", "/model/hidden_size", json!(0), "model.hidden_size is 0, it must be at least 1"),
        stated("no blocks", "/model/n_layers", json!(0), "model.n_layers is 0"),
        stated("no vocabulary", "/model/vocab_size", json!(0), "model.vocab_size is 0"),
        stated("a width in words", "/model/hidden_size", json!("5"), "invalid type: string"),
        stated("a tokenizer without digest", "/model/tokenizer_digest", json!("?"), hex),
        stated("weights in capitals", "/model/weights_digest", json!("AB".repeat(32)), hex),
        stated("no quantisation", "/model/quantization", json!(""), "model.quantization"),
        stated("an unknown site", "/site", json!("mlp"), "unknown variant `mlp`"),
        stated("an unknown pooling", "/pooling", json!("first"), "unknown variant `first`"),
        stated("no producer", "/provenance/producer", json!(""), "provenance.producer"),
        stated("a recipe without digest", "/provenance/recipe_digest", json!("0"), hex),
        stated(
            "a dataset without name",
            "/provenance/datasets/0/0",
            json!(""),
            "provenance.datasets[0] name",
        ),
        stated("a dataset without digest", "/provenance/datasets/0/1", json!(""), hex),
        stated("a share above one", "/provenance/top_dimension_share", json!(1.5), "between 0 and 1"),
    ]
}

/// The calibration of a layer.
fn calibration() -> Vec<Attack> {
    let at = |name, rest: &str, value, sentence| {
        let pointer = format!("/layers/1/calibration/{rest}");
        stated(name, pointer.trim_end_matches('/'), value, sentence)
    };
    let range = "layer 3: calibration.sigma is";
    vec![
        stated("a calibration in words", "/layers/1/calibration", json!("none"), "invalid type: string"),
        at("no spread", "sigma", json!(0.0), range),
        at("a negative spread", "sigma", json!(-0.75), range),
        at("a spread beyond f32", "sigma", json!(1e300), range),
        at("a spread below f32", "sigma", json!(1e-300), range),
        at("a spread that is null", "sigma", Value::Null, "invalid type: null"),
        at("a spread of one sequence", "sequences", json!(1), "calibration.sequences is 1"),
        at("a certain quantile", "quantiles/2/0", json!(1.0), "quantiles[2] probability is 1.0"),
        at("quantiles that fall", "quantiles/2/1", json!(-0.5), "quantiles[1..=2]"),
        at("a quantile twice", "quantiles/2/0", json!(0.5), "ascending in both"),
        at("a quantile of three", "quantiles/2", json!([0.9, 1.0, 2.0]), "invalid length 3"),
        at("a calibration as a list", "", json!([0.75, 400, [], []]), "invalid type: sequence"),
        at("no horizon", "thresholds/0/horizon", json!(0), "thresholds[0].horizon is 0"),
        at("an unknown statistic", "thresholds/0/statistic", json!("median"), "unknown variant `median`"),
        at("an alarm that never rings", "thresholds/0/rate", json!(0.0), "thresholds[0].rate is 0.0"),
        at("an alarm that always rings", "thresholds/0/rate", json!(1.0), "above 0 and below 1"),
        at("a threshold beyond f32", "thresholds/0/z", json!(1e39), "within the range of f32"),
        at("a threshold from nothing", "thresholds/0/sequences", json!(0), "thresholds[0].sequences is 0"),
        at(
            "a rate too rare for the sample",
            "thresholds/2/sequences",
            json!(298),
            "calibrate on more sequences",
        ),
        at(
            "a rate a millionth too rare",
            "thresholds/2/rate",
            json!(0.999_999 * (1.0 - 0.05f64.powf(1.0 / 400.0))),
            "at least 1 - 0.05^(1 / sequences)",
        ),
        at(
            "a bound better than the sample",
            "thresholds/2/rate_upper",
            json!(0.001),
            "thresholds[2].rate_upper",
        ),
        at("a bound above one", "thresholds/2/rate_upper", json!(1.25), "rate_upper is 1.25"),
        at("a rate that its own sample belies", "thresholds/2/rate_upper", json!(0.011), "the rate it holds"),
        at(
            "quantiles without end",
            "quantiles",
            (1..=257).map(|i| json!([f64::from(i) / 258.0, 0.0])).collect(),
            "calibration.quantiles is 257",
        ),
        at("a threshold twice", "thresholds/2/rate", json!(0.05), "it must be stated once"),
        at(
            "rarer and easier",
            "thresholds/2/z",
            json!(1.0),
            "z at rate 0.01 is 1.0, it must be at least 1.1",
        ),
    ]
}

/// The two axes of evidence.
fn evidence() -> Vec<Attack> {
    let at = |name, rest: &str, value, sentence| {
        stated(name, format!("/evidence/{rest}").trim_end_matches('/'), value, sentence)
    };
    let causal = |earned: &'static str| match earned {
        "untested" => "evidence.causal is \"specific\", it must be `untested`",
        _ => "evidence.causal is \"specific\", it must be `nonspecific`",
    };
    let few = {
        let mut families = manifest()["evidence"]["families"].clone();
        families[1]["controls"].as_array_mut().expect("controls").truncate(38);
        families[1]["rank_p"] = json!(1.0 / 39.0);
        families
    };
    let beaten = {
        let mut families = manifest()["evidence"]["families"].clone();
        families[3]["controls"][7]["effect"] = json!(0.25);
        families[3]["rank_p"] = json!(2.0 / 40.0);
        families
    };
    let one_more = {
        let mut families = manifest()["evidence"]["families"].clone();
        let mut fifth = families[0].clone();
        fifth["family"] = json!("source_random");
        fifth["controls"][7]["effect"] = json!(0.25);
        fifth["rank_p"] = json!(2.0 / 40.0);
        families.as_array_mut().expect("families").push(fifth);
        families
    };
    let nowhere = json!({
        "causal": "untested", "content": "nonspecific", "families": [],
        "content_test": manifest()["evidence"]["content_test"],
    });
    let harm = {
        let mut evidence = manifest()["evidence"].clone();
        evidence["effect"] = json!(-0.1);
        for family in evidence["families"].as_array_mut().expect("families") {
            family["controls"]
                .as_array_mut()
                .expect("controls")
                .iter_mut()
                .for_each(|c| c["effect"] = json!(-1));
        }
        evidence
    };
    let wide_seed = {
        let mut forge = Forge::sound();
        let text = manifest().to_string().replacen("\"seed\":38", "\"seed\":18446744073709551616", 1);
        forge.set_metadata("emaudit.manifest", &quoted(&text));
        forge.bytes()
    };
    let three = Value::from(manifest()["evidence"]["families"].as_array().expect("families")[..3].to_vec());
    vec![
        at("modesty that the numbers deny", "causal", json!("nonspecific"), "it must be `specific`"),
        at("content that was not shown", "content", json!("specific"), "it must be `nonspecific`"),
        at("content that was not tested", "content_test", Value::Null, "it must be `untested`"),
        at("too few controls", "families", few, causal("untested")),
        at("a family left out", "families", three, causal("untested")),
        at("a control that does as well", "families", beaten, causal("nonspecific")),
        at("a fifth family that does as well", "families", one_more, causal("nonspecific")),
        at("no coherence", "coherence", Value::Null, causal("untested")),
        at("coherence lost", "coherence/steered", json!(-1.76), causal("nonspecific")),
        at("a negative margin", "coherence/margin", json!(-0.1), "evidence.coherence.margin is -0.1"),
        at("a flattering rank", "families/2/rank_p", json!(0.02), "`covariance`: rank_p is 0.02"),
        at("a control counted twice", "families/0/controls/5/seed", json!(4), "`random`: seed is 4"),
        at("a seed below zero", "families/0/controls/5/seed", json!(-4), "invalid value: integer `-4`"),
        at(
            "a family listed twice",
            "families/1/family",
            json!("random"),
            "is \"random\", it must be listed once",
        ),
        at("a family without name", "families/1/family", json!(""), "evidence.families: family is \"\""),
        at("controls without effect", "effect", Value::Null, "evidence.effect is None"),
        at("a content test nowhere", "", nowhere, "evidence.cell is None"),
        at("harm that beats its controls", "", harm, causal("nonspecific")),
        raw("a seed beyond u64", wide_seed, Status::Schema, "invalid type: floating point"),
        at("a measurement nowhere", "cell", Value::Null, "evidence.cell is None"),
        at("a cell in another layer", "cell/layer", json!(2), "evidence.cell.layer is 2"),
        at("a cell as a list", "cell", json!([3, 1.5, "all"]), "invalid type: sequence"),
        at("a cell without dose", "cell/alpha", json!(0.0), "evidence.cell.alpha is 0.0"),
        at("an impossible p", "content_test/p_value", json!(0.0), "content_test.p_value is 0.0"),
        at("a test on nobody", "content_test/prompts", json!(0), "content_test.prompts is 0"),
    ]
}
