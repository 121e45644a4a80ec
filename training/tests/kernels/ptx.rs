//! The embedded PTX: made from the committed source, fit for every launch, free of what kernels should not do.

use crate::device::KERNELS;
use crate::skipped::{missing, skipped};
use emaudit_device::nvrtc::{Nvrtc, VERSION};
use emaudit_train::cuda::PTX;
use emaudit_train::cuda::launch::{self, Argument, Decoded, Launch, Rows, THREADS};
use emaudit_train::model::ops::Activation;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// Set to write the PTX instead of comparing it.
const UPDATE: &str = "EMAUDIT_UPDATE_PTX";
/// The lowest card; what its PTX says runs on later ones too.
const FLOOR: u32 = 75;
/// Cards whose PTX or machine code is made and thrown away.
const OTHERS: [u32; 2] = [80, 90];

/// What stands above the compiler's text, so that a change of the source is seen without a compiler.
fn heading() -> String {
    let digest = Sha256::digest(emaudit_device::source(KERNELS));
    let digest: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    format!(
        "// From kernels.cu and portable.h by NVRTC {}.{}; CONTRIBUTING.md says how. SHA-256 of both: {digest}\n",
        VERSION.0, VERSION.1
    )
}

/// Types of the parameters of every kernel.
fn entries() -> BTreeMap<&'static str, Vec<&'static str>> {
    let mut entries = BTreeMap::new();
    for entry in PTX.split(".visible .entry ").skip(1) {
        let (name, rest) = entry.split_once('(').unwrap();
        let (parameters, _) = rest.split_once(')').unwrap();
        let kind = |line: &'static str| line.trim().strip_prefix(".param ")?.split(' ').next();
        entries.insert(name, parameters.lines().filter_map(kind).collect());
    }
    entries
}

/// Every launch there is, with sizes that do not matter here.
fn launches() -> Vec<Launch<()>> {
    let (one, two, three) = ([(); 1], [(); 2], [(); 3]);
    let rows = Rows { keys: 1, queries: 1, heads: 1, batch: 1, offset: 0, shared: 0, window: None };
    let all = [
        launch::rms_norm(two, (), 1, 1, 0.0),
        launch::rms_norm_grad(three, (), 1, 1, 0.0),
        launch::rope(three, (), (1, 1, 2), 1.0),
        launch::gated(two, (), 1, Activation::Silu),
        launch::gated_grad(three, (), 1, Activation::GeluTanh),
        launch::soft_cap(one, (), 1, 1.0),
        launch::soft_cap_grad(two, (), 1, 1.0),
        launch::cross_entropy(two, (), 1, 1),
        launch::cross_entropy_grad(three, (), 1, 1),
        launch::mean(one, (), 1),
        launch::attention_weights(two, (), &rows, 1.0, None),
        launch::attention_weights_grad(three, (), (1, 1), 1.0, None),
        launch::nf4(three, (), 64, 0.0, Decoded::F32),
        launch::nf4(three, (), 64, 0.0, Decoded::Bf16),
        launch::dropout(one, (), (1, 1), 0, 0, 1.0),
    ];
    all.into_iter().map(Result::unwrap).collect()
}

#[test]
fn every_launch_fits_its_kernel_and_every_kernel_is_launched() {
    let entries = entries();
    let launches = launches();
    for launch in &launches {
        let kind = |a: &Argument<()>| match a {
            Argument::Memory(()) | Argument::U64(_) => ".u64",
            Argument::U32(_) => ".u32",
            Argument::F32(_) => ".f32",
        };
        let own: Vec<&str> = launch.arguments.iter().map(kind).collect();
        assert_eq!(entries.get(launch.kernel), Some(&own), "{}", launch.kernel);
    }
    let mut names: Vec<&str> = launches.iter().map(|l| l.kernel).collect();
    names.sort_unstable();
    assert_eq!(names, entries.into_keys().collect::<Vec<_>>());
}

#[test]
fn the_code_is_what_it_should_be() {
    assert!(PTX.contains(".version 8.0\n") && PTX.contains(&format!(".target sm_{FLOOR}\n")));
    let kernels = PTX.matches(".visible .entry ").count();
    assert_eq!(PTX.matches(&format!(".maxntid {THREADS}, 1, 1\n")).count(), kernels);
    assert!(!PTX.contains(".local"), "a kernel spills into memory");
    // Decoded weights are written 16 bytes at a time.
    for kernel in ["nf4_to_f32", "nf4_to_bf16"] {
        let body = PTX.split(&format!(".visible .entry {kernel}(")).nth(1).unwrap();
        assert!(body.split(".visible .entry ").next().unwrap().contains("st.global.v4"), "{kernel}");
    }
}

#[test]
fn the_embedded_ptx_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/kernels.ptx");
    let nvrtc = match Nvrtc::find() {
        Ok(nvrtc) => nvrtc,
        Err(why) => {
            assert!(std::env::var_os(UPDATE).is_none(), "{UPDATE} is set: {why}");
            assert!(PTX.starts_with(&heading()), "the kernels have changed since their PTX was made");
            return missing(
                "PTX compiled anew",
                &format!("{why} (only the digest of its source was compared)"),
            );
        }
    };
    let source = emaudit_device::source(KERNELS);
    let ptx = format!("{}{}", heading(), nvrtc.ptx(&source, FLOOR).unwrap());
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, &ptx).unwrap();
        return;
    }
    assert!(ptx == PTX, "the kernels or their dialect have changed: run this test again with {UPDATE}=1");
    for architecture in OTHERS {
        assert!(nvrtc.ptx(&source, architecture).unwrap().contains(&format!(".target sm_{architecture}")));
    }
}

#[test]
fn no_card_needs_a_stack() {
    let ptxas = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/ptxas"));
    let Some(ptxas) = ptxas.filter(|p| p.exists()) else {
        return skipped("machine code for every card", "CUDA_HOME has no bin/ptxas");
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernels.ptx");
    std::fs::write(&path, PTX).unwrap();
    for architecture in [FLOOR].into_iter().chain(OTHERS) {
        let out = Command::new(&ptxas)
            .args(["-v", &format!("-arch=sm_{architecture}"), "-o"])
            .arg(folder.path().join("cubin"))
            .arg(&path)
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "sm_{architecture}: {log}");
        let clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
        assert_eq!(log.matches(clean).count(), launches().len(), "sm_{architecture}: {log}");
    }
}
