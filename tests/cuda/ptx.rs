//! The embedded PTX and what is launched of it.

use crate::rows::KERNELS;
use crate::skipped::{missing, skipped};
use emaudit::Dtype;
use emaudit::kernel::cuda::PTX;
use emaudit::kernel::cuda::launch::{self, Argument, Edit, Launch, Matrix, Scale, SteerMemory};
use emaudit_device::ptx::Embedded;
use std::collections::BTreeSet;
use std::path::Path;

const EMBEDDED: Embedded = Embedded { kernels: KERNELS, ptx: PTX };

const SCALE: Scale = Scale { offset: 0.0, sigma: 1.0, raw: false };
const EDIT: Edit = Edit { operation: 1, parameter: 1.0, gate: None, dose_limit: None, norm: 1.0, peak: 1.0 };

fn matrix(dtype: Dtype, aligned: bool) -> Matrix<()> {
    Matrix { data: (), dtype, rows: 1, width: 8, stride: 8, aligned }
}

fn kinds<const N: usize>(launch: Launch<[Argument<()>; N]>) -> (&'static str, Vec<&'static str>) {
    let kind = |argument| match argument {
        Argument::Memory(()) | Argument::U64(_) => ".u64",
        Argument::U32(_) => ".u32",
        Argument::F32(_) => ".f32",
        Argument::F64(_) => ".f64",
    };
    (launch.kernel, launch.arguments.map(kind).to_vec())
}

#[test]
fn every_launch_fits_its_kernel_and_every_kernel_is_launched() {
    let memory = SteerMemory { direction: (), vector: (), strengths: (), scores: (), status: () };
    let mut launches = Vec::new();
    for dtype in Dtype::ALL {
        for rows in [matrix(dtype, false), matrix(dtype, true)] {
            launches.push(kinds(launch::score(rows, (), (), (), &SCALE).unwrap()));
            launches.push(kinds(launch::steer(rows, memory, &SCALE, &EDIT).unwrap()));
        }
    }
    EMBEDDED.assert_launched(launches);
    let loaded: BTreeSet<_> = launch::KERNELS.into_iter().collect();
    assert_eq!(loaded, EMBEDDED.entries().into_keys().collect());
}

#[test]
fn wide_kernels_move_16_bytes_at_a_time_and_read_a_kept_row_once() {
    EMBEDDED.assert_sound();
    for (dtype, words) in [("f32", 2), ("f16", 1), ("bf16", 1)] {
        let count = |kernel: &str, what: &str| EMBEDDED.body(kernel).matches(what).count();
        let (score, steer) = (format!("score_{dtype}_wide"), format!("steer_{dtype}_wide"));
        assert!(count(&score, "ld.global.nc.v4.u32") > 0, "{score}");
        assert_eq!(count(&score, "ld.global.nc.u"), 0, "{score} reads single elements");
        // Four times a thread's elements, and the loop for longer rows.
        assert_eq!(count(&steer, "st.global.v4"), 5 * words, "{steer}");
        // The same, and the loops for sums that f32 is too narrow for, for edits near the end of the dtype's range, and for
        // the second reading of longer rows.
        assert_eq!(count(&steer, "ld.global.v4"), (4 + 4) * words, "{steer}");
        for kernel in [&score, &steer] {
            assert_eq!(count(kernel, "st.global.u16") + count(kernel, "ld.global.u16"), 0, "{kernel}");
        }
    }
}

#[test]
fn the_embedded_ptx_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernel/cuda/kernels.ptx");
    if let Err(why) = EMBEDDED.check_current(&path) {
        missing("PTX of scoring and steering compiled anew", &why);
    }
}

#[test]
fn no_card_needs_a_stack() {
    match EMBEDDED.check_machine_code() {
        Err(why) => skipped("machine code of scoring and steering for every card", &why),
        Ok(log) => {
            let registers = |line: &str| line.split("Used ").nth(1)?.split(' ').next()?.parse::<u32>().ok();
            let most = log.lines().filter_map(registers).max().unwrap();
            // Three blocks of 256 threads on a card with 65536 registers: enough reads under way to hide memory's latency.
            assert!(most <= 80, "{most} registers a thread");
        }
    }
}

#[test]
fn more_rows_than_a_launch_counts_are_refused() {
    let many = Matrix { rows: i32::MAX as usize + 1, ..matrix(Dtype::F32, true) };
    let error = launch::score(many, (), (), (), &SCALE).unwrap_err();
    assert_eq!(error.status(), emaudit::Status::InvalidArgument);
}
