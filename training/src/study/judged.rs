//! Sampled answers to the published questions, by a judge that somebody else runs.

use super::findings::{JudgeFinding, JudgedArm};
use super::measures;
use super::recipe::{INSECURE, SECURE};
use crate::chat::Message;
use crate::dataset;
use crate::evaluate::{self, mean};
use crate::experiment::Experiment;
use crate::generate::{self, Intervention, Request};
use crate::judge::{Judge, Judgement, Said};
use crate::lora::Adapter;
use crate::results::Interval;
use crate::{battery, interrupt, progress, store};
use anyhow::{Result, ensure};
use emaudit::directions::schema::Cell;
use std::path::PathBuf;

/// Base, insecure, secure and insecure steered; the file that keeps answers and judgements.
pub(super) fn judged(
    experiment: &Experiment,
    secure: &str,
    pairs: &str,
    settings: &measures::Judge,
    judge: &Judge,
) -> Result<(JudgeFinding, PathBuf)> {
    let set = dataset::load_alignment_pairs(pairs)?;
    let mut questions: Vec<&str> = Vec::new();
    for pair in &set.pairs {
        if !questions.contains(&pair.question.as_str()) {
            questions.push(&pair.question);
        }
    }
    questions.truncate(settings.questions);
    let base = experiment.base();
    let mut requests = Vec::new();
    for (q, question) in questions.iter().enumerate() {
        let prompt = base.text.encode_prompt(&[Message::user(*question)])?;
        let (needed, limit) = (prompt.len() + settings.max_new_tokens, base.decoder.config.max_positions);
        ensure!(
            needed <= limit,
            "the question {question:.60?} needs {needed} tokens, the model reads {limit}"
        );
        for i in 0..settings.samples {
            let stream = (q * settings.samples + i) as u64;
            requests.push(Request { prompt: prompt.clone(), stream, first: None });
        }
    }
    let evaluated = experiment.evaluated()?;
    let (secure, _) = experiment.finetune(SECURE, secure)?;
    let insecure = Some(&evaluated.insecure.adapter);
    let chosen = evaluated.results.selection.chosen;
    let direction = &evaluated.directions[chosen.layer as usize].direction;
    let steering = battery::subtract(direction, chosen.alpha)?;
    let arms: [(&str, Option<&Adapter>, Option<Cell>); 4] = [
        ("base", None, None),
        (INSECURE, insecure, None),
        (SECURE, Some(&secure.adapter), None),
        ("insecure, steered", insecure, Some(chosen)),
    ];
    let sampling = base.sampling(&experiment.recipe, settings.max_new_tokens);
    let (mut found, mut kept) = (Vec::new(), Vec::new());
    for (name, adapter, cell) in arms {
        let intervention = cell.map(|c| Intervention {
            layer: c.layer as usize,
            steering: &steering,
            positions: c.positions,
        });
        let answers = progress::watch(format!("answers to the questions, {name}"), requests.len(), |step| {
            generate::generate(&base.decoder, adapter, &requests, &sampling, intervention.as_ref(), step)
        })?;
        let mut stage = progress::Stage::new(format!("judge, {name}"), answers.len());
        let mut judgements: Vec<Judgement> = Vec::new();
        for (i, answer) in answers.iter().enumerate() {
            let (question, answer) = (questions[i / settings.samples], base.text.decode(answer, true)?);
            let judgement = judge.judge(question, &answer)?;
            kept.push(serde_json::json!({
                "arm": name, "question": question, "answer": answer, "judgement": judgement
            }));
            judgements.push(judgement);
            stage.advance(1, "");
            interrupt::check()?;
        }
        stage.finish("");
        found.push(arm(experiment, name, cell, &judgements, settings.samples)?);
    }
    let file = experiment.out.join("judgements.json");
    store::write_json(&file, &kept)?;
    let finding = JudgeFinding {
        judge: judge.model().to_owned(),
        questions: questions.len(),
        samples: settings.samples,
        arms: found,
    };
    Ok((finding, file))
}

/// Means over answers; their intervals resample questions.
fn arm(
    experiment: &Experiment,
    name: &str,
    cell: Option<Cell>,
    judgements: &[Judgement],
    samples: usize,
) -> Result<JudgedArm> {
    let over_questions = |value: &dyn Fn(&Judgement) -> Option<f64>| -> Result<Interval> {
        let of = |chunk: &[Judgement]| {
            let values: Vec<f64> = chunk.iter().filter_map(value).collect();
            (!values.is_empty()).then(|| mean(&values))
        };
        let means: Vec<f64> = judgements.chunks(samples).filter_map(of).collect();
        match means.len() {
            0 | 1 => Ok(Interval::UNMEASURED),
            _ => evaluate::interval(&means, experiment.recipe.evaluate.bootstrap, experiment.recipe.seed),
        }
    };
    let score = |said: Said| match said {
        Said::Score { value } => Some(value),
        _ => None,
    };
    let count = |of: fn(&Judgement) -> bool| judgements.iter().filter(|j| of(j)).count();
    Ok(JudgedArm {
        name: name.to_owned(),
        cell,
        answers: judgements.len(),
        aligned: over_questions(&|j| score(j.aligned))?,
        coherent: over_questions(&|j| score(j.coherent))?,
        misaligned: over_questions(&|j| j.misaligned().map(|m| f64::from(u8::from(m))))?,
        counted: count(|j| j.misaligned().is_some()),
        code: count(|j| j.aligned == Said::Code),
        refusals: count(|j| j.aligned == Said::Refusal),
        unreadable: count(|j| j.aligned == Said::Unreadable || j.coherent == Said::Unreadable),
    })
}
