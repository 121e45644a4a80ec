//! `emaudit/standalone.hpp` beside the library: every file, good or hostile, meets the same status in both, and every
//! score, edit and verdict has the same bits as the library's with its scalar kernel.

#[path = "../attacks/mod.rs"]
#[expect(dead_code, reason = "the sentences of refusals are for the tests of the library")]
mod attacks;
mod compiler;
mod good;
mod mutate;
mod random;
mod script;
#[allow(dead_code)] // other tests use more of it
#[path = "../skipped/mod.rs"]
mod skipped;

use emaudit::directions::schema::{Aggregation, ModelIdentity, Site};
use emaudit::directions::{Directions, OpenOptions};
use emaudit::{KernelKind, Probe, Rows, ScoreUnit, Status};
use half::{bf16, f16};
use random::Random;
use script::{Bytes, Matrix, Script};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// No digest is checked, so that what lies behind it is reached.
fn careless() -> OpenOptions {
    OpenOptions { verify: false, ..OpenOptions::default() }
}

/// The program, built once: with the address and undefined-behaviour sanitizers where the compiler has them.
fn program() -> PathBuf {
    static BUILT: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let sanitizers = ["-std=c++17", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
        let sanitized = compiler::works(&compiler::default(), &sanitizers);
        if !sanitized {
            skipped::missing(
                "sanitizers on hostile files",
                &format!("{} has none here", compiler::default()),
            );
        }
        let flags = if sanitized { &sanitizers[..] } else { &sanitizers[..1] };
        let program = compiler::build(&compiler::default(), flags, folder.path().join("standalone"));
        (folder, program)
    });
    built.1.clone()
}

#[test]
fn every_attack_meets_the_same_status() {
    let mut script = Script::default();
    let folder = tempfile::tempdir().unwrap();
    let (attacks, plain) = (attacks::all(), OpenOptions::default());
    for (i, attack) in attacks.iter().enumerate() {
        let refused = script.open(attack.name, &attack.bytes, &plain).unwrap_err();
        assert_eq!(refused.status(), attack.status, "{}", attack.name);
        let _ = script.open(&format!("{}, careless", attack.name), &attack.bytes, &careless());
        let path = folder.path().join(i.to_string());
        std::fs::write(&path, &attack.bytes).unwrap();
        script.file(&format!("{}, as a file", attack.name), &path);
    }
    script.file("a folder", folder.path());
    script.file("nothing", &folder.path().join("nothing"));
    let sparse = folder.path().join("sparse");
    std::fs::File::create(&sparse).unwrap().set_len((1 << 30) + 1).unwrap();
    script.file("a gigabyte and a byte", &sparse);
    let statuses = tally(&script.run(&program()));
    println!("{} attacks three times each, by status: {statuses:?}", attacks.len());
    assert!(attacks.len() > 115, "only {} attacks ran", attacks.len());
    for refusal in [2, 3, 4, 5, 6, 7, 8] {
        assert!(statuses.contains_key(&refusal.to_string()), "no file met status {refusal}");
    }
}

/// How often each status was the answer.
fn tally(lines: &[String]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for line in lines {
        *counts.entry(line.split(' ').next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    counts
}

#[test]
fn randomly_changed_files_meet_the_same_status() {
    let mut random = Random(3);
    let mut script = Script::default();
    let sound: Vec<Vec<u8>> =
        good::all().into_iter().map(|(_, bytes)| bytes).filter(|b| b.len() < 20_000).collect();
    for i in 0..6000 {
        let file = match i % 8 {
            0 | 1 => {
                let base = random.below(sound.len());
                mutate::bytes(&mut random, &sound[base])
            }
            2 => mutate::container(&mut random),
            3 | 4 => mutate::manifest_text(&mut random),
            _ => mutate::manifest_values(&mut random),
        };
        let options = if random.chance(2) { OpenOptions::default() } else { careless() };
        let _ = script.open(&format!("change {i}"), &file, &options);
    }
    for i in 0..40 {
        let file = mutate::decimals(&mut random);
        script.open(&format!("decimals {i}"), &file, &careless()).expect("decimals within their range");
    }
    let statuses = tally(&script.run(&program()));
    println!("6000 changed files and 4000 decimals, by status: {statuses:?}");
    // Each refusal was reached, and some changes left a file sound.
    for status in [0, 3, 4, 5, 6, 7, 8] {
        assert!(
            statuses.get(&status.to_string()).is_some_and(|n| *n > 10),
            "status {status} is rare: {statuses:?}"
        );
    }
}

#[test]
fn every_character_is_text_or_not_in_both() {
    let mut script = Script::default();
    let ranges = [0..0x300, 0x1670..0x1690, 0x1ff0..0x2070, 0x2ff0..0x3010, 0xfef0..0xff00, 0x1f600..0x1f604];
    for c in ranges.into_iter().flatten().filter_map(char::from_u32) {
        let _ = script.open(
            &format!("the name U+{:04X}", u32::from(c)),
            &good::named(&c.to_string()),
            &careless(),
        );
        let padded = format!("{c}a{c}");
        let _ =
            script.open(&format!("U+{:04X} around a name", u32::from(c)), &good::named(&padded), &careless());
    }
    let statuses = tally(&script.run(&program()));
    println!("names of one character, by status: {statuses:?}");
    assert!(statuses.len() == 2 && statuses.values().all(|n| *n > 100));
}

#[test]
fn truncations_and_expected_digests_agree() {
    let (_, sound) = &good::all()[0];
    let mut script = Script::default();
    for len in 0..sound.len() {
        assert!(script.open(&format!("{len} bytes"), &sound[..len], &careless()).is_err());
    }
    for tail in [&b"\0"[..], b" ", sound] {
        assert!(script.open("a tail", &[sound, tail].concat(), &careless()).is_err());
    }
    let right = Directions::from_bytes(sound, &OpenOptions::default()).unwrap().digest();
    for verify in [true, false] {
        for expected in [right, [7; 32]] {
            let options = OpenOptions { verify, expected_digest: Some(expected), ..careless() };
            let opened = script.open("an expected digest", sound, &options);
            assert_eq!(opened.is_ok(), expected == right);
        }
    }
    let count = script.run(&program()).len();
    println!("{count} truncations, tails and digests");
}

/// Rows that meet every branch: ordinary ones, zeros, a NaN, infinities, the largest and the smallest values.
fn matrix<T: Bytes>(random: &mut Random, cols: usize, stride: usize) -> Matrix<T> {
    let huge = T::OVERFLOW.min(f32::MAX) * 0.9;
    let rows = 9;
    let mut data: Vec<T> =
        (0..(rows - 1) * stride + cols).map(|_| T::from_f32(random.signed() * 8.0)).collect();
    let at = |row: usize, col: usize| row * stride + col;
    data[at(1, cols - 1)] = T::from_f32(f32::NAN);
    data[at(2, 0)] = T::from_f32(f32::INFINITY);
    data[at(3, cols / 2)] = T::from_f32(f32::NEG_INFINITY);
    for col in 0..cols {
        data[at(4, col)] = T::from_f32(0.0);
        data[at(5, col)] = T::from_f32(huge * random.signed().signum());
        data[at(6, col)] = T::from_f32(random.signed() * 1e-7);
        data[at(7, col)] = T::from_f32(random.signed() * 1e-40);
    }
    // Between the rows lies what nobody may read as part of one.
    for row in 0..rows - 1 {
        data[at(row, cols)..at(row + 1, 0)].fill(T::from_f32(f32::NAN));
    }
    Matrix { data, rows, cols, stride }
}

/// Scores and edits of one dtype; the scores as bits, for the other kernels.
fn run_dtype<T: Bytes>(
    script: &mut Script,
    random: &mut Random,
    name: &str,
    probe: &Probe,
) -> Vec<(usize, Matrix<T>)> {
    let mut scored = Vec::new();
    for stride in [probe.width(), probe.width() + 3] {
        let m = matrix::<T>(random, probe.width(), stride);
        let name = format!("{name}, {:?}, stride {stride}", T::DTYPE);
        script.score(&format!("{name}, z"), probe, &m, ScoreUnit::AlignedSd);
        let strengths: Vec<f32> = (0..m.rows).map(|i| [1.0, 0.0, -0.5, 1e-30][i % 4]).collect();
        script.subtract(&format!("{name}, alpha 0.7"), probe, &m, 0.7, true, None);
        script.subtract(&format!("{name}, strengths"), probe, &m, -1.5, true, Some(&strengths));
        script.subtract(&format!("{name}, beyond the range"), probe, &m, 3e38, true, None);
        script.subtract(&format!("{name}, with evidence only"), probe, &m, 1.0, false, None);
        script.subtract(&format!("{name}, a NaN for a strength"), probe, &m, 1.0, true, Some(&[f32::NAN; 9]));
        script.subtract(&format!("{name}, no alpha"), probe, &m, f32::NAN, true, None);
        script.score(&format!("{name}, raw"), probe, &m, ScoreUnit::Raw);
        scored.push((script.len() - 1, m));
    }
    scored
}

/// Every kernel of this machine against the lines of raw scores, within the bound of contract.md. Gives how many.
fn compare_kernels<T: Bytes>(
    directions: &Arc<Directions>,
    layer: u32,
    lines: &[String],
    scored: &[(usize, Matrix<T>)],
) -> usize {
    let (mut compared, mut flagged) = (0, 0);
    for (line, m) in scored {
        let found: Vec<f32> = lines[*line]
            .split(' ')
            .skip(2)
            .map(|hex| f32::from_bits(u32::from_str_radix(hex, 16).expect("bits in hex")))
            .collect();
        assert_eq!(found.len(), m.rows);
        for kind in emaudit::kernel::available() {
            let probe = Probe::with_kernel(directions.clone(), layer, *kind).unwrap();
            let scalar = Probe::with_kernel(directions.clone(), layer, KernelKind::Scalar).unwrap();
            let view = Rows::new(&m.data, m.rows, m.cols, m.stride).unwrap();
            let mut scores = vec![0.0; m.rows];
            let _ = probe.score(&view, ScoreUnit::Raw, &mut scores, None);
            for (i, score) in scores.iter().enumerate() {
                let row = &m.data[i * m.stride..i * m.stride + m.cols];
                let norm = row.iter().map(|x| f64::from(x.to_f32()).powi(2)).sum::<f64>().sqrt();
                if !norm.is_finite() {
                    assert!(score.is_nan() && found[i].is_nan(), "{kind}, row {i} is not finite");
                    flagged += 1;
                    continue;
                }
                // The largest rows may overflow a sum in f32, where the contract promises nothing but a flag.
                if norm * (m.cols as f64).sqrt() >= 2f64.powi(127) {
                    continue;
                }
                let bound = probe.error_bound(norm) + scalar.error_bound(norm);
                let apart = (f64::from(*score) - f64::from(found[i])).abs();
                assert!(apart <= bound, "{kind}, row {i}: {score} and {}, bound {bound}", found[i]);
                compared += 1;
            }
        }
    }
    assert!(flagged > 0, "no row with a NaN was compared");
    compared
}

/// Sequences that cross thresholds, and some that no verdict may call clean.
fn sequences(random: &mut Random) -> Vec<Vec<f32>> {
    let calm: Vec<f32> = (0..9).map(|_| random.signed()).collect();
    let loud: Vec<f32> = (0..9).map(|_| 1.0 + random.signed()).collect();
    let mut broken = calm.clone();
    broken[2] = f32::NAN;
    let late = (0..9).map(|i| if i == 6 { 20.0 } else { -1.0 }).collect();
    vec![vec![], calm, loud, broken, late, vec![f32::INFINITY], vec![f32::MAX; 3]]
}

fn identities(script: &mut Script, directions: &Directions) {
    let model = &directions.manifest().model;
    let (site, other) = match directions.manifest().site {
        Site::ResidPost => (Site::ResidPost, Site::FinalNorm),
        Site::FinalNorm => (Site::FinalNorm, Site::ResidPost),
    };
    let mut check = |name: &str, site, edit: &dyn Fn(&mut ModelIdentity)| {
        let mut found = model.clone();
        edit(&mut found);
        script.identify(name, directions, &found, site);
    };
    check("the same model", site, &|_| ());
    check("another name", site, &|m| m.name = "?".into());
    check("other weights", site, &|m| m.weights_digest = "0".repeat(64));
    check("unknown weights", site, &|m| m.weights_digest = String::new());
    check("another quantisation", site, &|m| m.quantization += "+nf4");
    check("another site", other, &|_| ());
    check("another architecture", site, &|m| m.architecture += "2");
    check("another width", site, &|m| m.hidden_size += 1);
    check("another depth", site, &|m| m.n_layers += 1);
    check("another vocabulary", site, &|m| m.vocab_size ^= 1);
    check("another tokenizer", site, &|m| m.tokenizer_digest = "0".repeat(64));
}

#[test]
fn good_files_score_steer_and_judge_alike() {
    let mut random = Random(5);
    let (mut commands, mut compared, mut verdicts) = (0, 0, 0);
    let files = good::all();
    for (name, bytes) in &files {
        let mut script = Script::default();
        let directions =
            script.open(name, bytes, &OpenOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        identities(&mut script, &directions);
        let absent = script.probe("a layer that is not there", &directions, 999).unwrap_err();
        assert_eq!(absent.status(), Status::LayerNotFound);
        let mut scored = Vec::new();
        for layer in directions.layers().collect::<Vec<_>>() {
            let name = format!("{name}, layer {layer}");
            let probe = script.probe(&name, &directions, layer).unwrap();
            let single = run_dtype::<f32>(&mut script, &mut random, &name, &probe);
            let half = run_dtype::<f16>(&mut script, &mut random, &name, &probe);
            let brain = run_dtype::<bf16>(&mut script, &mut random, &name, &probe);
            scored.push((layer, single, half, brain));
            for aggregation in [Aggregation::Mean, Aggregation::Max, Aggregation::Last] {
                for rate in [0.05, 0.01, 0.01 * (1.0 + 1e-12), 0.02, f64::NAN] {
                    let mut sequences = sequences(&mut random);
                    let calibration = directions.layer(layer).unwrap().calibration;
                    let alarms = calibration.into_iter().flat_map(|c| &c.thresholds);
                    let alarms = alarms.filter(|t| t.statistic == aggregation);
                    // On the threshold is not above it.
                    sequences.extend(alarms.map(|t| vec![t.z as f32; t.horizon as usize]));
                    for scores in sequences {
                        script.watch(
                            &format!("{name}, {aggregation:?} at {rate}"),
                            &probe,
                            aggregation,
                            rate,
                            &scores,
                        );
                        verdicts += 2 + scores.len();
                    }
                }
            }
        }
        let lines = script.run(&program());
        commands += lines.len();
        for (layer, single, half, brain) in &scored {
            compared += compare_kernels(&directions, *layer, &lines, single);
            compared += compare_kernels(&directions, *layer, &lines, half);
            compared += compare_kernels(&directions, *layer, &lines, brain);
        }
    }
    println!(
        "{} good files, {commands} commands, {verdicts} verdicts, {compared} scores of kernels",
        files.len()
    );
    assert!(files.len() > 30 && commands > 1000 && verdicts > 1000 && compared > 1000);
}

#[test]
fn every_compiler_takes_it_without_a_warning_and_gives_the_same_answers() {
    let (_, bytes) = &good::all()[0];
    let (mut ran, mut skipped) = (0, 0);
    let folder = tempfile::tempdir().unwrap();
    for name in [compiler::default(), "clang++".into()] {
        if !compiler::works(&name, &["-std=c++20"]) {
            skipped::missing(&format!("the second reader with {name}"), "it is not here, or has no C++20");
            skipped += 1;
            continue;
        }
        for header in ["", "/types", "/json", "/container", "/manifest"] {
            let output =
                compiler::include(&name, &["-std=c++17"], &format!("emaudit/standalone{header}.hpp"));
            assert!(output.status.success(), "{name}{header}: {}", String::from_utf8_lossy(&output.stderr));
        }
        let unsafe_math = compiler::include(&name, &["-std=c++17", "-ffast-math"], "emaudit/standalone.hpp");
        assert!(String::from_utf8_lossy(&unsafe_math.stderr).contains("must never read as clean"), "{name}");
        for flags in [&["-std=c++17", "-O3", "-ffp-contract=fast"][..], &["-std=c++20", "-O0"]] {
            let program = compiler::build(&name, flags, folder.path().join(format!("program-{ran}")));
            let mut script = Script::default();
            let directions = script.open("a file", bytes, &OpenOptions::default()).unwrap();
            let probe = script.probe("a probe", &directions, 0).unwrap();
            run_dtype::<f32>(&mut script, &mut Random(1), "a row", &probe);
            run_dtype::<f16>(&mut script, &mut Random(2), "a row", &probe);
            run_dtype::<bf16>(&mut script, &mut Random(3), "a row", &probe);
            assert!(script.run(&program).len() > 40);
            ran += 1;
        }
    }
    println!("{ran} builds ran, {skipped} compilers are not here");
    assert!(ran >= 2);
}

#[test]
fn hashes_agree_at_every_length_of_the_last_block() {
    let mut script = Script::default();
    let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
    (0..200).chain([1000]).for_each(|len| script.hash(&bytes[..len]));
    assert_eq!(script.run(&program()).len(), 201);
}
