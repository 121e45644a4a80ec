//! include/emaudit.h is what cbindgen makes of src/ffi today.

use super::toolchain::root;

/// The files of the ABI, in the order of the header.
const SOURCES: [&str; 15] = [
    "version",
    "error",
    "kernel",
    "tensor",
    "directions",
    "identity",
    "layers",
    "probe",
    "steering",
    "device",
    "drift",
    "monitor",
    "audit",
    "log",
    "slot",
];

fn generate() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    for name in SOURCES {
        builder = builder.with_src(root().join(format!("src/ffi/{name}.rs")));
    }
    let mut bytes = Vec::new();
    builder.generate().unwrap().write(&mut bytes);
    String::from_utf8(bytes).unwrap()
}

#[test]
fn header_is_the_generated_one() {
    let path = root().join("include/emaudit.h");
    let generated = generate();
    if std::env::var_os("EMAUDIT_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let differing = generated.lines().zip(committed.lines()).position(|(new, old)| new != old);
    assert!(
        generated == committed,
        "include/emaudit.h is stale, first at line {}. Update it with:\n  \
         EMAUDIT_UPDATE_HEADER=1 cargo test -p emaudit --test c_abi header",
        differing.map_or(committed.lines().count(), |line| line) + 1
    );
}

#[test]
fn every_file_of_the_abi_is_in_the_header() {
    let mut files: Vec<String> = std::fs::read_dir(root().join("src/ffi"))
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .filter(|name| !["mod", "boundary", "boundary_tests"].contains(&name.as_str()))
        .collect();
    files.sort();
    let mut listed = SOURCES.to_vec();
    listed.sort_unstable();
    assert_eq!(files, listed);
}
