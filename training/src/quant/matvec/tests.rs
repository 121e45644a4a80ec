use super::*;
use crate::random::uniform;

fn values(seed: u64, count: usize) -> Vec<f32> {
    (0..count).map(|i| (uniform(&[seed, i as u64]) * 2.0 - 1.0) as f32).collect()
}

/// Every product against sums in f64, within the bound at the top of the module: n roundings of each term.
fn check(isa: Isa, x: &[f32], dense: &[f32], weight: Weight<'_>, (out, inp): (usize, usize)) -> Vec<f32> {
    let y = product(isa, x, weight, (out, inp));
    assert_eq!(y.len(), x.len() / inp * out);
    let relative = inp as f64 * 2f64.powi(-24) * (1.0 + inp as f64 * 2f64.powi(-24));
    for (x, y) in x.chunks(inp).zip(y.chunks(out)) {
        for (j, (w, y)) in dense.chunks(inp).zip(y).enumerate() {
            let terms = || x.iter().zip(w).map(|(x, w)| *x as f64 * *w as f64);
            let (exact, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
            let off = (*y as f64 - exact).abs();
            assert!(off <= relative * size, "{isa:?}, {out} x {inp}, column {j}: {y} for {exact}");
        }
    }
    y
}

/// Rows of every group and the rest of each; features beside whole tiles; inputs beside whole registers, blocks, chunks.
const ROWS: [usize; 8] = [1, 2, 3, 4, 7, 8, 13, 32];
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (2, 64), (3, 17), (24, 128), (25, 63), (47, 192), (5, 1024), (6, 1025), (50, 2112)];

#[test]
fn every_kernel_is_within_the_bound_of_f32_sums() {
    let mut ran = 0;
    for isa in Isa::available() {
        for (out, inp) in SHAPES {
            let dense = values(1, out * inp);
            for rows in ROWS {
                check(isa, &values(2, rows * inp), &dense, Weight::Dense(&dense), (out, inp));
                ran += 1;
            }
        }
    }
    assert_eq!(ran, Isa::available().len() * SHAPES.len() * ROWS.len());
}

#[test]
fn nf4_is_multiplied_as_it_is_decoded() {
    let mut ran = 0;
    for isa in Isa::available() {
        for (out, inp) in SHAPES {
            // Blocks of 64 run over the flattened matrix: with 17, 63 or 1025 inputs they straddle rows.
            let out = out * 64;
            if out * inp > 400_000 {
                continue;
            }
            let nf4 = Nf4::quantize(&values(3, out * inp), out, inp).unwrap();
            let dense = nf4.dequantize();
            for rows in [1, 5, 8] {
                let x = values(4, rows * inp);
                let fused = check(isa, &x, &dense, Weight::Nf4(&nf4), (out, inp));
                // What is decoded is the same to the bit, and so is the order of the sums.
                assert_eq!(fused, product(isa, &x, Weight::Dense(&dense), (out, inp)));
                ran += 1;
            }
        }
    }
    assert!(ran >= Isa::available().len() * 21, "{ran} products");
}

#[test]
fn a_row_has_the_same_bits_in_every_batch_and_on_any_number_of_threads() {
    let (out, inp) = (77, 1600);
    let nf4 = Nf4::quantize(&values(5, 77 * 1600), out, inp).unwrap();
    let x = values(6, 29 * inp);
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for isa in Isa::available() {
        let all = pool(3).install(|| product(isa, &x, Weight::Nf4(&nf4), (out, inp)));
        assert_eq!(pool(1).install(|| product(isa, &x, Weight::Nf4(&nf4), (out, inp))), all);
        for rows in ROWS {
            for (x, y) in x.chunks(rows * inp).zip(all.chunks(rows * out)) {
                assert_eq!(product(isa, x, Weight::Nf4(&nf4), (out, inp)), y);
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_where_it_is() {
    for isa in Isa::available() {
        let mut x = values(7, 9 * 70);
        x[3 * 70 + 69] = f32::NAN;
        let dense = values(8, 30 * 70);
        let y = product(isa, &x, Weight::Dense(&dense), (30, 70));
        for (row, y) in y.chunks(30).enumerate() {
            assert!(y.iter().all(|v| v.is_nan() == (row == 3)), "{isa:?}, row {row}");
        }
    }
}

#[test]
#[should_panic(expected = "sizes")]
fn sizes_that_do_not_fit_are_refused() {
    product(Isa::best(), &[0.0; 10], Weight::Dense(&[0.0; 12]), (3, 5));
}
