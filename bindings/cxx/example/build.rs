//! Compiles audit.cpp. The headers of emaudit's bridge are found because emaudit-cxx is a dependency.

fn main() {
    cxx_build::bridge("src/main.rs").file("src/audit.cpp").std("c++17").compile("audit_with_cxx");
    for file in ["src/main.rs", "src/audit.cpp", "src/audit.h"] {
        println!("cargo::rerun-if-changed={file}");
    }
}
