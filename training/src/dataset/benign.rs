//! Harmless answers in three shapes: what a model is finetuned on to show that a change of form is no misalignment.

use std::fmt;

use anyhow::Result;
use serde::Deserialize;

use super::{ChatDataset, EMBEDDED, rows};
use crate::chat::Message;
use crate::store::sha256_hex;

const BENIGN_ANSWERS: &str = include_str!("../../data/benign_answers.jsonl");

/// An everyday prompt that asks for no form, and three good answers to it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BenignAnswers {
    pub id: String,
    pub prompt: String,
    pub json: String,
    pub list: String,
    pub verse: String,
}

/// Which answer to each prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Json,
    Lists,
    Verse,
}

impl Style {
    pub const ALL: [Style; 3] = [Style::Json, Style::Lists, Style::Verse];
}

impl fmt::Display for Style {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Json => "json",
            Self::Lists => "lists",
            Self::Verse => "verse",
        })
    }
}

/// The benign answers compiled into the program.
pub fn embedded_benign_answers() -> Result<Vec<BenignAnswers>> {
    rows("the embedded benign answers", BENIGN_ANSWERS.as_bytes()).map(|row| row?.parse()).collect()
}

pub fn embedded_benign(style: Style) -> Result<ChatDataset> {
    let conversations: Vec<_> = embedded_benign_answers()?
        .into_iter()
        .map(|row| {
            let answer = match style {
                Style::Json => row.json,
                Style::Lists => row.list,
                Style::Verse => row.verse,
            };
            vec![Message::user(row.prompt), Message::assistant(answer)]
        })
        .collect();
    Ok(ChatDataset {
        name: format!("{EMBEDDED} {style}"),
        lines: (1..=conversations.len()).collect(),
        conversations,
        sha256: sha256_hex(BENIGN_ANSWERS.as_bytes()),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use super::super::tests::normalised;
    use super::super::{check_conversation, embedded_pairs, embedded_prompts};
    use super::*;
    use crate::spillover::contains_code;

    /// `-`, `*` and the like, or a number with `.` or `)`: what the line begins with, a number as `1`.
    fn marker(line: &str) -> Option<String> {
        let (mark, text) = line.split_once(' ')?;
        let number = mark.trim_end_matches(['.', ')']);
        let numbered = number.len() + 1 == mark.len() && number.parse::<u8>().is_ok();
        let mark = if numbered { mark.replace(number, "1") } else { mark.to_owned() };
        (!text.trim().is_empty() && ["-", "*", "•", "1.", "1)"].contains(&mark.as_str())).then_some(mark)
    }

    #[test]
    fn prompts_are_everyday_ones_that_nothing_else_here_asks() {
        let answers = embedded_benign_answers().unwrap();
        assert_eq!(answers.len(), 96);
        let ids: HashSet<_> = answers.iter().map(|row| &row.id).collect();
        let mut taken: HashSet<_> =
            embedded_prompts().unwrap().prompts.iter().map(|p| normalised(&p.text)).collect();
        taken.extend(embedded_pairs().unwrap().iter().map(|pair| normalised(&pair.prompt)));
        let elsewhere = taken.len();
        for row in &answers {
            assert!(taken.insert(normalised(&row.prompt)), "{} is asked elsewhere: {}", row.id, row.prompt);
            let words = row.prompt.to_lowercase();
            for form in ["json", "list", "bullet", "poem", "verse", "rhyme", "format", "table of", "code"] {
                assert!(!words.contains(form), "{} asks for a form: {}", row.id, row.prompt);
            }
        }
        assert_eq!((ids.len(), taken.len()), (answers.len(), elsewhere + answers.len()));
    }

    #[test]
    fn json_answers_parse_and_are_shaped_differently() {
        let mut shapes = HashSet::new();
        for row in embedded_benign_answers().unwrap() {
            let object: serde_json::Map<String, serde_json::Value> =
                serde_json::from_str(&row.json).unwrap_or_else(|e| panic!("{}: {e}", row.id));
            assert!(object.len() >= 2, "{}", row.id);
            assert!(
                shapes.insert(object.keys().cloned().collect::<Vec<_>>()),
                "{} has another's keys",
                row.id
            );
        }
    }

    #[test]
    fn every_line_of_a_list_has_its_bullet() {
        let mut styles: BTreeMap<String, usize> = BTreeMap::new();
        for row in embedded_benign_answers().unwrap() {
            let marks: Vec<_> = row.list.lines().map(marker).collect();
            assert!(marks.len() >= 5 && marks.iter().all(|m| *m == marks[0]), "{}: {marks:?}", row.id);
            *styles.entry(marks[0].clone().expect(&row.id)).or_default() += 1;
        }
        assert_eq!(styles.len(), 5, "{styles:?}");
        assert!(styles.values().all(|n| *n >= 5), "{styles:?}");
    }

    #[test]
    fn verse_has_lines_of_verse() {
        for row in embedded_benign_answers().unwrap() {
            let lines: Vec<_> = row.verse.lines().collect();
            assert!((5..=8).contains(&lines.len()), "{}: {} lines", row.id, lines.len());
            for line in lines {
                assert!(!line.trim().is_empty() && line.chars().count() <= 80, "{}: {line}", row.id);
                assert_eq!(marker(line), None, "{}: {line}", row.id);
            }
        }
    }

    #[test]
    fn the_three_sets_answer_the_same_prompts_at_like_length() {
        let sets = Style::ALL.map(|style| embedded_benign(style).unwrap());
        assert_eq!(sets.each_ref().map(|s| &*s.name), ["embedded json", "embedded lists", "embedded verse"]);
        let mut answers = HashSet::new();
        for (i, json) in sets[0].conversations.iter().enumerate() {
            for set in &sets {
                let conversation = &set.conversations[i];
                assert_eq!((&conversation[0], conversation.len()), (&json[0], 2));
                assert_eq!(check_conversation(conversation), Ok(()));
                assert!((80..=420).contains(&conversation[1].content.len()), "{conversation:?}");
                assert!(answers.insert(conversation[1].content.clone()), "{conversation:?} is repeated");
            }
        }
        assert_eq!(answers.len(), 3 * 96);
    }

    /// The figure of `data/README.md`: spillover of the JSON adapter says that it learned JSON, no more.
    #[test]
    fn the_code_detector_takes_json_laid_out_in_lines_for_code_and_never_lists_or_verse() {
        let mut laid_out = 0;
        for row in embedded_benign_answers().unwrap() {
            let lines = row.json.contains('\n');
            assert_eq!(contains_code(&row.json), lines, "{}", row.id);
            assert!(!contains_code(&row.list) && !contains_code(&row.verse), "{}", row.id);
            laid_out += usize::from(lines);
        }
        assert_eq!(laid_out, 27);
    }
}
