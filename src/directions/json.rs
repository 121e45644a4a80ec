//! JSON as the format allows it: no key twice at any level, nothing before the first brace, only spaces
//! after the last. `serde_json` alone keeps the last of two equal keys, so two readers could see two files.

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::HashSet;
use std::fmt;

/// Longest part of a foreign text that an error sentence repeats, in characters.
const QUOTED: usize = 160;

/// Accepts `text` when it is one JSON object under the rules above; the error is a sentence fragment.
pub(super) fn check(text: &str) -> Result<(), String> {
    if !text.starts_with('{') {
        return Err("it must begin with `{`".into());
    }
    if !text.trim_end_matches(' ').ends_with('}') {
        return Err("after its closing `}` only spaces may follow".into());
    }
    serde_json::from_str::<UniqueKeys>(text).map(|_| ()).map_err(|e| plain(&e.to_string()))
}

/// Text from a file made fit for a message: control characters escaped, length bounded.
pub(super) fn plain(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars().take(QUOTED) {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    if text.chars().nth(QUOTED).is_some() {
        out.push_str(" ...");
    }
    out
}

/// Any JSON value; deserialising it fails on a repeated key, and keeps nothing.
struct UniqueKeys;

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueKeys)
    }
}

impl<'de> DeserializeSeed<'de> for UniqueKeys {
    type Value = UniqueKeys;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = UniqueKeys;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without repeated keys")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if let Some(key) = seen.replace(key) {
                return Err(A::Error::custom(format_args!("duplicate key `{}`", plain(&key))));
            }
            map.next_value_seed(UniqueKeys)?;
        }
        Ok(self)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self, A::Error> {
        while seq.next_element_seed(UniqueKeys)?.is_some() {}
        Ok(self)
    }
    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }
    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }
    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }
    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }
    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }
    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_keys_are_found_at_every_level_and_through_escapes() {
        for text in [
            r#"{"a":1,"a":2}"#,
            r#"{"x":{"a":1,"a":1}}"#,
            r#"{"x":[0,{"y":{"a":null,"b":true,"a":[]}}]}"#,
            r#"{"a":1,"\u0061":2}"#,
        ] {
            let sentence = check(text).expect_err(text);
            assert!(sentence.contains("duplicate key `a`"), "{text}: {sentence}");
        }
        check(r#"{"a":{"a":{"a":-1.5e3}},"b":["a","a",18446744073709551615]}   "#).unwrap();
    }

    #[test]
    fn only_trailing_spaces_surround_the_object() {
        for text in ["", " {}", "\n{}", "[]", "{}\n", "{}{}", "{} x", "{", "\u{feff}{}", "{\"a\":NaN}"] {
            assert!(check(text).is_err(), "{text:?}");
        }
        // Deep nesting is refused, not a stack overflow.
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(check(&deep).is_err());
    }

    #[test]
    fn messages_hold_no_control_characters() {
        assert_eq!(plain("a\u{1b}[2Jb"), "a\\u{1b}[2Jb");
        assert!(plain(&"x".repeat(10_000)).len() < 200);
    }
}
