//! The arithmetic of the decoder's ops on one row of f32 values, and of its gradient.

use super::ops::Activation;
use super::vector::{exp, largest, sigmoid, sum_by, wide};

/// 1 / sqrt(mean(x^2) + eps)
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_by(x, x, |a, b| a * b) / x.len() as f32 + eps).sqrt()
}

const CUBIC: f32 = 0.044_715;
/// sqrt(2 / pi)
const INNER: f32 = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;

/// tanh by way of e^2x, within two units of 1.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x))
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + tanh(INNER * (x + CUBIC * x * x * x)))
}

#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    let t = tanh(INNER * (x + CUBIC * x * x * x));
    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * INNER * (1.0 + 3.0 * CUBIC * x * x)
}

wide! {
    /// `y = x * w / sqrt(mean(x^2) + eps)`
    pub fn norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        let scale = inverse_rms(x, eps);
        for ((y, v), w) in y.iter_mut().zip(x).zip(w) {
            *y = v * scale * w;
        }
    }

    /// Gradient of [`norm`] in `x`; `dx` holds that in `y` before and the result after. With `more`, it is added to it.
    pub fn norm_gradient(x: &[f32], w: &[f32], eps: f32, more: Option<&[f32]>, dx: &mut [f32]) {
        let s = inverse_rms(x, eps);
        for (d, w) in dx.iter_mut().zip(w) {
            *d *= w;
        }
        let k = sum_by(x, dx, |x, g| x * g) * s * s * s / x.len() as f32;
        for (d, x) in dx.iter_mut().zip(x) {
            *d = *d * s - x * k;
        }
        if let Some(more) = more {
            for (d, m) in dx.iter_mut().zip(more) {
                *d += m;
            }
        }
    }

    /// Rotates each head of a row, `sign` 1 forward and -1 back.
    pub fn rotate(row: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        for head in row.chunks_exact_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let (x, y, s) = (*a, *b, s * sign);
                *a = x * c - y * s;
                *b = y * c + x * s;
            }
        }
    }

    /// `y = activation(gate) * up`
    pub fn gated(activation: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
        let items = y.iter_mut().zip(gate).zip(up);
        match activation {
            Activation::Silu => {
                for ((y, g), u) in items {
                    *y = g * sigmoid(*g) * u;
                }
            }
            Activation::GeluTanh => {
                for ((y, g), u) in items {
                    *y = gelu(*g) * u;
                }
            }
        }
    }

    /// Gradients of [`gated`]: that of the gate into `dgate`, that of `up` in place of `dy`.
    pub fn gated_gradient(activation: Activation, gate: &[f32], up: &[f32], dy: &mut [f32], dgate: &mut [f32]) {
        let items = dgate.iter_mut().zip(dy).zip(gate).zip(up);
        match activation {
            Activation::Silu => {
                for (((dgate, dy), g), u) in items {
                    let s = sigmoid(*g);
                    *dgate = *dy * u * s * (1.0 + g * (1.0 - s));
                    *dy *= g * s;
                }
            }
            Activation::GeluTanh => {
                for (((dgate, dy), g), u) in items {
                    *dgate = *dy * u * gelu_slope(*g);
                    *dy *= gelu(*g);
                }
            }
        }
    }

    /// The softmax of `scale` times a row.
    pub fn softmax(row: &mut [f32], scale: f32) {
        let max = largest(row);
        for v in row.iter_mut() {
            *v = exp((*v - max) * scale);
        }
        let inverse = 1.0 / sum_by(row, row, |v, _| v);
        for v in row {
            *v *= inverse;
        }
    }

    /// Gradient of a softmax `w` times `scale`: `d` holds that of the weights before and that of the scores after.
    pub fn softmax_gradient(w: &[f32], scale: f32, d: &mut [f32]) {
        let dot = sum_by(w, d, |w, d| w * d);
        for (d, w) in d.iter_mut().zip(w) {
            *d = scale * w * (*d - dot);
        }
    }

    /// log(sum(exp(row))), summed in f64.
    pub fn log_sum_exp(row: &[f32]) -> f64 {
        let max = largest(row);
        let (mut sum, mut powers) = (0f64, [0f32; 1024]);
        for part in row.chunks(powers.len()) {
            let powers = &mut powers[..part.len()];
            for (p, v) in powers.iter_mut().zip(part) {
                *p = exp(v - max);
            }
            sum += f64::from(sum_by(powers, powers, |v, _| v));
        }
        f64::from(max) + sum.ln()
    }

    /// Turns logits into `scale` times the gradient of the cross-entropy with `target`.
    pub fn cross_entropy_gradient(row: &mut [f32], log_sum: f32, target: usize, scale: f32) {
        for v in row.iter_mut() {
            *v = scale * exp(*v - log_sum);
        }
        row[target] -= scale;
    }
}
