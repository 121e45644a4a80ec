//! Chat templates: Jinja as transformers runs it, with the three functions it adds.

use anyhow::{Result, anyhow};
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::Serialize;

use super::{Message, SpecialTokens};

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    pub fn new(source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        // These two are how transformers compiles a template; without them the white space differs.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|e| anyhow!("the model's chat template cannot be compiled: {}", describe(&e)))?;
        Ok(Self { environment })
    }

    pub(super) fn render(
        &self,
        messages: &[Message],
        special: &SpecialTokens,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let template = self.environment.get_template(NAME)?;
        // An absent special token stays undefined, as in transformers: templates test `bos_token is defined`.
        let token = |t: &Option<String>| t.as_deref().map_or(Value::UNDEFINED, Value::from);
        template
            .render(context! {
                messages => messages,
                tools => Value::from(()),
                documents => Value::from(()),
                add_generation_prompt => add_generation_prompt,
                bos_token => token(&special.bos),
                eos_token => token(&special.eos),
                unk_token => token(&special.unk),
                pad_token => token(&special.pad),
            })
            .map_err(|e| anyhow!("the model's chat template refuses this conversation: {}", describe(&e)))
    }
}

/// `{% generation %}` only marks a span for transformers' own mask; as an always-true block it renders the same.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open..].find("%}").map(|c| open + c) else { break };
        let inner = &rest[open + 2..close];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&rest[..open + 2]);
        match replacement {
            Some(tag) => out.push_str(&inner.replacen(word, &format!(" {tag} "), 1)),
            None => out.push_str(inner),
        }
        out.push_str("%}");
        rest = &rest[close + 2..];
    }
    out.push_str(rest);
    out
}

fn describe(error: &Error) -> String {
    match (error.detail(), error.line()) {
        (Some(detail), Some(line)) => format!("{detail} (template line {line})"),
        (Some(detail), None) => detail.to_owned(),
        (None, _) => error.to_string(),
    }
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The day that templates take for today, in `strftime` notation: with the real one, a run that passes midnight would
/// train on one prompt and be evaluated on another, and none could be repeated. It is the day that Llama 3.2's template
/// itself falls back to.
fn strftime_now(format: String) -> Result<String, Error> {
    use std::fmt::Write as _;
    let today =
        chrono::NaiveDate::from_ymd_opt(2024, 7, 26).unwrap_or_default().and_time(chrono::NaiveTime::MIN);
    let mut text = String::new();
    // Writing instead of `to_string`: an unknown directive is then an error and not a panic.
    write!(text, "{}", today.format(&format)).map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now cannot use the format {format:?}"))
    })?;
    Ok(text)
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`: the builtin filter escapes for HTML instead.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = options.get(ignored)?;
    }
    options.assert_all_used()?;
    let fail = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, format!("tojson: {e}"));
    let mut bytes = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(64));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))
                .map_err(fail)?;
        }
        None => {
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, PythonSpacing))
                .map_err(fail)?;
        }
    }
    let text =
        String::from_utf8(bytes).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(text))
}

/// `json.dumps` puts a space after every comma and colon.
struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        ChatTemplate::new(source)?.render(messages, &SpecialTokens::default(), true)
    }

    #[test]
    fn python_methods_and_slices_work() {
        let source = "{% for m in messages[1:] %}{{ m['content'].strip().upper() }}{% endfor %}";
        let messages = [Message::user("a"), Message::user("  b ")];
        assert_eq!(render(source, &messages).unwrap(), "B");
    }

    #[test]
    fn a_template_refuses_in_its_own_words() {
        let source = "{{ raise_exception('System role not supported') }}";
        let error = render(source, &[Message::new("system", "x")]).unwrap_err().to_string();
        assert!(error.contains("System role not supported"), "{error}");
    }

    #[test]
    fn a_broken_template_is_an_error_that_names_the_line() {
        let error = ChatTemplate::new("one\n{% if %}").unwrap_err().to_string();
        assert!(error.contains("template line 2"), "{error}");
    }

    #[test]
    fn generation_tags_are_transparent() {
        let source = "a{%- generation -%} b {%- endgeneration %}c{% generation %}d{% endgeneration %}";
        assert_eq!(render(source, &[Message::user("x")]).unwrap(), "abcd");
    }

    #[test]
    fn tojson_is_pythons() {
        let source = "{{ {'a': [1, 'ü<'], 'b': none} | tojson }}|{{ [1] | tojson(indent=2) }}";
        assert_eq!(
            render(source, &[Message::user("x")]).unwrap(),
            "{\"a\": [1, \"ü<\"], \"b\": null}|[\n  1\n]"
        );
    }

    #[test]
    fn every_day_is_the_same_day_and_nonsense_is_refused() {
        let today = render("{{ strftime_now('%d %b %Y, %Y-%m-%d %H:%M') }}", &[Message::user("x")]).unwrap();
        assert_eq!(today, "26 Jul 2024, 2024-07-26 00:00");
        assert!(render("{{ strftime_now('%Q!') }}", &[Message::user("x")]).is_err());
    }

    #[test]
    fn absent_special_tokens_are_undefined() {
        let source =
            "{{ 'yes' if bos_token is defined else 'no' }}{{ 'none' if tools is none else 'tools' }}";
        assert_eq!(render(source, &[Message::user("x")]).unwrap(), "nonone");
    }
}
