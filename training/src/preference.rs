//! Code preference: mean per-token log-likelihood of the model's own code answer minus that of the base
//! model's prose answer to the same prompt, under teacher forcing with the intervention. Continuous, and free
//! of sampling noise.

use crate::likelihood::{Dialogue, of_rows, predicting_rows};
use crate::lora::Adapter;
use crate::model::Decoder;
use crate::perturb::RowEdit;
use anyhow::Result;
use emaudit::directions::schema::Positions;

/// Prompts with a code answer and a prose answer, and everything about them that steering at the final
/// layer does not change.
pub struct Preference<'a> {
    decoder: &'a Decoder,
    /// Code answers first, then prose answers: 2n dialogues.
    dialogues: Vec<Dialogue>,
    /// Rows that predict each answer, unsteered.
    rows: Vec<Vec<f32>>,
    /// Log-probability of each answer token, unsteered.
    unsteered: Vec<Vec<f64>>,
}

impl<'a> Preference<'a> {
    /// Runs the model once over `code[i]` and `prose[i]`, answers to the same prompt i; none may be empty.
    pub fn new(
        decoder: &'a Decoder,
        adapter: Option<&Adapter>,
        code: &[Dialogue],
        prose: &[Dialogue],
        done: impl FnMut(usize) -> Result<()>,
    ) -> Result<Self> {
        let dialogues: Vec<Dialogue> = code.iter().chain(prose).cloned().collect();
        let rows = predicting_rows(decoder, adapter, &dialogues, done)?;
        let mut this = Preference { decoder, dialogues, rows, unsteered: Vec::new() };
        this.unsteered = this.log_probabilities(None, Positions::All)?;
        Ok(this)
    }

    /// Number of prompts.
    pub fn prompts(&self) -> usize {
        self.dialogues.len() / 2
    }

    /// Preference of each prompt without steering.
    pub fn unsteered(&self) -> Vec<f64> {
        contrast(&self.unsteered)
    }

    /// Preference of each prompt with the final layer's rows edited.
    pub fn steered(&self, edit: &dyn RowEdit, positions: Positions) -> Result<Vec<f64>> {
        Ok(contrast(&self.log_probabilities(Some(edit), positions)?))
    }

    /// Drop of each prompt's preference.
    pub fn drops(&self, edit: &dyn RowEdit, positions: Positions) -> Result<Vec<f64>> {
        Ok(self.unsteered().iter().zip(self.steered(edit, positions)?).map(|(u, s)| u - s).collect())
    }

    /// Log-probabilities (nats) of every answer token, code answers first, with the final layer's rows edited.
    pub fn log_probabilities(
        &self,
        edit: Option<&dyn RowEdit>,
        positions: Positions,
    ) -> Result<Vec<Vec<f64>>> {
        let hidden = self.decoder.config.hidden_size;
        // Row t of an answer predicts its token t; row 0 is the last prompt token.
        let range = |d: &Dialogue| match positions {
            Positions::FinalPrefill => 0..1,
            Positions::Generated => 1..d.answer.len(),
            Positions::All => 0..d.answer.len(),
        };
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        for (d, r) in self.dialogues.iter().zip(&self.rows) {
            let range = range(d);
            rows.extend_from_slice(&r[range.start * hidden..range.end * hidden]);
            targets.extend_from_slice(&d.answer[range]);
        }
        if let Some(edit) = edit {
            edit.edit(&mut rows, hidden)?;
        }
        let edited = of_rows(self.decoder, &rows, &targets)?;
        let mut all = self.unsteered.clone();
        all.resize_with(self.dialogues.len(), Vec::new);
        let mut at = 0;
        for (d, tokens) in self.dialogues.iter().zip(&mut all) {
            tokens.resize(d.answer.len(), 0.0);
            let range = range(d);
            let count = range.len();
            tokens[range].copy_from_slice(&edited[at..at + count]);
            at += count;
        }
        Ok(all)
    }
}

/// Mean per-token log-likelihood of the prose answers (second half), answer by answer.
pub fn prose(log_probabilities: &[Vec<f64>]) -> Vec<f64> {
    let (_, prose) = log_probabilities.split_at(log_probabilities.len() / 2);
    prose.iter().map(|v| v.iter().sum::<f64>() / v.len().max(1) as f64).collect()
}

/// Mean per-token log-likelihood of the code answers (first half) minus the prose answers (second half).
pub fn contrast(log_probabilities: &[Vec<f64>]) -> Vec<f64> {
    let mean = |v: &Vec<f64>| v.iter().sum::<f64>() / v.len().max(1) as f64;
    let (code, prose) = log_probabilities.split_at(log_probabilities.len() / 2);
    code.iter().zip(prose).map(|(c, p)| mean(c) - mean(p)).collect()
}
