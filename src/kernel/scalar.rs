//! The oracle: one element after the other, sums in f64.

use super::dispatch::{KernelKind, Ops, Table};
use super::generic::Ahead;
use crate::activations::Element;

pub(super) static TABLE: Table = Table { kind: KernelKind::Scalar, f32: ops(), f16: ops(), bf16: ops() };

const fn ops<T: Element>() -> Ops<T> {
    Ops {
        dot: dot::<T>,
        dot_squares: dot_squares::<T>,
        dots: dots::<T>,
        edit_peak: edit_peak::<T>,
        edit: edit::<T>,
    }
}

fn dot<T: Element>(row: &[T], direction: &[f32], ahead: Ahead) -> f32 {
    dot_squares(row, direction, ahead).0
}

fn dots<T: Element>(rows: &[&[T]], directions: &[&[f32]], _: &[&[T]], out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(directions.len())) {
        for (direction, out) in directions.iter().zip(out) {
            *out = dot(row, direction, Ahead::NOTHING);
        }
    }
}

fn dot_squares<T: Element>(row: &[T], direction: &[f32], _: Ahead) -> (f32, f32) {
    let (mut dot, mut squares) = (0.0f64, 0.0f64);
    for (h, u) in row.iter().zip(direction) {
        let h = f64::from(h.to_f32());
        dot += h * f64::from(*u);
        squares += h * h;
    }
    (dot as f32, squares as f32)
}

fn edit_peak<T: Element>(row: &[T], direction: &[f32], c: f32) -> f32 {
    row.iter().zip(direction).map(|(h, u)| (h.to_f32() - c * u).abs()).fold(0.0, f32::max)
}

fn edit<T: Element>(row: &mut [T], direction: &[f32], c: f32, _: Ahead) {
    for (h, u) in row.iter_mut().zip(direction) {
        *h = T::from_f32(h.to_f32() - c * u);
    }
}
