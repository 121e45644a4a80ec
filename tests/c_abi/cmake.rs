//! bindings/cmake: the example project against what Cargo built, and against an installed copy; pkg-config.
#![cfg(target_os = "linux")]

use super::fixture;
use super::toolchain::{Family, Standard, library, root, run, shared_library, tool};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A directory with both libraries, as Cargo names them, and the fixtures.
fn built_libraries(directory: &Path) -> PathBuf {
    let libraries = directory.join("libraries");
    std::fs::create_dir(&libraries).unwrap();
    for path in [shared_library(), library("libemaudit.a")] {
        std::fs::copy(&path, libraries.join(path.file_name().unwrap())).unwrap();
    }
    fixture::write_all(directory);
    libraries
}

fn has_cmake() -> bool {
    tool("cmake") && tool("make")
}

fn cmake(arguments: &[&str]) {
    // Sanitizers are for the other programs; a CMake project has its own flags.
    run(Command::new("cmake").args(arguments).env_remove("CARGO_TARGET_DIR"));
}

fn option(name: &str, value: &Path) -> String {
    format!("-D{name}={}", value.display())
}

/// Copies the example's three files to where nothing of the source tree is around them.
fn consumer(directory: &Path) -> PathBuf {
    let to = directory.join("consumer");
    std::fs::create_dir(&to).unwrap();
    for name in ["CMakeLists.txt", "audit.c", "audit.cpp"] {
        std::fs::copy(root().join("bindings/cmake/example").join(name), to.join(name)).unwrap();
    }
    to
}

/// Configures, builds and runs the example. `libraries` is where the dynamic program finds the SONAME.
fn check_example(directory: &Path, build: &str, options: &[String], libraries: &Path) {
    let (source, build) = (consumer(directory), directory.join(build));
    let mut arguments = vec!["-S", source.to_str().unwrap(), "-B", build.to_str().unwrap()];
    arguments.extend(options.iter().map(String::as_str));
    cmake(&arguments);
    cmake(&["--build", build.to_str().unwrap()]);
    let version = env!("CARGO_PKG_VERSION");
    for name in ["audit_shared", "audit_static", "audit_dynamic", "audit_c"] {
        let mut program = Command::new(build.join(name));
        if name == "audit_dynamic" {
            program.env("LD_LIBRARY_PATH", libraries);
        }
        let output = run(program.arg(directory.join("good.safetensors")));
        assert!(output.starts_with(&format!("emaudit {version}")), "{name}: {output}");
        let refused =
            Command::new(build.join(name)).arg(directory.join("absent.safetensors")).output().unwrap();
        assert!(!refused.status.success() && !refused.stderr.is_empty(), "{name}: {refused:?}");
    }
}

#[test]
fn the_example_project_finds_what_cargo_built() {
    if !has_cmake() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let options = [
        option("emaudit_DIR", &root().join("bindings/cmake")),
        option("EMAUDIT_LIBRARY_DIR", &built_libraries(here)),
    ];
    check_example(here, "build", &options, &here.join("build/emaudit"));
}

#[test]
fn the_example_project_and_pkg_config_find_an_installed_copy() {
    if !has_cmake() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (here, prefix) = (directory.path(), directory.path().join("prefix"));
    let (source, build) = (root().join("bindings/cmake"), here.join("install"));
    let (libraries, prefix_option) =
        (option("EMAUDIT_LIBRARY_DIR", &built_libraries(here)), option("CMAKE_INSTALL_PREFIX", &prefix));
    let (source, build) = (source.to_str().unwrap(), build.to_str().unwrap());
    cmake(&["-S", source, "-B", build, &libraries, &prefix_option, "-DCMAKE_INSTALL_LIBDIR=lib"]);
    cmake(&["--install", build]);
    check_example(here, "build", &[option("CMAKE_PREFIX_PATH", &prefix)], &prefix.join("lib"));
    if tool("pkg-config") {
        check_pkg_config(here, &prefix);
    }
}

/// A project that has the headers and nothing else: no package, no library to link, and it starts without one.
#[test]
fn headers_alone_and_a_library_found_at_run_time() {
    let directory = tempfile::tempdir().unwrap();
    let (here, libraries) = (directory.path(), built_libraries(directory.path()));
    let headers = here.join("third_party/emaudit");
    for folder in ["", "emaudit", "emaudit/standalone"] {
        std::fs::create_dir_all(headers.join(folder)).unwrap();
        for entry in
            std::fs::read_dir(root().join("include").join(folder)).unwrap().map(|e| e.unwrap().path())
        {
            if entry.is_file() {
                std::fs::copy(&entry, headers.join(folder).join(entry.file_name().unwrap())).unwrap();
            }
        }
    }
    let (source, program) = (consumer(here).join("audit.cpp"), here.join("audit"));
    let name = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let mut compiler = Command::new(name);
    compiler.args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-DEMAUDIT_DYNAMIC", "-I"]).arg(&headers);
    run(compiler.arg(source).arg("-o").arg(&program).arg("-ldl"));
    let mut alone = Command::new(&program);
    let alone = alone.arg(here.join("good.safetensors")).env("LD_LIBRARY_PATH", here).output().unwrap();
    assert!(String::from_utf8_lossy(&alone.stderr).contains("cannot load the emaudit library"), "{alone:?}");
    assert_eq!(alone.status.code(), Some(1));
    std::fs::rename(libraries.join("libemaudit.so"), libraries.join(super::toolchain::soname())).unwrap();
    let mut with = Command::new(&program);
    let output = run(with.arg(here.join("good.safetensors")).env("LD_LIBRARY_PATH", libraries));
    assert!(output.starts_with("emaudit "), "{output}");
}

fn check_pkg_config(directory: &Path, prefix: &Path) {
    let ask = |arguments: &[&str]| {
        let path = prefix.join("lib/pkgconfig");
        run(Command::new("pkg-config").args(arguments).arg("emaudit").env("PKG_CONFIG_PATH", path))
    };
    assert_eq!(ask(&["--modversion"]).trim(), env!("CARGO_PKG_VERSION"));
    assert!(ask(&["--static", "--libs"]).contains("-ldl"));
    let program = directory.join("by_pkg_config");
    let mut compiler = Standard::C11.compiler(Family::System);
    compiler.arg(root().join("bindings/cmake/example/audit.c")).arg("-o").arg(&program);
    run(compiler.args(ask(&["--cflags", "--libs"]).split_whitespace()));
    let mut command = Command::new(program);
    let output =
        run(command.arg(directory.join("good.safetensors")).env("LD_LIBRARY_PATH", prefix.join("lib")));
    assert!(output.contains("width 67, 2 layers"), "{output}");
}
