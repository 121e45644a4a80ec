use super::skipped::missing;
use super::{Folder, emaudit, forge, lines, npy_f32, refused, text, utf8};
use emaudit::directions::schema::{Estimator, Pooling, Site, Specificity};
use emaudit::directions::{Directions, OpenOptions};
use emaudit::{Error, Operation, Probe, Rows, ScoreUnit, Status, Steering, SteeringOptions};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const WIDTH: usize = forge::WIDTH;

/// A GGUF file put together by hand, as careless as the test wants it.
struct Gguf {
    version: u32,
    values: Vec<(&'static str, Vec<u8>)>,
    tensors: Vec<(&'static str, Vec<u64>, u32, Vec<f32>)>,
    /// Bytes that the last tensor is said to begin too early.
    early: u64,
    /// Bytes cut off the end.
    cut: usize,
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn text_value(text: &str) -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &string(text)].concat()
}

fn number(kind: u32, n: u32) -> Vec<u8> {
    [kind.to_le_bytes(), n.to_le_bytes()].concat()
}

impl Gguf {
    /// A control vector as repeng and llama.cpp write it.
    fn vectors(names: &[&'static str]) -> Gguf {
        let vector = |i: usize| (0..WIDTH).map(|j| (i * 10 + j) as f32 + 0.5).collect();
        let tensors = names.iter().enumerate().map(|(i, n)| (*n, vec![WIDTH as u64], 0, vector(i))).collect();
        Gguf {
            version: 3,
            values: vec![
                ("general.architecture", text_value("controlvector")),
                ("controlvector.model_hint", text_value("llama")),
                ("controlvector.layer_count", number(5, names.len() as u32)),
            ],
            tensors,
            early: 0,
            cut: 0,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.values.len() as u64).to_le_bytes());
        for (key, value) in &self.values {
            out.extend([string(key), value.clone()].concat());
        }
        let mut data: Vec<u8> = Vec::new();
        for (i, (name, dims, kind, values)) in self.tensors.iter().enumerate() {
            data.resize(data.len().next_multiple_of(32), 0);
            out.extend(string(name));
            out.extend((dims.len() as u32).to_le_bytes());
            out.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            let early = if i + 1 == self.tensors.len() { self.early } else { 0 };
            out.extend((data.len() as u64 - early).to_le_bytes());
            data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out.truncate(out.len() - self.cut);
        out
    }
}

/// The identity of the sample's model, as JSON.
fn identity(folder: &Folder) -> PathBuf {
    folder.write("model.json", forge::manifest()["model"].to_string())
}

fn import(folder: &Folder, source: &Path, options: &[&str]) -> (Directions, Value) {
    let (model, to) = (identity(folder), folder.path("imported.safetensors"));
    let fixed = ["convert", "import", utf8(source), "--model", utf8(&model), "--to", utf8(&to), "--json"];
    let output = emaudit(&[&fixed[..], options].concat());
    assert!(output.status.success(), "{options:?}: {}", text(&output.stdout));
    (Directions::open(&to, &OpenOptions::default()).unwrap(), lines(&output).remove(0))
}

/// Every direction of a file, as bits.
fn bits(directions: &Directions) -> Vec<(u32, Vec<u32>)> {
    let of = |l| directions.layer(l).unwrap().direction.iter().map(|x| x.to_bits()).collect();
    directions.layers().map(|l| (l, of(l))).collect()
}

fn export(from: &Path, to: &Path, options: &[&str]) -> Value {
    let output =
        emaudit(&[&["convert", "export", utf8(from), "--to", utf8(to), "--json"][..], options].concat());
    assert!(output.status.success(), "{}", text(&output.stdout));
    lines(&output).remove(0)
}

#[test]
fn exported_and_imported_vectors_are_the_same_to_the_last_bit() {
    let folder = Folder::new();
    let from = folder.sample();
    let to = folder.path("vectors.gguf");
    let said = export(&from, &to, &[]);
    assert_eq!((&said["layers"], &said["points_to"]), (&json!([1, 3]), &json!("misaligned")));
    let (back, _) = import(&folder, &to, &["--producer", "emaudit", "--site", "resid-post"]);
    let original = Directions::open(&from, &OpenOptions::default()).unwrap();
    // A subnormal is among the values.
    assert_eq!(bits(&back), bits(&original));
    assert_eq!(back.manifest().model, original.manifest().model);
    let again = folder.path("again.gguf");
    export(&folder.path("imported.safetensors"), &again, &["--layers", "3"]);
    let (back, _) = import(&folder, &again, &["--producer", "emaudit", "--site", "resid-post"]);
    assert_eq!(bits(&back), bits(&original)[1..]);
}

#[test]
fn the_page_says_which_way_the_vector_points() {
    let folder = Folder::new();
    let (from, to) = (folder.sample(), folder.path("v.gguf"));
    let output = emaudit(&["convert", "export", utf8(&from), "--to", utf8(&to)]);
    let page = text(&output.stdout);
    assert!(page.contains("--control-vector-scaled") && page.contains("v.gguf:-ALPHA"), "{page}");
    assert!(page.contains("a positive scale makes it worse"), "{page}");
    assert!(page.contains("note: causal evidence is not `specific` for the layers [1]"), "{page}");
}

#[test]
fn an_import_is_untested_and_uncalibrated_and_behaves_so() {
    let folder = Folder::new();
    let source =
        folder.write("cv.gguf", Gguf::vectors(&["direction.1", "direction.2", "direction.3"]).bytes());
    let (found, said) = import(&folder, &source, &["--producer", "repeng", "--site", "resid-post"]);
    let manifest = found.manifest();
    assert_eq!(manifest.evidence.causal, Specificity::Untested);
    assert_eq!(manifest.evidence.content, Specificity::Untested);
    assert_eq!((manifest.site, manifest.pooling), (Site::ResidPost, Pooling::Unstated));
    assert_eq!(manifest.estimator, Estimator::Unstated);
    assert!(manifest.layers.iter().all(|l| l.calibration.is_none()));
    assert!(manifest.provenance.producer.starts_with("repeng, imported by emaudit "));
    assert_eq!(found.layers().collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(*found.layer(2).unwrap().direction, [10.5, 11.5, 12.5, 13.5, 14.5]);
    assert_eq!(said["layers"][0]["layer"], 1);

    let probe = Probe::new(Arc::new(found), 2).unwrap();
    assert_eq!(probe.sigma(), None);
    let (rows, mut score) = ([1.0f32; WIDTH], [0.0]);
    let view = Rows::new(&rows, 1, WIDTH, WIDTH).unwrap();
    probe.score(&view, ScoreUnit::Raw, &mut score, None).unwrap();
    assert!(score[0] > 0.0);
    let refused = probe.score(&view, ScoreUnit::AlignedSd, &mut score, None).unwrap_err();
    assert!(matches!(refused, Error::NotCalibrated { .. }), "{refused}");
    let subtract = SteeringOptions::new(Operation::Subtract { alpha: 1.0 });
    assert_eq!(Steering::new(&probe, subtract).unwrap_err().status(), Status::NotSpecific);
    let allowed = SteeringOptions { allow_nonspecific: true, ..subtract };
    Steering::new(&probe, allowed).unwrap();
    let gated = SteeringOptions { gate: Some(2.0), ..allowed };
    let clamp = SteeringOptions { operation: Operation::Clamp { ceiling: 2.0 }, ..allowed };
    for options in [gated, clamp] {
        assert_eq!(Steering::new(&probe, options).unwrap_err().status(), Status::NotCalibrated);
    }
    let monitor = emaudit::Monitor::new(&probe, emaudit::directions::schema::Aggregation::Mean, 0.05);
    assert_eq!(monitor.unwrap_err().status(), Status::RateUnsupported);
}

#[test]
fn the_commands_say_what_an_import_lacks() {
    let folder = Folder::new();
    let source = folder.write("cv.gguf", Gguf::vectors(&["direction.2"]).bytes());
    import(&folder, &source, &["--producer", "repeng", "--site", "resid-post"]);
    let file = folder.path("imported.safetensors");
    let rows = folder.write("rows.npy", npy_f32(&[2, WIDTH], &[1.0; 2 * WIDTH]));
    let score = ["score", utf8(&file), utf8(&rows), "--layer", "2"];
    refused(&score, 1, Status::NotCalibrated as i32, "not calibrated");
    assert!(emaudit(&[&score[..], &["--raw"]].concat()).status.success());
    let page = emaudit(&["inspect", utf8(&file)]);
    let page = text(&page.stdout);
    assert!(page.contains("not calibrated") && page.contains("untested"), "{page}");
    assert!(emaudit(&["verify", utf8(&file)]).status.success());
    assert!(emaudit(&["diff", utf8(&file), utf8(&file)]).status.success());
    let sample = folder.sample();
    assert_eq!(emaudit(&["diff", utf8(&file), utf8(&sample)]).status.code(), Some(1));
}

#[test]
fn the_generator_that_numbers_one_block_late_is_put_right() {
    let folder = Folder::new();
    let source = folder.write("cv.gguf", Gguf::vectors(&["direction.1", "direction.4"]).bytes());
    let options = ["--producer", "cvector-generator", "--site", "resid-post"];
    let (found, _) = import(&folder, &source, &options);
    assert_eq!(found.layers().collect::<Vec<_>>(), [0, 3]);
    let (model, to) = (identity(&folder), folder.path("no"));
    let fixed = ["convert", "import", utf8(&source), "--model", utf8(&model), "--to", utf8(&to)];
    let of = |options: &[&'static str]| [&fixed[..], &["--site", "resid-post"], options].concat();
    refused(&of(&["--producer", "my tool"]), 1, 1, "give --numbering block");
    refused(&of(&["--producer", "repeng"]), 1, 1, "\"direction.4\" would be block 4, the model has 4 blocks");
    refused(&of(&["--producer", "repeng", "--numbering", "next-block"]), 1, 1, "repeng numbers by block");
    assert!(!to.exists());
    let (found, _) = import(
        &folder,
        &source,
        &[
            "--producer",
            "my tool",
            "--numbering",
            "next-block",
            "--site",
            "resid-post",
            "--layers",
            "3",
            "--negate",
        ],
    );
    assert_eq!(*found.layer(3).unwrap().direction, [-10.5, -11.5, -12.5, -13.5, -14.5]);
}

#[test]
fn arrays_are_imported_by_their_layers() {
    let folder = Folder::new();
    let values: Vec<f32> = (1..=2 * WIDTH).map(|i| i as f32).collect();
    let two = folder.write("two.npy", npy_f32(&[2, WIDTH], &values));
    let one = folder.write("one.npy", npy_f32(&[WIDTH], &values[..WIDTH]));
    let state = ["--producer", "a notebook", "--site", "resid-post"];
    let (found, _) = import(&folder, &two, &[&state[..], &["--layers", "3,0"]].concat());
    assert_eq!(*found.layer(3).unwrap().direction, values[..WIDTH]);
    assert_eq!(*found.layer(0).unwrap().direction, values[WIDTH..]);
    let last =
        ["--producer", "a notebook", "--site", "final-norm", "--layers", "3", "--estimator", "logistic"];
    let (found, _) = import(&folder, &one, &last);
    assert_eq!((found.manifest().site, found.manifest().estimator), (Site::FinalNorm, Estimator::Logistic));

    let (model, to) = (identity(&folder), folder.path("no"));
    let fixed = ["--model", utf8(&model), "--to", utf8(&to)];
    let of = |file: &'static str, options: &[&'static str]| {
        let file = folder.path(file);
        let arguments = [&["convert", "import", utf8(&file)][..], &fixed, &state, options].concat();
        arguments.iter().map(|a| a.to_string()).collect::<Vec<_>>()
    };
    for (arguments, status, sentence) in [
        (of("two.npy", &[]), 1, "say which layers its rows are"),
        (of("two.npy", &["--layers", "3"]), 1, "it has 2 row(s), --layers names 1"),
        (of("one.npy", &["--layers", "4"]), 8, "below model.n_layers, which is 4"),
        (of("one.npy", &["--layers", "3", "--numbering", "block"]), 1, "--numbering is for control vectors"),
    ] {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        refused(&arguments, 1, status, sentence);
    }
    let narrow = folder.write("narrow.npy", npy_f32(&[4], &[1.0; 4]));
    let zero = folder.write("zero.npy", npy_f32(&[WIDTH], &[0.0; WIDTH]));
    let nan = folder.write("nan.npy", npy_f32(&[WIDTH], &[f32::NAN; WIDTH]));
    for (file, status, sentence) in [
        (&narrow, 1, "4 elements, the residual stream of the model 5"),
        (&zero, 8, "zero"),
        (&nan, 8, "finite"),
    ] {
        let arguments = [&["convert", "import", utf8(file)][..], &fixed, &state, &["--layers", "3"]].concat();
        refused(&arguments, 1, status, sentence);
    }
    assert!(!to.exists());
}

#[test]
fn an_import_needs_a_producer_and_a_site() {
    let folder = Folder::new();
    let source = folder.write("cv.gguf", Gguf::vectors(&["direction.2"]).bytes());
    let (model, to) = (identity(&folder), folder.path("no"));
    let fixed = ["convert", "import", utf8(&source), "--model", utf8(&model), "--to", utf8(&to)];
    for (options, missing) in
        [(&["--producer", "repeng"][..], "--site"), (&["--site", "resid-post"], "--producer")]
    {
        let output = emaudit(&[&fixed[..], options].concat());
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(missing));
    }
    let wrong = [&fixed[..], &["--producer", "repeng", "--site", "final-norm"]].concat();
    refused(&wrong, 1, 1, "its site is resid-post");
    assert!(!to.exists());
}

#[test]
fn files_that_are_no_control_vectors_are_refused() {
    let folder = Folder::new();
    let (model, to) = (identity(&folder), folder.path("no"));
    let sound = || Gguf::vectors(&["direction.1", "direction.2"]);
    let edited = |edit: fn(&mut Gguf)| {
        let mut gguf = sound();
        edit(&mut gguf);
        gguf.bytes()
    };
    let mut huge = b"GGUF\x03\0\0\0".to_vec();
    huge.extend([0xff; 16]);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (edited(|g| g.tensors[0].0 = "projection.1"), "\"projection.1\" is not direction.N"),
        (edited(|g| g.tensors[0].0 = "direction.01"), "is not direction.N"),
        (edited(|g| g.tensors[0].0 = "direction.2"), "\"direction.2\" is there twice"),
        (edited(|g| g.tensors[0].0 = "direction.0"), "direction.0 does not exist"),
        (edited(|g| g.tensors[0].2 = 1), "not one vector of 32-bit floats"),
        (edited(|g| g.tensors[0].1 = vec![1, WIDTH as u64]), "not one vector of 32-bit floats"),
        (edited(|g| g.tensors[0].1 = vec![4]), "4 elements, the residual stream of the model 5"),
        (edited(|g| g.tensors[1].1 = vec![1 << 62]), "4611686018427387904 elements, the residual stream"),
        (edited(|g| g.early = 4), "begins at 28, which is no multiple of the alignment 32"),
        (edited(|g| g.early = 32), "overlaps the one before it"),
        (edited(|g| g.tensors.clear()), "no tensors direction.N"),
        (edited(|g| g.values[0].1 = text_value("llama")), "a model goes to --model"),
        (edited(|g| g.values.push(("general.architecture", text_value("x")))), "is there twice"),
        (edited(|g| g.values.clear()), "not a control vector"),
        (edited(|g| g.values.push(("x", number(99, 0)))), "unknown type 99"),
        (edited(|g| g.values.push(("general.alignment", number(4, 0)))), "alignment of 0"),
        (edited(|g| g.version = 1), "version 1 cannot be read"),
        (edited(|g| g.version = 3u32.swap_bytes()), "in little-endian"),
        (edited(|g| g.cut = 8), "beyond the end of the file"),
        (edited(|g| g.cut = 200), "ends within its GGUF header"),
        (huge, "at most 65536 of each are possible"),
        (
            edited(|g| g.values.push(("x", [8u32.to_le_bytes(), [0xff; 4], [0; 4]].concat()))),
            "within its GGUF",
        ),
    ];
    for (bytes, sentence) in &cases {
        let file = folder.write("attack.gguf", bytes);
        let state = ["--producer", "repeng", "--site", "resid-post"];
        let fixed = ["convert", "import", utf8(&file), "--model", utf8(&model), "--to", utf8(&to)];
        refused(&[&fixed[..], &state].concat(), 1, 1, sentence);
    }
    assert!(cases.len() > 15 && !to.exists());
}

#[test]
fn what_a_control_vector_cannot_say_is_not_exported() {
    let folder = Folder::new();
    let to = folder.path("no.gguf");
    let zero = {
        let values = npy_f32(&[2, WIDTH], &[1.0; 2 * WIDTH]);
        let file = folder.write("two.npy", values);
        import(&folder, &file, &["--producer", "x", "--site", "resid-post", "--layers", "0,3"]);
        folder.path("imported.safetensors")
    };
    let refuse = |file: &Path, options: &[&str], status: i32, sentence: &str| {
        let fixed = ["convert", "export", utf8(file), "--to", utf8(&to)];
        refused(&[&fixed[..], options].concat(), 1, status, sentence);
        assert!(!to.exists());
    };
    refuse(&zero, &[], 1, "no control vector after block 0");
    refuse(&zero, &["--layers", "0"], 1, "no control vector after block 0");
    refuse(&zero, &["--layers", "2"], 11, "no direction for layer 2");
    export(&zero, &folder.path("yes.gguf"), &["--layers", "3"]);
    let whitened = folder.directions("w.safetensors", |m, _| m.estimator = Estimator::Whitened);
    refuse(&whitened, &[], 1, "--as-addition");
    export(&whitened, &folder.path("yes.gguf"), &["--as-addition"]);
    let file = folder.write("one.npy", npy_f32(&[WIDTH], &[1.0; WIDTH]));
    import(&folder, &file, &["--producer", "x", "--site", "final-norm", "--layers", "3"]);
    refuse(&zero, &[], 1, "after the final norm");
}

#[test]
fn the_identity_of_a_model_comes_from_its_gguf_file() {
    let folder = Folder::new();
    let tokens = ["<s>", "a", "é"];
    let mut list = [9u32.to_le_bytes(), 8u32.to_le_bytes()].concat();
    list.extend((tokens.len() as u64).to_le_bytes());
    tokens.iter().for_each(|t| list.extend(string(t)));
    let model = Gguf {
        version: 3,
        values: vec![
            ("general.architecture", text_value("qwen2")),
            ("general.name", text_value("a small one")),
            ("qwen2.embedding_length", number(4, WIDTH as u32)),
            ("qwen2.block_count", number(4, 4)),
            ("tokenizer.ggml.tokens", list),
        ],
        tensors: vec![("token_embd.weight", vec![WIDTH as u64, 3], 0, vec![0.0; 3 * WIDTH])],
        early: 0,
        cut: 0,
    };
    let model = folder.write("model.gguf", model.bytes());
    let source = folder.write("cv.gguf", Gguf::vectors(&["direction.2"]).bytes());
    let to = folder.path("to.safetensors");
    let fixed = ["convert", "import", utf8(&source), "--model", utf8(&model), "--to", utf8(&to)];
    let state = ["--producer", "repeng", "--site", "resid-post"];
    let output = emaudit(&[&fixed[..], &state].concat());
    let page = text(&output.stdout);
    assert!(
        page.contains("note: the file hints at the architecture \"llama\", the model has \"qwen2\""),
        "{page}"
    );
    let found = Directions::open(&to, &OpenOptions::default()).unwrap();
    let identity = &found.manifest().model;
    use sha2::{Digest, Sha256};
    let hex = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    assert_eq!((identity.architecture.as_str(), identity.name.as_str()), ("qwen2", "a small one"));
    assert_eq!((identity.hidden_size, identity.n_layers, identity.vocab_size), (WIDTH as u32, 4, 3));
    assert_eq!(identity.tokenizer_digest, hex("<s>\na\né\n".as_bytes()));
    assert_eq!(identity.weights_digest, hex(&std::fs::read(&model).unwrap()));
    assert_eq!(identity.quantization, "gguf-f32");
    // A direction file of the model says the same.
    let again = folder.path("again.safetensors");
    let fixed = ["convert", "import", utf8(&source), "--model", utf8(&to), "--to", utf8(&again)];
    assert!(emaudit(&[&fixed[..], &state].concat()).status.success());
    let again = Directions::open(&again, &OpenOptions::default()).unwrap();
    assert_eq!(&again.manifest().model, identity);
}

#[test]
fn an_input_is_never_overwritten() {
    let folder = Folder::new();
    let (sample, model) = (folder.sample(), identity(&folder));
    let source = folder.write("cv.gguf", Gguf::vectors(&["direction.2"]).bytes());
    let before = [&sample, &model, &source].map(|file| std::fs::read(file).unwrap());
    let roundabout = folder.path(".").join("sample.safetensors");
    let export = |to: &Path| {
        refused(&["convert", "export", utf8(&sample), "--to", utf8(to)], 1, 1, "would be overwritten");
    };
    export(&sample);
    export(&roundabout);
    #[cfg(unix)]
    {
        let link = folder.path("link");
        std::os::unix::fs::symlink(&sample, &link).unwrap();
        export(&link);
    }
    let state = ["--producer", "repeng", "--site", "resid-post"];
    for to in [&source, &model] {
        let fixed = ["convert", "import", utf8(&source), "--model", utf8(&model), "--to", utf8(to)];
        refused(&[&fixed[..], &state].concat(), 1, 1, "would be overwritten; give another file with --to");
    }
    assert_eq!([&sample, &model, &source].map(|file| std::fs::read(file).unwrap()), before);
}

#[cfg(unix)]
#[test]
fn only_a_regular_file_is_replaced() {
    let folder = Folder::new();
    let (sample, other) = (folder.sample(), folder.write("other", "another file"));
    let [to_file, to_nothing, inner] = ["to_file", "to_nothing", "inner"].map(|name| folder.path(name));
    std::os::unix::fs::symlink(&other, &to_file).unwrap();
    std::os::unix::fs::symlink(folder.path("nothing"), &to_nothing).unwrap();
    std::fs::create_dir(&inner).unwrap();
    let pipe = folder.path("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let kinds = |paths: &[&PathBuf]| -> Vec<_> {
        paths.iter().map(|path| std::fs::symlink_metadata(path).unwrap().file_type()).collect()
    };
    let targets = [&to_file, &to_nothing, &inner, &pipe];
    let before = (kinds(&targets), std::fs::read_dir(folder.path(".")).unwrap().count());
    for (to, sentence) in [
        (&to_file, "it is a symbolic link; name the file that it stands for"),
        (&to_nothing, "it is a symbolic link"),
        (&inner, "not a regular file"),
        (&pipe, "not a regular file"),
    ] {
        refused(&["convert", "export", utf8(&sample), "--to", utf8(to)], 1, Status::Io as i32, sentence);
    }
    assert_eq!((kinds(&targets), std::fs::read_dir(folder.path(".")).unwrap().count()), before);
    assert_eq!(std::fs::read(&other).unwrap(), b"another file");
    export(&sample, &other, &[]);
    assert_ne!(std::fs::read(&other).unwrap(), b"another file");
}

#[cfg(unix)]
#[test]
fn a_pipe_is_refused_and_not_waited_for() {
    let folder = Folder::new();
    let (sample, model, pipe, to) =
        (folder.sample(), identity(&folder), folder.pipe("pipe"), folder.path("no"));
    let source = folder.write("cv.gguf", Gguf::vectors(&["direction.2"]).bytes());
    let state = ["--producer", "repeng", "--site", "resid-post", "--to", utf8(&to)];
    let import = |source: &Path, model: &Path| {
        let fixed = ["convert", "import", utf8(source), "--model", utf8(model)];
        refused(&[&fixed[..], &state].concat(), 1, Status::Io as i32, "not a regular file");
    };
    import(&pipe, &model);
    import(&source, &pipe);
    let score = ["score", utf8(&sample), utf8(&pipe), "--layer", "3"];
    refused(&score, 1, Status::Io as i32, "not a regular file");
    assert!(!to.exists());
}

/// Files that seem to have the size they announce, and hold nothing.
#[cfg(target_os = "linux")]
#[test]
fn what_a_sparse_file_announces_is_refused_before_it_takes_memory() {
    use super::refused_within;
    let folder = Folder::new();
    let (model, to) = (identity(&folder), folder.path("no"));
    let wide = |name: &str, width: u32| {
        let mut identity = forge::manifest()["model"].clone();
        identity["hidden_size"] = width.into();
        folder.write(name, identity.to_string())
    };
    let array = |name: &str, shape: &[usize]| {
        let header = npy_f32(shape, &[]);
        folder.sparse(name, &header, header.len() as u64 + 4 * shape.iter().product::<usize>() as u64)
    };
    let state = ["--site", "resid-post", "--to", utf8(&to), "--producer"];
    let import = |source: &Path, model: &Path, options: &[&str], sentence: &str| {
        let fixed = ["convert", "import", utf8(source), "--model", utf8(model)];
        refused_within(300, &[&fixed[..], &state, options].concat(), sentence);
    };
    let rows = ["x", "--layers", "3"];
    let largest = wide("largest.json", u32::MAX);
    import(&array("wide.npy", &[1 << 36]), &model, &rows, "68719476736 elements, the residual stream");
    import(&array("max.npy", &[u32::MAX as usize]), &largest, &rows, "34359738360 bytes of a direction file");
    // What a direction file could hold, and this machine cannot.
    let large = wide("large.json", 100 << 20);
    import(&array("large.npy", &[100 << 20]), &large, &rows, "there is no memory for");

    let vector = |name: &str, width: u64| {
        let mut gguf = Gguf::vectors(&["direction.1"]);
        (gguf.tensors[0].1, gguf.tensors[0].3) = (vec![width], Vec::new());
        folder.sparse(name, &gguf.bytes(), 256 << 30)
    };
    import(&vector("a.gguf", 1 << 35), &model, &["repeng"], "34359738368 elements, the residual stream");
    import(&vector("b.gguf", u64::from(u32::MAX)), &largest, &["repeng"], "bytes of a direction file");
    import(&vector("c.gguf", 100 << 20), &large, &["repeng"], "there is no memory for");
    let mut text = Gguf::vectors(&["direction.1"]);
    text.values = vec![("x", [8u32.to_le_bytes(), [0; 4], 32u32.to_le_bytes()].concat())];
    let text = folder.sparse("text.gguf", &text.bytes(), 256 << 30);
    import(&text, &model, &["repeng"], "a text of 137438953472 bytes");
    let endless = folder.sparse("endless.json", b"{", 256 << 30);
    import(&text, &endless, &["repeng"], "not the identity of a model");

    let deep = folder.directions("deep.safetensors", |m, _| m.model.n_layers = 1 << 30);
    let row = array("row.npy", &[1, 1 << 30, WIDTH]);
    let score = ["score", utf8(&deep), utf8(&row), "--layer", "3"];
    refused_within(300, &score, "there is no memory for 21474836480 elements of 1 bytes");
    assert!(!to.exists());
}

/// Runs a script under a Python that has the `gguf` package; says aloud where there is none.
fn python(script: &str, arguments: &[&str]) -> Option<String> {
    let python = std::env::var("EMAUDIT_PYTHON").unwrap_or_else(|_| "python3".into());
    let has = std::process::Command::new(&python).args(["-c", "import gguf"]).output();
    if !has.is_ok_and(|o| o.status.success()) {
        let why = format!("{python} has no package gguf; install it, or name a Python in EMAUDIT_PYTHON");
        missing("control vectors of Python's gguf", &why);
        return None;
    }
    let output = std::process::Command::new(&python).args(["-c", script]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    Some(text(&output.stdout).to_owned())
}

#[test]
fn the_gguf_package_of_python_reads_what_we_write_and_we_what_it_writes() {
    let folder = Folder::new();
    let (from, to) = (folder.sample(), folder.path("vectors.gguf"));
    export(&from, &to, &[]);
    let read = "
import sys, gguf
r = gguf.GGUFReader(sys.argv[1])
for key in ('general.architecture', 'controlvector.model_hint', 'controlvector.layer_count'):
    print(key, r.fields[key].contents())
for t in r.tensors:
    print(t.name, t.tensor_type.name, list(map(int, t.shape)), t.data.astype('<f4').tobytes().hex())
";
    let Some(found) = python(read, &[utf8(&to)]) else { return };
    let hex =
        |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).map(|b| format!("{b:02x}")).collect::<String>();
    let values = forge::tensors();
    let expected = format!(
        "general.architecture controlvector\ncontrolvector.model_hint llama\ncontrolvector.layer_count 2\n\
         direction.1 F32 [5] {}\ndirection.3 F32 [5] {}\n",
        hex(&values[0]),
        hex(&values[2])
    );
    assert_eq!(found, expected);

    // As repeng writes them.
    let write = "
import sys, gguf, numpy
w = gguf.GGUFWriter(sys.argv[1], 'controlvector')
w.add_string('controlvector.model_hint', 'llama')
w.add_uint32('controlvector.layer_count', 2)
w.add_tensor('direction.1', numpy.arange(5, dtype=numpy.float32) / 3)
w.add_tensor('direction.2', -numpy.arange(5, dtype=numpy.float32) / 7)
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
";
    let theirs = folder.path("theirs.gguf");
    python(write, &[utf8(&theirs)]);
    let (directions, _) = import(&folder, &theirs, &["--producer", "repeng", "--site", "resid-post"]);
    let third: Vec<f32> = (0..5).map(|i| i as f32 / 3.0).collect();
    let seventh: Vec<f32> = (0..5).map(|i| -(i as f32) / 7.0).collect();
    assert_eq!(*directions.layer(1).unwrap().direction, third);
    assert_eq!(*directions.layer(2).unwrap().direction, seventh);
}
