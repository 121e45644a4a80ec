//! JSON on its way to a type: a struct is an object, a word is a string, and nothing else in their place.

use super::reader::{Number, Reader};
use super::{Refusal, plain};
use serde::de::{Error, Expected, Unexpected};
use std::borrow::Cow;
use std::fmt::Display;

/// A value that is read from a text.
pub(in crate::directions) trait Read<'de>: Sized {
    /// Reads it from where the reader stands.
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> Result<Self, Refusal>;

    /// What an object has where it lacks the field.
    fn missing(field: &'static str) -> Result<Self, Refusal> {
        Err(Refusal::missing_field(field))
    }
}

/// A struct that is an object. As writers write it, field after field, each key costs a comparison with a constant; what
/// follows a member that is written in another way is read member by member.
///
/// `skip` and `refuse` say what becomes of a member that is no field.
macro_rules! object {
    ($unknown:ident $name:ident $(<$life:lifetime>)? { $first:ident $(, $field:ident)* }) => {
        impl<'de> $crate::directions::json::Read<'de> for $name $(<$life>)? {
            #[inline]
            fn read<const QUOTED: bool>(
                reader: &mut $crate::directions::json::Reader<'de, QUOTED>,
            ) -> std::result::Result<Self, $crate::directions::json::Refusal> {
                use $crate::directions::json::Read;

                let mut $first = None;
                $(let mut $field = None;)*
                let complete = 'written: {
                    let key = (
                        concat!("{\"", stringify!($first), "\":"),
                        concat!("{\\\"", stringify!($first), "\\\":"),
                    );
                    if !reader.expect_first(key.0, key.1) {
                        break 'written false;
                    }
                    $first = Some(Read::read(reader)?);
                    $(
                        let key = (
                            concat!(",\"", stringify!($field), "\":"),
                            concat!(",\\\"", stringify!($field), "\\\":"),
                        );
                        if !reader.expect(key.0, key.1) {
                            break 'written false;
                        }
                        $field = Some(Read::read(reader)?);
                    )*
                    reader.expect_end()
                };
                if !complete {
                    const FIELDS: &[&str] = &[stringify!($first) $(, stringify!($field))*];
                    let there = [$first.is_some() $(, $field.is_some())*];
                    let seen = FIELDS.iter().zip(there).filter(|(_, there)| *there).map(|(name, _)| *name);
                    reader.further_members(&concat!("struct ", stringify!($name)), seen, |key, reader| {
                        match &*key {
                            stringify!($first) => $first = Some(Read::read(reader)?),
                            $(stringify!($field) => $field = Some(Read::read(reader)?),)*
                            _ => reader.$unknown(&key, FIELDS)?,
                        }
                        Ok(())
                    })?;
                }
                Ok($name {
                    $first: $first.map_or_else(|| Read::missing(stringify!($first)), Ok)?,
                    $($field: $field.map_or_else(|| Read::missing(stringify!($field)), Ok)?,)*
                })
            }
        }
    };
}
pub(in crate::directions) use object;

/// An enum that is a string.
macro_rules! words {
    ($name:ident { $($variant:ident: $word:literal),+ }) => {
        impl<'de> $crate::directions::json::Read<'de> for $name {
            #[inline]
            fn read<const QUOTED: bool>(
                reader: &mut $crate::directions::json::Reader<'de, QUOTED>,
            ) -> std::result::Result<Self, $crate::directions::json::Refusal> {
                $(
                    if reader.expect(concat!("\"", $word, "\""), concat!("\\\"", $word, "\\\"")) {
                        return Ok($name::$variant);
                    }
                )+
                let word = reader.one_word()?;
                // Every variant is named above.
                [$($name::$variant),+].into_iter().find(|variant| match variant {
                    $($name::$variant => word == $word,)+
                }).ok_or_else(|| serde::de::Error::unknown_variant(&word, &[$($word),+]))
            }
        }
    };
}
pub(in crate::directions) use words;

impl<'de, const QUOTED: bool> Reader<'de, QUOTED> {
    /// The refusal of whatever value stands here where `expected` should.
    #[cold]
    pub(super) fn unexpected(&mut self, expected: &dyn Expected) -> Refusal {
        let mut text = Cow::Borrowed("");
        let found = match self.token() {
            b'{' => Ok(Unexpected::Map),
            b'[' => Ok(Unexpected::Seq),
            b'"' => self.string().map(|string| {
                text = string;
                Unexpected::Str(&text)
            }),
            b'-' | b'0'..=b'9' => self.number().map(|number| number.unexpected()),
            b'n' => self.word("null").map(|()| Unexpected::Other("null")),
            b't' => self.word("true").map(|()| Unexpected::Bool(true)),
            b'f' => self.word("false").map(|()| Unexpected::Bool(false)),
            _ => Err(self.broken("expected a value")),
        };
        found.map_or_else(|refusal| refusal, |found| Refusal::invalid_type(found, expected))
    }

    /// Past a value that nobody reads: the rules of JSON hold for it all the same.
    pub(super) fn skip_value(&mut self) -> Result<(), Refusal> {
        match self.token() {
            b'{' => self.members(&"an object", |_, reader| reader.skip_value()),
            b'[' => self.elements(|reader| reader.skip_value()),
            b'"' => self.string().map(|_| ()),
            b'-' | b'0'..=b'9' => self.number().map(|_| ()),
            b'n' => self.word("null"),
            b't' => self.word("true"),
            b'f' => self.word("false"),
            _ => Err(self.broken("expected a value")),
        }
    }

    /// Past a member that is no field, where such are optional.
    pub(in crate::directions) fn skip(&mut self, _: &str, _: &[&str]) -> Result<(), Refusal> {
        self.skip_value()
    }

    /// Refuses a member that is no field.
    pub(in crate::directions) fn refuse(
        &mut self,
        key: &str,
        fields: &'static [&'static str],
    ) -> Result<(), Refusal> {
        Err(Refusal::unknown_field(key, fields))
    }

    /// A string where a word should stand.
    #[cold]
    pub(in crate::directions) fn one_word(&mut self) -> Result<Cow<'de, str>, Refusal> {
        if self.token() == b'"' { self.string() } else { Err(self.unexpected(&"a word")) }
    }

    /// Calls `element` for every element of an array, the reader standing before it.
    #[inline(always)]
    pub(in crate::directions) fn elements(
        &mut self,
        mut element: impl FnMut(&mut Self) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        if self.token() != b'[' {
            return Err(self.unexpected(&"an array"));
        }
        self.open()?;
        let mut first = true;
        while self.further(first, b']')? {
            first = false;
            element(self)?;
        }
        Ok(())
    }

    /// An array of `N` elements, of which `element` reads the one it is given the place of.
    #[inline(always)]
    fn exactly<const N: usize>(
        &mut self,
        mut element: impl FnMut(usize, &mut Self) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let mut count = 0;
        self.elements(|reader| {
            count += 1;
            if count <= N { element(count - 1, reader) } else { reader.skip_value() }
        })?;
        if count == N {
            Ok(())
        } else {
            Err(Refusal::invalid_length(count, &format!("an array of {N}").as_str()))
        }
    }

    /// A number, if that stands here.
    #[inline(always)]
    fn numeral(&mut self, expected: &dyn Expected) -> Result<Number, Refusal> {
        match self.token() {
            b'-' | b'0'..=b'9' => self.number(),
            _ => Err(self.unexpected(expected)),
        }
    }

    #[inline(never)]
    fn float(&mut self) -> Result<f64, Refusal> {
        if let Some(value) = self.short_float() {
            return Ok(value);
        }
        Ok(match self.numeral(&"f64")? {
            Number::Float(value) => value,
            Number::Unsigned(value) => value as f64,
            Number::Signed(value) => value as f64,
        })
    }

    #[inline(always)]
    fn unsigned(&mut self, expected: &'static str) -> Result<u64, Refusal> {
        match self.short_unsigned() {
            Some(value) => Ok(value),
            None => self.any_unsigned(expected),
        }
    }

    #[inline(never)]
    fn any_unsigned(&mut self, expected: &'static str) -> Result<u64, Refusal> {
        match self.numeral(&expected)? {
            Number::Unsigned(value) => Ok(value),
            Number::Signed(value) => Err(Refusal::invalid_value(Unexpected::Signed(value), &expected)),
            Number::Float(value) => Err(Refusal::invalid_type(Unexpected::Float(value), &expected)),
        }
    }
}

impl Number {
    fn unexpected(&self) -> Unexpected<'static> {
        match *self {
            Number::Unsigned(value) => Unexpected::Unsigned(value),
            Number::Signed(value) => Unexpected::Signed(value),
            Number::Float(value) => Unexpected::Float(value),
        }
    }
}

impl<'de> Read<'de> for f64 {
    #[inline(always)]
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> Result<Self, Refusal> {
        reader.float()
    }
}

impl<'de> Read<'de> for u64 {
    #[inline(always)]
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> Result<Self, Refusal> {
        reader.unsigned("u64")
    }
}

impl<'de> Read<'de> for u32 {
    #[inline(always)]
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> Result<Self, Refusal> {
        let value = reader.unsigned("u32")?;
        u32::try_from(value).map_err(|_| Refusal::invalid_value(Unexpected::Unsigned(value), &"u32"))
    }
}

impl<'de> Read<'de> for Cow<'de, str> {
    #[inline]
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> Result<Self, Refusal> {
        if reader.token() == b'"' { reader.string() } else { Err(reader.unexpected(&"a string")) }
    }
}

impl<'de> Read<'de> for String {
    #[inline]
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> Result<Self, Refusal> {
        Cow::read(reader).map(Cow::into_owned)
    }
}

impl<'de, T: Read<'de>> Read<'de> for Option<T> {
    #[inline]
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> Result<Self, Refusal> {
        match reader.token() {
            b'n' => reader.word("null").map(|()| None),
            _ => T::read(reader).map(Some),
        }
    }

    fn missing(_: &'static str) -> Result<Self, Refusal> {
        Ok(None)
    }
}

impl<'de, T: Read<'de>> Read<'de> for Vec<T> {
    #[inline]
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> Result<Self, Refusal> {
        // Room for most arrays of a manifest saves moving them as they grow.
        let mut all = Vec::with_capacity(16);
        reader.elements(|reader| T::read(reader).map(|element| all.push(element)))?;
        Ok(all)
    }
}

impl<'de, T: Read<'de> + Default + Copy, const N: usize> Read<'de> for [T; N] {
    #[inline]
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> Result<Self, Refusal> {
        let mut all = [T::default(); N];
        reader.exactly::<N>(|at, reader| T::read(reader).map(|element| all[at] = element))?;
        Ok(all)
    }
}

impl<'de, A: Read<'de> + Default, B: Read<'de> + Default> Read<'de> for (A, B) {
    #[inline]
    fn read<const QUOTED: bool>(reader: &mut Reader<'de, QUOTED>) -> Result<Self, Refusal> {
        let mut pair = Self::default();
        reader.exactly::<2>(|at, reader| {
            match at {
                0 => pair.0 = A::read(reader)?,
                _ => pair.1 = B::read(reader)?,
            }
            Ok(())
        })?;
        Ok(pair)
    }
}

impl Error for Refusal {
    fn custom<T: Display>(sentence: T) -> Self {
        Refusal::shape(plain(&sentence.to_string()))
    }
}
