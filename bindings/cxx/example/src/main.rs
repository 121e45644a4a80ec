//! Only the way in: the program is in C++.

#[cxx::bridge]
mod program {
    unsafe extern "C++" {
        include!("audit-with-cxx/src/audit.h");
        /// The exit status.
        fn audit(path: &str) -> i32;
    }
}

// Links the library although no Rust here calls it.
use emaudit_cxx as _;

fn main() {
    let path = std::env::args().nth(1).unwrap_or_default();
    std::process::exit(program::audit(&path));
}
