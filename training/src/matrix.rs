//! Rows of the residual stream as f64 matrices, and the one decomposition that estimators and maps are built on.

use anyhow::{Result, anyhow, bail, ensure};
use faer::{Mat, MatRef};

/// Checks that `rows` is `n x hidden`, row-major, with `n >= fewest` and every value finite; returns `n`.
pub fn check_rows(what: &str, rows: &[f32], hidden: usize, fewest: usize) -> Result<usize> {
    ensure!(hidden > 0, "{what}: rows of width 0 hold nothing");
    ensure!(
        rows.len().is_multiple_of(hidden),
        "{what}: {} values are not whole rows of width {hidden}; were they captured from another model?",
        rows.len()
    );
    let n = rows.len() / hidden;
    ensure!(n >= fewest, "{what}: {n} rows given, at least {fewest} needed; use more prompts");
    if let Some(i) = rows.iter().position(|v| !v.is_finite()) {
        bail!(
            "{what}: row {} has {} in dimension {}; leave the prompt out or capture it again",
            i / hidden,
            rows[i],
            i % hidden
        );
    }
    Ok(n)
}

/// `rows x hidden` values, shifted by `-mean`; checked by the caller.
pub fn centred(rows: &[f32], mean: &[f64]) -> Mat<f64> {
    let hidden = mean.len();
    Mat::from_fn(rows.len() / hidden, hidden, |i, j| f64::from(rows[i * hidden + j]) - mean[j])
}

/// `X = U diag(s) V'` with `min(n, d)` singular values, largest first: one route for more rows than columns and fewer.
pub struct Svd {
    /// `n x r`, orthonormal columns.
    pub u: Mat<f64>,
    /// `r` singular values, descending.
    pub s: Vec<f64>,
    /// `d x r`, orthonormal columns.
    pub v: Mat<f64>,
}

impl Svd {
    /// The thin decomposition. faer is built without threads, so the bits do not depend on the number of cores.
    pub fn new(x: MatRef<'_, f64>) -> Result<Svd> {
        let svd = x.thin_svd().map_err(|e| anyhow!("the singular values did not converge: {e:?}"))?;
        let s = svd.S().column_vector().iter().copied().collect();
        Ok(Svd { u: svd.U().to_owned(), s, v: svd.V().to_owned() })
    }
}

/// `a' b`.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `m' x`, column by column.
pub fn transposed_times(m: MatRef<'_, f64>, x: &[f64]) -> Vec<f64> {
    m.col_iter().map(|column| column.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
}

/// `m x`.
pub fn times(m: MatRef<'_, f64>, x: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; m.nrows()];
    for (column, x) in m.col_iter().zip(x) {
        out.iter_mut().zip(column.iter()).for_each(|(o, a)| *o += a * x);
    }
    out
}

/// As f64.
pub fn widened(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&x| f64::from(x)).collect()
}

/// As f32, each rounded once.
pub fn narrowed(v: &[f64]) -> Vec<f32> {
    v.iter().map(|&x| x as f32).collect()
}

/// Cosine of the angle between two vectors; an error where one has no direction.
pub fn cosine(a: &[f32], b: &[f32]) -> Result<f64> {
    ensure!(a.len() == b.len(), "vectors of {} and {} dimensions have no angle", a.len(), b.len());
    let (a, b) = (widened(a), widened(b));
    let lengths = dot(&a, &a).sqrt() * dot(&b, &b).sqrt();
    ensure!(lengths > 0.0 && lengths.is_finite(), "a vector that is zero or not finite has no direction");
    Ok(dot(&a, &b) / lengths)
}

#[cfg(test)]
pub(crate) mod golden {
    //! Numbers that tests/fixtures/make_linear.py made.

    use serde_json::Value;

    pub fn open(name: &str) -> Vec<Value> {
        let path = format!("{}/tests/fixtures/linear/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(!cases.is_empty(), "{name} holds nothing to compare with");
        cases
    }

    pub fn floats(case: &Value, name: &str) -> Vec<f64> {
        case[name].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
    }

    pub fn rows(case: &Value, name: &str) -> Vec<f32> {
        floats(case, name).iter().map(|&v| v as f32).collect()
    }

    pub fn index(case: &Value, name: &str) -> usize {
        case[name].as_u64().unwrap() as usize
    }

    /// Seeded rows whose elements are about normal: the sum of twelve uniform numbers.
    pub fn drawn(n: usize, hidden: usize, seed: u64) -> Vec<f32> {
        let one = |i: u64| (0..12).map(|k| crate::random::uniform(&[seed, i, k])).sum::<f64>() - 6.0;
        (0..(n * hidden) as u64).map(|i| one(i) as f32).collect()
    }

    /// Within `slack` of the largest element.
    #[track_caller]
    pub fn close(found: &[f32], expected: &[f64], slack: f64) {
        assert_eq!(found.len(), expected.len());
        let largest = expected.iter().fold(0f64, |m, e| m.max(e.abs()));
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            assert!((f64::from(*f) - e).abs() <= slack * largest, "element {i}: {f} is not {e}");
        }
    }
}
