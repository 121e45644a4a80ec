//! The C ABI from outside: C and C++ programs are compiled against the committed headers, linked with the
//! shared and with the static library or loading it themselves, and run.

mod allocation;
mod cmake;
mod demo;
mod fixture;
mod header;
mod layout;
mod programs;
#[allow(dead_code)] // other tests use more of it
#[path = "../skipped/mod.rs"]
mod skipped;
mod surface;
mod symbols;
mod toolchain;
