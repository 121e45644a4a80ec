//! Compiles and runs the programs in tests/c and tests/cpp, and looks at what the library exports.

use super::fixture;
use super::toolchain::{Linkage, Standard, build, root, run, shared_library};
use std::collections::BTreeSet;
use std::process::Command;

const C_SOURCES: [&str; 7] = [
    "tests/c/main.c",
    "tests/c/open.c",
    "tests/c/trust.c",
    "tests/c/score.c",
    "tests/c/steer.c",
    "tests/c/slot.c",
    "tests/c/monitor.c",
];
const CPP_SOURCES: [&str; 2] = ["tests/cpp/main.cpp", "tests/cpp/second_unit.cpp"];

fn check_program(name: &str, standard: Standard, linkage: Linkage, sources: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    fixture::write_all(directory.path());
    let program = build(directory.path(), name, standard, linkage, sources);
    let output = run(Command::new(program).arg(directory.path()));
    assert!(output.starts_with("ok:"), "{output}");
}

#[test]
fn c_with_the_shared_library() {
    check_program("c", Standard::C11, Linkage::Shared, &C_SOURCES);
}

#[test]
fn c_with_the_static_library() {
    check_program("c", Standard::C11, Linkage::Static, &C_SOURCES);
}

#[test]
fn cpp_with_the_shared_library() {
    check_program("cpp", Standard::Cpp17, Linkage::Shared, &CPP_SOURCES);
}

#[test]
fn cpp_with_the_static_library() {
    check_program("cpp", Standard::Cpp17, Linkage::Static, &CPP_SOURCES);
}

/// Named so that the sanitizers' runs, which pick tests by name, have it.
#[test]
fn reload_in_cpp_with_the_static_library() {
    check_program("reload", Standard::Cpp17, Linkage::Static, &["tests/cpp/reload.cpp"]);
}

/// Compiles a file that only includes `header`.
fn include_alone(header: &str, standard: Standard, extra: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let extension = if matches!(standard, Standard::C11 | Standard::C17) { "c" } else { "cpp" };
    let source = directory.path().join("alone").with_extension(extension);
    std::fs::write(&source, format!("#include \"{header}\"\ntypedef int not_empty;\n")).unwrap();
    run(standard
        .compiler()
        .args(extra)
        .arg("-c")
        .arg("-o")
        .arg(directory.path().join("alone.o"))
        .arg(source));
}

#[test]
fn headers_compile_alone() {
    for standard in [Standard::C11, Standard::C17, Standard::Cpp17, Standard::Cpp20] {
        include_alone("emaudit.h", standard, &[]);
    }
    for standard in [Standard::Cpp17, Standard::Cpp20] {
        include_alone("emaudit.hpp", standard, &[]);
        include_alone("emaudit.hpp", standard, &["-fno-exceptions", "-fno-rtti"]);
    }
}

/// Names of the functions the header declares.
fn declared() -> BTreeSet<String> {
    let header = std::fs::read_to_string(root().join("include/emaudit.h")).unwrap();
    let code = header.lines().filter(|line| !line.trim_start().starts_with(['*', '/', '#']));
    let opening = code.filter_map(|line| line.split_once('(').map(|(before, _)| before));
    let names = opening.filter_map(|before| before.rsplit([' ', '*']).next());
    names.filter(|name| name.starts_with("emaudit_")).map(str::to_owned).collect()
}

#[cfg(target_os = "linux")]
#[test]
fn the_shared_library_exports_the_header_and_nothing_else() {
    let listing =
        run(Command::new("nm").args(["-D", "--defined-only", "--format=posix"]).arg(shared_library()));
    let exported: BTreeSet<String> =
        listing.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect();
    let declared = declared();
    assert!(declared.len() > 25, "only {} functions were found in the header", declared.len());
    assert_eq!(exported, declared);
}

#[test]
fn structs_have_the_sizes_of_abi_version_1() {
    use emaudit::ffi::{directions::*, identity::*, layers::*, monitor::*, probe::*, steering::*, tensor::*};
    let sizes = [
        ("emaudit_tensor", size_of::<emaudit_tensor>()),
        ("emaudit_open_options", size_of::<emaudit_open_options>()),
        ("emaudit_directions_info", size_of::<emaudit_directions_info>()),
        ("emaudit_layer_info", size_of::<emaudit_layer_info>()),
        ("emaudit_threshold", size_of::<emaudit_threshold>()),
        ("emaudit_model_identity", size_of::<emaudit_model_identity>()),
        ("emaudit_probe_options", size_of::<emaudit_probe_options>()),
        ("emaudit_probe_info", size_of::<emaudit_probe_info>()),
        ("emaudit_steering_options", size_of::<emaudit_steering_options>()),
        ("emaudit_steer_report", size_of::<emaudit_steer_report>()),
        ("emaudit_monitor_options", size_of::<emaudit_monitor_options>()),
        ("emaudit_verdict", size_of::<emaudit_verdict>()),
    ];
    let directory = tempfile::tempdir().unwrap();
    let mut source = String::from("#include \"emaudit.h\"\n");
    for (name, size) in sizes {
        source += &format!("_Static_assert(sizeof({name}) == {size}, \"{name}\");\n");
    }
    if cfg!(target_pointer_width = "64") {
        let pinned = [40, 48, 76, 24, 40, 64, 8, 16, 40, 48, 16, 96];
        assert_eq!(sizes.map(|(_, size)| size), pinned, "a published struct changed its size");
    }
    let path = directory.path().join("sizes.c");
    std::fs::write(&path, source).unwrap();
    run(Standard::C11.compiler().arg("-c").arg("-o").arg(directory.path().join("sizes.o")).arg(path));
}
