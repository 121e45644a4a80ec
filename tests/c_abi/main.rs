//! The C ABI from outside: C and C++ programs are compiled against the committed headers, linked with the
//! shared and with the static library, and run.

mod allocation;
mod demo;
mod fixture;
mod header;
mod programs;
mod toolchain;
