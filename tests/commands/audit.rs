use super::{Folder, emaudit, forge, lines, npy, npy_f32, refused, text, utf8};
use emaudit::controls::SplitMix64;
use safetensors::tensor::TensorView;
use serde_json::Value;
use std::path::Path;
use std::process::Output;

const WIDTH: usize = forge::WIDTH;
/// Along the direction, and 9.9 aligned standard deviations out.
const HIGH: [f32; WIDTH] = [1.0, 2.0, 3.0, 4.0, 5.0];
const CALM: [f32; WIDTH] = [0.0; WIDTH];

/// Rows as calm ones are: scores of about one standard deviation, and a part of them moved along the direction.
fn noise(count: usize, seed: u64, high: usize) -> Vec<f32> {
    let mut generator = SplitMix64::new(seed);
    let mut one = || 1.3 * ((generator.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0);
    let mut rows: Vec<f32> = (0..count * WIDTH).map(|_| one()).collect();
    rows.iter_mut().take(high * WIDTH).enumerate().for_each(|(i, x)| *x += HIGH[i % WIDTH]);
    rows
}

fn audit(directions: &Path, activations: &Path, options: &[&str]) -> Output {
    emaudit(
        &[&["audit", utf8(directions), "--activations", utf8(activations), "--statistic", "mean"], options]
            .concat(),
    )
}

/// The exit status and the one object on standard output, after a look at the page.
fn judged(directions: &Path, activations: &Path, options: &[&str]) -> (i32, Value) {
    let output = audit(directions, activations, &[options, &["--json"]].concat());
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
    let mut objects = lines(&output);
    assert_eq!(objects.len(), 1);
    let object = objects.remove(0);
    let page = audit(directions, activations, options);
    assert_eq!(page.status, output.status);
    let state = object["verdict"]["state"].as_str().unwrap().to_uppercase();
    assert!(text(&page.stdout).starts_with(&format!("{state}: ")), "{}", text(&page.stdout));
    assert!(text(&page.stdout).contains(object["verdict"]["sentence"].as_str().unwrap()));
    (output.status.code().unwrap(), object)
}

#[test]
fn the_exit_status_is_the_verdict() {
    let folder = Folder::new();
    let directions = folder.sample();
    let file = |name: &str, rows: &[f32]| folder.write(name, npy_f32(&[rows.len() / WIDTH, WIDTH], rows));
    let mut broken = noise(80, 1, 0);
    broken[WIDTH * 7 + 1] = f32::NAN;
    let calm = file("calm.npy", &noise(200, 2, 0));
    let moved = file("moved.npy", &noise(200, 2, 200));
    let suspects = [
        (file("clean.npy", &CALM.repeat(36)), &[][..], 0, "clean", "below_concern"),
        (file("few.npy", &CALM.repeat(35)), &[], 2, "invalid", "too_few"),
        (file("flagged.npy", &noise(100, 3, 20)), &[], 1, "flagged", "more_than_rate"),
        (file("undecided.npy", &noise(100, 3, 6)), &["--level", "0.0001"], 2, "invalid", "undecided"),
        (file("broken.npy", &broken), &[], 2, "invalid", "non_finite"),
        (file("short.npy", &CALM.repeat(60)), &["--horizon", "16"], 2, "invalid", "most_pending"),
        (
            file("again.npy", &noise(100, 4, 0)),
            &["--concern", "0.3", "--reference", utf8(&calm)],
            0,
            "clean",
            "below_concern",
        ),
        (
            file("stale.npy", &noise(100, 4, 0)),
            &["--reference", utf8(&moved)],
            2,
            "stale",
            "reference_drifted",
        ),
    ];
    for (activations, options, code, state, reason) in &suspects {
        let (found, object) = judged(&directions, activations, options);
        let verdict = &object["verdict"];
        assert_eq!(
            (verdict["state"].as_str(), verdict["reason"].as_str()),
            (Some(*state), Some(*reason)),
            "{object}"
        );
        assert_eq!((found, &object["clean"]), (*code, &(*code == 0).into()), "{object}");
        assert_eq!((&object["ok"], &object["status"]), (&true.into(), &0.into()));
        // The evidence of the sample is not specific in content.
        assert_eq!(
            (&verdict["misalignment"], &object["evidence"]["content"]),
            (&false.into(), &"nonspecific".into())
        );
    }
    assert_eq!(suspects.len(), 8);
    let (_, object) = judged(&directions, &suspects[2].0, &[]);
    let verdict = &object["verdict"];
    let of = |key: &str| verdict[key].as_f64().unwrap();
    assert_eq!(
        [of("layer"), of("horizon"), of("rate"), of("rate_upper"), of("threshold")],
        [3.0, 1.0, 0.05, 0.045, 1.7]
    );
    // Of the calm ones among them some exceed it too.
    assert!(of("flagged") >= 20.0 && of("judged") == 100.0 && of("p_value") < 1e-4, "{verdict}");
    assert!(of("low") < of("share") && of("share") < of("high"));
    assert_eq!(verdict["digest"].as_str().unwrap().len(), 64);
}

#[test]
fn the_controls_of_the_file_are_compared_only_with_calm_rows_at_hand() {
    let folder = Folder::new();
    let directions = folder.sample();
    let suspect = folder.write("suspect.npy", npy_f32(&[100, WIDTH], &noise(100, 5, 100)));
    let calm = folder.write("calm.npy", npy_f32(&[200, WIDTH], &noise(200, 2, 0)));
    let (_, object) = judged(&directions, &suspect, &[]);
    assert_eq!((&object["reference"], &object["controls"]["compared"]), (&Value::Null, &false.into()));
    assert!(object["controls"]["reason"].as_str().unwrap().contains("no calm reference"));

    let (code, object) = judged(&directions, &suspect, &["--reference", utf8(&calm)]);
    let controls = &object["controls"];
    assert_eq!(
        (code, &controls["compared"], &object["reference"]["state"]),
        (1, &true.into(), &"steady".into())
    );
    assert!(controls["shift"].as_f64().unwrap() > 5.0, "{controls}");
    let families = controls["families"].as_array().unwrap();
    assert_eq!(families.len(), 4);
    for family in families {
        let compared = ["random", "orthogonal"].contains(&family["family"].as_str().unwrap());
        assert_eq!((family["rank_p"].is_number(), family["not_compared"].is_string()), (compared, !compared));
    }
    let orthogonal = families.iter().find(|f| f["family"] == "orthogonal").unwrap();
    assert_eq!((&orthogonal["as_far"], &orthogonal["rank_p"]), (&0.into(), &0.025.into()), "{orthogonal}");

    let untested = folder.directions("untested.safetensors", |manifest, _| {
        manifest.evidence = emaudit::directions::schema::Evidence::untested();
    });
    let (code, object) = judged(&untested, &suspect, &["--layer", "3", "--reference", utf8(&calm)]);
    assert_eq!((code, &object["controls"]["compared"]), (1, &false.into()));
    assert!(object["controls"]["reason"].as_str().unwrap().contains("the file has no controls"));
    let arguments = ["audit", utf8(&untested), "--activations", utf8(&suspect), "--statistic", "mean"];
    refused(&arguments, 3, 1, "choose one with --layer");
}

#[test]
fn sequences_of_tokens_end_where_their_lengths_say() {
    let folder = Folder::new();
    let directions = folder.sample();
    const TOKENS: usize = 20;
    // Padding is not a number and is never read.
    let sequence = |row: [f32; WIDTH], length: usize| {
        [row.repeat(length), vec![f32::NAN; (TOKENS - length) * WIDTH]].concat()
    };
    let parts: Vec<(Vec<f32>, i64)> = (0..50)
        .map(|i| match i {
            0..40 => (sequence(CALM, 16), 16),
            40..45 => (sequence(CALM, 9), 9),
            _ => (sequence(HIGH, 20), 20),
        })
        .collect();
    let values: Vec<u8> =
        parts.iter().flat_map(|(rows, _)| rows.iter().flat_map(|x| x.to_le_bytes())).collect();
    let lengths: Vec<i64> = parts.iter().map(|(_, n)| *n).collect();
    let wide: Vec<u8> = lengths.iter().flat_map(|n| n.to_le_bytes()).collect();
    let narrow: Vec<u8> = lengths.iter().flat_map(|n| (*n as i32).to_be_bytes()).collect();
    let view = |dtype, shape, bytes| TensorView::new(dtype, shape, bytes).unwrap();
    let tensors = [
        ("h", view(safetensors::Dtype::F32, vec![50, TOKENS, WIDTH], &values)),
        ("n", view(safetensors::Dtype::I64, vec![50], &wide)),
    ];
    let acts = folder.write("acts.safetensors", safetensors::serialize(tensors, None).unwrap());
    let beside = folder.write("lengths.npy", npy(">i4", &[50], &narrow));
    for source in ["n", utf8(&beside)] {
        let options = ["--tensor", "h", "--lengths", source];
        let (code, object) = judged(&directions, &acts, &options);
        let verdict = &object["verdict"];
        // Without a horizon it is the longest that fits.
        assert_eq!((code, &verdict["horizon"], &verdict["rate"]), (1, &16.into(), &0.01.into()));
        let counts =
            ["sequences", "judged", "flagged", "pending", "invalid"].map(|k| verdict[k].as_u64().unwrap());
        assert_eq!(counts, [50, 45, 5, 5, 0], "{verdict}");
        let (_, object) =
            judged(&directions, &acts, &[&options[..], &["--horizon", "1", "--rate", "0.05"]].concat());
        assert_eq!((&object["verdict"]["judged"], &object["verdict"]["pending"]), (&50.into(), &0.into()));
    }
    // Without lengths the padding counts, and is not finite.
    let (code, object) = judged(&directions, &acts, &["--tensor", "h"]);
    assert_eq!((code, &object["verdict"]["invalid"]), (1, &5.into()), "{object}");

    let base =
        ["audit", utf8(&directions), "--activations", utf8(&acts), "--statistic", "mean", "--tensor", "h"];
    let mut beyond = lengths.clone();
    beyond[3] = 21;
    let mut negative = lengths.clone();
    negative[3] = -1;
    let bytes = |of: &[i64]| of.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    for (name, file, sentence) in [
        (
            "beyond.npy",
            npy("<i8", &[50], &bytes(&beyond)),
            "sequence 3 is said to have 21 tokens, the array has 20",
        ),
        ("negative.npy", npy("<i8", &[50], &bytes(&negative)), "a length is below 0"),
        ("few.npy", npy("<i8", &[49], &bytes(&lengths[1..])), "50 lengths are needed, its shape is [49]"),
        ("floats.npy", npy_f32(&[50], &[16.0; 50]), "its numbers are not integers"),
    ] {
        let path = folder.write(name, file);
        refused(&[&base[..], &["--lengths", utf8(&path)]].concat(), 3, 1, sentence);
    }
    refused(&[&base[..], &["--lengths", "h"]].concat(), 3, 1, "not integers");
    refused(&[&base[..6], &["--tensor", "n"]].concat(), 3, 1, "activations are floating-point");
}

#[test]
fn a_middle_dimension_that_may_be_layers_must_be_named() {
    let folder = Folder::new();
    let directions = folder.sample();
    // The model has four blocks: as layers, the last one is along the direction; as tokens, the first is.
    let rows =
        |at: usize| (0..40).flat_map(move |_| (0..4).flat_map(move |i| if i == at { HIGH } else { CALM }));
    let last = folder.write("last.npy", npy_f32(&[40, 4, WIDTH], &rows(3).collect::<Vec<_>>()));
    let first = folder.write("first.npy", npy_f32(&[40, 4, WIDTH], &rows(0).collect::<Vec<_>>()));
    let base = ["audit", utf8(&directions), "--activations", utf8(&last), "--statistic", "mean"];
    refused(&base, 3, 1, "say --middle tokens or --middle layers");
    for (file, middle, code) in
        [(&last, "layers", 1), (&last, "tokens", 0), (&first, "layers", 0), (&first, "tokens", 1)]
    {
        let (found, object) = judged(&directions, file, &["--middle", middle]);
        assert_eq!((found, &object["verdict"]["judged"]), (code, &40.into()), "{middle}: {object}");
    }
}

#[test]
fn what_does_not_fit_is_an_error_and_never_a_verdict() {
    let folder = Folder::new();
    let directions = folder.sample();
    let good = npy_f32(&[40, WIDTH], &CALM.repeat(40));
    let whole = folder.write("whole.npy", &good);
    let bytes = std::fs::read(&directions).unwrap();
    let torn = folder.write("torn.safetensors", &bytes[..bytes.len() - 9]);
    let uncalibrated = folder.directions("uncalibrated.safetensors", |manifest, _| {
        manifest.layers.iter_mut().for_each(|layer| layer.calibration = None);
    });
    let nothing = folder.path("nothing");
    let w = |name: &str, bytes: Vec<u8>| folder.write(name, bytes);
    let files = [
        (
            &directions,
            &w("wide.npy", npy_f32(&[40, WIDTH + 1], &[0.0; 40 * (WIDTH + 1)])),
            10,
            "has 5 elements, the rows have 6",
        ),
        (
            &directions,
            &w("deep.npy", npy_f32(&[40, 2, WIDTH + 1], &[0.0; 80 * (WIDTH + 1)])),
            10,
            "the rows have 6",
        ),
        (&directions, &w("empty.npy", npy_f32(&[0, WIDTH], &[])), 1, "it has no rows"),
        (&directions, &w("hollow.npy", npy_f32(&[40, 0, WIDTH], &[])), 1, "it has no rows"),
        (&directions, &w("flat.npy", npy_f32(&[40 * WIDTH], &CALM.repeat(40))), 1, "its shape is [200]"),
        (&directions, &w("torn.npy", good[..good.len() - 3].to_vec()), 1, "write the file again"),
        (
            &directions,
            &w("text.npy", b"no array at all".to_vec()),
            1,
            "neither a .npy nor a safetensors file",
        ),
        (&directions, &nothing, 2, "cannot open"),
        (&nothing, &whole, 2, "cannot open"),
        (&torn, &whole, 4, "truncated direction file"),
        (&uncalibrated, &whole, 1, "no calibrated direction file"),
    ];
    for (directions, activations, status, sentence) in files {
        let arguments =
            ["audit", utf8(directions), "--activations", utf8(activations), "--statistic", "mean"];
        refused(&arguments, 3, status, sentence);
    }
    let base = ["audit", utf8(&directions), "--activations", utf8(&whole), "--statistic", "mean"];
    let small = w("small.npy", npy_f32(&[1, WIDTH], &CALM));
    let key = minisign::KeyPair::generate_unencrypted_keypair().unwrap().pk.to_base64();
    let options = [
        (&["--layer", "2"][..], 11, "no direction for layer 2"),
        (&["--rate", "0.001"], 14, "has the rates [0.05]"),
        (&["--horizon", "4"], 1, "has the horizons {1, 16}, not 4"),
        (&["--level", "2"], 1, "a level of 2"),
        (&["--concern", "0.01"], 1, "a share of concern of 0.01"),
        (&["--tensor", "h"], 1, "has no tensor names"),
        (&["--reference", utf8(&nothing)], 2, "cannot open"),
        (&["--reference", utf8(&small)], 14, "a window of 1 sequences could never show a drift"),
        (&["--key", &key], 17, "unsigned direction file"),
        (&["--digest", "77"], 1, "give 64 hex characters"),
    ];
    for (options, status, sentence) in options {
        refused(&[&base[..], options].concat(), 3, status, sentence);
    }
    refused(
        &[&base[..4], &["--statistic", "last"]].concat(),
        3,
        1,
        "the file has none for the last over tokens",
    );
}

#[test]
fn a_command_line_that_is_not_understood_is_an_error_and_not_a_verdict() {
    let folder = Folder::new();
    let directions = folder.sample();
    let rows = folder.write("rows.npy", npy_f32(&[40, WIDTH], &CALM.repeat(40)));
    let good = ["audit", utf8(&directions), "--activations", utf8(&rows)];
    for wrong in [
        &["audit"][..],
        &good[..2],
        &[&good[..], &["--no-such-option"]].concat(),
        &[&good[..], &["--rate", "often"]].concat(),
        &[&good[..], &["--statistic", "median"]].concat(),
        &[&good[..], &["--horizon", "-1"]].concat(),
        &[&good[..], &["--reference-tensor", "h"]].concat(),
    ] {
        let output = emaudit(wrong);
        assert_eq!(output.status.code(), Some(3), "{wrong:?}: {output:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    }
    assert_eq!(emaudit(&["audit", "--help"]).status.code(), Some(0));
    assert_eq!(emaudit(&["score", "--no-such-option"]).status.code(), Some(2));
    assert_eq!(emaudit(&["--version"]).status.code(), Some(0));
}

#[cfg(target_os = "linux")]
#[test]
fn a_verdict_that_cannot_be_written_is_an_error() {
    let folder = Folder::new();
    let directions = folder.sample();
    let rows = folder.write("rows.npy", npy_f32(&[40, WIDTH], &CALM.repeat(40)));
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_emaudit"));
    command.args(["audit", utf8(&directions), "--activations", utf8(&rows), "--statistic", "mean"]);
    assert_eq!(command.stdout(full).output().unwrap().status.code(), Some(3));
}
