//! Files signed with minisign: what a trusted key lets in and what it keeps out, with what words.

mod attacks;
#[allow(dead_code)] // other tests use more of it
mod skipped;

use attacks::forge;
use emaudit::directions::{Directions, Mode, OpenOptions, TrustedKey, to_bytes};
use emaudit::{Error, Status};
use minisign::KeyPair;
use std::path::{Path, PathBuf};

const COMMENT: &str = "timestamp:1700000000\tfile:sample.safetensors\tversion 7";

/// The bytes of the sample file, by the library's writer.
fn sample() -> Vec<u8> {
    let values = forge::tensors();
    to_bytes(&forge::typed_manifest(), &forge::layer_tensors(&values)).expect("the sample is sound")
}

fn new_key() -> KeyPair {
    KeyPair::generate_unencrypted_keypair().unwrap()
}

fn trusted(pair: &KeyPair) -> TrustedKey {
    TrustedKey::parse(&pair.pk.to_base64()).unwrap()
}

fn sign(pair: &KeyPair, bytes: &[u8]) -> String {
    minisign::sign(Some(&pair.pk), &pair.sk, bytes, Some(COMMENT), None).unwrap().into_string()
}

fn with(key: &TrustedKey, signature: Option<&str>) -> OpenOptions {
    let signature = signature.map(|text| text.as_bytes().to_vec());
    OpenOptions { trusted_key: Some(key.clone()), signature, ..OpenOptions::default() }
}

/// A file and, where given, its signature beside it.
fn place(folder: &Path, bytes: &[u8], signature: Option<&str>) -> PathBuf {
    let path = folder.join("sample.safetensors");
    std::fs::write(&path, bytes).unwrap();
    if let Some(signature) = signature {
        std::fs::write(folder.join("sample.safetensors.minisig"), signature).unwrap();
    }
    path
}

#[test]
fn a_signed_file_opens_with_its_key_from_bytes_and_from_a_file_in_both_modes() {
    let folder = tempfile::tempdir().unwrap();
    let (bytes, pair) = (sample(), new_key());
    let (key, signature) = (trusted(&pair), sign(&pair, &bytes));
    let path = place(folder.path(), &bytes, Some(&signature));
    let careless = OpenOptions { verify: false, ..with(&key, None) };
    let opened = [
        Directions::from_bytes(&bytes, &with(&key, Some(&signature))),
        Directions::open(&path, &with(&key, None)),
        Directions::open(&path, &with(&key, Some(&signature))),
        Directions::open(&path, &OpenOptions { mode: Mode::Mapped, ..with(&key, None) }),
        Directions::open(&path, &careless),
    ];
    let unsigned = Directions::from_bytes(&bytes, &OpenOptions::default()).unwrap();
    assert_eq!(unsigned.signed(), None);
    for directions in opened {
        let directions = directions.unwrap();
        let signed = directions.signed().unwrap();
        assert_eq!((signed.key_id.as_str(), signed.trusted_comment.as_str()), (key.id(), COMMENT));
        assert!(directions.verified());
        assert_eq!(directions.digest(), unsigned.digest());
    }
    // The id is the one that minisign prints.
    let printed = pair.pk.to_box().unwrap().to_string();
    assert!(printed.lines().next().unwrap().contains(key.id()), "{printed}");
    assert_eq!(TrustedKey::parse(&printed).unwrap(), key);
}

#[test]
fn what_the_trusted_key_did_not_sign_is_refused_with_its_own_words() {
    let folder = tempfile::tempdir().unwrap();
    let (bytes, pair, stranger) = (sample(), new_key(), new_key());
    let (key, good) = (trusted(&pair), sign(&pair, &bytes));
    let path = place(folder.path(), &bytes, None);
    let other_key = sign(&stranger, &bytes);
    let other_file = sign(&pair, b"another file");
    let other_comment = good.replace("version 7", "version 8");
    // A stranger who took the trusted key's id: only the mathematics can tell.
    let mut secret = stranger.sk.to_bytes();
    secret[54..62].copy_from_slice(pair.sk.keynum());
    let secret = minisign::SecretKey::from_bytes(&secret).unwrap();
    let posing = minisign::sign(None, &secret, &bytes[..], Some(COMMENT), None).unwrap().into_string();
    assert_eq!(posing.lines().nth(1).unwrap()[..13], good.lines().nth(1).unwrap()[..13]);
    let cases = [
        (&*other_key, Status::UntrustedKey, format!("the trusted key is {}", key.id())),
        (&*other_file, Status::BadSignature, "is not what was signed".into()),
        (&*other_comment, Status::BadSignature, "is not what was signed".into()),
        (&*posing, Status::BadSignature, "is not what was signed".into()),
        ("a note", Status::BadSignature, "not in minisign's format".into()),
        ("", Status::BadSignature, "not in minisign's format".into()),
    ];
    for (signature, status, words) in &cases {
        place(folder.path(), &bytes, Some(signature));
        for result in [
            Directions::from_bytes(&bytes, &with(&key, Some(signature))),
            Directions::open(&path, &with(&key, None)),
            Directions::open(&path, &OpenOptions { mode: Mode::Mapped, ..with(&key, None) }),
        ] {
            let error = result.unwrap_err();
            assert_eq!(error.status(), *status, "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}

#[test]
fn an_unsigned_file_is_refused_where_a_key_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let (bytes, key) = (sample(), trusted(&new_key()));
    let path = place(folder.path(), &bytes, None);
    let error = Directions::open(&path, &with(&key, None)).unwrap_err();
    assert_eq!(error.status(), Status::Unsigned);
    let sentence = format!("there is no {}.minisig; sign it with minisign", path.display());
    assert!(error.to_string().contains(&sentence), "{error}");
    let error = Directions::from_bytes(&bytes, &with(&key, None)).unwrap_err();
    assert!(matches!(error, Error::Unsigned(_)), "{error}");
    // The file that is missing is the direction file, not its signature.
    let missing = Directions::open(folder.path().join("nothing"), &with(&key, None)).unwrap_err();
    assert_eq!(missing.status(), Status::Io);
    std::fs::create_dir(folder.path().join("sample.safetensors.minisig")).unwrap();
    assert_eq!(Directions::open(&path, &with(&key, None)).unwrap_err().status(), Status::Io);
}

#[test]
fn a_signature_without_a_key_and_a_signature_without_end_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (bytes, pair) = (sample(), new_key());
    let signature = sign(&pair, &bytes);
    let keyless = OpenOptions { signature: Some(signature.clone().into()), ..OpenOptions::default() };
    assert_eq!(Directions::from_bytes(&bytes, &keyless).unwrap_err().status(), Status::InvalidArgument);
    let endless = signature + &"\n".repeat(20_000);
    let path = place(folder.path(), &bytes, Some(&endless));
    let error = Directions::open(&path, &with(&trusted(&pair), None)).unwrap_err();
    assert_eq!(error.status(), Status::BadSignature);
    assert!(error.to_string().contains("16384 bytes"), "{error}");
}

#[test]
fn the_signature_is_checked_before_anything_in_the_file_is_read() {
    let (pair, stranger) = (new_key(), new_key());
    let key = trusted(&pair);
    let mut attacks = attacks::all();
    attacks.retain(|attack| !attack.bytes.is_empty()); // nothing is refused as such
    for attack in &attacks {
        let refused = |signature: Option<&str>| {
            Directions::from_bytes(&attack.bytes, &with(&key, signature)).unwrap_err()
        };
        assert_eq!(refused(None).status(), Status::Unsigned, "{}", attack.name);
        let by_stranger = refused(Some(&sign(&stranger, &attack.bytes)));
        assert_eq!(by_stranger.status(), Status::UntrustedKey, "{}", attack.name);
        // Signed nonsense is still nonsense.
        let signed = refused(Some(&sign(&pair, &attack.bytes)));
        assert_eq!(signed.status(), attack.status, "{}", attack.name);
        assert!(signed.to_string().contains(attack.sentence), "{}: {signed}", attack.name);
    }
    assert!(attacks.len() > 100, "only {} attacks ran", attacks.len());
}

#[test]
fn every_flipped_bit_breaks_the_signature() {
    let (mut bytes, pair) = (sample(), new_key());
    let options = OpenOptions { verify: false, ..with(&trusted(&pair), Some(&sign(&pair, &bytes))) };
    // A prime step reaches every position within a byte; all bits would take a minute.
    let mut flipped = 0;
    for bit in (0..8 * bytes.len()).step_by(61) {
        bytes[bit / 8] ^= 1 << (bit % 8);
        let error = Directions::from_bytes(&bytes, &options).unwrap_err();
        assert_eq!(error.status(), Status::BadSignature, "bit {bit}: {error}");
        bytes[bit / 8] ^= 1 << (bit % 8);
        flipped += 1;
    }
    assert!(flipped > 500, "only {flipped} bits were flipped");
    assert!(Directions::from_bytes(&bytes, &options).is_ok());
}

/// The signer that users have, where it is installed (Debian: `apt install minisign`).
#[cfg(unix)]
#[test]
fn minisign_itself_signs_for_us_where_it_is_installed() {
    use std::process::Command;
    if Command::new("minisign").arg("-v").output().is_err() {
        skipped::missing("signatures of minisign itself", "it is not installed");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = place(folder.path(), &sample(), None);
    let minisign = |arguments: &[&str]| {
        let output = Command::new("minisign").current_dir(folder.path()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    minisign(&["-G", "-W", "-p", "key.pub", "-s", "key.sec"]);
    let key = TrustedKey::parse(&std::fs::read_to_string(folder.path().join("key.pub")).unwrap()).unwrap();
    // -l: the legacy kind.
    for kind in [&[][..], &["-l"]] {
        let sign = ["-S", "-s", "key.sec", "-m", "sample.safetensors", "-t", "version 7"];
        minisign(&[&sign[..], kind].concat());
        let directions = Directions::open(&path, &with(&key, None)).unwrap();
        assert_eq!(directions.signed().unwrap().trusted_comment, "version 7");
        let printed = std::fs::read_to_string(folder.path().join("key.pub")).unwrap();
        // minisign 0.11 leaves out leading zeros.
        assert!(printed.contains(key.id().trim_start_matches('0')), "{printed}");
    }
}
