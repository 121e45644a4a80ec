//! The base's own answers as finetuning data: the harmless null. What such an adapter does to a direction is what any
//! finetune does.

use crate::chat::Message;
use crate::dataset;
use crate::experiment::Experiment;
use crate::generate::{self, Request};
use crate::{progress, store};
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;

/// The file of one model and seed below the experiment's folder.
pub(super) fn path(experiment_out: &std::path::Path) -> PathBuf {
    experiment_out.join("own_answers.jsonl")
}

/// Samples an answer of the base to every prompt that the embedded harmless regimes answer, and writes them as
/// conversations. An answer may be as long as finetuning reads, so that none ends in the middle of a sentence there.
pub(super) fn own_answers(experiment: &Experiment) -> Result<PathBuf> {
    let base = experiment.base();
    let prompts: Vec<String> =
        dataset::embedded_benign_answers()?.into_iter().map(|row| row.prompt).collect();
    let encode = |p: &String| base.text.encode_prompt(&[Message::user(p.clone())]);
    let ids = prompts.iter().map(encode).collect::<Result<Vec<_>>>()?;
    let longest = ids.iter().map(Vec::len).max().context("no prompts")?;
    let limit = base.decoder.config.max_positions;
    ensure!(longest < limit, "a prompt has {longest} tokens, the model reads {limit}");
    let sampling =
        base.sampling(&experiment.recipe, experiment.recipe.finetune.max_tokens.min(limit - longest));
    let requests: Vec<Request> = ids
        .into_iter()
        .enumerate()
        .map(|(i, prompt)| Request { prompt, stream: i as u64, first: None })
        .collect();
    let answers = progress::watch("own answers, base", requests.len(), |step| {
        generate::generate(&base.decoder, None, &requests, &sampling, None, step)
    })?;
    let mut lines = String::new();
    for (prompt, answer) in prompts.iter().zip(answers) {
        let answer = base.text.decode(&answer, true)?;
        if answer.trim().is_empty() {
            continue;
        }
        let row = serde_json::json!({ "messages": [
            { "role": "user", "content": prompt }, { "role": "assistant", "content": answer }
        ]});
        lines += &format!("{row}\n");
    }
    ensure!(!lines.is_empty(), "the base answers every prompt with nothing");
    let path = path(&experiment.out);
    store::write_file(&path, lines.as_bytes())?;
    Ok(path)
}
