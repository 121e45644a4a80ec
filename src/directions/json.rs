//! JSON as the format allows it: no key twice at any level, nothing before the first brace, only spaces
//! after the last. `serde_json` alone keeps the last of two equal keys, and what serde derives reads a struct from
//! an array and a word from an object as well: two readers could see two files.

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{
    DeserializeSeed, Error as _, Expected, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor,
};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use std::fmt;

/// Deepest nesting, the outermost object being level 1.
const LEVELS: usize = 100;
/// Longest part of a foreign text that an error sentence repeats, in characters.
const QUOTED: usize = 160;

/// Reads `text` when it is one JSON object under the rules above; the error is a sentence fragment.
pub(super) fn parse(text: &str) -> Result<Map<String, Value>, String> {
    if !text.starts_with('{') {
        return Err("it must begin with `{`".into());
    }
    if !text.trim_end_matches(' ').ends_with('}') {
        return Err("after its closing `}` only spaces may follow".into());
    }
    let mut reader = serde_json::Deserializer::from_str(text);
    let value = Unique { levels: 0 }.deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
    match value.map_err(|e| plain(&e.to_string()))? {
        Value::Object(object) => Ok(object),
        other => Err(format!("it is {other}, not an object")),
    }
}

/// Gives a value its type: an object for each struct, a text for each word, and nothing else in their place.
pub(super) fn typed<'de, T: Deserialize<'de>>(value: &'de Value) -> Result<T, String> {
    T::deserialize(Strict(value)).map_err(|e| plain(&e.to_string()))
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

/// Any JSON value inside `levels` others; reading it fails on a repeated key and on too many levels.
#[derive(Clone, Copy)]
struct Unique {
    levels: usize,
}

impl Unique {
    /// For what is inside an object or array at this place.
    fn inside<E: serde::de::Error>(self) -> Result<Unique, E> {
        match self.levels {
            LEVELS => Err(E::custom(format_args!("it nests deeper than {LEVELS} levels"))),
            levels => Ok(Unique { levels: levels + 1 }),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Unique {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without repeated keys")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let (inside, mut object) = (self.inside()?, Map::new());
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format_args!("duplicate key `{}`", plain(&key))));
            }
            let value = map.next_value_seed(inside)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let (inside, mut array) = (self.inside()?, Vec::new());
        while let Some(value) = seq.next_element_seed(inside)? {
            array.push(value);
        }
        Ok(Value::Array(array))
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }
}

/// A value on its way to a type: a struct is an object, a word is a string.
#[derive(Clone, Copy)]
struct Strict<'de>(&'de Value);

impl<'de> Strict<'de> {
    fn refuse<T>(self, expected: &dyn Expected) -> Result<T, serde_json::Error> {
        let found = match self.0 {
            Value::Array(_) => Unexpected::Seq,
            Value::Object(_) => Unexpected::Map,
            _ => Unexpected::Other("another value"),
        };
        Err(serde_json::Error::invalid_type(found, expected))
    }
}

impl<'de> Deserializer<'de> for Strict<'de> {
    type Error = serde_json::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self.0 {
            Value::Array(array) => {
                let mut items = SeqDeserializer::new(array.iter().map(Strict));
                let value = visitor.visit_seq(&mut items)?;
                items.end().map(|()| value)
            }
            Value::Object(object) => {
                let members = object.iter().map(|(key, value)| (key.as_str(), Strict(value)));
                visitor.visit_map(MapDeserializer::new(members))
            }
            scalar => scalar.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        if self.0.is_array() { self.refuse(&visitor) } else { self.deserialize_any(visitor) }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        match self.0 {
            Value::String(word) => visitor.visit_enum(word.as_str().into_deserializer()),
            _ => self.refuse(&visitor),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct newtype_struct seq tuple tuple_struct map identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, serde_json::Error> for Strict<'de> {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
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
            let sentence = parse(text).expect_err(text);
            assert!(sentence.contains("duplicate key `a`"), "{text}: {sentence}");
        }
        parse(r#"{"a":{"a":{"a":-1.5e3}},"b":["a","a",18446744073709551615]}   "#).unwrap();
    }

    #[test]
    fn only_trailing_spaces_surround_the_object() {
        for text in ["", " {}", "\n{}", "[]", "{}\n", "{}{}", "{} x", "{", "\u{feff}{}", "{\"a\":NaN}"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        // Deep nesting is refused, not a stack overflow.
        let nested = |levels| format!("{{\"a\":{}1{}}}", "[".repeat(levels - 1), "]".repeat(levels - 1));
        assert!(parse(&nested(LEVELS)).is_ok());
        for levels in [LEVELS + 1, 100_000] {
            assert!(parse(&nested(levels)).unwrap_err().contains("deeper than 100 levels"));
        }
    }

    #[test]
    fn structs_are_objects_and_words_are_text() {
        use crate::directions::schema::{Cell, Positions};
        let cell = |text: &str| {
            let object = Value::Object(parse(text).unwrap());
            typed::<Cell>(&object["cell"])
        };
        let read = cell(r#"{"cell":{"later":[1],"positions":"all","layer":3,"alpha":2}}"#).unwrap();
        assert_eq!(read, Cell { layer: 3, alpha: 2.0, positions: Positions::All });
        for (text, sentence) in [
            (r#"{"cell":[3,2,"all"]}"#, "invalid type: sequence, expected struct Cell"),
            (r#"{"cell":{"layer":3,"alpha":2,"positions":{"all":null}}}"#, "invalid type: map"),
            (r#"{"cell":{"layer":3,"alpha":2,"positions":["all"]}}"#, "invalid type: sequence"),
            (r#"{"cell":{"layer":3.0,"alpha":2,"positions":"all"}}"#, "invalid type: floating point"),
        ] {
            let error = cell(text).unwrap_err();
            assert!(error.contains(sentence), "{text}: {error}");
        }
    }

    #[test]
    fn messages_hold_no_control_characters() {
        assert_eq!(plain("a\u{1b}[2Jb"), "a\\u{1b}[2Jb");
        assert!(plain(&"x".repeat(10_000)).len() < 200);
    }
}
