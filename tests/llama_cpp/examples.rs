//! The examples of `bindings/llama_cpp`, as their user runs them.

use super::fixture::MIDDLE;
use super::ready;
use super::toolchain::run;
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs `stream` on two questions.
fn stream(programs: &Path, model: &Path, directions: &Path, extra: &[&str]) -> String {
    let mut command = Command::new(programs.join("stream"));
    command.arg(model).arg(directions).args(["--layer", &MIDDLE.to_string(), "--tokens", "8"]).args(extra);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"How do I make a cup of tea?\nWhy is the sky blue?\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// The texts of the tokens, without their scores.
fn tokens(output: &str) -> Vec<&str> {
    output
        .lines()
        .filter(|l| !l.starts_with("==") && !l.starts_with("--"))
        .filter_map(|l| l.get(11..))
        .collect()
}

#[test]
fn the_server_shows_scores_verdicts_metrics_and_a_log() {
    let Some((programs, model, directory)) = ready() else { return };
    let at = |name: &str| directory.path().join(name);
    let (metrics, log) = (at("metrics.prom"), at("audit.jsonl"));
    let keep = ["--metrics", metrics.to_str().unwrap(), "--log", log.to_str().unwrap()];
    let calm = stream(programs, model, &at("calm.safetensors"), &keep);
    assert_eq!(calm.matches("== clean after 8 tokens").count(), 2, "{calm}");
    assert!(tokens(&calm).len() == 16, "{calm}");
    let blocked = stream(programs, model, &at("alarm.safetensors"), &["--block", "yes"]);
    assert_eq!(blocked.matches("== flagged and blocked after 1 tokens").count(), 2, "{blocked}");
    assert!(tokens(&blocked).is_empty(), "{blocked}");
    let steered = stream(programs, model, &at("calm.safetensors"), &["--steer", "40"]);
    assert_ne!(tokens(&steered), tokens(&calm));

    let text = std::fs::read_to_string(metrics).unwrap();
    for series in [
        "emaudit_batches_total{outcome=\"ok\"} 16",
        "emaudit_batches_total{outcome=\"unaudited\"} 0",
        "emaudit_sequences_total{verdict=\"clean\"} 2",
        "emaudit_tokens_nonfinite_total 0",
    ] {
        assert!(text.lines().any(|line| line == series), "{series} is not in\n{text}");
    }
    check_histogram(&text);

    let mut verify = Command::new(env!("CARGO_BIN_EXE_emaudit"));
    assert!(run(verify.args(["log", "verify"]).arg(&log)).contains("2 records, the chain holds"));
    let lines = std::fs::read_to_string(log).unwrap();
    let last: serde_json::Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    let digest: [u8; 32] = Sha256::digest(std::fs::read(at("calm.safetensors")).unwrap()).into();
    assert_eq!(last["directions"], emaudit::directions::digest::to_hex(&digest));
    assert_eq!(
        (&last["sequence"], &last["state"], &last["tokens"]),
        (&"request 1".into(), &"clean".into(), &8.into())
    );
}

/// Buckets count up to the count, and every sample line has a name, perhaps labels, and a number.
fn check_histogram(text: &str) {
    let value = |line: &str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
    let samples = || text.lines().filter(|line| !line.starts_with('#'));
    assert!(samples().all(|line| line.starts_with("emaudit_") && value(line).is_finite()));
    let buckets: Vec<f64> =
        samples().filter(|l| l.starts_with("emaudit_token_score_bucket")).map(value).collect();
    let count = samples().find(|l| l.starts_with("emaudit_token_score_count")).map(value).unwrap();
    assert!(buckets.is_sorted() && buckets.len() == 13 && buckets[12] == count && count > 16.0, "{text}");
    let types = text.lines().filter(|line| line.starts_with("# TYPE ")).count();
    assert!(types == 4 && text.lines().filter(|line| line.starts_with("# HELP ")).count() == types);
}

#[test]
fn four_tenants_share_a_batch_and_two_are_steered() {
    let Some((programs, model, directory)) = ready() else { return };
    let batch = |alpha: &str| {
        let mut command = Command::new(programs.join("batch"));
        command.arg(model).arg(directory.path().join("calm.safetensors"));
        let output = run(command.args(["--layer", &MIDDLE.to_string(), "--tokens", "8", "--alpha", alpha]));
        let texts = output.split("slot ").skip(1).map(|slot| slot.split_once('\n').unwrap().1.to_owned());
        texts.collect::<Vec<String>>()
    };
    let (plain, steered) = (batch("0"), batch("40"));
    assert_eq!(plain.len(), 4);
    // The same questions in pairs; steering changes its two slots and leaves the other two alone.
    assert!(plain[0] == plain[1] && plain[2] == plain[3] && plain[0] != plain[2], "{plain:?}");
    for slot in 0..4 {
        assert_eq!(plain[slot] == steered[slot], slot % 2 == 0, "{plain:?} {steered:?}");
    }
}
