//! The commands that put a direction file to use: score, diff, bench, convert; from outside, as a script sees them.
#![cfg(feature = "cli")]

#[path = "../attacks/forge.rs"]
#[allow(dead_code)]
mod forge;

mod audit;
mod bench;
mod convert;
mod diff;
mod inspect;
mod score;
#[allow(dead_code)] // other tests use more of it
#[path = "../skipped/mod.rs"]
mod skipped;

use emaudit::directions::schema::Manifest;
use serde_json::Value;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// The layer of the sample that has the direction 1, 2, 3, 4, 5, the mean 0 and sigma 0.75.
const LAYER: u32 = 3;

/// A folder with files for a command.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// The sample of the hostile files, after an edit.
    fn directions(
        &self,
        name: &str,
        edit: impl FnOnce(&mut Manifest, &mut [[f32; forge::WIDTH]; 4]),
    ) -> PathBuf {
        let (mut manifest, mut values) = (forge::typed_manifest(), forge::tensors());
        edit(&mut manifest, &mut values);
        let path = self.path(name);
        emaudit::directions::write(&path, &manifest, &forge::layer_tensors(&values)).unwrap();
        path
    }

    fn sample(&self) -> PathBuf {
        self.directions("sample.safetensors", |_, _| {})
    }
}

#[cfg(unix)]
impl Folder {
    /// A pipe. Whoever opens it to read finds a writer that leaves at once, so that a test fails and does not hang.
    fn pipe(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let writer = path.clone();
        std::thread::spawn(move || while std::fs::OpenOptions::new().write(true).open(&writer).is_ok() {});
        path
    }

    /// A file that seems to have `size` bytes and holds only these.
    #[cfg(target_os = "linux")]
    fn sparse(&self, name: &str, bytes: &[u8], size: u64) -> PathBuf {
        let path = self.write(name, bytes);
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size).unwrap();
        path
    }
}

fn emaudit<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_emaudit")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("the command prints UTF-8")
}

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Standard output as JSON lines.
fn lines(output: &Output) -> Vec<Value> {
    text(&output.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Runs a command that must be refused: once for people, once for programs. The status is the library's.
fn refused(arguments: &[&str], code: i32, status: i32, sentence: &str) {
    let output = emaudit(arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
    let stderr = text(&output.stderr);
    assert!(stderr.starts_with("emaudit: ") && stderr.contains(sentence), "{arguments:?}: {stderr}");
    let output = emaudit(&[arguments, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(code), "{arguments:?}");
    let last = lines(&output).pop().expect("an object");
    assert_eq!((&last["ok"], &last["status"]), (&Value::from(false), &Value::from(status)), "{last}");
    assert!(last["error"].as_str().unwrap().contains(sentence), "{last}");
}

/// Runs a command that must be refused, in at most `megabytes` of memory.
#[cfg(target_os = "linux")]
fn refused_within(megabytes: u32, arguments: &[&str], sentence: &str) {
    let shell = format!("ulimit -v {}; exec \"$@\"", 1024 * megabytes);
    let output = Command::new("sh")
        .args(["-c", &shell, "sh", env!("CARGO_BIN_EXE_emaudit")])
        .args(arguments)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
    assert!(text(&output.stderr).contains(sentence), "{arguments:?}: {output:?}");
}

/// A `.npy` file as numpy writes it, version 1.
fn npy(descr: &str, shape: &[usize], bytes: &[u8]) -> Vec<u8> {
    let shape: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let mut header =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", shape.trim_end());
    while !(10 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(bytes);
    file
}

fn npy_f32(shape: &[usize], values: &[f32]) -> Vec<u8> {
    npy("<f4", shape, &values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
}

#[test]
fn help_teaches_by_example_and_names_the_exit_status() {
    let actions: [&[&str]; 7] = [
        &["audit"],
        &["score"],
        &["diff"],
        &["bench"],
        &["inspect"],
        &["convert", "import"],
        &["convert", "export"],
    ];
    for action in actions {
        let output = emaudit(&[action, &["--help"]].concat());
        assert!(output.status.success());
        let page = text(&output.stdout);
        assert!(page.contains("Examples:\n  emaudit "), "{action:?}");
        assert!(page.contains("Exit status"), "{action:?}");
    }
}
