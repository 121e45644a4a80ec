//! The text of JSON: white space, strings, numbers, and the order of commas; what each rule of FORMAT.md refuses.

use super::{LEVELS, Refusal, Text, plain};
use serde::de::Expected;
use std::borrow::Cow;
use std::collections::BTreeSet;

/// Reads one text from front to back.
///
/// `QUOTED`: the text is the raw inside of a JSON string whose only escapes are those of quotes, so that each quote
/// has a backslash before it and no backslash is anywhere else.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::directions) struct Reader<'de, const QUOTED: bool = false> {
    text: &'de str,
    at: usize,
    levels: usize,
}

/// A number as it is written: an integer is one without point and exponent that fits its type.
pub(super) enum Number {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
}

/// Powers of ten that a u64 holds.
const TENS: [u64; DIGITS + 1] = {
    let mut tens = [1; DIGITS + 1];
    let mut at = 1;
    while at <= DIGITS {
        tens[at] = 10 * tens[at - 1];
        at += 1;
    }
    tens
};
/// `2^127 / 10^scale`, with the power of ten shifted up to its highest bit, rounded down; of the first, which is `2^64`, all
/// that fits.
const RECIPROCALS: [u64; DIGITS + 1] = {
    let mut reciprocals = [u64::MAX; DIGITS + 1];
    let mut at = 1;
    while at <= DIGITS {
        let ten = TENS[at] << TENS[at].leading_zeros();
        reciprocals[at] = ((1u128 << 127) / ten as u128) as u64;
        at += 1;
    }
    reciprocals
};
/// Decimal digits that always fit a u64.
const DIGITS: usize = 19;

impl<'de, const QUOTED: bool> Reader<'de, QUOTED> {
    const QUOTE: &'static [u8] = if QUOTED { b"\\\"" } else { b"\"" };

    pub(in crate::directions) fn new(text: &'de str) -> Self {
        Reader { text, at: 0, levels: 0 }
    }

    #[inline]
    fn bytes(&self) -> &'de [u8] {
        self.text.as_bytes()
    }

    /// What is not JSON, or not the JSON of the format.
    #[cold]
    pub(super) fn broken(&self, sentence: &str) -> Refusal {
        Refusal::not_strict(format_args!("{sentence} at byte {}", self.at))
    }

    /// The whole text: one object that `read` reads, then nothing but spaces.
    pub(in crate::directions) fn document<T>(
        mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        if !self.text.starts_with('{') {
            return Err(Refusal::not_strict("it must begin with `{`"));
        }
        let value = read(&mut self)?;
        if self.bytes()[self.at..].iter().any(|b| *b != b' ') {
            return Err(self.broken("trailing characters: after its closing `}` only spaces may follow"));
        }
        Ok(value)
    }

    /// The next byte that is no white space; 0 at the end, which no token begins with.
    #[inline(always)]
    pub(super) fn token(&mut self) -> u8 {
        match self.bytes().get(self.at) {
            Some(byte) if *byte > b' ' && !(QUOTED && *byte == b'\\') => *byte,
            _ => self.later_token(),
        }
    }

    /// The same past white space, and at a quote with a backslash before it.
    fn later_token(&mut self) -> u8 {
        loop {
            match self.bytes().get(self.at) {
                Some(b' ' | b'\t' | b'\n' | b'\r') => self.at += 1,
                Some(b'\\') if QUOTED => return b'"',
                Some(byte) => return *byte,
                None => return 0,
            }
        }
    }

    #[inline(always)]
    fn eat(&mut self, token: &[u8]) -> bool {
        let found = self.bytes()[self.at..].starts_with(token);
        self.at += if found { token.len() } else { 0 };
        found
    }

    /// One of `null`, `true`, `false`.
    pub(super) fn word(&mut self, word: &str) -> Result<(), Refusal> {
        if self.eat(word.as_bytes()) { Ok(()) } else { Err(self.broken("expected a value")) }
    }

    /// Past the bracket that opens an object or array.
    #[inline(always)]
    pub(super) fn open(&mut self) -> Result<(), Refusal> {
        if self.levels == LEVELS {
            return Err(Refusal::not_strict(format_args!("it nests deeper than {LEVELS} levels")));
        }
        self.levels += 1;
        self.at += 1;
        Ok(())
    }

    /// Past the comma before a further element, or past the bracket that closes: then there is none.
    #[inline(always)]
    pub(super) fn further(&mut self, first: bool, close: u8) -> Result<bool, Refusal> {
        if let Some([b',', next]) = self.bytes().get(self.at..self.at + 2)
            && !first
            && *next > b' '
            && *next != close
        {
            self.at += 1;
            return Ok(true);
        }
        let token = self.token();
        if token == close {
            self.at += 1;
            self.levels -= 1;
            return Ok(false);
        }
        if !first {
            if token != b',' {
                return Err(self.broken("expected a comma or a closing bracket"));
            }
            self.at += 1;
            if self.token() == close {
                return Err(self.broken("a comma before a closing bracket"));
            }
        }
        Ok(true)
    }

    /// Past these very bytes, if they stand here: in a quoted text, the second ones.
    #[inline(always)]
    pub(in crate::directions) fn expect(&mut self, plain: &str, quoted: &str) -> bool {
        self.eat(if QUOTED { quoted } else { plain }.as_bytes())
    }

    /// The same for the first key of an object, with its bracket.
    #[inline(always)]
    pub(in crate::directions) fn expect_first(&mut self, plain: &str, quoted: &str) -> bool {
        let found = self.levels < LEVELS && self.expect(plain, quoted);
        self.levels += usize::from(found);
        found
    }

    /// Past the bracket that closes an object, if it stands here.
    #[inline(always)]
    pub(in crate::directions) fn expect_end(&mut self) -> bool {
        let found = self.eat(b"}");
        self.levels -= usize::from(found);
        found
    }

    /// Calls `member` for every member of an object, the reader standing before the value; a key that was there before
    /// is refused.
    pub(in crate::directions) fn members(
        &mut self,
        expected: &dyn Expected,
        member: impl FnMut(Cow<'de, str>, &mut Self) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        self.further_members(expected, [], member)
    }

    /// The same behind the members that were `seen`, if any, the reader standing after their last value.
    #[cold]
    #[inline(never)]
    pub(in crate::directions) fn further_members(
        &mut self,
        expected: &dyn Expected,
        seen: impl IntoIterator<Item = &'static str>,
        mut member: impl FnMut(Cow<'de, str>, &mut Self) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let mut seen: BTreeSet<Cow<'de, str>> = seen.into_iter().map(Cow::Borrowed).collect();
        if seen.is_empty() {
            if self.token() != b'{' {
                return Err(self.unexpected(expected));
            }
            self.open()?;
        }
        while self.further(seen.is_empty(), b'}')? {
            if self.token() != b'"' {
                return Err(self.broken("expected a key"));
            }
            let key = self.string()?;
            if self.token() != b':' {
                return Err(self.broken("expected a colon"));
            }
            self.at += 1;
            if !seen.insert(key.clone()) {
                return Err(Refusal::not_strict(format_args!("duplicate key `{}`", plain(&key))));
            }
            member(key, self)?;
        }
        Ok(())
    }

    /// A string, its characters or, where only quotes are escaped in it, as it stands.
    pub(in crate::directions) fn text(&mut self) -> Result<Text<'de>, Refusal> {
        if self.token() != b'"' {
            return Err(self.unexpected(&"a string"));
        }
        let raw = &self.text[self.at + 1..];
        let simple = if QUOTED { None } else { simply_quoted(raw.as_bytes()) };
        match simple {
            Some(length) => {
                self.at += length + 2;
                let raw = &raw[..length];
                Ok(if raw.contains('\\') { Text::Quoted(raw) } else { Text::Plain(Cow::Borrowed(raw)) })
            }
            None => Ok(Text::Plain(self.string()?)),
        }
    }

    /// A string; the reader stands before its quote.
    #[inline]
    pub(super) fn string(&mut self) -> Result<Cow<'de, str>, Refusal> {
        self.at += Self::QUOTE.len();
        let (start, bytes) = (self.at, self.bytes());
        let special = |b: &u8| matches!(b, b'"' | b'\\' | 0..0x20);
        let Some(length) = bytes[start..].iter().position(special) else {
            return Err(self.broken("a string without end"));
        };
        self.at += length;
        if QUOTED || bytes[self.at] == b'"' {
            self.at += Self::QUOTE.len();
            return Ok(Cow::Borrowed(&self.text[start..start + length]));
        }
        self.escaped(self.text[start..start + length].to_owned()).map(Cow::Owned)
    }

    /// The rest of a string with escapes; `out` is what was before.
    fn escaped(&mut self, mut out: String) -> Result<String, Refusal> {
        loop {
            let rest = &self.text[self.at..];
            let Some(length) = rest.bytes().position(|b| matches!(b, b'"' | b'\\' | 0..0x20)) else {
                return Err(self.broken("a string without end"));
            };
            out.push_str(&rest[..length]);
            self.at += length + 1;
            match rest.as_bytes()[length] {
                b'"' => return Ok(out),
                b'\\' => out.push(self.escape()?),
                _ => return Err(self.broken("a raw control character in a string before")),
            }
        }
    }

    /// One escape; the reader stands behind its backslash.
    fn escape(&mut self) -> Result<char, Refusal> {
        let letter = self.bytes().get(self.at).copied().unwrap_or(0);
        self.at += 1;
        Ok(match letter {
            b'"' | b'\\' | b'/' => char::from(letter),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let first = self.four_digits()?;
                let units = if (0xd800..0xdc00).contains(&first) && self.eat(b"\\u") {
                    vec![first, self.four_digits()?]
                } else {
                    vec![first]
                };
                match String::from_utf16(&units).ok().and_then(|s| s.chars().next()) {
                    Some(c) => c,
                    None => return Err(self.broken("half of a pair of surrogates before")),
                }
            }
            _ => return Err(self.broken("an escape that JSON does not have before")),
        })
    }

    fn four_digits(&mut self) -> Result<u16, Refusal> {
        let digits = self.text.get(self.at..self.at + 4);
        let digits = digits.filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let Some(unit) = digits.and_then(|d| u16::from_str_radix(d, 16).ok()) else {
            return Err(self.broken("expected four hexadecimal digits"));
        };
        self.at += 4;
        Ok(unit)
    }

    /// A natural number of at most [`DIGITS`] digits, if one stands here and the text goes on behind it.
    #[inline(always)]
    pub(super) fn short_unsigned(&mut self) -> Option<u64> {
        let number: &[u8; 25] = self.bytes().get(self.at..)?.first_chunk()?;
        let (count, value) = digits_of(0, number.as_chunks().0.as_array()?);
        let single = count == 1 || number[0] != b'0';
        if count == 0 || count > DIGITS || !single || matches!(number[count], b'.' | b'e' | b'E') {
            return None;
        }
        self.at += count;
        Some(value)
    }

    /// A number with one digit before its point and fewer than [`DIGITS`] behind it, if one stands here and the text goes on.
    #[inline(always)]
    pub(super) fn short_float(&mut self) -> Option<f64> {
        let rest = self.bytes().get(self.at..)?;
        let negative = *rest.first()? == b'-';
        let number: &[u8; 27] = rest.get(usize::from(negative)..)?.first_chunk()?;
        let whole = number[0].wrapping_sub(b'0');
        if whole > 9 || number[1] != b'.' {
            return None;
        }
        let (scale, mantissa) = digits_of(u64::from(whole), number[2..].as_chunks().0.as_array()?);
        if scale == 0 || scale >= DIGITS || matches!(number[2 + scale], b'e' | b'E') {
            return None;
        }
        self.at += usize::from(negative) + 2 + scale;
        let value = quotient(mantissa, scale);
        Some(if negative { -value } else { value })
    }

    /// A number; the reader stands before its sign or first digit.
    pub(super) fn number(&mut self) -> Result<Number, Refusal> {
        let start = self.at;
        let negative = self.eat(b"-");
        let whole = self.digits()?;
        if whole > 1 && self.bytes()[self.at - whole] == b'0' {
            return Err(self.broken("a number with a leading zero before"));
        }
        let mut float = self.eat(b".");
        if float {
            self.digits()?;
        }
        if self.eat(b"e") || self.eat(b"E") {
            float = true;
            let _ = self.eat(b"-") || self.eat(b"+");
            self.digits()?;
        }
        let text = &self.text[start..self.at];
        if let (false, false, Ok(value)) = (float, negative, text.parse()) {
            return Ok(Number::Unsigned(value));
        }
        // Not -0, which only a float is.
        if let (false, true, Ok(value @ ..0)) = (float, negative, text.parse()) {
            return Ok(Number::Signed(value));
        }
        match text.parse::<f64>() {
            Ok(value) if value.is_finite() => Ok(Number::Float(value)),
            _ => Err(self.broken("number out of range before")),
        }
    }

    /// Past digits, at least one; how many.
    fn digits(&mut self) -> Result<usize, Refusal> {
        let count = self.bytes()[self.at..].iter().take_while(|b| b.is_ascii_digit()).count();
        self.at += count;
        if count == 0 { Err(self.broken("expected a digit")) } else { Ok(count) }
    }
}

/// How many digits stand in front, and the number that they make when they are appended to `value`, which wraps where they
/// are too many.
#[inline(always)]
fn digits_of(mut value: u64, parts: &[[u8; 8]; 3]) -> (usize, u64) {
    let mut all = 0;
    for part in parts {
        let (count, digits) = leading_digits(*part);
        value = value.wrapping_mul(TENS[count]).wrapping_add(digits);
        all += count;
        if count < 8 {
            break;
        }
    }
    (all, value)
}

/// How many digits stand in front, and their value, all together in one register: the count differs from number to
/// number, and a branch on it would be guessed wrong.
#[inline(always)]
fn leading_digits(bytes: [u8; 8]) -> (usize, u64) {
    const EACH: u64 = 0x0101_0101_0101_0101;
    // A digit is 0x30 to 0x39: what is left of it is below 10, what is left of anything else is not.
    let ones = u64::from_le_bytes(bytes) ^ (0x30 * EACH);
    let others = (((ones & (0x7f * EACH)) + (0x80 - 10) * EACH) | ones) & (0x80 * EACH);
    if others == 0 {
        return (8, eight_digits(ones));
    }
    let bits = others.trailing_zeros() & !7;
    ((bits / 8) as usize, eight_digits(ones << 8 << (56 - bits)))
}

/// The value of eight digits, the first one in the lowest byte.
#[inline(always)]
fn eight_digits(ones: u64) -> u64 {
    let pairs = (ones.wrapping_mul(10 << 8 | 1) >> 8) & 0x00ff_00ff_00ff_00ff;
    let fours = (pairs.wrapping_mul(100 << 16 | 1) >> 16) & 0x0000_ffff_0000_ffff;
    fours.wrapping_mul(10_000 << 32 | 1) >> 32
}

/// The binary64 nearest to `mantissa / 10^scale`, for a scale up to [`DIGITS`].
#[inline(always)]
fn quotient(mantissa: u64, scale: usize) -> f64 {
    // Both are exact in binary64, so the one rounding of their division is the right one.
    if mantissa <= 1 << 53 {
        return mantissa as i64 as f64 / TENS[scale] as i64 as f64;
    }
    let up = mantissa.leading_zeros();
    let dividend = u128::from(mantissa << up);
    let exponent = 1023 - 63 + i64::from(TENS[scale].leading_zeros()) - i64::from(up);
    let power = f64::from_bits((exponent as u64) << 52);
    // The quotient, between 2^62 and 2^64, is from this to less than two more. A binary64 drops its last ten bits or
    // eleven: a division is needed only where it may lie near the middle between two of them.
    let low = ((dividend * u128::from(RECIPROCALS[scale])) >> 64) as u64;
    if low.wrapping_add(2) & 0x1ff > 2 {
        return low as f64 * power;
    }
    divided(dividend << 63, TENS[scale]) * power
}

/// The binary64 nearest to `dividend / divisor`, the divisor shifted up to its highest bit. Between 2^62 and 2^64.
#[cold]
fn divided(dividend: u128, divisor: u64) -> f64 {
    let divisor = u128::from(divisor << divisor.leading_zeros());
    let quotient = dividend / divisor;
    // Whatever is below its last bit makes that bit 1, so that the conversion rounds as the whole quotient would be
    // rounded.
    let rest = u64::from(dividend != quotient * divisor);
    (quotient as u64 | rest) as f64
}

/// Length of the string that begins here, behind its quote, where every backslash in it stands before a quote and
/// nothing in it is a control character; `None` for any other.
fn simply_quoted(bytes: &[u8]) -> Option<usize> {
    /// Bytes that are looked at together: without an end inside, the compiler takes a register at a time.
    const BLOCK: usize = 256;
    let stops = |before: u8, byte: u8| (byte == b'"') != (before == b'\\') || byte < 0x20;
    let stops_first = |byte: u8| stops(0, byte);
    if stops_first(*bytes.first()?) {
        return (bytes[0] == b'"').then_some(0);
    }
    let pairs = bytes.windows(2);
    let calm = bytes
        .chunks_exact(BLOCK)
        .zip(bytes[1..].chunks_exact(BLOCK))
        .take_while(|(before, here)| {
            !before.iter().zip(*here).fold(false, |seen, (before, byte)| seen | stops(*before, *byte))
        })
        .count();
    let at = calm * BLOCK + pairs.skip(calm * BLOCK).position(|pair| stops(pair[0], pair[1]))?;
    (bytes[at] != b'\\' && bytes[at + 1] == b'"').then_some(at + 1)
}
