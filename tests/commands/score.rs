use super::{Folder, LAYER, emaudit, forge, lines, npy, npy_f32, refused, text, utf8};
use emaudit::directions::schema::{Aggregation, Threshold};
use emaudit::directions::{Directions, OpenOptions};
use emaudit::{Probe, Status};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use serde_json::Value;

const WIDTH: usize = forge::WIDTH;
/// Exact in every dtype.
const ROWS: [[f32; WIDTH]; 4] = [
    [1.0, 0.0, 0.0, 0.0, 0.0],
    [1.0, 2.0, 3.0, 4.0, 5.0],
    [-2.0, 0.5, 0.25, 8.0, -1.0],
    [0.0, 0.0, 0.0, 0.0, 0.0],
];

fn flat() -> Vec<f32> {
    ROWS.concat()
}

/// Raw scores along 1, 2, 3, 4, 5 from the mean 0, in f64.
fn exact() -> Vec<f64> {
    let dot =
        |row: &[f32; WIDTH]| row.iter().zip(1..).map(|(x, v)| f64::from(*x) * f64::from(v)).sum::<f64>();
    ROWS.iter().map(|row| dot(row) / 55f64.sqrt()).collect()
}

/// Runs the command and compares every score with the exact one, within the bound of the numeric contract.
fn compare(arguments: &[&str], sigma: f64) {
    let output = emaudit(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stdout));
    let found = lines(&output);
    assert_eq!(found.len(), ROWS.len() + 1);
    let directions = Directions::open(arguments[1], &OpenOptions::default()).unwrap();
    let probe = Probe::new(directions.into(), LAYER).unwrap();
    for (i, (exact, row)) in exact().iter().zip(&ROWS).enumerate() {
        assert_eq!((&found[i]["row"], &found[i]["state"]), (&Value::from(i), &Value::from("scored")));
        let norm = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let wanted = exact / sigma;
        let bound = probe.error_bound(norm) / sigma + wanted.abs() * f64::from(f32::EPSILON);
        let score = found[i]["score"].as_f64().unwrap();
        assert!((score - wanted).abs() <= bound, "row {i}: {score}, {wanted} +- {bound}");
    }
    let last = found.last().unwrap();
    assert_eq!((&last["ok"], &last["rows"], &last["nonfinite"]), (&true.into(), &4.into(), &0.into()));
}

#[test]
fn every_dtype_and_container_gives_the_scores() {
    let folder = Folder::new();
    let directions = folder.sample();
    let f32s: Vec<u8> = flat().iter().flat_map(|x| x.to_le_bytes()).collect();
    let f32s_be: Vec<u8> = flat().iter().flat_map(|x| x.to_be_bytes()).collect();
    let f16s: Vec<u8> = flat().iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
    let bf16s: Vec<u8> = flat().iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    let shape = vec![ROWS.len(), WIDTH];
    let mut files = vec![
        folder.write("f4.npy", npy("<f4", &shape, &f32s)),
        folder.write("f4be.npy", npy(">f4", &shape, &f32s_be)),
        folder.write("f2.npy", npy("<f2", &shape, &f16s)),
    ];
    for (name, dtype, bytes) in [
        ("f32", safetensors::Dtype::F32, &f32s),
        ("f16", safetensors::Dtype::F16, &f16s),
        ("bf16", safetensors::Dtype::BF16, &bf16s),
    ] {
        let view = TensorView::new(dtype, shape.clone(), bytes).unwrap();
        files.push(folder.write(name, safetensors::serialize([("h", view)], None).unwrap()));
    }
    assert_eq!(files.len(), 6);
    for file in &files {
        let arguments = ["score", utf8(&directions), utf8(file), "--layer", "3"];
        compare(&arguments, 0.75);
        compare(&[&arguments[..], &["--raw"]].concat(), 1.0);
    }
}

#[test]
fn of_several_tensors_one_is_named_and_of_all_layers_one_is_taken() {
    let folder = Folder::new();
    let directions = folder.sample();
    // The layer's rows among those of three other layers, which are not numbers.
    let rows = ROWS.iter().flat_map(|row| [[f32::NAN; WIDTH], [f32::NAN; WIDTH], [f32::NAN; WIDTH], *row]);
    let bytes: Vec<u8> = rows.flatten().flat_map(|x| x.to_le_bytes()).collect();
    let view = |shape| TensorView::new(safetensors::Dtype::F32, shape, &bytes).unwrap();
    let tensors = [("h", view(vec![4, 4, WIDTH])), ("flat", view(vec![16, WIDTH]))];
    let file = folder.write("all.safetensors", safetensors::serialize(tensors, None).unwrap());
    let arguments = ["score", utf8(&directions), utf8(&file), "--layer", "3"];
    compare(&[&arguments[..], &["--tensor", "h"]].concat(), 0.75);
    refused(&arguments, 1, 1, "choose one of its tensors with --tensor: ");
    refused(&[&arguments[..], &["--tensor", "x"]].concat(), 1, 1, "no tensor \"x\"; there are: ");
}

#[test]
fn a_row_that_is_not_finite_is_never_clean_and_the_exit_status_says_so() {
    let folder = Folder::new();
    let directions = folder.sample();
    let mut rows = flat();
    rows[WIDTH + 2] = f32::NAN;
    rows[3 * WIDTH] = f32::NEG_INFINITY;
    let file = folder.write("rows.npy", npy_f32(&[4, WIDTH], &rows));
    let arguments = ["score", utf8(&directions), utf8(&file), "--layer", "3", "--rate", "0.05"];
    let output = emaudit(&[&arguments[..], &["--json"]].concat());
    assert_eq!(output.status.code(), Some(3));
    let found = lines(&output);
    let states: Vec<&str> = found[..4].iter().map(|l| l["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["clean", "nonfinite", "flagged", "nonfinite"]);
    assert!(found[1]["score"].is_null() && found[3]["score"].is_null());
    let last = &found[4];
    assert_eq!((&last["ok"], &last["status"]), (&false.into(), &(Status::NonFinite as i32).into()));
    assert_eq!((&last["nonfinite"], &last["flagged"], &last["clean"]), (&2.into(), &1.into(), &false.into()));
    let output = emaudit(&arguments);
    assert_eq!(output.status.code(), Some(3));
    let table = text(&output.stdout);
    assert!(table.contains("         1             -  nonfinite\n"), "{table}");
    assert!(table.contains("4 row(s) at layer 3, 2 not finite, 1 flagged: above 1.7000 sd"), "{table}");
}

#[test]
fn a_sequence_gets_the_verdict_of_the_monitor() {
    let folder = Folder::new();
    let directions = folder.sample();
    let tokens = |n: usize, row: [f32; WIDTH]| npy_f32(&[n, WIDTH], &row.repeat(n));
    let far = folder.write("far.npy", tokens(16, ROWS[1]));
    let near = folder.write("near.npy", tokens(20, ROWS[3]));
    let short = folder.write("short.npy", tokens(15, ROWS[1]));
    let mut broken = ROWS[1].repeat(16);
    broken[7] = f32::INFINITY;
    let broken = folder.write("broken.npy", npy_f32(&[16, WIDTH], &broken));
    for (file, rate, state, horizon, code) in [
        (&far, "0.01", "flagged", 16, 4),
        (&near, "0.01", "clean", 16, 0),
        (&short, "0.01", "pending", 16, 5),
        (&short, "0.05", "flagged", 1, 4),
        (&broken, "0.01", "invalid", 0, 3),
    ] {
        let arguments =
            ["score", utf8(&directions), utf8(file), "--layer", "3", "--rate", rate, "--sequence"];
        let output = emaudit(&[&arguments[..], &["--json"]].concat());
        assert_eq!(output.status.code(), Some(code));
        let last = lines(&output).pop().unwrap();
        assert_eq!((&last["ok"], &last["clean"]), (&(state != "invalid").into(), &(code == 0).into()));
        let verdict = last["verdict"].clone();
        assert_eq!((&verdict["state"], &verdict["horizon"]), (&state.into(), &horizon.into()), "{verdict}");
        let page = emaudit(&arguments);
        assert_eq!(page.status.code(), Some(code));
        assert!(text(&page.stdout).lines().any(|l| l.starts_with(state)), "{}", text(&page.stdout));
    }
}

#[test]
fn what_cannot_be_scored_is_refused_with_cause_and_mend() {
    let folder = Folder::new();
    let directions = folder.sample();
    let rows = |name: &str, shape: &[usize]| {
        folder.write(name, npy_f32(shape, &vec![1.0; shape.iter().product()])).to_str().unwrap().to_owned()
    };
    let good = rows("good", &[2, WIDTH]);
    let mut cut = npy_f32(&[2, WIDTH], &[1.0; 2 * WIDTH]);
    cut.pop();
    let cut = folder.write("cut", cut);
    let [one, other] = [npy_f32(&[2, WIDTH], &[1.0; 2 * WIDTH]), npy_f32(&[WIDTH], &[1.0; WIDTH])];
    let two = folder.write("two", [&one[..], &other].concat());
    let double = folder.write("double", npy("<f8", &[1, WIDTH], &[0; 8 * WIDTH]));
    let prose = folder.write("prose", "the quick brown fox");
    let mut claims = (1u64 << 40).to_le_bytes().to_vec();
    claims.extend(b"{}");
    let claims = folder.write("claims", claims);
    let missing = folder.path("missing");
    let cases: &[(&str, &[&str], Status, &str)] = &[
        (&good, &["--layer", "2"], Status::LayerNotFound, "the file has layers [1, 3]"),
        (&good, &["--layer", "3", "--rate", "0.01"], Status::RateUnsupported, "file has the rates [0.05]"),
        (&good, &["--layer", "3", "--rate", "0.2", "--sequence"], Status::RateUnsupported, "[0.01, 0.05]"),
        (&good, &["--layer", "3", "--tensor", "h"], Status::InvalidArgument, "no tensor names"),
        (&rows("narrow", &[2, 4]), &["--layer", "3"], Status::WidthMismatch, "has 5 elements"),
        (&rows("one", &[WIDTH]), &["--layer", "3"], Status::InvalidArgument, "give [rows, width]"),
        (
            &rows("hf", &[2, 5, WIDTH]),
            &["--layer", "3"],
            Status::InvalidArgument,
            "begin with the embeddings",
        ),
        (&rows("few", &[2, 3, WIDTH]), &["--layer", "3"], Status::InvalidArgument, "the model has 4 blocks"),
        (&rows("none", &[0, WIDTH]), &["--layer", "3"], Status::InvalidArgument, "it has no rows"),
        (
            &rows("no tokens", &[0, WIDTH]),
            &["--layer", "3", "--rate", "0.01", "--sequence"],
            Status::InvalidArgument,
            "it has no rows",
        ),
        (&rows("no prompts", &[0, 4, WIDTH]), &["--layer", "3"], Status::InvalidArgument, "it has no rows"),
        (utf8(&two), &["--layer", "3"], Status::InvalidArgument, "148 bytes follow the array"),
        (utf8(&cut), &["--layer", "3"], Status::InvalidArgument, "write the file again"),
        (utf8(&double), &["--layer", "3"], Status::InvalidArgument, "float64"),
        (utf8(&prose), &["--layer", "3"], Status::InvalidArgument, "neither a .npy nor a safetensors"),
        (utf8(&claims), &["--layer", "3"], Status::InvalidArgument, "claims 1099511627776 bytes"),
        (utf8(&missing), &["--layer", "3"], Status::Io, "cannot open"),
    ];
    for (file, options, status, sentence) in cases {
        let arguments = [&["score", utf8(&directions), file][..], options].concat();
        refused(&arguments, 1, *status as i32, sentence);
    }
    for wrong in [&["--raw", "--rate", "0.05"][..], &["--sequence"]] {
        let arguments = [&["score", utf8(&directions), &good, "--layer", "3"][..], wrong].concat();
        assert_eq!(emaudit(&arguments).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn more_rows_than_one_block_are_all_scored() {
    let folder = Folder::new();
    let directions = folder.sample();
    // A block is 16 MiB; this is a bit more than two.
    let n = 2 * (16 << 20) / (4 * WIDTH) + 7;
    let mut rows = ROWS[3].repeat(n);
    let at = n - 2;
    rows[at * WIDTH..(at + 1) * WIDTH].copy_from_slice(&ROWS[1]);
    let file = folder.write("many.npy", npy_f32(&[n, WIDTH], &rows));
    let output =
        emaudit(&["score", utf8(&directions), utf8(&file), "--layer", "3", "--rate", "0.05", "--json"]);
    let found = text(&output.stdout);
    assert_eq!(found.lines().count(), n + 1);
    let flagged: Vec<usize> = found
        .lines()
        .enumerate()
        .filter(|(_, l)| l.contains("\"state\":\"flagged\""))
        .map(|(i, _)| i)
        .collect();
    assert_eq!(flagged, [at]);
}

#[test]
fn a_flagged_row_is_no_success_and_a_clean_one_is() {
    let folder = Folder::new();
    let directions = folder.sample();
    for (name, row, flagged, code) in [("far", ROWS[1], 1, 4), ("near", ROWS[3], 0, 0)] {
        let file = folder.write(name, npy_f32(&[2, WIDTH], &[ROWS[3], row].concat()));
        let arguments = ["score", utf8(&directions), utf8(&file), "--layer", "3"];
        let judged = emaudit(&[&arguments[..], &["--rate", "0.05", "--json"]].concat());
        assert_eq!(judged.status.code(), Some(code));
        let last = lines(&judged).pop().unwrap();
        assert_eq!((&last["ok"], &last["flagged"]), (&true.into(), &flagged.into()));
        assert_eq!(last["clean"], code == 0);
        // Without a rate nothing is judged, so nothing is said to be clean.
        let scored = emaudit(&[&arguments[..], &["--json"]].concat());
        assert!(scored.status.success());
        assert_eq!(lines(&scored).pop().unwrap().get("clean"), None);
    }
}

#[test]
fn directions_after_the_final_norm_take_no_block_outputs() {
    let folder = Folder::new();
    let model = folder.write("model.json", forge::manifest()["model"].to_string());
    let vector = folder.write("v.npy", npy_f32(&[WIDTH], &[1.0; WIDTH]));
    let directions = folder.path("norm.safetensors");
    let fixed = ["convert", "import", utf8(&vector), "--model", utf8(&model), "--to", utf8(&directions)];
    let state = ["--producer", "x", "--site", "final-norm", "--layers", "3"];
    assert!(emaudit(&[&fixed[..], &state].concat()).status.success());
    let blocks = folder.write("blocks.npy", npy_f32(&[2, 4, WIDTH], &[1.0; 8 * WIDTH]));
    let rows = folder.write("rows.npy", npy_f32(&[2, WIDTH], &[1.0; 2 * WIDTH]));
    let score = |rows| ["score", utf8(&directions), rows, "--layer", "3", "--raw"];
    refused(&score(utf8(&blocks)), 1, 1, "save the rows after it as [rows, width]");
    assert!(emaudit(&score(utf8(&rows))).status.success());
}

#[test]
fn at_the_first_token_every_statistic_has_one_threshold() {
    let folder = Folder::new();
    let rows = folder.write("rows.npy", npy_f32(&[1, WIDTH], &ROWS[3]));
    let directions = |name: &str, z: f64| {
        folder.directions(name, |manifest, _| {
            let thresholds = &mut manifest.layers[1].calibration.as_mut().unwrap().thresholds;
            let mean = thresholds[0];
            let last = Threshold { statistic: Aggregation::Last, z, rate_upper: 0.045, ..mean };
            thresholds.push(Threshold { statistic: Aggregation::Max, ..mean });
            thresholds.push(last);
        })
    };
    let (agreed, parted) = (directions("agreed", 1.7), directions("parted", 1.8));
    let score = |file| ["score", file, utf8(&rows), "--layer", "3", "--rate", "0.05"];
    let output = emaudit(&[&score(utf8(&agreed))[..], &["--json"]].concat());
    assert!(output.status.success(), "{}", text(&output.stdout));
    // That on the last token.
    assert_eq!(lines(&output).pop().unwrap()["threshold"]["rate_upper"], 0.045);
    let sentence = "at the first token the last and the mean are one number";
    refused(&score(utf8(&parted)), 1, Status::Schema as i32, sentence);
}
