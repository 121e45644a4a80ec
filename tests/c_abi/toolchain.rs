//! Finds the compilers and the freshly built libraries, and runs programs.

use super::skipped::missing;
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

/// A language standard, which decides the language.
#[derive(Clone, Copy, Debug)]
pub enum Standard {
    C11,
    C17,
    Cpp17,
    Cpp20,
}

/// Whose compiler.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Family {
    /// `cc` and `c++`, or what `CC` and `CXX` name.
    System,
    Clang,
}

impl Family {
    /// Those that are here; a missing clang is reported.
    pub fn available() -> Vec<Family> {
        let mut list = vec![Family::System];
        if tool("clang") && tool("clang++") {
            list.push(Family::Clang);
        }
        list
    }
}

impl Standard {
    pub fn is_c(self) -> bool {
        matches!(self, Standard::C11 | Standard::C17)
    }

    fn flag(self) -> &'static str {
        match self {
            Standard::C11 => "-std=c11",
            Standard::C17 => "-std=c17",
            Standard::Cpp17 => "-std=c++17",
            Standard::Cpp20 => "-std=c++20",
        }
    }

    /// A command that compiles this language with all warnings.
    pub fn compiler(self, family: Family) -> Command {
        let (variable, default) = if self.is_c() { ("CC", "cc") } else { ("CXX", "c++") };
        let name = match family {
            Family::System => std::env::var(variable).unwrap_or_else(|_| default.to_owned()),
            Family::Clang => String::from(if self.is_c() { "clang" } else { "clang++" }),
        };
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

/// Whether an optional tool is here. If not, it says so in a line of its own, which `.ci/run` counts.
pub fn tool(name: &str) -> bool {
    let found = Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        missing(&format!("tests with {name}"), "it is not installed");
    }
    found
}

/// How a program gets the library.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Linkage {
    Shared,
    Static,
    /// By the program itself, at run time: `EMAUDIT_DYNAMIC`.
    Loaded,
}

/// A program and the directory that holds the shared library by its SONAME and nothing else.
pub struct Program {
    pub path: PathBuf,
    pub library_directory: PathBuf,
    linkage: Linkage,
}

impl Program {
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        if self.linkage == Linkage::Loaded {
            command.env("LD_LIBRARY_PATH", &self.library_directory);
        }
        command
    }
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

/// The file name by which programs find the shared library.
pub fn soname() -> String {
    let name = format!("libemaudit.so.{}", emaudit::ffi::version::EMAUDIT_ABI_VERSION);
    if cfg!(target_os = "linux") { name } else { "libemaudit.dylib".into() }
}

/// What to build besides the sources.
#[derive(Clone, Copy)]
pub struct Build<'a> {
    pub standard: Standard,
    pub family: Family,
    pub linkage: Linkage,
    pub flags: &'a [&'a str],
}

impl Build<'_> {
    pub fn new(standard: Standard, linkage: Linkage) -> Self {
        Build { standard, family: Family::System, linkage, flags: &[] }
    }

    /// Compiles `sources` (relative to the package) into `directory/name` and links the library.
    ///
    /// The shared library is found at run time by its SONAME alone.
    pub fn run(self, directory: &Path, name: &str, sources: &[&str]) -> Program {
        let path = directory.join(name);
        let mut compiler = self.standard.compiler(self.family);
        compiler.args(self.flags).arg("-o").arg(&path);
        compiler.args(sources.iter().map(|source| root().join(source)));
        if std::env::var(SANITIZE).is_ok_and(|sanitizers| sanitizers == "thread") {
            compiler.arg(root().join(THREAD_SANITIZER));
        }
        let library_directory = directory.join(format!("{name}-run"));
        if self.linkage != Linkage::Static {
            std::fs::create_dir(&library_directory).unwrap();
            std::fs::copy(shared_library(), library_directory.join(soname())).unwrap();
        }
        match self.linkage {
            Linkage::Shared => {
                compiler.arg(shared_library()).arg(format!("-Wl,-rpath,{}", library_directory.display()))
            }
            Linkage::Static => compiler.arg(library("libemaudit.a")),
            Linkage::Loaded => compiler.arg("-DEMAUDIT_DYNAMIC"),
        };
        run(compiler.args(SYSTEM_LIBRARIES));
        Program { path, library_directory, linkage: self.linkage }
    }
}
