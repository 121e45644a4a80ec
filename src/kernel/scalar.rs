//! The oracle: one element after the other, sums in f64.

use super::dispatch::{KernelKind, Ops, Table};
use super::generic::{Ahead, GROUP};
use crate::activations::Element;

pub(super) static TABLE: Table = Table { kind: KernelKind::Scalar, f32: ops(), f16: ops(), bf16: ops() };

const fn ops<T: Element>() -> Ops<T> {
    Ops {
        dot: dot::<T>,
        squares: squares::<T>,
        measure: measure::<T>,
        dots: dots::<T>,
        dots_of_row: dots_of_row::<T>,
        edit_peak: edit_peak::<T>,
        edit: edit::<T>,
        edit_group: edit_group::<T>,
        edit_normal_group: edit_group::<T>,
    }
}

fn dot<T: Element>(row: &[T], direction: &[f32]) -> f32 {
    row.iter().zip(direction).map(|(h, u)| f64::from(h.to_f32()) * f64::from(*u)).fold(0.0, add) as f32
}

fn squares<T: Element>(row: &[T]) -> f32 {
    row.iter().map(|h| f64::from(h.to_f32())).map(|h| h * h).fold(0.0, add) as f32
}

/// Not `sum`, which begins with -0.
fn add(sum: f64, term: f64) -> f64 {
    sum + term
}

fn dots<T: Element>(rows: &[&[T]], directions: &[&[f32]], _: &[&[T]], out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(directions.len())) {
        dots_of_row(row, directions, out);
    }
}

fn dots_of_row<T: Element>(row: &[T], directions: &[&[f32]], out: &mut [f32]) {
    for (direction, out) in directions.iter().zip(out) {
        *out = dot(row, direction);
    }
}

fn measure<T: Element>(
    rows: [&[T]; GROUP],
    direction: Option<&[f32]>,
    _: [Ahead; GROUP],
) -> [(f32, f32); GROUP] {
    rows.map(|row| (direction.map_or(0.0, |direction| dot(row, direction)), squares(row)))
}

fn edit_peak<T: Element>(row: &[T], direction: &[f32], c: f32) -> f32 {
    row.iter().zip(direction).map(|(h, u)| (h.to_f32() - c * u).abs()).fold(0.0, f32::max)
}

fn edit_group<T: Element>(rows: [&mut [T]; GROUP], direction: &[f32], c: [f32; GROUP], _: [Ahead; GROUP]) {
    rows.into_iter().zip(c).for_each(|(row, c)| edit(row, direction, c));
}

fn edit<T: Element>(row: &mut [T], direction: &[f32], c: f32) {
    for (h, u) in row.iter_mut().zip(direction) {
        *h = T::from_f32(h.to_f32() - c * u);
    }
}
