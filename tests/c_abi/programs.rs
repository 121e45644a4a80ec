//! Compiles and runs the programs in tests/c and tests/cpp.

use super::fixture;
use super::toolchain::{Build, Family, Linkage, Standard, library, root, run, shared_library};
use std::path::{Path, PathBuf};
use std::process::Command;

const C_SOURCES: [&str; 12] = [
    "tests/c/main.c",
    "tests/c/open.c",
    "tests/c/trust.c",
    "tests/c/score.c",
    "tests/c/steer.c",
    "tests/c/slot.c",
    "tests/c/monitor.c",
    "tests/c/drift.c",
    "tests/c/audit.c",
    "tests/c/landing.c",
    "tests/c/log.c",
    "tests/c/device.c",
];
/// Two units that both include the header: what is not inline, or differs, fails to link.
const CPP_SOURCES: [&str; 2] = ["tests/cpp/main.cpp", "tests/cpp/second_unit.cpp"];

fn check_program(build: Build, sources: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    fixture::write_all(directory.path());
    let program = build.run(directory.path(), "program", sources);
    let output = run(program.command().arg(directory.path()));
    assert!(output.starts_with("ok:"), "{output}");
}

#[test]
fn c_with_the_shared_library() {
    check_program(Build::new(Standard::C11, Linkage::Shared), &C_SOURCES);
}

#[test]
fn c_with_the_static_library() {
    check_program(Build::new(Standard::C11, Linkage::Static), &C_SOURCES);
}

#[test]
fn cpp_with_the_shared_library() {
    check_program(Build::new(Standard::Cpp17, Linkage::Shared), &CPP_SOURCES);
}

#[test]
fn cpp_with_the_static_library() {
    check_program(Build::new(Standard::Cpp17, Linkage::Static), &CPP_SOURCES);
}

#[test]
fn cpp_with_the_loaded_library() {
    check_program(Build::new(Standard::Cpp17, Linkage::Loaded), &CPP_SOURCES);
}

/// A driver that says what it is asked for, in the place of NVIDIA's: one launch a call, and memory that is given back.
#[cfg(all(target_os = "linux", feature = "cuda"))]
#[test]
fn rows_on_a_device_with_a_recorded_driver() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    fixture::write_all(here);
    let mut compiler = Standard::C11.compiler(Family::System);
    compiler.args(["-shared", "-fPIC", "-o"]).arg(here.join("libcuda.so.1"));
    run(compiler.arg(root().join("tests/c/recorded_driver.c")));
    for (standard, sources) in [(Standard::C11, &C_SOURCES[..]), (Standard::Cpp17, &CPP_SOURCES[..])] {
        let folder = tempfile::tempdir().unwrap();
        let program = Build::new(standard, Linkage::Shared).run(folder.path(), "program", sources);
        let output = run(program.command().env("LD_LIBRARY_PATH", here).arg(here));
        let calls: Vec<&str> = output.lines().filter_map(|line| line.strip_prefix("driver: ")).collect();
        let count = |what: &str| calls.iter().filter(|call| call.starts_with(what)).count();
        assert!(count("launch") > 0 && count("load") > 0, "{output}");
        assert_eq!(count("load"), count("unload"), "{output}");
        assert_eq!(count("allocate"), count("free"), "{output}");
        // Nothing but launches between setting up and giving back, in the order of the program.
        let first = calls.iter().position(|call| call.starts_with("launch")).unwrap();
        let launches: Vec<_> = calls[first..].iter().take_while(|call| call.starts_with("launch")).collect();
        let kernels = ["score_f32", "steer_f16", "steer_bf16"];
        assert_eq!(launches.len(), kernels.len(), "{output}");
        for (launch, kernel) in launches.into_iter().zip(kernels) {
            assert!(launch.starts_with(&format!("launch {kernel} x 1 on 0x40 at ")), "{launch}");
        }
    }
}

#[test]
fn cpp20_without_exceptions_and_rtti_in_every_mode() {
    for linkage in [Linkage::Shared, Linkage::Static, Linkage::Loaded] {
        let flags = &["-fno-exceptions", "-fno-rtti"];
        check_program(Build { flags, ..Build::new(Standard::Cpp20, linkage) }, &CPP_SOURCES);
    }
}

#[test]
fn clang_in_every_mode() {
    if !Family::available().contains(&Family::Clang) {
        return;
    }
    let clang = |standard, linkage| Build { family: Family::Clang, ..Build::new(standard, linkage) };
    check_program(clang(Standard::C17, Linkage::Shared), &C_SOURCES);
    check_program(clang(Standard::C17, Linkage::Static), &C_SOURCES);
    check_program(clang(Standard::Cpp17, Linkage::Shared), &CPP_SOURCES);
    check_program(clang(Standard::Cpp20, Linkage::Static), &CPP_SOURCES);
    check_program(clang(Standard::Cpp20, Linkage::Loaded), &CPP_SOURCES);
}

#[test]
fn units_of_both_modes_live_in_one_program() {
    let directory = tempfile::tempdir().unwrap();
    let sources = ["tests/cpp/loaded_unit.cpp", "tests/cpp/linked_unit.cpp"];
    let program = Build::new(Standard::Cpp17, Linkage::Static).run(directory.path(), "both", &sources);
    let output = run(program.command().arg(shared_library()));
    assert!(output.starts_with("ok:"), "{output}");
}

/// Libraries that are no emaudit, or not this one: name and content.
const WRONG_LIBRARIES: [(&str, &str); 3] = [
    ("stranger.so", "int stranger_version(void); int stranger_version(void) { return 1; }"),
    ("other_abi.so", "unsigned emaudit_abi_version(void); unsigned emaudit_abi_version(void) { return 99; }"),
    ("too_old.so", "unsigned emaudit_abi_version(void); unsigned emaudit_abi_version(void) { return 1; }"),
];

fn wrong_library(directory: &Path, name: &str, content: &str) -> PathBuf {
    let (source, path) = (directory.join(name).with_extension("c"), directory.join(name));
    std::fs::write(&source, content).unwrap();
    run(Standard::C11.compiler(Family::System).args(["-shared", "-fPIC", "-o"]).arg(&path).arg(source));
    path
}

#[test]
fn cpp_with_the_loaded_library_missing_or_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    fixture::write_all(here);
    for (name, content) in WRONG_LIBRARIES {
        wrong_library(here, name, content);
    }
    std::fs::copy(shared_library(), here.join("copy.so")).unwrap();
    let program = Build::new(Standard::Cpp17, Linkage::Loaded).run(here, "loader", &["tests/cpp/loader.cpp"]);
    let needed = run(Command::new("nm").args(["-u", "--format=posix"]).arg(&program.path));
    assert!(!needed.contains("emaudit_"), "the program needs the library to link:\n{needed}");
    let good = program.library_directory.join(super::toolchain::soname());
    // The SONAME is nowhere, so only a path finds the library.
    let output = run(program.command().env("LD_LIBRARY_PATH", "/nonexistent").arg(here).arg(good));
    assert!(output.starts_with("ok:"), "{output}");
}

/// A plugin that swallows the static library, as a host would load it.
#[cfg(target_os = "linux")]
#[test]
fn a_plugin_that_links_the_archive_exports_only_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let (source, plugin) = (directory.path().join("plugin.c"), directory.path().join("plugin.so"));
    let content = "#include \"emaudit.h\"\nunsigned plugin_abi(void);\n\
                   unsigned plugin_abi(void) { return emaudit_abi_version(); }\n";
    std::fs::write(&source, content).unwrap();
    let mut compiler = Standard::C11.compiler(Family::System);
    compiler.args(["-shared", "-fPIC", "-o"]).arg(&plugin).arg(source).arg(library("libemaudit.a"));
    run(compiler.args(["-Wl,--exclude-libs,libemaudit.a", "-lpthread", "-ldl", "-lm"]));
    let listing = run(Command::new("nm").args(["-D", "--defined-only", "--format=posix"]).arg(&plugin));
    let names: Vec<&str> = listing.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(names, ["plugin_abi"]);
}

/// Named so that the sanitizers' runs, which pick tests by name, have it.
#[test]
fn reload_in_cpp_with_the_static_library() {
    check_program(Build::new(Standard::Cpp17, Linkage::Static), &["tests/cpp/reload.cpp"]);
}

#[test]
fn reload_in_cpp_with_the_loaded_library() {
    check_program(Build::new(Standard::Cpp17, Linkage::Loaded), &["tests/cpp/reload.cpp"]);
}

/// Compiles a file that only includes `header`.
fn include_alone(header: &str, standard: Standard, family: Family, flags: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("alone").with_extension(if standard.is_c() { "c" } else { "cpp" });
    std::fs::write(&source, format!("#include \"{header}\"\ntypedef int not_empty;\n")).unwrap();
    run(standard.compiler(family).args(flags).arg("-fsyntax-only").arg(source));
}

#[test]
fn headers_compile_alone() {
    for family in Family::available() {
        for standard in [Standard::C11, Standard::C17, Standard::Cpp17, Standard::Cpp20] {
            include_alone("emaudit.h", standard, family, &[]);
        }
        for standard in [Standard::Cpp17, Standard::Cpp20] {
            include_alone("emaudit.hpp", standard, family, &[]);
            include_alone("emaudit.hpp", standard, family, &["-fno-exceptions", "-fno-rtti"]);
            include_alone(
                "emaudit.hpp",
                standard,
                family,
                &["-DEMAUDIT_DYNAMIC", "-fno-exceptions", "-fno-rtti"],
            );
        }
    }
}

/// Headers that need another project's headers; the tests of that binding compile them.
const FOREIGN: [&str; 1] = ["llama_cpp.hpp"];

#[test]
fn every_noun_has_a_header_that_compiles_alone() {
    let mut count = 0;
    for folder in ["emaudit", "emaudit/standalone"] {
        for entry in std::fs::read_dir(root().join("include").join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if !name.ends_with(".hpp") || FOREIGN.contains(&name.as_str()) {
                continue;
            }
            let flags: &[&str] = if name == "dynamic.hpp" { &["-DEMAUDIT_DYNAMIC"] } else { &[] };
            include_alone(&format!("{folder}/{name}"), Standard::Cpp17, Family::System, flags);
            count += 1;
        }
    }
    assert!(count >= 10, "only {count} headers");
}
