//! The two digests of a direction file: the plain SHA-256 of its bytes, which a caller pins, and the content
//! digest that the file states about itself, which finds damage without a sidecar. Beside them, the digest of its
//! model's vocabulary that it states.

use crate::error::{Error, Result};
use sha2::{Digest, Sha256};

/// Characters of a digest in hex.
pub(super) const HEX: usize = 64;

/// SHA-256 of the whole file, as `sha256sum` prints it.
pub(super) fn of_file(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// SHA-256 of the file with the [`HEX`] characters at `at` (where the file states the result) read as `0`.
///
/// The caller guarantees that `at + HEX` lies inside `bytes`.
pub(super) fn of_content(bytes: &[u8], at: usize) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(&bytes[..at]);
    hash.update([b'0'; HEX]);
    hash.update(&bytes[at + HEX..]);
    hash.finalize().into()
}

/// The `tokenizer_digest` of a model: SHA-256 of each token's UTF-8 bytes, each followed by 0x0A.
///
/// The caller gives the tokens in the order of their ids, special and added ones too, and leaves out ids that have none.
/// ```
/// use emaudit::directions::digest;
///
/// // printf '<end>\nhello\n' | sha256sum
/// let digest = digest::of_tokens(["<end>", "hello"]);
/// assert_eq!(digest::to_hex(&digest), "9bb85064b1452ed2debc634bd136bf5a7ce341a474a2cf8c8610b393e79e8cca");
/// ```
pub fn of_tokens<'a>(tokens: impl IntoIterator<Item = &'a str>) -> [u8; 32] {
    let mut hash = Sha256::new();
    for token in tokens {
        hash.update(token.as_bytes());
        hash.update(b"\n");
    }
    hash.finalize().into()
}

/// Refuses bytes whose digest is not the expected one.
pub(super) fn compare(expected: &[u8; 32], found: &[u8; 32]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::DigestMismatch { expected: to_hex(expected), found: to_hex(found) })
}

/// A digest as 64 lower-case hex characters.
pub fn to_hex(digest: &[u8; 32]) -> String {
    digest
        .iter()
        .flat_map(|b| [b >> 4, b & 15])
        .map(|n| char::from(b"0123456789abcdef"[n as usize]))
        .collect()
}

/// Reads 64 hex characters, either case, as printed by `sha256sum`.
///
/// Any other text is [`Error::InvalidArgument`].
pub fn from_hex(text: &str) -> Result<[u8; 32]> {
    let nibbles: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|n| n as u8)).collect();
    let mut digest = [0; 32];
    match nibbles {
        Some(n) if n.len() == HEX => {
            digest.iter_mut().zip(n.chunks_exact(2)).for_each(|(d, pair)| *d = pair[0] << 4 | pair[1]);
            Ok(digest)
        }
        _ => Err(Error::InvalidArgument(format!(
            "{:?} is not a SHA-256 digest; give 64 hex characters, as sha256sum prints them",
            super::json::plain(text)
        ))),
    }
}

/// Whether a text is a digest in the one spelling that files use.
pub(super) fn is_canonical_hex(text: &str) -> bool {
    text.len() == HEX && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_sha256() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(to_hex(&of_file(b"abc")), abc);
        assert_eq!(from_hex(&abc.to_uppercase()).unwrap(), of_file(b"abc"));
        for wrong in ["", "ba78", &abc[1..], &format!("{abc}0"), &abc.replace('b', "g")] {
            assert!(from_hex(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_content_digest_ignores_only_its_own_place() {
        let mut bytes = vec![b'x'; 200];
        let before = of_content(&bytes, 70);
        bytes[70..134].fill(b'f');
        assert_eq!(of_content(&bytes, 70), before);
        for at in [0, 69, 134, 199] {
            bytes[at] ^= 1;
            assert_ne!(of_content(&bytes, 70), before);
            bytes[at] ^= 1;
        }
    }
}
