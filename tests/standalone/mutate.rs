//! Sound files with a few random changes: in their bytes, in the text of a manifest, in its structure.

use super::attacks::forge::{self, Forge, quoted, state_digest};
use super::random::Random;
use serde_json::{Value, json};

/// Pieces that JSON readers disagree about, and those of this format.
const PIECES: [&str; 62] = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "\\",
    " ",
    "\t",
    "\n",
    "\r",
    "\u{c}",
    "\0",
    "\u{a0}",
    "\u{feff}",
    "\u{85}",
    "\u{7f}",
    "null",
    "true",
    "false",
    "nul",
    "NaN",
    "Infinity",
    "-",
    "+1",
    ".5",
    "1.",
    "00",
    "01",
    "0x10",
    "-0",
    "-0.0",
    "0e0",
    "1e5",
    "1E+2",
    "5.0",
    "5e0",
    "1e-400",
    "1e308",
    "1.8e308",
    "1e309",
    "-1e999",
    "0e999999999999",
    "1e99999999999999999999",
    "1e-99999999999999999999",
    "4294967295",
    "4294967296",
    "18446744073709551615",
    "18446744073709551616",
    "0",
    "1",
    "-1",
    "\\u0061",
    "\\ud800",
    "\\udc00",
    "\\ud83d\\ude00",
    "\\u00",
    "\\x41",
    "\\/",
    "specific",
    "untested",
];

/// A file with one to three changed bytes, pieces or lengths; the digest is stated anew for some.
pub fn bytes(random: &mut Random, sound: &[u8]) -> Vec<u8> {
    let mut file = sound.to_vec();
    for _ in 0..1 + random.below(3) {
        let end = if random.chance(4) { file.len() } else { file.len().min(8 + header_len(sound)) };
        let at = random.below(end.max(1)).min(file.len());
        edit(random, &mut file, at);
    }
    if random.chance(2) {
        // A length field that still fits: else most changes of length end there.
        let delta = file.len() as i64 - sound.len() as i64;
        let stated = header_len(sound) as i64 + delta;
        if file.len() >= 8 && stated > 0 {
            file[..8].copy_from_slice(&stated.to_le_bytes());
        }
    }
    if random.chance(2) {
        state_digest(&mut file);
    }
    file
}

fn header_len(file: &[u8]) -> usize {
    u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize
}

/// One change at a place.
fn edit(random: &mut Random, file: &mut Vec<u8>, at: usize) {
    let some = (at + 1 + random.below(12)).min(file.len());
    match random.below(8) {
        0 => file.truncate(at),
        1 => drop(file.splice(at..some, [])),
        2 => {
            let piece = file[at..some].to_vec();
            file.splice(at..at, piece);
        }
        3 | 4 => {
            let end = if random.chance(2) { at } else { some };
            file.splice(at..end, random.of(&PIECES).bytes());
        }
        5 if at < file.len() => file[at] = random.bits() as u8,
        _ if at < file.len() => file[at] ^= 1 << random.below(8),
        _ => file.push(random.bits() as u8),
    }
}

/// A file with a change in one value of the metadata or one entry of a tensor; its digest is right.
pub fn container(random: &mut Random) -> Vec<u8> {
    let mut forge = Forge::sound();
    let entries = if random.chance(2) { &mut forge.metadata } else { &mut forge.tensors };
    let at = random.below(entries.len());
    let (key, value) = &mut entries[at];
    let changed = if random.chance(8) { key } else { value };
    let mut bytes = changed.clone().into_bytes();
    let at = random.below(bytes.len().min(60) + 1);
    edit(random, &mut bytes, at);
    *changed = String::from_utf8_lossy(&bytes).into_owned();
    forge.bytes()
}

/// A file whose manifest, as text, has one or two changes; its digest is right.
pub fn manifest_text(random: &mut Random) -> Vec<u8> {
    let text = forge::manifest().to_string();
    let mut bytes = text.clone().into_bytes();
    for _ in 0..1 + random.below(2) {
        let at = random.below(bytes.len().max(1)).min(bytes.len());
        edit(random, &mut bytes, at);
    }
    let mut forge = Forge::sound();
    forge.set_metadata("emaudit.manifest", &quoted(&String::from_utf8_lossy(&bytes)));
    forge.bytes()
}

/// A file whose manifest has one to three values replaced, removed, doubled or wrapped; its digest is right.
pub fn manifest_values(random: &mut Random) -> Vec<u8> {
    let mut manifest = forge::manifest();
    let changes = if random.chance(2) { 1 } else { 2 + random.below(2) };
    (0..changes).for_each(|_| change(random, &mut manifest));
    let mut forge = Forge::sound();
    forge.set_metadata("emaudit.manifest", &quoted(&manifest.to_string()));
    forge.bytes()
}

/// Walks to a random value and changes it.
fn change(random: &mut Random, value: &mut Value) {
    let stop = random.chance(5);
    match value {
        Value::Object(object) if !stop && !object.is_empty() => {
            let key = object.keys().nth(random.below(object.len())).expect("a key").clone();
            match random.below(12) {
                0 => drop(object.remove(&key)),
                1 => {
                    let moved = object.remove(&key).expect("the value of a key");
                    object.insert(format!("{key}_"), moved);
                }
                _ => change(random, &mut object[&key]),
            }
        }
        Value::Array(array) if !stop && !array.is_empty() => {
            let at = random.below(array.len());
            match random.below(8) {
                0 => drop(array.remove(at)),
                1 => array.insert(at, array[at].clone()),
                2 => array.swap(0, at),
                3 => array.truncate(at),
                _ => change(random, &mut array[at]),
            }
        }
        other => *other = another(random, other),
    }
}

/// A value in the place of another: near it, of another kind, or wrapped.
fn another(random: &mut Random, old: &Value) -> Value {
    match (random.below(7), old) {
        (0, _) => json!([old]),
        (4.., Value::Number(number)) if number.is_u64() => {
            let n = number.as_u64().unwrap_or_default();
            json!(random.of(&[n.saturating_add(1), n.saturating_sub(1), n.saturating_mul(2), n / 2, n]))
        }
        (4.., Value::Number(number)) => {
            let x = number.as_f64().unwrap_or_default();
            json!(x + f64::from(random.signed()) * [1e-12, 1e-3, 0.3][random.below(3)])
        }
        (6, Value::String(word)) => json!(format!("{word} ")),
        (1, Value::String(word)) => json!({word.clone(): null}),
        (1, Value::Object(object)) => object.values().cloned().collect(),
        (1..=3, Value::Number(number)) => {
            let x = number.as_f64().unwrap_or_default();
            let near =
                [x + 1e-10, x - 1e-10, x + 1e-8, x - 1e-8, x * 2.0, x / 2.0, -x, x + 1.0, x - 1.0, x.trunc()];
            json!(random.of(&near))
        }
        (2, Value::String(word)) => json!(word.to_uppercase()),
        (3, Value::String(word)) => json!(word.chars().skip(1).collect::<String>()),
        _ => random
            .of(&[
                Value::Null,
                json!(true),
                json!(""),
                json!(" "),
                json!("specific"),
                json!("nonspecific"),
                json!("untested"),
                json!("last"),
                json!("0".repeat(64)),
                json!("é"),
                json!([]),
                json!({}),
                json!(0),
                json!(1),
                json!(39),
                json!(-1),
                json!(0.5),
                json!(1e39),
                json!(3.4028234663852886e38),
                json!(1.1754943508222875e-38),
                json!(1e-38),
                json!(u32::MAX),
                json!(1u64 << 32),
                json!(u64::MAX),
                json!(1e20),
            ])
            .clone(),
    }
}

/// A decimal number within the range of f32, of up to forty digits.
pub fn decimal(random: &mut Random) -> String {
    let digits = |random: &mut Random, most: usize| -> String {
        (0..random.below(most)).map(|_| char::from(b'0' + random.below(10) as u8)).collect()
    };
    let sign = if random.chance(2) { "-" } else { "" };
    let whole = format!("{}{}", 1 + random.below(9), digits(random, 20));
    let fraction = if random.chance(3) { String::new() } else { format!(".{}5", digits(random, 20)) };
    let exponent = match random.below(4) {
        0 => String::new(),
        1 => format!("e{}", random.below(18)),
        2 => format!("E+0{}", random.below(10)),
        _ => format!("e-{}", random.below(345)),
    };
    format!("{sign}{whole}{fraction}{exponent}")
}

/// A sound file with a random decimal in the place of every score of its thresholds.
pub fn decimals(random: &mut Random) -> Vec<u8> {
    let thresholds: Vec<String> = (1..=100)
        .map(|horizon| {
            let z = decimal(random);
            let rest = "\"statistic\":\"max\",\"rate\":0.05,\"rate_upper\":0.05,\"sequences\":400";
            format!("{{\"horizon\":{horizon},\"z\":{z},{rest}}}")
        })
        .collect();
    let mut manifest = forge::manifest();
    manifest["layers"][0]["calibration"]["thresholds"] = json!("here");
    let text = manifest.to_string().replace("\"here\"", &format!("[{}]", thresholds.join(",")));
    let mut forge = Forge::sound();
    forge.set_metadata("emaudit.manifest", &quoted(&text));
    forge.bytes()
}
