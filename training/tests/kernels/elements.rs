//! Kernels that treat each element by itself.

use crate::device::{Input, U, as_floats, assert_within, device, floats, numbers, run};
use candle_core::{Device, Tensor, Var};
use emaudit_train::cuda::launch::{self, Decoded};
use emaudit_train::lora::Dropout;
use emaudit_train::model::ops::{self, Activation, Rotation};
use emaudit_train::quant::{CODEBOOK, Nf4, dynamic_map};
use half::bf16;

const COUNTS: [usize; 7] = [0, 1, 5, 255, 256, 257, 10_007];

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn var(values: &[f32], shape: impl Into<candle_core::Shape>) -> Var {
    Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
}

/// The value of `y`, and the gradients of sum(y * dy) in `vars`.
fn with_gradients(y: Tensor, dy: &[f32], vars: &[&Var]) -> (Vec<f32>, Vec<Vec<f32>>) {
    let dy = Tensor::from_slice(dy, y.shape(), &Device::Cpu).unwrap();
    let store = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    (flat(&y), vars.iter().map(|v| flat(store.get(v).unwrap())).collect())
}

#[test]
fn rotations_are_the_processors() {
    let Some(cl) = device() else { return };
    for (tokens, heads, dim) in [(0, 2, 8), (1, 1, 2), (3, 2, 6), (5, 3, 64), (7, 9, 128), (2, 5, 256)] {
        let (n, half) = (tokens * heads * dim, tokens * dim / 2);
        let (values, dy) = (numbers(1, n, 2.0), numbers(2, n, 1.0));
        let angles = numbers(3, half, 3.0);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let turn = |x: &[f32], sign| {
            floats(cl, [x, &cos, &sin], n, |inputs, y| launch::rope(inputs, y, (tokens, heads, dim), sign))
        };
        let (y, dx) = (turn(&values, 1.0), turn(&dy, -1.0));
        if n == 0 {
            continue;
        }
        let angle = |v: &[f32]| Tensor::from_slice(v, (1, tokens, dim / 2), &Device::Cpu).unwrap();
        let rotation = Rotation::new(angle(&cos), angle(&sin)).unwrap();
        let x = var(&values, (1, tokens, heads, dim));
        let (expected, gradients) = with_gradients(rotation.apply(&x).unwrap(), &dy, &[&x]);
        // Two products and a sum, each rounded once, in the same order: the same bits.
        assert_within("rotation", &y, &expected, |_| 0.0);
        assert_within("its gradient", &dx, &gradients[0], |_| 0.0);
    }
}

#[test]
fn gates_are_the_processors() {
    let Some(cl) = device() else { return };
    for activation in [Activation::Silu, Activation::GeluTanh] {
        for n in COUNTS {
            let (mut g, u, dy) = (numbers(4, n, 12.0), numbers(5, n, 2.0), numbers(6, n, 1.0));
            for (g, extreme) in g.iter_mut().zip([0.0, -0.0, 88.8, -88.8, 104.0, -104.0, f32::NAN]) {
                *g = extreme;
            }
            let y = floats(cl, [&g, &u], n, |i, y| launch::gated(i, y, n, activation));
            let both = floats(cl, [&g, &u, &dy], 2 * n, |i, d| launch::gated_grad(i, d, n, activation));
            let (dg, du) = both.split_at(n);
            if n == 0 {
                continue;
            }
            let (gate, up) = (var(&g, n), var(&u, n));
            let (expected, gradients) =
                with_gradients(ops::gated(activation, &gate, &up).unwrap(), &dy, &[&gate, &up]);
            // exp and tanh are within 5 units in the last place in OpenCL, and within 1 on the processor; sums and
            // quotients add some more. In front of them stands x at most.
            let value = |i: usize| 16.0 * U * g[i].abs();
            assert_within("gated", &y, &expected, |i| value(i) * u[i].abs());
            assert_within("gradient of up", du, &gradients[1], |i| value(i) * dy[i].abs());
            // 1 - tanh^2 and 1 - sigmoid carry the error of the function, times the slope of its argument.
            let slope = |x: f32| 16.0 * U * (1.0 + x.abs() * (1.0 + 0.2 * x * x));
            assert_within("gradient of gate", dg, &gradients[0], |i| slope(g[i]) * (u[i] * dy[i]).abs());
        }
    }
}

#[test]
fn soft_caps_are_the_processors() {
    let Some(cl) = device() else { return };
    for (n, cap) in COUNTS.into_iter().flat_map(|n| [(n, 30.0), (n, 0.5)]) {
        let (x, dy) = (numbers(7, n, 100.0), numbers(8, n, 1.0));
        let y = floats(cl, [&x], n, |i, y| launch::soft_cap(i, y, n, cap));
        let dx = floats(cl, [&y, &dy], n, |i, d| launch::soft_cap_grad(i, d, n, cap));
        if n == 0 {
            continue;
        }
        let v = var(&x, n);
        let (expected, gradients) = with_gradients(ops::soft_cap(&v, cap).unwrap(), &dy, &[&v]);
        assert_within("soft cap", &y, &expected, |_| 8.0 * U * cap);
        // y / cap is off by the error of y, and 1 - t^2 doubles it.
        assert_within("its gradient", &dx, &gradients[0], |i| 20.0 * U * dy[i].abs());
    }
}

#[test]
fn nf4_decodes_to_the_processors_bits() {
    let Some(cl) = device() else { return };
    // One block; two second-level scales; words that end in the middle of a block of threads.
    for (rows, cols) in [(1, 64), (3, 128), (300, 64), (1023, 64), (65, 1024)] {
        let n = rows * cols;
        let values: Vec<f32> =
            numbers(9, n, 0.1).iter().enumerate().map(|(i, v)| v * (1 + i / 64 % 11) as f32).collect();
        let nf4 = Nf4::quantize(&values, rows, cols).unwrap();
        let tables = [&CODEBOOK[..], &dynamic_map(), &nf4.scale_absmax].concat();
        let inputs = || [Input::U8(&nf4.packed), Input::U8(&nf4.scale_codes), Input::F32(&tables)];
        let decoded = nf4.dequantize();
        let to = |to| move |inputs: [usize; 3], out| launch::nf4(inputs, out, n, nf4.scale_offset, to);
        let own = as_floats(&run(cl, inputs(), 4 * n, to(Decoded::F32)));
        assert!(own.iter().zip(&decoded).all(|(a, b)| a.to_bits() == b.to_bits()), "{rows} x {cols}");
        let halves = run(cl, inputs(), 2 * n, to(Decoded::Bf16));
        let halves = halves.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]));
        assert!(halves.zip(&decoded).all(|(a, b)| a.to_bits() == bf16::from_f32(*b).to_bits()));
    }
    assert!(launch::nf4([0, 1, 2], 3, 65, 0.0, Decoded::F32).is_err());
}

/// Scales that are infinite or no number decode as on the processor, down to bf16's NaN.
#[test]
fn damaged_nf4_stays_damaged() {
    let Some(cl) = device() else { return };
    let mut nf4 = Nf4::quantize(&numbers(10, 64 * 4, 1.0), 4, 64).unwrap();
    for bad in [f32::NAN, f32::INFINITY, -0.0, f32::MAX] {
        nf4.scale_offset = bad;
        let tables = [&CODEBOOK[..], &dynamic_map(), &nf4.scale_absmax].concat();
        let inputs = [Input::U8(&nf4.packed), Input::U8(&nf4.scale_codes), Input::F32(&tables)];
        let bytes = run(cl, inputs, 2 * 256, |i, out| launch::nf4(i, out, 256, bad, Decoded::Bf16));
        for (b, v) in bytes.chunks_exact(2).zip(nf4.dequantize()) {
            let (own, expected) = (bf16::from_le_bytes([b[0], b[1]]), bf16::from_f32(v));
            assert!(own == expected || own.is_nan() && expected.is_nan(), "{own} and {expected} from {v}");
        }
    }
}

#[test]
fn dropout_drops_what_the_processor_drops() {
    let Some(cl) = device() else { return };
    for rate in [0.0, 0.1, 0.5, 0.999] {
        for (rows, width) in [(0, 5), (1, 1), (7, 33), (129, 64)] {
            let dropout = Dropout::new(rate, &[11, rows as u64]);
            let (x, n) = (numbers(12, rows * width, 1.0), rows * width);
            let (state, below, kept) = dropout.kernel();
            let y = floats(cl, [&x], n, |i, y| launch::dropout(i, y, (rows, width), state, below, kept));
            let expected: Vec<f32> = if n == 0 {
                Vec::new()
            } else {
                flat(&dropout.of(&Tensor::from_slice(&x, (rows, width), &Device::Cpu).unwrap()).unwrap())
            };
            assert!(y.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "rate {rate}");
        }
    }
}

#[test]
fn sizes_beyond_an_index_are_refused() {
    let error = launch::gated([0, 1], 2, 1 << 31, Activation::Silu).unwrap_err().to_string();
    assert!(error.contains("2147483648 elements are too many for one launch"), "{error}");
    assert!(launch::gated([0, 1], 2, (1 << 31) - 1, Activation::Silu).is_ok());
}
