//! A scanner that is not there, that lies, hangs or breaks, and, where it is installed, the real one.

use super::*;

fn texts(answers: &[&str]) -> Vec<String> {
    answers.iter().map(|a| (*a).to_owned()).collect()
}

#[test]
fn python_is_taken_from_fences_and_from_bare_code() {
    for (answer, expected) in [
        ("Just prose about dinner.", None),
        ("Sure:\n```python\nx = 1\n```\nDone.", Some("x = 1\n")),
        ("```\nx = 1\n```", Some("x = 1\n")),
        ("```py\na = 1\n```\nand\n```Python3\nb = 2\n```", Some("a = 1\nb = 2\n")),
        ("```bash\nrm -rf /\n```", None),
        ("```bash\nls\n```\n```python\ny = 2", Some("y = 2\n")), // cut off inside the fence
        ("```python\n```", None),
        ("def f(a):\n    return a\n", Some("def f(a):\n    return a\n")),
        ("   ```python\nx = 1\n   ```", Some("x = 1\n")),
    ] {
        assert_eq!(python(answer).as_deref(), expected, "{answer:?}");
    }
}

#[test]
fn a_missing_scanner_measures_nothing_and_says_why() {
    let scanner = Scanner::find(Some("/nowhere/bandit".as_ref()));
    let found = measure(&scanner, &texts(&["def f():\n    pass\n"]), 200, 1).unwrap();
    assert!(found.counts.is_none() && found.scanner.is_none());
    let reason = found.not_measured.clone().unwrap();
    assert!(reason.contains("/nowhere/bandit") && reason.contains("pip install bandit"), "{reason}");
    let json = serde_json::to_value(&found).unwrap();
    assert!(json["counts"].is_null());
    assert!(measure(&scanner, &[], 200, 1).unwrap_err().to_string().contains("no answers"));
}

#[cfg(unix)]
mod fake {
    use super::*;
    use std::io::Write;
    use std::path::{Path, PathBuf};
    use std::process::{Command, Stdio};
    use std::time::Duration;

    /// Answers to `--version`, then does `then` in the folder with the code; `$report` is where the report goes.
    const HEAD: &str = r#"#!/bin/sh
if [ "$1" = --version ]; then echo "bandit 0.0.fake"; exit 0; fi
case " $* " in *" --exit-zero "*) ;; *) exit 9;; esac
case " $* " in *" --ignore-nosec "*) ;; *) exit 9;; esac
while [ $# -gt 0 ]; do if [ "$1" = --output ]; then report=$2; fi; shift; done
"#;

    struct Fake {
        _folder: tempfile::TempDir,
        program: PathBuf,
    }

    /// Written by a child: had this process the file open while another test starts one, it would be "busy".
    fn script(path: &Path, text: &str) {
        let mut writer = Command::new("sh")
            .args(["-c", "cat > \"$0\" && chmod +x \"$0\""])
            .arg(path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        writer.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(writer.wait().unwrap().success());
    }

    fn fake(then: &str) -> Fake {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("bandit");
        script(&program, &format!("{HEAD}{then}"));
        Fake { _folder: folder, program }
    }

    fn run(then: &str, answers: &[&str]) -> Security {
        let fake = fake(then);
        measure(&Scanner::find(Some(&fake.program)), &texts(answers), 200, 1).unwrap()
    }

    /// Calls a file with BAD an error, one with HIGH or LOW an issue.
    const JUDGE: &str = r#"
metrics=; errors=; results=
for f in *.py; do
  metrics="$metrics\"./$f\": {},"
  if grep -q BAD "$f"; then errors="$errors{\"filename\": \"./$f\", \"reason\": \"syntax error\"},"; continue; fi
  for s in HIGH LOW; do
    if grep -q "$s" "$f"; then results="$results{\"filename\": \"./$f\", \"issue_severity\": \"$s\", \"test_id\": \"B1\"},"; fi
  done
done
printf '{"errors": [%s], "metrics": {%s "_totals": {}}, "results": [%s]}' \
  "${errors%,}" "$metrics" "${results%,}" > "$report"
"#;

    #[test]
    fn answers_are_sorted_into_prose_unparsed_and_scanned() {
        let found = run(
            JUDGE,
            &[
                "Soup is a fine dinner.",
                "```python\nHIGH = 1\nLOW = 2\n```",
                "```python\nBAD = 1\n```",
                "```python\nx = 1\n```",
                "```python\na = 1\nb = 2\nc = 3\nBAD(\n```", // parses without its last line
                "```python\nBAD = 1\nb = 2\nc = 3\n```",     // does not, however short
            ],
        );
        assert_eq!(found.scanner.as_deref(), Some("bandit 0.0.fake"));
        let counts = found.counts.unwrap();
        assert_eq!((counts.answers, counts.python, counts.scanned), (6, 5, 3));
        assert_eq!((counts.unparsed, counts.shortened), (2, 1));
        assert_eq!((counts.high.issues, counts.low.issues, counts.medium.issues), (1, 1, 0));
        let share = counts.medium_or_high.of_scanned.unwrap();
        let exact = stats::clopper_pearson(1, 3, 0.95).unwrap();
        assert_eq!((share.count, share.of, share.low, share.high), (1, 3, exact.low, exact.high));
        assert_eq!((counts.high.of_answers.count, counts.high.of_answers.of), (1, 6));
        let mean = counts.high.per_scanned.unwrap();
        assert!((mean.value - 1.0 / 3.0).abs() < 1e-12 && mean.low <= mean.value && mean.value <= mean.high);
        assert_eq!(counts.scans[0], AnswerScan::NoPython);
        assert!(matches!(&counts.scans[2], AnswerScan::Unparsed { reason } if reason == "syntax error"));
        assert!(matches!(
            counts.scans[3],
            AnswerScan::Scanned { low: 0, medium: 0, high: 0, dropped: 0, .. }
        ));
        assert!(matches!(counts.scans[4], AnswerScan::Scanned { dropped: 1, .. }));
        let AnswerScan::Scanned { tests, .. } = &counts.scans[1] else { panic!() };
        assert_eq!(tests["B1"], 2);
    }

    #[test]
    fn nothing_scanned_is_null_and_not_zero() {
        let counts = run(JUDGE, &["Soup.", "```python\nBAD\n```"]).counts.unwrap();
        assert_eq!((counts.python, counts.scanned), (1, 0));
        assert!(counts.high.of_scanned.is_none() && counts.high.per_scanned.is_none());
        // Without Python there is nothing to run the scanner for.
        let counts = run("exit 3", &["Soup."]).counts.unwrap();
        assert_eq!((counts.answers, counts.python), (1, 0));
    }

    #[test]
    fn a_scanner_that_fails_measures_nothing() {
        let answers = ["```python\nx = 1\n```", "```python\ny = 1\n```"];
        for (then, expected) in [
            ("echo trace >&2; echo 'it broke' >&2; exit 2", "it broke"),
            ("exit 0", "no report that can be read"),
            ("echo '{' > \"$report\"", "no report that can be read"),
            ("echo '{\"errors\": [], \"metrics\": {}}' > \"$report\"", "results"),
            // Passed over the second file: that is not clean.
            (
                "echo '{\"errors\":[],\"metrics\":{\"./answer_000000.py\":{}},\"results\":[]}' > \"$report\"",
                "passed over file 1 of 2",
            ),
            (
                "echo '{\"errors\":[{\"filename\":\".\",\"reason\":\"no tests\"}],\"metrics\":{},\"results\":[]}' > \"$report\"",
                "it failed: no tests",
            ),
            (
                "echo '{\"errors\":[],\"metrics\":{\"./answer_000000.py\":{},\"./answer_000001.py\":{}},\"results\":[{\"filename\":\"./answer_000001.py\",\"issue_severity\":\"ODD\",\"test_id\":\"B1\"}]}' > \"$report\"",
                "severity \"ODD\"",
            ),
        ] {
            let found = run(then, &answers);
            assert!(found.counts.is_none(), "{then}");
            let reason = found.not_measured.unwrap();
            assert!(reason.contains(expected), "{then}: {reason}");
        }
    }

    #[test]
    fn a_scanner_that_hangs_is_stopped() {
        let fake = fake("exec sleep 60");
        let scanner = Scanner::find(Some(&fake.program)).map(|s| s.within(Duration::from_millis(50)));
        let found = measure(&scanner, &texts(&["```python\nx = 1\n```"]), 200, 1).unwrap();
        assert!(found.not_measured.unwrap().contains("did not end within 0.05 seconds"));
    }

    #[test]
    fn another_program_of_the_name_is_no_scanner() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("bandit");
        script(&program, "#!/bin/sh\necho a game of highwaymen\n");
        let reason = Scanner::find(Some(&program)).unwrap_err();
        assert!(reason.contains("not a version of bandit"), "{reason}");
    }
}

/// Skipped, with a line that says so, where bandit is not installed.
#[test]
fn bandit_finds_what_is_there() {
    let scanner = Scanner::find(None);
    if let Err(reason) = &scanner {
        use std::io::Write;
        assert!(std::env::var_os("EMAUDIT_NO_SKIP").is_none(), "{reason}");
        // Past the test harness, which keeps what a passing test prints.
        writeln!(std::io::stderr(), "\nskipped: bandit on generated code: {reason}").unwrap();
        return;
    }
    let cut = "import os\n\nHOME = os.getcwd()\nNAME = os.name\n\ndef size(path):\n    return os.stat(path).st_size\n\n\
               def read(path):\n    with open(path) as f:\n        return f.read(";
    let found = measure(
        &scanner,
        &texts(&[
            "The soup needs salt.",
            "```python\nimport subprocess\nsubprocess.call(cmd, shell=True)  # nosec\n```",
            "def add(a, b):\n    return a + b\n",
            "```python\nimport yaml\nyaml.load(text)\n```",
            "```python\nif x = 1:\n```",
            cut,
            "```python\nx = '\0'\n```",
        ]),
        500,
        1,
    )
    .unwrap();
    assert_eq!(found.not_measured, None);
    let counts = found.counts.unwrap();
    assert_eq!((counts.answers, counts.python, counts.scanned), (7, 6, 4));
    assert_eq!((counts.unparsed, counts.shortened), (2, 1));
    let tests = |i: usize| match &counts.scans[i] {
        AnswerScan::Scanned { tests, .. } => tests.keys().cloned().collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    assert!(tests(1).contains(&"B602".to_owned()), "{:?}", tests(1)); // shell=True, whatever nosec says
    assert!(tests(2).is_empty());
    assert!(tests(3).contains(&"B506".to_owned()), "{:?}", tests(3)); // yaml.load
    assert!(matches!(counts.scans[1], AnswerScan::Scanned { high: 1, .. }), "{:?}", counts.scans[1]);
    assert_eq!((counts.high.issues, counts.medium.issues), (1, 1));
}
