//! Finds the compilers and the freshly built libraries, and runs programs.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Every warning of the house, as errors.
const WARNINGS: [&str; 5] = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"];

/// What the static library needs of the system.
const SYSTEM_LIBRARIES: [&str; 3] = ["-lpthread", "-ldl", "-lm"];

/// Names the sanitizers the programs are built with, such as `address,undefined`; what they find ends them.
const SANITIZE: &str = "EMAUDIT_SANITIZE";

/// What a program with the thread sanitizer needs besides its own sources.
const THREAD_SANITIZER: &str = "tests/c/thread_sanitizer.c";

/// A language standard, which decides the compiler.
#[derive(Clone, Copy, Debug)]
pub enum Standard {
    C11,
    C17,
    Cpp17,
    Cpp20,
}

impl Standard {
    fn flag(self) -> &'static str {
        match self {
            Standard::C11 => "-std=c11",
            Standard::C17 => "-std=c17",
            Standard::Cpp17 => "-std=c++17",
            Standard::Cpp20 => "-std=c++20",
        }
    }

    /// A command that compiles this language with all warnings.
    pub fn compiler(self) -> Command {
        let (variable, default) = match self {
            Standard::C11 | Standard::C17 => ("CC", "cc"),
            Standard::Cpp17 | Standard::Cpp20 => ("CXX", "c++"),
        };
        let name = std::env::var(variable).unwrap_or_else(|_| default.to_owned());
        if let Err(reason) = Command::new(&name).arg("--version").output() {
            panic!(
                "the C ABI tests need a compiler: cannot run `{name}` ({reason}); install one or set {variable}"
            );
        }
        let mut command = Command::new(name);
        command.arg(self.flag()).args(WARNINGS).arg("-O1").arg("-I").arg(root().join("include"));
        if let Ok(sanitizers) = std::env::var(SANITIZE) {
            command.arg(format!("-fsanitize={sanitizers}"));
            command.args(["-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]);
        }
        command
    }
}

/// How a program gets the library.
#[derive(Clone, Copy, Debug)]
pub enum Linkage {
    Shared,
    Static,
}

/// The package's directory.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command to success and gives its standard output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout.into_owned()
}

/// The newest library of that file name beside the test executable (`deps`) or above it.
pub fn library(name: &str) -> PathBuf {
    let executable = std::env::current_exe().unwrap();
    let places = executable.ancestors().skip(1).take(2).map(|directory| directory.join(name));
    let newest =
        places.filter(|path| path.exists()).max_by_key(|p| p.metadata().unwrap().modified().unwrap());
    newest.unwrap_or_else(|| panic!("{name} is not beside {}: run `cargo build` first", executable.display()))
}

/// The shared library.
pub fn shared_library() -> PathBuf {
    library(&format!("{}emaudit{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX))
}

/// Compiles `sources` (relative to the package) into `directory/name` and links the library.
///
/// The shared library is found at run time by its SONAME alone, in a directory that holds nothing else.
pub fn build(
    directory: &Path,
    name: &str,
    standard: Standard,
    linkage: Linkage,
    sources: &[&str],
) -> PathBuf {
    let program = directory.join(format!("{name}-{linkage:?}"));
    let mut compiler = standard.compiler();
    compiler.arg("-o").arg(&program).args(sources.iter().map(|source| root().join(source)));
    if std::env::var(SANITIZE).is_ok_and(|sanitizers| sanitizers == "thread") {
        compiler.arg(root().join(THREAD_SANITIZER));
    }
    match linkage {
        Linkage::Shared => {
            let library = shared_library();
            let found_at = directory.join(format!("{name}-run"));
            std::fs::create_dir(&found_at).unwrap();
            let soname = format!("libemaudit.so.{}", emaudit::ffi::version::EMAUDIT_ABI_VERSION);
            let alias = if cfg!(target_os = "linux") { soname.as_str() } else { "libemaudit.dylib" };
            std::fs::copy(&library, found_at.join(alias)).unwrap();
            compiler.arg(library).arg(format!("-Wl,-rpath,{}", found_at.display()));
        }
        Linkage::Static => {
            compiler.arg(library("libemaudit.a"));
        }
    }
    run(compiler.args(SYSTEM_LIBRARIES));
    program
}
