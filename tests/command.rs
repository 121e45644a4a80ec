//! The `emaudit` command from outside: what it prints, where, and the exit status a script relies on.
#![cfg(feature = "cli")]

mod attacks;

use attacks::forge;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The sample file in a folder of its own, and its digest.
fn sample() -> (tempfile::TempDir, PathBuf, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sample.safetensors");
    let values = forge::tensors();
    let digest =
        emaudit::directions::write(&path, &forge::typed_manifest(), &forge::layer_tensors(&values)).unwrap();
    (folder, path, emaudit::directions::digest::to_hex(&digest))
}

fn emaudit() -> Command {
    Command::new(env!("CARGO_BIN_EXE_emaudit"))
}

fn run(action: &str, file: &Path, options: &[&str]) -> Output {
    emaudit().arg(action).arg(file).args(options).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("the command prints UTF-8")
}

#[test]
fn inspect_prints_a_page() {
    let (_folder, path, digest) = sample();
    let output = run("inspect", &path, &[]);
    assert!(output.status.success() && output.stderr.is_empty());
    assert_eq!(text(&output.stdout).replace(&digest, "DIGEST"), include_str!("inspect.txt"));
}

#[test]
fn inspect_as_json_holds_the_whole_manifest() {
    let (_folder, path, digest) = sample();
    let output = run("inspect", &path, &["--json"]);
    assert!(output.status.success() && output.stderr.is_empty());
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["ok"], true);
    assert_eq!(object["digest"], digest);
    assert_eq!(object["layers"][1]["direction_norm"], 55f64.sqrt());
    let manifest: emaudit::directions::schema::Manifest =
        serde_json::from_value(object["manifest"].clone()).unwrap();
    assert_eq!(manifest, forge::typed_manifest());
}

#[test]
fn verify_accepts_the_right_file_for_the_right_model() {
    let (_folder, path, digest) = sample();
    let model =
        ["--model-width", "5", "--model-layers", "4", "--vocab-size", "100", "--architecture", "llama"];
    let site = ["--site", "resid_post"];
    let upper = digest.to_uppercase();
    for options in [&[][..], &["--digest", &digest], &["--digest", &upper], &model, &site] {
        let output = run("verify", &path, options);
        assert!(output.status.success() && output.stderr.is_empty(), "{options:?}");
        let sentence = text(&output.stdout);
        assert!(sentence.starts_with(&format!("good: {digest} matches ")), "{sentence}");
        assert!(sentence.ends_with("causal specific, content nonspecific\n"), "{sentence}");
    }
    let object: Value = serde_json::from_slice(&run("verify", &path, &["--json"]).stdout).unwrap();
    assert_eq!((&object["ok"], &object["status"]), (&Value::from(true), &Value::from(0)));
    assert_eq!(object["layers"], serde_json::json!([1, 3]));
}

#[test]
fn verify_refuses_another_file_or_another_model() {
    let (folder, path, _) = sample();
    let other = "7".repeat(64);
    let nothing = folder.path().join("nothing");
    let cases = [
        (&path, &["--digest", &other][..], 7, "expected 7777"),
        (&path, &["--digest", "77"], 1, "give 64 hex characters"),
        (&path, &["--model-width", "6"], 9, "hidden size is 6, the directions need 5"),
        (&path, &["--model-layers", "5"], 9, "number of layers is 5"),
        (&path, &["--vocab-size", "1"], 9, "vocabulary size is 1"),
        (&path, &["--architecture", "qwen2"], 9, "architecture is qwen2"),
        (&path, &["--tokenizer-digest", &other], 9, "tokenizer digest is 7777"),
        (&path, &["--site", "final_norm"], 9, "site is final_norm, the directions need resid_post"),
        (&path, &["--key", "a note"], 1, "not a minisign public key"),
        (&nothing, &[], 2, "cannot open"),
    ];
    for (file, options, status, sentence) in cases {
        let output = run("verify", file, options);
        assert_eq!(output.status.code(), Some(1), "{options:?}");
        assert!(output.stdout.is_empty());
        let stderr = text(&output.stderr);
        assert!(stderr.starts_with("emaudit: ") && stderr.contains(sentence), "{options:?}: {stderr}");
        let output = run("verify", file, &[options, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(1));
        let object: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&object["ok"], &object["status"]), (&Value::from(false), &Value::from(status)));
        assert!(object["error"].as_str().unwrap().contains(sentence), "{object}");
    }
}

#[test]
fn verify_with_a_key_wants_its_signature() {
    let (folder, path, digest) = sample();
    let [key, stranger] = [(); 2].map(|()| minisign::KeyPair::generate_unencrypted_keypair().unwrap());
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let line = key.pk.to_base64();
    std::fs::write(at("key.pub"), key.pk.to_box().unwrap().to_string()).unwrap();
    let refused = |options: &[&str], status: i32, sentence: &str| {
        let output = run("verify", &path, options);
        assert_eq!(output.status.code(), Some(1), "{options:?}");
        assert!(text(&output.stderr).contains(sentence), "{}", text(&output.stderr));
        let object: Value =
            serde_json::from_slice(&run("verify", &path, &[options, &["--json"]].concat()).stdout).unwrap();
        assert_eq!(object["status"], status, "{object}");
    };
    refused(&["--key", &line], 17, "unsigned direction file: there is no ");
    let bytes = std::fs::read(&path).unwrap();
    let comment = "timestamp:1\tversion 7";
    let sign = |pair: &minisign::KeyPair, bytes: &[u8]| {
        minisign::sign(Some(&pair.pk), &pair.sk, bytes, Some(comment), None).unwrap().into_string()
    };
    std::fs::write(at("sample.safetensors.minisig"), sign(&key, &bytes)).unwrap();
    std::fs::write(at("elsewhere"), sign(&key, b"another file")).unwrap();
    for options in [["--key", &line], ["--key", &at("key.pub")]] {
        let output = run("verify", &path, &options);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let sentence = text(&output.stdout);
        let start = format!("good: {digest} matches its own digest, signed by ");
        assert!(
            sentence.starts_with(&start) && sentence.contains(" (timestamp:1 version 7); causal "),
            "{sentence}"
        );
        let object: Value =
            serde_json::from_slice(&run("verify", &path, &[&options[..], &["--json"]].concat()).stdout)
                .unwrap();
        assert_eq!(object["signed"]["trusted_comment"], comment);
    }
    refused(&["--key", &stranger.pk.to_base64()], 19, "untrusted signature: it is by the key ");
    refused(&["--key", &line, "--signature", &at("elsewhere")], 18, "is not what was signed");
    refused(&["--key", &line, "--signature", &at("nothing")], 2, "cannot open ");
    assert_eq!(run("verify", &path, &["--signature", &at("elsewhere")]).status.code(), Some(2));
    assert_eq!(run("verify", &path, &["--site", "nowhere"]).status.code(), Some(2));
}

#[cfg(unix)]
#[test]
fn verify_does_not_wait_for_a_pipe() {
    let (folder, path, _) = sample();
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    // A writer that leaves at once, so that a test fails and does not hang.
    let writer = pipe.clone();
    std::thread::spawn(move || while std::fs::OpenOptions::new().write(true).open(&writer).is_ok() {});
    let pipe = pipe.to_str().unwrap();
    let line = minisign::KeyPair::generate_unencrypted_keypair().unwrap().pk.to_base64();
    for options in [&["--key", pipe][..], &["--key", &line, "--signature", pipe]] {
        let output = run("verify", &path, options);
        assert_eq!(output.status.code(), Some(1), "{options:?}");
        assert!(text(&output.stderr).contains("not a regular file"), "{}", text(&output.stderr));
    }
}

#[test]
fn both_commands_refuse_every_attack() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("attack");
    let attacks = attacks::all();
    for attack in &attacks {
        std::fs::write(&path, &attack.bytes).unwrap();
        for action in ["inspect", "verify"] {
            let output = run(action, &path, &["--json"]);
            assert_eq!(output.status.code(), Some(1), "{action}: {}", attack.name);
            assert!(output.stderr.is_empty());
            let object: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(object["status"], attack.status as i32, "{}", attack.name);
            assert_eq!(object["status_name"], format!("{:?}", attack.status));
            assert!(object["error"].as_str().unwrap().contains(attack.sentence), "{}", attack.name);
        }
    }
    assert!(attacks.len() > 100, "only {} attacks ran", attacks.len());
}

/// An end of a pipe that nobody reads.
fn unread() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn a_closed_pipe_changes_neither_answer_nor_manners() {
    let (folder, path, _) = sample();
    let nothing = folder.path().join("nothing");
    for (action, file, json, expected) in [
        ("inspect", &path, true, 0),
        ("inspect", &path, false, 0),
        ("verify", &path, false, 0),
        ("verify", &nothing, false, 1),
        ("verify", &nothing, true, 1),
    ] {
        let mut command = emaudit();
        command.arg(action).arg(file).args(json.then_some("--json"));
        let status = command.stdout(unread()).stderr(unread()).status().unwrap();
        assert_eq!(status.code(), Some(expected), "{action}, json {json}");
    }
    let help = emaudit().arg("--help").stdout(unread()).stderr(unread()).status().unwrap();
    assert!(help.code().is_some_and(|c| c != 101), "{help}");
}

#[cfg(target_os = "linux")]
#[test]
fn an_answer_that_cannot_be_written_is_a_failure() {
    let (_folder, path, _) = sample();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = emaudit().arg("verify").arg(&path).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot write the answer"));
}

#[test]
fn help_teaches_by_example() {
    for action in [&[][..], &["inspect"], &["verify"]] {
        let output = emaudit().args(action).arg("--help").output().unwrap();
        assert!(output.status.success());
        let page = text(&output.stdout);
        assert!(page.contains("Examples:\n  emaudit "));
    }
    assert_eq!(emaudit().output().unwrap().status.code(), Some(2));
    assert_eq!(emaudit().args(["verify", "x", "--no-such-option"]).output().unwrap().status.code(), Some(2));
}
