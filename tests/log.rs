//! Audit logs: what is written is verified, and whatever is done to a line afterwards is found.

use emaudit::log::{self, AuditLog};
use emaudit::{Error, State, Verdict};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::process::Command;

/// Something done to the lines of a log.
type Edit = fn(&mut Vec<String>);

fn verdict(score: f32) -> Verdict {
    let state = if score > 3.0 { State::Flagged } else { State::Clean };
    Verdict {
        state,
        score,
        threshold: 3.0,
        rate: 0.01,
        rate_upper: 0.009,
        tokens: 4,
        aggregation: 1,
        kernel: 2,
        ..Verdict::default()
    }
}

/// A log of five lines in `folder`, and its lines.
fn written(folder: &Path) -> (std::path::PathBuf, Vec<String>) {
    let path = folder.join("audit.jsonl");
    let mut log = AuditLog::open(&path).unwrap();
    for (i, score) in [0.25, 4.5, f32::NAN, -1.0].into_iter().enumerate() {
        log.append(&format!("slot {i} \"quoted\"\nü"), &verdict(score)).unwrap();
    }
    log.append("", &Verdict::default()).unwrap();
    log.sync().unwrap();
    assert_eq!(log.records(), 5);
    let lines = std::fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
    (path, lines)
}

fn broken(path: &Path, lines: &[String]) -> String {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(path, text).unwrap();
    match log::verify(path, None) {
        Err(Error::BrokenLog(sentence)) => sentence,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_chain_is_that_of_the_documentation() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lines) = written(folder.path());
    assert_eq!(lines.len(), 5);
    let mut previous = "0".repeat(64);
    for (i, line) in lines.iter().enumerate() {
        // By hand, without the library.
        let (content, rest) = line.split_once(",\"hash\":\"").unwrap();
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        let digest: String = Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(rest, format!("{digest}\"}}"));
        assert_eq!((&value["record"], &value["previous"]), (&i.into(), &previous.as_str().into()));
        previous = digest;
    }
    let third: serde_json::Value = serde_json::from_str(&lines[2]).unwrap();
    assert!(third["score"].is_null() && third["sequence"] == "slot 2 \"quoted\"\nü");
    let second: serde_json::Value = serde_json::from_str(&lines[1]).unwrap();
    assert_eq!(
        (&second["state"], &second["score"], &second["kernel"]),
        (&"flagged".into(), &4.5.into(), &"portable".into())
    );
    let chain = log::verify(&path, None).unwrap();
    assert_eq!((chain.records, emaudit::directions::digest::to_hex(&chain.head)), (5, previous));
}

#[test]
fn a_log_goes_on_where_it_was_and_has_one_writer() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lines) = written(folder.path());
    let early = log::verify(&path, None).unwrap().head;
    let mut log = AuditLog::open(&path).unwrap();
    assert_eq!((log.records(), log.head()), (5, early));
    assert!(matches!(AuditLog::open(&path), Err(Error::Io { action: "lock", .. })));
    log.append("later", &verdict(1.0)).unwrap();
    assert!(log.append(&"x".repeat(5000), &verdict(1.0)).is_err());
    log.append(&"x".repeat(4096), &verdict(1.0)).unwrap();
    drop(log);
    // A head that was kept finds a log whose end was cut off behind it, and no other.
    let whole = std::fs::read_to_string(&path).unwrap();
    let late = log::verify(&path, Some(early)).unwrap();
    assert_eq!(late.records, 7);
    std::fs::write(&path, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    assert!(log::verify(&path, None).is_ok() && log::verify(&path, Some(early)).is_ok());
    assert!(matches!(log::verify(&path, Some(late.head)), Err(Error::BrokenLog(_))));
    // Half a line, as a crash leaves it.
    std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    assert!(
        matches!(AuditLog::open(&path), Err(Error::BrokenLog(s)) if s.contains("line 7") && s.contains("incomplete"))
    );
}

#[test]
fn every_change_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lines) = written(folder.path());
    // Every byte of the second line, one at a time.
    for at in 0..lines[1].len() {
        let mut changed = lines.clone();
        let mut bytes = changed[1].clone().into_bytes();
        bytes[at] ^= 1;
        let Ok(text) = String::from_utf8(bytes) else { continue };
        changed[1] = text;
        assert!(broken(&path, &changed).contains("line 2"), "byte {at}");
    }
    let edits: [(&str, Edit); 6] = [
        ("line 2", |l| drop(l.remove(1))),
        ("line 1", |l| drop(l.remove(0))),
        ("line 3", |l| l.insert(2, l[1].clone())),
        ("line 2", |l| l.swap(1, 3)),
        ("line 4", |l| l.insert(3, String::new())),
        ("line 5", |l| l[4].push(' ')),
    ];
    for (place, edit) in edits {
        let mut changed = lines.clone();
        edit(&mut changed);
        assert!(broken(&path, &changed).contains(place), "{place}");
    }
    // A line with a right hash that says a thing twice, has another spacing, or another version.
    for (from, to) in [("\"tokens\":4", "\"tokens\":4,\"tokens\":5"), (":4,", ": 4,"), ("log\":1", "log\":2")]
    {
        let content = lines[0].split_once(",\"hash\":").unwrap().0.replacen(from, to, 1);
        assert!(!lines[0].starts_with(&content));
        let digest: String = Sha256::digest(&content).iter().map(|b| format!("{b:02x}")).collect();
        let forged = format!("{content},\"hash\":\"{digest}\"}}");
        assert!(broken(&path, &[forged]).contains("line 1"), "{to}");
    }
}

#[test]
fn the_command_verifies() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lines) = written(folder.path());
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_emaudit"));
        let output = command.args(["log", "verify"]).arg(&path).args(arguments).output().unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let head = lines[3].rsplit('"').nth(1).unwrap();
    let (code, page) = run(&["--head", head]);
    assert!(code == 0 && page.contains("5 records"), "{page}");
    let (code, json) = run(&["--json"]);
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(code == 0 && value["records"] == 5 && lines[4].contains(value["head"].as_str().unwrap()));
    let (code, page) = run(&["--head", &"7".repeat(64)]);
    assert!(code == 1 && page.contains("cut or written anew"), "{page}");
    assert_eq!(run(&["--head", "12"]).0, 1);
    std::fs::write(&path, "{}\n").unwrap();
    let (code, page) = run(&[]);
    assert!(code == 1 && page.contains("line 1"), "{page}");
}
