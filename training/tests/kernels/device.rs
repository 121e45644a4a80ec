//! Launches on an OpenCL device.

use crate::skipped::missing;
use emaudit_device::opencl::{Argument as Value, Memory, OpenCl};
use emaudit_train::cuda::launch::{Argument, Launch, THREADS};
use emaudit_train::random;
use std::sync::OnceLock;

pub const KERNELS: &str = include_str!("../../src/cuda/kernels.cu");

/// Bytes behind all memory that no kernel may touch.
const GUARD: usize = 4096;

/// The device with all kernels; where there is none, that is said.
pub fn device() -> Option<&'static OpenCl> {
    static DEVICE: OnceLock<Result<OpenCl, String>> = OnceLock::new();
    assert_eq!(emaudit_device::threads(), THREADS);
    match DEVICE.get_or_init(|| OpenCl::build(&emaudit_device::source(KERNELS))) {
        Ok(device) => Some(device),
        Err(why) => {
            missing("GPU kernels through OpenCL", &format!("{why}; Debian has pocl-opencl-icd"));
            None
        }
    }
}

/// What a kernel reads.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    F32(&'a [f32]),
    U32(&'a [u32]),
    U8(&'a [u8]),
}

/// Runs what `plan` makes of the inputs and an output of `bytes` bytes, which are returned. The launch must leave its
/// inputs and everything around its memory alone.
pub fn run<const N: usize>(
    cl: &OpenCl,
    inputs: [Input; N],
    bytes: usize,
    plan: impl FnOnce([usize; N], usize) -> candle_core::Result<Launch<usize>>,
) -> Vec<u8> {
    let upload = |input: &Input| match input {
        Input::F32(v) => cl.memory(v, GUARD),
        Input::U32(v) => cl.memory(v, GUARD),
        Input::U8(v) => cl.memory(v, GUARD),
    };
    // What is not written stays NaN.
    let mut memory: Vec<Memory> = inputs.iter().map(upload).collect();
    memory.push(cl.memory(&vec![0xffu8; bytes], GUARD));
    let before: Vec<Vec<u8>> = memory.iter().map(|m| cl.read(m)).collect();
    let launch = plan(std::array::from_fn(|i| i), N).unwrap();
    if launch.blocks > 0 {
        let value = |a: &Argument<usize>| match *a {
            Argument::Memory(i) => Value::Memory(&memory[i]),
            Argument::U32(v) => Value::U32(v),
            Argument::U64(v) => Value::U64(v),
            Argument::F32(v) => Value::F32(v),
            Argument::F64(v) => Value::F64(v),
        };
        let values: Vec<Value> = launch.arguments.iter().map(value).collect();
        cl.run(launch.kernel, launch.blocks as usize, THREADS, &values);
    }
    let mut after: Vec<Vec<u8>> = memory.iter().map(|m| cl.read(m)).collect();
    for (i, (before, after)) in before.iter().zip(&after).enumerate() {
        let from = if i == N { bytes } else { 0 };
        assert!(before[from..] == after[from..], "{} wrote outside of its output ({i})", launch.kernel);
    }
    after[N].truncate(bytes);
    after.swap_remove(N)
}

/// As [`run`], with `count` floats.
pub fn floats<const N: usize>(
    cl: &OpenCl,
    inputs: [&[f32]; N],
    count: usize,
    plan: impl FnOnce([usize; N], usize) -> candle_core::Result<Launch<usize>>,
) -> Vec<f32> {
    as_floats(&run(cl, inputs.map(Input::F32), 4 * count, plan))
}

pub fn as_floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// `n` numbers in [-size, size).
pub fn numbers(seed: u64, n: usize, size: f32) -> Vec<f32> {
    (0..n as u64).map(|i| size * (2.0 * random::uniform(&[seed, i]) as f32 - 1.0)).collect()
}

/// 2^-24, the unit roundoff of f32.
pub const U: f32 = f32::EPSILON / 2.0;

/// Asserts that every element is within its own bound, and that what is no number is none on both sides.
#[track_caller]
pub fn assert_within(what: &str, ours: &[f32], expected: &[f32], bound: impl Fn(usize) -> f32) {
    assert_eq!(ours.len(), expected.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(expected).enumerate() {
        let same = a.is_nan() && b.is_nan() || a == b || (a - b).abs() <= bound(i);
        assert!(same, "{what}: element {i} is {a}, not {b} within {}", bound(i));
    }
}
