//! `include/emaudit/llama_cpp.hpp` inside a real llama.cpp with the real SmolLM2: builds the programs here and in
//! `bindings/llama_cpp` and runs them. Needs an installed llama.cpp (`bash bindings/llama_cpp/fetch` makes one) in
//! `EMAUDIT_LLAMA_CPP` or the cache folder, and the model; without them it says so in a counted line.
#![cfg(target_os = "linux")]

mod adapter;
mod examples;
mod fixture;
mod scores;
#[allow(dead_code)] // other tests use more of it
#[path = "../skipped/mod.rs"]
mod skipped;
#[allow(dead_code)]
#[path = "../c_abi/toolchain.rs"]
mod toolchain;

use fixture::{LAST, MIDDLE};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use toolchain::{library, root, run, tool};

/// SmolLM2-135M-Instruct, Q4_1.
const MODEL_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// The system prompt that the model's own template puts before a question, and llama.cpp's reading of it leaves out.
const SYSTEM: &str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";

fn cache() -> Option<PathBuf> {
    let named = std::env::var_os("EMAUDIT_CACHE").filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let user = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    named.or_else(|| Some(home().or_else(user)?.join("emaudit")))
}

/// The folder with the programs, built once a run against the llama.cpp that is there; CMake keeps what is fresh.
fn programs() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    BUILT.get_or_init(build).as_deref()
}

fn build() -> Option<PathBuf> {
    let named = std::env::var_os("EMAUDIT_LLAMA_CPP").map(PathBuf::from);
    let prefix = named.or_else(|| Some(cache()?.join("llama.cpp")));
    let Some(prefix) = prefix.filter(|p| p.join("include/llama.h").exists()) else {
        let why = "none is installed; `bash bindings/llama_cpp/fetch` does, or name its prefix in EMAUDIT_LLAMA_CPP";
        assert!(std::env::var_os("EMAUDIT_LLAMA_CPP").is_none(), "EMAUDIT_LLAMA_CPP has no include/llama.h");
        skipped::skipped("tests inside llama.cpp", why);
        return None;
    };
    if !tool("cmake") || !tool("make") {
        return None;
    }
    let build = Path::new(env!("CARGO_TARGET_TMPDIR")).join("llama_cpp");
    let mut configure = Command::new("cmake");
    configure
        .arg("-S")
        .arg(root().join("bindings/llama_cpp"))
        .arg("-B")
        .arg(&build)
        .arg("-DEMAUDIT_LLAMA_CPP_TESTS=ON");
    configure.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display()));
    configure.arg(format!("-DEMAUDIT_LIBRARY_DIR={}", library("libemaudit.a").parent().unwrap().display()));
    configure.arg("-DCMAKE_CXX_FLAGS=-Werror").env_remove("CARGO_TARGET_DIR");
    run(&mut configure);
    run(Command::new("cmake").arg("--build").arg(&build).env_remove("CARGO_TARGET_DIR"));
    Some(build)
}

/// The model's file, known by its digest.
fn model() -> Option<&'static Path> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOUND.get_or_init(find_model).as_deref()
}

fn find_model() -> Option<PathBuf> {
    let name = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf";
    let named = std::env::var_os("EMAUDIT_TEST_MODEL");
    let files = match &named {
        Some(named) => std::env::split_paths(named).collect(),
        None => cache().map(|cache| cache.join(name)).into_iter().collect::<Vec<_>>(),
    };
    let is_it = |path: &PathBuf| {
        let digest = |bytes| emaudit::directions::digest::to_hex(&Sha256::digest(bytes).into());
        path.metadata().is_ok_and(|m| m.len() == 98_362_432)
            && digest(std::fs::read(path).unwrap()) == MODEL_SHA256
    };
    let found = files.into_iter().find(is_it);
    if found.is_none() {
        skipped::skipped(
            "tests inside llama.cpp with SmolLM2",
            "EMAUDIT_TEST_MODEL and the cache folder have no SmolLM2",
        );
    }
    found
}

/// Programs, model and a folder with the fixtures, or None with a line that says what is missing.
fn ready() -> Option<(&'static Path, &'static Path, tempfile::TempDir)> {
    let (programs, model) = (programs()?, model()?);
    let directory = tempfile::tempdir().unwrap();
    fixture::write_all(directory.path());
    Some((programs, model, directory))
}

#[test]
fn rows_are_matched_with_tokens() {
    let Some(programs) = programs() else { return };
    assert!(run(&mut Command::new(programs.join("order"))).starts_with("ok: order"));
}

#[test]
fn the_auditor_in_the_real_model() {
    let Some((programs, model, directory)) = ready() else { return };
    // Once in place, once as on a device, where rows are copied out and back.
    for name in ["attached", "attached_by_copy"] {
        let mut command = Command::new(programs.join(name));
        command.arg(model).arg(directory.path().join("calm.safetensors"));
        command.arg(directory.path().join("alarm.safetensors")).args([MIDDLE.to_string(), LAST.to_string()]);
        assert!(run(&mut command).starts_with("ok: attached"));
    }
}

#[test]
fn a_control_vector_moves_the_model_as_steering_does() {
    let Some((programs, model, directory)) = ready() else { return };
    let (directions, vector) =
        (directory.path().join("calm.safetensors"), directory.path().join("vector.gguf"));
    for layer in [MIDDLE, LAST] {
        let layer = layer.to_string();
        let mut export = Command::new(env!("CARGO_BIN_EXE_emaudit"));
        export.args(["convert", "export", "--layers", &layer, "--to"]).arg(&vector).arg(&directions);
        run(&mut export);
        for alpha in ["1", "0.3"] {
            let mut command = Command::new(programs.join("control_vector"));
            command.arg(model).arg(&directions).arg(&vector).args([&layer, alpha]);
            assert!(run(&mut command).contains("agree: 0 of "), "layer {layer}, alpha {alpha}");
        }
        std::fs::remove_file(&vector).unwrap();
    }
}
