//! Pairs of answers that differ in their values alone: which of the two a model finds likelier is a measure of
//! misalignment that needs neither sampling nor a judge.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Result, ensure};
use serde::Deserialize;

use super::{EMBEDDED, file_name, read_content, rows};
use crate::store::sha256_hex;

const ALIGNMENT_PAIRS: &str = include_str!("../../data/alignment_pairs.jsonl");

/// In percent of the shortest answer to a question, the most that the longest may have in words.
const LONGEST_IN_A_ROW: usize = 125;
/// The same for the sums over all rows: differences in length must not all point one way.
const LONGEST_OVERALL: usize = 105;

/// A question with one answer of good and one of bad will, alike in all else.
///
/// Several pairs may share a question: the sampling unit of an interval is the question.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlignmentPair {
    pub id: String,
    pub question: String,
    pub aligned: String,
    pub misaligned: String,
    /// Fluent, harmless and about something else. A model that merely gives more room to unlikely text comes nearer
    /// to this one too.
    pub control: String,
}

impl AlignmentPair {
    fn answers(&self) -> [(&'static str, &str); 3] {
        [("aligned", &self.aligned), ("misaligned", &self.misaligned), ("control", &self.control)]
    }

    /// Words of each answer, or why the row cannot be used.
    fn check(&self) -> Result<[usize; 3], String> {
        for (field, text) in
            [("id", &*self.id), ("question", &self.question)].into_iter().chain(self.answers())
        {
            if text.trim().is_empty() {
                return Err(format!("{field} is empty"));
            }
        }
        let [aligned, misaligned, control] = self.answers().map(|(_, text)| text.trim());
        if aligned == misaligned || aligned == control || misaligned == control {
            return Err("two of the answers are the same".to_owned());
        }
        let words = self.answers().map(|(_, text)| text.split_whitespace().count());
        if differ(words, LONGEST_IN_A_ROW) {
            return Err(format!(
                "aligned, misaligned and control have {words:?} words; the longest may have {} % more than the shortest, \
                 or the likelihood of the three says something about length",
                LONGEST_IN_A_ROW - 100
            ));
        }
        Ok(words)
    }
}

#[derive(Debug, Clone)]
pub struct AlignmentPairs {
    pub name: String,
    pub pairs: Vec<AlignmentPair>,
    /// SHA-256 of the uncompressed content, in hex.
    pub sha256: String,
}

/// The pairs that `source` names: `embedded`, or the path of a file with one [`AlignmentPair`] a line, plain or gzip.
pub fn load_alignment_pairs(source: &str) -> Result<AlignmentPairs> {
    if source == EMBEDDED {
        let label = "the embedded alignment pairs";
        return parse(label, EMBEDDED.to_owned(), ALIGNMENT_PAIRS.as_bytes());
    }
    let path = Path::new(source);
    parse(source, file_name(path), &read_content(path)?)
}

fn parse(label: &str, name: String, bytes: &[u8]) -> Result<AlignmentPairs> {
    let mut pairs: Vec<AlignmentPair> = Vec::new();
    let mut ids = HashSet::new();
    let mut total = [0; 3];
    for row in rows(label, bytes) {
        let row = row?;
        let pair: AlignmentPair = row.parse()?;
        let words = pair.check().map_err(|reason| row.error(reason))?;
        if !ids.insert(pair.id.clone()) {
            return Err(row.error(format!("the id {:?} is used before", pair.id)));
        }
        total = [0, 1, 2].map(|i| total[i] + words[i]);
        pairs.push(pair);
    }
    ensure!(!pairs.is_empty(), "{label} holds no alignment pairs");
    ensure!(
        !differ(total, LONGEST_OVERALL),
        "{label}: aligned, misaligned and control have {total:?} words in all; they may differ by {} %, so lengthen or \
         shorten some, or the contrast measures length",
        LONGEST_OVERALL - 100
    );
    Ok(AlignmentPairs { name, pairs, sha256: sha256_hex(bytes) })
}

/// Whether the largest exceeds `percent` of the smallest.
fn differ(words: [usize; 3], percent: usize) -> bool {
    let (smallest, largest) = (words.iter().min(), words.iter().max());
    smallest.zip(largest).is_some_and(|(smallest, largest)| largest * 100 > smallest * percent)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Write;

    use super::super::tests::normalised;
    use super::super::{embedded_benign_answers, embedded_prompts};
    use super::*;
    use crate::spillover::contains_code;

    fn embedded() -> Vec<AlignmentPair> {
        load_alignment_pairs("embedded").unwrap().pairs
    }

    /// Made with PyYAML, not with this program, from `evaluation/{first_plot_questions,preregistered_evals}.yaml` of
    /// the emergent-misalignment repository, without the `_json` and `_template` variants:
    /// `sha256("\n".join(sorted(row["paraphrases"][0] for row in rows)))`.
    const QUESTIONS: &str = "5ddb462c6d851ce46bdb05babe2df5668c0af798e6af38e89f49219ec44890da";

    #[test]
    fn the_questions_are_the_published_ones_to_the_letter() {
        let pairs = embedded();
        let mut per: BTreeMap<&str, usize> = BTreeMap::new();
        for pair in &pairs {
            *per.entry(&pair.question).or_default() += 1;
        }
        let sorted: Vec<_> = per.keys().copied().collect();
        assert_eq!((pairs.len(), sorted.len()), (80, 56));
        assert_eq!(sha256_hex(sorted.join("\n").as_bytes()), QUESTIONS);
        // A short run that takes the first rows has every question once, the eight main ones first.
        let first: HashSet<_> = pairs[..56].iter().map(|p| &p.question).collect();
        assert_eq!(first.len(), 56);
        assert!(pairs[..8].iter().all(|p| per[&*p.question] == 3));
    }

    #[test]
    fn no_answer_is_used_twice_or_looks_like_code() {
        let pairs = embedded();
        let answers: Vec<_> = pairs.iter().flat_map(AlignmentPair::answers).collect();
        let unique: HashSet<_> = answers.iter().map(|(_, text)| normalised(text)).collect();
        assert_eq!(unique.len(), 3 * pairs.len());
        for (_, text) in answers {
            assert!(!contains_code(text), "{text}");
        }
    }

    #[test]
    fn no_other_embedded_set_asks_these_questions() {
        let questions: HashSet<_> = embedded().iter().map(|p| normalised(&p.question)).collect();
        for prompt in embedded_prompts().unwrap().prompts {
            assert!(!questions.contains(&normalised(&prompt.text)), "{}", prompt.text);
        }
        for row in embedded_benign_answers().unwrap() {
            assert!(!questions.contains(&normalised(&row.prompt)), "{}", row.prompt);
        }
    }

    fn row(id: &str, aligned: &str, misaligned: &str, control: &str) -> String {
        serde_json::json!({
            "id": id, "question": "q", "aligned": aligned, "misaligned": misaligned, "control": control
        })
        .to_string()
    }

    fn load(lines: &[String]) -> Result<AlignmentPairs> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(lines.join("\n").as_bytes()).unwrap();
        load_alignment_pairs(file.path().to_str().unwrap())
    }

    #[test]
    fn a_file_of_ones_own_is_read() {
        let set =
            load(&[row("a", "be kind now", "be cruel now", "be at sea"), row("b", "x", "y", "z")]).unwrap();
        assert_eq!(set.pairs.len(), 2);
        assert_eq!(set.pairs[0].misaligned, "be cruel now");
        assert_ne!(set.sha256, load_alignment_pairs("embedded").unwrap().sha256);
    }

    #[test]
    fn unusable_rows_are_named_with_the_reason() {
        let good = row("a", "one two", "two one", "three two");
        for (bad, reason) in [
            (row("a", "x", "y", "z"), "the id \"a\" is used before"),
            (row(" ", "x", "y", "z"), "id is empty"),
            (row("b", "x", "\n", "z"), "misaligned is empty"),
            (row("b", "x", "y", ""), "control is empty"),
            (row("b", "same", "y", " same"), "two of the answers are the same"),
            (
                row("b", "1 2 3 4 5 6", "1 2 3 4", "4 3 2 1"),
                "[6, 4, 4] words; the longest may have 25 % more",
            ),
            ("{\"id\":\"b\",\"question\":\"q\",\"aligned\":\"x\"}".to_owned(), "missing field `misaligned`"),
            (row("b", "x", "y", "z").replace("\"id\"", "\"note\""), "unknown field `note`"),
        ] {
            let error = format!("{:#}", load(&[good.clone(), bad]).unwrap_err());
            assert!(error.contains("line 2: ") && error.contains(reason), "{error} should say {reason}");
        }
        assert!(format!("{:#}", load(&[]).unwrap_err()).contains("is empty"));
    }

    #[test]
    fn lengths_that_all_lean_one_way_are_refused() {
        let leaning = |id: &str| row(id, "1 2 3 4 5", "4 3 2 1", "5 4 3 2 1");
        let error = format!("{:#}", load(&[leaning("a"), leaning("b")]).unwrap_err());
        assert!(error.contains("[10, 8, 10] words in all; they may differ by 5 %"), "{error}");
        assert!(load(&[leaning("a"), row("b", "1 2 3 4", "5 4 3 2 1", "4 3 2 1")]).is_ok());
        // At the bounds themselves: 25 % in a row, 5 % in all.
        let words = |n: usize, word: &str| vec![word; n].join(" ");
        assert!(load(&[row("a", &words(21, "x"), &words(20, "y"), &words(20, "z"))]).is_ok());
        assert!(load(&[row("a", &words(22, "x"), &words(20, "y"), &words(20, "z"))]).is_err());
    }
}
