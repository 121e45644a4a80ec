//! The example, a C++ program that Cargo builds, outside the workspace: built and run.

#[path = "../../../tests/c_abi/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use std::path::Path;
use std::process::{Command, Output};

/// Copies the example, with the path of the crate it depends on made absolute.
fn copy(package: &Path, to: &Path) {
    let from = package.join("example");
    std::fs::create_dir(to.join("src")).unwrap();
    for name in ["build.rs", "src/main.rs", "src/audit.cpp", "src/audit.h"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let manifest = std::fs::read_to_string(from.join("Cargo.toml")).unwrap();
    let absolute = manifest.replace("path = \"..\"", &format!("path = {:?}", package.display()));
    assert_ne!(manifest, absolute);
    std::fs::write(to.join("Cargo.toml"), absolute).unwrap();
    // The versions of the workspace, which are on this machine.
    std::fs::copy(package.join("../../Cargo.lock"), to.join("Cargo.lock")).unwrap();
}

#[test]
fn a_cpp_program_built_by_cargo_uses_the_bridge() {
    let directory = tempfile::tempdir().unwrap();
    let (here, package) = (directory.path(), Path::new(env!("CARGO_MANIFEST_DIR")));
    fixture::write_all(here);
    copy(package, here);
    let run = |file: &str| -> Output {
        let mut command = Command::new(env!("CARGO"));
        command.args(["run", "--quiet", "--offline", "--manifest-path"]).arg(here.join("Cargo.toml"));
        command.arg("--target-dir").arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join("consumer"));
        command.arg("--").arg(here.join(file)).output().unwrap()
    };
    let good = run("good.safetensors");
    let (out, errors) = (String::from_utf8_lossy(&good.stdout), String::from_utf8_lossy(&good.stderr));
    assert!(good.status.success() && out.contains("layer 1: score"), "{}\n{out}\n{errors}", good.status);
    let bad = run("text.safetensors");
    assert!(String::from_utf8_lossy(&bad.stderr).contains("NotADirectionFile"), "{bad:?}");
    assert_eq!(bad.status.code(), Some(1));
}
