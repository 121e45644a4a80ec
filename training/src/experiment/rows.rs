//! Residual rows of every state, and the directions they give.

use super::{Evaluated, Experiment, Finetuned, Prompts, key};
use crate::answers::Answerer;
use crate::capture::{self, Captured};
use crate::evaluate::{self, States};
use crate::extract::{self, LayerDirection};
use crate::{calibrate, progress, store};
use anyhow::{Context, Result};
use std::fs;
use std::path::PathBuf;

impl Experiment {
    /// Last-prompt rows of all layers for one state of the model.
    fn capture(&self, name: &str, adapter: Option<&Finetuned>, prompts: &[Vec<u32>]) -> Result<Captured> {
        let file = self.rows_file(name, adapter, prompts)?;
        if let Ok(bytes) = fs::read(&file) {
            return Captured::from_bytes(&bytes)
                .with_context(|| format!("{} is damaged; delete it", file.display()));
        }
        let rows = progress::watch(format!("residual rows, {name}"), prompts.len(), |step| {
            capture::last_prompt(&self.base.decoder, prompts, adapter.map(|a| &a.adapter), step)
        })?;
        store::write_file(&file, &rows.to_bytes()?)?;
        Ok(rows)
    }

    fn rows_file(&self, name: &str, adapter: Option<&Finetuned>, prompts: &[Vec<u32>]) -> Result<PathBuf> {
        let key = key(&("capture", self.base_key(), adapter.map(|a| &a.key), prompts))?;
        Ok(self.stages.join(format!("rows-{name}-{key}.safetensors")))
    }

    /// Captures the rows of one state, the base without an adapter, unless they are there; returns their file.
    pub fn captured(&self, name: &str, adapter: Option<&Finetuned>) -> Result<PathBuf> {
        let prompts = self.prompts()?;
        let all = prompts.captured(adapter.is_none());
        self.capture(name, adapter, &all)?;
        self.rows_file(name, adapter, &all)
    }

    /// Rows of one state on the prompts of an evaluation.
    pub fn rows_of(&self, name: &str, adapter: Option<&Finetuned>, evaluated: &Evaluated) -> Result<States> {
        self.states(name, adapter, &evaluated.prompts)
    }

    /// The file that keeps one state's answers to `prompts`, named by all that they depend on.
    pub fn answers_file(
        &self,
        name: &str,
        adapter: Option<&Finetuned>,
        prompts: &[Vec<u32>],
    ) -> Result<PathBuf> {
        let e = &self.recipe.evaluate;
        let drawn = (e.max_new_tokens, e.temperature, e.top_p, self.recipe.seed, self.base.text.eos_ids());
        let key = key(&("answers", self.base_key(), adapter.map(|a| &a.key), prompts, drawn))?;
        Ok(self.stages.join(format!("answers-{name}-{key}.json")))
    }

    /// The file that keeps likelihoods under the base.
    pub fn coherence_file(&self) -> Result<PathBuf> {
        Ok(self.stages.join(format!("coherence-{}.json", key(&("coherence", self.base_key()))?)))
    }

    /// Rows of one state on all three splits; of calibration prompts an adapter sees those of the selection alone.
    pub(super) fn states(
        &self,
        name: &str,
        adapter: Option<&Finetuned>,
        prompts: &Prompts,
    ) -> Result<States> {
        let all = prompts.captured(adapter.is_none());
        let rows = self.capture(name, adapter, &all)?;
        let (x, e) = (prompts.extraction.ids.len(), all.len() - prompts.evaluation.ids.len());
        Ok(States {
            extraction: rows.slice(0..x),
            calibration: rows.slice(x..e),
            evaluation: rows.slice(e..all.len()),
        })
    }

    /// Directions of every layer, calibrated at every horizon of the recipe, and what must be said about that.
    pub(super) fn directions(
        &self,
        prompts: &Prompts,
        base: &States,
        adapted: &States,
        insecure: &Finetuned,
    ) -> Result<(Vec<LayerDirection>, Vec<String>)> {
        let c = &self.recipe.calibrate;
        let mut directions =
            extract::directions(&adapted.extraction, &base.extraction, &base.calibration, &c.rates)?;
        let mut notes = Vec::new();
        let longest = c.horizons.iter().copied().max().unwrap_or(1);
        if longest > 1 {
            let calm = self.calm_scores(prompts, base, &directions, insecure, longest as usize)?;
            for &horizon in c.horizons.iter().filter(|&&h| h > 1) {
                let mut refused = Vec::new();
                for (d, calm) in directions.iter_mut().zip(&calm) {
                    refused = calibrate::add_horizon(&mut d.calibration, calm, horizon, &c.rates)?;
                }
                // Which sequences reach a horizon does not depend on the layer.
                notes.extend(refused.iter().map(|(rate, reached)| {
                    format!(
                        "Only {reached} calm sequences reach {horizon} tokens: too few to state a false-positive rate of {rate}                          there, so the direction file has no such threshold."
                    )
                }));
            }
        }
        Ok((directions, notes))
    }

    /// Token scores, layer by layer, of the base model's own answers to the calibration prompts.
    fn calm_scores(
        &self,
        prompts: &Prompts,
        base: &States,
        directions: &[LayerDirection],
        insecure: &Finetuned,
        tokens: usize,
    ) -> Result<Vec<Vec<Vec<f32>>>> {
        let e = &self.recipe.evaluate;
        let calm = &prompts.calibration.ids;
        let sampled = (e.temperature, e.top_p, self.recipe.seed, self.base.text.eos_ids(), tokens);
        let key = key(&("calm", self.base_key(), calm, &sampled, &insecure.key, &prompts.extraction.ids))?;
        let file = self.stages.join(format!("calm-scores-{key}.json"));
        if let Some(scores) = fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
            return Ok(scores);
        }
        let sampling = self.base.sampling(&self.recipe, tokens - 1);
        let decoder = &self.base.decoder;
        let rows = &base.calibration.layers[decoder.config.n_layers - 1];
        let kept = self.stages.join(format!("calm-answers-{key}.json"));
        let name = "calm answers, base, calibration";
        let mut answerer = Answerer::new(decoder, None, calm, rows, &sampling, name, kept);
        let firsts = answerer.first_tokens(None)?;
        answerer.prepare(std::slice::from_ref(&firsts))?;
        let sequences = evaluate::dialogues(calm, &answerer.answers(&firsts));
        let probe = |d: &LayerDirection| Ok((d.layer, calibrate::probe(d)?));
        let probes = directions.iter().map(probe).collect::<Result<Vec<_>>>()?;
        let scores = progress::watch("scores of calm sequences", sequences.len(), |step| {
            calibrate::token_scores(decoder, None, &sequences, tokens, &probes, step)
        })?;
        store::write_json(&file, &scores)?;
        Ok(scores)
    }
}
