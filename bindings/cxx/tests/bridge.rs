//! Compiles bridge.cpp against the generated header, links it with the static library as a C++ project would,
//! and runs it.

#[path = "../../../tests/c_abi/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use std::path::{Path, PathBuf};
use std::process::Command;

/// The newest static library beside the test executable; Cargo adds a hash to its name.
fn library() -> PathBuf {
    let executable = std::env::current_exe().unwrap();
    let beside = executable.parent().unwrap().read_dir().unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let ours = beside.filter(|path| name(path).starts_with("libemaudit_cxx") && name(path).ends_with(".a"));
    let newest = ours.max_by_key(|path| path.metadata().unwrap().modified().unwrap());
    newest.unwrap_or_else(|| panic!("libemaudit_cxx*.a is not beside {}", executable.display()))
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout.into_owned()
}

#[test]
fn cpp_uses_the_bridge() {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    if let Err(reason) = Command::new(&compiler).arg("--version").output() {
        panic!("this test needs a C++ compiler: cannot run `{compiler}` ({reason}); install one or set CXX");
    }
    let directory = tempfile::tempdir().unwrap();
    fixture::write_all(directory.path());
    let program = directory.path().join("bridge");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bridge.cpp");
    let include = Path::new(env!("OUT_DIR")).join("cxxbridge/include");
    let mut command = Command::new(compiler);
    command.args(["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]);
    // The header of the cxx runtime is not ours to warn about.
    command.arg("-isystem").arg(include).arg(source).arg(library()).arg("-o").arg(&program);
    run(command.args(["-lpthread", "-ldl", "-lm"]));
    assert_eq!(run(Command::new(program).arg(directory.path())), "ok: cxx\n");
}
