//! What happens to an opened file from outside, and what a write leaves behind when it fails.
#![cfg(unix)]

#[allow(dead_code)] // of its sample file, not of its attacks
mod attacks;
#[allow(dead_code)] // other tests use more of it
mod skipped;

use attacks::forge;
use emaudit::directions::schema::Manifest;
use emaudit::directions::{Directions, Mode, OpenOptions, write};
use emaudit::{Probe, Rows, ScoreUnit, Status};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

const LAYER: u32 = 1;
/// Tells a test that it is the child, and which file to work on.
const FILE: &str = "EMAUDIT_TEST_FILE";

fn write_sample(path: &Path, change: impl FnOnce(&mut Manifest)) -> emaudit::Result<[u8; 32]> {
    let values = forge::tensors();
    let mut manifest = forge::typed_manifest();
    change(&mut manifest);
    write(path, &manifest, &forge::layer_tensors(&values))
}

fn sample_in(folder: &Path) -> PathBuf {
    let path = folder.join("sample.safetensors");
    write_sample(&path, |_| ()).unwrap();
    path
}

fn open(path: &Path, mode: Mode) -> Arc<Directions> {
    Arc::new(Directions::open(path, &OpenOptions { mode, ..OpenOptions::default() }).unwrap())
}

fn score(probe: &Probe) -> u32 {
    let row: Vec<f32> = (0..probe.width()).map(|i| i as f32 - 1.5).collect();
    let mut score = [0.0];
    let rows = Rows::new(&row, 1, row.len(), row.len()).unwrap();
    probe.score(&rows, ScoreUnit::Raw, &mut score, None).unwrap();
    score[0].to_bits()
}

fn replace(path: &Path) {
    write_sample(path, |m| m.layers[0].calibration.as_mut().unwrap().sigma = 5.0).unwrap();
}

fn truncate(path: &Path) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap();
}

/// Runs one test of this program again, on `file`, through a shell line that ends in `"$@"`.
fn again(test: &str, file: &Path, shell: &str) -> Output {
    let program = std::env::current_exe().unwrap();
    let arguments = ["-c", shell, "sh", program.to_str().unwrap(), "--exact", test, "--nocapture"];
    Command::new("sh").args(arguments).env(FILE, file).output().unwrap()
}

fn child_file() -> Option<PathBuf> {
    std::env::var_os(FILE).map(PathBuf::from)
}

#[test]
fn copied_directions_outlive_their_file() {
    let folder = tempfile::tempdir().unwrap();
    let harms: [fn(&Path); 4] = [
        truncate,
        |path| std::fs::write(path, vec![0xa5; 1 << 16]).unwrap(),
        replace,
        |path| std::fs::remove_file(path).unwrap(),
    ];
    for harm in harms {
        let path = sample_in(folder.path());
        let directions = open(&path, Mode::Copied);
        let before = score(&Probe::new(directions.clone(), LAYER).unwrap());
        harm(&path);
        // Whatever is asked of it now, also for the first time.
        assert_eq!(score(&Probe::new(directions.clone(), LAYER).unwrap()), before);
        assert_eq!(directions.layer(3).unwrap().direction[..], forge::tensors()[2]);
        assert_eq!(directions.manifest(), &forge::typed_manifest());
    }
}

#[test]
fn mapped_directions_outlive_a_replacement_and_a_removal() {
    let folder = tempfile::tempdir().unwrap();
    let harms: [fn(&Path); 2] = [replace, |path| std::fs::remove_file(path).unwrap()];
    for harm in harms {
        let path = sample_in(folder.path());
        let directions = open(&path, Mode::Mapped);
        let before = score(&Probe::new(directions.clone(), LAYER).unwrap());
        harm(&path);
        assert_eq!(score(&Probe::new(directions.clone(), LAYER).unwrap()), before);
        assert_eq!(directions.layer(3).unwrap().direction[..], forge::tensors()[2]);
    }
}

#[test]
fn a_probe_from_a_mapped_file_outlives_a_truncation() {
    let Some(path) = child_file() else {
        let folder = tempfile::tempdir().unwrap();
        let path = sample_in(folder.path());
        let output = again("a_probe_from_a_mapped_file_outlives_a_truncation", &path, "exec \"$@\"");
        assert!(output.status.success(), "{output:?}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0, "the child truncated it");
        return;
    };
    let directions = open(&path, Mode::Mapped);
    let probe = Probe::new(directions.clone(), LAYER).unwrap();
    let before = score(&probe);
    truncate(&path);
    assert_eq!(score(&probe), before);
    assert_eq!(directions.manifest(), &forge::typed_manifest());
}

/// The other half of what is documented: what still lies in the file is gone, and to read it is fatal.
#[cfg(target_os = "linux")]
#[test]
fn to_read_a_truncated_mapped_file_ends_the_process() {
    const BUS_ERROR: i32 = 7;
    let Some(path) = child_file() else {
        let folder = tempfile::tempdir().unwrap();
        let path = sample_in(folder.path());
        let output =
            again("to_read_a_truncated_mapped_file_ends_the_process", &path, "ulimit -c 0; exec \"$@\"");
        assert_eq!(output.status.signal(), Some(BUS_ERROR), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("truncated"), "{output:?}");
        return;
    };
    let directions = open(&path, Mode::Mapped);
    truncate(&path);
    println!("truncated");
    let _ = Probe::new(directions, LAYER);
}

#[test]
fn a_disk_that_takes_no_more_leaves_the_old_file() {
    let Some(path) = child_file() else {
        let folder = tempfile::tempdir().unwrap();
        let path = sample_in(folder.path());
        let before = std::fs::read(&path).unwrap();
        // Files of this process may have one block (512 or 1024 bytes), as if the disk were full then.
        let shell = "trap '' XFSZ; ulimit -f 1; exec \"$@\"";
        let output = again("a_disk_that_takes_no_more_leaves_the_old_file", &path, shell);
        assert!(output.status.success(), "{output:?}");
        assert!(before.len() > 1024 && std::fs::read(&path).unwrap() == before);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no litter");
        return;
    };
    let error = write_sample(&path, |m| m.layers[0].calibration.as_mut().unwrap().sigma = 5.0).unwrap_err();
    assert_eq!(error.status(), Status::Io);
    assert!(error.to_string().contains("cannot write"), "{error}");
}

#[test]
fn a_folder_that_may_not_be_written_leaves_the_old_file() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = sample_in(folder.path());
    let before = std::fs::read(&path).unwrap();
    let permit = |mode| std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(mode)).unwrap();
    permit(0o555);
    let privileged = std::fs::File::create(folder.path().join("probe")).is_ok();
    let written = write_sample(&path, |m| m.layers[0].calibration.as_mut().unwrap().sigma = 5.0);
    permit(0o755);
    if privileged {
        skipped::skipped("a folder that may not be written", "root may write everywhere");
        return;
    }
    assert_eq!(written.unwrap_err().status(), Status::Io);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}
