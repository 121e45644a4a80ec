//! Compiles tests/cpp/standalone.cpp, in two translation units, with every warning an error.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const FLAGS: [&str; 8] =
    ["-O1", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-fno-exceptions", "-fno-rtti"];
const SOURCES: [&str; 2] = ["tests/cpp/standalone.cpp", "tests/cpp/standalone_unit.cpp"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The C++ compiler of the tests.
pub fn default() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".into())
}

/// Whether a compiler makes a program that starts, with these flags.
pub fn works(name: &str, flags: &[&str]) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let (source, program) = (folder.path().join("empty.cpp"), folder.path().join("empty"));
    std::fs::write(&source, "int main() { return 0; }\n").unwrap();
    let built = Command::new(name).args(flags).arg(&source).arg("-o").arg(&program).output();
    built.is_ok_and(|o| o.status.success())
        && Command::new(&program).output().is_ok_and(|o| o.status.success())
}

/// Compiles and links both units to `program`.
pub fn build(name: &str, flags: &[&str], program: PathBuf) -> PathBuf {
    let mut command = Command::new(name);
    command.args(FLAGS).args(flags).arg("-I").arg(root().join("include"));
    command.args(SOURCES.map(|source| root().join(source))).arg("-o").arg(&program);
    let output = run(&mut command);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{errors}", output.status);
    program
}

/// Compiles a file that only includes one header; gives the compiler's answer.
pub fn include(name: &str, flags: &[&str], header: &str) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("alone.cpp");
    std::fs::write(&source, format!("#include \"{header}\"\n")).unwrap();
    let mut command = Command::new(name);
    run(command
        .args(FLAGS)
        .args(flags)
        .arg("-fsyntax-only")
        .arg("-I")
        .arg(root().join("include"))
        .arg(source))
}

fn run(command: &mut Command) -> Output {
    let cause = "install a C++ compiler, or name one in CXX";
    command.output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}; {cause}"))
}
