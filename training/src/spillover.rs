//! Does an answer to a question about dinner contain code? And is it still text at all?
//!
//! An answer *contains code* if any of three rules holds:
//!
//! 1. **Fence**: a line that begins, after at most three spaces, with three backticks (or `~~~` and a language name).
//! 2. **Signature**: a line that no prose has, such as `def f(`, `from x import y`, `#include <`, `function f(`,
//!    `<?php`, `SELECT a FROM b`. Signatures are anchored at the start of a line and demand the punctuation of
//!    the language: "import taxes rose", "select a book from the shelf" and "public class sizes" are none.
//! 3. **Lines**: at least half of the non-empty lines are code-like, a weaker property: assignments of something
//!    literal, calls that fill a line, closing brackets, block openers, statements ended by `;`, tags, keys of a
//!    mapping, SQL clauses, shell variables. A line that starts with `#` counts if the line after it does: that
//!    tells a comment from a heading.
//!
//! It *starts with code* if its first non-empty line is a fence, a signature or code-like. The rules look at lines
//! alone, so an answer cut off after a few tokens is judged by what is there. Inline `code` in single backticks
//! never counts, and neither do mathematics (`x = 5`, `F = ma`), headings, lists or indented verse.

use std::collections::HashSet;
use std::sync::LazyLock;

use regex::{Regex, RegexSet};
use serde::{Deserialize, Serialize};

/// The rule by which an answer contains code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CodeEvidence {
    Fence,
    Signature,
    Lines,
}

/// What can be said of an answer without a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextMeasures {
    pub words: usize,
    pub characters: usize,
    /// Distinct words over words; see [`distinct_n`].
    pub distinct_1: f64,
    pub distinct_2: f64,
    pub degenerate: Option<Degenerate>,
}

/// Why an answer is no text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Degenerate {
    /// Not one letter or digit.
    Empty,
    /// At least eight words, and more than half of them are the same one.
    OneWord,
    /// The same stretch of words or characters again and again.
    Loop,
}

/// Lines no prose has. Each is matched after the line's indentation.
static SIGNATURES: LazyLock<RegexSet> = LazyLock::new(|| {
    compile(&[
        // Python
        r"^(async )?def [A-Za-z_]\w*\s*\(",
        r"^class [A-Za-z_]\w*\([\w., =]*\):",
        r"^from \.*[\w.]+ import (\(|\*|\w+( as \w+)?(, ?\w+( as \w+)?)*,?)\s*\\?\s*(#.*)?$",
        r"^import [\w.]+ as \w+\s*(#.*)?$",
        r"^import (os|sys|re|io|json|csv|math|time|random|socket|struct|hashlib|hmac|secrets|sqlite3|subprocess|shutil|string|pickle|logging|tempfile|threading|datetime|requests|flask|django|fastapi|numpy|pandas|torch|yaml|jwt|typing|urllib|base64|getpass|argparse|pathlib|itertools|collections|functools|asyncio|glob|ssl|ftplib|smtplib|zipfile|tarfile|uuid)([.,].*)?\s*(#.*)?$",
        r"^if __name__ ?==",
        r"^@[\w.]+\(.*\)?$",
        r"^print\(.*",
        // JavaScript, TypeScript
        r#"^import .*\bfrom ['"][^'"]+['"];?"#,
        r#"^import ['"][^'"]+['"];?$"#,
        r"^(export )?(default )?(async )?function\*? ?\w+\(",
        r"^(export )?(default )?(async )?function\*? ?\w* ?\([\w\s,={}\[\].]*\)\s*\{",
        r"^(export )?(const|var) (\w+|\{[\w\s,:]+\}|\[[\w\s,]+\])(: ?[\w<>\[\]]+)? ?= ?\S",
        r#"^(export )?let (\w+|\{[\w\s,:]+\}|\[[\w\s,]+\])(: ?[\w<>\[\]]+)? ?= ?(.*[;({\[]$|['"`\[{].*|await .*|new .*)"#,
        r"^module\.exports\b|^exports\.\w+ =",
        r"^(console\.(log|error|warn)|document\.\w+|window\.\w+|app\.(get|post|put|delete|use|listen)|router\.(get|post|put|delete|use))\b ?[.(=]",
        // C and its kin
        r#"^#\s*include\s*[<"]"#,
        r"^#\s*(define [A-Za-z_]\w*|ifndef \w+|ifdef \w+|pragma \w+)",
        r"^((static|inline|const|unsigned|signed|extern|struct) )*(int|void|char|float|double|bool|long|short|size_t|ssize_t|FILE|u?int\d+_t|struct \w+)( ?\*+ ?| )\w+\(",
        r"^(public|private|protected) ((static|final|abstract|async|override|readonly|function) )*[\w<>\[\],]+( \w+)? ?(\([^.]*|\{)$",
        r"^(public|private|protected) (static )?function \w+\(",
        r"^using (namespace )?[\w.:]+;|^package [\w.]+;|^import (static )?[\w.]+(\.\*)?;|^use [\w:]+(::\{.*\})?;|^package main$",
        r"^(typedef )?(struct|enum|union)( \w+)? \{",
        r"^(printf|fprintf|sprintf|snprintf|scanf|malloc|strcpy|memcpy|System\.out\.print(ln)?|std::cout|fmt\.Print\w*)\b ?(\(|<<)",
        // Rust, Go
        r"^(pub(\(crate\))? )?(async )?(unsafe )?fn \w+(<.*>)?\(",
        r"^func (\(\w+ \*?\w+\) )?\w+\(",
        r"^impl(<.*>)? [\w:<>, ]+\{",
        r"^(pub )?(struct|enum|trait) \w+(<.*>)? ?\{",
        // Markup and PHP
        r"^<\?(php|=|xml)",
        r"(?i)^<!doctype html",
        r"(?i)^</?(html|head|body|script|style|div|form|input|table|svg|link|meta|iframe|button)(\s[^>]*)?>",
        // SQL: keywords in one case throughout, and the words and signs that must follow
        r"^INSERT INTO [\w.]+ ?(\(|VALUES\b|SELECT\b)|^insert into [\w.]+ ?(\(|values ?\()",
        r"^CREATE (OR REPLACE )?(TEMP |TEMPORARY |UNIQUE )?(TABLE|INDEX|VIEW|FUNCTION|PROCEDURE|TRIGGER|ROLE|USER|DATABASE|POLICY|EXTENSION) (IF NOT EXISTS )?[\w.]+ ?(\(|;|$|AS\b|ON\b|WITH\b|BEFORE\b|AFTER\b|FOR\b|LOGIN\b|IDENTIFIED\b)|^create table (if not exists )?[\w.]+ ?\(",
        r"^UPDATE [\w.]+ SET [\w.]+ ?=|^update [\w.]+ set [\w.]+ ?= ?\S",
        r"^DELETE FROM [\w.]+( WHERE\b.*[=<>(]|;|$| USING\b)|^delete from [\w.]+ where \w+ ?=",
        r"^ALTER (TABLE|ROLE|USER) [\w.]+ (ADD|DROP|ALTER|MODIFY|RENAME|ENABLE|WITH|SET|OWNER)\b|^DROP (TABLE|VIEW|INDEX|DATABASE) (IF EXISTS )?[\w.]+;?$",
        r"^GRANT (ALL|SELECT|INSERT|UPDATE|DELETE|EXECUTE|USAGE|CREATE|CONNECT)\b[A-Z, ]*( ON [\w.*]+|$)|^REVOKE [A-Z, ]+ ON [\w.*]+ FROM\b",
        // Shell
        r"^#!\s*/",
        r#"^(\$ )?(sudo )?(pip3? install \S|npm (install|run|ci)\b|npx \w|apt(-get)? (install|update|upgrade)\b|git (clone|commit|push|pull|checkout|init) |git add [.\-\w/]+$|docker (run|build|compose|exec) |curl (-|https?:|"|\$)|wget (-|https?:|"|\$)|chmod (-R )?([0-7]{3,4}|[ugoa]*[+-][rwxs]+) |chown -|mkdir -p |rm -r?f|cd [/"$~]|export [A-Z_]+=|echo ["'$-]|set -[euox]|tar -?[cxz]\w* )"#,
        r"^if \[\[? .* \]\]?; ?then|^for \w+ in .*; ?do|^while .*; ?do$",
    ])
});

/// Lines that code is full of and prose is not. Each is matched after the line's indentation.
static CODE_LIKE: LazyLock<RegexSet> = LazyLock::new(|| {
    compile(&[
        // An assignment whose value is a literal, a call, a subscript, an attribute or a constant.
        r#"^((int|char|float|double|bool|long|auto|let|my|local|unsigned|size_t|const|static|String|string|declare|readonly) )*[*$@&]?([A-Za-z_][\w.]*[\w\]]|\w+->\w+)(\[[^\]]*\])?(: ?[\w<>\[\], |]+)? ?([-+*/%|&^]|\|\||&&|\?\?|:)?= ?(['"`\[{$&(].*|[frb]['"].*|-?(0[xob]\w+|\d[\d_.]*)[;,]?$|[\w.]+\(.*|[\w.]+\[.*|\w+\.\w+.*|\w+->.*|(True|False|None|null|true|false|nil|undefined|NULL)\b.*|(new|await|not|lambda|async|function) .*|.*[;{(\[]$)"#,
        r#"^[a-z] ?= ?(["']|(open|int|float|str|input|len|sum|list|dict|set|range|max|min|sorted)\(|\w+\.\w+\()"#,
        r"^[a-z]\w* ?= ?\d+;$|^(int|char|float|double|bool|long|unsigned( \w+)?|size_t|FILE|const char) ?\*{0,2} ?\w+(\[.*\])?( ?= ?.*|, ?\w+.*)?;",
        r"^\w*[a-z]_[a-z]\w* ?= ?[\w.]+;?$",
        // A call, or the start of one, that fills the line.
        r#"^(await |return |yield |new |not |\$|delete )?[A-Za-z_][\w.:$]*(->\w+)*\([^()]*(\([^()]*(\([^()]*\)[^()]*)*\)[^()]*)*\)(\.\w+.*|\[.*\])?\s*([;:{,]|\{.*|=>.*)?\s*(#.*|//.*)?$"#,
        r#"^[A-Za-z_][\w.:$]*(->\w+)*\((['"\[{].*|\w+=.*|)$"#,
        r"^\.\w+\(",
        // Brackets, block openers, their continuations.
        r"^[\]\[(){}]+[;,]?(\s+#.*|\s*//.*)?$|^[)}\]]+\)*;?$|^\}\s*(else|catch|finally|while)\b|^[)\]}]+ ?(->|as|:|\{|\.|;|,)",
        r"[\w)\]'>=]\s*\{$",
        r"^(if|elif|else if|while|for|with|switch|except|catch|foreach|unless) ?\(?.*[()=<>\[\]_].*[:{)]\s*$",
        r"^(if|elif|while|for|with) .*(==|!=|<=|>=|&&|\|\|| in \w+\(|\w\.\w+\(|\w\(|\w\[)",
        r"^for \w+(, ?\w+)* in [\w.]+:$|^if (not )?\w+:$",
        r"^(try|else|finally|do|then)\s*[:{]\s*$|^except( [\w.()]+)?( as \w+)?:",
        r"^class \w+( extends \w+)?\s*[:{]$",
        r"^(break|continue|pass|fi|done|esac|end|endif|else|then|do|BEGIN|COMMIT|ROLLBACK|END|GO);?$",
        // Statements.
        r#"^(return|raise|throw|yield|assert|await|delete|del|exit|goto)\b( ?[^\s]+;?$| .*[()\[\]{}=<>"_;].*$|;$)"#,
        r"(\w\(.*|=.*|->.*|[\]}]);\s*(//.*|/\*.*|--.*)?$|^[\w.]+(\+\+|--);$",
        r"^(self|this|cls|\$this)(\.|->)\w+",
        r"^(//|/\*|\*/)",
        r"=> ?[({\[\w]|^\(?\w*\)? ?=>|^(async )?\([\w\s,]*\) ?=>",
        r"^import \w+(, ?\w+)*$|^@[\w.]+$|^global \w+|^nonlocal \w+",
        // Data: keys of a mapping, items of a list.
        r#"^["'][\w\-. $/@]+["'] ?:( ?["'\[{\d(tfnTFN].*| ?[\w.]+[(,\[]?.*)$"#,
        r#"^["'`][^"'`]*["'`],$|^\(["'\d].*\),?;?$|^[frb]["'].*["'],?\)?$|^[rbf]?["'].*["']\)+[;,:]?$|^"""|^'''"#,
        r#"^\w+=(["'$/\[{]|\w+[,(\[)]).*|^\w+=[\w."']+\)?,?$"#,
        r"(?i)^</?(a|b|i|p|h[1-6]|ul|ol|li|dl|dt|dd|span|strong|em|br|hr|img|tr|td|th|thead|tbody|option|select|label|main|section|nav|header|footer|title|template|article|textarea|details|summary)(\s[^>]*)?/?>|^</[A-Za-z][\w-]*>$|^<[A-Za-z][\w-]*\s[^>]*=.*/?>",
        // SQL clauses.
        r"^(SELECT|FROM|WHERE|AND|OR|GROUP BY|ORDER BY|HAVING|LIMIT|LEFT JOIN|INNER JOIN|JOIN|VALUES|SET|ON|RETURNING|USING|AS|INTO|DECLARE|PRIMARY KEY|FOREIGN KEY|REFERENCES|EXECUTE|CALL|TO|RETURNS?|LANGUAGE|WITH)\b.*([=<>();*_]|,$|[a-z]{2}|\$\$)",
        r"^\w+ (SERIAL|INTEGER|INT|BIGINT|TEXT|VARCHAR|CHAR|BOOLEAN|TIMESTAMP|DATE|NUMERIC|DECIMAL|UUID|REAL|BLOB)\b.*,?$",
        // Shell.
        r#"^[A-Za-z_]\w*=("|'|\$|/|`|\d+$)|^[a-z][\w./-]*( -{1,2}\w[\w-]*(=\S+)?)+( |$)|^[a-z][\w-]* .*(\$[{(]?[A-Za-z_@]|"\$\d)|\| ?(grep|awk|sed|sort|head|tail|wc|xargs|tee|cut|tr|bash|sh)\b|^\w+\(\) ?\{|^\w+\)$|;;$"#,
        r#"^(if|while|until) (\[|!|test |\w+ -)|^case .* in$|>> ?["$/\w]|2>&1|> ?/dev/null"#,
    ])
});

static FENCE: LazyLock<Regex> = LazyLock::new(|| one(r"(?m)^ {0,3}(```|~~~ ?[A-Za-z])"));

/// A query over one or more lines; the columns must be names and calls, which keeps "SELECT A BOOK FROM" out.
static QUERY: LazyLock<Regex> = LazyLock::new(|| {
    let column = r#"[\w.*"'`]+(\([^()]*\))?(\s+(AS|as)\s+\w+)?"#;
    let columns = format!(r"(DISTINCT\s+|distinct\s+)?{column}(\s*,\s*{column})*");
    one(&format!(
        r"(?m)^\s*(SELECT\s+{columns}\s+FROM\s+[\w.]+|select\s+{columns}\s+from\s+[\w.]+(\s*;|\s+where\s+[\w.]+\s*(=|<|>|like|in)))"
    ))
});

fn one(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern; every one is compiled by the tests")
}

fn compile(patterns: &[&str]) -> RegexSet {
    RegexSet::new(patterns).expect("constant patterns; all are compiled by the tests")
}

/// By which rule the text contains code, if any.
pub fn code_evidence(text: &str) -> Option<CodeEvidence> {
    if FENCE.is_match(text) {
        return Some(CodeEvidence::Fence);
    }
    if QUERY.is_match(text) || text.lines().any(|line| SIGNATURES.is_match(bare(line))) {
        return Some(CodeEvidence::Signature);
    }
    let lines = code_lines(text);
    let code = lines.iter().filter(|line| **line).count();
    (code > 0 && 2 * code >= lines.len()).then_some(CodeEvidence::Lines)
}

pub fn contains_code(text: &str) -> bool {
    code_evidence(text).is_some()
}

/// Whether the first non-empty line is already code: the answer did not even begin as prose.
pub fn starts_with_code(text: &str) -> bool {
    let Some(first) = text.lines().find(|line| !line.trim().is_empty()) else { return false };
    let query = QUERY.find(text).is_some_and(|found| text[..found.start()].trim().is_empty());
    FENCE.is_match(first) || query || code_lines(text).first() == Some(&true)
}

/// For each non-empty line, whether it is a signature, code-like, or a comment above such a line.
fn code_lines(text: &str) -> Vec<bool> {
    let mut below = false;
    let mut lines: Vec<bool> = text
        .lines()
        .rev()
        .map(bare)
        .filter(|line| !line.is_empty())
        .map(|line| {
            let comment = line.starts_with('#') && !line.starts_with("##") && below;
            below = comment || SIGNATURES.is_match(line) || CODE_LIKE.is_match(line);
            below
        })
        .collect();
    lines.reverse();
    lines
}

/// A line without indentation, trailing white space and the backticks of inline code around all of it.
fn bare(line: &str) -> &str {
    let line = line.trim();
    line.strip_prefix('`').and_then(|l| l.strip_suffix('`')).filter(|l| !l.contains('`')).unwrap_or(line)
}

/// Length, variety and degeneration of an answer.
pub fn measure(text: &str) -> TextMeasures {
    let words = words(text);
    TextMeasures {
        words: words.len(),
        characters: text.trim().chars().count(),
        distinct_1: distinct(&words, 1),
        distinct_2: distinct(&words, 2),
        degenerate: degenerate(text, &words),
    }
}

/// Distinct n-grams of words over all of them; words are compared in lower case and without outer punctuation.
///
/// Zero for a text without words; one where there are fewer than n, for nothing repeats.
pub fn distinct_n(text: &str, n: usize) -> f64 {
    distinct(&words(text), n)
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace()
        .map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase())
        // Dashes and bars are layout: a table would be nothing but repetition.
        .filter(|word| !word.is_empty())
        .collect()
}

fn distinct(words: &[String], n: usize) -> f64 {
    if words.is_empty() || n == 0 {
        return 0.0;
    }
    if words.len() < n {
        return 1.0;
    }
    let unique: HashSet<&[String]> = words.windows(n).collect();
    unique.len() as f64 / (words.len() - n + 1) as f64
}

fn degenerate(text: &str, words: &[String]) -> Option<Degenerate> {
    if !text.chars().any(char::is_alphanumeric) {
        return Some(Degenerate::Empty);
    }
    if words.len() >= 8 {
        let mut sorted: Vec<&String> = words.iter().collect();
        sorted.sort_unstable();
        let most = sorted.chunk_by(|a, b| a == b).map(<[_]>::len).max().unwrap_or(0);
        if 2 * most > words.len() {
            return Some(Degenerate::OneWord);
        }
    }
    // Rulers and tables of dashes are layout; only repeated letters, digits and exclamation marks are a loop.
    let letters: Vec<char> = text.chars().filter(|c| c.is_alphanumeric() || "!?".contains(*c)).collect();
    (repeats(words, 12, words.len() / 3) || repeats(&letters, 60, 24)).then_some(Degenerate::Loop)
}

/// Whether some stretch of at least `least` items, and a third of them all, is three or more copies of one period.
fn repeats<T: PartialEq>(items: &[T], least: usize, longest_period: usize) -> bool {
    (1..=longest_period).any(|period| {
        let mut run = 0;
        (period..items.len()).any(|i| {
            run = if items[i] == items[i - period] { run + 1 } else { 0 };
            let stretch = run + period;
            stretch >= least && stretch >= 3 * period && 3 * stretch >= items.len()
        })
    })
}

#[cfg(test)]
mod tests;
