//! Detached signatures in minisign's format: who hands a file out. Checked before anything in the file is read.

use super::mapping::open_regular;
use crate::error::{Error, Result};
use minisign_verify::{Error as Refusal, PublicKey, Signature};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// Largest signature file, in bytes: minisign's own limits on its four lines give less.
const SIGNATURE_CAP: u64 = 16 << 10;

/// A minisign public key. A file is trusted when its signature is by this key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustedKey {
    key: PublicKey,
    id: String,
}

/// What a checked signature says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    /// Id of the key, 16 hex characters; minisign 0.11 prints it without leading zeros.
    pub key_id: String,
    /// The comment under the signature, as its maker wrote it: minisign puts the time and the file name there.
    pub trusted_comment: String,
}

impl TrustedKey {
    /// Reads a public key: the line `RW...`, or the text of the `.pub` file that `minisign -G` writes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]; the text is not repeated, since it may be a secret key given by mistake.
    pub fn parse(text: &str) -> Result<TrustedKey> {
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let line = match lines[..] {
            [line] => Some(line),
            [comment, line] if comment.starts_with("untrusted comment:") => Some(line),
            _ => None,
        };
        let key = line.and_then(|line| Some((line, PublicKey::from_base64(line).ok()?)));
        let Some((line, key)) = key else {
            let sentence =
                "this is not a minisign public key; give its line (RW...) or the text of its .pub file";
            return Err(Error::InvalidArgument(sentence.into()));
        };
        Ok(TrustedKey { key, id: key_id(line) })
    }

    /// Id of the key, 16 hex characters; minisign 0.11 prints it without leading zeros.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Checks the text of a signature file (prehashed or legacy), its trusted comment included, over `bytes`.
    pub(super) fn check(&self, bytes: &[u8], signature: &[u8]) -> Result<Signed> {
        let bad = |sentence: &str| Err(Error::BadSignature(sentence.into()));
        let Ok(text) = std::str::from_utf8(signature) else {
            return bad("the signature is not a text; give the .minisig file that minisign wrote");
        };
        let signature = match Signature::decode(text) {
            Ok(signature) => signature,
            Err(Refusal::UnsupportedAlgorithm) => return bad("its algorithm is none of minisign's"),
            Err(_) => return bad("the signature is not in minisign's format; sign the file again"),
        };
        let found = text.lines().nth(1).map(key_id).unwrap_or_default();
        match self.key.verify(bytes, &signature, true) {
            Ok(()) => Ok(Signed { key_id: found, trusted_comment: signature.trusted_comment().into() }),
            Err(Refusal::UnexpectedKeyId) => Err(Error::UntrustedKey { expected: self.id.clone(), found }),
            Err(_) => bad("the file, or the comment in its signature, is not what was signed"),
        }
    }
}

/// Where the signature of a file is looked for: its path with `.minisig` added, as minisign names it.
pub(super) fn path_beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".minisig");
    name.into()
}

/// The text of the signature beside a file.
pub(super) fn read_beside(file: &Path) -> Result<Vec<u8>> {
    let path = path_beside(file);
    let opened = match open_regular(&path) {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
            return Err(Error::Unsigned(format!("there is no {}", path.display())));
        }
        opened => opened?.0,
    };
    let mut text = Vec::new();
    let read = opened.take(SIGNATURE_CAP + 1).read_to_end(&mut text);
    read.map_err(|source| Error::Io { action: "read", path, source })?;
    if text.len() as u64 > SIGNATURE_CAP {
        let sentence = format!("the signature has more than {SIGNATURE_CAP} bytes, no signature is so long");
        return Err(Error::BadSignature(sentence));
    }
    Ok(text)
}

/// The id in a line of base64 that holds the algorithm (2 bytes), the id (8, little-endian) and more.
fn key_id(line: &str) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let value = |c| ALPHABET.iter().position(|a| *a == c).unwrap_or(0) as u128;
    // 14 characters are 84 bits; the id ends 4 bits before.
    let bits = line.bytes().take(14).fold(0, |bits, c| bits << 6 | value(c));
    format!("{:016X}", ((bits >> 4) as u64).swap_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    // Vectors of minisign's own tests: the four bytes `test`, signed in both ways with one key.
    const KEY: &str = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";
    const LEGACY: &str = "untrusted comment: signature from minisign secret key\n\
        RWQf6LRCGA9i59SLOFxz6NxvASXDJeRtuZykwQepbDEGt87ig1BNpWaVWuNrm73YiIiJbq71Wi+dP9eKL8OC351vwIasSSbXxwA=\n\
        trusted comment: timestamp:1555779966\tfile:test\n\
        QtKMXWyYcwdpZAlPF7tE2ENJkRd1ujvKjlj1m9RtHTBnZPa5WKU5uWRs5GoP5M/VqE81QFuMKI5k/SfNQUaOAA==\n";
    const PREHASHED: &str = "untrusted comment: signature from minisign secret key\n\
        RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=\n\
        trusted comment: timestamp:1633700835\tfile:test\tprehashed\n\
        wLMDjy9FLAuxZ3q4NlEvkgtyhrr0gtTu6KC4KBJdITbbOeAi1zBIYo0v4iTgt8jJpIidRJnp94ABQkJAgAooBQ==\n";

    #[test]
    fn both_kinds_of_signature_are_checked_with_their_comment() {
        let key = TrustedKey::parse(KEY).unwrap();
        assert_eq!(key.id(), "E7620F1842B4E81F");
        for (signature, comment) in [
            (LEGACY, "timestamp:1555779966\tfile:test"),
            (PREHASHED, "timestamp:1633700835\tfile:test\tprehashed"),
        ] {
            let signed = key.check(b"test", signature.as_bytes()).unwrap();
            assert_eq!((signed.key_id.as_str(), signed.trusted_comment.as_str()), (key.id(), comment));
            let refused = |bytes: &[u8], signature: &str| key.check(bytes, signature.as_bytes()).unwrap_err();
            assert!(matches!(refused(b"Test", signature), Error::BadSignature(_)));
            assert!(matches!(
                refused(b"test", &signature.replace("file:test", "file:tesT")),
                Error::BadSignature(_)
            ));
        }
    }

    #[test]
    fn a_key_is_a_line_or_the_text_of_its_file() {
        let key = TrustedKey::parse(KEY).unwrap();
        for text in [
            format!("untrusted comment: minisign public key E7620F1842B4E81F\n{KEY}\n"),
            format!(" {KEY}\r\n"),
        ] {
            assert_eq!(TrustedKey::parse(&text).unwrap(), key);
        }
        let comment = "untrusted comment: minisign encrypted secret key";
        for text in
            ["", KEY.get(1..).unwrap(), comment, &format!("{comment}\nRWRTY0Iy\n"), &format!("{KEY}\n{KEY}")]
        {
            let error = TrustedKey::parse(text).unwrap_err();
            assert!(
                matches!(error, Error::InvalidArgument(_)) && !error.to_string().contains("RWR"),
                "{text}"
            );
        }
    }
}
