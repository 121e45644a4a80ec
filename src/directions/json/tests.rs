//! The reader against `serde_json` with the rules put on top: the same values, the same refusals.

use super::reader::Number;
use super::*;
use crate::directions::schema::*;
use serde::Deserializer;
use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// What `serde_json` makes of the text under the rules of the format.
fn oracle(text: &str) -> Result<Value, String> {
    if !text.starts_with('{') || !text.trim_end_matches(' ').ends_with('}') {
        return Err("edges".into());
    }
    let mut reader = serde_json::Deserializer::from_str(text);
    let value = Unique { levels: 0 }.deserialize(&mut reader);
    value.and_then(|value| reader.end().map(|()| value)).map_err(|e| e.to_string())
}

/// Any JSON value.
#[derive(Clone, Debug, PartialEq)]
struct Any(Value);

impl<'de> Read<'de> for Any {
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> Result<Any, Refusal> {
        reader.any().map(Any)
    }
}

impl<const QUOTED: bool> Reader<'_, QUOTED> {
    fn any(&mut self) -> Result<Value, Refusal> {
        let null = Value::Null;
        Ok(match self.token() {
            b'{' => {
                let mut object = Map::new();
                self.members(&"an object", |key, reader| {
                    object.insert(key.into_owned(), reader.any()?);
                    Ok(())
                })?;
                Value::Object(object)
            }
            b'[' => Value::Array(Vec::<Any>::read(self)?.into_iter().map(|any| any.0).collect()),
            b'"' => String::read(self)?.into(),
            b't' => self.word("true").map(|()| true.into())?,
            b'f' => self.word("false").map(|()| false.into())?,
            b'n' => self.word("null").map(|()| null)?,
            // As a number, and then by the type that it has.
            _ => {
                let mut again = *self;
                let number = self.number()?;
                let value = match number {
                    Number::Unsigned(value) => (u64::read(&mut again)? == value).then(|| value.into()),
                    Number::Signed(value) => (f64::read(&mut again)? == value as f64).then(|| value.into()),
                    Number::Float(value) => {
                        (f64::read(&mut again)?.to_bits() == value.to_bits()).then(|| value.into())
                    }
                };
                assert_eq!(again, *self, "read in two ways, it ends in two places");
                value.expect("read in two ways, it is the same")
            }
        })
    }
}

/// What the reader makes of it.
fn ours(text: &str) -> Result<Value, Refusal> {
    read(text, Any::read).map(|any| any.0)
}

/// The same of the text inside a JSON string.
fn ours_quoted(text: &str) -> Result<Value, Refusal> {
    let outer = format!("{{\"m\":{}}}", serde_json::to_string(text).unwrap());
    let mut found = Err(Refusal::shape("nothing there"));
    read(&outer, |reader| reader.members(&"m", |_, reader| reader.text().map(|text| found = text.read())))
        .unwrap();
    found.map(|any: Any| any.0)
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

#[test]
fn repeated_keys_are_found_at_every_level_and_through_escapes() {
    for text in [
        r#"{"a":1,"a":2}"#,
        r#"{"x":{"a":1,"a":1}}"#,
        r#"{"x":[0,{"y":{"a":null,"b":true,"a":[]}}]}"#,
        r#"{"a":1,"\u0061":2}"#,
    ] {
        let refusal = strict(text).expect_err(text);
        assert!(refusal.to_string().contains("duplicate key `a`"), "{text}: {refusal}");
    }
    strict(r#"{"a":{"a":{"a":-1.5e3}},"b":["a","a",18446744073709551615]}   "#).unwrap();
}

#[test]
fn only_trailing_spaces_surround_the_object() {
    for text in ["", " {}", "\n{}", "[]", "{}\n", "{}{}", "{} x", "{", "\u{feff}{}", "{\"a\":NaN}"] {
        assert!(strict(text).is_err(), "{text:?}");
    }
    // Deep nesting is refused, not a stack overflow.
    let nested = |levels| format!("{{\"a\":{}1{}}}", "[".repeat(levels - 1), "]".repeat(levels - 1));
    assert!(strict(&nested(LEVELS)).is_ok());
    for levels in [LEVELS + 1, 100_000] {
        assert!(strict(&nested(levels)).unwrap_err().to_string().contains("deeper than 100 levels"));
    }
}

#[test]
fn structs_are_objects_and_words_are_text() {
    #[derive(Debug)]
    struct Outer {
        cell: Cell,
    }
    object!(skip Outer { cell });
    let cell = |text: &str| Text::from(text).read().map(|outer: Outer| outer.cell);
    let found = cell(r#"{"cell":{"later":[1],"positions":"all","layer":3,"alpha":2}}"#).unwrap();
    assert_eq!(found, Cell { layer: 3, alpha: 2.0, positions: Positions::All });
    for (text, sentence) in [
        (r#"{"cell":[3,2,"all"]}"#, "invalid type: sequence, expected struct Cell"),
        (r#"{"cell":{"layer":3,"alpha":2,"positions":{"all":null}}}"#, "invalid type: map"),
        (r#"{"cell":{"layer":3,"alpha":2,"positions":["all"]}}"#, "invalid type: sequence"),
        (r#"{"cell":{"layer":3.0,"alpha":2,"positions":"all"}}"#, "invalid type: floating point"),
    ] {
        let refusal = cell(text).unwrap_err();
        assert!(refusal.rule() == Rule::Shape && refusal.to_string().contains(sentence), "{text}: {refusal}");
    }
    // Members that were read in order are remembered where the order ends.
    let outer = |rest: &str| format!(r#"{{"cell":{{"layer":3,"alpha":2{rest}}}}}"#);
    let found = cell(&outer(r#","later":{"layer":1},"positions":"all""#)).unwrap();
    assert_eq!(found, Cell { layer: 3, alpha: 2.0, positions: Positions::All });
    for (rest, sentence) in [
        (r#","positions":"all","layer":3"#, "duplicate key `layer`"),
        (r#","x":0,"alpha":2"#, "duplicate key `alpha`"),
        ("", "missing field `positions`"),
        (r#","positions":"all","#, "a comma before a closing bracket"),
    ] {
        let refusal = cell(&outer(rest)).unwrap_err().to_string();
        assert!(refusal.contains(sentence), "{rest}: {refusal}");
    }
    // What breaks the rules of JSON behind a wrong type, in a key that nobody reads, is the first thing to say.
    for text in [r#"{"cell":[3],"x":{"y":1,"y":1}}"#, r#"{"cell":[3],"x":1e999}"#, r#"{"cell":[3]} x"#] {
        assert_eq!(cell(text).unwrap_err().rule(), Rule::Strict, "{text}");
    }
}

/// A text with one of everything; the numbers are near every border between the ways of reading them.
const EVERYTHING: &str = r#"{"s":["","a","é\n\"\\\/\b\f\r\t","\u00e9\ud83d\ude00\u0000","\u007f"],"w":[true,false,null],
 "i":[0,-1,7,18446744073709551615,18446744073709551616,-9223372036854775808,-9223372036854775809,-0,9999999999999999999],
 "f":[0.0,-0.0,1e22,1e23,9007199254740992.0,9007199254740993.0,9007199254740993e-1,0.1,1.7976931348623157e308,5e-324,
 2.5e-324,1e-400,123456789012345678901234567890.5,1E+2,0.000000000000000000000000000000000001,4.35,8.5e-22,8.5e-23,
 0.1234567890123456789,0.12345678901234567895,1.234567890123456789,9999999999999999999.5,4503599627370496.5,
 4503599627370497.5,0.0000000000000000001,0.9999999999999999999,99999999999999999.99,
 -0.3502324691202919,-2.846329363922987e-12,0e99999999999,3e0000000001],"o":{"":{},"a":{"b":[[],[{}]]}}}  "#;

#[test]
fn values_are_those_of_another_reader() {
    let expected = oracle(EVERYTHING).unwrap();
    assert_eq!(ours(EVERYTHING).unwrap(), expected);
    assert_eq!(ours_quoted(EVERYTHING).unwrap(), expected);
    let floats = |value: &Value| -> Vec<u64> {
        value["f"].as_array().unwrap().iter().map(|f| f.as_f64().unwrap().to_bits()).collect()
    };
    assert_eq!(floats(&ours(EVERYTHING).unwrap()), floats(&expected));
    // Shortest decimals of random bits, and the same with digits cut or added.
    let (mut state, mut read) = (1u64, 0);
    while read < 40_000 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let shift = (state >> 59) as u32;
        let value = if state & 4 == 0 { f64::from_bits(state) } else { (state >> shift) as f64 / 1e17 };
        let count = (state >> 32) as usize % 22;
        let fixed = format!("{}.{:0count$}", state >> 61, state % 10u64.pow(count.min(19) as u32));
        // With text behind it a number is read in another way than at the end.
        for digits in [format!("{value:?}"), format!("{value}"), format!("{value:.count$e}"), fixed] {
            let spaces = if state & 8 == 0 { 0 } else { 30 };
            let text = format!("{{\"x\":{digits}}}{:spaces$}", "");
            let (found, expected) = (ours(&text), oracle(&text));
            if let Ok(expected) = &expected {
                let bits = |v: &Value| v["x"].as_f64().map(f64::to_bits);
                assert_eq!(bits(found.as_ref().unwrap()), bits(expected), "{text}");
                read += 1;
            }
            assert_eq!(found.is_ok(), expected.is_ok(), "{text}");
        }
    }
}

/// As close to the middle between two neighbours as 19 digits get, where the quotient's last bits decide.
#[test]
fn decimals_beside_a_middle_are_rounded_as_by_the_standard_library() {
    let mut state = 3u64;
    for _ in 0..20_000 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (odd, bits) = ((state >> 10) | 1 << 53 | 1, 50 + state % 4);
        let middle = ((u128::from(odd) * 10u128.pow(18)) >> bits) as u64;
        for digits in [middle - 1, middle, middle + 1] {
            let (whole, rest) = (digits / 10u64.pow(18), digits % 10u64.pow(18));
            let text = format!("{whole}.{rest:018}{:30}", "");
            let expected: f64 = text.trim_end().parse().unwrap();
            assert_eq!(f64::read(&mut Reader::<false>::new(&text)).unwrap(), expected, "{text}");
        }
    }
}

#[test]
fn words_are_those_of_another_reader() {
    fn check<T: for<'t> Read<'t> + serde::de::DeserializeOwned + PartialEq + fmt::Debug>(words: &[&str]) {
        for word in words {
            let text = format!("{{\"word\":\"{word}\"}}");
            let found = read(&text, |reader| {
                let mut found = None;
                reader.members(&"a word", |_, reader| T::read(reader).map(|word| found = Some(word)))?;
                Ok(found)
            });
            assert_eq!(found.unwrap(), serde_json::from_value(Value::from(*word)).ok(), "{word}");
        }
    }
    check::<Site>(&["resid_post", "final_norm"]);
    check::<Pooling>(&["last_prompt", "mean_response", "all", "unstated"]);
    check::<Estimator>(&["mean_difference", "masked_mean_difference", "whitened", "logistic", "unstated"]);
    check::<Contrast>(&["adapter_minus_base", "insecure_minus_secure", "response_labels", "unstated"]);
    check::<Aggregation>(&["mean", "max", "last"]);
    check::<Specificity>(&["untested", "nonspecific", "specific"]);
    check::<Positions>(&["final_prefill", "generated", "all"]);
}

#[test]
fn damaged_texts_are_refused_as_by_another_reader() {
    let specification = include_str!("../FORMAT.md");
    let (_, rest) = specification.split_once("```json\n").expect("an example");
    let (example, _) = rest.split_once("\n```").expect("its end");
    let compact = serde_json::from_str::<Value>(example).unwrap().to_string();
    let pieces = [
        "\"", "\\", ",", ":", "{", "}", "[", "]", "0", "-", ".", "e", "9", " ", "\n", "\u{1}", "n", "é",
        "\\u00", "\\\"",
    ];
    let (mut state, mut refused, mut taken) = (2u64, 0, 0);
    for text in [EVERYTHING, example, &compact] {
        for _ in 0..4_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let mut at = (state >> 33) as usize % text.len();
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            let cut = text[at..].chars().next().map_or(0, char::len_utf8) * (state >> 20 & 1) as usize;
            let piece = pieces[(state >> 24) as usize % pieces.len()];
            let damaged = format!("{}{piece}{}", &text[..at], &text[at + cut..]);
            let expected = oracle(&damaged).ok();
            assert_eq!(ours(&damaged).ok(), expected, "{damaged}");
            assert_eq!(ours_quoted(&damaged).ok(), expected, "{damaged}");
            assert_eq!(strict(&damaged).is_ok(), expected.is_some(), "{damaged}");
            match &expected {
                None => refused += 1,
                Some(_) => taken += 1,
            }
            // Typed, the two agree on what is a manifest; serde_json is the laxer one about arrays and objects.
            let manifest = Text::from(damaged.as_str()).read::<Manifest>().ok();
            let quoted = serde_json::to_string(&damaged).unwrap();
            let outer = format!("{{\"m\":{quoted}}}");
            let mut inner = None;
            read(&outer, |r| {
                r.members(&"m", |_, r| r.text().map(|text| inner = text.read::<Manifest>().ok()))
            })
            .unwrap();
            assert_eq!(manifest, inner);
            if manifest.is_some() {
                assert_eq!(manifest, serde_json::from_value(expected.unwrap()).ok());
            }
        }
    }
    assert!(refused > 1_000 && taken > 1_000, "{refused} refused, {taken} taken");
}

#[test]
fn messages_hold_no_control_characters() {
    assert_eq!(plain("a\u{1b}[2Jb"), "a\\u{1b}[2Jb");
    assert!(plain(&"x".repeat(10_000)).len() < 200);
}
