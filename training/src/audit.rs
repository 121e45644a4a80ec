//! A model or an adapter that was never trained here, against the direction file of its base: prompts to one verdict.

use crate::base::Base;
use crate::dataset::{PromptSet, Split};
use crate::generate::{self, Request, Sampling};
use crate::likelihood::Dialogue;
use crate::lora::Adapter;
use crate::{calibrate, capture, chat::Message, progress};
use anyhow::{Result, bail, ensure};
use emaudit::audit::{AuditReport, ControlBattery};
use emaudit::directions::Directions;
use emaudit::directions::schema::{IdentityMatch, Site};
use emaudit::{Audit, AuditOptions, Drift, Error, Probe, Rows};

/// False-alarm rate of the comparison with the calm reference.
const DRIFT_RATE: f64 = 0.01;

/// Sequences of one state of a model: the residual row of each last prompt token, and the scores of each sequence's tokens.
pub struct Sequences {
    /// Token ids of each prompt, as the model read them; none where rows alone were given.
    pub prompts: Vec<Vec<u32>>,
    first_rows: Vec<f32>,
    /// In aligned standard deviations, the last prompt token first; NaN where there is none.
    pub scores: Vec<Vec<f32>>,
}

impl Sequences {
    /// Sequences judged by their last prompt token alone: its residual rows, `n x width`, activation units.
    pub fn of_first_rows(probe: &Probe, first_rows: Vec<f32>) -> Result<Self> {
        let scores = calibrate::scores_or_nan(probe, &first_rows)?.into_iter().map(|z| vec![z]).collect();
        Ok(Sequences { prompts: Vec::new(), first_rows, scores })
    }
}

/// Refuses a model that the directions are not for; says whether it is the very one.
pub fn check_identity(directions: &Directions, base: &Base) -> Result<IdentityMatch> {
    directions.manifest().site.check(Site::ResidPost)?;
    Ok(directions.manifest().model.check(&base.identity)?)
}

/// The prompts to audit with: never one that made the directions.
///
/// Of a prompt set that the direction file names, those are the ones of its evaluation split; where the file of the prompts
/// does not state splits, only the seed of the recipe gives that split again. Of any other set they are all.
pub fn prompts(directions: &Directions, set: &PromptSet, seed: Option<u64>) -> Result<Vec<String>> {
    let known = directions.manifest().provenance.datasets.iter().any(|(_, digest)| *digest == set.sha256);
    ensure!(
        !known || set.states_splits || seed.is_some(),
        "the directions were made with {}, which does not state its splits: give --seed with the seed of their recipe, so that \
         the prompts they were made with are left out",
        set.name
    );
    let kept = set.prompts.iter().filter(|p| !known || p.split == Split::Evaluation);
    Ok(kept.map(|p| p.text.clone()).collect())
}

/// Renders the prompts, and refuses those that the model cannot read with an answer of `horizon - 1` tokens.
pub fn encode(base: &Base, prompts: &[String], horizon: u32) -> Result<Vec<Vec<u32>>> {
    let limit = base.decoder.config.max_positions;
    let encode = |text: &String| {
        let ids = base.text.encode_prompt(&[Message::user(text.clone())])?;
        let needed = ids.len() + horizon as usize - 1;
        if needed > limit {
            bail!("the prompt {text:.60?} needs {needed} tokens with its answer, the model reads {limit}");
        }
        Ok(ids)
    };
    prompts.iter().map(encode).collect()
}

/// Runs the prompts through one state of the model, which answers them with at most `sampling.max_new_tokens` tokens: the
/// horizon of the audit without the last prompt token.
pub fn read(
    base: &Base,
    adapter: Option<&Adapter>,
    name: &str,
    prompts: &[Vec<u32>],
    probe: &Probe,
    sampling: &Sampling,
) -> Result<Sequences> {
    let Some(layer) = probe.layer() else { bail!("the probe has no direction file") };
    let (decoder, layer) = (&base.decoder, layer as usize);
    let Sequences { first_rows, mut scores, .. } =
        Sequences::of_first_rows(probe, self::first_rows(base, adapter, name, prompts, layer)?)?;
    // A sequence that is not finite from its first token on is invalid, whatever it would answer.
    let finite: Vec<usize> = (0..scores.len()).filter(|&i| scores[i][0].is_finite()).collect();
    if sampling.max_new_tokens > 0 && !finite.is_empty() {
        let request = |&i: &usize| Request { prompt: prompts[i].clone(), stream: i as u64, first: None };
        let requests: Vec<Request> = finite.iter().map(request).collect();
        let answers = progress::watch(format!("answers, {name}"), requests.len(), |step| {
            generate::generate(decoder, adapter, &requests, sampling, None, step)
        })?;
        let dialogue = |(request, answer): (Request, Vec<u32>)| Dialogue { prompt: request.prompt, answer };
        let dialogues: Vec<Dialogue> = requests.into_iter().zip(answers).map(dialogue).collect();
        let probes = [(layer, probe.clone())];
        let mut of_layer = progress::watch(format!("scores of answers, {name}"), dialogues.len(), |step| {
            calibrate::token_scores(decoder, adapter, &dialogues, sampling.max_new_tokens + 1, &probes, step)
        })?;
        for (i, tokens) in finite.into_iter().zip(of_layer.swap_remove(0)) {
            scores[i] = tokens;
        }
    }
    Ok(Sequences { prompts: prompts.to_vec(), first_rows, scores })
}

/// Residual rows of the last prompt tokens at one layer: `prompts x hidden`.
pub fn first_rows(
    base: &Base,
    adapter: Option<&Adapter>,
    name: &str,
    prompts: &[Vec<u32>],
    layer: usize,
) -> Result<Vec<f32>> {
    let mut captured = progress::watch(format!("residual rows, {name}"), prompts.len(), |step| {
        capture::last_prompt(&base.decoder, prompts, adapter, step)
    })?;
    ensure!(layer < captured.layers.len(), "the model has no layer {layer}");
    Ok(captured.layers.swap_remove(layer))
}

/// The library's verdict on the suspect's sequences, with the calm reference where there is one.
pub fn judge(
    probe: &Probe,
    options: AuditOptions,
    suspect: &Sequences,
    calm: Option<&Sequences>,
) -> Result<AuditReport> {
    let mut audit = Audit::new(probe, options)?;
    let drift = calm.map(|calm| drift_of(probe, calm)).transpose()?.flatten();
    if let Some(drift) = &drift {
        audit.watch(drift)?;
    }
    for tokens in &suspect.scores {
        audit.push(tokens);
    }
    let mut report = AuditReport::new(probe, audit.verdict());
    report.reference = drift.map(|drift| drift.report());
    if let Some(calm) = calm {
        report.compare(controls(probe, suspect, calm));
    }
    Ok(report)
}

/// The drift of the calm sequences in one window; `None`, with a note, where so few could never show one.
fn drift_of(probe: &Probe, calm: &Sequences) -> Result<Option<Drift>> {
    let mut drift = match Drift::new(probe, calm.scores.len() as u32, DRIFT_RATE) {
        Ok(drift) => drift,
        Err(Error::RateUnsupported { reason, .. }) => {
            progress::note(&format!("whether the calibration still holds is not checked: {reason}"));
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    calm.scores.iter().for_each(|tokens| drift.push(tokens[0]));
    Ok(Some(drift))
}

fn controls(
    probe: &Probe,
    suspect: &Sequences,
    calm: &Sequences,
) -> emaudit::Result<emaudit::audit::ControlRanks> {
    let mut battery = ControlBattery::new(probe)?;
    let width = probe.width();
    let rows = |of: &Sequences| of.first_rows.len() / width;
    battery.push_calm(&Rows::new(&calm.first_rows, rows(calm), width, width)?)?;
    battery.push_suspect(&Rows::new(&suspect.first_rows, rows(suspect), width, width)?)?;
    battery.ranks()
}
