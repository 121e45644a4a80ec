//! Gives the shared library its name in the C world: the SONAME carries the ABI major.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Equal to EMAUDIT_ABI_VERSION; tests/c_abi runs programs that only find the library by this name.
    let major = 1;
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libemaudit.so.{major}");
    }
}
