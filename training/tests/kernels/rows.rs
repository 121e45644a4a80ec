//! Kernels of which one block treats one row: norms and cross-entropy.

use crate::device::{Input, U, as_floats, assert_within, device, floats, numbers, run};
use candle_core::{Device, Tensor, Var};
use emaudit_train::cuda::launch;
use emaudit_train::model::ops::{self, Norm};

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |m, v| m.max(v.abs()))
}

/// What sums of `n` products may differ by, as in the parity tests.
fn sum_of(n: usize) -> f32 {
    12.0 * (n as f32).sqrt() * U
}

#[test]
fn norms_are_the_processors() {
    let Some(cl) = device() else { return };
    for width in [1, 2, 7, 64, 255, 256, 257, 576, 1000, 3072] {
        for rows in [0, 1, 3, 17] {
            let n = rows * width;
            let (mut x, w, dy) = (numbers(1, n, 3.0), numbers(2, width, 2.0), numbers(3, n, 1.0));
            // A row of zeros has the root of epsilon.
            x.iter_mut().take(width).for_each(|v| *v = 0.0);
            let eps = 1e-5f32;
            let y = floats(cl, [&x, &w], n, |i, y| launch::rms_norm(i, y, rows, width, eps));
            let dx = floats(cl, [&x, &w, &dy], n, |i, d| launch::rms_norm_grad(i, d, rows, width, eps));
            if n == 0 {
                assert!(y.is_empty() && dx.is_empty());
                continue;
            }
            let v = Var::from_tensor(&Tensor::from_slice(&x, (rows, width), &Device::Cpu).unwrap()).unwrap();
            let norm = Norm::new(Tensor::from_slice(&w, width, &Device::Cpu).unwrap(), eps as f64).unwrap();
            let expected = norm.forward(&v).unwrap();
            let weighted =
                (&expected * Tensor::from_slice(&dy, (rows, width), &Device::Cpu).unwrap()).unwrap();
            let gradient = flat(weighted.sum_all().unwrap().backward().unwrap().get(&v).unwrap());
            let expected = flat(&expected);
            let allowed = sum_of(width + 8);
            for r in 0..rows {
                let row = |v: &[f32]| v[r * width..][..width].to_vec();
                let (own, reference) = (row(&y), row(&expected));
                assert_within("norm", &own, &reference, |_| allowed * largest(&reference));
                let (own, reference) = (row(&dx), row(&gradient));
                // Both terms of the gradient are as large as s dy w, and nearly cancel where the width is 1.
                let s = 1.0 / (row(&x).iter().map(|v| v * v).sum::<f32>() / width as f32 + eps).sqrt();
                let term = s * largest(&row(&dy)) * largest(&w);
                assert_within("gradient", &own, &reference, |_| 2.0 * allowed * term);
            }
        }
    }
}

#[test]
fn a_row_with_nan_or_infinity_poisons_itself_alone() {
    let Some(cl) = device() else { return };
    let (rows, width) = (4, 300);
    let mut x = numbers(4, rows * width, 1.0);
    x[width + 7] = f32::NAN;
    x[2 * width + 299] = f32::INFINITY;
    let w = vec![1.0; width];
    let y = floats(cl, [&x, &w], rows * width, |i, y| launch::rms_norm(i, y, rows, width, 1e-6));
    let norm = Norm::new(Tensor::from_slice(&w, width, &Device::Cpu).unwrap(), 1e-6).unwrap();
    let expected =
        flat(&norm.forward(&Tensor::from_slice(&x, (rows, width), &Device::Cpu).unwrap()).unwrap());
    assert_within("norm", &y, &expected, |_| 1e-4);
    for (r, finite) in [true, false, false, true].into_iter().enumerate() {
        assert_eq!(y[r * width..][..width].iter().all(|v| v.is_finite()), finite, "row {r}");
    }
}

#[test]
fn cross_entropy_is_the_processors() {
    let Some(cl) = device() else { return };
    for (rows, vocab) in [(1, 2), (3, 7), (9, 257), (5, 1000), (300, 64), (2, 49_152)] {
        let mut logits = numbers(5, rows * vocab, 9.0);
        // What a mask leaves: no share, no gradient.
        logits[0] = f32::NEG_INFINITY;
        let targets: Vec<u32> =
            (0..rows).map(|r| ((r * 7919 + 1) % vocab) as u32).map(|t| t.max(1)).collect();
        let (tokens, ids) = (Input::F32(&logits), Input::U32(&targets));
        let bytes = run(cl, [tokens, ids], 4 * rows, |i, y| launch::cross_entropy(i, y, rows, vocab));
        let losses = as_floats(&bytes);
        let mean = floats(cl, [&losses], 1, |i, y| launch::mean(i, y, rows));
        let dy = [0.37f32];
        let gradient = run(cl, [tokens, ids, Input::F32(&dy)], 4 * rows * vocab, |i, d| {
            launch::cross_entropy_grad(i, d, rows, vocab)
        });
        let gradient = as_floats(&gradient);

        let v = Var::from_tensor(&Tensor::from_slice(&logits, (rows, vocab), &Device::Cpu).unwrap()).unwrap();
        let loss = ops::cross_entropy(&v, &targets).unwrap();
        let expected = flat((loss.clone() * dy[0] as f64).unwrap().backward().unwrap().get(&v).unwrap());
        let loss = loss.to_scalar::<f32>().unwrap();
        assert_within("loss", &mean, &[loss], |_| sum_of(vocab + rows) * (9.0 + (vocab as f32).ln()));
        // The exponent is rounded at a size of up to 18 + ln(vocab), which is the relative error of a share.
        let scale = dy[0] / rows as f32;
        let share = sum_of(vocab) + 2.0 * U * (18.0 + (vocab as f32).ln());
        assert_within("gradient", &gradient, &expected, |i| share * expected[i].abs() + 4.0 * U * scale);
        assert_eq!(gradient[0], 0.0);
    }
}

#[test]
fn the_mean_of_nothing_is_no_number() {
    let Some(cl) = device() else { return };
    assert!(floats(cl, [&[]], 1, |i, y| launch::mean(i, y, 0))[0].is_nan());
    for n in [1, 2, 255, 256, 257, 4096] {
        let x = numbers(6, n, 5.0);
        let mean = x.iter().map(|&v| v as f64).sum::<f64>() / n as f64;
        let own = floats(cl, [&x], 1, |i, y| launch::mean(i, y, n));
        assert_within("mean", &own, &[mean as f32], |_| sum_of(n) * 5.0);
    }
}
