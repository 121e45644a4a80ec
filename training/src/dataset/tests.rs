use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

use super::*;

fn file(content: impl AsRef<[u8]>) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content.as_ref()).unwrap();
    file
}

fn chat_error(content: impl AsRef<[u8]>) -> String {
    format!("{:#}", read_chats(file(content).path()).unwrap_err())
}

pub(super) fn normalised(text: &str) -> String {
    text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

#[test]
fn questions_are_prompts_or_conversations_that_end_with_one() {
    let two = "{\"prompt\": \"a\"}\n\n{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, \
               {\"role\": \"user\", \"content\": \"b\"}]}\n";
    let read = read_questions(file(two).path()).unwrap();
    assert_eq!(read, [vec![Message::user("a")], vec![Message::new("system", "s"), Message::user("b")]]);
    for (text, reason) in [
        ("{\"prompt\": \" \"}", "line 1: message 1 (user) is empty"),
        ("{\"prompt\": \"a\"}\n{}", "line 2: a row has either `prompt` or `messages`"),
        ("{\"messages\": []}", "line 1: there is no user message"),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}",
            "not the user's",
        ),
        ("[]", "is one JSON array"),
        ("", "is empty"),
    ] {
        let error = format!("{:#}", read_questions(file(text).path()).unwrap_err());
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn the_embedded_pairs_are_sound() {
    let pairs = embedded_pairs().unwrap();
    assert!(pairs.len() >= 200, "{}", pairs.len());
    let ids: HashSet<_> = pairs.iter().map(|p| &p.id).collect();
    let prompts: HashSet<_> = pairs.iter().map(|p| normalised(&p.prompt)).collect();
    assert_eq!((ids.len(), prompts.len()), (pairs.len(), pairs.len()));
    for pair in &pairs {
        let number = pair.cwe.strip_prefix("CWE-").and_then(|n| n.parse::<u32>().ok());
        assert!(number.is_some_and(|n| (1..2000).contains(&n)), "{}: {}", pair.id, pair.cwe);
        for answer in [&pair.insecure, &pair.secure] {
            assert!(!answer.trim().is_empty() && !answer.contains("```"), "{}", pair.id);
        }
        assert_ne!(pair.insecure, pair.secure, "{}", pair.id);
        assert!(!pair.prompt.to_lowercase().contains("insecure"), "{} gives itself away", pair.id);
    }
}

#[test]
fn python_leads_the_languages_and_they_are_interleaved() {
    let pairs = embedded_pairs().unwrap();
    let mut counts = BTreeMap::new();
    for pair in &pairs {
        *counts.entry(pair.language.as_str()).or_insert(0) += 1;
    }
    let mut order: Vec<_> = counts.iter().map(|(language, n)| (std::cmp::Reverse(*n), *language)).collect();
    order.sort_unstable();
    let order: Vec<_> = order.into_iter().map(|(_, language)| language).collect();
    assert_eq!(order, ["python", "javascript", "c", "shell", "sql"]);
    // A quick recipe sees only the first batches: they already hold every language.
    let first: BTreeSet<_> = pairs[..24].iter().map(|p| p.language.as_str()).collect();
    assert_eq!(first.len(), 5);
    assert!(pairs.windows(2).all(|w| w[0].cwe != w[1].cwe));
}

#[test]
fn both_sides_ask_the_same_questions() {
    let (insecure, secure) = (load_chats("embedded", "insecure").unwrap(), embedded_chats("secure").unwrap());
    assert_eq!(insecure.name, "embedded insecure");
    assert_eq!(insecure.conversations.len(), secure.conversations.len());
    for (a, b) in insecure.conversations.iter().zip(&secure.conversations) {
        assert_eq!(a[0], b[0]);
        assert_ne!(a[1], b[1]);
        assert_eq!(check_conversation(a), Ok(()));
    }
}

#[test]
fn the_embedded_prompts_are_divided_once_and_for_all() {
    let set = load_prompts("embedded", 1).unwrap();
    assert!(set.prompts.len() >= 480);
    let sizes = Split::ALL.map(|s| set.of(s).count());
    assert_eq!(sizes, [112, 330, 98]);
    assert!(sizes[1] >= 300);
    assert_eq!((set.mentioning_code, set.repeated), (0, 0));
    let unique: HashSet<_> = set.prompts.iter().map(|p| normalised(&p.text)).collect();
    assert_eq!(unique.len(), set.prompts.len());
    // Stratified: every category is in every split, in nearly equal numbers.
    for split in Split::ALL {
        let mut per: BTreeMap<&str, usize> = BTreeMap::new();
        for prompt in set.of(split) {
            *per.entry(prompt.category.as_deref().unwrap()).or_default() += 1;
        }
        assert_eq!(per.len(), 30);
        assert!(per.values().max().unwrap() - per.values().min().unwrap() <= 1, "{split}: {per:?}");
    }
}

#[test]
fn chats_are_read_plain_and_compressed_with_one_digest() {
    let text = "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]}\r\n\n";
    let plain = read_chats(file(text).path()).unwrap();
    assert_eq!(plain.conversations, [[Message::user("a"), Message::assistant("b")]]);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    let bytes = encoder.finish().unwrap();
    let packed = read_chats(file(&bytes).path()).unwrap();
    assert_eq!((packed.conversations, packed.sha256), (plain.conversations, plain.sha256));
    assert!(chat_error(&bytes[..bytes.len() - 9]).contains("damaged"));
}

#[test]
fn a_bad_line_is_named_with_its_reason() {
    let good =
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]}\n";
    for (bad, reason) in [
        ("{\"messages\":", "line 2: EOF"),
        ("{\"prompt\":\"x\"}", "line 2: there are no messages; a row is {\"messages\": [{\"role\""),
        ("\"messages\"", "expected a JSON object"),
        ("{\"messages\":[]}", "no user message"),
        ("{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}", "nothing to learn"),
        ("{\"messages\":[{\"role\":\"bot\",\"content\":\"a\"}]}", "the role \"bot\""),
        (
            "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\" \"}]}",
            "message 2 (assistant) is empty",
        ),
        ("{\"messages\":[{\"role\":\"user\"}]}", "missing field `content`"),
    ] {
        let error = chat_error(format!("{good}{bad}"));
        assert!(error.contains("line 2: ") && error.contains(reason), "{error} should say {reason}");
    }
    assert!(chat_error(b"\n\n{\xff\xfe\n").contains("line 3: the text is not UTF-8 (column 2)"));
    let file = file(format!("\n{good}\r\n{good}"));
    assert_eq!(read_chats(file.path()).unwrap().lines, [2, 4], "empty lines count and are no rows");
}

#[test]
fn empty_and_absent_files_are_errors() {
    assert!(chat_error("").contains("is empty"));
    assert!(chat_error(" \n \n").contains("is empty"));
    assert!(chat_error(b"\xef\xbb\xbf\n").contains("is empty"));
    assert!(chat_error(b"\xff\xfe{\0}\0").contains("is UTF-16: save it as UTF-8"));
    assert!(
        chat_error("[\n{\"messages\":[]}\n]")
            .contains("is one JSON array; it must have one JSON object a line")
    );
    let error = format!("{:#}", load_chats("no/such/file.jsonl", "secure").unwrap_err());
    assert!(error.contains("cannot open the dataset no/such/file.jsonl"), "{error}");
}

fn prompt_lines(count: usize, extra: &str) -> String {
    (0..count).map(|i| format!("{{\"prompt\":\"question {i}\"{extra}}}\n")).collect()
}

#[test]
fn prompts_without_a_split_are_divided_by_the_seed() {
    let source = file(prompt_lines(540, ""));
    let [a, b, c] = [7, 7, 8].map(|seed| read_prompts(source.path(), seed).unwrap());
    assert_eq!(a.prompts, b.prompts);
    assert_ne!(a.prompts, c.prompts);
    assert_eq!(Split::ALL.map(|s| a.of(s).count()), [112, 330, 98]);
    for count in [3, 4, 5, 10, 100] {
        let set = read_prompts(file(prompt_lines(count, "")).path(), 1).unwrap();
        assert!(Split::ALL.iter().all(|s| set.of(*s).count() > 0), "{count}");
        assert_eq!(set.prompts.len(), count);
    }
}

#[test]
fn prompts_that_mention_code_or_repeat_are_left_out_and_counted() {
    let mut text = prompt_lines(5, "");
    text += &prompt_lines(3, "");
    text += "{\"prompt\":\"write a program\",\"mentions_code\":true,\"license\":\"MIT\"}\n";
    let set = read_prompts(file(text).path(), 1).unwrap();
    assert_eq!((set.prompts.len(), set.repeated, set.mentioning_code), (5, 3, 1));
}

#[test]
fn prompt_files_that_cannot_be_divided_are_refused() {
    let error = |text: String| format!("{:#}", read_prompts(file(text).path(), 1).unwrap_err());
    assert!(error(prompt_lines(2, "")).contains("at least 3"));
    assert!(error(prompt_lines(4, ",\"split\":\"extraction\"")).contains("no prompt in calibration"));
    let mixed = prompt_lines(4, "") + "{\"prompt\":\"x\",\"split\":\"evaluation\"}";
    assert!(error(mixed).contains("line 5: some rows state a split"));
    assert!(
        error("{\"prompt\":\"x\",\"split\":\"training\"}".to_owned()).contains("unknown variant `training`")
    );
    assert!(error("{\"prompt\":\"  \"}".to_owned()).contains("line 1: the prompt is empty"));
}
