//! Each fused operation and its gradients on every device, against the same formula composed in f64 on the CPU and
//! differentiated by candle.

use crate::fixture::*;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use emaudit_train::model::ops::{self, Activation, Norm, Rotation};
use emaudit_train::quant::{Frozen, Nf4, Storage};
use emaudit_train::random::uniform;

on_every_device!(norms, rotations, gates, soft_caps, cross_entropies, nf4_weights_decode_to_the_same_bits);

fn numbers(seed: u64, shape: &[usize], size: f32) -> Tensor {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n as u64).map(|i| size * (2.0 * uniform(&[seed, i]) as f32 - 1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Compares `own` on f32 variables of `device` with `reference` on f64 variables of the CPU: the result, and the
/// gradients of its sum with random weights. `n` roundings are allowed for.
fn check(
    what: &str,
    device: &Device,
    inputs: &[Tensor],
    n: usize,
    own: impl Fn(&[Var]) -> Result<Tensor>,
    reference: impl Fn(&[Var]) -> Result<Tensor>,
) {
    let vars = |place: &dyn Fn(&Tensor) -> Result<Tensor>| -> Vec<Var> {
        inputs.iter().map(|t| Var::from_tensor(&place(t).unwrap()).unwrap()).collect()
    };
    let (ours, exact) = (vars(&|t| t.to_device(device)), vars(&|t| t.to_dtype(DType::F64)));
    let (y, expected) = (own(&ours).unwrap(), reference(&exact).unwrap());
    let narrow = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    assert_close(what, &y, &narrow(&expected), tolerance(n));
    let weights = numbers(99, y.dims(), 1.0);
    let gradients = |y: &Tensor, weights: &Tensor| {
        y.broadcast_mul(weights).unwrap().sum_all().unwrap().backward().unwrap()
    };
    let own = gradients(&y, &weights.to_device(device).unwrap());
    let expected = gradients(&expected, &weights.to_dtype(DType::F64).unwrap());
    for (i, (own_var, exact_var)) in ours.iter().zip(&exact).enumerate() {
        let (own, expected) = (own.get(own_var).unwrap(), narrow(expected.get(exact_var).unwrap()));
        assert_close(&format!("{what}, gradient {i}"), own, &expected, tolerance(2 * n));
    }
}

fn norms(device: &Device) {
    for width in [2, 63, 64, 257, 576] {
        let weight = numbers(1, &[width], 2.0);
        let norm = Norm::new(weight.to_device(device).unwrap(), 1e-5).unwrap();
        let weight = weight.to_dtype(DType::F64).unwrap();
        let reference = |v: &[Var]| {
            let mean = (v[0].sqr()?.mean_keepdim(D::Minus1)? + f64::from(1e-5f32))?;
            v[0].broadcast_div(&mean.sqrt()?)?.broadcast_mul(&weight)
        };
        let x = numbers(2, &[3, 5, width], 3.0);
        check(&format!("norm {width}"), device, &[x], 2 * width + 8, |v| norm.forward(&v[0]), reference);
        let narrower = Tensor::zeros((2, width - 1), DType::F32, device).unwrap();
        assert!(norm.forward(&narrower).is_err());
    }
}

fn rotations(device: &Device) {
    for (heads, dim) in [(1, 2), (3, 64), (5, 128)] {
        let angles = numbers(3, &[2, 7, dim / 2], 3.0);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let on = |t: &Tensor| t.to_device(device).unwrap();
        let rotation = Rotation::new(on(&cos), on(&sin)).unwrap();
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap().unsqueeze(2).unwrap();
        let (cos, sin) = (wide(&cos), wide(&sin));
        let reference = |v: &[Var]| {
            let (a, b) = (v[0].narrow(3, 0, dim / 2)?, v[0].narrow(3, dim / 2, dim / 2)?);
            let left = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
            let right = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
            Tensor::cat(&[left, right], 3)
        };
        let x = numbers(4, &[2, 7, heads, dim], 2.0);
        check(&format!("rope {heads} x {dim}"), device, &[x], 4, |v| rotation.apply(&v[0]), reference);
        let longer = Tensor::zeros((2, 8, heads, dim), DType::F32, device).unwrap();
        assert!(rotation.apply(&longer).is_err());
    }
}

fn gates(device: &Device) {
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let (gate, up) = (numbers(5, &[3, 1001], 8.0), numbers(6, &[3, 1001], 2.0));
        let reference = |v: &[Var]| {
            let x = v[0].as_tensor();
            let active = match activation {
                Activation::Silu => (x / (x.neg()?.exp()? + 1.0)?)?,
                Activation::GeluTanh => {
                    let inner = ((x + (x.powf(3.0)? * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
                    ((x * 0.5)? * (inner.tanh()? + 1.0)?)?
                }
            };
            active * v[1].as_tensor()
        };
        // x^3 stands in front of 1 - tanh^2, so a rounding of tanh counts up to 0.4 * 8 + 0.02 * 8^3 times.
        let own = |v: &[Var]| ops::gated(activation, &v[0], &v[1]);
        check(&format!("{activation:?}"), device, &[gate, up], 200, own, reference);
        let other = Tensor::zeros((3, 1000), DType::F32, device).unwrap();
        assert!(
            ops::gated(activation, &Tensor::zeros((3, 1001), DType::F32, device).unwrap(), &other).is_err()
        );
    }
}

fn soft_caps(device: &Device) {
    for cap in [0.5f32, 30.0] {
        let reference = |v: &[Var]| (v[0].as_tensor() / f64::from(cap))?.tanh()? * f64::from(cap);
        let x = numbers(7, &[5, 333], 2.0 * cap);
        check(&format!("cap {cap}"), device, &[x], 32, |v| ops::soft_cap(&v[0], cap), reference);
    }
}

fn cross_entropies(device: &Device) {
    for (rows, vocab) in [(1, 2), (5, 257), (3, 4096)] {
        let targets: Vec<u32> = (0..rows as u32).map(|r| (r * 7919 + 1) % vocab as u32).collect();
        let index = Tensor::new(&targets[..], &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let reference = |v: &[Var]| {
            let x = v[0].as_tensor();
            let log_sum = x.exp()?.sum_keepdim(1)?.log()?;
            (log_sum - x.gather(&index, 1)?)?.mean_all()
        };
        let logits = numbers(8, &[rows, vocab], 9.0);
        let own = |v: &[Var]| ops::cross_entropy(&v[0], &targets);
        check(&format!("cross-entropy {rows} x {vocab}"), device, &[logits], vocab + 64, own, reference);
        let zeros = Tensor::zeros((rows, vocab), DType::F32, device).unwrap();
        assert!(ops::cross_entropy(&zeros, &targets[1..]).is_err());
        let beyond = vec![vocab as u32; rows];
        assert!(ops::cross_entropy(&zeros, &beyond).unwrap_err().to_string().contains("target"));
    }
}

fn nf4_weights_decode_to_the_same_bits(device: &Device) {
    for (rows, cols) in [(1, 64), (300, 64), (96, 320)] {
        let values = numbers(9, &[rows, cols], 0.3);
        let decoded = Nf4::quantize(&flat(&values), rows, cols).unwrap().dequantize();
        let decoded = Tensor::from_vec(decoded, (rows, cols), &Device::Cpu).unwrap();
        let frozen = Frozen::new(values.to_device(device).unwrap(), None, Storage::Nf4, false).unwrap();
        assert_same(&format!("{rows} x {cols}"), &frozen.weight().unwrap(), &decoded);
    }
}
