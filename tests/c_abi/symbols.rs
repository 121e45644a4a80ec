//! What the two libraries show to a linker.
#![cfg(target_os = "linux")]

use super::surface::declared;
use super::toolchain::{library, run, shared_library, soname};
use std::collections::BTreeSet;
use std::process::Command;

/// Global symbols that a library defines.
fn defined(nm: &mut Command) -> BTreeSet<String> {
    let listing = run(nm.args(["--defined-only", "--format=posix"]));
    let fields = listing.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.filter(|fields| fields.len() >= 3).map(|fields| fields[0].to_owned()).collect()
}

#[test]
fn the_shared_library_exports_the_header_and_nothing_else() {
    assert_eq!(defined(Command::new("nm").arg("-D").arg(shared_library())), declared());
}

/// An archive cannot hide what its members share: Rust's own names stay visible, all of them mangled. Names that
/// C code could collide with are ours or reserved for the implementation (compiler-rt).
#[test]
fn the_static_library_takes_no_name_of_a_c_program() {
    let symbols = defined(Command::new("nm").arg("-g").arg(library("libemaudit.a")));
    assert!(declared().is_subset(&symbols));
    let mangled = |name: &str| name.starts_with("_R") || name.starts_with("_ZN");
    let implementation =
        |name: &str| name.starts_with("__") || name.starts_with("DW.ref.") || name.starts_with("rust_");
    let taken: Vec<&String> = symbols
        .iter()
        .filter(|name| !name.starts_with("emaudit_") && !mangled(name) && !implementation(name))
        .collect();
    assert!(taken.is_empty(), "{taken:?}");
}

#[test]
fn the_soname_carries_the_abi() {
    let dynamic = run(Command::new("readelf").args(["-d", "--wide"]).arg(shared_library()));
    let line = dynamic.lines().find(|line| line.contains("(SONAME)")).unwrap_or_default();
    assert!(line.ends_with(&format!("[{}]", soname())), "{line}");
}
