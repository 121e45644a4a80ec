//! Generates and compiles the C++ side of the bridge.

fn main() {
    cxx_build::bridge("src/lib.rs").std("c++17").compile("emaudit_cxx_bridge");
    println!("cargo::rerun-if-changed=src/lib.rs");
}
