//! tests/c/demo_check.c on generated data, as the demo runs it on real activations.

use super::fixture::{self, LAYER, WIDTH};
use super::toolchain::{Build, Linkage, Standard, run};
use emaudit::activations::Rows;
use emaudit::directions::{Directions, OpenOptions};
use emaudit::kernel;
use emaudit::probe::{Probe, ScoreUnit};
use std::path::Path;
use std::sync::Arc;

const ROWS: usize = 33;

fn little_endian(header: &[usize], values: &[f32]) -> Vec<u8> {
    let header = header.iter().flat_map(|n| u32::try_from(*n).unwrap().to_le_bytes());
    header.chain(values.iter().flat_map(|x| x.to_le_bytes())).collect()
}

fn scores(directory: &Path, kernel: kernel::KernelKind, rows: &[f32]) -> Vec<f32> {
    let path = directory.join("specific.safetensors");
    let directions = Arc::new(Directions::open(path, &OpenOptions::default()).unwrap());
    let probe = Probe::with_kernel(directions, LAYER, kernel).unwrap();
    let mut scores = vec![0.0; ROWS];
    let rows = Rows::new(rows, ROWS, WIDTH, WIDTH).unwrap();
    probe.score(&rows, ScoreUnit::AlignedSd, &mut scores, None).unwrap();
    scores
}

#[test]
fn demo_check_agrees_on_every_kernel_and_notices_a_wrong_bit() {
    let directory = tempfile::tempdir().unwrap();
    fixture::write_all(directory.path());
    let program =
        Build::new(Standard::C11, Linkage::Shared).run(directory.path(), "demo", &["tests/c/demo_check.c"]);
    let rows: Vec<f32> = fixture::values(ROWS * WIDTH, 9).iter().map(|x| x * 3.0).collect();
    let at = |name: &str| directory.path().join(name);
    std::fs::write(at("activations.bin"), little_endian(&[ROWS, WIDTH], &rows)).unwrap();
    let check = |kernel: &str| {
        let mut command = program.command();
        command.arg(at("specific.safetensors")).arg(at("activations.bin")).arg(at("scores.bin"));
        command.arg(LAYER.to_string()).arg(kernel);
        command
    };
    assert!(!kernel::available().is_empty());
    for kind in kernel::available() {
        let scores = scores(directory.path(), *kind, &rows);
        std::fs::write(at("scores.bin"), little_endian(&[ROWS], &scores)).unwrap();
        let output = run(&mut check(kind.as_str()));
        assert!(output.ends_with("demo_check: ok\n"), "{output}");

        let mut wrong = scores;
        wrong[7] = f32::from_bits(wrong[7].to_bits() ^ 1);
        std::fs::write(at("scores.bin"), little_endian(&[ROWS], &wrong)).unwrap();
        let output = check(kind.as_str()).output().unwrap();
        assert!(!output.status.success(), "a wrong bit passed");
        assert!(String::from_utf8_lossy(&output.stderr).contains("row 7"), "{output:?}");
    }
    let output = check("abacus").output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && message.contains("available: scalar, portable"), "{message}");
}
