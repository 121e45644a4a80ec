//! JSON on its way to a type, with serde: a struct is an object, a word is a string, and nothing else in their place.

use super::reader::{Key, Members, Number, Reader};
use super::{Refusal, plain};
use serde::de::value::U64Deserializer;
use serde::de::{
    DeserializeSeed, Deserializer, Error, Expected, IgnoredAny, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, Visitor,
};
use std::borrow::Cow;
use std::fmt::{self, Display};

impl<'de, const QUOTED: bool> Reader<'de, QUOTED> {
    /// The refusal of whatever value stands here where `expected` should.
    #[cold]
    pub(super) fn unexpected(&mut self, expected: &'static str) -> Refusal {
        struct Nothing(&'static str);
        impl Visitor<'_> for Nothing {
            type Value = ();
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.0)
            }
        }
        let refused = self.deserialize_any(Nothing(expected));
        refused.err().unwrap_or_else(|| Refusal::custom(format_args!("expected {expected}")))
    }

    /// Past a value that nobody reads: the rules of JSON hold for it all the same.
    fn skip(&mut self) -> Result<(), Refusal> {
        match self.token() {
            b'{' => self.members(|_, reader| reader.skip()),
            b'[' => {
                let mut members = self.open(&[])?;
                while self.further(&mut members, b']')? {
                    self.skip()?;
                }
                Ok(())
            }
            _ => self.deserialize_any(IgnoredAny).map(|_| ()),
        }
    }
}

impl<'de, const QUOTED: bool> Deserializer<'de> for &mut Reader<'de, QUOTED> {
    type Error = Refusal;

    #[inline]
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        match self.token() {
            b'{' => self.deserialize_struct("", &[], visitor),
            b'[' => {
                let mut elements = Elements { members: self.open(&[])?, reader: self, count: 0 };
                let value = visitor.visit_seq(&mut elements)?;
                elements.end().map(|()| value)
            }
            b'"' => match self.string()? {
                Cow::Borrowed(text) => visitor.visit_borrowed_str(text),
                Cow::Owned(text) => visitor.visit_string(text),
            },
            b'-' | b'0'..=b'9' => match self.number()? {
                Number::Unsigned(value) => visitor.visit_u64(value),
                Number::Signed(value) => visitor.visit_i64(value),
                Number::Float(value) => visitor.visit_f64(value),
            },
            b'n' => self.word("null").and_then(|()| visitor.visit_unit()),
            b't' => self.word("true").and_then(|()| visitor.visit_bool(true)),
            b'f' => self.word("false").and_then(|()| visitor.visit_bool(false)),
            _ => Err(self.broken("expected a value")),
        }
    }

    #[inline]
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        match self.token() {
            b'n' => self.word("null").and_then(|()| visitor.visit_none()),
            _ => visitor.visit_some(self),
        }
    }

    #[inline]
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refusal> {
        match self.token() {
            b'{' => {
                let members = self.open(fields)?;
                visitor.visit_map(Object { reader: self, members })
            }
            b'[' => Err(Refusal::invalid_type(Unexpected::Seq, &visitor)),
            _ => self.deserialize_any(visitor),
        }
    }

    #[inline]
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        words: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refusal> {
        let found = match self.token() {
            b'"' => {
                return match self.expected_word(words) {
                    // A derived enum takes a variant by its number, too.
                    Some(at) => visitor.visit_enum(at.into_deserializer()),
                    None => visitor.visit_enum(self.string()?.into_deserializer()),
                };
            }
            b'{' => Unexpected::Map,
            b'[' => Unexpected::Seq,
            _ => Unexpected::Other("another value"),
        };
        Err(Refusal::invalid_type(found, &visitor))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        self.skip()?;
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct newtype_struct seq tuple tuple_struct map identifier
    }
}

/// An object, member by member.
struct Object<'a, 'de, const QUOTED: bool> {
    reader: &'a mut Reader<'de, QUOTED>,
    members: Members<'de>,
}

impl<'de, const QUOTED: bool> MapAccess<'de> for Object<'_, 'de, QUOTED> {
    type Error = Refusal;

    #[inline]
    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Refusal> {
        match self.reader.key(&mut self.members)? {
            None => Ok(None),
            // A derived struct takes a field by its number, too.
            Some(Key::Field(at)) => seed.deserialize(U64Deserializer::new(at as u64)).map(Some),
            Some(Key::Other(key)) => seed.deserialize(key.into_deserializer()).map(Some),
        }
    }

    #[inline]
    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Refusal> {
        seed.deserialize(&mut *self.reader)
    }
}

/// An array, element by element.
struct Elements<'a, 'de, const QUOTED: bool> {
    reader: &'a mut Reader<'de, QUOTED>,
    members: Members<'de>,
    count: usize,
}

/// `count`, and the closing bracket read with the last of them.
const CLOSED: usize = usize::MAX;

impl<'de, const QUOTED: bool> SeqAccess<'de> for Elements<'_, 'de, QUOTED> {
    type Error = Refusal;

    #[inline]
    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Refusal> {
        if self.count == CLOSED || !self.reader.further(&mut self.members, b']')? {
            self.count = CLOSED;
            return Ok(None);
        }
        self.count += 1;
        seed.deserialize(&mut *self.reader).map(Some)
    }

    // Not known before the end. A guess that most arrays of a manifest stay within saves moving them as they grow.
    #[inline]
    fn size_hint(&self) -> Option<usize> {
        Some(16)
    }
}

impl<const QUOTED: bool> Elements<'_, '_, QUOTED> {
    /// Refuses elements that the type did not take.
    #[inline]
    fn end(mut self) -> Result<(), Refusal> {
        let taken = self.count;
        if taken == CLOSED || self.next_element::<IgnoredAny>()?.is_none() {
            return Ok(());
        }
        let mut found = taken + 1;
        while self.next_element::<IgnoredAny>()?.is_some() {
            found += 1;
        }
        Err(Refusal::invalid_length(found, &format!("an array of {taken}").as_str()))
    }
}

impl Error for Refusal {
    fn custom<T: Display>(sentence: T) -> Self {
        Refusal::shape(plain(&sentence.to_string()))
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        match found {
            Unexpected::Unit => Refusal::custom(format_args!("invalid type: null, expected {expected}")),
            _ => Refusal::custom(format_args!("invalid type: {found}, expected {expected}")),
        }
    }
}
