//! JSON as the format allows it, read once: no key twice at any level, nothing before the first brace, only spaces
//! after the last. Other readers keep the last of two equal keys, and read a struct from an array and a word from an
//! object as well: two of them could see two files.

mod read;
mod reader;

pub(super) use read::{Read, object, words};
pub(super) use reader::Reader;

use std::borrow::Cow;
use std::fmt::{self, Display};

/// Deepest nesting, the outermost object being level 1.
const LEVELS: usize = 100;
/// Longest part of a foreign text that an error sentence repeats, in characters.
const QUOTED: usize = 160;

/// A text that was refused, with a sentence fragment that says why. Boxed: what is read is returned beside it.
#[derive(Debug)]
pub(super) struct Refusal(Box<(Rule, String)>);

/// What a refused text is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// JSON under the rules of the format.
    Strict,
    /// The JSON that was expected.
    Shape,
}

impl Refusal {
    #[cold]
    fn not_strict(sentence: impl Display) -> Refusal {
        Refusal(Box::new((Rule::Strict, sentence.to_string())))
    }

    #[cold]
    pub(super) fn shape(sentence: impl Display) -> Refusal {
        Refusal(Box::new((Rule::Shape, sentence.to_string())))
    }

    /// Says in which member of the header it was.
    pub(super) fn inside(self, name: &str) -> Refusal {
        match self.rule() {
            Rule::Strict => self,
            Rule::Shape => Refusal::shape(format_args!("{:?}: {self}", plain(name))),
        }
    }

    pub(super) fn rule(&self) -> Rule {
        self.0.0
    }
}

impl Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.1)
    }
}

impl std::error::Error for Refusal {}

/// A string of a JSON text.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Text<'a> {
    /// Its characters.
    Plain(Cow<'a, str>),
    /// As it stands, a backslash before every quote: all that JSON inside a JSON string needs, as a rule.
    Quoted(&'a str),
}

impl<'a> From<&'a str> for Text<'a> {
    fn from(text: &'a str) -> Self {
        Text::Plain(Cow::Borrowed(text))
    }
}

impl Text<'_> {
    /// Its characters.
    pub(super) fn plain(&self) -> Cow<'_, str> {
        match self {
            Text::Plain(text) => Cow::Borrowed(text),
            Text::Quoted(raw) => Cow::Owned(raw.replace("\\\"", "\"")),
        }
    }

    /// The JSON in it as a `T`. A text that breaks several rules breaks those of JSON first.
    pub(super) fn read<T: for<'t> Read<'t>>(&self) -> Result<T, Refusal> {
        if let Text::Quoted(raw) = self
            && let Ok(value) = Reader::<true>::new(raw).document(T::read)
        {
            return Ok(value);
        }
        read(&self.plain(), T::read)
    }
}

/// Reads a whole text with `value`. A text that breaks several rules breaks those of JSON first.
pub(super) fn read<'de, T>(
    text: &'de str,
    value: impl FnOnce(&mut Reader<'de>) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    Reader::new(text).document(value).map_err(|refusal| match strict(text) {
        Err(first) if refusal.rule() == Rule::Shape => first,
        _ => refusal,
    })
}

/// Whether all of it is JSON under the rules of the format, whatever it says.
fn strict(text: &str) -> Result<(), Refusal> {
    Reader::<false>::new(text).document(Reader::skip_value)
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

#[cfg(test)]
mod tests;
