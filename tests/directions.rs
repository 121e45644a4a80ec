//! Direction files from outside: what is written comes back, what is broken is refused with the right status.

mod attacks;

use attacks::forge::{self, Forge, WIDTH};
use emaudit::directions::{Directions, LayerTensors, Mode, OpenOptions, digest, to_bytes, write};
use emaudit::{Error, Operation, Probe, Rows, RowsMut, ScoreUnit, Status, Steering, SteeringOptions};
use serde_json::Value;
use std::borrow::Cow;
use std::sync::Arc;

const CARELESS: OpenOptions = options(Mode::Copied, false);
const MAPPED: OpenOptions = options(Mode::Mapped, true);

const fn options(mode: Mode, verify: bool) -> OpenOptions {
    OpenOptions { mode, verify, expected_digest: None, trusted_key: None, signature: None }
}

/// The bytes of the sample file, by the library's writer.
fn sample() -> Vec<u8> {
    let values = forge::tensors();
    to_bytes(&forge::typed_manifest(), &forge::layer_tensors(&values)).expect("the sample is sound")
}

fn open(bytes: &[u8]) -> emaudit::Result<Directions> {
    Directions::from_bytes(bytes, &OpenOptions::default())
}

/// Bit by bit: an f32 comparison would take -0.0 for 0.0.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn what_is_written_comes_back_from_bytes_and_from_a_file_in_both_modes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sample.safetensors");
    let values = forge::tensors();
    let written = write(&path, &forge::typed_manifest(), &forge::layer_tensors(&values)).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let opened = [
        open(&bytes).unwrap(),
        Directions::open(&path, &OpenOptions::default()).unwrap(),
        Directions::open(&path, &MAPPED).unwrap(),
    ];
    for directions in &opened {
        assert_eq!(directions.manifest(), &forge::typed_manifest());
        assert_eq!(directions.digest(), written);
        assert!(directions.verified());
        assert_eq!(directions.width(), WIDTH);
        assert_eq!(directions.layers().collect::<Vec<_>>(), [1, 3]);
        for (layer, at) in [(1, 0), (3, 2)] {
            let found = directions.layer(layer).unwrap();
            assert_eq!(bits(&found.direction), bits(&values[at]));
            assert_eq!(bits(&found.aligned_mean), bits(&values[at + 1]));
            assert_eq!(found.calibration.unwrap().sigma, 0.75);
            let in_place = matches!(found.direction, Cow::Borrowed(_));
            assert!(in_place || cfg!(target_endian = "big"));
        }
        let missing = directions.layer(2).unwrap_err();
        assert_eq!(missing.to_string(), "no direction for layer 2; the file has layers [1, 3]");
        assert_eq!(missing.status(), Status::LayerNotFound);
    }
}

#[test]
fn bytes_at_any_address_open() {
    let bytes = sample();
    for shift in 0..8 {
        let shifted = [vec![0; shift], bytes.clone()].concat();
        assert!(open(&shifted[shift..]).is_ok(), "at an offset of {shift}");
    }
}

#[test]
fn the_same_input_gives_the_same_bytes_everywhere() {
    let bytes = sample();
    assert_eq!(bytes, sample());
    let values = forge::tensors();
    let mut reversed = forge::layer_tensors(&values);
    reversed.reverse();
    assert_eq!(bytes, to_bytes(&forge::typed_manifest(), &reversed).unwrap());
    // Pinned: whoever changes what is written sees it here and says so in CHANGELOG.md.
    let pinned = "b368c32c5ce0234e7e0dcff98ee36b7ef7e3fbfeb48541fc65168e7f1da9415a";
    assert_eq!(digest::to_hex(&open(&bytes).unwrap().digest()), pinned);
}

#[test]
fn a_foreign_safetensors_reader_opens_our_files() {
    let bytes = sample();
    let foreign = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let names = ["layer.1.direction", "layer.1.aligned_mean", "layer.3.direction", "layer.3.aligned_mean"];
    assert_eq!(foreign.len(), names.len());
    for (name, values) in names.iter().zip(forge::tensors()) {
        let view = foreign.tensor(name).unwrap();
        assert_eq!((view.dtype(), view.shape()), (safetensors::Dtype::F32, &[WIDTH][..]));
        assert_eq!(view.data(), values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>());
    }
    let (header_len, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!((8 + header_len) % 64, 0);
    let metadata = header.metadata().as_ref().unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&metadata["emaudit.manifest"]).unwrap();
    assert_eq!(manifest, serde_json::to_value(forge::typed_manifest()).unwrap());
}

#[test]
fn another_writers_file_opens_with_unknown_keys_and_any_order() {
    let mut forge = Forge::with_manifest(|m| m["a word from the future"] = serde_json::json!({"n": 1}));
    forge.metadata.push(("somebody.else".into(), forge::quoted("said this")));
    forge.set_metadata("emaudit.requires", "\" ,, \"");
    forge.metadata.reverse();
    forge.tensors.reverse();
    let directions = open(&forge.bytes()).unwrap();
    assert_eq!(directions.manifest(), &forge::typed_manifest());
    let layer = directions.layer(3).unwrap();
    assert_eq!(bits(&layer.direction), bits(&forge::tensors()[2]));
}

#[test]
fn every_attack_meets_its_refusal() {
    assert!(open(&Forge::sound().bytes()).is_ok(), "the forge itself must be sound");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("attack");
    let attacks = attacks::all();
    let mut wrong = Vec::new();
    for attack in &attacks {
        std::fs::write(&path, &attack.bytes).unwrap();
        let opened = [open(&attack.bytes), Directions::open(&path, &MAPPED)];
        for error in opened.into_iter().map(Result::err) {
            let sentence = error.as_ref().map(Error::to_string).unwrap_or_default();
            let status = error.map(|e| e.status());
            if status != Some(attack.status) || !sentence.contains(attack.sentence) {
                wrong.push(format!("{}: {status:?} {sentence:?}", attack.name));
            }
            assert!(!sentence.chars().any(char::is_control), "{}: {sentence:?}", attack.name);
        }
        // Whatever the file, careless opening never panics, and never claims to have verified anything.
        let careless = Directions::from_bytes(&attack.bytes, &CARELESS);
        assert!(careless.is_ok_and(|d| !d.verified()) == (attack.status == Status::DigestMismatch));
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert!(attacks.len() > 100, "only {} attacks ran", attacks.len());
}

#[test]
fn every_flipped_bit_is_refused() {
    let sound = sample();
    let data_start = 8 + u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    let mut flipped = sound.clone();
    for bit in 0..8 * sound.len() {
        flipped[bit / 8] ^= 1 << (bit % 8);
        let error = open(&flipped).expect_err(&format!("bit {bit} went unnoticed"));
        if bit / 8 >= data_start {
            assert_eq!(error.status(), Status::DigestMismatch, "bit {bit}: {error}");
        }
        // Unverified, some still open: they may not panic, and they say so.
        if let Ok(directions) = Directions::from_bytes(&flipped, &CARELESS) {
            assert!(!directions.verified() && directions.digest() == [0; 32]);
            assert!(directions.layers().all(|l| directions.layer(l).is_ok()));
        }
        flipped[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(sound.len() > 1000 && flipped == sound);
}

#[test]
fn every_truncation_and_extension_is_refused() {
    let sound = sample();
    for len in 0..sound.len() {
        let status = open(&sound[..len]).expect_err("a part is not a file").status();
        assert_eq!(
            status,
            if len == 0 { Status::NotADirectionFile } else { Status::Truncated },
            "{len} bytes"
        );
        assert!(Directions::from_bytes(&sound[..len], &CARELESS).is_err());
    }
    for tail in [&b"\0"[..], b" ", &sound] {
        let status = open(&[&sound, tail].concat()).expect_err("a tail is not part of it").status();
        assert_eq!(status, Status::Malformed);
    }
}

#[test]
fn an_expected_digest_binds_even_without_verify() {
    let bytes = sample();
    let right = open(&bytes).unwrap().digest();
    let with = |verify, expected| {
        let options = OpenOptions { verify, expected_digest: Some(expected), ..OpenOptions::default() };
        Directions::from_bytes(&bytes, &options)
    };
    for verify in [true, false] {
        let directions = with(verify, right).unwrap();
        assert!(directions.verified() && directions.digest() == right);
        assert_eq!(with(verify, [7; 32]).unwrap_err().status(), Status::DigestMismatch);
    }
    let careless = Directions::from_bytes(&bytes, &CARELESS).unwrap();
    assert!(!careless.verified() && careless.digest() == [0; 32]);
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let values = forge::tensors();
    let manifest = forge::typed_manifest();
    let good = forge::layer_tensors(&values);
    let refused = |layers: &[LayerTensors<'_>]| to_bytes(&manifest, layers).unwrap_err().status();
    assert_eq!(refused(&good[..1]), Status::InvalidArgument);
    assert_eq!(refused(&[good[0], good[0]]), Status::InvalidArgument);
    assert_eq!(refused(&[good[0], good[1], good[1]]), Status::InvalidArgument);
    assert_eq!(
        refused(&[good[0], LayerTensors { direction: &values[2][..4], ..good[1] }]),
        Status::WidthMismatch
    );
    assert_eq!(refused(&[good[0], LayerTensors { direction: &[0.0; WIDTH], ..good[1] }]), Status::Schema);
    assert_eq!(
        refused(&[good[0], LayerTensors { aligned_mean: &[f32::NAN; WIDTH], ..good[1] }]),
        Status::Schema
    );
    let mut nan = manifest.clone();
    nan.layers[0].calibration.as_mut().unwrap().quantiles[0].1 = f64::NAN;
    assert_eq!(to_bytes(&nan, &good).unwrap_err().status(), Status::Schema);
}

#[test]
fn numbers_survive_exactly() {
    let values = forge::tensors();
    let mut manifest = forge::typed_manifest();
    let mut state = 1u64;
    for _ in 0..500 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        manifest.layers[1].calibration.as_mut().unwrap().sigma =
            f64::from_bits((state >> 12) | (1023 << 52)) * 1e-7;
        manifest.evidence.families[0].controls[0].seed = state;
        let bytes = to_bytes(&manifest, &forge::layer_tensors(&values)).unwrap();
        assert_eq!(open(&bytes).unwrap().manifest(), &manifest);
    }
}

#[test]
fn a_failed_write_leaves_the_old_file_and_no_litter() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sample.safetensors");
    let values = forge::tensors();
    let layers = forge::layer_tensors(&values);
    let mut manifest = forge::typed_manifest();
    write(&path, &manifest, &layers).unwrap();
    let before = std::fs::read(&path).unwrap();
    manifest.layers[0].calibration.as_mut().unwrap().sigma = -1.0;
    assert_eq!(write(&path, &manifest, &layers).unwrap_err().status(), Status::Schema);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    // A folder in the way: the rename fails after everything was written.
    manifest.layers[0].calibration.as_mut().unwrap().sigma = 1.0;
    let folder_in_the_way = folder.path().join("taken");
    std::fs::create_dir(&folder_in_the_way).unwrap();
    assert_eq!(write(&folder_in_the_way, &manifest, &layers).unwrap_err().status(), Status::Io);
    assert_eq!(write(&folder.path().join("no/such"), &manifest, &layers).unwrap_err().status(), Status::Io);
    // An open map keeps the old file through a replacement.
    let old = Directions::open(&path, &MAPPED).unwrap();
    write(&path, &manifest, &layers).unwrap();
    assert_ne!(std::fs::read(&path).unwrap(), before);
    assert_eq!(bits(&old.layer(3).unwrap().direction), bits(&values[2]));
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn what_is_no_file_is_an_io_error() {
    let folder = tempfile::tempdir().unwrap();
    for mode in [Mode::Copied, Mode::Mapped] {
        let options = OpenOptions { mode, ..OpenOptions::default() };
        let is_folder = Directions::open(folder.path(), &options).unwrap_err();
        assert_eq!(is_folder.status(), Status::Io);
        assert!(is_folder.to_string().contains("not a regular file"), "{is_folder}");
        assert_eq!(
            Directions::open(folder.path().join("nothing"), &options).unwrap_err().status(),
            Status::Io
        );
        // Two gigabytes of nothing: refused by size, before a byte is read.
        let sparse = folder.path().join("sparse");
        std::fs::File::create(&sparse).unwrap().set_len(2 << 30).unwrap();
        let error = Directions::open(&sparse, &options).unwrap_err();
        assert_eq!(error.status(), Status::NotADirectionFile);
        assert!(error.to_string().contains("1073741824"), "{error}");
    }
}

#[test]
fn directions_are_shared_between_threads() {
    let directions = Arc::new(open(&sample()).unwrap());
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let directions = Arc::clone(&directions);
            std::thread::spawn(move || bits(&directions.layer(1).unwrap().direction))
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), bits(&forge::tensors()[0]));
    }
}

#[test]
fn a_layer_may_go_without_calibration_and_says_so() {
    let absent =
        Forge::with_manifest(|m| drop(m["layers"][0].as_object_mut().unwrap().remove("calibration")));
    let null = Forge::with_manifest(|m| m["layers"][0]["calibration"] = Value::Null);
    for forge in [absent, null] {
        let directions = Directions::from_bytes(&forge.bytes(), &OpenOptions::default()).unwrap();
        assert!(directions.layer(1).unwrap().calibration.is_none());
        assert!(directions.layer(3).unwrap().calibration.is_some());
        let mut rows = [1.0f32; 5];
        let probe = Probe::new(Arc::new(directions), 1).unwrap();
        assert_eq!(probe.sigma(), None);
        let mut score = [7.0];
        let refused =
            probe.score(&Rows::new(&rows, 1, 5, 5).unwrap(), ScoreUnit::AlignedSd, &mut score, None);
        assert_eq!(refused.unwrap_err().status(), Status::NotCalibrated);
        assert_eq!(score, [7.0], "nothing was written");
        // Subtracting needs no scale; scoring in it on the way does.
        let options = SteeringOptions::new(Operation::Subtract { alpha: 1.0 });
        let options = SteeringOptions { allow_nonspecific: true, ..options };
        let steering = Steering::new(&probe, options).unwrap();
        let mut view = RowsMut::new(&mut rows, 1, 5, 5).unwrap();
        let refused = steering.score_and_apply(&mut view, ScoreUnit::AlignedSd, &mut score, None, None);
        assert_eq!(refused.unwrap_err().status(), Status::NotCalibrated);
        steering.score_and_apply(&mut view, ScoreUnit::Raw, &mut score, None, None).unwrap();
        assert_eq!(rows[0], 1.0 - 3.0);
    }
}
