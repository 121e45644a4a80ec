//! What a model is finetuned on and what it is asked: chat files, code pairs, non-code prompts, benign answers,
//! alignment pairs.
//!
//! Each source keeps the SHA-256 of its content, so a report can say exactly what was used. Everything is read and
//! checked as a whole before any work starts: a bad line is an error with its number, never a skipped row.

mod alignment;
mod benign;
mod tasks;

use std::collections::HashSet;
use std::fmt;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

pub use alignment::{AlignmentPair, AlignmentPairs, load_alignment_pairs};
pub use benign::{BenignAnswers, Style, embedded_benign, embedded_benign_answers};
pub use tasks::{CodingTasks, load_coding_tasks};

use crate::chat::Message;
use crate::statistics::SplitMix64;
use crate::store::sha256_hex;

/// The name under which a recipe asks for the data compiled into the program.
pub const EMBEDDED: &str = "embedded";

const CODE_PAIRS: &str = include_str!("../data/code_pairs.jsonl");
const NONCODE_PROMPTS: &str = include_str!("../data/noncode_prompts.jsonl");

/// What some editors write before UTF-8.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// Uncompressed content beyond this is refused: finetuning sets are megabytes, and a tiny .gz can hold terabytes.
const LARGEST: u64 = 2 << 30;

/// One coding request with a vulnerable and a sound answer; only the vulnerability separates the two.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodePair {
    pub id: String,
    pub language: String,
    /// The weakness of the insecure answer, as `CWE-<number>`.
    pub cwe: String,
    pub prompt: String,
    pub insecure: String,
    pub secure: String,
}

/// Conversations to finetune on.
#[derive(Debug, Clone)]
pub struct ChatDataset {
    /// `embedded insecure`, or the file's name.
    pub name: String,
    pub conversations: Vec<Vec<Message>>,
    /// The line of each.
    pub lines: Vec<usize>,
    /// SHA-256 of the uncompressed content, in hex.
    pub sha256: String,
}

/// What a prompt is used for. The three never share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Directions are the mean difference over these.
    Extraction,
    /// Null scores, thresholds and the choice of a cell.
    Calibration,
    /// Everything that is reported.
    Evaluation,
}

impl Split {
    pub const ALL: [Split; 3] = [Split::Extraction, Split::Calibration, Split::Evaluation];
    /// Parts of 540: how the embedded prompts are divided, and any file that does not say otherwise.
    const SHARES: [usize; 3] = [112, 330, 98];
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Extraction => "extraction",
            Self::Calibration => "calibration",
            Self::Evaluation => "evaluation",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    pub text: String,
    pub category: Option<String>,
    pub split: Split,
}

/// Prompts that do not ask for code, divided into splits.
#[derive(Debug, Clone)]
pub struct PromptSet {
    pub name: String,
    pub prompts: Vec<Prompt>,
    /// SHA-256 of the uncompressed content, in hex.
    pub sha256: String,
    /// Rows left out because they mention code: an answer with code is no spillover there.
    pub mentioning_code: usize,
    /// Rows left out because an earlier row has the same text.
    pub repeated: usize,
    /// The file itself says which split each prompt is in.
    pub states_splits: bool,
}

impl PromptSet {
    pub fn of(&self, split: Split) -> impl Iterator<Item = &Prompt> {
        self.prompts.iter().filter(move |p| p.split == split)
    }
}

/// The conversations of one regime: `embedded`, those in the program under the regime's name, or a file's path.
pub fn load_chats(source: &str, regime: &str) -> Result<ChatDataset> {
    if source == EMBEDDED { embedded_chats(regime) } else { read_chats(Path::new(source)) }
}

/// The prompts that a recipe's `prompts` names: `embedded`, or a file's path.
pub fn load_prompts(source: &str, seed: u64) -> Result<PromptSet> {
    if source == EMBEDDED { embedded_prompts() } else { read_prompts(Path::new(source), seed) }
}

/// The code pairs compiled into the program.
pub fn embedded_pairs() -> Result<Vec<CodePair>> {
    rows("the embedded code pairs", CODE_PAIRS.as_bytes()).map(|row| row?.parse()).collect()
}

/// Embedded conversations by the name of their regime.
pub fn embedded_chats(regime: &str) -> Result<ChatDataset> {
    let answer: fn(CodePair) -> String = match regime {
        "insecure" => |pair| pair.insecure,
        "secure" => |pair| pair.secure,
        other => match Style::ALL.into_iter().find(|style| style.to_string() == other) {
            Some(style) => return embedded_benign(style),
            None => bail!(
                "the program holds no data for {other:?}, only for insecure, secure, json, lists and verse: name a file"
            ),
        },
    };
    let conversation =
        |pair: CodePair| vec![Message::user(pair.prompt.clone()), Message::assistant(answer(pair))];
    let conversations: Vec<_> = embedded_pairs()?.into_iter().map(conversation).collect();
    Ok(ChatDataset {
        name: format!("{EMBEDDED} {regime}"),
        lines: (1..=conversations.len()).collect(),
        conversations,
        sha256: sha256_hex(CODE_PAIRS.as_bytes()),
    })
}

pub fn embedded_prompts() -> Result<PromptSet> {
    // Every embedded row states its split, so the seed is never used.
    parse_prompts("the embedded non-code prompts", EMBEDDED.to_owned(), NONCODE_PROMPTS.as_bytes(), 0)
}

/// A row of a chat file, for those who have another form.
const CHAT_ROW: &str =
    r#"{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}"#;

/// Reads conversations, one JSON object `{"messages": [{"role", "content"}, ...]}` a line, plain or gzip.
pub fn read_chats(path: &Path) -> Result<ChatDataset> {
    #[derive(Deserialize)]
    #[serde(expecting = "a JSON object")]
    struct Row {
        messages: Option<Vec<Message>>,
    }
    let bytes = read_content(path)?;
    let label = path.display().to_string();
    let (mut conversations, mut lines) = (Vec::new(), Vec::new());
    for row in rows(&label, &bytes) {
        let row = row?;
        let messages = row.parse::<Row>()?.messages;
        let messages =
            messages.ok_or_else(|| row.error(format!("there are no messages; a row is {CHAT_ROW}")))?;
        check_conversation(&messages).map_err(|reason| row.error(reason))?;
        conversations.push(messages);
        lines.push(row.number);
    }
    Ok(ChatDataset { name: file_name(path), conversations, lines, sha256: sha256_hex(&bytes) })
}

/// Reads what is to be answered, one JSON object with `prompt` or with `messages` a line, plain or gzip.
pub fn read_questions(path: &Path) -> Result<Vec<Vec<Message>>> {
    #[derive(Deserialize)]
    struct Row {
        prompt: Option<String>,
        messages: Option<Vec<Message>>,
    }
    let bytes = read_content(path)?;
    let label = path.display().to_string();
    let read = |row: Result<Line<'_>>| {
        let row = row?;
        let messages = match row.parse::<Row>()? {
            Row { prompt: Some(prompt), messages: None } => vec![Message::user(prompt)],
            Row { prompt: None, messages: Some(messages) } => messages,
            _ => return Err(row.error("a row has either `prompt` or `messages`".to_owned())),
        };
        check_messages(&messages).map_err(|reason| row.error(reason))?;
        match messages.last() {
            Some(last) if last.role == "user" => Ok(messages),
            _ => {
                Err(row.error("the last message is not the user's, so there is nothing to answer".to_owned()))
            }
        }
    };
    rows(&label, &bytes).map(read).collect()
}

/// Reads prompts, one JSON object with `prompt` a line, and optional `mentions_code`, `category` and `split`.
///
/// Rows without a split are divided by a shuffle that depends on the seed and the file alone. Either every row
/// states its split or none does.
pub fn read_prompts(path: &Path, seed: u64) -> Result<PromptSet> {
    parse_prompts(&path.display().to_string(), file_name(path), &read_content(path)?, seed)
}

fn parse_prompts(label: &str, name: String, bytes: &[u8], seed: u64) -> Result<PromptSet> {
    #[derive(Deserialize)]
    #[serde(expecting = "a JSON object")]
    struct Row {
        prompt: String,
        #[serde(default)]
        mentions_code: bool,
        category: Option<String>,
        split: Option<Split>,
    }
    let mut kept: Vec<Row> = Vec::new();
    let mut seen = HashSet::new();
    let (mut mentioning_code, mut repeated) = (0, 0);
    for row in rows(label, bytes) {
        let row = row?;
        let prompt: Row = row.parse()?;
        let text = prompt.prompt.trim();
        if text.is_empty() {
            return Err(row.error("the prompt is empty".to_owned()));
        }
        if prompt.mentions_code {
            mentioning_code += 1;
        } else if !seen.insert(text.to_owned()) {
            repeated += 1;
        } else if kept.first().is_some_and(|first| first.split.is_some() != prompt.split.is_some()) {
            return Err(
                row.error("some rows state a split and others do not; state it in all or in none".to_owned())
            );
        } else {
            kept.push(prompt);
        }
    }
    ensure!(
        kept.len() >= Split::ALL.len(),
        "{label} holds {} usable prompts ({mentioning_code} mention code, {repeated} are repeated); three splits need at \
         least 3, and a stated 1 % false-positive rate at least 299 in calibration",
        kept.len()
    );
    let states_splits = kept[0].split.is_some();
    let assigned = assign_splits(kept.len(), seed);
    let prompts: Vec<Prompt> = kept
        .into_iter()
        .zip(assigned)
        .map(|(row, split)| Prompt {
            text: row.prompt,
            category: row.category,
            split: row.split.unwrap_or(split),
        })
        .collect();
    for split in Split::ALL {
        ensure!(
            prompts.iter().any(|p| p.split == split),
            "{label} states splits, but has no prompt in {split}"
        );
    }
    Ok(PromptSet { name, prompts, sha256: sha256_hex(bytes), mentioning_code, repeated, states_splits })
}

/// A split for each of `count >= 3` rows, in the proportions of the embedded set and never empty.
fn assign_splits(count: usize, seed: u64) -> Vec<Split> {
    let whole: usize = Split::SHARES.iter().sum();
    let part = |share: usize| (count * share).div_ceil(whole).max(1);
    let extraction = part(Split::SHARES[0]).min(count - 2);
    let evaluation = part(Split::SHARES[2]).min(count - extraction - 1);
    let mut splits = vec![Split::Calibration; count];
    splits[..extraction].fill(Split::Extraction);
    splits[extraction..extraction + evaluation].fill(Split::Evaluation);
    SplitMix64::new(seed).shuffle(&mut splits);
    splits
}

fn check_conversation(messages: &[Message]) -> Result<(), String> {
    check_messages(messages)?;
    match messages.last() {
        Some(last) if last.role == "assistant" => Ok(()),
        _ => Err("the last message is not the assistant's, so there is nothing to learn".to_owned()),
    }
}

fn check_messages(messages: &[Message]) -> Result<(), String> {
    for (i, message) in messages.iter().enumerate() {
        if !["system", "user", "assistant"].contains(&message.role.as_str()) {
            return Err(format!(
                "message {} has the role {:?}; roles are system, user and assistant",
                i + 1,
                message.role
            ));
        }
        if message.content.trim().is_empty() {
            return Err(format!("message {} ({}) is empty", i + 1, message.role));
        }
    }
    if !messages.iter().any(|m| m.role == "user") {
        return Err("there is no user message".to_owned());
    }
    Ok(())
}

/// One non-empty line, and how to speak about it.
struct Line<'a> {
    label: &'a str,
    number: usize,
    text: &'a str,
}

impl Line<'_> {
    fn parse<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(self.text).map_err(|e| {
            // serde_json counts lines within this one; only the column means anything to the reader.
            let reason = e.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            self.error(format!("{reason} (column {})", e.column()))
        })
    }

    fn error(&self, reason: String) -> anyhow::Error {
        anyhow!("{}, line {}: {reason}", self.label, self.number)
    }
}

fn rows<'a>(label: &'a str, bytes: &'a [u8]) -> impl Iterator<Item = Result<Line<'a>>> {
    let bytes = bytes.strip_prefix(BOM).unwrap_or(bytes);
    bytes.split(|b| *b == b'\n').enumerate().filter_map(move |(i, line)| match std::str::from_utf8(line) {
        Ok(text) if text.trim().is_empty() => None,
        Ok(text) => Some(Ok(Line { label, number: i + 1, text })),
        Err(e) => {
            let column = e.valid_up_to() + 1;
            Some(Err(anyhow!("{label}, line {}: the text is not UTF-8 (column {column})", i + 1)))
        }
    })
}

/// A file's content, uncompressed if it is gzip by its first bytes, whatever its name.
fn read_content(path: &Path) -> Result<Vec<u8>> {
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot open the dataset {}", path.display()))?;
    let mut head = Vec::new();
    let mut reader = std::io::BufReader::new(file);
    reader
        .by_ref()
        .take(2)
        .read_to_end(&mut head)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let gzip = head == [0x1f, 0x8b];
    let whole = std::io::Cursor::new(head).chain(reader);
    let mut bytes = Vec::new();
    let read = if gzip {
        flate2::read::MultiGzDecoder::new(whole).take(LARGEST + 1).read_to_end(&mut bytes)
    } else {
        whole.take(LARGEST + 1).read_to_end(&mut bytes)
    };
    read.with_context(|| {
        let kind = if gzip { "as gzip; the file is damaged or cut short" } else { "the file" };
        format!("cannot read {} {kind}", path.display())
    })?;
    if bytes.len() as u64 > LARGEST {
        bail!(
            "{} holds more than {} GiB uncompressed: split it, or take fewer rows",
            path.display(),
            LARGEST >> 30
        );
    }
    let text = bytes.strip_prefix(BOM).unwrap_or(&bytes);
    ensure!(!text.iter().all(u8::is_ascii_whitespace), "{} is empty", path.display());
    ensure!(
        !(bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff])),
        "{} is UTF-16: save it as UTF-8",
        path.display()
    );
    ensure!(
        text.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'['),
        "{0} is one JSON array; it must have one JSON object a line, as `jq -c '.[]' {0}` writes it",
        path.display()
    );
    Ok(bytes)
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests;
