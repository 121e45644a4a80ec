//! The embedded PTX: made from the committed source, fit for every launch, free of what kernels should not do.

use crate::device::KERNELS;
use crate::skipped::{missing, skipped};
use emaudit_device::ptx::Embedded;
use emaudit_train::cuda::PTX;
use emaudit_train::cuda::launch::{self, Argument, Decoded, Launch, Rows};
use emaudit_train::model::ops::Activation;
use std::path::Path;

const EMBEDDED: Embedded = Embedded { kernels: KERNELS, ptx: PTX };

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
    let kind = |a: &Argument<()>| match a {
        Argument::Memory(()) | Argument::U64(_) => ".u64",
        Argument::U32(_) => ".u32",
        Argument::F32(_) => ".f32",
        Argument::F64(_) => ".f64",
    };
    let launches = launches();
    EMBEDDED.assert_launched(launches.iter().map(|l| (l.kernel, l.arguments.iter().map(kind).collect())));
}

#[test]
fn the_code_is_what_it_should_be() {
    EMBEDDED.assert_sound();
    // Decoded weights are written 16 bytes at a time.
    for kernel in ["nf4_to_f32", "nf4_to_bf16"] {
        assert!(EMBEDDED.body(kernel).contains("st.global.v4"), "{kernel}");
    }
}

#[test]
fn the_embedded_ptx_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/kernels.ptx");
    if let Err(why) = EMBEDDED.check_current(&path) {
        missing("PTX compiled anew", &why);
    }
}

#[test]
fn no_card_needs_a_stack() {
    if let Err(why) = EMBEDDED.check_machine_code() {
        skipped("machine code for every card", &why);
    }
}
