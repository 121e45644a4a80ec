//! Every kernel the CPU has, forced, against the oracle; the tolerance is the bound of contract.md as it stands.

use emaudit::kernel::{KERNEL_VARIABLE, Kernel, KernelKind, Scored, available, best, error_bound};
use emaudit::{Dtype, Error, Probe, Rows, RowsMut};
use half::{bf16, f16};

/// Every width up to four AVX-512 chunks twice over, and the hidden sizes of real models, one less and one more.
fn widths() -> Vec<usize> {
    let models = [576, 1536, 2048, 2304, 3072, 4096, 8192];
    (0..=130).chain(models.into_iter().flat_map(|w| w - 1..=w + 1)).collect()
}

/// The kernels to compare with the oracle. Fails when there is nothing but the oracle.
fn kernels() -> Vec<Kernel> {
    let found: Vec<_> = available().iter().map(|kind| Kernel::of(*kind).unwrap()).collect();
    let missing: Vec<_> = KernelKind::ALL.iter().filter(|k| !available().contains(k)).collect();
    println!("kernels run: {:?}; missing on this CPU: {} {missing:?}", available(), missing.len());
    assert!(found.iter().any(|k| k.kind() != KernelKind::Scalar), "only the oracle ran");
    #[cfg(target_arch = "x86_64")]
    {
        let listed = |kind| available().contains(&kind);
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        assert_eq!(listed(KernelKind::Avx2), avx2 && is_x86_feature_detected!("f16c"));
        assert!(
            listed(KernelKind::Avx512) || !is_x86_feature_detected!("avx512bw"),
            "detection lost a kernel"
        );
    }
    found
}

/// Values with a prime period, of both signs and several magnitudes, rounded to the dtype.
fn fill<T: Scored>(length: usize, period: usize, scale: f32) -> Vec<T> {
    let value = |i: usize| {
        let k = i % period;
        let sign = if k * k % 7 < 3 { -1.0 } else { 1.0 };
        T::from_f32(sign * scale * (1.0 + k as f32) / (1.0 + (k * 5 % 31) as f32))
    };
    (0..length).map(value).collect()
}

fn sum_abs<T: Scored>(row: &[T], direction: &[f32]) -> f64 {
    row.iter().zip(direction).map(|(h, u)| (f64::from(h.to_f32()) * f64::from(*u)).abs()).sum()
}

fn bits<T: Scored>(row: &[T]) -> Vec<u32> {
    row.iter().map(|h| h.to_f32().to_bits()).collect()
}

/// Runs one generic test body for every dtype.
macro_rules! for_every_dtype {
    ($body:ident) => {{
        $body::<f32>();
        $body::<f16>();
        $body::<bf16>();
    }};
}

#[test]
fn dot_products_are_within_the_bound_of_the_oracle() {
    fn body<T: Scored>() {
        let mut compared = 0;
        for kernel in kernels() {
            for width in widths() {
                for start in [0, 1, 3] {
                    let data = fill::<T>(width + start, 251, 1.7);
                    let vector = fill::<f32>(width + start, 127, 0.03);
                    check_sums(kernel, &data[start..], &vector[start..]);
                    compared += 1;
                }
            }
        }
        println!("{:?}: {compared} comparisons", T::DTYPE);
        assert!(compared >= 2 * 3 * widths().len());
    }
    for_every_dtype!(body);
}

fn check_sums<T: Scored>(kernel: Kernel, row: &[T], direction: &[f32]) {
    let oracle = Kernel::of(KernelKind::Scalar).unwrap();
    let (kind, width) = (kernel.kind(), row.len());
    let both = |sum| error_bound(kind, width, sum) + error_bound(KernelKind::Scalar, width, sum);

    let (dot, squares) = (kernel.dot(row, direction), kernel.squares(row));
    let (exact_dot, exact_squares) = (oracle.dot(row, direction), oracle.squares(row));
    let tolerance = both(sum_abs(row, direction));
    let error = (f64::from(dot) - f64::from(exact_dot)).abs();
    assert!(error <= tolerance, "{kind} {:?} {width}: {dot} vs {exact_dot}, bound {tolerance}", T::DTYPE);

    let wide: Vec<f32> = row.iter().map(|h| h.to_f32()).collect();
    let error = (f64::from(squares) - f64::from(exact_squares)).abs();
    assert!(error <= both(sum_abs(row, &wide)), "{kind} {width}: squares {squares} vs {exact_squares}");
}

#[test]
fn many_dot_products_at_once_have_the_bits_of_each_alone() {
    fn body<T: Scored>() {
        let mut compared = 0;
        for kernel in kernels() {
            for width in widths().into_iter().filter(|w| *w > 0) {
                let rows: Vec<Vec<T>> = (0..13).map(|r| fill(width, 251 - 10 * r, 1.3)).collect();
                let directions: Vec<Vec<f32>> = (0..9).map(|d| fill(width, 127 - 2 * d, 0.1)).collect();
                let rows: Vec<&[T]> = rows.iter().map(|r| &r[..]).collect();
                let directions: Vec<&[f32]> = directions.iter().map(|d| &d[..]).collect();
                let alone = |r: usize, d: usize| kernel.dot(rows[r], directions[d]).to_bits();
                // As many of each as any tile takes, one more, and one less.
                for (r, d) in
                    [(1, 1), (1, 3), (1, 9), (4, 1), (5, 1), (5, 4), (6, 2), (6, 8), (7, 9), (11, 1), (13, 3)]
                {
                    let mut out = vec![0.0; r * d];
                    kernel.dots(&rows[..r], &directions[..d], &rows[13 - r..], &mut out);
                    for (at, found) in out.iter().enumerate() {
                        assert_eq!(found.to_bits(), alone(at / d, at % d), "{kernel:?} {width} {r} x {d}");
                    }
                    compared += out.len();
                    let (mut of_row, first) = (vec![0.0; d], &out[..d]);
                    kernel.dots_of_row(rows[0], &directions[..d], &mut of_row);
                    assert!(
                        of_row.iter().zip(first).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{kernel:?} {width}"
                    );
                }
                let (group, next) = ([0, 1, 2, 3].map(|r| rows[r]), [rows[4], &[], rows[5], rows[6]]);
                let both = kernel.measure(group, Some(directions[0]), next);
                let blind = kernel.measure(group, None, [&[]; 4]);
                for (r, (dot, squares)) in both.into_iter().enumerate() {
                    assert_eq!(dot.to_bits(), alone(r, 0), "{kernel:?} {width}");
                    assert_eq!(squares.to_bits(), kernel.squares(rows[r]).to_bits(), "{kernel:?} {width}");
                    assert_eq!(blind[r].1.to_bits(), squares.to_bits(), "{kernel:?} {width}");
                }
            }
            kernel.dots::<T>(&[], &[], &[], &mut []);
        }
        assert!(compared > 10_000);
    }
    for_every_dtype!(body);
}

#[test]
fn rows_edited_at_once_have_the_bits_of_each_alone() {
    fn body<T: Scored>() {
        for kernel in kernels() {
            for width in widths() {
                let mut direction = fill::<f32>(width, 127, 0.11);
                direction.iter_mut().filter(|u| **u == 0.0).for_each(|u| *u = 0.01);
                let least = direction.iter().fold(f32::INFINITY, |least, u| least.min(u.abs()));
                let mut rows = [251, 241, 239, 233].map(|period| fill::<T>(width + 3, period, 1.3));
                // Sizes down to subnormals beside factors whose products are as small: nothing may be taken for zero.
                for (i, h) in rows[0].iter_mut().enumerate() {
                    *h = T::from_f32(h.to_f32() * 2f32.powi(-(i as i32 * 7 % 140)));
                }
                for c in [
                    [0.37, -2.5, 1.0, -1.0],
                    [0.37; 4],
                    [2f32.powi(-120); 4],
                    [2f32.powi(-85), -2f32.powi(-83), 0.37, 1.0],
                    [2f32.powi(-120), 1.0, 1.0, 1.0],
                    [1e-37, 1e-38, -1e-38, 1e-39],
                ] {
                    for least in [least, 0.0] {
                        let (mut alone, mut group) = (rows.clone(), rows.clone());
                        alone.iter_mut().zip(c).for_each(|(row, c)| {
                            kernel.edit(&mut row[1..][..width], &direction, c);
                        });
                        let edited = group.each_mut().map(|row| &mut row[1..][..width]);
                        kernel.edit_group(
                            edited,
                            &direction,
                            least,
                            c,
                            [&rows[0][1..][..width], &[], &[], &[]],
                        );
                        for (alone, group) in alone.iter().zip(&group) {
                            assert_eq!(bits(alone), bits(group), "{kernel:?} {width} {c:?} {least}");
                        }
                    }
                }
            }
        }
    }
    for_every_dtype!(body);
}

#[test]
fn nothing_beyond_a_row_is_written() {
    fn body<T: Scored>() {
        for kernel in kernels() {
            for width in widths() {
                let direction = fill::<f32>(width, 127, 0.11);
                let mut data = fill::<T>(width + 64, 251, 1.3);
                let before = bits(&data);
                kernel.edit(&mut data[32..][..width], &direction, 0.37);
                let after = bits(&data);
                assert_eq!(after[..32], before[..32], "{kernel:?} {width}");
                assert_eq!(after[32 + width..], before[32 + width..], "{kernel:?} {width}");
            }
        }
    }
    for_every_dtype!(body);
}

#[test]
fn the_oracle_is_exact_on_integers() {
    let oracle = Kernel::of(KernelKind::Scalar).unwrap();
    for width in widths() {
        let row: Vec<i64> = (0..width as i64).map(|i| i * 37 % 101 - 50).collect();
        let direction: Vec<i64> = (0..width as i64).map(|i| i * 53 % 89 - 44).collect();
        let exact: i64 = row.iter().zip(&direction).map(|(a, b)| a * b).sum();
        let row: Vec<f32> = row.iter().map(|x| *x as f32).collect();
        let direction: Vec<f32> = direction.iter().map(|x| *x as f32).collect();
        assert_eq!(oracle.dot(&row, &direction), exact as f32);
    }
}

#[test]
fn the_bound_covers_cancellation_and_underflow() {
    for kernel in kernels() {
        for width in [33, 577, 4096] {
            let huge: Vec<f32> = (0..width).map(|i| if i % 2 == 0 { 3e16 } else { -3e16 }).collect();
            check_sums(kernel, &huge, &fill::<f32>(width, 113, 1.0));
            let tiny = fill::<f32>(width, 251, 1e-30);
            check_sums(kernel, &tiny, &fill::<f32>(width, 127, 1e-12));
        }
    }
}

#[test]
fn one_kernel_gives_the_same_bits_at_every_address_and_time() {
    fn body<T: Scored>() {
        for kernel in kernels() {
            for width in [1, 31, 576, 2305] {
                let row = fill::<T>(width, 251, 1.0);
                let direction = fill::<f32>(width, 127, 1.0);
                let once = kernel.dot(&row, &direction).to_bits();
                for shift in 0..16 {
                    let mut moved = vec![T::from_f32(9.0); shift];
                    moved.extend_from_slice(&row);
                    assert_eq!(kernel.dot(&moved[shift..], &direction).to_bits(), once, "{kernel:?}");
                }
            }
        }
    }
    for_every_dtype!(body);
}

#[test]
fn edits_and_peaks_are_bit_equal_in_all_kernels() {
    fn body<T: Scored>() {
        let oracle = Kernel::of(KernelKind::Scalar).unwrap();
        for kernel in kernels() {
            for width in widths() {
                for (start, c) in [(0, 0.37f32), (1, -1.9e-3), (3, 1e4)] {
                    let row = fill::<T>(width + start, 251, 1.3);
                    let direction = fill::<f32>(width + start, 127, 0.11);
                    let (mut expected, mut found) = (row.clone(), row.clone());
                    oracle.edit(&mut expected[start..], &direction[start..], c);
                    kernel.edit(&mut found[start..], &direction[start..], c);
                    assert_eq!(bits(&found), bits(&expected), "{kernel:?} {:?} {width}", T::DTYPE);
                    let peak = |k: Kernel| k.edit_peak(&row[start..], &direction[start..], c).to_bits();
                    assert_eq!(peak(kernel), peak(oracle));
                }
            }
        }
    }
    for_every_dtype!(body);
}

#[test]
fn every_16_bit_value_survives_and_ties_round_to_even() {
    fn body<T: Scored>(values: Vec<T>) {
        let ones = vec![1.0f32; values.len()];
        for kernel in kernels() {
            let mut same = values.clone();
            kernel.edit(&mut same, &vec![0.0; values.len()], 1.0);
            // -0 - 0 is -0 and 0 - 0 is 0, so even the sign of zero survives.
            assert_eq!(bits(&same), bits(&values), "{kernel:?}");

            for c in [0.5f32, 1e-3, -7.7e-8, 2.0] {
                let mut found = values.clone();
                kernel.edit(&mut found, &ones, c);
                let expected: Vec<T> = values.iter().map(|h| T::from_f32(h.to_f32() - c)).collect();
                assert_eq!(bits(&found), bits(&expected), "{kernel:?} {c}");
            }
        }
    }
    body((0..=u16::MAX).map(f16::from_bits).filter(|h| h.is_finite()).collect());
    body((0..=u16::MAX).map(bf16::from_bits).filter(|h| h.is_finite()).collect());
}

#[test]
fn a_nonfinite_element_is_seen_at_every_position() {
    fn body<T: Scored>() {
        for kernel in kernels() {
            for width in (1..=130).chain([576, 2305]) {
                let mut row = fill::<T>(width, 251, 1.0);
                // Zeros in the direction must not hide anything.
                let mut direction = fill::<f32>(width, 127, 1.0);
                direction.iter_mut().step_by(3).for_each(|u| *u = 0.0);
                assert!(kernel.dot(&row, &direction).is_finite());
                for at in 0..width {
                    let kept = row[at];
                    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                        row[at] = T::from_f32(bad);
                        assert!(!kernel.dot(&row, &direction).is_finite(), "{kernel:?} {width} {at}");
                        assert!(!kernel.squares(&row).is_finite());
                    }
                    row[at] = kept;
                }
            }
        }
    }
    for_every_dtype!(body);
}

#[test]
fn infinities_of_both_signs_do_not_cancel() {
    for kernel in kernels() {
        let mut row = vec![1.0f32; 64];
        (row[3], row[40]) = (f32::INFINITY, f32::NEG_INFINITY);
        assert!(!kernel.dot(&row, &[1.0; 64]).is_finite());
    }
}

#[test]
fn strided_and_unaligned_rows_score_like_packed_ones() {
    fn body<T: Scored>() {
        let width = 131;
        // As many rows as are read side by side, fewer, more, and what is left over.
        for (kind, rows) in available().iter().flat_map(|kind| (0..=13).map(move |rows| (kind, rows))) {
            let probe =
                Probe::from_vectors(&fill(width, 127, 1.0), &vec![0.1; width], 2.0, Some(*kind)).unwrap();
            for stride in [width, width + 1, width + 13] {
                let data = fill::<T>(1 + rows * stride, 251, 1.0);
                let view = Rows::new(&data[1..], rows, width, stride).unwrap();
                let (mut scores, mut all) = (vec![0.0; rows], vec![0.0; 2 * rows]);
                probe.score(&view, emaudit::ScoreUnit::AlignedSd, &mut scores, None).unwrap();
                let twice = [&probe, &probe];
                Probe::score_all(&twice, &view, emaudit::ScoreUnit::AlignedSd, &mut all, None).unwrap();
                for (i, score) in scores.iter().enumerate() {
                    assert_eq!([all[2 * i].to_bits(), all[2 * i + 1].to_bits()], [score.to_bits(); 2]);
                    let packed = data[1 + i * stride..][..width].to_vec();
                    let alone = Rows::new(&packed, 1, width, width).unwrap();
                    let mut one = [0.0];
                    probe.score(&alone, emaudit::ScoreUnit::AlignedSd, &mut one, None).unwrap();
                    assert_eq!(one[0].to_bits(), score.to_bits());
                }
            }
        }
    }
    for_every_dtype!(body);
}

#[test]
fn views_refuse_what_they_cannot_hold() {
    let data = [0.0f32; 12];
    assert!(Rows::new(&data, 3, 4, 4).is_ok());
    assert!(Rows::new(&data, 3, 4, 5).is_err());
    assert!(Rows::new(&data, usize::MAX, 4, usize::MAX).is_err());
    assert!(Rows::new(&data, 3, 4, 0).is_ok(), "a repeated row may be read");
    let mut data = data;
    assert!(RowsMut::new(&mut data, 3, 4, 3).is_err(), "overlapping rows may not be edited");
    let address = data.as_ptr().cast::<u8>();
    // SAFETY: refused, or of no elements, so nothing is read.
    unsafe {
        assert!(Rows::from_raw(address.wrapping_add(1), Dtype::F32, 1, 2, 2).is_err(), "misaligned");
        assert!(Rows::from_raw(std::ptr::null(), Dtype::F32, 1, 2, 2).is_err(), "null");
        assert!(Rows::from_raw(std::ptr::null(), Dtype::F32, 0, 2, 2).is_ok(), "no rows: pointer ignored");
        assert!(RowsMut::from_raw(std::ptr::null_mut(), Dtype::F16, 2, 0, 0).is_ok());
    }
    let empty = Rows::new::<f16>(&[], 2, 0, 0).unwrap();
    assert!(empty.row::<f16>(1).is_empty());
}

#[test]
fn numbers_and_names_round_trip() {
    for kind in KernelKind::ALL {
        assert_eq!(KernelKind::try_from(kind as u32).unwrap(), kind);
        assert_eq!(kind.as_str().parse::<KernelKind>().unwrap(), kind);
    }
    for dtype in Dtype::ALL {
        assert_eq!(Dtype::try_from(dtype as u32).unwrap(), dtype);
    }
    assert!(KernelKind::try_from(0).is_err() && Dtype::try_from(4).is_err());
    assert!(matches!("neon".parse::<KernelKind>(), Err(Error::KernelUnavailable { .. })));
    assert_eq!(best(), *available().iter().max().unwrap());
    for missing in KernelKind::ALL.iter().filter(|k| !available().contains(k)) {
        assert!(matches!(Kernel::of(*missing), Err(Error::KernelUnavailable { .. })));
    }
}

/// Run by the test below in a process of its own; alone it only says which kernel it got.
#[test]
fn kernel_from_environment() {
    let probe = Probe::from_vectors(&[1.0], &[0.0], 1.0, None);
    println!(
        "got: {}",
        probe.map_or_else(|e| format!("status {:?}", e.status()), |p| p.kernel().to_string())
    );
}

#[test]
fn the_environment_forces_a_kernel_or_refuses_an_unknown_one() {
    let run = |value: &str| {
        let program = std::env::current_exe().unwrap();
        let mut command = std::process::Command::new(program);
        command.args(["--exact", "kernel_from_environment", "--nocapture"]).env(KERNEL_VARIABLE, value);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    for kind in available() {
        let said = run(kind.as_str());
        assert!(said.contains(&format!("got: {kind}")), "{said}");
    }
    assert!(run("fastest").contains("got: status KernelUnavailable"));
    assert!(run("").contains(&format!("got: {}", best())));
}
