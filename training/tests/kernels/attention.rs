//! Attention weights against their definition, written from the positions of tokens.

use crate::device::{Input, U, as_floats, assert_within, device, floats, numbers, run};
use emaudit_train::cuda::launch::{self, Rows};

/// Whether query column `own` sees column `c` of a sequence whose padding follows the shared columns: what is no
/// padding, not later, and fewer than `window` positions away. `None` where the query is padding itself.
fn sees(own: usize, c: usize, shared: usize, pad: usize, window: Option<usize>) -> Option<bool> {
    let position = |c: usize| match c {
        c if c < shared => Some(c),
        c if c < shared + pad => None,
        c => Some(c - pad),
    };
    let own_position = position(own)?;
    let near = |p: usize| window.is_none_or(|w| own_position - p < w);
    Some(c <= own && position(c).is_some_and(near))
}

fn capped(s: f64, scale: f64, cap: Option<f32>) -> f64 {
    match cap {
        Some(cap) => f64::from(cap) * (s * scale / f64::from(cap)).tanh(),
        None => s * scale,
    }
}

struct Case {
    rows: Rows,
    pads: Vec<u32>,
    cap: Option<f32>,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let shapes = [
        (1, 1, 1, 0, 0),
        (2, 3, 7, 0, 0),
        (2, 2, 1, 9, 4),
        (3, 1, 5, 6, 6),
        (1, 2, 300, 0, 0),
        (2, 1, 40, 230, 3),
    ];
    for (batch, heads, queries, offset, shared) in shapes {
        for window in [None, Some(1), Some(4), Some(1000)] {
            for cap in [None, Some(2.0)] {
                let rows = Rows { keys: offset + queries, queries, heads, batch, offset, shared, window };
                // The last token of a sequence is never padding.
                let most = (offset + queries - shared) as u32 - 1;
                let pads = (0..batch as u32).map(|b| (2 * b).min(most)).collect();
                cases.push(Case { rows, pads, cap });
            }
        }
    }
    cases
}

#[test]
fn weights_and_their_gradient_follow_the_definition() {
    let Some(cl) = device() else { return };
    let scale = 0.3f32;
    let (mut compared, mut padding) = (0, 0);
    for Case { rows, pads, cap } in cases() {
        let Rows { keys, queries, heads, batch, offset, shared, window } = rows;
        let count = batch * heads * queries;
        let n = count * keys;
        let (scores, dweights) = (numbers(1, n, 8.0), numbers(2, n, 1.0));
        let inputs = [Input::F32(&scores), Input::U32(&pads)];
        let plan = |i, y| launch::attention_weights(i, y, &rows, scale, cap);
        let weights = as_floats(&run(cl, inputs, 4 * n, plan));
        let dscores = floats(cl, [&scores, &weights, &dweights], n, |i, d| {
            launch::attention_weights_grad(i, d, (count, keys), scale, cap)
        });
        for row in 0..count {
            let (b, i) = (row / (heads * queries), row % queries);
            let at = row * keys..(row + 1) * keys;
            let (own, pad) = (offset + i, pads[b] as usize);
            let (s, w, dw) = (&scores[at.clone()], &weights[at.clone()], &dweights[at.clone()]);
            let seen: Option<Vec<bool>> = (0..keys).map(|c| sees(own, c, shared, pad, window)).collect();
            let Some(seen) = seen else {
                // Nobody reads the output of padding; it must only be a number.
                assert!((w.iter().sum::<f32>() - 1.0).abs() < 1e-5 && w[own + 1..].iter().all(|w| *w == 0.0));
                padding += 1;
                continue;
            };
            let z: Vec<f64> = s.iter().map(|&s| capped(s.into(), scale.into(), cap)).collect();
            let exp = |c: usize| if seen[c] { z[c].exp() } else { 0.0 };
            let sum: f64 = (0..keys).map(exp).sum();
            let expected: Vec<f64> = (0..keys).map(|c| exp(c) / sum).collect();
            let narrow = |v: &[f64]| v.iter().map(|&v| v as f32).collect::<Vec<_>>();
            // The exponent is rounded at a size of up to 2 * 2.4; the sum has `keys` terms.
            let relative = 12.0 * (keys as f32).sqrt() * U + 24.0 * U;
            assert_within("weights", w, &narrow(&expected), |c| relative * expected[c] as f32);
            assert!((0..keys).all(|c| seen[c] || w[c] == 0.0));

            let dot: f64 = expected.iter().zip(dw).map(|(w, d)| w * f64::from(*d)).sum();
            let slope = |c: usize| match cap {
                Some(cap) => 1.0 - (f64::from(s[c]) * f64::from(scale) / f64::from(cap)).tanh().powi(2),
                None => 1.0,
            };
            let gradient: Vec<f64> = (0..keys)
                .map(|c| f64::from(scale) * expected[c] * (f64::from(dw[c]) - dot) * slope(c))
                .collect();
            // |dw - dot| is at most 2.
            let bound = |c: usize| (2.0 * relative + 24.0 * U) * scale * expected[c] as f32 * 2.0;
            assert_within("gradient", &dscores[at], &narrow(&gradient), bound);
            compared += 1;
        }
    }
    println!("{compared} rows compared, {padding} of padding");
    assert!(compared > 5000 && padding > 10, "{compared} {padding}");
}
